"""A packed weight as the kernels see it, and its codes in the order that they read fastest."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from eightfold.cuda.plan import runs, stages_of

CODES = {torch.int16: 0, torch.uint8: 1, torch.uint16: 2, torch.int8: 3}  # as plan.stages_of numbers codebooks


class Weight:
    """What the kernels need of a packed weight: its tensors and their shapes.

    `codes`: as the file has them, [N, K / 8], or each as `tile` makes them. `points`: for stages of E8 shells, one
    tensor, twice the table: int8 [65536, 8]."""

    points: tuple[Tensor, ...] = ()

    def __init__(
        self,
        codes: Sequence[Tensor],
        ratios: Tensor,
        scale_in: Tensor,
        scale_out: Tensor,
        in_blocks: Sequence[int],
        out_blocks: Sequence[int],
    ) -> None:
        self.codes = codes
        self.ratios, self.scale_in, self.scale_out = ratios, scale_in, scale_out
        self.in_blocks, self.out_blocks = tuple(in_blocks), tuple(out_blocks)
        rows, columns = codes[0].shape[:2]
        self.tiled = codes[0].dim() == 4
        self.padded_out, self.padded_in = (16 * rows, 64 * columns) if self.tiled else (rows, 8 * columns)
        self.stages = stages_of(tuple(CODES[c.dtype] for c in codes))

    @property
    def aligned(self) -> bool:
        """Whether rows come in tiles of 16 and the codes of 64 columns start at multiples of 16 bytes."""
        return can_tile(self.padded_out, self.in_blocks) and all(c.data_ptr() % 16 == 0 for c in self.codes)

    @property
    def strides(self) -> tuple[int, int, int]:
        """Codes from row to row of a tile of 16, from 64 columns to the next, from tile to tile."""
        if self.tiled:
            return 8, 128, 2 * self.padded_in
        pitch = self.codes[0].stride(0)
        return pitch, 8, 16 * pitch


@cache
def can_tile(rows: int, in_blocks: tuple[int, ...]) -> bool:
    """Whether `tile` takes codes of so many rows, under an input rotation of these blocks (flat pairs)."""
    return rows % 16 == 0 and all(end % 64 == 0 for _, end, _ in runs(in_blocks))


def tile(codes: Tensor) -> Tensor:
    """Codes [N, K / 8] with those of 16 rows by 64 columns side by side: [N / 16, K / 64, 16, 8]. What a warp reads at
    a time is then one piece of memory and not 16 pieces of 64 bytes."""
    rows, columns = codes.shape
    return codes.view(rows // 16, 16, columns // 8, 8).transpose(1, 2).contiguous()


def untile(codes: Tensor) -> Tensor:
    """The file's rows of codes, from them or from what `tile` made."""
    return codes.transpose(1, 2).reshape(16 * len(codes), -1) if codes.dim() == 4 else codes
