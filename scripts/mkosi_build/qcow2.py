# SPDX-License-Identifier: GPL-2.0-or-later
'''
qcow2 files, as docs/interop/qcow2.rst describes them: the header, and the
bytes that a guest sees. What images don't have (backing and data files,
encryption, snapshots, zstd clusters) is told, not read.
'''

import zlib
from functools import lru_cache
from typing import Dict, List

from .reading import Layout, Malformed, Problem, Source, number, unpack

MAGIC = b'QFI\xfb'
HEADER: Layout = (
    ('magic', 0, '4s'), ('version', 4, 'I'), ('backing file', 8, 'Q'),
    ('backing file name', 16, 'I'), ('cluster bits', 20, 'I'),
    ('size', 24, 'Q'), ('encryption', 32, 'I'), ('L1 size', 36, 'I'),
    ('L1 table', 40, 'Q'), ('refcount table', 48, 'Q'),
    ('refcount table clusters', 56, 'I'), ('snapshots', 60, 'I'),
    ('snapshot table', 64, 'Q'), ('incompatible features', 72, 'Q'),
    ('compatible features', 80, 'Q'), ('autoclear features', 88, 'Q'),
    ('refcount order', 96, 'I'), ('header length', 100, 'I'),
    ('compression type', 104, 'B'))
OFFSETS = {name: offset for name, offset, _ in HEADER}
NAMES = {'dirty': 0, 'corrupt': 1, 'external data file': 2,
         'compression type': 3, 'extended L2 entries': 4}
COMPRESSIONS = {0: 'zlib', 1: 'zstd'}

_OFFSET = 0x00fffffffffffe00
_COMPRESSED = 1 << 62
_ZERO = 1
# 4 TiB in clusters of 64 KiB
_MAX_L1 = 8192
_MAX_PROBLEMS = 1000


def problems(header: Dict[str, object], file_size: int) -> List[Problem]:
    '''What in a @header is not as the builder makes it.'''
    found = []

    def expect(name: str, good: bool, expected: str, value: object) -> None:
        if not good:
            found.append(Problem(f'qcow2 header, {name}', OFFSETS[name],
                                 expected, str(value)))

    def get(name: str) -> int:
        return number(header, name)

    expect('version', get('version') == 3, '3', get('version'))
    expect('backing file', not get('backing file'), 'none',
           f'a name at {get("backing file")}')
    expect('cluster bits', 9 <= get('cluster bits') <= 21, '9 to 21',
           get('cluster bits'))
    expect('size', 0 < get('size') and not get('size') % 512,
           'a multiple of 512', get('size'))
    expect('encryption', not get('encryption'), 'none', get('encryption'))
    expect('snapshots', not get('snapshots'), 'none', get('snapshots'))
    features = get('incompatible features')
    names = [name for name, bit in NAMES.items() if features >> bit & 1]
    if features >> len(NAMES):
        names.append(f'unknown bits {features:#x}')
    expect('incompatible features', not features, 'none', ', '.join(names))
    kind = get('compression type')
    expect('compression type', kind == 0, 'zlib',
           COMPRESSIONS.get(kind, kind))
    # Version 2 has no such field
    expect('header length', get('version') == 2
           or 104 <= get('header length') <= 4096,
           '104 or more', get('header length'))
    expect('refcount order', get('refcount order') <= 6, 'at most 6',
           get('refcount order'))
    # Another version is read all the same
    if all(p.structure.endswith('version') for p in found):
        cluster = 1 << get('cluster bits')
        span = cluster * (cluster // 8)
        needed = -(-get('size') // span)
        expect('L1 size', needed <= get('L1 size') <= _MAX_L1,
               f'{needed} entries', get('L1 size'))
        for name in ('L1 table', 'refcount table'):
            offset = get(name)
            expect(name, 0 < offset < file_size and not offset % cluster,
                   f'a multiple of {cluster} inside the file', offset)
    return found


class Qcow2(Source):
    '''
    The bytes that a guest sees of the qcow2 file @file; @header has the
    header's fields. Raises Malformed where it can't be read.
    '''

    def __init__(self, file: Source) -> None:
        self.file = file
        head = file.take(0, 72, 'qcow2 header')
        if not head.startswith(MAGIC):
            raise Malformed('qcow2 header, magic', 0, MAGIC.hex(),
                            head[:4].hex())
        head = file.read(0, 112)
        # Version 2 ends at 72; the compression type came later still
        length = int.from_bytes(head[100:104], 'big')
        version = int.from_bytes(head[4:8], 'big')
        end = 72 if version == 2 else max(104, min(length, 112))
        self.header = unpack(HEADER, head[:end], '>')
        wrong = [p for p in problems(self.header, file.size)
                 if not p.structure.endswith('version')]
        if wrong:
            raise Malformed(wrong[0].structure, wrong[0].offset,
                            wrong[0].expected, wrong[0].found)
        super().__init__(number(self.header, 'size'))
        self.bits = number(self.header, 'cluster bits')
        self.cluster = 1 << self.bits
        self._entries = self.cluster // 8
        self._l1 = self._table(number(self.header, 'L1 table'),
                               number(self.header, 'L1 size'), 'L1 table')
        self._l2 = lru_cache(64)(self._load_l2)
        self._data = lru_cache(128)(self._load)

    def _table(self, offset: int, count: int, name: str) -> List[int]:
        data = self.file.take(offset, 8 * count, f'qcow2 {name}')
        return [int.from_bytes(data[i:i + 8], 'big')
                for i in range(0, len(data), 8)]

    def _load_l2(self, index: int) -> List[int]:
        entry = self._l1[index]
        offset = entry & _OFFSET
        if not offset:
            return [0] * self._entries
        if offset % self.cluster or entry & ~(_OFFSET | 1 << 63):
            raise Malformed(
                f'qcow2 L1 entry {index}',
                number(self.header, 'L1 table') + 8 * index,
                'a cluster\'s offset', f'{entry:#x}')
        return self._table(offset, self._entries, f'L2 table {index}')

    def entry(self, cluster: int) -> int:
        '''The L2 entry of a guest's @cluster.'''
        first, second = divmod(cluster, self._entries)
        return self._l2(first)[second]

    def check(self) -> List[Problem]:
        '''The clusters that can't be read.'''
        # In order, each once; after so many, the file is not worth more
        found: Dict[Problem, None] = {}
        for index in range(-(-self.size // self.cluster)):
            try:
                if self.entry(index):
                    self._load(index)
            except Malformed as e:
                found[e.problem] = None
                if len(found) == _MAX_PROBLEMS:
                    break
        return list(found)

    def _load(self, cluster: int) -> bytes:
        entry = self.entry(cluster)
        name = f'qcow2 cluster of guest offset {cluster << self.bits}'
        if entry & _COMPRESSED:
            split = 62 - (self.bits - 8)
            offset = entry & (1 << split) - 1
            sectors = ((entry & _COMPRESSED - 1) >> split) + 1
            size = sectors * 512 - offset % 512
            packed = self.file.read(offset, size)
            try:
                # The stream ends before the sector does
                data = zlib.decompressobj(-15).decompress(packed,
                                                          self.cluster)
            except zlib.error as e:
                raise Malformed(name, offset, 'deflated data', str(e)) from e
            if len(data) != self.cluster:
                raise Malformed(name, offset, f'{self.cluster} bytes of '
                                'deflated data', f'{len(data)}')
            return data
        if entry & _ZERO or not entry & _OFFSET:
            return bytes(self.cluster)
        if (entry & _OFFSET) % self.cluster:
            raise Malformed(name, None, 'a cluster\'s offset',
                            f'{entry:#x}')
        data = self.file.read(entry & _OFFSET, self.cluster)
        if not data:
            raise Malformed(name, entry & _OFFSET, 'data',
                            'the end of the file')
        # The last cluster of a file may be short
        return data.ljust(self.cluster, b'\0')

    def read(self, offset: int, size: int) -> bytes:
        end = min(offset + size, self.size)
        parts = []
        while offset < end:
            index, skip = divmod(offset, self.cluster)
            part = self._data(index)[skip:skip + end - offset]
            parts.append(part)
            offset += len(part)
        return b''.join(parts)
