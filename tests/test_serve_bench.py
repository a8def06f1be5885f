"""Measuring a server: what is compared, what a trace says, shapes without weights. Nothing here needs vLLM."""

from __future__ import annotations

import gzip
import json

import pytest
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from eightfold import cli
from eightfold.format import QuantConfig
from eightfold.serve_bench import Load, Speed, Steps, _events, models
from eightfold.serve_report import Comparison, cells, columns, notes, told, write_comparison
from eightfold.shapes import SHAPES, Rate, plain_config, random_config, weight_bytes


def launch(number: int, at: float) -> dict:
    return {"cat": "cuda_runtime", "name": "cudaGraphLaunch", "ts": at, "dur": 3, "args": {"correlation": number}}


def kernel(number: int, at: float, dur: float, cat: str = "kernel") -> dict:
    return {"cat": cat, "name": "k", "ts": at, "dur": dur, "args": {"correlation": number}}


def steps(count: int) -> list[dict]:
    """Decode steps 100 us apart: a graph of 6 kernels of 10 us, the last two overlapping by half, and a sampler."""
    events = []
    for step in range(count):
        at = 1000 + 100 * step
        events += [launch(step, at - 5), *(kernel(step, at + 10 * i, 10) for i in range(5)), kernel(step, at + 45, 10)]
        events += [kernel(1000 + step, at + 70, 4), kernel(2000 + step, at + 80, 1, "gpu_memcpy")]
    return events


def test_gpu_time_of_a_step():
    found = Steps(steps(5))
    assert found.busy == pytest.approx(60e-6)  # 55 of the graph, 4 and 1 after it
    assert dict(found.kernels(1)) == pytest.approx({"k": 65e-6})  # overlaps counted twice


def test_graphs_of_pieces_are_no_steps():
    prompt = [e for i in range(8) for e in (launch(500 + i, 10.0 * i), kernel(500 + i, 10.0 * i + 1, 5))]
    assert Steps([*prompt, *steps(4)]).busy == pytest.approx(60e-6)


def test_steps_that_are_no_graphs():
    eager = [event for event in steps(5) if event["cat"] != "cuda_runtime"]
    with pytest.raises(ValueError, match="expected decode steps that run as CUDA graphs, the trace has 0"):
        Steps(eager)


def test_the_trace_is_the_new_one(tmp_path):
    """vLLM goes on with the first profile's name."""
    for name in ("1.pt.trace.json.gz", "2.pt.trace.json.gz"):
        with gzip.open(tmp_path / name, "wt", encoding="utf-8") as file:
            json.dump({"traceEvents": [{"name": name}]}, file)
    (tmp_path / "profiler_out_0.txt").touch()
    new = {tmp_path / "2.pt.trace.json.gz", tmp_path / "profiler_out_0.txt"}
    assert _events(new) == [{"name": "2.pt.trace.json.gz"}]
    with pytest.raises(ValueError, match="expected a trace of vLLM's profiler"):
        _events(set())


def test_shapes():
    """The sizes that the shapes are known for, and what quantizing leaves of them."""
    parameters = {"SmolLM3-3B": 3.08e9, "Llama-3.1-8B": 8.03e9, "31B": 26.2e9}
    for name, expected in parameters.items():
        assert weight_bytes(plain_config(SHAPES[name])) == pytest.approx(2 * expected, rel=0.01)
    quantized = random_config(SHAPES["31B"], Rate(3))
    assert weight_bytes(quantized) <= 12.2e9
    config = QuantConfig.from_dict(quantized["quantization_config"])
    assert (len(config.layers), config.tp_max) == (60 * 7, 8)
    assert "random" in config.provenance


def test_a_head_of_its_own_rate():
    made = random_config(SHAPES["SmolLM3-3B"], Rate(2, 4))
    config = QuantConfig.from_dict(made["quantization_config"])
    assert made["tie_word_embeddings"] is False
    assert config.layers["lm_head"].bits == 4
    assert {spec.bits for name, spec in config.layers.items() if name != "lm_head"} == {2}
    assert str(Rate(2, 4)) == "2+4"


def test_weight_bytes_of_a_checkpoint(model_folder, tmp_path):
    from packing import write_checkpoint

    folder = write_checkpoint(model_folder("llama-tied"), tmp_path / "q", head=True)
    content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        stored = sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118
    assert weight_bytes(content) == stored


def test_what_is_compared(model_folder, tmp_path):
    source = str(model_folder("llama"))
    names = [(m.name, m.random) for m in models("Llama-3.1-8B", [Rate(4), Rate(2, 4)], [source], True, tmp_path)]
    random = [f"Llama-3.1-8B, {kind}" for kind in ("bfloat16", "4 bits", "2+4 bits")]
    assert names == [*((name, True) for name in random), (model_folder("llama").name, False)]
    for kind in ("bfloat16", "4", "2+4"):
        assert json.loads((tmp_path / kind / "config.json").read_text(encoding="utf-8"))["hidden_size"] == 4096
    (only,) = models(source, [], [], False, tmp_path)
    assert (only.path, only.random) == (model_folder("llama"), False)
    with pytest.raises(ValueError, match="31B: a shape has no weights, say at what rates"):
        models("31B", [], [], True, tmp_path)
    with pytest.raises(ValueError, match="--bits is for shapes"):
        models(source, [Rate(4)], [], True, tmp_path)


def test_the_baseline_is_the_same_architecture(model_folder, tmp_path):
    from packing import write_checkpoint

    folder = write_checkpoint(model_folder("llama"), tmp_path / "q")
    first, second = models(str(folder), [], [], True, tmp_path / "work")
    assert (first.random, second.random) == (True, False)
    assert "quantization_config" not in first.content
    plain = AutoModelForCausalLM.from_pretrained(model_folder("llama")).config
    assert first.content["intermediate_size"] == plain.intermediate_size


@pytest.fixture
def comparison():
    load = Load((1, 8), 16, 64)
    speeds = [
        Speed("x, bfloat16", True, 8_000_000, 30.0, 20.0, {1: 100.0, 8: 700.0}, {1: 8.0, 8: 9.0}),
        Speed("x", False, 2_000_000, 40.0, 25.0, {1: 250.0, 8: 1400.0}, {1: 2.0, 8: 3.0}),
    ]
    return Comparison(speeds, load, 4e9, {"gpu": "a GPU", "vllm": "vLLM 0"})


def test_the_table(comparison):
    rows = cells(comparison)
    assert {len(row) for row in rows} == {len(columns(comparison))}
    assert rows[0][:4] == ["x, bfloat16 (random weights)", "8 MB", "20 ms", "100"]
    assert rows[1][:4] == ["x", "2 MB", "25 ms (0.80×)", "250 (2.50×)"]
    assert rows[1][5:] == ["2.00 ms (4.00×)", "3.00 ms (3.00×)", "4.00"]  # 2 MB take 0.5 ms to read
    assert notes(comparison.speeds) == [
        "Random weights, which say nothing of quality and generate nonsense: x, bfloat16."
    ]


def test_files(comparison, tmp_path):
    write_comparison(comparison, tmp_path / "out")
    content = json.loads((tmp_path / "out" / "serve.json").read_text(encoding="utf-8"))
    assert content == json.loads(json.dumps(comparison.to_dict()))
    assert (tmp_path / "out" / "serve.png").read_bytes()[:4] == b"\x89PNG"


def test_told(comparison):
    assert told(comparison.speeds[1]) == (
        "x: first token 25 ms; 1 at once 250 tokens/s, GPU step 2.00 ms; 8 at once 1,400 tokens/s, GPU step 3.00 ms"
    )


def test_vllm_can_fork(capsys, monkeypatch):
    """is_available keeps processes that are forked later from using CUDA."""
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: pytest.fail("called"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert cli.main(["bench", "serve", "31B", "--bits", "4", "--json"]) == 1
    assert "needs a CUDA device" in json.loads(capsys.readouterr().out)["error"]


def test_the_command(capsys):
    for bad in ("9", "4+", "4+1", "x"):
        with pytest.raises(SystemExit, match="2"):
            cli.main(["bench", "serve", "31B", "--bits", bad])
