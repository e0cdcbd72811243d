# SPDX-License-Identifier: GPL-2.0-or-later
'''The package store, against a server that does what servers do.'''

from dataclasses import replace
import hashlib
import io
import os
from pathlib import Path
import random
import threading
from typing import List, Optional

import pytest

from fixtures_builder import (
    Answer, FaultServer, ranged, redirect, reset, short, silence, status,
    trickle, unsized, whole, wrong_range)
from mkosi_build import store as stores
from mkosi_build.cache import Cache
from mkosi_build.error import FetchError
from mkosi_build.lock import Package
from mkosi_build.report import Report
from mkosi_build.store import GoneError, Store, first_with, host_mirrors
from mkosi_build.transfer import TRIES, Limits

pytest_plugins = ['fixtures_builder']

BODY = random.Random(1).randbytes(200_000)
OTHER = bytes(reversed(BODY))
PATH = '/pool/main/h/hello/hello_1.0-1+b1_amd64.deb'


def package(name: str = 'hello', body: bytes = BODY) -> Package:
    '''What a lock says of a package with @body.'''
    return Package(name, '1.0-1+b1',
                   f'pool/main/h/{name}/{name}_1.0-1+b1_amd64.deb',
                   hashlib.sha256(body).hexdigest(), len(body), 'amd64',
                   f'{name}=1.0-1')


HELLO = package()


@pytest.fixture(name='store')
def fixture_store(tmp_path: Path, faults: FaultServer,
                  monkeypatch: pytest.MonkeyPatch) -> Store:
    '''An empty store with the server as its only mirror, in a hurry.'''
    (tmp_path / 'apt.conf').write_text(
        'Dir::Etc::sourcelist "/dev/null";\n'
        'Dir::Etc::sourceparts "/dev/null";\n')
    monkeypatch.setenv('APT_CONFIG', str(tmp_path / 'apt.conf'))
    monkeypatch.setenv('QEMU_MKOSI_DIR', str(tmp_path / 'cache'))
    monkeypatch.setenv('QEMU_MKOSI_MIRROR', faults.url)
    monkeypatch.setattr(stores, 'LIMITS', Limits(silence=0.3))
    monkeypatch.setattr(stores, 'PAUSE', 0.01)
    return Store(Cache(), Report(stream=io.StringIO()))


def fetch(store: Store, *packages: Package) -> None:
    '''Fetch @packages, else HELLO.'''
    store.fetch(packages or (HELLO,), 'debian', 'test')


def part(store: Store) -> Path:
    '''Where the transfer of HELLO goes.'''
    return store.folder / f'{HELLO.sha256}.part'


def leave_part(store: Store, data: bytes) -> None:
    '''What an earlier run left behind.'''
    store.folder.mkdir(parents=True)
    part(store).write_bytes(data)


def assert_whole(store: Store) -> None:
    '''HELLO is there, and nothing beside it.'''
    assert [p.name for p in store.folder.iterdir()] == [HELLO.sha256]
    assert store.path(HELLO).read_bytes() == BODY
    assert store.path(HELLO).stat().st_mode & 0o777 == 0o444


def refused(store: Store, *packages: Package) -> str:
    '''Fetch, which must fail but not as gone. Returns what it said.'''
    with pytest.raises(FetchError) as caught:
        fetch(store, *packages)
    assert not isinstance(caught.value, GoneError)
    assert caught.value.exit_code == 5
    assert caught.value.next_step
    assert len(caught.value.message.splitlines()) == 1
    return caught.value.message


def test_fetch(store: Store, faults: FaultServer) -> None:
    '''A package comes whole, and is not asked for again.'''
    faults.answers[PATH] = [whole(BODY)]
    fetch(store)
    assert_whole(store)
    fetch(store)
    assert faults.asked == [PATH]


# Faults that pass: the next try gets it

@pytest.mark.parametrize('answers', [
    [short(BODY, 70_000), ranged(BODY)],
    [short(BODY, 70_000), whole(BODY)],
    [short(BODY, 70_000), wrong_range(BODY), ranged(BODY)],
    [short(BODY, 70_000), status(416), ranged(BODY)],
    [trickle(BODY, 70_000), ranged(BODY)],
    [short(BODY, 0), whole(BODY)],
    [whole(BODY + b'more'), whole(BODY)],
    [whole(OTHER), whole(BODY)],
    [whole(b''), whole(BODY)],
    [whole(b'<html>Please log in</html>'), ranged(BODY), ranged(BODY)],
    [status(500), whole(BODY)],
    [status(503), status(429), whole(BODY)],
    [status(403), whole(BODY)],
    [reset, whole(BODY)],
    [silence, whole(BODY)],
    [unsized(BODY[:9]), unsized(BODY)],
    [unsized(BODY + b'x'), unsized(BODY)],
])
def test_fault_that_passes(answers: List[Answer], store: Store,
                           faults: FaultServer) -> None:
    '''Whatever went wrong, the next try gets the package.'''
    faults.answers[PATH] = answers
    fetch(store)
    assert_whole(store)


def test_broken_transfer_goes_on(store: Store, faults: FaultServer) -> None:
    '''The second request asks for what is missing, no more.'''
    faults.answers[PATH] = [short(BODY, 70_000), ranged(BODY)]
    fetch(store)
    assert faults.headers[1]['Range'] == 'bytes=70000-'
    assert_whole(store)


def test_broken_transfer_goes_on_in_the_next_run(
        store: Store, faults: FaultServer) -> None:
    '''What a failed run had is not asked for again.'''
    faults.answers[PATH] = [short(BODY, 70_000), status(500)]
    assert 'HTTP error 500' in refused(store)
    assert part(store).stat().st_size == 70_000
    faults.answers[PATH] = [ranged(BODY)]
    fetch(store)
    assert faults.headers[-1]['Range'] == 'bytes=70000-'
    assert_whole(store)


def test_redirect_is_followed(store: Store, faults: FaultServer) -> None:
    '''Mirrors redirect; the hash decides what is used.'''
    faults.answers[PATH] = [redirect('/cdn/hello')]
    faults.answers['/cdn/hello'] = [whole(BODY)]
    fetch(store)
    assert_whole(store)


# What an earlier run left behind

@pytest.mark.parametrize('left', [
    b'', BODY[:10], BODY[:-1], OTHER[:10], OTHER[:-1], OTHER, BODY + b'x'])
@pytest.mark.parametrize('answer', [whole(BODY), ranged(BODY)])
def test_left_behind(left: bytes, answer: Answer, store: Store,
                     faults: FaultServer) -> None:
    '''Good or bad, the result is whole.'''
    leave_part(store, left)
    faults.answers[PATH] = [answer]
    fetch(store)
    assert_whole(store)


def test_left_behind_complete(store: Store, faults: FaultServer) -> None:
    '''Killed just before the rename: nothing is transferred.'''
    leave_part(store, BODY)
    part(store).chmod(0o444)
    fetch(store)
    assert not faults.asked
    assert_whole(store)


@pytest.mark.parametrize('damage', [
    BODY[:-1], BODY + b'x', OTHER, b''])
def test_damaged_later(damage: bytes, store: Store,
                       faults: FaultServer) -> None:
    '''A file that was damaged by hand is fetched again.'''
    faults.answers[PATH] = [whole(BODY)]
    fetch(store)
    store.path(HELLO).chmod(0o644)
    store.path(HELLO).write_bytes(damage)
    fetch(store)
    assert_whole(store)
    assert len(faults.asked) == 2


# Faults that stay

@pytest.mark.parametrize('answers, expected, kept', [
    ([short(BODY, 100), status(500)], 'HTTP error 500', 100),
    ([short(BODY, 100), short(BODY, 100), short(BODY, 100)],
     f'connection closed after 100 of {len(BODY)} bytes', 100),
    ([whole(OTHER)], f'expected SHA-256 {HELLO.sha256}, found '
     f'{hashlib.sha256(OTHER).hexdigest()}', None),
    ([whole(BODY + b'x')],
     f'expected {len(BODY)} bytes, found {len(BODY) + 1}', None),
    ([whole(BODY[:9])], f'expected {len(BODY)} bytes, found 9', None),
    ([unsized(BODY + b'x')], f'expected {len(BODY)} bytes, found more', None),
    ([wrong_range(BODY)], f"expected bytes 0-{len(BODY) - 1}/{len(BODY)}, "
     f"found 'bytes 1-2/{len(BODY)}'", None),
    ([status(403)], 'HTTP error 403', None),
    ([status(500)], 'HTTP error 500', None),
    ([reset], 'Connection reset', None),
    ([silence], 'timed out', None),
    ([redirect(PATH)], 'infinite loop', None),
    ([redirect('file:///etc/passwd')], 'not allowed', None),
    ([redirect('gopher://example.org/')], 'not allowed', None),
])
def test_fault_that_stays(answers: List[Answer], expected: str,
                          kept: Optional[int], store: Store,
                          faults: FaultServer) -> None:
    '''An error that names package, mirror and reason.'''
    faults.answers[PATH] = answers
    said = refused(store)
    assert "hello 1.0-1+b1 can't be fetched" in said
    assert faults.url in said
    assert expected in said
    left = {p.name: p.stat().st_size for p in store.folder.iterdir()}
    assert left == ({part(store).name: kept} if kept else {})


def test_nobody_listens(store: Store,
                        monkeypatch: pytest.MonkeyPatch) -> None:
    '''Refused connections and unknown hosts.'''
    monkeypatch.setenv('QEMU_MKOSI_MIRROR', 'http://127.0.0.1:1')
    assert 'Connection refused' in refused(store)
    monkeypatch.setenv('QEMU_MKOSI_MIRROR', 'http://no..host/debian')
    assert 'http://no..host/debian' in refused(store)


def test_first_hard_failure_stops_the_others(
        store: Store, faults: FaultServer,
        monkeypatch: pytest.MonkeyPatch) -> None:
    '''No hundred packages are tried on a mirror that is broken.'''
    monkeypatch.setattr(stores, 'CONNECTIONS', 2)
    packages = [package(f'p{i}', f'{i}'.encode()) for i in range(50)]
    monkeypatch.setattr(faults, 'otherwise', status(500))
    said = refused(store, *packages)
    assert said.startswith(('p0 ', 'p1 '))
    assert len(faults.asked) <= 3 * TRIES


# Gone

@pytest.mark.parametrize('code', [404, 410])
def test_gone(code: int, store: Store, faults: FaultServer) -> None:
    '''A mirror that does not have it is believed at once.'''
    faults.answers[PATH] = [status(code)]
    with pytest.raises(GoneError) as caught:
        fetch(store)
    assert caught.value.packages == (HELLO,)
    assert 'hello 1.0-1+b1' in caught.value.message
    assert faults.url in caught.value.message
    for option in ('QEMU_MKOSI_MIRROR', '--update-lock', '--allow-newer'):
        assert option in (caught.value.next_step or '')
    assert faults.asked == [PATH]
    assert not list(store.folder.iterdir())


def test_gone_lists_all(store: Store, faults: FaultServer) -> None:
    '''All packages are looked for, the first five named, the rest kept.'''
    packages = [package(f'p{i}', f'{i}'.encode()) for i in range(8)]
    faults.answers[f'/{packages[3].location}'] = [whole(b'3')]
    with pytest.raises(GoneError) as caught:
        fetch(store, *packages)
    assert [p.name for p in caught.value.packages] == [
        'p0', 'p1', 'p2', 'p4', 'p5', 'p6', 'p7']
    assert 'p5 1.0-1+b1 and 2 more' in caught.value.message
    assert store.whole(packages[3])


# Several mirrors

@pytest.mark.parametrize('fault', [
    status(404), status(500), status(403), whole(OTHER), whole(b'x' * 9),
    unsized(b'x' * 9),
    whole(BODY + b'x'), reset, silence, short(BODY, 9), redirect(PATH)])
def test_next_mirror(fault: Answer, store: Store, faults: FaultServer,
                     monkeypatch: pytest.MonkeyPatch) -> None:
    '''One that can't is followed by one that can.'''
    monkeypatch.setenv('QEMU_MKOSI_MIRROR',
                       f'{faults.url}/a {faults.url}/b/')
    faults.answers[f'/a{PATH}'] = [fault]
    faults.answers[PATH] = [redirect(PATH)]
    faults.answers[f'/b{PATH}'] = [ranged(BODY)]
    fetch(store)
    assert_whole(store)


def test_gone_means_gone_from_all(store: Store, faults: FaultServer,
                                  monkeypatch: pytest.MonkeyPatch) -> None:
    '''Where one mirror is broken, nobody knows whether it is gone.'''
    monkeypatch.setenv('QEMU_MKOSI_MIRROR', f'{faults.url}/a {faults.url}/b')
    faults.answers[f'/b{PATH}'] = [status(500)]
    said = refused(store)
    assert f'{faults.url}/a: HTTP error 404' in said
    assert f'{faults.url}/b: HTTP error 500' in said
    assert faults.asked.count(f'/a{PATH}') == 1
    assert faults.asked.count(f'/b{PATH}') == TRIES


def test_credentials_are_used_and_not_shown(
        store: Store, faults: FaultServer,
        monkeypatch: pytest.MonkeyPatch) -> None:
    '''In no message, and not told to whom a mirror redirects.'''
    url = f'http://me:s3cr%40t@{faults.host}'
    monkeypatch.setenv('QEMU_MKOSI_MIRROR', url)
    faults.answers[PATH] = [redirect(f'{faults.url}/other')]
    faults.answers['/other'] = [whole(BODY)]
    fetch(store)
    assert faults.headers[0]['Authorization'] == 'Basic bWU6czNjckB0'
    assert 'Authorization' not in faults.headers[1]
    for fault in (status(500), status(404)):
        store.path(HELLO).unlink(missing_ok=True)
        faults.answers[PATH] = [fault]
        with pytest.raises(FetchError) as caught:
            fetch(store)
        assert faults.url in str(caught.value)
        assert 's3cr' not in str(caught.value)


# Which mirrors

def test_mirror_in_a_folder(store: Store, tmp_path: Path,
                            monkeypatch: pytest.MonkeyPatch) -> None:
    '''A file URL, for those who have a copy on a disk.'''
    mirror = tmp_path / 'mirror'
    (mirror / HELLO.location).parent.mkdir(parents=True)
    (mirror / HELLO.location).write_bytes(BODY)
    monkeypatch.setenv('QEMU_MKOSI_MIRROR', f'file://{mirror}')
    fetch(store)
    assert_whole(store)
    assert (mirror / HELLO.location).stat().st_mode & 0o200
    (mirror / HELLO.location).unlink()
    store.path(HELLO).unlink()
    with pytest.raises(GoneError):
        fetch(store)


@pytest.mark.parametrize('url', [
    'ftp://host/debian', '/srv/debian', 'debian.example.org', 'http:/',
    'https://', 'http://[::1/debian', 'http://host:port/debian'])
def test_odd_mirror(url: str, store: Store,
                    monkeypatch: pytest.MonkeyPatch) -> None:
    '''What is no URL of a mirror is an error, and says so.'''
    monkeypatch.setenv('QEMU_MKOSI_MIRROR', url)
    assert url in refused(store)


def fake_apt(folder: Path, monkeypatch: pytest.MonkeyPatch,
             *lines: str) -> None:
    '''Let this host's apt be set up with @lines.'''
    folder.mkdir()
    script = folder / 'apt-get'
    script.write_text('#!/bin/sh\ncat <<E\n' + '\n'.join(lines) + '\nE\n')
    script.chmod(0o755)
    monkeypatch.setenv('PATH', f'{folder}:{os.environ["PATH"]}')


def test_host_mirrors(tmp_path: Path,
                      monkeypatch: pytest.MonkeyPatch) -> None:
    '''Ours first, then apt's: this distribution's, each once.'''
    fake_apt(tmp_path / 'bin', monkeypatch,
             'Debian http://a/debian/', 'Debian http://a/debian/',
             'Debian http://a/debian-security/', 'Ubuntu http://u/ubuntu/',
             ' http://unknown/debian', 'Debian cdrom://disk/')
    monkeypatch.setenv('QEMU_MKOSI_MIRROR',
                       'https://mine/debian/ file:///srv  http://a/debian')
    assert host_mirrors('debian') == [
        'https://mine/debian', 'file:///srv', 'http://a/debian',
        'http://unknown/debian']


def test_host_without_mirrors(tmp_path: Path,
                              monkeypatch: pytest.MonkeyPatch) -> None:
    '''Nothing set up: what to set is said.'''
    fake_apt(tmp_path / 'bin', monkeypatch)
    with pytest.raises(FetchError, match='no debian mirror is known') as e:
        host_mirrors('debian')
    assert 'QEMU_MKOSI_MIRROR' in (e.value.next_step or '')


REPOS = {
    'fedora.repo': '''\
[fedora]
name=Fedora $releasever - $basearch
#baseurl=http://commented/
baseurl=http://near/$releasever/$basearch/os/
        https://far/$releasever/$basearch/os
enabled=1
[fedora-source]
baseurl=http://source/
''',
    'my-fedora.repo': '''\
[fedora]
baseurl=http://near/44/aarch64/os http://$unknown/ ftp://old/
''',
    'other.repo': '[other]\nbaseurl=http://other/\n',
    'broken.repo': 'baseurl=http://broken/\n',
    'metalink.repo': '[fedora]\nmetalink=https://links/?repo=fedora\n'}


def test_host_mirrors_of_dnf(tmp_path: Path,
                             monkeypatch: pytest.MonkeyPatch) -> None:
    '''The repository of releases alone, and then the image's mirrors.'''
    monkeypatch.setattr(stores, 'YUM_REPOS', tmp_path)
    with pytest.raises(FetchError, match='no fedora mirror is known'):
        host_mirrors('fedora', '44', 'aarch64')
    for name, text in REPOS.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setenv('QEMU_MKOSI_MIRROR', 'http://mine/{arch}/os/ file:///x')
    assert host_mirrors('fedora', '44', 'aarch64',
                        ('https://official/{arch}/os', 'file:///x/')) == [
        'http://mine/aarch64/os', 'file:///x', 'http://near/44/aarch64/os',
        'https://far/44/aarch64/os', 'https://official/aarch64/os']


def test_host_mirrors_further(tmp_path: Path,
                              monkeypatch: pytest.MonkeyPatch) -> None:
    '''Debian has names of its own for architectures.'''
    fake_apt(tmp_path / 'bin', monkeypatch, 'Debian http://a/debian/')
    assert host_mirrors('debian', 'trixie', 'aarch64', (
        'http://b/{arch}', 'http://a/debian')) == [
            'http://a/debian', 'http://b/arm64']


def test_host_without_apt(tmp_path: Path,
                          monkeypatch: pytest.MonkeyPatch) -> None:
    '''On a host without apt there are still the other mirrors.'''
    monkeypatch.setenv('PATH', str(tmp_path))
    assert host_mirrors('debian', further=('http://b',)) == ['http://b']


def test_first_with(faults: FaultServer, tmp_path: Path) -> None:
    '''The first that has the file; else all are named, no password is.'''
    (tmp_path / 'there').write_text('x')
    dead = 'http://user:secret@127.0.0.1:1'
    mirrors = [dead, faults.url, f'file://{tmp_path}/none',
               f'file://{tmp_path}']
    assert first_with(mirrors, 'there') == mirrors[3]
    faults.answers['/there'] = [whole(b'')]
    assert first_with(mirrors, 'there') == faults.url
    with pytest.raises(FetchError) as e:
        first_with(mirrors, 'nowhere')
    for mirror in ('http://127.0.0.1:1: ', f'{faults.url}: HTTP error 404',
                   f'file://{tmp_path}/none: '):
        assert mirror in e.value.message
    assert 'secret' not in str(e.value)


def test_caret(store: Store, faults: FaultServer) -> None:
    '''Escaped, once, as not all servers take it; nothing else is.'''
    body = b'x^y'
    odd = replace(package(body=body), location='P/a-1^git+2~3%3a4.rpm')
    faults.answers['/P/a-1%5Egit+2~3%3a4.rpm'] = [whole(body)]
    fetch(store, odd)
    assert store.whole(odd)


def test_two_fetch_at_once(store: Store, faults: FaultServer) -> None:
    '''The second waits, and asks for nothing.'''
    faults.answers[PATH] = [whole(BODY)]
    other = Store(Cache(), Report(stream=io.StringIO()))
    threads = [threading.Thread(target=fetch, args=(s,))
               for s in (store, other)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert_whole(store)
    assert faults.asked == [PATH]
