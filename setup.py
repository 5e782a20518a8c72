"""Builds the native modules: the operators, ``ccp_ext._C``, and the solver, ``ccp_ext._solver``.

``CCP_CUDA`` decides about the CUDA kernels:

- ``auto`` (default): built if this torch is a CUDA build and an nvcc of the same CUDA major version
  is found. No GPU is needed to build.
- ``1``: built, or the build stops and says why not. With a CPU build of torch, too: the module then
  serves CUDA builds of torch as well as this one.
- ``0``: not built.

``CUDA_HOME`` names the CUDA toolkit; otherwise nvcc on ``PATH`` is asked. ``TORCH_CUDA_ARCH_LIST``
names the GPU architectures, 8.0 (Ampere) or later.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent
DEFAULT_ARCHITECTURES = "8.0;9.0;10.0+PTX"
OLDEST_ARCHITECTURE = 8.0  # cp.async and the matrix units' bfloat16 and TF32 came with Ampere
TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000ULL"  # 2.11, the oldest torch served


@dataclass(frozen=True)
class Toolkit:
    """A CUDA toolkit: its folder, its compiler and that compiler's version, such as ``13.0``."""

    home: Path
    nvcc: Path
    version: str


@dataclass(frozen=True)
class BuildConfig:
    """The decision about CUDA; ``toolkit`` is None in a build without."""

    toolkit: Toolkit | None
    reason: str
    architectures: tuple[str, ...] = ()

    @property
    def line(self) -> str:
        """The decision in one line, for the build's output."""
        if self.toolkit is None:
            return f"ccp_ext: CPU kernels only: {self.reason}"
        return (
            f"ccp_ext: CPU and CUDA kernels: {self.reason}; nvcc {self.toolkit.version} at "
            f"{self.toolkit.nvcc}; architectures {' '.join(self.architectures)}"
        )


def build_config(
    env: Mapping[str, str], torch_cuda: str | None, toolkit: Toolkit | None
) -> BuildConfig:
    """Decide whether the CUDA kernels are built.

    Args:
        env: The environment: ``CCP_CUDA``, ``TORCH_CUDA_ARCH_LIST``.
        torch_cuda: The CUDA version that torch was built with; None for a CPU build.
        toolkit: What ``find_toolkit`` found.

    Raises:
        SystemExit: ``CCP_CUDA`` has another value than auto, 1 and 0; or it is 1 and nvcc is
            missing or of another CUDA major version than torch; or ``TORCH_CUDA_ARCH_LIST`` names
            an architecture that the kernels do not serve.
    """
    choice = env.get("CCP_CUDA", "auto")
    if choice not in ("auto", "1", "0"):
        raise SystemExit(f"ccp_ext: CCP_CUDA must be auto, 1 or 0, got {choice!r}.")
    if choice == "0":
        return BuildConfig(None, "CCP_CUDA=0")
    if choice == "auto" and torch_cuda is None:
        return BuildConfig(None, "this torch is a CPU build")
    obstacle = None
    if toolkit is None:
        obstacle = "nvcc was not found, neither in CUDA_HOME nor on PATH"
    elif torch_cuda is not None and major(toolkit.version) != major(torch_cuda):
        obstacle = (
            f"nvcc {toolkit.version} at {toolkit.nvcc} and torch's CUDA {torch_cuda} differ in the "
            "major version"
        )
    if obstacle is None:
        reason = "CCP_CUDA=1" if choice == "1" else f"torch is built for CUDA {torch_cuda}"
        return BuildConfig(toolkit, reason, architectures(env))
    if choice == "1":
        raise SystemExit(f"ccp_ext: CCP_CUDA=1, but {obstacle}.")
    return BuildConfig(None, obstacle)


def architectures(env: Mapping[str, str]) -> tuple[str, ...]:
    """``TORCH_CUDA_ARCH_LIST``, or the default, as a tuple such as ``("8.0", "9.0+PTX")``.

    Raises:
        SystemExit: One of them is no number such as 8.6, 9.0a or 9.0+PTX, or is below 8.0.
    """
    listed = env.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_ARCHITECTURES
    names = tuple(re.split(r"[;,\s]+", listed.strip(";, ")))
    for name in names:
        number = re.fullmatch(r"(\d+\.\d)[af]?(\+PTX)?", name)
        if number is None or float(number[1]) < OLDEST_ARCHITECTURE:
            raise SystemExit(
                "ccp_ext: TORCH_CUDA_ARCH_LIST must name architectures from "
                f"{OLDEST_ARCHITECTURE} on, such as {DEFAULT_ARCHITECTURES}, got {name!r}."
            )
    return names


def gencode_flags(names: tuple[str, ...]) -> list[str]:
    """nvcc's flags for architectures, as ``architectures`` gives them.

    9.0 is compiled for sm_90a, which has the matrix products of warpgroups; every GPU of compute
    capability 9.0 runs that. PTX for 9.0a no other GPU would, so that 9.0+PTX has plain PTX.
    """
    flags = []
    for name in names:
        number, plus, _ = name.partition("+")
        machine = number.replace(".", "")
        target = "90a" if machine == "90" else machine
        flags.append(f"-gencode=arch=compute_{target},code=sm_{target}")
        if plus:
            flags.append(f"-gencode=arch=compute_{machine},code=compute_{machine}")
    return list(dict.fromkeys(flags))


def major(version: str) -> str:
    return version.split(".")[0]


def find_toolkit(env: Mapping[str, str]) -> Toolkit | None:
    """The CUDA toolkit of ``CUDA_HOME``, or else that of nvcc on ``PATH``."""
    if env.get("CUDA_HOME"):
        nvcc = Path(env["CUDA_HOME"]) / "bin" / "nvcc"
        home: Path | None = Path(env["CUDA_HOME"])
    else:
        found = shutil.which("nvcc", path=env.get("PATH"))
        if found is None:
            return None
        nvcc = Path(found)
        home = toolkit_home(nvcc)
    version = re.search(r"release (\d+\.\d+)", output_of(nvcc, "--version"))
    return Toolkit(home, nvcc, version[1]) if home and version else None


def toolkit_home(nvcc: Path) -> Path | None:
    """The folder that nvcc itself names: nvcc on ``PATH`` may be a script that calls another."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "empty.cu"
        source.touch()
        top = re.search(r"^#\$ TOP=(.+)$", output_of(nvcc, "--dryrun", str(source)), re.MULTILINE)
    return Path(top[1]).resolve() if top else None


def output_of(*command: str | Path) -> str:
    """Standard output and error of a command; empty when it cannot be run."""
    try:
        finished = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return finished.stdout + finished.stderr


def static_runtime_folder(toolkit: Toolkit) -> Path:
    """The folder of libcudart_static.a.

    The static runtime, and not ``-lcudart``, so that the module also imports where no CUDA library
    is installed.
    """
    candidates = [toolkit.home / "lib64", toolkit.home / "lib"]
    candidates += sorted(toolkit.home.glob("targets/*/lib"))
    for folder in candidates:
        if (folder / "libcudart_static.a").exists():
            return folder
    raise SystemExit(
        f"ccp_ext: the CUDA toolkit at {toolkit.home} has no libcudart_static.a in lib64, lib or "
        "targets/*/lib; install its runtime development package or set CUDA_HOME to another."
    )


def extension_modules(config: BuildConfig) -> list:
    """The extension modules for setuptools; those of the solver only where its sources exist."""
    import pybind11
    import torch
    from setuptools import Extension
    from torch.utils import cpp_extension

    site_packages = Path(torch.__file__).parent.parent
    # No path of the building machine may end up in a message or in the binary.
    prefix_maps = [f"-ffile-prefix-map={folder}/=" for folder in (ROOT, site_packages)]
    host_flags = ["-g0", "-fvisibility=hidden", "-Wno-psabi", *prefix_maps]
    common_flags = ["-O3", "-std=c++17", TORCH_TARGET]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    info = {"VERSION": project["version"], "TORCH": torch.__version__}
    cuda_options: dict[str, list[str]] = {}
    sources = ["csrc/library.cpp", *relative_paths("csrc/cpu/*.cpp")]
    if config.toolkit is not None:
        cpp_extension.CUDA_HOME = str(config.toolkit.home)  # None where torch is a CPU build
        info |= {"NVCC": config.toolkit.version, "GPUS": ",".join(config.architectures)}
        sources += relative_paths("csrc/cuda/*.cu")
        cuda_options = {
            "include_dirs": [str(config.toolkit.home / "include")],
            "library_dirs": [str(static_runtime_folder(config.toolkit))],
            "libraries": ["cudart_static", "dl", "rt", "pthread"],
        }
    info_flags = [f"-DCCP_BUILD_{name}={value}" for name, value in info.items()]
    include_dirs = [str(ROOT), *cuda_options.pop("include_dirs", [])]
    modules = [
        cpp_extension.CppExtension(
            "ccp_ext._C",
            sources,
            include_dirs=include_dirs,
            extra_compile_args={
                "cxx": [*common_flags, *host_flags, *info_flags],
                "nvcc": [
                    *common_flags,
                    "-Xptxas=-warn-spills",
                    *gencode_flags(config.architectures),
                    *(f"-Xcompiler={flag}" for flag in host_flags),
                ],
            },
            py_limited_api=True,
            **cuda_options,
        )
    ]
    solver_sources = relative_paths("csrc/solver/*.cpp")
    if solver_sources:
        modules.append(
            Extension(
                "ccp_ext._solver",
                solver_sources,
                include_dirs=[str(ROOT / "csrc" / "solver"), pybind11.get_include()],
                # Without contraction, every instruction set gives the same bits.
                extra_compile_args={"cxx": ["-O3", "-std=c++17", "-ffp-contract=off", *host_flags]},
                language="c++",
            )
        )
    return modules


def relative_paths(pattern: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(pattern))


def main() -> None:
    import torch

    toolkit = None if os.environ.get("CCP_CUDA") == "0" else find_toolkit(os.environ)
    config = build_config(os.environ, torch.version.cuda, toolkit)

    # After the decision: where there is no GPU, this import prints a warning of its own.
    from setuptools import setup
    from torch.utils.cpp_extension import BuildExtension

    class Build(BuildExtension):
        def run(self) -> None:
            print(config.line, flush=True)
            super().run()

    setup(ext_modules=extension_modules(config), cmdclass={"build_ext": Build})


if __name__ == "__main__":
    main()
