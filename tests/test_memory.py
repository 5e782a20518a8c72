"""Memory that the allocator holds free goes back to the system."""

from __future__ import annotations

import threading

import pytest
import torch

from ccp_ext import memory
from ccp_ext.memory import Ceiling

SIZE = 64 * 2**20


def grow() -> torch.Tensor:
    """Leave 64 MiB free in the arena of a thread; what is returned lies above them."""
    kept = []

    def work() -> None:
        blocks = [torch.ones(2**12) for _ in range(SIZE >> 14)]
        kept.append(blocks[-1])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return kept[0]


@pytest.mark.parametrize(("room", "trims"), [(SIZE // 4, True), (4 * SIZE, False)])
def test_what_is_free_goes_back_above_the_ceiling_only(room, trims):
    if not memory._resident():
        pytest.skip("needs Linux's /proc")
    memory.trim()
    before, ceiling = memory._resident(), Ceiling(room)
    last = grow()
    grown = memory._resident() - before
    assert grown > 0.9 * SIZE and len(last)
    ceiling.keep()
    assert (memory._resident() - before < 0.2 * SIZE) == trims
