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

from eightfold.workspace import partial_path


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


@pytest.fixture(scope="module")
def alone(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("alone") / "out"
    assert judged(model, out, 1) == [["checkpoint", "original", "samples"]]
    return out


def judged(model: Path, out: Path, processes: int, hidden_bytes: int = 0) -> list[list[str]]:
    """What each process did for the gate of a run of its own (`team_worker.py`)."""
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)] if processes > 1 else []
    worker = [str(Path(__file__).with_name("team_worker.py")), str(model), str(out), str(hidden_bytes)]
    done = run([sys.executable, *torchrun, *worker])
    assert done.returncode == 0, done.stderr[-3000:]
    notes = [out.with_name(f"out.{rank}") for rank in range(processes)]
    return [file.read_text().split() if file.exists() else [] for file in notes]


@pytest.mark.parametrize("processes", [2, 3])
def test_the_last_process_takes_the_original_through_the_text_and_samples(
    processes: int, model: Path, alone: Path, tmp_path: Path
) -> None:
    first, *others, last = judged(model, tmp_path / "out", processes)
    assert first == ["checkpoint"]
    assert others == [[]] * (processes - 2)
    assert last == ["original", "samples"]
    assert files_of(tmp_path / "out") == files_of(alone)


def test_several_passes_are_left_to_the_first_process(model: Path, alone: Path, tmp_path: Path) -> None:
    first, last = judged(model, tmp_path / "out", 2, hidden_bytes=1)
    assert first == ["checkpoint", "original"] * 2  # one window a pass
    assert last == ["samples"]
    assert files_of(tmp_path / "out") == files_of(alone)


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
