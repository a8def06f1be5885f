"""A process that has imported everything once, and forks a child for every quantization it is asked for.

Reads one JSON object a line: {"request": arguments of small_request, "threads": how many, "seen": labels}. Answers with
{"pid": of the child} and, when that has ended, {"status": exit status or -signal, "label": ..., "error": ...}. With
"seen", the child kills itself (SIGKILL) at the first event whose label is not among them, and that is the "label".
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import transformers.models.llama.modeling_llama  # noqa: F401 (or every child imports it)
from small import small_request
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401

from eightfold import preflight
from eightfold.pipeline import quantize_model
from eightfold.quantize import Settings


class Killer:
    """Told of everything that happens; kills the process at the first thing that is new."""

    def __init__(self, seen: list[str] | None, folder: Path, pipe: int) -> None:
        self.seen, self.folder, self.pipe = seen, folder, pipe
        self.counts: dict[str, int] = {}
        self.name = ""

    def happens(self, label: str) -> None:
        if self.seen is not None and label not in self.seen:
            self.seen = None
            os.write(self.pipe, json.dumps({"label": label}).encode())
            os.kill(os.getpid(), signal.SIGKILL)

    def phase(self, name: str, steps: int) -> None:
        self.name = name
        self.happens(f"phase {name}")

    def advance(self, steps: int) -> None:
        count = self.counts[self.name] = self.counts.get(self.name, 0) + steps
        if self.name != "evaluating" or count in (1, 12):  # one is like another there
            self.happens(f"{self.name} {count}")

    def note(self, text: str) -> None:
        self.happens("note")

    def layer(self, record: dict[str, Any]) -> None:
        self.happens(f"layer {record['layer']}")

    def audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Files that get their names."""
        if event == "os.rename" and str(arguments[0]).startswith(str(self.folder)):
            self.happens(f"rename {Path(os.fsdecode(arguments[1])).name}")


def child(job: dict[str, Any], pipe: int) -> None:
    torch.set_num_threads(job["threads"])
    request = job["request"]
    if "settings" in request:
        request["settings"] = Settings(**request["settings"])
    model, out = Path(request.pop("model")), Path(request.pop("out"))
    killer = Killer(job["seen"], out.parent, pipe)
    sys.addaudithook(killer.audit)
    preflight._rates = lambda device, bits: (1e9, 1e6)  # no need to measure
    try:
        outcome = quantize_model(preflight.make_plan(small_request(model, out, **request)), killer)
    except ValueError as error:
        os.write(pipe, json.dumps({"error": str(error)}).encode())
        os._exit(1)
    os._exit(0 if outcome.verdict.passed else 3)


def main() -> None:
    for line in sys.stdin:
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(read)
            sys.stdin.close()
            with open(os.devnull, "w") as null:
                os.dup2(null.fileno(), 1)
            child(json.loads(line), write)
        os.close(write)
        print(json.dumps({"pid": pid}), flush=True)
        with open(read) as pipe:
            said = pipe.read()
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        answer = {"status": status, "label": None, "error": None} | json.loads(said or "{}")
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
