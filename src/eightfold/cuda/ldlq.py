"""The sequential part of LDLQ on a GPU: kernels/ldlq.cu. What it computes is in `eightfold.ldlq`."""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from eightfold.cuda.driver import device_index, load, sm_count

PANEL = 128  # columns of a launch at most, and of the errors that it writes
_ROWS = 8  # of a warp
_MOST_WARPS = 14  # of a block of threads, as its launch bounds say: 94 KB of shared memory, which every GPU has
_FACTOR_BYTES = 30720  # of shared memory: L below its diagonal blocks
_ROW_BYTES = 4 * (PANEL + 16)  # of shared memory a row


def quantize_panel(
    W: Tensor, T: Tensor, L: Tensor, E: Tensor, codes: tuple[Tensor, ...], ratios: tuple[float, ...], start: int
) -> None:
    """Round the columns from `start` on, at most PANEL of them, with feedback inside the panel.

    W, T: float32 [N, K]; T has the feedback of later columns in it, and gets W_hat in the panel's columns. L: float32
    [K, K]. E: float32 [N, PANEL], gets W - W_hat. codes: of each stage [N, K / 8], int16 for E8P, uint8 for E81B, which
    only the last stage may be. All contiguous, on one GPU; queued on its current stream. Raises KernelError.
    """
    N, K = W.shape
    device = device_index(W.device)
    warps = _warps(N, sm_count(device))
    shared = _FACTOR_BYTES + warps * _ROWS * _ROW_BYTES
    empty = [0] * (4 - len(codes))
    params = struct.pack(
        "<8Q4f6i",
        *(t.data_ptr() for t in (W, T, L, E)), *(c.data_ptr() for c in codes), *empty, *ratios, *empty,
        N, K, start, min(PANEL, K - start), len(codes), codes[-1].dtype == torch.uint8,
    )  # fmt: skip
    stream = torch.cuda.current_stream(device).cuda_stream
    load("ldlq.cu", "ldlq_panel", device, shared).launch(-(-N // (_ROWS * warps)), 32 * warps, params, stream)


def _warps(rows: int, processors: int) -> int:
    """Of a block of threads, so that all multiprocessors have the same to do."""
    each = max(1, -(-rows // (_ROWS * processors)))
    return -(-each // -(-each // _MOST_WARPS))
