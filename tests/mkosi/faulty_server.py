# SPDX-License-Identifier: GPL-2.0-or-later
'''
Servers with all the faults that a store or a mirror may have, by path.

What is simple is in fixtures_builder.py; here are those that go on for a
while, or tell lies. PYTEST_DONT_REWRITE
'''

from contextlib import contextmanager
import email.utils
from functools import partial
import gzip
from http.server import ThreadingHTTPServer
import socket
import threading
import time
from typing import Dict, Iterator, List, Optional

from fixtures_builder import (
    Answer, FaultServer, Handler, PATIENCE, ranged, redirect, reset, short,
    silence, status, trickle, unsized, whole, wrong_range)

YEAR = 365 * 24 * 60 * 60


class _IPv6Server(ThreadingHTTPServer):
    address_family = socket.AF_INET6
    daemon_threads = True

    def server_bind(self) -> None:
        # By itself it would listen to IPv4, too, where it can
        self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        super().server_bind()


class FaultyServer(FaultServer):
    '''A FaultServer that may be one for IPv6 alone.'''
    def __init__(self, ipv6: bool = False) -> None:
        super().__init__()
        if ipv6:
            self.http.server_close()
            self.http = _IPv6Server(('::1', 0), partial(Handler, self))
            self.host = f'[::1]:{self.http.server_port}'
            self.url = f'http://{self.host}'


@contextmanager
def serving(ipv6: bool = False) -> Iterator[FaultyServer]:
    '''A FaultyServer, as long as it is needed. Raises OSError.'''
    server = FaultyServer(ipv6)
    thread = threading.Thread(target=server.http.serve_forever, daemon=True,
                              kwargs={'poll_interval': 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.ending.set()
        server.http.shutdown()
        server.http.server_close()
        thread.join()


def drip(body: bytes, every: float = 0.05) -> Answer:
    '''A byte of @body now and then: slow loris.'''
    def answer(handler: Handler) -> None:
        handler.send(200, body[:1], {'Content-Length': str(len(body))})
        for byte in body[1:]:
            if handler.faults.ending.wait(every):
                return
            handler.wfile.write(bytes([byte]))
    return answer


def drip_headers(handler: Handler) -> None:
    '''Headers without end, a byte now and then.'''
    handler.wfile.write(b'HTTP/1.0 200 OK\r\nX-Drip: ')
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end and not handler.faults.ending.wait(0.05):
        handler.wfile.write(b'x')


def throttled(body: bytes, rate: int) -> Answer:
    '''@body, or the range asked for, with @rate bytes a second.'''
    def answer(handler: Handler) -> None:
        start = 0
        if 'Range' in handler.headers:
            start = int(handler.headers['Range'][len('bytes='):].strip('-'))
        rest = body[start:]
        handler.send(206 if start else 200, b'', {
            'Content-Length': str(len(rest)),
            'Content-Range': f'bytes {start}-{len(body) - 1}/{len(body)}'})
        step = max(1, rate // 100)
        for at in range(0, len(rest), step):
            handler.wfile.write(rest[at:at + step])
            if handler.faults.ending.wait(0.01):
                return
    return answer


def busy(code: int = 429, wait: str = '0',
         date: Optional[float] = None) -> Answer:
    '''Asks for patience, at the time that the server believes it is.'''
    def answer(handler: Handler) -> None:
        handler.send_response_only(code)
        if date is not None:
            handler.send_header('Date', email.utils.formatdate(
                date, usegmt=True))
        handler.send_header('Retry-After', wait)
        handler.send_header('Content-Length', '0')
        handler.end_headers()
    return answer


def later(seconds: float, skew: float = 0, code: int = 503) -> Answer:
    '''busy() until a date, by a clock that is wrong by @skew seconds.'''
    now = time.time() + skew
    return busy(code, email.utils.formatdate(now + seconds, usegmt=True),
                now)


def compressed(body: bytes) -> Answer:
    '''Compressed, whether or not that was asked for.'''
    return lambda handler: handler.send(200, gzip.compress(body), {
        'Content-Encoding': 'gzip'})


def padded(body: bytes) -> Answer:
    '''Compressed, it says, though length and bytes are right.'''
    return lambda handler: handler.send(200, body, {
        'Content-Encoding': 'gzip'})


def chunked(body: bytes, good: bool = True) -> Answer:
    '''In chunks, without a length; else cut off within one.'''
    def answer(handler: Handler) -> None:
        handler.protocol_version = 'HTTP/1.1'
        handler.send_response(200)
        handler.send_header('Transfer-Encoding', 'chunked')
        handler.send_header('Connection', 'close')
        handler.end_headers()
        half = len(body) // 2
        handler.wfile.write(b'%x\r\n%b\r\n' % (half, body[:half]))
        rest = body[half:]
        if good:
            handler.wfile.write(b'%x\r\n%b\r\n0\r\n\r\n' % (len(rest), rest))
        else:
            handler.wfile.write(b'%x\r\n%b' % (len(rest), rest[:-9]))
    return answer


def raw(data: bytes) -> Answer:
    '''Not HTTP, perhaps.'''
    def answer(handler: Handler) -> None:
        handler.wfile.write(data)
    return answer


def faults(body: bytes, elsewhere: str) -> Dict[str, List[Answer]]:
    '''
    What a store may answer in place of the good @body, and answers again
    and again, with @elsewhere as the URL of a good one.
    '''
    other = bytes(reversed(body))
    half = len(body) // 2
    return {
        'dies': [short(body, half), reset],
        'dies at once': [short(body, 0)],
        'reset': [reset],
        'short': [whole(body[:-1])],
        'long': [whole(body + b'x')],
        'unsized, short': [unsized(body[:-1])],
        'unsized, long': [unsized(body + b'x')],
        'other bytes': [whole(other)],
        'other bytes later': [short(other, half), ranged(other)],
        'nothing': [whole(b'')],
        'silence': [silence],
        'silence later': [trickle(body, half), silence],
        'slow loris': [drip(body)],
        'slow headers': [drip_headers],
        'busy': [busy(429, '0')],
        'busy for long': [busy(503, '3600')],
        'unavailable': [status(503)],
        '401': [status(401)],
        '401 in the middle': [short(body, half), status(401)],
        '403': [status(403)],
        '404': [status(404)],
        '410': [status(410)],
        '416': [status(416)],
        '416 in the middle': [short(body, half), status(416)],
        '500': [status(500)],
        '204': [status(204)],
        '300': [status(300)],
        'redirect loop': [redirect('{self}')],
        'endless redirects': [redirect('{self}/more')],
        'redirect to a file': [redirect('file:///etc/passwd')],
        'redirect to FTP': [redirect('ftp://example.org/x?sig=s3cret')],
        'redirect to nowhere': [redirect('http://[/?sig=s3cret')],
        'redirect to a 403': [redirect(
            f'{elsewhere}/no?signature=s3cret#s3cret')],
        'gzip': [compressed(body)],
        'gzip, it says': [padded(body)],
        'wrong range': [short(body, half), wrong_range(body)],
        'cut off chunk': [chunked(body, good=False)],
        'not HTTP': [raw(b'SSH-2.0-OpenSSH_9.9\r\n')],
        'no end of headers': [raw(b'HTTP/1.0 200 OK\r\nX: y\r\n' * 200)],
    }


def misbehave(server: FaultServer, name: str, path: str, body: bytes,
              elsewhere: str) -> None:
    '''Let @server have the fault @name for what is below @path.'''
    answers = faults(body, elsewhere)[name]
    server.answers[path] = answers
    if name == 'redirect loop':
        server.answers[path] = [redirect(path)]
    if name == 'endless redirects':
        for i in range(20):
            server.answers[f'{path}{"/more" * i}'] = [
                redirect(f'{path}{"/more" * (i + 1)}')]


NAMES = tuple(faults(b'xy', ''))
