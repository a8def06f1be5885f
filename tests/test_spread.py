"""Rates that are found: their losses against whole quantizations, a run from end to end, recipes, kills in between."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from plain import dense, hessian, normal, spec
from safetensors.torch import load_file
from small import Silent, files_of, small_request
from test_resume import Worker
from transformers import AutoModelForCausalLM

from eightfold.checkpoint import read_packed, verify_files
from eightfold.folder import ModelFolder
from eightfold.format import BITS
from eightfold.pipeline import Outcome, quantize_model
from eightfold.preflight import Plan, make_plan
from eightfold.quantize import GroupStatistics, Settings, quantize_group
from eightfold.rate_losses import group_losses, measure_losses
from eightfold.rates import RECIPE, nominal_bits, read_recipe
from eightfold.workspace import partial_path


@pytest.fixture(autouse=True)
def rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Speeds that need no measuring: it takes half a second a plan."""
    monkeypatch.setattr("eightfold.preflight._rates", lambda device, bits: (1e9, 1e6))


def run(model: Path, out: Path, bits: float | None = None, listener: Any = None, **more: Any) -> Outcome:
    return quantize_model(make_plan(small_request(model, out, bits, **more)), listener or Silent())


# --- losses ---------------------------------------------------------------------------------------------------------


def test_losses_are_those_of_whole_quantizations() -> None:
    """Of 48 rows of each linear, within a tenth: the sum over outputs of gradient times error, by the plain formula."""
    weights = {"a": normal(256, 192, seed=1), "b": 3 * normal(64, 192, seed=2)}
    weights["a"] *= torch.rand(256, 1, generator=torch.Generator().manual_seed(3)) + 0.2
    H = hessian(192)
    sensitivity = {name: normal(len(W), seed=5).square() + 0.1 for name, W in weights.items()}
    statistics = GroupStatistics(H, sensitivity=sensitivity)
    found = group_losses(weights, {n: spec(*W.shape) for n, W in weights.items()}, statistics, Settings(), BITS, 48)
    assert list(found) == list(BITS)
    for bits in (2, 3, 4):
        specs = {name: spec(*W.shape, bits) for name, W in weights.items()}
        whole = quantize_group(weights, {}, specs, statistics, Settings())
        loss = 0.0
        for name, W in weights.items():
            E = W.double() - dense(whole[name].packed)
            loss += 0.5 * float((sensitivity[name].double() * ((E @ H.double()) * E).sum(1)).sum())
        assert found[bits] == pytest.approx(loss, rel=0.1)
    assert all(2 < found[bits] / found[bits + 1] < 5 for bits in range(2, 8))


def test_the_head_counts_by_how_sure_the_model_is(model_folder, tmp_path: Path) -> None:
    """Its outputs are the logits, the expected squared gradient there is p (1 - p)."""
    plan = make_plan(
        small_request(
            model_folder("llama-tied"), tmp_path / "out", 2.5, include=("lm_head",), exclude=("*.1.*", "*.mlp.*")
        )
    )
    found = measure_losses(plan.decoder, plan.windows, *_ones(plan), plan.request.settings, lambda _: None)
    assert [group.linears for group in found[:2]] == [
        tuple(f"model.layers.0.self_attn.{n}_proj" for n in "qkv"),
        ("model.layers.0.self_attn.o_proj",),
    ]
    model = AutoModelForCausalLM.from_pretrained(model_folder("llama-tied"), dtype=torch.float32)
    with torch.no_grad():
        out = model(plan.windows, output_hidden_states=True)
    x, p = out.hidden_states[-1].flatten(0, 1), out.logits.softmax(-1).flatten(0, 1)
    statistics = GroupStatistics(x.T @ x / len(x), sensitivity={"lm_head": (p * (1 - p)).mean(0)})
    head = {"lm_head": model.lm_head.weight.detach()}
    losses = group_losses(head, plan.config.layers, statistics, plan.request.settings)
    assert found[-1].linears == ("lm_head",)
    assert found[-1].losses == pytest.approx(losses, rel=1e-2)


def _ones(plan: Plan) -> tuple[dict[str, torch.Tensor], Any]:
    """A sensitivity of 1 everywhere, and the specs."""
    layers = plan.config.layers
    return {name: torch.ones(layer.out_features) for name, layer in layers.items()}, layers


def test_losses_need_gradients() -> None:
    with pytest.raises(ValueError, match="expected the outputs' sensitivity"):
        group_losses({"a": normal(16, 64)}, {"a": spec(16, 64)}, GroupStatistics(hessian(64)), Settings())


# --- from end to end ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(model_folder, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """A Llama at 2.5 bits."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("eightfold.preflight._rates", lambda device, bits: (1e9, 1e6))
        told = Silent()
        out = tmp_path_factory.mktemp("made") / "out"
        outcome = run(model_folder("llama-tied"), out, 2.5, told)
    assert told.phases[:3] == [("sensitivity", 5), ("rates", 2), ("layers", 2)]
    assert all(told.steps[name] == steps for name, steps in told.phases)
    assert "linears at 2" in told.notes[0]
    return outcome


def test_rates_differ_and_add_up(made: Outcome) -> None:
    folder = ModelFolder(made.path)
    config = folder.quantization
    assert config is not None
    assert verify_files(made.path) == []
    assert len(config.recipes) > 1
    assert 2.4 < nominal_bits(config.layers.values()) <= 2.5
    assert config.provenance["rates"] == {"bits": 2.5}
    text = (made.path / RECIPE).read_text()
    assert read_recipe(text, "", config.layers) == {name: spec.bits for name, spec in config.layers.items()}
    manifest = json.loads((made.path / "eightfold.json").read_text())
    assert RECIPE in manifest["files"]
    for name, layer in config.layers.items():
        assert read_packed(folder, name).recipe.bits == layer.bits
    for i in range(2):
        groups = [("self_attn", ("q", "k", "v")), ("mlp", ("gate", "up"))]
        for part, names in groups:
            assert len({config.layers[f"model.layers.{i}.{part}.{name}_proj"].bits for name in names}) == 1


def test_a_recipe_gives_the_same_weights_and_an_edited_one_others(made: Outcome, model_folder, tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    shutil.copyfile(made.path / RECIPE, file)
    again = run(model_folder("llama-tied"), tmp_path / "out", recipe=str(file))
    whole, came = (load_file(path / "model.safetensors") for path in (made.path, again.path))
    assert whole.keys() == came.keys()
    assert all(torch.equal(whole[name], came[name]) for name in whole)
    assert (again.path / RECIPE).read_bytes() == file.read_bytes()

    text = file.read_text() + '[[groups]]\nbits = 7\nlinears = ["*.1.mlp.down_proj"]\n'
    file.write_text(text)
    edited = run(model_folder("llama-tied"), tmp_path / "out", recipe=str(file))
    config = ModelFolder(edited.path).quantization
    assert config is not None
    assert config.layers["model.layers.1.mlp.down_proj"].bits == 7
    assert verify_files(edited.path) == []
    assert (edited.path / RECIPE).read_text() == text


def test_linears_that_share_an_input_share_a_rate(model_folder, tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('[[groups]]\nbits = 2\nlinears = ["*"]\n[[groups]]\nbits = 3\nlinears = ["*.0.self_attn.k_proj"]\n')
    with pytest.raises(
        ValueError, match=r"q_proj, .*k_proj, .*share an input, so expected one rate for all, came \[2, 3"
    ):
        run(model_folder("llama-tied"), tmp_path / "out", recipe=str(file))


def test_a_size_is_kept(model_folder, tmp_path: Path) -> None:
    folder, only = model_folder("llama-tied"), ("*.mlp.*",)
    smallest = make_plan(small_request(folder, tmp_path / "out", exclude=only)).output_bytes
    outcome = run(folder, tmp_path / "out", size=smallest + 8000, exclude=only)
    size = (outcome.path / "model.safetensors").stat().st_size
    assert smallest + 4000 < size <= smallest + 8000


# --- kills ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def worker():
    worker = Worker()
    yield worker
    worker.process.communicate(timeout=30)


def test_killed_while_rates_are_found(worker: Worker, model_folder, tmp_path: Path) -> None:
    """At every step up to the first layer, and then once more: the bytes are those of a run that nothing stops."""
    model, out = model_folder("llama-tied"), tmp_path / "out"
    assert worker.run(model, tmp_path / "whole", bits=2.5)["status"] == 0
    seen = ["phase sensitivity", *(f"sensitivity {i}" for i in range(1, 6)), "rename state.json", "phase layers"]
    seen += ["rates 1", "rates 2", "rename 00000.safetensors"]
    died = []
    while "rename 00000.json" not in seen:
        end = worker.run(model, out, bits=2.5, seen=seen)
        assert end["status"] == -signal.SIGKILL, end
        died.append(end["label"])
        seen.append(end["label"])
    assert {"phase rates", "rename recipe.toml", "rename recipe.json", "note"} <= set(died)
    kept = partial_path(out) / "layers" / RECIPE
    text = kept.read_text()
    kept.write_text(text.replace("bits = 2", "bits = 4"))
    end = worker.run(model, out, bits=2.5)
    assert end["status"] == 1
    assert "recipe.toml: not the bytes that were written" in end["error"]
    kept.write_text(text)
    end = worker.run(model, out, bits=2.75)
    assert "provenance.rates.bits was 2.5, is 2.75" in end["error"]
    assert worker.run(model, out, bits=2.5, threads=2)["status"] == 0
    assert files_of(out) == files_of(tmp_path / "whole")
