"""The parameters of a quantized linear in vLLM while its tensors are loaded, and what became of them.

Layers that vLLM merges and that can lie in one tensor a stage use vLLM's own parameter classes, which cut and place
what they are given. All others (another codebook, rotation or padding beside each other; GLQ's tensors) use `Pieces`.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config
from vllm.model_executor.parameter import (
    BasevLLMParameter,
    ChannelQuantScaleParameter,
    PackedvLLMParameter,
    RowvLLMParameter,
)

from eightfold.format import CheckpointError, PackedWeight, code_names, layer_tensors
from eightfold.fused import Part, can_merge

_QKV = {"q": 0, "k": 1, "v": 2}

Loader = Callable[..., Any]


class InputScales(BasevLLMParameter):
    """scale_in of each of several merged parts, [parts, K]: they may be one linear only if all are equal."""


class Pieces(BasevLLMParameter):
    """Tensors of one name of several parts, of any dtype and shape: uint8 [bytes]. `regions`: part → where it lies."""

    regions: dict[int, Region]

    def part(self, number: int) -> Tensor:
        """The tensor of one part, in place."""
        region = self.regions[number]
        piece = self.data[region.start : region.start + region.nbytes]
        return piece.view(region.dtype).view(region.shape)


@dataclass(frozen=True, slots=True)
class Region:
    """A tensor in a `Pieces`; `start` in bytes, a multiple of 16; `pieces`: among how many its rows were cut."""

    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: int = 1

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


class Loading:
    """What has come of the tensors of a linear made of `parts`. `loader`: the layer's own, which vLLM gave."""

    def __init__(self, parts: Sequence[Part], loader: Loader) -> None:
        self.parts, self._loader = parts, loader
        self._came: set[tuple[str, int]] = set()
        self._expected: dict[tuple[str, int], str] = {}

    def expect(self, name: str, number: int) -> None:
        """A tensor `name` of a part must come."""
        self._expected[name, number] = f"{self.parts[number].layer.name}.{name}"

    def loader(self, name: str, load: Loader | None = None) -> Loader:
        """What vLLM is to call with (parameter, tensor[, shard]): `load`, or the layer's own loader."""

        def remember(parameter: Any, tensor: Tensor, *shard: Any) -> None:
            (load or self._loader)(parameter, tensor, *shard)
            self._came.update((name, number) for number in self.numbers(*shard))

        return remember

    def numbers(self, shard: Any = None) -> list[int]:
        """The parts that a shard of vLLM means: "q", 1, (0, 1), or None for all."""
        if shard is None or len(self.parts) == 1:
            return list(range(len(self.parts)))
        return [
            _QKV[each] if isinstance(each, str) else each for each in (shard if isinstance(shard, tuple) else [shard])
        ]

    def check(self) -> None:
        """Raise CheckpointError naming a tensor that never came."""
        missing = [name for key, name in self._expected.items() if key not in self._came]
        if missing:
            raise CheckpointError(
                f"{missing[0]}: expected this tensor in the files, it was not loaded ({len(missing)} such)"
            )

    def fill(self, layer: nn.Module) -> None:
        """Random codes, weights of a usual size, signs as input scales: for `load_format="dummy"`. Parts have the same
        signs, as quantized ones have, since only then are they one linear."""
        for name, parameter in layer.named_parameters(recurse=False):
            pieces = isinstance(parameter, Pieces)
            tensors = [parameter.part(n) for n in parameter.regions] if pieces else [parameter.data]
            if name.startswith("qweight"):
                parameter.data.view(torch.uint8).random_(0, 256)
            elif name == "scale_in":
                signs = _signs(tensors[0].view(-1, self.parts[0].spec.in_features)[0])
                for tensor in tensors:
                    tensor.copy_(signs)
            elif name == "scale_out":
                for tensor in tensors:
                    tensor.copy_(_signs(tensor) * self.parts[0].spec.in_features ** -0.5)

    def take(self, layer: nn.Module) -> list[PackedWeight]:
        """The weights of the parts, in order, without a copy; the layer keeps none of their parameters."""
        loaded = self.remove(layer)
        result, row, start = [], 0, 0
        for number, part in enumerate(self.parts):
            named = {}
            for name in layer_tensors("", part.spec, part.layer.recipe, torch.float16):
                tensor = loaded[name]
                if isinstance(tensor, Pieces):
                    named[name] = tensor.part(number)
                elif isinstance(tensor, InputScales):
                    named[name] = tensor.data[number]
                elif name == "scale_in":
                    named[name] = tensor.data
                else:
                    first, count = (
                        (start, part.spec.out_features) if name == "scale_out" else (row, part.spec.padded_out)
                    )
                    named[name] = tensor.data[first : first + count]
            row, start = row + part.spec.padded_out, start + part.spec.out_features
            result.append(PackedWeight.from_tensors(part.spec, part.layer.recipe, named))
        return result

    def remove(self, layer: nn.Module) -> dict[str, nn.Parameter]:
        """Take what was loaded from the layer: by name."""
        loaded = {name: layer.get_parameter(name) for name, _ in self._expected}
        for name in loaded:
            delattr(layer, name)
        return loaded


def make_parameters(
    parts: Sequence[Part], scale: torch.dtype, loading: Loading, whole: bool
) -> dict[str, nn.Parameter]:
    """By name, the parameters for the tensors of `parts`, `scale` the dtype of scale vectors; `loading` expects them.
    `whole`: there is one part, and vLLM's classes may copy its rows, padding included."""
    for number, part in enumerate(parts):
        for name in layer_tensors("", part.spec, part.layer.recipe, scale):
            loading.expect(name, number)
    if not (whole or can_merge(parts)):
        return _pieces(parts, scale, loading)
    spec, recipe = parts[0].spec, parts[0].layer.recipe
    rows = sum(part.spec.padded_out for part in parts)
    outputs = sum(part.spec.out_features for part in parts)
    made: dict[str, nn.Parameter] = {}
    for name, dtype in zip(code_names(len(recipe.stages)), recipe.code_dtypes, strict=True):
        made[name] = PackedvLLMParameter(
            data=torch.empty(rows, spec.padded_in // 8, dtype=dtype),
            input_dim=1,
            output_dim=0,
            packed_dim=1,
            packed_factor=8,
            weight_loader=loading.loader(name),
        )
    made["scale_out"] = ChannelQuantScaleParameter(
        data=torch.empty(outputs, dtype=scale), output_dim=0, weight_loader=loading.loader("scale_out")
    )
    if len(parts) == 1:
        made["scale_in"] = RowvLLMParameter(
            data=torch.empty(spec.in_features, dtype=scale), input_dim=0, weight_loader=loading.loader("scale_in")
        )
    else:
        data = torch.empty(len(parts), spec.in_features, dtype=scale)
        made["scale_in"] = InputScales(data=data, weight_loader=loading.loader("scale_in", _to_rows(loading)))
    return made


def pieces(name: str, tensors: dict[int, tuple[torch.dtype, tuple[int, ...], int]], loading: Loading) -> Pieces:
    """A parameter for the tensors called `name` of some parts: part → (dtype, shape, number of pieces of its rows)."""
    regions: dict[int, Region] = {}
    end = 0
    for number, (dtype, shape, cut) in tensors.items():
        regions[number] = region = Region(end, dtype, shape, cut)
        end += -(-region.nbytes // 16) * 16
    parameter = Pieces(
        data=torch.empty(end, dtype=torch.uint8), weight_loader=loading.loader(name, _to_regions(loading))
    )
    parameter.regions = regions
    return parameter


def is_dummy() -> bool:
    """Whether vLLM makes up the weights in place of loading them."""
    return get_current_vllm_config().load_config.load_format == "dummy"


def _signs(tensor: Tensor) -> Tensor:
    return torch.randint_like(tensor, 2) * 2 - 1


def _pieces(parts: Sequence[Part], scale: torch.dtype, loading: Loading) -> dict[str, nn.Parameter]:
    by_name: dict[str, dict[int, tuple[torch.dtype, tuple[int, ...], int]]] = {}
    for number, part in enumerate(parts):
        for name, (dtype, shape) in layer_tensors("", part.spec, part.layer.recipe, scale).items():
            cut = 1 if name == "scale_in" else part.pieces
            by_name.setdefault(name, {})[number] = dtype, shape, cut
    return {name: pieces(name, tensors, loading) for name, tensors in by_name.items()}


def _to_rows(loading: Loading) -> Loader:
    def load(parameter: InputScales, tensor: Tensor, *shard: Any) -> None:
        for number in loading.numbers(*shard):
            parameter.data[number].copy_(tensor)

    return load


def _to_regions(loading: Loading) -> Loader:
    def load(parameter: Pieces, tensor: Tensor, *shard: Any) -> None:
        for number in loading.numbers(*shard):
            region = parameter.regions[number]
            own = parameter.part(number)
            if region.pieces > 1:
                rank = parameter.tp_rank // (parameter.tp_size // region.pieces)
                tensor = tensor.narrow(0, rank * len(own), len(own))
            if tensor.dtype != own.dtype or tensor.numel() != own.numel():
                raise CheckpointError(
                    f"{loading.parts[number].layer.name}: expected {own.dtype} {list(own.shape)}, came {tensor.dtype} "
                    f"{list(tensor.shape)}"
                )
            own.copy_(tensor.reshape(own.shape))

    return load
