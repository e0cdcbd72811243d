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
from typing import Callable, Dict, Iterable, Iterator, List, Optional

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
    '''What a file in the copy must be; @mode and @data as git has them.'''
    data: bytes
    mode: str


PLAIN, PROGRAM, LINK = '100644', '100755', '120000'


def read_file(path: Path) -> Content:
    '''What @path is.'''
    if path.is_symlink():
        return Content(os.fsencode(os.readlink(path)), LINK)
    return Content(path.read_bytes(),
                   PROGRAM if os.access(path, os.X_OK) else PLAIN)


def _is_file(path: Path) -> bool:
    return path.is_symlink() or path.is_file()


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
                   if name and _is_file(root / name)})


def _pristine(tree: Path) -> Dict[str, Content]:
    '''The parts of @tree that the copy has.'''
    files: Dict[str, Content] = {}
    for part in PARTS:
        top = tree / part
        for path in [top] if top.is_file() else _files(top):
            if path.is_file():
                # What QEMU's own links point to may be no part of the copy
                files[str(path.relative_to(tree))] = read_file(path.resolve())
    return files


def changes(tree: Path, patches: Iterable[Patch],
            root: Optional[Path] = ROOT) -> Dict[str, Content]:
    '''
    The files that the series adds to @tree or changes in it; if @root is
    None, nothing is added.

    Raises SeriesError (AnchorError) if an edit does not fit, or if @tree
    has a file that we would add.
    '''
    changed: Dict[str, Content] = {}
    for name in our_files(root) if root else ():
        if _is_file(tree / name):
            raise SeriesError(f'{name}: QEMU has a file of that name: {tree}',
                              next_step='rename ours')
        changed[name] = read_file(Path(root or ROOT, name))

    def read(name: str) -> Optional[Content]:
        if name in changed or not (tree / name).is_file():
            return changed.get(name)
        return read_file(tree / name)

    for patch in patches:
        changed.update(edited(tree, patch, read))
    return changed


def edited(tree: Path, patch: Patch,
           read: Callable[[str], Optional[Content]]) -> Dict[str, Content]:
    '''
    The files that @patch edits in @tree, where @read finds them as the
    patches before have left them.  Raises SeriesError (AnchorError).
    '''
    changed: Dict[str, Content] = {}
    kind = layout(tree)
    level = version(version_of(tree))
    for edit in patch.edits:
        if edit.layout not in (None, kind) or level < edit.since:
            continue
        old = changed.get(edit.file) or read(edit.file)
        if old is None:
            raise SeriesError(f'{edit.file}: no such file in {tree}, '
                              f'for pattern \'{edit.pattern}\'')
        text = edit_text(old.data.decode('utf-8'), edit)
        changed[edit.file] = Content(text.encode('utf-8'), old.mode)
    return changed


def _write(path: Path, content: Content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f'.{path.name}.part')
    part.unlink(missing_ok=True)
    if content.mode == LINK:
        part.symlink_to(os.fsdecode(content.data))
    else:
        part.write_bytes(content.data)
        part.chmod(int(content.mode, 8) & 0o777)
    part.replace(path)


def _make_equal(copy: Path, wanted: Dict[str, Content]) -> None:
    '''Make @copy hold the files @wanted and no others.'''
    for path in list(_files(copy)):
        if str(path.relative_to(copy)) not in wanted:
            path.unlink()
    for name, content in wanted.items():
        path = copy / name
        if not _is_file(path) or read_file(path) != content:
            _write(path, content)


def apply(tree: Path, copy: Path, patches: Iterable[Patch],
          root: Path = ROOT) -> Dict[str, Content]:
    '''
    Make @copy what @tree is with the series applied, as far as tests need
    it, with our small meson project in place of QEMU's.  Returns the
    changes.  Raises SeriesError, and leaves @copy alone, if they don't fit.
    '''
    changed = changes(tree, patches, root)
    copy_tree(tree, copy, changed)
    return changed


def copy_tree(tree: Path, copy: Path, changed: Dict[str, Content]) -> None:
    '''Make @copy what @tree is with @changed, and our meson project.'''
    wanted = _pristine(tree)
    wanted.update(changed)
    for path in _files(MESON):
        wanted[str(path.relative_to(MESON))] = read_file(path)
    _make_equal(copy, wanted)


def diff(tree: Path, changed: Dict[str, Content]) -> str:
    '''The files @changed as a patch to @tree, in git's form.'''
    lines: List[str] = []
    for name, new in sorted(changed.items()):
        lines.append(f'diff --git a/{name} b/{name}\n')
        old: List[str] = []
        if (tree / name).is_file():
            old = (tree / name).read_text('utf-8').splitlines(True)
        else:
            lines.append(f'new file mode {new.mode}\n')
        for line in difflib.unified_diff(
                old, new.data.decode('utf-8').splitlines(True),
                f'a/{name}' if old else '/dev/null', f'b/{name}'):
            lines.append(line)
            if not line.endswith('\n'):
                lines.append('\n\\ No newline at end of file\n')
    return ''.join(lines)
