# SPDX-License-Identifier: GPL-2.0-or-later
'''The matrix's results as people and programs see them, and quarantine.'''

import datetime
import json
from pathlib import Path
import re
from typing import Any, Dict, List, Tuple
import xml.etree.ElementTree as ET

import pytest

from mkosi_build import rows
from mkosi_build.differences import Difference, Range, Verdict
from mkosi_build.error import InputError
from mkosi_build.rows import Entry, Quarantine, Result, Row
from mkosi_build.suite import Case, Outcome

REPOSITORY = Path(__file__).resolve().parents[2]
OURS = REPOSITORY / 'tests/functional/mkosi/hosts/quarantine.yaml'
DAY = datetime.date(2026, 11, 21)

NASTY = 'a <b> & "c" ]]> \x1b[31mred\x1b[0m \x00\x08 | `d` *e* \ud800é'

GOOD = Outcome('x86_64/blk', (
    Case('Blk.test', 'passed'), Case('Blk.kvm', 'skipped', 'no KVM')), 4.2)
BAD = Outcome('x86_64/net', (
    Case('Net.test_a', 'passed'),
    Case('Net.test_b', 'failed', 'ValueError: ' + NASTY)), 1.5,
    'last words\n```\nlogs: /work/logs\n')
VERDICTS = (
    Verdict('qemu-img check', 'same', ''),
    Verdict('qemu-img info', 'declared', '7.2.22 has no x; 11.1.3 has it'),
    Verdict('qemu-img luks', 'skipped', 'comes with 8.0'),
    Verdict('qemu-img map', 'differs', 'size:\n- 1 in 11.1.3\n+ 2 in 7.2.22'))

PASSED = Row('debian-13', 'passed', version='10.0.13',
             package='1:10.0.13+ds-0+deb13u1', identity='ab' * 32,
             seconds=12.3, outcomes=(GOOD,))
FAILED = Row('debian-12', 'failed', 'tests failed', '7.2.22',
             '1:7.2+dfsg-7+deb12u18+b3', False, '', 3661.0, 2, (GOOD, BAD),
             VERDICTS)
TIMEOUT = Row('slow', 'timeout', 'not done after 900 s', '9.2.0', seconds=900)
AWAY = Row('fedora-43', 'unreachable', 'nobody answers | <here>')
KNOWN = Row('trouble', 'quarantined', 'tests failed', '9.1.0', '9.1-2',
            outcomes=(GOOD, BAD), verdicts=VERDICTS)
HEALED = Row('healed', 'passed', version='9.0.0', outcomes=(GOOD,))


@pytest.fixture(name='result')
def fixture_result() -> Result:
    '''A row of each state, and one that has healed.'''
    return Result(
        (PASSED, FAILED, TIMEOUT, AWAY, KNOWN, HEALED),
        (Difference('qemu-img snapshot', Range.parse('<8.0'), 'a.b', 'absent',
                    None, 'an old bug', 'differences.yaml:7'),),
        Quarantine(Path('quarantine.yaml'), {
            'trouble': Entry('2026-01-31', 'a bug of theirs'),
            'healed': Entry('2026-02-28', 'it hung'),
            'not-asked-for': Entry('2026-03-31', 'whatever')}))


# -- JSON -------------------------------------------------------------------

def test_json_has_everything(result: Result) -> None:
    '''What goes in comes out.'''
    found = json.loads(rows.as_json(result))
    assert found['schema'] == 1
    assert [row['name'] for row in found['rows']] == [
        row.name for row in result.rows]
    row = found['rows'][1]
    assert (row['version'], row['package'], row['locked'], row['attempts'],
            row['seconds']) == ('7.2.22', '1:7.2+dfsg-7+deb12u18+b3', False,
                                2, 3661.0)
    case = row['outcomes'][1]['cases'][1]
    assert case == {'name': 'Net.test_b', 'state': 'failed',
                    'reason': 'ValueError: ' + NASTY}
    assert row['outcomes'][1]['output'] == BAD.output
    assert [verdict['state'] for verdict in row['verdicts']] == [
        'same', 'declared', 'skipped', 'differs']
    assert found['unused'] == [{
        'assertion': 'qemu-img snapshot', 'place': 'differences.yaml:7',
        'reason': 'an old bug'}]
    assert found['quarantine'] == {
        'trouble': {'date': '2026-01-31', 'reason': 'a bug of theirs'},
        'healed': {'date': '2026-02-28', 'reason': 'it hung'}}
    assert found['released'] == ['healed']


# -- JUnit ------------------------------------------------------------------

def suites(result: Result) -> Dict[str, ET.Element]:
    '''The test suites of the JUnit file, by row.'''
    root = ET.fromstring(rows.as_junit(result).encode('utf-8'))
    assert root.tag == 'testsuites'
    found = {suite.attrib['name']: suite for suite in root}
    for name in ('tests', 'failures', 'errors'):
        assert root.attrib[name] == str(sum(
            int(suite.attrib[name]) for suite in found.values()))
    return found


def cases(suite: ET.Element) -> List[Tuple[str, str, List[str]]]:
    '''Class, name and what is told of each test case.'''
    return [(case.attrib['classname'], case.attrib['name'],
             [child.tag for child in case])
            for case in suite.findall('testcase')]


def test_junit(result: Result) -> None:
    '''A suite a row; a case a test's case and verdict that is no "same".'''
    suite = suites(result)['debian-12']
    assert cases(suite) == [
        ('debian-12.x86_64/blk', 'Blk.test', []),
        ('debian-12.x86_64/blk', 'Blk.kvm', ['skipped']),
        ('debian-12.x86_64/net', 'Net.test_a', []),
        ('debian-12.x86_64/net', 'Net.test_b', ['failure']),
        ('debian-12.differences', 'qemu-img info', ['system-out']),
        ('debian-12.differences', 'qemu-img luks', ['skipped']),
        ('debian-12.differences', 'qemu-img map', ['failure'])]
    assert [suite.attrib[name] for name in (
        'tests', 'failures', 'errors', 'skipped', 'time')] == [
            '7', '2', '0', '2', '3661.000']
    failure = suite.find('testcase/failure')
    assert failure is not None
    assert failure.attrib['message'] == (
        'ValueError: a <b> & "c" ]]> red | `d` *e* é')
    assert failure.text == BAD.output


def test_junit_properties_come_first(result: Result) -> None:
    '''The order that readers with a schema ask for.'''
    for suite in suites(result).values():
        assert [child.tag for child in suite] == (
            ['properties'] + ['testcase'] * int(suite.attrib['tests']))
    values = {node.attrib['name']: node.attrib['value'] for node in
              suites(result)['debian-13'].iter('property')}
    assert values == {
        'state': 'passed', 'version': '10.0.13',
        'package': '1:10.0.13+ds-0+deb13u1', 'locked': 'True',
        'identity': 'ab' * 32, 'attempts': '1'}


def test_junit_of_rows_that_did_not_run(result: Result) -> None:
    '''An unreachable row is skipped; one that has no case fails itself.'''
    away = suites(result)['fedora-43']
    assert cases(away) == [('fedora-43', 'row', ['skipped'])]
    assert (away.find('testcase/skipped').attrib['message']  # type: ignore
            == 'nobody answers | <here>')
    slow = suites(result)['slow']
    assert cases(slow) == [('slow', 'row', ['failure'])]
    assert (slow.find('testcase/failure').attrib['message']  # type: ignore
            == 'not done after 900 s')


def test_junit_of_quarantine(result: Result) -> None:
    '''What fails in quarantine fails nothing, and does not pass, either.'''
    suite = suites(result)['trouble']
    assert suite.attrib['failures'] == '0'
    told = {name: tags for _, name, tags in cases(suite)}
    assert told['Net.test_b'] == ['skipped', 'system-out']
    assert told['qemu-img map'] == ['skipped', 'system-out']
    assert told['row'] == ['skipped']
    for node in suite.findall('testcase/skipped'):
        assert node.attrib['message'] in (
            'in quarantine since 2026-01-31: a bug of theirs',
            'no KVM', 'comes with 8.0')


# -- For people -------------------------------------------------------------

def test_table(result: Result) -> None:
    '''Plain text that fits, and says of each row what came of it.'''
    text = rows.as_table(result)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 100
    assert re.fullmatch(r'[\n -~]+', text)
    assert lines[0].split() == ['row', 'state', 'QEMU', 'package',
                                'pass/fail/skip', 'decl/undecl', 'time']
    assert [line.split() for line in lines[1:7]] == [
        ['debian-13', 'passed', '10.0.13', '1:10.0.13+ds-0+deb13u1',
         '1/0/1', '0/0', '12.3', 's'],
        ['debian-12', 'failed', '7.2.22', '1:7.2+dfsg-7+deb12u18+b3*',
         '2/1/1', '1/1', '61m01s'],
        ['slow', 'timeout', '9.2.0', '-', '0/0/0', '0/0', '15m00s'],
        ['fedora-43', 'unreachable', '-', '-', '-', '-', '-'],
        ['trouble', 'quarantined', '9.1.0', '9.1-2', '2/1/1', '1/1', '0.0',
         's'],
        ['healed', 'passed', '9.0.0', '-', '1/0/1', '0/0', '0.0', 's']]
    assert len({line.index(state) for line, state in zip(
        lines[1:], ('passed', 'failed', 'timeout'))}) == 1
    for note in ('fedora-43: unreachable: nobody answers | <here>',
                 'trouble: quarantined: since 2026-01-31: a bug of theirs',
                 'healed: no longer needs quarantine',
                 'debian-12: failed at attempt 2',
                 '  x86_64/net Net.test_b: ValueError: a <b> & "c" ]]> red '
                 '| `d` *e* ?',
                 'no longer occurs: differences.yaml:7: qemu-img snapshot: '
                 'an old bug'):
        assert note in lines
    assert lines[-1] == ('2 passed, 1 failed, 1 timeout, 1 unreachable, '
                         '1 quarantined')


def test_table_of_long_names() -> None:
    '''Whatever is long gives way; ends and other columns stay.'''
    row = Row('opensuse-tumbleweed-' * 3, 'unreachable', 'w' * 300, '7' * 30,
              '1:10.0.13+ds-' + 'x' * 90 + 'deb13u1')
    lines = rows.as_table(Result(
        (row, PASSED), (), Quarantine(Path(), {}))).splitlines()
    assert max(map(len, lines)) <= 100
    assert 'b13u1' in lines[1] and 'unreachable' in lines[1]
    assert lines[2].endswith(' 12.3 s')


def test_markdown(result: Result) -> None:
    '''The same table, and a section for everything worth a look.'''
    text = rows.as_markdown(result)
    assert ('| debian-13 | passed | 10.0.13 | 1:10.0.13+ds-0+deb13u1 | '
            '1/0/1 | 0/0 | 12.3 s |\n') in text
    titles = re.findall('^## (.*)$', text, re.MULTILINE)
    assert titles == [
        'Failed: debian-12', 'Timeout: slow',
        'Declared differences that occurred',
        'Declared differences that no longer occur', 'Unreachable',
        'In quarantine', 'No longer needs quarantine',
        'Needed more than one attempt']
    for line in (
            '- x86\\_64/net Net.test\\_b: ValueError: a \\<b\\> \\& "c" '
            '\\]\\]\\> red \\| \\`d\\` \\*e\\* é',
            '    ```', '    + 2 in 7.2.22',
            '- debian-12: 7.2.22 has no x; 11.1.3 has it: qemu-img info',
            '- debian-12: comes with 8.0 (not compared): qemu-img luks',
            '- differences.yaml:7: qemu-img snapshot: an old bug',
            '- fedora-43: nobody answers \\| \\<here\\>',
            '- trouble: since 2026-01-31: a bug of theirs; now: tests failed',
            '- healed'):
        assert line in text.splitlines()


def test_reasons_once() -> None:
    '''Of many assertions that differ for one reason, the first is named.'''
    row = Row('old', 'passed', verdicts=tuple(
        Verdict(name, 'declared', f'{name}: 7.2.0 against 10.0.0, x: why\n'
                f'{name}: 7.2.0 against 10.0.0, y: because')
        for name in ('info a', 'info b', 'info c')))
    text = rows.as_markdown(Result((row,), (), Quarantine(Path(), {})))
    assert [line for line in text.splitlines() if line[:2] == '- '] == [
        '- old: 7.2.0 against 10.0.0, x: why: info a and 2 more',
        '- old: 7.2.0 against 10.0.0, y: because: info a and 2 more']


def test_markdown_of_success() -> None:
    '''Where all is well there is a table and nothing else.'''
    text = rows.as_markdown(Result((PASSED,), (), Quarantine(Path(), {})))
    assert '##' not in text
    assert text.startswith('**1 passed, 0 failed**\n')


@pytest.mark.parametrize('form', [rows.as_json, rows.as_junit,
                                  rows.as_markdown, rows.as_table])
def test_no_rows(form: Any) -> None:
    '''No row is no reason to fail.'''
    assert form(Result((), (), Quarantine(Path(), {})))


# -- Quarantine -------------------------------------------------------------

HEAD = '# A comment\n---\nschema: 1\n'


@pytest.fixture(name='path')
def fixture_path(tmp_path: Path) -> Path:
    '''A quarantine file that has no row.'''
    path = tmp_path / 'quarantine.yaml'
    path.write_text(f'{HEAD}rows: {{}}\n', encoding='utf-8')
    return path


def test_ours_is_valid() -> None:
    '''The file of this repository.'''
    Quarantine.load(OURS)


def test_add_to_ours(tmp_path: Path) -> None:
    '''What the head of that file says stays there.'''
    path = tmp_path / 'quarantine.yaml'
    path.write_bytes(OURS.read_bytes())
    head = OURS.read_text('utf-8').partition('---')[0]
    Quarantine.load(path).add('row', 'why', DAY)
    assert path.read_text('utf-8').startswith(f'{head}---\nschema: 1\nrows:')


def test_add(path: Path) -> None:
    '''Rows come with date and reason, and are there when read again.'''
    quarantine = Quarantine.load(path)
    assert quarantine.reason_for('a') is None
    quarantine.add('a', 'it\'s "bad": #1', DAY)
    quarantine.add('b', 'worse\n\x1b[1m than\u2028ever \ufeff\U0001f600', DAY)
    assert path.read_text('utf-8') == f'''{HEAD}rows:
  b:
    date: '2026-11-21'
    reason: "worse than ever \U0001f600"
  a:
    date: '2026-11-21'
    reason: "it's \\"bad\\": #1"
'''
    for each in (quarantine, Quarantine.load(path)):
        assert each.reason_for('a') == 'it\'s "bad": #1'
        assert each.rows['b'] == Entry('2026-11-21',
                                       'worse than ever \U0001f600')


def test_add_keeps_what_is_there(path: Path) -> None:
    '''Comments, margins and the rows of others stay as they are.'''
    before = (f'{HEAD}rows:  # known\n    # of a\n    a:\n'
              '      reason: old\n      date: 2026-01-31\n# end\n')
    path.write_text(before, encoding='utf-8')
    quarantine = Quarantine(path, {})
    quarantine.add('a', 'new', DAY)
    assert path.read_text('utf-8') == before
    assert quarantine.reason_for('a') == 'old'
    quarantine.add('b', 'x' * 1000, DAY)
    text = path.read_text('utf-8')
    begin, end = before.split('    # of a', 1)
    assert text.startswith(f'{begin}    b:\n      date: ')
    assert text.endswith(f'    # of a{end}')
    assert sorted(Quarantine.load(path).rows) == ['a', 'b']


def test_rows_before_schema(path: Path) -> None:
    '''Keys may stand in any order.'''
    path.write_text('rows: {}  # none\nschema: 1\n', encoding='utf-8')
    Quarantine.load(path).add('a', '', DAY)
    assert Quarantine.load(path).rows == {
        'a': Entry('2026-11-21', 'no reason given')}


def test_add_refuses(path: Path) -> None:
    '''What it can't add leaves the file as it was.'''
    for text, name, error in (
            (path.read_text('utf-8'), 'A row', 'expected the name of a row'),
            (f'{HEAD}rows: {{a: {{date: "2026-01-31", reason: b}}}}\n', 'c',
             'quarantine.yaml:4: can\'t add a row to rows in braces')):
        path.write_text(text, encoding='utf-8')
        with pytest.raises(InputError, match=error):
            Quarantine.load(path).add(name, 'why', DAY)
        assert path.read_text('utf-8') == text
        assert [each.name for each in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize('text, error', [
    ('', '1: the file is empty'),
    ('schema: 1\n', "1: missing key 'rows'"),
    ('rows: {}\n', "1: missing key 'schema'"),
    ('schema: 2\nrows: {}\n', '1: expected schema 1, found the number'),
    ('schema: "1"\nrows: {}\n', '1: expected schema 1, found the string'),
    ('schema: 1\nrows:\n', '2: expected a mapping, found the empty value'),
    ('schema: 1\nrows: []\n', '2: expected a mapping, found a list'),
    ('schema: 1\nrow: {}\n', "2: unknown key 'row', did you mean 'rows'"),
    ('schema: 1\nrows:\n  a: old\n', '3: expected a mapping'),
    ('schema: 1\nrows:\n  a: {date: "2026-01-31"}\n',
     "3: missing key 'reason'"),
    ('schema: 1\nrows:\n  a: {reason: b}\n', "3: missing key 'date'"),
    ('schema: 1\nrows:\n  a:\n    date: 2026-01-31\n    reason: ""\n',
     '5: expected a reason'),
    ('schema: 1\nrows:\n  a:\n    date: yesterday\n    reason: b\n',
     "4: expected a date like '2026-01-31', found the string 'yesterday'"),
    ('schema: 1\nrows:\n  a:\n    date: "2026-02-30"\n    reason: b\n',
     "4: expected a day that there is, found '2026-02-30'"),
    ('schema: 1\nrows:\n  a b: {date: "2026-01-31", reason: c}\n',
     "3: expected the name of a row, found 'a b'"),
    ('schema: 1\nrows:\n  a: {date: "2026-01-31", reason: b, who: c}\n',
     "3: unknown key 'who'"),
    ('schema: 1\nrows:\n  a: {date: "2026-01-31", reason: b}\n'
     '  a: {date: "2026-01-31", reason: b}\n', "4: duplicate key 'a'"),
    ('schema: 1\nrows: {\n', 'not valid YAML'),
])
def test_bad_files(path: Path, text: str, error: str) -> None:
    '''What is not as expected is an error that says where.'''
    path.write_text(text, encoding='utf-8')
    with pytest.raises(InputError) as caught:
        Quarantine.load(path)
    assert str(path) in str(caught.value)
    assert error in str(caught.value)


def test_unreadable(tmp_path: Path) -> None:
    '''A file that is missing or no text is an error, too.'''
    path = tmp_path / 'quarantine.yaml'
    with pytest.raises(InputError, match='expected the rows in quarantine'):
        Quarantine.load(path)
    path.write_bytes(b'schema: \xff\n')
    with pytest.raises(InputError, match='expected the rows in quarantine'):
        Quarantine.load(path)
