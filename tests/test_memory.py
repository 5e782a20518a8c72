"""Memory that the allocator holds free goes back to the system."""

from __future__ import annotations

import subprocess
import sys

import pytest

from ccp_ext import memory
from ccp_ext.memory import Ceiling

# 64 MiB free in the arena of a thread, below a block that is still held. In a process of its own:
# where many threads have been, the arena may have had the memory before.
FREED = """
import threading
import torch
from ccp_ext import memory

kept = []

def work():
    blocks = [torch.ones(2**12) for _ in range(2**12)]
    kept.append(blocks[-1])

before = memory._resident()
thread = threading.Thread(target=work)
thread.start()
thread.join()
grown = memory._resident() - before
memory.trim()
print(grown, memory._resident() - before)
"""


@pytest.mark.skipif(not memory._resident(), reason="needs Linux's /proc")
def test_what_is_free_goes_back():
    command = [sys.executable, "-c", FREED]
    run = subprocess.run(command, check=True, capture_output=True, text=True)
    grown, left = map(int, run.stdout.split())
    assert grown > 0.9 * 2**26
    assert left < 0.2 * 2**26


@pytest.mark.parametrize(("resident", "trims"), [(150, 0), (151, 1)])
def test_a_ceiling_trims_above_it_only(monkeypatch, resident, trims):
    calls = []
    monkeypatch.setattr(memory, "trim", lambda: calls.append(1))
    monkeypatch.setattr(memory, "_resident", lambda: 100)
    ceiling = Ceiling(50)
    ceiling.keep()
    monkeypatch.setattr(memory, "_resident", lambda: resident)
    ceiling.keep()
    assert len(calls) == trims
