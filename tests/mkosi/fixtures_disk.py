# SPDX-License-Identifier: GPL-2.0-or-later
'''
Small disks, ESPs and initrds for the tests of what reads them, made by the
real programs of the tools tree.

PYTEST_DONT_REWRITE: test modules import this before they name it a plugin.
'''

import gzip
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
import shlex
import shutil
import struct
from typing import Any, Dict, Optional, Tuple

import pytest

from mkosi_build import gpt, sandbox

EPOCH = 1700000000
MIB = 1 << 20
SEED = '5b1c1e2e-6c0f-4a35-8d0c-6f6e0c3a9b57'
UUIDS = tuple(f'{n}0000000-0000-4000-8000-000000000000' for n in range(1, 6))
ROOT_START, ROOT_SIZE, ESP_SIZE = 1 * MIB, 8 * MIB, 36 * MIB
ESP_START = ROOT_START + ROOT_SIZE

FILES: Dict[str, bytes] = {
    'etc/passwd': b'root:x:0:0::/root:/bin/sh\nbin:x:2:2::/:/bin/false\n'
                  b'sys:x:3:3::/:/bin/false\n',
    'etc/shadow': b'root:$6$aaaa$bbbb:20000:0:99999:7:::\n'
                  b'bin:*:20000:0:99999:7:::\n',
    'etc/machine-id': b'',
    'etc/issue': b'Made-up 1\nbuilt on 2026-09-12 07:55:41 UTC\n',
    'etc/modules.list': b'virtio_blk\next4\nvirtio_net\n',
    'etc/build.conf': b'[build]\npath=/home/one/work/tree\n',
    'usr/bin/tool': bytes(range(256)) * 40,
    'usr/share/doc/changelog.gz': gzip.compress(b'made up\n' * 9, mtime=0),
    'var/cache/ldconfig/aux-cache': b'glibc-ld.so.cache1.1\0\0\1\2\3',
    'var/log/.keep': b'',
    'var/lib/thing/state': b'all is well\n',
    'var/lib/thing/tmp.k02PmR': b'x',
}


def pe(sections: Dict[str, bytes], machine: int = 0x8664,
       time: int = 0, subsystem: int = 10) -> bytes:
    '''An EFI program of @sections, whose code does nothing.'''
    head = 1024
    table, data = b'', b''
    for index, (name, content) in enumerate(sections.items()):
        padded = content.ljust(-(-len(content) // 512) * 512, b'\0')
        table += struct.pack('<8sIIIIIIHHI', name.encode(), len(content),
                             0x1000 * (index + 1), len(padded),
                             head + len(data), 0, 0, 0, 0, 0x40000040)
        data += padded
    optional = bytearray(112)
    struct.pack_into('<H', optional, 0, 0x20b)
    struct.pack_into('<H', optional, 68, subsystem)
    coff = struct.pack('<HHIIIHH', machine, len(sections), time, 0, 0,
                       len(optional), 0x22e)
    dos = b'MZ' + bytes(58) + struct.pack('<I', 64)
    return (dos + b'PE\0\0' + coff + bytes(optional) + table).ljust(
        head, b'\0') + data


@dataclass(frozen=True)
class Recipe:  # pylint: disable=too-many-instance-attributes
    '''
    What a disk is made of; a test replaces what is to differ.

    @params files: of the root, by path; @initrd: of the initrd
    @params times: of files that have another than EPOCH
    @params debugfs: commands that change the root afterwards
    '''
    files: Dict[str, bytes] = field(default_factory=lambda: dict(FILES))
    modes: Dict[str, int] = field(default_factory=dict)
    times: Dict[str, int] = field(default_factory=dict)
    initrd: Tuple[str, ...] = ('init', 'bin', 'bin/sh', 'etc', 'etc/fstab')
    initrd_times: Dict[str, int] = field(default_factory=dict)
    cpio: str = 'cpio --reproducible'
    zstd: str = 'zstd -q -T0 -19'
    debugfs: Tuple[str, ...] = ()
    hash_seed: str = SEED
    uuid: str = UUIDS[0]
    mkfs_epoch: int = EPOCH
    esp_epoch: int = EPOCH
    volume_id: str = '12345678'
    esp_files: Tuple[str, ...] = ('EFI', 'loader.conf')
    pe_time: int = 0
    disk_guid: str = UUIDS[1]
    root_guid: str = UUIDS[2]
    root_type: str = gpt.ROOTS['x86_64']
    esp_type: str = gpt.ESP
    qemu_img: str = '-c -o compression_type=zlib'
    uki: Optional[bytes] = None
    uki_name: str = 'BOOTX64.EFI'

    def but(self, **changes: Any) -> 'Recipe':
        '''This recipe with @changes; a file that is None is left out.'''
        if 'files' in changes:
            files = {**self.files, **changes['files']}
            changes['files'] = {name: data for name, data in files.items()
                                if data is not None}
        return replace(self, **changes)


INITRD = {'init': b'#!/bin/sh\n', 'bin/sh': b'\x7fELF' + bytes(900),
          'etc/fstab': b'# nothing\n'}

SCRIPT = '''
set -eu
export SOURCE_DATE_EPOCH={mkfs_epoch} TZ=UTC MTOOLS_SKIP_CHECK=1
(cd initrd; printf '%s\\n' {initrd} |
    {cpio} --create --owner=+0:+0 --format=newc --quiet) > initrd.cpio
{zstd} -f initrd.cpio -o initrd.cpio.zst
rm -f root.img esp.img disk.raw disk.qcow2
mke2fs -q -t ext4 -d root -L guest-root -U {uuid} -J size=1 \\
    -E root_owner=0:0,hash_seed={hash_seed} -O metadata_csum,64bit \\
    root.img 8M
{debugfs}
./uki.py
export SOURCE_DATE_EPOCH={esp_epoch}
mkfs.vfat -F 32 -s 1 --invariant -i {volume_id} -n ESP -C esp.img \\
    {esp_kib} > log
mcopy -i esp.img -s {esp_files} ::/
truncate -s {disk_size} disk.raw
sfdisk -q disk.raw <<END
label: gpt
label-id: {disk_guid}
start=2048, size={root_sectors}, type={root_type}, uuid={root_guid}, \\
name=guest-root
size={esp_sectors}, type={esp_type}, uuid={esp_guid}, name=esp
END
dd if=root.img of=disk.raw bs=1M seek=1 conv=notrunc status=none
dd if=esp.img of=disk.raw bs=1M seek=9 conv=notrunc,sparse status=none
qemu-img convert {qemu_img} -O qcow2 disk.raw disk.qcow2
'''


def _write(folder: Path, files: Dict[str, bytes], modes: Dict[str, int],
           times: Dict[str, int]) -> None:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        path.chmod(modes.get(name, 0o644))
    for path in [folder, *sorted(folder.rglob('*'))]:
        if path.is_dir():
            path.chmod(0o755)
        time = times.get(str(path.relative_to(folder)), EPOCH)
        os.utime(path, (time, time))


class Disks:
    '''Makes disks below @root with the programs of the tools @tree.'''

    def __init__(self, root: Path, tree: Path) -> None:
        self.root = root
        self.tree = tree

    def shell(self, folder: Path, script: str) -> None:
        '''Run @script in @folder, which is where it may write.'''
        log = self.root / 'log'
        status = sandbox.run(self.tree, ['sh', '-c', script], folder, log)
        assert status == 0, log.read_text()

    def make(self, name: str, recipe: Recipe) -> Path:
        '''The folder with disk.qcow2, disk.raw, initrd.cpio.zst, parts.'''
        folder = self.root / name
        _write(folder / 'root', recipe.files, recipe.modes, recipe.times)
        _write(folder / 'initrd', INITRD, {}, recipe.initrd_times)
        (folder / 'EFI/BOOT').mkdir(parents=True)
        (folder / 'loader.conf').write_text('timeout 0\n')
        commands = ''.join(f'debugfs -w -R {shlex.quote(command)} root.img '
                           '2> log\n' for command in recipe.debugfs)
        values = {**vars(recipe), 'initrd': ' '.join(recipe.initrd),
                  'esp_files': ' '.join(recipe.esp_files),
                  'debugfs': commands, 'esp_guid': UUIDS[3],
                  'esp_kib': ESP_SIZE >> 10,
                  'disk_size': ESP_START + ESP_SIZE + MIB,
                  'root_sectors': ROOT_SIZE >> 9,
                  'esp_sectors': ESP_SIZE >> 9}
        first, last = SCRIPT.format(**values).split('./uki.py\n')
        self.shell(folder, first)
        initrd = (folder / 'initrd.cpio.zst').read_bytes()
        (folder / 'EFI/BOOT' / recipe.uki_name).write_bytes(
            recipe.uki if recipe.uki is not None
            else uki(initrd, recipe.pe_time))
        self.shell(folder, 'export SOURCE_DATE_EPOCH='
                   f'{recipe.mkfs_epoch} TZ=UTC MTOOLS_SKIP_CHECK=1\n' + last)
        return folder

    def remove(self, name: str) -> None:
        '''Make room again.'''
        shutil.rmtree(self.root / name)


def kernel() -> bytes:
    '''The least that is an EFI program for x86_64.'''
    return pe({'.text': b'\xf4' * 600})


def uki(initrd: bytes, time: int = 0, **other: bytes) -> bytes:
    '''A unified kernel image; sections in @other are named without a dot.'''
    sections = {'.osrel': b'ID=made-up\n', '.cmdline': b'quiet\0',
                '.linux': kernel(), '.initrd': initrd,
                **{f'.{name}': data for name, data in other.items()}}
    return pe({name: data for name, data in sections.items() if data},
              time=time)


def flipped(data: bytes, *offsets: int) -> bytes:
    '''@data with all bits of the bytes at @offsets turned over.'''
    changed = bytearray(data)
    for offset in offsets:
        changed[offset] ^= 0xff
    return bytes(changed)


@pytest.fixture(name='disks', scope='session')
def fixture_disks(tmp_path_factory: pytest.TempPathFactory,
                  tools_tree: Path) -> Disks:
    '''What makes disks.'''
    return Disks(tmp_path_factory.mktemp('disks'), tools_tree)


@pytest.fixture(name='good', scope='session')
def fixture_good(disks: Disks) -> Path:
    '''The folder of a disk with nothing wrong; only to be read.'''
    return disks.make('good', Recipe())
