# SPDX-License-Identifier: GPL-2.0-or-later
'''
Conditions that must not decide bytes, each of which a build can be put
under by itself, so that one that does can be found.

A build runs in mount, host name and network namespaces of its own: its
path, file system and host name can be others than this host's, nothing of
it stays when it ends, and it can fetch nothing.
'''

import os
import shlex
import shutil
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Callable, Dict, List, Mapping, Optional, Sequence, Tuple

from . import command
from .error import BuildError, HostError, UsageError

ALL = 'all'
NONE = 'none'

# A user who owns nothing
NOBODY = 65534
# The size of a file system for one build, in bytes; what a build wants to
# see free is 3 GiB, of which it takes the smaller part
SPACE = 5 << 30
MEMORY = 3 << 30

# All that is legal in a path, and more than one builder expects
OTHER_PATH = 'another/ünlike.path/which=is+rather~longer/than@the-first'
NOISE = {
    'PYTHONHASHSEED': '4242', 'SOURCE_DATE_EPOCH': '1', 'CANARY': 'noise',
    'COLUMNS': '33', 'TERM': 'xterm-256color', 'EDITOR': 'ed', 'LINES': '7',
    'USER': 'somebody', 'LOGNAME': 'somebody', 'SHELL': '/bin/false',
    'MAIL': '/nonexistent', 'PERL_HASH_SEED': '7', 'MALLOC_PERTURB_': '165',
    'ZSTD_CLEVEL': '1', 'XZ_DEFAULTS': '-0', 'XZ_OPT': '-0',
    'TAR_OPTIONS': '--numeric-owner', 'DPKG_COLORS': 'always',
    'DEB_BUILD_OPTIONS': 'nocheck', 'DEBIAN_FRONTEND': 'readline',
    'LS_COLORS': 'di=1', 'CDPATH': '/', 'MKOSI_CANARY': 'noise',
    'SYSTEMD_LOG_LEVEL': 'info', 'KERNEL_INSTALL_BYPASS': '0',
}
LOCALES = ('tr_TR.utf8', 'tr_TR', 'de_DE.utf8', 'en_US.utf8')
FAKETIME = 'libfaketime.so.1'


@dataclass
class Setting:
    '''
    What one build sees around itself; conditions change it.

    @params mount: an empty folder that everybody can reach
    @params folder: below it, what the build has to itself
    @params scratch: where the folder's files are, on the host's own file
                     system
    @params python: the interpreter
    @params file_system: shell lines that mount one on the folder
    @params disorder: shell lines that lay another one over it
    @params before: shell lines that are run last before the build
    @params after: shell lines that are run after it
    @params wrapper: the command that runs the builder's
    @params owner: the user who builds, if not the caller
    @params own_tools: whether the builder has to unpack the tools tree
    '''
    mount: Path
    folder: Path
    scratch: Path
    python: str
    env: Dict[str, str]
    file_system: List[str] = field(default_factory=list)
    disorder: List[str] = field(default_factory=list)
    before: List[str] = field(default_factory=list)
    after: List[str] = field(default_factory=list)
    wrapper: List[str] = field(default_factory=list)
    owner: Optional[int] = None
    own_tools: bool = False


@dataclass(frozen=True)
class Host:
    '''
    What this host lets the caller do.

    @params namespaces: the command that enters those of a build, as root
    @params back: the command that is the caller again in there
    @params root: whether the caller may mount and be any user
    @params shared: the folders that other users have to read
    '''
    namespaces: Sequence[str]
    root: bool
    shared: Sequence[Path] = ()
    back: Sequence[str] = ()


@dataclass(frozen=True)
class Condition:
    '''
    One condition.

    @params changes: what is another in a build under it
    @params apply: puts a build under it
    @params obstacle: why this host can't, None if it can
    @params by_default: whether 'all' has it
    '''
    name: str
    changes: str
    apply: Callable[[Setting], None]
    obstacle: Callable[[Host], Optional[BuildError]] = lambda _: None
    by_default: bool = True


def look(shared: Sequence[Path]) -> Host:
    '''
    What this host can. Raises HostError where no build can have namespaces
    of its own.
    '''
    command.check_programs({'unshare': 'util-linux',
                            'setpriv': 'util-linux', 'mount': 'mount'})
    own = ['unshare', '--mount', '--uts', '--net', '--']
    if os.getuid() == 0 and not command.run([*own, 'true']).returncode:
        return Host(own, True, shared)
    own[1:1] = ['--user', '--map-root-user']
    if command.run([*own, 'true']).returncode:
        # It knows the switches that close them
        command.check_namespaces()
        raise HostError('this host refuses the namespaces that a build '
                        'under other conditions runs in: '
                        f'{command.run([*own, "true"]).stderr.strip()}',
                        next_step='run it as root, or in a container that '
                        'allows mount and user namespaces')
    # Who believes to be root but is not unpacks as root, and fails
    return Host(own, False, shared, [
        'unshare', '--user', f'--map-user={os.getuid()}',
        f'--map-group={os.getgid()}', '--'])


# -- The conditions ---------------------------------------------------------

def _lacks(program: str, package: str) -> Optional[BuildError]:
    if shutil.which(program):
        return None
    return HostError(f'there is no {program}',
                     next_step=f'apt-get install {package}')


def _path(setting: Setting) -> None:
    setting.folder = setting.mount / OTHER_PATH
    # Another checkout has other times, too
    setting.before.append('find source -exec touch {} +')


def _umask(setting: Setting) -> None:
    # That of whoever checked the tree out, too
    setting.before += ['chmod -R go-rwx source', 'umask 077']


def _environment(**env: str) -> Callable[[Setting], None]:
    return lambda setting: setting.env.update(env)


def _locale(setting: Setting) -> None:
    known = command.run(['locale', '-a']).stdout.split()
    ours = setting.env.get('LC_ALL') or setting.env.get('LANG', 'C')
    # Without a real one: the other of those that are always there
    other = [name for name in (*LOCALES, 'C.utf8', 'POSIX') if name in known
             and not ours.startswith(name.partition('.')[0])]
    name = (other or ['POSIX'])[0]
    setting.env.update(LC_ALL=name, LANG=name, LANGUAGE=name[:2].lower())


def _no_locale(_host: Host) -> Optional[BuildError]:
    return _lacks('locale', 'libc-bin')


def _home(setting: Setting) -> None:
    setting.before.append('mkdir house')
    setting.env['HOME'] = str(setting.folder / 'house')


def _cpus(setting: Setting) -> None:
    last = max(os.sched_getaffinity(0))
    setting.wrapper += ['taskset', '--cpu-list', str(last)]


def _one_cpu(_host: Host) -> Optional[BuildError]:
    if len(os.sched_getaffinity(0)) < 2:
        return HostError('there is one CPU, and so both builds have one',
                         next_step='use a host with two')
    return _lacks('taskset', 'util-linux')


_FIXED = ('setarch', os.uname().machine, '--addr-no-randomize')


def _kernel(setting: Setting) -> None:
    setting.wrapper += _FIXED


def _fixed_kernel(_host: Host) -> Optional[BuildError]:
    missing = _lacks('setarch', 'util-linux')
    result = None if missing else command.run([*_FIXED, 'true'])
    if result is None or result.returncode == 0:
        return missing
    return HostError('this host does not let the randomisation of addresses '
                     f'be switched off: {result.stderr.strip()}',
                     next_step='allow personality() in the container\'s '
                     'seccomp profile')


def _tools(setting: Setting) -> None:
    setting.own_tools = True


def _hostname(setting: Setting) -> None:
    # There need not be a program for it
    setting.before.append(
        shlex.join([sys.executable, '-I', '-c', 'import socket; '
                    'socket.sethostname("another-host.example.org")']))


def _as_nobody(python: str) -> List[str]:
    # Some powers last until a second program is run
    return ['setpriv', f'--reuid={NOBODY}', f'--regid={NOBODY}',
            '--clear-groups', '--inh-caps=-all', '--bounding-set=-all',
            'env', python]


def _python() -> Optional[str]:
    '''An interpreter that NOBODY may run.'''
    for name in (sys.executable, os.path.realpath(sys.executable),
                 '/usr/bin/python3'):
        if not command.run([*_as_nobody(name), '-c', '']).returncode:
            return name
    return None


def _user(setting: Setting) -> None:
    setting.owner = NOBODY
    setting.python = _python() or setting.python
    setting.wrapper += _as_nobody('')[:-1]


def _one_user(host: Host) -> Optional[BuildError]:
    if not host.root:
        return HostError('only root can build as another user', next_step=(
            'run it as root, too; the hashes have to be the same'))
    for folder in host.shared:
        if folder.exists() and folder.stat().st_mode & 0o005 != 0o005:
            return HostError(f'other users can\'t read {folder}',
                             next_step=f'chmod -R a+rX {folder}')
    missing = _lacks('setpriv', 'util-linux')
    if not missing and not _python():
        return HostError(f'other users can\'t run {sys.executable}',
                         next_step='install a Python 3.9 or newer as '
                         '/usr/bin/python3')
    return missing


def _tmpfs(setting: Setting) -> None:
    setting.file_system = [f'mount -t tmpfs -o mode=755,size={SPACE} tmpfs '
                           f'{shlex.quote(str(setting.folder))}']


def _no_memory(_host: Host) -> Optional[BuildError]:
    lines = Path('/proc/meminfo').read_text('ascii').splitlines()
    free, = (int(line.split()[1]) << 10 for line in lines
             if line.startswith('MemAvailable:'))
    if free < MEMORY:
        return HostError(f'{MEMORY >> 20} MiB of memory are needed, '
                         f'{free >> 20} are free', next_step='name ext4, xfs '
                         'or btrfs in --conditions')
    return None


def _formatted(kind: str, options: str, setting: Setting) -> None:
    image = shlex.quote(str(setting.scratch.with_suffix(f'.{kind}')))
    setting.file_system = [
        f'truncate --size={SPACE} {image}', f'mkfs.{kind} {options} {image}',
        f'mount -o loop {image} {shlex.quote(str(setting.folder))}']


def _unformatted(kind: str, package: str,
                 host: Host) -> Optional[BuildError]:
    missing = _lacks(f'mkfs.{kind}', package)
    if not host.root or missing:
        return missing or HostError(f'only root can mount {kind}',
                                    next_step='run it as root')
    if shutil.which('modprobe'):
        command.run(['modprobe', kind])
    if f'\t{kind}\n' not in Path('/proc/filesystems').read_text('ascii'):
        return HostError(f'this kernel has no {kind}',
                         next_step='use a host whose kernel has')
    if not Path('/dev/loop-control').exists():
        return HostError('there is no /dev/loop-control', next_step='modprobe '
                         'loop; a container has to be given its devices')
    return None


def _formats(kind: str, package: str, options: str) -> Condition:
    return Condition(kind, f'the file system of the workspace: {kind}',
                     partial(_formatted, kind, options),
                     partial(_unformatted, kind, package), by_default=False)


_POWERS = ','.join(f'+{name}' for name in (
    'chown', 'dac_override', 'dac_read_search', 'fowner', 'fsetid', 'mknod',
    'setfcap', 'sys_admin'))


def _readdir(setting: Setting) -> None:
    lower = shlex.quote(str(setting.mount / 'lower'))
    upper = shlex.quote(str(setting.folder))
    owner = setting.owner or 0
    setting.disorder = [
        f'mkdir {lower}', f'mount --move {upper} {lower}',
        f'chown {owner}:{owner} {lower}',
        # All files are the builder's, who in its namespace may do with them
        # what root may: so must who does it for the builder
        f'setpriv --reuid={owner} --regid={owner} --clear-groups '
        f'--inh-caps={_POWERS} --ambient-caps={_POWERS} '
        'setpriv --pdeathsig TERM '
        'disorderfs -f --quiet --multi-user=no --shuffle-dirents=yes '
        '--reverse-dirents=no --pad-blocks=0 '
        f'-o allow_other,use_ino,hard_remove {lower} {upper} &',
        f'until mountpoint -q {upper}; do kill -0 $!; sleep 0.1; done']
    # It would end with the script, but then nobody might wait for it
    setting.after = [f'umount --lazy {upper}', 'wait']


def _fixed_order(host: Host) -> Optional[BuildError]:
    missing = _lacks('disorderfs', 'disorderfs')
    if not missing and not os.access('/dev/fuse', os.R_OK | os.W_OK):
        return HostError('there is no /dev/fuse that can be used',
                         next_step='modprobe fuse; a container has to be '
                         'given the device')
    if not missing and not host.root:
        return HostError('only root can mount disorderfs for all users',
                         next_step='run it as root')
    return missing


def _libfaketime() -> Optional[Path]:
    return next(iter(sorted(Path('/usr').glob(
        f'lib*/**/faketime/{FAKETIME}'))), None)


# For the build's copy of tools.py. Neither the builder nor mkosi let the
# environment through, and no library of the host's is where tools run.
_FAKE_CLOCK = '''

import shutil
from . import command
_env = {env!r}
command.ENVIRONMENT.update(_env)
_ensure = ensure


def ensure(*args, **kwargs):
    tree = _ensure(*args, **kwargs)
    library = tree / {source!r}[1:]
    if not library.exists():
        library.parent.mkdir()
        shutil.copyfile({source!r}, library)
        spawn = tree / PYTHON_PATH / 'mkosi/run.py'
        before, after = spawn.read_text('utf-8').split('"LANG": "C.UTF-8",')
        spawn.write_text(f'{{before}}**{{_env!r}},{{after}}', 'utf-8')
    return tree
'''


def _clock(setting: Setting) -> None:
    library = str(_libfaketime())
    # Only now is another, and the past is as it was
    env = {'LD_PRELOAD': library, 'FAKETIME': '+4000d', 'NO_FAKE_STAT': '1',
           'FAKETIME_DONT_FAKE_MONOTONIC': '1'}
    setting.own_tools = True
    setting.before.append('printf %s ' + shlex.quote(_FAKE_CLOCK.format(
        env={**env, 'LANG': 'C.UTF-8'}, source=library))
        + ' >>source/scripts/mkosi_build/tools.py')
    setting.wrapper += ['env', *(f'{name}={value}'
                                 for name, value in env.items())]


def _one_clock(_host: Host) -> Optional[BuildError]:
    if _libfaketime():
        return None
    return HostError(f'there is no {FAKETIME}, and a host\'s own clock is '
                     'not set by a test', next_step='apt-get install '
                     'libfaketime')


# In the order in which they are applied: who is wrapped first is outermost
_ALL = (
    Condition('path', 'the path of the checkout and the caches, its length, '
              'and the times of the checkout\'s files', _path),
    Condition('umask', 'the umask, and that of the checkout: 077', _umask),
    Condition('timezone', 'the time zone: 13:45 ahead of UTC',
              _environment(TZ='<+1345>-13:45')),
    Condition('locale', 'the language, its character set and sort order',
              _locale, _no_locale),
    Condition('home', 'the home folder', _home),
    Condition('environment', 'the environment variables '
              f'{", ".join(sorted(NOISE))}', _environment(**NOISE)),
    Condition('cpus', 'the number of CPUs: one', _cpus, _one_cpu),
    Condition('kernel', 'the addresses in memory: not random', _kernel,
              _fixed_kernel),
    Condition('tools', 'the tools tree: unpacked anew', _tools),
    Condition('hostname', 'the name of the host', _hostname),
    Condition('user', f'the user: {NOBODY}, without any power', _user,
              _one_user),
    Condition('tmpfs', 'the file system of the workspace: tmpfs', _tmpfs,
              _no_memory),
    _formats('ext4', 'e2fsprogs', '-q -F -m 0'),
    _formats('xfs', 'xfsprogs', '-q -f'),
    _formats('btrfs', 'btrfs-progs', '-q -f'),
    Condition('readdir', 'the order of the files in a folder: shuffled at '
              'each look, by disorderfs, on FUSE', _readdir, _fixed_order),
    Condition('clock', 'the clock: 4000 days ahead, but for programs of the '
              'image\'s own; and the tools tree: unpacked anew', _clock,
              _one_clock, by_default=False),
)
CONDITIONS: Mapping[str, Condition] = {c.name: c for c in _ALL}
# Of these, a build has one
FILE_SYSTEMS = ('tmpfs', 'ext4', 'xfs', 'btrfs')
# With these, a build unpacks the tools
OWN_TOOLS = ('tools', 'clock')


def parse(text: str) -> List[Condition]:
    '''The conditions that @text names. Raises UsageError.'''
    if text == NONE:
        return []
    if text == ALL:
        return [c for c in CONDITIONS.values() if c.by_default]
    names = text.split(',')
    unknown = [name for name in names if name not in CONDITIONS]
    if unknown:
        raise UsageError(
            f'--conditions: unknown condition {unknown[0]!r}, expected '
            f'{ALL}, {NONE} or some of: {",".join(CONDITIONS)}',
            next_step='scripts/mkosi-build.py --help')
    return [c for c in CONDITIONS.values() if c.name in names]


def builds(conditions: Sequence[Condition]) -> List[Tuple[Condition, ...]]:
    '''
    The conditions of each build that it takes to have all @conditions: one
    for each file system.
    '''
    places = [c for c in conditions if c.name in FILE_SYSTEMS]
    if not places:
        return [tuple(conditions)]
    return [tuple(c for c in conditions if c == place or c not in places)
            for place in places]


def script(setting: Setting, source: Path, mounts: Mapping[str, Path],
           arguments: Sequence[str], results: Path) -> str:
    '''
    The shell script that runs a build with @setting in the namespaces: the
    builder of the tree @source, with @arguments. @mounts are folders of
    this host, by the place in the build's folder where it has them. Its
    log, and what it made, are copied to the folder @results.
    '''
    def q(path: object) -> str:     # pylint: disable=invalid-name
        return shlex.quote(str(path))

    owner = setting.owner
    places = ['cache/store', 'cache/tools', *mounts]
    lines = [
        'set -e',
        # So that the way there leaves no folders on the host
        f'mount -t tmpfs -o mode=755,size=1m tmpfs {q(setting.mount)}',
        f'mkdir -p {q(setting.folder)}',
        *(setting.file_system or
          [f'mount --bind {q(setting.scratch)} {q(setting.folder)}']),
        *setting.disorder,
        f'cd {q(setting.folder)}',
        f'mkdir -p {" ".join(q(place) for place in places)}',
        f'cp -a {q(source)} source',
        *setting.before,
        *([f'chown -hR {owner}:{owner} .'] if owner else []),
        *(f'mount --bind {q(path)} {q(place)}'
          for place, path in mounts.items()),
        'set +e',
        # It clears up when this script ends before it
        shlex.join([*setting.wrapper, 'setpriv', '--pdeathsig', 'TERM',
                    setting.python,
                    str(setting.folder / 'source/scripts/mkosi-build.py'),
                    *arguments]),
        'status=$?',
        f'cp -R cache/log {q(results)}',
        f'[ $status != 0 ] || cp -R cache/images {q(results)}',
        'cd /',
        *setting.after,
        'exit $status',
    ]
    return '\n'.join(lines) + '\n'
