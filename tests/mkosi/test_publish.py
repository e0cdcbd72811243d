# SPDX-License-Identifier: GPL-2.0-or-later
'''
Publishing an image by the command that a maintainer calls: with all that
belongs to it or not at all, to each kind of destination, through faults and
kills; and telling what is published.
'''

import contextlib
from functools import partial
import hashlib
import io
import json
import os
from pathlib import Path
import random
import resource
import shutil
import signal
import subprocess
import time
from typing import Any, Callable, Dict, Iterator, List, Tuple

import pytest

from fixtures_builder import FaultServer
from fixtures_publish import (
    NEEDS_GPG, NEEDS_NGINX, TOKEN, Archive, Nginx, PutServer, Works, answers,
    corrupts, dies, hash_of, refuses)
from mkosi_build import destination as destinations, publish as publishing
from mkosi_build import registry as registries
from mkosi_build.build import Builder, host_architecture, prepare
from mkosi_build.cache import Cache
from mkosi_build.report import Report

pytest_plugins = ['fixtures_builder', 'fixtures_publish']
pytestmark = NEEDS_GPG
SLOW = pytest.mark.slow

KILLS = 200


class There:
    '''Where to publish to, by the @env that says so; what others @see.'''

    def __init__(self, env: Dict[str, str],
                 see: Callable[[], Dict[str, bytes]]) -> None:
        self.env = env
        self.see = see

    def index(self, works: Works) -> Dict[str, Any]:
        '''The index of the image of @works.'''
        index: Dict[str, Any] = json.loads(self.see()[index_name(works)])
        return index


def index_name(works: Works) -> str:
    '''The name of its image's index.'''
    return f'mini-x86_64-{works.identity}.json'


def in_folder(folder: Path) -> There:
    '''A folder.'''
    folder.mkdir(exist_ok=True)
    return There({'QEMU_MKOSI_PUBLISH': str(folder)},
                 lambda: {path.name: path.read_bytes()
                          for path in folder.iterdir()
                          if not path.name.startswith('.')})


def on_server(server: PutServer) -> There:
    '''A stand-in for a server, with a token.'''
    server.tokens = {'PRIVATE-TOKEN': TOKEN}
    return There({'QEMU_MKOSI_PUBLISH': server.where,
                  'QEMU_MKOSI_PUBLISH_TOKEN': f'PRIVATE-TOKEN:{TOKEN}'},
                 server.visible)


@pytest.fixture(name='folder')
def fixture_folder(tmp_path: Path) -> There:
    '''An empty folder.'''
    return in_folder(tmp_path / 'published')


@pytest.fixture(name='there', params=[
    'folder', 'gitlab', 'plain', pytest.param('nginx', marks=NEEDS_NGINX)])
def fixture_there(request: pytest.FixtureRequest,
                  tmp_path: Path) -> Iterator[There]:
    '''Each kind of destination. What they do to one object is tested.'''
    if request.param == 'folder':
        yield in_folder(tmp_path / 'published')
    elif request.param == 'nginx':
        nginx: Nginx = request.getfixturevalue('nginx')
        yield There({'QEMU_MKOSI_PUBLISH': nginx.where}, nginx.visible)
    else:
        yield on_server(request.getfixturevalue('put_server')(request.param))


def assert_whole(there: There) -> None:
    '''What has the name of an object is one, and an index has all.'''
    seen = there.see()
    for name, data in seen.items():
        if len(name) == 64:
            assert hash_of_bytes(data) == name
        elif name.endswith('.json'):
            index = json.loads(data)
            for entry in (*index['objects'], *index['published']['objects']):
                assert len(seen[entry['sha256']]) == entry['size']
        else:
            assert name.startswith('tmp-'), name


def hash_of_bytes(data: bytes) -> str:
    '''The SHA-256 of @data.'''
    return hashlib.sha256(data).hexdigest()


def assert_secret(said: str) -> str:
    '''Nobody has said the token.'''
    assert TOKEN not in said
    return said


def publish(works: Works, there: There, *arguments: str,
            **env: str) -> str:
    '''Publish; it must succeed.'''
    said = assert_secret(works.good('--publish', *arguments,
                                    **{**there.env, **env}))
    assert_whole(there)
    return said


def refuse(works: Works, there: There, code: int, *arguments: str,
           **env: str) -> str:
    '''Publish; it must fail, and no index be there.'''
    said = assert_secret(works.bad(code, '--publish', *arguments,
                                   **{**there.env, **env}))
    assert index_name(works) not in there.see()
    assert not list((works.cache / 'work').glob('*'))
    return said


# The way it should go

@SLOW
def test_all_that_belongs_to_it(works: Works, folder: There,
                                archive: Archive) -> None:
    '''Image, source, packages, locks, tools, licences, log, provenance.'''
    said = publish(works, folder)
    assert 'mini x86_64: published at' in said
    index = folder.index(works)
    assert list(index)[-1] == 'published'
    assert (index['image'], index['arch'], index['identity']) == (
        'mini', 'x86_64', works.identity)
    names: Dict[str, List[str]] = {}
    for entry in (*index['objects'], *index['published']['objects']):
        names.setdefault(entry['role'], []).append(entry['name'])
    host = host_architecture()
    alpha = ['alpha_1.debian.tar.xz', 'alpha_1.dsc', 'alpha_1.orig.tar.xz']
    assert names == {
        'kernel': ['vmlinuz'], 'initrd': ['initrd.cpio'],
        'disk': ['disk.qcow2'], 'lock': ['mini-x86_64.lock'],
        'package': ['alpha_1_amd64.deb', 'beta_1:2.0-1+b1_amd64.deb'],
        'source': sorted([
            *alpha, 'delta_0.3.debian.tar.xz', 'delta_0.3.dsc',
            'delta_0.3.orig.tar.xz', 'gamma_2.0-1.debian.tar.xz',
            'gamma_2.0-1.dsc', 'gamma_2.0.orig.tar.xz']),
        'tools-lock': [f'tools-{host}.lock'],
        'tools-package': ['alpha_1_amd64.deb'], 'tools-source': alpha,
        'packages': ['mini-x86_64.packages.spdx.json'],
        'licences': ['mini-x86_64.licences.json'],
        'log': ['mini-x86_64.log'],
        'provenance': ['mini-x86_64.provenance.json'],
        'sources': [f'tools-{host}.sources', 'x86_64.sources']}
    assert hash_of(archive.folder / archive.packages['beta'].location) in \
        folder.see()


def content(works: Works, there: There, role: str) -> bytes:
    '''The object of that role.'''
    index = there.index(works)
    [sha256] = [entry['sha256'] for entry in (
        *index['objects'], *index['published']['objects'])
        if entry['role'] == role]
    return there.see()[sha256]


@SLOW
def test_what_it_says(works: Works, folder: There) -> None:
    '''The texts beside an image.'''
    publish(works, folder)
    packages = json.loads(content(works, folder, 'packages'))['packages']
    assert [(p['name'], p['versionInfo']) for p in packages[-4:]] == [
        ('alpha', '1'), ('alpha', '1'), ('beta', '1:2.0-1+b1'),
        ('gamma', '1:2.0-1')]
    assert content(works, folder, 'log') == b'mkosi was here\n'
    assert content(works, folder, 'lock') == (
        works.definition / 'x86_64.lock').read_bytes()
    licences = json.loads(content(works, folder, 'licences'))
    [alpha, beta] = licences['packages']
    assert licences['texts'][alpha['texts'][0]] == '© alpha\nGPL-2+\n'
    assert (beta['name'], beta['source']) == ('beta', 'gamma=1:2.0-1')
    provenance = json.loads(content(works, folder, 'provenance'))
    assert provenance['predicateType'] == 'https://slsa.dev/provenance/v1'
    definition = provenance['predicate']['buildDefinition']
    assert definition['internalParameters']['identity'] == works.identity
    uses = [d['annotations']['use']
            for d in definition['resolvedDependencies']]
    assert uses.count('image') == 2 and 'source' not in uses
    # As it lies beside the build
    assert content(works, folder, 'provenance') == (
        works.folder / 'provenance.json').read_bytes()


@SLOW
def test_each_kind(works: Works, there: There) -> None:
    '''Published once, found the second time, and told.'''
    said = works.good('--publish', '--json', **there.env)
    [event] = works.events('published', assert_secret(said))
    assert event['fresh'] and event['uploaded'] == event['objects'] == 22
    assert_whole(there)
    before = there.see()
    said = works.good('--publish', '--json', **there.env)
    [event] = works.events('published', assert_secret(said))
    assert not event['fresh'] and event['uploaded'] == 0
    assert there.see() == before
    said = works.good('--published', '--json', **there.env)
    [event] = works.events('availability', assert_secret(said))
    assert event['state'] == 'published'


def second(works: Works, tmp_path: Path, archive: Archive) -> Works:
    '''Another machine, which has built the same.'''
    (tmp_path / 'w2').mkdir()
    other = Works(tmp_path / 'w2', archive, works.mirror)
    log = other.cache / 'log/mini-x86_64.log'
    log.write_text('mkosi was elsewhere\n')
    record = other.folder / 'record.json'
    os.utime(record, (time.time() + 9, time.time() + 9))
    assert other.identity == works.identity
    return other


@SLOW
def test_somebody_else_publishes_it(works: Works, folder: There,
                                    tmp_path: Path,
                                    archive: Archive) -> None:
    '''The same but for its log: the first one stays.'''
    publish(works, folder)
    before = folder.see()
    said = publish(second(works, tmp_path, archive), folder)
    assert 'had been published' in said
    assert folder.see() == before


@SLOW
def test_two_publishers_at_once(works: Works, there: There, tmp_path: Path,
                                archive: Archive) -> None:
    '''Both end well, and one index is there.'''
    both = [works, second(works, tmp_path, archive)]
    for each in both:
        each.good('--sources')
    # pylint: disable-next=consider-using-with
    programs = [subprocess.Popen(
        each.command('--publish'), env=each.environment(**there.env),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding='utf-8')
        for each in both]
    said = [program.communicate(timeout=100)[0] for program in programs]
    assert [program.returncode for program in programs] == [0, 0], said
    assert_secret(''.join(said))
    assert_whole(there)


@SLOW
def test_lost_objects_come_back(works: Works, folder: There) -> None:
    '''Publishing again completes what a store has lost.'''
    publish(works, folder)
    lost = folder.index(works)['objects'][0]['sha256']
    Path(folder.env['QEMU_MKOSI_PUBLISH'], lost).unlink()
    said = works.bad(8, '--published', **folder.env)
    assert 'incomplete' in said and '1 of 22 objects' in said
    assert 'had been published' in publish(works, folder)
    assert lost in folder.see()


# What is refused

def test_nowhere(works: Works) -> None:
    '''Nobody has said where to.'''
    assert 'QEMU_MKOSI_PUBLISH is not set' in works.bad(2, '--publish')


def assert_untouched(works: Works, there: There) -> None:
    '''Nothing was begun.'''
    assert not there.see()
    assert not (works.cache / 'store').exists()
    assert not (works.cache / 'sources').exists()


@SLOW
def test_not_built(works: Works, folder: There) -> None:
    '''Only what is here and whole.'''
    (works.folder / 'vmlinuz').write_bytes(b'other')
    assert 'is not built here' in refuse(works, folder, 3)
    shutil.rmtree(works.cache / 'images')
    assert 'is not built here' in refuse(works, folder, 3)
    assert_untouched(works, folder)


@SLOW
def test_not_what_the_registry_says(works: Works, folder: There) -> None:
    '''Nor what was built from something else.'''
    text = works.registry.read_text()
    works.registry.write_text(text.replace(
        hash_of_bytes(works.CONTENT['disk'][1]), '1' * 64))
    assert 'other bytes than the registry names' in refuse(works, folder, 7)
    works.registry.write_text(text)
    (works.definition / 'mkosi.conf').write_text('# changed\n')
    assert 'the definition has changed' in refuse(works, folder, 3)
    assert_untouched(works, folder)


@SLOW
def test_without_source(works: Works, folder: There,
                        archive: Archive) -> None:
    '''Not one object goes out.'''
    for path in archive.folder.glob('pool/main/d/delta/*.dsc'):
        path.unlink()
    said = refuse(works, folder, 5)
    assert 'missing: delta 0.3;' in said
    assert not folder.see()


def test_without_source_of_the_tools(works: Works, folder: There) -> None:
    '''Their packages go out, too.'''
    path = works.mkosi / f'tools/{host_architecture()}.lock'
    assert 'alpha=1' in path.read_text()
    # As the identity, which it is part of, would change: a broken registry
    path.write_text(path.read_text().replace('alpha=1', 'alpha=7'))
    assert 'without their hashes' in refuse(works, folder, 3)


@SLOW
def test_other_index(works: Works, folder: There) -> None:
    '''One that names other objects stays, and nothing is uploaded.'''
    name = index_name(works)
    path = Path(folder.env['QEMU_MKOSI_PUBLISH'], name)
    for text in ('{"objects": [], "published": {}}', 'rubbish', '', '{}'):
        path.write_text(text, encoding='utf-8')
        said = works.bad(8, '--publish', **folder.env)
        assert ('with other objects' if 'published' in text
                else 'not an index') in said
        assert list(folder.see()) == [name]
        assert path.read_bytes() == text.encode()


@SLOW
def test_other_object(works: Works, gitlab: PutServer) -> None:
    '''Other bytes under a hash: refused with both hashes, no index.'''
    there = on_server(gitlab)
    digest = hash_of_bytes(works.CONTENT['kernel'][1])
    gitlab.store(digest, b'something else')
    said = refuse(works, there, 8)
    assert digest in said and hash_of_bytes(b'something else') in said
    assert there.see()[digest] == b'something else'


@SLOW
def test_index_that_was_cut_off(
        works: Works, put_server: Callable[..., PutServer]) -> None:
    '''Makes way, as half an object does. What is something else stays.'''
    there = on_server(put_server('plain'))
    publish(works, there)
    name = index_name(works)
    whole = there.see()[name]
    files = getattr(there.see, '__self__').files
    for length in (0, 50, len(whole) - 3):
        files[name] = [whole[:length]]
        assert 'mini x86_64: published' in publish(works, there)
        assert json.loads(files[name][0])
    files[name] = [b'{ "published"']
    assert 'not an index' in works.bad(8, '--publish', **there.env)
    assert files[name] == [b'{ "published"']


@pytest.mark.parametrize('env', [
    {'QEMU_MKOSI_PUBLISH': 'relative'},
    {'QEMU_MKOSI_PUBLISH': 'https://example.org/packages/generic/a/1',
     'QEMU_MKOSI_PUBLISH_TOKEN': f'WRONG:{TOKEN}'},
    {'QEMU_MKOSI_PUBLISH': 'http://example.org/packages/generic/a/1',
     'QEMU_MKOSI_PUBLISH_TOKEN': TOKEN}])
def test_wrong_environment(env: Dict[str, str], works: Works,
                           folder: There) -> None:
    '''Before any work; and the token is not told.'''
    refuse(works, folder, 2, **env)
    assert_untouched(works, folder)


# Faults

@SLOW
def test_token_is_refused_in_the_middle(works: Works,
                                        gitlab: PutServer) -> None:
    '''It has expired: said at once. With a new one, it goes on.'''
    there = on_server(gitlab)
    gitlab.faults['PUT'] = [as_usual, as_usual, *[refuses(401)] * 99]
    said = refuse(works, there, 8)
    assert 'HTTP 401' in said and 'QEMU_MKOSI_PUBLISH_TOKEN' in said
    gitlab.faults.clear()
    puts = gitlab.count('PUT')
    publish(works, there)
    assert gitlab.count('PUT') - puts == 23 - 2


def as_usual(handler: Any) -> None:
    '''As usual.'''
    getattr(handler, '_put')()


@SLOW
def test_the_server_dies(works: Works, gitlab: PutServer) -> None:
    '''In each of the first uploads, and wants a rest.'''
    gitlab.faults['PUT'] = [
        dies(0), answers(429, headers={'Retry-After': '1'}), dies(20),
        answers(503)]
    publish(works, on_server(gitlab))


@SLOW
def test_stored_wrongly(works: Works, gitlab: PutServer) -> None:
    '''The first object comes back with other bytes: no index.'''
    gitlab.faults['PUT'] = [corrupts]
    assert 'is there with other bytes' in refuse(works, on_server(gitlab), 8)


@SLOW
@pytest.mark.parametrize('limit', [4096, 20_000, 200_000])
def test_disk_full(limit: int, works: Works, folder: There) -> None:
    '''Of the destination: no half object, and then it goes on.'''
    target = Path(folder.env['QEMU_MKOSI_PUBLISH'])
    publish(works, in_folder(works.root / 'another'))

    def full() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    # pylint: disable-next=subprocess-popen-preexec-fn
    result = subprocess.run(
        works.command('--publish'), env=works.environment(**folder.env),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding='utf-8',
        preexec_fn=full, check=False)
    assert result.returncode in (4, 8), result.stdout
    assert 'free some space' in result.stdout
    assert not [path for path in target.iterdir()
                if path.name.startswith('.')]
    assert_whole(folder)
    assert index_name(works) not in folder.see()
    publish(works, folder)


def start(work: Callable[[], None]) -> int:
    '''Start @work in a process of its own, the leader of a group.'''
    child = os.fork()
    # Whoever of us is first: it may be killed at once
    with contextlib.suppress(PermissionError):
        os.setpgid(child, 0)
    if child == 0:
        code = 1
        with contextlib.suppress(BaseException):
            work()
            code = 0
        os._exit(code)
    return child


@SLOW
@pytest.mark.parametrize('kind', ['folder', 'gitlab', 'dav', 'plain'])
def test_killed(kind: str, works: Works, tmp_path: Path,
                put_server: Callable[..., PutServer],
                monkeypatch: pytest.MonkeyPatch) -> None:
    '''
    At any time, many times: what is to be seen is whole at each, and a
    plain run completes it. What is killed has been forked, since most of a
    call's time goes into starting Python.
    '''
    target = tmp_path / 'published'
    if kind == 'folder':
        there, forget = in_folder(target), partial(empty, target)
    else:
        server = put_server(kind)
        there = on_server(server)
        forget = partial(dict.clear, server.files)
    # Source and packages come from apt, which is not what is killed here
    publish(works, there)
    full = len(there.see())
    for variable in works.environment(**there.env).items():
        monkeypatch.setenv(*variable)
    monkeypatch.setattr(destinations, 'PAUSE', 0.01)
    forget()
    landed = set()
    for seconds, anew in plan(kind, timed(works)):
        # Some begin anew, the others go on where the last one was killed
        if anew:
            forget()
        child = start(partial(publish_here, works))
        time.sleep(seconds)
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
        landed.add(len(there.see()))
        # There, files grow while others look
        if kind != 'plain':
            assert_whole(there)
    publish(works, there)
    assert full == len([name for name in there.see()
                        if not name.startswith('tmp-')])
    assert not list(target.glob('.*'))
    assert not list((works.cache / 'work').iterdir())
    # It was not always before or after all that counts
    assert any(0 < number < full for number in landed)


def plan(seed: str, whole: float) -> Iterator[Tuple[float, bool]]:
    '''After how much of @whole to kill, and whether to begin anew.'''
    rng = random.Random(seed)
    for _ in range(KILLS // 4):
        yield whole * rng.random(), rng.random() < 0.5


def timed(works: Works) -> float:
    '''How long publishing takes that nobody kills, in seconds.'''
    began = time.monotonic()
    assert os.waitpid(start(partial(publish_here, works)), 0)[1] == 0
    return time.monotonic() - began


def empty(folder: Path) -> None:
    '''Remove what is in @folder.'''
    for path in folder.iterdir():
        path.unlink()


def publish_here(works: Works) -> None:
    '''What --publish does, without starting Python.'''
    registry = registries.load(works.registry)
    builder = Builder(Cache(), Report(stream=io.StringIO()))
    publishing.publish(builder, [
        prepare(registry, registry.image('mini'), 'x86_64')])


# What is published

@SLOW
def test_told_by_stores(works: Works, folder: There) -> None:
    '''Without a destination, the tests' stores are asked.'''
    publish(works, folder)
    where = folder.env['QEMU_MKOSI_PUBLISH']
    said = works.good('--published', '--json', QEMU_TEST_MKOSI_STORES=(
        f'http://127.0.0.1:1/nobody {where}'))
    states = [event['state'] for event in works.events('availability', said)]
    assert states == ['unreachable', 'published']


@SLOW
def test_told_by_the_registry(works: Works, folder: There) -> None:
    '''Or those of the registry.'''
    publish(works, folder)
    text = works.registry.read_text()
    works.registry.write_text(text.replace(
        'schema: 1\n', 'schema: 1\nstores:\n  - '
        f'{folder.env["QEMU_MKOSI_PUBLISH"]}\n'))
    assert 'mini x86_64: published' in works.good('--published')


def test_not_published(works: Works, folder: There) -> None:
    '''Needs no build to be told.'''
    shutil.rmtree(works.cache)
    said = works.bad(8, '--published', **folder.env)
    assert 'mini x86_64: missing' in said
    assert 'not published, or not wholly: mini x86_64' in said


@pytest.mark.parametrize('text', [
    '[]', '[' * 100000, '{"objects": [], "published": {"objects": []}}'])
def test_damaged_index(text: str, works: Works, folder: There) -> None:
    '''Is none.'''
    Path(folder.env['QEMU_MKOSI_PUBLISH'], index_name(works)).write_text(
        text, encoding='utf-8')
    said = works.bad(8, '--published', **folder.env)
    assert 'incomplete' in said and 'the index is damaged' in said


@SLOW
@pytest.mark.parametrize('old, new', [
    ('"arch": "x86_64"', '"arch": "other"'), ('"size": ', '"size": -'),
    ('"sha256": "', '"sha256": "../')])
def test_index_of_something_else(old: str, new: str, works: Works,
                                 folder: There) -> None:
    '''What it lists may be there, but is not the image.'''
    publish(works, folder)
    path = Path(folder.env['QEMU_MKOSI_PUBLISH'], index_name(works))
    path.chmod(0o644)
    path.write_text(path.read_text('utf-8').replace(old, new), 'utf-8')
    assert 'incomplete' in works.bad(8, '--published', **folder.env)


def test_nobody_to_ask(works: Works) -> None:
    '''Neither store nor destination.'''
    assert 'no store to ask' in works.bad(2, '--published')


@SLOW
def test_mirror_is_not_asked_twice(works: Works, folder: There,
                                   faults: FaultServer) -> None:
    '''Once all is here, publishing needs no mirror.'''
    works.good('--sources')
    publish(works, folder)
    faults.asked.clear()
    publish(works, folder)
    assert not faults.asked
