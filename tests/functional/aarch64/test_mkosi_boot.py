#!/usr/bin/env python3
#
# SPDX-License-Identifier: GPL-2.0-or-later
'''Functional tests of the images for aarch64'''

import mkosi_boot
from qemu_test import MkosiAsset


class DebianMinInitrd(mkosi_boot.InitrdTests):
    '''debian-min without its disk'''
    ASSET_IMAGE = MkosiAsset('debian-min', part='initrd')


class DebianMinDisk(mkosi_boot.DiskTests):
    '''debian-min'''
    ASSET_IMAGE = MkosiAsset('debian-min')


class FedoraMinInitrd(mkosi_boot.InitrdTests):
    '''fedora-min without its disk'''
    ASSET_IMAGE = MkosiAsset('fedora-min', part='initrd')


class FedoraMinDisk(mkosi_boot.DiskTests):
    '''fedora-min'''
    ASSET_IMAGE = MkosiAsset('fedora-min')


if __name__ == '__main__':
    mkosi_boot.BootTest.main()
