"""What the host does for the kernels of a linear, without a GPU: plans, parameters and order of launches, workspace."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import logging
import random
import re
from functools import cache
from itertools import chain, pairwise, product
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from packing import random_packed

from eightfold import linear as layers
from eightfold.cuda import dense, gemm
from eightfold.cuda import linear as host
from eightfold.cuda import plan as planning
from eightfold.cuda import rotate as rotations
from eightfold.cuda.compiler import KERNELS
from eightfold.cuda.gemm import LEAST_WGMMA, MOST_GEMM, MOST_OVERLAP, MOST_WGMMA, MOST_WGMMA_FEW
from eightfold.cuda.gemm_plan import FEW_ROWS, GEMM_TOKENS, WGMMA_TOKENS, gemm_variant, share_steps, wgmma_variant
from eightfold.cuda.linear import MOST_FINISHED, MOST_MATVEC
from eightfold.cuda.plan import (
    ALONE_TOKENS,
    MATVEC_TOKENS,
    MAX_RUNS,
    MAX_SLICE,
    MAX_SLICES,
    MOST_UNITS,
    TILE,
    UNIT,
    Plan,
    Stages,
    UnsupportedLayoutError,
    block_count,
    check,
    make_plan,
    pack_borders,
    pack_runs,
    runs,
    variant,
    variants,
)
from eightfold.cuda.weight import Weight, can_tile, tile, untile
from eightfold.format import BITS, LayerSpec
from eightfold.linear import QuantLinear
from eightfold.rotation import IN_FLOOR, layout_blocks, rotate, run_lengths

DEVICES = {232448: 132, 166912: 108, 101376: 128}  # bytes of shared memory of a CTA: multiprocessors
CLASS_OF = {1: 1, 2: 8, 4: 16}  # tiles: tokens that a plan is made for
BIASES = {None: 0, "float16": 0, "bfloat16": 1, "float32": 2}
MACROS = {"MAX_RUNS": MAX_RUNS, "MAX_SLICES": MAX_SLICES}


def flat(blocks) -> tuple[int, ...]:
    return tuple(number for run in run_lengths(blocks) for number in run)


@cache
def source(file: str) -> str:
    return re.sub(r"//[^\n]*", "", (KERNELS / file).read_text(encoding="utf-8"))


def c_struct(file: str, name: str, stages: int = 0) -> type[ctypes.Structure]:
    """A struct of the kernels' sources, field for field as it stands there."""
    types = {"int": ctypes.c_int32, "u32": ctypes.c_uint32, "long long": ctypes.c_int64}
    body = re.search(rf"struct {name} {{(.*?)}};", source(file), re.DOTALL)[1]
    fields = []
    for line in filter(None, (part.strip() for part in body.split(";"))):
        base, names = re.fullmatch(r"((?:const )?(?:long long|\w+)\s?\*?) ?(.+)", line, re.DOTALL).groups()
        if base.strip() == "Runs":
            kind = c_struct("common.cuh", "Runs")
        else:
            kind = ctypes.c_uint64 if base.endswith("*") else types[base.strip()]
        for field in names.split(","):
            field, _, size = field.strip().rstrip("]").partition("[")
            count = sum((MACROS | {"STAGES": stages}).get(x) or int(x) for x in size.split(" + ")) if size else 0
            fields.append((field, kind * count if count else kind))
    return type(name, (ctypes.Structure,), {"_fields_": fields})


STRUCTS = {
    "quantize_input": ("rotate.cu", "QuantizeParams"),
    "quantize_wide_input": ("rotate.cu", "QuantizeParams"),
    "rotate_input": ("rotate.cu", "RotateParams"),
    "rotate_output": ("rotate.cu", "RotateParams"),
    "rotate_wide_input": ("rotate.cu", "RotateParams"),
    "rotate_wide_output": ("rotate.cu", "RotateParams"),
    "matvec": ("matvec.cu", "Params"),
    "rotate_input_tiled": ("rotate.cu", "RotateParams"),
    "gemm": ("gemm.cu", "Params"),
    "wgmma": ("wgmma.cu", "Params"),
    "dense_float16": ("dense.cu", "Params"),
    "dense_bfloat16": ("dense.cu", "Params"),
    "dequantize": ("dequantize.cu", "Params"),
    "dequantize_shell": ("shell.cu", "Params"),
}


class Launch(NamedTuple):
    name: str
    defines: dict[str, int]
    shared: int
    grid: int | tuple[int, int, int]
    block: int
    p: ctypes.Structure
    stream: int
    overlap: bool


class FakeGpu:
    """Stands for device 0: keeps what is loaded and launched. Tensors are the CPU's."""

    def __init__(self) -> None:
        self.processors, self.shared, self.old = 132, 232448, False
        self.stream, self.capturing = 7, False
        self.loads: list[tuple] = []
        self.launches: list[Launch] = []
        self.pieces: list[tuple[int, int]] = []  # of workspace: address, bytes
        self.waits: list[int] = []  # for streams
        self._kernels: dict[tuple, SimpleNamespace] = {}

    @property
    def arch(self) -> int:
        return 75 if self.old else {232448: 90, 166912: 80, 101376: 89}[self.shared]

    def load(self, file, name, device, shared=0, **defines):
        key = (file, name, device, shared, *sorted(defines.items()))
        if key not in self._kernels:
            assert shared <= self.shared
            self.loads.append(key)
            stages = sum(count for key, count in defines.items() if key.endswith("_STAGES"))
            kind = c_struct(*STRUCTS[name], stages)
            assert STRUCTS[name][0] == file

            def launch(grid, block, params, stream, overlap=False):
                assert len(params) == ctypes.sizeof(kind)
                assert len(params) % 8 == 0
                p = kind.from_buffer_copy(params)
                self.launches.append(Launch(name, defines, shared, grid, block, p, stream, overlap))

            self._kernels[key] = SimpleNamespace(launch=launch)
        return self._kernels[key]

    def current_stream(self, device) -> SimpleNamespace:
        return SimpleNamespace(cuda_stream=self.stream, synchronize=lambda: self.waits.append(self.stream))

    def names(self) -> list[str]:
        return [launch.name for launch in self.launches]


@pytest.fixture
def gpu(monkeypatch):
    fake = FakeGpu()
    caches = (host._supported, host._takes, host._counters_of)
    workspace = host._workspace

    def recorded(device, *sizes):
        found = workspace(device, *sizes)
        fake.pieces = list(zip(found[1], sizes, strict=True))
        return found

    for module in (host, gemm):
        monkeypatch.setattr(module, "arch", lambda device: fake.arch)
    for module in (host, rotations, dense, gemm):
        monkeypatch.setattr(module, "load", fake.load)
        monkeypatch.setattr(module, "sm_count", lambda device: fake.processors)
        monkeypatch.setattr(module, "_index", lambda device: 0)
    for module in (host, rotations, dense, gemm):
        monkeypatch.setattr(module, "max_shared", lambda device: fake.shared)
    monkeypatch.setattr(host, "_workspace", recorded)
    monkeypatch.setattr(host._Counters, "_zeros", lambda self, count: torch.zeros(count, dtype=torch.int32))
    monkeypatch.setattr(torch.cuda, "current_stream", fake.current_stream)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: fake.capturing)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Fake")
    for cached in caches:
        cached.cache_clear()
    yield fake
    for cached in caches:
        cached.cache_clear()


def packed_for(n=200, k=960, bits=3, in_blocks=None, out_blocks=None, bias=None, scale=torch.float16, family="e8p"):
    out_blocks = out_blocks or layout_blocks(n, "pow2-sum-256", 16)
    in_blocks = in_blocks or layout_blocks(k, "pow2-sum-256", 64)
    return random_packed(LayerSpec(n, k, bits, out_blocks, in_blocks, bias), scale=scale, family=family)


def weight_of(packed, tiled=False) -> Weight:
    codes = [tile(c) for c in packed.codes] if tiled else list(packed.codes)
    ratios = torch.tensor(packed.recipe.ratios)
    blocks = flat(packed.spec.in_blocks), flat(packed.spec.out_blocks)
    return Weight(codes, ratios, packed.scale_in, packed.scale_out, *blocks)


def activations(tokens, k=960, dtype=torch.float16):
    return torch.randn(tokens, k).to(dtype)


def address(tensor) -> int:
    return tensor.data_ptr()


def raw(struct, name) -> bytes:
    return bytes(getattr(struct, name))


# --- the kernels' sources


def evaluate(expression: str, names: dict[str, int]) -> int:
    """An expression of the sources on natural numbers, as C has it."""
    while inner := re.search(r"\(([^()]*)\)", expression):
        expression = expression.replace(inner[0], str(evaluate(inner[1], names)))
    condition, conditional, branches = expression.partition("?")
    if conditional:
        yes, _, no = branches.partition(":")
        return evaluate(yes if evaluate(condition, names) else no, names)
    return int(eval(expression.replace("/", "//"), {}, names))


def constants(defines: dict[str, int], *files: str) -> dict[str, int]:
    """Macros, and integer constants at the outermost level of files in an order that defines them."""
    names = dict(defines)
    for file in files:
        for line in re.findall(r"^constexpr (?:int|u32) ([^;]+);", source(file), re.MULTILINE):
            for name, expression in re.findall(r"(\w+) = ([^,]+)", line):
                names[name] = evaluate(re.sub(r"\b(0x\w+)u\b", r"\1", expression), names)
    return names


@cache
def matvec_constants(chosen) -> dict[str, int]:
    """Those of matvec.cu and its headers."""
    return constants(chosen.defines, "common.cuh", "quantize.cuh", "decode.cuh", "matvec.cu", "units.cuh")


def matvec_bytes(chosen, units: int, tiles: int, tokens: int) -> int:
    """Shared memory of a CTA of matvec up to the end of its sums, by the pointers in its source."""
    text = re.sub(r"reinterpret_cast<\w+\*>\(([^;]*)\);", r"\1;", source("matvec.cu"))
    bytes_of = {"uint4": 16, "u32": 4, "float": 4, "u8": 1}
    names = matvec_constants(chosen) | {"units": units, "tokens": tokens, "shared": 0}
    names["words"] = evaluate(re.search(r"const int words = ([^;]*);", text)[1], names)
    kinds = {"shared": "u8"}
    for name in ("activations", "reduced", "factors", "sums"):
        kinds[name], base, offset = re.search(rf"(\w+)\* const {name} = (\w+) \+ ([^;]*);", text).groups()
        names[name] = names[base] + bytes_of[kinds[base]] * evaluate(offset, names)
        assert names[name] % bytes_of[kinds[name]] == 0
    assert names["factors"] + 8 * tokens == names["sums"]  # a word a token is not used
    assert names["sums"] % 16 == 0
    # The barrier of the bulk copies lies between the activations and what is reduced.
    arrived = re.search(r"arrived = activations_at \+ ([^;]*);", text)[1]
    assert names["reduced"] == names["activations"] + evaluate(arrived, names) + 16
    return names["sums"] + 4 * tiles * chosen.stages.count * tokens * TILE


# --- plan.py


def test_constants_are_those_of_the_kernels():
    names = matvec_constants(variant(Stages(2, 0), 2, 232448, True, False))
    ours = {"SEGMENT": UNIT, "MAX_RUNS": MAX_RUNS, "MAX_SLICES": MAX_SLICES, "MAX_SLICE": MAX_SLICE}
    assert {name: names[name] for name in ours} == ours
    assert "constexpr bool ALONE = TILES == 1;" in source("matvec.cu")
    assert CLASS_OF[1] == ALONE_TOKENS
    assert f"THREADS = {rotations.THREADS};" in source("rotate.cu")
    assert 11 * 32600 * MAX_SLICE < 1 << 31
    enum = re.search(r"enum Dtype {(.*?)}", source("common.cuh"))[1]
    assert dict(re.findall(r"(\w+) = (\d)", enum)) == {"FLOAT16": "0", "BFLOAT16": "1", "FLOAT32": "2"}
    assert list(host.DTYPES.items()) == [(torch.float16, 0), (torch.bfloat16, 1), (torch.float32, 2)]


def test_runs():
    assert runs([256, 3]) == [(0, 768, 8)]
    assert runs((256, 2, 64, 1, 8, 3)) == [(0, 512, 8), (512, 576, 6), (576, 600, 3)]


def test_packed_runs_and_borders():
    packed = pack_runs((256, 2, 64, 1))
    assert len(packed) == 4 * (1 + 97 + 96) == ctypes.sizeof(c_struct("common.cuh", "Runs"))
    found = c_struct("common.cuh", "Runs").from_buffer_copy(packed)
    assert found.count == 2
    assert list(found.at) == [0, 8, 512, 6] + [576, 0] * 94 + [576]
    borders = pack_borders((0, 5, 9))
    assert list((ctypes.c_int32 * 65).from_buffer_copy(borders)) == [0, 5] + [9] * 63
    assert len(borders) == 4 * 65
    assert len(pack_runs(flat((16, 32) * 48))) == len(packed)
    assert len(pack_borders(range(65))) == len(borders)


def test_block_count():
    assert block_count((256, 3)) == 3
    assert block_count((16, 17)) == 2  # 272 rows: 256 go together
    assert block_count((128, 2, 64, 1, 16, 1)) == 3
    assert block_count((1, 7)) == 1
    most = flat((32, 16) * 48)
    assert block_count(most) <= host._Counters.EACH
    assert host._Counters.EACH >= planning.MAX_ROWS // UNIT + MAX_RUNS


@pytest.mark.parametrize("stages", [Stages(0, 1), Stages(5, 0), Stages(2, 2)])
def test_recipes_that_no_kernel_takes(stages):
    with pytest.raises(UnsupportedLayoutError, match="1 to 4 stages of E8P"):
        check(stages, 16, (64, 1), (16, 1))


def test_layouts_that_no_kernel_takes():
    stages = Stages(1, 0)
    check(stages, 65536, (64, 1024), (16, 4096))
    for rows, blocks in ((planning.MAX_ROWS + 16, (64, 1)), (16, (64, 1025))):
        with pytest.raises(UnsupportedLayoutError, match="at most 524288 × 65536 weights"):
            check(stages, rows, blocks, (16, 1))
    many = flat((128, 64) * 49)
    for sides in ((many, (16, 1)), ((64, 1), many)):
        with pytest.raises(UnsupportedLayoutError, match="at most 96 runs"):
            check(stages, 16, *sides)


def random_layouts(seed: int) -> list[tuple[tuple[int, ...], int]]:
    """Input blocks (flat) and rows."""
    rng = random.Random(seed)
    found = []
    while len(found) < 40:
        blocks = tuple(1 << rng.randint(3, 15) for _ in range(rng.randint(1, 12)))
        if rng.random() < 0.7:
            blocks = tuple(sorted(blocks, reverse=True))
        if sum(blocks) <= 65536:
            found.append(
                (flat(blocks), rng.choice([1, 15, 16, 17, 65536, rng.randint(1, 65536), 16 * rng.randint(1, 512)]))
            )
    for _ in range(40):
        shards = rng.choice([1, 2, 4, 8])
        size = 64 * shards * rng.randint(1, 1024 // shards)
        layout = rng.choice(["pow2-sum-256", "pow2-sum-256", "pow2-sum", "pow2-sum-2048", "equal", "equal-256"])
        found.append((flat(layout_blocks(size, layout, IN_FLOOR, shards)), 16 * rng.randint(1, 4096)))
    return found


def warp_segments(blocks, plan: Plan) -> int:
    """Most segments that `find_segment` makes of a slice."""

    def of(low: int, high: int) -> int:
        parts = ((max(low, start), min(high, end)) for start, end, _ in runs(blocks))
        return sum(-(-(b - a) // UNIT) for a, b in parts if a < b)

    return max(of(low, high) for low, high in pairwise(plan.slices))


def warp_room() -> int:
    """Segments of a token that the warps of a CTA hold, as the source says."""
    (segments,) = re.findall(r"Values<CTA_WARPS, (\w+ / \w+)> values;", source("quantize.cuh"))
    return evaluate(segments, {"MAX_SLICE": MAX_SLICE, "SEGMENT": UNIT})


def check_plan(plan: Plan, blocks, rows, chosen, shared) -> None:
    total, tiles = sum(size * count for size, count in zip(blocks[::2], blocks[1::2], strict=True)), -(-rows // TILE)
    tokens = CLASS_OF[chosen.tiles]
    lengths = [b - a for a, b in pairwise(plan.slices)]
    assert plan.slices[0] == 0
    assert plan.slices[-1] == total
    assert min(lengths) > 0
    assert max(lengths) <= MAX_SLICE
    assert plan.count == len(lengths) <= MAX_SLICES
    assert all(start % (64 if total % 64 == 0 else 8) == 0 for start in plan.slices[:-1])
    groups = -(-tiles // chosen.rows)
    assert 1 <= plan.ctas <= groups
    units = max(-(-length // UNIT) for length in lengths)
    share = min(-(-groups // plan.ctas) * chosen.rows, tiles)  # most tiles of a CTA: shares are even
    assert matvec_bytes(chosen, units, share, tokens) <= chosen.shared_limit(shared)
    assert chosen.ctas * (chosen.shared_limit(shared) + 1024) <= shared + 1024

    ends = {0} | {end for start, stop, log in runs(blocks) for end in range(start, stop + 1, 1 << log)}
    assert plan.chunks == tuple(i for i, start in enumerate(plan.slices) if start in ends)
    assert plan.chunks[0] == 0
    assert plan.chunks[-1] == plan.count
    if plan.in_registers:
        assert all(start in ends for start in plan.slices)
        assert max(blocks[::2]) <= UNIT
        assert warp_segments(blocks, plan) <= warp_room()
    assert plan.buffer == max(plan.slices[b] - plan.slices[a] for a, b in pairwise(plan.chunks))
    for start, stop, log in runs(blocks):  # hadamard_segment takes whole blocks, or whole 256ths of one
        assert all((border - start) % min(UNIT, 1 << log) == 0 for border in plan.slices if start <= border <= stop)

    room = 0  # of the quantized activations, in units
    for number, (start, length) in enumerate(zip(plan.slices, lengths, strict=False)):
        at = (start >> 8) + number
        assert at >= room
        room = at + -(-length // UNIT)
    assert room <= plan.units


def plan_of(blocks, rows, chosen, shared) -> Plan:
    """The plan that the host makes, on a device of this shared memory; not the one it keeps."""
    return make_plan.__wrapped__(blocks, rows, chosen, CLASS_OF[chosen.tiles], DEVICES[shared], shared)


def aligned_variants(shared):
    """Those that take more shared memory."""
    return sorted((chosen for chosen in variants(shared) if chosen.aligned), key=repr)


@pytest.mark.parametrize("shared", DEVICES)
@pytest.mark.parametrize("seed", range(2))
def test_plans_of_random_layouts(shared, seed):
    rng, choices = random.Random(seed), sorted(variants(shared), key=repr)
    planned = 0
    for blocks, rows in random_layouts(seed):
        chosen = rng.choice(choices)
        try:
            plan = plan_of(blocks, rows, chosen, shared)
        except UnsupportedLayoutError:
            continue
        check_plan(plan, blocks, rows, chosen, shared)
        planned += 1
    assert planned > 60


@pytest.mark.parametrize("shared", DEVICES)
@pytest.mark.parametrize(("rows", "columns", "shards"), [
    (16, 64, 1), (4096, 4096, 1), (4096, 11008, 1), (28672, 8192, 8), (8192, 28672, 8), (65536, 4096, 1),
    (16, 65536, 1), (65536, 64, 1), (65536, 65536, 1), (16, 65472, 1), (65536, 65024, 8),
])  # fmt: skip
def test_every_variant_has_a_plan_for_default_layouts(shared, rows, columns, shards):
    blocks = flat(layout_blocks(columns, "pow2-sum-256", IN_FLOOR, shards))
    for chosen in aligned_variants(shared):
        plan = plan_of(blocks, rows, chosen, shared)
        check_plan(plan, blocks, rows, chosen, shared)
        if columns in (4096, 8192, 28672, 65536):
            assert plan.in_registers


@pytest.mark.parametrize("seed", range(4))
def test_the_longest_slice_of_a_default_layout(seed):
    """MOST_UNITS, which decides whether variants have room, holds for every layout of a checkpoint."""
    rng = random.Random(seed)
    for layout in ("pow2-sum-256", "pow2-sum", "pow2-sum-2048", "equal", "equal-256"):
        shards = rng.choice([1, 2, 4, 8])
        columns = 64 * shards * (1024 // shards - rng.randint(0, 40 // shards))
        blocks = flat(layout_blocks(columns, layout, IN_FLOOR, shards))
        slices = planning._even(planning._cuts(blocks), columns, MAX_SLICES)
        assert max(b - a for a, b in pairwise(slices)) <= MOST_UNITS * UNIT
        for shared in DEVICES:
            chosen = rng.choice(aligned_variants(shared))
            check_plan(plan_of(blocks, 65536, chosen, shared), blocks, 65536, chosen, shared)


@pytest.mark.parametrize("shared", DEVICES)
@pytest.mark.parametrize(("columns", "shards"), [(3584, 8), (4032, 1), (2016, 1), (1984, 1)])
def test_warps_hold_every_segment_of_a_slice(columns, shards, shared):
    """matvec rotates a token with Values: room for as many segments of 256 as a slice of one run can have."""
    blocks = flat(layout_blocks(columns, "pow2-sum-256", IN_FLOOR, shards))
    plan = plan_of(blocks, 4096, variant(Stages(1, 1), 1, shared, True, True), shared)
    assert not plan.in_registers or warp_segments(blocks, plan) <= warp_room()


def test_slices_start_at_codes():
    """The format takes input blocks below 8; a slice starts at a code, and so does every run that matvec rotates."""
    for blocks in ((4, 2002), (4, 1, 8, 1, 4, 1)):
        with pytest.raises(UnsupportedLayoutError):
            check(Stages(1, 0), 16, blocks, (16, 1))


def test_no_plan_is_an_error_of_its_own():
    chosen = variant(Stages(4, 0), 4, 101376, False, False)
    with pytest.raises(UnsupportedLayoutError, match=r"slices that fit 8192 bytes.*got 4096 columns in blocks"):
        make_plan((256, 16), 4096, chosen, 16, 128, 8192)
    with pytest.raises(UnsupportedLayoutError):  # no multiple of 64 for longer than a slice
        make_plan((8, 1, 8192, 1, 8, 7), 4096, chosen, 16, 128, 101376)


def test_plans_use_the_whole_device():
    chosen = variant(Stages(1, 0), 1, 232448, True, False)
    plan = make_plan((256, 16), 4096, chosen, 1, 132, 232448)
    assert plan.count * plan.ctas >= 132
    assert make_plan((256, 16), 4096, chosen, 1, 132, 232448) is plan


@pytest.mark.parametrize("shared", DEVICES)
def test_variants(shared):
    every = variants(shared)
    macros = re.search(r"// Compiled with (.*?)\.\n", (KERNELS / "matvec.cu").read_text(), re.DOTALL)[1]
    for chosen in every:
        assert all(macro in macros for macro in chosen.defines)
        assert chosen.tokens == 4 * chosen.tiles >= CLASS_OF[chosen.tiles]
        assert chosen.copies == (32 if shared > 160 * 1024 else 1)
        assert chosen.e81b_copies == chosen.copies or (chosen.ctas, chosen.e81b_copies) == (2, 16)
        assert 32 * chosen.warps * chosen.ctas <= 1024
        assert min(chosen.rows, chosen.depth) >= 1
    assert Stages(2, 1).count == 3


@pytest.mark.parametrize("shared", DEVICES)
def test_variants_are_what_the_host_asks_for(gpu, shared, monkeypatch):
    gpu.shared, asked = shared, set()
    for bits, most in product(BITS, (planning.FEW_WEIGHTS, 0)):
        monkeypatch.setattr(planning, "FEW_WEIGHTS", most)
        packed = packed_for(bits=bits)
        weights = weight_of(packed), weight_of(packed_for(200, 72, bits, (64, 8)))
        assert [weight.aligned for weight in weights] == [True, False]
        asked |= {host._variant(weight, tokens, 0) for weight in weights for tokens in range(1, MATVEC_TOKENS + 1)}
    assert asked == variants(shared)


def test_copies_of_the_tables_go_by_shared_memory():
    found = {kib: variant(Stages(2, 0), 1, kib * 1024, True, False).copies for kib in (99, 159, 160, 163, 227)}
    assert found == {99: 1, 159: 1, 160: 32, 163: 32, 227: 32}


def test_tokens_of_a_class_share_variant_and_plan(gpu):
    weight = weight_of(packed_for())
    tiles = [host._tiles(tokens) for tokens in range(1, MATVEC_TOKENS + 1)]
    assert tiles == [1] + [2] * 7 + [4] * 8
    assert tuple(CLASS_OF.values()) == host.CLASSES
    for tokens in range(1, MATVEC_TOKENS + 1):
        chosen = host._variant(weight, tokens, 0)
        assert chosen.tiles == tiles[tokens - 1]
        assert tokens <= CLASS_OF[chosen.tiles] <= chosen.tokens
        assert host._plan(weight, chosen, tokens, 0) is host._plan(weight, chosen, CLASS_OF[chosen.tiles], 0)


# --- matvec.cu's shared memory


@pytest.mark.parametrize("shared", DEVICES)
def test_shared_memory_of_matvec_is_what_plan_counts(shared):
    rng = random.Random(shared)
    for chosen in variants(shared):
        names = matvec_constants(chosen)
        assert (names["RINGS_END"], names["TILE_BYTES"]) == (chosen.fixed_bytes, chosen.stages.tile_bytes)
        assert names["UNIT_BYTES"] % 16 == 0
        for _ in range(5):
            sizes = rng.randint(1, 16), rng.randint(1, 4096), rng.randint(1, CLASS_OF[chosen.tiles])
            assert matvec_bytes(chosen, *sizes) == chosen.shared_bytes(*sizes)
        assert chosen.shared_bytes(5, 7, 1) <= chosen.shared_bytes(5, 7, CLASS_OF[chosen.tiles])


def find_piece(blocks, row: int) -> tuple[int, int, int]:
    """As matvec.cu does it: (number, first row, end) of what has a row."""
    before = 0
    for low, high, _ in runs(blocks):
        if row < high:
            number = (row - low) // UNIT
            return before + number, low + UNIT * number, min(low + UNIT * (number + 1), high)
        before += -(-(high - low) // UNIT)
    raise AssertionError(f"no piece has row {row}")


@pytest.mark.parametrize("seed", range(2))
def test_pieces_are_numbered_as_the_host_counts_them(seed):
    many = flat([2, 1] * 48), flat([256, 16] * 48), (256, 256), (16, 4096), (1, 7)
    for blocks in (*many, *(blocks for blocks, _ in random_layouts(seed))):
        row, rows = 0, runs(blocks)[-1][1]
        for number in range(block_count(blocks)):
            found = find_piece(blocks, row)
            assert found[:2] == (number, row)
            assert find_piece(blocks, found[2] - 1) == found
            row = found[2]
        assert row == rows


# --- plan.py: gemm


@pytest.mark.parametrize("shared", DEVICES)
def test_gemm_variants(shared):
    macros = re.search(r"// Compiled with (.*?)\.\n", (KERNELS / "gemm.cu").read_text(), re.DOTALL)[1]
    for e8p, e81b in [(n, m) for n in range(1, 5) for m in (0, 1) if n + m <= 4]:
        for tokens in range(17, MOST_GEMM + 1):
            chosen = gemm_variant(Stages(e8p, e81b), tokens, shared)
            assert chosen.tokens == next((t for t in GEMM_TOKENS if tokens <= t), GEMM_TOKENS[-1])
            assert chosen.shared_bytes <= shared
            assert chosen.depth >= 2
            assert chosen.copies == 1 or shared > 160 * 1024
            assert chosen.tiles % 2 == 0
            assert all(macro in macros for macro in chosen.defines)
            assert gemm_variant(Stages(e8p, e81b), tokens, shared, FEW_ROWS).warps == 8
            # float32 sums of a thread, among its registers
            assert chosen.tiles * chosen.tokens // 2 <= 65536 // (32 * chosen.warps * chosen.ctas) - 60
    with pytest.raises(UnsupportedLayoutError, match="bytes of shared memory, got 20000"):
        gemm_variant(Stages(1, 0), 17, 20000)


def test_wgmma_variants():
    shared = 232448
    macros = re.search(r"// Compiled with (.*?)\.\n", (KERNELS / "wgmma.cu").read_text(), re.DOTALL)[1]
    for e8p, e81b in [(n, m) for n in range(1, 5) for m in (0, 1) if n + m <= 4]:
        for tokens in (65, 128, 129, 9999):
            chosen = wgmma_variant(Stages(e8p, e81b), tokens, shared)
            assert chosen.tokens == next((t for t in WGMMA_TOKENS if tokens <= t), WGMMA_TOKENS[-1])
            assert chosen.shared_bytes <= shared
            assert chosen.depth >= 3
            assert (chosen.slot_bytes - 16) % 1024 == 0  # the swizzle goes by addresses
            assert all(macro in macros for macro in chosen.defines)
            registers = (65536 // 128 - 32) // chosen.groups  # of a thread, as in the kernel
            assert chosen.tiles * chosen.tokens // 2 <= registers - 60
            assert chosen.rows == 64 * chosen.tiles * chosen.groups


@pytest.mark.parametrize("choose", [gemm_variant, wgmma_variant])
@pytest.mark.parametrize("seed", range(3))
def test_steps_of_a_product_are_shared_out(seed, choose):
    rng = random.Random(seed)
    for _ in range(60):
        rows, columns = 16 * rng.randint(1, 4096), 64 * rng.randint(1, 1024)
        tokens, processors = rng.choice([32, 64, 128, 256, 8192]), rng.choice([20, 108, 132])
        shared = 232448 if choose is wgmma_variant else rng.choice(list(DEVICES))
        chosen = choose(Stages(rng.randint(1, 3), rng.randint(0, 1)), tokens, shared)
        token_tiles = -(-tokens // chosen.tokens)
        owners, slices = share_steps.__wrapped__(chosen, rows, columns, token_tiles, processors)
        steps, tiles = columns // 64, -(-rows // chosen.rows)
        assert 1 <= owners * token_tiles <= max(chosen.ctas * processors, token_tiles)
        assert steps * tiles * owners < 1 << 32  # as the kernels compute
        starts = [steps * tiles * owner // owners for owner in range(owners + 1)]
        assert all(a < b for a, b in pairwise(starts))
        shares = [0] * tiles
        for owner, (start, end) in enumerate(pairwise(starts)):
            for tile_ in range(start // steps, (end - 1) // steps + 1):
                first_owner = ((tile_ * steps + 1) * owners - 1) // (steps * tiles)
                assert owner - first_owner == shares[tile_]  # the number of its slice
                shares[tile_] += 1
        assert max(shares) == slices
        assert slices <= -(-chosen.ctas * processors // (token_tiles * tiles)) + 1


def test_gemm_uses_the_device_for_large_layers():
    chosen = gemm_variant(Stages(2, 0), 32, 232448)
    ctas, slices = share_steps(chosen, 14336, 4096, 1, 132)
    assert ctas >= 100
    assert slices <= 6


# --- linear.py: weights


def test_tile_and_untile():
    codes = torch.arange(48 * 24).view(48, 24)
    tiled = tile(codes)
    assert tiled.shape == (3, 3, 16, 8)
    assert tiled.is_contiguous()
    assert torch.equal(tiled[1, 2], codes[16:32, 16:24])
    assert torch.equal(untile(tiled), codes)
    assert untile(codes) is codes


@pytest.mark.parametrize("bits", range(2, 9))
def test_weight_of_rows_and_of_tiles(bits):
    packed = packed_for(bits=bits)
    rows, tiles = weight_of(packed), weight_of(packed, tiled=True)
    assert (rows.tiled, tiles.tiled) == (False, True)
    for weight in (rows, tiles):
        assert (weight.padded_out, weight.padded_in) == (208, 960)
        assert weight.stages == Stages(bits // 2, bits % 2)
        assert weight.aligned
    assert rows.strides == (120, 8, 16 * 120)
    assert tiles.strides == (8, 128, 1920)
    row, column = 37, 101  # the strides' meaning, as dequantize.cu has it
    for weight in (rows, tiles):
        of_row, of_column, of_tile = weight.strides
        at = (row >> 4) * of_tile + (row & 15) * of_row + (column >> 3) * of_column + (column & 7)
        assert all(c.flatten()[at] == r[row, column] for c, r in zip(weight.codes, packed.codes, strict=True))


def test_aligned_and_can_tile():
    assert can_tile(16, (64, 3))
    assert not can_tile(24, (64, 3))
    assert not can_tile(16, (8, 9))
    assert can_tile(16, (8, 16))  # the runs end on multiples of 64, not every block
    assert not can_tile(16, (32, 1, 64, 1, 32, 1))
    packed = packed_for()
    weight = weight_of(packed)
    memory = torch.empty(packed.codes[0].numel() + 1, dtype=torch.int16)
    weight.codes = [memory[1:].view_as(packed.codes[0]), packed.codes[1]]
    assert not weight.aligned
    assert not weight_of(packed_for(200, 72, in_blocks=(64, 8))).aligned


def test_supported(gpu, caplog):
    device = torch.device("cuda", 0)
    assert host.supported(device)
    assert not host.supported(torch.device("cpu"))
    host._supported.cache_clear()
    gpu.old = True
    with caplog.at_level(logging.WARNING, "eightfold"):
        assert not any(host.supported(device) for _ in range(3))
    assert [record.getMessage() for record in caplog.records] == [
        "Fake is no NVIDIA GPU of compute capability 8.0 or more: weights are decoded before use"
    ]


def test_takes(gpu, caplog):
    assert host.takes(weight_of(packed_for()))
    assert not caplog.records
    many = weight_of(packed_for(16, 49 * 192, in_blocks=(128, 64) * 49))
    assert not any(host.takes(many) for _ in range(3))
    assert [record.getMessage() for record in caplog.records] == [
        "A linear is decoded before use, the kernels do not take it: "
        "expected at most 96 runs of equal rotation blocks, got 98"
    ]


def test_a_device_without_a_number_is_the_current_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 5)
    assert (host._index(torch.device("cuda", 3)), host._index(torch.device("cuda"))) == (3, 5)


# --- linear.py: launches


def pitch(weight) -> int:
    """Floats of a row of partial sums, which are stored four at a time."""
    return -(-weight.padded_out // 4) * 4


def launched_plan(launch, x, weight, bias, shared) -> Plan:
    """That of a launch of matvec, whose parameters and shared memory are checked."""
    p, stages, tokens = launch.p, weight.stages.count, len(x)
    few = weight.padded_out * weight.padded_in <= planning.FEW_WEIGHTS
    chosen = variant(weight.stages, 1 if tokens == 1 else 2 if tokens <= 8 else 4, shared, weight.aligned, few)
    plan = plan_of(weight.in_blocks, weight.padded_out, chosen, shared)
    check_plan(plan, weight.in_blocks, weight.padded_out, chosen, shared)
    assert (launch.defines, launch.shared) == (chosen.defines, chosen.shared_limit(shared))
    assert list(p.codes) == [address(c) for c in weight.codes]
    assert (p.x, p.scale_in) == (address(x), address(weight.scale_in))
    assert p.ratios == address(weight.ratios)
    assert (p.scale_out, p.bias) == (address(weight.scale_out), 0 if bias is None else address(bias))
    assert (p.row_stride, p.column_stride, p.tile_stride) == weight.strides
    assert (p.x_dtype, p.y_dtype) == (host.DTYPES[x.dtype],) * 2
    assert p.scale_dtype == host.DTYPES[weight.scale_out.dtype]
    assert p.bias_dtype == (0 if bias is None else host.DTYPES[bias.dtype])
    assert (p.tokens, p.columns, p.features) == (len(x), len(weight.scale_in), len(weight.scale_out))
    assert (p.padded, p.slices) == (weight.padded_out, plan.count)
    groups = -(-weight.padded_out // (TILE * chosen.rows))
    assert p.share * plan.ctas + p.more == groups
    assert 0 <= p.more < plan.ctas
    assert p.pitch == pitch(weight)
    assert raw(p, "slice_start") == pack_borders(plan.slices)
    assert (raw(p, "in_runs"), raw(p, "runs")) == (pack_runs(weight.in_blocks), pack_runs(weight.out_blocks))
    assert launch.grid == (plan.ctas, plan.count, 1)
    assert launch.block == 32 * chosen.warps
    assert len(p.codes) == stages
    assert launch.overlap == weight.tiled  # rows of codes may be what the kernel ahead of it writes
    assert launch.stream == 7
    return plan


def check_quantize(launch, x, weight, plan, matvec, shared) -> None:
    p = launch.p
    assert (p.x, p.scale_in, p.x_stride) == (address(x), address(weight.scale_in), x.stride(0))
    assert (p.planes, p.scales, p.sums) == (matvec.planes, matvec.scales, matvec.sums)
    assert 0 not in (p.planes, p.scales, p.sums)
    assert (p.x_dtype, p.scale_dtype) == (host.DTYPES[x.dtype], host.DTYPES[weight.scale_in.dtype])
    assert (p.features, p.tokens, p.slices) == (len(weight.scale_in), len(x), plan.count)
    assert p.buffer == plan.buffer
    assert raw(p, "chunk_slice") == pack_borders(plan.chunks)
    assert raw(p, "slice_start") == pack_borders(plan.slices)
    assert raw(p, "runs") == pack_runs(weight.in_blocks)
    assert launch.grid == (len(plan.chunks) - 1, len(x), 1)
    assert (launch.block, launch.overlap, launch.stream) == (512, True, 7)
    assert launch.name == ("quantize_input" if plan.in_registers else "quantize_wide_input")
    if plan.in_registers:
        assert not p.scratch
        return
    assert bool(p.scratch) == (4 * (plan.buffer + 2 * MAX_SLICES) > shared)
    assert p.scratch or launch.shared >= 4 * (plan.buffer + 2 * MAX_SLICES)


def check_workspace(gpu, matvec, plan, weight, tokens) -> None:
    """Every piece is in the workspace, is as large as the kernels use it, and shares nothing with another."""
    assert all(a + size <= b for (a, size), (b, _) in pairwise(gpu.pieces))
    room = {at: size for at, size in gpu.pieces if size}
    assert room.pop(matvec.partial) == 4 * plan.count * tokens * pitch(weight)
    if matvec.planes:
        assert room.pop(matvec.planes) == plan.units * 8 * 4 * 16 * tokens
        assert room.pop(matvec.scales) == 4 * plan.count * tokens
        assert room.pop(matvec.sums) == 4 * plan.count * tokens
    assert not room


def check_decode(gpu, x, weight, bias, y) -> list[str]:
    """What one call launched, every parameter of it; returns the names."""
    assert (y.shape, y.dtype) == ((len(x), len(weight.scale_out)), x.dtype)
    launches = {launch.name: launch for launch in gpu.launches}
    assert len(launches) == len(gpu.launches)
    matvec = launches["matvec"]
    quantize = launches.get("quantize_input") or launches.get("quantize_wide_input")
    plan = launched_plan(matvec, x, weight, bias, gpu.shared)
    check_workspace(gpu, matvec.p, plan, weight, len(x))
    assert matvec.p.y == address(y)
    if quantize:
        check_quantize(quantize, x, weight, plan, matvec.p, gpu.shared)
    else:
        assert plan.in_registers
        assert len(x) <= ALONE_TOKENS
        assert (matvec.p.planes, matvec.p.scales, matvec.p.sums) == (0, 0, 0)
    assert bool(matvec.p.counters) == (gpu.launches[-1] is matvec)
    if not matvec.p.counters:
        last = gpu.launches[-1]
        p = last.p
        check_rotate(last, gpu, weight.scale_out, weight.out_blocks, len(x), weight.tiled, plan.count)
        assert (p.x, p.x_stride, p.x_dtype, p.divisors) == (matvec.p.partial, pitch(weight), 2, 0)
        assert (p.begin, p.end, p.y, p.y_dtype) == (0, weight.padded_out, address(y), host.DTYPES[x.dtype])
        assert (p.bias, p.bias_dtype) == (matvec.p.bias, matvec.p.bias_dtype)
    return gpu.names()


def quantizing(tokens: int) -> list[str]:
    """Names of what goes before matvec, where blocks are short."""
    return ["quantize_input"] if tokens > ALONE_TOKENS else []


def finishing(tokens: int, wide: bool = False) -> list[str]:
    """Names of what follows matvec."""
    return ["rotate_wide_output"] if wide else ["rotate_output"] if tokens > MOST_FINISHED else []


@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("tokens", [1, 2, 8])
def test_matvec_rotates_one_token_by_itself(gpu, tokens, tiled, bits, bias):
    packed = packed_for(bits=bits, bias=bias, scale=torch.float32 if bits % 2 else torch.float16)
    weight, x = weight_of(packed, tiled), activations(tokens, dtype=torch.bfloat16 if bits > 4 else torch.float16)
    y = host.linear(x, weight, packed.bias)
    assert check_decode(gpu, x, weight, packed.bias, y) == [*quantizing(tokens), "matvec", *finishing(tokens)]
    assert gpu.launches[-1 - len(finishing(tokens))].defines["ALIGNED"] == 1


@pytest.mark.parametrize("shared", DEVICES)
@pytest.mark.parametrize(("tokens", "in_blocks"), [
    (1, (8,) * 9), (2, (8,) * 9), (1, (256,) * 40), (1, (64,) * 33), (1, (16, 8)),
])  # fmt: skip
def test_matvec_rotates_blocks_up_to_256_by_itself(gpu, tokens, in_blocks, shared):
    gpu.processors, gpu.shared = DEVICES[shared], shared
    k = sum(in_blocks) - 3
    packed = packed_for(k=k, in_blocks=in_blocks)
    weight, x = weight_of(packed), activations(tokens, k)
    y = host.linear(x, weight, None)
    assert check_decode(gpu, x, weight, None, y) == [*quantizing(tokens), "matvec", *finishing(tokens)]
    matvec = gpu.launches[len(quantizing(tokens))]
    assert matvec.defines["ALIGNED"] == can_tile(weight.padded_out, weight.in_blocks)


@pytest.mark.parametrize(("tokens", "in_blocks"), [
    (9, None), (16, None), (9, (8,) * 9),
    (1, (512, 256, 64, 128)), (1, (8192, 64)), (3, (32768,)), (8, (512,) * 9), (1, (32768, 16384, 64)), (2, (32, 512)),
    (8, (8, 16) * 16),  # more runs in every slice than warps hold
])  # fmt: skip
@pytest.mark.parametrize("shared", DEVICES)
def test_a_launch_before_it_rotates_the_rest(gpu, tokens, in_blocks, shared):
    gpu.processors, gpu.shared = DEVICES[shared], shared
    k = 957 if in_blocks is None else sum(in_blocks) - 3
    packed = packed_for(k=k, in_blocks=in_blocks, bias="float32", scale=torch.float32)
    weight, x = weight_of(packed), activations(tokens, k)
    y = host.linear(x, weight, packed.bias)
    small = in_blocks in (None, (8,) * 9)  # else wide blocks, or more runs than warps hold
    first = "quantize_input" if small else "quantize_wide_input"
    assert check_decode(gpu, x, weight, packed.bias, y) == [first, "matvec", *finishing(tokens)]


@pytest.mark.parametrize("tokens", [1, 3, 7, 16])
@pytest.mark.parametrize(("out_blocks", "shared"), [
    ((512, 64), 232448), ((32768,), 232448), ((32768,), 166912), ((32768,), 101376), ((8192, 16), 101376),
])  # fmt: skip
def test_wide_output_blocks_take_a_launch_of_their_own(gpu, tokens, out_blocks, shared):
    gpu.processors, gpu.shared = DEVICES[shared], shared
    n, in_blocks = sum(out_blocks) - 3, (256,) * 3
    packed = packed_for(n, 768, in_blocks=in_blocks, out_blocks=out_blocks, bias="bfloat16", scale=torch.float32)
    weight, x = weight_of(packed), activations(tokens, 768)
    y = host.linear(x, weight, packed.bias)
    before = ["quantize_input"] if tokens > ALONE_TOKENS else []
    assert check_decode(gpu, x, weight, packed.bias, y) == [*before, "matvec", *finishing(tokens, wide=True)]
    assert gpu.launches[-1].grid[0] == tokens


@pytest.mark.parametrize("tokens", [1, 5, 16])
def test_rows_of_partial_sums_are_whole_fours(gpu, tokens):
    packed = packed_for(19, 768, in_blocks=(256,) * 3, out_blocks=(16, 2, 1))
    weight, x = weight_of(packed), activations(tokens, 768)
    check_decode(gpu, x, weight, None, host.linear(x, weight, None))
    assert [launch.p.pitch for launch in gpu.launches if launch.name == "matvec"] == [20]


def check_product(gpu, packed, weight, x, y, chosen, tokens, n=208, k=960) -> ctypes.Structure:
    """One product between two rotations, in one go; returns its parameters."""
    first, launch, last = gpu.launches
    tiled = weight.tiled
    assert launch.name == chosen.source
    assert (launch.defines, launch.shared) == (chosen.defines, chosen.shared_bytes)
    tiles = -(-tokens // chosen.tokens)
    owners, slices = share_steps(chosen, n, k, tiles, gpu.processors)
    assert launch.grid == (owners, tiles, 1)
    assert (launch.block, launch.stream, launch.overlap) == (chosen.threads, 7, tiled)
    p = launch.p
    assert list(p.codes) == [address(c) for c in weight.codes]
    assert (p.x, p.ratios) == (first.p.y, address(weight.ratios))
    assert (p.row_stride, p.column_stride, p.tile_stride) == weight.strides
    assert (p.tokens, p.columns, p.rows, p.slices) == (tokens, k, n, slices)
    assert (first.p.x, first.p.x_stride, first.p.x_dtype, first.p.y_dtype) == (address(x), k, 1, 0)
    assert (first.p.begin, first.p.end, first.p.bias) == (0, k, 0)
    early = tiled and tokens <= MOST_OVERLAP
    check_rotate(first, gpu, packed.scale_in, weight.in_blocks, tokens, early)
    assert (last.p.x_stride, last.p.begin, last.p.end) == (n, 0, n)
    assert (last.p.y, last.p.y_dtype, last.p.divisors) == (address(y), 1, first.p.divisors)
    bias = packed.bias
    assert (last.p.bias, last.p.bias_dtype) == (0 if bias is None else address(bias), 0 if bias is None else 1)
    check_rotate(last, gpu, packed.scale_out, weight.out_blocks, tokens, early, slices)
    assert last.p.x_dtype == (0 if slices == 1 and chosen.source == "wgmma" else 2)
    return p


@pytest.mark.parametrize("tokens", [17, 32, 33, 64, 65, 128, 129, MOST_GEMM])
@pytest.mark.parametrize(("tiled", "bias", "bits"), [(False, None, 3), (True, "bfloat16", 4)])
def test_tokens_that_a_tile_holds_decode_once(gpu, tokens, tiled, bias, bits):
    gpu.processors, gpu.shared = 108, 166912
    packed = packed_for(bits=bits, bias=bias)
    weight, x = weight_of(packed, tiled), activations(tokens, dtype=torch.bfloat16)
    y = host.linear(x, weight, packed.bias)
    assert gpu.names() == ["rotate_input", "gemm", "rotate_output"]
    chosen = gemm_variant(weight.stages, tokens, gpu.shared, 208)
    p = check_product(gpu, packed, weight, x, y, chosen, tokens)
    assert (p.partial, gpu.launches[0].p.tile) == (gpu.launches[2].p.x, 0)


@pytest.mark.parametrize("tokens", [65, 128, 129, 256, 257, MOST_WGMMA_FEW])
@pytest.mark.parametrize(("tiled", "bias", "bits"), [(False, None, 3), (True, "bfloat16", 4)])
def test_warpgroups_multiply_any_number_of_tokens(gpu, tokens, tiled, bias, bits):
    packed = packed_for(bits=bits, bias=bias)
    weight, x = weight_of(packed, tiled), activations(tokens, dtype=torch.bfloat16)
    y = host.linear(x, weight, packed.bias)
    assert gpu.names() == ["rotate_input_tiled", "wgmma", "rotate_output"]
    chosen = wgmma_variant(weight.stages, tokens, gpu.shared)
    p = check_product(gpu, packed, weight, x, y, chosen, tokens)
    assert (p.sums, p.sums_dtype) == (gpu.launches[2].p.x, gpu.launches[2].p.x_dtype)
    assert gpu.launches[0].p.tile == chosen.tokens


LONG = (512, 256, 128, 64)  # blocks of 960 inputs of which one is too long for dense.cu


@pytest.mark.parametrize(
    ("in_blocks", "tokens", "name"),
    [
        (None, LEAST_WGMMA, "gemm"),
        (None, MOST_WGMMA_FEW + 1, "dense_float16"),
        (LONG, LEAST_WGMMA, "gemm"),
        (LONG, MOST_WGMMA + 1, "dequantize"),
    ],
)
def test_other_kernels_have_the_rest(gpu, monkeypatch, in_blocks, tokens, name):
    monkeypatch.setattr(torch, "mm", lambda a, b, out: out)
    host.linear(activations(tokens), weight_of(packed_for(in_blocks=in_blocks), True), None)
    assert name in gpu.names()
    assert "wgmma" not in gpu.names()


def test_many_weights_are_multiplied_from_codes_for_longer(gpu, monkeypatch):
    monkeypatch.setattr(planning, "FEW_WEIGHTS", 0)
    host.linear(activations(MOST_WGMMA), weight_of(packed_for(), True), None)
    assert "wgmma" in gpu.names()


def test_wide_blocks_are_tiled_for_warpgroups(gpu):
    packed = packed_for(200, 960, in_blocks=LONG)
    weight = weight_of(packed, True)
    for tokens in (90, MOST_WGMMA):
        gpu.launches.clear()
        host.linear(activations(tokens), weight, None)
        assert gpu.names() == ["rotate_wide_input", "wgmma", "rotate_output"]
        assert gpu.launches[0].p.tile == gpu.launches[1].defines["TOKENS"]


def test_workspace_of_a_product_is_bounded(gpu, monkeypatch):
    monkeypatch.setattr(gemm, "_CHUNK_BYTES", 2 * (960 + 208) * 600)
    packed = packed_for(bits=4, in_blocks=LONG)
    weight, x = weight_of(packed, True), activations(700)
    y = host.linear(x, weight, None)
    products = [launch.p for launch in gpu.launches if launch.name == "wgmma"]
    assert [p.tokens for p in products] == [512, 188]
    lasts = [launch.p for launch in gpu.launches if launch.name == "rotate_output"]
    assert [p.y for p in lasts] == [address(y), address(y[512:])]


@pytest.mark.parametrize(
    ("tokens", "groups"),
    [
        (17, [16, 1]),
        (24, [16, 8]),
        (25, [16, 9]),
        (33, [16, 16, 1]),
        (MOST_MATVEC, [16] * (MOST_MATVEC // MATVEC_TOKENS)),
    ],
)
def test_more_tokens_of_what_cannot_be_tiled_are_more_launches(gpu, tokens, groups):
    weight, x = weight_of(packed_for()), activations(tokens)
    weight.codes = [torch.empty(c.numel() + 1, dtype=c.dtype)[1:].view_as(c) for c in weight.codes]
    assert not weight.aligned
    y = host.linear(x, weight, None)
    launches = [launch for launch in gpu.launches if launch.name == "matvec"]
    quantized = [["quantize_input"] if group > ALONE_TOKENS else [] for group in groups]
    names = [[*before, "matvec", *finishing(group)] for before, group in zip(quantized, groups, strict=True)]
    assert gpu.names() == [*chain(*names)]
    assert [launch.p.tokens for launch in launches] == groups
    assert [launch.p.x for launch in launches] == [address(x[16 * i :]) for i in range(len(groups))]
    assert [launch.p.y for launch in launches] == [address(y[16 * i :]) for i in range(len(groups))]


@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("bias", [None, "bfloat16"])
@pytest.mark.parametrize(("in_blocks", "out_blocks", "spans"), [
    ((256, 64), None, [(0, 256), (256, 512), (512, 608)]),
    ((32768,), (512, 64, 32), [(0, 512), (512, 608)]),  # a block is longer than a piece
])  # fmt: skip
def test_many_tokens_are_a_rotated_dense_product(gpu, monkeypatch, tiled, bias, in_blocks, out_blocks, spans):
    """Where blocks are longer than a tile of dense.cu, or shared memory has no room for one."""
    tokens, k, wide = MOST_GEMM + 1, sum(in_blocks) - 1, out_blocks is not None
    gpu.processors, gpu.shared = 8 if wide else 108, 101376
    monkeypatch.setattr(dense, "piece_rows", lambda *sizes: 256)
    packed = packed_for(600 if wide else 608, k, 5, in_blocks, out_blocks, bias=bias)
    weight, x = weight_of(packed, tiled), activations(tokens, k, torch.bfloat16)
    products = []
    multiply = torch.mm

    def mm(a, b, out):
        products.append((a, b, out))
        return out if wide else multiply(a.zero_(), b.zero_(), out=out)

    monkeypatch.setattr(torch, "mm", mm)
    y = host.linear(x, weight, packed.bias)
    kind = "rotate_wide" if wide else "rotate"
    names = [["dequantize"] * -(-(end - begin) // 256) + [f"{kind}_output"] for begin, end in spans]
    assert gpu.names() == [f"{kind}_input", *chain(*names)]
    first, *rest = gpu.launches
    pieces = [launch for launch in rest if launch.name == "dequantize"]
    lasts = [launch for launch in rest if launch.name != "dequantize"]
    rotated = products[0][0]
    assert (rotated.shape, rotated.dtype) == ((tokens, weight.padded_in), torch.float16)
    for number, (piece, (a, b, out)) in enumerate(zip(pieces, products, strict=True)):
        p, rows = piece.p, min(256, 608 - 256 * number)
        check_dequantize(piece, weight, address(b), 256 * number, rows)
        assert (a is rotated, b.shape, b.dtype) == (True, (weight.padded_in, rows), torch.float16)
        (last,) = (last for last in lasts if last.p.begin <= p.row0 < last.p.end)
        assert (out.shape, address(out)) == ((tokens, rows), last.p.x + 2 * (p.row0 - last.p.begin))
        assert out.stride(0) == last.p.x_stride == last.p.end - last.p.begin
    check_rotate(first, gpu, packed.scale_in, weight.in_blocks, tokens, tiled)
    p = first.p
    assert (p.x, p.x_stride, p.x_dtype, p.y, p.bias) == (address(x), k, 1, address(rotated), 0)
    assert (p.begin, p.end) == (0, weight.padded_in)
    assert [(last.p.begin, last.p.end) for last in lasts] == spans
    for last in lasts:
        check_rotate(last, gpu, packed.scale_out, weight.out_blocks, tokens, tiled)
        p = last.p
        assert (p.x_dtype, p.y, p.y_dtype, p.divisors) == (0, address(y), 1, first.p.divisors)
        assert (p.bias, p.bias_dtype) == (0 if bias is None else address(packed.bias), BIASES[bias])


@pytest.mark.parametrize("shared", [232448, 166912])
@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize(("dtype", "bias"), [
    (torch.float16, None), (torch.float16, "float32"), (torch.bfloat16, "float16"), (torch.bfloat16, "bfloat16"),
])  # fmt: skip
@pytest.mark.parametrize(("n", "out_blocks", "spans"), [
    (600, None, [(0, 256), (256, 512), (512, 608)]),
    (507, (128, 64, 128, 128, 64), [(0, 192), (192, 448), (448, 512)]),  # pieces are whole blocks
    (239, (128, 64, 32, 16, 32, 16), [(0, 240)]),  # the rest is padding
])  # fmt: skip
def test_many_tokens_are_a_dense_product(gpu, monkeypatch, shared, tiled, dtype, bias, n, out_blocks, spans):
    gpu.processors, gpu.shared = DEVICES[shared], shared
    monkeypatch.setattr(dense, "even_rows", lambda *sizes: 256)
    packed = packed_for(n, 955, 5, out_blocks=out_blocks, bias=bias, scale=torch.float32)
    weight, x = weight_of(packed, tiled), activations(MOST_WGMMA_FEW + 1, 955, dtype)
    products = []

    def addmm(start, a, b, out):
        products.append((start, a, b, out))

    monkeypatch.setattr(torch, "addmm", addmm)
    monkeypatch.setattr(torch, "mm", lambda a, b, out: addmm(None, a, b, out))
    y = host.linear(x, weight, packed.bias)
    assert gpu.names() == ["dense_" + str(dtype).removeprefix("torch.")] * len(spans)
    for launch, (start, a, b, out), (begin, end) in zip(gpu.launches, products, spans, strict=True):
        stop = min(end, n)
        check_unrotate(launch, gpu, weight, (begin, end), address(b))
        assert (a is x, b.shape, b.stride(), b.dtype) == (True, (955, stop - begin), (1, 960), dtype)
        assert (address(out), out.shape, out.stride()) == (address(y[:, begin:]), (len(x), stop - begin), (n, 1))
        assert (start is None) == (bias is None)
        if bias is not None:
            assert torch.equal(start, packed.bias[begin:stop].to(dtype))
    assert len({address(b) for _, _, b, _ in products}) == 1  # they share the workspace


def check_unrotate(launch, gpu, weight, span, to) -> None:
    p, stages = launch.p, weight.stages
    assert list(p.codes) == [address(c) for c in weight.codes]
    tensors = weight.ratios, weight.scale_in, weight.scale_out
    assert (p.ratios, p.scale_in, p.scale_out, p.weights) == (*map(address, tensors), to)
    assert (p.row_stride, p.column_stride, p.tile_stride) == weight.strides
    assert (p.scale_dtype, p.aligned) == (host.DTYPES[weight.scale_out.dtype], weight.aligned)
    assert (p.begin, p.end) == span
    assert (p.features_in, p.features_out) == (len(weight.scale_in), len(weight.scale_out))
    assert p.pitch == -(-p.features_in // 8)
    assert p.across == planning.segments(weight.in_blocks, 0, weight.padded_in)
    assert p.tiles == p.across * planning.segments(weight.out_blocks, *span)
    assert (raw(p, "in_runs"), raw(p, "out_runs")) == (pack_runs(weight.in_blocks), pack_runs(weight.out_blocks))
    assert launch.grid == min(p.tiles, gpu.processors)
    assert (launch.block, launch.overlap, launch.stream) == (512, weight.tiled, 7)
    copies = 32 if gpu.shared > 160 * 1024 + 131072 // 4 else 1
    assert launch.defines == {**stages.defines, "COPIES": copies, "E81B_COPIES": min(copies, 16)}
    assert launch.shared == dense.shared_bytes(stages, copies)


@pytest.mark.parametrize("e8p", range(1, 5))
@pytest.mark.parametrize("e81b", [0, 1])
def test_shared_memory_of_a_tile(e8p, e81b):
    """What dense.py counts is what dense.cu lays out; nearly all of it is the tile and the tables."""
    stages = Stages(e8p, e81b)
    found = {shared: dense.table_copies(stages, shared) for shared in DEVICES}
    assert found == {232448: 32, 166912: 1, 101376: 0}
    for shared, copies in found.items():
        if copies:
            defines = {**stages.defines, "COPIES": copies, "E81B_COPIES": min(copies, 16)}
            names = constants(defines, "common.cuh", "decode.cuh", "pairs.cuh", "dense.cu")
            assert names["THREADS"] == dense._THREADS
            assert names["TILE"] % 1024 == 0
            assert names["SHARED_END"] == dense.shared_bytes(stages, copies) <= shared


def test_who_unrotates(gpu):
    """Blocks of up to 256 on both sides, of E8P and E81B, where shared memory has room."""
    short, one_in, one_out = packed_for(), packed_for(in_blocks=LONG), packed_for(512, out_blocks=(512,))
    assert [dense.unrotates(weight_of(packed), 0) for packed in (short, one_in, one_out)] == [True, False, False]
    assert not dense.unrotates(weight_of(packed_for(family="e8shell")), 0)
    assert dense.unrotates(weight_of(packed_for(20, 200, in_blocks=(128, 64, 8), out_blocks=(16, 4))), 0)
    gpu.shared = 101376
    assert not dense.unrotates(weight_of(short), 0)


def test_pieces_are_few_and_even():
    for rows, columns, expected in (
        (28672, 8192, 28672),  # all at once
        (16, 64, 256),
        (65536, 65536, 4096),
        (65536, 8192, 32768),
        (40000, 8192, 20224),
        (300, 1 << 21, 256),  # a row of blocks at least
    ):
        assert dense.even_rows(rows, columns) == expected
        assert 2 * expected * columns <= dense.DENSE_BYTES or expected == 256


def check_dequantize(launch, weight, to, row, rows) -> None:
    p = launch.p
    assert list(p.codes) == [address(c) for c in weight.codes]
    assert (p.ratios, p.weights) == (address(weight.ratios), to)
    assert (p.row_stride, p.column_stride, p.tile_stride) == weight.strides
    assert (p.row0, p.rows, p.columns) == (row, rows, weight.padded_in // 8)
    assert 1 <= launch.grid <= -(-rows // 16) * -(-p.columns // 64)
    assert (launch.block, launch.overlap, launch.defines) == (256, weight.tiled, weight.stages.defines)


def check_rotate(launch, gpu, scale, blocks, tokens, overlap, slices=1) -> None:
    p, wide = launch.p, max(blocks[::2]) > UNIT
    assert launch.name.startswith("rotate_wide") == wide
    assert (p.scale, p.scale_dtype, p.features) == (address(scale), host.DTYPES[scale.dtype], len(scale))
    assert (p.tokens, p.slices, p.buffer, raw(p, "runs")) == (tokens, slices, max(blocks[::2]), pack_runs(blocks))
    assert (launch.overlap, launch.stream) == (overlap, 7)
    across, down, _ = launch.grid
    assert 1 <= across <= tokens
    count = planning.segments(blocks, p.begin, p.end)
    if wide:
        assert launch.block == rotations.THREADS
        assert across * down <= 4 * gpu.processors
        assert bool(p.scratch) == (4 * (p.buffer + 128) > gpu.shared)
        assert launch.shared >= (1024 if p.scratch else 4 * (p.buffer + 32))
    elif launch.name == "rotate_output":
        assert (launch.block, down) == (256, -(-count // 8))
        few = overlap and across * down <= rotations.APART * gpu.processors
        assert launch.shared == (gpu.shared // (rotations.APART + 1) if few else 1024)
    else:
        tiled = launch.name == "rotate_input_tiled"  # which goes through a row in a loop
        assert (launch.block <= 32 * (16 if tiled else 28), down) == (True, 1)
        assert tiled or launch.block // 32 * 4 >= count


def test_rotations_take_every_row(gpu):
    """rotate_input holds a row in the registers of a CTA as far as they go; the constants are the kernel's."""
    text = source("rotate.cu")
    assert f"ITEMS = {rotations._ITEMS};" in text
    assert f"ROW_THREADS = {32 * rotations._MOST_WARPS};" in text
    assert f"TILED_THREADS = {32 * rotations._MOST_TILED_WARPS};" in text
    for columns, streams in ((64, True), (4160, True), (28672, True), (28736, False), (65536, False)):
        weight = weight_of(packed_for(16, columns))
        for tokens in (17, 64, 3000):
            gpu.launches.clear()
            x = activations(tokens, 1).expand(tokens, columns)
            rotated = x.new_empty(1).expand(tokens, columns)
            side = rotations.Side(weight.scale_in, None, weight.in_blocks, True)
            rotations.rotate_input(x, side, rotated, torch.empty(tokens), 7)
            (launch,) = gpu.launches
            assert launch.name == ("rotate_input" if streams else "rotate_wide_input")
            if streams:
                check_rotate(launch, gpu, weight.scale_in, weight.in_blocks, tokens, True)


@pytest.mark.parametrize("shared", DEVICES)
def test_so_much_shared_memory_keeps_ctas_apart(gpu, shared):
    """APART of them have room on a multiprocessor, one more has not; more of them than have room ask for none."""
    gpu.processors, gpu.shared = DEVICES[shared], shared
    side = rotations.Side(torch.ones(1024), None, (256, 4), True)
    asked = {}
    for tokens in (1, 8, 6 * gpu.processors):
        for overlap in (True, False):
            gpu.launches.clear()
            rows = rotations.Rows(0, 1024, 2, tokens)
            rotations.rotate_output(rows, side._replace(overlap=overlap), torch.empty(1, 1024), 0, (0, 1024), 7)
            asked[tokens, overlap] = gpu.launches[0].shared
    most, few = shared + planning.RESERVED, asked[8, True] + planning.RESERVED
    assert rotations.APART * (few + 1024) <= most < (rotations.APART + 1) * few
    assert asked == {key: few - planning.RESERVED if key in ((1, True), (8, True)) else 1024 for key in asked}


def test_pieces_and_spans():
    assert dense.row_spans((256, 3), 512) == [(0, 512), (512, 768)]
    assert dense.row_spans((256, 3, 64, 1, 16, 1), 512) == [(0, 512), (512, 848)]
    assert dense.row_spans((1024, 1, 512, 2), 256) == [(0, 1024), (1024, 1536), (1536, 2048)]
    assert dense.row_spans((16, 1), 4096) == [(0, 16)]
    for tokens in (49, 512, 2048, 8192, 65536):
        for rows, columns in ((28672, 8192), (8192, 28672), (4096, 4096), (16, 64), (65536, 65536)):
            found = dense.piece_rows(tokens, rows, columns, 132)
            assert found % 256 == 0
            assert 2 * found * columns <= dense.DENSE_BYTES
            assert found < rows + 256
    # A piece fills the processors where tokens are few; where they are many, it is small.
    assert 2 * dense.piece_rows(512, 8192, 28672, 132) * 28672 > 200 << 20
    assert 2 * dense.piece_rows(8192, 8192, 28672, 132) * 28672 < 64 << 20


@pytest.mark.parametrize("offset", [15, 16])
def test_dequantize_arithmetic_is_exact(offset):
    """add_stage's float of a nibble in the mantissa, less what it has too much, is the nibble less half the offset."""
    for k in range(8):
        place = k & 3 or 4
        nibbles = torch.arange(16, dtype=torch.int32) << 4 * place
        floats = (nibbles | 0x4B000000).view(torch.float32)
        unit = float(16**place)
        integers = floats - torch.tensor(8388608 + 0.5 * offset * unit)
        assert torch.equal(integers / unit, torch.arange(16) - offset / 2)


def hadamard_fragment(active: int) -> torch.Tensor:
    """The matrix [16, 16] of butterfly.cuh."""
    sign = [[-1 if (i & j & active).bit_count() & 1 else 1 for j in range(16)] for i in range(16)]
    return torch.tensor([[0 if (i ^ j) & ~active else sign[i][j] for j in range(16)] for i in range(16)]).double()


@pytest.mark.parametrize("log", range(9))
def test_butterfly_is_a_hadamard_transform(log):
    """The bits that butterfly.cuh gives to rows and columns of its two products."""
    bits_k, bits_n = (0, 3, 4, 1), (5, 6, 7, 2)
    text = source("butterfly.cuh")
    for name, bits in (("k", bits_k), ("n", bits_n)):
        first, *rest = (f"(log > {bit})" for bit in bits)
        mask = " | ".join([first, *(f"{each} << {i}" for i, each in enumerate(rest, 1))])
        assert f"hadamard_fragment(b.{name}, {mask});" in text

    def index(k: int, n: int) -> int:
        places = [*zip(bits_k, range(4), [k] * 4, strict=True), *zip(bits_n, range(4), [n] * 4, strict=True)]
        return sum((number >> i & 1) << bit for bit, i, number in places)

    at = torch.tensor([[index(k, n) for n in range(16)] for k in range(16)])
    left, right = (hadamard_fragment(sum((log > bit) << i for i, bit in enumerate(bits))) for bits in (bits_k, bits_n))
    x = torch.randn(256, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = torch.empty_like(x)
    y[at] = left @ x[at] @ right.T
    torch.testing.assert_close(y / 2 ** (log / 2), rotate(x, (1 << log,) * (256 >> log)))


@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("tokens", [1, 16, 50])
@pytest.mark.parametrize("bits", [2, 3, 8])
def test_shells_are_a_dense_product_for_any_number_of_tokens(gpu, monkeypatch, tiled, tokens, bits):
    packed = packed_for(208, bits=bits, family="e8shell")
    weight, x = weight_of(packed, tiled), activations(tokens)
    table = torch.zeros(65536, 8, dtype=torch.int8)
    weight.points = (table,)
    assert host.takes(weight)
    host.prepare(weight)
    assert {key[1] for key in gpu.loads} == {"rotate_input", "rotate_output", "dequantize_shell"}
    monkeypatch.setattr(torch, "mm", lambda a, b, out: out)
    assert host.linear(x, weight, None).shape == (tokens, 208)
    assert gpu.names() == ["rotate_input", "dequantize_shell", "rotate_output"]
    p, defines = gpu.launches[1].p, gpu.launches[1].defines
    assert defines == {"SHELL_STAGES": bits // 2, "SHELL256_STAGES": bits % 2}
    assert list(p.codes) == [address(c) for c in weight.codes]
    assert (p.ratios, p.points) == (address(weight.ratios), address(table))
    assert (p.row_stride, p.column_stride, p.tile_stride) == weight.strides
    assert (p.row0, p.rows, p.columns) == (0, 208, 120)
    assert 1 <= gpu.launches[1].grid <= 4 * gpu.processors
    assert (gpu.launches[1].block, gpu.launches[1].overlap) == (256, tiled)


@pytest.mark.parametrize("dtypes", [
    (torch.uint8, torch.int16), (torch.int8, torch.uint16), (torch.int16, torch.uint16), (torch.uint16, torch.uint8),
])  # fmt: skip
def test_mixed_and_disordered_stages_are_decoded_before_use(gpu, caplog, dtypes):
    weight = weight_of(packed_for())
    codes = [torch.zeros(208, 120, dtype=dtype) for dtype in dtypes]
    mixed = Weight(codes, weight.ratios, weight.scale_in, weight.scale_out, weight.in_blocks, weight.out_blocks)
    assert not host.takes(mixed)
    assert "expected E8P and then E81B, or e8shell and then e8shell256" in caplog.text


@pytest.mark.parametrize("family", ["e8p", "e8shell"])
def test_no_tokens_are_no_launch(gpu, family):
    y = host.linear(activations(0), weight_of(packed_for(family=family)), None)
    assert y.shape == (0, 200)
    assert not gpu.launches


def test_strided_activations(gpu):
    weight = weight_of(packed_for())
    rows = activations(40, 1920)
    for tokens in (6, 12):  # which matvec rotates, and quantize_input
        some = rows[: 2 * tokens]
        for x in (some[:tokens, :960], some[::2, 960:], some[:1, :960].expand(tokens, -1)):  # rows in one piece: as is
            gpu.launches.clear()
            check_decode(gpu, x, weight, None, host.linear(x, weight, None))
        gpu.launches.clear()
        host.linear(some[:tokens, ::2], weight, None)
        assert gpu.launches[0].p.x != address(some)
        assert gpu.launches[0].p.x_stride == 960
    gpu.launches.clear()
    host.linear(activations(1, 1920)[:, ::2], weight, None)
    assert gpu.names() == ["matvec"]


def test_workspace_is_aligned_pieces_of_one_allocation():
    memory, (first, *rest) = host._workspace(torch.device("cpu"), 10, 0, 257, 256)
    assert first == address(memory)
    assert [at - first for at in rest] == [256, 256, 768]
    assert memory.nbytes >= 768 + 256
    assert len(host._workspace(torch.device("cpu"), 0)[1]) == 1


# --- linear.py: counters


def counters(gpu, weight) -> int:
    host.linear(activations(1), weight, None)
    return gpu.launches[-1].p.counters


def test_each_stream_keeps_its_counters(gpu):
    weight = weight_of(packed_for())
    first = counters(gpu, weight)
    assert first == counters(gpu, weight) == counters(gpu, weight_of(packed_for(bits=4)))
    mine = host._counters_of(0)._of_stream[7]
    assert first == address(mine)
    assert len(mine) >= block_count(weight.out_blocks)
    assert not mine.any()
    gpu.stream = 8
    assert counters(gpu, weight) != first
    gpu.stream = 7
    assert counters(gpu, weight) == first


def test_captured_launches_share_no_counters(gpu):
    weight = weight_of(packed_for(520))
    eager = counters(gpu, weight)
    gpu.capturing = True
    taken = [counters(gpu, weight) for _ in range(4)]
    assert [b - a for a, b in pairwise(taken)] == [4 * block_count(weight.out_blocks)] * 3
    reserve = host._counters_of(0)._reserve
    assert taken[0] == address(reserve) != eager
    assert not reserve.any()
    assert len(reserve) == host._Counters.RESERVE


def test_captures_beyond_the_reserve_take_two_launches(gpu, monkeypatch):
    packed = packed_for(bias="float32")
    weight = weight_of(packed)
    monkeypatch.setattr(host._Counters, "RESERVE", 3 * block_count(weight.out_blocks) - 1)
    gpu.capturing = True
    for number in range(4):
        gpu.launches.clear()
        x = activations(1)
        names = check_decode(gpu, x, weight, packed.bias, host.linear(x, weight, packed.bias))
        assert names == ["matvec", *(["rotate_output"] if number > 1 else [])]
    gpu.capturing = False
    gpu.launches.clear()
    host.linear(activations(1), weight, None)
    assert gpu.names() == ["matvec"]


# --- linear.py: prepare


def check_prepared(gpu, packed, monkeypatch) -> None:
    """After prepare(), calls of every size load nothing and make no counters but a new stream's."""
    monkeypatch.setattr(torch, "mm", lambda a, b, out: out)
    monkeypatch.setattr(torch, "addmm", lambda start, a, b, out: out)
    weight = weight_of(packed)
    if can_tile(weight.padded_out, weight.in_blocks):
        weight = weight_of(packed, True)
    gpu.launches.clear()
    gpu.capturing = False
    host.prepare(weight)
    assert not gpu.launches
    before, k = len(gpu.loads), packed.spec.in_features
    assert host._counters_of.cache_info().currsize == 1
    assert gpu.waits
    gpu.capturing = True
    borders = MOST_MATVEC, MOST_GEMM, MOST_WGMMA_FEW, MOST_WGMMA
    for tokens in (1, 2, 5, 9, 16, 17, 37, 100, *borders, *(border + 1 for border in borders)):
        for dtype in (torch.float16, torch.bfloat16):
            host.linear(activations(1, k, dtype).expand(tokens, k), weight, packed.bias)
    assert gpu.loads[before:] == []


@pytest.mark.parametrize("shared", DEVICES)
@pytest.mark.parametrize("layout", ["pow2-sum-256", "pow2-sum", "pow2", "equal-1024"])
@pytest.mark.parametrize("bits", [2, 3, 8])
def test_prepare_loads_all_that_calls_need(gpu, monkeypatch, shared, layout, bits):
    gpu.processors, gpu.shared = DEVICES[shared], shared
    check_prepared(gpu, packed_for(600, 4160, bits, layout_blocks(4160, layout, 64)), monkeypatch)


def test_prepare_loads_all_that_long_chunks_need(gpu, monkeypatch):
    """Borders of even slices meet the borders of wide blocks only here and there: a chunk is then many blocks."""
    for columns in (12288, 14336, 18944, 27648, 28672):
        for layout in ("pow2-sum-512", "pow2-sum-1024", "pow2-sum-2048", "equal"):
            check_prepared(gpu, packed_for(16, columns, 4, layout_blocks(columns, layout, 64)), monkeypatch)


# --- QuantLinear


@pytest.fixture
def on_gpu(gpu, monkeypatch):
    """Layers on the CPU take themselves for layers on a GPU with kernels, until forward."""
    has = lambda weight, dtype: dtype in (torch.float16, torch.bfloat16) and host.takes(weight)  # noqa: E731
    monkeypatch.setattr(layers, "_has_kernels", has)
    return gpu


def same(packed, other) -> bool:
    ours, theirs = packed.tensors(), other.tensors()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_prepared_layer_is_tiled_and_its_state_dict_is_the_file(on_gpu):
    packed = packed_for(bits=5, bias="float16")
    module = QuantLinear.from_packed(packed).prepare(torch.float16)
    assert on_gpu.loads
    assert module.prepared
    assert module._dense is None
    for name in module._code_names:
        assert module.get_parameter(name).shape == (13, 15, 16, 8)
        assert not module.get_parameter(name).requires_grad
    state = module.state_dict()
    assert {name: (t.dtype, tuple(t.shape)) for name, t in state.items()} == module.tensor_specs
    assert all(torch.equal(state[name], tensor) for name, tensor in packed.tensors().items())
    assert same(module.packed(), packed)
    names = [name for name, _ in module.named_parameters()]
    assert sorted(names) == sorted(packed.tensors())
    loads = len(on_gpu.loads)
    assert module.prepare(torch.bfloat16).get_parameter(module._code_names[0]).dim() == 4  # again: nothing new
    assert len(on_gpu.loads) == loads
    assert torch.nn.Sequential(module).state_dict()["0." + module._code_names[0]].dim() == 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_reference_takes_tiles(on_gpu, dtype):
    packed, x = packed_for(bias="bfloat16"), activations(3, dtype=dtype)
    expected = QuantLinear.from_packed(packed)(x)
    assert torch.equal(QuantLinear.from_packed(packed).prepare(dtype)(x), expected)


def test_float32_is_decoded(on_gpu):
    module = QuantLinear.from_packed(packed_for()).prepare(torch.float32)
    assert module._dense is not None
    assert module.get_parameter(module._code_names[0]).dim() == 2
    assert not on_gpu.loads


def test_what_cannot_be_tiled_stays(on_gpu):
    packed = packed_for(20, 200, in_blocks=(128, 64, 8), out_blocks=(16, 4))
    module = QuantLinear.from_packed(packed).prepare(torch.float16)
    assert module.get_parameter(module._code_names[0]).dim() == 2
    assert [key for key in on_gpu.loads if ("ALIGNED", 0) in key]
    assert not [key for key in on_gpu.loads if ("ALIGNED", 1) in key]


@pytest.mark.parametrize("assign", [False, True])
def test_loading_into_a_tiled_layer(on_gpu, assign):
    module = QuantLinear.from_packed(packed_for()).prepare(torch.float16)
    other = random_packed(module.spec, seed=5)
    model = torch.nn.Sequential(module)
    model.load_state_dict({f"0.{name}": tensor for name, tensor in other.tensors().items()}, assign=assign)
    assert same(module.packed(), other)
    module.prepare(torch.float16)
    assert module.get_parameter(module._code_names[0]).dim() == 4
    assert same(module.packed(), other)


def test_copies_and_moves_of_a_tiled_layer(on_gpu):
    packed = packed_for()
    module = QuantLinear.from_packed(packed).prepare(torch.float16)
    twin = copy.deepcopy(module)
    assert twin.prepared
    assert same(twin.packed(), packed)
    module.to(torch.bfloat16)
    assert module._prepared == torch.bfloat16
    assert same(module.packed(), packed)
    module.to("meta")
    assert not module.prepared
    assert all(tensor.is_meta for tensor in module.state_dict().values())
    assert {name: (t.dtype, tuple(t.shape)) for name, t in module.state_dict().items()} == module.tensor_specs
    module.load_state_dict(packed.tensors(), assign=True)
    assert same(module.packed(), packed)


def test_the_operator_on_a_gpu(on_gpu):
    """What "cuda" dispatches to: any leading dimensions through the kernels, float32 through the reference."""
    packed = packed_for(bias="float16")
    weight = weight_of(packed)
    rest = (list(packed.codes), weight.ratios, packed.scale_in, packed.scale_out, packed.bias)
    blocks = (list(weight.in_blocks), list(weight.out_blocks))
    for shape in ((960,), (0, 960), (3, 960), (2, 0, 960), (3, 3, 960)):
        assert layers._on_gpu(torch.randn(shape).half(), *rest, *blocks).shape == (*shape[:-1], 200)
    assert on_gpu.names() == [
        "matvec",
        *finishing(1),
        "quantize_input",
        "matvec",
        *finishing(3),
        "quantize_input",
        "matvec",
        *finishing(9),
    ]
    on_gpu.launches.clear()
    x = torch.randn(2, 960)
    assert torch.equal(layers._on_gpu(x, *rest, *blocks), layers._reference(x, *rest, *blocks))
    assert not on_gpu.launches


def test_has_kernels_asks_dtype_device_and_layout(gpu, monkeypatch):
    weight = weight_of(packed_for())
    assert not layers._has_kernels(weight, torch.float16)  # on the CPU
    monkeypatch.setattr(host, "supported", lambda device: True)
    assert layers._has_kernels(weight, torch.float16)
    assert layers._has_kernels(weight, torch.bfloat16)
    assert not layers._has_kernels(weight, torch.float32)
