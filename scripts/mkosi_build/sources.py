# SPDX-License-Identifier: GPL-2.0-or-later
'''
The complete corresponding source of what a lock names: the source package
of each binary package, and of all that was linked into one (Debian's
Built-Using). Which files make up a source package, with their hashes, is
what the distribution has signed. All of it lies in the package store, and
a list says what belongs to which lock:

    $QEMU_MKOSI_DIR/sources/<lock's digest>.list
        a sorted line a file: SHA-256, size in bytes, source package,
        version, name of the file

Where the signed index has moved on to another version, the .dsc beside the
package is taken, if its own version is the wanted one, and the files with
the hashes in there. Its line ends with the word "unindexed": the hash of
that .dsc is only what the mirror sent. (The developer's signature in it
is kept, and can be checked with the keys of that time.)
'''

import hashlib
import os
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, Iterator, List, Optional, Sequence, Tuple

from . import command, resolve
from .build import Builder, Job
from .cache import host_error, write_atomically
from .error import FetchError
from .lock import Lock, Package
from .store import (GoneError, Store, first_with, hide_password,
                    host_mirrors)
from .transfer import TransferError, read

# Of Debian's control fields, those that name the sources of what was linked
# in (Debian Policy 7.8)
BUILT_USING = ('Built-Using', 'Static-Built-Using')
_USED = re.compile(r'([a-z0-9][a-z0-9+.-]*) \(= ([^\s()]+)\)')

_LINE = re.compile(r'([0-9a-f]{64}) ([0-9]{1,12}) (\S+) (\S+) '
                   r'([A-Za-z0-9][A-Za-z0-9._+~:-]*)( unindexed)?')
_FILE = re.compile(r'([0-9a-f]{64}) ([0-9]{1,12}) '
                   r'([A-Za-z0-9][A-Za-z0-9._+~:-]*)')
# The largest in Debian have some ten thousand
_DSC_LIMIT = 1 << 20


@dataclass(frozen=True, order=True)
class SourceFile:
    '''
    A file of a source package. It is a package to the store, named after
    its source; @indexed if the distribution has signed its hash.
    '''
    package: Package
    indexed: bool

    def line(self) -> str:
        '''As the list has it.'''
        p = self.package
        return (f'{p.sha256} {p.size} {p.name} {p.version} {p.file_name}'
                + ('' if self.indexed else ' unindexed'))


@dataclass(frozen=True)
class Sources:
    '''All files of the sources of a lock; @path is the list of them.'''
    path: Path
    files: Tuple[SourceFile, ...]

    @property
    def packages(self) -> Tuple[Package, ...]:
        '''What the store has to have, each once.'''
        return tuple({f.package.sha256: f.package
                      for f in self.files}.values())


def gather(lock: Lock, builder: Builder, what: str,
           further: Sequence[str] = ()) -> Sources:
    '''
    Have the complete source of @lock in the store. @what names it for
    messages, @further are more mirrors. Raises FetchError with the names of
    all that no mirror has, and what Store.fetch() does.
    '''
    if lock.distribution != 'debian':
        raise FetchError(
            f'{what}: gathering the source of packages of '
            f'{lock.distribution} is not supported yet',
            next_step='publish images of Debian alone; tests of others build '
            'them where they run')
    store, path = builder.store, builder.cache.root / 'sources'
    path /= f'{lock.digest}.list'
    store.fetch(lock.packages, lock.distribution, what, release=lock.release,
                arch=lock.architecture, further=further)
    needed = _needed(lock, store)
    with builder.cache.lock('sources'):
        known = _load(path, needed)
        if known and _all_whole(known, store):
            return known
        mirrors = host_mirrors(lock.distribution, lock.release,
                               lock.architecture, further)
        files, lacking = _find(lock, needed, mirrors, builder, what)
        sources = Sources(path, tuple(sorted(files)))
        try:
            store.fetch(sources.packages, lock.distribution,
                        f'the source of {what}', release=lock.release,
                        arch=lock.architecture, further=further)
        except GoneError as e:
            lacking += {f'{p.name} {p.version}' for p in e.packages}
        if lacking:
            raise _missing(what, lacking, mirrors)
        try:
            write_atomically(path, ''.join(
                f'{line}\n' for line in sorted({f.line() for f in files})))
        except OSError as e:
            raise host_error(e, f'Listing the source of {what}') from e
        return sources


def tell(builder: Builder, jobs: Sequence[Job]) -> None:
    '''Gather the source of each of @jobs' packages, and tell where it is.'''
    for job in jobs:
        sources = gather(job.lock, builder, job.name, job.image.mirrors)
        size = sum(p.size for p in sources.packages)
        unindexed = sorted({f'{f.package.name} {f.package.version}'
                            for f in sources.files if not f.indexed})
        builder.report.event(
            'sources', f'{job.image.name} {job.target.arch}: the complete '
            f'source of {len(job.lock.packages)} packages: '
            f'{len(sources.packages)} files, {size / 1e6:.1f} MB\n'
            + (f'    no longer in the signed index: {", ".join(unindexed)}\n'
               if unindexed else '') + f'    in {sources.path}',
            image=job.image.name, arch=job.target.arch,
            path=str(sources.path), files=len(sources.packages), bytes=size,
            unindexed=unindexed)


def _missing(what: str, lacking: Sequence[str],
             mirrors: Sequence[str]) -> FetchError:
    return FetchError(
        f'{what}: no mirror has the complete source, and without it the '
        f'image must not be published; missing: {", ".join(sorted(lacking))}'
        f'; asked: {", ".join(hide_password(m) for m in mirrors)}',
        next_step='set QEMU_MKOSI_MIRROR to a mirror or archive that has '
        'them; or lock newer packages with --update-lock')


# -- What is needed ---------------------------------------------------------

def _needed(lock: Lock, store: Store) -> Dict[str, str]:
    '''
    By name=version, the folder of the repository in which to look for a
    source package that the index does not have.
    '''
    needed = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for used in pool.map(_built_using,
                             (store.path(p) for p in lock.packages)):
            for name, version in used:
                first = name[:4] if name.startswith('lib') else name[0]
                needed[f'{name}={version}'] = f'pool/main/{first}/{name}'
    for package in lock.packages:
        needed[package.source] = package.location.rpartition('/')[0]
    return needed


def _built_using(deb: Path) -> List[Tuple[str, str]]:
    '''Name and version of the sources of what was linked into @deb.'''
    result = command.run(['dpkg-deb', '--field', str(deb), *BUILT_USING])
    if result.returncode:
        raise FetchError(f'{deb}: not a Debian package: '
                         f'{result.stderr.strip()}',
                         next_step='make the lock anew with --update-lock')
    return _USED.findall(result.stdout)


# -- What there is ----------------------------------------------------------

def _load(path: Path, needed: Dict[str, str]) -> Optional[Sources]:
    '''The list at @path, if it is there, sound, and of what is @needed.'''
    try:
        text = path.read_text(encoding='utf-8')
    except (OSError, UnicodeDecodeError):
        return None
    files = []
    for line in text.splitlines():
        match = _LINE.fullmatch(line)
        if not match:
            return None
        sha256, size, name, version, file, unindexed = match.groups()
        files.append(SourceFile(
            Package(name, version, file, sha256, int(size), 'source',
                    f'{name}={version}'), not unindexed))
    if {f.package.source for f in files} != set(needed):
        return None
    return Sources(path, tuple(files))


def _all_whole(sources: Sources, store: Store) -> bool:
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return all(pool.map(store.whole, sources.packages))


# -- Where it is ------------------------------------------------------------

def _find(lock: Lock, needed: Dict[str, str], mirrors: Sequence[str],
          builder: Builder, what: str) -> Tuple[List[SourceFile], List[str]]:
    '''The files of the sources @needed, and which of these nobody has.'''
    mirror = first_with(mirrors, f'dists/{lock.release}/InRelease')
    name = f'sources-{lock.digest[:16]}'
    files: List[SourceFile] = []
    with builder.report.stage(f'looking for the source of {what} at '
                              f'{hide_password(mirror)}'), \
            builder.cache.lock(name), builder.cache.scratch(name) as work:
        found = {}
        for index in resolve.source_lists(work, mirror, lock.release,
                                          lock.architecture):
            found.update(_indexed(index, needed))
        for package in found.values():
            files += package
        lacking = []
        for source in sorted(needed.keys() - found.keys()):
            beside = _beside(source, needed[source], mirrors)
            files += beside
            if not beside:
                lacking.append(source.replace('=', ' '))
    return files, lacking


def _fields(paragraph: str) -> Dict[str, str]:
    '''The fields of a control file's @paragraph, with continued lines.'''
    # Comments and signatures have no field's form
    return {match[1]: match[2].strip() for match in re.finditer(
        r'^([A-Za-z0-9-]+):((?:.*)(?:\n[ \t].*)*)', paragraph, re.M)}


def _paragraphs(index: Path) -> Iterator[str]:
    lines: List[str] = []
    with open(index, encoding='utf-8') as file:
        for line in file:
            if line != '\n':
                lines.append(line)
            elif lines:
                yield ''.join(lines)
                lines = []
    if lines:
        yield ''.join(lines)


def _indexed(index: Path,
             needed: Dict[str, str]) -> Dict[str, List[SourceFile]]:
    '''The files of those sources @needed that the verified @index has.'''
    names = {source.partition('=')[0] for source in needed}
    found = {}
    for paragraph in _paragraphs(index):
        # The index is large, and most of it of no interest
        match = re.search(r'^Package: (.*)$', paragraph, re.M)
        if not match or match[1] not in names:
            continue
        fields = _fields(paragraph)
        source = f'{match[1]}={fields.get("Version", "")}'
        if source in needed:
            files = _files(source, fields, fields.get('Directory', ''))
            found[source] = [SourceFile(p, True) for p in files]
    return {source: files for source, files in found.items()
            if any(f.package.file_name.endswith('.dsc') for f in files)}


def _files(source: str, fields: Dict[str, str],
           folder: str) -> List[Package]:
    '''
    The files of @source, a name=version, by the @fields of its index or
    .dsc, in the repository's @folder. None where a line is odd.
    '''
    name, _, version = source.partition('=')
    files = []
    for line in fields.get('Checksums-Sha256', '').splitlines():
        match = _FILE.fullmatch(line.strip())
        if match:
            files.append(Package(name, version, f'{folder}/{match[3]}',
                                 match[1], int(match[2]), 'source', source))
        elif line.strip():
            return []
    return files


def _beside(source: str, folder: str,
            mirrors: Sequence[str]) -> List[SourceFile]:
    '''
    The files of @source by its .dsc in the repository's @folder, at the
    first of @mirrors where that is the one; none if there is none.
    '''
    name, _, version = source.partition('=')
    # Names of files have no epoch
    location = f'{folder}/{name}_{version.partition(":")[2] or version}.dsc'
    for mirror in mirrors:
        try:
            data = read(f'{mirror}/{location}', _DSC_LIMIT)
            fields = _fields(data.decode())
        except (TransferError, ValueError):
            continue
        if (fields.get('Source'), fields.get('Version')) != (name, version):
            continue
        files = _files(source, fields, folder)
        if files:
            dsc = Package(name, version, location,
                          hashlib.sha256(data).hexdigest(), len(data),
                          'source', source)
            return [SourceFile(dsc, False),
                    *(SourceFile(p, False) for p in files)]
    return []
