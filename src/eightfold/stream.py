"""The inputs of a linear, and the residual stream that its output is added to.

Most decoder layers end their branches with a linear (o_proj, down_proj) whose output is added to the stream. What the
layers before made wrong in the stream can be made good there, if one knows where it is: found by moving the output and
looking for the first module whose input moves just as much. No architecture is known by name.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor, nn

from eightfold.model import Decoder


class _Enough(Exception):
    """Ends the forward of a layer once everything is seen."""


class Tap:
    """Reads, in the forwards of layer `i`, the input of linear `name` and the stream that it adds to.

    `receiver`: name in the layer of the module that first gets the sum, "" for the layer's own output, None where there
    is no such thing (`find_receiver`). May be called from several threads at once.
    """

    def __init__(self, decoder: Decoder, i: int, name: str, receiver: str | None) -> None:
        self.decoder, self.i, self.receiver = decoder, i, receiver
        self.linear = name.removeprefix(f"{decoder.layer_names[i]}.")
        self._here = threading.local()

    def attach(self, layer: nn.Module) -> list[Any]:
        """Put the hooks into `layer`; the handles returned take them out again."""
        handles = [layer.get_submodule(self.linear).register_forward_hook(self._linear_hook)]
        if self.receiver:
            handles.append(
                layer.get_submodule(self.receiver).register_forward_pre_hook(self._receiver_hook, with_kwargs=True)
            )
        return handles

    def __call__(self, layer: nn.Module, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """Input [B, T, K] and stream [B, T, N] (None without a receiver) for hidden states [B, T, D]."""
        here = self._here
        here.x = here.y = here.sum = None
        try:
            out = self.decoder.call(self.i, layer, hidden)
            here.sum = out if self.receiver == "" else None
        except _Enough:
            pass
        if here.x is None or (self.receiver is not None and here.sum is None):
            raise ValueError(
                f"{self.decoder.layer_names[self.i]}.{self.linear}: its forward took another way this time"
            )
        assert here.y is not None
        return here.x, None if here.sum is None else here.sum - here.y

    def _linear_hook(self, _: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        self._here.x, self._here.y = args[0], output
        if self.receiver is None:
            raise _Enough

    def _receiver_hook(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._here.y is not None:
            self._here.sum = args[0] if args else next(iter(kwargs.values()))
            raise _Enough


def find_receiver(decoder: Decoder, i: int, layer: nn.Module, hidden: Tensor, name: str) -> str | None:
    """The module of layer `i` (name in the layer, "" for its output) that first gets what linear `name` is added to.

    None if the linear's output has another width than the hidden states or nothing moves with it one to one.
    """
    linear = layer.get_submodule(name.removeprefix(f"{decoder.layer_names[i]}."))
    before = _inputs(decoder, i, layer, hidden, linear, None)
    output = before[linear]
    if output is None or output.shape != hidden.shape:
        return None
    random = torch.Generator(hidden.device).manual_seed(0)  # millions of numbers: long on a CPU while a GPU waits
    shift = torch.randn(hidden.shape, generator=random, device=hidden.device).to(hidden.dtype)
    shift *= hidden.float().square().mean().sqrt().to(hidden.dtype)
    after = _inputs(decoder, i, layer, hidden, linear, shift)
    names = {module: n for n, module in layer.named_modules()}
    for module, x in before.items():
        moved = after.get(module)
        if module is linear or x is None or moved is None or x.shape != shift.shape or torch.equal(x, output):
            continue  # a module that gets the output alone (a dropout, a norm) comes before the sum
        error = (moved - x - shift).float().square().mean() / shift.float().square().mean()
        if float(error) < 0.02:  # bfloat16 rounds a sum that is far larger than the shift
            return names[module]
    return None


def _inputs(
    decoder: Decoder, i: int, layer: nn.Module, hidden: Tensor, linear: nn.Module, shift: Tensor | None
) -> dict[nn.Module, Tensor | None]:
    """First inputs of all modules called after `linear`, in that order, then the layer's output; `linear`: its output.

    With `shift`, that is added to the output of `linear`.
    """
    seen: dict[nn.Module, Tensor | None] = {}

    def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if linear in seen and module not in seen:
            first = args[0] if args else next(iter(kwargs.values()), None)
            seen[module] = first if isinstance(first, Tensor) else None

    def move(module: nn.Module, _: tuple[Any, ...], output: Tensor) -> Tensor:
        moved = output if shift is None else output + shift
        seen[module] = moved
        return moved

    inner = [module for module in layer.modules() if module is not layer]
    handles: list[Any] = [module.register_forward_pre_hook(see, with_kwargs=True) for module in inner]
    handles.append(linear.register_forward_hook(move))
    try:
        seen[layer] = decoder.call(i, layer, hidden)
    finally:
        for handle in handles:
            handle.remove()
    return seen
