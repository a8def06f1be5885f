"""How the products for 17 and more tokens share out a layer: rows and tokens of a CTA, and who has which steps.

Plain arithmetic on sizes: nothing here needs a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

from eightfold.cuda.plan import MAX_ROWS, TILE, Stages, UnsupportedLayoutError, table_bytes

GEMM_TOKENS = (32, 64, 128)  # of a tile of gemm
GEMM_COLUMNS = 64  # of one of its steps
FEW_ROWS = 6144  # up to which its CTAs have fewer
WGMMA_TOKENS = (128, 256)  # of a tile of wgmma; gemm is as fast for fewer
COPIES = 32  # of the decode tables in wgmma


@dataclass(frozen=True, slots=True)
class Gemm:
    """One compiled gemm: `tokens` of a tile, `tiles` of 16 rows that each of a CTA's `warps` has, `ctas` that share a
    multiprocessor, `depth` slots for the steps that are on their way, `copies` of the decode tables."""

    stages: Stages
    tokens: int
    tiles: int
    warps: int
    ctas: int
    depth: int
    copies: int

    @property
    def source(self) -> str:
        """Name of the kernel, and of its file without the ending."""
        return "gemm"

    @property
    def threads(self) -> int:
        """Of a CTA."""
        return 32 * self.warps

    @property
    def step_time(self) -> float:
        """About the microseconds of a step; only comparisons matter."""
        return self.warps * self.tiles * (0.012 + 0.008 * self.stages.count + 0.0003 * self.tokens)

    @property
    def defines(self) -> dict[str, int]:
        return {
            **self.stages.defines,
            "TOKENS": self.tokens,
            "M_TILES": self.tiles,
            "WARPS": self.warps,
            "CTAS": self.ctas,
            "DEPTH": self.depth,
            "COPIES": self.copies,
        }

    @property
    def rows(self) -> int:
        """Of a CTA."""
        return TILE * self.tiles * self.warps

    @property
    def slot_bytes(self) -> int:
        """Of one step: activations, codes, and two barriers."""
        codes = 256 * self.stages.e8p + 128 * self.stages.e81b
        return 2 * GEMM_COLUMNS * self.tokens + self.tiles * self.warps * codes + 16

    @property
    def shared_bytes(self) -> int:
        return table_bytes(self.stages, self.copies) + self.depth * self.slot_bytes


@cache
def gemm_variant(stages: Stages, tokens: int, shared: int, rows: int = MAX_ROWS) -> Gemm:
    """The gemm for so many tokens and rows where a CTA can have `shared` bytes: as many warps as find their registers
    without spilling, fewer for few rows, whose tiles fewer CTAs then share; tables for every lane if that leaves room
    for three steps."""
    tile = next((tile for tile in GEMM_TOKENS if tokens <= tile), GEMM_TOKENS[-1])
    warps = 8 if tile > 32 or rows <= FEW_ROWS else 12 if stages.count > 3 else 16
    for copies, least in ((32, 3), (1, 2)):
        one = Gemm(stages, tile, 2, warps, 1, 1, copies)
        depth = min(8, (shared - table_bytes(stages, copies)) // one.slot_bytes)
        if depth >= least:
            return replace(one, depth=depth)
    raise UnsupportedLayoutError(f"expected {one.shared_bytes + one.slot_bytes} bytes of shared memory, got {shared}")


@dataclass(frozen=True, slots=True)
class Wgmma:
    """One compiled wgmma: `tokens` of a tile, `tiles` of 16 rows that each warp of a CTA's `groups` warpgroups has,
    `depth` slots for the steps that are on their way."""

    stages: Stages
    tokens: int
    tiles: int
    groups: int
    depth: int
    ctas: int = 1

    @property
    def source(self) -> str:
        """As for Gemm."""
        return "wgmma"

    @property
    def threads(self) -> int:
        """Of a CTA: one more warpgroup copies."""
        return 128 * (self.groups + 1)

    @property
    def defines(self) -> dict[str, int]:
        return {
            **self.stages.defines,
            "TOKENS": self.tokens,
            "M_TILES": self.tiles,
            "GROUPS": self.groups,
            "DEPTH": self.depth,
            "COPIES": COPIES,
        }

    @property
    def rows(self) -> int:
        """Of a CTA."""
        return 64 * self.tiles * self.groups

    @property
    def slot_bytes(self) -> int:
        """Of one step: activations, codes, and two barriers."""
        codes = 256 * self.stages.e8p + 128 * self.stages.e81b
        return 2 * GEMM_COLUMNS * self.tokens + 4 * self.groups * self.tiles * codes + 16

    @property
    def shared_bytes(self) -> int:
        return table_bytes(self.stages, COPIES) + self.depth * self.slot_bytes

    @property
    def step_time(self) -> float:
        """As for Gemm: the tensor cores', or that of issuing the instructions that decode."""
        product, decode = 0.05 * self.tokens, 0.04 * (24 + 64 * self.stages.count)
        return self.rows * max(product, decode) / 1700


@cache
def wgmma_variant(stages: Stages, tokens: int, shared: int) -> Wgmma:
    """The wgmma for so many tokens where a CTA can have `shared` bytes of shared memory: what measured fastest."""
    tile = next((tile for tile in WGMMA_TOKENS if tokens <= tile), WGMMA_TOKENS[-1])
    one = Wgmma(stages, tile, 2 if tile == 128 else 1, 2, 1)
    return replace(one, depth=min(8, (shared - table_bytes(stages, COPIES)) // one.slot_bytes))


Product = Gemm | Wgmma


@cache
def share_steps(chosen: Product, rows: int, columns: int, token_tiles: int, processors: int) -> tuple[int, int]:
    """Among how many CTAs the steps of every row tile of a padded weight are to be cut for each tile of
    tokens, and the most that then share a row tile, which is the number of slices to add up."""
    tiles, steps = -(-rows // chosen.rows), columns // GEMM_COLUMNS
    most = min(tiles * steps, max(1, processors * chosen.ctas // token_tiles))
    # Some end with row tiles: fewer slices. All there can be have the least to do each.
    numbers = {most, *range(tiles, most + 1, tiles), *(n for n in range(1, min(tiles, most) + 1) if tiles % n == 0)}
    step = chosen.step_time
    add = 0.05 + 4e-6 / 3 * rows * chosen.tokens * token_tiles

    def cost(ctas: int) -> float:  # about the microseconds; a CTA that goes on to another row tile stores twice
        turn = 2.5 if ctas % tiles and tiles % ctas else 0.0
        return -(-tiles * steps // ctas) * step + _slices(tiles, steps, ctas) * add + turn

    best = min(sorted(numbers), key=cost)
    return best, _slices(tiles, steps, best)


def _slices(tiles: int, steps: int, ctas: int) -> int:
    """The most of `ctas` that share a row tile: step u is that of CTA ((u + 1) ctas - 1) / (tiles steps)."""

    def owner(u: int) -> int:
        return ((u + 1) * ctas - 1) // (tiles * steps)

    return max(owner((tile + 1) * steps - 1) - owner(tile * steps) for tile in range(tiles)) + 1
