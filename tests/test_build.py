"""The decisions of setup.py, and what the built module says of itself."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.utils import cpp_extension

from ccp_ext import _C
from ccp_ext._build import build_info

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def setup() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ccp_ext_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def toolkit(setup: ModuleType) -> object:
    return setup.Toolkit(Path("/opt/cuda"), Path("/opt/cuda/bin/nvcc"), "13.0")


def write_script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
    path.chmod(0o755)
    return path


def test_auto_builds_cuda_for_a_matching_toolkit(setup: ModuleType, toolkit: object) -> None:
    config = setup.build_config({}, "13.2", toolkit)
    assert config.toolkit is toolkit
    assert config.line == (
        "ccp_ext: CPU and CUDA kernels: torch is built for CUDA 13.2; "
        "nvcc 13.0 at /opt/cuda/bin/nvcc; architectures 8.0 9.0 10.0+PTX"
    )


@pytest.mark.parametrize(
    ("env", "torch_cuda", "found", "reason"),
    [
        ({}, None, True, "this torch is a CPU build"),
        ({}, "13.2", False, "nvcc was not found, neither in CUDA_HOME nor on PATH"),
        (
            {"CCP_CUDA": "auto"},
            "12.8",
            True,
            "nvcc 13.0 at /opt/cuda/bin/nvcc and torch's CUDA 12.8 differ in the major version",
        ),
        ({"CCP_CUDA": "0"}, "13.2", True, "CCP_CUDA=0"),
    ],
)
def test_a_build_without_cuda_says_why(
    setup: ModuleType,
    toolkit: object,
    env: dict[str, str],
    torch_cuda: str | None,
    found: bool,
    reason: str,
) -> None:
    config = setup.build_config(env, torch_cuda, toolkit if found else None)
    assert config.toolkit is None
    assert config.line == f"ccp_ext: CPU kernels only: {reason}"


@pytest.mark.parametrize("torch_cuda", [None, "13.2"])
def test_1_builds_cuda_whatever_torch_is(
    setup: ModuleType, toolkit: object, torch_cuda: str | None
) -> None:
    assert setup.build_config({"CCP_CUDA": "1"}, torch_cuda, toolkit).toolkit is toolkit


@pytest.mark.parametrize(
    ("env", "torch_cuda", "found", "message"),
    [
        ({"CCP_CUDA": "yes"}, None, True, "CCP_CUDA must be auto, 1 or 0, got 'yes'."),
        ({"CCP_CUDA": "1"}, None, False, "CCP_CUDA=1, but nvcc was not found"),
        ({"CCP_CUDA": "1"}, "12.8", True, "CCP_CUDA=1, but nvcc 13.0 .* differ in the major"),
    ],
)
def test_an_impossible_wish_stops_the_build(
    setup: ModuleType,
    toolkit: object,
    env: dict[str, str],
    torch_cuda: str | None,
    found: bool,
    message: str,
) -> None:
    with pytest.raises(SystemExit, match=message):
        setup.build_config(env, torch_cuda, toolkit if found else None)


def test_a_stopped_build_prints_one_sentence_and_no_traceback() -> None:
    finished = subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=ROOT,
        env=os.environ | {"CCP_CUDA": "yes"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode != 0
    assert finished.stderr.strip() == "ccp_ext: CCP_CUDA must be auto, 1 or 0, got 'yes'."


@pytest.mark.parametrize(
    ("listed", "expected"),
    [
        ("", ("8.0", "9.0", "10.0+PTX")),
        ("9.0", ("9.0",)),
        ("8.6;9.0+PTX", ("8.6", "9.0+PTX")),
        ("8.6, 9.0 ;", ("8.6", "9.0")),
    ],
)
def test_architectures(setup: ModuleType, listed: str, expected: tuple[str, ...]) -> None:
    assert setup.architectures({"TORCH_CUDA_ARCH_LIST": listed}) == expected


@pytest.mark.parametrize("listed", ["7.5", "9.0;7.0+PTX", "6.1 8.0", "Turing", "80"])
def test_architectures_without_the_kernels_instructions_are_refused(
    setup: ModuleType, toolkit: object, listed: str
) -> None:
    [refused] = [name for name in re.split("[; ]", listed) if name not in ("8.0", "9.0")]
    message = (
        "ccp_ext: TORCH_CUDA_ARCH_LIST must name architectures from 8.0 on, such as "
        f"8.0;9.0;10.0+PTX, got {refused!r}."
    )
    with pytest.raises(SystemExit, match=re.escape(message)):
        setup.build_config({"TORCH_CUDA_ARCH_LIST": listed}, "13.2", toolkit)


@pytest.mark.parametrize(
    ("names", "targets"),
    [
        (("8.0",), [("80", "sm_80")]),
        (("9.0",), [("90a", "sm_90a")]),
        (("9.0a", "9.0"), [("90a", "sm_90a")]),
        (("9.0+PTX",), [("90a", "sm_90a"), ("90", "compute_90")]),
        (("8.0", "10.0+PTX"), [("80", "sm_80"), ("100", "sm_100"), ("100", "compute_100")]),
    ],
)
def test_capability_9_0_is_compiled_for_sm_90a(
    setup: ModuleType, names: tuple[str, ...], targets: list[tuple[str, str]]
) -> None:
    flags = setup.gencode_flags(names)
    assert flags == [f"-gencode=arch=compute_{of},code={code}" for of, code in targets]
    assert cpp_extension._get_cuda_arch_flags(flags) == []  # torch adds none of its own


def test_a_build_without_cuda_needs_no_architectures(setup: ModuleType, toolkit: object) -> None:
    env = {"CCP_CUDA": "0", "TORCH_CUDA_ARCH_LIST": "7.5"}
    assert setup.build_config(env, "13.2", toolkit).architectures == ()


def test_a_wrapper_of_nvcc_leads_to_the_real_toolkit(setup: ModuleType, tmp_path: Path) -> None:
    home = tmp_path / "toolkit"
    nvcc = write_script(
        home / "bin" / "nvcc",
        f'case "$1" in --dryrun) echo "#\\$ TOP={home}/bin/.." >&2 ;; '
        '*) echo "Cuda compilation tools, release 12.4, V12.4.131" ;; esac',
    )
    wrapper = write_script(tmp_path / "bin" / "nvcc", f'exec {nvcc} "$@"')
    found = setup.find_toolkit({"PATH": str(wrapper.parent)})
    assert found == setup.Toolkit(home, wrapper, "12.4")


def test_cuda_home_goes_before_path(setup: ModuleType, tmp_path: Path) -> None:
    for name, release in (("named", "12.1"), ("on_path", "13.0")):
        write_script(tmp_path / name / "bin" / "nvcc", f'echo "release {release}, V{release}.1"')
    env = {"CUDA_HOME": str(tmp_path / "named"), "PATH": str(tmp_path / "on_path" / "bin")}
    assert setup.find_toolkit(env).version == "12.1"


@pytest.mark.parametrize("env", [{"PATH": ""}, {"CUDA_HOME": "/nonexistent", "PATH": ""}])
def test_no_toolkit(setup: ModuleType, env: dict[str, str]) -> None:
    assert setup.find_toolkit(env) is None


@pytest.mark.parametrize("folder", ["lib64", "lib", "targets/sbsa-linux/lib"])
def test_the_static_runtime_is_found(setup: ModuleType, tmp_path: Path, folder: str) -> None:
    (tmp_path / folder).mkdir(parents=True)
    (tmp_path / folder / "libcudart_static.a").touch()
    toolkit = setup.Toolkit(tmp_path, tmp_path / "bin" / "nvcc", "13.0")
    assert setup.static_runtime_folder(toolkit) == tmp_path / folder


def test_a_missing_static_runtime_is_named(setup: ModuleType, tmp_path: Path) -> None:
    toolkit = setup.Toolkit(tmp_path, tmp_path / "bin" / "nvcc", "13.0")
    with pytest.raises(SystemExit, match="has no libcudart_static.a in lib64, lib or"):
        setup.static_runtime_folder(toolkit)


def test_build_info_comes_from_the_binary() -> None:
    info = build_info()
    assert set(info) == {"version", "torch", "compiler", "nvcc", "architectures", "cuda"}
    assert info["version"] == "0.1.0"
    assert info["torch"].count(".") >= 2 and info["compiler"]
    assert info["cuda"] == bool(info["architectures"]) == (info["nvcc"] is not None)


def test_the_kernels_registered_are_those_that_build_info_names() -> None:
    for op in (
        "channel_dot",
        "channel_moments",
        "map_similarity",
        "weighted_gram_",
        "weighted_grams_",
        "patch_gram_",
        "patch_cross_",
    ):
        registered = torch._C._dispatch_has_kernel_for_dispatch_key(f"ccp_ext::{op}", "CUDA")
        assert registered == build_info()["cuda"]


def test_the_module_serves_every_later_python_and_holds_no_build_path() -> None:
    module = Path(_C.__file__)
    assert module.name == "_C.abi3.so"
    assert str(ROOT).encode() not in module.read_bytes()
