"""Cases on vLLM's own classes: each function `case_…` is one. `vllm_stage.py` runs them, in a process of their own.

Tensor parallelism is one rank after the other: vLLM is told its rank and size, nothing is sent.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import TestCase

import pytest
import torch
from glq_writer import Recipe, write_glq
from models import write_model
from packing import random_packed
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, SmolLM3Config
from vllm.config import set_current_vllm_config
from vllm.config.lora import LoRAConfig
from vllm.distributed import parallel_state
from vllm.engine.arg_utils import EngineArgs
from vllm.lora.layers import LoRAMapping, MergedColumnParallelLinearWithLoRA
from vllm.lora.layers.utils import _get_lora_device
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import (
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader import get_model
from vllm.model_executor.models import ModelRegistry

from eightfold import vllm_plugin
from eightfold.checkpoint import AUTO_MAP
from eightfold.format import CheckpointError, LayerSpec, PackedWeight, QuantConfig
from eightfold.quantize import dequantize, recipe
from eightfold.rotation import layout_blocks
from eightfold.tensor_parallel import linear_blocks
from eightfold.vllm import EightfoldConfig, EightfoldLinearMethod

WORK = Path(sys.argv[2])  # a folder for models
COMPILED = torch.library.Library("_C", "FRAGMENT")
COMPILED.define("gelu_tanh_and_mul(Tensor! out, Tensor x) -> ()")  # Gemma's layers look for it, nothing calls it
MODELS = {
    "LlamaForCausalLM": ("llama", "LlamaForCausalLM"),
    "Qwen2ForCausalLM": ("qwen2", "Qwen2ForCausalLM"),
    "Qwen3ForCausalLM": ("qwen3", "Qwen3ForCausalLM"),
    "MistralForCausalLM": ("mistral", "MistralForCausalLM"),
    "Gemma3ForCausalLM": ("gemma3", "Gemma3ForCausalLM"),
    "Phi3ForCausalLM": ("phi3", "Phi3ForCausalLM"),
    "SmolLM3ForCausalLM": ("transformers", "TransformersForCausalLM"),
}
TOLERANCE = 0.01  # of bfloat16 and float16 outputs, relative
PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


# --- checkpoints ---------------------------------------------------------------------------------------------------


def group(name: str) -> str:
    """Linears of one group read one input."""
    head, _, last = name.rpartition(".")
    return head + (".in" if last in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj") else f".{last}")


def checkpoint(source: Path, target: Path, tp_max: int, bits: dict[str, int], head: int = 0) -> dict[str, PackedWeight]:
    """`source` with every linear of the decoder in random codes, groups with one input scale; `bits` by group's end."""
    tensors = load_file(source / "model.safetensors")
    content = json.loads((source / "config.json").read_text())
    config = AutoModelForCausalLM.from_pretrained(source).config
    specs: dict[str, LayerSpec] = {}
    for name in list(tensors):
        layer = name.removesuffix(".weight")
        if not layer.endswith("_proj") or not name.endswith(".weight"):
            continue
        shape = tuple(tensors.pop(name).shape)
        bias = tensors.pop(f"{layer}.bias", None)
        rate = next((b for end, b in bits.items() if group(layer).endswith(end)), bits[""])
        blocks = linear_blocks(config, layer, shape, "pow2-sum-256", tp_max)
        specs[layer] = LayerSpec(*shape, rate, *blocks, bias if bias is None else str(bias.dtype)[6:])
    if head:
        words, hidden = tensors.pop("lm_head.weight", tensors["model.embed_tokens.weight"]).shape
        specs["lm_head"] = LayerSpec(words, hidden, head, (1,) * words, layout_blocks(hidden, "pow2-sum-256", 64))
        content["tie_word_embeddings"] = False
    scales: dict[str, Tensor] = {}
    packed = {}
    for i, (name, spec) in enumerate(specs.items()):
        weight = random_packed(spec, i)
        weight.scale_in = scales.setdefault(group(name), weight.scale_in).clone()
        packed[name] = weight
        tensors |= weight.tensors(name)
    quant = QuantConfig(specs, {b: recipe(b) for b in {s.bits for s in specs.values()}}, tp_max)
    target.mkdir(parents=True)
    save_file({k: v.contiguous() for k, v in tensors.items()}, target / "model.safetensors", {"format": "pt"})
    content |= {"quantization_config": quant.to_dict(), "auto_map": AUTO_MAP}
    (target / "config.json").write_text(json.dumps(content))
    return packed


def llama(target: Path, **more: Any) -> Path:
    """A Llama that eight devices can share: four key heads."""
    shape = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 4}
    shape |= {"num_hidden_layers": 1, "vocab_size": 1000, "tie_word_embeddings": False}
    model = AutoModelForCausalLM.from_config(LlamaConfig(**shape | more), dtype=torch.bfloat16)
    model.save_pretrained(target)
    return target


# --- vLLM ----------------------------------------------------------------------------------------------------------


@contextmanager
def engine(folder: Path, **more: Any) -> Iterator[Any]:
    """vLLM's configuration for a model folder, current inside."""
    options = {"dtype": "bfloat16", "enforce_eager": True, "max_model_len": 128, "skip_tokenizer_init": True}
    config = EngineArgs(model=str(folder), **options | more).create_engine_config()
    with set_current_vllm_config(config), torch.no_grad():
        if not parallel_state.model_parallel_is_initialized():
            parallel_state.init_distributed_environment(1, 0, f"file://{WORK}/rendezvous", 0, "gloo")
            parallel_state.ensure_model_parallel_initialized(1, 1)
        yield config


@contextmanager
def as_rank(rank: int, size: int) -> Iterator[None]:
    """vLLM believes that it is one of `size` devices."""
    real = parallel_state._TP
    parallel_state._TP = SimpleNamespace(  # pyright: ignore
        rank_in_group=rank, world_size=size, all_reduce=lambda x: x, all_gather=lambda x, dim=-1: x, rank=rank
    )
    try:
        yield
    finally:
        parallel_state._TP = real


def load(config: Any) -> Any:
    config.compilation_config.static_forward_context.clear()
    return get_model(vllm_config=config)


def near(came: Tensor, expected: Tensor) -> None:
    assert came.shape == expected.shape, (came.shape, expected.shape)
    error = float((came.float() - expected.float()).norm() / expected.float().norm())
    assert error < TOLERANCE, error


def run(layer: nn.Module, x: Tensor) -> Tensor:
    """As its forward does it, without what is sent between devices."""
    return layer.quant_method.apply(layer, x, None if getattr(layer, "skip_bias_add", False) else layer.bias)


def calls(layer: nn.Module) -> int:
    return len(layer.quant_method.calls)


def dense(packed: dict[str, PackedWeight], x: Tensor, *names: str) -> Tensor:
    """What the layers of these names make of x."""
    made = []
    for name in names:
        weight = packed[name]
        y = nn.functional.linear(x.float(), dequantize(weight))
        made.append(y if weight.bias is None else y + weight.bias.float())
    return torch.cat(made, -1)


def padded(weight: PackedWeight) -> bool:
    return weight.spec.padded_out != weight.spec.out_features


def check_layers(model: Any, packed: dict[str, PackedWeight], dtype: torch.dtype = torch.bfloat16) -> int:
    """Every linear of vLLM's model against the layers that it is made of; how many there are."""
    count = 0
    for module in model.modules():
        if not isinstance(getattr(module, "quant_method", None), EightfoldLinearMethod):
            continue
        names = [layer.name for layer in module.quant_method.layers]
        x = torch.randn(5, packed[names[0]].spec.in_features).to(dtype)
        near(run(module, x)[:, : sum(packed[n].spec.out_features for n in names)], dense(packed, x, *names))
        assert run(module, x).dtype == dtype
        # Rows of padding between two parts keep them apart; sizes of real models need none.
        assert calls(module) == 1 + sum(padded(packed[n]) for n in names[:-1])
        count += 1
    return count


# --- cases ---------------------------------------------------------------------------------------------------------


def models_of(kind: str, **more: Any) -> None:
    source = write_model(kind, WORK / f"source-{kind}")
    head = 4 if kind in ("llama", "llama-tied", "qwen3") else 0
    packed = checkpoint(source, WORK / f"quantized-{kind}", 1, {"in": 3, "down_proj": 4, "": 2}, head)
    with engine(WORK / f"quantized-{kind}", **more) as config:
        assert isinstance(config.quant_config, EightfoldConfig)
        model = load(config)
        layers = AutoModelForCausalLM.from_pretrained(source).config.num_hidden_layers
        dtype = getattr(torch, more.get("dtype", "bfloat16"))
        assert check_layers(model, packed, dtype) == 4 * layers + (head > 0)
        embeddings = [m for m in model.modules() if type(m) is VocabParallelEmbedding]
        assert [hasattr(m, "weight") for m in embeddings] == [True]


def case_llama() -> None:
    models_of("llama")


def case_llama_tied_with_a_quantized_head() -> None:
    models_of("llama-tied")


def case_qwen2_with_biases() -> None:
    models_of("qwen2")


def case_qwen3_in_float16() -> None:
    models_of("qwen3", dtype="float16")


def case_mistral() -> None:
    models_of("mistral")


def case_gemma3() -> None:
    models_of("gemma3")


def case_phi3_merged_in_the_files() -> None:
    models_of("phi3")


def case_a_model_that_vllm_takes_from_transformers() -> None:
    """SmolLM3 is none of vLLM's own: it puts its linears into transformers' model, q, k and v apart."""
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
    shape |= {"num_hidden_layers": 2, "vocab_size": 1000}
    config = SmolLM3Config(**shape, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    source = WORK / "source-smollm3"
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(source)
    packed = checkpoint(source, WORK / "quantized-smollm3", 1, {"": 3})
    with engine(WORK / "quantized-smollm3") as config:
        assert check_layers(load(config), packed) == 2 * 6


def case_every_rank_of_1_2_4_8() -> None:
    """Each rank's outputs are its part of the whole, key heads repeated; nothing is sent beyond vLLM's own sum."""
    source = llama(WORK / "source-tp", attention_bias=True)
    packed = checkpoint(source, WORK / "quantized-tp", 8, {"in": 3, "": 2}, head=4)
    attention, mlp = "model.layers.0.self_attn.", "model.layers.0.mlp."
    x, h = torch.randn(5, 512).bfloat16(), torch.randn(5, 1024).bfloat16()
    q, k, v = (dense(packed, x, f"{attention}{part}_proj") for part in "qkv")
    gate, up = (dense(packed, x, f"{mlp}{part}_proj") for part in ("gate", "up"))
    with engine(WORK / "quantized-tp") as config:
        for size in (1, 2, 4, 8):
            sums = [torch.zeros(5, 512), torch.zeros(5, 512)]
            logits = []
            for rank in range(size):
                with as_rank(rank, size):
                    model = load(config)
                    layer = model.model.layers[0]

                    def mine(whole: Tensor, pieces: int = size, rank: int = rank, size: int = size) -> Tensor:
                        return whole.chunk(pieces, -1)[rank * pieces // size]

                    heads = min(size, 4)
                    near(run(layer.self_attn.qkv_proj, x), torch.cat([mine(q), mine(k, heads), mine(v, heads)], -1))
                    near(run(layer.mlp.gate_up_proj, x), torch.cat([mine(gate), mine(up)], -1))
                    down, out = layer.mlp.down_proj, layer.self_attn.o_proj
                    sums[0] += down.quant_method.apply(down, mine(h)).float()
                    sums[1] += out.quant_method.apply(out, mine(x), out.bias if rank == 0 else None).float()
                    logits.append(run(model.lm_head, x))
                    assert [calls(m) for m in (layer.self_attn.qkv_proj, layer.mlp.gate_up_proj, down)] == [1, 1, 1]
            near(sums[0], dense(packed, h, f"{mlp}down_proj"))
            near(sums[1], dense(packed, x, f"{attention}o_proj"))
            near(torch.cat(logits, -1)[:, :1000], dense(packed, x, "lm_head"))


def case_merged_in_the_files_and_cut() -> None:
    from transformers import Phi3Config

    shape = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4}
    source = WORK / "source-phi3-tp"
    AutoModelForCausalLM.from_config(
        Phi3Config(**shape, num_hidden_layers=1, vocab_size=320, pad_token_id=0), dtype=torch.bfloat16
    ).save_pretrained(source)
    packed = checkpoint(source, WORK / "quantized-phi3-tp", 4, {"": 3})
    x = torch.randn(5, 256).bfloat16()
    whole = dense(packed, x, "model.layers.0.self_attn.qkv_proj").split([256, 128, 128], -1)
    both = dense(packed, x, "model.layers.0.mlp.gate_up_proj").chunk(2, -1)
    with engine(WORK / "quantized-phi3-tp") as config:
        for rank in range(4):
            with as_rank(rank, 4):
                layer = load(config).model.layers[0]
                expected = torch.cat([part.chunk(4, -1)[rank] for part in whole], -1)
                near(run(layer.self_attn.qkv_proj, x), expected)
                near(run(layer.mlp.gate_up_proj, x), torch.cat([part.chunk(4, -1)[rank] for part in both], -1))


def case_a_size_that_does_not_fit_is_refused() -> None:
    source = llama(WORK / "source-tp2")
    checkpoint(source, WORK / "quantized-tp2", 2, {"": 2})
    message = r"sizes that fit this checkpoint are 1, 2;"
    with engine(WORK / "quantized-tp2") as config, as_rank(0, 4), pytest.raises(ValueError, match=message):
        load(config)


def case_missing_tensors_are_named() -> None:
    source = llama(WORK / "source-missing", attention_bias=True)
    folder = WORK / "quantized-missing"
    checkpoint(source, folder, 1, {"": 3})
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.self_attn.k_proj.qweight1"
    for gone in (name, "model.layers.0.self_attn.v_proj.bias"):
        save_file({k: v for k, v in tensors.items() if k != gone}, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(ValueError, match=rf"{gone}: expected a tensor .* there is none"), engine(folder):
            pass
    # What the files have and vLLM loses on the way is noticed, too.
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with engine(folder) as config:
        (folder / "model.safetensors").unlink()
        save_file({k: v for k, v in tensors.items() if k != name}, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(CheckpointError, match=rf"{name}: expected this tensor in the files, it was not loaded"):
            load(config)


def case_made_up_weights() -> None:
    source = llama(WORK / "source-dummy")
    checkpoint(source, WORK / "quantized-dummy", 1, {"": 3}, head=4)
    (WORK / "quantized-dummy" / "model.safetensors").unlink()
    with engine(WORK / "quantized-dummy", load_format="dummy") as config:
        layer = load(config).model.layers[0].self_attn.qkv_proj
        assert calls(layer) == 1  # as fast as one of real weights
        counts = layer.qweight.view(torch.uint8).flatten().long().bincount(minlength=256)
        assert int((counts > 0).sum()) == 256
        y = run(layer, torch.randn(64, 512).bfloat16()).float()
        assert 0.3 < float(y.std()) < 3


def small(**specs: LayerSpec) -> tuple[EightfoldConfig, dict[str, PackedWeight]]:
    """A configuration of layers called x.NAME, and random weights for them."""
    packed = {f"x.{name}": random_packed(spec, i) for i, (name, spec) in enumerate(specs.items())}
    recipes = {bits: recipe(bits) for bits in {spec.bits for spec in specs.values()}}
    config = EightfoldConfig(QuantConfig({f"x.{n}": s for n, s in specs.items()}, recipes))
    config.packed_modules_mapping = PACKED
    return config, packed


def spec(rows: int, columns: int, bits: int = 3) -> LayerSpec:
    return LayerSpec(rows, columns, bits, layout_blocks(rows, "pow2-sum", 16), layout_blocks(columns, "pow2-sum", 64))


def fill(layer: nn.Module, weight: PackedWeight, *shard: Any) -> None:
    for name, tensor in weight.tensors().items():
        parameter = layer.get_parameter(name)
        parameter.weight_loader(parameter, tensor, *shard)


def case_parts_that_differ_run_one_after_the_other() -> None:
    """Other input scales, other rates, rows of padding: never merged, and right."""
    for shapes in ((64, 32, 32), (72, 40, 24)):
        for rates in ((3, 3, 3), (2, 3, 4)):
            config, packed = small(
                **{n: spec(s, 192, b) for n, s, b in zip(("q_proj", "k_proj", "v_proj"), shapes, rates, strict=True)}
            )
            with engine(WORK / "source-plain"):
                layer = MergedColumnParallelLinear(
                    192, list(shapes), bias=True, quant_config=config, prefix="x.qkv_proj"
                )
                for number, weight in enumerate(packed.values()):
                    fill(layer, weight, number)
                layer.bias.data = torch.randn_like(layer.bias)
                for each in config.layers.values():
                    assert each.spec.bias is None
                layer.has_bias = False  # the file has none; what a user adds later is added
                bias, layer.bias = layer.bias, None
                layer.quant_method.process_weights_after_loading(layer)
                layer.bias = bias
                x = torch.randn(4, 192)
                near(run(layer, x), dense(packed, x, *packed) + bias)
                assert calls(layer) == 3
                assert _get_lora_device(layer).type == "cpu"


def case_values_that_are_keys() -> None:
    """A layer without v: vLLM loads k's tensors twice."""
    config, packed = small(q_proj=spec(128, 192), k_proj=spec(64, 192))
    for weight in packed.values():
        weight.scale_in = packed["x.q_proj"].scale_in
    with engine(WORK / "source-plain"):
        layer = QKVParallelLinear(192, 32, 4, 2, bias=False, quant_config=config, prefix="x.qkv_proj")
        fill(layer, packed["x.q_proj"], "q")
        fill(layer, packed["x.k_proj"], "k")
        with pytest.raises(CheckpointError, match=r"x.k_proj.qweight: expected this tensor"):
            layer.quant_method.loading.check()
        fill(layer, packed["x.k_proj"], "v")
        layer.quant_method.process_weights_after_loading(layer)
        x = torch.randn(4, 192)
        near(run(layer, x), dense(packed, x, "x.q_proj", "x.k_proj", "x.k_proj"))
        assert calls(layer) == 1


def case_what_is_not_listed_is_not_quantized() -> None:
    config, _ = small(q_proj=spec(64, 192), down_proj=spec(64, 192))
    with engine(WORK / "source-plain"):
        plain = ReplicatedLinear(192, 64, quant_config=config, prefix="x.up_proj")
        assert isinstance(plain.quant_method, UnquantizedLinearMethod)
        for prefix in ("", "x.embed", "lm_head"):
            kind = ParallelLMHead if prefix == "lm_head" else VocabParallelEmbedding
            assert hasattr(kind(320, 192, quant_config=config, prefix=prefix), "weight")
        with pytest.raises(CheckpointError, match=r"x.k_proj: expected it quantized like the others of x.qkv_proj"):
            QKVParallelLinear(192, 32, 2, 1, bias=False, quant_config=config, prefix="x.qkv_proj")
        with pytest.raises(CheckpointError, match="embeddings cannot be quantized"):
            VocabParallelEmbedding(320, 192, quant_config=config, prefix="x.down_proj")
        head = ParallelLMHead(64, 192, quant_config=config, prefix="x.down_proj")
        with pytest.raises(CheckpointError, match="cannot be tied"):
            head.tie_weights(VocabParallelEmbedding(64, 192))


def case_lora_on_top() -> None:
    """vLLM's own LoRA layer over a quantized one."""
    config, packed = small(gate_proj=spec(64, 192), up_proj=spec(64, 192))
    packed["x.up_proj"].scale_in = packed["x.gate_proj"].scale_in
    with engine(WORK / "source-plain"):
        layer = MergedColumnParallelLinear(
            192, [64, 64], bias=False, quant_config=config, prefix="x.gate_up_proj", params_dtype=torch.float32
        )
        for number, weight in enumerate(packed.values()):
            fill(layer, weight, number)
        layer.quant_method.process_weights_after_loading(layer)
        adapted = MergedColumnParallelLinearWithLoRA(layer)
        adapted.create_lora_weights(1, LoRAConfig(max_lora_rank=8, max_loras=1, lora_dtype=torch.float32))
        a, b = [torch.randn(8, 192) for _ in range(2)], [torch.randn(64, 8) / 8 for _ in range(2)]
        adapted.set_lora(0, a, b)
        punica = PunicaWrapperCPU(8, 4, "cpu")
        punica.update_metadata(LoRAMapping((7,) * 4, (7,) * 4), [7], 1, 1000)
        adapted.set_mapping(punica)
        x = torch.randn(4, 192)
        expected = dense(packed, x, *packed) + torch.cat([x @ a[i].T @ b[i].T for i in range(2)], -1)
        near(adapted(x)[0], expected)


def case_experts_are_refused() -> None:
    config, _ = small(q_proj=spec(64, 192))
    with pytest.raises(
        CheckpointError, match=r"model.layers.3.mlp.experts: mixture-of-experts models cannot be served"
    ):
        config.get_quant_method(RoutedExperts.__new__(RoutedExperts), "model.layers.3.mlp.experts")


def case_a_bias_without_a_place() -> None:
    config, packed = small(o_proj=LayerSpec(64, 192, 3, (64,), (128, 64), "float16"))
    with engine(WORK / "source-plain"):
        layer = RowParallelLinear(192, 64, bias=False, quant_config=config, prefix="x.o_proj")
        fill(
            layer,
            PackedWeight(
                **{n: getattr(packed["x.o_proj"], n) for n in ("spec", "recipe", "codes", "scale_in", "scale_out")}
            ),
        )
        with pytest.raises(CheckpointError, match=r"x.o_proj: bias float16, but vLLM's model has none here"):
            layer.quant_method.process_weights_after_loading(layer)


def case_one_node_and_nothing_of_the_checkpoint_in_it() -> None:
    """Another checkpoint, even of other ratios, is the same graph with other inputs."""
    texts = []
    with engine(WORK / "source-plain"):
        for seed in (0, 1):
            own = LayerSpec(64, 192, 3, (64,), (128, 64), None, (1.0, 0.5 + seed / 8))
            config, _ = small(down_proj=own)
            weight = random_packed(own, seed)
            layer = ReplicatedLinear(192, 64, bias=True, quant_config=config, prefix="x.down_proj", return_bias=False)
            fill(layer, weight)
            bias, layer.bias, layer.has_bias = layer.bias, None, False
            layer.quant_method.process_weights_after_loading(layer)
            layer.bias = nn.Parameter(torch.full_like(bias, seed))
            graphs: list[Any] = []

            def keep(graph: Any, inputs: Any, graphs: list[Any] = graphs) -> Any:
                graphs.append(graph)
                return graph.forward

            compiled = torch.compile(layer, backend=keep, fullgraph=True, dynamic=True)
            x = torch.randn(5, 192)
            for rows in (2, 5, 3):
                assert torch.equal(compiled(x[:rows]), layer(x[:rows]))
            assert len(graphs) == 1
            nodes = [node for node in graphs[0].graph.nodes if node.op == "call_function"]
            assert [str(node.target) for node in nodes] == ["eightfold.linear"]
            assert not [node for node in graphs[0].graph.nodes if node.op == "get_attr"]
            texts.append(graphs[0].code)
            stages = type(weight.recipe)(weight.recipe.stages, own.ratios)
            expected = PackedWeight(own, stages, weight.codes, weight.scale_in, weight.scale_out)
            near(layer(x), dense({"x.down_proj": expected}, x, "x.down_proj") + seed)
            torch.compiler.reset()
    assert texts[0] == texts[1]


def glq_of(kind: str, how: Recipe, zero: bool = False) -> None:
    source = write_model(kind, WORK / f"source-glq-{kind}-{how.codebook}-{how.pow2}")
    folder = WORK / f"glq-{kind}-{how.codebook}-{how.pow2}"
    written = write_glq(source, folder, how)
    content = json.loads((folder / "config.json").read_text())
    if zero:
        with pytest.raises(ValueError, match="the model has a bias here, GLQ dropped it"), engine(folder):
            pass
        content["quantization_config"]["biases"] = "zero"
        (folder / "config.json").write_text(json.dumps(content))
    with engine(folder) as config:
        model = load(config)
        for name, module in model.named_modules():
            if isinstance(getattr(module, "quant_method", None), EightfoldLinearMethod):
                names = [layer.name for layer in module.quant_method.layers]
                x = torch.randn(3, module.input_size).bfloat16()
                whole = torch.cat([torch.from_numpy(written[n]) for n in names])
                near(run(module, x), x.double() @ whole.T)
                assert module.bias is None or not bool(module.bias.any()), name
        if kind == "qwen2":  # the other's heads cannot be shared by two anyway
            with as_rank(0, 2), pytest.raises(ValueError, match="sizes that fit this checkpoint are 1;"):
                load(config)


def case_glq_block_diagonal() -> None:
    glq_of("llama", Recipe("e8p", bits=(2, 3, 4)))


def case_glq_powers_of_two() -> None:
    glq_of("llama", Recipe("e8p", bits=(5, 8), pow2=True))


def case_glq_shells_and_biases() -> None:
    glq_of("qwen2", Recipe("e8_shell", bits=(3, 4)), zero=True)


def case_another_package_keeps_the_name_glq() -> None:
    """Unless it is ours, what is registered under GLQ's name stays."""
    ours = vllm_plugin._ours.copy()
    vllm_plugin._ours.clear()
    try:
        with TestCase().assertLogs("eightfold.vllm_plugin", "WARNING") as seen:
            vllm_plugin.register()
        assert "are served by another package" in seen.output[0]
        assert not vllm_plugin._ours
    finally:
        vllm_plugin._ours.extend(ours)


def prepare() -> None:
    """Once before all cases."""
    torch.set_num_threads(1)
    vllm_plugin.register()
    vllm_plugin.register()  # vLLM may
    for name, (module, kind) in MODELS.items():  # a class: by name vLLM would look at it in yet another process
        ModelRegistry.register_model(name, getattr(import_module(f"vllm.model_executor.models.{module}"), kind))
    llama(WORK / "source-plain")


CASES: dict[str, Callable[[], None]] = {
    name.removeprefix("case_"): case for name, case in list(globals().items()) if name.startswith("case_")
}
