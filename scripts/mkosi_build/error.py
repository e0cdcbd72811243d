# SPDX-License-Identifier: GPL-2.0-or-later
'''
Error classes

Each error that a user can cause says what was expected, what was found
and, where there is one, the next step. Its class decides the exit code
of scripts/mkosi-build.py.
'''

from typing import Optional


class BuildError(Exception):
    '''Base class of all errors that are reported without a traceback'''
    exit_code = 1

    def __init__(self, message: str, *,
                 next_step: Optional[str] = None) -> None:
        '''
        @params message: what is wrong, one line where possible
        @params next_step: what the user does next, in one sentence
        '''
        super().__init__(message)
        self.message = message
        self.next_step = next_step

    def __str__(self) -> str:
        if self.next_step is None:
            return self.message
        return f'{self.message}\n  next: {self.next_step}'


class UsageError(BuildError):
    '''The command line asks for something that does not exist'''
    exit_code = 2


class InputError(BuildError):
    '''The registry, a lock or a definition is wrong'''
    exit_code = 3


class HostError(BuildError):
    '''The host lacks a program, a permission or space'''
    exit_code = 4


class FetchError(BuildError):
    '''A package or an artefact cannot be had from any source'''
    exit_code = 5


class MkosiError(BuildError):
    '''mkosi failed'''
    exit_code = 6


class MismatchError(BuildError):
    '''The bytes differ from those that the registry names'''
    exit_code = 7


class PublishError(BuildError):
    '''A store refuses what is published, or has other bytes'''
    exit_code = 8


class RegistryError(InputError):
    '''The registry is wrong, or lacks what was asked for'''


class YAMLMissingError(HostError, ModuleNotFoundError):
    '''PyYAML is not installed'''
