# SPDX-License-Identifier: GPL-2.0-or-later
'''
What it costs to publish images: bytes to keep, and seconds of runners, for
each image and architecture. Computed from the registry, the locks, the
lists of sources and the builds that are here; what nobody measured is not
made up.

A version is what is published for one identity: artefacts, locked packages
of the image and of the tools, sources. Stores keep an object that several
need once. How much the next version shares with this one depends on what
changes, so there are two bounds: only the artefacts are new, or everything.
'''

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, List, Optional, Sequence, Tuple

from . import lock as locks
from .build import RECORD, load_tool_locks
from .cache import Cache
from .lock import Lock
from .registry import Image, Registry, Target
from .report import Report

VERSIONS = 12
YEARS = 1
# The pipeline builds each version on two runners that share nothing
BUILDS = 2

# Size in bytes, by hash
_Objects = Dict[str, int]


@dataclass(frozen=True)
class Version:
    '''
    What is published of an image for one architecture. @sources is None,
    and so is @seconds of a build, where nothing here says it.
    '''
    image: str
    arch: str
    artefacts: _Objects
    packages: _Objects
    tools: _Objects
    sources: Optional[_Objects]
    seconds: Optional[float]

    @property
    def objects(self) -> _Objects:
        '''All of them.'''
        return {**self.artefacts, **self.packages, **self.tools,
                **(self.sources or {})}


def _packages(lock: Lock) -> _Objects:
    return {package.sha256: package.size for package in lock.packages}


def _sources(used: Sequence[Lock], cache: Cache) -> Optional[_Objects]:
    '''
    Of the lists that were made of the locks @used, by --publish of all and
    by --sources of images': hash, size and more. None where one was not.
    '''
    found: _Objects = {}
    for lock in used:
        path = cache.root / 'sources' / f'{lock.digest}.list'
        try:
            lines = path.read_text(encoding='utf-8').splitlines()
            found.update({sha256: int(size) for sha256, size, *_ in
                          (line.split() for line in lines)})
        except (OSError, ValueError):
            return None
    return found


def _seconds(folder: Path) -> Optional[float]:
    '''How long the build in @folder took, without fetching.'''
    try:
        seconds = json.loads((folder / RECORD).read_bytes())['seconds']
        return float(seconds)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def version(registry: Registry, image: Image, target: Target,
            cache: Cache, tools: Sequence[Lock]) -> Version:
    '''
    What the registry's version of @image costs; @tools are all locks of
    the tools. Raises LockError.
    '''
    lock = locks.load(registry.path.parent / image.definition
                      / f'{target.arch}.lock')
    tool_packages: _Objects = {}
    for tool_lock in tools:
        tool_packages.update(_packages(tool_lock))
    return Version(
        image.name, target.arch,
        {artefact.sha256: artefact.size or 0
         for artefact in target.artefacts.values() if artefact.sha256},
        _packages(lock), tool_packages, _sources([lock, *tools], cache),
        _seconds(cache.images / image.name / target.arch
                 / str(target.identity)))


def _megabytes(size: Optional[float]) -> str:
    return 'not known here' if size is None else f'{size / 1e6:.1f} MB'


def _size(objects: Optional[_Objects]) -> Optional[int]:
    return None if objects is None else sum(objects.values())


def _of_time(new: int, everything: int, count: int) -> Tuple[int, int]:
    '''The bounds, for @count versions of which the first is all new.'''
    return everything + (count - 1) * new, count * everything


def tell(registry: Registry, chosen: Sequence[Tuple[Image, Target]],
         cache: Cache, report: Report, versions: int = VERSIONS,
         years: int = YEARS) -> None:
    '''
    Tell the costs of the @chosen images that are recorded, with so many
    @versions a year for so many @years. Raises LockError.
    '''
    tools = list(load_tool_locks(registry).values())
    count = versions * years
    found: List[Version] = []
    for image, target in chosen:
        if target.built:
            found.append(version(registry, image, target, cache, tools))
            _tell_one(found[-1], count, report)
        else:
            report.event('skipped', f'{image.name} {target.arch}: left out: '
                         'not recorded yet', image=image.name,
                         arch=target.arch, reason='not recorded yet')
    _tell_all(found, versions, years, report)


def _tell_all(found: Sequence[Version], versions: int, years: int,
              report: Report) -> None:
    count = versions * years
    new: _Objects = {}
    everything: _Objects = {}
    for one in found:
        new.update(one.artefacts)
        everything.update(one.objects)
    least, most = _of_time(sum(new.values()), sum(everything.values()), count)
    text = (f'all together, what is shared counted once: a version '
            f'{_megabytes(sum(everything.values()))}; {versions} versions a '
            f'year for {years} years: {least / 1e9:.2f} to '
            f'{most / 1e9:.2f} GB, if only artefacts change, or everything')
    if any(one.sources is None for one in found):
        text += ('\nwithout the sources that are not known here; --publish '
                 'gathers them, those of the tools, too')
    measured = [one.seconds for one in found if one.seconds is not None]
    text += '\nrunners: ' + (
        'not measured here: no build is in this cache' if not measured else
        f'{sum(measured) * BUILDS * count / 3600:.2f} h for {len(measured)} '
        f'of {len(found)} images, of which each version is built {BUILDS} '
        'times')
    report.event(
        'costs', text, version=sum(everything.values()), versions=versions,
        years=years, least=least, most=most, images=len(found),
        measured=len(measured),
        runner_seconds=round(sum(measured) * BUILDS * count, 1))


def _tell_one(one: Version, count: int, report: Report) -> None:
    least, most = _of_time(sum(one.artefacts.values()),
                           sum(one.objects.values()), count)
    runner = None if one.seconds is None else one.seconds * BUILDS
    report.event(
        'cost', '\n'.join([
            f'{one.image} {one.arch}',
            f'    artefacts  {_megabytes(_size(one.artefacts))}',
            f'    packages   {_megabytes(_size(one.packages))}',
            f'    tools      {_megabytes(_size(one.tools))}',
            f'    sources    {_megabytes(_size(one.sources))}',
            f'    in all     {least / 1e9:.2f} to {most / 1e9:.2f} GB',
            '    runners    ' + (
                'not measured here' if runner is None else
                f'{runner:.0f} s a version, {runner * count / 3600:.2f} h')]),
        image=one.image, arch=one.arch, artefacts=_size(one.artefacts),
        packages=_size(one.packages), tools=_size(one.tools),
        sources=_size(one.sources),
        version=sum(one.objects.values()), least=least, most=most,
        build_seconds=one.seconds,
        runner_seconds=None if runner is None else round(runner * count, 1))
