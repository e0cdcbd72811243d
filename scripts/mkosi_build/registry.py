# SPDX-License-Identifier: GPL-2.0-or-later
'''
The registry: which images there are, and the hashes that they must have

Shared by the builder and the functional tests, so nothing but PyYAML is
under it, and that is imported only when a registry is loaded. What load()
returns is complete and valid; everything else is a RegistryError that
gives file, line and image.
'''

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import (
    Dict,
    Iterable,
    Iterator,
    List,
    Mapping,
    Optional,
    Tuple,
)

from .error import RegistryError
from .nodes import (
    MAX_BYTES,
    MAX_LENGTH,
    NUMBER,
    STRING,
    Node,
    Place,
    Read,
    T,
    compose,
    fields,
    items,
    listed,
    mapping,
    reads,
    shown,
    suggestion,
)


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
                f'there are: {listed(self.targets)}') from None


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
                + suggestion(name, self.images)) from None


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
            data = file.read(MAX_BYTES + 1)
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
            f'hashes given for: {listed(artefacts)}; '
            f'expected for: {listed(target.artefacts)}')
    return replace(target, identity=identity, not_locked=None, artefacts={
        kind: replace(artefact, sha256=artefacts[kind][0],
                      size=artefacts[kind][1])
        for kind, artefact in target.artefacts.items()})


def _edits(text: str, image: str,
           wanted: Target) -> Iterator[Tuple[int, int, str]]:
    root = compose(text, Place('registry.yaml'))
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


def _replaced(node: 'Node', value: str) -> Tuple[int, int, str]:
    return node.start, node.end, value


def _removed(text: str, node: 'Node') -> Tuple[int, int, str]:
    '''From its key to the end of the last line of its value'''
    start = text.rfind('\n', 0, node.key_start) + 1
    # A value of several lines ends where the next key begins
    end = text.find('\n', len(text[:node.end].rstrip()))
    return start, len(text) if end < 0 else end + 1, ''


def _inserted(text: str, node: 'Node',
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
    place = Place(path.name)
    root = compose(text, place)
    return _read_registry(path, root, place)


# -- From nodes to the registry ---------------------------------------------

_read_name = reads(STRING, _NAME,
                   'a name (a-z, 0-9, dot, dash, underscore)')
_read_file = reads(STRING, _FILE,
                   'a name (A-Z, a-z, 0-9, dot, dash, underscore)')
# A hash of digits alone is a number to YAML
_read_hash = reads(STRING + NUMBER, _HASH, '64 lower-case hex digits')
_read_device = reads(STRING, _DEVICE, 'the name of a device')
_read_argument = reads(STRING, _ARGUMENT,
                       'one argument, without white space')
_read_line = reads(STRING, _LINE, 'a line of printable ASCII')
_read_url = reads(STRING, _STORE, 'an http, https or file URL')
_read_mirror = reads(STRING, _MIRROR, 'an http, https or file URL, in which '
                     '{arch} stands for the architecture')
_read_digits = reads(NUMBER, _INTEGER, 'a positive whole number')
_read_ratio = reads(NUMBER, _RATIO, 'a positive number')


def _read_text(node: Node, place: Place) -> str:
    '''Free text, which may go over several lines'''
    text = ' '.join(node.text.split())
    if node.kind != 'scalar' or node.type != 'the string' or not text:
        raise replace(place, line=node.line).error(
            f'expected a text, found {node}')
    return text


def _read_size(node: Node, place: Place) -> int:
    return int(_read_digits(node, place))


def _read_positive(node: Node, place: Place) -> float:
    ratio = float(_read_ratio(node, place))
    if ratio <= 0:
        raise replace(place, line=node.line).error(
            f'expected a positive number, found {node}')
    return ratio


def _read_choice(node: Node, place: Place, known: Iterable[str],
                 what: str) -> str:
    if node.kind != 'scalar' or node.text not in known:
        raise replace(place, line=node.line).error(
            f'unknown {what} {shown(node.text)}, '
            + suggestion(node.text, known)
            if node.kind == 'scalar' else
            f'expected a {what}, found {node}')
    return node.text


def _read_registry(path: Path, root: Node, place: Place) -> Registry:
    if root.kind != 'mapping':
        raise replace(place, line=root.line).error(
            f'expected a mapping, found {root}')
    # The version first: another one may well have other keys
    schema = root.pairs.get('schema')
    if schema is not None and (schema.type not in NUMBER
                               or schema.text != str(SCHEMA)):
        raise replace(place, line=schema.line).error(
            f'expected schema {SCHEMA}, found {schema}')
    pairs = fields(root, place, ('schema', 'images'), ('stores',))

    stores = _read_urls(pairs, 'stores', place, _read_url)
    images = {}
    for name, node in mapping(pairs['images'], place).items():
        _check_key(name, node, place)
        images[name] = _read_image(name, node, replace(place, image=name))
    return Registry(path, stores, images)


def _read_urls(pairs: Dict[str, Node], key: str, place: Place,
               read: Read[str]) -> Tuple[str, ...]:
    if key not in pairs:
        return ()
    return tuple(url.rstrip('/') for url in items(pairs[key], place, read))


def _check_key(name: str, node: Node, place: Place) -> None:
    if not _NAME.fullmatch(name) or len(name) > MAX_LENGTH:
        raise replace(place, line=node.line).error(
            'expected a name (a-z, 0-9, dot, dash, underscore), '
            f'found {shown(name)}')


def _read_image(name: str, node: Node, place: Place) -> Image:
    pairs = fields(node, place, ('description', 'definition',
                                 'distribution', 'release',
                                 'architectures'), ('mirrors',))
    targets = {}
    for arch, value in mapping(pairs['architectures'], place).items():
        if arch not in ARCHITECTURES:
            raise replace(place, line=value.line).error(
                f'unknown architecture {shown(arch)}, '
                + suggestion(arch, ARCHITECTURES))
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


def _read_target(arch: str, node: Node, place: Place) -> Target:
    pairs = fields(node, place, ('artefacts', 'boot', 'budget'),
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


def _optional(pairs: Dict[str, Node], key: str, place: Place,
              read: Read[T]) -> Optional[T]:
    return read(pairs[key], place) if key in pairs else None


def _check_hashes(target: Target, node: Node, place: Place) -> None:
    '''Hashes are there for everything or for nothing'''
    hashed = [a.kind for a in target.artefacts.values() if a.sha256]
    problem = None
    if target.not_locked is not None and (hashed or target.built):
        problem = "hashes together with 'not-locked', expected one of them"
    elif hashed and len(hashed) < len(target.artefacts):
        lacking = [kind for kind in target.artefacts if kind not in hashed]
        problem = (f'hashes for {listed(hashed)} but not for '
                   f'{listed(lacking)}, expected all or none')
    elif hashed and not target.built:
        problem = "hashes without the key 'identity'"
    elif target.built and not hashed:
        problem = "key 'identity' without hashes"
    if problem is not None:
        raise replace(place, line=node.line).error(problem)


def _read_artefacts(node: Node, place: Place) -> Dict[str, Artefact]:
    artefacts: Dict[str, Artefact] = {}
    for kind, value in fields(node, place, tuple(FORMATS)).items():
        artefact = _read_artefact(kind, value, place)
        for other in artefacts.values():
            if other.file == artefact.file:
                raise replace(place, line=value.line).error(
                    f"'{kind}' and '{other.kind}' have the same file "
                    f"'{artefact.file}'")
        artefacts[kind] = artefact
    return artefacts


def _read_artefact(kind: str, node: Node, place: Place) -> Artefact:
    pairs = fields(node, place, ('file', 'format'), ('size', 'sha256'))
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


def _read_boot(node: Node, place: Place) -> Boot:
    pairs = fields(node, place, ('console', 'cmdline', 'disk-cmdline',
                                 'disk-device', 'ready', 'prompt'))
    return Boot(
        console=_read_device(pairs['console'], place),
        cmdline=items(pairs['cmdline'], place, _read_argument),
        disk_cmdline=items(pairs['disk-cmdline'], place, _read_argument),
        disk_device=_read_device(pairs['disk-device'], place),
        ready=_read_line(pairs['ready'], place),
        prompt=_read_line(pairs['prompt'], place))


def _read_budget(node: Node, place: Place) -> Budget:
    pairs = fields(node, place, ('kernel-initrd-bytes', 'disk-bytes',
                                 'packages', 'initrd-boot-ratio',
                                 'disk-boot-ratio'))
    return Budget(
        kernel_initrd_bytes=_read_size(pairs['kernel-initrd-bytes'], place),
        disk_bytes=_read_size(pairs['disk-bytes'], place),
        packages=_read_size(pairs['packages'], place),
        initrd_boot_ratio=_read_positive(pairs['initrd-boot-ratio'], place),
        disk_boot_ratio=_read_positive(pairs['disk-boot-ratio'], place))
