"""Every kernel, for every architecture and every set of macros that some layer could ask for. No GPU is needed."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import pytest

from eightfold.cuda import compiler
from eightfold.cuda.compiler import ARCHITECTURES, KERNELS, KernelError, compile_with_remarks, read_source
from eightfold.cuda.dense import dense_defines, table_copies
from eightfold.cuda.gemm_plan import FEW_ROWS, GEMM_TOKENS, WGMMA_TOKENS, gemm_variant, wgmma_variant
from eightfold.cuda.plan import Stages, variants

# Bytes of shared memory that a CTA can have on the devices of an architecture.
SHARED = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 103: 232448, 120: 101376}
RECIPES = [Stages(e8p, e81b) for e8p in range(1, 5) for e81b in (0, 1) if e8p + e81b <= 4]
SHELLS = [Stages(0, 0, shell, shell256) for shell in range(5) for shell256 in range(5) if 0 < shell + shell256 <= 4]

every_arch = pytest.mark.parametrize("arch", ARCHITECTURES)


@pytest.fixture(scope="module", autouse=True)
def nvrtc():
    try:
        compiler._nvrtc()
    except KernelError as error:
        if os.environ.get("CI") == "true":
            pytest.fail(f"CI may not skip the tests that compile kernels: {error}")
        pytest.skip(str(error))


def builds(arch: int) -> Iterator[tuple[str, dict[str, int]]]:
    """Every file of kernels with the macros that it is compiled with."""
    yield "rotate.cu", {}
    yield "encode.cu", {}
    yield "ldlq.cu", {}
    yield from (("dequantize.cu", stages.defines) for stages in RECIPES)
    for stages in RECIPES:
        if copies := table_copies(stages, SHARED[arch]):
            yield "dense.cu", dense_defines(stages, copies)
    yield from (("shell.cu", stages.defines) for stages in SHELLS)
    for stages in RECIPES:
        for tokens, rows in product(GEMM_TOKENS, (FEW_ROWS, FEW_ROWS + 1)):
            if rows > FEW_ROWS or tokens < GEMM_TOKENS[-1]:  # where the rows make a difference
                yield "gemm.cu", gemm_variant(stages, tokens, SHARED[arch], rows).defines
        for tokens in WGMMA_TOKENS if arch == 90 else ():
            yield "wgmma.cu", wgmma_variant(stages, tokens, SHARED[arch]).defines
    yield from (("matvec.cu", chosen.defines) for chosen in variants(SHARED[arch]))


def entry_points(file: str) -> list[str]:
    text = (KERNELS / file).read_text(encoding="utf-8")
    return re.findall(r'extern "C" __global__ void __launch_bounds__\([^)]*\) (\w+)\(', text)


def test_nothing_is_left_out():
    files = {path.name for path in KERNELS.iterdir() if path.name.endswith(".cu")}
    assert set(SHARED) == set(ARCHITECTURES)
    for arch in ARCHITECTURES:
        no_tiles = {"dense.cu"} if SHARED[arch] < 128 << 10 else set()
        assert {file for file, _ in builds(arch)} == files - (set() if arch == 90 else {"wgmma.cu"}) - no_tiles
    assert all(map(entry_points, files))


def build(arch: int, file: str, defines: dict[str, int]) -> None:
    image, remarks = compile_with_remarks(read_source(file), file, arch, defines, "--ptxas-options=-v")
    assert image.startswith(b"\x7fELF")
    assert all(name.encode() + b"\0" in image for name in entry_points(file))
    if arch == 90:  # the only one that was measured: a stack frame costs microseconds a launch, serialized mma far more
        assert "Potential Performance Loss" not in remarks, f"{file} {defines}: {remarks}"
        frames = re.findall(r"(\d+) bytes stack frame", remarks)
        assert frames
        assert set(frames) == {"0"}, f"{file} {defines}: {remarks}"


@every_arch
def test_every_kernel_compiles(arch):
    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(build, arch, *each) for each in builds(arch)]:
            done.result()
