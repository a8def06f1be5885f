"""Rotations against explicit Sylvester matrices, and the layouts of blocks."""

from __future__ import annotations

import pytest
import torch
from plain import sylvester
from torch import Tensor

from eightfold.format import CheckpointError, LayerSpec, code_bytes
from eightfold.rotation import layout_blocks, rotate, run_lengths, valid_block

SHAPES_31B = [(21504, 5376), (5376, 21504), (8192, 5376), (5376, 8192)]


def normal(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("size", [1, 2, 8, 16, 64, 128, 512])
def test_a_block_is_the_sylvester_matrix(size: int) -> None:
    assert torch.allclose(rotate(torch.eye(size).double(), [size]), sylvester(size), rtol=0, atol=1e-14)


@pytest.mark.parametrize("blocks", [(256, 128), (64, 64, 64, 16), (16, 64, 64, 2, 1), (128,) + (8,) * 3 + (128,)])
def test_unequal_blocks(blocks: tuple[int, ...]) -> None:
    matrix = torch.block_diag(*[sylvester(b) for b in blocks])
    x = normal(3, 5, sum(blocks))
    assert torch.allclose(rotate(x, blocks), x @ matrix, rtol=0, atol=1e-12)


@pytest.mark.parametrize("blocks", [(32768,), (4096,), (256,) * 21, (64, 16), (16384, 4096, 1024)])
def test_orthogonal_and_its_own_inverse(blocks: tuple[int, ...]) -> None:
    x = normal(2, sum(blocks))
    y = rotate(x, blocks)
    assert not torch.allclose(y, x)
    assert torch.allclose(rotate(y, blocks), x, rtol=0, atol=1e-11)
    assert torch.allclose(y @ y.T, x @ x.T, rtol=1e-11, atol=1e-8)


def test_float32_is_as_exact_as_it_can_be() -> None:
    x = normal(4, 32768)
    y = rotate(x.float(), [32768])
    assert y.dtype == torch.float32
    assert torch.allclose(y.double(), rotate(x, [32768]), rtol=0, atol=2e-6)


def test_shapes_and_strides() -> None:
    x = normal(6, 4, 48)
    y = rotate(x, [32, 16])
    assert torch.equal(rotate(x.transpose(0, 1), [32, 16]), y.transpose(0, 1))
    assert torch.allclose(rotate(x.transpose(0, 2).contiguous().transpose(0, 2), [32, 16]), y)
    assert rotate(x[:0], [32, 16]).shape == (0, 4, 48)
    # Not to the bit: on some CPUs the product of one row takes another kernel of the BLAS than that of many.
    torch.testing.assert_close(rotate(x[0, 0], [32, 16]), y[0, 0], rtol=0, atol=4e-15)


def test_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected 48 coordinates for blocks \[32, 16\], got 40"):
        rotate(torch.zeros(40), [32, 16])


def test_valid_blocks() -> None:
    assert [size for size in (0, 1, 3, 64, 32768, 65536, 65537) if valid_block(size)] == [1, 64, 32768]


def test_run_lengths() -> None:
    assert run_lengths((8, 8, 16, 8)) == [(8, 2), (16, 1), (8, 1)]
    assert run_lengths(()) == []


@pytest.mark.parametrize(
    ("size", "layout", "floor", "shards", "blocks"),
    [
        (384, "pow2-sum", 64, 1, (256, 128)),
        (208, "pow2-sum", 16, 1, (128, 64, 16)),
        (200, "pow2-sum", 64, 1, (256,)),  # padded
        (40, "pow2-sum", 16, 1, (32, 16)),
        (5376, "pow2-sum", 64, 1, (4096, 1024, 256)),
        (5376, "pow2-sum", 16, 4, (1024, 256, 64) * 4),
        (21504, "pow2-sum", 64, 8, (2048, 512, 128) * 8),
        (576, "pow2-sum-256", 64, 1, (256, 256, 64)),
        (1536, "pow2-sum-256", 64, 2, (256,) * 6),
        (65536 + 64, "pow2-sum", 64, 1, (32768, 32768, 64)),
        (384, "pow2", 64, 1, (512,)),
        (5, "pow2", 16, 1, (16,)),
        (21504, "pow2", 64, 1, (32768,)),
        (21504, "equal", 64, 1, (1024,) * 21),
        (21504, "equal-256", 64, 1, (256,) * 84),
        (21504, "equal-256", 64, 8, (128,) * 168),  # 2688 a part
        (200, "equal-256", 64, 1, (256,)),
        (200, "equal-256", 16, 1, (16,) * 13),
        (360, "equal-256", 64, 1, (128,) * 3),
    ],
)
def test_layouts(size: int, layout: str, floor: int, shards: int, blocks: tuple[int, ...]) -> None:
    assert layout_blocks(size, layout, floor, shards) == blocks


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((384, "pow3", 64), "expected a layout out of .*'pow3'"),
        ((384, "equalish", 64), "expected a layout out of .*'equalish'"),
        ((384, "equal-x", 64), "expected a layout out of .*'equal-x'"),
        ((384, "equal-0", 64), "expected a layout out of .*'equal-0'"),
        ((384, "equal-96", 64), "expected a layout out of .*'equal-96'"),
        ((384, "equal-32", 64), "expected a layout out of .*'equal-32'"),
        ((384, "pow2", 64, 2), "'pow2' with 2 shards"),
        ((384, "pow2-sum", 64, 4), "4 parts of a multiple of 64, got 384: lower tp_max"),
        ((385, "pow2-sum", 16, 2), "2 parts of a multiple of 16, got 385"),
    ],
)
def test_layouts_that_do_not_fit_are_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layout_blocks(*arguments)


@pytest.mark.parametrize("layout", ["pow2-sum", "equal", "equal-256", "pow2-sum-256"])
def test_codes_of_a_31b_model_take_their_nominal_bytes(layout: str) -> None:
    for N, K in SHAPES_31B:
        spec = LayerSpec(N, K, 2, layout_blocks(N, layout, 16), layout_blocks(K, layout, 64))
        assert code_bytes(spec) == N * K * 2 // 8


def test_a_padded_power_of_two_takes_more_than_twice_as_much() -> None:
    N, K = SHAPES_31B[0]
    spec = LayerSpec(N, K, 2, layout_blocks(N, "pow2", 16), layout_blocks(K, "pow2", 64))
    assert (spec.padded_out, spec.padded_in) == (32768, 8192)
    assert code_bytes(spec) / (N * K * 2 / 8) == pytest.approx(2.32, abs=0.005)


@pytest.mark.parametrize("layout", ["pow2-sum", "pow2", "equal", "equal-256", "pow2-sum-256"])
@pytest.mark.parametrize("size", [1, 7, 40, 64, 65, 200, 360, 1000, 4097])
def test_every_size_gets_blocks_that_the_format_takes(size: int, layout: str) -> None:
    for floor in (16, 64):
        blocks = layout_blocks(size, layout, floor)
        assert size <= sum(blocks)
        assert sum(blocks) % floor == 0
        assert min(blocks) >= floor
    try:
        LayerSpec(size, size, 2, layout_blocks(size, layout, 16), layout_blocks(size, layout, 64))
    except CheckpointError as error:  # pragma: no cover
        pytest.fail(str(error))
