"""The gate: what passes, what fails and why."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import write_model
from packing import write_checkpoint
from safetensors.torch import load_file, save_file
from small import Silent, small_request

from eightfold import gate
from eightfold.gate import MAX_RATIO, generate, judge
from eightfold.preflight import Plan, make_plan
from eightfold.rates import with_rates
from eightfold.team import Team

CPU = torch.device("cpu")


@pytest.fixture
def plan(model_folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plan:
    monkeypatch.setattr("eightfold.preflight._rates", lambda device, bits: (1e9, 1e6))
    return make_plan(small_request(model_folder("llama-tied"), tmp_path / "out"))


@pytest.fixture
def made(model_folder, tmp_path: Path) -> Path:
    """A checkpoint of random codes."""
    return write_checkpoint(model_folder("llama-tied"), tmp_path / "made")


def limited(plan: Plan, **request: Any) -> Plan:
    return replace(plan, request=replace(plan.request, **request))


def change(folder: Path, name: str, value: torch.Tensor | float) -> None:
    """Fill tensor `name` in the files of `folder` with `value`."""
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    tensors[name] = torch.zeros_like(tensors[name]) + value
    save_file(tensors, file, metadata={"format": "pt"})


def test_a_model_that_is_good_enough_passes(plan: Plan, made: Path) -> None:
    told = Silent()
    verdict = judge(limited(plan, max_ratio=1e9), made, told.phase, told.advance, Team())
    assert verdict.passed
    assert verdict.reasons == []
    assert verdict.evaluation is not None
    assert verdict.evaluation.windows == 2
    assert verdict.evaluation.kl is not None
    assert verdict.evaluation.kl > 0.1
    assert [name for name, _ in told.phases] == ["evaluating", "generating"]
    assert told.steps == dict(told.phases)
    prompts = [prompt for prompt, _ in verdict.samples]
    assert len(prompts) == 2  # as many as there are windows
    assert all(text for _, text in verdict.samples)
    told_json = verdict.to_dict()
    assert told_json["passed"] is True
    assert told_json["samples"][0] == {"prompt": prompts[0], "continuation": verdict.samples[0][1]}
    assert told_json["evaluation"]["kl"] == verdict.evaluation.kl


def test_perplexity_over_the_limit_fails(plan: Plan, made: Path) -> None:
    verdict = judge(limited(plan, max_ratio=0.001), made, *_silent(), Team())
    assert verdict.evaluation is not None
    assert verdict.evaluation.ratio is not None
    assert verdict.reasons == [
        f"perplexity is {verdict.evaluation.ratio:.3f} times the original's, more than 0.001 times"
    ]
    assert not verdict.passed
    assert verdict.to_dict()["passed"] is False


@pytest.mark.parametrize(("bits", "limit"), [(2, 4.0), (3, 2.0), (4, 1.5), (8, 1.5)])
def test_the_limit_depends_on_the_rate(bits: int, limit: float, plan: Plan, made: Path, monkeypatch) -> None:
    result = judge(plan, made, *_silent(), Team()).evaluation
    assert result is not None
    assert MAX_RATIO.get(bits, MAX_RATIO[4]) == limit
    monkeypatch.setattr(gate, "generate", lambda *_: ([], 10))
    for ratio, passed in ((limit, True), (limit * 1.001, False), (float("nan"), False)):
        monkeypatch.setattr(gate, "evaluate", lambda *_, ratio=ratio: replace(result, ratio=ratio))
        rated = replace(plan, config=with_rates(plan.config, dict.fromkeys(plan.config.layers, bits)))
        assert judge(limited(rated, max_ratio=None), made, *_silent(), Team()).passed is passed


def test_logits_that_are_not_finite_fail(plan: Plan, made: Path) -> None:
    change(made, "model.norm.weight", float("nan"))
    verdict = judge(plan, made, *_silent(), Team())
    assert not verdict.passed
    assert verdict.evaluation is None
    assert "evaluation window 0: the logits are not finite" in verdict.reasons[0]
    assert verdict.to_dict()["evaluation"] is None


def test_a_model_that_repeats_one_token_fails(plan: Plan, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "generate", lambda *_: ([], 3))
    verdict = judge(plan, made, *_silent(), Team())
    assert verdict.reasons == ["it generates the same token over and over (3 different ones in 32)"]


def test_generation(model_folder, tmp_path: Path) -> None:
    prompts = torch.randint(0, 4096, (3, 10), generator=torch.Generator().manual_seed(0))
    before = torch.random.get_rng_state()
    samples, distinct = generate(model_folder("llama-tied"), prompts, CPU, torch.float32, 12)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert len(samples) == 3
    assert 4 <= distinct <= 12
    assert generate(model_folder("llama-tied"), prompts, CPU, torch.float32, 12) == (samples, distinct)

    # A model whose hidden states are the same whatever it reads, and whose head answers these with token 7.
    stuck = write_model("llama", tmp_path / "stuck")
    state = load_file(stuck / "model.safetensors")
    change(stuck, "model.embed_tokens.weight", state["model.embed_tokens.weight"][5])
    for name in state:
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            change(stuck, name, 0.0)
    head = torch.zeros_like(state["lm_head.weight"])
    head[7] = 100 * state["model.embed_tokens.weight"][5] * state["model.norm.weight"]
    change(stuck, "lm_head.weight", head)
    samples, distinct = generate(stuck, prompts, CPU, torch.float32, 12)
    assert distinct == 1


def _silent() -> tuple[Any, Any]:
    told = Silent()
    return told.phase, told.advance
