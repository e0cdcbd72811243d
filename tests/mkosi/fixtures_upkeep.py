# SPDX-License-Identifier: GPL-2.0-or-later
'''
What the tests of upkeep stand on: a small tree with a registry and locks,
and caches, of which nothing was built by mkosi.

PYTEST_DONT_REWRITE: test modules import this before they name it a plugin.
'''

import hashlib
import json
import os
from pathlib import Path
from typing import Any, Dict, Iterator, List, Sequence, Tuple

import pytest

from mkosi_build import lock as locks, registry as registries
from mkosi_build.build import host_architecture, prepare
from mkosi_build.cache import Cache
from mkosi_build.lock import Lock, Package
from mkosi_build.registry import Image, Registry, Target

KINDS = {'kernel': ('vmlinuz', 'bzimage'), 'initrd': ('initrd.cpio', 'cpio'),
         'disk': ('disk.qcow2', 'qcow2')}

BOOT = '''\
        boot:
          console: ttyS0
          cmdline: []
          disk-cmdline: []
          disk-device: virtio-blk-pci
          ready: 'READY'
          prompt: '# '
        budget:
          kernel-initrd-bytes: 9000000
          disk-bytes: 9000000
          packages: 9
          initrd-boot-ratio: 1.2
          disk-boot-ratio: 2.0
'''


def body(name: str) -> bytes:
    '''The bytes of whatever is called @name.'''
    return f'{name}\n'.encode() * 40


def sha(name: str) -> str:
    '''The hash of body(@name).'''
    return hashlib.sha256(body(name)).hexdigest()


def package(name: str, version: str = '1') -> Package:
    '''A package of Debian.'''
    return Package(name, version, f'pool/{name}_{version}_amd64.deb',
                   sha(f'{name}={version}'), len(body(f'{name}={version}')),
                   'amd64', f'{name}={version}')


def lock_of(definition: str, packages: Sequence[Package],
            arch: str = 'x86_64') -> Lock:
    '''A lock of @packages.'''
    return Lock(definition, 'debian', 'trixie', arch, 1700000000,
                tuple(sorted(packages)))


class Upkeep:
    '''
    A tree below @root with the images @names for x86_64, each of which has
    a package of its own and one that all have, and a cache.
    '''
    def __init__(self, root: Path, names: Sequence[str] = ('one', 'two'),
                 stores: Sequence[str] = ()) -> None:
        self.folder = root / 'tree/mkosi'
        self.path = self.folder / 'registry.yaml'
        self.cache = Cache()
        self.tools = [package('hammer'), package('common')]
        host = host_architecture()
        self._define('tools', self.tools, host)
        for name in names:
            self._define(name, [package(name), package('common')])
        self.names, self.stores = list(names), list(stores)
        self.write_registry({name: '0' * 64 for name in names})
        self.write_registry({
            name: prepare(self.registry, self.registry.image(name),
                          'x86_64').identity for name in names})

    def _define(self, name: str, packages: Sequence[Package],
                arch: str = 'x86_64') -> None:
        folder = self.folder / name
        folder.mkdir(parents=True)
        (folder / 'mkosi.conf').write_text('[Output]\nFormat=none\n')
        lock = lock_of(locks.definition_digest(folder), packages, arch)
        (folder / f'{arch}.lock').write_text(locks.render(lock))

    def write_registry(self, identities: Dict[str, str]) -> None:
        '''Record @identities by image.'''
        text = 'schema: 1\n'
        if self.stores:
            text += 'stores:\n' + ''.join(f'  - {s}\n' for s in self.stores)
        text += 'images:\n'
        for name, identity in identities.items():
            text += (f'  {name}:\n    description: {name}\n'
                     f'    definition: {name}\n    distribution: debian\n'
                     '    release: trixie\n    architectures:\n'
                     f'      x86_64:\n        identity: {identity}\n'
                     '        artefacts:\n')
            for kind, (file, form) in KINDS.items():
                text += (f'          {kind}:\n            file: {file}\n'
                         f'            format: {form}\n'
                         f'            size: {len(body(name + kind))}\n'
                         f'            sha256: {sha(name + kind)}\n')
            text += BOOT
        self.path.write_text(text)

    @property
    def registry(self) -> Registry:
        '''What is on the disk.'''
        return registries.parse(
            self.path, self.path.read_text())

    @property
    def chosen(self) -> List[Tuple[Image, Target]]:
        '''All images.'''
        return [(image, image.target('x86_64'))
                for image in self.registry.images.values()]

    def lock(self, name: str) -> Lock:
        '''That of an image.'''
        return locks.load(self.folder / name / 'x86_64.lock')

    def add_build(self, name: str, identity: str = '', of: str = '',
                  **more: Any) -> Path:
        '''
        A build as the builder leaves it, also in the asset cache: of the
        identity that the registry has, or another one, and then with the
        content @of.
        '''
        identity = identity or str(
            self.registry.image(name).target('x86_64').identity)
        folder = self.cache.images / name / 'x86_64' / identity
        folder.mkdir(parents=True)
        self.cache.assets.mkdir(parents=True, exist_ok=True)
        known = {}
        for kind, (file, _) in KINDS.items():
            content = (of or name) + kind
            (folder / file).write_bytes(body(content))
            (folder / file).chmod(0o444)
            self.cache.add_asset(folder / file, sha(content))
            known[kind] = {'file': file, 'sha256': sha(content),
                           'size': len(body(content)), 'verified': []}
        (folder / 'record.json').write_text(json.dumps(
            {'identity': identity, 'locked': True, 'artefacts': known,
             **more}))
        return folder

    def add_package(self, one: Package) -> Path:
        '''A package in the store.'''
        self.cache.store.mkdir(parents=True, exist_ok=True)
        path = self.cache.store / one.sha256
        path.write_bytes(body(one.source))
        path.chmod(0o444)
        return path

    def age(self, hours: float) -> None:
        '''Let everything in the caches be @hours older.'''
        for base in (self.cache.root, self.cache.assets):
            for folder, folders, names in os.walk(base):
                for name in folders + names:
                    path = Path(folder, name)
                    status = path.lstat()
                    times = (status.st_atime - hours * 3600,
                             status.st_mtime - hours * 3600)
                    os.utime(path, times, follow_symlinks=False)


@pytest.fixture(name='upkeep')
def fixture_upkeep(tmp_path: Path,
                   monkeypatch: pytest.MonkeyPatch) -> Iterator[Upkeep]:
    '''A tree, and caches that nothing is in.'''
    monkeypatch.setenv('QEMU_MKOSI_DIR', str(tmp_path / 'own'))
    monkeypatch.setenv('QEMU_TEST_CACHE_DIR', str(tmp_path / 'tests'))
    yield Upkeep(tmp_path)
