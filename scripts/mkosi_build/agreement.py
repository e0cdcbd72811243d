# SPDX-License-Identifier: GPL-2.0-or-later
'''
Whether registry, locks and definitions agree: told without building.
'''

from typing import Mapping, Optional

from .build import Job
from .error import BuildError, InputError


def disagreement(job: Job) -> Optional[BuildError]:
    '''Why the registry's hashes are not those of the tree's inputs.'''
    arch = job.target.arch
    command = f'scripts/mkosi-build.py {arch} {job.image.name}'
    if job.lock.definition != job.definition:
        return InputError(
            f'{job.image.name}: the definition has changed since '
            f'{arch}.lock was made',
            next_step=f'{command} --local to try it, --update to record '
            'it, after --update-lock if it needs other packages')
    if not job.target.built:
        return InputError(
            f'{job.image.name} {arch} has no hashes in the '
            f'registry yet', next_step=f'{command} --update')
    if job.identity != job.target.identity:
        return InputError(
            f'{job.image.name}: definition or locks have changed '
            f'without their hashes: the registry is for identity '
            f'{job.target.identity}, the tree has {job.identity}',
            next_step=f'{command} --update')
    return None


def over_budget(job: Job, sizes: Mapping[str, int]) -> Optional[BuildError]:
    '''Which budget artefacts of @sizes bytes, by kind, have outgrown.'''
    budget = job.target.budget
    for what, found, limit in (
            ('kernel-initrd-bytes', sizes['kernel'] + sizes['initrd'],
             budget.kernel_initrd_bytes),
            ('disk-bytes', sizes['disk'], budget.disk_bytes),
            ('packages', len(job.lock.packages), budget.packages)):
        if found > limit:
            return InputError(
                f'{job.image.name} {job.target.arch}: {what}: the budget '
                f'is {limit}, found {found}',
                next_step='make it smaller, or raise the budget in the '
                'registry and say why')
    return None
