"""Kernels without a GPU: their sources compiled as C++, the threads of a block taking turns on the host's processor."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

from eightfold.cuda.compiler import read_source

# What CUDA gives a kernel. The device's compiler knows these names by itself. Every thread of a block is a fiber; a
# barrier or a shuffle lets all others come to the same place. `run_block(kernel)` runs one block.
_BEFORE = """
#include <cmath>
#include <cstring>
#include <functional>
#include <vector>
#include <ucontext.h>
#define __global__
#define __device__
#define __shared__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(threads)
struct alignas(16) float4 { float x, y, z, w; };
static float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
struct Index { unsigned x; };
static Index blockIdx, threadIdx, blockDim, gridDim;
alignas(16) float shared[1 << 16];
static int __popc(unsigned v) { return __builtin_popcount(v); }
static unsigned __brev(unsigned v) {
    unsigned r = 0;
    for (int k = 0; k < 32; ++k) r |= (v >> k & 1) << (31 - k);
    return r;
}
static float __fadd_rn(float a, float b) { return a + b; }
static float __fsub_rn(float a, float b) { return a - b; }
static float __fmul_rn(float a, float b) { return a * b; }
static float __fdiv_rn(float a, float b) { return a / b; }
using std::fabs;

static ucontext_t scheduler;
static std::vector<ucontext_t> fibers;
static std::vector<char> over;
static unsigned long long slots[1024];
static std::function<void()> body;
static void yield() {
    const unsigned me = threadIdx.x;
    swapcontext(&fibers[me], &scheduler);
    threadIdx.x = me;
}
static void fiber() {
    const unsigned me = threadIdx.x;
    body();
    over[me] = 1;
    swapcontext(&fibers[me], &scheduler);
}
static void run_block(std::function<void()> kernel) {
    const unsigned count = blockDim.x;
    static std::vector<char> stacks;
    stacks.resize(count << 16);
    body = kernel, fibers.assign(count, {}), over.assign(count, 0);
    for (unsigned t = 0; t < count; ++t) {
        getcontext(&fibers[t]);
        fibers[t].uc_stack.ss_sp = stacks.data() + ((size_t)t << 16), fibers[t].uc_stack.ss_size = 1 << 16;
        makecontext(&fibers[t], fiber, 0);
    }
    for (bool going = true; going;) {
        going = false;
        for (unsigned t = 0; t < count; ++t)
            if (!over[t]) going = true, threadIdx.x = t, swapcontext(&scheduler, &fibers[t]);
    }
}
static void __syncthreads() { yield(); }
static void __syncwarp() { yield(); }
template <class T> static T __shfl_sync(unsigned, T value, int from) {
    std::memcpy(&slots[threadIdx.x], &value, sizeof value);
    yield();
    T result;
    std::memcpy(&result, &slots[(threadIdx.x & ~31u) + from], sizeof result);
    yield();
    return result;
}
"""


def build(file: str, entry: str, folder: Path) -> ctypes.CDLL:
    """`kernels/<file>` and the C functions `entry` that run it, as a library. Skips where there is no g++."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ to compile the device code with")
    source, library = folder / "kernel.cpp", folder / "kernel.so"
    source.write_text(_BEFORE + read_source(file) + entry)
    # Without contraction, as the device code says that contraction does not matter.
    options = ["-std=c++17", "-O2", "-ffp-contract=off", "-shared", "-fPIC", "-w"]
    subprocess.run([compiler, *options, "-o", library, source], check=True)
    return ctypes.CDLL(str(library))
