# SPDX-License-Identifier: GPL-2.0-or-later
'''
Making locks of RPMs, out of what mkosi had dnf fetch.

Fedora signs packages and not the metadata of a release's repository, so
what a lock says of a package comes from the package: dnf has installed
only what rpm found signed with the distribution's key, its file gives hash
and size, and its header, which the signature covers, all else. Metadata
are believed where a package lies, which the hash makes harmless, and when
the repository was released.
'''

import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Dict, List, Optional, Sequence, Tuple

from . import sandbox
from .cache import sha256_file
from .error import FetchError, MkosiError
from .lock import Package

# What rpm is to say of a package, in one line
QUERY = ('%{NAME} %|EPOCH?{%{EPOCH}:}|%{VERSION}-%{RELEASE} %{ARCH} '
         '%{SOURCERPM}\\n')

COMMON = '{http://linux.duke.edu/metadata/common}'
REPO = '{http://linux.duke.edu/metadata/repo}'


# What dnf says where it has refused what the mirror sent, or got nothing
REFUSED = re.compile(r'^(Package .* is not signed|Public key for .*'
                     r'|Problem opening package .*|.*: Cannot download, .*'
                     r'|Error: Failed to download metadata.*)', re.M)


def refusal(log: Path) -> Optional[FetchError]:
    '''
    Why dnf took nothing from the mirror, if that is what the file @log of
    mkosi tells.
    '''
    said = REFUSED.findall(log.read_text(encoding='utf-8', errors='replace'))
    if not said:
        return None
    lines = ''.join(f'\n    {line.strip()}' for line in said[:10])
    return FetchError(f'dnf refused what the mirror has:{lines}',
                      next_step='set QEMU_MKOSI_MIRROR to another mirror; '
                      f'the whole log: {log}')


def chosen(packages: Path, tree: Path, what: str) -> Tuple[List[Package], int]:
    '''
    The packages in mkosi's package cache @packages, read with the tools
    @tree, and the epoch of the repository that they came from. @what names
    them for messages.

    Raises FetchError where metadata and packages don't agree.
    '''
    [cache] = (packages / 'cache/dnf').glob('fedora-*')
    known = _known(cache / 'repodata', tree)
    headers = _headers(cache / 'packages', tree)
    found = []
    for name, header in sorted(headers.items()):
        path = cache / 'packages' / name
        digest = sha256_file(path)
        expected, location = known.get(digest, ('a package', ''))
        if not location or expected != ' '.join(header[:3]):
            raise FetchError(
                f'{what}: the repository\'s metadata have {expected} where '
                f'the mirror sent {name}, which is {" ".join(header[:3])}',
                next_step='tell the mirror\'s owner, and set '
                'QEMU_MKOSI_MIRROR to another one')
        found.append(Package(header[0], header[1], location, digest,
                             path.stat().st_size, header[2], header[3]))
    return sorted(found), _epoch(cache / 'repodata/repomd.xml')


def _run(tree: Path, program: Sequence[str], folder: Path) -> str:
    log = folder / 'log'
    status = sandbox.run(tree, program, folder, log)
    said = log.read_text(encoding='utf-8', errors='replace')
    if status:
        raise MkosiError(f'{program[0]} failed (exit code {status}): '
                         f'{said.strip()}')
    return said


def _known(repodata: Path, tree: Path) -> Dict[str, Tuple[str, str]]:
    '''
    By its SHA-256, name, version and architecture of a package, and where
    the repository has it.
    '''
    # There may be others, in forms for other programs
    location = ET.parse(repodata / 'repomd.xml').find(
        f'{REPO}data[@type="primary"]/{REPO}location')
    assert location is not None, 'dnf has read it'
    # In whatever way it is compressed
    _run(tree, ['zstd', '-dqf', '-o', 'primary',
                Path(location.attrib['href']).name], repodata)
    known = {}
    for _, element in ET.iterparse(repodata / 'primary'):
        if element.tag == f'{COMMON}package':
            values = {child.tag[len(COMMON):]: child for child in element
                      if child.tag.startswith(COMMON)}
            version = values['version'].attrib
            epoch = version.get('epoch', '0')
            known[values['checksum'].text or ''] = (
                f'{values["name"].text} '
                + (f'{epoch}:' if epoch != '0' else '')
                + f'{version["ver"]}-{version["rel"]} '
                f'{values["arch"].text}', values['location'].attrib['href'])
            # The whole of Fedora is large
            element.clear()
    return known


def _headers(folder: Path, tree: Path) -> Dict[str, List[str]]:
    '''
    What each package in @folder says of itself: name, version,
    architecture, source.
    '''
    names = sorted(path.name for path in folder.glob('*.rpm'))
    # Signatures were verified, and by now the key is gone
    said = _run(tree, ['rpm', '-qp', '--nosignature', '--queryformat', QUERY,
                       *names], folder)
    return dict(zip(names, (line.split(' ') for line in said.splitlines())))


def _epoch(repomd: Path) -> int:
    '''When the repository was released, in seconds since 1970.'''
    times = [int(float(element.text or 0))
             for element in ET.parse(repomd).getroot().iter()
             if element.tag == f'{REPO}timestamp']
    return max(times)
