# SPDX-License-Identifier: GPL-2.0-or-later
'''
What tests of MkosiAsset and MkosiTest share: real test files, in real
processes, in a copy of a real QEMU tree.

PYTEST_DONT_REWRITE: test modules import this before they name it a plugin.
'''

import hashlib
import json
import os
from pathlib import Path
import shutil
import subprocess
import sys
import time
from typing import Any, Iterator

import pytest

from mkosi_build.record import record
from series import edits, functional, tree
from series.apply import apply


FILES = {'kernel': b'kernel ' * 1000, 'initrd': b'initrd ' * 2000,
         'disk': b'disk ' * 3000}
HASHES = {kind: hashlib.sha256(data).hexdigest()
          for kind, data in FILES.items()}
OTHER = 'f' * 64

UNBUILT = '''\
schema: 1
stores: []
images:
  tiny: &tiny
    description: Three small files
    definition: tiny
    distribution: debian
    release: trixie
    architectures:
      x86_64:
        artefacts:
          kernel:
            file: vmlinuz
            format: bzimage
          initrd:
            file: initrd.cpio.zst
            format: cpio
          disk:
            file: disk.qcow2
            format: qcow2
        boot: {console: ttyS0, cmdline: [console=ttyS0], disk-cmdline: [],
               disk-device: virtio-blk-pci, ready: READY, prompt: '# '}
        budget: {kernel-initrd-bytes: 1, disk-bytes: 1, packages: 1,
                 initrd-boot-ratio: 1, disk-boot-ratio: 1}
'''.replace(' &tiny', '')

BUILT = record(UNBUILT, 'tiny', 'x86_64', '0' * 64, {
    kind: (HASHES[kind], len(data)) for kind, data in FILES.items()})

TEST = '''\
from qemu_test import MkosiAsset, QemuBaseTest

class Tiny(QemuBaseTest):
    ASSET_IMAGE = MkosiAsset({declaration})

    def test_it(self):
        path = self.ASSET_IMAGE.fetch()
        assert path == str(self.ASSET_IMAGE), path

if __name__ == '__main__':
    QemuBaseTest.main()
'''

# A builder that does what the real one promises to MkosiAsset: it takes a
# lock, builds what is not in the cache, and says what it does
BUILDER = '''\
import fcntl, hashlib, os, sys, time
from pathlib import Path
files = {files!r}
cache = Path(os.environ['QEMU_TEST_CACHE_DIR'], 'download')
with open(cache.parent / 'lock', 'w') as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    for data in files.values():
        path = cache / hashlib.sha256(data).hexdigest()
        if not path.exists():
            print('building', path.name, flush=True)
            with open(cache.parent / 'builds', 'a') as builds:
                builds.write(' '.join(sys.argv[1:]) + chr(10))
            time.sleep(0.1)
            part = cache / 'part'
            part.write_bytes(data)
            part.replace(path)
'''


class Bench:
    '''A tree with a registry of its own, and a cache.'''
    def __init__(self, folder: Path, source: Path) -> None:
        self.tree = folder / 'tree'
        self.cache = folder / 'cache/download'
        self.builds = folder / 'cache/builds'
        for name in ('python', 'tests/functional/qemu_test',
                     'scripts/mkosi_build'):
            shutil.copytree(source / name, self.tree / name)
        self.registry = self.tree / 'tests/functional/mkosi/registry.yaml'
        self.registry.parent.mkdir()
        self.registry.write_text(BUILT, 'utf-8')
        self.cache.mkdir(parents=True)
        (folder / 'build').mkdir()
        # QEMU 10 takes this for the sign of a build folder
        (folder / 'build/Makefile.mtest').touch()
        paths = [self.tree / 'python', self.tree / 'tests/functional']
        self.env = {
            'PATH': os.environ['PATH'], 'HOME': str(folder),
            'PYTHONPATH': os.pathsep.join(map(str, paths)),
            'QEMU_BUILD_ROOT': str(folder / 'build'),
            'MESON_BUILD_ROOT': str(folder / 'build'),
            'QEMU_TEST_CACHE_DIR': str(folder / 'cache'),
            'QEMU_TEST_QEMU_BINARY': '/nowhere/qemu-system-x86_64',
        }

    def fill(self, age: int = 60) -> None:
        '''Put the image into the cache, as of some seconds ago.'''
        for kind, data in FILES.items():
            self.path(kind).write_bytes(data)
            os.utime(self.path(kind), times=(time.time() - age,) * 2)

    def path(self, kind: str) -> Path:
        '''A file of the image in the cache.'''
        return self.cache / HASHES[kind]

    def write(self, text: str, name: str = 'x86_64/test_it.py') -> Path:
        '''Write a test file.'''
        path = self.tree / 'tests/functional' / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, 'utf-8')
        return path

    def python(self, path: Path, *prefix: str,
               **env: str) -> 'subprocess.CompletedProcess[str]':
        '''Run a file.'''
        return subprocess.run(
            [*prefix, sys.executable, str(path)], cwd=self.tree.parent,
            env={**self.env, **env}, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, encoding='utf-8', check=False,
            timeout=60)

    def test(self, *prefix: str, declaration: str = "'tiny'",
             **env: str) -> str:
        '''Run a test with an image, return all that is printed.'''
        path = self.write(TEST.format(declaration=declaration))
        return self.python(path, *prefix, **env).stdout

    def precache(self, declaration: str = "'tiny'",
                 name: str = 'x86_64/test_it.py',
                 **env: str) -> 'subprocess.CompletedProcess[str]':
        '''Precache a test's image, as ninja does.'''
        path = self.write(TEST.format(declaration=declaration), name)
        stamp = self.tree.parent / 'test.tstamp'
        binary = self.env.pop('QEMU_TEST_QEMU_BINARY')
        try:
            return self.python(path, QEMU_TEST_PRECACHE=str(stamp), **env)
        finally:
            self.env['QEMU_TEST_QEMU_BINARY'] = binary

    def script(self, text: str, **env: str) -> Any:
        '''Run a script with an image, return what it prints as JSON.'''
        path = self.write('import json, os, sys\n'
                          'from qemu_test import MkosiAsset, QemuBaseTest\n'
                          + text, 'x86_64/script.py')
        result = self.python(path, **env)
        assert result.returncode == 0, result.stdout
        return json.loads(result.stdout.splitlines()[-1])

    def builder(self, text: str = BUILDER.format(files=FILES)) -> None:
        '''Put a builder in place.'''
        path = self.tree / 'scripts/mkosi-build.py'
        path.write_text(text, 'utf-8')

    def stores(self, *urls: str) -> None:
        '''Have the registry name these stores.'''
        self.registry.write_text(
            BUILT.replace('stores: []', f'stores: {json.dumps(urls)}'),
            'utf-8')

    def override(self, **change: object) -> Path:
        '''Write an override file with other hashes for the image.'''
        target = {
            'identity': OTHER, 'locked': False, 'artefacts': {
                kind: {'sha256': hashlib.sha256(data + b'2').hexdigest(),
                       'size': len(data) + 1}
                for kind, data in FILES.items()}}
        content = {'schema': 1, 'images': {'tiny': {'x86_64': target}}}
        path = self.tree.parent / 'override.json'
        path.write_text(json.dumps({**content, **change}), 'utf-8')
        return path

    def fill_override(self) -> None:
        '''Put what the override names into the cache.'''
        for data in FILES.values():
            name = hashlib.sha256(data + b'2').hexdigest()
            (self.cache / name).write_bytes(data + b'2')


@pytest.fixture(scope='session', name='qemu_tree')
def fixture_qemu_tree(
        tmp_path_factory: pytest.TempPathFactory) -> Path:
    '''A QEMU tree with the series applied: QEMU_SRC, else a locked one.'''
    folder = functional.BUILD / 'downloads'
    source = tree.obtain(folder, functional.say)
    copy = tmp_path_factory.mktemp('qemu') / 'tree'
    apply(source, copy, edits.load())
    return copy


@pytest.fixture(name='bench')
def fixture_bench(tmp_path: Path, qemu_tree: Path) -> Iterator[Bench]:
    '''A Bench; nothing half-made may be left in its cache.'''
    bench = Bench(tmp_path, qemu_tree)
    yield bench
    if bench.cache.is_dir():
        left = [path.name for path in bench.cache.iterdir()
                if path.suffix not in ('.stamp', '.verified')
                and len(path.name) != 64]
        assert not left


def passed(output: str) -> bool:
    '''Whether the TAP output says that the only test passed.'''
    return '\nok 1 ' in '\n' + output and '# SKIP' not in output


def skipped(output: str) -> str:
    '''The reason for which the only test was skipped.'''
    lines = [line for line in output.splitlines() if '# SKIP' in line]
    assert len(lines) == 1, output
    assert lines[0].startswith('ok 1 ')
    return lines[0].split('# SKIP', 1)[1].strip()


def failed(output: str) -> str:
    '''The output of a test that failed.'''
    assert 'not ok 1 ' in output, output
    return output
