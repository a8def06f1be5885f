"""Launching gemm: rotated activations of 17 to some hundred tokens times the codes of a weight."""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from eightfold.cuda.driver import Kernel, load, max_shared, sm_count
from eightfold.cuda.driver import device_index as _index
from eightfold.cuda.plan import GEMM_TOKENS, Gemm, gemm_variant, share_steps
from eightfold.cuda.weight import Weight


def multiply(x: Tensor, weight: Weight, stream: int) -> Tensor:
    """x float16 [tokens, padded K], a rotated input, times an aligned weight: sums over parts of K,
    float32 [slices, tokens, padded N], to be added in their order. Raises KernelError."""
    device, tokens = _index(x.device), len(x)
    chosen = gemm_variant(weight.stages, tokens, max_shared(device), weight.padded_out)
    tiles = -(-tokens // chosen.tokens)
    ctas, slices = share_steps(chosen, weight.padded_out, weight.padded_in, tiles, sm_count(device))
    sums = x.new_empty(slices, tokens, weight.padded_out, dtype=torch.float32)
    params = struct.pack(
        f"<{weight.stages.count + 3}Q3I4i4x",
        *(c.data_ptr() for c in weight.codes), x.data_ptr(), weight.ratios.data_ptr(), sums.data_ptr(),
        *weight.strides, tokens, weight.padded_in, weight.padded_out, slices,
    )  # fmt: skip
    # It reads weights before the kernel ahead of it is done, so that must not be one that writes them: `prepare` waits.
    _kernel(chosen, device).launch((ctas, tiles, 1), 32 * chosen.warps, params, stream, weight.tiled)
    return sums


def prepare_gemm(weight: Weight, tokens: int) -> None:
    """Compile and load what `multiply` needs for up to so many tokens. Raises KernelError."""
    device = _index(weight.ratios.device)
    for tile in GEMM_TOKENS:
        _kernel(gemm_variant(weight.stages, min(tile, tokens), max_shared(device), weight.padded_out), device)


def _kernel(chosen: Gemm, device: int) -> Kernel:
    return load("gemm.cu", "gemm", device, chosen.shared_bytes, **chosen.defines)
