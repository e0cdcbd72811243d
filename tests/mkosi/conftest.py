# SPDX-License-Identifier: GPL-2.0-or-later
'''What the tests share: a clean environment and a server that misbehaves.'''

from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
import os
import threading
from typing import Dict, Iterator, List, NamedTuple, Optional

import pytest


class Answer(NamedTuple):
    '''
    What the server sends for one path.

    @length is the Content-Length, if it is to differ from the body's.
    '''
    body: bytes = b''
    status: int = 200
    length: Optional[int] = None


class _Handler(BaseHTTPRequestHandler):
    def __init__(self, server_: 'Server', *args: object) -> None:
        self.answers = server_
        super().__init__(*args)     # type: ignore[arg-type]

    def do_GET(self) -> None:       # pylint: disable=invalid-name
        '''Answer as the test said; 404 for all else.'''
        self.answers.asked.append(self.path)
        answer = self.answers.paths.get(self.path, Answer(status=404))
        self.send_response(answer.status)
        self.send_header('Content-Length',
                         str(len(answer.body) if answer.length is None
                             else answer.length))
        self.end_headers()
        self.wfile.write(answer.body)

    def log_message(self, *args: object) -> None:
        # pylint: disable=arguments-differ
        '''Stay silent.'''


class Server:
    '''
    A real HTTP server on the loopback interface.

    paths: what to answer; asked: the paths asked for so far; url: its base.
    '''
    def __init__(self) -> None:
        self.paths: Dict[str, Answer] = {}
        self.asked: List[str] = []
        self.http = ThreadingHTTPServer(('127.0.0.1', 0),
                                        partial(_Handler, self))
        self.url = f'http://127.0.0.1:{self.http.server_port}'


def pytest_make_parametrize_id(val: object) -> Optional[str]:
    '''
    Names for tests of data: pytest puts a test's name into the environment
    of the programs that it runs, where long data does not fit.
    '''
    return f'{len(val)} bytes' if isinstance(val, bytes) else None


@pytest.fixture(name='server')
def fixture_server() -> Iterator[Server]:
    '''A Server, gone when the test ends.'''
    server = Server()
    thread = threading.Thread(target=server.http.serve_forever, daemon=True,
                              kwargs={'poll_interval': 0.01})
    thread.start()
    yield server
    server.http.shutdown()
    server.http.server_close()
    thread.join()


@pytest.fixture(autouse=True)
def fixture_no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    '''No test depends on how the caller has set us up.'''
    for name in list(os.environ):
        if name.startswith(('QEMU_', 'MKOSI_', 'TESTS', 'ALL')):
            monkeypatch.delenv(name)
    monkeypatch.setenv('no_proxy', '*')
