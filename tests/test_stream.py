"""Where the output of a linear meets the residual stream."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from eightfold.folder import ModelFolder
from eightfold.model import Decoder
from eightfold.stream import Tap, find_receiver

TOKENS = torch.randint(0, 4096, (24,), generator=torch.Generator().manual_seed(0))


def decoder_of(folder: Path) -> tuple[Decoder, Tensor]:
    decoder = Decoder(ModelFolder(folder), torch.device("cpu"), torch.float32)
    return decoder, decoder.prologue(TOKENS)


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "o_proj", "down_proj"),
    [
        ("llama", "post_attention_layernorm", ""),
        ("qwen2", "post_attention_layernorm", ""),
        ("qwen3", "post_attention_layernorm", ""),
        ("phi3", "post_attention_layernorm", ""),
        ("gemma3", None, None),  # norms between the linear and the stream
    ],
)
def test_receivers(kind: str, o_proj: str | None, down_proj: str | None, model_folder) -> None:
    decoder, hidden = decoder_of(model_folder(kind))
    layer = decoder.load_layer(0)
    prefix = decoder.layer_names[0]
    assert find_receiver(decoder, 0, layer, hidden, f"{prefix}.self_attn.o_proj") == o_proj
    assert find_receiver(decoder, 0, layer, hidden, f"{prefix}.mlp.down_proj") == down_proj
    for name in decoder.linear_shapes():
        if name.startswith(f"{prefix}.") and not name.endswith(("o_proj", "down_proj")):
            assert find_receiver(decoder, 0, layer, hidden, name) is None, name


@torch.no_grad()
def test_a_tap_reads_the_input_and_the_stream(model_folder) -> None:
    decoder, hidden = decoder_of(model_folder("llama"))
    layer, prefix = decoder.load_layer(1), decoder.layer_names[1]
    inputs: dict[str, Tensor] = {}
    for name in ("self_attn.o_proj", "mlp.down_proj", "mlp.up_proj"):
        see = lambda _, args, name=name: inputs.__setitem__(name, args[0])  # noqa: E731
        layer.get_submodule(name).register_forward_pre_hook(see)
    out = decoder.call(1, layer, hidden)
    for name, receiver in (
        ("self_attn.o_proj", "post_attention_layernorm"),
        ("mlp.down_proj", ""),
        ("mlp.up_proj", None),
    ):
        tap = Tap(decoder, 1, f"{prefix}.{name}", receiver)
        handles = tap.attach(layer)
        x, stream = tap(layer, hidden)
        for handle in handles:
            handle.remove()
        assert torch.equal(x, inputs[name])
        if receiver is None:
            assert stream is None
        else:
            assert stream is not None
            after = out if receiver == "" else hidden + layer.get_submodule(name)(x)
            assert torch.allclose(stream + layer.get_submodule(name)(x), after, rtol=0, atol=1e-5)
            assert (torch.allclose(stream, hidden, rtol=0, atol=1e-5)) == (name == "self_attn.o_proj")
    assert torch.equal(decoder.call(1, layer, hidden), out)  # no hook is left
