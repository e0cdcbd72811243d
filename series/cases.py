# SPDX-License-Identifier: GPL-2.0-or-later
'''
Reads from the text of a functional test what each case of it fetches, and
whether it runs with KVM only.  Nothing is imported or run.

A case is a method of a class; what it uses is what it, or a method that it
calls, says of self: in its own class or in one that is named as a base, of
the same file or of one that the test imports.
'''

import ast
from dataclasses import dataclass
from typing import (Dict, Iterator, List, Mapping, Optional, Sequence, Tuple,
                    Union)

from .error import SeriesError


@dataclass(frozen=True)
class Download:
    '''A file of somebody's server; @digest is its hash.'''
    url: str
    digest: str


@dataclass(frozen=True)
class Image:
    '''An image of the registry, up to and with its @part.'''
    name: str
    part: str


Declared = Union[Download, Image]


@dataclass(frozen=True)
class Case:
    '''One method of a test.'''
    name: str
    assets: Tuple[Declared, ...]
    wants_kvm: bool

    @property
    def on_images(self) -> bool:
        '''Whether it fetches nothing but images.'''
        return bool(self.assets) and all(isinstance(asset, Image)
                                         for asset in self.assets)


def imports(text: str) -> List[str]:
    '''The modules that the test @text takes names from.'''
    return [node.module for node in ast.walk(ast.parse(text))
            if isinstance(node, ast.ImportFrom) and node.module]


def _string(node: Optional[ast.AST], known: Mapping[str, str],
            where: str) -> str:
    '''The text that @node stands for.  Raises SeriesError.'''
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return (_string(node.left, known, where)
                + _string(node.right, known, where))
    if isinstance(node, ast.JoinedStr):
        return ''.join(_string(part, known, where) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        return _string(node.value, known, where)
    if isinstance(node, ast.Name) and node.id in known:
        return known[node.id]
    raise SeriesError(f'{where}:{getattr(node, "lineno", 0)}: expected text '
                      'in the declaration of an asset, found '
                      f'{ast.dump(node) if node else "none"}')


def _constants(body: Sequence[ast.stmt],
               known: Mapping[str, str]) -> Dict[str, str]:
    '''Names that stand for texts: those @known and those of @body.'''
    found = dict(known)
    for name, value in _assigned(body):
        try:
            found[name] = _string(value, found, '')
        except SeriesError:
            pass
    return found


def _assigned(body: Sequence[ast.stmt]) -> Iterator[Tuple[str, ast.expr]]:
    for node in body:
        if isinstance(node, ast.Assign) \
                and isinstance(node.targets[0], ast.Name):
            yield node.targets[0].id, node.value


def _asset(call: ast.expr, known: Mapping[str, str],
           where: str) -> Optional[Declared]:
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
        return None
    given: Dict[Union[int, str, None], ast.expr] = dict(enumerate(call.args))
    given.update({keyword.arg: keyword.value for keyword in call.keywords})
    if call.func.id == 'Asset':
        return Download(_string(given.get(0, given.get('url')), known, where),
                        _string(given.get(1, given.get('hashsum')), known,
                                where))
    if call.func.id == 'MkosiAsset':
        part = given.get(2, given.get('part'))
        return Image(_string(given.get(0, given.get('name')), known, where),
                     _string(part, known, where) if part else 'disk')
    return None


class _Class:
    '''A class with those of its bases that are known.'''

    def __init__(self, node: ast.ClassDef, bases: Sequence['_Class'],
                 known: Mapping[str, str], where: str) -> None:
        self.assets: Dict[str, Declared] = {}
        self.methods: Dict[str, ast.FunctionDef] = {}
        for base in reversed(bases):
            self.assets.update(base.assets)
            self.methods.update(base.methods)
        known = _constants(node.body, known)
        for name, value in _assigned(node.body):
            asset = _asset(value, known, where)
            if name.startswith('ASSET_') and asset:
                self.assets[name] = asset
        self.own = [item for item in node.body
                    if isinstance(item, ast.FunctionDef)]
        self.methods.update({method.name: method for method in self.own})

    def reach(self, name: str) -> List[ast.FunctionDef]:
        '''The method @name and all that it calls, and setUp().'''
        found: List[ast.FunctionDef] = []
        names = [name, 'setUp']
        while names:
            method = self.methods.get(names.pop(0))
            if method is None or method in found:
                continue
            found.append(method)
            names += _of_self(method)
        return found

    def case(self, name: str) -> Case:
        '''What the method @name is as a case.'''
        reached = self.reach(name)
        used = dict.fromkeys(self.assets[word] for method in reached
                             for word in _of_self(method)
                             if word in self.assets)
        return Case(name, tuple(used),
                    any(_refuses_tcg(method) for method in reached))


def _of_self(method: ast.FunctionDef) -> List[str]:
    return [node.attr for node in ast.walk(method)
            if isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name) and node.value.id == 'self']


def _refuses_tcg(method: ast.FunctionDef) -> bool:
    '''It requires KVM, or has a way to be skipped for want of it.'''
    for node in ast.walk(method):
        if not isinstance(node, ast.Call) or not node.args \
                or not isinstance(node.func, ast.Attribute):
            continue
        try:
            text = _string(node.args[0], {}, '')
        except SeriesError:
            continue
        if (node.func.attr == 'require_accelerator' and text == 'kvm'
                or node.func.attr == 'skipTest' and 'KVM' in text):
            return True
    return False


def read(text: str, where: str,
         libraries: Sequence[str] = ()) -> List[Case]:
    '''
    The cases of the test @text, in its order; @libraries are the texts of
    what it imports and @where is its name in messages.

    Raises SeriesError if it declares an asset in a way that is not
    understood.
    '''
    classes: Dict[str, _Class] = {}
    mine: List[_Class] = []
    for part in (*libraries, text):
        module = ast.parse(part)
        known = _constants(module.body, {})
        mine = []
        for node in module.body:
            if isinstance(node, ast.ClassDef):
                bases = [classes[base.id] for base in node.bases
                         if isinstance(base, ast.Name)
                         and base.id in classes]
                classes[node.name] = _Class(node, bases, known, where)
                mine.append(classes[node.name])
    return [one.case(method.name) for one in mine for method in one.own
            if method.name.startswith('test')]
