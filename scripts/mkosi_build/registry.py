# SPDX-License-Identifier: GPL-2.0-or-later
'''
The registry: which images there are, and the hashes that they must have

Shared by the builder and the functional tests, so nothing but PyYAML is
under it, and that is imported only when a registry is loaded. What load()
returns is complete and valid; everything else is a RegistryError that
gives file, line and image.
'''

import json
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Dict, Iterable, Mapping, Optional, Tuple

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
    no_collection,
    reads,
    shown,
    suggestion,
)


DEFAULT = (Path(__file__).resolve().parents[2]
           / 'tests' / 'functional' / 'mkosi' / 'registry.yaml')

SCHEMA = 1
OVERRIDE_SCHEMA = 1

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
# A host, be it by IPv6 address, with port and path; or an absolute folder
_STORE = re.compile(
    r'https?://([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(:[0-9]{1,5})?'
    r'(/[A-Za-z0-9._~:/%@+-]*)?'
    r'|/+[A-Za-z0-9._~:%@+-][A-Za-z0-9._~:/%@+-]*')
_USER = re.compile(r'[^/]*//[^/]*@')
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
    '''
    A whole registry; @stores are http and https URLs and absolute folders,
    without a slash at the end
    '''
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
    registry = parse(path, text)
    _loaded[path] = (version, registry)
    return registry


_Version = Tuple[int, int, int, int]
_loaded: Dict[Path, Tuple[_Version, Registry]] = {}


def parse(path: Path, text: str) -> Registry:
    '''
    @params path: what messages call it
    @params text: a registry's text

    Returns what is in it. Raises RegistryError, or YAMLMissingError
    '''
    place = Place(path.name)
    with no_collection():
        root = compose(text, place)
        return _read_registry(path, root, place)


def overridden(path: Path, name: str, target: Target) -> Optional[Target]:
    '''
    @params path: the file that the builder writes for images whose hashes
                  differ from the registry's
    @params name: the image's name
    @params target: what the registry has

    Returns @target with the hashes of that file, None if it is for other
    images. Raises RegistryError
    '''
    try:
        content = json.loads(path.read_text(encoding='utf-8'))
        if content['schema'] != OVERRIDE_SCHEMA:
            raise ValueError(f'expected schema {OVERRIDE_SCHEMA}, '
                             f'found {content["schema"]}')
        entry = content['images'].get(name, {}).get(target.arch)
        if entry is None:
            return None
        artefacts = {kind: _overridden_artefact(
                               artefact, **entry['artefacts'][kind])
                     for kind, artefact in target.artefacts.items()}
        return replace(target, identity=str(entry['identity']),
                       artefacts=artefacts, not_locked=None)
    except OSError as e:
        raise RegistryError(f'QEMU_TEST_MKOSI_OVERRIDE={path}: '
                            f'{e.strerror}; unset it, or have the builder '
                            'write it with --local') from e
    except (AttributeError, KeyError, TypeError, ValueError,
            RecursionError) as e:
        raise RegistryError(
            f'QEMU_TEST_MKOSI_OVERRIDE={path}: not a file that '
            f'scripts/mkosi-build.py --local wrote: {e!r}') from e


def _overridden_artefact(artefact: Artefact, sha256: str,
                         size: int) -> Artefact:
    # The hash becomes the name of a file, so it had better be a hash
    if not _HASH.fullmatch(sha256):
        raise ValueError(f'expected a SHA-256, found {sha256!r}')
    return replace(artefact, sha256=sha256, size=int(size))


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
_read_location = reads(STRING, _STORE,
                       'an http or https URL, or an absolute folder')
_read_mirror = reads(STRING, _MIRROR, 'an http, https or file URL, in which '
                     '{arch} stands for the architecture')
_read_digits = reads(NUMBER, _INTEGER, 'a positive whole number')
_read_ratio = reads(NUMBER, _RATIO, 'a positive number')


def _read_store(node: Node, place: Place) -> str:
    # Not shown: it should not be here, and less so in logs
    if node.kind == 'scalar' and _USER.match(node.text):
        raise replace(place, line=node.line).error(
            'expected a store that all may read, found a URL with a user '
            'name or password')
    return _read_location(node, place)


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

    stores = _read_urls(pairs, 'stores', place, _read_store)
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
