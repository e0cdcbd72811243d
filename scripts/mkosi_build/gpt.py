# SPDX-License-Identifier: GPL-2.0-or-later
'''
GUID partition tables, as the UEFI specification, chapter 5, has them: both
copies, their checksums, and the partitions.
'''

import uuid
import zlib
from dataclasses import dataclass, field, replace
from typing import Dict, List, Optional, Tuple

from .reading import (Layout, Malformed, Problem, Source, Window, number,
                      unpack)

SIGNATURE = b'EFI PART'
HEADER: Layout = (
    ('signature', 0, '8s'), ('revision', 8, 'I'), ('header size', 12, 'I'),
    ('header CRC', 16, 'I'), ('reserved', 20, 'I'), ('own LBA', 24, 'Q'),
    ('other LBA', 32, 'Q'), ('first usable LBA', 40, 'Q'),
    ('last usable LBA', 48, 'Q'), ('disk GUID', 56, '16s'),
    ('entries LBA', 72, 'Q'), ('number of entries', 80, 'I'),
    ('size of an entry', 84, 'I'), ('entries CRC', 88, 'I'))
OFFSETS = {name: offset for name, offset, _ in HEADER}

# The discoverable partitions specification's
ESP = 'c12a7328-f81f-11d2-ba4b-00a0c93ec93b'
ROOTS = {'x86_64': '4f68bce3-e8cd-4db1-96e7-fbcaf984b709',
         'aarch64': 'b921b045-1df0-41c3-af44-4c6f280d3fae'}
NAMES = {ESP: 'esp', ROOTS['x86_64']: 'root-x86-64',
         ROOTS['aarch64']: 'root-arm64'}
COPIES = ('first', 'second')
_MAX_ENTRIES = 1024


def guid(data: bytes) -> str:
    '''A GUID in its usual form.'''
    return str(uuid.UUID(bytes_le=data))


@dataclass(frozen=True)
class Partition:
    '''An entry: @first and @last are sectors, @offset is the entry's own.'''
    number: int
    type: str
    guid: str
    first: int
    last: int
    attributes: int
    label: str
    offset: int

    def __str__(self) -> str:
        return (f'partition {self.number} '
                f'({NAMES.get(self.type, self.type)})')


@dataclass(frozen=True)
class Table:
    '''One copy of the table of a disk with sectors of @sector bytes.'''
    copy: str
    sector: int
    offset: int
    fields: Dict[str, object]
    partitions: Tuple[Partition, ...]
    problems: Tuple[Problem, ...] = field(default=(), compare=False)

    @property
    def disk(self) -> str:
        '''The GUID of the disk.'''
        value = self.fields['disk GUID']
        return guid(value) if isinstance(value, bytes) else ''

    def window(self, source: Source, partition: Partition) -> Source:
        '''What is in @partition of the disk @source.'''
        size = (partition.last - partition.first + 1) * self.sector
        return Window(source, partition.first * self.sector, size)


def sector_size(source: Source) -> Optional[int]:
    '''The size of a disk's sectors, None if there is no table.'''
    for size in (512, 4096):
        if source.read(size, 8) == SIGNATURE:
            return size
    for size in (512, 4096):
        if source.read(source.size - size, 8) == SIGNATURE:
            return size
    return None


# One field after another, in the order of the specification
# pylint: disable-next=too-many-locals
def read(source: Source, sector: int, copy: str) -> Table:
    '''
    The @copy (one of COPIES) of the table. Raises Malformed where there
    is none; whatever else is wrong is in its problems.
    '''
    name = f'GPT header, {copy} copy'
    last = source.size // sector - 1
    own, other = (1, last) if copy == 'first' else (last, 1)
    offset = own * sector
    head = source.take(offset, sector, name)
    fields = unpack(HEADER, head)
    if fields['signature'] != SIGNATURE:
        raise Malformed(name, offset, repr(SIGNATURE.decode()),
                        repr(head[:8]))
    found: List[Problem] = []

    def expect(field_name: str, expected: int, why: str = '') -> None:
        value = number(fields, field_name)
        if value != expected:
            found.append(Problem(f'{name}, {field_name}',
                                 offset + OFFSETS[field_name],
                                 f'{expected}{why}', str(value)))

    size = number(fields, 'header size')
    if 92 <= size <= sector:
        cleared = head[:16] + bytes(4) + head[20:size]
        expect('header CRC', zlib.crc32(cleared), ' by its bytes')
    else:
        expect('header size', 92)
    expect('own LBA', own)
    expect('other LBA', other)
    count = number(fields, 'number of entries')
    each = number(fields, 'size of an entry')
    if not 0 < count <= _MAX_ENTRIES or each not in (128, 256, 512):
        raise Malformed(f'{name}, entries', offset + 80,
                        f'up to {_MAX_ENTRIES} of 128 bytes',
                        f'{count} of {each}')
    start = number(fields, 'entries LBA') * sector
    data = source.take(start, count * each, f'GPT entries, {copy} copy')
    expect('entries CRC', zlib.crc32(data), ' by the entries')
    partitions = tuple(_partitions(data, each, source.origin + start))
    found += _outside(partitions, fields, last, copy)
    return Table(copy, sector, source.origin + offset, fields, partitions,
                 tuple(found))


def _outside(partitions: Tuple[Partition, ...], fields: Dict[str, object],
             last: int, copy: str) -> List[Problem]:
    start = number(fields, 'first usable LBA')
    end = min(last, number(fields, 'last usable LBA'))
    return [Problem(f'GPT entries, {copy} copy, {partition}',
                    partition.offset + 32, f'sectors {start} to {end}',
                    f'{partition.first} to {partition.last}')
            for partition in partitions
            if not start <= partition.first <= partition.last <= end]


def _partitions(data: bytes, each: int, start: int) -> List[Partition]:
    found = []
    for index in range(len(data) // each):
        entry = data[index * each:(index + 1) * each]
        if entry[:16] != bytes(16):
            label = entry[56:128].decode('utf-16-le', 'replace')
            found.append(Partition(
                index + 1, guid(entry[:16]), guid(entry[16:32]),
                int.from_bytes(entry[32:40], 'little'),
                int.from_bytes(entry[40:48], 'little'),
                int.from_bytes(entry[48:56], 'little'),
                label.split('\0')[0], start + index * each))
    return found


def read_any(source: Source) -> Table:
    '''The first copy that can be read. Raises Malformed if there is none.'''
    sector = sector_size(source) or 512
    try:
        return read(source, sector, 'first')
    except Malformed:
        return read(source, sector, 'second')


def check(source: Source) -> Tuple[Optional[Table], List[Problem]]:
    '''A good copy of the table, if there is one, and all that is wrong.'''
    sector = sector_size(source) or 512
    found: List[Problem] = []
    tables = []
    if source.read(510, 2) != b'\x55\xaa':
        found.append(Problem('protective MBR, signature', 510, '55aa',
                             source.read(510, 2).hex()))
    elif source.read(450, 1) != b'\xee':
        found.append(Problem('protective MBR, partition type', 450, 'ee',
                             source.read(450, 1).hex()))
    for copy in COPIES:
        try:
            table = read(source, sector, copy)
        except Malformed as e:
            found.append(e.problem)
            continue
        found += table.problems
        tables.append(table)
    good = [table for table in tables if not table.problems] or tables
    if len(tables) == 2 and not found:
        said = [(t.disk, [replace(p, offset=0) for p in t.partitions])
                for t in tables]
        if said[0] != said[1]:
            found.append(Problem('GPT, second copy', tables[1].offset,
                                 'the first copy\'s disk and partitions',
                                 'others'))
    return (good[0] if good else None), found
