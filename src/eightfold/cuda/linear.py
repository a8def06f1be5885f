"""`eightfold::linear` on a GPU: which kernels run for how many tokens, with what workspace.

Up to 16 tokens: matvec, which reads the codes once; quantize_input before it, unless matvec can do that itself (one
token). Up to MOST_MATVEC: the same for every 16. More: the weight is decoded to float16, at most DENSE_BYTES of it at a
time, and cuBLAS multiplies. Everything is queued on the current stream; memory comes from PyTorch's pool. Within 1-4,
5-8 and 9-16 tokens (the last of every 16 too) a token's result does not depend on the others; above MOST_MATVEC that is
cuBLAS's affair. Stages of E8 shells have no matvec: for them the weight is always decoded.
"""

from __future__ import annotations

import logging
import struct
import threading
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from eightfold.cuda.driver import Kernel, arch, load, max_shared, sm_count
from eightfold.cuda.driver import device_index as _index
from eightfold.cuda.plan import (
    LARGE,
    MATVEC_TOKENS,
    MAX_FEATURES,
    MAX_RUNS,
    UNIT,
    Plan,
    Stages,
    UnsupportedLayoutError,
    Variant,
    block_count,
    check,
    make_plan,
    pack_borders,
    pack_runs,
    runs,
    stages_of,
    variant,
)

_LOG = logging.getLogger("eightfold")
DTYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}  # as common.cuh numbers them
CODES = {torch.int16: 0, torch.uint8: 1, torch.uint16: 2, torch.int8: 3}  # as plan.stages_of numbers codebooks
MOST_MATVEC = 48  # tokens up to which several launches of matvec beat decoding the weight for cuBLAS
DENSE_BYTES = 64 << 20  # of float16 weights decoded at once
_THREADS = 512  # of the rotation kernels
_BUFFER = 6144  # coordinates of a chunk that fit the shared memory every device has


class Weight:
    """What the kernels need of a packed weight: its tensors and their shapes.

    `codes`: as the file has them, [N, K / 8], or each as `tile` makes them. `points`: for stages of E8 shells, one
    tensor, twice the table: int8 [65536, 8]."""

    points: tuple[Tensor, ...] = ()

    def __init__(
        self,
        codes: Sequence[Tensor],
        ratios: Tensor,
        scale_in: Tensor,
        scale_out: Tensor,
        in_blocks: Sequence[int],
        out_blocks: Sequence[int],
    ) -> None:
        self.codes = codes
        self.ratios, self.scale_in, self.scale_out = ratios, scale_in, scale_out
        self.in_blocks, self.out_blocks = tuple(in_blocks), tuple(out_blocks)
        rows, columns = codes[0].shape[:2]
        self.tiled = codes[0].dim() == 4
        self.padded_out, self.padded_in = (16 * rows, 64 * columns) if self.tiled else (rows, 8 * columns)
        self.stages = stages_of(tuple(CODES[c.dtype] for c in codes))

    @property
    def aligned(self) -> bool:
        """Whether rows come in tiles of 16 and the codes of 64 columns start at multiples of 16 bytes."""
        return can_tile(self.padded_out, self.in_blocks) and all(c.data_ptr() % 16 == 0 for c in self.codes)

    @property
    def large(self) -> bool:
        """Whether it has LARGE or more weights."""
        return self.padded_in * self.padded_out >= LARGE

    @property
    def strides(self) -> tuple[int, int, int]:
        """Codes from row to row of a tile of 16, from 64 columns to the next, from tile to tile."""
        if self.tiled:
            return 8, 128, 2 * self.padded_in
        pitch = self.codes[0].stride(0)
        return pitch, 8, 16 * pitch


@cache
def can_tile(rows: int, in_blocks: tuple[int, ...]) -> bool:
    """Whether `tile` takes codes of so many rows, under an input rotation of these blocks (flat pairs)."""
    return rows % 16 == 0 and all(end % 64 == 0 for _, end, _ in runs(in_blocks))


def tile(codes: Tensor) -> Tensor:
    """Codes [N, K / 8] with those of 16 rows by 64 columns side by side: [N / 16, K / 64, 16, 8]. What a warp reads at
    a time is then one piece of memory and not 16 pieces of 64 bytes."""
    rows, columns = codes.shape
    return codes.view(rows // 16, 16, columns // 8, 8).transpose(1, 2).contiguous()


def untile(codes: Tensor) -> Tensor:
    """The file's rows of codes, from them or from what `tile` made."""
    return codes.transpose(1, 2).reshape(16 * len(codes), -1) if codes.dim() == 4 else codes


def supported(device: torch.device) -> bool:
    """Whether the kernels run on `device`, an NVIDIA GPU of compute capability 8.0 or more. Says so once if not."""
    return device.type == "cuda" and _supported(_index(device))


@cache
def _supported(device: int) -> bool:
    if torch.version.hip is not None or arch(device) < 80:
        name = torch.cuda.get_device_name(device)
        _LOG.warning("%s is no NVIDIA GPU of compute capability 8.0 or more: weights are decoded before use", name)
        return False
    return True


def takes(weight: Weight) -> bool:
    """Whether the kernels take this weight's recipe and rotation blocks. Says so once if not."""
    sizes = weight.padded_out, weight.in_blocks, weight.out_blocks
    return _takes(weight.stages, *sizes, weight.large, _index(weight.ratios.device))


@cache
def _takes(
    stages: Stages, rows: int, in_blocks: tuple[int, ...], out_blocks: tuple[int, ...], large: bool, device: int
) -> bool:
    try:
        check(stages, rows, in_blocks, out_blocks)
        for tiles in () if stages.shells else (1, 2, 4):  # aligned or not, the plan is the same
            chosen = variant(stages, tiles, _copies(device), True, large)
            make_plan(in_blocks, rows, chosen, sm_count(device), max_shared(device))
    except UnsupportedLayoutError as error:
        _LOG.warning("A linear is decoded before use, the kernels do not take it: %s", error)
        return False
    return True


def prepare(weight: Weight) -> None:
    """Compile and load what `linear` can need for this weight, so that no call does, and wait until the weight is
    there. Raises KernelError."""
    device = _index(weight.codes[0].device)
    for tiles in () if weight.stages.shells else (1, 2, 4):
        chosen = _variant(weight, tiles, device)
        _matvec(chosen, device)
        _rotate("quantize_input", _shared_buffer(_plan(weight, chosen, device).buffer, device), device)
    _rotate("rotate_input", _shared_buffer(_longest(weight.in_blocks), device), device)
    _rotate("rotate_output", _shared_buffer(_longest(weight.out_blocks), device), device)
    _dequantize(weight.stages, device)
    _counters_of(device)
    torch.cuda.current_stream(device).synchronize()


def linear(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """x float16 or bfloat16 [tokens, K] times the weight: [tokens, N] in x's dtype. Raises KernelError."""
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        x = x.contiguous()
    tokens = len(x)
    y = x.new_empty(tokens, len(weight.scale_out))
    with torch.cuda.device(x.device):
        if tokens > MOST_MATVEC or (weight.stages.shells and tokens):
            _dense(x, weight, bias, y)
        else:
            for at in range(0, tokens, MATVEC_TOKENS):
                _decode(x[at : at + MATVEC_TOKENS], weight, bias, y[at : at + MATVEC_TOKENS])
    return y


def _decode(x: Tensor, weight: Weight, bias: Tensor | None, y: Tensor) -> None:
    """matvec alone for one token and blocks up to 256 on both sides. Else quantize_input before it; and rotate_output
    after it if output blocks exceed 256."""
    device, tokens = _index(x.device), len(x)
    tiles = 1 if tokens <= 4 else 2 if tokens <= 8 else 4
    chosen = _variant(weight, tiles, device)
    plan = _plan(weight, chosen, device)
    stream = torch.cuda.current_stream(device).cuda_stream
    blocks, finishes = block_count(weight.out_blocks), _longest(weight.out_blocks) <= UNIT
    counters = 0
    if tokens == 1 and plan.alone and finishes:
        counters = _counters(device, stream, blocks)
    alone = counters != 0
    each = 4 * plan.count * tokens
    pitch = UNIT * blocks if finishes else weight.padded_out
    # Held until all is queued: what is allocated meanwhile must not lie there.
    held, (partial, *quantized, zeros) = _workspace(
        x.device,
        each * pitch,
        *((0,) * 4 if alone else (plan.units * 512 * tokens, each, each, 4 * blocks)),
    )
    if alone:
        quantized = [0, 0, 0]
    else:
        counters = zeros
        _quantize(x, weight, plan, [*quantized, counters], blocks, stream)
    params = struct.pack(
        f"<{weight.stages.count + 11}Q3I11i",
        *(c.data_ptr() for c in weight.codes), x.data_ptr(), weight.scale_in.data_ptr(), *quantized,
        partial, counters if finishes else 0, weight.ratios.data_ptr(), weight.scale_out.data_ptr(), _address(bias),
        y.data_ptr(),
        *weight.strides,
        DTYPES[x.dtype], DTYPES[y.dtype], DTYPES[weight.scale_out.dtype], 0 if bias is None else DTYPES[bias.dtype],
        tokens, len(weight.scale_in), len(weight.scale_out), weight.padded_out, pitch, plan.count, plan.ctas,
    )  # fmt: skip
    params += pack_borders(plan.slices) + pack_runs(weight.in_blocks) + pack_runs(weight.out_blocks)
    # It reads weights before the kernel ahead of it is done, so that must not be one that writes them: `prepare` waits.
    overlap = weight.tiled
    _matvec(chosen, device).launch(plan.count * plan.ctas, 32 * chosen.warps, _padded(params), stream, overlap)
    if not finishes:
        source = _Rows(partial, weight.padded_out, DTYPES[torch.float32], tokens, weight.padded_out, plan.count)
        _rotate_rows("rotate_output", source, weight.scale_out, bias, y, 0, weight.out_blocks, stream)
    del held


def _quantize(x: Tensor, weight: Weight, plan: Plan, to: list[int], counters: int, stream: int) -> None:
    """Launch quantize_input, which writes planes, scales, sums, and zeros to so many counters."""
    device, chunks = _index(x.device), len(plan.chunks) - 1
    shared = _shared_buffer(plan.buffer, device)
    scratch = None if shared else x.new_empty(plan.buffer * chunks * len(x), dtype=torch.float32)
    params = struct.pack(
        "<7Qq7i",
        x.data_ptr(), weight.scale_in.data_ptr(), *to, _address(scratch),
        x.stride(0),
        DTYPES[x.dtype], DTYPES[weight.scale_in.dtype], len(weight.scale_in), len(x), plan.count, counters, plan.buffer,
    )  # fmt: skip
    params += pack_borders(plan.chunks) + pack_borders(plan.slices) + pack_runs(weight.in_blocks)
    _rotate("quantize_input", shared, device).launch((chunks, len(x), 1), _THREADS, _padded(params), stream, True)


def _dense(x: Tensor, weight: Weight, bias: Tensor | None, y: Tensor) -> None:
    """Rotate, decode and multiply piece after piece, rotate back. Workspace: float16 [tokens, K + N], DENSE_BYTES."""
    device, tokens = _index(x.device), len(x)
    stream = torch.cuda.current_stream(device).cuda_stream
    rotated = x.new_empty(tokens, weight.padded_in, dtype=torch.float16)
    product = x.new_empty(tokens, weight.padded_out, dtype=torch.float16)
    divisors = x.new_empty(tokens, dtype=torch.float32)
    source = _Rows(x.data_ptr(), x.stride(0), DTYPES[x.dtype], tokens, weight.padded_in)
    _rotate_rows("rotate_input", source, weight.scale_in, None, rotated, divisors.data_ptr(), weight.in_blocks, stream)
    rows = max(256, DENSE_BYTES // (2 * weight.padded_in) // 256 * 256)
    dense = x.new_empty(min(rows, weight.padded_out), weight.padded_in, dtype=torch.float16)
    columns = weight.padded_in // 8
    for row in range(0, weight.padded_out, rows):
        piece = dense[: min(rows, weight.padded_out - row)]
        params = struct.pack(
            f"<{weight.stages.count + len(weight.points) + 2}Q3I3i",
            *(t.data_ptr() for t in (*weight.codes, weight.ratios, *weight.points, piece)),
            *weight.strides, row, len(piece), columns,
        )  # fmt: skip
        across = -(-columns // 256)
        down = min(len(piece), max(1, 16 * sm_count(device) // across))  # rows each: a CTA first fills its tables
        grid = (across, down, 1)
        _dequantize(weight.stages, device).launch(grid, 256, params, stream)
        torch.mm(rotated, piece.T, out=product[:, row : row + len(piece)])
    source = _Rows(product.data_ptr(), weight.padded_out, DTYPES[torch.float16], tokens, weight.padded_out)
    _rotate_rows("rotate_output", source, weight.scale_out, bias, y, divisors.data_ptr(), weight.out_blocks, stream)


class _Rows(NamedTuple):
    """What a rotation kernel reads: address, elements from row to row, number of the dtype, rows, columns with padding,
    slices to add up."""

    address: int
    stride: int
    dtype: int
    count: int
    padded: int
    slices: int = 1


def _rotate_rows(
    name: str,
    x: _Rows,
    scale: Tensor,
    bias: Tensor | None,
    y: Tensor,
    divisors: int,
    blocks: tuple[int, ...],
    stream: int,
) -> None:
    """rotate_input or rotate_output over all rows. `divisors`: address of a float a row, 0 for none."""
    device, longest = _index(y.device), _longest(blocks)
    shared = _shared_buffer(longest, device)
    most = 4 * sm_count(device)
    pieces = 1 if name == "rotate_input" or longest <= UNIT else min(sum(blocks[1::2]), max(1, most // x.count))
    ctas = min(x.count, most)
    scratch = None if shared else y.new_empty(ctas * pieces * longest, dtype=torch.float32)
    params = struct.pack(
        "<6Qq9i",
        x.address, scale.data_ptr(), _address(bias), y.data_ptr(), divisors, _address(scratch),
        x.stride,
        x.dtype, DTYPES[y.dtype], DTYPES[scale.dtype], 0 if bias is None else DTYPES[bias.dtype],
        len(scale), x.padded, x.count, x.slices, longest,
    )  # fmt: skip
    params += pack_runs(blocks)
    _rotate(name, shared, device).launch((ctas, pieces, 1), _THREADS, _padded(params), stream)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _workspace(device: torch.device, *sizes: int) -> tuple[Tensor, list[int]]:
    """One new allocation, and the addresses of pieces of it, each on a multiple of 256 bytes. It may be freed as soon
    as the work is queued: the caching allocator gives it only to work that is queued later on the same stream."""
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + -(-size // 256) * 256)
    memory = torch.empty(max(starts[-1], 1), dtype=torch.uint8, device=device)
    return memory, [memory.data_ptr() + start for start in starts[:-1]]


class _Counters:
    """Zeros in a device's memory that a launch finds, uses and leaves as zeros, so that none has to be spent on making
    them. Launches that may run at the same time must not share any: each stream has its own, and each captured launch,
    since graphs may be replayed beside each other."""

    EACH = MAX_FEATURES // UNIT + 2 * MAX_RUNS  # most blocks of an output
    RESERVE = 1 << 20  # for captured launches: some ten thousand

    def __init__(self, device: int) -> None:
        self._device = device
        self._of_stream: dict[int, Tensor] = {}
        self._lock = threading.Lock()
        self._reserve, self._used = self._zeros(self.RESERVE), 0

    def _zeros(self, count: int) -> Tensor:
        return torch.zeros(count, dtype=torch.int32, device=f"cuda:{self._device}")

    def take(self, stream: int, count: int) -> int:
        """Address of `count` zeros for a launch on the current stream, 0 if none are left for a graph."""
        if torch.cuda.is_current_stream_capturing():
            with self._lock:
                at, self._used = self._used, self._used + count
            return self._reserve.data_ptr() + 4 * at if self._used <= self.RESERVE else 0
        found = self._of_stream.get(stream)
        if found is None:
            found = self._of_stream[stream] = self._zeros(self.EACH)
        return found.data_ptr()


@cache
def _counters_of(device: int) -> _Counters:
    return _Counters(device)


def _counters(device: int, stream: int, count: int) -> int:
    return _counters_of(device).take(stream, count)


def _padded(params: bytes) -> bytes:
    """A struct that holds pointers ends on a multiple of 8 bytes."""
    return params + bytes(-len(params) % 8)


@cache
def _longest(blocks: tuple[int, ...]) -> int:
    return max(blocks[::2])


def _shared_buffer(coordinates: int, device: int) -> int:
    """Bytes of shared memory for a buffer of the rotation kernels, 0 if it has to lie in global memory."""
    size = 4 * (max(coordinates, _BUFFER) + 128)
    return size if size <= max_shared(device) else 0


@cache
def _copies(device: int) -> int:
    """Copies of the decode tables: one for each lane, if shared memory holds two tables and what else a CTA needs."""
    return 32 if max_shared(device) >= 160 * 1024 else 1


def _variant(weight: Weight, tiles: int, device: int) -> Variant:
    return variant(weight.stages, tiles, _copies(device), weight.aligned, weight.large)


def _plan(weight: Weight, chosen: Variant, device: int) -> Plan:
    return make_plan(weight.in_blocks, weight.padded_out, chosen, sm_count(device), max_shared(device))


def _matvec(chosen: Variant, device: int) -> Kernel:
    return load("matvec.cu", "matvec", device, chosen.shared_limit(max_shared(device)), **chosen.defines)


def _rotate(name: str, shared: int, device: int) -> Kernel:
    return load("rotate.cu", name, device, shared or 1024)


def _dequantize(stages: Stages, device: int) -> Kernel:
    file, name = ("shell.cu", "dequantize_shell") if stages.shells else ("dequantize.cu", "dequantize")
    return load(file, name, device, **stages.defines)
