# SPDX-License-Identifier: GPL-2.0-or-later
'''
What the pipeline's tests stand on: a real QEMU tree in git with all of
QEMU's CI files, and gitlab-ci-local to read them and to run our jobs in it.

gitlab-ci-local is neither GitLab nor a runner of its: what it can't show
stands in docs/devel/testing/mkosi-images-publishing.rst.

PYTEST_DONT_REWRITE: test modules import this before they name it a plugin.
'''

import json
import os
from pathlib import Path
import re
import shutil
import subprocess
import sys
from typing import Any, Callable, Dict

import pytest

from fixtures_asset import TEST
from fixtures_builder import AMBIENT, ROOT, Project
from fixtures_publish import Archive, PutServer
from mkosi_build import lock as locks
from mkosi_build.cache import Cache
from mkosi_build.resolve import KEYRING
from mkosi_build.sources import BUILT_USING
from series import functional

# Of the newest that run on Debian 12's node
GITLAB_CI_LOCAL = '4.62.0'
NEEDED = ('node', 'npm', 'git', 'rsync')

MAIN = '''\
# Stands for QEMU's own, which a release has not
include:
  - local: '/.gitlab-ci.d/qemu-project.yml'
'''

LEAN = '''\
include:
  - local: '/.gitlab-ci.d/base.yml'
  - local: '/.gitlab-ci.d/stages.yml'
  - local: '/.gitlab-ci.d/mkosi-images.yml'
'''

# Who runs the pipeline
UPSTREAM = {'CI_PROJECT_NAMESPACE': 'qemu-project'}
FORK = {'CI_PROJECT_NAMESPACE': 'somebody'}

# A QEMU that mkosi_build.boot takes for a guest
QEMU = '''\
#!/bin/sh
echo READY
printf 'root# '
read -r line
test "$line" = poweroff
'''

PATIENCE = 1200


def git(tree: Path, *arguments: str) -> str:
    '''Run git as somebody without settings.'''
    who = {f'GIT_{role}_{what}': f'{role.lower()}@example.org'
           for role in ('AUTHOR', 'COMMITTER') for what in ('NAME', 'EMAIL')}
    return subprocess.run(
        ['git', *arguments], cwd=tree, check=True, stdout=subprocess.PIPE,
        encoding='utf-8', env={**os.environ, **who,
                               'GIT_CONFIG_GLOBAL': '/dev/null',
                               'GIT_CONFIG_NOSYSTEM': '1'}).stdout


def install(folder: Path) -> Path:
    '''
    gitlab-ci-local below @folder, installed if need be. The tests are
    skipped where it can't be: no package that they need comes with QEMU.
    '''
    for name in NEEDED:
        if not shutil.which(name):
            pytest.skip(f'needs {name}')
    final = folder / f'gitlab-ci-local-{GITLAB_CI_LOCAL}'
    program = final / 'node_modules/.bin/gitlab-ci-local'
    if not program.exists():
        folder.mkdir(parents=True, exist_ok=True)
        part = final.with_name(f'.{final.name}.{os.getpid()}')
        part.mkdir()
        result = subprocess.run(
            ['npm', 'install', '--no-audit', '--no-fund', '--ignore-scripts',
             f'gitlab-ci-local@{GITLAB_CI_LOCAL}'], cwd=part,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            encoding='utf-8', check=False)
        if result.returncode:
            shutil.rmtree(part)
            pytest.skip(f'npm can\'t install gitlab-ci-local: '
                        f'{result.stdout[-300:]}')
        try:
            part.rename(final)
        except OSError:
            # Somebody else was quicker
            shutil.rmtree(part)
    return program


class Pipeline:
    '''A QEMU tree in git, on @tree's branch master, and what reads its CI.'''

    def __init__(self, tree: Path, program: Path) -> None:
        self.tree = tree
        self.program = program
        self.home = tree.parent / 'home'
        self.home.mkdir(exist_ok=True)
        self.env = {**os.environ, 'HOME': str(self.home)}

    def create(self, main: str = MAIN) -> None:
        '''Make the tree a repository with one commit, all of it upstream.'''
        (self.tree / '.gitlab-ci.yml').write_text(main)
        (self.tree / '.gitignore').write_text(
            '__pycache__\n/.gitlab-ci-local\n/mkosi-images\n')
        git(self.tree, 'init', '-q', '-b', 'master')
        # What has changed is seen against this one
        git(self.tree, 'remote', 'add', 'origin',
            'https://example.org/qemu-project/qemu.git')
        self.commit('QEMU')
        git(self.tree, 'update-ref', 'refs/remotes/origin/master', 'HEAD')
        git(self.tree, 'symbolic-ref', 'refs/remotes/origin/HEAD',
            'refs/remotes/origin/master')

    def commit(self, message: str) -> None:
        '''Commit all.'''
        git(self.tree, 'add', '-A')
        git(self.tree, 'commit', '-q', '-m', message)

    def copy(self, tree: Path) -> 'Pipeline':
        '''The same, to be changed.'''
        shutil.copytree(self.tree, tree, symlinks=True)
        return Pipeline(tree, self.program)

    def run(self, *arguments: str,
            **variables: str) -> 'subprocess.CompletedProcess[str]':
        '''Run gitlab-ci-local with CI variables.'''
        given = [f'--variable={name}={value}'
                 for name, value in variables.items()]
        # It ends before a pipe has taken all that it prints
        with open(self.tree.parent / 'output', 'w+',
                  encoding='utf-8') as output:
            result: 'subprocess.CompletedProcess[Any]' = subprocess.run(
                [str(self.program), *given, *arguments], cwd=self.tree,
                env=self.env, stdin=subprocess.DEVNULL, stdout=output,
                stderr=subprocess.STDOUT, timeout=PATIENCE, check=False)
            output.seek(0)
            return subprocess.CompletedProcess(
                result.args, result.returncode, output.read())

    def jobs(self, *options: str,
             **variables: str) -> Dict[str, Dict[str, Any]]:
        '''All jobs by name, with "when" as the rules have decided.'''
        result = self.run('--list-json', *options, **variables)
        text = result.stdout
        assert result.returncode == 0 and '\n[\n' in text, text
        found, _ = json.JSONDecoder().raw_decode(text[text.index('\n[\n'):]
                                                 .lstrip())
        return {job['name']: job for job in found}

    def ours(self, **variables: str) -> Dict[str, str]:
        '''When our jobs run, by name without the matrix; not those never.'''
        return {name.partition(':')[0]: job['when']
                for name, job in self.jobs('--no-json-schema-validation',
                                           **variables).items()
                if name.startswith('mkosi-images') and job['when'] != 'never'}


@pytest.fixture(name='pipeline', scope='session')
def fixture_pipeline(tmp_path_factory: pytest.TempPathFactory,
                     qemu_tree: Path) -> Pipeline:
    '''A Pipeline, not to be changed.'''
    program = install(functional.BUILD / 'npm')
    folder = tmp_path_factory.mktemp('pipeline')
    shutil.copytree(qemu_tree, folder / 'tree', symlinks=True)
    pipeline = Pipeline(folder / 'tree', program)
    pipeline.create()
    return pipeline


@pytest.fixture(name='lean', scope='session')
def fixture_lean(tmp_path_factory: pytest.TempPathFactory,
                 pipeline: Pipeline) -> Pipeline:
    '''
    The same with our jobs alone, under QEMU's own rules: ten times as
    fast to copy and to read.
    '''
    lean = Pipeline(tmp_path_factory.mktemp('lean') / 'tree',
                    pipeline.program)
    shutil.copytree(pipeline.tree / '.gitlab-ci.d',
                    lean.tree / '.gitlab-ci.d')
    lean.create(LEAN)
    return lean


@pytest.fixture(name='packages')
def fixture_packages(put_server: Callable[..., PutServer]) -> PutServer:
    '''A GitLab where jobs may write to the project's packages.'''
    server = put_server('gitlab')
    server.prefix = '/api/v4/projects/7/packages/generic/mkosi-images/1'
    server.where = server.root + server.prefix
    server.tokens = {'JOB-TOKEN': 'glcbt-a-secret'}
    return server


def link_tools(pool: Path, archive: Archive) -> None:
    '''
    A mirror in the folder @pool of the tools that this machine has, and
    in @archive sources of them that are none: to gather the real ones
    takes longer than all else.
    '''
    with pytest.MonkeyPatch.context() as patch:
        for name, value in AMBIENT.items():
            patch.setenv(name, value)
        store = Cache().store
    folder = ROOT / 'tests/functional/mkosi/tools'
    for package in locks.load(folder / 'x86_64.lock').packages:
        path = pool / package.location
        add_source(archive, package.source)
        if (store / package.sha256).exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.symlink_to(store / package.sha256)
            said = subprocess.run(
                ['dpkg-deb', '-f', path, *BUILT_USING], check=True,
                stdout=subprocess.PIPE, encoding='utf-8').stdout
            for source in re.findall(r'(\S+ \(= [^)]+)\)', said):
                add_source(archive, source.replace(' (= ', '='))


def add_source(archive: Archive, source: str) -> None:
    '''Have @archive offer the source package "name=version".'''
    name, _, version = source.partition('=')
    archive.add_source(name, version)
    archive.SOURCES[name] = version


class Mini:
    '''
    A pipeline whose tree has one image, mini, and nothing else but what its
    jobs need: @variables of the upstream project's default branch.
    '''
    def __init__(self, pipeline: Pipeline, project: Project,
                 archive: Archive) -> None:
        self.pipeline = pipeline
        self.tree = pipeline.tree
        self.work = self.tree.parent
        self._image(project)
        self._jobs()
        self._sources(project, archive)
        programs = self.work / 'bin'
        programs.mkdir()
        for arch in ('x86_64', 'aarch64'):
            (programs / f'qemu-system-{arch}').write_text(QEMU)
            (programs / f'qemu-system-{arch}').chmod(0o755)
        pipeline.env['PATH'] = os.pathsep.join(
            [str(programs), str(Path(sys.executable).parent),
             os.environ['PATH']])
        pipeline.env['PYTHONDONTWRITEBYTECODE'] = '1'
        self.variables = {
            **UPSTREAM, 'CI_COMMIT_REF_PROTECTED': 'true',
            'QEMU_MKOSI_MIRROR': ' '.join(
                [f'file://{archive.folder}', project.mirror,
                 f'file://{self.work}/tools',
                 AMBIENT.get('QEMU_MKOSI_MIRROR', '')]).strip()}

    def _image(self, project: Project) -> None:
        ours = self.tree / 'tests/functional/mkosi'
        shutil.rmtree(ours)
        shutil.copytree(project.mkosi, ours)
        for arch, text in (('x86_64', TEST.format(declaration="'mini'")),
                           ('aarch64', '')):
            (self.tree / f'tests/functional/{arch}/test_mkosi_boot.py'
             ).write_text(text)

    def _jobs(self) -> None:
        path = self.tree / '.gitlab-ci.d/mkosi-images.yml'
        text = path.read_text()
        for old, new in (('[x86_64, aarch64]', '[x86_64]'),
                         ('[debian-min, fedora-min]', '[mini]')):
            assert text.count(old) == 1
            text = text.replace(old, new)
        path.write_text(text)

    def _sources(self, project: Project, archive: Archive) -> None:
        archive.SOURCES = {}
        link_tools(self.work / 'tools', archive)
        for package in locks.load(project.lock_path).packages:
            add_source(archive, package.source)
        archive.index(archive.SOURCES)
        resolver = self.tree / 'scripts/mkosi_build/resolve.py'
        text = resolver.read_text()
        assert text.count(str(KEYRING)) == 1
        resolver.write_text(text.replace(str(KEYRING), str(archive.keyring)))
        # Hosts of another architecture than the runner's are not here
        for lock in (self.tree / 'tests/functional/mkosi/tools'
                     ).glob('*.lock'):
            if lock.stem != 'x86_64':
                lock.unlink()

    def run(self, *jobs: str,
            **variables: str) -> 'subprocess.CompletedProcess[str]':
        '''Run @jobs, and before them what they need.'''
        return self.pipeline.run(
            '--force-shell-executor', '--shell-isolation',
            '--no-artifacts-to-source', '--needs',
            *jobs, **{**self.variables, **variables})

    def artifacts(self, job: str) -> Path:
        '''What a job has left for others, or for a person.'''
        found = list(self.tree.glob(
            f'.gitlab-ci-local/artifacts/{job}*'))
        assert len(found) == 1, list(self.tree.glob(
            '.gitlab-ci-local/artifacts/*'))
        return found[0]
