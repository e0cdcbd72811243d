# SPDX-License-Identifier: GPL-2.0-or-later
'''
The package store: files under their SHA-256, fetched from any mirror that
has them. The hash decides, not the source: a file is used if its size and
SHA-256 are the lock's, wherever it came from.
'''

import configparser
import os
import queue
import re
import threading
import urllib.parse
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import List, Optional, Sequence, Tuple

from . import command
from .cache import Cache, host_error, mark_used, sha256_file
from .error import FetchError, HostError
from .lock import Package
from .report import Report
from .transfer import (LIMITS, PAUSE, TRIES, Failed, TransferError, check,
                       transfer_from_any)

# QEMU's name of an architecture to Debian's; Fedora's are the same
DEBIAN_ARCHITECTURES = {'x86_64': 'amd64', 'aarch64': 'arm64'}

# Where dnf finds its repositories
YUM_REPOS = Path('/etc/yum.repos.d')

CONNECTIONS = 8

# A package, and what went wrong with it
_End = Tuple[Package, Optional[Exception]]


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


def hide_password(url: str) -> str:
    '''@url without user name and password, fit for messages.'''
    return re.sub(r'//[^/\s]*@', '//', url)


def is_mirror(url: str) -> bool:
    '''Whether files can be had from below @url: http, https or file.'''
    try:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme == 'file':
            return bool(parts.path)
        # Asking for the port checks it
        return (parts.scheme in ('http', 'https') and bool(parts.hostname)
                and parts.port != 0)
    except ValueError:
        return False


def _apt_mirrors(distribution: str) -> List[str]:
    '''Those that this host's own apt is set up with.'''
    try:
        result = command.run(['apt-get', 'indextargets', '--format',
                              '$(ORIGIN) $(REPO_URI)',
                              'Created-By: Packages'])
    except HostError:
        return []
    mirrors = []
    for line in result.stdout.splitlines():
        origin, _, uri = line.rpartition(' ')
        # Without downloaded lists apt does not know the origin
        if origin.lower() in ('', distribution) and uri.startswith('http'):
            # The security archive has no other packages than its own
            if not uri.rstrip('/').endswith('-security'):
                mirrors.append(uri)
    return mirrors


def _dnf_mirrors(release: str, arch: str) -> List[str]:
    '''
    Those that this host's own dnf is set up with. Its list of mirrors
    which are near (metalink) is not asked.
    '''
    mirrors = []
    for path in sorted(YUM_REPOS.glob('*.repo')):
        conf = configparser.RawConfigParser(strict=False)
        try:
            conf.read(path, encoding='utf-8')
        except (configparser.Error, OSError, UnicodeDecodeError):
            # dnf's problem, not ours
            continue
        for url in conf.get('fedora', 'baseurl', fallback='').split():
            url = url.replace('$releasever', release)
            mirrors.append(url.replace('$basearch', arch))
    return [url for url in mirrors if is_mirror(url) and '$' not in url]


def host_mirrors(distribution: str, release: str = '', arch: str = '',
                 further: Sequence[str] = ()) -> List[str]:
    '''
    The mirrors to ask for packages of @release of @distribution for @arch,
    QEMU's name of it, in order: those of QEMU_MKOSI_MIRROR, those that this
    host's own apt or dnf is set up with, and @further ones. {arch} in a URL
    stands for the distribution's name of the architecture. Raises
    FetchError if there is none.
    '''
    name = arch
    if distribution == 'debian':
        name = DEBIAN_ARCHITECTURES.get(arch, arch)
    mirrors = [url.replace('{arch}', name) for url in
               os.getenv('QEMU_MKOSI_MIRROR', '').split()]
    for mirror in mirrors:
        if not is_mirror(mirror):
            raise FetchError('QEMU_MKOSI_MIRROR: expected http, https or '
                             f'file URLs, found {hide_password(mirror)!r}',
                             next_step='write it as http://HOST/debian')
    mirrors += (_dnf_mirrors(release, arch) if distribution == 'fedora'
                else _apt_mirrors(distribution))
    mirrors += [url.replace('{arch}', name) for url in further]
    mirrors = list(dict.fromkeys(m.rstrip('/') for m in mirrors))
    if not mirrors:
        raise FetchError(
            f'no {distribution} mirror is known on this host',
            next_step='set QEMU_MKOSI_MIRROR to the URL of one')
    return mirrors


def first_with(mirrors: Sequence[str], location: str) -> str:
    '''
    The first of @mirrors that has the file @location. Raises FetchError
    with what each one said if there is none.
    '''
    said = []
    for mirror in mirrors:
        try:
            check(f'{mirror}/{location}', LIMITS)
            return mirror
        except TransferError as e:
            said.append(f'{hide_password(mirror)}: {e}')
    raise FetchError(f'no mirror has {location}: {"; ".join(said)}',
                     next_step='set QEMU_MKOSI_MIRROR to the URL of one that '
                     'has it')


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
                mark_used(path)
                return True
            path.unlink()
        except FileNotFoundError:
            pass
        return False

    def fetch(self, packages: Sequence[Package], distribution: str,
              what: str, *, release: str = '', arch: str = '',
              further: Sequence[str] = ()) -> None:
        '''
        Make sure that all @packages of @distribution are in the store and
        whole. @what names them for the report; @release, @arch and
        @further say where to look for them, see host_mirrors().

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
                    self._fetch_missing(missing, host_mirrors(
                        distribution, release, arch, further), what)
        except OSError as e:
            raise host_error(e, f'Fetching {what}') from e

    def _fetch_missing(self, packages: Sequence[Package],
                       mirrors: Sequence[str], what: str) -> None:
        size = sum(p.size for p in packages)
        with self.report.stage(f'fetching {what}: {len(packages)} packages, '
                               f'{size / 1e6:.1f} MB'):
            gone = self._fetch_all(packages, mirrors, what)
            if gone:
                raise GoneError(gone, mirrors)

    def _fetch_all(self, packages: Sequence[Package], mirrors: Sequence[str],
                   what: str) -> List[Package]:
        '''
        Fetch @packages over some connections at once, up to the first that
        fails. Returns those that no mirror has.
        '''
        stop = threading.Event()
        todo: 'queue.SimpleQueue[Package]' = queue.SimpleQueue()
        ended: 'queue.SimpleQueue[_End]' = queue.SimpleQueue()

        def work() -> None:
            while not stop.is_set():
                try:
                    package = todo.get_nowait()
                except queue.Empty:
                    return
                try:
                    self._fetch_one(package, mirrors, stop)
                    ended.put((package, None))
                except Exception as e:   # pylint: disable=broad-except
                    ended.put((package, e))

        for package in packages:
            todo.put(package)
        # Daemons, so that an interrupted builder need not wait for mirrors
        threads = [threading.Thread(target=work, daemon=True)
                   for _ in range(CONNECTIONS)]
        for thread in threads:
            thread.start()
        try:
            return self._follow(ended, len(packages), what)
        except Exception:
            stop.set()
            for thread in threads:
                thread.join()
            raise
        finally:
            stop.set()

    def _follow(self, ended: 'queue.SimpleQueue[_End]', total: int,
                what: str) -> List[Package]:
        gone = []
        size = 0
        for done in range(1, total + 1):
            package, error = ended.get()
            if isinstance(error, GoneError):
                gone.append(package)
            elif error:
                raise error
            size += package.size
            self.report.count(f'fetching {what}', done, total, size)
        return sorted(gone)

    def _fetch_one(self, package: Package, mirrors: Sequence[str],
                   stop: threading.Event) -> None:
        part = self.folder / f'{package.sha256}.part'
        urls = {f'{mirror}/{package.location}': mirror
                for mirror in mirrors}
        try:
            transfer_from_any(list(urls), part, package.size, package.sha256,
                              limits=LIMITS, tries=TRIES, pause=PAUSE,
                              stop=stop)
        except Failed as e:
            if e.missing:
                raise GoneError([package], mirrors) from e
            reasons = '; '.join(f'{hide_password(urls[url])}: {why}'
                                for url, why in e.said.items())
            raise FetchError(f'{package.name} {package.version} can\'t be '
                             f'fetched: {reasons}', next_step='try again, or '
                             'set QEMU_MKOSI_MIRROR to another mirror') from e
        # Readable, and nobody's to modify by accident
        os.chmod(part, 0o444)
        os.replace(part, self.path(package))
