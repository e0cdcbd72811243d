# SPDX-License-Identifier: GPL-2.0-or-later
'''
Tests that boot an image built by scripts/mkosi-build.py, and talk to it
'''

import logging
import re
import shlex
import shutil
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING, Optional

from .cmd import exec_command
from .kvm import kvm_works
from .linuxkernel import LinuxKernelTest
from .mkosi import MkosiAsset
from .uefi import PACKAGES, Uefi, find_uefi, machine_type

if TYPE_CHECKING:
    from mkosi_build.registry import Boot


# What a guest gets if the test does not say how much: the images want half
MEMORY = '512M'

# The machine that firmware boots on if the test does not say which
MACHINES = {'x86_64': 'q35', 'aarch64': 'virt'}


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
