"""Rates between the whole ones: log perplexity against the straight line between the whole rates on either side.

    python benchmarks/allocation.py --model REFERENCE_LM --calibration calibration.txt --text eval.txt

quantizes MODEL at whole rates, every linear alike, and at means of nominal bits between them, shared out by what each
group of linears loses; evaluates each on all of the text, prints the table and appends the rows to
benchmarks/results/allocation.jsonl. A mean that is shared out must lie below the line that mixing the two models
would give.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from quality import add_options, base_request, measure
from results import append
from rich.console import Console
from rich.table import Table

from eightfold.quantize import Settings


def line(rows: list[dict[str, Any]], stored_bits: float) -> float | None:
    """Log of the ratio at `stored_bits` on the straight line between the whole rates around it; None outside."""
    whole = sorted((row["stored_bits"], math.log(row["ratio"])) for row in rows if row["bits"] == int(row["bits"]))
    for (x0, y0), (x1, y1) in itertools.pairwise(whole):
        if x0 < stored_bits < x1:
            return y0 + (y1 - y0) * (stored_bits - x0) / (x1 - x0)
    return None


def print_table(rows: list[dict[str, Any]]) -> None:
    """The rows as people read them."""
    table = Table(title="log perplexity ratio, and the line between the whole rates")
    for name in (
        "model",
        "bits",
        "stored bits",
        "ratio ± s.e.",
        "KL",
        "log ratio",
        "line",
        "log ratio / line",
        "seconds",
    ):
        table.add_column(name, justify="left" if name == "model" else "right")
    for row in sorted(rows, key=lambda row: row["stored_bits"]):
        log, between = math.log(row["ratio"]), row["line"]
        table.add_row(
            row["model"], f"{row['bits']:g}", f"{row['stored_bits']:.4f}",
            f"{row['ratio']:.4f} ± {row['ratio_se']:.4f}", f"{row['kl']:.4f}",
            f"{log:.4f}", f"{between:.4f}" if between else "",
            f"{log / between:.3f}" if between else "", f"{row['seconds']:.0f}",
        )  # fmt: skip
    Console(width=150).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    add_options(parser)
    parser.add_argument("--between", type=float, nargs="*", default=[2.25, 2.5, 2.75, 3.5])
    parser.add_argument("--rows", help="print the table of this file's last line, and stop")
    args = parser.parse_args()
    if args.rows:
        print_table(json.loads(Path(args.rows).read_text(encoding="utf-8").splitlines()[-1])["rows"])
        return
    base = base_request(args, Settings())
    rows = []
    for bits in [*args.bits, *args.between]:
        rows.append(measure(replace(base, bits=bits)))
        print(json.dumps(rows[-1]), flush=True)
    for row in rows:
        row["line"] = line(rows, row["stored_bits"]) if row["bits"] != int(row["bits"]) else None
    print_table(rows)
    windows = rows[0]["windows"]
    append("allocation", rows, samples=args.samples, seqlen=args.seqlen, windows=windows, **asdict(base.settings))


if __name__ == "__main__":
    main()
