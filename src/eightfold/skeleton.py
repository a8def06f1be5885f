"""A causal language model without weights: built on the meta device by transformers' own code, and
understood.

What is found out here is found out from the modules alone, so that a model that cannot be taken is refused
before any weight is read. No architecture is known by name.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

META = torch.device("meta")
Arguments = tuple[tuple[Any, ...], dict[str, Any]]  # of a layer, without the hidden states


def skeleton(config: Any, dtype: torch.dtype) -> Any:
    """The model without weights: every parameter and buffer on the meta device.

    Its attention is what transformers takes by default: sdpa, or eager where the architecture has no other.
    """
    from transformers import AutoModelForCausalLM

    with META:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval().requires_grad_(False)


def _linears(module: nn.Module) -> list[str]:
    return [name for name, m in module.named_modules() if isinstance(m, nn.Linear)]


def layer_list(model: Any) -> tuple[str, nn.ModuleList]:
    """Name and modules of the decoder's layers: the list with every nn.Linear but the output embedding."""
    output = model.get_output_embeddings()
    inside = [name for name in _linears(model) if model.get_submodule(name) is not output]
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and all(_linears(member) for member in module)
    ]
    if not lists:
        raise ValueError(
            f"{type(model).__name__}: expected a list of decoder layers made of nn.Linear, there is none "
            f"among {some([name for name, _ in model.named_modules() if name])}"
        )
    name, layers = max(lists, key=lambda pair: sum(n.startswith(pair[0] + ".") for n in inside))
    if outside := [n for n in inside if not n.startswith(name + ".")]:
        raise ValueError(
            f"{type(model).__name__}: expected every nn.Linear but lm_head in {name}, came {some(outside)}"
        )
    if stacked := [f"{name}.{n}" for n, p in layers.named_parameters() if p.ndim > 2]:
        raise ValueError(
            f"{type(model).__name__}: weights that are not nn.Linear (stacked experts?) are not supported: "
            f"{some(stacked)}"
        )
    return name, layers


def aliases(model: nn.Module) -> dict[str, list[str]]:
    """For each tied parameter, the other names it has."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {name: [n for n in same if n != name] for same in names.values() if len(same) > 1 for name in same}


@torch.no_grad()
def fill_computed_buffers(model: Any, device: torch.device) -> None:
    """Compute the buffers that checkpoints do not hold (rotary frequencies), as from_pretrained does.

    transformers' `_init_weights` sets them. What it leaves alone would be uninitialised memory: it runs on
    two fillings, and a buffer that keeps any of either is refused.
    """
    from transformers import PreTrainedModel

    owner = model
    for name, module in model.named_modules():  # parents before children
        if isinstance(module, PreTrainedModel):
            owner = module
        leaves = [leaf for leaf in module._non_persistent_buffers_set if module._buffers.get(leaf) is not None]
        if not leaves:
            continue
        results: list[list[Tensor]] = []
        for filling in (0, 1):
            for leaf in leaves:
                assign(module, leaf, torch.full_like(module.get_buffer(leaf), filling, device="cpu"))
            owner._init_weights(module)
            results.append([module.get_buffer(leaf) for leaf in leaves])
        for leaf, first, second in zip(leaves, *results, strict=True):
            if not torch.equal(first, second):
                raise ValueError(f"{name}.{leaf}: a buffer that neither the checkpoint nor transformers gives a value")
            assign(module, leaf, first.to(device))


def returns_tuple(name: str, layer: nn.Module, hidden: Tensor, arguments: Arguments) -> bool:
    """Whether the layer returns a tuple that begins with the hidden states, from a run without data.

    Stubs then return (hidden states,): a model that makes use of the rest fails at once.
    """
    args, kwargs = _to_meta(arguments)
    try:
        output = copy.deepcopy(layer).to(META)(hidden.to(META), *args, **kwargs)
    except (NotImplementedError, RuntimeError) as error:
        raise ValueError(f"{name}: cannot follow its forward without data: {error}") from error
    if first(output).shape != hidden.shape:
        raise ValueError(f"{name}: expected to return the shape it got, {list(hidden.shape)}")
    return isinstance(output, tuple)


def first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _to_meta(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to(META)
    if isinstance(value, tuple | list):
        return type(value)(_to_meta(v) for v in value)
    return {k: _to_meta(v) for k, v in value.items()} if isinstance(value, dict) else value


def same(a: Any, b: Any) -> bool:
    """Equality of arguments, tensors by value (floating ones but for rounding)."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        alike = a.shape == b.shape and a.dtype == b.dtype
        return alike and (torch.allclose(a, b) if a.is_floating_point() else torch.equal(a, b))
    if isinstance(a, tuple | list) and isinstance(b, tuple | list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return type(a) is type(b) and bool(a == b)


def assign(root: nn.Module, name: str, value: Tensor) -> None:
    """Set a parameter or buffer of a module tree, whatever device and dtype it had."""
    parent, _, leaf = name.rpartition(".")
    module = root.get_submodule(parent)
    if leaf in module._parameters:
        module._parameters[leaf] = nn.Parameter(value, requires_grad=False)
    else:
        module._buffers[leaf] = value


def some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
