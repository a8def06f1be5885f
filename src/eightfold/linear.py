"""QuantLinear: a linear whose weight stays in codes, and the one operator, `eightfold::linear`, that runs it.

    y = s_out ∘ R_outᵀ( W_hat · R_in( s_in ∘ x ) ) + bias

The operator's implementation here is the reference, for any device: it decodes the whole weight and
multiplies in float32. `QuantLinear.prepare` decodes once and keeps the result, for devices without kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from eightfold.e8p import codebook
from eightfold.format import STAGES, LayerSpec, PackedWeight, StageRecipe, code_names, layer_tensors
from eightfold.quantize import dequantize
from eightfold.rotation import run_lengths

# Blocks go in as [size, count, size, count, ...], ratios as a float32 tensor: Python floats in a graph would
# make every recipe another graph, and compile caches keyed by code would keep them for the next checkpoint.
_SCHEMA = (
    "(Tensor x, Tensor[] codes, Tensor ratios, Tensor scale_in, Tensor scale_out, Tensor? bias, "
    "int[] in_blocks, int[] out_blocks) -> Tensor"
)
_STAGE_OF = {codebook(name).dtype: name for name in STAGES}


def _linear(
    x: Tensor,
    codes: list[Tensor],
    ratios: Tensor,
    scale_in: Tensor,
    scale_out: Tensor,
    bias: Tensor | None,
    in_blocks: list[int],
    out_blocks: list[int],
) -> Tensor:
    """x float [..., K] times the packed weight: [..., N] in x's dtype, computed in float32.

    `codes`, `scale_in` [K], `scale_out` [N], `bias` [N] as the format has them; `ratios` float32 [S]; blocks
    as flat [size, count] pairs.
    """
    recipe = StageRecipe(tuple(_STAGE_OF[c.dtype] for c in codes), tuple(ratios.tolist()))
    spec = LayerSpec(scale_out.numel(), scale_in.numel(), recipe.bits, _expand(out_blocks), _expand(in_blocks), None)
    weight = dequantize(PackedWeight(spec, recipe, tuple(codes), scale_in, scale_out))
    y = functional.linear(x.float(), weight, None if bias is None else bias.float())
    return y.to(x.dtype)


def _linear_fake(
    x: Tensor,
    codes: list[Tensor],
    ratios: Tensor,
    scale_in: Tensor,
    scale_out: Tensor,
    bias: Tensor | None,
    in_blocks: list[int],
    out_blocks: list[int],
) -> Tensor:
    return x.new_empty((*x.shape[:-1], scale_out.shape[0]))


_op = torch.library.custom_op("eightfold::linear", _linear, mutates_args=(), schema=_SCHEMA)
_op.register_fake(_linear_fake)


class QuantLinear(nn.Module):
    """Stands where a quantized nn.Linear stood. Its parameters are the file's tensors, by the same names.

    They are parameters, though nothing trains them, because offloading moves only those. Casts of a module
    (`.to(dtype)`, `.half()`) leave their dtypes alone: files and memory never differ.

    `scale_dtype`: dtype of the scale vectors; `device`: where to allocate (meta while a model is built).
    Attributes: `spec`, `recipe`, `in_features`, `out_features`, `tensor_specs` (parameter → (dtype, shape)).
    """

    scale_in: nn.Parameter
    scale_out: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        spec: LayerSpec,
        recipe: StageRecipe,
        scale_dtype: torch.dtype = torch.float16,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.spec, self.recipe = spec, recipe
        self.in_features, self.out_features = spec.in_features, spec.out_features
        self._code_names = code_names(len(recipe.stages))
        self._blocks = (_flat(spec.in_blocks), _flat(spec.out_blocks))
        self.tensor_specs = layer_tensors("", spec, recipe, scale_dtype)
        for name, (dtype, shape) in self.tensor_specs.items():
            empty = torch.empty(shape, dtype=dtype, device=device)
            self.register_parameter(name, nn.Parameter(empty, requires_grad=False))
        if spec.bias is None:
            self.register_parameter("bias", None)
        # No buffer: loaders leave buffers that the file does not have uninitialized.
        self._ratios = torch.tensor(recipe.ratios, dtype=torch.float32, device="cpu")
        self._dense: Tensor | None = None

    @classmethod
    def from_packed(cls, packed: PackedWeight) -> QuantLinear:
        """A module over the tensors of `packed`, which it shares."""
        module = cls(packed.spec, packed.recipe, packed.scale_in.dtype, "meta")
        for name, tensor in packed.tensors().items():
            setattr(module, name, nn.Parameter(tensor, requires_grad=False))
        return module

    def packed(self) -> PackedWeight:
        """The weight as the format has it; shares the parameters' memory."""
        named = {name: parameter.detach() for name, parameter in self.named_parameters()}
        return PackedWeight.from_tensors(self.spec, self.recipe, named)

    def prepare(self, dtype: torch.dtype = torch.float32) -> QuantLinear:
        """Decode the weight now and keep it in `dtype`, that of the activations to come; returns self.

        The dense weight is no parameter and not in the state dict. A move to another device or activations of
        another dtype make it anew. Raises ValueError where the parameters have no data (meta device).
        """
        if self.scale_in.is_meta:
            raise ValueError("expected parameters with data, these are on the meta device: load them first")
        self._dense = dequantize(self.packed()).to(dtype)
        return self

    @property
    def prepared(self) -> bool:
        """Whether a dense weight is kept."""
        return self._dense is not None

    def release(self) -> None:
        """Drop the dense weight; from now on every call decodes."""
        self._dense = None

    def forward(self, x: Tensor) -> Tensor:
        """x float [..., K] → [..., N] in the same dtype."""
        dense = self._dense
        # Offloading moves parameters without telling the module: then the codes are what is on x's device.
        if dense is not None and dense.device == x.device:
            if dense.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
                dense = self.prepare(x.dtype)._dense
            assert dense is not None
            return functional.linear(x, dense, None if self.bias is None else self.bias.to(x.dtype))
        if self._ratios.device != x.device:
            self._ratios = self._ratios.to(x.device)
        codes = [self.get_parameter(name) for name in self._code_names]
        return torch.ops.eightfold.linear(
            x, codes, self._ratios, self.scale_in, self.scale_out, self.bias, *self._blocks
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        def keep_dtype(tensor: Tensor) -> Tensor:
            new = fn(tensor)
            return new if new.dtype == tensor.dtype else tensor.to(new.device)

        dense, self._dense = self._dense, None
        super()._apply(keep_dtype, recurse)
        if dense is not None and not self.scale_in.is_meta:
            self.prepare(fn(dense[:0]).dtype)
        return self

    def extra_repr(self) -> str:
        spec = self.spec
        return f"in_features={spec.in_features}, out_features={spec.out_features}, bits={spec.bits}"


def _flat(blocks: Sequence[int]) -> list[int]:
    return [number for run in run_lengths(blocks) for number in run]


def _expand(flat: Sequence[int]) -> tuple[int, ...]:
    return tuple(size for size, count in zip(flat[::2], flat[1::2], strict=True) for _ in range(count))
