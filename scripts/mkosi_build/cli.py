# SPDX-License-Identifier: GPL-2.0-or-later
'''
The command line: what a user may ask for, and the exit codes.
'''

import argparse
import os
import signal
import sys
from pathlib import Path
from typing import (Callable, List, NoReturn, Optional, Sequence,
                    Tuple)

from . import boot, lint, lock as locks, override, parallel
from . import provenance, registry as registries, update, upkeep
from .agreement import disagreement, over_budget
from .build import Builder, Job, Result, load_tool_locks, prepare, tools_folder
from .cache import Cache, host_error
from .error import BuildError, InputError, UsageError
from .registry import Image, Registry, Target
from .report import Report, nobody_listens
from .store import GoneError

# What a user calls
PROGRAM = Path(__file__).resolve().parents[1] / 'mkosi-build.py'

TOOLS = 'tools'
ALL = 'all'

DESCRIPTION = '''\
Build QEMU's test images, offline and from locked packages, and check that
they have the bytes that tests/functional/mkosi/registry.yaml names. What
was built lies in the cache of the functional tests, so that they find it.
'''

EPILOG = '''\
examples:
  %(prog)s x86_64                     build all images for x86_64
  %(prog)s all                        and for all other architectures
  %(prog)s x86_64 debian-min --boot   build one if need be, and boot it
  %(prog)s x86_64 --list              what there is, and in which state

after editing a definition:
  %(prog)s x86_64 debian-min --local         try it: build, let tests use it
  %(prog)s x86_64 debian-min --update-lock   if it needs other packages
  %(prog)s x86_64 debian-min --update        record the new hashes
  %(prog)s x86_64 debian-min --update-lock --update    both in one go

environment:
  QEMU_TEST_CACHE_DIR   QEMU's asset cache is in download/ there
                        (~/.cache/qemu)
  QEMU_MKOSI_DIR        packages, tools, builds, logs (~/.cache/qemu/mkosi)
  QEMU_MKOSI_MIRROR     package mirrors to ask first, separated by spaces
  QEMU_MKOSI_PUBLISH    where to publish: an absolute path or a URL
  QEMU_MKOSI_PUBLISH_TOKEN
                        the token for that: TOKEN or KIND:TOKEN

exit codes:
  0  done
  1  internal error
  2  wrong usage
  3  the registry, a lock or a definition is wrong, or they don't agree
  4  the host lacks a program, a permission or space
  5  a package can't be had
  6  mkosi failed, the image is broken, or does not boot
  7  other bytes than the registry names
  8  a store refuses what is published, or lacks it, or has other bytes
'''


class Parser(argparse.ArgumentParser):
    '''Usage errors as the other errors are shown.'''

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, next_step=f'{self.prog} --help')


def parse_arguments(argv: Optional[Sequence[str]]) -> argparse.Namespace:
    '''What the user asks for. Raises UsageError.'''
    parser = Parser(
        prog='scripts/mkosi-build.py', description=DESCRIPTION,
        epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('arch', metavar='ARCH',
                        choices=(*registries.ARCHITECTURES, ALL),
                        help='guest architecture: %(choices)s')
    parser.add_argument('images', metavar='IMAGE', nargs='*',
                        help='images to take (default: all)')
    modes = parser.add_mutually_exclusive_group()

    def mode(name: str, text: str) -> None:
        modes.add_argument(f'--{name}', dest='mode', action='store_const',
                           const=name, help=text)

    mode('list', 'list the images and their state')
    mode('check', 'check registry, locks and definitions, without building')
    mode('update', 'build, and record hashes and sizes in the registry')
    mode('local', 'build what the tree has now, compare with nothing, let '
         'tests use it through an override file')
    mode('allow-newer', 'if a locked package is gone from every mirror, '
         'build with newer ones, for this machine alone')
    for name, (text, _) in upkeep.MODES.items():
        if name in upkeep.WITH_FILE:
            modes.add_argument(f'--{name}', metavar='FILE', help=text,
                               action=upkeep.ModeOfFile)
        else:
            mode(name, text)
    upkeep.add_options(parser)
    parser.add_argument('--update-lock', action='store_true',
                        help='resolve packages anew, signatures checked, '
                        'and write the locks; IMAGE may be "tools"')
    parser.add_argument('--jobs', metavar='N', type=positive,
                        default=os.cpu_count() or 1,
                        help='build N images at once (default: %(default)s)')
    parser.add_argument('--boot', action='store_true',
                        help='boot what was built, one image, on this '
                        'terminal')
    parser.add_argument('--json', action='store_true',
                        help='tell events as JSON lines')
    arguments = parser.parse_intermixed_args(argv)
    if arguments.update_lock and arguments.mode not in (None, 'update',
                                                        'local'):
        parser.error(f'--update-lock can\'t be combined with '
                     f'--{arguments.mode}')
    builds_one = (len(arguments.images) == 1 and arguments.arch != ALL
                  and arguments.mode not in ('list', 'check', *upkeep.MODES)
                  and (arguments.mode or not arguments.update_lock))
    if arguments.boot and not builds_one:
        parser.error('--boot takes one image, and a build')
    problem = upkeep.check_options(arguments)
    if problem:
        parser.error(problem)
    return arguments


def positive(text: str) -> int:
    '''A number of at least 1, or else ValueError.'''
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


class Command:
    '''One call of the command, on one registry.'''

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.archs: Sequence[str] = (
            registries.ARCHITECTURES if arguments.arch == ALL
            else (arguments.arch,))
        self.names: List[str] = arguments.images
        self.limit: int = arguments.jobs
        self.report = Report(arguments.json)
        self.cache = Cache()
        self.builder = Builder(self.cache, self.report,
                               provenance.describe)
        self.registry: Registry = registries.load(registries.DEFAULT)
        self.upkeep = upkeep.Call(arguments, self.builder, self.registry,
                                  self.images, self.jobs)

    def run(self, update_lock: bool, mode: Optional[str]) -> List[Result]:
        '''Do what was asked for. Returns what was built, if it was here.'''
        if update_lock:
            self.update_lock()
            if self.names == [TOOLS] or mode is None:
                return []
        if mode in upkeep.MODES:
            upkeep.MODES[mode][1](self.upkeep)
            return []
        method = getattr(self, (mode or 'build').replace('-', '_'))
        if mode in ('list', 'check'):
            method()
            return []
        jobs = self.jobs(unrecorded=mode in ('update', 'local'))
        if min(len(jobs), self.limit) > 1:
            self._build_at_once(jobs, mode)
            return []
        results: List[Result] = method(jobs)
        return results

    def images(self) -> List[Tuple[Image, Target]]:
        '''What was asked for: all, or those named. Raises RegistryError.'''
        if not self.names:
            return [(image, image.targets[arch]) for arch in self.archs
                    for image in self.registry.images.values()
                    if arch in image.targets]
        chosen = [self.registry.image(name) for name in self.names]
        return [(image, image.target(arch)) for arch in self.archs
                for image in chosen
                # Of all architectures, those that an image has
                if len(self.archs) == 1 or arch in image.targets]

    def jobs(self, unrecorded: bool = False) -> List[Job]:
        '''
        The jobs asked for, but for images that can't be built yet: these
        are an error if they were named, else told and left out. An image
        that the registry calls not locked, but that has a lock, is a job
        only if @unrecorded is true.
        '''
        jobs = []
        for image, target in self.images():
            lock = self.folder(image) / f'{target.arch}.lock'
            if target.not_locked is None or unrecorded and lock.exists():
                jobs.append(prepare(self.registry, image, target.arch))
            elif self.names:
                raise InputError(
                    f'{image.name} {target.arch} can\'t be built yet: '
                    f'{target.not_locked}',
                    next_step=f'scripts/mkosi-build.py {target.arch} '
                    f'{image.name} --update-lock --update, on a machine that '
                    'reaches a mirror')
            else:
                self.report.event(
                    'skipped', f'{image.name} {target.arch}: left out: '
                    f'{target.not_locked}', image=image.name,
                    arch=target.arch, reason=target.not_locked)
        return jobs

    def folder(self, image: Image) -> Path:
        '''Where the definition and the locks of @image are.'''
        return self.registry.path.parent / image.definition

    # -- Building -----------------------------------------------------------

    def build(self, jobs: Sequence[Job]) -> List[Result]:
        '''Build what is recorded, and compare.'''
        return [self._build_recorded(job) for job in jobs]

    def _build_at_once(self, jobs: Sequence[Job],
                       mode: Optional[str]) -> None:
        '''
        Build each of @jobs by a command of its own. One that fails does
        not hold up the others. Raises the error of the first that failed.
        '''
        commands = {}
        for job in jobs:
            arguments = [job.target.arch, job.image.name, '--jobs=1',
                         *([f'--{mode}'] if mode else []),
                         *(['--json'] if self.report.as_json else [])]
            commands[f'{job.image.name} {job.target.arch}'] = [
                sys.executable, str(PROGRAM), *arguments]
        codes = parallel.run(commands, self.limit, self.report)
        failed = [name for name, code in codes.items() if code]
        if failed:
            error = BuildError(f'{len(failed)} of {len(codes)} builds '
                               f'failed: {", ".join(failed)}',
                               next_step='read above what each one said')
            error.exit_code = codes[failed[0]]
            raise error

    def _build_recorded(self, job: Job) -> Result:
        self._require_agreement(job)
        result = self.builder.build(job, compare=True)
        override.remove(self.cache, job.image.name, job.target.arch)
        self.tell(result)
        return result

    def allow_newer(self, jobs: Sequence[Job]) -> List[Result]:
        '''Build what is recorded, or unlocked where its packages left.'''
        results = []
        for job in jobs:
            try:
                results.append(self._build_recorded(job))
            except GoneError as e:
                self.report.event('warning', f'{e.message}')
                results.append(self._build_newer(job))
        return results

    def _build_newer(self, job: Job) -> Result:
        newer = update.newer_job(self.builder, self.registry, job)
        result = self.builder.build(newer, compare=False)
        override.add(self.cache, result)
        self.tell(result)
        self.report.event(
            'warning',
            f'*** {job.image.name} {job.target.arch} is UNLOCKED: built with '
            'newer '
            'packages than the lock names,\n'
            '*** compared with nothing, for this machine alone. Lines '
            'starting with ~, + or -\n'
            '*** are what differs from the locks.\n'
            + '\n'.join(locks.diff(
                (*job.lock.packages, *job.tool_lock.packages),
                (*newer.lock.packages, *newer.tool_lock.packages))),
            image=job.image.name, arch=job.target.arch)
        self._tell_override()
        return result

    def local(self, jobs: Sequence[Job]) -> List[Result]:
        '''Build the tree as it is, for tests on this machine.'''
        results = []
        for job in jobs:
            result = self.builder.build(job, compare=False)
            override.add(self.cache, result)
            self.tell(result)
            results.append(result)
        self._tell_override()
        return results

    def _tell_override(self) -> None:
        self.report.event(
            'override', 'Tests use it with:\n'
            f'    export QEMU_TEST_MKOSI_OVERRIDE={self.cache.override}',
            path=str(self.cache.override))

    def tell(self, result: Result) -> None:
        '''Tell where the artefacts of @result are.'''
        job = result.job
        state = 'built' if result.fresh else 'up to date'
        lines = [f'{job.image.name} {job.target.arch}: {state}']
        for kind, built in result.artefacts.items():
            lines.append(f'    {kind:8} {built.size / 1e6:6.1f} MB  '
                         f'{built.sha256}  {built.path.name}')
        lines.append(f'    in {self.builder.folder(job)}')
        self.report.event(
            'image', '\n'.join(lines), image=job.image.name,
            arch=job.target.arch, identity=job.identity,
            locked=job.locked, fresh=result.fresh,
            artefacts={kind: {'path': str(built.path),
                              'asset': str(self.cache.assets / built.sha256),
                              'sha256': built.sha256, 'size': built.size}
                       for kind, built in result.artefacts.items()})

    # -- Registry and locks -------------------------------------------------

    def _require_agreement(self, job: Job) -> None:
        problem = disagreement(job)
        if problem:
            raise problem

    def check(self) -> None:
        '''Check without building; tell all problems, not just the first.'''
        problems: List[BuildError] = []
        tool_locks = load_tool_locks(self.registry)
        definition = locks.definition_digest(tools_folder(self.registry))
        for arch, lock in tool_locks.items():
            if lock.definition != definition:
                problems.append(InputError(
                    f'tools: the definition has changed since {arch}.lock '
                    'was made', next_step='scripts/mkosi-build.py '
                    f'{arch} --update-lock tools'))
        checked = 0
        for image, target in self.images():
            if target.not_locked is not None:
                continue
            try:
                job = prepare(self.registry, image, target.arch)
            except BuildError as e:
                problems.append(e)
                continue
            checked += 1
            sizes = {kind: artefact.size or 0
                     for kind, artefact in target.artefacts.items()}
            for problem in (disagreement(job),
                            over_budget(job, sizes)):
                if problem:
                    problems.append(problem)
        problems += lint.problems(self.registry, self.images())
        # Several images may include the same folder
        problems = list({p.message: p for p in problems}.values())
        for problem in problems[1:]:
            self.report.event('problem', f'{problem}')
        if problems:
            raise problems[0]
        self.report.event('checked', f'{checked} images for '
                          f'{", ".join(self.archs)}: registry, locks and '
                          'definitions agree')

    def update(self, jobs: Sequence[Job]) -> List[Result]:
        '''Build, and record what came out.'''
        results = []
        for job in jobs:
            result = self.builder.build(job, compare=False)
            problem = over_budget(job, {
                kind: built.size for kind, built in result.artefacts.items()})
            if problem:
                raise problem
            self.tell(result)
            with self.cache.lock('registry'):
                update.record_hashes(self.builder, self.registry.path,
                                     result)
            override.remove(self.cache, job.image.name, job.target.arch)
            results.append(result)
        return results

    def update_lock(self) -> None:
        '''Resolve anew: the tools first, since they resolve the images.'''
        names, self.names = self.names, [n for n in self.names if n != TOOLS]
        if not names or TOOLS in names:
            update.update_tools_locks(self.builder, self.registry,
                                      self.archs)
        if names == [TOOLS]:
            self.names = names
            return
        for image, target in self.images():
            update.update_image_lock(self.builder, self.registry, image,
                                     target)

    # -- Listing ------------------------------------------------------------

    def list(self) -> None:
        '''List images, sizes, states.'''
        rows = [('IMAGE', 'ARCH', 'SIZE', 'STATE')]
        for image, target in self.images():
            size = sum(a.size or 0 for a in target.artefacts.values())
            state, reason = self._state(image, target)
            shown = f'{size / 1e6:.1f} MB' if size else '-'
            rows.append((image.name, target.arch, shown,
                         f'{state}: {reason}' if reason else state))
            if self.report.as_json:
                self.report.event(
                    'listed', '', image=image.name, arch=target.arch,
                    architectures=list(image.targets), state=state,
                    reason=reason, sizes={
                        kind: artefact.size for kind, artefact
                        in target.artefacts.items()})
        if not self.report.as_json:
            widths = [max(len(row[i]) for row in rows) for i in range(3)]
            for row in rows:
                print('  '.join((*(cell.ljust(width) for cell, width
                                   in zip(row, widths)), row[3])))

    def _state(self, image: Image, target: Target) -> Tuple[str, str]:
        '''The state of an image, and the reason for it.'''
        if target.not_locked is not None:
            return 'not locked yet', target.not_locked
        try:
            job = prepare(self.registry, image, target.arch)
        except BuildError as e:
            return 'broken', e.message
        problem = disagreement(job)
        if self.builder.find(job):
            return 'built here', problem.message if problem else ''
        if problem:
            return 'not built yet', problem.message
        if self.registry.stores:
            return 'published', ''
        return 'not built yet', (f'run scripts/mkosi-build.py {target.arch} '
                                 f'{image.name}')


def _terminate(signum: int, _frame: object) -> NoReturn:
    # Unwinds like any error, so that nothing is left behind
    sys.exit(128 + signum)


def main(argv: Optional[Sequence[str]] = None) -> int:
    '''Run the command with the arguments @argv. Returns the exit code.'''
    def work() -> None:
        arguments = parse_arguments(argv)
        results = Command(arguments).run(arguments.update_lock,
                                         arguments.mode)
        if arguments.boot:
            boot.boot(results[0])

    return call(work, '--json' in (sys.argv[1:] if argv is None else argv))


def call(work: Callable[[], None], as_json: bool) -> int:
    '''
    Call @work, which ends like any error if the process is told to end.
    Returns the exit code, and tells the error that decides it.
    '''
    for number in (signal.SIGTERM, signal.SIGHUP):
        # nohup's wish is respected
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _terminate)
    error: BuildError
    try:
        work()
        sys.stdout.flush()
        return 0
    except BuildError as e:
        error = e
    except BrokenPipeError:
        nobody_listens(sys.stdout)
    except KeyboardInterrupt:
        return 130
    except OSError as e:
        error = host_error(e, 'Working')
    Report(as_json).event('error', f'error: {error}', code=error.exit_code,
                          message=error.message, next=error.next_step)
    return error.exit_code
