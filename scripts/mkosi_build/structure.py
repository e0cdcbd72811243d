# SPDX-License-Identifier: GPL-2.0-or-later
'''
Whether finished artefacts are what they should be, by their structure
alone: nothing is mounted and nothing of them is run. Each problem names
file, structure, offset, what was expected and what was found.
'''

import struct
from pathlib import Path
from typing import Callable, Dict, List, NamedTuple, Optional, Sequence

from . import archives, gpt, qcow2
from .build import Builder, Job, Result
from .error import FetchError, MkosiError
from .ext4 import MAGIC as EXT4, START as EXT4_START, Ext4
from .fat import Fat
from .reading import File, Malformed, Problem, Source, crc32c, number

# What firmware looks for on the ESP
BOOT_FILES = {'x86_64': '/EFI/BOOT/BOOTX64.EFI',
              'aarch64': '/EFI/BOOT/BOOTAA64.EFI'}
SECTIONS = ('.linux', '.initrd', '.cmdline', '.osrel')
EROFS = 0xe0f5e1e2
EFI_APPLICATION = 10
# A file with more is broken as a whole
MAX_TOLD = 20


class StructureError(MkosiError):
    '''What mkosi made is not in the form that it should be.'''


def _within(name: str, problems: Sequence[Problem],
            offset: Optional[int] = None) -> List[Problem]:
    '''@problems of what is inside @name, where offsets count anew.'''
    return [Problem(f'{name}: {p.structure}',
                    p.offset if offset is None or p.offset is None
                    else offset + p.offset, p.expected, p.found)
            for p in problems]


# -- The disk ---------------------------------------------------------------

def check_disk(file: Source, arch: str,
               tree: Optional[Path] = None) -> List[Problem]:
    '''What is wrong with a qcow2 @file that a guest of @arch boots from.'''
    try:
        disk = qcow2.Qcow2(file)
    except Malformed as e:
        return [e.problem]
    found = qcow2.problems(disk.header, file.size) + disk.check()
    try:
        table, more = gpt.check(disk)
        found += more
        if table:
            found += _check_partitions(disk, table, arch, tree)
    except Malformed as e:
        found.append(e.problem)
    return found


def _check_partitions(disk: Source, table: gpt.Table, arch: str,
                      tree: Optional[Path]) -> List[Problem]:
    found: List[Problem] = []
    for kind in (gpt.ROOTS[arch], gpt.ESP):
        those = [p for p in table.partitions if p.type == kind]
        if len(those) != 1:
            found.append(Problem(
                'GPT partitions', table.offset,
                f'one of type {gpt.NAMES[kind]}',
                ', '.join(str(p) for p in table.partitions) or 'none'))
        for partition in those:
            window = table.window(disk, partition)
            try:
                if kind == gpt.ESP:
                    problems = check_esp(window, arch, tree)
                else:
                    problems = check_root(window)
            except Malformed as e:
                problems = [e.problem]
            found += _within(str(partition), problems)
    return found


def check_root(source: Source) -> List[Problem]:
    '''What is wrong with the root file system in @source.'''
    head = source.take(EXT4_START, 128, 'root file system')
    if struct.unpack_from('<I', head)[0] == EROFS:
        return check_erofs(source)
    if struct.unpack_from('<H', head, 0x38)[0] == EXT4:
        return Ext4(source).check()
    return [Problem('root file system, magic',
                    source.origin + EXT4_START + 0x38,
                    f'{EXT4:#x} of ext4, or that of erofs',
                    f'0x{head[0x39::-1].hex()[:4]}')]


def check_erofs(source: Source) -> List[Problem]:
    '''What is wrong with the superblock of an erofs in @source.'''
    head = source.take(EXT4_START, 128, 'erofs superblock')
    checksum, features, bits = struct.unpack_from('<IIB', head, 4)
    blocks, = struct.unpack_from('<I', head, 0x24)
    place = source.origin + EXT4_START
    if not 9 <= bits <= 16:
        return [Problem('erofs superblock, block size', place + 0xc,
                        '9 to 16 bits', f'{bits}')]
    found = []
    if not 0 < blocks << bits <= source.size:
        found.append(Problem('erofs superblock, blocks', place + 0x24,
                             f'at most {source.size >> bits}, as fit into '
                             'the partition', f'{blocks}'))
    if features & 1:
        rest = source.read(EXT4_START, max((1 << bits) - EXT4_START, 512))
        expected = crc32c(0xffffffff, rest[:4] + bytes(4) + rest[8:])
        if expected != checksum:
            found.append(Problem('erofs superblock, checksum', place + 4,
                                 f'{expected:#x} by its bytes',
                                 f'{checksum:#x}'))
    return found


def check_esp(source: Source, arch: str,
              tree: Optional[Path] = None) -> List[Problem]:
    '''What is wrong with the ESP in @source, for firmware of @arch.'''
    system = Fat(source)
    found = system.check()
    if found:
        return found
    wanted = BOOT_FILES[arch]
    # FAT does not tell cases apart
    files = {m.path.upper(): m for m in system.members() if m.load}
    member = files.get(wanted)
    if member is None or member.load is None:
        return [Problem('ESP', None, wanted, ', '.join(files) or 'no file')]
    return _within(wanted, check_uki(member.load(), arch, tree))


def check_uki(data: bytes, arch: str,
              tree: Optional[Path] = None) -> List[Problem]:
    '''What is wrong with the unified kernel image @data.'''
    try:
        found = archives.program(data)
    except Malformed as e:
        return [e.problem]
    problems = []

    def expect(name: str, value: int) -> None:
        if found.fields.get(name) != value:
            problems.append(Problem(f'PE file, {name}', found.offsets[name],
                                    f'{value:#x}',
                                    f'{number(found.fields, name):#x}'))

    expect('machine', archives.MACHINES[arch])
    expect('subsystem', EFI_APPLICATION)
    names = [section.name for section in found.sections]
    for name in SECTIONS:
        section = found.section(name)
        if section is None:
            problems.append(Problem('PE file, sections', None, name,
                                    ', '.join(names)))
        elif not section.data.strip(b'\0 \n'):
            problems.append(Problem(f'section {name}', section.offset,
                                    'content', 'nothing'))
        elif name == '.linux':
            problems += _within(name, _check_program(section.data, arch))
        elif name == '.initrd':
            problems += _within(name, check_initrd(section.data, tree))
    return problems


def _check_program(data: bytes, arch: str) -> List[Problem]:
    try:
        machine = archives.program(data).fields.get('machine')
    except Malformed as e:
        return [e.problem]
    if machine != archives.MACHINES[arch]:
        return [Problem('PE file, machine', None,
                        f'{archives.MACHINES[arch]:#x}', f'{machine:#x}')]
    return []


# -- Kernel and initrd ------------------------------------------------------

def check_initrd(data: bytes, tree: Optional[Path] = None) -> List[Problem]:
    '''What is wrong with the initrd @data.'''
    try:
        members = [member for segment in archives.segments(data, tree)
                   for member in segment.order]
    except Malformed as e:
        return [e.problem]
    init = [member for member in members if member.path == '/init']
    if not init:
        return [Problem('cpio archive', None, '/init',
                        f'{len(members)} others')]
    if init[-1].kind not in ('file', 'link'):
        return [Problem('cpio archive, /init', None, 'a file or a link',
                        f'a {init[-1].kind}')]
    return []


class _Magic(NamedTuple):
    offset: int
    value: bytes


_MAGICS = {'bzimage': (_Magic(0x1fe, b'\x55\xaa'), _Magic(0x202, b'HdrS')),
           'image': (_Magic(56, b'ARM\x64'),)}


def check_kernel(data: bytes, form: str, arch: str) -> List[Problem]:
    '''
    What is wrong with the kernel @data in the @form that the registry
    names, for @arch.
    '''
    if form == 'image-gzip':
        if archives.compression(data) != 'gzip':
            return [Problem('kernel', 0, 'gzip', data[:2].hex())]
        try:
            data = archives.decompress(data)
        except Malformed as e:
            return [e.problem]
        return _within('unpacked', check_kernel(data, 'image', arch))
    for magic in _MAGICS[form]:
        there = data[magic.offset:magic.offset + len(magic.value)]
        if there != magic.value:
            return [Problem(f'kernel, magic of {form}', magic.offset,
                            magic.value.hex(), there.hex())]
    found = _check_size(data, form)
    return found or (_check_program(data, arch) if data[:2] == b'MZ' else [])


def _check_size(data: bytes, form: str) -> List[Problem]:
    if form == 'bzimage':
        # Documentation/arch/x86/boot.rst
        setup, size = data[0x1f1] or 4, struct.unpack_from('<I', data,
                                                           0x1f4)[0]
        needed = (setup + 1) * 512 + size * 16
        if len(data) < needed:
            return [Problem('kernel, size', 0x1f4, f'{needed} bytes',
                            f'{len(data)}')]
    else:
        # Documentation/arch/arm64/booting.rst: what it takes in memory
        size, = struct.unpack_from('<Q', data, 16)
        if len(data) > size:
            return [Problem('kernel, size of the image', 16,
                            f'{len(data)} or more', f'{size}')]
    return []


# -- An image ---------------------------------------------------------------

def check(result: Result, tree: Optional[Path] = None
          ) -> Dict[str, List[Problem]]:
    '''
    What is wrong with the artefacts of @result, by kind; zstd by the tools
    @tree where the host has no program. Raises HostError where neither has.
    '''
    arch = result.job.target.arch
    form = result.job.target.artefacts['kernel'].format
    checks: Dict[str, Callable[[Path], List[Problem]]] = {
        'kernel': lambda p: check_kernel(p.read_bytes(), form, arch),
        'initrd': lambda p: check_initrd(p.read_bytes(), tree),
        'disk': lambda p: check_disk(File(p), arch, tree)}
    return {kind: checks[kind](built.path)
            for kind, built in result.artefacts.items()}


def inspect(builder: Builder, jobs: Sequence[Job]) -> None:
    '''
    Check what was built of @jobs, and tell all that is wrong. Raises
    FetchError where one is not built, StructureError for problems.
    '''
    results = [(job, builder.find(job)) for job in jobs]
    for job, result in results:
        if result is None:
            raise FetchError(
                f'{job.image.name} {job.target.arch} is not built, so there '
                'is nothing to inspect',
                next_step=f'scripts/mkosi-build.py {job.target.arch} '
                f'{job.image.name}')
    broken = [f'{job.image.name} {job.target.arch}'
              for job, result in results
              if result and not _inspect(builder, result)]
    if broken:
        raise StructureError(
            f'what was built is broken: {", ".join(broken)}',
            next_step='look for a full disk or a broken one, then build '
            'anew with the same command and no --inspect; if that gives the '
            'same, the definition is wrong')


def _inspect(builder: Builder, result: Result) -> bool:
    job = result.job
    title = f'{job.image.name} {job.target.arch}'
    tree = builder.cache.tools / job.tool_lock.digest
    with builder.report.stage(f'inspecting {title}'):
        found = check(result, tree if tree.is_dir() else None)
    for kind, problems in found.items():
        file = result.artefacts[kind].path
        for problem in problems[:MAX_TOLD]:
            builder.report.event(
                'problem', f'{title}: {file.name}: {problem}',
                image=job.image.name, arch=job.target.arch, file=str(file),
                structure=problem.structure, offset=problem.offset,
                expected=problem.expected, found=problem.found)
        if len(problems) > MAX_TOLD:
            builder.report.event(
                'problem', f'{title}: {file.name}: and '
                f'{len(problems) - MAX_TOLD} more', image=job.image.name,
                arch=job.target.arch, file=str(file))
    count = sum(len(problems) for problems in found.values())
    builder.report.event(
        'inspected', f'{title}: {count or "no"} problems in '
        f'{", ".join(result.artefacts[k].path.name for k in found)}',
        image=job.image.name, arch=job.target.arch, problems=count)
    return not count
