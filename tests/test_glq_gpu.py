"""GLQ checkpoints on GPUs: the operator's results against float32, and models over devices and offloaded."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from test_glq import TAGS, logits
from transformers import AutoModelForCausalLM

from eightfold.glq_folder import GlqFolder
from eightfold.linear import QuantLinear

pytestmark = pytest.mark.gpu


def load(folder, **more):
    return AutoModelForCausalLM.from_pretrained(folder, **{"dtype": torch.float16} | more)


@pytest.mark.parametrize("tag", TAGS)
def test_logits_within_the_rounding_of_float16(shared, tag):
    """As near to float32 as the same model with dense weights in float16, at every number of tokens."""
    folder = shared / "glq-format" / tag
    exact = load(folder, dtype=torch.float32)
    model = load(folder, device_map="cuda")
    quantized = [name for name, module in model.named_modules() if isinstance(module, QuantLinear)]
    config = GlqFolder(folder).quantization
    assert config is not None
    assert quantized == [name for name, _ in model.named_modules() if name in config.layers]
    dense = AutoModelForCausalLM.from_pretrained(shared / "glq-format" / "original_a", dtype=torch.float16)
    weights = load_file(folder / "expected_dense.safetensors")
    for name in quantized:
        dense.get_submodule(name).weight.data.copy_(weights[f"{name}.weight"])
    dense.cuda()
    for tokens in (1, 48, 640, 2048):
        ids = torch.randint(2, 500, (1, tokens), generator=torch.Generator().manual_seed(tokens))
        expected = logits(exact, ids)
        error, rounding = (float((logits(each, ids) - expected).norm() / expected.norm()) for each in (model, dense))
        assert error <= 2 * rounding + 1e-4, f"{tokens} tokens: error {error:.2e}, dense float16 {rounding:.2e}"


@pytest.mark.parametrize("tag", ["a065_3", "a066_4", "a066shell_5"])
def test_offload(shared, tag, tmp_path):
    folder = shared / "glq-format" / tag
    ids = torch.arange(4, 52)[None]
    expected = logits(load(folder, dtype=torch.float32), ids)
    for place in ("cpu", "disk"):
        plan = {"model.embed_tokens": 0, "model.layers.0": place, "model.layers.1": 0}
        plan |= {"model.norm": 0, "model.rotary_emb": 0, "lm_head": 0}
        model = load(folder, device_map=plan, offload_folder=tmp_path / f"offload-{place}")
        torch.testing.assert_close(logits(model, ids), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")
@pytest.mark.parametrize("tag", ["a065_3", "a066_4", "a066shell_5"])
def test_two_gpus(shared, tag):
    folder = shared / "glq-format" / tag
    ids = torch.arange(4, 52)[None]
    expected = logits(load(folder, dtype=torch.float32), ids)
    plan = {"model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": 1}
    plan |= {"model.norm": 1, "model.rotary_emb": 0, "lm_head": 1}
    for device_map in (plan, "balanced", "auto"):
        model = load(folder, device_map=device_map)
        torch.testing.assert_close(logits(model, ids), expected, rtol=2e-2, atol=2e-2)
    model = load(folder, device_map=plan)
    assert {str(p.device) for p in model.parameters()} == {"cuda:0", "cuda:1"}
