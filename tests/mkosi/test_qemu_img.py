# SPDX-License-Identifier: GPL-2.0-or-later
'''What qemu-img says of images: the same each time, and each change seen.'''

from fnmatch import fnmatchcase
import hashlib
import json
from pathlib import Path
import shutil
import time
from typing import Dict, Iterator, List, NamedTuple

import pytest

from mkosi_build import differences, qemu_img
from mkosi_build.differences import Version
from mkosi_build.error import HostError, InputError
from mkosi_build.qemu_img import DISK, Observed, Run
from test_differences import DECLARED

BASELINE = DECLARED.with_name('qemu-img.json')
PROGRAM = shutil.which('qemu-img') or ''

# Enough to see each way through the code; the others take their time
FORMATS = ('raw', 'qcow2', 'qcow2-zlib', 'vmdk-split')


class Images(NamedTuple):
    '''Samples and a disk of our own, and what was observed of them.'''
    run: Run
    samples: Path
    disks: Dict[str, Path]
    observed: Observed

    def observe(self, run: Run, work: Path) -> Observed:
        '''What another program says.'''
        work.mkdir()
        found = qemu_img.observe(run, self.run, self.samples, self.disks,
                                 work)
        assert not list(work.iterdir())
        return found


def make_images(folder: Path) -> Images:
    '''Make all of them, and observe them.'''
    run = qemu_img.program([PROGRAM])
    # Options of images have commas between them
    samples = folder / 'a,sample'
    samples.mkdir(parents=True)
    qemu_img.samples(run, samples)
    own = folder / 'own.qcow2'
    shutil.copy(samples / 'qcow2-zlib', own)
    images = Images(run, samples, {'own-x86_64': own},
                    Observed(Version(0, 0, 0), {}))
    return images._replace(observed=images.observe(run, folder / 'work'))


@pytest.fixture(name='few', scope='module', autouse=True)
def fixture_few() -> Iterator[None]:
    '''Fewer formats.'''
    if not PROGRAM:
        pytest.skip('qemu-img is not installed')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(qemu_img, 'FORMATS', tuple(
            each for each in qemu_img.FORMATS if each.name in FORMATS))
        yield


@pytest.fixture(name='images', scope='module')
def fixture_images(few: None,
                   tmp_path_factory: pytest.TempPathFactory) -> Images:
    '''The images of all tests here.'''
    assert few is None
    return make_images(tmp_path_factory.mktemp('images'))


@pytest.fixture(name='pattern', scope='module')
def fixture_pattern(tmp_path_factory: pytest.TempPathFactory) -> str:
    '''The digest of the pattern that is in most samples.'''
    path = tmp_path_factory.mktemp('pattern') / 'raw'
    path.write_bytes(qemu_img.pattern())
    return qemu_img.guest_bytes(path)


def hashes(folder: Path) -> Dict[str, str]:
    '''The SHA-256 of each file.'''
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in folder.iterdir() if path.is_file()}


def script(folder: Path, text: str) -> List[str]:
    '''A shell script in place of qemu-img, which is $QEMU_IMG there.'''
    path = folder / 'qemu-img'
    path.write_text(f'#!/bin/sh\nQEMU_IMG={PROGRAM}\n{text}')
    path.chmod(0o755)
    return [str(path)]


# Samples and observations

def test_same_each_time(images: Images, tmp_path: Path) -> None:
    '''Other images made in the same way, elsewhere, a second later.'''
    again = make_images(tmp_path / 'else where')
    assert again.observed == images.observed
    text = json.dumps(images.observed.values)
    assert str(images.samples.parent) not in text
    assert 'actual-size' not in text and '"cid"' not in text


def test_images_are_only_read(images: Images, tmp_path: Path) -> None:
    '''Samples as well as our own.'''
    for folder in (images.samples, images.samples.parent):
        for path in folder.iterdir():
            if path.is_file():
                path.chmod(0o444)
    before = [hashes(images.samples), hashes(images.samples.parent)]
    images.observe(images.run, tmp_path / 'work')
    assert [hashes(images.samples),
            hashes(images.samples.parent)] == before


def test_guest_sees_what_was_written(images: Images, pattern: str,
                                     tmp_path: Path) -> None:
    '''In each format and on each way there and back.'''
    values = images.observed.values
    for name in FORMATS:
        for assertion in ('convert', 'round-trip', 'cross'):
            assert values[f'{assertion} {name}'] == pattern
        assert values[f'compare {name}'] == {
            'exit': 0, 'text': ['Images are identical.']}
    assert values[f'convert {DISK}own-x86_64'] == pattern
    assert values[f'cross {DISK}own-x86_64'] == pattern
    # Each image of a chain has what is below but for its own clusters
    data = bytearray(qemu_img.pattern())
    for number, name in enumerate(qemu_img.CHAIN[1:]):
        for place in range(5 + number, 60, 9):
            data[place << 16:(place + 1) << 16] = hashlib.shake_128(
                f'{name} {place}'.encode()).digest(1 << 16)
        (tmp_path / name).write_bytes(data)
        assert values[f'convert {name}'] == qemu_img.guest_bytes(
            tmp_path / name)
    assert values['compare chain']['exit'] == 1


def test_pattern_has_all_kinds_of_clusters() -> None:
    '''Data, zeroes, repeats, and some in part; always the same.'''
    data = qemu_img.pattern()
    assert len(data) == 8 << 20
    assert hashlib.sha256(data).hexdigest() == (
        'f8106f45def05f736f5e77ca87f47dc02246cab0f126df98628c398845a4957d')
    clusters = [data[at:at + 65536] for at in range(0, len(data), 65536)]
    zero = bytes(65536)
    assert clusters.count(zero) > 40
    assert len(set(clusters)) < len(clusters) - clusters.count(zero)
    assert any(bytes(4096) == c[:4096] and c != zero for c in clusters)


def test_digest_is_of_the_bytes_alone(tmp_path: Path) -> None:
    '''Holes are zeroes; another place, another size, another byte counts.'''
    def digest(data: bytes) -> str:
        path = tmp_path / 'raw'
        path.write_bytes(data)
        return qemu_img.guest_bytes(path)

    data = bytes(65536) + b'data' + bytes(131072)
    with open(tmp_path / 'sparse', 'wb') as file:
        file.truncate(len(data))
        file.seek(65536)
        file.write(b'data')
    assert qemu_img.guest_bytes(tmp_path / 'sparse') == digest(data)
    others = [data + b'\0', b'\0' + data[:-1], data.replace(b'd', b'D'),
              bytes(65536) + data[:-65536], bytes(len(data)), b'']
    assert len({digest(each) for each in [data, *others]}) == 7


def test_holes_of_the_file_are_not_told() -> None:
    '''What the image itself calls zero is.'''
    def extent(start: int, length: int, data: bool, zero: bool,
               **more: int) -> Dict[str, object]:
        return {'start': start, 'length': length, 'data': data,
                'zero': zero, **more}

    # pylint: disable=protected-access
    assert qemu_img._without_holes([
        extent(0, 4, True, False, offset=8),
        extent(4, 2, True, True, offset=12),
        extent(6, 2, True, False, offset=14),
        # Elsewhere in the file, in another image, nowhere
        extent(8, 2, True, True, offset=20),
        extent(10, 2, True, True, offset=22, depth=1),
        extent(12, 2, True, False), extent(14, 2, True, True),
        extent(16, 4, False, True), extent(20, 1, False, False)]) == [
        extent(0, 8, True, False, offset=8),
        extent(8, 2, True, False, offset=20),
        extent(10, 2, True, False, offset=22, depth=1),
        extent(12, 4, True, False), extent(16, 4, False, True),
        extent(20, 1, False, False)]


def test_failure_is_a_value(images: Images) -> None:
    '''The exit code and the error, without the folder.'''
    values = images.observed.values
    failed = values['convert broken-feature']
    assert failed['exit'] == 1
    assert failed['error'][0].startswith(
        "qemu-img: Could not open 'broken-feature': Unsupported")
    assert values['compare broken-feature']['text'][0].startswith(
        "qemu-img: Could not open 'driver=qcow2,file.driver=file,"
        "file.filename=broken-feature'")
    leak = values['check broken-leak']
    assert (leak['exit'], leak['output']['leaks']) == (3, 1)


def test_unable_program_makes_no_samples(tmp_path: Path) -> None:
    '''The command that failed is told.'''
    with pytest.raises(HostError, match='qemu-img convert .*: exit code 5: '
                       'no such format'):
        qemu_img.samples(qemu_img.program(script(
            tmp_path, 'echo no such format >&2; exit 5')), tmp_path)


# Changes

ALTERED = {
    # One field of what it says
    'info': ('[ "$1" = info ] || exec "$QEMU_IMG" "$@"\n'
             '"$QEMU_IMG" "$@" | sed s/65536/131072/',
             'info qcow2', '@@ cluster-size @@\n-65536\n+131072'),
    # A field less
    'check': ('[ "$1" = check ] || exec "$QEMU_IMG" "$@"\n'
              '"$QEMU_IMG" "$@" | sed /total-clusters/d',
              'check qcow2', '@@ total-clusters @@\n-128\n+absent'),
    # One byte that a guest sees
    'convert': ('"$QEMU_IMG" "$@" || exit\n'
                '[ "$1 $2 $3" = "convert -O raw" ] || exit 0\n'
                'for last; do :; done\n'
                'printf X | dd of="$last" bs=1 seek=70000 conv=notrunc '
                'status=none',
                'convert qcow2-zlib', '@@ all @@\n-"'),
    # One byte of an image that it writes
    'cross': ('for last; do :; done\n'
              'case "$*" in\n'
              '"convert -f raw"*)\n'
              '  "$QEMU_IMG" "$@" || exit\n'
              '  printf X | dd of="$last" bs=1 seek=70000 conv=notrunc '
              'status=none;;\n'
              '*) exec "$QEMU_IMG" "$@";;\n'
              'esac', 'cross raw', '@@ all @@\n-"'),
    # It succeeds where it should not
    'exit': ('"$QEMU_IMG" "$@"; exit 0',
             'convert broken-feature', '+"nothing was written"'),
}


@pytest.mark.parametrize('name', ALTERED)
def test_altered_program_is_caught(images: Images, tmp_path: Path,
                                   monkeypatch: pytest.MonkeyPatch,
                                   name: str) -> None:
    '''By the assertion that it is about, with the field.'''
    text, assertion, said = ALTERED[name]
    names = (assertion.split()[1], 'raw')
    for forms in ('FORMATS', 'OTHERS'):
        monkeypatch.setattr(qemu_img, forms, tuple(
            each for each in getattr(qemu_img, forms) if each.name in names))
    # A disk takes its time, too
    monkeypatch.setattr(qemu_img, '_of_disks', lambda *_: {})
    found = images.observe(qemu_img.program(script(tmp_path, text)),
                           tmp_path / 'work')
    verdicts = {verdict.assertion: verdict for verdict, _ in
                qemu_img.judge_all(images.observed, images.observed, found,
                                   ())}
    assert verdicts[assertion].state == 'differs'
    assert said in verdicts[assertion].text
    # Nothing else was altered
    assert verdicts['map raw'].state == 'same'


def test_hanging_program_is_ended(tmp_path: Path) -> None:
    '''With what it started, which holds the output as well.'''
    begin = time.monotonic()
    result = qemu_img.program(script(tmp_path, 'sleep 60 & wait'), 0.3)([])
    assert time.monotonic() - begin < 20
    assert (result.returncode, result.stderr) == (
        124, 'no answer within 0.3 s')


def test_environment_is_plain(tmp_path: Path,
                              monkeypatch: pytest.MonkeyPatch) -> None:
    '''Neither language nor time zone of the user.'''
    monkeypatch.setenv('LC_ALL', 'de_DE.UTF-8')
    monkeypatch.setenv('TZ', 'Asia/Tokyo')
    run = qemu_img.program(script(tmp_path, 'echo "$1 $LC_ALL $TZ"; read a'))
    assert run(['x']).stdout == 'x C UTC\n'


def test_version_is_that_of_the_program(images: Images,
                                        tmp_path: Path) -> None:
    '''And what is no qemu-img has none.'''
    assert str(images.observed.version) in images.run(['--version']).stdout
    with pytest.raises(HostError, match='exit code 1: expected a version'):
        qemu_img.version_of(qemu_img.program(['false']))
    with pytest.raises(HostError, match='No such file'):
        qemu_img.program([str(tmp_path / 'none')])([])


# Judging

def test_own_disks_are_judged_by_the_reference() -> None:
    '''Samples by the recorded baseline; what is missing differs.'''
    own = f'convert {DISK}own-x86_64'
    baseline = Observed(Version(10, 0, 2), {'map raw': 1, 'gone': 1})
    reference = Observed(Version(10, 0, 13), {'map raw': 5, own: 'a'})
    verdicts = {verdict.assertion: verdict for verdict, _ in
                qemu_img.judge_all(baseline, reference, Observed(
                    Version(7, 2, 22), {'map raw': 2, own: 'b', 'new': 1}),
                    ())}
    assert sorted(verdicts) == sorted(['map raw', own, 'gone', 'new'])
    assert {each.state for each in verdicts.values()} == {'differs'}
    assert '7.2.22 differs from 10.0.2\n' in verdicts['map raw'].text
    assert '7.2.22 differs from 10.0.13\n' in verdicts[own].text
    assert verdicts['gone'].text.endswith('-1\n+absent')
    assert verdicts['new'].text.endswith('-absent\n+1')


@pytest.mark.parametrize('assertion, name', [
    ('info qcow2', 'subset'), ('create vdi', 'subset'),
    ('information', 'exact'), ('map info', 'exact'), ('check a', 'exact')])
def test_comparators(assertion: str, name: str) -> None:
    '''New fields are no difference to whoever asks for information.'''
    assert qemu_img.comparator(assertion) == name
    assert name in differences.COMPARATORS


# The recorded baseline

def test_recorded_baseline_is_read(images: Images, tmp_path: Path) -> None:
    '''All but what is of our own disks, and in the same order.'''
    path = tmp_path / 'qemu-img.json'
    path.write_text('the old one')
    qemu_img.record(path, images.observed)
    found = qemu_img.load_baseline(path)
    assert found.version == images.observed.version
    assert found.values == {
        name: value for name, value in images.observed.values.items()
        if DISK not in name}
    assert list(found.values) == sorted(found.values)
    text = path.read_text()
    qemu_img.record(path, found)
    assert path.read_text() == text
    assert [path] == list(tmp_path.iterdir())


@pytest.mark.parametrize('text', [
    '', '[]', '{}', '{"version": "10.0.13"}', 'null', '\0',
    '{"version": "ten", "values": {}}', '{"version": 1, "values": {}}',
    '{"version": "10.0.13", "values": 5}'])
def test_damaged_baseline_is_refused(tmp_path: Path, text: str) -> None:
    '''With the file, and what to do.'''
    path = tmp_path / 'qemu-img.json'
    path.write_text(text)
    with pytest.raises(InputError, match='qemu-img.json: not a recorded'):
        qemu_img.load_baseline(path)
    with pytest.raises(InputError, match='record it anew'):
        qemu_img.load_baseline(tmp_path / 'none')


def test_baseline_of_the_tree(pattern: str) -> None:
    '''It is small, is of all formats, and has no wrong bytes in it.'''
    assert BASELINE.stat().st_size < 150000
    values = qemu_img.load_baseline(BASELINE).values
    wrong = [name for name, value in values.items()
             if name.startswith(('round-trip ', 'cross '))
             and value != pattern]
    assert not wrong
    names = {name.split()[1] for name in values}
    assert {'luks', 'qcow2-zstd', 'vhdx', 'vpc-fixed', *FORMATS,
            *(each.name for each in qemu_img.OTHERS)} <= names
    assert '/tmp' not in BASELINE.read_text()


def test_declared_differences_are_about_something() -> None:
    '''Each of qemu-img's matches an assertion of the baseline.'''
    names = list(qemu_img.load_baseline(BASELINE).values)
    for each in differences.load(DECLARED):
        # A functional test has a folder in its name
        assert '/' in each.assertion or any(
            fnmatchcase(name, each.assertion) for name in names), each
