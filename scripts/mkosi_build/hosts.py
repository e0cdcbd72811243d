# SPDX-License-Identifier: GPL-2.0-or-later
'''
Host roots: systems of distributions with their own QEMU, built by mkosi
from locked packages as images are, in which programs are run beside the
host's files. Nothing boots them, and nothing is installed on the host.
'''

import os
import re
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, List, Mapping, Optional, Tuple

from . import command, lock as locks, repository, resolve, tools, update
from .build import (Builder, Job, check_host, host_architecture,
                    load_tool_locks, run_mkosi, tools_folder)
from .cache import HOSTS, host_error, mark_used
from .error import FetchError, HostError, InputError
from .lock import Lock
from .nodes import STRING, Node, Place, compose, fields, items, reads
from .nodes import listed, mapping
from .registry import ARCHITECTURES, Boot, Budget, Image, Registry, Target
from .store import GoneError, first_with, host_mirrors
from .suite import Binaries

SCHEMA = 1

_WORD = reads(STRING, re.compile(r'[a-z0-9][a-z0-9.+-]*'),
              'letters, digits, ".", "+" and "-"')
_TEXT = reads(STRING, re.compile('.+'), 'text')
_PATH = reads(STRING, re.compile(r'/usr/[A-Za-z0-9._/+-]+'),
              'a path below /usr')

# Mounting is for a namespace's root alone. The host's /usr is gone for what
# is run, and all else is where it was.
_WRAPPER = '''\
#!/bin/sh
exec unshare --user --map-root-user --mount -- \\
    sh -c 'mount --rbind "$0" /usr && exec "$@"' \\
    {usr} {program} "$@"
'''


@dataclass(frozen=True)
class Host:  # pylint: disable=too-many-instance-attributes
    '''
    A row: @release of @distribution, with what its further @suites have.
    Of the system that the definition @folder makes, the paths of the
    @emulators by architecture, of @qemu_img, and of the @firmware by its
    name in QEMU's pc-bios; @package is the one that has QEMU's version.
    '''
    name: str
    description: str
    folder: Path
    distribution: str
    release: str
    suites: Tuple[str, ...]
    package: str
    emulators: Mapping[str, str]
    qemu_img: str
    firmware: Mapping[str, str]

    @property
    def image(self) -> Image:
        '''What a build takes it for; nobody boots it.'''
        arch = host_architecture()
        target = Target(arch, None, {}, Boot('', (), (), '', '', ''),
                        Budget(0, 0, 0, 0, 0), None)
        return Image(self.name, self.description, self.folder.name,
                     self.distribution, self.release, {arch: target})

    @property
    def lock(self) -> Path:
        '''The file of the lock for this host's architecture.'''
        return self.folder / f'{host_architecture()}.lock'


@dataclass(frozen=True)
class Root:
    '''The system of @host, built as @job says, in @folder.'''
    host: Host
    job: Job
    folder: Path

    @property
    def version(self) -> str:
        '''The version of the package that has QEMU.'''
        return next((p.version for p in self.job.lock.packages
                     if p.name == self.host.package), 'unknown')

    def binaries(self, folder: Path) -> Binaries:
        '''
        What tests are run on: programs in the new @folder, each of which
        runs that of the same name in this system.
        '''
        folder.mkdir(parents=True)
        emulators = {arch: self._wrap(folder, f'qemu-system-{arch}', path)
                     for arch, path in self.host.emulators.items()}
        return Binaries(emulators,
                        self._wrap(folder, 'qemu-img', self.host.qemu_img),
                        {name: Path(f'{self.folder}{path}') for name, path
                         in self.host.firmware.items()})

    def _wrap(self, folder: Path, name: str, program: str) -> Path:
        return wrap(self.folder, folder / name, program)


def wrap(root: Path, path: Path, program: str) -> Path:
    '''Make @path a program that runs @program of the system in @root.'''
    text = _WRAPPER.format(usr=shlex.quote(f'{root}/usr'), program=program)
    # Not by ourselves: what another thread starts at this very moment would
    # have the file open, and what may be written is "busy" when executed
    subprocess.run(['sh', '-c', 'printf %s "$1" > "$0" && chmod 755 "$0"',
                    str(path), text], check=True)
    return path


# -- Reading ----------------------------------------------------------------

def load(registry: Registry) -> Dict[str, Host]:
    '''
    The rows that the file hosts.yaml beside @registry has. Raises
    RegistryError with file and line.
    '''
    folder = registry.path.parent / HOSTS
    path = folder / 'hosts.yaml'
    place = Place(f'{HOSTS}/{path.name}')
    try:
        text = path.read_text(encoding='utf-8')
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f'{path}: {e}') from e
    top = fields(compose(text, place), place, ('schema', 'hosts'))
    if top['schema'].text != str(SCHEMA):
        raise place.error(f'expected schema {SCHEMA}, found {top["schema"]}')
    return {name: _read(name, node, place, folder)
            for name, node in mapping(top['hosts'], place).items()}


def _read(name: str, node: Node, place: Place, folder: Path) -> Host:
    pairs = fields(node, place, (
        'description', 'distribution', 'release', 'package', 'emulators',
        'qemu-img', 'firmware'), ('suites',))
    if not (folder / name / 'mkosi.conf').is_file():
        raise InputError(f'{place.file}:{node.line}: no definition '
                         f'{name}/mkosi.conf beside it',
                         next_step='write it, or correct the name')
    return Host(
        name, _TEXT(pairs['description'], place), folder / name,
        _WORD(pairs['distribution'], place), _WORD(pairs['release'], place),
        items(pairs['suites'], place, _WORD) if 'suites' in pairs else (),
        _WORD(pairs['package'], place),
        {arch: _PATH(value, place) for arch, value in fields(
            pairs['emulators'], place, (), ARCHITECTURES).items()},
        _PATH(pairs['qemu-img'], place),
        {key: _PATH(value, place) for key, value
         in mapping(pairs['firmware'], place).items()})


def choose(hosts: Mapping[str, Host], names: List[str]) -> List[Host]:
    '''Those of the @names, or all. Raises InputError for an unknown one.'''
    for name in names:
        if name not in hosts:
            raise InputError(f'there is no row {name!r}',
                             next_step=f'choose among: {listed(hosts)}')
    return [host for host in hosts.values() if not names
            or host.name in names]


# -- Building ---------------------------------------------------------------

class Roots:
    '''Locks and builds the roots of rows with the tools of @registry.'''

    def __init__(self, builder: Builder, registry: Registry) -> None:
        self.builder = builder
        self.registry = registry
        self.tool_locks = load_tool_locks(registry)
        self.tool_lock = self.tool_locks[host_architecture()]

    def _job(self, host: Host, lock: Optional[Lock]) -> Job:
        definition = locks.definition_digest(host.folder)
        nothing = Lock(definition, host.distribution, host.release,
                       host_architecture(), self.tool_lock.epoch, ())
        return Job(host.image, host.image.target(host_architecture()),
                   host.folder, definition, lock or nothing, self.tool_lock,
                   tuple(self.tool_locks.values()))

    def tools(self, allow_newer: bool) -> Path:
        '''
        The tools tree, of newer packages than the lock names where those
        are gone and @allow_newer is true. Raises what tools.ensure() does.
        '''
        builder = self.builder
        try:
            return tools.ensure(self.tool_lock, builder.cache, builder.store,
                                builder.report)
        except GoneError:
            if not allow_newer:
                raise
        lock = resolve.tools_lock(
            tools_folder(self.registry), host_architecture(), builder.cache,
            builder.report)
        return tools.ensure(lock, builder.cache, builder.store,
                            builder.report)

    def resolve(self, host: Host, expired: bool = False) -> Lock:
        '''
        A new lock for @host; see image_lock(), which says what is raised,
        too. Raises FetchError where no mirror that this host knows has the
        distribution.
        '''
        if host.distribution not in ('debian', 'ubuntu', 'fedora'):
            raise FetchError(
                f'{host.name}: its packages are in several repositories, of '
                'which one lock can\'t be made yet')
        look_for_mirror(host)
        check_host(self.builder.cache, host_architecture())
        job = self._job(host, None)
        return resolve.image_lock(job, self.tools(allow_newer=False),
                                  self.builder.cache, self.builder.report,
                                  resolve.Further(host.suites, expired))

    def update_lock(self, host: Host, expired: bool) -> None:
        '''Resolve the packages of @host anew, and write its lock.'''
        update.write_lock(self.builder, host.lock,
                          self.resolve(host, expired))

    def build(self, host: Host, allow_newer: bool) -> Root:
        '''
        The root of @host, built if need be, with newer packages than the
        lock names where those are gone and @allow_newer is true.

        Raises FetchError, and what the builds of images do.
        '''
        if not host.lock.exists():
            look_for_mirror(host)
            raise FetchError(
                'nobody has locked it for a host of architecture '
                f'{host_architecture()}',
                next_step=f'scripts/mkosi-matrix.py {host.name} '
                '--update-lock')
        lock = locks.load(host.lock)
        job = self._job(host, lock)
        if lock.definition != job.definition:
            raise InputError(
                f'{host.name}: the definition has changed since its lock '
                'was made', next_step='scripts/mkosi-matrix.py '
                f'{host.name} --update-lock')
        try:
            return self._root(host, job)
        except GoneError as e:
            if not allow_newer:
                raise
            self.builder.report.event('warning', e.message)
        newer = self._newer(host, job)
        self.builder.report.event(
            'warning', f'*** {host.name} is UNLOCKED: newer packages than '
            'its lock names')
        return self._root(host, newer)

    def _newer(self, host: Host, job: Job) -> Job:
        return update.newer_job(self.builder, self.registry, job,
                                resolve.Further(host.suites))

    def _root(self, host: Host, job: Job) -> Root:
        cache = self.builder.cache
        folder = cache.root / HOSTS / host.name / job.identity
        mark_used(folder)
        if not folder.is_dir():
            check_host(cache, host_architecture())
            try:
                with cache.lock(f'host-{host.name}'):
                    if not folder.is_dir():
                        self._build(host, job, folder)
            except OSError as e:
                raise host_error(e, f'Building {host.name}') from e
        return Root(host, job, folder)

    def _build(self, host: Host, job: Job, folder: Path) -> None:
        builder = self.builder
        tree = tools.ensure(job.tool_lock, builder.cache, builder.store,
                            builder.report)
        builder.fetch_packages(job)
        log = builder.cache.log(f'host-{host.name}')
        builder.report.event('log', f'         log: {log}', path=str(log))
        with builder.cache.scratch(f'host-{host.name}') as work, \
                builder.report.stage(f'building {host.name}'):
            repo = work / 'repository'
            repo.mkdir()
            repository.make(job.lock, builder.store, repo, tree)
            run_mkosi(job, tree, work, log, f'file://{repo}', [])
            built = work / 'output/root'
            check(built, host)
            folder.parent.mkdir(parents=True, exist_ok=True)
            os.replace(built, folder)


def look_for_mirror(host: Host) -> None:
    '''Raise FetchError unless a mirror that is known here has @host.'''
    first_with(host_mirrors(host.distribution, host.release,
                            host_architecture()),
               f'dists/{host.release}/Release'
               if host.distribution in ('debian', 'ubuntu')
               else 'repodata/repomd.xml')


def check(root: Path, host: Host) -> None:
    '''
    Raise InputError unless @root has the programs and firmware that the
    row says, HostError where they can't be run.
    '''
    for path in (host.qemu_img, *host.emulators.values(),
                 *host.firmware.values()):
        if not Path(f'{root}{path}').exists():
            raise InputError(f'{host.name}: its system lacks {path}',
                             next_step=f'correct {HOSTS}/hosts.yaml, or '
                             f'the packages in {host.name}/mkosi.conf')
    program = wrap(root, root.parent / 'qemu-img', host.qemu_img)
    result = command.run([str(program), '--version'])
    if result.returncode:
        raise HostError(f'{host.name}: its {host.qemu_img} does not run '
                        f'here: {result.stderr.strip()}',
                        next_step='look whether this host lets users make '
                        'namespaces')
