"""What calibration keeps of the inputs of a group of linears: second moments, summed over the tokens.

On a GPU, activations of 16 bits are multiplied as they are, at the full rate of its tensor cores, and summed in
float32: their products are exact. The small differences between the activations of two models are rounded to 16 bits
first, which costs each up to 2^-9 of it, with either sign. Activations in float32 are multiplied in float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eightfold.team import Team


@dataclass(frozen=True, slots=True)
class GroupStatistics:
    """What calibration saw at the input x of a group of linears, x0 being the same input in the original model.

    `hessian`: E[x x^T], float32 [K, K]. `drift`: E[(x0 - x) x^T], float32 [K, K], or None for no correction.
    `stream_drift`: E[(r0 - r) x^T], float32 [N, K], r the residual stream that the (then only) linear adds to, or None.
    `sensitivity`: per linear the mean squared gradient of the loss at its outputs, float32 [N], or None for equal ones.
    """

    hessian: Tensor
    drift: Tensor | None = None
    stream_drift: Tensor | None = None
    sensitivity: Mapping[str, Tensor] | None = None


def moments(x: Tensor, x0: Tensor, stream: Tensor | None = None, stream0: Tensor | None = None) -> list[Tensor]:
    """Sums over the tokens of some samples, for `mean_moments`: of x x^T and (x0 - x) x^T, float32 [K, K], for inputs
    [..., K]; and of (stream0 - stream) x^T, float32 [N, K], for residual streams [..., N]. All of one dtype."""
    now, then = x.flatten(0, -2), x0.flatten(0, -2)
    sums = [products(now, now), products(then - now, now)]
    if stream is not None and stream0 is not None:
        sums.append(products((stream0 - stream).flatten(0, -2), now))
    return sums


def mean_moments(
    sums: Iterator[list[Tensor]], parts: int, sizes: Sequence[int], tokens: int, team: Team
) -> GroupStatistics:
    """Statistics of all samples from the `moments` of each of this process's batches: parts of `sizes` of them, in the
    order given, then all `parts` of the team."""
    left = iter(sizes)

    def part() -> list[Tensor]:
        total = next(sums)
        for _ in range(next(left) - 1):
            for whole, more in zip(total, next(sums), strict=True):
                whole += more
        return total

    hessian, drift, *stream = (whole.div_(tokens) for whole in team.sum(parts, part))
    return GroupStatistics(hessian, drift, stream[0] if stream else None)


def products(a: Tensor, b: Tensor) -> Tensor:
    """a^T b, float32 [K, L], for a [n, K] and b [n, L]."""
    if a.is_cuda and a.dtype.itemsize == 2:
        return torch.mm(a.T, b, out_dtype=torch.float32)
    return a.T.float() @ b.float()
