# SPDX-License-Identifier: GPL-2.0-or-later
'''
The registry: which images there are, and the hashes that they must have

Shared by the builder and the functional tests, so nothing but PyYAML is
under it, and that is imported only when a registry is loaded. What load()
returns is complete and valid; everything else is a RegistryError that
gives file, line and image.
'''

import difflib
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import (
    Any,
    Callable,
    Dict,
    Iterable,
    Iterator,
    List,
    Mapping,
    NoReturn,
    Optional,
    Tuple,
    TypeVar,
)

from .error import HostError, InputError


DEFAULT = (Path(__file__).resolve().parents[2]
           / 'tests' / 'functional' / 'mkosi' / 'registry.yaml')

SCHEMA = 1

# QEMU's names of the targets that an image can be made for
ARCHITECTURES = ('x86_64', 'aarch64')

# The artefacts that each image has, and the forms that QEMU can use
FORMATS: Mapping[str, Tuple[str, ...]] = {
    'kernel': ('bzimage', 'image', 'image-gzip'),
    'initrd': ('cpio',),
    'disk': ('qcow2',),
}

# Bounds that no honest registry reaches, so that a broken one ends at once
_MAX_BYTES = 1 << 20
_MAX_DEPTH = 16
_MAX_LENGTH = 200

_NAME = re.compile(r'[a-z0-9][a-z0-9._-]*')
_FILE = re.compile(r'[A-Za-z0-9][A-Za-z0-9._-]*')
_HASH = re.compile(r'[0-9a-f]{64}')
_INTEGER = re.compile(r'[1-9][0-9]{0,14}')
_RATIO = re.compile(r'[0-9]{1,6}(\.[0-9]{1,6})?')
_DEVICE = re.compile(r'[A-Za-z0-9][A-Za-z0-9._-]*')
_ARGUMENT = re.compile(r'[!-~]+')
_LINE = re.compile(r'[ -~]*[!-~][ -~]*')
_STORE = re.compile(r'(https?|file)://[A-Za-z0-9._~:/%@+-]+')
_MIRROR = re.compile(
    r'(https?|file)://([A-Za-z0-9._~:/%@+-]|\{arch\})+')
# YAML takes more characters for the end of a line than an editor does
_ODD_ENDS = re.compile('[\r\x85\u2028\u2029\ufeff]')


class RegistryError(InputError):
    '''The registry is wrong, or lacks what was asked for'''


class YAMLMissingError(HostError, ModuleNotFoundError):
    '''PyYAML is not installed'''


@dataclass(frozen=True)
class Artefact:
    '''One file of an image; without @sha256 and @size it is not built yet'''
    kind: str
    file: str
    format: str
    sha256: Optional[str]
    size: Optional[int]


@dataclass(frozen=True)
class Boot:
    '''What a test needs to boot an image'''
    console: str
    cmdline: Tuple[str, ...]
    disk_cmdline: Tuple[str, ...]
    disk_device: str
    ready: str
    prompt: str


@dataclass(frozen=True)
class Budget:
    '''
    What an image may grow to: bytes, number of packages, and the time to
    the prompt as a ratio to the bare kernel's
    '''
    kernel_initrd_bytes: int
    disk_bytes: int
    packages: int
    initrd_boot_ratio: float
    disk_boot_ratio: float


@dataclass(frozen=True)
class Target:
    '''An image for one architecture; @artefacts by kind'''
    arch: str
    identity: Optional[str]
    artefacts: Mapping[str, Artefact]
    boot: Boot
    budget: Budget
    not_locked: Optional[str]

    @property
    def built(self) -> bool:
        '''Whether the registry has hashes for it'''
        return self.identity is not None


@dataclass(frozen=True)
class Image:
    '''
    An image; @definition is a folder beside the registry. @mirrors are
    base URLs of its distribution's repository, without a slash at the end;
    {arch} in them is the distribution's name of the architecture.
    '''
    name: str
    description: str
    definition: str
    distribution: str
    release: str
    targets: Mapping[str, Target]
    mirrors: Tuple[str, ...] = ()

    def target(self, arch: str) -> Target:
        '''
        @params arch: QEMU's name of a target

        Raises RegistryError if the image does not have it
        '''
        try:
            return self.targets[arch]
        except KeyError:
            raise RegistryError(
                f"In image '{self.name}': no architecture '{arch}', "
                f'there are: {_listed(self.targets)}') from None


@dataclass(frozen=True)
class Registry:
    '''A whole registry; @stores are base URLs, without a slash at the end'''
    path: Path
    stores: Tuple[str, ...]
    images: Mapping[str, Image]

    def image(self, name: str) -> Image:
        '''
        @params name: name of an image

        Raises RegistryError, with the nearest names, if there is none
        '''
        try:
            return self.images[name]
        except KeyError:
            raise RegistryError(
                f"{self.path.name}: unknown image '{name}', "
                + _suggestion(name, self.images)) from None


def load(path: Path) -> Registry:
    '''
    @params path: a registry file

    Returns what is in it; the same file is read only once in a process.
    Raises RegistryError, or YAMLMissingError (a ModuleNotFoundError too)
    '''
    try:
        with open(path, 'rb') as file:
            status = os.fstat(file.fileno())
            version = (status.st_ino, status.st_mtime_ns, status.st_ctime_ns,
                       status.st_size)
            known = _loaded.get(path)
            if known is not None and known[0] == version:
                return known[1]
            data = file.read(_MAX_BYTES + 1)
    except OSError as e:
        raise RegistryError(f'{path}: cannot be read: {e.strerror}') from e

    try:
        text = data.decode('utf-8')
    except UnicodeDecodeError as e:
        line = data.count(b'\n', 0, e.start) + 1
        raise RegistryError(f'{path.name}:{line}: not UTF-8') from e
    registry = _parse(path, text)
    _loaded[path] = (version, registry)
    return registry


_Version = Tuple[int, int, int, int]
_loaded: Dict[Path, Tuple[_Version, Registry]] = {}


def record(text: str, image: str, arch: str, identity: str,
           artefacts: Mapping[str, Tuple[str, int]]) -> str:
    '''
    @params text: a registry's text
    @params image: name of the image whose hashes are recorded
    @params arch: architecture whose hashes are recorded
    @params identity: digest of the inputs that the artefacts come from
    @params artefacts: SHA-256 and size in bytes, by kind

    Returns the text with these values replaced, or inserted where they
    are not there yet; 'not-locked' is gone, since now it is. All else
    stays as it is, comments and order too.
    Raises RegistryError if @text is not a valid registry or cannot
    take these values
    '''
    path = Path(DEFAULT.name)
    before = _parse(path, text)
    old = before.image(image)
    wanted = _with_hashes(old.target(arch), identity, artefacts)

    result = text
    for start, end, new in sorted(_edits(text, image, wanted), reverse=True):
        result = result[:start] + new + result[end:]

    # Text was edited, so only reading it back proves what it says now
    new_image = replace(old, targets={**old.targets, arch: wanted})
    images = {**before.images, image: new_image}
    if _parse(path, result) != replace(before, images=images):
        raise RegistryError(
            f"{path}: In image '{image}', architecture '{arch}': "
            'the hashes cannot be put in place',
            next_step='write one key a line, without quotes or braces')
    return result


def _with_hashes(target: Target, identity: str,
                 artefacts: Mapping[str, Tuple[str, int]]) -> Target:
    if set(artefacts) != set(target.artefacts):
        raise RegistryError(
            f'hashes given for: {_listed(artefacts)}; '
            f'expected for: {_listed(target.artefacts)}')
    return replace(target, identity=identity, not_locked=None, artefacts={
        kind: replace(artefact, sha256=artefacts[kind][0],
                      size=artefacts[kind][1])
        for kind, artefact in target.artefacts.items()})


def _edits(text: str, image: str,
           wanted: Target) -> Iterator[Tuple[int, int, str]]:
    root = _compose(text, _Place('registry.yaml'))
    node = root.pairs['images'].pairs[image]
    node = node.pairs['architectures'].pairs[wanted.arch]

    if 'not-locked' in node.pairs:
        yield _removed(text, node.pairs['not-locked'])
    if 'identity' in node.pairs:
        yield _replaced(node.pairs['identity'], str(wanted.identity))
    else:
        yield _inserted(text, node, [('identity', str(wanted.identity))])

    for kind, artefact in wanted.artefacts.items():
        values = {'size': str(artefact.size), 'sha256': str(artefact.sha256)}
        there = node.pairs['artefacts'].pairs[kind]
        if 'size' in there.pairs:
            for key, value in values.items():
                yield _replaced(there.pairs[key], value)
        else:
            yield _inserted(text, there, list(values.items()))


def _replaced(node: '_Node', value: str) -> Tuple[int, int, str]:
    return node.start, node.end, value


def _removed(text: str, node: '_Node') -> Tuple[int, int, str]:
    '''From its key to the end of the last line of its value'''
    start = text.rfind('\n', 0, node.key_start) + 1
    # A value of several lines ends where the next key begins
    end = text.find('\n', len(text[:node.end].rstrip()))
    return start, len(text) if end < 0 else end + 1, ''


def _inserted(text: str, node: '_Node',
              values: List[Tuple[str, str]]) -> Tuple[int, int, str]:
    '''
    Into a mapping of scalars behind its last line, into a mapping of
    mappings before its first line and the comments there
    '''
    nodes = list(node.pairs.values())
    lines = [f'{key}: {value}' for key, value in values]
    scalars = nodes[-1].kind == 'scalar'
    if node.flow:
        place = nodes[-1].end if scalars else nodes[0].key_start
        lines = [''] + lines if scalars else lines + ['']
        return place, place, ', '.join(lines)
    # A comment may follow on the line behind which this goes
    place = text.find('\n', nodes[-1].end if scalars else node.key_start)
    place = len(text) if place < 0 else place
    start = nodes[0].key_start
    indent = '\n' + ' ' * (start - text.rfind('\n', 0, start) - 1)
    return place, place, indent.join([''] + lines)


def _parse(path: Path, text: str) -> Registry:
    place = _Place(path.name)
    root = _compose(text, place)
    return _read_registry(path, root, place)


# -- Places and messages ----------------------------------------------------

@dataclass(frozen=True)
class _Place:
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


def _listed(names: Iterable[str]) -> str:
    return ', '.join(names) or 'none'


def _suggestion(name: str, known: Iterable[str]) -> str:
    known = list(known)
    near = difflib.get_close_matches(name, known, n=2)
    if near:
        return 'did you mean ' + ' or '.join(f"'{n}'" for n in near) + '?'
    return f'expected one of: {_listed(known)}'


def _shown(text: str) -> str:
    '''A value from the file as it goes into a message'''
    return repr(text if len(text) <= 80 else text[:77] + '...')


# -- From text to nodes -----------------------------------------------------

@dataclass
class _Node:  # pylint: disable=too-many-instance-attributes
    '''
    A value of the YAML text. @start and @end are offsets into the text,
    @line (from 1) and @key_start are those of its key if it has one.
    '''
    kind: str                       # mapping, sequence, scalar
    line: int
    start: int
    end: int
    pairs: Dict[str, '_Node']
    items: List['_Node']
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
        return f'{self.type} {_shown(self.text)}'


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
    def __init__(self, yaml: Any, text: str, place: _Place) -> None:
        self.yaml = yaml
        self.place = place
        self.depth = 0
        # The same in C is ten times as fast
        self.loader = getattr(yaml, 'CSafeLoader', yaml.SafeLoader)(text)

    def fail(self, line: int, what: str) -> NoReturn:
        '''Raise the error for a line of the file'''
        raise replace(self.place, line=line).error(what)

    def document(self) -> _Node:
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

    def node(self) -> _Node:
        '''Returns the next node and all that is in it'''
        event = self.loader.get_event()
        line = event.start_mark.line + 1
        if isinstance(event, self.yaml.AliasEvent):
            self.fail(line, f"alias '*{event.anchor}' is not allowed")
        if event.anchor is not None:
            self.fail(line, f"anchor '&{event.anchor}' is not allowed")
        if event.tag is not None:
            self.fail(line, f"tag '{event.tag}' is not allowed")

        node = _Node('scalar', line, event.start_mark.index,
                     event.end_mark.index, {}, [])
        if isinstance(event, self.yaml.ScalarEvent):
            self.scalar(node, event)
            return node
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            self.fail(line, f'more than {_MAX_DEPTH} levels deep')
        node.flow = bool(event.flow_style)
        if isinstance(event, self.yaml.MappingStartEvent):
            self.mapping(node)
        else:
            self.sequence(node)
        self.loader.get_event()
        self.depth -= 1
        return node

    def scalar(self, node: _Node, event: Any) -> None:
        '''Fill in a scalar'''
        tag = self.loader.resolve(self.yaml.ScalarNode, event.value,
                                  event.implicit)
        node.text = event.value
        node.type = _TYPES.get(tag, 'the special value')
        node.one_line = event.start_mark.line == event.end_mark.line

    def mapping(self, node: _Node) -> None:
        '''Fill in a mapping'''
        node.kind = 'mapping'
        while not self.loader.check_event(self.yaml.MappingEndEvent):
            key = self.node()
            if key.type != 'the string':
                self.fail(key.line, f'expected a string as key, found {key}')
            if key.text in node.pairs:
                first = node.pairs[key.text].line
                self.fail(key.line, f'duplicate key {_shown(key.text)}, '
                                    f'first in line {first}')
            value = self.node()
            value.line = key.line
            value.key_start = key.start
            node.pairs[key.text] = value

    def sequence(self, node: _Node) -> None:
        '''Fill in a list'''
        node.kind = 'sequence'
        while not self.loader.check_event(self.yaml.SequenceEndEvent):
            node.items.append(self.node())


def _compose(text: str, place: _Place) -> _Node:
    try:
        import yaml  # pylint: disable=import-outside-toplevel
    except ModuleNotFoundError as e:
        raise YAMLMissingError(
            'the Python module yaml (PyYAML) is not installed',
            next_step='install it: apt install python3-yaml, '
                      'or pip install pyyaml') from e

    if len(text) > _MAX_BYTES:
        raise place.error(f'larger than {_MAX_BYTES} bytes')
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


# -- From nodes to the registry ---------------------------------------------

_T = TypeVar('_T')
_Read = Callable[[_Node, _Place], _T]


def _fields(node: _Node, place: _Place, required: Tuple[str, ...],
            optional: Tuple[str, ...] = ()) -> Dict[str, _Node]:
    '''The values of a mapping whose keys are known beforehand'''
    pairs = _mapping(node, place)
    for key, value in pairs.items():
        if key not in required + optional:
            raise replace(place, line=value.line).error(
                f'unknown key {_shown(key)}, '
                + _suggestion(key, required + optional))
    for key in required:
        if key not in pairs:
            raise replace(place, line=node.line).error(
                f"missing key '{key}'")
    return pairs


def _mapping(node: _Node, place: _Place) -> Dict[str, _Node]:
    if node.kind != 'mapping':
        raise replace(place, line=node.line).error(
            f'expected a mapping, found {node}')
    return node.pairs


def _items(node: _Node, place: _Place, read: _Read[_T]) -> Tuple[_T, ...]:
    if node.kind != 'sequence':
        raise replace(place, line=node.line).error(
            f'expected a list, found {node}')
    return tuple(read(item, place) for item in node.items)


def _scalar(node: _Node, place: _Place, types: Tuple[str, ...],
            pattern: 're.Pattern[str]', expected: str) -> str:
    '''The text of a scalar, which is on one line and matches @pattern'''
    if (node.kind != 'scalar' or node.type not in types
            or not pattern.fullmatch(node.text)
            or len(node.text) > _MAX_LENGTH):
        raise replace(place, line=node.line).error(
            f'expected {expected}, found {node}')
    if not node.one_line:
        raise replace(place, line=node.line).error(
            f'expected {expected} on one line')
    return node.text


_STRING = ('the string',)
_NUMBER = ('the number',)


def _reads(types: Tuple[str, ...], pattern: 're.Pattern[str]',
           expected: str) -> _Read[str]:
    def read(node: _Node, place: _Place) -> str:
        return _scalar(node, place, types, pattern, expected)
    return read


_read_name = _reads(_STRING, _NAME,
                    'a name (a-z, 0-9, dot, dash, underscore)')
_read_file = _reads(_STRING, _FILE,
                    'a name (A-Z, a-z, 0-9, dot, dash, underscore)')
# A hash of digits alone is a number to YAML
_read_hash = _reads(_STRING + _NUMBER, _HASH, '64 lower-case hex digits')
_read_device = _reads(_STRING, _DEVICE, 'the name of a device')
_read_argument = _reads(_STRING, _ARGUMENT,
                        'one argument, without white space')
_read_line = _reads(_STRING, _LINE, 'a line of printable ASCII')
_read_url = _reads(_STRING, _STORE, 'an http, https or file URL')
_read_mirror = _reads(_STRING, _MIRROR, 'an http, https or file URL, in which '
                      '{arch} stands for the architecture')
_read_digits = _reads(_NUMBER, _INTEGER, 'a positive whole number')
_read_ratio = _reads(_NUMBER, _RATIO, 'a positive number')


def _read_text(node: _Node, place: _Place) -> str:
    '''Free text, which may go over several lines'''
    text = ' '.join(node.text.split())
    if node.kind != 'scalar' or node.type != 'the string' or not text:
        raise replace(place, line=node.line).error(
            f'expected a text, found {node}')
    return text


def _read_size(node: _Node, place: _Place) -> int:
    return int(_read_digits(node, place))


def _read_positive(node: _Node, place: _Place) -> float:
    ratio = float(_read_ratio(node, place))
    if ratio <= 0:
        raise replace(place, line=node.line).error(
            f'expected a positive number, found {node}')
    return ratio


def _read_choice(node: _Node, place: _Place, known: Iterable[str],
                 what: str) -> str:
    if node.kind != 'scalar' or node.text not in known:
        raise replace(place, line=node.line).error(
            f'unknown {what} {_shown(node.text)}, '
            + _suggestion(node.text, known)
            if node.kind == 'scalar' else
            f'expected a {what}, found {node}')
    return node.text


def _read_registry(path: Path, root: _Node, place: _Place) -> Registry:
    if root.kind != 'mapping':
        raise replace(place, line=root.line).error(
            f'expected a mapping, found {root}')
    # The version first: another one may well have other keys
    schema = root.pairs.get('schema')
    if schema is not None and (schema.type not in _NUMBER
                               or schema.text != str(SCHEMA)):
        raise replace(place, line=schema.line).error(
            f'expected schema {SCHEMA}, found {schema}')
    pairs = _fields(root, place, ('schema', 'images'), ('stores',))

    stores = _read_urls(pairs, 'stores', place, _read_url)
    images = {}
    for name, node in _mapping(pairs['images'], place).items():
        _check_key(name, node, place)
        images[name] = _read_image(name, node, replace(place, image=name))
    return Registry(path, stores, images)


def _read_urls(pairs: Dict[str, _Node], key: str, place: _Place,
               read: _Read[str]) -> Tuple[str, ...]:
    if key not in pairs:
        return ()
    return tuple(url.rstrip('/') for url in _items(pairs[key], place, read))


def _check_key(name: str, node: _Node, place: _Place) -> None:
    if not _NAME.fullmatch(name) or len(name) > _MAX_LENGTH:
        raise replace(place, line=node.line).error(
            'expected a name (a-z, 0-9, dot, dash, underscore), '
            f'found {_shown(name)}')


def _read_image(name: str, node: _Node, place: _Place) -> Image:
    pairs = _fields(node, place, ('description', 'definition',
                                  'distribution', 'release',
                                  'architectures'), ('mirrors',))
    targets = {}
    for arch, value in _mapping(pairs['architectures'], place).items():
        if arch not in ARCHITECTURES:
            raise replace(place, line=value.line).error(
                f'unknown architecture {_shown(arch)}, '
                + _suggestion(arch, ARCHITECTURES))
        targets[arch] = _read_target(arch, value, replace(place, arch=arch))
    if not targets:
        raise replace(place, line=pairs['architectures'].line).error(
            'expected at least one architecture')
    return Image(name=name,
                 description=_read_text(pairs['description'], place),
                 definition=_read_name(pairs['definition'], place),
                 distribution=_read_name(pairs['distribution'], place),
                 release=_read_name(pairs['release'], place),
                 targets=targets,
                 mirrors=_read_urls(pairs, 'mirrors', place, _read_mirror))


def _read_target(arch: str, node: _Node, place: _Place) -> Target:
    pairs = _fields(node, place, ('artefacts', 'boot', 'budget'),
                    ('identity', 'not-locked'))
    target = Target(
        arch=arch,
        identity=_optional(pairs, 'identity', place, _read_hash),
        artefacts=_read_artefacts(pairs['artefacts'], place),
        boot=_read_boot(pairs['boot'], place),
        budget=_read_budget(pairs['budget'], place),
        not_locked=_optional(pairs, 'not-locked', place, _read_text))
    _check_hashes(target, node, place)
    return target


def _optional(pairs: Dict[str, _Node], key: str, place: _Place,
              read: _Read[_T]) -> Optional[_T]:
    return read(pairs[key], place) if key in pairs else None


def _check_hashes(target: Target, node: _Node, place: _Place) -> None:
    '''Hashes are there for everything or for nothing'''
    hashed = [a.kind for a in target.artefacts.values() if a.sha256]
    problem = None
    if target.not_locked is not None and (hashed or target.built):
        problem = "hashes together with 'not-locked', expected one of them"
    elif hashed and len(hashed) < len(target.artefacts):
        lacking = [kind for kind in target.artefacts if kind not in hashed]
        problem = (f'hashes for {_listed(hashed)} but not for '
                   f'{_listed(lacking)}, expected all or none')
    elif hashed and not target.built:
        problem = "hashes without the key 'identity'"
    elif target.built and not hashed:
        problem = "key 'identity' without hashes"
    if problem is not None:
        raise replace(place, line=node.line).error(problem)


def _read_artefacts(node: _Node, place: _Place) -> Dict[str, Artefact]:
    artefacts: Dict[str, Artefact] = {}
    for kind, value in _fields(node, place, tuple(FORMATS)).items():
        artefact = _read_artefact(kind, value, place)
        for other in artefacts.values():
            if other.file == artefact.file:
                raise replace(place, line=value.line).error(
                    f"'{kind}' and '{other.kind}' have the same file "
                    f"'{artefact.file}'")
        artefacts[kind] = artefact
    return artefacts


def _read_artefact(kind: str, node: _Node, place: _Place) -> Artefact:
    pairs = _fields(node, place, ('file', 'format'), ('size', 'sha256'))
    if ('size' in pairs) != ('sha256' in pairs):
        there, lacking = (('size', 'sha256') if 'size' in pairs
                          else ('sha256', 'size'))
        raise replace(place, line=pairs[there].line).error(
            f"'{kind}' has '{there}' without '{lacking}', "
            'expected both or neither')
    return Artefact(
        kind=kind,
        file=_read_file(pairs['file'], place),
        format=_read_choice(pairs['format'], place, FORMATS[kind],
                            f'format of {kind}'),
        sha256=_optional(pairs, 'sha256', place, _read_hash),
        size=_optional(pairs, 'size', place, _read_size))


def _read_boot(node: _Node, place: _Place) -> Boot:
    pairs = _fields(node, place, ('console', 'cmdline', 'disk-cmdline',
                                  'disk-device', 'ready', 'prompt'))
    return Boot(
        console=_read_device(pairs['console'], place),
        cmdline=_items(pairs['cmdline'], place, _read_argument),
        disk_cmdline=_items(pairs['disk-cmdline'], place, _read_argument),
        disk_device=_read_device(pairs['disk-device'], place),
        ready=_read_line(pairs['ready'], place),
        prompt=_read_line(pairs['prompt'], place))


def _read_budget(node: _Node, place: _Place) -> Budget:
    pairs = _fields(node, place, ('kernel-initrd-bytes', 'disk-bytes',
                                  'packages', 'initrd-boot-ratio',
                                  'disk-boot-ratio'))
    return Budget(
        kernel_initrd_bytes=_read_size(pairs['kernel-initrd-bytes'], place),
        disk_bytes=_read_size(pairs['disk-bytes'], place),
        packages=_read_size(pairs['packages'], place),
        initrd_boot_ratio=_read_positive(pairs['initrd-boot-ratio'], place),
        disk_boot_ratio=_read_positive(pairs['disk-boot-ratio'], place))
