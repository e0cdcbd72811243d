# SPDX-License-Identifier: GPL-2.0-or-later
'''Programs of another architecture: who runs them, and where.'''

import errno
import os
from pathlib import Path
import shutil
import struct
import subprocess
import sys
from typing import Callable, List, Optional

import pytest

from mkosi_build import build, command, emulate, lock as locks, tools
from mkosi_build.cache import Cache
from mkosi_build.error import HostError
from mkosi_build.report import Report
from mkosi_build.store import Store
from fixtures_builder import AMBIENT, TREE_LOCKS

pytest_plugins = ['fixtures_builder']

FOREIGN = 'aarch64' if os.uname().machine == 'x86_64' else 'x86_64'
# Machine code of exit(42), and the number of the machine in an ELF header
EXIT_42 = {
    'aarch64': (183, struct.pack('<III', 0xd2800540, 0xd2800ba8, 0xd4000001)),
    'x86_64': (62, b'\xb8\x3c\0\0\0\xbf\x2a\0\0\0\x0f\x05')}


@pytest.fixture(name='program')
def fixture_program(tmp_path: Path) -> Path:
    '''A static program for the other architecture that exits with 42.'''
    machine, code = EXIT_42[FOREIGN]
    base, headers = 0x400000, 64 + 56
    elf = struct.pack('<16sHHIQQQIHHHHHH', b'\x7fELF\x02\x01\x01', 2, machine,
                      1, base + headers, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    size = headers + len(code)
    segment = struct.pack('<IIQQQQQQ', 1, 5, 0, base, base, size, size, 4096)
    path = tmp_path / 'program'
    path.write_bytes(elf + segment + code)
    path.chmod(0o755)
    return path


@pytest.fixture(name='tree', scope='session')
def fixture_tree(tools_tree: Path,
                 tmp_path_factory: pytest.TempPathFactory) -> Path:
    '''The tools tree, with the interpreter for the other architecture.'''
    lock = tools_tree.with_suffix('.lock')
    if not lock.exists():
        lock = TREE_LOCKS / f'{build.host_architecture()}.lock'
    with pytest.MonkeyPatch.context() as patch:
        for name, value in AMBIENT.items():
            patch.setenv(name, value)
        cache = Cache()
        if not os.access(cache.root, os.W_OK):
            patch.setenv('QEMU_MKOSI_DIR',
                         str(tmp_path_factory.mktemp('emulate')))
            cache = Cache()
        report = Report()
        emulate.prepare(tools_tree, FOREIGN, locks.load(lock), cache,
                        Store(cache, report), report)
    return tools_tree


def run_isolated(program: Path, rule: Optional[str]) -> int:
    '''Run @program as mkosi is run. Returns its exit code.'''
    return command.run_isolated([str(program)], program.with_name('log'),
                                False, {}, rule)


@pytest.mark.network
@pytest.mark.slow
def test_foreign_program_runs(tree: Path, program: Path) -> None:
    '''By the tree's interpreter, in a chroot that does not have it.'''
    if not command.has_own_binfmt():
        pytest.skip('no binfmt_misc in user namespaces')
    rule = emulate.registration(tree, FOREIGN)
    assert rule and str(tree / f'usr/bin/qemu-{FOREIGN}') in rule
    assert run_isolated(program, rule) == 42
    root = program.with_name('root')
    root.mkdir()
    shutil.copy(program, root / 'program')
    log = program.with_name('log')
    assert command.run_isolated(
        ['unshare', '--user', '--map-root-user', f'--root={root}',
         '/program'], log, False, {}, rule) == 42, log.read_text()


@pytest.mark.network
@pytest.mark.slow
def test_nothing_is_left_on_the_host(tree: Path, program: Path) -> None:
    '''The registration ends with the namespace that it was made in.'''
    if not command.has_own_binfmt():
        pytest.skip('no binfmt_misc in user namespaces')
    run_isolated(program, emulate.registration(tree, FOREIGN))
    names = (os.listdir(emulate.BINFMT_MISC)
             if emulate.BINFMT_MISC.is_dir() else [])
    assert not [name for name in names if name.startswith('mkosi-build')]
    if not [name for name in names if FOREIGN in name]:
        assert run_isolated(program, None) not in (0, 42)


@pytest.mark.network
@pytest.mark.slow
def test_registered_for_the_host(tree: Path, program: Path) -> None:
    '''
    As root of an older kernel. A namespace with its own binfmt_misc, whose
    root registers in the way of the host's root, stands for the host.
    '''
    if not command.has_own_binfmt():
        pytest.skip('no binfmt_misc in user namespaces')
    scripts = Path(emulate.__file__).parents[1]
    code = ('import subprocess, sys\n'
            f'sys.path.insert(0, {str(scripts)!r})\n'
            'from pathlib import Path\n'
            'from mkosi_build import command, emulate\n'
            'from mkosi_build.report import Report\n'
            'command.has_own_binfmt = lambda: False\n'
            'for _ in range(2):\n'
            f'    emulate.prepare(Path({str(tree)!r}), {FOREIGN!r}, None,\n'
            '                    None, None, Report())\n'
            f'assert emulate.registration(Path({str(tree)!r}),'
            f' {FOREIGN!r}) is None\n'
            f'sys.exit(subprocess.call([{str(program)!r}]))\n')
    # pylint: disable=protected-access
    result = subprocess.run(
        [*command._own_binfmt(''), sys.executable, '-c', code],
        stderr=subprocess.PIPE, encoding='utf-8', check=False)
    assert result.returncode == 42, result.stderr
    assert result.stderr.count('registered mkosi-build') == 1


@pytest.fixture(name='old_kernel')
def fixture_old_kernel(monkeypatch: pytest.MonkeyPatch,
                       tmp_path: Path) -> Path:
    '''A kernel whose namespaces have no binfmt_misc. Returns the host's.'''
    folder = tmp_path / 'binfmt_misc'
    folder.mkdir()
    monkeypatch.setattr(command, 'has_own_binfmt', lambda: False)
    monkeypatch.setattr(emulate, 'BINFMT_MISC', folder)
    return folder


def fake_tree(tmp_path: Path) -> Path:
    '''A tools tree with nothing but a rule and an interpreter.'''
    tree = tmp_path / 'tree'
    for name, text in (
            (f'usr/share/qemu/binfmt.d/qemu-{FOREIGN}.conf',
             ':qemu:M::magic:mask:/elsewhere:OPF\n'),
            (f'usr/bin/qemu-{FOREIGN}', '')):
        (tree / name).parent.mkdir(parents=True)
        (tree / name).write_text(text)
    return tree


def prepare(tree: Path) -> None:
    '''Prepare @tree, from which nothing is missing.'''
    emulate.prepare(tree, FOREIGN, locks.load(
        TREE_LOCKS / f'{build.host_architecture()}.lock'), Cache(),
        Store(Cache(), Report()), Report())


def test_user_is_told_what_root_has_to_do(
        old_kernel: Path, tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch) -> None:
    '''One line, with the rule quoted for the shell.'''
    def refuse(*_args: object, **_more: object) -> int:
        raise PermissionError(errno.EACCES, 'Permission denied')
    tree = fake_tree(tmp_path)
    monkeypatch.setattr(Path, 'write_text', refuse)
    with pytest.raises(HostError) as caught:
        prepare(tree)
    assert 'only root may register' in caught.value.message
    step = caught.value.next_step
    assert step and '\n' not in step
    said = subprocess.run(['sh', '-c', step.partition('|')[0]], check=True,
                          stdout=subprocess.PIPE, encoding='utf-8').stdout
    assert said == (f':mkosi-build-{FOREIGN}-tree:M::magic:mask:'
                    f'{tree}/usr/bin/qemu-{FOREIGN}:OPF')
    assert step.endswith(f'| sudo tee {old_kernel}/register')


def test_kernel_without_binfmt_misc(old_kernel: Path) -> None:
    '''Told before any work.'''
    old_kernel.rmdir()
    with pytest.raises(HostError, match='found nothing') as caught:
        build.check_host(Cache(), FOREIGN)
    assert 'modprobe binfmt_misc' in str(caught.value.next_step)
    build.check_host(Cache(), build.host_architecture())


def test_own_architecture_needs_nothing(tmp_path: Path) -> None:
    '''Neither an interpreter nor the package that has it.'''
    host = build.host_architecture()
    assert emulate.registration(tmp_path, host) is None
    lock = locks.load(TREE_LOCKS / f'{host}.lock')

    def names(arch: str) -> List[str]:
        return [package.name for package in tools.packages(lock, arch)]
    assert emulate.PACKAGE not in names(host)
    assert emulate.PACKAGE in names(FOREIGN)


def test_tools_lock_without_interpreter(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    '''The package to add is named.'''
    monkeypatch.setenv('QEMU_MKOSI_DIR', str(tmp_path))
    host = build.host_architecture()
    text = ''.join(line for line in (TREE_LOCKS / f'{host}.lock').open()
                   if f' {emulate.PACKAGE} ' not in line)
    cache, report = Cache(), Report()
    with pytest.raises(HostError, match=emulate.PACKAGE) as caught:
        emulate.prepare(tmp_path / 'tree', FOREIGN,
                        locks.parse(text, 'tools'), cache,
                        Store(cache, report), report)
    assert 'tools/mkosi.conf' in str(caught.value.next_step)


def test_package_without_interpreter(
        tmp_path: Path,
        make_package: Callable[[str], Path]) -> None:
    '''What is missing is named, and nothing is put into the tree.'''
    package = make_package('qemu-user')
    with pytest.raises(HostError, match='expected usr/bin/qemu-x in it'):
        # pylint: disable=protected-access
        emulate._extract(package, [Path('usr/bin/qemu-x')], tmp_path)


@pytest.fixture(name='make_package')
def fixture_make_package(tmp_path: Path) -> Callable[[str], Path]:
    '''Makes a Debian package with no file but one.'''
    def make(name: str) -> Path:
        folder = tmp_path / 'package'
        (folder / 'DEBIAN').mkdir(parents=True)
        (folder / 'DEBIAN/control').write_text(
            f'Package: {name}\nVersion: 1\nArchitecture: all\n'
            'Maintainer: nobody\nDescription: nothing\n')
        (folder / 'something').touch()
        subprocess.run(['dpkg-deb', '--build', '-Znone', str(folder),
                        str(tmp_path / 'package.deb')], check=True,
                       stdout=subprocess.DEVNULL)
        return tmp_path / 'package.deb'
    return make
