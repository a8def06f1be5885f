"""benchmarks/footprint.py: what it predicts is what files hold, ours and GLQ's own."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
from packing import write_checkpoint
from safetensors.torch import load_file

from eightfold.folder import ModelFolder
from eightfold.format import code_bytes, vector_bytes

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))  # as for a script in that folder
footprint = importlib.import_module("footprint")
del sys.path[0]

SMALL = footprint.Model("small", 200, 360, 2, 5, 1, 40, 100, True)
KINDS = [(bits, layout) for bits in footprint.BITS for layout in footprint.LAYOUTS]


@pytest.mark.parametrize(("bits", "layout"), KINDS)
def test_what_is_written_is_what_was_predicted(bits, layout):
    row = footprint.row(SMALL, bits, layout, True)
    assert (row["code_bytes"], row["vector_bytes"]) == (row["measured_code_bytes"], row["measured_vector_bytes"])
    assert row["stored_bits"] > bits


def test_the_default_layout_is_that_of_a_checkpoint(tmp_path, model_folder):
    folder = ModelFolder(write_checkpoint(model_folder("llama"), tmp_path / "out", bits=(2,)))
    config = folder.quantization
    for name, spec in config.layers.items():
        mine = footprint.predicted(spec.out_features, spec.in_features, 2, "eightfold")
        assert mine == (code_bytes(spec), vector_bytes(spec)), name
        named = {key: folder.tensors[key].nbytes for key in config.tensors(name)}
        assert sum(size for key, size in named.items() if "qweight" in key) == mine[0]


@pytest.mark.parametrize(("folder", "layout"), [("a065", "padded"), ("a066", "block-diagonal")])
@pytest.mark.parametrize("bits", footprint.BITS)
def test_predictions_are_those_of_files_that_glq_wrote(shared, folder, layout, bits):
    found = load_file(shared / "glq-format" / f"{folder}_{bits}" / "model.safetensors")
    linears = {name.rpartition(".")[0] for name in found if name.endswith(".Wscale")}
    model = footprint.Model("a", 192, 320, 2, 6, 3, 32, 0, False)
    assert len(linears) == 2 * 7
    shapes = {name: (N, K) for name, N, K in model.linears()}
    for linear in linears:
        own = {name: tensor.nbytes for name, tensor in found.items() if name.startswith(f"{linear}.")}
        codes = sum(size for name, size in own.items() if "Qidxs" in name)
        N, K = shapes[linear.rpartition(".")[2]]
        assert (codes, sum(own.values()) - codes) == footprint.predicted(N, K, bits, layout)
        expected = footprint.tensors(linear, N, K, bits, layout)
        assert {name: (found[name].dtype, tuple(found[name].shape)) for name in own} == expected


def test_models_are_as_large_as_their_names_say():
    size = {m.name: m.weights + m.embedding_bytes // 2 for m in footprint.MODELS}
    about = {"SmolLM2-135M": 0.1345, "SmolLM2-360M": 0.3618, "SmolLM3-3B": 3.075, "Llama-3.1-8B": 8.03}
    about |= {"Gemma-3-27B": 27.01, "Qwen2.5-72B": 72.7}
    for name, billions in about.items():
        assert size[name] == pytest.approx(billions * 1e9, rel=2e-3), name
