"""GLQ checkpoints: those that GLQ wrote, and those of our own writer; read, loaded, converted, packed back, refused."""

from __future__ import annotations

import json
import shutil
import weakref
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from glq_writer import Recipe, write_glq
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from eightfold.checkpoint import read_packed
from eightfold.convert import to_eightfold, to_glq
from eightfold.e8p import codebook
from eightfold.folder import ModelFolder
from eightfold.format import CheckpointError
from eightfold.glq_folder import GlqFolder
from eightfold.hf_glq import GlqQuantizer
from eightfold.linear import QuantLinear
from eightfold.quantize import dequantize
from eightfold.verify import verify
from eightfold.workspace import Workspace

TAGS = [f"{tag}_{bits}" for tag in ("a065", "a066") for bits in (2, 3, 4)]
TAGS += ["a0816_5", "a0816_8", *(f"a066shell_{bits}" for bits in (2, 3, 4, 5))]
IDS = torch.arange(4, 20)[None]
HALF_ON_DISK = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
HALF_ON_DISK |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
Q = "model.layers.0.self_attn.q_proj"
UP = "model.layers.1.mlp.up_proj"


def load(folder: Path, **more):
    return AutoModelForCausalLM.from_pretrained(folder, **{"dtype": torch.float32} | more)


@torch.no_grad()
def logits(model, ids=IDS):
    return model(ids.to(model.device)).logits.float().cpu()


def assert_dense(folder: ModelFolder, expected: dict) -> None:
    assert folder.quantization is not None
    assert folder.quantization.layers.keys() == expected.keys()
    for name, W in expected.items():
        W_hat = dequantize(read_packed(folder, name))
        assert W_hat.shape == W.shape
        assert float((W_hat - torch.as_tensor(W)).abs().max()) <= 1e-6 * float(abs(W).max()), name


def assert_same_tensors(a: Path, b: Path) -> None:
    one, other = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert (tensor.dtype, tensor.shape) == (other[name].dtype, other[name].shape), name
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), other[name].reshape(-1).view(torch.uint8)), name


# --- what GLQ wrote ---------------------------------------------------------------------------------------


@pytest.fixture(params=TAGS)
def sample(request, shared) -> Path:
    return shared / "glq-format" / request.param


def expectations(sample: Path):
    """Dense weights by linear, tokens, logits."""
    dense = {name.removesuffix(".weight"): W for name, W in load_file(sample / "expected_dense.safetensors").items()}
    io = load_file(sample / "expected_io.safetensors")
    return dense, io["input_ids"], io["logits_quantized_fp32"]


def assert_logits(model, ids, expected) -> None:
    assert float((logits(model, ids) - expected).abs().max()) <= 1e-3 * float(expected.abs().max())


def test_sample_loads(sample, tmp_path):
    """Straight, with half of it on the disk, and what it saves is an eightfold checkpoint of the same weights."""
    dense, ids, expected = expectations(sample)
    assert_dense(GlqFolder(sample), dense)
    model = load(sample)
    assert {n for n, module in model.named_modules() if type(module) is QuantLinear} == dense.keys()
    assert_logits(model, ids, expected)
    for name in dense:  # the operator too, from codes
        model.get_submodule(name).release()
    assert_logits(model, ids, expected)
    offloaded = load(sample, device_map=HALF_ON_DISK, offload_folder=tmp_path / "offload")
    assert offloaded.get_submodule(UP).qweight.is_meta
    assert_logits(offloaded, ids, expected)
    model.save_pretrained(tmp_path / "saved")
    assert_dense(ModelFolder(tmp_path / "saved"), dense)
    assert_logits(load(tmp_path / "saved"), ids, expected)


def test_sample_converts_and_packs_back_to_the_byte(sample, tmp_path):
    dense, ids, expected = expectations(sample)
    made = to_eightfold(sample, tmp_path / "out")
    assert (made.path, made.layers) == (tmp_path / "out", len(dense))
    assert_dense(ModelFolder(made.path), dense)
    assert_logits(load(made.path), ids, expected)
    assert_logits(load(made.path, device_map=HALF_ON_DISK, offload_folder=tmp_path / "offload"), ids, expected)
    assert verify(made.path, None, lambda *_: None, lambda *_: None).problems == []
    back = to_glq(made.path, tmp_path / "back").path
    assert {file.name for file in back.iterdir()} == {file.name for file in made.path.iterdir()} - {
        "eightfold.json",
        "configuration_eightfold.py",
    }
    assert_same_tensors(sample, back)
    sections = [json.loads((folder / "config.json").read_text())["quantization_config"] for folder in (sample, back)]
    assert sections[1] == sections[0] | {"block_diagonal": "a065" not in sample.name}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "offload", "out"]


# --- what our own writer makes ----------------------------------------------------------------------------

ODD = ("llama-biased", "qwen2", "llama-tied", "llama")  # biases, tied embeddings; 200, 360, 40, 344, 96, 264
WAYS = [Recipe(), Recipe(pow2=True), Recipe("e8_shell", block_diagonal_key=True), Recipe("e8_shell", pow2=True)]
way = pytest.mark.parametrize("how", WAYS, ids=["e8p", "e8p-pow2", "shell", "shell-pow2"])


def has_biases(kind: str) -> bool:
    return kind in ("llama-biased", "qwen2")


def reference(source: Path, dense: dict, keep_biases: bool):
    """The original model with these weights; without the biases that GLQ drops, unless they are kept."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    for name, W in dense.items():
        module = model.get_submodule(name)
        module.weight.data.copy_(torch.from_numpy(W))
        if module.bias is not None and not keep_biases:
            module.bias.data.zero_()
    return model


@way
@pytest.mark.parametrize("kind", ODD)
def test_own_checkpoint(kind, how, model_folder, tmp_path):
    source = model_folder(kind)
    dense = write_glq(source, tmp_path / "glq", how)
    base = ModelFolder(source) if has_biases(kind) else None
    folder = GlqFolder(tmp_path / "glq", base)
    assert_dense(folder, dense)
    made = to_eightfold(tmp_path / "glq", tmp_path / "out", str(source) if base else None).path
    assert_dense(ModelFolder(made), dense)
    torch.testing.assert_close(logits(load(made)), logits(reference(source, dense, True)), rtol=1e-3, atol=1e-3)
    if base is None:
        torch.testing.assert_close(logits(load(tmp_path / "glq")), logits(load(made)), rtol=1e-4, atol=1e-4)
        assert_same_tensors(tmp_path / "glq", to_glq(made, tmp_path / "back").path)
    else:
        assert load_file(made / "model.safetensors")[f"{Q}.bias"].dtype == torch.bfloat16
        with pytest.raises(CheckpointError, match=r"_proj\.bias: expected no bias or zeros"):
            to_glq(made, tmp_path / "back")
        assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("kind", ["llama-biased", "qwen2"])
def test_biases_are_never_invented(kind, model_folder, tmp_path):
    source, folder = model_folder(kind), tmp_path / "glq"
    dense = write_glq(source, folder)
    for attempt in (lambda: load(folder), lambda: GlqFolder(folder), lambda: to_eightfold(folder, tmp_path / "out")):
        with pytest.raises(CheckpointError, match=r"has a bias here, GLQ dropped it .* --base MODEL"):
            attempt()
    assert [path.name for path in tmp_path.iterdir()] == ["glq"]
    expected = logits(reference(source, dense, keep_biases=False))
    config = AutoConfig.from_pretrained(folder)
    config.quantization_config["biases"] = "zero"
    model = load(folder, config=config)
    torch.testing.assert_close(logits(model), expected, rtol=1e-3, atol=1e-3)
    where = {"config": config, "device_map": HALF_ON_DISK, "offload_folder": tmp_path / "offload"}
    torch.testing.assert_close(logits(load(folder, **where)), expected, rtol=1e-3, atol=1e-3)
    model.save_pretrained(tmp_path / "saved")
    torch.testing.assert_close(logits(load(tmp_path / "saved")), expected, rtol=1e-3, atol=1e-3)
    made = to_eightfold(folder, tmp_path / "out", zero_biases=True).path
    torch.testing.assert_close(logits(load(made)), expected, rtol=1e-3, atol=1e-3)
    assert_same_tensors(folder, to_glq(made, tmp_path / "back").path)


def test_a_bias_that_someone_added_is_used(model_folder, tmp_path):
    source = model_folder("qwen2")
    dense = write_glq(source, tmp_path / "glq")
    tensors, original = load_file(tmp_path / "glq" / "model.safetensors"), load_file(source / "model.safetensors")
    tensors |= {name: bias for name, bias in original.items() if name.endswith("_proj.bias")}
    save_file(tensors, tmp_path / "glq" / "model.safetensors")
    expected = logits(reference(source, dense, keep_biases=True))
    torch.testing.assert_close(logits(load(tmp_path / "glq")), expected, rtol=1e-3, atol=1e-3)
    made = to_eightfold(tmp_path / "glq", tmp_path / "out").path
    torch.testing.assert_close(logits(load(made)), expected, rtol=1e-3, atol=1e-3)


def test_another_base_is_refused(model_folder, tmp_path):
    write_glq(model_folder("llama-biased"), tmp_path / "glq")
    shutil.copytree(model_folder("llama-biased"), tmp_path / "other")
    tensors = load_file(tmp_path / "other" / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, tmp_path / "other" / "model.safetensors", metadata={"format": "pt"})
    for base, says in (
        (tmp_path / "other", r"expected the original model, its model\.norm\.weight is another one"),
        (model_folder("phi3"), r"expected the original model, it has no .*\.weight"),
    ):
        with pytest.raises(CheckpointError, match=says):
            to_eightfold(tmp_path / "glq", tmp_path / "out", str(base))


def test_ratios_of_one_rate_may_differ(model_folder, tmp_path):
    """GLQ looks for the last ratio of odd rates anew in every linear."""
    how = Recipe("e8_shell", bits=(4, 3), ratios={Q: (0.2,)})
    dense = write_glq(model_folder("llama"), tmp_path / "glq", how)
    folder = GlqFolder(tmp_path / "glq")
    assert folder.quantization is not None
    own = {name: spec.ratios for name, spec in folder.quantization.layers.items() if spec.ratios is not None}
    assert own == {Q: (1.0, float(np.float32(0.2)))}
    assert_dense(folder, dense)
    model = load(tmp_path / "glq")
    made = to_eightfold(tmp_path / "glq", tmp_path / "out").path
    model.save_pretrained(tmp_path / "saved")
    for again in (made, tmp_path / "saved"):
        assert_dense(ModelFolder(again), dense)
        assert torch.equal(logits(load(again)), logits(model))
    assert_same_tensors(tmp_path / "glq", to_glq(made, tmp_path / "back").path)


def test_one_tensor_in_memory_at_a_time(llama, tmp_path, monkeypatch):
    alive: list[weakref.ref] = []
    most = 0

    def read(self, name, device="cpu"):
        nonlocal most
        most = max(most, sum(tensor() is not None for tensor in alive))
        tensor = original(self, name, device)
        alive.append(weakref.ref(tensor))
        return tensor

    original = GlqFolder.read
    monkeypatch.setattr(GlqFolder, "read", read)
    to_eightfold(llama, tmp_path / "out")
    assert len(alive) > 50
    assert most <= 1


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_conversion_that_fails_leaves_nothing(llama, tmp_path, monkeypatch, error):
    original = GlqFolder.read

    def read(self, name, device="cpu"):
        if "layers.1" in name:
            raise error
        return original(self, name, device)

    with monkeypatch.context() as patch:
        patch.setattr(GlqFolder, "read", read)
        with pytest.raises(error):
            to_eightfold(llama, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    to_eightfold(llama, tmp_path / "out")


def test_a_conversion_does_not_touch_unfinished_work(llama, tmp_path):
    """What an interrupted quantization left under the same name stays."""
    with Workspace(tmp_path / "out", {"other": 1}) as workspace:
        workspace.save_layer(0, {"x": torch.ones(1)}, {})
    with pytest.raises(CheckpointError, match="was begun with other inputs or settings"):
        to_eightfold(llama, tmp_path / "out")
    assert (tmp_path / "out.partial" / "layers" / "00000.safetensors").exists()


@pytest.fixture(scope="module")
def llama(model_folder, tmp_path_factory) -> Path:
    """3 and 4 bits, block diagonal. Not to be changed."""
    folder = tmp_path_factory.mktemp("llama") / "glq"
    write_glq(model_folder("llama-tied"), folder, Recipe(bits=(4, 3)))
    return folder


@pytest.fixture
def copy(llama, tmp_path) -> Path:
    return Path(shutil.copytree(llama, tmp_path / "copy"))


def test_ways_to_load(llama, tmp_path):
    expected = logits(load(llama))
    torch.testing.assert_close(logits(load(llama, device_map="auto")), expected)
    base = AutoModel.from_pretrained(llama, dtype=torch.float32)
    assert {type(base.get_submodule(name.removeprefix("model."))) for name in (Q, UP)} == {QuantLinear}
    with torch.no_grad():
        hidden = base(IDS).last_hidden_state
    torch.testing.assert_close(hidden @ base.embed_tokens.weight.T, expected)
    half = load(llama, dtype="auto")
    assert half.dtype == torch.bfloat16
    assert half.get_submodule(Q).scale_in.dtype == torch.float32
    offloaded = load(llama, device_map=HALF_ON_DISK, offload_folder=tmp_path / "offload")
    with pytest.warns(UserWarning, match="offloaded"):
        offloaded.save_pretrained(tmp_path / "saved")
    torch.testing.assert_close(logits(load(tmp_path / "saved")), expected)


def test_a_stage_whose_ratio_is_zero_is_none(copy):
    def change(tensors):
        words = tensors[f"{Q}.Qidxs_e8p"]
        tensors[f"{Q}.Qidxs3_e8p"], tensors[f"{Q}.inv_resid_scale2"] = words.clone(), torch.tensor(0.0)

    before = dequantize(read_packed(GlqFolder(copy), Q))
    edit(copy, change)
    assert torch.equal(dequantize(read_packed(GlqFolder(copy), Q)), before)


# --- refused ----------------------------------------------------------------------------------------------


def edit(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")


def edit_section(folder: Path, change) -> None:
    content = json.loads((folder / "config.json").read_text())
    change(content["quantization_config"])
    (folder / "config.json").write_text(json.dumps(content))


def refused(folder: Path, says: str) -> None:
    """By transformers and by convert, which leaves nothing behind."""
    with pytest.raises(CheckpointError, match=says):
        load(folder)
    with pytest.raises(CheckpointError, match=says):
        to_eightfold(folder, folder.with_name("out"))
    assert not list(folder.parent.glob("out*"))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: s.update(codebook="e8_relaxed"), "codebook: expected one of .* came 'e8_relaxed'"),
        (lambda s: s.update(codebook="trellis"), "codebook: expected one of .* came 'trellis'"),
        (lambda s: s.update(codebook="e8_shell"), "says codebook 'e8_shell', the tensors are of 'e8p'"),
        (lambda s: s.pop("codebook"), "says codebook 'e8_shell', the tensors are of 'e8p'"),
        (lambda s: s["layer_bpw"].update({Q: 5}), rf"{Q}\.Qidxs2_e8p: a stage is missing: 5 bits need"),
        (lambda s: s["layer_bpw"].update({Q: 2}), rf"{Q}\.Qidxs2_e81b: expected no such tensor"),
        (lambda s: s["layer_bpw"].update({Q: 9}), rf"{Q}: expected 2 to 8 bits in layer_bpw, came 9"),
        (lambda s: s["layer_bpw"].pop(Q), rf"{Q}: expected 2 to 8 bits in layer_bpw, came 3\.5"),
        (lambda s: s["layer_bpw"].update({"model.norm": 3}), r"model\.norm: config\.json lists it"),
        (lambda s: s.update(layer_bpw=[]), "layer_bpw: expected an object"),
        (lambda s: s.update(biases="none"), "biases: expected 'zero' or no such field, came 'none'"),
    ],
)
def test_bad_config(copy, change, says):
    content = json.loads((copy / "config.json").read_text())["quantization_config"]["layer_bpw"]
    assert content[Q] == 3
    edit_section(copy, change)
    refused(copy, says)


def other_rows(tensors):
    for leaf in ("Qidxs_e8p", "Qidxs2_e81b", "SU"):
        rows = tensors[f"{Q}.{leaf}"]
        tensors[f"{Q}.{leaf}"] = torch.cat([rows, rows])


def renamed(tensors):
    tensors["model.layers.7.mlp.up_proj.SU"] = tensors.pop(f"{UP}.SU")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.pop(f"{Q}.Qidxs_e8p"), rf"{Q}\.Qidxs_e8p: a stage is missing"),
        (lambda t: t.pop(f"{Q}.Qidxs2_e81b"), rf"{Q}\.Qidxs2_e81b: a stage is missing"),
        (lambda t: t.pop(f"{Q}.inv_resid_scale"), rf"{Q}\.inv_resid_scale: a stage is missing"),
        (lambda t: t.pop(f"{Q}.SU"), rf"{Q}\.SU: expected a tensor F16 .* there is none"),
        (lambda t: t.pop(f"{Q}.Wscale"), rf"{Q}\.Wscale: expected a tensor F32"),
        (lambda t: t.update({f"{Q}.weight": torch.ones(2)}), rf"{Q}\.weight: expected no such tensor"),
        (lambda t: t.update({f"{Q}.SU": t[f"{Q}.SU"].float()}), rf"{Q}\.SU: expected F16 .* came F32"),
        (lambda t: t.update({f"{Q}.Qidxs_e8p": t[f"{Q}.Qidxs_e8p"].flatten()}), "expected four dimensions"),
        (lambda t: t.update({f"{Q}.Qidxs2_e81b": t[f"{Q}.Qidxs2_e81b"][1:]}), rf"{Q}\.Qidxs2_e81b: expected I64"),
        (other_rows, rf"{Q}: 256 × 128 is no padded size that GLQ has for 128 × 128"),
        (renamed, r"model\.layers\.7\.mlp\.up_proj: the checkpoint has it quantized|up_proj\.\w+: "),
        (lambda t: t[f"{Q}.Wscale"].fill_(float("nan")), rf"{Q}\.Wscale: expected a finite scale"),
        (lambda t: t[f"{Q}.Wscale"].fill_(float("inf")), rf"{Q}\.Wscale: expected a finite scale"),
        (lambda t: t[f"{Q}.Wscale"].fill_(-1.0), rf"{Q}\.Wscale: expected a finite scale that is not negative"),
        (lambda t: t[f"{Q}.inv_resid_scale"].fill_(float("nan")), rf"{Q}: ratios: expected 2 positive numbers"),
        (lambda t: t[f"{Q}.inv_resid_scale"].fill_(0.0), rf"{Q}: ratios: expected 2 positive numbers"),
        (lambda t: t[f"{Q}.SU"][3:4].fill_(0.5), rf"{Q}\.SU: expected signs"),
        (lambda t: t[f"{Q}.SV"][3:4].fill_(float("nan")), rf"{Q}\.SV: expected signs"),
        (lambda t: t.update({f"{Q}.Wscale": torch.ones(128)}), rf"{Q}: a scale for every row \(Wscale \[128\]\)"),
        (lambda t: t.update({f"{Q}.bias": torch.ones(128)}), f"{Q}: the configuration says|^$"),
        (lambda t: t.update({f"{Q}.bias": torch.ones(128).int()}), rf"{Q}\.bias: expected 128 floats, came I32"),
    ],
)
def test_bad_tensors(copy, change, says):
    edit(copy, change)
    if "configuration says" in says:  # a bias where the model has none: only a model can tell
        with pytest.raises(CheckpointError, match=says):
            load(copy)
        return
    refused(copy, says)


def test_shell_tensors_in_an_e8p_config(model_folder, tmp_path):
    """What GLQ makes of `--device cpu` without `--workers 1`."""
    write_glq(model_folder("llama"), tmp_path / "glq", Recipe("e8_shell"))
    edit_section(tmp_path / "glq", lambda s: s.update(codebook="e8p"))
    refused(tmp_path / "glq", "says codebook 'e8p', the tensors are of 'e8_shell'")


def test_quantized_embeddings(copy):
    """Gemma's per-layer embeddings, which GLQ stores in shells with a scale for every row, whatever the codebook is."""

    def add(tensors):
        name = "model.embed_tokens_per_layer"
        tensors |= {f"{name}.Qidxs": torch.zeros(64, 4, dtype=torch.int16), f"{name}.Wscale": torch.ones(64)}

    edit(copy, add)
    refused(copy, "embed_tokens_per_layer: a scale for every row")


def test_odd_bits_have_256_points(model_folder, tmp_path):
    write_glq(model_folder("llama"), tmp_path / "glq", Recipe("e8_shell", bits=(3,)))
    edit(tmp_path / "glq", lambda t: t[f"{Q}.Qidxs2"][0, 0].fill_(-1))
    refused(tmp_path / "glq", rf"{Q}\.Qidxs2: expected codes below 256")


def test_experts_quantized_as_one_matrix(llama):
    from eightfold.glq import _check_joint

    layers = {"model.layers.0.mlp.experts.3.gate_proj": {}, "model.layers.0.mlp.experts.3.up_proj": {}}
    with pytest.raises(CheckpointError, match=r"experts\.3\.gate_proj: quantized together with"):
        _check_joint(layers, lambda name: torch.tensor(0.25))
    _check_joint(layers, lambda name: torch.tensor(float("gate" in name)))


def test_inputs_that_are_no_eights(model_folder, tmp_path):
    from eightfold.glq import Linear, quant_config

    codes = {"a.Qidxs": ("I16", (6, 2)), "a.SU": ("F16", (6,)), "a.SV": ("F16", (12,)), "a.Wscale": ("F32", ())}
    section = {"codebook": "e8_shell", "layer_bpw": {"a": 2}}
    with pytest.raises(CheckpointError, match="a: expected in_features in eights, came 12"):
        quant_config(section, codes, lambda name: torch.ones(()), {"a": Linear(6, 12)})


def test_truncated(copy):
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        to_eightfold(copy, copy.with_name("out"))
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        load(copy)


def test_a_pickle(copy):
    shutil.move(copy / "model.safetensors", copy / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"its pytorch_model\.bin is a pickle"):
        to_eightfold(copy, copy.with_name("out"))
    with pytest.raises(CheckpointError, match="expected the weights in safetensors files"):
        load(copy)


@pytest.mark.parametrize("count", [65536, 4096])
def test_its_own_table(model_folder, tmp_path, count):
    """The table that lies beside the weights is compared, and never unpickled."""
    folder = tmp_path / "glq"
    write_glq(model_folder("llama"), folder, Recipe("e8_shell", bits=(4,)))
    table = codebook("e8shell").points()[:count].numpy()

    def put(content: bytes) -> None:
        with zipfile.ZipFile(folder / "e8_codebook.pt", "w") as archive:
            archive.writestr("e8_codebook/data.pkl", b"not to be opened")
            archive.writestr("e8_codebook/data/0", content)

    put(table.tobytes())
    load(folder)
    put(table[np.roll(np.arange(count), 1)].tobytes())
    refused(folder, "expected the usual order of E8 shell points")
    put(b"")
    refused(folder, "expected the usual order of E8 shell points")
    (folder / "e8_codebook.pt").write_bytes(b"no archive")
    refused(folder, "expected a zip archive")


def test_what_glq_cannot_hold(model_folder, tmp_path):
    from packing import write_checkpoint

    random = write_checkpoint(model_folder("llama"), tmp_path / "random", bits=(2,))
    with pytest.raises(CheckpointError, match="expected signs times one number"):
        to_glq(random, tmp_path / "out")
    made = write_glq(model_folder("llama"), tmp_path / "glq", Recipe(bits=(3,)))
    assert made
    path = to_eightfold(tmp_path / "glq", tmp_path / "e").path
    original = (path / "config.json").read_text()
    for change, says in (
        (lambda c: c["recipes"]["3"].update(stages=["e81b", "e8p"]), "its stages .* are not those of GLQ's"),
        (lambda c: c["layers"][Q].update(in_blocks=[[64, 4]]), f"{Q}: its rotation blocks are not those"),
        (lambda c: c["layers"][Q].update(in_blocks=[[128, 1], [64, 1], [8, 1]]), f"{Q}: its rotation blocks"),
    ):
        content = json.loads(original)
        change(content["quantization_config"])
        (path / "config.json").write_text(json.dumps(content))
        with pytest.raises(CheckpointError, match=says):
            to_glq(path, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


# --- who is responsible for the name ----------------------------------------------------------------------


def test_another_package_has_the_name(monkeypatch, caplog, llama):
    from transformers.quantizers import auto

    from eightfold import hf_glq

    class Theirs:
        pass

    monkeypatch.setitem(auto.AUTO_QUANTIZER_MAPPING, "glq", Theirs)
    monkeypatch.setitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "glq", Theirs)
    hf_glq.register_glq()
    assert auto.AUTO_QUANTIZER_MAPPING["glq"] is Theirs
    assert "register_glq(replace=True)" in caplog.text
    assert "eightfold convert" in caplog.text
    hf_glq.register_glq(replace=True)
    assert auto.AUTO_QUANTIZER_MAPPING["glq"] is GlqQuantizer
    load(llama)
