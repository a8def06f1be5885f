"""Make a group of linears ready for rounding: targets, scale vectors, rotation, the factor of the Hessian.

What each step is worth was measured on trained models: docs/log.md. Nothing here waits for a GPU.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from eightfold.format import LayerSpec
from eightfold.ldlq import block_ldl
from eightfold.moments import GroupStatistics
from eightfold.parallel import ordered_map, workers_for
from eightfold.queued import Later, upload
from eightfold.rotation import rotate
from eightfold.team import Team

ROWS = 256  # rows of one piece of work on the CPU: fixed, so that results do not depend on the number of threads


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
class Prepared:
    """A group made ready for rounding, the same for every rate.

    `targets`: the weights to be met, float32 [N, K]; `s_in`: float32 [K]; `s_out`: output vectors before the layer's
    scale, float32 [N]; `rotated`: R_out (targets / s_out / s_in) R_in^T over its rms, float32 [N', K'], and `rms` that
    root mean square, float64 []; `H_rotated`: the Hessian of the rotated inputs, `L` its factor, both float32 [K', K'].
    """

    targets: dict[str, Tensor]
    s_in: Tensor
    s_out: dict[str, Tensor]
    rotated: dict[str, Tensor]
    rms: dict[str, Tensor]
    H_rotated: Tensor
    L: Tensor


def prepare_group(
    weights: Mapping[str, Tensor],
    specs: Mapping[str, LayerSpec],
    statistics: GroupStatistics,
    settings: Settings,
    later: Later,
    team: Team,
) -> Prepared:
    """All that comes before rounding. Arguments and errors are those of `quantize_group`; the errors come later. The
    team shares the rows of the targets out."""
    names, H = list(weights), statistics.hessian
    label = ", ".join(names)
    _check_finite(label, weights, H, later)
    signs = torch.Generator().manual_seed(_seed(settings.seed, names[0]))
    targets = _corrected(weights, statistics, settings, later, team)
    s_in = input_vector(torch.cat(list(targets.values())), settings, signs)
    H_rotated = _rotate_both(H * s_in * s_in[:, None], specs[names[0]].in_blocks)
    L, failed = block_ldl(H_rotated, settings.damping)
    later.add(failed, lambda values: _check_factor(values, label, len(H), settings))
    ready = Prepared(targets, s_in, {}, {}, {}, H_rotated, L)
    for name, W in targets.items():
        sensitivity = statistics.sensitivity[name] if statistics.sensitivity else None
        scale = output_vector(W, sensitivity, settings, signs)
        R = _rotate_weight(W / s_in / scale[:, None], specs[name])
        rms = R.square().mean(dtype=torch.float64).sqrt()
        rms = torch.where(rms > 0, rms, 1.0)
        ready.s_out[name], ready.rotated[name], ready.rms[name] = scale, R / rms, rms
    return ready


def input_vector(W: Tensor, settings: Settings, signs: torch.Generator) -> Tensor:
    """s_in of a group, float32 [K] with values of its storage dtype: random signs and channel scales rms(W[:, j])**a.

    Dividing the columns of W by s and multiplying those of the input by it evens out W's columns (QuIP# appendix,
    "rescale"; here with the Hessian scaled to match). The geometric mean is 1.
    """
    scale = _rms(W, 0) ** settings.in_exponent
    return stored(scale / scale.log().mean().exp() * _signs(len(scale), signs, W.device), settings)


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
    weights: Mapping[str, Tensor], statistics: GroupStatistics, settings: Settings, later: Later, team: Team
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
        rows = team.rows(len(W))
        missing = settings.correction * times(W[rows], statistics.drift)
        if statistics.stream_drift is not None and len(weights) == 1:
            missing += settings.stream_correction * statistics.stream_drift[rows]
        targets[name] = team.whole(W[rows] + torch.cholesky_solve(missing.T, C).T, len(W))
    return targets


def proxy_losses(E: Tensor, H: Tensor) -> Tensor:
    """(E H E^T)_nn of every row, float64 [N], for E float32 [N, K] and H float32 [K, K]: their sum is tr(E H E^T)."""
    return (times(E, H) * E).sum(1, dtype=torch.float64)


def times(A: Tensor, B: Tensor) -> Tensor:
    """A @ B, by pieces of ROWS on the threads of a CPU."""
    if A.device.type != "cpu":
        return A @ B
    return torch.cat(list(ordered_map(lambda part: part @ B, A.split(ROWS), workers_for(A.device))))


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


def stored(x: Tensor, settings: Settings) -> Tensor:
    """x rounded to the dtype in which the scale vectors are stored, as float32."""
    return x.to(getattr(torch, settings.scale_dtype)).float()


def _signs(count: int, generator: torch.Generator, device: torch.device) -> Tensor:
    return upload((torch.randint(0, 2, (count,), generator=generator) * 2 - 1).float(), device)


def _seed(seed: int, name: str) -> int:
    """A seed of its own for every group, the same wherever and in whatever order it is computed."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:7], "little")
