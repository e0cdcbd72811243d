# SPDX-License-Identifier: GPL-2.0-or-later
'''
Counts what a test printed in the Test Anything Protocol.

Silence is a failure: a test that ran nothing, stopped before its plan was
done, bailed out or ended badly without a "not ok" counts as failed.
'''

from dataclasses import dataclass, field
import re
from typing import Dict, List, Optional, Tuple


_LINE = re.compile(r'(?P<bad>not )?ok\b\s*(?P<number>\d+)?\s*-?\s*'
                   r'(?P<name>.*?)\s*'
                   r'(?:#\s*(?P<directive>SKIP|TODO)\S*\s*(?P<reason>.*))?$',
                   re.IGNORECASE)
_PLAN = re.compile(r'1\.\.(\d+)\s*(?:#\s*SKIP\S*\s*(.*))?$', re.IGNORECASE)


@dataclass
class Count:
    '''Numbers of subtests, why each was skipped, and what else failed.'''
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    skips: List[Tuple[str, str]] = field(default_factory=list)
    problems: List[str] = field(default_factory=list)

    def add(self, other: 'Count') -> None:
        '''Take the numbers and lines of @other into this.'''
        self.passed += other.passed
        self.failed += other.failed
        self.skipped += other.skipped
        self.skips += other.skips
        self.problems += other.problems

    def skip(self, name: str, reason: str) -> None:
        '''Count one skipped subtest.'''
        self.skipped += 1
        self.skips.append((name, reason or 'no reason given'))

    def problem(self, text: str) -> None:
        '''Count one failure that no "not ok" line tells of.'''
        self.failed += 1
        self.problems.append(text)

    def summary(self) -> str:
        '''The one line that ends a run.'''
        return (f'{self.passed} passed, {self.failed} failed, '
                f'{self.skipped} skipped')


def _result(count: Count, match: 're.Match[str]') -> None:
    directive = (match['directive'] or '').upper()
    if directive == 'SKIP' and not match['bad']:
        count.skip(match['name'], match['reason'])
    elif match['bad'] and directive != 'TODO':
        count.failed += 1
    else:
        count.passed += 1


def parse(text: str, ended: bool = True) -> Count:
    '''
    Count the subtests of the TAP stream @text, which must be whole if the
    test @ended by itself.
    '''
    count = Count()
    seen = 0
    plan: Optional[int] = None
    for line in text.splitlines():
        planned = _PLAN.match(line)
        result = _LINE.match(line)
        if planned:
            plan = int(planned[1])
            if plan == 0:
                count.skip('all', planned[2] or '')
        elif result:
            seen += 1
            _result(count, result)
        elif line.startswith('Bail out!'):
            count.problem(line)
    if not ended:
        count.problem('timed out, its processes were killed')
    elif plan is None:
        count.problem('no plan: the test did not end by itself')
    elif plan != seen:
        count.problem(f'{plan} subtests planned, {seen} ran')
    return count


def outcomes(text: str) -> Dict[str, Tuple[str, str]]:
    '''
    What came of each subtest of @text, by the last word of its name:
    passed, skipped or failed, and the reason for which it was skipped.
    '''
    found: Dict[str, Tuple[str, str]] = {}
    for line in text.splitlines():
        match = _LINE.match(line)
        if match:
            count = Count()
            _result(count, match)
            found[match['name'].split('.')[-1]] = (
                'failed' if count.failed else 'skipped' if count.skipped
                else 'passed', count.skips[0][1] if count.skips else '')
    return found


def judge(text: str, result: str, returncode: int) -> Count:
    '''
    Count the subtests of one test, which meson ended with @result ('OK',
    'FAIL', 'TIMEOUT', ...) and @returncode.
    '''
    count = parse(text, ended=result != 'TIMEOUT')
    if not count.failed and returncode != 0:
        count.problem(f'ended with status {returncode}')
    elif not count.failed and result not in ('OK', 'SKIP'):
        count.problem(f'meson says {result}')
    if not count.passed + count.failed + count.skipped:
        count.problem('no subtest ran')
    return count
