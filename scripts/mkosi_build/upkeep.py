# SPDX-License-Identifier: GPL-2.0-or-later
'''
What those ask for who keep the images up rather than use them: an option
each, with the function behind it.
'''

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Tuple

from . import (care, costs, hostile, links, plan, publish, sources, structure,
               verify)
from .build import Builder, Job
from .registry import Image, Registry, Target


@dataclass(frozen=True)
class Call:
    '''
    One call of the command.

    @params arguments: all that it was given
    @params chosen: the images that it was given, or all, with targets
    @params jobs: the function that prepares those that can be built
    '''
    arguments: argparse.Namespace
    builder: Builder
    registry: Registry
    chosen: Callable[[], List[Tuple[Image, Target]]]
    jobs: Callable[[], List[Job]]


def _cache(call: Call) -> None:
    care.show(call.registry, call.builder.cache, call.builder.report)


def _check_links(call: Call) -> None:
    links.check(call.registry, call.chosen(), call.builder.report)


def _costs(call: Call) -> None:
    costs.tell(call.registry, call.chosen(), call.builder.cache,
               call.builder.report,
               call.arguments.versions or costs.VERSIONS,
               call.arguments.years or costs.YEARS)


def _from_plan(call: Call) -> None:
    plan.follow(call.builder, call.arguments.from_plan, call.jobs())


def _plan(call: Call) -> None:
    made = plan.make(call.jobs())
    if call.arguments.json:
        call.builder.report.event('plan', '', plan=made)
    else:
        print(plan.render(made), end='')


def _prune(call: Call) -> None:
    care.prune(call.registry, call.builder.cache, call.builder.report,
               call.arguments.limit)


def _verify(call: Call) -> None:
    verify.verify(call.builder, call.jobs(), _conditions(call.arguments),
                  call.arguments.bisect)


def _conditions(arguments: argparse.Namespace) -> str:
    text: Optional[str] = arguments.conditions
    return hostile.ALL if text is None else text


class ModeOfFile(argparse.Action):
    '''A mode that takes a file, which is @arguments' under its name.'''

    def __call__(self, parser: argparse.ArgumentParser,
                 namespace: argparse.Namespace, values: Any,
                 option_string: Optional[str] = None) -> None:
        setattr(namespace, self.dest, Path(values))
        namespace.mode = self.option_strings[0][2:]


# Those of the modes below that take a file
WITH_FILE = ('from-plan',)

# By option: its help, and what it runs
MODES: Dict[str, Tuple[str, Callable[[Call], None]]] = {
    'cache': ('list what the caches hold, who refers to it, and what '
              '--prune would remove', _cache),
    'check-links': ('ask all stores and mirrors whether they still have '
                    'what the registry and the locks name', _check_links),
    'costs': ('what it costs to publish the images, in bytes and in '
              'seconds of runners', _costs),
    'from-plan': ('build what a saved plan says, if it is of this tree, and '
                  'compare with the bytes that it names', _from_plan),
    'inspect': (
        'check the structure of what was built, without mounting it: '
        'partitions, file systems, what firmware boots, kernel and initrd',
        lambda call: structure.inspect(call.builder, call.jobs())),
    'plan': ('print what a build would do, inputs by hash, and run nothing',
             _plan),
    'prune': ('remove from the caches what nothing refers to any longer',
              _prune),
    'publish': ('publish what was built, with its complete source, where '
                'QEMU_MKOSI_PUBLISH says',
                lambda call: publish.publish(call.builder, call.jobs())),
    'published': ('tell what is published, there or in the stores',
                  lambda call: publish.tell(call.builder, call.registry,
                                            call.jobs())),
    'sources': ('gather the complete source of what is in the images '
                '(not of the tools that build them)',
                lambda call: sources.tell(call.builder, call.jobs())),
    'verify': ('build twice from scratch, the second time under other '
               'conditions, and compare', _verify),
}


def add_options(parser: argparse.ArgumentParser) -> None:
    '''What some of the modes take beside their own option.'''
    parser.add_argument('--limit', metavar='SIZE', type=_size,
                        help='with --prune: if more than SIZE (like 2G) is '
                        'left, go on with packages and tools, which can be '
                        'fetched again')
    parser.add_argument('--bisect', action='store_true',
                        help='with --verify: find the condition that makes '
                        'bytes differ')
    parser.add_argument('--conditions', metavar='LIST',
                        help='with --verify: "all" that this host can, the '
                        'default; "none"; or some of '
                        f'{",".join(hostile.CONDITIONS)}')
    parser.add_argument('--versions', metavar='N', type=_count,
                        help='with --costs: publish N versions a year '
                        f'(default: {costs.VERSIONS})')
    parser.add_argument('--years', metavar='N', type=_count,
                        help='with --costs: keep them for N years '
                        f'(default: {costs.YEARS})')


def _size(text: str) -> int:
    try:
        return care.parse_size(text)
    except ValueError as e:
        raise argparse.ArgumentTypeError(
            f'expected a size like 500M or 2G, found {text!r}') from e


def _count(text: str) -> int:
    if not (text.isdecimal() and 1 <= int(text) <= 1000):
        raise argparse.ArgumentTypeError(
            f'expected a number from 1 to 1000, found {text!r}')
    return int(text)


def check_options(arguments: argparse.Namespace) -> str:
    '''What is wrong in a combination of @arguments, nothing if all is well.'''
    for option, mode in (('limit', 'prune'), ('versions', 'costs'),
                         ('years', 'costs')):
        if getattr(arguments, option) is not None and arguments.mode != mode:
            return f'--{option} goes with --{mode} alone'
    if arguments.mode in ('cache', 'prune') and arguments.images:
        return (f'--{arguments.mode} takes no images: it is for all of the '
                'caches')
    if arguments.mode == 'verify':
        hostile.parse(_conditions(arguments))
    elif arguments.bisect or arguments.conditions is not None:
        return '--bisect and --conditions go with --verify alone'
    return ''
