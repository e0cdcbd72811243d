# SPDX-License-Identifier: GPL-2.0-or-later
'''
Making locks: which packages a definition needs today, by the
distribution's own resolver with its signature checks on. This is the only
room that takes anything on a mirror's word, and it takes it only where
the distribution's key vouches for it.
'''

import configparser
import re
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import (Dict, Iterator, List, NamedTuple, Optional, Sequence,
                    Tuple)

from . import command, lock as locks, resolve_rpm
from .build import Job, run_mkosi
from .cache import Cache, sha256_file
from .error import FetchError, HostError, InputError, MkosiError
from .lock import Lock, Package
from .report import Report
from .store import (DEBIAN_ARCHITECTURES, first_with, hide_password,
                    host_mirrors)

# Where Debian's packages put the distribution's keys, on this host and in
# the tools tree
KEYRING = Path('/usr/share/keyrings/debian-archive-keyring.gpg')

# dnf refuses what the distribution's key, of the tools tree, has not signed,
# whatever the definition says
RPM_CHECKS = ['--repository-key-check=yes', '--repository-key-fetch=no']


class Further(NamedTuple):
    '''
    What a lock of Debian's may be of, beside the release itself: further
    @suites, from which is taken what the definition's preferences say; and
    if @expired, lists whose signature is valid no longer, as an archive's.
    '''
    suites: Tuple[str, ...] = ()
    expired: bool = False


def _sources(mirror: str, suites: str, arch: str, kind: str = 'deb') -> str:
    '''An apt source that is trusted by its signature alone.'''
    return (f'Types: {kind}\n'
            f'URIs: {mirror}\n'
            f'Suites: {suites}\n'
            'Components: main\n'
            f'Architectures: {DEBIAN_ARCHITECTURES[arch]}\n'
            f'Signed-By: {KEYRING}\n')


def _stanzas(index: Path) -> Iterator[Dict[str, str]]:
    '''The paragraphs of a Packages file, without continued lines.'''
    stanza: Dict[str, str] = {}
    with open(index, encoding='utf-8') as file:
        for line in file:
            if line == '\n':
                yield stanza
                stanza = {}
            elif line[0] not in ' \t':
                key, _, value = line.partition(':')
                stanza[key] = value.strip()
    if stanza:
        yield stanza


def _source(stanza: Dict[str, str]) -> str:
    '''The source package of @stanza, which says where it differs.'''
    name, _, version = stanza.get('Source', stanza['Package']).partition(' ')
    return f'{name}={version.strip("()") or stanza["Version"]}'


def _index(lists: Path) -> Dict[str, Package]:
    '''What the verified package lists in @lists have, by SHA-256.'''
    known = {}
    for path in lists.glob('*_Packages'):
        for stanza in _stanzas(path):
            known[stanza['SHA256']] = Package(
                stanza['Package'], stanza['Version'], stanza['Filename'],
                stanza['SHA256'], int(stanza['Size']),
                stanza['Architecture'], _source(stanza))
    return known


def _epoch(lists: Path, suites: Sequence[str],
           expired: bool = False) -> int:
    '''
    When the newest of the @suites was released, in seconds since 1970.
    Raises FetchError unless each that was signed is one of them and, if
    not @expired, is still valid: apt only warns of another one, and mkosi
    lets it take what has expired.
    '''
    dates = [_date(path, suites, expired)
             for path in lists.glob('*_InRelease')]
    known = [date for date in dates if date is not None]
    if not known or len(known) < len(dates):
        raise FetchError(f'no signed release file with a date in {lists}')
    return max(known)


def _date(path: Path, suites: Sequence[str],
          expired: bool) -> Optional[int]:
    fields = dict(re.findall(r'^([A-Z][A-Za-z-]*): (.*)$',
                             path.read_text(), re.M))
    names = [fields.get(key, '') for key in ('Suite', 'Codename')]
    step = 'set QEMU_MKOSI_MIRROR to another mirror'
    if not set(suites) & set(names):
        raise FetchError(
            f'the mirror\'s signed release file: expected '
            f'{" or ".join(suites)}, found {" ".join(names)}',
            next_step=step)
    until = _seconds(fields.get('Valid-Until', ''))
    if not expired and until is not None and until < time.time():
        raise FetchError(
            'the mirror\'s signed release file has expired: it is valid '
            f'until {fields["Valid-Until"]}', next_step=step)
    return _seconds(fields.get('Date', ''))


def _seconds(date: str) -> Optional[int]:
    match = re.fullmatch(r'(.*) UTC', date)
    if match is None:
        return None
    found = datetime.strptime(match[1], '%a, %d %b %Y %H:%M:%S')
    return int(found.replace(tzinfo=timezone.utc).timestamp())


def _pick(known: Dict[str, Package], digests: List[str],
          what: str) -> List[Package]:
    missing = [digest for digest in digests if digest not in known]
    if missing:
        raise FetchError(f'{what}: fetched files that the signed package '
                         f'lists do not have: {", ".join(missing)}')
    return sorted(known[digest] for digest in set(digests))


def _wanted(folder: Path) -> Tuple[str, str, List[str]]:
    '''Distribution, release and packages of the definition in @folder.'''
    conf = configparser.RawConfigParser(strict=False)
    conf.read(folder / 'mkosi.conf', encoding='utf-8')
    try:
        return (conf['Distribution']['Distribution'],
                conf['Distribution']['Release'],
                conf['Content']['Packages'].split())
    except KeyError as e:
        raise InputError(f'{folder}/mkosi.conf: no {e}',
                         next_step='name distribution, release and packages '
                         'there') from e


def _check_keyring() -> None:
    if not KEYRING.exists():
        raise HostError(f'no {KEYRING}: can\'t check signatures',
                        next_step='apt-get install debian-archive-keyring')


def source_lists(work: Path, mirror: str, release: str,
                 arch: str) -> List[Path]:
    '''
    The lists of source packages that @mirror has for @release, fetched into
    the empty folder @work and verified by this host's apt. There is none
    where the signed release file names none.

    Raises HostError where apt or the keyring is missing, FetchError where
    apt can't get or trust the lists.
    '''
    _check_keyring()
    _apt(_private_apt(work, _sources(mirror, release, arch, 'deb-src'), arch)
         + ['update'])
    return sorted((work / 'state/lists').glob('*_Sources'))


def tools_lock(folder: Path, arch: str, cache: Cache,
               report: Report) -> Lock:
    '''
    A lock of the tools tree whose definition is in @folder, for hosts of
    architecture @arch, resolved by this host's apt.

    Raises HostError where apt or the keyring is missing, FetchError where
    apt can't get or trust the package lists, InputError for a definition
    that names no packages.
    '''
    definition = locks.definition_digest(folder)
    distribution, release, packages = _wanted(folder)
    _check_keyring()
    mirror = first_with(host_mirrors(distribution, release, arch),
                        f'dists/{release}/Release')
    with report.stage(f'resolving tools at {hide_password(mirror)}'), \
            cache.lock('resolve-tools'), \
            cache.scratch('resolve-tools') as work:
        apt = _private_apt(work, _sources(mirror, release, arch), arch)
        _apt(apt + ['update'])
        # The essential packages are in no package's dependencies
        told = _apt(apt + ['install', '--print-uris', '-qq', '?essential',
                           *packages])
        digests = re.findall(r' SHA256:([0-9a-f]{64})$', told, re.M)
        lists = work / 'state/lists'
        chosen = _pick(_index(lists), digests, 'tools')
        return Lock(definition, distribution, release, arch,
                    _epoch(lists, [release]), tuple(chosen))


def _private_apt(work: Path, sources: str, arch: str) -> List[str]:
    '''apt-get, with nothing of this host's but the program itself.'''
    for name in ('state/lists/partial', 'cache/archives/partial', 'etc'):
        (work / name).mkdir(parents=True)
    (work / 'state/status').touch()
    (work / 'etc/lock.sources').write_text(sources, encoding='utf-8')
    debian = DEBIAN_ARCHITECTURES[arch]
    options = {
        'Dir::State': f'{work}/state',
        'Dir::State::status': f'{work}/state/status',
        'Dir::Cache': f'{work}/cache',
        'Dir::Etc::sourcelist': f'{work}/etc/lock.sources',
        'Dir::Etc::sourceparts': '/dev/null',
        'Dir::Etc::preferences': '/dev/null',
        'Dir::Etc::preferencesparts': '/dev/null',
        'APT::Architecture': debian,
        'APT::Architectures': debian,
        'APT::Install-Recommends': 'false',
        # apt would otherwise become a user who may not enter the cache
        'APT::Sandbox::User': 'root',
        'Acquire::ForceHash': 'SHA256',
        'Acquire::Languages': 'none',
        'Acquire::GzipIndexes': 'false',
        'Acquire::AllowInsecureRepositories': 'false',
        'APT::Get::AllowUnauthenticated': 'false',
        'APT::Update::Error-Mode': 'any',
    }
    return ['apt-get', *(f'-o{key}={value}'
                         for key, value in options.items())]


def _apt(apt: List[str]) -> str:
    result = command.run(apt)
    if result.returncode:
        # The first error, and what it says of it
        match = re.search(r'^(E: |W: GPG)(.*\n?){1,3}', result.stderr, re.M)
        said = ' '.join((match[0] if match else result.stderr).split())
        raise FetchError(f'apt-get failed: {hide_password(said)}',
                         next_step='check the mirror, or set '
                         'QEMU_MKOSI_MIRROR to another one')
    return result.stdout


def image_lock(job: Job, tree: Path, cache: Cache, report: Report,
               also: Further = Further()) -> Lock:
    '''
    A new lock for the image of @job: what a build with the tools @tree,
    with network and without any packages at hand, fetches. The lock of
    @job says for which release, its packages do not matter.

    Raises MkosiError, HostError; FetchError where packages can't be had or
    trusted.
    '''
    image = job.image
    rpm = image.distribution == 'fedora'
    mirror = _mirror(job)
    name = f'resolve-{job.name}'
    log = cache.log(name)
    report.event('log', f'         log: {log}', path=str(log))
    with report.stage(f'resolving {job.name} at {hide_password(mirror)}'), \
            cache.lock(name), cache.scratch(name) as work:
        checks = RPM_CHECKS if rpm else _apt_checks(work, job, mirror, also)
        try:
            run_mkosi(job, tree, work, log, mirror,
                      [*_packages_only(work), *checks], network=True)
        except MkosiError as e:
            raise (rpm and resolve_rpm.refusal(log)) or e from e
        chosen, epoch = (
            resolve_rpm.chosen(work / 'packages', tree, job.name) if rpm
            else _chosen_by_apt(work / 'packages', job, also))
        return Lock(job.definition, image.distribution, image.release,
                    job.target.arch, epoch, tuple(chosen))


def _chosen_by_apt(packages: Path, job: Job,
                   also: Further) -> Tuple[List[Package], int]:
    digests = [sha256_file(path) for path in sorted(
        (packages / 'cache/apt/archives').glob('*.deb'))]
    lists = packages / 'lib/apt/lists'
    return (_pick(_index(lists), digests, job.name),
            _epoch(lists, [job.image.release, *also.suites], also.expired))


def _packages_only(work: Path) -> List[str]:
    '''
    The options of mkosi that have it end once all packages are installed
    and a script has run, without which it would not even begin.
    '''
    script = work / 'true'
    script.symlink_to('/bin/true')
    return ['--format=none', f'--build-script={script}']


def _apt_checks(work: Path, job: Job, mirror: str,
                also: Further) -> List[str]:
    '''
    The options of mkosi that have apt check signatures. Given its own list
    of sources, mkosi does not write the one that trusts a local mirror
    without.
    '''
    sources = work / 'sandbox/etc/apt/sources.list.d/mkosi.sources'
    sources.parent.mkdir(parents=True)
    every = ' '.join([job.image.release, *also.suites])
    sources.write_text(_sources(mirror, every, job.target.arch),
                       encoding='utf-8')
    return [f'--sandbox-tree={work / "sandbox"}']


def _mirror(job: Job) -> str:
    '''The first mirror that the image of @job can be resolved from.'''
    image = job.image
    mirrors = host_mirrors(image.distribution, image.release,
                           job.target.arch, image.mirrors)
    if image.distribution != 'fedora':
        return first_with(mirrors, f'dists/{image.release}/Release')
    usable = [url for url in mirrors if not url.startswith('file:')]
    if not usable:
        raise FetchError(
            'a lock can\'t be made from a mirror in a folder, of which dnf '
            f'keeps no copies: {", ".join(mirrors)}',
            next_step='serve the folder, python3 -m http.server --directory '
            'FOLDER, and set QEMU_MKOSI_MIRROR to its URL')
    return first_with(usable, 'repodata/repomd.xml')
