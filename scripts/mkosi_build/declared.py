# SPDX-License-Identifier: GPL-2.0-or-later
'''
The licences that packages declare, as SPDX expressions: Debian's in their
copyright files, Fedora's in a tag of the package. A name that SPDX has is
translated; any other becomes a LicenseRef- with the text that the package
has for it. Nothing is judged: what a package says is what is told.

The forms are those of https://www.debian.org/doc/packaging-manuals/
copyright-format/1.0/ and of annex D of SPDX 2.3.
'''

import hashlib
import json
import os
import re
import subprocess
import tarfile
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, List, Mapping, Optional, Tuple

from . import sandbox
from .cache import write_atomically
from .error import MkosiError
from .lock import Lock, Package
from .store import Store

# Of SPDX's list of licences those that packages of images name in the same
# way, but for upper and lower case
IDS = {name.lower(): name for name in '''
    0BSD Apache-1.0 Apache-1.1 Apache-2.0 Artistic-2.0 BSD-1-Clause
    BSD-2-Clause BSD-2-Clause-Patent BSD-3-Clause BSD-4-Clause
    BSD-4-Clause-UC BSD-Source-Code BSL-1.0 Beerware CC-BY-3.0 CC-BY-4.0
    CC-BY-SA-3.0 CC-BY-SA-4.0 CC0-1.0 FSFAP FSFUL FSFULLR FSFULLRWD FTL
    HPND HPND-sell-variant ICU IJG ISC Info-ZIP Inner-Net-2.0 Latex2e
    Libpng MIT MIT-0 MIT-CMU MPL-1.1
    MPL-2.0 MS-PL NTP OFL-1.1 OLDAP-2.8 OpenSSL PSF-2.0 PostgreSQL
    Python-2.0 Python-2.0.1 SMLNJ Sleepycat SunPro TCL Unicode-3.0
    Unicode-DFS-2016 Unlicense Vim W3C WTFPL X11 Zlib bzip2-1.0.6 curl
    libtiff zlib-acknowledgement'''.split()}
# Names that mean one of them, and are others
ALIASES = {'apache-2': 'Apache-2.0', 'bsd-2': 'BSD-2-Clause',
           'bsd-3': 'BSD-3-Clause', 'expat': 'MIT'}
GNU = re.compile(r'(A?GPL|LGPL|GFDL)(-NIV)?-([123])(?:\.([0-3]))?'
                 r'(\+|-or-later|-only)?', re.I)
GNU_VERSIONS = {'GPL': ('1.0', '2.0', '3.0'), 'LGPL': ('2.0', '2.1', '3.0'),
                'AGPL': ('3.0',), 'GFDL': ('1.1', '1.2', '1.3')}
# By Debian's name of an exception and the licence's version, if that counts
EXCEPTIONS = {'autoconf 2.0': 'Autoconf-exception-2.0',
              'autoconf 3.0': 'Autoconf-exception-3.0',
              'bison': 'Bison-exception-2.2',
              'bison-exception-2.2': 'Bison-exception-2.2',
              'classpath': 'Classpath-exception-2.0',
              'classpath-exception-2.0': 'Classpath-exception-2.0',
              'gcc-exception-3.1': 'GCC-exception-3.1',
              'libtool': 'Libtool-exception',
              'libtool-exception': 'Libtool-exception',
              'linux-syscall-note': 'Linux-syscall-note',
              'llvm-exception': 'LLVM-exception'}

# What a licence is where the package does not say
NONE = 'NOASSERTION'

_DOC = re.compile(r'\./usr/share/doc/([^/]+)(/copyright)?')


@dataclass(frozen=True)
class Declared:
    '''
    A licence as an SPDX @expression, and for each LicenseRef- in it the
    name that the package has for it and the text.
    '''
    expression: str
    texts: Mapping[str, Tuple[str, str]]


class _Names:
    '''Translates names, and collects the @texts of those it does not know.'''

    def __init__(self, known: Mapping[str, str], otherwise: str) -> None:
        self.known = known
        self.otherwise = otherwise
        self.texts: Dict[str, Tuple[str, str]] = {}

    def own(self, name: str) -> str:
        '''A LicenseRef- for the text that goes by @name.'''
        text = self.known.get(name) or self.otherwise
        digest = hashlib.sha256(text.encode()).hexdigest()
        plain = re.sub('^LicenseRef-', '', name)
        plain = re.sub('[^A-Za-z0-9.]+', '-', plain)[:40].strip('-')
        reference = f'LicenseRef-{plain}-{digest[:8]}'
        self.texts[reference] = (name, text)
        return reference

    def licence(self, name: str) -> str:
        '''SPDX's name for the licence @name, else a LicenseRef-.'''
        words = re.fullmatch(r'(\S+)\s+with\s+(\S+)(\s+exception)?', name,
                             re.I)
        if words:
            return self._with(name, words[1], words[2])
        return _standard(name) or self.own(name)

    def _with(self, whole: str, name: str, exception: str) -> str:
        licence = _standard(name)
        version = re.search(r'-(\d\.\d)', licence or '')
        found = EXCEPTIONS.get(
            exception.lower(),
            EXCEPTIONS.get(f'{exception.lower()} {version[1]}')
            if version else None)
        if licence is None or found is None:
            return self.own(whole)
        return f'{licence} WITH {found}'


def _standard(name: str) -> Optional[str]:
    '''The name that SPDX has for the licence @name, if it has one.'''
    low = name.lower()
    if low in IDS or low in ALIASES:
        return IDS.get(low) or ALIASES[low]
    gnu = GNU.fullmatch(name)
    if gnu is None:
        return None
    family = gnu[1].upper()
    version = f'{gnu[3]}.{gnu[4] or 0}'
    if version not in GNU_VERSIONS[family] or gnu[2] and family != 'GFDL':
        return None
    later = 'or-later' if gnu[5] in ('+', '-or-later') else 'only'
    return (f'{family}-{version}-{"no-invariants-" if gnu[2] else ""}'
            f'{later}')


def _joined(operator: str, parts: List[str]) -> str:
    '''@parts with the @operator AND or OR between them, each part once.'''
    other = {'AND': ' OR ', 'OR': ' AND '}[operator]
    flat: List[str] = []
    for part in parts:
        flat += [part] if other in part else part.split(f' {operator} ')
    flat = list(dict.fromkeys(flat))
    if len(flat) == 1:
        return flat[0]
    return f' {operator} '.join(f'({part})' if other in part else part
                                for part in flat)


# -- Debian -----------------------------------------------------------------

def _debian(text: str, names: _Names) -> str:
    '''The SPDX expression for a value of "License:" of one line.'''
    parts = re.split(r',\s+(and|or)\s+', text, flags=re.I)
    operators = {operator.upper() for operator in parts[1::2]}
    if len(operators) > 1:
        return names.own(text)
    inner = [_joined('OR', [
        _joined('AND', [names.licence(name.strip())
                        for name in re.split(r'\s+and\s+', choice,
                                             flags=re.I)])
        for choice in re.split(r'\s+or\s+', part, flags=re.I)])
        for part in parts[::2]]
    return _joined(operators.pop() if operators else 'AND', inner)


def _paragraphs(text: str) -> List[Dict[str, str]]:
    '''The paragraphs of a file like debian/control, keys in lower case.'''
    found = []
    for block in re.split(r'\n(?:[ \t]*\n)+', text.strip()):
        fields: Dict[str, str] = {}
        key = ''
        for line in block.split('\n'):
            if line[:1] in (' ', '\t') and key:
                fields[key] += f'\n{line.strip()}'
            elif ':' in line and not line.startswith('#'):
                key, _, value = line.partition(':')
                key = key.strip().lower()
                fields[key] = value.strip()
        found.append(fields)
    return found


def of_copyright(source: str, text: str) -> Declared:
    '''What the copyright file @text of the Debian package @source says.'''
    paragraphs = _paragraphs(text.replace('\r\n', '\n'))
    # An early draft has another key
    if not {'format', 'format-specification'} & set(paragraphs[0]):
        names = _Names({}, text)
        return Declared(names.own(f'{source}-copyright'), names.texts)
    texts: Dict[str, str] = {}
    for fields in paragraphs:
        name, _, body = fields.get('license', '').partition('\n')
        if body:
            texts.setdefault(name, body)
    names = _Names(texts, '')
    found = []
    for fields in paragraphs:
        if 'files' in fields and 'license' in fields:
            name, _, body = fields['license'].partition('\n')
            # A text of a paragraph without a name is the licence's
            names.otherwise = body or (
                f'{source} names this licence without a text.')
            found.append(_debian(name, names) if name
                         else names.own(f'{source}-unnamed'))
    return Declared(_joined('AND', found) if found else NONE, names.texts)


def _extract(file: Path) -> Dict[str, List[str]]:
    '''
    By folder in /usr/share/doc of the Debian package @file, ["text",
    the copyright file's] or ["link", the folder that has it].
    '''
    found = {}
    with subprocess.Popen(['dpkg-deb', '--fsys-tarfile', str(file)],
                          stdout=subprocess.PIPE,
                          stderr=subprocess.DEVNULL) as process:
        with tarfile.open(fileobj=process.stdout, mode='r|') as archive:
            for member in archive:
                name = _DOC.fullmatch(member.name)
                if name is None:
                    continue
                content = (archive.extractfile(member)
                           if member.isfile() and name[2] else None)
                if content is not None:
                    found[name[1]] = ['text', content.read().decode(
                        'utf-8', 'replace')]
                elif member.issym():
                    # ../OTHER/copyright, or OTHER for the whole folder
                    target = member.linkname.replace('/copyright', '')
                    found[name[1]] = ['link', target.rpartition('/')[2]]
    return found


def _copyrights(package: Package, store: Store) -> Dict[str, List[str]]:
    '''_extract(), once for each package: of a kernel it takes its time.'''
    known = store.cache.root / 'declared' / f'{package.sha256}.json'
    try:
        found = json.loads(known.read_text(encoding='utf-8'))
        if isinstance(found, dict):
            return found
    except (OSError, ValueError):
        pass
    try:
        found = _extract(store.path(package))
    except tarfile.TarError as e:
        raise MkosiError(f'{package.file_name}: dpkg-deb can\'t unpack it: '
                         f'{e}', next_step='make the lock anew with '
                         '--update-lock') from e
    write_atomically(known, json.dumps(found) + '\n')
    return found


def _of_debs(lock: Lock, store: Store) -> Dict[str, Declared]:
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        each = list(pool.map(lambda p: _copyrights(p, store),
                             lock.packages))
    # Packages of one source may share a file
    everything = {name: entry for there in each
                  for name, entry in there.items()}
    found = {}
    for package in lock.packages:
        entry = everything.get(package.name)
        seen = {package.name}
        while entry is not None and entry[0] == 'link':
            name = entry[1]
            entry = None if name in seen else everything.get(name)
            seen.add(name)
        found[package.sha256] = (Declared(NONE, {}) if entry is None
                                 else of_copyright(
                                     package.source.partition('=')[0],
                                     entry[1]))
    return found


# -- Fedora -----------------------------------------------------------------

def of_tag(package: str, tag: str) -> Declared:
    '''What the tag License of the RPM @package declares.'''
    if not tag or tag == '(none)':
        return Declared(NONE, {})
    names = _Names({}, f'{package} names its licence: {tag}')
    rest = re.sub(r'\s+with\s+', '\0', tag, flags=re.I)
    words = re.findall(r'[()]|[^\s()]+', rest)
    expression = ''
    depth, operand = 0, True
    for word in words:
        if word == '(' and operand:
            depth += 1
            expression += '('
        elif word == ')' and depth and not operand:
            depth -= 1
            expression += ')'
        elif word.lower() in ('and', 'or') and not operand:
            expression += f' {word.upper()} '
            operand = True
        elif word not in '()' and operand:
            expression += names.licence(word.replace('\0', ' with '))
            operand = False
        else:
            depth = -1
            break
    if depth or operand:
        names = _Names({}, names.otherwise)
        return Declared(names.own(f'{package}-tag'), names.texts)
    return Declared(expression, names.texts)


def _of_rpms(lock: Lock, store: Store, tree: Path) -> Dict[str, Declared]:
    # Their signatures were verified, and the store's files have their hash
    with tempfile.NamedTemporaryFile() as log:
        status = sandbox.run(tree, [
            'rpm', '-qp', '--nosignature', '--queryformat', '%{LICENSE}\\n',
            *(p.sha256 for p in lock.packages)], store.folder, Path(log.name))
        said = log.read().decode(errors='replace')
    # A licence may have what Python, too, takes for the end of a line
    lines = said.rstrip('\n').split('\n')
    if status or len(lines) != len(lock.packages):
        raise MkosiError(f'rpm failed (exit code {status}): {said.strip()}')
    return {p.sha256: of_tag(p.name, line)
            for p, line in zip(lock.packages, lines)}


def of_lock(lock: Lock, store: Store, tree: Path) -> Dict[str, Declared]:
    '''
    By SHA-256, what each package of @lock declares; all of them are in
    @store. Raises MkosiError where the tools @tree can't read one.
    '''
    if lock.distribution == 'fedora':
        return _of_rpms(lock, store, tree)
    return _of_debs(lock, store)
