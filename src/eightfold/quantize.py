"""Quantize the linears that read one input: scale vectors, rotation, LDLQ, and the way back to dense weights.

    W  ->  W_target               correction for inputs that the quantized layers before it changed    (prepare.py)
       ->  W_target / s_out / s_in   channels scaled so that the rotation mixes equals
       ->  R_out (..) R_in^T         rotated, one scale a linear      H -> R_in (s_in H s_in) R_in^T
       ->  codes by LDLQ             the scale that gives the least loss on some rows
       ->  s_out by least squares    the best output vector for these codes, row by row in closed form

What each step is worth was measured on trained models: docs/log.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from eightfold.format import LayerSpec, PackedWeight, StageRecipe
from eightfold.ldlq import ldlq
from eightfold.moments import GroupStatistics
from eightfold.parallel import ordered_map, single_threaded, workers_for
from eightfold.prepare import ROWS, Settings, prepare_group, proxy_losses, stored, times
from eightfold.queued import Later, upload
from eightfold.rotation import rotate
from eightfold.rvq import FAMILIES, Residual
from eightfold.team import Team

DECODE_ROWS = 4096  # rows decoded at once: bounds the memory of `dequantize`


@dataclass(frozen=True, slots=True)
class Quantized:
    """One quantized linear with its losses: `proxy_loss` is tr(E H E^T) / tr(W H W^T) against the target weights,
    `sqnr_db` of the weights against the original ones, `multiplier` the scale that the search chose."""

    packed: PackedWeight
    proxy_loss: float
    sqnr_db: float
    multiplier: float

    def losses(self) -> dict[str, float]:
        """The numbers alone, by name."""
        return {"proxy_loss": self.proxy_loss, "sqnr_db": self.sqnr_db, "multiplier": self.multiplier}


def recipe(bits: int, family: str = "e8p") -> StageRecipe:
    """The stages and ratios that this version writes at a nominal rate. Raises ValueError for an unknown family."""
    if family not in FAMILIES:
        raise ValueError(f"expected a codebook out of {sorted(FAMILIES)}, got {family!r}")
    book = FAMILIES[family][0][bits]
    return StageRecipe(book.stages, book.ratios)


@dataclass(frozen=True, slots=True)
class Begun:
    """Linears whose quantization is queued. `packed`, and the dense weights of the codes `dense`, float32 [N, K], by
    name; `quantized` is filled by Later.settle."""

    packed: dict[str, PackedWeight]
    dense: dict[str, Tensor]
    quantized: dict[str, Quantized]


def quantize_group(
    weights: Mapping[str, Tensor],
    biases: Mapping[str, Tensor],
    specs: Mapping[str, LayerSpec],
    statistics: GroupStatistics,
    settings: Settings,
) -> dict[str, Quantized]:
    """Quantize linears that share their input, and so their input vector, rotation, Hessian and bits.

    weights: float32 [N_i, K] by name, on one device; specs: their shapes, bits
    and blocks; biases: of those that have one, packed as they are.
    Raises ValueError, naming the layers, for weights or a Hessian that are not finite, for a Hessian that does not
    factor, for values outside the range of the scale vectors, and for linears of different bits.
    """
    later = Later(statistics.hessian.device)
    begun = begin_group(weights, biases, specs, statistics, settings, later, Team())
    later.settle()
    return begun.quantized


@single_threaded()  # but for what goes through ordered_map: a sum over two threads is rounded differently
def begin_group(
    weights: Mapping[str, Tensor],
    biases: Mapping[str, Tensor],
    specs: Mapping[str, LayerSpec],
    statistics: GroupStatistics,
    settings: Settings,
    later: Later,
    team: Team,
) -> Begun:
    """`quantize_group` whose work is only queued, on a GPU; its numbers and its errors come out of `later.settle`.

    The processes of the team share out the rows of what costs most: the targets, LDLQ, the fit, the losses.
    """
    names = list(weights)
    if len(rates := {specs[name].bits for name in names}) > 1:
        raise ValueError(f"{', '.join(names)}: they share an input, so expected one rate for all, came {sorted(rates)}")
    ready = prepare_group(weights, specs, statistics, settings, later, team)
    H, rotated = statistics.hessian, ready.rotated
    book = recipe(rates.pop(), settings.codebook)
    with later.timed("search"):
        chosen = _search_scale(rotated, ready.H_rotated, ready.L, book, settings)
    sizes = [len(R) for R in rotated.values()]
    scaled = torch.cat([rotated.pop(name) * (gaussian_scale(book, settings) / chosen[name]) for name in names])
    with later.timed("ldlq"):
        codes, W_hat = _ldlq_shared(scaled, ready.L, book, team)
    del scaled
    begun = Begun({}, {}, {})
    for name, C, *own in zip(names, W_hat.split(sizes), *(c.split(sizes) for c in codes), strict=True):
        target = ready.targets[name]
        packed, dense, met = _fit_output(target, H, specs[name], tuple(own), C, ready.s_in, settings, team)
        packed.bias = biases.get(name)
        begun.packed[name], begun.dense[name] = packed, dense

        def settle(numbers: list[float], name: str = name, packed: PackedWeight = packed) -> None:
            begun.quantized[name] = _measured(name, packed, numbers)

        later.add(_numbers(weights[name], target, H, packed, dense, met, chosen[name], team), settle)
    return begun


def dequantize(packed: PackedWeight) -> Tensor:
    """Dense weights W_hat = diag(s_out) cut(R_out^T C R_in) diag(s_in) of a quantized linear: float32 [N, K]."""
    parts = zip(*(c.split(DECODE_ROWS) for c in packed.codes), strict=True)
    W = _unrotated(packed.spec, (packed.recipe.decode(part).flatten(1) for part in parts))
    return W * packed.scale_in.float() * packed.scale_out.float()[:, None]


def _search_scale(
    rotated: Mapping[str, Tensor], H: Tensor, L: Tensor, book: Residual, settings: Settings
) -> dict[str, Tensor]:
    """For each linear, the multiplier, float64 [], that loses least under LDLQ on evenly spaced rows; all are tried in
    one call."""
    device, count = H.device, len(rotated)
    multipliers = upload(torch.tensor(settings.multipliers, dtype=torch.float64), device)
    if len(multipliers) == 1:
        return dict.fromkeys(rotated, multipliers[0])
    limit = max(settings.search_rows // count, 1)
    samples = {name: R[:: -(-len(R) // limit)] for name, R in rotated.items()}
    factors = [gaussian_scale(book, settings) / m for m in settings.multipliers]
    trial = torch.cat([R * f for R in samples.values() for f in factors])
    _, found = ldlq_rows(trial, L, book)
    parts = iter(found.split([len(R) for R in samples.values() for _ in factors]))
    losses = torch.stack([proxy_losses(R - next(parts) / f, H).sum() for R in samples.values() for f in factors])
    best = losses.view(count, len(factors)).argmin(1)
    return dict(zip(rotated, multipliers[best], strict=True))


def _ldlq_shared(W: Tensor, L: Tensor, book: Residual, team: Team) -> tuple[tuple[Tensor, ...], Tensor]:
    """LDLQ of all rows, each process taking its share."""
    codes, W_hat = ldlq_rows(W[team.rows(len(W))], L, book)
    return tuple(team.whole(own, len(W)) for own in codes), team.whole(W_hat, len(W))


def ldlq_rows(W: Tensor, L: Tensor, book: Residual) -> tuple[tuple[Tensor, ...], Tensor]:
    """LDLQ of all rows: in one piece on a GPU, in pieces of ROWS on the threads of a CPU."""
    if W.device.type != "cpu":
        return ldlq(W, L, book)
    pieces = list(ordered_map(lambda part: ldlq(part, L, book), W.split(ROWS), workers_for(W.device)))
    codes = zip(*(c for c, _ in pieces), strict=True)
    return tuple(torch.cat(stage) for stage in codes), torch.cat([W_hat for _, W_hat in pieces])


def _fit_output(
    W: Tensor,
    H: Tensor,
    spec: LayerSpec,
    codes: tuple[Tensor, ...],
    C: Tensor,
    s_in: Tensor,
    settings: Settings,
    team: Team,
) -> tuple[PackedWeight, Tensor, Tensor]:
    """Pack with s_out[n] = <W_n, V_n>_H / <V_n, V_n>_H, V the dense weights without s_out: least squares a row. C: what
    the codes say. Also returns the dense weights W_hat, float32 [N, K], and of this process's rows the loss that they
    save, <W_n, W_n>_H - <E_n, E_n>_H for E = W - W_hat, float64 [rows].

    The layer's scale, the signs and the shrinkage that quantization calls for all come out of this.
    """
    V = _unrotated(spec, C.split(DECODE_ROWS)) * s_in
    rows = team.rows(len(V))
    VH = times(V[rows], H)
    WV, VV = (W[rows] * VH).sum(1), (V[rows] * VH).sum(1)
    s_out = stored(team.whole(WV / VV.clamp_min(torch.finfo(torch.float32).tiny), len(V)), settings)
    s = s_out[rows].double()
    dtype = getattr(torch, settings.scale_dtype)
    packed = PackedWeight(spec, recipe(spec.bits, settings.codebook), codes, s_in.to(dtype), s_out.to(dtype))
    return packed, V * s_out[:, None], s * (2 * WV - s * VV)


def _numbers(
    W: Tensor, target: Tensor, H: Tensor, packed: PackedWeight, W_hat: Tensor, met: Tensor, chosen: Tensor, team: Team
) -> Tensor:
    """What `_measured` takes, float64 [7]. `met`: the loss that W_hat saves, of this process's rows."""
    noise, signal = (X.square().sum(dtype=torch.float64) for X in (W - W_hat, W))
    rows = team.rows(len(W))
    left = proxy_losses(target[rows] - W_hat[rows], H)
    sums = (team.whole(own, len(W)).sum() for own in (left, left + met))
    every = (*sums, noise, signal, chosen, packed.scale_out.abs().max(), target.any())
    return torch.stack([number.double() for number in every])


def _measured(name: str, packed: PackedWeight, numbers: list[float]) -> Quantized:
    loss, whole, noise, signal, multiplier, largest, some = numbers
    try:
        packed.validate(name)
    except ValueError as error:
        raise ValueError(f"{error}; its weights are outside float16's range: try --scale-dtype float32") from None
    # Below the normal numbers of a dtype its steps stay the same: 16 of them are the least that says anything.
    if largest < torch.finfo(packed.scale_out.dtype).smallest_normal / 64 and some:
        raise ValueError(f"{name}: its weights are below float16's range: try --scale-dtype float32, or exclude it")
    sqnr = 10 * math.log10(signal / noise) if signal > 0 and noise > 0 else math.inf
    return Quantized(packed, loss / (whole or 1.0), sqnr, multiplier)


def _unrotated(spec: LayerSpec, rows: Iterable[Tensor]) -> Tensor:
    """cut(R_out^T C R_in), float32 [N, K], for C float32 [N, K] with padding, given piece by piece."""
    W = torch.cat([rotate(part, spec.in_blocks)[:, : spec.in_features] for part in rows])
    return rotate(W.T, spec.out_blocks).T[: spec.out_features].contiguous()


def gaussian_scale(book: Residual, settings: Settings) -> float:
    """The rms of weights at which a recipe is best for a Gaussian source, in units of the codebook."""
    return FAMILIES[settings.codebook][1][book.bits]
