#!/usr/bin/env python3
#
# SPDX-License-Identifier: GPL-2.0-or-later
'''
Benchmark: how long images take to boot, to build and to be found, each as a
ratio to a baseline that is measured in the same run, turn by turn, since
absolute times depend on the machine and on what else it does.

Prints a table, and with --json FILE writes the same as JSON. Exits with 1
if a ratio is over its limit. What a limit is and where it comes from stands
beside it in the code.
'''

import argparse
import json
import os
import platform
import re
import selectors
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Callable, Dict, List, Optional, Sequence, Tuple

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / 'scripts'))

# pylint: disable=wrong-import-position
from mkosi_build import (  # noqa: E402
    build, registry, repository, resolve, tools)
from mkosi_build.cache import (  # noqa: E402
    Cache, remove_tree, sha256_file)
from mkosi_build.error import BuildError  # noqa: E402
from mkosi_build.report import Report  # noqa: E402

BUILDER = ROOT / 'scripts' / 'mkosi-build.py'
IMAGE = 'debian-min'
HOST = build.host_architecture()
MARKER = 'FLOOR-IS-HERE'
GIB = 1 << 30
# Of the registry that is read
ENTRIES = 10000
# Seconds until a boot counts as failed
PATIENCE = 120

# All images of all architectures from empty caches on two CPUs: 15 minutes
PATIENCE_FOR_ALL = 900

QEMU = {'x86_64': ['qemu-system-x86_64', '-machine', 'q35'],
        # MkosiTest's -cpu max as it is since QEMU 10.0. Before, the bare
        # kernel takes thrice as long on it: a baseline easily met
        'aarch64': ['qemu-system-aarch64', '-machine', 'virt',
                    '-cpu', 'max,pauth-impdef=on']}

# The peer: what QEMU's aarch64 hotplug_pci test boots today
PEER = 'debian-installer-13-netboot-{arch}'
PEER_FILES = ('usr/lib/debian-installer/images/13/{arch}/text/'
              'debian-installer/{arch}')
PEER_ARCH = {'x86_64': 'amd64', 'aarch64': 'arm64'}
PEER_SHELL = '~ # '


@dataclass(frozen=True)
class Row:
    '''One measure: seconds or bytes, a ratio to a baseline, its limit.'''
    name: str
    value: float
    unit: str
    baseline: str = ''
    ratio: Optional[float] = None
    limit: Optional[float] = None
    spread: float = 0.0

    @property
    def passed(self) -> bool:
        '''Whether the measure is within its limit, if it has one.'''
        found = self.value if self.ratio is None else self.ratio
        return self.limit is None or found <= self.limit


def newc(path: str, mode: int, data: bytes) -> bytes:
    '''One member of a cpio archive of the form that the kernel takes.'''
    name = path.encode() + b'\0'
    head = '070701' + ''.join(f'{n:08x}' for n in (
        1, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name), 0))
    member = head.encode() + name
    member += b'\0' * (-len(member) % 4) + data
    return member + b'\0' * (-len(member) % 4)


def x86_64_code(start: int, text: bytes) -> Tuple[int, bytes]:
    '''
    ELF's number of the machine, and code of it that is at address @start:
    write(1, text, length), then pause() for ever; the text follows it.
    '''
    size = 43
    return 62, (b'\xb8\x01\x00\x00\x00'                 # mov eax, 1
                b'\xbf\x01\x00\x00\x00'                 # mov edi, 1
                + b'\x48\xbe' + struct.pack('<Q', start + size)
                + b'\xba' + struct.pack('<I', len(text))  # mov edx, length
                + b'\x0f\x05'                            # syscall
                b'\xb8\x22\x00\x00\x00'                 # mov eax, 34
                b'\x0f\x05'                              # syscall
                b'\xeb\xf7').ljust(size, b'\x90') + text  # jmp to mov


def aarch64_code(_start: int, text: bytes) -> Tuple[int, bytes]:
    '''The same, but for ppoll(NULL, 0, NULL, NULL) in place of pause().'''
    def mov(register: int, value: int) -> int:
        return 0xd2800000 | value << 5 | register

    svc = 0xd4000001
    code = [mov(0, 1),
            0x10000001 | (11 << 5),         # adr x1, 11 instructions ahead
            mov(2, len(text)), mov(8, 64), svc,
            mov(0, 0), mov(1, 0), mov(2, 0), mov(3, 0), mov(8, 73), svc,
            0x17fffffa]                     # b to 6 instructions before
    return 183, struct.pack(f'<{len(code)}I', *code) + text


def floor_initrd(path: Path, arch: str) -> None:
    '''
    An initrd with nothing but a static program that writes a marker and
    sleeps: what the kernel alone takes. Machine code, so that no compiler
    is needed.
    '''
    base, head = 0x400000, 64 + 56
    make = {'x86_64': x86_64_code, 'aarch64': aarch64_code}[arch]
    machine, code = make(base + head, f'\n{MARKER}\n'.encode())
    size = head + len(code)
    elf = struct.pack('<16sHHIQQQIHHHHHH', b'\x7fELF\x02\x01\x01', 2,
                      machine, 1, base + head, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    elf += struct.pack('<IIQQQQQQ', 1, 5, 0, base, base, size, size, 4096)
    path.write_bytes(newc('init', 0o100755, elf + code)
                     + newc('TRAILER!!!', 0, b''))


def boot_seconds(command: Sequence[str], markers: Sequence[str]) -> float:
    '''
    Seconds from the start of QEMU by @command until the last of @markers,
    one after the other, is on the console.
    '''
    command = [*command, '-accel', 'tcg', '-m', '512', '-nographic',
               '-no-reboot', '-nic', 'none']
    start = time.monotonic()
    wanted = [marker.encode() for marker in markers]
    seen = b''
    with subprocess.Popen(command, stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT) as process, \
            selectors.DefaultSelector() as selector:
        assert process.stdout
        selector.register(process.stdout, selectors.EVENT_READ)
        try:
            while selector.select(max(0, start + PATIENCE
                                      - time.monotonic())):
                chunk = os.read(process.stdout.fileno(), 4096)
                if not chunk:
                    break
                seen += chunk
                while wanted and wanted[0] in seen:
                    seen = seen.partition(wanted.pop(0))[2]
                if not wanted:
                    return time.monotonic() - start
        finally:
            process.kill()
    raise SystemExit(f'{" ".join(command)}: no {wanted[0]!r} on the '
                     f'console; last was:\n{seen[-2000:].decode()}')


def in_turns(measures: Dict[str, Callable[[], float]],
             rounds: int) -> Dict[str, List[float]]:
    '''Measure each of @measures @rounds times, turn by turn.'''
    found: Dict[str, List[float]] = {name: [] for name in measures}
    for _ in range(rounds):
        for name, measure in measures.items():
            found[name].append(measure())
    return found


def rows_of(found: Dict[str, List[float]], baseline: str,
            limits: Dict[str, float]) -> List[Row]:
    '''Medians as rows; the ratio is that of the medians.'''
    floor = statistics.median(found[baseline])
    rows = []
    for name, seconds in found.items():
        median = statistics.median(seconds)
        rows.append(Row(
            name, median, 's', '' if name == baseline else baseline,
            None if name == baseline else median / floor, limits.get(name),
            (max(seconds) - min(seconds)) / median))
    return rows


def peer_folder(arch: str, cache: Cache, report: Report,
                work: Path) -> Optional[Path]:
    '''The installer's kernel and initrd, None where they can't be had.'''
    definition = work / f'peer-{arch}'
    definition.mkdir()
    name = PEER.format(arch=PEER_ARCH[arch])
    (definition / 'mkosi.conf').write_text(
        '[Distribution]\nDistribution=debian\nRelease=trixie\n'
        f'[Content]\nPackages={name}\n')
    store = build.Builder(cache, report).store
    try:
        lock = resolve.tools_lock(definition, HOST, cache, report)
        package, = (p for p in lock.packages if p.name == name)
        store.fetch([package], 'debian', 'the peer')
    except BuildError as e:
        print(f'the peer is left out: {e}', file=sys.stderr)
        return None
    subprocess.run(['dpkg-deb', '--extract', store.path(package),
                    definition], check=True)
    return definition / PEER_FILES.format(arch=PEER_ARCH[arch])


def boots(job: build.Job, result: build.Result, peer: Optional[Path],
          floor: str) -> Dict[str, Callable[[], float]]:
    '''What is booted, by name: the image, and beside it @floor.'''
    boot = job.target.boot
    paths = {kind: str(built.path)
             for kind, built in result.artefacts.items()}
    qemu = QEMU[job.target.arch]
    kernel = [*qemu, '-kernel', paths['kernel']]
    image = [*kernel, '-initrd', paths['initrd']]
    disk = ['-drive', 'if=none,id=disk,format=qcow2,snapshot=on,'
            f'file={paths["disk"]}',
            '-device', f'{boot.disk_device},drive=disk']

    def measure(arguments: Sequence[str], cmdline: Sequence[str],
                *markers: str) -> Callable[[], float]:
        full = [*arguments, '-append', ' '.join(cmdline)]
        return lambda: boot_seconds(full, markers)

    console = f'console={boot.console}'
    measures = {
        'floor': measure([*kernel, '-initrd', floor], [console], MARKER),
        'initrd': measure(image, boot.cmdline, boot.ready, boot.prompt),
        'disk': measure([*image, *disk],
                        (*boot.cmdline, *boot.disk_cmdline),
                        boot.ready, boot.prompt)}
    if peer:
        kernel = [*qemu, '-kernel', f'{peer}/linux', '-initrd']
        measures['peer floor'] = measure([*kernel, floor], [console], MARKER)
        measures['peer'] = measure([*kernel, f'{peer}/initrd.gz'],
                                   [console, 'BOOT_DEBUG=3'], PEER_SHELL)
    return measures


def bench_boot(job: build.Job, result: build.Result, peer: Optional[Path],
               work: Path, rounds: int) -> List[Row]:
    '''Boot to the prompt, beside the same kernel with nothing to do.'''
    arch = job.target.arch
    floor = work / f'floor-{arch}.cpio'
    floor_initrd(floor, arch)
    found = in_turns(boots(job, result, peer, str(floor)), rounds)
    budget = job.target.budget
    rows = rows_of({k: v for k, v in found.items() if 'peer' not in k},
                   'floor', {'initrd': budget.initrd_boot_ratio,
                             'disk': budget.disk_boot_ratio})
    if peer:
        rows += rows_of({k: v for k, v in found.items() if 'peer' in k},
                        'peer floor', {})
    return [replace(row, name=f'{arch} boot: {row.name}') for row in rows]


def bench_bytes(job: build.Job, result: build.Result,
                peer: Optional[Path]) -> List[Row]:
    '''What a test has to fetch.'''
    sizes = {kind: built.size for kind, built in result.artefacts.items()}
    budget = job.target.budget
    both = sizes['kernel'] + sizes['initrd']
    arch = job.target.arch
    rows = [Row(f'{arch} bytes: kernel + initrd', both, 'B',
                limit=budget.kernel_initrd_bytes),
            Row(f'{arch} bytes: disk', sizes['disk'], 'B',
                limit=budget.disk_bytes)]
    if peer:
        rows.append(Row(f'{arch} bytes: peer kernel + initrd', sum(
            (peer / name).stat().st_size for name in ('linux', 'initrd.gz')),
            'B'))
    return rows


def timed(command: Sequence[str], env: Dict[str, str]) -> float:
    '''The seconds that @command takes.'''
    start = time.monotonic()
    subprocess.run(command, env={**os.environ, **env}, check=True,
                   stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    return time.monotonic() - start


def plain_mkosi(job: build.Job, cache: Cache, report: Report,
                work: Path) -> Callable[[], float]:
    '''
    Measures mkosi by itself, with the definition, the tools tree and the
    packages of @job.
    '''
    builder = build.Builder(cache, report)
    tree = tools.ensure(job.tool_lock, cache, builder.store, report)
    repo = work / 'repository'
    repo.mkdir()
    builder.fetch_packages(job)
    repository.make(job.lock, builder.store, repo, tree)

    def measure() -> float:
        (work / 'plain').mkdir()
        start = time.monotonic()
        build.run_mkosi(job, tree, work / 'plain', work / 'plain.log',
                        f'file://{repo}', [])
        took = time.monotonic() - start
        remove_tree(work / 'plain')
        return took

    return measure


def bench_build(plain: Callable[[], float], work: Path,
                rounds: int) -> List[Row]:
    '''
    The command: all images from empty caches; one with its packages at
    hand, for either architecture; and with nothing to do.
    '''
    env = {'QEMU_MKOSI_DIR': str(work / 'mkosi'),
           'QEMU_TEST_CACHE_DIR': str(work / 'qemu')}
    command = [sys.executable, str(BUILDER)]
    cold = timed([*command, 'all'], env)

    def cached(arch: str) -> float:
        remove_tree(work / 'mkosi/images' / IMAGE / arch)
        return timed([*command, arch, IMAGE], env)

    names = {arch: f'{arch} packages cached'
             for arch in registry.ARCHITECTURES}
    found = in_turns({'plain mkosi': plain,
                      **{name: partial(cached, arch)
                         for arch, name in names.items()}}, rounds)
    host = names.pop(HOST)
    foreign, = names.values()
    rows = rows_of({name: found[name] for name in ('plain mkosi', host)},
                   'plain mkosi', {host: 1.1})
    rows += rows_of({name: found[name] for name in (host, foreign)},
                    host, {foreign: 3.0})[1:]
    rows.append(Row('all, cold', cold, 's', limit=PATIENCE_FOR_ALL))
    found = in_turns({'nothing changed': lambda: timed(
        [*command, HOST, IMAGE], env)}, 5)
    rows.append(replace(rows_of(found, 'nothing changed', {})[0],
                        limit=0.5))
    return [replace(row, name=f'build: {row.name}') for row in rows]


# Runs inside QEMU's framework. The registry is the real one: a hit needs
# the hash of the file, so an override gives the artefacts that of the file
FETCH = '''
import sys, time
from qemu_test import Asset, MkosiAsset
assets = {'Asset': Asset('bench', sys.argv[1]),
          'MkosiAsset': MkosiAsset('debian-min', arch=sys.argv[2])}
for asset in assets.values():
    asset.fetch()
for _ in range(5):
    for name, asset in assets.items():
        start = time.perf_counter()
        asset.fetch()
        print(name, time.perf_counter() - start)
'''


def bench_fetch(tree: Path, work: Path) -> List[Row]:
    '''A hit in the cache, of 1 GiB, the second time and later.'''
    cache = work / 'fetch'
    (cache / 'download').mkdir(parents=True)
    blob = cache / 'blob'
    with open(blob, 'wb') as file:
        for number in range(GIB >> 20):
            file.write(number.to_bytes(8, 'little') * (1 << 17))
    digest = sha256_file(blob)
    os.replace(blob, cache / 'download' / digest)
    artefact = {'sha256': digest, 'size': GIB}
    override = cache / 'override.json'
    override.write_text(json.dumps({
        'schema': 1, 'images': {IMAGE: {HOST: {
            'identity': digest, 'locked': False,
            'artefacts': {kind: artefact
                          for kind in ('kernel', 'initrd', 'disk')}}}}}))
    env = {**os.environ, 'QEMU_TEST_CACHE_DIR': str(cache),
           'QEMU_TEST_MKOSI_OVERRIDE': str(override),
           'QEMU_BUILD_ROOT': str(work), 'MESON_BUILD_ROOT': str(work),
           'PYTHONPATH': f'{tree}/python:{tree}/tests/functional'}
    told = subprocess.run([sys.executable, '-c', FETCH, digest, HOST],
                          env=env, stdout=subprocess.PIPE, text=True,
                          check=True)
    found: Dict[str, List[float]] = {'Asset': [], 'MkosiAsset': []}
    for name, seconds in re.findall(r'^(\w+) (\S+)$', told.stdout, re.M):
        found[name].append(float(seconds))
    return [replace(row, name=f'fetch() of 1 GiB: {row.name}')
            for row in rows_of(found, 'Asset', {'MkosiAsset': 1 / 50})]


# Reads the registry of its first argument with PyYAML, and as tests do
LOAD = '''
import pathlib, sys, time, yaml
from mkosi_build import registry
path = pathlib.Path(sys.argv[1])
plain = getattr(yaml, 'CSafeLoader', yaml.SafeLoader)
text = path.read_text()
start = time.perf_counter()
known = yaml.load(text, Loader=plain)
print('plain', time.perf_counter() - start)
del known
start = time.perf_counter()
found = registry.load(path)
print('load', time.perf_counter() - start)
name = list(found.images)[-1]
start = time.perf_counter()
registry.load(path).image(name).target(sys.argv[2])
print('look-up', time.perf_counter() - start)
'''


def bench_registry(work: Path, rounds: int) -> List[Row]:
    '''
    A registry of 10,000 images, each for one architecture: to load it with
    all checks, beside PyYAML that reads it with none; and to find an image
    again in the same process.
    '''
    lines = registry.DEFAULT.read_text(encoding='utf-8').splitlines(True)
    start = lines.index(f'  {IMAGE}:\n') + 1
    end = lines.index('      aarch64:\n')
    image = ''.join(line for line in lines[start:end]
                    if not line.lstrip().startswith('#'))
    path = work / 'registry.yaml'
    path.write_text('schema: 1\nimages:\n' + ''.join(
        f'  image-{number}:\n{image}' for number in range(ENTRIES)))
    found: Dict[str, List[float]] = {'plain': [], 'load': [], 'look-up': []}
    for _ in range(rounds):
        told = subprocess.run(
            [sys.executable, '-c', LOAD, path, 'x86_64'],
            env={**os.environ, 'PYTHONPATH': str(ROOT / 'scripts')},
            stdout=subprocess.PIPE, text=True, check=True)
        for line in told.stdout.splitlines():
            name, seconds = line.split()
            found[name].append(float(seconds))
    # Checks and line numbers shall cost no more than what they save. A test
    # looks up thrice, once an artefact
    return [replace(row, name=f'{ENTRIES} images: {row.name}')
            for row in rows_of(found, 'plain', {'load': 1.0,
                                                'look-up': 1e-3})]


def table(rows: Sequence[Row]) -> str:
    '''@rows for a person.'''
    lines = [f'{"MEASURE":34} {"MEDIAN":>12} {"SPREAD":>7} {"RATIO":>8} '
             f'{"LIMIT":>12}  BASELINE']
    for row in rows:
        value = (f'{row.value:.4f} s' if row.unit == 's'
                 else f'{row.value / 1e6:.2f} MB')
        shown = ''
        if row.limit is not None:
            shown = (f'{row.limit / 1e6:.2f} MB' if row.unit == 'B'
                     else f'{row.limit:g}{"" if row.ratio else " s"}')
        ratio = '' if row.ratio is None else f'{row.ratio:.4g}'
        lines.append(f'{row.name:34} {value:>12} {row.spread:>7.0%} '
                     f'{ratio:>8} {shown:>12}  {row.baseline}'
                     f'{"" if row.passed else "  OVER ITS LIMIT"}')
    return '\n'.join(lines)


def parse_arguments() -> argparse.Namespace:
    '''What to measure.'''
    parser = argparse.ArgumentParser(
        description='Measure boots, builds and look-ups of ' + IMAGE)
    parser.add_argument('--tree', type=Path, required=True,
                        help='a QEMU tree with the series applied')
    parser.add_argument('--arch', choices=registry.ARCHITECTURES,
                        help='boot images for this one (default: all)')
    parser.add_argument('--json', type=Path, help='write the results here')
    parser.add_argument('--rounds', type=int, default=7,
                        help='boots each (default: %(default)s)')
    parser.add_argument('--builds', type=int, default=3,
                        help='builds each, 0 for none (default: '
                        '%(default)s)')
    return parser.parse_args()


def main() -> int:
    '''Measure, tell, compare with the limits.'''
    arguments = parse_arguments()
    cache, report = Cache(), Report()
    known = registry.load(registry.DEFAULT)
    builder = build.Builder(cache, report)
    archs = [arguments.arch] if arguments.arch else registry.ARCHITECTURES
    rows = []
    with tempfile.TemporaryDirectory(dir=cache.root) as name:
        work = Path(name)
        for arch in archs:
            job = build.prepare(known, known.image(IMAGE), arch)
            result = builder.build(job, compare=True)
            peer = peer_folder(arch, cache, report, work)
            rows += bench_boot(job, result, peer, work, arguments.rounds)
            rows += bench_bytes(job, result, peer)
        rows += bench_fetch(arguments.tree, work)
        rows += bench_registry(work, 3)
        if arguments.builds:
            job = build.prepare(known, known.image(IMAGE), HOST)
            rows += bench_build(plain_mkosi(job, cache, report, work), work,
                                arguments.builds)
    print(table(rows))
    if arguments.json:
        arguments.json.write_text(json.dumps({
            'machine': {'cpus': os.cpu_count(), 'load': os.getloadavg(),
                        'system': platform.platform()},
            'rows': [{**asdict(row), 'passed': row.passed}
                     for row in rows]}, indent=1) + '\n')
    return 0 if all(row.passed for row in rows) else 1


if __name__ == '__main__':
    sys.exit(main())
