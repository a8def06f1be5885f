"""A writer of GLQ checkpoints, from the description of the format: numpy, and nothing of the package's own reader.

Codes are random; what is returned beside the file is the dense weight that they stand for, in float64, by explicit
Hadamard matrices.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from packing import LINEARS
from safetensors import safe_open
from safetensors.torch import save_file

from eightfold.e8p import codebook

Tensors = dict[str, torch.Tensor]


@dataclass
class Recipe:
    """How to write. `bits`: of each linear in turn; `pow2`: the padded layout; `ratios`: of the stages after the first,
    cumulative, for linears by name (else the usual ones)."""

    codebook: str = "e8p"
    bits: tuple[int, ...] = (2, 3, 4, 5, 6, 7, 8)
    pow2: bool = False
    ratios: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    block_diagonal_key: bool = False


def write_glq(source: Path, target: Path, how: Recipe | None = None) -> dict[str, np.ndarray]:
    """Write the model folder `source` as a GLQ checkpoint of random codes. Dense weights, float64, by linear."""
    how = how or Recipe()
    target.mkdir(parents=True)
    with safe_open(source / "model.safetensors", framework="pt") as file:
        tensors: Tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    names = sorted(n.removesuffix(".weight") for n in tensors if n.split(".")[-2] in LINEARS and n.endswith(".weight"))
    dense: dict[str, np.ndarray] = {}
    layer_bpw: dict[str, int] = {}
    for i, name in enumerate(names):
        shape = tuple(tensors.pop(f"{name}.weight").shape)
        tensors.pop(f"{name}.bias", None)
        layer_bpw[name] = how.bits[i % len(how.bits)]
        parts, dense[name] = linear(shape, layer_bpw[name], how, i, how.ratios.get(name))
        tensors |= {f"{name}.{leaf}": tensor for leaf, tensor in parts.items()}
    save_file(tensors, target / "model.safetensors")
    section: dict[str, Any] = {"quant_method": "glq", "codebook": how.codebook, "codesz": 8}
    section |= {"bpw": round(float(np.mean(list(layer_bpw.values()))), 2), "layer_bpw": layer_bpw}
    if how.block_diagonal_key:
        section["block_diagonal"] = not how.pow2
    config = json.loads((source / "config.json").read_text()) | {"quantization_config": section, "use_cache": True}
    (target / "config.json").write_text(json.dumps(config, indent=2))
    (target / "e8_codebook.pt").write_bytes(b"a pickle that nobody may open")
    if how.codebook == "e8_shell":
        (target / "e8_codebook.pt").unlink()
    for file_name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(source / file_name, target / file_name)
    return dense


def linear(
    shape: tuple[int, int], bits: int, how: Recipe, seed: int, ratios: tuple[float, ...] | None = None
) -> tuple[Tensors, np.ndarray]:
    """Tensors by bare name, and the dense weight [out, in]."""
    rng = np.random.default_rng(seed)
    out, inner = shape
    shell = how.codebook == "e8_shell"
    if how.pow2:
        M, N = (1 << (size - 1).bit_length() for size in shape)
    elif shell:
        M, N = shape
    else:
        M, N = -(-out // 16) * 16, -(-inner // 64) * 64
    kinds = (["F"] if shell else ["p"]) * (bits // 2) + (["S"] if shell else ["b"]) * (bits % 2)
    usual = _usual(kinds)
    scales = (1.0, *(ratios or usual[1:]))
    scales = tuple(float(np.float32(s)) for s in scales)
    W = np.zeros((M, N))
    parts: Tensors = {}
    for k, kind in enumerate(kinds):
        codes = rng.integers(0, 1 << (16 if kind in "pF" else 8), (M, N // 8), dtype=np.uint16)
        table = codebook({"p": "e8p", "b": "e81b"}.get(kind, "e8shell")).points().double().numpy()
        W += scales[k] * table[codes].reshape(M, N)
        number = str(k + 1) if k else ""
        if kind == "p":
            parts[f"Qidxs{number}_e8p"] = torch.from_numpy(_tiles(codes).view(np.int64))
        elif kind == "b":
            parts[f"Qidxs{number}_e81b"] = torch.from_numpy(codes.astype(np.uint8).view(np.int64))
        else:
            parts[f"Qidxs{number}"] = torch.from_numpy(codes.view(np.int16))
        if k:
            parts["inv_resid_scale" + (str(k) if k > 1 else "")] = torch.tensor(scales[k])
    draws = torch.Generator("cpu").manual_seed(42)
    SU, SV = (torch.randint(0, 2, (size,), generator=draws) * 2 - 1 for size in (M, N))
    scale = np.float32(rng.uniform(0.5, 1.5) / inner**0.5)
    parts |= {"SU": SU.half(), "SV": SV.half(), "Wscale": torch.tensor(scale)}
    W = SU.numpy()[:, None] * (_hadamard(M) @ (float(scale) * W) @ _hadamard(N)) * SV.numpy()
    return parts, W[:out, :inner]


def _usual(kinds: list[str]) -> list[float]:
    step = {"pp": 3.45, "pb": 2.04, "FF": 3.0, "FS": 2.0}
    scales = [1.0]
    for pair in pairwise(kinds):
        scales.append(scales[-1] / step["".join(pair)])
    return scales


def _tiles(codes: np.ndarray) -> np.ndarray:
    """uint16 [M, N/8] → uint64 words [M/16, N/64, 8, 4], bit by bit."""
    I, J, p, q = np.ogrid[: codes.shape[0] // 16, : codes.shape[1] // 8, :8, :4]
    words = np.zeros(np.broadcast_shapes(I.shape, J.shape, p.shape, q.shape), np.uint64)
    for i in range(4):
        code = codes[16 * I + 2 * p + i % 2, 8 * J + 2 * q + i // 2].astype(np.uint64)
        words |= (code >> 8) << 8 * i
        for j in range(8):
            words |= (code >> j & 1) << 32 + 4 * j + i
    return words


@cache
def _hadamard(size: int) -> np.ndarray:
    """Block diagonal, the powers of two in `size`, the largest first."""
    H, start = np.zeros((size, size)), 0
    for k in reversed(range(size.bit_length())):
        if size >> k & 1:
            n = 1 << k
            parity = np.bitwise_count(np.arange(n)[:, None] & np.arange(n)) & 1
            H[start : start + n, start : start + n] = (1 - 2.0 * parity) / n**0.5
            start += n
    return H
