from __future__ import annotations

import os

# Threads that wait would otherwise spin, and take the cores from those with work. Read by OpenMP
# when torch loads it.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Without it torch takes cuBLAS for not deterministic, as poisoned_allocations demands it to be.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from ccp_ext import models
from ccp_ext._build import build_info
from ccp_ext.compensation import reestimate_batchnorm

# A GPU's convolutions would otherwise round float32 to TF32, and be further from the CPU's than the
# tests allow.
torch.backends.cudnn.allow_tf32 = False


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


@pytest.fixture
def poisoned_allocations() -> Iterator[None]:
    """torch fills every uninitialised allocation with NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data.npz (96 training and 40 test images) and weights.th (a ResNet-8)."""
    folder, size = tmp_path_factory.mktemp("inputs"), 16
    rng = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", 96), ("test", 40)):
        labels = rng.integers(0, 10, count)
        images = rng.integers(0, 80, (count, 3, size, size)) + 15 * labels[:, None, None, None]
        arrays[f"{split}_images"], arrays[f"{split}_labels"] = images.astype(np.uint8), labels
    torch.manual_seed(0)
    model = models.create("resnet8")
    x = torch.from_numpy(arrays["train_images"]).float() / 128 - 1
    reestimate_batchnorm(model, x.split(48), progress=False)
    torch.save(
        {"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}},
        folder / "weights.th",
    )
    np.savez(folder / "data.npz", **arrays)
    return folder
