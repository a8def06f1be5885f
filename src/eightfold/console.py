"""What the commands say and where: results on standard output, or one JSON object there; all else on standard error."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from eightfold.finite import without_infinity

WIDTH = 160  # of tables in a pipe or a file
PHASES = {
    "sensitivity": "measuring what each output matters",
    "rates": "measuring what each rate costs",
    "layers": "quantizing",
    "writing": "writing the checkpoint",
    "evaluating": "evaluating",
    "generating": "generating",
    "files": "hashing files",
    "linears": "checking linears",
    "others": "checking other tensors",
    "tensors": "converting tensors",
    "loading": "loading through transformers",
    "uploading": "uploading",
    "downloading": "downloading what was uploaded",
}


class Terminal:
    """Two consoles, and the one JSON object if it was asked for (`as_json`)."""

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json
        self.notes = _console(stderr=True)
        self.results = self.notes if as_json else _console(stderr=False)
        self._stdout = sys.stdout

    def note(self, text: str) -> None:
        """A line on standard error."""
        self.notes.print(text, soft_wrap=True)

    def say(self, text: str) -> None:
        """A line of the results."""
        self.results.print(text, soft_wrap=True)

    def mute(self) -> None:
        """Say nothing but failures: another process speaks for all."""
        self.as_json = False
        self.notes.quiet = self.results.quiet = True

    def fail(self, text: str) -> None:
        """A line about what ends the command, on standard error."""
        self.notes.quiet = False
        self.note(text)

    def finish(self, content: dict[str, Any]) -> None:
        """End with the JSON object, if it was asked for."""
        if self.as_json:
            self._stdout.write(json.dumps(without_infinity(content), allow_nan=False) + "\n")
            self._stdout.flush()

    @contextmanager
    def progress(self) -> Iterator[Steps]:
        """A bar with the time that is left, where standard error is a terminal; a line for each phase elsewhere."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        bar = Progress(
            *columns,
            console=self.notes,
            disable=not self.notes.is_terminal,
            transient=True,
            speed_estimate_period=3600,
        )
        with bar:
            yield Steps(bar, self)


class Steps:
    """The Listener of the pipeline: phases with steps, and a line for each quantized layer."""

    def __init__(self, bar: Progress, terminal: Terminal) -> None:
        self._bar, self._terminal = bar, terminal
        self._task: TaskID | None = None
        self._done, self._steps, self._start = 0, 0, time.monotonic()
        self._quantized = 0
        self.prefix = ""  # before every phase: which of several models it is about

    def phase(self, name: str, steps: int) -> None:
        """A phase of so many steps begins."""
        description = self.prefix + PHASES.get(name, name)
        if self._task is not None:
            self._bar.remove_task(self._task)
        self._task = self._bar.add_task(description, total=steps)
        self._done, self._steps, self._start, self._quantized = 0, steps, time.monotonic(), 0
        if not self._terminal.notes.is_terminal:
            self._terminal.note(description)

    def advance(self, steps: int) -> None:
        """So many more steps of it are done."""
        self._done += steps
        if self._task is not None:
            self._bar.advance(self._task, steps)

    def note(self, text: str) -> None:
        """A line about what was found."""
        self._terminal.note(text)

    def layer(self, record: dict[str, Any]) -> None:
        """A layer is quantized: one line with its losses."""
        self._quantized += 1
        number = min(self._done + 1, self._steps)
        each = (time.monotonic() - self._start) / self._quantized
        left = f"  {duration(each * (self._steps - number))} left" if number < self._steps else ""
        self._terminal.note(f"{number:>3}/{self._steps}  {layer_line(record)}{left}")


def layer_line(record: dict[str, Any]) -> str:
    """A record of a layer in words: mean proxy loss, mean and lowest SQNR, seconds."""
    losses = record["linears"]
    proxy = sum(each["proxy_loss"] for each in losses.values()) / len(losses)
    sqnr = sum(each["sqnr_db"] for each in losses.values()) / len(losses)
    lowest = min(losses, key=lambda name: losses[name]["sqnr_db"])
    worst = f"lowest {losses[lowest]['sqnr_db']:.2f}, {lowest.removeprefix(record['layer'] + '.')}"
    return f"{record['layer']}  proxy loss {proxy:.4g}  SQNR {sqnr:.2f} dB ({worst})  {duration(record['seconds'])}"


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Inside, transformers shows no bars of its own and says nothing below an error."""
    import huggingface_hub.utils as hub
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    downloads = hub.are_progress_bars_disabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()  # those of downloads, too
    if sys.stderr.isatty():
        hub.enable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
        (hub.disable_progress_bars if downloads else hub.enable_progress_bars)()


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], title: str | None = None) -> Table:
    """The first column to the left, the others to the right; a column called "" needs no head."""
    result = Table(box=None, pad_edge=False, title=title, title_justify="left", padding=(0, 2, 0, 0))
    for i, name in enumerate(columns):
        result.add_column(name, justify="right" if i else "left", overflow="fold")
    for row in rows:
        result.add_row(*row)
    return result


def pairs(rows: Sequence[tuple[str, str]]) -> Table:
    """Two columns: what, and the value."""
    result = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    result.add_column(no_wrap=True, style="bold")
    result.add_column(overflow="fold")
    for row in rows:
        result.add_row(*row)
    return result


def size(count: int) -> str:
    """Bytes in decimal units: "2.28 MB"."""
    value, unit = float(count), "bytes"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{count} bytes" if unit == "bytes" else f"{value:.3g} {unit}" if value < 999.5 else f"{value:.0f} {unit}"


def duration(seconds: float) -> str:
    """ "0.4 s", "21 s", "3 min 20 s", "2 h 05 min"."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def plus_minus(value: float, error: float | None, digits: int = 4) -> str:
    """A value with its standard error; without one for a single window."""
    return f"{value:.{digits}f}" if error is None else f"{value:.{digits}f} ± {error:.{digits}f}"


def _console(stderr: bool) -> Console:
    console = Console(stderr=stderr, markup=False, highlight=False, emoji=False)
    if not console.is_terminal:
        console.width = WIDTH
    return console
