from __future__ import annotations

import json

import pytest
from packing import write_checkpoint

from eightfold import bundled, cli, commands
from eightfold.checkpoint import verify_files
from eightfold.demo import DemoSettings, run_demo
from eightfold.evaluate import EvalResult
from eightfold.report import Original, Report, Row
from eightfold.workspace import partial_path

TINY = DemoSettings(bits=(2, 3), samples=4, seqlen=32, sensitivity_samples=1, eval_windows=3)


@pytest.fixture
def random_model(model_folder, tmp_path, monkeypatch):
    """A small random model and beginnings of the texts stand for the bundled ones: seconds, not minutes."""
    for name in ("calibration_text", "evaluation_text"):
        short = tmp_path / name
        short.write_text(getattr(bundled, name)().read_text(encoding="utf-8")[:20_000], encoding="utf-8")
        monkeypatch.setattr(bundled, name, lambda path=short: path)
    folder = tmp_path / "tiny"
    folder.symlink_to(model_folder("qwen2"))
    monkeypatch.setattr(bundled, "tiny_lm", lambda: folder)
    return folder


class Listener:
    def __init__(self):
        self.prefix, self.phases = "", []

    def phase(self, name, steps):
        self.phases.append(self.prefix + name)

    def advance(self, steps): ...

    def layer(self, record): ...


def test_demo(random_model, tmp_path):
    """It replaces what an earlier one left, an unfinished one included, and leaves other files alone."""
    out = tmp_path / "report"
    stale = write_checkpoint(random_model, out / "tiny-2bit", head=True)
    layers = json.loads((stale / "config.json").read_text())["quantization_config"]["layers"]
    (partial_path(out / "tiny-3bit") / "layers").mkdir(parents=True)
    (partial_path(out / "tiny-3bit") / "state.json").write_text('{"fingerprint": {"version": 0}}')
    (out / "notes.txt").write_text("mine")

    listener = Listener()
    report = run_demo(out, listener, TINY)

    assert {path.name for path in out.iterdir()} == {
        "tiny-2bit", "tiny-3bit", "report.md", "report.json", "perplexity.png", "notes.txt",
    }  # fmt: skip
    for row in report.rows:
        assert verify_files(out / row.name) == []
        assert row.evaluation.windows == 3
        assert row.evaluation.against_perplexity == pytest.approx(report.original.evaluation.perplexity)
        assert [prompt for prompt, _ in row.samples] == [prompt for prompt, _ in report.original.samples]
    assert [row.bits for row in report.rows] == [2, 3]
    assert json.loads((stale / "config.json").read_text())["quantization_config"]["layers"].keys() != layers.keys()
    assert json.loads((out / "report.json").read_text())["original"]["bits"] == 16
    assert {"2 bits: layers", "3 bits: layers", "original: evaluating"} <= set(listener.phases)


def test_command(tmp_path, monkeypatch, capsys):
    evaluation = EvalResult(3, 93, 2.0, 0.1, 7.389, 0.7, 7.0, 1.06, 0.01, 0.1, 0.01, 0.9, 0.01)
    row = Row("m-2bit", 2, 2.1, 1000, evaluation, [], ["it says nothing"])
    report = Report(Original("m", 16, 8000, evaluation, []), [row], {})
    monkeypatch.setattr(commands, "run_demo", lambda out, listener: report)
    assert cli.main(["demo", "--out", str(tmp_path), "--json"]) == 3
    out, err = capsys.readouterr()
    content = json.loads(out)
    assert (content["command"], content["exit_status"], content["out"]) == ("demo", 3, str(tmp_path))
    assert content["quantized"] == [row.to_dict()]
    assert f"Report: {tmp_path / 'report.md'}" in err
    assert "Failed the gate: m-2bit: it says nothing." in err
