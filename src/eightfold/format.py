"""The file format, version 1, as types: what config.json says of every quantized linear, and its tensors.

docs/format.md is the norm; this module checks what it says. Nothing is inferred from tensors: a layer that
the config does not list is not quantized, and a tensor that differs from what it announces is an error.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from eightfold.rotation import run_lengths, valid_block
from eightfold.rvq import Residual

FORMAT_VERSION = 1
QUANT_METHOD = "eightfold"
BITS = range(2, 9)
STAGES = ("e8p", "e81b", "e8shell", "e8shell256")
MAX_STAGES = 4
MAX_FEATURES = 1 << 24
SCALE_DTYPES = ("float16", "float32")
BIAS_DTYPES = ("float16", "bfloat16", "float32")
# How safetensors spells the dtypes of a quantized linear's tensors.
DTYPE_CODES = {torch.int16: "I16", torch.uint8: "U8", torch.uint16: "U16", torch.int8: "I8"}
DTYPE_CODES |= {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}

TensorSpec = tuple[torch.dtype, tuple[int, ...]]


class CheckpointError(ValueError):
    """A file or a config that is not what the format says; the message names the file, layer or field."""


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """One quantized linear. `bits`: nominal rate and key of its recipe; `bias`: dtype name, None for no bias;
    `ratios`: its own in place of the recipe's, None for the recipe's.

    The blocks are the sizes of the rotations' blocks in order; each side's sum is its padded size. Raises
    CheckpointError, naming the field, for anything the format does not allow.
    """

    out_features: int
    in_features: int
    bits: int
    out_blocks: tuple[int, ...]
    in_blocks: tuple[int, ...]
    bias: str | None = None
    ratios: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("out_features", "in_features"):
            _int(name, getattr(self, name), 1, MAX_FEATURES)
        _int("bits", self.bits, BITS[0], BITS[-1])
        _blocks("out_blocks", self.out_blocks, self.out_features, 1)
        _blocks("in_blocks", self.in_blocks, self.in_features, 8)
        if self.bias is not None and self.bias not in BIAS_DTYPES:
            raise CheckpointError(f"bias: expected null or one of {BIAS_DTYPES}, came {self.bias!r}")

    @property
    def padded_out(self) -> int:
        """Rows of the codes: out_features and the padding that the output rotation needs."""
        return sum(self.out_blocks)

    @property
    def padded_in(self) -> int:
        """Weights of a row of codes: in_features and the padding that the input rotation needs."""
        return sum(self.in_blocks)

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of docs/format.md; blocks as [size, count] pairs."""
        content = {f.name: getattr(self, f.name) for f in fields(self)}
        content |= {side: [list(run) for run in run_lengths(content[side])] for side in _BLOCK_FIELDS}
        ratios = content.pop("ratios")
        return content if ratios is None else content | {"ratios": list(ratios)}

    @classmethod
    def from_dict(cls, section: Any) -> LayerSpec:
        """Inverse of `to_dict`. Raises CheckpointError naming the field that is unknown, missing or wrong."""
        section = _section(section, cls, optional="ratios")
        parsed = {side: _expand(side, section[side]) for side in _BLOCK_FIELDS}
        return cls(**section | parsed | {key: _ratios(section[key]) for key in section if key == "ratios"})


_BLOCK_FIELDS = ("out_blocks", "in_blocks")


@dataclass(frozen=True, slots=True)
class StageRecipe(Residual):
    """How codes make weights, as config.json says it: stage k adds ratios[k] times a point of codebook stages[k].

    Raises CheckpointError for what the format does not allow; ratios[0] is 1.
    """

    def __post_init__(self) -> None:
        if not 1 <= len(self.stages) <= MAX_STAGES or any(stage not in STAGES for stage in self.stages):
            raise CheckpointError(f"stages: expected 1 to {MAX_STAGES} of {STAGES}, came {self.stages!r}")
        count = len(self.stages)
        if len(self.ratios) != count or not all(map(_positive, self.ratios)) or self.ratios[0] != 1:
            raise CheckpointError(f"ratios: expected {count} positive numbers, 1 first, came {self.ratios!r}")

    @classmethod
    def from_dict(cls, section: Any) -> StageRecipe:
        """From {"stages": [...], "ratios": [...]}. Raises CheckpointError naming what is wrong."""
        section = _section(section, cls)
        return cls(_tuple("stages", section["stages"]), _ratios(section["ratios"]))


@dataclass(frozen=True, slots=True)
class QuantConfig:
    """The `quantization_config` of config.json: everything a loader must know.

    `layers`: a LayerSpec per quantized linear by the name of its module; `recipes`: one per bits in use.
    `tp_max`: tensor-parallel sizes that divide it keep every rotation block on one device. `provenance`: any
    JSON object, not interpreted.
    """

    layers: dict[str, LayerSpec]
    recipes: dict[int, StageRecipe]
    tp_max: int = 1
    scale_dtype: str = "float16"
    provenance: dict[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION
    quant_method: str = QUANT_METHOD

    def __post_init__(self) -> None:
        if self.quant_method != QUANT_METHOD:
            raise CheckpointError(f"quant_method: expected {QUANT_METHOD!r}, came {self.quant_method!r}")
        _version(self.format_version)
        _int("tp_max", self.tp_max, 1, MAX_FEATURES)
        if self.scale_dtype not in SCALE_DTYPES:
            raise CheckpointError(f"scale_dtype: expected one of {SCALE_DTYPES}, came {self.scale_dtype!r}")
        if not isinstance(self.provenance, dict) or not _is_json(self.provenance):
            raise CheckpointError(f"provenance: expected a JSON object, came {self.provenance!r}")
        if not self.layers:
            raise CheckpointError("layers: expected at least one quantized layer, came none")
        for bits, recipe in self.recipes.items():
            if bits != recipe.bits:
                raise CheckpointError(f"recipes.{bits}: its stages make {recipe.bits} bits a weight")
        if odd := {spec.bits for spec in self.layers.values()} ^ set(self.recipes):
            raise CheckpointError(f"recipes: expected one for each bits in use, {sorted(odd)} do not match")
        _each("layers", {name: name for name, spec in self.layers.items() if spec.ratios is not None}, self.recipe)
        _layer_names(self.layers)

    def to_dict(self) -> dict[str, Any]:
        """JSON object; `from_dict` gives back an equal config."""
        return {
            "quant_method": self.quant_method,
            "format_version": self.format_version,
            "scale_dtype": self.scale_dtype,
            "tp_max": self.tp_max,
            "recipes": {
                str(bits): {"stages": list(recipe.stages), "ratios": list(recipe.ratios)}
                for bits, recipe in sorted(self.recipes.items())
            },
            "layers": {name: spec.to_dict() for name, spec in self.layers.items()},
            "provenance": json.loads(json.dumps(self.provenance)),
        }

    @classmethod
    def from_dict(cls, section: Any) -> QuantConfig:
        """Check all that docs/format.md demands. Raises CheckpointError naming the field or the layer."""
        if not isinstance(section, dict):
            raise CheckpointError(f"quantization_config: expected an object, came {type(section).__name__}")
        if section.get("quant_method") == QUANT_METHOD and section.get("format_version") != FORMAT_VERSION:
            # Say so before complaining of fields that a later version may have added.
            _version(section.get("format_version"))
        section = _section(section, cls)
        layers = _each("layers", section["layers"], LayerSpec.from_dict)
        recipes = _each("recipes", section["recipes"], StageRecipe.from_dict)
        if bad := [key for key in recipes if key not in map(str, BITS)]:
            raise CheckpointError(f"recipes: expected keys out of 2 to 8, came {bad[0]!r}")
        section |= {"layers": layers, "recipes": {int(bits): recipe for bits, recipe in recipes.items()}}
        return cls(**section)

    @property
    def scale(self) -> torch.dtype:
        """dtype of the scale vectors."""
        return getattr(torch, self.scale_dtype)

    def recipe(self, name: str) -> StageRecipe:
        """The recipe of layer `name`, with the layer's own ratios if it has any."""
        spec = self.layers[name]
        shared = self.recipes[spec.bits]
        return shared if spec.ratios is None else StageRecipe(shared.stages, spec.ratios)

    def tensors(self, name: str) -> dict[str, TensorSpec]:
        """Full name → (dtype, shape) of each tensor of layer `name` in the files."""
        return layer_tensors(name, self.layers[name], self.recipe(name), self.scale)


def code_names(stages: int) -> list[str]:
    """Names of the code tensors of a layer: qweight, qweight1, ..."""
    return ["qweight" + (str(k) if k else "") for k in range(stages)]


def layer_tensors(name: str, spec: LayerSpec, recipe: StageRecipe, scale: torch.dtype) -> dict[str, TensorSpec]:
    """Full name → (dtype, shape) of each tensor of a layer; an empty `name` gives the bare names."""
    prefix = f"{name}." if name else ""
    rows = (spec.padded_out, spec.padded_in // 8)
    grammar: dict[str, TensorSpec] = {
        prefix + code: (dtype, rows)
        for code, dtype in zip(code_names(len(recipe.stages)), recipe.code_dtypes, strict=True)
    }
    grammar[prefix + "scale_in"] = (scale, (spec.in_features,))
    grammar[prefix + "scale_out"] = (scale, (spec.out_features,))
    if spec.bias is not None:
        grammar[prefix + "bias"] = (getattr(torch, spec.bias), (spec.out_features,))
    return grammar


@dataclass
class PackedWeight:
    """A quantized linear in memory.

    `codes`: one tensor [padded_out, padded_in / 8] per stage, of its codebook's dtype; `scale_in` [K] and `scale_out`
    [N], float16 or float32; `bias` [N] or None.
    """

    spec: LayerSpec
    recipe: StageRecipe
    codes: tuple[Tensor, ...]
    scale_in: Tensor
    scale_out: Tensor
    bias: Tensor | None = None

    def tensors(self, name: str = "") -> dict[str, Tensor]:
        """Full name → tensor, as the files have them."""
        prefix = f"{name}." if name else ""
        named = dict(zip(code_names(len(self.codes)), self.codes, strict=True))
        named |= {"scale_in": self.scale_in, "scale_out": self.scale_out}
        if self.bias is not None:
            named["bias"] = self.bias
        return {prefix + key: tensor for key, tensor in named.items()}

    @classmethod
    def from_tensors(cls, spec: LayerSpec, recipe: StageRecipe, named: Mapping[str, Tensor]) -> PackedWeight:
        """From bare names. Raises KeyError for one that is missing; `validate` checks the rest."""
        codes = tuple(named[key] for key in code_names(len(recipe.stages)))
        return cls(spec, recipe, codes, named["scale_in"], named["scale_out"], named.get("bias"))

    def to(self, device: torch.device | str) -> PackedWeight:
        """The same on another device."""
        moved = {key: tensor.to(device) for key, tensor in self.tensors().items()}
        return PackedWeight.from_tensors(self.spec, self.recipe, moved)

    def validate(self, name: str = "") -> None:
        """Check dtypes, shapes and finiteness. Raises CheckpointError naming the tensor of layer `name`.

        Codes need no check of their values: every bit pattern is the number of a point in every codebook.
        """
        if self.scale_in.dtype not in (torch.float16, torch.float32):
            raise CheckpointError(f"{name}.scale_in: expected one of {SCALE_DTYPES}, came {self.scale_in.dtype}")
        if self.recipe.bits != self.spec.bits:
            raise CheckpointError(f"{name}: bits {self.spec.bits} with a recipe of {self.recipe.bits} bits")
        came = self.tensors(name)
        expected = layer_tensors(name, self.spec, self.recipe, self.scale_in.dtype)
        check_same(expected, {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in came.items()})
        for key, tensor in came.items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                bad = int((~torch.isfinite(tensor)).sum())
                raise CheckpointError(f"{key}: expected finite values, came {bad} that are not")


def check_same(expected: Mapping[str, tuple[Any, ...]], came: Mapping[str, tuple[Any, ...]]) -> None:
    """Raise CheckpointError naming a tensor that is missing, too many, or of another dtype or shape."""
    for key in sorted(expected.keys() | came.keys()):
        if key not in came:
            raise CheckpointError(f"{key}: expected a tensor {_say(expected[key])}, there is none")
        if key not in expected:
            raise CheckpointError(f"{key}: expected no such tensor, came {_say(came[key])}")
        if expected[key] != came[key]:
            raise CheckpointError(f"{key}: expected {_say(expected[key])}, came {_say(came[key])}")


# --- sizes ------------------------------------------------------------------------------------------------


def code_bytes(spec: LayerSpec) -> int:
    """Bytes of the codes in the file: `bits` for each weight of the padded matrix."""
    return spec.padded_out * spec.padded_in * spec.bits // 8


def vector_bytes(spec: LayerSpec, scale_dtype: str = "float16") -> int:
    """Bytes of both scale vectors in the file."""
    return (spec.out_features + spec.in_features) * getattr(torch, scale_dtype).itemsize


def bias_bytes(spec: LayerSpec) -> int:
    """Bytes of the bias in the file; stored_bits leaves them out, the original has them too."""
    return spec.out_features * getattr(torch, spec.bias).itemsize if spec.bias else 0


def stored_bits(specs: LayerSpec | Iterable[LayerSpec], scale_dtype: str = "float16") -> float:
    """Bits in the file per original weight, of one layer or all: codes and scale vectors, not biases."""
    every = [specs] if isinstance(specs, LayerSpec) else list(specs)
    stored = sum(code_bytes(spec) + vector_bytes(spec, scale_dtype) for spec in every)
    return 8 * stored / sum(spec.out_features * spec.in_features for spec in every)


# --- checks -----------------------------------------------------------------------------------------------


def _version(came: Any) -> None:
    if type(came) is not int or came != FORMAT_VERSION:
        raise CheckpointError(f"format_version: expected {FORMAT_VERSION}, came {came!r}: use a matching eightfold")


def _int(name: str, value: Any, least: int, most: int) -> None:
    if type(value) is not int or not least <= value <= most:
        raise CheckpointError(f"{name}: expected an integer from {least} to {most}, came {value!r}")


def _blocks(name: str, blocks: tuple[int, ...], size: int, multiple: int) -> None:
    if bad := [block for block in set(blocks) if type(block) is not int or not valid_block(block)]:
        raise CheckpointError(f"{name}: {bad[0]!r} is no size of a rotation block")
    padded = sum(blocks)
    # Padding is at most up to a power of two, or to the least block for what is smaller.
    if not size <= padded < 2 * size + 64 or padded % multiple:
        raise CheckpointError(
            f"{name}: expected a sum that is a multiple of {multiple} and just holds {size}, came {padded}"
        )


def _expand(name: str, pairs: Any) -> tuple[int, ...]:
    blocks: list[int] = []
    for pair in _tuple(name, pairs):
        if not isinstance(pair, list) or len(pair) != 2 or any(type(x) is not int for x in pair):
            raise CheckpointError(f"{name}: expected [size, count] pairs of integers, came {pair!r}")
        _int(f"{name} count", pair[1], 1, 2 * MAX_FEATURES - len(blocks))
        if blocks and blocks[-1] == pair[0]:
            raise CheckpointError(f"{name}: expected equal neighbours in one pair, came {pair[0]} twice")
        blocks += pair[:1] * pair[1]
    return tuple(blocks)


def _tuple(name: str, value: Any) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise CheckpointError(f"{name}: expected a list, came {value!r}")
    return tuple(value)


def _ratios(value: Any) -> tuple[Any, ...]:
    return tuple(float(r) if type(r) is int else r for r in _tuple("ratios", value))


def _positive(ratio: Any) -> bool:
    return isinstance(ratio, float) and math.isfinite(ratio) and ratio > 0


def _section(section: Any, cls: type, optional: str = "") -> dict[str, Any]:
    if not isinstance(section, dict):
        raise CheckpointError(f"expected an object, came {section!r}")
    names = {f.name for f in fields(cls)}
    if odd := sorted(map(str, (section.keys() ^ names) - {optional})):
        raise CheckpointError(f"{odd[0]}: {'missing field' if odd[0] in names else 'unknown field'}")
    return dict(section)


def _each(name: str, section: Any, parse: Any) -> dict[str, Any]:
    if not isinstance(section, dict):
        raise CheckpointError(f"{name}: expected an object, came {section!r}")
    parsed = {}
    for key, value in section.items():
        try:
            parsed[key] = parse(value)
        except CheckpointError as error:
            raise CheckpointError(f"{name}.{key}: {error}") from error
    return parsed


def _layer_names(layers: Mapping[str, LayerSpec]) -> None:
    for name in layers:
        if not name or any(not part for part in name.split(".")):
            raise CheckpointError(f"layers: expected dotted names of modules, came {name!r}")
        above = name.rpartition(".")[0]
        while above:
            if above in layers:
                raise CheckpointError(f"layers: {name!r} cannot lie inside the quantized layer {above!r}")
            above = above.rpartition(".")[0]


def _is_json(value: Any) -> bool:
    try:
        return json.loads(json.dumps(value, allow_nan=False)) == value
    except (TypeError, ValueError):
        return False


def _say(spec: tuple[Any, ...]) -> str:
    dtype, shape = spec
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"
