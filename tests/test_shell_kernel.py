"""kernels/shell.cu without a GPU: its code compiled as C++, with float32 weights, against `decode` of the CPU."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess

import pytest
import torch
from packing import random_packed

from eightfold.cuda.compiler import read_source
from eightfold.cuda.weight import Weight, tile
from eightfold.e8shell import doubled_points
from eightfold.format import LayerSpec

# What CUDA gives a kernel, for one thread after the other. The device's compiler knows these names by itself.
_BEFORE = """
#include <algorithm>
#include <cmath>
#include <cstring>
using std::max, std::min;
#define __device__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(threads)
struct float4 { float x, y, z, w; };
struct uint2 { unsigned x, y; };
struct uint4 { unsigned x, y, z, w; };
static float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
struct Index { unsigned x; };
static Index blockIdx, threadIdx, blockDim, gridDim;
template <class T> static T __ldg(const T* p) { return *p; }
static float __uint_as_float(unsigned u) { float f; memcpy(&f, &u, 4); return f; }
static unsigned __float_as_uint(float f) { unsigned u; memcpy(&u, &f, 4); return u; }
static float __shfl_xor_sync(unsigned, float v, int) { return v; }
static void __syncthreads() {}
static void __syncwarp() {}
"""
_AFTER = """
extern "C" void run(const Params* p, unsigned blocks, unsigned threads) {
    gridDim.x = blocks, blockDim.x = threads;
    for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x)
        for (threadIdx.x = 0; threadIdx.x < threads; ++threadIdx.x)
            dequantize_shell(*p);
}
"""


@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 7, 8])
def test_weights_are_those_of_decode(bits, tiled, tmp_path):
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ to compile the device code with")
    text = re.sub(r"\basm\b.*?\);\n", ";\n", read_source("shell.cu"))  # conversions to float16: not made here
    text, replaced = re.subn("FLOAT16, v\\);\n  }", "FLOAT32, v);\n  }", text)
    assert replaced == 1
    (tmp_path / "shell.cpp").write_text(_BEFORE + text + _AFTER)
    defines = [f"-DSHELL_STAGES={bits // 2}", f"-DSHELL256_STAGES={bits % 2}"]
    options = ["-std=c++17", "-O1", "-ffp-contract=off", "-shared", "-fPIC", "-w", *defines]
    subprocess.run([compiler, *options, "-o", tmp_path / "shell.so", tmp_path / "shell.cpp"], check=True)

    packed = random_packed(LayerSpec(96, 192, bits, (64, 32), (128, 64)), family="e8shell")
    codes = [tile(c) for c in packed.codes] if tiled else list(packed.codes)
    weight = Weight(codes, torch.tensor(packed.recipe.ratios), packed.scale_in, packed.scale_out, (192, 1), (96, 1))
    row, rows, found = 32, 50, torch.full((51, 192), torch.nan)

    pointers = [(name, ctypes.c_void_p) for name in ("ratios", "points", "weights")]
    strides = [(name, ctypes.c_uint) for name in ("row_stride", "column_stride", "tile_stride")]
    sizes = [(name, ctypes.c_int) for name in ("row0", "rows", "columns")]

    class Params(ctypes.Structure):
        _fields_ = [("codes", ctypes.c_void_p * len(codes)), *pointers, *strides, *sizes]

    addresses = (ctypes.c_void_p * len(codes))(*(c.data_ptr() for c in codes))
    tensors = weight.ratios, doubled_points(), found
    p = Params(addresses, *(t.data_ptr() for t in tensors), *weight.strides, row, rows, 24)
    # Fewer threads than codes, and a block that is no divisor of anything.
    ctypes.CDLL(str(tmp_path / "shell.so")).run(ctypes.byref(p), 7, 5)
    expected = packed.recipe.decode(packed.codes).flatten(1)
    torch.testing.assert_close(found[:rows], expected[row : row + rows], rtol=1e-6, atol=1e-6)
    assert bool(found[rows:].isnan().all())
