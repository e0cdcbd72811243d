# SPDX-License-Identifier: GPL-2.0-or-later
'''
Runs QEMU's own functional tests with its own framework and meson.build, on
emulators that are already there, and says plainly what came of it.
'''

from dataclasses import dataclass
import fnmatch
import json
import os
from pathlib import Path
import re
import shutil
import subprocess
import sys
from typing import Any, Dict, List, Optional, Sequence

import yaml

from . import edits, kvm, tree
from .apply import ROOT, apply
from .error import SeriesError
from .tap import Count, judge


BUILD = ROOT / 'build'
REPORT = BUILD / 'check-functional.junit.xml'
REGISTRY = ROOT / 'tests/functional/mkosi/registry.yaml'
_EMULATOR = re.compile(r'qemu-system-(\w+)$')
_TEST = re.compile(r'tests/functional/(\w+)/test_(\w+)\.py$')


def say(text: str) -> None:
    '''Tell the user, in the order of what else is printed.'''
    print(text, flush=True)


@dataclass(frozen=True)
class Bench:
    '''A QEMU tree with the series applied and emulators to run it on.'''
    folder: Path
    ours: List[str]
    emulators: Dict[str, str]
    qemu_img: Optional[str]

    @property
    def tree(self) -> Path:
        '''The copy of QEMU's tree.'''
        return self.folder / 'tree'

    @property
    def build(self) -> Path:
        '''The build folder that tests see.'''
        return self.folder / 'build'


def find_emulators() -> Dict[str, str]:
    '''
    The qemu-system-* by architecture: of the folder QEMU_BIN if set, else
    of PATH.  Raises SeriesError if there is none.
    '''
    where = os.environ.get('QEMU_BIN') or os.environ.get('PATH', '')
    found: Dict[str, str] = {}
    for folder in where.split(os.pathsep):
        try:
            names = sorted(os.listdir(folder or '.'))
        except OSError:
            continue
        for name in names:
            path = os.path.abspath(os.path.join(folder, name))
            match = _EMULATOR.match(name)
            if match and os.access(path, os.X_OK):
                found.setdefault(match[1], path)
    if not found:
        raise SeriesError(
            f'no emulator: expected qemu-system-* in {where}, found none',
            next_step='apt-get install qemu-system-x86, or name a folder '
                      'with QEMU_BIN=<folder>')
    return found


def prepare() -> Bench:
    '''Apply the series to a copy of the QEMU tree and find emulators.'''
    source = tree.obtain(BUILD / 'downloads', say)
    folder = BUILD / f'qemu-{tree.version_of(source)}'
    changed = apply(source, folder / 'tree', edits.load())
    where = os.environ.get('QEMU_BIN')
    return Bench(folder=folder,
                 ours=[name for name in changed if _TEST.match(name)],
                 emulators=find_emulators(),
                 qemu_img=shutil.which('qemu-img', path=where)
                 or shutil.which('qemu-img'))


def environment() -> Dict[str, str]:
    '''This process's environment, with the local images if there are any.'''
    env = dict(os.environ)
    # The tools of our own virtual environment, as ninja
    env['PATH'] = os.pathsep.join(
        [str(Path(sys.executable).parent), env.get('PATH', '')])
    folder = Path(env.get('QEMU_MKOSI_DIR')
                  or Path('~/.cache/qemu/mkosi').expanduser())
    override = folder / 'override.json'
    if 'QEMU_TEST_MKOSI_OVERRIDE' not in env and override.is_file():
        env['QEMU_TEST_MKOSI_OVERRIDE'] = str(override)
    if env.get('QEMU_TEST_MKOSI_OVERRIDE'):
        say('images that the registry does not vouch for are used: '
            f'{env["QEMU_TEST_MKOSI_OVERRIDE"]}')
    return env


def is_test(name: str) -> bool:
    '''Whether the file @name of QEMU's tree is an architecture's test.'''
    return _TEST.match(name) is not None


def _shielded(bench: Bench, command: List[str],
              hide_kvm: bool = False) -> List[str]:
    if not hide_kvm and kvm.works(bench.emulators.get('x86_64')):
        return command
    return kvm.masked(command, bench.folder)


def _meson(*args: str) -> List[str]:
    return [sys.executable, '-m', 'mesonbuild.mesonmain', *args]


def _configure(bench: Bench, env: Dict[str, str]) -> None:
    '''Set up the meson project, anew if what it was made for changed.'''
    options = [f'-Demulators={",".join(bench.emulators.values())}',
               f'-Dqemu_img={bench.qemu_img or ""}']
    made_for = '\n'.join([sys.executable, str(bench.tree), *options])
    stamp = bench.build / 'made-for'
    if stamp.is_file() and stamp.read_text('utf-8') == made_for:
        return
    shutil.rmtree(bench.build, ignore_errors=True)
    result = subprocess.run(
        _meson('setup', *options, str(bench.build), str(bench.tree)),
        env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        encoding='utf-8', check=False)
    if result.returncode:
        raise SeriesError(f'meson setup failed:\n{result.stdout}')
    stamp.write_text(made_for, 'utf-8')


def _listed(bench: Bench, env: Dict[str, str]) -> Dict[str, str]:
    '''Names of all tests that meson knows, and each one's file.'''
    # Brings the project up to date with a tree that has changed
    subprocess.run(['ninja', '-C', str(bench.build), 'build.ninja'],
                   env=env, check=True, stdout=subprocess.DEVNULL)
    tests = subprocess.run(
        _meson('introspect', '--tests', str(bench.build)),
        env=env, check=True, stdout=subprocess.PIPE).stdout
    return {test['name']: str(Path(test['cmd'][-1]).relative_to(bench.tree))
            for test in json.loads(tests)}


def select(listed: Dict[str, str], ours: Sequence[str]) -> List[str]:
    '''
    The tests to run: those that TESTS names (patterns, separated by
    spaces), all with ALL=1, else ours.  Raises SeriesError if a pattern
    of TESTS matches none.
    '''
    patterns = os.environ.get('TESTS', '').split()
    for pattern in patterns:
        if not fnmatch.filter(listed, pattern):
            raise SeriesError(
                f'TESTS: no test matches \'{pattern}\'',
                next_step=f'choose among: {", ".join(sorted(listed))}')
    if patterns:
        return [name for name in listed
                if any(fnmatch.fnmatchcase(name, pattern)
                       for pattern in patterns)]
    if os.environ.get('ALL') == '1':
        return list(listed)
    return [name for name, file in listed.items() if file in ours]


def _precache(bench: Bench, names: List[str], env: Dict[str, str]) -> None:
    '''Fetch the assets of the tests @names, in QEMU's own way.'''
    stamps = [f'tests/functional/{name[len("func-"):]}.tstamp'
              for name in names]
    if not stamps:
        return
    result = subprocess.run(
        ['ninja', '-C', str(bench.build), *stamps], env=env, check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding='utf-8')
    if result.returncode:
        raise SeriesError(f'precaching failed:\n{result.stdout}')


def _meson_test(bench: Bench, args: Sequence[str], env: Dict[str, str],
                quiet: bool = False,
                hide_kvm: bool = False) -> List[Dict[str, Any]]:
    '''Have meson run tests; returns what it recorded of each.'''
    log = bench.build / 'meson-logs/testlog.json'
    log.unlink(missing_ok=True)
    subprocess.run(
        _shielded(bench, _meson('test', '-C', str(bench.build), *args),
                  hide_kvm),
        env=env, stdin=subprocess.DEVNULL, check=False,
        stdout=subprocess.DEVNULL if quiet else None)
    if not log.is_file():
        raise SeriesError('meson ran no test: its words are above')
    return [json.loads(line)
            for line in log.read_text('utf-8').splitlines()]


def _run(bench: Bench, names: List[str],
         env: Dict[str, str]) -> List[Dict[str, Any]]:
    '''Run tests by name; returns what meson recorded of each.'''
    records = _meson_test(bench, names, env)
    shutil.copyfile(bench.build / 'meson-logs/testlog.junit.xml', REPORT)
    return records


def run_suite(bench: Bench, suite: str) -> List[Dict[str, Any]]:
    '''Run a whole suite of QEMU's; returns what meson recorded.'''
    env = environment()
    _configure(bench, env)
    subprocess.run(['ninja', '-C', str(bench.build), 'build.ninja'],
                   env=env, check=True, stdout=subprocess.DEVNULL)
    return _meson_test(bench, ['--suite', suite], env, quiet=True)


def run_files(bench: Bench,
              files: Sequence[str]) -> Dict[str, Dict[str, Any]]:
    '''
    Run the tests @files one by one, as without network and KVM; returns
    what meson recorded of those that it knows, by file.
    '''
    env = {**environment(), 'QEMU_TEST_NO_DOWNLOAD': '1'}
    _configure(bench, env)
    listed = _listed(bench, env)
    names = [name for name, file in listed.items() if file in files]
    if not names:
        return {}
    return {listed[_name(record)]: record for record in _meson_test(
        bench, ['--num-processes=1', *names], env, quiet=True,
        hide_kvm=True)}


def _name(record: Dict[str, Any]) -> str:
    '''That by which a test is run: meson records its suites, too.'''
    name: str = record['name'].split(' / ')[-1].split(':')[-1]
    return name


def _count(record: Dict[str, Any]) -> Count:
    '''Print the TAP of one test, and the rest if it failed.'''
    name = _name(record)
    count = judge(record.get('stdout') or '', record['result'],
                  record['returncode'])
    say(f'# {name}: {record["result"]}, {record["duration"]:.1f} s')
    say((record.get('stdout') or '').rstrip('\n'))
    if count.failed:
        say((record.get('stderr') or '').rstrip('\n'))
    count.skips = [(f'{name}: {test}', why) for test, why in count.skips]
    count.problems = [f'{name}: {text}' for text in count.problems]
    return count


def _not_listed(bench: Bench, listed: Dict[str, str]) -> Count:
    '''Our tests that meson does not know, for lack of an emulator.'''
    count = Count()
    for file in bench.ours:
        arch = file.split('/')[2]
        if file in listed.values():
            continue
        if arch in bench.emulators:
            count.problem(f'{file}: no meson.build lists it')
        else:
            count.skip(file, f'no qemu-system-{arch}')
    return count


def unlocked(path: Path = REGISTRY) -> List[str]:
    '''Why images of the registry @path can't be had by anybody yet.'''
    images = yaml.safe_load(path.read_text(encoding='utf-8'))['images']
    return [target['not-locked'] for image in images.values()
            for target in image['architectures'].values()
            if 'not-locked' in target]


# What tests of QEMU's that we edit say when they are skipped for a reason
# that no image mends: an emulator, a host or somebody else's file.
NOT_OURS = (
    'Incomplete reg 0x00178 support',
    'KVM does not work here',
    'Neither HVF nor KVM accelerator is available',
    'One or more assets is not available',
    'needs QEMU ',
    'no support for device ',
)


def avoidable(count: Count, reasons: Sequence[str]) -> int:
    '''How many skips have none of the @reasons in what they say.'''
    return sum(not any(reason in why for reason in reasons)
               for _, why in count.skips)


def report(count: Count, strict: bool) -> int:
    '''
    Print what was skipped and what failed, and the summary as the last
    line.  Returns the exit status; with @strict a skip is a failure.
    '''
    skips: Dict[str, List[str]] = {}
    for name, why in count.skips:
        skips.setdefault(why, []).append(name)
    for why, names in skips.items():
        say('\n    '.join([f'skipped: {why}', *names]))
    for problem in count.problems:
        say(f'failed: {problem}')
    bad = bool(count.failed) or not count.passed + count.skipped
    if count.skipped and strict:
        bad = True
        say('a skipped test of ours is no success: mend the reason (images '
            'are built by \'make images\') or set MKOSI_ALLOW_SKIP=1')
    say(count.summary())
    return int(bad)


def check() -> int:
    '''
    Run our tests (or what TESTS or ALL=1 select), print the TAP of each,
    and end with 'N passed, N failed, N skipped'.

    Returns 0 only if something ran, nothing failed and, unless
    MKOSI_ALLOW_SKIP=1, none of ours was skipped but those of images that
    the registry says nobody can build yet, and those for reasons that are
    NOT_OURS.  Raises SeriesError.
    '''
    bench = prepare()
    env = environment()
    _configure(bench, env)
    listed = _listed(bench, env)
    names = select(listed, bench.ours)
    ours = [name for name in names if listed[name] in bench.ours]
    count, of_ours = Count(), Count()
    if not os.environ.get('TESTS'):
        of_ours = _not_listed(bench, listed)
        count.add(of_ours)
    say(f'QEMU {bench.folder.name[len("qemu-"):]}, tests: {len(names)}, '
        f'log: {bench.build / "meson-logs/testlog.txt"}, JUnit: {REPORT}')
    if names:
        _precache(bench, ours, env)
        if names == ours:
            # What precaching could not get is not there: no second try
            env.setdefault('QEMU_TEST_NO_DOWNLOAD', '1')
        for record in _run(bench, names, env):
            result = _count(record)
            count.add(result)
            if _name(record) in ours:
                of_ours.add(result)
    skips = avoidable(of_ours, [*unlocked(), *NOT_OURS])
    return report(count, strict=skips > 0
                  and os.environ.get('MKOSI_ALLOW_SKIP') != '1')


def matrix(args: Sequence[str]) -> int:
    '''
    Run scripts/mkosi-matrix.py of the tree with the command line @args;
    returns its exit status.
    '''
    bench = prepare()
    # What was not built before is not there: no second try in each row
    env = {'QEMU_TEST_NO_DOWNLOAD': '1', **environment()}
    return subprocess.run(
        _shielded(bench, [sys.executable,
                          str(bench.tree / 'scripts/mkosi-matrix.py'),
                          f'--output={BUILD / "matrix"}', *args]),
        env=env, check=False).returncode


def run_file(file: str, args: Sequence[str]) -> int:
    '''
    Run one test @file (its path in this repository or in QEMU's tree) with
    its own command line @args; returns its exit status.
    '''
    bench = prepare()
    name = os.path.relpath(Path(file).absolute(), ROOT)
    match = _TEST.match(name)
    if match is None or not (bench.tree / name).is_file():
        raise SeriesError(
            f'{file}: expected tests/functional/<architecture>/test_*.py, '
            'found none of that name')
    if match[1] not in bench.emulators:
        raise SeriesError(f'{file}: no qemu-system-{match[1]}',
                          next_step='install it, or name its folder with '
                                    'QEMU_BIN=<folder>')
    env = environment()
    _configure(bench, env)
    emulator = bench.build / f'qemu-system-{match[1]}'
    subprocess.run(['ninja', '-C', str(bench.build), emulator.name,
                    *(['qemu-img'] if bench.qemu_img else [])],
                   env=env, check=True, stdout=subprocess.DEVNULL)
    env['PYTHONPATH'] = os.pathsep.join(
        [str(bench.tree / 'python'), str(bench.tree / 'tests/functional')])
    env['QEMU_TEST_QEMU_BINARY'] = str(emulator)
    env['QEMU_TEST_QEMU_IMG'] = str(bench.build / 'qemu-img')
    # The build folder's name before and after QEMU 11
    env['QEMU_BUILD_ROOT'] = env['MESON_BUILD_ROOT'] = str(bench.build)
    return subprocess.run(
        _shielded(bench, [sys.executable, str(bench.tree / name), *args]),
        env=env, cwd=bench.build, check=False).returncode
