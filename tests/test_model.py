from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from models import KINDS, write_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, BloomConfig, GPT2Config, MixtralConfig

from eightfold.folder import ModelFolder
from eightfold.format import CheckpointError, LayerSpec, PackedWeight, QuantConfig, StageRecipe
from eightfold.linear import QuantLinear
from eightfold.model import Decoder, check_finite, finite_samples
from eightfold.skeleton import fill_computed_buffers, layer_list

CPU = torch.device("cpu")
T = 70  # longer than the sliding windows of the models


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {kind: write_model(kind, root / kind, max_shard_size="2MB") for kind in KINDS}


@pytest.fixture
def llama(models):
    return Decoder(ModelFolder(models["llama"]), CPU, torch.float32)


def some_tokens(count: int = T, seed: int = 0) -> torch.Tensor:
    return torch.randint(4096, (count,), generator=torch.Generator().manual_seed(seed))


def logits(decoder: Decoder, tokens: torch.Tensor) -> torch.Tensor:
    hidden = decoder.prologue(tokens)
    for i in range(len(decoder.layer_names)):
        hidden = decoder.call(i, decoder.load_layer(i), hidden)
    return decoder.epilogue(hidden)


@torch.no_grad()
def expected_logits(path, tokens: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
    return model(tokens[None]).logits.float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_same_logits_as_transformers(models, kind, dtype):
    decoder = Decoder(ModelFolder(models[kind]), CPU, dtype)
    tokens = some_tokens()
    came = logits(decoder, tokens)
    assert came.dtype == torch.float32
    assert came.shape == (1, T, 4096)
    assert torch.equal(came, expected_logits(models[kind], tokens, dtype))


def test_other_length_is_recorded_anew(models, llama):
    for count in (T, 9, T):
        tokens = some_tokens(count)
        assert torch.equal(logits(llama, tokens), expected_logits(models["llama"], tokens))
    with pytest.raises(ValueError, match="prologue"):
        llama.call(0, llama.load_layer(0), torch.zeros(1, 5, 200))
    with pytest.raises(ValueError, match="tokens"):
        llama.prologue(torch.zeros(1, 4, dtype=torch.long))


def test_logits_in_chunks(llama):
    tokens = some_tokens()
    whole = logits(llama, tokens)
    hidden = llama.prologue(tokens)
    for i in range(3):
        hidden = llama.call(i, llama.load_layer(i), hidden)
    chunks = torch.cat([llama.epilogue(hidden[:, a : a + 32]) for a in range(0, T, 32)], dim=1)
    torch.testing.assert_close(chunks, whole, rtol=1e-5, atol=1e-5)


def test_weights_around_the_layers_can_be_released(models, llama):
    tokens = some_tokens()
    before = logits(llama, tokens)
    llama.release()
    assert all(p.is_meta for p in llama._model.parameters())
    assert torch.equal(logits(llama, tokens), before)


def test_one_layer_at_a_time(monkeypatch, models):
    read: list[str] = []
    original = ModelFolder.read

    def note(self: ModelFolder, name: str, *args: torch.device) -> torch.Tensor:
        read.append(name)
        return original(self, name, *args)

    monkeypatch.setattr(ModelFolder, "read", note)
    decoder = Decoder(ModelFolder(models["llama"]), CPU, torch.float32)
    assert read == []
    hidden = decoder.prologue(some_tokens())
    assert read == ["model.embed_tokens.weight"]
    read.clear()
    hidden = decoder.call(0, decoder.load_layer(0), hidden)
    assert len(read) == 9
    assert all(name.startswith("model.layers.0.") for name in read)
    read.clear()
    decoder.epilogue(hidden)
    assert sorted(read) == ["lm_head.weight", "model.norm.weight"]


def test_linears_are_listed(models):
    shapes = Decoder(ModelFolder(models["qwen2"]), CPU, torch.float32).linear_shapes()
    assert len(shapes) == 2 * 7 + 1
    q, down = shapes["model.layers.1.self_attn.q_proj"], shapes["model.layers.0.mlp.down_proj"]
    head = shapes["lm_head"]
    assert (q.out_features, q.in_features, q.bias, q.layer_index) == (96, 96, True, 1)
    assert (down.out_features, down.in_features, down.bias, down.layer_index) == (96, 264, False, 0)
    assert (head.out_features, head.in_features, head.layer_index) == (4096, 96, None)
    assert list(shapes)[-1] == "lm_head"


SEPARATE = [("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.o_proj",),
            ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",)]  # fmt: skip
FUSED = [("self_attn.qkv_proj",), ("self_attn.o_proj",), ("mlp.gate_up_proj",), ("mlp.down_proj",)]


@pytest.mark.parametrize("kind", KINDS)
def test_groups_share_their_input(models, kind):
    decoder = Decoder(ModelFolder(models[kind]), CPU, torch.float32)
    hidden = decoder.prologue(some_tokens())
    names = [tuple(f"model.layers.1.{n}" for n in group) for group in (FUSED if kind == "phi3" else SEPARATE)]
    assert decoder.groups(1, decoder.load_layer(1), hidden) == names


def test_not_finite_is_named():
    x = torch.ones(2, 3, 4)
    check_finite(finite_samples(x).tolist(), "model.layers.4", 2)
    x[1, 0, 3] = float("nan")
    with pytest.raises(ValueError, match=r"model\.layers\.4: calibration sample 3"):
        check_finite(finite_samples(x).tolist(), "model.layers.4", 2)


def test_layers_that_return_tuples(tmp_path):
    config = BloomConfig(vocab_size=4096, hidden_size=64, n_layer=2, n_head=4)
    decoder = Decoder(write(config, tmp_path), CPU, torch.float32)
    assert torch.equal(logits(decoder, some_tokens()), expected_logits(tmp_path, some_tokens()))


# -- what cannot be taken


def write(config, folder):
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return ModelFolder(folder)


def test_experts_are_refused(tmp_path):
    config = MixtralConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                           num_attention_heads=2, num_key_value_heads=1, num_local_experts=2)  # fmt: skip
    with pytest.raises(ValueError, match=r"model\.layers\.0\.\S*experts\.\S*gate_up_proj"):
        Decoder(write(config, tmp_path), CPU, torch.float32)


def test_unknown_structure_is_refused(tmp_path):
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2)
    with pytest.raises(ValueError, match=r"GPT2LMHeadModel: expected a list .* transformer\.h"):
        Decoder(write(config, tmp_path), CPU, torch.float32)


class Odd(nn.Module):
    """A linear that stands outside the list of layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(8, 8)) for _ in range(3)])
        self.adapter = nn.Linear(8, 8)
        self.register_buffer("table", torch.ones(3), persistent=False)

    def get_output_embeddings(self) -> None:
        return None

    def _init_weights(self, module: nn.Module) -> None:
        pass


def test_linear_outside_the_layers_is_refused():
    with pytest.raises(ValueError, match=r"but lm_head in layers, came adapter"):
        layer_list(Odd())


def test_buffer_without_a_value_is_refused():
    with pytest.raises(ValueError, match=r"table: a buffer"):
        fill_computed_buffers(Odd(), CPU)


def test_arguments_that_depend_on_tokens_are_refused(llama):
    model = llama._model.model

    def spoil(_: nn.Module, args: tuple[torch.Tensor], __: torch.Tensor) -> None:
        model.rotary_emb.inv_freq.add_(args[0].sum())

    model.embed_tokens.register_forward_hook(spoil)
    with pytest.raises(ValueError, match=r"layers\.0: arguments depend on the tokens.*position_embeddings"):
        llama.prologue(some_tokens())


def test_missing_and_misshapen_tensors_are_named(tmp_path):
    path = write_model("llama-tied", tmp_path / "model")
    tensors = load_file(path / "model.safetensors")
    gone = tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lack: model\.layers\.1\.mlp\.up_proj\.weight$"):
        Decoder(ModelFolder(path), CPU, torch.float32)
    save_file(tensors | {"model.layers.1.mlp.up_proj.weight": gone[:-1]}, path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"up_proj\.weight: expected shape \[320, 128\], came \[319"):
        Decoder(ModelFolder(path), CPU, torch.float32)


# -- quantized folders


def random_packed(out_features: int, in_features: int, bias: torch.Tensor | None) -> PackedWeight:
    out_blocks, in_blocks = (16,) * -(-out_features // 16), (64,) * -(-in_features // 64)
    kind = None if bias is None else "bfloat16"
    spec = LayerSpec(out_features, in_features, 2, out_blocks, in_blocks, kind)
    g = torch.Generator().manual_seed(out_features * in_features)
    shape = (spec.padded_out, spec.padded_in // 8)
    codes = torch.randint(-(2**15), 2**15, shape, generator=g).to(torch.int16)
    return PackedWeight(
        spec, StageRecipe(("e8p",), (1.0,)), (codes,), torch.ones(in_features).half(),
        torch.full((out_features,), 0.05).half(), bias,
    )  # fmt: skip


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    """A Qwen2 with random codes for layer 1 and lm_head, and one with the weights they stand for."""
    root = tmp_path_factory.mktemp("quantized")
    path = write_model("qwen2", root / "model")
    tensors = load_file(path / "model.safetensors")
    config = json.loads((path / "config.json").read_text()) | {"tie_word_embeddings": False}
    dense, packs = dict(tensors), {}
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    for name in list(tensors):
        if not (name == "lm_head.weight" or (".layers.1." in name and name.endswith("proj.weight"))):
            continue
        weight = tensors.pop(name)
        name = name.removesuffix(".weight")
        packs[name] = pack = random_packed(*weight.shape, tensors.get(name + ".bias"))
        dense[name + ".weight"] = QuantLinear.from_packed(pack).prepare()._dense
        tensors |= pack.tensors(name)
    save_file(tensors, path / "model.safetensors")
    section = QuantConfig({n: p.spec for n, p in packs.items()}, {2: StageRecipe(("e8p",), (1.0,))}).to_dict()
    (path / "config.json").write_text(json.dumps(config | {"quantization_config": section}))
    other = write_model("qwen2", root / "dense")
    save_file(dense, other / "model.safetensors", metadata={"format": "pt"})
    (other / "config.json").write_text(json.dumps(config))
    return path, other


def test_quantized_folder(quantized):
    path, dense = quantized
    decoder = Decoder(ModelFolder(path), CPU, torch.float32)
    layer = decoder.load_layer(1)
    assert sum(isinstance(m, QuantLinear) and m.prepared for m in layer.modules()) == 7
    assert not any(isinstance(m, QuantLinear) for m in decoder.load_layer(0).modules())
    assert decoder.linear_shapes()["model.layers.1.self_attn.q_proj"].bias
    hidden = decoder.prologue(some_tokens())
    names = [tuple(f"model.layers.1.{n}" for n in group) for group in SEPARATE]
    assert decoder.groups(1, layer, hidden) == names
    torch.testing.assert_close(
        logits(decoder, some_tokens()), expected_logits(dense, some_tokens()), rtol=1e-5, atol=1e-5
    )


def test_quantized_folder_that_lacks_a_tensor(quantized, tmp_path):
    for file in quantized[0].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.scale_in"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"up_proj\.scale_in"):
        Decoder(ModelFolder(tmp_path), CPU, torch.float32)


def test_thread_count_does_not_matter(models):
    code = (
        "import hashlib, sys, torch\n"
        "from eightfold.folder import ModelFolder\n"
        "from eightfold.model import Decoder\n"
        "from eightfold.parallel import ordered_map\n"
        "d = Decoder(ModelFolder(sys.argv[1]), torch.device('cpu'), torch.float32)\n"
        "tokens = torch.randint(4096, (4, 128), generator=torch.Generator().manual_seed(0))\n"
        "hidden = list(ordered_map(d.prologue, tokens))\n"
        "for i in range(len(d.layer_names)):\n"
        "    layer = d.load_layer(i)\n"
        "    hidden = list(ordered_map(lambda h: d.call(i, layer, h), hidden))\n"
        "logits = torch.cat(list(ordered_map(d.epilogue, hidden)))\n"
        "print(torch.get_num_threads(), hashlib.sha256(logits.numpy().tobytes()).hexdigest())\n"
    )
    came = [
        subprocess.run([sys.executable, "-c", code, str(models["gemma3"])], capture_output=True, text=True,
                       env=os.environ | {"OMP_NUM_THREADS": threads}, check=True, timeout=120).stdout.split()
        for threads in ("1", "2")
    ]  # fmt: skip
    assert [threads for threads, _ in came] == ["1", "2"]
    assert came[0][1] == came[1][1]
