# SPDX-License-Identifier: GPL-2.0-or-later
'''
Whether everything that the registry and the locks name can still be had:
each store is asked for each artefact, each mirror for each package, without
fetching them.

Polite: few connections at once, fewer to a host, Retry-After is honoured,
and a source that fails again and again is left alone.
'''

import http.client
import os
import queue
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Dict, List, Mapping, Optional, Sequence, Tuple

from . import lock as locks
from .build import load_tool_locks
from .error import FetchError
from .lock import Lock
from .registry import Image, Registry, Target
from .report import Report
from .store import hide_password, host_mirrors, is_mirror
from .transfer import request_for, seconds_to_wait

STORES = 'QEMU_TEST_MKOSI_STORES'
USER_AGENT = 'qemu-mkosi-build (check-links)'

# Connections at once: to all hosts, to one
AT_ONCE = 8
PER_HOST = 2
# Seconds without a byte before a connection counts as dead
TIMEOUT = 30.0
TRIES = 3
# Seconds, times the number of tries so far, before the next one
PAUSE = 1.0
# The longest that is waited because a host asks for it, in seconds
LONGEST_WAIT = 120.0
# Failures in a row after which a source is left alone
DEAD_AFTER = 3

# With these a server may refuse HEAD alone; the second, an object store to
# which a redirection leads, since that is signed for GET
HEAD_REFUSED = (400, 403, 405, 501)
NOT_THERE = (404, 410)

THERE, GONE, UNKNOWN = 'there', 'gone', 'unknown'
# Of something that one source alone still has
LAST, UNANSWERED = 'last', 'unanswered'


@dataclass
class Thing:
    '''
    An artefact or a package: @location is relative to a source; @users
    are the images and architectures that name it.
    '''
    what: str                       # kernel, initrd, disk, package
    name: str
    version: str
    location: str
    sha256: str
    size: int
    users: List[Tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Answer:
    '''What one source said: THERE, GONE or UNKNOWN, and its words.'''
    state: str
    text: str


@dataclass
class Source:
    '''
    A store, or a mirror of one distribution: @url has no slash at the end.
    @dead is why it is no longer asked.
    '''
    url: str
    dead: str = ''
    failures: int = 0
    refuses_head: bool = False

    @property
    def host(self) -> str:
        '''To whom one has to be polite; nothing for a folder.'''
        return urllib.parse.urlsplit(self.url).netloc.rpartition('@')[2]

    @property
    def name(self) -> str:
        '''As it goes into messages.'''
        return hide_password(self.url)


Pair = Tuple[Source, Thing]
Said = Tuple[Source, Thing, Answer]


class _Later(Exception):
    '''The host asks to come back; the arguments: why, in how many seconds.'''

    def __init__(self, why: str, seconds: Optional[float]) -> None:
        super().__init__(why)
        self.seconds = seconds


class _Redirect(urllib.request.HTTPRedirectHandler):
    '''Keeps HEAD, which Python makes GET, and does not leave the web.'''

    def redirect_request(self, req: urllib.request.Request, fp: object,
                         code: int, msg: str, headers: object,
                         newurl: str) -> Optional[urllib.request.Request]:
        if not newurl.startswith(('http://', 'https://')):
            raise ValueError(f'redirects to {hide_password(newurl)}')
        new = super().redirect_request(
            req, fp, code, msg, headers, newurl)  # type: ignore[arg-type]
        if new is not None:
            new.method = req.get_method()
        return new


def _length(response: 'http.client.HTTPResponse') -> Optional[int]:
    '''The size of the whole object, None if the server does not say.'''
    if response.status == 206:
        total = response.headers.get('Content-Range', '').rpartition('/')[2]
    else:
        total = response.headers.get('Content-Length', '')
    return int(total) if total.isdigit() else None


def _judged(size: Optional[int], thing: Thing) -> Answer:
    if size is None:
        return Answer(THERE, 'there, of unknown size')
    if size != thing.size:
        return Answer(GONE, f'expected {thing.size} bytes, found {size}')
    return Answer(THERE, 'there')


class _Host:
    '''Who is asked by few at once, and not before @not_before.'''

    def __init__(self) -> None:
        self.todo: 'queue.SimpleQueue[Pair]' = queue.SimpleQueue()
        self.not_before = 0.0


class Asker:
    '''
    Asks sources for things.

    @params timeout: seconds without a byte until a connection is dead
    @params pause: seconds before a second try
    '''
    def __init__(self, timeout: float = TIMEOUT,
                 pause: float = PAUSE) -> None:
        self.timeout = timeout
        self.pause = pause
        self.opener = urllib.request.build_opener(_Redirect)
        self.places = threading.Semaphore(AT_ONCE)

    def ask_all(self, pairs: Sequence[Pair],
                report: Report) -> List[Said]:
        '''What each source says of each thing.'''
        hosts: Dict[str, _Host] = {}
        for pair in pairs:
            hosts.setdefault(pair[0].host, _Host()).todo.put(pair)
        ended: 'queue.SimpleQueue[Said]' = queue.SimpleQueue()

        def work(host: _Host) -> None:
            while True:
                try:
                    source, thing = host.todo.get_nowait()
                except queue.Empty:
                    return
                try:
                    answer = self.ask(source, thing, host)
                except Exception as e:   # pylint: disable=broad-except
                    answer = Answer(UNKNOWN, repr(e))
                ended.put((source, thing, answer))

        # Daemons, so that who interrupts this need not wait for hosts
        for host in hosts.values():
            for _ in range(PER_HOST):
                threading.Thread(target=work, args=(host,),
                                 daemon=True).start()
        answers = []
        size = 0
        for done in range(1, len(pairs) + 1):
            answers.append(ended.get())
            size += answers[-1][1].size
            report.count('asking', done, len(pairs), size)
        return answers

    def ask(self, source: Source, thing: Thing, host: _Host) -> Answer:
        '''What @source says, after some tries if need be.'''
        why = source.dead
        for attempt in range(TRIES):
            if source.dead:
                return Answer(UNKNOWN, f'no longer asked: {source.dead}')
            pause = attempt * self.pause
            time.sleep(max(pause, host.not_before - time.monotonic()))
            try:
                answer = self._answer(source, thing)
                source.failures = 0
                return answer
            except _Later as e:
                why = str(e)
                if e.seconds is not None and e.seconds > LONGEST_WAIT:
                    source.dead = f'{why}, and asks for {e.seconds:.0f} s'
                    return Answer(UNKNOWN, source.dead)
                host.not_before = max(host.not_before, time.monotonic()
                                      + (e.seconds or 0))
            except (OSError, http.client.HTTPException, ValueError) as e:
                reason = getattr(e, 'reason', e)
                why = (str(reason).splitlines() or [repr(e)])[0]
                if isinstance(reason, TimeoutError):
                    break
        source.failures += 1
        if source.failures >= DEAD_AFTER:
            source.dead = source.dead or why
        return Answer(UNKNOWN, why)

    def _answer(self, source: Source, thing: Thing) -> Answer:
        '''
        What @source says. Raises _Later, or OSError, HTTPException and
        ValueError for what may pass.
        '''
        url = f'{source.url}/{thing.location}'
        if not source.host:
            return _look(url, thing)
        if not source.refuses_head:
            try:
                return self._request(url, thing, 'HEAD')
            except urllib.error.HTTPError as e:
                if e.code not in HEAD_REFUSED:
                    return _refused(e)
                # Of one object only, this says nothing of the others
                source.refuses_head = e.code in (405, 501)
        try:
            return self._request(url, thing, 'GET')
        except urllib.error.HTTPError as e:
            return _refused(e)

    def _request(self, url: str, thing: Thing, method: str) -> Answer:
        request = request_for(url)
        request.method = method
        request.add_header('User-Agent', USER_AGENT)
        if method == 'GET':
            request.add_header('Range', 'bytes=0-0')
        with self.places, self.opener.open(
                request, timeout=self.timeout) as response:
            return _judged(_length(response), thing)


def _refused(error: urllib.error.HTTPError) -> Answer:
    '''What an HTTP error means. Raises _Later, or @error, if it may pass.'''
    text = f'HTTP error {error.code}'
    with error:
        if error.code in NOT_THERE:
            return Answer(GONE, text)
        if error.code in (429, 503):
            raise _Later(text, seconds_to_wait(error.headers))
        if error.code >= 500:
            raise OSError(text)
        return Answer(UNKNOWN, text)


def _look(url: str, thing: Thing) -> Answer:
    '''The same of a folder on this host.'''
    path = (Path(url) if url.startswith('/') else Path(
        urllib.request.url2pathname(urllib.parse.urlsplit(url).path)))
    try:
        return _judged(path.stat().st_size, thing)
    except FileNotFoundError:
        return Answer(GONE, 'no such file')


# -- What there is to ask ---------------------------------------------------

def stores(registry: Registry) -> List[str]:
    '''
    Those of QEMU_TEST_MKOSI_STORES, else of @registry, without a slash at
    the end. Raises FetchError for what is no URL and no absolute path.
    '''
    own = os.getenv(STORES, '').split()
    for url in own:
        if not (url.startswith('/') or is_mirror(url)):
            raise FetchError(f'{STORES}: expected http, https or file URLs, '
                             'or absolute paths, found '
                             f'{hide_password(url)!r}', next_step='write it '
                             'as http://HOST/PATH or /PATH')
    return list(dict.fromkeys(
        url.rstrip('/') for url in own or registry.stores))


def _artefacts(chosen: Sequence[Tuple[Image, Target]]) -> List[Thing]:
    things: Dict[str, Thing] = {}
    for image, target in chosen:
        for kind, artefact in target.artefacts.items():
            if artefact.sha256:
                thing = things.setdefault(artefact.sha256, Thing(
                    kind, artefact.file, (target.identity or '')[:16],
                    artefact.sha256, artefact.sha256, artefact.size or 0))
                thing.users.append((image.name, target.arch))
    return list(things.values())


class _Plan:
    '''Which source is to be asked for what.'''

    def __init__(self) -> None:
        self.sources: Dict[Tuple[str, str], Source] = {}
        self.things: Dict[Tuple[str, str], Thing] = {}
        self.pairs: Dict[Tuple[int, int], Pair] = {}
        self.mirrors: Dict[Tuple[str, ...], List[str]] = {}

    def add(self, thing: Thing, group: str, urls: Sequence[str]) -> None:
        '''Ask the sources @urls, all of one @group, for @thing.'''
        known = self.things.setdefault((group, thing.location), thing)
        if known is not thing:
            known.users += thing.users
        for url in urls:
            source = self.sources.setdefault((group, url), Source(url))
            self.pairs[id(source), id(known)] = (source, known)

    def add_packages(self, lock: Lock, user: Tuple[str, str],
                     further: Sequence[str]) -> None:
        '''Ask all mirrors for what is in @lock.'''
        key = (lock.distribution, lock.release, lock.architecture, *further)
        if key not in self.mirrors:
            self.mirrors[key] = host_mirrors(
                lock.distribution, lock.release, lock.architecture, further)
        for package in lock.packages:
            self.add(Thing('package', package.name, package.version,
                           package.location, package.sha256, package.size,
                           [user]), lock.distribution, self.mirrors[key])


def _plan(registry: Registry, chosen: Sequence[Tuple[Image, Target]],
          report: Report) -> _Plan:
    plan = _Plan()
    urls = stores(registry)
    if urls:
        for thing in _artefacts(chosen):
            plan.add(thing, 'store', urls)
    else:
        report.event('warning', 'no stores are configured: neither '
                     '"stores:" in the registry nor '
                     f'{STORES} names one, so nobody is asked for artefacts')
    for image, target in chosen:
        path = (registry.path.parent / image.definition
                / f'{target.arch}.lock')
        if path.exists() or target.not_locked is None:
            plan.add_packages(locks.load(path), (image.name, target.arch),
                              image.mirrors)
        else:
            report.event('skipped', f'{image.name} {target.arch}: left out: '
                         f'{target.not_locked}', image=image.name,
                         arch=target.arch, reason=target.not_locked)
    for arch, lock in load_tool_locks(registry).items():
        plan.add_packages(lock, ('tools', arch), ())
    return plan


# -- What came out ----------------------------------------------------------

def judge(answers: Mapping[str, Answer], useless: Sequence[str]) -> str:
    '''
    What the @answers of sources mean for a thing; those in @useless have
    nothing of its kind and are no sources of it.
    '''
    states = Counter(answer.state for url, answer in answers.items()
                     if answer.state == THERE or url not in useless)
    if not states[THERE]:
        return UNANSWERED if states[UNKNOWN] else GONE
    if states[THERE] == 1 and states[GONE] and not states[UNKNOWN]:
        return LAST
    return THERE


def _tell_thing(thing: Thing, state: str, said: Mapping[str, Answer],
                report: Report) -> None:
    users = ', '.join(' '.join(user) for user in thing.users)
    text = '\n'.join([
        f'{state}: {thing.what} {thing.name} {thing.version} ({users})',
        *(f'    {hide_password(url)}: {answer.text}'
          for url, answer in said.items())])
    image, arch = thing.users[0]
    report.event('link', text, state=state, image=image, arch=arch,
                 users=[list(user) for user in thing.users],
                 what=thing.what, name=thing.name, version=thing.version,
                 sha256=thing.sha256, size=thing.size,
                 said={hide_password(url): answer.text
                       for url, answer in said.items()})


def check(registry: Registry, chosen: Sequence[Tuple[Image, Target]],
          report: Report, asker: Optional[Asker] = None) -> None:
    '''
    Ask for everything that the @chosen images and the tools are made of,
    and tell what is gone, what nobody answers for, and what one source
    alone still has.

    Raises FetchError if something can't be had from any source, or if no
    source answers at all; LockError.
    '''
    started = time.monotonic()
    plan = _plan(registry, chosen, report)
    with report.stage(f'asking {len(plan.sources)} sources for '
                      f'{len(plan.things)} artefacts and packages'):
        answers = (asker or Asker()).ask_all(list(plan.pairs.values()),
                                             report)
    sources = plan.sources.values()
    if sources and all(source.dead for source in sources):
        raise FetchError(
            'no source answers: ' + '; '.join(dict.fromkeys(
                f'{source.name}: {source.dead}' for source in sources)),
            next_step='look whether this host has a network, and whether it '
            'needs a proxy (http_proxy, https_proxy)')
    useless = _tell_sources(plan, answers, report)
    found = _tell_things(plan, answers, useless, report)
    _summary(plan, found, len(answers), time.monotonic() - started, report)


def _tell_things(plan: _Plan, answers: Sequence[Said],
                 useless: Mapping[str, Sequence[str]],
                 report: Report) -> 'Counter[str]':
    '''Tell what is not well. Returns how many are in which state.'''
    by_pair = {(id(source), id(thing)): answer
               for source, thing, answer in answers}
    said: Dict[int, Dict[str, Answer]] = {}
    for pair, (source, thing) in plan.pairs.items():
        said.setdefault(id(thing), {})[source.url] = by_pair[pair]
    found: 'Counter[str]' = Counter()
    for (group, _), thing in plan.things.items():
        own = said[id(thing)]
        state = judge(own, useless.get(group, ()))
        found[state] += 1
        if state != THERE:
            _tell_thing(thing, state, own, report)
    return found


def _tell_sources(plan: _Plan, answers: Sequence[Said],
                  report: Report) -> Dict[str, List[str]]:
    '''
    Tell how each source did. Returns those that have nothing of their
    group, like a mirror of another distribution, if others have.
    '''
    counts: 'Counter[Tuple[int, str]]' = Counter(
        (id(source), answer.state) for source, _, answer in answers)
    useless: Dict[str, List[str]] = {}
    useful: 'Counter[str]' = Counter()
    for (group, url), source in plan.sources.items():
        count = {state: counts[id(source), state]
                 for state in (THERE, GONE, UNKNOWN)}
        useful[group] += bool(count[THERE])
        text = ''
        if source.dead:
            text = f'{source.name}: does not answer: {source.dead}'
        elif count[GONE] and not count[THERE]:
            useless.setdefault(group, []).append(url)
            text = (f'{source.name}: has none of the {count[GONE]} {group} '
                    'files that it was asked for')
        report.event('source', text, source=source.name, group=group,
                     **count, dead=source.dead or None)
    return {group: urls for group, urls in useless.items() if useful[group]}


def _summary(plan: _Plan, found: 'Counter[str]', asked: int, took: float,
             report: Report) -> None:
    total = len(plan.things)
    report.event(
        'links', f'{total} artefacts and packages: {found[GONE]} gone, '
        f'{found[UNANSWERED]} unanswered, {found[LAST]} at one last source; '
        f'{asked} answers of {len(plan.sources)} sources in {took:.1f} s',
        total=total, gone=found[GONE], unanswered=found[UNANSWERED],
        last=found[LAST], asked=asked, sources=len(plan.sources),
        took=round(took, 3))
    lost = found[GONE] + found[UNANSWERED]
    if lost:
        raise FetchError(
            f'{lost} of {total} artefacts and packages can\'t be had: '
            f'{found[GONE]} gone, {found[UNANSWERED]} unanswered',
            next_step='publish what is gone again from a cache that has it '
            '(--publish); or lock newer packages with --update-lock; or name '
            'further sources with QEMU_MKOSI_MIRROR and ' + STORES)
