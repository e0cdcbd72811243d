# SPDX-License-Identifier: GPL-2.0-or-later
'''
Where an image is from, beside the image: an in-toto statement with SLSA's
provenance, which names every input by hash, and the package list of
packages.py.

Of the same build on a host of the same architecture, at the same revision
of the source tree, everybody gets the same statement but for one field:
runDetails.metadata.finishedOn. It is not signed; who publishes it may do
that. See https://github.com/in-toto/attestation, spec/v1, and
https://slsa.dev/spec/v1.0/provenance.
'''

import hashlib
import os
import time
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional

from . import command, declared, lock as locks, packages, plan, tools
from .build import Builder, Built, Job
from .cache import sha256_file, write_atomically
from .error import HostError, InputError
from .lock import Lock
from .packages import render, timestamp

FILE = 'provenance.json'
# What is written beside the artefacts, by role
DOCUMENTS = {'packages': packages.FILE, 'provenance': FILE}

STATEMENT = 'https://in-toto.io/Statement/v1'
PREDICATE = 'https://slsa.dev/provenance/v1'
# What the parameters and the dependencies mean is in the manual
BUILD_TYPE = 'https://www.qemu.org/mkosi-images/build/v1'
BUILDER_ID = 'https://www.qemu.org/mkosi-images/builder/v1'


def _sha256(text: str) -> Dict[str, str]:
    return {'sha256': hashlib.sha256(text.encode()).hexdigest()}


def _definition(job: Job) -> List[Dict[str, Any]]:
    '''Each file; and all together, as the lock and the identity have it.'''
    found: List[Dict[str, Any]] = [{
        'name': job.image.definition,
        'digest': {'mkosiBuildDefinition': job.definition},
        'annotations': {'use': 'definition'}}]
    for name, value in sorted(plan.definition_files(job).items()):
        kind, _, content = value.partition(' ')
        # A link is its target
        digest = (_sha256(content) if kind == 'link'
                  else {'sha256': content})
        found.append({'name': name, 'digest': digest,
                      'annotations': {'use': 'definition', 'kind': kind}})
    return found


def _lock(name: str, lock: Lock) -> Dict[str, Any]:
    return {'name': name, 'digest': _sha256(locks.render(lock)),
            'annotations': {'use': 'lock', 'release': lock.release,
                            'distribution': lock.distribution}}


def _packages(lock: Lock, use: str, arch: str) -> List[Dict[str, Any]]:
    chosen = (tools.packages(lock, arch) if use == 'tools'
              else lock.packages)
    return [{'name': package.file_name, 'uri': packages.purl(lock, package),
             'digest': {'sha256': package.sha256},
             'annotations': {'use': use, 'source': package.source}}
            for package in chosen]


def revision(job: Job) -> Optional[Dict[str, Any]]:
    '''
    The revision of the source tree of @job, if git knows it, and whether
    something that decides bytes differs from it.
    '''
    paths = [job.folder, *locks.included(job.folder),
             job.folder.parent / 'tools', Path(__file__).parent]
    git = ['git', '-C', str(job.folder.parent)]
    try:
        head = command.run([*git, 'rev-parse', '--verify', 'HEAD'])
        status = command.run([*git, 'status', '--porcelain', '--',
                              *map(str, paths)])
    except HostError:
        return None
    if head.returncode or status.returncode:
        return None
    return {'name': 'source', 'digest': {'gitCommit': head.stdout.strip()},
            'annotations': {'use': 'source',
                            'modified': bool(status.stdout.strip())}}


def _mkosi_version(lock: Lock) -> str:
    return next((p.version for p in lock.packages if p.name == 'mkosi'),
                'unknown')


def statement(job: Job, artefacts: Mapping[str, Built], finished: float,
              byproducts: Mapping[str, str]) -> Dict[str, Any]:
    '''
    The statement on the @artefacts of @job, which were ready at @finished,
    in seconds since 1970. @byproducts are other files beside them, with
    their SHA-256.
    '''
    arch = job.target.arch
    source = revision(job)
    planned = {**plan.of_job(job), 'outputs': None}
    return {
        '_type': STATEMENT,
        'subject': [{'name': built.path.name,
                     'digest': {'sha256': built.sha256}}
                    for _, built in sorted(artefacts.items())],
        'predicateType': PREDICATE,
        'predicate': {
            'buildDefinition': {
                'buildType': BUILD_TYPE,
                'externalParameters': {'image': job.image.name,
                                       'architecture': arch},
                'internalParameters': {
                    'identity': job.identity, 'locked': job.locked,
                    'epoch': job.lock.epoch,
                    # Of what --plan tells, without its outputs
                    'plan': _sha256(plan.render(planned))},
                'resolvedDependencies': [
                    *([source] if source else []),
                    *_definition(job),
                    _lock(f'{job.image.definition}/{arch}.lock', job.lock),
                    *(_lock(f'tools/{lock.architecture}.lock', lock)
                      for lock in job.tool_locks),
                    *_packages(job.lock, 'image', arch),
                    *_packages(job.tool_lock, 'tools', arch)]},
            'runDetails': {
                'builder': {
                    'id': BUILDER_ID,
                    'version': {'mkosi': _mkosi_version(job.tool_lock),
                                'mkosi-build': locks.BUILDER}},
                'metadata': {'finishedOn': timestamp(finished)},
                'byproducts': [
                    {'name': name, 'digest': {'sha256': sha256}}
                    for name, sha256 in sorted(byproducts.items())]}}}


def describe(builder: Builder, job: Job, artefacts: Mapping[str, Built],
             tree: Path, folder: Path) -> None:
    '''
    Write package list and provenance of the @artefacts of @job, just made
    with the tools @tree, into @folder. Raises MkosiError where a package
    can't be read.
    '''
    _write(builder, job, artefacts, tree, folder, time.time())


def _write(builder: Builder, job: Job, artefacts: Mapping[str, Built],
           tree: Path, folder: Path, finished: float) -> None:
    licences = declared.of_lock(job.lock, builder.store, tree)
    write_atomically(folder / packages.FILE, render(
        packages.document(job, artefacts, licences)))
    byproducts = {name: sha256_file(folder / name)
                  for name in (packages.FILE, 'manifest.json')
                  if (folder / name).exists()}
    write_atomically(folder / FILE, render(
        statement(job, artefacts, finished, byproducts)))


def documents(builder: Builder, job: Job) -> Dict[str, Path]:
    '''
    By role, the documents beside the artefacts of @job, which was built;
    written now, from its lock, where an older builder has not done it.

    Raises InputError where it was not built, and what Store.fetch() does.
    '''
    folder = builder.folder(job)
    found = {role: folder / name for role, name in DOCUMENTS.items()}
    if all(path.is_file() for path in found.values()):
        return found
    result = builder.find(job)
    if result is None:
        raise InputError(f'{job.name} is not built here', next_step='build '
                         f'it: scripts/mkosi-build.py {job.target.arch} '
                         f'{job.image.name}')
    tree = tools.ensure(job.tool_lock, builder.cache, builder.store,
                        builder.report, job.target.arch)
    builder.fetch_packages(job)
    newest = max(os.stat(built.path).st_mtime
                 for built in result.artefacts.values())
    _write(builder, job, result.artefacts, tree, folder, newest)
    return found
