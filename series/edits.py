# SPDX-License-Identifier: GPL-2.0-or-later
'''
Anchored edits: our text, and a pattern that says where it goes.

An edit applies only if its pattern matches exactly as often as it says;
anything else is an error, never a guess.  Pure text to text: no tree is
read or written here.
'''

from dataclasses import dataclass, replace
import difflib
from pathlib import Path
import re
from typing import (Any, Iterable, List, Mapping, Optional, Sequence,
                    Tuple, Union)

import yaml

from .error import SeriesError


PLACES = ('before', 'after', 'replace')
LAYOUTS = ('folders', 'flat')
MAINTAINERS = 'MAINTAINERS'
_PATCH = ('subject', 'message', 'files', 'maintainers', 'layout', 'edits',
          'later')
EDITS = Path(__file__).with_name('edits.yaml')


class AnchorError(SeriesError):
    '''A pattern did not match its file as often as it must.'''


@dataclass(frozen=True)
class Edit:
    '''
    One change to one file of QEMU.

    @place 'before' and 'after' put @text on lines of its own beside the
    matched line; 'replace' puts it in place of the match, where \\1 and
    the like stand for the pattern's groups.
    @layout and @since limit the edit to QEMU trees of that layout, and to
    those of that version or newer, if given.
    '''
    file: str
    pattern: str
    place: str
    text: str
    count: int = 1
    layout: Optional[str] = None
    since: Tuple[int, ...] = ()


@dataclass(frozen=True)
class Later:
    '''
    Lines of a file of ours that come with a later patch than the file.

    They are the whole lines that a match of @pattern touches; until then
    the text @until stands in their place.
    '''
    file: str
    pattern: str
    count: int = 1
    until: str = ''


@dataclass(frozen=True)
class Patch:
    '''
    One commit of the series, unless it is @private and its edits only
    serve the harness.

    @message is the commit's text below its @subject.  @files are those of
    this repository that it adds: paths, or folders that end in a slash.
    @later are the lines that it adds to files of patches before it.
    '''
    subject: str
    edits: Tuple[Edit, ...]
    private: bool = False
    message: str = ''
    files: Tuple[str, ...] = ()
    later: Tuple[Later, ...] = ()


@dataclass(frozen=True)
class Letter:
    '''What goes before the patches.'''
    subject: str
    text: str


@dataclass(frozen=True)
class Part:
    '''What is sent as one: a letter and patches, on the parts before.'''
    name: str
    letter: Letter
    patches: Tuple[Patch, ...]


def version(text: str) -> Tuple[int, ...]:
    '''QEMU's version @text, '11.1.1', in a form that compares.'''
    return tuple(map(int, re.findall(r'\d+', text)))


def _edit(where: str, layout: Optional[str],
          raw: Mapping[str, Any]) -> Edit:
    places = [place for place in PLACES if place in raw]
    unknown = set(raw) - {'file', 'match', 'count', 'layout', 'since',
                          *PLACES}
    if len(places) != 1 or unknown or not {'file', 'match'} <= set(raw):
        raise SeriesError(
            f'{where}: an edit has file, match and one of '
            f'{", ".join(PLACES)}; found {", ".join(map(str, raw))}')
    layout = raw.get('layout', layout)
    if layout not in (None, *LAYOUTS):
        raise SeriesError(f'{where}: layout is one of {", ".join(LAYOUTS)}; '
                          f'found {layout}')
    return Edit(file=raw['file'], pattern=raw['match'], place=places[0],
                text=raw[places[0]], count=raw.get('count', 1),
                layout=layout,
                since=version(str(raw.get('since', ''))))


class _Section:
    '''The section of MAINTAINERS that the series adds, line by line.'''

    def __init__(self, raw: Mapping[str, Any]) -> None:
        self.before: str = raw['before']
        self.head: str = raw['section']
        self.last: Optional[str] = None

    def edit(self, lines: Sequence[str]) -> Edit:
        '''The edit that adds @lines below those of the patches before.'''
        last, self.last = self.last, lines[-1]
        if last is None:
            text = self.head + '\n'.join(lines) + '\n\n'
            return Edit(MAINTAINERS, self.before, 'replace',
                        text.replace('\\', r'\\') + r'\g<0>')
        return Edit(MAINTAINERS, f'^{re.escape(last)}$', 'after',
                    '\n'.join(lines))


def _later(where: str, raw: Mapping[str, Any]) -> Later:
    if not {'file', 'match'} <= set(raw) <= {'file', 'match', 'count',
                                             'until'}:
        raise SeriesError(f'{where}: lines for later have file, match, count '
                          f'and until; found {", ".join(map(str, raw))}')
    return Later(raw['file'], raw['match'], raw.get('count', 1),
                 raw.get('until', ''))


def _patch(where: str, raw: Mapping[str, Any],
           section: Optional[_Section]) -> Patch:
    if 'subject' not in raw or set(raw) - set(_PATCH):
        raise SeriesError(f'{where}: a patch has {", ".join(_PATCH)}; found '
                          f'{", ".join(map(str, raw))}')
    where = f'{where}: {raw["subject"]}'
    made = [_edit(where, raw.get('layout'), edit)
            for edit in raw.get('edits', ())]
    if 'maintainers' in raw:
        if section is None:
            raise SeriesError(f'{where}: has maintainers: expected the key '
                              'maintainers of the whole file too, found none')
        made.append(section.edit(raw['maintainers']))
    return Patch(raw['subject'], tuple(made),
                 message=raw.get('message', ''),
                 files=tuple(raw.get('files', ())),
                 later=tuple(_later(where, lines)
                             for lines in raw.get('later', ())))


def _harness(where: str, raw: Mapping[str, Any]) -> Patch:
    if not {'subject', 'edits'} <= set(raw) <= {'subject', 'edits', 'layout'}:
        raise SeriesError(f'{where}: a patch of the harness has subject, '
                          f'layout and edits; found '
                          f'{", ".join(map(str, raw))}')
    return replace(_patch(where, raw, None), private=True)


def _part(where: str, number: int, raw: Mapping[str, Any],
          section: Optional[_Section]) -> Part:
    if set(raw) != {'name', 'cover', 'patches'} \
            or set(raw['cover']) != {'subject', 'letter'}:
        raise SeriesError(f'{where}: a part has name, cover (subject and '
                          'letter) and patches; found '
                          f'{", ".join(map(str, raw))}')
    name = str(raw['name'])
    # They are folders, whose order is that of the parts
    if not re.fullmatch(rf'{number}-[a-z-]+', name) or number > 9:
        raise SeriesError(f'{where}: part {number}: expected a name such as '
                          f'\'{number}-fixes\', found \'{name}\'')
    return Part(name, Letter(raw['cover']['subject'], raw['cover']['letter']),
                tuple(_patch(where, patch, section)
                      for patch in raw['patches'] or ()))


def _load(path: Path) -> Tuple[List[Part], List[Patch]]:
    raw = yaml.safe_load(path.read_text(encoding='utf-8'))
    unknown = set(raw) - {'maintainers', 'parts', 'harness'}
    if unknown or 'parts' not in raw:
        raise SeriesError(f'{path.name}: expected the keys maintainers, parts '
                          f'and harness; found {", ".join(map(str, raw))}')
    section = _Section(raw['maintainers']) if 'maintainers' in raw else None
    found = [_part(path.name, number, part, section)
             for number, part in enumerate(raw['parts'], 1)]
    private = [_harness(path.name, patch) for patch in raw.get('harness', ())]
    subjects = [patch.subject for part in found for patch in part.patches]
    subjects += [patch.subject for patch in private]
    for subject in subjects:
        if subjects.count(subject) > 1:
            raise SeriesError(f'{path.name}: two patches have the subject '
                              f'\'{subject}\'', next_step='join them')
    return found, private


def parts(path: Path = EDITS) -> List[Part]:
    '''
    Read the parts of the series from @path, in their order.

    Raises SeriesError on a malformed edit, patch or part, and if two
    patches have one subject.
    '''
    return _load(path)[0]


def load(path: Path = EDITS) -> List[Patch]:
    '''All patches of @path, those of the harness last; as parts().'''
    found, private = _load(path)
    return [*(patch for part in found for patch in part.patches), *private]


def _numbered(numbers: Iterable[int], lines: List[str]) -> str:
    return ''.join(f'\n    {number + 1}: {lines[number]}'
                   for number in numbers)


# What a pattern has between two pieces of plain text
_WILD = re.compile(r'(?<!\\)\(\?[^)]*\)|(?<!\\)\[[^]]*\][*+?]*'
                   r'|(?<!\\)\.[*+?]*|\\[wdsSWD][*+?]*|\\n|\n|\{\d+\}'
                   r'|(?<!\\)[()|^$]')


def _nearest(pattern: str, text: str) -> str:
    '''The lines of @text that come closest to what @pattern looks for.'''
    lines = text.splitlines()
    pieces = [re.sub(r'\\(.)', r'\1', piece)
              for piece in _WILD.split(pattern)]
    plain = max(pieces, key=len).strip()
    close = difflib.get_close_matches(plain, lines, n=3, cutoff=0.4)
    # What is but a piece of a long line has that line's likeness to it
    close += [line for line in lines if len(plain) > 4 and plain in line]
    if not close:
        return '\n  no line comes near it'
    return '\n  nearest lines:' + _numbered(
        sorted({lines.index(line) for line in close})[:5], lines)


def _mismatch(anchor: Union[Edit, Later], text: str,
              found: List['re.Match[str]']) -> str:
    message = (f'{anchor.file}: pattern \'{anchor.pattern}\': expected '
               f'{anchor.count} match{"es" * (anchor.count != 1)}, '
               f'found {len(found)}')
    if not found:
        return message + _nearest(anchor.pattern, text)
    return message + '\n  at lines:' + _numbered(
        [text.count('\n', 0, match.start()) for match in found],
        text.splitlines())


def matches(text: str, anchor: Union[Edit, Later],
            where: str) -> List['re.Match[str]']:
    '''
    Where the pattern of @anchor is in @text, which is a file of @where.

    Raises AnchorError, with file, pattern, expected and found count and
    the nearest lines, if it is not there exactly @anchor.count times.
    '''
    found = list(re.finditer(anchor.pattern, text, re.MULTILINE))
    if len(found) != anchor.count:
        raise AnchorError(
            _mismatch(anchor, text, found),
            next_step=f'compare {EDITS.name} with the file in {where}')
    return found


def edit_text(text: str, edit: Edit) -> str:
    '''
    Return @text with @edit applied to each match of its pattern.  Raises
    AnchorError.
    '''
    # From the last match to the first, so that positions stay true
    for match in reversed(matches(text, edit, 'this QEMU tree')):
        start, end = match.span()
        new = edit.text
        if edit.place == 'replace':
            new = match.expand(new)
        elif edit.place == 'before':
            start = end = text.rfind('\n', 0, start) + 1
            new = new.rstrip('\n') + '\n'
        else:
            line_end = text.find('\n', end)
            start = end = len(text) if line_end < 0 else line_end
            new = '\n' + new.rstrip('\n')
        text = text[:start] + new + text[end:]
    return text
