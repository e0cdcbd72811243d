# SPDX-License-Identifier: GPL-2.0-or-later
'''
Finds UEFI firmware that a test can boot a disk with

That is the firmware of the QEMU build that is tested, or else what the
host's firmware descriptors offer: see docs/interop/firmware.json.
'''

import json
import logging
import os
import re
from fnmatch import fnmatchcase
from pathlib import Path
from subprocess import run
from typing import Any, Dict, Iterator, NamedTuple, Optional


# Where descriptors are; one in a later folder replaces its namesake
FOLDERS = ('/usr/share/qemu/firmware', '/etc/qemu/firmware')

# What would refuse a guest that nobody signed, or needs more than flash
UNWANTED = {'enrolled-keys', 'secure-boot', 'requires-smm',
            'host-uefi-vars'}


class Uefi(NamedTuple):
    '''
    Two raw images of flash: @code is only read, @variables is a template,
    to be copied for each guest
    '''
    code: Path
    variables: Path

    @property
    def usable(self) -> bool:
        '''Whether both files can be read'''
        return all(os.access(path, os.R_OK) for path in self)


# Names of machines, and of what the QEMU build has for them
BUILT = {
    'pc-*': Uefi(Path('edk2-x86_64-code.fd'), Path('edk2-i386-vars.fd')),
    'virt-*': Uefi(Path('edk2-aarch64-code.fd'), Path('edk2-arm-vars.fd')),
}

# Where the host lacks firmware: the packages of Debian and of Fedora
PACKAGES = {'x86_64': 'ovmf or edk2-ovmf',
            'aarch64': 'qemu-efi-aarch64 or edk2-aarch64'}

_log = logging.getLogger('qemu-test')


def machine_type(qemu: str, name: str) -> str:
    '''
    @params qemu: path of a QEMU binary
    @params name: name of a machine, which may be an alias

    Returns the machine's own name: that of 'q35' may be 'pc-q35-10.0'
    '''
    told = run([qemu, '-M', 'help'], capture_output=True, check=True,
               encoding='utf8').stdout
    alias = re.search(rf'^{re.escape(name)} .*\(alias of (\S+)\)', told,
                      re.MULTILINE)
    return alias.group(1) if alias else name


def find_uefi(arch: str, machine: str, pc_bios: Path) -> Optional[Uefi]:
    '''
    @params arch: QEMU's name of the target
    @params machine: the machine's own name, not an alias
    @params pc_bios: folder of the firmware that the QEMU build has

    Returns firmware without secure boot, None if there is none
    '''
    for pattern, files in BUILT.items():
        built = Uefi(pc_bios / files.code, pc_bios / files.variables)
        if fnmatchcase(machine, pattern) and built.usable:
            return built
    for path in _descriptors():
        found = _described(path, arch, machine)
        if found is not None and found.usable:
            _log.debug('Firmware of %s: %s', path, found.code)
            return found
    return None


def _descriptors() -> Iterator[Path]:
    '''The descriptors' files, the most preferred first'''
    files: Dict[str, Path] = {}
    for folder in FOLDERS:
        files.update((path.name, path)
                     for path in Path(folder).glob('*.json'))
    for name in sorted(files):
        yield files[name]


def _described(path: Path, arch: str, machine: str) -> Optional[Uefi]:
    '''What a descriptor offers, None if it is of no use here'''
    try:
        text = path.read_text(encoding='utf-8')
        # An empty file hides its namesake
        return _matching(json.loads(text), arch, machine) if text else None
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as e:
        _log.debug('Firmware descriptor %s is passed over: %r', path, e)
        return None


def _matching(firmware: Any, arch: str, machine: str) -> Optional[Uefi]:
    mapping = firmware['mapping']
    if ('uefi' not in firmware['interface-types']
            or UNWANTED.intersection(firmware['features'])
            or mapping['device'] != 'flash'
            or mapping.get('mode', 'split') != 'split'):
        return None
    if not any(target['architecture'] == arch
               and any(fnmatchcase(machine, pattern)
                       for pattern in target['machines'])
               for target in firmware['targets']):
        return None
    files = [mapping['executable'], mapping['nvram-template']]
    if any(file['format'] != 'raw' for file in files):
        return None
    return Uefi(*(Path(file['filename']) for file in files))
