# SPDX-License-Identifier: GPL-2.0-or-later
'''
How images come from stores into the asset cache.

First MkosiAsset in QEMU's framework, then what is under it, and then what
happens when processes die or share the cache with others.
'''

import hashlib
import importlib
import json
import logging
import os
from pathlib import Path
import random
import shutil
import signal
import subprocess
import sys
import time
from types import ModuleType
from typing import Any, Dict, Iterator, List, Sequence

import pytest

from faulty_server import (
    NAMES, YEAR, FaultyServer, misbehave, serving, throttled)
from fixtures_asset import (
    FILES, HASHES, Bench, failed, passed, skipped)
from fixtures_builder import Answer, ranged, short, status, whole
from mkosi_build import transfer
from mkosi_build.cache import sha256_file
from series.apply import ROOT

pytest_plugins = ['fixtures_asset', 'fixtures_builder']

KERNEL = HASHES['kernel']
BODY = FILES['kernel']
LOG = logging.getLogger('test')


@pytest.fixture(name='server')
def fixture_server() -> Iterator[FaultyServer]:
    '''A server, without anything on it.'''
    with serving() as server:
        yield server


def serve(server: FaultyServer, folder: str = '') -> str:
    '''Have the server offer the image; the store's URL.'''
    for kind, data in FILES.items():
        server.answers[f'{folder}/{HASHES[kind]}'] = [ranged(data)]
    return server.url + folder


def fill_folder(folder: Path) -> Path:
    '''A store in a folder, as --publish makes it.'''
    folder.mkdir()
    for kind, data in FILES.items():
        (folder / HASHES[kind]).write_bytes(data)
        (folder / HASHES[kind]).chmod(0o444)
    return folder


def visible(cache: Path) -> List[str]:
    '''The files in the cache that have a final name; they are whole.'''
    names = [path.name for path in cache.iterdir() if len(path.name) == 64]
    for name in names:
        assert sha256_file(cache / name) == name
    return names


def hidden(cache: Path) -> List[Path]:
    '''What else is there, stamps apart.'''
    return [path for path in cache.iterdir() if len(path.name) != 64
            and path.suffix not in ('.stamp', '.verified')]


def clear(cache: Path) -> None:
    '''Nothing half-made is in the way of other checks.'''
    for path in hidden(cache):
        path.unlink()


# -- MkosiAsset: which stores -----------------------------------------------

def test_folder(bench: Bench, tmp_path: Path) -> None:
    '''A folder is a store; its files stay as they are.'''
    store = fill_folder(tmp_path / 'images')
    bench.stores(str(store))
    output = bench.test()
    assert passed(output), output
    for kind, data in FILES.items():
        assert (store / HASHES[kind]).stat().st_mode & 0o777 == 0o444
        assert bench.path(kind).samefile(store / HASHES[kind])
        assert bench.path(kind).read_bytes() == data


def test_folder_that_is_written_to(bench: Bench, tmp_path: Path) -> None:
    '''What may change is copied.'''
    store = fill_folder(tmp_path / 'images')
    for kind in FILES:
        (store / HASHES[kind]).chmod(0o644)
    output = bench.test(QEMU_TEST_MKOSI_STORES=str(store))
    assert passed(output), output
    for kind in FILES:
        assert not bench.path(kind).samefile(store / HASHES[kind])
        assert (store / HASHES[kind]).stat().st_mode & 0o777 == 0o644
        assert bench.path(kind).stat().st_mode & 0o777 == 0o440


def test_stores_of_environment(bench: Bench, server: FaultyServer,
                               tmp_path: Path) -> None:
    '''In place of the registry's, and in their order.'''
    bench.stores(serve(server, '/registry'))
    good = serve(server, '/good')
    output = bench.test(
        QEMU_TEST_MKOSI_STORES=f'{tmp_path}/none  {good}/ {server.url}/x')
    assert passed(output), output
    assert {path.split('/')[1] for path in server.asked} == {'good'}
    for kind in FILES:
        bench.path(kind).unlink()
    output = bench.test(QEMU_TEST_MKOSI_STORES='')
    assert passed(output), output
    assert server.asked[-1].startswith('/registry/')


@pytest.mark.parametrize('stores', [
    'ftp://h/x', 'file:///srv', 'srv/images', './x', '/', 'http:///x',
    '/srv http://u:s3cret@h/x?s3cret', 'https://h#s3cret', 'C:\\x'])
def test_odd_stores(bench: Bench, stores: str) -> None:
    '''What is no store is an error that has it, but no password.'''
    output = failed(bench.test(QEMU_TEST_MKOSI_STORES=stores))
    assert ('QEMU_TEST_MKOSI_STORES: expected http or https URLs or absolute '
            'folders, separated by spaces, found ') in output
    assert 's3cret' not in output


def test_no_download(bench: Bench, tmp_path: Path) -> None:
    '''QEMU_TEST_NO_DOWNLOAD is for all stores.'''
    store = fill_folder(tmp_path / 'images')
    assert 'kernel is not in the cache' in skipped(bench.test(
        QEMU_TEST_MKOSI_STORES=str(store), QEMU_TEST_NO_DOWNLOAD='1'))


def test_refresh(bench: Bench, server: FaultyServer) -> None:
    '''
    QEMU_TEST_REFRESH_CACHE finds what nothing else does, bits that rotted
    without a trace, and the store mends it.
    '''
    serve(server)
    bench.fill()
    path = bench.path('disk')
    # As if it had been found good before
    path.write_bytes(bytes(len(FILES['disk'])))
    looks = path.stat()
    path.with_suffix('.verified').write_text(json.dumps({path.name: [
        looks.st_size, looks.st_mtime_ns, looks.st_ctime_ns, looks.st_ino,
        looks.st_dev]}))
    output = bench.test(QEMU_TEST_MKOSI_STORES=server.url)
    assert passed(output) and not server.asked
    output = bench.test(QEMU_TEST_MKOSI_STORES=server.url,
                        QEMU_TEST_REFRESH_CACHE='1')
    assert passed(output), output
    assert server.asked == [f'/{HASHES["disk"]}']
    assert path.read_bytes() == FILES['disk']


def test_override_is_in_no_store(bench: Bench, server: FaultyServer) -> None:
    '''What was built here and is nobody else's is not asked for.'''
    override = str(bench.override())
    assert 'kernel is not in the cache' in skipped(bench.test(
        QEMU_TEST_MKOSI_OVERRIDE=override,
        QEMU_TEST_MKOSI_STORES=serve(server)))
    assert not server.asked


# -- MkosiAsset: what fails -------------------------------------------------

def test_all_stores_are_named(bench: Bench, server: FaultyServer,
                              tmp_path: Path) -> None:
    '''With what each said, in order, without credentials; and what to do.'''
    server.answers[f'/a/{KERNEL}'] = [status(403)]
    stores = (f'http://me:s3cret@{server.host}/a {server.url}/b '
              f'{tmp_path}/none {tmp_path}')
    output = failed(bench.test(QEMU_TEST_MKOSI_STORES=stores))
    assert (
        'mkosi:tiny/x86_64/disk.qcow2: kernel: no store has it: '
        f'{server.url}/a/{KERNEL}: HTTP error 403 (Forbidden); '
        f'{server.url}/b/{KERNEL}: HTTP error 404 (Not Found); '
        f'{tmp_path}/none/{KERNEL}: no such folder; '
        f'{tmp_path}/{KERNEL}: no such file; run scripts/mkosi-build.py '
        'x86_64 tiny, or set QEMU_TEST_BUILD_IMAGES=1 to have it built'
        ) in output
    assert 's3cret' not in output
    bench.builder()
    output = bench.test(QEMU_TEST_MKOSI_STORES=stores,
                        QEMU_TEST_BUILD_IMAGES='1')
    assert passed(output), output


FAULTS = '''
from pathlib import Path
from qemu_test import mkosi_fetch
from qemu_test.asset import AssetError
class Test(QemuBaseTest):
    ASSET_IMAGE = MkosiAsset('tiny', part='kernel')
image = Test.ASSET_IMAGE
transfer = mkosi_fetch.import_transfer()
transfer.LIMITS = transfer.Limits(silence=1, slowest=1000, window=0.5)
mkosi_fetch.PAUSE = 0
result = {}
for name in json.loads(os.environ['NAMES']):
    bad = os.environ['BAD'] + '/' + name.replace(' ', '-')
    os.environ['QEMU_TEST_MKOSI_STORES'] = bad
    try:
        image.fetch()
        error = None
    except AssetError as e:
        error = [str(e), e.transient]
    there = image.cache_file.exists()
    os.environ['QEMU_TEST_MKOSI_STORES'] = bad + ' ' + os.environ['GOOD']
    image.fetch()
    result[name] = [error, there, image.valid()]
    image.cache_file.unlink()
print(json.dumps(result))
'''

# The faults that no waiting mends; for others, tests are not to blame
LASTING = {
    'short', 'long', 'unsized, long', 'other bytes', 'other bytes later',
    'nothing', '404', '410', '416', '416 in the middle', '204', '300',
    'redirect loop', 'endless redirects', 'redirect to a file',
    'redirect to FTP', 'redirect to nowhere', 'gzip', 'gzip, it says',
    'wrong range'}


@pytest.mark.slow
def test_every_fault(bench: Bench, server: FaultyServer) -> None:
    '''An AssetError, transient as with Asset; the next store helps.'''
    good = serve(server, '/good')
    for name in NAMES:
        misbehave(server, name, f'/{name.replace(" ", "-")}/{KERNEL}', BODY,
                  f'{server.url}/elsewhere')
    server.answers['/elsewhere/no?signature=s3cret'] = [status(403)]
    result: Dict[str, Any] = bench.script(
        FAULTS, NAMES=json.dumps(NAMES), GOOD=good, BAD=server.url)
    assert list(result) == list(NAMES)
    for name, (error, there, valid) in result.items():
        assert error is not None and not there and valid, name
        assert 'kernel: no store has it: http://127' in error[0], name
        assert 's3cret' not in error[0]
        assert error[1] == (name not in LASTING), name
    assert not hidden(bench.cache)


def test_precache_passes_over_trouble(bench: Bench,
                                      server: FaultyServer) -> None:
    '''A dead store fails no precaching, one without the image does.'''
    result = bench.precache(QEMU_TEST_MKOSI_STORES='http://127.0.0.1:1')
    assert result.returncode == 0, result.stdout
    assert 'Connection refused' in result.stdout
    result = bench.precache(QEMU_TEST_MKOSI_STORES=server.url)
    assert result.returncode != 0
    assert 'HTTP error 404' in result.stdout


def test_proxy(bench: Bench, server: FaultyServer) -> None:
    '''The usual variables hold.'''
    for kind, data in FILES.items():
        server.answers[f'http://store.invalid/{HASHES[kind]}'] = [whole(data)]
    output = bench.test(QEMU_TEST_MKOSI_STORES='http://store.invalid',
                        http_proxy=server.url)
    assert passed(output), output


def test_ipv6_only(bench: Bench) -> None:
    '''A store that has no other address.'''
    try:
        with serving(ipv6=True) as server:
            bench.stores(serve(server))
            output = bench.test()
            assert passed(output), output
    except OSError as e:
        pytest.skip(f'no IPv6 here: {e}')


# -- What is under it -------------------------------------------------------

def forget() -> None:
    '''Let what is imported next be a module of its own.'''
    for name in list(sys.modules):
        if name.partition('.')[0] == 'qemu_test':
            del sys.modules[name]


@pytest.fixture(name='fetching')
def fixture_fetching(
        monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    '''The module that fetches, without QEMU's framework around it.'''
    forget()
    package = ModuleType('qemu_test')
    package.__path__ = [str(ROOT / 'tests/functional/qemu_test')]
    sys.modules['qemu_test'] = package
    module = importlib.import_module('qemu_test.mkosi_fetch')
    monkeypatch.setattr(transfer, 'LIMITS', transfer.Limits(silence=5))
    monkeypatch.setattr(module, 'TRIES', 1)
    monkeypatch.setattr(module, 'PAUSE', 0)
    monkeypatch.setattr(module, 'LOCK_PATIENCE', 1)
    monkeypatch.setattr(module, 'POLL', 0.02)
    yield module
    forget()


@pytest.fixture(name='cache')
def fixture_cache(tmp_path: Path) -> Path:
    '''An empty cache.'''
    cache = tmp_path / 'download'
    cache.mkdir()
    return cache


def get(fetching: Any, cache: Path, *stores: str) -> None:
    '''Fetch the kernel.'''
    fetching.fetch(cache / KERNEL, len(BODY), stores, LOG)


def part_of(pid: int, host: str = '', sha256: str = KERNEL) -> str:
    '''The name that a process gives to what it is about to fetch.'''
    here = os.uname().nodename
    return f'.{sha256}.{host or here}.{pid}.01234567.part'


def dead_process() -> int:
    '''The id of a process that is no more.'''
    with subprocess.Popen(['true']) as process:
        pass
    return process.pid


def test_goes_on_after_a_broken_run(fetching: Any, cache: Path,
                                    server: FaultyServer) -> None:
    '''What a failed fetch left is where the next one starts.'''
    server.answers[f'/{KERNEL}'] = [short(BODY, 4000), status(500)]
    for _ in range(2):
        with pytest.raises(fetching.NotFetched) as caught:
            get(fetching, cache, server.url)
        assert caught.value.transient
        assert not visible(cache)
        assert [path.stat().st_size for path in hidden(cache)] == [4000]
    server.answers[f'/{KERNEL}'] = [ranged(BODY)]
    get(fetching, cache, server.url)
    assert server.headers[-1]['Range'] == 'bytes=4000-'
    assert visible(cache) == [KERNEL] and not hidden(cache)


@pytest.mark.parametrize('left', [
    b'', BODY[:1], BODY[:-1], BODY, BODY + b'x', b'x' * 100,
    b'x' * len(BODY)])
def test_takes_over_from_the_dead(left: bytes, fetching: Any, cache: Path,
                                  server: FaultyServer) -> None:
    '''Good or bad, the result is whole; the file is another one.'''
    server.answers[f'/{KERNEL}'] = [ranged(BODY)]
    dead = cache / part_of(dead_process())
    dead.write_bytes(left)
    (cache / part_of(0, 'other-host')).write_bytes(left[:50])
    with open(dead, 'ab') as zombie:
        get(fetching, cache, server.url)
        zombie.write(b'from the grave')
    assert visible(cache) == [KERNEL] and not hidden(cache)
    if left == BODY:
        assert not server.asked


def test_leaves_the_living_alone(fetching: Any, cache: Path,
                                 server: FaultyServer) -> None:
    '''Those of other processes, hosts and files, for a day.'''
    server.answers[f'/{KERNEL}'] = [ranged(BODY)]
    day = 24 * 60 * 60
    keep = [part_of(os.getpid()), part_of(1), part_of(99999, 'other'),
            part_of(dead_process(), sha256='0' * 64), f'.{"0" * 64}.lock']
    gone = [part_of(4, 'old'), part_of(dead_process(), sha256='1' * 64),
            f'.{"1" * 64}.lock', f'{"1" * 64}.stamp.abc_123',
            # From when a clock was wrong
            part_of(5, 'future')]
    others = ['README', f'.{"1" * 64}.99.tmp', 'x.part', f'{"2" * 64}.stamp']
    for name in keep + gone + others:
        (cache / name).write_bytes(b'x')
    for name in gone + others:
        age = -YEAR if 'future' in name else day + 60
        os.utime(cache / name, times=(time.time() - age,) * 2)
    get(fetching, cache, server.url)
    assert 'Range' not in server.headers[0]
    assert sorted(path.name for path in cache.iterdir()) == sorted(
        keep + others + [KERNEL])


def test_wrong_clock(fetching: Any, cache: Path, server: FaultyServer,
                     monkeypatch: pytest.MonkeyPatch) -> None:
    '''It is the file system's time that counts, not ours.'''
    server.answers[f'/{KERNEL}'] = [ranged(BODY)]
    (cache / part_of(7, 'other')).write_bytes(b'x')
    real = time.time()
    for skew in (-YEAR, YEAR):
        monkeypatch.setattr(time, 'time', lambda skew=skew: real + skew)
        get(fetching, cache, server.url)
        (cache / KERNEL).unlink()
    assert [path.name for path in hidden(cache)] == [part_of(7, 'other')]


def test_damaged_is_replaced(fetching: Any, cache: Path,
                             server: FaultyServer) -> None:
    '''And so is what is not even a file, as far as may be.'''
    server.answers[f'/{KERNEL}'] = [ranged(BODY)]
    (cache / KERNEL).write_bytes(bytes(len(BODY)))
    get(fetching, cache, server.url)
    assert visible(cache) == [KERNEL]
    (cache / KERNEL).unlink()
    (cache / KERNEL).mkdir()
    with pytest.raises(IsADirectoryError):
        get(fetching, cache, server.url)
    assert not hidden(cache)


def test_interrupted(fetching: Any, cache: Path,
                     server: FaultyServer) -> None:
    '''Ctrl-C leaves what there is to the next run.'''
    server.answers[f'/{KERNEL}'] = [throttled(BODY, 5000)]
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    with pytest.raises(KeyboardInterrupt):
        get(fetching, cache, server.url)
    assert len(hidden(cache)) == 1
    server.answers[f'/{KERNEL}'] = [ranged(BODY)]
    get(fetching, cache, server.url)
    assert 'Range' in server.headers[-1]
    assert not hidden(cache)


# -- Locks that do not work -------------------------------------------------

def test_without_locks(fetching: Any, cache: Path, server: FaultyServer,
                       monkeypatch: pytest.MonkeyPatch) -> None:
    '''A file system that has none, as some network ones.'''
    server.answers[f'/{KERNEL}'] = [ranged(BODY)]
    # Nothing here has no locks, so for once it is pretended
    for name in ('ENOLCK', 'ENOTSUP', 'EBADF', 'EINVAL', 'ENOSYS'):
        number = getattr(fetching.errno, name)

        def refuse(*_: object, number: int = number) -> None:
            raise OSError(number, 'no locks')
        monkeypatch.setattr(fetching.fcntl, 'flock', refuse)
        get(fetching, cache, server.url)
        assert visible(cache) == [KERNEL] and not hidden(cache)
        (cache / KERNEL).unlink()


HOLDER = '''
import fcntl, sys, time
with open(sys.argv[1], 'ab') as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    print('held', flush=True)
    time.sleep(600)
'''


def test_lock_of_a_stuck_process(fetching: Any, cache: Path,
                                 server: FaultyServer) -> None:
    '''Not waited for any longer than for a dead server.'''
    server.answers[f'/{KERNEL}'] = [ranged(BODY)]
    lock = cache / f'.{KERNEL}.lock'
    with subprocess.Popen([sys.executable, '-c', HOLDER, lock],
                          stdout=subprocess.PIPE) as process:
        assert process.stdout and process.stdout.readline()
        get(fetching, cache, server.url)
        assert visible(cache) == [KERNEL] and lock.exists()
        process.kill()
    (cache / KERNEL).unlink()
    # What a dead one leaves is no obstacle
    start = time.monotonic()
    get(fetching, cache, server.url)
    assert not lock.exists()
    assert time.monotonic() - start < 1


def test_lock_of_another_user(fetching: Any, cache: Path,
                              server: FaultyServer) -> None:
    '''A lock file that cannot even be opened is not needed.'''
    server.answers[f'/{KERNEL}'] = [ranged(BODY)]
    (cache / f'.{KERNEL}.lock').mkdir()
    get(fetching, cache, server.url)
    assert visible(cache) == [KERNEL]


def test_taken_away(fetching: Any, cache: Path, server: FaultyServer,
                    monkeypatch: pytest.MonkeyPatch) -> None:
    '''
    A process in another container, where our id is nobody's, takes our
    file for a dead process's. Then we begin anew.
    '''
    times = [0]

    def take(answer: Answer) -> Answer:
        def answers(handler: Any) -> None:
            times[0] += 1
            if times[0] < 3:
                for path in cache.glob('*.part'):
                    path.unlink()
            answer(handler)
        return answers
    server.answers[f'/{KERNEL}'] = [take(ranged(BODY))]
    monkeypatch.setattr(fetching, 'TRIES', 2)
    (cache / part_of(dead_process())).write_bytes(BODY[:1000])
    get(fetching, cache, server.url)
    assert visible(cache) == [KERNEL] and not hidden(cache)


# -- Many processes ---------------------------------------------------------

CHILD = '''
import logging, os, random, signal, sys, time
sys.path[:0] = [os.environ['PACKAGE'], 'scripts']
import types
package = types.ModuleType('qemu_test')
package.__path__ = [os.environ['PACKAGE']]
sys.modules['qemu_test'] = package
from pathlib import Path
from qemu_test import mkosi_fetch
from mkosi_build import transfer
cache = Path(os.environ['CACHE'])
log = logging.getLogger('test')
objects = OBJECTS
stores = os.environ['STORES'].split()
def fetch():
    for name, size in objects:
        mkosi_fetch.fetch(cache / name, size, stores, log)
'''


def child(script: str, objects: Dict[str, bytes], cache: Path,
          *stores: str, prefix: Sequence[str] = ()
          ) -> 'subprocess.Popen[str]':
    '''Run a script in another process, below @prefix.'''
    sizes = [(name, len(data)) for name, data in objects.items()]
    return subprocess.Popen(
        [*prefix, sys.executable, '-c',
         CHILD.replace('OBJECTS', repr(sizes)) + script],
        env={'PACKAGE': str(ROOT / 'tests/functional/qemu_test'),
             'CACHE': str(cache), 'STORES': ' '.join(stores),
             'no_proxy': '*', 'PATH': os.environ['PATH']}, cwd=ROOT,
        stdout=subprocess.PIPE, encoding='utf-8')


def make_objects(server: FaultyServer, count: int, size: int,
                 rate: int) -> Dict[str, bytes]:
    '''Random files by SHA-256, on the server.'''
    objects = {}
    for i in range(count):
        data = random.Random(i).randbytes(size)
        name = hashlib.sha256(data).hexdigest()
        objects[name] = data
        server.answers[f'/{name}'] = [throttled(data, rate)]
    return objects


@pytest.mark.slow
@pytest.mark.parametrize('locks', [True, False])
def test_at_once(locks: bool, cache: Path, server: FaultyServer) -> None:
    '''Six processes: one fetches where locks work; none does harm.'''
    objects = make_objects(server, 2, 300_000, 1_000_000)
    script = 'fetch()' if locks else '''
def refuse(*_):
    raise OSError(mkosi_fetch.errno.ENOLCK, 'no locks')
mkosi_fetch.fcntl.flock = refuse
fetch()
'''
    running = [child(script, objects, cache, server.url) for _ in range(6)]
    for process in running:
        process.communicate(timeout=60)
        assert process.returncode == 0
    assert sorted(visible(cache)) == sorted(objects)
    assert not hidden(cache)
    if locks:
        assert sorted(server.asked) == sorted(f'/{name}' for name in objects)


def test_stopped_process(fetching: Any, cache: Path,
                         server: FaultyServer) -> None:
    '''One that sleeps in the middle holds nobody up, and does no harm.'''
    objects = make_objects(server, 1, 500_000, 500_000)
    name = next(iter(objects))
    with child('fetch()', objects, cache, server.url) as process:
        while not any(path.stat().st_size > 50_000
                      for path in cache.glob('*.part')):
            time.sleep(0.01)
        process.send_signal(signal.SIGSTOP)
        try:
            fetching.fetch(cache / name, 500_000, [server.url], LOG)
        finally:
            process.send_signal(signal.SIGCONT)
        process.communicate(timeout=60)
        assert process.returncode == 0
    assert visible(cache) == [name] and not hidden(cache)


KILLER = '''
chance = random.Random(4)
killed = whole = 0
for _ in range(TIMES):
    pid = os.fork()
    if pid == 0:
        fetch()
        os._exit(0)
    time.sleep(chance.uniform(0, 0.15))
    os.kill(pid, signal.SIGKILL)
    killed += os.waitpid(pid, 0)[1] == signal.SIGKILL
    seen = [p for p in cache.iterdir() if len(p.name) == 64]
    for path in seen:
        assert sha256_file(path) == path.name, path
    if len(seen) == len(objects):
        whole += 1
        for path in seen:
            path.unlink()
print(killed, whole)
'''


@pytest.mark.slow
@pytest.mark.parametrize('folder, times', [(False, 200), (True, 100)])
def test_killed(folder: bool, times: int, cache: Path, server: FaultyServer,
                tmp_path: Path) -> None:
    '''
    Killed at any point, often: what has a name is whole, what was there
    is gone on from, and a plain run succeeds.
    '''
    size = 4_000_000 if folder else 400_000
    objects = make_objects(server, 3, size, 10_000_000)
    stores = [server.url]
    if folder:
        (tmp_path / 'store').mkdir()
        for name, data in objects.items():
            (tmp_path / 'store' / name).write_bytes(data)
        stores = [str(tmp_path / 'store')]
    script = ('from mkosi_build.cache import sha256_file\n'
              + KILLER.replace('TIMES', str(times)))
    with child(script, objects, cache, *stores) as process:
        output = process.communicate()[0]
        assert process.returncode == 0
    killed, complete = map(int, output.split())
    assert killed > times / 4 and complete
    if not folder:
        assert any('Range' in headers for headers in server.headers)
    with child('fetch()', objects, cache, *stores) as process:
        process.communicate()
        assert process.returncode == 0
    assert sorted(visible(cache)) == sorted(objects)
    assert all(path.suffix == '.lock' for path in hidden(cache))


# -- Full disks -------------------------------------------------------------

FULL = '''
import subprocess
from mkosi_build.cache import sha256_file
for options in OPTIONS:
    subprocess.run(['mount', '-t', 'tmpfs', '-o', options, 'none', cache],
                   check=True)
    try:
        fetch()
        error = 0
    except OSError as e:
        error = e.errno
    except mkosi_fetch.NotFetched as e:
        error = str(e)
    names = os.listdir(cache)
    assert not any(n.endswith('.part') for n in names), names
    for path in cache.iterdir():
        if len(path.name) == 64:
            assert sha256_file(path) == path.name
    print(options, error, len(names))
    subprocess.run(['umount', cache], check=True)
'''


@pytest.mark.parametrize('folder', [False, True])
def test_full_disk(folder: bool, cache: Path, server: FaultyServer,
                   tmp_path: Path) -> None:
    '''Full at every step: the space is given back, and what is wrong said.'''
    wrapper = ['unshare', '--map-root-user', '--mount']
    if not shutil.which('unshare') or subprocess.run(
            [*wrapper, 'mount', '-t', 'tmpfs', 'none', cache], check=False,
            stderr=subprocess.DEVNULL).returncode != 0:
        pytest.skip('may not mount a small file system')
    objects = make_objects(server, 3, 50_000, 10_000_000)
    store = server.url
    if folder:
        store = str(tmp_path / 'store')
        Path(store).mkdir()
        for name, data in objects.items():
            Path(store, name).write_bytes(data)
    options = ([f'size={size}k' for size in (4, 8, 32, 48, 52, 56, 100, 104,
                                             108, 150, 160, 400)]
               + [f'nr_inodes={count}' for count in (1, 2, 3, 4, 9)])
    script = FULL.replace('OPTIONS', repr(options))
    with child(script, objects, cache, store, prefix=wrapper) as process:
        output = process.communicate()[0]
        assert process.returncode == 0
    said = [line.split() for line in output.splitlines()]
    assert [line[0] for line in said] == options
    good = [line[0] for line in said if line[1] == '0']
    assert good == ['size=160k', 'size=400k', 'nr_inodes=9']
    assert {line[1] for line in said} == {'0', '28'}


def test_full_disk_of_the_framework(bench: Bench,
                                    server: FaultyServer) -> None:
    '''The limit of a file's size is as good: no space, and what to do.'''
    bench.stores(serve(server))
    output = failed(bench.test('sh', '-c', 'ulimit -f 10; exec "$@"', 'sh',
                               PYTHONDONTWRITEBYTECODE='1'))
    assert 'cannot write to the cache' in output
    assert 'File too large; mend that' in output
    assert set(visible(bench.cache)) < set(HASHES.values())
    assert not hidden(bench.cache)
    output = bench.test()
    assert passed(output), output
