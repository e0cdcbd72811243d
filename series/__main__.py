# SPDX-License-Identifier: GPL-2.0-or-later
'''
The command: python -m series
             apply|check|run FILE|lint|matrix|patches|verify|table
'''

import argparse
import subprocess
import sys

from . import before, commits, functional, lint, tree, verify
from .error import SeriesError


def show_tree() -> int:
    '''Apply, and print where.'''
    print(functional.prepare().tree)
    return 0


def patches() -> int:
    '''Make commits, write patches, and say where they are.'''
    source = tree.obtain(functional.BUILD / 'downloads', functional.say)
    made = commits.make(source, functional.BUILD / 'series/git')
    mails = commits.format_patches(made, functional.BUILD / 'series')
    print(commits.table(made))
    print(f'branch {commits.BRANCH} of {made.git}')
    for part in mails:
        print(f'{len(part) - 1} patches and a cover letter in '
              f'{part[0].parent}')
    return 0


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
    commands.add_parser('matrix', help='run scripts/mkosi-matrix.py in the '
                        'tree, with all that follows')
    commands.add_parser('patches', help='make commits of this repository '
                        'and write them as mail to build/series')
    proof = commands.add_parser(
        'verify', help='check that the patches apply, revert and pass, each '
        'by itself')
    proof.add_argument('trees', nargs='*', metavar='TREE',
                       help='QEMU trees (default: QEMU_SRC)')
    proof.add_argument('--thorough', action='store_true',
                       help='linters on each patch, QEMU\'s quick tests and '
                       'documentation before and after')
    commands.add_parser('table', help='run QEMU\'s tests that are on our '
                        'images before and after, and say what they fetch')
    # What follows it is another command's, which has options of its own
    words = sys.argv[1:]
    rows = words[1:] if words[:1] == ['matrix'] else []
    args = parser.parse_args(words[:-len(rows)] if rows else words)
    try:
        status: int = {
            'apply': show_tree,
            'check': functional.check,
            'run': lambda: functional.run_file(args.file, args.args),
            'matrix': lambda: functional.matrix(rows),
            'patches': patches,
            'table': before.main,
            'verify': lambda: verify.main(args.trees, args.thorough),
            'lint': lint.lint}[args.command]()
        return status
    except SeriesError as error:
        print(f'series: {error}', file=sys.stderr)
    except subprocess.CalledProcessError as error:
        print(f'series: {error}', file=sys.stderr)
    return 1


if __name__ == '__main__':
    sys.exit(main())
