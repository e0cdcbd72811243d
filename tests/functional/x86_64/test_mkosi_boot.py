#!/usr/bin/env python3
#
# SPDX-License-Identifier: GPL-2.0-or-later
'''
Functional test of the debian-min image: what the guest contract of
docs/devel/testing/mkosi-images.rst promises to other tests
'''

import hashlib

from qemu_test import MkosiAsset, MkosiTest, exec_command


def power_off(test: MkosiTest) -> None:
    '''Have the guest end QEMU, which must end well'''
    exec_command(test, 'poweroff')
    test.vm.event_wait('SHUTDOWN', timeout=60.0,
                       match={'data': {'guest': True}})
    test.vm.wait()
    test.assertEqual(test.vm.exitcode(), 0)


class DebianMinInitrd(MkosiTest):
    '''The kernel and the initrd by themselves'''

    ASSET_IMAGE = MkosiAsset('debian-min', part='initrd')

    def test_shell(self) -> None:
        '''A root shell that tells how its commands end'''
        self.boot_image(self.ASSET_IMAGE, append='mkosi-test=1')

        self.assertEqual(self.guest('id -u'), '0')
        self.assertIn('mkosi-test=1', self.guest('cat /proc/cmdline'))
        self.assertEqual(self.guest('echo one; printf two'), 'one\ntwo')
        self.assertEqual(self.guest('sleep 60 &'), '')
        with self.assertRaisesRegex(self.failureException, 'exit status'):
            self.guest('false')

    def test_hotplug(self) -> None:
        '''A virtio disk that comes and goes'''
        self.set_machine('q35')
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
        power_off(self)


class DebianMinDisk(MkosiTest):
    '''The system on the disk'''

    ASSET_IMAGE = MkosiAsset('debian-min')

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
        power_off(self)


if __name__ == '__main__':
    MkosiTest.main()
