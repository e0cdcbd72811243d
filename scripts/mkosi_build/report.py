# SPDX-License-Identifier: GPL-2.0-or-later
'''
What the builder tells: one line a stage for a person, JSON lines for a
program. Everything goes to the stream given (standard error for a person,
standard output for a program); nothing is ever told twice.

Each JSON line has "event", "seconds" since the start, and "text"; beside
these:

    start, done, failed     a stage; "took", in seconds, when it ends
    count                   "done" of "total" packages, "bytes" so far
    waiting                 for another builder
    log                     "path" of mkosi's log
    image                   "image", "arch", "identity", "locked", "fresh",
                            "artefacts": by kind, "path", "asset", "sha256",
                            "size"
    registered              an interpreter, for the whole host
    override                "path" of what QEMU_TEST_MKOSI_OVERRIDE takes
    recorded                in the registry
    locked                  "path" of the lock, "packages", "changes"
    listed                  "image", "arch", "architectures", "state",
                            "reason", "sizes" by kind
    checked                 all is well
    sources                 "image", "arch", "path" of the list, "files",
                            "bytes", "unindexed": what no signed index has
    published               "image", "arch", "identity", "index": its name,
                            "objects", "uploaded", "bytes" of these; "fresh"
                            if nobody had published it before
    availability            "image", "arch", "identity", "store", "state"
                            (published, incomplete, missing, unreachable),
                            "reason", "missing": hashes of objects
    plan                    "plan", see plan.py
    planned                 built from a plan: "image", "arch", "identity",
                            "compared", "artefacts": by kind, its hash
    skipped                 "image", "arch", "reason"
    link                    "state": gone, unanswered or last (one source
                            alone has it), "image", "arch", "users", "what"
                            (kernel, initrd, disk, package), "name",
                            "version", "sha256", "size", "said" by source
    source                  that was asked: "source", "group", how many are
                            "there", "gone", "unknown"; "dead", why not
    links                   "total", of which "gone", "unanswered", "last";
                            "asked", "sources", "took"
    held                    in the caches: "area", "name", "bytes", "users",
                            "prunable": why, or null
    pruned, kept            "area", "name", "bytes", "why"
    cache                   "total" bytes; of --cache "areas", "users" and
                            "prunable", of --prune "freed", "removed" by
                            reason, and how many are "kept"
    cost                    "image", "arch"; bytes of "artefacts",
                            "packages", "tools", "sources" and of a whole
                            "version"; "least" and "most" in all;
                            "build_seconds", "runner_seconds"; null is not
                            known
    costs                   all together: "version", "versions" a year,
                            "years", "least", "most", "images", of which
                            "measured", "runner_seconds"
    left_out                a "condition" that this host can't, "reason",
                            "next"
    verified                "image", "arch", "identity", "same", "builds",
                            "artefacts", "changes", "left_out", "path" of
                            the file that has this; where bytes differ,
                            "kept", "explanation", "cause"
    warning, problem        what a person should read
    explained               why bytes differ: "title", "before", "after" (two
                            files), "differences": each with "layers",
                            "path", "aspect", "before", "after", "count",
                            "cause" (null, or "key", "title", "mend"),
                            "note", "detail"
    inspected               "image", "arch", "problems": how many
    warning, problem        what a person should read; of --inspect a problem
                            has "image", "arch", "file", "structure",
                            "offset", "expected", "found"
    row                     ran: "row", "state", "reason" if it could not
    test                    ran: "row", "test", "attempt"
    matrix                  "path" of the result, see rows.py
    quarantined             rows, from now on
    error                   "code" to exit with, "message", "next"; the last

What one of several builds at once tells also has "job": its image and
architecture.
'''

import json
import os
import signal
import sys
import threading
import time
from contextlib import contextmanager
from typing import IO, Any, Iterator, Mapping, NoReturn, Optional

# Between two updates of a counter, in seconds: enough for a person to see
# that something moves, little enough for the log of a pipeline.
COUNTER_INTERVAL = 0.2


def nobody_listens(stream: IO[str]) -> NoReturn:
    '''
    End as a program does whose output was closed. Nothing more is said,
    not by Python itself, either.
    '''
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(128 + signal.SIGPIPE)


class Report:
    '''
    Tells stages, counters and results.

    @params as_json: JSON lines, one object an event, in place of text
    @params stream: where to; None is the usual place
    '''

    def __init__(self, as_json: bool = False,
                 stream: Optional[IO[str]] = None) -> None:
        self.as_json = as_json
        self.stream = stream or (sys.stdout if as_json else sys.stderr)
        self.started = time.monotonic()
        self._lock = threading.Lock()
        self._last_counter = 0.0

    def event(self, kind: str, text: str, **data: Any) -> None:
        '''Tell one event; @data goes into the JSON form alone.'''
        with self._lock:
            try:
                self._tell(kind, text, data)
            except BrokenPipeError:
                nobody_listens(self.stream)

    def _tell(self, kind: str, text: str, data: Mapping[str, Any]) -> None:
        if self.as_json:
            seconds = round(time.monotonic() - self.started, 3)
            record = {'event': kind, 'seconds': seconds,
                      'text': text, **data}
            print(json.dumps(record), file=self.stream, flush=True)
        elif text:
            self._clear_counter()
            print(text, file=self.stream, flush=True)

    def relay(self, job: str, line: str) -> None:
        '''Pass on a @line that the builder of @job told.'''
        if not self.as_json:
            self.event('', f'[{job}] {line.rstrip()}')
            return
        try:
            record = json.loads(line)
            text = record.pop('text', '')
            record.pop('seconds', None)
            self.event(record.pop('event'), text, **record, job=job)
        except (ValueError, KeyError, AttributeError, TypeError):
            # Not an event, but what Python or a program had to say
            self.event('warning', line.rstrip(), job=job)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        '''A stage: its name and the seconds it took, told when it ends.'''
        start = time.monotonic()
        if self.as_json:
            self.event('start', name)
        else:
            self._show_counter(f'  ...    {name}')
        try:
            yield
        except BaseException:
            self._end_stage('failed', name, start)
            raise
        self._end_stage('done', name, start)

    def _end_stage(self, kind: str, name: str, start: float) -> None:
        took = time.monotonic() - start
        failed = ': failed' if kind == 'failed' else ''
        self.event(kind, name if self.as_json
                   else f'{took:7.1f}s {name}{failed}', took=round(took, 3))

    def count(self, name: str, done: int, total: int, size: int) -> None:
        '''A counter: @done of @total things, @size bytes so far.'''
        now = time.monotonic()
        if done < total and now - self._last_counter < COUNTER_INTERVAL:
            return
        self._last_counter = now
        if self.as_json:
            self.event('count', name, done=done, total=total, bytes=size)
        else:
            with self._lock:
                self._show_counter(
                    f'  ...    {name}: {done}/{total}, {size / 1e6:.1f} MB')

    def _show_counter(self, text: str) -> None:
        # Only a terminal can take a line back
        if self.stream.isatty():
            print(f'\r\033[K{text}', end='', file=self.stream, flush=True)

    def _clear_counter(self) -> None:
        if self.stream.isatty():
            print('\r\033[K', end='', file=self.stream)
