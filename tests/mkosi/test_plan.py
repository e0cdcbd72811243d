# SPDX-License-Identifier: GPL-2.0-or-later
'''
The plan of a build: the same for everybody, true, and good for building
from it; whatever is not as planned is named, and nothing built.
'''

import dataclasses
import io
import json
from pathlib import Path
import shutil
from typing import Any, Dict, List, Mapping

import pytest

from fixtures_builder import Debian, POSTOUTPUT, Project
from mkosi_build import build, command, plan, registry as registries
from mkosi_build.build import Builder
from mkosi_build.cache import Cache
from mkosi_build.error import InputError
from mkosi_build.report import Report

pytest_plugins = ['fixtures_builder']

SLOW = pytest.mark.slow


def planned(project: Project, *arguments: str) -> str:
    '''What --plan prints, and nothing else.'''
    result = project.good('mini', '--plan', *arguments)
    assert not result.stderr
    return result.stdout


def save(project: Project) -> Path:
    '''A file with the plan of @project.'''
    path = project.root / 'saved.json'
    path.write_text(planned(project))
    return path


# What it is

def test_same_for_everybody(project: Project, tmp_path: Path) -> None:
    '''
    Another folder, umask, habits, time: the same text, and nothing of the
    machine in it. Nothing was fetched or built for it.
    '''
    text = planned(project)
    for fact in (str(tmp_path), str(Path.home()), '/usr/lib/python'):
        assert fact not in text.replace('$TOOLS/usr/lib/python', '')
    other = Project(tmp_path / 'another' / 'place', 'http://127.0.0.1:1',
                    project.cache / 'no-tools')
    shutil.copytree(project.tree, other.tree)
    for path in other.definition.iterdir():
        path.chmod(path.stat().st_mode & 0o700)
    again = other.run('--plan', TZ='Asia/Tokyo', LC_ALL='tr_TR.UTF-8',
                      PYTHONHASHSEED='7', PATH='/nonexistent')
    assert again.stdout == text
    assert not (project.cache / 'store').exists()
    assert not project.artefacts()


def test_content(project: Project) -> None:
    '''Inputs by hash, steps with settings, outputs as recorded.'''
    build_, = json.loads(planned(project))['builds'].values()
    assert build_['identity'] in project.registry.read_text()
    files = build_['inputs']['definition']['files']
    assert files['mini/mkosi.postoutput'].startswith('program ')
    assert files['mini/mkosi.conf'].startswith('file ')
    packages = build_['inputs']['lock']['packages']
    assert set(packages) == {f'{name} 1 amd64' for name in Debian.MINIMAL}
    assert all(digest in project.lock_path.read_text()
               for digest in packages.values())
    assert {'x86_64', 'aarch64'} <= set(build_['inputs']['tools'])
    settings = next(step['settings'] for step in build_['steps']
                    if step['step'] == 'mkosi')
    assert settings['Content.Packages'] == ['mini-hello']
    assert settings['Content.SourceDateEpoch'] == ['1700000000']
    for output in build_['outputs'].values():
        assert output['sha256'] in project.registry.read_text()


def test_json(project: Project) -> None:
    '''The same among the events.'''
    event, = project.events(planned(project, '--json'))
    assert event['event'] == 'plan'
    assert event['plan'] == json.loads(planned(project))


def test_diffable(project: Project) -> None:
    '''A line of difference a change, and the digests that follow of it.'''
    before = planned(project).splitlines()
    project.edit(project.definition / 'mkosi.conf', 'mini-hello',
                 'mini-hello\n        mini-lib')
    after = planned(project).splitlines()
    new = [line.strip() for line in after if line not in before]
    assert '"mini-lib"' in new
    # Beside it a comma, the file, the definition's digest, the identity
    assert len(new) == 5


@SLOW
def test_true(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    '''The command and the environment are those of the build.'''
    for name, value in project.environment().items():
        monkeypatch.setenv(name, value)
    seen: List[Dict[str, Any]] = []
    real = command.run_isolated

    def spy(run: List[str], log: Path, network: bool,
            env: Mapping[str, str], interpreter: Any = None) -> int:
        words = [*command.isolated(network), *run]
        seen.append({'command': words, 'network': network,
                     'environment': {**command.ENVIRONMENT, **env}})
        return real(run, log, network, env, interpreter)

    monkeypatch.setattr(command, 'run_isolated', spy)
    registry = registries.load(project.registry)
    job = build.prepare(registry, registry.image('mini'), 'x86_64')
    builder = Builder(Cache(), Report(stream=io.StringIO()))
    builder.build(job, compare=True)
    ran, = (step for step in seen if 'mkosi' in step['command'])
    step, = (step for step in plan.of_job(job)['steps']
             if step['step'] == 'mkosi')
    text = json.dumps({key: step[key] for key in ran})
    for name, real_path in (
            ('$WORK', builder.cache.root / 'work/mini-x86_64'),
            ('$TOOLS', builder.cache.tools / job.tool_lock.digest),
            ('$PYTHON', project.python[0])):
        text = text.replace(name, str(real_path))
    assert json.loads(text) == ran


# A build from it

@SLOW
def test_build(project: Project) -> None:
    '''The bytes that it names; again, there is nothing to do.'''
    path = save(project)
    said = project.good('--from-plan', str(path)).stderr
    assert 'mini x86_64: the bytes that the plan names' in said
    assert len(project.artefacts()) == 3
    event, = (e for e in project.events(project.good(
        '--json', '--from-plan', str(path)).stdout)
        if e['event'] == 'planned')
    assert event['compared'] is True
    assert event['artefacts']['disk'] in project.registry.read_text()


def test_never_recorded(built: Project) -> None:
    '''Without bytes in the plan there is nothing to compare, and it says.'''
    path = save(built)
    content = json.loads(path.read_text())
    for output in content['builds']['mini x86_64']['outputs'].values():
        output['sha256'] = output['size'] = None
    path.write_text(json.dumps(content))
    said = built.good('--from-plan', str(path)).stderr
    assert 'built as planned; the plan names no bytes' in said


def test_other_bytes(built: Project) -> None:
    '''Of one artefact: both hashes.'''
    path = save(built)
    content = json.loads(path.read_text())
    disk = content['builds']['mini x86_64']['outputs']['disk']
    real, disk['sha256'] = disk['sha256'], '1' * 64
    path.write_text(json.dumps(content))
    said = built.bad(7, '--from-plan', str(path))
    assert 'mini x86_64: other bytes than the plan names:' in said
    assert f'expected {"1" * 64}' in said and f'found    {real}' in said


def change_conf(project: Project) -> str:
    '''Another setting.'''
    project.edit(project.definition / 'mkosi.conf', 'Bootable=no',
                 'Bootable=auto')
    return '/steps/3/settings/Content.Bootable/0'


def change_mode(project: Project) -> str:
    '''A file that is a program no more.'''
    (project.definition / 'mkosi.postoutput').chmod(0o644)
    return '/inputs/definition/files/mini/mkosi.postoutput'


def change_file(project: Project) -> str:
    '''Another script.'''
    project.add_script('mkosi.postoutput', POSTOUTPUT + '#\n')
    return '/inputs/definition/files/mini/mkosi.postoutput'


def change_lock(project: Project) -> str:
    '''A package less.'''
    lines = project.lock_path.read_text().splitlines(True)
    project.lock_path.write_text(''.join(lines[:-1]))
    return '/inputs/lock/packages/mini-shell 1 amd64'


def change_epoch(project: Project) -> str:
    '''Another time.'''
    project.edit(project.lock_path, 'epoch: 17', 'epoch: 16')
    return '/inputs/lock/epoch'


def change_tools(project: Project) -> str:
    '''Another tool, for hosts of the other architecture.'''
    path = project.mkosi / 'tools/aarch64.lock'
    lines = path.read_text().splitlines(True)
    path.write_text(''.join(lines[:-1]))
    return '/inputs/tools/aarch64/packages/'


@pytest.mark.parametrize('change', [
    change_conf, change_mode, change_file, change_lock, change_epoch,
    change_tools])
def test_not_as_planned(change: Any, project: Project) -> None:
    '''Each difference is named, and nothing begun.'''
    path = save(project)
    where = change(project)
    said = project.bad(3, '--from-plan', str(path))
    assert 'mini x86_64: this tree is not what was planned:' in said
    assert f'\n    {where}' in said and '\n    /identity: ' in said
    assert not (project.cache / 'store').exists()
    assert not project.artefacts()


def test_many_differences(project: Project) -> None:
    '''Not more than fit on a screen.'''
    path = save(project)
    content = json.loads(path.read_text())
    files = content['builds']['mini x86_64']['inputs']['definition']['files']
    files.update({f'mini/{number}': 'file' for number in range(100)})
    path.write_text(json.dumps(content))
    said = project.run('--from-plan', str(path)).stderr
    assert 'and 80 more' in said
    assert '/mini/0: the plan has "file", this tree has nothing' in said


@pytest.mark.parametrize('text, expected', [
    ('', 'not a plan of a build'), ('[]', 'not a plan of a build'),
    ('{', 'not a plan of a build'), ('{"schema": 1}', 'not a plan'),
    ('{"schema": 1, "builds": 3}', 'not a plan of a build'),
    ('{"schema": 1, "builds": {"mini x86_64": {}}}', 'not a plan'),
    ('{"schema": 1, "builds": {"mini x86_64": {"outputs": {"disk": 1}}}}',
     'not a plan of a build'),
    ('{"schema": 1, "builds": {"mini x86_64": {"outputs": []}}}',
     'not a plan of a build'),
    ('{"schema": 1, "builds": {"\\u001b[2J x86_64": {"outputs": {}}}}',
     'found \\u001b[2J x86_64'),
    ('[' * 100000, 'not a plan of a build'),
    ('{"schema": 2, "builds": {}}', 'expected a plan of schema 1, found 2'),
    ('{"schema": 1, "builds": {}}', 'what was asked for, found none')])
def test_broken(text: str, expected: str, project: Project) -> None:
    '''What is no plan, and where one comes from.'''
    path = project.root / 'saved.json'
    path.write_text(text)
    assert expected in project.bad(3, '--from-plan', str(path))


def test_no_file(project: Project) -> None:
    '''A plan that is not there, or not named.'''
    assert 'No such file' in project.bad(3, '--from-plan', 'nothing')
    assert 'expected one argument' in project.bad(2, '--from-plan')


@pytest.mark.parametrize('arguments', [
    ['--plan', '--check'], ['--from-plan', 'x', '--plan'],
    ['--plan', '--from-plan', 'x'], ['--from-plan', 'x', '--update']])
def test_modes(arguments: List[str], project: Project) -> None:
    '''One at a time.'''
    assert 'not allowed with argument' in project.bad(2, *arguments)


def test_differences() -> None:
    '''Every kind of value, whatever it is compared with.'''
    values: List[Any] = [None, True, 1, 'x', [], [1], [1, 2], {}, {'a': 1}]
    for one in values:
        for other in values:
            found = list(plan.differences(one, other))
            assert bool(found) == (one is not other), (one, other)


def test_definition_that_vanishes(project: Project) -> None:
    '''A job whose folder has no definition any longer.'''
    registry = registries.load(project.registry)
    job = build.prepare(registry, registry.image('mini'), 'x86_64')
    with pytest.raises(InputError, match='no definition there'):
        plan.of_job(dataclasses.replace(job, folder=project.root))
