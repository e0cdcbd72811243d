# SPDX-License-Identifier: GPL-2.0-or-later
'''
The tools tree: the programs that a build runs (mkosi itself, apt, dpkg,
systemd-repart, mkfs, qemu-img, ...) at the versions that the tools lock
names, so that the host's own do not decide bytes. It is an unpacking of
packages, with no maintainer script run: the same on every host, as any
user.
'''

import errno
import os
import stat
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Dict, List, Optional, Sequence

from . import command, emulate
from .cache import Cache, host_error, mark_used
from .error import HostError, MkosiError
from .lock import Lock, Package
from .report import Report
from .store import Store

# Below the tools tree, the folder that holds the package "mkosi"
PYTHON_PATH = 'usr/lib/python3/dist-packages'

# QEMU's name of an architecture to mkosi's
MKOSI_ARCHITECTURES = {'x86_64': 'x86-64', 'aarch64': 'arm64'}


def packages(lock: Lock, arch: str) -> List[Package]:
    '''What a build for @arch needs of the tools @lock.'''
    return [p for p in lock.packages
            if p.name != emulate.PACKAGE or emulate.is_foreign(arch)]


def _unpacked(lock: Lock) -> List[Package]:
    return packages(lock, os.uname().machine)


def _unpack(lock: Lock, store: Store, tree: Path) -> None:
    def extract(file: Path) -> None:
        result = command.run(['dpkg-deb', '--extract', str(file),
                              str(tree)])
        if 'No space left on device' in result.stderr:
            raise OSError(errno.ENOSPC, 'No space left', str(tree))
        if result.returncode:
            raise HostError(f'unpacking {file}: {result.stderr.strip()}',
                            next_step='look whether this host\'s dpkg-deb '
                            'is older than the packages')

    # base-files comes first: it makes /bin, /lib and so on links into /usr
    first = [p for p in lock.packages if p.name == 'base-files']
    for package in first:
        extract(store.path(package))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(extract, [store.path(p) for p in _unpacked(lock)
                                if p not in first]))
    # mkosi binds a file over this one
    (tree / 'etc/resolv.conf').touch()
    for folder, _, names in os.walk(tree):
        for path in (Path(folder, name) for name in names):
            mode = path.lstat().st_mode
            # No program in a cache folder keeps another user's rights
            if stat.S_ISREG(mode) and mode & (stat.S_ISUID | stat.S_ISGID):
                path.chmod(stat.S_IMODE(mode) & 0o777)


def ensure(lock: Lock, cache: Cache, store: Store, report: Report,
           arch: str = os.uname().machine) -> Path:
    '''
    The tools tree of @lock, fetched and unpacked if it is not there yet,
    with what it takes to run programs for @arch.

    Raises what Store.fetch() does, and HostError.
    '''
    tree = cache.tools / lock.digest
    # Before the look, so that what is seen there stays
    mark_used(tree)
    if not tree.is_dir():
        _make(tree, lock, cache, store, report)
    emulate.prepare(tree, arch, lock, cache, store, report)
    return tree


def _make(tree: Path, lock: Lock, cache: Cache, store: Store,
          report: Report) -> None:
    name = f'tools-{lock.digest[:16]}'

    def waiting() -> None:
        report.event('waiting', '         waiting for another builder to '
                     'unpack the tools')

    with cache.lock(name, waiting):
        if tree.is_dir():
            return
        unpacked = _unpacked(lock)
        store.fetch(unpacked, lock.distribution, 'tools')
        try:
            with report.stage(f'unpacking {len(unpacked)} tools '
                              'packages'), cache.scratch(name) as work:
                _unpack(lock, store, work / 'tree')
                cache.tools.mkdir(parents=True, exist_ok=True)
                os.replace(work / 'tree', tree)
        except OSError as e:
            raise host_error(e, 'Unpacking the tools') from e


def mkosi_command(python: str, tree: Path,
                  arguments: Sequence[str]) -> List[str]:
    '''The command line that runs mkosi from the tools @tree.'''
    return [python, '-m', 'mkosi', f'--tools-tree={tree}', *arguments]


def mkosi_environment(tree: Path) -> Dict[str, str]:
    '''What mkosi's environment has beside command.ENVIRONMENT.'''
    return {'PYTHONPATH': str(tree / PYTHON_PATH)}


def mkosi(tree: Path, arguments: List[str], log: Path,
          network: bool = False, interpreter: Optional[str] = None) -> None:
    '''
    Run mkosi from the tools @tree with @arguments, its output in the file
    @log, with the @interpreter of emulate.registration(). Raises MkosiError
    with the telling lines of the log, or HostError where they say that the
    disk is full.
    '''
    # By the interpreter's own path: the environment has no host's PATH
    status = command.run_isolated(
        mkosi_command(sys.executable, tree, arguments), log, network,
        mkosi_environment(tree), interpreter)
    if status == 0:
        return
    why = command.why_failed(log)
    if 'No space left on device' in why:
        raise HostError(f'mkosi found no space left on the disk:\n{why}',
                        next_step='free some space, or point '
                        'QEMU_MKOSI_DIR at a larger file system')
    raise MkosiError(f'mkosi failed (exit code {status}):\n{why}',
                     next_step=f'read the whole log: {log}')
