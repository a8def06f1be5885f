"""One linear of a server, made of layers that a checkpoint lists: which they are, and what of them lies on one device.

Servers merge linears that read the same input (q, k, v; gate, up) into one, and cut it among devices: along its
outputs, or along its inputs. Nothing here knows a server: names, sizes and rotation blocks come in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from eightfold.format import CheckpointError, LayerSpec, QuantConfig, StageRecipe


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer that the checkpoint lists, by its name there."""

    name: str
    spec: LayerSpec
    recipe: StageRecipe


@dataclass(frozen=True, slots=True)
class Part:
    """What one device holds of a layer: `spec` of that piece, without the bias, which servers keep; `pieces`: into how
    many the layer's outputs are cut, each on one device or on several."""

    layer: Layer
    spec: LayerSpec
    pieces: int

    @property
    def padded(self) -> bool:
        """Whether the codes have rows beyond the outputs."""
        return self.spec.padded_out != self.spec.out_features


def layers_of(config: QuantConfig) -> dict[str, Layer]:
    """The quantized layers by name."""
    return {name: Layer(name, spec, config.recipe(name)) for name, spec in config.layers.items()}


def members(layers: Mapping[str, Layer], name: str, packed: Mapping[str, Sequence[str]]) -> list[Layer] | None:
    """The layers that the server's linear `name` is made of, in order; None if none of them is quantized.

    `packed`: last name of a merged linear → last names of its parts. A linear that is merged in the files is listed
    under its own name: then that is the only one. A model whose values are its keys lists no v: k stands for it.
    Raises CheckpointError where some parts are listed and others are not.
    """
    if name in layers:
        return [layers[name]]
    head, dot, last = name.rpartition(".")
    names = [head + dot + part for part in packed.get(last, ())]
    if not any(each in layers for each in names):
        return None
    found = []
    for each in names:
        if each not in layers and each.endswith("v_proj"):
            each = each.removesuffix("v_proj") + "k_proj"
        if each not in layers:
            raise CheckpointError(
                f"{each}: expected it quantized like the others of {name}, config.json does not list it"
            )
        found.append(layers[each])
    return found


def cut_outputs(layers: Sequence[Layer], sizes: Sequence[int], devices: int, tp_max: int) -> list[Part]:
    """What one device holds of `layers` when the linear of `sizes` (outputs of each part on one device) is cut among
    `devices`. One layer and several sizes: they are merged in the files.

    Raises ValueError, naming the sizes of tensor parallelism that fit, where a cut goes through a rotation block.
    """
    if len(layers) == 1 and len(sizes) > 1:
        if devices == 1:
            return _parts(layers, [sum(sizes)], tp_max)
        return [_merged_in_file(layers[0], sizes, devices, tp_max)]
    return _parts(layers, sizes, tp_max)


def cut_inputs(part: Part, size: int, tp_max: int) -> Part:
    """What a device holds that gets `size` of the inputs. Raises ValueError as `cut_outputs` does."""
    spec = part.spec
    pieces = _count(spec.in_features, size)
    blocks = _piece(spec.in_blocks, pieces) if pieces and (pieces == 1 or spec.padded_in == spec.in_features) else None
    if not blocks:
        raise _does_not_fit(part.layer, "inputs", spec.in_features, size, tp_max)
    return replace(part, spec=replace(spec, in_features=size, in_blocks=blocks))


def cut_vocabulary(layer: Layer, size: int) -> Part:
    """What a device holds of the output head that is to have `size` outputs, padding included: as many rows of a head
    without output rotation, else the whole head. Raises ValueError as `cut_outputs` does."""
    spec = layer.spec
    if set(spec.out_blocks) == {1} and spec.padded_out == spec.out_features:
        return _part(layer, size, (1,) * size, -(-spec.out_features // size))
    if size < spec.out_features:
        raise _does_not_fit(layer, "outputs", spec.out_features, size, 1)
    return _part(layer, spec.out_features, spec.out_blocks, 1)


def can_merge(parts: Sequence[Part]) -> bool:
    """Whether the codes of `parts` can lie in one tensor a stage, row after row: one recipe, one input rotation, no row
    of padding. (Whether they can run as one linear hangs on the values of their input scales, too.)"""
    first = parts[0]
    alike = all((p.layer.recipe, p.spec.in_blocks) == (first.layer.recipe, first.spec.in_blocks) for p in parts)
    return alike and not any(part.padded for part in parts)


def joined(first: LayerSpec, second: LayerSpec) -> LayerSpec:
    """Two layers of one input, the rows of the second after those of the first."""
    rows = first.out_features + second.out_features
    return replace(first, out_features=rows, out_blocks=first.out_blocks + second.out_blocks)


def _parts(layers: Sequence[Layer], sizes: Sequence[int], tp_max: int) -> list[Part]:
    if len(layers) != len(sizes):
        raise ValueError(
            f"{layers[0].name}: expected {len(layers)} parts of a merged linear, the model has {len(sizes)}"
        )
    parts = []
    for layer, size in zip(layers, sizes, strict=True):
        spec = layer.spec
        pieces = _count(spec.out_features, size)
        if pieces == 1:
            parts.append(_part(layer, size, spec.out_blocks, 1))
            continue
        blocks = _piece(spec.out_blocks, pieces) if pieces and spec.padded_out == spec.out_features else None
        if not pieces or not blocks:
            raise _does_not_fit(layer, "outputs", spec.out_features, size, tp_max)
        parts.append(_part(layer, size, blocks, pieces))
    return parts


def _merged_in_file(layer: Layer, sizes: Sequence[int], devices: int, tp_max: int) -> Part:
    """Each part is cut on its own. The last two of three are keys and values, of which devices may share copies."""
    spec = layer.spec
    whole = [size * devices for size in sizes]
    if len(sizes) == 3:
        whole[1:] = [(spec.out_features - whole[0]) // 2] * 2
    mine: tuple[int, ...] = ()
    start = 0
    for full, size in zip(whole, sizes, strict=True):
        blocks = _between(spec.out_blocks, start, start + full)
        pieces = _count(full, size)
        piece = _piece(blocks, pieces) if blocks and pieces else None
        if piece is None:
            raise _does_not_fit(layer, "outputs", full, size, tp_max)
        mine += piece
        start += full
    if start != spec.out_features or spec.padded_out != spec.out_features:
        raise _does_not_fit(layer, "outputs", spec.out_features, sum(sizes), tp_max)
    return _part(layer, sum(sizes), mine, devices)


def _part(layer: Layer, rows: int, blocks: tuple[int, ...], pieces: int) -> Part:
    return Part(layer, replace(layer.spec, out_features=rows, out_blocks=blocks, bias=None), pieces)


def _count(whole: int, part: int) -> int | None:
    """How many parts the whole has; None if it does not split so."""
    return whole // part if part > 0 and whole % part == 0 else None


def _piece(blocks: Sequence[int], count: int) -> tuple[int, ...] | None:
    """Blocks of one of `count` equal pieces, which must all be alike; None where they are not, or a block is cut."""
    if len(blocks) % count:
        return None
    piece = tuple(blocks[: len(blocks) // count])
    return piece if piece * count == tuple(blocks) else None


def _between(blocks: Sequence[int], begin: int, end: int) -> tuple[int, ...] | None:
    """Blocks of the coordinates [begin, end); None where a border cuts one."""
    found, at = [], 0
    for block in blocks:
        if begin <= at < end:
            found.append(block)
        elif at < begin < at + block:
            return None
        at += block
    return tuple(found) if sum(found) == end - begin else None


def _does_not_fit(layer: Layer, side: str, whole: int, part: int, tp_max: int) -> ValueError:
    fits = ", ".join(str(size) for size in range(1, tp_max + 1) if tp_max % size == 0)
    return ValueError(
        f"{layer.name}: its {whole} {side} cannot be cut into {part} a device without cutting rotation blocks: "
        f"tensor-parallel sizes that fit this checkpoint are {fits}; quantize with a larger --tp-max for more"
    )
