# SPDX-License-Identifier: GPL-2.0-or-later
'''
Remembers which files of the asset cache had the right hash

Such a file is not read again until it changes. What it looked like to
stat() when it was read is kept in this process, and for the next one in
a file <hash>.verified beside it. A cache that cannot be written to works
too, a file is then read once in each process.
'''

import hashlib
import json
import logging
import os
import tempfile
import time
from pathlib import Path
from typing import BinaryIO, Dict, List, Optional


# The coarsest time stamps of a file system that can hold a cache (FAT)
COARSEST_STAMP_NS = 2_000_000_000

_Looks = List[int]
_good: Dict[Path, _Looks] = {}
_log = logging.getLogger('qemu-test')


def problem_of(path: Path, sha256: str, size: int,
               refresh: bool = False) -> Optional[str]:
    '''
    @params path: a file of the cache, named by its hash
    @params sha256: the hash that it must have
    @params size: its size in bytes
    @params refresh: read the file even if it was found good before

    Returns what is wrong with the file, None if nothing is
    '''
    try:
        with open(path, 'rb') as file:
            before = os.fstat(file.fileno())
            if before.st_size != size:
                return f'has {before.st_size} bytes, expected {size}: {path}'
            if not refresh and _was_good(path, _looks(before)):
                return None
            started = time.time_ns()
            actual = sha256_of(file)
            after = os.fstat(file.fileno())
    except FileNotFoundError:
        return f'is not in the cache {path.parent}'
    except OSError as e:
        return f'cannot be read: {e.strerror}: {path}'
    if actual != sha256:
        return f'has SHA-256 {actual}, expected {sha256}: {path}'

    # A file that was written just now may be written to once more
    # without a change of its time stamps
    changed = max(after.st_mtime_ns, after.st_ctime_ns)
    if (_looks(before) == _looks(after)
            and changed + COARSEST_STAMP_NS < started):
        _remember(path, _looks(after))
    return None


def sha256_of(file: BinaryIO) -> str:
    '''The SHA-256 of what is left to read of @file'''
    digest = hashlib.sha256()
    while True:
        chunk = file.read(1 << 20)
        if not chunk:
            return digest.hexdigest()
        digest.update(chunk)


def write_atomically(path: Path, text: str) -> None:
    '''
    @params path: file that has @text when this returns; whoever reads it
                  meanwhile finds the old text or the new one

    Raises OSError, with the old file still there
    '''
    fd, name = tempfile.mkstemp(prefix=f'{path.name}.', dir=path.parent)
    try:
        with open(fd, 'w', encoding='ascii') as file:
            file.write(text)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except OSError:
        os.unlink(name)
        raise


def _looks(status: os.stat_result) -> _Looks:
    # ctime too: unlike mtime, it cannot be set back
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns,
            status.st_ino, status.st_dev]


def _was_good(path: Path, looks: _Looks) -> bool:
    if _good.get(path) == looks:
        return True
    try:
        text = path.with_suffix('.verified').read_text(encoding='ascii')
        return bool(json.loads(text) == {path.name: looks})
    except (OSError, ValueError, RecursionError):
        return False


def _remember(path: Path, looks: _Looks) -> None:
    _good[path] = looks
    try:
        write_atomically(path.with_suffix('.verified'),
                         json.dumps({path.name: looks}))
    except OSError as e:
        _log.debug('%s will be read again: %s', path, e)
