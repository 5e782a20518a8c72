"""The kernels' own source, compiled by g++ and run on the CPU, plain and under sanitizers.

The CUDA kernels run in the emulator; the CPU kernels run in every instruction set.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import check, suite
from benchmarks.operation import DTYPES

EMULATOR = Path(__file__).parent / "emulator"
ROOT = EMULATOR.parent.parent
DRIVERS = {
    "channel_dot": ["plain", "address", "thread"],
    "weighted_gram": ["plain", "address", "thread"],
    "gram_product": ["plain", "address", "thread"],
    "patch_gram": ["plain", "address", "thread"],
    "patch_correlation": ["plain", "address", "thread"],
    "mma": ["plain", "address", "thread"],
    "map_similarity": ["plain", "address", "thread"],
    "channel_moments": ["plain", "address", "thread"],
    "cpu_channel_dot": ["address"],
    "cpu_weighted_gram": ["address"],
    "cpu_patches": ["address"],
    "cpu_map_similarity": ["address"],
    "cpu_channel_moments": ["address"],
    "launch": ["address"],
}
SANITIZERS = {
    "plain": ["-DEMU_ALL_DTYPES"],
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
    "thread": ["-fsanitize=thread"],
}
Run = Callable[..., "subprocess.CompletedProcess[str]"]

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ was not found")


def compiled(source: Path, program: Path, sanitizer: str) -> subprocess.CompletedProcess[str]:
    includes = [f"-I{ROOT}", f"-I{EMULATOR}"]
    warnings = ["-Wall", "-Wno-unknown-pragmas", "-Wno-psabi"]
    # The CPU kernels, thrice in a file, take longer to optimise than to run.
    level = "-O0" if source.name.startswith("cpu_") else "-O1"
    flags = ["-std=c++17", level, "-g1", *warnings, *includes, *SANITIZERS[sanitizer]]
    return run_text(["g++", *flags, str(source), "-o", str(program)])


def run_text(command: list[str]) -> subprocess.CompletedProcess[str]:
    # The emulator's threads run on stacks of their own, which leak checking does not know.
    options = {"ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": "halt_on_error=1"}
    return subprocess.run(
        command, env=os.environ | options, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """run(driver, sanitizer, *arguments) runs a driver; all are compiled once, two at a time.

    Skips where a trivial program does not link or start with that sanitizer.
    """
    folder = tmp_path_factory.mktemp("emulator")

    def program(driver: str, sanitizer: str) -> Path:
        return folder / f"{driver}_{sanitizer}"

    @cache
    def launcher(sanitizer: str) -> list[str]:
        """What precedes a program's name: ThreadSanitizer may need a fixed address layout."""
        trivial = program("trivial", sanitizer)
        source = folder / "trivial.cpp"
        source.write_text("int main() {}\n", encoding="utf-8")
        if compiled(source, trivial, sanitizer).returncode != 0:
            pytest.skip(f"g++ cannot link with the {sanitizer} sanitizer")
        for prefix in ([], ["setarch", platform.machine(), "-R"]):
            if (not prefix or shutil.which(prefix[0])) and all(
                run_text([*prefix, str(trivial)]).returncode == 0 for _ in range(3)
            ):
                return prefix
        pytest.skip(f"programs with the {sanitizer} sanitizer do not start on this machine")

    with ThreadPoolExecutor(2) as pool:
        builds = {
            (driver, sanitizer): pool.submit(
                compiled, EMULATOR / f"{driver}.cpp", program(driver, sanitizer), sanitizer
            )
            for driver, sanitizers in DRIVERS.items()
            for sanitizer in sanitizers
        }

        def run(driver: str, sanitizer: str, *arguments: str) -> subprocess.CompletedProcess[str]:
            prefix = launcher(sanitizer)
            build = builds[driver, sanitizer].result()
            assert build.returncode == 0 and "warning" not in build.stderr, build.stderr
            return run_text([*prefix, str(program(driver, sanitizer)), *arguments])

        yield run


@pytest.mark.parametrize("sanitizer", ["plain", "address", "thread"])
@pytest.mark.parametrize(
    "driver",
    [
        "channel_dot",
        "weighted_gram",
        "gram_product",
        "patch_gram",
        "patch_correlation",
        "mma",
        "map_similarity",
        "channel_moments",
    ],
)
def test_kernels_match_double_references(run: Run, driver: str, sanitizer: str) -> None:
    schedules = "2" if sanitizer == "plain" else "1"
    finished = run(driver, sanitizer, schedules)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert finished.stdout.endswith("0 failures\n")


@pytest.mark.parametrize("driver", [driver for driver in DRIVERS if driver.startswith("cpu_")])
def test_cpu_kernels_match_double_references_in_every_instruction_set(
    run: Run, driver: str
) -> None:
    finished = run(driver, "address")
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert finished.stdout.startswith("baseline\n")


def test_launch_arithmetic(run: Run) -> None:
    finished = run("launch", "address")
    assert finished.returncode == 0, finished.stdout + finished.stderr


def in_words(x: Tensor) -> str:
    """Element size, shape and strides, as the driver of the launch arithmetic reads them."""
    return ":".join([str(x.itemsize), *(",".join(map(str, of)) for of in (x.shape, x.stride()))])


def test_the_benchmarks_check_reaches_every_kernel_of_map_similarity(run: Run) -> None:
    operation = suite.OPERATIONS["map_similarity"]
    maps = [
        place(*operation.inputs(case), "cpu")
        for case in check.small_cases(operation)
        for place in (check.whole, check.cut)
    ]
    kernels = run("launch", "address", "maps", *map(in_words, maps)).stdout.splitlines()
    small = {f"64 {loads}" for loads in ("rows", "unaligned rows", "channels last", "strided")}
    large = {f"128 {loads}" for loads in ("rows", "channels last", "packed")}
    tall = {f"256 {loads}" for loads in ("rows", "channels last", "packed")}  # on Hopper
    for dtype in DTYPES:
        reached = {kernel for x, kernel in zip(maps, kernels, strict=True) if x.dtype == dtype}
        assert reached == small | large | (tall if dtype.itemsize == 2 else set())


def test_the_benchmarks_check_reaches_the_kernels_of_the_grams(run: Run) -> None:
    """All but the sums of large tiles' parts, which take very many rows of many channels."""
    operations = [suite.OPERATIONS[name] for name in ("weighted_gram_", "weighted_grams_")]
    calls = [
        [argument if isinstance(argument, list) else [argument] for argument in inputs]
        for inputs in (
            *(each.inputs(case) for each in operations for case in check.small_cases(each)),
            *(call.inputs for call in check.grams()),
        )
    ]
    arguments = [
        f"{S[0].itemsize};"
        + ";".join(":".join(map(in_words, layer)) for layer in zip(*of_rows, strict=True))
        for S, *of_rows in calls
    ]
    kernels = run("launch", "address", "grams", *arguments).stdout.splitlines()
    in_float = {f"weighted_gram_products {kind}" for kind in ("64", "128")}
    in_float |= {f"weighted_gram_products {kind} weighted" for kind in ("64", "128")}
    in_float |= {"pack_gram_rows", "pack_gram_weights", "add_gram_parts 64"}
    in_double = {"weighted_grams", "add_gram_parts of float64"}
    for dtype, expected in {
        torch.float32: in_float | in_double,
        torch.bfloat16: in_float,
        torch.float64: in_double,
    }.items():
        reached = {
            kernel
            for (_, a, *_), of_call in zip(calls, kernels, strict=True)
            for kernel in of_call.split(",")[:-1]
            if a[0].dtype == dtype
        }
        assert reached == expected


@pytest.mark.parametrize("barrier", ["1", "2"])
@pytest.mark.parametrize(
    ("driver", "file"),
    [
        ("channel_dot", "reduce.cuh"),
        ("weighted_gram", "weighted_gram.cuh"),
        ("gram_product", "gram_product.cuh"),
        ("map_similarity", "map_similarity.cuh"),
        ("channel_moments", "moments.h"),
        ("patch_gram", "patch_gram.cuh"),
        ("patch_correlation", "patch_correlation.cuh"),
    ],
)
def test_a_missing_barrier_is_reported(run: Run, driver: str, file: str, barrier: str) -> None:
    """As a race, or as a deadlock where threads that read too early go another way."""
    finished = run(driver, "thread", "1", "drop-barrier", barrier)
    assert finished.returncode != 0
    raced = "ThreadSanitizer: data race" in finished.stderr and file in finished.stderr
    assert raced or "deadlock: of " in finished.stderr


@pytest.mark.parametrize(("warpgroup", "wait"), [("0", "1"), ("1", "7"), ("2", "6")])
def test_a_missing_wait_for_a_stage_is_reported(run: Run, warpgroup: str, wait: str) -> None:
    """Of those that multiply, for its arrival; of those that copy, for its end."""
    finished = run("map_similarity", "thread", "1", "drop-wait", warpgroup, wait)
    assert finished.returncode != 0
    assert "ThreadSanitizer: data race" in finished.stderr
    assert "map_similarity_tall.cuh" in finished.stderr


def test_a_launch_beyond_the_data_is_reported(run: Run) -> None:
    finished = run("channel_dot", "address", "1", "overrun")
    assert finished.returncode != 0
    assert "heap-buffer-overflow" in finished.stderr
    assert "vec.cuh" in finished.stderr


def test_reading_a_copy_before_it_has_arrived_gives_nan(run: Run) -> None:
    finished = run("mma", "plain", "1", "early-read")
    assert finished.returncode != 0
    assert "is nan" in finished.stdout or "is -nan" in finished.stdout


@pytest.mark.parametrize(
    ("defect", "message"),
    [
        ("early-sums", "sums were written before their product"),
        ("other-operands", "threads of a warpgroup multiply different matrices"),
    ],
)
def test_a_misused_product_of_a_warpgroup_is_reported(run: Run, defect: str, message: str) -> None:
    finished = run("mma", "plain", "1", defect)
    assert finished.returncode != 0
    assert message in finished.stderr


def test_reading_the_copies_of_others_without_a_barrier_is_a_race(run: Run) -> None:
    finished = run("mma", "thread", "1", "drop-barrier", "1")
    assert finished.returncode != 0
    assert "ThreadSanitizer: data race" in finished.stderr


@pytest.mark.parametrize(
    ("access", "message"),
    [
        ("source", "misaligned address: the source of a copy of 16 bytes"),
        ("target", "misaligned address: the target of a copy of 16 bytes"),
        ("row", "misaligned address: a matrix row of 16 bytes"),
        ("vector", "misaligned address 0x"),
    ],
)
def test_a_misaligned_access_is_reported(run: Run, access: str, message: str) -> None:
    finished = run("mma", "address", "0", "misaligned", access)
    assert finished.returncode != 0
    assert message in finished.stderr
