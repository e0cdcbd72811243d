# SPDX-License-Identifier: GPL-2.0-or-later
'''
Running commands: one way for quick ones, whose output is wanted, and one
for mkosi, which runs in namespaces of its own, ends with the builder and
speaks into a log.
'''

import os
import re
import shutil
import signal
import subprocess
from pathlib import Path
from typing import List, Mapping, Optional, Sequence

from .error import HostError

# What a build may see of the caller's environment: nothing. Each of these
# decides bytes somewhere (sort order, time stamps, names in archives).
ENVIRONMENT = {
    'HOME': '/nonexistent',
    'LANG': 'C.UTF-8',
    'LC_ALL': 'C.UTF-8',
    'LOGNAME': 'build',
    'PATH': '/usr/sbin:/usr/bin:/sbin:/bin',
    'PYTHONDONTWRITEBYTECODE': '1',
    'PYTHONHASHSEED': '0',
    'SHELL': '/bin/sh',
    'TERM': 'dumb',
    'TZ': 'UTC',
    'USER': 'build',
}

# mkosi's own words: its steps, and at the very end, why it failed
SPOKEN = re.compile(r'^‣ \S')
# Lines of a log that say why something failed: apt's, dpkg's, dnf's and
# mkosi's
TELLING = re.compile(r'^(E: |dpkg: error)|[Ee]rror\b|not found'
                     r'|[Nn]o space left|unmet dependencies|Depends:'
                     r'|no installation candidate|Failed|refus'
                     r'|nothing provides|is not signed|^Public key for'
                     r'|^Problem opening package|Cannot download')


def run(command: Sequence[str], env: Optional[Mapping[str, str]] = None,
        ) -> 'subprocess.CompletedProcess[str]':
    '''
    Run @command to its end, its output caught, its locale plain. Returns
    what subprocess.run() does; the caller looks at the return code. Raises
    HostError where there is no such program.
    '''
    full = {**os.environ, 'LC_ALL': 'C.UTF-8', **(env or {})}
    try:
        return subprocess.run(command, env=full, stdin=subprocess.DEVNULL,
                              stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, encoding='utf-8',
                              errors='replace', check=False)
    except FileNotFoundError as e:
        raise HostError(f'program not found: {command[0]}',
                        next_step='install it, or look whether PATH has '
                        'its folder') from e


# Registers its first argument with the binfmt_misc of its user namespace,
# then runs the others
_OWN_BINFMT = '''\
mount -t binfmt_misc binfmt_misc /proc/sys/fs/binfmt_misc || exit
[ "$1" ] && { printf %s "$1" > /proc/sys/fs/binfmt_misc/register || exit; }
shift
exec "$@"
'''


def isolated(network: bool, interpreter: Optional[str] = None) -> List[str]:
    '''
    The command that runs another one as user 1000 of a user namespace of
    its own: the same for root and for everybody else, so that both take
    the same way through mkosi and get the same bytes. Where @network is
    false there is no interface but a loopback that is down. The process
    namespace makes sure that nothing outlives the builder. @interpreter
    is what emulate.registration() returns: it is for these namespaces
    alone.
    '''
    return [*([] if interpreter is None else _own_binfmt(interpreter)),
            'setpriv', '--pdeathsig', 'KILL',
            'unshare', '--user', '--map-user=1000', '--map-group=1000',
            '--pid', '--fork', '--kill-child', '--mount-proc',
            *([] if network else ['--net']), '--']


def _own_binfmt(interpreter: str) -> List[str]:
    # Only a namespace's root may write to it, so this takes one more
    return ['setpriv', '--pdeathsig', 'KILL',
            'unshare', '--user', '--map-root-user', '--mount', '--',
            'sh', '-c', _OWN_BINFMT, 'sh', interpreter]


def has_own_binfmt() -> bool:
    '''Whether user namespaces have a binfmt_misc of their own.'''
    return run([*_own_binfmt(''), 'true']).returncode == 0


def run_isolated(command: Sequence[str], log: Path, network: bool,
                 env: Mapping[str, str],
                 interpreter: Optional[str] = None) -> int:
    '''
    Run @command in namespaces of its own with @env beside the fixed
    environment, its output in the file @log. Returns its return code.
    '''
    with open(log, 'wb') as output:
        with subprocess.Popen(
                [*isolated(network, interpreter), *command],
                stdin=subprocess.DEVNULL,
                stdout=output, stderr=subprocess.STDOUT, umask=0o022,
                # Python looks for modules in the folder that it runs in
                cwd='/', env={**ENVIRONMENT, **env}) as process:
            try:
                return process.wait()
            except BaseException:
                _end(process)
                raise


def _end(process: 'subprocess.Popen[bytes]') -> None:
    '''
    Kill what runs in the namespaces of the isolated @process. unshare's
    only child is their first process: all others end with it, and unshare
    itself when they have.
    '''
    children = Path(f'/proc/{process.pid}/task/{process.pid}/children')
    pids = children.read_bytes().split() if children.exists() else []
    for pid in pids:
        try:
            os.kill(int(pid), signal.SIGKILL)
        except ProcessLookupError:
            # It was quicker
            pass
    if not pids:
        process.kill()


def why_failed(log: Path, lines: int = 10) -> str:
    '''
    The last @lines lines of the file @log that tell why it failed; of long
    ones, which are command lines, beginning and end.
    '''
    with open(log, encoding='utf-8', errors='replace') as file:
        tail = [line.rstrip() for line in file.readlines()[-200:]]
    tail = [line for line in tail if line]
    telling = [line for line in tail[:-3] if TELLING.search(line)]
    telling += [line for line in tail[-3:]
                if TELLING.search(line) or SPOKEN.search(line)]
    return '\n'.join(f'    {_shortened(line)}'
                     for line in (telling or tail)[-lines:])


def _shortened(line: str) -> str:
    return line if len(line) <= 180 else f'{line[:80]} ... {line[-80:]}'


def check_programs(packages: Mapping[str, str]) -> None:
    '''
    Raise HostError unless each program that is a key of @packages is
    there, with the line that installs the Debian packages that are the
    values.
    '''
    missing = [name for name in packages if not shutil.which(name)]
    if missing:
        names = ' '.join(sorted({packages[name] for name in missing}))
        raise HostError(f'programs not found: {", ".join(missing)}',
                        next_step=f'apt-get install {names}')


def check_namespaces() -> None:
    '''Raise HostError where an isolated command can't be run.'''
    result = run([*isolated(network=False), 'true'])
    if result.returncode == 0:
        return
    said = result.stderr.strip() or f'exit code {result.returncode}'
    for name, closed, step in (
            ('kernel/apparmor_restrict_unprivileged_userns', b'1',
             'sysctl -w kernel.apparmor_restrict_unprivileged_userns=0'),
            ('kernel/unprivileged_userns_clone', b'0',
             'sysctl -w kernel.unprivileged_userns_clone=1'),
            ('user/max_user_namespaces', b'0',
             'sysctl -w user.max_user_namespaces=10000')):
        switch = Path('/proc/sys', name)
        if switch.exists() and switch.read_bytes().strip() == closed:
            break
    else:
        step = ('in a container, allow user namespaces and an unmasked '
                '/proc (podman: --security-opt unmask=ALL '
                '--security-opt seccomp=unconfined)')
    raise HostError(f'this host refuses the namespaces that a build runs '
                    f'in: {said}', next_step=step)
