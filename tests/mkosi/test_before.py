# SPDX-License-Identifier: GPL-2.0-or-later
'''The table of what QEMU's tests fetch and need, before and after.'''

from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
import json
from pathlib import Path
import socket
import threading
from typing import Dict, Iterator, List, Tuple

import pytest

from series import apply, before, cases, edits, tap, tree
from series.before import File, Row, Side, Sizes, Table, ratio, total
from series.cases import Case, Download, Image
from series.error import SeriesError
from series.functional import BUILD


LIBRARY = '''
class Base(QemuBaseTest):
    def common(self):
        self.require_accelerator('kvm')
        self.indirect()
'''
TEST = '''
HOST = 'http://one.test'

class One(Base):
    FOLDER = HOST + '/pub'
    ASSET_KERNEL = Asset(
        ('http://one.test/'
         'vmlinuz'), 'aa')
    ASSET_DISK = Asset(url=f'{FOLDER}/disk', hashsum='bb')
    ASSET_IMAGE = MkosiAsset('tiny', part='initrd')
    OTHER = Asset('not', 'one')

    def indirect(self):
        return self.ASSET_DISK.fetch()

    def test_all(self):
        self.ASSET_KERNEL.fetch()
        self.common()

    def test_none(self):
        self.require_accelerator('tcg')

    def helper(self):
        pass

class Two(One):
    ASSET_KERNEL = MkosiAsset('tiny')

    def test_two(self):
        if self.ASSET_KERNEL.kernel.fetch():
            self.skipTest('neither HVF ' + 'nor KVM')

class Three(QemuBaseTest):
    ASSET_X = Asset('http://three.test', 'cc')

    def setUp(self):
        self.ASSET_X.fetch()

    def test_three(self):
        self.test_three()
'''


def test_what_a_case_uses() -> None:
    '''What it says of self, and what the methods do that it calls.'''
    kernel = Download('http://one.test/vmlinuz', 'aa')
    disk = Download('http://one.test/pub/disk', 'bb')
    assert cases.read(TEST, 'a.py', [LIBRARY]) == [
        Case('test_all', (kernel, disk), True),
        Case('test_none', (), False),
        Case('test_two', (Image('tiny', 'disk'),), True),
        Case('test_three', (Download('http://three.test', 'cc'),), False)]
    # Without the file of its base
    assert cases.read(TEST, 'a.py')[0] == Case('test_all', (kernel,), False)


def test_case_on_images() -> None:
    '''One that fetches nothing else, but something.'''
    image, other = Image('tiny', 'disk'), Download('http://a.test', 'aa')
    assert [Case('test', assets, False).on_images for assets
            in ((image,), (image, other), (other,), ())] \
        == [True, False, False, False]


@pytest.mark.parametrize('asset, place', [
    ("Asset(URL, 'aa')", 3), ("Asset('http://a.test')", 0),
    ("Asset('http://' + host(), 'aa')", 3), ('Asset(1, 2)', 3),
    ('MkosiAsset(name=NAME)', 3)])
def test_asset_that_is_not_understood(asset: str, place: int) -> None:
    '''Is an error with its place, not a file less.'''
    with pytest.raises(SeriesError, match=f'test_a.py:{place}: '):
        cases.read(f'\nclass One(Base):\n    ASSET_A = {asset}\n',
                   'test_a.py')


# Sizes

@pytest.fixture(name='host')
def fixture_host(tmp_path: Path) -> Iterator[Tuple[str, List[str]]]:
    '''A web server that has a file, and what it is asked for.'''
    asked: List[str] = []

    class Handler(SimpleHTTPRequestHandler):
        '''Writes its log to the list.'''
        def log_message(self, *args: object) -> None:
            # pylint: disable=arguments-differ
            '''One line a request.'''
            asked.append(str(args[1]))

    (tmp_path / 'www').mkdir()
    (tmp_path / 'www/file').write_bytes(b'x' * 12345)
    with ThreadingHTTPServer(('127.0.0.1', 0), partial(
            Handler, directory=str(tmp_path / 'www'))) as http:
        thread = threading.Thread(target=http.serve_forever, daemon=True,
                                  kwargs={'poll_interval': 0.01})
        thread.start()
        yield f'http://127.0.0.1:{http.server_port}', asked
        http.shutdown()
        thread.join()


def test_size_by_asking(tmp_path: Path,
                        host: Tuple[str, List[str]]) -> None:
    '''Once a file, and nothing is downloaded.'''
    url, asked = host
    sizes = Sizes(tmp_path / 'cache')
    for _ in range(2):
        assert sizes.file(Download(f'{url}/file', 'aa')) \
            == File(f'{url}/file', 12345)
        assert sizes.file(Download(f'{url}/gone', 'bb')) \
            == File(f'{url}/gone', None, 'HTTP status 404')
    requests = [line for line in asked if line.startswith('HEAD')]
    assert len(requests) == 2 and not any('GET' in line for line in asked)


def test_size_in_the_cache(tmp_path: Path) -> None:
    '''Nobody is asked.'''
    (tmp_path / 'aa').write_bytes(b'123')
    url = 'http://127.0.0.1:1/file'
    assert Sizes(tmp_path).file(Download(url, 'aa')) == File(url, 3)


def test_host_that_is_not_reachable(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    '''It is asked for one file only, for that may take its time.'''
    monkeypatch.setattr(before, 'TIMEOUT', 0.2)
    sizes = Sizes(tmp_path)
    with socket.create_server(('127.0.0.1', 0)) as silent:
        url = f'http://127.0.0.1:{silent.getsockname()[1]}'
        for name in ('one', 'two'):
            assert sizes.file(Download(f'{url}/{name}', name)) \
                == File(f'{url}/{name}', None, 'host not reachable')
        silent.settimeout(5)
        silent.accept()[0].close()
        silent.settimeout(0)
        with pytest.raises(BlockingIOError):
            silent.accept()
    for other in ('http://127.0.0.1:1/x', 'http://nowhere.invalid/x'):
        assert sizes.file(Download(other, 'aa')).why == 'host not reachable'


REGISTRY = {'images': {'tiny': {'architectures': {'x86_64': {'artefacts': {
    'kernel': {'size': 1}, 'initrd': {'size': 20}, 'disk': {}}}}}}}


@pytest.mark.parametrize('part, expected', [
    ('kernel', [1]), ('initrd', [1, 20]), ('disk', [1, 20, None])])
def test_files_of_an_image(part: str, expected: List[object]) -> None:
    '''Those up to its part, as MkosiAsset fetches them.'''
    files = before.image_files(Image('tiny', part), 'x86_64', REGISTRY)
    assert [file.size for file in files] == expected
    assert files[0].name == 'tiny/x86_64/kernel'


# Arithmetic

ONE, TWO = File('http://a.test/one', 1000000), File('tiny/x86_64/two', 50000)
LOST = File('http://b.test/lost', None, 'host not reachable')


def side(*files: File, kvm: bool = False, outcome: str = 'passed') -> Side:
    '''One side of a case.'''
    return Side(files, kvm, outcome, 'why' if outcome == 'skipped' else '')


def test_sum_counts_a_file_once() -> None:
    '''However many cases fetch it.'''
    whole = total([side(ONE, TWO, kvm=True), side(ONE, outcome='failed'),
                   side(LOST, kvm=True, outcome='skipped'), side(LOST)])
    assert whole == before.Sum(
        files=3, size=1050000, unknown=1, kvm=2,
        outcomes={'passed': 2, 'skipped': 1, 'failed': 1})


@pytest.mark.parametrize('old, new, expected', [
    ([ONE], [TWO], '0.050'), ([ONE, LOST], [TWO], 'at most 0.050'),
    ([LOST], [TWO], 'not known'), ([ONE], [TWO, LOST], 'not known'),
    ([], [TWO], 'not known')])
def test_ratio(old: List[File], new: List[File], expected: str) -> None:
    '''Never better than what is known.'''
    assert ratio(total([side(*old)]), total([side(*new)])) == expected


TAP = '''TAP version 13
ok 1 test_a.One.test_good
# ok 7 test_a.One.test_talk
ok 2 test_a.One.test_other # SKIP KVM | is absent
not ok 3 test_a.One.test_bad
1..3
'''


def test_outcomes_by_case() -> None:
    '''By the method's name, which is the same in another class.'''
    assert tap.outcomes(TAP) == {
        'test_good': ('passed', ''),
        'test_other': ('skipped', 'KVM | is absent'),
        'test_bad': ('failed', '')}


def write(folder: Path, declared: str) -> Path:
    '''A tree with one test, whose class has @declared in it.'''
    path = folder / 'tests/functional/x86_64/test_a.py'
    path.parent.mkdir(parents=True)
    (folder / 'tests/functional/lib.py').write_text(LIBRARY, 'utf-8')
    methods = ''.join(
        f'    def test_{name}(self):\n        self.common()\n'
        '        self.ASSET_A.fetch()\n' for name in ('good', 'other', 'bad'))
    path.write_text('from lib import Base\n\nclass One(Base):\n'
                    f'    ASSET_A = {declared}\n{methods}', 'utf-8')
    return folder


def test_comparison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    '''What passed does not need KVM, whatever it says.'''
    registry = tmp_path / 'registry.yaml'
    registry.write_text(json.dumps(REGISTRY), 'utf-8')
    monkeypatch.setattr(before, 'REGISTRY', registry)
    name = 'tests/functional/x86_64/test_a.py'
    folders = (write(tmp_path / 'old', "Asset('http://127.0.0.1:1/a', 'a')"),
               write(tmp_path / 'new', "MkosiAsset('tiny', part='initrd')"))
    record = {'stdout': TAP, 'result': 'OK', 'duration': 1.5}
    rows, left = before.compare([name], folders, ({}, {name: record}),
                                Sizes(tmp_path))
    assert not left
    assert {(row.test, row.before.outcome, row.before.reason,
             row.before.needs_kvm, row.before.files[0].why) for row in rows} \
        == {('x86_64/a', 'skipped', 'no qemu-system-x86_64', True,
             'host not reachable')}
    assert [(row.case, row.after.outcome, row.after.needs_kvm,
             len(row.after.files)) for row in rows] == [
        ('test_good', 'passed', False, 2), ('test_other', 'skipped', True, 2),
        ('test_bad', 'failed', True, 2)]
    # A case that meson's record has nothing of
    rows, left = before.compare(
        [name], folders, ({}, {name: {**record, 'stdout': None,
                                      'result': 'TIMEOUT'}}), Sizes(tmp_path))
    assert rows[0].after.outcome == 'failed'
    assert rows[0].after.reason == 'meson says TIMEOUT'
    # One that is on no image after
    rows, left = before.compare([name], (folders[0], folders[0]), ({}, {}),
                                Sizes(tmp_path))
    assert not rows and left[0] == 'x86_64/a: test_good'


def test_what_is_written() -> None:
    '''The same as text and as Markdown; a bar in a reason breaks no row.'''
    rows = [Row('x86_64/a', 'test_good', side(ONE, LOST, kvm=True), side(TWO)),
            Row('x86_64/a', 'test_other', side(ONE),
                Side((TWO,), True, 'skipped', 'a | b'))]
    table = Table('11.1.1', rows, ['x86_64/a: test_old'],
                  {'x86_64/a': 0.4}, {'x86_64/a': 12.0})
    text, marked = before.plain(table), before.markdown(table)
    for line in before.summary(table):
        assert line in text.splitlines() and f'- {line}' in marked
    assert before.summary(table) == [
        'before: 2 files, 1.0 MB and 1 of a size not known: host not '
        'reachable; 1 of 2 cases need KVM; 2 passed, 0 skipped, 0 failed',
        'after: 1 file, 0.1 MB; 1 of 2 cases need KVM; 1 passed, 1 skipped, '
        '0 failed',
        'bytes after / before: at most 0.050',
        'left as they are: x86_64/a: test_old']
    assert 'skipped: a | b' in text and 'skipped: a \\| b' in marked
    assert '0.4 s' in text and '12.0 s' in text
    lengths: Dict[int, int] = {}
    for line in marked.replace('\\|', '').splitlines():
        if line.startswith('|'):
            lengths[line.count('|')] = lengths.get(line.count('|'), 0) + 1
    assert lengths == {6: 3, 7: 4}


# QEMU's own tests

def test_of_a_real_tree(tmp_path: Path) -> None:
    '''All that the series is to migrate is there, on images.'''
    source = tree.obtain(BUILD / 'downloads', print)
    if tree.layout(source) == 'flat':
        pytest.skip('no folders in this tree: no test is migrated')
    copy = tmp_path / 'tree'
    apply.apply(source, copy, edits.load())
    names = before.migrated(edits.load())
    assert {f'{name.split("/")[2]}/{Path(name).stem[5:]}' for name in names} \
        == {'x86_64/hotplug_blk', 'x86_64/hotplug_cpu', 'x86_64/intel_iommu',
            'x86_64/multiprocess', 'x86_64/netdev_ethtool',
            'x86_64/virtio_balloon', 'aarch64/hotplug_pci',
            'aarch64/multiprocess', 'aarch64/smmu', 'aarch64/virt'}
    old = {(name, case.name): case for name in names
           for case in before.cases_of(source, name).values()}
    new = {(name, case.name): case for name in names
           for case in before.cases_of(copy, name).values()}
    # No case is lost, and each has its files
    assert set(old) == set(new)
    assert all(case.assets for case in (*old.values(), *new.values()))
    stay = {case.name for case in new.values() if not case.on_images}
    assert stay == {'test_alpine_virt_tcg_gic_max', 'test_smmu_noril',
                    'test_smmu_noril_passthrough', 'test_smmu_noril_nostrict'}
    assert sum(case.wants_kvm for case in old.values()) == 15
    for path in ('x86_64/test_virtio_balloon.py', 'aarch64/test_smmu.py'):
        assert all(case.wants_kvm for (name, _), case in old.items()
                   if name.endswith(path))
