# SPDX-License-Identifier: GPL-2.0-or-later
'''
Booting a built image in QEMU on this terminal: the quickest proof that it
is what one wants.
'''

import os
import selectors
import subprocess
import sys
import time
from typing import List

from .build import Result
from .command import check_programs
from .error import MkosiError

# Until the prompt comes, in seconds, where nobody watches; emulated on a
# busy machine it takes a few
PATIENCE = 120

MACHINES = {'x86_64': ('q35', 'qemu-system-x86'),
            'aarch64': ('virt', 'qemu-system-arm')}


def qemu_command(result: Result) -> List[str]:
    '''The QEMU command line that boots @result, its disk attached.'''
    target = result.job.target
    machine, package = MACHINES[target.arch]
    qemu = (os.getenv('QEMU_TEST_QEMU_BINARY')
            or f'qemu-system-{target.arch}')
    check_programs({qemu: package})
    paths = {kind: built.path for kind, built in result.artefacts.items()}
    cmdline = ' '.join((*target.boot.cmdline, *target.boot.disk_cmdline))
    return [
        qemu, '-machine', machine, '-accel', 'tcg',
        '-cpu', 'max', '-m', '1G', '-nographic', '-no-reboot',
        '-kernel', str(paths['kernel']), '-initrd', str(paths['initrd']),
        '-append', cmdline,
        '-drive', f'if=none,id=disk,format=qcow2,snapshot=on,'
        f'file={paths["disk"]}',
        '-device', f'{target.boot.disk_device},drive=disk']


def boot(result: Result) -> None:
    '''
    Boot @result with this terminal as its console; where there is no
    terminal, boot it to its prompt and power it off.

    Raises HostError where there is no QEMU, and MkosiError if the guest
    does not come to its prompt or does not power off.
    '''
    command = qemu_command(result)
    if sys.stdin.isatty():
        print('Leave with "poweroff", or with Ctrl-A X.', flush=True)
        subprocess.run(command, check=False)
        return
    with subprocess.Popen(command, stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as process:
        try:
            _drive(process, result)
        finally:
            process.kill()


def _drive(process: 'subprocess.Popen[bytes]', result: Result) -> None:
    assert process.stdin and process.stdout
    boot_info = result.job.target.boot
    wanted = [boot_info.ready.encode(), boot_info.prompt.encode()]
    deadline = time.monotonic() + PATIENCE
    seen = b''
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while selector.select(max(0, deadline - time.monotonic())):
            chunk = os.read(process.stdout.fileno(), 4096)
            if not chunk:
                break
            sys.stdout.buffer.write(chunk)
            sys.stdout.flush()
            seen += chunk
            while wanted and wanted[0] in seen:
                seen = seen.partition(wanted.pop(0))[2]
                if not wanted:
                    process.stdin.write(b'poweroff\n')
                    process.stdin.flush()
    if wanted:
        raise MkosiError(
            f'{result.job.name}: no {wanted[0].decode()!r} on the console '
            f'in {PATIENCE} seconds',
            next_step='boot it on a terminal with --boot and look')
    try:
        status = process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        status = -1
    if status:
        raise MkosiError(f'{result.job.name}: the guest did not power off')
