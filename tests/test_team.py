"""Several processes (gloo, on the CPU) quantize as one does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from models import write_model
from small import files_of, small_text

from eightfold.checkpoint import partial_path


def command(model: Path, out: Path, processes: int, **more: Any) -> list[str]:
    text = small_text(out.parent)
    options = {"samples": 5, "seqlen": 32, "calibration": text, "eval-text": text, "bits": 2, "max-ratio": 1e9} | more
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    several = ["--gpus", str(processes)] if processes > 1 else []
    return [sys.executable, "-m", "eightfold", "quantize", str(model), str(out), "--device", "cpu", *words, *several]


def run(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model("llama-tied", tmp_path_factory.mktemp("model"))


def test_two_processes_write_what_one_does(model: Path, tmp_path: Path) -> None:
    """Rates that are to be found, too."""
    for processes in (1, 2):
        done = run(command(model, tmp_path / f"out-{processes}", processes, bits=2.5))
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("Done:") == 1
    assert files_of(tmp_path / "out-1") == files_of(tmp_path / "out-2")


def test_a_process_that_dies_ends_all_and_leaves_what_can_be_resumed(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    parent = subprocess.Popen(command(model, out, 2), env=environment, **pipes)
    first = partial_path(out) / "layers" / "00000.json"
    deadline = time.monotonic() + 200
    while not first.exists() and parent.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    workers = [int(pid) for pid in Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()]
    workers = [pid for pid in workers if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text()]
    os.kill(workers[-1], signal.SIGKILL)
    _, said = parent.communicate(timeout=100)
    assert parent.returncode == 1
    assert "of 2 ended with exit status -9, so all were stopped; finished layers are kept" in said
    assert first.exists()
    assert not out.exists()
    again = run(command(model, out, 1))
    assert again.returncode == 0, again.stderr
    assert "Going on after" in again.stderr
