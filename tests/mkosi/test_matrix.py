# SPDX-License-Identifier: GPL-2.0-or-later
'''
The matrix: systems that mkosi builds of packages made up here, with
emulators that are scripts, and tests that print what those say. Where it
matters what QEMU does, the host's own qemu-img is a row.
'''

from concurrent.futures import ThreadPoolExecutor
import fnmatch
import json
from pathlib import Path
import re
import shutil
import signal
import subprocess
import time
from typing import Any, Dict, List, Sequence
import xml.etree.ElementTree as ET

import pytest
import yaml

from fixtures_builder import (AMBIENT, EPOCH, PATIENCE, ROOT, Debian,
                              Project, make_package)
from mkosi_build import differences, hosts, lock as locks, qemu_img, registry
from mkosi_build.build import host_architecture
from mkosi_build.error import BuildError, InputError, UsageError
from mkosi_build.lock import Lock
from mkosi_build.matrix import Judge, parse_arguments
from mkosi_build.resolve import KEYRING
from mkosi_build.rows import Quarantine
from mkosi_build.runner import Found
from mkosi_build.store import host_mirrors
from mkosi_build.suite import Case, Outcome
from test_manual import MATRIX
from test_resolve import link_store

pytest_plugins = ['fixtures_builder']

HOSTS = ROOT / 'tests/functional/mkosi/hosts'

CONF = '''\
[Distribution]
Distribution=debian
Release=trixie

[Output]
Format=directory
Output=root

[Content]
Bootable=no
CleanPackageMetadata=yes
Packages=mini-qemu
'''

ROW = '''\
  {name}:
    description: a QEMU made up
    distribution: {distribution}
    release: trixie
    package: mini-qemu
    emulators:
      x86_64: /usr/bin/qemu-system-x86_64
    qemu-img: /usr/bin/qemu-img
    firmware: {{}}
'''

# What it says decides the outcome of the test below
EMULATOR = '''\
#!/usr/bin/sh
echo qemu-img version {version}
'''

# The name MkosiAsset makes it one of ours
TEST = '''\
import os, subprocess, time
said = subprocess.run([os.environ['QEMU_TEST_QEMU_BINARY']],
                      stdout=subprocess.PIPE, check=True).stdout.decode()
version = said.split()[-1]
if version in os.environ.get('HANG', ''):
    time.sleep(1000)
print('TAP version 13')
print('ok 1 test_mini.Mini.test_always')
print({other})
print('1..2')
'''
OLD = "'ok 2 test_mini.Mini.test_new' + (" \
      "' # SKIP too old' if int(version.split('.')[0]) < 8 else '')"


class Rows:
    '''A project with rows, which are of these versions, by their names.'''

    def __init__(self, project: Project, debian: Debian) -> None:
        self.project = project
        self.debian = debian
        self.folder = project.mkosi / 'hosts'
        self.folder.mkdir()
        self.mirror = project.root / 'mirror'
        self.names: List[str] = []
        shutil.copy(ROOT / 'scripts/mkosi-matrix.py',
                    project.tree / 'scripts')
        (project.tree / 'python/qemu/machine').mkdir(parents=True)
        (project.tree / 'tests/functional/x86_64').mkdir()
        for name in ('quarantine.yaml', 'qemu-img.json'):
            shutil.copy(HOSTS / name, self.folder)
        self.declare()
        self.test(OLD)
        project.mirror = f'file://{debian.mirror} file://{self.mirror}'

    def test(self, other: str) -> None:
        '''Have the test print what the expression @other gives.'''
        path = self.project.tree / 'tests/functional/x86_64/test_mini.py'
        path.write_text('# MkosiAsset\n' + TEST.format(other=other))

    def declare(self, *differing: Dict[str, Any]) -> None:
        '''Declare these differences and no others.'''
        (self.folder / 'differences.yaml').write_text(json.dumps(
            {'schema': 1, 'differences': list(differing)}))

    def add(self, name: str, version: str = '',
            distribution: str = 'debian') -> None:
        '''A row; without @version, it is not locked.'''
        self.names.append(name)
        folder = self.folder / name
        folder.mkdir()
        (folder / 'mkosi.conf').write_text(CONF)
        with open(self.folder / 'hosts.yaml', 'w', encoding='utf-8') as file:
            file.write('schema: 1\nhosts:\n' + ''.join(
                ROW.format(name=each, distribution=(
                    distribution if each == name else 'debian'))
                for each in self.names))
        if not version:
            return
        script = self.project.root / 'emulator'
        script.write_text(EMULATOR.format(version=version))
        package = make_package(
            self.mirror, 'mini-qemu', version, fields='Depends: mini-hello\n',
            files={f'usr/bin/{program}': script for program
                   in ('qemu-img', 'qemu-system-x86_64')})
        packages = [self.debian.packages[each]
                    for each in self.debian.MINIMAL]
        lock = Lock(locks.definition_digest(folder), 'debian', 'trixie',
                    'x86_64', EPOCH, tuple(sorted([*packages, package])))
        (folder / 'x86_64.lock').write_text(locks.render(lock))

    def command(self, *arguments: str) -> List[str]:
        '''The command line.'''
        return [*self.project.python,
                str(self.project.tree / 'scripts/mkosi-matrix.py'),
                *arguments]

    def run(self, code: int, *arguments: str, **env: str) -> str:
        '''Run the command without qemu-img; returns all that it said.'''
        result = subprocess.run(
            self.command('--tests', '*/*', *arguments), cwd=self.project.root,
            env=self.project.environment(**env), stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            encoding='utf-8', timeout=PATIENCE, check=False)
        assert result.returncode == code, result.stdout
        assert 'Traceback' not in result.stdout
        self.project.assert_clean()
        return result.stdout

    @property
    def states(self) -> Dict[str, str]:
        '''What came of each row, as told to programs.'''
        folder = self.project.root / 'mkosi-matrix'
        told = json.loads((folder / 'matrix.json').read_text('utf-8'))
        suites = ET.parse(folder / 'matrix.junit.xml').getroot()
        assert ([suite.get('name') for suite in suites]
                == [row['name'] for row in told['rows']])
        for row in told['rows']:
            own = folder / 'matrix.rows' / row['name'] / 'row.json'
            assert json.loads(own.read_text('utf-8'))['rows'] == [row]
        return {row['name']: row['state'] for row in told['rows']}


@pytest.fixture(name='rows')
def fixture_rows(project: Project, debian: Debian) -> Rows:
    '''Without a row.'''
    return Rows(project, debian)


# The whole command

@pytest.mark.slow
def test_difference(rows: Rows) -> None:
    '''Fails a row until it is declared, and is told when it is gone.'''
    rows.add('old', '7.2.0')
    rows.add('new', '11.1.0')
    rows.add('far', distribution='ubuntu')

    said = rows.run(9)
    assert rows.states == {'old': 'failed', 'new': 'passed',
                           'far': 'unreachable'}
    assert 'error: 1 of 3 rows failed: old' in said
    report = (rows.project.root / 'mkosi-matrix/matrix.md').read_text()
    assert 'x86_64/mini Mini.test_new: 7.2.0 differs from 11.1.0' in report

    declared = {'assertion': 'x86_64/mini Mini.test_new',
                'versions': '<8', 'expect': 'skipped',
                'reason': 'it came with 8.0'}
    rows.declare(declared)
    rows.run(0)
    assert rows.states == {'old': 'passed', 'new': 'passed',
                           'far': 'unreachable'}
    report = (rows.project.root / 'mkosi-matrix/matrix.md').read_text()
    assert 'it came with 8.0' in report

    rows.test("'ok 2 test_mini.Mini.test_new'")
    assert 'no longer' in rows.run(0)


@pytest.mark.slow
def test_failure_everywhere(rows: Rows) -> None:
    '''Is a failure, though all are the same; and may be quarantined.'''
    rows.add('old', '7.2.0')
    rows.add('new', '11.1.0')
    rows.test("'not ok 2 test_mini.Mini.test_new'")
    said = rows.run(9)
    assert rows.states == {'old': 'failed', 'new': 'failed'}
    # Twice, in case it was the host
    assert len(re.findall(r'old: x86_64/mini: 1 passed, 1 failed',
                          said)) == 2

    rows.run(0, 'old', '--quarantine', 'somebody looks into it')
    rows.run(9)
    assert rows.states == {'old': 'quarantined', 'new': 'failed'}
    kept = yaml.safe_load((rows.folder / 'quarantine.yaml').read_text())
    assert kept['rows']['old']['reason'] == 'somebody looks into it'
    assert rows.run(0, 'old')

    rows.test("'ok 2 test_mini.Mini.test_new'")
    assert 'no longer needs quarantine' in rows.run(0)


@pytest.mark.slow
def test_row_that_hangs(rows: Rows) -> None:
    '''Is ended; the other one goes on.'''
    rows.add('old', '7.2.0')
    rows.add('new', '11.1.0')
    rows.run(0, 'new')
    rows.run(9, '--timeout', '20', HANG='7.2.0')
    assert rows.states == {'old': 'timeout', 'new': 'passed'}


@pytest.mark.slow
def test_interrupted(rows: Rows) -> None:
    '''
    Nothing is left, no result is written, and that of the run before is
    gone; what else is in the folder stays.
    '''
    rows.add('old', '7.2.0')
    results = rows.project.root / 'mkosi-matrix'
    (results / 'rows').mkdir(parents=True)
    for name in ('matrix.json', 'matrix.junit.xml', 'matrix.md',
                 'rows/mine'):
        (results / name).touch()
    with subprocess.Popen(
            rows.command('--tests', '*/*'), cwd=rows.project.root,
            env=rows.project.environment(HANG='7.2.0'),
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, start_new_session=True) as process:
        started = rows.project.root / 'mkosi-matrix/matrix.rows/old/tests-1'
        deadline = time.monotonic() + PATIENCE
        while not (list(started.glob('*/*/stdout'))
                   or time.monotonic() > deadline):
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=PATIENCE)
    assert process.returncode == 128 + signal.SIGTERM
    rows.project.assert_clean()
    assert {path.name for path in results.iterdir()} == {'matrix.rows',
                                                         'rows'}
    assert (results / 'rows/mine').exists()


def test_nothing_could_be_run(rows: Rows) -> None:
    '''That is no success.'''
    rows.add('far', distribution='fedora')
    assert 'error: no row could be run' in rows.run(9)
    assert rows.states == {'far': 'unreachable'}


def test_definition_changed(rows: Rows) -> None:
    '''Its lock is not believed any more.'''
    rows.add('old', '7.2.0')
    with open(rows.folder / 'old/mkosi.conf', 'a', encoding='utf-8') as file:
        file.write('# changed\n')
    assert 'the definition has changed' in rows.run(9)


def test_packages_are_gone(rows: Rows) -> None:
    '''No row of other packages, unless asked for.'''
    rows.add('old', '7.2.0')
    shutil.rmtree(rows.mirror)
    assert 'locked packages are gone' in rows.run(9)
    assert rows.states == {'old': 'unreachable'}


@pytest.mark.slow
def test_root_lacks_what_its_row_names(rows: Rows) -> None:
    '''It is not kept.'''
    rows.add('old', '7.2.0')
    path = rows.folder / 'hosts.yaml'
    path.write_text(path.read_text().replace(
        'firmware: {}', 'firmware: {edk2-x86_64-code.fd: /usr/share/none}'))
    assert 'old: its system lacks /usr/share/none' in rows.run(9)
    assert not list(rows.project.cache.glob('hosts/old/*'))


def test_no_tree_of_qemu(rows: Rows) -> None:
    '''Told before anything is done.'''
    rows.add('old', '7.2.0')
    shutil.rmtree(rows.project.tree / 'python')
    assert 'no source tree of QEMU' in rows.run(3)
    assert not (rows.project.cache / 'store').exists()


def test_images_are_not_built(rows: Rows) -> None:
    '''qemu-img is to look at them.'''
    rows.add('old', '7.2.0')
    result = subprocess.run(
        rows.command(), cwd=rows.project.root,
        env=rows.project.environment(), stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, encoding='utf-8', check=False)
    assert result.returncode == 3, result.stdout
    assert 'mini x86_64 is not built' in result.stdout
    assert 'next: scripts/mkosi-build.py x86_64 mini' in result.stdout


# The manual

@pytest.mark.slow
def test_commands_of_the_manual(rows: Rows, tmp_path: Path) -> None:
    '''All that make no lock, on rows and an image of other contents.'''
    for name in ('debian-12', 'debian-13', 'debian-unstable'):
        rows.add(name, '7.2.0')
    lines = [line.replace('/tmp/matrix', str(tmp_path / 'results'))
             for lines in MATRIX.values() for line in lines
             if '--update-lock' not in line]
    assert len(lines) == 5
    env = rows.project.environment()
    for line in lines:
        # Only so, qemu-img is not looked at, and the QEMU made up has none
        if 'matrix.py' in line and '--list' not in line:
            line += " --tests '*/*'"
        result = subprocess.run(
            f'{rows.project.python[0]} {line}', shell=True, env=env,
            cwd=rows.project.tree, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            encoding='utf-8', timeout=PATIENCE, check=False)
        assert result.returncode == 0, result.stdout
    told = json.loads((tmp_path / 'results/matrix.json').read_text())
    assert [row['state'] for row in told['rows']] == ['passed', 'passed']


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.skipif(not KEYRING.exists(), reason=f'needs {KEYRING}')
def test_lock_of_the_manual(rows: Rows) -> None:
    '''Made of what a real mirror has, of two suites.'''
    rows.add('debian-13')
    conf = rows.folder / 'debian-13/mkosi.conf'
    conf.write_text(conf.read_text().replace('mini-qemu', 'busybox-static'))
    path = rows.folder / 'hosts.yaml'
    path.write_text(path.read_text().replace(
        'release: trixie', 'release: trixie\n    suites: [trixie-backports]'))
    preferences = rows.folder / ('debian-13/mkosi.sandbox/etc/apt/'
                                 'preferences.d/backports')
    preferences.parent.mkdir(parents=True)
    preferences.write_text('Package: *\nPin: release n=trixie-backports\n'
                           'Pin-Priority: -1\n')
    link_store(rows.project)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in AMBIENT.items():
            patch.setenv(name, value)
        rows.project.mirror = ' '.join(
            url for url in host_mirrors('debian') if url.startswith('http'))
    line, = {line for lines in MATRIX.values() for line in lines
             if '--update-lock' in line}
    result = subprocess.run(
        f'{rows.project.python[0]} {line}', shell=True, cwd=rows.project.tree,
        env=rows.project.environment(), stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding='utf-8',
        timeout=10 * PATIENCE, check=False)
    assert result.returncode == 0, result.stdout
    lock = locks.load(rows.folder / 'debian-13/x86_64.lock')
    assert 'busybox-static' in {package.name for package in lock.packages}
    assert not [package for package in lock.packages
                if '~bpo' in package.version]


# What there is

def test_rows_of_the_tree() -> None:
    '''Each has a definition; locks are of it, and have its QEMU.'''
    known = hosts.load(registry.load(registry.DEFAULT))
    assert {'debian-12', 'debian-12-backports', 'debian-13',
            'debian-unstable', 'ubuntu-24.04', 'fedora', 'rocky-9',
            'rocky-10'} == set(known)
    locked = [host for host in known.values() if host.lock.exists()]
    if host_architecture() == 'x86_64':
        assert len(locked) == 4
    for host in locked:
        lock = locks.load(host.lock)
        assert lock.definition == locks.definition_digest(host.folder)
        assert (lock.distribution, lock.release) == (host.distribution,
                                                     host.release)
        assert host.package in {package.name for package in lock.packages}


def test_what_is_declared() -> None:
    '''Is about something that the baseline has, or about a test.'''
    known = qemu_img.load_baseline(HOSTS / 'qemu-img.json')
    names = [*known.values, *(f'{name} {qemu_img.DISK}a' for name in (
        'info', 'check', 'map', 'measure', 'convert', 'cross'))]
    for each in differences.load(HOSTS / 'differences.yaml'):
        assert (re.match('(x86_64|aarch64)/', each.assertion)
                or fnmatch.filter(names, each.assertion)), each
    Quarantine.load(HOSTS / 'quarantine.yaml')


GOOD = 'schema: 1\nhosts:\n' + ROW.format(name='row', distribution='debian')


@pytest.mark.parametrize('old, new, expected', [
    ('schema: 1', 'schema: 2', 'hosts.yaml: expected schema 1'),
    ('release: trixie', 'realease: trixie', "unknown key 'realease'"),
    ('    package: mini-qemu\n', '', "hosts.yaml:3: missing key 'package'"),
    ('x86_64:', 'i386:', "hosts.yaml:9: unknown key 'i386'"),
    ('/usr/bin/qemu-img', 'qemu-img', 'hosts.yaml:10: expected a path below'),
    ('/usr/bin/qemu-img', '/usr/bin/a;b', 'expected a path below /usr'),
    ('  row:', '  wor:', 'no definition wor/mkosi.conf'),
    ('firmware: {}', 'firmware: []', 'expected a mapping'),
])
def test_wrong_rows(old: str, new: str, expected: str, project: Project
                    ) -> None:
    '''With file and line.'''
    folder = project.mkosi / 'hosts'
    (folder / 'row').mkdir(parents=True)
    (folder / 'row/mkosi.conf').write_text(CONF)
    assert old in GOOD
    (folder / 'hosts.yaml').write_text(GOOD)
    known = registry.load(project.registry)
    assert list(hosts.load(known)) == ['row']
    (folder / 'hosts.yaml').write_text(GOOD.replace(old, new))
    with pytest.raises(BuildError, match=re.escape(expected)):
        hosts.load(known)


def test_unknown_row() -> None:
    '''Those that there are are listed.'''
    with pytest.raises(InputError, match="no row 'debian-1'") as caught:
        hosts.choose(hosts.load(registry.load(registry.DEFAULT)),
                     ['debian-1'])
    assert 'debian-13' in str(caught.value)


@pytest.mark.parametrize('arguments', [
    ['--update-lock'], ['--allow-expired', 'row'], ['--jobs', '0'],
    ['--list', '--record'], ['--nothing']])
def test_wrong_usage(arguments: Sequence[str]) -> None:
    '''Refused.'''
    with pytest.raises(UsageError):
        parse_arguments(arguments)


# Judging

def found(name: str, version: str, **states: str) -> Found:
    '''A row that ran, with cases in these states.'''
    host = hosts.Host(name, '', Path('/'), 'debian', 'sid', (), 'qemu', {},
                      '/usr/bin/qemu-img', {})
    cases = tuple(Case(case, state) for case, state in states.items())
    return Found(host, None, differences.Version.parse(version),
                 outcomes=[Outcome('x86_64/test', cases, 1.0)])


def judged(*rows: Found) -> Dict[str, str]:
    '''What came of @rows where nothing is declared.'''
    judge = Judge([], Quarantine(Path('none'), {}))
    nothing = qemu_img.Observed(differences.Version(10, 0, 0), {})
    return {row.name: row.state for row in judge.rows(rows, None, nothing)}


def test_newest_version_counts() -> None:
    '''Whatever the order of rows, and for cases that it has.'''
    assert judged(found('b', '9.0.0', one='passed', two='passed'),
                  found('c', '10.0.0', one='skipped'),
                  found('a', '7.2.0', one='skipped', two='skipped')) == {
        'b': 'failed', 'c': 'failed', 'a': 'failed'}
    assert judged(found('b', '9.0.0', one='passed', two='passed'),
                  found('c', '10.0.0', one='passed', two='skipped'),
                  found('a', '7.2.0', one='passed', two='skipped')) == {
        'b': 'failed', 'c': 'passed', 'a': 'passed'}


def test_nothing_passed() -> None:
    '''Silence is no success, and neither are skips alone.'''
    assert judged(found('a', '10.0.0')) == {'a': 'failed'}
    assert judged(found('a', '10.0.0', one='skipped')) == {'a': 'failed'}
    # Nor do qemu-img's answers stand for tests that did not run
    row = found('a', '10.0.0', one='skipped')
    row.images = qemu_img.Observed(differences.Version(10, 0, 0), {})
    assert judged(row) == {'a': 'failed'}
    row.outcomes.clear()
    assert judged(row) == {'a': 'passed'}


def test_wrappers_of_several_rows(tmp_path: Path) -> None:
    '''
    Each can be run once it is made, though other threads start programs
    meanwhile, which have all files of ours open for a moment.
    '''
    def make(row: int) -> List[bytes]:
        return [subprocess.run(
            [hosts.wrap(Path('/'), tmp_path / f'{row}-{number}',
                        '/usr/bin/true')], check=True,
            stdout=subprocess.PIPE).stdout for number in range(150)]

    with ThreadPoolExecutor(8) as threads:
        for said in threads.map(make, range(8)):
            assert said == [b''] * 150


def test_host_as_a_row(tmp_path: Path) -> None:
    '''
    The wrapper of a root runs the programs there: that of the host's own
    system gives the host's qemu-img.
    '''
    program = hosts.wrap(Path('/'), tmp_path / 'a b', '/usr/bin/qemu-img')
    said = subprocess.run([program, '--version'], stdout=subprocess.PIPE,
                          check=True).stdout
    assert said == subprocess.run(['qemu-img', '--version'], check=True,
                                  stdout=subprocess.PIPE).stdout
