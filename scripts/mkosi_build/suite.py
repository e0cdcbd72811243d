# SPDX-License-Identifier: GPL-2.0-or-later
'''
Runs functional tests of a QEMU tree on emulators that are already there,
each file as a process of its own, and says what came of each of its cases.
Silence is a failure, and nothing that a test started outlives it.
'''

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import (
    Dict,
    Iterable,
    Iterator,
    List,
    Mapping,
    Optional,
    Set,
    Tuple,
)

FOLDER = 'tests/functional'

# Of what a failed test said: enough for its traceback
TAIL_LINES = 60
TAIL_BYTES = 1 << 16

# Seconds between two looks at a process, and how long dying may take
_POLL = 0.05
_DYING = 5.0

_IMAGE = re.compile(r'\bMkosiAsset\b')
_IMPORT = re.compile(r'^[ \t]*(?:from|import)[ \t]+(.+)$', re.MULTILINE)
_RESULT = re.compile(r'(not )?ok\b[ \t]*(\d*)(.*)')
_PLAN = re.compile(r'1\.\.(\d{1,9})\b(.*)')
_DIRECTIVE = re.compile(r'\s*(SKIP|TODO)\S*\s*(.*)', re.IGNORECASE)
_TRACEBACK = 'Traceback (most recent call last):\n'


@dataclass(frozen=True)
class Case:
    '''One case of a test: 'passed', 'failed' or 'skipped', and why.'''
    name: str
    state: str
    reason: str = ''


@dataclass(frozen=True)
class Outcome:
    '''
    What came of one file of tests. Where something failed, @output is the
    end of what it said, and the folder of its logs.
    '''
    test: str
    cases: Tuple[Case, ...]
    seconds: float
    output: str = ''

    def count(self, state: str) -> int:
        '''How many cases ended in @state.'''
        return sum(case.state == state for case in self.cases)


@dataclass(frozen=True)
class Binaries:
    '''
    What the tests run: emulators by QEMU's name of the architecture, and
    files for the build folder's pc-bios by their names there.
    '''
    emulators: Mapping[str, Path]
    qemu_img: Optional[Path]
    firmware: Mapping[str, Path]


# -- Which tests there are --------------------------------------------------

def find_tests(tree: Path, arch: str) -> List[str]:
    '''
    The tests in the QEMU @tree for @arch that use an image, such as
    'x86_64/hotplug_blk': by themselves or through a module that they
    import from the folder above theirs.
    '''
    folder = tree / FOLDER
    modules = {path.stem for path in folder.glob('*.py')
               if _IMAGE.search(_text(path))}
    return [f'{arch}/{path.stem[len("test_"):]}'
            for path in sorted((folder / arch).glob('test_*.py'))
            if _uses(_text(path), modules)]


def _text(path: Path) -> str:
    return path.read_text(encoding='utf-8', errors='replace')


def _uses(text: str, modules: Set[str]) -> bool:
    return bool(_IMAGE.search(text)) or any(
        modules.intersection(re.findall(r'\w+', names))
        for names in _IMPORT.findall(text))


# -- Running one ------------------------------------------------------------

def run_test(tree: Path, test: str, binaries: Binaries, work: Path,
             deadline: float, env: Mapping[str, str],
             stop: Optional[threading.Event] = None) -> Outcome:
    '''
    @params tree: a QEMU source tree, which is only read
    @params test: as find_tests() names it
    @params binaries: what it runs on
    @params work: where its build folder is made, which has its logs
    @params deadline: as of time.monotonic(); then it is killed
    @params env: the environment, to which what tests need is added
    @params stop: once set, the test is killed as if at its deadline

    Returns what came of it; that it failed is no exception.
    '''
    arch, name = test.split('/')
    if arch not in binaries.emulators:
        return Outcome(test, (Case('all', 'skipped',
                                   f'no qemu-system-{arch}'),), 0.0)
    tree, root = tree.absolute(), (work / test).absolute()
    _make_root(root, binaries)
    started = time.monotonic()
    with _scratch(root, env) as full:
        status = _run(
            tree / FOLDER / arch / f'test_{name}.py', root,
            _environment(tree, root, arch, full), deadline, stop)
    seconds = time.monotonic() - started

    cases = _cases(root, name, status)
    if status is None:
        cases.append(Case(
            'interrupted' if stop and stop.is_set() else 'timeout',
            'failed', f'killed after {seconds:.1f} s'))
    return Outcome(test, tuple(cases), seconds, _output(root) if any(
        case.state == 'failed' for case in cases) else '')


@contextmanager
def _scratch(root: Path,
             env: Mapping[str, str]) -> Iterator[Mapping[str, str]]:
    '''
    @env with a folder for temporary files, which a killed test leaves, in
    @root too. Paths of sockets are short, so that theirs can't be there.
    '''
    folder = tempfile.mkdtemp(prefix='qemu-test-')
    try:
        yield {**env, 'TMPDIR': folder}
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if 'QEMU_TEST_KEEP_SCRATCH' not in env:
            for left in root.glob(f'{FOLDER}/*/*/scratch'):
                shutil.rmtree(left, ignore_errors=True)


def _make_root(root: Path, binaries: Binaries) -> None:
    '''Make @root look like the folder of a build of QEMU.'''
    links = {root / f'qemu-system-{arch}': path
             for arch, path in binaries.emulators.items()}
    links.update((root / 'pc-bios' / name, path)
                 for name, path in binaries.firmware.items())
    if binaries.qemu_img is not None:
        links[root / 'qemu-img'] = binaries.qemu_img
    (root / 'pc-bios').mkdir(parents=True, exist_ok=True)
    # QEMU 10 knows its build folder by this file
    (root / 'Makefile.mtest').touch()
    for left in (*root.glob('qemu-*'), *root.glob('pc-bios/*')):
        if left.is_symlink():
            left.unlink()
    for link, path in links.items():
        link.symlink_to(path.absolute())


def _environment(tree: Path, root: Path, arch: str,
                 env: Mapping[str, str]) -> Dict[str, str]:
    full = {**{name: value for name, value in env.items()
               if name != 'QEMU_TEST_QEMU_IMG'},
            'PYTHONPATH': os.pathsep.join([str(tree / 'python'),
                                           str(tree / FOLDER)]),
            # The tree is not ours
            'PYTHONDONTWRITEBYTECODE': '1',
            'QEMU_TEST_QEMU_BINARY': str(root / f'qemu-system-{arch}'),
            # The build folder's name before and after QEMU 11
            'QEMU_BUILD_ROOT': str(root),
            'MESON_BUILD_ROOT': str(root)}
    if (root / 'qemu-img').is_symlink():
        full['QEMU_TEST_QEMU_IMG'] = str(root / 'qemu-img')
    return full


def _run(file: Path, root: Path, env: Mapping[str, str],
         deadline: float, stop: Optional[threading.Event]) -> Optional[int]:
    '''Returns the exit status; None if it had to be killed.'''
    # Files take what comes and, other than pipes, don't keep us waiting
    # for whoever holds them open
    with open(root / 'stdout', 'wb') as out, \
            open(root / 'stderr', 'wb') as err, \
            subprocess.Popen(
                # It ends with us even if we are killed
                ['setpriv', '--pdeathsig', 'KILL', sys.executable, str(file)],
                cwd=root, env=env, stdin=subprocess.DEVNULL, stdout=out,
                stderr=err, start_new_session=True) as process:
        ended = False
        try:
            ended = _wait(process.pid, deadline, stop)
        finally:
            _kill(process.pid, f'MESON_BUILD_ROOT={root}')
    return process.returncode if ended else None


def _wait(pid: int, deadline: float,
          stop: Optional[threading.Event]) -> bool:
    '''
    Whether the process ended by itself. It is left to be waited for: until
    then its number, and its group's, can't be somebody else's.
    '''
    while not os.waitid(os.P_PID, pid,
                        os.WEXITED | os.WNOWAIT | os.WNOHANG):
        if time.monotonic() >= deadline or (stop and stop.is_set()):
            return False
        time.sleep(_POLL)
    return True


def _kill(group: int, mark: str) -> None:
    '''
    Kill the process @group, then those who left it: they still have @mark
    in their environment. Returns when they are gone.
    '''
    os.killpg(group, signal.SIGKILL)
    deadline = time.monotonic() + _DYING
    while time.monotonic() < deadline:
        left = _marked(mark)
        if not left:
            return
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except OSError:
                # It was quicker
                pass
        time.sleep(_POLL)


def _marked(mark: str) -> List[int]:
    '''The processes, other than dead ones, with @mark in their environment.'''
    found = []
    for path in Path('/proc').glob('[0-9]*/environ'):
        try:
            if os.fsencode(mark) in path.read_bytes().split(b'\0'):
                found.append(int(path.parent.name))
        except OSError:
            # Gone, or somebody else's
            pass
    return [pid for pid in found if pid != os.getpid()]


# -- What came of it --------------------------------------------------------

def _cases(root: Path, name: str, status: Optional[int]) -> List[Case]:
    '''
    The cases that a test told of before it ended with @status, and one
    more for what else went wrong, but not for that it was killed.
    '''
    with open(root / 'stdout', encoding='utf-8', errors='replace') as file:
        cases, problem = read_tap(file)
    said = _tail(root / 'stderr', TAIL_BYTES)
    methods = [_method(case) for case in cases if case.state == 'failed']
    cases = [Case(case.name.replace(f'test_{name}.', '', 1), case.state,
                  # Which of two of one name raised what, nobody says
                  _raised(said, _method(case))
                  if methods.count(_method(case)) == 1
                  and case.state == 'failed' else case.reason)
             for case in cases]
    if status and not methods:
        cases.append(Case('all', 'failed', _ended(status)))
    elif status is not None and problem:
        cases.append(Case('all', 'failed', problem))
    return cases


def read_tap(lines: Iterable[str]) -> Tuple[List[Case], str]:
    '''
    Returns the cases of a TAP stream that a test wrote to its end, and
    what is wrong with the stream ('' if nothing is).
    '''
    cases: List[Case] = []
    problem = ''
    plan: Optional[int] = None
    counted = 0
    for line in lines:
        result = _RESULT.match(line)
        planned = _PLAN.match(line)
        if result:
            cases.append(_case(result))
            # unittest's word of a class that could not be set up
            counted += result[2] != '0'
        elif planned and plan is None:
            plan = int(planned[1])
            skip = _DIRECTIVE.match(planned[2].partition('#')[2])
            if plan == 0 and skip:
                cases.append(Case('all', 'skipped', _reason(skip[2])))
        elif line.startswith('Bail out!'):
            problem = problem or ' '.join(line.split())
    if not problem and plan is None:
        problem = 'no plan: the test did not run to its end'
    elif not problem and plan != counted:
        problem = f'{plan} cases planned, {counted} ran'
    elif not problem and not cases:
        problem = 'no case ran'
    return cases, problem


def _case(match: 're.Match[str]') -> Case:
    name, _, rest = match[3].partition('#')
    name = ' '.join(name.split())
    name = name[2:] if name.startswith('- ') else name
    name = name or f'case {match[2] or "without a name"}'
    directive = _DIRECTIVE.match(rest)
    if directive and (directive[1].upper() == 'TODO' or not match[1]):
        return Case(name, 'skipped', _reason(directive[2]))
    return Case(name, 'failed' if match[1] else 'passed')


def _reason(text: str) -> str:
    return ' '.join(text.split()) or 'no reason given'


def _method(case: Case) -> str:
    return case.name.rpartition('.')[2]


def _raised(said: str, method: str) -> str:
    '''The exception that ended @method, of what went to stderr.'''
    for block in reversed(said.split(_TRACEBACK)[1:]):
        if f', in {method}\n' in block:
            lines = [line for line in block.splitlines()
                     if line[:1].strip()]
            return lines[0] if lines else ''
    return ''


def _ended(status: int) -> str:
    if status > 0:
        return f'ended with status {status}'
    try:
        return f'ended by {signal.Signals(-status).name}'
    except ValueError:
        return f'ended by signal {-status}'


def _tail(path: Path, size: int) -> str:
    with open(path, 'rb') as file:
        file.seek(max(0, os.path.getsize(path) - size))
        return file.read(size).decode('utf-8', 'replace')


def _output(root: Path) -> str:
    lines = [*_tail(root / 'stdout', TAIL_BYTES).splitlines(),
             *_tail(root / 'stderr', TAIL_BYTES).splitlines()][-TAIL_LINES:]
    return '\n'.join([*lines, f'logs: {root / FOLDER}', ''])
