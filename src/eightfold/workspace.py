"""The temporary folder in which a checkpoint is made, so that a kill at any moment loses at most one layer.

Everything is made in `<target>.partial` beside the target: first a file per decoder layer as it is finished,
then the whole checkpoint in `out`, which is renamed into place. A file that is there under its own name is
whole: it was written under another one, flushed to the disk, and renamed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from eightfold.files import (
    atomically,
    lock,
    measure,
    read_json,
    sync,
    to_json,
    write_tensors,
    write_text,
)
from eightfold.finite import without_infinity
from eightfold.format import DTYPE_CODES, CheckpointError

MANIFEST = "eightfold.json"


class Workspace:
    """The temporary folder of one target: finished layers, and a lock that keeps other processes out.

    `fingerprint`: JSON object of all that the result depends on. Opening a workspace that was begun with
    another one raises CheckpointError naming the differences and changes nothing; so does one that is in use.
    A target that is in the way raises ValueError (`check_target`). Close it, or use it as a context manager.
    """

    def __init__(self, target: str | Path, fingerprint: Mapping[str, Any]) -> None:
        self.target = Path(target).resolve()
        check_target(self.target)
        self.path = partial_path(self.target)
        self._lock = lock(self.path)
        try:
            self._open(json.loads(json.dumps(dict(fingerprint))))
        except BaseException:
            self.close()
            raise

    def _open(self, fingerprint: dict[str, Any]) -> None:
        if self._state.exists():
            self._agree(read_json(self._state)["fingerprint"], fingerprint)
        else:  # new, or the removal after a publication was cut short
            _check_ours(self.path)
            for folder in (self.path / "layers", self.path / "out"):
                if folder.exists():
                    shutil.rmtree(folder)
            (self.path / "layers").mkdir()
            write_text(self._state, to_json({"fingerprint": fingerprint, "confirmed": {}}))
        _restore(self.path)

    def _agree(self, began: dict[str, Any], now: dict[str, Any]) -> None:
        if differ := _differences(began, now):
            more = f" and {len(differ) - 3} more" if len(differ) > 3 else ""
            raise CheckpointError(
                f"{self.path} was begun with other inputs or settings ({'; '.join(differ[:3])}{more}): use those, "
                f"or discard it (--no-resume)"
            )

    @property
    def _state(self) -> Path:
        return self.path / "state.json"

    def knows(self, name: str) -> bool:
        """Whether `name` has been confirmed."""
        return name in read_json(self._state)["confirmed"]

    def confirm(self, name: str, value: str) -> None:
        """A part of the fingerprint that takes time to find, to be given before the first layer. Raises CheckpointError
        if the workspace was begun with another value."""
        state = read_json(self._state)
        if name in state["confirmed"]:
            self._agree(state["confirmed"], state["confirmed"] | {name: value})
        else:
            state["confirmed"][name] = value
            write_text(self._state, to_json(state))

    def __enter__(self) -> Workspace:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Give up the lock. What is on disk stays."""
        self._lock.close()

    def finished(self) -> list[int]:
        """Numbers of the layers that are whole on disk: 0, 1, ... without a gap."""
        done: list[int] = []
        while all(file.exists() for file in self.files(len(done))):
            done.append(len(done))
        return done

    def save_layer(self, index: int, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """Put layer `index`, the next one, on disk: its tensors by full name, and a JSON object about it, in which
        numbers that are not finite become null.

        When this returns, a kill loses nothing of it. Raises CheckpointError for a tensor that is not finite.
        """
        if index != len(self.finished()):
            raise ValueError(f"expected layer {len(self.finished())} next, came {index}")
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise CheckpointError(f"{name}: expected finite values, came some that are not")
        data, about = self.files(index)
        codes = {name: (DTYPE_CODES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()}
        written = atomically(data, lambda file: write_tensors(file, codes, tensors.__getitem__))
        write_text(about, to_json({**written, "record": without_infinity(dict(record))}))

    def load_layer(self, index: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors (CPU) and record of a finished layer. Raises CheckpointError if the file has changed."""
        data, about = self.files(index)
        content = read_json(about)
        if measure(data) != {key: content.get(key) for key in ("bytes", "sha256")}:
            raise CheckpointError(f"{data}: not the bytes that were written: discard {self.path}")
        with safe_open(data, framework="pt") as file:
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (no dict)
        return tensors, content["record"]

    def records(self) -> list[dict[str, Any]]:
        """The records of all finished layers in order."""
        return [read_json(self.files(index)[1])["record"] for index in self.finished()]

    def files(self, index: int) -> tuple[Path, Path]:
        """Where the tensors of layer `index` lie, and what is known of it."""
        stem = self.path / "layers" / f"{index:05d}"
        return stem.with_suffix(".safetensors"), stem.with_suffix(".json")


def _differences(was: Any, now: Any, path: str = "") -> list[str]:
    """Where two JSON values differ: "quantization_config.tp_max was 1, is 2"."""
    if isinstance(was, dict) and isinstance(now, dict):
        keys = was | now
        return [d for key in keys for d in _differences(was.get(key), now.get(key), f"{path}.{key}" if path else key)]
    return [] if was == now else [f"{path} was {was!r}, is {now!r}"]


def partial_path(target: str | Path) -> Path:
    """Where the workspace of `target` lies."""
    target = Path(target).resolve()
    return target.with_name(target.name + ".partial")


def discard(target: str | Path) -> None:
    """Delete the workspace of `target`, if there is one. Raises CheckpointError while a process uses it."""
    path = partial_path(target)
    if path.exists():
        with lock(path):
            _check_ours(path)
            _restore(path)
            shutil.rmtree(path)


def _restore(path: Path) -> None:
    """Finish a publication that was cut short: the old one comes back, or goes if the new one is there."""
    for moved in sorted((path / "previous").glob("*")):
        if (path.parent / moved.name).exists():
            shutil.rmtree(moved)
        else:
            moved.rename(path.parent / moved.name)


def _check_ours(path: Path) -> None:
    ours = {"lock", "state.json", "state.json.tmp", "layers", "out", "previous"}
    if foreign := {entry.name for entry in path.iterdir()} - ours:
        raise CheckpointError(f"{path}: expected a working folder of ours, it holds {min(foreign)!r}")


def check_target(target: str | Path) -> None:
    """Raise ValueError unless `target` is absent, an empty folder, or a checkpoint of ours."""
    target = Path(target)
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target}: expected a folder to write to, it is a file")
    if target.is_dir() and any(target.iterdir()) and not (target / MANIFEST).is_file():
        raise ValueError(f"{target}: it holds files and no {MANIFEST}, so it is not replaced: give another folder")


def publish(workspace: Workspace, target: str | Path | None = None) -> Path:
    """Rename what `assemble` made to `target` (the workspace's own unless given), and remove the workspace.

    An older checkpoint there is moved away only now; should the process die before the new one is in place,
    opening the workspace brings it back. `target` must lie beside the workspace. Returns the target.
    """
    target = Path(target or workspace.target).resolve()
    check_target(target)
    if target.parent != workspace.path.parent:
        raise ValueError(f"{target}: expected a folder in {workspace.path.parent}")
    if target.exists() and any(target.iterdir()):
        (workspace.path / "previous").mkdir(exist_ok=True)
        target.rename(workspace.path / "previous" / target.name)
    (workspace.path / "out").rename(target)
    sync(target.parent)
    shutil.rmtree(workspace.path)
    workspace.close()
    return target
