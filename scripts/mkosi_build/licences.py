# SPDX-License-Identifier: GPL-2.0-or-later
'''
The licences of what is in an image: the copyright file of every package
(Debian Policy 12.5), each different text once. The same for everybody.
'''

import hashlib
import json
import os
import subprocess
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Dict, List, Tuple

from .error import HostError, InputError
from .lock import Lock
from .store import Store

FOLDER = 'usr/share/doc'
FORMAT = 'mkosi-build licences 1'

# A text, or in whose place there is another one
_Found = Tuple[List[str], List[str]]


def gather(lock: Lock, store: Store) -> str:
    '''
    The copyright files of the packages of @lock, which are in @store, as
    JSON: by package, the hashes of "texts", and in "see" where a package
    says that another one has them. Raises InputError for what is no
    package, HostError.
    '''
    packages: List[Dict[str, Any]] = []
    texts = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(_read, (store.path(p) for p in lock.packages))
        for package, (said, see) in zip(lock.packages, found):
            hashes = []
            for text in said:
                hashes.append(hashlib.sha256(text.encode()).hexdigest())
                texts[hashes[-1]] = text
            packages.append({'name': package.name,
                             'version': package.version,
                             'source': package.source,
                             'texts': sorted(hashes), 'see': sorted(see)})
    return json.dumps({'format': FORMAT, 'packages': packages,
                       'texts': texts}, indent=1, sort_keys=True) + '\n'


def _read(deb: Path) -> _Found:
    '''What the package @deb has of texts, and of links to others'.'''
    texts, see = [], []
    try:
        with subprocess.Popen(['dpkg-deb', '--fsys-tarfile', str(deb)],
                              stdin=subprocess.DEVNULL,
                              stdout=subprocess.PIPE,
                              stderr=subprocess.DEVNULL) as program, \
                tarfile.open(fileobj=program.stdout, mode='r|') as tar:
            for member in tar:
                parts = member.name.lstrip('./').split('/')
                if '/'.join(parts[:3]) != FOLDER or not (
                        len(parts) == 4 or len(parts) == 5
                        and parts[4] == 'copyright'):
                    continue
                if member.issym():
                    see.append(f'{"/".join(parts)} -> {member.linkname}')
                elif member.isfile() and len(parts) == 5:
                    file = tar.extractfile(member)
                    assert file
                    texts.append(file.read().decode(errors='replace'))
    except FileNotFoundError as e:
        raise HostError('program not found: dpkg-deb',
                        next_step='install dpkg') from e
    except tarfile.TarError as e:
        raise InputError(f'{deb}: not a Debian package: {e}',
                         next_step='make the lock anew with '
                         '--update-lock') from e
    return texts, see
