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
from eightfold.parallel import ordered_map, single_threaded, workers_for
from eightfold.rotation import rotate
from eightfold.rvq import FAMILIES, Residual

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


def moments(x: Tensor, x0: Tensor, stream: Tensor | None = None, stream0: Tensor | None = None) -> list[Tensor]:
    """Sums over the tokens of one sample, for `mean_moments`: of x x^T and (x0 - x) x^T, float32 [K, K], for inputs
    [..., K]; and of (stream0 - stream) x^T, float32 [N, K], for residual streams [..., N]."""
    now, then = x.flatten(0, -2).float(), x0.flatten(0, -2).float()
    sums = [now.T @ now, (then - now).T @ now]
    if stream is not None and stream0 is not None:
        sums.append((stream0.float() - stream.float()).flatten(0, -2).T @ now)
    return sums


def mean_moments(sums: Iterable[list[Tensor]], tokens: int) -> GroupStatistics:
    """Statistics of all samples from the `moments` of each, added up in the order given."""
    each = iter(sums)
    total = next(each)
    for more in each:
        for whole, part in zip(total, more, strict=True):
            whole += part
    hessian, drift, *stream = (whole / tokens for whole in total)
    return GroupStatistics(hessian, drift, stream[0] if stream else None)


@dataclass(frozen=True, slots=True)
class Prepared:
    """A group made ready for rounding, the same for every rate.

    `targets`: the weights to be met, float32 [N, K]; `s_in`: float32 [K]; `s_out`: output vectors before the layer's
    scale, float32 [N]; `rotated`: R_out (targets / s_out / s_in) R_in^T over its rms, float32 [N', K'], and `rms` that
    root mean square; `H_rotated`: the Hessian of the rotated inputs, `L` its factor, both float32 [K', K'].
    """

    targets: dict[str, Tensor]
    s_in: Tensor
    s_out: dict[str, Tensor]
    rotated: dict[str, Tensor]
    rms: dict[str, float]
    H_rotated: Tensor
    L: Tensor


def prepare_group(
    weights: Mapping[str, Tensor], specs: Mapping[str, LayerSpec], statistics: GroupStatistics, settings: Settings
) -> Prepared:
    """All that comes before rounding. Arguments and errors are those of `quantize_group`."""
    names = list(weights)
    label = ", ".join(names)
    H = statistics.hessian
    if not bool(H.isfinite().all()):
        raise ValueError(f"{label}: the Hessian is not finite; look for infinite activations, or try --dtype float32")
    if bad := [name for name, W in weights.items() if not bool(W.isfinite().all())]:
        raise ValueError(f"{bad[0]}: its weights in the original model are not finite")
    in_blocks = specs[names[0]].in_blocks
    signs = torch.Generator().manual_seed(_seed(settings.seed, names[0]))
    targets = _corrected(weights, statistics, settings)
    s_in = input_vector(torch.cat(list(targets.values())), settings, signs)
    H_rotated = _rotate_both(H * s_in * s_in[:, None], in_blocks)
    try:
        L = block_ldl(H_rotated, settings.damping)
    except torch.linalg.LinAlgError:  # pyright: ignore[reportPrivateImportUsage]
        raise ValueError(
            f"{label}: the Hessian of {len(H)} inputs is not positive definite with damping {settings.damping:g}; "
            f"give more calibration tokens (--samples, --seqlen) or more damping"
        ) from None

    ready = Prepared(targets, s_in, {}, {}, {}, H_rotated, L)
    for name, W in targets.items():
        sensitivity = statistics.sensitivity[name] if statistics.sensitivity else None
        scale = output_vector(W, sensitivity, settings, signs)
        R = _rotate_weight(W / s_in / scale[:, None], specs[name])
        rms = float(R.square().mean(dtype=torch.float64).sqrt()) or 1.0
        ready.s_out[name], ready.rotated[name], ready.rms[name] = scale, R / rms, rms
    return ready


@single_threaded()  # but for what goes through ordered_map: a sum over two threads is rounded differently
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
    names = list(weights)
    if len(rates := {specs[name].bits for name in names}) > 1:
        raise ValueError(f"{', '.join(names)}: they share an input, so expected one rate for all, came {sorted(rates)}")
    ready = prepare_group(weights, specs, statistics, settings)
    book = recipe(rates.pop(), settings.codebook)
    chosen = _search_scale(ready.rotated, ready.H_rotated, ready.L, book, settings)
    scaled = [R * (gaussian_scale(book, settings) / chosen[name]) for name, R in ready.rotated.items()]
    codes, _ = ldlq_rows(torch.cat(scaled), ready.L, book)
    sizes = [len(R) for R in scaled]
    split = [c.split(sizes) for c in codes]
    H, result = statistics.hessian, {}
    for i, name in enumerate(names):
        target = ready.targets[name]
        packed = _fit_output(target, H, specs[name], tuple(part[i] for part in split), ready.s_in, settings)
        packed.bias = biases.get(name)
        result[name] = _measured(name, weights[name], target, H, packed, chosen[name])
    return result


def dequantize(packed: PackedWeight) -> Tensor:
    """Dense weights W_hat = diag(s_out) cut(R_out^T C R_in) diag(s_in) of a quantized linear: float32 [N, K]."""
    W = _unscaled(packed.spec, packed.recipe, packed.codes)
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
        gradient = sensitivity.to(W.device).clamp_min(1e-6 * float(sensitivity.mean())).sqrt()
        scale = scale / gradient if bool((gradient > 0).all()) else scale
    scale = scale**settings.out_exponent
    return scale / scale.log().mean().exp() * _signs(len(scale), signs, W.device)


def _corrected(weights: Mapping[str, Tensor], statistics: GroupStatistics, settings: Settings) -> dict[str, Tensor]:
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
    if int(failed):
        raise ValueError(
            f"{', '.join(weights)}: the Hessian is not positive definite; give more calibration tokens (--samples, "
            f"--seqlen), or set the correction to 0"
        )
    missing = {name: settings.correction * times(W, statistics.drift) for name, W in weights.items()}
    if statistics.stream_drift is not None and len(weights) == 1:
        missing = {name: D + settings.stream_correction * statistics.stream_drift for name, D in missing.items()}
    return {name: W + torch.cholesky_solve(missing[name].T, C).T for name, W in weights.items()}


def _search_scale(
    rotated: Mapping[str, Tensor], H: Tensor, L: Tensor, book: Residual, settings: Settings
) -> dict[str, float]:
    """For each linear, the multiplier that loses least under LDLQ on evenly spaced rows; all are tried in one call."""
    multipliers = settings.multipliers
    if len(multipliers) == 1:
        return dict.fromkeys(rotated, multipliers[0])
    limit = max(settings.search_rows // len(rotated), 1)
    samples = {name: R[:: -(-len(R) // limit)] for name, R in rotated.items()}
    factors = [gaussian_scale(book, settings) / m for m in multipliers]
    trial = torch.cat([R * f for R in samples.values() for f in factors])
    _, found = ldlq_rows(trial, L, book)
    parts = iter(found.split([len(R) for R in samples.values() for _ in factors]))
    losses = {name: [_loss(R - next(parts) / f, H) for f in factors] for name, R in samples.items()}
    return {name: multipliers[loss.index(min(loss))] for name, loss in losses.items()}


def ldlq_rows(W: Tensor, L: Tensor, book: Residual) -> tuple[tuple[Tensor, ...], Tensor]:
    """LDLQ of all rows: in one piece on a GPU, in pieces of ROWS on the threads of a CPU."""
    if W.device.type != "cpu":
        return ldlq(W, L, book)
    pieces = list(ordered_map(lambda part: ldlq(part, L, book), W.split(ROWS), workers_for(W.device)))
    codes = zip(*(c for c, _ in pieces), strict=True)
    return tuple(torch.cat(stage) for stage in codes), torch.cat([W_hat for _, W_hat in pieces])


def times(A: Tensor, B: Tensor) -> Tensor:
    """A @ B, by pieces of ROWS on the threads of a CPU."""
    if A.device.type != "cpu":
        return A @ B
    return torch.cat(list(ordered_map(lambda part: part @ B, A.split(ROWS), workers_for(A.device))))


def _loss(E: Tensor, H: Tensor) -> float:
    """tr(E H E^T), by pieces of ROWS on the threads of a CPU."""
    pieces = E.split(ROWS if E.device.type == "cpu" else len(E))
    return sum(ordered_map(lambda part: proxy_loss(part, H), pieces, workers_for(E.device)))


def _fit_output(
    W: Tensor, H: Tensor, spec: LayerSpec, codes: tuple[Tensor, ...], s_in: Tensor, settings: Settings
) -> PackedWeight:
    """Pack with s_out[n] = <W_n, V_n>_H / <V_n, V_n>_H, V the dense weights without s_out: least squares a row.

    The layer's scale, the signs and the shrinkage that quantization calls for all come out of this.
    """
    book = recipe(spec.bits, settings.codebook)
    V = _unscaled(spec, book, codes) * s_in
    VH = times(V, H)
    s_out = (W * VH).sum(1) / (V * VH).sum(1).clamp_min(torch.finfo(torch.float32).tiny)
    s_out = _stored(s_out, settings)
    dtype = getattr(torch, settings.scale_dtype)
    return PackedWeight(spec, book, codes, s_in.to(dtype), s_out.to(dtype))


def _measured(name: str, W: Tensor, target: Tensor, H: Tensor, packed: PackedWeight, multiplier: float) -> Quantized:
    try:
        packed.validate(name)
    except ValueError as error:
        raise ValueError(f"{error}; its weights are outside float16's range: try --scale-dtype float32") from None
    # Below the normal numbers of a dtype its steps stay the same: 16 of them are the least that says anything.
    least = torch.finfo(packed.scale_out.dtype).smallest_normal / 64
    if float(packed.scale_out.abs().max()) < least and bool(target.any()):
        raise ValueError(f"{name}: its weights are below float16's range: try --scale-dtype float32, or exclude it")
    W_hat = dequantize(packed)
    loss = _loss(target - W_hat, H) / (_loss(target, H) or 1.0)
    noise, signal = (float(x.square().sum(dtype=torch.float64)) for x in (W - W_hat, W))
    sqnr = 10 * math.log10(signal / noise) if signal > 0 and noise > 0 else math.inf
    return Quantized(packed, loss, sqnr, multiplier)


def _unscaled(spec: LayerSpec, recipe: StageRecipe, codes: tuple[Tensor, ...]) -> Tensor:
    """cut(R_out^T C R_in), float32 [N, K]."""
    rows = [recipe.decode(part).flatten(1) for part in zip(*(c.split(DECODE_ROWS) for c in codes), strict=True)]
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
    return rms.clamp_min(1e-6 * float(rms.max())) if float(rms.max()) > 0 else torch.ones_like(rms)


def gaussian_scale(book: Residual, settings: Settings) -> float:
    """The rms of weights at which a recipe is best for a Gaussian source, in units of the codebook."""
    return FAMILIES[settings.codebook][1][book.bits]


def _stored(x: Tensor, settings: Settings) -> Tensor:
    """x rounded to the dtype in which the scale vectors are stored, as float32."""
    return x.to(getattr(torch, settings.scale_dtype)).float()


def _signs(count: int, generator: torch.Generator, device: torch.device) -> Tensor:
    return (torch.randint(0, 2, (count,), generator=generator) * 2 - 1).to(device, torch.float32)


def _seed(seed: int, name: str) -> int:
    """A seed of its own for every group, the same wherever and in whatever order it is computed."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:7], "little")
