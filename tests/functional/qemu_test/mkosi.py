# SPDX-License-Identifier: GPL-2.0-or-later
'''
Test utilities for images that are built by scripts/mkosi-build.py

An image is found by its name in tests/functional/mkosi/registry.yaml,
which has the hashes that its files must have.
'''

import errno
import json
import logging
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
import unittest
from collections import deque
from dataclasses import dataclass, replace
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Any,
    Deque,
    Dict,
    List,
    Optional,
    Tuple,
)

from .asset import Asset, AssetError
from .cmd import exec_command
from .kvm import kvm_works
from .linuxkernel import LinuxKernelTest
from .mkosi_verified import problem_of, sha256_of, write_atomically
from .uefi import PACKAGES, Uefi, find_uefi, machine_type

if TYPE_CHECKING:
    from mkosi_build.registry import Artefact, Boot, Registry, Target


# Each part of an image is of use only together with those before it
PARTS = ('kernel', 'initrd', 'disk')

ROOT = Path(__file__).parents[3]
BUILDER = ROOT / 'scripts' / 'mkosi-build.py'

# Exit codes of the builder for what the host lacks or what cannot be
# downloaded: nothing that is wrong with the test or the image
TRANSIENT_EXIT_CODES = (4, 5)

# What a guest gets if the test does not say how much: the images want half
MEMORY = '512M'

# The machine that firmware boots on if the test does not say which
MACHINES = {'x86_64': 'q35', 'aarch64': 'virt'}

# How the operating system says that a cache cannot be written to
CACHE_ERRORS = (errno.EACCES, errno.EDQUOT, errno.ENOSPC, errno.ENOTDIR,
                errno.EPERM, errno.EROFS)


def _import_registry() -> Tuple[Any, Any]:
    '''
    The builder's registry and its errors, imported late: most tests have
    no need of them
    '''
    scripts = str(ROOT / 'scripts')
    if scripts not in sys.path:
        sys.path.append(scripts)
    from mkosi_build import error, registry
    return registry, error


class _Unusable(Exception):
    '''Why an image cannot be used; @transient as in AssetError'''
    def __init__(self, msg: str, transient: bool = False) -> None:
        super().__init__(msg)
        self.msg = msg
        self.transient = transient


@dataclass(frozen=True)
class _Found:
    '''What is known of an image; @override is the file its hashes are from'''
    target: 'Target'
    stores: Tuple[str, ...]
    override: Optional[str]


class MkosiAsset(Asset):
    '''
    An image of the registry, for the architecture that is tested.

    MkosiAsset('debian-min') stands for the image's disk, its kernel and
    initrd are at hand as .kernel and .initrd. Fetching the disk fetches
    all three, fetching the initrd fetches the kernel too. A test that
    needs no disk declares MkosiAsset('debian-min', part='initrd').

    As with Asset, instances must be class level variables whose names
    start with "ASSET_", of the very class that has the tests: variables
    of a base class are neither precached nor checked by setUp().

    The architecture is that of the folder of the test (x86_64/test_x.py,
    or test_x86_64_x.py where there are no folders), or else that of
    QEMU_TEST_QEMU_BINARY. Where these contradict each other, @arch must
    be given, which overrules both.

    Nothing is looked up before first use, so a wrong name or registry
    is an AssetError of fetch(), valid() and available(), not of the
    import of a test.
    '''
    # pylint: disable-next=super-init-not-called
    def __init__(self, name: str, arch: Optional[str] = None,
                 part: str = 'disk') -> None:
        '''
        @params name: the image's name in the registry
        @params arch: QEMU's name of the target, if the test's place and
                      QEMU_TEST_QEMU_BINARY do not tell
        @params part: kernel, initrd or disk
        '''
        # Asset sets url, hash and cache_file here, which are properties
        # of ours; the rest is as there
        plain = Asset(f'mkosi:{name}', '')
        self.cache_dir: Path = plain.cache_dir
        self.log: logging.Logger = plain.log
        self.name = name
        self.part = part
        self._arch = arch
        self._declared_in: List[str] = []

    def __set_name__(self, owner: type, name: str) -> None:
        path = getattr(sys.modules.get(owner.__module__), '__file__', None)
        if path is not None:
            self._declared_in.append(os.path.abspath(path))

    def __str__(self) -> str:
        # QEMU 10.0 logs it before it fetches
        try:
            return str(self.cache_file)
        except AssetError:
            return self.url

    def __repr__(self) -> str:
        return f'MkosiAsset: url={self.url} cache_dir={self.cache_dir}'

    @property
    def kernel(self) -> 'MkosiAsset':
        '''The image's kernel'''
        return self._sibling('kernel')

    @property
    def initrd(self) -> 'MkosiAsset':
        '''The image's initrd'''
        return self._sibling('initrd')

    def _sibling(self, part: str) -> 'MkosiAsset':
        sibling = MkosiAsset(self.name, arch=self._arch, part=part)
        sibling._declared_in = list(self._declared_in)
        return sibling

    @property
    def arch(self) -> str:
        '''QEMU's name of the target that the image is for'''
        try:
            return self._find_arch()[0]
        except _Unusable as e:
            raise AssetError(self, e.msg, e.transient) from e

    @property
    def boot(self) -> 'Boot':
        '''What it takes to boot the image: console, command line...'''
        return self._look_up().target.boot

    @property
    def url(self) -> str:
        '''
        What this is: mkosi:<image>/<architecture>/<file>. Known even if
        nothing else is, since messages have need of it.
        '''
        try:
            found = self._find()
            return (f'mkosi:{self.name}/{found.target.arch}/'
                    + found.target.artefacts[self.part].file)
        except _Unusable:
            return f'mkosi:{self.name}/{self._arch or "?"}/{self.part}'

    @property
    def hash(self) -> str:
        '''The SHA-256 that the file must have'''
        sha256 = self._look_up().target.artefacts[self.part].sha256
        if sha256 is None:
            raise AssetError(self, 'not built yet', transient=True)
        return sha256

    @property
    def cache_file(self) -> Path:  # type: ignore[override]
        '''Where the file is in the cache, once it is fetched'''
        return Path(self.cache_dir, self.hash)

    def valid(self) -> bool:
        '''
        Check whether the file, and those it is of use with, exist in the
        cache and have the right hashes.

        A file that had the right hash before, and did not change since,
        is not read again, unless QEMU_TEST_REFRESH_CACHE is set. To have
        it downloaded again just for that would be of no use: the same
        hash is the same file, and one built here might not come back.
        '''
        return self._problem(self._look_up()) is None

    def available(self) -> bool:
        '''
        Check whether the image is either in the cache, or can be
        downloaded or built. Raises unittest.SkipTest if it is not, for
        the reason to be seen where the test is skipped.
        '''
        try:
            found = self._look_up()
            problem = self._problem(found)
            if problem is not None and not self._obtainable(found):
                raise AssetError(self, self._advice(found, problem),
                                 transient=True)
        except AssetError as e:
            if not e.transient:
                raise
            self.log.info('%s', e)
            raise unittest.SkipTest(str(e)) from e
        return True

    def fetch(self) -> str:
        '''
        Get the file, and those it is of use with, into the cache: by
        download from a store of the registry, or else, if
        QEMU_TEST_BUILD_IMAGES is set, by building the image. Returns
        the file's path
        '''
        found = self._look_up()
        problem = self._problem(found)
        if problem is None:
            self.log.debug('Using cached image %s', self.url)
        else:
            self._obtain(found, problem)
        for artefact in self._needed(found):
            self._save_time_stamp_of(self._path(artefact))
        return str(self._path(found.target.artefacts[self.part]))

    # Which image it is

    def _find_arch(self) -> Tuple[str, bool]:
        '''The architecture, and whether it is the test that demands it'''
        if self._arch is not None:
            return self._arch, True

        known = _import_registry()[0].ARCHITECTURES
        places: Dict[str, str] = {}
        for path in self._declared_in:
            arch = _arch_of_test(path, known)
            if arch is not None:
                places.setdefault(arch, path)
        demanded = bool(places)

        binary = os.getenv('QEMU_TEST_QEMU_BINARY')
        if binary:
            arch = os.path.basename(binary).split('-')[-1]
            if arch in known or not places:
                places.setdefault(arch, f'QEMU_TEST_QEMU_BINARY={binary}')

        if not places:
            raise _Unusable('unknown for which architecture: the test is in '
                            "no architecture's folder and "
                            'QEMU_TEST_QEMU_BINARY is not set; '
                            'declare the image with arch=', transient=True)
        if len(places) > 1:
            raise _Unusable(
                'ambiguous architecture: '
                + ', '.join(f'{arch} by {where}'
                            for arch, where in places.items())
                + '; declare the image with arch=, or run the binary of '
                  'the architecture')
        return next(iter(places)), demanded

    def _find(self) -> _Found:
        '''Look the image up in the registry and the override'''
        registry, error = _import_registry()
        if self.part not in PARTS:
            raise _Unusable(f"unknown part '{self.part}', expected one of: "
                            + ', '.join(PARTS))
        arch, demanded = self._find_arch()
        try:
            known: 'Registry' = registry.load(registry.DEFAULT)
            image = known.image(self.name)
        except error.RegistryError as e:
            raise _Unusable(e.message) from e
        except error.YAMLMissingError as e:
            raise _Unusable(f'{e.message}; {e.next_step}',
                            transient=True) from e
        try:
            target = image.target(arch)
        except error.RegistryError as e:
            # A generic test runs for all architectures, whatever there is
            raise _Unusable(e.message, transient=not demanded) from e

        override = os.getenv('QEMU_TEST_MKOSI_OVERRIDE')
        overridden = _overridden(override, self.name, target)
        if overridden is not None:
            return _Found(overridden, (), override)
        return _Found(target, known.stores, None)

    def _look_up(self) -> _Found:
        try:
            return self._find()
        except _Unusable as e:
            raise AssetError(self, e.msg, e.transient) from e

    # What is in the cache

    def _needed(self, found: _Found) -> List['Artefact']:
        parts = PARTS[:PARTS.index(self.part) + 1]
        return [found.target.artefacts[part] for part in parts]

    def _path(self, artefact: 'Artefact') -> Path:
        assert artefact.sha256 is not None
        return Path(self.cache_dir, artefact.sha256)

    def _problem(self, found: _Found) -> Optional[str]:
        '''What keeps the image from being used as it is, None if nothing'''
        if found.target.not_locked is not None:
            return f'cannot be built yet: {found.target.not_locked}'
        if not found.target.built:
            return 'not built yet, so the registry has no hashes of it'
        refresh = os.getenv('QEMU_TEST_REFRESH_CACHE') is not None
        for artefact in self._needed(found):
            problem = self._problem_of(artefact, refresh)
            if problem is not None:
                return f'{artefact.kind} {problem}'
        return None

    def _problem_of(self, artefact: 'Artefact',
                    refresh: bool = False) -> Optional[str]:
        assert artefact.sha256 is not None and artefact.size is not None
        return problem_of(self._path(artefact), artefact.sha256,
                          artefact.size, refresh)

    def _save_time_stamp_of(self, path: Path) -> None:
        '''Tell scripts/clean_functional_cache.py that the file is in use'''
        try:
            write_atomically(path.with_suffix('.stamp'),
                             f'{int(time.time())}')
        except OSError as e:
            # The cache may well be one that is only read here
            self.log.debug('No time stamp for %s: %s', path, e)

    # How it gets there

    def _advice(self, found: _Found, problem: str) -> str:
        build = f'scripts/mkosi-build.py {found.target.arch} {self.name}'
        if found.override is not None:
            return (f'{problem} (hashes from {found.override}); run '
                    f'{build} --local, or unset QEMU_TEST_MKOSI_OVERRIDE')
        if found.target.not_locked is not None:
            # The registry's reason says what to run
            return problem
        if not found.target.built:
            return f'{problem}; run {build} --update'
        return (f'{problem}; run {build}, '
                'or set QEMU_TEST_BUILD_IMAGES=1 to have it built')

    def _downloadable(self, found: _Found) -> bool:
        return bool(found.stores) and bool(self.fetchable())

    def _obtainable(self, found: _Found) -> bool:
        if not found.target.built or found.override is not None:
            return False
        return self._downloadable(found) or _may_build()

    def _obtain(self, found: _Found, problem: str) -> None:
        if not self._obtainable(found):
            raise AssetError(self, self._advice(found, problem),
                             transient=True)
        try:
            self.cache_dir.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise self._cache_error(e) from e

        self.log.info('Getting %s: %s', self.url, problem)
        if self._downloadable(found):
            try:
                self._download(found)
                return
            except AssetError as e:
                if not _may_build():
                    raise
                self.log.info('%s, building instead', e)
        self._build(found)

    def _download(self, found: _Found) -> None:
        for artefact in self._needed(found):
            if self._problem_of(artefact) is not None:
                self._download_file(artefact, found.stores)

    def _download_file(self, artefact: 'Artefact',
                       stores: Tuple[str, ...]) -> None:
        '''Try one store after the other; the hash decides, not the store'''
        for store in stores:
            asset = _StoreAsset(f'{store}/{artefact.sha256}',
                                artefact.sha256)
            try:
                asset.fetch()
                return
            except (AssetError, OSError) as e:
                error = self._explained(e, asset)
                self.log.error('%s', error)
        raise error

    def _explained(self, error: Exception,
                   asset: '_StoreAsset') -> AssetError:
        '''What is behind an error of a download, and what to do about it'''
        cause: Optional[BaseException] = error
        while cause is not None:
            if isinstance(cause, OSError) and cause.errno in CACHE_ERRORS:
                return self._cache_error(cause)
            cause = cause.__cause__ or cause.__context__
        if asset.actual not in (None, asset.hash):
            return AssetError(self, f'{asset.url} has SHA-256 '
                                    f'{asset.actual}, expected {asset.hash}')
        if isinstance(error, AssetError):
            return AssetError(self, f'{asset.url}: {error.msg}',
                              error.transient)
        # Another process downloaded the same file, and gave up
        return AssetError(self, f'{asset.url}: {error}', transient=True)

    def _cache_error(self, error: OSError) -> AssetError:
        return AssetError(
            self, f'cannot write to the cache {self.cache_dir}: '
                  f'{error.strerror or error}; mend that, or set '
                  'QEMU_TEST_CACHE_DIR to another folder', transient=True)

    def _build(self, found: _Found) -> None:
        '''
        Run the builder. Where several processes do so, one of them
        builds, and the others find that there is nothing left to do.
        '''
        command = [sys.executable, str(BUILDER), found.target.arch,
                   self.name]
        self.log.info('Building %s: %s', self.url, ' '.join(command))
        tail: Deque[str] = deque(maxlen=20)
        with subprocess.Popen(command, stdin=subprocess.DEVNULL,
                              stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, encoding='utf-8',
                              errors='replace') as process:
            assert process.stdout is not None
            for line in process.stdout:
                self.log.info('%s', line.rstrip())
                tail.append(line)
        if process.returncode != 0:
            raise AssetError(
                self, f'{" ".join(command)} ended with exit code '
                      f'{process.returncode}:\n{"".join(tail)}',
                transient=process.returncode in TRANSIENT_EXIT_CODES)

        problem = self._problem(found)
        if problem is not None:
            raise AssetError(self, f'built, but {problem}')


class _StoreAsset(Asset):
    '''A file of a store, which remembers the hash that it came with'''
    def __init__(self, url: str, hashsum: Optional[str]) -> None:
        super().__init__(url, hashsum)
        self.actual: Optional[str] = None

    def _check(self, cache_file: Path) -> bool:
        with open(cache_file, 'rb') as file:
            self.actual = sha256_of(file)
        return bool(self.actual == self.hash)


def _may_build() -> bool:
    return bool(os.environ.get('QEMU_TEST_BUILD_IMAGES', False))


def _arch_of_test(path: str, known: Tuple[str, ...]) -> Optional[str]:
    '''The architecture that a test is for, as its place or name tells'''
    folder, name = os.path.split(path)
    if os.path.basename(folder) in known:
        return os.path.basename(folder)
    for arch in known:
        if name.startswith(f'test_{arch}_'):
            return arch
    return None


def _overridden(path: Optional[str], name: str,
                target: 'Target') -> Optional['Target']:
    '''
    The target with the hashes of the override file, which the builder
    writes for an image that differs from the registry's. None if there
    is no such file, or if it is for other images.
    '''
    if not path:
        return None
    try:
        content = json.loads(Path(path).read_text(encoding='utf-8'))
        if content['schema'] != 1:
            raise ValueError(f'expected schema 1, found {content["schema"]}')
        entry = content['images'].get(name, {}).get(target.arch)
        if entry is None:
            return None
        artefacts = {kind: _overridden_artefact(
                               artefact, **entry['artefacts'][kind])
                     for kind, artefact in target.artefacts.items()}
        return replace(target, identity=str(entry['identity']),
                       artefacts=artefacts, not_locked=None)
    except OSError as e:
        raise _Unusable(f'QEMU_TEST_MKOSI_OVERRIDE={path}: '
                        f'{e.strerror}; unset it, or have the builder '
                        'write it with --local') from e
    except (AttributeError, KeyError, TypeError, ValueError,
            RecursionError) as e:
        raise _Unusable(f'QEMU_TEST_MKOSI_OVERRIDE={path}: not a file that '
                        f'scripts/mkosi-build.py --local wrote: {e!r}') from e


def _overridden_artefact(artefact: 'Artefact', sha256: str,
                         size: int) -> 'Artefact':
    # The hash becomes the name of a file, so it had better be a hash
    if not re.fullmatch('[0-9a-f]{64}', sha256):
        raise ValueError(f'expected a SHA-256, found {sha256!r}')
    return replace(artefact, sha256=sha256, size=int(size))


class MkosiTest(LinuxKernelTest):
    '''
    Facilitates tests that boot an image of the registry and talk to the
    shell that it gives: see the guest contract in
    docs/devel/testing/mkosi-images.rst.
    '''
    _boot: Optional['Boot'] = None
    _commands = 0

    def boot_image(self, image: MkosiAsset, append: str = '',
                   wait: bool = True) -> None:
        '''
        @params image: what to boot: an initrd by itself, or a disk, which
                       is attached and keeps nothing that is written to it
        @params append: further arguments for the kernel
        @params wait: whether to wait for the guest's shell

        Launches self.vm, which may have been given a machine, CPU, memory
        and devices before, with the kernel of @image
        '''
        path = self._fetch(image)
        boot = image.boot
        self._set_defaults(image.arch)
        arguments = list(boot.cmdline)
        if image.part == 'disk':
            arguments += boot.disk_cmdline
            self._attach(path, boot.disk_device)
        if append:
            arguments.append(append)
        self.vm.add_args('-append', ' '.join(arguments))

        self.launch_kernel(image.kernel.fetch(), image.initrd.fetch(),
                           console_index=_console_index(boot.console))
        if wait:
            self.wait_for_shell()

    def boot_firmware(self, image: MkosiAsset, wait: bool = True) -> None:
        '''
        @params image: a disk, which keeps nothing that is written to it
        @params wait: whether to wait for the guest's shell

        Launches self.vm, as boot_image() does, with nothing but UEFI
        firmware and the disk, which has kernel, initrd and command line.
        The machine is one that has firmware in flash: q35 or virt, if the
        test has not set one. Skips the test where there is no firmware
        '''
        self.assertEqual(image.part, 'disk', 'firmware boots from a disk')
        path = self._fetch(image)
        boot = image.boot
        if self._machine() is None:
            self._set_machine(MACHINES[image.arch])
        self._set_defaults(image.arch)
        self._add_flash(self._uefi(image.arch))
        # Before whatever else firmware can boot, such as the network
        self._attach(path, f'{boot.disk_device},bootindex=0')

        self.vm.set_console(console_index=_console_index(boot.console))
        self.vm.launch()
        if wait:
            self.wait_for_shell()

    def firmware(self) -> str:
        '''
        UEFI firmware for -bios, for the machine that the test has set.
        Skips the test where there is none
        '''
        return str(self._uefi(str(self.arch)).code)

    def best_accelerator(self) -> str:
        '''
        The accelerator for -accel: kvm where it runs code, or else tcg.
        Skips the test if the emulator has neither
        '''
        if kvm_works(str(self.qemu_bin)):
            return 'kvm'
        self.require_accelerator('tcg')
        return 'tcg'

    def _fetch(self, image: MkosiAsset) -> str:
        # Skips the test, as setUp() does for images of the class itself
        image.available()
        self._boot = image.boot
        return image.fetch()

    def _set_defaults(self, arch: str) -> None:
        '''What QEMU has no default for, or one that is of no use here'''
        if '-m' not in self.vm.args:
            self.vm.add_args('-m', MEMORY)
        if arch == 'aarch64':
            if self._machine() is None:
                self._set_machine(MACHINES[arch])
            if self.cpu is None and '-cpu' not in self.vm.args:
                self.vm.add_args('-cpu', 'max')

    def _machine(self) -> Optional[str]:
        '''The machine that the test has set'''
        name: Optional[str] = self.machine
        for option, value in zip(self.vm.args, self.vm.args[1:]):
            # Without a name in front, it only has settings
            named = re.match(r'(?:type=)?([\w.-]+)(?:,|$)', value)
            if option in ('-M', '-machine') and named:
                name = named.group(1)
        return name

    def _set_machine(self, name: str) -> None:
        self.set_machine(name)
        # The test may have had self.vm made by now
        self.vm.set_machine(name)

    def _uefi(self, arch: str) -> Uefi:
        machine = machine_type(str(self.qemu_bin), str(self._machine()))
        uefi = find_uefi(arch, machine, Path(self.build_file('pc-bios')))
        if uefi is None:
            self.skipTest(f'no UEFI firmware for machine {machine}, neither '
                          'of this QEMU build nor of the host; install '
                          f'{PACKAGES[arch]}')
        return uefi

    def _add_flash(self, uefi: Uefi) -> None:
        variables = self.scratch_file('uefi-variables.fd')
        shutil.copyfile(uefi.variables, variables)
        for file, mode in ((uefi.code, 'on'), (variables, 'off')):
            path = str(file).replace(',', ',,')
            self.vm.add_args('-drive', 'if=pflash,format=raw,'
                                       f'readonly={mode},file={path}')

    def wait_for_shell(self) -> None:
        '''Wait until an image that boots, or boots anew, is ready'''
        assert self._boot is not None
        self.wait_for_console_pattern(self._boot.ready)
        self.wait_for_console_pattern(self._boot.prompt)

    def _attach(self, path: str, device: str) -> None:
        file = path.replace(',', ',,')
        self.vm.add_args('-drive', 'if=none,id=mkosi-disk,format=qcow2,'
                                   f'snapshot=on,file={file}')
        self.vm.add_args('-device', f'{device},drive=mkosi-disk')

    def guest(self, command: str, timeout: float = 60.0) -> str:
        '''
        @params command: a line for the shell of the image that was booted
        @params timeout: how long it may take, in seconds

        Returns what it printed, without the last line's end. The test
        fails if it takes longer or if its exit status is not 0.
        '''
        assert self._boot is not None
        self._commands += 1
        mark = f'status-{self._commands}='
        # The quotes keep the echo of this line from looking like its result
        line = f'eval {shlex.quote(command)}; echo guest-"{mark}$?"'
        deadline = time.monotonic() + timeout
        try:
            exec_command(self, line)
            output = self._read_until(f'guest-{mark}', deadline)
            status = self._read_until(self._boot.prompt, deadline).split()[0]
        except socket.timeout:
            self.fail(f'"{command}" did not end within {timeout} s')
        finally:
            self.vm.console_socket.settimeout(None)

        output = output.partition(f'"{mark}$?"\r\n')[2]
        output = output.replace('\r\n', '\n').rstrip('\n')
        self.assertEqual(status, '0', f'exit status of "{command}" in the '
                                      f'guest, which printed: {output}')
        return output

    def _read_until(self, end: str, deadline: float) -> str:
        '''What the console says up to @end, which is left out'''
        log = logging.getLogger('console')
        wanted = end.encode()
        text = b''
        line = b''
        while not line.endswith(wanted):
            left = deadline - time.monotonic()
            self.vm.console_socket.settimeout(max(left, 0.001))
            char = self.vm.console_socket.recv(1)
            if not char:
                self.fail(f'the console ended, expected "{end}"')
            line += char
            if char == b'\n':
                shown = line.decode(errors='replace').rstrip()
                log.debug('%s', shown)
                if 'Kernel panic - not syncing' in shown:
                    self.fail(shown)
                text += line
                line = b''
        return (text + line[:-len(wanted)]).decode(errors='replace')


def _console_index(console: str) -> int:
    '''The number at the end of the name of the guest's console'''
    digits = re.search('[0-9]+$', console)
    return int(digits.group()) if digits else 0
