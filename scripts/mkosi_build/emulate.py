# SPDX-License-Identifier: GPL-2.0-or-later
'''
Running programs of another architecture, as a build's maintainer scripts
are: through the interpreter of the tools lock, so that the host's own does
not decide bytes.

The kernel finds an interpreter through binfmt_misc. Since Linux 6.7 each
user namespace can have one of its own, and so each build registers its own
interpreter, without asking and without a trace on the host. On older
kernels it is registered for the whole host, by root.
See Documentation/admin-guide/binfmt-misc.rst in Linux.
'''

import os
import shlex
import subprocess
import tarfile
from pathlib import Path
from typing import List, Optional

from . import command
from .cache import Cache
from .error import HostError
from .lock import Lock
from .report import Report
from .store import Store

# The package of the tools lock that has all of QEMU's user mode emulators.
# It is 71 MB, and not fetched but by who needs one of them.
PACKAGE = 'qemu-user'

BINFMT_MISC = Path('/proc/sys/fs/binfmt_misc')


def _interpreter(tree: Path, arch: str) -> Path:
    return tree / 'usr/bin' / f'qemu-{arch}'


def _rule(tree: Path, arch: str) -> Path:
    return tree / 'usr/share/qemu/binfmt.d' / f'qemu-{arch}.conf'


def is_foreign(arch: str) -> bool:
    '''Whether this host can't run programs for @arch by itself.'''
    return arch != os.uname().machine


def check_host(arch: str) -> None:
    '''
    Raise HostError if there is no way for this user and kernel to run
    programs for @arch. Needs no tools tree.
    '''
    if (is_foreign(arch) and not command.has_own_binfmt()
            and not BINFMT_MISC.is_dir()):
        raise HostError(
            f'programs for {arch} can\'t run here: expected binfmt_misc in '
            f'{BINFMT_MISC}, found nothing', next_step='modprobe binfmt_misc '
            f'&& mount -t binfmt_misc binfmt_misc {BINFMT_MISC}, as root')


def prepare(tree: Path, arch: str, lock: Lock, cache: Cache, store: Store,
            report: Report) -> None:
    '''
    Make sure that programs for @arch can run in a build with the tools
    @tree of @lock.

    Raises what Store.fetch() does; HostError where root has to register
    the interpreter first.
    '''
    if not is_foreign(arch):
        return
    if not _interpreter(tree, arch).exists():
        _unpack(tree, arch, lock, cache, store)
    if not command.has_own_binfmt():
        _register(tree, arch, report)


def registration(tree: Path, arch: str) -> Optional[str]:
    '''
    What a build for @arch with the tools @tree registers in its own
    namespace: the package's rule, with the interpreter in the tree, under
    a name that says whose it is. None if there is nothing to register.

    With its flag F the kernel opens the interpreter at once, so that it
    need not be there in a chroot.
    '''
    if is_foreign(arch) and command.has_own_binfmt():
        return _registration(tree, arch)
    return None


def _registration(tree: Path, arch: str) -> str:
    _, _, kind, offset, magic, mask, _, flags = _rule(
        tree, arch).read_text('utf-8').strip().split(':')
    assert 'F' in flags, flags
    return ':'.join(['', _name(tree, arch), kind, offset, magic, mask,
                     str(_interpreter(tree, arch)), flags])


def _name(tree: Path, arch: str) -> str:
    return f'mkosi-build-{arch}-{tree.name[:16]}'


def _unpack(tree: Path, arch: str, lock: Lock, cache: Cache,
            store: Store) -> None:
    '''Put the interpreter for @arch and its rule into @tree.'''
    packages = [p for p in lock.packages if p.name == PACKAGE]
    if not packages:
        raise HostError(
            f'programs for {arch} can\'t run here: expected the package '
            f'{PACKAGE} in the tools lock, found none', next_step='add it to '
            'tools/mkosi.conf, and run scripts/mkosi-build.py '
            f'{lock.architecture} tools --update-lock')
    # The interpreter last, since it says that both are there
    wanted = [_rule(tree, arch), _interpreter(tree, arch)]
    name = f'emulator-{arch}-{lock.digest[:16]}'
    with cache.lock(name), cache.scratch(name) as work:
        store.fetch(packages, lock.distribution, PACKAGE)
        _extract(store.path(packages[0]), [path.relative_to(tree)
                                           for path in wanted], work)
        for path in wanted:
            path.parent.mkdir(parents=True, exist_ok=True)
            os.replace(work / path.name, path)


def _extract(package: Path, files: List[Path], folder: Path) -> None:
    '''
    Extract @files of the Debian @package to @folder. Unpacked whole, it
    would be 460 MB.
    '''
    with subprocess.Popen(['dpkg-deb', '--fsys-tarfile', str(package)],
                          stdout=subprocess.PIPE) as process, \
            tarfile.open(fileobj=process.stdout, mode='r|') as tar:
        names = {f'./{path}' for path in files}
        for member in tar:
            if member.name in names and member.isfile():
                target = folder / Path(member.name).name
                target.write_bytes(_content(tar, member))
                target.chmod(member.mode)
    for path in files:
        if not (folder / path.name).exists():
            raise HostError(f'{PACKAGE}: expected {path} in it, found no '
                            'such file', next_step='lock another version '
                            'of it with --update-lock tools')


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    assert file
    return file.read()


def _register(tree: Path, arch: str, report: Report) -> None:
    '''
    Register the interpreter for the whole host, unless it is. Raises
    HostError with the line that does it where this user may not.
    '''
    name = _name(tree, arch)
    if (BINFMT_MISC / name).exists():
        return
    rule = _registration(tree, arch)
    try:
        (BINFMT_MISC / 'register').write_text(rule, encoding='ascii')
    except OSError as e:
        raise HostError(
            f'programs for {arch} can\'t run here: this kernel has no '
            'binfmt_misc in user namespaces (Linux 6.7 has), and only root '
            f'may register an interpreter for all ({e.strerror})',
            next_step=f'printf %s {shlex.quote(rule)} | '
            f'sudo tee {BINFMT_MISC}/register') from e
    report.event('registered', f'         registered {name} in '
                 f'{BINFMT_MISC}, for this host until it is rebooted')
