#!/usr/bin/env python3
#
# SPDX-License-Identifier: GPL-2.0-or-later
'''Run the tests of the images on several QEMU: see --help.'''

import sys

from mkosi_build.matrix import main

if __name__ == '__main__':
    sys.exit(main())
