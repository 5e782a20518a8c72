"""What ``benchmarks/gpu.sh`` needs and this machine lacks, in one line.

    python -m benchmarks.needs [--dry]

The exit status is 3 where nothing could run; what lacks less serves some phases all the same.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

NOTHING_CAN_RUN = 3


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry", action="store_true", help="no GPU is needed")
    dry = parser.parse_args(arguments).dry
    for_all = _for_all(dry)
    lacking = for_all + _for_some(dry)
    if lacking:
        print(f"this machine lacks: {', '.join(lacking)}")
    return NOTHING_CAN_RUN if for_all else 0


def _for_all(dry: bool) -> list[str]:
    """What every phase needs."""
    lacking = _packages("torch", "numpy")
    if dry or "torch" in lacking:
        return lacking
    import torch

    return (
        lacking if torch.cuda.is_available() else [*lacking, f"a GPU for torch {torch.__version__}"]
    )


def _for_some(dry: bool) -> list[str]:
    """What the build or the tests need."""
    lacking = _packages("setuptools", "pybind11", "pytest")
    if not shutil.which(os.environ.get("CXX") or "c++"):
        lacking.append("a C++ compiler")
    if _packages("ninja") and not shutil.which("ninja"):
        lacking.append("ninja")
    if not dry:
        home = os.environ.get("CUDA_HOME")
        folder = str(Path(home) / "bin") if home else None
        found = {
            "nvcc": shutil.which("nvcc", path=folder),
            "nvidia-smi": shutil.which("nvidia-smi"),
        }
        lacking += [name for name, path in found.items() if not path]
    return lacking


def _packages(*names: str) -> list[str]:
    return [name for name in names if importlib.util.find_spec(name) is None]


if __name__ == "__main__":
    raise SystemExit(main())
