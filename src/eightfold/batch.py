"""Many models: a list of jobs, a process and a log for each, and a ledger of what came of them.

The ledger is written anew, atomically, at every change, so that it is true whenever this process dies. What is done,
and whose files are those that were written, is not done again; what was interrupted goes on from its last finished
layer (workspace.py); a failure is noted, and the next job begins.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import tomllib
from argparse import ArgumentParser
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NoReturn

from eightfold.checkpoint import verify_files
from eightfold.files import lock, measure, read_json, to_json, write_text
from eightfold.options import make_parser
from eightfold.workspace import MANIFEST

DONE, GATE_FAILED = 0, 3
OWN_KEYS = {"name", "model", "out", "push", "public", "license", "base"}  # of a job; all others are options of quantize
PATIENCE = 60  # seconds that an interrupted job has to put things in order

Run = Callable[[Sequence[str], Path], tuple[int, dict[str, Any]]]


@dataclass(frozen=True, slots=True)
class Job:
    """One model to quantize. `quantize`, `push`: arguments of the commands; no push without a repository."""

    name: str
    out: Path
    quantize: tuple[str, ...]
    push: tuple[str, ...]

    @property
    def settings(self) -> str:
        """Hash of what decides the result."""
        return hashlib.sha256("\0".join(self.quantize).encode()).hexdigest()


class Ledger:
    """What came of every job, in the folder `<list>.batch`, which is locked: one batch works on a list at a time."""

    def __init__(self, jobs: Path) -> None:
        self.folder = jobs.with_suffix(".batch")
        self.lock = lock(self.folder)
        self.file = self.folder / "ledger.json"
        self.entries: dict[str, dict[str, Any]] = read_json(self.file) if self.file.exists() else {}

    def log(self, job: Job) -> Path:
        return self.folder / f"{job.name}.log"

    def note(self, job: Job, **changes: Any) -> None:
        """Change the entry of a job and put the ledger on the disk."""
        self.entries[job.name] = self.entries.get(job.name, {}) | changes
        write_text(self.file, to_json(self.entries))

    def close(self) -> None:
        self.lock.close()


class _Parser(ArgumentParser):
    """argparse that raises ValueError in place of leaving."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def read_jobs(path: Path) -> list[Job]:
    """The jobs of a list, every option checked. Raises ValueError naming the list, the job and what is wrong."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"{path}: expected a list of jobs in TOML: {error}") from error
    if unknown := set(content) - {"out", "defaults", "jobs"}:
        raise ValueError(f"{path}: expected out, [defaults] and [[jobs]], came {min(unknown)}")
    tables, defaults, out = content.get("jobs"), content.get("defaults", {}), content.get("out", ".")
    if not isinstance(tables, list) or not tables or not all(isinstance(t, dict) for t in [*tables, defaults]):
        raise ValueError(f"{path}: expected at least one table [[jobs]], came none")
    jobs = []
    for number, table in enumerate(tables, start=1):
        try:
            jobs.append(_job(defaults | table, path.parent / str(out)))
        except ValueError as error:
            raise ValueError(f"{path}: job {number}: {error}") from None
    for what, values in (("name", [job.name for job in jobs]), ("out", [str(job.out) for job in jobs])):
        if twice := [value for value in values if values.count(value) > 1]:
            raise ValueError(f"{path}: expected another {what} for every job, {twice[0]} comes twice")
    return jobs


def _job(table: dict[str, Any], folder: Path) -> Job:
    for key in ("name", "model", "out", "push", "license", "base"):
        if not isinstance(table.get(key, ""), str):
            raise ValueError(f"{key}: expected a text, came {table[key]!r}")
    if not table.get("model"):
        raise ValueError("expected a model, came none")
    options = [word for key, value in table.items() if key not in OWN_KEYS for word in _words(key, value)]
    model = table["model"]
    rates = {key: table[key] for key in ("bits", "stored-bits", "stored_bits", "size", "recipe") if key in table}
    rate = "-".join(
        f"{Path(str(v)).stem if k == 'recipe' else v}{'bit' if 'bits' in k else ''}" for k, v in rates.items()
    )
    name = table.get("name") or f"{Path(model).name}-{rate}"
    if not re.fullmatch(r"[\w.+-]+", name) or name.startswith("."):
        raise ValueError(f"name: expected letters, digits and . _ + -, came {name!r}")
    out = folder / table.get("out", name)
    quantize = ("quantize", model, str(out), *options)
    make_parser(_Parser).parse_args(quantize)
    push = [word for key in ("base", "license") if key in table for word in (f"--{key}", table[key])]
    if not table.get("push"):
        if table.get("public"):
            raise ValueError("public: expected push, the repository to make public, came none")
        return Job(name, out, quantize, ())
    public = table.get("public", False)
    if not isinstance(public, bool):
        raise ValueError(f"public: expected true or false, came {public!r}")
    return Job(name, out, quantize, ("push", str(out), table["push"], *push, *(["--public"] if public else [])))


def _words(key: str, value: Any) -> list[str]:
    """A setting as words of a command line: `tp_max = 2` is --tp-max 2, true is --key, false --no-key."""
    option = "--" + key.replace("_", "-")
    if isinstance(value, bool):
        return [option if value else f"--no-{option.removeprefix('--')}"]
    values = value if isinstance(value, list) else [value]
    if not values or not all(isinstance(v, str | int | float) for v in values):
        raise ValueError(f"{key}: expected a text, a number or a list of these, came {value!r}")
    return [option, *map(str, values)]


def choose(jobs: Sequence[Job], only: Sequence[str] | None) -> list[Job]:
    """The jobs that names or patterns choose, in the list's order. Raises ValueError for one that chooses none."""
    for pattern in only or ():
        if not any(fnmatchcase(job.name, pattern) for job in jobs):
            raise ValueError(f"--only {pattern}: expected one of the jobs, they are {', '.join(j.name for j in jobs)}")
    return [job for job in jobs if only is None or any(fnmatchcase(job.name, pattern) for pattern in only)]


def work(jobs: Sequence[Job], path: Path, resume: bool, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Do all that is not done, one job after the other, and return their entries in the ledger.

    `say` is told of every job. KeyboardInterrupt, which SIGTERM becomes, too, ends the job that runs, and this.
    """
    with closing(Ledger(path)) as ledger, _terminable():

        def run(arguments: Sequence[str], log: Path) -> tuple[int, dict[str, Any]]:
            return run_command(arguments, log, path.parent, ledger.lock.fileno())

        for number, job in enumerate(jobs, start=1):
            about = f"{number}/{len(jobs)}  {job.name}"
            if (why := _undone(job, ledger.entries.get(job.name, {}))) is not None:
                say(f"{about}: {why} (log: {ledger.log(job)})")
                _quantize(job, ledger, resume, run)
            if job.push and ledger.entries[job.name]["status"] == "done" and not _pushed(job, ledger):
                say(f"{about}: uploading to {job.push[2]}")
                _push(job, ledger, run)
            entry = ledger.entries[job.name]
            say(f"{about}: {_state(entry)}" + (f": {entry['error']}" if entry.get("error") else ""))
        return [{"name": job.name} | ledger.entries[job.name] for job in jobs]


def plan(jobs: Sequence[Job], path: Path, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """What each job would take and give: its state, and for those that are not done the plan that quantize makes."""
    file = path.with_suffix(".batch") / "ledger.json"
    entries = read_json(file) if file.exists() else {}
    found = []
    for number, job in enumerate(jobs, start=1):
        why = _undone(job, entries.get(job.name, {}))
        say(f"{number}/{len(jobs)}  {job.name}: {why or 'done'}")
        if why is None:
            found.append({"name": job.name} | entries[job.name])
            continue
        status, content = run_command([*job.quantize, "--dry-run"], None, path.parent)
        planned = {key: content["plan"][key] for key in PLANNED} if status == DONE else {}
        found.append({"name": job.name, "status": "planned" if status == DONE else "bad", **planned} | _error(content))
    return found


PLANNED = ("bits", "stored_bits", "output_bytes", "seconds_estimate", "peak_bytes_estimate")


def finished(entry: dict[str, Any]) -> bool:
    """Whether nothing of a job is left to do."""
    return entry["status"] == "done" and entry.get("push", {}).get("status", "done") == "done"


def _undone(job: Job, entry: dict[str, Any]) -> str | None:
    """Why a job must be quantized, None if it need not be."""
    status = entry.get("status")
    if status is None:
        return "begins"
    if entry["settings"] != job.settings:
        return "begins anew, its settings have changed"
    if status != "done":
        return {"running": "goes on, it was cut short", "interrupted": "goes on"}.get(
            status, f"tried again, it {status}"
        )
    if not job.out.is_dir() or verify_files(job.out):
        return "begins anew, its files are not those that were written"
    return None


def _quantize(job: Job, ledger: Ledger, resume: bool, run: Run) -> None:
    begun = {"settings": job.settings, "path": str(job.out), "log": str(ledger.log(job)), "started": _now()}
    # Nothing of an earlier attempt stays in the entry, but what lies on the hub.
    uploaded = ledger.entries.get(job.name, {}).get("push")
    ledger.entries[job.name] = {"push": uploaded} if uploaded else {}
    ledger.note(job, status="running", **begun)
    start = time.monotonic()
    arguments = [*job.quantize, *([] if resume else ["--no-resume"])]
    try:
        status, content = run(arguments, ledger.log(job))
    except KeyboardInterrupt:
        ledger.note(job, status="interrupted")
        raise
    state = {DONE: "done", GATE_FAILED: "failed the gate"}.get(status, "failed")
    measured = {}
    if evaluation := (content.get("gate") or {}).get("evaluation"):
        measured = {key: evaluation[key] for key in ("perplexity", "ratio", "ratio_se", "kl", "kl_se", "top1")}
    if reasons := (content.get("gate") or {}).get("reasons"):
        measured["error"] = "; ".join(reasons)
    if "path" in content:
        measured |= _sizes(Path(content["path"]))
    ledger.note(job, status=state, exit_status=status, seconds=time.monotonic() - start, **measured | _error(content))


def _sizes(path: Path) -> dict[str, Any]:
    from eightfold.inspect import inspect

    facts = inspect(path)
    sizes = {"bits": facts.bits, "stored_bits": facts.stored_bits, "output_bytes": facts.file_bytes}
    return {"path": str(path)} | sizes


def _pushed(job: Job, ledger: Ledger) -> bool:
    push = ledger.entries[job.name].get("push", {})
    known = {"arguments": list(job.push), "manifest": measure(job.out / MANIFEST)["sha256"], "status": "done"}
    return {key: push.get(key) for key in known} == known


def _push(job: Job, ledger: Ledger, run: Run) -> None:
    begun = {"arguments": list(job.push), "manifest": measure(job.out / MANIFEST)["sha256"], "started": _now()}
    ledger.note(job, push=begun | {"status": "running"}, error=None)
    try:
        status, content = run(job.push, ledger.log(job))
    except KeyboardInterrupt:
        ledger.note(job, push=begun | {"status": "interrupted"})
        raise
    state = {"status": "done" if status == DONE else "failed", "exit_status": status}
    state |= {key: content[key] for key in ("repo", "commit", "public") if key in content}
    ledger.note(job, push=begun | state, **_error(content))


def run_command(
    arguments: Sequence[str], log: Path | None, folder: Path, held: int | None = None
) -> tuple[int, dict[str, Any]]:
    """Run `eightfold ARGUMENTS --json` in a process of its own, in `folder`: its exit status and its JSON object.

    What it says is appended to `log`. `held`: descriptor of a lock that stays locked while the process lives, whatever
    becomes of this one. An interrupt is passed on, and the process waited for.
    """
    command = [sys.executable, "-m", "eightfold", *arguments, "--json"]
    with open(log, "ab") if log else open("/dev/null", "ab") as said:
        said.write(f"--- {_now()} {shlex.join(['eightfold', *arguments])}\n".encode())
        said.flush()
        child = subprocess.Popen(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=said,
            pass_fds=() if held is None else (held,),
            start_new_session=True,  # Ctrl-C reaches it through us alone, once
        )
        try:
            out, _ = child.communicate()
        except KeyboardInterrupt:
            os.killpg(child.pid, signal.SIGINT)
            try:
                child.communicate(timeout=PATIENCE)
            except subprocess.TimeoutExpired:
                os.killpg(child.pid, signal.SIGKILL)
                child.communicate()
            raise
        status = child.returncode
        said.write(f"--- {_now()} exit status {status}\n".encode())
    try:
        return status, json.loads(out)
    except ValueError:
        cause = f"was killed by signal {-status}" if status < 0 else f"ended with exit status {status} and no result"
        return status or 1, {"error": f"the process {cause}; the end of {log} says more"}


@contextmanager
def _terminable() -> Iterator[None]:
    """Inside, SIGTERM is a KeyboardInterrupt."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _state(entry: dict[str, Any]) -> str:
    push = entry.get("push", {}).get("status")
    return entry["status"] + ("" if push is None else ", uploaded" if push == "done" else f", upload {push}")


def _error(content: dict[str, Any]) -> dict[str, Any]:
    return {"error": content["error"]} if content.get("error") else {}


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
