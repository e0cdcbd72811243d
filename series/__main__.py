# SPDX-License-Identifier: GPL-2.0-or-later
'''The command: python -m series apply|check|run FILE|lint.'''

import argparse
import subprocess
import sys

from . import functional, lint
from .error import SeriesError


def main() -> int:
    '''Run the command line; returns the exit status.'''
    parser = argparse.ArgumentParser(
        prog='series', description='Apply this repository to a QEMU tree '
        '(QEMU_SRC=<path>, else a fetched one) and test it there.')
    commands = parser.add_subparsers(dest='command', required=True)
    commands.add_parser('apply', help='apply, and print where')
    commands.add_parser(
        'check', help='run the functional tests of the series; '
        'TESTS="func-x86_64-* ..." selects others, ALL=1 all of QEMU\'s')
    run = commands.add_parser('run', help='run one test file by hand')
    run.add_argument('file', help='tests/functional/<arch>/test_*.py')
    run.add_argument('args', nargs=argparse.REMAINDER,
                     help='for the test, as -v or Class.test_name')
    commands.add_parser('lint', help='flake8, mypy, pylint, checkpatch')
    args = parser.parse_args()
    try:
        if args.command == 'apply':
            print(functional.prepare().tree)
            return 0
        if args.command == 'check':
            return functional.check()
        if args.command == 'run':
            return functional.run_file(args.file, args.args)
        return lint.lint()
    except SeriesError as error:
        print(f'series: {error}', file=sys.stderr)
    except subprocess.CalledProcessError as error:
        print(f'series: {error}', file=sys.stderr)
    return 1


if __name__ == '__main__':
    sys.exit(main())
