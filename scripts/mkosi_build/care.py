# SPDX-License-Identifier: GPL-2.0-or-later
'''
Removes from the caches what nobody refers to, and tells what they hold.

Safe beside builds and tests. What a process has open, what was used or
verified a short while ago, and what somebody holds the lock of stays; a
file is looked at again when its lock is held, and folders are moved away
before they are removed. What nobody knows is never touched, and of QEMU's
asset cache only what a build that goes has put there.

"Used" is the time of modification: of a package, set when it is verified;
of a tools tree or a build's record, when a builder takes it; of an asset's
time stamp, when a test takes it.
'''

import fcntl
import os
import re
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from typing import Dict, Iterator, List, Optional, Set

from .cache import HOSTS, Cache, host_error, remove_tree
from .holdings import (OF_BUILD, Entry, Inode, References, Survey, children,
                       hashes_of, total)
from .registry import Registry
from .report import Report

# In seconds: who was given something a shorter while ago may be about to
# open it
GRACE = 900
# The lock that only who removes something holds
PRUNE = 'prune'
# Where a builder's processes may be about to open what no lock protects
UNLOCKED = ('store', 'tools', 'sources')
# What can be had again: prunable for want of space, though referred to
AGAIN = ('store', 'tools', 'newer', 'sources', 'declared', 'verify', HOSTS)


# -- What is in use ---------------------------------------------------------

def open_files() -> Set[Inode]:
    '''What the processes run or have open, as far as we may look.'''
    found = set()
    for process in Path('/proc').glob('[0-9]*'):
        for path in (process / 'exe', process / 'cwd',
                     *_readable(process / 'fd')):
            try:
                status = path.stat()
                found.add((status.st_dev, status.st_ino))
            except OSError:
                # Ended, or another user's
                pass
    return found


def _readable(folder: Path) -> List[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []


@contextmanager
def try_lock(cache: Cache, name: str) -> Iterator[bool]:
    '''Hold the cache's lock @name, unless somebody does: then False.'''
    path = cache.root / 'locks' / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, 'ab') as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def held_locks(cache: Cache) -> List[str]:
    '''The locks of @cache that somebody holds, but for our own.'''
    held = []
    for path in children(cache.root / 'locks'):
        if path.name != PRUNE:
            with try_lock(cache, path.name) as free:
                if not free:
                    held.append(path.name)
    return held


# -- Removing ---------------------------------------------------------------

class Pruner:
    '''
    Removes entries of @survey, whole or not at all. Its user holds the
    lock PRUNE; @work is an empty folder.
    '''
    def __init__(self, survey: Survey, work: Path, report: Report) -> None:
        self.cache = survey.cache
        self.left = list(survey.entries)
        self.work = work
        self.report = report
        self.opened = open_files()
        self.looked = time.monotonic()
        self.holders: 'Counter[Inode]' = Counter(
            inode for entry in self.left for inode in entry.inodes)
        self.total = total(self.left)
        self.started = self.total
        self.removed: 'Counter[str]' = Counter()
        self.kept = 0

    def remove(self, entry: Entry, why: str) -> None:
        '''
        Remove @entry, if nobody uses it, and then the assets that were of
        this build alone, while no other build of it can begin. Tells
        either.
        '''
        hashes = (hashes_of(entry.paths[0]) if entry.area == 'images'
                  else set())
        with try_lock(self.cache, entry.lock or PRUNE + '-other') as free:
            used = entry.used()
            kept = (self._in_use(entry, free, used)
                    or self._take_away(entry, used))
            what = {'area': entry.area, 'name': entry.name,
                    'why': kept or why, 'bytes': entry.size}
            if kept:
                self.report.event('kept', '', **what)
                self.kept += 1
                return
            self.report.event('pruned', '', **what)
            self._forget(entry)
            self.removed[why] += 1
            self._remove_assets(hashes)

    def _remove_assets(self, hashes: Set[str]) -> None:
        for entry in self.left:
            if entry.area == 'images':
                hashes = hashes - hashes_of(entry.paths[0])
        for entry in list(self.left):
            if (entry.why == OF_BUILD
                    and entry.paths[0].name[:64] in hashes):
                self.remove(entry, entry.why)

    def _forget(self, entry: Entry) -> None:
        self.left.remove(entry)
        for inode, size in entry.inodes.items():
            self.holders[inode] -= 1
            if not self.holders[inode]:
                self.total -= size

    def _in_use(self, entry: Entry, free: bool, used: float) -> str:
        '''Why @entry has to stay.'''
        if not free:
            return f'somebody holds the lock {entry.lock}'
        if entry.area == 'work':
            # Its lock is all that counts
            return ''
        if time.monotonic() - self.looked > 1:
            self.opened = open_files()
            self.looked = time.monotonic()
        if self.opened & set(entry.inodes):
            return 'a process has it open'
        if entry.area in UNLOCKED:
            held = [name for name in held_locks(self.cache)
                    if name != entry.lock]
            if held:
                return f'somebody holds the lock {held[0]}'
        ago = time.time() - used
        return (f'used {max(0, ago) / 60:.0f} minutes ago' if ago < GRACE
                else '')

    def _take_away(self, entry: Entry, used: float) -> str:
        '''Remove it. Returns why not, if somebody came to use it.'''
        for number, path in enumerate(entry.paths):
            if not path.is_dir() or path.is_symlink():
                path.unlink(missing_ok=True)
                continue
            gone = self.work / f'{number}-{path.name}'
            try:
                os.rename(path, gone)
            except FileNotFoundError:
                continue
            moved = Entry('', '', [gone], stamps=[
                gone / stamp.relative_to(path)
                if path in stamp.parents or stamp == path else stamp
                for stamp in entry.stamps])
            if entry.area != 'work' and moved.used() > used:
                os.rename(gone, path)
                return 'used at this very moment'
            remove_tree(gone)
        return ''


def prune(registry: Registry, cache: Cache, report: Report,
          limit: Optional[int] = None) -> None:
    '''
    Remove what nobody refers to; then, where all together is larger than
    @limit bytes, what was used longest ago among packages, their sources
    and tools trees, which can be had again. Builds and assets that somebody
    refers to stay in any case.

    Raises InputError for a registry, lock or override that can't be read.
    '''
    def waiting() -> None:
        report.event('waiting', '         waiting for another --prune')

    try:
        with cache.lock(PRUNE, waiting), cache.scratch(PRUNE) as work:
            survey = Survey(cache, References(registry, cache))
            survey.entries = [entry for entry in survey.entries
                              if entry.paths != [work]]
            _prune(survey, Pruner(survey, work, report), limit)
    except OSError as e:
        raise host_error(e, 'Pruning the cache') from e


def _prune(survey: Survey, pruner: Pruner, limit: Optional[int]) -> None:
    for entry in survey.entries:
        # Assets go with their builds
        if entry.why and entry.why != OF_BUILD:
            pruner.remove(entry, entry.why)
    if limit is not None:
        again = [entry for entry in pruner.left
                 if entry.area in AGAIN and entry.users]
        for entry in sorted(again, key=Entry.used):
            if pruner.total <= limit:
                break
            pruner.remove(entry, 'for want of space')
    _tell_pruned(pruner, limit)


def _tell_pruned(pruner: Pruner, limit: Optional[int]) -> None:
    freed = pruner.started - pruner.total
    lines = [f'{count:6} removed: {why}'
             for why, count in pruner.removed.items()]
    if pruner.kept:
        lines.append(f'{pruner.kept:6} left: somebody uses them, or did '
                     'lately')
    lines.append(f'freed {_megabytes(freed)}, '
                 f'{_megabytes(pruner.total)} are left')
    pruner.report.event('cache', '\n'.join(lines), freed=freed,
                        removed=dict(pruner.removed), kept=pruner.kept,
                        total=pruner.total)
    if limit is not None and pruner.total > limit:
        pruner.report.event(
            'warning', f'{_megabytes(pruner.total)} are more than the limit '
            f'of {_megabytes(limit)}: what is left is in use, of a current '
            'image, or not the builder\'s')


# -- Telling ----------------------------------------------------------------

def _megabytes(size: int) -> str:
    return f'{size / 1e6:.1f} MB'


def parse_size(text: str) -> int:
    '''Bytes of "2G", "500M", "1.5T". Raises ValueError.'''
    match = re.fullmatch(r'([0-9]{1,9}(?:\.[0-9]{1,3})?)([KMGT]?)', text)
    if not match:
        raise ValueError(text)
    return int(float(match.group(1))
               * 1024 ** ' KMGT'.index(match.group(2) or ' '))


def show(registry: Registry, cache: Cache, report: Report) -> None:
    '''
    Tell what the caches hold, who refers to it, and what prune() removes,
    without doing so. Raises what prune() does.
    '''
    try:
        entries = Survey(cache, References(registry, cache)).entries
    except OSError as e:
        raise host_error(e, 'Looking through the cache') from e
    rows = []
    areas = {}
    for area in dict.fromkeys(entry.area for entry in entries):
        here = [entry for entry in entries if entry.area == area]
        goes = [entry for entry in here if entry.why]
        areas[area] = {'entries': len(here), 'bytes': total(here),
                       'prunable': total(goes)}
        rows.append((area, str(len(here)), _megabytes(total(here)),
                     _megabytes(total(goes))))
    users: Dict[str, List[Entry]] = {}
    for entry in entries:
        for user in entry.users or [f'nobody: {entry.why or "not ours"}']:
            users.setdefault(user, []).append(entry)
        report.event('held', '', area=entry.area, name=entry.name,
                     bytes=entry.size, users=entry.users,
                     prunable=entry.why or None)
    # Names of one file in two areas count once
    goes = [entry for entry in entries if entry.why]
    rows.append(('all together', str(len(entries)),
                 _megabytes(total(entries)), _megabytes(total(goes))))
    referred = [(user, str(len(held)), _megabytes(total(held)), '')
                for user, held in sorted(users.items())]
    if not report.as_json:
        for row in (('AREA', 'ENTRIES', 'SIZE', 'PRUNABLE'), *rows,
                    ('',) * 4, ('REFERRED TO BY', 'ENTRIES', 'SIZE', ''),
                    *referred):
            print(f'{row[0]:42} {row[1]:>8} {row[2]:>12} {row[3]:>12}'
                  .rstrip())
    report.event('cache', '', areas=areas, users={
        user: {'entries': len(held), 'bytes': total(held)}
        for user, held in users.items()}, total=total(entries),
        prunable=total(goes))
