"""Which side of a linear tensor parallelism cuts, and the rotation blocks that no cut goes through.

The linears of a decoder are cut along their outputs (q, k, v, gate, up: "colwise") or along their inputs (o, down:
"rowwise"). Only the side that is cut is constrained: the other one is whole on every device, or its rotation is linear
and commutes with the sum over devices. One file then serves every size that divides tp_max.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any

from eightfold.rotation import IN_FLOOR, OUT_FLOOR, layout_blocks

SIZES = (8, 4, 2, 1)  # what "auto" tries


def cut_side(config: Any, name: str) -> str:
    """ "out", "in" or "both" (for a linear that the model's own plan does not mention): the side that is cut."""
    plan = getattr(config, "base_model_tp_plan", None) or {}
    styles = [style for pattern, style in plan.items() if fnmatchcase(name, f"*{pattern}")]
    if any(style.startswith("colwise") for style in styles):
        return "out"
    return "in" if any(style.startswith("rowwise") for style in styles) else "both"


def fused_parts(config: Any, name: str, out_features: int) -> list[int]:
    """Outputs of the linears that one linear of the model is fused of: each is cut, and rotated, on its own."""
    if name.endswith("qkv_proj"):
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        head = out_features // (heads + 2 * kv_heads)
        return [heads * head, kv_heads * head, kv_heads * head]
    if name.endswith("gate_up_proj"):
        return [out_features // 2] * 2
    return [out_features]


def linear_blocks(
    config: Any, name: str, shape: tuple[int, int], layout: str, tp_max: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Blocks of the output and of the input side of a linear of `shape` (N, K).

    Key and value heads are cut into at most as many parts as there are heads; beyond that they are repeated.
    Raises ValueError for a dimension that does not split, naming the linear.
    """
    N, K = shape
    side = cut_side(config, name)
    out_cuts = tp_max if side in ("out", "both") else 1
    in_cuts = tp_max if side in ("in", "both") else 1
    parts = fused_parts(config, name, N)
    kv_heads = getattr(config, "num_key_value_heads", None) or tp_max
    is_kv = [name.endswith(("k_proj", "v_proj")) or (len(parts) == 3 and i > 0) for i in range(len(parts))]
    try:
        out = [
            layout_blocks(part, layout, OUT_FLOOR, min(out_cuts, kv_heads) if kv else out_cuts)
            for part, kv in zip(parts, is_kv, strict=True)
        ]
        return sum(out, ()), layout_blocks(K, layout, IN_FLOOR, in_cuts)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def largest_tp(config: Any, shapes: dict[str, tuple[int, int]], layout: str) -> int:
    """The largest of SIZES that every linear of `shapes` (and the heads) can be cut into."""
    return next(size for size in SIZES if size == 1 or _fits(config, shapes, layout, size))


def check_heads(config: Any, size: int) -> None:
    """Raise ValueError unless the attention heads split into `size` parts, key and value heads by parts or copies."""
    heads, kv_heads = getattr(config, "num_attention_heads", size), getattr(config, "num_key_value_heads", None) or size
    if heads % size or (kv_heads % size and size % kv_heads):
        raise ValueError(f"expected a tp_max that splits {heads} heads and {kv_heads} key heads, got {size}")


def _fits(config: Any, shapes: dict[str, tuple[int, int]], layout: str, size: int) -> bool:
    try:
        check_heads(config, size)
        for name, shape in shapes.items():
            linear_blocks(config, name, shape, layout, size)
    except ValueError:
        return False
    return True
