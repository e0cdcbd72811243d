# SPDX-License-Identifier: GPL-2.0-or-later
'''
From the distribution's key to each package of a lock: a Debian of our own
with a key of our own, locked by the real apt, and each link of the chain
broken once. Fedora's chain is in test_fedora.py, what a mirror may do to
packages that are locked in test_store.py; the manual has the table.
'''

from dataclasses import dataclass, replace
from email.utils import formatdate
import hashlib
from pathlib import Path
import re
import shutil
import subprocess
from typing import Callable, Dict, Iterator

import pytest

from fixtures_builder import EPOCH, Debian, FaultServer, Project
from mkosi_build import lock as locks, resolve, sandbox
from mkosi_build.error import FetchError
from mkosi_build.lock import Lock

pytest_plugins = ['fixtures_builder']

SLOW = pytest.mark.slow
KEYRING = Path('usr/share/keyrings/debian-archive-keyring.gpg')
INDEX = 'main/binary-amd64/Packages'

# $1 signs Release as InRelease
SIGN = '''\
set -e
export GNUPGHOME=/work/keys/$1
[ -e "$GNUPGHOME" ] || {
    mkdir -p -m 700 "$GNUPGHOME"
    gpg --batch --quiet --passphrase "" \\
        --quick-gen-key "Mini Debian ($1)" rsa3072 sign never
    gpg --batch --export >"$GNUPGHOME.gpg"
}
rm -f InRelease
gpg --batch --quiet --clearsign --output InRelease Release
gpgconf --kill all
'''


# A signed Debian in miniature

@dataclass(frozen=True)
class Repository:
    '''
    A mirror in @folder that the tools tree @tree signs; @keys is where it
    does that.
    '''
    folder: Path
    keys: Path
    tree: Path

    @property
    def suite(self) -> Path:
        '''The folder of the only suite.'''
        return self.folder / 'dists/trixie'

    def fields(self) -> Dict[str, str]:
        '''What its Release says.'''
        data = (self.suite / INDEX).read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        return {'Origin': 'Debian', 'Suite': 'stable', 'Codename': 'trixie',
                'Date': formatdate(EPOCH).replace('-0000', 'UTC'),
                'Architectures': 'amd64', 'Components': 'main',
                'SHA256': f'\n {digest} {len(data)} {INDEX}'}

    def release(self, key: str = 'distribution', **fields: str) -> None:
        '''Write Release, with other @fields, and sign it with @key.'''
        text = ''.join(f'{name}: {value}\n' for name, value
                       in {**self.fields(), **fields}.items() if value)
        (self.keys / 'Release').write_text(text)
        log = self.keys / 'log'
        assert not sandbox.run(
            self.tree, ['sh', '-c', SIGN, 'sh', key], self.keys,
            log), log.read_text()
        for name in ('Release', 'InRelease'):
            shutil.copy(self.keys / name, self.suite)


def control(file: Path) -> str:
    '''The control file of the package @file.'''
    return subprocess.run(['dpkg-deb', '--field', file], check=True,
                          stdout=subprocess.PIPE,
                          encoding='utf-8').stdout.rstrip()


@pytest.fixture(name='origin', scope='module')
def fixture_origin(tmp_path_factory: pytest.TempPathFactory, debian: Debian,
                   tools_tree: Path) -> Repository:
    '''What the distribution publishes; only to be copied.'''
    root = tmp_path_factory.mktemp('signed')
    made = Repository(root / 'mirror', root / 'keys', tools_tree)
    (made.suite / INDEX).parent.mkdir(parents=True)
    made.keys.mkdir()
    shutil.copytree(debian.mirror / 'pool', made.folder / 'pool')
    (made.suite / INDEX).write_text('\n'.join(
        f'{control(made.folder / package.location)}\n'
        f'Filename: {package.location}\nSize: {package.size}\n'
        f'SHA256: {package.sha256}\n'
        for _, package in sorted(debian.packages.items())),
        encoding='utf-8')
    made.release()
    return made


@pytest.fixture(name='signed')
def fixture_signed(tmp_path: Path, origin: Repository,
                   faults: FaultServer) -> Repository:
    '''A mirror of it, which may do what it likes.'''
    shutil.copytree(origin.folder, tmp_path / 'mirror')
    shutil.copytree(origin.keys, tmp_path / 'keys')
    faults.root = tmp_path / 'mirror'
    return replace(origin, folder=tmp_path / 'mirror',
                   keys=tmp_path / 'keys')


@pytest.fixture(name='trusting')
def fixture_trusting(tmp_path: Path, template: Project, tools_tree: Path,
                     signed: Repository,
                     faults: FaultServer) -> Iterator[Project]:
    '''
    A project for which our key is the distribution's: that of this host,
    which resolves the tools, and that of the tools, which resolve images.
    '''
    tree = tmp_path / 'tools' / tools_tree.name
    tree.parent.mkdir()
    subprocess.run(['cp', '-a', '--link', tools_tree, tree], check=True)
    key = signed.keys / 'keys/distribution.gpg'
    real = (tree / KEYRING).resolve()
    real.unlink()
    shutil.copy(key, real)
    root = tmp_path / 'p'
    shutil.copytree(template.tree, root / 'tree', symlinks=True)
    project = Project(root, faults.url, tree)
    (project.mkosi / 'tools/mkosi.conf').write_text(
        '[Distribution]\nDistribution=debian\nRelease=trixie\n'
        '[Content]\nPackages=mini-hello\n')
    yield project
    shutil.rmtree(tree.parent)


def use(project: Project, name: str, signed: Repository) -> Path:
    '''The lock of @name, whose resolver shall know our key.'''
    if name == 'mini':
        return project.lock_path
    project.edit(project.tree / 'scripts/mkosi_build/resolve.py',
                 f"Path('/{KEYRING}')",
                 f"Path('{signed.keys}/keys/distribution.gpg')")
    return project.mkosi / 'tools/x86_64.lock'


# The chain holds

@SLOW
@pytest.mark.parametrize('name', ['mini', 'tools'])
def test_whole(name: str, trusting: Project, signed: Repository,
               debian: Debian) -> None:
    '''What the distribution signed is locked, as it signed it.'''
    path = use(trusting, name, signed)
    path.write_text('')
    trusting.good(name, '--update-lock')
    lock = locks.load(path)
    expected = Lock(lock.definition, 'debian', 'trixie', 'x86_64', EPOCH,
                    tuple(sorted(debian.packages[package]
                                 for package in Debian.MINIMAL)))
    assert locks.render(lock) == locks.render(expected)


# Each link broken

def no_signature(signed: Repository) -> None:
    '''A Release that nobody signed.'''
    (signed.suite / 'InRelease').unlink()


def stranger(signed: Repository) -> None:
    '''Signed, by somebody else.'''
    signed.release('stranger')


def edit(path: Path, old: str, new: str) -> None:
    '''Replace the first @old in the file @path by @new.'''
    text = path.read_text(encoding='utf-8')
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding='utf-8')


def release_edited(signed: Repository) -> None:
    '''What was signed says something else.'''
    edit(signed.suite / 'InRelease', 'Components: main',
         'Components: main evil')


def release_expired(signed: Repository) -> None:
    '''A state of the distribution that it does not stand for any longer.'''
    signed.release(**{'Valid-Until': formatdate(
        EPOCH + 86400).replace('-0000', 'UTC')})


def weak_hash(signed: Repository) -> None:
    '''The index has a hash, one that can be forged.'''
    data = (signed.suite / INDEX).read_bytes()
    signed.release(SHA256='', MD5Sum=f'\n {hashlib.md5(data).hexdigest()} '
                   f'{len(data)} {INDEX}')


def other_suite(signed: Repository) -> None:
    '''Another release of the distribution, signed as it should be.'''
    signed.release(Suite='unstable', Codename='sid')


def index_edited(signed: Repository) -> None:
    '''Another version, of the same length.'''
    edit(signed.suite / INDEX, 'Version: 1', 'Version: 9')


def index_of_another_day(signed: Repository) -> None:
    '''A package less, as it may have been once.'''
    path = signed.suite / INDEX
    text = path.read_text(encoding='utf-8')
    path.write_text(text[:text.rindex('\n\n') + 1], encoding='utf-8')


Break = Callable[[Repository], None]

METADATA: Dict[str, Break] = {
    function.__name__: function for function in (
        no_signature, stranger, release_edited, release_expired, weak_hash,
        other_suite, index_edited, index_of_another_day)}


# What is said of it, by apt with gpgv or with sqv, and by us
INVALID = ('NO_PUBKEY|not signed|BADSIG|Missing key|invalid|'
           'could not be verified')
CHANGED = '[Hh]ash|unexpected size'
EXPECTED = {'release_expired': 'has expired: it is valid until Wed, 15 Nov',
            'weak_hash': 'weak security|not signed|[Hh]ash',
            'other_suite': 'expected trixie, found unstable sid',
            'index_edited': CHANGED, 'index_of_another_day': CHANGED}


@SLOW
@pytest.mark.parametrize('name', ['mini', 'tools'])
@pytest.mark.parametrize('link', METADATA)
def test_broken(link: str, name: str, trusting: Project,
                signed: Repository) -> None:
    '''Whoever resolves refuses; the lock stays as it is.'''
    METADATA[link](signed)
    path = use(trusting, name, signed)
    before = path.read_text()
    result = trusting.run(name, '--update-lock')
    assert result.returncode in (5, 6), result.stderr
    assert re.search(EXPECTED.get(link, INVALID), result.stderr), result.stderr
    assert path.read_text() == before


def swap(signed: Repository, debian: Debian) -> None:
    '''A package of the distribution in the place of another.'''
    one, other = (signed.folder / debian.packages[name].location
                  for name in ('mini-lib', 'mini-broken'))
    one.write_bytes(other.read_bytes())


def flip(signed: Repository, debian: Debian) -> None:
    '''A bit of a package.'''
    path = signed.folder / debian.packages['mini-lib'].location
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


@SLOW
@pytest.mark.parametrize('change', [swap, flip])
def test_package(change: Callable[[Repository, Debian], None],
                 trusting: Project, signed: Repository,
                 debian: Debian) -> None:
    '''A package that is not what the signed index says.'''
    change(signed, debian)
    before = trusting.lock_path.read_text()
    said = trusting.bad(6, 'mini', '--update-lock')
    assert re.search('[Hh]ash|unexpected size', said), said
    assert trusting.lock_path.read_text() == before


@SLOW
def test_mirror_in_the_lock(trusting: Project, signed: Repository) -> None:
    '''
    A lock has no more to say than bytes: that a mirror replaces a package,
    its index and its signature is noticed by the hash.
    '''
    path, = signed.folder.glob('pool/**/mini-lib_*.deb')
    size = path.stat().st_size
    path.write_bytes(b'x' * size)
    said = trusting.bad(5, 'mini')
    assert 'mini-lib' in said and 'expected SHA-256' in said
    assert not trusting.artefacts()


def test_not_in_the_index(debian: Debian) -> None:
    '''A file that was fetched, and that no signed index vouches for.'''
    known = {p.sha256: p for p in debian.packages.values()}
    # pylint: disable=protected-access
    with pytest.raises(FetchError, match='signed package lists do not have'):
        resolve._pick(known, [*known, '1' * 64], 'test')
