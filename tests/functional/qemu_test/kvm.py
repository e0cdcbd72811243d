# SPDX-License-Identifier: GPL-2.0-or-later
'''
Test utilities for KVM that may be there and yet not work

That /dev/kvm opens, or that a virtual machine can be made, proves nothing:
on some nested hosts guests then hang or abort. Only code that ran does.
'''

import os
import platform
import subprocess
import tempfile
from functools import lru_cache


NODE = '/dev/kvm'
LIMIT = 2       # seconds; a working KVM needs a few tenths, as TCG does
EXIT_PORT = 0xf4
EXIT_VALUE = 0x10

# mov al, EXIT_VALUE; mov dx, EXIT_PORT; out dx, al; hlt
_CODE = bytes([0xb0, EXIT_VALUE, 0xba, EXIT_PORT, 0x00, 0xee, 0xf4])


def boot_sector() -> bytes:
    '''A disk whose only act is to tell isa-debug-exit that it ran'''
    return _CODE.ljust(510, b'\0') + b'\x55\xaa'


def runs_code(qemu_bin: str, accelerator: str) -> bool:
    '''Whether firmware and a guest's code run under @accelerator on x86'''
    with tempfile.NamedTemporaryFile(prefix='qemu-probe-') as disk:
        disk.write(boot_sector())
        disk.flush()
        try:
            status = subprocess.run(
                [qemu_bin, '-accel', accelerator, '-machine', 'pc',
                 # what tests that want KVM ask for
                 '-cpu', 'max',
                 '-nodefaults', '-display', 'none', '-no-reboot',
                 '-drive', f'file={disk.name},format=raw,if=ide',
                 '-device',
                 f'isa-debug-exit,iobase={EXIT_PORT:#x},iosize=4'],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL, timeout=LIMIT, check=False
            ).returncode
        except (OSError, subprocess.TimeoutExpired):
            return False
    # The device makes an odd exit status of the value
    return status == (EXIT_VALUE << 1 | 1)


@lru_cache(maxsize=None)
def kvm_works(qemu_bin: str) -> bool:
    '''
    Whether KVM runs guests of the host's own architecture with @qemu_bin.

    On hosts other than x86_64 nothing is run: there, a node that opens and
    an emulator that knows of KVM are taken at their word.
    '''
    if not os.access(NODE, os.R_OK | os.W_OK):
        return False
    arch = os.path.basename(qemu_bin).split('-')[-1]
    if arch != platform.machine():
        return False
    if arch == 'x86_64':
        return runs_code(qemu_bin, 'kvm')
    known = subprocess.run([qemu_bin, '-accel', 'help'], check=False,
                           stdout=subprocess.PIPE, encoding='utf-8').stdout
    return 'kvm' in known.split()
