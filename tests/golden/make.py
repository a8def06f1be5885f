"""Write the golden files beside this script: a tiny checkpoint, and the weights that it stands for.

A reader and a writer of the format made from docs/format.md alone: numpy, the standard library, nothing of
eightfold. Where it and the package disagree, one of the two is wrong. Running it must change nothing.

All numbers are such that float32 holds every intermediate result exactly, so any order of operations will do.
"""

from __future__ import annotations

import itertools
import json
import zlib
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent

NORM_12 = """
5b99bb9b 5b9bbb99 5b99bbb9 5bb9bb99 7b9b9bbb 799bbbbb 7b9bb9bb 599b9bbb 5b9b99bb 599bb9bb 7bbb9b9b 79bbbb9b
7bbbb99b 59bb9b9b 5bbb999b 59bbb99b 7bb99bbb 79b9bbbb 7bb9b9bb 59b99bbb 5bb999bb 59bbb9b9 7bbb9bb9 79bbbbb9
7bbbb9b9 59bb9bb9 5bbb99b9 5bb9b9b9 7b9bbb9b
"""
NIBBLE = (0, 4, 1, 5, 2, 6, 3, 7)


def words() -> list[int]:
    """The 256 patterns of E8P, docs/format.md section 5."""
    table = []
    for p in itertools.product((0.5, 1.5, 2.5), repeat=8):
        if sum(c * c for c in p) <= 10:
            signed = [*p[:7], -p[7] if sum(p) % 2 else p[7]]
            table.append(sum(int(2 * c + 8) << 4 * NIBBLE[i] for i, c in enumerate(signed)))
    return table + [int(word, 16) for word in NORM_12.split()]


def e8p_point(code: int, table: list[int]) -> list[float]:
    word, signs = table[code >> 8], code & 255
    odd = signs.bit_count() % 2
    signs ^= odd
    values = []
    for k in NIBBLE:
        v = ((word >> 4 * k & 15) - 8) / 2
        values.append((-v if signs >> k & 1 else v) + (-0.25 if odd else 0.25))
    return values


def e81b_points() -> list[tuple[float, ...]]:
    """The 256 points of E81B, docs/format.md section 6."""
    points = [p for p in itertools.product((-1, 0, 1), repeat=8) if sum(c * c for c in p) in (0, 2)]
    points += [p for p in itertools.product((-0.5, 0.5), repeat=8) if sum(p) % 2 == 0]
    points += [tuple(2.0 * (i == j) for j in range(8)) for i in range(8)]
    points += [tuple(-2.0 * (i == j) for j in range(8)) for i in range(7)]
    return points


def shell_points() -> np.ndarray:
    """The 65,536 points of e8shell, docs/format.md section 13: float64 [65536, 8]."""
    every = np.zeros((1, 0), int)  # doubled coordinates, the last one first, with all parities
    for _ in range(8):
        every = np.concatenate([np.insert(every, 0, value, 1) for value in range(-6, 7)])
        every = every[((every**2).sum(1) <= 48) & ((every[:, :1] - every) % 2 == 0).all(1)]
    every = every[every.sum(1) % 4 == 0]
    z = np.zeros_like(every)
    z[:, 7] = every[:, 7]
    for i in range(6, -1, -1):
        z[:, i] = (every[:, i] - every[:, 7]) // 2 + (z[:, i + 1] if i < 6 else 0)
    z[:, 0] //= 2
    every = every[np.lexsort(z.T)]
    pairs = [[int(norm), i] for i, norm in enumerate((every**2).sum(1))]
    todo = [(0, len(pairs))]
    while todo:
        low, high = todo.pop()
        while high - low > 16:
            high, above = split(pairs, low, high), high
            todo.append((high, above))
    pairs.sort(key=lambda pair: pair[0])
    return every[[i for _, i in pairs[:65536]]] / 2


def split(pairs: list[list[int]], low: int, high: int) -> int:
    """One round of step 2 of section 13."""
    a, b, c = (pairs[i][0] for i in (low + 1, (low + high) // 2, high - 1))
    if a < b:
        median = (low + high) // 2 if b < c else high - 1 if a < c else low + 1
    else:
        median = low + 1 if a < c else high - 1 if b < c else (low + high) // 2
    pairs[low], pairs[median] = pairs[median], pairs[low]
    pivot, i, j = pairs[low][0], low + 1, high
    while True:
        while pairs[i][0] < pivot:
            i += 1
        j -= 1
        while pivot < pairs[j][0]:
            j -= 1
        if i >= j:
            return i
        pairs[i], pairs[j] = pairs[j], pairs[i]
        i += 1


def rotation(blocks: list[list[int]]) -> np.ndarray:
    """The block diagonal rotation of [size, count] pairs, sizes powers of two."""
    n = sum(size * count for size, count in blocks)
    R = np.zeros((n, n))
    start = 0
    for size, count in blocks:
        H = [[(-1) ** (i & j).bit_count() / size**0.5 for j in range(size)] for i in range(size)]
        for _ in range(count):
            R[start : start + size, start : start + size] = H
            start += size
    return R


def dense(layer: dict, recipe: dict, tensors: dict[str, np.ndarray], tables: dict[str, np.ndarray]) -> np.ndarray:
    """The weight [out_features, in_features] that a layer's tensors stand for."""
    W = 0
    for k, (stage, ratio) in enumerate(zip(recipe["stages"], recipe["ratios"], strict=True)):
        codes = tensors["qweight" + (str(k) if k else "")]
        W = W + ratio * tables[stage][codes.view(f"u{codes.itemsize}")].reshape(len(codes), -1)
    W = rotation(layer["out_blocks"]).T @ W @ rotation(layer["in_blocks"])
    W = W[: layer["out_features"], : layer["in_features"]]
    W = tensors["scale_out"].astype(np.float64)[:, None] * W * tensors["scale_in"].astype(np.float64)
    assert (W.astype(np.float32) == W).all(), "not exact in float32"
    return W.astype(np.float32)


# --- the checkpoint --------------------------------------------------------------------------------

LAYERS = {
    "model.layers.0.a": {
        "out_features": 20,
        "in_features": 72,
        "bits": 5,
        "out_blocks": [[16, 1], [4, 1]],
        "in_blocks": [[64, 1], [16, 1]],
        "bias": "bfloat16",
    },
    "model.layers.0.b": {
        "out_features": 5,
        "in_features": 60,
        "bits": 3,
        "out_blocks": [[4, 2]],
        "in_blocks": [[16, 4]],
        "bias": None,
    },
    "lm_head": {
        "out_features": 6,
        "in_features": 64,
        "bits": 2,
        "out_blocks": [[1, 6]],
        "in_blocks": [[64, 1]],
        "bias": None,
    },
    "model.layers.0.c": {
        "out_features": 6,
        "in_features": 20,
        "bits": 4,
        "out_blocks": [[4, 1], [1, 2]],
        "in_blocks": [[16, 1], [4, 2]],
        "bias": None,
    },
}
RECIPES = {
    "2": {"stages": ["e8p"], "ratios": [1.0]},
    "3": {"stages": ["e8p", "e81b"], "ratios": [1.0, 0.5]},
    "4": {"stages": ["e8shell", "e8shell256", "e8shell256"], "ratios": [1.0, 0.5, 0.25]},
    "5": {"stages": ["e8p", "e8p", "e81b"], "ratios": [1.0, 0.25, 0.125]},
}
CONFIG = {
    "quant_method": "eightfold",
    "format_version": 1,
    "scale_dtype": "float16",
    "tp_max": 1,
    "recipes": RECIPES,
    "layers": LAYERS,
    "provenance": {"note": "golden file", "seed": 8},
}


class Numbers:
    """A linear congruential generator, so that the files depend on no library."""

    state = 8

    def draw(self, count: int, below: int) -> np.ndarray:
        drawn = []
        for _ in range(count):
            self.state = (self.state * 6364136223846793005 + 1442695040888963407) % 2**64
            drawn.append((self.state >> 33) % below)
        return np.array(drawn)


def make_tensors(layer: dict, numbers: Numbers) -> dict[str, tuple[str, np.ndarray]]:
    """Name → (dtype in safetensors, array) of a layer with arbitrary codes."""
    out, inner = (sum(size * count for size, count in layer[side]) for side in ("out_blocks", "in_blocks"))
    tensors: dict[str, tuple[str, np.ndarray]] = {}
    for k, stage in enumerate(RECIPES[str(layer["bits"])]["stages"]):
        dtype, array = {
            "e8p": ("I16", "<u2"),
            "e81b": ("U8", "u1"),
            "e8shell": ("U16", "<u2"),
            "e8shell256": ("I8", "u1"),
        }[stage]
        codes = numbers.draw(out * inner // 8, 256 ** np.dtype(array).itemsize).reshape(out, inner // 8)
        tensors["qweight" + (str(k) if k else "")] = dtype, codes.astype(array)
    choice = np.array([0.5, 0.75, 1.0, 1.25, 1.5, -0.5, -1.0, -1.75])
    tensors["scale_in"] = "F16", choice[numbers.draw(layer["in_features"], 8)].astype("<f2")
    powers = np.array([0.125, 0.25, 0.5, -0.125])
    tensors["scale_out"] = "F16", powers[numbers.draw(layer["out_features"], 4)].astype("<f2")
    if layer["bias"]:  # bfloat16: the upper half of a float32
        values = (numbers.draw(layer["out_features"], 64) / 16 - 2).astype("<f4")
        tensors["bias"] = "BF16", (values.view("<u4") >> 16).astype("<u2")
    return tensors


def safetensors(tensors: dict[str, tuple[str, np.ndarray]]) -> bytes:
    order = ("F32", "BF16", "F16", "U16", "I16", "I8", "U8")
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name in sorted(tensors, key=lambda name: (order.index(tensors[name][0]), name)):
        dtype, array = tensors[name]
        end = len(data) + array.nbytes
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [len(data), end]}
        data += array.tobytes()
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data


def main() -> None:
    table = words()
    assert zlib.crc32(np.array(table, "<u4").tobytes()) == 2980159556
    e8p = np.array([e8p_point(code, table) for code in range(65536)], "<f4")
    assert zlib.crc32(e8p.tobytes()) == 2200024200
    e81b = np.array(e81b_points(), "<f4")
    assert zlib.crc32(e81b.tobytes()) == 333791178
    shell = shell_points()
    assert zlib.crc32(shell.astype("<f4").tobytes()) == 3681947879
    tables = {"e8p": e8p.astype(np.float64), "e81b": e81b.astype(np.float64)}
    tables |= {"e8shell": shell, "e8shell256": shell[:256]}

    numbers = Numbers()
    stored: dict[str, tuple[str, np.ndarray]] = {}
    expected: dict[str, tuple[str, np.ndarray]] = {}
    for name, layer in LAYERS.items():
        tensors = make_tensors(layer, numbers)
        stored |= {f"{name}.{key}": value for key, value in tensors.items()}
        arrays = {key: array for key, (_, array) in tensors.items()}
        expected[f"{name}.weight"] = "F32", dense(layer, RECIPES[str(layer["bits"])], arrays, tables)
    (HERE / "model.safetensors").write_bytes(safetensors(stored))
    (HERE / "expected.safetensors").write_bytes(safetensors(expected))
    (HERE / "config.json").write_text(json.dumps({"quantization_config": CONFIG}, indent=1) + "\n")


if __name__ == "__main__":
    main()
