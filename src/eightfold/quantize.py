"""Quantize the linears that read one input: scale vectors, rotation, LDLQ, and the way back to dense weights.

    W  ->  W_target               correction for inputs that the quantized layers before it changed
       ->  W_target / s_out / s_in   channels scaled so that the rotation mixes equals
       ->  R_out (..) R_in^T         rotated, one scale a linear      H -> R_in (s_in H s_in) R_in^T
       ->  codes by LDLQ             the scale that gives the least loss on some rows
       ->  s_out by least squares    the best output vector for these codes, row by row in closed form

What each step is worth was measured on trained models: docs/log.md.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from eightfold.format import LayerSpec, PackedWeight, StageRecipe
from eightfold.ldlq import block_ldl, ldlq, proxy_loss
from eightfold.moments import GroupStatistics
from eightfold.parallel import ordered_map, single_threaded, workers_for
from eightfold.queued import Later, upload
from eightfold.rotation import rotate
from eightfold.rvq import FAMILIES, Residual
from eightfold.team import Team

ROWS = 256  # rows of one piece of work on the CPU: fixed, so that results do not depend on the number of threads
DECODE_ROWS = 4096  # rows decoded at once: bounds the memory of `dequantize`


@dataclass(frozen=True, slots=True)
class Settings:
    """How to quantize. All of it is written into the checkpoint's provenance; none of it is needed to read one.

    `codebook`: a key of rvq.FAMILIES, of the stages that code the weights.
    `in_exponent`: input channel j is divided by rms(W[:, j])**in_exponent. `out_exponent`: output channel n is divided
    by (rms(W[n]) / rms(gradient of the loss at output n))**out_exponent. `damping`: added to the Hessian's diagonal, as
    a share of its mean. `correction`, `stream_correction`: share of the upstream error, at the input and in the
    residual stream, that the target weights make good (0: none). `multipliers`: the scales tried, relative to the
    Gaussian optimum, on `search_rows` rows.
    """

    in_exponent: float = 0.5
    out_exponent: float = 0.5
    damping: float = 0.03
    correction: float = 0.5
    stream_correction: float = 0.5
    multipliers: tuple[float, ...] = (1.0, 1.1, 1.2)
    search_rows: int = 512
    scale_dtype: str = "float16"
    seed: int = 0
    codebook: str = "e8p"


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
    factor and for values outside the range of the scale vectors.
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

    Every process of the team does the same but for LDLQ, whose rows they share out.
    """
    names, H = list(weights), statistics.hessian
    label = ", ".join(names)
    _check_finite(label, weights, H, later)
    in_blocks = specs[names[0]].in_blocks
    signs = torch.Generator().manual_seed(_seed(settings.seed, names[0]))
    targets = _corrected(weights, statistics, settings, later)
    s_in = input_vector(torch.cat(list(targets.values())), settings, signs)
    H_rotated = _rotate_both(H * s_in * s_in[:, None], in_blocks)
    L, failed = block_ldl(H_rotated, settings.damping)
    later.add(failed, lambda values: _check_factor(values, label, len(H), settings))

    rotated = {}
    for name, W in targets.items():
        sensitivity = statistics.sensitivity[name] if statistics.sensitivity else None
        scale = output_vector(W, sensitivity, settings, signs)
        R = _rotate_weight(W / s_in / scale[:, None], specs[name])
        rms = R.square().mean(dtype=torch.float64).sqrt()
        rotated[name] = R / torch.where(rms > 0, rms, 1.0)

    book = recipe(specs[names[0]].bits, settings.codebook)
    with later.timed("search"):
        chosen = _search_scale(rotated, H_rotated, L, book, settings)
    sizes = [len(R) for R in rotated.values()]
    scaled = torch.cat([rotated.pop(name) * (_scale(book, settings) / chosen[name]) for name in names])
    with later.timed("ldlq"):
        codes, W_hat = _ldlq_shared(scaled, L, book, team)
    del scaled, H_rotated, L
    begun = Begun({}, {}, {})
    for name, C, *own in zip(names, W_hat.split(sizes), *(c.split(sizes) for c in codes), strict=True):
        packed, dense = _fit_output(targets[name], H, specs[name], tuple(own), C, s_in, settings)
        packed.bias = biases.get(name)
        begun.packed[name], begun.dense[name] = packed, dense

        def settle(numbers: list[float], name: str = name, packed: PackedWeight = packed) -> None:
            begun.quantized[name] = _measured(name, packed, numbers)

        later.add(_numbers(weights[name], targets[name], H, packed, dense, chosen[name]), settle)
    return begun


def dequantize(packed: PackedWeight) -> Tensor:
    """Dense weights W_hat = diag(s_out) cut(R_out^T C R_in) diag(s_in) of a quantized linear: float32 [N, K]."""
    parts = zip(*(c.split(DECODE_ROWS) for c in packed.codes), strict=True)
    W = _unrotated(packed.spec, (packed.recipe.decode(part).flatten(1) for part in parts))
    return W * packed.scale_in.float() * packed.scale_out.float()[:, None]


def input_vector(W: Tensor, settings: Settings, signs: torch.Generator) -> Tensor:
    """s_in of a group, float32 [K] with values of its storage dtype: random signs and channel scales rms(W[:, j])**a.

    Dividing the columns of W by s and multiplying those of the input by it evens out W's columns (QuIP# appendix,
    "rescale"; here with the Hessian scaled to match). The geometric mean is 1.
    """
    scale = _rms(W, 0) ** settings.in_exponent
    return _stored(scale / scale.log().mean().exp() * _signs(len(scale), signs, W.device), settings)


def output_vector(W: Tensor, sensitivity: Tensor | None, settings: Settings, signs: torch.Generator) -> Tensor:
    """s_out before the layer's scale, float32 [N]: random signs and (rms of the row / rms of its gradient)**b.

    The rotation spreads the error evenly over the scaled outputs, so output n gets an error of s_n^2. The sum of
    g_n^2 s_n^2 times the mean of r_n^2 / s_n^2, that is the loss, is least at s_n^2 = r_n / g_n.
    """
    scale = _rms(W, 1)
    if sensitivity is not None:
        squares = sensitivity if sensitivity.device == W.device else upload(sensitivity, W.device)
        gradient = squares.clamp_min(1e-6 * squares.mean()).sqrt()
        scale = scale / torch.where((gradient > 0).all(), gradient, 1.0)
    scale = scale**settings.out_exponent
    return scale / scale.log().mean().exp() * _signs(len(scale), signs, W.device)


def _check_finite(label: str, weights: Mapping[str, Tensor], H: Tensor, later: Later) -> None:
    def check(finite: list[float]) -> None:
        if not finite[0]:
            raise ValueError(
                f"{label}: the Hessian is not finite; look for infinite activations, or try --dtype float32"
            )
        if bad := [name for name, good in zip(weights, finite[1:], strict=True) if not good]:
            raise ValueError(f"{bad[0]}: its weights in the original model are not finite")

    later.add(torch.stack([X.isfinite().all() for X in (H, *weights.values())]), check)


def _check_factor(failed: list[float], label: str, size: int, settings: Settings) -> None:
    if failed[0]:
        raise ValueError(
            f"{label}: the Hessian of {size} inputs is not positive definite with damping {settings.damping:g}; "
            f"give more calibration tokens (--samples, --seqlen) or more damping"
        )


def _corrected(
    weights: Mapping[str, Tensor], statistics: GroupStatistics, settings: Settings, later: Later
) -> dict[str, Tensor]:
    """Targets W + (c W E[(x0 - x) x^T] + d E[(r0 - r) x^T]) H^-1, c = `correction`, d = `stream_correction`.

    With c = d = 1 these are the weights that best give W x0 + r0 - r from x: the output of the original linear (GPTAQ's
    aim), and what the stream lacks besides. All of it fits the errors of the layers before so hard
    that the model gets worse.
    """
    if statistics.drift is None or settings.correction == settings.stream_correction == 0:
        return dict(weights)
    H = statistics.hessian.clone()
    H.diagonal().add_(0.01 * H.diagonal().mean())
    C, failed = torch.linalg.cholesky_ex(H)

    def check(failed: list[float]) -> None:
        if failed[0]:
            raise ValueError(
                f"{', '.join(weights)}: the Hessian is not positive definite; give more calibration tokens "
                f"(--samples, --seqlen), or set the correction to 0"
            )

    later.add(failed, check)
    targets = {}
    for name, W in weights.items():
        missing = settings.correction * _times(W, statistics.drift)
        if statistics.stream_drift is not None and len(weights) == 1:
            missing += settings.stream_correction * statistics.stream_drift
        targets[name] = W + torch.cholesky_solve(missing.T, C).T
    return targets


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
    factors = [_scale(book, settings) / m for m in settings.multipliers]
    trial = torch.cat([R * f for R in samples.values() for f in factors])
    _, found = _ldlq_rows(trial, L, book)
    parts = iter(found.split([len(R) for R in samples.values() for _ in factors]))
    losses = torch.stack([_loss(R - next(parts) / f, H) for R in samples.values() for f in factors])
    best = losses.view(count, len(factors)).argmin(1)
    return dict(zip(rotated, multipliers[best], strict=True))


def _ldlq_shared(W: Tensor, L: Tensor, book: Residual, team: Team) -> tuple[tuple[Tensor, ...], Tensor]:
    """LDLQ of all rows, each process taking its share."""
    if team.size == 1:
        return _ldlq_rows(W, L, book)
    share = team.share(len(W))
    codes, W_hat = _ldlq_rows(W[share.start : share.stop], L, book)
    every = []
    for own in (*codes, W_hat):
        whole = own.new_empty(len(W), own.shape[1])
        whole[share.start : share.stop] = own
        every.append(team.complete(whole))
    return tuple(every[:-1]), every[-1]


def _ldlq_rows(W: Tensor, L: Tensor, book: Residual) -> tuple[tuple[Tensor, ...], Tensor]:
    """LDLQ of all rows: in one piece on a GPU, in pieces of ROWS on the threads of a CPU."""
    if W.device.type != "cpu":
        return ldlq(W, L, book)
    pieces = list(ordered_map(lambda part: ldlq(part, L, book), W.split(ROWS), workers_for(W.device)))
    codes = zip(*(c for c, _ in pieces), strict=True)
    return tuple(torch.cat(stage) for stage in codes), torch.cat([W_hat for _, W_hat in pieces])


def _times(A: Tensor, B: Tensor) -> Tensor:
    """A @ B, by pieces of ROWS on the threads of a CPU."""
    if A.device.type != "cpu":
        return A @ B
    return torch.cat(list(ordered_map(lambda part: part @ B, A.split(ROWS), workers_for(A.device))))


def _loss(E: Tensor, H: Tensor) -> Tensor:
    """tr(E H E^T), float64 [], by pieces of ROWS on the threads of a CPU."""
    pieces = E.split(ROWS if E.device.type == "cpu" else len(E))
    return torch.stack(list(ordered_map(lambda part: proxy_loss(part, H), pieces, workers_for(E.device)))).sum()


def _fit_output(
    W: Tensor,
    H: Tensor,
    spec: LayerSpec,
    codes: tuple[Tensor, ...],
    C: Tensor,
    s_in: Tensor,
    settings: Settings,
) -> tuple[PackedWeight, Tensor]:
    """Pack with s_out[n] = <W_n, V_n>_H / <V_n, V_n>_H, V the dense weights without s_out: least squares a row. C: what
    the codes say. Also returns the dense weights, float32 [N, K].

    The layer's scale, the signs and the shrinkage that quantization calls for all come out of this.
    """
    V = _unrotated(spec, C.split(DECODE_ROWS)) * s_in
    VH = _times(V, H)
    s_out = (W * VH).sum(1) / (V * VH).sum(1).clamp_min(torch.finfo(torch.float32).tiny)
    s_out = _stored(s_out, settings)
    dtype = getattr(torch, settings.scale_dtype)
    packed = PackedWeight(spec, recipe(spec.bits, settings.codebook), codes, s_in.to(dtype), s_out.to(dtype))
    return packed, V * s_out[:, None]


def _numbers(W: Tensor, target: Tensor, H: Tensor, packed: PackedWeight, W_hat: Tensor, multiplier: Tensor) -> Tensor:
    """What `_measured` takes, float64 [7]."""
    noise, signal = (X.square().sum(dtype=torch.float64) for X in (W - W_hat, W))
    losses = _loss(target - W_hat, H), _loss(target, H)
    every = (*losses, noise, signal, multiplier, packed.scale_out.abs().max(), target.any())
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


def _rotate_weight(W: Tensor, spec: LayerSpec) -> Tensor:
    """R_out pad(W) R_in^T: float32 [padded_out, padded_in]."""
    N, K = W.shape
    padded = torch.nn.functional.pad(W, (0, spec.padded_in - K, 0, spec.padded_out - N))
    return rotate(rotate(padded, spec.in_blocks).T, spec.out_blocks).T.contiguous()


def _rotate_both(H: Tensor, blocks: tuple[int, ...]) -> Tensor:
    """R pad(H) R^T, made symmetric to the bit."""
    extra = sum(blocks) - len(H)
    half = rotate(torch.nn.functional.pad(H, (0, extra, 0, extra)), blocks).T
    R = rotate(half, blocks)
    return (R + R.T) / 2


def _rms(W: Tensor, dim: int) -> Tensor:
    """Root mean square over `dim`, kept above a millionth of the largest: a channel of zeros stays finite."""
    rms = W.square().mean(dim).sqrt()
    return torch.where(rms.max() > 0, rms.clamp_min(1e-6 * rms.max()), 1.0)


def _scale(book: Residual, settings: Settings) -> float:
    return FAMILIES[settings.codebook][1][book.bits]


def _stored(x: Tensor, settings: Settings) -> Tensor:
    """x rounded to the dtype in which the scale vectors are stored, as float32."""
    return x.to(getattr(torch, settings.scale_dtype)).float()


def _signs(count: int, generator: torch.Generator, device: torch.device) -> Tensor:
    return upload((torch.randint(0, 2, (count,), generator=generator) * 2 - 1).float(), device)


def _seed(seed: int, name: str) -> int:
    """A seed of its own for every group, the same wherever and in whatever order it is computed."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:7], "little")
