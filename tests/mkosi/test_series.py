# SPDX-License-Identifier: GPL-2.0-or-later
'''The harness: anchors, layouts, trees, the copy, TAP and KVM.'''

import hashlib
import json
import os
from pathlib import Path
import shutil
import subprocess
import sys
import tarfile
from typing import Any, Dict, List, Tuple

import pytest

from conftest import Answer, Server
from series import apply, edits, functional, kvm, tap, tree
from series.__main__ import main
from series.edits import AnchorError, Edit, Patch, edit_text
from series.error import SeriesError
from series.tree import Tarball


# Anchored edits

TEXT = 'first\n  second = [\n  third\nlast\n'


def anchored(place: str, text: str, pattern: str = r'^  second = \[$',
             count: int = 1) -> Edit:
    '''An edit of a file that does not matter.'''
    return Edit('some/file', pattern, place, text, count)


@pytest.mark.parametrize('place, text, expected', [
    ('after', 'new', 'first\n  second = [\nnew\n  third\nlast\n'),
    ('after', 'new\ntwo\n', 'first\n  second = [\nnew\ntwo\n  third\nlast\n'),
    ('before', 'new', 'first\nnew\n  second = [\n  third\nlast\n'),
    ('replace', '  other', 'first\n  other\n  third\nlast\n'),
])
def test_edit_goes_where_the_anchor_is(place: str, text: str,
                                       expected: str) -> None:
    '''Lines of their own beside the match, or in place of it.'''
    assert edit_text(TEXT, anchored(place, text)) == expected


def test_edit_beside_the_first_and_last_line() -> None:
    '''Also where the file does not end in a newline.'''
    assert edit_text('one', anchored('after', 'two', 'one')) == 'one\ntwo'
    assert edit_text('one', anchored('before', 'two', 'one')) == 'two\none'


def test_edit_of_part_of_a_line_keeps_the_rest() -> None:
    '''An anchor within a line still puts text on lines of its own.'''
    edit = anchored('after', 'new', 'sec')
    assert edit_text(TEXT, edit) == 'first\n  second = [\nnew\n  third\nlast\n'


def test_replace_takes_groups_and_a_count() -> None:
    '''Each of the stated number of matches is replaced.'''
    edit = anchored('replace', r'isinstance(\1, Asset)',
                    r'type\((\w+)\) == Asset', 2)
    assert (edit_text('type(a) == Asset or type(b) == Asset', edit)
            == 'isinstance(a, Asset) or isinstance(b, Asset)')


def test_anchor_that_is_gone_names_all() -> None:
    '''File, pattern, expected and found count, nearest lines.'''
    with pytest.raises(AnchorError) as error:
        edit_text(TEXT.replace('second', 'seconds'), anchored('after', 'x'))
    assert str(error.value).startswith(
        "some/file: pattern '^  second = \\[$': expected 1 match, found 0\n"
        '  nearest lines:\n    2:   seconds = [\n')
    assert 'next: ' in str(error.value)


def test_anchor_with_nothing_near() -> None:
    '''An unrelated file is said to be one.'''
    with pytest.raises(AnchorError, match='no line comes near it'):
        edit_text('\n\n', anchored('after', 'x'))


def test_anchor_found_twice_names_the_places() -> None:
    '''A second match is an error, not a choice.'''
    with pytest.raises(AnchorError) as error:
        edit_text(TEXT + TEXT, anchored('after', 'x'))
    assert 'expected 1 match, found 2' in str(error.value)
    assert '\n    2:   second = [\n    6:   second = [' in str(error.value)


def test_anchor_found_too_rarely() -> None:
    '''Fewer than stated is an error as well.'''
    with pytest.raises(AnchorError, match='expected 2 matches, found 1'):
        edit_text(TEXT, anchored('after', 'x', count=2))


@pytest.mark.parametrize('edit', [
    'file: a\n        match: b',
    'file: a\n        match: b\n        after: c\n        before: d',
    'file: a\n        match: b\n        after: c\n        wehre: d',
    'match: b\n        after: c',
    'file: a\n        match: b\n        after: c\n        layout: round',
])
def test_malformed_edit(tmp_path: Path, edit: str) -> None:
    '''A typo in the edits is an error that names the patch.'''
    path = tmp_path / 'edits.yaml'
    path.write_text('parts: []\nharness:\n  - subject: s\n    edits:\n'
                    f'      - {edit}\n', encoding='utf-8')
    with pytest.raises(SeriesError, match=r'edits\.yaml: s: '):
        edits.load(path)


def test_layout_of_a_patch(tmp_path: Path) -> None:
    '''It is that of its edits, but for those that have one.'''
    path = tmp_path / 'edits.yaml'
    path.write_text(
        'parts: []\nharness:\n'
        '  - subject: s\n    layout: folders\n    edits:\n'
        '      - {file: a, match: b, after: c}\n'
        '      - {file: a, match: b, after: c, layout: flat}\n',
        encoding='utf-8')
    assert [edit.layout for edit in edits.load(path)[0].edits] \
        == ['folders', 'flat']


def test_our_edits_are_well_formed() -> None:
    '''The committed file loads, and only QEMU's files are edited.'''
    patches = edits.load()
    assert patches
    for edit in (edit for patch in patches for edit in patch.edits):
        assert not (apply.ROOT / edit.file).exists()


# Trees and the copy

def make_tree(folder: Path, flat: bool = False,
              version: str = '11.0.1') -> Path:
    '''As much of a QEMU tree as the harness looks at.'''
    tests = folder / 'tests/functional'
    (tests / 'x86_64').mkdir(parents=True)
    (folder / 'VERSION').write_text(f'{version}\n', encoding='utf-8')
    (tests / 'meson.build').write_text('anchor\n', encoding='utf-8')
    if not flat:
        (tests / 'x86_64/meson.build').write_text('\n', encoding='utf-8')
    return folder


def make_repository(folder: Path) -> Path:
    '''A repository with one file of ours, one ignored, one not for QEMU.'''
    for name in ('scripts/ours.py', 'scripts/ours.pyc', 'README.md',
                 'series/mine.py'):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f'{name}\n', encoding='utf-8')
    (folder / 'scripts/ours.py').chmod(0o755)
    (folder / 'scripts/link').symlink_to('/no/such/target')
    (folder / '.gitignore').write_text('*.pyc\n', encoding='utf-8')
    subprocess.run(['git', 'init', '--quiet', str(folder)], check=True)
    return folder


PATCHES = [Patch('all', (
    Edit('tests/functional/meson.build', '^anchor$', 'after', 'for all'),
    Edit('tests/functional/meson.build', '^anchor$', 'after', 'for flat',
         layout='flat'),
    Edit('tests/functional/meson.build', '^anchor$', 'after', 'for 11.1',
         since=(11, 1)),
))]


@pytest.mark.parametrize('flat, version, expected', [
    (False, '11.0.1', 'anchor\nfor all\n'),
    (False, '11.1.50', 'anchor\nfor 11.1\nfor all\n'),
    (True, '10.0.13', 'anchor\nfor flat\nfor all\n'),
])
def test_layout_and_version_choose_the_edits(
        tmp_path: Path, flat: bool, version: str, expected: str) -> None:
    '''A flat tree gets what is for it, a new one what is for new ones.'''
    source = make_tree(tmp_path / 'qemu', flat, version)
    assert tree.layout(source) == ('flat' if flat else 'folders')
    copy = tmp_path / 'copy'
    apply.apply(source, copy, PATCHES, make_repository(tmp_path / 'ours'))
    assert (copy / 'tests/functional/meson.build').read_text() == expected


def test_not_a_qemu_tree(tmp_path: Path,
                         monkeypatch: pytest.MonkeyPatch) -> None:
    '''QEMU_SRC that points elsewhere is an error with a next step.'''
    monkeypatch.setenv('QEMU_SRC', str(tmp_path))
    with pytest.raises(SeriesError, match='is not a QEMU source tree'):
        tree.obtain(tmp_path / 'build', print)


def test_apply_takes_our_files_and_no_others(tmp_path: Path) -> None:
    '''Tracked or not: what git would commit, with its mode.'''
    source = make_tree(tmp_path / 'qemu')
    copy = tmp_path / 'copy'
    changed = apply.apply(source, copy, [],
                          make_repository(tmp_path / 'ours'))
    assert list(changed) == ['scripts/link', 'scripts/ours.py']
    assert os.readlink(copy / 'scripts/link') == '/no/such/target'
    assert os.access(copy / 'scripts/ours.py', os.X_OK)
    assert not (copy / 'scripts/ours.pyc').exists()
    assert not (copy / 'series').exists()
    assert (copy / 'meson.build').is_file()
    assert not (source / 'scripts').exists()


def test_applying_again_follows_every_change(tmp_path: Path) -> None:
    '''Changed, removed and damaged files; the unchanged stay untouched.'''
    source = make_tree(tmp_path / 'qemu')
    root = make_repository(tmp_path / 'ours')
    copy = tmp_path / 'copy'
    (root / 'scripts/gone.py').write_text('x', encoding='utf-8')
    apply.apply(source, copy, PATCHES, root)
    before = (copy / 'VERSION').stat().st_mtime_ns
    (root / 'scripts/gone.py').unlink()
    (root / 'scripts/ours.py').write_text('new\n', encoding='utf-8')
    (copy / 'tests/functional/meson.build').write_text('', encoding='utf-8')
    (source / 'tests/functional/x86_64/test_x.py').touch()
    (root / 'scripts/link').unlink()
    (root / 'scripts/link').write_text('no link', encoding='utf-8')
    apply.apply(source, copy, PATCHES, root)
    assert (copy / 'scripts/ours.py').read_text() == 'new\n'
    assert not (copy / 'scripts/gone.py').exists()
    assert (copy / 'scripts/link').read_text() == 'no link'
    assert (copy / 'tests/functional/x86_64/test_x.py').exists()
    assert (copy / 'tests/functional/meson.build').read_text() \
        == 'anchor\nfor all\n'
    assert (copy / 'VERSION').stat().st_mtime_ns == before


def test_a_misfit_leaves_the_copy_alone(tmp_path: Path) -> None:
    '''No half-applied series.'''
    source = make_tree(tmp_path / 'qemu')
    root = make_repository(tmp_path / 'ours')
    copy = tmp_path / 'copy'
    wrong = Edit('tests/functional/meson.build', 'nowhere', 'after', 'x')
    with pytest.raises(AnchorError):
        apply.apply(source, copy, [Patch('s', (wrong,))], root)
    with pytest.raises(SeriesError, match='no/such: no such file'):
        apply.apply(source, copy,
                    [Patch('s', (Edit('no/such', 'a', 'after', 'x'),))],
                    root)
    assert not copy.exists()


def test_a_file_that_qemu_has_too(tmp_path: Path) -> None:
    '''We never replace a file of QEMU's.'''
    source = make_tree(tmp_path / 'qemu')
    (source / 'scripts').mkdir()
    (source / 'scripts/ours.py').touch()
    with pytest.raises(SeriesError, match='QEMU has a file of that name'):
        apply.apply(source, tmp_path / 'copy', [],
                    make_repository(tmp_path / 'ours'))


def test_diff_is_a_patch(tmp_path: Path) -> None:
    '''git accepts it, and gets what apply makes.'''
    source = make_tree(tmp_path / 'qemu')
    root = make_repository(tmp_path / 'ours')
    copy = tmp_path / 'copy'
    changed = apply.apply(source, copy, PATCHES, root)
    subprocess.run(['git', 'init', '--quiet', str(source)], check=True)
    subprocess.run(['git', 'apply', '-'], cwd=source, check=True,
                   input=apply.diff(source, changed), encoding='utf-8')
    for name in set(changed) - {'scripts/link'}:
        assert (source / name).read_bytes() == (copy / name).read_bytes()
    assert os.readlink(source / 'scripts/link') == '/no/such/target'


# Fetching a tree

def make_tarball(tmp_path: Path, version: str) -> Tuple[bytes, Tarball]:
    '''A tarball as Debian's: one folder on top, the version in its name.'''
    name = f'qemu-{version}'
    top = make_tree(tmp_path / name, version=version)
    for part in (*tree.PARTS, 'hw/big.c'):
        if not (top / part).exists():
            (top / part).parent.mkdir(parents=True, exist_ok=True)
            (top / part).touch()
    path = tmp_path / f'{name}.tar.xz'
    with tarfile.open(path, 'w:xz') as archive:
        archive.add(tmp_path / name, name)
    data = path.read_bytes()
    return data, Tarball(version, f'pool/qemu_{version}.orig.tar.xz',
                         len(data), hashlib.sha256(data).hexdigest())


@pytest.fixture(name='mirror')
def fixture_mirror(server: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    '''The only mirror there is; apt has none and can fetch nothing.'''
    monkeypatch.setattr(tree, 'mirrors', lambda: [server.url])

    def no_apt(mirror: str, _folder: Path) -> Path:
        raise SeriesError(f'{mirror}: nothing signed')

    monkeypatch.setattr(tree, 'fetch_signed', no_apt)
    return server


def test_newest_tree_is_fetched_once(tmp_path: Path, mirror: Server) -> None:
    '''Verified, unpacked as far as used, and there the next time.'''
    data, newest = make_tarball(tmp_path, '11.1.1')
    mirror.paths[f'/{newest.location}'] = Answer(data)
    folder = tmp_path / 'build'
    for _ in range(2):
        found = tree.obtain(folder, print, [newest])
    assert found == folder / 'qemu_11.1.1'
    assert tree.version_of(found) == '11.1.1'
    assert not (found / 'hw').exists()
    assert mirror.asked == [f'/{newest.location}']
    assert [path.name for path in folder.iterdir()] == ['qemu_11.1.1']


@pytest.mark.parametrize('fault, problem', [
    ('gone', 'HTTP Error 404'),
    ('broken', 'HTTP Error 500'),
    ('truncated', 'bytes, found'),
    ('short', 'bytes, found'),
    ('longer', 'bytes, found more'),
    ('other', 'expected sha256'),
])
def test_fault_falls_back_to_the_next_version(
        tmp_path: Path, mirror: Server, fault: str, problem: str) -> None:
    '''Each fault is told, nothing of it stays, an older version is taken.'''
    data, newest = make_tarball(tmp_path, '11.1.1')
    mirror.paths[f'/{newest.location}'] = {
        'gone': Answer(status=404),
        'broken': Answer(status=500),
        'truncated': Answer(data[:-1], length=len(data)),
        'short': Answer(data[:-1]),
        'longer': Answer(data + b'x'),
        'other': Answer(data[:-1] + b'x'),
    }[fault]
    older_data, older = make_tarball(tmp_path, '10.2.2')
    mirror.paths[f'/{older.location}'] = Answer(older_data)
    told: List[str] = []
    folder = tmp_path / 'build'
    found = tree.obtain(folder, told.append, [newest, older])
    assert found.name == 'qemu_10.2.2'
    assert len(told) == 1 and told[0].startswith('QEMU 11.1.1: http')
    assert problem in told[0]
    assert [path.name for path in folder.iterdir()] == ['qemu_10.2.2']


def test_second_mirror_is_asked(tmp_path: Path, mirror: Server) -> None:
    '''A mirror that refuses to talk does not stop us.'''
    data, newest = make_tarball(tmp_path, '11.1.1')
    mirror.paths[f'/{newest.location}'] = Answer(data)
    dest = tmp_path / 'qemu_11.1.1.tar.xz'
    problems = tree.fetch(newest, ['http://127.0.0.1:1', mirror.url], dest)
    assert len(problems) == 1 and '127.0.0.1:1/' in problems[0]
    assert dest.read_bytes() == data


def test_signed_source_is_the_last_resort(
        tmp_path: Path, mirror: Server,
        monkeypatch: pytest.MonkeyPatch) -> None:
    '''What apt verified is taken when no locked tarball is left.'''
    data, lost = make_tarball(tmp_path, '10.0.13')

    def signed(base: str, folder: Path) -> Path:
        assert base == mirror.url
        path = folder / 'qemu_10.0.13+ds.orig.tar.xz'
        path.write_bytes(data)
        return path

    monkeypatch.setattr(tree, 'fetch_signed', signed)
    found = tree.obtain(tmp_path / 'build', print, [lost])
    assert found.name == 'qemu_10.0.13'
    assert mirror.asked == [f'/{lost.location}']


def test_no_tree_at_all(tmp_path: Path, mirror: Server) -> None:
    '''The error lists every source and says what to do.'''
    _, lost = make_tarball(tmp_path, '11.1.1')
    with pytest.raises(SeriesError) as error:
        tree.obtain(tmp_path / 'build', print, [lost])
    assert f'{mirror.url}/{lost.location}: HTTP Error 404' in str(error.value)
    assert f'{mirror.url}: nothing signed' in str(error.value)
    assert 'next: name a tree with QEMU_SRC' in str(error.value)
    assert not list((tmp_path / 'build').iterdir())


@pytest.mark.parametrize('name, expected', [
    ('qemu_10.0.13+ds.orig.tar.xz', (10, 0, 13)),
    ('qemu_11.1.1', (11, 1, 1)),
    ('qemu_7.2+dfsg.orig.tar.xz', (7, 2)),
    ('other', ()),
])
def test_version_of_a_file_name(name: str, expected: Any) -> None:
    '''As Debian names source tarballs.'''
    assert tree.version_in(name) == expected


def test_override_is_the_first_mirror(
        monkeypatch: pytest.MonkeyPatch) -> None:
    '''QEMU_MKOSI_MIRROR, separated by spaces, before the host's own.'''
    monkeypatch.setenv('QEMU_MKOSI_MIRROR', 'http://a.test/ http://b.test')
    assert tree.mirrors()[:2] == ['http://a.test', 'http://b.test']


def test_locked_trees_are_newest_first() -> None:
    '''The committed lock is in the order in which it is tried.'''
    versions = [edits.version(tarball.version) for tarball in tree.locked()]
    assert versions == sorted(versions, reverse=True)


# What came of the tests

@pytest.mark.parametrize('text, expected', [
    ('TAP version 13\nok 1 a.B.c\nok 2 a.B.d\n1..2\n', (2, 0, 0)),
    ('not ok 1 a.B.c\nok 2 a.B.d\n1..2\n', (1, 1, 0)),
    ('ok 1 a.B.c # SKIP no such thing\n1..1\n', (0, 0, 1)),
    ('1..0 # SKIP nothing here\n', (0, 0, 1)),
    ('not ok 1 a # TODO later\n1..1\n', (1, 0, 0)),
    ('1..2\nok 1 a\nok 2 b\n', (2, 0, 0)),
    # Silence is no success
    ('', (0, 1, 0)),
    ('1..0\n', (0, 0, 1)),
    ('ok 1 a\n', (1, 1, 0)),
    ('ok 1 a\n1..3\n', (1, 1, 0)),
    ('ok 1 a\nBail out! all is lost\n1..1\n', (1, 1, 0)),
    ('# ok 1 a\n  ok 2 b\nokay\n1..0\n', (0, 0, 1)),
])
def test_counting_tap(text: str, expected: Any) -> None:
    '''Passed, failed, skipped.'''
    count = tap.parse(text)
    assert (count.passed, count.failed, count.skipped) == expected


def test_reason_of_a_skip() -> None:
    '''Name and reason are kept for the report.'''
    count = tap.parse('ok 1 a.B.c # SKIP no such thing\n1..1\n')
    assert count.skips == [('a.B.c', 'no such thing')]


@pytest.mark.parametrize('text, result, status, expected', [
    ('ok 1 a\n1..1\n', 'OK', 0, (1, 0, 0)),
    ('ok 1 a\n', 'TIMEOUT', -15, (1, 1, 0)),
    ('ok 1 a\n1..1\n', 'ERROR', 1, (1, 1, 0)),
    ('not ok 1 a\n1..1\n', 'ERROR', 1, (0, 1, 0)),
    ('ok 1 a # SKIP x\n1..1\n', 'SKIP', 0, (0, 0, 1)),
    ('ok 1 a\n1..1\n', 'INTERRUPT', 0, (1, 1, 0)),
    ('', 'ERROR', 1, (0, 1, 0)),
])
def test_judging_a_test(text: str, result: str, status: int,
                        expected: Any) -> None:
    '''meson's verdict counts where TAP is silent about it.'''
    count = tap.judge(text, result, status)
    assert (count.passed, count.failed, count.skipped) == expected


@pytest.mark.parametrize('count, strict, status', [
    (tap.Count(passed=1), True, 0),
    (tap.Count(passed=1, skipped=1), True, 1),
    (tap.Count(passed=1, skipped=1), False, 0),
    (tap.Count(passed=1, failed=1), False, 1),
    (tap.Count(), False, 1),
])
def test_report_ends_with_the_summary(
        count: tap.Count, strict: bool, status: int,
        capsys: pytest.CaptureFixture[str]) -> None:
    '''The last line is the count; a skip of ours or nothing at all fails.'''
    assert functional.report(count, strict) == status
    assert capsys.readouterr().out.splitlines()[-1] == count.summary()
    assert count.summary() == (f'{count.passed} passed, {count.failed} '
                               f'failed, {count.skipped} skipped')


LISTED = {'func-x86_64-mkosi_boot': 'tests/functional/x86_64/ours.py',
          'func-x86_64-version': 'tests/functional/generic/theirs.py'}


@pytest.mark.parametrize('env, expected', [
    ({}, ['func-x86_64-mkosi_boot']),
    ({'ALL': '1'}, list(LISTED)),
    ({'TESTS': '*-version'}, ['func-x86_64-version']),
])
def test_selection(monkeypatch: pytest.MonkeyPatch, env: Dict[str, str],
                   expected: List[str]) -> None:
    '''Ours, all, or those named.'''
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert functional.select(LISTED, [LISTED['func-x86_64-mkosi_boot']]) \
        == expected


REGISTRY = '''\
images:
  here:
    architectures: {x86_64: {}}
  there:
    architectures: {x86_64: {not-locked: no mirror}, aarch64: {}}
'''


@pytest.mark.parametrize('why, expected', [
    ([], 0),
    (['mkosi:there: cannot be built yet: no mirror; see --list'], 0),
    (['kernel is not in the cache'], 1),
    (['cannot be built yet: no mirror', 'no qemu-system-x86_64', ''], 2),
])
def test_skips_that_nobody_can_avoid(tmp_path: Path, why: List[str],
                                     expected: int) -> None:
    '''Those with the registry's own reason, and no others.'''
    path = tmp_path / 'registry.yaml'
    path.write_text(REGISTRY, encoding='utf-8')
    count = tap.Count()
    for reason in why:
        count.skip('test', reason)
    assert functional.avoidable(count, functional.unlocked(path)) == expected


def test_skips_are_told_by_reason(
        capsys: pytest.CaptureFixture[str]) -> None:
    '''A long reason is not said once for each test.'''
    count = tap.Count(passed=1)
    for name in ('one', 'two'):
        count.skip(name, 'no mirror')
    functional.report(count, strict=False)
    assert 'skipped: no mirror\n    one\n    two\n' in capsys.readouterr().out


def test_selection_of_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    '''A name with a typo does not pass for success.'''
    monkeypatch.setenv('TESTS', 'func-x86_64-mkosi_root')
    with pytest.raises(SeriesError, match='func-x86_64-mkosi_boot'):
        functional.select(LISTED, [])


def test_emulators_of_a_folder(tmp_path: Path,
                               monkeypatch: pytest.MonkeyPatch) -> None:
    '''QEMU_BIN names them all; variants and plain files are none.'''
    for name in ('qemu-system-x86_64', 'qemu-system-x86_64-microvm',
                 'qemu-system-aarch64'):
        (tmp_path / name).touch(mode=0o755)
    (tmp_path / 'qemu-system-arm').touch(mode=0o644)
    monkeypatch.setenv('QEMU_BIN', f'/no/such/folder:{tmp_path}')
    assert functional.find_emulators() == {
        'x86_64': str(tmp_path / 'qemu-system-x86_64'),
        'aarch64': str(tmp_path / 'qemu-system-aarch64')}
    monkeypatch.setenv('QEMU_BIN', str(tmp_path / 'none'))
    with pytest.raises(SeriesError, match='no emulator'):
        functional.find_emulators()


def test_override_of_the_builder_is_used(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    '''Images that were built unlocked are tested, unless told otherwise.'''
    monkeypatch.setenv('QEMU_MKOSI_DIR', str(tmp_path))
    assert 'QEMU_TEST_MKOSI_OVERRIDE' not in functional.environment()
    override = tmp_path / 'override.json'
    override.write_text(json.dumps({'schema': 1, 'images': {}}),
                        encoding='utf-8')
    assert functional.environment()['QEMU_TEST_MKOSI_OVERRIDE'] \
        == str(override)
    monkeypatch.setenv('QEMU_TEST_MKOSI_OVERRIDE', '/other')
    assert functional.environment()['QEMU_TEST_MKOSI_OVERRIDE'] == '/other'


# KVM

needs_emulator = pytest.mark.skipif(
    shutil.which('qemu-system-x86_64') is None,
    reason='no qemu-system-x86_64')


@needs_emulator
def test_probe_runs_code() -> None:
    '''The probe tells an accelerator that works from one that does not.'''
    assert kvm.probe.runs_code('qemu-system-x86_64', 'tcg')
    assert not kvm.probe.runs_code('qemu-system-x86_64', 'no-such-accelerator')


def test_kvm_of_another_architecture() -> None:
    '''KVM is for guests of the host's own, and needs an emulator.'''
    assert not kvm.probe.kvm_works('/nowhere/qemu-system-vax')
    assert not kvm.works(None)
    assert not kvm.works('/nowhere/qemu-system-x86_64')


def test_boot_sector_is_bootable() -> None:
    '''One sector with the signature that firmware looks for.'''
    assert len(kvm.probe.boot_sector()) == 512
    assert kvm.probe.boot_sector().endswith(b'\x55\xaa')


ACCESS = ['python3', '-c', 'import os, sys; '
          'sys.exit(os.access("/dev/kvm", os.R_OK | os.W_OK))']


def test_masked_node_is_refused(tmp_path: Path) -> None:
    '''Even root is refused write access, and nobody else is disturbed.'''
    node = Path(kvm.NODE)
    if not os.access(node, os.R_OK | os.W_OK):
        pytest.skip(f'no access to {node}')
    if subprocess.run(['unshare', '--mount', 'true'], check=False,
                      stderr=subprocess.DEVNULL).returncode:
        pytest.skip('this host allows no mount namespaces')
    assert subprocess.run(ACCESS, check=False).returncode == 1
    assert subprocess.run(kvm.masked(ACCESS, tmp_path),
                          check=False).returncode == 0
    assert subprocess.run(ACCESS, check=False).returncode == 1


@pytest.mark.parametrize('emulator', ['/nowhere/qemu-system-x86_64',
                                      '/nowhere/qemu-system-vax'])
def test_command_without_kvm(tmp_path: Path, emulator: str) -> None:
    '''The command gets its status through, and what is hidden is said.'''
    def run(*command: str) -> 'subprocess.CompletedProcess[str]':
        return subprocess.run(
            [sys.executable, '-m', 'series.kvm', emulator, str(tmp_path),
             *command], cwd=apply.ROOT, check=False, stderr=subprocess.PIPE,
            encoding='utf-8')

    assert run('sh', '-c', 'exit 7').returncode == 7
    done = run(*ACCESS)
    if not os.access(kvm.NODE, os.R_OK | os.W_OK):
        assert (done.returncode, done.stderr) == (0, '')
    elif 'can\'t be hidden' not in done.stderr:
        assert done.returncode == 0
        assert done.stderr.startswith(f'{emulator} runs no code with KVM: '
                                      '/dev/kvm is hidden from python3 ')


def test_command_where_nothing_can_be_hidden(tmp_path: Path) -> None:
    '''It runs all the same, after a line that says so.'''
    if not os.access(kvm.NODE, os.R_OK | os.W_OK):
        pytest.skip(f'no access to {kvm.NODE}')
    (tmp_path / 'unshare').write_text('#!/bin/sh\nexit 1\n', 'utf-8')
    (tmp_path / 'unshare').chmod(0o755)
    path = f'{tmp_path}:{os.environ["PATH"]}'
    done = subprocess.run(
        [sys.executable, '-m', 'series.kvm', '/nowhere/qemu', str(tmp_path),
         'sh', '-c', 'exit 7'], cwd=apply.ROOT, check=False,
        env={**os.environ, 'PATH': path}, stderr=subprocess.PIPE,
        encoding='utf-8')
    assert done.returncode == 7 and 'can\'t be hidden' in done.stderr


# Setting the host up

STUB = '''#!/bin/sh
echo "${0##*/} $*" >> "$LOG"
case "$*" in
"-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
esac
'''


class Host:
    '''
    A host whose Python, apt-get and id are stubs that write down what is
    asked of them, with a copy of setup.sh.
    '''
    def __init__(self, folder: Path, lacks: str, uid: int) -> None:
        self.log = folder / 'log'
        self.series = folder / 'series'
        self.venv = folder / 'build/venv'
        self.bin = folder / 'bin'
        self.bin.mkdir()
        self.series.mkdir()
        for name in ('setup.sh', 'requirements.txt'):
            shutil.copy(apply.ROOT / 'series' / name, self.series)
        for name in ('sh', 'cat', 'cksum', 'cp', 'dirname', 'mkdir', 'rm',
                     'sed', 'sort', 'tr'):
            (self.bin / name).symlink_to(shutil.which(name) or name)
        for name in ('python3', 'apt-get', 'dpkg-deb', 'git', 'make', 'perl',
                     'tar', 'unshare', 'xz', 'qemu-img',
                     'qemu-system-x86_64', 'qemu-system-aarch64'):
            if name != lacks:
                self.stub(name, STUB)
        self.stub('id', f'#!/bin/sh\necho {uid}\n')

    def stub(self, name: str, text: str) -> None:
        '''Make the program @name.'''
        (self.bin / name).write_text(text, encoding='utf-8')
        (self.bin / name).chmod(0o755)

    def setup(self) -> 'subprocess.CompletedProcess[str]':
        '''Run setup.sh; self.log is what it did this time.'''
        self.log.write_text('', encoding='utf-8')
        return subprocess.run(
            [str(self.series / 'setup.sh')], check=False,
            env={'PATH': str(self.bin), 'LOG': str(self.log)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            encoding='utf-8')

    def made_venv(self) -> bool:
        '''Whether that run made the virtual environment.'''
        return '-m venv' in self.log.read_text(encoding='utf-8')


def test_setup_of_a_user_says_what_root_has_to_run(tmp_path: Path) -> None:
    '''One line, a failure, and nothing done.'''
    host = Host(tmp_path, lacks='xz', uid=1000)
    result = host.setup()
    assert result.returncode == 4
    assert result.stdout.splitlines()[-1].split()[:2] == ['apt-get',
                                                          'install']
    assert 'xz-utils' in result.stdout
    assert not host.venv.exists()
    assert 'apt-get' not in host.log.read_text(encoding='utf-8')


def test_setup_of_root_installs(tmp_path: Path) -> None:
    '''An update first, then what is missing.'''
    host = Host(tmp_path, lacks='qemu-img', uid=0)
    result = host.setup()
    assert result.returncode == 0, result.stdout
    asked = [line for line in host.log.read_text('utf-8').splitlines()
             if line.startswith('apt-get')]
    assert asked[0].startswith('apt-get update')
    assert asked[1].startswith('apt-get install') and 'qemu-utils' in asked[1]
    assert host.made_venv()


def test_setup_does_nothing_twice(tmp_path: Path) -> None:
    '''It makes the environment anew if, and only if, that is not whole.'''
    host = Host(tmp_path, lacks='', uid=1000)
    assert host.setup().returncode == 0 and host.made_venv()
    assert host.setup().returncode == 0 and not host.made_venv()
    with (host.series / 'requirements.txt').open('a') as requirements:
        requirements.write('one-more==1.0\n')
    assert host.setup().returncode == 0 and host.made_venv()
    (host.venv / 'bin/python').unlink()
    assert host.setup().returncode == 0 and host.made_venv()
    (host.venv / 'made-for').unlink()
    assert host.setup().returncode == 0 and host.made_venv()
    assert host.setup().returncode == 0 and not host.made_venv()


def test_options_of_the_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    '''Are its own, and none of the harness's.'''
    seen: List[List[str]] = []

    def run(words: List[str]) -> int:
        seen.append(list(words))
        return 0

    monkeypatch.setattr(functional, 'matrix', run)
    for words in (['--allow-newer', 'debian-12', '--tests', '*'], []):
        monkeypatch.setattr(sys, 'argv', ['series', 'matrix', *words])
        assert main() == 0
        assert seen.pop() == words
