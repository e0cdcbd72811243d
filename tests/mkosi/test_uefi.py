# SPDX-License-Identifier: GPL-2.0-or-later
'''Tests of how firmware is found.'''

import json
import shutil
from typing import Any, List

import pytest

from fixtures_asset import Bench, skipped

pytest_plugins = ['fixtures_asset']


DESCRIPTOR = {
    'description': 'made up', 'interface-types': ['uefi'],
    'mapping': {
        'device': 'flash',
        'executable': {'filename': 'CODE', 'format': 'raw'},
        'nvram-template': {'filename': 'VARS', 'format': 'raw'}},
    'targets': [{'architecture': 'x86_64',
                 'machines': ['pc-i440fx-*', 'pc-q35-*']}],
    'features': ['acpi-s3', 'verbose-dynamic'], 'tags': []}

FIND = '''
from pathlib import Path
from qemu_test import uefi
work = Path(os.environ['WORK'])
uefi.FOLDERS = [work / 'share', work / 'etc']
found = uefi.find_uefi('x86_64', os.environ.get('MACHINE', 'pc-q35-10.0'),
                       work / 'pc-bios')
print(json.dumps(found and [path.name for path in found]))
'''


class Firmware:
    '''A host with descriptors of firmware, and what is found there.'''
    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.work = bench.tree.parent / 'firmware'
        for folder in ('share', 'etc', 'pc-bios'):
            (self.work / folder).mkdir(parents=True)
        for name in ('CODE', 'VARS'):
            (self.work / name).touch()

    def describe(self, name: str, *path: Any, value: Any = None) -> None:
        '''Write the descriptor @name, with another @value at @path.'''
        content = json.loads(json.dumps(DESCRIPTOR))
        if path:
            place = content
            for key in path[:-1]:
                place = place[key]
            place[path[-1]] = value
        text = json.dumps(content)
        for kind in ('CODE', 'VARS'):
            text = text.replace(f'"{kind}', f'"{self.work}/{kind}')
        (self.work / name).write_text(text, 'utf-8')

    def find(self, **env: str) -> Any:
        '''The names of the files that are found, None if there are none.'''
        return self.bench.script(FIND, WORK=str(self.work), **env)


@pytest.fixture(name='firmware')
def fixture_firmware(bench: Bench) -> Firmware:
    '''A host without firmware.'''
    return Firmware(bench)


def test_no_firmware(firmware: Firmware) -> None:
    '''Neither built nor described.'''
    assert firmware.find() is None


def test_described_firmware(firmware: Firmware) -> None:
    '''For the machine that it is for, and for no other.'''
    firmware.describe('share/60-a.json')
    assert firmware.find() == ['CODE', 'VARS']
    assert firmware.find(MACHINE='microvm') is None


@pytest.mark.parametrize('path, value', [
    (['interface-types'], ['bios']),
    (['features'], ['secure-boot']),
    (['features'], ['enrolled-keys', 'acpi-s3']),
    (['features'], ['requires-smm']),
    (['features'], ['host-uefi-vars']),
    (['features'], None),
    (['mapping', 'device'], 'memory'),
    (['mapping', 'mode'], 'stateless'),
    (['mapping', 'mode'], 'combined'),
    (['mapping', 'executable', 'format'], 'qcow2'),
    (['mapping', 'nvram-template', 'format'], 'qcow2'),
    (['mapping', 'nvram-template'], {}),
    (['mapping', 'executable', 'filename'], '/no/such/file'),
    (['mapping', 'nvram-template', 'filename'], '/no/such/file'),
    (['mapping', 'executable'], []),
    (['mapping'], None),
    (['targets'], []),
    (['targets'], 7),
    (['targets', 0, 'architecture'], 'aarch64'),
    (['targets', 0, 'machines'], ['pc-i440fx-*']),
    (['targets', 0], {}),
])
def test_unfit_firmware(firmware: Firmware, path: List[Any],
                        value: Any) -> None:
    '''It is passed over, and the next one is taken.'''
    firmware.describe('share/10-a.json', *path, value=value)
    assert firmware.find() is None
    firmware.describe('share/20-b.json')
    assert firmware.find() == ['CODE', 'VARS']


@pytest.mark.parametrize('text', ['{', '[]', 'null', '"text"', '\xff'])
def test_broken_descriptor(firmware: Firmware, text: str) -> None:
    '''As good as none.'''
    (firmware.work / 'share/10-a.json').write_text(text, 'latin-1')
    firmware.describe('share/20-b.json')
    assert firmware.find() == ['CODE', 'VARS']


def test_preferred_firmware(firmware: Firmware) -> None:
    '''By name; a namesake of the administrator's replaces or hides.'''
    for kind in ('CODE1', 'CODE2', 'CODE3'):
        (firmware.work / kind).touch()
    place = ('mapping', 'executable', 'filename')
    firmware.describe('share/60-a.json', *place, value='CODE1')
    firmware.describe('share/70-a.json', *place, value='CODE2')
    assert firmware.find() == ['CODE1', 'VARS']
    firmware.describe('etc/60-a.json', *place, value='CODE3')
    assert firmware.find() == ['CODE3', 'VARS']
    (firmware.work / 'etc/60-a.json').write_text('')
    assert firmware.find() == ['CODE2', 'VARS']
    firmware.describe('etc/50-a.json', *place, value='CODE3')
    assert firmware.find() == ['CODE3', 'VARS']


def test_built_firmware(firmware: Firmware) -> None:
    '''That of the QEMU build comes first, if it is whole.'''
    firmware.describe('share/60-a.json')
    (firmware.work / 'pc-bios/edk2-x86_64-code.fd').touch()
    assert firmware.find() == ['CODE', 'VARS']
    (firmware.work / 'pc-bios/edk2-i386-vars.fd').touch()
    assert firmware.find() == ['edk2-x86_64-code.fd', 'edk2-i386-vars.fd']
    assert firmware.find(MACHINE='microvm') is None


@pytest.mark.parametrize('name, expected', [
    ('q35', 'pc-q35-9.9'), ('pc', 'pc-i440fx-9.9'), ('microvm', 'microvm'),
    ('pc-q35-9.8', 'pc-q35-9.8'), ('35', '35'), ('nowhere', 'nowhere'),
])
def test_machine_type(bench: Bench, name: str, expected: str) -> None:
    '''Descriptors know no aliases.'''
    qemu = bench.tree.parent / 'qemu'
    qemu.write_text('''#!/bin/sh
cat << END
Supported machines are:
microvm              microvm (i386)
pc                   Standard PC (i440FX + PIIX) (alias of pc-i440fx-9.9)
pc-i440fx-9.9        Standard PC (i440FX + PIIX) (default)
q35                  Standard PC (Q35 + ICH9, 2009) (alias of pc-q35-9.9)
pc-q35-9.9           Standard PC (Q35 + ICH9, 2009)
pc-q35-9.8           Standard PC (Q35 + ICH9, 2009)
END
''', 'utf-8')
    qemu.chmod(0o755)
    assert bench.script(
        'from qemu_test import uefi\n'
        f'print(json.dumps(uefi.machine_type({str(qemu)!r}, {name!r})))'
    ) == expected


BOOT = '''\
from qemu_test import MkosiAsset, MkosiTest, uefi

uefi.FOLDERS = ()

class Tiny(MkosiTest):
    ASSET_IMAGE = MkosiAsset('tiny')
    machine = 'microvm'

    def test_it(self):
        self.boot_firmware(self.ASSET_IMAGE)

if __name__ == '__main__':
    MkosiTest.main()
'''


def test_boot_without_firmware(bench: Bench) -> None:
    '''A skip that says what to install.'''
    qemu = bench.tree.parent / 'qemu-system-x86_64'
    qemu.symlink_to(shutil.which('true') or 'true')
    bench.fill()
    result = bench.python(bench.write(BOOT),
                          QEMU_TEST_QEMU_BINARY=str(qemu))
    reason = skipped(result.stdout)
    assert 'no UEFI firmware for machine microvm' in reason
    assert 'install ovmf or edk2-ovmf' in reason
