from __future__ import annotations

import json
import subprocess
import sys
from contextlib import redirect_stdout
from io import StringIO

import pytest
import torch
from glq_writer import Recipe, write_glq
from safetensors.torch import load_file
from transformers.utils import logging

import eightfold
from eightfold import bundled, cli, console, gate, options
from eightfold.evaluate import NotFiniteError
from eightfold.workspace import MANIFEST, partial_path


@pytest.fixture
def run(capsys):
    """run(*arguments) -> (exit status, standard output, standard error)."""

    def call(*arguments):
        capsys.readouterr()
        status = cli.main([str(a) for a in arguments])
        return status, *capsys.readouterr()

    return call


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Options for a quick run: little text, of which the most costs time in tokenizing."""
    folder = tmp_path_factory.mktemp("texts")
    for name in ("calibration", "evaluation"):
        text = getattr(bundled, f"{name}_text")().read_text(encoding="utf-8")
        (folder / f"{name}.txt").write_text(text[:20_000], encoding="utf-8")
    texts = ("--calibration", str(folder / "calibration.txt"), "--eval-text", str(folder / "evaluation.txt"))
    return ("--samples", "4", "--seqlen", "32", *texts)


@pytest.fixture(scope="module")
def source(model_folder):
    return model_folder("qwen2")


@pytest.fixture(scope="module")
def made(source, tmp_path_factory, small):
    """A checkpoint of 3 bits, and the JSON object of the command that made it."""
    out = tmp_path_factory.mktemp("made") / "q3"
    with redirect_stdout(StringIO()) as stdout:
        assert cli.main(["quantize", str(source), str(out), "--bits", "3", *small, "--json"]) == 0
    return out, json.loads(stdout.getvalue())


def test_quantize(made, source):
    out, content = made
    assert (content["command"], content["exit_status"], content["status"]) == ("quantize", 0, "done")
    assert content["path"] == str(out)
    assert content["gate"]["passed"]
    assert content["plan"]["output_bytes"] == (out / "model.safetensors").stat().st_size
    assert [layer["layer"] for layer in content["layers"]] == ["model.layers.0", "model.layers.1"]
    assert (out / MANIFEST).exists()
    assert not partial_path(out).exists()


def test_dry_run_touches_nothing(run, source, tmp_path, small):
    status, out, err = run("quantize", source, tmp_path / "q", "--bits", 4, *small, "--dry-run", "--json")
    content = json.loads(out)
    assert (status, content["status"]) == (0, "dry run")
    assert content["plan"]["stored_bits"] > 4
    assert "14 linears" in err
    assert not list(tmp_path.iterdir())


def test_dry_run_of_rates_that_are_to_be_found(run, source, tmp_path, small):
    """Sizes are about right: they fill what was asked for; which linear gets what is not known yet."""
    status, out, err = run("quantize", source, tmp_path / "q", "--stored-bits", 3.5, *small, "--dry-run", "--json")
    plan = json.loads(out)["plan"]
    assert status == 0
    assert plan["target"] == {"stored_bits": 3.5}
    assert 3.3 < plan["stored_bits"] <= 3.5
    assert "3.5 stored bits, shared out by what each group of linears loses" in err
    status, out, _ = run("quantize", source, tmp_path / "q", "--size", "1MB", *small, "--dry-run", "--json")
    assert 0.98e6 < json.loads(out)["plan"]["output_bytes"] <= 1e6
    assert not list(tmp_path.iterdir())


def test_wider_scale_vectors_are_stored_and_counted(run, source, tmp_path, small):
    stored = {}
    for dtype in ("float16", "float32"):
        settings = ("--bits", 4, *small, "--scale-dtype", dtype, "--dry-run", "--json")
        stored[dtype] = json.loads(run("quantize", source, tmp_path / "q", *settings)[1])["plan"]["stored_bits"]
    assert stored["float32"] > stored["float16"] > 4


def test_the_codebook_changes_the_recipe_and_no_sizes(run, source, tmp_path, small):
    plans = {}
    for codebook in ("e8p", "e8shell"):
        settings = ("--bits", 3, *small, "--codebook", codebook, "--dry-run", "--json")
        plans[codebook] = json.loads(run("quantize", source, tmp_path / "q", *settings)[1])["plan"]
        assert plans[codebook]["codebook"] == codebook
    assert plans["e8p"]["stored_bits"] == plans["e8shell"]["stored_bits"]


def test_failed_gate(run, source, tmp_path, small):
    out = tmp_path / "q"
    settings = ("--exclude", "*.mlp.*", "--tp-max", 1, "--max-ratio", "0.5")
    status, text, err = run("quantize", source, out, "--bits", 2, *small, *settings)
    assert status == 3
    for words in ("2 nominal", "stored per original weight", "8 linears", "lm_head", "free disk", "peak memory"):
        assert words in err
    assert "1/2  model.layers.0  proxy loss" in err
    assert "Loading weights" not in err
    assert "perplexity of the original" in text
    assert "more than 0.5 times" in err
    assert f"kept as {out}.failed" in err
    assert [path.name for path in tmp_path.iterdir()] == ["q.failed"]


def test_logits_that_are_not_finite_fail_the_gate(run, source, tmp_path, monkeypatch, small):
    def broken(*_):
        raise NotFiniteError("evaluation window 0: the logits are not finite; the model is broken")

    monkeypatch.setattr(gate, "evaluate", broken)
    status, text, err = run("quantize", source, tmp_path / "q", "--bits", 2, *small, "--json")
    content = json.loads(text)
    assert (status, content["exit_status"], content["status"]) == (3, 3, "gate failed")
    assert content["path"] == f"{tmp_path / 'q'}.failed"
    assert content["gate"]["evaluation"] is None
    assert "evaluation window 0" in err
    assert (tmp_path / "q.failed" / MANIFEST).exists()


def test_interrupted_goes_on(run, made, source, tmp_path, monkeypatch, small):
    """Ctrl-C after the first layer; other settings are refused; the same command ends with the same bytes."""
    out, whole = tmp_path / "q3", made[0]
    command = ("quantize", source, out, "--bits", 3, *small)
    with monkeypatch.context() as patch:

        def interrupt(self, record):
            raise KeyboardInterrupt

        patch.setattr(console.Steps, "layer", interrupt)
        status, _, err = run(*command)
    assert status == 130
    assert f"finished layers are kept in {partial_path(out)}; run the same command to go on" in err

    status, _, err = run(*command, "--seed", 1)
    assert status == 1
    assert "seed was 0, is 1" in err
    assert "--no-resume" in err
    assert "Traceback" not in err

    status, text, err = run(*command)
    assert status == 0
    assert f"Done: {out}" in text
    assert "Going on after 1 finished layers" in err
    for file in whole.iterdir():
        assert (out / file.name).read_bytes() == file.read_bytes(), file.name


def test_no_resume_begins_anew(run, source, tmp_path, small):
    """In shards, while we are at it."""
    out = tmp_path / "q"
    (partial_path(out) / "layers").mkdir(parents=True)
    (partial_path(out) / "state.json").write_text('{"fingerprint": {"other": 1}}')
    command = ("quantize", source, out, "--bits", 2, *small, "--shard-size", "100kB")
    assert run(*command)[0] == 1
    assert run(*command, "--no-resume")[0] == 0
    assert len(list(out.glob("model-*-of-*.safetensors"))) > 1


def test_eval(run, made, source):
    arguments = ("eval", made[0], "--against", source, "--seqlen", 32, "--windows", 3)
    status, out, _ = run(*arguments, "--json")
    content = json.loads(out)
    assert (status, content["windows"], content["tokens"], content["seqlen"]) == (0, 3, 3 * 31, 32)
    assert content["stored_bits"] == made[1]["plan"]["stored_bits"]
    for name in ("perplexity", "kl", "top1", "ratio"):
        assert content[name] > 0
        assert content[f"{name}_se"] > 0
    status, out, _ = run(*arguments)
    assert status == 0
    assert f"{content['kl']:.4f} ± {content['kl_se']:.4f} nats" in out
    assert "(3 nominal)" in out


def test_eval_of_an_original_alone(run, source, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("Some words that stand for a text. " * 40)
    status, out, _ = run("eval", source, "--text", text, "--seqlen", 32, "--json")
    content = json.loads(out)
    assert (status, content["kl"], content["stored_bits"]) == (0, None, None)
    assert content["perplexity"] > 1


def test_inspect(run, made):
    status, out, _ = run("inspect", made[0], "--json")
    content = json.loads(out)
    total = content["total"]
    assert (status, total["linears"], total["bits"]) == (0, 14, 3)
    assert total["stored_bits"] == made[1]["plan"]["stored_bits"]
    assert total["bytes_predicted"] == total["bytes_measured"] == sum(e["bytes_measured"] for e in content["layers"])
    assert total["file_bytes"] == (made[0] / "model.safetensors").stat().st_size
    losses = made[1]["layers"][0]["linears"]["model.layers.0.mlp.up_proj"]
    layer = next(e for e in content["layers"] if e["name"] == "model.layers.0.mlp.up_proj")
    assert (layer["proxy_loss"], layer["sqnr_db"]) == (losses["proxy_loss"], losses["sqnr_db"])
    assert content["provenance"]["base_sha256"]
    status, out, _ = run("inspect", made[0])
    assert status == 0
    assert f"{total['bytes_measured']:,}" in out.splitlines()[15]
    assert "base sha256" in out


def test_verify(run, made, source):
    status, out, _ = run("verify", made[0], "--against", source, "--json")
    content = json.loads(out)
    assert (status, content["passed"], content["problems"]) == (0, True, [])
    assert content["lowest"]["sqnr_db"] == min(content["sqnr_db"].values())
    status, _, err = run("verify", source)
    assert status == 1
    assert "no quantization_config" in err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["quantize", "/nowhere", "{out}", "--bits", "2"], "/nowhere: expected a model folder"),
        (["quantize", "{made}", "{out}", "--bits", "2"], "this one is quantized already"),
        (["quantize", "{source}", "{file}", "--bits", "2"], "it is a file"),
        (["quantize", "{source}", "{source}", "--bits", "2"], "so it is not replaced"),
        (["quantize", "{source}", "{out}", "--bits", "2", "--device", "abacus"], "expected a device such as cpu"),
        (["quantize", "{source}", "{out}", "--bits", "2", "--dtype", "int3"], "expected a dtype out of"),
        (["quantize", "{source}", "{out}", "--bits", "2", "--calibration", "/no.txt"], "/no.txt: expected a text file"),
        (["quantize", "{source}", "{out}", "--bits", "2", "--samples", "999999"], "give more text"),
        (["quantize", "{source}", "{out}", "--bits", "2", "--exclude", "*.moe"], "'*.moe' matches no linear"),
        (["quantize", "{source}", "{out}", "--bits", "2", "--layout", "spiral"], "expected a layout out of"),
        (["quantize", "{source}", "{out}", "--stored-bits", "2"], "expected a target of at least"),
        (["quantize", "{source}", "{out}", "--recipe", "{file}"], "expected tables [[groups]]"),
        (["quantize", "{source}", "{out}", "--recipe", "/no.toml"], "/no.toml: expected a recipe file"),
        (["eval", "{file}"], "expected a model folder"),
        (["eval", "{source}", "--text", "/no.txt"], "/no.txt: expected a text file"),
        (["inspect", "{source}"], "expected an eightfold checkpoint"),
        (["verify", "/nowhere"], "there is no such folder"),
        (["demo", "--out", "{file}"], "it is a file"),
    ],
)
def test_bad_input_is_one_sentence(run, made, source, tmp_path, arguments, sentence):
    file = tmp_path / "file"
    file.touch()
    known = {"out": tmp_path / "out", "made": made[0], "source": source, "file": file}
    status, out, err = run(*(a.format(**known) for a in arguments), "--json")
    assert (status, json.loads(out)["exit_status"]) == (1, 1)
    assert sentence in err
    assert json.loads(out)["error"] in err
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_traceback_on_demand(source):
    with pytest.raises(ValueError, match="no quantization_config"):
        cli.main(["inspect", str(source), "--traceback"])


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["quantize", "model", "out"],
        ["quantize", "model", "out", "--bits", "9"],
        ["quantize", "model", "out", "--bits", "1.5"],
        ["quantize", "model", "out", "--bits", "2", "--size", "1GB"],
        ["batch"],
        ["card"],
        ["push", "dir"],
        ["quantize", "model", "out", "--bits", "2", "--samples", "0"],
        ["quantize", "model", "out", "--bits", "2", "--shard-size", "big"],
        ["quantize", "model", "out", "--bits", "2", "--max-ratio", "-1"],
        ["teleport"],
    ],
)
def test_usage(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("usage: eightfold")


@pytest.mark.parametrize(
    ("text", "count"), [("4GB", 4 * 10**9), ("1.5 MB", 1_500_000), ("2GiB", 2 << 30), ("500k", 500_000), ("4096", 4096)]
)
def test_shard_size(text, count):
    assert options._bytes(text) == count


def test_libraries_are_as_before(run, made):
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    run("verify", made[0])
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


def test_standard_output_is_one_object(made):
    """In a process of its own, so that what libraries print counts."""
    command = [sys.executable, "-m", "eightfold", "verify", str(made[0]), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.count("\n") == 1
    assert json.loads(done.stdout)["passed"]
    assert "Loading weights" not in done.stderr
    assert "Warning" not in done.stderr


def test_version_needs_no_torch():
    code = (
        "import sys\nfrom eightfold.cli import main\ntry: main(['--version'])\n"
        "except SystemExit as stop: print(stop.code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == f"eightfold {eightfold.__version__}\n0 False\n"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.44, "0.4 s"), (21, "21 s"), (200, "3 min 20 s"), (7500, "2 h 05 min")],
)
def test_duration(seconds, text):
    assert console.duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"), [(12, "12 bytes"), (2280768, "2.28 MB"), (999_900, "1e+03 kB"), (64_000_000_000, "64 GB")]
)
def test_size(count, text):
    assert console.size(count) == text.replace("1e+03 kB", "1000 kB")


def test_bundled_model_is_planned(run, tmp_path, small):
    status, out, _ = run("quantize", bundled.tiny_lm(), tmp_path / "q", "--bits", 2, "--dry-run", "--json", *small)
    assert status == 0
    assert 2.1 < json.loads(out)["plan"]["stored_bits"] < 2.15


# --- GLQ --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def glq(source, tmp_path_factory):
    """A GLQ checkpoint of a model with biases, which it lacks."""
    folder = tmp_path_factory.mktemp("glq") / "glq"
    write_glq(source, folder, Recipe(bits=(2, 3)))
    return folder


def test_convert(run, glq, source, tmp_path):
    out, back = tmp_path / "out", tmp_path / "back"
    status, text, err = run("convert", glq, out)
    assert status == 1
    assert "GLQ dropped it" in err
    assert "--zero-biases" in err
    status, text, _ = run("convert", glq, out, "--base", source, "--shard-size", "300kB", "--json")
    content = json.loads(text)
    assert (status, content["status"], content["path"], content["layers"]) == (0, "done", str(out), 14)
    assert len(list(out.glob("model-*.safetensors"))) > 1
    assert run("verify", out)[0] == 0
    status, _, err = run("convert", out, back, "--to", "glq")
    assert status == 1
    assert "expected no bias or zeros" in err
    assert run("convert", glq, out, "--zero-biases", "--no-resume")[0] == 0  # replaces what we wrote
    assert run("convert", out, back, "--to", "glq")[0] == 0
    came, again = load_file(glq / "model.safetensors"), load_file(back / "model.safetensors")
    assert came.keys() == again.keys()
    assert all(torch.equal(came[name], again[name]) for name in came)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "out"]
    for command, sentence in (
        (("convert", glq, back, "--zero-biases"), "so it is not replaced"),
        (("convert", glq, tmp_path / "x", "--to", "glq"), "it is a GLQ one already"),
        (("convert", out, tmp_path / "x", "--to", "glq", "--zero-biases"), "leave them out with --to glq"),
        (("convert", out, tmp_path / "x"), "expected a GLQ checkpoint"),
        (("convert", source, tmp_path / "x", "--to", "glq"), "expected an eightfold checkpoint"),
        (("quantize", glq, tmp_path / "x", "--bits", 2), "give the folder of the original model"),
    ):
        status, _, err = run(*command)
        assert status == 1
        assert sentence in err
    assert not (tmp_path / "x").exists()


def test_inspect_and_verify_of_a_glq_checkpoint(run, glq, model_folder, tmp_path):
    status, out, _ = run("inspect", glq, "--json")
    content = json.loads(out)
    total = content["total"]
    assert (status, total["linears"]) == (0, 14)
    assert total["bytes_predicted"] == total["bytes_measured"] > 0
    assert (
        total["other_bytes"] + total["bytes_measured"]
        < total["file_bytes"]
        == (glq / "model.safetensors").stat().st_size
    )
    assert content["provenance"]["glq"]["codebook"] == "e8p"
    status, out, err = run("verify", glq)
    assert status == 1
    assert "GLQ dropped it" in err
    unbiased = tmp_path / "unbiased"
    write_glq(model_folder("llama"), unbiased, Recipe("e8_shell", bits=(3,)))
    status, out, err = run("verify", unbiased, "--json")
    content = json.loads(out)
    assert (status, content["passed"], content["layers"]) == (0, True, 21)
    assert "has no hashes" in content["notes"][0]
    text = tmp_path / "text.txt"
    text.write_text("Some words that stand for a text. " * 40)
    assert run("eval", unbiased, "--text", text, "--seqlen", 32)[0] == 0
