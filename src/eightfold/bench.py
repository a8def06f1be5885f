"""The command `eightfold bench`."""

from __future__ import annotations

import platform
import tempfile
from argparse import Namespace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import eightfold
from eightfold.console import Terminal, table
from eightfold.serve_bench import Load, copy_speed, measure, models
from eightfold.serve_report import Comparison, cells, columns, notes, told, write_comparison
from eightfold.shapes import Rate


def run_bench(options: Namespace, terminal: Terminal) -> tuple[int, dict[str, Any]]:
    """Serve each model and time it; a table, and files if asked for."""
    # Not is_available, after which vLLM's processes could not use CUDA.
    if not torch.cuda.device_count():
        raise ValueError("bench serve needs a CUDA device, there is none")
    load = Load(tuple(sorted(set(options.sequences))), options.tokens, options.prompt, options.tp, options.memory)
    rates = [Rate(*rate) for rate in options.bits]
    with tempfile.TemporaryDirectory() as folder:
        chosen = models(options.model, rates, options.against, options.baseline, Path(folder))
        speeds = []
        for model in chosen:
            speeds.append(measure(model, load, terminal.note))
            terminal.note(told(speeds[-1]))
    comparison = Comparison(speeds, load, copy_speed(), machine())
    terminal.results.print(table(columns(comparison), cells(comparison)))
    for note in notes(speeds):
        terminal.say(note)
    if options.out:
        write_comparison(comparison, Path(options.out))
        terminal.say(f"Numbers and picture: {options.out}")
    return 0, comparison.to_dict()


def machine() -> dict[str, str]:
    """The GPU, and the versions that speed hangs on."""
    return {
        "gpu": torch.cuda.get_device_name(0),
        "vllm": f"vLLM {metadata.version('vllm')}",
        "torch": f"torch {torch.__version__}",
        "eightfold": f"eightfold {eightfold.__version__}",
        "python": f"Python {platform.python_version()}",
    }
