# SPDX-License-Identifier: GPL-2.0-or-later
'''
The provenance beside an image: every input by hash, nothing that differs
between two builds but one declared field, in the form that in-toto and
SLSA prescribe.
'''

import io
import json
from pathlib import Path
import re
import shutil
import subprocess
import sys
from typing import Any, Callable, Dict, Iterator, List, Mapping

import pytest

from fixtures_builder import Project
from mkosi_build import (build, lock as locks, packages, plan, provenance,
                         registry as registries)
from mkosi_build.build import Builder, Job
from mkosi_build.cache import Cache, sha256_file
from mkosi_build.error import InputError
from mkosi_build.report import Report

pytest_plugins = ['fixtures_builder']

SLOW = pytest.mark.slow
TIME = re.compile(r'\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ')


def statement(project: Project) -> Dict[str, Any]:
    '''The statement beside the artefacts of @project.'''
    path, = project.cache.glob(f'images/*/*/*/{provenance.FILE}')
    found: Dict[str, Any] = json.loads(path.read_text())
    return found


def dependencies(found: Mapping[str, Any],
                 use: str) -> Dict[str, Dict[str, Any]]:
    '''What a build used as @use, by name.'''
    definition = found['predicate']['buildDefinition']
    return {one['name']: one for one in definition['resolvedDependencies']
            if one['annotations']['use'] == use}


def job_of(project: Project) -> Job:
    '''The job of the project's image.'''
    registry = registries.load(project.registry)
    return build.prepare(registry, registry.image('mini'), 'x86_64')


@pytest.fixture(name='builder')
def fixture_builder(built: Project,
                    monkeypatch: pytest.MonkeyPatch) -> Builder:
    '''A builder that has what @built has.'''
    for name, value in built.environment().items():
        monkeypatch.setenv(name, value)
    return Builder(Cache(), Report(stream=io.StringIO()))


# What is in it

@SLOW
def test_every_input(built: Project) -> None:
    '''Definition, locks, packages and tools; by the hash that counts.'''
    found = statement(built)
    job = job_of(built)
    files = dependencies(found, 'definition')
    assert files.pop('mini')['digest'] == {
        'mkosiBuildDefinition': job.definition}
    assert {name: one['digest']['sha256'] for name, one in files.items()} == {
        f'mini/{path.name}': sha256_file(path)
        for path in built.definition.iterdir() if path.suffix != '.lock'}
    assert {name: one['digest']['sha256'] for name, one
            in dependencies(found, 'lock').items()} == {
        str(path.relative_to(built.mkosi)): sha256_file(path)
        for path in built.mkosi.glob('*/*.lock')}
    for use, lock in (('image', job.lock), ('tools', job.tool_lock)):
        ours = dependencies(found, use)
        for package in lock.packages:
            # For foreign architectures only
            if package.name == 'qemu-user':
                assert package.file_name not in ours
                continue
            one = ours.pop(package.file_name)
            assert one['digest'] == {'sha256': package.sha256}
            assert one['uri'] == packages.purl(lock, package)
        assert not ours


@SLOW
def test_outputs(built: Project) -> None:
    '''The artefacts are the subjects, other files the byproducts.'''
    found = statement(built)
    folder = built.artefacts()[0].parent
    details = found['predicate']['runDetails']
    named = {one['name']: one['digest']['sha256']
             for one in (*found['subject'], *details['byproducts'])}
    assert {one['name'] for one in found['subject']} == {
        'vmlinuz', 'initrd.cpio', 'disk.qcow2'}
    assert named == {path.name: sha256_file(path)
                     for path in folder.iterdir()
                     if path.name not in ('record.json', provenance.FILE)}


@SLOW
def test_parameters(built: Project) -> None:
    '''What was asked for, and what follows of it.'''
    definition = statement(built)['predicate']['buildDefinition']
    job = job_of(built)
    planned = {**plan.of_job(job), 'outputs': None}
    assert definition['externalParameters'] == {
        'image': 'mini', 'architecture': 'x86_64'}
    digest = definition['internalParameters'].pop('plan')['sha256']
    saved = built.root / 'plan'
    saved.write_text(plan.render(planned))
    assert digest == sha256_file(saved)
    assert definition['internalParameters'] == {
        'identity': job.identity, 'locked': True, 'epoch': job.lock.epoch}


@SLOW
def test_one_field_differs(template: Project, project: Project) -> None:
    '''Another build, at another time and place.'''
    project.good(TZ='Asia/Tokyo', LC_ALL='tr_TR.UTF-8')
    both = [statement(template), statement(project)]
    for found in both:
        time = found['predicate']['runDetails']['metadata'].pop('finishedOn')
        assert TIME.fullmatch(time)
    assert both[0] == both[1]
    assert str(project.root) not in json.dumps(both)


# The revision of the source

def git(folder: Path, *arguments: str) -> str:
    '''Run git, which knows nobody.'''
    return subprocess.run(
        ['git', '-C', folder, '-c', 'user.name=a', '-c', 'user.email=a@b',
         '-c', 'commit.gpgsign=false', *arguments], check=True,
        stdout=subprocess.PIPE, encoding='utf-8').stdout.strip()


def test_revision(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    '''The commit, and whether what decides bytes is that of the commit.'''
    # The builder that judges is the one in the tree
    monkeypatch.setattr(provenance, '__file__', str(
        project.tree / 'scripts/mkosi_build/provenance.py'))
    monkeypatch.setenv('GIT_CEILING_DIRECTORIES', str(project.root))
    job = job_of(project)
    assert provenance.revision(job) is None
    git(project.tree, 'init', '--quiet')
    assert provenance.revision(job) is None
    git(project.tree, 'add', '-A')
    git(project.tree, 'commit', '--quiet', '-m', 'x')
    head = git(project.tree, 'rev-parse', 'HEAD')

    def modified() -> Any:
        found = provenance.revision(job)
        assert found and found['digest'] == {'gitCommit': head}
        return found['annotations']['modified']

    assert modified() is False
    (project.tree / 'unrelated').write_text('x')
    project.registry.write_text(project.registry.read_text() + '# x\n')
    assert modified() is False
    script = project.tree / 'scripts/mkosi_build/build.py'
    text = script.read_text()
    script.write_text(text + '#\n')
    assert modified() is True
    script.write_text(text)
    (project.definition / 'mkosi.new').write_text('x')
    assert modified() is True
    monkeypatch.setenv('PATH', '/nonexistent')
    assert provenance.revision(job) is None


# Where it is

@SLOW
def test_documents(built: Project, builder: Builder) -> None:
    '''Those of the build; made anew, of packages at hand, if one is gone.'''
    job = job_of(built)
    found = provenance.documents(builder, job)
    folder = built.artefacts()[0].parent
    assert found == {'packages': folder / 'packages.spdx.json',
                     'provenance': folder / 'provenance.json'}
    before = {role: path.read_text() for role, path in found.items()}
    found['packages'].unlink()
    provenance.documents(builder, job)
    after = {role: path.read_text() for role, path in found.items()}
    assert after['packages'] == before['packages']
    remove = re.compile('"finishedOn": ".*"')
    assert (remove.sub('', after['provenance'])
            == remove.sub('', before['provenance']))


def test_not_built(built: Project, builder: Builder) -> None:
    '''There is nothing to tell of.'''
    shutil.rmtree(built.cache / 'images')
    with pytest.raises(InputError, match='mini-x86_64 is not built here'):
        provenance.documents(builder, job_of(built))


@SLOW
def test_other_bytes(project: Project) -> None:
    '''What differs from the registry gets no provenance.'''
    text = project.registry.read_text()
    digest = re.findall('sha256: ([0-9a-f]{64})', text)[0]
    project.registry.write_text(text.replace(digest, '1' * 64))
    project.bad(7)
    assert not list(project.cache.glob(f'images/**/{provenance.FILE}'))


# Its form

def descriptors(found: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    '''All ResourceDescriptors of the statement @found.'''
    predicate = found['predicate']
    yield from found['subject']
    yield from predicate['buildDefinition']['resolvedDependencies']
    yield from predicate['runDetails']['byproducts']


def problems(found: Mapping[str, Any]) -> List[str]:
    '''
    What is wrong with a statement, by in-toto's spec/v1 and SLSA's
    provenance v1: required fields, their types, no others.
    '''
    wrong: List[str] = []

    def fields(value: Any, where: str, required: Mapping[str, type],
               optional: Mapping[str, type]) -> None:
        if not isinstance(value, dict):
            wrong.append(f'{where}: no object')
            return
        known = {**required, **optional}
        wrong.extend(f'{where}: no {key}' for key in required
                     if key not in value)
        for key, content in value.items():
            if not isinstance(content, known.get(key, type(None))):
                wrong.append(f'{where}.{key}: {content!r}')

    fields(found, '', {'_type': str, 'subject': list, 'predicateType': str,
                       'predicate': dict}, {})
    predicate = found['predicate']
    fields(predicate, 'predicate',
           {'buildDefinition': dict, 'runDetails': dict}, {})
    fields(predicate['buildDefinition'], 'buildDefinition',
           {'buildType': str, 'externalParameters': dict},
           {'internalParameters': dict, 'resolvedDependencies': list})
    details = predicate['runDetails']
    fields(details, 'runDetails', {'builder': dict},
           {'metadata': dict, 'byproducts': list})
    fields(details['builder'], 'builder', {'id': str},
           {'version': dict, 'builderDependencies': list})
    fields(details['metadata'], 'metadata', {},
           {'invocationId': str, 'startedOn': str, 'finishedOn': str})
    for one in descriptors(found):
        fields(one, str(one.get('name')), {'digest': dict},
               {'name': str, 'uri': str, 'annotations': dict,
                'mediaType': str, 'downloadLocation': str})
        for algorithm, digest in one.get('digest', {}).items():
            size = {'sha256': 64, 'gitCommit': 40}.get(algorithm, 64)
            if not re.fullmatch(rf'[0-9a-f]{{{size}}}', str(digest)):
                wrong.append(f'{one.get("name")}: {algorithm} {digest}')
    for url in (found.get('_type'), found['predicateType'],
                predicate['buildDefinition'].get('buildType'),
                details['builder'].get('id')):
        if not str(url).startswith('https://'):
            wrong.append(str(url))
    return wrong


FAULTS: Dict[str, Callable[[Any], object]] = {
    'no type': lambda f: f.pop('_type'),
    'no build type': lambda f:
        f['predicate']['buildDefinition'].pop('buildType'),
    'no builder': lambda f: f['predicate']['runDetails']['builder'].clear(),
    'unknown field': lambda f: f['predicate'].update(extra={}),
    'no digest': lambda f: f['subject'][0].pop('digest'),
    'a wrong digest': lambda f: f['subject'][0]['digest'].update(sha256='x'),
    'a number': lambda f: f['subject'][0].update(name=1)}


@SLOW
def test_form(built: Project) -> None:
    '''As prescribed; and each fault would be noticed.'''
    found = statement(built)
    assert not problems(found)
    assert found['_type'] == 'https://in-toto.io/Statement/v1'
    assert found['predicateType'] == 'https://slsa.dev/provenance/v1'
    for name, spoil in FAULTS.items():
        spoilt = json.loads(json.dumps(found))
        spoil(spoilt)
        assert problems(spoilt), name


SCHEMA = '''\
import json, sys
from google.protobuf import json_format
from in_toto_attestation.predicates.provenance.v1 import provenance_pb2
from in_toto_attestation.v1 import statement, statement_pb2
found = json.load(open(sys.argv[1], encoding='utf-8'))
message = json_format.ParseDict(found, statement_pb2.Statement())
statement.Statement.copy_from_pb(message).validate()
json_format.ParseDict(found['predicate'], provenance_pb2.Provenance())
'''


@SLOW
@pytest.mark.network
def test_published_schema(built: Project, tmp_path: Path) -> None:
    '''By the schemas that in-toto publishes, which know every field.'''
    folder = tmp_path / 'schema'
    subprocess.run([sys.executable, '-m', 'venv', folder], check=True)
    python = folder / 'bin/python'
    subprocess.run([python, '-m', 'pip', '--quiet', 'install',
                    'in-toto-attestation==0.9.3'], check=True)
    path = tmp_path / 'statement.json'

    def valid(found: Mapping[str, Any]) -> bool:
        path.write_text(json.dumps(found))
        return subprocess.run([python, '-c', SCHEMA, path], check=False,
                              stderr=subprocess.DEVNULL).returncode == 0

    found = statement(built)
    assert valid(found)
    for name in ('no type', 'unknown field', 'a number'):
        spoilt = json.loads(json.dumps(found))
        FAULTS[name](spoilt)
        assert not valid(spoilt), name


def test_render() -> None:
    '''A line a value, in an order that does not depend on us.'''
    assert packages.render({'b': 1, 'a': ['x']}) == (
        '{\n "a": [\n  "x"\n ],\n "b": 1\n}\n')
    assert locks.BUILDER and not packages.timestamp(0.9).startswith('1969')
