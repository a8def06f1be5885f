"""Make the package data from the trained models' folders:  make_data.py TINY_LM REFERENCE_LM OUT

TINY_LM is copied as it is. The two texts of REFERENCE_LM are thinned to equally spaced passages of whole
paragraphs, so that what stays has documentation, code and novels in about the proportion of the whole. The
same inputs give the same bytes.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

SEPARATOR = "<|endoftext|>\n"  # stands between two documents in the texts, on a line of its own
PASSAGES = 48
TEXTS = {  # name here -> (name there, bytes to keep)
    "calibration.txt": ("calibration.txt", 1_400_000),
    "evaluation.txt": ("eval.txt", 450_000),
}
MODEL_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


def next_paragraph(text: str, at: int) -> int:
    """Start of the first paragraph or document at `at` or later; the end of the text if there is none."""
    if at == 0:
        return 0
    marks = ((text.find(mark, max(at - len(mark), 0)), mark) for mark in ("\n\n", SEPARATOR))
    return min((found + len(mark) for found, mark in marks if found >= 0), default=len(text))


def thin(text: str, size: int) -> str:
    """Cut `text` to about `size` bytes: whole paragraphs from the head of each of PASSAGES equal parts."""
    keep = size / len(text.encode())
    passages = []
    for index in range(PASSAGES):
        start = len(text) * index // PASSAGES
        head = next_paragraph(text, start)
        tail = head
        limit = start + int(len(text) / PASSAGES * keep)
        while (following := next_paragraph(text, tail + 1)) <= limit and following < len(text):
            tail = following
        passage = text[head:tail].removesuffix(SEPARATOR).strip("\n")
        if passage:
            passages.append(passage + "\n")
    return SEPARATOR.join(passages)


def main(tiny_lm: Path, reference_lm: Path, out: Path) -> None:
    model = out / "tiny-lm"
    model.mkdir(parents=True, exist_ok=True)
    for name in MODEL_FILES:
        shutil.copyfile(tiny_lm / name, model / name)
    for name, (source, size) in TEXTS.items():
        text = thin((reference_lm / source).read_text(encoding="utf-8"), size)
        (out / name).write_text(text, encoding="utf-8", newline="\n")
        print(f"{name}: {len(text.encode()):,} bytes")


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(*(Path(argument) for argument in sys.argv[1:]))
