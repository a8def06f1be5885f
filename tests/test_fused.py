"""Which layers a server's linear is made of, and what of them one device holds."""

from __future__ import annotations

from dataclasses import replace

import pytest
from transformers import LlamaConfig, Phi3Config

from eightfold.format import CheckpointError, LayerSpec, QuantConfig
from eightfold.fused import Layer, can_merge, cut_inputs, cut_outputs, cut_vocabulary, joined, layers_of, members
from eightfold.quantize import recipe
from eightfold.rotation import layout_blocks
from eightfold.tensor_parallel import fused_parts, linear_blocks

PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
LAYOUT = "pow2-sum-256"


def layer(name: str, rows: int, columns: int, out: tuple[int, ...], inner: tuple[int, ...], bits: int = 2) -> Layer:
    return Layer(name, LayerSpec(rows, columns, bits, out, inner, "float16"), recipe(bits))


def small(name: str, bits: int = 2) -> Layer:
    return layer(name, 64, 128, (64,), (128,), bits)


def test_members_of_a_merged_linear():
    layers = {name: small(name) for name in ("a.q_proj", "a.k_proj", "a.v_proj", "a.o_proj", "b.qkv_proj", "head")}
    names = {
        "a.qkv_proj": ["a.q_proj", "a.k_proj", "a.v_proj"],
        "a.o_proj": ["a.o_proj"],
        "b.qkv_proj": ["b.qkv_proj"],  # merged in the files
        "head": ["head"],
    }
    for name, expected in names.items():
        assert [found.name for found in members(layers, name, PACKED) or ()] == expected
    for name in ("a.gate_up_proj", "c.qkv_proj", "q_proj", "a", ""):
        assert members(layers, name, PACKED) is None


def test_a_layer_whose_values_are_its_keys():
    layers = {name: small(name) for name in ("a.q_proj", "a.k_proj")}
    assert [found.name for found in members(layers, "a.qkv_proj", PACKED) or ()] == ["a.q_proj", "a.k_proj", "a.k_proj"]


@pytest.mark.parametrize("listed", [("q_proj",), ("k_proj", "v_proj"), ("q_proj", "v_proj")])
def test_a_part_that_is_not_listed_is_named(listed):
    missing = "k_proj" if "q_proj" in listed else "q_proj"
    with pytest.raises(CheckpointError, match=f"a.{missing}: expected it quantized like the others of a.qkv_proj"):
        members({f"a.{name}": small(f"a.{name}") for name in listed}, "a.qkv_proj", PACKED)


def test_layers_have_their_own_ratios():
    own = replace(small("a").spec, bits=3, ratios=(1.0, 0.5))
    config = QuantConfig({"a": own, "b": replace(own, ratios=None)}, {3: recipe(3)})
    layers = layers_of(config)
    assert layers["a"].recipe.ratios == (1.0, 0.5)
    assert layers["b"].recipe == recipe(3)


LLAMA = LlamaConfig(hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=4)


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_every_size_that_divides_tp_max(size):
    """Outputs, and key heads of which there are fewer than devices; inputs; nothing of a block lost or cut."""
    shapes = {"q_proj": (4096, 4096), "k_proj": (512, 4096), "v_proj": (512, 4096)}
    layers = [layer(n, *shape, *linear_blocks(LLAMA, n, shape, LAYOUT, 8)) for n, shape in shapes.items()]
    heads = min(size, 4)
    sizes = [4096 // size, 512 // heads, 512 // heads]
    parts = cut_outputs(layers, sizes, size, 8)
    assert [part.pieces for part in parts] == [size, heads, heads]
    for part, own, rows in zip(parts, layers, sizes, strict=True):
        assert (part.spec.out_features, sum(part.spec.out_blocks)) == (rows, rows)
        assert part.spec.out_blocks * part.pieces == own.spec.out_blocks
        assert part.spec.in_blocks == own.spec.in_blocks
        assert part.spec.bias is None
        assert cut_inputs(part, 4096, 8) == part
    assert can_merge(parts)

    down = layer("down_proj", 4096, 14336, *linear_blocks(LLAMA, "layers.0.mlp.down_proj", (4096, 14336), LAYOUT, 8))
    (part,) = cut_outputs([down], [4096], 1, 8)
    part = cut_inputs(part, 14336 // size, 8)
    assert part.spec.in_blocks * size == down.spec.in_blocks
    assert part.spec.out_blocks == down.spec.out_blocks


@pytest.mark.parametrize("size", [1, 2, 4])
def test_merged_in_the_files(size):
    config = Phi3Config(hidden_size=1024, intermediate_size=1536, num_attention_heads=8, num_key_value_heads=2)
    name, shape = "layers.0.self_attn.qkv_proj", (1024 + 512, 1024)
    own = layer(name, *shape, *linear_blocks(config, name, shape, LAYOUT, 4))
    q, k, v = fused_parts(config, name, shape[0])
    heads = min(size, 2)
    (part,) = cut_outputs([own], [q // size, k // heads, v // heads], size, 4)
    assert part.spec.out_features == q // size + k // heads + v // heads
    blocks = iter(own.spec.out_blocks)
    whole = [[next(blocks) for _ in range(count)] for count in _counts(own.spec.out_blocks, [q, k, v])]
    pieces = [part[: len(part) // n] for part, n in zip(whole, (size, heads, heads), strict=True)]
    assert list(part.spec.out_blocks) == [block for piece in pieces for block in piece]


def _counts(blocks: tuple[int, ...], sizes: list[int]) -> list[int]:
    """How many of the blocks make up each of the sizes."""
    counts, at = [], 0
    for size in sizes:
        count = 0
        while size:
            size -= blocks[at]
            at, count = at + 1, count + 1
        counts.append(count)
    return counts


def test_sizes_that_do_not_fit_name_those_that_do():
    own = layer("x.up_proj", 1024, 512, (256,) * 4, (256, 256))
    message = r"x.up_proj: its 1024 outputs cannot be cut into 128 .* sizes that fit this checkpoint are 1, 2, 4;"
    with pytest.raises(ValueError, match=message):
        cut_outputs([own], [128], 8, 4)
    with pytest.raises(ValueError, match="outputs cannot be cut into 300"):
        cut_outputs([own], [300], 4, 4)
    (part,) = cut_outputs([own], [1024], 1, 4)
    with pytest.raises(ValueError, match="its 512 inputs cannot be cut into 128 a device"):
        cut_inputs(part, 128, 4)
    with pytest.raises(ValueError, match="expected 2 parts of a merged linear, the model has 3"):
        cut_outputs([own, own], [1, 2, 3], 1, 1)
    padded = layer("y", 200, 100, (128, 64, 16), (64, 64))
    with pytest.raises(ValueError, match="y: its 200 outputs cannot be cut"):
        cut_outputs([padded], [100], 2, 2)
    with pytest.raises(ValueError, match="y: its 100 inputs cannot be cut"):
        cut_inputs(cut_outputs([padded], [200], 1, 2)[0], 50, 2)
    uneven = layer("z", 384, 64, (256, 128), (64,))  # 192 rows each: the larger block is cut
    with pytest.raises(ValueError, match="z: its 384 outputs"):
        cut_outputs([uneven], [192], 2, 2)


def test_the_head_is_cut_by_words():
    own = layer("lm_head", 1000, 256, (1,) * 1000, (256,))
    assert cut_vocabulary(own, 1024).spec.out_blocks == (1,) * 1024  # with vLLM's padding
    assert cut_vocabulary(own, 512).pieces == 2
    rotated = layer("lm_head", 1000, 256, (512, 256, 128, 64, 32, 16), (256,))
    assert cut_vocabulary(rotated, 1024).spec.padded_out == 1008
    with pytest.raises(ValueError, match="lm_head: its 1000 outputs"):
        cut_vocabulary(rotated, 512)


def test_what_can_merge():
    def parts(*layers):
        return cut_outputs(list(layers), [each.spec.out_features for each in layers], 1, 1)

    assert can_merge(parts(small("a"), small("b")))
    assert not can_merge(parts(small("a"), small("b", 3)))
    assert not can_merge(parts(small("a"), layer("b", 64, 128, (64,), (64, 64))))
    assert not can_merge(parts(small("a"), layer("b", 60, 128, (64,), (128,))))
    both = joined(small("a").spec, layer("b", 40, 128, (32, 16), (128,)).spec)
    assert (both.out_features, both.out_blocks, both.in_blocks) == (104, (64, 32, 16), (128,))
    assert layout_blocks(64, LAYOUT, 16) == (64,)
