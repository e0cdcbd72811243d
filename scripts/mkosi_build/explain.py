# SPDX-License-Identifier: GPL-2.0-or-later
'''
Why two builds of one thing differ: for each difference where it is, both
sides, the known cause if it is one, and its mend.

    PYTHONPATH=scripts python3 -m mkosi_build.explain [--json] BEFORE AFTER
'''

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

from .causes import Cause, match
from .compare import Finding
from .error import BuildError, InputError
from .layers import Descent
from .reading import File
from .report import Report

# What a person reads; the JSON form has all
MAX_TOLD = 20
# Bounds of diffoscope: of each file in bytes, in seconds, in lines, and to
# how many files it is applied
_DIFFOSCOPE_SIZE = 1 << 23
_DIFFOSCOPE_TIME = 60
_DIFFOSCOPE_LINES = 30
_DIFFOSCOPE_CALLS = 3


@dataclass(frozen=True)
class Difference:
    '''
    What differs, first of @count places that differ alike.

    @params layers: what contains it, from the outermost inwards
    @params path: the file in there, empty if it is not in one
    @params aspect: what of it; see compare.Finding
    @params detail: what diffoscope says of the content, if it was asked
    '''
    layers: Tuple[str, ...]
    path: str
    aspect: str
    before: str
    after: str
    cause: Optional[Cause] = None
    count: int = 1
    note: str = ''
    detail: str = ''

    @property
    def place(self) -> str:
        '''Layers and path in one line.'''
        return ' > '.join(
            (*self.layers, *([self.path] if self.path else [])))

    def as_json(self) -> Dict[str, Any]:
        '''For a program; a cause that is not known is null.'''
        return {'layers': list(self.layers), 'path': self.path,
                'aspect': self.aspect, 'before': self.before,
                'after': self.after, 'count': self.count,
                'cause': self.cause and {
                    'key': self.cause.key, 'title': self.cause.title,
                    'mend': self.cause.mend},
                'note': self.note, 'detail': self.detail}

    def __str__(self) -> str:
        more = f', and {self.count - 1} more' if self.count > 1 else ''
        lines = [f'{self.place or "content"}: {self.aspect}{more}',
                 f'    before  {self.before}', f'    after   {self.after}']
        if self.cause:
            lines += [f'    cause   {self.cause.title} ({self.cause.key})',
                      f'    mend    {self.cause.mend}']
        else:
            lines.append('    cause   not one of the known ones')
        if self.note:
            lines.append(f'    note    {self.note}')
        lines += [f'    | {line}' for line in self.detail.splitlines()]
        return '\n'.join(lines)


def explain(before: Path, after: Path,
            tree: Optional[Path] = None) -> List[Difference]:
    '''
    What differs between the files @before and @after, nothing if they are
    the same; zstd by the tools @tree where the host has no program.
    Raises InputError for what is not a file.
    '''
    for path in (before, after):
        if not path.is_file():
            raise InputError(f'{path}: expected a file, found '
                             + ('a folder' if path.is_dir() else 'none'),
                             next_step='name two files to compare')
    found = Descent(tree).descend((), '', File(before), File(after))
    merged: Dict[Tuple[object, ...], Difference] = {}
    calls = 0
    for finding in found:
        cause = match(finding)
        key = (finding.layers, cause.key if cause
               else (finding.path, finding.aspect))
        known = merged.get(key)
        if known:
            merged[key] = replace(known, count=known.count + 1)
            continue
        detail = ''
        if cause is None and finding.data and calls < _DIFFOSCOPE_CALLS:
            calls += 1
            detail = diffoscope(finding)
        merged[key] = Difference(finding.layers, finding.path,
                                 finding.aspect, finding.before,
                                 finding.after, cause, 1, finding.note,
                                 detail)
    return list(merged.values())


def diffoscope(finding: Finding) -> str:
    '''
    What diffoscope, if it is installed, says of a content, shortened;
    nothing for large ones, or if it fails or takes too long.
    '''
    program = shutil.which('diffoscope')
    if (program is None or finding.data is None
            or max(map(len, finding.data)) > _DIFFOSCOPE_SIZE):
        return ''
    # Its readers go by the name, too
    name = re.sub(r'[^\w.-]', '_', Path(finding.path).name)[-99:]
    name = name.lstrip('.') or 'data'
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, side, name) for side in ('before', 'after')]
        for path, data in zip(paths, finding.data):
            path.parent.mkdir()
            path.write_bytes(data)
        try:
            result = subprocess.run(
                [program, '--text', '-', '--text-color', 'never',
                 *(str(path) for path in paths)],
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL, encoding='utf-8',
                errors='replace', timeout=_DIFFOSCOPE_TIME, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return ''
    # 1: they differ, as they do
    lines = result.stdout.splitlines() if result.returncode == 1 else []
    if len(lines) > _DIFFOSCOPE_LINES:
        lines = [*lines[:_DIFFOSCOPE_LINES], '...']
    return '\n'.join(lines)


def render(differences: Sequence[Difference]) -> str:
    '''@differences for a person.'''
    lines = [str(difference) for difference in differences[:MAX_TOLD]]
    if len(differences) > MAX_TOLD:
        lines.append(f'and {len(differences) - MAX_TOLD} more differences')
    return '\n'.join(lines) or 'no difference'


def tell(report: Report, title: str, before: Path, after: Path,
         tree: Optional[Path] = None) -> List[Difference]:
    '''
    Explain and tell it, under @title, which names image and artefact;
    nothing is told of the same bytes. Returns what explain() does. An
    explanation that fails is told as a warning: there is an error already
    that led to it.
    '''
    try:
        found = explain(before, after, tree)
    except (BuildError, OSError) as e:
        report.event('warning', f'{title}: what differs is not known: {e}')
        return []
    if not found:
        return []
    text = '\n'.join(f'    {line}' for line in render(found).splitlines())
    report.event('explained', f'{title}: what differs between {before} and '
                 f'{after}:\n{text}', title=title, before=str(before),
                 after=str(after),
                 differences=[item.as_json() for item in found])
    return found


def main(argv: Optional[Sequence[str]] = None) -> int:
    '''Explain two files. Returns 0 if they are the same, 1 if they differ.'''
    parser = argparse.ArgumentParser(
        prog='python3 -m mkosi_build.explain',
        description='Tell why two builds of one file differ.')
    parser.add_argument('before', type=Path)
    parser.add_argument('after', type=Path)
    parser.add_argument('--json', action='store_true')
    arguments = parser.parse_args(argv)
    try:
        found = explain(arguments.before, arguments.after)
    except BuildError as e:
        print(f'error: {e}', file=sys.stderr)
        return e.exit_code
    if arguments.json:
        print(json.dumps([item.as_json() for item in found], indent=1))
    else:
        print(render(found))
    return 1 if found else 0


if __name__ == '__main__':
    sys.exit(main())
