# SPDX-License-Identifier: GPL-2.0-or-later
'''
The package list of an image: what packages declare, in whatever form, as
SPDX wants it; every package with hash, source and licence; valid.
'''

import dataclasses
import io
import json
from pathlib import Path
import re
import shutil
import subprocess
import sys
from typing import Any, Dict, Iterator, List, Mapping

import pytest

from fixtures_builder import EPOCH, ROOT, Debian, Project, make_package
from mkosi_build import declared, lock as locks, packages, sandbox
from mkosi_build.cache import Cache
from mkosi_build.declared import NONE, Declared, of_copyright, of_tag
from mkosi_build.error import MkosiError
from mkosi_build.lock import Lock, Package
from mkosi_build.report import Report
from mkosi_build.store import Store

pytest_plugins = ['fixtures_builder']

SLOW = pytest.mark.slow
FORMAT = ('Format: https://www.debian.org/doc/packaging-manuals/'
          'copyright-format/1.0/\n')


# What a copyright file declares

def plain(one: Declared) -> str:
    '''The expression, without the hashes of texts.'''
    assert set(re.findall(r'LicenseRef-[A-Za-z0-9.-]+', one.expression)) == (
        set(one.texts)), one
    return re.sub(r'(LicenseRef-[A-Za-z0-9.-]+)-[0-9a-f]{8}', r'\1',
                  one.expression)


@pytest.mark.parametrize('name, expected', [
    ('GPL-2', 'GPL-2.0-only'), ('GPL-2+', 'GPL-2.0-or-later'),
    ('GPL-2.0', 'GPL-2.0-only'), ('gpl-3.0+', 'GPL-3.0-or-later'),
    ('GPL-1+', 'GPL-1.0-or-later'), ('LGPL-2.1', 'LGPL-2.1-only'),
    ('LGPL-2+', 'LGPL-2.0-or-later'), ('AGPL-3', 'AGPL-3.0-only'),
    ('GFDL-1.3+', 'GFDL-1.3-or-later'),
    ('GFDL-NIV-1.3', 'GFDL-1.3-no-invariants-only'),
    ('GPL-2.0-only', 'GPL-2.0-only'),
    ('GPL-2.0-or-later', 'GPL-2.0-or-later'),
    ('Expat', 'MIT'), ('BSD-3-clause', 'BSD-3-Clause'), ('ZLIB', 'Zlib'),
    ('Apache-2', 'Apache-2.0'),
    # No versions of theirs
    ('GPL-2.1', 'LicenseRef-GPL-2.1'), ('LGPL-1+', 'LicenseRef-LGPL-1'),
    ('GPL-NIV-3', 'LicenseRef-GPL-NIV-3'), ('GPL', 'LicenseRef-GPL'),
    ('GLP-3+', 'LicenseRef-GLP-3'), ('BSD', 'LicenseRef-BSD'),
    ('public-domain', 'LicenseRef-public-domain'),
    # More than one
    ('GPL-2 or MIT', 'GPL-2.0-only OR MIT'),
    ('GPL-2 and MIT', 'GPL-2.0-only AND MIT'),
    ('GPL-2 or MIT and ISC', 'GPL-2.0-only OR (MIT AND ISC)'),
    ('GPL-2 or MIT, and ISC', '(GPL-2.0-only OR MIT) AND ISC'),
    ('GPL-1+ or Artistic, or ISC',
     'GPL-1.0-or-later OR LicenseRef-Artistic OR ISC'),
    ('GPL-2+ or GPL-2+', 'GPL-2.0-or-later'),
    ('A, and B, or C', 'LicenseRef-A-and-B-or-C'),
    # Exceptions
    ('GPL-2 with Linux-syscall-note exception',
     'GPL-2.0-only WITH Linux-syscall-note'),
    ('GPL-3+ with Autoconf exception',
     'GPL-3.0-or-later WITH Autoconf-exception-3.0'),
    ('GPL-2+ with autoconf exception',
     'GPL-2.0-or-later WITH Autoconf-exception-2.0'),
    ('GPL-1 with autoconf exception',
     'LicenseRef-GPL-1-with-autoconf-exception'),
    ('GPL-3+ with Unheard exception',
     'LicenseRef-GPL-3-with-Unheard-exception'),
    ('Unheard with Bison exception',
     'LicenseRef-Unheard-with-Bison-exception'),
    # Odd ones
    ('© licence!', 'LicenseRef-licence'),
    ('x' * 300, 'LicenseRef-' + 'x' * 40),
])
def test_names(name: str, expected: str) -> None:
    '''Debian's names as SPDX's, or as references that it allows.'''
    one = of_copyright('thing', f'{FORMAT}\nFiles: *\nLicense: {name}\n')
    assert plain(one) == expected


def test_copyright_file() -> None:
    '''All paragraphs of files; texts from wherever they stand.'''
    one = of_copyright('thing', f'''{FORMAT}Source: https://example.org/
License: ISC

Files: *
Copyright: nobody
License: GPL-2+

Files: a
License: own
 Do what
 .
 you like.

Files: b
License: GPL-2+ or other

License: GPL-2+
 The GPL.

License: other
 Another text.
''')
    assert plain(one) == ('GPL-2.0-or-later AND LicenseRef-own AND '
                          '(GPL-2.0-or-later OR LicenseRef-other)')
    assert dict(one.texts.values()) == {
        'own': 'Do what\n.\nyou like.', 'other': 'Another text.'}


def test_same_name_other_text() -> None:
    '''Two packages' "BSD" are two licences, one that both have is one.'''
    def made(text: str) -> Declared:
        return of_copyright('thing', f'{FORMAT}\nFiles: *\nLicense: BSD\n '
                            f'{text}\n')
    assert made('one').expression != made('other').expression
    assert made('one') == made('one')


@pytest.mark.parametrize('text', [
    'This package was debianized by hand.\n\nGPL.\n', '\n', '',
    'no colon', ':\n\n:', 'License\n'])
def test_free_form(text: str) -> None:
    '''A file in no form is a licence of its own, with the whole text.'''
    one = of_copyright('thing', text)
    assert plain(one) == 'LicenseRef-thing-copyright'
    assert list(one.texts.values()) == [('thing-copyright', text)]


@pytest.mark.parametrize('text', [
    FORMAT, f'{FORMAT}\nFiles: *\n', f'{FORMAT}\nLicense: GPL-2\n'])
def test_declares_nothing(text: str) -> None:
    '''No file has a licence.'''
    assert of_copyright('thing', text) == Declared(NONE, {})


def test_unnamed() -> None:
    '''A text without a name.'''
    one = of_copyright('thing', f'{FORMAT}\nFiles: *\nLicense:\n Free.\n')
    assert plain(one) == 'LicenseRef-thing-unnamed'
    assert list(one.texts.values()) == [('thing-unnamed', 'Free.')]


@pytest.mark.parametrize('tag, expected', [
    ('GPL-2.0-or-later', 'GPL-2.0-or-later'),
    ('MIT AND (ISC OR Zlib)', 'MIT AND (ISC OR Zlib)'),
    ('GPL-3.0-or-later WITH Bison-exception-2.2 AND MIT',
     'GPL-3.0-or-later WITH Bison-exception-2.2 AND MIT'),
    ('GPLv2+ and MIT', 'LicenseRef-GPLv2 AND MIT'),
    ('LicenseRef-Fedora-Public-Domain',
     'LicenseRef-Fedora-Public-Domain'),
    ('Public Domain', 'LicenseRef-thing-tag'),
    ('(MIT', 'LicenseRef-thing-tag'), ('MIT)', 'LicenseRef-thing-tag'),
    ('MIT AND', 'LicenseRef-thing-tag'), ('()', 'LicenseRef-thing-tag'),
    ('AND', 'LicenseRef-AND'), ('', NONE), ('(none)', NONE)])
def test_tag(tag: str, expected: str) -> None:
    '''Fedora's are SPDX expressions by now, but for a few.'''
    assert plain(of_tag('thing', tag)) == expected


# Packages

def make_lock(*found: Package, distribution: str = 'debian') -> Lock:
    '''A lock of the packages @found.'''
    return Lock('0' * 64, distribution, 'trixie', 'x86_64', EPOCH,
                tuple(sorted(found)))


@pytest.fixture(name='store')
def fixture_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    '''A store of nothing.'''
    monkeypatch.setenv('QEMU_MKOSI_DIR', str(tmp_path / 'cache'))
    store = Store(Cache(), Report(stream=io.StringIO()))
    store.folder.mkdir(parents=True)
    return store


def stored(store: Store, mirror: Path, name: str, text: str,
           folder: str = '') -> Package:
    '''A package of the store, with the copyright file @text of @folder.'''
    source = mirror / 'copyright'
    mirror.mkdir(exist_ok=True)
    source.write_text(text)
    package = make_package(mirror, name, files={
        f'usr/share/doc/{folder or name}/copyright': source})
    shutil.copy(mirror / package.location, store.path(package))
    return package


def linked(store: Store, mirror: Path, name: str, target: str) -> Package:
    '''A package of the store whose folder of documents is a link.'''
    folder = mirror / 'link' / name
    (folder / 'DEBIAN').mkdir(parents=True)
    (folder / 'DEBIAN/control').write_text(
        f'Package: {name}\nVersion: 1\nArchitecture: all\n'
        'Maintainer: nobody\nDescription: a link\n')
    (folder / 'usr/share/doc').mkdir(parents=True)
    (folder / 'usr/share/doc' / name).symlink_to(target)
    package = Package(name, '1', f'{name}.deb', name[-1] * 64, 1, 'all',
                      f'{name}=1')
    subprocess.run(['dpkg-deb', '--root-owner-group', '--build', folder,
                    store.path(package)], check=True,
                   stdout=subprocess.DEVNULL)
    return package


def test_debs(store: Store, tmp_path: Path) -> None:
    '''
    From the packages, through links to others; broken and circular links
    and what has no file are no licence. Read once.
    '''
    mirror = tmp_path / 'mirror'
    text = f'{FORMAT}\nFiles: *\nLicense: ISC\n'
    lock = make_lock(
        stored(store, mirror, 'one', text),
        stored(store, mirror, 'other', text, 'elsewhere'),
        linked(store, mirror, 'linka', 'linkb'),
        linked(store, mirror, 'linkb', 'one'),
        linked(store, mirror, 'linkc', 'linkd'),
        linked(store, mirror, 'linkd', 'linkc'),
        linked(store, mirror, 'linke', '/usr/share/doc/gone'))
    for _ in range(2):
        found = declared.of_lock(lock, store, tmp_path)
        assert {p.name: found[p.sha256].expression
                for p in lock.packages} == {
            'one': 'ISC', 'other': NONE, 'linka': 'ISC', 'linkb': 'ISC',
            'linkc': NONE, 'linkd': NONE, 'linke': NONE}
        shutil.rmtree(store.folder)
        store.folder.mkdir()
    # What another process has half written is read anew
    for path in (store.cache.root / 'declared').iterdir():
        path.write_text('{')
    with pytest.raises(MkosiError, match=r'\.deb: dpkg-deb can\'t unpack'):
        declared.of_lock(lock, store, tmp_path)


SPEC = '''\
Name: thing
Version: 1
Release: 1
Summary: A thing
License: MIT AND GPLv2+
BuildArch: noarch
%description
%files
'''


@SLOW
def test_rpms(store: Store, tmp_path: Path, tools_tree: Path) -> None:
    '''By the rpm of the tools; what is no package is named so.'''
    folder = tmp_path / 'rpm'
    folder.mkdir()
    (folder / 'thing.spec').write_text(SPEC)
    assert not sandbox.run(tools_tree, [
        'rpmbuild', '-bb', '--quiet', '--define', '_topdir /work/top',
        '--define', '_dbpath /tmp/rpmdb', 'thing.spec'], folder,
        tmp_path / 'log'), (tmp_path / 'log').read_text()
    file, = folder.rglob('*.rpm')
    package = Package('thing', '1-1', 'thing.rpm', '1' * 64, 1, 'noarch',
                      'thing-1-1.src.rpm')
    shutil.copy(file, store.path(package))
    lock = make_lock(package, distribution='fedora')
    found = declared.of_lock(lock, store, tools_tree)
    assert plain(found[package.sha256]) == 'MIT AND LicenseRef-GPLv2'
    store.path(package).write_text('not a package')
    with pytest.raises(MkosiError, match='rpm failed'):
        declared.of_lock(lock, store, tools_tree)


@pytest.mark.parametrize('source, expected', [
    ('glibc=2.41-12+deb13u4', ('glibc', '2.41-12+deb13u4')),
    ('busybox=1:1.37.0-6', ('busybox', '1:1.37.0-6'))])
def test_debian_source(source: str, expected: Any) -> None:
    '''Name and version.'''
    package = Package('x', '1', 'x.deb', '0' * 64, 1, 'amd64', source)
    assert packages.source(make_lock(package), package) == expected


@pytest.mark.parametrize('source, expected', [
    ('kernel-6.19.6-300.fc44.src.rpm', ('kernel', '6.19.6-300.fc44')),
    ('util-linux-2.41-1.fc44.src.rpm', ('util-linux', '2.41-1.fc44')),
    ('odd.nosrc.rpm', ('odd', '')), ('(none)', ('(none)', ''))])
def test_fedora_source(source: str, expected: Any) -> None:
    '''Out of a file's name, of which the name may have dashes, too.'''
    package = Package('x', '1', 'x.rpm', '0' * 64, 1, 'noarch', source)
    lock = make_lock(package, distribution='fedora')
    assert packages.source(lock, package) == expected


@pytest.mark.parametrize('distribution, version, expected', [
    ('debian', '1:1.37.0-6+b9',
     'pkg:deb/debian/a%2Bb@1:1.37.0-6%2Bb9?arch=amd64&distro=debian-trixie'),
    ('fedora', '2:1.35~rc1^git-6.fc44',
     'pkg:rpm/fedora/a%2Bb@1.35~rc1%5Egit-6.fc44?arch=amd64'
     '&distro=fedora-trixie&epoch=2')])
def test_purl(distribution: str, version: str, expected: str) -> None:
    '''By the rules of either.'''
    package = Package('a+b', version, 'x', '0' * 64, 1, 'amd64', 'a=1')
    assert packages.purl(make_lock(package, distribution=distribution),
                         package) == expected


# The list

def document(project: Project) -> Dict[str, Any]:
    '''The list beside the artefacts of @project.'''
    path, = project.cache.glob(f'images/*/*/*/{packages.FILE}')
    found: Dict[str, Any] = json.loads(path.read_text())
    return found


def related(found: Mapping[str, Any], how: str) -> Dict[str, List[str]]:
    '''What is related so to what.'''
    pairs: Dict[str, List[str]] = {}
    for one in found['relationships']:
        if one['relationshipType'] == how:
            pairs.setdefault(one['spdxElementId'], []).append(
                one['relatedSpdxElement'])
    return pairs


@SLOW
def test_list(built: Project) -> None:
    '''
    Every package of the lock, with hash, source and licence; each
    artefact; of all a place in the whole.
    '''
    found = document(built)
    lock = locks.load(built.lock_path)
    assert found['spdxVersion'] == 'SPDX-2.3'
    assert found['creationInfo']['created'] == '2023-11-14T22:13:20Z'
    by_id = {one['SPDXID']: one for one in found['packages']}
    assert len(by_id) == len(found['packages'])
    image, = related(found, 'DESCRIBES')['SPDXRef-DOCUMENT']
    assert by_id[image]['name'] == 'mini'
    made = related(found, 'GENERATED_FROM')
    binaries = [by_id[name] for name in made[image]]
    assert {(one['name'], one['versionInfo'],
             one['checksums'][0]['checksumValue'])
            for one in binaries} == {(p.name, p.version, p.sha256)
                                     for p in lock.packages}
    for one in binaries:
        origin, = made[one['SPDXID']]
        assert by_id[origin]['primaryPackagePurpose'] == 'SOURCE'
        assert one['licenseDeclared'] and one['externalRefs']
    artefacts = [by_id[name] for name in related(found, 'CONTAINS')[image]]
    assert {(one['packageFileName'], one['checksums'][0]['checksumValue'])
            for one in artefacts} == {
        (path.name, digest) for path in built.artefacts()
        for digest in [packages_sha256(path)]}


def packages_sha256(path: Path) -> str:
    '''The hash of the file @path.'''
    said = subprocess.run(['sha256sum', path], check=True,
                          stdout=subprocess.PIPE, encoding='ascii').stdout
    return said.split(' ', maxsplit=1)[0]


@SLOW
def test_deterministic(template: Project, project: Project) -> None:
    '''Another build at another time and place: the same list.'''
    project.good(TZ='Asia/Tokyo', LC_ALL='tr_TR.UTF-8')
    assert document(project) == document(template)


# By others' judgement

VALIDATE = '''\
import sys
from spdx_tools.spdx.parser.parse_anything import parse_file
from spdx_tools.spdx.validation.document_validator import (
    validate_full_spdx_document)
problems = validate_full_spdx_document(parse_file(sys.argv[1]))
for problem in problems:
    print(problem.validation_message)
sys.exit(bool(problems))
'''

KNOWN = '''\
import sys
import license_expression
known = license_expression.get_spdx_licensing().known_symbols
print(*(name for name in sys.argv[1:] if name not in known))
'''


@pytest.fixture(name='validator', scope='module')
def fixture_validator(tmp_path_factory: pytest.TempPathFactory,
                      ) -> Iterator[str]:
    '''A Python that has the SPDX project's own tools, for these tests.'''
    folder = tmp_path_factory.mktemp('validator')
    subprocess.run([sys.executable, '-m', 'venv', folder], check=True)
    python = str(folder / 'bin/python')
    subprocess.run([python, '-m', 'pip', '--quiet', 'install',
                    'spdx-tools==0.8.5', 'license-expression==30.4.4'],
                   check=True)
    yield python
    shutil.rmtree(folder)


def validate(python: str, path: Path,
             content: Mapping[str, Any]) -> 'subprocess.CompletedProcess[str]':
    '''What the SPDX project's tools say of a document.'''
    path.write_text(json.dumps(content))
    return subprocess.run([python, '-c', VALIDATE, path], check=False,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          encoding='utf-8')


@SLOW
@pytest.mark.network
def test_valid(validator: str, built: Project, store: Store, debian: Debian,
               tmp_path: Path) -> None:
    '''
    By the schema of SPDX 2.3, with licences of all kinds in it; and the
    validator would notice a fault.
    '''
    assert debian
    content = document(built)
    path = tmp_path / 'list.spdx.json'
    assert validate(validator, path, content).returncode == 0
    lock = make_lock(
        stored(store, tmp_path / 'mirror', 'one', f'{FORMAT}\nFiles: *\n'
               'License: GPL-2+ or own, and ISC\n Text\n'),
        stored(store, tmp_path / 'mirror', 'two', 'Free form'))
    licences = declared.of_lock(lock, store, tmp_path)
    job = dataclasses.make_dataclass('Job', ['name', 'lock', 'image',
                                             'identity'])(
        'mini-x86_64', lock, dataclasses.make_dataclass(
            'Image', ['name', 'description'])('mini', 'Tiny'), '1' * 64)
    more = packages.document(job, {}, licences)
    assert len(more['hasExtractedLicensingInfos']) == 2
    said = validate(validator, path, more)
    assert said.returncode == 0, said.stdout
    del more['hasExtractedLicensingInfos'][0]
    assert validate(validator, path, more).returncode
    content['packages'][0]['checksums'] = [{'algorithm': 'SHA256',
                                            'checksumValue': 'x'}]
    assert validate(validator, path, content).returncode


@SLOW
@pytest.mark.network
def test_known_names(validator: str) -> None:
    '''What we translate to is on SPDX's lists of today.'''
    names = [*declared.IDS.values(), *declared.ALIASES.values(),
             *declared.EXCEPTIONS.values()]
    names += [f'{family}-{version}-{later}' for family, versions
              in declared.GNU_VERSIONS.items() for version in versions
              for later in ('only', 'or-later')]
    said = subprocess.run([validator, '-c', KNOWN, *names], check=True,
                          stdout=subprocess.PIPE, encoding='utf-8').stdout
    assert not said.split()


def test_our_locks() -> None:
    '''Every package of ours has a source with a version, and a URL.'''
    paths = list(ROOT.glob('tests/functional/mkosi/*/*.lock'))
    assert len(paths) >= 4
    for path in paths:
        lock = locks.load(path)
        for package in lock.packages:
            assert all(packages.source(lock, package)), package
            assert re.fullmatch(r'pkg:(deb|rpm)/\w+/[\w.%-]+@[\w.%:~-]+\?.*',
                                packages.purl(lock, package))
