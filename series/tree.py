# SPDX-License-Identifier: GPL-2.0-or-later
'''
Obtains a QEMU source tree: the one named by QEMU_SRC, or a locked tarball.

A tarball is used only if its size and SHA-256 are those of trees.yaml (or,
for the distribution's own QEMU, if apt verified it against the signed
source index), and nothing half-made ever has a final name.
'''

from dataclasses import dataclass
import hashlib
from http.client import HTTPException
import os
from pathlib import Path
import re
import shutil
import subprocess
import tempfile
from typing import Callable, List, Optional, Tuple
from urllib.request import urlopen

import yaml

from .error import SeriesError


TREES = Path(__file__).with_name('trees.yaml')
SUITE = 'trixie'
OLDEST = (10, 0)
KEYRINGS = ('/usr/share/keyrings/debian-archive-keyring.gpg',
            '/usr/share/keyrings/debian-archive-keyring.pgp')
# What QEMU's functional tests, and we, use of QEMU's tree
PARTS = ('VERSION', 'MAINTAINERS', 'pythondeps.toml', 'python', 'scripts',
         'tests/functional', 'tests/data', 'tests/Makefile.include',
         'docs/devel/testing', '.gitlab-ci.d')
TIMEOUT = 30    # seconds without a byte from a mirror

Say = Callable[[str], None]


@dataclass(frozen=True)
class Tarball:
    '''A locked source tarball; @location is relative to a mirror.'''
    version: str
    location: str
    size: int
    sha256: str


def locked(path: Path = TREES) -> List[Tarball]:
    '''The locked tarballs, newest first.'''
    raw = yaml.safe_load(path.read_text(encoding='utf-8'))
    return [Tarball(str(tree['version']), tree['location'], tree['size'],
                    tree['sha256']) for tree in raw['trees']]


def layout(tree: Path) -> str:
    '''
    How @tree keeps its functional tests: 'folders', one an architecture, or
    'flat' (QEMU 10.0).  Raises SeriesError if it has none.
    '''
    if not (tree / 'tests/functional/meson.build').is_file():
        raise SeriesError(
            f'{tree} is not a QEMU source tree: expected '
            'tests/functional/meson.build in it, found none',
            next_step='point QEMU_SRC at a QEMU tree, 10.0 or newer')
    if (tree / 'tests/functional/x86_64/meson.build').is_file():
        return 'folders'
    return 'flat'


def version_of(tree: Path) -> str:
    '''The version that the QEMU tree @tree says it is, as '11.1.1'.'''
    return (tree / 'VERSION').read_text(encoding='utf-8').strip()


def mirrors() -> List[str]:
    '''
    Mirrors of the Debian archive, best first: QEMU_MKOSI_MIRROR (separated
    by spaces), then those that the host's apt is configured with.
    '''
    found = os.environ.get('QEMU_MKOSI_MIRROR', '').split()
    if shutil.which('apt-get'):
        targets = subprocess.run(
            ['apt-get', 'indextargets', '--format',
             '$(LABEL)|$(REPO_URI)', 'Identifier: Packages'],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            encoding='utf-8', check=False).stdout
        for line in targets.splitlines():
            label, _, uri = line.partition('|')
            # Without an index, apt does not know the label
            if label in ('', 'Debian') and uri.startswith(('http', 'file')):
                found.append(uri)
    return list(dict.fromkeys(uri.rstrip('/') for uri in found))


def _fetch_from(url: str, tarball: Tarball, part: Path) -> None:
    '''Raises OSError (as urlopen does) or ValueError on other bytes.'''
    digest = hashlib.sha256()
    size = 0
    with urlopen(url, timeout=TIMEOUT) as source, part.open('wb') as dest:
        while size <= tarball.size:
            chunk = source.read(1 << 20)
            if not chunk:
                break
            dest.write(chunk)
            digest.update(chunk)
            size += len(chunk)
    if size != tarball.size:
        raise ValueError(f'expected {tarball.size} bytes, found '
                         f'{"more" if size > tarball.size else size}')
    if digest.hexdigest() != tarball.sha256:
        raise ValueError(f'expected sha256 {tarball.sha256}, '
                         f'found {digest.hexdigest()}')


def fetch(tarball: Tarball, bases: List[str], dest: Path) -> List[str]:
    '''
    Fetch @tarball from the first of the mirrors @bases that has it.

    Returns what went wrong, a line a mirror; @dest exists only if one of
    them gave exactly the locked bytes.
    '''
    problems: List[str] = []
    for base in bases:
        url = f'{base}/{tarball.location}'
        descriptor, name = tempfile.mkstemp(dir=dest.parent,
                                            prefix=f'.{dest.name}.')
        os.close(descriptor)
        part = Path(name)
        try:
            _fetch_from(url, tarball, part)
            part.replace(dest)
            return problems
        except (OSError, HTTPException, ValueError) as problem:
            problems.append(f'{url}: {problem}')
        finally:
            part.unlink(missing_ok=True)
    return problems


def unpack(tarball: Path, dest: Path) -> None:
    '''Unpack the parts of @tarball that we use; @dest appears complete.'''
    part = Path(tempfile.mkdtemp(dir=dest.parent, prefix=f'.{dest.name}.'))
    try:
        subprocess.run(
            ['tar', '--extract', f'--file={tarball}', f'--directory={part}',
             '--strip-components=1',    # the folder named after the version
             '--no-same-owner',
             '--wildcards', '--no-wildcards-match-slash',
             *(f'*/{name}' for name in PARTS)],
            check=True)
        part.chmod(0o755)
        part.rename(dest)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _apt(state: Path, mirror: str, *args: str) -> None:
    '''Run apt-get with sources and state of its own, in the folder @state.'''
    keyring = next((name for name in KEYRINGS if Path(name).exists()), None)
    if keyring is None:
        raise SeriesError(
            f'no Debian archive keyring: expected one of {KEYRINGS}',
            next_step='apt-get install debian-archive-keyring')
    for folder in ('lists/partial', 'cache/archives/partial'):
        (state / folder).mkdir(parents=True, exist_ok=True)
    sources = state / 'sources.list'
    sources.write_text(f'deb-src [signed-by={keyring}] {mirror} {SUITE} main'
                       '\n', encoding='utf-8')
    options = {
        'Dir::State': state,
        'Dir::State::lists': state / 'lists',
        'Dir::State::status': '/dev/null',
        'Dir::Cache': state / 'cache',
        'Dir::Etc::sourcelist': sources,
        'Dir::Etc::sourceparts': '/dev/null',
        'Acquire::Languages': 'none',
        # apt as root would run as a user that may not write here
        'APT::Sandbox::User': 'root',
        'APT::Update::Error-Mode': 'any',
    }
    subprocess.run(
        ['apt-get', '--quiet',
         *(f'--option={name}={value}' for name, value in options.items()),
         *args],
        cwd=state, check=True, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, encoding='utf-8')


def version_in(name: str) -> Tuple[int, ...]:
    '''The version in a source tarball's file name, empty if it has none.'''
    match = re.match(r'qemu_(\d+(?:\.\d+)+)', name)
    return tuple(map(int, match.group(1).split('.'))) if match else ()


def fetch_signed(mirror: str, folder: Path) -> Path:
    '''
    Fetch the tarball of the QEMU that the distribution's signed source
    index on @mirror offers into @folder, and return its path.

    Raises SeriesError if apt can't get or verify it, or if it is too old.
    '''
    with tempfile.TemporaryDirectory(dir=folder, prefix='.apt.') as name:
        state = Path(name)
        try:
            _apt(state, mirror, 'update')
            _apt(state, mirror, 'source', '--download-only', '--tar-only',
                 'qemu')
        except (OSError, subprocess.CalledProcessError) as error:
            raise SeriesError(
                f'{mirror} ({SUITE}, signed source index): '
                f'{getattr(error, "stderr", error)}') from error
        found = sorted(state.glob('qemu_*.orig.tar.*'))
        if not found or version_in(found[0].name) < OLDEST:
            raise SeriesError(
                f'{mirror} ({SUITE}, signed source index): expected QEMU '
                f'10.0 or newer, found {[path.name for path in found]}')
        return found[0].replace(folder / found[0].name)


def _ready(folder: Path) -> Optional[Path]:
    '''The newest tree that an earlier run has unpacked in @folder.'''
    trees = [path for path in folder.glob('qemu_*')
             if path.is_dir() and version_in(path.name)]
    return max(trees, key=lambda path: version_in(path.name), default=None)


def _fetch_any(bases: List[str], folder: Path, say: Say,
               tarballs: List[Tarball]) -> Path:
    problems: List[str] = []
    for tarball in tarballs:
        dest = folder / f'qemu_{tarball.version}.tar.xz'
        failed = fetch(tarball, bases, dest)
        for problem in failed:
            say(f'QEMU {tarball.version}: {problem}')
        problems += failed
        if dest.exists():
            return dest
    for base in bases:
        try:
            return fetch_signed(base, folder)
        except SeriesError as error:
            say(str(error))
            problems.append(str(error))
    raise SeriesError(
        'no QEMU source tree: expected one of '
        f'{", ".join(tarball.version for tarball in tarballs)} or the '
        'distribution\'s own on a Debian mirror, found:\n    '
        + ('\n    '.join(problems) or 'no mirror configured'),
        next_step='name a tree with QEMU_SRC=<path> or a mirror of the '
                  'Debian archive with QEMU_MKOSI_MIRROR=<url>')


def obtain(folder: Path, say: Say,
           tarballs: Optional[List[Tarball]] = None) -> Path:
    '''
    Return a QEMU source tree, which the caller must not change.

    That is QEMU_SRC if set; else the newest that is in @folder from an
    earlier run; else the first of @tarballs (locked() if not given) that a
    mirror still has; else the distribution's own.  @say is told of each
    source that failed.  Raises SeriesError if there is none at all.
    '''
    named = os.environ.get('QEMU_SRC')
    if named:
        tree = Path(named).resolve()
        layout(tree)
        return tree
    folder.mkdir(parents=True, exist_ok=True)
    ready = _ready(folder)
    if ready is not None:
        return ready
    tarball = _fetch_any(mirrors(), folder, say,
                         locked() if tarballs is None else tarballs)
    version = '.'.join(map(str, version_in(tarball.name)))
    tree = folder / f'qemu_{version}'
    unpack(tarball, tree)
    tarball.unlink()
    layout(tree)
    return tree
