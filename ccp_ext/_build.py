"""What the native module was built from, read out of the binary itself."""

from __future__ import annotations

import torch

from ccp_ext import _C


def build_info() -> dict[str, object]:
    """What ``ccp_ext._C`` was built from.

    Returns:
        ``version`` of the package, ``torch`` (the version built with), ``compiler``, ``cuda``
        (bool: the module has the CUDA kernels), ``nvcc`` (its version, or None) and
        ``architectures`` (a list such as ``["8.0", "9.0", "10.0+PTX"]``; empty without CUDA).
    """
    built = _C.build_info()
    architectures = built["architectures"].split(",") if built["architectures"] else []
    cuda = bool(architectures)
    return {**built, "nvcc": built["nvcc"] or None, "architectures": architectures, "cuda": cuda}


def usable_devices() -> list[str]:
    """Devices on which this build and this machine can run the operators: "cpu", then GPUs."""
    gpus = torch.cuda.device_count() if build_info()["cuda"] and torch.cuda.is_available() else 0
    return ["cpu", *(f"cuda:{k}" for k in range(gpus))]
