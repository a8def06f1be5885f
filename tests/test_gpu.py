"""On an NVIDIA GPU: the same maths through the same code, and the same bytes run after run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import write_model
from small import Silent, files_of, small_request

from eightfold.e8p import codebook
from eightfold.format import LayerSpec
from eightfold.moments import GroupStatistics
from eightfold.pipeline import quantize_model
from eightfold.preflight import make_plan
from eightfold.quantize import Settings, begin_group, dequantize, quantize_group
from eightfold.queued import Later
from eightfold.team import Team

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("name", ["e8p", "e81b", "e8shell", "e8shell256"])
@pytest.mark.parametrize("scale", [0.4, 1.0, 3.0])
def test_encode_is_exact(name: str, scale: float) -> None:
    book = codebook(name)
    x = torch.randn(5000, 8, generator=torch.Generator().manual_seed(1)) * scale
    codes = book.encode(x.cuda())
    assert codes.is_cuda
    assert codes.dtype == book.dtype
    points = book.points().cuda().double()
    nearest = torch.cat([torch.cdist(part, points).amin(1) for part in x.cuda().double().split(500)])
    found = (x.cuda().double() - book.decode(codes).double()).norm(dim=1)
    assert torch.allclose(found, nearest, rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", ["e8p", "e8shell"])
def test_quantizing_gives_the_losses_of_the_cpu(family: str) -> None:
    random = torch.Generator().manual_seed(0)
    x = torch.randn(2000, 200, generator=random) * torch.rand(200, generator=random)
    W = torch.randn(360, 200, generator=random) * 0.02
    spec = LayerSpec(360, 200, 3, (256, 64, 32, 16), (256,))
    losses = {}
    for device in ("cpu", "cuda"):
        statistics = GroupStatistics((x.T @ x / len(x)).to(device))
        found = quantize_group({"a": W.to(device)}, {}, {"a": spec}, statistics, Settings(codebook=family))["a"]
        assert dequantize(found.packed).device.type == device
        losses[device] = found.proxy_loss
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=0.02)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")  # of that mode itself
def test_a_group_is_queued_without_waiting() -> None:
    x = torch.randn(2000, 200, device="cuda")
    hessian, drift = x.T @ x / len(x), torch.randn(200, 200, device="cuda") / 100
    weights = {name: torch.randn(rows, 200, device="cuda") * 0.02 for name, rows in (("a", 360), ("b", 100))}
    specs = {"a": LayerSpec(360, 200, 3, (256, 64, 32, 16), (256,)), "b": LayerSpec(100, 200, 3, (64, 32, 16), (256,))}
    sensitivity = {name: torch.rand(len(W)) for name, W in weights.items()}
    statistics = GroupStatistics(hessian, drift, None, sensitivity)
    quantize_group(weights, {}, specs, statistics, Settings())  # compiles, makes tables
    later = Later(torch.device("cuda"))
    torch.cuda.set_sync_debug_mode("error")
    try:
        begun = begin_group(weights, {}, specs, statistics, Settings(), later, Team())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert begun.quantized == {}
    later.settle()
    for name, W in weights.items():
        assert begun.quantized[name].sqnr_db > 10
        assert torch.equal(begun.dense[name], dequantize(begun.packed[name]))
        assert torch.equal(begun.dense[name].isfinite(), torch.ones_like(W, dtype=torch.bool))


def test_the_same_command_gives_the_same_bytes(tmp_path: Path) -> None:
    model = write_model("llama", tmp_path / "model")
    for out in ("one", "two"):
        request = small_request(model, tmp_path / out, device="cuda", dtype="float32")
        assert quantize_model(make_plan(request), Silent()).verdict.passed
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")


def test_it_runs_on_the_gpu_as_on_the_cpu(tmp_path: Path) -> None:
    import transformers

    model = write_model("qwen2", tmp_path / "model")
    quantize_model(make_plan(small_request(model, tmp_path / "out", device="cuda", dtype="float32")), Silent())
    tokens = torch.arange(3, 35)[None]

    def logits(device: str) -> Any:
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
        return loaded.to(device)(tokens.to(device)).logits.cpu()

    assert torch.allclose(logits("cuda"), logits("cpu"), rtol=1e-3, atol=1e-3)
