# SPDX-License-Identifier: GPL-2.0-or-later
'''
What differs between two things of one form: bytes, the fields of a header,
the members of a file system or an archive.
'''

import re
from dataclasses import dataclass, field
from typing import (Callable, Collection, Dict, List, Mapping, Optional,
                    Sequence, Tuple)

from .reading import CHUNK, Malformed, Member, Source, Value

# How much of a content goes into a finding, and into a message
MAX_DATA = 1 << 24
SHORT = 100


@dataclass(frozen=True)
class Finding:
    '''
    One difference.

    @params layers: what contains it, from the outermost inwards: forms,
        and the files and sections between them; the last is a form
    @params path: the file that differs in there, empty if it is not in one
    @params aspect: what of it: "content", "presence", "name", "order",
        "compression", "layout", "format", else the name of a field
    @params data: both contents, where these differ
    @params note: why it was not looked into any further
    '''
    layers: Tuple[str, ...]
    path: str
    aspect: str
    before: str
    after: str
    data: Optional[Tuple[bytes, bytes]] = field(default=None, compare=False,
                                                repr=False)
    note: str = ''

    @property
    def form(self) -> str:
        '''The form of what contains it, such as ext4.'''
        return self.layers[-1] if self.layers else ''


# Compares two contents: the layers around them, the path, both
Descend = Callable[[Tuple[str, ...], str, bytes, bytes], List[Finding]]


def first_difference(before: Source, after: Source) -> Optional[int]:
    '''The offset of the first byte that differs, None if none does.'''
    size = min(before.size, after.size)
    for start in range(0, size, CHUNK):
        length = min(CHUNK, size - start)
        one, other = before.read(start, length), after.read(start, length)
        if one != other:
            return start + _first(one, other)
    return None if before.size == after.size else size


def _first(one: bytes, other: bytes) -> int:
    '''The index of the first byte that differs, or the shorter's length.'''
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[:middle] == other[:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def short(value: Value) -> str:
    '''A value as it is told.'''
    if isinstance(value, bytes):
        plain = value.rstrip(b'\0')
        printable = plain and all(32 <= byte < 127 for byte in plain)
        text = plain.decode() if printable else value.hex()
    elif isinstance(value, tuple):
        text = ', '.join(short(item) if not isinstance(item, tuple)
                         else '='.join(short(part) for part in item)
                         for item in value) or 'none'
    else:
        text = str(value)
    return text if len(text) <= SHORT else text[:SHORT - 3] + '...'


def is_text(data: bytes) -> bool:
    '''Whether @data is text for a person.'''
    if b'\0' in data:
        return False
    try:
        data.decode('utf-8')
    except UnicodeDecodeError:
        return False
    return True


def excerpts(one: bytes, other: bytes) -> Tuple[str, str]:
    '''Both contents from where they begin to differ, short.'''
    at = _first(one, other)
    if is_text(one[:CHUNK]) and is_text(other[:CHUNK]) and at < CHUNK:
        number = one.count(b'\n', 0, at) + 1
        return _line(one, at, number), _line(other, at, number)
    return (_bytes(one, at), _bytes(other, at))


def _line(data: bytes, at: int, number: int) -> str:
    start = data.rfind(b'\n', 0, at) + 1
    if start >= len(data):
        return 'the end' if data else 'nothing'
    end = data.find(b'\n', start)
    line = data[start:end if end >= 0 else len(data)]
    return f'line {number}: ' + short(line.decode('utf-8', 'replace'))


def _bytes(data: bytes, at: int) -> str:
    if at >= len(data):
        return f'the end, at {len(data)}'
    return f'at {at}: {data[at:at + 16].hex()}'


def compare_bytes(layers: Tuple[str, ...], path: str, before: Source,
                  after: Source, note: str = '') -> List[Finding]:
    '''The difference of two contents that have no known structure.'''
    at = first_difference(before, after)
    if at is None:
        return []
    if max(before.size, after.size) <= MAX_DATA:
        data = before.read(0, before.size), after.read(0, after.size)
        told = excerpts(*data)
        return [Finding(layers, path, 'content', *told, data, note)]
    data = before.read(at, 16), after.read(at, 16)
    return [Finding(layers, path, 'content', f'at {at}: {data[0].hex()}',
                    f'at {at}: {data[1].hex()}', None, note)]


def compare_fields(layers: Tuple[str, ...], path: str,
                   before: Mapping[str, Value], after: Mapping[str, Value],
                   without: Collection[str] = ()) -> List[Finding]:
    '''The fields that differ, in order, but for those @without meaning.'''
    names = list(before) + [name for name in after if name not in before]
    return [Finding(layers, path, name, short(before.get(name, 'none')),
                    short(after.get(name, 'none')))
            for name in names
            if name not in without and before.get(name) != after.get(name)]


# -- Members ----------------------------------------------------------------

def compare_members(layers: Tuple[str, ...], before: Sequence[Member],
                    after: Sequence[Member],
                    descend: Descend) -> List[Finding]:
    '''
    What differs between the members of two file systems or archives: which
    there are, what is in them, their fields, their order.
    '''
    ones = {member.path: member for member in before}
    others = {member.path: member for member in after}
    found = _presence(layers, ones, others)
    for path, one in ones.items():
        if path in others:
            found += _compare_member(layers, one, others[path], descend)
    return found + _order(layers, [path for path in ones if path in others],
                          [path for path in others if path in ones])


def _compare_member(layers: Tuple[str, ...], one: Member, other: Member,
                    descend: Descend) -> List[Finding]:
    if one.kind != other.kind:
        return [Finding(layers, one.path, 'kind', one.kind, other.kind)]
    found: List[Finding] = []
    if one.load and other.load:
        try:
            data = one.load(), other.load()
            if data[0] != data[1]:
                found += descend(layers, one.path, *data)
        except Malformed as e:
            found.append(Finding(layers, one.path, 'content', 'unreadable',
                                 'unreadable', None, str(e.problem)))
    # Others are in another order as well
    follows = ([] if one.fields.get('attributes')
               == other.fields.get('attributes') else ['attribute order'])
    return found + compare_fields(layers, one.path, one.fields, other.fields,
                                  follows)


def _content(member: Member) -> Optional[bytes]:
    try:
        return member.load() if member.load else None
    except Malformed:
        return None


def _parent(path: str) -> str:
    return path.rpartition('/')[0] or '/'


def _presence(layers: Tuple[str, ...], ones: Mapping[str, Member],
              others: Mapping[str, Member]) -> List[Finding]:
    '''
    Members that only one side has. Two of them that are alike but for the
    name are one that was given another name.
    '''
    found = []
    gone = [member for path, member in ones.items() if path not in others]
    new = [member for path, member in others.items() if path not in ones]
    renamed: Dict[str, str] = {}
    for member in gone:
        if _parent(member.path) in renamed or any(
                member.path.startswith(path + '/') for path in renamed):
            continue
        twin = next((m for m in new if m.path not in renamed.values()
                     and _alike(member, m)), None)
        if twin:
            renamed[member.path] = twin.path
            found.append(Finding(layers, member.path, 'name', member.path,
                                 twin.path))
        else:
            found.append(Finding(layers, member.path, 'presence',
                                 f'{member.kind} there', 'missing'))
    inside = tuple(path + '/' for path in renamed.values())
    return found + [Finding(layers, member.path, 'presence', 'missing',
                            f'{member.kind} there')
                    for member in new
                    if member.path not in renamed.values()
                    and not member.path.startswith(inside or ('\0',))]


def _alike(one: Member, other: Member) -> bool:
    '''Whether @one may be @other under a name that was drawn anew.'''
    if (one.kind != other.kind or _parent(one.path) != _parent(other.path)):
        return False
    if one.kind == 'file' and _content(one) != _content(other):
        return False
    names = [m.path.rpartition('/')[2] for m in (one, other)]
    # As mktemp fills in Xs: others of the same length in one place
    start = _first(names[0].encode(), names[1].encode())
    end = _first(names[0][:start:-1].encode(), names[1][:start:-1].encode())
    drawn = [name[start:len(name) - end] for name in names]
    return (len(names[0]) == len(names[1]) and len(drawn[0]) >= 3
            and all(re.fullmatch(r'\w+', text) for text in drawn))


def _order(layers: Tuple[str, ...], before: Sequence[str],
           after: Sequence[str]) -> List[Finding]:
    for index, (one, other) in enumerate(zip(before, after)):
        if one != other:
            return [Finding(layers, _parent(one), 'order',
                            _names(before[index:index + 4]),
                            _names(after[index:index + 4]))]
    return []


def _names(paths: Sequence[str]) -> str:
    return short(', '.join(path.rpartition('/')[2] for path in paths))
