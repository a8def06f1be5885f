"""From a model to a checkpoint, end to end, on every kind of tiny model."""

from __future__ import annotations

import gc
import json
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from models import KINDS, write_model
from plain import dense
from safetensors.torch import load_file, save_file
from small import Silent, files_of, small_request
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from eightfold import pipeline, walk
from eightfold.checkpoint import read_packed, verify_files
from eightfold.folder import ModelFolder
from eightfold.model import Decoder
from eightfold.moments import GroupStatistics
from eightfold.pipeline import Outcome, quantize_model
from eightfold.preflight import make_plan
from eightfold.workspace import partial_path

TOKENS = torch.randint(0, 4096, (2, 20), generator=torch.Generator().manual_seed(3))


@pytest.fixture(autouse=True)
def rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Speeds that need no measuring: it takes half a second a plan."""
    monkeypatch.setattr("eightfold.preflight._rates", lambda device, bits: (1e9, 1e6))


def run(model: Path, out: Path, bits: float = 2, listener: Any = None, **more: Any) -> Outcome:
    return quantize_model(make_plan(small_request(model, out, bits, **more)), listener or Silent())


def load(folder: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(TOKENS).logits


def dense_model(original: Path, quantized: Path) -> nn.Module:
    """The original with the weights of the codes in place of its own, in plain linears."""
    model, folder = load(original), ModelFolder(quantized)
    assert folder.quantization is not None
    if "lm_head" in folder.quantization.layers:  # a tied embedding stays as it is
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    for name in folder.quantization.layers:
        model.get_submodule(name).weight.data = dense(read_packed(folder, name)).float()
    return model


def test_layers_leave_memory_without_the_garbage_collector(model_folder, tmp_path: Path, monkeypatch) -> None:
    """A reference that goes in a circle would keep gigabytes until the collector happens to run."""
    load_layer, twin = Decoder.load_layer, walk.twin
    made: list[weakref.ref[nn.Module]] = []

    def remember(layer: nn.Module) -> nn.Module:
        made.append(weakref.ref(layer))
        return layer

    monkeypatch.setattr(Decoder, "load_layer", lambda *args: remember(load_layer(*args)))
    monkeypatch.setattr(walk, "twin", lambda layer: remember(twin(layer)))
    left: dict[str, int] = {}

    class Counting(Silent):
        def phase(self, name: str, steps: int) -> None:
            left[name] = sum(layer() is not None for layer in made)
            super().phase(name, steps)

    gc.disable()
    try:
        run(model_folder("llama"), tmp_path / "out", 2.5, Counting(), exclude=("*.mlp.*",))
    finally:
        gc.enable()
    assert len(made) > 12
    assert left.pop("evaluating") <= 1  # told when its first layer is there
    assert left == dict.fromkeys(left, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_model(kind: str, model_folder, tmp_path: Path) -> None:
    folder, told = model_folder(kind), Silent()
    outcome = run(folder, tmp_path / "out", listener=told)
    assert outcome.path == tmp_path / "out"
    assert outcome.verdict.passed
    assert verify_files(outcome.path) == []
    assert not partial_path(tmp_path / "out").exists()

    # transformers sees what the format says, biases and all
    model, reference = load(outcome.path), dense_model(folder, outcome.path)
    expected = logits(reference)
    assert torch.allclose(logits(model), expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
    assert not torch.allclose(expected, logits(load(folder)), rtol=0, atol=0.05 * float(expected.abs().max()))
    original, now = load_file(folder / "model.safetensors"), load_file(outcome.path / "model.safetensors")
    kept = [name for name in original if name in now]
    assert all(torch.equal(original[name], now[name]) and original[name].dtype == now[name].dtype for name in kept)
    linears = [name for name, module in reference.named_modules() if isinstance(module, nn.Linear)]
    assert set(original) - set(kept) == {f"{name}.weight" for name in linears if name != "lm_head"}
    assert any(name.endswith(".bias") for name in kept) == (kind == "qwen2")

    # and all of it was told
    layers = model.config.num_hidden_layers
    assert told.phases[0] == ("sensitivity", 2 * layers + 1)
    assert told.phases[1:3] == [("layers", layers), ("writing", 1)]
    assert told.steps == dict(told.phases)
    assert [record["layer"] for record in told.records] == [f"model.layers.{i}" for i in range(layers)]
    assert outcome.records == told.records
    assert all(0 < loss["proxy_loss"] < 0.3 for record in told.records for loss in record["linears"].values())
    manifest = json.loads((outcome.path / "eightfold.json").read_text())
    assert [set(record) for record in manifest["layers"]] == [{"layer", "linears"}] * layers


@pytest.mark.parametrize("kind", ["llama", "llama-tied"])
def test_a_quantized_head(kind: str, model_folder, tmp_path: Path) -> None:
    folder = model_folder(kind)
    outcome = run(folder, tmp_path / "out", 4, include=("lm_head",), exclude=("*.1.*",), shard_bytes=500_000)
    model = load(outcome.path)
    expected = logits(dense_model(folder, outcome.path))
    assert torch.allclose(logits(model), expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
    config = json.loads((outcome.path / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    packed = read_packed(ModelFolder(outcome.path), "lm_head")
    assert packed.spec.out_blocks == (1,) * 4096
    head = load(folder).lm_head.weight.detach()
    noise = (dense(packed) - head.double()).square().mean() / head.double().square().mean()
    assert float(noise) < 10**-1.6
    assert outcome.records[-1]["layer"] == "lm_head"
    assert not any(".1." in name for record in outcome.records for name in record["linears"])
    assert len(list(outcome.path.glob("*.safetensors"))) > 2
    assert verify_files(outcome.path) == []


@pytest.mark.parametrize(("bits", "layout"), [(3, "pow2-sum"), (5, "pow2"), (8, "equal")])
def test_rates_and_layouts(bits: int, layout: str, model_folder, tmp_path: Path) -> None:
    folder = model_folder("qwen2")
    outcome = run(folder, tmp_path / "out", bits, layout=layout, exclude=("*.layers.1.*",))
    assert verify_files(outcome.path) == []
    losses = [loss for record in outcome.records for loss in record["linears"].values()]
    assert min(loss["sqnr_db"] for loss in losses) > 5 * bits - 4
    model, original = load(outcome.path), load(folder)
    error = (logits(model) - logits(original)).square().mean() / logits(original).square().mean()
    assert float(error) < 10 ** (-(5 * bits - 8) / 10)


@pytest.mark.parametrize("kind", ["qwen2", "gemma3"])
def test_every_group_is_quantized_for_the_inputs_it_will_get(
    kind: str, model_folder, tmp_path: Path, monkeypatch
) -> None:
    """Hessians and drifts are those of a whole model in which all groups before are quantized, one after the other."""
    seen: list[tuple[list[str], GroupStatistics, dict[str, Tensor]]] = []
    begin_group = walk.begin_group

    def spy(weights: Any, biases: Any, specs: Any, statistics: GroupStatistics, *more: Any) -> Any:
        begun = begin_group(weights, biases, specs, statistics, *more)
        seen.append((list(weights), statistics, {n: dense(p).float() for n, p in begun.packed.items()}))
        return begun

    monkeypatch.setattr(walk, "begin_group", spy)
    folder = model_folder(kind)
    plan = make_plan(small_request(folder, tmp_path / "out", exclude=("*.k_proj",)))
    quantize_model(plan, Silent())
    original, model = load(folder), load(folder)
    assert {name for names, _, _ in seen for name in names} == set(plan.config.layers)
    for names, statistics, found in seen:
        x0, x = (_inputs(m, names[0], plan.windows) for m in (original, model))
        assert all(torch.equal(_inputs(model, name, plan.windows), x) for name in names[1:])
        H, C = x.T @ x / len(x), (x0 - x).T @ x / len(x)
        assert torch.allclose(statistics.hessian, H, rtol=0, atol=1e-4 * float(H.abs().max()))
        assert statistics.drift is not None
        assert torch.allclose(statistics.drift, C, rtol=0, atol=1e-4 * float(H.abs().max()))
        prefix, _, own = names[0].removesuffix("_proj").rpartition(".")
        norm = {"o": "input_layernorm", "down": "post_attention_layernorm"}.get(own) if kind == "qwen2" else None
        if norm is None:  # its output goes elsewhere, or (Gemma 3) through a norm first
            assert statistics.stream_drift is None
        else:  # what the norm before the branch reads is what the branch adds to
            r0, r = (_inputs(m, f"{prefix.rpartition('.')[0]}.{norm}", plan.windows) for m in (original, model))
            D = (r0 - r).T @ x / len(x)
            assert statistics.stream_drift is not None
            assert torch.allclose(statistics.stream_drift, D, rtol=0, atol=1e-4 * float(H.abs().max()))
        for name, weight in found.items():
            model.get_submodule(name).weight.data = weight
    assert sum(s.drift is not None and float(s.drift.abs().max()) > 0.01 for _, s, _ in seen) > len(seen) / 2


@torch.no_grad()
def _inputs(model: nn.Module, name: str, windows: Tensor) -> Tensor:
    """What linear `name` gets, [tokens, K]."""
    inputs: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(0, -2)))
    for window in windows:
        model(window[None])
    handle.remove()
    return torch.cat(inputs)


def test_sensitivity_reaches_the_groups_unless_it_is_off(model_folder, tmp_path: Path, monkeypatch) -> None:
    seen: list[Any] = []
    begin_group = walk.begin_group

    def spy(weights: Any, biases: Any, specs: Any, statistics: GroupStatistics, *more: Any) -> Any:
        seen.append(statistics.sensitivity)
        return begin_group(weights, biases, specs, statistics, *more)

    monkeypatch.setattr(walk, "begin_group", spy)
    folder, only = model_folder("llama-tied"), ("*.1.*", "*.mlp.*")
    run(folder, tmp_path / "on", exclude=only)
    assert all(set(s) and all(float(v.min()) > 0 for v in s.values()) for s in seen)
    seen.clear()
    told = Silent()
    run(folder, tmp_path / "off", exclude=only, sensitivity_samples=0, listener=told)
    assert seen == [None, None]
    assert told.phases[0][0] == "layers"


# --- the gate, the target -------------------------------------------------------------------------------------------


def test_a_model_that_fails_the_gate_gets_another_name(model_folder, tmp_path: Path) -> None:
    folder, only = model_folder("llama-tied"), ("*.1.*", "*.mlp.*")
    good = run(folder, tmp_path / "out", exclude=only)
    before = files_of(tmp_path / "out")
    bad = run(folder, tmp_path / "out", 3, exclude=only, max_ratio=1e-6)
    assert not bad.verdict.passed
    assert bad.path == tmp_path / "out.failed"
    assert verify_files(bad.path) == []
    assert files_of(tmp_path / "out") == before  # the one that passed is still there
    again = run(folder, tmp_path / "out", 3, exclude=only, max_ratio=1e-6)
    assert again.path == bad.path
    better = run(folder, tmp_path / "out", 4, exclude=only)
    assert better.path == good.path
    assert files_of(tmp_path / "out").keys() == before.keys()
    assert files_of(tmp_path / "out") != before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.failed", "text.txt"]


def test_the_target_is_untouched_until_the_end(model_folder, tmp_path: Path) -> None:
    folder, only = model_folder("llama-tied"), ("*.1.*", "*.mlp.*")
    run(folder, tmp_path / "out", exclude=only)
    before = files_of(tmp_path / "out")

    class Watch(Silent):
        def advance(self, steps: int) -> None:
            super().advance(steps)
            assert files_of(tmp_path / "out") == before

    told = Watch()
    run(folder, tmp_path / "out", 3, exclude=only, listener=told)
    assert [name for name, _ in told.phases][-1] == "generating"
    assert files_of(tmp_path / "out") != before


# --- broken models --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [0, 2])
@pytest.mark.parametrize("tensor", ["model.layers.1.mlp.up_proj.weight", "model.layers.0.input_layernorm.weight"])
def test_weights_that_are_not_finite(tensor: str, samples: int, tmp_path: Path) -> None:
    folder = write_model("llama-tied", tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors[tensor].view(-1)[3] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    layer = tensor.split(".")[2]
    message = rf"model\.layers\.{layer}.* calibration sample 0 .*not finite"
    if samples == 0 and layer == "1":  # nothing has run the layer yet
        message = r"^model\.layers\.1\.mlp\.up_proj: its weights in the original model are not finite"
    with pytest.raises(ValueError, match=message) as caught:
        run(folder, tmp_path / "out", sensitivity_samples=samples)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_sample_that_overflows_is_named(model_folder, tmp_path: Path, monkeypatch) -> None:
    plan = make_plan(small_request(model_folder("llama-tied"), tmp_path / "out", sensitivity_samples=0))
    call, bad = plan.decoder.call, plan.windows[2]

    def broken(i: int, layer: nn.Module, hidden: Tensor) -> Tensor:
        out = call(i, layer, hidden)
        same = i == 0 and torch.equal(hidden, plan.decoder.prologue(bad))
        return out * float("inf") if same else out

    monkeypatch.setattr(type(plan.decoder), "call", lambda self, i, layer, hidden: broken(i, layer, hidden))
    with pytest.raises(ValueError, match=r"^model\.layers\.0.*: calibration sample 2 gives"):
        quantize_model(plan, Silent())


def test_a_disk_without_room(model_folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_plan(small_request(model_folder("llama-tied"), tmp_path / "out"))
    object.__setattr__(plan, "free_bytes", 2 * plan.output_bytes - 1)
    with pytest.raises(ValueError, match="bytes free"):
        quantize_model(plan, Silent())
    assert not partial_path(tmp_path / "out").exists()


def test_another_torch_or_device_is_another_result(
    model_folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan(small_request(model_folder("llama-tied"), tmp_path / "out"))
    fingerprint = pipeline._fingerprint(plan)
    assert fingerprint["device"] == "cpu"
    monkeypatch.setattr(torch, "__version__", "0.0.1")
    assert pipeline._fingerprint(plan) != fingerprint


def test_the_original_is_hashed_while_the_sensitivity_is_found(
    model_folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    began, digest = threading.Event(), ModelFolder.sha256

    def hash_after_it_began(folder: ModelFolder) -> str:
        assert began.wait(60)
        return digest(folder)

    class Watching(Silent):
        def phase(self, name: str, steps: int) -> None:
            super().phase(name, steps)
            if name == "sensitivity":
                began.set()

    monkeypatch.setattr(ModelFolder, "sha256", hash_after_it_began)
    plan = make_plan(small_request(model_folder("llama-tied"), tmp_path / "out"))
    quantize_model(plan, Watching())
    made = ModelFolder(tmp_path / "out").quantization
    assert made is not None
    assert made.provenance["base_sha256"] == digest(plan.folder)
