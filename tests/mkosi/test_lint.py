# SPDX-License-Identifier: GPL-2.0-or-later
'''
What --check says of definitions: ours are clean, each rule notices its
fault, with file and line, and the settings that we take for known are
those of the locked mkosi.
'''

import json
from pathlib import Path
import shutil
import subprocess
import sys
from typing import Dict, List, Tuple

import pytest

from fixtures_builder import ROOT, Project
from mkosi_build import lint, registry as registries, settings
from mkosi_build.error import BuildError
from mkosi_build.settings import SettingError

pytest_plugins = ['fixtures_builder']

DEFINITIONS = ROOT / 'tests/functional/mkosi'
FACTS = {'Architecture': 'x86-64', 'Distribution': 'debian',
         'Release': 'trixie'}
OPTIONS = ['--distribution=debian', '--release=trixie',
           '--architecture=x86-64', '--source-date-epoch=1700000000',
           '--with-network=no']


# Ours

def test_ours_are_clean() -> None:
    '''All images for all architectures, locked or not, and the tools.'''
    registry = registries.load(registries.DEFAULT)
    chosen = [(image, target) for image in registry.images.values()
              for target in image.targets.values()]
    assert len(chosen) >= 4
    assert not [str(e) for e in lint.problems(registry, chosen)]


# One fault a rule

@pytest.fixture(name='copy')
def fixture_copy(tmp_path: Path) -> Path:
    '''A copy of our definitions.'''
    for name in ('common', 'debian-min'):
        shutil.copytree(DEFINITIONS / name, tmp_path / name, symlinks=True)
    return tmp_path


def edit(path: Path, old: str, new: str) -> None:
    '''Replace the one @old in the file @path by @new.'''
    text = path.read_text()
    assert text.count(old) == 1, old
    path.write_text(text.replace(old, new))


def check(copy: Path, options: List[str]) -> List[BuildError]:
    '''What is wrong with the image's definition in @copy.'''
    return lint.check(copy / 'debian-min', FACTS, options)


def line_of(path: Path, text: str) -> int:
    '''The number of the one line of the file @path that has @text.'''
    number, = (n for n, line in enumerate(path.read_text().splitlines(), 1)
               if text in line)
    return number


IMAGE = 'debian-min/mkosi.conf'
COMMON = 'common/mkosi.conf'
ROOTFS = 'common/mkosi.repart/10-root.conf'
HASH_SEED = ',hash_seed=5b1c1e2e-6c0f-4a35-8d0c-6f6e0c3a9b57'

# Of a rule: file, what is there, what is put in its place, a text of the
# line that must be named, what must be said of it
FAULTS: Dict[str, Tuple[str, str, str, str, str]] = {
    'no seed': (
        IMAGE, 'Seed=d9d2c7ac', 'ImageId=d9d2c7ac', '[Output]',
        '[Output] Seed=: expected a UUID, found none'),
    'random seed': (
        IMAGE, 'Seed=d9d2c7ac-6ae9-4ef7-a3e9-2f7a7e9ad14c', 'Seed=random',
        'Seed=random', "expected a UUID, found 'random'"),
    'other epoch': (
        IMAGE, 'INITRD=No', 'SOURCE_DATE_EPOCH=1 INITRD=No', 'INITRD=No',
        "no other epoch than the lock's, found '1'"),
    'btrfs': (
        ROOTFS, 'Format=ext4', 'Format=btrfs', 'Format=btrfs',
        "expected one of ext4, erofs, squashfs, found 'btrfs'"),
    'no file system': (
        ROOTFS, 'Format=ext4', '', 'Type=root',
        'expected one of ext4, erofs, squashfs, found none'),
    'no root': (
        ROOTFS, 'Type=root', 'Type=linux-generic', '[Output]',
        'expected a file with Type=root'),
    'no hash seed': (
        COMMON, HASH_SEED, '', 'Environment=',
        'expected one -E, with hash_seed=UUID'),
    'forgotten hash seed': (
        COMMON, HASH_SEED, f' -O quota -E {HASH_SEED[1:]}', 'Environment=',
        'expected one -E, with hash_seed=UUID'),
    'no clean': (
        COMMON, 'CleanPackageMetadata=yes', '', '',
        '[Content] CleanPackageMetadata=: expected yes or no, found none'),
    'auto clean': (
        COMMON, 'CleanPackageMetadata=yes', 'CleanPackageMetadata=auto',
        'CleanPackageMetadata=', "expected yes or no, found 'auto'"),
    'password': (
        COMMON, 'WithDocs=no', 'RootPassword=secret', 'RootPassword=',
        'expected none, or hashed:..., found one in clear text'),
    'network': (
        COMMON, '[Build]', '[Build]\nWithNetwork=yes', 'WithNetwork=',
        "[Build] WithNetwork=: expected no, found 'yes'"),
    'unknown setting': (
        COMMON, 'WithDocs=no', 'WithDoc=no', 'WithDoc=',
        "expected a known setting, found WithDoc="),
    'unknown section': (
        COMMON, '[Build]', '[Builds]', '[Builds]',
        'section: expected one that is known, found [Builds]'),
    'other section': (
        COMMON, 'SectorSize=512', 'WithTests=no', 'WithTests=',
        'WithTests=: expected it in [Build], found it in [Output]'),
    'unknown in a partition': (
        ROOTFS, 'Label=', 'Lable=', 'Lable=',
        'expected a known setting, found Lable='),
    'unknown where nothing matches': (
        'debian-min/mkosi.conf.d/aarch64.conf', 'Packages=', 'Package=',
        'Package=', "did you mean 'Packages'"),
    'unknown condition': (
        'common/mkosi.conf.d/x86_64.conf', 'Architecture=x86-64',
        'PathExists=/etc', 'PathExists=', 'expected conditions on '
        'Architecture, Distribution, Release, with ! at most'),
    'no setting': (
        COMMON, 'WithDocs=no', 'WithDocs', 'WithDocs',
        'syntax: expected NAME=VALUE below a [SECTION]'),
    'quotes': (
        IMAGE, 'INITRD=No', '"INITRD=No', 'INITRD=No',
        'Environment: expected closing quotes'),
}


@pytest.mark.parametrize('name', FAULTS)
def test_fault(name: str, copy: Path) -> None:
    '''It is found, alone, and the message says where, and what next.'''
    file, old, new, where, expected = FAULTS[name]
    assert not check(copy, OPTIONS)
    edit(copy / file, old, new)
    found, = check(copy, OPTIONS)
    assert isinstance(found, SettingError)
    assert expected in str(found)
    assert found.expected in found.message and found.next_step
    place = file
    if where in ('', '[Output]'):
        # What is not there is missed in the image's own file
        place, where = IMAGE, where or '[Content]'
    assert found.place == f'{place}:{line_of(copy / place, where)}'


@pytest.mark.parametrize('option, expected', [
    ('--source-date-epoch=', "expected the seconds of the lock's epoch"),
    ('--with-network=', 'WithNetwork=: expected no, found none')])
def test_builder(option: str, expected: str, copy: Path) -> None:
    '''What the builder has to give, and would not.'''
    found, = check(copy, [o for o in OPTIONS if not o.startswith(option)])
    assert expected in str(found)


@pytest.mark.parametrize('option', ['--source-date-epoch=soon',
                                    '--with-network=yes'])
def test_builder_wrong(option: str, copy: Path) -> None:
    '''What the builder would give wrongly.'''
    found, = check(copy, [*OPTIONS, option])
    assert 'the builder: ' in str(found)


# What is not in a line

def test_password_file(copy: Path) -> None:
    '''A file is as good as a line; its content is not shown.'''
    (copy / 'common/mkosi.rootpw').write_text('secret\n')
    found, = check(copy, OPTIONS)
    assert 'common/mkosi.rootpw:1: [Content] RootPassword=' in str(found)
    assert 'secret' not in str(found)
    (copy / 'common/mkosi.rootpw').write_text('hashed:$6$salt$0123\n')
    assert not check(copy, OPTIONS)


def test_seed_file(copy: Path) -> None:
    '''So it is with the seed.'''
    edit(copy / IMAGE, 'Seed=', 'ImageId=')
    (copy / 'debian-min/mkosi.seed').write_text(
        'd9d2c7ac-6ae9-4ef7-a3e9-2f7a7e9ad14c\n')
    assert not check(copy, OPTIONS)


def test_no_partitions(copy: Path) -> None:
    '''Without any file mkosi chooses, for Fedora btrfs.'''
    shutil.rmtree(copy / 'common/mkosi.repart')
    assert 'expected a file with Type=root' in str(check(copy, OPTIONS)[0])
    edit(copy / COMMON, 'Format=disk', 'Format=cpio')
    assert not check(copy, OPTIONS)


@pytest.mark.parametrize('system', ['erofs', 'squashfs'])
def test_other_file_systems(system: str, copy: Path) -> None:
    '''They have no hash seed.'''
    edit(copy / ROOTFS, 'Format=ext4', f'Format={system}')
    edit(copy / COMMON, HASH_SEED, '')
    assert not check(copy, OPTIONS)


def test_order(copy: Path) -> None:
    '''The later setting counts, and what includes comes after.'''
    edit(copy / COMMON, '[Output]', '[Output]\nSeed=random')
    assert not check(copy, OPTIONS)
    drop_in = copy / 'debian-min/mkosi.conf.d/zz.conf'
    drop_in.write_text('[Match]\nArchitecture=!arm64\n'
                       '[Output]\nSeed=random\n')
    found, = check(copy, OPTIONS)
    assert 'debian-min/mkosi.conf.d/zz.conf:4: ' in str(found)
    edit(drop_in, '!arm64', 'arm64')
    assert not check(copy, OPTIONS)


# --check

def test_check(project: Project) -> None:
    '''All faults of all definitions, in one go, and the exit code.'''
    conf = project.definition / 'mkosi.conf'
    project.edit(conf, 'CleanPackageMetadata=yes\n', '')
    project.edit(conf, '[Content]', '[Content]\nRootPassword=x')
    result = project.run('--check')
    assert result.returncode == 3
    for text in ('the definition has changed',
                 'mini/mkosi.conf:12: [Content] CleanPackageMetadata=: ',
                 'mini/mkosi.conf:13: [Content] RootPassword=: '):
        assert result.stderr.count(text) == 1, result.stderr


# The truth

DUMP = '''\
import json
from mkosi import config
sections = {}
for setting in config.SETTINGS:
    sections.setdefault(setting.section, []).append(setting.name)
sections['Match'] = [s.name for s in config.SETTINGS if s.match]
sections['Match'] += [m.name for m in config.MATCHES]
files = {path: [s.section, s.name] for s in config.SETTINGS
         for path in s.paths if s.path_read_text}
print(json.dumps([sections, files]))
'''


@pytest.mark.slow
def test_known_settings(tools_tree: Path) -> None:
    '''Our table has what the locked mkosi and systemd-repart know.'''
    said = subprocess.run(
        [sys.executable, '-B', '-c', DUMP], check=True,
        stdout=subprocess.PIPE,
        env={'PYTHONPATH': str(tools_tree / 'usr/lib/python3/dist-packages')})
    sections, files = json.loads(said.stdout)
    ours = {section: sorted(names)
            for section, names in settings.KNOWN.items()}
    assert ours.pop('TriggerMatch') == ours['Match']
    assert ours == {section: sorted(names)
                    for section, names in sections.items()}
    for name, found in settings.TEXTS.items():
        assert files[name] == list(found)
    program = (tools_tree / 'usr/bin/systemd-repart').read_bytes()
    for name in settings.KNOWN_REPART['Partition']:
        assert name.encode() + b'\0' in program, name
