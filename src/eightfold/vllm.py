"""vLLM loads and serves eightfold checkpoints through what this module defines (vllm_plugin.py registers it).

A linear of vLLM, which may be several layers of the checkpoint side by side and may be cut among devices, runs as one
`eightfold::linear`. All that belongs to a checkpoint reaches the operator as a tensor, and only shapes and rotation
blocks as integers, so that a compiled graph that vLLM kept serves the next checkpoint with the next one's values.
docs/serving.md; written against vLLM 0.25.
"""

# pyright: reportMissingImports=false, reportIncompatibleMethodOverride=false

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from eightfold import fused
from eightfold.folder import ModelFolder
from eightfold.format import DTYPE_CODES, QUANT_METHOD, CheckpointError, PackedWeight, QuantConfig, check_same
from eightfold.fused import Layer, Part
from eightfold.linear import QuantLinear
from eightfold.vllm_parameters import Loading, is_dummy, make_parameters


class EightfoldConfig(QuantizationConfig):
    """`quantization_config` as vLLM carries it around. `layers`: what it lists, by the names of vLLM's modules."""

    def __init__(self, config: QuantConfig) -> None:
        super().__init__()
        self.layers = fused.layers_of(config)
        self.tp_max = config.tp_max
        self.scale_dtype = config.scale

    def get_name(self) -> str:
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> EightfoldConfig:
        return cls(QuantConfig.from_dict(config))

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Compare a local folder's files with the configuration, so that errors name what is in them."""
        path = Path(model_name)
        if path.is_dir() and any(path.glob("*.safetensors")):
            check_files(ModelFolder(path))

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        self.layers = hf_to_vllm_mapper.apply_dict(self.layers)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        if isinstance(layer, RoutedExperts):
            raise CheckpointError(
                f"{prefix}: mixture-of-experts models cannot be served from eightfold checkpoints yet"
            )
        if not isinstance(layer, LinearBase | VocabParallelEmbedding):
            return None
        # Some models give their embeddings no name.
        found = fused.members(self.layers, prefix, self.packed_modules_mapping) if prefix else None
        if found is None:
            return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None
        if isinstance(layer, VocabParallelEmbedding) and not isinstance(layer, ParallelLMHead):
            raise CheckpointError(f"{prefix}: expected a linear, embeddings cannot be quantized")
        return self.method(found)

    def method(self, layers: list[Layer]) -> EightfoldLinearMethod:
        """What makes and runs a linear of `layers`."""
        return EightfoldLinearMethod(self, layers)


# One call of the operator: names of the codes; of ratios, scale_in, scale_out; input blocks, output blocks.
Call = tuple[list[str], tuple[str, str, str], list[int], list[int]]


@register_weight_loader_v2_supported_method
class EightfoldLinearMethod(LinearMethodBase):
    """A linear of vLLM made of `layers`. Where they share codebooks and input rotation it is one call of the operator,
    else one for each that differs, one after the other."""

    def __init__(self, config: EightfoldConfig, layers: list[Layer]) -> None:
        self.config, self.layers = config, layers
        self.parts: list[Part] = []
        self.missing = 0  # outputs that no operator makes: padding of the vocabulary, where the head is rotated
        self.calls: list[Call] = []

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **attributes: Any,
    ) -> None:
        outputs, head = sum(output_partition_sizes), isinstance(layer, ParallelLMHead)
        tp_max = self.config.tp_max
        if head:
            self.parts = [fused.cut_vocabulary(self.layers[0], outputs)]
        else:
            parts = fused.cut_outputs(self.layers, output_partition_sizes, output_size // outputs, tp_max)
            self.parts = [fused.cut_inputs(part, input_size_per_partition, tp_max) for part in parts]
        self.missing = outputs - sum(part.spec.out_features for part in self.parts)
        self.dtype, self.dummy = params_dtype, is_dummy()
        self.loading = Loading(self.parts, attributes["weight_loader"])
        # vLLM's classes know no padding, but where they copy the whole tensor.
        whole = len(output_partition_sizes) == 1 and not head
        for name, parameter in self.parameters(whole).items():
            layer.register_parameter(name, parameter)

    def parameters(self, whole: bool) -> dict[str, nn.Parameter]:
        """What the files' tensors are loaded into. `whole`: vLLM neither merges nor pads the outputs."""
        return make_parameters(self.parts, self.config.scale_dtype, self.loading, whole)

    def tie_weights(self, layer: nn.Module, embed_tokens: nn.Module) -> nn.Module:
        raise CheckpointError(
            f"{self.layers[0].name}: a quantized layer cannot be tied: tie_word_embeddings must be false"
        )

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Check what came, merge what can be merged, compile and load kernels: no call does so later."""
        if self.dummy:
            self.loading.fill(layer)
        else:
            self.loading.check()
        self._check_bias(layer)
        weights = self.weights(layer)
        for part, weight in zip(self.parts, weights, strict=True):
            weight.validate(part.layer.name)
        self.calls = [self._install(layer, i, weight) for i, weight in enumerate(merged(weights))]

    def weights(self, layer: nn.Module) -> list[PackedWeight]:
        """What was loaded, a weight for each part; `layer` keeps none of it."""
        return self.loading.take(layer)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., K] → [..., N] in the same dtype."""
        inside = bias if len(self.calls) == 1 and not self.missing else None
        outputs = []
        for codes, (ratios, scale_in, scale_out), in_blocks, out_blocks in self.calls:
            weight = [getattr(layer, name) for name in codes]
            vectors = getattr(layer, ratios), getattr(layer, scale_in), getattr(layer, scale_out)
            outputs.append(torch.ops.eightfold.linear(x, weight, *vectors, inside, in_blocks, out_blocks))
        y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
        if self.missing:
            y = nn.functional.pad(y, (0, self.missing))
        return y if bias is None or inside is not None else y + bias

    def _install(self, layer: nn.Module, number: int, packed: PackedWeight) -> Call:
        """Register the tensors of one call of the operator."""
        module = QuantLinear.from_packed(packed)
        if packed.scale_in.is_cuda and not module.prepare(self.dtype).runs_kernels:
            raise CheckpointError(
                f"{self.layers[0].name}: its rotation blocks or codebooks have no kernels: not served"
            )
        codes, ratios, scale_in, scale_out, in_blocks, out_blocks = module.arguments()
        start = f"part{number}_" if number else ""
        names = [f"{start}qweight{k or ''}" for k in range(len(codes))]
        others = f"{start}ratios", f"{start}scale_in", f"{start}scale_out"
        tensors = [*codes, ratios.to(scale_in.device), scale_in, scale_out]
        for name, tensor in zip((*names, *others), tensors, strict=True):
            layer.register_parameter(name, nn.Parameter(tensor.detach(), requires_grad=False))
        return names, others, in_blocks, out_blocks

    def _check_bias(self, layer: nn.Module) -> None:
        """vLLM says nothing of a bias in the files that its layer has no place for."""
        has = getattr(layer, "bias", None) is not None or bool(getattr(layer, "has_bias", False))
        for part in self.parts:
            if (part.layer.spec.bias is not None) != has:
                which = "has none here" if part.layer.spec.bias else "has one here"
                raise CheckpointError(f"{part.layer.name}: bias {part.layer.spec.bias}, but vLLM's model {which}")


def merged(parts: list[PackedWeight]) -> list[PackedWeight]:
    """Neighbours that share codebooks, ratios, input blocks and input scales put together, row after row."""
    result: list[PackedWeight] = []
    for part in parts:
        last = result[-1] if result else None
        if last is None or not _alike(last, part):
            result.append(part)
            continue
        a, b = last.spec, part.spec
        spec = fused.joined(a, b)
        codes = tuple(torch.cat(pair) for pair in zip(last.codes, part.codes, strict=True))
        scale_out = torch.cat([last.scale_out, part.scale_out])
        result[-1] = PackedWeight(spec, last.recipe, codes, last.scale_in, scale_out)
    return result


def _alike(a: PackedWeight, b: PackedWeight) -> bool:
    same = a.recipe == b.recipe and a.spec.in_blocks == b.spec.in_blocks and torch.equal(a.scale_in, b.scale_in)
    return same and a.spec.padded_out == a.spec.out_features


def check_files(folder: ModelFolder) -> None:
    """Raise CheckpointError naming a tensor of a quantized layer that the files lack or have otherwise."""
    config = folder.quantization
    if config is None:
        return
    expected = {name: code for layer in config.layers for name, code in config.tensors(layer).items()}
    came: Mapping[str, Any] = {
        name: (info.dtype, info.shape)
        for name, info in folder.tensors.items()
        if name.rpartition(".")[0] in config.layers
    }
    check_same({name: (DTYPE_CODES[dtype], shape) for name, (dtype, shape) in expected.items()}, came)
