# SPDX-License-Identifier: GPL-2.0-or-later
'''
--cache and --prune: what nothing refers to goes, all else stays, and who
works at that moment never misses a file.
'''

import io
import json
import os
from pathlib import Path
import subprocess
import sys
import threading
import time
from typing import Any, Dict, List, Optional

import pytest

from fixtures_upkeep import KINDS, Upkeep, body, lock_of, package, sha
from mkosi_build import care, cli, holdings, lock as locks
from mkosi_build.build import load_tool_locks
from mkosi_build.error import InputError, UsageError
from mkosi_build.report import Report

pytest_plugins = ('fixtures_upkeep',)

OLD = 'a' * 64
SCRIPTS = Path(care.__file__).parents[1]


def prune(upkeep: Upkeep, limit: Optional[int] = None) -> Dict[str, str]:
    '''Prune. Returns why each thing that did not go had to stay.'''
    stream = io.StringIO()
    care.prune(upkeep.registry, upkeep.cache, Report(True, stream), limit)
    events = [json.loads(line) for line in stream.getvalue().splitlines()]
    return {event['name']: event['why'] for event in events
            if event['event'] == 'kept'}


def held(upkeep: Upkeep) -> Dict[str, Dict[str, Any]]:
    '''What --cache tells, by name.'''
    stream = io.StringIO()
    care.show(upkeep.registry, upkeep.cache, Report(True, stream))
    events = [json.loads(line) for line in stream.getvalue().splitlines()]
    return {f'{event["area"]} {event["name"]}': event for event in events
            if event['event'] == 'held'}


def files(upkeep: Upkeep) -> List[Path]:
    '''All files of both caches but for locks.'''
    return sorted(
        Path(folder, name)
        for base in (upkeep.cache.root, upkeep.cache.assets)
        for folder, _, names in os.walk(base) for name in names
        if Path(folder).name != 'locks')


def write(path: Path, text: str = 'x' * 100) -> Path:
    '''A file, and its folder.'''
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def fill_current(upkeep: Upkeep) -> None:
    '''What the tree refers to.'''
    upkeep.add_build('one')
    for one in (package('one'), package('common'), package('hammer')):
        upkeep.add_package(one)
    tools = locks.load(next((upkeep.folder / 'tools').glob('*.lock')))
    write(upkeep.cache.tools / tools.digest / 'usr/bin/mkosi')
    write(upkeep.cache.root / 'log/one-x86_64.log')
    write(upkeep.cache.root / 'log/resolve-one-x86_64.log')
    identity = upkeep.registry.image('one').target('x86_64').identity
    newer = upkeep.cache.root / 'newer' / str(identity)
    write(newer / 'image.lock', locks.render(lock_of(
        'b' * 64, [package('one', '2')])))
    write(newer / 'tools.lock', locks.render(lock_of(
        'b' * 64, [package('hammer', '2')])))
    upkeep.add_package(package('one', '2'))
    upkeep.add_package(package('hammer', '2'))
    # The sources of what is locked
    write(upkeep.cache.root / 'sources'
          / f'{upkeep.lock("one").digest}.list',
          f'{package("source").sha256} 100 source 1 source.dsc\n')
    upkeep.add_package(package('source'))
    write(upkeep.cache.root / 'declared'
          / f'{package("one").sha256}.json', '{}')
    write(upkeep.cache.root / 'verify/one-x86_64.json', '{}')
    write(upkeep.cache.root / 'verify/one-x86_64.differs/first/vmlinuz')
    # A root of the matrix
    row = write(upkeep.folder / 'hosts/row/mkosi.conf').parent
    lock = lock_of(locks.definition_digest(row), [package('qemu')])
    write(row / 'x86_64.lock', locks.render(lock))
    write(upkeep.cache.root / 'hosts/row' / locks.identity(
        lock.definition, lock, list(load_tool_locks(upkeep.registry).values())
    ) / 'usr/bin/qemu-img')
    upkeep.add_package(package('qemu'))
    # What --local built, of two: the registry does not know it
    upkeep.add_build('two', OLD, of='local')
    write(upkeep.cache.override, json.dumps({'schema': 1, 'images': {'two': {
        'x86_64': {'identity': OLD, 'locked': True, 'artefacts': {
            kind: {'sha256': sha(f'local{kind}'), 'size': 1}
            for kind in KINDS}}}}}))
    # Other people's
    write(upkeep.cache.assets / ('9' * 64))
    write(upkeep.cache.assets / ('9' * 64 + '.stamp'), '1')
    write(upkeep.cache.assets / 'README')
    write(upkeep.cache.root / 'notes/by.me')
    write(upkeep.cache.store / 'README')
    write(upkeep.cache.images / 'one/x86_64/README')


def fill_old(upkeep: Upkeep) -> None:
    '''What nothing refers to.'''
    upkeep.add_build('one', 'c' * 64, of='old')
    # It has a file in common with the current one
    upkeep.add_build('gone', 'd' * 64, of='one')
    write(upkeep.cache.images / f'one/x86_64/{OLD}.differs/vmlinuz')
    upkeep.add_package(package('one', '0'))
    write(upkeep.cache.store / f'{"1" * 64}.part')
    write(upkeep.cache.store / f'.{"1" * 64}.4194305.tmp')
    write(upkeep.cache.assets / f'.{"1" * 64}.4194305.tmp')
    write(upkeep.cache.tools / ('e' * 64) / 'usr/bin/mkosi')
    os.chmod(upkeep.cache.tools / ('e' * 64) / 'usr/bin', 0o500)
    write(upkeep.cache.root / 'work/one-x86_64/half')
    write(upkeep.cache.root / 'log/gone-x86_64.log')
    write(upkeep.cache.root / 'newer' / ('f' * 64) / 'image.lock', 'x')
    write(upkeep.cache.root / 'declared' / f'{"6" * 64}.json', '{}')
    write(upkeep.cache.root / 'hosts/row' / ('7' * 64) / 'usr/bin/qemu-img')
    write(upkeep.cache.root / 'verify/gone-x86_64.differs/first/vmlinuz')
    write(upkeep.cache.root / 'sources' / f'{"5" * 64}.list',
          f'{package("one", "0").sha256} 100 one 0 one.dsc\n')


def test_prune(upkeep: Upkeep) -> None:
    '''All that nothing refers to goes, and nothing else.'''
    fill_current(upkeep)
    before = files(upkeep)
    fill_old(upkeep)
    upkeep.age(48)
    assert prune(upkeep) == {}
    assert files(upkeep) == before
    left = {path.name for path in upkeep.cache.images.glob('*/*/*')}
    assert left == {OLD, 'README', str(
        upkeep.registry.image('one').target('x86_64').identity)}
    # And again: there is nothing more to do
    assert prune(upkeep) == {} and files(upkeep) == before


def test_dry_run(upkeep: Upkeep) -> None:
    '''--cache says beforehand what --prune removes, and removes nothing.'''
    fill_current(upkeep)
    fill_old(upkeep)
    upkeep.age(48)
    before = files(upkeep)
    told = held(upkeep)
    assert files(upkeep) == before
    goes = {name for name, event in told.items() if event['prunable']}
    prune(upkeep)
    assert set(held(upkeep)) == set(told) - goes
    assert len(goes) == 18


def test_users(upkeep: Upkeep) -> None:
    '''Everything is told with all that refer to it.'''
    fill_current(upkeep)
    told = held(upkeep)
    tools = 'tools ' + next(
        (upkeep.folder / 'tools').glob('*.lock')).stem
    for name, users in (
            (f'store/{package("one").sha256}', ['one x86_64']),
            (f'store/{package("common").sha256}',
             ['one x86_64', 'two x86_64', tools]),
            (f'store/{package("hammer").sha256}', [tools]),
            (f'store/{package("one", "2").sha256}', ['newer one x86_64']),
            (f'store/{package("source").sha256}',
             ['sources of one x86_64']),
            (f'store/{package("qemu").sha256}', ['host row x86_64']),
            (f'images/two/x86_64/{OLD}', ['override two x86_64']),
            ('override.json', ['tests']),
            ('log/resolve-one-x86_64.log', ['one x86_64'])):
        area = name.partition('/')[0].replace('.json', '')
        assert told[f'{area} {name}']['users'] == users, name
    for name in ('other notes', 'other store/README',
                 'assets README', f'assets {"9" * 64}'):
        assert told[name]['users'] == [] and not told[name]['prunable']
    asset = told[f'assets {sha("onedisk")}']
    assert asset['users'] == ['one x86_64'] and asset['bytes'] > 0


def test_table(upkeep: Upkeep, capsys: pytest.CaptureFixture[str]) -> None:
    '''What a person reads: nothing is counted twice.'''
    fill_current(upkeep)
    care.show(upkeep.registry, upkeep.cache, Report(False, sys.stderr))
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    rows = {line[0]: line for line in lines if line}
    assert rows['AREA'][1:] == ['ENTRIES', 'SIZE', 'PRUNABLE']
    assert rows['images'][1] == '2'
    assert rows['REFERRED'] and rows['override']


def test_empty(upkeep: Upkeep) -> None:
    '''Caches that are not there yet.'''
    assert held(upkeep) == {}
    assert prune(upkeep) == {}
    assert files(upkeep) == []


def test_lately(upkeep: Upkeep) -> None:
    '''What was used just now stays, though nothing refers to it.'''
    fill_old(upkeep)
    before = [path for path in files(upkeep) if 'work' not in str(path)]
    kept = prune(upkeep)
    assert files(upkeep) == before
    assert kept and all(why.startswith('used 0 minutes')
                        for why in kept.values())


def test_part_of_today(upkeep: Upkeep) -> None:
    '''An interrupted download can go on for a day.'''
    part = write(upkeep.cache.store / f'{"1" * 64}.part')
    upkeep.age(23)
    prune(upkeep)
    assert part.exists()
    upkeep.age(2)
    prune(upkeep)
    assert not part.exists()


def test_asset_used_by_a_test(upkeep: Upkeep) -> None:
    '''A test that took the asset of an old build has it for a while.'''
    build = upkeep.add_build('one', 'c' * 64, of='old')
    upkeep.age(48)
    asset = upkeep.cache.assets / sha('olddisk')
    write(asset.with_suffix('.stamp'), f'{int(time.time())}')
    assert 'used 0 minutes ago' in prune(upkeep).values()
    assert asset.exists() and build.exists()


HOLD = '''
import fcntl, sys
with open(sys.argv[1], 'ab') as file:
    if sys.argv[2] == 'lock':
        fcntl.flock(file, fcntl.LOCK_EX)
    print('held', flush=True)
    sys.stdin.read()
'''


class Holder:
    '''A process that holds a file open, or a lock, in a with block.'''

    def __init__(self, path: Path, how: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        # pylint: disable=consider-using-with
        self.process = subprocess.Popen(
            [sys.executable, '-c', HOLD, path, how],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def __enter__(self) -> None:
        assert self.process.stdout
        assert self.process.stdout.readline() == b'held\n'

    def __exit__(self, *_args: object) -> None:
        self.process.communicate()


def test_open_file(upkeep: Upkeep) -> None:
    '''What a process has open stays: an old disk that QEMU runs from.'''
    build = upkeep.add_build('one', 'c' * 64, of='old')
    upkeep.age(48)
    (build / 'disk.qcow2').chmod(0o644)
    with Holder(build / 'disk.qcow2', 'open'):
        kept = prune(upkeep)
    assert set(kept.values()) == {'a process has it open'}
    assert (build / 'disk.qcow2').exists()
    assert (upkeep.cache.assets / sha('olddisk')).exists()
    assert prune(upkeep) == {}
    assert not build.exists() and not files(upkeep)


@pytest.mark.parametrize('lock, stays', [
    ('one-x86_64', ['images', 'work', 'store', 'tools', 'sources']),
    ('store', ['store', 'tools', 'newer', 'sources']),
    (f'tools-{"e" * 16}', ['store', 'tools', 'sources']),
    ('sources', ['store', 'tools', 'sources']),
    ('anything', ['store', 'tools', 'sources'])])
def test_held_lock(lock: str, stays: List[str], upkeep: Upkeep) -> None:
    '''Who holds a lock keeps what it protects, and what he may verify.'''
    fill_old(upkeep)
    upkeep.age(48)
    with Holder(upkeep.cache.root / 'locks' / lock, 'lock'):
        kept = prune(upkeep)
    assert {name.partition('/')[0] for name in kept} == set(stays)
    assert all(f'the lock {lock}' in why for why in kept.values())
    assert prune(upkeep) == {}


@pytest.mark.parametrize('text', ['', 'null', '[]', '{"images": [1]}',
                                  '{"images": {"one": {"x86_64": {}}}}'])
def test_damaged_override(text: str, upkeep: Upkeep) -> None:
    '''It might refer to anything, so nothing is removed.'''
    fill_old(upkeep)
    write(upkeep.cache.override, text)
    upkeep.age(48)
    before = files(upkeep)
    with pytest.raises(InputError) as caught:
        prune(upkeep)
    assert 'override.json' in caught.value.message and caught.value.next_step
    assert files(upkeep) == before


def test_damaged_lock(upkeep: Upkeep) -> None:
    '''Nor is it where a lock can't be read.'''
    fill_old(upkeep)
    upkeep.age(48)
    before = files(upkeep)
    with open(upkeep.folder / 'one/x86_64.lock', 'a',
              encoding='utf-8') as file:
        file.write('?\n')
    with pytest.raises(InputError):
        prune(upkeep)
    assert files(upkeep) == before


# With a limit

def test_limit(upkeep: Upkeep) -> None:
    '''What was used longest ago goes first, and no more than need be.'''
    fill_current(upkeep)
    upkeep.age(48)
    newest = upkeep.cache.store / package('one').sha256
    os.utime(newest, (time.time() - 3600,) * 2)
    size = holdings.total(holdings.Survey(upkeep.cache, holdings.References(
        upkeep.registry, upkeep.cache)).entries)
    assert prune(upkeep, size) == {}
    assert len(list(upkeep.cache.store.iterdir())) == 8
    prune(upkeep, size - 1)
    # One thing went, and not that
    assert len(list(upkeep.cache.store.iterdir())) >= 6 and newest.exists()
    assert holdings.total(holdings.Survey(upkeep.cache, holdings.References(
        upkeep.registry, upkeep.cache)).entries) < size
    stream = io.StringIO()
    care.prune(upkeep.registry, upkeep.cache, Report(True, stream), 1)
    order = [event['name'] for event in map(
        json.loads, stream.getvalue().splitlines())
             if event['event'] == 'pruned']
    assert order[-1] == f'store/{newest.name}'
    # Builds and others' files do not go, and that is told
    assert 'are more than the limit' in stream.getvalue()
    assert len(list(upkeep.cache.images.glob('*/*/*/record.json'))) == 2
    assert {path.name for path in upkeep.cache.store.iterdir()} == {'README'}
    assert (upkeep.cache.root / 'notes/by.me').exists()


def test_limit_spares_what_is_used(upkeep: Upkeep) -> None:
    '''Also for want of space.'''
    fill_current(upkeep)
    upkeep.age(48)
    mine = upkeep.cache.store / package('one').sha256
    with Holder(upkeep.cache.root / 'locks/one-x86_64', 'lock'):
        kept = prune(upkeep, 1)
    assert mine.exists() and f'store/{mine.name}' in kept
    os.utime(mine)
    kept = prune(upkeep, 1)
    assert list(kept) == [f'store/{mine.name}']


@pytest.mark.parametrize('text, size', [
    ('1', 1), ('1K', 1024), ('500M', 500 << 20), ('2G', 2 << 30),
    ('1.5T', 3 << 39), ('0', 0)])
def test_size(text: str, size: int) -> None:
    '''As people write it.'''
    assert care.parse_size(text) == size


@pytest.mark.parametrize('arguments', [
    ['--limit', '1G'], ['--cache', '--limit', '1G'],
    ['--list', '--limit', '1G'], ['--prune', '--limit', 'x'],
    ['--prune', '--limit', '-1'], ['--prune', '--limit', '1 G'],
    ['--prune', '--limit', '2g'], ['--prune', 'debian-min'],
    ['--cache', 'debian-min'], ['--cache', '--prune'],
    ['--prune', '--update-lock'], ['--prune', '--boot']])
def test_wrong_combination(arguments: List[str]) -> None:
    '''Refused before any work.'''
    with pytest.raises(UsageError):
        cli.parse_arguments(['x86_64', *arguments])


# Beside others

WORKER = '''
import os, sys, time
from pathlib import Path
from mkosi_build import lock, store
from mkosi_build.build import Builder
from mkosi_build.cache import Cache
from mkosi_build.report import Report
report = Report(True, open(os.devnull, 'w'))
builder = Builder(Cache(), report)
locked = lock.load(Path(sys.argv[1]))
# It takes long to say so
store._apt_mirrors = lambda distribution: []
end = time.monotonic() + float(sys.argv[2])
rounds = 0

def age(path):
    then = time.time() - 2 * 86400
    os.utime(path, (then, then))

while time.monotonic() < end:
    builder.store.fetch(locked.packages, 'debian', 'a test')
    time.sleep(0.005)
    paths = [builder.store.path(p) for p in locked.packages]
    for path in paths:
        assert path.exists(), f'{path} is gone in round {rounds}'
    # As if two days went by
    for path in paths:
        try:
            age(path)
        except FileNotFoundError:
            pass
    rounds += 1
print(rounds)
'''


class Endless:
    '''Prunes in processes of its own again and again.'''

    CODE = '''
import sys, time
from pathlib import Path
from mkosi_build import care, registry
from mkosi_build.cache import Cache
from mkosi_build.report import Report
report = Report(True, sys.stdout)
while True:
    care.prune(registry.load(Path(sys.argv[1])), Cache(), report)
    time.sleep(0.01)
'''

    def __init__(self, upkeep: Upkeep) -> None:
        # pylint: disable=consider-using-with
        self.removed = 0
        self.process = subprocess.Popen(
            [sys.executable, '-c', self.CODE, upkeep.path],
            env={**os.environ, 'PYTHONPATH': str(SCRIPTS)},
            stdout=subprocess.PIPE, encoding='utf-8')
        self.thread = threading.Thread(target=self._read)
        self.thread.start()

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self.removed += '"pruned"' in line

    def end(self) -> int:
        '''Stop. Returns how much was removed.'''
        alive = self.process.poll() is None
        self.process.kill()
        self.process.wait()
        self.thread.join()
        assert alive, 'it failed'
        return self.removed


@pytest.mark.slow
def test_fetch_beside_prune(upkeep: Upkeep, tmp_path: Path,
                            monkeypatch: pytest.MonkeyPatch) -> None:
    '''What a fetch has just verified is there, though nothing refers to it.'''
    foreign = [package(f'foreign{number}') for number in range(8)]
    for one in foreign:
        write(tmp_path / 'mirror' / one.location).write_bytes(
            body(one.source))
    path = write(tmp_path / 'foreign.lock', locks.render(
        lock_of('b' * 64, foreign)))
    monkeypatch.setenv('QEMU_MKOSI_MIRROR', f'file://{tmp_path}/mirror')
    pruner = Endless(upkeep)
    try:
        worker = subprocess.run(
            [sys.executable, '-c', WORKER, path, '5'], check=False,
            env={**os.environ, 'PYTHONPATH': str(SCRIPTS)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            encoding='utf-8')
    finally:
        removed = pruner.end()
    assert worker.returncode == 0, worker.stderr
    assert int(worker.stdout) > 3 and removed > 0


FINDER = '''
import os, sys, time
from pathlib import Path
from mkosi_build import build, registry
from mkosi_build.cache import Cache
from mkosi_build.report import Report
cache = Cache()
builder = build.Builder(cache, Report(True, open(os.devnull, 'w')))
known = registry.load(Path(sys.argv[1]))
job = build.prepare(known, known.image('one'), 'x86_64')
end = time.monotonic() + float(sys.argv[2])
found = lost = 0
folder = builder.folder(job)
copies = Path(sys.argv[3])
while time.monotonic() < end:
    result = builder.find(job)
    if result is None:
        lost += 1
        with cache.lock(job.name):
            if not folder.exists():
                import shutil
                shutil.copytree(copies, folder.with_name('.new'))
                folder.with_name('.new').rename(folder)
            for path in folder.iterdir():
                if path.name != 'record.json':
                    cache.add_asset(path, path.name)
    else:
        found += 1
        time.sleep(0.002)
        for built in result.artefacts.values():
            assert built.path.exists(), built.path
            assert (cache.assets / built.sha256).exists(), built.sha256
    then = time.time() - 2 * 86400
    for path in [*folder.glob('*'), folder, *cache.assets.glob('*')]:
        try:
            os.utime(path, (then, then))
        except FileNotFoundError:
            pass
print(found, lost)
'''


@pytest.mark.slow
def test_find_beside_prune(upkeep: Upkeep, tmp_path: Path) -> None:
    '''
    The builder of another checkout finds its build, of which this registry
    knows nothing, whole or not at all.
    '''
    others = Upkeep(tmp_path / 'other', names=('one',))
    (others.folder / 'one/mkosi.conf').write_text('[Output]\nFormat=cpio\n')
    copies = tmp_path / 'copies'
    upkeep.cache.assets.mkdir(parents=True)
    artefacts = {}
    for kind in KINDS:
        name = sha(f'other{kind}')
        write(copies / name).write_bytes(body(f'other{kind}'))
        artefacts[kind] = {'file': name, 'sha256': name, 'verified': [],
                           'size': len(body(f'other{kind}'))}
    write(copies / 'record.json', json.dumps({'artefacts': artefacts}))
    pruner = Endless(upkeep)
    try:
        worker = subprocess.run(
            [sys.executable, '-c', FINDER, others.path, '5', copies],
            env={**os.environ, 'PYTHONPATH': str(SCRIPTS)}, check=False,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            encoding='utf-8')
    finally:
        removed = pruner.end()
    assert worker.returncode == 0, worker.stderr
    found, lost = map(int, worker.stdout.split())
    assert found > 3 and lost > 0 and removed > 0
