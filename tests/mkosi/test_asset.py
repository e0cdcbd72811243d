# SPDX-License-Identifier: GPL-2.0-or-later
'''Tests of MkosiAsset in QEMU's own framework.'''

from concurrent.futures import ThreadPoolExecutor
import hashlib
import os
from pathlib import Path
import shutil
import subprocess
import time
from typing import Any, Dict, List, Sequence

import pytest

from conftest import Answer, Server
from fixtures_asset import (BUILDER, BUILT, FILES, HASHES, OTHER, TEST,
                            UNBUILT, Bench, failed, passed, skipped)

pytest_plugins = ['fixtures_asset']

NOBODY = 65534


# -- In the cache -----------------------------------------------------------

def test_hit(bench: Bench) -> None:
    '''Passes, and tells the cleaner that the files are in use.'''
    bench.fill()
    output = bench.test()
    assert passed(output), output
    for kind in FILES:
        stamp = bench.path(kind).with_suffix('.stamp').read_text('ascii')
        assert abs(int(stamp) - time.time()) < 60


def test_part(bench: Bench) -> None:
    '''The initrd comes with its kernel and without the disk.'''
    bench.fill()
    bench.path('disk').unlink()
    output = bench.test(declaration="'tiny', part='initrd'")
    assert passed(output), output
    bench.path('kernel').unlink()
    assert 'kernel is not in the cache' in skipped(
        bench.test(declaration="'tiny', part='initrd'"))


def test_attributes(bench: Bench) -> None:
    '''What Asset has, MkosiAsset has, and without a look at the cache.'''
    result = bench.script('''
from qemu_test import Asset
class Test(QemuBaseTest):
    ASSET_IMAGE = MkosiAsset('tiny')
image = Test.ASSET_IMAGE
print(json.dumps({
    'isinstance': [isinstance(a, Asset)
                   for a in (image, image.kernel, image.initrd)],
    'url': [a.url for a in (image, image.kernel, image.initrd)],
    'hash': image.initrd.hash, 'str': str(image.kernel),
    'cache_dir': str(image.cache_dir), 'repr': repr(image),
    'cache_file': str(image.cache_file), 'log': image.log.name,
    'arch': image.arch, 'ready': image.boot.ready,
    'valid': image.valid()}))
''')
    assert result == {
        'isinstance': [True] * 3,
        'url': ['mkosi:tiny/x86_64/disk.qcow2', 'mkosi:tiny/x86_64/vmlinuz',
                'mkosi:tiny/x86_64/initrd.cpio.zst'],
        'hash': HASHES['initrd'], 'str': str(bench.path('kernel')),
        'cache_dir': str(bench.cache), 'log': 'qemu-test',
        'repr': 'MkosiAsset: url=mkosi:tiny/x86_64/disk.qcow2 '
                f'cache_dir={bench.cache}',
        'cache_file': str(bench.path('disk')), 'arch': 'x86_64',
        'ready': 'READY', 'valid': False}


def test_cleaner(bench: Bench, qemu_tree: Path) -> None:
    '''scripts/clean_functional_cache.py keeps what is used, for a time.'''
    cleaner = qemu_tree / 'scripts/clean_functional_cache.py'
    if not cleaner.exists():
        pytest.skip('QEMU before 10.1 has no cleaner')
    bench.fill()
    assert passed(bench.test())
    bench.python(cleaner)
    assert all(bench.path(kind).exists() for kind in FILES)
    for kind in FILES:
        bench.path(kind).with_suffix('.stamp').write_text('1', 'ascii')
    result = bench.python(cleaner)
    assert result.returncode == 0, result.stdout
    assert not any(bench.path(kind).exists() for kind in FILES)
    # What it leaves behind does no harm
    bench.fill()
    assert passed(bench.test())


# -- Not in the cache -------------------------------------------------------

def test_miss(bench: Bench) -> None:
    '''A skip that says what to run.'''
    reason = skipped(bench.test())
    assert 'mkosi:tiny/x86_64/disk.qcow2: kernel is not in the cache' in reason
    assert 'run scripts/mkosi-build.py x86_64 tiny, or set ' \
           'QEMU_TEST_BUILD_IMAGES=1' in reason


def test_not_built_yet(bench: Bench) -> None:
    '''Nothing to be had even if building is allowed.'''
    bench.registry.write_text(UNBUILT, 'utf-8')
    bench.builder()
    reason = skipped(bench.test(QEMU_TEST_BUILD_IMAGES='1'))
    assert 'not built yet' in reason
    assert 'run scripts/mkosi-build.py x86_64 tiny --update' in reason
    assert not bench.builds.exists()


NOT_LOCKED = UNBUILT.replace('x86_64:\n', '''x86_64:
        not-locked: >-
          no mirror here; scripts/mkosi-build.py x86_64 tiny
          --update-lock --update does it
''')


@pytest.mark.parametrize('env', [
    {}, {'QEMU_TEST_BUILD_IMAGES': '1'}, {'QEMU_TEST_NO_DOWNLOAD': '1'}])
def test_not_locked(bench: Bench, env: Dict[str, str]) -> None:
    '''The registry's reason and command are the skip's, whatever is set.'''
    bench.registry.write_text(NOT_LOCKED, 'utf-8')
    bench.builder()
    assert ('mkosi:tiny/x86_64/disk.qcow2: cannot be built yet: no mirror '
            'here; scripts/mkosi-build.py x86_64 tiny --update-lock --update '
            'does it') == skipped(bench.test(**env))
    result = bench.precache(**env)
    assert result.returncode == 0, result.stdout
    assert 'no mirror here' in result.stdout
    assert not bench.builds.exists()


def test_not_locked_but_built_here(bench: Bench) -> None:
    '''An override has the hashes that the registry lacks.'''
    bench.registry.write_text(NOT_LOCKED, 'utf-8')
    path = str(bench.override())
    assert 'kernel is not in the cache' in skipped(
        bench.test(QEMU_TEST_MKOSI_OVERRIDE=path))
    bench.fill_override()
    output = bench.test(QEMU_TEST_MKOSI_OVERRIDE=path)
    assert passed(output), output


def test_without_yaml(bench: Bench) -> None:
    '''A skip, and no failure to import qemu_test.'''
    bench.fill()
    path = bench.write("import sys; sys.modules['yaml'] = None\n"
                       + TEST.format(declaration="'tiny'"))
    reason = skipped(bench.python(path).stdout)
    assert 'PyYAML' in reason and 'install' in reason


@pytest.mark.parametrize('size, found', [
    (0, f'expected {HASHES["initrd"]}'), (1, 'expected 14000')])
def test_damaged(bench: Bench, size: int, found: str) -> None:
    '''What was found, and what should be there.'''
    bench.fill()
    data = bytes(len(FILES['initrd']) + size)
    bench.path('initrd').write_bytes(data)
    reason = skipped(bench.test(QEMU_TEST_NO_DOWNLOAD='1'))
    assert 'initrd has' in reason and found in reason
    assert (str(len(data)) if size else
            hashlib.sha256(data).hexdigest()) in reason


@pytest.mark.parametrize('declaration, message', [
    ("'tinny'", "unknown image 'tinny', did you mean 'tiny'?"),
    ("'tiny', arch='aarch64'", "In image 'tiny': no architecture 'aarch64', "
     'there are: x86_64'),
    ("'tiny', part='disc'", "unknown part 'disc', expected one of: kernel"),
])
def test_wrong(bench: Bench, declaration: str, message: str) -> None:
    '''A wrong declaration fails the test, and precaching.'''
    bench.fill()
    assert message in failed(bench.test(declaration=declaration))
    result = bench.precache(declaration)
    assert result.returncode != 0
    assert message in result.stdout


def test_wrong_registry(bench: Bench) -> None:
    '''A wrong registry is no reason to skip.'''
    bench.registry.write_text(BUILT.replace('release:', 'relaese:'), 'utf-8')
    assert ("registry.yaml:8: In image 'tiny': unknown key 'relaese', did "
            "you mean 'release'?") in failed(bench.test())
    bench.registry.unlink()
    assert 'registry.yaml: cannot be read' in failed(bench.test())


# -- Precaching -------------------------------------------------------------

def test_precache(bench: Bench) -> None:
    '''Without QEMU_TEST_QEMU_BINARY, as ninja has it.'''
    bench.fill()
    result = bench.precache()
    assert result.returncode == 0, result.stdout
    assert bench.path('disk').with_suffix('.stamp').exists()


def test_precache_miss(bench: Bench) -> None:
    '''What is not there does not fail the target.'''
    result = bench.precache()
    assert result.returncode == 0, result.stdout
    assert 'skipping asset precache' in result.stdout
    assert 'run scripts/mkosi-build.py x86_64 tiny' in result.stdout


def test_precache_generic(bench: Bench) -> None:
    '''A test for all architectures is precached for none.'''
    bench.fill()
    result = bench.precache(name='generic/test_it.py')
    assert result.returncode == 0, result.stdout
    assert 'declare the image with arch=' in result.stdout


def test_precache_sees_registry(bench: Bench) -> None:
    '''Another hash in the registry is another file.'''
    bench.fill()
    assert 'skipping' not in bench.precache().stdout
    bench.registry.write_text(BUILT.replace(HASHES['disk'], OTHER), 'utf-8')
    assert 'disk is not in the cache' in bench.precache().stdout


# -- Stores -----------------------------------------------------------------

def serve(server: Server, folder: str = '') -> None:
    '''Have the server offer the image.'''
    for kind, data in FILES.items():
        server.paths[f'{folder}/{HASHES[kind]}'] = Answer(data)


def test_download(bench: Bench, server: Server) -> None:
    '''What is not in the cache comes from the store, and only that.'''
    serve(server)
    bench.stores(server.url)
    bench.fill()
    bench.path('initrd').unlink()
    output = bench.test()
    assert passed(output), output
    assert server.asked == [f'/{HASHES["initrd"]}']
    assert bench.path('initrd').stat().st_mode & 0o777 == 0o440


def test_download_replaces_damaged(bench: Bench, server: Server) -> None:
    '''A bad file in the cache is no obstacle.'''
    serve(server)
    bench.stores(server.url)
    bench.path('disk').write_bytes(b'x' * len(FILES['disk']))
    output = bench.test()
    assert passed(output), output
    assert bench.path('disk').read_bytes() == FILES['disk']


def test_no_download(bench: Bench, server: Server) -> None:
    '''QEMU_TEST_NO_DOWNLOAD keeps us from the store.'''
    serve(server)
    bench.stores(server.url)
    assert 'is not in the cache' in skipped(
        bench.test(QEMU_TEST_NO_DOWNLOAD='1'))
    assert not server.asked


def test_wrong_bytes(bench: Bench, server: Server) -> None:
    '''Both hashes are shown, the bytes are not kept; the next store helps.'''
    serve(server)
    data = b'x' * len(FILES['kernel'])
    bad = Answer(data)
    server.paths[f'/bad/{HASHES["kernel"]}'] = bad
    bench.stores(f'{server.url}/bad')
    output = failed(bench.test())
    assert (f'{server.url}/bad/{HASHES["kernel"]}: expected SHA-256 '
            f'{HASHES["kernel"]}, found {hashlib.sha256(data).hexdigest()}'
            ) in output
    assert not list(bench.cache.iterdir())

    bench.stores(f'{server.url}/bad', server.url)
    output = bench.test()
    assert passed(output), output


def test_missing_in_store(bench: Bench, server: Server) -> None:
    '''An error that names the store, or a build where that is allowed.'''
    bench.stores(server.url)
    output = failed(bench.test())
    assert (f'kernel: no store has it: {server.url}/{HASHES["kernel"]}: HTTP '
            'error 404 (Not Found); run scripts/mkosi-build.py x86_64 tiny'
            ) in output
    bench.builder()
    output = bench.test(QEMU_TEST_BUILD_IMAGES='1')
    assert passed(output), output
    assert bench.builds.read_text('utf-8') == 'x86_64 tiny\n' * 3


# -- Building ---------------------------------------------------------------

def test_build_once(bench: Bench) -> None:
    '''Eight tests wait for one build, and no download is mistaken for it.'''
    bench.builder()
    path = bench.write(TEST.format(declaration="'tiny'"))
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(
            lambda n: bench.python(path, QEMU_TEST_BUILD_IMAGES='1',
                                   MESON_BUILD_ROOT=bench.env['HOME'] + n,
                                   QEMU_BUILD_ROOT=bench.env['HOME'] + n),
            map(str, range(8))))
    assert all(passed(result.stdout) for result in results), results
    assert len(bench.builds.read_text('utf-8').splitlines()) == 3


def test_build_in_precache(bench: Bench) -> None:
    '''What the builder says is seen.'''
    bench.builder()
    result = bench.precache(QEMU_TEST_BUILD_IMAGES='1')
    assert result.returncode == 0, result.stdout
    assert f'building {HASHES["kernel"]}' in result.stdout


@pytest.mark.parametrize('code, transient', [
    (4, True), (5, True), (1, False), (3, False), (7, False)])
def test_build_fails(bench: Bench, code: int, transient: bool) -> None:
    '''The builder's last words and its exit code are in the message.

    Only what the host lacks is let pass in precaching.
    '''
    bench.builder(f'print("no space left"); exit({code})')
    result = bench.precache(QEMU_TEST_BUILD_IMAGES='1')
    assert (result.returncode == 0) == transient
    assert f'ended with exit code {code}:\nno space left' in result.stdout


def test_build_of_something_else(bench: Bench) -> None:
    '''A builder that is content with other bytes is not believed.'''
    bench.builder(BUILDER.format(files={'kernel': b'other'}))
    assert 'built, but kernel is not in the cache' in failed(
        bench.test(QEMU_TEST_BUILD_IMAGES='1'))


# -- What was verified once -------------------------------------------------

COUNTED = '''
import hashlib
from qemu_test import mkosi_verified
class Test(QemuBaseTest):
    ASSET_IMAGE = MkosiAsset('tiny')
image = Test.ASSET_IMAGE
real = mkosi_verified.sha256_of
hashed = []
def counted(file):
    hashed.append(file.name)
    return real(file)
mkosi_verified.sha256_of = counted
if 'HASTE' in os.environ:
    mkosi_verified.COARSEST_STAMP_NS = 100_000_000
path = str(image)
def valid():
    hashed.clear()
    return [image.valid(), len(hashed)]
'''


def settle(bench: Bench) -> None:
    '''Fill the cache, and wait until its files are old enough.'''
    bench.env['HASTE'] = 'for file systems with finer time stamps'
    bench.fill()
    time.sleep(0.2)


def test_verified_once(bench: Bench) -> None:
    '''Hashed in the first process only, unless that is demanded.'''
    settle(bench)
    twice = COUNTED + 'print(json.dumps([valid(), valid()]))'
    assert bench.script(twice) == [[True, 3], [True, 0]]
    assert bench.script(twice) == [[True, 0], [True, 0]]
    assert bench.script(twice, QEMU_TEST_REFRESH_CACHE='1') == [[True, 3]] * 2


@pytest.mark.parametrize('change, result', [
    # what: same bytes in another file
    ('os.rename(path, path + "x"); open(path, "wb").write(data); '
     'os.unlink(path + "x")', [True, 1]),
    # other bytes of the same size, with the time stamp set back
    ('os.chmod(path, 0o600); open(path, "r+b").write(b"D"); '
     'os.utime(path, ns=(s.st_atime_ns, s.st_mtime_ns))', [False, 1]),
    # the same in another file with the same time stamp
    ('open(path + "x", "wb").write(data[::-1]); '
     'os.utime(path + "x", ns=(s.st_atime_ns, s.st_mtime_ns)); '
     'os.replace(path + "x", path)', [False, 1]),
    ('os.truncate(path, 5)', [False, 0]),
    ('os.unlink(path)', [False, 0]),
])
def test_change_is_noticed(bench: Bench, change: str,
                           result: List[object]) -> None:
    '''In the process that verified the file, and in the next one.'''
    settle(bench)
    script = COUNTED + f'''
data = open(path, "rb").read()
s = os.stat(path)
before = valid()
if "CHANGE" in os.environ:
    {change}
print(json.dumps([before, valid()]))
'''
    assert bench.script(script, CHANGE='1') == [[True, 3], result]
    if bench.path('disk').exists():
        assert bench.script(script)[0][0] is result[0]


def test_young_file(bench: Bench) -> None:
    '''A file that might change unseen yet is verified again.'''
    bench.fill()
    assert bench.script(COUNTED + 'print(json.dumps([valid(), valid()]))') \
        == [[True, 3], [True, 3]]
    assert not list(bench.cache.glob('*.verified'))


@pytest.mark.parametrize('text', [
    '', '{', '[]', 'null', '{"a": 1}', '[' * 9999, '\xff'])
def test_broken_memory(bench: Bench, text: str) -> None:
    '''Whatever is in it, it is not trusted.'''
    bench.fill()
    bench.path('disk').write_bytes(b'x' * len(FILES['disk']))
    for kind in FILES:
        bench.path(kind).with_suffix('.verified').write_text(text, 'latin-1')
    assert bench.script(COUNTED + 'print(json.dumps(valid()))') == [False, 3]


def test_memory_of_another(bench: Bench) -> None:
    '''What is known of one file says nothing of another.'''
    settle(bench)
    assert bench.script(COUNTED + 'print(json.dumps(valid()))') == [True, 3]
    memory = bench.path('disk').with_suffix('.verified')
    # The very file, but under the name of another hash
    bench.registry.write_text(BUILT.replace(HASHES['disk'], OTHER), 'utf-8')
    bench.path('disk').rename(bench.cache / OTHER)
    memory.rename(bench.cache / f'{OTHER}.verified')
    assert bench.script(COUNTED + 'print(json.dumps(valid()))') == [False, 1]


# -- Caches that cannot be written to ---------------------------------------

def as_nobody(bench: Bench) -> Sequence[str]:
    '''How to run a program whom file modes hold for.'''
    if os.geteuid() != 0:
        return ()
    for path in [bench.tree.parent, *bench.tree.parents]:
        if path.stat().st_uid == os.geteuid() and path != Path('/'):
            path.chmod(path.stat().st_mode | 0o055)
    (bench.tree.parent / 'build').chmod(0o777)
    if not shutil.which('setpriv'):
        pytest.skip('needs setpriv where it runs as root')
    return ('setpriv', f'--reuid={NOBODY}', f'--regid={NOBODY}',
            '--clear-groups')


def test_read_only(bench: Bench, server: Server) -> None:
    '''What is there can be used; for the rest, the error says what to do.'''
    prefix = as_nobody(bench)
    bench.fill()
    bench.cache.chmod(0o555)
    output = bench.test(*prefix)
    assert passed(output), output

    serve(server)
    bench.stores(server.url)
    bench.cache.chmod(0o755)
    bench.path('disk').unlink()
    bench.cache.chmod(0o555)
    output = failed(bench.test(*prefix))
    assert (f'cannot write to the cache {bench.cache}: Permission denied; '
            'mend that, or set QEMU_TEST_CACHE_DIR to another') in output


def test_unreadable(bench: Bench) -> None:
    '''A file that may not be read is as good as none.'''
    prefix = as_nobody(bench)
    bench.fill()
    bench.path('initrd').chmod(0)
    assert 'initrd cannot be read: Permission denied' in skipped(
        bench.test(*prefix))


def test_no_place_for_cache(bench: Bench, server: Server) -> None:
    '''Not even root can make a folder under a file.'''
    serve(server)
    bench.stores(server.url)
    result = bench.precache(QEMU_TEST_CACHE_DIR=str(bench.registry))
    assert result.returncode == 0, result.stdout
    assert 'cannot write to the cache' in result.stdout
    assert 'Not a directory' in result.stdout


def test_full_disk(bench: Bench, server: Server) -> None:
    '''What could not be written whole is not there.'''
    serve(server)
    bench.stores(server.url)
    probe = ('unshare', '--map-root-user', '--mount', 'sh', '-c')
    mount = f'mount -t tmpfs -o size=20k none {bench.cache}'
    if subprocess.run([*probe, mount], check=False,
                      stderr=subprocess.DEVNULL).returncode != 0:
        pytest.skip('may not mount a small file system')
    output = failed(bench.test(
        *probe, f'{mount} && "$@"; code=$?; ls -A {bench.cache}; '
        'exit $code', 'sh'))
    assert 'cannot write to the cache' in output
    assert 'No space left on device; mend that' in output
    left = output.splitlines()[-2:]
    assert HASHES['disk'] not in left
    assert not any(line.endswith(('.part', '.lock')) for line in left)


# -- The override -----------------------------------------------------------

def test_override(bench: Bench) -> None:
    '''Its hashes count, and not the registry's.'''
    path = str(bench.override())
    bench.fill()
    reason = skipped(bench.test(QEMU_TEST_MKOSI_OVERRIDE=path))
    assert 'kernel is not in the cache' in reason
    assert f'(hashes from {path}); run scripts/mkosi-build.py x86_64 tiny ' \
           '--local, or unset QEMU_TEST_MKOSI_OVERRIDE' in reason
    bench.fill_override()
    output = bench.test(QEMU_TEST_MKOSI_OVERRIDE=path)
    assert passed(output), output


def test_override_of_unbuilt(bench: Bench) -> None:
    '''An image can be tried before it is in the registry.'''
    bench.registry.write_text(UNBUILT, 'utf-8')
    path = str(bench.override())
    assert 'is not in the cache' in skipped(
        bench.test(QEMU_TEST_MKOSI_OVERRIDE=path))


@pytest.mark.parametrize('images', [{}, {'tiny': {'aarch64': {}}}])
def test_override_of_others(bench: Bench, images: Dict[str, object]) -> None:
    '''For what is not in it, the registry counts.'''
    bench.fill()
    path = str(bench.override(images=images))
    output = bench.test(QEMU_TEST_MKOSI_OVERRIDE=path)
    assert passed(output), output


@pytest.mark.parametrize('change', [
    {'schema': 2}, {'images': []}, {'images': {'tiny': []}},
    {'images': {'tiny': {'x86_64': {'identity': 'x', 'artefacts': {}}}}},
    {'images': {'tiny': {'x86_64': {'identity': 'x', 'artefacts': {
        'kernel': {'sha256': '../../etc/passwd', 'size': 1}}}}}},
])
def test_bad_override(bench: Bench, change: Dict[str, object]) -> None:
    '''An error that names the file.'''
    path = str(bench.override(**change))
    output = failed(bench.test(QEMU_TEST_MKOSI_OVERRIDE=path))
    assert (f'QEMU_TEST_MKOSI_OVERRIDE={path}: not a file that '
            'scripts/mkosi-build.py --local wrote') in output


def test_no_override_file(bench: Bench) -> None:
    '''A file that is not there is not passed over.'''
    output = failed(bench.test(QEMU_TEST_MKOSI_OVERRIDE='/nowhere/x'))
    assert 'QEMU_TEST_MKOSI_OVERRIDE=/nowhere/x: No such file' in output
    bench.fill()
    assert passed(bench.test(QEMU_TEST_MKOSI_OVERRIDE=''))


# -- The architecture -------------------------------------------------------

ARCH = '''
from qemu_test.asset import AssetError
import types
def declared(file, image, base=QemuBaseTest):
    """An image that a class in this file declares"""
    module = types.ModuleType(file)
    module.__file__ = file
    sys.modules[file] = module
    type('Test', (base,), {'__module__': file, 'ASSET_IMAGE': image})
    return image
def arch(image):
    try:
        return image.arch
    except AssetError as e:
        return [e.msg, e.transient]
image = MkosiAsset('tiny' ARG)
for file in FILES:
    declared(file, image)
print(json.dumps([arch(image), arch(image.kernel)]))
'''


def arch_of(bench: Bench, files: List[str], arg: str = '',
            binary: str = '') -> Any:
    '''The architecture of an image that classes in these files declare.'''
    first, second = bench.script(
        ARCH.replace('FILES', repr(files)).replace(' ARG', arg),
        QEMU_TEST_QEMU_BINARY=binary)
    assert first == second
    return first


@pytest.mark.parametrize('files, arg, binary, arch', [
    (['/q/x86_64/test_a.py'], '', '', 'x86_64'),
    (['/q/aarch64/test_a.py'], '', '', 'aarch64'),
    (['/q/aarch64/test_a.py'], '', 'a/qemu-system-aarch64', 'aarch64'),
    # QEMU 10.0 has no folders
    (['/q/functional/test_x86_64_boot.py'], '', '', 'x86_64'),
    (['/q/functional/test_aarch64_boot.py'], '', '', 'aarch64'),
    # the binary, where the place says nothing
    (['/q/generic/test_a.py'], '', '/b/qemu-system-x86_64', 'x86_64'),
    (['/q/generic/test_a.py'], '', '/b/qemu-system-s390x', 's390x'),
    (['/q/base.py'], '', 'qemu-aarch64', 'aarch64'),
    ([], '', 'qemu-system-x86_64', 'x86_64'),
    # a name that says nothing about the architecture
    (['/q/x86_64/test_a.py'], '', '/usr/bin/my-qemu', 'x86_64'),
    # arch= overrules all
    (['/q/x86_64/test_a.py'], ", arch='aarch64'", 'qemu-system-x86_64',
     'aarch64'),
    (['/q/generic/test_a.py'], ", 'aarch64'", '', 'aarch64'),
])
def test_arch(bench: Bench, files: List[str], arg: str, binary: str,
              arch: str) -> None:
    '''Where the architecture comes from, in order.'''
    assert arch_of(bench, files, arg, binary) == arch


def test_arch_unknown(bench: Bench) -> None:
    '''Nothing says so: not an error in precaching.'''
    message, transient = arch_of(bench, ['/q/generic/test_a.py'])
    assert 'declare the image with arch=' in message
    assert transient


@pytest.mark.parametrize('files, binary', [
    (['/q/x86_64/test_a.py'], '/b/qemu-system-aarch64'),
    (['/q/x86_64/test_a.py', '/q/aarch64/test_a.py'], ''),
    (['/q/aarch64/test_a.py', '/q/generic/test_a.py'], 'qemu-system-x86_64'),
])
def test_arch_ambiguous(bench: Bench, files: List[str], binary: str) -> None:
    '''Two that contradict each other are both named.'''
    message, transient = arch_of(bench, files, '', binary)
    assert message.startswith('ambiguous architecture: ')
    assert 'x86_64 by ' in message and 'aarch64 by ' in message
    assert not transient


def test_generic_test(bench: Bench) -> None:
    '''It runs for all targets, and is skipped where there is no image.'''
    bench.fill()
    path = bench.write(TEST.format(declaration="'tiny'"),
                       'generic/test_it.py')
    assert passed(bench.python(path).stdout)
    output = bench.python(
        path, QEMU_TEST_QEMU_BINARY='/b/qemu-system-riscv64').stdout
    assert "no architecture 'riscv64', there are: x86_64" in skipped(output)
