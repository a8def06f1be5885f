"""Randomized Hadamard rotations in blocks, and the layouts of blocks that a dimension can have.

A rotation of n coordinates is block diagonal; a block of size 2^k is the natural-order Sylvester-Hadamard matrix over
2^(k/2), entry (i, j) = (-1)^popcount(i & j) / 2^(k/2), symmetric and its own inverse. The random signs that make it a
randomized Hadamard transform (QuIP#, section 3) live in the scale vectors of the linear, not here.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

IN_FLOOR, OUT_FLOOR = 64, 16  # least block on each side: a decode tile is 16 rows by 64 columns
MAX_BLOCK = 32768
_CAPS = {
    "": MAX_BLOCK,
    **{f"-{1 << k}": 1 << k for k in range(6, 15)},
}  # what a layout's name may end in: largest block
_SUM, _EQUAL = ({f"{kind}{end}": cap for end, cap in _CAPS.items()} for kind in ("pow2-sum", "equal"))
LAYOUTS = (*_SUM, "pow2", *_EQUAL)
# A Hadamard matrix of order 2^k is applied as Kronecker factors of at most 2^6; on a GPU, where reading costs more than
# computing, of at most 2^8.
_STEP, _GPU_STEP = 6, 8


def valid_block(size: int) -> bool:
    """Whether a rotation block may have this size: a power of two up to MAX_BLOCK."""
    return 1 <= size <= MAX_BLOCK and size.bit_count() == 1


def rotate(x: Tensor, blocks: Sequence[int]) -> Tensor:
    """Rotate the last dimension: x float [..., sum(blocks)] times the block diagonal rotation, same shape and dtype.

    The matrix is symmetric and its own inverse, so this is also the way back.
    """
    if x.shape[-1] != sum(blocks):
        raise ValueError(f"expected {sum(blocks)} coordinates for blocks {list(blocks)}, got {x.shape[-1]}")
    parts, start = [], 0
    for size, count in run_lengths(blocks):
        part = x[..., start : start + size * count].unflatten(-1, (count, size))
        parts.append(_rotate_block(part).flatten(-2))
        start += size * count
    return torch.cat(parts, -1) if len(parts) > 1 else parts[0]


def run_lengths(blocks: Sequence[int]) -> list[tuple[int, int]]:
    """Blocks as (size, count) pairs of equal neighbours."""
    runs: list[tuple[int, int]] = []
    for size in blocks:
        if runs and runs[-1][0] == size:
            runs[-1] = (size, runs[-1][1] + 1)
        else:
            runs.append((size, 1))
    return runs


def _rotate_block(x: Tensor) -> Tensor:
    shape, power = x.shape, x.shape[-1].bit_length() - 1
    inner = 1
    while power > 0:
        step = min(power, _GPU_STEP if x.is_cuda else _STEP)
        # Bits inner .. inner + step of the index: one Kronecker factor.
        y = x.reshape(-1, 1 << step, inner)
        h = _hadamard(step, x.dtype, x.device)
        x = (y[..., 0] @ h).unsqueeze(-1) if inner == 1 else h @ y
        inner <<= step
        power -= step
    return x.reshape(shape)


@cache
def _hadamard(power: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    h = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(power):
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return (h / 2 ** (power / 2)).to(device, dtype)


def layout_blocks(size: int, layout: str, floor: int, shards: int = 1) -> tuple[int, ...]:
    """Blocks of a dimension of `size` that never cross the border of one of `shards` equal parts.

    pow2-sum, pow2-sum-C: as many blocks of C as fit in a part, then the binary expansion of the rest, largest first.
    pow2: one padded power of two (no shards).
    equal, equal-C: the largest power of two (up to C) that divides the part.
    Parts are padded up to a multiple of `floor` (only a dimension that is not sharded may need it).
    Raises ValueError for an unknown layout or parts that do not fit.
    """
    if size % shards or (shards > 1 and size // shards % floor):
        raise ValueError(
            f"expected a size that splits into {shards} parts of a multiple of {floor}, got {size}: lower tp_max"
        )
    part = -(-(size // shards) // floor) * floor
    if cap := _SUM.get(layout):
        rest = part % cap
        return ((cap,) * (part // cap) + tuple(1 << k for k in reversed(range(15)) if rest >> k & 1)) * shards
    if layout == "pow2" and shards == 1:
        return (max(1 << (size - 1).bit_length(), floor),)
    if cap := _EQUAL.get(layout):
        block = min(part & -part, cap)
        return (block,) * (part // block * shards)
    raise ValueError(f"expected a layout out of {LAYOUTS}, got {layout!r} with {shards} shards")
