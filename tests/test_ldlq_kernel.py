"""kernels/ldlq.cu without a GPU: its code compiled as C++, block after block, against `ldlq` of the CPU."""

from __future__ import annotations

import ctypes

import pytest
import torch
from emulate import build
from test_ldlq import correlated, random
from torch import Tensor

import eightfold.ldlq as module
from eightfold.cuda import ldlq as kernels
from eightfold.ldlq import block_ldl, ldlq
from eightfold.rvq import RECIPES, SCALES, Residual

_ENTRY = """
extern "C" void run(const void* params, unsigned grid, unsigned block) {
    Params p;
    std::memcpy(&p, params, sizeof p);
    gridDim.x = grid, blockDim.x = block;
    for (blockIdx.x = 0; blockIdx.x < grid; ++blockIdx.x) {
        for (float& value : shared) value = NAN;
        run_block([&] { ldlq_panel(p); });
    }
}
extern "C" unsigned params_size() { return sizeof(Params); }
"""


class Emulated:
    """Stands for a loaded kernel."""

    def __init__(self, library: ctypes.CDLL, shared: int) -> None:
        self.library, self.shared, self.launches = library, shared, 0

    def launch(self, grid: int, block: int, params: bytes, stream: int) -> None:
        self.launches += 1
        assert len(params) == self.library.params_size()
        assert block * (4 * 144) // 4 + 30720 == self.shared <= 101376  # what every GPU has for a block
        self.library.run(params, ctypes.c_uint(grid), ctypes.c_uint(block))


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return build("ldlq.cu", _ENTRY, tmp_path_factory.mktemp("ldlq"))


@pytest.fixture
def by_kernel(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> list[Emulated]:
    """`ldlq` takes the kernel, on a device with two multiprocessors. The launches."""
    launched: list[Emulated] = []

    def load(file: str, name: str, device: int, shared: int) -> Emulated:
        launched.append(Emulated(library, shared))
        return launched[-1]

    monkeypatch.setattr(module, "supported", lambda device: True)
    monkeypatch.setattr(kernels, "device_index", lambda device: 0)
    monkeypatch.setattr(kernels, "sm_count", lambda device: 2)
    monkeypatch.setattr(kernels, "load", load)

    class Stream:
        cuda_stream = 0

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    return launched


def sample(N: int, K: int, book: Residual, scale: float) -> tuple[Tensor, Tensor]:
    return random(N, K) * scale, block_ldl(correlated(K), 0.01)[0]


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("N", [1, 53])  # rows of a warp that are not there; several blocks of several warps
def test_the_kernel_is_ldlq(bits: int, N: int, request: pytest.FixtureRequest) -> None:
    book, K = RECIPES[bits], 328  # two whole panels and a short one
    W, L = sample(N, K, book, SCALES[bits])
    expected, expected_W = ldlq(W, L, book)
    launched = request.getfixturevalue("by_kernel")
    codes, W_hat = ldlq(W, L, book)
    assert [each.launches for each in launched] == [1, 1, 1]
    assert [c.dtype for c in codes] == [c.dtype for c in expected]
    assert torch.equal(book.decode(codes).flatten(1), W_hat)
    same = (torch.stack([c.long() for c in codes]) == torch.stack([c.long() for c in expected])).all(0)
    # Where rounding decides a tie otherwise, the groups before it in that row go another way, too.
    assert float(same.all(1).double().mean()) >= (0.9 if N > 10 else 1.0)
    assert torch.equal(W_hat[same.all(1)], expected_W[same.all(1)])
