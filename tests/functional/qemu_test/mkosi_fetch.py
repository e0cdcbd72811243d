# SPDX-License-Identifier: GPL-2.0-or-later
'''
Fetches files into the asset cache, from the first store that has them whole

A store is an http or https URL or an absolute folder; a file of it is named
by its SHA-256, as in the cache. Any number of processes on any number of
hosts may share a cache: each writes a file of its own beside the final one,

    .<sha256>.<host>.<pid>.<random>.part

and renames it when it is whole. No process ever writes to a file that
another one made, so what has a final name stays as it is. The lock file
.<sha256>.lock keeps processes from doing the same work twice, nothing else:
all goes well where locks do not work, or where who has one is stuck.

What a broken transfer leaves is gone on from by the next process that wants
the same file, once its own one is dead. After a day it is removed.
'''

import errno
import fcntl
import os
import re
import secrets
import shutil
import socket
import stat
import sys
import time
from contextlib import contextmanager
from io import FileIO
from logging import Logger
from pathlib import Path
from typing import TYPE_CHECKING, Any, Iterator, List, Optional, Sequence

from .mkosi_verified import problem_of

if TYPE_CHECKING:
    from mkosi_build.transfer import TransferError


# Rounds over all stores, and the seconds between them
TRIES = 2
PAUSE = 1
# How often a file is begun anew that another process took away
REPEATS = 3
# Seconds without progress until a process that has the lock counts as stuck
LOCK_PATIENCE = 90
POLL = 0.2
# Seconds after which what nobody wrote to is nobody's
STALE = 24 * 60 * 60

_HOST = re.sub('[^A-Za-z0-9-]', '-', socket.gethostname())[:64] or 'host'
_PART = re.compile(r'\.([0-9a-f]{64})\.([A-Za-z0-9-]+)\.([0-9]+)\.[0-9a-f]+'
                   r'\.part')
# Also what mkosi_verified.write_atomically() has in the works
_LEFT = re.compile(r'\.[0-9a-f]{64}\.(?:.*\.part|lock)'
                   r'|[0-9a-f]{64}\.(?:stamp|verified)\..+')


class NotFetched(Exception):
    '''No store has the file whole; @transient as in AssetError'''
    def __init__(self, msg: str, transient: bool) -> None:
        super().__init__(msg)
        self.msg = msg
        self.transient = transient


def import_transfer() -> Any:
    '''The builder's way to transfer files, imported when it is needed'''
    scripts = str(Path(__file__).parents[3] / 'scripts')
    if scripts not in sys.path:
        sys.path.append(scripts)
    from mkosi_build import transfer
    return transfer


def stores_of_environment() -> List[str]:
    '''
    Those of QEMU_TEST_MKOSI_STORES, without a slash at the end. Raises
    NotFetched for what cannot be a store
    '''
    stores = os.getenv('QEMU_TEST_MKOSI_STORES', '').split()
    for store in stores:
        if not re.fullmatch(r'https?://[^/?#]+(/[^?#]*)?|/+[^/].*', store):
            raise NotFetched(
                'QEMU_TEST_MKOSI_STORES: expected http or https URLs or '
                'absolute folders, separated by spaces, found '
                f"'{import_transfer().shown(store)}'", transient=False)
    return [store.rstrip('/') for store in stores]


def fetch(path: Path, size: int, stores: Sequence[str], log: Logger,
          refresh: bool = False) -> None:
    '''
    @params path: a file of the cache, named by its SHA-256
    @params size: its size in bytes
    @params stores: where to look for it, in order
    @params log: is told what goes on
    @params refresh: as of problem_of()

    Returns once the file is there and whole. Raises NotFetched, or OSError
    if the cache cannot be written to
    '''
    with _alone(path, log):
        for repeat in range(REPEATS):
            if problem_of(path, path.name, size, refresh) is None:
                return
            try:
                _fetch(path, size, stores, log)
                return
            except FileNotFoundError:
                # Somebody took our file for one of a dead process
                if repeat + 1 == REPEATS:
                    raise


def _fetch(path: Path, size: int, stores: Sequence[str],
           log: Logger) -> None:
    transfer = import_transfer()

    def failed(source: str, error: 'TransferError') -> None:
        log.info('%s: %s', transfer.shown(source), error)

    part = _begin(path)
    try:
        source = transfer.transfer_from_any(
            [f'{store}/{path.name}' for store in stores], part, size,
            path.name, limits=transfer.LIMITS, tries=TRIES, pause=PAUSE,
            failed=failed)
        _finish(part, transfer.shown(source))
        os.replace(part, path)
        log.info('Cached %s at %s', transfer.shown(source), path)
    except transfer.Failed as e:
        _leave(part)
        raise NotFetched(f'no store has it: {e}', e.passes) from e
    except OSError:
        # On a full disk, it is in the way
        part.unlink(missing_ok=True)
        raise
    except BaseException:
        _leave(part)
        raise


# -- Temporary files --------------------------------------------------------

def _name(sha256: str, pid: int) -> str:
    return f'.{sha256}.{_HOST}.{pid}.{secrets.token_hex(4)}.part'


def _begin(path: Path) -> Path:
    '''
    A file for @path to be written to, with what dead processes had of it;
    other things that have been there for long are cleared away
    '''
    part = path.with_name(_name(path.name, os.getpid()))
    with open(part, 'xb', buffering=0) as file:
        # The time of the server of a shared cache: that of this host, or
        # of another, may be wrong
        now = os.fstat(file.fileno()).st_mtime
        left = []
        for other in path.parent.iterdir():
            if other != part and _LEFT.fullmatch(other.name):
                if _is_of_dead(other.name, path.name):
                    left.append(other)
                elif _is_stale(other, now):
                    _remove(other)
        _take_over(left, file)
    return part


def _is_of_dead(name: str, sha256: str) -> bool:
    match = _PART.fullmatch(name)
    if match is None or match.group(1) != sha256:
        return False
    pid = int(match.group(3))
    if pid == 0:
        # Left by _leave()
        return True
    if match.group(2) != _HOST:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        # Somebody else's
        pass
    return False


def _is_stale(path: Path, now: float) -> bool:
    try:
        # A time in the future is from when a clock was wrong
        return abs(now - path.stat().st_mtime) > STALE
    except OSError:
        return False


def _remove(path: Path) -> None:
    try:
        path.unlink()
    except OSError:
        # Gone by now, or somebody else's
        pass


def _take_over(left: Sequence[Path], file: FileIO) -> None:
    '''
    Copy the longest of the files @left, and remove them. They are not gone
    on with themselves: should one of them be written to after all, by a
    process in another container, it must not be what gets a final name.
    '''
    def length(path: Path) -> int:
        try:
            return path.stat().st_size
        except OSError:
            return 0

    longest = max(left, key=length, default=None)
    if longest is not None:
        try:
            with open(longest, 'rb') as source:
                shutil.copyfileobj(source, file, 1 << 20)
        except OSError:
            # Then from the beginning
            file.truncate(0)
    for path in left:
        _remove(path)


def _leave(part: Path) -> None:
    '''Leave what was transferred to who comes next'''
    try:
        if part.stat().st_size > 0:
            sha256 = part.name.split('.')[1]
            os.replace(part, part.with_name(_name(sha256, 0)))
        else:
            part.unlink()
    except OSError:
        pass


def _finish(part: Path, source: str) -> None:
    '''Make a whole file one that nobody modifies by accident, as Asset'''
    fd = os.open(part, os.O_RDONLY)
    try:
        status = os.fstat(fd)
        # Else it is the store's own file, with other names
        if status.st_nlink == 1:
            if hasattr(os, 'setxattr'):
                try:
                    os.setxattr(fd, 'user.qemu-asset-url', source.encode())
                except OSError:
                    # Just for information
                    pass
            os.fchmod(fd, stat.S_IRUSR | stat.S_IRGRP)
        os.fsync(fd)
    finally:
        os.close(fd)


# -- The lock ---------------------------------------------------------------

@contextmanager
def _alone(path: Path, log: Logger) -> Iterator[None]:
    '''
    Wait for another process that fetches @path, as long as it gets on.
    This saves work, and must not be relied upon
    '''
    lock = path.with_name(f'.{path.name}.lock')
    while True:
        file = _open_lock(lock)
        if file is None:
            yield
            return
        with file:
            if not _wait(file, path, log):
                yield
                return
            # Who had it before has removed it
            if not _is_same(file, lock):
                continue
            try:
                yield
            finally:
                _remove(lock)
            return


def _open_lock(lock: Path) -> Optional[FileIO]:
    '''None where there can be no lock; what is behind that shows soon'''
    for mode in ('ab', 'rb'):
        try:
            return open(lock, mode, buffering=0)
        except OSError:
            # Perhaps that of a dead process of another user
            pass
    return None


def _wait(file: FileIO, path: Path, log: Logger) -> bool:
    '''Whether the lock was got, False if who has it is stuck'''
    seen: List[Any] = []
    since = time.monotonic()
    while not _try_lock(file):
        if not seen:
            log.info('Waiting for another process to fetch %s', path.name)
        now = _progress(path)
        if now != seen:
            seen, since = now, time.monotonic()
        elif time.monotonic() - since > LOCK_PATIENCE:
            log.info('It is stuck, not waiting any longer')
            return False
        time.sleep(POLL)
    return True


def _try_lock(file: FileIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError as e:
        # Where there are no locks, all may go on
        return e.errno not in (errno.EWOULDBLOCK, errno.EAGAIN,
                               errno.EACCES, errno.EINTR)


def _is_same(file: FileIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except OSError:
        return False


def _progress(path: Path) -> List[Any]:
    '''What changes while some process fetches @path'''
    found: List[Any] = ['begun']
    for part in sorted(path.parent.glob(f'.{path.name}.*.part')):
        try:
            found.append((part.name, part.stat().st_size))
        except OSError:
            # Renamed meanwhile
            pass
    return found
