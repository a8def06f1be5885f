"""Where the model and the texts that ship inside the package lie on disk."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path


def tiny_lm() -> Path:
    """Folder of the bundled language model: a Llama of 3.4M parameters as a Hugging Face folder."""
    return _data("tiny-lm")


def calibration_text() -> Path:
    """Text that the bundled model was trained on: 1.4 MB of UTF-8, `<|endoftext|>` between passages."""
    return _data("calibration.txt")


def evaluation_text() -> Path:
    """Text that the bundled model has not seen: 0.4 MB of UTF-8, `<|endoftext|>` between passages."""
    return _data("evaluation.txt")


def _data(name: str) -> Path:
    path = files("eightfold").joinpath("data", name)
    # transformers opens files by path, so a package inside a zip archive cannot serve them.
    if not isinstance(path, Path) or not path.exists():
        raise FileNotFoundError(
            f"expected package data on disk at {path}, found none: reinstall eightfold, not as a zip archive"
        )
    return path
