"""E8 shells: the points of the lattice E8 nearest to the origin, 65,536 of them or the first 256.

This is the default codebook of GLQ up to 0.6: here to read its checkpoints, and to compare E8P with. The order of the
points is normative: docs/format.md. It decides which 8,655 of the 60,480 points of squared norm 12 exist, and is what
an unstable sort made of ties, so that sort is repeated step by step.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from eightfold.codebook import Codebook, on_device

COUNT = 65_536
WHOLE = 56_881  # points of squared norm at most 10: all of them are in the table
_INNER = 19  # of the 24 kinds of sorted magnitudes: those of squared norm at most 10
_STEPS = 13  # values of a doubled coordinate, -6 to 6
_SCORED = 1 << 10  # vectors scored at once against the points of squared norm 12: 35 MB


class E8Shell(Codebook):
    """65,536 points of E8, 2 bits a weight: squared norm at most 10, and some of squared norm 12."""

    name = "e8shell"
    bits = 16
    dtype = torch.uint16

    def points(self) -> Tensor:
        return _points()

    def _nearest(self, x: Tensor) -> Tensor:
        """|x - v|^2 = |x|^2 - 2 (<|x|, |v|> - |v|^2 / 2), less a penalty where v cannot have all of x's signs.

        Sorted magnitudes of points come in 24 kinds. Up to squared norm 10 every arrangement of a kind is there, and
        the best one is sorted as |x| is. Integer points take any signs; of half-integer ones the sum must be even,
        which may force the cheapest coordinate to the other sign: that is the last one, where both |x| and the kind
        (1/2) are least. Where a point of squared norm 12 would be nearer, those in the table are scored one by one.
        """
        kinds, half_norms, powers, keys, numbers = (on_device(f, x.device) for f in _TABLES)
        ordered, order = x.abs().sort(1, descending=True)
        negative = x.gather(1, order) < 0
        half = kinds[:, 7] == 0.5
        odd = kinds.sum(1) % 2 == 1
        wrong = half & (odd ^ (negative.sum(1, keepdim=True) % 2 == 1))
        scores = ordered @ kinds.T - half_norms - ordered[:, 7:] * wrong
        best, kind = scores[:, :_INNER].max(1)
        negative[:, 7] ^= wrong.gather(1, kind[:, None])[:, 0]
        doubled = (2 * kinds[kind]).to(torch.int64)
        key = (torch.where(negative, -doubled, doubled) * powers[order]).sum(1)
        number = numbers[torch.searchsorted(keys, key)]

        far = (scores[:, _INNER:].amax(1) > best).nonzero()[:, 0]
        outer = on_device(_points, x.device)[WHOLE:]
        for part in far.split(_SCORED):
            score, place = (x[part] @ outer.T - 6).max(1)
            number[part] = torch.where(score > best[part], place + WHOLE, number[part])
        return number


class E8Shell256(Codebook):
    """The first 256 points of E8Shell, 1 bit a weight: squared norm at most 2, and 15 points of squared norm 4."""

    name = "e8shell256"
    bits = 8
    dtype = torch.int8

    def points(self) -> Tensor:
        return _points()[:256]

    def _nearest(self, x: Tensor) -> Tensor:
        points = on_device(self.points, x.device)
        return (x @ points.T - points.square().sum(1) / 2).argmax(1)


@cache
def doubled_points() -> Tensor:
    """Twice the 65,536 points, int8 [65536, 8]."""
    return (2 * _points()).to(torch.int8)


# --- construction ---------------------------------------------------------------------------------------------------


@cache
def _points() -> Tensor:
    doubled = _listed()
    order = _sorted_as_listed(doubled.square().sum(1).tolist())[:COUNT]
    return doubled[order].float() / 2


def _listed() -> Tensor:
    """Twice all points of E8 of squared norm at most 12, int64 [117361, 8], ascending by (z7, z6, ..., z0): their
    coordinates in the basis 2 e0, e1 - e0, ..., e6 - e5, (1/2, ..., 1/2)."""
    found = []
    for values in (range(-6, 7, 2), range(-5, 6, 2)):  # integer points, half-integer points
        rows = torch.zeros(1, 0, dtype=torch.int64)
        for _ in range(8):
            rows = torch.cat([torch.nn.functional.pad(rows, (0, 1), value=v) for v in values])
            rows = rows[rows.square().sum(1) <= 48]
        found.append(rows[rows.sum(1) % 4 == 0])
    doubled = torch.cat(found)
    last = doubled[:, 7]
    z, above = [last], torch.zeros_like(last)
    for i in range(6, -1, -1):
        above = (doubled[:, i] - last) // 2 + above
        z.append(above if i else above // 2)
    key = ((torch.stack(z, 1) + 64) * 128 ** torch.arange(7, -1, -1)).sum(1)
    return doubled[key.argsort()]


def _sorted_as_listed(keys: list[int]) -> list[int]:
    """Positions of `keys` in ascending order, with ties as the introsort of libstdc++ leaves them: quicksort by a
    median of three, down to segments of 16, then one stable sort. (It never recurses so deep here that it would turn to
    heapsort.)"""
    keys = keys.copy()
    order = list(range(len(keys)))
    segments = [(0, len(keys))]
    while segments:
        low, high = segments.pop()
        while high - low > 16:
            cut = _partition(keys, order, low, high)
            segments.append((cut, high))
            high = cut
    return [order[i] for i in sorted(range(len(keys)), key=keys.__getitem__)]


def _partition(keys: list[int], order: list[int], low: int, high: int) -> int:
    """Part [low, high) in place: keys from the result on are not below the pivot, those before it not above."""
    a, b, c = low + 1, (low + high) // 2, high - 1
    if keys[a] < keys[b]:
        median = b if keys[b] < keys[c] else c if keys[a] < keys[c] else a
    else:
        median = a if keys[a] < keys[c] else c if keys[b] < keys[c] else b

    def swap(i: int, j: int) -> None:
        keys[i], keys[j] = keys[j], keys[i]
        order[i], order[j] = order[j], order[i]

    swap(low, median)
    pivot, i, j = keys[low], low + 1, high
    while True:
        while keys[i] < pivot:
            i += 1
        j -= 1
        while pivot < keys[j]:
            j -= 1
        if i >= j:
            return i
        swap(i, j)
        i += 1


@cache
def _kinds() -> Tensor:
    """Sorted magnitudes of the points, by ascending norm: float32 [24, 8]."""
    kinds = _points().abs().sort(1, descending=True).values.unique(dim=0)
    return kinds[kinds.square().sum(1).argsort(stable=True)]


@cache
def _half_norms() -> Tensor:
    return _kinds().square().sum(1) / 2


@cache
def _powers() -> Tensor:
    return _STEPS ** torch.arange(8)


@cache
def _ranked() -> tuple[Tensor, Tensor]:
    """Doubled coordinates as one integer each, ascending, and the numbers of these points; squared norm <= 10."""
    sorted_keys = (doubled_points()[:WHOLE].to(torch.int64) * _powers()).sum(1).sort()
    return sorted_keys.values, sorted_keys.indices


def _keys() -> Tensor:
    return _ranked()[0]


def _numbers() -> Tensor:
    return _ranked()[1]


_TABLES = (_kinds, _half_norms, _powers, _keys, _numbers)
