# SPDX-License-Identifier: GPL-2.0-or-later
'''
Resolving packages anew: only what the distribution has signed is taken,
and what is gone from the mirror is replaced loudly, or not at all.
'''

import io
import json
import os
from pathlib import Path
import re
import shutil
from typing import List, Set
import urllib.error
import urllib.request

import pytest

from fixtures_builder import (AMBIENT, CONF, TREE_LOCKS, FaultServer,
                              Handler, Project, ranged)
from mkosi_build import lock as locks, record, registry as registries
from mkosi_build import repository
from mkosi_build.build import load_tool_locks
from mkosi_build.cache import Cache
from mkosi_build.lock import Lock, Package
from mkosi_build.report import Report
from mkosi_build.resolve import KEYRING
from mkosi_build.store import Store, host_mirrors

pytest_plugins = ['fixtures_builder']

SLOW = pytest.mark.slow
NETWORK = pytest.mark.network
NEEDS_KEYRING = pytest.mark.skipif(not KEYRING.exists(),
                                   reason=f'needs {KEYRING}')


# An unsigned repository

@pytest.fixture(name='unsigned')
def fixture_unsigned(project: Project, faults: FaultServer,
                     monkeypatch: pytest.MonkeyPatch) -> Project:
    '''A project whose mirror is a repository that nobody signed.'''
    monkeypatch.setenv('QEMU_MKOSI_DIR', str(project.root / 'other'))
    monkeypatch.setenv('QEMU_MKOSI_MIRROR', project.mirror)
    lock = locks.load(project.lock_path)
    store = Store(Cache(), Report(stream=io.StringIO()))
    store.fetch(lock.packages, 'debian', 'test')
    faults.root = project.root / 'repository'
    faults.root.mkdir()
    # Debian's takes no tool of the tree
    repository.make(lock, store, faults.root, faults.root)
    project.mirror = faults.url
    return project


def lock_files(project: Project) -> List[str]:
    '''The locks of image and tools.'''
    return [path.read_text() for path in
            (project.lock_path, project.mkosi / 'tools/x86_64.lock')]


@SLOW
@NEEDS_KEYRING
@pytest.mark.parametrize('name, code', [('mini', 6), ('tools', 5)])
def test_unsigned(name: str, code: int, unsigned: Project) -> None:
    '''Refused, by whoever resolves; the locks stay as they are.'''
    before = lock_files(unsigned)
    said = unsigned.bad(code, name, '--update-lock')
    assert 'is not signed' in said
    assert lock_files(unsigned) == before
    assert_no_wall(said)


def assert_no_wall(said: str) -> None:
    '''apt's command lines and lists of hashes are for the log.'''
    assert max(len(line) for line in said.splitlines()) < 320


# A mirror that was tampered with

class Proxy:
    '''Lets @server hand on the distribution's mirror, @touched bent.'''

    def __init__(self, server: FaultServer) -> None:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in AMBIENT.items():
                patch.setenv(name, value)
            self.upstream = [url for url in host_mirrors('debian')
                             if url.startswith('http')][0]
        self.touched = ''
        self.bent: Set[str] = set()
        server.otherwise = self.answer    # type: ignore[method-assign]

    def answer(self, handler: Handler) -> None:
        '''What the mirror says, but for a bit.'''
        try:
            with urllib.request.urlopen(f'{self.upstream}{handler.path}',
                                        timeout=60) as response:
                body = bytearray(response.read())
        except urllib.error.HTTPError as e:
            handler.send(e.code)
            return
        if self.touched and re.search(self.touched, handler.path):
            body[len(body) // 2] ^= 1
            self.bent.add(handler.path)
        ranged(bytes(body))(handler)


@pytest.fixture(name='proxy')
def fixture_proxy(faults: FaultServer, project: Project) -> Proxy:
    '''The proxy, as the mirror of @project, whose image is Debian's.'''
    project.mirror = faults.url
    project.edit(project.definition / 'mkosi.conf', 'mini-hello',
                 'busybox-static')
    return Proxy(faults)


@SLOW
@NETWORK
@NEEDS_KEYRING
@pytest.mark.parametrize('touched, name, code', [
    ('InRelease$', 'tools', 5),
    ('Packages|by-hash', 'tools', 5),
    ('InRelease$', 'mini', 6),
    ('Packages|by-hash', 'mini', 6),
    (r'\.deb$', 'mini', 6)])
def test_tampered(touched: str, name: str, code: int, proxy: Proxy,
                  project: Project) -> None:
    '''The real apt refuses; the locks stay as they are.'''
    before = lock_files(project)
    proxy.touched = touched
    said = project.bad(code, name, '--update-lock')
    assert proxy.bent
    assert re.search('BADSIG|invalid|not signed|[Hh]ash|unexpected size',
                     said), said
    assert_no_wall(said)
    assert lock_files(project) == before


@SLOW
@NETWORK
@NEEDS_KEYRING
@pytest.mark.usefixtures('proxy')
def test_update_lock_of_the_tools(project: Project) -> None:
    '''A sorted lock of what is there today, and what changed.'''
    path = project.mkosi / 'tools/x86_64.lock'
    lines = path.read_text().splitlines(True)
    new = locks.load(path).packages[0]
    path.write_text(''.join(line for line in lines
                            if f' {new.name} ' not in line))
    said = project.good('tools', '--update-lock').stderr
    assert f'    + {new.name} ' in said
    lock = locks.load(path)
    assert locks.render(lock) == path.read_text()
    assert {'mkosi', 'qemu-utils', 'apt', 'dpkg'} <= {
        p.name for p in lock.packages}


# Locked packages that are gone

def gone(lock: Lock, name: str) -> Lock:
    '''@lock with a version of the package @name that no mirror has.'''
    old = next(p for p in lock.packages if p.name == name)
    new = Package(name, '0.0', f'pool/main/g/gone/{name}_0.0_amd64.deb',
                  '0' * 64, 100, 'amd64', f'{name}=0.0')
    return locks.Lock(
        lock.definition, lock.distribution, lock.release, lock.architecture,
        lock.epoch,
        tuple(sorted((*(p for p in lock.packages if p != old), new))))


@pytest.fixture(name='outdated')
def fixture_outdated(project: Project, faults: FaultServer) -> Project:
    '''A recorded project of which tools and packages are gone.'''
    project.mirror = Proxy(faults).upstream
    (project.definition / 'mkosi.conf').write_text(
        CONF.replace('mini-hello', 'busybox-static'))
    project.edit(project.registry, 'packages: 10', 'packages: 300')
    tools = project.mkosi / 'tools/x86_64.lock'
    tools.write_text(locks.render(gone(locks.load(tools), 'mkosi')))
    lock = gone(locks.load(project.lock_path), 'mini-hello')
    definition = locks.definition_digest(project.definition)
    lock = Lock(definition, *(getattr(lock, key) for key in (
        'distribution', 'release', 'architecture', 'epoch', 'packages')))
    project.lock_path.write_text(locks.render(lock))
    registry = registries.load(project.registry)
    identity = locks.identity(definition, lock,
                              list(load_tool_locks(registry).values()))
    project.registry.write_text(record.record(
        project.registry.read_text(), 'mini', 'x86_64', identity,
        {kind: ('1' * 64, 1) for kind in ('kernel', 'initrd', 'disk')}))
    return project


def link_store(project: Project) -> None:
    '''Spare the mirror the tools that this machine has.'''
    with pytest.MonkeyPatch.context() as patch:
        for name, value in AMBIENT.items():
            patch.setenv(name, value)
        source = Cache().store
    (project.cache / 'store').mkdir()
    for package in locks.load(TREE_LOCKS / 'x86_64.lock').packages:
        if (source / package.sha256).exists():
            try:
                os.link(source / package.sha256,
                        project.cache / 'store' / package.sha256)
            except OSError:
                shutil.copy(source / package.sha256, project.cache / 'store')


@SLOW
@NETWORK
def test_gone(outdated: Project) -> None:
    '''Locked means locked: what is gone is named, and nothing built.'''
    link_store(outdated)
    said = outdated.bad(5)
    assert 'gone from every mirror: mkosi 0.0; asked: ' in said
    assert outdated.mirror in said
    assert '--allow-newer' in said and '--update-lock' in said
    assert not outdated.artefacts()


@SLOW
@NETWORK
@NEEDS_KEYRING
def test_allow_newer(outdated: Project) -> None:
    '''
    Tools and packages of today, said loudly, for this machine alone; the
    tree stays as it is. Once that was built, it is only looked up.
    '''
    link_store(outdated)
    before = (*lock_files(outdated), outdated.registry.read_text())
    said = outdated.good('--allow-newer').stderr
    assert 'UNLOCKED' in said and 'compared with nothing' in said
    assert '~ mkosi 0.0 -> ' in said
    assert '- mini-hello 0.0' in said
    assert '+ busybox-static ' in said
    assert before == (*lock_files(outdated), outdated.registry.read_text())
    path = re.findall('QEMU_TEST_MKOSI_OVERRIDE=(.*)', said)[0]
    entry = json.loads(Path(path).read_bytes())['images']['mini']['x86_64']
    assert entry['locked'] is False
    for artefact in entry['artefacts'].values():
        assert artefact['sha256'] in outdated.asset_hashes()
    again = outdated.good('--allow-newer', '--json').stdout
    assert not [e for e in outdated.events(again) if e['event'] == 'start'
                and not e['text'].startswith('fetching')]
