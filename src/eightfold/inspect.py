"""What a checkpoint holds, from its config.json, its safetensors headers and its manifest: no weight is read."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from eightfold.files import read_json
from eightfold.folder import ModelFolder
from eightfold.format import CheckpointError, LayerSpec, QuantConfig
from eightfold.glq_folder import open_folder
from eightfold.rotation import run_lengths
from eightfold.workspace import MANIFEST


@dataclass(frozen=True, slots=True)
class LayerFacts:
    """One quantized linear. Bytes: of codes, scale vectors and bias, as the format says and as the files have them;
    of the bias alone, which stored bits leave out.

    `in_blocks`, `out_blocks`: rotation blocks as (size, count). Losses from the manifest, None without one.
    """

    name: str
    out_features: int
    in_features: int
    bits: int
    stored_bits: float
    in_blocks: list[tuple[int, int]]
    out_blocks: list[tuple[int, int]]
    bytes_predicted: int
    bytes_measured: int
    bias_bytes: int
    proxy_loss: float | None
    sqnr_db: float | None


@dataclass(frozen=True, slots=True)
class Inspection:
    """A checkpoint. `other_bytes`: of all tensors that are not quantized; `file_bytes`: of the weight files."""

    path: Path
    config: QuantConfig
    layers: list[LayerFacts]
    other_bytes: int
    file_bytes: int

    @property
    def weights(self) -> int:
        """Original weights of the quantized linears."""
        return sum(layer.out_features * layer.in_features for layer in self.layers)

    @property
    def bits(self) -> float:
        """Nominal bits a weight, the mean over weights."""
        return sum(layer.bits * layer.out_features * layer.in_features for layer in self.layers) / self.weights

    @property
    def stored_bits(self) -> float:
        """Stored bits per original weight of the quantized linears, biases left out."""
        return 8 * sum(layer.bytes_predicted - layer.bias_bytes for layer in self.layers) / self.weights

    @property
    def bytes_predicted(self) -> int:
        """Of the quantized linears."""
        return sum(layer.bytes_predicted for layer in self.layers)

    @property
    def bytes_measured(self) -> int:
        """Of the quantized linears."""
        return sum(layer.bytes_measured for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "path": str(self.path),
            "format_version": self.config.format_version,
            "tp_max": self.config.tp_max,
            "scale_dtype": self.config.scale_dtype,
            "total": {
                "linears": len(self.layers),
                "weights": self.weights,
                "bits": self.bits,
                "stored_bits": self.stored_bits,
                "bytes_predicted": self.bytes_predicted,
                "bytes_measured": self.bytes_measured,
                "other_bytes": self.other_bytes,
                "file_bytes": self.file_bytes,
            },
            "layers": [asdict(layer) for layer in self.layers],
            "recipes": self.config.to_dict()["recipes"],
            "provenance": self.config.provenance,
        }


def inspect(path: str | Path) -> Inspection:
    """Read what `path` says of itself. Raises CheckpointError where that is no eightfold or GLQ checkpoint.

    Biases that GLQ dropped are no fault here: there are no bytes of them.
    """
    folder = quantized_folder(path, zero_biases=True)
    config = folder.quantization
    assert config is not None
    measured = dict.fromkeys(config.layers, 0)
    others = 0
    for name, info in folder.stored.items():
        owner = name.rpartition(".")[0]
        if owner in measured:
            measured[owner] += info.nbytes
        else:
            others += info.nbytes
    losses = _losses(folder.path)
    layers = [_facts(folder, name, spec, measured[name], losses.get(name, {})) for name, spec in config.layers.items()]
    files = {info.file for info in folder.stored.values()}
    return Inspection(folder.path, config, layers, others, sum(file.stat().st_size for file in files))


def quantized_folder(path: str | Path, zero_biases: bool = False) -> ModelFolder:
    """The eightfold or GLQ checkpoint in a local folder. Raises CheckpointError for anything else."""
    if not Path(path).is_dir():
        raise CheckpointError(f"{path}: expected the folder of an eightfold checkpoint, there is no such folder")
    folder = open_folder(path, zero_biases)
    if folder.quantization is None:
        raise CheckpointError(f"{path}: expected an eightfold checkpoint, its config.json has no quantization_config")
    return folder


def _facts(folder: ModelFolder, name: str, spec: LayerSpec, measured: int, losses: dict[str, Any]) -> LayerFacts:
    bias = folder.stored[f"{name}.bias"].nbytes if f"{name}.bias" in folder.stored else 0
    predicted = folder.layer_bytes(name)
    return LayerFacts(
        name=name,
        out_features=spec.out_features,
        in_features=spec.in_features,
        bits=spec.bits,
        stored_bits=8 * (predicted - bias) / (spec.out_features * spec.in_features),
        in_blocks=run_lengths(spec.in_blocks),
        out_blocks=run_lengths(spec.out_blocks),
        bytes_predicted=predicted,
        bytes_measured=measured,
        bias_bytes=bias,
        proxy_loss=losses.get("proxy_loss"),
        sqnr_db=losses.get("sqnr_db"),
    )


def _losses(path: Path) -> dict[str, dict[str, Any]]:
    """Losses by linear from the manifest, which a copy that transformers saved does not have."""
    if not (path / MANIFEST).is_file():
        return {}
    records = read_json(path / MANIFEST).get("layers", [])
    return {name: losses for record in records for name, losses in record.get("linears", {}).items()}
