"""What a GLQ checkpoint says of itself, as eightfold's configuration: from its config.json, the headers of its
safetensors files and the few scalars that are its ratios. docs/glq.md.

Nothing here knows a loader: the model's linears come in. The layout of a linear is that of its own
code tensor, whatever its neighbours or the configuration have; its e8_codebook.pt is never unpickled.
"""

from __future__ import annotations

import re
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from eightfold.e8p import codebook as points_of
from eightfold.files import TensorCode
from eightfold.format import BITS, MAX_STAGES, CheckpointError, LayerSpec, QuantConfig, StageRecipe, check_same
from eightfold.glq_tensors import CODEBOOKS, code_leaf, codebook_of, expected, ratio_leaf, stages
from eightfold.rotation import IN_FLOOR, OUT_FLOOR

QUANT_METHOD = "glq"
CODEBOOK_FILE = "e8_codebook.pt"
ZERO_BIAS = "float16"  # dtype of biases that stand in for those that GLQ dropped
_LEAF = re.compile(r"(?P<name>.+)\.(Qidxs[2-4]?(_e8p|_e81b)?|SU|SV|Wscale|inv_resid_scale[23]?)")

Read = Callable[[str], Tensor]


@dataclass(frozen=True, slots=True)
class Linear:
    """A linear of the model. `bias`: dtype name of the one that it is to have, though the file has none; else None."""

    out_features: int
    in_features: int
    bias: str | None = None


def quant_config(
    section: Mapping[str, Any], tensors: Mapping[str, TensorCode], read: Read, linears: Mapping[str, Linear]
) -> QuantConfig:
    """The whole configuration of a GLQ checkpoint, as eightfold would write it.

    `section`: its `quantization_config`; `tensors`: name → (dtype, shape) from the headers; `read`: a tensor by name,
    called for ratios (float32 []) alone; `linears`: of the model, by name.
    Raises CheckpointError, naming the field, layer or tensor, for all that is not as docs/glq.md says.
    """
    codebook = _codebook(section)
    layers = quantized_layers(section, tensors)
    _check_codebook(codebook, layers)
    found: dict[str, tuple[LayerSpec, StageRecipe]] = {}
    for name, leaves in layers.items():
        if name not in linears:
            raise CheckpointError(f"{name}: the checkpoint has it quantized, the model has no such linear")
        try:
            found[name] = _layer(name, codebook, _bits(section, name), leaves, linears[name], read)
        except CheckpointError as error:
            raise CheckpointError(str(error) if str(error).startswith(name) else f"{name}: {error}") from error
    _check_joint(layers, read)
    recipes = _shared(recipe for _, recipe in found.values())
    specs = {
        name: spec if recipe == recipes[spec.bits] else replace(spec, ratios=recipe.ratios)
        for name, (spec, recipe) in found.items()
    }
    said = {key: value for key, value in section.items() if key != "layer_bpw"}
    return QuantConfig(specs, recipes, scale_dtype="float32", provenance={"glq": said})


def quantized_layers(section: Mapping[str, Any], tensors: Mapping[str, TensorCode]) -> dict[str, dict[str, TensorCode]]:
    """Name of each quantized linear → its tensors by bare name, in the order of the configuration.

    Raises CheckpointError if one that the configuration lists has none, or if there is no quantized linear.
    """
    listed = section.get("layer_bpw", {})
    if not isinstance(listed, dict):
        raise CheckpointError(f"layer_bpw: expected an object, came {listed!r}")
    there = dict.fromkeys(match["name"] for match in map(_LEAF.fullmatch, tensors) if match)
    for name in listed:
        if name not in there:
            raise CheckpointError(f"{name}: config.json lists it (layer_bpw), the files have no quantized tensor of it")
    if not there:
        raise CheckpointError("expected quantized tensors (Qidxs…, SU, SV, Wscale), the files have none")
    layers: dict[str, dict[str, TensorCode]] = {name: {} for name in [*listed, *(n for n in there if n not in listed)]}
    for key, code in tensors.items():
        name, _, leaf = key.rpartition(".")
        if name in layers:
            layers[name][leaf] = code
    return layers


def linears(
    modules: Mapping[str, nn.Linear],
    layers: Mapping[str, Mapping[str, TensorCode]],
    zero_biases: bool,
    base: Callable[[str], str] | None = None,
) -> dict[str, Linear]:
    """A model's linears, `modules` by name, with the biases that those of `layers` (`quantized_layers`) will have.

    GLQ drops them: `base` tells the dtype of the original's by the linear's name, or `zero_biases` accepts that there
    are none. Raises CheckpointError if neither is so and the model has some.
    """
    lost = [n for n, own in layers.items() if n in modules and modules[n].bias is not None and "bias" not in own]
    if lost and base is None and not zero_biases:
        raise CheckpointError(
            f"{lost[0]}: the model has a bias here, GLQ dropped it ({len(lost)} such): restore them from the original "
            f'with `eightfold convert --base MODEL`, or accept zeros (--zero-biases, or "biases": "zero" in '
            f"quantization_config)"
        )
    biases = {name: ZERO_BIAS if base is None else base(name) for name in lost}
    return {name: Linear(m.out_features, m.in_features, biases.get(name)) for name, m in modules.items()}


def accepts_zero_biases(section: Mapping[str, Any]) -> bool:
    """Whether a user wrote `"biases": "zero"` into the configuration. Raises CheckpointError for another word."""
    if section.get("biases", "zero") != "zero":
        raise CheckpointError(f"biases: expected 'zero' or no such field, came {section['biases']!r}")
    return "biases" in section


def check_codebook_file(folder: Path, section: Mapping[str, Any]) -> None:
    """Raise CheckpointError if the folder's own table of E8 shells, if it has one, is not ours.

    GLQ computes the table anew in every run, in an order that hangs on torch's sort. The file is a zip archive whose
    member `data/0` is the bare float32 table: that is read, and nothing unpickled.
    """
    file = folder / CODEBOOK_FILE
    if _codebook(section) != "e8_shell" or not file.is_file():
        return
    try:
        with zipfile.ZipFile(file) as archive:
            member = next((n for n in archive.namelist() if n.endswith("data/0")), None)
            table = b"" if member is None else archive.read(member)
    except (zipfile.BadZipFile, OSError) as error:
        raise CheckpointError(f"{file}: expected a zip archive with the table of the codebook: {error}") from error
    ours = points_of("e8shell").points().numpy().tobytes()
    if not table or len(table) % 32 or not ours.startswith(table):
        raise CheckpointError(f"{file}: expected the usual order of E8 shell points, this checkpoint has another one")


# --- the parts --------------------------------------------------------------------------------------------


def _codebook(section: Mapping[str, Any]) -> str:
    name = section.get("codebook", "e8_shell")  # the oldest files do not say
    if name not in CODEBOOKS:
        raise CheckpointError(f"codebook: expected one of {CODEBOOKS}, came {name!r}: quantize the original anew")
    return name


def _check_codebook(codebook: str, layers: Mapping[str, Mapping[str, TensorCode]]) -> None:
    for name, leaves in layers.items():
        if len(leaves.get("Wscale", ("", ()))[1]):
            raise CheckpointError(
                f"{name}: a scale for every row (Wscale {list(leaves['Wscale'][1])}), as GLQ has for quantized "
                f"embeddings, is not supported"
            )
        inside = {"e8p" if "_" in leaf else "e8_shell" for leaf in leaves if leaf.startswith("Qidxs")}
        if inside - {codebook}:
            raise CheckpointError(
                f"{name}: config.json says codebook {codebook!r}, the tensors are of {min(inside - {codebook})!r}: "
                f"one of the two is wrong"
            )


def _bits(section: Mapping[str, Any], name: str) -> int:
    bits = section.get("layer_bpw", {}).get(name, section.get("bpw"))
    if type(bits) is not int or bits not in BITS:
        raise CheckpointError(f"{name}: expected {BITS[0]} to {BITS[-1]} bits in layer_bpw, came {bits!r}")
    return bits


def _layer(
    name: str, codebook: str, bits: int, leaves: Mapping[str, TensorCode], linear: Linear, read: Read
) -> tuple[LayerSpec, StageRecipe]:
    names = stages(codebook, bits)
    for k, stage in enumerate(names):
        for leaf in (code_leaf(k, stage), *([ratio_leaf(k)] if k else [])):
            if leaf not in leaves:
                raise CheckpointError(f"{name}.{leaf}: a stage is missing: {bits} bits need this tensor")
    own = _without_empty_stages(name, len(names), leaves, read)
    bias = own.pop("bias", None)
    padded_out, padded_in = _padded(name, codebook, own)
    if codebook == "e8_shell" and linear.in_features % 8:
        raise CheckpointError(f"{name}: expected in_features in eights, came {linear.in_features}: not supported")
    wanted = expected(names, padded_out, padded_in)
    check_same({f"{name}.{k}": v for k, v in wanted.items()}, {f"{name}.{k}": v for k, v in own.items()})
    if (padded_out, padded_in) not in _layouts(codebook, linear):
        raise CheckpointError(
            f"{name}: {padded_out} × {padded_in} is no padded size that GLQ has for {linear.out_features} × "
            f"{linear.in_features}"
        )
    blocks = _expansion(padded_out), _expansion(padded_in)
    spec = LayerSpec(linear.out_features, linear.in_features, bits, *blocks, _bias(name, bias, linear))
    ratios = (1.0, *(float(read(f"{name}.{ratio_leaf(k)}")) for k in range(1, len(names))))
    return spec, StageRecipe(names, ratios)


def _without_empty_stages(name: str, count: int, leaves: Mapping[str, TensorCode], read: Read) -> dict[str, TensorCode]:
    """The tensors but for stages beyond the `count` first whose ratio is 0: GLQ fills up a model's stages so."""
    kept = dict(leaves)
    for k in range(count, MAX_STAGES):
        if leaves.get(ratio_leaf(k)) == ("F32", ()) and float(read(f"{name}.{ratio_leaf(k)}")) == 0:
            for leaf in (ratio_leaf(k), *(code_leaf(k, stage) for stage in ("e8p", "e81b", "e8shell"))):
                kept.pop(leaf, None)
    return kept


def _padded(name: str, codebook: str, leaves: Mapping[str, TensorCode]) -> tuple[int, int]:
    """The padded size that the linear's own tensors have."""
    if codebook == "e8p":
        shape = leaves["Qidxs_e8p"][1]
        if len(shape) != 4:
            raise CheckpointError(f"{name}.Qidxs_e8p: expected four dimensions, came {list(shape)}")
        return 16 * shape[0], 64 * shape[1]
    for leaf in ("SU", "SV"):
        if leaf not in leaves or len(leaves[leaf][1]) != 1:
            raise CheckpointError(f"{name}.{leaf}: expected a vector of signs, there is none")
    return leaves["SU"][1][0], leaves["SV"][1][0]


def _layouts(codebook: str, linear: Linear) -> list[tuple[int, int]]:
    """The padded sizes that GLQ gives a linear: block diagonal, powers of two."""
    out, inner = linear.out_features, linear.in_features
    powers = (1 << (out - 1).bit_length(), 1 << (inner - 1).bit_length())
    if codebook == "e8_shell":
        return [(out, inner), powers]
    return [(-(-out // OUT_FLOOR) * OUT_FLOOR, -(-inner // IN_FLOOR) * IN_FLOOR), powers]


def _expansion(size: int) -> tuple[int, ...]:
    """Its powers of two, the largest first: the blocks of both of GLQ's layouts."""
    return tuple(1 << k for k in reversed(range(size.bit_length())) if size >> k & 1)


def _bias(name: str, came: TensorCode | None, linear: Linear) -> str | None:
    """The dtype of the bias: of one in the file (GLQ writes none, a user may have added it), or what is asked for."""
    if came is None:
        return linear.bias
    names = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}
    if came[0] not in names or came[1] != (linear.out_features,):
        raise CheckpointError(f"{name}.bias: expected {linear.out_features} floats, came {came[0]} {list(came[1])}")
    return names[came[0]]


def _check_joint(layers: Mapping[str, Any], read: Read) -> None:
    """Experts whose gate and up GLQ quantized as one matrix share a row rotation, which neither half can undo."""
    for name in layers:
        other = name.removesuffix("gate_proj") + "up_proj"
        if ".experts." in name and name.endswith("gate_proj") and other in layers:
            scales = [float(read(f"{each}.Wscale")) for each in (name, other)]
            if scales[0] == scales[1] != 0:
                raise CheckpointError(f"{name}: quantized together with {other}, as one matrix: not supported")


def _shared(recipes: Iterable[StageRecipe]) -> dict[int, StageRecipe]:
    """The commonest recipe of each rate."""
    shared: dict[int, StageRecipe] = {}
    for recipe, _ in Counter(recipes).most_common():
        shared.setdefault(recipe.bits, recipe)
    return shared


# --- to GLQ -----------------------------------------------------------------------------------------------


def section_for(config: QuantConfig) -> dict[str, Any]:
    """The `quantization_config` with which GLQ reads the layers of `config`.

    Raises CheckpointError naming the first layer that GLQ's format cannot hold, and why.
    """
    codebooks: set[str] = set()
    layouts = {0, 1}
    for name, spec in config.layers.items():
        names = config.recipe(name).stages
        codebook = codebook_of(names)
        if codebook is None or codebooks - {codebook}:
            raise CheckpointError(f"{name}: its stages {names} are not those of GLQ's one codebook, in its order")
        codebooks.add(codebook)
        size = (spec.padded_out, spec.padded_in)
        sizes = _layouts(codebook, Linear(spec.out_features, spec.in_features))
        layouts &= {i for i in layouts if sizes[i] == size}
        if not layouts or (spec.out_blocks, spec.in_blocks) != tuple(map(_expansion, size)):
            raise CheckpointError(f"{name}: its rotation blocks are not those that GLQ has for a size of {size}")
    layer_bpw = {name: spec.bits for name, spec in config.layers.items()}
    weights = {name: spec.out_features * spec.in_features for name, spec in config.layers.items()}
    mean = sum(layer_bpw[name] * weights[name] for name in weights) / sum(weights.values())
    return {
        "quant_method": QUANT_METHOD,
        "codebook": codebooks.pop(),
        "codesz": 8,
        "bpw": int(mean) if mean == int(mean) else round(mean, 2),
        "block_diagonal": 0 in layouts,
        "layer_bpw": layer_bpw,
    }
