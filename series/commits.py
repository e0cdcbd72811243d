# SPDX-License-Identifier: GPL-2.0-or-later
'''
Makes commits on a QEMU tree of this repository, one a patch of edits.yaml,
and mail of them, a folder a part.

A git checkout gets a branch; neither its files nor its index are touched.
Of a plain source tree the part that we use becomes the first commit of a
repository in the build folder.  The same files on the same base give the
same commits, if the same person makes them.
'''

from dataclasses import dataclass
import os
from pathlib import Path
import shutil
import subprocess
import tempfile
from typing import (Dict, Iterable, Iterator, List, Mapping, Optional,
                    Sequence, Tuple)

from . import edits, later, lines
from .apply import ROOT, Content, edited, our_files, read_file
from .edits import Part, Patch
from .error import SeriesError
from .tree import PARTS, version_of


BRANCH = 'mkosi-images'
# Who commits where git does not know: nobody that could certify anything
NOBODY = ('Nobody', 'nobody@localhost')


@dataclass(frozen=True)
class Commit:
    '''A patch as a commit; @changed are its files, as it leaves them.'''
    patch: Patch
    name: str
    changed: Dict[str, Content]
    count: lines.Count


@dataclass(frozen=True)
class Series:
    '''A part as @commits, the first of which is on @base.'''
    part: Part
    base: str
    commits: Tuple[Commit, ...]


@dataclass(frozen=True)
class Made:
    '''
    All parts, in the git repository at @git, which is QEMU's if @upstream:
    then others know the @base of the first.
    '''
    git: Path
    upstream: bool
    base: str
    parts: Tuple[Series, ...]

    @property
    def commits(self) -> List[Commit]:
        '''Those of all parts.'''
        return [commit for part in self.parts for commit in part.commits]


def assign(patches: Sequence[Patch],
           names: Sequence[str]) -> Dict[str, List[str]]:
    '''
    Which of the files @names each patch adds, by its subject.

    Raises SeriesError that lists the files that no patch names or that
    more than one does, and entries of patches that name no file.
    '''
    owners: Dict[str, List[str]] = {name: [] for name in names}
    problems = []
    for patch in patches:
        for entry in patch.files:
            found = [name for name in names if name == entry
                     or entry.endswith('/') and name.startswith(entry)]
            for name in found:
                owners[name].append(patch.subject)
            if not found:
                problems.append(f'{entry}: named by \'{patch.subject}\', '
                                'but not there')
    for name, subjects in owners.items():
        if not subjects:
            problems.append(f'{name}: no patch names it')
        elif len(subjects) > 1:
            problems.append(f'{name}: named by '
                            + ' and '.join(f'\'{subject}\''
                                           for subject in subjects))
    if problems:
        raise SeriesError(
            'each file belongs to exactly one patch; found:\n    '
            + '\n    '.join(problems),
            next_step=f'mend the files: of the patches in {edits.EDITS.name}')
    return {patch.subject: [name for name, subjects in owners.items()
                            if subjects == [patch.subject]]
            for patch in patches}


# A patch, the files that it changes as they were, and as it leaves them
Step = Tuple[Patch, Dict[str, Content], Dict[str, Content]]


def steps(tree: Path, patches: Sequence[Patch],
          root: Path = ROOT) -> Iterator[Step]:
    '''
    What each patch makes of @tree and the patches before it.  Raises
    SeriesError.
    '''
    public = [patch for patch in patches if not patch.private]
    files = assign(public, our_files(root))
    now: Dict[str, Content] = {}

    def read(name: str) -> Optional[Content]:
        if name not in now and (tree / name).is_file():
            now[name] = read_file(tree / name)
        return now.get(name)

    for patch, ours in zip(public, later.schedule(root, public, files)):
        for name in files[patch.subject]:
            if read(name) is not None:
                raise SeriesError(
                    f'{name}: QEMU has a file of that name: {tree}',
                    next_step='rename ours')
        touched = [*ours, *(edit.file for edit in patch.edits)]
        old = {name: content for name in touched
               for content in (read(name),) if content is not None}
        now.update(ours)
        now.update(edited(tree, patch, read))
        new = {name: now[name] for name in touched
               if name in now and now[name] != old.get(name)}
        yield patch, old, new
    _all_there(root, public, files, now)


def _all_there(root: Path, patches: Sequence[Patch],
               files: Mapping[str, Sequence[str]],
               now: Mapping[str, Content]) -> None:
    '''Raises SeriesError if a file of ours is not what it is here.'''
    edited_too = {edit.file for patch in patches for edit in patch.edits}
    for names in files.values():
        for name in set(names) - edited_too:
            if now[name] != read_file(root / name):
                raise SeriesError(f'{name}: after the last patch it differs '
                                  'from the file in this repository')


class Git:
    '''git on one repository.'''

    def __init__(self, folder: Path, **env: str) -> None:
        self.folder = folder
        self.env = {**os.environ, **env}
        for name in ('GIT_DIR', 'GIT_WORK_TREE'):
            if name not in env:
                self.env.pop(name, None)

    def run(self, *args: str, data: Optional[bytes] = None) -> str:
        '''Run git; returns what it printed.  Raises SeriesError.'''
        try:
            return subprocess.run(
                # A checkout of another user's is as good
                ['git', '-c', 'safe.directory=*', *args], cwd=self.folder,
                env=self.env, input=data, check=True,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE
            ).stdout.decode('utf-8').strip()
        except FileNotFoundError as error:
            raise SeriesError(f'no git: {error}',
                              next_step='apt-get install git') from error
        except subprocess.CalledProcessError as error:
            raise SeriesError(
                f'git {" ".join(args[:2])} failed in {self.folder}: '
                f'{error.stderr.decode("utf-8", "replace").strip()}'
            ) from error

    def succeeds(self, *args: str) -> bool:
        '''Whether git ends well.'''
        try:
            self.run(*args)
            return True
        except SeriesError:
            return False


def _is_checkout(tree: Path) -> bool:
    try:
        top = Git(tree).run('rev-parse', '--show-toplevel')
    except SeriesError:
        return False
    return Path(top) == tree and Git(tree).succeeds('rev-parse', 'HEAD')


def _scratch(tree: Path, folder: Path) -> Path:
    '''A repository in @folder whose only commit is our part of @tree.'''
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    git = Git(folder, **_person(Git(folder), '1970-01-01T00:00:00Z'))
    git.run('init', '--quiet', '--initial-branch=qemu')
    parts = [part for part in PARTS if (tree / part).exists()]
    source = Git(tree, GIT_DIR=str(folder / '.git'), GIT_WORK_TREE=str(tree))
    source.run('-c', 'core.autocrlf=false', 'add', '--force', '--', *parts,
               *(f':!{part}/**/__pycache__' for part in parts))
    git.run('commit', '--quiet', '--no-verify',
            f'--message=QEMU {version_of(tree)}')
    return folder


def _person(git: Git, date: str) -> Dict[str, str]:
    '''The environment in which git commits at @date.'''
    env = {}
    for role in ('AUTHOR', 'COMMITTER'):
        if not git.succeeds('-c', 'user.useConfigOnly=true', 'var',
                            f'GIT_{role}_IDENT'):
            env[f'GIT_{role}_NAME'], env[f'GIT_{role}_EMAIL'] = NOBODY
        env[f'GIT_{role}_DATE'] = date
    return env


def _branch_free(git: Git) -> None:
    '''Raises SeriesError if somebody works on the branch that we move.'''
    trees = git.run('worktree', 'list', '--porcelain')
    if f'branch refs/heads/{BRANCH}\n' in f'{trees}\n':
        raise SeriesError(
            f'{git.folder}: the branch {BRANCH}, which is to be moved, is '
            'checked out', next_step='git switch to another branch')


def _commit(git: Git, index: Path, parent: str, patch: Patch,
            changed: Dict[str, Content]) -> str:
    '''Commit @changed on @parent; returns the commit's name.'''
    staged = Git(git.folder, **{**git.env, 'GIT_INDEX_FILE': str(index)})
    listed = ''.join(
        f'{content.mode} '
        + git.run('hash-object', '-w', '--stdin', data=content.data)
        + f'\t{name}\n' for name, content in sorted(changed.items()))
    staged.run('update-index', '--add', '--index-info',
               data=listed.encode('utf-8'))
    message = f'{patch.subject}\n\n{patch.message}'.strip() + '\n'
    return staged.run('commit-tree', staged.run('write-tree'), '-p', parent,
                      data=message.encode('utf-8'))


def _commit_all(git: Git, base: str,
                done: Iterable[Step]) -> Iterator[Commit]:
    with tempfile.TemporaryDirectory() as name:
        index = Path(name, 'index')
        Git(git.folder, GIT_INDEX_FILE=str(index)).run('read-tree', base)
        for patch, old, new in done:
            if new:
                base = _commit(git, index, base, patch, new)
                yield Commit(patch, base, new, lines.count(old, new))


def _in_parts(base: str, parts: Sequence[Part],
              commits: Sequence[Commit]) -> Iterator[Series]:
    '''The @commits of each of @parts, if it has any.'''
    for part in parts:
        mine = tuple(commit for commit in commits
                     if commit.patch in part.patches)
        if mine:
            yield Series(part, base, mine)
            base = mine[-1].name


def make(tree: Path, scratch: Path,
         parts: Optional[Sequence[Part]] = None, root: Path = ROOT,
         scratch_always: bool = False) -> Made:
    '''
    Commit the series on the QEMU @tree: on the branch BRANCH of a git
    checkout, whose HEAD it starts from, else in a repository made anew in
    the folder @scratch, or if @scratch_always is true.  A patch that
    changes nothing there is left out, and so is a part of no others.
    Raises SeriesError, with no branch moved, if anything does not fit.
    '''
    here = not scratch_always and _is_checkout(tree)
    if here:
        _branch_free(Git(tree))
    parts = edits.parts() if parts is None else parts
    done = list(steps(tree, [patch for part in parts
                             for patch in part.patches], root))
    folder = tree if here else _scratch(tree, scratch)
    git = Git(folder)
    ours = our_files(root)
    touched = sorted({name for _, old, _ in done for name in old
                      if name not in ours})
    if here and not git.succeeds('diff', '--quiet', 'HEAD', '--',
                                 *touched):
        raise SeriesError(f'{tree}: files that the series edits differ from '
                          'HEAD', next_step='git stash, or commit them')
    # Of this repository, which the commits are made of
    date = Git(root).run('log', '-1', '--format=%cI')
    base = git.run('rev-parse', 'HEAD')
    commits = list(_commit_all(Git(folder, **_person(git, date)), base, done))
    git.run('update-ref', f'refs/heads/{BRANCH}', commits[-1].name)
    return Made(folder, here, base, tuple(_in_parts(base, parts, commits)))


def _format(made: Made, series: Series, folder: Path) -> List[Path]:
    folder.mkdir()
    git = Git(made.git)
    last = series.commits[-1].name
    git = Git(made.git, **_person(git, git.run('log', '-1', '--format=%cI',
                                               last)))
    git.run('format-patch', '--quiet', '--cover-letter', '--no-signature',
            # Of a part that is on others, this names their patches as well
            *([f'--base={made.base}'] if made.upstream else []),
            f'--output-directory={folder}', f'{series.base}..{last}')
    paths = sorted(folder.glob('*.patch'))
    text = paths[0].read_text(encoding='utf-8')
    letter = series.part.letter
    for blank, words in (('*** SUBJECT HERE ***', letter.subject),
                         ('*** BLURB HERE ***', letter.text.strip())):
        text = text.replace(blank, words)
    paths[0].write_text(text, encoding='utf-8')
    return paths


def format_patches(made: Made, folder: Path) -> List[List[Path]]:
    '''
    Write the commits as mail to @folder, a folder a part, the cover letter
    first; what was there of an earlier run is gone.  Returns the paths of
    each part.
    '''
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob('*.patch'):
        path.unlink()
    for path in folder.glob('[1-9]-*'):
        shutil.rmtree(path)
    return [_format(made, series, folder / series.part.name)
            for series in made.parts]


def table(made: Made) -> str:
    '''The parts, a line a patch: code added, all lines added, subject.'''
    rows = []
    for series in made.parts:
        rows.append(f'{series.part.name}\n  #  code  lines  subject')
        for number, commit in enumerate(series.commits, 1):
            rows.append(f'{number:3} {commit.count.code:5} '
                        f'{commit.count.added:6}  {commit.patch.subject}')
    return '\n'.join(rows)
