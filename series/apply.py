# SPDX-License-Identifier: GPL-2.0-or-later
'''
Applies the series to a copy of a QEMU tree.

The copy is made equal, file by file, to what the tree, our files and the
edits give: what did not change is not touched, what is gone is removed.
The tree itself is only read.
'''

from dataclasses import dataclass
import difflib
import os
from pathlib import Path
import subprocess
from typing import Dict, Iterable, Iterator, List, Optional

from .edits import Patch, edit_text, version
from .error import SeriesError
from .tree import PARTS, layout, version_of


ROOT = Path(__file__).resolve().parent.parent
MESON = Path(__file__).with_name('meson')
# Where QEMU will have our files.  The rest of the repository (README,
# Makefile, series, tests/mkosi, .ci) serves those who work on the series.
OURS = ('scripts', 'tests/functional', 'docs', '.gitlab-ci.d')


@dataclass(frozen=True)
class Content:
    '''What a file in the copy must be.'''
    data: bytes
    executable: bool


def _read(path: Path) -> Content:
    return Content(path.read_bytes(), os.access(path, os.X_OK))


def _files(folder: Path) -> Iterator[Path]:
    for parent, names, files in os.walk(folder):
        names[:] = [name for name in names if name != '__pycache__']
        yield from (Path(parent, name) for name in files)


def our_files(root: Path = ROOT) -> List[str]:
    '''
    The files of this repository that belong into QEMU's tree: those that
    git tracks or would track.  Raises SeriesError if git can't tell.
    '''
    try:
        listed = subprocess.run(
            # A checkout of another user's is as good
            ['git', '-c', 'safe.directory=*', 'ls-files', '-z', '--cached',
             '--others', '--exclude-standard', '--', *OURS],
            cwd=root, check=True, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, encoding='utf-8').stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise SeriesError(
            f'git can\'t list the files of {root}: '
            f'{getattr(error, "stderr", error)}',
            next_step='run this in a git clone') from error
    return sorted({name for name in listed.split('\0')
                   if name and (root / name).is_file()})


def _pristine(tree: Path) -> Dict[str, Content]:
    '''The parts of @tree that the copy has.'''
    files: Dict[str, Content] = {}
    for part in PARTS:
        top = tree / part
        for path in [top] if top.is_file() else _files(top):
            if path.is_file():
                files[str(path.relative_to(tree))] = _read(path)
    return files


def changes(tree: Path, patches: Iterable[Patch],
            root: Path = ROOT) -> Dict[str, Content]:
    '''
    The files that the series adds to @tree or changes in it.

    Raises SeriesError (AnchorError) if an edit does not fit, or if @tree
    has a file that we would add.
    '''
    changed: Dict[str, Content] = {}
    for name in our_files(root):
        if (tree / name).exists():
            raise SeriesError(f'{name}: QEMU has a file of that name: {tree}',
                              next_step='rename ours')
        changed[name] = _read(root / name)
    kind = layout(tree)
    level = version(version_of(tree))
    for patch in patches:
        for edit in patch.edits:
            if edit.layout not in (None, kind) or level < edit.since:
                continue
            if edit.file not in changed and not (tree / edit.file).is_file():
                raise SeriesError(f'{edit.file}: no such file in {tree}, '
                                  f'for pattern \'{edit.pattern}\'')
            old = changed.get(edit.file) or _read(tree / edit.file)
            text = edit_text(old.data.decode('utf-8'), edit)
            changed[edit.file] = Content(text.encode('utf-8'),
                                         old.executable)
    return changed


def _write(path: Path, content: Content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f'.{path.name}.part')
    part.write_bytes(content.data)
    part.chmod(0o755 if content.executable else 0o644)
    part.replace(path)


def _make_equal(copy: Path, wanted: Dict[str, Content]) -> None:
    '''Make @copy hold the files @wanted and no others.'''
    for path in list(_files(copy)):
        if str(path.relative_to(copy)) not in wanted:
            path.unlink()
    for name, content in wanted.items():
        path = copy / name
        if not path.is_file() or _read(path) != content:
            _write(path, content)


def apply(tree: Path, copy: Path, patches: Iterable[Patch],
          root: Path = ROOT) -> Dict[str, Content]:
    '''
    Make @copy what @tree is with the series applied, as far as tests need
    it, with our small meson project in place of QEMU's.  Returns the
    changes.  Raises SeriesError, and leaves @copy alone, if they don't fit.
    '''
    changed = changes(tree, patches, root)
    wanted = _pristine(tree)
    wanted.update(changed)
    for path in _files(MESON):
        wanted[str(path.relative_to(MESON))] = _read(path)
    _make_equal(copy, wanted)
    return changed


def diff(tree: Path, changed: Dict[str, Content],
         names: Optional[Iterable[str]] = None) -> str:
    '''@changed (or those of @names) as a patch to @tree, in git's form.'''
    lines: List[str] = []
    for name in sorted(changed if names is None else names):
        new = changed[name]
        mode = '100755' if new.executable else '100644'
        lines.append(f'diff --git a/{name} b/{name}\n')
        old: List[str] = []
        if (tree / name).is_file():
            old = (tree / name).read_text('utf-8').splitlines(True)
        else:
            lines.append(f'new file mode {mode}\n')
        lines += difflib.unified_diff(
            old, new.data.decode('utf-8').splitlines(True),
            f'a/{name}' if old else '/dev/null', f'b/{name}')
    return ''.join(lines)
