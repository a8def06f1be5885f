"""All codebooks: their points against the published check sums, and `encode` against brute force over all points."""

from __future__ import annotations

import zlib
from pathlib import Path

import pytest
import torch
from plain import rotation_matrix
from safetensors.torch import load_file
from torch import Tensor

from eightfold import codebook as codebooks
from eightfold import e8p
from eightfold.codebook import Codebook
from eightfold.e8p import codebook, pattern_words

E8P, E81B = codebook("e8p"), codebook("e81b")
ALL = pytest.mark.parametrize("book", [E8P, E81B, codebook("e8shell"), codebook("e8shell256")], ids=lambda b: b.name)


def gaussian(count: int, scale: float = 1.0, seed: int = 0) -> Tensor:
    return torch.randn(count, 8, generator=torch.Generator().manual_seed(seed)) * scale


def least_distances(x: Tensor, points: Tensor) -> Tensor:
    """Squared distance of each x [n, 8] to the nearest of all points, float64, by looking at all of them.

    float32 products find the few points that can be nearest; float64 decides between these.
    """
    result = []
    for part in x.split(256):
        rough = part @ points.T - points.square().sum(1) / 2
        few = points[rough.topk(min(8, len(points)), 1).indices].double()
        result.append((part[:, None].double() - few).square().sum(2).amin(1))
    return torch.cat(result)


def assert_nearest(book: Codebook, x: Tensor) -> None:
    """The codes of x are those of the nearest points; at a tie in float32, of one of the nearest."""
    points = book.points()
    found = (x.double() - points[numbers(book, book.encode(x))].double()).square().sum(1)
    best = least_distances(x, points)
    # float32 knows |x - p|^2 - |x|^2, about <x, p>, to a few units in the last place.
    assert bool((found - best <= 2e-6 * (1 + x.double().abs().sum(1))).all())


def numbers(book: Codebook, codes: Tensor) -> Tensor:
    """Codes as numbers of points."""
    assert codes.dtype == book.dtype
    return codes.long() & ((1 << book.bits) - 1)


def test_check_sums() -> None:
    words = torch.tensor(pattern_words(), dtype=torch.int64).numpy().astype("<u4")
    assert zlib.crc32(words.tobytes()) == 2980159556
    assert [pattern_words()[i] for i in (0, 1, 2, 255)] == [0x99999999, 0x59999999, 0xD9999999, 0x7B9BBB9B]
    assert zlib.crc32(E8P.points().numpy().astype("<f4").tobytes()) == 2200024200
    assert zlib.crc32(E81B.points().numpy().astype("<f4").tobytes()) == 333791178


def test_named_points() -> None:
    named = {0: [0.75] * 8, 1: [0.25] * 8, 255: [-0.25] * 8}
    named[65535] = [-1.25, -1.25, -0.25, -0.25, -1.25, -1.25, -1.25, 0.75]
    for code, point in named.items():
        assert E8P.points()[code].tolist() == point
    assert sorted(E8P.points()[256].tolist()) == [-1.25] + [0.75] * 7
    axes = torch.eye(8) * 2
    rows = {56: torch.zeros(8), 113: torch.full((8,), -0.5), 240: torch.full((8,), 0.5), 241: axes[0], 255: -axes[6]}
    for row, point in rows.items():
        assert torch.equal(E81B.points()[row], point)


@ALL
def test_points_are_distinct_and_codes_of_themselves(book: Codebook) -> None:
    points = book.points()
    assert points.shape == (1 << book.bits, 8)
    assert points.dtype == torch.float32
    assert len(torch.unique(points, dim=0)) == 1 << book.bits
    codes = book.encode(points)
    assert torch.equal(numbers(book, codes), torch.arange(1 << book.bits))
    assert torch.equal(book.decode(codes), points)


@ALL
@pytest.mark.parametrize("scale", [0.03, 0.5, 1.0, 1.7, 4.0])
def test_encode_is_exact_on_gaussian_inputs(book: Codebook, scale: float) -> None:
    assert_nearest(book, gaussian(1500, scale))


@ALL
def test_encode_is_exact_near_the_borders_of_cells(book: Codebook) -> None:
    # Midpoints of a point and one of its neighbours: on the border of the two, if it is one.
    points = book.points()
    some = points[torch.randperm(len(points), generator=torch.Generator().manual_seed(1))[:192]]
    distances = torch.cdist(some, points)
    distances[distances == 0] = torch.inf
    near = distances.topk(6, 1, largest=False).indices
    middles = ((some[:, None] + points[near]) / 2).reshape(-1, 8)
    assert_nearest(book, middles)
    for noise in (1e-6, 1e-3):
        assert_nearest(book, middles + gaussian(len(middles), noise))


@ALL
@pytest.mark.parametrize("scale", [30.0, 1000.0, 100_000.0])
def test_encode_is_exact_for_far_outliers(book: Codebook, scale: float) -> None:
    assert_nearest(book, gaussian(500, scale))
    spikes = gaussian(500)
    spikes[torch.arange(500), torch.arange(500) % 8] *= scale
    assert_nearest(book, spikes)


@ALL
def test_encode_is_exact_where_coordinates_are_equal_or_zero(book: Codebook) -> None:
    grid = torch.cartesian_prod(*[torch.tensor([-1.0, 0.0, 0.5])] * 4)  # 81 quarters, every tie there is
    assert_nearest(book, torch.cat([grid.repeat(1, 2), grid.repeat_interleave(2, 1), torch.zeros(1, 8)]))
    assert_nearest(book, torch.linspace(-4, 4, 200)[:, None].expand(200, 8))


@ALL
def test_shapes(book: Codebook) -> None:
    x = gaussian(30)
    codes = book.encode(x)
    assert torch.equal(book.encode(x.reshape(2, 3, 5, 8)), codes.reshape(2, 3, 5))
    assert torch.equal(book.encode(x.T.contiguous().T), codes)
    assert torch.equal(book.encode(x[::3]), codes[::3])
    assert book.encode(x[0]).shape == ()
    assert book.encode(torch.empty(0, 8)).shape == (0,)
    assert book.encode(torch.empty(3, 0, 8)).shape == (3, 0)
    assert book.decode(codes.reshape(2, 3, 5)).shape == (2, 3, 5, 8)
    assert book.decode(codes[:0]).shape == (0, 8)


def test_encode_works_in_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    x = gaussian(1000)
    whole, candidates = E8P.encode(x), E8P.candidates(x)
    sizes = []
    nearest = e8p.E8P._nearest
    monkeypatch.setattr(codebooks, "_ENCODE_ROWS", 96)
    monkeypatch.setattr(e8p.E8P, "_nearest", lambda self, part: sizes.append(len(part)) or nearest(self, part))
    assert torch.equal(E8P.encode(x), whole)
    assert torch.equal(E8P.candidates(x), candidates)
    assert max(sizes) == 96


def test_candidates_are_the_nearest_point_of_either_shift() -> None:
    x = gaussian(1000, 1.2)
    up, down = E8P.candidates(x)
    points = E8P.points()
    cosets = [(points - shift) % 1 == 0.5 for shift in (0.25, -0.25)]
    for codes, mine in zip((up, down), cosets, strict=True):
        of_coset = points[mine.all(1)]
        assert len(of_coset) == 1 << 15
        found = (x - E8P.decode(codes)).double().square().sum(1)
        assert torch.allclose(found, least_distances(x, of_coset), rtol=0, atol=1e-5)


def test_unknown_codebook_is_refused() -> None:
    with pytest.raises(ValueError, match="got 'e9'"):
        codebook("e9")


def _glq_rows(words: Tensor) -> Tensor:
    """E8P codes [rows, columns / 8] of GLQ's words [rows / 16, columns / 64, 8, 4] (its bit order)."""
    bits = words[..., None] >> torch.arange(64) & 1
    codes = torch.zeros(*words.shape, 4, dtype=torch.int64)
    for i in range(4):
        for j in range(8):
            codes[..., i] |= bits[..., 8 * i + j] << (8 + j)  # the pattern
            codes[..., i] |= bits[..., 32 + 4 * j + i] << j  # the signs
    I, J, p, q, _ = codes.shape
    by_row = codes.reshape(I, J, p, q, 2, 2).permute(0, 2, 5, 1, 3, 4)  # [I, p, row, J, q, group]
    return by_row.reshape(I * p * 2, J * q * 2)


def _binary_expansion(size: int) -> tuple[int, ...]:
    return tuple(1 << k for k in reversed(range(size.bit_length())) if size >> k & 1)


def test_codes_mean_what_they_mean_in_glq_files(shared: Path) -> None:
    folder = shared / "glq-format" / "a066_3"
    tensors = load_file(folder / "model.safetensors")
    dense = load_file(folder / "expected_dense.safetensors")
    words = tensors["model.layers.0.self_attn.q_proj.Qidxs_e8p"]
    assert _glq_rows(words)[:2, :2].tolist() == [[52873, 48569], [23892, 54271]]
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        part = {key.removeprefix(f"{name}."): t for key, t in tensors.items() if key.startswith(f"{name}.")}
        first = E8P.decode(_glq_rows(part["Qidxs_e8p"]).to(torch.int16)).flatten(1)
        bytes_ = part["Qidxs2_e81b"][..., None] >> (8 * torch.arange(8)) & 255
        second = E81B.decode(bytes_.flatten(1).to(torch.uint8)).flatten(1)
        R = (first + part["inv_resid_scale"] * second).double() * part["Wscale"]
        H_M, H_N = (rotation_matrix(_binary_expansion(size)) for size in R.shape)
        W = H_M @ R @ H_N
        W = part["SU"].double()[:, None] * W * part["SV"].double()
        expected = dense[f"{name}.weight"].double()
        assert torch.allclose(W[: len(expected), : expected.shape[1]], expected, rtol=0, atol=2e-6)
