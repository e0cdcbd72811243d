# SPDX-License-Identifier: GPL-2.0-or-later
'''
Assets that are images, built by scripts/mkosi-build.py

An image is found by its name in tests/functional/mkosi/registry.yaml,
which has the hashes that its files must have.
'''

import logging
import os
import subprocess
import sys
import time
import unittest
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import (TYPE_CHECKING, Any, Deque, Dict, List, Optional,
                    Tuple)

from . import mkosi_fetch
from .asset import Asset, AssetError
from .mkosi_verified import problem_of, write_atomically

if TYPE_CHECKING:
    from mkosi_build.registry import Artefact, Boot, Registry, Target


# Each part of an image is of use only together with those before it
PARTS = ('kernel', 'initrd', 'disk')

ROOT = Path(__file__).parents[3]
BUILDER = ROOT / 'scripts' / 'mkosi-build.py'

# Exit codes of the builder for what the host lacks or what cannot be
# downloaded: nothing that is wrong with the test or the image
TRANSIENT_EXIT_CODES = (4, 5)


def _import_registry() -> Tuple[Any, Any]:
    '''
    The builder's registry and its errors, imported late: most tests have
    no need of them
    '''
    scripts = str(ROOT / 'scripts')
    if scripts not in sys.path:
        sys.path.append(scripts)
    from mkosi_build import error, registry
    return registry, error


class _Unusable(Exception):
    '''Why an image cannot be used; @transient as in AssetError'''
    def __init__(self, msg: str, transient: bool = False) -> None:
        super().__init__(msg)
        self.msg = msg
        self.transient = transient


@dataclass(frozen=True)
class _Found:
    '''What is known of an image; @override is the file its hashes are from'''
    target: 'Target'
    stores: Tuple[str, ...]
    override: Optional[str]


class MkosiAsset(Asset):
    '''
    An image of the registry, for the architecture that is tested.

    MkosiAsset('debian-min') stands for the image's disk, its kernel and
    initrd are at hand as .kernel and .initrd. Fetching the disk fetches
    all three, fetching the initrd fetches the kernel too. A test that
    needs no disk declares MkosiAsset('debian-min', part='initrd').

    As with Asset, instances must be class level variables whose names
    start with "ASSET_", of the very class that has the tests: variables
    of a base class are neither precached nor checked by setUp().

    The architecture is that of the folder of the test (x86_64/test_x.py,
    or test_x86_64_x.py where there are no folders), or else that of
    QEMU_TEST_QEMU_BINARY. Where these contradict each other, @arch must
    be given, which overrules both.

    Nothing is looked up before first use, so a wrong name or registry
    is an AssetError of fetch(), valid() and available(), not of the
    import of a test.
    '''
    # pylint: disable-next=super-init-not-called
    def __init__(self, name: str, arch: Optional[str] = None,
                 part: str = 'disk') -> None:
        '''
        @params name: the image's name in the registry
        @params arch: QEMU's name of the target, if the test's place and
                      QEMU_TEST_QEMU_BINARY do not tell
        @params part: kernel, initrd or disk
        '''
        # Asset sets url, hash and cache_file here, which are properties
        # of ours; the rest is as there
        plain = Asset(f'mkosi:{name}', '')
        self.cache_dir: Path = plain.cache_dir
        self.log: logging.Logger = plain.log
        self.name = name
        self.part = part
        self._arch = arch
        self._declared_in: List[str] = []

    def __set_name__(self, owner: type, name: str) -> None:
        path = getattr(sys.modules.get(owner.__module__), '__file__', None)
        if path is not None:
            self._declared_in.append(os.path.abspath(path))

    def __str__(self) -> str:
        # QEMU 10.0 logs it before it fetches
        try:
            return str(self.cache_file)
        except AssetError:
            return self.url

    def __repr__(self) -> str:
        return f'MkosiAsset: url={self.url} cache_dir={self.cache_dir}'

    @property
    def kernel(self) -> 'MkosiAsset':
        '''The image's kernel'''
        return self._sibling('kernel')

    @property
    def initrd(self) -> 'MkosiAsset':
        '''The image's initrd'''
        return self._sibling('initrd')

    def _sibling(self, part: str) -> 'MkosiAsset':
        sibling = MkosiAsset(self.name, arch=self._arch, part=part)
        sibling._declared_in = list(self._declared_in)
        return sibling

    @property
    def arch(self) -> str:
        '''QEMU's name of the target that the image is for'''
        try:
            return self._find_arch()[0]
        except _Unusable as e:
            raise AssetError(self, e.msg, e.transient) from e

    @property
    def boot(self) -> 'Boot':
        '''What it takes to boot the image: console, command line...'''
        return self._look_up().target.boot

    @property
    def url(self) -> str:
        '''
        What this is: mkosi:<image>/<architecture>/<file>. Known even if
        nothing else is, since messages have need of it.
        '''
        try:
            found = self._find()
            return (f'mkosi:{self.name}/{found.target.arch}/'
                    + found.target.artefacts[self.part].file)
        except _Unusable:
            return f'mkosi:{self.name}/{self._arch or "?"}/{self.part}'

    @property
    def hash(self) -> str:
        '''The SHA-256 that the file must have'''
        sha256 = self._look_up().target.artefacts[self.part].sha256
        if sha256 is None:
            raise AssetError(self, 'not built yet', transient=True)
        return sha256

    @property
    def cache_file(self) -> Path:  # type: ignore[override]
        '''Where the file is in the cache, once it is fetched'''
        return Path(self.cache_dir, self.hash)

    def valid(self) -> bool:
        '''
        Check whether the file, and those it is of use with, exist in the
        cache and have the right hashes.

        A file that had the right hash before, and did not change since,
        is not read again, unless QEMU_TEST_REFRESH_CACHE is set. To have
        it downloaded again just for that would be of no use: the same
        hash is the same file, and one built here might not come back.
        '''
        return self._problem(self._look_up()) is None

    def available(self) -> bool:
        '''
        Check whether the image is either in the cache, or can be
        downloaded or built. Raises unittest.SkipTest if it is not, for
        the reason to be seen where the test is skipped.
        '''
        try:
            found = self._look_up()
            problem = self._problem(found)
            if problem is not None and not self._obtainable(found):
                raise AssetError(self, self._advice(found, problem),
                                 transient=True)
        except AssetError as e:
            if not e.transient:
                raise
            self.log.info('%s', e)
            raise unittest.SkipTest(str(e)) from e
        return True

    def fetch(self) -> str:
        '''
        Get the file, and those it is of use with, into the cache: from
        the first store that has it, of QEMU_TEST_MKOSI_STORES if that is
        set, else of the registry; or else, if QEMU_TEST_BUILD_IMAGES is
        set, by building the image. Returns the file's path
        '''
        found = self._look_up()
        problem = self._problem(found)
        if problem is None:
            self.log.debug('Using cached image %s', self.url)
        else:
            self._obtain(found, problem)
        for artefact in self._needed(found):
            self._save_time_stamp_of(self._path(artefact))
        return str(self._path(found.target.artefacts[self.part]))

    # Which image it is

    def _find_arch(self) -> Tuple[str, bool]:
        '''The architecture, and whether it is the test that demands it'''
        if self._arch is not None:
            return self._arch, True

        known = _import_registry()[0].ARCHITECTURES
        places: Dict[str, str] = {}
        for path in self._declared_in:
            arch = _arch_of_test(path, known)
            if arch is not None:
                places.setdefault(arch, path)
        demanded = bool(places)

        binary = os.getenv('QEMU_TEST_QEMU_BINARY')
        if binary:
            arch = os.path.basename(binary).split('-')[-1]
            if arch in known or not places:
                places.setdefault(arch, f'QEMU_TEST_QEMU_BINARY={binary}')

        if not places:
            raise _Unusable('unknown for which architecture: the test is in '
                            "no architecture's folder and "
                            'QEMU_TEST_QEMU_BINARY is not set; '
                            'declare the image with arch=', transient=True)
        if len(places) > 1:
            raise _Unusable(
                'ambiguous architecture: '
                + ', '.join(f'{arch} by {where}'
                            for arch, where in places.items())
                + '; declare the image with arch=, or run the binary of '
                  'the architecture')
        return next(iter(places)), demanded

    def _find(self) -> _Found:
        '''Look the image up in the registry and the override'''
        registry, error = _import_registry()
        if self.part not in PARTS:
            raise _Unusable(f"unknown part '{self.part}', expected one of: "
                            + ', '.join(PARTS))
        arch, demanded = self._find_arch()
        try:
            known: 'Registry' = registry.load(registry.DEFAULT)
            image = known.image(self.name)
        except error.RegistryError as e:
            raise _Unusable(e.message) from e
        except error.YAMLMissingError as e:
            raise _Unusable(f'{e.message}; {e.next_step}',
                            transient=True) from e
        try:
            target = image.target(arch)
        except error.RegistryError as e:
            # A generic test runs for all architectures, whatever there is
            raise _Unusable(e.message, transient=not demanded) from e

        override = os.getenv('QEMU_TEST_MKOSI_OVERRIDE')
        if override:
            try:
                overridden = registry.overridden(Path(override), self.name,
                                                 target)
            except error.RegistryError as e:
                raise _Unusable(e.message) from e
            if overridden is not None:
                return _Found(overridden, (), override)
        try:
            stores = mkosi_fetch.stores_of_environment()
        except mkosi_fetch.NotFetched as e:
            raise _Unusable(e.msg, e.transient) from e
        return _Found(target, tuple(stores) or known.stores, None)

    def _look_up(self) -> _Found:
        try:
            return self._find()
        except _Unusable as e:
            raise AssetError(self, e.msg, e.transient) from e

    # What is in the cache

    def _needed(self, found: _Found) -> List['Artefact']:
        parts = PARTS[:PARTS.index(self.part) + 1]
        return [found.target.artefacts[part] for part in parts]

    def _path(self, artefact: 'Artefact') -> Path:
        assert artefact.sha256 is not None
        return Path(self.cache_dir, artefact.sha256)

    def _problem(self, found: _Found) -> Optional[str]:
        '''What keeps the image from being used as it is, None if nothing'''
        if found.target.not_locked is not None:
            return f'cannot be built yet: {found.target.not_locked}'
        if not found.target.built:
            return 'not built yet, so the registry has no hashes of it'
        for artefact in self._needed(found):
            problem = self._problem_of(artefact, _refresh())
            if problem is not None:
                return f'{artefact.kind} {problem}'
        return None

    def _problem_of(self, artefact: 'Artefact',
                    refresh: bool = False) -> Optional[str]:
        assert artefact.sha256 is not None and artefact.size is not None
        return problem_of(self._path(artefact), artefact.sha256,
                          artefact.size, refresh)

    def _save_time_stamp_of(self, path: Path) -> None:
        '''Tell scripts/clean_functional_cache.py that the file is in use'''
        try:
            write_atomically(path.with_suffix('.stamp'),
                             f'{int(time.time())}')
        except OSError as e:
            # The cache may well be one that is only read here
            self.log.debug('No time stamp for %s: %s', path, e)

    # How it gets there

    def _advice(self, found: _Found, problem: str) -> str:
        build = f'scripts/mkosi-build.py {found.target.arch} {self.name}'
        if found.override is not None:
            return (f'{problem} (hashes from {found.override}); run '
                    f'{build} --local, or unset QEMU_TEST_MKOSI_OVERRIDE')
        if found.target.not_locked is not None:
            # The registry's reason says what to run
            return problem
        if not found.target.built:
            return f'{problem}; run {build} --update'
        return (f'{problem}; run {build}, '
                'or set QEMU_TEST_BUILD_IMAGES=1 to have it built')

    def _downloadable(self, found: _Found) -> bool:
        return bool(found.stores) and bool(self.fetchable())

    def _obtainable(self, found: _Found) -> bool:
        if not found.target.built or found.override is not None:
            return False
        return self._downloadable(found) or _may_build()

    def _obtain(self, found: _Found, problem: str) -> None:
        if not self._obtainable(found):
            raise AssetError(self, self._advice(found, problem),
                             transient=True)
        try:
            self.cache_dir.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise self._cache_error(e) from e

        self.log.info('Getting %s: %s', self.url, problem)
        if self._downloadable(found):
            try:
                self._download(found)
                return
            except AssetError as e:
                if not _may_build():
                    raise
                self.log.info('%s, building instead', e)
        self._build(found)

    def _download(self, found: _Found) -> None:
        for artefact in self._needed(found):
            assert artefact.size is not None
            if self._problem_of(artefact, _refresh()) is None:
                continue
            try:
                mkosi_fetch.fetch(self._path(artefact), artefact.size,
                                  found.stores, self.log, _refresh())
            except mkosi_fetch.NotFetched as e:
                raise AssetError(
                    self, self._advice(found, f'{artefact.kind}: {e.msg}'),
                    e.transient) from e
            except OSError as e:
                raise self._cache_error(e) from e

    def _cache_error(self, error: OSError) -> AssetError:
        return AssetError(
            self, f'cannot write to the cache {self.cache_dir}: '
                  f'{error.strerror or error}; mend that, or set '
                  'QEMU_TEST_CACHE_DIR to another folder', transient=True)

    def _build(self, found: _Found) -> None:
        '''
        Run the builder. Where several processes do so, one of them
        builds, and the others find that there is nothing left to do.
        '''
        command = [sys.executable, str(BUILDER), found.target.arch,
                   self.name]
        self.log.info('Building %s: %s', self.url, ' '.join(command))
        tail: Deque[str] = deque(maxlen=20)
        with subprocess.Popen(command, stdin=subprocess.DEVNULL,
                              stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, encoding='utf-8',
                              errors='replace') as process:
            assert process.stdout is not None
            for line in process.stdout:
                self.log.info('%s', line.rstrip())
                tail.append(line)
        if process.returncode != 0:
            raise AssetError(
                self, f'{" ".join(command)} ended with exit code '
                      f'{process.returncode}:\n{"".join(tail)}',
                transient=process.returncode in TRANSIENT_EXIT_CODES)

        problem = self._problem(found)
        if problem is not None:
            raise AssetError(self, f'built, but {problem}')


def _may_build() -> bool:
    return bool(os.environ.get('QEMU_TEST_BUILD_IMAGES', False))


def _refresh() -> bool:
    return os.getenv('QEMU_TEST_REFRESH_CACHE') is not None


def _arch_of_test(path: str, known: Tuple[str, ...]) -> Optional[str]:
    '''The architecture that a test is for, as its place or name tells'''
    folder, name = os.path.split(path)
    if os.path.basename(folder) in known:
        return os.path.basename(folder)
    for arch in known:
        if name.startswith(f'test_{arch}_'):
            return arch
    return None
