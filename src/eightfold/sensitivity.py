"""How much the loss minds an error at each output of each linear: its mean squared gradient there.

One forward of the original model that keeps the hidden states between layers, then one backward, layer by layer, each
layer's forward done again for its gradient: one layer's weights in memory at a time. The labels are drawn from the
model's own predictions, so this is the diagonal, on the output side, of the Fisher information (as in YAQA and
GuidedQuant, which use more of it; here it only sets the output channels' scales).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from eightfold.activations import Activations
from eightfold.loading import loaded_layers
from eightfold.model import Decoder, check_finite, finite_samples
from eightfold.parallel import ordered_map, workers_for
from eightfold.queued import Later
from eightfold.team import Team

POSITIONS = 128  # positions whose logits are held at once

Advance = Callable[[int], None]


def output_sensitivity(
    decoder: Decoder, windows: Tensor, seed: int, advance: Advance, team: Team, on_host: bool = False
) -> dict[str, Tensor]:
    """Mean squared gradients of the loss at the outputs of every linear of the layers, float32 [N] on the decoder's
    device, by name.

    windows: long [S, T]. `advance` is told of every layer pass done over all windows (2 * layers + 1 of them). The same
    windows and seed give the same bits, whatever the number of threads or of processes, which share the windows.
    `on_host`: hidden states wait in the host's memory. Raises ValueError, naming layer and window, for hidden states
    that are not finite.
    """
    device, layers = decoder.device, range(len(decoder.layer_names))
    workers, own, later = workers_for(device), team.share(len(windows)), Later(device)

    def kept(batches: Iterable[Tensor]) -> Activations:
        return Activations(batches, device, on_host)

    hidden = [kept(decoder.prologue(windows[w]) for w in own)]
    decoder.release()  # the embedding is not needed in memory while the layers are, nor is the head after it
    for i, layer in zip(layers, loaded_layers(decoder, layers), strict=True):
        before = hidden[-1]

        def forward(n: int, i: int = i, layer: nn.Module = layer, before: Activations = before) -> Tensor:
            return decoder.call(i, layer, before[n]).detach()

        hidden.append(kept(ordered_map(forward, range(len(own)), workers)))
        for w, out in zip(own, hidden[-1], strict=True):
            later.add(finite_samples(out), partial(check_finite, layer=decoder.layer_names[i], first=w))
        later.settle()
        advance(1)
    last = hidden[-1]
    top = lambda n: _loss_gradient(decoder, last[n], seed + own[n])  # noqa: E731
    gradients = kept(ordered_map(top, range(len(own)), workers))
    decoder.release()
    advance(1)
    squares: dict[str, list[Tensor]] = {}  # of this process's windows
    for i, layer in zip(reversed(layers), loaded_layers(decoder, reversed(layers)), strict=True):
        hidden.pop()
        backward = _Backward(decoder, i, layer)
        job = lambda n, run=backward, x=hidden[-1], g=gradients: run(x[n], g[n])  # noqa: E731
        found: list[dict[str, Tensor]] = []

        def below(results: Iterable[tuple[Tensor, dict[str, Tensor]]], found: list[Any] = found) -> Iterator[Tensor]:
            for gradient, squares in results:
                found.append(squares)
                yield gradient

        gradients = kept(below(ordered_map(job, range(len(own)), workers)))
        for each in found:
            for name, square in each.items():
                squares.setdefault(name, []).append(square)
        advance(1)
    return _means(squares, windows.numel(), device, team)


def _means(squares: dict[str, list[Tensor]], tokens: int, device: torch.device, team: Team) -> dict[str, Tensor]:
    """Sums over the windows of all processes, in the order of the windows, over the tokens."""
    if team.size > 1:
        every = team.gather([{name: [s.cpu() for s in own] for name, own in squares.items()}])
        squares = {
            name: [s.to(device) for own in every for s in own.get(name, [])]
            for name in dict.fromkeys(name for own in every for name in own)
        }
    return {name: torch.stack(each).sum(0) / tokens for name, each in squares.items()}


def _loss_gradient(decoder: Decoder, hidden: Tensor, seed: int) -> Tensor:
    """Gradient [1, T, D] of the summed cross entropy against labels drawn from the model's predictions."""
    random = torch.Generator(hidden.device).manual_seed(seed)
    parts = []
    for chunk in hidden.split(POSITIONS, 1):
        x = chunk.detach().requires_grad_()
        with torch.enable_grad():
            logits = decoder.epilogue(x)[0]
            labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=random)[:, 0]
            loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
            parts.append(torch.autograd.grad(loss, x)[0])
    return torch.cat(parts, 1)


class _Backward:
    """The backward of one layer for one window: gradient at its input, squared gradients at its linears' outputs."""

    def __init__(self, decoder: Decoder, i: int, layer: nn.Module) -> None:
        self.decoder, self.i, self.layer = decoder, i, layer
        self.here = threading.local()
        for name, module in layer.named_modules():
            if isinstance(module, nn.Linear):
                module.register_forward_hook(_hook(f"{decoder.layer_names[i]}.{name}", self.here))

    def __call__(self, hidden: Tensor, gradient: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        device = self.decoder.device
        self.here.squares = squares = {}
        x = hidden.detach().requires_grad_()
        # Attention's fused backward adds in no fixed order on a GPU; the plain one does.
        fixed = nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH) if device.type == "cuda" else nullcontext()
        with torch.enable_grad(), fixed:
            y = self.decoder.call(self.i, self.layer, x)
            (below,) = torch.autograd.grad(y, x, gradient)
        return below, squares


def _hook(name: str, here: threading.local) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    """Keeps the squares in `here.squares`. It knows no layer: a circle would keep the layers' weights in memory."""

    def hook(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
        squares = here.squares
        output.register_hook(lambda g: squares.update({name: g.float().square().flatten(0, -2).sum(0)}))

    return hook
