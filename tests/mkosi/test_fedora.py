# SPDX-License-Identifier: GPL-2.0-or-later
'''
fedora-min as it is, on a Fedora of our own: locked, built, booted; and all
that a mirror may do to it refused. What is real: definition, builder,
mkosi, dnf, rpm, QEMU. What is not: the repository and its key.
'''

from dataclasses import replace
import gzip
import hashlib
import io
import os
from pathlib import Path
import re
import shutil
import subprocess
import tempfile
from typing import Callable, Dict, Iterator

import pytest
import yaml

from fixtures_fedora import IMAGE, FedoraProject, Mirror, make
from mkosi_build import lock as locks, registry as registries
from mkosi_build import repository as repositories
from mkosi_build.cache import Cache
from mkosi_build.lock import Lock, Package
from mkosi_build.report import Report
from mkosi_build.store import Store
from synthetic_fedora import EPOCH, Fedora

pytest_plugins = ['fixtures_builder', 'fixtures_fedora']
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which('qemu-system-x86_64') is None,
                       reason='no qemu-system-x86_64')]

ROOT = os.getuid() == 0


# The way it should go

def test_lock(recorded: FedoraProject) -> None:
    '''
    What the packages say of themselves. Nothing that was recommended,
    no locale that nobody asked for.
    '''
    lock = locks.load(recorded.lock_path)
    assert (lock.distribution, lock.release, lock.architecture,
            lock.epoch) == ('fedora', '44', 'x86_64', EPOCH)
    packages = {package.name: package for package in lock.packages}
    assert not {'linux-firmware', 'systemd-networkd',
                'glibc-all-langpacks'} & set(packages)
    for name, version, architecture, source in (
            ('kernel-core', '6.19.6-300.fc44', 'x86_64',
             'kernel-6.19.6-300.fc44.src.rpm'),
            ('tar', '2:1.35-6.fc44', 'x86_64', 'tar-1.35-6.fc44.src.rpm'),
            ('kmod-libs', '34.2^20260101git1-1.fc44', 'x86_64',
             'kmod-34.2^20260101git1-1.fc44.src.rpm'),
            ('setup', '2.15.0-27.fc44', 'noarch',
             'setup-2.15.0-27.fc44.src.rpm')):
        found = packages[name]
        assert (found.version, found.architecture, found.source) == (
            version, architecture, source)
        file = f'{name}-{version.rpartition(":")[2]}.{architecture}.rpm'
        assert found.location == f'Packages/{file}'


def test_recorded(recorded: FedoraProject) -> None:
    '''In one go: what was not locked is locked, built, recorded, booted.'''
    image = registries.load(recorded.registry).image(IMAGE)
    assert image.target('x86_64').built
    assert image.target('aarch64').not_locked
    assert recorded.said is not None
    said = recorded.said.stdout + recorded.said.stderr
    boot = image.target('x86_64').boot
    assert said.index(boot.ready) < said.index(boot.prompt)
    assert 'Power down' in said
    assert recorded.good('--check')


@pytest.mark.skipif(shutil.which('qemu-system-aarch64') is None,
                    reason='no qemu-system-aarch64')
def test_aarch64(fedora: Fedora, fresh: FedoraProject) -> None:
    '''
    The same for aarch64, scripts emulated where that is foreign. Its
    kernel comes in a zboot that QEMU can't unpack.
    '''
    make(fedora, 'aarch64')
    fresh.use('aarch64')
    result = fresh.good('--update-lock', '--update', '--boot')
    lock = locks.load(fresh.lock_path)
    assert {p.architecture for p in lock.packages} == {'aarch64', 'noarch'}
    image = registries.load(fresh.registry).image(IMAGE)
    assert image.target('aarch64').built
    assert image.target('x86_64').not_locked
    said = result.stdout + result.stderr
    assert image.target('aarch64').boot.ready in said
    assert 'Power down' in said


@pytest.fixture(name='open_folder')
def fixture_open_folder() -> Iterator[Path]:
    '''A folder that all users can reach, which pytest's own is not.'''
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o777)
        yield Path(folder)


def test_same_bytes(recorded: FedoraProject, fedora_tools: Path,
                    mirror: Mirror, open_folder: Path) -> None:
    '''
    Built again from the lock alone, by another user at another place with
    other habits: the registry's bytes.
    '''
    tree = open_folder / 'tools' / fedora_tools.name
    tree.parent.mkdir()
    subprocess.run(['cp', '-a', '--link', fedora_tools, tree], check=True)
    project = FedoraProject(open_folder / 'änother', mirror.url + '/{arch}',
                            tree)
    shutil.copytree(recorded.tree, project.tree, symlinks=True)
    python = open_folder / 'python'
    shutil.copytree(os.path.dirname(yaml.__file__), python / 'yaml')
    wrapper = ['sh', '-c', 'umask 077; exec "$@"', 'sh']
    if ROOT:
        subprocess.run(['chown', '-hR', '65534:65534', project.root],
                       check=True)
        wrapper = ['setpriv', '--reuid=65534', '--regid=65534',
                   '--clear-groups', *wrapper]
        project.python = ['/usr/bin/python3']
    result = project.run(wrapper=tuple(wrapper), PYTHONPATH=str(python),
                         TZ='Asia/Tokyo', LC_ALL='tr_TR.ISO-8859-9',
                         SOURCE_DATE_EPOCH='1')
    assert result.returncode == 0, result.stderr
    assert f'{IMAGE} x86_64: built' in result.stderr + result.stdout
    project.assert_clean()


def test_repository(recorded: FedoraProject, fedora_tools: Path,
                    tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    '''
    The metadata of an offline build's repository are functions of the lock:
    not of the order of packages, nor of when and how they were fetched.
    '''
    monkeypatch.setenv('QEMU_MKOSI_DIR', str(recorded.cache))
    store = Store(Cache(), Report(stream=io.StringIO()))
    lock = locks.load(recorded.lock_path)
    small = tuple(p for p in lock.packages if p.size < 100_000)
    assert len(small) > 20
    found = []
    for name, packages in (('1', small), ('2', small[::-1])):
        (tmp_path / name).mkdir()
        repositories.make(replace(lock, packages=packages), store,
                          tmp_path / name, fedora_tools)
        found.append({
            path.name: path.read_bytes()
            for path in (tmp_path / name / 'repodata').iterdir()})
        os.utime(store.path(small[0]))
    assert found[0] == found[1]
    assert {'repomd.xml', 'primary.xml.gz'} <= set(found[0])


# What a mirror may do to a lock

@pytest.fixture(name='variant')
def fixture_variant(fedora: Fedora) -> Iterator[Path]:
    '''A repository to change.'''
    folder = fedora.folder / 'variant'
    shutil.copytree(fedora.folder / 'x86_64', folder / 'x86_64',
                    copy_function=os.link)
    yield folder / 'x86_64'
    shutil.rmtree(folder)


def use_variant(project: FedoraProject, mirror: Mirror) -> None:
    '''Let the project know no other mirror.'''
    project.mirror = f'{mirror.url}/variant/{{arch}}'


def package(repository: Path, name: str) -> Path:
    '''The file of a package.'''
    [path] = (repository / 'Packages').glob(f'{name}-[0-9]*.rpm')
    return path


def write(path: Path, data: bytes) -> None:
    '''Write a file that may be linked from elsewhere.'''
    path.unlink()
    path.write_bytes(data)


def unsigned(fedora: Fedora, repository: Path) -> None:
    '''A package without a signature.'''
    fedora.unsign(package(repository, 'basesystem'))


def stranger(fedora: Fedora, repository: Path) -> None:
    '''A package that somebody else has signed.'''
    fedora.key('stranger')
    fedora.sign('stranger', package(repository, 'basesystem'))


def tampered(_fedora: Fedora, repository: Path) -> None:
    '''A package of which a bit is not what was signed.'''
    path = package(repository, 'setup')
    data = bytearray(path.read_bytes())
    data[-20] ^= 1
    write(path, bytes(data))


def late(fedora: Fedora, repository: Path) -> None:
    '''The kernel itself, after packages that are as they should be.'''
    fedora.unsign(package(repository, 'kernel-core'))


@pytest.mark.parametrize('change, expected', [
    (unsigned, 'basesystem-11-24.fc44.noarch.rpm is not signed'),
    (stranger, 'Public key for basesystem-11-24.fc44.noarch.rpm is not'),
    (tampered, 'Problem opening package setup-2.15.0-27.fc44.noarch.rpm'),
    (late, 'kernel-core-6.19.6-300.fc44.x86_64.rpm is not signed')])
def test_signature(change: Callable[[Fedora, Path], None], expected: str,
                   fedora: Fedora, variant: Path, mirror: Mirror,
                   fresh: FedoraProject) -> None:
    '''
    Metadata that agree with what the mirror has are not believed: no lock.
    '''
    use_variant(fresh, mirror)
    change(fedora, variant)
    fedora.index('variant/x86_64')
    said = fresh.bad(5, '--update-lock')
    assert 'dnf refused what the mirror has:' in said
    assert expected in said
    assert not fresh.lock_path.exists()


def test_swapped(variant: Path, mirror: Mirror,
                 fresh: FedoraProject) -> None:
    '''Two signed packages, each in the place of the other: no lock.'''
    use_variant(fresh, mirror)
    one, other = (package(variant, name) for name in ('setup', 'basesystem'))
    first, second = one.read_bytes(), other.read_bytes()
    write(one, second)
    write(other, first)
    said = fresh.bad(5, '--update-lock')
    assert re.search('(basesystem|setup).*: Cannot download', said), said
    assert not fresh.lock_path.exists()


def reindex(fedora: Fedora, edit: Callable[[str], str]) -> None:
    '''Make the metadata of the variant say what @edit makes of them.'''
    folder = fedora.folder / 'variant/x86_64/repodata'
    [old] = folder.glob('*primary.xml*')
    fedora.run('zstd -dqf "$1" -o log.xml',
               str(old.relative_to(fedora.folder)))
    text = edit((fedora.folder / 'log.xml').read_text()).encode()
    new = gzip.compress(text, mtime=0)
    (folder / 'new-primary.xml.gz').write_bytes(new)
    old.unlink()
    repomd = folder / 'repomd.xml'
    found = re.search('<data type="primary">.*?</data>', repomd.read_text(),
                      re.S)
    assert found
    write(repomd, repomd.read_text().replace(found[0], f'''\
<data type="primary">
<checksum type="sha256">{hashlib.sha256(new).hexdigest()}</checksum>
<open-checksum type="sha256">{hashlib.sha256(text).hexdigest()}</open-checksum>
<location href="repodata/new-primary.xml.gz"/>
<timestamp>{EPOCH}</timestamp>
<size>{len(new)}</size><open-size>{len(text)}</open-size>
</data>''').encode())


def test_metadata_lie(fedora: Fedora, variant: Path, mirror: Mirror,
                      fresh: FedoraProject) -> None:
    '''
    Metadata are not signed. That an old package is a new one, which the
    header denies, is not what a lock says: no lock.
    '''
    use_variant(fresh, mirror)
    assert package(variant, 'dash')
    reindex(fedora, lambda text: text.replace(
        'ver="0.5.13" rel="1.fc44"', 'ver="0.6.0" rel="1.fc44"'))
    said = fresh.bad(5, '--update-lock')
    assert 'dash' in said and '0.6.0-1.fc44' in said
    assert not fresh.lock_path.exists()


def test_lock_from_a_folder(fedora: Fedora, fresh: FedoraProject) -> None:
    '''dnf keeps no copies of what it has at hand: the way out is told.'''
    fresh.mirror = f'file://{fedora.folder}/{{arch}}'
    said = fresh.bad(5, '--update-lock')
    assert 'can\'t be made from a mirror in a folder' in said
    assert 'python3 -m http.server' in said


# What a mirror may do to a build

def named(lock: Lock, name: str) -> Package:
    '''The package of @lock with @name.'''
    [found] = [p for p in lock.packages if p.name == name]
    return found


def relock(project: FedoraProject, *packages: Package,
           without: str = '') -> None:
    '''Put @packages into the lock of @project, and leave one out.'''
    lock = locks.load(project.lock_path)
    there: Dict[str, Package] = {p.name: p for p in lock.packages}
    there.update({p.name: p for p in packages})
    there.pop(without, None)
    project.lock_path.write_text(locks.render(Lock(
        lock.definition, lock.distribution, lock.release, lock.architecture,
        lock.epoch, tuple(there.values()))))


def test_gone(variant: Path, locked: FedoraProject, mirror: Mirror) -> None:
    '''A package that is not where it was: named, and no other is taken.'''
    use_variant(locked, mirror)
    path = package(variant, 'dash')
    path.rename(path.with_name('dash-0.5.13-2.fc44.x86_64.rpm'))
    said = locked.bad(5)
    assert 'gone from every mirror: dash 0.5.13-1.fc44; asked: ' in said
    assert not locked.artefacts()


def test_moved(variant: Path, locked: FedoraProject, mirror: Mirror) -> None:
    '''Signed just as well, but not what was locked.'''
    use_variant(locked, mirror)
    write(package(variant, 'dash'), package(variant, 'sed').read_bytes())
    said = locked.bad(5)
    assert re.search(r'dash 0\.5\.13-1\.fc44 can\'t be fetched: .*'
                     'expected [0-9]+ bytes, found [0-9]+', said), said


def test_outside(locked: FedoraProject) -> None:
    '''A build has the packages of the lock, and no network for others.'''
    relock(locked, without='hwdata')
    assert ('nothing provides hwdata needed by pciutils-3.14.0-2.fc44'
            in locked.bad(6, '--local'))


def test_unsigned_in_the_lock(variant: Path, fedora: Fedora, mirror: Mirror,
                              locked: FedoraProject) -> None:
    '''A lock can\'t vouch for what the distribution does not.'''
    use_variant(locked, mirror)
    path = package(variant, 'basesystem')
    fedora.unsign(path)
    old = named(locks.load(locked.lock_path), 'basesystem')
    data = path.read_bytes()
    relock(locked, replace(old, size=len(data),
                           sha256=hashlib.sha256(data).hexdigest()))
    said = locked.bad(6, '--local')
    assert 'basesystem-11-24.fc44.noarch.rpm is not signed' in said
    assert 'GPG check FAILED' in said


def test_no_package(variant: Path, mirror: Mirror,
                    locked: FedoraProject) -> None:
    '''The right hash of the wrong thing.'''
    use_variant(locked, mirror)
    write(package(variant, 'basesystem'), b'not a package')
    old = named(locks.load(locked.lock_path), 'basesystem')
    relock(locked, replace(
        old, size=13, sha256=hashlib.sha256(b'not a package').hexdigest()))
    said = locked.bad(3, '--local')
    assert 'basesystem-11-24.fc44.noarch.rpm: not an RPM package' in said
