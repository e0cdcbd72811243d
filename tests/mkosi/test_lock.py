# SPDX-License-Identifier: GPL-2.0-or-later
'''Locks: their form, what is refused, digests and identities.'''

from dataclasses import replace
import os
from pathlib import Path
from typing import Callable, List

import pytest

from mkosi_build import lock as locks
from mkosi_build.error import InputError
from mkosi_build.lock import Lock, LockError, Package

DEFINITION = 'd' * 64


def package(name: str = 'hello', version: str = '1.0-1', digit: str = 'a',
            size: int = 1234) -> Package:
    '''A package of which the tests change one thing.'''
    return Package(name, version,
                   f'pool/main/h/{name}/{name}_{version}_amd64.deb',
                   digit * 64, size, 'amd64', f'{name}={version}')


def a_lock(*packages: Package) -> Lock:
    '''A lock of @packages.'''
    return Lock(DEFINITION, 'debian', 'trixie', 'x86_64', 1700000000,
                packages or (package(), package('world', digit='b')))


LOCK = a_lock()
TEXT = locks.render(LOCK)
LINES = TEXT.splitlines()


def test_lock_comes_back_as_it_went() -> None:
    '''What is written is what is read, and the other way round.'''
    assert locks.parse(TEXT, 'a.lock') == LOCK
    assert locks.render(locks.parse(TEXT, 'a.lock')) == TEXT


def test_lock_is_sorted_whatever_the_order() -> None:
    '''Two resolvers that answer in another order write one file.'''
    assert locks.render(a_lock(*reversed(LOCK.packages))) == TEXT


def test_lock_takes_the_characters_of_real_packages() -> None:
    '''Epochs, tildes, pluses, and an escaped colon in the location.'''
    odd = Package('libstdc++6', '1:2.0~rc1+b2-3',
                  'pool/main/g/gcc/libstdc++6_1%3a2.0~rc1+b2-3_amd64.deb',
                  'c' * 64, 99, 'amd64', 'gcc-14=14.2.0~rc1-19')
    text = locks.render(a_lock(odd))
    assert locks.parse(text, 'a.lock').packages == (odd,)
    assert odd.file_name == 'libstdc++6_1%3a2.0~rc1+b2-3_amd64.deb'


def test_lock_takes_the_characters_of_real_rpms() -> None:
    '''Carets and pluses, in names and versions, and underscores.'''
    odd = Package('libstdc++-v3_x', '32:10.3^20250808git1-2.fc43',
                  'Packages/l/libstdc++-v3_x-10.3^20250808git1-2.fc43.'
                  'aarch64.rpm', 'c' * 64, 99, 'aarch64',
                  'gcc-10.3^20250808git1-2.fc43.src.rpm')
    text = locks.render(a_lock(odd))
    assert locks.parse(text, 'a.lock').packages == (odd,)


# Each rule once: line and what becomes of it, and what the error says

def in_package(old: str, new: str) -> 'Callable[[List[str]], None]':
    '''Edits the first package's line.'''
    def edit(lines: List[str]) -> None:
        assert old in lines[7]
        lines[7] = lines[7].replace(old, new)
    return edit


def line(number: int, text: str) -> 'Callable[[List[str]], None]':
    '''Replaces line @number, counted from 1.'''
    def edit(lines: List[str]) -> None:
        lines[number - 1] = text
    return edit


def again(lines: List[str]) -> None:
    '''The first package twice.'''
    lines.insert(8, lines[7])


def swapped(lines: List[str]) -> None:
    '''The packages the wrong way round.'''
    lines[7], lines[8] = lines[8], lines[7]


def same_file(lines: List[str]) -> None:
    '''Two packages in one file.'''
    lines[8] = lines[8].replace('world_1.0-1', 'hello_1.0-1')


def same_bytes(lines: List[str]) -> None:
    '''Two packages of one hash.'''
    lines[8] = lines[8].replace('b' * 64, 'a' * 64)


REFUSED = [
    (line(1, '# something else'), ":1: expected '# SPDX-License"),
    (line(2, '# something else'), ":2: expected '# mkosi-build lock 2'"),
    (line(2, '# mkosi-build lock 1'), "found '# mkosi-build lock 1'"),
    (line(3, '# definition: short'), ':3: expected a digest of 64 hex'),
    (line(4, '# distro: debian'), ':4: expected "# distribution: ..."'),
    (line(5, '# release: '), ':5: expected "# release: ..."'),
    (line(6, '# architecture: x86_64 aarch64'),
     ':6: expected "# architecture: ..."'),
    (line(7, '# epoch: yesterday'), ':7: expected seconds since 1970, found '
     "'yesterday'"),
    (line(7, '# epoch: -1700000000'), ':7: expected seconds since 1970'),
    (line(8, ''), ':8: expected "sha256 size name version architecture '
     'source location"'),
    (in_package(' 1234 ', ' '), ':8: expected "sha256 size name version'),
    (in_package(' 1234 ', '  1234 '), ':8: expected "sha256 size name'),
    (in_package(' 1234 ', ' 1234 x '), ':8: expected "sha256 size name'),
    (in_package('a' * 64, 'a' * 63), ':8: expected a SHA-256 of 64'),
    (in_package('a' * 64, 'A' * 64), ':8: expected a SHA-256 of 64'),
    (in_package('a' * 64, 'g' * 64), ':8: expected a SHA-256 of 64'),
    (in_package(' 1234 ', ' 0 '), ":8: expected a size in bytes, found '0'"),
    (in_package(' 1234 ', ' -5 '), ":8: expected a size in bytes, found"),
    (in_package(' 1234 ', ' 1e3 '), ":8: expected a size in bytes, found"),
    (in_package(' 1234 ', ' 01234 '), ":8: expected a size in bytes, found"),
    (in_package(' hello ', ' -oEvil '), ":8: not a package name: '-oEvil'"),
    (in_package(' hello ', ' he/llo '), ":8: not a package name: 'he/llo'"),
    (in_package(' he', ' he^'), ":8: not a package name: 'he^llo'"),
    (in_package(' 1.0-1 ', ' $(id) '), ":8: not a package version: '$(id)'"),
    (in_package(' amd64 ', ' amd:64 '),
     ":8: not a package architecture: 'amd:64'"),
    (in_package(' amd64 ', ' '), ':8: expected "sha256 size name version'),
    (in_package(' hello=1.0-1 ', ' ../hello '),
     ":8: not a package source: '../hello'"),
    (in_package('pool/main', '/pool/main'), ':8: not a location below'),
    (in_package('pool/main', 'pool/../../..'), ':8: not a location below'),
    (in_package('pool/main', '../pool'), ':8: not a location below'),
    (in_package('pool/main', 'pool//main'), ':8: not a location below'),
    (in_package('pool/main', 'pool/./main'), ':8: not a location below'),
    (in_package('pool/main', 'pool\\main'), ':8: not a location below'),
    (in_package('pool/main', 'pool?main'), ':8: not a location below'),
    (in_package('/hello_1.0-1_amd64.deb', '/'), ':8: not a location below'),
    (in_package('/hello_1.0-1_amd64.deb', '/..'), ':8: not a location'),
    (again, ':9: hello_1.0-1_amd64.deb is already in line 8'),
    (swapped, ':9: hello is out of order after world'),
    (same_file, ':9: hello_1.0-1_amd64.deb is already in line 8'),
    (same_bytes, ':9: the SHA-256 of world is already in line 8'),
]


@pytest.mark.parametrize('edit, expected', REFUSED)
def test_each_rule_is_an_error_with_its_line(
        edit: 'Callable[[List[str]], None]', expected: str) -> None:
    '''An edited lock is refused where it was edited, and by name.'''
    lines = list(LINES)
    edit(lines)
    with pytest.raises(LockError) as caught:
        locks.parse('\n'.join(lines) + '\n', 'a.lock')
    assert str(caught.value).startswith('a.lock:')
    assert expected in str(caught.value)


@pytest.mark.parametrize('text, expected', [
    ('', "a.lock:1: expected '# SPDX-License-Identifier: "
     "GPL-2.0-or-later', found 'nothing'"),
    ('\n'.join(LINES[:4]), 'a.lock:5: expected "# release: ..."'),
    ('\n'.join(LINES[:7]), 'a.lock: no packages'),
])
def test_cut_off_lock_is_refused(text: str, expected: str) -> None:
    '''A lock that ends early is no lock.'''
    with pytest.raises(LockError, match=expected.replace('.', r'\.')):
        locks.parse(text, 'a.lock')


def test_load_names_image_and_next_step(tmp_path: Path) -> None:
    '''Where there is no lock, the command that makes it is told.'''
    with pytest.raises(LockError) as caught:
        locks.load(tmp_path / 'debian-min' / 'x86_64.lock')
    assert 'no such lock' in caught.value.message
    assert caught.value.next_step == ('make it: scripts/mkosi-build.py '
                                      'x86_64 debian-min --update-lock')


def test_load_says_which_image_is_wrong(tmp_path: Path) -> None:
    '''All images have an x86_64.lock: the message has the folder too.'''
    path = tmp_path / 'debian-min' / 'x86_64.lock'
    path.parent.mkdir()
    path.write_text('nonsense\n')
    with pytest.raises(LockError, match='^debian-min/x86_64.lock:1: '):
        locks.load(path)
    path.write_bytes(b'\xff\xfe')
    with pytest.raises(LockError, match='debian-min/x86_64.lock: '):
        locks.load(path)


def test_diff_is_a_line_a_change() -> None:
    '''Added, removed, of another version, and of other bytes only.'''
    old = [package('gone'), package('kept'), package('newer', '1.0-1'),
           package('other', digit='c')]
    new = [package('came'), package('kept'), package('newer', '1.0-2'),
           package('other', digit='d')]
    assert locks.diff(old, new) == [
        '+ came 1.0-1', '- gone 1.0-1', '~ newer 1.0-1 -> 1.0-2',
        '! other 1.0-1: same version, other file']
    assert not locks.diff(old, old)


# Digests and identities

def write_definition(folder: Path) -> Path:
    '''A definition with a script and a link.'''
    (folder / 'mkosi.extra/etc').mkdir(parents=True)
    (folder / 'mkosi.conf').write_text('[Output]\n')
    (folder / 'mkosi.postinst').write_text('#!/bin/sh\n')
    (folder / 'mkosi.postinst').chmod(0o755)
    (folder / 'mkosi.extra/etc/motd').write_text('hello\n')
    (folder / 'mkosi.extra/etc/link').symlink_to('motd')
    return folder


def link_to_file(folder: Path) -> None:
    '''A link becomes a file that holds its target.'''
    (folder / 'mkosi.extra/etc/link').unlink()
    (folder / 'mkosi.extra/etc/link').write_text('motd')


def link_elsewhere(folder: Path) -> None:
    '''A link's target changes.'''
    (folder / 'mkosi.extra/etc/link').unlink()
    (folder / 'mkosi.extra/etc/link').symlink_to('mot')


def python_cache(folder: Path) -> None:
    '''What Python leaves beside a script.'''
    (folder / '__pycache__').mkdir()
    (folder / '__pycache__/a.pyc').write_text('')


CHANGES: 'List[Callable[[Path], object]]' = [
    lambda f: (f / 'mkosi.conf').write_text('[Output]\nSeed=\n'),
    lambda f: (f / 'mkosi.postinst').chmod(0o644),
    lambda f: (f / 'mkosi.extra/etc/motd').unlink(),
    lambda f: (f / 'mkosi.extra/etc/motd').rename(f / 'mkosi.extra/motd'),
    lambda f: (f / 'mkosi.extra/new').write_text(''),
    lambda f: os.replace(f / 'mkosi.extra/etc/link', f / 'mkosi.extra/link'),
    link_to_file,
    link_elsewhere,
    lambda f: (f / 'mkosi.extra/folder').symlink_to('etc'),
]


@pytest.mark.parametrize('change', CHANGES)
def test_definition_digest_sees(change: 'Callable[[Path], object]',
                                tmp_path: Path) -> None:
    '''Whatever changes what a build sees changes the digest.'''
    folder = write_definition(tmp_path / 'image')
    before = locks.definition_digest(folder)
    change(folder)
    assert locks.definition_digest(folder) != before


KEEPS: 'List[Callable[[Path], object]]' = [
    lambda f: os.utime(f / 'mkosi.conf', (1, 1)),
    lambda f: (f / 'mkosi.conf').chmod(0o600),
    lambda f: (f / 'mkosi.postinst').chmod(0o700),
    lambda f: (f / 'x86_64.lock').write_text('a lock'),
    lambda f: (f / '.x86_64.lock.123.tmp').write_text('half a lock'),
    lambda f: (f / 'mkosi.extra/empty').mkdir(),
    python_cache,
]


@pytest.mark.parametrize('change', KEEPS)
def test_definition_digest_ignores(change: 'Callable[[Path], object]',
                                   tmp_path: Path) -> None:
    '''What git does not keep, or is no part of the definition.'''
    folder = write_definition(tmp_path / 'image')
    before = locks.definition_digest(folder)
    change(folder)
    assert locks.definition_digest(folder) == before


def test_definition_digest_is_the_same_elsewhere(tmp_path: Path) -> None:
    '''The path of a checkout does not matter.'''
    assert (locks.definition_digest(write_definition(tmp_path / 'a'))
            == locks.definition_digest(write_definition(tmp_path / 'b/c')))


def test_definition_covers_what_it_includes(tmp_path: Path) -> None:
    '''Files beside it, under names that say so, whoever includes them.'''
    folder = write_definition(tmp_path / 'image')
    alone = locks.definition_digest(folder)
    common = write_definition(tmp_path / 'common')
    (common / 'x86_64.lock').write_text('')
    assert not locks.included(folder)
    assert locks.definition_digest(folder) == alone
    (folder / 'mkosi.conf').write_text('[Include]\nInclude=../common\n')
    assert locks.included(folder) == [common]
    own = [Path('mkosi.conf'), Path('mkosi.extra/etc/link'),
           Path('mkosi.extra/etc/motd'), Path('mkosi.postinst')]
    assert locks.definition_files(folder) == own + [
        Path('../common', name) for name in own]
    before = locks.definition_digest(folder)
    (common / 'mkosi.postinst').write_text('#!/bin/sh -e\n')
    assert locks.definition_digest(folder) != before


@pytest.mark.parametrize('name, text', [
    ('image/mkosi.conf', 'Include=\n        ../a\n    ../b\n'),
    ('image/mkosi.conf', 'Include=../a ../b\n'),
    ('image/mkosi.conf', 'Include=../a,../b\n'),
    ('image/mkosi.conf', 'Include = ../a\nPackages=x\nInclude=../b\n'),
    ('image/mkosi.conf.d/x86_64.conf', 'Include=../a\nInclude=../b\n'),
    ('a/mkosi.conf', 'Include=../b\nInclude=../image\n'),
])
def test_included(name: str, text: str, tmp_path: Path) -> None:
    '''However it is written, and by what was included, too.'''
    for folder in ('image', 'a', 'b'):
        write_definition(tmp_path / folder)
    (tmp_path / 'image/mkosi.conf').write_text('Include=../a\n')
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(text)
    assert locks.included(tmp_path / 'image') == [
        tmp_path / 'a', tmp_path / 'b']


@pytest.mark.parametrize('value', [
    '', 'common', './common', '../../common', '/common', 'mkosi-initrd',
    '../common/mkosi.conf', '../common/', '..', '../.', '../..', '%D/common',
    '../common mkosi-tools'])
def test_included_elsewhere(value: str, tmp_path: Path) -> None:
    '''What a build would not find beside its copy is refused.'''
    folder = write_definition(tmp_path / 'image')
    write_definition(tmp_path / 'common')
    (folder / 'mkosi.conf').write_text(f'[Include]\nInclude={value}\n')
    with pytest.raises(InputError, match=r'mkosi\.conf: Include=.*: expected '
                       r'\.\./NAME, a folder beside'):
        locks.definition_digest(folder)


def test_included_missing(tmp_path: Path) -> None:
    '''The file that includes it is named.'''
    folder = write_definition(tmp_path / 'image')
    (folder / 'mkosi.conf').write_text('[Include]\nInclude=../common\n')
    with pytest.raises(InputError, match='common: no definition there') as e:
        locks.definition_files(folder)
    assert 'Include=../common' in str(e.value)


def test_definition_missing_or_odd(tmp_path: Path) -> None:
    '''No folder, no mkosi.conf, and what is no file.'''
    with pytest.raises(InputError, match='no definition there'):
        locks.definition_digest(tmp_path / 'nowhere')
    folder = write_definition(tmp_path / 'image')
    os.mkfifo(folder / 'mkosi.extra/pipe')
    with pytest.raises(InputError, match='pipe: neither a file, a link'):
        locks.definition_digest(folder)


def test_lock_digest_is_of_what_decides_bytes() -> None:
    '''Of all but the definition, which the identity has in itself.'''
    digest = LOCK.digest
    assert replace(LOCK, definition='e' * 64).digest == digest
    assert replace(LOCK, definition='a' * 64).digest == digest
    assert replace(LOCK, epoch=1700000001).digest != digest
    assert replace(LOCK, release='forky').digest != digest
    assert a_lock(package()).digest != digest
    assert a_lock(package(size=1235), LOCK.packages[1]).digest != digest


def test_identity_is_of_definition_lock_and_tools() -> None:
    '''Each changes it; the order of the tools locks does not.'''
    amd, arm = a_lock(package('mkosi')), a_lock(package('apt'))
    whole = locks.identity(DEFINITION, LOCK, [amd, arm])
    assert locks.identity(DEFINITION, LOCK, [arm, amd]) == whole
    assert len({whole,
                locks.identity('e' * 64, LOCK, [amd, arm]),
                locks.identity(DEFINITION, amd, [amd, arm]),
                locks.identity(DEFINITION, LOCK, [amd]),
                locks.identity(DEFINITION, LOCK, [amd, LOCK])}) == 5
