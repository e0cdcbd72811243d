# SPDX-License-Identifier: GPL-2.0-or-later
'''
Why two builds differ: each known cause is put into one of two disks that
are else the same, and must be named, with its place and its mend.
'''

import gzip
import hashlib
import json
import os
from pathlib import Path
import random
import shutil
import struct
import subprocess
import sys
from typing import Any, Dict, List, Tuple

import pytest

from mkosi_build import archives, causes, compare, explain
from mkosi_build.compare import Finding
from mkosi_build.error import InputError
from mkosi_build.reading import CHUNK, Bytes
from mkosi_build.report import Report
from fixtures_builder import Project, ROOT
from fixtures_disk import (EPOCH, FILES, INITRD, UUIDS, Disks, Recipe,
                           flipped, pe)

pytest_plugins = ['fixtures_builder', 'fixtures_disk']

SLOW = pytest.mark.slow

ROOT_FS = 'qcow2 > GPT partition 1 (root-x86-64) > ext4'
ESP = 'qcow2 > GPT partition 2 (esp) > FAT'
UKI = f'{ESP} > /EFI/BOOT/BOOTX64.EFI > PE'
CPIO = f'{UKI} > section .initrd > cpio (zstd)'


def reordered(data: bytes) -> bytes:
    '''@data with its lines turned around.'''
    return b''.join(reversed(data.splitlines(keepends=True)))


def only(before: Path, after: Path) -> explain.Difference:
    '''The one difference that is told of two files.'''
    found = explain.explain(before, after)
    assert len(found) == 1, explain.render(found)
    return found[0]


def gzip_at(data: bytes, time: int) -> bytes:
    '''The gzip @data with another time in its header.'''
    return data[:4] + struct.pack('<I', time) + data[8:]


def files(**changes: bytes) -> Dict[str, Any]:
    '''A change of files, whose slashes are written __.'''
    return {'files': {name.replace('__', '/').replace('_dash', '-'): data
                      for name, data in changes.items()}}


def seed(key: str, place: str, before: str, after: str,
         **changes: Any) -> Any:
    '''A cause, what is told of it, and the change that puts it there.'''
    return pytest.param(key, place, before, after, changes,
                        id=f'{key}-{len(changes)}{sorted(changes)[0]}')


# In the order of the manual's table
SEEDS = [
    seed('account-order', f'{ROOT_FS} > /etc/passwd', 'line 1: root',
         'line 1: sys', **files(etc__passwd=reordered(FILES['etc/passwd']))),
    seed('root-password', f'{ROOT_FS} > /etc/shadow', 'line 1: root:$6$aaaa',
         'line 1: root:$6$cccc', **files(
             etc__shadow=FILES['etc/shadow'].replace(b'aaaa', b'cccc'))),
    seed('shadow-day', f'{ROOT_FS} > /etc/shadow', '20000', '20001', **files(
        etc__shadow=FILES['etc/shadow'].replace(b'20000', b'20001'))),
    seed('account-backup', f'{ROOT_FS} > /etc/passwd-', 'missing', 'file',
         **files(etc__passwd_dash=b'root\n')),
    seed('machine-id', f'{ROOT_FS} > /etc/machine-id', 'nothing',
         'line 1: 0123456789', **{'files': {
             'etc/machine-id': b'0123456789abcdef0123456789abcdef\n'}}),
    seed('aux-cache', f'{ROOT_FS} > /var/cache/ldconfig/aux-cache', 'at 22',
         'at 22', **{'files': {'var/cache/ldconfig/aux-cache': flipped(
             FILES['var/cache/ldconfig/aux-cache'], 22)}}),
    seed('log', f'{ROOT_FS} > /var/log/alternatives.log', 'missing', 'file',
         **{'files': {'var/log/alternatives.log': b'update\n'}}),
    seed('timestamp', f'{ROOT_FS} > /etc/issue', '07:55:41', '09:12:01',
         **files(etc__issue=FILES['etc/issue'].replace(
             b'07:55:41', b'09:12:01'))),
    seed('random-name', f'{ROOT_FS} > /var/lib/thing/tmp.k02PmR',
         '/var/lib/thing/tmp.k02PmR', '/var/lib/thing/tmp.Zq81Xa',
         **{'files': {'var/lib/thing/tmp.k02PmR': None,
                      'var/lib/thing/tmp.Zq81Xa': b'x'}}),
    seed('line-order', f'{ROOT_FS} > /etc/modules.list', 'line 1: virtio_blk',
         'line 1: virtio_net', **{'files': {
             'etc/modules.list': reordered(FILES['etc/modules.list'])}}),
    seed('build-path', f'{ROOT_FS} > /etc/build.conf', 'path=/home/one',
         'path=/srv', **{'files': {
             'etc/build.conf': b'[build]\npath=/srv/a/longer/path\n'}}),
    seed('byte-code', f'{ROOT_FS} > /usr/bin/__pycache__', 'missing',
         'folder', **{'files': {'usr/bin/__pycache__/a.pyc': b'\xcb\r\r\n'}}),
    seed('gzip-header',
         f'{ROOT_FS} > /usr/share/doc/changelog.gz > gzip', '0',
         f'{EPOCH}', **{'files': {'usr/share/doc/changelog.gz': gzip_at(
             FILES['usr/share/doc/changelog.gz'], EPOCH)}}),
    seed('mtime', f'{ROOT_FS} > /usr/bin/tool', f'{EPOCH}.', f'{EPOCH - 9}.',
         times={'usr/bin/tool': EPOCH - 9}),
    seed('mode', f'{ROOT_FS} > /usr/bin/tool', '0644', '0600',
         modes={'usr/bin/tool': 0o600}),
    seed('owner', f'{ROOT_FS} > /usr/bin/tool', '1000', '42',
         debugfs=('sif /usr/bin/tool gid 42',)),
    seed('xattr', f'{ROOT_FS} > /etc/issue', 'none', 'user.a=1',
         debugfs=('ea_set /etc/issue user.a 1',)),
    seed('ext4-hash-seed', ROOT_FS, '5b1c1e2e', '20000000',
         hash_seed=UUIDS[1]),
    seed('ext4-time', ROOT_FS, f'{EPOCH} s', f'{EPOCH + 9} s',
         mkfs_epoch=EPOCH + 9),
    seed('ext4-char', ROOT_FS, '1', '2',
         debugfs=('set_super_value flags 2',)),
    seed('ext4-written', ROOT_FS, '1', '99',
         debugfs=('set_super_value kbytes_written 99',)),
    seed('uuid', ROOT_FS, UUIDS[0].replace('-', ''),
         UUIDS[1].replace('-', ''), uuid=UUIDS[1]),
    seed('uuid', 'qcow2 > GPT', UUIDS[1], UUIDS[4], disk_guid=UUIDS[4]),
    seed('uuid', 'qcow2 > GPT partition 1 (root-x86-64)', UUIDS[2], UUIDS[4],
         root_guid=UUIDS[4]),
    seed('uuid', ESP, f'{0x12345678}', f'{0x87654321}',
         volume_id='87654321'),
    seed('fat-time', f'{ESP} > /EFI', '2023-11-14', '2023-11-15',
         esp_epoch=EPOCH + 86400),
    seed('readdir-order', f'{ESP} > /', 'EFI, ', 'loader.conf, ',
         esp_files=('loader.conf', 'EFI')),
    seed('cpio-order', f'{CPIO} > /', 'init, bin', 'bin, sh',
         initrd=('bin', 'bin/sh', 'etc', 'etc/fstab', 'init')),
    seed('cpio-inode', f'{CPIO} > /init', '0', '', cpio='cpio'),
    seed('mtime', f'{CPIO} > /bin/sh', f'{EPOCH}', f'{EPOCH - 7}',
         initrd_times={'bin/sh': EPOCH - 7}),
    seed('compressor', f'{CPIO}', 'the same data', 'compressed',
         zstd='zstd -q -1 --single-thread'),
    seed('pe-time', UKI, '0', f'{EPOCH}', pe_time=EPOCH),
    seed('qcow2', 'qcow2', 'guest offset', 'guest offset', qemu_img=''),
]


@SLOW
@pytest.mark.parametrize('key, place, before, after, changes', SEEDS)
def test_cause(key: str, place: str, before: str, after: str,
               changes: Dict[str, Any], good: Path, disks: Disks,
               request: pytest.FixtureRequest) -> None:
    '''Of a disk with one cause, that cause is told, and no other.'''
    name = request.node.name.replace('/', '_')
    other = disks.make(name, Recipe().but(**changes))
    try:
        found = explain.explain(good / 'disk.qcow2', other / 'disk.qcow2',
                                disks.tree)
    finally:
        shutil.rmtree(other)
    assert {item.cause.key if item.cause else item.place + item.aspect
            for item in found} == {key}, explain.render(found)
    first = found[0]
    assert first.place == place
    assert before in first.before and after in first.after
    mends = {cause.key: cause.mend for cause, _ in causes.RULES}
    text = str(first)
    assert f'mend    {mends[key]}' in text and f'({key})' in text
    assert len(text.splitlines()) == 5


@SLOW
def test_initrd(good: Path, disks: Disks) -> None:
    '''The initrd, as a file of its own, is explained like that in the UKI.'''
    other = disks.make('initrd-alone', Recipe(initrd_times={'init': 1}))
    found = explain.explain(good / 'initrd.cpio.zst',
                            other / 'initrd.cpio.zst', disks.tree)
    assert [(d.place, d.aspect, d.before, d.after, d.cause and d.cause.key)
            for d in found] == [('cpio (zstd) > /init', 'mtime', f'{EPOCH}',
                                 '1', 'mtime')]


@SLOW
def test_xattr_order(disks: Disks) -> None:
    '''The same attributes, set in another order.'''
    sets = ('ea_set /etc/issue user.a 1', 'ea_set /etc/issue user.b 2')
    folders = [disks.make(f'attributes{n}', Recipe(debugfs=order))
               for n, order in enumerate((sets, sets[::-1]))]
    found = explain.explain(folders[0] / 'disk.qcow2',
                            folders[1] / 'disk.qcow2', disks.tree)
    assert [(d.place, d.before, d.after, d.cause and d.cause.key)
            for d in found] == [(f'{ROOT_FS} > /etc/issue', 'user.a, user.b',
                                 'user.b, user.a', 'xattr-order')]


@SLOW
def test_several(good: Path, disks: Disks) -> None:
    '''Each of several causes is told once, with how often it occurs.'''
    other = disks.make('several', Recipe().but(
        hash_seed=UUIDS[3], pe_time=7,
        times={'usr/bin/tool': 5, 'etc/issue': 5},
        files={'var/log/a.log': b'a', 'var/log/b.log': b'b',
               'var/lib/thing/state': b'all is lost\n'}))
    found = explain.explain(good / 'disk.qcow2', other / 'disk.qcow2',
                            disks.tree)
    # Of both files, mke2fs keeps two times
    assert sorted((d.cause.key if d.cause else '', d.count)
                  for d in found) == [
        ('', 1), ('ext4-hash-seed', 1), ('log', 2), ('mtime', 4),
        ('pe-time', 1)], explain.render(found)
    unknown = next(d for d in found if d.cause is None)
    assert unknown.path == '/var/lib/thing/state'
    assert 'cause   not one of the known ones' in str(unknown)


def test_same(tmp_path: Path) -> None:
    '''Nothing is told of files that are the same.'''
    path = tmp_path / 'a'
    path.write_bytes(b'x' * 100000)
    assert not explain.explain(path, path)
    assert explain.render([]) == 'no difference'


@pytest.mark.parametrize('before, after, expected', [
    (b'', b'x\n', ('nothing', 'line 1: x')),
    (b'a\nb\n', b'a\n', ('line 2: b', 'the end')),
    (b'\0' * 70000 + b'a', b'\0' * 70000 + b'b', ('at 70000: 61',
                                                  'at 70000: 62')),
    (b'\0ab', b'\0a', ('at 2: 62', 'the end, at 2')),
    (b'a' * 500, b'a' * 400, (f'line 1: {"a" * 97}...',) * 2),
    ('\xe4'.encode() * 3, '\xe4'.encode() * 2 + b'\xc3\xa5',
     ('line 1: \xe4\xe4\xe4', 'line 1: \xe4\xe4\xe5')),
])
def test_excerpts(before: bytes, after: bytes, expected: Tuple[str, str],
                  tmp_path: Path) -> None:
    '''Both sides are shown from where they differ, short.'''
    paths = tmp_path / 'a', tmp_path / 'b'
    paths[0].write_bytes(before)
    paths[1].write_bytes(after)
    found = only(*paths)
    assert (found.before, found.after) == expected
    assert found.place == '' and str(found).startswith('content: content')


# The remaining causes, each by what a difference of it is like
@pytest.mark.parametrize('key, layers, path, aspect, data', [
    ('btrfs', ('qcow2', 'GPT partition 1', 'btrfs'), '', 'content', None),
    ('readdir-order', ('erofs',), '', 'content', None),
    ('readdir-order', ('squashfs',), '', 'content', None),
    ('uuid', ('erofs',), '', 'UUID', None),
    ('mtime', ('erofs',), '', 'build time', None),
    ('package-state', ('ext4',), '/var/lib/apt/lists/x', 'presence', None),
    ('package-state', ('ext4',), '/var/lib/dpkg/status-old', 'content', None),
    ('package-state', ('ext4',), '/var/cache/debconf/config.dat', 'content',
     None),
    ('package-state', ('ext4',), '/var/lib/ucf/hashfile', 'presence', None),
    ('rpm-state', ('ext4',), '/usr/lib/sysimage/rpm/rpmdb.sqlite', 'content',
     None),
    ('rpm-state', ('ext4',), '/var/lib/dnf/history.sqlite', 'presence', None),
    ('cache', ('ext4',), '/var/cache/man/index.db', 'content', None),
    ('log', ('ext4', '/var/log/installer.gz', 'gzip'), '', 'content', None),
    ('generated', ('ext4',), '/etc/pki/ca-trust/extracted/java/cacerts',
     'content', None),
    ('generated', ('ext4',), '/etc/authselect/system-auth', 'content', None),
    ('generated', ('ext4',), '/etc/selinux/targeted/policy/policy.33',
     'content', None),
    ('secret', ('ext4',), '/etc/ssh/ssh_host_rsa_key', 'content', None),
    ('secret', ('ext4',), '/var/lib/systemd/random-seed', 'content', None),
    ('repository', ('ext4',), '/srv/repo/repodata/primary.xml', 'name',
     None),
    ('gzip-header', ('cpio (gzip)',), '', 'time', None),
    ('timestamp', ('ext4',), '/etc/x', 'content',
     (b'# Mon Sep 14 07:55:41 UTC 2026\n', b'# Tue Oct  6 10:00:00 CEST 2026'
      b'\n')),
    ('timestamp', ('ext4',), '/etc/x', 'content',
     (b'stamp=1789199741\n', b'stamp=1789299741\n')),
    (None, ('ext4',), '/etc/x', 'content', (b'port=22\n', b'port=23\n')),
    (None, ('ext4',), '/etc/x', 'content', (b'\0\1', b'\1\0')),
    (None, ('ext4',), '/usr/lib/new', 'presence', None),
    (None, ('qcow2',), '', 'size', None),
])
def test_match(key: str, layers: Tuple[str, ...], path: str, aspect: str,
               data: Any) -> None:
    '''A difference is known by its place, or by how the content differs.'''
    cause = causes.match(Finding(layers, path, aspect, '', '', data))
    assert (cause and cause.key) == key


def test_every_cause_is_tried() -> None:
    '''No cause is without a test, and no two have one key.'''
    keys = [cause.key for cause, _ in causes.RULES]
    assert len(set(keys)) == len(keys)
    here = Path(__file__).read_text('utf-8')
    assert [key for key in keys if f"'{key}'" not in here] == []
    for cause, _ in causes.RULES:
        assert cause.title and cause.mend and '\n' not in cause.mend


def test_broken_layer(tmp_path: Path) -> None:
    '''What can't be read as what it looks like is compared as bytes.'''
    paths = tmp_path / 'a', tmp_path / 'b'
    paths[0].write_bytes(b'\x1f\x8b' + b'a' * 50)
    paths[1].write_bytes(b'\x1f\x8b' + b'b' * 50)
    found = only(*paths)
    assert 'not read as gzip' in found.note and found.note in str(found)
    assert found.before == 'line 1: \x1f\ufffd' + 'a' * 50 or (
        found.before.startswith('at 2: 61'))


def test_not_a_file(tmp_path: Path) -> None:
    '''Two files are compared, nothing else.'''
    path = tmp_path / 'a'
    path.touch()
    with pytest.raises(InputError, match='found none') as error:
        explain.explain(path, tmp_path / 'b')
    assert error.value.next_step
    with pytest.raises(InputError, match='found a folder'):
        explain.explain(tmp_path, path)


def test_json(tmp_path: Path) -> None:
    '''The same for a program, by the module's own command.'''
    paths = [tmp_path / 'a.gz', tmp_path / 'b.gz']
    for time, path in enumerate(paths):
        path.write_bytes(gzip_at(gzip.compress(b'x', mtime=0), time))

    def run(*arguments: str) -> 'subprocess.CompletedProcess[str]':
        return subprocess.run(
            [sys.executable, '-m', 'mkosi_build.explain', *arguments],
            env={**os.environ, 'PYTHONPATH': str(ROOT / 'scripts')},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            encoding='utf-8', check=False)

    result = run('--json', *map(str, paths))
    assert result.returncode == 1
    told, = json.loads(result.stdout)
    assert told['layers'] == ['gzip'] and told['aspect'] == 'time'
    assert told['cause']['key'] == 'gzip-header'
    assert told['cause']['mend'] == 'gzip -n'
    assert (told['before'], told['after']) == ('0', '1')
    result = run(str(paths[0]), str(paths[0]))
    assert (result.returncode, result.stdout) == (0, 'no difference\n')
    result = run(str(paths[0]), str(tmp_path / 'none'))
    assert result.returncode == 3 and '\n  next: ' in result.stderr


def test_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    '''An explanation is an event; one that fails is no error of its own.'''
    paths = tmp_path / 'a', tmp_path / 'b'
    paths[0].write_bytes(b'1')
    paths[1].write_bytes(b'2')
    explain.tell(Report(as_json=True), 'mini: disk', *paths)
    event = json.loads(capsys.readouterr().out)
    assert event['event'] == 'explained' and event['title'] == 'mini: disk'
    assert event['differences'][0]['cause'] is None
    assert not explain.tell(Report(as_json=True), 'x', paths[0],
                            tmp_path / 'c')
    assert json.loads(capsys.readouterr().out)['event'] == 'warning'


def test_diffoscope(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    '''Where it is installed it has the last word, but within bounds.'''
    program = tmp_path / 'bin/diffoscope'
    program.parent.mkdir()
    monkeypatch.setenv('PATH', f'{program.parent}:{os.environ["PATH"]}')
    monkeypatch.setattr(explain, '_DIFFOSCOPE_TIME', 2)
    paths = tmp_path / 'a', tmp_path / 'b'
    paths[0].write_bytes(b'port=1\n')
    paths[1].write_bytes(b'port=2\n')

    def says(script: str) -> str:
        program.write_text(f'#!/bin/sh\n{script}\n')
        program.chmod(0o755)
        found = only(*paths)
        return found.detail

    assert says('for f; do last=$f; done; cat "$last"; exit 1') == 'port=2'
    assert len(says('seq 1000; exit 1').splitlines()) == 31
    assert says('echo broken; exit 2') == ''
    assert says('exec sleep 30') == ''
    monkeypatch.setattr(explain, '_DIFFOSCOPE_SIZE', 3)
    assert says('echo never; exit 1') == ''


@pytest.mark.skipif(not shutil.which('diffoscope'),
                    reason='needs diffoscope')
def test_real_diffoscope(tmp_path: Path) -> None:
    '''What it says, and nothing of the folders that we made for it.'''
    paths = tmp_path / 'a', tmp_path / 'b'
    paths[0].write_bytes(b'port=1\n')
    paths[1].write_bytes(b'port=2\n')
    detail = only(*paths).detail
    assert '\n-port=1\n+port=2' in detail


def test_many_are_cut() -> None:
    '''A person reads the first twenty.'''
    many = [explain.Difference((), f'/{n}', 'content', 'a', 'b')
            for n in range(50)]
    assert explain.render(many).endswith('\nand 30 more differences')


@SLOW
def test_nested(tmp_path: Path, disks: Disks) -> None:
    '''cpio in a row, the last one compressed; ar; a kernel with a stub.'''
    packed: List[bytes] = []
    for name in ('one', 'two'):
        folder = disks.make(f'nested-{name}', Recipe(initrd=('init',)))
        packed.append((folder / 'initrd.cpio').read_bytes())
    early = packed[0].replace(b'init', b'inix')
    paths = tmp_path / 'a', tmp_path / 'b'
    paths[0].write_bytes(early + gzip.compress(packed[0], mtime=0))
    changed = packed[0].replace(INITRD['init'], b'#!/bin/no\n')
    paths[1].write_bytes(early + gzip.compress(changed, mtime=0))
    found = only(*paths)
    assert found.place == 'cpio (gzip) > /init'
    assert (found.before, found.after) == ('line 1: #!/bin/sh',
                                           'line 1: #!/bin/no')
    for path, data in zip(paths, (b'1', b'2')):
        path.write_bytes(b'!<arch>\n' + b'control/        0           0     0'
                         b'     100644  1         `\n' + data + b'\n')
    found = only(*paths)
    assert found.place == 'ar > /control'
    for path, data in zip(paths, (b'\xf4', b'\xf5')):
        path.write_bytes(pe({'.text': data * 99}))
    found = only(*paths)
    assert found.place == 'PE > section .text'


@SLOW
def test_any_byte(good: Path, disks: Disks, tmp_path: Path) -> None:
    '''
    Whatever bytes a disk or an initrd has, what differs is told. Seeded, so
    that a failure can be had again.
    '''
    numbers = random.Random(7)
    for name, starts, rounds in (
            ('disk.raw', (0, 512, 1024, 1 << 20, 9 << 20), 25),
            ('disk.qcow2', (0,), 40), ('initrd.cpio.zst', (0,), 20),
            ('EFI/BOOT/BOOTX64.EFI', (0,), 60)):
        before = good / name
        after = tmp_path / 'after'
        shutil.copyfile(before, after)
        size = before.stat().st_size
        data = before.read_bytes()
        for _ in range(rounds):
            places = [min(size - 1, start + numbers.randrange(6000))
                      for start in numbers.choices(starts, k=6)]
            with open(after, 'r+b') as file:
                for offset in places:
                    file.seek(offset)
                    file.write(bytes([data[offset] ^ numbers.randrange(
                        1, 256)]))
            assert explain.explain(before, after, disks.tree), places
            with open(after, 'r+b') as file:
                for offset in places:
                    file.seek(offset)
                    file.write(data[offset:offset + 1])


@SLOW
def test_mismatch(template: Project, project: Project) -> None:
    '''
    A build with other bytes than recorded tells what differs, if QEMU's
    asset cache has those.
    '''
    # To the made-up image, a cpio archive is its disk
    path, = [p for p in template.artefacts() if p.name == 'disk.qcow2']
    data = path.read_bytes()
    assert archives.segments(data)[0].order
    head = data.index(archives.CPIO, 1)
    recorded = data[:head + 46] + b'00000001' + data[head + 54:]
    digest = hashlib.sha256(recorded).hexdigest()
    right = hashlib.sha256(data).hexdigest()
    asset = project.assets / 'download' / digest
    asset.parent.mkdir(parents=True)
    asset.write_bytes(recorded)
    project.edit(project.registry, right, digest)
    said = project.bad(7)
    assert 'mini-x86_64: disk.qcow2 (disk): what differs between' in said
    assert 'cpio > /' in said and ': mtime\n' in said
    assert '        before  1\n' in said
    mends = {cause.key: cause.mend for cause, _ in causes.RULES}
    assert f'mend    {mends["mtime"]}' in said
    # A file that is not what its name says explains nothing
    asset.write_bytes(recorded[:-1])
    assert 'what differs' not in project.run().stderr


def test_pe_checksum_follows(tmp_path: Path) -> None:
    '''A checksum is told only where nothing else differs.'''
    paths = tmp_path / 'a', tmp_path / 'b'
    plain = pe({'.text': b'x'}, time=1)
    at = 64 + 24 + 64
    paths[0].write_bytes(plain)
    paths[1].write_bytes(plain[:at] + struct.pack('<I', 7) + plain[at + 4:])
    assert [d.aspect for d in explain.explain(*paths)] == ['checksum']
    other = pe({'.text': b'x'}, time=2)
    paths[1].write_bytes(other[:at] + struct.pack('<I', 7) + other[at + 4:])
    assert [d.aspect for d in explain.explain(*paths)] == ['time']


def test_first_difference() -> None:
    '''The first byte that differs, wherever it is.'''
    for size in (1, 2, 3, 100, CHUNK, CHUNK + 1):
        data = bytes(size)
        assert compare.first_difference(Bytes(data), Bytes(data)) is None
        assert compare.first_difference(Bytes(data),
                                        Bytes(data + b'x')) == size
        for at in (0, size // 2, size - 1):
            assert compare.first_difference(
                Bytes(data), Bytes(flipped(data, at))) == at
