# SPDX-License-Identifier: GPL-2.0-or-later
'''
The folders on this machine: the builder's own and QEMU's asset cache.

    $QEMU_MKOSI_DIR, else ~/.cache/qemu/mkosi
        store/<sha256>          a package, whole and verified
        tools/<digest>/         an unpacked tools tree
        images/<image>/<arch>/<identity>/
                                artefacts of one build, record.json,
                                provenance.json, packages.spdx.json
        hosts/<row>/<identity>/ an unpacked system of the matrix
        declared/<sha256>.json  the copyright files of a package
        work/<name>/            what is being made; stale once its lock is free
        log/<name>.log          mkosi's words in the last build
        locks/<name>            held with flock() while <name> is made
        override.json           results that the registry does not know
    $QEMU_TEST_CACHE_DIR/download, else ~/.cache/qemu/download
        <sha256>, <sha256>.stamp

Every file gets its final name when it is complete, by rename(). A killed
process leaves something in work/ alone, and the next build clears it away,
unless somebody holds that lock. Any number of processes may share the
folders.
'''

import errno
import fcntl
import hashlib
import os
import re
import shutil
import stat
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Callable, Iterator, Optional

from .error import BuildError, HostError


# Below the builder's folder, and beside the registry, what the rows of the
# matrix are run in
HOSTS = 'hosts'

# What neither mkosi's options nor apt's lists of sources take for syntax
_PLAIN = re.compile(r'[\w/.+@=~-]+')


def host_error(error: OSError, doing: str) -> BuildError:
    '''The error to show for what the operating system refused.'''
    # Of a copy, the file that is written counts
    what = error.filename2 or error.filename or 'the cache'
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return HostError(f'{doing}: no space left for {what}',
                         next_step='free some space, or point QEMU_MKOSI_DIR '
                         'and QEMU_TEST_CACHE_DIR at a larger file system')
    said = error.strerror or str(error)
    return HostError(f'{doing}: {what}: {said}',
                     next_step='make the folder writable, or point '
                     'QEMU_MKOSI_DIR and QEMU_TEST_CACHE_DIR elsewhere')


@contextmanager
def naming(path: Path) -> Iterator[None]:
    '''Let errors of writing, which have no file name, be of @path.'''
    try:
        yield
    except OSError as e:
        e.filename = e.filename or str(path)
        raise


def sha256_file(path: Path) -> str:
    '''The SHA-256 of the file @path, in hex digits.'''
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _temporary(path: Path) -> Path:
    '''
    The name under which to make @path, beside it. What killed processes
    left under such names goes.
    '''
    ours = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
    for left in path.parent.glob(f'.{path.name}.*.tmp'):
        writer = left.name.split('.')[-2]
        if left == ours or not Path('/proc', writer).exists():
            left.unlink(missing_ok=True)
    return ours


def write_atomically(path: Path, text: str) -> None:
    '''Replace the file @path by @text: readers see the old or the new.'''
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    try:
        with naming(path), open(temporary, 'w', encoding='utf-8',
                                newline='') as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            os.chmod(temporary, stat.S_IMODE(path.stat().st_mode))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def link_or_copy(source: Path, dest: Path) -> None:
    '''
    Give the file @source the further name @dest, which does not exist: a
    hard link where the file system allows, else a copy.
    '''
    try:
        os.link(source, dest)
    except OSError as e:
        if e.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK,
                           errno.ENOTSUP, errno.EACCES):
            raise
        shutil.copyfile(source, dest)


def remove_tree(path: Path) -> None:
    '''Remove the folder @path, folders without write permission too.'''
    def grant(function: Callable[..., object], name: str,
              _info: object) -> None:
        parent = os.path.dirname(name)
        for folder in (parent, name):
            if os.path.isdir(folder) and not os.path.islink(folder):
                os.chmod(folder, 0o700)
        if function is os.unlink:
            os.unlink(name)
        else:
            shutil.rmtree(name)

    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path, onerror=grant)


def mark_used(path: Path) -> None:
    '''
    Let @path, which is about to be used, have been modified now: what was
    used a short while ago is not pruned.
    '''
    try:
        os.utime(path)
    except OSError:
        # A cache that is only read here is pruned by its owner
        pass


class Cache:
    '''The folders above. Raises HostError where they can't be made.'''

    def __init__(self) -> None:
        home_cache = Path('~/.cache/qemu').expanduser()
        own = os.getenv('QEMU_MKOSI_DIR')
        self.root = Path(own).absolute() if own else home_cache / 'mkosi'
        assets = os.getenv('QEMU_TEST_CACHE_DIR')
        base = Path(assets).absolute() if assets else home_cache
        self.assets = base / 'download'
        self.store = self.root / 'store'
        self.tools = self.root / 'tools'
        self.images = self.root / 'images'
        self.override = self.root / 'override.json'

    def check_writable(self) -> None:
        '''Raise HostError unless both folders can be written.'''
        if not _PLAIN.fullmatch(str(self.root)):
            raise HostError(
                f'{self.root}: mkosi and apt can\'t work below a path with '
                'other characters than letters, digits and /._+@=~-',
                next_step='point QEMU_MKOSI_DIR at another folder')
        for folder in (self.root, self.assets):
            probe = folder / f'.probe.{os.getpid()}'
            try:
                folder.mkdir(parents=True, exist_ok=True)
                try:
                    with naming(probe):
                        probe.write_bytes(b'probe')
                finally:
                    probe.unlink(missing_ok=True)
            except OSError as e:
                raise host_error(e, 'Preparing the cache folders') from e

    def _lock_file(self, name: str) -> Path:
        path = self.root / 'locks' / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    @contextmanager
    def lock(self, name: str,
             waiting: Optional[Callable[[], None]] = None) -> Iterator[None]:
        '''
        Hold the lock @name; call @waiting once if somebody else holds it.
        The kernel gives it up with the process, however that ends.
        '''
        with open(self._lock_file(name), 'ab') as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if waiting:
                    waiting()
                fcntl.flock(file, fcntl.LOCK_EX)
            yield

    @contextmanager
    def scratch(self, name: str) -> Iterator[Path]:
        '''
        An empty folder to work in, gone afterwards. The caller holds the
        lock @name, so that what lies there before is a dead process's.
        '''
        path = self.root / 'work' / name
        remove_tree(path)
        path.mkdir(parents=True)
        try:
            yield path
        finally:
            remove_tree(path)

    def clear_stale(self) -> None:
        '''Clear away what killed processes left in work/.'''
        work = self.root / 'work'
        if not work.is_dir():
            return
        for left in work.iterdir():
            with open(self._lock_file(left.name), 'ab') as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    remove_tree(left)
                except BlockingIOError:
                    # Somebody works there
                    pass

    def log(self, name: str) -> Path:
        '''Where the log of @name goes.'''
        path = self.root / 'log' / f'{name}.log'
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def add_asset(self, source: Path, sha256: str) -> Path:
        '''
        Put the verified file @source into QEMU's asset cache, replacing
        what is there under that hash. Returns its path.
        '''
        asset = self.assets / sha256
        temporary = _temporary(asset)
        try:
            link_or_copy(source, temporary)
            # As QEMU does: nobody modifies an asset by accident
            os.chmod(temporary, 0o444)
            os.replace(temporary, asset)
        finally:
            temporary.unlink(missing_ok=True)
        # QEMU's clean_functional_cache.py goes by this time
        asset.with_suffix('.stamp').write_text(f'{int(time.time())}')
        return asset
