# SPDX-License-Identifier: GPL-2.0-or-later
'''Tests of the registry's reader: what it refuses, and what it writes.'''

import os
import random
from pathlib import Path
import re
import subprocess
import sys
from typing import Dict, Tuple

import pytest
import yaml

from mkosi_build import record, registry
from mkosi_build.error import InputError, RegistryError


ONE, TWO, THREE, FOUR = ('1' * 64, 'b' * 64, 'c' * 64, 'd' * 64)

# Two images: hashed with comments everywhere, and not built yet
TEXT = f'''\
# The images of the tests
schema: 1
stores:
  - https://store.example/images/   # published
images:
  # the small one
  debian-min:
    description: >
      A small Debian,
      for most tests
    definition: debian-min
    distribution: debian
    release: trixie
    architectures:
      x86_64:
        # digest of the inputs
        identity: {ONE}   # of the last build
        artefacts:
          kernel:
            file: vmlinuz
            format: bzimage
            # counted with the initrd
            size: 12
            sha256: "{TWO}"
          initrd: {{file: initrd.cpio.zst, format: cpio,
                   size: 34, sha256: {THREE}}}
          disk:
            size: 56            # as qcow2

            sha256: '{FOUR}'    # é
            file: disk.qcow2
            format: qcow2

        boot: &BOOT
          console: ttyS0
          cmdline:
            - console=ttyS0     # the tests' console
            - nokaslr
          disk-cmdline: []
          disk-device: virtio-blk-pci
          ready: 'QEMU-GUEST-READY'
          prompt: 'root@guest:/# '
        budget:
          kernel-initrd-bytes: 20000000
          disk-bytes: 80000000
          packages: 120
          initrd-boot-ratio: 1.2
          disk-boot-ratio: 2
  fedora-min:
    description: A small Fedora
    definition: fedora-min
    distribution: fedora
    release: '42'
    architectures:
      aarch64:
        not-locked: the mirror is not reachable
        artefacts:
          kernel: {{file: vmlinuz, format: image}}
          initrd: {{file: initrd.cpio.zst, format: cpio}}
          disk: {{file: disk.qcow2, format: qcow2}}
        boot: {{console: ttyAMA0, cmdline: [a=b], disk-cmdline: [c],
               disk-device: virtio-blk-pci, ready: R, prompt: '# '}}
        budget: {{kernel-initrd-bytes: 1, disk-bytes: 2, packages: 3,
                 initrd-boot-ratio: 4.5, disk-boot-ratio: 6}}
'''.replace(' &BOOT', '')

DEBIAN = "In image 'debian-min', architecture 'x86_64': "


@pytest.fixture(autouse=True, params=['C', 'Python'])
def fixture_parser(request: pytest.FixtureRequest,
                   monkeypatch: pytest.MonkeyPatch) -> None:
    '''With either of PyYAML's parsers: the fast one may be missing.'''
    if request.param == 'Python':
        monkeypatch.delattr(yaml, 'CSafeLoader', raising=False)


def load(tmp_path: Path, text: str) -> registry.Registry:
    '''Read the text as a registry.'''
    path = tmp_path / 'registry.yaml'
    path.write_bytes(text.encode())
    return registry.load(path)


def refusal(tmp_path: Path, text: str) -> str:
    '''The error for the text.'''
    with pytest.raises(RegistryError) as caught:
        load(tmp_path, text)
    return str(caught.value)


def changed(old: str, new: str) -> Tuple[str, int]:
    '''The text with one place changed, and the line of that place.'''
    assert TEXT.count(old) == 1, f'{TEXT.count(old)} times: {old}'
    return TEXT.replace(old, new), line_of(old)


def line_of(text: str) -> int:
    '''The line of the end of a text that is there once.'''
    return TEXT[:TEXT.index(text) + len(text)].count('\n') + 1


def test_valid(tmp_path: Path) -> None:
    '''All that is in the text arrives.'''
    known = load(tmp_path, TEXT)
    assert known.path == tmp_path / 'registry.yaml'
    assert known.stores == ('https://store.example/images',)
    image = known.image('debian-min')
    assert image == registry.Image(
        name='debian-min', description='A small Debian, for most tests',
        definition='debian-min', distribution='debian', release='trixie',
        targets=image.targets)
    target = image.target('x86_64')
    assert target == registry.Target(
        arch='x86_64', identity=ONE, not_locked=None,
        artefacts={
            'kernel': registry.Artefact('kernel', 'vmlinuz', 'bzimage',
                                        TWO, 12),
            'initrd': registry.Artefact('initrd', 'initrd.cpio.zst', 'cpio',
                                        THREE, 34),
            'disk': registry.Artefact('disk', 'disk.qcow2', 'qcow2',
                                      FOUR, 56)},
        boot=registry.Boot('ttyS0', ('console=ttyS0', 'nokaslr'), (),
                           'virtio-blk-pci', 'QEMU-GUEST-READY',
                           'root@guest:/# '),
        budget=registry.Budget(20000000, 80000000, 120, 1.2, 2.0))
    assert target.built
    other = known.image('fedora-min').target('aarch64')
    assert not other.built
    assert other.not_locked == 'the mirror is not reachable'
    assert other.artefacts['kernel'].sha256 is None


def test_mirrors(tmp_path: Path) -> None:
    '''In the order that they stand in, and none by default.'''
    text, _ = changed('release: trixie', 'release: trixie\n    mirrors:\n'
                      '      - https://m.example/{arch}/os/\n'
                      '      - file:///srv/{arch}/{arch}')
    images = load(tmp_path, text).images
    assert images['debian-min'].mirrors == (
        'https://m.example/{arch}/os', 'file:///srv/{arch}/{arch}')
    assert images['fedora-min'].mirrors == ()


def test_hash_of_digits(tmp_path: Path) -> None:
    '''A hash that YAML takes for a number is a hash all the same.'''
    text, _ = changed(FOUR, ONE)
    target = load(tmp_path, text.replace(f"'{ONE}'", ONE))
    disk = target.image('debian-min').target('x86_64').artefacts['disk']
    assert disk.sha256 == ONE


def test_own_registry() -> None:
    '''The registry of this tree, if it is there, is valid.'''
    if registry.DEFAULT.exists():
        assert registry.load(registry.DEFAULT).images


# What to change, to what, and what the error says
WRONG = [
    # keys
    ('        budget:\n          kernel',
     '        budgte: 1\n        budget:\n          kernel',
     DEBIAN + "unknown key 'budgte', did you mean 'budget'?"),
    ('definition: debian-min', 'definition: debian-min\n    xyz: 1',
     "In image 'debian-min': unknown key 'xyz', expected one of: "
     'description, definition, distribution, release, architectures, '
     'mirrors'),
    ('\nschema: 1', '\nschema: 1\nstors: []',
     "unknown key 'stors', did you mean 'stores'?"),
    ('file: vmlinuz\n', 'flie: vmlinuz\n', DEBIAN + "unknown key 'flie', did "
     "you mean 'file'?"),
    ('    distribution: debian\n', '', "In image 'debian-min': missing key "
     "'distribution'"),
    ('          disk-cmdline: []\n', '', DEBIAN + "missing key "
     "'disk-cmdline'"),
    ('packages: 120', 'packages: 120\n          packages: 120',
     "duplicate key 'packages', first in line"),
    ('\nschema: 1', '\nschema: 1\nschema: 1', "duplicate key 'schema'"),
    ('  fedora-min:', '  debian-min:', "duplicate key 'debian-min'"),
    ('release: trixie', 'release: trixie\n    <<: {}',
     'expected a string as key'),
    ('release: trixie', 'release: trixie\n    ? [a]\n    : b',
     'expected a string as key, found a list'),
    ('release: trixie', 'release: trixie\n    7: b',
     "expected a string as key, found the number '7'"),
    # versions
    ('\nschema: 1', '\nschema: 2', "expected schema 1, found the number '2'"),
    ('\nschema: 1', "\nschema: '1'", 'expected schema 1, found the string'),
    ('\nschema: 1', '\nschema: true', 'expected schema 1, found the boolean'),
    ('\nschema: 1', '', "missing key 'schema'"),
    # types
    ('packages: 120', 'packages: true', DEBIAN + 'expected a positive whole '
     "number, found the boolean 'true'"),
    ('packages: 120', "packages: '120'", 'found the string'),
    ('packages: 120', 'packages: 0', 'expected a positive whole number'),
    ('packages: 120', 'packages: -3', 'expected a positive whole number'),
    ('packages: 120', 'packages: 1.5', 'expected a positive whole number'),
    ('packages: 120', 'packages: 0x10', 'expected a positive whole number'),
    ('packages: 120', 'packages: 1:30', 'expected a positive whole number'),
    ('packages: 120', 'packages: ' + '9' * 5000, 'positive whole number'),
    ('packages: 120', 'packages:', "found the empty value ''"),
    ('packages: 120', 'packages: {}', 'found a mapping'),
    ('initrd-boot-ratio: 1.2', 'initrd-boot-ratio: 0.0',
     'expected a positive number'),
    ('initrd-boot-ratio: 1.2', 'initrd-boot-ratio: .inf',
     'expected a positive number'),
    ('initrd-boot-ratio: 1.2', 'initrd-boot-ratio: .nan',
     'expected a positive number'),
    ('size: 12\n', 'size: 0\n', 'expected a positive whole number'),
    ('release: trixie', 'release: 13', "expected a name (a-z, 0-9, dot, dash, "
     "underscore), found the number '13'"),
    ('release: trixie', 'release: 2024-01-01', 'found the date'),
    ('release: trixie', 'release: no', 'found the boolean'),
    ('release: trixie', 'release: null', 'found the empty value'),
    ('description: A small Fedora', 'description: []',
     "In image 'fedora-min': expected a text, found a list"),
    ('description: A small Fedora', "description: ' '", 'expected a text'),
    ('disk-cmdline: []', 'disk-cmdline: quiet', DEBIAN + 'expected a list, '
     "found the string 'quiet'"),
    ('- nokaslr', '- two words', 'expected one argument, without white space'),
    ('- nokaslr', '- {a: b}', 'expected one argument'),
    ('- nokaslr', '- 5', 'expected one argument'),
    ('console: ttyS0', 'console: /dev/ttyS0', 'expected the name of a device'),
    ("'QEMU-GUEST-READY'", '"two\\nlines"', 'a line of printable ASCII'),
    ("'QEMU-GUEST-READY'", "''", 'a line of printable ASCII'),
    ("'QEMU-GUEST-READY'", '|\n            text',
     'a line of printable ASCII'),
    ("'root@guest:/# '", '>-\n            root#', 'on one line'),
    ("'root@guest:/# '", "'   '", 'a line of printable ASCII'),
    # names and files
    ('file: vmlinuz\n', 'file: ../vmlinuz\n', 'expected a name'),
    ('file: vmlinuz\n', 'file: a/b\n', 'expected a name'),
    ('file: vmlinuz\n', 'file: /etc/passwd\n', 'expected a name'),
    ('file: vmlinuz\n', 'file: .hidden\n', 'expected a name'),
    ('file: vmlinuz\n', 'file: vmlinu*\n', 'expected a name'),
    ('file: vmlinuz\n', 'file: "a\\0b"\n', 'expected a name'),
    ('file: vmlinuz\n', 'file: "vmlinuz\\n"\n', 'expected a name'),
    ('file: vmlinuz\n', 'file: ' + 'x' * 300 + '\n', 'expected a name'),
    ('file: vmlinuz\n', 'file: disk.qcow2\n', DEBIAN + "'disk' and 'kernel' "
     "have the same file 'disk.qcow2'"),
    ('definition: debian-min', 'definition: ..', 'expected a name'),
    ('definition: debian-min', 'definition: a\\b', 'expected a name'),
    ('  fedora-min:', '  Fedora:', "expected a name (a-z, 0-9, dot, dash, "
     "underscore), found 'Fedora'"),
    ('  fedora-min:', '  ../x:', 'expected a name'),
    # hashes
    (FOUR, FOUR[:-1], 'expected 64 lower-case hex digits'),
    (FOUR, FOUR + '0', 'expected 64 lower-case hex digits'),
    (FOUR, FOUR.upper(), 'expected 64 lower-case hex digits'),
    (FOUR, 'g' * 64, 'expected 64 lower-case hex digits'),
    (FOUR, FOUR + '\\n', 'expected 64 lower-case hex digits'),
    ('            size: 12\n', '', DEBIAN + "'kernel' has 'sha256' without "
     "'size', expected both or neither"),
    (f'            sha256: "{TWO}"\n', '', "'kernel' has 'size' without "
     "'sha256'"),
    (f'            size: 12\n            sha256: "{TWO}"\n', '',
     DEBIAN + 'hashes for initrd, disk but not for kernel, expected all or '
     'none'),
    (f'        identity: {ONE}   # of the last build\n', '',
     DEBIAN + "hashes without the key 'identity'"),
    ('        not-locked: the mirror is not reachable\n',
     f'        identity: {ONE}\n', "key 'identity' without hashes"),
    ('        # digest of the inputs\n', '        not-locked: reason\n',
     DEBIAN + "hashes together with 'not-locked'"),
    # closed sets
    ('      x86_64:', '      x86-64:', "In image 'debian-min': unknown "
     "architecture 'x86-64', did you mean 'x86_64'?"),
    ('      x86_64:', '      m68k:', 'expected one of: x86_64, aarch64'),
    ('format: bzimage', 'format: bzImage', DEBIAN + "unknown format of kernel "
     "'bzImage', did you mean 'bzimage'"),
    ('format: bzimage', 'format: [x]', 'expected a format of kernel'),
    ('release: trixie', 'release: trixie\n    mirrors: http://m.example',
     "In image 'debian-min': expected a list, found the string"),
    ('release: trixie', 'release: trixie\n    mirrors:\n      - 7',
     "expected an http, https or file URL, in which {arch} stands for the "
     "architecture, found the number '7'"),
    *[('release: trixie', f"release: trixie\n    mirrors: ['{url}']",
       f"In image 'debian-min': expected an http, https or file URL, in which "
       f"{{arch}} stands for the architecture, found the string '{url}'")
      for url in ('ftp://m.example', 'm.example', 'http://',
                  'http://m.example/{arhc}', 'http://m.example/{arch',
                  'http://m.example/arch}', 'http://m.example/{{arch}}',
                  'http://m.example/a b', 'http://m.example/$basearch')],
    *[('https://store.example/images/', f"'{store}'",
       'expected an http or https URL, or an absolute folder, found the '
       f"string '{store}'")
      for store in ('ftp://store', 'file:///srv/images', 'https://s?a=b',
                    'https://s#a', 'https:///images', 'store.example',
                    'http://[::1', 'http://s:port', 'srv/images', './images',
                    '/', '//', '/srv/my images', '~/images', 'HTTP://s')],
    *[('https://store.example/images/', f"'{store}'", 'expected a store '
       'that all may read, found a URL with a user name or password')
      for store in ('https://user:pw@store', 'http://user@store/x',
                    'https://user name:p w@store', 'ftp://a:b@store',
                    '//user@store')],
    # YAML that a registry has no use for
    ('packages: 120', 'packages: !!int 120',
     "tag 'tag:yaml.org,2002:int' is not allowed"),
    ('release: trixie', 'release: !!python/object/apply:os.system [id]',
     "tag 'tag:yaml.org,2002:python/object/apply:os.system' is not allowed"),
    ('release: trixie', 'release: ! trixie', "tag '!' is not allowed"),
    ('packages: 120', 'packages: &a 120', "anchor '&a' is not allowed"),
    ('packages: 120', 'packages: *a', "alias '*a' is not allowed"),
    ('packages: 120', 'packages: ' + '[' * 20 + ']' * 20,
     'more than 16 levels deep'),
    ('packages: 120', 'packages: ' + '[' * 5000, 'more than 16 levels deep'),
    ('packages: 120', 'packages: 120\n---\nschema: 1', 'a second document'),
    ('packages: 120', 'packages: [', 'not valid YAML: '),
    ('packages: 120', 'packages: "', 'not valid YAML: '),
    ('packages: 120', 'packages: @', 'not valid YAML: '),
    ('packages: 120', '\tpackages: 120', 'not valid YAML: '),
    ('packages: 120', 'packages: \x07', 'not valid YAML: '),
    ('packages: 120\n', 'packages: 120\r\n', 'character U+000D, expected '
     'lines that end in LF alone'),
    ('packages: 120', 'packages: 120 #\u2028', 'character U+2028'),
]


@pytest.mark.parametrize('store', [
    'http://store', 'http://127.0.0.1:8080/a', 'http://[::1]:8080/images',
    'https://s.example/api/v4/projects/me%2Fqemu/packages/generic/a/1.0~x',
    'https://s/@v1/x', '/srv/images', '/srv/a@b:c/images', '//srv'])
def test_store(tmp_path: Path, store: str) -> None:
    '''What stores may look like; slashes at the end are of no meaning.'''
    text, line = changed('https://store.example/images/', f"'{store}//'")
    assert load(tmp_path, text).stores == (store,)
    secret, _ = changed('https://store.example/images/',
                        "'https://me:s3cret@store'")
    error = refusal(tmp_path, secret)
    assert error.startswith(f'registry.yaml:{line}: ')
    assert 's3cret' not in error


@pytest.mark.parametrize('old, new, message', WRONG)
def test_wrong(tmp_path: Path, old: str, new: str, message: str) -> None:
    '''Each rule has an error, with file and line.'''
    text, _ = changed(old, new)
    error = refusal(tmp_path, text)
    assert message in error
    assert re.match(r'registry\.yaml(:[0-9]+)?: ', error)
    assert len(error) < 400


@pytest.mark.parametrize('old, new, back', [
    ('size: 12\n', 'size: x\n', 1),
    ('release: trixie', 'release: 13', 0),
    ('- nokaslr', '- two words', 0),
    (FOUR, 'x', 0),
    ('\nschema: 1', '\nschema: 2', 0),
    ('      aarch64:', '      m68k:', 0),
])
def test_line(tmp_path: Path, old: str, new: str, back: int) -> None:
    '''The line is that of the value.'''
    text, line = changed(old, new)
    assert refusal(tmp_path, text).startswith(
        f'registry.yaml:{line - back}: ')


@pytest.mark.parametrize('content, message', [
    (b'', 'registry.yaml:1: the file is empty'),
    (b'# nothing\n', 'the file is empty'),
    (b'- a\n', 'expected a mapping, found a list'),
    (b'text\n', "expected a mapping, found the string 'text'"),
    (b'schema: 1\nimages: []\n', 'expected a mapping, found a list'),
    (b'schema: 1\nimages:\n', 'expected a mapping, found the empty value'),
    (b'schema: 1\nimages: {}\n\xff', 'registry.yaml:3: not UTF-8'),
    (b'\xef\xbb\xbfschema: 1\nimages: {}\n', 'character U+FEFF'),
    (b'#' * (32 << 20) + b'\n', 'larger than 33554432 bytes'),
    (b'[' * (1 << 19), 'more than 16 levels deep'),
    (b'schema: 1\nimages: {a: {architectures: {}, description: d, '
     b'definition: d, distribution: d, release: d}}\n',
     "In image 'a': expected at least one architecture"),
])
def test_whole_file(tmp_path: Path, content: bytes, message: str) -> None:
    '''Files that are no registry at all.'''
    path = tmp_path / 'registry.yaml'
    path.write_bytes(content)
    with pytest.raises(RegistryError, match='^registry.yaml') as caught:
        registry.load(path)
    assert message in str(caught.value)


def test_no_images(tmp_path: Path) -> None:
    '''A registry may be without images.'''
    assert load(tmp_path, 'schema: 1\nimages: {}\n').images == {}


@pytest.mark.parametrize('name', ['missing.yaml', '.', 'a/file/x'])
def test_unreadable(tmp_path: Path, name: str) -> None:
    '''What cannot be read is an error with the reason.'''
    with pytest.raises(RegistryError, match='cannot be read: [A-Z]'):
        registry.load(tmp_path / name)


def test_lookups(tmp_path: Path) -> None:
    '''What is not there is named, with what is.'''
    known = load(tmp_path, TEXT)
    with pytest.raises(RegistryError, match="registry.yaml: unknown image "
                       "'debian-mni', did you mean 'debian-min'"):
        known.image('debian-mni')
    with pytest.raises(InputError, match='expected one of: debian-min, '
                       'fedora-min'):
        known.image('zzz')
    with pytest.raises(RegistryError, match="In image 'debian-min': no "
                       "architecture 'aarch64', there are: x86_64"):
        known.image('debian-min').target('aarch64')


def test_loaded_once(tmp_path: Path) -> None:
    '''The file is read again when it changed, and only then.'''
    first = load(tmp_path, TEXT)
    assert registry.load(first.path) is first
    other = load(tmp_path, TEXT.replace('trixie', 'forky_'))
    assert other.image('debian-min').release == 'forky_'


def test_without_yaml() -> None:
    '''The module can be imported without PyYAML, load() says what is missing.

    Both a ModuleNotFoundError, and an error with exit code and next step.
    '''
    script = '''
import sys
sys.modules['yaml'] = None
from pathlib import Path
from mkosi_build import registry
try:
    registry.load(Path(sys.argv[1]))
except ModuleNotFoundError as e:
    print(e.exit_code, e)
'''
    scripts = Path(registry.__file__).parents[1]
    result = subprocess.run([sys.executable, '-c', script, __file__],
                            env={**os.environ, 'PYTHONPATH': str(scripts)},
                            stdout=subprocess.PIPE, encoding='utf-8',
                            check=True)
    assert result.stdout.startswith('4 the Python module yaml (PyYAML) is')
    assert 'next: install it' in result.stdout


# -- record() ---------------------------------------------------------------

HASHES: Dict[str, Tuple[str, int]] = {
    'kernel': ('e' * 64, 1001), 'initrd': ('2' * 64, 1002),
    'disk': ('f' * 64, 1003)}
IDENTITY = 'a' * 64


def without_hashes(text: str) -> str:
    '''The text before the first build.'''
    text = re.sub(r',\n *size: 34, sha256: .{64}', '', text)
    return re.sub(r' *(identity|size|sha256): .*\n', '', text)


def test_record_replaces() -> None:
    '''The values change, and nothing else.'''
    expected = TEXT
    for old, new in ((f'identity: {ONE}', f'identity: {IDENTITY}'),
                     ('size: 12', 'size: 1001'), ('size: 34', 'size: 1002'),
                     ('size: 56', 'size: 1003'), (f'"{TWO}"', 'e' * 64),
                     (THREE, '2' * 64), (f"'{FOUR}'", 'f' * 64)):
        expected = expected.replace(old, new)
    assert record.record(TEXT, 'debian-min', 'x86_64', IDENTITY,
                         HASHES) == expected
    assert record.record(expected, 'debian-min', 'x86_64', IDENTITY,
                         HASHES) == expected


def test_record_inserts(tmp_path: Path) -> None:
    '''Values that are not there yet come where one looks for them.'''
    text = without_hashes(TEXT)
    assert load(tmp_path, text)
    result = record.record(text, 'debian-min', 'x86_64', IDENTITY, HASHES)
    lines = result.splitlines()
    kept = [line for line in text.splitlines() if 'zst, format' not in line]
    assert [line for line in lines if line in kept] == kept
    assert lines[lines.index('      x86_64:') + 1] == (
        f'        identity: {IDENTITY}')
    at = lines.index('            format: qcow2')
    assert lines[at + 1:at + 3] == ['            size: 1003',
                                    f'            sha256: {"f" * 64}']
    assert ('          initrd: {file: initrd.cpio.zst, format: cpio, '
            f'size: 1002, sha256: {"2" * 64}}}') in lines
    # Now that they are there, they can be replaced
    again = record.record(result, 'debian-min', 'x86_64', ONE, HASHES)
    assert again == result.replace(IDENTITY, ONE)


@pytest.mark.parametrize('reason', [
    'the mirror is not reachable', 'the mirror  # too far', '"a mirror"',
    '>-\n          nobody has\n\n          locked it', '|\n          nobody\n',
    'nobody\n          has', '>-\n          nobody\n\n        # of artefacts'])
def test_record_removes(reason: str) -> None:
    '''What is recorded was locked: the lines that deny it go.'''
    old = '        not-locked: the mirror is not reachable\n'
    text = TEXT.replace(old, '        # of it\n'
                        f'        not-locked: {reason}\n')
    result = record.record(text, 'fedora-min', 'aarch64', IDENTITY, HASHES)
    assert 'not-locked' not in result and 'nobody' not in result
    assert result.count('# of artefacts') == text.count('# of artefacts')
    again = record.record(TEXT.replace(old, '        # of it\n'),
                          'fedora-min', 'aarch64', IDENTITY, HASHES)
    assert result.replace('        # of artefacts\n', '') in (
        again, again.replace('# of it\n', '# of it\n\n'))


def test_record_in_braces() -> None:
    '''An image that is written on few lines.'''
    text = TEXT.replace('        not-locked: the mirror is not reachable\n',
                        '')
    result = record.record(text, 'fedora-min', 'aarch64', IDENTITY, HASHES)
    assert (f'      aarch64:\n        identity: {IDENTITY}\n        artefacts:'
            '\n          kernel: {file: vmlinuz, format: image, size: 1001, '
            in result)
    braces = ('schema: 1\nimages: {a: {description: d, definition: d, '
              'distribution: d, release: d, architectures: {x86_64: {'
              'artefacts: {kernel: {file: k, format: bzimage}, initrd: '
              '{file: i, format: cpio}, disk: {file: d, format: qcow2}}, '
              "boot: {console: c, cmdline: [], disk-cmdline: [], "
              'disk-device: d, ready: r, prompt: p}, budget: {'
              'kernel-initrd-bytes: 1, disk-bytes: 1, packages: 1, '
              'initrd-boot-ratio: 1, disk-boot-ratio: 1}}}}}')
    result = record.record(braces, 'a', 'x86_64', IDENTITY, HASHES)
    assert f'x86_64: {{identity: {IDENTITY}, artefacts: ' in result


def test_record_without_last_newline() -> None:
    '''The last line need not end.'''
    text = without_hashes(TEXT)
    start = text.index('        artefacts:\n')
    end = text.index('        boot:\n')
    rest = text[end:text.index('  fedora-min:')]
    moved = (text[:start] + rest + text[start:end]).rstrip('\n')
    result = record.record(moved, 'debian-min', 'x86_64', IDENTITY, HASHES)
    assert result.endswith(f'format: qcow2\n            size: 1003\n'
                           f'            sha256: {"f" * 64}')


@pytest.mark.parametrize('image, arch, identity, hashes, message', [
    ('debian', 'x86_64', IDENTITY, HASHES, "did you mean 'debian-min'"),
    ('debian-min', 'aarch64', IDENTITY, HASHES, 'there are: x86_64'),
    ('debian-min', 'x86_64', 'short', HASHES, '64 lower-case hex'),
    ('debian-min', 'x86_64', IDENTITY, {'disk': HASHES['disk']},
     'hashes given for: disk; expected for: kernel, initrd, disk'),
    ('debian-min', 'x86_64', IDENTITY, {**HASHES, 'disk': ('f' * 64, 0)},
     'expected a positive whole number'),
    ('debian-min', 'x86_64', IDENTITY,
     {**HASHES, 'disk': ('x\n    evil: 1', 1)}, ''),
])
def test_record_refuses(image: str, arch: str, identity: str,
                        hashes: Dict[str, Tuple[str, int]],
                        message: str) -> None:
    '''Nothing is written that would not be read back as it was meant.'''
    with pytest.raises(RegistryError) as caught:
        record.record(TEXT, image, arch, identity, hashes)
    assert message in str(caught.value)


def test_record_refuses_carriage_returns() -> None:
    '''Lines of another kind would be mixed with our own.'''
    with pytest.raises(RegistryError, match='LF alone'):
        record.record(TEXT.replace('\n', '\r\n'), 'debian-min', 'x86_64',
                      IDENTITY, HASHES)


PIECES = ['&a ', '*a', '!!str ', '!x ', '- ', ': ', '? ', '{', '}', '[', ']',
          '"', "'", '|', '>', '#', '\n', '  ', '\t', '---\n', '...\n', ',',
          'null', 'true', '1', '-1', '.inf', '\0', '\ud800', '\U0001f600',
          '%YAML 1.1\n', 'identity', 'size: 1', '<<: ', '\r', '\x85', '..',
          '=', '0x1', '1e9', '2001-01-01', '~', '@', '`', '\\', '9' * 99]


def mutated(rng: random.Random) -> str:
    '''A text that differs from a valid one in a few random places.'''
    text = rng.choice([TEXT, without_hashes(TEXT)])
    for _ in range(rng.randint(1, 4)):
        start = rng.randrange(len(text))
        end = start + rng.choice([0, 0, 1, 2, 10, 80])
        text = text[:start] + rng.choice(
            [rng.choice(PIECES), text[end:end + 30], '']) + text[end:]
    return text


@pytest.mark.parametrize('seed', range(8))
def test_random_texts(seed: int) -> None:
    '''Whatever is wrong with a text, it is a RegistryError and no other.

    And what record() makes of it reads back, or is refused.
    '''
    rng = random.Random(seed)
    refused = 0
    for _ in range(40):
        text = mutated(rng)
        try:
            result = record.record(text, 'debian-min', 'x86_64', IDENTITY,
                                   HASHES)
        except RegistryError:
            refused += 1
            continue
        kept = [line for line in text.splitlines()
                if not re.search('identity|size|sha256|format: cpio', line)]
        assert all(line in result.splitlines() for line in kept)
    assert refused
