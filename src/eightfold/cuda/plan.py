"""How a linear's work is shared out on a device: slices of the input, chunks to rotate, CTAs of the product.

Plain arithmetic on sizes: nothing here needs a GPU.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, pairwise, product

UNIT = 256  # columns of a unit of work, and coordinates that a warp rotates
TILE = 16  # rows of a unit
MAX_RUNS, MAX_SLICES = 96, 64  # as common.cuh has them
MAX_SLICE = 4096  # columns; the sums of that many products, 11 * 32600 at most each, fit an int32
MAX_FEATURES, MAX_ROWS = 65536, 1 << 19  # of the input; of the output: heads have a row for every word
MOST_UNITS = 5  # of the longest of MAX_SLICES slices of MAX_FEATURES columns: 4, and cuts are up to a unit apart
MATVEC_TOKENS = 16  # most tokens of one launch of matvec
ALONE_TOKENS = 1  # most tokens that matvec rotates by itself: every CTA does, which takes longer than a launch for more
RESERVED = 1024  # bytes of shared memory that CUDA keeps of every CTA
MANY_COPIES = 160 << 10  # bytes of shared memory from which the decode tables have a copy for every lane
TWO_CTAS = 224 << 10  # and from which two CTAs with such tables share a multiprocessor
AHEAD = 4  # units of every warp that go to L2 while one token is rotated; more tokens gain nothing by it
FEW_WEIGHTS = 90_000_000  # up to which launches that overlap matter more than lookups without conflicts


class UnsupportedLayoutError(ValueError):
    """A linear whose rotation blocks the kernels do not take; the dense path does."""


@dataclass(frozen=True, slots=True)
class Stages:
    """How many stages of each codebook a recipe has; whether those of E8P or e8shell come first and those of E81B or
    e8shell256 last. Kernels take at most one of E81B, and no mixture of shells with others."""

    e8p: int
    e81b: int
    shell: int = 0
    shell256: int = 0
    in_order: bool = True

    @property
    def count(self) -> int:
        return self.e8p + self.e81b + self.shells

    @property
    def shells(self) -> int:
        """Stages of E8 shells, which only the dense product takes."""
        return self.shell + self.shell256

    @property
    def tile_bytes(self) -> int:
        """Bytes of the codes of 16 rows by 256 columns."""
        return 1024 * self.e8p + 512 * self.e81b

    @property
    def defines(self) -> dict[str, int]:
        """Macros of the kernels that decode."""
        if self.shells:
            return {"SHELL_STAGES": self.shell, "SHELL256_STAGES": self.shell256}
        return {"E8P_STAGES": self.e8p, "E81B_STAGES": self.e81b}


def table_bytes(stages: Stages, copies: int) -> int:
    """Shared memory up to the end of so many copies of the decode tables, as decode.cuh lays it out."""
    return 1024 + (2 + stages.e81b) * 1024 * copies


@cache
def stages_of(order: tuple[int, ...]) -> Stages:
    """From a number for each stage: 0 for E8P, 1 for E81B, 2 for e8shell, 3 for e8shell256."""
    return Stages(*map(order.count, range(4)), in_order=order == tuple(sorted(order)))


@dataclass(frozen=True, slots=True)
class Variant:
    """One compiled matvec: `tiles` of four tokens each, units of `rows` tiles of weights, `warps` of a CTA, `ctas` that
    share a multiprocessor, `depth` units of weights copied ahead and `ahead` more brought to L2, `copies` of the decode
    tables, `e81b_copies` of that of E81B, `aligned` codes."""

    stages: Stages
    tiles: int
    rows: int
    warps: int
    ctas: int
    depth: int
    ahead: int
    copies: int
    e81b_copies: int
    aligned: bool

    @property
    def tokens(self) -> int:
        """Most tokens of one launch."""
        return 4 * self.tiles

    @property
    def defines(self) -> dict[str, int]:
        return {
            **self.stages.defines,
            "TILES": self.tiles,
            "ROWS": self.rows,
            "WARPS": self.warps,
            "CTAS": self.ctas,
            "DEPTH": self.depth,
            "AHEAD": self.ahead,
            "COPIES": self.copies,
            "E81B_COPIES": self.e81b_copies,
            "ALIGNED": int(self.aligned),
        }

    @property
    def fixed_bytes(self) -> int:
        """Shared memory up to the end of the tables and rings, as decode.cuh and matvec.cu lay it out."""
        rings = self.warps * self.depth * self.rows * self.stages.tile_bytes if self.aligned else 0
        spared = 1024 * self.stages.e81b * (self.copies - self.e81b_copies)
        return table_bytes(self.stages, self.copies) - spared + rings

    def shared_limit(self, shared: int) -> int:
        """Shared memory that each of `ctas` CTAs can have where one alone can have `shared` bytes."""
        return ((shared + RESERVED) // self.ctas - RESERVED) // 16 * 16

    def shared_bytes(self, units: int, tiles: int, tokens: int) -> int:
        """Shared memory of a CTA with `tiles` tiles of rows over `units` units of columns."""
        activations = units * 4 * 8 * tokens * 16
        sums = tiles * self.stages.count * tokens * TILE * 4
        return self.fixed_bytes + activations + 16 + 16 * tokens + sums


@cache
def variant(stages: Stages, tiles: int, shared: int, aligned: bool, few: bool) -> Variant:
    """The matvec for up to 4 * `tiles` tokens where a CTA can have `shared` bytes of shared memory, and for `few`
    weights or more: what measured fastest on an H200 among those whose warps find their registers (65,536 a
    multiprocessor) without spilling."""
    many, two = shared >= MANY_COPIES, shared >= TWO_CTAS
    copies = e81b_copies = 32 if many else 1
    rows = 2 if stages.count * tiles <= 2 and (stages.count == 1 or stages.e81b) else 1
    if tiles == 1 and two and (not stages.e81b or (few and stages.count == 2)):
        warps, ctas = 8, 2
        if stages.e81b:  # lanes meet in this table then, but the next launch fits beside this one
            e81b_copies = 16
    elif many and stages.count * tiles <= (4 if tiles == 2 else 8) and (two or not stages.e81b):
        warps, ctas = 16, 1
    else:
        warps, ctas = 8, 1
    if not aligned and stages.count > 2:  # which loads code after code, and finds no registers otherwise
        warps, ctas = 8, 1
    ring = 4096 if many and stages.count * tiles <= 2 else 2048  # bytes, of a warp
    depth = max(1, ring // (rows * stages.tile_bytes))
    ahead = AHEAD if tiles == 1 and aligned else 0
    for size in ((warps, depth), (warps, 1), (8, 1), (4, 1)):  # until layers of every size have room
        chosen = Variant(stages, tiles, rows, size[0], ctas, size[1], ahead, copies, e81b_copies, aligned)
        if chosen.shared_bytes(MOST_UNITS, rows, 1 if tiles == 1 else chosen.tokens) <= chosen.shared_limit(shared):
            break
    return chosen


def is_few(rows: int, columns: int) -> bool:
    """Whether a padded weight of such a shape is one of `few` weights."""
    return rows * columns <= FEW_WEIGHTS


def variants(shared: int) -> set[Variant]:
    """Every matvec that some layer could ask for."""
    recipes = [Stages(e8p, e81b) for e8p in range(1, 5) for e81b in (0, 1) if e8p + e81b <= 4]
    choices = product(recipes, (1, 2, 4), (False, True), (False, True))
    return {variant(stages, tiles, shared, aligned, few) for stages, tiles, aligned, few in choices}


@dataclass(frozen=True, slots=True)
class Plan:
    """`slices`: borders of the slices; `chunks`: numbers of the slices at which a chunk of whole rotation blocks
    starts, and the number of slices; `ctas` of each slice; `in_registers`: every slice is a chunk of blocks up to UNIT,
    in no more pieces than the warps of a CTA hold."""

    slices: tuple[int, ...]
    chunks: tuple[int, ...]
    ctas: int
    in_registers: bool

    @property
    def count(self) -> int:
        """Number of slices."""
        return len(self.slices) - 1

    @property
    def units(self) -> int:
        """Units of columns that the quantized activations have room for."""
        return self.slices[-1] // UNIT + self.count

    @property
    def buffer(self) -> int:
        """Coordinates of the largest chunk."""
        return max(self.slices[b] - self.slices[a] for a, b in pairwise(self.chunks))


def runs(blocks: Sequence[int]) -> list[tuple[int, int, int]]:
    """Flat [size, count] pairs as (start, end, log2 of the size)."""
    sizes, counts = blocks[::2], blocks[1::2]
    ends = list(accumulate(size * count for size, count in zip(sizes, counts, strict=True)))
    return [(end - s * c, end, s.bit_length() - 1) for end, s, c in zip(ends, sizes, counts, strict=True)]


def check(stages: Stages, rows: int, in_blocks: tuple[int, ...], out_blocks: tuple[int, ...]) -> None:
    """Raise UnsupportedLayoutError for what no kernel takes."""
    if not stages.in_order or (stages.shells and stages.e8p + stages.e81b):
        raise UnsupportedLayoutError(f"expected E8P and then E81B, or e8shell and then e8shell256, got {stages}")
    if not stages.shells and (not 1 <= stages.e8p <= 4 or stages.e81b > 1):
        raise UnsupportedLayoutError(f"expected 1 to 4 stages of E8P and at most one of E81B, got {stages}")
    columns = runs(in_blocks)[-1][1]
    if columns > MAX_FEATURES or rows > MAX_ROWS:
        raise UnsupportedLayoutError(f"expected at most {MAX_ROWS} × {MAX_FEATURES} weights, got {rows} × {columns}")
    if min(in_blocks[::2]) < 8:
        raise UnsupportedLayoutError(f"expected input blocks of at least 8, got {list(in_blocks)}")
    pack_runs(in_blocks)
    pack_runs(out_blocks)


def block_count(blocks: Sequence[int]) -> int:
    """Pieces of the output that are finished on their own: blocks below 256 rows go together, up to 256 rows."""
    return sum(-(-(end - start) // UNIT) for start, end, _ in runs(blocks))


@cache
def pack_runs(blocks: tuple[int, ...]) -> bytes:
    """`struct Runs` of common.cuh. Raises UnsupportedLayoutError for too many."""
    every = runs(blocks)
    if len(every) > MAX_RUNS:
        raise UnsupportedLayoutError(f"expected at most {MAX_RUNS} runs of equal rotation blocks, got {len(every)}")
    flat = [number for start, _, log in every for number in (start, log)]
    flat += [every[-1][1], 0] * (MAX_RUNS - len(every)) + [every[-1][1]]
    return struct.pack(f"<{2 + 2 * MAX_RUNS}i", len(every), *flat)


def pack_borders(borders: Sequence[int]) -> bytes:
    """An array of MAX_SLICES + 1 borders, the last repeated."""
    return struct.pack(f"<{MAX_SLICES + 1}i", *borders, *[borders[-1]] * (MAX_SLICES + 1 - len(borders)))


@cache
def make_plan(blocks: tuple[int, ...], rows: int, variant: Variant, tokens: int, processors: int, shared: int) -> Plan:
    """Cut an input of up to `tokens` tokens with rotation `blocks` (flat pairs) and `rows` output rows for a device
    with `processors` multiprocessors and `shared` bytes of shared memory for a CTA.

    A slice is whole blocks, or part of one block that is longer than a slice can be. More slices fill the device
    better; fewer leave less to add up. The number of slices is the one whose slowest CTA has the least to do.
    Raises UnsupportedLayoutError where nothing fits.
    """
    cuts = _cuts(blocks)
    total = runs(blocks)[-1][1]
    tiles = -(-rows // TILE)
    groups = -(-tiles // variant.rows)
    limit = variant.shared_limit(shared)
    best: tuple[float, Plan] | None = None
    least = -(-total // MAX_SLICE)
    for wanted, resident in product(range(least, MAX_SLICES + 1), range(1, variant.ctas + 1)):
        if best is not None and wanted > 2 * least + 30:
            break
        slices = _even(cuts, total, wanted)
        if any(b - a > MAX_SLICE for a, b in pairwise(slices)) or len(slices) > MAX_SLICES + 1:
            continue
        units = max(-(-(b - a) // UNIT) for a, b in pairwise(slices))
        count = len(slices) - 1
        waves = 1
        while True:
            ctas = min(groups, max(1, waves * processors * resident // count))
            share = -(-groups // ctas) * variant.rows
            size = variant.shared_bytes(units, share, tokens)
            if size <= limit or share == variant.rows:
                break
            waves += 1
        if size > limit:
            continue
        chunks = _chunks(slices, blocks)
        cost = _cost(variant, waves * resident, share, units, count, tokens) + (len(chunks) <= count)
        if resident < variant.ctas:
            cost = 1.2 * cost - 1.0  # fewer warps, but the next launch can start beside this one
        small = len(chunks) == len(slices) and max(blocks[::2]) <= UNIT
        small = small and all(segments(blocks, *borders) <= MAX_SLICE // UNIT for borders in pairwise(slices))
        if best is None or cost < best[0]:
            best = cost, Plan(slices, chunks, ctas, small)
    if best is None:
        raise UnsupportedLayoutError(
            f"expected an input of at most {MAX_SLICES} slices that fit {shared} bytes of shared memory, "
            f"got {total} columns in blocks {list(blocks)}"
        )
    return best[1]


def _cost(variant: Variant, ctas: int, tiles: int, units: int, slices: int, tokens: int) -> float:
    """About the microseconds that a multiprocessor takes for so many CTAs: for their units of weights, for rotating
    their slices, for the slices that a block adds up. From measurements on an H200; only comparisons matter."""
    busy = ctas * units * (0.025 * variant.stages.count * tiles + 0.01 + 0.01 * tokens)
    return busy + 0.15 * slices


def segments(blocks: tuple[int, ...], begin: int, end: int) -> int:
    """Pieces of up to UNIT columns, each inside one run, that warps rotate of the columns [begin, end)."""
    inside = [(max(start, begin), min(stop, end)) for start, stop, _ in runs(blocks)]
    return sum(-(-(stop - start) // UNIT) for start, stop in inside if start < stop)


def _cuts(blocks: tuple[int, ...]) -> list[int]:
    """Where a slice may end: at the end of a block, on a multiple of 64 columns (16 bytes of codes) where there is one;
    and, at a price, every 256 columns inside a block."""
    cuts: list[int] = []
    for start, end, log in runs(blocks):
        step = min(UNIT, 1 << log)
        cuts += range(start + step, end + 1, step)
    even = [cut for cut in cuts if cut % 64 == 0 or cut == cuts[-1]]
    return even if cuts[-1] % 64 == 0 else cuts


def _even(cuts: list[int], total: int, count: int) -> tuple[int, ...]:
    """`count` slices (or fewer) as equal as the cuts let them be."""
    borders = {0, total}
    for i in range(1, count):
        borders.add(min(cuts, key=lambda cut: abs(cut - total * i / count)))
    return tuple(sorted(borders))


def _chunks(slices: tuple[int, ...], blocks: tuple[int, ...]) -> tuple[int, ...]:
    """Numbers of the slices that start on the border of a block, and the number of slices."""
    ends = {0}
    for start, end, log in runs(blocks):
        ends.update(range(start, end + 1, 1 << log))
    return tuple(i for i, start in enumerate(slices) if start in ends)
