# SPDX-License-Identifier: GPL-2.0-or-later
'''
The plan of a build: all that decides its bytes, as JSON, before anything
is run. It has no path, time or name of the machine that it is made on, and
a line a fact: two people whose builds differ see why with diff.

In it, $PYTHON, $TOOLS and $WORK stand for the interpreter, the unpacked
tools tree and the folder of the build, which differ between machines and
do not decide bytes. Nor does the host's architecture, so that the tools of
all are inputs; and that an interpreter is registered where the guest's is
foreign is left out.
'''

import json
import os
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, Sequence, Tuple

from . import command, lint, lock as locks, settings as mkosi, tools
from .build import Builder, Job, Result, mkosi_options
from .cache import sha256_file
from .error import InputError, MismatchError
from .lock import Lock

SCHEMA = 1

# Differences that fit on a screen
SHOWN = 20

WORK = Path('$WORK')


# -- Making it --------------------------------------------------------------

def _lock(lock: Lock) -> Dict[str, Any]:
    return {'digest': lock.digest, 'distribution': lock.distribution,
            'release': lock.release, 'architecture': lock.architecture,
            'epoch': lock.epoch,
            'packages': {f'{p.name} {p.version} {p.architecture}': p.sha256
                         for p in lock.packages}}


def definition_files(job: Job) -> Dict[str, str]:
    '''
    What a build of @job sees of its definition: by path, relative to the
    folder of all definitions, "file" or "program" and its SHA-256, or
    "link" and its target.
    '''
    found = {}
    for name in locks.definition_files(job.folder):
        path = job.folder / name
        shown = os.path.normpath(Path(job.folder.name, name))
        if path.is_symlink():
            found[shown] = f'link {os.readlink(path)}'
        else:
            kind = 'program' if path.stat().st_mode & 0o100 else 'file'
            found[shown] = f'{kind} {sha256_file(path)}'
    return found


def _settings(job: Job, options: Sequence[str]) -> Dict[str, List[str]]:
    '''
    What mkosi is set to, by section and name: the values in the order in
    which they take effect, of which the builder's replace all others.
    '''
    base = f'{job.folder.parent}/'
    given = {s.name for s in mkosi.from_options(options)}
    facts = lint.facts(job.image, job.target.arch)
    found: Dict[str, List[str]] = {}
    for setting in mkosi.resolve(job.folder, facts, options):
        if setting.name not in given or not setting.line:
            values = found.setdefault(
                f'{setting.section}.{setting.name}', [])
            values += [value[len(base):] if value.startswith(base) else value
                       for value in setting.value.strip().split('\n')]
    return found


def _steps(job: Job) -> List[Dict[str, Any]]:
    options = mkosi_options(job, WORK, f'file://{WORK}/repository')
    tree = Path('$TOOLS')
    return [
        {'step': 'unpack', 'input': 'tools', 'to': str(tree)},
        {'step': 'repository', 'input': 'lock',
         'to': f'{WORK}/repository', 'times': job.lock.epoch},
        {'step': 'stage', 'input': 'definition',
         'to': f'{WORK}/definition', 'times': job.lock.epoch,
         'modes': {'file': '0644', 'program': '0755', 'folder': '0755'}},
        {'step': 'mkosi', 'directory': '/', 'umask': '022',
         'network': False,
         'command': [*command.isolated(network=False), *tools.mkosi_command(
             '$PYTHON', tree, [*options, 'build'])],
         'environment': {**command.ENVIRONMENT,
                         **tools.mkosi_environment(tree)},
         'settings': _settings(job, options)},
        {'step': 'collect', 'from': f'{WORK}/output'}]


def of_job(job: Job) -> Dict[str, Any]:
    '''The plan of one @job. Raises InputError for a broken definition.'''
    return {
        'identity': job.identity,
        'builder': locks.BUILDER,
        'inputs': {
            'definition': {'digest': job.definition,
                           'files': definition_files(job)},
            'lock': _lock(job.lock),
            'tools': {lock.architecture: _lock(lock)
                      for lock in job.tool_locks}},
        'steps': _steps(job),
        'outputs': {
            kind: {'file': artefact.file, 'format': artefact.format,
                   'sha256': artefact.sha256, 'size': artefact.size}
            for kind, artefact in job.target.artefacts.items()}}


def make(jobs: Sequence[Job]) -> Dict[str, Any]:
    '''The plan of all @jobs.'''
    return {'schema': SCHEMA,
            'builds': {f'{job.image.name} {job.target.arch}': of_job(job)
                       for job in jobs}}


def render(plan: Mapping[str, Any]) -> str:
    '''The text of @plan.'''
    return json.dumps(plan, indent=1, sort_keys=True) + '\n'


# -- Following it -----------------------------------------------------------

def load(path: Path) -> Dict[str, Any]:
    '''The builds of the plan in the file @path. Raises InputError.'''
    step = 'make one with scripts/mkosi-build.py ARCH IMAGE --plan >FILE'
    try:
        plan = json.loads(path.read_bytes())
        schema = plan['schema']
        builds = plan['builds']
        if schema == SCHEMA and not all(
                isinstance(build['outputs'][kind][key], (str, int, type(None)))
                for build in builds.values()
                for kind, _ in build['outputs'].items()
                for key in ('sha256', 'size')):
            raise ValueError('no outputs')
    except OSError as e:
        raise InputError(f'{path}: {e.strerror}', next_step=step) from e
    except (ValueError, LookupError, TypeError, AttributeError,
            RecursionError) as e:
        raise InputError(f'{path}: not a plan of a build: {e!r}',
                         next_step=step) from e
    if schema != SCHEMA:
        raise InputError(f'{path}: expected a plan of schema {SCHEMA}, found '
                         f'{schema!r}', next_step=step)
    return dict(builds)


def differences(planned: Any, found: Any,
                where: str = '') -> Iterator[Tuple[str, str, str]]:
    '''Where @planned and @found differ: a path, what each has there.'''
    if isinstance(planned, dict) and isinstance(found, dict):
        for key in sorted({*planned, *found}):
            yield from differences(planned.get(key, _NOTHING),
                                   found.get(key, _NOTHING),
                                   f'{where}/{_plain(key)}')
    elif (isinstance(planned, list) and isinstance(found, list)
          and len(planned) == len(found)):
        for number, (one, other) in enumerate(zip(planned, found)):
            yield from differences(one, other, f'{where}/{number}')
    elif planned != found or isinstance(planned, bool) != isinstance(
            found, bool):
        yield where, _shown(planned), _shown(found)


_NOTHING = object()


def _plain(name: str) -> str:
    '''@name, which may be anything, for a terminal.'''
    return json.dumps(name)[1:-1]


def _shown(value: Any) -> str:
    if value is _NOTHING:
        return 'nothing'
    try:
        text = json.dumps(value, sort_keys=True)
    except RecursionError:
        return 'something of great depth'
    return text if len(text) <= 80 else f'{text[:77]}...'


def require_same(name: str, planned: Mapping[str, Any], job: Job) -> None:
    '''
    Raise InputError, with each difference, unless the build @name was
    @planned from what the tree has for @job: all but the outputs.
    '''
    found = of_job(job)
    there = [f'\n    {where}: the plan has {one}, this tree has {other}'
             for where, one, other in differences(
                 {**planned, 'outputs': None}, {**found, 'outputs': None})]
    if there:
        more = len(there) - SHOWN
        if more > 0:
            there[SHOWN:] = [f'\n    and {more} more']
        raise InputError(
            f'{name}: this tree is not what was planned:{"".join(there)}',
            next_step='check out the tree that the plan was made of, or '
            'make a plan of this one with --plan, and diff the two')


def _require_bytes(name: str, planned: Mapping[str, Any],
                   result: Result) -> None:
    differing = []
    for kind, built in sorted(result.artefacts.items()):
        expected = planned['outputs'].get(kind, {})
        if expected.get('sha256') not in (None, built.sha256):
            differing.append(
                f'\n    {kind}\n        expected {expected["sha256"]}, '
                f'{expected["size"]} bytes\n        found    {built.sha256}, '
                f'{built.size} bytes')
    if differing:
        raise MismatchError(
            f'{name}: other bytes than the plan names:{"".join(differing)}',
            next_step='compare the files in '
            f'{result.artefacts["kernel"].path.parent} with those of who '
            'made the plan')


def follow(builder: Builder, path: Path, jobs: Sequence[Job]) -> None:
    '''
    Build those of @jobs that the plan in the file @path has, if all of
    them are what was planned, and compare with the outputs that it names.

    Raises InputError, MismatchError, and what Builder.build() does.
    '''
    builds = load(path)
    chosen = [(name, job) for job in jobs
              for name in [f'{job.image.name} {job.target.arch}']
              if name in builds]
    if not chosen:
        raise InputError(
            f'{path}: expected a build of what was asked for, found '
            f'{", ".join(map(_plain, sorted(builds))) or "none"}',
            next_step='name an architecture and images that it has')
    for name, job in chosen:
        require_same(name, builds[name], job)
    for name, job in chosen:
        planned = builds[name]
        result = builder.build(job, compare=False)
        _require_bytes(name, planned, result)
        unknown = [kind for kind in result.artefacts
                   if not planned['outputs'].get(kind, {}).get('sha256')]
        builder.report.event(
            'planned', f'{name}: '
            + ('built as planned; the plan names no bytes'
               if unknown else 'the bytes that the plan names'),
            image=job.image.name, arch=job.target.arch,
            identity=job.identity, compared=not unknown,
            artefacts={kind: built.sha256 for kind, built
                       in result.artefacts.items()})
