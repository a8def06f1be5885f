"""Reading a Hugging Face model folder: its config, and its tensors one at a time from safetensors files.

Nothing here ever holds more than the tensor asked for.
"""

from __future__ import annotations

import hashlib
import json
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from eightfold.format import CheckpointError, QuantConfig, bias_bytes, code_bytes, vector_bytes
from eightfold.parallel import readers

if TYPE_CHECKING:
    from transformers import PretrainedConfig

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DOWNLOADED = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "configuration_*.py"]
DOWNLOADED += ["*.toml", "*.md", "*.tiktoken", "LICENSE*", "NOTICE*"]
DTYPE_BYTES = (
    dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"), 1)
    | dict.fromkeys(("U16", "I16", "F16", "BF16"), 2)
    | dict.fromkeys(("U32", "I32", "F32"), 4)
    | dict.fromkeys(("U64", "I64", "F64"), 8)
)

MOST_PINNED = 1 << 29  # bytes of a tensor on its way to a GPU


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies: `dtype` in the spelling of safetensors ("BF16"), `nbytes` of its data."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


class ModelFolder:
    """A folder with config.json and safetensors weights (one file, or shards with an index).

    `source` is a folder, or the id of a repository on the Hugging Face hub, which is downloaded to its cache.
    Raises CheckpointError for a folder that is not a whole model: no config, no weights, weights that are
    pickles, a truncated file, an index that names what is not there, another quantization method than ours.
    """

    def __init__(self, source: str | Path) -> None:
        self.path = local_folder(source)
        self.config_json: dict[str, Any] = read_config(self.path)
        self.tensors: dict[str, TensorInfo] = _tensors(self.path)
        self._digest: str | None = None
        self.stored = self.tensors  # what the files hold, where `tensors` is a view of it
        section = self.config_json.get("quantization_config")
        self.quantization: QuantConfig | None = None if section is None else self._configuration(section)

    def _configuration(self, section: Any) -> QuantConfig:
        """The checked `quantization_config`."""
        method = section.get("quant_method") if isinstance(section, dict) else None
        if method != "eightfold":
            raise CheckpointError(
                f"{self.path}: the weights are already quantized (quant_method {method!r}); "
                f"give the folder of the original model"
            )
        return QuantConfig.from_dict(section)

    def layer_bytes(self, name: str) -> int:
        """Bytes that the tensors of quantized layer `name` take in the files, as the format says."""
        assert self.quantization is not None
        spec, scale = self.quantization.layers[name], self.quantization.scale_dtype
        return code_bytes(spec) + vector_bytes(spec, scale) + bias_bytes(spec)

    @cached_property
    def config(self) -> PretrainedConfig:
        """The configuration as transformers reads it; code that lies in the folder is never run."""
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(self.path, trust_remote_code=False)

    def read(self, name: str, device: str | torch.device = "cpu") -> torch.Tensor:
        """The tensor called `name`, in its own dtype, in memory of its own on `device`."""
        return self._read_stored(name, device)

    def mapped(self, name: str) -> torch.Tensor:
        """The stored tensor called `name` without a copy: a view of the mapped file, not to be written to."""
        if name not in self.stored:
            raise CheckpointError(f"{self.path}: expected a tensor {name!r}, there is none")
        file = self.stored[name].file
        try:
            with safe_open(file, framework="pt") as shard:
                return shard.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file}: cannot read tensor {name!r}: {error}") from error

    def _read_stored(self, name: str, device: str | torch.device = "cpu") -> torch.Tensor:
        tensor, kind = self.mapped(name), torch.device(device).type
        if kind == "cpu":
            return tensor.clone()
        if kind != "cuda" or tensor.nbytes > MOST_PINNED:
            return tensor.to(device)
        # Through pinned memory, which PyTorch keeps: threads can then read several at once.
        return tensor.pin_memory().to(device, non_blocking=True)

    def sha256(self) -> str:
        """Hash of the content: config.json and every weight file, whatever the files are called."""
        if self._digest is None:
            files = [self.path / "config.json", *sorted({info.file for info in self.tensors.values()})]
            whole = hashlib.sha256()
            with ThreadPoolExecutor(readers()) as pool:  # not ordered_map: PyTorch has no part in it
                for digest in pool.map(_file_digest, files):
                    whole.update(digest)
            self._digest = whole.hexdigest()
        return self._digest


def local_folder(source: str | Path) -> Path:
    """The folder itself, or the local copy of a repository on the hub. Raises CheckpointError."""
    return Path(source) if Path(source).is_dir() else _download(str(source))


def read_config(path: Path) -> dict[str, Any]:
    """The object in config.json. Raises CheckpointError."""
    return _read_json(path / "config.json")


def _download(source: str) -> Path:
    """The local copy of a hub repository. Only weights that are safetensors are fetched."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    if source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise CheckpointError(f"{source}: expected a model folder, there is no such folder")
    try:
        return Path(huggingface_hub.snapshot_download(source, allow_patterns=DOWNLOADED))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"{source}: neither a folder nor a model that the hub would give us ({reason})"
        ) from error


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{file.parent}: expected a model folder, it has no {file.name}") from error
    except ValueError as error:
        raise CheckpointError(f"{file}: expected JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: expected a JSON object, came {type(content).__name__}")
    return content


def _tensors(path: Path) -> dict[str, TensorInfo]:
    """Every tensor of the folder by name, in the order of the files; the index wins over a single file."""
    if not (path / INDEX).exists():
        if not (path / SINGLE).exists():
            pickles = [file.name for suffix in ("*.bin", "*.pt", "*.pth") for file in sorted(path.glob(suffix))]
            hint = f"; its {pickles[0]} is a pickle, convert it to safetensors first" if pickles else ""
            raise CheckpointError(f"{path}: expected {SINGLE} or {INDEX}, there is neither{hint}")
        return _header(path / SINGLE)
    weight_map = _read_json(path / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path / INDEX}: expected an object 'weight_map', there is none")
    found: dict[str, TensorInfo] = {}
    for file in sorted(set(weight_map.values())):
        if not isinstance(file, str) or Path(file).name != file:
            raise CheckpointError(f"{path / INDEX}: expected the name of a file beside it, came {file!r}")
        if not (path / file).exists():
            raise CheckpointError(f"{path}: the index names {file}, there is no such file")
        header = _header(path / file)
        found |= {name: info for name, info in header.items() if weight_map.get(name) == file}
    if missing := sorted(set(weight_map) - set(found)):
        raise CheckpointError(f"{path}: its files lack tensors of the index: {', '.join(missing[:5])}")
    return found


def _header(file: Path) -> dict[str, TensorInfo]:
    """The tensors of one file. safe_open refuses a file whose size is not what its header adds up to."""
    found: dict[str, TensorInfo] = {}
    try:
        with safe_open(file, framework="pt") as shard:
            for name in shard.keys():  # noqa: SIM118 (not a dict)
                part = shard.get_slice(name)
                dtype, shape = str(part.get_dtype()), tuple(part.get_shape())
                if dtype not in DTYPE_BYTES:
                    raise CheckpointError(f"{file}: tensor {name!r} has the unknown dtype {dtype}")
                found[name] = TensorInfo(file, dtype, shape, math.prod(shape) * DTYPE_BYTES[dtype])
    except SafetensorError as error:
        raise CheckpointError(f"{file}: not a whole safetensors file ({error})") from error
    return found


def _file_digest(file: Path) -> bytes:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()
