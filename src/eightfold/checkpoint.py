"""Writing whole checkpoints out of a workspace, and checking what was written. Same inputs, same bytes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from eightfold.files import (
    TensorCode,
    measures,
    natural,
    nbytes,
    read_json,
    sync,
    to_json,
    write_tensors,
)
from eightfold.folder import ModelFolder
from eightfold.format import DTYPE_CODES, FORMAT_VERSION, CheckpointError, PackedWeight, QuantConfig, check_same
from eightfold.parallel import ordered_map
from eightfold.workspace import MANIFEST, Workspace

WRITERS = 4  # files written at once; several threads that write to one only wait for each other
SHARD_BYTES = 2 * 10**9  # of a file at most: an 8B model is two to four, which are written at once
# Files of the source that go along: what a tokenizer or generation needs, and the terms of use.
COPIED = ("tokenizer*", "vocab*", "merges.txt", "*.tiktoken", "*.jinja", "chat_template.json", "spiece.model")
COPIED += ("special_tokens_map.json", "added_tokens.json", "generation_config.json", "LICENSE*", "NOTICE*")
# Lets transformers load the folder with trust_remote_code=True and no import of this package.
CONFIG_CODE_NAME = "configuration_eightfold.py"
CONFIG_CODE = '''"""With this, transformers loads the model with trust_remote_code=True and no import."""

import eightfold  # registers the format; pip install eightfold
from transformers import AutoConfig, PreTrainedConfig


class Config(PreTrainedConfig):
    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        return AutoConfig.from_pretrained(*args, **kwargs | {"trust_remote_code": False})
'''
AUTO_MAP = {"AutoConfig": "configuration_eightfold.Config"}
# What a record may hold that differs from run to run; it stays in the working folder.
VOLATILE = ("seconds", "phases")


def assemble(
    workspace: Workspace,
    source: ModelFolder,
    config: QuantConfig,
    shard_bytes: int = SHARD_BYTES,
    texts: Mapping[str, str] | None = None,
) -> Path:
    """Make the whole checkpoint in the workspace and return its folder; `publish` puts it in place.

    Takes the quantized tensors from the workspace and all others, byte for byte, from `source`, as
    they are mapped to memory. `texts`: further files (a model card) by name. Raises CheckpointError naming a tensor
    that is missing, too many, or not as `config` says.
    """
    owners = _owners(workspace, config)

    def read(name: str) -> Tensor:
        if name not in owners:
            return source.mapped(name)
        with safe_open(owners[name], framework="pt") as file:
            return file.get_tensor(name)

    tensors = output_tensors(source, config)
    every = {"config.json": to_json(config_json(source, config)), CONFIG_CODE_NAME: CONFIG_CODE, **(texts or {})}
    return write_folder(workspace, source.path, tensors, read, every, shard_bytes)


def write_folder(
    workspace: Workspace,
    source: Path,
    tensors: Mapping[str, TensorCode],
    read: Callable[[str], Tensor],
    texts: Mapping[str, str],
    shard_bytes: int = SHARD_BYTES,
    manifest: bool = True,
) -> Path:
    """Make a checkpoint's folder in the workspace and return it: `tensors` from `read`, which threads call, one after
    the other for each of WRITERS files, the tokenizer and the like from the folder `source`, `texts`, a manifest."""
    out = workspace.path / "out"
    if out.exists():
        shutil.rmtree(out)
    out.mkdir()
    shards = plan_shards(tensors, shard_bytes)

    def write(file: str) -> dict[str, Any]:
        with open(out / file, "wb") as stream:
            return write_tensors(stream, {name: tensors[name] for name in shards[file]}, read)

    written = dict(zip(shards, ordered_map(write, shards, WRITERS), strict=True))
    if len(shards) > 1:
        places = {name: file for file, names in shards.items() for name in names}
        index = {"metadata": {"total_size": sum(map(nbytes, tensors.values()))}, "weight_map": places}
        (out / "model.safetensors.index.json").write_text(to_json(index, sort_keys=True), encoding="utf-8")
    for file in sorted({file for pattern in COPIED for file in source.glob(pattern) if file.is_file()}):
        shutil.copyfile(file, out / file.name)
    for name, text in texts.items():
        (out / name).write_text(text, encoding="utf-8")
    if manifest:
        others = sorted(file.name for file in out.iterdir() if file.name not in written)
        files = written | dict(zip(others, measures(out / name for name in others), strict=True))
        layers = [_without_volatile(record) for record in workspace.records()]
        content = {"format_version": FORMAT_VERSION, "files": dict(sorted(files.items())), "layers": layers}
        (out / MANIFEST).write_text(to_json(content), encoding="utf-8")
    for path in (*out.iterdir(), out, workspace.path):
        sync(path)
    return out


def output_tensors(source: ModelFolder, config: QuantConfig) -> dict[str, TensorCode]:
    """Name → (dtype, shape) of every tensor of the checkpoint, in the order in which shards are filled.

    Raises CheckpointError naming a layer whose weight or bias in `source` is not what `config` says.
    """
    tensors = {name: (info.dtype, info.shape) for name, info in source.tensors.items()}
    for layer, spec in config.layers.items():
        weight, bias = tensors.pop(f"{layer}.weight", None), tensors.pop(f"{layer}.bias", None)
        if weight is None and not source.config_json.get("tie_word_embeddings"):
            raise CheckpointError(f"{layer}.weight: expected this tensor in {source.path}, there is none")
        if weight is not None and weight[1] != (spec.out_features, spec.in_features):
            raise CheckpointError(f"{layer}.weight: {list(weight[1])} is not what the configuration says")
        announced = spec.bias and (DTYPE_CODES[getattr(torch, spec.bias)], (spec.out_features,))
        if bias != announced:
            raise CheckpointError(f"{layer}.bias: expected {announced}, came {bias}")
    for layer in config.layers:
        tensors |= _codes(config, layer)
    return {name: tensors[name] for name in sorted(tensors, key=natural)}


def plan_shards(tensors: Mapping[str, TensorCode], shard_bytes: int = SHARD_BYTES) -> dict[str, list[str]]:
    """File name → names of its tensors: at most `shard_bytes` a file, unless one tensor is larger."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, code in tensors.items():
        if shards[-1] and filled + nbytes(code) > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += nbytes(code)
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": names for i, names in enumerate(shards, 1)}


def config_json(source: ModelFolder, config: QuantConfig) -> dict[str, Any]:
    """config.json of the checkpoint: the source's with our section; a quantized head is no longer tied."""
    content = json.loads(json.dumps(source.config_json))
    heads = [layer for layer in config.layers if f"{layer}.weight" not in source.tensors or "head" in layer]
    for section in (content, content.get("text_config")):
        if heads and section and "tie_word_embeddings" in section:
            section["tie_word_embeddings"] = False
    if heads:
        content["tie_word_embeddings"] = False
    # Code that came with the source is for its own weights; the types here are transformers' own.
    return content | {"auto_map": AUTO_MAP, "quantization_config": config.to_dict()}


def read_packed(folder: ModelFolder, name: str) -> PackedWeight:
    """Layer `name` of an eightfold checkpoint, on the CPU. Raises CheckpointError naming what is wrong."""
    config = folder.quantization
    if config is None or name not in config.layers:
        raise CheckpointError(f"{folder.path}: {name!r} is not a quantized layer of it")
    expected = _codes(config, name)
    prefix = f"{name}."
    check_same(expected, {key: (t.dtype, t.shape) for key, t in folder.tensors.items() if key.startswith(prefix)})
    named = {key.removeprefix(prefix): folder.read(key) for key in expected}
    packed = PackedWeight.from_tensors(config.layers[name], config.recipe(name), named)
    packed.validate(name)
    return packed


def verify_files(path: str | Path) -> list[str]:
    """What differs between a checkpoint's files and its manifest, one sentence each; empty if all is well."""
    path = Path(path)
    if not (path / MANIFEST).is_file():
        return [f"{path}: it has no {MANIFEST}"]
    files = read_json(path / MANIFEST).get("files")
    if not isinstance(files, dict):
        return [f"{path / MANIFEST}: expected an object 'files', there is none"]
    there = [name for name in files if (path / name).is_file()]
    problems = [f"{name}: listed in {MANIFEST}, there is no such file" for name in files if name not in there]
    for name, came in zip(there, measures(path / name for name in there), strict=True):
        if came != files[name]:
            problems.append(f"{name}: expected {files[name]}, came {came}")
    weights = {file.name for file in path.glob("*.safetensors*")} - set(files)
    return problems + [f"{name}: not listed in {MANIFEST}" for name in sorted(weights)]


# --- files ------------------------------------------------------------------------------------------------


def _owners(workspace: Workspace, config: QuantConfig) -> dict[str, Path]:
    """Quantized tensor → file of the workspace. Raises CheckpointError unless they are those of `config`."""
    owners: dict[str, Path] = {}
    came: dict[str, TensorCode] = {}
    for index in workspace.finished():
        data = workspace.files(index)[0]
        with safe_open(data, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                part = file.get_slice(name)
                came[name] = str(part.get_dtype()), tuple(part.get_shape())
                owners[name] = data
    check_same({key: code for layer in config.layers for key, code in _codes(config, layer).items()}, came)
    return owners


def _codes(config: QuantConfig, layer: str) -> dict[str, TensorCode]:
    return {name: (DTYPE_CODES[dtype], shape) for name, (dtype, shape) in config.tensors(layer).items()}


def _without_volatile(record: Any) -> Any:
    if isinstance(record, dict):
        return {key: _without_volatile(value) for key, value in record.items() if key not in VOLATILE}
    return record
