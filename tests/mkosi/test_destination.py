# SPDX-License-Identifier: GPL-2.0-or-later
'''
One object to one destination, of each kind, and all that a server can do to
it. Whatever happens, nothing that looks whole is not, nothing is
overwritten, and the token is nowhere to be read.
'''

import hashlib
import os
from pathlib import Path
import random
import resource
import signal
import socket
import threading
import time
from typing import Any, Callable, Dict, Iterator, List

import pytest

from fixtures_publish import (
    NEEDS_NGINX, PREFIX, TOKEN, Fault, Nginx, PutServer, answers, corrupts,
    dies, loses, refuses, sends_half, stores_and_dies)
from mkosi_build import upload
from mkosi_build.destination import Destination, Item
from mkosi_build.error import PublishError, UsageError
from mkosi_build.upload import Server, at

pytest_plugins = ['fixtures_publish']

BODY = random.Random(1).randbytes(300_000)
DIGEST = hashlib.sha256(BODY).hexdigest()
OTHER = bytes(reversed(BODY))
MakeServer = Callable[..., PutServer]


@pytest.fixture(name='item')
def fixture_item(tmp_path: Path) -> Item:
    '''An object to publish.'''
    path = tmp_path / 'disk.qcow2'
    path.write_bytes(BODY)
    return Item(DIGEST, path, DIGEST, len(BODY))


@pytest.fixture(name='waits', autouse=True)
def fixture_waits(monkeypatch: pytest.MonkeyPatch) -> List[float]:
    '''How long it would have waited. Nobody does here.'''
    waits: List[float] = []
    monkeypatch.setattr(Destination, '_pause',
                        lambda _self, seconds: waits.append(seconds))
    return waits


class Place:
    '''A destination with what others see there.'''

    def __init__(self, destination: Destination,
                 visible: Callable[[], Dict[str, bytes]],
                 place: Callable[[str, bytes], None]) -> None:
        self.destination = destination
        self.can_remove = False
        self.visible = visible
        self.place = place


def folder_place(folder: Path, where: str) -> Place:
    '''One whose objects are files of @folder.'''
    def put(name: str, data: bytes) -> None:
        (folder / name).write_bytes(data)

    return Place(at(where),
                 lambda: {path.name: path.read_bytes()
                          for path in folder.iterdir()}, put)


def server_place(server: PutServer) -> Place:
    '''One on a stand-in for a server.'''
    return Place(at(server.where, TOKEN if server.tokens else ''),
                 server.visible, server.store)


@pytest.fixture(name='place', params=[
    'folder', 'gitlab', 'dav', 'plain',
    pytest.param('nginx', marks=NEEDS_NGINX),
    pytest.param('small_nginx', marks=NEEDS_NGINX)])
def fixture_place(request: pytest.FixtureRequest,
                  tmp_path: Path) -> Iterator[Place]:
    '''Each kind of destination.'''
    if request.param == 'folder':
        (tmp_path / 'there').mkdir()
        yield folder_place(tmp_path / 'there', str(tmp_path / 'there'))
    elif 'nginx' in request.param:
        nginx: Nginx = request.getfixturevalue(request.param)
        place = folder_place(nginx.files, nginx.where)
        place.can_remove = request.param == 'nginx'
        yield place
    else:
        make = request.getfixturevalue('put_server')
        place = server_place(make(request.param))
        place.can_remove = request.param != 'gitlab'
        yield place


def fails(destination: Destination, item: Item) -> str:
    '''Why @item can't be added; without the token in it.'''
    with pytest.raises(PublishError) as e:
        destination.add(item)
    assert e.value.exit_code == 8
    assert e.value.next_step
    assert TOKEN not in f'{e.value!r} {e.value}'
    return str(e.value)


# The way it should go

def test_add(place: Place, item: Item) -> None:
    '''Uploaded once, found afterwards.'''
    there = place.destination
    assert there.size(DIGEST) is None
    assert there.read(DIGEST) is None
    assert there.add(item)
    assert place.visible() == {DIGEST: BODY}
    assert not there.add(item)
    assert place.visible() == {DIGEST: BODY}
    assert there.size(DIGEST) == len(BODY)
    assert there.read(DIGEST) == BODY


@pytest.mark.parametrize('other', [OTHER, BODY + b'more', b'less'])
def test_other_bytes(place: Place, item: Item, other: bytes) -> None:
    '''Refused, with both hashes, and left as they are.'''
    place.place(DIGEST, other)
    said = fails(place.destination, item)
    assert DIGEST in said and hashlib.sha256(other).hexdigest() in said
    assert 'nothing was overwritten' in said
    assert place.visible() == {DIGEST: other}


@pytest.mark.parametrize('length', [0, 1, 200_000])
def test_cut_off(place: Place, item: Item, length: int) -> None:
    '''
    Half an object under a whole one's hash is what an upload left that was
    cut off: it makes way where that can be.
    '''
    place.place(DIGEST, BODY[:length])
    if place.can_remove:
        assert place.destination.add(item)
        assert place.visible() == {DIGEST: BODY}
    else:
        # Of which there never is half an object
        fails(place.destination, item)
        assert place.visible() == {DIGEST: BODY[:length]}


def test_an_index_is_never_removed(place: Place, item: Item) -> None:
    '''Its name says nothing of its bytes.'''
    place.place('index.json', BODY[:100])
    fails(place.destination, Item('index.json', item.path, item.sha256,
                                  item.size))
    assert place.visible() == {'index.json': BODY[:100]}


def test_empty(place: Place, tmp_path: Path) -> None:
    '''An object may have no bytes.'''
    (tmp_path / 'empty').touch()
    digest = hashlib.sha256().hexdigest()
    empty = Item(digest, tmp_path / 'empty', digest, 0)
    assert place.destination.add(empty)
    assert not place.destination.add(empty)
    assert place.visible() == {digest: b''}


def test_many_publishers(place: Place, item: Item) -> None:
    '''All at once, of the same object: all end well.'''
    errors: List[BaseException] = []

    def work() -> None:
        try:
            place.destination.add(item)
        except BaseException as e:    # pylint: disable=broad-except
            errors.append(e)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert place.visible() == {DIGEST: BODY}


def test_the_source_changes(place: Place, item: Item) -> None:
    '''Then that is said, and not that the server is to blame.'''
    item.path.write_bytes(OTHER)
    assert 'has changed' in fails(place.destination, item)


# Faults of a server

@pytest.fixture(name='server', params=['gitlab', 'dav', 'plain'])
def fixture_server(request: pytest.FixtureRequest,
                   put_server: MakeServer) -> PutServer:
    '''Each kind of server.'''
    server = put_server(request.param)
    server.tokens = {'PRIVATE-TOKEN': TOKEN}
    return server


def to(server: PutServer) -> Destination:
    '''The destination.'''
    return at(server.where, f'PRIVATE-TOKEN:{TOKEN}')


@pytest.mark.parametrize('method, fault', [
    ('PUT', answers(503)), ('PUT', answers(429)), ('PUT', answers(500)),
    ('PUT', answers(409)), ('PUT', refuses(502)), ('PUT', dies(0)),
    ('PUT', dies(100_000)), ('PUT', stores_and_dies), ('PUT', loses),
    ('GET', answers(503)), ('GET', dies(0))])
def test_what_passes(method: str, fault: Fault, server: PutServer,
                     item: Item) -> None:
    '''A fault that comes four times is one to outlast.'''
    server.faults[method] = [fault] * 4
    to(server).add(item)
    assert server.visible()[DIGEST] == BODY
    assert all(name.startswith('tmp-') for name in server.visible()
               if name != DIGEST)


@pytest.mark.parametrize('fault, said', [
    (answers(503, 'maintenance'), 'HTTP 503 Service Unavailable: maint'),
    (answers(429), 'HTTP 429'), (dies(100), 'after 5 tries')])
def test_what_does_not_pass(fault: Fault, said: str, server: PutServer,
                            item: Item, waits: List[float]) -> None:
    '''Five tries, with more patience each time.'''
    server.faults['PUT'] = [fault] * 100
    message = fails(to(server), item)
    assert said in message and 'gave up after 5 tries' in message
    assert server.count('PUT') == 5
    assert waits == [1, 2, 4, 8]
    assert DIGEST not in server.visible() or server.kind == 'plain'


@pytest.mark.parametrize('path', ['/images', PREFIX])
def test_the_server_is_gone(path: str, item: Item) -> None:
    '''Nobody listens.'''
    with socket.socket() as nobody:
        nobody.bind(('127.0.0.1', 0))
        port = nobody.getsockname()[1]
        assert 'refused' in fails(at(f'http://127.0.0.1:{port}{path}'), item)


@pytest.mark.parametrize('code', [400, 401, 403, 404, 405, 413, 507, 501])
@pytest.mark.parametrize('fault', [answers, refuses])
def test_refused(code: int, fault: Callable[[int], Fault],
                 server: PutServer, item: Item) -> None:
    '''At once, with what the server said.'''
    server.faults['PUT'] = [fault(code)] * 9
    said = fails(to(server), item)
    assert f'HTTP {code}' in said
    assert server.count('PUT') == 1
    assert ('QEMU_MKOSI_PUBLISH_TOKEN' in said) == (code in (401, 403))
    assert not server.visible()


def test_stored_wrongly_once(server: PutServer, item: Item) -> None:
    '''What was stored wrongly is stored again, where that can be.'''
    server.faults['PUT'] = [corrupts]
    if server.kind == 'gitlab':
        said = fails(to(server), item)
        assert DIGEST in said
        return
    assert to(server).add(item)
    assert server.visible() == {DIGEST: BODY}


def test_stored_wrongly_always(server: PutServer, item: Item) -> None:
    '''And if that does not help, it is said, with both hashes.'''
    server.faults['PUT'] = [corrupts] * 100
    said = fails(to(server), item)
    bent = bytearray(BODY)
    bent[len(bent) // 2] ^= 1
    assert DIGEST in said or server.kind == 'plain'
    if server.kind == 'dav':
        assert hashlib.sha256(bent).hexdigest() in said
        assert not server.visible()


def test_half_an_answer(server: PutServer, item: Item) -> None:
    '''Reading back may break off, too.'''
    to(server).add(item)
    server.faults['GET'] = [sends_half] * 4
    assert not to(server).add(item)
    server.faults['GET'] = [sends_half] * 5
    assert 'connection closed after 150000 of 300000' in fails(to(server),
                                                               item)


def test_reads_differently(server: PutServer, item: Item) -> None:
    '''Bytes that come out wrong once are no reason to refuse.'''
    to(server).add(item)
    server.faults['GET'] = [answers(200, 'garbled')]
    assert not to(server).add(item)
    assert server.visible() == {DIGEST: BODY}


@pytest.mark.slow
def test_slow_loris(gitlab: PutServer, item: Item,
                    monkeypatch: pytest.MonkeyPatch) -> None:
    '''A few bytes now and then are too slow.'''
    to(gitlab).add(item)

    def trickle(handler: Any) -> None:
        handler.send_response(200)
        handler.send_header('Content-Length', str(len(BODY)))
        handler.end_headers()
        for _ in range(1200):
            handler.wfile.write(BODY[:100])
            time.sleep(0.05)

    gitlab.faults['GET'] = [trickle]
    monkeypatch.setattr(upload, 'TIMEOUT', 2)
    monkeypatch.setattr(upload, 'SLOWEST', 1e9)
    monkeypatch.setattr(upload, 'CHUNK', 100)
    start = time.monotonic()
    assert not to(gitlab).add(item)
    assert time.monotonic() - start < 50


def test_silence(server: PutServer, item: Item,
                 monkeypatch: pytest.MonkeyPatch) -> None:
    '''And no answer at all is none.'''
    def silent(_handler: Any) -> None:
        time.sleep(1)

    server.faults['PUT'] = [silent] * 5
    monkeypatch.setattr(upload, 'TIMEOUT', 0.1)
    assert 'timed out' in fails(to(server), item)


@pytest.mark.parametrize('headers, expected', [
    ({'Retry-After': '7'}, 7), ({'Retry-After': '100000'}, 300),
    ({'Retry-After': '0'}, 1), ({'Retry-After': 'soon'}, 1),
    ({'Retry-After': '-5'}, 1),
    # Its clock is what it goes by, however wrong
    ({'Date': 'Sat, 01 Jan 2000 00:00:00 GMT',
      'Retry-After': 'Sat, 01 Jan 2000 00:00:20 GMT'}, 20),
    ({'Date': 'Sat, 01 Jan 2000 00:00:20 GMT',
      'Retry-After': 'Sat, 01 Jan 2000 00:00:00 GMT'}, 1)])
@pytest.mark.parametrize('code', [429, 503])
def test_retry_after(code: int, headers: Dict[str, str], expected: float,
                     gitlab: PutServer, item: Item,
                     waits: List[float]) -> None:
    '''What the server asks for, within reason.'''
    def fault(handler: Any) -> None:
        handler.body()
        handler.send_response_only(code)
        for name, value in {'Content-Length': '0', **headers}.items():
            handler.send_header(name, value)
        handler.end_headers()

    gitlab.faults['PUT'] = [fault]
    assert to(gitlab).add(item)
    assert expected in waits


# GitLab's own ways

def test_documented_request(gitlab: PutServer, item: Item) -> None:
    '''As the documentation has it.'''
    to(gitlab).add(item)
    assert [asked for asked in gitlab.asked if asked[0] == 'PUT'] == [
        ('PUT', DIGEST, 'status=default')]
    [headers] = [headers for headers, asked in zip(
        gitlab.headers, gitlab.asked) if asked[0] == 'PUT']
    assert headers['Content-Length'] == str(len(BODY))
    assert 'Transfer-Encoding' not in headers


@pytest.mark.parametrize('kind', upload.KINDS)
def test_kinds_of_tokens(kind: str, gitlab: PutServer, item: Item) -> None:
    '''Each has its header.'''
    gitlab.tokens = {kind: TOKEN}
    gitlab.public = False
    assert at(gitlab.where, f'{kind}:{TOKEN}').add(item)
    assert gitlab.visible() == {DIGEST: BODY}
    wrong = next(k for k in upload.KINDS if k != kind)
    assert 'HTTP 401' in fails(at(gitlab.where, f'{wrong}:{TOKEN}'), item)
    assert 'set QEMU_MKOSI_PUBLISH_TOKEN' in fails(at(gitlab.where), item)


@pytest.mark.parametrize('duplicates', [True, False])
def test_somebody_was_quicker(duplicates: bool, gitlab: PutServer,
                              item: Item) -> None:
    '''Between our look and our upload.'''
    gitlab.duplicates = duplicates

    def quicker(handler: Any) -> None:
        gitlab.store(handler.name, BODY)
        getattr(handler, '_put')()

    gitlab.faults['PUT'] = [quicker]
    to(gitlab).add(item)
    assert gitlab.visible() == {DIGEST: BODY}


def test_somebody_was_quicker_with_other_bytes(gitlab: PutServer,
                                               item: Item) -> None:
    '''And GitLab takes one of a name.'''
    gitlab.duplicates = False

    def quicker(handler: Any) -> None:
        gitlab.store(handler.name, OTHER)
        getattr(handler, '_put')()

    gitlab.faults['PUT'] = [quicker]
    assert hashlib.sha256(OTHER).hexdigest() in fails(to(gitlab), item)
    assert gitlab.visible() == {DIGEST: OTHER}


def test_object_storage(gitlab: PutServer, put_server: MakeServer,
                        item: Item) -> None:
    '''GitLab sends readers elsewhere; the token stays with GitLab.'''
    storage = put_server('plain')
    storage.files = gitlab.files
    # A signature is for one method
    storage.faults['HEAD'] = [refuses(403)] * 9
    gitlab.storage = storage.where
    gitlab.public = False
    there = to(gitlab)
    assert there.add(item)
    assert there.size(DIGEST) == len(BODY)
    assert there.read(DIGEST) == BODY
    assert storage.count('GET')
    assert not [headers for headers in storage.headers
                if TOKEN in str(headers)]


def test_redirect_on_the_same_server(gitlab: PutServer,
                                     item: Item) -> None:
    '''It may see the token again.'''
    gitlab.public = False
    to(gitlab).add(item)
    gitlab.faults['GET'] = [answers(302, headers={
        'Location': f'{gitlab.where}/{DIGEST}'})]
    assert not to(gitlab).add(item)


@pytest.mark.parametrize('location', [
    'file:///etc/passwd', 'ftp://example.org/x', 'gopher://example.org'])
def test_redirect_to_a_file(location: str, gitlab: PutServer,
                            item: Item) -> None:
    '''Never.'''
    gitlab.faults['GET'] = [answers(302, headers={'Location': location})] * 9
    assert 'HTTP 302' in fails(to(gitlab), item)


def test_redirect_of_an_upload(gitlab: PutServer, item: Item) -> None:
    '''Is the user's to decide on; a signature is not shown.'''
    gitlab.faults['PUT'] = [answers(307, 'go to s1g', headers={
        'Location': 'https://u:pw@other.example.org/x?signature=s1g'})]
    said = fails(to(gitlab), item)
    assert 'HTTP 307, to https://other.example.org' in said
    assert 's1g' not in said and 'pw' not in said


def test_redirects_without_end(gitlab: PutServer, item: Item) -> None:
    '''Some are enough.'''
    gitlab.faults['GET'] = [answers(302, headers={
        'Location': f'{gitlab.where}/{DIGEST}{n}'}) for n in range(99)]
    assert 'HTTP 302' in fails(to(gitlab), item)
    assert gitlab.count('GET') < 10


def test_a_server_that_repeats_the_token(gitlab: PutServer,
                                         item: Item) -> None:
    '''Is not repeated.'''
    gitlab.faults['PUT'] = [answers(403, f'bad token {TOKEN}, sorry')]
    assert 'bad token ***, sorry' in fails(to(gitlab), item)


# Other servers' ways

@NEEDS_NGINX
def test_nginx_sees_nothing_half_made(nginx: Nginx, item: Item) -> None:
    '''Under another name until it was read back.'''
    at(nginx.where).add(item)
    said = nginx.log.read_text()
    # The first MOVE only asks whether it knows that
    put, read, move = [said.rindex(f'"{method} /images/tmp-') for method
                       in ('PUT', 'GET', 'MOVE')]
    assert put < read < move
    assert f'PUT /images/{DIGEST}' not in said


@NEEDS_NGINX
def test_nginx_that_can_only_put(small_nginx: Nginx, item: Item) -> None:
    '''Then that has to do.'''
    there = at(small_nginx.where)
    assert isinstance(there, Server)
    assert there.add(item)
    assert there.moves is False
    assert small_nginx.visible()[DIGEST] == BODY


def test_password(put_server: MakeServer, item: Item) -> None:
    '''User name and password become a header, and are hidden.'''
    server = put_server('dav')
    server.tokens = {'Authorization': 'Basic bWU6aHVzaCE='}
    where = server.where.replace('//', '//me:hush%21@')
    there = at(where)
    assert there.add(item)
    assert 'hush' not in there.shown
    server.faults['GET'] = [answers(403, 'hush! bWU6aHVzaCE=')]
    said = fails(there, item)
    assert 'hush' not in said and 'bWU6' not in said


def test_bearer(put_server: MakeServer, item: Item) -> None:
    '''What other servers take for a token.'''
    server = put_server('dav')
    server.tokens = {'Authorization': f'Bearer {TOKEN}'}
    assert at(server.where, TOKEN).add(item)


def test_ipv6(put_server: MakeServer, item: Item) -> None:
    '''A server that has no other address.'''
    try:
        server = put_server('gitlab', '::1')
    except OSError:
        pytest.skip('needs IPv6')
    assert at(server.where, TOKEN).add(item)


def test_no_proxy_for_this_host(gitlab: PutServer, item: Item,
                                monkeypatch: pytest.MonkeyPatch) -> None:
    '''It would read the token.'''
    monkeypatch.delenv('no_proxy')
    with socket.socket() as nobody:
        nobody.bind(('127.0.0.1', 0))
        monkeypatch.setenv('http_proxy', 'http://127.0.0.1:'
                           f'{nobody.getsockname()[1]}')
        assert to(gitlab).add(item)


# Folders

def test_temporary_files(tmp_path: Path, item: Item) -> None:
    '''A dead publisher's of this host go; others' stay.'''
    host = socket.gethostname()
    stays = [f'.a.{host}.{os.getpid()}.tmp', f'.a.not-{host}.999999999.tmp']
    for name in (*stays, f'.a.{host}.999999999.tmp'):
        (tmp_path / name).write_text('half')
    at(str(tmp_path)).add(item)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        [*stays, DIGEST, 'disk.qcow2'])
    assert (tmp_path / DIGEST).stat().st_mode & 0o777 == 0o444


def test_disk_full(tmp_path: Path, item: Item) -> None:
    '''At any byte: nothing is there, and then all is.'''
    there = at(str(tmp_path))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        for limit in (0, 1, 65536, 299_999):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
            try:
                with pytest.raises(PublishError) as e:
                    there.add(item)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            assert 'free some space' in str(e.value)
            assert [p.name for p in tmp_path.iterdir()] == ['disk.qcow2']
    finally:
        signal.signal(signal.SIGXFSZ, before)
    assert there.add(item)


def test_no_folder(tmp_path: Path) -> None:
    '''It may be one that is not mounted.'''
    with pytest.raises(PublishError, match='no such folder'):
        at(str(tmp_path / 'nowhere'))


def test_no_links(tmp_path: Path, item: Item,
                  monkeypatch: pytest.MonkeyPatch) -> None:
    '''A file system without hard links.'''
    def link(*_args: object) -> None:
        raise PermissionError(1, 'Operation not permitted')

    monkeypatch.setattr(os, 'link', link)
    assert at(str(tmp_path)).add(item)
    assert not at(str(tmp_path)).add(item)
    assert (tmp_path / DIGEST).read_bytes() == BODY


# What the user says

@pytest.mark.parametrize('where', [
    'relative/path', 'ftp://example.org/x', 'https://', 'https:///x',
    'http://[::1/x', 'https://example.org:port/x', 'https://example.org/?q',
    'https://example.org/#f', 'https://example.org/ x', 's3://bucket'])
def test_wrong_destination(where: str) -> None:
    '''Before any work.'''
    with pytest.raises(UsageError, match='expected an absolute path'):
        at(where)


@pytest.mark.parametrize('where, token', [
    ('http://example.org/api/v4/projects/1/packages/generic/a/1', TOKEN),
    ('http://example.org/dav', TOKEN), ('http://me:hush@example.org', ''),
    ('http://127.0.0.1.example.org/', TOKEN)])
def test_in_the_clear(where: str, token: str) -> None:
    '''A token does not go where others read it.'''
    with pytest.raises(UsageError, match='write it as https') as e:
        at(where, token)
    assert TOKEN not in str(e.value) and 'hush' not in str(e.value)


@pytest.mark.parametrize('token', [
    'FOO:' + TOKEN, f'{TOKEN} x', f'{TOKEN}\r\nX: y', 'PRIVATE-TOKEN:',
    f'private-token:{TOKEN}', f'{TOKEN}é'])
def test_wrong_token(token: str) -> None:
    '''It is not shown.'''
    with pytest.raises(UsageError, match='KIND:TOKEN') as e:
        at('https://example.org/packages/generic/a/1', token)
    assert TOKEN not in str(e.value)


def test_configured(monkeypatch: pytest.MonkeyPatch,
                    gitlab: PutServer, item: Item) -> None:
    '''By the environment, of which programs do not see the token.'''
    assert upload.configured() is None
    monkeypatch.setenv('QEMU_MKOSI_PUBLISH', gitlab.where)
    monkeypatch.setenv('QEMU_MKOSI_PUBLISH_TOKEN', TOKEN)
    there = upload.configured()
    assert there and there.add(item)
    assert 'QEMU_MKOSI_PUBLISH_TOKEN' not in os.environ
