# SPDX-License-Identifier: GPL-2.0-or-later
'''What may differ between versions: what is declared, and what is told.'''

from pathlib import Path
from typing import Dict, List, Tuple

import pytest

from mkosi_build import differences
from mkosi_build.differences import (
    ABSENT,
    Difference,
    Json,
    Judgement,
    Range,
    Version,
)
from mkosi_build.error import InputError

ROOT = Path(__file__).resolve().parents[2]
DECLARED = ROOT / 'tests/functional/mkosi/hosts/differences.yaml'
OLD, NEW = Version(7, 2, 22), Version(10, 0, 13)

TEXT = '''\
schema: 1
differences:
  - assertion: 'info *'
    versions: '<8.0'
    field: children
    absent: true
    reason: >-
      nobody told it
      of children
  - assertion: map zlib
    versions: 7.2
    field: '*.depth'
    expect: 1
    reason: it counts from one
  - assertion: 'x86_64/* HotPlug.test'
    versions: '>=7 <9'
    expect: skipped
    reason: it has no such device
  - assertion: check broken
    versions: '<10.1'
    skip: true
    reason: it crashes now and then
'''


def load(tmp_path: Path, text: str) -> Tuple[Difference, ...]:
    '''Read the text as a file of differences.'''
    path = tmp_path / 'differences.yaml'
    path.write_bytes(text.encode())
    return differences.load(path)


@pytest.fixture(name='declared')
def fixture_declared(tmp_path: Path) -> Tuple[Difference, ...]:
    '''What the text declares.'''
    return load(tmp_path, TEXT)


def judge(assertion: str, baseline: Json, found: Json,
          declared: Tuple[Difference, ...] = (),
          comparator: str = 'exact') -> Judgement:
    '''Judge what the old version said by what the new one says.'''
    return differences.judge(assertion, comparator, baseline, NEW, found,
                             OLD, declared)


# Versions

@pytest.mark.parametrize('text, version', [
    ('10.0.13', (10, 0, 13)),
    ('qemu-img version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18+b3)\n'
     'Copyright (c) 2003-2022 Fabrice Bellard', (7, 2, 22)),
    ('QEMU emulator version 11.1.3 (v11.1.3-dirty)', (11, 1, 3)),
    ('qemu-img version 10.1.0 (qemu-kvm-10.1.0-8.el10)', (10, 1, 0))])
def test_version_is_found(text: str, version: Tuple[int, ...]) -> None:
    '''In all that a program says of itself.'''
    assert Version.parse(text) == version
    assert str(Version(*version)) == '.'.join(map(str, version))


@pytest.mark.parametrize('text', ['', '10.0', 'version ten', '1:7.2+dfsg'])
def test_no_version(text: str) -> None:
    '''Less than three numbers are none.'''
    with pytest.raises(InputError, match='expected a version like 10.0.2'):
        Version.parse(text)


def test_versions_have_an_order() -> None:
    '''That of numbers, not of text.'''
    assert Version(9, 2, 0) < Version(10, 0, 2) < Version(10, 0, 13)


@pytest.mark.parametrize('text, inside, outside', [
    ('7.2', '7.2.0 7.2.22', '7.1.9 7.20.0 8.0.0'),
    ('10', '10.0.0 10.9.9', '1.0.0 11.0.0'),
    ('10.0.2', '10.0.2', '10.0.13 10.0.20'),
    ('<8.0', '7.2.22 0.0.1', '8.0.0 10.0.2'),
    ('<=7.2', '7.2.22 6.0.0', '7.3.0 10.0.0'),
    ('>7.2', '7.3.0 10.0.0', '7.2.22 7.2.0'),
    ('>=10.0.13', '10.0.13 11.0.0', '10.0.2 9.2.4'),
    ('>=8.2 <10.1', '8.2.0 10.0.13', '8.1.9 10.1.0'),
    (' >=8.2   <10.1 ', '9.0.0', '7.0.0')])
def test_range(text: str, inside: str, outside: str) -> None:
    '''All bounds hold; a short one stands for all that begin with it.'''
    known = Range.parse(text)
    assert all(Version.parse(v) in known for v in inside.split())
    assert not any(Version.parse(v) in known for v in outside.split())
    assert str(known) == ' '.join(text.split())


@pytest.mark.parametrize('text, said', [
    ('', 'no version is in the range'),
    ('>=9 <8', 'no version is in the range'),
    ('>7.2 <7.3', 'no version is in the range'),
    ('7.2 8.2', 'no version is in the range'),
    ('before 8.0', 'expected a range'), ('<8.0,>7', 'expected a range'),
    ('=7.2', 'expected a range'), ('7.x', 'expected a range'),
    ('10.0.2.1', 'expected a range'), ('< 8', 'expected a range')])
def test_no_range(text: str, said: str) -> None:
    '''What holds no version is a mistake, too.'''
    with pytest.raises(InputError, match=said):
        Range.parse(text)


# The file

def test_all_that_is_declared_arrives(
        declared: Tuple[Difference, ...]) -> None:
    '''With its place, for whoever has to change it.'''
    assert declared[0] == Difference(
        'info *', Range.parse('<8.0'), 'children', 'absent', None,
        'nobody told it of children', 'differences.yaml:3')
    assert declared[1].expect == 1
    assert declared[2].field == ''
    assert [each.kind for each in declared] == [
        'absent', 'expect', 'expect', 'skip']
    assert [each.place for each in declared] == [
        f'differences.yaml:{line}' for line in (3, 10, 15, 19)]
    assert len(set(declared)) == 4


@pytest.mark.parametrize('text, value', [
    ('null', None), ('true', True), ('12', 12), ("'12'", '12'),
    ('{a: [1, x, {}], b: {c: false}}', {'a': [1, 'x', {}],
                                        'b': {'c': False}}),
    ('1.5', 1.5), ('', None)])
def test_expected_value_is_as_in_json(tmp_path: Path, text: str,
                                      value: Json) -> None:
    '''Any value may be expected, nothing but null for nothing.'''
    changed = TEXT.replace('expect: 1\n', f'expect: {text}\n')
    if not text:
        changed = changed.replace('expect: \n', 'expect: null\n')
    assert load(tmp_path, changed)[1].expect == value


MALFORMED: Dict[str, Tuple[str, str, str]] = {
    'no schema': ('schema: 1\n', '', "1: missing key 'schema'"),
    'other schema': ('schema: 1', 'schema: 2',
                     '1: expected schema 1, found the number'),
    'schema in words': ('schema: 1', 'schema: one',
                        '1: expected the number 1'),
    'unknown key': ('absent: true', 'missing: true',
                    "6: unknown key 'missing'"),
    'unknown top key': ('schema: 1', 'schema: 1\nschemes: 2',
                        "2: unknown key 'schemes'"),
    'no assertion': ("assertion: 'info *'\n    versions", 'versions',
                     "3: missing key 'assertion'"),
    'no reason': ('    reason: it counts from one\n', '',
                  "10: missing key 'reason'"),
    'empty reason': ('reason: it counts from one', "reason: ''",
                     '14: expected the reason'),
    'number as reason': ('reason: it counts from one', 'reason: 1',
                         '14: expected the reason'),
    'no versions': ("    versions: '<8.0'\n", '',
                    "3: missing key 'versions'"),
    'no range': ("'<8.0'", 'early ones', '4: expected a range of versions'),
    'empty range': ("'>=7 <9'", "'>=9 <7'",
                    '16: no version is in the range'),
    'list of versions': ("'<8.0'", '[7.2]', '4: expected a range'),
    'no kind': ('    skip: true\n', '',
                '19: expected one of expect, absent and skip, found none'),
    'two kinds': ('skip: true', 'skip: true\n    expect: 1',
                  'absent and skip, found expect and skip'),
    'false': ('skip: true', 'skip: false', '21: expected true'),
    'not boolean': ('absent: true', 'absent: 1', '6: expected true'),
    'field with a gap': ("'*.depth'", 'a..b', '12: expected a path'),
    'empty field': ("'*.depth'", "''", '12: expected a path'),
    'empty name': ('map zlib', "''", '10: expected a pattern'),
    'odd value': ('expect: 1', 'expect: 0x10',
                  '13: expected a value as in JSON'),
    'no list': (TEXT[TEXT.index('\n  - '):], ' none\n',
                '2: expected a list'),
    'no mapping': (TEXT, '- schema: 1\n', '1: expected a mapping'),
    'text for a mapping': ('  - assertion: map', '  - text\n'
                           '  - assertion: map', '10: expected a mapping'),
    'key twice': ('skip: true', 'skip: true\n    skip: true',
                  "22: duplicate key 'skip'"),
    'alias': ('expect: 1', 'expect: *one', '13: alias'),
    'no YAML': ('skip: true', 'skip: [', 'not valid YAML'),
    'empty': (TEXT, '', '1: the file is empty'),
    'declared twice': (TEXT[TEXT.index('  - assertion: check'):],
                       TEXT[TEXT.index('  - assertion: map'):
                            TEXT.index("  - assertion: 'x86")],
                       '19: declared twice, first at differences.yaml:10'),
}


@pytest.mark.parametrize('name', MALFORMED)
def test_malformed_file_is_refused(tmp_path: Path, name: str) -> None:
    '''With file and line, and what was expected.'''
    old, new, said = MALFORMED[name]
    assert TEXT.count(old) == 1
    with pytest.raises(InputError) as caught:
        load(tmp_path, TEXT.replace(old, new))
    assert str(caught.value).startswith('differences.yaml:')
    assert said in str(caught.value)


def test_unreadable_file_is_refused(tmp_path: Path) -> None:
    '''Whether it is not there or not text.'''
    with pytest.raises(InputError, match='cannot be read: No such file'):
        differences.load(tmp_path / 'none')
    (tmp_path / 'bytes').write_bytes(b'schema: 1\n# \xff\n')
    with pytest.raises(InputError, match='bytes:2: not UTF-8'):
        differences.load(tmp_path / 'bytes')


# Comparators

VALUE: Json = {'a': 1, 'list': [{'b': True}, {'b': False}], 'text': 'x'}
MORE: Json = {'a': 1, 'list': [{'b': True, 'c': 2}, {'b': False}],
              'text': 'x', 'new': {}}


@pytest.mark.parametrize('comparator', sorted(differences.COMPARATORS))
def test_same_value(comparator: str) -> None:
    '''Is the same to each comparator, and nothing is said.'''
    assert judge('info a', VALUE, VALUE, comparator=comparator) == (
        differences.Verdict('info a', 'same', ''), ())


def test_subset_takes_more() -> None:
    '''Fields that the baseline does not have, at any depth.'''
    assert judge('a', VALUE, MORE, comparator='subset')[0].state == 'same'
    text = judge('a', VALUE, MORE)[0].text
    assert '@@ list.0.c @@\n-absent\n+2' in text
    assert '@@ new @@\n-absent\n+{}' in text


@pytest.mark.parametrize('comparator', sorted(differences.COMPARATORS))
@pytest.mark.parametrize('found, field', [
    ({**VALUE, 'a': True}, 'a'), ({**VALUE, 'a': 1.0}, 'a'),
    ({**VALUE, 'a': '1'}, 'a'), ({'a': 1, 'text': 'x'}, 'list'),
    ({**VALUE, 'list': [{'b': True}]}, 'list.1'),
    ({**VALUE, 'list': [{'b': True}, {'b': False}, 3]}, 'list.2'),
    ({**VALUE, 'list': {'0': {'b': True}, '1': {'b': False}}}, 'list'),
    ({**VALUE, 'text': None}, 'text'), ([], 'all'), (ABSENT, 'all')])
def test_other_value_differs(found: Json, field: str,
                             comparator: str) -> None:
    '''Of another type, too, and a longer list is no superset.'''
    verdict = judge('info a', VALUE, found, comparator=comparator)[0]
    assert verdict.state == 'differs'
    assert f'@@ {field} @@' in verdict.text


def test_absence_differs() -> None:
    '''Of a whole assertion, on either side, even from nothing.'''
    values: List[Json] = [{}, None, '', 'passed']
    for found in values:
        assert judge('a', ABSENT, found)[0].state == 'differs'
        assert judge('a', ABSENT, found,
                     comparator='subset')[0].state == 'differs'
    assert judge('a', ABSENT, ABSENT)[0].state == 'same'


# Verdicts

def test_undeclared_difference_is_a_readable_diff() -> None:
    '''It names assertion, field, both versions and both values.'''
    verdict, occurred = judge('info a', VALUE, {**VALUE, 'text': 'y'})
    assert verdict.text == '''\
info a: 7.2.22 differs from 10.0.13
--- 10.0.13 (baseline)
+++ 7.2.22
@@ text @@
-"x"
+"y"'''
    assert verdict.state == 'differs' and not occurred


def test_long_values_are_shown_by_line() -> None:
    '''With what is the same around what differs.'''
    lines = [f'line {number}' for number in range(30)]
    other = [*lines[:15], 'another', *lines[16:]]
    text = judge('a', '\n'.join(lines), '\n'.join(other))[0].text
    assert text.splitlines()[3:] == [
        '@@ all @@', ' line 13', ' line 14', '-line 15', '+another',
        ' line 16', ' line 17']


def test_same_difference_is_shown_once() -> None:
    '''With all the fields that have it; and of many, the first.'''
    text = judge('a', [{'b': 1}] * 9, [{'b': 2}] * 9)[0].text
    assert text.splitlines()[3:] == [
        '@@ 0.b, 1.b, 2.b, and 6 more @@', '-1', '+2']
    text = judge('a', list(range(20)), list(range(20, 40)))[0].text
    assert text.endswith('\n-11\n+31\nand 8 more differences')


def test_declared_difference_is_accepted(
        declared: Tuple[Difference, ...]) -> None:
    '''Its reason is told, with both versions and its place.'''
    verdict, occurred = judge('info a', {'children': [], 'a': 1}, {'a': 1},
                              declared)
    assert verdict.state == 'declared'
    assert verdict.text == ('info a: 7.2.22 against 10.0.13, children: '
                            'nobody told it of children '
                            '(differences.yaml:3)')
    assert occurred == (declared[0],)
    # Any step of a path, and the whole value
    assert judge('map zlib', [{'depth': 0}] * 3, [{'depth': 1}] * 3,
                 declared)[1] == (declared[1],)
    verdict, occurred = judge('x86_64/hotplug_blk HotPlug.test', 'passed',
                              'skipped', declared)
    assert verdict.state == 'declared' and occurred == (declared[2],)


@pytest.mark.parametrize('assertion, baseline, found, left', [
    # Another assertion, another field, another value
    ('create a', {'children': []}, {}, 'children'),
    ('info a', {'children': [], 'a': 1}, {'a': 2}, 'a'),
    ('info a', {'children': [1]}, {'children': [2]}, 'children.0'),
    ('info a', {'a': {'children': []}}, {'a': {}}, 'a.children'),
    ('map zlib', [{'depth': 0}], [{'depth': 2}], '0.depth'),
    ('map zlib', [{'depth': 0}], [{'depth': True}], '0.depth'),
    ('map zlib', [{'depth': 0}] * 2, [{'depth': 1}], '1'),
    ('x86_64/a HotPlug.test', 'passed', 'failed', 'all'),
    ('x86_64/a HotPlug.test', 'passed', ABSENT, 'all')])
def test_anything_else_differs(assertion: str, baseline: Json, found: Json,
                               left: str,
                               declared: Tuple[Difference, ...]) -> None:
    '''A declaration is for what it says alone.'''
    verdict = judge(assertion, baseline, found, declared)[0]
    assert verdict.state == 'differs'
    assert f'@@ {left} @@' in verdict.text


def test_other_value_than_declared_is_explained(
        declared: Tuple[Difference, ...]) -> None:
    '''The declaration was near, so it is named.'''
    text = judge('map zlib', [{'depth': 0}], [{'depth': 2}],
                 declared)[0].text
    assert text.endswith('\n0.depth: differences.yaml:10 declares 1, '
                         'found 2')


def test_other_version_differs(declared: Tuple[Difference, ...]) -> None:
    '''A declaration is for its versions alone.'''
    for version, state in ((Version(7, 2, 1), 'declared'),
                           (Version(8, 0, 0), 'differs')):
        verdict = differences.judge('info a', 'subset', {'children': []},
                                    NEW, {}, version, declared)[0]
        assert verdict.state == state


def test_skipped_value_is_not_compared(
        declared: Tuple[Difference, ...]) -> None:
    '''Its reason is told, with both versions.'''
    for found in (1, 2, ABSENT):
        verdict, occurred = judge('check broken', 1, found, declared)
        assert verdict.state == 'skipped' and occurred == (declared[3],)
        assert verdict.text == (
            'check broken: 7.2.22 against 10.0.13 not compared: it crashes '
            'now and then (differences.yaml:19)')


def test_skipped_field_is_not_compared(tmp_path: Path) -> None:
    '''All others are.'''
    declared = load(tmp_path, TEXT.replace('skip: true',
                                           'skip: true\n    field: a'))
    cases: List[Tuple[Json, str]] = [
        ({'a': 1, 'b': 1}, 'same'), ({'a': [2], 'b': 1}, 'declared'),
        ({'a': 2, 'b': 2}, 'differs')]
    for found, state in cases:
        verdict, occurred = judge('check broken', {'a': 1, 'b': 1}, found,
                                  declared)
        assert verdict.state == state and occurred == (declared[3],)
        assert 'a @@' not in verdict.text


def unused(declared: Tuple[Difference, ...], *tried: Tuple[str, Json, Json],
           version: Version = OLD) -> List[str]:
    '''The places of what does not occur in these assertions.'''
    occurred: List[Difference] = []
    for assertion, baseline, found in tried:
        occurred += differences.judge(assertion, 'exact', baseline, NEW,
                                      found, version, declared).occurred
    return [each.place for each in differences.unused(
        declared, occurred, [(name, version) for name, _, _ in tried])]


def test_what_no_longer_occurs_is_told(
        declared: Tuple[Difference, ...]) -> None:
    '''If an assertion and a version were tried that it is about.'''
    same: Json = {'children': []}
    assert unused(declared, ('info a', same, same)) == ['differences.yaml:3']
    assert not unused(declared, ('info a', same, same),
                      ('info b', same, {}))
    assert not unused(declared, ('create a', same, same))
    assert not unused(declared, ('info a', same, same), version=NEW)
    # It says another value: neither does this one occur
    assert unused(declared, ('info a', same, {'children': [1]})) == [
        'differences.yaml:3']
    # Whoever does not compare can't tell
    assert not unused(declared, ('check broken', 1, 1))


def test_declared_differences_are_well_formed() -> None:
    '''Those of the tree.'''
    declared = differences.load(DECLARED)
    assert declared
    assert all(len(each.reason) > 20 for each in declared)
