"""The sizes of a quantization, from a model's config alone: for what it would take on machines that are not here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from eightfold.cost import Cost, Group, Machine, Work, estimate
from eightfold.model import LinearInfo
from eightfold.prepare import Settings
from eightfold.skeleton import layer_list, skeleton
from eightfold.tensor_parallel import cut_side

EVAL_SEQLEN = 1024

# Rates as benchmarks/quantize.py and benchmarks/kernels.py found them on an H200. The rates of a card of 24 GB are its
# data sheet's (RTX 4090), taken at the share that the H200 reaches of its own: not measured.
H200 = Machine(1, 141 * 10**9, 6.2e14, 5.0e13, 2.8e9)
SMALL = Machine(1, 24 * 10**9, 1.1e14, 5.0e13, 1.8e9)
MACHINES = {
    "one GPU of 24 GB": SMALL,
    "one H200 of 141 GB": H200,
    "eight H200s": Machine(8, H200.memory, H200.flops16, H200.flops32, H200.vectors),
}


class Tokens(NamedTuple):
    """What calibration and the gate read; the evaluation's windows have EVAL_SEQLEN tokens at most."""

    samples: int = 128
    seqlen: int = 2048
    sensed: int = 16
    eval_windows: int = 32


def work_of(
    config: Any,
    chosen: dict[str, LinearInfo],
    parameters: int,
    tokens: Tokens,
    item: int,
    bits: float,
    settings: Settings,
) -> Work:
    """The sizes for the linears `chosen` of a model of so many parameters; `item`: bytes of an activation."""
    text = config.get_text_config()
    layers: dict[int | None, list[Group]] = {}
    for (layer, *_), members in likely_groups(config, chosen).items():
        outputs = tuple(info.out_features for _, info in members)
        adds = layer is not None and len(outputs) == 1 and outputs[0] == text.hidden_size
        layers.setdefault(layer, []).append(Group(members[0][1].in_features, outputs, adds))
    head = layers.pop(None, [None])[0]
    largest = max(layers.values(), key=lambda groups: sum(group.weights for group in groups), default=[])
    inside = sum(group.weights for groups in layers.values() for group in groups)
    return Work(
        tuple(largest), head, text.num_hidden_layers, text.hidden_size, text.num_attention_heads, text.vocab_size,
        parameters, parameters - inside, tokens.samples, tokens.seqlen, min(tokens.sensed, tokens.samples), item, bits,
        tokens.eval_windows * min(EVAL_SEQLEN, tokens.seqlen), settings,
    )  # fmt: skip


def likely_groups(config: Any, chosen: dict[str, LinearInfo]) -> dict[tuple[Any, ...], list[tuple[str, LinearInfo]]]:
    """Which linears will probably share an input: same parent, inputs and cut side."""
    groups: dict[tuple[Any, ...], list[tuple[str, LinearInfo]]] = {}
    for name, info in chosen.items():
        key = (info.layer_index, name.rpartition(".")[0], info.in_features, cut_side(config, name))
        groups.setdefault(key, []).append((name, info))
    return groups


def costs(folder: str | Path, bits: float, tokens: Tokens) -> dict[str, Cost]:
    """What quantizing the model whose config.json lies in `folder` would take on each of MACHINES, in bfloat16.

    Raises OSError or ValueError for a folder without a config that transformers knows.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    model = skeleton(config, torch.bfloat16)
    chosen = dict(_linears(model))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    work = work_of(config, chosen, parameters, tokens, 2, bits, Settings())
    return {name: estimate(work, machine) for name, machine in MACHINES.items()}


def _linears(model: Any) -> Iterator[tuple[str, LinearInfo]]:
    name, layers = layer_list(model)
    for i, layer in enumerate(layers):
        for own, module in layer.named_modules():
            if isinstance(module, nn.Linear):
                info = LinearInfo(module.out_features, module.in_features, module.bias is not None, i)
                yield f"{name}.{i}.{own}", info
