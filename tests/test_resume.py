"""Killed at any moment, the same command goes on and ends with the same bytes."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from small import files_of

from eightfold.files import lock
from eightfold.workspace import partial_path

TESTS = Path(__file__).parent
ATTENTION = ("*.mlp.*",)  # half of the work, every kind of step


class Worker:
    """Quantizes in processes of its own (`resume_worker.py`)."""

    def __init__(self) -> None:
        command = [sys.executable, str(TESTS / "resume_worker.py")]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, **pipes, env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True)

    def start(self, model: Path, out: Path, threads: int = 1, seen: list[str] | None = None, **request: Any) -> int:
        """Begin; the process's id."""
        assert self.process.stdin is not None
        request = {"model": str(model), "out": str(out), "exclude": ATTENTION} | request
        self.process.stdin.write(json.dumps({"request": request, "threads": threads, "seen": seen}) + "\n")
        self.process.stdin.flush()
        return self._answer()["pid"]

    def end(self) -> dict[str, Any]:
        """How it ended: status (-9 where it was killed), label, error."""
        return self._answer()

    def run(self, *args: Any, **more: Any) -> dict[str, Any]:
        self.start(*args, **more)
        return self.end()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    worker = Worker()
    yield worker
    worker.process.communicate(timeout=30)
    assert worker.process.returncode == 0


@pytest.fixture(scope="module")
def model(model_folder) -> Path:
    return model_folder("llama-tied")


@pytest.fixture(scope="module")
def expected(worker: Worker, model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a run that nothing interrupts."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert worker.run(model, out)["status"] == 0
    return files_of(out)


def test_killed_at_every_step(worker: Worker, model: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    """Each attempt goes on where the last one died, and dies at the first step that none before it came to."""
    out, seen = tmp_path / "out", []
    while (end := worker.run(model, out, seen=seen))["status"] != 0:
        assert end["status"] == -signal.SIGKILL, end
        seen.append(end["label"])
        assert len(seen) < 60
        if out.exists():
            assert files_of(out) == expected
    assert {"phase sensitivity", "phase layers", "layer model.layers.0", "layer model.layers.1", "layers 1"} <= set(
        seen
    )
    assert {"phase writing", "phase evaluating", "phase generating", "generating 1"} <= set(seen)
    assert {"rename 00000.safetensors", "rename 00001.json", "rename state.json", "rename out"} <= set(seen)
    assert "layers 2" not in seen  # the second layer was on disk before: then nothing is walked again
    assert files_of(out) == expected
    assert not partial_path(out).exists()


def test_killed_at_random_moments(worker: Worker, model: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    # An earlier checkpoint of another rate lies at the target, and stays whole until the new one is.
    rng, out = random.Random(0), tmp_path / "out"
    start = time.perf_counter()
    assert worker.run(model, out, bits=3)["status"] == 0
    whole, old = time.perf_counter() - start, files_of(out)
    shutil.copytree(out, tmp_path / "old")
    rounds = kills = 0
    while rounds < 3 or kills < 3:
        rounds += 1
        assert rounds < 20
        for attempt in range(6):
            start = time.perf_counter()
            pid = worker.start(model, out)
            if attempt < 5:
                time.sleep(rng.uniform(0.01, 0.4) * whole)
                with suppress(ProcessLookupError):  # it was quick
                    os.kill(pid, signal.SIGKILL)
            end = worker.end()
            if end["status"] == 0:
                if attempt == 0:  # it was over before its kill: the machine has become faster
                    whole = time.perf_counter() - start
                break
            assert end["status"] == -signal.SIGKILL, end
            kills += 1
            assert files_of(out) in (old, expected) if out.exists() else partial_path(out).exists()
        assert files_of(out) == expected
        assert not partial_path(out).exists()
        shutil.rmtree(out)
        shutil.copytree(tmp_path / "old", out)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"bits": 3}, "quantization_config"),
        ({"samples": 3}, "samples"),
        ({"layout": "equal"}, "layout"),
        ({"exclude": ("*.mlp.*", "*.q_proj")}, "exclude"),
        ({"settings": {"multipliers": (1.0,), "damping": 0.5}}, "damping"),
        ({"settings": {"multipliers": (1.0,), "seed": 5}}, "seed"),
        ({"shard_bytes": 300_000}, "shard_bytes"),
        ({"dtype": "bfloat16"}, "dtype"),
        ({"sensitivity_samples": 1}, "sensitivity_samples"),
        ({"model": "llama-tied again"}, "base_sha256"),
    ],
)
def test_other_settings_are_refused(
    change: dict[str, Any], key: str, worker: Worker, model: Path, interrupted: Path
) -> None:
    if "model" in change:
        change = {"model": str(_other_model(model, interrupted.parent))}
    before = files_of(partial_path(interrupted))
    end = worker.run(model, interrupted, **change) if "model" not in change else worker.run(**change, out=interrupted)
    assert end["status"] == 1
    assert "begun with other inputs or settings" in end["error"]
    assert key in end["error"]
    assert files_of(partial_path(interrupted)) == before


@pytest.fixture(scope="module")
def interrupted(worker: Worker, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target whose workspace holds the first layer."""
    out = tmp_path_factory.mktemp("interrupted") / "out"
    everything_before = ["phase sensitivity", "phase layers", "rename state.json"]
    everything_before += [f"sensitivity {i}" for i in range(1, 6)] + ["rename 00000.safetensors", "rename 00000.json"]
    end = worker.run(model, out, seen=everything_before)
    assert end["label"] == "layer model.layers.0"
    return out


def _other_model(model: Path, folder: Path) -> Path:
    """The same model with another weight, which no layer's shape shows."""
    other = shutil.copytree(model, folder / "other" / model.name, dirs_exist_ok=True)
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    return other


def test_settings_that_change_no_byte_do_not_matter(
    worker: Worker, model: Path, interrupted: Path, expected: dict[str, bytes]
) -> None:
    """Threads, the gate's text and its limit may differ when going on; a failed gate keeps the checkpoint, too."""
    end = worker.run(model, interrupted, threads=2, eval_windows=1, max_ratio=1e-6)
    assert end["status"] == 3
    assert not interrupted.exists()
    assert not partial_path(interrupted).exists()
    made = files_of(interrupted.with_name("out.failed"))
    assert made.keys() == expected.keys()
    # What the gate found of the other text is written down, with its hash; nothing else differs.
    assert {name for name in made if made[name] != expected[name]} == {"evaluation.json", "eightfold.json"}


def test_two_at_once_are_refused(worker: Worker, model: Path, tmp_path: Path) -> None:
    with lock(partial_path(tmp_path / "out")):
        end = worker.run(model, tmp_path / "out")
    assert end["status"] == 1
    assert "is in use by another process" in end["error"]


_SCRIPT = """
import sys
from pathlib import Path
from small import Silent, small_request
from eightfold import preflight
from eightfold.pipeline import quantize_model
preflight._rates = lambda device, bits: (1e9, 1e6)
model, out = map(Path, sys.argv[1:])
quantize_model(preflight.make_plan(small_request(model, out, exclude=("*.mlp.*",))), Silent())
"""


def test_the_number_of_threads_does_not_matter(model: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    """What was expected was made with OMP_NUM_THREADS=1."""
    paths = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "PYTHONPATH": paths}
    command = [sys.executable, "-c", _SCRIPT, str(model), str(tmp_path / "out")]
    subprocess.run(command, env=environment, check=True, stderr=subprocess.DEVNULL)
    assert files_of(tmp_path / "out") == expected
