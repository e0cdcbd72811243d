# SPDX-License-Identifier: GPL-2.0-or-later
'''
A local Debian repository of exactly the locked packages. Its metadata are
functions of the lock alone, so that apt takes the same decisions for
everybody. It needs no signature: each package was verified by hash.
'''

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from . import command
from .cache import link_or_copy, sha256_file
from .error import InputError
from .lock import Lock, Package
from .store import Store

# QEMU's name of an architecture to Debian's
DEBIAN_ARCHITECTURES = {'x86_64': 'amd64', 'aarch64': 'arm64'}


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


def make(lock: Lock, store: Store, folder: Path) -> None:
    '''
    Make a repository of the packages of @lock, which are in @store, in
    the empty @folder. Raises InputError for what is no package.
    '''
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
