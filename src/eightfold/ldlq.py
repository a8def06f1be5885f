"""Block LDL and LDLQ (QuIP#, section 4.1): rounding with linear feedback, eight columns at a time.

With H = L D L^T, L unit lower triangular in blocks of 8, the proxy loss of E = W - W_hat is
    tr(E H E^T) = sum_k tr((E L)_k D_k (E L)_k^T),   (E L)_k = E_k + sum_{j > k} E_j L_jk,
so group k, taken after all j > k, rounds W_k + sum_{j > k} E_j L_jk. The (m, n) of the paper are our (N, K).
"""

from __future__ import annotations

import torch
from torch import Tensor

from eightfold.rvq import Residual

GROUP = 8  # columns of one code
PANEL = 128  # columns whose feedback is gathered by one matrix product


def block_ldl(H: Tensor, damping: float) -> Tensor:
    """The factor L of H + damping * mean(diag H) * I = L D L^T.

    H: float32 [K, K], symmetric, K a multiple of 8. Returns L float32 [K, K] with 8 x 8 identities on the diagonal.
    Raises torch.linalg.LinAlgError where the damped H is not positive definite.
    """
    K = H.shape[0]
    H = H.clone()
    H.diagonal().add_(damping * H.diagonal().mean())
    C = torch.linalg.cholesky(H)
    blocks = C.reshape(K // GROUP, GROUP, K // GROUP, GROUP).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    columns = C.reshape(K, K // GROUP, GROUP).permute(1, 0, 2)  # [groups, K, 8]
    L = torch.linalg.solve_triangular(blocks, columns, upper=False, left=False)
    return L.permute(1, 0, 2).reshape(K, K)


def ldlq(W: Tensor, L: Tensor, book: Residual) -> tuple[tuple[Tensor, ...], Tensor]:
    """Round W with feedback.

    W: float32 [N, K] in units of the codebook; L: float32 [K, K] from `block_ldl`.
    Returns codes, one tensor [N, K / 8] per stage, and W_hat float32 [N, K].
    """
    N, K = W.shape
    W_hat, E = torch.empty_like(W), torch.empty_like(W)
    codes = [torch.empty(N, K // GROUP, dtype=c.dtype, device=W.device) for c in book.codebooks]
    for start in reversed(range(0, K, PANEL)):
        end = min(start + PANEL, K)
        T = W[:, start:end] + E[:, end:] @ L[end:, start:end]
        for a in reversed(range(0, end - start, GROUP)):
            here = slice(start + a, start + a + GROUP)
            target = T[:, a : a + GROUP]
            found = book.encode(target)
            W_hat[:, here] = book.decode(found)
            E[:, here] = W[:, here] - W_hat[:, here]
            T[:, :a] += E[:, here] @ L[here, start : start + a]
            for stage, c in zip(codes, found, strict=True):
                stage[:, here.start // GROUP] = c
    return tuple(codes), W_hat


def proxy_loss(E: Tensor, H: Tensor) -> float:
    """tr(E H E^T), for E float32 [N, K] and H float32 [K, K]."""
    return float(((E @ H) * E).sum(dtype=torch.float64))
