"""The whole way on the language model that ships with the package: quantized at several rates, judged, reported."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from eightfold import bundled
from eightfold.calibration import windows as cut_windows
from eightfold.evaluate import evaluate
from eightfold.folder import ModelFolder
from eightfold.gate import NEW_TOKENS, PROMPT_TOKENS, PROMPTS, generate
from eightfold.inspect import inspect
from eightfold.pipeline import Listener, Outcome, quantize_model
from eightfold.preflight import Request, make_plan
from eightfold.report import Original, Report, Row, write_report
from eightfold.workspace import discard


class DemoListener(Listener, Protocol):
    """A listener that is also told which of the models comes: `prefix` stands before its phases."""

    prefix: str


@dataclass(frozen=True, slots=True)
class DemoSettings:
    """Small enough for minutes on two cores. Windows of `seqlen` tokens, for calibration and evaluation alike."""

    bits: tuple[int, ...] = (2, 3, 4)
    samples: int = 64
    seqlen: int = 512
    sensitivity_samples: int = 16
    eval_windows: int = 64


def run_demo(out: str | Path, listener: DemoListener, settings: DemoSettings | None = None) -> Report:
    """Quantize the bundled model at each rate into the folder `out`, and write the report there.

    Checkpoints that an earlier demo left in the folder are replaced, other files left alone. Raises ValueError for an
    `out` that is a file, or a checkpoint's name taken by another folder.
    """
    settings = settings or DemoSettings()
    out, source = Path(out), bundled.tiny_lm()
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out}: expected a folder to write the report to, it is a file")
    out.mkdir(parents=True, exist_ok=True)
    outcomes: dict[int, Outcome] = {}
    for bits in settings.bits:
        target = out / f"{source.name}-{bits}bit"
        listener.prefix = f"{bits} bits: "
        discard(target)  # of an interrupted demo, perhaps by another version; it takes a minute to make anew
        request = Request(
            str(source),
            str(target),
            bits,
            samples=settings.samples,
            seqlen=settings.seqlen,
            sensitivity_samples=settings.sensitivity_samples,
            eval_windows=settings.eval_windows,
            device="cpu",
        )
        outcomes[bits] = quantize_model(make_plan(request), listener)
        failed = target.with_name(target.name + ".failed")
        if outcomes[bits].verdict.passed and failed.is_dir():
            shutil.rmtree(failed)  # an earlier demo's
    listener.prefix = "original: "
    rows = [_row(bits, outcome) for bits, outcome in outcomes.items()]
    conditions = {"calibration samples": settings.samples, "tokens a sample": settings.seqlen}
    report = Report(_original(source, settings, listener), rows, conditions)
    write_report(report, out)
    return report


def _row(bits: int, outcome: Outcome) -> Row:
    facts = inspect(outcome.path)
    verdict = outcome.verdict
    if verdict.evaluation is None:
        raise ValueError(f"{outcome.path}: {'; '.join(verdict.reasons)}")
    return Row(
        outcome.path.name,
        bits,
        facts.stored_bits,
        facts.file_bytes,
        verdict.evaluation,
        verdict.samples,
        verdict.reasons,
    )


def _original(source: Path, settings: DemoSettings, listener: Listener) -> Original:
    """The original's own numbers, on the very windows and prompts of the quantized ones."""
    from transformers import AutoTokenizer

    folder = ModelFolder(source)
    tokenizer = AutoTokenizer.from_pretrained(source)
    windows = cut_windows(None, tokenizer, settings.seqlen, limit=settings.eval_windows)
    listener.phase("evaluating", 1)
    alone = evaluate(folder, windows)
    listener.advance(1)
    listener.phase("generating", 1)
    samples, _ = generate(source, windows[:PROMPTS, :PROMPT_TOKENS], torch.device("cpu"), torch.float32, NEW_TOKENS)
    listener.advance(1)
    size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    return Original(source.name, 16, size, alone, samples)
