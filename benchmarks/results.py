"""Append what a benchmark measured to benchmarks/results/NAME.jsonl: one line a run, with machine, versions, commit."""

from __future__ import annotations

import json
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

import eightfold

FOLDER = Path(__file__).parent / "results"


def append(name: str, rows: list[dict[str, Any]], **settings: Any) -> Path:
    """One JSON line: the rows that were measured, the settings, and where and with what."""
    line = {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **machine(), "settings": settings, "rows": rows}
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / f"{name}.jsonl"
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    return path


def machine() -> dict[str, Any]:
    """Processor, accelerator, versions and commit."""
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    return {
        "cpu": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "eightfold": eightfold.__version__,
        "commit": _commit(),
    }


def _commit() -> str | None:
    """The commit, with a + where the working tree differs from it; None outside a git checkout."""
    here = Path(__file__).parent
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True)
        status = subprocess.run(["git", "status", "--porcelain"], cwd=here, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+" if status.stdout.strip() else "")
