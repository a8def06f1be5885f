"""Rotation blocks and the cuts of tensor parallelism."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import pytest
from transformers import GPT2Config, LlamaConfig, Phi3Config, Qwen3Config

from eightfold.tensor_parallel import cut_side, fused_parts, largest_tp, linear_blocks

LAYOUTS = pytest.mark.parametrize("layout", ["pow2-sum", "equal-256", "pow2-sum-256"])


def llama(**more: Any) -> LlamaConfig:
    shape = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_key_value_heads": 8}
    return LlamaConfig(**shape | more)


def shapes(config: Any) -> dict[str, tuple[int, int]]:
    """The linears of a layer: name -> (N, K)."""
    hidden, inner = config.hidden_size, config.intermediate_size
    head = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    q, kv = head * config.num_attention_heads, head * config.num_key_value_heads
    attention, mlp = "model.layers.0.self_attn", "model.layers.0.mlp"
    if config.model_type == "phi3":
        up = {f"{attention}.qkv_proj": (q + 2 * kv, hidden), f"{mlp}.gate_up_proj": (2 * inner, hidden)}
    else:
        up = {f"{attention}.{n}_proj": (size, hidden) for n, size in (("q", q), ("k", kv), ("v", kv))}
        up |= {f"{mlp}.gate_proj": (inner, hidden), f"{mlp}.up_proj": (inner, hidden)}
    return up | {f"{attention}.o_proj": (hidden, q), f"{mlp}.down_proj": (hidden, inner)}


def borders(blocks: tuple[int, ...]) -> set[int]:
    return {0, *accumulate(blocks)}


def cuts(parts: list[int], ways: list[int]) -> set[int]:
    """Where fused parts are cut, each into so many equal shards."""
    starts = [0, *accumulate(parts)]
    return {start + part * i // way for start, part, way in zip(starts, parts, ways, strict=False) for i in range(way)}


@LAYOUTS
@pytest.mark.parametrize(
    "config",
    [
        llama(intermediate_size=14336),
        llama(intermediate_size=14336, num_key_value_heads=2),
        Qwen3Config(hidden_size=2560, intermediate_size=9728, head_dim=128),
        Phi3Config(hidden_size=3072, intermediate_size=8192, num_attention_heads=32, num_key_value_heads=8),
    ],
    ids=["llama", "two key heads", "qwen3", "phi3"],
)
def test_no_block_crosses_a_cut(config: Any, layout: str) -> None:
    sides = set()
    for name, (N, K) in shapes(config).items():
        out_blocks, in_blocks = linear_blocks(config, name, (N, K), layout, 8)
        assert sum(out_blocks) == N
        assert sum(in_blocks) == K
        side = cut_side(config, name)
        sides.add(side)
        for size in (1, 2, 4, 8):
            if side == "in":
                assert cuts([K], [size]) <= borders(in_blocks)
            else:
                parts, kv = fused_parts(config, name, N), min(size, config.num_key_value_heads)
                ways = [size, kv, kv] if len(parts) == 3 else [kv if name[-6:] in ("k_proj", "v_proj") else size]
                assert cuts(parts, ways * (len(parts) // len(ways))) <= borders(out_blocks)
    assert sides == {"in", "out"}


def test_only_the_side_that_is_cut_is_constrained() -> None:
    config = llama()
    down, up = "model.layers.3.mlp.down_proj", "model.layers.3.mlp.up_proj"
    assert cut_side(config, down) == "in"
    assert cut_side(config, up) == "out"
    assert linear_blocks(config, down, (4096, 11008), "pow2-sum", 1) == ((4096,), (8192, 2048, 512, 256))
    assert linear_blocks(config, down, (4096, 11008), "pow2-sum", 4) == ((4096,), (2048, 512, 128, 64) * 4)
    assert linear_blocks(config, up, (11008, 4096), "pow2-sum", 4) == ((2048, 512, 128, 64) * 4, (4096,))


def test_few_key_heads_are_cut_no_further() -> None:
    config = llama(num_key_value_heads=2)
    assert linear_blocks(config, "model.layers.0.self_attn.k_proj", (256, 4096), "pow2-sum", 8)[0] == (128, 128)
    assert linear_blocks(config, "model.layers.0.self_attn.q_proj", (4096, 4096), "pow2-sum", 8)[0] == (512,) * 8
    one = llama(num_key_value_heads=1)
    assert linear_blocks(one, "model.layers.0.self_attn.v_proj", (128, 4096), "pow2-sum", 8)[0] == (128,)


def test_parts_of_fused_linears() -> None:
    config = Phi3Config(hidden_size=384, intermediate_size=512, num_attention_heads=6, num_key_value_heads=2)
    assert fused_parts(config, "model.layers.0.self_attn.qkv_proj", 640) == [384, 128, 128]
    assert fused_parts(config, "model.layers.0.mlp.gate_up_proj", 1024) == [512, 512]
    assert fused_parts(config, "model.layers.0.mlp.down_proj", 384) == [384]
    # each part has blocks of its own, cut or not
    name = "model.layers.0.self_attn.qkv_proj"
    assert linear_blocks(config, name, (640, 384), "pow2-sum", 1)[0] == (256, 128, 128, 128)
    assert linear_blocks(config, name, (640, 384), "pow2-sum", 2)[0] == (128, 64, 128, 64, 64, 64, 64, 64)


def test_a_model_without_a_plan_may_be_cut_on_either_side() -> None:
    config = GPT2Config(n_embd=256, n_head=4)
    assert cut_side(config, "transformer.h.0.mlp.c_fc") == "both"
    assert linear_blocks(config, "transformer.h.0.mlp.x", (1024, 256), "pow2-sum", 2) == ((512, 512), (128, 128))


@LAYOUTS
def test_a_size_that_does_not_fit_is_refused(layout: str) -> None:
    with pytest.raises(ValueError, match=r"^model\.layers\.0\.mlp\.up_proj: .* 8 parts .* lower tp_max"):
        linear_blocks(llama(), "model.layers.0.mlp.up_proj", (11000, 4096), layout, 8)


@pytest.mark.parametrize(
    ("config", "size"),
    [
        (llama(), 4),  # 11008 / 8 = 1376 is no multiple of 64
        (llama(intermediate_size=14336), 8),
        (llama(intermediate_size=14336, num_key_value_heads=2), 8),
        (
            llama(hidden_size=4608, intermediate_size=14336, num_attention_heads=36, num_key_value_heads=4),
            4,
        ),  # heads do not split
        (llama(hidden_size=3072, intermediate_size=14336, num_attention_heads=24, num_key_value_heads=3), 1),
        (llama(hidden_size=1536, intermediate_size=14336, num_attention_heads=12, num_key_value_heads=6), 2),
        (llama(hidden_size=200, intermediate_size=344, num_attention_heads=5, num_key_value_heads=1), 1),
    ],
)
def test_the_largest_size(config: Any, size: int) -> None:
    assert largest_tp(config, shapes(config), "pow2-sum") == size


def test_a_padded_power_of_two_is_not_cut() -> None:
    assert largest_tp(llama(), shapes(llama()), "pow2") == 1
