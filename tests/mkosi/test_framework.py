# SPDX-License-Identifier: GPL-2.0-or-later
'''
Tests of what the series mends in QEMU's own framework and tests, in a copy
of a real QEMU tree.
'''

import ast
import hashlib
import io
import os
from pathlib import Path
import tarfile

import pytest

from conftest import Answer, Server
from fixtures_asset import Bench

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


def test_smmu_asks_about_the_emulator(qemu_tree: Path) -> None:
    '''The first argument of kvm_available() is an architecture.'''
    path = qemu_tree / 'tests/functional/aarch64/test_smmu.py'
    if not os.path.exists(path):
        pytest.skip('no folders in this tree: the test is left alone')
    calls = [node for node in ast.walk(ast.parse(path.read_text('utf-8')))
             if isinstance(node, ast.Call)
             and isinstance(node.func, ast.Name)
             and node.func.id == 'kvm_available']
    assert len(calls) == 1 and not calls[0].args
    assert [keyword.arg for keyword in calls[0].keywords] == ['qemu_bin']


def test_stamps_depend_on_the_registry(qemu_tree: Path) -> None:
    '''A change of it has ninja precache anew.'''
    text = (qemu_tree / 'tests/functional/meson.build').read_text('utf-8')
    assert "depend_files: files(testpath, 'mkosi/registry.yaml')" in text
