"""The memory of the process, beyond what Python sees of it."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable


def trim() -> None:
    """Give what the allocator holds free back to the system, so that other threads can have it.

    glibc does; elsewhere nothing happens.
    """
    _malloc_trim()(0)


@functools.cache
def _malloc_trim() -> Callable[[int], object]:
    return getattr(ctypes.CDLL(None), "malloc_trim", lambda padding: 0)
