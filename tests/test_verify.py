from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from packing import write_checkpoint
from safetensors.torch import load_file, save_file

from eightfold import bundled
from eightfold import verify as module
from eightfold.files import measure
from eightfold.format import CheckpointError
from eightfold.pipeline import quantize_model
from eightfold.preflight import Request, make_plan
from eightfold.workspace import MANIFEST

UP = "model.layers.1.mlp.up_proj"


class Silent:
    def phase(self, name, steps): ...

    def advance(self, steps): ...

    def layer(self, record): ...


def verify(path, against=None):
    return module.verify(path, against and str(against), lambda *_: None, lambda *_: None)


@pytest.fixture(scope="module")
def source(model_folder):
    return model_folder("llama-tied")


@pytest.fixture(scope="module")
def made(source, tmp_path_factory):
    """A checkpoint of 3 bits, the tied lm_head quantized, too."""
    out = tmp_path_factory.mktemp("made") / "q"
    text = out.with_name("text.txt")
    text.write_text(bundled.calibration_text().read_text(encoding="utf-8")[:20_000], encoding="utf-8")
    small = {"samples": 4, "seqlen": 32, "sensitivity_samples": 1, "eval_windows": 1, "max_ratio": 100.0}
    small |= {"calibration": str(text), "eval_text": str(text)}
    request = Request(str(source), str(out), 3, include=("lm_head",), device="cpu", **small)
    return quantize_model(make_plan(request), Silent()).path


@pytest.fixture
def copy(made, tmp_path):
    return Path(shutil.copytree(made, tmp_path / "copy"))


def change(path, edit):
    """Rewrite the weights and make the manifest agree, as whoever wrote a broken file would have."""
    file = path / "model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    manifest = json.loads((path / MANIFEST).read_text())
    manifest["files"][file.name] = measure(file)
    (path / MANIFEST).write_text(json.dumps(manifest))


def test_sound(made, source):
    found = verify(made, source)
    assert found.problems == []
    assert found.notes == []
    assert found.layers == 15
    assert found.files == len(list(made.iterdir())) - 1
    assert {"lm_head", UP} < set(found.sqnr_db)
    assert found.sqnr_db[found.lowest] == min(found.sqnr_db.values())


def test_a_flipped_bit(copy):
    file = copy / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    assert [problem.partition(":")[0] for problem in verify(copy).problems] == ["model.safetensors"]


def test_a_truncated_file(copy):
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    problems = verify(copy).problems
    assert problems[0].startswith("model.safetensors: expected")
    assert "not a whole safetensors file" in problems[1]


def test_a_scale_that_is_not_finite(copy):
    change(copy, lambda tensors: tensors[f"{UP}.scale_in"].fill_(float("nan")))
    first, second = verify(copy).problems
    assert first.startswith(f"{UP}.scale_in: expected finite values")
    assert second.startswith("transformers cannot load it")


def test_a_norm_that_is_not_finite(copy):
    change(copy, lambda tensors: tensors["model.norm.weight"].fill_(float("inf")))
    first, second = verify(copy).problems
    assert first.startswith("model.norm.weight: expected finite values")
    assert "logits that are not finite" in second


def test_a_missing_tensor(copy):
    change(copy, lambda tensors: tensors.pop(f"{UP}.qweight1"))
    assert verify(copy).problems[0].startswith(f"{UP}.qweight1: expected a tensor")


def test_rows_in_another_order(copy, source):
    """All is well to the eye, until the weights are compared."""
    assert verify(copy).problems == []
    change(copy, lambda tensors: tensors.update({f"{UP}.qweight": tensors[f"{UP}.qweight"].flip(0)}))
    assert verify(copy).problems == []
    found = verify(copy, source)
    assert found.lowest == UP
    assert [problem for problem in found.problems if problem.startswith(f"{UP}: ")] == found.problems
    assert "expected at least 7.5 dB" in found.problems[0]


def test_another_models_weights(made, model_folder, source, tmp_path):
    problems = verify(made, model_folder("llama")).problems
    assert f"{UP}: expected a linear of 320 × 128 in the original, it has none" in problems
    random = write_checkpoint(source, tmp_path / "random")
    found = verify(random, source)
    assert set(found.sqnr_db) == {problem.partition(":")[0] for problem in found.problems}
    assert max(found.sqnr_db.values()) < 1


def test_a_tensor_that_was_not_quantized_and_differs(copy, source):
    change(copy, lambda tensors: tensors["model.norm.weight"].add_(0.5))
    assert verify(copy).problems == []
    assert verify(copy, source).problems == ["model.norm.weight: expected the original's bytes, came others"]


def test_another_copy_of_the_original_is_noted(made, source, tmp_path):
    other = Path(shutil.copytree(source, tmp_path / "other"))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config))
    found = verify(made, other)
    assert found.problems == []
    assert "not, byte for byte" in found.notes[0]


def test_a_weight_of_zeros_is_not_compared(copy, source, tmp_path):
    other = Path(shutil.copytree(source, tmp_path / "other"))
    tensors = load_file(other / "model.safetensors")
    tensors[f"{UP}.weight"].zero_()
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    found = verify(copy, other)
    assert found.problems == []
    assert UP not in found.sqnr_db


def test_no_manifest(copy):
    (copy / MANIFEST).unlink()
    assert verify(copy).problems == [f"{copy}: it has no {MANIFEST}"]


def test_bad_input(made, source, tmp_path):
    with pytest.raises(CheckpointError, match="no such folder"):
        verify(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="expected the original model"):
        verify(made, made)
    assert "no quantization_config" in verify(source).problems[1]


def test_sqnr():
    W = torch.ones(2, 8)
    assert module.sqnr_db(W, W * 0.9) == pytest.approx(20, abs=1e-4)
    assert module.sqnr_db(W, W) == float("inf")
    assert module.sqnr_db(W * 0, W) == -float("inf")
