# SPDX-License-Identifier: GPL-2.0-or-later
'''
Running a single program of the tools tree: it sees the tree, one folder to
work in, and nothing else of this host, neither its files nor its network.
'''

import sys
from pathlib import Path
from typing import Sequence

from . import command

# mkosi's own program for this, in the tools tree
SANDBOX = 'usr/lib/python3/dist-packages/mkosi/sandbox.py'
# The folder's name in there, so that no path of this host gets into a file
FOLDER = '/work'


def run(tree: Path, program: Sequence[str], folder: Path, log: Path) -> int:
    '''
    Run @program, a command line, of the tools @tree in @folder, which is
    /work to it, its output in the file @log. Returns its return code.
    '''
    return command.run_isolated([
        sys.executable, str(tree / SANDBOX),
        '--ro-bind', str(tree / 'usr'), '/usr',
        '--ro-bind', str(tree / 'etc'), '/etc',
        *(word for name in ('bin', 'sbin', 'lib', 'lib64')
          for word in ('--symlink', f'usr/{name}', f'/{name}')),
        '--tmpfs', '/tmp', '--dev', '/dev', '--proc', '/proc',
        '--bind', str(folder), FOLDER, '--chdir', FOLDER,
        '--', *program], log, network=False, env={'HOME': '/tmp'})
