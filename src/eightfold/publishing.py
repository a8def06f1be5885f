"""The commands for many models and for the hub: batch, card, push."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

from eightfold import batch
from eightfold.card import CARD, model_card, write_card
from eightfold.console import Terminal, duration, plus_minus, size, table
from eightfold.inspect import quantized_folder
from eightfold.preflight import choose_device, choose_dtype
from eightfold.push import push

DONE, FAILED = 0, 1
COLUMNS = ("job", "state", "bits", "stored bits", "weight files", "ratio", "KL (nats)", "time", "repository")

Result = tuple[int, dict[str, Any]]


def run_batch(options: Namespace, terminal: Terminal) -> Result:
    """Do the jobs of a list, or say what they would take; exit status 1 if one of them is not done."""
    path = Path(options.jobs).resolve()
    jobs = batch.choose(batch.read_jobs(path), options.only)
    if options.dry_run:
        entries = batch.plan(jobs, path, terminal.note)
        good = not any(entry["status"] == "bad" for entry in entries)
    else:
        entries = batch.work(jobs, path, options.resume, terminal.note)
        good = all(batch.finished(entry) for entry in entries)
    terminal.results.print(table(COLUMNS, [_cells(entry) for entry in entries]))
    for entry in entries:
        if entry.get("error"):
            terminal.note(f"{entry['name']}: {entry['error']}")
    return DONE if good else FAILED, {"jobs": entries}


def run_card(options: Namespace, terminal: Terminal) -> Result:
    """Write the model card."""
    text = model_card(options.dir, options.base, options.license, options.repo)
    file = write_card(options.dir, text)
    terminal.say(f"Model card: {file}")
    return DONE, {"path": str(file), "card": text}


def run_push(options: Namespace, terminal: Terminal) -> Result:
    """Upload, try what was uploaded, publish; exit status 1 where it is not what it should be."""
    folder = quantized_folder(options.dir)
    device, dtype = choose_device(options.device), choose_dtype(options.dtype, options.device, folder)
    if not (folder.path / CARD).is_file():
        write_card(options.dir, model_card(options.dir, options.base, options.license, options.to))
    with terminal.progress() as steps:
        done = push(options.dir, options.to, options.public, device, dtype, (steps.phase, steps.advance))
    for prompt, text in done.samples:
        terminal.note(f"generated: {' '.join(prompt.split())} | {' '.join(text.split())}")
    for problem in done.problems:
        terminal.note(f"Problem: {problem}")
    content = done.to_dict()
    if done.problems:
        error = f"{done.repo}: the smoke test failed, the repository stays private: {done.problems[0]}"
        terminal.note(error)
        return FAILED, content | {"error": error}
    terminal.say(f"Done: {done.url} ({'public' if done.public else 'private'}), commit {done.commit}")
    return DONE, content


def _cells(entry: dict[str, Any]) -> list[str]:
    """A line of the table; what is not known is left out."""

    def shown(key: str, form: Any) -> str:
        return "" if entry.get(key) is None else form(entry[key])

    push = entry.get("push", {})
    repository = push["arguments"][2] if push else ""
    place = f"{repository}, {'public' if push.get('public') else push['status']}" if push else ""
    return [
        entry["name"],
        entry["status"],
        shown("bits", lambda bits: f"{bits:.4g}"),
        shown("stored_bits", lambda bits: f"{bits:.4f}"),
        shown("output_bytes", size),
        shown("ratio", lambda ratio: plus_minus(ratio, entry.get("ratio_se"))),
        shown("kl", lambda kl: plus_minus(kl, entry.get("kl_se"))),
        shown("seconds", duration) or shown("seconds_estimate", lambda seconds: f"about {duration(seconds)}"),
        place,
    ]
