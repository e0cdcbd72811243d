# SPDX-License-Identifier: GPL-2.0-or-later
'''
The readers against what the real programs made: the same files, times,
attributes and bytes come out as went in.
'''

import bz2
import gzip
import lzma
import os
from pathlib import Path
import random
import shutil
import struct
from typing import Any, Dict, Iterator, List

import pytest

from mkosi_build import archives, gpt
from mkosi_build.error import HostError
from mkosi_build.ext4 import Ext4
from mkosi_build.fat import Fat
from mkosi_build.layers import form_of
from mkosi_build.qcow2 import Qcow2
from mkosi_build.reading import (Bytes, File, Malformed, Member, Window,
                                 crc32c)
from fixtures_disk import (EPOCH, ESP_SIZE, FILES, INITRD, ROOT_SIZE, SEED,
                           UUIDS, Disks, flipped, pe)

pytest_plugins = ['fixtures_builder', 'fixtures_disk']

SLOW = pytest.mark.slow


def contents(members: Iterator[Member]) -> Dict[str, bytes]:
    '''What is in each file.'''
    return {member.path: member.load() for member in members if member.load}


def test_crc32c() -> None:
    '''The check value of CRC-32C, which the final inversion is part of.'''
    assert crc32c(0xffffffff, b'123456789') ^ 0xffffffff == 0xe3069283


def test_sources(tmp_path: Path) -> None:
    '''Bytes, files and windows agree; nobody reads past an end.'''
    path = tmp_path / 'a'
    path.write_bytes(bytes(range(100)))
    for source in (Bytes(bytes(range(100))), File(path)):
        assert source.size == 100
        assert source.read(90, 50) == bytes(range(90, 100))
        window = Window(source, 10, 20)
        assert window.read(15, 50) == bytes(range(25, 30))
        assert window.read(30, 5) == b''
        assert b''.join(window.chunks()) == bytes(range(10, 30))
        assert Window(source, 95, 20).size == 5
        assert Window(source, 200, 20).size == 0
        with pytest.raises(Malformed) as error:
            window.take(15, 6, 'thing')
        assert str(error.value.problem) == (
            'thing, offset 25: expected 6 bytes, found the end of the data')
        assert error.value.next_step


@SLOW
def test_disk(good: Path) -> None:
    '''The whole of a disk, from qcow2 down to the files.'''
    disk = Qcow2(File(good / 'disk.qcow2'))
    assert b''.join(disk.chunks()) == (good / 'disk.raw').read_bytes()
    table, problems = gpt.check(disk)
    assert table and not problems
    assert table.disk == UUIDS[1]
    root, esp = table.partitions
    assert (root.type, root.guid, root.label) == (
        gpt.ROOTS['x86_64'], UUIDS[2], 'guest-root')
    assert (esp.type, esp.label) == (gpt.ESP, 'esp')
    source = table.window(disk, root)
    assert (source.origin, source.size) == (1 << 20, ROOT_SIZE)
    system = Ext4(source)
    assert system.superblock['label'] == b'guest-root'.ljust(16, b'\0')
    assert system.superblock['directory hash seed'] == bytes.fromhex(
        SEED.replace('-', ''))
    assert system.get('creation time') == EPOCH
    assert contents(system.members()) == {
        f'/{name}': data for name, data in FILES.items()}
    fat = Fat(table.window(disk, esp))
    assert fat.wide and table.window(disk, esp).size == ESP_SIZE
    files = contents(fat.members())
    assert set(files) == {'/EFI/BOOT/BOOTX64.EFI', '/loader.conf'}
    program = archives.program(files['/EFI/BOOT/BOOTX64.EFI'])
    initrd = program.section('.initrd')
    assert initrd and initrd.data == (good / 'initrd.cpio.zst').read_bytes()
    segment = archives.segments(initrd.data)[0]
    assert contents(iter(segment.order)) == {
        f'/{name}': data for name, data in INITRD.items()}
    assert {m.fields['mtime'] for m in segment.order} == {EPOCH}


@SLOW
@pytest.mark.parametrize('options', [
    '', '-o cluster_size=4k', '-c -o cluster_size=2M', '-o compat=0.10',
    '-c -o refcount_bits=1', '-S 0'])
def test_qcow2(options: str, disks: Disks) -> None:
    '''Clusters of every kind and size give what qemu-img was given.'''
    folder = disks.root / 'qcow2'
    folder.mkdir()
    numbers = random.Random(1)
    data = bytearray(5 << 20)
    for _ in range(30):
        start = numbers.randrange(len(data) - 70000)
        data[start:start + 70000] = numbers.randbytes(35000) + bytes(35000)
    (folder / 'raw').write_bytes(data[:-512])
    disks.shell(folder, f'qemu-img convert -f raw -O qcow2 {options} raw q')
    try:
        disk = Qcow2(File(folder / 'q'))
        assert b''.join(disk.chunks()) == bytes(data[:-512])
        assert disk.read(12345, 99999) == bytes(data[12345:112344])
        assert not disk.check()
    finally:
        shutil.rmtree(folder)


@SLOW
@pytest.mark.parametrize('options', [
    '-b 1024', '-b 4096', '-O ^64bit', '-O ^metadata_csum',
    '-O metadata_csum_seed', '-I 128', '-O ^dir_index -g 1024'])
def test_ext4(options: str, disks: Disks) -> None:
    '''Trees in the forms that mke2fs can make.'''
    folder = disks.root / 'ext4'
    tree = folder / 'tree'
    (tree / 'many').mkdir(parents=True)
    for number in range(400):
        (tree / f'many/a file with a long name, {number}').write_bytes(
            b'%d' % number)
    large = random.Random(2).randbytes(3 << 20)
    (tree / 'large').write_bytes(large)
    with open(tree / 'sparse', 'wb') as file:
        file.seek(1 << 20)
        file.write(b'end')
    (tree / 'empty').touch()
    (tree / 'short').symlink_to('large')
    (tree / 'long').symlink_to('x' * 200)
    os.mkfifo(tree / 'fifo')
    os.link(tree / 'large', tree / 'twin')
    (tree / 'large').chmod(0o640)
    os.utime(tree / 'large', ns=(5, 1234567890123456789))
    disks.shell(folder, f'mke2fs -q -t ext4 -d tree {options} img 16M\n'
                'for n in 1 2 3; do debugfs -w -R "ea_set /large user.n$n '
                '$(printf %060d $n)" img 2>log; done')
    try:
        system = Ext4(File(folder / 'img'))
        assert not system.check()
        members = {member.path: member for member in system.members()}
        assert set(members) == {'/', '/lost+found', *(
            f'/{path.relative_to(tree)}' for path in tree.rglob('*'))}
        for path, member in members.items():
            if member.load:
                assert member.load() == (tree / path[1:]).read_bytes(), path
        assert members['/short'].fields['target'] == 'large'
        assert members['/long'].fields['target'] == 'x' * 200
        assert members['/fifo'].kind == 'fifo'
        found = members['/large'].fields
        assert found['mode'] == '0640'
        assert str(found['mtime']).startswith('1234567890.')
        assert found['attributes'] == tuple(
            (f'user.n{n}', b'%060d' % n) for n in (1, 2, 3))
        assert system.what_is_at(1024) == 'the superblock'
        place = system.extents(dict(system.walk())['/large'])[0][2]
        assert system.what_is_at(place * system.block) in (
            'file /large', 'file /twin')
        assert 'inode table' in system.what_is_at(
            dict(system.walk())['/'].offset)
    finally:
        shutil.rmtree(folder)


@SLOW
@pytest.mark.parametrize('options', ['-F 16 -C img 9000',
                                     '-F 32 -s 1 -C img 36000'])
def test_fat(options: str, disks: Disks) -> None:
    '''Long names, folders in folders and times, in both widths.'''
    folder = disks.root / 'fat'
    (folder / 'deep/er/est').mkdir(parents=True)
    names = ['a', 'A Long Name of a File.text', 'deep/\xe4\xf6\xfc',
             'deep/er/est/x' * 1, *(f'deep/number {n}' for n in range(60))]
    numbers = random.Random(3)
    for name in names:
        (folder / name).write_bytes(numbers.randbytes(
            numbers.randrange(40000)))
    disks.shell(folder, 'export SOURCE_DATE_EPOCH=1700000000 TZ=UTC\n'
                f'mkfs.vfat --invariant {options} > log\n'
                'LC_ALL=C.UTF-8 mcopy -i img -s a A* deep ::/')
    try:
        fat = Fat(File(folder / 'img'))
        assert not fat.check()
        assert contents(fat.members()) == {
            f'/{name}': (folder / name).read_bytes() for name in names}
        times = {m.fields['mtime'] for m in fat.members()
                 if m.kind == 'folder'}
        assert times == {'2023-11-14 22:13:20.00'}
    finally:
        shutil.rmtree(folder)


@SLOW
def test_zstd_of_tree(good: Path, disks: Disks,
                      monkeypatch: pytest.MonkeyPatch) -> None:
    '''Without a zstd on the host that of the tools tree is used.'''
    data = (good / 'initrd.cpio.zst').read_bytes()
    plain = (good / 'initrd.cpio').read_bytes()
    monkeypatch.setattr(shutil, 'which', lambda _: None)
    assert archives.decompress(data, disks.tree) == plain
    with pytest.raises(Malformed, match='zstd data'):
        archives.decompress(data[:-9], disks.tree)
    with pytest.raises(HostError, match='zstd') as error:
        archives.decompress(data)
    assert error.value.next_step == 'apt-get install zstd'


@pytest.mark.parametrize('pack', [gzip.compress, lzma.compress,
                                  bz2.compress])
def test_compressions(pack: Any) -> None:
    '''Whole streams come out, cut ones are told.'''
    data = os.urandom(1000)
    assert archives.decompress(pack(data)) == data
    for size in (12, len(pack(data)) - 1):
        with pytest.raises(Malformed):
            archives.decompress(pack(data)[:size])
    with pytest.raises(Malformed, match='compressed data'):
        archives.decompress(b'plain')


def test_gzip_fields() -> None:
    '''The header of gzip, and several streams in a row.'''
    data = (b'\x1f\x8b\x08\x0c' + struct.pack('<I', EPOCH) + b'\x02\x03'
            + b'\2\0xy' + b'name\0' + gzip.compress(b'x', mtime=0)[10:])
    assert archives.stream_fields(data) == {
        'compression': 'gzip', 'time': EPOCH, 'name': 'name', 'level': 2,
        'system': 3}
    assert archives.decompress(data) == b'x'
    assert archives.decompress(data + data + bytes(9)) == b'xx'


def test_ar() -> None:
    '''A package of Debian is one.'''
    def entry(name: str, data: bytes) -> bytes:
        head = f'{name:16}{EPOCH:<12}{0:<6}{0:<6}{"100644":8}{len(data):<10}'
        return head.encode() + b'`\n' + data + b'\n' * (len(data) % 2)

    data = archives.AR + entry('debian-binary/', b'2.0\n') + entry('c', b'x')
    members = archives.ar(data)
    assert contents(iter(members)) == {'/debian-binary': b'2.0\n', '/c': b'x'}
    assert members[0].fields['mtime'] == f'{EPOCH}'
    for broken in (data[:40], flipped(data, 8 + 58), data[1:]):
        with pytest.raises(Malformed):
            archives.ar(broken)


def test_forms(tmp_path: Path) -> None:
    '''What a content is, by what it begins with.'''
    found: List[str] = []
    for data in (b'', b'text', b'MZ', pe({'.text': b'x'}), b'070701',
                 gzip.compress(b''), b'!<arch>\n', bytes(5000), b'hsqs',
                 bytes(512) + b'EFI PART'):
        path = tmp_path / 'a'
        path.write_bytes(data)
        found.append(form_of(File(path)))
    assert found == ['data', 'data', 'data', 'PE', 'cpio', 'gzip', 'ar',
                     'data', 'squashfs', 'GPT']


def test_cpio_that_goes_back() -> None:
    '''A number has no sign: this file's size led to its own header.'''
    name = b'a\0'
    head = (b'070701' + b'00000000' * 6 + b'-0000070' + b'00000000' * 4
            + f'{len(name):08x}'.encode() + b'00000000' + name)
    with pytest.raises(Malformed, match='cpio header 0'):
        archives.segments(head + bytes(200))


@pytest.mark.parametrize('pack', [gzip.compress, lzma.compress, bz2.compress])
def test_unpacks_no_more_than_it_may(
        pack: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    '''Of all streams together.'''
    monkeypatch.setattr(archives, 'MAX_FILE', 1000)
    assert archives.decompress(pack(bytes(500)) * 2) == bytes(1000)
    for data in (pack(bytes(1001)), pack(bytes(5_000_000)),
                 pack(bytes(600)) * 2):
        with pytest.raises(Malformed, match='more than 1000 bytes'):
            archives.decompress(data)


@SLOW
def test_extents_of_themselves(good: Path,
                               monkeypatch: pytest.MonkeyPatch) -> None:
    '''A node that is its own child is refused at its second look.'''
    file_system = Ext4(Window(File(good / 'disk.raw'), 1 << 20, ROOT_SIZE))
    inode = file_system.inode(2)
    block = struct.pack('<HHHHI', 0xf30a, 1, 84, 1, 0) + struct.pack(
        '<IIHH', 0, 3, 0, 0)
    raw = bytearray(inode.raw)
    raw[0x28:0x28 + len(block)] = block
    asked: List[int] = []

    def take(offset: int, size: int, _what: str) -> bytes:
        asked.append(offset)
        return block.ljust(size, b'\0')

    monkeypatch.setattr(file_system.source, 'take', take)
    with pytest.raises(Malformed, match='extents'):
        file_system.extents(type(inode)(inode.number, bytes(raw),
                                        inode.offset))
    assert len(asked) == 1
