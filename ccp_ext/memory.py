"""The memory of the process, beyond what Python sees of it."""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable
from pathlib import Path


def trim() -> None:
    """Give what the allocator holds free back to the system.

    glibc keeps it, and does so for each of its arenas, between which threads are spread; elsewhere
    nothing happens.
    """
    _malloc_trim()(0)


class Ceiling:
    """Trims when the process has grown by more than so many bytes since this was made.

    Not at all where the system does not tell how large it is: only Linux does.
    """

    def __init__(self, size: float) -> None:
        self._most = _resident() + size

    def keep(self) -> None:
        if _resident() > self._most:
            trim()


def _resident() -> int:
    try:
        pages = Path("/proc/self/statm").read_text().split()[1]
    except OSError:
        return 0
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


@functools.cache
def _malloc_trim() -> Callable[[int], object]:
    return getattr(ctypes.CDLL(None), "malloc_trim", lambda padding: 0)
