"""Squared output gradients, against autograd through the whole model at once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from eightfold import sensitivity
from eightfold.folder import ModelFolder
from eightfold.model import Decoder
from eightfold.sensitivity import output_sensitivity
from eightfold.team import Team

WINDOWS = torch.randint(0, 4096, (3, 40), generator=torch.Generator().manual_seed(0))


def run(folder: Path, windows: Tensor = WINDOWS, seed: int = 7, advance: Callable[[int], None] = lambda _: None):
    decoder = Decoder(ModelFolder(folder), torch.device("cpu"), torch.float32)
    return output_sensitivity(decoder, windows, seed, advance, Team())


def by_autograd(folder: Path, seed: int) -> dict[str, Tensor]:
    """The same with the whole model in memory; labels are drawn as `sensitivity` does it, 16 positions at a time."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: object, output: Tensor) -> None:
            output.retain_grad()
            outputs[name] = output

        return hook

    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}
    for name, linear in linears.items():
        linear.register_forward_hook(keep(name))
    total = {name: torch.zeros(linear.out_features) for name, linear in linears.items()}
    for s, window in enumerate(WINDOWS):
        logits = model(window[None]).logits[0]
        random = torch.Generator().manual_seed(seed + s)
        labels = [
            torch.multinomial(part.softmax(-1), 1, generator=random)[:, 0] for part in logits.detach().float().split(16)
        ]
        nn.functional.cross_entropy(logits.float(), torch.cat(labels), reduction="sum").backward()
        for name, output in outputs.items():
            assert output.grad is not None
            total[name] += output.grad[0].square().sum(0)
    return {name: squares / WINDOWS.numel() for name, squares in total.items()}


@pytest.mark.parametrize("kind", ["llama-tied", "qwen2", "gemma3", "phi3"])
def test_equals_autograd_on_the_whole_model(kind: str, model_folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sensitivity, "POSITIONS", 16)
    steps = []
    found = run(model_folder(kind), advance=steps.append)
    expected = by_autograd(model_folder(kind), 7)
    assert found.keys() == expected.keys()
    for name, squares in expected.items():
        assert found[name].dtype == torch.float32
        assert found[name].shape == squares.shape
        assert torch.allclose(found[name], squares, rtol=2e-3, atol=1e-5 * float(squares.max())), name
    layers = len({name.split(".layers.")[1].split(".")[0] for name in expected})
    assert sum(steps) == 2 * layers + 1


def test_the_number_of_threads_does_not_matter(model_folder) -> None:
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(run(model_folder("llama")))
    finally:
        torch.set_num_threads(before)
    for name, squares in found[0].items():
        assert torch.equal(squares, found[1][name]), name


def test_few_logits_are_held_at_once(model_folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sensitivity, "POSITIONS", 16)
    epilogue, lengths = Decoder.epilogue, set()
    monkeypatch.setattr(Decoder, "epilogue", lambda self, x: lengths.add(x.shape[1]) or epilogue(self, x))
    run(model_folder("llama-tied"), WINDOWS[:1])
    assert lengths == {16, 8}


def test_the_seed_draws_the_labels(model_folder) -> None:
    folder = model_folder("llama-tied")
    one, other = run(folder, WINDOWS[:1], 7), run(folder, WINDOWS[:1], 8)
    assert all(not torch.equal(one[name], other[name]) for name in one)
    assert all(bool((squares > 0).all()) for squares in one.values())


def test_what_lies_around_the_layers_is_not_kept(model_folder, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = Decoder(ModelFolder(model_folder("llama-tied")), torch.device("cpu"), torch.float32)
    kept: list[bool] = []

    call = decoder.call

    def watching(i: int, layer: nn.Module, hidden: Tensor) -> Tensor:
        kept.append(any(parameter.device.type != "meta" for parameter in decoder._model.parameters()))
        return call(i, layer, hidden)

    monkeypatch.setattr(decoder, "call", watching)
    output_sensitivity(decoder, WINDOWS, 7, lambda _: None, Team())
    assert kept
    assert not any(kept)
