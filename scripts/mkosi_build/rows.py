# SPDX-License-Identifier: GPL-2.0-or-later
'''
The results of the matrix, a row a host, in the forms in which people and
programs want them; and which rows are in quarantine. A row that was not
run, or may fail, is never shown as one that passed.
'''

import datetime
import json
import re
import textwrap
import xml.etree.ElementTree as ET
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Dict, Iterator, List, Mapping, Optional, Tuple

from .cache import write_atomically
from .differences import Difference, Verdict
from .error import InputError
from .nodes import (
    NUMBER,
    STRING,
    Node,
    Place,
    compose,
    fields,
    mapping,
    reads,
)
from .suite import Case, Outcome

SCHEMA = 1

# What a row may come to. One that failed and is in quarantine has the last
STATES = ('passed', 'failed', 'timeout', 'unreachable', 'quarantined')

# Columns of a terminal
WIDTH = 100

# Colours and cursor movements, then what neither XML nor YAML takes
_ESCAPES = re.compile(r'\x1b\[[0-?]*[ -/]*[@-~]')
_CONTROLS = re.compile('[\0-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f'
                       '\ud800-\udfff\ufeff\ufffe\uffff]')


# -- Results ----------------------------------------------------------------

@dataclass(frozen=True)
class Row:
    '''
    What came of one host. @version is QEMU's, @package that of the host's
    package; @locked is false if that follows the distribution's archive.
    '''
    name: str
    state: str
    reason: str = ''
    version: str = ''
    package: str = ''
    locked: bool = True
    identity: str = ''
    seconds: float = 0.0
    attempts: int = 1
    outcomes: Tuple[Outcome, ...] = ()
    verdicts: Tuple[Verdict, ...] = ()

    def cases(self, state: str) -> int:
        '''How many cases of its tests ended in @state.'''
        return sum(outcome.count(state) for outcome in self.outcomes)

    def differing(self, state: str) -> Tuple[Verdict, ...]:
        '''The verdicts of that @state.'''
        return tuple(verdict for verdict in self.verdicts
                     if verdict.state == state)


@dataclass(frozen=True)
class Result:
    '''All that is reported: @unused are differences that occur no more.'''
    rows: Tuple[Row, ...]
    unused: Tuple[Difference, ...]
    quarantine: 'Quarantine'

    @property
    def released(self) -> Tuple[str, ...]:
        '''The rows in quarantine that passed.'''
        return tuple(row.name for row in self.rows if row.state == 'passed'
                     and row.name in self.quarantine.rows)

    def why(self, row: Row) -> str:
        '''Why @row is not one that passed.'''
        if row.state != 'quarantined':
            return row.reason or 'no reason given'
        entry = self.quarantine.rows.get(row.name)
        known = entry or Entry('an unknown day', 'no reason given')
        return f'since {known.date}: {known.reason}'

    def summary(self) -> str:
        '''How many rows came to what.'''
        counts = [(sum(row.state == state for row in self.rows), state)
                  for state in STATES]
        return ', '.join(f'{count} {state}' for count, state in counts
                         if count or state in ('passed', 'failed'))


# -- Quarantine -------------------------------------------------------------

@dataclass(frozen=True)
class Entry:
    '''Since when a row is in quarantine, 'YYYY-MM-DD', and why.'''
    date: str
    reason: str


_read_schema = reads(NUMBER, re.compile(str(SCHEMA)), f'schema {SCHEMA}')
_read_date = reads((*STRING, 'the date'),
                   re.compile(r'[0-9]{4}-[0-9]{2}-[0-9]{2}'),
                   'a date like \'2026-01-31\'')
_read_reason = reads(STRING, re.compile(r'.*\S.*'), 'a reason')
_NAME = re.compile(r'[a-z0-9][a-z0-9._-]*')
REASON_LENGTH = 200


class Quarantine:
    '''The rows that are known to fail, by name: what the file @path has.'''

    def __init__(self, path: Path, rows: Mapping[str, Entry]) -> None:
        self.path = path
        self.rows: Dict[str, Entry] = dict(rows)

    @classmethod
    def load(cls, path: Path) -> 'Quarantine':
        '''Raises InputError if the file is not as expected, or missing.'''
        return cls(path, _entries(_read(path), path)[1])

    def reason_for(self, name: str) -> Optional[str]:
        '''Why the row @name is in quarantine, None if it is not.'''
        return self.rows[name].reason if name in self.rows else None

    def add(self, name: str, reason: str, date: datetime.date) -> None:
        '''
        Put the row @name into the file, all else of which stays as it is.
        A row that is there already keeps its date and reason.
        '''
        text = _read(self.path)
        node, rows = _entries(text, self.path)
        if name not in rows:
            reason = ' '.join(clean(reason).split()) or 'no reason given'
            text = _inserted(text, node, self.path, name, Entry(
                date.isoformat(), _cut(reason, REASON_LENGTH)))
            # What could not be read again is not written
            rows = _entries(text, self.path)[1]
            write_atomically(self.path, text)
        self.rows = rows


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode('utf-8')
    except (OSError, UnicodeError) as e:
        raise InputError(f'{path}: expected the rows in quarantine: {e}'
                         ) from e


def _entries(text: str, path: Path) -> Tuple[Node, Dict[str, Entry]]:
    '''Returns the node of the rows, and the rows.'''
    place = Place(str(path))
    pairs = fields(compose(text, place), place, ('schema', 'rows'))
    _read_schema(pairs['schema'], place)
    return pairs['rows'], {
        name: _entry(name, node, place)
        for name, node in mapping(pairs['rows'], place).items()}


def _entry(name: str, node: Node, place: Place) -> Entry:
    here = Place(place.file, node.line)
    if not _NAME.fullmatch(name):
        raise here.error(f'expected the name of a row, found {name!r}')
    pairs = fields(node, place, ('date', 'reason'))
    date = _read_date(pairs['date'], place)
    try:
        datetime.date.fromisoformat(date)
    except ValueError as e:
        raise Place(place.file, pairs['date'].line).error(
            f'expected a day that there is, found \'{date}\'') from e
    return Entry(date, _read_reason(pairs['reason'], place).strip())


def _inserted(text: str, node: Node, path: Path, name: str,
              entry: Entry) -> str:
    '''@text with one more row, before all others of the mapping @node.'''
    first = next(iter(node.pairs.values()), None)
    if first is not None and node.flow:
        raise InputError(f'{path}:{node.line}: can\'t add a row to rows in '
                         'braces', next_step='write each on lines of its own')
    margin = '  '
    if first is not None:
        margin = ' ' * (first.key_start
                        - (text.rfind('\n', 0, first.key_start) + 1))
    # JSON's strings are YAML's, too
    row = ''.join(f'{margin}{line}\n' for line in (
        f'{name}:', f'  date: \'{entry.date}\'',
        f'  reason: {json.dumps(entry.reason, ensure_ascii=False)}'))
    if first is None:
        head = text[:node.start].rstrip(' ')
        end = text.index('}', node.end) + 1
        return f'{head}\n{row}{text[end:].lstrip()}'
    lines = text.splitlines(keepends=True)
    return ''.join([*lines[:node.line], row, *lines[node.line:]])


# -- Text -------------------------------------------------------------------

def clean(text: str) -> str:
    '''@text without what terminals obey and XML forbids.'''
    return _CONTROLS.sub('', _ESCAPES.sub('', text))


def _line(text: str) -> str:
    return ' '.join(clean(text).split())


def _cut(text: str, width: int) -> str:
    '''@text in no more than @width characters, its end being telling.'''
    if len(text) <= width:
        return text
    half = (width - 2) // 2
    return f'{text[:width - 2 - half]}..{text[len(text) - half:]}'


def _time(seconds: float) -> str:
    return f'{seconds:.1f} s' if seconds < 100 else (
        f'{int(seconds) // 60}m{int(seconds) % 60:02}s')


HEADINGS = ('row', 'state', 'QEMU', 'package', 'pass/fail/skip',
            'decl/undecl', 'time')


def _columns(row: Row) -> List[str]:
    '''What tables say of @row, under HEADINGS.'''
    ran = row.state != 'unreachable'
    counts = [row.cases(state) for state in ('passed', 'failed', 'skipped')]
    differ = [len(row.differing(state)) for state in ('declared', 'differs')]
    return [row.name, row.state, row.version or '-',
            (row.package or '-') + ('' if row.locked else '*'),
            '/'.join(map(str, counts)) if ran else '-',
            '/'.join(map(str, differ)) if ran else '-',
            _time(row.seconds) if ran else '-']


NOT_LOCKED = '* follows the archive of its distribution, with no lock'


def _failures(row: Row) -> Iterator[Tuple[str, str]]:
    '''What failed in @row, and why.'''
    for outcome in row.outcomes:
        for case in outcome.cases:
            if case.state == 'failed':
                yield f'{outcome.test} {case.name}', case.reason
    for verdict in row.differing('differs'):
        yield verdict.assertion, verdict.text


def _notes(result: Result) -> Iterator[str]:
    '''What a table has no column for.'''
    for row in result.rows:
        if row.state != 'passed':
            yield f'{row.name}: {row.state}: {result.why(row)}'
        if row.state in ('failed', 'timeout', 'quarantined'):
            for name, why in _failures(row):
                yield f'  {_line(name)}: {_cut(_line(why) or "failed", 300)}'
        if row.attempts > 1:
            yield f'{row.name}: {row.state} at attempt {row.attempts}'
    for name in result.released:
        yield f'{name}: no longer needs quarantine'
    for difference in result.unused:
        yield (f'no longer occurs: {difference.place}: '
               f'{difference.assertion}: {difference.reason}')


def as_table(result: Result) -> str:
    '''For a terminal: plain ASCII, WIDTH columns at most.'''
    lines = [list(HEADINGS)] + [[_line(text) for text in _columns(row)]
                                for row in result.rows]
    widths = [max(map(len, column)) for column in zip(*lines)]
    # The package's version gives way first, the names of rows then
    for column, least in ((3, 12), (0, 10), (2, 8)):
        excess = sum(widths) + 2 * (len(widths) - 1) - WIDTH
        widths[column] -= max(0, min(excess, widths[column] - least))
    table = ['  '.join(
        _cut(text, width).rjust(width) if place > 3
        else _cut(text, width).ljust(width)
        for place, (text, width) in enumerate(zip(line, widths))).rstrip()
        for line in lines]
    if not all(row.locked for row in result.rows):
        table.append(NOT_LOCKED)
    for note in _notes(result):
        margin = len(note) - len(note.lstrip())
        table += textwrap.wrap(_line(note), WIDTH,
                               initial_indent=' ' * margin,
                               subsequent_indent=' ' * (margin + 4),
                               break_on_hyphens=False)
    table.append(result.summary())
    return '\n'.join(table).encode('ascii', 'replace').decode() + '\n'


# -- Markdown ---------------------------------------------------------------

def _md(text: str) -> str:
    '''@text on one line, with nothing in it that Markdown takes for its.'''
    return re.sub(r'([\\`*_<>\[\]|#&~])', r'\\\1', _line(text))


def _block(text: str) -> List[str]:
    '''@text as it is, which indented lines can't end.'''
    return ['', *(f'    {line}'.rstrip()
                  for line in clean(text).splitlines())]


def as_markdown(result: Result) -> str:
    '''For a merge request or the summary of a pipeline.'''
    lines = [f'**{result.summary()}**', '',
             '| ' + ' | '.join(HEADINGS) + ' |',
             '| --- | --- | --- | --- | ---: | ---: | ---: |']
    lines += ['| ' + ' | '.join(map(_md, _columns(row))) + ' |'
              for row in result.rows]
    if not all(row.locked for row in result.rows):
        lines += ['', _md(NOT_LOCKED)]
    for row in result.rows:
        if row.state in ('failed', 'timeout'):
            lines += ['', f'## {row.state.capitalize()}: {_md(row.name)}',
                      '', *_failed(row)]
    for title, items in _sections(result):
        if items:
            lines += ['', f'## {title}', '', *(f'- {item}'
                                               for item in items)]
    return '\n'.join(lines) + '\n'


def _failed(row: Row) -> Iterator[str]:
    '''What failed in @row, in full.'''
    yield _md(row.reason or 'no reason given')
    for outcome in row.outcomes:
        if outcome.count('failed'):
            yield ''
        for case in outcome.cases:
            if case.state == 'failed':
                yield (f'- {_md(outcome.test)} {_md(case.name)}: '
                       f'{_md(case.reason) or "failed"}')
        if outcome.output:
            yield '\nIt said last:'
            yield from _block(outcome.output)
    for verdict in row.differing('differs'):
        yield f'\nUndeclared difference: {_md(verdict.assertion)}'
        yield from _block(verdict.text)


def _declared(row: Row) -> Iterator[str]:
    '''What differed in @row and is declared, each reason once.'''
    found: Dict[str, List[str]] = {}
    for verdict in row.differing('declared') + row.differing('skipped'):
        mark = ' (not compared)' if verdict.state == 'skipped' else ''
        for line in verdict.text.splitlines():
            text = line.replace(f'{verdict.assertion}: ', '', 1) + mark
            found.setdefault(text, []).append(verdict.assertion)
    for text, names in found.items():
        more = f' and {len(names) - 1} more' if len(names) > 1 else ''
        yield f'{text}: {names[0]}{more}'


def _sections(result: Result) -> Iterator[Tuple[str, List[str]]]:
    rows = result.rows
    yield 'Declared differences that occurred', [
        f'{_md(row.name)}: {_md(text)}' for row in rows
        for text in _declared(row)]
    yield 'Declared differences that no longer occur', [
        f'{_md(difference.place)}: {_md(difference.assertion)}: '
        f'{_md(difference.reason)}' for difference in result.unused]
    yield 'Unreachable', [
        f'{_md(row.name)}: {_md(result.why(row))}'
        for row in rows if row.state == 'unreachable']
    yield 'In quarantine', [
        f'{_md(row.name)}: {_md(result.why(row))}; now: '
        f'{_md(row.reason) or "failed"}'
        for row in rows if row.state == 'quarantined']
    yield 'No longer needs quarantine', [_md(name)
                                         for name in result.released]
    yield 'Needed more than one attempt', [
        f'{_md(row.name)}: {row.state} at attempt {row.attempts}'
        for row in rows if row.attempts > 1]


# -- For programs -----------------------------------------------------------

def as_json(result: Result) -> str:
    '''All that is known.'''
    entries = result.quarantine.rows
    return json.dumps({
        'schema': SCHEMA,
        'rows': [asdict(row) for row in result.rows],
        'unused': [{'assertion': difference.assertion,
                    'place': difference.place, 'reason': difference.reason}
                   for difference in result.unused],
        'quarantine': {row.name: asdict(entries[row.name])
                       for row in result.rows if row.name in entries},
        'released': result.released}, indent=1) + '\n'


def as_junit(result: Result) -> str:
    '''JUnit XML: a test suite a row.'''
    root = ET.Element('testsuites', name='matrix')
    root.extend(_suite(result, row) for row in result.rows)
    _number(root, 'testsuite/')
    ET.indent(root, ' ')
    return ('<?xml version="1.0" encoding="utf-8"?>\n'
            + ET.tostring(root, encoding='unicode') + '\n')


def _number(node: ET.Element, below: str = '') -> None:
    node.set('tests', str(len(node.findall(f'{below}testcase'))))
    node.set('failures', str(len(node.findall(f'{below}testcase/failure'))))
    node.set('errors', '0')


def _suite(result: Result, row: Row) -> ET.Element:
    suite = ET.Element('testsuite', name=clean(row.name))
    properties = ET.SubElement(suite, 'properties')
    for name in ('state', 'version', 'package', 'locked', 'identity',
                 'attempts'):
        ET.SubElement(properties, 'property', name=name,
                      value=clean(str(getattr(row, name))))
    excused = (f'in quarantine {result.why(row)}'
               if row.state == 'quarantined' else '')
    if row.state != 'unreachable':
        for outcome in row.outcomes:
            for case in outcome.cases:
                _testcase(suite, row, outcome, case, excused)
        for verdict in row.verdicts:
            _verdict(suite, row, verdict, excused)
    if row.state in ('unreachable', 'quarantined'):
        _note(_case(suite, row.name, 'row'), 'skipped',
              excused or result.why(row))
    elif row.state != 'passed' and suite.find('testcase/failure') is None:
        _note(_case(suite, row.name, 'row'), 'failure', result.why(row))
    _number(suite)
    suite.set('skipped', str(len(suite.findall('testcase/skipped'))))
    suite.set('time', f'{row.seconds:.3f}')
    return suite


def _case(suite: ET.Element, where: str, name: str) -> ET.Element:
    return ET.SubElement(suite, 'testcase', classname=clean(where),
                         name=_line(name))


def _note(case: ET.Element, kind: str, message: str, text: str = '') -> None:
    '''Say that the test @case was skipped or failed.'''
    ET.SubElement(case, kind, message=_line(message)).text = clean(text)


def _bad(node: ET.Element, message: str, text: str, excused: str) -> None:
    if excused:
        _note(node, 'skipped', excused)
        ET.SubElement(node, 'system-out').text = clean(f'{message}\n{text}')
    else:
        _note(node, 'failure', message, text)


def _testcase(suite: ET.Element, row: Row, outcome: Outcome, case: Case,
              excused: str) -> None:
    node = _case(suite, f'{row.name}.{outcome.test}', case.name)
    if case.state == 'failed':
        _bad(node, case.reason or 'failed', outcome.output, excused)
    elif case.state == 'skipped':
        _note(node, 'skipped', case.reason)


def _verdict(suite: ET.Element, row: Row, verdict: Verdict,
             excused: str) -> None:
    if verdict.state == 'same':
        return
    node = _case(suite, f'{row.name}.differences', verdict.assertion)
    if verdict.state == 'differs':
        _bad(node, 'undeclared difference', verdict.text, excused)
    elif verdict.state == 'skipped':
        _note(node, 'skipped', verdict.text)
    else:
        ET.SubElement(node, 'system-out').text = clean(verdict.text)
