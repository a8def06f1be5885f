"""Tables that the device code includes, written out from `e8p.py` so that nothing is copied by hand.

`python tools/cuda_tables.py` writes kernels/*_tables.cuh again; a test compares them with what is made here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from eightfold.e8p import NIBBLE, codebook, pattern_words

KERNELS = Path(__file__).parents[1] / "src" / "eightfold" / "cuda" / "kernels"
COORDINATE = tuple(NIBBLE.index(k) for k in range(8))  # the coordinate that sits in nibble k


def encode_tables() -> str:
    """Text of kernels/encode_tables.cuh, for the search of the nearest points in kernels/encode.cu."""
    norm_12 = [[k for k in range(8) if steps[k] == 0] for steps in _steps()[227:]]
    rows = "".join(f" \\\n    F({227 + n}, {i}, {j}, {k})" for n, (i, j, k) in enumerate(norm_12))
    zero, halves = _e81b_number([0.0] * 8), _e81b_number([-0.5] * 8)
    return f"""\
// Made by tools/cuda_tables.py from eightfold/e8p.py: not to be edited.

// Of E8P, magnitude k is that of the coordinate in nibble k. It is 1/2 + its steps.

// Number of the pattern of squared norm <= 10 with one step where the bits of m are set: [m]; with two steps at i and,
// unless j = i, one at j: [256 + 8 i + j]. 0 where there is none.
{_array("E8P_PATTERN", _pattern_of_steps())}
// F(number, i, j, k) for the patterns of squared norm 12: 1/2 at i, j and k, 3/2 at the other five.
#define E8P_NORM_12(F){rows}

// Number of the point s e_i + r e_j of E81B: [32 i + 4 j + 2 (s < 0) + (r < 0)]; with j = i, r = s of 2 s e_i.
// That of 0 where there is none.
{_array("E81B_STEPS", _e81b_steps())}
#define E81B_ZERO {zero} // number of the point 0
#define E81B_HALVES {halves} // number of the first of the 128 points {{-1/2, 1/2}}^8, which are in lexicographic order
"""


def _steps() -> list[list[int]]:
    """The 256 patterns, nibble by nibble: how many steps each magnitude is above 1/2."""
    return [[(abs((word >> 4 * k & 15) - 8) - 1) // 2 for k in range(8)] for word in pattern_words()]


def _pattern_of_steps() -> list[int]:
    table = [0] * 320
    for number, steps in enumerate(_steps()[:227]):
        ones = [k for k in range(8) if steps[k] == 1]
        twos = [k for k in range(8) if steps[k] == 2]
        index = 256 + 8 * twos[0] + [*ones, *twos][0] if twos else sum(1 << k for k in ones)
        table[index] = number
    return table


def _e81b_steps() -> list[int]:
    table = [_e81b_number([0.0] * 8)] * 256
    unit = torch.eye(8)
    for i in range(8):
        for j in range(8):
            for signs in range(4) if i != j else (0, 3):
                point = unit[i] * (1 - (signs & 2)) + unit[j] * (1 - 2 * (signs & 1))
                if (i, j, signs) != (7, 7, 3):  # -2 e_7 is the one that is not there
                    table[32 * i + 4 * j + signs] = _e81b_number(point.tolist())
    return table


def _e81b_number(point: list[float]) -> int:
    return codebook("e81b").points().tolist().index(point)


def _array(name: str, values: Sequence[int]) -> str:
    rows = [", ".join(str(v) for v in values[i : i + 16]) for i in range(0, len(values), 16)]
    text = "".join(f"    {row},\n" for row in rows)
    return f"__device__ const unsigned char {name}[{len(values)}] = {{\n{text}}};\n"


def decode_tables() -> str:
    """Text of kernels/decode_tables.cuh, for kernels/decode.cuh: 4-bit unsigned weights, coordinate i in nibble i."""
    e8p = _nibbles(2 * codebook("e8p").points() + 7.5).reshape(256, 256)  # [pattern, signs]
    e81b = _nibbles(2 * codebook("e81b").points() + 8)
    patterns, signs = e8p[:, 0], e8p[0] ^ e8p[0, 0]
    return f"""\
// Made by tools/cuda_tables.py from eightfold/e8p.py: not to be edited.

// (4 w + 15) / 2 for the coordinates w of E8P's point of code (pattern << 8) | signs: PATTERNS[pattern] ^ SIGNS[signs].
{_words("PATTERNS", patterns.tolist())}
{_words("SIGNS", signs.tolist())}
// (4 w + 16) / 2 for the coordinates w of E81B's points.
{_words("E81B", e81b.tolist())}"""


def _nibbles(values: torch.Tensor) -> torch.Tensor:
    return (values.to(torch.int64) << 4 * torch.arange(8)).sum(1)


def _words(name: str, values: Sequence[int]) -> str:
    rows = [", ".join(f"0x{v:08x}" for v in values[i : i + 8]) for i in range(0, len(values), 8)]
    text = "".join(f"    {row},\n" for row in rows)
    return f"__device__ const unsigned {name}[{len(values)}] = {{\n{text}}};\n"


if __name__ == "__main__":
    (KERNELS / "decode_tables.cuh").write_text(decode_tables())
    (KERNELS / "encode_tables.cuh").write_text(encode_tables())
