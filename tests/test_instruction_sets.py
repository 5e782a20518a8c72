"""The CPU kernels of every instruction set, as they are shipped.

A processor runs its best ones; here, in other processes, the lesser ones.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ccp_ext

SUMS = """
import torch
from ccp_ext import ops
x, g = torch.randn(2, 16, 8, 40, 40, generator=torch.Generator().manual_seed(0))
print(ops.channel_dot(x, g).tolist())
"""


def in_process(*arguments: str, capability: str) -> str:
    finished = subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "ATEN_CPU_CAPABILITY": capability},
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_equal_terms_keep_the_error_bound(capability: str) -> None:
    file = "tests/test_channel_dot.py"
    printed = in_process("-m", "pytest", "-q", file, "-k", "equal_terms", capability=capability)
    assert re.search(r"^8 passed", printed, re.MULTILINE)


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_lesser_instruction_sets_are_right_on_odd_sizes(capability: str) -> None:
    printed = in_process("-m", "benchmarks.check", capability=capability)
    assert printed == "217 results of 'ours' are within their bounds\n"


@pytest.mark.skipif(
    not torch.backends.cpu.get_cpu_capability().startswith("AVX")
    or not ccp_ext.build_info()["compiler"].startswith("gcc"),
    reason="one instruction set: not an x86 processor with AVX2, or not built by GCC",
)
def test_torch_variable_chooses_the_instruction_set() -> None:
    default, best, unknown = (
        in_process("-c", SUMS, capability=capability) for capability in ("default", "", "sse9")
    )
    assert default != best  # other vectors, other order of the sums
    assert unknown == best
