# SPDX-License-Identifier: GPL-2.0-or-later
'''
YAML text as nodes that know their lines, and the values that they stand for

Whatever is not as expected is a RegistryError that gives file, line and
image. PyYAML is imported only when there is text to read.
'''

import difflib
import gc
import re
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import (
    Any,
    Callable,
    Dict,
    Iterable,
    Iterator,
    List,
    NoReturn,
    Optional,
    Tuple,
    TypeVar,
)

from .error import RegistryError, YAMLMissingError


# Bounds that no honest file reaches, so that a broken one ends in time:
# 10,000 images for an architecture each are 15 MB
MAX_BYTES = 32 << 20
MAX_DEPTH = 16
MAX_LENGTH = 200

# YAML takes more characters for the end of a line than an editor does
_ODD_ENDS = re.compile('[\r\x85\u2028\u2029\ufeff]')


# -- Places and messages ----------------------------------------------------

@dataclass(frozen=True)
class Place:
    '''Where in the registry a value stands; travels with it into errors'''
    file: str
    line: Optional[int] = None
    image: Optional[str] = None
    arch: Optional[str] = None

    def error(self, what: str) -> RegistryError:
        '''The error to raise for a value at this place'''
        where = self.file if self.line is None else f'{self.file}:{self.line}'
        if self.image is not None:
            where += f": In image '{self.image}'"
            if self.arch is not None:
                where += f", architecture '{self.arch}'"
        return RegistryError(f'{where}: {what}')


def listed(names: Iterable[str]) -> str:
    '''Names as they go into a message'''
    return ', '.join(names) or 'none'


def suggestion(name: str, known: Iterable[str]) -> str:
    '''What may have been meant by @name, else all that is @known'''
    known = list(known)
    near = difflib.get_close_matches(name, known, n=2)
    if near:
        return 'did you mean ' + ' or '.join(f"'{n}'" for n in near) + '?'
    return f'expected one of: {listed(known)}'


def shown(text: str) -> str:
    '''A value from the file as it goes into a message'''
    return repr(text if len(text) <= 80 else text[:77] + '...')


# -- From text to nodes -----------------------------------------------------

@dataclass
class Node:  # pylint: disable=too-many-instance-attributes
    '''
    A value of the YAML text. @start and @end are offsets into the text,
    @line (from 1) and @key_start are those of its key if it has one.
    '''
    kind: str                       # mapping, sequence, scalar
    line: int
    start: int
    end: int
    pairs: Dict[str, 'Node']
    items: List['Node']
    text: str = ''
    type: str = ''                  # of a scalar, in words: a string...
    flow: bool = False
    key_start: int = 0
    one_line: bool = True

    def __str__(self) -> str:
        if self.kind == 'mapping':
            return 'a mapping'
        if self.kind == 'sequence':
            return 'a list'
        return f'{self.type} {shown(self.text)}'


_TYPES = {
    'tag:yaml.org,2002:str': 'the string',
    'tag:yaml.org,2002:int': 'the number',
    'tag:yaml.org,2002:float': 'the number',
    'tag:yaml.org,2002:bool': 'the boolean',
    'tag:yaml.org,2002:null': 'the empty value',
    'tag:yaml.org,2002:timestamp': 'the date',
}


class _Composer:
    '''
    Makes nodes of PyYAML's events, and refuses whatever a registry has no
    use for: several documents, tags, anchors, aliases, duplicate keys
    '''
    def __init__(self, yaml: Any, text: str, place: Place) -> None:
        self.yaml = yaml
        self.place = place
        self.depth = 0
        # The same in C is ten times as fast
        self.loader = getattr(yaml, 'CSafeLoader', yaml.SafeLoader)(text)
        # Most of what images say others say as well
        self.types: Dict[Tuple[str, Tuple[bool, bool]], str] = {}

    def fail(self, line: int, what: str) -> NoReturn:
        '''Raise the error for a line of the file'''
        raise replace(self.place, line=line).error(what)

    def document(self) -> Node:
        '''Returns the root of the only document'''
        try:
            self.loader.get_event()
            if self.loader.check_event(self.yaml.StreamEndEvent):
                self.fail(1, 'the file is empty')
            self.loader.get_event()
            root = self.node()
            self.loader.get_event()
            if not self.loader.check_event(self.yaml.StreamEndEvent):
                line = self.loader.peek_event().start_mark.line + 1
                self.fail(line, 'a second document, expected only one')
            return root
        finally:
            self.loader.dispose()

    def node(self) -> Node:
        '''Returns the next node and all that is in it'''
        event = self.loader.get_event()
        line = event.start_mark.line + 1
        if isinstance(event, self.yaml.AliasEvent):
            self.fail(line, f"alias '*{event.anchor}' is not allowed")
        if event.anchor is not None:
            self.fail(line, f"anchor '&{event.anchor}' is not allowed")
        if event.tag is not None:
            self.fail(line, f"tag '{event.tag}' is not allowed")

        node = Node('scalar', line, event.start_mark.index,
                    event.end_mark.index, {}, [])
        if isinstance(event, self.yaml.ScalarEvent):
            self.scalar(node, event)
            return node
        self.depth += 1
        if self.depth > MAX_DEPTH:
            self.fail(line, f'more than {MAX_DEPTH} levels deep')
        node.flow = bool(event.flow_style)
        if isinstance(event, self.yaml.MappingStartEvent):
            self.mapping(node)
        else:
            self.sequence(node)
        self.loader.get_event()
        self.depth -= 1
        return node

    def scalar(self, node: Node, event: Any) -> None:
        '''Fill in a scalar'''
        node.text = event.value
        key = (event.value, event.implicit)
        if key not in self.types:
            tag = self.loader.resolve(self.yaml.ScalarNode, *key)
            self.types[key] = _TYPES.get(tag, 'the special value')
        node.type = self.types[key]
        node.one_line = event.start_mark.line == event.end_mark.line

    def mapping(self, node: Node) -> None:
        '''Fill in a mapping'''
        node.kind = 'mapping'
        while not self.loader.check_event(self.yaml.MappingEndEvent):
            key = self.node()
            if key.type != 'the string':
                self.fail(key.line, f'expected a string as key, found {key}')
            if key.text in node.pairs:
                first = node.pairs[key.text].line
                self.fail(key.line, f'duplicate key {shown(key.text)}, '
                                    f'first in line {first}')
            value = self.node()
            value.line = key.line
            value.key_start = key.start
            node.pairs[key.text] = value

    def sequence(self, node: Node) -> None:
        '''Fill in a list'''
        node.kind = 'sequence'
        while not self.loader.check_event(self.yaml.SequenceEndEvent):
            node.items.append(self.node())


@contextmanager
def no_collection() -> Iterator[None]:
    '''
    While much is made and nothing thrown away, looking for garbage again
    and again takes half of the time.
    '''
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def compose(text: str, place: Place) -> Node:
    '''
    @params text: YAML
    @params place: the file it is from

    Returns the root of its only document. Raises RegistryError, or
    YAMLMissingError (a ModuleNotFoundError too)
    '''
    try:
        import yaml  # pylint: disable=import-outside-toplevel
    except ModuleNotFoundError as e:
        raise YAMLMissingError(
            'the Python module yaml (PyYAML) is not installed',
            next_step='install it: apt install python3-yaml, '
                      'or pip install pyyaml') from e

    if len(text) > MAX_BYTES:
        raise place.error(f'larger than {MAX_BYTES} bytes')
    odd = _ODD_ENDS.search(text)
    if odd is not None:
        line = text.count('\n', 0, odd.start()) + 1
        raise replace(place, line=line).error(
            f'character U+{ord(odd.group()):04X}, '
            'expected lines that end in LF alone')
    try:
        return _Composer(yaml, text, place).document()
    except yaml.MarkedYAMLError as e:
        mark = e.problem_mark or e.context_mark
        if mark is not None:
            place = replace(place, line=mark.line + 1)
        raise place.error(
            f'not valid YAML: {e.problem or e.context}') from e
    except (yaml.YAMLError, UnicodeError) as e:
        raise place.error(f'not valid YAML: {e}') from e


# -- From nodes to values ---------------------------------------------------

T = TypeVar('T')
Read = Callable[[Node, Place], T]


def fields(node: Node, place: Place, required: Tuple[str, ...],
           optional: Tuple[str, ...] = ()) -> Dict[str, Node]:
    '''The values of a mapping whose keys are known beforehand'''
    pairs = mapping(node, place)
    for key, value in pairs.items():
        if key not in required + optional:
            raise replace(place, line=value.line).error(
                f'unknown key {shown(key)}, '
                + suggestion(key, required + optional))
    for key in required:
        if key not in pairs:
            raise replace(place, line=node.line).error(
                f"missing key '{key}'")
    return pairs


def mapping(node: Node, place: Place) -> Dict[str, Node]:
    '''The values of a mapping, by key'''
    if node.kind != 'mapping':
        raise replace(place, line=node.line).error(
            f'expected a mapping, found {node}')
    return node.pairs


def items(node: Node, place: Place, read: Read[T]) -> Tuple[T, ...]:
    '''The values of a list, each of which @read takes from its node'''
    if node.kind != 'sequence':
        raise replace(place, line=node.line).error(
            f'expected a list, found {node}')
    return tuple(read(item, place) for item in node.items)


def _scalar(node: Node, place: Place, types: Tuple[str, ...],
            pattern: 're.Pattern[str]', expected: str) -> str:
    '''The text of a scalar, which is on one line and matches @pattern'''
    if (node.kind != 'scalar' or node.type not in types
            or not pattern.fullmatch(node.text)
            or len(node.text) > MAX_LENGTH):
        raise replace(place, line=node.line).error(
            f'expected {expected}, found {node}')
    if not node.one_line:
        raise replace(place, line=node.line).error(
            f'expected {expected} on one line')
    return node.text


STRING = ('the string',)
NUMBER = ('the number',)


def reads(types: Tuple[str, ...], pattern: 're.Pattern[str]',
          expected: str) -> Read[str]:
    '''A function that reads a scalar as _scalar() does'''
    def read(node: Node, place: Place) -> str:
        return _scalar(node, place, types, pattern, expected)
    return read
