#!/usr/bin/env python3
#
# SPDX-License-Identifier: GPL-2.0-or-later
# pylint: disable=invalid-name
'''
What the jobs of mkosi-images.yml do. A job runs in the root of a checkout,
and what it leaves for later jobs is below mkosi-images/:

    first/<arch>/<image>/, second/...
                    what a build job made: result.json, the artefacts, and
                    build.log
    compared.json   the images whose two builds are equal
    booted.json     how long they took to boot, in seconds, and before
    registry.patch  their hashes, as a commit

Exit codes are those of scripts/mkosi-build.py.
'''

import argparse
import json
import os
import shutil
import subprocess
import sys
import timeit
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, Optional, Tuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / 'scripts'))

# pylint: disable=wrong-import-position
from mkosi_build import boot, build, explain, lock as locks  # noqa: E402
from mkosi_build import registry as registries, tools, update  # noqa: E402
from mkosi_build.agreement import over_budget  # noqa: E402
from mkosi_build.cache import Cache, link_or_copy, sha256_file  # noqa: E402
from mkosi_build.command import check_programs  # noqa: E402
from mkosi_build.error import (  # noqa: E402
    BuildError, HostError, MismatchError, MkosiError, UsageError)
from mkosi_build.report import Report  # noqa: E402
from mkosi_build.transfer import Failed, transfer_from_any  # noqa: E402

FOLDER = ROOT / 'mkosi-images'
TURNS = ('first', 'second')
REGISTRY = registries.DEFAULT.relative_to(ROOT)
BUILDER = str(ROOT / 'scripts/mkosi-build.py')
MANUAL = 'docs/devel/testing/mkosi-images-publishing.rst'

# Boots to take the shortest of: a runner has other jobs, too
BOOTS = 3

RUNNERS = '''\
of a GitLab runner: a shell executor whose user is an ordinary one; or a
    docker executor on a podman without root, with security_opt =
    ["seccomp=unconfined", "unmask=ALL"] in its config.toml; or one with
    privileged = true, which is more than is needed. See
    ''' + MANUAL


def say(text: str) -> None:
    '''Tell whoever reads the job's log.'''
    print(text, flush=True)


def require(code: int, message: str, next_step: str) -> None:
    '''Raise BuildError, to exit with @code, unless that is 0.'''
    if code:
        error = BuildError(message, next_step=next_step)
        error.exit_code = code
        raise error


@dataclass(frozen=True)
class Turn:
    '''What a build job said of @image for @arch, from its result.json.'''
    folder: Path
    arch: str
    image: str
    state: str
    reason: str
    identity: str
    artefacts: Mapping[str, Mapping[str, Any]]

    @property
    def name(self) -> str:
        '''As in the builder's words.'''
        return f'{self.image} {self.arch}'

    def path(self, kind: str) -> Path:
        '''The artefact of that kind.'''
        return self.folder / str(self.artefacts[kind]['file'])


def load_turns(turn: str) -> Dict[Tuple[str, str], Turn]:
    '''What the jobs of one turn made, by architecture and image.'''
    return {(path.parts[-3], path.parts[-2]): Turn(
        path.parent, path.parts[-3], path.parts[-2],
        **json.loads(path.read_text()))
        for path in sorted((FOLDER / turn).glob('*/*/result.json'))}


def compared() -> Iterator[Tuple[Turn, build.Result]]:
    '''The first build of each image that the two builds agree on.'''
    registry = registries.load(registries.DEFAULT)
    turns = load_turns('first')
    for arch, image in json.loads((FOLDER / 'compared.json').read_text()):
        turn = turns[arch, image]
        yield turn, build.Result(
            build.prepare(registry, registry.image(image), arch),
            {kind: build.Built(turn.path(kind), known['sha256'],
                               known['size'])
             for kind, known in turn.artefacts.items()}, fresh=False)


# -- preflight, build -------------------------------------------------------

def preflight(arch: str) -> None:
    '''Raise HostError at once if this runner can't build for @arch.'''
    try:
        build.check_host(Cache(), arch)
    except HostError as e:
        raise HostError(e.message, next_step=f'{e.next_step}\n  or, {RUNNERS}'
                        ) from e
    say(f'This runner can build images for {arch}.')


def is_published(arch: str, image: str) -> bool:
    '''
    Whether the image that the tree describes is whole in a store: one of
    the registry's, or the one that this project publishes to.
    '''
    command = [sys.executable, BUILDER, arch, image, '--published']
    own = {**os.environ, **destination(os.environ)}
    stores = {k: v for k, v in own.items() if 'MKOSI_PUBLISH' not in k}
    wheres = [stores, own] if own.get('QEMU_MKOSI_PUBLISH') else [stores]
    return any(subprocess.run(command, env=env, check=False).returncode == 0
               for env in wheres)


def build_one(arch: str, image: str, turn: str) -> None:
    '''
    Build an image from nothing but the tree and the packages. Raises
    UsageError where something is left that another build has used.
    '''
    folder = FOLDER / turn / arch / image
    cache = Cache()
    if cache.root.exists() and any(cache.root.glob('[!l]*/*')):
        raise UsageError(
            f'{cache.root}: expected an empty folder, for two builds that '
            'share their tools prove little',
            next_step='point QEMU_MKOSI_DIR at a new folder')
    folder.mkdir(parents=True)
    registry = registries.load(registries.DEFAULT)
    target = registry.image(image).target(arch)
    if target.not_locked is not None:
        state, reason = 'left out', target.not_locked
    elif is_published(arch, image):
        state, reason = 'published', 'a store has it'
    else:
        _build(folder, cache, arch, image)
        return
    say(f'{image} {arch}: {state}: {reason}')
    _write(folder, state, reason, '', {})


def _write(folder: Path, state: str, reason: str, identity: str,
           artefacts: Mapping[str, Mapping[str, Any]]) -> None:
    (folder / 'result.json').write_text(json.dumps({
        'state': state, 'reason': reason, 'identity': identity,
        'artefacts': artefacts}, indent=1) + '\n')


def _build(folder: Path, cache: Cache, arch: str, image: str) -> None:
    log = cache.log(f'{image}-{arch}')
    built: Dict[str, Any] = {}
    try:
        with subprocess.Popen(
                [sys.executable, BUILDER, arch, image, '--local', '--json'],
                stdout=subprocess.PIPE, encoding='utf-8') as process:
            assert process.stdout
            for event in map(json.loads, process.stdout):
                if event['event'] == 'image':
                    built = event
                if event['event'] != 'count' and event['text']:
                    say(event['text'])
        require(process.returncode, f'{image} {arch} was not built',
                'read above what the builder said, and in the job\'s '
                'artifacts build.log')
    finally:
        if log.exists():
            shutil.copy2(log, folder / 'build.log')
    for path in Path(built['artefacts']['kernel']['path']).parent.iterdir():
        # Times too: which log is of which build, they tell
        shutil.copy2(path, folder / path.name)
    _write(folder, 'built', '', built['identity'], {
        kind: {'file': Path(known['path']).name, 'sha256': known['sha256'],
               'size': known['size']}
        for kind, known in built['artefacts'].items()})


# -- compare ----------------------------------------------------------------

def _tools(one: Turn) -> Optional[Path]:
    '''What unpacks an artefact, to look into it; none if it is not had.'''
    registry = registries.load(registries.DEFAULT)
    builder = build.Builder(Cache(), Report())
    try:
        job = build.prepare(registry, registry.image(one.image), one.arch)
        return tools.ensure(job.tool_lock, builder.cache, builder.store,
                            builder.report, one.arch)
    except BuildError as e:
        say(f'{one.name}: explained without its tools: {e.message}')
        return None


def _why(one: Path, other: Path, tree: Optional[Path]) -> List[str]:
    try:
        found = explain.explain(one, other, tree)
    except (BuildError, OSError) as e:
        return [f'    what differs is not known: {e}']
    return [f'    {line}' for line in explain.render(found).splitlines()]


def differences(one: Turn, other: Turn) -> List[str]:
    '''How two builds differ, a line or some a difference; none if equal.'''
    if one.identity != other.identity:
        return [f'{one.name}: not built from the same: identity '
                f'{one.identity} and {other.identity}']
    lines = []
    for kind in one.artefacts:
        for turn in (one, other):
            # What was handed over is what was built
            if sha256_file(turn.path(kind)) != turn.artefacts[kind]['sha256']:
                lines.append(f'{turn.path(kind)}: damaged since it was built')
    for kind in [] if lines else one.artefacts:
        if one.artefacts[kind] != other.artefacts[kind]:
            lines.append(f'{one.name}: {one.artefacts[kind]["file"]} ({kind})'
                         ' differs:')
            for turn in (one, other):
                known = turn.artefacts[kind]
                lines.append(f'    {turn.folder.parts[-3]:6} '
                             f'{known["sha256"]}, {known["size"]} bytes')
            lines += _why(one.path(kind), other.path(kind), _tools(one))
    return lines


def compare() -> None:
    '''
    Compare both turns, and record in the tree what is equal and new.
    Raises MismatchError, InputError for what has outgrown its budget.
    '''
    first, second = (load_turns(turn) for turn in TURNS)
    lines = [f'{image} {arch}: only one of the two builds came to its end'
             for arch, image in sorted(first.keys() ^ second.keys())]
    equal = []
    for key in sorted(first.keys() & second.keys()):
        one, other = first[key], second[key]
        left = next((t for t in (one, other) if t.state != 'built'), None)
        if left:
            say(f'{one.name}: {left.state}: {left.reason}')
            continue
        found = differences(one, other)
        lines += found
        if not found:
            say(f'{one.name}: both builds have the same bytes')
            equal.append(key)
    if lines:
        raise MismatchError(
            '\n    '.join(['the two builds are not the same:', *lines]),
            next_step='compare the files in the artifacts of both build '
            f'jobs, and their build.log; see {MANUAL}')
    (FOLDER / 'compared.json').write_text(json.dumps(equal) + '\n')
    _record()


def _record() -> None:
    builder = build.Builder(Cache(), Report())
    for turn, result in list(compared()):
        problem = over_budget(result.job, {
            kind: built.size for kind, built in result.artefacts.items()})
        if problem:
            raise problem
        target = result.job.target
        same = all(built.sha256 == target.artefacts[kind].sha256
                   for kind, built in result.artefacts.items())
        if turn.identity == target.identity and not same:
            raise MismatchError(
                f'{turn.name}: both builds have the same bytes, and other '
                'bytes than the registry names', next_step='find out what '
                'the identity does not cover, and build at the commit that '
                'recorded these hashes')
        update.record_hashes(builder, registries.DEFAULT, result)


# -- boot -------------------------------------------------------------------

def boot_all() -> None:
    '''
    Boot what was compared: by its tests, which find it as they will find
    it when it is published, and by the builder for the time it takes.
    Raises MkosiError.
    '''
    store, times = FOLDER / 'store', {}
    images = list(compared())
    store.mkdir(exist_ok=True)
    for _, result in images:
        for built in result.artefacts.values():
            if not (store / built.sha256).exists():
                link_or_copy(built.path, store / built.sha256)
    for arch in sorted({result.job.target.arch for _, result in images}):
        _test(arch, store, [r for _, r in images if r.job.target.arch == arch])
    for turn, result in images:
        times[turn.name] = [_boot(image) for image in
                            (result, _before(result.job)) if image]
        say(f'\n{turn.name}: seconds to boot and power off: '
            + ', before: '.join(f'{t:.1f}' for t in times[turn.name]))
    (FOLDER / 'booted.json').write_text(json.dumps(times, indent=1) + '\n')


def _boot(result: build.Result) -> float:
    '''The shortest time to boot and to power off, in seconds.'''
    return min(timeit.repeat(lambda: boot.boot(result), number=1,
                             repeat=BOOTS))


def _before(job: build.Job) -> Optional[build.Result]:
    '''
    The image as the commit has it recorded, if it is another one and in a
    store, for its time on this very machine.
    '''
    try:
        target = committed_registry().image(job.image.name).target(
            job.target.arch)
    except BuildError:
        return None
    if not target.built or target.identity == job.target.identity:
        return None
    stores = (os.getenv('QEMU_TEST_MKOSI_STORES', '').split()
              or registries.load(registries.DEFAULT).stores)
    found = {}
    (FOLDER / 'before').mkdir(exist_ok=True)
    for kind, artefact in target.artefacts.items():
        assert artefact.sha256 and artefact.size
        path = FOLDER / 'before' / artefact.sha256
        try:
            transfer_from_any([f'{store}/{path.name}' for store in stores],
                              path, artefact.size, artefact.sha256)
        except Failed as e:
            say(f'{job.name}: the image before is not at hand: {e}')
            return None
        found[kind] = build.Built(path, artefact.sha256, artefact.size)
    return build.Result(replace(job, target=target), found, fresh=False)


def _test(arch: str, store: Path, results: List[build.Result]) -> None:
    '''Run the images' own tests on what is in the folder @store.'''
    work = FOLDER / 'functional' / arch
    # An empty cache: what is there afterwards, MkosiAsset has fetched
    cache = FOLDER / 'fetched' / arch
    for folder in (work, cache):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    (work / 'Makefile.mtest').touch()
    test = ROOT / 'tests/functional' / arch / 'test_mkosi_boot.py'
    check_programs({f'qemu-system-{arch}': boot.MACHINES[arch][1]})
    env = {**os.environ, 'QEMU_BUILD_ROOT': str(work),
           'MESON_BUILD_ROOT': str(work),
           'QEMU_TEST_QEMU_BINARY': str(shutil.which(f'qemu-system-{arch}')),
           'QEMU_TEST_CACHE_DIR': str(cache),
           'QEMU_TEST_MKOSI_STORES': str(store),
           'PYTHONPATH': os.pathsep.join(
               str(ROOT / name) for name in
               ('python', 'tests/functional', 'mkosi-images/python'))}
    done = subprocess.run([sys.executable, str(test)], cwd=work, env=env,
                          stdout=subprocess.PIPE, encoding='utf-8',
                          check=False)
    say(done.stdout)
    missing = [f'{result.job.name}: {kind}' for result in results
               for kind, built in result.artefacts.items()
               if not (cache / 'download' / built.sha256).exists()]
    if done.returncode or missing:
        raise MkosiError(
            f'{test.relative_to(ROOT)} failed' + ''.join(
                f'\n    not fetched: {name}' for name in missing),
            next_step='read above which of them, and in the job\'s '
            'artifacts the console logs')


# -- registry ---------------------------------------------------------------

def git(*arguments: str, env: Optional[Mapping[str, str]] = None) -> str:
    '''What git prints.'''
    result = subprocess.run(
        ['git', *arguments], cwd=ROOT, env={**os.environ, **(env or {})},
        stdout=subprocess.PIPE, encoding='utf-8', check=False)
    require(result.returncode and HostError.exit_code,
            f'git {arguments[0]} failed', 'read above what it said')
    return result.stdout.rstrip('\n')


def registry_patch() -> None:
    '''Write what compare recorded as a commit to review and to send.'''
    patch = FOLDER / 'registry.patch'
    changed = git('diff', '--name-only', 'HEAD', '--',
                  str(REGISTRY.parent)).splitlines()
    if not changed:
        patch.write_text('')
        say('The registry has these hashes already: no patch.')
        return
    author = {
        f'GIT_{who}_{what}': os.getenv(f'GITLAB_USER_{what}') or default
        for who in ('AUTHOR', 'COMMITTER') for what, default in
        (('NAME', 'mkosi-images pipeline'), ('EMAIL', 'nobody@example.org'))}
    env = {**author, 'GIT_INDEX_FILE': str(FOLDER / 'index')}
    git('read-tree', 'HEAD', env=env)
    git('add', '--', *changed, env=env)
    message = _message()
    commit = git('commit-tree', git('write-tree', env=env), '-p', 'HEAD',
                 '-m', message, env=env)
    patch.write_text(git('format-patch', '--stdout', '-1', commit) + '\n')
    say(f'{message}\n\n{patch.relative_to(ROOT)}: apply it with git am')


def committed_registry() -> registries.Registry:
    '''The registry of the commit, without what compare recorded.'''
    return registries.parse(REGISTRY, git('show', f'HEAD:{REGISTRY}') + '\n')


def _message() -> str:
    old = committed_registry()
    path = FOLDER / 'booted.json'
    times = json.loads(path.read_text()) if path.exists() else {}
    lines = ['tests/functional: record new hashes of guest images', '',
             'Built twice, with equal results, and booted.']
    for arch, image in json.loads((FOLDER / 'compared.json').read_text()):
        new = registries.load(registries.DEFAULT).image(image)
        before, after = (r.targets[arch] for r in (old.image(image), new))
        if before == after:
            continue
        lines += ['', f'{image} {arch}:']
        sizes = {kind: known.size for kind, known in before.artefacts.items()}
        lines += [f'  {kind}: {_change(artefact.size, sizes.get(kind))} bytes'
                  for kind, artefact in after.artefacts.items()]
        if f'{image} {arch}' in times:
            shown = _change(*(f'{t:.1f}' for t in times[f'{image} {arch}']))
            lines.append(f'  seconds to boot and power off: {shown}')
        lines += [f'  {line}' for line in
                  _package_changes(new, arch, before.identity)]
    return '\n'.join(lines)


def _change(now: object, before: object = None) -> str:
    return f'{now}' if before is None else f'{now} (before: {before})'


def _package_changes(image: registries.Image, arch: str,
                     identity: Optional[str]) -> List[str]:
    '''The packages that changed since the hashes were recorded.'''
    path = REGISTRY.parent / image.definition / f'{arch}.lock'
    now = locks.load(ROOT / path).packages
    if identity is None:
        return [f'{len(now)} packages, recorded for the first time']
    commit, *parents = git('log', '-1', '--format=%H %P',
                           f'-Sidentity: {identity}', '--', str(REGISTRY)
                           ).split() or ['']
    # The first commit of a shallow clone seems to add all that there is
    text = git('show', f'{commit}:{path}') if parents else ''
    if not text:
        return ['packages: the commit that recorded the hashes before is '
                'not at hand']
    changes = locks.diff(locks.parse(text, str(path)).packages, now)
    return [f'packages: {len(changes)} of {len(now)} changed', *changes]


# -- publish ----------------------------------------------------------------

def destination(env: Mapping[str, str]) -> Dict[str, str]:
    '''
    Where to publish to and as whom: what the project's settings say, else
    its own package registry, as this job. Tokens stay in the environment.
    '''
    found = {}
    if not env.get('QEMU_MKOSI_PUBLISH') and 'CI_API_V4_URL' in env:
        found['QEMU_MKOSI_PUBLISH'] = (
            f'{env["CI_API_V4_URL"]}/projects/{env["CI_PROJECT_ID"]}'
            '/packages/generic/mkosi-images/1')
    # A job's token is for the server that the job came from
    url = {**env, **found}.get('QEMU_MKOSI_PUBLISH', '')
    if (not env.get('QEMU_MKOSI_PUBLISH_TOKEN') and env.get('CI_JOB_TOKEN')
            and url.startswith(f'{env.get("CI_API_V4_URL")}/')):
        found['QEMU_MKOSI_PUBLISH_TOKEN'] = f'JOB-TOKEN:{env["CI_JOB_TOKEN"]}'
    return found


def publish() -> None:
    '''Publish what was compared, from where its builder has left it.'''
    env = {**os.environ, **destination(os.environ)}
    cache = Cache()
    builder = build.Builder(cache, Report())
    cache.check_writable()
    for turn, result in list(compared()):
        folder = builder.folder(result.job)
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(turn.folder, folder, ignore=shutil.ignore_patterns(
            'result.json', 'build.log'))
        shutil.copy2(turn.folder / 'build.log', cache.log(result.job.name))
        for built in result.artefacts.values():
            cache.add_asset(folder / built.path.name, built.sha256)
        done = subprocess.run(
            [sys.executable, BUILDER, turn.arch, turn.image, '--publish'],
            env=env, check=False)
        require(done.returncode, f'{turn.name} was not published',
                'read above why; the job can be run again as it is')


def main(argv: Optional[List[str]] = None) -> int:
    '''Do one job's part. Returns the exit code.'''
    parser = argparse.ArgumentParser(description='One job of the pipeline '
                                     f'of guest images: see {MANUAL}.')
    parts = parser.add_subparsers(dest='part', required=True)
    for name, function, arguments in (
            ('preflight', preflight, ('arch',)),
            ('build', build_one, ('arch', 'image', 'turn')),
            ('compare', compare, ()), ('boot', boot_all, ()),
            ('registry', registry_patch, ()), ('publish', publish, ())):
        part = parts.add_parser(name, help=function.__doc__)
        part.set_defaults(function=function)
        for argument in arguments:
            part.add_argument(argument)
    given = vars(parser.parse_args(argv))
    del given['part']
    try:
        given.pop('function')(**given)
        return 0
    except BuildError as e:
        print(f'error: {e}', file=sys.stderr)
        return e.exit_code


if __name__ == '__main__':
    sys.exit(main())
