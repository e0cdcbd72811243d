# SPDX-License-Identifier: GPL-2.0-or-later
'''
Proves that the series is what a reviewer expects, on a QEMU tree: it
applies as mail and reverts, each patch passes by itself, and QEMU's own
tests and documentation are none the worse for it.
'''

from dataclasses import dataclass
import os
from pathlib import Path
import re
import shutil
import subprocess
import sys
from typing import Dict, List, Optional, Sequence, Set, Tuple

from . import edits, functional, tree
from .apply import MESON, ROOT, changes, copy_tree, our_files
from .commits import (Commit, Git, Made, Series, format_patches, make,
                      table)
from .error import SeriesError
from .functional import BUILD, Bench, say
from .tap import judge
from .tree import PARTS, version_of


PATCHES, CODE = 15, 400
# All that checkpatch may find: nobody has signed anything off
UNSIGNED = 'ERROR: Missing Signed-off-by: line(s)'
_FINDING = re.compile(r'(?:[^ ]+:\d+: )?((?:ERROR|WARNING|CHECK): .*)')
SUITE = 'func-quick'


@dataclass(frozen=True)
class Check:
    '''One series on one tree; @folder is for what checks make.'''
    source: Path
    folder: Path
    made: Made
    # Without cover letters: one a commit
    mails: Tuple[Path, ...]

    @property
    def git(self) -> Git:
        '''The repository that has the commits.'''
        return Git(self.made.git)


def mails(made: Made, folder: Path) -> Tuple[Path, ...]:
    '''Write @made as mail to @folder: the mail of each commit.'''
    return tuple(path for part in format_patches(made, folder)
                 for path in part[1:])


def _output(command: Sequence[str], cwd: Path,
            env: Optional[Dict[str, str]] = None) -> Tuple[int, str]:
    done = subprocess.run(
        command, cwd=cwd, env={**os.environ, **(env or {})}, check=False,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, encoding='utf-8', errors='replace')
    return done.returncode, done.stdout.strip()


def bounds(series: Series) -> List[str]:
    '''What is larger than what one asks of a reviewer.'''
    problems = []
    if len(series.commits) > PATCHES:
        problems.append(f'{series.part.name}: {len(series.commits)} patches, '
                        f'expected at most {PATCHES}')
    for commit in series.commits:
        if commit.count.code >= CODE:
            problems.append(f'{commit.patch.subject}: {commit.count.code} '
                            f'lines of code, expected less than {CODE}')
    return problems


# Paths of this repository that QEMU's tree will not have
_STRAY = re.compile(r'(?<![\w./-])(?:\./)?'
                    r'(?:series/|tests/mkosi\b|\.ci/|build/venv\b)[\w./-]*'
                    r'(?<![.-])|-m series\b')


def strays(where: str, text: str) -> List[str]:
    '''What the @text, which QEMU gets, names of what QEMU does not.'''
    return [f'{where}:{number}: names \'{match[0]}\', which QEMU\'s tree '
            'will not have' for number, line
            in enumerate(text.splitlines(), 1)
            for match in _STRAY.finditer(line)]


def all_strays(parts: Sequence[edits.Part], root: Path = ROOT) -> List[str]:
    '''Those of our files, of what is edited, and of what is said of it.'''
    texts = [(name, (root / name).read_text(encoding='utf-8'))
             for name in our_files(root) if not (root / name).is_symlink()]
    for part in parts:
        texts.append((f'{part.name}: letter', part.letter.text))
        for patch in part.patches:
            texts.append((f'{patch.subject}: message', patch.message))
            texts += [(f'{patch.subject}: edit of {edit.file}', edit.text)
                      for edit in patch.edits]
    return [problem for where, text in texts
            for problem in strays(where, text)]


def round_trip(check: Check) -> List[str]:
    '''The mails make the same tree, and reverting them the old one.'''
    clone = check.folder / 'clone'
    shutil.rmtree(clone, ignore_errors=True)
    check.git.run('clone', '--quiet', '--shared', '--no-checkout', '.',
                  str(clone))
    git = Git(clone, GIT_AUTHOR_NAME='a', GIT_AUTHOR_EMAIL='a@localhost',
              GIT_COMMITTER_NAME='a', GIT_COMMITTER_EMAIL='a@localhost')
    base, last = check.made.base, check.made.commits[-1].name
    git.run('checkout', '--quiet', '--detach', base)
    git.run('am', '--quiet', *map(str, check.mails))
    problems = []
    if git.run('diff', '--stat', last, 'HEAD'):
        problems.append('the mails make another tree than the commits')
    git.run('revert', '--no-edit', f'{base}..HEAD')
    left = git.run('diff', '--stat', base, 'HEAD')
    if left:
        problems.append(f'reverting leaves:\n{left}')
    shutil.rmtree(clone)
    return problems


def findings(text: str) -> List[str]:
    '''What checkpatch complains of in its output @text, UNSIGNED apart.'''
    found = (_FINDING.match(line) for line in text.splitlines())
    return [match[1] for match in found if match and match[1] != UNSIGNED]


def _checkpatch(check: Check, mail: Path) -> List[str]:
    script = check.source / 'scripts/checkpatch.pl'
    status, text = _output(['perl', str(script), '--no-tree', '--terse',
                            str(mail)], check.folder)
    found = findings(text)
    # It fails because of the missing sign-off: then that is all it said
    if not found and (status == 0 or UNSIGNED not in text):
        found = [f'checkpatch said nothing of a sign-off: {text}']
    return [f'{mail.name}: {line}' for line in found]


def _export(check: Check, commit: str, folder: Path) -> None:
    '''The harness\'s part of the tree at @commit, with our meson project.'''
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    there = check.git.run('ls-tree', '-r', '--name-only', commit, '--',
                          *PARTS)
    parts = [part for part in PARTS
             if re.search(f'^{re.escape(part)}(/|$)', there, re.MULTILINE)]
    packed = folder.with_suffix('.tar')
    check.git.run('archive', f'--output={packed}', commit, '--', *parts)
    subprocess.run(['tar', '--extract', f'--file={packed}',
                    f'--directory={folder}'], check=True)
    packed.unlink()
    shutil.copytree(MESON, folder, dirs_exist_ok=True)


def _modules(folder: Path) -> List[str]:
    return [f'mkosi_build.{path.stem}'
            for path in sorted((folder / 'scripts/mkosi_build').glob('*.py'))
            if path.stem != '__init__']


def _environment(folder: Path) -> Dict[str, str]:
    libraries = ('scripts', 'python', 'tests/functional')
    return {'PYTHONPATH': os.pathsep.join(str(folder / name)
                                          for name in libraries),
            'MYPYPATH': str(folder / 'scripts')}


def _python(commit: Commit, folder: Path) -> List[str]:
    '''Whether Python takes what @commit changes, and the whole builder.'''
    names = [name for name in commit.changed if name.endswith('.py')]
    commands = [['-m', 'compileall', '-q', *names] for _ in names[:1]]
    modules = _modules(folder)
    if modules:
        commands.append(['-c', f'import {", ".join(modules)}'])
    return _failures(commands, folder)


def _failures(commands: Sequence[List[str]], folder: Path) -> List[str]:
    problems = []
    for command in commands:
        status, text = _output([sys.executable, *command], folder,
                               _environment(folder))
        if status:
            problems.append(f'{" ".join(command[:2])}: {text}')
    return problems


def _complaints(folder: Path, names: Sequence[str]) -> Set[str]:
    '''
    What pylint, with the rules of QEMU\'s tests, says of those of the files
    @names that are there: without line numbers, which move.
    '''
    rules = folder / 'tests/functional/pylintrc'
    names = [name for name in names if name.startswith('tests/functional/')
             and name.endswith('.py') and (folder / name).is_file()]
    if not names or not rules.is_file():
        return set()
    _, text = _output(
        [sys.executable, '-m', 'pylint', '--score=n', f'--rcfile={rules}',
         '--msg-template={path}: {symbol}: {msg}', *names],
        folder, _environment(folder))
    return {line for line in text.splitlines() if line.strip()
            and not line.startswith('*** ')}


def _lint(commit: Commit, folder: Path, known: Set[str]) -> List[str]:
    '''What linters say of @commit, but what pylint said before.'''
    ours = [name for name in commit.changed if name.endswith('.py')
            and (ROOT / name).is_file()]
    config = ROOT / 'setup.cfg'
    commands = [['-m', 'flake8', f'--config={config}', *ours]
                for _ in ours[:1]]
    if any(name.startswith('scripts/') for name in ours):
        commands.append(['-m', 'mypy', f'--config-file={config}', '--strict',
                         f'--cache-dir={BUILD / "mypy-patches"}',
                         'scripts/mkosi_build'])
    new = _complaints(folder, list(commit.changed)) - known
    return [*_failures(commands, folder),
            *(f'pylint: {line}' for line in sorted(new))]


def _configures(check: Check, folder: Path) -> List[str]:
    build = check.folder / 'configured'
    shutil.rmtree(build, ignore_errors=True)
    emulators = ','.join(functional.find_emulators().values())
    status, text = _output(
        [sys.executable, '-m', 'mesonbuild.mesonmain', 'setup',
         f'-Demulators={emulators}', str(build), str(folder)],
        check.folder, functional.environment())
    return [f'meson setup: {text}'] if status else []


def each_alone(check: Check, lint: bool) -> List[str]:
    '''Every patch by itself, on those before it.'''
    problems = []
    folder = check.folder / 'commit'
    known: Set[str] = set()
    if lint:
        _export(check, check.made.base, folder)
        known = _complaints(folder, sorted({
            name for commit in check.made.commits for name in commit.changed}))
    for commit, mail in zip(check.made.commits, check.mails):
        _export(check, commit.name, folder)
        found = [*_checkpatch(check, mail),
                 *_python(commit, folder),
                 *(_lint(commit, folder, known) if lint else ()),
                 *_configures(check, folder)]
        say(f'    {"ok" if not found else "NOT OK"}: {commit.patch.subject}')
        problems += [f'{commit.patch.subject}: {text}' for text in found]
    return problems


# What takes long

def _quick_tests(check: Check, name: str,
                 patches: Sequence[edits.Patch]) -> Dict[str, str]:
    '''QEMU\'s quick tests in a copy with @patches: what came of each.'''
    folder = check.folder / name
    bench = Bench(folder=folder, ours=[],
                  emulators=functional.find_emulators(),
                  qemu_img=shutil.which('qemu-img'))
    wanted = changes(check.source, patches,
                     ROOT if any(not patch.private for patch in patches)
                     else None)
    copy_tree(check.source, bench.tree, wanted)
    results = functional.run_suite(bench, SUITE)
    return {record['name'].split(' / ')[-1]:
            judge(record.get('stdout') or '', record['result'],
                  record['returncode']).summary() for record in results}


def quick_tests(check: Check) -> List[str]:
    '''Unmodified tests give the same results before and after.'''
    patches = edits.load()
    ours = {edit.file for patch in patches if not patch.private
            for edit in patch.edits}
    # The harness's own edits of QEMU's files, but those of edited tests
    before = _quick_tests(check, 'before', [
        patch for patch in patches if patch.private
        and not any(edit.file in ours for edit in patch.edits)])
    after = _quick_tests(check, 'after', patches)
    same = sum(after.get(name) == found for name, found in before.items())
    say(f'    {SUITE}: {same} of {len(before)} as before')
    return [f'{name}: before {found}, after {after.get(name)}'
            for name, found in before.items() if after.get(name) != found]


def warnings(text: str, folder: Path) -> Set[str]:
    '''Sphinx\'s warnings in @text, without line numbers, which move.'''
    return {re.sub(r':\d+:', ':', line.replace(str(folder), ''))
            for line in text.splitlines()
            if re.search(r'\b(WARNING|ERROR|CRITICAL):', line)}


def _sphinx(source: Path) -> Path:
    '''The Python of an environment with the Sphinx that QEMU asks for.'''
    pins = (source / 'docs/requirements.txt').read_text(encoding='utf-8')
    venv = BUILD / 'sphinx'
    stamp = venv / 'made-for'
    if not stamp.is_file() or stamp.read_text('utf-8') != pins:
        shutil.rmtree(venv, ignore_errors=True)
        subprocess.run([sys.executable, '-m', 'venv', str(venv)], check=True)
        subprocess.run(
            [str(venv / 'bin/python'), '-m', 'pip', 'install', '--quiet',
             '--disable-pip-version-check', '--requirement',
             str(source / 'docs/requirements.txt')], check=True)
        stamp.write_text(pins, 'utf-8')
    return venv / 'bin/python'


def _document(check: Check, folder: Path, python: Path) -> Set[str]:
    log = check.folder / 'sphinx.log'
    status, text = _output(
        [str(python), '-m', 'sphinx', '-q', '-b', 'dummy', '-E',
         '-j', str(os.cpu_count() or 1),
         '-Dversion=' + version_of(check.source),
         '-Drelease=' + version_of(check.source),
         '-Dkerneldoc_srctree=' + str(folder),
         '-Ddepfile=' + str(check.folder / 'docs.d'),
         '-Ddepfile_stamp=' + str(check.folder / 'docs.stamp'),
         '-w', str(log), '-d', str(check.folder / 'doctrees'),
         str(folder / 'docs'), str(check.folder / 'html')], folder)
    if status:
        raise SeriesError(f'sphinx failed: {text[-2000:]}')
    return warnings(log.read_text(encoding='utf-8'), folder)


def documentation(check: Check) -> List[str]:
    '''QEMU\'s manuals build without warnings that were not there before.'''
    if not (check.source / 'docs/conf.py').is_file():
        say(f'    documentation: not built: {check.source} is but a part of '
            'QEMU\'s tree')
        return []
    python = _sphinx(check.source)
    copy = check.folder / 'docs'
    shutil.rmtree(copy, ignore_errors=True)
    # All that pages include by way of kernel-doc, qapi and hx files
    shutil.copytree(check.source, copy, symlinks=True,
                    ignore=shutil.ignore_patterns(
                        '.git', 'build', 'roms', 'subprojects', 'tests'))
    (copy / 'tests').mkdir()
    before = _document(check, copy, python)
    for commit in check.made.commits:
        for name, content in commit.changed.items():
            if name.startswith('docs/'):
                (copy / name).parent.mkdir(parents=True, exist_ok=True)
                (copy / name).write_bytes(content.data)
    after = _document(check, copy, python)
    say(f'    documentation: {len(before)} warnings before, {len(after)} '
        'after')
    shutil.rmtree(copy)
    return [f'documentation: {line}' for line in sorted(after - before)]


def verify(source: Path, thorough: bool) -> List[str]:
    '''
    Check the series on the QEMU tree @source; with @thorough also by the
    linters, QEMU\'s quick tests and its documentation.  Returns what is
    wrong.  Raises SeriesError if it does not apply.
    '''
    folder = BUILD / f'verify-{version_of(source)}'
    folder.mkdir(parents=True, exist_ok=True)
    # A repository of our own: a check moves no branch of anybody's
    made = make(source, folder / 'git', scratch_always=True)
    check = Check(source, folder, made, mails(made, folder / 'mails'))
    say(f'QEMU {version_of(source)}: {len(made.commits)} patches\n'
        + table(made))
    problems = [*(problem for series in made.parts
                  for problem in bounds(series)),
                *all_strays([series.part for series in made.parts]),
                *round_trip(check), *each_alone(check, lint=thorough)]
    if thorough:
        problems += quick_tests(check)
        problems += documentation(check)
    return problems


def main(sources: Sequence[str], thorough: bool) -> int:
    '''Verify on each of @sources, or on the harness\'s own tree.'''
    trees = [Path(name).resolve() for name in sources] or [
        tree.obtain(BUILD / 'downloads', say)]
    bad = 0
    for source in trees:
        tree.layout(source)
        problems = verify(source, thorough)
        for problem in problems:
            say(f'wrong: {problem}')
        bad += len(problems)
    say(f'verify: {len(trees)} trees, {bad} problems')
    return int(bad > 0)
