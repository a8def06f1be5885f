"""vLLM serves GLQ checkpoints, too: their tensors are loaded as they are and become eightfold's before the first call.

GLQ draws the signs of every linear by themselves, so q, k and v have different ones; parts whose signs differ run one
after the other, where eightfold's own checkpoints take one call. Only tensor-parallel size 1: its blocks fill a side.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.linear import register_weight_loader_v2_supported_method
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from eightfold import glq
from eightfold.files import TensorCode
from eightfold.folder import local_folder
from eightfold.format import DTYPE_CODES, MAX_STAGES, STAGES, CheckpointError, PackedWeight
from eightfold.fused import Layer
from eightfold.glq_folder import GlqFolder
from eightfold.glq_tensors import code_leaf, expected, ratio_leaf, unpack_linear
from eightfold.vllm import EightfoldConfig, EightfoldLinearMethod
from eightfold.vllm_parameters import pieces

_DTYPES = {code: dtype for dtype, code in DTYPE_CODES.items()} | {"I64": torch.int64}


class GlqConfig(EightfoldConfig):
    """`quantization_config` of a GLQ checkpoint: only its files tell the rest."""

    # Stages that fill up a model's, with a ratio of 0, are none; where a layer has the stage, it takes the tensor.
    _ignore_unexpected_suffixes = QuantizationConfig._ignore_unexpected_suffixes + tuple(
        f".{leaf}"
        for k in range(1, MAX_STAGES)
        for leaf in (ratio_leaf(k), *dict.fromkeys(code_leaf(k, stage) for stage in STAGES))
    )

    def __init__(self) -> None:
        QuantizationConfig.__init__(self)
        self.layers: dict[str, Layer] = {}
        self.zero_biases: set[str] = set()

    def get_name(self) -> str:
        return glq.QUANT_METHOD

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> GlqConfig:
        return cls()

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Read the headers of the files, and the few scalars that are ratios."""
        folder = GlqFolder(local_folder(model_name))
        assert folder.quantization is not None
        EightfoldConfig.__init__(self, folder.quantization)
        biased = [name for name, layer in self.layers.items() if layer.spec.bias is not None]
        self.zero_biases = {name for name in biased if f"{name}.bias" not in folder.stored}

    def method(self, layers: list[Layer]) -> GlqLinearMethod:
        return GlqLinearMethod(self, layers)


@register_weight_loader_v2_supported_method
class GlqLinearMethod(EightfoldLinearMethod):
    """A linear of vLLM made of layers of a GLQ checkpoint."""

    config: GlqConfig

    def parameters(self, whole: bool) -> dict[str, nn.Parameter]:
        if self.dummy:
            raise CheckpointError(
                f"{self.layers[0].name}: weights of a GLQ checkpoint cannot be made up (dummy format)"
            )
        by_leaf: dict[str, dict[int, tuple[torch.dtype, tuple[int, ...], int]]] = {}
        for number, part in enumerate(self.parts):
            tensors: dict[str, TensorCode] = expected(
                part.layer.recipe.stages, part.spec.padded_out, part.spec.padded_in
            )
            for leaf, (code, shape) in tensors.items():
                self.loading.expect(leaf, number)
                by_leaf.setdefault(leaf, {})[number] = _DTYPES[code], shape, 1
        return {leaf: pieces(leaf, tensors, self.loading) for leaf, tensors in by_leaf.items()}

    def weights(self, layer: nn.Module) -> list[PackedWeight]:
        loaded: dict[str, Any] = self.loading.remove(layer)
        result, row = [], 0
        for number, part in enumerate(self.parts):
            leaves = {leaf: tensor.part(number) for leaf, tensor in loaded.items() if number in tensor.regions}
            result.append(unpack_linear(part.layer.name, part.spec, part.layer.recipe, leaves))
            rows = slice(row, row + part.spec.out_features)
            if part.layer.name in self.config.zero_biases:
                layer.get_parameter("bias").data[rows].zero_()
            row = rows.stop
        return result
