"""Perplexity of quantized models against the original, with stored bits per original weight beside it.

    python benchmarks/quality.py --model REFERENCE_LM --calibration calibration.txt --text eval.txt

quantizes MODEL at every rate with the default layout, and at 2 bits with every layout (with the rate without padding
that stores as much as the padded one), evaluates each on all of the text, prints the table and appends the rows to
benchmarks/results/quality.jsonl. `--cuts 2 4 8` adds the rotation blocks that tensor parallelism of these sizes would
leave. `--set name=value` changes a setting of quantize.Settings for an experiment.
"""

from __future__ import annotations

import argparse
import ast
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from results import append
from rich.console import Console
from rich.table import Table

from eightfold.folder import ModelFolder
from eightfold.format import LayerSpec, stored_bits
from eightfold.pipeline import quantize_model
from eightfold.preflight import DEFAULT_LAYOUT, Plan, Request, make_plan
from eightfold.quantize import Settings
from eightfold.tensor_parallel import cut_side

LAYOUTS = ("pow2-sum-256", "pow2-sum", "equal-64", "equal-256", "pow2")
# What the reference model must show: stored bits at most, ratio at most, the aim.
REQUIRED = {2: (2.15, 1.175, 1.11), 3: (3.15, 1.032, 1.019), 4: (4.15, 1.0040, 1.003)}


class Quiet:
    """A listener that says nothing."""

    def phase(self, name: str, steps: int) -> None: ...

    def advance(self, steps: int) -> None: ...

    def note(self, text: str) -> None: ...

    def layer(self, record: dict[str, Any]) -> None: ...


def cut(plan: Plan, cuts: int) -> Plan:
    """The plan with the rotation blocks that a cut among so many devices leaves, whether kernels and heads allow it or
    not: blocks down to 8, key heads cut into as many parts as there are."""
    config = plan.folder.config

    def blocks(size: int, pieces: int) -> tuple[int, ...]:
        part, cap = size // pieces, 256
        rest = tuple(1 << k for k in reversed(range(8)) if part % cap >> k & 1)
        return ((cap,) * (part // cap) + rest) * pieces

    def spec(name: str, own: LayerSpec) -> LayerSpec:
        if cut_side(config, name) == "in":
            return replace(own, in_blocks=blocks(own.in_features, cuts))
        pieces = min(cuts, config.num_key_value_heads) if name.endswith(("k_proj", "v_proj")) else cuts
        return replace(own, out_blocks=blocks(own.out_features, pieces))

    layers = {name: spec(name, own) for name, own in plan.config.layers.items()}
    return replace(plan, config=replace(plan.config, layers=layers))


def measure(request: Request, cuts: int = 1) -> dict[str, Any]:
    """Quantize and evaluate as `request` says, in a folder that is thrown away."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        plan = make_plan(replace(request, out=str(Path(folder) / "out")))
        plan = plan if cuts == 1 else cut(plan, cuts)
        outcome = quantize_model(plan, Quiet())
        config = ModelFolder(outcome.path).quantization
    assert config is not None
    losses = [linear for record in outcome.records for linear in record["linears"].values()]
    return {
        "model": Path(request.model).name,
        "bits": request.bits,
        "layout": request.layout,
        "codebook": request.settings.codebook,
        "tp_max": plan.config.tp_max,
        "cuts": cuts,
        "stored_bits": stored_bits(config.layers.values(), config.scale_dtype),
        "rates": {bits: sum(spec.bits == bits for spec in config.layers.values()) for bits in config.recipes},
        **outcome.verdict.evaluation.to_dict(),
        "mean_proxy_loss": sum(linear["proxy_loss"] for linear in losses) / len(losses),
        "mean_sqnr_db": sum(linear["sqnr_db"] for linear in losses) / len(losses),
        "seconds": time.perf_counter() - start,
    }


def print_table(rows: list[dict[str, Any]]) -> None:
    """The rows as people read them, with what the reference model is asked for."""
    table = Table(title="quality: ratio of perplexities, quantized / original")
    for name in ("model", "bits", "layout", "stored bits", "ratio ± s.e.", "KL", "top-1", "asked", "aim", "seconds"):
        table.add_column(name, justify="left" if name in ("model", "layout") else "right")
    for row in rows:
        known = REQUIRED.get(row["bits"]) if row["model"] == "reference-lm" and row["layout"] != "pow2" else None
        table.add_row(
            row["model"], str(row["bits"]), row["layout"], f"{row['stored_bits']:.3f}",
            f"{row['ratio']:.4f} ± {row['ratio_se']:.4f}", f"{row['kl']:.4f}", f"{row['top1']:.4f}",
            f"{known[1]:g} at {known[0]:g}" if known else "", f"{known[2]:g}" if known else "", f"{row['seconds']:.0f}",
        )  # fmt: skip
    Console(width=150, file=sys.stdout).print(table)


def add_options(parser: argparse.ArgumentParser) -> None:
    """What every comparison of quality can be told."""
    parser.add_argument("--calibration")
    parser.add_argument("--text")
    parser.add_argument("--bits", type=int, nargs="*", default=[2, 3, 4])
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=100_000)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="float32")


def base_request(args: argparse.Namespace, settings: Settings) -> Request:
    """The request that the options say, without a gate; 2 bits."""
    return Request(
        args.model, "", 2, args.calibration, args.samples, args.seqlen, args.device, args.dtype, tp_max=1,
        eval_text=args.text, eval_windows=args.windows, max_ratio=100.0, settings=settings,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    add_options(parser)
    parser.add_argument("--layouts", nargs="*", default=list(LAYOUTS), help="compared at --layout-bits")
    parser.add_argument("--layout-bits", type=int, nargs="*", default=[2])
    parser.add_argument("--cuts", type=int, nargs="*", default=[], help="as tp_max would cut, whatever the heads say")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE")
    args = parser.parse_args()

    changes = {name: ast.literal_eval(value) for name, _, value in (item.partition("=") for item in args.set)}
    base = base_request(args, replace(Settings(), **changes))
    jobs = [replace(base, bits=bits) for bits in args.bits]
    jobs += [
        replace(base, bits=bits, layout=layout)
        for bits in args.layout_bits
        for layout in args.layouts
        if layout != DEFAULT_LAYOUT or bits not in args.bits
    ]
    if "pow2" in args.layouts:
        jobs.append(replace(base, bits=5))  # about what the padded power of two stores at 2 bits on reference-lm
    pairs = [(job, 1) for job in jobs] + [(replace(base, bits=bits), cuts) for bits in args.bits for cuts in args.cuts]
    rows = []
    for job, cuts in pairs:
        rows.append(measure(job, cuts))
        said = ("bits", "layout", "cuts", "stored_bits", "ratio", "ratio_se", "kl", "seconds")
        print({key: rows[-1][key] for key in said}, flush=True)
    print_table(rows)
    settings = asdict(base.settings)
    append(
        "quality",
        rows,
        samples=args.samples,
        seqlen=args.seqlen,
        windows=rows[0]["windows"],
        dtype=args.dtype,
        tf32=torch.backends.cuda.matmul.allow_tf32,
        **settings,
    )


if __name__ == "__main__":
    main()
