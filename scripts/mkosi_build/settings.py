# SPDX-License-Identifier: GPL-2.0-or-later
'''
The settings of a definition as mkosi will see them: of each file that it
reads, in its order, with what is included and what matches. Nothing is
run, so that a definition can be judged, and a build planned, on any host.

The syntax, the order and the names are those of the mkosi that the tools
lock names, mkosi(1) of 25.3, and of repart.d(5) of systemd 257.
'''

import re
import shlex
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, FrozenSet, List, Mapping, Optional, Sequence

from .error import InputError

# By section, what mkosi knows
KNOWN: Mapping[str, FrozenSet[str]] = {
    section: frozenset(names.split()) for section, names in {
        'Match': '''
            Architecture Bootable BuildSources Distribution Environment
            Format HostArchitecture ImageId ImageVersion PathExists Profiles
            Release Repositories SystemdVersion ToolsTreeDistribution
            ToolsTreeRelease''',
        'Include': 'Include',
        'Config': '''
            ConfigureScripts Dependencies MinimumVersion PassEnvironment
            Profiles''',
        'Distribution': '''
            Architecture Distribution LocalMirror Mirror Release
            Repositories RepositoryKeyCheck RepositoryKeyFetch''',
        'Output': '''
            CleanScripts CompressLevel CompressOutput Format ImageId
            ImageVersion ManifestFormat Output OutputDirectory OutputMode
            Overlay RepartDirectories SectorSize Seed SplitArtifacts''',
        'Content': '''
            Autologin BaseTrees BiosBootloader Bootable Bootloader
            BuildPackages BuildScripts CleanPackageMetadata Devicetree
            ExtraTrees FinalizeScripts Hostname InitrdPackages
            InitrdVolatilePackages Initrds KernelCommandLine
            KernelModulesExclude KernelModulesInclude
            KernelModulesIncludeHost KernelModulesInitrd
            KernelModulesInitrdExclude KernelModulesInitrdInclude
            KernelModulesInitrdIncludeHost Keymap Locale LocaleMessages
            MachineId MakeInitrd MicrocodeHost PackageDirectories Packages
            PostInstallationScripts PostOutputScripts PrepareScripts
            RemoveFiles RemovePackages RootPassword RootShell
            SELinuxRelabel ShimBootloader SkeletonTrees SourceDateEpoch Ssh
            SyncScripts Timezone UnifiedKernelImageFormat
            UnifiedKernelImageProfiles UnifiedKernelImages
            VolatilePackageDirectories VolatilePackages WithDocs
            WithRecommends''',
        'Validation': '''
            Checksum Key OpenPGPTool Passphrase SecureBoot
            SecureBootAutoEnroll SecureBootCertificate
            SecureBootCertificateSource SecureBootKey SecureBootKeySource
            SecureBootSignTool Sign SignExpectedPcr
            SignExpectedPcrCertificate SignExpectedPcrCertificateSource
            SignExpectedPcrKey SignExpectedPcrKeySource Verity
            VerityCertificate VerityCertificateSource VerityKey
            VerityKeySource''',
        'Build': '''
            BuildDirectory BuildSources BuildSourcesEphemeral CacheDirectory
            CacheOnly Environment EnvironmentFiles ExtraSearchPaths History
            Incremental PackageCacheDirectory ProxyClientCertificate
            ProxyClientKey ProxyExclude ProxyPeerCertificate ProxyUrl
            RepartOffline SandboxTrees ToolsTree ToolsTreeCertificates
            ToolsTreeDistribution ToolsTreeMirror
            ToolsTreePackageDirectories ToolsTreePackages ToolsTreeRelease
            ToolsTreeRepositories ToolsTreeSandboxTrees UseSubvolumes
            WithNetwork WithTests WorkspaceDirectory''',
        'Runtime': '''
            CDROM CPUs Console Credentials Drives Ephemeral Firmware
            FirmwareVariables ForwardJournal KVM KernelCommandLineExtra
            Linux Machine NSpawnSettings QemuArgs RAM Register Removable
            RuntimeBuildSources RuntimeHome RuntimeNetwork RuntimeScratch
            RuntimeSize RuntimeTrees SshCertificate SshKey
            SysupdateDirectory TPM UnitProperties VSock VSockCID
            VirtualMachineMonitor''',
    }.items()}
KNOWN = {**KNOWN, 'TriggerMatch': KNOWN['Match']}

# What systemd-repart knows
KNOWN_REPART: Mapping[str, FrozenSet[str]] = {'Partition': frozenset('''
    Compression CompressionLevel CopyBlocks CopyFiles DefaultSubvolume
    Encrypt EncryptedVolume ExcludeFiles ExcludeFilesTarget FactoryReset
    Flags Format GrowFileSystem Label MakeDirectories MakeSymlinks Minimize
    MountPoint NoAuto PaddingMaxBytes PaddingMinBytes PaddingWeight Priority
    ReadOnly SizeMaxBytes SizeMinBytes SplitName Subvolumes SupplementFor
    Type UUID Verity VerityDataBlockSizeBytes VerityHashBlockSizeBytes
    VerityMatchKey Weight'''.split())}

# Files and folders of a definition that are settings by being there: those
# of which the whole text is the value, and those whose path is
TEXTS = {'mkosi.rootpw': ('Content', 'RootPassword'),
         'mkosi.seed': ('Output', 'Seed')}
PATHS = {'mkosi.repart': ('Output', 'RepartDirectories')}

TRUE = ('1', 'yes', 'y', 'true', 't', 'on', 'always')
FALSE = ('0', 'no', 'n', 'false', 'f', 'off', 'never')


@dataclass(frozen=True)
class Setting:
    '''
    One setting. @file is relative to the folder of all definitions, @line
    begins with 1. A section without a @name is the header itself.
    '''
    file: str
    line: int
    section: str
    name: str
    value: str

    @property
    def place(self) -> str:
        '''File and line, for messages.'''
        return f'{self.file}:{self.line}' if self.line else self.file


class SettingError(InputError):
    '''
    What is wrong with a setting: @place is its file and line, @what its
    name or the problem's; @expected and @found say it in a few words.
    '''

    def __init__(self, place: str, what: str, expected: str, found: str,
                 next_step: str) -> None:
        super().__init__(f'{place}: {what}: expected {expected}, found '
                         f'{found}', next_step=next_step)
        self.place = place
        self.what = what
        self.expected = expected
        self.found = found


def _text(path: Path, file: str) -> str:
    try:
        return path.read_text(encoding='utf-8')
    except UnicodeDecodeError as e:
        raise SettingError(file, 'content', 'UTF-8',
                           f'{e.reason} at {e.start}',
                           'save it as UTF-8') from e


def read(path: Path, base: Path) -> List[Setting]:
    '''
    All settings in the file @path, headers among them, by the rules of
    mkosi's own parser; messages name it relative to @base. Raises
    SettingError for what mkosi would not read.
    '''
    file = path.relative_to(base).as_posix()
    found: List[Setting] = []
    section = name = ''
    text = textwrap.dedent(_text(path, file))
    for number, raw in enumerate(text.splitlines(), 1):
        line = raw.partition('#')[0].rstrip()
        if not line:
            continue
        if line[0].isspace() and name:
            begun = found.pop()
            found.append(Setting(file, begun.line, section, name,
                                 f'{begun.value}\n{line.strip()}'))
            continue
        line = line.strip()
        if line[0] == '[' and line[-1] == ']' and line[1:-1].strip():
            section, name = line[1:-1].strip(), ''
            found.append(Setting(file, number, section, '', ''))
            continue
        name, equals, value = (word.strip() for word in line.partition('='))
        if not (section and name and equals):
            raise SettingError(
                f'{file}:{number}', 'syntax',
                'NAME=VALUE below a [SECTION]', repr(line),
                'correct the line, or indent it if it goes on with the one '
                'above')
        found.append(Setting(file, number, section, name, value))
    return found


def from_options(options: Sequence[str]) -> List[Setting]:
    '''What the command line @options, --name=value, set.'''
    sections = {name: section for section, names in KNOWN.items()
                for name in names if not section.endswith('Match')}
    found = []
    for option in options:
        if option.startswith('--') and '=' in option:
            key, _, value = option[2:].partition('=')
            name = ''.join(word.capitalize() for word in key.split('-'))
            # Others, such as --directory, are no settings
            if name in sections:
                found.append(Setting('the builder', 0, sections[name], name,
                                     value))
    return found


def last(settings: Sequence[Setting], name: str) -> Optional[Setting]:
    '''The one that counts where a setting has one value.'''
    return next((s for s in reversed(settings) if s.name == name), None)


def words(setting: Setting) -> List[str]:
    '''The words of a value, which may be quoted. Raises SettingError.'''
    try:
        return shlex.split(setting.value)
    except ValueError as e:
        raise SettingError(setting.place, setting.name,
                           'closing quotes', str(e), 'correct them') from e


def environment(settings: Sequence[Setting]) -> Dict[str, Setting]:
    '''
    By variable, the last setting of it; its value is the variable's. An
    empty Environment= forgets those before it.
    '''
    found: Dict[str, Setting] = {}
    for setting in settings:
        if setting.name == 'Environment':
            if not setting.value:
                found.clear()
            for word in words(setting):
                name, _, value = word.partition('=')
                found[name] = Setting(setting.file, setting.line,
                                      setting.section, name, value)
    return found


def _matches(settings: Sequence[Setting], facts: Mapping[str, str]) -> bool:
    '''
    Whether a file with these @settings counts for a build of which @facts
    are known. Raises SettingError for conditions beyond that.
    '''
    for setting in settings:
        if setting.section not in ('Match', 'TriggerMatch'):
            continue
        value = setting.value
        negate = value.startswith('!')
        if (setting.section == 'TriggerMatch' or value.startswith('|')
                or setting.name and setting.name not in facts):
            raise SettingError(
                setting.place, f'[{setting.section}]',
                f'conditions on {", ".join(facts)}, with ! at most',
                f'{setting.name}={value}' if setting.name
                else 'another section', 'write it with these')
        if setting.name and negate == (facts[setting.name]
                                       == value.lstrip('!')):
            return False
    return True


class _Resolver:
    '''Collects @found as mkosi goes from file to file.'''

    def __init__(self, base: Path, facts: Mapping[str, str]) -> None:
        self.base = base
        self.facts = facts
        self.found: List[Setting] = []
        self.included: List[Path] = []

    def folder(self, where: Path) -> None:
        '''mkosi.conf and what is beside it.'''
        conf = where / 'mkosi.conf'
        settings = read(conf, self.base) if conf.exists() else []
        if not _matches(settings, self.facts):
            return
        for name, (section, key) in {**TEXTS, **PATHS}.items():
            path = where / name
            if path.exists():
                file = path.relative_to(self.base).as_posix()
                value = (_text(path, file).rstrip('\n') if name in TEXTS
                         else str(path))
                self.found.append(Setting(file, 1, section, key, value))
        self.take(where, settings)
        more = where / 'mkosi.conf.d'
        for path in sorted(more.iterdir()) if more.is_dir() else []:
            if path.is_dir():
                self.folder(path)
            elif path.suffix == '.conf':
                settings = read(path, self.base)
                if _matches(settings, self.facts):
                    self.take(where, settings)

    def take(self, where: Path, settings: Sequence[Setting]) -> None:
        '''The settings of one file; what it includes comes in its place.'''
        for setting in settings:
            if not setting.name or setting.section.endswith('Match'):
                continue
            if setting.name == 'RepartDirectories' and setting.value:
                setting = Setting(setting.file, setting.line,
                                  setting.section, setting.name,
                                  str(where / setting.value))
            self.found.append(setting)
            if setting.name == 'Include':
                for name in re.split(r'[\s,]+', setting.value):
                    # As the definition's digest has it; see lock.py
                    path = self.base / name.rpartition('/')[2]
                    if path not in self.included:
                        self.included.append(path)
                        self.folder(path)


def resolve(folder: Path, facts: Mapping[str, str],
            options: Sequence[str]) -> List[Setting]:
    '''
    The settings of the definition in @folder in the order in which they
    take effect, for a build with mkosi's @options. @facts are what [Match]
    sections ask for: Architecture, Distribution, Release.
    '''
    resolver = _Resolver(folder.parent, facts)
    resolver.folder(folder)
    return resolver.found + from_options(options)
