# SPDX-License-Identifier: GPL-2.0-or-later
'''
What a definition must have so that everybody builds the same bytes of it,
checked without building. Each rule is a function; the manual has a line a
rule, too.
'''

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, Iterator, List, Mapping, Sequence, Tuple

from . import lock as locks, settings as mkosi
from .build import Job, mkosi_options, tools_folder
from .error import BuildError
from .lock import Lock
from .nodes import suggestion
from .registry import Image, Registry, Target
from .settings import FALSE, TRUE, Setting, SettingError
from .tools import MKOSI_ARCHITECTURES

# File systems whose mkfs makes the same bytes twice
REPRODUCIBLE = ('ext4', 'erofs', 'squashfs')
# Formats that are, or have, a file system that systemd-repart makes
DISKS = ('disk', 'esp', 'sysext', 'confext', 'portable')

_UUID = re.compile(r'[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}', re.I)
_EXT4 = 'SYSTEMD_REPART_MKFS_OPTIONS_EXT4'


@dataclass(frozen=True)
class Definition:
    '''
    A definition for one architecture: its @folder, and its @settings with
    the builder's, in the order in which they take effect.
    '''
    folder: Path
    settings: Sequence[Setting]

    @property
    def base(self) -> Path:
        '''What messages name files relative to.'''
        return self.folder.parent

    def place(self, section: str) -> str:
        '''Where a setting of @section that is not there would go.'''
        conf = self.folder / 'mkosi.conf'
        lines = [s.line for s in mkosi.read(conf, self.base)
                 if s.section == section]
        file = conf.relative_to(self.base).as_posix()
        return f'{file}:{lines[0] if lines else 1}'

    def lacks(self, section: str, name: str, expected: str,
              next_step: str) -> SettingError:
        '''The error for a setting that is not there.'''
        return SettingError(self.place(section), f'[{section}] {name}=',
                            expected, 'none', next_step)


def _wrong(setting: Setting, expected: str,
           next_step: str) -> SettingError:
    return SettingError(setting.place,
                        f'[{setting.section}] {setting.name}=', expected,
                        repr(setting.value), next_step)


# -- The rules --------------------------------------------------------------

Found = Iterator[SettingError]


def _seed(definition: Definition) -> Found:
    '''UUIDs of partitions and file systems are derived from a seed.'''
    setting = mkosi.last(definition.settings, 'Seed')
    step = 'write one that uuidgen prints, and never change it'
    if setting is None:
        yield definition.lacks('Output', 'Seed', 'a UUID', step)
    elif not _UUID.fullmatch(setting.value):
        yield _wrong(setting, 'a UUID', step)


def _epoch(definition: Definition) -> Found:
    '''No time of an image is later than the lock's epoch.'''
    setting = mkosi.last(definition.settings, 'SourceDateEpoch')
    step = ('leave it to the builder, which takes the epoch of the lock: '
            'scripts/mkosi-build.py ARCH IMAGE --update-lock')
    if setting is None:
        yield definition.lacks('Content', 'SourceDateEpoch',
                               'the seconds of the lock\'s epoch', step)
    elif not setting.value.isdecimal():
        yield _wrong(setting, 'the seconds of the lock\'s epoch', step)
    own = mkosi.environment(definition.settings).get('SOURCE_DATE_EPOCH')
    if own is not None:
        yield SettingError(own.place, 'Environment=SOURCE_DATE_EPOCH',
                           'no other epoch than the lock\'s',
                           repr(own.value), step)


def _partitions(definition: Definition) -> List[List[Setting]]:
    '''The settings of each file that systemd-repart reads.'''
    found: Dict[str, Path] = {}
    for setting in definition.settings:
        if setting.name == 'RepartDirectories':
            if not setting.value:
                found.clear()
                continue
            for path in Path(setting.value).glob('*.conf'):
                found[path.name] = path
    return [mkosi.read(path, definition.base)
            for _, path in sorted(found.items())]


def _root(definition: Definition) -> Found:
    '''The root file system is of a kind that can be made twice.'''
    chosen = mkosi.last(definition.settings, 'Format')
    if chosen is not None and chosen.value not in DISKS:
        return
    roots = 0
    step = 'write one of them into its file in mkosi.repart'
    for partition in _partitions(definition):
        kind = mkosi.last(partition, 'Type')
        if kind is None or not re.fullmatch(
                r'(root|usr)(-(?!.*verity).*)?', kind.value):
            continue
        roots += kind.value.startswith('root')
        expected = f'one of {", ".join(REPRODUCIBLE)}'
        system = mkosi.last(partition, 'Format')
        if system is None:
            yield SettingError(kind.place, '[Partition] Format=', expected,
                               'none', step)
        elif system.value not in REPRODUCIBLE:
            yield _wrong(system, expected, step)
        elif system.value == 'ext4':
            yield from _hash_seed(definition, system)
    if not roots:
        yield SettingError(
            definition.place('Output'), 'mkosi.repart',
            'a file with Type=root', 'none, so that mkosi would choose the '
            'file system of the root', 'add it, see repart.d(5)')


def _hash_seed(definition: Definition, system: Setting) -> Found:
    '''
    ext4 hashes the names in a folder with a seed, which is random if it is
    not told; mke2fs keeps but the last -E that it is given.
    '''
    step = (f'write Environment="{_EXT4}=-E hash_seed=UUID,..." with one -E '
            'for all that it takes')
    setting = mkosi.environment(definition.settings).get(_EXT4)
    if setting is None:
        yield SettingError(system.place, f'ext4 without {_EXT4}',
                           '-E hash_seed=UUID in the environment', 'none',
                           step)
        return
    extended = re.findall(r'-E\s*(\S+)', setting.value)
    seeds = re.findall(r'(?:^|,)hash_seed=([^,]*)',
                       extended[-1] if extended else '')
    if len(extended) != 1 or not any(map(_UUID.fullmatch, seeds)):
        yield SettingError(setting.place, f'Environment={_EXT4}',
                           'one -E, with hash_seed=UUID',
                           repr(setting.value), step)


def _clean(definition: Definition) -> Found:
    '''Whether package managers' databases stay is not left to mkosi.'''
    name = 'CleanPackageMetadata'
    setting = mkosi.last(definition.settings, name)
    step = ('write yes: the databases have times and orders that differ; or '
            'no, and normalise them in mkosi.finalize')
    if setting is None:
        yield definition.lacks('Content', name, 'yes or no', step)
    elif setting.value.lower() not in TRUE + FALSE:
        yield _wrong(setting, 'yes or no', step)


def _password(definition: Definition) -> Found:
    '''A clear password is salted anew by each build.'''
    setting = mkosi.last(definition.settings, 'RootPassword')
    if (setting is not None and setting.value
            and not setting.value.startswith('hashed:')):
        # It may be somebody's
        yield SettingError(setting.place, '[Content] RootPassword=',
                           'none, or hashed:...', 'one in clear text, which '
                           'each build salts anew', 'write what openssl '
                           'passwd -6 -salt SALT prints behind hashed:')


def _network(definition: Definition) -> Found:
    '''A build has the packages of its lock and nothing else.'''
    chosen = [s for s in definition.settings if s.name == 'WithNetwork']
    step = ('remove the line; what a script would fetch goes into a package '
            'or into the definition')
    for setting in chosen:
        if setting.value.lower() not in FALSE:
            yield _wrong(setting, 'no', step)
    if not chosen:
        yield definition.lacks('Build', 'WithNetwork', 'no', step)


RULES = (_seed, _epoch, _root, _clean, _password, _network)


# -- Known settings ---------------------------------------------------------

def _unknown(settings: Sequence[Setting],
             names: Mapping[str, Sequence[str]]) -> Found:
    '''
    What mkosi or systemd-repart would pass over with a warning, or
    without: sections and settings that they don't know.
    '''
    homes = {name: section for section, there in names.items()
             for name in there if not section.endswith('Match')}
    for setting in settings:
        section, name = setting.section, setting.name
        if section not in names:
            if not name:
                yield SettingError(
                    setting.place, 'section', 'one that is known',
                    f'[{section}]', suggestion(section, sorted(names)))
        elif not name or name in names[section]:
            continue
        elif name in homes:
            yield SettingError(
                setting.place, f'{name}=', f'it in [{homes[name]}]',
                f'it in [{section}]', 'move the line there')
        else:
            yield SettingError(
                setting.place, f'[{section}]', 'a known setting',
                f'{name}=', suggestion(name, sorted(names[section])))


def known(folder: Path) -> Iterator[BuildError]:
    '''
    What is wrong with the syntax and the names of all settings of the
    definition in @folder, whatever they match. Raises what
    lock.included() does.
    '''
    for where in (folder, *locks.included(folder)):
        for pattern, names in (
                ('mkosi.conf', mkosi.KNOWN),
                ('mkosi.conf.d/**/*.conf', mkosi.KNOWN),
                ('mkosi.repart/**/*.conf', mkosi.KNOWN_REPART)):
            for path in sorted(where.glob(pattern)):
                try:
                    yield from _unknown(
                        mkosi.read(path, folder.parent),
                        {key: sorted(value) for key, value in names.items()})
                except SettingError as e:
                    yield e


# -- All together -----------------------------------------------------------

def facts(image: Image, arch: str) -> Dict[str, str]:
    '''What [Match] sections of the definition of @image may ask for.'''
    return {'Architecture': MKOSI_ARCHITECTURES[arch],
            'Distribution': image.distribution, 'Release': image.release}


def check(folder: Path, asked: Mapping[str, str],
          options: Sequence[str]) -> List[BuildError]:
    '''
    All that is wrong with the definition in @folder for a build of @asked,
    see facts(), by mkosi's @options.
    '''
    found: List[BuildError] = []
    try:
        found += known(folder)
        if found:
            # Rules would report the consequences
            return found
        definition = Definition(folder,
                                mkosi.resolve(folder, asked, options))
        for rule in RULES:
            found += rule(definition)
    except BuildError as e:
        found.append(e)
    return found


def problems(registry: Registry,
             chosen: Sequence[Tuple[Image, Target]]) -> List[BuildError]:
    '''
    What is wrong with the definitions of the images @chosen, and of the
    tools.
    '''
    found = list(known(tools_folder(registry)))
    for image, target in chosen:
        folder = registry.path.parent / image.definition
        # That there is none is for others to tell
        if (folder / 'mkosi.conf').is_file():
            # Nothing of a lock but its epoch is in the options
            lock = Lock('', image.distribution, image.release, target.arch,
                        0, ())
            job = Job(image, target, folder, '', lock, lock, ())
            found += check(folder, facts(image, target.arch),
                           mkosi_options(job, Path('/work'), 'file:///'))
    return found
