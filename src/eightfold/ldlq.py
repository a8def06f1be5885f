"""Block LDL and LDLQ (QuIP#, section 4.1): rounding with linear feedback, eight columns at a time.

With H = L D L^T, L unit lower triangular in blocks of 8, the proxy loss of E = W - W_hat is
    tr(E H E^T) = sum_k tr((E L)_k D_k (E L)_k^T),   (E L)_k = E_k + sum_{j > k} E_j L_jk,
so group k, taken after all j > k, rounds W_k + sum_{j > k} E_j L_jk. The (m, n) of the paper are our (N, K).
"""

from __future__ import annotations

import torch
from torch import Tensor

from eightfold.cuda import ldlq as kernels
from eightfold.cuda.linear import supported
from eightfold.rvq import Residual

GROUP = 8  # columns of one code
PANEL = kernels.PANEL  # columns whose feedback reaches all before them by one matrix product


def block_ldl(H: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """The factor L of H + damping * mean(diag H) * I = L D L^T.

    H: float32 [K, K], symmetric, K a multiple of 8. Returns L float32 [K, K] with 8 x 8 identities on the diagonal, and
    an integer on the same device that is 0 unless the damped H is not positive definite: L is of no use then. Waits for
    nothing.
    """
    K = H.shape[0]
    H = H.clone()
    H.diagonal().add_(damping * H.diagonal().mean())
    C, failed = torch.linalg.cholesky_ex(H)
    blocks = C.reshape(K // GROUP, GROUP, K // GROUP, GROUP).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    inverse = torch.linalg.solve_triangular(blocks, torch.eye(GROUP, dtype=C.dtype, device=C.device), upper=False)
    columns = C.reshape(K, K // GROUP, GROUP).permute(1, 0, 2)  # [groups, K, 8]
    return (columns @ inverse).permute(1, 0, 2).reshape(K, K), failed


def ldlq(W: Tensor, L: Tensor, book: Residual) -> tuple[tuple[Tensor, ...], Tensor]:
    """Round W with feedback.

    W: float32 [N, K] in units of the codebook; L: float32 [K, K] from `block_ldl`.
    Returns codes, one tensor [N, K / 8] per stage, and W_hat float32 [N, K]. On a GPU that the kernels support all of
    it is queued and nothing waited for; the codes are those of the CPU but for float32 rounding at ties.
    """
    N, K = W.shape
    W, L, T = W.contiguous(), L.contiguous(), W.clone(memory_format=torch.contiguous_format)
    codes = tuple(torch.empty(N, K // GROUP, dtype=c.dtype, device=W.device) for c in book.codebooks)
    round_panel = _round_by_kernel if _has_kernel(book, W.device) else _round_by_groups
    for start in reversed(range(0, K, PANEL)):
        # T: targets W + E L of all columns before `start + PANEL`, then W_hat.
        E = round_panel(W, T, L, book, codes, start)
        T[:, :start].addmm_(E, L[start : start + PANEL, :start])
    return codes, T


def _round_by_groups(W: Tensor, T: Tensor, L: Tensor, book: Residual, codes: tuple[Tensor, ...], start: int) -> Tensor:
    """Round the columns of the panel from `start` on: fills codes and T, returns the errors."""
    end = min(start + PANEL, W.shape[1])
    for a in reversed(range(start, end, GROUP)):
        here = slice(a, a + GROUP)
        found = book.encode(T[:, here])
        T[:, here] = book.decode(found)
        T[:, start:a] += (W[:, here] - T[:, here]) @ L[here, start:a]
        for stage, c in zip(codes, found, strict=True):
            stage[:, a // GROUP] = c
    return W[:, start:end] - T[:, start:end]


def _round_by_kernel(W: Tensor, T: Tensor, L: Tensor, book: Residual, codes: tuple[Tensor, ...], start: int) -> Tensor:
    E = torch.empty(len(W), PANEL, dtype=torch.float32, device=W.device)
    kernels.quantize_panel(W, T, L, E, codes, book.ratios, start)
    return E[:, : min(PANEL, W.shape[1] - start)]


def _has_kernel(book: Residual, device: torch.device) -> bool:
    """Whether `device` is a GPU with kernels, and the stages are E8P, of which the last may be E81B."""
    return supported(device) and set(book.stages[:-1]) <= {"e8p"} and book.stages[-1] in ("e8p", "e81b")
