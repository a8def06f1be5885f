"""Host of the kernels that scale and rotate rows on either side of a product: rotate.cu, apart from quantize_input."""

from __future__ import annotations

import struct
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from eightfold.cuda.driver import Kernel, load, max_shared, sm_count
from eightfold.cuda.driver import device_index as _index
from eightfold.cuda.plan import UNIT, pack_runs, runs, segments

DTYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}  # as common.cuh numbers them
THREADS = 512  # of the kernels that use shared memory
_BUFFER = 6144  # coordinates of a chunk that fit the shared memory every device has
_ITEMS, _MOST_WARPS = 4, 28  # rotate_input: segments of a warp, warps of a row
# rotate_input_tiled: segments of a warp, warps of a row, and of all rows on a multiprocessor where there are few
_TILED_ITEMS, _MOST_TILED_WARPS, _TILED_WARPS = 16, 16, 16
APART = 2  # CTAs of rotate_output that lie on a multiprocessor, where all of them find room so
_WARPS_AT_ONCE = 24  # that a multiprocessor has registers for


class Rows(NamedTuple):
    """What a rotation kernel reads: address, elements from row to row, number of the dtype, rows, slices to add up."""

    address: int
    stride: int
    dtype: int
    count: int
    slices: int = 1


class Side(NamedTuple):
    """One side of a linear: its scale vector and bias, and rotation blocks. `overlap`: the scales were there before
    the kernel ahead, so a launch may begin before that ends. `tile`: tokens of a tile of wgmma.cu, in whose order a
    rotated input is to be; 0 for row after row."""

    scale: Tensor
    bias: Tensor | None
    blocks: tuple[int, ...]
    overlap: bool
    tile: int = 0


def rotate_input(x: Tensor, side: Side, rotated: Tensor, divisors: Tensor, stream: int) -> None:
    """Launch what makes float16 `rotated` [tokens, K with padding] of x float16 or bfloat16 [tokens, K], and a
    power of two that it is divided by for each token. With tiles `rotated` is [whole tiles, K with padding]."""
    device, tokens, padded = _index(x.device), len(x), rotated.shape[1]
    rows = Rows(x.data_ptr(), x.stride(0), DTYPES[x.dtype], tokens)
    count = segments(side.blocks, 0, padded)
    if longest(side.blocks) > UNIT if side.tile else not _streams_input(side.blocks):
        ctas = min(tokens, 4 * sm_count(device))
        _launch_wide("rotate_wide_input", rows, side, rotated, divisors.data_ptr(), (0, padded), (ctas, 1), stream)
        return
    params = _params(rows, side, rotated, divisors.data_ptr(), (0, padded))
    if side.tile:  # the same for all numbers of tokens of as many tiles
        busy = -(-_TILED_WARPS * sm_count(device) // len(rotated))
        warps = min(_MOST_TILED_WARPS, count, max(busy, -(-count // _TILED_ITEMS)))
        ctas = min(tokens, sm_count(device) * (2 * _MOST_TILED_WARPS // warps))
        kernel("rotate_input_tiled", 0, device).launch((ctas, 1, 1), 32 * warps, params, stream, side.overlap)
        return
    # As few segments for a warp as 16 warps allow, where tokens leave processors free.
    items = min(_ITEMS, -(-count // 16)) if tokens <= sm_count(device) else _ITEMS
    warps = min(_MOST_WARPS, -(-count // items))
    ctas = min(tokens, sm_count(device) * max(1, _WARPS_AT_ONCE // warps))
    kernel("rotate_input", 0, device).launch((ctas, 1, 1), 32 * warps, params, stream, side.overlap)


def rotate_output(rows: Rows, side: Side, y: Tensor, divisors: int, span: tuple[int, int], stream: int) -> None:
    """Launch what makes the columns of `span` (whole blocks, padding included) of y [tokens, N] from rows that hold
    them. `divisors`: address of a float a token, 0 for none."""
    device = _index(y.device)
    if longest(side.blocks) > UNIT:
        most = 4 * sm_count(device)
        pieces = min(sum(side.blocks[1::2]), max(1, most // rows.count))
        grid = min(rows.count, most), pieces
        _launch_wide("rotate_wide_output", rows, side, y, divisors, span, grid, stream)
        return
    groups = -(-segments(side.blocks, *span) // 8)
    walkers = min(rows.count, -(-6 * sm_count(device) // groups))
    params = _params(rows, side, y, divisors, span)
    apart = side.overlap and walkers * groups <= APART * sm_count(device)
    _output_kernel(device, apart).launch((walkers, groups, 1), 256, params, stream, side.overlap)


def _output_kernel(device: int, apart: bool) -> Kernel:
    """rotate_output. `apart`: with shared memory that it does not use, too much for more than APART of its CTAs on a
    multiprocessor. Those that begin before the kernel ahead has ended would else lie eight together on the
    multiprocessors that are free first, and wait for each other's memory."""
    return kernel("rotate_output", max_shared(device) // (APART + 1) if apart else 0, device)


def _launch_wide(
    name: str,
    rows: Rows,
    side: Side,
    y: Tensor,
    divisors: int,
    span: tuple[int, int],
    grid: tuple[int, int],
    stream: int,
) -> None:
    """A kernel whose CTAs hold a block in a buffer, in shared memory if it fits."""
    device, block = _index(y.device), longest(side.blocks)
    shared = shared_buffer(block, device)
    scratch = None if shared else y.new_empty(grid[0] * grid[1] * block, dtype=torch.float32)
    params = _params(rows, side, y, divisors, span, scratch)
    kernel(name, shared, device).launch((*grid, 1), THREADS, params, stream, side.overlap)


def _params(
    rows: Rows, side: Side, y: Tensor, divisors: int, span: tuple[int, int], scratch: Tensor | None = None
) -> bytes:
    params = struct.pack(
        "<6Qq11i",
        rows.address, side.scale.data_ptr(), address(side.bias), y.data_ptr(), divisors, address(scratch),
        rows.stride,
        rows.dtype, DTYPES[y.dtype], DTYPES[side.scale.dtype], 0 if side.bias is None else DTYPES[side.bias.dtype],
        len(side.scale), rows.count, rows.slices, longest(side.blocks), *span, side.tile,
    )  # fmt: skip
    return whole(params + pack_runs(side.blocks))


def prepare_rotations(in_blocks: tuple[int, ...], out_blocks: tuple[int, ...], device: int) -> None:
    """Load what `rotate_input` and `rotate_output` launch for these blocks."""
    if _streams_input(in_blocks):
        kernel("rotate_input", 0, device)
    else:
        kernel("rotate_wide_input", shared_buffer(longest(in_blocks), device), device)
    if longest(out_blocks) <= UNIT:
        for apart in (True, False):
            _output_kernel(device, apart)
    else:
        kernel("rotate_wide_output", shared_buffer(longest(out_blocks), device), device)


def kernel(name: str, shared: int, device: int) -> Kernel:
    """A kernel of rotate.cu. `shared`: bytes of its buffer, 0 if that lies in global memory or there is none."""
    return load("rotate.cu", name, device, shared or 1024)


def shared_buffer(coordinates: int, device: int) -> int:
    """Bytes of shared memory for a buffer of the rotation kernels, 0 if it has to lie in global memory."""
    size = 4 * (max(coordinates, _BUFFER) + 128)
    return size if size <= max_shared(device) else 0


@cache
def _streams_input(blocks: tuple[int, ...]) -> bool:
    """Whether the registers of a CTA hold a row."""
    total = runs(blocks)[-1][1]
    return longest(blocks) <= UNIT and segments(blocks, 0, total) <= _ITEMS * _MOST_WARPS


@cache
def longest(blocks: tuple[int, ...]) -> int:
    """Largest of flat [size, count] pairs."""
    return max(blocks[::2])


def address(tensor: Tensor | None) -> int:
    """Where a tensor lies, 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()


def whole(params: bytes) -> bytes:
    """A struct that holds pointers ends on a multiple of 8 bytes."""
    return params + bytes(-len(params) % 8)
