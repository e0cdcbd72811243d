#!/usr/bin/env python3
#
# SPDX-License-Identifier: GPL-2.0-or-later
'''Build the images of the functional tests: see --help.'''

import sys

from mkosi_build.cli import main

if __name__ == '__main__':
    sys.exit(main())
