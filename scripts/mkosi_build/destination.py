# SPDX-License-Identifier: GPL-2.0-or-later
'''
Where images are published. Objects have flat names and never change:

- what is there with equal bytes is a success, without an upload;
- what is there with other bytes is refused, and stays as it is. Only what
  an upload of the same object has left half-made, under a name that is its
  hash, is replaced;
- an object that was uploaded is read back before it counts as there.

What may pass is tried again, later and later. Here is what all kinds of
destinations share, and the simplest of them, a folder.
'''

import contextlib
import errno
import hashlib
import os
import shutil
import socket
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Iterator, Optional, Tuple, TypeVar

from .cache import sha256_file
from .error import PublishError

TRIES = 5
# Seconds before the second try, doubled before each further one
PAUSE = 1.0
# What a server may ask for, in seconds
LONGEST_PAUSE = 300.0
CHUNK = 1 << 16

# SHA-256 and size in bytes
Found = Tuple[str, int]
T = TypeVar('T')


@dataclass(frozen=True)
class Item:
    '''An object: its @name there, its file here, SHA-256, size in bytes.'''
    name: str
    path: Path
    sha256: str
    size: int

    @property
    def found(self) -> Found:
        '''As what it is to be found there.'''
        return self.sha256, self.size


class OtherBytesError(PublishError):
    '''There is something else under that name.'''


class Transient(Exception):
    '''May pass; @wait is how many seconds the server asks to.'''

    def __init__(self, message: str, wait: float = 0) -> None:
        super().__init__(message)
        self.wait = wait


def _no_space(error: OSError) -> bool:
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Destination:
    '''
    Something to publish to. @shown is fit for messages. Any number of
    threads may use it; who sets @stop has them end soon. @tries is how often
    what may pass is tried.
    '''
    def __init__(self, shown: str) -> None:
        self.shown = shown
        self.tries = TRIES
        self.stop = threading.Event()

    def add(self, item: Item) -> bool:
        '''
        Have @item there. Returns whether it was uploaded just now. Raises
        OtherBytesError, PublishError.
        '''
        sent = False

        def step() -> bool:
            nonlocal sent
            if self._settled(item, sent):
                return sent
            sent = self._put(item) or sent
            if not self._settled(item, sent):
                raise Transient('what was uploaded is not there')
            return sent

        return self._patiently(f'uploading {item.path.name}', step)

    def read(self, name: str) -> Optional[bytes]:
        '''What is in the small object @name, None if it is not there.'''
        def step() -> Optional[bytes]:
            with self._open(name, 1 << 26) as chunks:
                return None if chunks is None else b''.join(chunks)

        return self._patiently(f'reading {name}', step)

    def size(self, name: str) -> Optional[int]:
        '''The size of the object @name, None if it is not there.'''
        return self._patiently(f'asking for {name}',
                               lambda: self._size(name))

    def remove_half_made(self, name: str) -> bool:
        '''
        Remove the object @name, which its reader knows to be half an
        upload. Returns whether it is gone: only servers leave such things,
        and not all of these let them be removed.
        '''
        return self._patiently(f'removing {name}',
                               lambda: self._remove(name))

    # -- What the kinds differ in -------------------------------------------

    def _open(self, name: str, size: int) -> \
            'contextlib.AbstractContextManager[Optional[Iterator[bytes]]]':
        '''The object @name, of about @size bytes, in pieces.'''
        raise NotImplementedError

    def _size(self, name: str) -> Optional[int]:
        raise NotImplementedError

    def _put(self, item: Item) -> bool:
        '''Upload @item, unless there is one, and then return false.'''
        raise NotImplementedError

    def _remove(self, name: str) -> bool:
        '''Remove a half-made object, if that can be done.'''
        raise NotImplementedError

    # -- What they share ----------------------------------------------------

    def _patiently(self, doing: str, step: Callable[[], T]) -> T:
        said, wait = '', 0.0
        for attempt in range(self.tries):
            if attempt:
                self._pause(min(max(wait, PAUSE * 2 ** (attempt - 1)),
                                LONGEST_PAUSE))
            if self.stop.is_set():
                raise PublishError(f'{self.shown}: {doing}: stopped')
            try:
                return step()
            except Transient as e:
                said, wait = str(e), e.wait
        raise PublishError(
            f'{self.shown}: {doing}: gave up after {self.tries} tries: {said}',
            next_step='look after the server, and run the same command '
            'again: it goes on where it ended')

    def _pause(self, seconds: float) -> None:
        self.stop.wait(seconds)

    def _find(self, name: str, size: int) -> Optional[Found]:
        digest, length = hashlib.sha256(), 0
        with self._open(name, size) as chunks:
            if chunks is None:
                return None
            for chunk in chunks:
                digest.update(chunk)
                length += len(chunk)
        return digest.hexdigest(), length

    def _settled(self, item: Item, sent: bool) -> bool:
        '''
        Whether @item is there, if something is. @sent is whether it was
        not, before this call of add().
        '''
        found = self._find(item.name, item.size)
        if found in (None, item.found):
            return found is not None
        assert found
        if found != self._find(item.name, item.size):
            raise Transient(f'{item.name} reads differently each time')
        self.check_source(item)
        if (item.name == item.sha256 and (sent or _cut_off(item, found))
                and self._remove(item.name)):
            return False
        raise OtherBytesError(
            f'{self.shown}: {item.name} is there with other bytes: expected '
            f'SHA-256 {item.sha256}, {item.size} bytes; found {found[0]}, '
            f'{found[1]} bytes', next_step='nothing was overwritten; find '
            'out who stored it, remove it there if it is damaged, and '
            'publish again')

    def check_source(self, item: Item) -> None:
        '''Raise PublishError if the file of @item is not what it was.'''
        if sha256_file(item.path) != item.sha256:
            raise PublishError(
                f'{item.path} has changed: expected SHA-256 {item.sha256}',
                next_step='run the same command again')


def _cut_off(item: Item, found: Found) -> bool:
    '''Whether @found is the beginning of @item.'''
    if found[1] >= item.size:
        return False
    with open(item.path, 'rb') as file:
        digest, left = hashlib.sha256(), found[1]
        while chunk := file.read(min(left, CHUNK)):
            digest.update(chunk)
            left -= len(chunk)
    return digest.hexdigest() == found[0]


# -- A folder ---------------------------------------------------------------

class Folder(Destination):
    '''A folder, which rsync may take elsewhere.'''

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder))
        self.folder = folder
        self.ending = f'.{socket.gethostname()}.{os.getpid()}.tmp'

    def clear(self) -> None:
        '''Clear away what killed processes of this host have left.'''
        if not self.folder.is_dir():
            raise PublishError(f'{self.folder}: no such folder',
                               next_step=f'mkdir -p {self.folder}, unless it '
                               'is to be mounted there')
        for left in self.folder.glob(f'.*.{socket.gethostname()}.*.tmp'):
            if not Path('/proc', left.name.split('.')[-2]).exists():
                left.unlink(missing_ok=True)

    def _said(self, error: OSError) -> PublishError:
        return PublishError(
            f'{self.shown}: {error.strerror or error}',
            next_step='free some space there, and run the same command again'
            if _no_space(error) else 'make the folder writable, and run the '
            'same command again')

    @contextlib.contextmanager
    def _open(self, name: str,
              size: int) -> Iterator[Optional[Iterator[bytes]]]:
        try:
            with open(self.folder / name, 'rb') as file:
                yield iter(lambda: file.read(CHUNK), b'')
        except FileNotFoundError:
            yield None
        except OSError as e:
            raise self._said(e) from e

    def _size(self, name: str) -> Optional[int]:
        try:
            return (self.folder / name).stat().st_size
        except FileNotFoundError:
            return None
        except OSError as e:
            raise self._said(e) from e

    def _put(self, item: Item) -> bool:
        path = self.folder / item.name
        temporary = self.folder / (
            f'.{item.name}-{threading.get_ident()}{self.ending}')
        try:
            with open(item.path, 'rb') as source, \
                    open(temporary, 'xb') as file:
                shutil.copyfileobj(source, file, CHUNK)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o444)
            self._name(temporary, path)
            self._sync()
            return True
        except FileExistsError:
            # Another publisher was quicker
            return False
        except FileNotFoundError as e:
            raise Transient('somebody has cleared away what was '
                            'written') from e
        except OSError as e:
            raise self._said(e) from e
        finally:
            temporary.unlink(missing_ok=True)

    @staticmethod
    def _name(temporary: Path, path: Path) -> None:
        try:
            # Unlike rename(), it replaces nothing
            os.link(temporary, path)
        except OSError as e:
            if e.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
                raise
            if path.exists():
                raise FileExistsError(path) from e
            os.rename(temporary, path)

    def _sync(self) -> None:
        '''Have the names survive a crash, too.'''
        handle = os.open(self.folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def _remove(self, name: str) -> bool:
        # Nothing here is ever half-made
        return False
