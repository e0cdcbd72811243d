# SPDX-License-Identifier: GPL-2.0-or-later
'''
Several builds at once, each by a process of its own: they share the store
and the tools tree as any two users' builds on a machine do, and one that
fails or is killed takes nothing from the others.
'''

import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Dict, List, Mapping

from .report import Report


class _Pool:
    '''The processes that run.'''

    def __init__(self, report: Report) -> None:
        self.report = report
        self.guard = threading.Lock()
        self.running: List['subprocess.Popen[str]'] = []
        self.stopped = False

    def run(self, name: str, command: List[str]) -> int:
        '''Run @command, relaying what it says. Returns its exit code.'''
        with self.guard:
            if self.stopped:
                return -1
            # They end with this process, however that ends. What they are
            # told then lets them clear up.
            process = subprocess.Popen(
                ['setpriv', '--pdeathsig', 'TERM', *command],
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT, encoding='utf-8',
                errors='replace')
            self.running.append(process)
        with process:
            assert process.stdout
            for line in process.stdout:
                self.report.relay(name, line)
        with self.guard:
            self.running.remove(process)
        return process.returncode

    def stop(self) -> None:
        '''End what runs, and start nothing more.'''
        with self.guard:
            self.stopped = True
            for process in self.running:
                process.terminate()


def run(commands: Mapping[str, List[str]], limit: int,
        report: Report) -> Dict[str, int]:
    '''
    Run all @commands, at most @limit at a time, and relay their words to
    @report under their names. Returns their exit codes.
    '''
    pool = _Pool(report)
    with ThreadPoolExecutor(limit) as threads:
        futures = {name: threads.submit(pool.run, name, command)
                   for name, command in commands.items()}
        try:
            return {name: future.result()
                    for name, future in futures.items()}
        except BaseException:
            pool.stop()
            raise
