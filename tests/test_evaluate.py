from __future__ import annotations

import json
import math
import os
import subprocess
import sys

import pytest
import torch
from models import write_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from eightfold import bundled, evaluate
from eightfold.folder import ModelFolder
from eightfold.model import Decoder

WINDOWS = torch.randint(4096, (5, 40), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A model and one that is like it."""
    root = tmp_path_factory.mktemp("models")
    one = write_model("llama", root / "one")
    two = write_model("llama", root / "two")
    tensors = load_file(two / "model.safetensors")
    for name in tensors:
        if name.endswith("down_proj.weight"):
            tensors[name] *= 1.5
    save_file(tensors, two / "model.safetensors", metadata={"format": "pt"})
    return ModelFolder(one), ModelFolder(two)


@torch.no_grad()
def log_probabilities(folder: ModelFolder) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder.path, dtype=torch.float32).eval()
    return model(WINDOWS).logits[:, :-1].double().log_softmax(-1)


def test_against_the_whole_models(models):
    result = evaluate.evaluate(models[0], WINDOWS, against=models[1])
    p, q = (log_probabilities(folder) for folder in models)
    nll_p, nll_q = (-x.gather(2, WINDOWS[:, 1:, None])[..., 0].mean(1) for x in (p, q))
    kl = (q.exp() * (q - p)).sum(-1).mean(1)
    top1 = (p.argmax(-1) == q.argmax(-1)).double().mean(1)
    ratio = math.exp(nll_p.mean() - nll_q.mean())
    assert (result.windows, result.tokens) == (5, 5 * 39)
    expected = {
        "nll": nll_p.mean(), "nll_se": nll_p.std() / 5**0.5,
        "perplexity": nll_p.mean().exp(), "perplexity_se": nll_p.mean().exp() * nll_p.std() / 5**0.5,
        "against_perplexity": nll_q.mean().exp(),
        "ratio": ratio, "ratio_se": ratio * (nll_p - nll_q).std() / 5**0.5,
        "kl": kl.mean(), "kl_se": kl.std() / 5**0.5, "top1": top1.mean(), "top1_se": top1.std() / 5**0.5,
    }  # fmt: skip
    assert result.kl > 0.001
    assert 0 < result.top1 < 1
    for name, value in expected.items():
        assert getattr(result, name) == pytest.approx(float(value), rel=1e-4), name
    assert json.loads(json.dumps(result.to_dict())) == result.to_dict()


def test_alone(models):
    alone, both = evaluate.evaluate(models[0], WINDOWS), evaluate.evaluate(models[0], WINDOWS, models[1])
    assert alone.perplexity == both.perplexity
    assert alone.kl is alone.ratio is alone.top1 is None


def test_against_itself(models):
    result = evaluate.evaluate(models[0], WINDOWS, against=ModelFolder(models[0].path))
    assert (result.kl, result.top1, result.ratio) == (0, 1, 1)


def test_one_window_has_no_standard_error(models):
    result = evaluate.evaluate(models[0], WINDOWS[:1], against=models[1])
    assert result.nll_se is result.perplexity_se is result.kl_se is None
    assert result.kl is not None


def test_memory_limits_do_not_change_the_result(models, monkeypatch):
    whole = evaluate.evaluate(models[0], WINDOWS, against=models[1])
    monkeypatch.setattr(evaluate, "HIDDEN_BYTES", 2 * 2 * 40 * 200 * 4)
    assert evaluate.evaluate(models[0], WINDOWS, against=models[1]) == whole
    monkeypatch.setattr(evaluate, "LOGITS_BYTES", 7 * 4096 * 4)
    chunked = evaluate.evaluate(models[0], WINDOWS, against=models[1]).to_dict()
    assert chunked == pytest.approx(whole.to_dict(), rel=1e-5)


def test_progress_ends_at_its_total(models):
    seen: list[tuple[int, int]] = []
    evaluate.evaluate(models[0], WINDOWS, models[1], progress=lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (5 * 2 * 4, 5 * 2 * 4)


def test_known_hidden_states_save_a_walk_and_change_nothing(models, monkeypatch):
    seen: list[tuple[int, int]] = []
    whole = evaluate.evaluate(models[0], WINDOWS, models[1])
    known = evaluate.final_hidden(Decoder(models[1], torch.device("cpu"), torch.float32), WINDOWS)
    walked, load_layer = [], Decoder.load_layer
    monkeypatch.setattr(Decoder, "load_layer", lambda *args: walked.append(args[0].folder) or load_layer(*args))
    told = lambda done, total: seen.append((done, total))  # noqa: E731
    assert evaluate.evaluate(models[0], WINDOWS, models[1], progress=told, known=known) == whole
    assert set(walked) == {models[0]}
    assert seen[-1] == (5 * (3 + 2), 5 * (3 + 2))


def test_hidden_states_of_several_passes_are_not_given(models, monkeypatch):
    monkeypatch.setattr(evaluate, "HIDDEN_BYTES", 2 * 5 * 40 * 200 * 4 - 1)
    assert evaluate.final_hidden(Decoder(models[1], torch.device("cpu"), torch.float32), WINDOWS) == []


def test_bad_windows(models):
    for bad in (WINDOWS[0], WINDOWS.int(), WINDOWS[:, :1]):
        with pytest.raises(ValueError, match="windows"):
            evaluate.evaluate(models[0], bad)


def test_other_vocabulary(models, tmp_path):
    config = LlamaConfig(vocab_size=5000, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                         num_attention_heads=2)  # fmt: skip
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="4096 and 5000"):
        evaluate.evaluate(models[0], WINDOWS, against=ModelFolder(tmp_path))


def test_broken_model_is_named(tmp_path):
    path = write_model("llama-tied", tmp_path / "model")
    tensors = load_file(path / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(ValueError, match="window 0: the logits are not finite"):
        evaluate.evaluate(ModelFolder(path), WINDOWS)


def test_thread_count_does_not_matter(models):
    code = (
        "import sys, torch\n"
        "from eightfold.evaluate import evaluate\n"
        "from eightfold.folder import ModelFolder\n"
        "windows = torch.randint(4096, (3, 100), generator=torch.Generator().manual_seed(1))\n"
        "print(evaluate(*[ModelFolder(sys.argv[1]), windows, ModelFolder(sys.argv[2])]))\n"
    )
    came = [
        subprocess.run([sys.executable, "-c", code, *(str(m.path) for m in models)], capture_output=True,
                       env=os.environ | {"OMP_NUM_THREADS": threads}, check=True, timeout=120).stdout.decode()
        for threads in ("1", "2")
    ]  # fmt: skip
    assert "EvalResult" in came[0]
    assert came[0] == came[1]


def test_the_bundled_model_has_learned(models):
    from transformers import AutoTokenizer

    from eightfold.calibration import windows

    text = windows(None, AutoTokenizer.from_pretrained(bundled.tiny_lm()), 256, limit=4)
    assert evaluate.evaluate(ModelFolder(bundled.tiny_lm()), text).perplexity < 100
