"""Files on disk: safetensors tensor by tensor, writes that are whole or not there, locks, hashes."""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, TypeVar

import torch
from torch import Tensor

from eightfold.folder import DTYPE_BYTES
from eightfold.format import CheckpointError
from eightfold.parallel import ordered_map, readers

Written = TypeVar("Written")
TensorCode = tuple[str, tuple[int, ...]]  # dtype as safetensors spells it, shape

_SIZES: dict[str, int] = {**DTYPE_BYTES}
_ORDER = ("U64", "I64", "F64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16")
_ORDER += ("F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL")  # of tensors within a safetensors file


def file_bytes(tensors: Mapping[str, TensorCode]) -> int:
    """Exact size of the safetensors file that holds these tensors, header included."""
    return len(header(tensors)) + sum(map(nbytes, tensors.values()))


def header(tensors: Mapping[str, TensorCode]) -> bytes:
    """First bytes of the safetensors file that holds these tensors, as the library writes them."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in _in_file_order(tensors):
        dtype, shape = tensors[name]
        end = offset + nbytes(tensors[name])
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _in_file_order(tensors: Mapping[str, TensorCode]) -> list[str]:
    """Widest dtype first, so that all are aligned, as the safetensors library writes them."""
    return sorted(tensors, key=lambda name: (_ORDER.index(tensors[name][0]), name))


def write_tensors(file: IO[bytes], codes: Mapping[str, TensorCode], read: Callable[[str], Tensor]) -> dict[str, Any]:
    """A safetensors file, two tensors in memory at a time (the library wants all at once): one is written, the one
    before is hashed. Returns what `measure` would of the file."""
    digest, size = hashlib.sha256(), 0
    with ThreadPoolExecutor(1) as beside:
        hashing: Future[None] | None = None
        for data in _pieces(codes, read):
            if hashing is not None:
                hashing.result()
            hashing = beside.submit(digest.update, data)
            file.write(data)
            size += len(data)
    return {"bytes": size, "sha256": digest.hexdigest()}


def _pieces(codes: Mapping[str, TensorCode], read: Callable[[str], Tensor]) -> Iterator[bytes | memoryview]:
    """What a safetensors file is made of, in order."""
    yield header(codes)
    for name in _in_file_order(codes):
        yield read(name).detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def nbytes(code: TensorCode) -> int:
    """Bytes of a tensor's data."""
    return _SIZES[code[0]] * math.prod(code[1])


def atomically(path: Path, write: Callable[[IO[bytes]], Written]) -> Written:
    """What `write` returns, after it has filled a file that appears as `path` only when it is whole and on the disk."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        written = write(file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync(path.parent)
    return written


def write_text(path: Path, text: str) -> None:
    """`atomically` with a text."""
    atomically(path, lambda file: file.write(text.encode()))


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock(path: Path) -> IO[str]:
    """Make the folder and lock it until the file is closed. Raises CheckpointError if it is in use."""
    while True:
        path.mkdir(parents=True, exist_ok=True)
        file = open(path / "lock", "a")  # noqa: SIM115 (held open as long as the lock is)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.close()
            raise CheckpointError(f"{path} is in use by another process: wait for it, or end it") from error
        # Whoever held the lock before may have removed the folder in the meantime.
        if (path / "lock").exists() and os.path.samestat(os.fstat(file.fileno()), (path / "lock").stat()):
            return file
        file.close()


def measure(path: Path) -> dict[str, Any]:
    """{"bytes": size, "sha256": hexadecimal} of a file."""
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def measures(paths: Iterable[Path]) -> Iterator[dict[str, Any]]:
    """`measure` of each, several at once."""
    return ordered_map(measure, paths, readers())


def to_json(content: Any, sort_keys: bool = False) -> str:
    """Text of a JSON file. Raises ValueError for what JSON has not, NaN included."""
    return json.dumps(content, indent=2, sort_keys=sort_keys, allow_nan=False) + "\n"


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises CheckpointError naming the file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: expected JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object, came {type(content).__name__}")
    return content


def natural(name: str) -> list[tuple[int, str]]:
    """Sort key that puts layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
