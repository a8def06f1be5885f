"""Bytes of codes and vectors of a model's linears in three layouts: GLQ's two, and the one eightfold writes by default.

    python benchmarks/footprint.py             # from shapes alone, in a second
    python benchmarks/footprint.py --write     # SmolLM2's linears are written too, and what is in the files is counted

padded          GLQ up to 0.6.5: both sides of a linear padded to powers of two
block-diagonal  GLQ from 0.6.6: outputs padded to a multiple of 16, inputs to one of 64
eightfold       layout pow2-sum-256: padded as block-diagonal; scale vectors have the sizes of the linear

Codes: of all linears of the decoder layers. Vectors: GLQ's signs (float16, of the padded sizes) and scalars (float32),
eightfold's scale vectors (float16). Biases are left out, the original has them too; embeddings stay as they are. Rows
go to benchmarks/results/footprint.jsonl.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from results import append
from rich.console import Console
from rich.table import Table

from eightfold.files import write_tensors
from eightfold.format import DTYPE_CODES, LayerSpec, TensorSpec, code_bytes, layer_tensors, vector_bytes
from eightfold.preflight import DEFAULT_LAYOUT
from eightfold.quantize import recipe
from eightfold.rotation import IN_FLOOR, OUT_FLOOR, layout_blocks

BITS = (2, 3, 4)
LAYOUTS = ("padded", "block-diagonal", "eightfold")


@dataclass(frozen=True, slots=True)
class Model:
    """Sizes from a model's public configuration. `vocabulary`: rows of the embedding, which a tied head shares."""

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head: int
    vocabulary: int
    tied: bool

    def linears(self) -> Iterator[tuple[str, int, int]]:
        """Name, outputs, inputs of each linear of a decoder layer."""
        q, kv = self.heads * self.head, self.kv_heads * self.head
        yield from (("q_proj", q, self.hidden), ("k_proj", kv, self.hidden), ("v_proj", kv, self.hidden))
        yield "o_proj", self.hidden, q
        yield from ((name, self.intermediate, self.hidden) for name in ("gate_proj", "up_proj"))
        yield "down_proj", self.hidden, self.intermediate

    @property
    def weights(self) -> int:
        """Of all linears of the decoder layers."""
        return self.layers * sum(N * K for _, N, K in self.linears())

    @property
    def embedding_bytes(self) -> int:
        """Embedding and head in bfloat16, which no layout changes."""
        return 2 * self.vocabulary * self.hidden * (1 if self.tied else 2)


MODELS = (
    Model("SmolLM2-135M", 576, 1536, 30, 9, 3, 64, 49_152, True),
    Model("SmolLM2-360M", 960, 2560, 32, 15, 5, 64, 49_152, True),
    Model("SmolLM3-3B", 2048, 11_008, 36, 16, 4, 128, 128_256, True),
    Model("Llama-3.1-8B", 4096, 14_336, 32, 32, 8, 128, 128_256, False),
    Model("Gemma-3-27B", 5376, 21_504, 62, 32, 16, 128, 262_208, True),
    Model("31B", 5376, 21_504, 60, 32, 16, 128, 262_144, True),
    Model("Qwen2.5-72B", 8192, 29_568, 80, 64, 8, 128, 152_064, False),
)
WRITTEN = ("SmolLM2-135M", "SmolLM2-360M")


def spec(N: int, K: int, bits: int) -> LayerSpec:
    """The linear as eightfold writes it by default."""
    blocks = layout_blocks(N, DEFAULT_LAYOUT, OUT_FLOOR), layout_blocks(K, DEFAULT_LAYOUT, IN_FLOOR)
    return LayerSpec(N, K, bits, *blocks)


def glq_sizes(N: int, K: int, padded: bool) -> tuple[int, int]:
    """Rows and columns of the codes of a linear in GLQ's E8P files."""
    if padded:
        return 1 << (N - 1).bit_length(), 1 << (K - 1).bit_length()
    return -(-N // 16) * 16, -(-K // 64) * 64


def predicted(N: int, K: int, bits: int, layout: str) -> tuple[int, int]:
    """Bytes of codes and of vectors of a linear."""
    if layout == "eightfold":
        return code_bytes(spec(N, K, bits)), vector_bytes(spec(N, K, bits))
    rows, columns = glq_sizes(N, K, layout == "padded")
    return rows * columns * bits // 8, 2 * (rows + columns) + 4 * ((bits + 1) // 2)


def tensors(name: str, N: int, K: int, bits: int, layout: str) -> dict[str, TensorSpec]:
    """Name → (dtype, shape) of the tensors of a linear in the files of `layout`."""
    if layout == "eightfold":
        return layer_tensors(name, spec(N, K, bits), recipe(bits), torch.float16)
    rows, columns = glq_sizes(N, K, layout == "padded")
    of_e8p = torch.int64, (rows // 16, columns // 64, 8, 4)
    own: dict[str, TensorSpec] = {"Qidxs_e8p": of_e8p, "Wscale": (torch.float32, ())}
    own |= {"SU": (torch.float16, (rows,)), "SV": (torch.float16, (columns,))}
    if bits > 2:
        own["Qidxs2_e81b" if bits == 3 else "Qidxs2_e8p"] = (
            (torch.int64, (rows, columns // 64)) if bits == 3 else of_e8p
        )
        own["inv_resid_scale"] = torch.float32, ()
    return {f"{name}.{key}": value for key, value in own.items()}


def measured(path: Path) -> tuple[int, int]:
    """Bytes of codes and of vectors in a safetensors file, by its header; all its bytes are one or the other."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    found = [0, 0]
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            found[name.rpartition(".")[2].startswith(("SU", "SV", "Wscale", "inv_resid", "scale_"))] += end - begin
    if 8 + size + sum(found) != path.stat().st_size:
        raise RuntimeError(f"{path}: expected its header to account for every byte")
    return found[0], found[1]


def write(model: Model, bits: int, layout: str, path: Path) -> None:
    """All linears of the model, of zeros."""
    every: dict[str, TensorSpec] = {}
    for layer in range(model.layers):
        for name, N, K in model.linears():
            every |= tensors(f"model.layers.{layer}.{name}", N, K, bits, layout)
    codes = {"I64" if dtype == torch.int64 else DTYPE_CODES[dtype]: dtype for dtype, _ in every.values()}
    spelled = {dtype: code for code, dtype in codes.items()}
    with path.open("wb") as file:
        described = {name: (spelled[dtype], shape) for name, (dtype, shape) in every.items()}
        write_tensors(file, described, lambda name: torch.zeros(every[name][1], dtype=every[name][0]))


def row(model: Model, bits: int, layout: str, with_file: bool) -> dict[str, Any]:
    """One line of the table; `with_file`: write the tensors and count."""
    each = [predicted(N, K, bits, layout) for _, N, K in model.linears()]
    codes, vectors = (model.layers * sum(part) for part in zip(*each, strict=True))
    found: dict[str, Any] = {
        "model": model.name, "bits": bits, "layout": layout, "weights": model.weights, "code_bytes": codes,
        "vector_bytes": vectors, "stored_bits": 8 * (codes + vectors) / model.weights,
        "embedding_bytes": model.embedding_bytes,
    }  # fmt: skip
    if with_file:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.safetensors"
            write(model, bits, layout, path)
            found["measured_code_bytes"], found["measured_vector_bytes"] = measured(path)
    return found


def print_table(rows: list[dict[str, Any]]) -> None:
    table = Table(title="footprint: megabytes of codes + vectors (stored bits per weight)")
    for name in ("model", "bits", *LAYOUTS, "embeddings, bf16", "measured"):
        table.add_column(name, justify="left" if name == "model" else "right")
    for model, bits in dict.fromkeys((r["model"], r["bits"]) for r in rows):
        mine = {r["layout"]: r for r in rows if (r["model"], r["bits"]) == (model, bits)}
        cells = [
            f"{r['code_bytes'] / 1e6:,.1f} + {r['vector_bytes'] / 1e6:.2f} ({r['stored_bits']:.3f})"
            for r in (mine[layout] for layout in LAYOUTS)
        ]
        checked = [r for r in mine.values() if "measured_code_bytes" in r]
        same = all(r[key] == r[f"measured_{key}"] for r in checked for key in ("code_bytes", "vector_bytes"))
        embedding = f"{mine['eightfold']['embedding_bytes'] / 1e6:,.0f}"
        table.add_row(model, str(bits), *cells, embedding, ("as predicted" if same else "OTHER") if checked else "")
    Console(width=150).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"write the linears of {' and '.join(WRITTEN)}")
    args = parser.parse_args()
    rows = [
        row(model, bits, layout, args.write and model.name in WRITTEN)
        for model in MODELS
        for bits in BITS
        for layout in LAYOUTS
    ]
    print_table(rows)
    append("footprint", rows, written=args.write)


if __name__ == "__main__":
    main()
