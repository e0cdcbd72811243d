# SPDX-License-Identifier: GPL-2.0-or-later
'''--costs: computed from what is there, and nothing else.'''

import io
import json
from typing import Any, Dict, List

import pytest

from fixtures_upkeep import KINDS, Upkeep, body, package, sha
from mkosi_build import build, cli, costs
from mkosi_build.error import UsageError
from mkosi_build.report import Report

pytest_plugins = ('fixtures_upkeep',)


def told(upkeep: Upkeep, versions: int = 12,
         years: int = 1) -> Dict[str, List[Dict[str, Any]]]:
    '''The events, by kind.'''
    stream = io.StringIO()
    costs.tell(upkeep.registry, upkeep.chosen, upkeep.cache,
               Report(True, stream), versions, years)
    events: Dict[str, List[Dict[str, Any]]] = {}
    for line in stream.getvalue().splitlines():
        event = json.loads(line)
        events.setdefault(event['event'], []).append(event)
    return events


def artefacts(*names: str) -> int:
    '''The bytes of all artefacts of @names.'''
    return sum(len(body(name + kind)) for name in names for kind in KINDS)


def packages(*names: str) -> int:
    '''The bytes of the packages @names.'''
    return sum(package(name).size for name in names)


def test_shared_once(upkeep: Upkeep) -> None:
    '''What several need is counted once, in each and all together.'''
    events = told(upkeep, versions=3, years=2)
    one, two = events['cost']
    assert one['artefacts'] == artefacts('one')
    assert one['packages'] == packages('one', 'common')
    assert one['tools'] == packages('hammer', 'common')
    assert one['version'] == artefacts('one') + packages('one', 'common',
                                                         'hammer')
    # Only artefacts are new, five times; or everything, six times
    assert one['least'] == one['version'] + 5 * artefacts('one')
    assert one['most'] == 6 * one['version']
    everything, = events['costs']
    assert everything['version'] == (
        artefacts('one', 'two') + packages('one', 'two', 'common', 'hammer'))
    assert everything['most'] == 6 * everything['version']
    assert everything['version'] < one['version'] + two['version']


def test_nothing_is_guessed(upkeep: Upkeep) -> None:
    '''What nobody has measured is said to be so.'''
    events = told(upkeep)
    one, _ = events['cost']
    assert (one['sources'], one['build_seconds'],
            one['runner_seconds']) == (None, None, None)
    assert 'not measured here' in one['text']
    assert 'not known here' in one['text']
    assert '--publish' in events['costs'][0]['text']
    # A record of before it had them
    upkeep.add_build('one')
    assert told(upkeep)['cost'][0]['build_seconds'] is None


def test_measured(upkeep: Upkeep) -> None:
    '''Of the record: each version is built twice.'''
    upkeep.add_build('one', seconds=50.5)
    events = told(upkeep, versions=10)
    assert events['cost'][0]['runner_seconds'] == 1010
    assert events['cost'][1]['runner_seconds'] is None
    everything, = events['costs']
    assert (everything['measured'], everything['images']) == (1, 2)
    assert everything['runner_seconds'] == 1010


def test_sources(upkeep: Upkeep) -> None:
    '''Those of the lists that --sources makes, the tools' too.'''
    folder = upkeep.cache.root / 'sources'
    folder.mkdir(parents=True)
    (folder / f'{upkeep.lock("one").digest}.list').write_text(
        f'{sha("a")} 1000 bash 5 bash.dsc\n'
        f'{sha("b")} 2000 bash 5 bash.tar unindexed\n'
        f'{sha("b")} 2000 dash 5 same.tar\n')
    assert told(upkeep)['cost'][0]['sources'] is None
    tools, = build.load_tool_locks(upkeep.registry).values()
    (folder / f'{tools.digest}.list').write_text(
        f'{sha("b")} 2000 bash 5 bash.tar\n{sha("c")} 10 c 1 c.dsc\n')
    one, two = told(upkeep)['cost']
    assert one['sources'] == 3010 and two['sources'] is None
    assert one['version'] == 3010 + artefacts('one') + packages(
        'one', 'common', 'hammer')


@pytest.mark.parametrize('arguments', [
    ['--versions', '3'], ['--years', '3'], ['--list', '--years', '3'],
    ['--costs', '--limit', '1G'], ['--costs', '--versions', '0'],
    ['--costs', '--versions', '-1'], ['--costs', '--years', 'x'],
    ['--costs', '--update-lock'], ['--costs', '--years', '1001'],
    ['--costs', 'debian-min', '--boot']])
def test_wrong_combination(arguments: List[str]) -> None:
    '''Refused before any work.'''
    with pytest.raises(UsageError):
        cli.parse_arguments(['x86_64', *arguments])
