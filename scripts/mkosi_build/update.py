# SPDX-License-Identifier: GPL-2.0-or-later
'''
What writes into the source tree, locks and registry, and what builds with
locks that are not its own.
'''

import dataclasses
from pathlib import Path
from typing import Sequence

from . import lock as locks, record, resolve, tools
from .build import (Builder, Job, Result, check_host, host_architecture,
                    load_tool_locks, tools_folder)
from .cache import write_atomically
from .lock import Lock, LockError
from .registry import Image, Registry, Target
from .store import GoneError


def update_tools_locks(builder: Builder, registry: Registry,
                       archs: Sequence[str]) -> None:
    '''For hosts of the architectures asked for, and for this one.'''
    builder.cache.check_writable()
    folder = tools_folder(registry)
    for arch in sorted({*archs, host_architecture()}):
        write_lock(
            builder, folder / f'{arch}.lock',
            resolve.tools_lock(folder, arch, builder.cache, builder.report))


def update_image_lock(builder: Builder, registry: Registry, image: Image,
                      target: Target) -> None:
    '''Resolve the packages of an image anew, with the locked tools.'''
    tool_locks = load_tool_locks(registry)
    tool_lock = tool_locks[host_architecture()]
    check_host(builder.cache, target.arch)
    tree = tools.ensure(tool_lock, builder.cache, builder.store,
                        builder.report, target.arch)
    folder = registry.path.parent / image.definition
    definition = locks.definition_digest(folder)
    nothing = Lock(definition, image.distribution, image.release,
                   target.arch, tool_lock.epoch, ())
    job = Job(image, target, folder, definition, nothing, tool_lock,
              tuple(tool_locks.values()))
    write_lock(builder, folder / f'{target.arch}.lock',
               resolve.image_lock(job, tree, builder.cache, builder.report))


def write_lock(builder: Builder, path: Path, lock: Lock) -> None:
    '''Write @lock to the file @path, and tell what is other than before.'''
    try:
        old = locks.load(path).packages
    except LockError:
        old = ()
    changes = locks.diff(old, lock.packages)
    write_atomically(path, locks.render(lock))
    builder.report.event(
        'locked', '\n'.join([
            *(f'    {line}' for line in changes),
            f'{path.parent.name}/{path.name}: {len(lock.packages)} '
            f'packages, {len(changes)} changes']),
        path=str(path), packages=len(lock.packages), changes=changes)


def record_hashes(builder: Builder, path: Path, result: Result) -> None:
    '''
    Record what came out of a build in the registry @path.

    The lock first: until the registry is written too, it still names
    the old identity, and --check and every build say so.
    '''
    job = result.job
    if job.lock.definition != job.definition:
        lock = dataclasses.replace(job.lock, definition=job.definition)
        write_atomically(job.folder / f'{job.target.arch}.lock',
                         locks.render(lock))
    old = path.read_text(encoding='utf-8')
    new = record.record(
        old, job.image.name, job.target.arch, job.identity,
        {kind: (built.sha256, built.size)
         for kind, built in result.artefacts.items()})
    if new != old:
        write_atomically(path, new)
    builder.report.event('recorded', f'{path.name}: '
                         + ('recorded' if new != old else 'unchanged'))


def newer_job(builder: Builder, registry: Registry, job: Job,
              also: resolve.Further = resolve.Further()) -> Job:
    '''@job with locks of what the mirrors have today.'''
    folder = builder.cache.root / 'newer' / job.identity
    try:
        newer = job.unlocked(locks.load(folder / 'image.lock'),
                             locks.load(folder / 'tools.lock'))
        _fetch(builder, newer)
        return newer
    except (LockError, GoneError):
        # Never made, or the mirrors have moved on since
        pass
    tool_lock, lock = job.tool_lock, job.lock
    try:
        builder.store.fetch(
            tools.packages(tool_lock, job.target.arch),
            tool_lock.distribution, 'tools')
    except GoneError:
        tool_lock = resolve.tools_lock(
            tools_folder(registry), host_architecture(),
            builder.cache, builder.report)
    try:
        builder.fetch_packages(job)
    except GoneError:
        tree = tools.ensure(tool_lock, builder.cache, builder.store,
                            builder.report, job.target.arch)
        lock = resolve.image_lock(job, tree, builder.cache, builder.report,
                                  also)
    write_atomically(folder / 'tools.lock', locks.render(tool_lock))
    write_atomically(folder / 'image.lock', locks.render(lock))
    return job.unlocked(lock, tool_lock)


def _fetch(builder: Builder, job: Job) -> None:
    builder.store.fetch(
        tools.packages(job.tool_lock, job.target.arch),
        job.tool_lock.distribution, 'tools')
    builder.fetch_packages(job)
