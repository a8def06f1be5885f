"""The processes that quantize a model together, a GPU each: who does what, and sums that do not depend on their number.

Samples are cut into parts, the same whatever the number of processes; each process takes neighbouring ones. Sums over
the parts are taken as one fixed binary tree, so that they have the same bits on one process as on several.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, distributed

PARTS = 8  # of the samples: the most processes that can share them


class Team:
    """This process, number `rank` of `size`. Alone unless torch.distributed is initialized, or if it is to be `alone`.

    All processes of a team call its methods in the same order.
    """

    def __init__(self, alone: bool = False) -> None:
        together = not alone and distributed.is_available() and distributed.is_initialized()
        self.rank, self.size = (distributed.get_rank(), distributed.get_world_size()) if together else (0, 1)

    def share(self, count: int, rank: int | None = None) -> range:
        """Which of `count` things in a row are those of process `rank`, by default this one's."""
        rank = self.rank if rank is None else rank
        return range(count * rank // self.size, count * (rank + 1) // self.size)

    def sum(self, parts: int, own: Callable[[], list[Tensor]]) -> list[Tensor]:
        """The sum over all `parts`, at least one a process, on every process. `own` makes this process's next part:
        tensors of the shapes that every part has, whose memory is used."""
        owners = [rank for rank in range(self.size) for _ in self.share(parts, rank)]
        shapes: list[Tensor] = []
        found = self._total(range(parts), owners, own, shapes)
        if self.size == 1:
            assert found is not None
            return found
        found = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in shapes] if found is None else found
        for tensor in found:
            distributed.broadcast(tensor, owners[0])
        return found

    # A method, not a function inside `sum`: that would refer to itself, and keep all that `own` does in memory.
    def _total(
        self, parts: range, owners: list[int], own: Callable[[], list[Tensor]], shapes: list[Tensor]
    ) -> list[Tensor] | None:
        """The sum over `parts`, on the process that has the first of them. `shapes` becomes tensors like a part's."""
        if len(parts) == 1:
            if owners[parts.start] != self.rank:
                return None
            found = own()
            shapes[:] = [t.new_empty(()).expand(t.shape) for t in found]
            return found
        middle = len(parts) // 2
        left = self._total(parts[:middle], owners, own, shapes)
        right = self._total(parts[middle:], owners, own, shapes)
        return self._merge(left, right, owners[parts.start], owners[parts[middle]])

    def _merge(
        self, left: list[Tensor] | None, right: list[Tensor] | None, to: int, source: int
    ) -> list[Tensor] | None:
        """left + right on process `to`, which has the left one."""
        if self.rank == source != to:
            assert right is not None
            for tensor in right:
                _pass_on(distributed.isend, tensor, to)
        if self.rank != to:
            return None
        assert left is not None
        for n, whole in enumerate(left):
            if source == to:
                assert right is not None
                whole += right[n]
            else:
                part = torch.empty_like(whole)
                _pass_on(distributed.irecv, part, source)
                whole += part
        return left

    def rows(self, count: int) -> slice:
        """`share` of rows."""
        share = self.share(count)
        return slice(share.start, share.stop)

    def whole(self, own: Tensor, count: int) -> Tensor:
        """`count` rows on every process, of which this one has its share, `own`."""
        if self.size == 1:
            return own
        every = own.new_empty(count, *own.shape[1:])
        every[self.rows(count)] = own
        for rank in range(self.size):
            share = self.share(count, rank)
            if len(share):
                distributed.broadcast(every[share.start : share.stop].view(torch.uint8), rank)
        return every

    def gather(self, things: list[Any]) -> list[Any]:
        """The things of all processes in a row, through memory of the host."""
        if self.size == 1:
            return things
        every: list[Any] = [None] * self.size
        distributed.all_gather_object(every, things)
        return [thing for each in every for thing in each]

    def fetch(self, own: list[Tensor], source: int, device: torch.device) -> list[Tensor]:
        """The tensors `own` of process `source`, on process 0 and its `device`. The others give and get none."""
        if source == 0:
            return own
        shapes = self.gather([(tensor.shape, tensor.dtype) for tensor in own])
        if self.rank == source:
            for tensor in own:
                _pass_on(distributed.isend, tensor.contiguous(), 0)
        if self.rank:
            return []
        found = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in shapes]
        for tensor in found:
            _pass_on(distributed.irecv, tensor, source)
        return found

    def tell(self, thing: Any) -> Any:
        """What process 0 has, on every process, through memory of the host."""
        if self.size == 1:
            return thing
        box = [thing]
        distributed.broadcast_object_list(box, 0)
        return box[0]


def _pass_on(way: Callable[..., Any], tensor: Tensor, other: int) -> None:
    """Send (`distributed.isend`) or receive (`distributed.irecv`) one tensor."""
    # A batch of one: NCCL, connected once for everything, warns of sends outside a batch.
    for work in distributed.batch_isend_irecv([distributed.P2POp(way, tensor, other)]):
        work.wait()
