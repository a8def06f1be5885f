"""The tensors of one GLQ linear, and the way from them to eightfold's and back.

GLQ (codebooks e8p and e8_shell) has per linear codes `Qidxs…` of up to four stages, a row of signs `SU` [M] and one
`SV` [N] over the padded matrix, the scale `Wscale`, and `inv_resid_scale…`, the ratio of every stage after the first.
Its E8P and E81B points are numbered as here, its E8 shells as in `e8shell`: codes differ in their order and width
alone. docs/glq.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from eightfold.files import TensorCode
from eightfold.format import CheckpointError, LayerSpec, PackedWeight, StageRecipe, code_names

CODEBOOKS = ("e8p", "e8_shell")
# Of a codebook of GLQ: the stage that stands for two bits a weight, and the one for a last, odd bit.
_STAGES = {"e8p": ("e8p", "e81b"), "e8_shell": ("e8shell", "e8shell256")}
_SUFFIXES = {"e8p": "_e8p", "e81b": "_e81b", "e8shell": "", "e8shell256": ""}
_SEED = 42  # of the signs of every linear that GLQ quantizes


def stages(codebook: str, bits: int) -> tuple[str, ...]:
    """Our names of the stages that make `bits` a weight in GLQ's `codebook`, one of CODEBOOKS."""
    whole, odd = _STAGES[codebook]
    return (whole,) * (bits // 2) + (odd,) * (bits % 2)


def codebook_of(stages_: tuple[str, ...]) -> str | None:
    """The codebook of GLQ that has these stages in this order; None if there is none."""
    bits = sum(1 if stage in ("e81b", "e8shell256") else 2 for stage in stages_)
    return next((name for name in CODEBOOKS if stages(name, bits) == stages_), None)


def code_leaf(k: int, stage: str) -> str:
    """GLQ's name of the codes of stage k, which is a `stage`."""
    return f"Qidxs{k + 1 if k else ''}{_SUFFIXES[stage]}"


def ratio_leaf(k: int) -> str:
    """GLQ's name of the ratio of stage k, from 1."""
    return f"inv_resid_scale{k if k > 1 else ''}"


def expected(stages_: tuple[str, ...], padded_out: int, padded_in: int) -> dict[str, TensorCode]:
    """GLQ's name → (dtype, shape) of every tensor of a linear with these stages and this padded size."""
    shapes: dict[str, TensorCode] = {
        "e8p": ("I64", (padded_out // 16, padded_in // 64, 8, 4)),
        "e81b": ("I64", (padded_out, padded_in // 64)),
        "e8shell": ("I16", (padded_out, padded_in // 8)),
        "e8shell256": ("I16", (padded_out, padded_in // 8)),
    }
    named: dict[str, TensorCode] = {code_leaf(k, stage): shapes[stage] for k, stage in enumerate(stages_)}
    named |= {ratio_leaf(k): ("F32", ()) for k in range(1, len(stages_))}
    return named | {"SU": ("F16", (padded_out,)), "SV": ("F16", (padded_in,)), "Wscale": ("F32", ())}


def sources(stages_: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """Our name of a tensor → GLQ's names of those that it is made of."""
    codes = {key: (code_leaf(k, stages_[k]),) for k, key in enumerate(code_names(len(stages_)))}
    return codes | {"scale_in": ("SV",), "scale_out": ("SU", "Wscale")}


# --- to eightfold -----------------------------------------------------------------------------------------


def unpack(name: str, key: str, spec: LayerSpec, recipe: StageRecipe, parts: Mapping[str, Tensor]) -> Tensor:
    """Our tensor `key` of linear `name` from GLQ's `parts` (`sources`), on their device; vectors in float32.

    Raises CheckpointError for signs that are none, a scale that is negative or not finite, and codes that the 256
    points of an odd bit do not have.
    """
    if key == "scale_in":
        return _checked_signs(f"{name}.SV", parts["SV"])[: spec.in_features].to(torch.float32, copy=True)
    if key == "scale_out":
        scale = parts["Wscale"]
        if not bool(torch.isfinite(scale)) or float(scale) < 0:
            raise CheckpointError(f"{name}.Wscale: expected a finite scale that is not negative, came {float(scale)}")
        return _checked_signs(f"{name}.SU", parts["SU"])[: spec.out_features].float() * scale
    k = code_names(len(recipe.stages)).index(key)
    leaf = code_leaf(k, recipe.stages[k])
    if recipe.stages[k] == "e8shell256" and not bool((parts[leaf].to(torch.int32) & 0xFFFF < 256).all()):
        raise CheckpointError(f"{name}.{leaf}: expected codes below 256, which is all that an odd bit has, came others")
    return _CODES[recipe.stages[k]].unpack(parts[leaf])


def unpack_linear(name: str, spec: LayerSpec, recipe: StageRecipe, parts: Mapping[str, Tensor]) -> PackedWeight:
    """All of a linear by GLQ's bare names (a `bias` too, if `spec` has one). Raises as `unpack` does."""
    named = {key: unpack(name, key, spec, recipe, parts) for key in sources(recipe.stages)}
    if spec.bias is not None:
        named["bias"] = parts["bias"]
    return PackedWeight.from_tensors(spec, recipe, named)


def _checked_signs(key: str, signs: Tensor) -> Tensor:
    if not bool((signs.abs() == 1).all()):
        raise CheckpointError(f"{key}: expected signs, 1 and -1 alone, came other values")
    return signs


def _unpack_e8p(words: Tensor) -> Tensor:
    """int64 [M/16, N/64, 8, 4] → int16 [M, N/8].

    A word holds codes of 2 rows × 2 groups of columns, number i = row + 2 · group: byte i is the pattern (high byte)
    of code i, bit 32 + 4j + i is bit j of its signs (low byte).
    """
    data = words.contiguous().view(torch.uint8).unflatten(-1, (4, 8))
    patterns, mixed = data[..., :4], data[..., 4:]
    signs = torch.zeros_like(patterns)
    for i in range(4):
        for half in range(4):  # byte `half` of the upper word has bits 2 · half and 2 · half + 1 of all four
            byte = mixed[..., half]
            signs[..., i] |= (byte >> i & 1) << 2 * half | (byte >> 4 + i & 1) << 2 * half + 1
    codes = torch.stack([signs, patterns], -1).view(torch.int16)[..., 0]  # [I, J, p, q, i]
    I, J = words.shape[:2]
    # i = (group, row): rows 16 I + 2 p + row, groups of columns 8 J + 2 q + group
    return codes.reshape(I, J, 8, 4, 2, 2).permute(0, 2, 5, 1, 3, 4).reshape(16 * I, 8 * J)


def _pack_e8p(codes: Tensor) -> Tensor:
    I, J = codes.shape[0] // 16, codes.shape[1] // 8
    tiles = codes.reshape(I, 8, 2, J, 4, 2).permute(0, 3, 1, 4, 5, 2).reshape(I, J, 8, 4, 4)
    data = tiles.contiguous().view(torch.uint8).unflatten(-1, (4, 2))
    signs, patterns = data[..., 0], data[..., 1]
    mixed = torch.zeros_like(patterns)
    for i in range(4):
        for half in range(4):
            byte = signs[..., i]
            mixed[..., half] |= (byte >> 2 * half & 1) << i | (byte >> 2 * half + 1 & 1) << 4 + i
    return torch.cat([patterns, mixed], -1).view(torch.int64)[..., 0]


def _unpack_e81b(words: Tensor) -> Tensor:
    return words.contiguous().view(torch.uint8)


def _pack_e81b(codes: Tensor) -> Tensor:
    return codes.contiguous().view(torch.int64)


def _unpack_shell(codes: Tensor) -> Tensor:
    return codes.contiguous().view(torch.uint16)


def _pack_shell(codes: Tensor) -> Tensor:
    return codes.contiguous().view(torch.int16)


def _unpack_shell256(codes: Tensor) -> Tensor:
    return codes.to(torch.uint8).view(torch.int8)


def _pack_shell256(codes: Tensor) -> Tensor:
    return codes.contiguous().view(torch.uint8).to(torch.int16)


@dataclass(frozen=True, slots=True)
class _Codes:
    unpack: Callable[[Tensor], Tensor]
    pack: Callable[[Tensor], Tensor]


_CODES = {
    "e8p": _Codes(_unpack_e8p, _pack_e8p),
    "e81b": _Codes(_unpack_e81b, _pack_e81b),
    "e8shell": _Codes(_unpack_shell, _pack_shell),
    "e8shell256": _Codes(_unpack_shell256, _pack_shell256),
}


# --- and back ---------------------------------------------------------------------------------------------


def targets(stages_: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """GLQ's name of a tensor → our names of those that it is made of."""
    codes = {code_leaf(k, stages_[k]): (key,) for k, key in enumerate(code_names(len(stages_)))}
    ratios: dict[str, tuple[str, ...]] = {ratio_leaf(k): () for k in range(1, len(stages_))}
    return codes | ratios | {"SU": ("scale_out",), "SV": ("scale_in",), "Wscale": ("scale_in", "scale_out")}


def pack(name: str, leaf: str, spec: LayerSpec, recipe: StageRecipe, parts: Mapping[str, Tensor]) -> Tensor:
    """GLQ's tensor `leaf` of linear `name` from our `parts` (`targets`), on the CPU.

    Signs of the padding, on which no weight depends, are those that GLQ draws. Raises CheckpointError for vectors that
    are not signs times one number.
    """
    if leaf in ("SU", "SV"):
        drawn = dict(zip(("SU", "SV"), _drawn_signs(spec.padded_out, spec.padded_in), strict=True))[leaf]
        vector = parts["scale_out" if leaf == "SU" else "scale_in"]
        drawn[: len(vector)] = torch.where(vector.signbit(), -1, 1)
        return drawn.half()
    if leaf == "Wscale":
        return _magnitude(f"{name}.scale_in", parts["scale_in"]) * _magnitude(f"{name}.scale_out", parts["scale_out"])
    for k, stage in enumerate(recipe.stages):
        if k and leaf == ratio_leaf(k):
            return torch.tensor(recipe.ratios[k], dtype=torch.float32)
        if leaf == code_leaf(k, stage):
            return _CODES[stage].pack(parts[code_names(k + 1)[k]])
    raise KeyError(leaf)


def pack_linear(name: str, packed: PackedWeight) -> dict[str, Tensor]:
    """All of a linear by GLQ's bare names, but for the bias, for which GLQ has no place. Raises as `pack` does."""
    named, stages_ = packed.tensors(), packed.recipe.stages
    return {leaf: pack(name, leaf, packed.spec, packed.recipe, named) for leaf in targets(stages_)}


def _magnitude(key: str, vector: Tensor) -> Tensor:
    """The one number, float32 []."""
    sizes = vector.float().abs()
    if not bool((sizes == sizes[0]).all()):
        raise CheckpointError(f"{key}: expected signs times one number, which is all that GLQ has, came several")
    return sizes[0].clone()


def _drawn_signs(padded_out: int, padded_in: int) -> tuple[Tensor, Tensor]:
    """SU and SV as GLQ draws them, the same in every linear: int64."""
    rng = torch.Generator().manual_seed(_SEED)
    first = torch.randint(0, 2, (padded_out,), generator=rng) * 2 - 1
    return first, torch.randint(0, 2, (padded_in,), generator=rng) * 2 - 1
