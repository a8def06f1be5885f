"""Quantizes a tiny model, in as many processes as torchrun starts, and writes down which of them took which model
through the held-out text, and which sampled. Arguments: model, out, evaluate.HIDDEN_BYTES (0: as it is)."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from small import Silent, small_request

from eightfold import evaluate, gate, preflight
from eightfold.launch import joined
from eightfold.model import Decoder
from eightfold.pipeline import quantize_model
from eightfold.team import Team


def main(model: Path, out: Path, hidden_bytes: int) -> None:
    walk_through, generate = evaluate._final_hidden, gate.generate
    evaluate.HIDDEN_BYTES = hidden_bytes or evaluate.HIDDEN_BYTES
    preflight._rates = lambda device, book: (1e9, 1e6)
    with joined("cpu"):
        notes = out.with_name(f"{out.name}.{Team().rank}")

        def note(text: str) -> None:
            with notes.open("a") as file:
                file.write(f"{text}\n")

        def through(decoder: Decoder, *more: Any) -> Any:
            note("original" if decoder.folder.quantization is None else "checkpoint")
            return walk_through(decoder, *more)

        def sample(*more: Any) -> Any:
            note("samples")
            return generate(*more)

        evaluate._final_hidden, gate.generate = through, sample
        told = Silent()
        outcome = quantize_model(preflight.make_plan(small_request(model, out, exclude=("*.mlp.*",))), told)
        assert outcome.verdict.passed
        if Team().rank == 0:
            assert told.steps == dict(told.phases), told.steps


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
    # Now and then a process with gloo's threads aborts while its interpreter ends, which is not what is asked here.
    os._exit(0)
