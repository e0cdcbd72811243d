# SPDX-License-Identifier: GPL-2.0-or-later
'''
Hides a /dev/kvm that does not work.

That the node opens, or that a virtual machine can be made, proves nothing:
some nested hosts then hang or abort.  Only code that ran does.
'''

import os
from pathlib import Path
import platform
import shutil
import subprocess
import tempfile
from typing import List, Optional


NODE = '/dev/kvm'
LIMIT = 5       # seconds; a working KVM needs a few tenths
EXIT_PORT = 0xf4
EXIT_VALUE = 0x10

# mov al, EXIT_VALUE; mov dx, EXIT_PORT; out dx, al; hlt
_CODE = bytes([0xb0, EXIT_VALUE, 0xba, EXIT_PORT, 0x00, 0xee, 0xf4])


def boot_sector() -> bytes:
    '''A disk whose only act is to tell isa-debug-exit that it ran.'''
    return _CODE.ljust(510, b'\0') + b'\x55\xaa'


def runs_code(emulator: str, accelerator: str) -> bool:
    '''Whether firmware and a guest's code run under @accelerator.'''
    with tempfile.NamedTemporaryFile(prefix='mkosi-probe-') as disk:
        disk.write(boot_sector())
        disk.flush()
        try:
            status = subprocess.run(
                [emulator, '-accel', accelerator, '-machine', 'pc',
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


def works(emulator: Optional[str]) -> bool:
    '''Whether KVM runs code with the x86_64 @emulator on this host.'''
    return (emulator is not None and platform.machine() == 'x86_64'
            and runs_code(emulator, 'kvm'))


def masked(command: List[str], folder: Path) -> List[str]:
    '''
    @command, wrapped so that it can't open /dev/kvm.

    The node is covered by an empty read-only file (in @folder) in a mount
    namespace of the command's own: even root is then refused write access,
    which is what tests look for.
    '''
    if not os.access(NODE, os.R_OK | os.W_OK) or not shutil.which('unshare'):
        return command
    cover = folder / 'no-kvm'
    cover.touch()
    mount = ('mount --bind "$0" /dev/kvm && '
             'mount -o remount,bind,ro /dev/kvm && exec "$@"')
    wrapper = ['unshare', '--mount']
    if os.geteuid() != 0:
        # A user mounts as root of a user namespace, and then becomes
        # himself again in one more
        wrapper += ['--map-root-user']
        command = ['unshare', '--user', f'--map-user={os.getuid()}',
                   f'--map-group={os.getgid()}', '--', *command]
    return [*wrapper, 'sh', '-c', mount, str(cover), *command]
