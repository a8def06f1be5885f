"""What a quantization would take: from sizes alone, and against what a run takes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small import Silent, small_request

from eightfold.activations import Activations
from eightfold.cli import main
from eightfold.cost import Group, Machine, Work, activation_bytes, batch_size, estimate, gpu_bytes
from eightfold.pipeline import quantize_model
from eightfold.preflight import check_room, make_plan
from eightfold.quantize import Settings
from eightfold.queued import Later

# Llama-3.1-8B
LAYER = (
    Group(4096, (4096, 1024, 1024), False),
    Group(4096, (4096,), True),
    Group(4096, (14336, 14336), False),
    Group(14336, (4096,), True),
)
WORK = Work(LAYER, None, 32, 4096, 32, 128256, 8030261248, 1050939392, 128, 2048, 16, 2, 4.0, 32768, Settings())
MACHINE = Machine(1, 141 * 10**9, 6e14, 5e13, 3e9)


def test_the_largest_things_are_counted() -> None:
    assert WORK.weights == 218103808
    assert activation_bytes(WORK, 1) == 2 * 128 * 2048 * 4096 * 2
    assert activation_bytes(WORK, 8) == activation_bytes(WORK, 1) // 8
    assert gpu_bytes(WORK, 1, on_host=False) > activation_bytes(WORK, 1) + 2 * 4 * 14336**2 + 4 * 4096 * 14336
    longer = replace(WORK, samples=256)
    assert gpu_bytes(longer, 1, False) - gpu_bytes(WORK, 1, False) == activation_bytes(WORK, 1)
    assert gpu_bytes(longer, 1, True) == gpu_bytes(WORK, 1, True)


def test_activations_wait_on_the_host_where_the_gpu_has_no_room() -> None:
    roomy = estimate(WORK, MACHINE)
    assert roomy.fits
    assert not roomy.on_host
    tight = estimate(WORK, replace(MACHINE, memory=gpu_bytes(WORK, 1, on_host=True)))
    assert tight.fits
    assert tight.on_host
    assert tight.host_bytes >= roomy.host_bytes + activation_bytes(WORK, 1)
    assert not estimate(WORK, replace(MACHINE, memory=gpu_bytes(WORK, 1, on_host=True) - 1)).fits


def test_pinned_batches_count_as_powers_of_two() -> None:
    """Eight layers of Qwen2.5-14B's shape took 11,221,995,565 bytes with 18 GB of a GPU (quantize.jsonl)."""
    kv = 8 * 128
    layer = (
        Group(5120, (5120, kv, kv), False),
        Group(5120, (5120,), True),
        Group(5120, (13824, 13824), False),
        Group(13824, (5120,), True),
    )
    outside = 2 * 152064 * 5120
    work = Work(layer, None, 8, 5120, 40, 152064, outside, outside, 128, 2048, 16, 2, 4.0, 32768, Settings())
    cost = estimate(work, replace(MACHINE, memory=18 * 10**9))
    assert cost.on_host
    assert not cost.sensed_on_host
    assert 11_221_995_565 < cost.host_bytes < 15 * 10**9


def test_more_gpus_take_less_time_and_memory_each() -> None:
    one, two = estimate(WORK, MACHINE), estimate(WORK, replace(MACHINE, gpus=2))
    assert two.seconds < one.seconds
    assert two.gpu_bytes < one.gpu_bytes


def test_every_part_of_the_samples_has_a_batch() -> None:
    assert batch_size(128, 2048) == 8
    assert batch_size(16, 2048) == 2
    assert batch_size(3, 2048) == 1
    assert batch_size(1000, 100_000) == 1


def test_a_plan_that_does_not_fit_is_refused(model_folder, tmp_path: Path) -> None:
    plan = make_plan(small_request(model_folder("llama-tied"), tmp_path / "out"))
    assert plan.cost.fits
    with pytest.raises(ValueError, match="expected 100 bytes of GPU memory for the largest layer, 99 may be used"):
        check_room(replace(plan, cost=replace(plan.cost, gpu_bytes=100, usable_bytes=99)))


def test_estimate_needs_a_config_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shape = {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8}
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 80, **shape}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main(["estimate", str(tmp_path), "--json"]) == 0
    machines = json.loads(capsys.readouterr().out)["machines"]
    assert [cost["fits"] for cost in machines.values()] == [False, True, True]
    assert [cost["gpus"] for cost in machines.values()] == [1, 1, 8]
    assert main(["estimate", str(tmp_path / "nothing"), "--json"]) == 1


def test_activations_are_set_one_by_one() -> None:
    first = Activations((torch.full((2, 3, 4), float(b)) for b in range(3)), torch.device("cpu"), on_host=False)
    second = first.copy()
    second[1] = torch.ones(2, 3, 4) * 7
    assert [float(x[0, 0, 0]) for x in first] == [0, 1, 2]
    assert [float(x[0, 0, 0]) for x in second] == [0, 7, 2]


def test_numbers_are_looked_at_in_order_once() -> None:
    later, seen = Later(torch.device("cpu")), []
    later.add(torch.tensor([True, False]), seen.append)
    later.add(torch.tensor(2.5), seen.append)
    assert seen == []
    later.settle()
    later.settle()
    assert seen == [[1.0, 0.0], [2.5]]
    with later.timed("a"):
        pass
    assert later.seconds["a"] >= 0


@pytest.mark.gpu
@pytest.mark.parametrize("memory", [None, 8 << 30])
def test_a_run_holds_what_the_preflight_says(memory: int | None, model_folder, tmp_path: Path) -> None:
    request = small_request(model_folder("llama"), tmp_path / "out", device="cuda", gpu_memory=memory, samples=16)
    plan = make_plan(request)
    torch.cuda.reset_peak_memory_stats()
    quantize_model(plan, Silent())
    assert torch.cuda.max_memory_allocated() <= plan.cost.gpu_bytes


@pytest.mark.gpu
def test_where_activations_wait_changes_no_byte() -> None:
    device = torch.device("cuda")
    batches = [torch.randn(2, 3, 4, device=device) for _ in range(3)]
    here, there = (Activations(batches, device, on_host) for on_host in (False, True))
    here[1] = there[1] = batches[0] * 2
    assert all(torch.equal(a, b) for a, b in zip(here, there, strict=True))
    assert all(x.is_cuda for x in there)
