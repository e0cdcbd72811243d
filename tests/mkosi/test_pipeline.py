# SPDX-License-Identifier: GPL-2.0-or-later
'''
The pipeline of .gitlab-ci.d/mkosi-images.yml: when its jobs run, that each
line of them is honest, what they do on a machine, and what they say of
builds that differ.
'''

import hashlib
import importlib.util
import json
import os
from pathlib import Path
import re
import shutil
import subprocess
import sys
from types import ModuleType
from typing import Any, Dict, Iterator, List, Tuple

import pytest
import yaml

from fixtures_builder import ROOT, Debian, Project
from fixtures_pipeline import FORK, QEMU, UPSTREAM, Mini, Pipeline, git
from fixtures_publish import NEEDS_GPG, Archive, PutServer
from mkosi_build import cli, registry
from mkosi_build.build import prepare
from mkosi_build.error import HostError

pytest_plugins = ['fixtures_asset', 'fixtures_builder', 'fixtures_publish',
                  'fixtures_pipeline']

JOBS = ROOT / '.gitlab-ci.d/mkosi-images.yml'
SCRIPT = ROOT / '.gitlab-ci.d/mkosi-images.py'
MANUAL = ROOT / 'docs/devel/testing/mkosi-images-publishing.rst'

BUILDS = {'mkosi-images-build', 'mkosi-images-rebuild'}
CHECKS = {'mkosi-images-compare', 'mkosi-images-boot',
          'mkosi-images-registry'}
PUBLISH = {'mkosi-images-publish'}
LINKS = {'mkosi-images-links'}
MATRIX = {'mkosi-images-matrix'}


def load_script() -> ModuleType:
    '''The jobs' script as a module.'''
    spec = importlib.util.spec_from_file_location('mkosi_images', SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules['mkosi_images'] = module
    spec.loader.exec_module(module)
    return module


script = load_script()


# When jobs run

def changed(pipeline: Pipeline, tmp_path: Path, branch: str,
            path: str = 'tests/functional/mkosi/registry.yaml') -> Pipeline:
    '''A copy of @pipeline on @branch with a commit that changes @path.'''
    copy = pipeline.copy(tmp_path / 'tree')
    if branch != 'master':
        git(copy.tree, 'checkout', '-q', '-b', branch)
    (copy.tree / path).parent.mkdir(parents=True, exist_ok=True)
    with open(copy.tree / path, 'a', encoding='utf-8') as file:
        file.write('\n')
    copy.commit('Change')
    return copy


def all_when(when: str, *names: 'set[str]') -> Dict[str, str]:
    '''All of these jobs, at that time.'''
    return {name: when for group in names for name in group}


@pytest.mark.slow
def test_runs_with_qemus_jobs(pipeline: Pipeline) -> None:
    '''The file is read with all of QEMU's own; ours are among theirs.'''
    jobs = pipeline.jobs(**UPSTREAM)
    assert {'check-patch', 'amd64-debian-container'} <= set(jobs)
    ours = {name.partition(':')[0] for name in jobs
            if name.startswith('mkosi-images')}
    assert ours == BUILDS | CHECKS | PUBLISH | LINKS | MATRIX
    # Nothing has changed
    assert all(job['when'] == 'never' for name, job in jobs.items()
               if name.startswith('mkosi-images'))


@pytest.mark.slow
@pytest.mark.parametrize('branch, variables, expected', [
    # Contributors
    ('work', FORK, {}),
    ('work', {**FORK, 'QEMU_CI': '1'},
     {**all_when('manual', BUILDS, MATRIX),
      **all_when('on_success', CHECKS)}),
    ('work', {**FORK, 'QEMU_CI': '2'},
     {**all_when('on_success', BUILDS, CHECKS),
      **all_when('manual', MATRIX)}),
    ('work', {**FORK, 'QEMU_CI': '2', 'QEMU_MKOSI_PUBLISH': '/tmp'},
     {**all_when('on_success', BUILDS, CHECKS),
      **all_when('manual', PUBLISH, MATRIX)}),
    # Upstream
    ('staging', UPSTREAM,
     {**all_when('on_success', BUILDS, CHECKS),
      **all_when('manual', MATRIX)}),
    ('staging-11.1', UPSTREAM,
     {**all_when('on_success', BUILDS, CHECKS),
      **all_when('manual', MATRIX)}),
    ('stable-11.1', UPSTREAM, {}),
    ('topic', UPSTREAM, {}),
    ('master', {**UPSTREAM, 'CI_COMMIT_REF_PROTECTED': 'true'},
     {**all_when('on_success', BUILDS, CHECKS, PUBLISH),
      **all_when('manual', MATRIX)}),
    ('master', {**UPSTREAM, 'CI_COMMIT_REF_PROTECTED': 'false'},
     {**all_when('on_success', BUILDS, CHECKS),
      **all_when('manual', MATRIX)}),
    ('master', {**UPSTREAM, 'CI_COMMIT_REF_PROTECTED': 'true',
                'CI_PIPELINE_SOURCE': 'schedule'},
     all_when('on_success', LINKS, MATRIX)),
    ('work', {**FORK, 'CI_PIPELINE_SOURCE': 'schedule'}, {}),
])
def test_rules(lean: Pipeline, tmp_path: Path, branch: str,
               variables: Dict[str, str], expected: Dict[str, str]) -> None:
    '''Which jobs there are where a definition has changed.'''
    assert changed(lean, tmp_path, branch).ours(**variables) == expected


@pytest.mark.slow
@pytest.mark.parametrize('path, runs', [
    ('scripts/mkosi-build.py', True),
    ('scripts/mkosi_build/build.py', True),
    ('tests/functional/mkosi/debian-min/mkosi.conf', True),
    ('.gitlab-ci.d/mkosi-images.yml', True),
    ('tests/functional/mkosi_boot.py', False),
    ('scripts/checkpatch.pl', False)])
def test_changes(lean: Pipeline, tmp_path: Path, path: str,
                 runs: bool) -> None:
    '''What decides an image's bytes, and no more.'''
    copy = changed(lean, tmp_path, 'staging', path)
    assert bool(copy.ours(**UPSTREAM)) == runs


# Every line is honest

CONFIG = yaml.safe_load(JOBS.read_text('utf-8'))


def test_stable_staging_has_its_own_container(qemu_tree: Path) -> None:
    '''As base.yml has it for all other jobs.'''
    text = (qemu_tree / '.gitlab-ci.d/base.yml').read_text('utf-8')
    text = re.sub('!reference', '', text)
    theirs = yaml.safe_load(text)['.base_job_template']['rules']
    ours = CONFIG['.mkosi_images_rules']['rules']
    found = [[rule['variables'] for rule in rules if 'variables' in rule]
             for rules in (theirs, ours)]
    assert found[1] == found[0][-1:]


def job_lines(keys: Tuple[str, ...]) -> Iterator[Tuple[str, str]]:
    '''The script lines of all jobs and templates.'''
    for name, job in CONFIG.items():
        for key in keys:
            for line in job.get(key, ()):
                yield name, line


LINES = list(job_lines(('before_script', 'script', 'after_script')))


def test_bash() -> None:
    '''Every script is one for the shell.'''
    assert len(LINES) > 8
    for name, line in LINES:
        result = subprocess.run(
            ['bash', '-n'], input=line, encoding='utf-8', check=False,
            stderr=subprocess.PIPE)
        assert result.returncode == 0, f'{name}: {line}: {result.stderr}'


def test_variables(qemu_tree: Path) -> None:
    '''
    Each is defined here or in base.yml, GitLab's own, or in the manual; and
    what is defined here is used.
    '''
    text = JOBS.read_text('utf-8')
    base = (qemu_tree / '.gitlab-ci.d/base.yml').read_text('utf-8')
    used = set(re.findall(r'\$\{?([A-Z]\w*)', text))
    defined = {name for job in CONFIG.values()
               for name in job.get('variables', ())}
    defined |= {name for job in CONFIG.values()
                for row in job.get('parallel', {}).get('matrix', ())
                for name in row}
    manual = MANUAL.read_text('utf-8')
    for name in used - defined:
        assert (name.startswith('CI_') or name in base
                or f'``{name}``' in manual), name
    assert {'ARCH', 'IMAGE_NAME', 'TURN'} <= defined & used
    sources = ''.join(path.read_text('utf-8') for path in (
        SCRIPT, *(ROOT / 'scripts/mkosi_build').glob('*.py')))
    for name in defined - used:
        # GitLab reads these itself
        assert name.startswith('GIT_') or name in sources, name


def test_gitlabs_variables_are_documented_in_the_script() -> None:
    '''What the script reads of the environment the manual knows.'''
    manual = MANUAL.read_text('utf-8')
    read = set(re.findall(r"'((?:QEMU_MKOSI|CI|GITLAB)_[A-Z0-9_]+?)_?'",
                          SCRIPT.read_text('utf-8')))
    assert {'CI_JOB_TOKEN', 'QEMU_MKOSI_PUBLISH'} <= read
    for name in read:
        assert f'``{name}``' in manual, name


def test_paths(qemu_tree: Path) -> None:
    '''Every file that a job names is in the tree.'''
    named = {word.strip('"\'') for _, line in LINES for word in line.split()
             if re.match(r'[\w.]+/.+\.\w+$', word)}
    named |= {path for rule in CONFIG['.mkosi_images_rules']['rules']
              for path in rule.get('changes', ())}
    assert {'.gitlab-ci.d/mkosi-images.py', 'scripts/mkosi-build.py',
            'tests/functional/mkosi/**/*'} <= named
    for name in named:
        assert list(qemu_tree.glob(name)), name
    for name in ('scripts/mkosi-build.py', '.gitlab-ci.d/mkosi-images.py'):
        assert os.access(qemu_tree / name, os.X_OK)
    include = (qemu_tree / '.gitlab-ci.d/qemu-project.yml').read_text()
    assert include.count("'/.gitlab-ci.d/mkosi-images.yml'") == 1


def test_options(capsys: pytest.CaptureFixture[str]) -> None:
    '''All that jobs ask of the builder --help has.'''
    with pytest.raises(SystemExit):
        cli.parse_arguments(['--help'])
    shown = set(re.findall(r'^  (--[\w-]+)', capsys.readouterr().out, re.M))
    calls = [line for _, line in LINES if 'mkosi-build.py' in line]
    calls += re.findall(r'BUILDER, [^\]]*', SCRIPT.read_text('utf-8'))
    used = {option for call in calls
            for option in re.findall(r"(?<=[ '])--[\w-]+", call)}
    assert {'--local', '--publish', '--published', '--check-links'} <= used
    assert used <= shown


def test_parts() -> None:
    '''The parts of the script are those that jobs call, with arguments.'''
    calls = [line.split('mkosi-images.py')[1].split() for _, line in LINES
             if line.count('mkosi-images.py')]
    for part, *arguments in calls:
        with pytest.raises(SystemExit) as e:
            script.main([part, *arguments, 'one-too-many'])
        assert e.value.code == 2
    shown = subprocess.run(
        [sys.executable, SCRIPT, '--help'], stdout=subprocess.PIPE,
        encoding='utf-8', check=True).stdout
    match = re.search(r'\{([a-z,]+)\}', shown)
    assert match
    assert set(match[1].split(',')) == {call[0] for call in calls}


def test_matrix() -> None:
    '''Every image of the registry is built.'''
    rows = CONFIG['.mkosi_images_build_template']['parallel']['matrix']
    cells = {(image, arch) for row in rows for image in row['IMAGE_NAME']
             for arch in row['ARCH']}
    images = registry.load(registry.DEFAULT).images.values()
    assert cells == {(image.name, arch) for image in images
                     for arch in image.targets}


def test_nothing_is_shared() -> None:
    '''The two builds have no cache, and neither needs the other.'''
    template = CONFIG['.mkosi_images_template']
    assert template['cache'] == []
    # In the job's own checkout
    assert template['variables']['QEMU_MKOSI_DIR'] == 'mkosi-images/cache'
    for name in BUILDS:
        assert set(CONFIG[name]) == {'extends', 'variables'}
    needs = CONFIG['.mkosi_images_build_template']['needs']
    assert [need['job'] for need in needs] == ['amd64-debian-container']


def test_no_token_is_shown() -> None:
    '''None on a command line; no environment in an artifact; no set -x.'''
    for _, line in LINES:
        assert 'TOKEN' not in line and 'printenv' not in line
        assert 'set -x' not in line
    assert '.base_meson_job_template' not in str(
        CONFIG['.mkosi_images_template'])
    assert 'TOKEN' not in str([job.get('variables') for job
                               in CONFIG.values()])


# What the script does

def test_preflight_names_the_runners_settings(
        monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
        capsys: pytest.CaptureFixture[str]) -> None:
    '''A container that refuses namespaces is seen at once.'''
    monkeypatch.setenv('QEMU_MKOSI_DIR', str(tmp_path / 'cache'))
    fake = tmp_path / 'unshare'
    fake.write_text('#!/bin/sh\necho "unshare failed: Operation not '
                    'permitted" >&2\nexit 1\n')
    fake.chmod(0o755)
    monkeypatch.setenv('PATH', f'{tmp_path}:{os.environ["PATH"]}')
    assert script.main(['preflight', 'x86_64']) == HostError.exit_code
    said = capsys.readouterr().err
    assert 'Operation not permitted' in said
    for setting in ('seccomp=unconfined', 'unmask=ALL', 'privileged'):
        assert setting in said and setting in MANUAL.read_text()
    assert 'mkosi-images-publishing.rst' in said


@pytest.mark.skipif(os.getuid() != 0, reason='needs root')
@pytest.mark.slow
def test_preflight_in_a_container(tmp_path: Path) -> None:
    '''
    What a default container does: no further user namespaces, /proc with
    masked parts. A real refusal by the kernel, no fake.
    '''
    command = [sys.executable, str(SCRIPT), 'preflight', 'x86_64']
    result = subprocess.run(
        ['unshare', '--user', '--map-root-user', '--mount', '--', 'sh', '-c',
         'echo 0 > /proc/sys/user/max_user_namespaces && exec "$@"', 'sh',
         *command], env={**os.environ, 'QEMU_MKOSI_DIR': str(tmp_path)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding='utf-8',
        check=False)
    assert result.returncode == HostError.exit_code, result
    assert 'user.max_user_namespaces' in result.stderr
    assert 'seccomp=unconfined' in result.stderr
    assert 'Traceback' not in result.stderr


FILES = {'kernel': ('vmlinuz', b'kernel'), 'initrd': ('initrd', b'initrd'),
         'disk': ('disk.qcow2', bytes(3 << 20))}


def leave(folder: Path, turn: str, identity: str = '1' * 64,
          state: str = 'built', **changed_files: bytes) -> Path:
    '''What a build job leaves.'''
    place = folder / turn / 'x86_64/mini'
    place.mkdir(parents=True)
    artefacts: Dict[str, Dict[str, Any]] = {}
    if state == 'built':
        for kind, (name, data) in FILES.items():
            data = changed_files.get(kind, data)
            (place / name).write_bytes(data)
            artefacts[kind] = {
                'file': name, 'size': len(data),
                'sha256': script.sha256_file(place / name)}
    (place / 'result.json').write_text(json.dumps({
        'state': state, 'reason': 'because', 'identity': identity,
        'artefacts': artefacts}))
    return place


@pytest.fixture(name='folder')
def fixture_folder(tmp_path: Path,
                   monkeypatch: pytest.MonkeyPatch) -> Path:
    '''Where jobs leave things, of a test's own.'''
    monkeypatch.setattr(script, 'FOLDER', tmp_path)
    # What is equal is recorded in a tree that has it; elsewhere
    monkeypatch.setattr(script, '_record', lambda: None)
    return tmp_path


def differences(code: int, capsys: pytest.CaptureFixture[str]) -> str:
    '''What comparing says, which must end with @code.'''
    assert script.main(['compare']) == code
    said = capsys.readouterr()
    assert (code == 0) == ('  next: ' not in said.err)
    return said.out + said.err


def test_compare_equal(folder: Path,
                       capsys: pytest.CaptureFixture[str]) -> None:
    '''The good case.'''
    leave(folder, 'first')
    leave(folder, 'second')
    assert 'both builds have the same bytes' in differences(0, capsys)
    assert json.loads((folder / 'compared.json').read_text()) == [
        ['x86_64', 'mini']]


def test_compare_explains(folder: Path,
                          capsys: pytest.CaptureFixture[str]) -> None:
    '''Which artefact, hashes, sizes, and what differs in it.'''
    other = bytearray(FILES['disk'][1])
    other[2_000_003] = 0x41
    first = leave(folder, 'first')
    second = leave(folder, 'second', disk=bytes(other))
    said = differences(7, capsys)
    assert 'mini x86_64: disk.qcow2 (disk) differs:' in said
    for place in (first, second):
        assert script.sha256_file(place / 'disk.qcow2') in said
    assert f'{len(other)} bytes' in said
    assert 'at 2000003: 41' in said, said
    assert 'cause   not one of the known ones' in said
    assert 'vmlinuz' not in said
    assert not (folder / 'compared.json').exists()


@pytest.mark.parametrize('data', [b'kernel and more', b'kern', b'', b'K'])
def test_compare_lengths(folder: Path, capsys: pytest.CaptureFixture[str],
                         data: bytes) -> None:
    '''One file is the beginning of the other.'''
    leave(folder, 'first')
    leave(folder, 'second', kernel=data)
    said = differences(7, capsys)
    assert 'vmlinuz (kernel) differs' in said
    assert f'{len(data)} bytes' in said
    assert 'cause' in said


def test_compare_damaged(folder: Path,
                         capsys: pytest.CaptureFixture[str]) -> None:
    '''A file that is not what its job has built.'''
    leave(folder, 'first')
    place = leave(folder, 'second')
    (place / 'vmlinuz').write_bytes(b'kerneL')
    assert 'vmlinuz: damaged since it was built' in differences(7, capsys)


def test_compare_inputs(folder: Path,
                        capsys: pytest.CaptureFixture[str]) -> None:
    '''Two builds of different trees prove nothing.'''
    leave(folder, 'first')
    leave(folder, 'second', identity='2' * 64)
    said = differences(7, capsys)
    assert 'not built from the same' in said and '2' * 64 in said


def test_compare_missing(folder: Path,
                         capsys: pytest.CaptureFixture[str]) -> None:
    '''One build failed.'''
    leave(folder, 'first')
    assert 'mini x86_64: only one of the two' in differences(7, capsys)


@pytest.mark.parametrize('state', ['published', 'left out'])
def test_compare_left_out(folder: Path, state: str,
                          capsys: pytest.CaptureFixture[str]) -> None:
    '''What was not built, twice or once, since another published it.'''
    leave(folder, 'first', state=state)
    leave(folder, 'second')
    assert f'{state}: because' in differences(0, capsys)
    assert json.loads((folder / 'compared.json').read_text()) == []


def test_destination() -> None:
    '''Our own registry as this job, unless the project says otherwise.'''
    gitlab = {'CI_API_V4_URL': 'https://example.org/api/v4',
              'CI_PROJECT_ID': '7', 'CI_JOB_TOKEN': 'secret'}
    store = ('https://example.org/api/v4/projects/7/packages/generic/'
             'mkosi-images/1')
    assert script.destination(gitlab) == {
        'QEMU_MKOSI_PUBLISH': store,
        'QEMU_MKOSI_PUBLISH_TOKEN': 'JOB-TOKEN:secret'}
    own = {**gitlab, 'QEMU_MKOSI_PUBLISH_TOKEN': 'DEPLOY-TOKEN:mine'}
    assert script.destination(own) == {'QEMU_MKOSI_PUBLISH': store}
    # A job's token is told to nobody else
    for url in ('https://example.org.example.com/api/v4/', '/a/folder',
                'https://example.org/api/v4x', 'http://example.org/api/v4/x'):
        assert not script.destination({**gitlab, 'QEMU_MKOSI_PUBLISH': url})
    # The builder says what is missing
    assert not script.destination({})


# A new version of an image

FETCH = '''\
import os, shutil
from pathlib import Path
cache = Path(os.environ['QEMU_TEST_CACHE_DIR'], 'download')
shutil.copytree(os.environ['QEMU_TEST_MKOSI_STORES'], cache)
'''


class Next:
    '''A commit with a recorded image, and two builds of a newer one.'''

    def __init__(self, built: Project, tmp_path: Path) -> None:
        self.tree = built.tree
        self.folder = self.tree / 'mkosi-images'
        self.old = tmp_path / 'old'
        self.old.mkdir()
        for path in built.artefacts():
            shutil.copy(path, self.old / script.sha256_file(path))
        (self.tree / '.gitlab-ci.d').mkdir()
        self.script = self.tree / '.gitlab-ci.d/mkosi-images.py'
        shutil.copy(SCRIPT, self.script)
        test = self.tree / 'tests/functional/x86_64/test_mkosi_boot.py'
        test.parent.mkdir()
        test.write_text(FETCH)
        programs = tmp_path / 'bin'
        programs.mkdir()
        (programs / 'qemu-system-x86_64').write_text(QEMU)
        (programs / 'qemu-system-x86_64').chmod(0o755)
        (self.tree / '.gitignore').write_text('/mkosi-images\n')
        git(self.tree, 'init', '-q')
        git(self.tree, 'commit', '-q', '--allow-empty', '-m', 'Before')
        self.commit('Record an image')
        self.env = {**built.environment(), 'GIT_CONFIG_GLOBAL': '/dev/null',
                    'PATH': f'{programs}:{os.environ["PATH"]}',
                    'QEMU_TEST_MKOSI_STORES': str(self.old)}

    def commit(self, message: str) -> None:
        '''Commit all.'''
        git(self.tree, 'add', '-A')
        git(self.tree, 'commit', '-q', '-m', message)

    def build(self, **changed_files: bytes) -> None:
        '''Leave what two build jobs leave.'''
        where = self.tree / 'tests/functional/mkosi/registry.yaml'
        loaded = registry.load(where)
        identity = prepare(loaded, loaded.image('mini'), 'x86_64').identity
        for turn in ('first', 'second'):
            leave(self.folder, turn, identity, 'built', **changed_files)

    def run(self, part: str) -> 'subprocess.CompletedProcess[str]':
        '''Run a job's part.'''
        return subprocess.run(
            [sys.executable, self.script, part], cwd=self.tree, env=self.env,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, encoding='utf-8', check=False)

    def good(self, part: str) -> str:
        '''It must succeed. Returns what it said.'''
        result = self.run(part)
        assert result.returncode == 0, result.stdout
        return result.stdout


@pytest.fixture(name='following')
def fixture_following(built: Project, tmp_path: Path,
                      monkeypatch: pytest.MonkeyPatch) -> Next:
    '''A Next.'''
    # The files of a registry with these names
    monkeypatch.setitem(FILES, 'initrd', ('initrd.cpio', b'initrd'))
    return Next(built, tmp_path)


@pytest.mark.slow
def test_patch(following: Next, debian: Debian, built: Project) -> None:
    '''
    What changed since the commit that recorded the image: packages, sizes,
    and the time to boot, of both on one machine.
    '''
    conf = built.definition / 'mkosi.conf'
    conf.write_text(conf.read_text().replace('1a11', '1a12'))
    built.write_lock(debian, 'base-files', 'mini-shell', 'mini-hello',
                     'mini-lib', 'mini-outside')
    following.commit('Change the definition and its packages')
    following.build()
    assert 'registry.yaml: recorded' in following.good('compare')
    assert ', before: ' in following.good('boot')
    said = following.good('registry')
    patch = following.folder / 'registry.patch'
    for text in (said, patch.read_text()):
        assert 'packages: 1 of 5 changed\n  + mini-outside 1\n' in text
        assert re.search(r'disk: 3145728 \(before: \d+\) bytes\n', text)
        assert re.search(r'power off: \d+\.\d \(before: \d+\.\d\)', text)
    assert 'Signed-off-by' not in patch.read_text()
    # Nothing but the patch; and it applies to the commit
    assert git(following.tree, 'log', '--format=%s').splitlines()[0] == (
        'Change the definition and its packages')
    recorded = built.registry.read_text()
    git(following.tree, 'checkout', '-q', '.')
    git(following.tree, 'am', '-q', str(patch))
    assert built.registry.read_text() == recorded
    # Now there is nothing more to record
    following.good('compare')
    assert 'has these hashes already' in following.good('registry')
    assert patch.read_text() == ''


@pytest.mark.slow
def test_patch_without_before(following: Next, built: Project) -> None:
    '''Neither the image nor the commit before is at hand.'''
    shutil.rmtree(following.old)
    conf = built.definition / 'mkosi.conf'
    conf.write_text(conf.read_text().replace('1a11', '1a12'))
    # As far back as a shallow clone goes
    shutil.rmtree(following.tree / '.git')
    git(following.tree, 'init', '-q')
    text = built.registry.read_text()
    built.registry.write_text(re.sub('(identity: ).', r'\g<1>0', text, 1))
    following.commit('Only commit')
    following.env['QEMU_TEST_MKOSI_STORES'] = str(following.old)
    following.build()
    following.good('compare')
    assert 'the image before is not at hand' in following.good('boot')
    following.good('registry')
    text = (following.folder / 'registry.patch').read_text()
    assert re.search(r'seconds to boot and power off: \d+\.\d\n', text)
    assert 'packages: the commit that recorded the hashes before is' in text


@pytest.mark.slow
def test_same_identity_other_bytes(following: Next) -> None:
    '''Two equal builds that the registry does not agree with.'''
    following.build()
    result = following.run('compare')
    assert result.returncode == 7
    assert 'other bytes than the registry names' in result.stdout
    assert not git(following.tree, 'status', '--porcelain')


@pytest.mark.slow
def test_over_budget(following: Next, built: Project) -> None:
    '''Growing is a reviewed change.'''
    conf = built.definition / 'mkosi.conf'
    conf.write_text(conf.read_text().replace('1a11', '1a12'))
    following.build(kernel=bytes(2000))
    result = following.run('compare')
    assert result.returncode == 3
    assert 'kernel-initrd-bytes: the budget is 1000' in result.stdout


@pytest.mark.slow
@pytest.mark.parametrize('text, problem', [
    ('', 'not fetched: mini-x86_64: kernel'),
    (FETCH + 'raise SystemExit(1)', 'test_mkosi_boot.py failed')])
def test_boot_fails(following: Next, built: Project, text: str,
                    problem: str) -> None:
    '''Tests that skip, or fail.'''
    (built.tree / 'tests/functional/x86_64/test_mkosi_boot.py').write_text(
        text)
    conf = built.definition / 'mkosi.conf'
    conf.write_text(conf.read_text().replace('1a11', '1a12'))
    following.build()
    following.good('compare')
    result = following.run('boot')
    assert result.returncode == 6
    assert problem in result.stdout


# From a build to what is published


@pytest.fixture(name='mini')
def fixture_mini(pipeline: Pipeline, unbuilt: Project, archive: Archive,
                 tmp_path: Path) -> Mini:
    '''A Mini with an image that nobody has recorded yet.'''
    mini = Mini(pipeline.copy(tmp_path / 'ci/tree'), unbuilt, archive)
    mini.pipeline.commit('Add an image')
    return mini


def target_of(mini: Mini) -> registry.Target:
    '''What the tree's registry says.'''
    return registry.load(
        mini.tree / 'tests/functional/mkosi/registry.yaml'
    ).image('mini').target('x86_64')


def publish(mini: Mini, packages: PutServer, **variables: str) -> str:
    '''Run the pipeline to its end; what its jobs said.'''
    shutil.rmtree(mini.tree / '.gitlab-ci-local', ignore_errors=True)
    token = packages.tokens['JOB-TOKEN']
    result = mini.run('mkosi-images-publish', 'mkosi-images-registry',
                      CI_API_V4_URL=f'{packages.root}/api/v4',
                      CI_PROJECT_ID='7', CI_JOB_TOKEN=token, **variables)
    said = result.stdout
    assert result.returncode == 0, said[-6000:]
    assert token not in said
    return said


@NEEDS_GPG
@pytest.mark.slow
@pytest.mark.network
def test_from_edit_to_published(mini: Mini, packages: PutServer) -> None:
    '''
    All jobs but the one for links, in the order of their needs: an edited
    definition becomes a published image and a patch to the registry.
    '''
    said = publish(mini, packages)
    assert 'both builds have the same bytes' in said
    assert 'seconds to boot and power off: ' in said
    patch = mini.artifacts('mkosi-images-registry'
                           ) / 'mkosi-images/registry.patch'
    text = patch.read_text()
    assert 'recorded for the first time' in text
    assert 'seconds to boot and power off: ' in text
    git(mini.tree, 'am', '-q', str(patch))
    recorded = target_of(mini)
    assert recorded.built
    # Data first, the index last, and each object is what its name says
    index = f'mini-x86_64-{recorded.identity}.json'
    objects = packages.visible()
    assert list(objects)[-1] == index
    assert all(hashlib.sha256(data).hexdigest() == name
               for name, data in objects.items() if name != index)
    assert {artefact.sha256 for artefact
            in recorded.artefacts.values()} <= set(objects)
    roles = {entry['role'] for entry in json.loads(objects[index])['objects']}
    assert {'kernel', 'disk', 'source', 'package', 'tools-source'} <= roles

    # Once more: there is nothing to build
    puts = packages.count('PUT')
    said = publish(mini, packages)
    assert 'mini x86_64: published' in said
    assert 'The registry has these hashes already' in said
    assert packages.count('PUT') == puts


RANDOM = 'head -c 16 /dev/urandom >>disk.qcow2\n'


@NEEDS_GPG
@pytest.mark.slow
@pytest.mark.network
def test_not_reproducible(mini: Mini) -> None:
    '''An image that is never the same twice goes no further.'''
    path = mini.tree / 'tests/functional/mkosi/mini/mkosi.postoutput'
    path.write_text(path.read_text() + RANDOM)
    mini.pipeline.commit('Be random')
    result = mini.run('mkosi-images-registry')
    said = result.stdout
    assert result.returncode != 0
    assert 'disk.qcow2 (disk) differs:' in said, said[-5000:]
    assert '    cause   ' in said
    artifacts: List[str] = [
        path.name for path in (mini.tree / '.gitlab-ci-local/artifacts'
                               ).iterdir()]
    assert not any('boot' in name for name in artifacts)
    assert not any('registry' in name for name in artifacts)
