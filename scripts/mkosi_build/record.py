# SPDX-License-Identifier: GPL-2.0-or-later
'''
Records hashes in a registry's text, and changes nothing else in it
'''

from dataclasses import replace
from pathlib import Path
from typing import Iterator, List, Mapping, Tuple

from .error import RegistryError
from .nodes import Node, Place, compose, listed
from .registry import DEFAULT, Target, parse


def record(text: str, image: str, arch: str, identity: str,
           artefacts: Mapping[str, Tuple[str, int]]) -> str:
    '''
    @params text: a registry's text
    @params image: name of the image whose hashes are recorded
    @params arch: architecture whose hashes are recorded
    @params identity: digest of the inputs that the artefacts come from
    @params artefacts: SHA-256 and size in bytes, by kind

    Returns the text with these values replaced, or inserted where they
    are not there yet; 'not-locked' is gone, since now it is. All else
    stays as it is, comments and order too.
    Raises RegistryError if @text is not a valid registry or cannot
    take these values
    '''
    path = Path(DEFAULT.name)
    before = parse(path, text)
    old = before.image(image)
    wanted = _with_hashes(old.target(arch), identity, artefacts)

    result = text
    for start, end, new in sorted(_edits(text, image, wanted), reverse=True):
        result = result[:start] + new + result[end:]

    # Text was edited, so only reading it back proves what it says now
    new_image = replace(old, targets={**old.targets, arch: wanted})
    images = {**before.images, image: new_image}
    if parse(path, result) != replace(before, images=images):
        raise RegistryError(
            f"{path}: In image '{image}', architecture '{arch}': "
            'the hashes cannot be put in place',
            next_step='write one key a line, without quotes or braces')
    return result


def _with_hashes(target: Target, identity: str,
                 artefacts: Mapping[str, Tuple[str, int]]) -> Target:
    if set(artefacts) != set(target.artefacts):
        raise RegistryError(
            f'hashes given for: {listed(artefacts)}; '
            f'expected for: {listed(target.artefacts)}')
    return replace(target, identity=identity, not_locked=None, artefacts={
        kind: replace(artefact, sha256=artefacts[kind][0],
                      size=artefacts[kind][1])
        for kind, artefact in target.artefacts.items()})


def _edits(text: str, image: str,
           wanted: Target) -> Iterator[Tuple[int, int, str]]:
    root = compose(text, Place('registry.yaml'))
    node = root.pairs['images'].pairs[image]
    node = node.pairs['architectures'].pairs[wanted.arch]

    if 'not-locked' in node.pairs:
        yield _removed(text, node.pairs['not-locked'])
    if 'identity' in node.pairs:
        yield _replaced(node.pairs['identity'], str(wanted.identity))
    else:
        yield _inserted(text, node, [('identity', str(wanted.identity))])

    for kind, artefact in wanted.artefacts.items():
        values = {'size': str(artefact.size), 'sha256': str(artefact.sha256)}
        there = node.pairs['artefacts'].pairs[kind]
        if 'size' in there.pairs:
            for key, value in values.items():
                yield _replaced(there.pairs[key], value)
        else:
            yield _inserted(text, there, list(values.items()))


def _replaced(node: Node, value: str) -> Tuple[int, int, str]:
    return node.start, node.end, value


def _removed(text: str, node: Node) -> Tuple[int, int, str]:
    '''From its key to the end of the last line of its value'''
    start = text.rfind('\n', 0, node.key_start) + 1
    # A value of several lines ends where the next key begins
    end = text.find('\n', len(text[:node.end].rstrip()))
    return start, len(text) if end < 0 else end + 1, ''


def _inserted(text: str, node: Node,
              values: List[Tuple[str, str]]) -> Tuple[int, int, str]:
    '''
    Into a mapping of scalars behind its last line, into a mapping of
    mappings before its first line and the comments there
    '''
    nodes = list(node.pairs.values())
    lines = [f'{key}: {value}' for key, value in values]
    scalars = nodes[-1].kind == 'scalar'
    if node.flow:
        place = nodes[-1].end if scalars else nodes[0].key_start
        lines = [''] + lines if scalars else lines + ['']
        return place, place, ', '.join(lines)
    # A comment may follow on the line behind which this goes
    place = text.find('\n', nodes[-1].end if scalars else node.key_start)
    place = len(text) if place < 0 else place
    start = nodes[0].key_start
    indent = '\n' + ' ' * (start - text.rfind('\n', 0, start) - 1)
    return place, place, indent.join([''] + lines)
