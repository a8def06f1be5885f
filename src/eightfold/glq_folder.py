"""A GLQ folder read as the eightfold checkpoint that it stands for: same configuration type, same tensor names, tensor
by tensor, so that whatever reads the one reads the other."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from eightfold import glq
from eightfold.files import TensorCode, nbytes
from eightfold.folder import ModelFolder, TensorInfo, local_folder, read_config
from eightfold.format import DTYPE_CODES, CheckpointError, QuantConfig
from eightfold.glq_tensors import expected, sources, unpack
from eightfold.skeleton import skeleton

_DTYPE_NAMES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}


class GlqFolder(ModelFolder):
    """`stored` are GLQ's tensors, `tensors` and `read` give eightfold's.

    Biases, which GLQ drops, come from the model folder `base`, or are zeros with `zero_biases` (or if the
    configuration says so). Raises CheckpointError for a folder that is no GLQ checkpoint that we can read, for
    biases that come from nowhere, and for a `base` that is not the original.
    """

    def __init__(self, source: str | Path, base: ModelFolder | None = None, zero_biases: bool = False) -> None:
        self._base, self._zero = base, zero_biases
        super().__init__(source)

    def _configuration(self, section: Any) -> QuantConfig:
        if not isinstance(section, dict) or section.get("quant_method") != glq.QUANT_METHOD:
            raise CheckpointError(f"{self.path}: expected a GLQ checkpoint (quant_method 'glq')")
        codes = {name: (info.dtype, info.shape) for name, info in self.stored.items()}
        config = glq.quant_config(section, codes, self._read_stored, self._linears(section, codes))
        glq.check_codebook_file(self.path, section)
        self.tensors = {k: v for k, v in self.stored.items() if k.rpartition(".")[0] not in config.layers}
        for layer in config.layers:
            for name, (dtype, shape) in config.tensors(layer).items():
                code = DTYPE_CODES[dtype], shape
                self.tensors[name] = TensorInfo(self.stored[f"{layer}.SU"].file, *code, nbytes(code))
        return config

    def layer_bytes(self, name: str) -> int:
        """Bytes that the tensors of quantized layer `name` take in the files, as GLQ lays them out."""
        assert self.quantization is not None
        spec = self.quantization.layers[name]
        codes = expected(self.quantization.recipe(name).stages, spec.padded_out, spec.padded_in)
        bias = self.stored[f"{name}.bias"].nbytes if f"{name}.bias" in self.stored else 0
        return sum(map(nbytes, codes.values())) + bias

    def read(self, name: str, device: str | torch.device = "cpu") -> Tensor:
        """The tensor that eightfold calls `name`, in memory of its own on `device`."""
        layer, _, key = name.rpartition(".")
        if self.quantization is None or layer not in self.quantization.layers:
            return self._read_stored(name, device)
        spec, recipe = self.quantization.layers[layer], self.quantization.recipe(layer)
        if key == "bias" and spec.bias is not None:
            return self._bias(layer, spec.out_features, spec.bias).to(device)
        leaves = sources(recipe.stages).get(key)
        if leaves is None:
            raise CheckpointError(f"{self.path}: expected a tensor {name!r}, there is none")
        parts = {leaf: self._read_stored(f"{layer}.{leaf}", device) for leaf in leaves}
        return unpack(layer, key, spec, recipe, parts)

    def _bias(self, layer: str, size: int, dtype: str) -> Tensor:
        if f"{layer}.bias" in self.stored:
            return self._read_stored(f"{layer}.bias")
        if self._base is not None:
            return self._base.read(f"{layer}.bias")
        return torch.zeros(size, dtype=getattr(torch, dtype))

    def _linears(self, section: Mapping[str, Any], codes: Mapping[str, TensorCode]) -> dict[str, glq.Linear]:
        """Every linear of the model; the quantized ones with the biases that they will have."""
        modules = {
            name: module
            for name, module in skeleton(self.config, torch.float32).named_modules()
            if isinstance(module, nn.Linear)
        }
        layers = glq.quantized_layers(section, codes)
        zero = glq.accepts_zero_biases(section) or self._zero
        base = self._base
        if base is None:
            return glq.linears(modules, layers, zero)
        _check_base(base, self, list(layers))
        return glq.linears(modules, layers, zero, lambda name: _base_bias(base, name, modules[name].out_features))


def open_folder(source: str | Path, zero_biases: bool = False) -> ModelFolder:
    """A model folder, or a GLQ one as eightfold sees it. Raises CheckpointError as either does."""
    path = local_folder(source)
    return GlqFolder(path, zero_biases=zero_biases) if is_glq(path) else ModelFolder(path)


def is_glq(path: Path) -> bool:
    """Whether the config.json of a folder says GLQ. Raises CheckpointError where that cannot be read."""
    section = read_config(path).get("quantization_config")
    return isinstance(section, dict) and section.get("quant_method") == glq.QUANT_METHOD


def _check_base(base: ModelFolder, folder: GlqFolder, quantized: list[str]) -> None:
    """What GLQ leaves as it is tells whether `base` is the original: the vectors, norms above all, are compared."""
    if base.quantization is not None:
        raise CheckpointError(f"{base.path}: expected the original model, this one is quantized")
    if missing := [name for name in quantized if f"{name}.weight" not in base.tensors]:
        raise CheckpointError(f"{base.path}: expected the original model, it has no {missing[0]}.weight")
    for name, info in folder.stored.items():
        if len(info.shape) != 1 or name.rpartition(".")[0] in quantized:
            continue
        if name not in base.tensors or not torch.equal(base.read(name), folder._read_stored(name)):
            raise CheckpointError(f"{base.path}: expected the original model, its {name} is another one")


def _base_bias(base: ModelFolder, name: str, size: int) -> str:
    info = base.tensors.get(f"{name}.bias")
    if info is None or info.dtype not in _DTYPE_NAMES or info.shape != (size,):
        raise CheckpointError(f"{base.path}: expected a tensor {name}.bias of {size} floats, there is none")
    return _DTYPE_NAMES[info.dtype]
