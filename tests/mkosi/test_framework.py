# SPDX-License-Identifier: GPL-2.0-or-later
'''
Tests of what the series mends in QEMU's own framework and tests, in a copy
of a real QEMU tree.
'''

import hashlib
import io
import os
from pathlib import Path
import subprocess
import sys
import tarfile

import pytest

from conftest import Answer, Server
from fixtures_asset import Bench
from series import edits, functional, tree
from series.apply import changes, copy_tree

pytest_plugins = ['fixtures_asset']

DATA = b'data ' * 1000
HASH = hashlib.sha256(DATA).hexdigest()

ASSETS = '''\
from qemu_test import Asset, QemuBaseTest

class First(QemuBaseTest):
    ASSET_FILE = Asset({url!r}, {digest!r})
    def test_it(self):
        pass

class Second(QemuBaseTest):
    def test_it(self):
        pass

if __name__ == '__main__':
    QemuBaseTest.main()
'''

# Another process has begun to download, and ends before it has the file
RACE = '''
import threading, time
from qemu_test.asset import Asset, AssetError
asset = Asset({url!r}, {digest!r})
other = asset.cache_file.with_suffix('.download')
other.touch()
threading.Timer({delay}, other.unlink).start()
if not {delay}:
    time.sleep(0.5)
    print(json.dumps(asset._wait_for_other_download(other)))
    sys.exit()
try:
    print(json.dumps(os.path.exists(asset.fetch())))
except AssetError as e:
    print(json.dumps('transient' if e.transient else 'fatal'))
'''

ARCHIVE = '''
from qemu_test import Asset, archive_extract
class Other(Asset):
    pass
os.makedirs('out')
archive_extract(Other({url!r}, {digest!r}), 'out')
print(json.dumps(os.listdir('out')))
'''


def precache(bench: Bench, url: str) -> Path:
    '''Precache a file in ninja's way; returns the stamp's path.'''
    path = bench.write(ASSETS.format(url=url, digest=HASH))
    stamp = bench.tree.parent / 'test.tstamp'
    result = bench.python(path, QEMU_TEST_PRECACHE=str(stamp))
    assert result.returncode == 0, result.stdout
    return stamp


def test_stamp_says_that_all_is_there(bench: Bench, server: Server) -> None:
    '''None after a failure that may pass, not even that of another time.'''
    stamp = precache(bench, 'http://127.0.0.1:1/file')
    assert not stamp.exists()
    server.paths['/file'] = Answer(DATA)
    assert precache(bench, f'{server.url}/file').exists()
    (bench.cache / HASH).unlink()
    assert not precache(bench, 'http://127.0.0.1:1/file').exists()


@pytest.mark.parametrize('delay, status, expected', [
    (0.3, 200, True), (0.3, 503, 'transient'), (0, 200, False)])
def test_download_elsewhere_fails(
        bench: Bench, server: Server, delay: float, status: int,
        expected: object) -> None:
    '''Then the file is downloaded here, or the error is an ordinary one.'''
    server.paths['/file'] = Answer(DATA, status)
    assert bench.script(RACE.format(url=f'{server.url}/file', digest=HASH,
                                    delay=delay)) == expected


def test_archive_of_a_subclass(bench: Bench) -> None:
    '''The format is known by the URL, the path is that in the cache.'''
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode='w:gz') as archive:
        archive.addfile(tarfile.TarInfo('inside'))
    digest = hashlib.sha256(buffer.getvalue()).hexdigest()
    (bench.cache / digest).write_bytes(buffer.getvalue())
    assert bench.script(ARCHIVE.format(
        url='http://nowhere.test/x.tar.gz', digest=digest)) == ['inside']


# A host of the guest's architecture, as far as smmu asks for it
SMMU = '''
import os, sys
from test_smmu import SMMU
class Asked(Exception):
    pass
class Test:
    qemu_bin = sys.argv[1]
    def skipTest(self, reason):
        raise Asked(f'skipped: {reason}')
    def require_accelerator(self, name):
        raise Asked(name)
os.access = lambda *args: True
os.uname = lambda: ('Linux', 'host', '6', '1', 'aarch64')
try:
    SMMU.common_vm_setup(Test(), None, None, None)
except Asked as answer:
    print(answer)
'''


@pytest.fixture(name='unmodified', scope='session')
def fixture_unmodified() -> Path:
    '''QEMU's tree as it is.'''
    return tree.obtain(functional.BUILD / 'downloads', functional.say)


@pytest.fixture(name='fixed', scope='session')
def fixture_fixed(unmodified: Path,
                  tmp_path_factory: pytest.TempPathFactory) -> Path:
    '''A copy with the first part of the series, and nothing else.'''
    copy = tmp_path_factory.mktemp('fixed') / 'tree'
    fixes = edits.parts()[0].patches
    copy_tree(unmodified, copy, changes(unmodified, fixes, None))
    return copy


def accelerator(source: Path, folder: Path, *offers: str) -> str:
    '''What smmu of the tree @source takes of what an emulator @offers.'''
    if not (source / 'tests/functional/aarch64/test_smmu.py').is_file():
        pytest.skip('no folders in this tree: the test is left alone')
    emulator = folder / 'qemu-system-aarch64'
    emulator.write_text('#!/bin/sh\necho Accelerators supported:\n'
                        f'printf \'%s\\n\' {" ".join(offers)}\n', 'utf-8')
    emulator.chmod(0o755)
    (folder / 'Makefile.mtest').touch()
    paths = ('python', 'tests/functional', 'tests/functional/aarch64')
    return subprocess.run(
        [sys.executable, '-c', SMMU, str(emulator)], check=True, cwd=folder,
        env={**os.environ, 'PYTHONDONTWRITEBYTECODE': '1',
             'QEMU_BUILD_ROOT': str(folder), 'MESON_BUILD_ROOT': str(folder),
             'QEMU_TEST_QEMU_BINARY': str(emulator),
             'PYTHONPATH': os.pathsep.join(str(source / path)
                                           for path in paths)},
        stdout=subprocess.PIPE, encoding='utf-8').stdout.strip()


def test_smmu_takes_kvm(fixed: Path, qemu_tree: Path,
                        tmp_path: Path) -> None:
    '''Where the emulator has it, with the fix alone and with all.'''
    assert accelerator(fixed, tmp_path, 'tcg', 'kvm') == 'kvm'
    assert accelerator(qemu_tree, tmp_path, 'tcg', 'kvm') == 'kvm'
    assert accelerator(fixed, tmp_path, 'tcg').startswith('skipped: ')


def test_smmu_of_an_unmodified_tree(unmodified: Path,
                                    tmp_path: Path) -> None:
    '''It never does; once it does, the fix may go.'''
    assert accelerator(unmodified, tmp_path, 'tcg', 'kvm') \
        == 'skipped: Neither HVF nor KVM accelerator is available'


def test_fixes_need_nothing_else(unmodified: Path, fixed: Path) -> None:
    '''Each applies to QEMU's tree by itself, in any order.'''
    fixes = edits.parts()[0].patches
    assert not any(fix.files or fix.later for fix in fixes)
    for fix in fixes:
        # Some have nothing to do in trees of the other layout
        assert changes(unmodified, [fix], None) or fix.edits[0].layout
    backwards = changes(unmodified, fixes[::-1], None)
    assert backwards
    for name, content in backwards.items():
        assert (fixed / name).read_bytes() == content.data


def test_stamps_depend_on_the_registry(qemu_tree: Path) -> None:
    '''A change of it has ninja precache anew.'''
    text = (qemu_tree / 'tests/functional/meson.build').read_text('utf-8')
    assert "depend_files: files(testpath, 'mkosi/registry.yaml')" in text
