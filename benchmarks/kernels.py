"""Speed of the quantized linear on a GPU beside the machine's limits, cuBLAS bf16 and other libraries.

    python benchmarks/kernels.py --quick                                          # what must be shown at 1 and 8 tokens
    python benchmarks/kernels.py --peer glq --peer exllamav3 --out kernels.jsonl  # everything
    python benchmarks/kernels.py --rows kernels.jsonl          # table and picture of the last run in FILE, nothing run

One run measures all it compares. Every time is that of a launch in a CUDA graph of launches over a rotating pool of
layers that hold 1 GiB of codes (or bf16 weights) together, so that weights come from memory and not from the L2
cache: the median replay, by events, after warm-up, over the number of launches. Where a replay would take over
0.1 s (prefill), it has fewer launches, at least 4. A linear is measured whole, rotations and scale vectors included.
"Copy speed" counts bytes read and written by the fastest of a few device-to-device copies.

Peers build their extensions with nvcc and ninja on the machine: build them first, in the background, since one takes
minutes (benchmarks/peers.py). On a machine without network their wheels are carried in a folder and installed with

    python -m pip install --no-index --no-deps --no-compile --upgrade --target SITE WHEELS/*.whl
    export PYTHONPATH=SITE PATH=SITE/bin:$PATH TORCH_CUDA_ARCH_LIST=9.0 MAX_JOBS=16
    python benchmarks/peers.py build exllamav3

A peer that is not asked for or not installed leaves its lines of the table empty. `--shapes`, `--bits` and `--tokens`
replace the plan by exactly these; `--device cpu` is a rehearsal whose numbers mean nothing and are not kept.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peers import DTYPE, MODELS, VERSIONS, Job, encode_seconds, limits, load, measure, measure_layer
from results import append
from rich.console import Console
from rich.table import Table

WIDE, TALL, MIDDLE, SMALL = SHAPES = ((28672, 8192), (8192, 28672), (14336, 4096), (4096, 4096))  # N, K
TOKENS = (1, 8, 32, 64, 512, 2048, 8192)
ROOT = Path(__file__).parents[1]


def plan(args: argparse.Namespace) -> list[Job]:
    """What to measure, eightfold and cuBLAS first: a peer that fails then takes little with it."""
    jobs = []
    for N, K in args.shapes or SHAPES:
        more = (5, 6, 7, 8) if (N, K) == MIDDLE and not args.quick else ()
        for bits in args.bits or (2, 3, 4, *more):
            jobs.append(Job("eightfold", N, K, bits, "float16", _tokens(args, (N, K), bits)))
        jobs.append(Job("cublas", N, K, 16, "bfloat16", tuple(args.tokens or ((1, 8) if args.quick else TOKENS))))
    if not (args.quick or args.shapes or args.bits or args.tokens):
        jobs += [Job("eightfold", *MIDDLE, 4, "bfloat16", (1, 8, 2048)), Job("eightfold", *WIDE, 2, "bfloat16", (1,))]
    for peer in args.peer:
        tokens = (1, 8) if args.quick else (1, 8, 2048) if peer == "glq" else (1, 8, 32, 2048)
        for N, K in args.shapes or SHAPES:
            for bits in {2, 3, 4}.intersection(args.bits or (2, 3, 4)):
                jobs.append(Job(peer, N, K, bits, "float16", tuple(args.tokens or tokens)))
    return jobs


def _tokens(args: argparse.Namespace, shape: tuple[int, int], bits: int) -> tuple[int, ...]:
    if args.tokens or args.quick or bits > 4:
        return tuple(args.tokens or (1, 8))
    chosen = {1, 8, 32, 2048}
    if shape == MIDDLE and bits != 3:
        chosen.add(64)
    if shape in (WIDE, MIDDLE) and bits == 4:
        chosen |= {512, 8192}
    return tuple(sorted(chosen))


# --- measuring --------------------------------------------------------------------------------------------


def run(args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Measure everything, appending to `rows` as it is found."""

    def found(new: Sequence[dict[str, Any]]) -> None:
        rows.extend(new)
        for row in new:
            print(" ".join(f"{v:.5g}" if isinstance(v, float) else str(v) for v in row.values()), flush=True)
        gc.collect()
        if args.device.type == "cuda":
            torch.cuda.empty_cache()

    found(limits(args.device))
    copy = next(row["gb_per_s"] for row in rows if row["impl"] == "copy")
    jobs, pool = plan(args), args.pool_gib * 2**30
    whole = not (args.quick or args.shapes or args.bits or args.tokens)
    for job in jobs:
        if job.impl not in VERSIONS:
            found(measure(job, pool, copy, args.device))
    for model in MODELS if whole else ():
        found([measure_layer(model, bits, args.fused, pool, copy, args.device) for bits in (2, 4, 16)])
    if whole:
        seconds = encode_seconds(*MIDDLE, args.device)
        found([{"case": "encode", "impl": "eightfold", "bits": 2, "microseconds": seconds * 1e6}])
    for peer in args.peer:
        try:
            load(peer)
        except ImportError as error:
            found([{"case": "missing", "impl": peer, "reason": str(error)}])
            continue
        for job in jobs:
            if job.impl == peer:
                found(measure(job, pool, copy, args.device))


# --- what was found -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Line:
    """A line of the table: numbers `found` (None: not measured), each to be at least, or `at_most`, its `need`; no
    `need`, no verdict."""

    case: str
    measure: str
    found: tuple[float | None, ...]
    need: tuple[float, ...] = ()
    aim: tuple[float, ...] = ()
    unit: str = "×"
    at_most: bool = False

    def passed(self) -> list[bool | None]:
        """For each number whether it is as it must be, None where nothing is asked or found."""
        if not self.need:
            return [None] * len(self.found)
        return [
            None if x is None else (x <= need if self.at_most else x >= need)
            for x, need in zip(self.found, self.need, strict=True)
        ]

    def cells(self) -> tuple[str, str, str, str, str]:
        """The line as text."""
        scale, sign = (100 if self.unit == "%" else 1), ("≤ " if self.at_most else "≥ ")
        mark = {True: " ✓", False: " ✗", None: ""}
        shown = [
            "–" if x is None else f"{x * scale:.3g}{mark[verdict]}"
            for x, verdict in zip(self.found, self.passed(), strict=True)
        ]
        need, aim = (" / ".join(f"{x * scale:g}" for x in numbers) for numbers in (self.need, self.aim))
        return (
            self.case, self.measure, f"{sign}{need} {self.unit}" if need else "", f"{aim} {self.unit}" if aim else "",
            f"{' / '.join(shown)} {self.unit}",
        )  # fmt: skip


class Found:
    """Microseconds and shares of the copy by what was measured; None for what was not."""

    def __init__(self, rows: Sequence[dict[str, Any]]) -> None:
        linear = [row for row in rows if row["case"] == "linear" and row["dtype"] == DTYPE[row["impl"]]]
        self.rows = {(row["impl"], row["N"], row["K"], row["bits"], row["tokens"]): row for row in linear}
        self.limits = {row["impl"]: row for row in rows if row["case"] == "limit"}
        self.layers = {(row["model"], row["bits"]): row for row in rows if row["case"] == "layer"}
        self.encode = next((row["microseconds"] / 1e6 for row in rows if row["case"] == "encode"), None)

    def us(self, shape: tuple[int, int], bits: int, tokens: int, impl: str = "eightfold") -> float | None:
        return self.rows.get((impl, *shape, bits, tokens), {}).get("microseconds")

    def share(self, shape: tuple[int, int], bits: int) -> float | None:
        return self.rows.get(("eightfold", *shape, bits, 1), {}).get("share_of_copy")

    def gain(self, shape: tuple[int, int], bits: int, tokens: int, impl: str = "cublas") -> float | None:
        """How many times faster than `impl`."""
        other = self.us(shape, 16 if impl == "cublas" else bits, tokens, impl)
        return ratio(other, self.us(shape, bits, tokens))

    def gains(self, peer: str, tokens: Sequence[int]) -> list[float]:
        """How many times faster than a peer, wherever both were measured."""
        keys = [key for key in self.rows if key[0] == peer and key[4] in tokens]
        found = [self.gain((N, K), bits, count, peer) for _, N, K, bits, count in keys]
        return [x for x in found if x is not None]


def ratio(top: float | None, bottom: float | None) -> float | None:
    return None if top is None or not bottom else top / bottom


def lines(rows: Sequence[dict[str, Any]]) -> list[Line]:
    """The table of what must be shown, from rows alone."""
    f = Found(rows)
    copy, node = f.limits.get("copy", {}).get("gb_per_s"), f.limits.get("empty node", {}).get("microseconds", 0.0)
    share, bf16 = "share of copy speed", "against cuBLAS bf16"
    floor = None if copy is None else node + math.prod(SMALL) / 4 / copy / 1e3
    table = [
        *(
            Line(f"{named(s)}, 1 token, 2 / 3 / 4 bits", share, tuple(f.share(s, b) for b in (2, 3, 4)),
                 (0.66, 0.64, 0.72), (0.85,), "%")
            for s in (WIDE, TALL)
        ),
        Line(f"{named(MIDDLE)}, 1 token, 2 / 4 bits", share, tuple(f.share(MIDDLE, b) for b in (2, 4)),
             (0.40, 0.55), (0.65,), "%"),
        Line(f"{named(SMALL)}, 1 token, 2 bits", "against empty node + copy", (ratio(f.us(SMALL, 2, 1), floor),),
             (4.5,), (3,), at_most=True),
        *(
            Line(f"{named(s)}, 1 token, 4 / 2 bits", bf16, tuple(f.gain(s, b, 1) for b in (4, 2)), need, aim)
            for s, need, aim in (
                (WIDE, (2.9, 5.0), (3.5, 7)), (MIDDLE, (2.3, 3.2), (3, 4.5)), (SMALL, (1.6, 2), (2.2, 3)),
            )
        ),
        *(
            Line(f"{named(s)}, 8 tokens, {' / '.join(map(str, bits))} bits", "against 1 token",
                 tuple(ratio(f.us(s, b, 8), f.us(s, b, 1)) for b in bits), (1.25,) * len(bits), (1.1,), at_most=True)
            for s, bits in ((WIDE, (2, 3, 4)), (TALL, (2, 3, 4)), (MIDDLE, (2, 4)), (SMALL, (2, 4)))
        ),
        Line(f"{named(MIDDLE)}, 32 / 64 tokens, 4 bits", bf16, tuple(f.gain(MIDDLE, 4, t) for t in (32, 64)),
             (1.4, 1.0), (2.2, 1.8)),
        *(
            Line(f"{named(s)}, 512 / 2048 / 8192 tokens, 4 bits", bf16,
                 tuple(f.gain(s, 4, t) for t in (512, 2048, 8192)), (0.7, 0.85, 0.95), (1,))
            for s in (WIDE, MIDDLE)
        ),
        *(
            Line(f"{named(s)}, 1 token, 3 bits", "against the mean of 2 and 4 bits", (_three_bits(f, s),), (1.1,),
                 at_most=True)
            for s in (WIDE, TALL, MIDDLE)
        ),
    ]  # fmt: skip
    return [*table, *_peer_lines(f), *_other_lines(f, copy)]


def _three_bits(f: Found, shape: tuple[int, int]) -> float | None:
    two, three, four = (f.us(shape, bits, 1) for bits in (2, 3, 4))
    return None if two is None or four is None else ratio(three, (two + four) / 2)


def _peer_lines(f: Found) -> list[Line]:
    table = []
    for peer, few, many, mean, prefill in (
        ("glq", (1, 8), (2048,), (5.0, 8.0), (15.0, 30.0)),
        ("exllamav3", (1, 8, 32), (2048,), (2.0, 3.0), (1.0, 1.3)),
    ):
        gains, slow = f.gains(peer, few), f.gains(peer, many)
        case = f"{peer} {VERSIONS[peer]}, {', '.join(map(str, few))} tokens"
        product = math.exp(statistics.fmean(map(math.log, gains))) if gains else None
        table += [
            Line(case, f"the least of {len(gains)}", (min(gains, default=None),), (1,)),
            Line(case, f"geometric mean of {len(gains)}", (product,), mean[:1], mean[1:]),
            Line(
                f"{peer}, 2048 tokens",
                f"the least of {len(slow)}",
                (min(slow, default=None),),
                prefill[:1],
                prefill[1:],
            ),
        ]
    return table


def _other_lines(f: Found, copy: float | None) -> list[Line]:
    table = [Line("encode, 14336 × 4096, 2 bits", "time", (f.encode,), (0.05,), unit="s", at_most=True)]
    for model in dict.fromkeys(name for name, _ in f.layers):
        found = [f.layers.get((model, bits)) for bits in (2, 4)]
        dense = f.layers.get((model, 16), {}).get("microseconds")
        limit = tuple(None if row is None else 1 / row["share_of_copy"] for row in found)
        gain = tuple(None if row is None else ratio(dense, row["microseconds"]) for row in found)
        # Rows of earlier runs have no such time.
        apart = f.layers.get((model, 16), {}).get("between_microseconds")
        between = tuple(None if row is None else ratio(apart, row.get("between_microseconds")) for row in found)
        case = f"{model}, all linears of a layer, 1 token, 2 / 4 bits"
        table += [
            Line(case, "against bytes / copy speed", limit, at_most=True),
            Line(case, "against cuBLAS bf16", gain),
            Line(case, "the same, each behind a small kernel", between),
        ]
    return table


def named(shape: tuple[int, int]) -> str:
    return f"{shape[0]} × {shape[1]}"


def caption(rows: Sequence[dict[str, Any]]) -> str:
    """The limits that the table is relative to, the verdicts, and the peers that are missing."""
    f = Found(rows)
    verdicts = [x for line in lines(rows) for x in line.passed() if x is not None]
    words = [f"{sum(verdicts)} of {len(verdicts)} numbers as they must be"]
    if copy := f.limits.get("copy"):
        words.append(
            f"copy {copy['gb_per_s']:.0f} GB/s, empty graph node {f.limits['empty node']['microseconds']:.2f} µs"
        )
    there, missing = ({row["impl"]: row for row in rows if row["case"] == case} for case in ("linear", "missing"))
    for peer in VERSIONS:
        if peer in missing:
            words.append(f"{peer} is not installed here ({missing[peer]['reason']})")
        elif peer not in there:
            words.append(f"{peer} was not measured (--peer {peer})")
    return "; ".join(words)


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    table = Table(title="kernels", caption=caption(rows))
    for name in ("case", "measure", "at least", "aim", "found"):
        table.add_column(name, justify="left" if name in ("case", "measure") else "right")
    for line in lines(rows):
        table.add_row(*line.cells())
    Console(width=150).print(table)


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Share of copy speed at one token over the bytes of a layer's codes: a line per bit rate, peers as points."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    # Okabe and Ito's colours, which colour-blind people can tell apart.
    colours = dict(
        zip(range(2, 9), ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000"), strict=True)
    )
    markers = {"eightfold": "o", "exllamav3": "^", "glq": "s"}
    points: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for row in Found(rows).rows.values():
        if row["tokens"] == 1 and row["impl"] in markers:
            at = (row["code_bytes"] / 1e6, 100 * row["share_of_copy"])
            points.setdefault((row["impl"], row["bits"]), []).append(at)
    for (impl, bits), found in sorted(points.items()):
        x, y = zip(*sorted(found), strict=True)
        style = {"marker": markers[impl], "color": colours[bits], "label": f"{impl}, {bits} bits"}
        if impl == "eightfold":
            axes.plot(x, y, linewidth=2, markersize=7, **style)
        else:
            axes.plot(x, y, linestyle="none", markersize=6, markerfacecolor="white", **style)
    axes.set_xscale("log")
    axes.set_ylim(0, 100)
    axes.set_xticks([4, 8, 16, 32, 64, 128], labels=["4", "8", "16", "32", "64", "128"])
    axes.xaxis.minorticks_off()
    axes.grid(alpha=0.3)
    axes.set(xlabel="codes of the layer, MB", ylabel="code bytes per second, % of device copy")
    axes.set_title("A whole quantized linear, 1 token")
    if points:
        axes.legend(fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def keep(rows: list[dict[str, Any]], args: argparse.Namespace) -> None:
    """Append the run to benchmarks/results/kernels.jsonl, and the same line to --out."""
    settings = {"quick": args.quick, "pool_gib": args.pool_gib, "fused": args.fused}
    path = append("kernels", rows, **settings)
    if args.out is not None:
        with args.out.open("a", encoding="utf-8") as file:
            file.write(path.read_text(encoding="utf-8").splitlines()[-1] + "\n")


def shape(text: str) -> tuple[int, int]:
    N, _, K = text.partition("x")
    return int(N), int(K)


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="only what must be shown at 1 and 8 tokens: under a minute"
    )
    parser.add_argument("--shapes", type=shape, nargs="*", metavar="NxK")
    parser.add_argument("--bits", type=int, nargs="*")
    parser.add_argument("--tokens", type=int, nargs="*")
    parser.add_argument("--peer", action="append", default=[], choices=list(VERSIONS))
    parser.add_argument(
        "--fused", action=argparse.BooleanOptionalAction, default=True, help="q/k/v, gate/up as one linear"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="append the run's line of JSON to FILE, too")
    parser.add_argument("--rows", type=Path, metavar="FILE", help="measure nothing, show the last run in FILE")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs" / "kernels.png", metavar="PNG")
    parser.add_argument("--no-picture", action="store_true")
    parser.add_argument("--pool-gib", type=float, default=1.0, help="weights to rotate over")
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    return parser


def main() -> None:
    args = options().parse_args()
    rows: list[dict[str, Any]] = []
    if args.rows is not None:
        rows = json.loads(args.rows.read_text(encoding="utf-8").splitlines()[-1])["rows"]
    else:
        try:
            with torch.no_grad():
                run(args, rows)
        finally:  # what was found before a failure is worth keeping
            if rows and args.device.type == "cuda":
                keep(rows, args)
            print_table(rows)
    if args.rows is not None:
        print_table(rows)
    if not args.no_picture:
        draw(rows, args.picture)


if __name__ == "__main__":
    main()
