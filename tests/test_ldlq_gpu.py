"""LDLQ on an NVIDIA GPU against that of the CPU."""

from __future__ import annotations

import pytest
import torch
from test_ldlq import correlated, random
from torch import Tensor

from eightfold.ldlq import block_ldl, ldlq
from eightfold.rvq import RECIPES, SCALES, Residual

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("gpu")]


def agreement(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> Tensor:
    """Where the codes of all stages are the same, bool [N, K / 8]."""
    return torch.stack([a.cpu() == b.cpu() for a, b in zip(found, expected, strict=True)]).all(0)


@pytest.mark.parametrize("bits", range(2, 9))
def test_the_codes_are_those_of_the_cpu(bits: int, gpu: torch.device) -> None:
    book, N, K = RECIPES[bits], 300, 648
    W, L = random(N, K) * SCALES[bits], block_ldl(correlated(K), 0.01)[0]
    expected, _ = ldlq(W, L, book)
    codes, W_hat = ldlq(W.to(gpu), L.to(gpu), book)
    assert torch.equal(book.decode(codes).flatten(1), W_hat)
    same = agreement(codes, expected)
    # Rounding decides a tie otherwise here and there; then the rest of that row goes another way.
    assert float(same.all(1).double().mean()) > 0.9


def test_the_search_for_e8_shells_goes_group_by_group(gpu: torch.device) -> None:
    book = Residual(("e8shell",), (1.0,))
    W, L = random(40, 136), block_ldl(correlated(136), 0.01)[0]
    codes, _ = ldlq(W.to(gpu), L.to(gpu), book)
    assert float(agreement(codes, ldlq(W, L, book)[0]).double().mean()) > 0.9


@pytest.mark.parametrize("rows", [1, 1056, 4096, 30000])
def test_the_same_bytes_every_time_and_in_other_company(rows: int, gpu: torch.device) -> None:
    book, K = RECIPES[4], 384
    W, L = random(rows, K).to(gpu) * SCALES[4], block_ldl(correlated(K), 0.01)[0].to(gpu)
    codes, W_hat = ldlq(W, L, book)
    again, again_W = ldlq(W, L, book)
    assert torch.equal(W_hat, again_W)
    assert all(torch.equal(a, b) for a, b in zip(codes, again, strict=True))
    part, _ = ldlq(W[: rows // 2 + 1], L, book)
    assert float(agreement(part, tuple(c[: rows // 2 + 1] for c in codes)).double().mean()) > 0.999


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")  # of that mode itself
def test_nothing_is_waited_for(gpu: torch.device) -> None:
    book = RECIPES[3]
    W, L = random(100, 264).to(gpu), block_ldl(correlated(264), 0.01)[0].to(gpu)
    ldlq(W, L, book)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        ldlq(W, L, book)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_what_is_not_finite_spoils_no_other_row(gpu: torch.device) -> None:
    book = RECIPES[4]
    W, L = random(64, 136).to(gpu), block_ldl(correlated(136), 0.01)[0].to(gpu)
    expected, _ = ldlq(W, L, book)
    W[5, 100], W[9, 3] = torch.nan, torch.inf
    codes, _ = ldlq(W, L, book)
    good = [n for n in range(64) if n not in (5, 9)]
    assert all(torch.equal(a[good], b[good]) for a, b in zip(codes, expected, strict=True))
