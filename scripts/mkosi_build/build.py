# SPDX-License-Identifier: GPL-2.0-or-later
'''
A build: from a definition and a lock to artefacts under their hashes, with
no network in between. What was built once, is whole and has the same
identity is not built again.
'''

import json
import os
import shutil
import stat
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import (Any, Callable, Dict, List, Mapping, Optional, Sequence,
                    Tuple)

from . import (command, emulate, explain, lock as locks, repository,
               tools)
from .cache import (Cache, host_error, mark_used, remove_tree, sha256_file,
                    write_atomically)
from .error import HostError, InputError, MismatchError, MkosiError
from .lock import Lock
from .registry import Image, Registry, Target
from .report import Report
from .store import Store

# What a build needs below the builder's folder, in bytes: the tools tree,
# the packages twice and mkosi's workspace, with some air
SPACE_NEEDED = 3 << 30

RECORD = 'record.json'

# The programs that a build calls on the host, and the Debian packages
# that they are in
PROGRAMS = {'apt-get': 'apt', 'dpkg-deb': 'dpkg',
            'unshare': 'util-linux', 'setpriv': 'util-linux'}


@dataclass(frozen=True)
class Job:
    '''
    One image for one architecture, resolved: @folder has its definition,
    whose digest is @definition; @tool_lock is this host's among
    @tool_locks. A job that is not @locked has packages that the tree's
    locks do not name.
    '''
    image: Image
    target: Target
    folder: Path
    definition: str
    lock: Lock
    tool_lock: Lock
    tool_locks: Tuple[Lock, ...]
    locked: bool = True

    @property
    def name(self) -> str:
        '''Image and architecture, as a name for locks and logs.'''
        return f'{self.image.name}-{self.target.arch}'

    @property
    def identity(self) -> str:
        '''What decides the bytes; see lock.identity().'''
        return locks.identity(self.definition, self.lock, self.tool_locks)

    def unlocked(self, lock: Lock, tool_lock: Lock) -> 'Job':
        '''This job with packages that its locks do not name.'''
        others = tuple(t for t in self.tool_locks if t != self.tool_lock)
        return replace(self, lock=lock, tool_lock=tool_lock,
                       tool_locks=(*others, tool_lock), locked=False)


@dataclass(frozen=True)
class Built:
    '''An artefact that is whole: @path, its SHA-256, its size in bytes.'''
    path: Path
    sha256: str
    size: int


@dataclass(frozen=True)
class Result:
    '''The artefacts of a job by kind; @fresh if they were built just now.'''
    job: Job
    artefacts: Mapping[str, Built]
    fresh: bool


def host_architecture() -> str:
    '''QEMU's name of the architecture of this host.'''
    return os.uname().machine


def tools_folder(registry: Registry) -> Path:
    '''Where the definition and the locks of the tools tree are.'''
    return registry.path.parent / 'tools'


def load_tool_locks(registry: Registry) -> Dict[str, Lock]:
    '''
    The tools locks by host architecture. Raises LockError, HostError
    where there is none for this host.
    '''
    folder = tools_folder(registry)
    found = {path.stem: locks.load(path)
             for path in sorted(folder.glob('*.lock'))}
    host = host_architecture()
    if host not in found:
        raise HostError(
            f'no tools lock for a host of architecture {host} (there are: '
            f'{", ".join(found) or "none"})',
            next_step=f'scripts/mkosi-build.py {host} --update-lock tools')
    return found


def prepare(registry: Registry, image: Image, arch: str) -> Job:
    '''
    The job for @image and @arch. Raises RegistryError, LockError or
    InputError where the tree does not have what it needs.
    '''
    target = image.target(arch)
    folder = registry.path.parent / image.definition
    definition = locks.definition_digest(folder)
    lock = locks.load(folder / f'{arch}.lock')
    expected = (image.distribution, image.release, arch)
    found = (lock.distribution, lock.release, lock.architecture)
    if found != expected:
        raise InputError(
            f'{image.definition}/{arch}.lock: expected a lock for '
            f'{" ".join(expected)}, found one for {" ".join(found)}',
            next_step=f'scripts/mkosi-build.py {arch} --update-lock '
            f'{image.name}')
    tool_locks = load_tool_locks(registry)
    return Job(image, target, folder, definition, lock,
               tool_locks[host_architecture()],
               tuple(tool_locks[name] for name in sorted(tool_locks)))


def check_host(cache: Cache, arch: str) -> None:
    '''
    Raise HostError for whatever would stop a build for @arch on this host.
    '''
    command.check_programs(PROGRAMS)
    command.check_namespaces()
    emulate.check_host(arch)
    cache.check_writable()
    free = shutil.disk_usage(cache.root).free
    if free < SPACE_NEEDED:
        raise HostError(
            f'{cache.root}: a build needs {SPACE_NEEDED >> 20} MiB, '
            f'found {free >> 20} MiB free',
            next_step='free some space, or point QEMU_MKOSI_DIR at a '
            'larger file system')


class Builder:
    '''
    Builds jobs, in the folders of @cache, telling @report. @describe
    writes of each what is to lie beside its artefacts.
    '''

    def __init__(self, cache: Cache, report: Report,
                 describe: Optional['Describe'] = None) -> None:
        self.cache = cache
        self.report = report
        self.store = Store(cache, report)
        self.describe = describe

    def folder(self, job: Job) -> Path:
        '''Where the artefacts of @job are kept.'''
        return (self.cache.images / job.image.name / job.target.arch
                / job.identity)

    def find(self, job: Job) -> Optional[Result]:
        '''The artefacts of @job, if they are there and whole.'''
        folder = self.folder(job)
        artefacts = {}
        # Before the look, so that what is seen there stays
        mark_used(folder / RECORD)
        try:
            record = json.loads((folder / RECORD).read_text())
            for kind, known in record['artefacts'].items():
                path = folder / known['file']
                asset = self.cache.assets / known['sha256']
                if not (_whole(path, known) and _whole(asset, known)):
                    return None
                artefacts[kind] = Built(path, known['sha256'],
                                        known['size'])
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None
        if set(artefacts) != set(job.target.artefacts):
            return None
        return Result(job, artefacts, fresh=False)

    def fetch_packages(self, job: Job) -> None:
        '''
        Fetch the packages of @job's lock. Raises what Store.fetch() does.
        '''
        lock = job.lock
        self.store.fetch(lock.packages, lock.distribution, job.name,
                         release=lock.release, arch=lock.architecture,
                         further=job.image.mirrors)

    def build(self, job: Job, compare: bool) -> Result:
        '''
        The artefacts of @job, built if need be, in QEMU's asset cache too.
        Where @compare is true they have the registry's hashes.

        Raises what Store.fetch() does; MkosiError; MismatchError, and then
        the artefacts are kept for a look; HostError.
        '''
        result = self.find(job)
        try:
            self.cache.clear_stale()
        except OSError:
            # Nothing that a build which is there would need
            pass
        if result is None:
            check_host(self.cache, job.target.arch)

            def waiting() -> None:
                self.report.event('waiting', '         waiting for another '
                                  f'builder of {job.name}')

            try:
                with self.cache.lock(job.name, waiting):
                    # Whoever held the lock may have built this very job
                    result = (self.find(job) or self._relink(job)
                              or self._build(job, compare))
            except OSError as e:
                raise host_error(e, f'Building {job.name}') from e
        if compare:
            _compare(result)
        return result

    def _relink(self, job: Job) -> Optional[Result]:
        '''
        The artefacts of @job, if they are whole but for their names in the
        asset cache, which QEMU's cleaner removes in time.
        '''
        folder = self.folder(job)
        try:
            record = json.loads((folder / RECORD).read_bytes())
            files = [(folder / known['file'], known)
                     for known in record['artefacts'].values()]
            if not all(_whole(path, known) for path, known in files):
                return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None
        for path, known in files:
            asset = self.cache.add_asset(path, known['sha256'])
            known['verified'] = [_signature(path), _signature(asset)]
        write_atomically(folder / RECORD, json.dumps(record, indent=1) + '\n')
        return self.find(job)

    def _build(self, job: Job, compare: bool) -> Result:
        tree = tools.ensure(job.tool_lock, self.cache, self.store,
                            self.report, job.target.arch)
        self.fetch_packages(job)
        start = time.monotonic()
        with self.cache.scratch(job.name) as work:
            log = self.cache.log(job.name)
            self.report.event('log', f'         log: {log}', path=str(log))
            with self.report.stage(f'building {job.name}'):
                repo = work / 'repository'
                repo.mkdir()
                repository.make(job.lock, self.store, repo, tree)
                run_mkosi(job, tree, work, log, f'file://{repo}', [])
            with self.report.stage('verifying'):
                return self._take(job, work, compare, tree, start)

    def _take(self, job: Job, work: Path, compare: bool, tree: Path,
              start: float) -> Result:
        '''
        Give what mkosi left in @work, since @start, its final names.
        '''
        built = work / 'built'
        folder = self.folder(job)
        result = Result(job, _collect(job, work / 'output', built, folder),
                        fresh=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        if compare:
            try:
                _compare(result)
            except MismatchError:
                differs = folder.with_name(f'{job.identity}.differs')
                remove_tree(differs)
                os.replace(built, differs)
                self._explain(job, differs)
                raise
        if self.describe:
            self.describe(self, job, result.artefacts, tree, built)
        known = {}
        for kind, artefact in result.artefacts.items():
            path = built / artefact.path.name
            known[kind] = _record(
                path, self.cache.add_asset(path, artefact.sha256),
                artefact.sha256)
        record = {'identity': job.identity, 'locked': job.locked,
                  'seconds': round(time.monotonic() - start, 3),
                  'artefacts': known}
        write_atomically(built / RECORD, json.dumps(record, indent=1) + '\n')
        remove_tree(folder)
        os.replace(built, folder)
        return result

    def _explain(self, job: Job, differs: Path) -> None:
        '''
        Tell what is other in the artefacts in @differs, of those whose
        recorded bytes QEMU's asset cache has.
        '''
        tree = self.cache.tools / job.tool_lock.digest
        for kind, artefact in job.target.artefacts.items():
            if artefact.sha256 is None:
                continue
            recorded = self.cache.assets / artefact.sha256
            try:
                # Bytes that differ from their own name explain nothing
                if sha256_file(recorded) != artefact.sha256:
                    continue
            except OSError:
                continue
            explain.tell(self.report, f'{job.name}: {artefact.file} ({kind})',
                         recorded, differs / artefact.file, tree)


# A function that writes of a job's artefacts, just made with a tools tree,
# into a folder
Describe = Callable[[Builder, Job, Mapping[str, Built], Path, Path], None]


def _collect(job: Job, output: Path, built: Path,
             folder: Path) -> Dict[str, Built]:
    '''
    Move what mkosi made in @output to the new folder @built. Returns it as
    what it will be in its final @folder. Raises MkosiError where an
    artefact is missing.
    '''
    built.mkdir()
    artefacts = {}
    there = ', '.join(sorted(p.name for p in output.iterdir()))
    for kind, artefact in job.target.artefacts.items():
        path = output / artefact.file
        if path.is_symlink() or not path.is_file():
            raise MkosiError(
                f'{job.name}: mkosi made no {artefact.file} ({kind}); it '
                f'made: {there}', next_step='check the output names in '
                f'{job.image.definition}/mkosi.conf')
        path.chmod(0o444)
        artefacts[kind] = Built(folder / artefact.file, sha256_file(path),
                                path.stat().st_size)
        os.replace(path, built / artefact.file)
    for manifest in output.glob('*.manifest'):
        os.replace(manifest, built / 'manifest.json')
    return artefacts


def run_mkosi(job: Job, tree: Path, work: Path, log: Path, mirror: str,
              further: Sequence[str], network: bool = False) -> None:
    '''
    Run mkosi on a copy of the definition of @job, in the folder @work:
    afterwards output/ has what it made, packages/ what its package manager
    fetched. @further are more options. Raises MkosiError, HostError.
    '''
    for name in ('definition', 'output', 'packages', 'workspace'):
        (work / name).mkdir()
    definition = work / 'definition' / job.folder.name
    definition.mkdir()
    _stage(job, definition)
    tools.mkosi(tree, [*mkosi_options(job, work, mirror, network), *further,
                       'build'], log, network,
                emulate.registration(tree, job.target.arch))


def mkosi_options(job: Job, work: Path, mirror: str,
                  network: bool = False) -> List[str]:
    '''What mkosi is told of @job in the folder @work, beside its files.'''
    return [
        f'--directory={work / "definition" / job.folder.name}',
        f'--output-directory={work / "output"}',
        f'--package-cache-directory={work / "packages"}',
        f'--workspace-directory={work / "workspace"}',
        f'--distribution={job.lock.distribution}',
        f'--release={job.lock.release}',
        f'--architecture={tools.MKOSI_ARCHITECTURES[job.target.arch]}',
        f'--local-mirror={mirror}',
        f'--source-date-epoch={job.lock.epoch}',
        *([] if network else ['--with-network=no'])]


def _stage(job: Job, folder: Path) -> None:
    '''
    Copy the definition of @job to @folder, and what it includes beside it,
    with the modes and times that the checkout's umask and clock would
    otherwise give to what they add to an image.
    '''
    for name in locks.definition_files(job.folder):
        source = job.folder / name
        dest = Path(os.path.normpath(folder / name))
        dest.parent.mkdir(parents=True, exist_ok=True)
        if source.is_symlink():
            dest.symlink_to(os.readlink(source))
        else:
            shutil.copyfile(source, dest)
            # As in the definition's digest
            executable = source.stat().st_mode & stat.S_IXUSR
            dest.chmod(0o755 if executable else 0o644)
    times = (job.lock.epoch, job.lock.epoch)
    for parent, _, names in os.walk(folder.parent):
        Path(parent).chmod(0o755)
        for path in (Path(parent), *(Path(parent, n) for n in names)):
            os.utime(path, times, follow_symlinks=False)


def _signature(path: Path) -> List[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ino,
            status.st_dev]


def _record(path: Path, asset: Path, digest: str) -> Dict[str, Any]:
    return {'file': path.name, 'sha256': digest,
            'size': path.stat().st_size,
            'verified': [_signature(path), _signature(asset)]}


def _whole(path: Path, known: Mapping[str, Any]) -> bool:
    '''
    Whether the file @path is still the one that was verified, by its
    size, time and inode, or else by its hash.
    '''
    try:
        return (_signature(path) in known['verified']
                or sha256_file(path) == known['sha256'])
    except FileNotFoundError:
        return False


def _compare(result: Result) -> None:
    '''Raise MismatchError unless @result has the registry's hashes.'''
    job = result.job
    differing = []
    for kind, artefact in job.target.artefacts.items():
        found = result.artefacts[kind]
        if (found.sha256, found.size) != (artefact.sha256, artefact.size):
            differing.append(
                f'\n    {artefact.file} ({kind})'
                f'\n        expected {artefact.sha256}, '
                f'{artefact.size} bytes'
                f'\n        found    {found.sha256}, {found.size} bytes')
    if differing:
        folder = result.artefacts['kernel'].path.parent
        if result.fresh:
            folder = folder.with_name(f'{job.identity}.differs')
        raise MismatchError(
            f'{job.name}: other bytes than the registry names:'
            f'{"".join(differing)}',
            next_step=f'compare the files in {folder} with those of '
            'another build; if the registry is wrong, record these with '
            f'scripts/mkosi-build.py {job.target.arch} {job.image.name} '
            '--update')
