# SPDX-License-Identifier: GPL-2.0-or-later
'''
QEMU's own tests that run on our images, before and after: what they fetch,
whether they need KVM, and what comes of them here without network.

Both trees are run with KVM hidden: what passes does not need it.
'''

from dataclasses import asdict, dataclass
from http.client import HTTPException
import json
import os
from pathlib import Path
import shutil
from typing import (Any, Dict, Iterable, List, Mapping, Optional, Sequence,
                    Set, Tuple)
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import yaml

from . import cases, edits, functional, tree
from .apply import changes, copy_tree
from .cases import Case, Download
from .functional import BUILD, REGISTRY, Bench, is_test, say
from .tap import outcomes


TIMEOUT = 10    # seconds for a host to answer
PARTS = ('kernel', 'initrd', 'disk')
UNREACHABLE = 'host not reachable'


@dataclass(frozen=True)
class File:
    '''
    What is fetched: @name says from where.  Without @size, in bytes, @why
    says why it is not known.
    '''
    name: str
    size: Optional[int]
    why: str = ''


@dataclass(frozen=True)
class Side:
    '''A case, before or after; @outcome is passed, skipped or failed.'''
    files: Tuple[File, ...]
    needs_kvm: bool
    outcome: str
    reason: str = ''


@dataclass(frozen=True)
class Row:
    '''The case @case of the test @test, which is '<arch>/<name>'.'''
    test: str
    case: str
    before: Side
    after: Side


# Seconds that each test took, all its cases together
Times = Dict[str, Optional[float]]


@dataclass(frozen=True)
class Table:
    '''All cases that are on images, and @left, which still are not.'''
    qemu: str
    rows: List[Row]
    left: List[str]
    before: Times
    after: Times


class Sizes:
    '''Sizes of files, from the cache or by asking hosts, each once.'''

    def __init__(self, cache: Path) -> None:
        self.cache = cache
        self.known: Dict[Download, File] = {}
        self.dead: Set[str] = set()

    def file(self, asset: Download) -> File:
        '''What there is to know of @asset.'''
        if asset not in self.known:
            self.known[asset] = self._ask(asset)
        return self.known[asset]

    def _ask(self, asset: Download) -> File:
        cached = self.cache / asset.digest
        if cached.is_file():
            return File(asset.url, cached.stat().st_size)
        host = urlsplit(asset.url).netloc
        if host in self.dead:
            return File(asset.url, None, UNREACHABLE)
        try:
            with urlopen(Request(asset.url, method='HEAD'),
                         timeout=TIMEOUT) as answer:
                length = answer.headers.get('Content-Length')
        except HTTPError as error:
            return File(asset.url, None, f'HTTP status {error.code}')
        except (OSError, HTTPException):
            self.dead.add(host)
            return File(asset.url, None, UNREACHABLE)
        if length is None or not length.isdigit():
            return File(asset.url, None, 'host does not tell')
        return File(asset.url, int(length))


def image_files(image: cases.Image, arch: str,
                registry: Mapping[str, Any]) -> List[File]:
    '''The files of @image that a test for @arch fetches.'''
    target = registry['images'][image.name]['architectures'][arch]
    return [File(f'{image.name}/{arch}/{part}',
                 target['artefacts'][part].get('size'), 'not built yet')
            for part in PARTS[:PARTS.index(image.part) + 1]]


def _files(case: Case, arch: str, sizes: Sizes,
           registry: Mapping[str, Any]) -> Tuple[File, ...]:
    found: List[File] = []
    for asset in case.assets:
        found += ([sizes.file(asset)] if isinstance(asset, Download)
                  else image_files(asset, arch, registry))
    return tuple(dict.fromkeys(found))


def cases_of(folder: Path, name: str) -> Dict[str, Case]:
    '''The cases of the test file @name of the tree @folder.'''
    text = (folder / name).read_text(encoding='utf-8')
    libraries = [folder / 'tests/functional' / f'{module}.py'
                 for module in cases.imports(text)]
    return {case.name: case for case in cases.read(
        text, name, [path.read_text(encoding='utf-8') for path in libraries
                     if path.is_file()])}


def _side(case: Case, files: Tuple[File, ...],
          record: Optional[Mapping[str, Any]], arch: str) -> Side:
    if record is None:
        outcome, reason = 'skipped', f'no qemu-system-{arch}'
    else:
        outcome, reason = outcomes(record.get('stdout') or '').get(
            case.name, ('failed', f'meson says {record["result"]}'))
    return Side(files, case.wants_kvm and outcome != 'passed', outcome,
                reason)


def compare(names: Iterable[str], folders: Tuple[Path, Path],
            records: Tuple[Mapping[str, Any], Mapping[str, Any]],
            sizes: Sizes) -> Tuple[List[Row], List[str]]:
    '''
    The rows of the test files @names: their text is in two trees, before
    and after, and what meson recorded of them in @records.  Also returns
    the cases that are on no image after.
    '''
    rows: List[Row] = []
    left: List[str] = []
    registry = yaml.safe_load(REGISTRY.read_text(encoding='utf-8'))
    for name in names:
        arch, file = name.split('/')[-2:]
        test = f'{arch}/{file[len("test_"):-len(".py")]}'
        before = cases_of(folders[0], name)
        for case in cases_of(folders[1], name).values():
            if not case.on_images or case.name not in before:
                left.append(f'{test}: {case.name}')
                continue
            old, new = (
                _side(each, _files(each, arch, sizes, registry),
                      record.get(name), arch)
                for each, record in zip((before[case.name], case), records))
            rows.append(Row(test, case.name, old, new))
    return rows, left


@dataclass(frozen=True)
class Sum:
    '''One side of all rows; a file that several cases fetch counts once.'''
    files: int
    size: int
    unknown: int
    kvm: int
    outcomes: Dict[str, int]


def total(sides: Sequence[Side]) -> Sum:
    '''Add up @sides.'''
    files = {file for side in sides for file in side.files}
    return Sum(
        files=len(files), size=sum(file.size or 0 for file in files),
        unknown=sum(file.size is None for file in files),
        kvm=sum(side.needs_kvm for side in sides),
        outcomes={name: sum(side.outcome == name for side in sides)
                  for name in ('passed', 'skipped', 'failed')})


def ratio(before: Sum, after: Sum) -> str:
    '''How many bytes are fetched after, as a share of those before.'''
    if after.unknown or not before.size:
        return 'not known'
    share = f'{after.size / before.size:.3f}'
    return f'at most {share}' if before.unknown else share


def _bytes(sides: Sequence[Side]) -> str:
    whole = total(sides)
    files = f'{whole.files} file{"s" * (whole.files != 1)}'
    known = f'{whole.size / 1e6:.1f} MB'
    if not whole.unknown:
        return f'{files}, {known}'
    whys = sorted({file.why for side in sides for file in side.files
                   if file.size is None})
    if whole.unknown == whole.files:
        return f'{files}, size not known: {", ".join(whys)}'
    return (f'{files}, {known} and {whole.unknown} of a size not known: '
            + ', '.join(whys))


def _time(seconds: Optional[float]) -> str:
    return '-' if seconds is None else f'{seconds:.1f} s'


def _fetched(table: Table) -> List[List[str]]:
    lines = [['test', 'fetches before', 'fetches after', 'time before',
              'time after']]
    for test in dict.fromkeys(row.test for row in table.rows):
        rows = [row for row in table.rows if row.test == test]
        lines.append([test, _bytes([row.before for row in rows]),
                      _bytes([row.after for row in rows]),
                      _time(table.before.get(test)),
                      _time(table.after.get(test))])
    return lines


def _came_of_it(table: Table) -> List[List[str]]:
    def words(side: Side) -> str:
        return side.outcome + (f': {side.reason}' if side.reason else '')

    return [['test', 'case', 'KVM before', 'KVM after', 'before', 'after'],
            *([row.test, row.case,
               'needed' if row.before.needs_kvm else 'no',
               'needed' if row.after.needs_kvm else 'no',
               words(row.before), words(row.after)] for row in table.rows)]


def summary(table: Table) -> List[str]:
    '''The lines that end the table.'''
    lines = []
    sums = []
    for name in ('before', 'after'):
        sides = [getattr(row, name) for row in table.rows]
        whole = total(sides)
        sums.append(whole)
        counts = ', '.join(f'{number} {outcome}' for outcome, number
                           in whole.outcomes.items())
        lines.append(f'{name}: {_bytes(sides)}; {whole.kvm} of '
                     f'{len(table.rows)} cases need KVM; {counts}')
    lines.append(f'bytes after / before: {ratio(sums[0], sums[1])}')
    if table.left:
        lines.append('left as they are: ' + ', '.join(table.left))
    return lines


def markdown(table: Table) -> str:
    '''The table in Markdown.'''
    blocks = [f'QEMU {table.qemu}, without network, KVM hidden.']
    for lines in (_fetched(table), _came_of_it(table)):
        rows = ['| ' + ' | '.join(cell.replace('|', '\\|') for cell in line)
                + ' |' for line in lines]
        rows.insert(1, '| --- ' * len(lines[0]) + '|')
        blocks.append('\n'.join(rows))
    blocks.append('\n'.join(f'- {line}' for line in summary(table)))
    return '\n\n'.join(blocks) + '\n'


def plain(table: Table) -> str:
    '''The table for a terminal.'''
    blocks = [f'QEMU {table.qemu}, without network, KVM hidden']
    for lines in (_fetched(table), _came_of_it(table)):
        widths = [max(len(line[column]) for line in lines)
                  for column in range(len(lines[0]))]
        blocks.append('\n'.join(
            '  '.join(cell.ljust(width) for cell, width
                      in zip(line, widths)).rstrip() for line in lines))
    blocks.append('\n'.join(summary(table)))
    return '\n\n'.join(blocks)


def migrated(patches: Iterable[edits.Patch]) -> List[str]:
    '''The files of QEMU's tests that the series edits.'''
    return sorted({edit.file for patch in patches if not patch.private
                   for edit in patch.edits if is_test(edit.file)})


def _before(source: Path, names: Sequence[str]) -> Bench:
    '''QEMU's tree with no more than what older emulators need.'''
    bench = Bench(folder=BUILD / f'before-{tree.version_of(source)}', ours=[],
                  emulators=functional.find_emulators(),
                  qemu_img=shutil.which('qemu-img'))
    private = [patch for patch in edits.load() if patch.private
               and not any(edit.file in names for edit in patch.edits)]
    copy_tree(source, bench.tree, changes(source, private, None))
    return bench


def measure() -> Table:
    '''Run the tests in both trees.  Raises SeriesError.'''
    source = tree.obtain(BUILD / 'downloads', say)
    names = migrated(edits.load())
    benches = (_before(source, names), functional.prepare())
    records = tuple(functional.run_files(bench, names) for bench in benches)
    cache = Path(os.environ.get('QEMU_TEST_CACHE_DIR')
                 or Path('~/.cache/qemu').expanduser(), 'download')
    rows, left = compare(names, (source, benches[1].tree),
                         (records[0], records[1]), Sizes(cache))
    times = [{'/'.join(name.split('/')[-2:])
              .replace('test_', '', 1)[:-len('.py')]: record['duration']
              for name, record in each.items()} for each in records]
    return Table(tree.version_of(source), rows, left, times[0], times[1])


def main() -> int:
    '''
    Print the table, and write it to build/table.json and build/table.md.
    Returns 1 if a case fails after, or none is there.
    '''
    table = measure()
    (BUILD / 'table.json').write_text(
        json.dumps({**asdict(table), 'sum': {
            name: asdict(total([getattr(row, name) for row in table.rows]))
            for name in ('before', 'after')}}, indent=1) + '\n', 'utf-8')
    (BUILD / 'table.md').write_text(markdown(table), 'utf-8')
    say(plain(table))
    say(f'{BUILD / "table.json"}, {BUILD / "table.md"}')
    return int(not table.rows or any(row.after.outcome == 'failed'
                                     for row in table.rows))
