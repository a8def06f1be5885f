"""E8 shells: the published check sums and rows, the tie order, GLQ's own files, and all that carries their codes.

Exactness of the nearest point is tested with the other codebooks in test_e8p.py.
"""

from __future__ import annotations

import copy
import io
import math
import random
import zlib
from pathlib import Path

import pytest
import torch
from plain import rotation_matrix
from safetensors.torch import load, load_file, save
from small import Silent, small_request
from transformers import AutoModelForCausalLM

from eightfold import codebook as codebooks
from eightfold import e8shell
from eightfold.checkpoint import read_packed
from eightfold.e8p import codebook
from eightfold.folder import ModelFolder
from eightfold.format import LayerSpec, PackedWeight, StageRecipe
from eightfold.linear import QuantLinear
from eightfold.pipeline import quantize_model
from eightfold.preflight import make_plan
from eightfold.quantize import Settings, dequantize, recipe
from eightfold.rvq import RECIPES, SHELL_RECIPES, SHELL_SCALES, Residual
from eightfold.verify import verify

SHELL, SMALL = codebook("e8shell"), codebook("e8shell256")
# dB on the Gaussian source, with GLQ's ratios, on this sample.
REACHED = {2: 10.40, 3: 15.26, 4: 20.05, 5: 24.73, 6: 29.16, 7: 33.73, 8: 37.96}
RATES = pytest.mark.parametrize("bits", list(SHELL_RECIPES))


def crc(points: torch.Tensor, dtype: str = "<f4") -> int:
    return zlib.crc32(points.numpy().astype(dtype).tobytes())


def test_check_sums() -> None:
    points = SHELL.points()
    assert [crc(points[:n]) for n in (65536, 4096, 256)] == [3681947879, 414859960, 3201397416]
    assert crc(points, "<f2") == 660613541
    assert crc(e8shell.doubled_points(), "i1") == 2069004643
    assert torch.equal(SMALL.points(), points[:256])


def test_named_points() -> None:
    half, three, five = 0.5, 1.5, 2.5
    named = {
        0: [0.0] * 8,
        1: [0, 1, 0, 0, 0, 0, -1, 0],
        240: [half, half, -half, half, -half, half, half, half],
        255: [0, 0, 1, -1, 0, 1, 1, 0],
        256: [-half, half, -three, half, half, half, -half, half],
        32767: [0, -1, -1, 1, -2, -1, -1, 1],
        65535: [-three, half, -half, -three, half, half, -half, five],
    }
    for code, point in named.items():
        assert SHELL.points()[code].tolist() == point


def test_shells_are_whole_up_to_norm_ten() -> None:
    norms, counts = SHELL.points().square().sum(1).unique(return_counts=True)
    found = dict(zip(norms.tolist(), counts.tolist(), strict=True))
    assert found == {0: 1, 2: 240, 4: 2160, 6: 6720, 8: 17520, 10: 30240, 12: 8655}
    assert found[12] == e8shell.COUNT - e8shell.WHOLE
    assert bool((SHELL.points().square().sum(1).diff() >= 0).all())
    kinds = e8shell._kinds().square().sum(1)
    assert (len(kinds), int((kinds <= 10).sum())) == (24, e8shell._INNER)


def test_the_sort_is_one() -> None:
    rng = random.Random(3)
    for size in (0, 1, 16, 17, 1000):
        keys = [rng.randrange(6) for _ in range(size)]
        order = e8shell._sorted_as_listed(keys)
        assert sorted(order) == list(range(size))
        assert [keys[i] for i in order] == sorted(keys)


@RATES
def test_recipes_and_their_scales_on_the_gaussian_source(bits: int) -> None:
    book, x = SHELL_RECIPES[bits], torch.randn(1 << 14, 8, generator=torch.Generator().manual_seed(1))
    assert book.bits == bits
    assert [name == "e8shell256" for name in book.stages] == [name == "e81b" for name in RECIPES[bits].stages]

    def sqnr(scale: float) -> float:
        left = x - book.decode(book.encode(x * scale)) / scale
        return 10 * math.log10(float(x.double().square().sum() / left.double().square().sum()))

    best = sqnr(SHELL_SCALES[bits])
    assert abs(best - REACHED[bits]) < 0.05
    assert best > max(sqnr(SHELL_SCALES[bits] * factor) for factor in (0.93, 1.07))


def test_encode_works_in_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(3000, 8, generator=torch.Generator().manual_seed(2)) * 1.5
    whole = SHELL.encode(x)
    assert float((whole.long() >= e8shell.WHOLE).float().mean()) > 0.01
    monkeypatch.setattr(codebooks, "_ENCODE_ROWS", 1000)
    monkeypatch.setattr(e8shell, "_SCORED", 7)
    assert torch.equal(SHELL.encode(x), whole)


def test_mixed_stages_encode_too() -> None:
    book = Residual(("e8p", "e8shell", "e8shell256"), (1.0, 0.27, 0.1))
    x = torch.randn(500, 8, generator=torch.Generator().manual_seed(2))
    codes = book.encode(x)
    assert [c.dtype for c in codes] == [torch.int16, torch.uint16, torch.int8]
    assert float((x - book.decode(codes)).square().mean()) < 0.01


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
def test_codes_mean_what_they_mean_in_glq_files(shared: Path, bits: int) -> None:
    folder = shared / "glq-format" / f"a066shell_{bits}"
    tensors = load_file(folder / "model.safetensors")
    dense = load_file(folder / "expected_dense.safetensors")
    stages = [f"e8shell{'256' if k and 2 * k + 1 == bits else ''}" for k in range((bits + 1) // 2)]
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        part = {key.removeprefix(f"{name}."): t for key, t in tensors.items() if key.startswith(f"{name}.")}
        R = torch.zeros(())
        for k, stage in enumerate(stages):
            codes = part["Qidxs" + (str(k + 1) if k else "")]
            codes = codes.view(torch.uint16) if stage == "e8shell" else codes.to(torch.int8)
            ratio = part["inv_resid_scale" + (str(k) if k > 1 else "")] if k else 1.0
            R = R + ratio * codebook(stage).decode(codes).flatten(1).double()
        H_M, H_N = (rotation_matrix(_binary_expansion(len(part[side]))) for side in ("SU", "SV"))
        W = H_M @ (R * part["Wscale"])[:, : len(H_N)] @ H_N
        W = part["SU"].double()[:, None] * W * part["SV"].double()
        expected = dense[f"{name}.weight"].double()
        W = W[: len(expected), : expected.shape[1]]
        assert float((W - expected).abs().max() / expected.abs().max()) < 1e-6


def _binary_expansion(size: int) -> tuple[int, ...]:
    return tuple(1 << k for k in reversed(range(size.bit_length())) if size >> k & 1)


# --- what carries the codes -----------------------------------------------------------------------------------------


def packed(bits: int = 3) -> PackedWeight:
    """A layer [20, 72] of random codes in rows of 10 and scales of about 1."""
    rng = torch.Generator().manual_seed(bits)
    layer = LayerSpec(20, 72, bits, (16, 4), (64, 16))
    stages = recipe(bits, "e8shell")
    numbers = [torch.randint(0, 1 << book.bits, (20, 10), generator=rng) for book in stages.codebooks]
    codes = tuple(n.to(dtype) for n, dtype in zip(numbers, stages.code_dtypes, strict=True))
    return PackedWeight(layer, stages, codes, torch.randn(72, generator=rng).half(), torch.ones(20).half())


@RATES
def test_linear(bits: int) -> None:
    weight = packed(bits)
    weight.validate("a")
    module = QuantLinear.from_packed(weight)
    x = torch.randn(3, 72, generator=torch.Generator().manual_seed(0))
    expected = x @ dequantize(weight).T
    assert torch.allclose(module(x), expected, atol=1e-4)
    assert torch.equal(copy.deepcopy(module).half()(x), module(x))
    other = QuantLinear(weight.spec, weight.recipe).prepare()
    stored = load(save(module.state_dict()))
    assert {t.dtype for t in stored.values()} <= {torch.uint16, torch.int8, torch.float16}
    other.load_state_dict(stored)
    assert torch.allclose(other(x), expected, atol=1e-4)
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    assert all(torch.equal(t, stored[name]) for name, t in torch.load(file).items())


@pytest.mark.parametrize("bits", [2, 3])
def test_quantize_write_read_verify(bits: int, tmp_path: Path, model_folder) -> None:
    settings = Settings(multipliers=(1.0,), codebook="e8shell")
    plan = make_plan(small_request(model_folder("llama-tied"), tmp_path / "out", bits, settings=settings))
    assert plan.config.provenance["settings"]["codebook"] == "e8shell"
    outcome = quantize_model(plan, Silent())
    folder = ModelFolder(outcome.path)
    name = next(iter(plan.config.layers))
    read = read_packed(folder, name)
    assert read.recipe == StageRecipe(SHELL_RECIPES[bits].stages, SHELL_RECIPES[bits].ratios)
    assert folder.tensors[f"{name}.qweight"].dtype == "U16"
    assert bits == 2 or folder.tensors[f"{name}.qweight1"].dtype == "I8"
    assert not verify(outcome.path, None, lambda *_: None, lambda _: None).problems
    measured = [linear["sqnr_db"] for record in outcome.records for linear in record["linears"].values()]
    assert sum(measured) / len(measured) > (6 if bits == 2 else 10)

    x = torch.arange(40)[None]
    model = AutoModelForCausalLM.from_pretrained(outcome.path, dtype=torch.float32)
    disk = {"model.embed_tokens": "cpu", "lm_head": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    disk |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    offloaded = AutoModelForCausalLM.from_pretrained(
        outcome.path, dtype=torch.float32, device_map=disk, offload_folder=tmp_path / "offload"
    )
    assert torch.allclose(offloaded(x).logits, model(x).logits, atol=1e-4)
    model.save_pretrained(tmp_path / "saved")
    saved = read_packed(ModelFolder(tmp_path / "saved"), name)
    assert all(torch.equal(a, b) for a, b in zip(saved.codes, read.codes, strict=True))


def test_unknown_family_is_refused(tmp_path: Path, model_folder) -> None:
    settings = Settings(codebook="e8")
    with pytest.raises(ValueError, match=r"expected a codebook out of \['e8p', 'e8shell'\], got 'e8'"):
        make_plan(small_request(model_folder("llama-tied"), tmp_path / "out", settings=settings))
