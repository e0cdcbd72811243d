# SPDX-License-Identifier: GPL-2.0-or-later
'''
The matrix: the functional tests that use our images, and qemu-img, on the
QEMU of each host root, several rows at a time. What differs between
versions has to be declared. A row that fails does not hold up the others.
'''

import argparse
import contextlib
import datetime
import os
import sys
import tempfile
from pathlib import Path
from typing import Dict, Iterator, List, Mapping, Optional, Sequence, Tuple

from . import command, differences, hosts, qemu_img, rows
from . import registry as registries
from .build import Builder, host_architecture
from .cache import HOSTS, Cache, remove_tree, write_atomically
from .cli import Parser, call, positive
from .differences import Difference, Verdict, Version
from .error import BuildError, InputError
from .hosts import Roots
from .qemu_img import Observed
from .report import Report
from .rows import Quarantine, Result, Row
from .runner import (QEMU_IMG, TREE, Found, Reference, Runner,
                     make_reference)
from .suite import Case

# What is replaced in the folder of the results, which may be anybody's
LOGS = 'matrix.rows'

# Beside those of a build
PROGRAMS = {'mount': 'mount', 'setpriv': 'util-linux',
            'unshare': 'util-linux'}

DESCRIPTION = '''\
Run the functional tests that use the images, and checks of qemu-img, on the
QEMU of several distributions. Each is a row: a system that mkosi builds of
locked packages. What differs between versions of QEMU and is not declared
in tests/functional/mkosi/hosts/differences.yaml is a failure.
'''

EPILOG = '''\
examples:
  %(prog)s                          all rows
  %(prog)s debian-12 debian-13      these
  %(prog)s --list                   what rows there are
  %(prog)s --tests '*/hotplug_*' --tests qemu-img
                                    some tests, and the checks of qemu-img
  %(prog)s debian-unstable --update-lock
                                    lock its packages as they are today

The images have to be there: scripts/mkosi-build.py all. Tests run with the
environment as it is, see docs/devel/testing/mkosi-images-matrix.rst.

exit codes:
  0  no row failed but those in quarantine
  2  wrong usage
  3  a file of the tree is wrong, or an image is not built
  4  the host lacks a program, a permission or space
  9  a row failed, or none could be run
'''


class MatrixError(BuildError):
    '''A row failed.'''
    exit_code = 9


# -- Judging ----------------------------------------------------------------

class Judge:
    '''Tells what is wrong with rows, by what is @declared.'''

    def __init__(self, declared: Sequence[Difference],
                 quarantine: Quarantine) -> None:
        self.declared = declared
        self.quarantine = quarantine
        self.occurred: List[Difference] = []
        self.tried: List[Tuple[str, Version]] = []

    def rows(self, found: Sequence[Found], reference: Optional[Reference],
             baseline: Observed) -> List[Row]:
        '''The results of all rows, in order.'''
        newest = _newest(found)
        return [self._row(each, self._cases(each, newest)
                          + self._images(each, reference, baseline))
                for each in found]

    def _images(self, found: Found, reference: Optional[Reference],
                baseline: Observed) -> List[Verdict]:
        if not reference or not found.images or not found.version:
            return []
        return self._take(qemu_img.judge_all(
            baseline, reference.said, found.images, self.declared),
            found.version)

    def _cases(self, found: Found, newest: Mapping[str, Tuple[Version, str]]
               ) -> List[Verdict]:
        '''
        Each case against what came of it in the newest version that has it.
        '''
        if not found.version:
            return []
        return self._take([differences.judge(
            name, 'exact', newest[name][1], newest[name][0], case.state,
            found.version, self.declared)
            for name, case in _named(found)], found.version)

    def _take(self, judgements: Sequence[differences.Judgement],
              version: Version) -> List[Verdict]:
        verdicts = []
        for verdict, occurred in judgements:
            verdicts.append(verdict)
            self.occurred += occurred
            self.tried.append((verdict.assertion, version))
        return verdicts

    def _row(self, found: Found, verdicts: List[Verdict]) -> Row:
        state, reason = found.state, found.reason
        if not state:
            state, reason = _state(found, verdicts)
        name = found.host.name
        entry = self.quarantine.reason_for(name)
        if entry and state in ('failed', 'timeout'):
            state = 'quarantined'
        root = found.root
        return Row(
            name=name, state=state, reason=reason,
            version=str(found.version or ''),
            package=root.version if root else '',
            locked=root.job.locked if root else True,
            identity=root.job.identity if root else '',
            seconds=found.seconds, attempts=found.attempts,
            outcomes=tuple(found.outcomes), verdicts=tuple(verdicts))

    def unused(self) -> List[Difference]:
        '''What is declared and was not met where it should have been.'''
        return differences.unused(self.declared, self.occurred, self.tried)


def _named(found: Found) -> Iterator[Tuple[str, Case]]:
    for outcome in found.outcomes:
        for case in outcome.cases:
            yield f'{outcome.test} {case.name}', case


def _newest(found: Sequence[Found]) -> Dict[str, Tuple[Version, str]]:
    newest: Dict[str, Tuple[Version, str]] = {}
    for each in found:
        for name, case in _named(each):
            assert each.version
            if name not in newest or newest[name][0] < each.version:
                newest[name] = (each.version, case.state)
    return newest


def _state(found: Found, verdicts: Sequence[Verdict]) -> Tuple[str, str]:
    '''Passed, or failed and why.'''
    accepted = {v.assertion for v in verdicts
                if v.state in ('declared', 'skipped')}
    wrong = [name for name, case in _named(found)
             if case.state == 'failed' and name not in accepted]
    wrong += [v.assertion for v in verdicts
              if v.state == 'differs' and v.assertion not in wrong]
    if wrong:
        more = f' and {len(wrong) - 3} more' if len(wrong) > 3 else ''
        return 'failed', ', '.join(wrong[:3]) + more
    states = [case.state for _, case in _named(found)]
    # qemu-img alone is a run; tests that were all skipped are none
    if 'passed' not in states and (states or not found.images):
        return 'failed', 'nothing passed'
    return 'passed', ''


# -- The command ------------------------------------------------------------

def parse_arguments(argv: Optional[Sequence[str]]) -> argparse.Namespace:
    '''What the user asks for. Raises UsageError.'''
    parser = Parser(
        prog='scripts/mkosi-matrix.py', description=DESCRIPTION,
        epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('rows', metavar='ROW', nargs='*',
                        help='rows to run (default: all)')
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument('--list', action='store_true',
                       help='list the rows and their state')
    modes.add_argument('--update-lock', action='store_true',
                       help='resolve the packages of the rows anew, '
                       'signatures checked, and write their locks')
    modes.add_argument('--record', action='store_true',
                       help='record what the qemu-img of the locked tools '
                       'says as the baseline')
    parser.add_argument('--allow-expired', action='store_true',
                        help='with --update-lock, take signed lists that '
                        'are valid no longer, as those of an archive')
    parser.add_argument('--allow-newer', action='store_true',
                        help='if a locked package is gone from every '
                        'mirror, build a root with newer ones')
    parser.add_argument('--tests', metavar='PATTERN', action='append',
                        default=[], help='run the tests whose names match, '
                        'of which one is qemu-img (default: all)')
    parser.add_argument('--jobs', metavar='N', type=positive,
                        default=os.cpu_count() or 1,
                        help='run N rows at once (default: %(default)s)')
    parser.add_argument('--timeout', metavar='SECONDS', type=positive,
                        default=3600, help='for a row (default: %(default)s)')
    parser.add_argument('--output', metavar='FOLDER', type=Path,
                        default=Path('mkosi-matrix'),
                        help='for results and logs (default: %(default)s)')
    parser.add_argument('--quarantine', metavar='REASON',
                        help='let the rows that fail, twice, not count '
                        'from now on')
    parser.add_argument('--json', action='store_true',
                        help='tell events as JSON lines')
    arguments = parser.parse_intermixed_args(argv)
    if arguments.update_lock and not arguments.rows:
        parser.error('--update-lock takes the names of rows')
    if arguments.allow_expired and not arguments.update_lock:
        parser.error('--allow-expired goes with --update-lock')
    return arguments


class Command:
    '''One call of the command.'''

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.report = Report(arguments.json)
        self.registry = registries.load(registries.DEFAULT)
        self.builder = Builder(Cache(), self.report)
        self.roots = Roots(self.builder, self.registry)
        self.data = self.registry.path.parent / HOSTS
        # All that is wrong in the tree is told before any work
        self.chosen = hosts.choose(hosts.load(self.registry),
                                   arguments.rows)
        self.declared = differences.load(self.data / 'differences.yaml')
        self.quarantine = Quarantine.load(self.data / 'quarantine.yaml')

    def run(self) -> None:
        '''Do what was asked for. Raises MatrixError if a row failed.'''
        if self.arguments.list:
            self.list()
        elif self.arguments.update_lock:
            for host in self.chosen:
                self.roots.update_lock(host, self.arguments.allow_expired)
        elif self.arguments.record:
            self.record()
        else:
            self.check()

    def list(self) -> None:
        '''Name, release and state of each row.'''
        for host in self.chosen:
            state = 'locked' if host.lock.exists() else (
                f'not locked for hosts of {host_architecture()}')
            entry = self.quarantine.reason_for(host.name)
            if entry:
                state += f', in quarantine: {entry}'
            self.report.event('listed', '', row=host.name, state=state)
            if not self.report.as_json:
                print(f'{host.name:20} {host.description:40} {state}')

    def record(self) -> None:
        '''Write the baseline anew.'''
        with tempfile.TemporaryDirectory() as folder:
            reference = make_reference(self.roots, Path(folder, 'work'))
            path = self.data / 'qemu-img.json'
            qemu_img.record(path, reference.said)
        self.report.event('recorded', f'{path.name}: of qemu-img '
                          f'{reference.said.version}', path=str(path))

    def check(self) -> None:
        '''Run the rows, and write and tell what came of it.'''
        if not (TREE / 'python/qemu/machine').is_dir():
            raise InputError(
                f'{TREE}: no source tree of QEMU, whose tests these are',
                next_step='call scripts/mkosi-matrix.py in such a tree; in '
                'the repository of the series, make matrix')
        command.check_programs(PROGRAMS)
        command.check_namespaces()
        baseline = qemu_img.load_baseline(self.data / 'qemu-img.json')
        output: Path = self.arguments.output.absolute()
        with self._work(output) as work:
            runner = Runner(self.roots, work, self.arguments.timeout,
                            self.arguments.allow_newer)
            runner.patterns = self.arguments.tests
            if runner.wants(QEMU_IMG):
                runner.reference = make_reference(
                    self.roots, work / 'reference',
                    self.arguments.allow_newer)
                self.check_baseline(baseline, runner.reference)
            found = runner.run(self.chosen, self.arguments.jobs)
        judge = Judge(self.declared, self.quarantine)
        results = judge.rows(found, runner.reference, baseline)
        self.tell(output, Result(tuple(results), tuple(judge.unused()),
                                 self.quarantine))

    def check_baseline(self, baseline: Observed,
                       reference: Reference) -> None:
        '''
        Raise InputError if the locked tools have come to say other things
        than the baseline: each row would show the same.
        '''
        judgements = qemu_img.judge_all(baseline, reference.said,
                                        reference.said, self.declared)
        differing = [each.verdict.text for each in judgements
                     if each.verdict.state == 'differs']
        if differing:
            raise InputError(
                f'the baseline is of qemu-img {baseline.version}, the locked '
                f'tools have {reference.said.version}, which says other '
                f'things: {len(differing)}, the first is\n{differing[0]}',
                next_step='scripts/mkosi-matrix.py --record')

    @contextlib.contextmanager
    def _work(self, output: Path) -> Iterator[Path]:
        '''The folder of this run's logs; all of the last one's goes.'''
        work = output / LOGS
        with self.builder.cache.lock('matrix-' + str(output).replace(
                '/', '-')[-100:]):
            # What this run does not come to shall not look like its result
            for name in ('matrix.json', 'matrix.junit.xml', 'matrix.md'):
                (output / name).unlink(missing_ok=True)
            remove_tree(work)
            work.mkdir(parents=True)
            yield work

    def tell(self, output: Path, result: Result) -> None:
        '''Write all forms of the @result, and show the table.'''
        write(output / 'matrix', result)
        write_atomically(output / 'matrix.md', rows.as_markdown(result))
        for row in result.rows:
            write(output / LOGS / row.name / 'row',
                  Result((row,), (), result.quarantine))
        self.report.event('matrix', rows.as_table(result),
                          path=str(output / 'matrix.json'))
        failed = [row.name for row in result.rows
                  if row.state in ('failed', 'timeout')]
        if failed and self.arguments.quarantine:
            for name in failed:
                self.quarantine.add(name, self.arguments.quarantine,
                                    datetime.date.today())
            self.report.event('quarantined', 'in quarantine from now on: '
                              + ', '.join(failed))
        elif failed:
            raise MatrixError(
                f'{len(failed)} of {len(result.rows)} rows failed: '
                + ', '.join(failed),
                next_step=f'read {output}/matrix.md; declare what differs '
                'rightly in differences.yaml, or let a row not count for a '
                'while with --quarantine REASON')
        if all(row.state == 'unreachable' for row in result.rows):
            raise MatrixError('no row could be run',
                              next_step='read above why')


def write(path: Path, result: Result) -> None:
    '''Write @result for programs to @path, with a suffix for each form.'''
    write_atomically(path.with_name(f'{path.name}.json'),
                     rows.as_json(result))
    write_atomically(path.with_name(f'{path.name}.junit.xml'),
                     rows.as_junit(result))


def main(argv: Optional[Sequence[str]] = None) -> int:
    '''Run the command with the arguments @argv. Returns the exit code.'''
    return call(lambda: Command(parse_arguments(argv)).run(),
                '--json' in (sys.argv[1:] if argv is None else argv))
