"""GLQ checkpoints to eightfold's format and back, two tensors in memory for each file being written."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from eightfold.checkpoint import AUTO_MAP, CONFIG_CODE, CONFIG_CODE_NAME, SHARD_BYTES, write_folder
from eightfold.files import TensorCode, natural, nbytes, to_json
from eightfold.folder import ModelFolder
from eightfold.format import CheckpointError
from eightfold.glq import section_for
from eightfold.glq_folder import GlqFolder
from eightfold.glq_tensors import expected, pack, targets
from eightfold.workspace import Workspace, publish

Phase = Callable[[str, int], None]
Advance = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Converted:
    """`path` of the checkpoint, its quantized `layers`, the bytes of its `tensors`."""

    path: Path
    layers: int
    tensor_bytes: int


@dataclass(frozen=True, slots=True)
class _Target:
    """What is to be written: tensors and where they come from, config.json and other texts by file name."""

    tensors: Mapping[str, TensorCode]
    read: Callable[[str], Tensor]
    texts: Mapping[str, str]
    shard_bytes: int
    manifest: bool


def to_eightfold(
    source: str | Path,
    out: str | Path,
    base: str | None = None,
    zero_biases: bool = False,
    shard_bytes: int = SHARD_BYTES,
    phase: Phase = lambda name, steps: None,
    advance: Advance = lambda steps: None,
) -> Converted:
    """Write the GLQ checkpoint `source` (folder or hub id) as an eightfold one, with the same dense weights.

    `base`: the original model, for biases, which GLQ drops; `zero_biases`: do without them; `phase` and `advance` hear
    how it goes on. Raises CheckpointError for what cannot be read, ValueError where `out` is in the way.
    """
    folder = GlqFolder(source, ModelFolder(base) if base else None, zero_biases)
    assert folder.quantization is not None
    tensors = {name: (info.dtype, info.shape) for name, info in folder.tensors.items()}
    config = folder.config_json | {"auto_map": AUTO_MAP, "quantization_config": folder.quantization.to_dict()}
    texts = {"config.json": to_json(config), CONFIG_CODE_NAME: CONFIG_CODE}
    return _write(folder, out, _Target(tensors, folder.read, texts, shard_bytes, manifest=True), phase, advance)


def to_glq(
    source: str | Path,
    out: str | Path,
    phase: Phase = lambda name, steps: None,
    advance: Advance = lambda steps: None,
) -> Converted:
    """Write the eightfold checkpoint `source` as a GLQ one, in one file, as GLQ wants it.

    Raises CheckpointError naming the first layer that GLQ's format cannot hold, and why, before anything is written.
    """
    folder = ModelFolder(source)
    config = folder.quantization
    if config is None:
        raise CheckpointError(f"{source}: expected an eightfold checkpoint, its config.json has no quantization_config")
    section = section_for(config)
    owners: dict[str, str] = {}  # GLQ's tensor → its layer
    tensors: dict[str, TensorCode] = {}
    for name, spec in config.layers.items():
        _check_bias(folder, name)
        recipe = config.recipe(name)
        for leaf in ("Wscale", "SU", "SV"):  # raises for vectors that GLQ cannot hold
            _pack(folder, name, leaf)
        own = expected(recipe.stages, spec.padded_out, spec.padded_in)
        tensors |= {f"{name}.{leaf}": code for leaf, code in own.items()}
        owners |= {f"{name}.{leaf}": name for leaf in own}
    others = {k: (t.dtype, t.shape) for k, t in folder.tensors.items() if k.rpartition(".")[0] not in config.layers}

    def read(key: str) -> Tensor:
        if key not in owners:
            return folder.read(key)
        return _pack(folder, owners[key], key.removeprefix(f"{owners[key]}."))

    content = {k: v for k, v in folder.config_json.items() if k != "auto_map"} | {"quantization_config": section}
    target = _Target(tensors | others, read, {"config.json": to_json(content)}, sys.maxsize, manifest=False)
    return _write(folder, out, target, phase, advance)


def _pack(folder: ModelFolder, layer: str, leaf: str) -> Tensor:
    config = folder.quantization
    assert config is not None
    recipe = config.recipe(layer)
    parts = {key: folder.read(f"{layer}.{key}") for key in targets(recipe.stages)[leaf]}
    return pack(layer, leaf, config.layers[layer], recipe, parts)


def _check_bias(folder: ModelFolder, layer: str) -> None:
    assert folder.quantization is not None
    if folder.quantization.layers[layer].bias is not None and bool(folder.read(f"{layer}.bias").any()):
        raise CheckpointError(f"{layer}.bias: expected no bias or zeros, which is all that GLQ has, came another")


def _write(folder: ModelFolder, out: str | Path, target: _Target, phase: Phase, advance: Advance) -> Converted:
    def read(name: str) -> Tensor:
        tensor = target.read(name)
        advance(1)
        return tensor

    tensors = {name: target.tensors[name] for name in sorted(target.tensors, key=natural)}
    phase("tensors", len(tensors))
    with closing(Workspace(out, _fingerprint(folder, target))) as workspace:
        try:
            write_folder(
                workspace, folder.path, tensors, read, target.texts, target.shard_bytes, manifest=target.manifest
            )
        except BaseException:
            shutil.rmtree(workspace.path)  # nothing in it is worth keeping
            raise
        path = publish(workspace)
    assert folder.quantization is not None
    return Converted(path, len(folder.quantization.layers), sum(map(nbytes, tensors.values())))


def _fingerprint(folder: ModelFolder, target: _Target) -> dict[str, Any]:
    return {"convert": str(folder.path.resolve()), "shard_bytes": target.shard_bytes, "manifest": target.manifest}
