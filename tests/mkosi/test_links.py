# SPDX-License-Identifier: GPL-2.0-or-later
'''
--check-links: what stores and mirrors say of what the registry and the
locks name, asked over real connections.
'''

from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from functools import partial
import io
import json
from pathlib import Path
import socket
import threading
import time
from typing import Any, Dict, List, Mapping, Optional, Tuple

import pytest

from fixtures_builder import (Answer, FaultServer, Handler, redirect, reset,
                              silence, status)
from fixtures_upkeep import KINDS, Upkeep, body, package, sha
from mkosi_build import cli, links, store
from mkosi_build.error import BuildError, FetchError, UsageError
from mkosi_build.links import Asker
from mkosi_build.report import Report

pytest_plugins = ('fixtures_builder', 'fixtures_upkeep')

SECRET = 'user:sesame@'
# All that the tree of the tests names
PACKAGES = [package(name) for name in ('common', 'hammer', 'one', 'two')]
ARTEFACTS = [name + kind for name in ('one', 'two') for kind in KINDS]


class HeadHandler(Handler):
    '''Takes HEAD too, and notes who is there at once.'''

    def do_HEAD(self) -> None:      # pylint: disable=invalid-name
        '''As GET, but send() leaves the body out.'''
        self.do_GET()

    def do_GET(self) -> None:
        '''Answer, and count.'''
        web = self.faults
        assert isinstance(web, Web)
        with web.guard:
            web.methods.append(f'{self.command} {self.path}')
            web.now += 1
            web.most = max(web.most, web.now)
        time.sleep(web.pause)
        # Who has the answer may ask again before this function ends
        with web.guard:
            web.now -= 1
        super().do_GET()

    def send(self, code: int, body: bytes = b'',
             headers: Optional[Mapping[str, str]] = None) -> None:
        '''Send one response, to HEAD without the body.'''
        # pylint: disable=redefined-outer-name
        length = {'Content-Length': str(len(body)), **(headers or {})}
        super().send(code, b'' if self.command == 'HEAD' else body, length)


class Web(FaultServer):
    '''A store and a mirror that has all of the tree's files.'''

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.http.RequestHandlerClass = partial(
            HeadHandler, self)
        self.root = folder
        self.methods: List[str] = []
        self.now = self.most = 0
        self.pause = 0.0
        (folder / 'pool').mkdir(parents=True)
        for one in PACKAGES:
            (folder / one.location).write_bytes(body(one.source))
        for name in ARTEFACTS:
            (folder / sha(name)).write_bytes(body(name))
        self.thread = threading.Thread(
            target=self.http.serve_forever, daemon=True,
            kwargs={'poll_interval': 0.01})
        self.thread.start()

    def end(self) -> None:
        '''No longer there.'''
        self.ending.set()
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()


@pytest.fixture(name='webs')
def fixture_webs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    '''Two that have everything, and are all that is known.'''
    monkeypatch.setattr(store, '_apt_mirrors', lambda distribution: [])
    webs = [Web(tmp_path / 'web0'), Web(tmp_path / 'web1')]
    urls = ' '.join(web.url for web in webs)
    monkeypatch.setenv('QEMU_MKOSI_MIRROR', urls)
    monkeypatch.setenv('QEMU_TEST_MKOSI_STORES', urls)
    yield webs
    for web in webs:
        web.end()


Events = List[Dict[str, Any]]


def asked(upkeep: Upkeep, timeout: float = 20) -> Tuple[
        Events, Optional[BuildError]]:
    '''What is told, and the error in the end.'''
    stream = io.StringIO()
    error = None
    try:
        links.check(upkeep.registry, upkeep.chosen, Report(True, stream),
                    Asker(timeout=timeout, pause=0.01))
    except FetchError as e:
        error = e
    return [json.loads(line)
            for line in stream.getvalue().splitlines()], error


def of(events: Events, kind: str) -> Events:
    '''Those of one @kind.'''
    return [event for event in events if event['event'] == kind]


def summary(events: Events) -> Tuple[int, int, int]:
    '''How many are gone, unanswered, at a last source.'''
    told, = of(events, 'links')
    return told['gone'], told['unanswered'], told['last']


ONE = package('one')


def test_all_there(upkeep: Upkeep, webs: List[Web]) -> None:
    '''Every source is asked for everything, once, and by HEAD.'''
    events, error = asked(upkeep)
    assert error is None and summary(events) == (0, 0, 0)
    assert not of(events, 'link')
    for web in webs:
        assert sorted(web.methods) == sorted(
            [f'HEAD /{one.location}' for one in PACKAGES]
            + [f'HEAD /{sha(name)}' for name in ARTEFACTS])
        assert all(headers['User-Agent'] == links.USER_AGENT
                   for headers in web.headers)


@pytest.mark.parametrize('code', [404, 410])
def test_gone(code: int, upkeep: Upkeep, webs: List[Web]) -> None:
    '''What no source has is told with what each one said; exit code 5.'''
    for web in webs:
        web.answers[f'/{ONE.location}'] = [status(code)]
        web.answers[f'/{sha("twodisk")}'] = [status(code)]
    events, error = asked(upkeep)
    assert summary(events) == (2, 0, 0)
    assert error and error.exit_code == 5 and error.next_step
    found = {event['what']: event for event in of(events, 'link')}
    assert (found['package']['image'], found['package']['arch'],
            found['package']['name'], found['package']['version']) == (
                'one', 'x86_64', 'one', '1')
    assert (found['disk']['image'], found['disk']['name']) == (
        'two', 'disk.qcow2')
    for event in found.values():
        assert event['state'] == 'gone'
        assert event['said'] == {web.url: f'HTTP error {code}'
                                 for web in webs}


def test_last_source(upkeep: Upkeep, webs: List[Web]) -> None:
    '''What one source alone has will go: told, and no error.'''
    common = package('common')
    webs[0].answers[f'/{common.location}'] = [status(404)]
    events, error = asked(upkeep)
    assert error is None and summary(events) == (0, 0, 1)
    event, = of(events, 'link')
    assert event['state'] == 'last'
    assert event['said'] == {webs[0].url: 'HTTP error 404',
                             webs[1].url: 'there'}
    # Once, but with all that use it
    assert {user[0] for user in event['users']} == {'one', 'two', 'tools'}


def test_wrong_size(upkeep: Upkeep, webs: List[Web]) -> None:
    '''Another file under that name is not the one.'''
    for web in webs:
        web.answers[f'/{ONE.location}'] = [
            lambda handler: handler.send(200, b'sorry')]
    events, error = asked(upkeep)
    assert error and summary(events) == (1, 0, 0)
    event, = of(events, 'link')
    assert event['said'][webs[0].url] == (
        f'expected {ONE.size} bytes, found 5')


@pytest.mark.parametrize('code, remembered', [
    (405, True), (501, True), (403, False), (400, False)])
def test_no_head(code: int, remembered: bool, upkeep: Upkeep,
                 webs: List[Web]) -> None:
    '''Who refuses HEAD is asked for one byte.'''
    web = webs[0]
    files = {one.location: body(one.source) for one in PACKAGES}
    files.update({sha(name): body(name) for name in ARTEFACTS})

    def answer(content: bytes) -> Answer:
        def method(handler: Handler) -> None:
            if handler.command == 'HEAD':
                handler.send(code)
            else:
                assert handler.headers['Range'] == 'bytes=0-0'
                handler.send(206, content[:1], {
                    'Content-Range': f'bytes 0-0/{len(content)}'})
        return method

    web.answers = {f'/{name}': [answer(content)]
                   for name, content in files.items()}
    events, error = asked(upkeep)
    assert error is None and summary(events) == (0, 0, 0)
    heads = [method for method in web.methods if method.startswith('HEAD')]
    assert len([m for m in web.methods if m.startswith('GET')]) == len(files)
    # Nobody is asked again and again for what was refused: two at once of
    # the store's, two of the mirror's
    assert len(heads) <= 4 if remembered else len(heads) == len(files)


def test_range_is_ignored(upkeep: Upkeep, webs: List[Web]) -> None:
    '''A server that sends all of it instead is not read.'''
    def answer(handler: Handler) -> None:
        if handler.command == 'HEAD':
            handler.send(405)
        else:
            handler.send(200, body(ONE.source))

    for web in webs:
        web.answers[f'/{ONE.location}'] = [answer]
    events, error = asked(upkeep)
    assert error is None and summary(events) == (0, 0, 0)


def later(code: int, after: str) -> Answer:
    '''Come back later.'''
    return lambda handler: handler.send(code, b'', {'Retry-After': after})


@pytest.mark.parametrize('code', [429, 503])
@pytest.mark.parametrize('form', ['seconds', 'date'])
def test_retry_after(code: int, form: str, upkeep: Upkeep,
                     webs: List[Web]) -> None:
    '''The host is left alone for as long as it asks.'''
    then = datetime.now(timezone.utc) + timedelta(seconds=2)
    after = '1' if form == 'seconds' else format_datetime(then, usegmt=True)
    path = f'/{ONE.location}'
    webs[0].answers[path] = [later(code, after), lambda handler: handler.send(
        200, body(ONE.source))]
    start = time.monotonic()
    events, error = asked(upkeep)
    assert time.monotonic() - start >= 0.8
    assert error is None and summary(events) == (0, 0, 0)
    assert webs[0].asked.count(path) == 2


def test_retry_after_too_long(upkeep: Upkeep, webs: List[Web]) -> None:
    '''Nobody waits for an hour; the other source counts.'''
    webs[0].answers = {f'/{one.location}': [later(429, '3600')]
                       for one in PACKAGES}
    start = time.monotonic()
    events, error = asked(upkeep)
    assert time.monotonic() - start < 60
    assert error is None and summary(events) == (0, 0, 0)
    dead, = [event for event in of(events, 'source') if event['dead']]
    assert '3600' in dead['text'] and dead['source'] == webs[0].url
    # Two were on their way
    assert len([p for p in webs[0].asked if 'pool' in p]) <= links.PER_HOST


@pytest.mark.parametrize('fault', [status(500), status(502), status(503),
                                   status(429), reset])
def test_passing_fault(fault: Answer, upkeep: Upkeep,
                       webs: List[Web]) -> None:
    '''Asked again.'''
    webs[0].answers[f'/{ONE.location}'] = [fault, lambda handler:
                                           handler.send(200,
                                                        body(ONE.source))]
    webs[1].answers[f'/{ONE.location}'] = [status(404)]
    events, error = asked(upkeep)
    assert error is None and summary(events) == (0, 0, 1)


@pytest.mark.parametrize('fault, text', [
    (status(500), 'HTTP error 500'), (status(503), 'HTTP error 503'),
    (status(401), 'HTTP error 401'), (status(403), 'HTTP error 403'),
    (silence, 'timed out'), (reset, 'connection'),
    (redirect('file:///etc/passwd'), 'HTTP error 302'),
    (redirect('ftp://a.example/b'), 'redirects to ftp://a.example/b')])
def test_lasting_fault(fault: Answer, text: str, upkeep: Upkeep,
                       webs: List[Web]) -> None:
    '''Not known to be gone, but nobody has it, either.'''
    webs[0].answers[f'/{ONE.location}'] = [fault]
    webs[1].answers[f'/{ONE.location}'] = [status(404)]
    events, error = asked(upkeep, timeout=1 if fault is silence else 20)
    assert error and error.exit_code == 5
    assert summary(events) == (0, 1, 0)
    event, = of(events, 'link')
    assert event['state'] == 'unanswered'
    assert text.lower() in event['said'][webs[0].url].lower()


def test_redirect(upkeep: Upkeep, webs: List[Web]) -> None:
    '''Followed by HEAD; credentials stay at home.'''
    webs[0].answers[f'/{ONE.location}'] = [
        redirect(f'{webs[1].url}/{ONE.location}')]
    events, error = asked(upkeep)
    assert error is None and summary(events) == (0, 0, 0)
    assert webs[1].methods.count(f'HEAD /{ONE.location}') == 2
    assert not [m for m in webs[1].methods if m.startswith('GET')]


def test_silent_mirror(upkeep: Upkeep, webs: List[Web]) -> None:
    '''A mirror that says nothing is given up, not waited for 500 times.'''
    webs[0].answers = {f'/{one.location}': [silence] for one in PACKAGES}
    start = time.monotonic()
    events, error = asked(upkeep, timeout=0.5)
    assert time.monotonic() - start < 30
    assert error is None and summary(events)[:2] == (0, 0)
    dead, = [event for event in of(events, 'source') if event['dead']]
    assert 'does not answer' in dead['text']


def closed_port() -> str:
    '''The URL of nobody.'''
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return f'http://127.0.0.1:{probe.getsockname()[1]}'


def test_offline(upkeep: Upkeep, webs: List[Web],
                 monkeypatch: pytest.MonkeyPatch) -> None:
    '''One error in place of one for each file.'''
    assert webs
    url = closed_port()
    monkeypatch.setenv('QEMU_MKOSI_MIRROR', url)
    monkeypatch.setenv('QEMU_TEST_MKOSI_STORES', url)
    events, error = asked(upkeep)
    assert error and error.exit_code == 5
    assert 'no source answers' in error.message
    assert error.message.count(url) == 1
    assert 'refused' in error.message
    assert 'proxy' in (error.next_step or '')
    assert not of(events, 'link') and not of(events, 'links')


def test_credentials_are_hidden(upkeep: Upkeep, webs: List[Web],
                                monkeypatch: pytest.MonkeyPatch) -> None:
    '''Sent to the mirror, told to nobody.'''
    url = f'http://{SECRET}{webs[0].host}'
    monkeypatch.setenv('QEMU_MKOSI_MIRROR', url)
    monkeypatch.setenv('QEMU_TEST_MKOSI_STORES', f'{url} {closed_port()}')
    webs[0].answers[f'/{ONE.location}'] = [status(404)]
    events, error = asked(upkeep)
    assert error and summary(events) == (1, 0, 0)
    assert 'sesame' not in json.dumps(events) + str(error)
    assert all('Authorization' in headers for headers in webs[0].headers)


def test_few_at_once(upkeep: Upkeep, webs: List[Web],
                     monkeypatch: pytest.MonkeyPatch) -> None:
    '''A host is asked by two at most, though it is store and mirror.'''
    assert upkeep
    for web in webs:
        web.pause = 0.05
    monkeypatch.setattr(links, 'AT_ONCE', 8)
    asked(upkeep)
    assert [web.most for web in webs] == [links.PER_HOST] * 2


def test_at_once(upkeep: Upkeep, webs: List[Web],
                 monkeypatch: pytest.MonkeyPatch) -> None:
    '''All hosts together, by no more than AT_ONCE.'''
    monkeypatch.setattr(links, 'AT_ONCE', 1)
    webs[0].pause = 0.02
    asked(upkeep)
    assert webs[0].most == 1


def test_other_distributions_mirror(upkeep: Upkeep, webs: List[Web],
                                    tmp_path: Path) -> None:
    '''A mirror with nothing of it is no source, so nothing is the last.'''
    for one in PACKAGES:
        (tmp_path / 'web0' / one.location).unlink()
    events, error = asked(upkeep)
    assert error is None and summary(events) == (0, 0, 0)
    told = [event['text'] for event in of(events, 'source')
            if event['text']]
    assert told == [f'{webs[0].url}: has none of the 4 debian files that it '
                    'was asked for']


@pytest.mark.parametrize('form', ['{}', 'file://{}'])
def test_folders(form: str, upkeep: Upkeep, webs: List[Web], tmp_path: Path,
                 monkeypatch: pytest.MonkeyPatch) -> None:
    '''Stores and mirrors that are folders are looked into.'''
    assert webs
    folder = form.format(tmp_path / 'web0')
    monkeypatch.setenv('QEMU_TEST_MKOSI_STORES', folder)
    monkeypatch.setenv('QEMU_MKOSI_MIRROR', f'file://{tmp_path}/web0')
    (tmp_path / 'web0' / sha('onedisk')).unlink()
    (tmp_path / 'web0' / sha('twodisk')).write_text('?')
    events, error = asked(upkeep)
    assert error and summary(events) == (2, 0, 0)
    assert not webs[0].asked + webs[1].asked
    assert sorted(event['said'][folder] for event in of(events, 'link')) == [
        f'expected {len(body("twodisk"))} bytes, found 1', 'no such file']


def test_registrys_stores(upkeep: Upkeep, webs: List[Web],
                          monkeypatch: pytest.MonkeyPatch) -> None:
    '''Asked unless the environment has others.'''
    monkeypatch.delenv('QEMU_TEST_MKOSI_STORES')
    events, error = asked(upkeep)
    assert error is None
    warning, = of(events, 'warning')
    assert 'no stores are configured' in warning['text']
    assert not any(path[1:] in map(sha, ARTEFACTS)
                   for path in webs[0].asked)
    upkeep.stores = [f'{webs[1].url}/']
    upkeep.write_registry({name: '1' * 64 for name in upkeep.names})
    events, error = asked(upkeep)
    assert error is None and not of(events, 'warning')
    assert f'/{sha("onedisk")}' in webs[1].asked


@pytest.mark.parametrize('url', ['store', 'ftp://store.example/', 'http://',
                                 'http://user:sesame@', 'file:'])
def test_not_a_store(url: str, upkeep: Upkeep, webs: List[Web],
                     monkeypatch: pytest.MonkeyPatch) -> None:
    '''Refused before anybody is asked.'''
    monkeypatch.setenv('QEMU_TEST_MKOSI_STORES', f'{webs[0].url} {url}')
    _, error = asked(upkeep)
    assert error and 'QEMU_TEST_MKOSI_STORES' in error.message
    assert error.next_step and 'sesame' not in str(error)
    assert not webs[0].asked


def test_text(upkeep: Upkeep, webs: List[Web]) -> None:
    '''What a person reads.'''
    for web in webs:
        web.answers[f'/{ONE.location}'] = [status(404)]
    stream = io.StringIO()
    with pytest.raises(FetchError):
        links.check(upkeep.registry, upkeep.chosen, Report(False, stream),
                    Asker(pause=0.01))
    assert (f'gone: package one 1 (one x86_64)\n'
            f'    {webs[0].url}: HTTP error 404\n'
            f'    {webs[1].url}: HTTP error 404\n') in stream.getvalue()


@pytest.mark.parametrize('option', ['--update-lock', '--boot', '--list',
                                    '--update'])
def test_wrong_combination(option: str) -> None:
    '''Refused before any work.'''
    with pytest.raises(UsageError):
        cli.parse_arguments(['x86_64', 'debian-min', '--check-links',
                             option])
