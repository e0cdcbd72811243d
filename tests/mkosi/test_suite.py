# SPDX-License-Identifier: GPL-2.0-or-later
'''Tests of a QEMU tree, run one by one: what came of them, and no rest.'''

import json
import os
from pathlib import Path
import signal
import subprocess
import sys
import threading
import time
from typing import Dict, List, Optional, Tuple

import pytest

from mkosi_build import suite
from mkosi_build.suite import Binaries, Case, Outcome

# Long after the slowest of these tests should have ended
SOON = 30.0


class Tree:
    '''A QEMU source tree with nothing but tests, and how to run one.'''

    def __init__(self, path: Path) -> None:
        self.path = path / 'tree'
        self.work = path / 'work'
        self.file('qemu_test/__init__.py', 'class MkosiAsset: pass\n')
        self.binaries = Binaries({'x86_64': path / 'bin/emulator'}, None, {})

    def file(self, name: str, text: str) -> Path:
        '''Write a file below tests/functional.'''
        path = self.path / suite.FOLDER / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding='utf-8')
        return path

    def run(self, script: str, within: float = SOON,
            stop: Optional[threading.Event] = None,
            env: Optional[Dict[str, str]] = None) -> Outcome:
        '''Run the Python @script as the test x86_64/it.'''
        self.file('x86_64/test_it.py', script)
        return suite.run_test(
            self.path, 'x86_64/it', self.binaries, self.work,
            time.monotonic() + within, {**os.environ, **(env or {})}, stop)

    def said(self, tap: str, status: int = 0) -> Tuple[Case, ...]:
        '''The cases of a test that prints @tap.'''
        return self.run(f'import sys\nprint({tap!r})\n'
                        f'sys.exit({status})\n').cases


@pytest.fixture(name='tree')
def fixture_tree(tmp_path: Path) -> Tree:
    '''A tree with no tests.'''
    return Tree(tmp_path)


def alive(pid: int) -> bool:
    '''Whether that process runs; a dead one that nobody waited for doesn't.'''
    try:
        text = Path(f'/proc/{pid}/stat').read_text('ascii', 'replace')
    except OSError:
        return False
    return text.rpartition(')')[2].split()[0] not in 'ZX'


# -- Which tests ------------------------------------------------------------

def test_only_those_with_images(tree: Tree) -> None:
    '''A test counts that uses an image, also through a module beside.'''
    tree.file('boots.py', 'from qemu_test import MkosiAsset\n')
    tree.file('other.py', 'import os\n')
    tree.file('x86_64/test_b.py', 'from qemu_test import Asset, MkosiAsset\n')
    tree.file('x86_64/test_a.py', 'import os\nimport boots\n')
    tree.file('x86_64/test_c.py', 'from boots import BootTest\n')
    tree.file('x86_64/test_no.py', 'from qemu_test import Asset\n'
                                   'import other\n# boots\n')
    tree.file('x86_64/helper.py', 'MkosiAsset')
    tree.file('aarch64/test_d.py', 'MkosiAsset')
    assert suite.find_tests(tree.path, 'x86_64') == [
        'x86_64/a', 'x86_64/b', 'x86_64/c']
    assert suite.find_tests(tree.path, 'aarch64') == ['aarch64/d']
    assert not suite.find_tests(tree.path, 's390x')


def test_odd_bytes_in_a_test(tree: Tree) -> None:
    '''A file that is not UTF-8 is looked at all the same.'''
    tree.file('x86_64/test_a.py', '').write_bytes(b'# \xff\nMkosiAsset\n')
    assert suite.find_tests(tree.path, 'x86_64') == ['x86_64/a']


# -- What came of it --------------------------------------------------------

def test_cases(tree: Tree) -> None:
    '''Passed, failed and skipped, by names without their module.'''
    outcome = tree.run('''
import sys
print('TAP version 13')
print('ok 1 test_it.Disk.test_boot')
print('ok 2 test_it.Disk.test_net # SKIP no  user networking')
print('not ok 3 test_it.Disk.test_bad')
print('  ---')
print('1..3')
sys.exit(1)
''')
    assert outcome.test == 'x86_64/it'
    assert outcome.cases == (
        Case('Disk.test_boot', 'passed'),
        Case('Disk.test_net', 'skipped', 'no user networking'),
        Case('Disk.test_bad', 'failed'))
    assert [outcome.count(state) for state in (
        'passed', 'failed', 'skipped')] == [1, 1, 1]
    assert 0 < outcome.seconds < SOON


@pytest.mark.parametrize('tap, cases', [
    ('1..0 # SKIP no KVM', [Case('all', 'skipped', 'no KVM')]),
    ('1..0 # skipped: here', [Case('all', 'skipped', 'here')]),
    ('1..0 # SKIP', [Case('all', 'skipped', 'no reason given')]),
    ('1..0', [Case('all', 'failed', 'no case ran')]),
    ('', [Case('all', 'failed',
               'no plan: the test did not run to its end')]),
    ('fine', [Case('all', 'failed',
                   'no plan: the test did not run to its end')]),
    ('ok 1 a', [Case('a', 'passed'),
                Case('all', 'failed',
                     'no plan: the test did not run to its end')]),
    ('1..2\nok 1 a', [Case('a', 'passed'),
                      Case('all', 'failed', '2 cases planned, 1 ran')]),
    ('ok 1 a\nok 2 b\n1..1', [
        Case('a', 'passed'), Case('b', 'passed'),
        Case('all', 'failed', '1 cases planned, 2 ran')]),
    ('1..1\nok 1 a\nBail out!  no disk', [
        Case('a', 'passed'), Case('all', 'failed', 'Bail out! no disk')]),
    ('ok\nok - b\nok 3 - c\n1..3', [
        Case('case without a name', 'passed'), Case('b', 'passed'),
        Case('c', 'passed')]),
    ('not ok 1 a # TODO later\n1..1', [Case('a', 'skipped', 'later')]),
    ('not ok 1 a # SKIP but bad\n1..1', [Case('a', 'failed')]),
    ('okay\n ok 1 inner\nok 1 a\n1..1', [Case('a', 'passed')]),
    # unittest does not count a class that could not be set up
    ('ok 0 setUpClass (test_it.A) # SKIP no\nok 1 b\n1..1', [
        Case('setUpClass (A)', 'skipped', 'no'), Case('b', 'passed')]),
    ('not ok 0 setUpClass (test_it.A)\n1..0', [
        Case('setUpClass (A)', 'failed')]),
])
def test_tap(tree: Tree, tap: str, cases: List[Case]) -> None:
    '''What has no plan, or another one, failed.'''
    assert list(tree.said(tap)) == cases


@pytest.mark.parametrize('end, why', [
    ('sys.exit(3)', 'ended with status 3'),
    ('os.kill(os.getpid(), 9)', 'ended by SIGKILL'),
    ('os.abort()', 'ended by SIGABRT'),
])
def test_bad_end(tree: Tree, end: str, why: str) -> None:
    '''All cases passed, and yet the test did not end well.'''
    outcome = tree.run('import os, sys\nprint("1..1\\nok 1 a", flush=True)\n'
                       f'{end}\n')
    assert outcome.cases == (Case('a', 'passed'), Case('all', 'failed', why))


def test_what_was_raised(tree: Tree) -> None:
    '''The exception is the reason, unless two cases go by its name.'''
    cases = tree.run('''
import sys, traceback
def test_one(): raise ValueError('one\\nis bad')
def test_two(): raise KeyError('two')
def run(function):
    try:
        function()
    except Exception:
        traceback.print_exc()
run(test_one)
run(test_two)
print("""not ok 1 test_it.A.test_one
not ok 2 test_it.A.test_two
not ok 3 test_it.B.test_two
ok 4 test_it.B.test_one
1..4""")
sys.exit(1)
''').cases
    assert [case.reason for case in cases] == [
        'ValueError: one', '', '', '']


def test_last_words(tree: Tree) -> None:
    '''A failure has the end of what was said and where logs are; else none.'''
    script = '''
import sys
for n in range(100000):
    print(f'diagnostic {n}', file=sys.stderr)
sys.stderr.buffer.write(b'\\xff\\n')
print('x' * 10000000)
print('1..1')
print('%sok 1 a')
'''
    outcome = tree.run(script % 'not ')
    assert outcome.cases == (Case('a', 'failed'),)
    lines = outcome.output.splitlines()
    assert len(lines) == suite.TAIL_LINES + 1
    assert lines[-3:] == ['diagnostic 99999', '\ufffd',
                          f'logs: {tree.work}/x86_64/it/tests/functional']
    assert tree.run(script % '').output == ''


# -- What a test finds ------------------------------------------------------

def test_build_folder(tree: Tree, tmp_path: Path) -> None:
    '''A build folder, the tree's modules, and binaries under QEMU's names.'''
    programs = {name: tmp_path / name for name in ('q.sh', 'img', 'fw')}
    for path in programs.values():
        path.write_text(path.name, encoding='utf-8')
    tree.binaries = Binaries({'x86_64': programs['q.sh']}, programs['img'],
                             {'edk2-x86_64-code.fd': programs['fw']})
    script = f'''
import json, os, qemu_test, sys
names = ('QEMU_TEST_QEMU_BINARY', 'QEMU_TEST_QEMU_IMG', 'QEMU_BUILD_ROOT',
         'MESON_BUILD_ROOT', 'MINE', 'TMPDIR', 'QEMU_TEST_NO_DOWNLOAD')
with open({str(tmp_path / 'found')!r}, 'w') as file:
    json.dump([os.getcwd(), sys.stdin.read(),
               {{name: os.environ.get(name) for name in names}}], file)
print('1..1')
print('ok 1 a')
'''
    # A second time over what the first one left
    for _ in range(2):
        outcome = tree.run(script, env={'MINE': 'kept',
                                        'QEMU_TEST_NO_DOWNLOAD': '1'})
        assert outcome.cases == (Case('a', 'passed'),)
    folder, typed, env = json.loads((tmp_path / 'found').read_text('utf-8'))
    root = tree.work / 'x86_64/it'
    assert (folder, typed) == (str(root), '')
    assert env['QEMU_TEST_QEMU_BINARY'] == f'{root}/qemu-system-x86_64'
    assert env['QEMU_TEST_QEMU_IMG'] == f'{root}/qemu-img'
    assert env['QEMU_BUILD_ROOT'] == env['MESON_BUILD_ROOT'] == str(root)
    assert (env['MINE'], env['QEMU_TEST_NO_DOWNLOAD']) == ('kept', '1')
    assert not os.path.exists(env['TMPDIR'])
    assert (root / 'Makefile.mtest').read_bytes() == b''
    assert [(root / name).read_text('utf-8') for name in (
        'qemu-system-x86_64', 'qemu-img', 'pc-bios/edk2-x86_64-code.fd')] == [
            'q.sh', 'img', 'fw']
    # Nothing was written into the tree
    assert not list(tree.path.glob('**/__pycache__'))


def test_no_qemu_img(tree: Tree) -> None:
    '''Where there is none, neither the caller's nor an earlier one is.'''
    script = '''
import os
print('1..1')
assert 'QEMU_TEST_QEMU_IMG' not in os.environ
assert not os.path.lexists('qemu-img')
print('ok 1 a')
'''
    tree.binaries = Binaries(tree.binaries.emulators, Path('/bin/true'), {})
    assert tree.run(script).cases[0].state == 'failed'
    tree.binaries = Binaries(tree.binaries.emulators, None, {})
    assert tree.run(script, env={'QEMU_TEST_QEMU_IMG': '/bin/false'}
                    ).cases == (Case('a', 'passed'),)


def test_no_emulator(tree: Tree) -> None:
    '''A test for which there is no emulator is skipped.'''
    outcome = suite.run_test(tree.path, 'aarch64/it', tree.binaries,
                             tree.work, time.monotonic(), {})
    assert outcome.cases == (
        Case('all', 'skipped', 'no qemu-system-aarch64'),)


# -- Nothing is left --------------------------------------------------------

STUBBORN = '''
import os, signal, subprocess, sys, time
CHILD = """
import os, signal, sys, time
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
print(os.getpid(), flush=True)
time.sleep(600)
"""
def start(**how):
    child = subprocess.Popen([sys.executable, '-c', CHILD],
                             stdout=subprocess.PIPE, **how)
    return child.stdout.readline().decode()
pids = start(), start(start_new_session=True), f'{os.getpid()}\\n'
with open('pids.new', 'w') as file:
    file.writelines(pids)
os.rename('pids.new', 'pids')
print('ok 1 first', flush=True)
'''


def pids(tree: Tree) -> List[int]:
    '''What STUBBORN started, which shows that it came so far, and itself.'''
    text = (tree.work / 'x86_64/it/pids').read_text('ascii')
    assert len(text.split()) == 3
    return [int(pid) for pid in text.split()]


def test_deadline(tree: Tree) -> None:
    '''At its deadline a test ends with all that it has started.'''
    outcome = tree.run(STUBBORN + 'time.sleep(600)\n', within=2.0)
    first, last = outcome.cases
    assert first == Case('first', 'passed')
    assert (last.name, last.state) == ('timeout', 'failed')
    assert last.reason.startswith('killed after ')
    assert 2.0 <= outcome.seconds < SOON
    assert not any(map(alive, pids(tree)))


def test_nothing_outlives_success(tree: Tree) -> None:
    '''Who is left after a test that passed ends as well.'''
    outcome = tree.run(STUBBORN + 'print("1..1")\n')
    assert outcome.cases == (Case('first', 'passed'),)
    assert not any(map(alive, pids(tree)))


def test_files_of_the_killed(tree: Tree) -> None:
    '''What a killed test would have removed is gone, but for its logs.'''
    script = '''
import os, tempfile, time
os.makedirs('tests/functional/x86_64/test_it.A.test/scratch/deep')
open('tests/functional/x86_64/test_it.A.test/base.log', 'w').close()
print(f'ok 1 {tempfile.mkdtemp()}', flush=True)
time.sleep(600)
'''
    outcome = tree.run(script, within=1.0)
    assert not os.path.exists(outcome.cases[0].name)
    folder = tree.work / 'x86_64/it/tests/functional/x86_64/test_it.A.test'
    assert os.listdir(folder) == ['base.log']
    (folder / 'base.log').unlink()
    folder.rmdir()
    tree.run(script, within=1.0, env={'QEMU_TEST_KEEP_SCRATCH': '1'})
    assert (folder / 'scratch/deep').is_dir()


def test_past_deadline(tree: Tree) -> None:
    '''Too late is too late.'''
    outcome = tree.run('import time\ntime.sleep(600)\n', within=-1.0)
    assert [case.name for case in outcome.cases] == ['timeout']


def test_stopped_by_another_thread(tree: Tree) -> None:
    '''Who set the event waits no longer than for the dying.'''
    stop = threading.Event()
    marker = tree.work / 'x86_64/it/pids'

    def wait() -> None:
        while not marker.exists():
            time.sleep(0.01)
        stop.set()

    thread = threading.Thread(target=wait)
    thread.start()
    outcome = tree.run(STUBBORN + 'time.sleep(600)\n', stop=stop)
    thread.join()
    assert [case.name for case in outcome.cases] == ['first', 'interrupted']
    assert not any(map(alive, pids(tree)))


def runner(tree: Tree) -> 'subprocess.Popen[bytes]':
    '''A process of its own that runs the test x86_64/it.'''
    return subprocess.Popen([sys.executable, '-c', f'''
import sys, time
from pathlib import Path
sys.path.insert(0, {str(Path(suite.__file__).parents[1])!r})
from mkosi_build import suite
try:
    suite.run_test(Path({str(tree.path)!r}), 'x86_64/it', suite.Binaries(
        {{'x86_64': Path('/bin/false')}}, None, {{}}),
        Path({str(tree.work)!r}), time.monotonic() + 600, {{}})
except KeyboardInterrupt:
    print('interrupted')
'''], stdout=subprocess.PIPE)


def test_interrupt(tree: Tree) -> None:
    '''Ctrl-C raises KeyboardInterrupt when everything has ended.'''
    tree.file('x86_64/test_it.py', STUBBORN + 'time.sleep(600)\n')
    with runner(tree) as process:
        marker = tree.work / 'x86_64/it/pids'
        while not marker.exists():
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=SOON)[0] == b'interrupted\n'
    assert not any(map(alive, pids(tree)))


def test_runner_killed(tree: Tree, tmp_path: Path) -> None:
    '''Even if the runner is killed, the test itself ends.'''
    tree.file('x86_64/test_it.py', f'''
import os, time
with open({str(tmp_path / 'new')!r}, 'w') as file:
    file.write(str(os.getpid()))
os.rename({str(tmp_path / 'new')!r}, {str(tmp_path / 'pid')!r})
time.sleep(600)
''')
    with runner(tree) as process:
        while not (tmp_path / 'pid').exists():
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
    deadline = time.monotonic() + SOON
    while alive(int((tmp_path / 'pid').read_text('ascii'))):
        assert time.monotonic() < deadline
        time.sleep(0.01)
