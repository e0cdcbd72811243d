# SPDX-License-Identifier: GPL-2.0-or-later
'''
Publishing images, each with all that its licences and a rebuild ask for:
complete source, packages, locks, licences, where it came from. What lacks
any of these is not published.

A store is flat:

    <sha256>                          an object, named by its hash; shared
                                      by all images that have it
    <image>-<arch>-<identity>.json    the index of one image, written last,
                                      when all its objects are there

The index is JSON: "format", "image", "arch", "identity" and "objects", a
list with the "role", "name", "sha256" and "size" of each. It is the same
whoever publishes, but for "published", its last key: when that was ("time",
UTC), and more "objects", which tell of that one build.

Roles: kernel, initrd, disk; lock, package, source: what it was made from;
tools-lock, tools-package, tools-source: what it was made with; packages:
the list of them, as SPDX; licences: their texts. In "published": log,
provenance, sources (which source files are of what).
'''

import json
import os
import re
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, Iterable, List, Sequence, Tuple

from . import licences, lock as locks, provenance, sources, upload
from .agreement import disagreement
from .build import RECORD, Builder, Job, Result
from .cache import sha256_file
from .destination import Destination, Item, OtherBytesError
from .error import InputError, PublishError, UsageError
from .registry import Registry

FORMAT = 'mkosi-build index 1'
CONNECTIONS = 4
STORES = 'QEMU_TEST_MKOSI_STORES'

_HASH = re.compile('[0-9a-f]{64}')


@dataclass(frozen=True, order=True)
class Entry:
    '''An object as the index has it, and its file here.'''
    role: str
    name: str
    sha256: str
    size: int
    path: Path

    def as_json(self) -> Dict[str, Any]:
        '''For the index.'''
        return {'role': self.role, 'name': self.name, 'sha256': self.sha256,
                'size': self.size}


def index_name(job: Job) -> str:
    '''The name of the index of @job's image.'''
    return f'{job.name}-{job.identity}.json'


# -- Publishing -------------------------------------------------------------

def publish(builder: Builder, jobs: Sequence[Job]) -> None:
    '''
    Publish the images of @jobs where QEMU_MKOSI_PUBLISH says. Raises
    InputError or MismatchError before anything is done where one is not
    built here, or not what the registry names; FetchError where source or
    packages are not complete; UsageError; PublishError.
    '''
    destination = upload.configured()
    if destination is None:
        raise UsageError(
            'nowhere to publish to: QEMU_MKOSI_PUBLISH is not set',
            next_step='set it to an absolute path, or to the URL of a '
            'server or a package of GitLab\'s registry')
    results = [_required(builder, job) for job in jobs]
    for result in results:
        _publish(builder, result, destination)


def _required(builder: Builder, job: Job) -> Result:
    '''The artefacts of @job, if they are what the registry names.'''
    problem = disagreement(job)
    if problem:
        raise problem
    if not builder.find(job):
        raise InputError(
            f'{job.image.name} {job.target.arch} is not built here',
            next_step='scripts/mkosi-build.py '
            f'{job.target.arch} {job.image.name}')
    return builder.build(job, compare=True)


def _publish(builder: Builder, result: Result,
             destination: Destination) -> None:
    job = result.job
    name = f'publish-{job.name}'

    def waiting() -> None:
        builder.report.event('waiting', '         waiting for another '
                             f'publisher of {job.name}')

    with builder.cache.lock(name, waiting), \
            builder.cache.scratch(name) as work:
        gathered = _gather_sources(builder, job)
        entries = sorted({*_artefacts(result), *_inputs(builder, job, work),
                          *_source_files(builder, gathered),
                          *_texts(builder, job, work)})
        index: Dict[str, Any] = {
            'format': FORMAT, 'image': job.image.name,
            'arch': job.target.arch, 'identity': job.identity,
            'objects': [entry.as_json() for entry in entries]}
        there = _known(destination, job, index)
        own = [] if there else _own(builder, job, work, gathered)
        items = _items((*entries, *own))
        uploaded = _upload(builder, destination, job.name, items)
        fresh = not there and _finish(destination, job, work, {
            **index, 'published': {
                'time': time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime()),
                'objects': [entry.as_json() for entry in own]}})
    _tell_done(builder, destination, job, fresh, (items, uploaded))


def _tell_done(builder: Builder, destination: Destination, job: Job,
               fresh: bool, items: Tuple[List[Item], List[Item]]) -> None:
    total, uploaded = items
    size = sum(item.size for item in uploaded)
    builder.report.event(
        'published', f'{job.image.name} {job.target.arch}: '
        + ('published' if fresh else 'had been published')
        + f' at {destination.shown}\n'
        f'    {len(total)} objects, of which {len(uploaded)} uploaded, '
        f'{size / 1e6:.1f} MB\n    {index_name(job)}',
        image=job.image.name, arch=job.target.arch, identity=job.identity,
        index=index_name(job), objects=len(total), uploaded=len(uploaded),
        bytes=size, fresh=fresh)


def _known(destination: Destination, job: Job,
           index: Dict[str, Any]) -> bool:
    '''
    Whether @index is there, by whoever has published it. What an upload
    has left that was cut off goes, where that can be. Raises PublishError
    if it is another one.
    '''
    data = destination.read(index_name(job))
    if data is None:
        return False
    try:
        found = json.loads(data)
        del found['published']
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        if (_cut_off(data, index)
                and destination.remove_half_made(index_name(job))):
            return False
        raise PublishError(
            f'{destination.shown}: {index_name(job)} is not an index, or not '
            'the whole of one', next_step='it may be of an upload that was '
            'cut off: remove it there, and publish again') from e
    if found != index:
        raise PublishError(
            f'{destination.shown}: {index_name(job)} is there with other '
            'objects than this build has', next_step='nothing was '
            'overwritten; compare it with that of a publishing to an empty '
            'folder, QEMU_MKOSI_PUBLISH=/FOLDER')
    return True


def _cut_off(data: bytes, index: Dict[str, Any]) -> bool:
    '''Whether @data is the beginning of @index, by whoever.'''
    # All but the closing brace
    start = _text(index)[:-3].encode()
    return start.startswith(data) or data.startswith(start)


def _text(index: Dict[str, Any]) -> str:
    return json.dumps(index, indent=1) + '\n'


def _finish(destination: Destination, job: Job, work: Path,
            index: Dict[str, Any]) -> bool:
    '''Write @index; whether nobody else was quicker.'''
    path = work / index_name(job)
    path.write_text(_text(index), encoding='utf-8')
    item = Item(path.name, path, sha256_file(path), path.stat().st_size)
    plain = {key: value for key, value in index.items()
             if key != 'published'}
    while True:
        try:
            return destination.add(item)
        except OtherBytesError:
            # Raises another error where that is not the same image
            if _known(destination, job, plain):
                return False
            # It was half of one, and is gone


def _items(entries: Iterable[Entry]) -> List[Item]:
    '''What to upload for @entries, each object once.'''
    return [Item(entry.sha256, entry.path, entry.sha256, entry.size)
            for entry in {e.sha256: e for e in entries}.values()]


def _upload(builder: Builder, destination: Destination, name: str,
            items: Sequence[Item]) -> List[Item]:
    '''Upload those of @items that are not there. Returns these.'''
    size = sum(item.size for item in items)
    uploaded, done, handled = [], 0, 0
    stage = f'publishing {name}'
    with builder.report.stage(f'{stage}: {len(items)} objects, '
                              f'{size / 1e6:.1f} MB'), \
            ThreadPoolExecutor(CONNECTIONS) as pool:
        try:
            for item, new in zip(items, pool.map(destination.add, items)):
                uploaded += [item] if new else []
                done += 1
                handled += item.size
                builder.report.count(stage, done, len(items), handled)
        except BaseException:
            # The others need not go on
            destination.stop.set()
            raise
    return uploaded


# -- What is published ------------------------------------------------------

def _artefacts(result: Result) -> List[Entry]:
    return [Entry(kind, built.path.name, built.sha256, built.size,
                  built.path) for kind, built in result.artefacts.items()]


_Gathered = List[Tuple[str, sources.Sources]]


def _gather_sources(builder: Builder, job: Job) -> _Gathered:
    '''
    The sources of all packages that are published, by role; these are then
    in the store, too.
    '''
    gathered = [('source', sources.gather(job.lock, builder, job.name,
                                          job.image.mirrors))]
    for lock in job.tool_locks:
        gathered.append(('tools-source', sources.gather(
            lock, builder, f'tools-{lock.architecture}')))
    return gathered


def _source_files(builder: Builder, gathered: _Gathered) -> List[Entry]:
    return [Entry(role, p.file_name, p.sha256, p.size,
                  builder.store.path(p))
            for role, found in gathered for p in found.packages]


def _inputs(builder: Builder, job: Job, work: Path) -> List[Entry]:
    '''Locks, and the packages that they name.'''
    entries = []
    for prefix, lock in [('', job.lock),
                         *(('tools-', lock) for lock in job.tool_locks)]:
        entries.append(_write(
            work, f'{prefix}lock', locks.render(lock),
            f'{prefix or job.image.name + "-"}{lock.architecture}.lock'))
        entries += [Entry(f'{prefix}package', p.file_name, p.sha256, p.size,
                          builder.store.path(p)) for p in lock.packages]
    return entries


def _texts(builder: Builder, job: Job, work: Path) -> List[Entry]:
    '''What people want to read about it.'''
    return [_document(builder, job, 'packages'),
            _write(work, 'licences',
                   licences.gather(job.lock, builder.store),
                   f'{job.name}.licences.json')]


def _document(builder: Builder, job: Job, role: str) -> Entry:
    path = provenance.documents(builder, job)[role]
    return _entry(role, path, f'{job.name}.{path.name}')


def _write(work: Path, role: str, text: str, name: str) -> Entry:
    path = work / name
    path.write_text(text, encoding='utf-8')
    return _entry(role, path, name)


def _entry(role: str, path: Path, name: str) -> Entry:
    return Entry(role, name, sha256_file(path), path.stat().st_size, path)


def _own(builder: Builder, job: Job, work: Path,
         gathered: _Gathered) -> List[Entry]:
    '''What tells of this build and not of others of the same image.'''
    entries = [_document(builder, job, 'provenance')]
    for lock, (_, found) in zip((job.lock, *job.tool_locks), gathered):
        entries.append(_write(
            work, 'sources', found.path.read_text(encoding='utf-8'),
            f'{"" if lock is job.lock else "tools-"}{lock.architecture}'
            '.sources'))
    log = builder.cache.log(job.name)
    record = builder.folder(job) / RECORD
    if log.exists() and log.stat().st_mtime <= record.stat().st_mtime:
        # In the folder, a later build may write over it
        entries.append(_write(work, 'log', log.read_text(
            encoding='utf-8', errors='replace'), f'{job.name}.log'))
    else:
        builder.report.event('warning', f'{job.name}: published without its '
                             f'log: {log} is gone, or of a later build')
    return sorted(entries)


# -- Whether it is published ------------------------------------------------

def tell(builder: Builder, registry: Registry,
         jobs: Sequence[Job]) -> None:
    '''
    Tell which of the images of @jobs are published: where QEMU_MKOSI_PUBLISH
    says, else in the tests' stores. Raises PublishError unless each is
    complete somewhere, UsageError where there is nobody to ask.
    '''
    stores = _stores(registry)
    lacking = []
    for job in jobs:
        states = [_tell_one(builder, store, job) for store in stores]
        if 'published' not in states:
            lacking.append(f'{job.image.name} {job.target.arch}')
    if lacking:
        raise PublishError(f'not published, or not wholly: '
                           f'{", ".join(lacking)}',
                           next_step='scripts/mkosi-build.py ARCH IMAGE '
                           '--publish, where they are built')


def _stores(registry: Registry) -> List[Destination]:
    configured = upload.configured()
    if configured:
        return [configured]
    own = os.environ.get(STORES, '').split()
    stores = [upload.at(where, variable=STORES)
              for where in own or registry.stores]
    if not stores:
        raise UsageError(
            'no store to ask: the registry has none, and neither '
            f'QEMU_MKOSI_PUBLISH nor {STORES} is set',
            next_step='set one of these to a folder or a URL')
    return stores


def _tell_one(builder: Builder, store: Destination, job: Job) -> str:
    missing: List[str] = []
    # There may be others to ask
    store.tries = 2
    try:
        state, reason = 'published', ''
        data = store.read(index_name(job))
        if data is None:
            state, reason = 'missing', 'no index'
        else:
            missing, count = _check(store, job, data)
            if missing:
                state = 'incomplete'
                reason = f'{len(missing)} of {count} objects are not there'
    except PublishError as e:
        state, reason = 'unreachable', e.message
    except (ValueError, KeyError, TypeError, AttributeError,
            RecursionError):
        state, reason = 'incomplete', 'the index is damaged'
    builder.report.event(
        'availability', f'{job.image.name} {job.target.arch}: {state} at '
        f'{store.shown}' + (f': {reason}' if reason else ''),
        image=job.image.name, arch=job.target.arch, identity=job.identity,
        store=store.shown, state=state, reason=reason, missing=missing)
    return state


def _check(store: Destination, job: Job,
           data: bytes) -> Tuple[List[str], int]:
    '''
    The objects of the index @data that are not there, or have another
    size; and how many there ought to be. Raises ValueError, KeyError,
    TypeError, AttributeError or RecursionError unless it is one of @job.
    '''
    index = json.loads(data)
    sizes: Dict[str, int] = {
        entry['sha256']: entry['size'] for entry in
        (*index['objects'], *index['published']['objects'])}
    artefacts = {artefact.sha256 for artefact
                 in job.target.artefacts.values() if job.target.built}
    if ((index['format'], index['image'], index['arch'], index['identity'])
            != (FORMAT, job.image.name, job.target.arch, job.identity)
            or not sizes or not artefacts <= set(sizes)
            or not all(_HASH.fullmatch(sha256) and isinstance(size, int)
                       for sha256, size in sizes.items())):
        raise ValueError('not an index of this image')
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        found = list(pool.map(store.size, sizes))
    # Not every server says the size
    return ([sha256 for (sha256, size), there in zip(sizes.items(), found)
             if there is None or there not in (size, -1)], len(sizes))
