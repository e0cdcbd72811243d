# SPDX-License-Identifier: GPL-2.0-or-later
'''
Whether an image's bytes depend on anything but its inputs: it is built
twice from scratch, the second time under other conditions, each build by a
process of its own that has nothing of the other's. Packages alone are
shared, which are verified by hash.

    <cache root>/verify/<image>-<arch>.json     the last result
    <cache root>/verify/<image>-<arch>.differs/ where bytes differed, the
        first/, second/                         artefacts of both builds
'''

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import (Any, Callable, Dict, FrozenSet, Iterator, List, Mapping,
                    Sequence, Tuple)

from . import command, explain, hostile, tools
from .build import Builder, Job
from .cache import Cache, remove_tree, sha256_file, write_atomically
from .error import BuildError, HostError, MismatchError, MkosiError
from .hostile import Condition, Host, Setting

SCHEMA = 1

# What a checkout has that a build needs
SOURCES = ('scripts/mkosi-build.py', 'scripts/mkosi_build',
           'tests/functional/mkosi')
ROOT = Path(__file__).resolve().parents[2]

Conditions = Tuple[Condition, ...]
Names = FrozenSet[str]


@dataclass(frozen=True)
class Outcome:
    '''
    One build that ran.

    @params name: what the report calls it
    @params folder: has its artefacts
    @params seconds: how long it took
    @params hashes: SHA-256 by kind of artefact
    '''
    name: str
    conditions: Conditions
    folder: Path
    seconds: float
    hashes: Mapping[str, str]

    def differs(self, other: 'Outcome') -> bool:
        '''Whether any artefact has other bytes than in @other.'''
        return self.hashes != other.hashes


# -- One build --------------------------------------------------------------

class Bench:
    '''
    Builds @job again and again, each time from nothing, in the folder
    @scratch, on copies of the tree as it is now. What it sees of that is
    below the folder @mount, the same each time.
    '''

    def __init__(self, builder: Builder, job: Job, host: Host,
                 scratch: Path, mount: Path) -> None:
        self.builder = builder
        self.report = builder.report
        self.job = job
        self.host = host
        self.scratch = scratch
        self.mount = mount
        _copy_sources(scratch / 'source')

    def build(self, name: str, conditions: Conditions) -> Outcome:
        '''
        Build under @conditions. Raises what the build failed with, and
        MkosiError if there is no proof that it ran.
        '''
        what = f'{self.job.name}: {name}, {_under(conditions)}'
        results = self.scratch / name.replace(' ', '-')
        space = results.with_suffix('.space')
        for folder in (results, space):
            folder.mkdir()
        start = time.monotonic()
        try:
            with self.report.stage(what):
                events = self._run(Setting(
                    self.mount, self.mount / 'verify', space, sys.executable,
                    _environment(), wrapper=list(self.host.back)),
                                   conditions, results, what)
        finally:
            # A file system's image, too
            for left in self.scratch.glob(f'{results.name}.*'):
                remove_tree(left)
        seconds = round(time.monotonic() - start, 1)
        self._check_ran(what, results / 'log' / f'{self.job.name}.log',
                        events)
        return self._outcome(name, conditions, results, seconds)

    def _outcome(self, name: str, conditions: Conditions, results: Path,
                 seconds: float) -> Outcome:
        job = self.job
        folder = (results / 'images' / job.image.name / job.target.arch
                  / job.identity)
        hashes = {kind: sha256_file(folder / artefact.file) for
                  kind, artefact in job.target.artefacts.items()}
        return Outcome(name, conditions, folder, seconds, hashes)

    def _run(self, setting: Setting, conditions: Conditions, results: Path,
             what: str) -> List[Dict[str, Any]]:
        '''
        Run the builder, and keep mkosi's log. Returns the events that it
        told; raises what it failed with.
        '''
        for condition in conditions:
            condition.apply(setting)
        setting.env.update(
            QEMU_MKOSI_DIR=str(setting.folder / 'cache'),
            QEMU_TEST_CACHE_DIR=str(setting.folder / 'assets'),
            PYTHONPATH=str(setting.folder / 'source/python'),
            PYTHONDONTWRITEBYTECODE='1')
        job, cache = self.job, self.builder.cache
        mounts = {'cache/store': cache.store}
        if not setting.own_tools:
            tree = cache.tools / job.tool_lock.digest
            mounts[f'cache/tools/{tree.name}'] = tree
        code, events, said = _follow(
            [*self.host.namespaces, 'sh', '-c', hostile.script(
                setting, self.scratch / 'source', mounts,
                [job.target.arch, job.image.name, '--local', '--json',
                 '--jobs=1'], results)], setting.env)
        log = results / 'log' / f'{job.name}.log'
        kept = cache.log(f'{job.name}-verify-{results.name}')
        kept.unlink(missing_ok=True)
        if log.is_file():
            shutil.copyfile(log, kept)
        if code:
            raise _failure(what, code, events, said, {
                str(setting.folder / 'cache/log' / log.name): str(kept)})
        return events

    def _check_ran(self, what: str, log: Path,
                   events: Sequence[Dict[str, Any]]) -> None:
        '''
        Raise MkosiError unless the builder says that it built, and mkosi
        in the build's own @log that it ran.
        '''
        built = [e for e in events if e['event'] == 'image']
        if len(built) != 1 or built[0].get('fresh') is not True:
            problem = 'the builder did not build, but found a result'
        elif built[0].get('identity') != self.job.identity:
            problem = 'it built something else'
        elif not log.is_file() or not any(
                command.SPOKEN.search(line) for line
                in log.read_text('utf-8', 'replace').splitlines()):
            problem = 'there is no log in which mkosi started'
        else:
            return
        raise MkosiError(f'{what}: nothing is proved: {problem}',
                         next_step='this is a bug of the builder: see '
                         'Builder.build() in scripts/mkosi_build/build.py')


def _under(conditions: Conditions) -> str:
    names = [c.name for c in conditions]
    if len(names) > 4:
        return f'under {len(names)} other conditions'
    return f'with another {", ".join(names)}' if names else 'as it is'


def _environment() -> Dict[str, str]:
    '''The caller's, without what decides where the builder works.'''
    return {name: value for name, value in os.environ.items()
            if not name.startswith(('QEMU_', 'MKOSI_')) and name != 'TMPDIR'}


def _copy_sources(folder: Path) -> None:
    '''
    A checkout as each build gets it, and beside it the one module that
    Python itself does not have, which another user might not find.
    '''
    for name in SOURCES:
        source, dest = ROOT / name, folder / name
        dest.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, dest, symlinks=True)
        else:
            shutil.copy2(source, dest)
    spec = importlib.util.find_spec('yaml')
    assert spec and spec.origin, 'a registry was read with it'
    shutil.copytree(Path(spec.origin).parent, folder / 'python/yaml')
    command.run(['chmod', '-R', 'a+rX', str(folder)])


@contextmanager
def _mount() -> Iterator[Path]:
    '''An empty folder that all users can reach.'''
    base = '/tmp' if os.access('/tmp', os.W_OK) else None
    folder = Path(tempfile.mkdtemp(prefix='mkosi-verify-', dir=base))
    try:
        folder.chmod(0o755)
        yield folder
    finally:
        # What was mounted there was so for the build alone
        folder.rmdir()


def _follow(words: Sequence[str], env: Mapping[str, str],
            ) -> Tuple[int, List[Dict[str, Any]], List[str]]:
    '''
    Run the command @words to its end. Returns its exit code, the events
    that it told, and what else it said.
    '''
    events: List[Dict[str, Any]] = []
    said: List[str] = []
    with subprocess.Popen(
            ['setpriv', '--pdeathsig', 'TERM', *words], env=dict(env),
            cwd='/', stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, encoding='utf-8',
            errors='replace') as process:
        assert process.stdout
        try:
            for line in process.stdout:
                try:
                    event = json.loads(line)
                    events.append({**event, 'event': event['event']})
                except (ValueError, TypeError, KeyError):
                    said.append(line.rstrip())
        except BaseException:
            process.terminate()
            # The builder clears up, and closes it last
            process.stdout.read()
            raise
    return process.returncode, events, said


def _failure(what: str, code: int, events: Sequence[Dict[str, Any]],
             said: Sequence[str], moved: Mapping[str, str]) -> BuildError:
    '''
    The error of a build that ended with the exit code @code. Files that
    it names have @moved.
    '''
    told = [e for e in events if e['event'] == 'error']
    if not told:
        # The script failed that was to run it
        return HostError(f'{what}, failed:\n' + '\n'.join(said[-10:]),
                         next_step='leave out what this host can\'t, with '
                         '--conditions')
    message, step = str(told[-1]['message']), str(told[-1].get('next'))
    for old, new in moved.items():
        message, step = message.replace(old, new), step.replace(old, new)
    error = BuildError(f'{what}, failed: {message}', next_step=step)
    error.exit_code = code
    return error


# -- What is to blame -------------------------------------------------------

def smallest(names: Sequence[str],
             differs: Callable[[Names], bool]) -> Tuple[str, ...]:
    '''
    The fewest of @names with which @differs is true, as it is with all of
    them: one, if one is enough, else those that it takes together; none if
    it is true without any. Halves are tried, so that of N conditions one
    takes about log2(N) calls. See Zeller, "Isolating cause-effect chains".
    '''
    def search(part: Sequence[str], beside: Names) -> Tuple[str, ...]:
        if len(part) == 1:
            return tuple(part)
        left, right = part[:len(part) // 2], part[len(part) // 2:]
        for half in (left, right):
            if differs(beside | frozenset(half)):
                return search(half, beside)
        # It takes something of both
        return (*search(left, beside | frozenset(right)),
                *search(right, beside | frozenset(left)))

    if not names or differs(frozenset()):
        return ()
    return search(names, frozenset())


def _blame(bench: Bench, first: Outcome,
           conditions: Conditions) -> List[str]:
    '''
    The names of those of @conditions that make a build differ from
    @first, or fail.
    '''
    tried: Dict[Names, bool] = {}

    def differs(names: Names) -> bool:
        if names not in tried:
            some = tuple(c for c in conditions if c.name in names)
            name = f'trial {len(tried) + 1}'
            try:
                tried[names] = bench.build(name, some).differs(first)
            except BuildError:
                tried[names] = True
            remove_tree(bench.scratch / name.replace(' ', '-'))
        return tried[names]

    return list(smallest([c.name for c in conditions], differs))


def _explain(before: Path, after: Path, tree: Path) -> str:
    '''
    What makes two files differ, by the tools @tree, if this builder can
    tell. That they differ is the news, so a failure here is none.
    '''
    try:
        return explain.render(explain.explain(before, after, tree))
    except (BuildError, OSError):
        return ''


# -- The command ------------------------------------------------------------

def verify(builder: Builder, jobs: Sequence[Job], text: str,
           bisect: bool) -> None:
    '''
    Build each of @jobs twice and more, compare, and tell. @text names the
    conditions; with @bisect, those that are to blame are looked for.

    Raises UsageError, HostError where a condition that was named can't be
    had, what a build raises, and MismatchError after the last job.
    '''
    builder.cache.check_writable()
    host = hostile.look([builder.cache.store, *(
        builder.cache.tools / job.tool_lock.digest for job in jobs)])
    wanted, missing = _possible(text, host)
    for name, problem in missing.items():
        builder.report.event(
            'left_out', f'         without {name}: {problem.message}\n'
            f'           next: {problem.next_step}', condition=name,
            reason=problem.message, next=problem.next_step)
    differing = []
    for job in jobs:
        with builder.cache.lock(f'verify-{job.name}'), \
                builder.cache.scratch(f'verify-{job.name}') as scratch, \
                _mount() as mount:
            _prepare(builder, job, any(c.name in hostile.OWN_TOOLS
                                       for c in wanted))
            bench = Bench(builder, job, host, scratch, mount)
            if not _verify(bench, wanted, missing, bisect):
                differing.append(job)
    if differing:
        raise MismatchError(
            'other bytes under other conditions: '
            + ', '.join(job.name for job in differing),
            next_step='make the definition independent of the cause above'
            if bisect else 'run it again with --bisect, which finds the '
            'condition that makes the difference')


def _possible(text: str, host: Host
              ) -> Tuple[List[Condition], Dict[str, BuildError]]:
    '''
    The conditions of @text that @host can, and the others, with the reason.
    Raises HostError for one of these that was named.
    '''
    wanted, missing = [], {}
    for condition in hostile.parse(text):
        problem = condition.obstacle(host)
        if problem and text != hostile.ALL:
            problem.message = f'{condition.name}: {problem.message}'
            raise problem
        if problem:
            missing[condition.name] = problem
        else:
            wanted.append(condition)
    return wanted, missing


def _prepare(builder: Builder, job: Job, unpack: bool) -> None:
    '''
    Have here what a build can't fetch: packages, tools, and if one has to
    @unpack these itself, their packages.
    '''
    tools.ensure(job.tool_lock, builder.cache, builder.store, builder.report,
                 job.target.arch)
    if unpack:
        builder.store.fetch(tools.packages(job.tool_lock, job.target.arch),
                            job.tool_lock.distribution, 'tools')
    builder.fetch_packages(job)


def _verify(bench: Bench, wanted: Sequence[Condition],
            missing: Mapping[str, BuildError], bisect: bool) -> bool:
    '''Verify one image. Returns whether all builds gave the same bytes.'''
    first = bench.build('first build', ())
    others = []
    for number, conditions in enumerate(hostile.builds(wanted), 2):
        name = 'second build' if number == 2 else f'build {number}'
        try:
            others.append(bench.build(name, conditions))
        except BuildError as e:
            if bisect:
                cause = _blame(bench, first, conditions)
                e.message += f'\n    cause: {_cause(cause)}'
            raise
    differing = [other for other in others if other.differs(first)]
    found: Dict[str, Any] = {}
    if differing:
        found = _keep(bench, first, differing[0])
        if bisect:
            found['cause'] = _blame(bench, first, differing[0].conditions)
    _tell(bench, [first, *others], missing, found)
    return not differing


def _keep(bench: Bench, first: Outcome, second: Outcome) -> Dict[str, Any]:
    '''Keep the artefacts of builds that differ, and explain them.'''
    folder = _folder(bench.builder.cache) / f'{bench.job.name}.differs'
    remove_tree(folder)
    made = bench.scratch / 'differs'
    for name, outcome in (('first', first), ('second', second)):
        shutil.copytree(outcome.folder, made / name)
    folder.parent.mkdir(parents=True, exist_ok=True)
    os.replace(made, folder)
    tree = bench.builder.cache.tools / bench.job.tool_lock.digest
    files = [artefact.file for kind, artefact
             in bench.job.target.artefacts.items()
             if first.hashes[kind] != second.hashes[kind]]
    return {'kept': str(folder), 'explanation': {
        file: _explain(folder / 'first' / file, folder / 'second' / file,
                       tree)
        for file in files}}


def _folder(cache: Cache) -> Path:
    return cache.root / 'verify'


def _tell(bench: Bench, outcomes: Sequence[Outcome],
          missing: Mapping[str, BuildError], found: Dict[str, Any]) -> None:
    '''Tell the result, and write it down.'''
    job, first = bench.job, outcomes[0]
    path = _folder(bench.builder.cache) / f'{job.name}.json'
    same = not any(other.differs(first) for other in outcomes)
    data = {
        'image': job.image.name, 'arch': job.target.arch,
        'identity': job.identity, 'same': same,
        'builds': [{'name': o.name, 'took': o.seconds,
                    'conditions': [c.name for c in o.conditions]}
                   for o in outcomes],
        'artefacts': {
            kind: {'file': artefact.file, 'sha256': [o.hashes[kind]
                                                     for o in outcomes],
                   'same': len({o.hashes[kind] for o in outcomes}) == 1,
                   'registry': artefact.sha256}
            for kind, artefact in job.target.artefacts.items()},
        'changes': {c.name: c.changes for o in outcomes
                    for c in o.conditions},
        'left_out': {name: problem.message
                     for name, problem in missing.items()},
        **found}
    write_atomically(path, json.dumps({'schema': SCHEMA, **data}, indent=1)
                     + '\n')
    bench.report.event('verified', _table(data), path=str(path), **data)


def _table(data: Mapping[str, Any]) -> str:
    '''The result for a person.'''
    builds = data['builds']
    lines = [f'{data["image"]} {data["arch"]}: '
             + (f'the same bytes in {len(builds)} builds' if data['same']
                else 'OTHER BYTES')]
    for kind, artefact in data['artefacts'].items():
        hashes = artefact['sha256']
        lines.append(f'    {kind:8} {hashes[0]}  {builds[0]["name"]}')
        lines += [f'    {"":8} {sha256}  {build["name"]}: '
                  + ('same' if sha256 == hashes[0] else 'DIFFERS')
                  for build, sha256 in zip(builds[1:], hashes[1:])]
    lines += [f'    {build["name"]:12} {build["took"]:6.1f} s  '
              + (', '.join(build['conditions']) or 'as it is')
              for build in builds]
    if data['left_out']:
        lines.append(f'    left out: {", ".join(data["left_out"])}')
    if 'kept' in data:
        lines.append(f'    both are in {data["kept"]}')
        lines += [textwrap.indent(f'{file}:\n{why}', '    ')
                  for file, why in data['explanation'].items() if why]
    if 'cause' in data:
        lines.append('    cause: ' + _cause(data['cause']))
    return '\n'.join(lines)


def _cause(cause: Sequence[str]) -> str:
    if not cause:
        return ('none of the conditions, builds differ without them (time, '
                'a random number, an order that is left open)')
    return ' together with '.join(
        f'{name} ({hostile.CONDITIONS[name].changes})' for name in cause)
