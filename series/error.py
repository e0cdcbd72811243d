# SPDX-License-Identifier: GPL-2.0-or-later
'''The one error of the harness: a message and the next step.'''

from typing import Optional


class SeriesError(Exception):
    '''Something that the user can mend; str() is the whole message.'''

    def __init__(self, message: str, *, next_step: Optional[str] = None):
        if next_step:
            message += f'\n  next: {next_step}'
        super().__init__(message)
