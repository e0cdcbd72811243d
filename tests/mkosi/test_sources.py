# SPDX-License-Identifier: GPL-2.0-or-later
'''
The complete corresponding source: of every package, of what was linked into
one, by the signed index or the .dsc beside the package; or not at all, with
all names.
'''

import hashlib
from pathlib import Path
from typing import List

import pytest

from fixtures_builder import FaultServer, short, status, whole
from fixtures_publish import NEEDS_GPG, Archive, Works, hash_of

pytest_plugins = ['fixtures_builder', 'fixtures_publish']
pytestmark = NEEDS_GPG
SLOW = pytest.mark.slow

ALL = sorted(['alpha_1.debian.tar.xz', 'alpha_1.dsc', 'alpha_1.orig.tar.xz',
              'delta_0.3.debian.tar.xz', 'delta_0.3.dsc',
              'delta_0.3.orig.tar.xz', 'gamma_2.0-1.debian.tar.xz',
              'gamma_2.0-1.dsc', 'gamma_2.0.orig.tar.xz'])


def lists(works: Works) -> List[Path]:
    '''The lists of sources there are.'''
    return list(works.cache.glob('sources/*'))


def listed(works: Works) -> List[List[str]]:
    '''The words of the lines of the one list.'''
    [path] = lists(works)
    assert path.name == f'{works.lock.digest}.list'
    text = path.read_text()
    assert text.splitlines() == sorted(text.splitlines())
    return [line.split() for line in text.splitlines()]


def assert_complete(works: Works, archive: Archive) -> None:
    '''All files are listed, and in the store with their bytes.'''
    rows = listed(works)
    assert sorted(row[4] for row in rows) == ALL
    for sha256, size, name, version, file, *_ in rows:
        path = archive.folder / archive.pool(name) / file
        assert sha256 == hash_of(path)
        assert int(size) == path.stat().st_size
        assert version == archive.SOURCES[name]
        assert hash_of(works.cache / 'store' / sha256) == sha256


def test_all_is_gathered(works: Works, archive: Archive) -> None:
    '''
    The source of alpha; of beta under its own name and version; of what
    was linked into beta.
    '''
    said = works.good('--sources')
    assert_complete(works, archive)
    assert all(len(row) == 5 for row in listed(works))
    assert 'complete source of 2 packages: 9 files' in said
    assert str(lists(works)[0]) in said


@SLOW
def test_twice(works: Works, archive: Archive, faults: FaultServer) -> None:
    '''The second time, nothing is asked for but what was damaged.'''
    works.good('--sources')
    faults.asked.clear()
    said = works.good('--sources', '--json')
    assert not faults.asked
    [event] = works.events('sources', said)
    assert event['files'] == 9 and event['unindexed'] == []
    damaged = works.cache / 'store' / listed(works)[0][0]
    damaged.chmod(0o644)
    damaged.write_bytes(b'')
    works.good('--sources')
    assert_complete(works, archive)


@SLOW
def test_a_damaged_list(works: Works, archive: Archive) -> None:
    '''It is made anew.'''
    works.good('--sources')
    [path] = lists(works)
    for text in ('', 'rubbish\n', path.read_text()[:300]):
        path.write_text(text)
        works.good('--sources')
        assert_complete(works, archive)


def test_the_index_has_moved_on(works: Works, archive: Archive) -> None:
    '''The .dsc beside the package, and the list says so.'''
    archive.index({'alpha': '1'})
    said = works.good('--sources')
    assert 'no longer in the signed index: delta 0.3, gamma 1:2.0-1' in said
    assert_complete(works, archive)
    assert {row[2] for row in listed(works) if row[5:]} == {'delta', 'gamma'}
    assert all(row[5:] in ([], ['unindexed']) for row in listed(works))


def test_no_index_of_sources(works: Works, archive: Archive) -> None:
    '''A mirror may have none.'''
    archive.index({})
    works.good('--sources')
    assert_complete(works, archive)
    assert all(row[5:] == ['unindexed'] for row in listed(works))


def test_another_version_beside(works: Works, archive: Archive) -> None:
    '''A .dsc that is for another version is none.'''
    archive.index({})
    dsc = archive.folder / archive.pool('gamma') / 'gamma_2.0-1.dsc'
    dsc.write_text(dsc.read_text().replace('1:2.0-1', '2:2.0-1'))
    assert 'missing: gamma 1:2.0-1;' in works.bad(5, '--sources')
    assert not lists(works)


@pytest.mark.parametrize('line', [
    '0' * 64 + ' 5 ../../etc/passwd', 'short 5 a.tar.xz',
    '0' * 64 + ' 5 .hidden', '0' * 64 + ' -5 a.tar.xz'])
def test_an_odd_dsc(works: Works, archive: Archive, line: str) -> None:
    '''Not a file of a source package: the whole .dsc counts for nothing.'''
    archive.index({})
    dsc = archive.folder / archive.pool('alpha') / 'alpha_1.dsc'
    dsc.write_text(dsc.read_text().replace(
        'Checksums-Sha256:\n', f'Checksums-Sha256:\n {line}\n'))
    assert 'missing: alpha 1;' in works.bad(5, '--sources')


def test_missing(works: Works, archive: Archive) -> None:
    '''All that nobody has is named, and what to do.'''
    archive.index({'alpha': '1', 'delta': '0.3'})
    folder = archive.folder / 'pool/main'
    (folder / 'd/delta/delta_0.3.orig.tar.xz').unlink()
    (folder / 'a/alpha/alpha_1.dsc').unlink()
    (folder / 'b/beta/gamma_2.0-1.dsc').unlink()
    said = works.bad(5, '--sources')
    assert 'missing: alpha 1, delta 0.3, gamma 1:2.0-1;' in said
    assert 'must not be published' in said
    assert 'QEMU_MKOSI_MIRROR' in said
    assert not lists(works)


def test_another_mirror_has_the_rest(works: Works, archive: Archive,
                                     tmp_path: Path) -> None:
    '''An archive of what was there before completes a mirror.'''
    other = tmp_path / 'snapshot/pool/main'
    archive.index({'alpha': '1'})
    for where in ('a/alpha/alpha_1.dsc', 'b/beta/gamma_2.0-1.dsc',
                  'd/delta/delta_0.3.orig.tar.xz'):
        (other / where).parent.mkdir(parents=True, exist_ok=True)
        (archive.folder / 'pool/main' / where).rename(other / where)
    works.good('--sources', QEMU_MKOSI_MIRROR=f'{works.mirror} '
               f'file://{tmp_path}/snapshot')
    assert len(listed(works)) == 9


def test_forged_index(works: Works, archive: Archive) -> None:
    '''apt refuses an index that is not the signed one.'''
    path = archive.folder / 'dists/trixie/main/source/Sources.gz'
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert 'apt-get failed' in works.bad(5, '--sources')
    assert not lists(works)


def test_forged_signature(works: Works, archive: Archive) -> None:
    '''Nor one that somebody else has signed, or nobody.'''
    path = archive.folder / 'dists/trixie/InRelease'
    signed = path.read_text()
    path.write_text(signed.replace('Suite: stable', 'Suite: stabel'))
    assert 'apt-get failed' in works.bad(5, '--sources')
    path.write_bytes((path.parent / 'Release').read_bytes())
    assert 'apt-get failed' in works.bad(5, '--sources')
    assert not lists(works)


def test_no_keyring(works: Works, archive: Archive) -> None:
    '''Then nothing can be checked.'''
    archive.keyring.unlink()
    assert 'can\'t check signatures' in works.bad(4, '--sources')


@SLOW
def test_wrong_bytes(works: Works, archive: Archive,
                     faults: FaultServer) -> None:
    '''Of the right length, too.'''
    name = 'alpha_1.orig.tar.xz'
    data = (archive.folder / 'pool/main/a/alpha' / name).read_bytes()
    faults.answers[f'/pool/main/a/alpha/{name}'] = [
        whole(bytes(len(data)))]
    said = works.bad(5, '--sources')
    assert hashlib.sha256(bytes(len(data))).hexdigest() in said
    assert not lists(works)


@SLOW
def test_the_server_stumbles(works: Works, archive: Archive,
                             faults: FaultServer) -> None:
    '''A transfer that breaks off goes on.'''
    name = '/pool/main/a/alpha/alpha_1.orig.tar.xz'
    data = (archive.folder / name[1:]).read_bytes()
    faults.answers[name] = [short(data, 100), status(503), whole(data)]
    works.good('--sources')
    assert_complete(works, archive)


def test_fedora(works: Works) -> None:
    '''Says that it can't.'''
    lock = works.definition / 'x86_64.lock'
    lock.write_text(lock.read_text().replace('distribution: debian',
                                             'distribution: fedora'))
    text = works.registry.read_text()
    works.registry.write_text(text.replace('distribution: debian',
                                           'distribution: fedora'))
    assert 'not supported yet' in works.bad(5, '--sources')
