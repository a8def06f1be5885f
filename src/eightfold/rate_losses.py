"""What each group of linears would cost the model at each rate: measured with the quantizer, on its Hessian.

An error E of a linear adds to the loss of a token, to second order and with outputs taken as independent,

    sum_n s_n (E H E^T)_nn / 2,      s_n the mean squared gradient at output n (sensitivity.py), H the Hessian,

in nats, since the labels of those gradients are drawn from the model: that is the KL divergence from the original.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from eightfold.format import BITS, LayerSpec
from eightfold.loading import loaded_layers
from eightfold.model import Decoder, check_finite, finite_samples
from eightfold.moments import products
from eightfold.parallel import ordered_map, single_threaded, workers_for
from eightfold.prepare import prepare_group, times
from eightfold.quantize import GroupStatistics, Settings, gaussian_scale, ldlq_rows, recipe
from eightfold.queued import Later
from eightfold.rates import GroupLosses
from eightfold.team import Team

ROWS = 64  # rows of a linear that are quantized at every rate

POSITIONS = 128  # positions whose logits are held at once

Advance = Callable[[int], None]


@torch.no_grad()
def measure_losses(
    decoder: Decoder,
    windows: Tensor,
    sensitivity: Mapping[str, Tensor],
    specs: Mapping[str, LayerSpec],
    settings: Settings,
    advance: Advance,
) -> list[GroupLosses]:
    """The losses of every group of the linears in `specs`, in order: one walk over the original model.

    windows: long [S, T]; `sensitivity`: of the linears of the layers, from these windows (`output_sensitivity`).
    `advance` is told of every layer. The number of threads changes nothing.
    """
    workers, found = workers_for(decoder.device), []
    hidden = list(ordered_map(decoder.prologue, windows, workers))
    decoder.release()  # the embedding is not needed in memory while the layers are
    for i, layer in enumerate(loaded_layers(decoder, range(len(decoder.layer_names)))):
        name = decoder.layer_names[i]
        groups = [tuple(n for n in group if n in specs) for group in decoder.groups(i, layer, hidden[0])]
        groups = [group for group in groups if group]
        walk = _Inputs(decoder, i, layer, groups)
        hessians, hidden = walk.run(hidden, workers)
        for group in groups:
            linears = {n: cast(nn.Linear, layer.get_submodule(n.removeprefix(f"{name}."))) for n in group}
            weights = {n: linear.weight.float() for n, linear in linears.items()}
            H = hessians.pop(group[0]) / windows.numel()
            statistics = GroupStatistics(H, sensitivity={n: sensitivity[n] for n in group})
            found.append(GroupLosses(group, group_losses(weights, specs, statistics, settings)))
        advance(1)
    if head := [n for n in specs if decoder.linear_shapes()[n].layer_index is None]:
        found.append(_head_losses(decoder, head[0], hidden, specs, settings))
        advance(1)
    return found


class _Inputs:
    """Forwards of layer `i` that also sum x x^T of every group's input, float32 [K, K], by the group's first linear."""

    def __init__(self, decoder: Decoder, i: int, layer: nn.Module, groups: list[tuple[str, ...]]) -> None:
        self.decoder, self.i, self.layer = decoder, i, layer
        self._here = threading.local()
        for name, *_ in groups:
            linear = layer.get_submodule(name.removeprefix(f"{decoder.layer_names[i]}."))
            linear.register_forward_pre_hook(_hook(name, self._here))

    def run(self, hidden: list[Tensor], workers: int) -> tuple[dict[str, Tensor], list[Tensor]]:
        """Sums over all samples, in their order, and the layer's outputs."""
        sums: dict[str, Tensor] = {}
        after = []
        for squares, out in ordered_map(self._one, enumerate(hidden), workers):
            for name, square in squares.items():
                sums[name] = sums[name].add_(square) if name in sums else square
            after.append(out)
        return sums, after

    def _one(self, job: tuple[int, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        self._here.squares = squares = {}
        out = self.decoder.call(self.i, self.layer, job[1])
        check_finite(finite_samples(out).tolist(), self.decoder.layer_names[self.i], job[0])
        return squares, out


def _hook(name: str, here: threading.local) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    """Keeps the products in `here.squares`. It knows no layer: a circle would keep the layers' weights in memory."""

    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0].flatten(0, -2)
        here.squares[name] = products(x, x)

    return hook


def _head_losses(
    decoder: Decoder, name: str, hidden: list[Tensor], specs: Mapping[str, LayerSpec], settings: Settings
) -> GroupLosses:
    """The head's: the expected squared gradient of the loss at logit n is p_n (1 - p_n), summed over positions."""
    K = specs[name].in_features
    H, squares = torch.zeros(K, K, device=decoder.device), torch.zeros(specs[name].out_features, device=decoder.device)
    for states in hidden:
        x = decoder.head_input(name, states).flatten(0, -2).float()
        H += x.T @ x
        for part in states.split(POSITIONS, 1):
            p = decoder.epilogue(part)[0].softmax(-1)
            squares += (p - p * p).sum(0)
    tokens = sum(states.shape[1] for states in hidden)
    statistics = GroupStatistics(H / tokens, sensitivity={name: squares / tokens})
    weights = {name: decoder.weight(name).float()}
    return GroupLosses((name,), group_losses(weights, specs, statistics, settings))


@single_threaded()  # but for what goes through ordered_map: a sum over two threads is rounded differently
def group_losses(
    weights: Mapping[str, Tensor],
    specs: Mapping[str, LayerSpec],
    statistics: GroupStatistics,
    settings: Settings,
    rates: Iterable[int] = BITS,
    rows: int = ROWS,
) -> dict[int, float]:
    """Loss in nats a token of quantizing a group at each of `rates`; the bits of `specs` do not matter.

    weights: float32 [N_i, K]; `statistics.sensitivity` must be there. E comes from LDLQ of `rows` evenly spaced rows of
    each rotated linear, at the scale that suits a Gaussian source, with the best scale for every row after: a
    rotation spreads the error evenly over the outputs it mixes, so these rows speak for all.
    """
    if statistics.sensitivity is None:
        raise ValueError("expected the outputs' sensitivity, came none; give sensitivity samples")
    later = Later(statistics.hessian.device)
    ready = prepare_group(weights, specs, statistics, settings, later, Team(alone=True))
    later.settle()
    samples = [R[:: -(-len(R) // rows)] for R in ready.rotated.values()]
    W = torch.cat(samples)
    WH = times(W, ready.H_rotated)
    energy = (WH * W).sum(1)
    factors = [
        0.5 * float(ready.rms[name] ** 2 * (s.to(W.device) * ready.s_out[name] ** 2).sum(dtype=torch.float64))
        for name, s in ((name, statistics.sensitivity[name]) for name in ready.rotated)
    ]

    def loss(bits: int) -> float:
        book = recipe(bits, settings.codebook)
        _, W_hat = ldlq_rows(W * gaussian_scale(book, settings), ready.L, book)
        own = (times(W_hat, ready.H_rotated) * W_hat).sum(1).clamp_min(torch.finfo(torch.float32).tiny)
        left = (energy - (WH * W_hat).sum(1).square() / own).clamp_min(0).double()
        means = [float(part.mean()) for part in left.split([len(R) for R in samples])]
        return sum(factor * mean for factor, mean in zip(factors, means, strict=True))

    every = list(rates)
    return dict(zip(every, ordered_map(loss, every, workers_for(W.device)), strict=True))
