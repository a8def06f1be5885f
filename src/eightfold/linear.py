"""QuantLinear: a linear whose weight stays in codes, and the one operator, `eightfold::linear`, that runs it.

    y = s_out ∘ R_outᵀ( W_hat · R_in( s_in ∘ x ) ) + bias

On a GPU that the kernels support, float16 and bfloat16 activations go through them (eightfold.cuda.linear). All else is
the reference: it decodes the whole weight and multiplies in float32; `QuantLinear.prepare` then decodes once and keeps
the result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from eightfold.codebook import on_device
from eightfold.cuda import linear as kernels
from eightfold.cuda.weight import Weight, can_tile, tile, untile
from eightfold.e8p import codebook
from eightfold.e8shell import doubled_points
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


def _reference(
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

    `codes`, `scale_in` [K], `scale_out` [N], `bias` [N] as the format has them, or `codes` as `tile` makes them;
    `ratios` float32 [S]; blocks as flat [size, count] pairs.
    """
    codes = [untile(c) for c in codes]
    recipe = StageRecipe(tuple(_STAGE_OF[c.dtype] for c in codes), tuple(ratios.tolist()))
    spec = LayerSpec(scale_out.numel(), scale_in.numel(), recipe.bits, _expand(out_blocks), _expand(in_blocks), None)
    weight = dequantize(PackedWeight(spec, recipe, tuple(codes), scale_in, scale_out))
    y = functional.linear(x.float(), weight, None if bias is None else bias.float())
    return y.to(x.dtype)


def _on_gpu(
    x: Tensor,
    codes: list[Tensor],
    ratios: Tensor,
    scale_in: Tensor,
    scale_out: Tensor,
    bias: Tensor | None,
    in_blocks: list[int],
    out_blocks: list[int],
) -> Tensor:
    if x.shape[-1] != len(scale_in):
        raise ValueError(f"expected {len(scale_in)} input features, got {list(x.shape)}")
    for tensor in (*codes, ratios, scale_in, scale_out):
        if tensor.device != x.device:
            raise ValueError(f"expected all on {x.device}, where the input is, got a tensor on {tensor.device}")
    weight = _weight(codes, ratios, scale_in, scale_out, in_blocks, out_blocks)
    if not _has_kernels(weight, x.dtype):
        return _reference(x, codes, ratios, scale_in, scale_out, bias, in_blocks, out_blocks)
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    y = kernels.linear(rows, weight, bias)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[-1])


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


# Not the decorator custom_op: it costs 20 microseconds a call, this 3.
torch.library.define("eightfold::linear", _SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
torch.library.impl("eightfold::linear", "default", _reference)
torch.library.impl("eightfold::linear", "cuda", _on_gpu)
torch.library.register_fake("eightfold::linear", _linear_fake)


def _weight(codes: list[Tensor], *others: Any) -> Weight:
    weight = Weight(codes, *others)
    if weight.stages.shells and not codes[0].is_meta:
        weight.points = (on_device(doubled_points, codes[0].device),)
    return weight


def _has_kernels(weight: Weight, dtype: torch.dtype) -> bool:
    return (
        dtype in (torch.float16, torch.bfloat16) and kernels.supported(weight.ratios.device) and kernels.takes(weight)
    )


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
        self._prepared: torch.dtype | None = None
        self._dense: Tensor | None = None

    @classmethod
    def from_packed(cls, packed: PackedWeight) -> QuantLinear:
        """A module over the tensors of `packed`, which it shares."""
        module = cls(packed.spec, packed.recipe, packed.scale_in.dtype, "meta")
        for name, tensor in packed.tensors().items():
            setattr(module, name, nn.Parameter(tensor, requires_grad=False))
        return module

    def packed(self) -> PackedWeight:
        """The weight as the format has it; shares the parameters' memory, unless `prepare` tiled the codes."""
        named = {name: untile(parameter.detach()) for name, parameter in self.named_parameters()}
        return PackedWeight.from_tensors(self.spec, self.recipe, named)

    def prepare(self, dtype: torch.dtype = torch.float32) -> QuantLinear:
        """Do now what the first call with activations of `dtype` would else do; returns self.

        On a GPU with kernels (float16, bfloat16) that is compiling and loading them, and tiling the codes: the
        parameters then have four dimensions, though the state dict keeps those of the file. Elsewhere the weight is
        decoded and kept in `dtype`: it is no parameter and not in the state dict. A move to another device or
        activations of another dtype prepare anew. Raises ValueError where the parameters have no data (meta device),
        KernelError.
        """
        if self.scale_in.is_meta:
            raise ValueError("expected parameters with data, these are on the meta device: load them first")
        self._prepared, self._dense = dtype, None
        self._ratios = self._ratios.to(self.scale_in.device)
        weight = _weight(*self.arguments())
        if _has_kernels(weight, dtype):
            if not weight.tiled and can_tile(weight.padded_out, weight.in_blocks):
                self._replace_codes(tile)
            kernels.prepare(_weight(*self.arguments()))
        else:
            self._dense = dequantize(self.packed()).to(dtype)
        return self

    @property
    def prepared(self) -> bool:
        """Whether `prepare` was called, and neither `release` nor a move to the meta device since."""
        return self._prepared is not None

    @property
    def runs_kernels(self) -> bool:
        """Whether `prepare` found kernels that run the codes, so that there is no dense weight."""
        return self._prepared is not None and self._dense is None

    def release(self) -> None:
        """Drop the dense weight if there is one; from now on every call decodes."""
        self._prepared = self._dense = None

    def forward(self, x: Tensor) -> Tensor:
        """x float [..., K] → [..., N] in the same dtype."""
        dense = self._dense
        # Offloading moves parameters without telling the module: then the codes are what is on x's device.
        if dense is not None and dense.device == x.device:
            if dense.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
                dense = self.prepare(x.dtype)._dense
            if dense is not None:
                return self._multiply(x, dense)
        if x.requires_grad and torch.is_grad_enabled():  # the operator has no derivative
            return self._multiply(x, dequantize(self.packed()).to(x.dtype))
        if self._ratios.device != x.device:
            self._ratios = self._ratios.to(x.device)
        codes, ratios, scale_in, scale_out, *blocks = self.arguments()
        return torch.ops.eightfold.linear(x, codes, ratios, scale_in, scale_out, self.bias, *blocks)

    def _multiply(self, x: Tensor, dense: Tensor) -> Tensor:
        return functional.linear(x, dense, None if self.bias is None else self.bias.to(x.dtype))

    def arguments(self) -> tuple[list[Tensor], Tensor, Tensor, Tensor, list[int], list[int]]:
        """The operator's, save for the activations and the bias."""
        codes: list[Tensor] = [self.get_parameter(name) for name in self._code_names]
        return codes, self._ratios, self.scale_in, self.scale_out, *self._blocks

    def _replace_codes(self, layout: Callable[[Tensor], Tensor]) -> None:
        for name in self._code_names:  # one after another: memory for one more, not for all
            setattr(self, name, nn.Parameter(layout(self.get_parameter(name).detach()), requires_grad=False))

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self._code_names:
            destination[prefix + name] = untile(destination[prefix + name])

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        if self.get_parameter(self._code_names[0]).dim() == 4:
            self._replace_codes(untile)
        super()._load_from_state_dict(*args, **kwargs)
        if self._prepared is not None:
            self.prepare(self._prepared)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        def keep_dtype(tensor: Tensor) -> Tensor:
            new = fn(tensor)
            return new if new.dtype == tensor.dtype else tensor.to(new.device)

        dtype = self._prepared
        self.release()
        super()._apply(keep_dtype, recurse)
        if dtype is not None and not self.scale_in.is_meta:
            self.prepare(fn(torch.empty(0, dtype=dtype, device=self.scale_in.device)).dtype)
        return self

    def extra_repr(self) -> str:
        spec = self.spec
        return f"in_features={spec.in_features}, out_features={spec.out_features}, bits={spec.bits}"


def _flat(blocks: Sequence[int]) -> list[int]:
    return [number for run in run_lengths(blocks) for number in run]


def _expand(flat: Sequence[int]) -> tuple[int, ...]:
    return tuple(size for size, count in zip(flat[::2], flat[1::2], strict=True) for _ in range(count))
