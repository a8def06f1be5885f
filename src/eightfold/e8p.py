"""E8P and E81B: the two eight-dimensional lattice codebooks. One code stands for eight weights.

E8P (QuIP#, Tseng et al. 2024, section 4.2) has 65,536 points: 256 patterns of half-integer magnitudes, seven free
signs (the eighth makes the coordinate sum even) and a shift of all coordinates by +1/4 or -1/4. E81B has 256 points
of the lattice E8 around the origin and codes what E8P leaves at the odd rates. The order of the points is normative:
docs/format.md. All tables are computed here; nothing is stored but the choice of 29 patterns, which is arbitrary.
"""

from __future__ import annotations

from functools import cache
from itertools import product

import torch
from torch import Tensor

from eightfold.codebook import Codebook, batches, on_device
from eightfold.cuda import encode as kernels
from eightfold.cuda.linear import supported
from eightfold.e8shell import E8Shell, E8Shell256

# Nibble k of a word is (2 * coordinate + 8); coordinate i sits in nibble NIBBLE[i], and so does its sign bit.
NIBBLE = (0, 4, 1, 5, 2, 6, 3, 7)

# Squared norm 12 has more patterns than the 29 places left after all of squared norm <= 10: these are the chosen ones.
_NORM_12 = """
5b99bb9b 5b9bbb99 5b99bbb9 5bb9bb99 7b9b9bbb 799bbbbb 7b9bb9bb 599b9bbb 5b9b99bb 599bb9bb 7bbb9b9b 79bbbb9b
7bbbb99b 59bb9b9b 5bbb999b 59bbb99b 7bb99bbb 79b9bbbb 7bb9b9bb 59b99bbb 5bb999bb 59bbb9b9 7bbb9bb9 79bbbbb9
7bbbb9b9 59bb9bb9 5bbb99b9 5bb9b9b9 7b9bbb9b
"""


class E8P(Codebook):
    """65,536 points, 2 bits a weight. Code = (pattern << 8) | signs; odd popcount of signs means shift -1/4."""

    name = "e8p"
    bits = 16
    dtype = torch.int16

    def points(self) -> Tensor:
        return _e8p_points()

    def _nearest(self, x: Tensor) -> Tensor:
        codes, distances = self._nearest_of_cosets(x)
        return torch.where(distances[1] < distances[0], codes[1], codes[0])

    def _nearest_by_kernel(self, x: Tensor) -> Tensor:
        return kernels.encode_e8p(x)

    def candidates(self, x: Tensor) -> Tensor:
        """The nearest point of either shift: int16 [2, ...]."""
        rows = x.reshape(-1, 8)
        if supported(x.device):
            return kernels.candidates_e8p(rows).reshape(2, *x.shape[:-1])
        parts = [self._nearest_of_cosets(part)[0] for part in batches(rows)]
        return torch.cat(parts, 1).to(self.dtype).reshape(2, *x.shape[:-1])

    def _nearest_of_cosets(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest point with shift +1/4 and with -1/4: codes int64 [2, n], squared distances float32
        [2, n], less |x|^2 + 1/2.

        With t = x - shift, a point is p with signs, p a pattern; signs as t has them are best, save that the parity of
        the sum may force the cheapest coordinate (least |t_i| p_i) to the other sign:
            |t - w|^2 = |t|^2 - 2 (<|t|, p> - |p|^2 / 2 - [parity wrong] 2 min_i |t_i| p_i).
        Patterns with |p|^2 <= 10 are there in every arrangement and come in seven kinds; the best of a kind sorts its
        magnitudes as |t| is sorted, and its last one is a 1/2, so its penalty is min |t_i|. The 29 patterns of squared
        norm 12 are scored one by one, for the few vectors that lie far enough out.
        """
        t = torch.cat([x - 0.25, x + 0.25])
        magnitude = t.abs()
        negative = t < 0
        odd_signs = (negative.sum(1) & 1).bool()
        ordered, order = magnitude.sort(1, descending=True)
        kinds, digits, half_norms, kind_odd, powers, of_key = (on_device(f, x.device) for f in _KIND_TABLES)
        wrong = odd_signs[:, None] ^ kind_odd
        best, kind = (ordered @ kinds.T - half_norms - ordered[:, 7:] * wrong).max(1)
        pattern = of_key[(powers[order] * digits[kind]).sum(1)]

        far = (ordered @ on_device(_norm_12_bound, x.device) - 6 > best).nonzero()[:, 0]
        far_best, far_pattern = self._nearest_norm_12(magnitude[far], ~odd_signs[far])
        better = far_best > best[far]
        best[far] = torch.where(better, far_best, best[far])
        pattern[far] = torch.where(better, far_pattern, pattern[far])

        patterns, odd = on_device(_patterns, x.device), on_device(_odd, x.device)[pattern]
        cheapest = (magnitude * patterns[pattern]).argmin(1, keepdim=True)
        # Sign bits count from the stored pattern, whose coordinate 7 is negative if its sum is odd.
        flips = negative.scatter(1, cheapest, negative.gather(1, cheapest) ^ (odd_signs ^ odd)[:, None])
        flips[:, 7] ^= odd
        signs = (flips * on_device(_sign_weights, x.device)).sum(1)
        codes = (pattern << 8 | signs).reshape(2, -1)
        codes[1] ^= 1  # the stored signs are of odd number where the shift is -1/4
        # |t|^2 - 2 best = |x|^2 + 1/2 - 2 (best + shift * sum x): without |x|^2, far outliers compare right, too.
        quarter = x.sum(1) / 4
        return codes, -2 * (best.reshape(2, -1) + torch.stack([quarter, -quarter]))

    def _nearest_norm_12(self, magnitude: Tensor, wrong: Tensor) -> tuple[Tensor, Tensor]:
        """Best score and its pattern among the 29 of squared norm 12, whose sums are all odd."""
        patterns = on_device(_patterns, magnitude.device)[227:]
        halves = on_device(_norm_12_halves, magnitude.device)
        # min_i |t_i| p_i, twice: the least |t_i| sits on a 1/2, or it sits on a 3/2.
        penalty = torch.minimum(magnitude[:, halves].amin(2), 3 * magnitude.amin(1, keepdim=True))
        best, pattern = (magnitude @ patterns.T - 6 - penalty * wrong[:, None]).max(1)
        return best, pattern + 227


class E81B(Codebook):
    """256 points of E8, 1 bit a weight: squared norm <= 2, and 15 of the 16 points of norm 4 on the axes."""

    name = "e81b"
    bits = 8
    dtype = torch.uint8

    def points(self) -> Tensor:
        return _e81b_points()

    def _nearest(self, x: Tensor) -> Tensor:
        points = on_device(_e81b_points, x.device)
        return (x @ points.T - points.square().sum(1) / 2).argmax(1)

    def _nearest_by_kernel(self, x: Tensor) -> Tensor:
        return kernels.encode_e81b(x)


def codebook(name: str) -> Codebook:
    """The codebook that files call `name`. Raises ValueError for an unknown one."""
    if name not in _CODEBOOKS:
        raise ValueError(f"expected a codebook out of {sorted(_CODEBOOKS)}, got {name!r}")
    return _CODEBOOKS[name]


_CODEBOOKS = {c.name: c for c in (E8P(), E81B(), E8Shell(), E8Shell256())}


# --- construction ---------------------------------------------------------------------------------------------------


@cache
def pattern_words() -> tuple[int, ...]:
    """The 256 absolute patterns as 32-bit words of nibbles (2 * coordinate + 8), the sum of coordinates made even."""
    words = []
    for p in product((0.5, 1.5, 2.5), repeat=8):  # ascending lexicographic order
        if sum(c * c for c in p) <= 10:
            p = (*p[:7], p[7] if sum(p) % 2 == 0 else -p[7])
            words.append(sum(int(2 * c + 8) << 4 * NIBBLE[i] for i, c in enumerate(p)))
    return (*words, *(int(w, 16) for w in _NORM_12.split()))


@cache
def _signed_patterns() -> Tensor:
    words = torch.tensor(pattern_words())
    nibbles = torch.stack([words >> 4 * k & 15 for k in NIBBLE], 1)
    return (nibbles - 8).float() / 2


@cache
def _sign_weights() -> Tensor:
    return torch.tensor([1 << k for k in NIBBLE])


@cache
def _e8p_points() -> Tensor:
    signs = torch.arange(256)
    bits = signs[:, None] >> torch.tensor(NIBBLE) & 1
    odd = bits.sum(1) & 1
    bits[:, 0] ^= odd  # coordinate 0 sits in bit 0: the flips always are of even number
    points = _signed_patterns()[:, None] * (1 - 2 * bits) + 0.25 - 0.5 * odd[:, None]
    return points.reshape(-1, 8)


@cache
def _e81b_points() -> Tensor:
    """Even-sum integer vectors of squared norm <= 2, even-sum {-1/2, 1/2}^8, +2 e_0 .. +2 e_7, -2 e_0 .. -2 e_6."""
    unit = torch.eye(8, dtype=torch.int64)
    i, j = torch.triu_indices(8, 8, 1)
    pairs = torch.cat([a * unit[i] + b * unit[j] for a in (-1, 1) for b in (-1, 1)])
    integers = sorted([*pairs.tolist(), [0] * 8])  # lexicographic, first coordinate slowest
    halves = [p for p in product((-0.5, 0.5), repeat=8) if sum(p) % 2 == 0]
    axes = 2 * torch.eye(8)
    return torch.cat([torch.tensor(integers).float(), torch.tensor(halves), axes, -axes[:7]])


@cache
def _patterns() -> Tensor:
    return _signed_patterns().abs()


@cache
def _odd() -> Tensor:
    return _patterns().sum(1) % 2 == 1


@cache
def _norm_12_halves() -> Tensor:
    """Where the 29 patterns of squared norm 12 have 1/2: int64 [29, 3]."""
    return (_patterns()[227:] == 0.5).nonzero()[:, 1].reshape(29, 3)


@cache
def _kind_digits() -> Tensor:
    """The seven sorted patterns of squared norm <= 10: how many steps each magnitude is above 1/2, int64 [7, 8]."""
    steps = [[0] * 8] + [[1] * k + [0] * (8 - k) for k in (1, 2, 3, 4)] + [[2] + [0] * 7, [2, 1] + [0] * 6]
    return torch.tensor(steps)


@cache
def _kinds() -> Tensor:
    return _kind_digits() + 0.5


@cache
def _kind_half_norms() -> Tensor:
    return _kinds().square().sum(1) / 2


@cache
def _kind_odd() -> Tensor:
    return _kind_digits().sum(1) % 2 == 1


@cache
def _norm_12_bound() -> Tensor:
    """Sorted magnitudes of a pattern of squared norm 12: no arrangement has a larger product with sorted |t|."""
    return torch.tensor([1.5] * 5 + [0.5] * 3)


@cache
def _powers() -> Tensor:
    return 3 ** torch.arange(8)


@cache
def _pattern_of_key() -> Tensor:
    """Number of the pattern whose magnitudes are 1/2 + digit i of the key to base 3: int64 [3**8], -1 for none."""
    keys = ((_patterns() - 0.5).to(torch.int64) * _powers()).sum(1)
    return torch.full((3**8,), -1).scatter(0, keys, torch.arange(256))


_KIND_TABLES = (_kinds, _kind_digits, _kind_half_norms, _kind_odd, _powers, _pattern_of_key)
