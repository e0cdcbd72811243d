# SPDX-License-Identifier: GPL-2.0-or-later
'''
What the guest contract of docs/devel/testing/mkosi-images.rst promises to
other tests, for each image and architecture

A test has classes of its own with the images. It imports this module and
not the classes, for they would be run as tests.
'''

import gzip
import hashlib
import struct
from pathlib import Path
from typing import Dict

from qemu_test import MkosiAsset, MkosiTest, exec_command


class BootTest(MkosiTest):
    '''What the tests of an image have in common'''

    ASSET_IMAGE: MkosiAsset
    MACHINES = {'x86_64': 'q35', 'aarch64': 'virt'}

    def power_off(self) -> None:
        '''Have the guest end QEMU, which must end well'''
        exec_command(self, 'poweroff')
        self.vm.event_wait('SHUTDOWN', timeout=60.0,
                           match={'data': {'guest': True}})
        self.vm.wait()
        self.assertEqual(self.vm.exitcode(), 0)


class InitrdTests(BootTest):
    '''The kernel and the initrd by themselves'''

    def test_shell(self) -> None:
        '''A root shell that tells how its commands end'''
        # All that the contract asks for
        self.vm.add_args('-m', '256M')
        self.boot_image(self.ASSET_IMAGE, append='mkosi-test=1')

        self.assertEqual(self.guest('id -u'), '0')
        self.assertEqual(self.guest('uname -m'), self.arch)
        self.assertIn('mkosi-test=1', self.guest('cat /proc/cmdline'))
        self.assertEqual(self.guest('echo one; printf two'), 'one\ntwo')
        self.assertEqual(self.guest('sleep 60 &'), '')
        with self.assertRaisesRegex(self.failureException, 'exit status'):
            self.guest('false')

    def test_cpus(self) -> None:
        '''Two processors of the best model that the emulator has'''
        self.vm.add_args('-cpu', 'max', '-smp', '2')
        self.boot_image(self.ASSET_IMAGE)
        self.assertEqual(self.guest('nproc'), '2')

    def test_hotplug(self) -> None:
        '''A virtio disk that comes and goes'''
        self.set_machine(self.MACHINES[self.arch])
        self.vm.add_args('-device', 'pcie-root-port,id=slot1,slot=1')
        self.boot_image(self.ASSET_IMAGE)
        self.guest('test ! -e /sys/block/vda')

        self.vm.cmd('blockdev-add', driver='null-co', node_name='disk',
                    size=1 << 30)
        self.vm.cmd('device_add', driver='virtio-blk-pci', drive='disk',
                    id='hotplugged', bus='slot1')
        self.guest('until test -e /sys/block/vda; do sleep 0.2; done')
        self.assertEqual(self.guest('cat /sys/block/vda/size'),
                         str((1 << 30) // 512))

        self.vm.cmd('device_del', id='hotplugged')
        self.vm.event_wait('DEVICE_DELETED', timeout=30.0,
                           match={'data': {'device': 'hotplugged'}})
        self.guest('while test -e /sys/block/vda; do sleep 0.2; done')

    def test_poweroff(self) -> None:
        '''The guest switches itself off'''
        self.boot_image(self.ASSET_IMAGE)
        self.power_off()


class DiskTests(BootTest):
    '''The system on the disk'''

    def test_snapshot(self) -> None:
        '''What is written to the disk is gone with the virtual machine'''
        self.boot_image(self.ASSET_IMAGE)
        self.guest('grep "^/dev/[^ ]* / " /proc/mounts')
        self.guest('test ! -e /root/written')
        self.guest('echo text > /root/written && sync')

        self.vm.shutdown()
        self.vm.launch()
        self.wait_for_shell()
        self.guest('test ! -e /root/written')

    def test_network(self) -> None:
        '''A file that the guest serves arrives as it is'''
        self.require_netdev('user')
        self.vm.add_args('-netdev', 'user,id=net,'
                                    'hostfwd=tcp:127.0.0.1:0-:8080')
        self.vm.add_args('-device', 'virtio-net-pci,netdev=net')
        self.boot_image(self.ASSET_IMAGE)

        self.guest('dhclient eth0')
        self.assertIn('10.0.2.15/24', self.guest('ip -brief address'))
        self.guest('cd /tmp')
        self.guest('seq 1 200000 > numbers')
        numbers = ''.join(f'{n}\n' for n in range(1, 200001))
        digest = hashlib.sha256(numbers.encode()).hexdigest()
        self.assertEqual(self.guest('sha256sum < numbers').split()[0],
                         digest)
        self.check_http_download('/numbers', digest)

    def test_poweroff(self) -> None:
        '''The guest switches itself off'''
        self.boot_image(self.ASSET_IMAGE)
        self.power_off()

    def test_firmware(self) -> None:
        '''UEFI firmware boots the same from the disk by itself'''
        self.boot_firmware(self.ASSET_IMAGE)
        self.guest('test -d /sys/firmware/efi')
        self.guest('grep "^/dev/[^ ]* / " /proc/mounts')
        self.assertEqual(self.guest('cat /proc/cmdline'), self.cmdline())
        self.power_off()

    def test_uki(self) -> None:
        '''What firmware boots is the kernel and the initrd of the image'''
        copy = Path(self.scratch_file('uki'))
        with open(copy, 'wb') as file:
            file.truncate(1 << 27)
        self.vm.add_args('-drive', f'if=none,id=uki,format=raw,file={copy}',
                         '-device', 'virtio-blk-pci,drive=uki,serial=uki')
        self.boot_image(self.ASSET_IMAGE)
        self.guest('mount -o ro PARTLABEL=esp /sysroot')
        self.guest('disk=$(grep -lx uki /sys/block/*/serial | cut -d/ -f4)')
        self.guest('cat /sysroot/EFI/BOOT/BOOT*.EFI > /dev/$disk && sync')

        found = sections(copy.read_bytes())
        image = self.ASSET_IMAGE
        kernel = Path(image.kernel.fetch()).read_bytes()
        if kernel.startswith(b'\x1f\x8b'):
            kernel = gzip.decompress(kernel)
        self.assertEqual(digest_of(found['.linux']), digest_of(kernel))
        self.assertEqual(digest_of(found['.initrd']), image.initrd.hash)
        self.assertEqual(found['.cmdline'].decode().rstrip('\0'),
                         self.cmdline())

    def cmdline(self) -> str:
        '''The command line with which the image boots from its disk'''
        boot = self.ASSET_IMAGE.boot
        return ' '.join((*boot.cmdline, *boot.disk_cmdline))


def digest_of(data: bytes) -> str:
    '''Its SHA-256'''
    return hashlib.sha256(data).hexdigest()


def sections(program: bytes) -> Dict[str, bytes]:
    '''The sections of an EFI program, by name'''
    header, = struct.unpack_from('<I', program, 0x3c)
    count, = struct.unpack_from('<H', program, header + 6)
    optional, = struct.unpack_from('<H', program, header + 20)
    found = {}
    for number in range(count):
        name, size, _, _, start = struct.unpack_from(
            '<8s4I', program, header + 24 + optional + 40 * number)
        found[name.rstrip(b'\0').decode()] = program[start:start + size]
    return found
