# SPDX-License-Identifier: GPL-2.0-or-later
'''
What the caches hold, and who refers to it: the registry and the locks of
this tree, the override file, the lists of sources. Looks, and changes
nothing.
'''

import json
import os
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Dict, Iterable, List, Optional, Set, Tuple

from . import lock as locks
from .build import RECORD, load_tool_locks, prepare
from .cache import HOSTS, Cache
from .error import InputError
from .lock import Lock
from .registry import Registry

# In seconds: after this nobody goes on with what was interrupted
DAY = 86400

_HASH = re.compile(r'[0-9a-f]{64}')
_PART = re.compile(r'[0-9a-f]{64}\.part')
_TEMPORARY = re.compile(r'\..+\.[0-9]+\.tmp|\.probe\.[0-9]+')
# The same in the asset cache, where others have temporary files, too
_OUR_TEMPORARY = re.compile(
    r'\.[0-9a-f]{64}(\.stamp)?\.[0-9]+\.tmp|\.probe\.[0-9]+')
_ASSET = re.compile(r'([0-9a-f]{64})(\.stamp|\.verified)?')

# Why an asset goes, with the last of its builds
OF_BUILD = 'of a build that goes'
Inode = Tuple[int, int]


@dataclass
class Entry:
    '''
    Something in the caches that goes or stays as a whole: @paths, of which
    the last time of modification is when it was @used. @users refer to it;
    @why says why it can go, nothing if it can't. @lock protects it.
    @inodes are its files, with the bytes that each takes on the disk.
    '''
    area: str
    name: str
    paths: List[Path]
    users: List[str] = field(default_factory=list)
    why: str = ''
    lock: str = ''
    stamps: List[Path] = field(default_factory=list)
    inodes: Dict[Inode, int] = field(default_factory=dict)

    @property
    def size(self) -> int:
        '''In bytes on the disk.'''
        return sum(self.inodes.values())

    def used(self) -> float:
        '''When it was last used, in seconds since 1970.'''
        times = [0.0]
        for path in (*self.stamps, *self.paths):
            try:
                times.append(path.stat().st_mtime)
            except OSError:
                # A link to nowhere, or gone by now
                pass
        return max(times)


def _inodes(paths: Iterable[Path]) -> Dict[Inode, int]:
    '''All files of @paths and below.'''
    found = {}
    for top in paths:
        files = [top]
        if top.is_dir() and not top.is_symlink():
            files += [Path(folder, name)
                      for folder, folders, names in os.walk(top)
                      for name in folders + names]
        for path in files:
            try:
                status = path.lstat()
            except FileNotFoundError:
                continue
            found[status.st_dev, status.st_ino] = status.st_blocks * 512
    return found


def children(folder: Path) -> List[Path]:
    '''What is in @folder, nothing if there is no such folder.'''
    try:
        return sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def total(entries: Iterable[Entry]) -> int:
    '''The bytes that @entries take together; names of one file count once.'''
    found: Dict[Inode, int] = {}
    for entry in entries:
        found.update(entry.inodes)
    return sum(found.values())


# -- Who refers to what -----------------------------------------------------

class References:
    '''
    Who refers to what: packages, tools trees, builds, lists of sources and
    assets, by hash or identity. Raises InputError for what can't be read,
    since it might refer to anything.
    '''
    def __init__(self, registry: Registry, cache: Cache) -> None:
        self.packages: Dict[str, List[str]] = {}
        self.tools: Dict[str, List[str]] = {}
        self.builds: Dict[str, List[str]] = {}
        self.sources: Dict[str, List[str]] = {}
        self.assets: Dict[str, List[str]] = {}
        # By the names of their logs
        self.jobs: Dict[str, str] = {}
        for image in registry.images.values():
            for arch, target in image.targets.items():
                user = f'{image.name} {arch}'
                self.jobs[f'{image.name}-{arch}'] = user
                for artefact in target.artefacts.values():
                    _add(self.assets, artefact.sha256, user)
                _add(self.builds, target.identity, user)
                path = (registry.path.parent / image.definition
                        / f'{arch}.lock')
                if target.not_locked is None or path.exists():
                    job = prepare(registry, image, arch)
                    _add(self.builds, job.identity, user)
                    self.add_lock(job.lock, user)
        tool_locks = load_tool_locks(registry)
        for arch, lock in tool_locks.items():
            self.add_tools(lock, f'tools {arch}')
        self._add_hosts(registry, list(tool_locks.values()))
        self._add_override(cache)
        self._add_newer(cache)
        self._add_sources(cache)

    def _add_hosts(self, registry: Registry, tool_locks: List[Lock]) -> None:
        for path in sorted((registry.path.parent / HOSTS).glob('*/*.lock')):
            user = f'host {path.parent.name} {path.stem}'
            lock = locks.load(path)
            self.add_lock(lock, user)
            _add(self.builds, locks.identity(
                locks.definition_digest(path.parent), lock, tool_locks), user)

    def _add_newer(self, cache: Cache) -> None:
        for folder in children(cache.root / 'newer'):
            user = 'newer ' + ', '.join(self.builds.get(folder.name, []))
            # A lock that can't be read is made anew by --allow-newer
            if folder.name in self.builds:
                for name, add in (('image', self.add_lock),
                                  ('tools', self.add_tools)):
                    try:
                        add(locks.load(folder / f'{name}.lock'), user)
                    except locks.LockError:
                        pass

    def _add_sources(self, cache: Cache) -> None:
        for path in children(cache.root / 'sources'):
            if path.stem in self.sources:
                user = 'sources of ' + ', '.join(self.sources[path.stem])
                for line in path.read_text(errors='replace').splitlines():
                    if _HASH.fullmatch(line[:64]):
                        _add(self.packages, line[:64], user)

    def add_lock(self, lock: Lock, user: str) -> None:
        '''@user has the packages of @lock, and their sources.'''
        _add(self.sources, lock.digest, user)
        for package in lock.packages:
            _add(self.packages, package.sha256, user)

    def add_tools(self, lock: Lock, user: str) -> None:
        '''@user has the tools tree of @lock, and its packages.'''
        _add(self.tools, lock.digest, user)
        self.add_lock(lock, user)

    def _add_override(self, cache: Cache) -> None:
        try:
            images = json.loads(cache.override.read_text())['images']
            for name, targets in images.items():
                for arch, entry in targets.items():
                    user = f'override {name} {arch}'
                    _add(self.builds, entry['identity'], user)
                    for artefact in entry['artefacts'].values():
                        _add(self.assets, artefact['sha256'], user)
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError, TypeError,
                AttributeError, RecursionError) as e:
            raise InputError(
                f'{cache.override}: not a file that --local wrote: {e!r}',
                next_step='remove it, or build again with --local') from e


def _add(users: Dict[str, List[str]], key: Optional[str],
         user: str) -> None:
    if key is not None and user not in users.setdefault(key, []):
        users[key].append(user)


# -- What there is ----------------------------------------------------------

def hashes_of(build: Path) -> Set[str]:
    '''The assets that the builder added for the build in the folder.'''
    try:
        record = json.loads((build / RECORD).read_bytes())
        return {str(known['sha256'])
                for known in record['artefacts'].values()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError,
            RecursionError):
        return set()


class Survey:
    '''All that the caches hold, as @entries.'''

    def __init__(self, cache: Cache, known: References) -> None:
        self.cache = cache
        self.known = known
        self.now = time.time()
        self.entries: List[Entry] = []
        parts = {'store': self._store, 'tools': self._tools,
                 'images': self._images, 'work': self._work,
                 'log': self._log, 'newer': self._newer,
                 'sources': self._sources, 'declared': self._declared,
                 'verify': self._verify, HOSTS: self._hosts}
        for name, look in parts.items():
            for path in children(cache.root / name):
                look(path)
        for path in children(cache.root):
            if path == cache.override:
                self._add('override', path, ['tests'])
            elif path.name not in (*parts, 'locks'):
                self._other(path)
        self._assets()

    def _add(self, area: str, path: Path, users: Optional[List[str]] = None,
             why: str = '', lock: str = '') -> Entry:
        '''@why counts if there are no @users.'''
        base = (self.cache.assets if area == 'assets' else self.cache.root)
        entry = Entry(area, str(path.relative_to(base)), [path], users or [],
                      '' if users else why, lock)
        entry.inodes = _inodes(entry.paths)
        self.entries.append(entry)
        return entry

    def _old(self, path: Path) -> bool:
        try:
            return self.now - path.lstat().st_mtime > DAY
        except FileNotFoundError:
            return False

    def _other(self, path: Path, lock: str = '',
               ours: 're.Pattern[str]' = _TEMPORARY,
               area: str = 'other') -> None:
        '''Nobody's, but for what a killed process left.'''
        left = ours.fullmatch(path.name) and self._old(path)
        self._add(area, path, why='left by a killed process' if left else '',
                  lock=lock)

    def _store(self, path: Path) -> None:
        if _HASH.fullmatch(path.name):
            self._add('store', path, self.known.packages.get(path.name),
                      'a package of no lock', 'store')
        elif _PART.fullmatch(path.name):
            self._add('store', path, why='an interrupted download'
                      if self._old(path) else '', lock='store')
        else:
            self._other(path, 'store')

    def _tools(self, path: Path) -> None:
        if _HASH.fullmatch(path.name):
            self._add('tools', path, self.known.tools.get(path.name),
                      'a tools tree of no lock', f'tools-{path.name[:16]}')
        else:
            self._other(path)

    def _images(self, image: Path) -> None:
        if not image.is_dir():
            self._other(image)
        for arch in children(image):
            if not arch.is_dir():
                self._other(arch)
            lock = f'{image.name}-{arch.name}'
            for path in children(arch):
                if path.name.endswith('.differs'):
                    self._add('images', path, why='not what the registry '
                              'names', lock=lock)
                elif _HASH.fullmatch(path.name):
                    entry = self._add(
                        'images', path, self.known.builds.get(path.name),
                        'a build of an old identity', lock)
                    entry.stamps = [path / RECORD, *(
                        self.cache.assets / f'{sha256}.stamp'
                        for sha256 in hashes_of(path))]
                else:
                    self._other(path, lock)

    def _hosts(self, host: Path) -> None:
        if not host.is_dir():
            self._other(host)
        for path in children(host):
            if _HASH.fullmatch(path.name):
                self._add(HOSTS, path, self.known.builds.get(path.name),
                          'a root of an old identity', f'host-{host.name}')
            else:
                self._other(path)

    def _work(self, path: Path) -> None:
        self._add('work', path, why='left by a killed process',
                  lock=path.name)

    def _log(self, path: Path) -> None:
        # resolve-<job> too
        users = [user for job, user in self.known.jobs.items()
                 if f'-{path.stem}'.endswith(f'-{job}')]
        if path.suffix == '.log':
            self._add('log', path, users,
                      'a log of no image' if self._old(path) else '')
        else:
            self._other(path)

    def _newer(self, path: Path) -> None:
        if _HASH.fullmatch(path.name):
            self._add('newer', path, self.known.builds.get(path.name),
                      'locks for an old identity', 'store').stamps = [
                          path, *children(path)]
        else:
            self._other(path)

    def _sources(self, path: Path) -> None:
        if path.suffix == '.list' and _HASH.fullmatch(path.stem):
            self._add('sources', path, self.known.sources.get(path.stem),
                      'a list of sources of no lock', 'sources')
        else:
            self._other(path, 'sources')

    def _declared(self, path: Path) -> None:
        if path.suffix == '.json' and _HASH.fullmatch(path.stem):
            self._add('declared', path, self.known.packages.get(path.stem),
                      'of a package of no lock')
        else:
            self._other(path)

    def _verify(self, path: Path) -> None:
        if path.suffix in ('.json', '.differs'):
            user = self.known.jobs.get(path.stem)
            self._add('verify', path, [user] if user else [],
                      'a comparison of no image', f'verify-{path.stem}')
        else:
            self._other(path)

    def _assets(self) -> None:
        old: Set[str] = set()
        kept: Set[str] = set()
        for entry in self.entries:
            if entry.area == 'images':
                (old if entry.why else kept).update(
                    hashes_of(entry.paths[0]))
        found: Dict[str, List[Path]] = {}
        for path in children(self.cache.assets):
            match = _ASSET.fullmatch(path.name)
            if match:
                found.setdefault(match.group(1), []).append(path)
            else:
                self._other(path, ours=_OUR_TEMPORARY, area='assets')
        for sha256, paths in found.items():
            ours = sha256 in old and sha256 not in kept
            entry = self._add('assets', paths[0],
                              self.known.assets.get(sha256),
                              OF_BUILD if ours else '')
            entry.paths = paths
            entry.stamps = [p for p in paths if p.suffix == '.stamp']
            entry.inodes = _inodes(paths)
