"""Models known by their shape alone, as configurations: quantized without weights, for servers that make those up.

`load_format="dummy"` of a server fills what a configuration asks for with random numbers; codes become random bits.
Such a model measures speed and memory and says nothing; its provenance calls it random.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import nn

from eightfold.files import to_json, write_text
from eightfold.format import LayerSpec, QuantConfig
from eightfold.quantize import recipe
from eightfold.rotation import IN_FLOOR, layout_blocks
from eightfold.skeleton import skeleton
from eightfold.tensor_parallel import largest_tp, linear_blocks

LAYOUT = "pow2-sum-256"
_LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16", "rms_norm_eps": 1e-5}
_SMOL = {"model_type": "smollm3", "architectures": ["SmolLM3ForCausalLM"], "dtype": "bfloat16"}


def _size(hidden: int, inner: int, layers: int, heads: tuple[int, int], words: int, tied: bool) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "head_dim": 128,
        "vocab_size": words,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 32768,
    }


# Name → config.json. "31B" has the dimensions of today's models of that size in Llama's architecture.
SHAPES: dict[str, dict[str, Any]] = {
    "SmolLM3-3B": _SMOL | _size(2048, 11008, 36, (16, 4), 128256, True),
    "Llama-3.1-8B": _LLAMA | _size(4096, 14336, 32, (32, 8), 128256, False),
    "31B": _LLAMA | _size(5376, 21504, 60, (32, 16), 262144, True),
}


@dataclass(frozen=True, slots=True)
class Rate:
    """Nominal bits of the decoder's linears; of the output head, None to leave it as it is. As text: "3", "2+4"."""

    bits: int
    head: int | None = None

    def __str__(self) -> str:
        return f"{self.bits}" if self.head is None else f"{self.bits}+{self.head}"


def random_config(shape: Mapping[str, Any], rate: Rate) -> dict[str, Any]:
    """config.json of a model of this shape, quantized, without weights. Raises ValueError for a head that is tied."""
    from transformers import AutoConfig

    content = dict(shape)
    if rate.head is not None:
        content["tie_word_embeddings"] = False
    config = AutoConfig.for_model(**content)
    model = skeleton(config, torch.bfloat16)
    head = model.get_output_embeddings()
    sizes = {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }
    tp_max = largest_tp(config, sizes, LAYOUT)
    layers = {}
    for name, size in sizes.items():
        layers[name] = LayerSpec(*size, rate.bits, *linear_blocks(config, name, size, LAYOUT, tp_max))
    if rate.head is not None:
        words, hidden = head.out_features, head.in_features
        layers["lm_head"] = LayerSpec(words, hidden, rate.head, (1,) * words, layout_blocks(hidden, LAYOUT, IN_FLOOR))
    recipes = {bits: recipe(bits) for bits in {spec.bits for spec in layers.values()}}
    quant = QuantConfig(layers, recipes, tp_max, provenance={"random": "no weights: for measuring speed alone"})
    return content | {"quantization_config": quant.to_dict()}


def plain_config(content: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of the same architecture without quantization, to be run in bfloat16."""
    left = {key: value for key, value in content.items() if key not in ("quantization_config", "auto_map")}
    return json.loads(json.dumps(left)) | {"dtype": "bfloat16"}


def write_config(content: Mapping[str, Any], folder: Path) -> Path:
    """A model folder that holds the configuration alone."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "config.json", to_json(dict(content)))
    return folder


def weight_bytes(content: Mapping[str, Any]) -> int:
    """Bytes of all weights of the model of a config.json: parameters in its dtype, quantized layers as their files
    have them."""
    from transformers import AutoConfig

    section = content.get("quantization_config")
    plain = {key: value for key, value in content.items() if key not in ("quantization_config", "auto_map")}
    config = AutoConfig.for_model(**plain)
    own = config.dtype
    model = skeleton(config, own if isinstance(own, torch.dtype) else torch.float32)
    quant = None if section is None else QuantConfig.from_dict(section)
    names = set() if quant is None else set(quant.layers)
    total = sum(
        parameter.nbytes for name, parameter in model.named_parameters() if name.rpartition(".")[0] not in names
    )
    for name in names:
        assert quant is not None
        shapes = quant.tensors(name).values()
        total += sum(dtype.itemsize * prod(shape) for dtype, shape in shapes)
    return total
