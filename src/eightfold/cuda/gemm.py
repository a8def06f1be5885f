"""The linear for 17 to some hundred or thousand tokens from the codes: rotate the input, multiply, rotate back.

The product is wgmma.cu where there is warpgroup mma (compute capability 9.0) and tokens are many, else gemm.cu.
"""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from eightfold.cuda.dense import unrotates
from eightfold.cuda.driver import Kernel, arch, load, max_shared, sm_count
from eightfold.cuda.driver import device_index as _index
from eightfold.cuda.gemm_plan import (
    GEMM_TOKENS,
    WGMMA_TOKENS,
    Product,
    Wgmma,
    gemm_variant,
    share_steps,
    wgmma_variant,
)
from eightfold.cuda.plan import is_few
from eightfold.cuda.rotate import DTYPES, Rows, Side, kernel, rotate_input, rotate_output
from eightfold.cuda.weight import Weight

MOST_GEMM, MOST_WGMMA = 256, 2048  # tokens up to which each beats making a dense weight for cuBLAS
MOST_WGMMA_FEW = 512  # the same of few weights that come rotated back (dense.py)
LEAST_WGMMA = 64  # tokens up to which gemm is as fast as wgmma
MOST_OVERLAP = 256  # tokens up to which rotations are so short that beginning early matters more than even shares
_CHUNK_BYTES = 512 << 20  # of float16 activations on both sides of a product


def takes(weight: Weight, tokens: int, device: int) -> bool:
    """Whether `product` is the fastest way for more tokens than matvec takes."""
    if arch(device) != 90:
        most = MOST_GEMM
    elif is_few(weight.padded_out, weight.padded_in) and unrotates(weight, device):
        most = MOST_WGMMA_FEW
    else:
        most = MOST_WGMMA
    return weight.aligned and not weight.stages.shells and tokens <= most


def product(x: Tensor, weight: Weight, bias: Tensor | None, y: Tensor) -> None:
    """y [tokens, N] of x float16 or bfloat16 [tokens, K] and an aligned weight. Workspace: float16 [tokens, K],
    float32 [slices, tokens, N] or, where nothing is to be added up, float16 [tokens, N], for as many tokens at a time
    as two float16 of these take _CHUNK_BYTES. Raises KernelError."""
    tile = WGMMA_TOKENS[-1]
    chunk = max(1, _CHUNK_BYTES // (2 * (weight.padded_in + weight.padded_out) * tile)) * tile
    for at in range(0, len(x), chunk):
        _product(x[at : at + chunk], weight, bias, y[at : at + chunk])


def _product(x: Tensor, weight: Weight, bias: Tensor | None, y: Tensor) -> None:
    device, tokens = _index(x.device), len(x)
    stream = torch.cuda.current_stream(device).cuda_stream
    chosen = choose(weight, tokens, device)
    tiles = -(-tokens // chosen.tokens)
    tile = chosen.tokens if isinstance(chosen, Wgmma) else 0
    # CTAs that begin while others still run pile up on the first multiprocessors that become free.
    overlap = weight.tiled and tokens <= MOST_OVERLAP
    rotated = x.new_empty(tiles * tile or tokens, weight.padded_in, dtype=torch.float16)
    divisors = x.new_empty(tokens, dtype=torch.float32)
    side = Side(weight.scale_in, None, weight.in_blocks, overlap, tile)
    rotate_input(x, side, rotated, divisors, stream)
    sums = _multiply(rotated, tokens, weight, chosen, stream)
    source = Rows(sums.data_ptr(), weight.padded_out, DTYPES[sums.dtype], tokens, len(sums))
    side = Side(weight.scale_out, bias, weight.out_blocks, overlap)
    rotate_output(source, side, y, divisors.data_ptr(), (0, weight.padded_out), stream)


def _multiply(x: Tensor, tokens: int, weight: Weight, chosen: Product, stream: int) -> Tensor:
    """x, a rotated input, times the weight: [slices, tokens, padded N], sums over parts of K to be added in order."""
    device, tiles = _index(x.device), -(-tokens // chosen.tokens)
    ctas, slices = share_steps(chosen, weight.padded_out, weight.padded_in, tiles, sm_count(device))
    dtype = torch.float16 if isinstance(chosen, Wgmma) and slices == 1 else torch.float32
    sums = x.new_empty(slices, tokens, weight.padded_out, dtype=dtype)
    params = struct.pack(
        f"<{weight.stages.count + 3}Q3I5i",
        *(c.data_ptr() for c in weight.codes), x.data_ptr(), weight.ratios.data_ptr(), sums.data_ptr(),
        *weight.strides, tokens, weight.padded_in, weight.padded_out, slices, DTYPES[dtype],
    )  # fmt: skip
    # It reads weights before the kernel ahead of it is done, so that must not be one that writes them: `prepare` waits.
    _kernel(chosen, device).launch((ctas, tiles, 1), chosen.threads, params, stream, weight.tiled)
    return sums


def choose(weight: Weight, tokens: int, device: int) -> Product:
    """The product for so many tokens."""
    if arch(device) == 90 and tokens > LEAST_WGMMA:
        return wgmma_variant(weight.stages, tokens, max_shared(device))
    return gemm_variant(weight.stages, tokens, max_shared(device), weight.padded_out)


def prepare_product(weight: Weight) -> None:
    """Compile and load what `product` needs, apart from the rotations that `prepare_rotations` loads. Raises
    KernelError."""
    device = _index(weight.ratios.device)
    for tile in sorted({*GEMM_TOKENS, *WGMMA_TOKENS}):
        _kernel(choose(weight, tile, device), device)
    if arch(device) == 90:
        kernel("rotate_input_tiled", 0, device)


def _kernel(chosen: Product, device: int) -> Kernel:
    return load(f"{chosen.source}.cu", chosen.source, device, chosen.shared_bytes, **chosen.defines)
