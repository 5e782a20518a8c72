"""What nvcc makes of the CUDA sources; no GPU is needed."""

from __future__ import annotations

import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from torch.utils.cpp_extension import include_paths

ROOT = Path(__file__).parent.parent
CUDA = ROOT / "csrc" / "cuda"
SOURCES = sorted(CUDA.glob("*.cu"))
MOST_REGISTERS = 128  # so that two blocks of 256 threads fit on a multiprocessor
MOST_REGISTERS_OF = {
    "map_similarity.cu": 255,  # one block of 256 threads, two of 128, or one of 384 (168 registers)
    "patch_gram.cu": 255,  # one block of 256 threads, or three of 128 (168 registers)
}
LONGEST = "map_similarity.cu"  # to compile; begun first, so that the others run beside it
MATRIX_UNITS = {  # the instructions that a source must have been made into
    "map_similarity.cu": [
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32",
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32",
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32",
        "ldmatrix.sync.aligned.m8n8.x4.shared.b16",
        "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16",
        "cp.async.cg.shared.global",
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16",
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16",
        # Without these, warpgroups' products may read shared memory or sums too early.
        "fence.proxy.async.shared::cta",
        "wgmma.fence.sync.aligned",
        "wgmma.wait_group.sync.aligned 0",
    ],
    "weighted_gram.cu": [
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32",
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32",
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32",
        "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16",
        "cp.async.cg.shared.global",
    ],
    "patch_gram.cu": [
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32",
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32",
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32",
        "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16",
        "cp.async.cg.shared.global",
    ],
}


# The kernels with the most registers, alone: all for these architectures would take minutes.
LARGEST = """
#include "csrc/cuda/gram_product.cuh"
#include "csrc/cuda/map_similarity.cuh"
#include "csrc/cuda/patch_correlation.cuh"

using namespace ccp;

const void* kernels[] = {
    (const void*)map_similarity_tiles<MapTraits<float, MapLoads::kRows, kLargeMapTile>>,
    (const void*)map_similarity_tiles<MapTraits<BFloat16, MapLoads::kChannelsLast, kLargeMapTile>>,
    (const void*)correlate_pieces<CorrelationTraits<float, kLargeTile, PatchPrecision::kExact>>,
    (const void*)correlate_pieces<CorrelationTraits<BFloat16, kLargeTile, PatchPrecision::kExact>>,
    (const void*)weighted_gram_products<GramProductTraits<float, kLargeGramTile, false>>,
    (const void*)weighted_gram_products<GramProductTraits<float, kLargeGramTile, true>>,
    (const void*)weighted_gram_products<GramProductTraits<BFloat16, kLargeGramTile, true>>,
};
"""

# What an H200 runs: 9.0 is compiled so (setup.py).
HOPPER = "-gencode=arch=compute_90a,code=sm_90a"
TALL_TILES = """
#include "csrc/cuda/map_similarity_tall.cuh"

using namespace ccp;

const void* kernel = (const void*)compare_tall_map_tiles<TallMapTraits<Half, MapLoads::kRows>>;
"""


@pytest.fixture(scope="module")
def build_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("device")


@pytest.fixture(scope="module")
def ptxas_reports(build_folder: Path) -> dict[str, str]:
    """What ptxas says about each .cu file, compiled for Hopper."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc was not found")

    def compile(source: Path) -> str:
        target = ["-std=c++17", "-O3", HOPPER, "-Xptxas=-v"]
        target += ["-DTORCH_TARGET_VERSION=0x020b000000000000ULL"]
        includes = [f"-I{path}" for path in (ROOT, *include_paths())]
        output = build_folder / f"{source.stem}.o"
        target += ["--keep", f"--keep-dir={build_folder}"]
        command = [nvcc, *target, *includes, "-c", str(source), "-o", str(output)]
        finished = subprocess.run(command, capture_output=True, text=True, check=False)
        assert finished.returncode == 0, finished.stderr
        return finished.stdout + finished.stderr

    with ThreadPoolExecutor(2) as pool:
        sources = sorted(SOURCES, key=lambda source: source.name != LONGEST)
        reports = pool.map(compile, sources)
        return dict(zip((source.name for source in sources), reports, strict=True))


@pytest.mark.parametrize("source", [source.name for source in SOURCES])
def test_no_kernel_spills_registers(ptxas_reports: dict[str, str], source: str) -> None:
    report = ptxas_reports[source]
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert spills and set(spills) == {("0", "0")}


@pytest.mark.parametrize("architecture", ["sm_80", "sm_100"])
def test_the_largest_kernels_do_not_spill_on_other_gpus(tmp_path: Path, architecture: str) -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc was not found")
    source = tmp_path / "largest.cu"
    source.write_text(LARGEST, encoding="utf-8")
    command = [nvcc, "-std=c++17", "-O3", f"-arch={architecture}", "-Xptxas=-v", f"-I{ROOT}"]
    command += ["-cubin", str(source), "-o", str(tmp_path / "largest.cubin")]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    report = finished.stdout + finished.stderr
    assert finished.returncode == 0, report
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert len(spills) == 7 and set(spills) == {("0", "0")}
    assert max(map(int, re.findall(r"Used (\d+) registers", report))) <= 255


@pytest.mark.parametrize("source", [source.name for source in SOURCES])
def test_no_kernel_uses_too_many_registers(ptxas_reports: dict[str, str], source: str) -> None:
    registers = [int(used) for used in re.findall(r"Used (\d+) registers", ptxas_reports[source])]
    assert registers and max(registers) <= MOST_REGISTERS_OF.get(source, MOST_REGISTERS)


@pytest.mark.parametrize("source", [source.name for source in SOURCES])
def test_nothing_to_warn_of(ptxas_reports: dict[str, str], source: str) -> None:
    # ptxas tells so where it makes the products of warpgroups wait for each other.
    report = ptxas_reports[source]
    assert "warning" not in report and "Potential Performance Loss" not in report


@pytest.mark.parametrize(
    ("architecture", "threads", "multiplies"),
    [("compute_90a", 384, True), ("compute_90", 32, False), ("compute_100", 32, False)],
)
def test_the_host_sees_where_tall_tiles_were_compiled(
    tmp_path: Path, architecture: str, threads: int, multiplies: bool
) -> None:
    """By the kernel's largest block: the launcher asks for maxThreadsPerBlock."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc was not found")
    source, ptx = tmp_path / "tall.cu", tmp_path / "tall.ptx"
    source.write_text(TALL_TILES, encoding="utf-8")
    command = [nvcc, "-std=c++17", f"-arch={architecture}", f"-I{ROOT}", "-ptx", str(source)]
    subprocess.run([*command, "-o", str(ptx)], check=True)
    text = ptx.read_text(encoding="utf-8")
    assert f".maxntid {threads}" in text
    assert ("wgmma.mma_async" in text) == multiplies


@pytest.mark.usefixtures("ptxas_reports")
@pytest.mark.parametrize("source", MATRIX_UNITS)
def test_matrix_products_are_made_by_the_matrix_units(build_folder: Path, source: str) -> None:
    [ptx] = build_folder.glob(f"{Path(source).stem}*.ptx")
    text = ptx.read_text(encoding="utf-8")
    assert [name for name in MATRIX_UNITS[source] if name not in text] == []


@pytest.mark.parametrize("header", sorted(CUDA.glob("*.cuh")), ids=lambda path: path.name)
def test_kernels_include_neither_torch_nor_the_cuda_runtime(header: Path) -> None:
    includes = re.findall(r'#include [<"](.+)[>"]', header.read_text(encoding="utf-8"))
    assert all(name.startswith("csrc/") for name in includes), includes
