"""kernels/encode.cu without a GPU: its tables, and its code compiled as C++ against `encode` of the CPU."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import pytest
import torch
from cuda_tables import COORDINATE, KERNELS, decode_tables, encode_tables
from emulate import build
from torch import Tensor

from eightfold.cuda.compiler import read_source
from eightfold.e8p import Codebook, codebook

E8P, E81B = codebook("e8p"), codebook("e81b")

_AFTER = """
#define RUN(kernel)                                                                                     \
    extern "C" void run_##kernel(const void* x, void* codes, long long n, unsigned grid, unsigned block) { \
        gridDim.x = grid, blockDim.x = block;                                                           \
        for (blockIdx.x = 0; blockIdx.x < grid; ++blockIdx.x)                                           \
            for (threadIdx.x = 0; threadIdx.x < block; ++threadIdx.x)                                   \
                kernel(Params{static_cast<const float4*>(x), codes, n});                                \
    }
RUN(encode_e8p) RUN(candidates_e8p) RUN(encode_e81b)
"""

Run = Callable[[str, Tensor], Tensor]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """run(kernel, x): the codes that it writes, by the host's processor."""
    library = build("encode.cu", _AFTER, tmp_path_factory.mktemp("encode"))

    def run(kernel: str, x: Tensor) -> Tensor:
        n = len(x)
        shape, dtype = {
            "encode_e8p": ((n,), torch.int16),
            "candidates_e8p": ((2, n), torch.int16),
            "encode_e81b": ((n,), torch.uint8),
        }[kernel]
        codes = torch.full(shape, 77, dtype=dtype)
        pointers = [ctypes.c_void_p(t.data_ptr()) for t in (x.contiguous(), codes)]
        # Fewer threads than vectors, and a block that is no divisor of anything: strides are tested, too.
        getattr(library, f"run_{kernel}")(*pointers, ctypes.c_longlong(n), ctypes.c_uint(7), ctypes.c_uint(96))
        return codes

    return run


def gaussian(count: int, scale: float, seed: int = 0) -> Tensor:
    return torch.randn(count, 8, generator=torch.Generator().manual_seed(seed)) * scale


def mixed(count: int) -> Tensor:
    """Gaussian vectors at scales 0.3 to 4, a sixteenth of them with one coordinate far out and as many all far out."""
    random = torch.Generator().manual_seed(2)
    x = gaussian(count, 1.0) * (0.3 + 3.7 * torch.rand(count, 1, generator=random))
    some = torch.arange(0, count, 16)
    x[some, some // 16 % 8] *= 1000
    x[some + 1] *= 300
    return x


def squared_distances(x: Tensor, points: Tensor) -> Tensor:
    return (x.double() - points.double()).square().sum(-1)


def assert_as_near(x: Tensor, found: Tensor, expected: Tensor) -> None:
    """Points as near to x as the expected ones, but for rounding: float32 knows <x, p> to a few units in the last
    place."""
    difference = squared_distances(x, found) - squared_distances(x, expected)
    assert bool((difference <= 2e-6 * (1 + x.double().abs().sum(1))).all())


def test_the_header_is_what_the_tables_give() -> None:
    assert (KERNELS / "encode_tables.cuh").read_text() == encode_tables()
    assert (KERNELS / "decode_tables.cuh").read_text() == decode_tables()


def test_the_kernel_loads_coordinates_in_the_order_of_the_nibbles() -> None:
    loads = [f"x[{k}] = {'ab'[c // 4]}.{'xyzw'[c % 4]}" for k, c in enumerate(COORDINATE)]
    assert ", ".join(loads) in read_source("encode.cu")


@pytest.mark.parametrize("book", [E8P, E81B], ids=lambda b: b.name)
def test_encode_is_that_of_the_cpu(run: Run, book: Codebook) -> None:
    x = mixed(200_000)
    codes, expected = run(f"encode_{book.name}", x), book.encode(x)
    assert float((codes == expected).double().mean()) > 0.9999
    assert_as_near(x, book.decode(codes), book.decode(expected))
    assert_as_near(x, book.decode(expected), book.decode(codes))


def test_candidates_are_those_of_the_cpu(run: Run) -> None:
    x = mixed(200_000)
    codes, expected = run("candidates_e8p", x), E8P.candidates(x)
    assert float((codes == expected).double().mean()) > 0.9999
    for found, cpu, shift in zip(codes, expected, (0.25, -0.25), strict=True):
        assert bool(((E8P.decode(found) - shift) % 1 == 0.5).all())
        assert_as_near(x, E8P.decode(found), E8P.decode(cpu))


@pytest.mark.parametrize("book", [E8P, E81B], ids=lambda b: b.name)
def test_points_are_codes_of_themselves(run: Run, book: Codebook) -> None:
    points = book.points()
    codes = run(f"encode_{book.name}", points)
    assert torch.equal(codes.long() & ((1 << book.bits) - 1), torch.arange(1 << book.bits))


@pytest.mark.parametrize("book", [E8P, E81B], ids=lambda b: b.name)
def test_it_is_exact_where_coordinates_are_equal_or_zero_or_huge(run: Run, book: Codebook) -> None:
    grid = torch.cartesian_prod(*[torch.tensor([-1.0, 0.0, 0.5])] * 4)  # 81 quarters, every tie there is
    steps = torch.linspace(-4, 4, 200)[:, None].expand(200, 8)
    halves = gaussian(20_000, 1.5, seed=3).mul(4).round() / 4  # borders of cells, and the points themselves
    huge = torch.cat([gaussian(500, scale) for scale in (30.0, 1000.0, 100_000.0)])
    x = torch.cat([grid.repeat(1, 2), grid.repeat_interleave(2, 1), torch.zeros(1, 8), steps, halves, huge])
    assert_as_near(x, book.decode(run(f"encode_{book.name}", x)), book.decode(book.encode(x)))


@pytest.mark.parametrize("kernel", ["encode_e8p", "candidates_e8p", "encode_e81b"])
def test_what_is_not_finite_spoils_nothing_else(run: Run, kernel: str) -> None:
    x = mixed(960)
    expected = run(kernel, x)
    spoilt = x.clone()
    spoilt[::3, 2], spoilt[1::6] = torch.nan, torch.inf
    finite = spoilt.isfinite().all(1)
    assert torch.equal(run(kernel, spoilt)[..., finite], expected[..., finite])


@pytest.mark.parametrize("kernel", ["encode_e8p", "candidates_e8p", "encode_e81b"])
@pytest.mark.parametrize("count", [0, 1, 7])
def test_few_vectors(run: Run, kernel: str, count: int) -> None:
    x = mixed(960)
    assert torch.equal(run(kernel, x[:count]), run(kernel, x)[..., :count])
