# SPDX-License-Identifier: GPL-2.0-or-later
'''
Builds by the real mkosi, of an image of a few tiny packages: same bytes,
no network, and all that goes wrong on the way.
'''

import os
from pathlib import Path
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from typing import Callable, Dict, Iterator, List, Tuple

import pytest
import yaml

from fixtures_builder import Debian, FaultServer, POSTOUTPUT, Project
from mkosi_build import lock as locks
from mkosi_build.cache import sha256_file

pytest_plugins = ['fixtures_builder']

ROOT = os.getuid() == 0
SLOW = pytest.mark.slow
# As anybody, in a namespace
MOUNTING = ('unshare', '--user', '--map-root-user', '--mount')
# Root goes through closed doors, unless it gives that power up
# (but a user namespace of root's needs a file capability)
NO_POWERS: Tuple[str, ...] = (
    ('setpriv', '--bounding-set=-all,+setfcap', '--inh-caps=-all')
    if ROOT else ())

HASH = re.compile(r'[0-9a-f]{64}')


def stages(project: Project, text: str) -> List[str]:
    '''The stages that were begun.'''
    return [event['text'].split(':')[0] for event in project.events(text)
            if event['event'] == 'start']


def relocked(project: Project, debian: Debian, *further: str) -> None:
    '''Lock again for the definition as it is now, with @further packages.'''
    project.write_lock(debian, *debian.MINIMAL, *further)


def assert_untouched(project: Project) -> None:
    '''Nothing was begun: no package, no log, no artefact.'''
    assert not (project.cache / 'store').exists()
    assert not (project.cache / 'log').exists()
    assert not project.artefacts()
    assert not project.asset_hashes()


# The way it should go

@SLOW
def test_build_and_again(project: Project) -> None:
    '''The registry's bytes, in the asset cache; then nothing to do.'''
    first = project.good()
    assert 'mini x86_64: built' in first.stderr
    assert f'log: {project.cache}/log/mini-x86_64.log' in first.stderr
    registered = HASH.findall(project.registry.read_text())
    assert set(project.asset_hashes()) < set(registered)
    assert len(project.artefacts()) == 3
    folder = project.artefacts()[0].parent
    assert {p.name for p in folder.iterdir()} == {
        'vmlinuz', 'initrd.cpio', 'disk.qcow2', 'manifest.json',
        'packages.spdx.json', 'provenance.json', 'record.json'}
    # Of the record it says when the build was last used
    before = {name: (project.root / name).stat().st_mtime_ns
              for name in project.files() if not name.endswith('record.json')}
    second = project.good('--json', PATH='/nonexistent')
    assert not stages(project, second.stdout)
    image, = project.events(second.stdout)
    assert (image['event'], image['fresh'], image['locked']) == (
        'image', False, True)
    assert before == {name: (project.root / name).stat().st_mtime_ns
                      for name in project.files()
                      if not name.endswith('record.json')}


def test_nothing_to_do_on_a_read_only_cache(built: Project) -> None:
    '''What is there can be used by who can't write there.'''
    folders = [Path(folder) for folder, _, _ in os.walk(built.root)]
    for folder in folders:
        folder.chmod(0o555)
    try:
        result = built.run(wrapper=NO_POWERS)
    finally:
        for folder in folders:
            folder.chmod(0o755)
    assert result.returncode == 0, result.stderr
    assert 'up to date' in result.stderr


@pytest.fixture(name='open_folder')
def fixture_open_folder() -> Iterator[Path]:
    '''A folder that all users can reach, which pytest's own is not.'''
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o777)
        yield Path(folder)


@SLOW
def test_other_user_umask_zone_locale_path(
        template: Project, debian: Debian, tools_tree: Path,
        open_folder: Path) -> None:
    '''The same bytes as root's, and as in every other test here.'''
    mirror, tree = open_folder / 'mirror', open_folder / 'tools'
    shutil.copytree(debian.mirror, mirror)
    # Not a link into a home that the other user can't enter
    tree.mkdir()
    shutil.copytree(tools_tree, tree / tools_tree.name, symlinks=True,
                    copy_function=link)
    shutil.copytree(os.path.dirname(yaml.__file__), open_folder / 'py/yaml')
    root = open_folder / 'another path= ünlike'.replace(' ', '-')
    project = Project(root, f'file://{mirror}', tree / tools_tree.name)
    shutil.copytree(template.tree, project.tree)
    wrapper: Tuple[str, ...] = ()
    subprocess.run(['chmod', '-R', 'a+rX', mirror], check=True)
    if ROOT:
        subprocess.run(['chown', '-hR', '65534:65534', root], check=True)
        # setpriv's powers go with the second program that is run
        wrapper = ('setpriv', '--reuid=65534', '--regid=65534',
                   '--clear-groups', 'env')
        project.python = [python_for(wrapper)]
    result = project.run(
        wrapper=(*wrapper, 'sh', '-c', 'umask 077; exec "$@"', 'sh'),
        PYTHONPATH=str(open_folder / 'py'), TZ='Asia/Tokyo',
        LC_ALL='tr_TR.ISO-8859-9', LANG='tr_TR', LANGUAGE='tr',
        PYTHONHASHSEED='7', SOURCE_DATE_EPOCH='1', CANARY='1')
    assert result.returncode == 0, result.stderr
    assert 'mini x86_64: built' in result.stderr
    project.assert_clean()
    assert len(project.artefacts()) == 3


def python_for(wrapper: Tuple[str, ...]) -> str:
    '''An interpreter that the other user may run.'''
    for python in (os.path.realpath(sys.executable), '/usr/bin/python3'):
        try:
            subprocess.run([*wrapper, python, '-c', ''], check=True,
                           stderr=subprocess.DEVNULL)
        except (OSError, subprocess.CalledProcessError):
            continue
        return python
    raise pytest.skip.Exception('no Python that another user may run')


def link(source: str, dest: str) -> str:
    '''A hard link, or else a copy.'''
    try:
        os.link(source, dest, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, dest, follow_symlinks=False)
    return dest


@SLOW
def test_in_a_checkout_of_mkosi(project: Project) -> None:
    '''The locked mkosi runs, wherever one stands.'''
    (project.root / 'mkosi').mkdir()
    (project.root / 'mkosi/__init__.py').write_text('raise SystemExit(9)')
    (project.root / 'signal.py').write_text('raise SystemExit(9)')
    project.good()


# No network

SPY = '''\
exec >"$OUTPUTDIR/initrd.cpio" 2>&1
sed '1,2d; s/:.*//; s/^ *//; s/^/interface /' /proc/net/dev
for address in 127.0.0.1:%d %s; do
    python3 -c "import socket
host, _, port = '$address'.rpartition(':')
socket.create_connection((host, port), 5)
print('connected')" || continue
done
'''


@SLOW
def test_build_has_no_network(unbuilt: Project, debian: Debian,
                              faults: FaultServer) -> None:
    '''No interface but a loopback that is down; no way to this host.'''
    port = faults.http.server_port
    with socket.create_connection(('127.0.0.1', port)):
        pass
    unbuilt.add_script('mkosi.postoutput', POSTOUTPUT + SPY % (
        port, f'{socket.gethostname()}:{port}'))
    relocked(unbuilt, debian)
    unbuilt.good('--local')
    said = (unbuilt.artefacts()[0].parent / 'initrd.cpio').read_text()
    assert re.findall(r'^interface (.*)', said, re.M) == ['lo']
    assert 'Network is unreachable' in said
    assert 'connected' not in said
    assert not faults.asked


# Registry, definition and lock disagree: before any work

@pytest.mark.parametrize('edit, expected', [
    (lambda p: shutil.rmtree(p.definition), 'no definition there'),
    (lambda p: (p.definition / 'mkosi.conf').write_text('[Output]\n'),
     'the definition has changed since x86_64.lock was made'),
    (lambda p: p.add_script('mkosi.postinst', ''), 'definition has changed'),
    (lambda p: p.lock_path.unlink(), 'no such lock'),
    (lambda p: (p.mkosi / 'tools/x86_64.lock').unlink(),
     'no tools lock for a host of architecture x86_64'),
    (lambda p: p.edit(p.registry, 'release: trixie', 'release: forky'),
     'expected a lock for debian forky x86_64, found one for debian trixie'),
    (lambda p: p.edit(p.registry, 'kernel:', 'kernal:'),
     "unknown key 'kernal', did you mean 'kernel'?"),
])
def test_disagreement(edit: Callable[[Project], object], expected: str,
                      project: Project) -> None:
    '''Told before any work begins.'''
    edit(project)
    code = 4 if 'tools lock' in expected else 3
    assert expected in project.bad(code)
    assert_untouched(project)


def swap(lines: List[str]) -> None:
    '''Out of order.'''
    at = hello(lines)
    lines[at], lines[at + 1] = lines[at + 1], lines[at]


def hello(lines: List[str]) -> int:
    '''The line of mini-hello.'''
    at, = (i for i, line in enumerate(lines) if ' mini-hello ' in line)
    return at


def replace(old: str, new: str) -> Callable[[List[str]], None]:
    '''In the line of mini-hello.'''
    def edit(lines: List[str]) -> None:
        at = hello(lines)
        assert re.search(old, lines[at])
        lines[at] = re.sub(old, new, lines[at])
    return edit


@pytest.mark.parametrize('edit, expected', [
    (replace('^[0-9a-f]{8}', '00000000'), 'changed without their hashes'),
    (replace(r' \d+ ', ' 77 '), 'changed without their hashes'),
    (replace(' 1 ', ' 2 '), 'changed without their hashes'),
    (lambda lines: lines.pop(hello(lines)), 'changed without their hashes'),
    (swap, ': mini-hello is out of order after mini-lib'),
    (lambda lines: lines.insert(hello(lines), lines[hello(lines)]),
     ': mini-hello_1_amd64.deb is already in line '),
    (replace('pool/main', 'pool/../..'),
     ': not a location below a repository'),
    (replace('pool/main', '/etc'), ': not a location below a repository'),
])
def test_edited_lock(edit: Callable[[List[str]], object], expected: str,
                     project: Project) -> None:
    '''Told before any work begins, with its line or both identities.'''
    lines = project.lock_path.read_text().splitlines()
    edit(lines)
    project.lock_path.write_text('\n'.join(lines) + '\n')
    said = project.bad(3)
    assert expected in said
    if 'hashes' in expected:
        assert len(set(HASH.findall(said))) == 2
    else:
        assert re.match(r'error: mini/x86_64\.lock:\d+: ', said)
    assert_untouched(project)


# mkosi fails

def failing(project: Project, debian: Debian, *further: str) -> str:
    '''A build in which mkosi fails. Returns what was said.'''
    relocked(project, debian, *further)
    said = project.bad(6, '--local')
    assert f'{project.cache}/log/mini-x86_64.log' in said
    reason = said[said.index('error: '):said.index('  next: ')]
    assert len(reason.splitlines()) <= 12
    assert not project.artefacts() and not project.asset_hashes()
    return reason


@SLOW
def test_script_fails(unbuilt: Project, debian: Debian) -> None:
    '''The script, and its last words.'''
    unbuilt.add_script('mkosi.postoutput',
                       POSTOUTPUT + 'echo "the telling error: 42" >&2\n'
                       'exit 3\n')
    said = failing(unbuilt, debian)
    assert said.splitlines()[1:] == [
        '    the telling error: 42',
        '    ‣ "/work/postoutput" returned non-zero exit code 3.']


@SLOW
def test_maintainer_script_fails(unbuilt: Project, debian: Debian) -> None:
    '''The package that it is of.'''
    unbuilt.edit(unbuilt.definition / 'mkosi.conf', 'Packages=mini-hello',
                 'Packages=mini-broken')
    assert 'mini-broken' in failing(unbuilt, debian, 'mini-broken')


@SLOW
def test_package_needs_something_outside(unbuilt: Project,
                                         debian: Debian) -> None:
    '''What it needs, and who.'''
    unbuilt.edit(unbuilt.definition / 'mkosi.conf', 'Packages=mini-hello',
                 'Packages=mini-outside')
    said = failing(unbuilt, debian, 'mini-outside')
    assert 'mini-outside' in said and 'not-in-the-lock' in said


@SLOW
def test_package_is_not_in_the_lock(unbuilt: Project,
                                    debian: Debian) -> None:
    '''A package that is asked for and not locked is no package.'''
    unbuilt.edit(unbuilt.definition / 'mkosi.conf', 'Packages=mini-hello',
                 'Packages=mini-outside')
    assert 'mini-outside' in failing(unbuilt, debian)


@SLOW
def test_dependency_was_taken_from_the_lock(unbuilt: Project,
                                            debian: Debian) -> None:
    '''A line less: apt says what is missing.'''
    unbuilt.write_lock(debian, 'base-files', 'mini-hello', 'mini-shell')
    said = unbuilt.bad(6, '--local')
    assert 'mini-hello' in said and 'mini-lib' in said


@SLOW
def test_artefact_is_missing(unbuilt: Project, debian: Debian) -> None:
    '''What was expected, and what there is.'''
    unbuilt.add_script('mkosi.postoutput',
                       POSTOUTPUT + 'rm "$OUTPUTDIR/initrd.cpio"\n'
                       'mkdir "$OUTPUTDIR/other"\n')
    said = failing(unbuilt, debian)
    assert 'mkosi made no initrd.cpio (initrd)' in said
    assert 'vmlinuz' in said and 'other' in said


def test_definition_is_no_definition(unbuilt: Project,
                                     debian: Debian) -> None:
    '''mkosi's own words on a setting that it does not know.'''
    unbuilt.edit(unbuilt.definition / 'mkosi.conf', 'Bootable=no',
                 'Bootabel=no')
    assert 'Unknown setting Bootabel' in failing(unbuilt, debian)


def test_package_is_no_package(unbuilt: Project, debian: Debian,
                               tmp_path: Path) -> None:
    '''The right hash of the wrong thing.'''
    data = b'not a package'
    good = debian.packages['mini-lib']
    bad = locks.Package(good.name, good.version, good.location,
                        sha256_of(tmp_path, data), len(data), 'amd64',
                        good.source)
    packages = {**debian.packages, 'mini-lib': bad}
    mirror = tmp_path / 'mirror'
    shutil.copytree(debian.mirror, mirror)
    (mirror / good.location).write_bytes(data)
    unbuilt.mirror = f'file://{mirror}'
    lock = locks.load(unbuilt.lock_path)
    unbuilt.lock_path.write_text(locks.render(locks.Lock(
        lock.definition, lock.distribution, lock.release, lock.architecture,
        lock.epoch, tuple(packages[p.name] for p in lock.packages))))
    assert 'mini-lib_1_amd64.deb: not a Debian package' in unbuilt.bad(
        3, '--local')


def sha256_of(folder: Path, data: bytes) -> str:
    '''Of @data.'''
    (folder / 'data').write_bytes(data)
    return sha256_file(folder / 'data')


# Other bytes than the registry's

def wrong_hash(project: Project) -> Tuple[str, str]:
    '''Edit the disk's hash in the registry. Returns (wrong, right).'''
    right = HASH.findall(project.registry.read_text())[-1]
    wrong = 'f' * 64
    project.edit(project.registry, right, wrong)
    return wrong, right


@SLOW
def test_other_bytes(project: Project) -> None:
    '''Both hashes; the files are kept to look at, and used by nobody.'''
    wrong, right = wrong_hash(project)
    said = project.bad(7)
    assert f'expected {wrong}' in said and f'found    {right}' in said
    assert 'disk.qcow2 (disk)' in said and 'vmlinuz' not in said
    folder, = project.cache.glob('images/mini/x86_64/*')
    assert folder.name.endswith('.differs') and str(folder) in said
    assert (folder / 'disk.qcow2').exists()
    assert not project.asset_hashes()
    assert '--update' in said
    project.good('--update')
    assert right in project.registry.read_text()
    assert len(project.asset_hashes()) == 3
    assert 'up to date' in project.good().stderr


def test_other_bytes_than_those_built(built: Project) -> None:
    '''Nothing is built; what is there stays.'''
    wrong, right = wrong_hash(built)
    said = built.bad(7)
    assert wrong in said and right in said
    assert str(built.artefacts()[0].parent) in said
    assert len(built.asset_hashes()) == 3


@SLOW
def test_other_size(project: Project) -> None:
    '''A size is part of what the registry says.'''
    project.edit(project.registry, 'size: 7\n            '
                 'sha256: ' + HASH.findall(project.registry.read_text())[1],
                 'size: 8\n            sha256: '
                 + HASH.findall(project.registry.read_text())[1])
    assert '8 bytes' in project.bad(7)


# Damage by hand

def flip(path: Path) -> None:
    '''Another byte, the same size.'''
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    overwrite(path, bytes(data))


def overwrite(path: Path, data: bytes) -> None:
    '''Write into the file as it is, with all its names.'''
    path.chmod(0o644)
    path.write_bytes(data)


def exchange(path: Path, data: bytes) -> None:
    '''Put another file in its place.'''
    path.unlink()
    path.write_bytes(data)


DAMAGES: 'Dict[str, Callable[[Path], None]]' = {
    'flip': flip,
    'cut': lambda path: overwrite(path, path.read_bytes()[:-1]),
    'grow': lambda path: overwrite(path, path.read_bytes() + b'x'),
    'empty': lambda path: overwrite(path, b''),
    'exchange': lambda path: exchange(path, b'other'),
    'remove': Path.unlink,
}


@SLOW
@pytest.mark.parametrize('damage', ['flip', 'exchange', 'remove'])
def test_artefact_damaged(damage: str, built: Project) -> None:
    '''Never used: made anew.'''
    path = built.artefacts()[-1]
    good = path.read_bytes()
    DAMAGES[damage](path)
    built.good()
    assert path.read_bytes() == good
    assert len(built.asset_hashes()) == 3


@pytest.mark.parametrize('damage', sorted(DAMAGES))
def test_asset_damaged(damage: str, built: Project) -> None:
    '''A copy in the asset cache: made whole without a build.'''
    disk = built.artefacts()[-1]
    asset, = (path for path in (built.assets / 'download').iterdir()
              if path.suffix != '.stamp'
              and path.stat().st_size == disk.stat().st_size)
    data = asset.read_bytes()
    exchange(asset, data)
    DAMAGES[damage](asset)
    result = built.good('--json')
    assert 'building mini-x86_64' not in stages(built, result.stdout)
    assert asset.read_bytes() == data
    result = built.good('--json')
    assert [e['event'] for e in built.events(result.stdout)] == ['image']


@SLOW
def test_record_damaged(built: Project) -> None:
    '''A record that says nothing is no record.'''
    record, = built.cache.glob('images/**/record.json')
    for text in ('', '[]', '{"artefacts": {}}', '{"artefacts": []}',
                 '{"artefacts": {"disk": 7}}'):
        record.write_text(text)
        assert 'not built yet' in built.good('--list').stdout
    built.good()


@SLOW
def test_store_file_damaged(project: Project, debian: Debian) -> None:
    '''Fetched again, that one alone.'''
    project.good()
    for path in project.cache.glob('images/mini'):
        shutil.rmtree(path)
    victim = project.cache / 'store' / debian.packages['mini-lib'].sha256
    flip(victim)
    result = project.good('--json')
    assert 'fetching mini-x86_64: 1 packages, 0.0 MB' in [
        e['text'] for e in project.events(result.stdout)]


# The host

def test_host_lacks_programs(project: Project, tmp_path: Path) -> None:
    '''Told with the line that installs them.'''
    said = project.bad(4, PATH=str(tmp_path))
    assert ('programs not found: apt-get, dpkg-deb, unshare, setpriv\n'
            '  next: apt-get install apt dpkg util-linux') in said
    assert_untouched(project)


def test_host_lacks_yaml(project: Project) -> None:
    '''Told with the line that installs it; --help needs it not.'''
    project.python = [sys.executable, '-S']
    assert 'apt install python3-yaml' in project.bad(4)
    assert project.run('--help').returncode == 0


def test_host_refuses_namespaces(project: Project) -> None:
    '''The switch that does it is named.'''
    said = project.bad(4, wrapper=(
        'unshare', '--user', '--map-root-user', 'sh', '-c',
        'echo 0 >/proc/sys/user/max_user_namespaces; exec "$@"', 'sh'))
    assert 'refuses the namespaces' in said
    assert 'sysctl -w user.max_user_namespaces=' in said
    assert_untouched(project)


@pytest.mark.parametrize('name', ['cache', 'assets'])
def test_cache_is_a_file(name: str, project: Project) -> None:
    '''Told with its path.'''
    path = project.root / 'file'
    path.write_text('')
    variable = {'cache': 'QEMU_MKOSI_DIR', 'assets': 'QEMU_TEST_CACHE_DIR'}
    project.env[variable[name]] = str(path)
    assert str(path) in project.bad(4)
    assert_untouched(project)


@pytest.mark.parametrize('name', ['cache', 'assets'])
def test_cache_is_not_writable(name: str, project: Project) -> None:
    '''Told with its path, before work begins.'''
    folder = project.root / name
    folder.mkdir(exist_ok=True)
    folder.chmod(0o555)
    try:
        said = project.bad(4, wrapper=NO_POWERS)
    finally:
        folder.chmod(0o755)
    assert str(folder) in said and 'Permission denied' in said
    assert_untouched(project)


# The disk is full

ON_TMPFS = '''\
set -e
mount -t tmpfs -o size=$SIZE none "$FOLDER"
[ -z "$FILL" ] || echo x >"$FOLDER/fill"
if [ -n "$TOOLS" ]; then
    mkdir "$FOLDER/tools"
    ln -s "$TOOLS" "$FOLDER/tools"
fi
"$@" || code=$?
find "$FOLDER" ! -type d -printf '%P\\n' >"$LEFT"
exit $code
'''

NO_SPACE_CHECK = '''\
import runpy, sys
sys.path.insert(0, sys.argv[1])
from mkosi_build import build
build.SPACE_NEEDED = 0
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name='__main__')
'''


def on_small_disk(project: Project, folder: Path, size: str, tools: str = '',
                  fill: str = '', check: bool = False
                  ) -> Tuple[str, List[str]]:
    '''
    Build with the cache folder @folder on a disk of @size, @tools linked to
    there, with another file if @fill. Returns what was said, and the files
    that were left there.
    '''
    if not check:
        project.python += ['-c', NO_SPACE_CHECK,
                           str(project.tree / 'scripts')]
    folder.mkdir(exist_ok=True)
    left = project.root / 'left'
    said = project.bad(
        4, wrapper=(*MOUNTING, 'sh', '-c', ON_TMPFS, 'sh'),
        SIZE=size, FOLDER=str(folder), TOOLS=tools, FILL=fill,
        LEFT=str(left))
    files = left.read_text().splitlines()
    left.unlink()
    return said, [name for name in files
                  if not name.startswith(('locks/', 'tools/', 'log/'))]


@pytest.fixture(name='tools')
def fixture_tools(tools_tree: Path) -> str:
    '''What a new cache folder needs of the tools.'''
    return str(tools_tree)


def test_disk_is_too_small(project: Project, tools: str) -> None:
    '''Told before work begins.'''
    said, left = on_small_disk(project, project.cache, '8m', tools,
                               check=True)
    assert 'a build needs 3072 MiB, found 8 MiB free' in said
    assert not left


def test_disk_full_at_the_start(project: Project) -> None:
    '''Not even the first probe fits.'''
    said, left = on_small_disk(project, project.assets, '4k', fill='yes')
    assert f'no space left for {project.assets}' in said
    assert left == ['fill']
    assert not (project.cache / 'store').exists()


def test_disk_full_in_fetch(project: Project, tools: str) -> None:
    '''What is whole stays; of what is not, the resumable part.'''
    said, left = on_small_disk(project, project.cache, '500k', tools)
    assert 'no space left for' in said and str(project.cache) in said
    assert all(name.startswith('store/') for name in left)


@SLOW
def test_disk_full_in_mkosi(project: Project, tools: str) -> None:
    '''Told as what it is, not as mkosi's failure.'''
    said, left = on_small_disk(project, project.cache, '5m', tools)
    assert 'mkosi found no space left' in said
    assert all(name.startswith('store/') for name in left)


@SLOW
def test_disk_full_in_asset_cache(project: Project) -> None:
    '''Artefacts are copied to another disk: those that fit are whole.'''
    said, left = on_small_disk(project, project.assets, '1m')
    assert f'no space left for {project.assets}' in said
    assert all(re.fullmatch(r'download/[0-9a-f]{64}(\.stamp)?', name)
               for name in left)
    assert not project.artefacts()
    project.good()


def test_disk_full_in_tools(project: Project, debian: Debian) -> None:
    '''While the tools are unpacked: told, and nothing half unpacked.'''
    tools = locks.load(project.mkosi / 'tools/x86_64.lock')
    (project.mkosi / 'tools/x86_64.lock').write_text(locks.render(
        locks.Lock(tools.definition, 'debian', 'trixie', 'x86_64',
                   tools.epoch, tuple(sorted(
                       debian.packages[name] for name in debian.MINIMAL)))))
    project.python += ['-c', NO_SPACE_CHECK, str(project.tree / 'scripts')]
    said = project.bad(
        4, '--local',
        wrapper=(*MOUNTING, 'sh', '-c', ON_TMPFS, 'sh'),
        SIZE='2m', FOLDER=str(project.cache), TOOLS='', FILL='',
        LEFT=str(project.root / 'left'))
    assert 'no space left' in said.lower()
    left = (project.root / 'left').read_text()
    assert 'tools/' not in left and 'work/' not in left


# Two at once

@SLOW
def test_two_builders_at_once(project: Project) -> None:
    '''Both succeed; the work is done once.'''
    results: List[Tuple[int, str]] = []

    def run() -> None:
        result = project.run('--json')
        results.append((result.returncode, result.stdout))

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [code for code, _ in results] == [0, 0]
    events = [e for _, said in results for e in project.events(said)]
    begun = [e['text'] for e in events if e['event'] == 'start']
    assert begun.count('building mini-x86_64') == 1
    assert len(begun) == 3
    assert sorted(e['fresh'] for e in events if e['event'] == 'image') == [
        False, True]
    assert [e['text'].strip() for e in events if e['event'] == 'waiting'] == [
        'waiting for another builder of mini-x86_64']
    project.assert_clean()
