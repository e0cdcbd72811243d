# SPDX-License-Identifier: GPL-2.0-or-later
'''
A builder that is killed, at any moment: nothing of it lives on, nothing
half-made is used, and the next one succeeds.
'''

import os
from pathlib import Path
import random
import shutil
import signal
import subprocess
import time
from typing import Callable, List

import pytest

from fixtures_builder import (Debian, FaultServer, POSTOUTPUT, Project,
                              silence, trickle)

pytest_plugins = ['fixtures_builder']

SLOW = pytest.mark.slow

# Of a builder that takes some three seconds
KILLS = 15
SIGNALS = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGHUP: 129}


def wait_for(happened: Callable[[], object],
             process: 'subprocess.Popen[str]') -> None:
    '''Wait until something has happened that @process does.'''
    deadline = time.monotonic() + 60
    while not happened():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)


def assert_nothing_half_made(project: Project) -> None:
    '''Whatever has a final name is whole; no process is left.'''
    project.assert_gone()
    project.asset_hashes()
    for folder in project.cache.glob('images/mini/x86_64/*'):
        assert (folder / 'record.json').exists()


@pytest.fixture(name='hanging')
def fixture_hanging(unbuilt: Project, debian: Debian) -> Project:
    '''A project whose build hangs, in a script that ignores signals.'''
    good = (unbuilt.definition / 'mkosi.postoutput').read_text()
    unbuilt.add_script('mkosi.postoutput', 'true\n'.join([
        '#!/bin/sh\n', 'trap "" INT TERM HUP\n',
        'echo hanging\nsleep 99 & sleep 99\n', good]))
    unbuilt.write_lock(debian, *debian.MINIMAL)
    return unbuilt


def hangs(project: Project) -> Callable[[], object]:
    '''Whether mkosi has come to the script.'''
    log = project.cache / 'log/mini-x86_64.log'
    return lambda: log.exists() and b'hanging\n' in log.read_bytes()


@SLOW
@pytest.mark.parametrize('number', sorted(SIGNALS))
def test_ended_in_mkosi(number: int, hanging: Project) -> None:
    '''mkosi ends with it, and so does all that mkosi started.'''
    with hanging.start('--local') as process:
        wait_for(hangs(hanging), process)
        process.send_signal(number)
        assert process.wait(timeout=5) == SIGNALS[signal.Signals(number)]
    hanging.assert_clean()


@SLOW
def test_interrupted_on_a_terminal(hanging: Project) -> None:
    '''All processes of the terminal get the signal, not just ours.'''
    with hanging.start('--local') as process:
        wait_for(hangs(hanging), process)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(timeout=5) == 130
    hanging.assert_clean()


@SLOW
def test_killed_in_mkosi(hanging: Project, debian: Debian) -> None:
    '''Without a last word: the kernel ends the others.'''
    with hanging.start('--local') as process:
        wait_for(hangs(hanging), process)
        process.kill()
        process.wait(timeout=5)
    assert_nothing_half_made(hanging)
    hanging.add_script('mkosi.postoutput', POSTOUTPUT)
    hanging.write_lock(debian, *debian.MINIMAL)
    hanging.good('--local')


@pytest.fixture(name='slow_mirror')
def fixture_slow_mirror(project: Project, debian: Debian,
                        faults: FaultServer) -> Project:
    '''A project whose mirror stops in the middle of a package.'''
    project.mirror = faults.url
    faults.root = debian.mirror
    shell = debian.packages['mini-shell']
    data = (debian.mirror / shell.location).read_bytes()
    faults.answers[f'/{shell.location}'] = [
        trickle(data, 500_000), faults.otherwise]
    hello = debian.packages['mini-hello']
    faults.answers[f'/{hello.location}'] = [silence, faults.otherwise]
    return project


def fetches(project: Project, debian: Debian) -> Callable[[], object]:
    '''Whether half of the package is there.'''
    part = project.cache / f'store/{debian.packages["mini-shell"].sha256}.part'
    return lambda: part.exists() and part.stat().st_size > 400_000


@SLOW
@pytest.mark.parametrize('number', [*sorted(SIGNALS), signal.SIGKILL])
def test_ended_in_fetch(number: int, slow_mirror: Project, debian: Debian,
                        faults: FaultServer) -> None:
    '''At once, mirrors or not; the next one goes on where it was.'''
    with slow_mirror.start() as process:
        wait_for(fetches(slow_mirror, debian), process)
        process.send_signal(number)
        code = process.wait(timeout=5)
        said = process.communicate()[1]
    assert code == SIGNALS.get(signal.Signals(number), -number)
    assert 'Traceback' not in said and 'Exception' not in said
    assert_nothing_half_made(slow_mirror)
    assert [name for name in slow_mirror.files() if name.endswith('.part')]
    if number in (signal.SIGTERM, signal.SIGKILL):
        slow_mirror.good()
        assert any('Range' in headers for headers in faults.headers)


def forget(project: Project, registry: str) -> None:
    '''Forget what was built, but for packages and tools.'''
    for folder in (project.cache / 'images', project.assets):
        shutil.rmtree(folder, ignore_errors=True)
    project.registry.write_text(registry)


@SLOW
@pytest.mark.parametrize('seed', [1])
def test_killed_at_any_moment(seed: int, unbuilt: Project) -> None:
    '''
    While it builds and records, again and again: afterwards the registry is
    the old or the new one, and one more call makes all whole.
    '''
    dice = random.Random(seed)
    old = unbuilt.registry.read_text()
    start = time.monotonic()
    unbuilt.good('--update')
    took = time.monotonic() - start
    new = unbuilt.registry.read_text()
    ended: List[bool] = []
    for _ in range(KILLS):
        if unbuilt.registry.read_text() == new:
            forget(unbuilt, old)
        with unbuilt.start('--update') as process:
            try:
                process.wait(timeout=dice.uniform(0.05, 1.1 * took))
            except subprocess.TimeoutExpired:
                process.kill()
            ended.append(process.wait() == 0)
        assert_nothing_half_made(unbuilt)
        assert unbuilt.registry.read_text() in (old, new)
    assert ended.count(False) >= KILLS // 2
    unbuilt.good('--update')
    assert unbuilt.registry.read_text() == new
    assert 'up to date' in unbuilt.good().stderr


STOPPING = '''\
import os, runpy, signal, sys
sys.path.insert(0, sys.argv[1])
from mkosi_build import {module}
def stop(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)
{module}.{function} = stop
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name='__main__')
'''

# In the order in which a build with --update comes by
MOMENTS = ['build.run_mkosi', 'build._collect', 'cache.Cache.add_asset',
           'build._record', 'build.write_atomically', 'build.remove_tree',
           'cli.Command.tell', 'update.record_hashes',
           'update.write_atomically',
           'cache.os.fsync', 'cli.override.remove']


@SLOW
def test_killed_at_each_step(unbuilt: Project, debian: Debian) -> None:
    '''Just before each step that changes what others see.'''
    (unbuilt.definition / 'mkosi.note').write_text('the lock changes too')
    python = unbuilt.python
    old = unbuilt.registry.read_text()
    for moment in MOMENTS:
        module, _, function = moment.partition('.')
        unbuilt.python = [
            *python, '-c',
            STOPPING.format(module=module, function=function),
            str(unbuilt.tree / 'scripts')]
        if moment == 'update.write_atomically':
            # The lock is written first: let it need to be
            unbuilt.write_lock(debian, *debian.MINIMAL)
            unbuilt.edit(unbuilt.definition / 'mkosi.note', 'too', 'first')
        result = unbuilt.run('--update')
        assert result.returncode == -signal.SIGKILL, moment
        assert_nothing_half_made(unbuilt)
        assert unbuilt.registry.read_text() == old or moment == MOMENTS[-1]
    unbuilt.python = python
    unbuilt.good('--update')
    assert 'up to date' in unbuilt.good().stderr


def test_clears_what_a_killed_one_left(built: Project) -> None:
    '''Also where there is nothing to build.'''
    left = built.cache / 'work/mini-x86_64/workspace'
    left.mkdir(parents=True)
    (left / 'half').write_text('made')
    other = Path(built.cache / 'work/other-x86_64')
    other.mkdir()
    assert 'up to date' in built.good().stderr
