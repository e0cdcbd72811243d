# SPDX-License-Identifier: GPL-2.0-or-later
'''
Runs rows of the matrix: the tests that use our images, and qemu-img, on the
QEMU of each host root, several rows at a time. A row that fails or hangs
does not hold up the others.
'''

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Dict, List, Mapping, Optional, Sequence

from . import hosts, override, qemu_img, suite
from .cache import Cache, mark_used
from .differences import Version
from .error import BuildError, FetchError, InputError
from .hosts import Host, Root, Roots
from .qemu_img import Observed
from .registry import Registry
from .suite import Outcome

TREE = Path(__file__).resolve().parents[2]

# What the checks of it are called among the tests
QEMU_IMG = 'qemu-img'


@dataclass
class Found:
    '''
    What one row showed, before it is judged: @state and @reason are set if
    it could not be run to its end.
    '''
    host: Host
    root: Optional[Root] = None
    version: Optional[Version] = None
    images: Optional[Observed] = None
    outcomes: List[Outcome] = field(default_factory=list)
    attempts: int = 1
    seconds: float = 0.0
    state: str = ''
    reason: str = ''


# -- Running ----------------------------------------------------------------

class Runner:
    '''
    Runs rows in the folder @work: the tests whose names match one of the
    @patterns, all if there is none, and the checks of qemu-img if there is
    a @reference. A row may take @timeout seconds.
    '''
    def __init__(self, roots: Roots, work: Path, timeout: float,
                 allow_newer: bool) -> None:
        self.roots = roots
        self.report = roots.builder.report
        self.work = work
        self.timeout = timeout
        self.allow_newer = allow_newer
        self.patterns: List[str] = []
        self.reference: Optional['Reference'] = None
        self.stop = threading.Event()

    def wants(self, test: str) -> bool:
        '''Whether the @test was asked for.'''
        return not self.patterns or any(fnmatchcase(test, pattern)
                                        for pattern in self.patterns)

    def run(self, chosen: Sequence[Host], limit: int) -> List[Found]:
        '''What each of the rows showed, @limit of them at a time.'''
        with ThreadPoolExecutor(limit) as threads:
            futures = [threads.submit(self._row, host) for host in chosen]
            try:
                return [future.result() for future in futures]
            except BaseException:
                self.stop.set()
                raise

    def _row(self, host: Host) -> Found:
        started = time.monotonic()
        found = Found(host)
        try:
            self._fill(found, started + self.timeout)
        except FetchError as e:
            found.state, found.reason = 'unreachable', e.message
        except BuildError as e:
            found.state, found.reason = 'failed', e.message
        except TimeoutError as e:
            found.state = 'timeout'
            found.reason = f'took more than {self.timeout:.0f} s, up to {e}'
        except Exception as e:   # pylint: disable=broad-except
            # The other rows go on
            found.state, found.reason = 'failed', repr(e)
        found.seconds = time.monotonic() - started
        self.report.event(
            'row', f'{found.seconds:7.1f}s {host.name}: '
            + (f'{found.state}: {found.reason}' if found.state else
               f'ran on QEMU {found.version}'), row=host.name,
            state=found.state, reason=found.reason)
        return found

    def _fill(self, found: Found, deadline: float) -> None:
        host = found.host
        if self.stop.is_set():
            raise TimeoutError('an interruption')
        found.root = self.roots.build(host, self.allow_newer)
        folder = self.work / host.name
        binaries = found.root.binaries(folder / 'bin')
        run = qemu_img.program([str(binaries.qemu_img)])
        found.version = qemu_img.version_of(run)
        if self.reference:
            (folder / 'qemu-img').mkdir()
            found.images = qemu_img.observe(
                run, self.reference.run, self.reference.samples,
                self.reference.disks, folder / 'qemu-img')
        for arch in binaries.emulators:
            for test in suite.find_tests(TREE, arch):
                if self.wants(test):
                    self._test(found, test, binaries, deadline)
                if time.monotonic() > deadline:
                    raise TimeoutError(test)

    def _test(self, found: Found, test: str, binaries: suite.Binaries,
              deadline: float) -> None:
        '''A test that fails is run once more, in case it was the host.'''
        assert found.root
        for attempt in (1, 2):
            # What is in use is not pruned
            mark_used(found.root.folder)
            outcome = suite.run_test(
                TREE, test, binaries,
                self.work / found.host.name / f'tests-{attempt}',
                deadline, os.environ, self.stop)
            failed = outcome.count('failed')
            found.attempts = max(found.attempts, attempt)
            self.report.event(
                'test', f'{outcome.seconds:7.1f}s {found.host.name}: {test}: '
                f'{outcome.count("passed")} passed, {failed} failed, '
                f'{outcome.count("skipped")} skipped',
                row=found.host.name, test=test, attempt=attempt)
            if not failed or time.monotonic() > deadline:
                break
        found.outcomes.append(outcome)


@dataclass(frozen=True)
class Reference:
    '''
    The baseline's own qemu-img, that of the locked tools, and what it made
    of samples; our @disks by name, and what it says of all of them.
    '''
    run: qemu_img.Run
    samples: Path
    disks: Mapping[str, Path]
    said: Observed


def make_reference(roots: Roots, work: Path,
                   allow_newer: bool = False) -> Reference:
    '''Samples for all rows, in the new folder @work.'''
    work.mkdir(parents=True)
    tree = roots.tools(allow_newer)
    builder = roots.builder
    run = qemu_img.program([str(hosts.wrap(
        tree, work / 'qemu-img', '/usr/bin/qemu-img'))])
    disks = find_disks(builder.cache, roots.registry)
    samples = work / 'samples'
    own = work / 'own'
    samples.mkdir()
    own.mkdir()
    with builder.report.stage('samples of images'):
        qemu_img.samples(run, samples)
        said = qemu_img.observe(run, run, samples, disks, own)
    return Reference(run, samples, disks, said)


def find_disks(cache: Cache, registry: Registry) -> Dict[str, Path]:
    '''
    The disks of our images, by image and architecture. Raises InputError
    for one that is not built.
    '''
    local = (override.load(cache) if os.getenv('QEMU_TEST_MKOSI_OVERRIDE')
             else {})
    found = {}
    for image in registry.images.values():
        for arch, target in image.targets.items():
            digest = target.artefacts['disk'].sha256
            try:
                digest = local[image.name][arch]['artefacts']['disk'][
                    'sha256']
            except (KeyError, TypeError):
                # The registry's, then
                pass
            if digest is None:
                continue
            path = cache.assets / digest
            if not path.is_file():
                raise InputError(f'{image.name} {arch} is not built: no '
                                 f'{path}', next_step='scripts/'
                                 f'mkosi-build.py {arch} {image.name}')
            found[f'{image.name}-{arch}'] = path
    return found
