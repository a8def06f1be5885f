"""Block LDL and rounding with feedback, against plain float64 versions written from the definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from eightfold.ldlq import GROUP, block_ldl, ldlq
from eightfold.prepare import proxy_losses
from eightfold.rvq import RECIPES, SCALES, Residual


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated(K: int, seed: int = 1) -> Tensor:
    """A Hessian with a few strong directions, as activations have."""
    x = random(4 * K, K, seed=seed) + 2 * random(4 * K, 4, seed=seed + 1) @ random(4, K, seed=seed + 2)
    return x.T @ x / len(x)


def plain_ldl(H: Tensor) -> tuple[Tensor, Tensor]:
    """L and D by block elimination, float64."""
    S, K = H.double().clone(), len(H)
    L, D = torch.eye(K).double(), torch.zeros(K, K).double()
    for a in range(0, K, GROUP):
        b = a + GROUP
        D[a:b, a:b] = S[a:b, a:b]
        L[b:, a:b] = S[b:, a:b] @ S[a:b, a:b].inverse()
        S[b:, b:] -= L[b:, a:b] @ S[a:b, a:b] @ L[b:, a:b].T
    return L, D


def plain_ldlq(W: Tensor, L: Tensor, book: Residual) -> tuple[list[list[Tensor]], Tensor]:
    """Row by row, group by group, from the last to the first, float64 but for `encode`."""
    W = W.double()
    W_hat, codes = torch.zeros_like(W), []
    for n in range(len(W)):
        codes.append([])
        for a in reversed(range(0, W.shape[1], GROUP)):
            b = a + GROUP
            target = W[n, a:b] + (W - W_hat)[n, b:] @ L[b:, a:b]
            found = book.encode(target.float())
            W_hat[n, a:b] = book.decode(found)
            codes[-1].insert(0, torch.stack([c.long() for c in found]))
    return codes, W_hat


@pytest.mark.parametrize("K", [8, 64, 200])
def test_the_factor_is_block_ldl(K: int) -> None:
    H = correlated(K)
    damped = H.double() + 0.03 * H.double().diagonal().mean() * torch.eye(K)
    L, failed = block_ldl(H, 0.03)
    assert int(failed) == 0
    for a in range(0, K, GROUP):
        assert torch.allclose(L[a : a + GROUP, a : a + GROUP], torch.eye(GROUP), rtol=0, atol=1e-6)
        assert bool((L[a : a + GROUP, a + GROUP :] == 0).all())
    expected, D = plain_ldl(damped)
    assert torch.allclose(L.double(), expected, rtol=0, atol=2e-4)
    assert torch.allclose(expected @ D @ expected.T, damped, rtol=0, atol=1e-10 * float(damped.max()))
    assert torch.allclose(L.double() @ D @ L.double().T, damped, rtol=0, atol=1e-4 * float(damped.max()))


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("K", [64, 264])  # one panel; two whole ones and a short one
def test_ldlq_is_the_plain_feedback(K: int, bits: int) -> None:
    W, L, book = random(6, K) * SCALES[bits], block_ldl(correlated(K), 0.01)[0], RECIPES[bits]
    codes, W_hat = ldlq(W, L, book)
    plain, plain_W = plain_ldlq(W, L.double(), book)
    assert [c.shape for c in codes] == [(6, K // 8)] * len(book.stages)
    assert [c.dtype for c in codes] == [c.dtype for c in book.encode(W[:, :8])]
    expected = torch.stack([torch.stack(row, 1) for row in plain], 1)  # [stages, N, K / 8]
    assert torch.equal(torch.stack([c.long() for c in codes]), expected)
    assert torch.allclose(W_hat.double(), plain_W, rtol=0, atol=1e-5)
    assert torch.equal(book.decode(codes).flatten(1), W_hat)


def test_feedback_loses_less_than_nearest_rounding() -> None:
    H, W, book = correlated(256), random(64, 256) * SCALES[2], RECIPES[2]
    _, W_hat = ldlq(W, block_ldl(H, 0.01)[0], book)
    nearest = book.decode(book.encode(W.reshape(64, 32, 8))).flatten(1)
    assert proxy_losses(W - W_hat, H).sum() < 0.6 * proxy_losses(W - nearest, H).sum()
    # and without correlation there is nothing to feed back
    _, W_hat = ldlq(W, block_ldl(torch.eye(256), 0.0)[0], book)
    assert torch.equal(W_hat, nearest)


@pytest.mark.parametrize("bits", [2, 4])
def test_weights_that_codes_can_say_are_reproduced(bits: int) -> None:
    # Sums of codes of the small second stage lie in their own cells; with feedback, nothing may build up.
    book = RECIPES[2] if bits == 2 else Residual(("e8p", "e8p"), (1.0, 1 / 64))
    rng = torch.Generator().manual_seed(0)
    codes = tuple(torch.randint(-32768, 32768, (40, 33), generator=rng).to(torch.int16) for _ in book.stages)
    W = book.decode(codes).flatten(1)
    found, W_hat = ldlq(W, block_ldl(correlated(264), 0.01)[0], book)
    assert torch.equal(W_hat, W)
    for code, again in zip(codes, found, strict=True):
        assert torch.equal(code, again)


def test_a_hessian_that_is_not_positive_definite() -> None:
    H = torch.eye(64)
    H[5, 5] = -0.5
    assert int(block_ldl(H, 0.1)[1]) > 0
    L, failed = block_ldl(H, 1.0)
    assert int(failed) == 0
    assert bool(L.isfinite().all())  # damping of the mean diagonal, 0.98
    before = H.clone()
    block_ldl(H, 1.0)
    assert torch.equal(H, before)


def test_damping_is_a_share_of_the_mean_diagonal() -> None:
    H = correlated(64)
    damped = H + 0.5 * H.diagonal().mean() * torch.eye(64)
    assert torch.allclose(block_ldl(H, 0.5)[0], block_ldl(damped, 0.0)[0], rtol=0, atol=1e-5)
    assert not torch.allclose(block_ldl(H, 0.5)[0], block_ldl(H, 0.0)[0], rtol=0, atol=1e-2)


def test_rows_do_not_depend_on_each_other() -> None:
    W, L = random(40, 136) * SCALES[3], block_ldl(correlated(136), 0.01)[0]
    codes, _ = ldlq(W, L, RECIPES[3])
    for part in (slice(0, 7), slice(7, 40)):
        for code, again in zip(codes, ldlq(W[part], L, RECIPES[3])[0], strict=True):
            assert torch.equal(code[part], again)


def test_proxy_loss() -> None:
    E, H = random(5, 16), correlated(16)
    assert float(proxy_losses(E, H).sum()) == pytest.approx(
        float(torch.trace(E.double() @ H.double() @ E.double().T)), rel=1e-5
    )
