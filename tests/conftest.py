from __future__ import annotations

import os

# Threads that wait would otherwise spin, and take the cores from those with work. Read by OpenMP
# when torch loads it.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch

from ccp_ext._build import build_info


def _why_no_gpu() -> str | None:
    if not build_info()["cuda"]:
        return "this build has no CUDA kernels"
    return None if torch.cuda.is_available() else "no usable GPU"


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Each device in turn; "cuda" carries the marker gpu and is skipped where it cannot run."""
    if request.param == "cuda" and (reason := _why_no_gpu()):
        pytest.skip(reason)
    return request.param


@pytest.fixture
def cuda() -> str:
    """For tests of the GPU alone, which carry the marker gpu."""
    if reason := _why_no_gpu():
        pytest.skip(reason)
    return "cuda"


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
