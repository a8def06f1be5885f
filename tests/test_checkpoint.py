from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import IO, cast

import pytest
import torch
from packing import config_for, fill, random_packed, write_checkpoint
from safetensors.torch import load_file, save_file

from eightfold import checkpoint
from eightfold.checkpoint import assemble, config_json, output_tensors, plan_shards, read_packed, verify_files
from eightfold.files import file_bytes, header, measure, write_tensors
from eightfold.folder import ModelFolder
from eightfold.format import CheckpointError, QuantConfig
from eightfold.workspace import MANIFEST, Workspace, check_target, discard, partial_path, publish


def write_source(folder: Path, seed: int = 0) -> Path:
    """A folder with the tensors of two little layers: not a model, but all that writing needs."""
    rng = torch.Generator().manual_seed(seed)
    folder.mkdir(parents=True)
    tensors = {"model.embed_tokens.weight": (24, 40), "model.norm.weight": (40,), "lm_head.weight": (24, 40)}
    for i in (0, 1, 10):
        tensors |= {f"model.layers.{i}.q_proj.weight": (48, 40), f"model.layers.{i}.o_proj.weight": (40, 48)}
        tensors |= {f"model.layers.{i}.q_proj.bias": (48,), f"model.layers.{i}.norm.weight": (40,)}
    save_file(
        {name: torch.randn(shape, generator=rng).bfloat16() for name, shape in tensors.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    config = {
        "model_type": "llama",
        "tie_word_embeddings": False,
        "auto_map": {"AutoConfig": "theirs.Config"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "LICENSE", "theirs.py"):
        (folder / name).write_text(f"{name} of {seed}")
    return folder


@pytest.fixture
def source(tmp_path) -> Path:
    return write_source(tmp_path / "source")


def digest(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


# --- the result -------------------------------------------------------------------------------------------


def test_a_checkpoint_is_whole_and_says_so(source, tmp_path):
    target = write_checkpoint(source, tmp_path / "out")
    assert target == tmp_path / "out"
    assert not partial_path(target).exists()
    assert verify_files(target) == []
    assert {file.name for file in target.iterdir()} == {
        "model.safetensors",
        "config.json",
        "configuration_eightfold.py",
        "eightfold.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "LICENSE",
    }
    made, original = ModelFolder(target), ModelFolder(source)
    config = config_for(original)
    assert made.quantization == config
    for name in config.layers:
        packed, expected = (
            read_packed(made, name),
            random_packed(config.layers[name], list(config.layers).index(name)),
        )
        assert packed.spec == expected.spec
        for key, tensor in expected.tensors().items():
            assert torch.equal(packed.tensors()[key], tensor)
    rest = {name for name in original.tensors if name.rpartition(".")[0] not in config.layers}
    assert rest == {name for name in made.tensors if name.rpartition(".")[0] not in config.layers}
    for name in rest:
        assert torch.equal(made.read(name).view(torch.int16), original.read(name).view(torch.int16))


def test_manifest(source, tmp_path):
    target = write_checkpoint(source, tmp_path / "out")
    manifest = json.loads((target / MANIFEST).read_text())
    assert manifest["format_version"] == 1
    assert manifest["files"].keys() == {file.name for file in target.iterdir()} - {MANIFEST}
    assert [sorted(record) for record in manifest["layers"]] == [["layers"], ["layers"]]  # no seconds


def test_config_keeps_the_source_and_drops_its_code(source, tmp_path):
    content = json.loads((write_checkpoint(source, tmp_path / "out") / "config.json").read_text())
    assert content["model_type"] == "llama"
    assert content["auto_map"] == {"AutoConfig": "configuration_eightfold.Config"}
    assert content["tie_word_embeddings"] is False
    assert not (tmp_path / "out" / "theirs.py").exists()


@pytest.mark.parametrize("shard_bytes", [1, 3000, 8000, 10**9])
def test_shards_and_their_exact_size(source, tmp_path, shard_bytes):
    folder = ModelFolder(source)
    target = write_checkpoint(source, tmp_path / "out", shard_bytes=shard_bytes)
    tensors = output_tensors(folder, config_for(folder))
    shards = plan_shards(tensors, shard_bytes)
    assert {file.name for file in target.glob("*.safetensors")} == shards.keys()
    for file, names in shards.items():
        assert (target / file).stat().st_size == file_bytes({name: tensors[name] for name in names})
        content = load_file(target / file)
        assert sum(tensor.nbytes for tensor in content.values()) <= shard_bytes or len(names) == 1
        save_file(content, tmp_path / "library.safetensors", metadata={"format": "pt"})
        assert (target / file).read_bytes() == (tmp_path / "library.safetensors").read_bytes()
    assert (target / "model.safetensors.index.json").exists() == (len(shards) > 1)
    assert ModelFolder(target).tensors.keys() == tensors.keys()
    names = [name for names in shards.values() for name in names]
    assert names.index("model.layers.1.norm.weight") < names.index("model.layers.10.norm.weight")


def test_header_is_the_librarys_for_every_dtype(tmp_path):
    dtypes = {"float64": "F64", "float32": "F32", "bfloat16": "BF16", "float16": "F16", "int64": "I64"}
    dtypes |= {"int32": "I32", "int16": "I16", "uint8": "U8", "int8": "I8", "bool": "BOOL"}
    dtypes |= {"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"}
    tensors, codes = {"scalar": torch.ones(())}, {"scalar": ("F32", ())}
    for i, (dtype, code) in enumerate(dtypes.items()):
        name = f"é{i % 3}.{i}"
        tensors[name], codes[name] = torch.zeros(i + 1, 2, dtype=getattr(torch, dtype)), (code, (i + 1, 2))
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    ours = header(codes)
    assert (tmp_path / "x.safetensors").read_bytes()[: len(ours)] == ours


class Together:
    """A file and a hash: each piece is written while it is hashed, or the barrier breaks."""

    def __init__(self) -> None:
        self.both, self.content, self.hashed = threading.Barrier(2, timeout=20), b"", hashlib.sha256()

    def write(self, data: bytes) -> None:
        self.both.wait()
        self.content += data

    def update(self, data: bytes) -> None:
        self.both.wait()
        self.hashed.update(data)

    def hexdigest(self) -> str:
        return self.hashed.hexdigest()


def test_tensors_are_hashed_while_they_are_written(tmp_path, monkeypatch):
    tensors = {name: torch.arange(5) + i for i, name in enumerate("abc")}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    expected, file = measure(tmp_path / "x.safetensors"), Together()
    monkeypatch.setattr(hashlib, "sha256", lambda: file)
    codes = dict.fromkeys(tensors, ("I64", (5,)))
    assert write_tensors(cast(IO[bytes], file), codes, tensors.__getitem__) == expected
    assert file.content == (tmp_path / "x.safetensors").read_bytes()


def test_a_tensor_that_cannot_be_read_ends_the_writing(source, tmp_path, monkeypatch):
    mapped = ModelFolder.mapped

    def fail(self, name):
        if name == "model.norm.weight":
            raise CheckpointError("the disk is gone")
        return mapped(self, name)

    monkeypatch.setattr(ModelFolder, "mapped", fail)
    with pytest.raises(CheckpointError, match="the disk is gone"):
        write_checkpoint(source, tmp_path / "out", shard_bytes=3000)
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    assert verify_files(write_checkpoint(source, tmp_path / "out", shard_bytes=3000)) == []


def test_a_quantized_head_is_untied(source, tmp_path):
    content = json.loads((source / "config.json").read_text())
    content["tie_word_embeddings"] = True
    content["text_config"] = {"tie_word_embeddings": True}
    (source / "config.json").write_text(json.dumps(content))
    tensors = load_file(source / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    target = write_checkpoint(source, tmp_path / "out", head=True)
    content = json.loads((target / "config.json").read_text())
    assert content["tie_word_embeddings"] is False
    assert content["text_config"]["tie_word_embeddings"] is False
    assert "model.embed_tokens.weight" in ModelFolder(target).tensors
    read_packed(ModelFolder(target), "lm_head")
    folder = ModelFolder(source)
    assert config_json(folder, config_for(folder))["tie_word_embeddings"] is True


def test_further_files_stand_in_the_manifest(source, tmp_path):
    folder = ModelFolder(source)
    config = config_for(folder)
    with Workspace(tmp_path / "out", {}) as workspace:
        fill(workspace, config)
        out = assemble(workspace, folder, config, texts={"README.md": "card"})
        assert (out / "README.md").read_text() == "card"
        assert "README.md" in json.loads((out / MANIFEST).read_text())["files"]
        assert verify_files(out) == []


# --- what assemble refuses --------------------------------------------------------------------------------


def change(config: QuantConfig, layer: str, **fields: object) -> QuantConfig:
    section = config.to_dict()
    section["layers"][layer] |= fields
    return QuantConfig.from_dict(section)


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"bias": None}, r"0\.q_proj\.bias"),
        ({"bias": "float32"}, r"0\.q_proj\.bias"),
        ({"in_features": 39}, r"0\.q_proj\.weight"),
    ],
)
def test_source_that_differs_from_the_config(source, tmp_path, fields, names):
    folder = ModelFolder(source)
    config = change(config_for(folder), "model.layers.0.q_proj", **fields)
    with pytest.raises(CheckpointError, match=names):
        output_tensors(folder, config)


def test_a_layer_that_the_source_has_not(source):
    section = config_for(ModelFolder(source)).to_dict()
    section["layers"]["model.layers.7.q_proj"] = section["layers"]["model.layers.0.q_proj"]
    with pytest.raises(CheckpointError, match=r"layers\.7\.q_proj\.weight"):
        output_tensors(ModelFolder(source), QuantConfig.from_dict(section))


def test_workspace_that_differs_from_the_config(source, tmp_path):
    folder = ModelFolder(source)
    config = config_for(folder)
    with Workspace(tmp_path / "out", {}) as workspace:
        fill(workspace, config, parts=2)
        layer = next(name for name, spec in config.layers.items() if spec.bits == 2)
        more = change(config, layer, bits=3)
        with pytest.raises(CheckpointError, match=rf"{layer}\.qweight1: .*there is none"):
            assemble(workspace, folder, more)


# --- the workspace ----------------------------------------------------------------------------------------


def test_layers_survive(tmp_path):
    tensors = {
        "a.qweight": torch.arange(6, dtype=torch.int16).reshape(2, 3),
        "a.scale_in": torch.ones(3).half(),
    }
    shared = {**tensors, "b.scale_in": tensors["a.scale_in"]}  # a group's input vector is one tensor
    with Workspace(tmp_path / "out", {"seed": 1}) as workspace:
        assert workspace.finished() == []
        workspace.save_layer(0, shared, {"loss": 0.5, "linears": {"a": {"sqnr_db": float("inf")}}})
        with pytest.raises(ValueError, match="expected layer 1 next, came 3"):
            workspace.save_layer(3, shared, {})
    with Workspace(tmp_path / "out", {"seed": 1}) as workspace:
        assert workspace.finished() == [0]
        loaded, record = workspace.load_layer(0)
        assert record == {"loss": 0.5, "linears": {"a": {"sqnr_db": None}}}
        assert workspace.records() == [record]
        assert loaded.keys() == shared.keys()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in shared.items())


def test_not_finite(tmp_path):
    with Workspace(tmp_path / "out", {}) as workspace:
        with pytest.raises(CheckpointError, match=r"p\.scale_out: expected finite"):
            workspace.save_layer(0, {"p.scale_out": torch.tensor([1.0, float("nan")])}, {})
        assert workspace.finished() == []


def test_other_settings_are_refused_and_named(tmp_path):
    began = {"seed": 1, "bits": 2, "model": "abc"}
    with Workspace(tmp_path / "out", began) as workspace:
        workspace.save_layer(0, {"x": torch.ones(1)}, {})
    before = digest(partial_path(tmp_path / "out"))
    with pytest.raises(CheckpointError, match="bits was 2, is 3; model was 'abc', is None; device was None, is 'cpu'"):
        Workspace(tmp_path / "out", {"seed": 1, "bits": 3, "device": "cpu"})
    assert digest(partial_path(tmp_path / "out")) == before
    with Workspace(tmp_path / "out", {"bits": 2, "model": "abc", "seed": 1}) as workspace:
        assert workspace.finished() == [0]
    discard(tmp_path / "out")
    assert not partial_path(tmp_path / "out").exists()
    discard(tmp_path / "out")


def test_what_takes_time_to_find_is_confirmed_later(tmp_path):
    with Workspace(tmp_path / "out", {"seed": 1}) as workspace:
        assert not workspace.knows("base")
        workspace.confirm("base", "abc")
        assert workspace.knows("base")
        workspace.confirm("base", "abc")
    before = digest(partial_path(tmp_path / "out"))
    with Workspace(tmp_path / "out", {"seed": 1}) as workspace:
        assert workspace.knows("base")
        with pytest.raises(CheckpointError, match="begun with other inputs or settings \\(base was 'abc', is 'def'\\)"):
            workspace.confirm("base", "def")
    assert digest(partial_path(tmp_path / "out")) == before


def test_one_process_at_a_time(tmp_path):
    with Workspace(tmp_path / "out", {}):
        with pytest.raises(CheckpointError, match="in use by another process"):
            Workspace(tmp_path / "out", {})
        with pytest.raises(CheckpointError, match="in use by another process"):
            discard(tmp_path / "out")
    Workspace(tmp_path / "out", {}).close()


def test_a_changed_layer_file_is_noticed(tmp_path):
    with Workspace(tmp_path / "out", {}) as workspace:
        workspace.save_layer(0, {"x": torch.ones(4)}, {})
        file = workspace.path / "layers" / "00000.safetensors"
        file.write_bytes(file.read_bytes()[:-1] + b"!")
        with pytest.raises(CheckpointError, match=r"00000\.safetensors: not the bytes"):
            workspace.load_layer(0)


def test_a_folder_that_is_not_ours_is_left_alone(tmp_path):
    partial_path(tmp_path / "out").mkdir()
    (partial_path(tmp_path / "out") / "thesis.tex").write_text("x")
    with pytest.raises(CheckpointError, match=r"thesis\.tex"):
        Workspace(tmp_path / "out", {})
    with pytest.raises(CheckpointError, match=r"thesis\.tex"):
        discard(tmp_path / "out")
    assert (partial_path(tmp_path / "out") / "thesis.tex").exists()


# --- the target -------------------------------------------------------------------------------------------


def test_targets(source, tmp_path):
    check_target(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    check_target(tmp_path / "empty")
    check_target(write_checkpoint(source, tmp_path / "ours"))
    with pytest.raises(ValueError, match="it is a file"):
        check_target(source / "config.json")
    with pytest.raises(ValueError, match=r"no eightfold\.json"):
        check_target(source)
    with pytest.raises(ValueError, match=r"no eightfold\.json"):
        Workspace(source, {})
    assert not partial_path(source).exists()


def test_an_older_checkpoint_is_replaced_and_an_empty_folder_filled(source, tmp_path):
    (tmp_path / "out").mkdir()
    first = digest(write_checkpoint(source, tmp_path / "out"))
    second = digest(write_checkpoint(source, tmp_path / "out", bits=(4,)))
    assert first != second
    assert digest(write_checkpoint(source, tmp_path / "out")) == first
    assert {entry.name for entry in tmp_path.iterdir()} == {"source", "out"}


def test_publish_under_another_name(source, tmp_path):
    folder = ModelFolder(source)
    config = config_for(folder)
    with Workspace(tmp_path / "out", {}) as workspace:
        fill(workspace, config)
        assemble(workspace, folder, config)
        with pytest.raises(ValueError, match="expected a folder in"):
            publish(workspace, tmp_path / "elsewhere" / "out")
        assert publish(workspace, tmp_path / "out-failed") == tmp_path / "out-failed"
    assert verify_files(tmp_path / "out-failed") == []
    assert not (tmp_path / "out").exists()


# --- killed at any moment ---------------------------------------------------------------------------------

KILLER = """
import os, shutil, signal, sys
from pathlib import Path
from packing import write_checkpoint
from test_checkpoint import digest, write_source
from eightfold import checkpoint, workspace
from eightfold.checkpoint import verify_files
from eightfold.workspace import partial_path

os.fsync = lambda descriptor: None  # slow, and for the loss of power, not of a process
root, old_there = Path(sys.argv[1]), sys.argv[2] == "old"
source, out = write_source(root / "source"), root / "out"
expected = digest(write_checkpoint(source, root / "reference", shard_bytes=9000))
old = digest(write_checkpoint(source, root / "old", bits=(4,), fingerprint={"old": 1}))
KINDS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir")


def die_at(moment):
    count = 0

    def tick():
        nonlocal count
        count += 1
        if count == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(event, args):
        if event in KINDS and str(root) in str(args[0]) or event in ("os.remove", "os.rmdir"):
            tick()

    write = checkpoint.write_tensors

    def write_and_die(file, codes, read):
        def read_and_die(name):
            file.flush()  # half a file
            tick()
            return read(name)

        return write(file, codes, read_and_die)

    checkpoint.write_tensors = workspace.write_tensors = write_and_die
    sys.addaudithook(watch)


moment, killed = 0, True
while killed:
    moment += 1
    shutil.rmtree(out, ignore_errors=True)
    if old_there:
        shutil.copytree(root / "old", out)
    child = os.fork()
    if not child:
        die_at(moment)
        write_checkpoint(source, out, shard_bytes=9000)
        os._exit(0)
    killed = os.waitpid(child, 0)[1] == signal.SIGKILL
    if out.exists():  # whole, whichever it is
        assert digest(out) in ((old, expected) if killed else (expected,)), moment
    if killed and moment % 2:
        assert digest(write_checkpoint(source, out, shard_bytes=9000)) == expected, moment
    elif killed and partial_path(out).exists():
        workspace.discard(out)
        assert not out.exists() or verify_files(out) == []
        assert out.exists() or not old_there, moment
    assert not partial_path(out).exists(), moment
print(moment)
"""


@pytest.mark.parametrize("there", ["nothing", "old"])
def test_killed_at_every_moment(tmp_path, there):
    """SIGKILL at each touch of a file: the target is whole or as it was, the same command ends the same."""
    script = tmp_path / "killer.py"
    script.write_text(KILLER)
    here = str(Path(__file__).parent)
    path = os.pathsep.join([here, str(Path(checkpoint.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(
        [sys.executable, script, tmp_path / "root", there],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert int(run.stdout) > 60


# --- verify -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda f: (f / "model.safetensors").unlink(), "model.safetensors: listed"),
        (lambda f: (f / "tokenizer.json").write_text("other"), "tokenizer.json: expected"),
        (lambda f: (f / MANIFEST).unlink(), "it has no eightfold.json"),
        (lambda f: (f / MANIFEST).write_text("{}"), "expected an object 'files'"),
        (
            lambda f: shutil.copy(f / "model.safetensors", f / "more.safetensors"),
            "more.safetensors: not listed",
        ),
    ],
)
def test_verify_names_the_file(source, tmp_path, damage, says):
    target = write_checkpoint(source, tmp_path / "out")
    damage(target)
    problems = verify_files(target)
    assert len(problems) == 1
    assert says in problems[0]


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda t: t.pop("model.layers.0.q_proj.qweight"), r"0\.q_proj\.qweight: expected a tensor I16"),
        (lambda t: t.pop("model.layers.0.q_proj.bias"), r"0\.q_proj\.bias: .*there is none"),
        (
            lambda t: t.update({"model.layers.0.q_proj.weight": torch.ones(1)}),
            r"0\.q_proj\.weight: expected no",
        ),
        (lambda t: t["model.layers.0.q_proj.scale_in"].fill_(float("inf")), r"0\.q_proj\.scale_in: .*finite"),
        (
            lambda t: t.update({"model.layers.0.q_proj.scale_in": torch.ones(40)}),
            r"0\.q_proj\.scale_in: expected F16 \[40\], came F32 \[40\]",
        ),
    ],
)
def test_read_packed_names_the_tensor(source, tmp_path, damage, says):
    target = write_checkpoint(source, tmp_path / "out")
    tensors = load_file(target / "model.safetensors")
    damage(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=says):
        read_packed(ModelFolder(target), "model.layers.0.q_proj")
    assert verify_files(target) != []


def test_read_packed_of_a_layer_that_is_not_quantized(source, tmp_path):
    folder = ModelFolder(write_checkpoint(source, tmp_path / "out"))
    with pytest.raises(CheckpointError, match="lm_head"):
        read_packed(folder, "lm_head")
    with pytest.raises(CheckpointError, match="q_proj"):
        read_packed(ModelFolder(source), "model.layers.0.q_proj")
