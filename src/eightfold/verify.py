"""Whether a checkpoint is whole: its files, its tensors, its likeness to the original, its loading."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from eightfold.checkpoint import read_packed, verify_files
from eightfold.files import read_json
from eightfold.folder import ModelFolder
from eightfold.format import CheckpointError, PackedWeight
from eightfold.glq_folder import is_glq
from eightfold.inspect import quantized_folder
from eightfold.model import Decoder
from eightfold.parallel import ordered_map
from eightfold.quantize import dequantize
from eightfold.workspace import MANIFEST

# A linear may not be less like the original than this times its nominal bits: half of what a Gaussian source comes to
# (10.4 dB at 2 bits, 41 dB at 8). A layer of another model, or with rows in another order, comes to about -3 dB.
FLOOR_DB_PER_BIT = 2.5
PROBE_TOKENS = 8  # of the forward that transformers must get through

Phase = Callable[[str, int], None]
Advance = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Verification:
    """`problems`: one sentence each, none for a sound checkpoint; `notes`: what is worth knowing and no fault.

    `sqnr_db`: of each linear's dequantized against its original weights, in dB; empty without an original.
    """

    path: Path
    files: int
    layers: int
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    sqnr_db: dict[str, float] = field(default_factory=dict)

    @property
    def lowest(self) -> str | None:
        """The linear that is least like the original."""
        return min(self.sqnr_db, key=self.sqnr_db.__getitem__) if self.sqnr_db else None

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        lowest = self.lowest
        return {
            "path": str(self.path),
            "passed": not self.problems,
            "problems": self.problems,
            "notes": self.notes,
            "files": self.files,
            "layers": self.layers,
            "sqnr_db": self.sqnr_db,
            "lowest": lowest and {"layer": lowest, "sqnr_db": self.sqnr_db[lowest]},
        }


def verify(path: str | Path, against: str | None, phase: Phase, advance: Advance) -> Verification:
    """Check the checkpoint in `path`, with `against` (a folder or hub id) also against the original model.

    All problems are collected; what makes the rest pointless (a file that cannot be read) ends the check. Raises
    CheckpointError only where `path` is no folder or `against` no original model.
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"{path}: expected the folder of an eightfold checkpoint, there is no such folder")
    original = _original(against) if against else None
    phase("files", 1)
    of_glq = is_glq(path)
    problems = [] if of_glq else verify_files(path)
    files = len(read_json(path / MANIFEST).get("files") or {}) if (path / MANIFEST).is_file() else 0
    advance(1)
    try:
        folder = quantized_folder(path)
    except CheckpointError as error:
        return Verification(path, files, 0, [*problems, str(error)])
    assert folder.quantization is not None
    notes = ["a GLQ checkpoint has no hashes: its files are read, and compared with nothing"] if of_glq else []
    result = Verification(path, files, len(folder.quantization.layers), problems, notes)
    phase("linears", result.layers)
    check = _Linear(folder, original)
    for name, (problem, sqnr) in zip(check.names, ordered_map(check, check.names), strict=True):
        result.problems.extend([problem] if problem else [])
        if sqnr is not None:
            result.sqnr_db[name] = sqnr
        advance(1)
    _others(folder, original, result, phase, advance)
    if original is not None:
        _base(folder, original, result)
    phase("loading", 1)
    result.problems.extend(_loading(path))
    advance(1)
    return result


def _original(against: str) -> Decoder:
    folder = ModelFolder(against)
    if folder.quantization is not None:
        raise CheckpointError(f"{against}: expected the original model, this one is quantized")
    return Decoder(folder, torch.device("cpu"), torch.float32)


class _Linear:
    """The check of one linear by name: (problem or None, SQNR in dB or None)."""

    def __init__(self, folder: ModelFolder, original: Decoder | None) -> None:
        assert folder.quantization is not None
        self.folder, self.original = folder, original
        self.names = list(folder.quantization.layers)
        self._shapes = original.linear_shapes() if original else {}

    def __call__(self, name: str) -> tuple[str | None, float | None]:
        try:
            packed = read_packed(self.folder, name)
        except CheckpointError as error:
            return str(error), None
        if self.original is None:
            return None, None
        N, K = packed.spec.out_features, packed.spec.in_features
        info = self._shapes.get(name)
        if info is None or (info.out_features, info.in_features) != (N, K):
            return f"{name}: expected a linear of {N} × {K} in the original, it has none", None
        tensors = self.original.folder.tensors
        own = f"{name}.weight" in tensors  # a tied one is under another name
        W = self.original.folder.read(f"{name}.weight") if own else self.original.weight(name)
        return self._likeness(name, packed, W.float())

    def _likeness(self, name: str, packed: PackedWeight, W: Tensor) -> tuple[str | None, float | None]:
        if not bool(W.any()):
            return None, None  # nothing to be like
        sqnr = sqnr_db(W, dequantize(packed))
        floor = FLOOR_DB_PER_BIT * packed.spec.bits
        if not sqnr >= floor:
            return f"{name}: {sqnr:.1f} dB against the original, expected at least {floor:.1f} dB", sqnr
        return None, sqnr


def sqnr_db(W: Tensor, W_hat: Tensor) -> float:
    """10 log10(|W|² / |W - W_hat|²), summed in float64; infinite for equal ones, NaN where W is not finite."""
    noise, signal = (float(x.double().square().sum()) for x in (W - W_hat, W))
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


def _others(
    folder: ModelFolder, original: Decoder | None, result: Verification, phase: Phase, advance: Advance
) -> None:
    """Tensors that are not quantized: finite, and the original's bytes."""
    assert folder.quantization is not None
    layers = folder.quantization.layers
    names = [name for name in folder.tensors if name.rpartition(".")[0] not in layers]
    phase("others", len(names))

    def check(name: str) -> str | None:
        tensor = folder.read(name)
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            return f"{name}: expected finite values, came some that are not"
        if original is None:
            return None
        if name not in original.folder.tensors:
            return f"{name}: expected no such tensor, the original has none"
        other = original.folder.read(name)
        return None if _same_bytes(tensor, other) else f"{name}: expected the original's bytes, came others"

    for problem in ordered_map(check, names):
        result.problems.extend([problem] if problem else [])
        advance(1)


def _same_bytes(a: Tensor, b: Tensor) -> bool:
    same = a.dtype == b.dtype and a.shape == b.shape
    return same and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def _base(folder: ModelFolder, original: Decoder, result: Verification) -> None:
    assert folder.quantization is not None
    announced = folder.quantization.provenance.get("base_sha256")
    if announced and announced != original.folder.sha256():
        result.notes.append(f"{original.folder.path} is not, byte for byte, the folder that was quantized")


def _loading(path: Path) -> list[str]:
    """What goes wrong when transformers loads the folder and runs a few tokens."""
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(path).eval()
        tokens = torch.arange(PROBE_TOKENS)[None]
        with torch.no_grad():
            logits = model(tokens).logits
    except (ValueError, OSError, RuntimeError, SafetensorError) as error:
        return [f"transformers cannot load it: {' '.join(str(error).split())}"]
    if not bool(torch.isfinite(logits).all()):
        return ["loaded through transformers, it gives logits that are not finite"]
    return []
