# SPDX-License-Identifier: GPL-2.0-or-later
'''
Runs the style checks that QEMU applies to such files: flake8, mypy --strict
and pylint over our Python, checkpatch over all that we add.

Files that import QEMU's test framework are checked inside the tree that the
series was applied to, with that tree's own pylintrc if it has one.
'''

import os
from pathlib import Path
import shutil
import subprocess
import sys
from typing import Dict, List, Optional

from . import edits, functional, tree
from .apply import LINK, ROOT, apply, diff, our_files


HERE = ('.gitlab-ci.d/mkosi-images.py', 'scripts/mkosi-build.py',
        'scripts/mkosi-matrix.py',
        'scripts/mkosi_build', 'series', 'tests/mkosi')


def _tool(name: str, *args: str) -> List[str]:
    return [sys.executable, '-m', name, *args]


def _passes(title: str, command: List[str], cwd: Path = ROOT,
            env: Optional[Dict[str, str]] = None,
            text: Optional[str] = None) -> bool:
    functional.say(f'lint: {title}')
    return subprocess.run(command, cwd=cwd, env={**os.environ, **(env or {})},
                          input=text, encoding='utf-8',
                          check=False).returncode == 0


def _scripts() -> List[str]:
    '''The scripts of definitions that are Python; no name says so.'''
    return [str(path.relative_to(ROOT)) for path in sorted(
        (ROOT / 'tests/functional/mkosi').glob('*/mkosi.*.d/*'))
        if path.read_bytes().startswith(b'#!/usr/bin/env python3\n')]


def _lint_here() -> bool:
    paths = [path for path in HERE if (ROOT / path).exists()] + _scripts()
    env = {'PYTHONPATH': str(ROOT / 'scripts'),
           'MYPYPATH': str(ROOT / 'scripts')}
    results = [
        _passes('flake8', _tool('flake8', *paths)),
        _passes('mypy', _tool('mypy', '--strict', '--scripts-are-modules',
                              *paths), env=env),
        _passes('pylint', _tool('pylint', '--score=n', *paths), env=env)]
    return all(results)


def _lint_functional(copy: Path, paths: List[str]) -> bool:
    config = f'--config={ROOT / "setup.cfg"}'
    pylintrc = copy / 'tests/functional/pylintrc'
    folders = os.pathsep.join(str(copy / name) for name in
                              ('python', 'tests/functional', 'scripts'))
    results = [
        _passes('flake8, functional tests', _tool('flake8', config, *paths),
                cwd=copy),
        # QEMU's framework has no type hints and re-exports implicitly
        _passes('mypy, functional tests',
                _tool('mypy', f'--config-file={ROOT / "setup.cfg"}',
                      '--strict', '--allow-untyped-calls',
                      '--implicit-reexport', '--follow-imports=silent',
                      # Tests of two architectures may have one name
                      '--explicit-package-bases', *paths),
                cwd=copy, env={'MYPYPATH': folders})]
    # QEMU 10 has no rules for them
    if pylintrc.is_file():
        results.append(_passes(
            'pylint, functional tests',
            _tool('pylint', '--score=n', f'--rcfile={pylintrc}', *paths),
            cwd=copy, env={'PYTHONPATH': folders}))
    return all(results)


def lint() -> int:
    '''Run all checks, print what they say; returns 0 if all pass.'''
    source = tree.obtain(functional.BUILD / 'downloads', functional.say)
    copy = functional.BUILD / f'qemu-{tree.version_of(source)}' / 'tree'
    changed = apply(source, copy, edits.load())
    ours = our_files()
    good = _lint_here()
    tests = [name for name in ours
             if name.startswith('tests/functional/')
             and name.endswith('.py')]
    if tests:
        good &= _lint_functional(copy, tests)
    if shutil.which('perl') and ours:
        # It looks for MAINTAINERS in a commit's list of files
        stat = ''.join(f' {name} | 1 +\n' for name in changed)
        # and would have a symbolic link name its licence
        patch = diff(source, {name: content for name, content
                              in changed.items() if content.mode != LINK})
        good &= _passes('checkpatch', [
            'perl', str(copy / 'scripts/checkpatch.pl'), '--no-tree',
            '--no-signoff', '--quiet', '-'],
            text=f'{stat}\n{patch}')
    if shutil.which('shellcheck'):
        good &= _passes('shellcheck',
                        ['shellcheck', 'series/setup.sh', 'series/built.sh',
                         '.ci/run'])
    functional.say('lint: ' + ('clean' if good else 'not clean'))
    return 0 if good else 1
