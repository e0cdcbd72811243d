# SPDX-License-Identifier: GPL-2.0-or-later
'''
Locks: which packages a build may use, and what a build is.

A lock is plain text. Its header says what it was made for; then comes a
sorted line a package: SHA-256, size in bytes, name, version, architecture,
source package, and location relative to the distribution's repository. It
lists what was fetched, not what stayed installed, since both decide bytes.
'''

import hashlib
import os
import re
import stat
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Dict, List, Sequence, Tuple

from .error import InputError

# Every file in QEMU has one; in two parts, since this is not this file's
SPDX = '# SPDX-License-Identifier' + ': GPL-2.0-or-later'
FORMAT = 'mkosi-build lock 2'
HEADER = ('definition', 'distribution', 'release', 'architecture', 'epoch')

# Changed when the builder itself comes to make other bytes of the same
# definition and locks.
BUILDER = 'mkosi-build 1'

_HASH = re.compile(r'[0-9a-f]{64}')
_INCLUDE = re.compile(r'\.\./[A-Za-z0-9][A-Za-z0-9._-]*')
# The caret is for Fedora: what comes after it was added after a release
_LOCATION = re.compile(r'[A-Za-z0-9][A-Za-z0-9._+~^:%/-]*')
_WORDS = {what: re.compile(rf'[A-Za-z0-9][A-Za-z0-9._+{more}-]*')
          for what, more in (('name', ''), ('version', '~^:'),
                             ('architecture', ''), ('source', '~^:='))}


class LockError(InputError):
    '''A lock that can't be used; the message begins with file and line.'''

    def __init__(self, message: str, *,
                 next_step: str = 'restore the lock from version control, or '
                 'make it anew with --update-lock') -> None:
        super().__init__(message, next_step=next_step)


@dataclass(frozen=True, order=True)
class Package:
    '''
    A package as the lock knows it; @size in bytes. Debian's @source is
    name=version, Fedora's the name of the source package's file; @version
    and @architecture are in the distribution's own words.
    '''
    name: str
    version: str
    location: str
    sha256: str
    size: int
    architecture: str
    source: str

    @property
    def file_name(self) -> str:
        '''The name of the package's file.'''
        return self.location.rpartition('/')[2]


@dataclass(frozen=True)
class Lock:
    '''
    A parsed lock. @definition is the digest of the definition it was made
    for; @epoch, in seconds since 1970, is the time of the repository's
    release, and the newest time that a built file may have.
    '''
    definition: str
    distribution: str
    release: str
    architecture: str
    epoch: int
    packages: Tuple[Package, ...]

    @property
    def digest(self) -> str:
        '''The digest of all that decides bytes: not of @definition.'''
        text = render(replace(self, definition='-'))
        return hashlib.sha256(text.encode()).hexdigest()


def render(lock: Lock) -> str:
    '''The text of @lock.'''
    lines = [SPDX, f'# {FORMAT}']
    lines += [f'# {key}: {getattr(lock, key)}' for key in HEADER]
    lines += [f'{p.sha256} {p.size} {p.name} {p.version} {p.architecture} '
              f'{p.source} {p.location}' for p in sorted(lock.packages)]
    return '\n'.join(lines) + '\n'


def _parse_package(place: str, line: str) -> Package:
    fields = line.split(' ')
    if len(fields) != 7:
        raise LockError(f'{place}: expected "sha256 size name version '
                        f'architecture source location", found {line!r}')
    sha256, size, name, version, architecture, source, location = fields
    if not _HASH.fullmatch(sha256):
        raise LockError(f'{place}: expected a SHA-256 of 64 hex digits, '
                        f'found {sha256!r}')
    if not re.fullmatch(r'[1-9][0-9]{0,11}', size):
        raise LockError(f'{place}: expected a size in bytes, found {size!r}')
    for (what, pattern), word in zip(_WORDS.items(), fields[2:6]):
        if not pattern.fullmatch(word):
            raise LockError(f'{place}: not a package {what}: {word!r}')
    parts = location.split('/')
    if (not _LOCATION.fullmatch(location)
            or any(part in ('', '.', '..') for part in parts)):
        raise LockError(f'{place}: not a location below a repository: '
                        f'{location!r}')
    return Package(name, version, location, sha256, int(size), architecture,
                   source)


def _parse_packages(place: str, lines: Sequence[str]) -> List[Package]:
    packages: List[Package] = []
    seen: Dict[str, int] = {}
    for number, line in enumerate(lines, len(HEADER) + 3):
        package = _parse_package(f'{place}:{number}', line)
        # Two downloads into one file would spoil each other
        for key, what in (
                (package.file_name, package.file_name),
                (package.sha256, f'the SHA-256 of {package.name}')):
            if key in seen:
                raise LockError(f'{place}:{number}: {what} is already in '
                                f'line {seen[key]}')
            seen[key] = number
        if packages and package < packages[-1]:
            raise LockError(f'{place}:{number}: {package.name} is out of '
                            f'order after {packages[-1].name}',
                            next_step='sort the lines by name and version')
        packages.append(package)
    return packages


def parse(text: str, place: str) -> Lock:
    '''
    The lock in @text. Raises LockError, beginning with @place and the
    line, where a header is missing or unknown, a line is malformed, out
    of order or there twice.
    '''
    lines = text.splitlines()
    for number, expected in enumerate((SPDX, f'# {FORMAT}'), 1):
        found = lines[number - 1] if len(lines) >= number else 'nothing'
        if found != expected:
            raise LockError(f'{place}:{number}: expected {expected!r}, '
                            f'found {found!r}')
    header: Dict[str, str] = {}
    for number, key in enumerate(HEADER, 3):
        line = lines[number - 1] if len(lines) >= number else ''
        match = re.fullmatch(rf'# {key}: (\S+)', line)
        if not match:
            raise LockError(f'{place}:{number}: expected "# {key}: ...", '
                            f'found {line!r}')
        header[key] = match.group(1)
    if not _HASH.fullmatch(header['definition']):
        raise LockError(f'{place}:3: expected a digest of 64 hex digits, '
                        f'found {header["definition"]!r}')
    if not re.fullmatch(r'[0-9]{9,11}', header['epoch']):
        raise LockError(f'{place}:7: expected seconds since 1970, found '
                        f'{header["epoch"]!r}')
    packages = _parse_packages(place, lines[len(HEADER) + 2:])
    if not packages:
        raise LockError(f'{place}: no packages')
    return Lock(header['definition'], header['distribution'],
                header['release'], header['architecture'],
                int(header['epoch']), tuple(packages))


def load(path: Path) -> Lock:
    '''The lock in the file @path. Raises LockError.'''
    # Every image has one of this name
    place = f'{path.parent.name}/{path.name}'
    try:
        text = path.read_text(encoding='utf-8')
    except FileNotFoundError as e:
        raise LockError(f'{path}: no such lock', next_step='make it: '
                        f'scripts/mkosi-build.py {path.stem} '
                        f'{path.parent.name} --update-lock') from e
    except (OSError, UnicodeDecodeError) as e:
        raise LockError(f'{place}: {e}') from e
    return parse(text, place)


def diff(old: Sequence[Package], new: Sequence[Package]) -> List[str]:
    '''What changed from @old to @new, a line a package, for a reviewer.'''
    lines = []
    for name in sorted({p.name for p in (*old, *new)}):
        was = sorted(p for p in old if p.name == name)
        now = sorted(p for p in new if p.name == name)
        if was == now:
            continue
        versions = [' '.join(p.version for p in side) for side in (was, now)]
        if not was:
            lines.append(f'+ {name} {versions[1]}')
        elif not now:
            lines.append(f'- {name} {versions[0]}')
        elif versions[0] != versions[1]:
            lines.append(f'~ {name} {versions[0]} -> {versions[1]}')
        else:
            lines.append(f'! {name} {versions[1]}: same version, other file')
    return lines


def _includes(folder: Path) -> List[str]:
    '''What the settings in @folder include, as they name it.'''
    names: List[str] = []
    for path in sorted((folder / 'mkosi.conf',
                        *folder.glob('mkosi.conf.d/**/*.conf'))):
        if path.is_dir():
            continue
        try:
            text = path.read_text(encoding='utf-8')
        except UnicodeDecodeError as e:
            raise InputError(f'{path}: expected UTF-8, found {e.reason} at '
                             f'{e.start}',
                             next_step='save it as UTF-8') from e
        # A setting goes on in the lines below it that are indented
        for value in re.findall(r'^Include *=(.*(?:\n[ \t].*)*)', text,
                                re.M):
            for name in re.split(r'[\s,]+', value.strip()):
                if not _INCLUDE.fullmatch(name):
                    raise InputError(
                        f'{path}: Include={name}: expected ../NAME, a folder '
                        'beside this one', next_step='move what it has into '
                        'such a folder')
                names.append(name[len('../'):])
    return names


def included(folder: Path) -> List[Path]:
    '''
    The folders beside @folder that the definition there includes, and that
    these include, in order. Raises InputError for any other include, and
    where there is no such folder with a mkosi.conf.
    '''
    found: List[Path] = []
    todo = [folder]
    while todo:
        where = todo.pop(0)
        if not (where / 'mkosi.conf').is_file():
            raise InputError(f'{where}: no definition there (no mkosi.conf)',
                             next_step='check the name after "definition:" '
                             'in the registry' if where == folder else
                             'check the line Include=../'
                             f'{where.name} in {folder}/mkosi.conf')
        for name in _includes(where):
            if folder.parent / name not in (folder, *found):
                found.append(folder.parent / name)
                todo.append(folder.parent / name)
    return found


def _files(folder: Path) -> List[Path]:
    '''The files and links below @folder that a build sees.'''
    files = []
    for parent, folders, names in os.walk(folder):
        # Python leaves this behind wherever it runs
        folders[:] = sorted(d for d in folders if d != '__pycache__')
        links = [d for d in folders if Path(parent, d).is_symlink()]
        for name in sorted(names + links):
            path = Path(parent, name)
            mode = path.lstat().st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISLNK(mode)):
                raise InputError(f'{path}: neither a file, a link nor a '
                                 'folder')
            # Of a killed writer's x86_64.lock.123.tmp too
            if '.lock' not in path.suffixes:
                files.append(path.relative_to(folder))
    return sorted(files)


def definition_files(folder: Path) -> List[Path]:
    '''
    The files and links of the definition in @folder that a build sees,
    relative to it: all but the locks, sorted, and then those of the folders
    that it includes, which begin with "..". Raises InputError for anything
    that is neither file, link nor folder, and what included() does.
    '''
    others = included(folder)
    return _files(folder) + [Path('..', other.name, name)
                             for other in others for name in _files(other)]


def definition_digest(folder: Path) -> str:
    '''
    The digest of the definition in @folder and of what it includes: of each
    file's path, content and x bit, and each link's path and target; not of
    times, owners and other modes, which differ between checkouts.
    '''
    digest = hashlib.sha256()
    for name in definition_files(folder):
        path = folder / name
        if path.is_symlink():
            kind, content = 'link', os.readlink(path).encode()
        else:
            executable = path.stat().st_mode & stat.S_IXUSR
            kind, content = ('program' if executable else 'file',
                             path.read_bytes())
        digest.update(f'{kind} {name.as_posix()} {len(content)}\n'.encode())
        digest.update(content)
    return digest.hexdigest()


def identity(definition: str, lock: Lock, tools: Sequence[Lock]) -> str:
    '''
    What a build is, as a digest over all that decides its bytes: the
    digest @definition, the packages of @lock and the @tools locks. All
    architectures' tools count, since any of them may be the host's.
    '''
    parts = [BUILDER, definition, lock.digest,
             *sorted(tool.digest for tool in tools)]
    return hashlib.sha256('\n'.join(parts).encode()).hexdigest()
