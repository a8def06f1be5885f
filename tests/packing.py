"""Quantized layers and checkpoints made of random codes: for tests of all that comes after quantizing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from eightfold.checkpoint import SHARD_BYTES, assemble
from eightfold.folder import ModelFolder
from eightfold.format import LayerSpec, PackedWeight, QuantConfig
from eightfold.quantize import recipe
from eightfold.rotation import layout_blocks
from eightfold.workspace import Workspace, publish

DTYPE_NAMES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}
LINEARS = (
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
    "qkv_proj",
    "gate_up_proj",
)


def spec(out_features: int, in_features: int, bits: int, bias: str | None = None, rotate_out: bool = True) -> LayerSpec:
    out_blocks = layout_blocks(out_features, "pow2-sum", 16) if rotate_out else (1,) * out_features
    return LayerSpec(out_features, in_features, bits, out_blocks, layout_blocks(in_features, "pow2-sum", 64), bias)


def random_packed(
    layer: LayerSpec, seed: int = 0, scale: torch.dtype = torch.float16, family: str = "e8p"
) -> PackedWeight:
    """A layer of random codes whose weights are of about the usual size."""
    rng = torch.Generator().manual_seed(seed)
    stages = recipe(layer.bits, family)
    rows = (layer.padded_out, layer.padded_in // 8)
    codes = []
    for book in stages.codebooks:
        codes.append(torch.randint(0, 1 << book.bits, rows, generator=rng).to(book.dtype))

    def vector(size: int, about: float) -> torch.Tensor:
        signs = torch.randint(0, 2, (size,), generator=rng) * 2 - 1
        return (signs * about * (0.5 + torch.rand(size, generator=rng))).to(scale)

    scale_in, scale_out = vector(layer.in_features, 1), vector(layer.out_features, layer.in_features**-0.5)
    bias = None
    if layer.bias:
        bias = torch.randn(layer.out_features, generator=rng).to(getattr(torch, layer.bias))
    return PackedWeight(layer, stages, tuple(codes), scale_in, scale_out, bias)


def config_for(source: ModelFolder, bits: Sequence[int] = (2, 3), head: bool = False, **more: Any) -> QuantConfig:
    """A config that quantizes each linear of the decoder layers, rates in turn, and the head on demand."""
    layers: dict[str, LayerSpec] = {}
    for name, info in source.tensors.items():
        layer = name.removesuffix(".weight")
        if layer.rpartition(".")[2] not in LINEARS or not name.endswith(".weight"):
            continue
        bias = source.tensors.get(f"{layer}.bias")
        rate = bits[len(layers) % len(bits)]
        layers[layer] = spec(*info.shape, rate, bias and DTYPE_NAMES[bias.dtype])
    if head:
        shape = source.tensors["model.embed_tokens.weight"].shape
        layers["lm_head"] = spec(*shape, bits[0], rotate_out=False)
    used = {layer.bits for layer in layers.values()}
    return QuantConfig(layers, {b: recipe(b) for b in used}, provenance={"seed": 1}, **more)


def fill(workspace: Workspace, config: QuantConfig, parts: int = 2) -> None:
    """Save what is not saved yet of random layers, in `parts` steps."""
    names = list(config.layers)
    for index in range(len(workspace.finished()), parts):
        tensors: dict[str, torch.Tensor] = {}
        for name in names[index::parts]:
            packed = random_packed(config.layers[name], names.index(name), config.scale)
            tensors |= packed.tensors(name)
        workspace.save_layer(index, tensors, {"layers": names[index::parts], "seconds": index})


def write_checkpoint(
    source: Path,
    target: Path,
    fingerprint: Mapping[str, Any] | None = None,
    shard_bytes: int = SHARD_BYTES,
    **config: Any,
) -> Path:
    """An eightfold checkpoint of random codes in `target`, all else from the model folder `source`."""
    folder = ModelFolder(source)
    quant = config_for(folder, **config)
    with Workspace(target, fingerprint or {"seed": 1}) as workspace:
        fill(workspace, quant)
        assemble(workspace, folder, quant, shard_bytes)
        return publish(workspace)
