"""The nearest points of E8P and E81B on a GPU: kernels/encode.cu. What the codes mean is in `eightfold.e8p`."""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from eightfold.cuda.driver import device_index, load, sm_count

_BLOCK = 128  # threads, a vector each; the kernels' launch bounds say the same
_BLOCKS_PER_SM = 32  # more of them, and each takes several vectors


def encode_e8p(x: Tensor) -> Tensor:
    """Code of the nearest point of E8P: int16 [n], for x float32 [n, 8] on a GPU. Raises ValueError, KernelError."""
    return _launch("encode_e8p", x, torch.empty(len(x), dtype=torch.int16, device=x.device))


def candidates_e8p(x: Tensor) -> Tensor:
    """The nearest point of E8P with shift +1/4, and that with -1/4: int16 [2, n], for x float32 [n, 8] on a GPU.

    Raises ValueError, KernelError.
    """
    return _launch("candidates_e8p", x, torch.empty(2, len(x), dtype=torch.int16, device=x.device))


def encode_e81b(x: Tensor) -> Tensor:
    """Code of the nearest point of E81B: uint8 [n], for x float32 [n, 8] on a GPU. Raises ValueError, KernelError."""
    return _launch("encode_e81b", x, torch.empty(len(x), dtype=torch.uint8, device=x.device))


def _launch(name: str, x: Tensor, codes: Tensor) -> Tensor:
    """Queue a kernel that writes `codes`, contiguous, on the current stream of x's device. Returns `codes`."""
    if x.device.type != "cuda" or x.dtype != torch.float32 or x.dim() != 2 or x.shape[1] != 8:
        raise ValueError(f"expected float32 [n, 8] on a GPU, got {x.dtype} {list(x.shape)} on {x.device}")
    n = len(x)
    if n == 0:
        return codes
    x = x.contiguous()
    if x.data_ptr() % 16:  # a piece of something, while the kernels read 16 bytes at a time
        x = x.clone()
    device = device_index(x.device)
    grid = min(-(-n // _BLOCK), _BLOCKS_PER_SM * sm_count(device))
    params = struct.pack("<QQq", x.data_ptr(), codes.data_ptr(), n)
    load("encode.cu", name, device).launch(grid, _BLOCK, params, torch.cuda.current_stream(device).cuda_stream)
    return codes
