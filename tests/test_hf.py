from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from packing import write_checkpoint
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

import eightfold
from eightfold.checkpoint import read_packed, verify_files
from eightfold.folder import ModelFolder
from eightfold.format import CheckpointError, QuantConfig
from eightfold.hf import EightfoldQuantizer
from eightfold.linear import QuantLinear
from eightfold.quantize import dequantize

IDS = torch.arange(4, 20)[None]


def load(folder: Path, **more) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, **{"dtype": torch.float32} | more)


def quant_layers(model: torch.nn.Module) -> dict[str, QuantLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(IDS.to(model.device)).logits.float().cpu()


@pytest.fixture(scope="module")
def llama(model_folder, tmp_path_factory) -> Path:
    """A checkpoint of random codes. Not to be changed."""
    return write_checkpoint(model_folder("llama-tied"), tmp_path_factory.mktemp("llama") / "out", head=True)


@pytest.fixture
def broken(llama, tmp_path) -> Path:
    """A copy to damage."""
    shutil.copytree(llama, tmp_path / "broken")
    return tmp_path / "broken"


def edit_config(folder: Path, change) -> None:
    content = json.loads((folder / "config.json").read_text())
    change(content)
    (folder / "config.json").write_text(json.dumps(content))


def edit_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_registered():
    assert AUTO_QUANTIZER_MAPPING["eightfold"] is EightfoldQuantizer


# --- every kind of model ----------------------------------------------------------------------------------


def test_same_as_the_model_with_dense_weights(any_model, tmp_path):
    folder = ModelFolder(write_checkpoint(any_model, tmp_path / "out"))
    assert folder.quantization is not None
    model = load(folder.path)
    assert quant_layers(model).keys() == folder.quantization.layers.keys()
    assert all(layer.prepared for layer in quant_layers(model).values())

    dense = AutoModelForCausalLM.from_pretrained(any_model, dtype=torch.float32)
    for name in folder.quantization.layers:
        packed = read_packed(folder, name)
        linear = dense.get_submodule(name)
        linear.weight.data.copy_(dequantize(packed))
        assert (linear.bias is None) == (packed.bias is None)
        if packed.bias is not None:
            linear.bias.data.copy_(packed.bias)
    torch.testing.assert_close(logits(model), logits(dense), rtol=1e-3, atol=1e-3)
    for layer in quant_layers(model).values():  # and without the dense weights, through the operator
        layer.release()
    torch.testing.assert_close(logits(model), logits(dense), rtol=1e-3, atol=1e-3)


def test_save_pretrained_round_trips_to_the_byte(any_model, tmp_path):
    out = write_checkpoint(any_model, tmp_path / "out", scale_dtype="float32")
    model = load(out, dtype="auto")
    model.save_pretrained(tmp_path / "saved")
    again = tmp_path / "saved"
    assert (again / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    sections = [json.loads((f / "config.json").read_text())["quantization_config"] for f in (out, again)]
    assert sections[0] == sections[1]
    assert (again / "configuration_eightfold.py").read_bytes() == (out / "configuration_eightfold.py").read_bytes()
    assert torch.equal(logits(load(again, dtype="auto")), logits(model))


def test_generate(any_model, tmp_path):
    model = load(write_checkpoint(any_model, tmp_path / "out"), dtype="auto")
    new = model.generate(IDS, max_new_tokens=5, do_sample=False)
    assert new.shape == (1, IDS.shape[1] + 5)
    assert torch.equal(new, model.generate(IDS, max_new_tokens=5, do_sample=False))


# --- ways to load -----------------------------------------------------------------------------------------


def test_quantized_head_of_a_tied_model(llama):
    model = load(llama)
    assert isinstance(model.lm_head, QuantLinear)
    assert model.config.tie_word_embeddings is False
    assert not hasattr(model.lm_head, "weight")


def test_shards(model_folder, llama, tmp_path):
    source = model_folder("llama-tied")
    out = write_checkpoint(source, tmp_path / "out", head=True, shard_bytes=400_000)
    assert len(list(out.glob("model-*.safetensors"))) > 2
    assert torch.equal(logits(load(out)), logits(load(llama)))
    model = load(out, dtype="auto")
    model.save_pretrained(tmp_path / "saved", max_shard_size="300KB")
    a, b = ModelFolder(out), ModelFolder(tmp_path / "saved")
    assert a.tensors.keys() == b.tensors.keys()
    assert all(torch.equal(a.read(n).view(torch.uint8), b.read(n).view(torch.uint8)) for n in a.tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(llama, dtype):
    """Codes and scale vectors are as in the file whatever dtype the model is loaded in or cast to."""
    stored = load_file(llama / "model.safetensors")
    model = load(llama, dtype=dtype)
    assert logits(model).isfinite().all()
    for _ in range(2):
        for name, layer in quant_layers(model).items():
            for key, tensor in layer.named_parameters():
                assert tensor.dtype == stored[f"{name}.{key}"].dtype
                assert torch.equal(tensor, stored[f"{name}.{key}"])
                assert not tensor.requires_grad
        model.to(torch.bfloat16)
    assert logits(model).isfinite().all()


def test_biases_keep_the_files_dtype(model_folder, tmp_path):
    out = write_checkpoint(model_folder("qwen2"), tmp_path / "out")
    model = load(out, dtype=torch.float32)
    biases = [layer.bias for layer in quant_layers(model).values() if layer.bias is not None]
    assert biases
    assert all(bias.dtype == torch.bfloat16 for bias in biases)
    model.save_pretrained(tmp_path / "saved")
    assert logits(load(tmp_path / "saved")).isfinite().all()


def test_base_model(llama):
    # In the file's own dtype: transformers before 5.23 takes no other for tensors that it renames.
    base = AutoModel.from_pretrained(llama, dtype="auto")
    model = load(llama, dtype="auto")
    assert {f"model.{name}" for name in quant_layers(base)} == quant_layers(model).keys() - {"lm_head"}
    with torch.no_grad():
        hidden = base(IDS).last_hidden_state
        torch.testing.assert_close(model.lm_head(hidden), model(IDS).logits)


def test_device_map_on_one_device(llama):
    model = load(llama, device_map="cpu")
    assert torch.equal(logits(model), logits(load(llama)))


def test_disk_offload(llama, tmp_path):
    plan = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    plan |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "disk"}
    model = load(llama, device_map=plan, offload_folder=tmp_path / "offload")
    layers = quant_layers(model)
    assert all(layer.prepared == ("layers.0" in name) for name, layer in layers.items())
    assert layers["lm_head"].qweight.is_meta  # nothing of it in memory
    torch.testing.assert_close(logits(model), logits(load(llama)), rtol=1e-4, atol=1e-4)
    assert layers["lm_head"].qweight.is_meta
    with pytest.warns(UserWarning, match="offloaded"):
        model.save_pretrained(tmp_path / "saved")
    a, b = ModelFolder(llama), ModelFolder(tmp_path / "saved")
    assert a.tensors.keys() == b.tensors.keys()
    names = [name for name in a.tensors if "qweight" in name or "scale" in name]
    assert all(torch.equal(a.read(name), b.read(name)) for name in names)


@pytest.mark.gpu
def test_gpu_and_cpu_offload(llama, tmp_path):
    expected = logits(load(llama))
    model = load(llama, device_map="cuda")
    assert all(layer.prepared for layer in quant_layers(model).values())
    torch.testing.assert_close(logits(model), expected, rtol=1e-2, atol=1e-2)
    plan = {"model.embed_tokens": 0, "model.layers.0": "cpu", "model.layers.1": "disk"}
    plan |= {"model.norm": 0, "model.rotary_emb": 0, "lm_head": 0}
    model = load(llama, device_map=plan, offload_folder=tmp_path / "offload")
    assert {name.split(".")[0] for name, layer in quant_layers(model).items() if layer.prepared} == {"lm_head"}
    torch.testing.assert_close(logits(model), expected, rtol=1e-2, atol=1e-2)


FRESH = """
import sys, torch
from transformers import AutoModelForCausalLM
assert "eightfold" not in sys.modules
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, dtype=torch.float32)
assert "eightfold" in sys.modules
print(type(model).__name__, type(model.config).__name__, model(torch.arange(4, 20)[None]).logits.double().sum().item())
model.save_pretrained(sys.argv[2])
"""


def test_without_an_import(llama, tmp_path):
    path = os.pathsep.join([str(Path(eightfold.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"PYTHONPATH": path, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    model = load(llama)
    for folder in (llama, tmp_path / "saved"):  # the copy can do it too
        command = [sys.executable, "-c", FRESH, folder, tmp_path / "saved"]
        run = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr[-2000:]
        name, config, total = run.stdout.split()
        assert (name, config) == ("LlamaForCausalLM", "LlamaConfig")
        assert float(total) == pytest.approx(model(IDS).logits.double().sum().item(), rel=1e-4)


def test_config_alone(llama):
    config = AutoConfig.from_pretrained(llama)
    assert QuantConfig.from_dict(config.quantization_config) == ModelFolder(llama).quantization


# --- what is refused --------------------------------------------------------------------------------------

Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.pop(f"{Q}.qweight"), rf"{Q}\.qweight: expected a tensor I16 .* there is none"),
        (lambda t: t.pop(f"{Q}.scale_out"), rf"{Q}\.scale_out: .* there is none"),
        (lambda t: t.pop("model.norm.weight"), r"model\.norm\.weight: .* there is none"),
        (lambda t: t.pop("model.layers.1.input_layernorm.weight"), r"layers\.1\.input_layernorm\.weight: .* none"),
        (lambda t: t.pop("model.embed_tokens.weight"), r"model\.embed_tokens\.weight: .* there is none"),
        (lambda t: t.update({f"{Q}.qweight9": t[f"{Q}.qweight"].clone()}), rf"{Q}\.qweight9: expected no such"),
        (lambda t: t.update({f"{Q}.weight": torch.ones(2, 2)}), rf"{Q}\.weight: expected no such"),
        (lambda t: t.update({f"{Q}.qweight": t[f"{Q}.qweight"].int()}), rf"{Q}\.qweight: .* came I32"),
        (lambda t: t.update({f"{Q}.qweight": t[f"{Q}.qweight"][1:].clone()}), rf"{Q}\.qweight: expected I16 \["),
        (lambda t: t.update({f"{Q}.scale_in": t[f"{Q}.scale_in"].float()}), rf"{Q}\.scale_in: .* came F32"),
        (lambda t: t[f"{Q}.scale_in"].fill_(float("nan")), rf"{Q}\.scale_in: expected finite"),
        (lambda t: t["lm_head.scale_out"].fill_(float("inf")), r"lm_head\.scale_out: expected finite"),
    ],
)
def test_bad_tensors_are_an_error_not_random_weights(broken, change, says):
    edit_tensors(broken, change)
    with pytest.raises(CheckpointError, match=says):
        load(broken)
    assert verify_files(broken)


def in_layer(**fields):
    return lambda c: c["quantization_config"]["layers"][Q].update(fields)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: c["quantization_config"].update(format_version=2), "format_version: expected 1, came 2"),
        (lambda c: c["quantization_config"].update(group_size=8), "group_size: unknown field"),
        (lambda c: c["quantization_config"].pop("recipes"), "recipes: missing field"),
        (lambda c: c["quantization_config"]["layers"].pop(Q), rf"{Q}\.weight: .* there is none"),
        (
            lambda c: c["quantization_config"]["layers"].update(
                {"model.layers.0.self_attn.z_proj": c["quantization_config"]["layers"][Q]}
            ),
            "z_proj: the configuration lists it, the model has no such module",
        ),
        (
            lambda c: c["quantization_config"]["layers"].update(
                {"model.norm": c["quantization_config"]["layers"].pop(Q)}
            ),
            r"model\.norm: expected a Linear",
        ),
        (in_layer(bias="float32"), f"{Q}: the configuration says"),
        (in_layer(out_features=127), f"{Q}: the configuration says"),
        (in_layer(bits=2), rf"{Q}\.qweight1: expected no such tensor"),
        (lambda c: c.update(tie_word_embeddings=True), "lm_head: a quantized layer cannot be tied"),
    ],
)
def test_bad_config_is_an_error(broken, change, says):
    edit_config(broken, change)
    with pytest.raises(CheckpointError, match=says):
        load(broken)
