# SPDX-License-Identifier: GPL-2.0-or-later
'''
What may differ between versions of QEMU. An assertion has a name and a
value for each version; its value is that of the baseline, unless the file
differences.yaml declares the difference, with its versions and a reason.

What differs and is not declared is told, and so is what is declared and
does not differ any more.
'''

import difflib
import fnmatch
import json
import operator
import re
from dataclasses import dataclass, field as dataclass_field, replace
from pathlib import Path
from typing import (
    Any,
    Callable,
    Dict,
    Iterable,
    Iterator,
    List,
    Mapping,
    NamedTuple,
    Optional,
    Tuple,
)

from .error import InputError, RegistryError
from .nodes import (
    NUMBER,
    STRING,
    Node,
    Place,
    compose,
    fields,
    items,
    mapping,
    reads,
    shown,
)

SCHEMA = 1
# What json.loads() returns
Json = Any
# How many differences are shown of one assertion
MAX_SHOWN = 12
# Kinds of declarations: the value there, that there is none, or that
# whatever is there is not compared
KINDS = ('expect', 'absent', 'skip')


class _Absent:
    '''The only value that is no value.'''

    def __repr__(self) -> str:
        return 'absent'


ABSENT = _Absent()


# -- Versions ---------------------------------------------------------------

class Version(NamedTuple):
    '''A version of QEMU.'''
    major: int
    minor: int
    micro: int

    @classmethod
    def parse(cls, text: str) -> 'Version':
        '''
        The version that is the first in @text, which may be all that a
        program says of itself. Raises InputError where there is none.
        '''
        match = re.search(r'(?<![\d.])(\d+)\.(\d+)\.(\d+)', text)
        if match is None:
            raise InputError('expected a version like 10.0.2, found '
                             f'{shown(text)}')
        return cls(*map(int, match.groups()))

    def __str__(self) -> str:
        return '.'.join(map(str, self))


_BOUND = re.compile(r'(<|<=|>|>=|)(\d+(?:\.\d+){0,2})')
_OPERATORS: Dict[str, Callable[[Any, Any], Any]] = {
    '<': operator.lt, '<=': operator.le, '>': operator.gt,
    '>=': operator.ge, '': operator.eq}


@dataclass(frozen=True)
class Range:
    '''
    Versions within all of some bounds. A bound of less than three numbers
    stands for all versions that begin with them: 7.2 holds 7.2.22, and so
    does <=7.2, but not >7.2.
    '''
    text: str
    bounds: Tuple[Tuple[str, Tuple[int, ...]], ...]

    @classmethod
    def parse(cls, text: str) -> 'Range':
        '''
        The range for a @text like '>=8.2 <10.1'. Raises InputError where
        it is none, or where no version can be within it.
        '''
        bounds = []
        for word in text.split():
            match = _BOUND.fullmatch(word)
            if match is None:
                raise InputError('expected a range of versions like '
                                 f"'>=8.2 <10.1', found {shown(text)}")
            bounds.append((match[1], tuple(map(int, match[2].split('.')))))
        known = cls(' '.join(text.split()), tuple(bounds))
        if not bounds or not any(v in known for v in known._lowest()):
            raise InputError(f'no version is in the range {shown(text)}')
        return known

    def _lowest(self) -> Iterator[Version]:
        # The lowest version of a range is 0, that of a bound, or next to it
        yield Version(0, 0, 0)
        for _, numbers in self.bounds:
            for first in (numbers, (*numbers[:-1], numbers[-1] + 1)):
                yield Version(*(first + (0, 0))[:3])

    def __contains__(self, version: Version) -> bool:
        return all(_OPERATORS[name](version[:len(numbers)], numbers)
                   for name, numbers in self.bounds)

    def __str__(self) -> str:
        return self.text


# -- What is declared -------------------------------------------------------

@dataclass(frozen=True)
class Difference:
    '''
    That the assertions whose names match the pattern @assertion differ
    from the baseline in @versions, at the dotted path @field ('' is the
    whole value, '*' any one step). By @kind, the value there is @expect,
    or there is none, or it is not compared at all. @place is FILE:LINE.
    '''
    assertion: str
    versions: Range
    field: str
    kind: str
    expect: Json = dataclass_field(hash=False)
    reason: str
    place: str

    def applies(self, assertion: str, version: Version) -> bool:
        '''Whether it is about the @assertion in this @version.'''
        return (fnmatch.fnmatchcase(assertion, self.assertion)
                and version in self.versions)

    def covers(self, path: Tuple[str, ...]) -> bool:
        '''Whether it is about the value at @path.'''
        steps = _steps(self.field)
        return (len(steps) == len(path)
                and all(step in ('*', name)
                        for step, name in zip(steps, path)))


def _steps(field: str) -> Tuple[str, ...]:
    return tuple(field.split('.')) if field else ()


def load(path: Path) -> Tuple[Difference, ...]:
    '''
    What the file @path declares. Raises InputError with file and line, or
    YAMLMissingError.
    '''
    try:
        text = path.read_bytes().decode('utf-8')
    except OSError as e:
        raise InputError(f'{path}: cannot be read: {e.strerror}') from e
    except UnicodeDecodeError as e:
        line = e.object.count(b'\n', 0, e.start) + 1
        raise InputError(f'{path.name}:{line}: not UTF-8') from e
    place = Place(path.name)
    root = compose(text, place)
    # The schema first: another one may well have other keys
    schema = mapping(root, place).get('schema')
    if schema is not None and _read_schema(schema, place) != str(SCHEMA):
        raise replace(place, line=schema.line).error(
            f'expected schema {SCHEMA}, found {schema}')
    pairs = fields(root, place, ('schema', 'differences'))
    declared = items(pairs['differences'], place, _read_difference)
    _refuse_twice(declared)
    return declared


def _refuse_twice(declared: Tuple[Difference, ...]) -> None:
    seen: Dict[Tuple[str, str, str], Difference] = {}
    for each in declared:
        key = (each.assertion, each.field, each.versions.text)
        first = seen.setdefault(key, each)
        if first is not each:
            raise RegistryError(f'{each.place}: declared twice, first at '
                                f'{first.place}')


_read_schema = reads(NUMBER, re.compile(r'\d+'), f'the number {SCHEMA}')
_read_name = reads(STRING, re.compile(r'[ -~]+'),
                   'a pattern of names of assertions')
# Of digits alone it is a number to YAML
_read_versions = reads(STRING + NUMBER, re.compile(r'.*'),
                       "a range of versions like '>=8.2 <10.1'")
_read_field = reads(STRING + NUMBER,
                    re.compile(r'[^\s.]+(?: [^\s.]+)*'
                               r'(?:\.[^\s.]+(?: [^\s.]+)*)*'),
                    'a path like format-specific.data.*')
_read_true = reads(('the boolean',), re.compile('true'), 'true')


def _read_difference(node: Node, place: Place) -> Difference:
    pairs = fields(node, place, ('assertion', 'versions', 'reason'),
                   ('field', *KINDS))
    kinds = [kind for kind in KINDS if kind in pairs]
    if len(kinds) != 1:
        raise replace(place, line=node.line).error(
            'expected one of expect, absent and skip, found '
            + (' and '.join(kinds) or 'none'))
    expect = None
    if kinds[0] == 'expect':
        expect = _read_json(pairs['expect'], place)
    else:
        _read_true(pairs[kinds[0]], place)
    return Difference(
        assertion=_read_name(pairs['assertion'], place),
        versions=_read_range(pairs['versions'], place),
        field=_read_field(pairs['field'], place) if 'field' in pairs else '',
        kind=kinds[0], expect=expect,
        reason=_read_reason(pairs['reason'], place),
        place=f'{place.file}:{node.line}')


def _read_range(node: Node, place: Place) -> Range:
    text = _read_versions(node, place)
    try:
        return Range.parse(text)
    except InputError as e:
        raise replace(place, line=node.line).error(e.message) from e


def _read_reason(node: Node, place: Place) -> str:
    text = ' '.join(node.text.split())
    if node.kind != 'scalar' or node.type != 'the string' or not text:
        raise replace(place, line=node.line).error(
            f'expected the reason as a text, found {node}')
    return text


def _read_json(node: Node, place: Place) -> Json:
    '''The value that @node has in JSON.'''
    if node.kind == 'mapping':
        return {key: _read_json(value, place)
                for key, value in node.pairs.items()}
    if node.kind == 'sequence':
        return [_read_json(item, place) for item in node.items]
    if node.type == 'the string':
        return node.text
    try:
        # YAML has more ways to write a number than JSON, which none needs
        return json.loads('null' if node.type == 'the empty value'
                          else node.text)
    except ValueError as e:
        raise replace(place, line=node.line).error(
            f'expected a value as in JSON, found {node}') from e


# -- Comparators ------------------------------------------------------------

@dataclass(frozen=True)
class _Disagreement:
    '''What the baseline has and what was found at @path; ABSENT if none.'''
    path: Tuple[str, ...]
    baseline: Json
    found: Json


def _same(one: Json, other: Json) -> bool:
    if one is ABSENT or other is ABSENT:
        return one is other
    # To Python, true is 1, and 1 is 1.0
    return json.dumps(one, sort_keys=True) == json.dumps(other,
                                                         sort_keys=True)


def _children(value: Json) -> Optional[Dict[str, Json]]:
    if isinstance(value, dict):
        return value
    if isinstance(value, list):
        return {str(i): item for i, item in enumerate(value)}
    return None


def _exact(_baseline: Json, _key: str) -> bool:
    '''Everything that is found has to be in the baseline.'''
    return False


def _subset(baseline: Json, key: str) -> bool:
    '''Fields that the baseline does not have may be there.'''
    return isinstance(baseline, dict) and key not in baseline


# By name, whether what was found below @key may be passed over
COMPARATORS: Mapping[str, Callable[[Json, str], bool]] = {
    'exact': _exact, 'subset': _subset}


def _compare(more: Callable[[Json, str], bool], baseline: Json, found: Json,
             path: Tuple[str, ...] = ()) -> Iterator[_Disagreement]:
    '''What differs, as far down as both values have the same form.'''
    ours, theirs = _children(baseline), _children(found)
    if ours is None or theirs is None or type(baseline) is not type(found):
        if not _same(baseline, found):
            yield _Disagreement(path, baseline, found)
        return
    for key in [*ours, *(k for k in theirs if k not in ours)]:
        if not more(baseline, key):
            yield from _compare(more, ours.get(key, ABSENT),
                                theirs.get(key, ABSENT), (*path, key))


# -- Verdicts ---------------------------------------------------------------

@dataclass(frozen=True)
class Verdict:
    '''
    What came of an @assertion: its @state is 'same', 'declared', 'skipped'
    or 'differs', and @text says why, with both versions.
    '''
    assertion: str
    state: str
    text: str


class Judgement(NamedTuple):
    '''A verdict, and which of the declared differences there were.'''
    verdict: Verdict
    occurred: Tuple[Difference, ...]


def judge(assertion: str, comparator: str, baseline: Json,
          baseline_version: Version, found: Json, version: Version,
          declared: Iterable[Difference]) -> Judgement:
    '''
    Compare what was @found in @version with the @baseline. Either value
    may be ABSENT: one version has an assertion that the other has not.
    '''
    versions = f'{version} against {baseline_version}'
    applying = [d for d in declared if d.applies(assertion, version)]
    for each in applying:
        if each.kind == 'skip' and not each.field:
            return Judgement(Verdict(
                assertion, 'skipped', f'{assertion}: {versions} not '
                f'compared: {each.reason} ({each.place})'), (each,))
    left = list(_compare(COMPARATORS[comparator], baseline, found))
    # Whether what is not compared differs, nobody can tell
    occurred = [each for each in applying if each.kind == 'skip']
    if not left:
        return Judgement(Verdict(assertion, 'same', ''), tuple(occurred))
    left, met, hints = _allow(applying, found, left)
    occurred += [each for each in met if each not in occurred]
    if left:
        text = _told(assertion, left, hints, baseline_version, version)
        return Judgement(Verdict(assertion, 'differs', text),
                         tuple(occurred))
    text = '\n'.join(f'{assertion}: {versions}, {d.field or "all"}: '
                     f'{d.reason} ({d.place})' for d in occurred)
    return Judgement(Verdict(assertion, 'declared', text), tuple(occurred))


def unused(declared: Iterable[Difference], occurred: Iterable[Difference],
           tried: Iterable[Tuple[str, Version]]) -> List[Difference]:
    '''
    The @declared differences that no longer occur: they are about some
    assertion and version that was @tried, and are in none of those that
    @occurred.
    '''
    known = {each.place for each in occurred}
    tried = list(tried)
    return [each for each in declared if each.place not in known
            and any(each.applies(*one) for one in tried)]


def _below(path: Tuple[str, ...], tops: Iterable[Tuple[str, ...]]) -> bool:
    return any(path[:len(top)] == top for top in tops)


def _at(value: Json, path: Tuple[str, ...]) -> Json:
    for step in path:
        value = (_children(value) or {}).get(step, ABSENT)
    return value


def _allow(applying: Iterable[Difference], found: Json,
           left: List[_Disagreement],
           ) -> Tuple[List[_Disagreement], List[Difference], List[str]]:
    '''
    What is left of the disagreements, which declarations the others are
    met by, and hints about those that say something else.
    '''
    met, hints = [], []
    for each in applying:
        there, more = _explain(each, found, left)
        if there:
            left = [x for x in left if not _below(x.path, there)]
            met.append(each)
        hints += more
    return left, met, hints


def _explain(each: Difference, found: Json, left: List[_Disagreement],
             ) -> Tuple[List[Tuple[str, ...]], List[str]]:
    '''
    The paths whose difference is the declared one, and for those where
    another value was found, a hint.
    '''
    there, hints = [], []
    length = len(_steps(each.field))
    # What differs may be at the field or below it; each path once
    for path in dict.fromkeys(x.path[:length] for x in left):
        if not each.covers(path):
            continue
        value = _at(found, path)
        wanted = ABSENT if each.kind == 'absent' else each.expect
        if each.kind == 'skip' or _same(value, wanted):
            there.append(path)
        else:
            hints.append(f'{".".join(path) or "all"}: {each.place} declares '
                         f'{_brief(wanted)}, found {_brief(value)}')
    return there, hints


# -- Texts ------------------------------------------------------------------

def _brief(value: Json) -> str:
    return (repr(value) if value is ABSENT
            else json.dumps(value, sort_keys=True, ensure_ascii=False))


def _lines(value: Json) -> List[str]:
    if isinstance(value, str) and '\n' in value:
        return value.splitlines()
    text = _brief(value)
    if len(text) > 60 and value is not ABSENT:
        text = json.dumps(value, sort_keys=True, ensure_ascii=False,
                          indent=1)
    return text.splitlines()


def _diff(each: _Disagreement) -> Tuple[str, ...]:
    diff = difflib.unified_diff(_lines(each.baseline), _lines(each.found),
                                n=2, lineterm='')
    # Without its own headings
    return tuple(line for line in list(diff)[2:]
                 if not line.startswith('@@'))


def _grouped(left: List[_Disagreement],
             ) -> List[Tuple[Tuple[str, ...], List[str]]]:
    '''Each diff with the fields that have it.'''
    diffs: Dict[Tuple[str, ...], List[str]] = {}
    for each in left:
        diffs.setdefault(_diff(each), []).append('.'.join(each.path) or 'all')
    return list(diffs.items())


def _told(assertion: str, left: List[_Disagreement], hints: List[str],
          baseline: Version, version: Version) -> str:
    lines = [f'{assertion}: {version} differs from {baseline}',
             f'--- {baseline} (baseline)', f'+++ {version}']
    diffs = _grouped(left)
    for diff, paths in diffs[:MAX_SHOWN]:
        more = [f'and {len(paths) - 3} more'] if len(paths) > 3 else []
        lines += [f'@@ {", ".join(paths[:3] + more)} @@', *diff]
    if len(diffs) > MAX_SHOWN:
        lines.append(f'and {len(diffs) - MAX_SHOWN} more differences')
    return '\n'.join(lines + hints)
