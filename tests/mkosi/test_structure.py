# SPDX-License-Identifier: GPL-2.0-or-later
'''
The structure of finished disks, kernels and initrds: nothing is said of
good ones, and of a broken one what is broken, and where.
'''

import gzip
import json
import os
from pathlib import Path
import random
import struct
import subprocess
import sys
from types import SimpleNamespace
from typing import Any, Callable, Dict, List, Optional, Union

import pytest

from mkosi_build import build, gpt, structure
from mkosi_build.error import FetchError
from mkosi_build.ext4 import Ext4
from mkosi_build.fat import Fat
from mkosi_build.qcow2 import Qcow2
from mkosi_build.reading import (Bytes, File, Problem, Source, Window,
                                 crc32c)
from fixtures_builder import AMBIENT, ROOT
from fixtures_disk import (ESP_SIZE, ESP_START, MIB, ROOT_SIZE, ROOT_START,
                           Disks, Recipe, flipped, kernel, pe, uki)

pytest_plugins = ['fixtures_builder', 'fixtures_disk']

SLOW = pytest.mark.slow
LAST = ESP_START + ESP_SIZE + MIB - 512
SUPER = ROOT_START + 1024
Edit = Callable[[bytearray], None]


class Patched(Source):
    '''@data with other bytes at some offsets, and no copy of the rest.'''

    def __init__(self, data: bytes, others: Dict[int, int]) -> None:
        super().__init__(len(data))
        self.data = data
        self.others = others

    def read(self, offset: int, size: int) -> bytes:
        part = bytearray(self.data[offset:offset + size])
        for at, value in self.others.items():
            if offset <= at < offset + len(part):
                part[at - offset] = value
        return bytes(part)


def flip(*offsets: int) -> Edit:
    '''Turns bytes over.'''
    def edit(data: bytearray) -> None:
        for offset in offsets:
            data[offset] ^= 0xff
    return edit


def put(offset: int, value: bytes) -> Edit:
    '''Writes @value.'''
    def edit(data: bytearray) -> None:
        data[offset:offset + len(value)] = value
    return edit


def super_put(offset: int, value: bytes) -> Edit:
    '''Writes @value into the superblock, with the checksum that it takes.'''
    def edit(data: bytearray) -> None:
        put(SUPER + offset, value)(data)
        put(SUPER + 0x3fc, struct.pack('<I', crc32c(
            0xffffffff, bytes(data[SUPER:SUPER + 0x3fc]))))(data)
    return edit


@pytest.fixture(name='raw', scope='module')
def fixture_raw(good: Path) -> bytes:
    '''The bytes of a good disk as a guest sees them.'''
    return (good / 'disk.raw').read_bytes()


def problems(data: Union[bytes, Source]) -> List[Problem]:
    '''What is wrong with the raw disk @data.'''
    source = data if isinstance(data, Source) else Bytes(data)
    table, found = gpt.check(source)
    if table:
        # pylint: disable-next=protected-access
        found += structure._check_partitions(source, table, 'x86_64', None)
    return found


# -- Real ones --------------------------------------------------------------

@SLOW
def test_good(good: Path, raw: bytes) -> None:
    '''Nothing is said of what is well.'''
    source = File(good / 'disk.qcow2')
    assert not structure.check_disk(source, 'x86_64')
    assert not problems(raw)
    assert Qcow2(source).read(0, len(raw)) == raw
    initrd = (good / 'initrd.cpio.zst').read_bytes()
    assert not structure.check_initrd(initrd)


@SLOW
def test_built() -> None:
    '''
    The images in this machine's cache are well, and the command says so;
    and of a disk with one byte changed what is wrong.
    '''
    home = Path(AMBIENT.get('QEMU_MKOSI_DIR')
                or '~/.cache/qemu/mkosi').expanduser()
    disks = sorted(home.glob('images/debian-min/*/*/disk.qcow2'))
    disks = [path for path in disks if len(path.parent.name) == 64]
    if not disks:
        pytest.skip(f'no image below {home}: scripts/mkosi-build.py x86_64 '
                    'debian-min builds one')
    folder = disks[0].parent
    arch = folder.parent.name
    said = subprocess.run(
        [sys.executable, str(ROOT / 'scripts/mkosi-build.py'), arch,
         'debian-min', '--inspect', '--json'],
        env={**os.environ, **AMBIENT}, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, encoding='utf-8', check=False)
    last = json.loads(said.stdout.splitlines()[-1])
    if last['event'] == 'error' and last['code'] == 5:
        # An older identity than the tree's
        pytest.skip(last['message'])
    assert said.returncode == 0, said.stdout
    assert last['event'] == 'inspected' and last['problems'] == 0
    data = disks[0].read_bytes()
    middle = len(data) // 2
    broken = Bytes(flipped(data, *range(middle, middle + 4096)))
    found = structure.check_disk(broken, arch)
    assert 'qcow2 cluster of guest offset' in str(found[0])


# -- Corruption of the disk -------------------------------------------------

@SLOW
@pytest.mark.parametrize('edit, expected', [
    (flip(510), 'protective MBR, signature, offset 510: expected 55aa, '
     'found aaaa'),
    (put(450, b'\x83'), 'protective MBR, partition type, offset 450'),
    (flip(512), "GPT header, first copy, offset 512: expected 'EFI PART'"),
    (flip(LAST), f'GPT header, second copy, offset {LAST}: expected '
     "'EFI PART'"),
    (flip(512 + 16), 'GPT header, first copy, header CRC, offset 528'),
    (flip(512 + 56), 'GPT header, first copy, header CRC, offset 528'),
    (flip(512 + 24), 'GPT header, first copy, own LBA, offset 536: expected '
     '1, found 254'),
    (flip(512 + 81), 'GPT header, first copy, entries, offset 592'),
    (flip(1024 + 16), 'GPT header, first copy, entries CRC, offset 600'),
    (flip(LAST - 128 * 128), 'GPT header, second copy, entries CRC, '
     f'offset {LAST + 88}'),
    (flip(LAST + 16), 'GPT header, second copy, header CRC'),
    (flip(1024 + 40 + 6), 'GPT entries, first copy, partition 1 '
     '(root-x86-64), offset 1056: expected sectors 2048 to'),
    (flip(SUPER + 0x38), f'root file system, magic, offset {SUPER + 0x38}: '
     'expected 0xef53'),
    (flip(SUPER + 0x68), 'partition 1 (root-x86-64): ext4 superblock, '
     f'checksum, offset {SUPER + 0x3fc}'),
    (flip(SUPER + 0x3fc), 'ext4 superblock, checksum'),
    (super_put(0x4, struct.pack('<I', ROOT_SIZE // 1024 + 1)),
     f'ext4 superblock, blocks, offset {SUPER + 4}: expected at most 8192, '
     'as fit into the partition, found 0x2001'),
    (super_put(0x3a, b'\0\0'), 'ext4 superblock, state, offset '
     f'{SUPER + 0x3a}: expected 1 (clean), found 0'),
    (super_put(0x18, b'\xff'), 'ext4 superblock, block size'),
    (super_put(0x60, b'\xff' * 4), 'ext4 superblock, incompatible features'),
    (super_put(0x58, b'\1\0'), 'ext4 superblock, inode size'),
    (super_put(0x28, bytes(4)), 'ext4 superblock, inodes per group'),
    # Blocks of 1 KiB: the descriptors follow the superblock's
    (flip(SUPER + 1024 + 0x0c), 'ext4 group descriptor 0, checksum, offset '
     f'{SUPER + 1024 + 0x1e}'),
    (flip(ESP_START + 510), f'FAT boot sector, signature, offset '
     f'{ESP_START + 510}'),
    (put(ESP_START + 11, b'\1'), 'FAT boot sector, bytes per sector'),
    (put(ESP_START + 13, b'\3'), 'FAT boot sector, sectors per cluster'),
    (put(ESP_START + 32, b'\xff' * 4), 'FAT boot sector, sectors, wide, '
     f'offset {ESP_START + 32}'),
    (flip(ESP_START + 71), 'FAT backup boot sector, offset '
     f'{ESP_START + 6 * 512 + 71}'),
    (flip(ESP_START + 512), 'FAT information sector, signature, offset '
     f'{ESP_START + 512}'),
])
def test_corrupt(edit: Edit, expected: str, raw: bytes) -> None:
    '''Each structure of a disk, with one place of it changed.'''
    data = bytearray(raw)
    edit(data)
    found = [str(problem) for problem in problems(bytes(data))]
    assert any(expected in line for line in found), found


@SLOW
def test_corrupt_inside(raw: bytes) -> None:
    '''Places that only a walk finds: inodes, folders, clusters, the UKI.'''
    root = Window(Bytes(raw), ROOT_START, ROOT_SIZE)
    system = Ext4(root)
    inodes = dict(system.walk())
    esp = Fat(Window(Bytes(raw), ESP_START, ESP_SIZE))
    (_, _, folder, _), = system.extents(inodes['/etc'])
    at = ROOT_START + folder * system.block
    entry = raw.index(b'BOOTX64 EFI')
    cluster = struct.unpack_from('<H', raw, entry + 26)[0]
    start = ESP_START + esp.place(cluster)
    number = inodes['/etc/passwd'].number
    for edit, expected in (
            (flip(inodes['/etc/passwd'].offset + 0x10),
             f'ext4 inode {number}, checksum, offset '
             f'{inodes["/etc/passwd"].offset + 0x7c}'),
            (flip(inodes['/'].offset), 'ext4 inode 2'),
            (flip(inodes['/etc'].offset + 0x28),
             f'ext4 extents of inode {inodes["/etc"].number}, offset '
             f'{inodes["/etc"].offset + 0x28}: expected magic 0xf30a'),
            (flip(at + 12 + 9), 'ext4 folder of inode '
             f'{inodes["/etc"].number}, checksum of block 0, offset {at}'),
            (put(at + 4, b'\1\0'), 'ext4 folder of inode '
             f'{inodes["/etc"].number}, offset {at}: expected an entry'),
            (flip(ESP_START + esp.table + 12), 'FAT, second table, offset '
             f'{ESP_START + esp.table + esp.table_size + 12}'),
            (put(entry + 26, b'\xff\xff'), 'FAT clusters of '
             '/EFI/BOOT/BOOTX64.EFI'),
            (put(entry + 28, b'\xff\xff\xff\x7f'), 'FAT, size of '
             '/EFI/BOOT/BOOTX64.EFI: expected at most'),
            (put(entry, b'BOOTY64 EFI'), 'ESP: expected /EFI/BOOT/'
             'BOOTX64.EFI, found'),
            (flip(start), "/EFI/BOOT/BOOTX64.EFI: PE file, DOS header, "
             "offset 0: expected 'MZ'"),
            (flip(start + 64), '/EFI/BOOT/BOOTX64.EFI: PE file, signature, '
             'offset 64'),
            (flip(start + 68), 'PE file, machine, offset 68: expected '
             '0x8664, found 0x869b'),
            (flip(start + 64 + 24), 'PE file, optional header, offset 88')):
        data = bytearray(raw)
        edit(data)
        found = [str(problem) for problem in problems(bytes(data))]
        assert any(expected in line for line in found), (expected, found)


@SLOW
@pytest.mark.parametrize('changes, expected', [
    ({'root_type': gpt.ROOTS['aarch64']}, 'expected one of type '
     'root-x86-64, found partition 1 (root-arm64), partition 2 (esp)'),
    ({'esp_type': gpt.ROOTS['x86_64']}, 'expected one of type esp'),
    ({'uki_name': 'OTHER.EFI'}, 'ESP: expected /EFI/BOOT/BOOTX64.EFI, found '
     '/LOADER.CONF, /EFI/BOOT/OTHER.EFI'),
    ({'uki': b'MZ'}, 'PE file, DOS header'),
    ({'qemu_img': '-c -o compression_type=zstd'},
     'qcow2 header, incompatible features, offset 72: expected none, found '
     'compression type'),
    ({'qemu_img': '-o extended_l2=on'}, 'extended L2 entries'),
    ({'qemu_img': '-o compat=0.10'}, 'qcow2 header, version, offset 4: '
     'expected 3, found 2'),
    ({'qemu_img': '-o encrypt.format=aes,encrypt.key-secret=s '
      '--object secret,id=s,data=x'}, 'qcow2 header, encryption'),
])
def test_wrong_making(changes: Any, expected: str, disks: Disks) -> None:
    '''Disks that real programs have made, and not as they should.'''
    folder = disks.make('wrong', Recipe().but(**changes))
    try:
        found = structure.check_disk(File(folder / 'disk.qcow2'),
                                     'x86_64')
    finally:
        disks.remove('wrong')
    assert expected in '\n'.join(map(str, found))


@SLOW
def test_backing_file(good: Path, disks: Disks) -> None:
    '''A disk that needs another file, or an external one for its data.'''
    folder = disks.root / 'backing'
    folder.mkdir()
    (folder / 'base').write_bytes((good / 'disk.qcow2').read_bytes())
    disks.shell(folder, 'qemu-img create -q -f qcow2 -F qcow2 -b base '
                'overlay; qemu-img create -q -f qcow2 -o data_file=d outer '
                '1M')
    for name, expected in (
            ('overlay', 'qcow2 header, backing file, offset 8: expected '
             'none'),
            ('outer', 'external data file')):
        found = structure.check_disk(File(folder / name), 'x86_64')
        assert expected in str(found[0])


@SLOW
def test_qcow2(good: Path) -> None:
    '''Each field of the header, the tables, and data that are cut off.'''
    data = (good / 'disk.qcow2').read_bytes()

    def said(changed: bytes) -> str:
        return '\n'.join(str(p) for p in structure.check_disk(
            Bytes(changed), 'x86_64'))

    assert said(data) == ''
    for offset, value, expected in (
            (0, b'X', 'qcow2 header, magic, offset 0: expected 514649fb, '
             'found 584649fb'),
            (7, b'\4', 'qcow2 header, version, offset 4: expected 3, found '
             '4'),
            (23, b'\5', 'qcow2 header, cluster bits, offset 20'),
            (24, b'\x7f', 'qcow2 header, L1 size, offset 36'),
            (31, b'\1', 'qcow2 header, size, offset 24: expected a multiple '
             'of 512'),
            (35, b'\1', 'qcow2 header, encryption, offset 32'),
            (39, b'\0', 'qcow2 header, L1 size, offset 36'),
            (46, b'\1', 'qcow2 header, L1 table, offset 40'),
            (63, b'\1', 'qcow2 header, snapshots, offset 60'),
            (79, b'\1', 'qcow2 header, incompatible features, offset 72: '
             'expected none, found dirty'),
            (79, b'\2', 'found corrupt'), (79, b'\x80', 'unknown bits'),
            (99, b'\x7f', 'qcow2 header, refcount order, offset 96'),
            (103, b'\1', 'qcow2 header, header length, offset 100'),
            (104, b'\1', 'qcow2 header, compression type, offset 104: '
             'expected zlib, found zstd')):
        changed = data[:offset] + value + data[offset + len(value):]
        assert expected in said(changed), (offset, said(changed))
    l1_table = struct.unpack_from('>Q', data, 40)[0]
    assert 'qcow2 L1 entry 0' in said(flipped(data, l1_table + 6))
    l2_table = struct.unpack_from('>Q', data, l1_table)[0] & (1 << 56) - 1
    entry = struct.unpack_from('>Q', data, l2_table)[0]
    assert entry >> 62 & 1, 'the first cluster is compressed'
    packed = entry & (1 << 54) - 1
    assert 'qcow2 cluster of guest offset 0' in said(flipped(data, packed))
    for size in (0, 3, 71, 103, 200, 1 << 16, len(data) // 2):
        assert said(data[:size]), size


@SLOW
def test_any_byte(raw: bytes, good: Path) -> None:
    '''
    Whatever is in a file: problems are told, nothing else happens. Seeded,
    so that a failure can be had again.
    '''
    numbers = random.Random(6)
    qcow2 = (good / 'disk.qcow2').read_bytes()
    places = [*range(0, 2048), *range(SUPER, SUPER + 4096),
              *range(ESP_START, ESP_START + 1024)]
    for _ in range(150):
        problems(Patched(raw, {offset: numbers.randrange(256)
                               for offset in numbers.sample(places, 3)}))
    for _ in range(60):
        changed = bytearray(qcow2)
        for _ in range(4):
            changed[numbers.randrange(len(changed))] = numbers.randrange(256)
            changed[numbers.randrange(112)] ^= 1 << numbers.randrange(8)
        structure.check_disk(Bytes(bytes(changed)), 'x86_64')


@SLOW
def test_erofs(disks: Disks) -> None:
    '''An erofs that mkfs.erofs made, and its superblock changed.'''
    folder = disks.root / 'erofs'
    (folder / 'tree').mkdir(parents=True)
    (folder / 'tree/a').write_bytes(b'a' * 9000)
    disks.shell(folder, 'mkfs.erofs -T 1 root.img tree > log')
    data = (folder / 'root.img').read_bytes()
    assert not structure.check_root(Bytes(data))
    for offset, expected in (
            (4, 'erofs superblock, checksum, offset 1028'),
            (0x30, 'erofs superblock, checksum'),
            (0x0c, 'erofs superblock, block size, offset 1036'),
            (0x27, 'erofs superblock, blocks, offset 1060'),
            (0, 'root file system, magic')):
        found = structure.check_root(Bytes(flipped(data, 1024 + offset)))
        assert expected in str(found[0]), found


# -- Kernel, UKI and initrd -------------------------------------------------

def bzimage() -> bytes:
    '''The least that looks like one.'''
    data = bytearray(2048)
    data[0x1f1] = 1
    struct.pack_into('<I', data, 0x1f4, 64)
    data[0x1fe:0x200] = b'\x55\xaa'
    data[0x202:0x206] = b'HdrS'
    return bytes(data)


def image() -> bytes:
    '''The least that looks like an arm64 kernel.'''
    data = bytearray(2048)
    struct.pack_into('<Q', data, 16, 4096)
    data[56:60] = b'ARM\x64'
    return bytes(data)


@pytest.mark.parametrize('data, form, expected', [
    (bzimage(), 'bzimage', None),
    (flipped(bzimage(), 0x202), 'bzimage', 'kernel, magic of bzimage, offset '
     '514: expected 48647253'),
    (flipped(bzimage(), 0x1fe), 'bzimage', 'offset 510'),
    (bzimage()[:1500], 'bzimage', 'kernel, size, offset 500: expected 2048 '
     'bytes, found 1500'),
    (b'', 'bzimage', 'kernel, magic of bzimage'),
    (image(), 'image', None),
    (flipped(image(), 56), 'image', 'kernel, magic of image, offset 56'),
    (image() + bytes(4096), 'image', 'kernel, size of the image, offset 16'),
    (gzip.compress(image()), 'image-gzip', None),
    (gzip.compress(image())[:-9], 'image-gzip', 'gzip data: expected a whole '
     'stream'),
    (flipped(gzip.compress(image()), -8), 'image-gzip', 'gzip data'),
    (image(), 'image-gzip', 'kernel, offset 0: expected gzip'),
    (gzip.compress(bytes(99)), 'image-gzip', 'unpacked: kernel, magic'),
])
def test_kernel(data: bytes, form: str, expected: Optional[str]) -> None:
    '''Kernels in each form, whole and broken.'''
    arch = 'x86_64' if form == 'bzimage' else 'aarch64'
    found = '\n'.join(map(str, structure.check_kernel(data, form, arch)))
    assert expected in found if expected else not found


def newc(*names: str, mode: int = 0o100755) -> bytes:
    '''A cpio archive of empty files.'''
    data = b''
    for name in (*names, 'TRAILER!!!'):
        fields = (1, mode, 0, 0, 1, 0, 0, 0, 0, 0, 0, len(name) + 1, 0)
        entry = b'070701' + b''.join(b'%08X' % f for f in fields)
        entry += name.encode() + b'\0'
        data += entry.ljust(-(-len(entry) // 4) * 4, b'\0')
    return data


@pytest.mark.parametrize('data, expected', [
    (newc('init'), None),
    (newc('./init', 'bin'), None),
    (newc('kernel/x86/microcode') + bytes(100) + newc('init'), None),
    (newc('early') + gzip.compress(newc('init')), None),
    (gzip.compress(newc('init')), None),
    (newc('bin', 'etc'), 'cpio archive: expected /init, found 2 others'),
    (newc('init', mode=0o40755), 'expected a file or a link, found a folder'),
    (b'', 'cpio archive, offset 0: expected 070701, found nothing'),
    (b'no archive', 'compressed data'),
    (newc('init')[:-90], 'cpio header 1, offset'),
    (flipped(newc('init', 'b'), 116), 'cpio header 1, offset 116: expected '
     '070701'),
    (flipped(newc('init'), 20), 'cpio header 0, offset 0'),
    (gzip.compress(newc('init'))[:-1], 'gzip data: expected a whole stream'),
    (b'\xfd7zXZ\0', 'xz data'),
])
def test_initrd(data: bytes, expected: Optional[str]) -> None:
    '''Archives, in a row and compressed, whole and broken.'''
    found = '\n'.join(map(str, structure.check_initrd(data)))
    assert expected in found if expected else not found


@pytest.mark.parametrize('data, expected', [
    (uki(newc('init')), None),
    (uki(newc('init'), uname=b'6.12'), None),
    (uki(b''), 'PE file, sections: expected .initrd, found .osrel, .cmdline'),
    (uki(newc('bin')), '.initrd: cpio archive: expected /init'),
    (pe({'.text': b'x'}), 'PE file, sections: expected .linux'),
    (pe({'.linux': kernel(), '.initrd': newc('init'), '.cmdline': b'\0',
         '.osrel': b'ID=x\n'}), 'section .cmdline, offset'),
    (pe({'.linux': b'no kernel', '.initrd': newc('init'),
         '.cmdline': b'quiet', '.osrel': b'ID=x\n'}),
     '.linux: PE file, DOS header'),
    (pe({'.linux': pe({'.text': b'x'}, machine=0xaa64)}),
     '.linux: PE file, machine: expected 0x8664, found 0xaa64'),
    (pe({'.text': b'x'}, subsystem=3), 'PE file, subsystem, offset 156: '
     'expected 0xa, found 0x3'),
    (uki(newc('init'))[:1500], 'PE file, section .'),
    (uki(newc('init'))[:200], 'PE file, section'),
])
def test_uki(data: bytes, expected: Optional[str]) -> None:
    '''What firmware boots, whole and broken.'''
    found = '\n'.join(map(str, structure.check_uki(data, 'x86_64')))
    assert expected in found if expected else not found


# -- The command ------------------------------------------------------------

class Heard:
    '''A report that keeps what it is told.'''

    def __init__(self) -> None:
        self.events: List[Any] = []

    def event(self, kind: str, text: str, **data: Any) -> None:
        '''Keep it.'''
        self.events.append((kind, text, data))

    def stage(self, _name: str) -> Any:
        '''No output.'''
        return open(os.devnull, 'rb')   # pylint: disable=R1732


def stand_in(folder: Path, good: Optional[Path]) -> Any:
    '''A builder whose one job was built in the folder @good, or never.'''
    artefacts = {}
    if good:
        for kind, name in (('kernel', 'vmlinuz'), ('disk', 'disk.qcow2'),
                           ('initrd', 'initrd.cpio.zst')):
            artefacts[kind] = build.Built(good / name, '', 0)
    job = SimpleNamespace(
        image=SimpleNamespace(name='mini'),
        tool_lock=SimpleNamespace(digest='none'), target=SimpleNamespace(
            arch='x86_64', artefacts={'kernel': SimpleNamespace(
                format='bzimage')}))
    return SimpleNamespace(
        job=job, report=Heard(), cache=SimpleNamespace(tools=folder),
        find=lambda _: SimpleNamespace(job=job, artefacts=artefacts)
        if good else None)


def test_not_built(tmp_path: Path) -> None:
    '''What is not there can't be inspected; the next step builds it.'''
    builder = stand_in(tmp_path, None)
    with pytest.raises(FetchError, match='is not built') as error:
        structure.inspect(builder, [builder.job])
    assert error.value.next_step == 'scripts/mkosi-build.py x86_64 mini'


@SLOW
def test_inspect(tmp_path: Path, good: Path) -> None:
    '''Each problem is an event; all of them are one error at the end.'''
    for name in ('disk.qcow2', 'initrd.cpio.zst'):
        (tmp_path / name).write_bytes((good / name).read_bytes())
    (tmp_path / 'vmlinuz').write_bytes(bzimage())
    builder = stand_in(tmp_path, tmp_path)
    structure.inspect(builder, [builder.job])
    (kind, _, data), = builder.report.events
    assert (kind, data['problems']) == ('inspected', 0)

    (tmp_path / 'vmlinuz').write_bytes(flipped(bzimage(), 0x202))
    (tmp_path / 'disk.qcow2').write_bytes(b'no disk')
    builder = stand_in(tmp_path, tmp_path)
    with pytest.raises(structure.StructureError,
                       match='built is broken: mini x86_64') as error:
        structure.inspect(builder, [builder.job])
    assert error.value.exit_code == 6 and error.value.next_step
    kinds = [kind for kind, _, _ in builder.report.events]
    assert kinds == ['problem', 'problem', 'inspected']
    _, text, data = builder.report.events[0]
    assert text.startswith('mini x86_64: vmlinuz: kernel, magic of bzimage')
    assert (data['offset'], data['expected']) == (514, '48647253')
