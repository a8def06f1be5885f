from __future__ import annotations

import hashlib
import json
import threading

import pytest
import torch
from models import write_model
from safetensors import safe_open

from eightfold.files import measures
from eightfold.folder import ModelFolder
from eightfold.format import CheckpointError


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    return write_model("llama-tied", tmp_path_factory.mktemp("single") / "model")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    return write_model("llama-tied", tmp_path_factory.mktemp("sharded") / "model", max_shard_size="200KB")


@pytest.fixture
def broken(single, tmp_path):
    """A copy of the model, to be broken."""
    for file in single.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def test_reads_every_tensor(single):
    folder = ModelFolder(single)
    with safe_open(single / "model.safetensors", "pt") as file:
        assert set(folder.tensors) == set(file.keys())
        for name, info in folder.tensors.items():
            tensor = folder.read(name)
            assert torch.equal(tensor, file.get_tensor(name))
            assert info.dtype == "BF16"
            assert info.shape == tuple(tensor.shape)
            assert info.nbytes == tensor.nbytes
    assert folder.config.model_type == "llama"
    assert folder.quantization is None


def test_what_is_read_may_be_written_to(single):
    folder = ModelFolder(single)
    folder.read("model.norm.weight").fill_(7)
    assert not (folder.read("model.norm.weight") == 7).any()


def test_shards_hold_the_same(single, sharded):
    one, many = ModelFolder(single), ModelFolder(sharded)
    assert len({info.file for info in many.tensors.values()}) > 2
    assert set(one.tensors) == set(many.tensors)
    assert all(torch.equal(one.read(name), many.read(name)) for name in one.tensors)


def test_hash_is_of_the_content(single, sharded, broken):
    assert ModelFolder(single).sha256() == ModelFolder(broken).sha256() != ModelFolder(sharded).sha256()
    weights = broken / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert ModelFolder(single).sha256() != ModelFolder(broken).sha256()


def test_files_are_hashed_side_by_side_whatever_pytorchs_threads(sharded, monkeypatch):
    """torchrun leaves PyTorch one thread a process."""
    expected, files = ModelFolder(sharded).sha256(), sorted(sharded.glob("*.safetensors"))[:2]
    digest, two, calls = hashlib.file_digest, threading.Barrier(2, timeout=20), []

    def wait_for_another(*args):
        calls.append(args)
        if len(calls) <= 2:
            two.wait()
        return digest(*args)

    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr(hashlib, "file_digest", wait_for_another)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert ModelFolder(sharded).sha256() == expected
        calls.clear()
        assert [each["bytes"] for each in measures(files)] == [file.stat().st_size for file in files]
    finally:
        torch.set_num_threads(before)


def test_unknown_tensor(single):
    with pytest.raises(CheckpointError, match=r"no\.such"):
        ModelFolder(single).read("no.such")


def test_truncated(broken):
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=r"model.safetensors: not a whole"):
        ModelFolder(broken)


def test_not_a_folder(tmp_path):
    with pytest.raises(CheckpointError, match="no such folder"):
        ModelFolder(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match=r"no config.json"):
        ModelFolder(tmp_path)


def test_hub_that_cannot_be_reached():
    with pytest.raises(CheckpointError, match="neither a folder nor a model"):
        ModelFolder("nobody/nothing-at-all")


def test_pickles_only(broken):
    (broken / "model.safetensors").rename(broken / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin is a pickle"):
        ModelFolder(broken)


def test_other_quantization(broken):
    config = json.loads((broken / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq"}
    (broken / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="'gptq'"):
        ModelFolder(broken)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.norm.weight": "absent.safetensors"}, "no such file"),
        ({"model.norm.weight": "../model.safetensors"}, "name of a file"),
        ({"ghost": "model.safetensors"}, "ghost"),
    ],
)
def test_index_that_lies(broken, change, message):
    names = dict.fromkeys(ModelFolder(broken).tensors, "model.safetensors")
    (broken / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names | change}))
    with pytest.raises(CheckpointError, match=message):
        ModelFolder(broken)


def test_config_that_is_no_json(broken):
    (broken / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="expected JSON"):
        ModelFolder(broken)
