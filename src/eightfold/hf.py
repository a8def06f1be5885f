"""transformers (5.5 and later) loads and saves eightfold checkpoints through what this module registers.

Everything is checked before a weight is read: transformers itself would fill a missing tensor with random
numbers and, where a quantizer is present, accept one of another shape.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from eightfold.checkpoint import AUTO_MAP, CONFIG_CODE, CONFIG_CODE_NAME
from eightfold.format import DTYPE_CODES, QUANT_METHOD, CheckpointError, QuantConfig, check_same
from eightfold.linear import QuantLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class EightfoldConfig(QuantizationConfigMixin):
    """`quantization_config` as transformers carries it around: `.quant` is the checked QuantConfig."""

    def __init__(self, **section: Any) -> None:
        self.quant_method: Any = QUANT_METHOD
        self.quant = QuantConfig.from_dict({"quant_method": QUANT_METHOD} | section)

    def to_dict(self) -> dict[str, Any]:
        """What config.json holds."""
        return self.quant.to_dict()

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        return iter(self.to_dict().items())


class EightfoldQuantizer(HfQuantizer):
    """Puts QuantLinear modules where config.json lists quantized layers, and checks that all weights arrive."""

    requires_calibration = True  # for transformers: it cannot quantize on the fly
    quantization_config: EightfoldConfig

    def __init__(self, quantization_config: EightfoldConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._renamed: set[str] = set()
        self._dtype = torch.float32

    def _process_model_before_weight_loading(
        self,
        model: PreTrainedModel,
        dtype: torch.dtype | None = None,
        checkpoint_files: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> PreTrainedModel:
        if not checkpoint_files or not all(str(file).endswith(".safetensors") for file in checkpoint_files):
            raise CheckpointError(f"expected the weights in safetensors files, came {checkpoint_files}")
        there = self._prepare(model, checkpoint_files)
        self._dtype = dtype or model.dtype
        self._renamed = _not_by_name(model, there)
        return model

    def _prepare(self, model: PreTrainedModel, files: Sequence[str]) -> set[str]:
        """Put the quantized modules in place and check their tensors in `files`. Names of all tensors that come."""
        config = self.quantization_config.quant
        modules = replace_linears(model, config)
        _check_files(config, modules, files)
        there: set[str] = set()
        for file in files:
            with safe_open(file, framework="pt") as shard:
                there.update(shard.keys())
        return there

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        lost = [name for name in sorted(self._renamed) if not _was_loaded(model, name)]
        if lost:
            raise CheckpointError(f"{lost[0]}: expected this tensor in the files, there is none ({len(lost)} such)")
        for name, module in model.named_modules():
            if not isinstance(module, QuantLinear):
                continue
            for key, parameter in module.named_parameters():
                parameter.requires_grad_(False)
                _check_loaded(f"{name}.{key}", parameter, module)
            if not any(parameter.is_meta for parameter in module.parameters()):
                module.prepare(self._dtype)
        # A copy that save_pretrained makes needs the file that config.json's auto_map names.
        model.save_pretrained = MethodType(_save_pretrained, model)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


def replace_linears(model: PreTrainedModel, config: QuantConfig) -> dict[str, str]:
    """Put QuantLinear modules in place. Layer name in the checkpoint → module name in `model`, maybe the bare base."""
    prefix = bare_prefix(model)
    modules = {name: name.removeprefix(prefix) for name in config.layers if name.startswith(prefix)}
    for name, module_name in modules.items():
        _replace(model, name, module_name, config)
    return modules


def bare_prefix(model: PreTrainedModel) -> str:
    """What names in the checkpoint have before those in `model`: "model." for the bare base of AutoModel, or ""."""
    return "" if hasattr(model, model.base_model_prefix) else f"{model.base_model_prefix}."


def _replace(model: PreTrainedModel, name: str, module_name: str, config: QuantConfig) -> None:
    spec = config.layers[name]
    try:
        old = model.get_submodule(module_name)
    except AttributeError as error:
        raise CheckpointError(f"{name}: the configuration lists it, the model has no such module") from error
    if not isinstance(old, torch.nn.Linear):
        raise CheckpointError(f"{name}: expected a Linear in the model, it is a {type(old).__name__}")
    announced = (spec.out_features, spec.in_features, spec.bias is not None)
    if (old.out_features, old.in_features, old.bias is not None) != announced:
        raise CheckpointError(f"{name}: the configuration says {spec}, the model has {old}")
    if f"{module_name}.weight" in model.all_tied_weights_keys:
        raise CheckpointError(f"{name}: a quantized layer cannot be tied: tie_word_embeddings must be false")
    module = QuantLinear(spec, config.recipe(name), config.scale, "meta")
    module.train(old.training)
    model.set_submodule(module_name, module)


def _check_files(config: QuantConfig, modules: Mapping[str, str], files: Sequence[str]) -> None:
    """All tensors of the quantized layers are there and finite, and nothing else is under their names."""
    expected = {key: spec for name in modules for key, spec in config.tensors(name).items()}
    came: dict[str, tuple[str, tuple[int, ...]]] = {}
    for file in files:
        with safe_open(file, framework="pt") as shard:
            for key in shard.keys():  # noqa: SIM118 (not a dict)
                if key.rpartition(".")[0] not in modules:
                    continue
                part = shard.get_slice(key)
                came[key] = (str(part.get_dtype()), tuple(part.get_shape()))
                if came[key][0].startswith(("F", "BF")):
                    check_finite(key, shard.get_tensor(key))
    check_same({key: (DTYPE_CODES[dtype], shape) for key, (dtype, shape) in expected.items()}, came)


def check_finite(name: str, tensor: Tensor) -> None:
    if not bool(torch.isfinite(tensor).all()):
        raise CheckpointError(f"{name}: expected finite values, came some that are not")


def _not_by_name(model: PreTrainedModel, there: set[str]) -> set[str]:
    """Tensors of `model` that do not come under that name: transformers renames some, the rest is missing."""
    there = there | {name.removeprefix(bare_prefix(model)) for name in there}
    may_miss = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
    wanted = set(model.state_dict()) - set(model.all_tied_weights_keys) - there
    return {name for name in wanted if not any(pattern.search(name) for pattern in may_miss)}


def _was_loaded(model: PreTrainedModel, name: str) -> bool:
    # transformers marks what it read from a file, and does not mark what it drew at random.
    module, _, leaf = name.rpartition(".")
    return bool(getattr(getattr(model.get_submodule(module), leaf), "_is_hf_initialized", False))


def _check_loaded(name: str, parameter: Tensor, module: QuantLinear) -> None:
    expected = module.tensor_specs[name.rpartition(".")[2]]
    came = (parameter.dtype, tuple(parameter.shape))
    if came != expected:
        raise CheckpointError(f"{name}: expected {expected}, loading made it {came}")


def _save_pretrained(model: PreTrainedModel, save_directory: Any, **kwargs: Any) -> None:
    """PreTrainedModel.save_pretrained, and the file that lets a copy be loaded without an import."""
    folder = Path(save_directory)
    folder.mkdir(parents=True, exist_ok=True)
    if getattr(model.config, "auto_map", None) == AUTO_MAP:
        (folder / CONFIG_CODE_NAME).write_text(CONFIG_CODE, encoding="utf-8")
    type(model).save_pretrained(model, folder, **kwargs)


if QUANT_METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
    register_quantization_config(QUANT_METHOD)(EightfoldConfig)
if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
    register_quantizer(QUANT_METHOD)(EightfoldQuantizer)
