# SPDX-License-Identifier: GPL-2.0-or-later
'''
Reading what was built, without mounting it: bytes that can be had from any
offset, structures in them, and what is wrong with these.

Whatever the bytes are, a reader returns or raises Malformed; it neither
hangs nor takes more memory than MAX_FILE for one file.
'''

import os
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable, Dict, Iterator, Mapping, Optional, Tuple

from .error import InputError

# No file of an image is larger, in bytes
MAX_FILE = 1 << 30
CHUNK = 1 << 16


@dataclass(frozen=True)
class Problem:
    '''
    What is wrong in one place. @offset, in bytes, is that in the file, in
    the guest's disk for whatever is in a disk, or None if it has none.
    '''
    structure: str
    offset: Optional[int]
    expected: str
    found: str

    def __str__(self) -> str:
        place = '' if self.offset is None else f', offset {self.offset}'
        return (f'{self.structure}{place}: expected {self.expected}, '
                f'found {self.found}')


class Malformed(InputError):
    '''Bytes that are not in the form that they should have: @problem.'''

    def __init__(self, structure: str, offset: Optional[int], expected: str,
                 found: str) -> None:
        self.problem = Problem(structure, offset, expected, found)
        super().__init__(str(self.problem),
                         next_step='build the file anew')


class Source:
    '''
    @size bytes that can be read from any offset. @origin is the offset of
    the first of them in the outermost disk, for messages.
    '''

    def __init__(self, size: int, origin: int = 0) -> None:
        self.size = size
        self.origin = origin

    def read(self, offset: int, size: int) -> bytes:
        '''Up to @size bytes from @offset on, fewer at the end only.'''
        raise NotImplementedError

    def take(self, offset: int, size: int, structure: str) -> bytes:
        '''The @size bytes from @offset on. Raises Malformed if too few.'''
        if offset < 0 or size < 0 or offset + size > self.size:
            raise Malformed(structure, self.origin + offset,
                            f'{size} bytes', 'the end of the data')
        data = self.read(offset, size)
        if len(data) != size:
            raise Malformed(structure, self.origin + offset,
                            f'{size} bytes', f'{len(data)}')
        return data

    def whole(self, structure: str) -> bytes:
        '''All bytes. Raises Malformed if these are more than MAX_FILE.'''
        if self.size > MAX_FILE:
            raise Malformed(structure, self.origin,
                            f'at most {MAX_FILE} bytes', f'{self.size}')
        return self.take(0, self.size, structure)

    def chunks(self) -> Iterator[bytes]:
        '''All bytes, CHUNK at a time.'''
        for offset in range(0, self.size, CHUNK):
            yield self.read(offset, min(CHUNK, self.size - offset))


class Bytes(Source):
    '''Bytes in memory.'''

    def __init__(self, data: bytes, origin: int = 0) -> None:
        super().__init__(len(data), origin)
        self.data = data

    def read(self, offset: int, size: int) -> bytes:
        return self.data[offset:offset + size]


class File(Source):
    '''A file, open as long as this object is.'''

    def __init__(self, path: Path) -> None:
        self.path = path
        # Closed with the object: a reader hands its source on
        # pylint: disable-next=consider-using-with
        self._file = open(path, 'rb', buffering=0)
        super().__init__(os.fstat(self._file.fileno()).st_size)

    def __del__(self) -> None:
        if hasattr(self, '_file'):
            self._file.close()

    def read(self, offset: int, size: int) -> bytes:
        return os.pread(self._file.fileno(), size, offset)


class Window(Source):
    '''@size bytes of another source, from @start on.'''

    def __init__(self, source: Source, start: int, size: int) -> None:
        super().__init__(max(0, min(size, source.size - start)),
                         source.origin + start)
        self.source = source
        self.start = start

    def read(self, offset: int, size: int) -> bytes:
        size = min(size, self.size - offset)
        return self.source.read(self.start + offset, size) if size > 0 else b''


# A member's field, as it is compared and shown
Value = object


@dataclass(frozen=True)
class Member:
    '''
    A file, folder or link in a file system or an archive.

    @params path: absolute, with /
    @params kind: file, folder, link, device, fifo, socket
    @params fields: what it has beside its content, in the order in which to
        tell differences
    @params load: reads its content, if it is a file; raises Malformed
    '''
    path: str
    kind: str
    fields: Mapping[str, Value]
    load: Optional[Callable[[], bytes]] = field(default=None, compare=False)


KINDS = {0o10: 'file', 0o4: 'folder', 0o12: 'link', 0o2: 'device',
         0o6: 'device', 0o1: 'fifo', 0o14: 'socket'}


def kind_of(mode: int) -> str:
    '''The kind of a member by the mode that stat() has for it.'''
    return KINDS.get(mode >> 12, 'unknown')


# Name, offset, struct format
Layout = Tuple[Tuple[str, int, str], ...]


def unpack(layout: Layout, data: bytes,
           order: str = '<') -> Dict[str, Value]:
    '''The fields that @layout names in @data; those past its end are left.'''
    found: Dict[str, Value] = {}
    for name, offset, form in layout:
        if offset + struct.calcsize(order + form) <= len(data):
            values = struct.unpack_from(order + form, data, offset)
            found[name] = values[0] if len(values) == 1 else values
    return found


def number(fields: Mapping[str, Value], name: str) -> int:
    '''A field that is a number, 0 if it is not there.'''
    value = fields.get(name, 0)
    return value if isinstance(value, int) else 0


def _crc32c_table() -> Tuple[int, ...]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0x82f63b78 if value & 1 else 0)
        table.append(value)
    return tuple(table)


_CRC32C = _crc32c_table()


def crc32c(seed: int, data: bytes) -> int:
    '''CRC-32C without the final inversion, as file systems keep it.'''
    table = _CRC32C
    for byte in data:
        seed = seed >> 8 ^ table[(seed ^ byte) & 0xff]
    return seed
