"""What a comparison of quantized models looks like: a table, a picture, a page; and the same numbers as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eightfold.console import plus_minus, size
from eightfold.evaluate import EvalResult
from eightfold.files import to_json, write_text

PAGE, NUMBERS, PICTURE = "report.md", "report.json", "perplexity.png"
COLUMNS = (
    "model",
    "bits",
    "stored bits",
    "weight files",
    "perplexity",
    "ratio to the original",
    "KL divergence (nats)",
    "top-1 agreement",
)


@dataclass(frozen=True, slots=True)
class Row:
    """One quantized model. `bits` nominal, `stored_bits` per original weight of the quantized linears, `file_bytes` of
    the weight files; `evaluation` against the original; `samples`: (prompt, continuation); `reasons` why the gate
    failed it, none if it passed."""

    name: str
    bits: int
    stored_bits: float
    file_bytes: int
    evaluation: EvalResult
    samples: list[tuple[str, str]]
    reasons: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "name": self.name,
            "bits": self.bits,
            "stored_bits": self.stored_bits,
            "file_bytes": self.file_bytes,
            "evaluation": self.evaluation.to_dict(),
            "samples": samples_json(self.samples),
            "reasons": self.reasons,
        }


@dataclass(frozen=True, slots=True)
class Original:
    """The model that was quantized. `bits`: of its weights as they are stored; `evaluation`: of it alone."""

    name: str
    bits: float
    file_bytes: int
    evaluation: EvalResult
    samples: list[tuple[str, str]]

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "name": self.name,
            "bits": self.bits,
            "file_bytes": self.file_bytes,
            "evaluation": self.evaluation.to_dict(),
            "samples": samples_json(self.samples),
        }


@dataclass(frozen=True, slots=True)
class Report:
    """An original and what was made of it. `conditions`: what was done with which settings, for JSON."""

    original: Original
    rows: list[Row]
    conditions: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "conditions": self.conditions,
            "original": self.original.to_dict(),
            "quantized": [row.to_dict() for row in self.rows],
        }


def write_report(report: Report, folder: Path) -> None:
    """Write the page, the numbers and the picture into `folder`."""
    picture(report, folder / PICTURE)
    write_text(folder / NUMBERS, to_json(report.to_dict()))
    write_text(folder / PAGE, markdown(report))


def cells(report: Report) -> list[list[str]]:
    """The table under COLUMNS, the original first."""
    original, alone = report.original, report.original.evaluation
    rows = [
        [
            original.name,
            f"{original.bits:g}",
            f"{original.bits:g}",
            size(original.file_bytes),
            plus_minus(alone.perplexity, alone.perplexity_se, 3),
            "1",
            "0",
            "1",
        ]
    ]
    for row in report.rows:
        found = row.evaluation
        rows.append(
            [
                row.name,
                str(row.bits),
                f"{row.stored_bits:.3f}",
                size(row.file_bytes),
                plus_minus(found.perplexity, found.perplexity_se, 3),
                plus_minus(_known(found.ratio), found.ratio_se),
                plus_minus(_known(found.kl), found.kl_se),
                plus_minus(_known(found.top1), found.top1_se),
            ]
        )
    return rows


def markdown(report: Report) -> str:
    """The page: table, picture, what the numbers mean, generated text."""
    found = report.original.evaluation
    lines = [
        f"# {report.original.name}, quantized by eightfold",
        "",
        *_markdown_table(COLUMNS, cells(report)),
        "",
        f"![Perplexity against stored bits]({PICTURE})",
        "",
        f"Evaluated on {found.windows} windows, {found.tokens:,} predicted tokens. ± is the standard error over "
        "windows; the ratio's is much smaller than the perplexities' because both models read the same windows. "
        "Stored bits are what the file spends per original weight of the quantized linears; the weight files also "
        "hold what is not quantized (embeddings, norms).",
        "",
        f"Settings: {', '.join(f'{key} {value}' for key, value in report.conditions.items())}.",
        "",
        "## Generated text",
        "Sampled at temperature 1 with the same seed.",
    ]
    for prompt, text in report.original.samples:
        lines += ["", *_quoted("prompt", prompt), *_quoted(report.original.name, text)]
        for row in report.rows:
            lines += [line for p, t in row.samples if p == prompt for line in _quoted(row.name, t)]
    for row in report.rows:
        lines += ["", *(f"**{row.name} failed the gate**: {reason}." for reason in row.reasons)]
    return "\n".join(lines).rstrip() + "\n"


def picture(report: Report, path: Path) -> None:
    """Perplexity against stored bits as a PNG: a point with its standard error per model, a line for the original."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    original = report.original.evaluation.perplexity
    bits = [row.stored_bits for row in report.rows]
    values = [row.evaluation.perplexity for row in report.rows]
    # The error of the ratio, times the original: text that is hard is hard for both, and no fault of the codes.
    errors = [(row.evaluation.ratio_se or 0.0) * original for row in report.rows]
    axes.axhline(original, color="0.45", linestyle="--", linewidth=1.2, zorder=1)
    axes.errorbar(
        bits, values, yerr=errors, marker="o", markersize=6, linewidth=1.6, capsize=4, color="#1f5fa8", zorder=2
    )
    span = max(*values, original) - min(*values, original) or 1.0
    left, right = min(bits), max(bits)
    margin = max(0.12 * (right - left), 0.25)
    axes.set_xlim(left - margin, right + 2.2 * margin)
    axes.set_ylim(min(*values, original) - 0.14 * span, max(*values, original) + 0.14 * span)
    for x, y, row in zip(bits, values, report.rows, strict=True):
        text = f"{y:.3f}\n× {_known(row.evaluation.ratio):.4f}"
        axes.annotate(text, (x, y), (9, 7), textcoords="offset points", fontsize=9)
    axes.annotate(
        f"original {original:.3f}",
        (left - margin, original),
        (6, -5),
        textcoords="offset points",
        fontsize=9,
        color="0.3",
        va="top",
    )
    axes.set_xlabel("stored bits per original weight of the quantized linears")
    axes.set_ylabel("perplexity")
    axes.set_title(f"{report.original.name} (bars: standard error of the ratio to the original)", fontsize=10)
    axes.grid(alpha=0.25)
    figure.savefig(path)


def samples_json(samples: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    """(prompt, continuation) pairs as JSON objects."""
    return [{"prompt": prompt, "continuation": text} for prompt, text in samples]


def _known(value: float | None) -> float:
    if value is None:
        raise ValueError("expected an evaluation against the original, this one was made without")
    return value


def _markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    rule = ["---", *("---:" for _ in columns[1:])]
    return [f"| {' | '.join(row)} |" for row in (columns, rule, *rows)]


def _quoted(name: str, text: str) -> list[str]:
    """A bullet whose text is code, so that whatever a model says is shown and not rendered."""
    plain = " ".join(text.split()).replace("`", "'")
    return [f"- {name}: `{plain}`"]
