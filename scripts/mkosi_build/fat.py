# SPDX-License-Identifier: GPL-2.0-or-later
'''
FAT16 and FAT32, as Microsoft's specification (fatgen103) has them: boot
sector, allocation tables, folders with long names and times.
'''

from dataclasses import dataclass
from typing import Dict, Iterator, List, Set, Tuple

from .reading import (MAX_FILE, Layout, Malformed, Member, Problem, Source,
                      Value, number, unpack)

BOOT: Layout = (
    ('maker', 3, '8s'), ('bytes per sector', 11, 'H'),
    ('sectors per cluster', 13, 'B'), ('reserved sectors', 14, 'H'),
    ('tables', 16, 'B'), ('root entries', 17, 'H'), ('sectors', 19, 'H'),
    ('medium', 21, 'B'), ('sectors per table', 22, 'H'),
    ('sectors per track', 24, 'H'), ('heads', 26, 'H'),
    ('hidden sectors', 28, 'I'), ('sectors, wide', 32, 'I'))
BOOT16: Layout = BOOT + (
    ('volume id', 39, 'I'), ('label', 43, '11s'), ('type', 54, '8s'))
BOOT32: Layout = BOOT + (
    ('sectors per table, wide', 36, 'I'), ('root cluster', 44, 'I'),
    ('information sector', 48, 'H'), ('backup sector', 50, 'H'),
    ('volume id', 67, 'I'), ('label', 71, '11s'), ('type', 82, '8s'))
OFFSETS = {name: offset for name, offset, _ in BOOT32}

_FOLDER = 0x10
_LABEL = 0x08
_LONG = 0x0f
_MAX_DEPTH = 32


@dataclass(frozen=True)
class _Entry:
    name: str
    raw: bytes
    offset: int

    # pylint: disable=missing-function-docstring
    @property
    def attributes(self) -> int:
        return self.raw[11]

    @property
    def cluster(self) -> int:
        return (int.from_bytes(self.raw[26:28], 'little')
                | int.from_bytes(self.raw[20:22], 'little') << 16)

    @property
    def size(self) -> int:
        return int.from_bytes(self.raw[28:32], 'little')

    def time(self, date: int, clock: int = 0, tenths: int = 0) -> str:
        day = int.from_bytes(self.raw[date:date + 2], 'little')
        text = f'{1980 + (day >> 9)}-{day >> 5 & 15:02}-{day & 31:02}'
        if clock:
            now = int.from_bytes(self.raw[clock:clock + 2], 'little')
            hundredths = self.raw[tenths] if tenths else 0
            text += (f' {now >> 11:02}:{now >> 5 & 63:02}:'
                     f'{(now & 31) * 2 + hundredths // 100:02}'
                     f'.{hundredths % 100:02}')
        return text


def _short(raw: bytes) -> str:
    '''A short name; two bits, Windows NT's, say that a part is in small.'''
    parts = [raw[:8].decode('cp437').rstrip(' '),
             raw[8:11].decode('cp437').rstrip(' ')]
    for index, bit in enumerate((0x08, 0x10)):
        if raw[12] & bit:
            parts[index] = parts[index].lower()
    return '.'.join(part for part in parts if part)


class Fat:
    '''
    A file system in @source; @boot has the boot sector's fields. Raises
    Malformed where it can't be read.
    '''

    def __init__(self, source: Source) -> None:
        self.source = source
        raw = source.take(0, 512, 'FAT boot sector')
        if raw[510:] != b'\x55\xaa':
            raise Malformed('FAT boot sector, signature',
                            source.origin + 510, '55aa', raw[510:].hex())
        self.wide = raw[22:24] == b'\0\0'
        self.boot = unpack(BOOT32 if self.wide else BOOT16, raw)
        self.sector = self.get('bytes per sector')
        self._expect('bytes per sector', self.sector in (512, 1024, 2048,
                                                         4096),
                     '512 to 4096')
        per_cluster = self.get('sectors per cluster')
        self._expect('sectors per cluster', per_cluster in
                     (1, 2, 4, 8, 16, 32, 64, 128), 'a power of 2')
        self.cluster = per_cluster * self.sector
        self._expect('tables', self.get('tables') in (1, 2), '1 or 2')
        self._expect('reserved sectors', self.get('reserved sectors') > 0,
                     '1 or more')
        self.sectors = self.get('sectors') or self.get('sectors, wide')
        self._expect('sectors, wide',
                     0 < self.sectors * self.sector <= source.size,
                     f'at most {source.size // self.sector}, as fit into '
                     'the partition')
        length = (self.get('sectors per table')
                  or self.get('sectors per table, wide'))
        self.table = self.get('reserved sectors') * self.sector
        self.table_size = length * self.sector
        self.root = self.table + self.get('tables') * self.table_size
        self.data = self.root + -(-self.get('root entries') * 32
                                  // self.sector) * self.sector
        self.clusters = (self.sectors * self.sector - self.data
                         ) // self.cluster
        width = 4 if self.wide else 2
        name = 'sectors per table, wide' if self.wide else (
            'sectors per table')
        self._expect(name, 0 < self.clusters
                     and (self.clusters + 2) * width <= self.table_size,
                     'a table for all clusters')
        self._fat = source.take(self.table, self.table_size, 'FAT table')
        self._width = width

    def get(self, name: str) -> int:
        '''A field of the boot sector that is a number.'''
        return number(self.boot, name)

    def _expect(self, name: str, good: bool, expected: str) -> None:
        if not good:
            raise Malformed(f'FAT boot sector, {name}',
                            self.source.origin + OFFSETS[name], expected,
                            f'{self.get(name)}')

    def check(self) -> List[Problem]:
        '''What is wrong in the file system.'''
        found: List[Problem] = []
        origin = self.source.origin
        for copy in range(1, self.get('tables')):
            start = self.table + copy * self.table_size
            other = self.source.take(start, self.table_size, 'FAT table')
            if other != self._fat:
                at = next(i for i, pair in enumerate(zip(other, self._fat))
                          if pair[0] != pair[1])
                found.append(Problem(
                    'FAT, second table', origin + start + at,
                    f'{self._fat[at]:#04x} as in the first',
                    f'{other[at]:#04x}'))
        if self.wide:
            found += self._check_wide()
        try:
            for member in self.members():
                if member.load:
                    member.load()
        except Malformed as e:
            found.append(e.problem)
        return found

    def _check_wide(self) -> List[Problem]:
        found: List[Problem] = []
        origin = self.source.origin
        start = self.get('information sector') * self.sector
        info = self.source.take(start, 512, 'FAT information sector')
        for at, expected in ((0, b'RRaA'), (484, b'rrAa'),
                             (508, b'\0\0\x55\xaa')):
            if info[at:at + 4] != expected:
                found.append(Problem(
                    'FAT information sector, signature',
                    origin + start + at, expected.hex(),
                    info[at:at + 4].hex()))
        start = self.get('backup sector') * self.sector
        if start:
            first = self.source.take(0, 512, 'FAT boot sector')
            backup = self.source.take(start, 512, 'FAT backup boot sector')
            if first != backup:
                at = next(i for i, pair in enumerate(zip(first, backup))
                          if pair[0] != pair[1])
                found.append(Problem(
                    'FAT backup boot sector', origin + start + at,
                    f'{first[at]:#04x} as in the first',
                    f'{backup[at]:#04x}'))
        return found

    # -- Clusters -----------------------------------------------------------

    def chain(self, first: int, name: str) -> List[int]:
        '''The clusters from @first on. Raises Malformed for a broken one.'''
        found: List[int] = []
        end = 0x0ffffff8 if self.wide else 0xfff8
        cluster = first
        while cluster < end:
            if not 2 <= cluster < self.clusters + 2:
                raise Malformed(f'FAT clusters of {name}',
                                self.source.origin + self.table
                                + self._width * (found or [0])[-1],
                                f'2 to {self.clusters + 1}', f'{cluster}')
            found.append(cluster)
            if len(found) > self.clusters:
                raise Malformed(f'FAT clusters of {name}',
                                self.source.origin + self.table
                                + self._width * first, 'an end', 'a loop')
            at = cluster * self._width
            cluster = int.from_bytes(self._fat[at:at + self._width],
                                     'little') & 0x0fffffff
        return found

    def place(self, cluster: int) -> int:
        '''The offset of a cluster in the file system.'''
        return self.data + (cluster - 2) * self.cluster

    def _load(self, first: int, name: str, size: int = -1) -> bytes:
        if not first and size <= 0:
            return b''
        chain = self.chain(first, name)
        if max(size, 0) > min(len(chain) * self.cluster, MAX_FILE):
            raise Malformed(f'FAT, size of {name}', None,
                            f'at most {len(chain) * self.cluster}, by its '
                            'clusters', f'{size}')
        data = b''.join(self.source.take(self.place(cluster), self.cluster,
                                         f'FAT, {name}')
                        for cluster in chain)
        return data if size < 0 else data[:size]

    def _folder(self, first: int, name: str) -> Tuple[bytes, List[int]]:
        '''The bytes of a folder, and the offset of each cluster of them.'''
        if not first and not self.wide:
            size = self.get('root entries') * 32
            return (self.source.take(self.root, size, 'FAT root folder'),
                    list(range(self.root, self.data, self.cluster)))
        if not first:
            first = self.get('root cluster')
        return (self._load(first, name),
                [self.place(cluster) for cluster in self.chain(first, name)])

    def entries(self, first: int, name: str) -> List[_Entry]:
        '''What is in a folder, in order.'''
        data, places = self._folder(first, name)
        found: List[_Entry] = []
        long_name: Dict[int, bytes] = {}
        for at in range(0, len(data) - 31, 32):
            raw = data[at:at + 32]
            if raw[0] == 0:
                break
            if raw[0] == 0xe5:
                long_name = {}
            elif raw[11] & 0x3f == _LONG:
                long_name[raw[0] & 0x1f] = raw[1:11] + raw[14:26] + raw[28:]
            else:
                text = b''.join(long_name[i] for i in sorted(long_name))
                found.append(_Entry(
                    text.decode('utf-16-le', 'replace').partition('\0')[0]
                    or _short(raw), raw,
                    self.source.origin + places[at // self.cluster]
                    + at % self.cluster))
                long_name = {}
        return found

    def members(self) -> Iterator[Member]:
        '''
        What is in the file system, each folder in its order on the disk,
        before what is in it; the volume's label is a member "label" too.
        '''
        pending: List[Tuple[str, int]] = [('/', 0)]
        seen: Set[int] = set()
        while pending:
            path, first = pending.pop()
            if first in seen or path.count('/') > _MAX_DEPTH:
                raise Malformed(f'FAT folder {path}', None,
                                'no folder twice', f'cluster {first}')
            seen.add(first)
            for entry in self.entries(first, path):
                if entry.name in ('.', '..'):
                    continue
                member = self._member(path, entry)
                yield member
                if member.kind == 'folder':
                    pending.append((member.path + '/', entry.cluster))

    def _member(self, path: str, entry: _Entry) -> Member:
        kind = ('label' if entry.attributes & _LABEL else
                'folder' if entry.attributes & _FOLDER else 'file')
        fields: Dict[str, Value] = {
            'short name': entry.raw[:11].decode('cp437'),
            'attributes': f'{entry.attributes:#04x}',
            'mtime': entry.time(24, 22),
            'crtime': entry.time(16, 14, 13),
            'atime': entry.time(18)}
        name = path + entry.name
        return Member(name, kind, fields,
                      (lambda: self._load(entry.cluster, name, entry.size))
                      if kind == 'file' else None)
