"""Hidden states of all samples, batch after batch: on the device, or on the host where the device has no room."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor


class Activations:
    """Batches [B, T, D] of hidden states. `on_host`: they wait in pinned memory of the host and come to `device`, and
    go, when they are asked for, in the order of the work that is queued there."""

    def __init__(self, batches: Iterable[Tensor], device: torch.device, on_host: bool) -> None:
        self._device, self._on_host = device, on_host and device.type == "cuda"
        self._batches: list[Tensor] = [self._kept(x, None) for x in batches]

    def copy(self) -> Activations:
        """The same hidden states; setting those of one leaves the other alone."""
        return Activations(iter(self), self._device, self._on_host)

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[b] for b in range(len(self)))

    def __getitem__(self, b: int) -> Tensor:
        return self._batches[b].to(self._device, non_blocking=True)

    def __setitem__(self, b: int, x: Tensor) -> None:
        self._batches[b] = self._kept(x, self._batches[b])

    def _kept(self, x: Tensor, place: Tensor | None) -> Tensor:
        if not self._on_host:
            return x
        if place is None:
            place = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
        return place.copy_(x, non_blocking=True)
