"""E8P against E8 shells: the time of a linear at 1 and 32 tokens, and quality at equal stored bits.

    python benchmarks/codebooks.py --model REFERENCE_LM --calibration calibration.txt --text eval.txt

measures on a GPU the linears of SHAPES in both codebooks as benchmarks/kernels.py does (graph replays over 1 GiB of
codes), quantizes MODEL with both at every rate, evaluates on all of the text, prints both tables and appends the rows
to benchmarks/results/codebooks.jsonl. Without --model only times are measured; without a GPU, or with --no-times, only
quality. With --times and no GPU the times are a rehearsal, and not kept. E8P runs on its own kernels, E8 shells as they
are: a gather and a dense product.
"""

from __future__ import annotations

import argparse
import gc
import sys
from dataclasses import replace
from typing import Any

import torch
from kernels import MIDDLE, SMALL, shape
from peers import Job, limits
from peers import measure as measure_time
from quality import add_options, base_request
from quality import measure as measure_quality
from results import append
from rich.console import Console
from rich.table import Table

from eightfold.quantize import Settings
from eightfold.rvq import FAMILIES

SHAPES = (MIDDLE, MIDDLE[::-1], SMALL)  # N, K
TOKENS = (1, 32)
IMPL = {"e8p": "eightfold", "e8shell": "e8shell"}  # as peers.make calls them


def times(args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Rows of `case` "linear", a codebook after the other, and the copy speed that they are shares of."""
    rows = limits(device)
    copy = next(row["gb_per_s"] for row in rows if row["impl"] == "copy")
    for N, K in args.shapes:
        for bits in args.bits:
            for codebook in FAMILIES:
                job = Job(IMPL[codebook], N, K, bits, "float16", TOKENS)
                rows += [row | {"codebook": codebook} for row in measure_time(job, args.pool_gib * 2**30, copy, device)]
                gc.collect()
    return rows


def qualities(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of `case` "quality". Raises RuntimeError where the codebooks do not store the same bits."""
    rows = []
    base = base_request(args, Settings())
    for bits in args.bits:
        found = []
        for codebook in FAMILIES:
            request = replace(base, bits=bits, settings=replace(base.settings, codebook=codebook))
            found.append({"case": "quality", **measure_quality(request)})
            print(found[-1], flush=True)
        if len({row["stored_bits"] for row in found}) > 1:
            raise RuntimeError(f"expected equal stored bits, got {[row['stored_bits'] for row in found]}")
        rows += found
    return rows


def print_times(rows: list[dict[str, Any]]) -> None:
    """Microseconds of both, and how many times faster E8P is."""
    table = Table(title="a linear: microseconds")
    for name in ("N × K", "bits", "tokens", *FAMILIES, "e8shell / e8p"):
        table.add_column(name, justify="right")
    found = {(r["N"], r["K"], r["bits"], r["tokens"], r["codebook"]): r["microseconds"] for r in rows}
    for N, K, bits, tokens in dict.fromkeys(key[:4] for key in found):
        us = [found[N, K, bits, tokens, codebook] for codebook in FAMILIES]
        table.add_row(f"{N} × {K}", str(bits), str(tokens), *(f"{x:.1f}" for x in us), f"{us[1] / us[0]:.2f}")
    Console(width=150, file=sys.stdout).print(table)


def print_qualities(rows: list[dict[str, Any]]) -> None:
    """Ratio of perplexities and divergence of both."""
    table = Table(title="quality: ratio of perplexities, quantized / original")
    for name in ("model", "bits", "codebook", "stored bits", "ratio ± s.e.", "KL", "top-1", "mean SQNR dB", "seconds"):
        table.add_column(name, justify="left" if name in ("model", "codebook") else "right")
    for row in rows:
        table.add_row(
            row["model"], str(row["bits"]), row["codebook"], f"{row['stored_bits']:.3f}",
            f"{row['ratio']:.4f} ± {row['ratio_se']:.4f}", f"{row['kl']:.4f}", f"{row['top1']:.4f}",
            f"{row['mean_sqnr_db']:.2f}", f"{row['seconds']:.0f}",
        )  # fmt: skip
    Console(width=150, file=sys.stdout).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    add_options(parser)
    parser.add_argument("--shapes", type=shape, nargs="*", default=SHAPES, metavar="NxK")
    parser.add_argument("--pool-gib", type=float, default=1.0, help="codes to rotate over")
    parser.add_argument("--times", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available())
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() and args.device != "cpu" else "cpu")
    timed, judged = [], []
    try:
        if args.times:
            with torch.no_grad():
                timed = times(args, device)
            print_times([row for row in timed if row["case"] == "linear"])
        if args.model is not None:
            judged = qualities(args)
            print_qualities(judged)
    finally:  # times are worth keeping where quality fails; times of a CPU are a rehearsal
        kept = [*(timed if device.type == "cuda" else ()), *judged]
        if kept:
            append("codebooks", kept, samples=args.samples, seqlen=args.seqlen, pool_gib=args.pool_gib)


if __name__ == "__main__":
    main()
