"""What a comparison of served models looks like: a table, a picture; and the same numbers as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eightfold.console import size
from eightfold.files import to_json, write_text
from eightfold.serve_bench import Load, Speed

NUMBERS, PICTURE = "serve.json", "serve.png"


@dataclass(frozen=True, slots=True)
class Comparison:
    """Models under one load, the first of them what the others are compared with. `copy_speed`: bytes a second of the
    GPU's memory; `machine`: name of the GPU, versions."""

    speeds: list[Speed]
    load: Load
    copy_speed: float
    machine: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        load = {"sequences": list(self.load.sequences), "tokens": self.load.tokens, "prompt": self.load.prompt}
        load |= {"devices": self.load.devices}
        speeds = [speed.to_dict() for speed in self.speeds]
        return {"machine": self.machine, "load": load, "copy_bytes_per_second": self.copy_speed, "models": speeds}


def columns(comparison: Comparison) -> list[str]:
    """Heads of the table."""
    counts = comparison.load.sequences
    names = ["model", "weights", f"first token of {comparison.load.prompt}"]
    names += [f"{count} seq. tok/s" for count in counts]
    return names + [f"{count} seq. GPU step" for count in counts] + [f"{counts[0]} seq. step / reading weights"]


def cells(comparison: Comparison) -> list[list[str]]:
    """The table: a row for each model, ratios to the first in brackets (above 1: faster)."""
    base = comparison.speeds[0]
    rows = []
    for speed in comparison.speeds:
        other = speed is not base
        row = [speed.name + (" (random weights)" if speed.random else ""), size(speed.weight_bytes)]
        row.append(f"{speed.first_token_ms:.0f} ms" + _ratio(other, base.first_token_ms, speed.first_token_ms))
        for count in comparison.load.sequences:
            rate = speed.tokens_per_second[count]
            row.append(f"{rate:,.0f}" + _ratio(other, rate, base.tokens_per_second[count]))
        for count in comparison.load.sequences:
            step = speed.step_ms[count]
            row.append(f"{step:.2f} ms" + _ratio(other, base.step_ms[count], step))
        reading = 1e3 * speed.weight_bytes / comparison.load.devices / comparison.copy_speed
        rows.append([*row, f"{speed.step_ms[comparison.load.sequences[0]] / reading:.2f}"])
    return rows


def write_comparison(comparison: Comparison, folder: Path) -> None:
    """Write the numbers and the picture into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / NUMBERS, to_json(comparison.to_dict()))
    picture(comparison, folder / PICTURE)


def picture(comparison: Comparison, path: Path) -> None:
    """Tokens per second, and GPU time of a decode step, by the number of sequences: a line for each model. A PNG."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    figure = Figure(figsize=(9, 4.2), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    for speed in comparison.speeds:
        counts = list(speed.tokens_per_second)
        left.plot(counts, list(speed.tokens_per_second.values()), marker="o", label=speed.name)
        right.plot(counts, [speed.step_ms[count] for count in counts], marker="o", label=speed.name)
    for axes, what in ((left, "tokens per second, all sequences"), (right, "GPU time of a decode step, ms")):
        axes.set_xscale("log", base=2)
        axes.set_xticks(comparison.load.sequences, [str(count) for count in comparison.load.sequences])
        axes.set_xlabel("sequences at once")
        axes.set_title(what, fontsize=10)
        axes.grid(alpha=0.25, which="both")
    left.set_yscale("log")
    left.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    left.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    left.yaxis.set_minor_formatter(NullFormatter())
    right.set_ylim(bottom=0)
    left.legend(fontsize=8)
    note = "random weights" if any(speed.random for speed in comparison.speeds) else ""
    figure.suptitle(", ".join(filter(None, [*comparison.machine.values(), note])), fontsize=9)
    figure.savefig(path)


def told(speed: Speed) -> str:
    """One model's numbers in a line, for who waits for the others."""
    parts = [f"first token {speed.first_token_ms:.0f} ms"]
    for count, rate in speed.tokens_per_second.items():
        parts.append(f"{count} at once {rate:,.0f} tokens/s, GPU step {speed.step_ms[count]:.2f} ms")
    return f"{speed.name}: {'; '.join(parts)}"


def notes(speeds: Sequence[Speed]) -> list[str]:
    """What a reader must know of the numbers."""
    made_up = [speed.name for speed in speeds if speed.random]
    if not made_up:
        return []
    return [f"Random weights, which say nothing of quality and generate nonsense: {'; '.join(made_up)}."]


def _ratio(other: bool, first: float, second: float) -> str:
    return f" ({first / second:.2f}×)" if other else ""
