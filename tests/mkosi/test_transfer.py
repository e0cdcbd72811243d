# SPDX-License-Identifier: GPL-2.0-or-later
'''The one transfer, against servers with every fault we know of.'''

import hashlib
import io
import os
from pathlib import Path
import random
import subprocess
import sys
import threading
import time
from typing import Iterator, List, Optional, Type

import pytest

from faulty_server import (
    NAMES, YEAR, FaultyServer, busy, chunked, drip, later, misbehave,
    raw, serving, throttled)
from fixtures_builder import (
    Answer, ranged, redirect, short, status, whole)
from mkosi_build import store as stores
from mkosi_build.cache import Cache
from mkosi_build.error import FetchError
from mkosi_build.lock import Package
from mkosi_build.report import Report
from mkosi_build.store import GoneError, Store
from mkosi_build.transfer import (
    Busy, Failed, Limits, Missing, Stopped, TransferError, Unusable, Wrong,
    check, shown, transfer, transfer_from_any)

pytest_plugins = ['fixtures_builder']

BODY = random.Random(2).randbytes(100_000)
SHA256 = hashlib.sha256(BODY).hexdigest()
OTHER = bytes(reversed(BODY))
# Slow machines are no fault, a byte each 50 ms is
LIMITS = Limits(silence=1, slowest=1000, window=0.5, patience=2)

# What is said of a fault, and what it is
SAID = {
    'dies': ('Connection reset', TransferError),
    'dies at once': (f'connection closed after 0 of {len(BODY)} bytes',
                     TransferError),
    'reset': ('Connection reset', TransferError),
    'short': (f'expected {len(BODY)} bytes, found {len(BODY) - 1}', Unusable),
    'long': (f'expected {len(BODY)} bytes, found {len(BODY) + 1}', Unusable),
    'unsized, short': (f'closed after {len(BODY) - 1} of', TransferError),
    'unsized, long': (f'expected {len(BODY)} bytes, found more', Wrong),
    'other bytes': (f'expected SHA-256 {SHA256}, found '
                    + hashlib.sha256(OTHER).hexdigest(), Wrong),
    'other bytes later': (f'expected SHA-256 {SHA256}, found '
                          + hashlib.sha256(OTHER).hexdigest(), Wrong),
    'nothing': (f'expected {len(BODY)} bytes, found 0', Unusable),
    'silence': ('timed out', TransferError),
    'silence later': ('timed out', TransferError),
    'slow loris': ('too slow: ', TransferError),
    'slow headers': ('too slow: ', TransferError),
    'busy': ('HTTP error 429 (Too Many Requests), asks to wait for 0 s',
             Busy),
    'busy for long': ('HTTP error 503 (Service Unavailable), asks to wait '
                      'for 3600 s', Busy),
    'unavailable': ('HTTP error 503 (Service Unavailable)', Busy),
    '401': ('HTTP error 401 (Unauthorized)', TransferError),
    '401 in the middle': ('HTTP error 401 (Unauthorized)', TransferError),
    '403': ('HTTP error 403 (Forbidden)', TransferError),
    '404': ('HTTP error 404 (Not Found)', Missing),
    '410': ('HTTP error 410 (Gone)', Missing),
    '416': ('HTTP error 416 (', Wrong),
    '416 in the middle': ('HTTP error 416 (', Wrong),
    '500': ('HTTP error 500 (Internal Server Error)', TransferError),
    '204': ('unexpected HTTP status 204', Unusable),
    '300': ('HTTP error 300 (Multiple Choices)', Unusable),
    'redirect loop': ('redirects in an infinite loop, to http:', Unusable),
    'endless redirects': ('more than 5 redirects, the last one to http:',
                          Unusable),
    'redirect to a file': ('redirect to file:///etc/passwd is not allowed',
                           Unusable),
    'redirect to FTP': ('redirect to ftp://example.org/x is not allowed',
                        Unusable),
    'redirect to nowhere': ('redirect to a URL that is none', Unusable),
    'redirect to a 403': ('HTTP error 403 (Forbidden) after a redirect to ',
                          TransferError),
    'gzip': ('compressed, which was not asked for: gzip', Unusable),
    'gzip, it says': ('compressed, which was not asked for: gzip', Unusable),
    'wrong range': (f"expected bytes {len(BODY) // 2}-{len(BODY) - 1}/"
                    f"{len(BODY)}, found 'bytes 1-2/{len(BODY)}'", Wrong),
    'cut off chunk': ('IncompleteRead', TransferError),
    'not HTTP': ('SSH-2.0', TransferError),
    'no end of headers': ('got more than 100 headers', TransferError),
}


@pytest.fixture(name='server')
def fixture_server() -> Iterator[FaultyServer]:
    '''A server.'''
    with serving() as server:
        yield server


@pytest.fixture(name='elsewhere')
def fixture_elsewhere() -> Iterator[FaultyServer]:
    '''Another server, which has all, and says no to one question.'''
    with serving() as server:
        server.answers['/no?signature=s3cret'] = [status(403)]
        server.answers['/yes?signature=s3cret'] = [ranged(BODY)]
        server.answers['/good/file'] = [ranged(BODY)]
        yield server


def get(url: str, part: Path, limits: Limits = LIMITS,
        stop: Optional[threading.Event] = None) -> None:
    '''Transfer the good bytes.'''
    transfer(url, part, len(BODY), SHA256, limits=limits, stop=stop)


# -- Each fault -------------------------------------------------------------

def test_faults_are_known() -> None:
    '''No fault of the server goes without a test.'''
    assert set(SAID) == set(NAMES)


@pytest.mark.parametrize('name', NAMES)
def test_fault(name: str, server: FaultyServer, elsewhere: FaultyServer,
               tmp_path: Path) -> None:
    '''
    One class of error and one line that says it, no secret, and no bytes
    kept but such as can be gone on from.
    '''
    misbehave(server, name, '/file', BODY, elsewhere.url)
    part = tmp_path / 'part'
    said, kind = SAID[name]
    error: Optional[TransferError] = None
    # What breaks goes on at the second try
    for _ in range(1 + (len(server.answers['/file']) > 1)):
        with pytest.raises(TransferError) as caught:
            get(f'{server.url}/file', part)
        error = caught.value
    if name in ('416 in the middle', 'wrong range', 'other bytes later'):
        # Then it is tried once more from the beginning, to the same end
        assert 'Range' not in server.headers[-1]
    if name != 'wrong range':
        assert said in str(error)
    assert type(error) is kind      # pylint: disable=unidiomatic-typecheck
    assert len(str(error).splitlines()) == 1
    assert 's3cret' not in str(error)
    if part.exists():
        kept = part.read_bytes()
        assert BODY.startswith(kept)
    assert [p.name for p in tmp_path.iterdir()] in ([], ['part'])


@pytest.mark.parametrize('name', NAMES)
def test_next_source(name: str, server: FaultyServer,
                     elsewhere: FaultyServer, tmp_path: Path) -> None:
    '''Another source goes on where a bad one has ended, or begins anew.'''
    misbehave(server, name, '/file', BODY, elsewhere.url)
    part = tmp_path / 'part'
    told: List[str] = []
    good = f'{elsewhere.url}/good/file'
    assert transfer_from_any(
        [f'{server.url}/file', good], part, len(BODY), SHA256, limits=LIMITS,
        failed=lambda source, _: told.append(source)) == good
    assert part.read_bytes() == BODY
    assert told == [f'{server.url}/file']


@pytest.mark.parametrize('name', NAMES)
def test_package_store(name: str, server: FaultyServer,
                       elsewhere: FaultyServer, tmp_path: Path,
                       monkeypatch: pytest.MonkeyPatch) -> None:
    '''The package store says which mirror and what; another one helps.'''
    monkeypatch.setenv('QEMU_MKOSI_DIR', str(tmp_path / 'cache'))
    monkeypatch.setenv('QEMU_MKOSI_MIRROR', f'{server.url}/bad')
    # On a host that knows none
    (tmp_path / 'apt.conf').write_text(
        'Dir::Etc::sourcelist "/dev/null";\n'
        'Dir::Etc::sourceparts "/dev/null";\n')
    monkeypatch.setenv('APT_CONFIG', str(tmp_path / 'apt.conf'))
    monkeypatch.setattr(stores, 'LIMITS', LIMITS)
    monkeypatch.setattr(stores, 'TRIES', 2)
    monkeypatch.setattr(stores, 'PAUSE', 0)
    misbehave(server, name, '/bad/file', BODY, elsewhere.url)
    package = Package('p', '1', 'file', SHA256, len(BODY), 'amd64', 'p=1')
    store = Store(Cache(), Report(stream=io.StringIO()))
    with pytest.raises(FetchError) as caught:
        store.fetch([package], 'debian', 'test')
    assert isinstance(caught.value, GoneError) == (name in ('404', '410'))
    assert f'{server.url}/bad' in str(caught.value)
    assert 's3cret' not in str(caught.value)
    assert not store.path(package).exists()
    monkeypatch.setenv('QEMU_MKOSI_MIRROR',
                       f'{server.url}/bad {elsewhere.url}/good')
    store.fetch([package], 'debian', 'test')
    assert [p.name for p in store.folder.iterdir()] == [SHA256]
    assert store.whole(package)


# -- Broken transfers -------------------------------------------------------

def test_401_in_the_middle(server: FaultyServer, tmp_path: Path) -> None:
    '''What was there stays, and is gone on from once one may again.'''
    server.answers['/file'] = [short(BODY, 60_000), status(401),
                               ranged(BODY)]
    part = tmp_path / 'part'
    for said in ('closed after 60000', 'HTTP error 401'):
        with pytest.raises(TransferError, match=said):
            get(f'{server.url}/file', part)
        assert part.stat().st_size == 60_000
    get(f'{server.url}/file', part)
    assert server.headers[-1]['Range'] == 'bytes=60000-'
    assert part.read_bytes() == BODY


def test_bad_source_keeps_what_good_ones_gave(
        server: FaultyServer, tmp_path: Path) -> None:
    '''A login page and a redirect astray are no reason to begin anew.'''
    part = tmp_path / 'part'
    for answer in (whole(b'<html>log in</html>'), redirect('file:///x'),
                   status(500), redirect('/file')):
        part.write_bytes(BODY[:70_000])
        server.answers['/file'] = [answer]
        with pytest.raises(TransferError):
            get(f'{server.url}/file', part)
        assert part.read_bytes() == BODY[:70_000]


def test_chunked(server: FaultyServer, tmp_path: Path) -> None:
    '''No length is needed.'''
    server.answers['/file'] = [chunked(BODY)]
    get(f'{server.url}/file', tmp_path / 'part')


def test_asks_for_plain_bytes(server: FaultyServer, tmp_path: Path) -> None:
    '''No proxy on the way should compress them.'''
    server.answers['/file'] = [whole(BODY)]
    get(f'{server.url}/file', tmp_path / 'part')
    assert server.headers[0]['Accept-Encoding'] == 'identity'


# -- Slow sources -----------------------------------------------------------

def test_slow_is_not_dead(server: FaultyServer, tmp_path: Path) -> None:
    '''What comes at the least speed comes, for as long as it takes.'''
    server.answers['/file'] = [throttled(BODY, 100_000)]
    get(f'{server.url}/file', tmp_path / 'part',
        Limits(silence=5, window=0.1, slowest=500))


def test_slow_loris_keeps_what_came(server: FaultyServer,
                                    tmp_path: Path) -> None:
    '''Silence of 30 s would never come; this ends soon.'''
    server.answers['/file'] = [drip(BODY), ranged(BODY)]
    part = tmp_path / 'part'
    start = time.monotonic()
    with pytest.raises(TransferError, match='too slow'):
        get(f'{server.url}/file', part, Limits(window=0.3))
    assert time.monotonic() - start < 20
    assert BODY.startswith(part.read_bytes())
    assert part.stat().st_size
    get(f'{server.url}/file', part)


def test_stop(server: FaultyServer, tmp_path: Path) -> None:
    '''Whoever gives up need not wait for the end.'''
    server.answers['/file'] = [throttled(BODY, 1000)]
    server.answers['/busy'] = [busy(429, '60')]
    for path in ('/file', '/busy'):
        stop = threading.Event()
        threading.Timer(0.3, stop.set).start()
        with pytest.raises(Stopped):
            get(f'{server.url}{path}', tmp_path / 'part',
                Limits(), stop)


# -- Busy sources -----------------------------------------------------------

@pytest.mark.parametrize('answers, least', [
    ([busy(429, '1'), whole(BODY)], 0.9),
    ([busy(503, '1'), busy(429, '0'), whole(BODY)], 0.9),
    # A date has whole seconds
    ([later(2), whole(BODY)], 0.2),
    ([later(-5), whole(BODY)], 0),
    ([later(2, skew=YEAR), whole(BODY)], 0.9),
    ([later(2, skew=-YEAR), whole(BODY)], 0.9),
    # It does not say what time it is
    ([busy(503, 'Wed, 01 Jan 2020 00:00:00 GMT'), whole(BODY)], 0)])
def test_busy(answers: List[Answer], least: float, server: FaultyServer,
              tmp_path: Path) -> None:
    '''Waited for, by the server's clock, wrong by a year or not.'''
    server.answers['/file'] = list(answers)
    start = time.monotonic()
    get(f'{server.url}/file', tmp_path / 'part', Limits())
    assert least <= time.monotonic() - start < 30
    assert len(server.asked) == len(answers)


@pytest.mark.parametrize('answer, times', [
    # Longer than anybody should wait
    (busy(429, '61'), 1), (later(3600), 1), (later(3600, skew=-YEAR), 1),
    (busy(429, '999999999'), 1), (later(YEAR), 1),
    # It does not say how long
    (status(429), 1), (busy(429, 'soon'), 1), (busy(429, '-1'), 1),
    (busy(429, '1e3'), 1), (busy(503, ''), 1), (busy(503, '9' * 99), 1),
    (busy(503, 'Wed, 01 Foo 2020 00:00:00 GMT'), 1),
    # There is an end to patience
    (busy(429, '0'), 4), (later(-9), 4)])
def test_too_busy(answer: Answer, times: int, server: FaultyServer,
                  tmp_path: Path) -> None:
    '''Left alone, so that the next source has its turn.'''
    server.answers['/file'] = [answer]
    start = time.monotonic()
    with pytest.raises(Busy):
        get(f'{server.url}/file', tmp_path / 'part', Limits())
    assert len(server.asked) == times
    assert time.monotonic() - start < 20


# -- Credentials, redirects, proxies ----------------------------------------

def test_credentials_stay(server: FaultyServer, elsewhere: FaultyServer,
                          tmp_path: Path) -> None:
    '''A redirect, be it with others' credentials, is told none.'''
    server.answers['/file'] = [redirect(
        f'http://a:b@{elsewhere.host}/yes?signature=s3cret#frag')]
    get(f'http://me:pa%20ss@{server.host}/file', tmp_path / 'part')
    assert server.headers[0]['Authorization'] == 'Basic bWU6cGEgc3M='
    assert elsewhere.asked == ['/yes?signature=s3cret']
    for name in elsewhere.headers[0]:
        assert name.lower() in ('host', 'connection', 'user-agent',
                                'accept-encoding')


def test_range_goes_along(server: FaultyServer, elsewhere: FaultyServer,
                          tmp_path: Path) -> None:
    '''What is asked for is the same after a redirect.'''
    (tmp_path / 'part').write_bytes(BODY[:9])
    server.answers['/file'] = [redirect(
        f'{elsewhere.url}/yes?signature=s3cret')]
    get(f'{server.url}/file', tmp_path / 'part')
    assert elsewhere.headers[0]['Range'] == 'bytes=9-'


@pytest.mark.parametrize('hops, good', [(5, True), (6, False)])
def test_redirects(hops: int, good: bool, server: FaultyServer,
                   tmp_path: Path) -> None:
    '''Five, of any kind.'''
    for hop, code in zip(range(hops), (301, 302, 303, 307, 308, 302)):
        server.answers[f'/{hop}'] = [_moved(code, f'{hop + 1}?s3cret=1')]
        server.answers[f'/{hop}?s3cret=1'] = server.answers[f'/{hop}']
    server.answers[f'/{hops}?s3cret=1'] = [whole(BODY)]
    if good:
        get(f'{server.url}/0', tmp_path / 'part')
        return
    with pytest.raises(Unusable) as caught:
        get(f'{server.url}/0', tmp_path / 'part')
    assert str(caught.value) == ('more than 5 redirects, the last one to '
                                 f'{server.url}/6')


def _moved(code: int, where: str) -> Answer:
    return lambda handler: handler.send(code, headers={'Location': where})


def test_no_downgrade(tmp_path: Path, server: FaultyServer,
                      monkeypatch: pytest.MonkeyPatch) -> None:
    '''From https only https; a certificate nobody knows is refused.'''
    ssl = pytest.importorskip('ssl')
    pem = tmp_path / 'pem'
    made = subprocess.run(
        ['openssl', 'req', '-x509', '-newkey', 'rsa:2048', '-nodes',
         '-keyout', pem, '-out', tmp_path / 'crt', '-subj', '/CN=localhost',
         '-addext', 'subjectAltName=IP:127.0.0.1'], check=False,
        capture_output=True)
    if made.returncode:
        pytest.skip('openssl makes no certificate')
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / 'crt', pem)
    with serving() as secure:
        secure.http.socket = context.wrap_socket(secure.http.socket,
                                                 server_side=True)
        url = f'https://{secure.host}'
        secure.answers['/file'] = [redirect(f'{server.url}/file?s3cret')]
        secure.answers['/good'] = [ranged(BODY)]
        secure.answers['/slow'] = [drip(BODY)]
        with pytest.raises(TransferError, match='certificate'):
            get(f'{url}/good', tmp_path / 'part')
        monkeypatch.setenv('SSL_CERT_FILE', str(tmp_path / 'crt'))
        with pytest.raises(Unusable) as caught:
            get(f'{url}/file', tmp_path / 'part')
        assert str(caught.value) == (f'redirect to {server.url}/file is not '
                                     'allowed')
        assert not server.asked
        with pytest.raises(TransferError, match='too slow'):
            get(f'{url}/slow', tmp_path / 'part')
        get(f'{url}/good', tmp_path / 'part')
        server.answers['/up'] = [redirect(f'{url}/good')]
        (tmp_path / 'part').unlink()
        get(f'{server.url}/up', tmp_path / 'part')


def test_proxy(server: FaultyServer, tmp_path: Path,
               monkeypatch: pytest.MonkeyPatch) -> None:
    '''By the usual variables; its password is not told to others.'''
    with serving() as proxy:
        monkeypatch.setenv('http_proxy', f'http://pro:xy@{proxy.host}')
        monkeypatch.setenv('no_proxy', '127.0.0.1')
        url = 'http://store.invalid/file'
        proxy.answers[url] = [redirect(f'{server.url}/file')]
        server.answers['/file'] = [whole(BODY)]
        get(url, tmp_path / 'part')
        assert proxy.headers[0]['Proxy-Authorization'] == 'Basic cHJvOnh5'
        assert 'Proxy-Authorization' not in server.headers[0]
        proxy.answers[url] = [status(407)]
        with pytest.raises(TransferError) as caught:
            get(url, tmp_path / 'part2')
        assert str(caught.value).startswith('HTTP error 407')
        # Through a proxy that makes no tunnel
        monkeypatch.setenv('https_proxy', f'http://pro:xy@{proxy.host}')
        with pytest.raises(TransferError) as caught:
            get('https://store.invalid/file', tmp_path / 'part2')
        assert 'xy@' not in str(caught.value)


def test_ipv6_only(tmp_path: Path) -> None:
    '''A store that has no other address.'''
    try:
        with serving(ipv6=True) as server:
            server.answers['/file'] = [short(BODY, 9), ranged(BODY)]
            url = f'http://me:secret@{server.host}/file'
            with pytest.raises(TransferError):
                get(url, tmp_path / 'part')
            get(url, tmp_path / 'part')
            assert server.headers[1]['Host'] == server.host
            assert shown(url) == f'http://{server.host}/file'
    except OSError as e:
        pytest.skip(f'no IPv6 here: {e}')


# -- What is shown ----------------------------------------------------------

@pytest.mark.parametrize('source, text', [
    ('http://u:p@h:1/a/b?c=d#e', 'http://h:1/a/b'),
    ('https://u@ser:p@[::1]:9/x;y?sig', 'https://[::1]:9/x;y'),
    ('http://[::1/x', 'a URL that is none'),
    ('/srv/a@b?c', '/srv/a@b?c'), ('/srv/\x1b[2J', '/srv/?[2J'),
    ('http://h/' + 'a' * 999, 'http://h/' + 'a' * 191)])
def test_shown(source: str, text: str) -> None:
    '''Scheme, host and path.'''
    assert shown(source) == text


@pytest.mark.parametrize('url', [
    'http://u:s3cret@no..host/x', 'http://u:s3cret@h:port/x?s3cret',
    'http://u:s3cret@127.0.0.1:1/x', 'http://u:s3cret@[::1/x',
    'http://127.0.0.1:1/s 3?s3cret', 'http://ünknown.invalid:1/ä?s3cret',
    'ftp://u:s3cret@h/', 'data:,s3cret', 'gopher://h/', 'http:///x'])
def test_odd_source(url: str, tmp_path: Path) -> None:
    '''Whatever it is called, it is an error of the source, without secrets.'''
    with pytest.raises(TransferError) as caught:
        get(url, tmp_path / 'part', Limits(silence=2))
    assert 's3cret' not in str(caught.value)
    assert not (tmp_path / 'part').exists()
    with pytest.raises(TransferError):
        check(url, Limits(silence=2))


def test_terminal(server: FaultyServer, tmp_path: Path) -> None:
    '''What a server says does not reach the terminal as it is.'''
    server.answers['/file'] = [raw(b'\x1b]0;x\x07' * 99)]
    with pytest.raises(TransferError) as caught:
        get(f'{server.url}/file', tmp_path / 'part')
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) <= 200


# -- Folders ----------------------------------------------------------------

def test_folder(tmp_path: Path) -> None:
    '''Another name of the same file, unless that may be written to.'''
    source, part = tmp_path / 'source', tmp_path / 'part'
    source.write_bytes(BODY)
    part.write_bytes(BODY[:100])
    get(str(source), part)
    assert not part.samefile(source) and part.read_bytes() == BODY
    source.chmod(0o444)
    (tmp_path / 'link').symlink_to('source')
    get(str(tmp_path / 'link'), part)
    assert part.samefile(source) and not part.is_symlink()


def test_bad_folder(tmp_path: Path) -> None:
    '''Nothing of it is kept, and nothing hangs.'''
    part = tmp_path / 'part'
    source = tmp_path / 'source'
    kinds: List[Type[TransferError]] = []

    def fails(path: Path = source) -> str:
        with pytest.raises(TransferError) as caught:
            get(str(path), part)
        assert not part.exists()
        kinds.append(type(caught.value))
        return str(caught.value)

    assert fails() == 'no such file'
    assert fails(source / 'x') == 'no such folder'
    source.write_bytes(OTHER)
    assert 'expected SHA-256' in fails()
    source.chmod(0o444)
    assert 'expected SHA-256' in fails()
    assert source.read_bytes() == OTHER
    source.unlink()
    source.write_bytes(b'x')
    assert fails() == f'expected a file of {len(BODY)} bytes, found 1'
    source.unlink()
    os.mkfifo(source)
    assert fails().endswith('found something else')
    source.unlink()
    source.mkdir()
    assert fails().endswith('found something else')
    source.rmdir()
    source.symlink_to('source')
    fails()
    assert kinds == [Missing, TransferError, Wrong, Wrong, Unusable,
                     Unusable, Unusable, TransferError]


# -- Several sources --------------------------------------------------------

def test_all_fail(server: FaultyServer, tmp_path: Path) -> None:
    '''Each is named once, with its last word; who lacks it is left alone.'''
    server.answers['/broken/x'] = [status(500)]
    sources = [f'http://u:s3cret@{server.host}/lacks/x?s3cret',
               f'{server.url}/broken/x', str(tmp_path / 'x')]
    with pytest.raises(Failed) as caught:
        transfer_from_any(sources, tmp_path / 'part', 9, SHA256, pause=0,
                          limits=LIMITS)
    assert str(caught.value) == (
        f'{server.url}/lacks/x: HTTP error 404 (Not Found); '
        f'{server.url}/broken/x: HTTP error 500 (Internal Server Error); '
        f'{tmp_path}/x: no such file')
    assert caught.value.passes and not caught.value.missing
    assert server.asked == ['/lacks/x?s3cret'] + ['/broken/x'] * 3
    with pytest.raises(Failed) as caught:
        transfer_from_any(sources[::2], tmp_path / 'part', 9, SHA256)
    assert caught.value.missing and not caught.value.passes


# -- This machine's faults --------------------------------------------------

def test_no_space(server: FaultyServer, tmp_path: Path) -> None:
    '''Not the server's fault: at any byte, an OSError that has the name.'''
    server.answers['/file'] = [ranged(BODY)]
    part = tmp_path / 'part'
    script = f'''
import resource, sys
from pathlib import Path
from mkosi_build.transfer import transfer
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
try:
    transfer({server.url + '/file'!r}, Path({str(part)!r}), {len(BODY)},
             {SHA256!r})
except OSError as e:
    assert e.filename == {str(part)!r}, e
    sys.exit(9)
'''
    for limit in (0, 1, 4096, 65536, 65537, len(BODY) - 1, len(BODY)):
        result = subprocess.run(
            [sys.executable, '-c', script, str(limit)], check=False,
            env={'PYTHONPATH': 'scripts', 'no_proxy': '*'},
            stderr=subprocess.PIPE)
        assert result.returncode == (0 if limit == len(BODY) else 9), result
        assert BODY.startswith(part.read_bytes())
    assert part.read_bytes() == BODY


KILLED = '''
import io, os, random, signal, sys, time
from mkosi_build import store as stores
from mkosi_build.cache import Cache
from mkosi_build.lock import Package
from mkosi_build.report import Report
from mkosi_build.cache import sha256_file
store = stores.Store(Cache(), Report(stream=io.StringIO()))
packages = [Package(f'p{i}', '1', f'p{i}', *p, 'amd64', f'p{i}=1')
            for i, p in enumerate(PACKAGES)]
chance = random.Random(3)
whole = killed = 0
for _ in range(TIMES):
    pid = os.fork()
    if pid == 0:
        store.fetch(packages, 'debian', 'test')
        os._exit(0)
    time.sleep(chance.uniform(0, 0.1))
    os.kill(pid, signal.SIGKILL)
    killed += os.waitpid(pid, 0)[1] == signal.SIGKILL
    seen = [p for p in store.folder.glob('*') if len(p.name) == 64]
    for path in seen:
        assert sha256_file(path) == path.name, path
    if len(seen) == len(packages):
        whole += 1
        for path in seen:
            path.unlink()
print(killed, whole)
'''


@pytest.mark.slow
def test_kill_package_store(server: FaultyServer, tmp_path: Path) -> None:
    '''
    Killed 200 times while it fetches: what has a name is whole, what was
    there is gone on from, and a plain run succeeds.
    '''
    bodies = [random.Random(i).randbytes(500_000) for i in range(4)]
    for i, body in enumerate(bodies):
        server.answers[f'/p{i}'] = [throttled(body, 10_000_000)]
    packages = [(hashlib.sha256(b).hexdigest(), len(b)) for b in bodies]
    # Without a PATH there is no apt to ask for mirrors, which takes a while
    env = {'PYTHONPATH': 'scripts', 'no_proxy': '*',
           'PATH': str(tmp_path), 'QEMU_MKOSI_MIRROR': server.url,
           'QEMU_MKOSI_DIR': str(tmp_path / 'cache')}
    result = subprocess.run(
        [sys.executable, '-c', KILLED.replace(
            'PACKAGES', repr(packages)).replace('TIMES', '200')],
        check=True, env=env, stdout=subprocess.PIPE, encoding='utf-8')
    killed, whole_sets = map(int, result.stdout.split())
    assert killed > 50 and whole_sets
    assert any('Range' in headers for headers in server.headers)
    script = KILLED.partition('chance =')[0].replace(
        'PACKAGES', repr(packages)) + "store.fetch(packages, 'debian', '')"
    subprocess.run([sys.executable, '-c', script], check=True, env=env)
    assert {p.name: p.read_bytes() for p in
            (tmp_path / 'cache/store').iterdir()} == {
        sha256: body for (sha256, _), body in zip(packages, bodies)}
