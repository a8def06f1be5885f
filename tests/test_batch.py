"""Lists of jobs: what is read, done, skipped, resumed, reported."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from packing import write_checkpoint
from small import files_of, small_text

from eightfold import batch, cli
from eightfold.batch import choose, read_jobs
from eightfold.files import lock
from eightfold.options import make_parser
from eightfold.workspace import partial_path

Job = dict[str, Any]


@pytest.fixture
def jobs(model_folder, tmp_path: Path) -> Callable[..., Path]:
    """jobs(*tables, **top): a list of jobs in TOML, quick ones."""
    small_text(tmp_path)
    quick: Job = {"model": str(model_folder("llama-tied")), "exclude": ["*.mlp.*"], "calibration": "text.txt"}
    quick |= {"eval-text": "text.txt", "samples": 4, "seqlen": 32, "max_ratio": 1e9, "device": "cpu"}

    def write(*tables: Job, **top: Any) -> Path:
        lines = [f"{key} = {json.dumps(value)}" for key, value in top.items()]
        for name, table in (("[defaults]", quick), *(("[[jobs]]", table) for table in tables)):
            lines += [name, *(f"{key} = {json.dumps(value)}" for key, value in table.items())]
        file = tmp_path / "jobs.toml"
        file.write_text("\n".join(lines))
        return file

    return write


@pytest.fixture
def ran(model_folder, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Commands are listed, and run within this process; in place of a quantization, a checkpoint of random codes."""
    commands: list[list[str]] = []
    monkeypatch.setattr("eightfold.preflight._rates", lambda device, bits: (1e9, 1e6))
    evaluation = dict.fromkeys(("perplexity", "ratio", "ratio_se", "kl", "kl_se", "top1"), 1.5)

    def quantize(arguments: Sequence[str], log: Path) -> tuple[int, Any]:
        options = make_parser().parse_args(arguments)
        if options.samples > 1000:
            log.write_text("calibration text: give more text\n")
            return 1, {"error": "calibration text: give more text"}
        good = options.max_ratio is None or options.max_ratio > 1
        made = Path(options.out if good else f"{options.out}.failed")
        write_checkpoint(model_folder("llama-tied"), made, bits=[int(options.bits)])
        reasons = [] if good else ["perplexity is 1.500 times the original's, more than 1e-06 times"]
        return 0 if good else 3, {"path": str(made), "gate": {"evaluation": evaluation, "reasons": reasons}}

    def run(arguments: Sequence[str], log: Path | None, folder: Path, held: int | None = None) -> tuple[int, Any]:
        commands.append(list(arguments))
        if arguments[0] == "quantize" and log is not None:
            return quantize(arguments, log)
        before = Path.cwd()
        os.chdir(folder)
        out, said = StringIO(), StringIO()
        try:
            with redirect_stdout(out), redirect_stderr(said):
                status = cli.main([*arguments, "--json"])
        finally:
            os.chdir(before)
            if log is not None:
                with log.open("a") as file:
                    file.write(said.getvalue())
        return status, json.loads(out.getvalue())

    monkeypatch.setattr(batch, "run_command", run)
    return commands


def run(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, dict[str, Any], str]:
    """Exit status, JSON object, standard error of a command."""
    status = cli.main([*map(str, arguments), "--json"])
    out, err = capsys.readouterr()
    return status, json.loads(out), err


def ledger(file: Path) -> dict[str, Any]:
    return json.loads((file.with_suffix(".batch") / "ledger.json").read_text())


# --- the list -------------------------------------------------------------------------------------------------------


def test_a_list_is_read(jobs, tmp_path: Path) -> None:
    file = jobs({"bits": 2.5}, {"size": "3GB", "name": "mine", "out": "other", "resume": False}, out="made")
    first, second = read_jobs(file)
    assert first.name == "llama-tied0-2.5bit"
    assert first.out == tmp_path / "made" / first.name
    assert first.quantize[:1] + first.quantize[2:5] == ("quantize", str(first.out), "--exclude", "*.mlp.*")
    assert first.quantize[-2:] == ("--bits", "2.5")
    assert first.push == ()
    assert (second.name, second.out) == ("mine", tmp_path / "made" / "other")
    assert second.quantize[-3:] == ("--size", "3GB", "--no-resume")
    file = jobs({"bits": 2, "push": "me/it", "public": True, "license": "mit"})
    assert read_jobs(file)[0].push[2:] == ("me/it", "--license", "mit", "--public")


@pytest.mark.parametrize(
    ("table", "sentence"),
    [
        ({}, "job 1: one of the arguments --bits --stored-bits --size --recipe is required"),
        ({"bits": 9}, "job 1: argument --bits: expected bits from 2 to 8, got 9"),
        ({"bits": 2, "size": "1GB"}, "job 1: argument --size: not allowed with argument --bits"),
        ({"bits": 2, "colour": "red"}, "job 1: unrecognized arguments: --colour red"),
        ({"bits": 2, "model": ""}, "job 1: expected a model, came none"),
        ({"bits": 2, "model": 3}, "job 1: model: expected a text, came 3"),
        ({"bits": 2, "name": "a/b"}, "job 1: name: expected letters, digits"),
        ({"bits": 2, "exclude": []}, "job 1: exclude: expected a text, a number or a list"),
        ({"bits": 2, "public": True}, "job 1: public: expected push"),
        ({"bits": 2, "push": "me/it", "public": 1}, "job 1: public: expected true or false, came 1"),
    ],
)
def test_bad_jobs(table: Job, sentence: str, jobs, capsys, ran) -> None:
    status, content, err = run(capsys, "batch", jobs(table))
    assert (status, ran) == (1, [])
    assert sentence in content["error"]
    assert "Traceback" not in err


def test_bad_lists(jobs, capsys, tmp_path: Path) -> None:
    for text, sentence in (
        ("jobs = ", "expected a list of jobs in TOML"),
        ("", r"expected at least one table [[jobs]], came none"),
        ("[[job]]\nbits = 2", "expected out, [defaults] and [[jobs]], came job"),
    ):
        (tmp_path / "bad.toml").write_text(text)
        assert sentence in run(capsys, "batch", tmp_path / "bad.toml")[1]["error"]
    assert "expected a list" in run(capsys, "batch", tmp_path / "none.toml")[1]["error"]
    for twice in ({"name": "a"}, {"out": "b"}):
        assert "comes twice" in run(capsys, "batch", jobs({"bits": 2} | twice, {"bits": 3} | twice))[1]["error"]


def test_only(jobs) -> None:
    every = read_jobs(jobs({"bits": 2, "name": "a2"}, {"bits": 3, "name": "a3"}, {"bits": 2, "name": "b"}))
    assert [job.name for job in choose(every, ["b", "a?"])] == ["a2", "a3", "b"]
    assert [job.name for job in choose(every, ["a3"])] == ["a3"]
    assert choose(every, None) == every
    with pytest.raises(ValueError, match="--only c: expected one of the jobs, they are a2, a3, b"):
        choose(every, ["b", "c"])


# --- the work -------------------------------------------------------------------------------------------------------


def test_a_failure_is_reported_and_the_rest_is_done(jobs, capsys, ran, tmp_path: Path) -> None:
    """Then, once more: what is done is not done again, what failed is tried again, what is new or damaged is made."""
    tables = [{"bits": 2, "name": "a"}, {"bits": 3, "name": "b", "samples": 10**6}, {"bits": 3, "name": "c"}]
    tables.append({"bits": 2, "name": "d", "max_ratio": 1e-6})
    file = jobs(*tables)
    status, content, err = run(capsys, "batch", file)
    assert status == 1
    states = [entry["status"] for entry in content["jobs"]]
    assert states == ["done", "failed", "done", "failed the gate"]
    a, b, c, d = content["jobs"]
    assert "give more text" in b["error"]
    assert f"b: failed: {b['error']}" in err
    assert "more than 1e-06 times" in d["error"]
    assert d["path"] == str(tmp_path / "d.failed")
    assert 2 < a["stored_bits"] < c["stored_bits"]
    assert a["ratio"] > 0
    assert a["output_bytes"] == (tmp_path / "a" / "model.safetensors").stat().st_size
    assert ledger(file) == {each.pop("name"): each for each in content["jobs"]}
    log = Path(b["log"]).read_text()
    assert "give more text" in log

    ran.clear()
    made = files_of(tmp_path / "a")
    (tmp_path / "c" / "tokenizer.json").write_text("{}")
    tables[1] |= {"samples": 4}
    tables[3] |= {"max_ratio": 1e9}
    file = jobs(*tables, {"bits": 2.5, "name": "e"})
    status, content, err = run(capsys, "batch", file)
    assert status == 0
    assert [each[2] for each in ran] == [str(tmp_path / name) for name in "bcde"]
    assert "b: begins anew, its settings have changed" in err
    assert "c: begins anew, its files are not those that were written" in err
    assert "error" not in content["jobs"][1]
    assert files_of(tmp_path / "a") == made
    ran.clear()
    assert run(capsys, "batch", file)[0] == 0
    assert ran == []


def test_an_interrupted_job_goes_on(jobs, capsys, ran, monkeypatch) -> None:
    file = jobs({"bits": 2, "name": "a"}, {"bits": 3, "name": "b"})
    inner = batch.run_command

    def interrupted(*arguments: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(batch, "run_command", interrupted)
    status, content, _ = run(capsys, "batch", file)
    assert status == 130
    assert "run the same command to go on" in content["error"]
    assert {name: entry["status"] for name, entry in ledger(file).items()} == {"a": "interrupted"}
    monkeypatch.setattr(batch, "run_command", inner)
    status, _, err = run(capsys, "batch", file, "--only", "a", "--no-resume")
    assert status == 0
    assert "1/1  a: goes on" in err
    assert ran[0][-1] == "--no-resume"
    assert len(ran) == 1


def test_dry_run_touches_nothing(jobs, capsys, ran, tmp_path: Path) -> None:
    file = jobs({"bits": 2, "name": "a"}, {"stored-bits": 1.5, "name": "b"})
    before = files_of(tmp_path)
    status, content, _ = run(capsys, "batch", file, "--dry-run")
    assert files_of(tmp_path) == before
    a, b = content["jobs"]
    assert (status, a["status"], b["status"]) == (1, "planned", "bad")
    assert a["output_bytes"] > 0
    assert a["seconds_estimate"] > 0
    assert "expected a target of at least" in b["error"]


def test_uploads(jobs, capsys, ran, monkeypatch) -> None:
    """Uploaded once; tried again alone when it failed; again when the files are others."""
    file = jobs({"bits": 2, "name": "a", "push": "me/a", "license": "mit", "public": True}, {"bits": 3, "name": "b"})
    inner, answers = batch.run_command, [(1, {"error": "no network", "repo": "me/a"})]
    pushed: list[list[str]] = []

    def hub(arguments: Sequence[str], *more: Any) -> Any:
        if arguments[0] != "push":
            return inner(arguments, *more)
        pushed.append(list(arguments))
        return answers.pop() if answers else (0, {"repo": "me/a", "commit": "1" * 40, "public": True})

    monkeypatch.setattr(batch, "run_command", hub)
    status, content, err = run(capsys, "batch", file)
    assert status == 1
    assert content["jobs"][0]["push"]["status"] == "failed"
    assert "a: done, upload failed: no network" in err
    assert content["jobs"][1]["status"] == "done"
    ran.clear()
    status, content, err = run(capsys, "batch", file)
    assert (status, ran) == (0, [])
    assert content["jobs"][0]["push"]["commit"] == "1" * 40
    assert pushed[0] == pushed[1] == ["push", str(file.parent / "a"), "me/a", "--license", "mit", "--public"]
    run(capsys, "batch", file)
    assert len(pushed) == 2
    shutil.rmtree(file.parent / "a")
    run(capsys, "batch", file)
    assert [each[2] for each in ran] == [str(file.parent / "a")]
    assert len(pushed) == 2  # the same bytes


def test_one_batch_works_on_a_list_at_a_time(jobs, capsys, ran) -> None:
    file = jobs({"bits": 2, "name": "a"})
    with lock(file.with_suffix(".batch")):
        status, content, _ = run(capsys, "batch", file)
    assert status == 1
    assert "jobs.batch is in use by another process" in content["error"]


# --- in processes of their own --------------------------------------------------------------------------------------


def test_killed_and_begun_again(jobs, tmp_path: Path) -> None:
    """SIGKILL of a batch: the list stays locked while its job lives. SIGKILL of the job: reported, and it goes on."""
    file = jobs({"bits": 2, "name": "a"})
    command = [sys.executable, "-m", "eightfold", "batch", str(file), "--json"]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    first = subprocess.Popen(command, **pipes)
    job = _child_of(first.pid, partial_path(tmp_path / "a") / "layers")
    os.kill(first.pid, signal.SIGSTOP)
    os.kill(job, signal.SIGSTOP)
    first.kill()
    first.communicate()
    assert ledger(file)["a"]["status"] == "running"
    again = subprocess.run(command, **pipes, check=False)
    assert again.returncode == 1
    assert "is in use by another process" in again.stderr
    os.kill(job, signal.SIGKILL)
    while Path(f"/proc/{job}").exists() and "(Z)" not in Path(f"/proc/{job}/stat").read_text().replace(") Z", "(Z)"):
        time.sleep(0.05)
    last = subprocess.run(command, **pipes, check=False)
    assert last.returncode == 0, last.stderr
    assert "goes on, it was cut short" in last.stderr
    assert json.loads(last.stdout)["jobs"][0]["status"] == "done"
    log = (file.with_suffix(".batch") / "a.log").read_text()
    assert log.count("eightfold quantize") == 2
    assert "exit status 0" in log


def _child_of(parent: int, working: Path) -> int:
    """The process that `parent` has started, once it has begun to work."""
    end = time.monotonic() + 60
    while not working.exists():
        assert time.monotonic() < end
        time.sleep(0.02)
    (child,) = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return int(child)


def test_an_interrupt_is_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process gets it once, ends in order, and is waited for."""
    stand_in = tmp_path / "python"
    stand_in.write_text(f"""#!{sys.executable}
import sys, time
print("begun", file=sys.stderr, flush=True)
try:
    time.sleep(60)
except KeyboardInterrupt:
    print("in order", file=sys.stderr, flush=True)
""")
    stand_in.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(stand_in))
    log = tmp_path / "log"

    def interrupt() -> None:
        while not log.exists() or "begun" not in log.read_text():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    # Who started the tests may have had interrupts ignored, which the process of the command would inherit.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            batch.run_command(["quantize"], log, tmp_path)
    finally:
        signal.signal(signal.SIGINT, before)
    thread.join()
    assert "in order" in log.read_text()


def test_a_process_that_dies(tmp_path: Path) -> None:
    status, content = batch.run_command(["teleport"], tmp_path / "log", tmp_path)
    assert status == 2
    assert "ended with exit status 2 and no result" in content["error"]
    assert "invalid choice: 'teleport'" in (tmp_path / "log").read_text()
