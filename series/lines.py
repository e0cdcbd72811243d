# SPDX-License-Identifier: GPL-2.0-or-later
'''
Counts the lines that a patch adds, and how many of them are code.

Code is what a reviewer has to think through: lines of Python, and of QEMU's
build and CI files, that are neither blank nor comment nor docstring.  Locks,
the registry, definitions of images and documents are no code.
'''

import ast
from dataclasses import dataclass
import difflib
import io
import tokenize
from typing import Mapping, Set

from .apply import LINK, Content


DATA = ('tests/functional/mkosi/',)
OTHER_CODE = ('meson.build', 'Makefile', 'Makefile.include', '.yml', '.sh')
_NO_CODE = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE,
            tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)


@dataclass(frozen=True)
class Count:
    '''Lines that are new: code, and all of them.'''
    code: int
    added: int


def _docstrings(text: str) -> Set[int]:
    found: Set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef,
                                 ast.AsyncFunctionDef)) or not node.body:
            continue
        first = node.body[0]
        if (isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)):
            found.update(range(first.lineno, (first.end_lineno or 0) + 1))
    return found


def code_lines(name: str, text: str) -> Set[int]:
    '''The numbers, from 1, of the lines of the file @name that are code.'''
    if name.startswith(DATA):
        return set()
    if name.endswith('.py'):
        try:
            return _python_lines(text)
        except (SyntaxError, tokenize.TokenError):
            # Whatever it is, it is for somebody to read
            return set(range(1, len(text.splitlines()) + 1))
    if name.endswith(OTHER_CODE):
        return {number for number, line in enumerate(text.splitlines(), 1)
                if line.strip() and not line.strip().startswith('#')}
    return set()


def _python_lines(text: str) -> Set[int]:
    found: Set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in _NO_CODE:
            found.update(range(token.start[0], token.end[0] + 1))
    return found - _docstrings(text)


def _added(old: str, new: str) -> Set[int]:
    matcher = difflib.SequenceMatcher(None, old.splitlines(),
                                      new.splitlines(), autojunk=False)
    return {number + 1 for tag, _, _, start, end in matcher.get_opcodes()
            if tag in ('insert', 'replace') for number in range(start, end)}


def count(old: Mapping[str, Content], new: Mapping[str, Content]) -> Count:
    '''What the files @new have more than @old.'''
    code = added = 0
    for name, content in new.items():
        if content.mode == LINK:
            continue
        text = content.data.decode('utf-8')
        numbers = _added(old[name].data.decode('utf-8') if name in old
                         else '', text)
        added += len(numbers)
        code += len(numbers & code_lines(name, text))
    return Count(code, added)
