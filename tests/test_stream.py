"""Taps on linears: inputs, and the residual stream that an output is added to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from eightfold.folder import ModelFolder
from eightfold.model import Decoder
from eightfold.parallel import ordered_map
from eightfold.stream import Tap, find_receiver

RECEIVERS = {"o_proj": "post_attention_layernorm", "down_proj": ""}
TOKENS = torch.arange(2, 34)


def decoder_of(folder: Path, dtype: torch.dtype = torch.float32) -> Decoder:
    return Decoder(ModelFolder(folder), torch.device("cpu"), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_receivers_of_every_model(any_model: Path, dtype: torch.dtype) -> None:
    decoder = decoder_of(any_model, dtype)
    hidden, layer = decoder.prologue(TOKENS), decoder.load_layer(1)
    found = {
        group[0].rpartition(".")[2]: find_receiver(decoder, 1, layer, hidden, group[0])
        for group in decoder.groups(1, layer, hidden)
    }
    # Gemma puts a norm between the output and the sum, so nothing moves with the output one to one.
    residual = {} if decoder.folder.config.model_type.startswith("gemma3") else RECEIVERS
    assert found == {name: residual.get(name) for name in found}


@pytest.mark.parametrize("name", ["self_attn.o_proj", "mlp.down_proj", "self_attn.q_proj"])
def test_a_tap_reads_input_and_stream(model_folder: Any, name: str) -> None:
    decoder = decoder_of(model_folder("llama"))
    hidden, layer = decoder.prologue(TOKENS), decoder.load_layer(0)
    seen: dict[str, Tensor] = {}
    linear = layer.get_submodule(name)
    linear.register_forward_pre_hook(lambda _, args: seen.__setitem__("x", args[0]))
    norm = layer.get_submodule("post_attention_layernorm")
    norm.register_forward_pre_hook(lambda _, args: seen.__setitem__("middle", args[0]))
    decoder.call(0, layer, hidden)
    full = f"model.layers.0.{name}"
    tap = Tap(decoder, 0, full, find_receiver(decoder, 0, layer, hidden, full))
    handles = tap.attach(layer)
    x, stream = tap(layer, hidden)
    for handle in handles:
        handle.remove()
    assert torch.equal(x, seen["x"])
    expected = {"self_attn.o_proj": hidden, "mlp.down_proj": seen["middle"], "self_attn.q_proj": None}[name]
    assert (stream is None) == (expected is None)
    if stream is not None and expected is not None:
        assert torch.allclose(stream, expected, atol=1e-5)


def test_taps_in_several_threads(model_folder: Any) -> None:
    decoder = decoder_of(model_folder("llama"))
    random = torch.Generator().manual_seed(0)
    many = [decoder.prologue(torch.randint(2, 90, (32,), generator=random)) for _ in range(8)]
    layer = decoder.load_layer(0)
    tap = Tap(decoder, 0, "model.layers.0.self_attn.o_proj", "post_attention_layernorm")
    tap.attach(layer)

    def run(hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        return tap(layer, hidden)

    for (x, r), (x2, r2) in zip(ordered_map(run, many, 1), ordered_map(run, many, 4), strict=True):
        assert r is not None and r2 is not None
        assert torch.equal(x, x2) and torch.equal(r, r2)


def test_a_forward_that_goes_another_way_is_an_error(model_folder: Any) -> None:
    decoder = decoder_of(model_folder("llama"))
    hidden, layer = decoder.prologue(TOKENS), decoder.load_layer(0)
    tap = Tap(decoder, 0, "model.layers.0.mlp.down_proj", "")
    handles = tap.attach(layer)
    layer.get_submodule("mlp").down_proj = nn.Linear(344, 200, bias=False)
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.down_proj: its forward took another way"):
        tap(layer, hidden)
    assert handles
