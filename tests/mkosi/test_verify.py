# SPDX-License-Identifier: GPL-2.0-or-later
'''
--verify: the tiny image of fixtures_builder.py gives the same bytes under
all conditions. Each condition is proved to reach the build by a probe that
writes down what it sees, into an artefact; and what depends on one, on two
or on none is found.
'''

import json
import math
import os
from pathlib import Path
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any, Dict, FrozenSet, Iterator, List, Sequence, Tuple

import pytest
import yaml

from fixtures_builder import (POSTOUTPUT, TREE_LOCKS, Debian, Project,
                              processes)
from mkosi_build import build, hostile, lock as locks
from mkosi_build.error import HostError, UsageError
from mkosi_build.hostile import CONDITIONS, Host
from mkosi_build.verify import smallest

pytest_plugins = ['fixtures_builder']

SLOW = pytest.mark.slow
ROOT = os.getuid() == 0
# Seconds; a dozen builds on a machine that has ten other things to do
PATIENCE = 900
# What the builder hides from a definition, it tells here
LEAK = '''

def _leaks() -> List[str]:
    import time
    mask = os.umask(0)
    os.umask(mask)
    seen = {'path': Path(__file__).parents[2], 'umask': oct(mask),
            'timezone': time.strftime('%z'),
            'locale': os.getenv('LC_ALL'), 'home': os.getenv('HOME'),
            'environment': os.getenv('CANARY'), 'user': os.getuid(),
            'clock': time.localtime().tm_year}
    return [f'--environment=SEEN_{name}={value}'
            for name, value in seen.items()]
'''
# What a definition sees by itself, and what leaks
PROBES = {
    'path': 'echo $SEEN_path',
    'umask': 'echo $SEEN_umask',
    'timezone': 'echo $SEEN_timezone',
    'locale': 'echo $SEEN_locale',
    'home': 'echo $SEEN_home',
    'environment': 'echo $SEEN_environment',
    'cpus': 'nproc',
    'kernel': 'cat /proc/self/personality',
    'tools': 'stat -c %d.%i /usr/bin/stat',
    'hostname': 'uname -n',
    'user': 'echo $SEEN_user',
    # Its number too: the host's may be of the same type
    'file-system': 'stat -f -c "%T %i" .',
    'readdir': 'mkdir many; cd many; touch 1 2 3 4 5 6 7 8 9; echo `ls -U`; '
               'cd ..; rm -r many',
    'clock': 'echo $SEEN_clock `date +%Y` `stat -c %y / | cut -c-4`',
}
FILE_SYSTEM_TYPES = {'tmpfs': 'tmpfs', 'ext4': 'ext2/ext3', 'xfs': 'xfs',
                     'btrfs': 'btrfs'}


def seed(project: Project, debian: Debian, *lines: str) -> None:
    '''
    Have the kernel of the image be what the shell @lines say, who know all
    that a builder could let through.
    '''
    path = project.tree / 'scripts/mkosi_build/build.py'
    project.edit(path, ' *further,\n', ' *further, *_leaks(),\n')
    path.write_text(path.read_text() + LEAK)
    script = '\n'.join(lines)
    project.add_script('mkosi.postoutput', POSTOUTPUT.replace(
        'echo kernel >vmlinuz', f'{{\n{script}\n}} >vmlinuz'))
    project.write_lock(debian, *debian.MINIMAL)


def probes(*names: str) -> List[str]:
    '''A line a probe: its name and what it sees.'''
    return [f'echo "{name}=$({PROBES[name]})"' for name in names]


def run(project: Project, *arguments: str,
        **env: str) -> 'subprocess.CompletedProcess[str]':
    '''Run --verify with JSON; it leaves nothing behind.'''
    result = subprocess.run(
        project.command('--verify', '--json', *arguments), cwd=project.root,
        env=project.environment(**env), stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, encoding='utf-8', timeout=PATIENCE,
        stdin=subprocess.DEVNULL, check=False)
    assert not result.stderr, result.stderr
    assert_nothing_left(project)
    return result


def assert_nothing_left(project: Project) -> None:
    '''No process, mount or folder, and no artefact where tests look.'''
    project.assert_clean()
    assert not project.artefacts() and not project.asset_hashes()
    mounts = Path('/proc/self/mountinfo').read_text('utf-8')
    assert 'mkosi-verify' not in mounts


def verified(project: Project, code: int, *arguments: str,
             **env: str) -> Dict[str, Any]:
    '''The event of the result of --verify, which exits with @code.'''
    result = run(project, *arguments, **env)
    events = project.events(result.stdout)
    assert result.returncode == code, result.stdout
    event, = (e for e in events if e['event'] == 'verified')
    written = json.loads(Path(event['path']).read_text('utf-8'))
    assert written.pop('schema') == 1
    assert written == {key: event[key] for key in written}
    return event


def seen(event: Dict[str, Any]) -> List[Dict[str, str]]:
    '''What the probes of the two builds that differ saw.'''
    return [dict(line.split('=', 1) for line in Path(
        event['kept'], build_, 'vmlinuz').read_text('utf-8').splitlines())
        for build_ in ('first', 'second')]


def require(*names: str) -> None:
    '''Skip with the reason where this host can't have a condition.'''
    host = hostile.look([])
    for name in names:
        problem = CONDITIONS[name].obstacle(host)
        if problem:
            pytest.skip(f'{name}: {problem}')


@pytest.fixture(name='unpackable')
def fixture_unpackable(project: Project, tools_tree: Path) -> Project:
    '''A project that has the packages of the tools, too.'''
    link_tools(project, tools_tree)
    return project


def link_tools(project: Project, tools_tree: Path) -> None:
    '''Give @project the packages that @tools_tree is made of.'''
    newer = tools_tree.with_suffix('.lock')
    lock = locks.load(newer if newer.exists() else
                      TREE_LOCKS / f'{build.host_architecture()}.lock')
    store = project.cache / 'store'
    store.mkdir()
    for package in lock.packages:
        there = tools_tree.resolve().parents[1] / 'store' / package.sha256
        if there.exists():
            try:
                os.link(there, store / package.sha256)
            except OSError:
                shutil.copyfile(there, store / package.sha256)
        elif package.name != 'qemu-user':
            pytest.skip(f'the packages of the tools are not in {there.parent}')


# What may be asked for

@pytest.mark.parametrize('arguments, expected', [
    (['--bisect'], 'go with --verify'),
    (['--conditions', 'none', '--update'], 'go with --verify'),
    (['--verify', '--conditions', 'path,weather'], "condition 'weather'"),
    (['--verify', '--conditions', ''], "condition ''"),
    (['--verify', '--check'], 'not allowed with argument'),
    (['--verify', '--boot', 'mini'], '--boot takes one image'),
])
def test_wrong_usage(arguments: List[str], expected: str,
                     project: Project) -> None:
    '''Told before anything is done.'''
    assert expected in project.bad(2, *arguments)
    assert not (project.cache / 'verify').exists()


def test_lists_of_conditions() -> None:
    '''All by default but those that exclude each other; in one order.'''
    every = [c.name for c in hostile.parse('all')]
    assert set(CONDITIONS) - set(every) == {'ext4', 'xfs', 'btrfs', 'clock'}
    assert not hostile.parse('none')
    assert [c.name for c in hostile.parse('umask,path')] == ['path', 'umask']
    with pytest.raises(UsageError):
        hostile.parse('path,none')
    for condition in CONDITIONS.values():
        assert condition.changes


def test_one_file_system_a_build() -> None:
    '''And all else in each.'''
    made = hostile.builds(hostile.parse('xfs,path,tmpfs,umask'))
    assert [[c.name for c in conditions] for conditions in made] == [
        ['path', 'umask', 'tmpfs'], ['path', 'umask', 'xfs']]
    assert hostile.builds([]) == [()]


@pytest.mark.parametrize('root', [False, True])
def test_what_a_host_lacks(root: bool,
                           monkeypatch: pytest.MonkeyPatch) -> None:
    '''The reason, and the step that mends it.'''
    monkeypatch.setenv('PATH', '/nonexistent')
    lacking = {}
    for name, condition in CONDITIONS.items():
        problem = condition.obstacle(Host([], root))
        if problem:
            assert isinstance(problem, HostError) and problem.next_step
            lacking[name] = problem.next_step
    assert lacking['cpus'] == 'apt-get install util-linux' or (
        'two' in lacking['cpus'])
    for name, package in (('locale', 'libc-bin'), ('readdir', 'disorderfs'),
                          ('kernel', 'util-linux'), ('xfs', 'xfsprogs'),
                          ('btrfs', 'btrfs-progs'), ('ext4', 'e2fsprogs')):
        assert lacking[name] == f'apt-get install {package}'
    assert ('as root' in lacking.get('user', '')) is not root


def test_a_store_that_is_closed(tmp_path: Path) -> None:
    '''Another user could not read it.'''
    tmp_path.chmod(0o700)
    problem = CONDITIONS['user'].obstacle(Host([], True, [tmp_path]))
    assert problem and problem.next_step == f'chmod -R a+rX {tmp_path}'


def test_named_but_impossible(project: Project) -> None:
    '''Not left out in silence.'''
    programs = project.root / 'bin'
    programs.mkdir()
    for name in ('unshare', 'setpriv', 'mount', 'true'):
        (programs / name).symlink_to(str(shutil.which(name)))
    said = project.bad(4, '--verify', '--conditions', 'path,btrfs',
                       PATH=str(programs))
    assert 'btrfs: there is no mkfs.btrfs' in said
    assert 'next: apt-get install btrfs-progs' in said
    assert not (project.cache / 'store').exists()


# What is to blame

@pytest.mark.parametrize('number', range(1, 14))
def test_the_fewest_are_found(number: int) -> None:
    '''Each one, and each two together; in a number of trials that is low.'''
    names = [str(i) for i in range(number)]
    trials: List[FrozenSet[str]] = []

    def found(cause: Sequence[str]) -> Tuple[str, ...]:
        def differs(tried: FrozenSet[str]) -> bool:
            trials.append(tried)
            return tried >= set(cause)
        trials.clear()
        return smallest(names, differs)

    assert found([]) == () and len(trials) == 1
    for one in names:
        assert found([one]) == (one,)
        assert len(trials) <= 1 + 2 * math.ceil(math.log2(number))
        for other in names:
            if one < other:
                assert set(found([one, other])) == {one, other}


def test_one_of_two_causes() -> None:
    '''Is enough: the next run finds the other.'''
    assert smallest('abcd', lambda tried: bool(tried & {'b', 'd'})) == ('b',)


# Builds

@SLOW
def test_all_conditions(unpackable: Project) -> None:
    '''The same bytes; each build ran, in its own cache.'''
    event = verified(unpackable, 0)
    assert event['same'] is True and 'kept' not in event
    first, second = event['builds']
    assert not first['conditions']
    assert (set(second['conditions']) | set(event['left_out'])
            == {c.name for c in hostile.parse('all')})
    assert first['took'] > 0 and second['took'] > 0
    for artefact in event['artefacts'].values():
        assert artefact['same'] and len(set(artefact['sha256'])) == 1
        assert artefact['sha256'][0] == artefact['registry']
        assert artefact['sha256'][0] in event['text']
    for name in ('first', 'second'):
        log = unpackable.cache / f'log/mini-x86_64-verify-{name}-build.log'
        assert '\n‣ ' in log.read_text('utf-8')


@SLOW
def test_all_conditions_reach_a_build(unpackable: Project, debian: Debian
                                      ) -> None:
    '''The probes of the second build see something else, all of them.'''
    names = [name for name in PROBES if name != 'clock']
    seed(unpackable, debian, *probes(*names))
    event = verified(unpackable, 7)
    assert not event['same']
    first, second = seen(event)
    used = {*event['builds'][1]['conditions'], 'file-system'} - {'tmpfs'}
    assert {n for n in names if first[n] == second[n]} == set(names) - used
    assert {kind: artefact['same'] for kind, artefact
            in event['artefacts'].items()} == {
        'kernel': False, 'initrd': True, 'disk': True}
    assert 'second build: DIFFERS' in event['text']


@SLOW
@pytest.mark.parametrize('names', [
    ('ext4',), ('xfs',), ('btrfs',), ('clock',)])
def test_by_name_alone(names: Tuple[str, ...], unpackable: Project,
                       debian: Debian) -> None:
    '''File systems of their own; a clock for builder and tools.'''
    require(*names)
    seed(unpackable, debian, *probes('file-system', 'clock', 'hostname',
                                     'path'))
    event = verified(unpackable, 7, '--conditions', ','.join(names))
    first, second = seen(event)
    assert first['path'] == second['path']
    if 'clock' in names:
        assert second['file-system'] == first['file-system']
    else:
        assert second['file-system'] != first['file-system']
        assert (second['file-system'].split()[0]
                == FILE_SYSTEM_TYPES[names[0]])
    # The builder's, the tools', and that of what the kernel has noted
    years = [[int(year) for year in probe['clock'].split()]
             for probe in (first, second)]
    assert len(set(years[0])) == 1
    assert [now - then for then, now in zip(*years)] in (
        [[10, 10, 0], [11, 11, 0]] if 'clock' in names else [[0, 0, 0]])
    assert first['hostname'] == second['hostname']


@SLOW
@pytest.mark.parametrize('conditions, cause, lines', [
    ('umask,timezone,cpus,hostname', ['timezone'], probes('timezone')),
    ('path,readdir', ['readdir'], probes('readdir')),
    # Only if both are others
    ('cpus,hostname', ['cpus', 'hostname'], [
        '[ `nproc` = 1 ] && [ `uname -n` = another-host.example.org ] '
        '&& echo both || echo none']),
    # With any, and so it is none of them
    ('umask,hostname', [], ['date +%N']),
])
def test_bisect(conditions: str, cause: List[str], lines: List[str],
                project: Project, debian: Debian) -> None:
    '''The condition to blame is named.'''
    require(*conditions.split(','))
    seed(project, debian, *lines)
    event = verified(project, 7, '--bisect', '--conditions', conditions)
    assert event['cause'] == cause
    for name in cause:
        assert CONDITIONS[name].changes in event['text']
    assert ('cause: none of the conditions' in event['text']) is (not cause)
    assert {p.name for p in Path(event['kept'], 'second').iterdir()} >= {
        'vmlinuz', 'initrd.cpio', 'disk.qcow2'}


@SLOW
def test_a_build_that_fails(project: Project, debian: Debian) -> None:
    '''Under one condition alone: which one, and a log that is still there.'''
    seed(project, debian, 'echo umask is $SEEN_umask >&2',
         '[ $SEEN_umask != 0o77 ]')
    result = run(project, '--bisect', '--conditions', 'umask,timezone')
    error = project.events(result.stdout)[-1]
    assert (error['event'], error['code'], result.returncode) == (
        'error', 6, 6)
    assert 'second build, with another umask, timezone' in error['message']
    assert f'cause: umask ({CONDITIONS["umask"].changes})' in error['message']
    log = project.cache / 'log/mini-x86_64-verify-second-build.log'
    assert str(log) in error['next']
    assert 'umask is 0o77' in log.read_text('utf-8')


# What proves nothing

# A builder that keeps what it built where the next one finds it
STALE = """\
        shared = Path({shared!r})
        if shared.exists():
            shutil.copytree(shared, self.cache.images)
        result = self.find(job)
        try:
"""
KEEP = """\
        shutil.copytree(self.cache.images, shared, dirs_exist_ok=True)
        return result

    def _relink("""


@SLOW
def test_a_stale_result(project: Project) -> None:
    '''Two hashes of one build are equal, and say nothing.'''
    path = project.tree / 'scripts/mkosi_build/build.py'
    shared = project.root / 'shared'
    project.edit(path, '        result = self.find(job)\n        try:\n',
                 STALE.format(shared=str(shared)))
    project.edit(path, '        return result\n\n    def _relink(', KEEP)
    said = unproved(project)
    assert ('second build, as it is: nothing is proved: the builder did not '
            'build' in said)
    assert shared.exists()


@SLOW
def test_a_log_that_nobody_wrote(project: Project) -> None:
    '''Nor does a builder that says that it built.'''
    project.edit(project.tree / 'scripts/mkosi_build/cache.py',
                 "'log' / f'{name}.log'", "'log' / f'{name}.text'")
    assert ('first build, as it is: nothing is proved: there is no log'
            in unproved(project))


def unproved(project: Project) -> str:
    '''What a plain second build has against it.'''
    result = run(project, '--conditions', 'none')
    error = project.events(result.stdout)[-1]
    assert result.returncode == 6, result.stdout
    assert not (project.cache / 'verify').exists()
    return str(error['message'])


# Who may run it, and who ends it

@pytest.fixture(name='open_folder')
def fixture_open_folder() -> Iterator[Path]:
    '''A folder that all users can reach, which pytest's own is not.'''
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o777)
        yield Path(folder)


@SLOW
@pytest.mark.skipif(not ROOT, reason='every other test here is this one')
def test_without_root(template: Project, debian: Debian, tools_tree: Path,
                      open_folder: Path) -> None:
    '''What takes root is left out, and told; the rest is done.'''
    shutil.copytree(debian.mirror, open_folder / 'mirror')
    shutil.copytree(os.path.dirname(yaml.__file__), open_folder / 'py/yaml')
    tree = open_folder / 'tools' / tools_tree.name
    shutil.copytree(tools_tree, tree, symlinks=True)
    project = Project(open_folder / 'p', f'file://{open_folder}/mirror',
                      tree)
    shutil.copytree(template.tree, project.tree)
    link_tools(project, tools_tree)
    subprocess.run(['chmod', '-R', 'a+rX', open_folder / 'mirror'],
                   check=True)
    for folder, names, _ in os.walk(project.root):
        for path in (Path(folder), *(Path(folder, n) for n in names)):
            os.chown(path, 65534, 65534, follow_symlinks=False)
    project.python = ['setpriv', '--reuid=65534', '--regid=65534',
                      '--clear-groups', 'env', python_for_nobody()]
    event = verified(project, 0, PYTHONPATH=str(open_folder / 'py'))
    assert {'user', 'readdir'} <= set(event['left_out'])
    assert {'path', 'hostname', 'tmpfs', 'tools', 'umask'} <= {
        *event['builds'][1]['conditions'], *(
            {'tmpfs'} & set(event['left_out']))}
    assert 'left out: ' in event['text']


def python_for_nobody() -> str:
    '''An interpreter that the other user may run.'''
    for python in (os.path.realpath(sys.executable), '/usr/bin/python3'):
        if subprocess.run(['setpriv', '--reuid=65534', '--regid=65534',
                           '--clear-groups', 'env', python, '-c', ''],
                          stderr=subprocess.DEVNULL,
                          check=False).returncode == 0:
            return python
    raise pytest.skip.Exception('no Python that another user may run')


@SLOW
@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGKILL])
def test_ended(number: int, project: Project, debian: Debian) -> None:
    '''Nothing goes on; what is left of a killed one, the next clears.'''
    require('readdir')
    seed(project, debian, '[ $SEEN_umask != 0o77 ] || '
         '{ touch "$OUTPUTDIR/here"; sleep 600; }')
    with project.start('--verify', '--conditions',
                       'umask,readdir') as process:
        deadline = time.monotonic() + PATIENCE
        while not any(name.endswith('/here') for name in project.files()):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(number)
        process.communicate(timeout=60)
    deadline = time.monotonic() + 20
    while processes(project.root) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not processes(project.root)
    if number == signal.SIGTERM:
        assert_nothing_left(project)
    else:
        project.add_script('mkosi.postoutput', POSTOUTPUT)
        project.write_lock(debian, *debian.MINIMAL)
        assert verified(project, 0, '--conditions', 'none')['same']
