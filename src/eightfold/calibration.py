"""Texts to tokens: what a model is calibrated with and judged by."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eightfold import bundled

SUFFIXES = (".txt", ".jsonl")


Source = str | Path | Sequence[str | Path] | None


def load_texts(source: Source) -> list[str]:
    """The texts of a text file (one), a .jsonl (its fields "text"), a folder of such in name order, or of several.

    None stands for the bundled calibration text. Raises ValueError for a source without text, a file that is
    not UTF-8, and a line that is not a JSON object with a string "text", naming the file and the line.
    """
    return [text for path in _paths(source) for text in _path_texts(path)]


def _paths(source: Source) -> list[Path]:
    if source is None:
        return [bundled.calibration_text()]
    return [Path(source)] if isinstance(source, str | Path) else [Path(path) for path in source]


def _path_texts(path: Path) -> list[str]:
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES)
        texts = [text for file in files for text in _file_texts(file)]
    elif path.is_file():
        texts = _file_texts(path)
    else:
        raise ValueError(f"{path}: expected a text file, a .jsonl or a folder of these, there is none")
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise ValueError(f"{path}: expected text in .txt or .jsonl files, there is none")
    return texts


def token_stream(source: Source, tokenizer: Any) -> Tensor:
    """The tokens of all texts in a row, long [L], without special tokens but an end-of-text between texts."""
    parts: list[int] = []
    for text in load_texts(source):
        if parts and tokenizer.eos_token_id is not None:
            parts.append(tokenizer.eos_token_id)
        parts += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(parts, dtype=torch.long, device="cpu")


def tokens(source: Source, tokenizer: Any, samples: int, seqlen: int, seed: int) -> tuple[Tensor, dict[str, Any]]:
    """`samples` random windows of the token stream, long [samples, seqlen], and where they came from (JSON).

    Windows do not overlap where the text is long enough, and never start at the same place. Where the
    tokenizer begins every text with a token (BOS), so does every window. Raises ValueError for a text that is
    too short.
    """
    _check_counts(samples=samples, seqlen=seqlen)
    stream, bos = token_stream(source, tokenizer), _beginning(tokenizer)
    length = _room(seqlen, bos)
    slots, starts = len(stream) // length, max(0, len(stream) - length + 1)
    if starts < samples:
        raise ValueError(
            f"calibration text: expected at least {length + samples - 1} tokens for {samples} samples of "
            f"{seqlen}, came {len(stream)}; give more text, or fewer or shorter samples"
        )
    random = torch.Generator().manual_seed(seed)
    if slots >= samples:
        shift = int(torch.randint(len(stream) - slots * length + 1, (), generator=random))
        begin = torch.randperm(slots, generator=random)[:samples] * length + shift
    else:
        begin = torch.randperm(starts, generator=random)[:samples]
    result = _with_beginning(stream[begin[:, None] + torch.arange(length)], bos)
    return result, {
        "source": "bundled" if source is None else ", ".join(path.name for path in _paths(source)),
        "sha256": tokens_sha256(result),
        "samples": samples,
        "seqlen": seqlen,
        "seed": seed,
        "overlap": slots < samples,
    }


def windows(source: Source, tokenizer: Any, seqlen: int, limit: int | None = None) -> Tensor:
    """The token stream cut into windows that do not overlap, long [W, seqlen], the first `limit` of them.

    The rest that fills no window is left out. Where the tokenizer begins every text with a token, so does
    each window. None stands for the bundled evaluation text. Raises ValueError for too short a text.
    """
    _check_counts(seqlen=seqlen, limit=1 if limit is None else limit)
    stream = token_stream(bundled.evaluation_text() if source is None else source, tokenizer)
    bos = _beginning(tokenizer)
    length = _room(seqlen, bos)
    count = min(len(stream) // length, limit or len(stream))
    if count == 0:
        raise ValueError(
            f"text: expected at least {length} tokens for a window of {seqlen}, came {len(stream)}; "
            f"give more text or shorter windows"
        )
    return _with_beginning(stream[: count * length].view(count, length), bos)


def tokens_sha256(windows: Tensor) -> str:
    """Hash of token ids, whatever machine they are on: of their int64 little-endian bytes."""
    return hashlib.sha256(windows.cpu().numpy().astype("<i8").tobytes()).hexdigest()


def _file_texts(file: Path) -> list[str]:
    try:
        content = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: expected UTF-8 text: {error}") from error
    if file.suffix != ".jsonl":
        return [content]
    texts: list[str] = []
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f'{file}:{number}: expected a JSON object with a field "text"') from error
        if not isinstance(text, str):
            raise ValueError(f'{file}:{number}: expected a string in "text", came {type(text).__name__}')
        texts.append(text)
    return texts


def _beginning(tokenizer: Any) -> list[int]:
    """The token that the tokenizer puts before every text by itself, if it does."""
    bos = tokenizer.bos_token_id
    added: Sequence[int] = tokenizer("a")["input_ids"]
    return [bos] if bos is not None and added[0] == bos else []


def _room(seqlen: int, bos: list[int]) -> int:
    if seqlen - len(bos) < 1:
        raise ValueError(f"seqlen: expected room for a token after the beginning token, came {seqlen}")
    return seqlen - len(bos)


def _with_beginning(windows: Tensor, bos: list[int]) -> Tensor:
    return torch.cat([torch.tensor(bos, dtype=torch.long).expand(len(windows), len(bos)), windows], dim=1)


def _check_counts(**counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name}: expected at least 1, came {count}")
