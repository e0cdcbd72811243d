# SPDX-License-Identifier: GPL-2.0-or-later
'''
Archives and what is alike: compressed data, cpio (newc, several in a row,
compressed or not, as the kernel takes them), ar and with it deb, and the
sections of EFI programs (PE), which a unified kernel image is one of.

zstd has no reader in Python's library: its program is called, that of the
host, or else that of a tools tree.
'''

import bz2
import lzma
import re
import shutil
import struct
import tempfile
import zlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Optional, Tuple

from . import command, sandbox
from .error import HostError
from .reading import (MAX_FILE, Layout, Malformed, Member, Value, kind_of,
                      number, unpack)

MAGICS = {'gzip': b'\x1f\x8b', 'zstd': b'\x28\xb5\x2f\xfd',
          'xz': b'\xfd7zXZ\0', 'bzip2': b'BZh'}
CPIO = b'070701'
AR = b'!<arch>\n'
_TRAILER = 'TRAILER!!!'


# -- Compression ------------------------------------------------------------

def compression(data: bytes) -> Optional[str]:
    '''By what @data, of which the beginning is enough, is compressed.'''
    return next((name for name, magic in MAGICS.items()
                 if data.startswith(magic)), None)


def decompress(data: bytes, tree: Optional[Path] = None) -> bytes:
    '''
    What is compressed in @data; zstd by the program in the tools @tree
    where the host has none. Raises Malformed, HostError where there is no
    program.
    '''
    kind = compression(data)
    try:
        if kind is not None and kind in _STREAMS:
            return _unpack(data, kind)
    except (zlib.error, lzma.LZMAError, OSError, ValueError, EOFError) as e:
        raise Malformed(f'{kind} data', None, 'a whole stream',
                        str(e)) from e
    if kind == 'zstd':
        return _unzstd(data, tree)
    raise Malformed('compressed data', 0, ', '.join(MAGICS),
                    data[:6].hex() or 'nothing')


_STREAMS: Mapping[str, Callable[[], Any]] = {
    'gzip': lambda: zlib.decompressobj(31), 'xz': lzma.LZMADecompressor,
    'bzip2': bz2.BZ2Decompressor}


def _unpack(data: bytes, kind: str) -> bytes:
    parts: List[bytes] = []
    left = MAX_FILE
    while data:
        if parts and kind != 'gzip' and compression(data) != kind:
            # Of these two, the programs ignore what follows
            break
        stream = _STREAMS[kind]()
        parts.append(stream.decompress(data, left + 1))
        left -= len(parts[-1])
        if left < 0:
            raise ValueError(f'more than {MAX_FILE} bytes')
        if not stream.eof:
            raise EOFError('the end of the data before that of the stream')
        # gzip itself takes zeros at the end for padding
        data = stream.unused_data.lstrip(b'\0')
    return b''.join(parts)


def _unzstd(data: bytes, tree: Optional[Path]) -> bytes:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / 'in').write_bytes(data)
        if shutil.which('zstd'):
            result = command.run(['zstd', '-dqf', str(folder / 'in'), '-o',
                                  str(folder / 'out')])
            status, said = result.returncode, result.stderr
        elif tree is not None:
            log = folder / 'log'
            status = sandbox.run(tree, ['zstd', '-dqf', 'in', '-o', 'out'],
                                 folder, log)
            said = log.read_text(errors='replace')
        else:
            raise HostError('program not found: zstd',
                            next_step='apt-get install zstd')
        if status:
            raise Malformed('zstd data', None, 'a whole stream',
                            said.strip().split(' : ')[-1] or 'another')
        return (folder / 'out').read_bytes()


def stream_fields(data: bytes) -> Dict[str, Value]:
    '''What the header of compressed @data says beside its content.'''
    kind = compression(data)
    fields: Dict[str, Value] = {'compression': kind}
    if kind == 'gzip' and len(data) >= 10:
        flags = data[3]
        fields['time'] = int.from_bytes(data[4:8], 'little')
        rest = data[10:]
        if flags & 4:
            rest = rest[2 + int.from_bytes(rest[:2], 'little'):]
        if flags & 8:
            fields['name'] = rest.split(b'\0')[0].decode('latin-1')
        fields['level'] = data[8]
        fields['system'] = data[9]
    return fields


# -- cpio -------------------------------------------------------------------

_CPIO = ('inode', 'mode', 'owner', 'group', 'links', 'mtime', 'size',
         'device major', 'device minor', 'special major', 'special minor',
         'name size', 'check')


@dataclass(frozen=True)
class Segment:
    '''
    One cpio archive of a row: @packed is how it is in the file, @plain
    what the kernel unpacks. @order has its members in order.
    '''
    offset: int
    packed: bytes
    plain: bytes
    order: Tuple[Member, ...]


def segments(data: bytes, tree: Optional[Path] = None) -> List[Segment]:
    '''
    The cpio archives in @data, one after another: plain, such as early
    ones with microcode, and at last a compressed one. Raises Malformed,
    and HostError as decompress() does.
    '''
    found: List[Segment] = []
    offset = 0
    while offset < len(data):
        if data.startswith(CPIO, offset):
            members, end = _members(data, offset)
            plain = data[offset:end]
            found.append(Segment(offset, plain, plain, tuple(members)))
        else:
            end = len(data)
            plain = decompress(data[offset:], tree)
            members, last = _members(plain, 0)
            if plain[last:].strip(b'\0'):
                members += [m for s in segments(plain[last:], tree)
                            for m in s.order]
            found.append(Segment(offset, data[offset:], plain,
                                 tuple(members)))
        while end < len(data) and data[end] == 0:
            end += 1
        offset = end
    if not found:
        raise Malformed('cpio archive', 0, CPIO.decode(), 'nothing')
    return found


def _members(data: bytes, offset: int) -> Tuple[List[Member], int]:
    found: List[Member] = []
    while True:
        head = data[offset:offset + 110]
        place = f'cpio header {len(found)}'
        try:
            # int() takes signs and spaces, too
            if not re.fullmatch(CPIO + rb'[0-9A-Fa-f]{104}', head):
                raise ValueError
            values = [int(head[6 + 8 * i:14 + 8 * i], 16) for i in range(13)]
        except ValueError:
            raise Malformed(place, offset, CPIO.decode(),
                            repr(head[:6])[1:]) from None
        fields = dict(zip(_CPIO, values))
        start = offset + 110
        name = data[start:start + fields['name size']].rstrip(b'\0').decode(
            'utf-8', 'backslashreplace')
        body = (start + fields['name size'] + 3) // 4 * 4
        end = body + fields['size']
        if end > len(data) or not fields['name size']:
            raise Malformed(place, offset, f'{fields["size"]} bytes',
                            'the end of the data')
        if name == _TRAILER:
            return found, end
        found.append(_member(name, fields, data[body:end]))
        offset = (end + 3) // 4 * 4


def _member(name: str, values: Dict[str, int], content: bytes) -> Member:
    kind = kind_of(values['mode'])
    fields: Dict[str, Value] = {
        'mode': f'{values["mode"] & 0o7777:04o}',
        **{key: values[key] for key in
           ('owner', 'group', 'mtime', 'inode', 'links', 'device major',
            'device minor', 'special major', 'special minor')}}
    if kind == 'link':
        fields['target'] = content.decode('utf-8', 'backslashreplace')
    path = '/' + (name[2:] if name.startswith('./') else name.lstrip('/'))
    return Member(path, kind, fields,
                  (lambda: content) if kind == 'file' else None)


# -- ar ---------------------------------------------------------------------

def ar(data: bytes) -> List[Member]:
    '''The members of an ar archive, which a deb is too. Raises Malformed.'''
    if not data.startswith(AR):
        raise Malformed('ar archive', 0, repr(AR.decode()), repr(data[:8]))
    found: List[Member] = []
    offset = len(AR)
    while offset < len(data):
        head = data[offset:offset + 60]
        try:
            size = int(head[48:58])
            if head[58:] != b'`\n' or size < 0:
                raise ValueError
        except ValueError:
            raise Malformed(f'ar header {len(found)}', offset,
                            'a header', repr(head[-2:])) from None
        content = data[offset + 60:offset + 60 + size]
        name = head[:16].decode('latin-1').rstrip(' /')
        fields: Dict[str, Value] = {
            'mtime': head[16:28].decode('latin-1').strip(),
            'owner': head[28:34].decode('latin-1').strip(),
            'group': head[34:40].decode('latin-1').strip(),
            'mode': head[40:48].decode('latin-1').strip()}
        found.append(Member(f'/{name}', 'file', fields,
                            partial(bytes, content)))
        offset += 60 + size + size % 2
    return found


# -- EFI programs -----------------------------------------------------------

_COFF: Layout = (
    ('machine', 0, 'H'), ('sections', 2, 'H'), ('time', 4, 'I'),
    ('optional header size', 16, 'H'), ('characteristics', 18, 'H'))
_OPTIONAL: Layout = (
    ('format', 0, 'H'), ('entry point', 16, 'I'), ('image version', 44, 'I'),
    ('image size', 56, 'I'), ('checksum', 64, 'I'), ('subsystem', 68, 'H'))
MACHINES = {'x86_64': 0x8664, 'aarch64': 0xaa64}


@dataclass(frozen=True)
class Section:
    '''A section: its bytes as they are loaded, without the padding.'''
    name: str
    offset: int
    address: int
    data: bytes


@dataclass(frozen=True)
class Program:
    '''An EFI program: fields of its headers, the offset of each, sections.'''
    fields: Dict[str, Value]
    offsets: Dict[str, int]
    sections: Tuple[Section, ...]

    def section(self, name: str) -> Optional[Section]:
        '''The first section called @name.'''
        return next((s for s in self.sections if s.name == name), None)


def program(data: bytes) -> Program:
    '''The EFI program in @data. Raises Malformed.'''
    if data[:2] != b'MZ' or len(data) < 64:
        raise Malformed('PE file, DOS header', 0, "'MZ'", repr(data[:2])[1:])
    start = int.from_bytes(data[60:64], 'little')
    if data[start:start + 4] != b'PE\0\0':
        raise Malformed('PE file, signature', start, "'PE\\0\\0'",
                        repr(data[start:start + 4])[1:])
    coff = start + 4
    fields = unpack(_COFF, data[coff:coff + 20])
    size = number(fields, 'optional header size')
    optional = unpack(_OPTIONAL, data[coff + 20:coff + 20 + size])
    offsets = {**{n: coff + o for n, o, _ in _COFF},
               **{n: coff + 20 + o for n, o, _ in _OPTIONAL}}
    if optional.get('format') not in (0x10b, 0x20b):
        raise Malformed('PE file, optional header', coff + 20, '0x20b',
                        f'{number(optional, "format"):#x}')
    table = coff + 20 + size
    return Program({**fields, **optional}, offsets, tuple(
        _section(data, table + 40 * index)
        for index in range(number(fields, 'sections'))))


def _section(data: bytes, at: int) -> Section:
    head = data[at:at + 40]
    if len(head) < 40:
        raise Malformed('PE file, section table', at, '40 bytes',
                        'the end of the data')
    virtual, address, length, place = struct.unpack_from('<IIII', head, 8)
    name = head[:8].rstrip(b'\0').decode('latin-1')
    if place + length > len(data):
        raise Malformed(f'PE file, section {name}', at + 16,
                        f'at most {len(data)} bytes',
                        f'{length} from {place} on')
    return Section(name, at, address,
                   data[place:place + min(length, virtual or length)])
