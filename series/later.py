# SPDX-License-Identifier: GPL-2.0-or-later
'''
Withholds lines of our files from patches that have no use for them yet.

A file belongs to one patch, but some of its lines may serve a later one,
as an import or a row of a table.  They are in the repository's file, and
each patch has the file without what later ones add to it.
'''

from dataclasses import dataclass
from pathlib import Path
from typing import Dict, List, Mapping, Sequence

from .apply import Content, read_file
from .edits import EDITS, Later, Patch, matches
from .error import SeriesError


@dataclass(frozen=True)
class _Lines:
    '''Text from @start to @end, which the patch @number adds.'''
    start: int
    end: int
    number: int
    until: str


def _whole_lines(text: str, later: Later, number: int) -> List[_Lines]:
    found = []
    for match in matches(text, later, 'this repository'):
        if not match[0].strip('\n'):
            raise SeriesError(f'{later.file}: pattern \'{later.pattern}\' '
                              'matches no line of text',
                              next_step=f'mend later: in {EDITS.name}')
        start = text.rfind('\n', 0, match.start()) + 1
        if match[0][0] == '\n' and start < match.start():
            # That is the end of a line which is not meant
            start = match.start() + 1
        end = text.find('\n', match.end() - 1) + 1
        found.append(_Lines(start, end or len(text), number, later.until))
    return found


def _all_lines(text: str, name: str,
               patches: Sequence[Patch]) -> List[_Lines]:
    '''What each of @patches adds to the file @name, in its order.'''
    found = [lines for number, patch in enumerate(patches)
             for later in patch.later if later.file == name
             for lines in _whole_lines(text, later, number)]
    found.sort(key=lambda lines: lines.start)
    for first, second in zip(found, found[1:]):
        if second.start < first.end:
            line = text.count('\n', 0, second.start) + 1
            raise SeriesError(
                f'{name}:{line}: added by two entries of later: of '
                f'\'{patches[first.number].subject}\' and '
                f'\'{patches[second.number].subject}\'',
                next_step='let one of them match it')
    return found


def _as_of(text: str, waiting: Sequence[_Lines], number: int) -> str:
    for lines in reversed(waiting):
        if lines.number > number:
            until = lines.until
            if until and not until.endswith('\n'):
                until += '\n'
            text = text[:lines.start] + until + text[lines.end:]
    return text


def schedule(root: Path, patches: Sequence[Patch],
             files: Mapping[str, Sequence[str]]) -> List[Dict[str, Content]]:
    '''
    The files of the repository @root that each of @patches adds, or adds
    lines to, as it leaves them; @files has those of each subject.

    Raises SeriesError if a patch adds lines to a file that no patch before
    it has, and AnchorError if a pattern of its later: does not match.
    '''
    owners = {name: number for number, patch in enumerate(patches)
              for name in files[patch.subject]}
    changed: List[Dict[str, Content]] = [{} for _ in patches]
    for name, number in owners.items():
        changed[number][name] = read_file(root / name)
    for number, patch in enumerate(patches):
        for name in (later.file for later in patch.later):
            if owners.get(name, number) >= number:
                raise SeriesError(
                    f'{name}: \'{patch.subject}\' adds lines to it: expected '
                    'that a patch before has the file, found '
                    + (f'\'{patches[owners[name]].subject}\''
                       if name in owners else 'none'),
                    next_step='put them into another order')
    for name in {later.file for patch in patches for later in patch.later}:
        whole = read_file(root / name)
        text = whole.data.decode('utf-8')
        waiting = _all_lines(text, name, patches)
        for number in {owners[name], *(part.number for part in waiting)}:
            changed[number][name] = Content(
                _as_of(text, waiting, number).encode('utf-8'), whole.mode)
    return changed
