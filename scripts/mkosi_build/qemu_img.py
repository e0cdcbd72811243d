# SPDX-License-Identifier: GPL-2.0-or-later
'''
What a qemu-img says of images, and what it writes: observations to compare
with those of another version. Sample images are the same for all versions,
since one program makes them; a recorded baseline has what that program
observed of them.

An assertion is named by what is observed and of which image, like 'map
qcow2-zstd'; its value is what the command said, without what no two runs
have in common. Where the command fails, it is its exit code and its error.
'''

import hashlib
import json
import os
import re
import signal
import struct
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path
from typing import (
    Any,
    Callable,
    Dict,
    Iterable,
    Iterator,
    List,
    Mapping,
    NamedTuple,
    Sequence,
    Tuple,
)

from .cache import write_atomically
from .differences import (
    ABSENT,
    Difference,
    Json,
    Judgement,
    Version,
    judge,
)
from .error import HostError, InputError
from .lock import SPDX

# Takes the arguments of qemu-img and runs it
Run = Callable[[Sequence[str]], 'subprocess.CompletedProcess[str]']

# Commands whose answers have got new fields in most versions, which is
# nothing that a reader of the older ones minds
SUBSETS = ('info', 'create')

# Part of the names of our own disks
DISK = 'disk/'

CLUSTER = 65536
SIZE = 8 << 20
SECRET = 'secret,id=secret,data=geheim'
# As few milliseconds of key derivation as possible: nothing is secret here
ITERATIONS = 'key-secret=secret,iter-time=10'


def program(command: Sequence[str], seconds: float = 120) -> Run:
    '''
    A Run of the @command, a qemu-img with whatever has to stand before it.
    One that takes longer than @seconds ends with all that it started, with
    the exit code of timeout(1). The environment is the caller's but for
    locale and time zone.
    '''
    environment = {**os.environ, 'LC_ALL': 'C', 'TZ': 'UTC'}

    def run(arguments: Sequence[str]) -> 'subprocess.CompletedProcess[str]':
        full = [*command, *arguments]
        try:
            with subprocess.Popen(
                    full, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE, encoding='utf-8',
                    errors='replace', env=environment,
                    start_new_session=True) as process:
                return _finish(process, full, seconds)
        except OSError as e:
            raise HostError(f'{command[0]}: {e.strerror}') from e
    return run


def _finish(process: 'subprocess.Popen[str]', command: List[str],
            seconds: float) -> 'subprocess.CompletedProcess[str]':
    try:
        try:
            output, error = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            _kill(process)
            process.communicate()
            return subprocess.CompletedProcess(
                command, 124, '', f'no answer within {seconds:g} s')
    except BaseException:
        _kill(process)
        raise
    return subprocess.CompletedProcess(command, process.returncode, output,
                                       error)


def _kill(process: 'subprocess.Popen[str]') -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        # It was quicker
        pass


def version_of(run: Run) -> Version:
    '''The version of the program. Raises HostError if it has none.'''
    said = run(['--version'])
    try:
        return Version.parse(said.stdout)
    except InputError as e:
        raise HostError('qemu-img --version: exit code '
                        f'{said.returncode}: {e.message}: '
                        f'{said.stderr.strip()}') from e


# -- Samples ----------------------------------------------------------------

@dataclass(frozen=True)
class Format:
    '''
    A way to write an image: the @driver of qemu-img and its @options, where
    {path} is the image's. @flat if the format leaves it to the file system
    what is a hole, so that two machines see other extents.
    '''
    name: str
    driver: str
    options: str = ''
    compressed: bool = False
    encrypted: bool = False
    flat: bool = False


RAW = Format('raw', 'raw', flat=True)
QCOW2 = Format('qcow2', 'qcow2')
FORMATS = (
    RAW, QCOW2,
    Format('qcow2-zlib', 'qcow2', compressed=True),
    Format('qcow2-zstd', 'qcow2', 'compression_type=zstd', compressed=True),
    Format('qcow2-data-file', 'qcow2',
           'data_file={path}.data,data_file_raw=on', flat=True),
    Format('qcow2-v2', 'qcow2', 'compat=0.10'),
    Format('qcow2-extended-l2', 'qcow2', 'extended_l2=on'),
    Format('qcow2-luks', 'qcow2', 'encrypt.format=luks,encrypt.'
           + ITERATIONS.replace(',', ',encrypt.'), encrypted=True),
    Format('luks', 'luks', ITERATIONS, encrypted=True),
    Format('vmdk-sparse', 'vmdk', 'subformat=monolithicSparse'),
    Format('vmdk-stream', 'vmdk', 'subformat=streamOptimized'),
    Format('vmdk-split', 'vmdk', 'subformat=twoGbMaxExtentSparse'),
    Format('vdi', 'vdi'),
    Format('vdi-static', 'vdi', 'static=on', flat=True),
    Format('vhdx', 'vhdx', 'subformat=dynamic'),
    Format('vhdx-fixed', 'vhdx', 'subformat=fixed'),
    # Without force_size, the size becomes that of a whole cylinder
    Format('vpc', 'vpc', 'subformat=dynamic,force_size=on'),
    Format('vpc-fixed', 'vpc', 'subformat=fixed,force_size=on', flat=True))

# Samples that are not just the pattern in some format
CHAIN = ('chain-base', 'chain-middle', 'chain')
OTHERS = tuple(Format(name, 'qcow2') for name in (
    *CHAIN, 'bitmaps', 'snapshots', 'broken-leak', 'broken-feature'))


def pattern() -> bytes:
    '''What is in the samples: always the same data, zeroes and repeats.'''
    def noise(name: str, size: int = CLUSTER) -> bytes:
        return hashlib.shake_128(name.encode()).digest(size)

    zero = bytes(CLUSTER)
    page = noise('page', 4096)
    clusters = [
        *(noise(str(i)) for i in range(12)), *[zero] * 24,
        # The same cluster again and again, and one that can be compressed
        *[noise('again')] * 8, *[page * 16] * 8, *[zero] * 2,
        # Part of a cluster: its begin, its middle, its end
        *(bytes(at) + page + bytes(CLUSTER - 4096 - at)
          for at in (0, CLUSTER // 2, CLUSTER - 4096)),
        *(noise(str(i)) + zero for i in range(8))]
    data = b''.join(clusters)
    return data + bytes(SIZE - CLUSTER - len(data)) + noise('last')


def _layer(name: str, places: Iterable[int]) -> bytes:
    '''What a layer of the chain has written at the clusters @places.'''
    data = bytearray(SIZE)
    for place in places:
        at = place * CLUSTER
        data[at:at + CLUSTER] = hashlib.shake_128(
            f'{name} {place}'.encode()).digest(CLUSTER)
    return bytes(data)


def samples(run: Run, folder: Path) -> None:
    '''
    Make the sample images in the empty @folder. Raises HostError if that
    qemu-img can't.
    '''
    def do(*arguments: str) -> None:
        result = run(arguments)
        if result.returncode:
            raise HostError('qemu-img ' + ' '.join(arguments) + ': exit '
                            f'code {result.returncode}: '
                            f'{result.stderr.strip()}')

    raw = folder / 'raw'
    # Without holes, so that file systems agree about what is allocated
    raw.write_bytes(pattern())
    for form in (each for each in FORMATS if each != RAW):
        do(*_writing(form, raw, folder / form.name))
    for name in (CHAIN[0], 'bitmaps', 'snapshots'):
        do('convert', '-O', 'qcow2', '-f', 'raw', str(raw),
           str(folder / name))
    for number, (below, name) in enumerate(zip(CHAIN, CHAIN[1:])):
        layer = folder / 'layer'
        layer.write_bytes(_layer(name, range(5 + number, 60, 9)))
        do('convert', '-O', 'qcow2', '-f', 'raw', str(layer),
           str(folder / name))
        # What was not written is now what is below
        do('rebase', '-u', '-f', 'qcow2', '-F', 'qcow2', '-b', below,
           str(folder / name))
        layer.unlink()
    do('bitmap', '--add', str(folder / 'bitmaps'), 'first')
    do('bitmap', '--add', '--disable', '-g', '128k',
       str(folder / 'bitmaps'), 'second')
    do('snapshot', '-c', 'first', str(folder / 'snapshots'))
    do('snapshot', '-c', 'second', str(folder / 'snapshots'))
    _break(folder)


def _break(folder: Path) -> None:
    '''Images with a cluster that is lost, and with an unknown feature.'''
    data = bytearray((folder / 'qcow2').read_bytes())
    table = struct.unpack_from('>Q', data, 40)[0]
    entries = struct.unpack_from('>Q', data, table)[0] & ~(1 << 63)
    leak = bytearray(data)
    struct.pack_into('>Q', leak, entries, 0)
    (folder / 'broken-leak').write_bytes(leak)
    struct.pack_into('>Q', data, 72, 1 << 40)
    (folder / 'broken-feature').write_bytes(data)


def _writing(form: Format, raw: Path, path: Path) -> List[str]:
    '''The arguments that write the image @raw as @form to @path.'''
    options = form.options.format(path=str(path).replace(',', ',,'))
    return ['convert', '-f', 'raw', '-O', form.driver,
            *(['--object', SECRET] if form.encrypted else []),
            *(['-c'] if form.compressed else []),
            *(['-o', options] if options else []), str(raw), str(path)]


# -- Observations -----------------------------------------------------------

class Observed(NamedTuple):
    '''The values of assertions by their names, in a version of qemu-img.'''
    version: Version
    values: Mapping[str, Json]


@dataclass(frozen=True)
class _Image:
    name: str
    path: Path
    form: Format

    def options(self) -> str:
        '''The image for --image-opts.'''
        key = {'qcow2': 'encrypt.key-secret=secret,',
               'luks': 'key-secret=secret,'}[self.form.driver] \
            if self.form.encrypted else ''
        return (f'driver={self.form.driver},{key}file.driver=file,'
                'file.filename=' + str(self.path).replace(',', ',,'))

    def arguments(self) -> List[str]:
        '''The image as the last arguments of a command.'''
        if self.form.encrypted:
            return ['--object', SECRET, '--image-opts', self.options()]
        return ['-f', self.form.driver, str(self.path)]


def guest_bytes(path: Path) -> str:
    '''
    A digest of a raw image: SHA-256 of its size, and of each piece with its
    offset that is not zero. Disks are zero for the most part.
    '''
    digest = hashlib.sha256(str(path.stat().st_size).encode())
    zero = bytes(CLUSTER)
    with open(path, 'rb') as file:
        for offset in range(0, path.stat().st_size, CLUSTER):
            piece = file.read(CLUSTER)
            if piece != zero[:len(piece)]:
                digest.update(b'%d:%b' % (offset, piece))
    return digest.hexdigest()


# What is taken out of all values: it differs even between two files that
# were made in the same way
VOLATILE = {
    # How many blocks the file system took, which may change by itself
    'actual-size',
    # Of the file system that the file is on
    'extent-size-hint',
    # When a snapshot was made
    'date-sec', 'date-nsec',
    # Random, so that no two images are taken for the same
    'cid', 'parent-cid', 'uuid',
    # As many as this machine can do in some time
    'iters', 'master-key-iters'}
_DATE = re.compile(r'\d{4}-\d\d-\d\d \d\d:\d\d:\d\d')


def _without_holes(extents: List[Dict[str, Json]]) -> List[Dict[str, Json]]:
    '''
    @extents as they are in the image alone. Where the image has data,
    qemu-img may look for holes in its file, even depending on how many
    blocks the file took, and call them zero: of one file, file systems
    know others.
    '''
    merged: List[Dict[str, Json]] = []
    for extent in extents:
        plain = {**extent, 'zero': extent['zero'] and not extent['data']}
        if merged and _next(merged[-1]) == {**plain, 'length': 0}:
            merged[-1]['length'] += plain['length']
        else:
            merged.append(plain)
    return merged


def _next(extent: Dict[str, Json]) -> Dict[str, Json]:
    '''What goes on after @extent, without a length.'''
    following = {**extent, 'length': 0}
    for key in {'start', 'offset'} & set(extent):
        following[key] += extent['length']
    return following


class _Observer:
    '''
    Observes images with @run. What it writes goes to the folder @work, and
    is gone in the end. @places has the paths and what stands for them.
    '''

    def __init__(self, run: Run, work: Path,
                 places: Mapping[str, str]) -> None:
        self.run = run
        self.work = work
        self.places = places

    def _plain(self, value: Json) -> Json:
        if isinstance(value, dict):
            return {key: self._plain(item) for key, item in value.items()
                    if key not in VOLATILE}
        if isinstance(value, list):
            return [self._plain(item) for item in value]
        if isinstance(value, str):
            for path, name in self.places.items():
                value = value.replace(path, name)
            return _DATE.sub('DATE', value)
        return value

    def ask(self, *arguments: str) -> Json:
        '''What qemu-img answers: JSON, or lines.'''
        result = self.run(arguments)
        answer: Json
        try:
            answer = json.loads(result.stdout)
        except ValueError:
            answer = result.stdout.splitlines()
        answer = self._plain(answer)
        if result.returncode == 0:
            return answer
        return {'exit': result.returncode, 'output': answer,
                'error': self._plain(result.stderr.splitlines())}

    def info(self, image: _Image) -> Json:
        '''Of a chain, all images.'''
        chain = ['--backing-chain'] if image.name == CHAIN[-1] else []
        # Encrypted ones, too, tell this without the secret
        return self.ask('info', '--output=json', *chain, '-f',
                        image.form.driver, str(image.path))

    def check(self, image: _Image) -> Json:
        '''Also of images whose format does not know any check.'''
        return self.ask('check', '--output=json', *image.arguments())

    def map(self, image: _Image) -> Json:
        '''Of a flat image, only its size.'''
        extents = self.ask('map', '--output=json', *image.arguments())
        if not isinstance(extents, list):
            return extents
        if image.form.flat:
            return {'size': sum(extent['length'] for extent in extents)}
        return _without_holes(extents)

    def measure(self, image: _Image, target: str = 'qcow2') -> Json:
        '''Of a flat image, only what does not depend on holes.'''
        sizes = self.ask('measure', '--output=json', '-O', target,
                         *image.arguments())
        if image.form.flat and isinstance(sizes, dict):
            sizes.pop('required', None)
        return sizes

    def convert(self, image: _Image) -> Json:
        '''The digest of the bytes that a guest sees.'''
        raw = self.work / 'raw'
        try:
            answer = self.ask('convert', '-O', 'raw', *image.arguments(),
                              str(raw))
            return answer or (guest_bytes(raw) if raw.exists()
                              else 'nothing was written')
        finally:
            raw.unlink(missing_ok=True)

    def compare(self, image: _Image, other: _Image) -> Json:
        '''Whether it has the same bytes as the raw image @other.'''
        result = self.run(['compare', '--object', SECRET, '--image-opts',
                           image.options(), other.options()])
        return {'exit': result.returncode, 'text': self._plain(
            result.stdout.splitlines() + result.stderr.splitlines())}

    def snapshot(self, image: _Image) -> Json:
        '''The lines of the table.'''
        return self.ask('snapshot', '-l', str(image.path))


def observe(run: Run, reference: Run, folder: Path,
            disks: Mapping[str, Path], work: Path) -> Observed:
    '''
    @params run: the qemu-img to look at
    @params reference: the qemu-img that made the samples
    @params folder: where the samples are
    @params disks: qcow2 images of our own, by name
    @params work: an empty folder for what is written, empty in the end

    Returns what it says of all images, and, of those that it writes, what
    it and the reference read from them. Images are only read.
    '''
    places = {f'{folder}/': '', f'{work}/': '',
              **{str(path): DISK + name for name, path in disks.items()}}
    # As they stand in the options of an image
    places.update({path.replace(',', ',,'): name
                   for path, name in list(places.items())})
    observer = _Observer(run, work, places)
    values = {**_of_samples(observer, folder),
              **_of_disks(observer, reference, disks),
              **_of_writing(observer, reference, folder / 'raw')}
    return Observed(version_of(run), values)


def _of_samples(observer: _Observer, folder: Path) -> Dict[str, Json]:
    values: Dict[str, Json] = {}
    raw = _Image(RAW.name, folder / RAW.name, RAW)
    for form in FORMATS + OTHERS:
        image = _Image(form.name, folder / form.name, form)
        values.update(_read(observer, image))
        values[f'compare {image.name}'] = observer.compare(raw, image)
        if form.driver == 'qcow2':
            values[f'snapshot {image.name}'] = observer.snapshot(image)
    values['measure-raw qcow2'] = observer.measure(
        _Image(QCOW2.name, folder / QCOW2.name, QCOW2), 'raw')
    return values


def _read(observer: _Observer, image: _Image) -> Iterator[Tuple[str, Json]]:
    for name in ('info', 'check', 'map', 'measure', 'convert'):
        yield f'{name} {image.name}', getattr(observer, name)(image)


def _of_disks(observer: _Observer, reference: Run,
              disks: Mapping[str, Path]) -> Dict[str, Json]:
    values: Dict[str, Json] = {}
    for name, path in disks.items():
        image = _Image(DISK + name, path, Format(name, 'qcow2'))
        values.update(_read(observer, image))
        copy = replace(image, path=observer.work / 'copy')
        try:
            answer = observer.ask('convert', '-O', 'qcow2',
                                  *image.arguments(), str(copy.path))
            values[f'cross {image.name}'] = answer or _Observer(
                reference, observer.work, observer.places).convert(copy)
        finally:
            copy.path.unlink(missing_ok=True)
    return values


def _of_writing(observer: _Observer, reference: Run,
                raw: Path) -> Dict[str, Json]:
    '''What becomes of the pattern on its way through each format.'''
    values: Dict[str, Json] = {}
    other = _Observer(reference, observer.work, observer.places)
    for form in FORMATS:
        image = _Image(form.name, observer.work / 'image', form)
        failed = observer.ask(*_writing(form, raw, image.path))
        values[f'create {form.name}'] = failed or observer.info(image)
        values[f'round-trip {form.name}'] = (failed
                                             or observer.convert(image))
        values[f'cross {form.name}'] = failed or other.convert(image)
        # A data file or an extent has a name that begins in the same way
        for path in observer.work.glob('image*'):
            path.unlink()
    return values


# -- Verdicts ---------------------------------------------------------------

def comparator(assertion: str) -> str:
    '''The name of the comparator for an @assertion.'''
    return 'subset' if assertion.split()[0] in SUBSETS else 'exact'


def judge_all(baseline: Observed, reference: Observed, observed: Observed,
              declared: Sequence[Difference]) -> List[Judgement]:
    '''
    Judge what was @observed: of the samples, against the recorded
    @baseline, and of our own disks, which change with every build, against
    what the @reference has observed of the same files. An assertion that
    is on one side alone is ABSENT on the other.

    To see whether the baseline is still true, judge the reference itself.
    '''
    found = []
    for name in sorted({*baseline.values, *reference.values,
                        *observed.values}):
        known = reference if DISK in name else baseline
        found.append(judge(
            name, comparator(name), known.values.get(name, ABSENT),
            known.version, observed.values.get(name, ABSENT),
            observed.version, declared))
    return found


# -- The recorded baseline --------------------------------------------------

def load_baseline(path: Path) -> Observed:
    '''What record() wrote. Raises InputError.'''
    try:
        # Comments, as QEMU's other files of JSON have
        text = re.sub('^#.*', '', path.read_text(encoding='utf-8'),
                      flags=re.M)
        content: Any = json.loads(text)
        return Observed(Version.parse(content['version']),
                        dict(content['values']))
    except (OSError, ValueError, KeyError, TypeError, InputError) as e:
        raise InputError(f'{path}: not a recorded baseline: {e}',
                         next_step='record it anew') from e


def record(path: Path, observed: Observed) -> None:
    '''Write what was @observed of samples, not of disks, to @path.'''
    lines = [f' {json.dumps(name)}: {_dump(value, 1)}'
             for name, value in sorted(observed.values.items())
             if DISK not in name]
    write_atomically(path, f'{SPDX}\n{{\n'
                     f'"version": "{observed.version}",\n'
                     '"values": {\n' + ',\n'.join(lines) + '\n}\n}\n')


def _dump(value: Json, depth: int) -> str:
    '''JSON, where what has no further parts stands on one line.'''
    parts = value.values() if isinstance(value, dict) else value
    if (not isinstance(value, (dict, list))
            or not any(isinstance(part, (dict, list)) for part in parts)):
        return json.dumps(value, sort_keys=True)
    inside = ' ' * (depth + 1)
    if isinstance(value, dict):
        lines = [f'{inside}{json.dumps(key)}: {_dump(item, depth + 1)}'
                 for key, item in sorted(value.items())]
        return '{\n' + ',\n'.join(lines) + '\n' + ' ' * depth + '}'
    lines = [inside + _dump(item, depth + 1) for item in value]
    return '[\n' + ',\n'.join(lines) + '\n' + ' ' * depth + ']'
