"""Search the stage ratios of the recipes jointly with the input scale on the Gaussian source, and print what they give.

python benchmarks/stage_ratios.py            SQNR of the recipes in rvq.py, appended to benchmarks/results
python benchmarks/stage_ratios.py --codebook e8shell    the same for E8 shells
python benchmarks/stage_ratios.py --search   coordinate descent from the present values first
"""

from __future__ import annotations

import argparse
import math

import torch
from results import append

from eightfold.rvq import FAMILIES, RECIPES, Residual

REQUIRED_DB = {2: 10.38, 3: 15.26, 4: 20.82, 5: 25.8, 6: 31.1, 7: 35.8, 8: 41.0}


def sqnr_db(book: Residual, scale: float, x: torch.Tensor) -> float:
    """Signal to noise of x ~ N(0, 1), float32 [n, 8], coded as x * scale."""
    noise = (book.decode(book.encode(x * scale)) / scale - x).square().sum(dtype=torch.float64)
    return 10 * math.log10(float(x.square().sum(dtype=torch.float64) / noise))


def search(book: Residual, start: float, x: torch.Tensor) -> tuple[float, tuple[float, ...]]:
    """Best (scale, ratios) by coordinate descent with shrinking steps; a ratio moves alone or with all after it."""
    point = [start, *book.ratios[1:]]

    def value(p: list[float]) -> float:
        return sqnr_db(Residual(book.stages, (1.0, *p[1:])), p[0], x)

    best, step = value(point), 0.04
    while step > 0.002:
        moved = False
        for i in range(len(point)):
            for factor in (1 + step, 1 / (1 + step)):
                for end in {i + 1, len(point) if i else 1}:
                    trial = [p * factor if i <= j < end else p for j, p in enumerate(point)]
                    if (v := value(trial)) > best + 1e-6:
                        best, point, moved = v, trial, True
        step = step if moved else step / 2
    return round(point[0], 4), (1.0, *(round(p, 5) for p in point[1:]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--search", action="store_true")
    parser.add_argument("--codebook", choices=list(FAMILIES), default="e8p")
    parser.add_argument("--bits", type=int, nargs="*", default=list(RECIPES))
    parser.add_argument("--vectors", type=int, default=200_000)
    args = parser.parse_args()
    train, test = (
        torch.randn(n, 8, generator=torch.Generator().manual_seed(seed)) for n, seed in ((40_000, 1), (args.vectors, 2))
    )
    recipes, scales = FAMILIES[args.codebook]
    rows = []
    for bits in args.bits:
        book = recipes[bits]
        scale, ratios = search(book, scales[bits], train) if args.search else (scales[bits], book.ratios)
        value = sqnr_db(Residual(book.stages, ratios), scale, test)
        rows.append({"bits": bits, "scale": scale, "ratios": ratios, "sqnr_db": round(value, 3)})
        required = f"  (required {REQUIRED_DB[bits]})" if args.codebook == "e8p" else ""
        print(f"{bits} bits  scale {scale:<7} ratios {ratios}  {value:.3f} dB{required}", flush=True)
    append("stage_ratios", rows, codebook=args.codebook, searched=args.search, vectors=args.vectors)


if __name__ == "__main__":
    main()
