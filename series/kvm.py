# SPDX-License-Identifier: GPL-2.0-or-later
'''
Hides a /dev/kvm that does not work.

What works is for qemu_test/kvm.py to say, which the tests of the series
ask themselves; this is for all the others, which then hang or abort.

python -m series.kvm EMULATOR FOLDER COMMAND... runs a command like that;
what it takes for that goes into the folder.
'''

from importlib.util import module_from_spec, spec_from_file_location
import os
from pathlib import Path
import platform
import shutil
import subprocess
import sys
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


def _run(emulator: str, folder: str, *command: str) -> int:
    if works(emulator) or not os.access(NODE, os.R_OK | os.W_OK):
        return subprocess.run(command, check=False).returncode
    if subprocess.run(masked(['true'], Path(folder)), check=False,
                      stderr=subprocess.DEVNULL).returncode:
        print(f'{emulator} runs no code with KVM: {NODE} can\'t be hidden '
              'here', file=sys.stderr, flush=True)
        return subprocess.run(command, check=False).returncode
    print(f'{emulator} runs no code with KVM: {NODE} is hidden from '
          + ' '.join(command), file=sys.stderr, flush=True)
    return subprocess.run(masked(list(command), Path(folder)),
                          check=False).returncode


if __name__ == '__main__':
    sys.exit(_run(*sys.argv[1:]))
