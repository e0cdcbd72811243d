# SPDX-License-Identifier: GPL-2.0-or-later
'''
Publishing to an HTTP server that takes PUT, or to a GitLab generic package
registry; and which destination the environment names.

Where the server can rename (WebDAV's MOVE), an object gets its name after
it was read back. What may pass is 429, 5xx and a lost connection; when to
try again is what the server says (Retry-After). A token goes to the server
that it is for and to nobody else: not into messages, nor to where a
redirect leads.

GitLab: "Generic packages repository" in its manual; WebDAV: RFC 4918;
Retry-After: RFC 9110, 10.2.3
'''

import base64
import contextlib
import http.client
import os
import re
import secrets
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import (IO, Any, Callable, Dict, Iterator, List, NoReturn,
                    Optional, Tuple)

from .destination import CHUNK, Destination, Folder, Item, Transient
from .error import PublishError, UsageError
from .store import hide_password
from .transfer import seconds_to_wait

# Seconds without a byte before a connection counts as dead
TIMEOUT = 60.0
# Bytes a second below which it does so, too
SLOWEST = 10_000
REDIRECTS = 5

# GitLab's headers for tokens, which are the kinds of them
KINDS = ('PRIVATE-TOKEN', 'JOB-TOKEN', 'DEPLOY-TOKEN')


class _Body:
    '''A file to upload, as long as @check does not raise.'''

    def __init__(self, file: IO[bytes], check: Callable[[], None]) -> None:
        self.file = file
        self.check = check

    def read(self, size: int = CHUNK) -> bytes:
        '''Its next bytes.'''
        self.check()
        return self.file.read(max(size, CHUNK))


class _Connection(http.client.HTTPConnection):
    def request(self, *args: Any, **kwargs: Any) -> None:
        '''A server may say no, and why, before it has read everything.'''
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            super().request(*args, **kwargs)


class _TLSConnection(http.client.HTTPSConnection):
    def request(self, *args: Any, **kwargs: Any) -> None:
        '''As above.'''
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            super().request(*args, **kwargs)


class _Plain(urllib.request.HTTPHandler):
    def http_open(self, req: urllib.request.Request) -> Any:
        return self.do_open(_Connection, req)


class _TLS(urllib.request.HTTPSHandler):
    def https_open(self, req: urllib.request.Request) -> Any:
        return self.do_open(_TLSConnection, req)


def _origin(url: str) -> Tuple[str, Optional[str], Optional[int]]:
    parts = urllib.parse.urlsplit(url)
    return parts.scheme, parts.hostname, parts.port


class _Redirects(urllib.request.HTTPRedirectHandler):
    '''Only for reading; only the same server sees the token again.'''
    max_redirections = REDIRECTS
    max_repeats = REDIRECTS

    def redirect_request(self, req: urllib.request.Request, fp: Any,
                         code: int, msg: str, headers: Any, newurl: str,
                         ) -> Optional[urllib.request.Request]:
        old, new = _origin(req.full_url)[0], _origin(newurl)[0]
        if (req.get_method() not in ('GET', 'HEAD')
                or new not in ('http', 'https')
                or (old, new) == ('https', 'http')):
            return None
        request = super().redirect_request(req, fp, code, msg, headers,
                                           newurl)
        if request and _origin(newurl) == _origin(req.full_url):
            for name, value in req.unredirected_hdrs.items():
                if name not in ('Host', 'Content-length', 'Content-type'):
                    request.add_unredirected_header(name, value)
        return request


def _local(host: Optional[str]) -> bool:
    return host in ('localhost', '::1') or bool(
        re.fullmatch(r'127(\.[0-9]{1,3}){3}', host or ''))


def _length(headers: Any) -> Optional[int]:
    '''The Content-Length, None if there is none.'''
    text = headers.get('Content-Length', '')
    return int(text) if re.fullmatch('[0-9]{1,18}', text) else None


# What servers say that can't rename, or where something is in the way
_NO_MOVE = (400, 401, 403, 404, 405, 409, 412, 415, 501)


class Server(Destination):
    '''
    An HTTP server that takes PUT; without user name and password, @url is
    a prefix. @headers are secret, and so are the @secrets in them.
    '''
    QUERY = ''

    def __init__(self, url: str, headers: Dict[str, str],
                 hidden: List[str]) -> None:
        super().__init__(url)
        self.url = url
        self.headers = headers
        self.hidden = hidden
        # Whether it can rename; not known yet
        self.moves: Optional[bool] = None
        # What goes to this host alone needs no proxy, which would see it
        proxies = ([urllib.request.ProxyHandler({})]
                   if _local(_origin(url)[1]) else [])
        self.opener = urllib.request.build_opener(
            *proxies, _Plain(), _TLS(), _Redirects())

    def _ask(self, method: str, name: str, *, item: Optional[Item] = None,
             headers: Optional[Dict[str, str]] = None, query: str = '',
             known: Tuple[int, ...] = ()) -> Any:
        '''
        The response to @method, whatever it says if it is good or @known.
        Raises Transient, PublishError.
        '''
        request = urllib.request.Request(f'{self.url}/{name}{query}',
                                         headers=headers or {},
                                         method=method)
        for key, value in self.headers.items():
            request.add_unredirected_header(key, value)
        with contextlib.ExitStack() as stack:
            if item:
                file = stack.enter_context(open(item.path, 'rb'))
                request.data = _Body(file, self._limit(item.size))
                request.add_header('Content-Length', str(item.size))
                request.add_header('Content-Type',
                                   'application/octet-stream')
            try:
                response = self.opener.open(request, timeout=TIMEOUT)
            except urllib.error.HTTPError as e:
                if e.code in known:
                    return e
                with e:
                    self._refuse(method, name, e)
            except (OSError, http.client.HTTPException, ValueError) as e:
                raise self._lost(e) from e
        return response

    def _lost(self, error: Exception) -> Transient:
        reason = getattr(error, 'reason', None) or error
        return Transient(self._plain(f'{reason}' or repr(reason)))

    def _plain(self, text: str) -> str:
        '''@text without what nobody is to see.'''
        for hidden in self.hidden:
            text = text.replace(hidden, '***')
        return hide_password(''.join(
            c if c.isprintable() else '?' for c in ' '.join(text.split())))

    def _refuse(self, method: str, name: str,
                response: urllib.error.HTTPError) -> NoReturn:
        code = response.code
        said = f'HTTP {code}'
        if 300 <= code < 400:
            # All else of it may have a signature that lets one in
            with contextlib.suppress(ValueError):
                where = urllib.parse.urlsplit(
                    response.headers.get('Location', ''))
                said += f', to {where.scheme}://{where.hostname}'
        else:
            with contextlib.suppress(OSError, http.client.HTTPException):
                # More than is shown: a token at its end is then whole
                said += (f' {response.reason}: '
                         f'{response.read(9999).decode(errors="replace")}')
        said = self._plain(said)[:400]
        if code in (408, 409, 425, 429) or code >= 500 and code not in (
                501, 507):
            raise Transient(said, seconds_to_wait(response.headers) or 0.0)
        raise PublishError(f'{self.shown}: {method} {name}: {said}',
                           next_step=self._next_step(code))

    def _next_step(self, code: int) -> str:
        if code in (401, 403):
            return ('check that the token of QEMU_MKOSI_PUBLISH_TOKEN is of '
                    'the right kind, has not expired, and may write there'
                    if self.headers else
                    'set QEMU_MKOSI_PUBLISH_TOKEN to a token that may write '
                    'there')
        if code in (413, 507):
            return 'have the server\'s owner raise its limits'
        return 'check the URL in QEMU_MKOSI_PUBLISH'

    @contextlib.contextmanager
    def _open(self, name: str,
              size: int) -> Iterator[Optional[Iterator[bytes]]]:
        with self._ask('GET', name, known=(404, 410)) as response:
            if response.code in (404, 410):
                yield None
                return
            yield self._pieces(response, self._limit(size))

    def _limit(self, size: int) -> Callable[[], None]:
        '''What raises once @size bytes should have been transferred.'''
        deadline = time.monotonic() + TIMEOUT + size / SLOWEST

        def check() -> None:
            if time.monotonic() > deadline:
                raise TimeoutError('too slow')
            if self.stop.is_set():
                raise InterruptedError('stopped')

        return check

    def _pieces(self, response: Any,
                check: Callable[[], None]) -> Iterator[bytes]:
        length = 0
        try:
            while chunk := response.read(CHUNK):
                check()
                length += len(chunk)
                yield chunk
        except (OSError, http.client.HTTPException) as e:
            raise self._lost(e) from e
        promised = _length(response.headers)
        if promised not in (None, length):
            raise Transient(f'connection closed after {length} of '
                            f'{promised} bytes')

    def _size(self, name: str) -> Optional[int]:
        gone = (404, 410)
        with self._ask('HEAD', name,
                       known=(*gone, 403, 405, 501)) as response:
            code, headers = response.code, response.headers
        if code in (403, 405, 501):
            # Not asked for often; where the headers are, it ends
            with self._ask('GET', name, known=gone) as response:
                code, headers = response.code, response.headers
        if code in gone:
            return None
        length = _length(headers)
        return -1 if length is None else length

    def _put(self, item: Item) -> bool:
        if self.moves is None:
            self.moves = self._can_move()
        if self.moves:
            moved = self._put_and_move(item)
            if moved is not None:
                return moved
        with self._ask('PUT', item.name, item=item, known=(412,),
                       headers={'If-None-Match': '*'}) as response:
            return bool(response.code != 412)

    def _can_move(self) -> bool:
        '''
        Whether it can rename: then it says that there is no such thing. It
        may say so too of anything that it does not know.
        '''
        name = f'tmp-{secrets.token_hex(16)}'
        with self._ask('MOVE', name, known=_NO_MOVE, headers={
                'Destination': f'{self.url}/{name}-',
                'Overwrite': 'F'}) as response:
            return bool(response.code in (404, 409, 412))

    def _put_and_move(self, item: Item) -> Optional[bool]:
        '''Upload under another name first; None if it can't be renamed.'''
        name = f'tmp-{secrets.token_hex(16)}'
        moved = False
        try:
            with self._ask('PUT', name, item=item):
                pass
            found = self._find(name, item.size)
            if found != item.found:
                self.check_source(item)
                raise Transient(
                    f'{item.name} was stored with other bytes: expected '
                    f'SHA-256 {item.sha256}, found '
                    + (f'{found[0]}, {found[1]} bytes' if found
                       else 'nothing'))
            with self._ask('MOVE', name, known=_NO_MOVE, headers={
                    'Destination': f'{self.url}/{item.name}',
                    'Overwrite': 'F'}) as response:
                moved = response.code < 300
                self.moves = moved or response.code == 412
                return moved if self.moves else None
        finally:
            if not moved:
                # If it fails, nobody takes that name for an object
                with contextlib.suppress(Transient, PublishError):
                    self._remove(name)

    def _remove(self, name: str) -> bool:
        with self._ask('DELETE', name, known=(
                400, 401, 403, 404, 405, 501)) as response:
            return bool(response.code < 300 or response.code == 404)


class GitLab(Server):
    '''
    A version of a package in GitLab's generic package registry. A file is
    there when it is whole. A second one of its name is refused with 400, or
    stands before the first, as the owner has set.
    '''
    def _put(self, item: Item) -> bool:
        with self._ask('PUT', item.name, item=item, known=(400,),
                       query='?status=default') as response:
            if response.code != 400:
                return True
            if self._find(item.name, item.size):
                # Another publisher was quicker
                return False
            self._refuse('PUT', item.name, response)

    def _remove(self, name: str) -> bool:
        # Takes a number that only the package's owner can ask for
        return False


# -- Which ------------------------------------------------------------------

def configured() -> Optional[Destination]:
    '''
    The destination that the environment names, if it does. The token is
    gone from there afterwards: no program sees it. Raises UsageError,
    PublishError.
    '''
    token = os.environ.pop('QEMU_MKOSI_PUBLISH_TOKEN', '')
    where = os.environ.get('QEMU_MKOSI_PUBLISH', '')
    return at(where, token) if where else None


def at(where: str, token: str = '',
       variable: str = 'QEMU_MKOSI_PUBLISH') -> Destination:
    '''
    The destination, or the store to ask, @where: a folder or URL, named in
    @variable. @token is a token or KIND:TOKEN. Raises UsageError where it
    is none of these or would show the token, PublishError where there is
    no such folder.
    '''
    if where.startswith('/'):
        folder = Folder(Path(where))
        folder.clear()
        return folder
    try:
        parts = urllib.parse.urlsplit(where)
        good = (parts.scheme in ('http', 'https') and parts.hostname
                and parts.port != 0 and not parts.query
                and not parts.fragment
                and re.fullmatch(r'[!-~]+', where))
    except ValueError:
        good = None
    if not good:
        raise UsageError(
            f'{variable}: expected an absolute path or an http or https '
            f'URL, found {hide_password(where)!r}',
            next_step='write it as /FOLDER or https://HOST/PATH')
    user, _, host = parts.netloc.rpartition('@')
    url = urllib.parse.urlunsplit(parts._replace(netloc=host)).rstrip('/')
    gitlab = '/packages/generic/' in parts.path
    headers, hidden = _secrets(user, token, gitlab)
    if headers and parts.scheme == 'http' and not _local(parts.hostname):
        raise UsageError(
            f'{variable}: a token or password would go to {url} for all on '
            'the way to read', next_step='write it as https://')
    return (GitLab if gitlab else Server)(url, headers, hidden)


def _secrets(user: str, token: str,
             gitlab: bool) -> Tuple[Dict[str, str], List[str]]:
    '''The headers for a @token or a @user:password, and what to hide.'''
    kind, _, rest = token.rpartition(':')
    # What it says is not shown, even where it is wrong
    if token and not (re.fullmatch('[!-~]+', rest)
                      and kind in ('', *KINDS)):
        raise UsageError('QEMU_MKOSI_PUBLISH_TOKEN: expected TOKEN or '
                         'KIND:TOKEN',
                         next_step=f'KIND is one of {", ".join(KINDS)}')
    headers, hidden = {}, []
    if user:
        plain = urllib.parse.unquote(user)
        basic = base64.b64encode(plain.encode()).decode()
        headers['Authorization'] = f'Basic {basic}'
        hidden += [basic, *filter(None, (user.partition(':')[2],
                                         plain.partition(':')[2]))]
    if rest:
        if gitlab or kind:
            headers[kind or KINDS[0]] = rest
        else:
            headers['Authorization'] = f'Bearer {rest}'
        hidden.append(rest)
    return headers, hidden
