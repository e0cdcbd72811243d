# SPDX-License-Identifier: GPL-2.0-or-later
'''
ext4 as mke2fs makes it: superblock, group descriptors, inodes with extents,
folders, links and extended attributes, with their checksums. The kernel's
Documentation/filesystems/ext4 has the format.
'''

import stat
import struct
from dataclasses import dataclass
from functools import lru_cache
from typing import Dict, Iterator, List, Optional, Set, Tuple

from .reading import (MAX_FILE, Layout, Malformed, Member, Problem, Source,
                      Value, crc32c, kind_of, number, unpack)

START = 1024
MAGIC = 0xef53
SUPERBLOCK: Layout = (
    ('inodes', 0x0, 'I'), ('blocks', 0x4, 'I'), ('reserved blocks', 0x8, 'I'),
    ('free blocks', 0xc, 'I'), ('free inodes', 0x10, 'I'),
    ('first data block', 0x14, 'I'), ('block size', 0x18, 'I'),
    ('cluster size', 0x1c, 'I'), ('blocks per group', 0x20, 'I'),
    ('inodes per group', 0x28, 'I'), ('mount time', 0x2c, 'I'),
    ('write time', 0x30, 'I'), ('mount count', 0x34, 'H'),
    ('magic', 0x38, 'H'), ('state', 0x3a, 'H'), ('errors', 0x3c, 'H'),
    ('check time', 0x40, 'I'), ('check interval', 0x44, 'I'),
    ('creator', 0x48, 'I'), ('revision', 0x4c, 'I'),
    ('first inode', 0x54, 'I'), ('inode size', 0x58, 'H'),
    ('compatible features', 0x5c, 'I'),
    ('incompatible features', 0x60, 'I'),
    ('read-only compatible features', 0x64, 'I'), ('UUID', 0x68, '16s'),
    ('label', 0x78, '16s'), ('last mounted on', 0x88, '64s'),
    ('reserved descriptor blocks', 0xce, 'H'), ('journal UUID', 0xd0, '16s'),
    ('journal inode', 0xe0, 'I'), ('last orphan', 0xe8, 'I'),
    ('directory hash seed', 0xec, '16s'), ('hash version', 0xfc, 'B'),
    ('descriptor size', 0xfe, 'H'), ('mount options', 0x100, 'I'),
    ('creation time', 0x108, 'I'), ('blocks, high', 0x150, 'I'),
    ('wanted inode size', 0x15e, 'H'), ('flags', 0x160, 'I'),
    ('RAID stride', 0x164, 'H'), ('written', 0x178, 'Q'),
    ('overhead', 0x248, 'I'), ('checksum seed', 0x270, 'I'),
    ('orphan file inode', 0x280, 'I'), ('checksum', 0x3fc, 'I'))
OFFSETS = {name: offset for name, offset, _ in SUPERBLOCK}
TIMES = ('mount time', 'write time', 'check time', 'creation time')

_INCOMPAT_64BIT = 0x80
_INCOMPAT_SEED = 0x2000
# Filetypes, recovery, extents, 64bit, flex_bg, checksum seed, largedir
_INCOMPAT_KNOWN = 0x2 | 0x4 | 0x40 | 0x80 | 0x200 | 0x2000 | 0x4000
_METADATA_CSUM = 0x400
_EXTENTS = 0x80000
_INDEX = 0x1000
_ROOT = 2
_XATTR_MAGIC = 0xea020000
_PREFIXES = {0: '', 1: 'user.', 2: 'system.posix_acl_access',
             3: 'system.posix_acl_default', 4: 'trusted.', 6: 'security.',
             7: 'system.'}
_MAX_DEPTH = 64


@dataclass(frozen=True)
class Inode:
    '''An inode as it is on the disk: @raw, at @offset.'''
    number: int
    raw: bytes
    offset: int

    def field(self, offset: int, size: int) -> int:
        '''A number in it.'''
        return int.from_bytes(self.raw[offset:offset + size], 'little')

    @property
    def mode(self) -> int:
        '''Type and permissions, as of stat().'''
        return self.field(0, 2)

    @property
    def size(self) -> int:
        '''In bytes.'''
        return self.field(4, 4) | self.field(0x6c, 4) << 32

    @property
    def flags(self) -> int:
        '''What kind of block map it has, and what chattr sets.'''
        return self.field(0x20, 4)

    @property
    def extra(self) -> int:
        '''How much of it lies beyond the first 128 bytes.'''
        return self.field(0x80, 2) if len(self.raw) > 128 else 0

    def time(self, low: int, high: int) -> str:
        '''A time in seconds since 1970, with what is below a second.'''
        seconds = self.field(low, 4)
        if seconds >= 1 << 31:
            seconds -= 1 << 32
        more = self.field(high, 4) if high + 4 <= 128 + self.extra else 0
        return f'{seconds + ((more & 3) << 32)}.{more >> 2:09d}'


class Ext4:
    '''
    A file system in @source. @superblock has its fields; sizes are in
    bytes. Raises Malformed where it can't be read.
    '''

    def __init__(self, source: Source) -> None:
        self.source = source
        raw = source.take(START, 1024, 'ext4 superblock')
        self.superblock = unpack(SUPERBLOCK, raw)
        self._expect('magic', self.get('magic') == MAGIC, f'{MAGIC:#x}')
        self._expect('block size', self.get('block size') <= 6,
                     'a power of 2 up to 6')
        self.block = 1024 << self.get('block size')
        features = self.get('incompatible features')
        self._expect('incompatible features',
                     not features & ~_INCOMPAT_KNOWN, 'known ones')
        self.blocks = self.get('blocks')
        wide = features & _INCOMPAT_64BIT
        self.descriptor = self.get('descriptor size') if wide else 32
        if wide:
            self.blocks |= self.get('blocks, high') << 32
        self._expect('descriptor size', self.descriptor in (32, 64),
                     '32 or 64')
        self._expect('blocks', 0 < self.blocks * self.block <= source.size,
                     f'at most {source.size // self.block}, as fit into '
                     'the partition')
        for name in ('blocks per group', 'inodes per group'):
            self._expect(name, 0 < self.get(name) <= self.block * 8,
                         f'at most {self.block * 8}')
        self.inode_size = self.get('inode size')
        self._expect('inode size', self.inode_size in (128, 256, 512, 1024),
                     '128 to 1024')
        first = self.get('first data block')
        self._expect('first data block', first == (self.block == 1024),
                     f'{int(self.block == 1024)}')
        self.groups = -(-(self.blocks - first)
                        // self.get('blocks per group'))
        inodes = self.groups * self.get('inodes per group')
        self._expect('inodes', self.get('inodes') == inodes, f'{inodes}')
        self.checksums = bool(self.get('read-only compatible features')
                              & _METADATA_CSUM)
        if features & _INCOMPAT_SEED:
            self.seed = self.get('checksum seed')
        else:
            self.seed = crc32c(0xffffffff, raw[0x68:0x78])
        self._raw = raw
        self._descriptors = source.take(
            (first + 1) * self.block, self.groups * self.descriptor,
            'ext4 group descriptors')
        self.inode = lru_cache(4096)(self._inode)

    def get(self, name: str) -> int:
        '''A field of the superblock that is a number.'''
        return number(self.superblock, name)

    def _place(self, name: str) -> int:
        return self.source.origin + START + OFFSETS[name]

    def _expect(self, name: str, good: bool, expected: str) -> None:
        if not good:
            raise Malformed(f'ext4 superblock, {name}', self._place(name),
                            expected, f'{self.get(name):#x}')

    # -- Checks -------------------------------------------------------------

    def check(self) -> List[Problem]:
        '''What is wrong in the file system, checksums first.'''
        found: List[Problem] = []
        if self.checksums:
            found += self._check_superblock()
            found += self._check_descriptors()
        if self.get('state') != 1:
            found.append(Problem('ext4 superblock, state',
                                 self._place('state'), '1 (clean)',
                                 f'{self.get("state")}'))
        try:
            for _, inode in self.walk():
                if self.checksums:
                    found += self._check_inode(inode)
        except Malformed as e:
            found.append(e.problem)
        return found

    def _check_superblock(self) -> List[Problem]:
        return self._compare(
            'ext4 superblock, checksum', self._place('checksum'),
            crc32c(0xffffffff, self._raw[:0x3fc]), self.get('checksum'))

    @staticmethod
    def _compare(name: str, offset: int, expected: int,
                 found: int) -> List[Problem]:
        if expected == found:
            return []
        return [Problem(name, offset, f'{expected:#x} by its bytes',
                        f'{found:#x}')]

    def _check_descriptors(self) -> List[Problem]:
        found: List[Problem] = []
        start = (self.get('first data block') + 1) * self.block
        for group in range(self.groups):
            offset = group * self.descriptor
            raw = self._descriptors[offset:offset + self.descriptor]
            value = crc32c(self.seed, struct.pack('<I', group))
            value = crc32c(value, raw[:0x1e] + b'\0\0' + raw[0x20:])
            found += self._compare(
                f'ext4 group descriptor {group}, checksum',
                self.source.origin + start + offset + 0x1e, value & 0xffff,
                int.from_bytes(raw[0x1e:0x20], 'little'))
        return found

    def _inode_seed(self, inode: Inode) -> int:
        value = crc32c(self.seed, struct.pack('<I', inode.number))
        return crc32c(value, inode.raw[0x64:0x68])

    def _check_inode(self, inode: Inode) -> List[Problem]:
        raw = bytearray(inode.raw)
        raw[0x7c:0x7e] = b'\0\0'
        value = inode.field(0x7c, 2)
        mask = 0xffff
        if inode.extra >= 4:
            value |= inode.field(0x82, 2) << 16
            raw[0x82:0x84] = b'\0\0'
            mask = 0xffffffff
        found = self._compare(
            f'ext4 inode {inode.number}, checksum', inode.offset + 0x7c,
            crc32c(self._inode_seed(inode), bytes(raw)) & mask, value)
        if stat.S_ISDIR(inode.mode) and not found:
            found += self._check_folder(inode)
        return found

    def _check_folder(self, inode: Inode) -> List[Problem]:
        found: List[Problem] = []
        data = self.content(inode)
        for start in range(0, len(data), self.block):
            block = data[start:start + self.block]
            # Inner nodes of the tree have no such tail
            if block[-12:-4] == b'\0\0\0\0\x0c\0\0\xde':
                found += self._compare(
                    f'ext4 folder of inode {inode.number}, checksum of '
                    f'block {start // self.block}',
                    self._extent_place(inode, start),
                    crc32c(self._inode_seed(inode), block[:-12]),
                    int.from_bytes(block[-4:], 'little'))
        return found

    def _extent_place(self, inode: Inode, offset: int) -> int:
        for logical, count, physical, _ in self.extents(inode):
            index = offset // self.block - logical
            if 0 <= index < count:
                return self.source.origin + (physical + index) * self.block
        return inode.offset

    # -- Inodes -------------------------------------------------------------

    def _inode(self, wanted: int) -> Inode:
        per_group = self.get('inodes per group')
        if not 0 < wanted <= self.get('inodes'):
            raise Malformed('ext4 inode', None,
                            f'a number up to {self.get("inodes")}',
                            f'{wanted}')
        group, index = divmod(wanted - 1, per_group)
        raw = self._descriptors[group * self.descriptor:]
        table = int.from_bytes(raw[8:12], 'little')
        if self.descriptor == 64:
            table |= int.from_bytes(raw[0x28:0x2c], 'little') << 32
        offset = table * self.block + index * self.inode_size
        return Inode(wanted,
                     self.source.take(offset, self.inode_size,
                                      f'ext4 inode {wanted}'),
                     self.source.origin + offset)

    def extents(self, inode: Inode) -> List[Tuple[int, int, int, bool]]:
        '''Its parts in order: first block, count, where, whether written.'''
        name = f'ext4 extents of inode {inode.number}'
        if not inode.flags & _EXTENTS:
            raise Malformed(name, inode.offset + 0x20, 'extents',
                            f'flags {inode.flags:#x}')
        found: List[Tuple[int, int, int, bool]] = []
        # Where a node is, the inode's own for none, and its depth
        pending: List[Tuple[Optional[int], int]] = [(None, -1)]
        seen = 0
        while pending:
            offset, expected = pending.pop()
            if offset is None:
                node, place = inode.raw[0x28:0x64], inode.offset + 0x28
            else:
                node = self.source.take(offset, self.block, name)
                place = self.source.origin + offset
            magic, count, _, depth = struct.unpack_from('<HHHH', node)
            seen += 1
            if (magic != 0xf30a or depth > 5 or 12 * (count + 1) > len(node)
                    or expected not in (-1, depth) or seen > 10000):
                raise Malformed(name, place, 'magic 0xf30a',
                                f'{magic:#x}, depth {depth}, {count} entries')
            for at in range(12, 12 * (count + 1), 12):
                if depth:
                    block = int.from_bytes(node[at + 4:at + 10], 'little')
                    pending.append((block * self.block, depth - 1))
                else:
                    found.append(self._leaf(node[at:at + 12]))
        return sorted(found)

    @staticmethod
    def _leaf(raw: bytes) -> Tuple[int, int, int, bool]:
        first, length, high, low = struct.unpack('<IHHI', raw)
        written = length <= 32768
        return (first, length if written else length - 32768,
                low | high << 32, written)

    def content(self, inode: Inode) -> bytes:
        '''The bytes of a file, folder or long link.'''
        name = f'ext4 inode {inode.number}'
        limit = min(MAX_FILE, self.source.size)
        if inode.size > limit:
            raise Malformed(f'{name}, size', inode.offset + 4,
                            f'at most {limit}', f'{inode.size}')
        data = bytearray(inode.size)
        for first, count, physical, written in self.extents(inode):
            start = first * self.block
            length = min(count * self.block, inode.size - start)
            if length > 0 and written:
                data[start:start + length] = self.source.take(
                    physical * self.block, length, f'{name}, content')
        return bytes(data)

    def link(self, inode: Inode) -> str:
        '''Where a link points.'''
        if inode.size < 60 and not inode.flags & _EXTENTS:
            raw = inode.raw[0x28:0x28 + inode.size]
        else:
            raw = self.content(inode)
        return raw.decode('utf-8', 'backslashreplace')

    def listing(self, inode: Inode) -> List[Tuple[str, int]]:
        '''Names and inodes in a folder, in their order on the disk.'''
        name = f'ext4 folder of inode {inode.number}'
        data = self.content(inode)
        found = []
        offset = 0
        while offset + 8 <= len(data):
            target, length, size = struct.unpack_from('<IHB', data, offset)
            inside = self.block - offset % self.block
            if length < 8 or length % 4 or length > inside:
                raise Malformed(name, self._extent_place(inode, offset),
                                'an entry', f'one of {length} bytes')
            if target and 8 + size <= length:
                entry = data[offset + 8:offset + 8 + size]
                if entry not in (b'.', b'..'):
                    found.append((entry.decode('utf-8', 'backslashreplace'),
                                  target))
            offset += length
        return found

    def attributes(self, inode: Inode) -> List[Tuple[str, bytes]]:
        '''Extended attributes, in their order on the disk.'''
        name = f'ext4 attributes of inode {inode.number}'
        start = 128 + inode.extra
        found: List[Tuple[str, bytes]] = []
        if inode.field(start, 4) == _XATTR_MAGIC:
            found += self._entries(inode.raw[start + 4:], 0, name)
        block = inode.field(0x68, 4) | inode.field(0x76, 2) << 32
        if block:
            data = self.source.take(block * self.block, self.block, name)
            if data[:4] != struct.pack('<I', _XATTR_MAGIC):
                raise Malformed(name, self.source.origin
                                + block * self.block,
                                f'magic {_XATTR_MAGIC:#x}', data[:4].hex())
            found += self._entries(data, 32, name)
        return found

    @staticmethod
    def _entries(data: bytes, offset: int,
                 name: str) -> Iterator[Tuple[str, bytes]]:
        while offset + 16 <= len(data) and data[offset:offset + 4] != bytes(4):
            length, prefix, start, _, size = struct.unpack_from(
                '<BBHII', data, offset)
            key = data[offset + 16:offset + 16 + length]
            if start + size > len(data):
                raise Malformed(name, None, 'a value inside its block',
                                f'one at {start} of {size} bytes')
            yield (_PREFIXES.get(prefix, f'{prefix}.')
                   + key.decode('utf-8', 'backslashreplace'),
                   data[start:start + size])
            offset += 16 + (length + 3) // 4 * 4

    # -- The tree -----------------------------------------------------------

    def walk(self) -> Iterator[Tuple[str, Inode]]:
        '''
        Paths and inodes, each folder in its order on the disk, before what
        is in it. Raises Malformed.
        '''
        seen: Set[int] = set()
        pending: List[Tuple[str, int]] = [('/', _ROOT)]
        while pending:
            path, wanted = pending.pop()
            inode = self.inode(wanted)
            if not stat.S_IFMT(inode.mode):
                raise Malformed(f'ext4 inode {wanted} ({path}), mode',
                                inode.offset, 'a type', f'{inode.mode:#o}')
            yield path, inode
            if stat.S_ISDIR(inode.mode):
                if wanted in seen or path.count('/') > _MAX_DEPTH:
                    raise Malformed(f'ext4 folder {path}', inode.offset,
                                    'no folder twice', f'inode {wanted}')
                seen.add(wanted)
                base = path if path == '/' else path + '/'
                pending += [(base + name, target) for name, target
                            in reversed(self.listing(inode))]

    def members(self) -> Iterator[Member]:
        '''What walk() finds, in the form that can be compared.'''
        for path, inode in self.walk():
            yield self._member(path, inode)

    def _member(self, path: str, inode: Inode) -> Member:
        kind = kind_of(inode.mode)
        attributes = self.attributes(inode)
        fields: Dict[str, Value] = {
            'mode': f'{stat.S_IMODE(inode.mode):04o}',
            'owner': inode.field(2, 2) | inode.field(0x78, 2) << 16,
            'group': inode.field(0x18, 2) | inode.field(0x7a, 2) << 16,
            'attributes': tuple(sorted(attributes)),
            'attribute order': tuple(name for name, _ in attributes),
            'mtime': inode.time(0x10, 0x88),
            'atime': inode.time(0x8, 0x8c),
            'ctime': inode.time(0xc, 0x84),
            'crtime': inode.time(0x90, 0x94),
            # An index and extents are for the file system to decide
            'flags': f'{inode.flags & ~_INDEX & ~_EXTENTS:#x}'}
        if kind == 'link':
            fields['target'] = self.link(inode)
        if kind == 'device':
            fields['device'] = inode.raw[0x28:0x30].hex()
        return Member(path, kind, fields,
                      (lambda: self.content(inode)) if kind == 'file'
                      else None)

    def what_is_at(self, offset: int) -> str:
        '''In words, what lies at @offset of the file system.'''
        block = offset // self.block
        if START <= offset < START + 1024:
            return 'the superblock'
        owner = self._group_part(block)
        if owner:
            return owner
        for path, inode in self.walk():
            if inode.flags & _EXTENTS:
                for _, count, physical, _ in self.extents(inode):
                    if physical <= block < physical + count:
                        return f'{kind_of(inode.mode)} {path}'
        return f'block {block}'

    def _group_part(self, block: int) -> Optional[str]:
        size = self.get('inodes per group') * self.inode_size // self.block
        for group in range(self.groups):
            raw = self._descriptors[group * self.descriptor:]
            for name, at, length in (('block bitmap', 0, 1),
                                     ('inode bitmap', 4, 1),
                                     ('inode table', 8, size)):
                place = int.from_bytes(raw[at:at + 4], 'little')
                if place <= block < place + length:
                    return f'the {name} of group {group}'
        start = self.get('first data block')
        per_block = self.block // self.descriptor
        if start < block <= start + -(-self.groups // per_block):
            return 'the group descriptors'
        return None
