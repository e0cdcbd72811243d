# SPDX-License-Identifier: GPL-2.0-or-later
'''The series as commits and mail, and the proof that it is in order.'''

from pathlib import Path
import subprocess
from typing import Dict, List, Optional, Sequence

import pytest

from series import apply, commits, edits, later, lines, tree, verify
from series.apply import Content
from series.commits import Git, assign, format_patches, make
from series.edits import AnchorError, Edit, Later, Letter, Part, Patch
from series.edits import edit_text
from series.error import SeriesError
from series.functional import BUILD


PERSON = {f'GIT_{role}_{what}': f'{role}@localhost'
          for role in ('AUTHOR', 'COMMITTER') for what in ('NAME', 'EMAIL')}
MAINTAINERS = '''\
Testing
S: Maintained

Windows
S: Maintained
'''
OURS = {'scripts/tool.py': '#!/usr/bin/env python3\n',
        'scripts/tool/one.py': 'ONE = 1\nTWO = 2\nEND = 3\n',
        'scripts/tool/two.py': 'TWO = 2\n',
        'docs/tool.rst': 'Tool\n====\n'}
MANIFEST = '''\
maintainers: {before: '^Windows$', section: "Tools\\nS: Odd Fixes\\n"}
parts:
- name: 1-one
  cover: {subject: Half, letter: "One\\nof it."}
  patches:
  - subject: 'scripts: one'
    message: "Because.\\n"
    files: [scripts/tool/one.py]
    maintainers: ['F: scripts/tool/']
  - subject: 'nothing'
    edits: [{file: VERSION, match: '^11', since: 99.0.0, after: later}]
- name: 2-all
  cover: {subject: Whole, letter: "All of\\nit."}
  patches:
  - subject: 'scripts: all'
    files: [scripts/tool.py, scripts/tool/two.py, docs/]
    maintainers: ['F: scripts/tool.py', 'F: docs/tool.rst']
    edits: [{file: VERSION, match: '^11', after: later}]
    later: [{file: scripts/tool/one.py, match: TWO, until: '# none yet'}]
- name: 3-none
  cover: {subject: None, letter: None}
  patches:
harness:
- subject: 'harness'
  edits: [{file: VERSION, match: '^11', after: private}]
'''
ONE = 'ONE = 1\n# none yet\nEND = 3\n'


def run(folder: Path, *args: str) -> str:
    '''What git prints in @folder, without the caller's settings.'''
    return Git(folder, **PERSON).run(*args)


def write(folder: Path, files: Dict[str, str]) -> None:
    '''Write @files, by their paths, to @folder.'''
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding='utf-8')


@pytest.fixture(name='ours')
def fixture_ours(tmp_path: Path) -> Path:
    '''A repository such as this one, with a manifest of it.'''
    root = tmp_path / 'ours'
    write(root, {**OURS, 'edits.yaml': MANIFEST, 'tests/mkosi/stays.py': ''})
    (root / 'scripts/tool.py').chmod(0o755)
    run(root, 'init', '--quiet')
    run(root, 'add', '.')
    run(root, 'commit', '--quiet', '--message=all')
    return root


@pytest.fixture(name='qemu')
def fixture_qemu(tmp_path: Path) -> Path:
    '''As much of a QEMU tree as patches look at, without git.'''
    folder = tmp_path / 'qemu'
    write(folder, {'VERSION': '11.1.1\n', 'MAINTAINERS': MAINTAINERS,
                   'tests/functional/meson.build': '',
                   'tests/functional/x86_64/meson.build': '',
                   'hw/other.c': 'int other;\n'})
    return folder


def checkout(qemu: Path) -> Path:
    '''Make the tree @qemu a git checkout.'''
    run(qemu, 'init', '--quiet', '--initial-branch=master')
    run(qemu, 'add', '.')
    run(qemu, 'commit', '--quiet', '--message=QEMU')
    return qemu


def made(qemu: Path, ours: Path) -> commits.Made:
    '''The series of @ours as commits on @qemu.'''
    return make(qemu, ours.parent / 'scratch',
                edits.parts(ours / 'edits.yaml'), root=ours)


# The manifest

def patches(*files: Sequence[str]) -> List[Patch]:
    '''Patches that add @files, and nothing else.'''
    return [Patch(f'patch {number}', (), files=tuple(names))
            for number, names in enumerate(files, 1)]


def test_files_go_to_the_patch_that_names_them() -> None:
    '''By their path, or by a folder that they are in.'''
    assert assign(patches(['a', 'd/'], ['b']), ['a', 'b', 'd/c', 'd/e/f']) \
        == {'patch 1': ['a', 'd/c', 'd/e/f'], 'patch 2': ['b']}


@pytest.mark.parametrize('files, problem', [
    ([['a']], 'd/b: no patch names it'),
    ([['a', 'd/'], ['d/b']], "d/b: named by 'patch 1' and 'patch 2'"),
    ([['a', 'd/', 'a']], "a: named by 'patch 1' and 'patch 1'"),
    ([['a', 'd/', 'c']], "c: named by 'patch 1', but not there"),
    ([['a', 'd/', 'f/']], "f/: named by 'patch 1', but not there"),
    ([['a', 'd']], "d: named by 'patch 1', but not there"),
])
def test_file_that_is_not_one_patchs(files: List[List[str]],
                                     problem: str) -> None:
    '''The error names the file and the patches.'''
    with pytest.raises(SeriesError) as error:
        assign(patches(*files), ['a', 'd/b'])
    assert problem in str(error.value)
    assert 'next: ' in str(error.value)


def test_every_file_of_ours_has_its_patch() -> None:
    '''A file that is new here has to be named before it is committed.'''
    public = [patch for patch in edits.load() if not patch.private]
    files = assign(public, apply.our_files())
    assert sum(map(len, files.values())) == len(apply.our_files())


def test_public_patches_have_messages() -> None:
    '''Subject in QEMU's form, a body that fits a mail, nobody's sign-off.'''
    for part in edits.parts():
        assert part.letter.subject and part.letter.text
        texts = [part.letter.text]
        for patch in part.patches:
            assert ': ' in patch.subject and len(patch.subject) <= 72
            assert patch.message.strip(), patch.subject
            texts.append(patch.message)
        for text in texts:
            assert all(len(line) <= 75 for line in text.splitlines())
            assert 'igned-off-by' not in text


PART = '[{name: 1-a, cover: {subject: s, letter: l}, patches: '


@pytest.mark.parametrize('text, problem', [
    (f'parts: {PART}[{{subject: s}}, {{subject: s}}]}}]',
     'two patches have the subject'),
    (f'parts: {PART}[{{subject: s}}]}}]\n'
     'harness: [{subject: s, edits: []}]', 'two patches have the subject'),
    (f'parts: {PART}[{{subject: s, fiels: [a]}}]}}]', 'fiels'),
    (f'parts: {PART}[{{files: [a]}}]}}]', 'a patch has subject'),
    (f"parts: {PART}[{{subject: s, maintainers: ['F: a']}}]}}]",
     'maintainers'),
    (f'parts: {PART}[{{subject: s, later: [{{file: a}}]}}]}}]',
     's: lines for later have file, match'),
    (f'parts: {PART}[{{subject: s, later: [{{file: a, match: b, c: d}}]}}]}}]',
     's: lines for later have file, match'),
    ('patches: []', 'expected the keys .* parts'),
    ('parts: []\nharness: [{subject: s, edits: [], files: [a]}]',
     'a patch of the harness has'),
    ('parts: [{name: 1-a, patches: []}]', 'a part has name, cover'),
    ('parts: ' + PART.replace('cover: {', 'cover: {text: t, ') + '[]}]',
     'a part has name, cover'),
    ('parts: ' + PART.replace('1-a', '2-a') + '[]}]', "such as '1-fixes'"),
    ('parts: ' + PART.replace('1-a', '1-../a') + '[]}]', "such as '1-fixes'"),
])
def test_malformed_manifest(tmp_path: Path, text: str, problem: str) -> None:
    '''A typo is an error, not a patch that lacks something.'''
    path = tmp_path / 'edits.yaml'
    path.write_text(text, encoding='utf-8')
    with pytest.raises(SeriesError, match=problem):
        edits.load(path)


@pytest.mark.parametrize('text, expected', [
    ('run ./series/built.sh.', './series/built.sh'),
    ('in ``tests/mkosi/test_a.py``', 'tests/mkosi/test_a.py'),
    ('in tests/mkosi, and', 'tests/mkosi'),
    ('build/venv/bin/python x', 'build/venv/bin/python'),
    ('python -m series check', '-m series'),
    ('"series/"', 'series/'), ('(.ci/run)', '.ci/run'),
    ('this series', None), ('a series.', None), ('patch series of', None),
    ('tests/functional/mkosi/registry.yaml', None),
    ('more/series/a', None), ('tests/mkosis', None),
])
def test_path_that_qemu_does_not_have(text: str,
                                      expected: Optional[str]) -> None:
    '''It is told with its line; a word is no path.'''
    found = verify.strays('a.rst', f'\n{text}\n')
    assert found == ([] if expected is None else [
        f'a.rst:2: names \'{expected}\', which QEMU\'s tree will not have'])


def test_qemu_gets_no_paths_of_ours() -> None:
    '''Neither in files and edits nor in what is said of them.'''
    assert not verify.all_strays(edits.parts())


def test_where_paths_are_looked_for(ours: Path) -> None:
    '''In files, letters, messages and edits.'''
    name = 'series/x'
    write(ours, {'docs/tool.rst': name})
    part = Part('1-a', Letter('', name), (
        Patch('one', (Edit('f', '', 'after', name),), message=name),))
    assert [line.split(':1: ')[0] for line
            in verify.all_strays([part], ours)] == [
        'docs/tool.rst', '1-a: letter', 'one: message', 'one: edit of f']


PATTERN = '(?s)^    ASSET_KERNEL = Asset\\(.*?277cd\\w+\'\\)$'


@pytest.mark.parametrize('moved', [
    '    ASSET_KERNELS = Asset(\n', 'x' * 300 + '  ASSET_KERNEL = Asset(\n'])
def test_moved_anchor_of_several_lines(moved: str) -> None:
    '''What is near is told by the plainest piece of the pattern.'''
    with pytest.raises(AnchorError) as error:
        edit_text('import os\n\n' + moved,
                  Edit('some/file', PATTERN, 'replace', ''))
    assert f'    3: {moved.rstrip()}' in str(error.value)
    assert '1: import' not in str(error.value)


# Lines for later patches

FILE = '''\
import one
import two
import (three,
        four)

TABLE = [
    one,
    two,
    two,
]
'''


def waits(*entries: Later) -> List[Patch]:
    '''A patch that adds the file, and one for each of @entries.'''
    return [Patch('first', (), files=('scripts/a.py',)),
            *(Patch(f'later {number}', (), later=(entry,))
              for number, entry in enumerate(entries, 1))]


def scheduled(folder: Path, series: List[Patch]) -> List[str]:
    '''The file as each of @series leaves it, if it changes it.'''
    write(folder, {'scripts/a.py': FILE})
    (folder / 'scripts/a.py').chmod(0o755)
    files = assign(series, ['scripts/a.py'])
    done = later.schedule(folder, series, files)
    assert all(content.mode == apply.PROGRAM for changed in done
               for content in changed.values())
    return [changed['scripts/a.py'].data.decode() if changed else ''
            for changed in done]


def test_lines_wait_for_their_patch(tmp_path: Path) -> None:
    '''Each patch has its own and those of patches before it.'''
    first, one, two = scheduled(tmp_path, waits(
        Later('scripts/a.py', r'import \(three'
                              r'(.*\n)*?.*\)$', until='import three'),
        Later('scripts/a.py', r'two', count=3)))
    assert two == FILE
    assert one == FILE.replace('import two\n', '').replace('    two,\n', '')
    assert first == one.replace('import (three,\n        four)',
                                'import three')


@pytest.mark.parametrize('pattern, gone', [
    ('two$', 'import two\n'),
    ('port two', 'import two\n'),
    ('^import two\n', 'import two\n'),
    # An empty line is one, but the end of the line before is none
    ('\nTABLE', '\nTABLE = [\n'),
    ('\n\nTABLE', '\nTABLE = [\n'),
    ('^]', ']\n'),
    ('^]\n', ']\n'),
    (r'(?s)^TABLE.*', FILE[FILE.index('TABLE'):]),
])
def test_whole_lines_wait(tmp_path: Path, pattern: str, gone: str) -> None:
    '''Those that a match touches, wherever they stand.'''
    first, last = scheduled(tmp_path, waits(
        Later('scripts/a.py', pattern)))
    assert (first, last) == (FILE.replace(gone, ''), FILE)


@pytest.mark.parametrize('entries, problem', [
    ([Later('scripts/a.py', 'import three')],
     "'import three': expected 1 match, found 0\n  nearest lines"),
    ([Later('scripts/a.py', 'two')], 'expected 1 match, found 3'),
    ([Later('scripts/a.py', r'\Z')], 'matches no line'),
    ([Later('scripts/a.py', r'^$\n')], 'matches no line'),
    ([Later('scripts/a.py', 'import two'), Later('scripts/a.py', 'rt two')],
     "scripts/a.py:2: added by two entries of later: of 'later 1' and "
     "'later 2'"),
    ([Later('scripts/a.py', '^import one\nimport two'),
      Later('scripts/a.py', 'two\nimport')], 'scripts/a.py:2: added by two'),
    ([Later('scripts/b.py', 'two')], 'found none'),
])
def test_lines_that_cant_wait(tmp_path: Path, entries: List[Later],
                              problem: str) -> None:
    '''The error names the file, and what is there.'''
    with pytest.raises(SeriesError) as error:
        scheduled(tmp_path, waits(*entries))
    assert problem in str(error.value)
    assert 'next: ' in str(error.value)


def test_lines_of_a_file_that_is_later_itself(tmp_path: Path) -> None:
    '''A patch has nothing to add to what comes with it or after it.'''
    series = waits(Later('scripts/a.py', 'import two'))
    with pytest.raises(SeriesError, match="found 'first'"):
        scheduled(tmp_path, series[::-1])


# Commits

def test_commits_on_a_checkout(ours: Path, qemu: Path) -> None:
    '''On a branch of their own; whoever works there sees nothing of it.'''
    checkout(qemu)
    base = run(qemu, 'rev-parse', 'HEAD')
    series = made(qemu, ours)
    assert (series.git, series.base, series.upstream) == (qemu, base, True)
    assert run(qemu, 'status', '--porcelain') == ''
    assert run(qemu, 'rev-parse', 'HEAD') == base
    assert run(qemu, 'log', '--reverse', '--format=%s',
               f'{base}..{commits.BRANCH}').splitlines() \
        == ['scripts: one', 'scripts: all']
    assert run(qemu, 'log', '-1', '--format=%B', series.commits[0].name) \
        == 'scripts: one\n\nBecause.'
    assert run(qemu, 'show', '--name-only', '--format=',
               series.commits[0].name).splitlines() \
        == ['MAINTAINERS', 'scripts/tool/one.py']


def test_what_commits_hold(ours: Path, qemu: Path) -> None:
    '''Files with their modes, edits without the private ones.'''
    checkout(qemu)
    last = made(qemu, ours).commits[-1].name
    for name, text in OURS.items():
        assert run(qemu, 'show', f'{last}:{name}') == text.strip()
    assert run(qemu, 'ls-tree', last, 'scripts/tool.py').startswith('100755')
    assert run(qemu, 'show', f'{last}:VERSION') == '11.1.1\nlater'
    assert run(qemu, 'show', f'{last}:MAINTAINERS') == MAINTAINERS.replace(
        'Windows', 'Tools\nS: Odd Fixes\nF: scripts/tool/\n'
        'F: scripts/tool.py\nF: docs/tool.rst\n\nWindows').strip()
    assert 'tests/mkosi' not in run(qemu, 'ls-tree', '-r', last)


def test_parts_are_on_one_another(ours: Path, qemu: Path) -> None:
    '''A line that waits for a patch comes with it; no part is empty.'''
    checkout(qemu)
    series = made(qemu, ours)
    assert [(part.part.name, len(part.commits)) for part in series.parts] \
        == [('1-one', 1), ('2-all', 1)]
    first, last = series.commits
    assert series.parts[1].base == first.name
    assert run(qemu, 'show', f'{first.name}:scripts/tool/one.py') \
        == ONE.strip()
    assert first.changed['scripts/tool/one.py'].data.decode() == ONE
    assert last.count.code == 2


def test_files_are_whole_at_the_end(ours: Path, qemu: Path) -> None:
    '''Whatever patches do, the last has what is in the repository.'''
    whole = Content(OURS['docs/tool.rst'].encode(), apply.PLAIN)
    series = patches(['docs/tool.rst', 'scripts/'])
    names = [name for name in OURS if name != 'docs/tool.rst']
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(later, 'schedule', lambda *args: [{
            **{name: apply.read_file(ours / name) for name in names},
            'docs/tool.rst': Content(whole.data[1:], whole.mode)}])
        with pytest.raises(SeriesError, match='docs/tool.rst: after the last'):
            list(commits.steps(qemu, series, ours))
    assert list(commits.steps(qemu, series, ours))[0][2]['docs/tool.rst'] \
        == whole


def test_same_files_give_the_same_commits(ours: Path, qemu: Path) -> None:
    '''Whenever and wherever they are made.'''
    checkout(qemu)
    assert made(qemu, ours).commits[-1].name \
        == made(qemu, ours).commits[-1].name


def test_plain_tree_gets_a_repository_elsewhere(ours: Path,
                                                qemu: Path) -> None:
    '''With what we use of it; the tree itself is not touched.'''
    before = sorted(qemu.rglob('*'))
    series = made(qemu, ours)
    assert series.git == ours.parent / 'scratch' and not series.upstream
    names = run(series.git, 'ls-tree', '-r', '--name-only', series.base)
    assert 'VERSION' in names and 'hw/other.c' not in names
    assert sorted(qemu.rglob('*')) == before
    # Again, over what the first time has left
    assert made(qemu, ours) == series


def test_checkout_in_a_checkout_is_plain(ours: Path, qemu: Path) -> None:
    '''A tree in a folder of another repository is no checkout of QEMU.'''
    run(qemu.parent, 'init', '--quiet')
    run(qemu.parent, 'commit', '--quiet', '--allow-empty', '--message=x')
    assert not made(qemu, ours).upstream


def test_changed_file_is_not_taken(ours: Path, qemu: Path) -> None:
    '''Commits are on HEAD, so what is edited has to be what is there.'''
    checkout(qemu)
    write(qemu, {'hw/other.c': 'int changed;\n'})
    made(qemu, ours)
    write(qemu, {'VERSION': '11.1.50\n'})
    with pytest.raises(SeriesError, match='differ from HEAD'):
        made(qemu, ours)


def test_branch_in_use_is_not_moved(ours: Path, qemu: Path) -> None:
    '''Else that checkout would seem to have undone the series.'''
    checkout(qemu)
    last = made(qemu, ours).commits[-1].name
    run(qemu, 'checkout', '--quiet', commits.BRANCH)
    with pytest.raises(SeriesError, match='is checked out'):
        made(qemu, ours)
    assert run(qemu, 'rev-parse', commits.BRANCH) == last


@pytest.mark.parametrize('files, problem', [
    ({'qemu/docs/tool.rst': ''}, 'QEMU has a file of that name'),
    ({'qemu/VERSION': '111.0\n', 'ours/docs/new.rst': ''}, None),
    ({'qemu/MAINTAINERS': 'Window\n'}, 'nearest lines:\n    1: Window'),
    ({'ours/scripts/new.py': ''}, 'scripts/new.py: no patch names it'),
])
def test_what_does_not_fit_moves_nothing(
        ours: Path, qemu: Path, files: Dict[str, str],
        problem: str) -> None:
    '''Whatever is wrong is found before anything is made.'''
    write(ours.parent, files)
    checkout(qemu)
    if problem is None:
        assert made(qemu, ours)
        return
    with pytest.raises(SeriesError) as error:
        made(qemu, ours)
    assert problem in str(error.value)
    assert run(qemu, 'branch', '--list', commits.BRANCH) == ''


def test_git_that_knows_nobody(ours: Path, qemu: Path, tmp_path: Path,
                               monkeypatch: pytest.MonkeyPatch) -> None:
    '''A container has no identity: nobody's is made up.'''
    for name in list(PERSON):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.setenv('XDG_CONFIG_HOME', str(tmp_path))
    monkeypatch.setenv('GIT_CONFIG_NOSYSTEM', '1')
    monkeypatch.setenv('GIT_CONFIG_GLOBAL', '/dev/null')
    series = made(qemu, ours)
    assert run(series.git, 'log', '-1', '--format=%an <%ae>',
               commits.BRANCH) == 'Nobody <nobody@localhost>'


# Mail

def checked(qemu: Path, ours: Path) -> verify.Check:
    '''The series of @ours as mail.'''
    series = made(qemu, ours)
    folder = ours.parent / 'checks'
    folder.mkdir()
    return verify.Check(qemu, folder, series,
                        verify.mails(series, folder / 'mails'))


def test_mail(ours: Path, qemu: Path) -> None:
    '''A letter a part, and a mail a patch; nothing of an earlier run.'''
    folder = ours.parent / 'mails'
    write(folder, {'0009-old.patch': '', '1-one/0009-old.patch': '',
                   '2-old/0001-old.patch': '', 'git/HEAD': ''})
    mails = format_patches(made(qemu, ours), folder)
    assert [[str(mail.relative_to(folder)) for mail in part]
            for part in mails] == [
        ['1-one/0000-cover-letter.patch', '1-one/0001-scripts-one.patch'],
        ['2-all/0000-cover-letter.patch', '2-all/0001-scripts-all.patch']]
    assert sorted(folder.rglob('*.patch')) == sorted(mails[0] + mails[1])
    assert (folder / 'git/HEAD').is_file()
    text = mails[1][0].read_text(encoding='utf-8')
    assert 'Subject: [PATCH 0/1] Whole\n\nAll of\nit.\n\n' in text
    assert '***' not in text and 'Signed-off-by' not in text
    assert 'base-commit' not in text


def test_mail_names_what_it_is_on(ours: Path, qemu: Path) -> None:
    '''A commit that others have, and the patches of parts before.'''
    checkout(qemu)
    first, second = (part[0].read_text(encoding='utf-8') for part
                     in format_patches(made(qemu, ours), ours.parent / 'm'))
    base = f'base-commit: {run(qemu, "rev-parse", "HEAD")}'
    assert base in first and base in second
    assert 'prerequisite-patch-id' not in first
    assert second.count('prerequisite-patch-id') == 1


def test_round_trip(ours: Path, qemu: Path) -> None:
    '''Mail applies to what the commits are, and reverts to what was.'''
    assert not verify.round_trip(checked(qemu, ours))


def test_round_trip_of_other_mail(ours: Path, qemu: Path) -> None:
    '''Mail that was changed, or is lost, does not pass.'''
    check = checked(qemu, ours)
    mail = check.mails[1]
    text = mail.read_text(encoding='utf-8')
    mail.write_text(text.replace('+====', '+----'), encoding='utf-8')
    assert 'another tree' in verify.round_trip(check)[0]
    mail.write_text(text.replace('-# none', '-# more'), encoding='utf-8')
    with pytest.raises(SeriesError, match='git am'):
        verify.round_trip(check)


# Counting

CODE = """\
'''Module
docstring'''

import os   # code
# comment
TEXT = '''
# no comment
'''


def function():
    '''Docstring'''
    return os
"""


@pytest.mark.parametrize('name, text, code', [
    ('scripts/a.py', CODE, 6),
    ('scripts/a.py', '', 0),
    ('scripts/a.py', '# no\n\nif\n', 3),
    ('scripts/meson.build', "# comment\n\nproject('x')\n", 1),
    ('.gitlab-ci.d/a.yml', '# comment\njob:\n', 1),
    ('docs/a.rst', 'Text\n', 0),
    ('MAINTAINERS', 'F: a\n', 0),
    ('tests/functional/mkosi/debian-min/x86_64.lock', 'sha256\n', 0),
    ('tests/functional/mkosi/x/mkosi.finalize', 'true\n', 0),
])
def test_lines_of_code(name: str, text: str, code: int) -> None:
    '''As the manifest says.'''
    content = Content(text.encode(), apply.PLAIN)
    assert lines.count({}, {name: content}) \
        == lines.Count(code, len(text.splitlines()))


def test_only_what_is_new_counts() -> None:
    '''Of an edited file the lines that were not there.'''
    old = Content(b'import os\nONE = 1\nTWO = 2\n', apply.PLAIN)
    new = Content(b'import os\n# why\nONE = 3\nTWO = 2\n', apply.PLAIN)
    assert lines.count({'a.py': old}, {'a.py': new}) == lines.Count(1, 2)


def test_a_link_is_no_line() -> None:
    '''Its content is where it points to.'''
    link = Content(b'../a.py', apply.LINK)
    assert lines.count({}, {'a.py': link}) == lines.Count(0, 0)


def commit(code: int) -> commits.Commit:
    '''A commit of @code lines.'''
    return commits.Commit(Patch('subject', ()), '', {},
                          lines.Count(code, code))


@pytest.mark.parametrize('sizes, problems', [
    ([399] * 15, 0), ([400], 1), ([400, 401, 1], 2), ([1] * 16, 1)])
def test_bounds(sizes: List[int], problems: int) -> None:
    '''At most 15, each under 400.'''
    part = Part('1-a', Letter('', ''), ())
    assert len(verify.bounds(commits.Series(
        part, '', tuple(map(commit, sizes))))) == problems


# Proof

@pytest.mark.parametrize('text, expected', [
    (verify.UNSIGNED, []),
    (f'{verify.UNSIGNED}\ntotal: 1 errors, 0 warnings, 9 lines checked', []),
    ('a.py:3: ERROR: no tabs', ['ERROR: no tabs']),
    ('a.py:3: WARNING: long\nERROR: The correct form is "Signed-off-by"',
     ['WARNING: long', 'ERROR: The correct form is "Signed-off-by"']),
])
def test_findings_of_checkpatch(text: str, expected: List[str]) -> None:
    '''All but the one that is expected.'''
    assert verify.findings(text) == expected


def test_warnings_of_sphinx() -> None:
    '''Where a warning stands in its file is not what it is.'''
    before = verify.warnings(
        '/one/docs/a.rst:3: WARNING: broken\nbuilding\n', Path('/one'))
    assert before == verify.warnings(
        '/two/docs/a.rst:30: WARNING: broken\n', Path('/two'))
    assert len(verify.warnings('/two/b.rst:3: ERROR: broken', Path('/two'))
               - before) == 1


@pytest.fixture(name='real', scope='session')
def fixture_real() -> Path:
    '''A real QEMU tree, as the harness has it.'''
    return tree.obtain(BUILD / 'downloads', print)


def broken(name: str, text: str) -> Part:
    '''A patch that puts @text at the end of the file @name of ours.'''
    return Part('9-broken', Letter('', ''), (
        Patch('broken', (Edit(name, r'\Z', 'replace', text),)),))


@pytest.mark.slow
@pytest.mark.parametrize('name, text, problem', [
    ('scripts/mkosi_build/error.py', 'ONE = 1  \n', 'ERROR: trailing white'),
    ('scripts/mkosi_build/error.py', '\nif\n', 'compileall'),
    ('scripts/mkosi_build/error.py', '\nfrom . import nothing\n', 'import'),
    ('tests/functional/x86_64/meson.build', '\nfoo(\n', 'meson setup'),
    ('tests/functional/x86_64/meson.build',
     "\ntests_x86_64_system_quick += ['nothing']\n", 'meson setup'),
])
def test_patch_that_does_not_pass(real: Path, tmp_path: Path, name: str,
                                  text: str, problem: str) -> None:
    '''What is wrong with it is told, with its subject.'''
    series = make(real, tmp_path / 'git',
                  [*edits.parts(), broken(name, text)], scratch_always=True)
    # The others are the next test's
    last = commits.Made(series.git, False, series.base, series.parts[-1:])
    check = verify.Check(real, tmp_path, last,
                         verify.mails(last, tmp_path / 'mails'))
    found = verify.each_alone(check, lint=False)
    assert any(line.startswith('broken: ') and problem in line
               for line in found), found


@pytest.mark.slow
def test_the_series(real: Path, monkeypatch: pytest.MonkeyPatch,
                    tmp_path: Path) -> None:
    '''It applies, reverts, and each patch of it passes.'''
    monkeypatch.setattr(verify, 'BUILD', tmp_path)
    assert not verify.verify(real, thorough=False)


def test_commands(qemu: Path) -> None:
    '''make series is what the README says it is.'''
    done = subprocess.run(
        ['make', '--dry-run', 'series', f'QEMU_SRC={qemu}'],
        cwd=apply.ROOT, stdout=subprocess.PIPE, encoding='utf-8', check=True)
    assert '-m series patches' in done.stdout
