"""Work that a GPU is given without waiting for it: copies to it, numbers that are looked at later, how long it took."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on `device`, without waiting for what is queued there."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


class Later:
    """Numbers that are still being computed, and what to do with them; the seconds that parts of the work take.

    `add` numbers in the order in which they are to be looked at; `settle` waits once, for all. `seconds`: by name, of
    what ran under `timed` and is settled.
    """

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = {}
        self._device = device
        self._waiting: list[tuple[Tensor, Callable[[list[float]], None]]] = []
        self._marks: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    def add(self, numbers: Tensor, use: Callable[[list[float]], None]) -> None:
        """Call `use` with `numbers` (any real dtype and shape, flat) at the next `settle`; it may raise."""
        self._waiting.append((numbers.detach().double().flatten(), use))

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Count the seconds that what is queued inside takes on the device. Not to be nested."""
        if self._device.type == "cuda":
            mark = name, torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            mark[1].record()
            yield
            mark[2].record()
            self._marks.append(mark)
        else:
            start = time.perf_counter()
            yield
            self._count(name, time.perf_counter() - start)

    def settle(self) -> None:
        """Fetch all numbers, and hand them out in order. What an exception of one leaves is dropped."""
        waiting, self._waiting = self._waiting, []
        if waiting:
            values = torch.cat([numbers for numbers, _ in waiting]).tolist()
            for numbers, use in waiting:
                use(values[: len(numbers)])
                del values[: len(numbers)]
        for name, start, end in self._marks:
            end.synchronize()
            self._count(name, start.elapsed_time(end) / 1000)
        self._marks.clear()

    def _count(self, name: str, seconds: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds
