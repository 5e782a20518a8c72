"""The one exception type for problems that the user can mend."""

from __future__ import annotations


class InputError(ValueError):
    """Bad input: the message names the option, the offending value and what is accepted.

    The command line prints the message as one sentence and exits with status 2; any other
    exception is a defect of this package and keeps its traceback.
    """
