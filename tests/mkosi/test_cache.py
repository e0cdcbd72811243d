# SPDX-License-Identifier: GPL-2.0-or-later
'''
The builder's edges: its folders, how it runs commands, what it tells, and
the repository that it makes.
'''

import errno
import io
import json
import os
from pathlib import Path
import signal
import subprocess
import sys
import threading
import time
from typing import Any, Callable, Dict, Iterator, List

import pytest

from fixtures_builder import EPOCH, make_package, processes
from mkosi_build import cache as caches, command, lock as locks, repository
from mkosi_build.cache import Cache
from mkosi_build.error import BuildError, HostError, InputError
from mkosi_build.lock import Lock, Package
from mkosi_build.report import Report
from mkosi_build.store import Store

SHA = 'ab' * 32
SCRIPTS = Path(caches.__file__).parents[1]
# Without the power to go through closed doors
NO_POWERS = (['setpriv', '--bounding-set=-all', '--inh-caps=-all']
             if os.getuid() == 0 else [])


@pytest.fixture(name='cache')
def fixture_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cache:
    '''The folders, of which none is there yet.'''
    monkeypatch.setenv('QEMU_MKOSI_DIR', str(tmp_path / 'own'))
    monkeypatch.setenv('QEMU_TEST_CACHE_DIR', str(tmp_path / 'tests'))
    return Cache()


# Where things are

def test_folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    '''The environment's, also where relative, else the user's cache.'''
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('QEMU_MKOSI_DIR', 'own')
    monkeypatch.setenv('QEMU_TEST_CACHE_DIR', 'tests')
    assert Cache().root == tmp_path / 'own'
    assert Cache().assets == tmp_path / 'tests/download'
    monkeypatch.delenv('QEMU_MKOSI_DIR')
    monkeypatch.setenv('QEMU_TEST_CACHE_DIR', '')
    monkeypatch.setenv('HOME', '/home/me')
    assert Cache().root == Path('/home/me/.cache/qemu/mkosi')
    assert Cache().assets == Path('/home/me/.cache/qemu/download')


# What the operating system refuses

@pytest.mark.parametrize('number, expected', [
    (errno.ENOSPC, 'no space left for /a/file'),
    (errno.EDQUOT, 'no space left for /a/file'),
    (errno.EACCES, '/a/file: Permission denied'),
    (errno.EROFS, '/a/file: Read-only file system'),
    (errno.ENOTDIR, '/a/file: Not a directory'),
    (errno.EEXIST, '/a/file: File exists'),
    (errno.EIO, '/a/file: Input/output error'),
])
def test_host_error(number: int, expected: str) -> None:
    '''Each is told with the file, and what to do next.'''
    error = OSError(number, os.strerror(number), '/a/file')
    told = caches.host_error(error, 'Building')
    assert told.exit_code == 4
    assert told.message == f'Building: {expected}'
    assert told.next_step


def test_host_error_names_where_to() -> None:
    '''Of a copy, the file that could not be written counts.'''
    error = OSError(errno.ENOSPC, 'No space', '/source', None, '/dest')
    assert '/dest' in caches.host_error(error, 'Building').message


@pytest.mark.parametrize('name', ['own', 'tests', 'tests/download'])
def test_cache_path_is_a_file(name: str, cache: Cache,
                              tmp_path: Path) -> None:
    '''A folder that is a file is told by its path.'''
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text('not a folder')
    with pytest.raises(BuildError) as caught:
        cache.check_writable()
    assert caught.value.exit_code == 4
    assert str(tmp_path / name) in caught.value.message
    assert 'QEMU_MKOSI_DIR' in (caught.value.next_step or '')


@pytest.mark.parametrize('path', ['a b', 'a:b', 'a%20b', 'a"b', 'a$b',
                                  'a\\b', 'a,b'])
def test_cache_path_is_odd(path: str, cache: Cache, tmp_path: Path,
                           monkeypatch: pytest.MonkeyPatch) -> None:
    '''mkosi and apt would take such a path for something else.'''
    monkeypatch.setenv('QEMU_MKOSI_DIR', str(tmp_path / path))
    with pytest.raises(HostError) as caught:
        Cache().check_writable()
    assert path in caught.value.message
    assert 'QEMU_MKOSI_DIR' in (caught.value.next_step or '')
    monkeypatch.setenv('QEMU_MKOSI_DIR', str(tmp_path / 'own'))
    monkeypatch.setenv('QEMU_TEST_CACHE_DIR', str(tmp_path / path))
    cache.check_writable()


def test_probe_leaves_nothing(cache: Cache, tmp_path: Path,
                              monkeypatch: pytest.MonkeyPatch) -> None:
    '''Not where it fails half way, either.'''
    cache.check_writable()

    def full(path: Path, _data: bytes) -> int:
        path.touch()
        raise OSError(errno.ENOSPC, 'No space', str(path))

    monkeypatch.setattr(Path, 'write_bytes', full)
    with pytest.raises(BuildError, match='no space left'):
        cache.check_writable()
    assert not [name for _, _, names in os.walk(tmp_path) for name in names]


def test_cache_path_may_have_signs(tmp_path: Path,
                                   monkeypatch: pytest.MonkeyPatch) -> None:
    '''These were tried, and mkosi and apt take them.'''
    monkeypatch.setenv('QEMU_TEST_CACHE_DIR', str(tmp_path / 'tests'))
    monkeypatch.setenv('QEMU_MKOSI_DIR', str(tmp_path / 'é@+=~._-1'))
    Cache().check_writable()


# Files

def test_write_atomically(tmp_path: Path) -> None:
    '''Makes the folder, keeps the mode, leaves nothing beside.'''
    path = tmp_path / 'new' / 'file'
    caches.write_atomically(path, 'one\n')
    path.chmod(0o640)
    caches.write_atomically(path, 'two\n')
    assert path.read_text() == 'two\n'
    assert path.stat().st_mode & 0o777 == 0o640
    assert os.listdir(path.parent) == ['file']


def dead_pid() -> int:
    '''A process id that nobody has any longer.'''
    with subprocess.Popen(['true']) as process:
        process.wait()
    return process.pid


def test_write_atomically_clears_up(tmp_path: Path) -> None:
    '''What a killed writer left goes; a living one keeps its own.'''
    dead = tmp_path / f'.file.{dead_pid()}.tmp'
    living = tmp_path / f'.file.{os.getppid()}.tmp'
    for path in (dead, living):
        path.write_text('half')
    caches.write_atomically(tmp_path / 'file', 'whole')
    assert sorted(os.listdir(tmp_path)) == [living.name, 'file']


def test_add_asset(cache: Cache, tmp_path: Path) -> None:
    '''Under its hash, read-only, with the time beside it.'''
    cache.check_writable()
    source = tmp_path / 'source'
    source.write_text('whole')
    (cache.assets / SHA).write_text('damaged')
    (cache.assets / f'.{SHA}.{dead_pid()}.tmp').write_text('half')
    # Left by a process of the same number, as in a container
    (cache.assets / f'.{SHA}.{os.getpid()}.tmp').write_text('half')
    asset = cache.add_asset(source, SHA)
    assert asset == cache.assets / SHA
    assert asset.read_bytes() == b'whole'
    assert asset.stat().st_mode & 0o777 == 0o444
    assert sorted(os.listdir(cache.assets)) == [SHA, f'{SHA}.stamp']
    stamp = int((cache.assets / f'{SHA}.stamp').read_bytes())
    assert abs(stamp - time.time()) < 60


def test_link_or_copy_to_another_file_system(tmp_path: Path) -> None:
    '''A copy does where a link can't.'''
    source, dest = tmp_path / 'source', Path(f'/dev/shm/test-{os.getpid()}')
    if not os.access('/dev/shm', os.W_OK):
        pytest.skip('no other file system')
    source.write_text('whole')
    try:
        caches.link_or_copy(source, dest)
        assert dest.read_bytes() == b'whole'
    finally:
        dest.unlink(missing_ok=True)


def test_remove_tree_takes_everything(tmp_path: Path) -> None:
    '''Closed folders, links to elsewhere, what is not there.'''
    kept = tmp_path / 'kept'
    kept.mkdir()
    tree = tmp_path / 'tree'
    (tree / 'closed/inner').mkdir(parents=True)
    (tree / 'closed/inner/file').write_text('x')
    (tree / 'closed/inner').chmod(0o000)
    (tree / 'closed').chmod(0o500)
    (tree / 'link').symlink_to(kept)
    code = (f'import sys; sys.path.insert(0, {str(SCRIPTS)!r});'
            'from pathlib import Path; from mkosi_build import cache;'
            f'cache.remove_tree(Path({str(tree)!r}))')
    subprocess.run([*NO_POWERS, sys.executable, '-c', code],
                   check=True)
    assert not tree.exists() and kept.is_dir()
    caches.remove_tree(tree)
    (tmp_path / 'link').symlink_to(kept)
    caches.remove_tree(tmp_path / 'link')
    assert kept.is_dir() and not (tmp_path / 'link').is_symlink()


# Locks and scratch folders

def test_lock_waits(cache: Cache) -> None:
    '''The second waits, says so once, and goes on after the first.'''
    order: List[str] = []

    def second() -> None:
        with cache.lock('x', lambda: order.append('waiting')):
            order.append('second')

    thread = threading.Thread(target=second)
    with cache.lock('x'):
        thread.start()
        while not order:
            time.sleep(0.01)
        order.append('first')
    thread.join()
    assert order == ['waiting', 'first', 'second']


def test_scratch_is_empty_and_goes(cache: Cache) -> None:
    '''What a dead process left is not seen; errors leave nothing.'''
    left = cache.root / 'work/x/left'
    left.mkdir(parents=True)
    with pytest.raises(ZeroDivisionError):
        with cache.lock('x'), cache.scratch('x') as work:
            assert not list(work.iterdir())
            (work / 'file').write_text('')
            raise ZeroDivisionError
    assert not list((cache.root / 'work').iterdir())


def test_stale_scratch_is_cleared(cache: Cache) -> None:
    '''All that nobody holds the lock of, and no other.'''
    cache.clear_stale()
    for name in ('dead', 'living'):
        (cache.root / 'work' / name / 'sub').mkdir(parents=True)
    # A lock is per open file: ours counts as another's
    with cache.lock('living'):
        cache.clear_stale()
        assert os.listdir(cache.root / 'work') == ['living']
    cache.clear_stale()
    assert not os.listdir(cache.root / 'work')


# Commands

def test_run_is_plain() -> None:
    '''Output is caught, in one locale; a failure is no exception.'''
    result = command.run(['sh', '-c', 'echo $LC_ALL $X; cat; exit 3'],
                         {'X': 'é'})
    assert (result.returncode, result.stdout) == (3, 'C.UTF-8 é\n')


def test_run_reads_utf8_in_any_locale() -> None:
    '''What a package says of itself does not depend on the caller's.'''
    code = (f'import sys; sys.path.insert(0, {str(SCRIPTS)!r});'
            'from mkosi_build import command;'
            "print(ascii(command.run(['printf', r'Zo\\303\\253\\n']).stdout))")
    result = subprocess.run(
        [sys.executable, '-X', 'utf8=0', '-c', code], check=True,
        env={'PATH': os.environ['PATH'], 'LC_ALL': 'C',
             'PYTHONCOERCECLOCALE': '0'},
        stdout=subprocess.PIPE, encoding='ascii')
    assert result.stdout == "'Zo\\xeb\\n'\n"


def test_missing_programs_are_all_named(
        monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    '''With the one line that installs them.'''
    monkeypatch.setenv('PATH', str(tmp_path))
    with pytest.raises(HostError) as caught:
        command.check_programs({'unshare': 'util-linux', 'dpkg-deb': 'dpkg',
                                'setpriv': 'util-linux'})
    assert 'unshare, dpkg-deb, setpriv' in caught.value.message
    assert caught.value.next_step == 'apt-get install dpkg util-linux'
    with pytest.raises(HostError, match='program not found: true') as caught:
        command.run(['true'])
    assert caught.value.next_step


@pytest.fixture(name='isolated')
def fixture_isolated(tmp_path: Path) -> Iterator[Callable[[str], str]]:
    '''Runs a shell script as mkosi is run.'''
    def run(script: str) -> str:
        log = tmp_path / 'log'
        code = command.run_isolated(['sh', '-c', script], log, False,
                                    {'FURTHER': 'x'})
        return log.read_text() + f'exit code {code}'
    before = os.umask(0o077)
    yield run
    os.umask(before)


def test_isolated_sees_nothing_of_the_caller(
        isolated: Callable[[str], str],
        monkeypatch: pytest.MonkeyPatch) -> None:
    '''Neither environment, umask, folder, user nor processes.'''
    monkeypatch.setenv('TZ', 'Asia/Tokyo')
    monkeypatch.setenv('CANARY', '1')
    monkeypatch.chdir('/usr')
    said = isolated('env; umask; pwd; id -u; id -g; echo pid $$; exit 7')
    assert 'CANARY' not in said and '/usr\n' not in said
    env = dict(line.split('=', 1) for line in said.splitlines()
               if '=' in line)
    for name in ('PWD', 'SHLVL', '_', 'OLDPWD'):
        env.pop(name, None)
    assert env == {**command.ENVIRONMENT, 'FURTHER': 'x'}
    assert said.endswith('0022\n/\n1000\n1000\npid 1\nexit code 7')


def test_isolated_has_no_network(isolated: Callable[[str], str]) -> None:
    '''No interface but a loopback that is down.'''
    said = isolated('sed 1,2d /proc/net/dev; cat /proc/net/route;'
                    f'{sys.executable} -c "import socket;'
                    "socket.create_connection(('127.0.0.1', 9))\"")
    interfaces = [line.split(':')[0].strip() for line in said.splitlines()
                  if line.count(':') == 1 and ' 0 ' in line]
    assert interfaces == ['lo']
    assert 'Network is unreachable' in said


@pytest.mark.parametrize('number', [signal.SIGKILL, signal.SIGTERM,
                                    signal.SIGINT])
def test_isolated_ends_with_the_builder(number: int, tmp_path: Path) -> None:
    '''With all that it started, even what left its session.'''
    code = (f'import sys; sys.path.insert(0, {str(SCRIPTS)!r})\n'
            'import signal\n'
            'from pathlib import Path\n'
            'from mkosi_build import command\n'
            'signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))\n'
            "command.run_isolated(['sh', '-c', 'trap \"\" INT TERM HUP;"
            "setsid sleep 99 & echo started; sleep 99'],"
            f"Path({str(tmp_path / 'log')!r}), False,"
            f"{{'MARK': {str(tmp_path)!r}}})")
    with subprocess.Popen([sys.executable, '-c', code],
                          stderr=subprocess.DEVNULL) as process:
        while 'started' not in ((tmp_path / 'log').read_text()
                                if (tmp_path / 'log').exists() else ''):
            assert process.poll() is None
            time.sleep(0.02)
        assert len(processes(tmp_path)) >= 3
        process.send_signal(number)
        process.wait(timeout=10)
    deadline = time.monotonic() + 1
    while processes(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not processes(tmp_path)


def test_why_failed_is_short_and_telling(tmp_path: Path) -> None:
    '''At most ten lines; those that tell, or the last ones.'''
    log = tmp_path / 'log'
    log.write_text(''.join(f'line {i}\n' for i in range(500)))
    assert command.why_failed(log).splitlines() == [
        f'    line {i}' for i in range(490, 500)]
    log.write_text('Get:1 a\nE: Unable to locate package x\n'
                   + 'Get:2 b\n' * 100)
    assert command.why_failed(log) == '    E: Unable to locate package x'
    log.write_text('error\n' * 100)
    assert len(command.why_failed(log).splitlines()) == 10
    log.write_text('')
    assert command.why_failed(log) == ''
    log.write_text('E: begin ' + 'x' * 2000 + ' returned 100\n')
    said = command.why_failed(log)
    assert said.startswith('    E: begin x') and len(said) < 200
    assert said.endswith('x returned 100')


# Telling

class Terminal(io.StringIO):
    '''A stream that says it is a terminal.'''

    def isatty(self) -> bool:
        return True


def tell(report: Report) -> None:
    '''A stage that counts, an event, and one that fails.'''
    with report.stage('fetching'):
        report.count('fetching', 1, 2, 1000000)
        report.count('fetching', 2, 2, 2000000)
    report.event('log', 'log: /a/log', path='/a/log')
    with pytest.raises(ZeroDivisionError), report.stage('building'):
        raise ZeroDivisionError


def test_report_in_a_file() -> None:
    '''One line a stage, no counters.'''
    stream = io.StringIO()
    tell(Report(stream=stream))
    assert stream.getvalue().splitlines() == [
        '    0.0s fetching', 'log: /a/log', '    0.0s building: failed']


def test_report_on_a_terminal() -> None:
    '''Counters move, and are gone afterwards.'''
    stream = Terminal()
    tell(Report(stream=stream))
    said = stream.getvalue()
    assert 'fetching: 2/2, 2.0 MB' in said
    for line in said.split('\n'):
        assert '  ... ' not in line.rpartition('\r\033[K')[2]


def test_report_as_json() -> None:
    '''A line an event, with the same fields for each.'''
    stream = io.StringIO()
    tell(Report(True, stream))
    events: List[Dict[str, Any]] = [json.loads(line) for line in
                                    stream.getvalue().splitlines()]
    assert [(e['event'], e['text']) for e in events] == [
        ('start', 'fetching'), ('count', 'fetching'), ('count', 'fetching'),
        ('done', 'fetching'), ('log', 'log: /a/log'), ('start', 'building'),
        ('failed', 'building')]
    assert all(isinstance(e['seconds'], float) for e in events)
    assert (events[2]['done'], events[2]['total'], events[2]['bytes']) == (
        2, 2, 2000000)
    assert events[3]['took'] >= 0 and events[6]['took'] >= 0


# The repository

def make_repository(cache: Cache, folder: Path, files: Path,
                    packages: List[Package]) -> Dict[str, bytes]:
    '''Make a repository of @packages. Returns its files by name.'''
    store = Store(cache, Report(stream=io.StringIO()))
    store.folder.mkdir(parents=True, exist_ok=True)
    for package in packages:
        store.path(package).write_bytes(
            (files / package.location).read_bytes())
    lock = Lock('d' * 64, 'debian', 'trixie', 'x86_64', EPOCH,
                tuple(packages))
    folder.mkdir()
    # Debian's takes no tool of the tree
    repository.make(lock, store, folder, folder)
    return {str(path.relative_to(folder)): path.read_bytes()
            for path in sorted(folder.rglob('*')) if path.is_file()}


def test_repository_is_a_function_of_the_lock(cache: Cache,
                                              tmp_path: Path) -> None:
    '''The order of packages and the day do not matter.'''
    packages = [make_package(tmp_path / 'debs', name)
                for name in ('mini-a', 'mini-b')]
    first = make_repository(cache, tmp_path / '1', tmp_path / 'debs',
                            packages)
    second = make_repository(cache, tmp_path / '2', tmp_path / 'debs',
                             packages[::-1])
    assert first == second
    index = 'dists/trixie/main/binary-amd64/Packages'
    assert sorted(first) == ['dists/trixie/Release', index,
                             'pool/mini-a_1_amd64.deb',
                             'pool/mini-b_1_amd64.deb']
    text = first[index].decode()
    assert 'Maintainer: Zoë Nobody' in text
    for package in packages:
        assert (f'Filename: pool/{package.file_name}\nSize: {package.size}\n'
                f'SHA256: {package.sha256}\n') in text


def test_repository_refuses_what_is_no_package(cache: Cache,
                                               tmp_path: Path) -> None:
    '''A file whose hash is right and that is no package all the same.'''
    (tmp_path / 'debs').mkdir()
    (tmp_path / 'debs/x_1_amd64.deb').write_text('hello\n')
    text = (f'{caches.sha256_file(tmp_path / "debs/x_1_amd64.deb")} 6 x 1 '
            'amd64 x=1 x_1_amd64.deb')
    lock = locks.parse(locks.render(Lock(
        'd' * 64, 'debian', 'trixie', 'x86_64', EPOCH, ())) + text, 'a.lock')
    with pytest.raises(InputError, match='x_1_amd64.deb: not a Debian'):
        make_repository(cache, tmp_path / '1', tmp_path / 'debs',
                        list(lock.packages))
