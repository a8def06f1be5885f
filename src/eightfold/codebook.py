"""What every codebook of eight-dimensional points offers. One code stands for eight weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from eightfold.cuda.linear import supported

_ENCODE_ROWS = 1 << 14  # vectors per batch of `encode`: its memory stays below about 20 MB, and in the cache


class Codebook(ABC):
    """Points in R^8 with a number each.

    Attributes: `name` as files say it, `bits` of one code, `dtype` of stored codes (`torch.int16` holds the bit
    pattern of an unsigned 16-bit code).
    """

    name: str
    bits: int
    dtype: torch.dtype

    def candidates(self, x: Tensor) -> Tensor:
        """Codes near x [..., 8] that are worth a try where later stages code the rest: [C, ...], C of them for each."""
        return self.encode(x)[None]

    @abstractmethod
    def points(self) -> Tensor:
        """All points, float32 [2**bits, 8], in the order of their codes; on the CPU, not to be written to."""

    @abstractmethod
    def _nearest(self, x: Tensor) -> Tensor:
        """Number of the nearest point, int64 [n], for x float32 [n, 8]."""

    def _nearest_by_kernel(self, x: Tensor) -> Tensor:
        """Code of the nearest point, `dtype` [n], for x float32 [n, 8] on a GPU that the kernels support.

        A codebook without a kernel searches there with PyTorch, as everywhere.
        """
        return self._nearest_by_parts(x)

    def _nearest_by_parts(self, x: Tensor) -> Tensor:
        return torch.cat([self._nearest(part) for part in batches(x)]).to(self.dtype)

    def encode(self, x: Tensor) -> Tensor:
        """Code of the point nearest to x in the Euclidean norm, exact up to float32 rounding at ties.

        x: float32 [..., 8], finite. Returns codes `dtype` [...] on the same device. Raises KernelError on a GPU.
        """
        rows = x.reshape(-1, 8)
        codes = self._nearest_by_kernel(rows) if supported(x.device) else self._nearest_by_parts(rows)
        return codes.reshape(x.shape[:-1])

    def decode(self, codes: Tensor) -> Tensor:
        """The points of codes `dtype` [...]: float32 [..., 8] on the same device."""
        numbers = codes.to(torch.int64) & ((1 << self.bits) - 1)
        return on_device(self.points, codes.device)[numbers]


def batches(x: Tensor) -> tuple[Tensor, ...]:
    """Vectors [n, 8] in batches that are encoded at once."""
    return x.split(_ENCODE_ROWS)


@cache
def on_device(table: Callable[[], Tensor], device: torch.device) -> Tensor:
    """One copy of a table per device; the first use on a device makes it."""
    return table().to(device)
