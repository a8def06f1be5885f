"""The plan: its sizes against written files, what is chosen, and what is refused before any work."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from models import write_model
from packing import fill, write_checkpoint
from safetensors import safe_open
from small import files_of, small_request

from eightfold.checkpoint import assemble
from eightfold.model import LinearInfo
from eightfold.preflight import Plan, _choose, check_room, choose_dtype, make_plan
from eightfold.workspace import Workspace


@pytest.fixture(autouse=True)
def rates(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Speeds that need no measuring: it takes half a second a plan."""
    if "measured" not in request.node.name:
        monkeypatch.setattr("eightfold.preflight._rates", lambda device, bits: (1e9, 1e6))


def written(plan: Plan, folder: Path) -> Path:
    """A checkpoint as planned, of random codes."""
    with Workspace(folder / "written", {"seed": 1}) as workspace:
        fill(workspace, plan.config)
        return assemble(workspace, plan.folder, plan.config, plan.request.shard_bytes)


def tensor_bytes(folder: Path) -> dict[str, int]:
    """Name -> bytes of every tensor in the files of `folder`."""
    sizes = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            sizes |= {name: file.get_tensor(name).nbytes for name in file.keys()}  # noqa: SIM118 (not a dict)
    return sizes


def check_sizes(plan: Plan, folder: Path) -> None:
    out = written(plan, folder)
    assert plan.output_bytes == sum(f.stat().st_size for f in out.glob("*.safetensors"))
    sizes = tensor_bytes(out)
    ours = [
        size for name, size in sizes.items() if name.rpartition(".")[0] in plan.config.layers and ".bias" not in name
    ]
    weights = sum(spec.out_features * spec.in_features for spec in plan.config.layers.values())
    assert plan.stored_bits == 8 * sum(ours) / weights
    assert plan.to_dict()["stored_bits"] == plan.stored_bits


@pytest.mark.parametrize("bits", [2, 5])
def test_sizes_are_those_of_the_files(any_model: Path, tmp_path: Path, bits: int) -> None:
    plan = make_plan(small_request(any_model, tmp_path / "out", bits))
    check_sizes(plan, tmp_path)
    assert plan.left == ("lm_head",)
    layers = json.loads((any_model / "config.json").read_text())["num_hidden_layers"]
    assert len(plan.config.layers) == layers * (4 if any_model.name.startswith("phi3") else 7)
    assert plan.source_bytes == sum(tensor_bytes(any_model).values())


@pytest.mark.parametrize("layout", ["pow2-sum-256", "pow2", "equal-128", "pow2-sum"])
def test_sizes_of_every_layout(layout: str, model_folder, tmp_path: Path) -> None:
    plan = make_plan(small_request(model_folder("llama"), tmp_path / "out", layout=layout))
    check_sizes(plan, tmp_path)


@pytest.mark.parametrize("kind", ["llama", "llama-tied"])
def test_sizes_with_a_quantized_head_and_several_shards(kind: str, model_folder, tmp_path: Path) -> None:
    request = small_request(model_folder(kind), tmp_path / "out", 3, include=("lm_head",), shard_bytes=300_000)
    plan = make_plan(request)
    check_sizes(plan, tmp_path)
    assert plan.left == ()
    head = plan.config.layers["lm_head"]
    assert head.out_blocks == (1,) * 4096
    assert head.padded_out == 4096
    assert len(list((tmp_path / "written.partial" / "out").glob("*.safetensors"))) > 2


def test_float32_vectors_count(model_folder, tmp_path: Path) -> None:
    request = small_request(model_folder("qwen2"), tmp_path / "out")
    settings = type(request.settings)(scale_dtype="float32")
    plan = make_plan(small_request(model_folder("qwen2"), tmp_path / "out", settings=settings))
    check_sizes(plan, tmp_path)
    assert plan.stored_bits > make_plan(request).stored_bits


def test_a_plan_is_json_and_writes_nothing(model_folder, tmp_path: Path) -> None:
    request = small_request(model_folder("llama-tied"), tmp_path / "out")
    before = files_of(tmp_path)
    plan = make_plan(request)
    check_room(plan)
    assert files_of(tmp_path) == before
    told = json.loads(json.dumps(plan.to_dict()))
    assert told["bits"] == 2
    assert told["quantized"] == list(plan.config.layers)
    assert told["left"] == ["lm_head"]
    assert told["device"] == "cpu"
    assert told["dtype"] == "float32"
    assert told["output_bytes"] > 0
    assert told["seconds_estimate"] > 0
    assert told["peak_bytes_estimate"] > 0
    assert told["free_bytes"] > 0
    assert told["calibration"] == {**plan.config.provenance["calibration"]}
    assert plan.windows.shape == (4, 32)
    assert plan.held_out.shape == (2, 32)


def test_everything_that_decides_is_in_the_provenance(model_folder, tmp_path: Path) -> None:
    base = make_plan(small_request(model_folder("llama-tied"), tmp_path / "out")).config.provenance
    changes: list[dict[str, Any]] = [
        {"samples": 3}, {"seqlen": 30}, {"layout": "equal"}, {"exclude": ("*.o_proj",)}, {"dtype": "bfloat16"},
        {"sensitivity_samples": 1}, {"calibration": __file__[:-2] + "py"},
    ]  # fmt: skip
    for change in changes:
        other = make_plan(small_request(model_folder("llama-tied"), tmp_path / "out", **change))
        assert other.config.provenance != base, change


def test_the_estimate_of_time_uses_measured_rates(model_folder, tmp_path: Path, monkeypatch) -> None:
    request = small_request(model_folder("llama-tied"), tmp_path / "out")
    assert make_plan(request).cost.seconds > 0
    monkeypatch.setattr("eightfold.preflight._rates", lambda device, bits: (1e3, 1e6))
    assert make_plan(request).cost.seconds > 1000


# --- what is chosen -------------------------------------------------------------------------------------------------


def test_include_and_exclude(model_folder, tmp_path: Path) -> None:
    def chosen(**patterns: Any) -> set[str]:
        plan = make_plan(small_request(model_folder("llama-tied"), tmp_path / "out", **patterns))
        assert not set(plan.left) & set(plan.config.layers)
        return set(plan.config.layers)

    every = chosen()
    assert chosen(include=("lm_head",)) == chosen(include=("*",)) == every | {"lm_head"}
    assert chosen(exclude=("*.mlp.*",)) == {name for name in every if ".mlp." not in name}
    assert chosen(include=("*",), exclude=("lm_*", "*.0.*", "*.q_proj")) == {
        name for name in every if ".1." in name and "q_proj" not in name
    }
    assert chosen(exclude=("*.layers.[0]*",)) == {name for name in every if ".1." in name}


def test_other_linears_outside_the_layers_are_refused(tmp_path: Path) -> None:
    linears = {"model.project_in": LinearInfo(128, 64, False, None), "model.layers.0.q": LinearInfo(128, 128, False, 0)}
    linears["lm_head"] = LinearInfo(4096, 128, False, None)
    every = small_request(tmp_path, tmp_path / "out", include=("*",))
    with pytest.raises(ValueError, match=r"^model\.project_in: only linears of decoder layers and the head"):
        _choose(linears, "lm_head", every)
    head = small_request(tmp_path, tmp_path / "out", include=("lm_head",))
    assert list(_choose(linears, "lm_head", head)) == ["model.layers.0.q", "lm_head"]


def test_tp_max(model_folder, tmp_path: Path) -> None:
    # 4 heads, 2 key heads, 128 x 320: o_proj's 128 inputs split twice at 64, down_proj's 320 do not.
    folder = model_folder("llama-tied")
    auto = make_plan(small_request(folder, tmp_path / "out"))
    assert auto.config.tp_max == 1
    without = small_request(folder, tmp_path / "out", exclude=("*.mlp.*",), include=("lm_head",))
    assert make_plan(without).config.tp_max == 2
    # The head has no say: Mistral's 136 hidden values do not split, and only the head would have to.
    head = small_request(model_folder("mistral"), tmp_path / "out", exclude=("*.mlp.*",), include=("lm_head",))
    assert make_plan(head).config.tp_max == 2
    with pytest.raises(ValueError, match=r"down_proj: .*lower tp_max"):
        make_plan(small_request(folder, tmp_path / "out", tp_max=2))
    with pytest.raises(ValueError, match="expected a tp_max that splits 4 heads and 2 key heads, got 3"):
        make_plan(small_request(folder, tmp_path / "out", tp_max=3))
    with pytest.raises(ValueError, match="expected a tp_max of at least 1, got 0"):
        make_plan(small_request(folder, tmp_path / "out", tp_max=0))


def test_dtypes(model_folder, tmp_path: Path) -> None:
    folder = make_plan(small_request(model_folder("llama-tied"), tmp_path / "out")).folder
    assert choose_dtype("auto", "cpu", folder) == torch.float32
    assert choose_dtype("float16", "cpu", folder) == torch.float16
    with pytest.raises(ValueError, match=r"expected a dtype out of auto, .*'float8'"):
        choose_dtype("float8", "cpu", folder)


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 9}, "expected bits from 2 to 8, got 9"),
        ({"bits": 1}, "expected bits from 2 to 8, got 1"),
        ({"device": "quantum"}, "expected a device such as cpu, cuda or cuda:1, got 'quantum'"),
        ({"device": "meta"}, "expected a device such as .*, got 'meta'"),
        ({"device": "cuda:99"}, "device cuda:99: there are .* usable NVIDIA GPUs"),
        ({"dtype": "int8"}, "expected a dtype"),
        ({"layout": "round"}, "expected a layout out of .*'round'"),
        ({"include": ("*.nothing",)}, r"pattern '\*\.nothing' matches no linear .* like model\.layers\.0\."),
        ({"exclude": ("model.embed*",)}, r"pattern 'model\.embed\*' matches no linear"),
        ({"exclude": ("*",)}, "no linear is left to quantize"),
        ({"seqlen": 1}, "expected a seqlen of at least 2, got 1"),
        ({"samples": 0}, "samples: expected at least 1"),
        ({"samples": 10**6}, "calibration text: expected at least .* tokens"),
        ({"calibration": "/nowhere/text"}, "/nowhere/text: expected a text file"),
        ({"eval_text": "/nowhere/held-out"}, "/nowhere/held-out: expected a text file"),
    ],
)
def test_bad_requests(change: dict[str, Any], message: str, model_folder, tmp_path: Path) -> None:
    request = small_request(model_folder("llama-tied"), tmp_path / "out", **change)
    before = files_of(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        make_plan(request)
    assert "\n" not in str(caught.value)
    assert files_of(tmp_path) == before


def test_a_quantized_model_is_refused(model_folder, tmp_path: Path) -> None:
    ours = write_checkpoint(model_folder("llama-tied"), tmp_path / "ours")
    with pytest.raises(ValueError, match=r"ours: expected an original model, this one is quantized already"):
        make_plan(small_request(ours, tmp_path / "out"))
    # but as a target, it may be replaced
    assert make_plan(small_request(model_folder("llama-tied"), ours)).request.out == str(ours)


@pytest.mark.parametrize("name", ["out", "out.failed"])
def test_a_target_that_is_not_ours_is_refused(name: str, model_folder, tmp_path: Path) -> None:
    request = small_request(model_folder("llama-tied"), tmp_path / "out")
    (tmp_path / name).mkdir()
    make_plan(request)
    (tmp_path / name / "thesis.txt").write_text("do not lose")
    with pytest.raises(ValueError, match=rf"{name}: it holds files and no eightfold\.json"):
        make_plan(request)
    shutil.rmtree(tmp_path / name)
    (tmp_path / name).write_text("a file")
    with pytest.raises(ValueError, match=rf"{name}: expected a folder to write to, it is a file"):
        make_plan(request)


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing-here"):
        make_plan(small_request(tmp_path / "nothing-here", tmp_path / "out"))


def test_missing_and_broken_weights_are_found_before_any_work(tmp_path: Path) -> None:
    folder = write_model("llama-tied", tmp_path / "model", max_shard_size="300KB")
    request = small_request(folder, tmp_path / "out")
    make_plan(request)
    shard = sorted(folder.glob("*.safetensors"))[0]
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=shard.name):
        make_plan(request)
    shard.unlink()
    with pytest.raises(ValueError, match=shard.name):
        make_plan(request)


def test_a_full_disk_is_refused(model_folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**12, 10**12, 10**6))
    plan = make_plan(small_request(model_folder("llama-tied"), tmp_path / "out"))
    assert plan.free_bytes == 10**6
    with pytest.raises(ValueError, match=rf"expected {2 * plan.output_bytes:,} bytes free .* there are 1,000,000"):
        check_room(plan)
