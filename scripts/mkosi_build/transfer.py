# SPDX-License-Identifier: GPL-2.0-or-later
'''
The one transfer: packages from mirrors and images from stores come by it.

A source is an http, https or file URL, or an absolute path. What it has
goes to a file that the caller names, and is either whole, with the size and
SHA-256 that were asked for, or this raises. What is wrong with a source is
a TransferError; what is wrong with this machine stays an OSError. No
message has a user name, a password or a query string, which may be signed.

The functional tests use this too: nothing but the standard library and
modules that need no more are imported.
'''

import base64
import email.utils
import errno
import http.client
import io
import os
import re
import stat
import string
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from email.message import Message
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence

from .cache import naming, sha256_file


# How often the same source is asked again because it says when
REPEATS = 3
# Rounds over all sources, and seconds, times the rounds so far, before one
TRIES = 3
PAUSE = 1
_CHUNK = 1 << 16
# Characters of what others wrote that go into a message
_LONGEST = 200


@dataclass(frozen=True)
class Limits:
    '''When a source counts as dead'''
    # Seconds without a byte
    silence: float = 30
    # Bytes a second, over so many seconds of waiting
    slowest: float = 1024
    window: float = 30
    redirects: int = 5
    # The longest time, in seconds, that a busy source is waited for
    patience: float = 60


LIMITS = Limits()


class TransferError(Exception):
    '''
    A source did not give what was asked for; @passes says whether that may
    well be otherwise in a while.
    '''
    passes = True


class Missing(TransferError):
    '''The source says that it does not have the file.'''
    passes = False


class Unusable(TransferError):
    '''The source answered with something that nothing can be made of.'''
    passes = False


class Wrong(TransferError):
    '''The bytes are others, those that were there before or new ones.'''
    passes = False


class Busy(TransferError):
    '''The source asks for patience: @wait seconds, if it says so.'''
    def __init__(self, message: str, wait: Optional[float]) -> None:
        super().__init__(message)
        self.wait = wait


class Stopped(Exception):
    '''The caller said that the transfer should end.'''


class Failed(Exception):
    '''No source gave the file; @said has what each had to say.'''
    def __init__(self, said: Dict[str, TransferError]) -> None:
        super().__init__('; '.join(f'{shown(source)}: {error}'
                                   for source, error in said.items()))
        self.said = said

    @property
    def missing(self) -> bool:
        '''Whether all say that they do not have it.'''
        return all(isinstance(e, Missing) for e in self.said.values())

    @property
    def passes(self) -> bool:
        '''Whether another try may well help.'''
        return any(e.passes for e in self.said.values())


def shown(source: str) -> str:
    '''@source as scheme://host/path, fit for messages.'''
    if source.startswith('/'):
        return _plain(source)
    try:
        parts = urllib.parse.urlsplit(source)
    except ValueError:
        return 'a URL that is none'
    host = parts.netloc.rpartition('@')[2]
    return _plain(urllib.parse.urlunsplit(
        (parts.scheme, host, parts.path, '', '')))


def _plain(text: str) -> str:
    '''One short line without control characters, of what others wrote.'''
    line = (text.strip().splitlines() or [''])[0][:_LONGEST]
    return ''.join(c if c.isprintable() else '?' for c in line)


# -- One connection ---------------------------------------------------------

class _Meter(io.RawIOBase):
    '''
    What a connection sends, from the first byte of its status line on.

    The time until a byte comes is limited by the socket; here it is seen
    that bytes do not just trickle. Only waiting counts: that we write to a
    slow disk is not the server's fault.
    '''
    def __init__(self, raw: io.RawIOBase, limits: Limits) -> None:
        super().__init__()
        self._raw = raw
        self._limits = limits
        self._begun = False
        self._waited = 0.0
        self._received = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> Optional[int]:
        '''As of any raw stream. Raises TransferError if it trickles.'''
        start = time.monotonic()
        count = self._raw.readinto(buffer)
        if not self._begun:
            self._begun = True
            return count
        self._waited += time.monotonic() - start
        self._received += count or 0
        if count and self._waited >= self._limits.window:
            if self._received < self._limits.slowest * self._waited:
                raise TransferError(
                    f'too slow: {self._received} bytes in '
                    f'{self._waited:.0f} s')
            self._waited = 0.0
            self._received = 0
        return count

    def close(self) -> None:
        self._raw.close()
        super().close()


class _Response(http.client.HTTPResponse):
    '''An answer that is read through a _Meter'''
    limits = LIMITS

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        raw: Any = self.fp.detach()
        self.fp = io.BufferedReader(_Meter(raw, self.limits))


def _connecting(kind: Any, limits: Limits) -> Any:
    '''What makes connections of this @kind, with limits.'''
    class Limited(_Response):
        '''With those of this transfer'''
    Limited.limits = limits

    def connect(*args: Any, **kwargs: Any) -> Any:
        connection = kind(*args, **kwargs)
        connection.response_class = Limited
        return connection
    return connect


class _HTTPHandler(urllib.request.HTTPHandler):
    def __init__(self, limits: Limits) -> None:
        super().__init__()
        self._connect = _connecting(http.client.HTTPConnection, limits)

    def http_open(self, req: urllib.request.Request) -> Any:
        return self.do_open(self._connect, req)


class _HTTPSHandler(urllib.request.HTTPSHandler):
    def __init__(self, limits: Limits) -> None:
        super().__init__()
        self._connect = _connecting(http.client.HTTPSConnection, limits)

    def https_open(self, req: urllib.request.Request) -> Any:
        return self.do_open(self._connect, req)


class _RedirectHandler(urllib.request.HTTPRedirectHandler):
    '''
    Follows a few redirects, and only to where credentials, which are left
    behind, are not needed and nothing local is.
    '''
    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._been: List[str] = []

    def http_error_302(self, req: urllib.request.Request, fp: Any,
                       code: int, msg: str, headers: Message) -> Any:
        '''Go on at the Location. Raises Unusable where that may not be.'''
        target = headers.get('Location')
        if target is None:
            return None
        fp.close()
        here = urllib.parse.urlsplit(req.full_url)
        try:
            url = urllib.parse.urljoin(req.full_url, target)
            parts = urllib.parse.urlsplit(url)
        except ValueError:
            raise Unusable('redirect to a URL that is none') from None
        # Neither a file of this host, nor what others can read, nor a host
        # that has to be told a password
        if (parts.scheme not in ('http', 'https') or not parts.hostname
                or (here.scheme, parts.scheme) == ('https', 'http')):
            raise Unusable(f'redirect to {shown(url)} is not allowed')
        self._been.append(req.full_url)
        if url in self._been:
            raise Unusable(f'redirects in an infinite loop, to {shown(url)}')
        if len(self._been) > self._limits.redirects:
            raise Unusable(f'more than {self._limits.redirects} redirects, '
                           f'the last one to {shown(url)}')
        request = request_for(url, req.get_header('Range'), known=False)
        return self.parent.open(request, timeout=req.timeout)

    http_error_301 = http_error_303 = http_error_307 = http_error_302
    http_error_308 = http_error_302


def request_for(url: str, wanted: Optional[str] = None,
                known: bool = True) -> urllib.request.Request:
    '''
    A request for @url, or the range @wanted of it. If the source is @known,
    user name and password become a header that is not told to whom it
    redirects; else they are dropped.
    '''
    # Not all servers take a caret, which Fedora's versions have
    url = urllib.parse.quote(url, safe=string.punctuation).replace('^', '%5E')
    parts = urllib.parse.urlsplit(url)
    user, _, host = parts.netloc.rpartition('@')
    request = urllib.request.Request(urllib.parse.urlunsplit(
        parts._replace(netloc=host, fragment='')))
    request.add_header('User-Agent', 'qemu-mkosi')
    # A file that is compressed on the way is not the one with our hash
    request.add_header('Accept-Encoding', 'identity')
    if wanted is not None:
        request.add_header('Range', wanted)
    if user and known:
        token = base64.b64encode(urllib.parse.unquote(user).encode())
        request.add_unredirected_header('Authorization',
                                        f'Basic {token.decode()}')
    return request


def _ask(url: str, limits: Limits, have: int = 0) -> Any:
    '''
    Open @url, after the first @have bytes if the server does that. Raises
    TransferError.
    '''
    opener = urllib.request.OpenerDirector()
    for handler in (urllib.request.ProxyHandler(), _HTTPHandler(limits),
                    _HTTPSHandler(limits), _RedirectHandler(limits),
                    urllib.request.FileHandler(),
                    urllib.request.UnknownHandler(),
                    urllib.request.HTTPDefaultErrorHandler(),
                    urllib.request.HTTPErrorProcessor()):
        opener.add_handler(handler)
    try:
        request = request_for(url, f'bytes={have}-' if have else None)
        return opener.open(request, timeout=limits.silence)
    except urllib.error.HTTPError as e:
        e.close()
        raise _http_error(e, request.full_url) from None
    except http.client.InvalidURL:
        # It would be shown
        raise Unusable('not a valid URL') from None
    except (OSError, http.client.HTTPException, ValueError) as e:
        raise _network_error(e) from e


def _http_error(error: urllib.error.HTTPError, url: str) -> TransferError:
    reason = http.client.responses.get(error.code)
    said = f'HTTP error {error.code}' + (f' ({reason})' if reason else '')
    if error.url and shown(error.url) != shown(url):
        said += f' after a redirect to {shown(error.url)}'
    if error.code in (404, 410):
        return Missing(said)
    if error.code == 416:
        return Wrong(said)
    if error.code in (429, 503):
        wait = seconds_to_wait(error.headers)
        return Busy(said if wait is None else
                    f'{said}, asks to wait for {wait:.0f} s', wait)
    if error.code < 400:
        return Unusable(said)
    return TransferError(said)


def _network_error(error: Exception) -> TransferError:
    reason = getattr(error, 'reason', None)
    if isinstance(reason, FileNotFoundError):
        return Missing('no such file')
    return TransferError(_plain(str(reason or error)) or repr(type(error)))


def seconds_to_wait(headers: Message) -> Optional[float]:
    '''The seconds that Retry-After says (RFC 9110, 10.2.3), if it does.'''
    text = headers.get('Retry-After', '').strip()
    if re.fullmatch('[0-9]{1,9}', text):
        return float(text)
    then = _date(text)
    # By the server's own clock: ours, or its, may be wrong by a year
    now = _date(headers.get('Date', ''))
    if then is None:
        return None
    return max(0.0, then - (time.time() if now is None else now))


def _date(text: str) -> Optional[float]:
    try:
        parsed = email.utils.parsedate_tz(text)
        return float(email.utils.mktime_tz(parsed)) if parsed else None
    except (ValueError, OverflowError, OSError):
        return None


# -- One file ---------------------------------------------------------------

def _resumes(response: Any, have: int, size: int) -> bool:
    '''
    Whether @response goes on after @have bytes, or starts anew. Raises
    TransferError if neither can end in @size bytes.
    '''
    headers = response.headers
    if headers.get('Content-Encoding', 'identity').lower() != 'identity':
        raise Unusable('compressed, which was not asked for: '
                       f'{_plain(headers["Content-Encoding"])}')
    if response.status == 206:
        found = headers.get('Content-Range', '')
        if not re.fullmatch(rf'bytes {have}-{size - 1}/({size}|\*)', found):
            raise Wrong(f'expected bytes {have}-{size - 1}/{size}, '
                        f'found {_plain(found)!r}')
        # Who was asked for all may say so, too
        return have > 0
    # Files have no status
    if response.status not in (None, 200):
        raise Unusable(f'unexpected HTTP status {response.status}')
    length = headers.get('Content-Length', str(size))
    if length != str(size):
        raise Unusable(f'expected {size} bytes, found {_plain(length)}')
    return False


def _read(response: Any) -> bytes:
    '''The next bytes. Raises TransferError: not this machine's fault.'''
    try:
        return bytes(response.read1(_CHUNK))
    except (OSError, http.client.HTTPException, ValueError) as e:
        raise _network_error(e) from e


def _copy(response: Any, part: Path, size: int, append: bool,
          stop: threading.Event) -> None:
    # Gone on with only if nobody took it away meanwhile
    with naming(part), open(part, 'r+b' if append else 'wb') as file:
        found = file.seek(0, os.SEEK_END)
        while chunk := _read(response):
            if stop.is_set():
                raise Stopped
            found += len(chunk)
            if found > size:
                raise Wrong(f'expected {size} bytes, found more')
            file.write(chunk)
    if found < size:
        # Kept: the next try goes on from here
        raise TransferError(f'connection closed after {found} of '
                            f'{size} bytes')


def _take(path: Path, part: Path, size: int,
          stop: threading.Event) -> None:
    '''
    Make @part a further name of @path, or a copy of it where that is not
    possible, or not wise as the file may be written to. Raises
    TransferError.
    '''
    try:
        path = path.resolve()
        status = path.stat()
        source = None
        if stat.S_ISREG(status.st_mode) and status.st_size == size:
            source = open(path, 'rb')  # pylint: disable=consider-using-with
    except FileNotFoundError:
        if not path.parent.is_dir():
            # Not mounted, perhaps
            raise TransferError('no such folder') from None
        raise Missing('no such file') from None
    except (OSError, RuntimeError) as e:
        raise TransferError(_plain(str(getattr(e, 'strerror', e)))) from e
    if source is None:
        raise Unusable(f'expected a file of {size} bytes, found '
                       + (f'{status.st_size}' if stat.S_ISREG(status.st_mode)
                          else 'something else'))
    with source:
        part.unlink(missing_ok=True)
        if not status.st_mode & 0o222:
            try:
                os.link(path, part)
                return
            except OSError as e:
                if e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
                    raise
        _copy(source, part, size, False, stop)


def _try(source: str, part: Path, size: int, sha256: str, limits: Limits,
         stop: threading.Event) -> None:
    if source.startswith('/'):
        _take(Path(source), part, size, stop)
    else:
        have = part.stat().st_size if part.exists() else 0
        if have < size:
            with _ask(source, limits, have) as response:
                append = _resumes(response, have, size)
                _copy(response, part, size, append, stop)
    # Of what is on the disk now, whoever else had a hand in it
    found = sha256_file(part)
    if found != sha256:
        raise Wrong(f'expected SHA-256 {sha256}, found {found}')


def _try_patiently(source: str, part: Path, size: int, sha256: str,
                   limits: Limits, stop: threading.Event) -> None:
    '''_try(), and again when a busy source says that it might help.'''
    patience = limits.patience
    for repeat in range(REPEATS + 1):
        try:
            _try(source, part, size, sha256, limits, stop)
            return
        except Busy as e:
            if e.wait is None or e.wait > patience or repeat == REPEATS:
                raise
            patience -= e.wait
            if stop.wait(e.wait):
                raise Stopped from e


def transfer(source: str, part: Path, size: int, sha256: str, *,
             limits: Limits = LIMITS,
             stop: Optional[threading.Event] = None) -> None:
    '''
    Get the file @source, of @size bytes and with this @sha256, into @part,
    from where an earlier try ended. A path is no further name of a file
    that may be written to.

    When this raises TransferError, what is left in @part is what may be
    gone on from. Raises OSError for what this machine is to blame for, and
    Stopped once @stop is set.
    '''
    while True:
        resumed = part.exists() and part.stat().st_size > 0
        try:
            _try_patiently(source, part, size, sha256, limits,
                           stop or threading.Event())
            return
        except Wrong:
            part.unlink(missing_ok=True)
            # What was in it may have been to blame
            if not resumed:
                raise


def transfer_from_any(sources: Sequence[str], part: Path, size: int,
                      sha256: str, *, limits: Limits = LIMITS,
                      tries: int = TRIES, pause: float = PAUSE,
                      stop: Optional[threading.Event] = None,
                      failed: Callable[[str, TransferError], None]
                      = lambda source, error: None) -> str:
    '''
    transfer() from the first of @sources that does it, which is returned;
    @failed is told of the others. They are asked in turn, in @tries rounds,
    @pause seconds longer apart with each; who says that it does not have
    the file is asked once. Raises Failed, OSError or Stopped.
    '''
    said: Dict[str, TransferError] = {}
    stop = stop or threading.Event()
    for attempt in range(tries):
        if stop.wait(attempt * pause):
            raise Stopped
        for source in sources:
            if isinstance(said.get(source), Missing):
                continue
            if stop.is_set():
                raise Stopped
            try:
                transfer(source, part, size, sha256, limits=limits,
                         stop=stop)
                return source
            except TransferError as e:
                said[source] = e
                failed(source, e)
        if Failed(said).missing:
            break
    raise Failed(said)


def check(source: str, limits: Limits = LIMITS) -> None:
    '''Raises TransferError unless the URL @source can be read.'''
    with _ask(source, limits):
        pass


def read(source: str, limit: int, limits: Limits = LIMITS) -> bytes:
    '''
    What is at the URL @source, at most @limit bytes of it. Raises
    TransferError.
    '''
    with _ask(source, limits) as response:
        data = b''
        while len(data) < limit:
            chunk = _read(response)
            if not chunk:
                break
            data += chunk
        return data[:limit]
