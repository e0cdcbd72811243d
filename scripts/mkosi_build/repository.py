# SPDX-License-Identifier: GPL-2.0-or-later
'''
A local repository of exactly the locked packages. Its metadata are
functions of the lock alone, so that apt or dnf takes the same decisions
for everybody. They need no signature: each package was verified by hash.
'''

import os
import re
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from . import command, sandbox
from .cache import link_or_copy, sha256_file
from .error import InputError
from .lock import Lock, Package
from .store import DEBIAN_ARCHITECTURES, Store


def _stanza(package: Package, file: Path) -> str:
    '''What a Packages file says of @package: its control file, and ours.'''
    result = command.run(['dpkg-deb', '--field', str(file)])
    if result.returncode:
        raise InputError(f'{package.file_name}: not a Debian package: '
                         f'{result.stderr.strip()}',
                         next_step='make the lock anew with --update-lock')
    return (f'{result.stdout.rstrip()}\n'
            f'Filename: pool/{package.file_name}\n'
            f'Size: {package.size}\n'
            f'SHA256: {package.sha256}\n')


def make(lock: Lock, store: Store, folder: Path, tree: Path) -> None:
    '''
    Make a repository of the packages of @lock, which are in @store, in
    the empty @folder, with the tools @tree. Raises InputError for what is
    no package.
    '''
    if lock.distribution == 'fedora':
        _make_rpm(lock, store, folder, tree)
    else:
        _make_deb(lock, store, folder)


def _make_rpm(lock: Lock, store: Store, folder: Path, tree: Path) -> None:
    pool = folder / 'Packages'
    pool.mkdir()
    for package in lock.packages:
        path = pool / package.file_name
        # Not a link: the metadata have each file's time
        shutil.copyfile(store.path(package), path)
        os.utime(path, (lock.epoch, lock.epoch))
    with tempfile.NamedTemporaryFile() as log:
        status = sandbox.run(tree, [
            'createrepo_c', '--simple-md-filenames',
            '--general-compress-type=gz', '--revision=0',
            '--set-timestamp-to-revision', '.'], folder, Path(log.name))
        said = log.read().decode(errors='replace')
    if status:
        bad = re.findall(r'Cannot read package: \./Packages/(\S+):', said)
        raise InputError(
            f'{", ".join(bad)}: not an RPM package' if bad else
            f'createrepo_c failed (exit code {status}): {said.strip()}',
            next_step='make the lock anew with --update-lock')


def _make_deb(lock: Lock, store: Store, folder: Path) -> None:
    pool = folder / 'pool'
    architecture = DEBIAN_ARCHITECTURES[lock.architecture]
    suite = folder / 'dists' / lock.release
    binary = suite / 'main' / f'binary-{architecture}'
    pool.mkdir()
    binary.mkdir(parents=True)
    packages = sorted(lock.packages)
    for package in packages:
        link_or_copy(store.path(package), pool / package.file_name)
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        stanzas = list(threads.map(
            lambda p: _stanza(p, pool / p.file_name), packages))
    index = binary / 'Packages'
    index.write_text('\n'.join(stanzas), encoding='utf-8')
    name = index.relative_to(suite).as_posix()
    # The least that apt accepts
    (suite / 'Release').write_text(
        f'Suite: {lock.release}\n'
        f'Codename: {lock.release}\n'
        f'Architectures: {architecture}\n'
        'Components: main\n'
        'SHA256:\n'
        f' {sha256_file(index)} {index.stat().st_size} {name}\n',
        encoding='utf-8')
