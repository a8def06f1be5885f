"""Residual stages: what they reach on the Gaussian source, and that they are the sum of their stages."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from eightfold import rvq
from eightfold.e8p import codebook
from eightfold.rvq import RECIPES, SCALES, Residual

FLOORS = {2: 10.38, 3: 15.26, 4: 20.82, 5: 25.8, 6: 31.1, 7: 35.8, 8: 41.0}
REACHED = {2: 10.40, 3: 15.37, 4: 21.03, 5: 26.06, 6: 31.55, 7: 36.58, 8: 42.21}  # on this sample
RATES = pytest.mark.parametrize("bits", list(RECIPES))


def source(bits: int, count: int = 1 << 15) -> Tensor:
    return torch.randn(count, 8, generator=torch.Generator().manual_seed(bits)) * SCALES[bits]


def errors(x: Tensor, book: Residual) -> Tensor:
    """Squared error of each vector, float64."""
    return (x - book.decode(book.encode(x))).double().square().sum(1)


@RATES
def test_sqnr_on_the_gaussian_source(bits: int) -> None:
    x = source(bits)
    error = errors(x, RECIPES[bits])
    sqnr = 10 * math.log10(8 * SCALES[bits] ** 2 / float(error.mean()))
    standard_error = 10 / math.log(10) * float(error.std() / error.mean()) / math.sqrt(len(x))
    assert standard_error < 0.08  # or the next line would say nothing
    assert sqnr > FLOORS[bits] - 2 * standard_error
    assert sqnr > REACHED[bits] - 0.03


@RATES
def test_rates(bits: int) -> None:
    book = RECIPES[bits]
    assert book.bits == bits
    assert book.ratios[0] == 1
    assert len(book.stages) == len(book.ratios) == (bits + 1) // 2
    assert book.stages[-1] == ("e81b" if bits % 2 else "e8p")
    assert set(book.stages[:-1]) <= {"e8p"}
    assert list(RECIPES) == list(SCALES) == list(FLOORS)


@RATES
def test_decode_is_the_sum_of_the_stages(bits: int) -> None:
    book = RECIPES[bits]
    codes = book.encode(source(bits, 50))
    assert [c.dtype for c in codes] == [codebook(name).dtype for name in book.stages]
    total = torch.zeros(50, 8, dtype=torch.float64)
    for name, ratio, code in zip(book.stages, book.ratios, codes, strict=True):
        total += ratio * codebook(name).decode(code).double()
    assert torch.allclose(book.decode(codes).double(), total, rtol=0, atol=1e-6)


@RATES
def test_shapes(bits: int) -> None:
    book, x = RECIPES[bits], source(bits, 12)
    flat = book.encode(x)
    assert all(c.shape == (12,) for c in flat)
    for code, again in zip(flat, book.encode(x.reshape(3, 4, 8)), strict=True):
        assert torch.equal(code.reshape(3, 4), again)
    assert all(c.shape == (0, 4) for c in book.encode(torch.empty(0, 4, 8)))


@pytest.mark.parametrize(("bits", "gain"), [(4, 0.1), (8, 0.6)])
def test_two_paths_beat_the_nearest_point_stage_by_stage(bits: int, gain: float, monkeypatch) -> None:
    x, book = source(bits, 4096), RECIPES[bits]
    two = float(errors(x, book).mean())
    monkeypatch.setattr(rvq, "PATHS", 1)
    one = float(errors(x, book).mean())
    assert 10 * math.log10(one / two) > gain


def test_a_sum_of_codes_is_found_again() -> None:
    # The last stage's point is nearest to what is left, so a sum with small stages after the first is its own code.
    book = Residual(("e8p", "e8p"), (1.0, 1 / 64))
    rng = torch.Generator().manual_seed(0)
    codes = tuple(torch.randint(-32768, 32768, (500,), generator=rng).to(torch.int16) for _ in range(2))
    x = book.decode(codes)
    assert float(errors(x, book).max()) < 1e-10
