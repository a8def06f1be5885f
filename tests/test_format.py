from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from packing import random_packed, recipe, spec
from safetensors.torch import load_file

from eightfold.checkpoint import read_packed
from eightfold.folder import ModelFolder
from eightfold.format import (
    CheckpointError,
    LayerSpec,
    PackedWeight,
    QuantConfig,
    StageRecipe,
    bias_bytes,
    code_bytes,
    stored_bits,
    vector_bytes,
)
from eightfold.quantize import dequantize

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture
def section() -> dict:
    """A fresh copy of a valid `quantization_config`."""
    return json.loads((GOLDEN / "config.json").read_text())["quantization_config"]


@pytest.fixture(scope="module")
def golden() -> ModelFolder:
    return ModelFolder(GOLDEN)


# --- golden files -----------------------------------------------------------------------------------------


def test_golden_weights_decode_to_the_bit(golden):
    expected = load_file(GOLDEN / "expected.safetensors")
    assert golden.quantization is not None
    assert {f"{name}.weight" for name in golden.quantization.layers} == expected.keys()
    for name in golden.quantization.layers:
        W = dequantize(read_packed(golden, name))
        assert W.dtype == torch.float32
        assert torch.equal(W, expected[f"{name}.weight"]), name


def test_golden_config_round_trips_to_the_byte(section):
    config = QuantConfig.from_dict(section)
    again = {"quantization_config": config.to_dict()}
    assert json.dumps(again, indent=1) + "\n" == (GOLDEN / "config.json").read_text()
    assert QuantConfig.from_dict(config.to_dict()) == config


def test_golden_files_are_what_their_script_writes(tmp_path):
    script = tmp_path / "make.py"
    script.write_bytes((GOLDEN / "make.py").read_bytes())
    subprocess.run([sys.executable, script], check=True)
    for name in ("config.json", "model.safetensors", "expected.safetensors"):
        assert (tmp_path / name).read_bytes() == (GOLDEN / name).read_bytes(), name


def test_config_round_trips_after_sorting_of_keys(section):
    config = QuantConfig.from_dict(section)
    assert QuantConfig.from_dict(json.loads(json.dumps(config.to_dict(), sort_keys=True))) == config


# --- what a reader refuses --------------------------------------------------------------------------------

A = "model.layers.0.a"


def set_at(path: str, value: object) -> Callable[[dict], None]:
    def change(section: dict) -> None:
        *above, last = path.split("/")
        for key in above:
            section = section[key]
        section[last] = value

    return change


def drop(path: str) -> Callable[[dict], None]:
    def change(section: dict) -> None:
        *above, last = path.split("/")
        for key in above:
            section = section[key]
        del section[last]

    return change


BAD = [
    (set_at("quant_method", "gptq"), "quant_method"),
    (set_at("format_version", 2), "format_version"),
    (set_at("format_version", True), "format_version"),
    (set_at("format_version", "1"), "format_version"),
    (drop("format_version"), "format_version"),
    (drop("tp_max"), "tp_max: missing"),
    (set_at("group_size", 128), "group_size: unknown"),
    (set_at("tp_max", 0), "tp_max"),
    (set_at("tp_max", 2.0), "tp_max"),
    (set_at("scale_dtype", "bfloat16"), "scale_dtype"),
    (set_at("provenance", []), "provenance"),
    (set_at("layers", {}), "layers"),
    (set_at("layers", []), "layers"),
    (set_at("layers/", None), "layers"),
    (set_at(f"layers/{A}", None), A),
    (set_at(f"layers/{A}/group", 1), rf"{A}: group: unknown"),
    (drop(f"layers/{A}/bias"), rf"{A}: bias: missing"),
    (set_at(f"layers/{A}/bias", "int8"), rf"{A}: bias"),
    (set_at(f"layers/{A}/bits", 9), rf"{A}: bits"),
    (set_at(f"layers/{A}/bits", 2.5), rf"{A}: bits"),
    (set_at(f"layers/{A}/bits", 6), "recipes"),
    (set_at(f"layers/{A}/ratios", None), rf"{A}: ratios: expected a list"),
    (set_at(f"layers/{A}/ratios", [1.0]), rf"{A}: ratios: expected 3 positive numbers"),
    (set_at(f"layers/{A}/ratios", [0.5, 0.5, 0.5]), rf"{A}: ratios: expected 3 positive numbers, 1 first"),
    (set_at(f"layers/{A}/out_features", 0), rf"{A}: out_features"),
    (set_at(f"layers/{A}/in_features", 73.0), rf"{A}: in_features"),
    (set_at(f"layers/{A}/out_blocks", [[16, 1]]), rf"{A}: out_blocks"),  # holds 16 of 20
    (set_at(f"layers/{A}/out_blocks", [[16, 1], [128, 1]]), rf"{A}: out_blocks"),
    (set_at(f"layers/{A}/out_blocks", [[16, 1], [0, 1], [4, 1]]), rf"{A}: out_blocks"),
    (set_at(f"layers/{A}/out_blocks", [[16, 1], [4, 0]]), rf"{A}: out_blocks"),
    (set_at(f"layers/{A}/out_blocks", [[16, 1], [-4, -1]]), rf"{A}: out_blocks"),
    (set_at(f"layers/{A}/out_blocks", [[4, 1], [4, 4]]), rf"{A}: out_blocks"),
    (set_at(f"layers/{A}/out_blocks", [20]), rf"{A}: out_blocks"),
    (set_at(f"layers/{A}/out_blocks", [[16, 1, 4]]), rf"{A}: out_blocks"),
    (set_at(f"layers/{A}/out_blocks", [[16.0, 1], [4, 1]]), rf"{A}: out_blocks"),
    (set_at(f"layers/{A}/out_blocks", "16,4"), rf"{A}: out_blocks"),
    (set_at(f"layers/{A}/out_blocks", [[2, 10**12]]), rf"{A}: out_blocks"),
    (set_at(f"layers/{A}/in_blocks", [[64, 1], [4, 2], [2, 1]]), rf"{A}: in_blocks"),  # 74: no multiple of 8
    (set_at("layers/model.layers.0", {}), "model.layers.0"),
    (set_at("recipes/9", {"stages": ["e8p"], "ratios": [1.0]}), "recipes"),
    (set_at("recipes/02", {"stages": ["e8p"], "ratios": [1.0]}), "recipes"),
    (set_at("recipes/6", {"stages": ["e8p"] * 3, "ratios": [1.0, 0.3, 0.1]}), "recipes"),  # nobody's
    (set_at("recipes/2/stages", ["e8p", "e8p"]), "recipes.2: ratios"),
    (set_at("recipes/2/stages", ["trellis"]), "recipes.2: stages"),
    (set_at("recipes/2/stages", []), "recipes.2: stages"),
    (set_at("recipes/2/ratios", [0.9]), "recipes.2: ratios"),
    (set_at("recipes/3/ratios", [1.0, -0.5]), "recipes.3: ratios"),
    (set_at("recipes/3/ratios", [1.0, math.nan]), "recipes.3: ratios"),
    (set_at("recipes/3/ratios", [1.0, math.inf]), "recipes.3: ratios"),
    (set_at("recipes/3/ratios", [1.0, "0.5"]), "recipes.3: ratios"),
    (set_at("recipes/3/stages", ["e8p", "e8p"]), "recipes.3: its stages make 4"),
    (drop("recipes/3"), r"recipes.*\[3\]"),
    (set_at("recipes/3/scale", 1.0), "recipes.3: scale: unknown"),
]


@pytest.mark.parametrize(("change", "names"), BAD)
def test_bad_config_is_refused_by_name(section, change, names):
    change(section)
    with pytest.raises(CheckpointError, match=names):
        QuantConfig.from_dict(section)


def test_a_layer_may_have_ratios_of_its_own(section):
    section["layers"][A]["ratios"] = [1, 0.25, 0.0625]
    config = QuantConfig.from_dict(section)
    assert config.recipe(A) == StageRecipe(("e8p", "e8p", "e81b"), (1.0, 0.25, 0.0625))
    assert config.recipe(A) != config.recipes[5]
    assert QuantConfig.from_dict(config.to_dict()) == config
    assert config.to_dict()["layers"][A]["ratios"] == [1.0, 0.25, 0.0625]


@pytest.mark.parametrize("section", [None, [], "eightfold", {}])
def test_no_config(section):
    with pytest.raises(CheckpointError):
        QuantConfig.from_dict(section)


def test_a_layer_inside_a_layer_is_refused(section):
    section["layers"][f"{A}.inner"] = copy.deepcopy(section["layers"][A])
    with pytest.raises(CheckpointError, match=r"a\.inner"):
        QuantConfig.from_dict(section)


def test_provenance_must_be_json():
    layers, recipes = {"a": spec(16, 64, 2)}, {2: recipe(2)}
    with pytest.raises(CheckpointError, match="provenance"):
        QuantConfig(layers, recipes, provenance={"path": Path("x")})
    with pytest.raises(CheckpointError, match="provenance"):
        QuantConfig(layers, recipes, provenance={"loss": math.nan})


# --- tensors ----------------------------------------------------------------------------------------------


def broken(**change: object) -> PackedWeight:
    packed = random_packed(spec(40, 72, 5, "float32"))
    for key, value in change.items():
        setattr(packed, key, value)
    return packed


def test_every_rate_is_valid():
    for bits in range(2, 9):
        random_packed(spec(40, 72, bits, "bfloat16")).validate("p")


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (lambda p: {"codes": (*p.codes[:2], p.codes[2].to(torch.int16))}, r"p\.qweight2: .*uint8.*int16"),
        (lambda p: {"codes": (p.codes[0][:-1], *p.codes[1:])}, r"p\.qweight: expected .* \[48, 16\], came"),
        (lambda p: {"codes": (*p.codes[:1], p.codes[1].long(), p.codes[2])}, r"p\.qweight1: expected int16"),
        (lambda p: {"codes": p.codes[:2]}, r"p\.qweight2: expected a tensor uint8 .* there is none"),
        (lambda p: {"codes": (*p.codes, p.codes[0])}, r"p\.qweight3: expected no such tensor"),
        (lambda p: {"scale_in": p.scale_in[:-1]}, r"p\.scale_in"),
        (lambda p: {"scale_in": p.scale_in.double()}, r"p\.scale_in"),
        (lambda p: {"scale_out": p.scale_out.float()}, r"p\.scale_out"),
        (lambda p: {"scale_out": p.scale_out * math.nan}, r"p\.scale_out: expected finite .* 40"),
        (lambda p: {"scale_in": p.scale_in / 0}, r"p\.scale_in: expected finite"),
        (lambda p: {"bias": None}, r"p\.bias: .* there is none"),
        (lambda p: {"bias": p.bias.half()}, r"p\.bias"),
        (lambda p: {"bias": p.bias + math.inf}, r"p\.bias: expected finite"),
        (lambda p: {"recipe": recipe(4)}, "bits"),
    ],
)  # fmt: skip
def test_bad_tensors_are_refused_by_name(change, names):
    with pytest.raises(CheckpointError, match=names):
        broken(**change(broken())).validate("p")


def test_bias_that_is_not_announced():
    packed = random_packed(spec(40, 72, 2))
    packed.bias = torch.zeros(40)
    with pytest.raises(CheckpointError, match=r"p\.bias: expected no such tensor"):
        packed.validate("p")


def test_tensor_grammar():
    config = QuantConfig({"a.b": spec(40, 72, 7, "float16")}, {7: recipe(7)}, scale_dtype="float32")
    rows = (48, 16)
    assert config.tensors("a.b") == {
        "a.b.qweight": (torch.int16, rows),
        "a.b.qweight1": (torch.int16, rows),
        "a.b.qweight2": (torch.int16, rows),
        "a.b.qweight3": (torch.uint8, rows),
        "a.b.scale_in": (torch.float32, (72,)),
        "a.b.scale_out": (torch.float32, (40,)),
        "a.b.bias": (torch.float16, (40,)),
    }


# --- sizes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", ["float16", "float32"])
@pytest.mark.parametrize("bits", range(2, 9))
def test_sizes_are_those_of_the_tensors(bits, scale):
    layer = spec(200, 344, bits, "bfloat16")
    packed = random_packed(layer, scale=getattr(torch, scale))
    sizes = {key: tensor.nbytes for key, tensor in packed.tensors().items()}
    assert sum(size for key, size in sizes.items() if key.startswith("qweight")) == code_bytes(layer)
    assert sizes["scale_in"] + sizes["scale_out"] == vector_bytes(layer, scale)
    assert sizes["bias"] == bias_bytes(layer)
    stored = sum(sizes.values()) - sizes["bias"]
    assert stored_bits(layer, scale) == 8 * stored / (200 * 344)


def test_stored_bits_of_many_layers_weighs_them_by_size():
    small, large = spec(16, 64, 8), spec(512, 512, 2)
    bytes_ = sum(code_bytes(s) + vector_bytes(s) for s in (small, large))
    assert stored_bits([small, large]) == 8 * bytes_ / (16 * 64 + 512 * 512)


def test_the_31b_layer_costs_its_nominal_bytes():
    layer = spec(21504, 5376, 2)
    assert code_bytes(layer) == 21504 * 5376 * 2 // 8
    padded = LayerSpec(21504, 5376, 2, (32768,), (8192,))
    assert round(code_bytes(padded) / code_bytes(layer), 2) == 2.32


def test_recipe_rates():
    assert [recipe(bits).bits for bits in range(2, 9)] == list(range(2, 9))
    assert StageRecipe(("e81b",), (1.0,)).bits == 1
