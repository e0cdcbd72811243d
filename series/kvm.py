# SPDX-License-Identifier: GPL-2.0-or-later
'''
Hides a /dev/kvm that does not work.

What works is for qemu_test/kvm.py to say, which the tests of the series
ask themselves; this is for all the others, which then hang or abort.
'''

from importlib.util import module_from_spec, spec_from_file_location
import os
from pathlib import Path
import platform
import shutil
from types import ModuleType
from typing import List, Optional


def _load() -> ModuleType:
    '''The module alone: its package wants a build folder of QEMU.'''
    path = (Path(__file__).resolve().parent.parent
            / 'tests/functional/qemu_test/kvm.py')
    spec = spec_from_file_location('series.probe', path)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


probe = _load()
NODE: str = probe.NODE


def works(emulator: Optional[str]) -> bool:
    '''Whether KVM runs code with the x86_64 @emulator on this host.'''
    return (emulator is not None and platform.machine() == 'x86_64'
            and probe.kvm_works(emulator))


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
