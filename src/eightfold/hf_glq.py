"""transformers loads GLQ checkpoints, too: its weight conversions make eightfold's tensors as the files are read.

A converted model is an eightfold one in every respect: QuantLinear modules, and save_pretrained writes eightfold's
format. As in hf.py everything is checked before loading, because transformers reports what goes wrong in a conversion
in a table, not in a sentence.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from eightfold import glq
from eightfold.checkpoint import AUTO_MAP
from eightfold.format import MAX_STAGES, QUANT_METHOD, CheckpointError, QuantConfig, code_names
from eightfold.glq_tensors import code_leaf, ratio_leaf, sources, unpack
from eightfold.hf import EightfoldConfig, EightfoldQuantizer, bare_prefix, check_finite, replace_linears

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


class GlqConfig(QuantizationConfigMixin):
    """`quantization_config` of a GLQ checkpoint as it stands in config.json: only its files tell the rest."""

    def __init__(self, **section: Any) -> None:
        self.quant_method: Any = glq.QUANT_METHOD
        self.section = {"quant_method": glq.QUANT_METHOD} | section

    def to_dict(self) -> dict[str, Any]:
        """What config.json holds."""
        return dict(self.section)


class GlqQuantizer(EightfoldQuantizer):
    """Puts QuantLinear modules where the files have quantized layers, and makes their tensors from GLQ's."""

    quantization_config: Any  # GlqConfig; once the model is loaded, the EightfoldConfig that it came to

    def _prepare(self, model: PreTrainedModel, files: Sequence[str]) -> set[str]:
        section = self.quantization_config.section
        shards = _Shards(files)
        prefix = bare_prefix(model)
        inside = {name: code for name, code in shards.tensors.items() if name.startswith(prefix)}
        listed = section.get("layer_bpw")
        if prefix and isinstance(listed, dict):
            section = section | {"layer_bpw": {name: bits for name, bits in listed.items() if name.startswith(prefix)}}
        modules = {prefix + n: module for n, module in model.named_modules() if isinstance(module, nn.Linear)}
        layers = glq.quantized_layers(section, inside)
        linears = glq.linears(modules, layers, glq.accepts_zero_biases(section))
        self._quant = glq.quant_config(section, inside, shards.read, linears)
        biased = {name for name, spec in self._quant.layers.items() if spec.bias is not None}
        self._zeros = frozenset(name for name in biased if f"{name}.bias" not in inside)
        glq.check_codebook_file(Path(files[0]).parent, section)
        replace_linears(model, self._quant)
        _check_values(self._quant, shards)
        return set(shards.tensors) | {key for name in self._quant.layers for key in self._quant.tensors(name)}

    def get_weight_conversions(self) -> list[Any]:
        """GLQ's names of tensors, by their ends, to ours."""
        names = [[code_leaf(k, stage) for stage in ("e8p", "e81b", "e8shell")] for k in range(MAX_STAGES)]
        leaves = dict(zip(code_names(MAX_STAGES), names, strict=True))
        leaves["scale_in"] = ["SV"]
        # The ratios are in the modules already; this way they are no unexpected tensors.
        leaves["scale_out"] = ["SU", "Wscale", *(ratio_leaf(k) for k in range(1, MAX_STAGES))]
        return [
            WeightConverter([rf"\.{leaf}$" for leaf in own], f".{key}", [_Unpack(key, self._zeros)])
            for key, own in leaves.items()
        ]

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        super()._process_model_after_weight_loading(model, **kwargs)
        self.quantization_config = EightfoldConfig(**self._quant.to_dict())
        model.config.quantization_config = self.quantization_config
        model.config.auto_map = AUTO_MAP
        model.quantization_method = QUANT_METHOD  # pyright: ignore[reportArgumentType]
        # save_pretrained reverts conversions; what it gets is eightfold's and is to stay so.
        others = [each for each in model._weight_conversions if not _is_ours(each)]  # pyright: ignore
        model._weight_conversions = others  # pyright: ignore
        return model


class _Unpack(ConversionOps):
    """GLQ's tensors of one linear → ours called `key`, and the biases of zero that a user accepted."""

    def __init__(self, key: str, zeros: frozenset[str]) -> None:
        self.key, self.zeros = key, zeros

    def __deepcopy__(self, memo: Any) -> _Unpack:
        return self  # one converter a tensor: all may share this

    @torch.no_grad()
    def convert(
        self, input_dict: dict[str, Any], full_layer_name: str = "", model: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        name = full_layer_name.rpartition(".")[0]
        module = model.get_submodule(name)
        parts = {pattern[2:-1]: tensors[0] for pattern, tensors in input_dict.items()}
        made = {full_layer_name: unpack(name, self.key, module.spec, module.recipe, parts)}
        if self.key == "scale_out" and bare_prefix(model) + name in self.zeros:
            dtype, shape = module.tensor_specs["bias"]
            made[f"{name}.bias"] = torch.zeros(shape, dtype=dtype, device=made[full_layer_name].device)
        return made


class _Shards:
    """Tensors of safetensors files by name; the files stay open. Raises CheckpointError for one that is damaged."""

    def __init__(self, files: Sequence[str]) -> None:
        self.tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
        self._owners: dict[str, Any] = {}
        for file in files:
            try:
                shard = safe_open(file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{file}: not a whole safetensors file ({error})") from error
            for key in shard.keys():  # noqa: SIM118 (not a dict)
                part = shard.get_slice(key)
                self.tensors[key] = str(part.get_dtype()), tuple(part.get_shape())
                self._owners[key] = shard

    def read(self, name: str) -> Tensor:
        return self._owners[name].get_tensor(name)


def _check_values(config: QuantConfig, shards: _Shards) -> None:
    """Raise CheckpointError for what no header shows: signs that are none, scales that are not finite."""
    for name, spec in config.layers.items():
        recipe = config.recipe(name)
        made_of = sources(recipe.stages)
        odd = [key for key, stage in zip(made_of, recipe.stages, strict=False) if stage == "e8shell256"]
        for key in ("scale_in", "scale_out", *odd):
            unpack(name, key, spec, recipe, {leaf: shards.read(f"{name}.{leaf}") for leaf in made_of[key]})
        if f"{name}.bias" in shards.tensors:
            check_finite(f"{name}.bias", shards.read(f"{name}.bias"))


def _is_ours(conversion: Any) -> bool:
    return any(isinstance(operation, _Unpack) for operation in getattr(conversion, "operations", ()))


def register_glq(replace: bool = False) -> None:
    """Let eightfold load GLQ checkpoints. Where another package does, `replace` takes the name from it, else a
    warning says so and nothing changes."""
    there = AUTO_QUANTIZER_MAPPING.get(glq.QUANT_METHOD)
    if there is not None and there is not GlqQuantizer and not replace:
        logger.warning(
            "GLQ checkpoints (quant_method 'glq') are loaded by %s, which was registered before eightfold: call "
            "eightfold.hf_glq.register_glq(replace=True) to load them with eightfold, or convert them with "
            "`eightfold convert`",
            there.__module__,
        )
        return
    AUTO_QUANTIZER_MAPPING[glq.QUANT_METHOD] = GlqQuantizer  # pyright: ignore[reportArgumentType]
    AUTO_QUANTIZATION_CONFIG_MAPPING[glq.QUANT_METHOD] = GlqConfig  # pyright: ignore[reportArgumentType]


register_glq()
