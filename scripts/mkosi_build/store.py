# SPDX-License-Identifier: GPL-2.0-or-later
'''
The package store: files under their SHA-256, fetched from any mirror that
has them. The hash decides, not the source: a file is used if its size and
SHA-256 are the lock's, wherever it came from.
'''

import errno
import http.client
import os
import re
import threading
import urllib.error
import urllib.parse
import urllib.request
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Dict, List, Sequence

from . import command
from .cache import Cache, host_error, sha256_file
from .error import BuildError, FetchError
from .lock import Package
from .report import Report

CONNECTIONS = 8
# Seconds without a byte before a connection counts as dead
TIMEOUT = 30
TRIES = 3
# What this machine, not a mirror, is to blame for
LOCAL_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS)


class GoneError(FetchError):
    '''No mirror has these packages any longer; @packages says which.'''

    def __init__(self, packages: Sequence[Package],
                 mirrors: Sequence[str]) -> None:
        names = ', '.join(f'{p.name} {p.version}' for p in packages[:5])
        if len(packages) > 5:
            names += f' and {len(packages) - 5} more'
        super().__init__(
            f'locked packages are gone from every mirror: {names}; '
            f'asked: {", ".join(hide_password(m) for m in mirrors)}',
            next_step='set QEMU_MKOSI_MIRROR to a mirror or archive that '
            'has them; or lock newer ones with --update-lock; or build '
            'unlocked, for this machine alone, with --allow-newer')
        self.packages = tuple(packages)


class _Gone(Exception):
    '''This mirror says that it does not have the file.'''


class _Bad(Exception):
    '''This mirror sent something else; the message says what.'''


def hide_password(url: str) -> str:
    '''@url without user name and password, fit for messages.'''
    return re.sub(r'//[^/@]*@', '//', url)


def host_mirrors(distribution: str) -> List[str]:
    '''
    The mirrors to ask for packages of @distribution, in order: those of
    QEMU_MKOSI_MIRROR, then those that this host's own apt is set up with.
    Raises FetchError if there is none.
    '''
    mirrors = os.getenv('QEMU_MKOSI_MIRROR', '').split()
    for mirror in mirrors:
        if urllib.parse.urlsplit(mirror).scheme not in ('http', 'https',
                                                        'file'):
            raise FetchError(f'QEMU_MKOSI_MIRROR: expected http, https or '
                             f'file URLs, found {hide_password(mirror)!r}')
    result = command.run(['apt-get', 'indextargets', '--format',
                          '$(ORIGIN) $(REPO_URI)', 'Created-By: Packages'])
    for line in result.stdout.splitlines():
        origin, _, uri = line.rpartition(' ')
        # Without downloaded lists apt does not know the origin
        if origin.lower() in ('', distribution) and uri.startswith('http'):
            # The security archive has no other packages than its own
            if not uri.rstrip('/').endswith('-security'):
                mirrors.append(uri)
    mirrors = list(dict.fromkeys(m.rstrip('/') for m in mirrors))
    if not mirrors:
        raise FetchError(
            f'no {distribution} mirror is known on this host',
            next_step='set QEMU_MKOSI_MIRROR to the URL of one')
    return mirrors


def _copy(response: 'http.client.HTTPResponse', part: Path, size: int,
          append: bool) -> None:
    with open(part, 'ab' if append else 'wb') as file:
        while chunk := response.read(1 << 16):
            file.write(chunk)
            if file.tell() > size:
                raise _Bad(f'expected {size} bytes, found more')
    found = part.stat().st_size
    if found < size:
        # Kept: the next try goes on from here
        raise ConnectionError(f'connection closed after {found} of '
                              f'{size} bytes')


def _try_mirror(url: str, part: Path, sha256: str, size: int) -> None:
    '''
    Fetch @url into @part, from where an earlier try ended. Raises _Gone,
    _Bad, or OSError (URLError among them) for what may pass.
    '''
    have = part.stat().st_size if part.exists() else 0
    if have < size:
        request = urllib.request.Request(url)
        if have:
            request.add_header('Range', f'bytes={have}-')
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT) as resp:
                resumed = resp.status == 206 and resp.getheader(
                    'Content-Range', '').startswith(f'bytes {have}-')
                _copy(resp, part, size, append=bool(have and resumed))
        except urllib.error.HTTPError as e:
            if e.code == 416:
                part.unlink()
            if e.code in (404, 410):
                raise _Gone(f'HTTP error {e.code}') from e
            raise
        except urllib.error.URLError as e:
            if isinstance(e.reason, FileNotFoundError):
                raise _Gone('no such file') from e
            raise
    found = sha256_file(part)
    if found != sha256:
        raise _Bad(f'expected SHA-256 {sha256}, found {found}')


class Store:
    '''The packages that this machine has.'''

    def __init__(self, cache: Cache, report: Report) -> None:
        self.cache = cache
        self.report = report
        self.folder = cache.store

    def path(self, package: Package) -> Path:
        '''Where @package is, once it is there.'''
        return self.folder / package.sha256

    def whole(self, package: Package) -> bool:
        '''
        Whether @package is there with the bytes of the lock. A damaged
        file is removed.
        '''
        path = self.path(package)
        try:
            if (path.stat().st_size == package.size
                    and sha256_file(path) == package.sha256):
                return True
            path.unlink()
        except FileNotFoundError:
            pass
        return False

    def fetch(self, packages: Sequence[Package], distribution: str,
              what: str) -> None:
        '''
        Make sure that all @packages of @distribution are in the store and
        whole. @what names them for the report.

        Raises GoneError if no mirror has some of them, FetchError if they
        can't be had for another reason, HostError on a full disk.
        '''
        def waiting() -> None:
            self.report.event('waiting', '         waiting for another '
                              'builder to fetch packages')

        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self.cache.lock('store', waiting):
                with ThreadPoolExecutor(os.cpu_count()) as pool:
                    present = list(pool.map(self.whole, packages))
                missing = [p for p, have in zip(packages, present)
                           if not have]
                if missing:
                    self._fetch_missing(missing, distribution, what)
        except OSError as e:
            raise host_error(e, f'Fetching {what}') from e

    def _fetch_missing(self, packages: Sequence[Package],
                       distribution: str, what: str) -> None:
        mirrors = host_mirrors(distribution)
        size = sum(p.size for p in packages)
        stop = threading.Event()
        with self.report.stage(f'fetching {what}: {len(packages)} packages, '
                               f'{size / 1e6:.1f} MB'), \
                ThreadPoolExecutor(CONNECTIONS) as pool:
            try:
                futures = {pool.submit(self._fetch_one, package, mirrors,
                                       stop): package
                           for package in packages}
                gone, failed = [], []
                done = fetched = 0
                for future in as_completed(futures):
                    package = futures[future]
                    try:
                        future.result()
                    except GoneError:
                        gone.append(package)
                    except BuildError as e:
                        failed.append(e)
                        stop.set()
                    done, fetched = done + 1, fetched + package.size
                    self.report.count(f'fetching {what}', done,
                                      len(packages), fetched)
            except BaseException:
                stop.set()
                raise
            if failed:
                raise failed[0]
            if gone:
                raise GoneError(sorted(gone), mirrors)

    def _fetch_one(self, package: Package, mirrors: Sequence[str],
                   stop: threading.Event) -> None:
        part = self.folder / f'{package.sha256}.part'
        gone: List[str] = []
        said: Dict[str, str] = {}
        for attempt in range(TRIES):
            # Patience grows with each round
            if stop.wait(attempt):
                raise FetchError(f'{package.name}: stopped')
            for mirror in mirrors:
                if mirror in gone:
                    continue
                try:
                    _try_mirror(f'{mirror}/{package.location}', part,
                                package.sha256, package.size)
                    # Readable, and nobody's to modify by accident
                    os.chmod(part, 0o444)
                    os.replace(part, self.path(package))
                    return
                except _Gone as e:
                    gone.append(mirror)
                    said[mirror] = str(e)
                except _Bad as e:
                    part.unlink(missing_ok=True)
                    said[mirror] = str(e)
                except (OSError, http.client.HTTPException) as e:
                    if getattr(e, 'errno', None) in LOCAL_ERRORS:
                        raise
                    said[mirror] = (str(e).splitlines() or [repr(e)])[0]
            if len(gone) == len(mirrors):
                raise GoneError([package], mirrors)
        reasons = '; '.join(f'{hide_password(mirror)}: {why}'
                            for mirror, why in said.items())
        raise FetchError(f'{package.name} {package.version} can\'t be '
                         f'fetched: {reasons}', next_step='try again, or '
                         'set QEMU_MKOSI_MIRROR to another mirror')
