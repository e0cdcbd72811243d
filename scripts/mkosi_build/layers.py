# SPDX-License-Identifier: GPL-2.0-or-later
'''
From two files that differ down to what differs in them, layer by layer:
qcow2, GPT, ext4 or FAT, file, EFI program, cpio, compressed data.

A difference that follows from another, such as a checksum, is told only
where nothing else differs.
'''

from pathlib import Path
from typing import Callable, Dict, List, Optional, Tuple

from . import archives, gpt, qcow2
from .compare import (Finding, compare_bytes, compare_fields,
                      compare_members, first_difference)
from .error import HostError
from .ext4 import MAGIC as EXT4, TIMES, Ext4
from .fat import Fat
from .reading import Bytes, Layout, Malformed, Source, Value, unpack

Layers = Tuple[str, ...]

# What follows from the rest of a superblock
_FOLLOWS = ('checksum', 'checksum seed', 'free blocks', 'free inodes',
            'written', 'overhead')
_MAX_LAYERS = 24

_EROFS: Layout = (
    ('build time', 0x18, 'Q'), ('build time, fraction', 0x20, 'I'),
    ('UUID', 0x30, '16s'), ('label', 0x40, '16s'), ('inodes', 0x10, 'Q'),
    ('blocks', 0x24, 'I'))
_MAGICS = (('qcow2', 0, qcow2.MAGIC), ('GPT', 512, gpt.SIGNATURE),
           ('GPT', 4096, gpt.SIGNATURE),
           ('ext4', 1024 + 0x38, EXT4.to_bytes(2, 'little')),
           ('erofs', 1024, 0xe0f5e1e2.to_bytes(4, 'little')),
           ('btrfs', 0x10040, b'_BHRfS_M'), ('squashfs', 0, b'hsqs'),
           ('FAT', 82, b'FAT32'), ('FAT', 54, b'FAT1'),
           ('cpio', 0, archives.CPIO), ('ar', 0, archives.AR))


def form_of(source: Source) -> str:
    '''The form of what is in @source: "data" if it is none of the known.'''
    head = source.read(0, 4096)
    for name, offset, magic in _MAGICS:
        if source.read(offset, len(magic)) == magic:
            # Two bytes may be there by chance
            if name != 'ext4' or head[1024 + 0x18:1024 + 0x1c] < b'\7':
                return name
    kind = archives.compression(head)
    if kind:
        return kind
    if head[:2] == b'MZ':
        start = int.from_bytes(head[60:64], 'little')
        if source.read(start, 4) == b'PE\0\0':
            return 'PE'
    return 'data'


class Descent:
    '''
    Compares layer by layer; zstd by the tools @tree where the host has no
    program for it.
    '''

    def __init__(self, tree: Optional[Path] = None) -> None:
        self.tree = tree
        self.forms: Dict[str, Callable[[Layers, str, Source, Source],
                                       List[Finding]]] = {
            'qcow2': self._qcow2, 'GPT': self._gpt, 'ext4': self._ext4,
            'FAT': self._fat, 'erofs': self._erofs, 'PE': self._pe,
            'cpio': self._cpio, 'ar': self._ar,
            **{name: self._stream for name in archives.MAGICS}}

    def descend(self, layers: Layers, path: str, before: Source,
                after: Source) -> List[Finding]:
        '''
        What differs between two contents of @path in @layers; nothing if
        they are the same.
        '''
        at = first_difference(before, after)
        if at is None:
            return []
        forms = form_of(before), form_of(after)
        compare = self.forms.get(forms[0])
        if (compare is None or forms[0] != forms[1]
                or len(layers) > _MAX_LAYERS):
            if forms[0] == forms[1] and forms[0] != 'data':
                layers = (*layers, *([path] if path else []), forms[0])
                path = ''
            return compare_bytes(layers, path, before, after)
        inner = (*layers, *([path] if path else []), forms[0])
        try:
            found = compare(inner, path, before, after)
        except (Malformed, HostError) as e:
            return compare_bytes(layers, path, before, after,
                                 f'not read as {forms[0]}: {e.message}')
        return found or [Finding(inner, '', 'layout',
                                 f'at {at}: {before.read(at, 16).hex()}',
                                 f'at {at}: {after.read(at, 16).hex()}')]

    def _content(self, layers: Layers, path: str, before: bytes,
                 after: bytes) -> List[Finding]:
        return self.descend(layers, path, Bytes(before), Bytes(after))

    # -- Disks --------------------------------------------------------------

    def _qcow2(self, layers: Layers, _path: str, before: Source,
               after: Source) -> List[Finding]:
        one, other = qcow2.Qcow2(before), qcow2.Qcow2(after)
        found = compare_fields(
            layers, '', one.header, other.header,
            ('L1 table', 'refcount table', 'refcount table clusters',
             'L1 size'))
        found += self.descend(layers, '', one, other)
        return found or self._clusters(layers, one, other)

    @staticmethod
    def _clusters(layers: Layers, one: qcow2.Qcow2,
                  other: qcow2.Qcow2) -> List[Finding]:
        '''Of two disks that are the same to a guest, how they are kept.'''
        for index in range(-(-one.size // one.cluster)):
            entries = one.entry(index), other.entry(index)
            place = f'guest offset {index * one.cluster}: L2 entry'
            if entries[0] != entries[1]:
                # Where data lie, or how long they are
                return [Finding(layers, '', 'layout',
                                f'{place} {entries[0]:#x}',
                                f'{place} {entries[1]:#x}')]
        return [Finding(layers, '', 'compression', 'the same data',
                        'compressed to other bytes')]

    def _gpt(self, layers: Layers, _path: str, before: Source,
             after: Source) -> List[Finding]:
        tables = gpt.read_any(before), gpt.read_any(after)
        found = compare_fields(layers, '', {'disk GUID': tables[0].disk},
                               {'disk GUID': tables[1].disk})
        ones, others = ({p.number: p for p in table.partitions}
                        for table in tables)
        for number in sorted({*ones, *others}):
            one, other = ones.get(number), others.get(number)
            if one is None or other is None:
                found.append(Finding(layers, '', 'partition',
                                     str(one or 'none'),
                                     str(other or 'none')))
                continue
            found += compare_fields(
                (*layers[:-1], f'GPT {one}'), '',
                *({'type': p.type, 'GUID': p.guid, 'label': p.label,
                   'first sector': p.first, 'last sector': p.last,
                   'attributes': p.attributes} for p in (one, other)))
            found += self.descend(
                (*layers[:-1], f'GPT {one}'), '',
                tables[0].window(before, one),
                tables[1].window(after, other))
        return found

    def _ext4(self, layers: Layers, _path: str, before: Source,
              after: Source) -> List[Finding]:
        one, other = Ext4(before), Ext4(after)
        # That of both copies, and of the journal, is one
        found = compare_fields(layers, '', _superblock(one),
                               _superblock(other), _FOLLOWS)
        members = compare_members(layers, list(one.members()),
                                  list(other.members()), self._content)
        if any(f.aspect == 'directory hash seed' for f in found):
            # It decides the order
            members = [f for f in members if f.aspect != 'order']
        found += members
        if found:
            return found
        at = first_difference(before, after) or 0
        place = f'at {at}, in {one.what_is_at(at)}:'
        return (compare_fields(layers, '', one.superblock, other.superblock,
                               ('checksum',))
                or compare_fields(layers, '', one.superblock,
                                  other.superblock)) or [
            Finding(layers, '', 'layout',
                    f'{place} {before.read(at, 16).hex()}',
                    f'{place} {after.read(at, 16).hex()}')]

    def _fat(self, layers: Layers, _path: str, before: Source,
             after: Source) -> List[Finding]:
        one, other = Fat(before), Fat(after)
        return (compare_fields(layers, '', one.boot, other.boot)
                + compare_members(layers, list(one.members()),
                                  list(other.members()), self._content))

    @staticmethod
    def _erofs(layers: Layers, path: str, before: Source,
               after: Source) -> List[Finding]:
        return (compare_fields(layers, '', *(
            unpack(_EROFS, source.take(1024, 128, 'erofs superblock'))
            for source in (before, after)))
            or compare_bytes(layers, path, before, after))

    # -- Files --------------------------------------------------------------

    def _pe(self, layers: Layers, _path: str, before: Source,
            after: Source) -> List[Finding]:
        one, other = (archives.program(source.whole('PE file'))
                      for source in (before, after))
        found = compare_fields(layers, '', one.fields, other.fields,
                               ('checksum', 'image size', 'sections'))
        names = tuple(tuple(s.name for s in p.sections)
                      for p in (one, other))
        found += compare_fields(layers, '', {'section names': names[0]},
                                {'section names': names[1]})
        for section in one.sections:
            twin = other.section(section.name)
            if twin and names[0].count(section.name) == 1:
                found += self.descend(
                    layers, f'section {section.name}', Bytes(section.data),
                    Bytes(twin.data))
        return found or compare_fields(layers, '', one.fields, other.fields)

    def _cpio(self, layers: Layers, _path: str, before: Source,
              after: Source) -> List[Finding]:
        ones, others = (archives.segments(s.whole('cpio archive'), self.tree)
                        for s in (before, after))
        found: List[Finding] = []
        if len(ones) != len(others):
            found.append(Finding(layers, '', 'archives in a row',
                                 f'{len(ones)}', f'{len(others)}'))
        for one, other in zip(ones, others):
            if one.packed == other.packed:
                continue
            kinds = [archives.compression(s.packed) for s in (one, other)]
            place = (layers if kinds[0] is None
                     else (*layers[:-1], f'cpio ({kinds[0]})'))
            more = self._packed(place, one.packed, other.packed)
            if one.plain == other.plain:
                more = more or [_recompressed(place)]
            else:
                more += _unnumbered(compare_members(
                    place, one.order, other.order, self._content))
            found += more
        return found

    @staticmethod
    def _packed(layers: Layers, one: bytes, other: bytes) -> List[Finding]:
        return compare_fields(layers, '', archives.stream_fields(one),
                              archives.stream_fields(other))

    def _stream(self, layers: Layers, path: str, before: Source,
                after: Source) -> List[Finding]:
        one, other = (s.whole('compressed data') for s in (before, after))
        plain = [archives.decompress(data, self.tree)
                 for data in (one, other)]
        if all(data.startswith(archives.CPIO) for data in plain):
            return self._cpio((*layers[:-1], 'cpio'), path, before, after)
        found = self._packed(layers, one, other)
        if plain[0] == plain[1]:
            return found or [_recompressed(layers)]
        # Of one file, it is its content
        return found + self.descend(layers, '', Bytes(plain[0]),
                                    Bytes(plain[1]))

    def _ar(self, layers: Layers, _path: str, before: Source,
            after: Source) -> List[Finding]:
        ones, others = (archives.ar(s.whole('ar archive'))
                        for s in (before, after))
        return compare_members(layers, ones, others, self._content)


def _unnumbered(found: List[Finding]) -> List[Finding]:
    '''
    Without inode numbers that cpio --reproducible gives by order, where
    the order or what is there is another.
    '''
    if any(f.aspect in ('order', 'presence', 'name') for f in found):
        return [f for f in found if f.aspect != 'inode']
    return found


def _recompressed(layers: Layers) -> Finding:
    return Finding(layers, '', 'compression', 'the same data',
                   'compressed to other bytes')


def _superblock(system: Ext4) -> Dict[str, Value]:
    '''The fields of a superblock, times shown as such.'''
    return {name: f'{value} s' if name in TIMES else value
            for name, value in system.superblock.items()}
