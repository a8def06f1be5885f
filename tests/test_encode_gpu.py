"""The search for the nearest points on an NVIDIA GPU against all points in float64, and against the CPU's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from eightfold.cuda import encode as kernels
from eightfold.e8p import E8P, E81B, Codebook, codebook

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("gpu")]

BOTH = pytest.mark.parametrize("book", [codebook("e8p"), codebook("e81b")], ids=lambda b: b.name)
KERNELS = pytest.mark.parametrize("name", ["encode_e8p", "candidates_e8p", "encode_e81b"])


def gaussian(count: int, scale: float = 1.0, seed: int = 0) -> Tensor:
    return torch.randn(count, 8, generator=torch.Generator().manual_seed(seed)) * scale


def assert_nearest(x: Tensor, codes: Tensor, book: Codebook, among: Tensor) -> None:
    """The codes [n] of x [n, 8] are as near as the nearest of the points `among`, but for float32's rounding of <x, p>.

    Distances, less |x|^2, in float64, by looking at all points.
    """
    points = among.to(x.device).double()
    half_norms = points.square().sum(1) / 2
    for part, code in zip(x.double().split(1000), codes.split(1000), strict=True):
        best = (part @ points.T - half_norms).amax(1)
        mine = book.decode(code).double()
        loss = 2 * (best - ((part * mine).sum(1) - mine.square().sum(1) / 2))
        assert bool((loss <= 2e-6 * (1 + part.abs().sum(1))).all())


@BOTH
@pytest.mark.parametrize("scale", [0.03, 0.4, 1.0, 1.7, 4.0, 1000.0, 100_000.0])
def test_encode_is_exact(book: Codebook, scale: float, gpu: torch.device) -> None:
    x = gaussian(20_000, scale).to(gpu)
    codes = book.encode(x)
    assert codes.device == gpu
    assert codes.dtype == book.dtype
    assert_nearest(x, codes, book, book.points())


@BOTH
def test_encode_is_exact_where_there_are_ties_and_spikes(book: Codebook, gpu: torch.device) -> None:
    grid = torch.cartesian_prod(*[torch.tensor([-1.0, 0.0, 0.5])] * 4)
    quarters = gaussian(20_000, 1.5).mul(4).round() / 4
    spikes = gaussian(4000)
    spikes[torch.arange(4000), torch.arange(4000) % 8] *= 1000
    x = torch.cat([grid.repeat(1, 2), grid.repeat_interleave(2, 1), torch.zeros(1, 8), quarters, spikes]).to(gpu)
    assert_nearest(x, book.encode(x), book, book.points())


@BOTH
def test_points_are_codes_of_themselves(book: Codebook, gpu: torch.device) -> None:
    points = book.points().to(gpu)
    assert torch.equal(book.encode(points).long() & ((1 << book.bits) - 1), torch.arange(1 << book.bits, device=gpu))


@BOTH
def test_encode_gives_the_codes_of_the_cpu(book: Codebook, gpu: torch.device) -> None:
    x = gaussian(200_000, 1.3)
    assert float((book.encode(x.to(gpu)).cpu() == book.encode(x)).double().mean()) > 0.9999


def test_candidates_are_the_nearest_points_of_either_shift(gpu: torch.device) -> None:
    book = E8P()
    x = gaussian(20_000, 1.3)
    found = book.candidates(x.to(gpu))
    assert found.device == gpu
    assert found.dtype == torch.int16
    assert found.shape == (2, 20_000)
    assert float((found.cpu() == book.candidates(x)).double().mean()) > 0.9999
    points = book.points()
    for codes, shift in zip(found, (0.25, -0.25), strict=True):
        coset = points[((points - shift) % 1 == 0.5).all(1)]
        assert bool(((book.decode(codes) - shift) % 1 == 0.5).all())
        assert_nearest(x.to(gpu), codes, book, coset)


@BOTH
@pytest.mark.parametrize("count", [1, 7, 1_000_003])
def test_every_vector_is_encoded_by_itself(book: Codebook, count: int, gpu: torch.device) -> None:
    """However many there are: each gets the code that it gets in other company, and the ends are exact."""
    x = gaussian(count, 1.2).to(gpu)
    codes = book.encode(x)
    assert torch.equal(torch.cat([book.encode(part) for part in x.split(99_991)]), codes)
    for end in (slice(0, 1000), slice(-1000, None)):
        assert_nearest(x[end], codes[end], book, book.points())


@KERNELS
@pytest.mark.parametrize("count", [1, 7, 1_000_003])
def test_it_writes_every_code_and_nothing_else(name: str, count: int, gpu: torch.device) -> None:
    x = gaussian(count, 1.2).to(gpu)
    expected = getattr(kernels, name)(x)
    for poison in (0, 85, 127):
        guarded = torch.full((expected.numel() + 256,), poison, dtype=expected.dtype, device=gpu)
        kernels._launch(name, x, guarded[128:-128].view(expected.shape))
        assert torch.equal(guarded[128:-128].view(expected.shape), expected)
        assert bool((guarded[:128] == poison).all())
        assert bool((guarded[-128:] == poison).all())


@KERNELS
def test_it_runs_in_the_current_stream(name: str, gpu: torch.device) -> None:
    source = gaussian(100_000).to(gpu)
    expected = getattr(kernels, name)(source)
    x = torch.zeros_like(source)
    stream = torch.cuda.Stream(gpu)
    stream.wait_stream(torch.cuda.current_stream(gpu))
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # a kernel in any other stream would read the zeros
        x.copy_(source)
        codes = getattr(kernels, name)(x)
    stream.synchronize()
    assert torch.equal(codes, expected)


@KERNELS
def test_it_runs_in_a_graph(name: str, gpu: torch.device) -> None:
    x = gaussian(5000).to(gpu)
    function = getattr(kernels, name)
    function(x)  # loading the kernel is not for a capture
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize(gpu)
    with torch.cuda.graph(graph):
        codes = function(x)
    x.copy_(gaussian(5000, seed=1))
    graph.replay()
    assert torch.equal(codes, function(x))


@BOTH
def test_shapes(book: Codebook, gpu: torch.device) -> None:
    x = gaussian(31).to(gpu)
    codes = book.encode(x)
    assert torch.equal(book.encode(x[:30].reshape(2, 3, 5, 8)), codes[:30].reshape(2, 3, 5))
    assert torch.equal(book.candidates(x[:30].reshape(2, 3, 5, 8)), book.candidates(x[:30]).reshape(-1, 2, 3, 5))
    assert torch.equal(book.encode(x.T.contiguous().T), codes)
    assert torch.equal(book.encode(x[::3]), codes[::3])
    unaligned = x.flatten()[2:-6].reshape(30, 8)  # its address is no multiple of 16 bytes
    assert torch.equal(book.encode(unaligned), book.encode(unaligned.clone()))
    assert book.encode(x[0]).shape == ()
    assert book.encode(x[:0]).shape == (0,)
    assert book.encode(x[:0].reshape(3, 0, 8)).shape == (3, 0)
    assert book.candidates(x[:0]).shape == (2 if isinstance(book, E8P) else 1, 0)


@KERNELS
def test_what_is_not_finite_spoils_nothing_else(name: str, gpu: torch.device) -> None:
    x = gaussian(3000).to(gpu)
    expected = getattr(kernels, name)(x)
    spoilt = x.clone()
    spoilt[::3, 2], spoilt[1::6] = torch.nan, torch.inf
    finite = spoilt.isfinite().all(1)
    assert torch.equal(getattr(kernels, name)(spoilt)[..., finite], expected[..., finite])


@KERNELS
def test_other_tensors_are_refused(name: str, gpu: torch.device) -> None:
    for x in (torch.zeros(3, 8), torch.zeros(3, 7, device=gpu), torch.zeros(3, 8, device=gpu, dtype=torch.float64)):
        with pytest.raises(ValueError, match=r"expected float32 \[n, 8\] on a GPU"):
            getattr(kernels, name)(x)


def test_the_codebooks_run_the_kernels(monkeypatch: pytest.MonkeyPatch, gpu: torch.device) -> None:
    names = []
    launch = kernels._launch
    monkeypatch.setattr(kernels, "_launch", lambda name, *rest: names.append(name) or launch(name, *rest))
    x = gaussian(10).to(gpu)
    for book in (E8P(), E81B()):
        book.encode(x)
        book.candidates(x)
    assert names == ["encode_e8p", "candidates_e8p", "encode_e81b", "encode_e81b"]
