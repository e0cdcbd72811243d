# SPDX-License-Identifier: GPL-2.0-or-later
'''The builder's command line: what it takes, and what it tells.'''

import json
from pathlib import Path
import re
import shutil
import signal
import subprocess
import sys
import time
from typing import Dict

import pytest

from fixtures_builder import POSTOUTPUT, REGISTRY, ROOT, Debian, Project
from mkosi_build import cli, error, report

pytest_plugins = ['fixtures_builder']

SLOW = pytest.mark.slow

SECOND = '''\
  other:
    description: Another one
    definition: other
    distribution: debian
    release: trixie
    architectures:
      x86_64:
        not-locked: waits for its packages
'''


def add_second(project: Project) -> None:
    '''A second image, that can't be built yet.'''
    text = project.registry.read_text()
    artefacts = text[text.index('        artefacts:'):]
    artefacts = re.sub('(?m)^ +(sha256|size): .*\n', '', artefacts)
    project.registry.write_text(text + SECOND + artefacts)


# Usage

@pytest.mark.parametrize('arguments, expected', [
    (['--nonsense'], 'unrecognized arguments: --nonsense'),
    (['--check', '--list'], 'not allowed with argument'),
    (['--local', '--update'], 'not allowed with argument'),
    (['--update-lock', '--check'], "--update-lock can't be combined"),
    (['--update-lock', '--allow-newer'], "--update-lock can't be combined"),
    (['--jobs', '0'], 'argument --jobs: invalid'),
    (['--jobs', 'many'], 'argument --jobs: invalid'),
])
def test_wrong_usage(arguments: 'list[str]', expected: str,
                     project: Project) -> None:
    '''Exit code 2, and where to read on.'''
    said = project.bad(2, *arguments)
    assert expected in said
    assert 'next: scripts/mkosi-build.py --help' in said


def test_wrong_architecture(project: Project) -> None:
    '''None, or one that does not exist.'''
    for arguments in ([], ['sparc']):
        result = subprocess.run(
            [*project.python, project.script, *arguments],
            stderr=subprocess.PIPE, encoding='utf-8', check=False)
        assert result.returncode == 2
        assert 'next: scripts/mkosi-build.py --help' in result.stderr
    assert "'x86_64'" in result.stderr


def test_help_teaches() -> None:
    '''All modes, all exit codes, the environment; nothing is loaded.'''
    said = subprocess.run(
        [sys.executable, '-S', ROOT / 'scripts/mkosi-build.py', '--help'],
        stdout=subprocess.PIPE, encoding='utf-8', check=True).stdout
    for word in ('--list', '--check', '--update', '--update-lock', '--boot',
                 '--allow-newer', '--local', '--json', 'QEMU_MKOSI_DIR',
                 'QEMU_TEST_CACHE_DIR', 'QEMU_MKOSI_MIRROR'):
        assert word in said
    for name in ('BuildError', 'UsageError', 'InputError', 'HostError',
                 'FetchError', 'MkosiError', 'MismatchError'):
        code = getattr(error, name).exit_code
        assert re.search(rf'^  {code}  ', said, re.M)


def test_unknown_image(project: Project) -> None:
    '''The nearest name is told.'''
    assert "'mini'" in project.bad(3, 'minni')


def test_image_that_cannot_be_built(project: Project) -> None:
    '''Named, it is an error with the reason; else it is left out.'''
    add_second(project)
    said = project.run('other').stderr
    assert "other x86_64 can't be built yet: waits for its packages" in said
    result = project.run('--check')
    assert result.returncode == 0, result.stderr
    assert '1 images for x86_64' in result.stderr


@pytest.mark.parametrize('arguments', [
    ['--boot'], ['mini', 'mini', '--boot'], ['mini', '--boot', '--list'],
    ['mini', '--boot', '--update-lock']])
def test_boot_takes_one_image(arguments: 'list[str]',
                              project: Project) -> None:
    '''And one that there is, or is built now.'''
    assert '--boot takes one image' in project.bad(2, *arguments)


def test_boot_without_qemu(built: Project) -> None:
    '''The package that has it.'''
    said = built.bad(4, 'mini', '--boot', PATH='/nonexistent')
    assert 'apt-get install qemu-system-x86' in said


# --list and --check

def test_list_states(built: Project) -> None:
    '''Not built yet, built here, published, not locked; each with why.'''
    def state(project: Project) -> str:
        lines = project.good('--list').stdout.splitlines()
        assert lines[0].split() == ['IMAGE', 'ARCH', 'SIZE', 'STATE']
        line, = (line for line in lines if line.startswith('mini'))
        return line
    line = state(built)
    assert line.endswith('built here') and ' MB ' in line
    shutil.rmtree(built.cache / 'images')
    assert 'not built yet: run scripts/mkosi-build.py' in state(built)
    built.edit(built.registry, 'schema: 1\n',
               'schema: 1\nstores:\n  - https://example.org/store\n')
    assert state(built).endswith('published')
    text = built.registry.read_text()
    built.registry.write_text(
        re.sub('(?m)^ +(sha256|size|identity): .*\n', '', text))
    line = state(built)
    assert 'not built yet: mini x86_64 has no hashes' in line
    assert ' - ' in line
    built.registry.write_text(text)
    (built.definition / 'mkosi.conf').unlink()
    assert 'broken: ' in state(built)
    add_second(built)
    assert ('not locked yet: waits for its packages'
            in built.good('--list').stdout)


def test_list_as_json(built: Project) -> None:
    '''The same, for programs.'''
    event, = built.events(built.good('--list', '--json').stdout)
    assert event['event'] == 'listed' and event['state'] == 'built here'
    assert event['architectures'] == ['x86_64']
    assert event['sizes']['kernel'] == len('kernel\n')


def test_list_into_a_closed_pipe(built: Project) -> None:
    '''As in "--list | head -1": no traceback.'''
    for arguments in (['--list'], ['--list', '--json'], ['--json']):
        result = built.run(*arguments, wrapper=(
            'sh', '-c', '("$@"; echo $? >&2) | true', 'sh'))
        assert result.stderr in ('0\n', '141\n')
    built.assert_clean()


def test_check(project: Project) -> None:
    '''Without a build: agreement, and each way not to agree.'''
    assert 'registry, locks and definitions agree' in project.good(
        '--check').stderr
    project.edit(project.registry, 'disk-bytes: 10000000', 'disk-bytes: 9')
    assert 'the budget is 9, found' in project.bad(3, '--check')
    with open(project.mkosi / 'tools/mkosi.conf', 'a',
              encoding='utf-8') as file:
        file.write('# changed\n')
    with open(project.definition / 'mkosi.conf', 'a',
              encoding='utf-8') as file:
        file.write('# changed\n')
    result = project.run('--check')
    assert result.returncode == 3
    for problem in ('tools: the definition has changed since x86_64.lock',
                    'tools: the definition has changed since aarch64.lock',
                    'mini: the definition has changed since',
                    'the budget is 9'):
        assert result.stderr.count(problem) == 1
    assert not (project.cache / 'store').exists()


def test_check_of_the_real_tree() -> None:
    '''Registry, locks and definitions of this checkout.'''
    if not (ROOT / 'tests/functional/mkosi/registry.yaml').exists():
        pytest.skip('no registry')
    subprocess.run([sys.executable, ROOT / 'scripts/mkosi-build.py', 'all',
                    '--check'], check=True)


# Several at once

def add_twin(project: Project) -> Path:
    '''
    A second image, of the same packages, with a longer name. Returns its
    definition's folder.
    '''
    twin = project.mkosi / 'minimal'
    shutil.copytree(project.definition, twin)
    text = project.registry.read_text()
    entry = text[text.index('  mini:'):].replace('mini', 'minimal')
    project.registry.write_text(text + entry)
    return twin


@SLOW
def test_two_at_once(project: Project) -> None:
    '''Both are built, and each line says of which it speaks.'''
    add_twin(project)
    said = project.good('--jobs', '2').stderr
    for name in ('mini', 'minimal'):
        assert f'[{name} x86_64] {name} x86_64: built' in said
        assert (project.cache / f'log/{name}-x86_64.log').stat().st_size
    assert all(line.startswith('[') for line in said.splitlines())
    events = project.events(project.good('--json').stdout)
    assert {event['job']: event['fresh'] for event in events
            if event['event'] == 'image'} == {
                'mini x86_64': False, 'minimal x86_64': False}


@SLOW
def test_one_of_two_fails(project: Project) -> None:
    '''The other is built; the exit code is that of the one that failed.'''
    twin = add_twin(project)
    (twin / 'mkosi.postoutput').write_text('#!/bin/sh\nexit 1\n')
    result = project.run('--jobs', '2', '--local')
    assert result.returncode == 6, result.stderr
    assert '[mini x86_64] mini x86_64: built' in result.stderr
    assert 'error: 1 of 2 builds failed: minimal x86_64\n' in result.stderr
    project.assert_clean()


@SLOW
def test_two_at_once_are_recorded(project: Project) -> None:
    '''Neither record takes the other's away.'''
    add_twin(project)
    before = project.registry.read_text()
    project.registry.write_text(re.sub(
        r'(?m)^ +(sha256|size|identity): .*\n', '', before))
    project.good('--update', '--jobs', '2')
    assert project.registry.read_text().count('sha256: ') == 6
    project.good('--check')


@SLOW
@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM,
                                    signal.SIGKILL])
def test_several_end_together(project: Project, number: int) -> None:
    '''However the builder that started them ends.'''
    twin = add_twin(project)
    for folder in (twin, project.definition):
        script = folder / 'mkosi.postoutput'
        script.write_text('#!/bin/sh\nsleep 99\n')
    with project.start('--jobs', '2', '--local') as process:
        deadline = time.monotonic() + 60
        while sum('Running post-output script' in path.read_text()
                  for path in project.cache.glob('log/*.log')) < 2:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(number)
        assert process.wait(timeout=10)
    project.assert_gone()


# --update, --local

def test_update_keeps_comments(template: Project) -> None:
    '''Hashes come in; not a character else changes.'''
    text = template.registry.read_text()
    assert '# Comments stay\n' in text and '# not a kernel\n' in text
    assert REGISTRY == re.sub('(?m)^ +(sha256|size|identity): .*\n', '',
                              text)
    assert len(re.findall('(?m)^ +sha256: [0-9a-f]{64}$', text)) == 3


def test_update_without_change(built: Project) -> None:
    '''Says so, and touches nothing.'''
    before = built.registry.stat().st_mtime_ns
    result = built.good('--update')
    assert 'registry.yaml: unchanged' in result.stderr
    assert built.registry.stat().st_mtime_ns == before


@SLOW
def test_edit_try_record(built: Project) -> None:
    '''
    A developer's round: edit, see that it is noticed, try it with --local,
    record it with --update.
    '''
    built.add_script('mkosi.postoutput',
                     POSTOUTPUT.replace('echo kernel', 'echo other'))
    assert 'definition has changed' in built.bad(3)
    local = built.good('--local', '--json')
    events = built.events(local.stdout)
    image, = (e for e in events if e['event'] == 'image')
    override, = (e for e in events if e['event'] == 'override')
    content = json.loads(Path(override['path']).read_bytes())
    entry = content['images']['mini']['x86_64']
    assert content['schema'] == 1 and entry['locked'] is True
    assert entry['identity'] == image['identity']
    for kind, artefact in image['artefacts'].items():
        assert entry['artefacts'][kind] == {
            'sha256': artefact['sha256'], 'size': artefact['size']}
        assert Path(artefact['asset']).name == artefact['sha256']
        assert (Path(artefact['asset']).read_bytes()
                == Path(artefact['path']).read_bytes())
    assert 'definition has changed' in built.bad(3)
    recorded = built.good('--update', '--json').stdout
    assert not [e for e in built.events(recorded) if e['event'] == 'start']
    assert 'agree' in built.good('--check').stderr
    assert 'up to date' in built.good().stderr
    # What the registry says now needs no override
    assert not Path(override['path']).exists()


@SLOW
def test_update_beyond_the_budget(unbuilt: Project) -> None:
    '''Refused, and nothing is recorded.'''
    unbuilt.edit(unbuilt.registry, 'packages: 10', 'packages: 3')
    before = unbuilt.registry.read_text()
    said = unbuilt.bad(3, '--update')
    assert 'packages: the budget is 3, found 4' in said
    assert unbuilt.registry.read_text() == before


# JSON

def documented() -> 'set[str]':
    '''The events that report.py's docstring has.'''
    text = (report.__doc__ or '').partition('these:\n')[2]
    return {name for names in re.findall(r'(?m)^    (\w+(?:, \w+)*)  +\S',
                                         text)
            for name in names.split(', ')}


def test_events_are_documented() -> None:
    '''Those that the source tells, and no others.'''
    told = {name for path in Path(report.__file__).parent.glob('*.py')
            for name in re.findall(r"(?:event|_end_stage)\(\s*'(\w+)'",
                                   path.read_text(encoding='utf-8'))}
    assert told == documented()


@SLOW
def test_json_of_a_build(project: Project) -> None:
    '''Each line an object, with all that is promised; nothing beside.'''
    result = project.good('--json')
    assert not result.stderr
    events = project.events(result.stdout)
    assert [e['event'] for e in events if e['event'] != 'count'] == [
        'start', 'done', 'log', 'start', 'done', 'start', 'done', 'image']
    for event in events:
        assert event['event'] in documented()
        assert isinstance(event['seconds'], float)
        assert isinstance(event['text'], str)
    assert events[-1]['fresh'] is True
    last = [e for e in events if e['event'] == 'count'][-1]
    assert last['done'] == last['total'] == 4 and last['bytes'] > 0


def test_json_of_an_error(project: Project, debian: Debian) -> None:
    '''The last line has code, message and next step.'''
    project.write_lock(debian, 'base-files')
    result = project.run('--json')
    assert result.returncode == 3 and not result.stderr
    event: Dict[str, object] = project.events(result.stdout)[-1]
    assert (event['event'], event['code']) == ('error', 3)
    assert event['message'] and event['next']
    usage = project.run('--json', '--nonsense')
    event, = project.events(usage.stdout)
    assert (event['event'], event['code'], usage.returncode) == (
        'error', 2, 2)


# Signals

def test_nohup_is_respected() -> None:
    '''Who ignored a signal goes on ignoring it.'''
    before = {n: signal.getsignal(n) for n in (signal.SIGHUP, signal.SIGTERM)}
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        assert cli.main(['--nonsense']) == 2
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        assert callable(signal.getsignal(signal.SIGTERM))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
