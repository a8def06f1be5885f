"""Quantizing tiny models with tiny settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from eightfold import bundled
from eightfold.preflight import Request
from eightfold.quantize import Settings

QUICK = Settings(multipliers=(1.0,))


def small_text(folder: Path) -> Path:
    """A text of some thousand tokens in `folder`."""
    file = folder / "text.txt"
    if not file.exists():
        file.write_text(bundled.evaluation_text().read_text(encoding="utf-8")[:20_000], encoding="utf-8")
    return file


def small_request(model: Path, out: Path, bits: float | None = 2, **more: Any) -> Request:
    """A request that any tiny model passes within seconds; a random model's perplexity says nothing."""
    text = str(small_text(out.parent))
    small: dict[str, Any] = {"calibration": text, "eval_text": text, "samples": 4, "seqlen": 32, "eval_windows": 2}
    small |= {"sensitivity_samples": 2, "max_ratio": 1e9, "device": "cpu", "settings": QUICK}
    return Request(str(model), str(out), bits, **small | more)


class Silent:
    """A listener that keeps what it is told."""

    def __init__(self) -> None:
        self.phases: list[tuple[str, int]] = []
        self.steps: dict[str, int] = {}
        self.records: list[dict[str, Any]] = []
        self.notes: list[str] = []

    def phase(self, name: str, steps: int) -> None:
        self.phases.append((name, steps))

    def advance(self, steps: int) -> None:
        name = self.phases[-1][0]
        self.steps[name] = self.steps.get(name, 0) + steps

    def note(self, text: str) -> None:
        self.notes.append(text)

    def layer(self, record: dict[str, Any]) -> None:
        self.records.append(record)


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file under `folder` with its content."""
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}
