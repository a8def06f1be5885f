"""The linear for many tokens: make a dense weight in 16 bits, a piece of rows at a time, and multiply with cuBLAS.

Where rotation blocks are at most UNIT on both sides (`unrotates`) dense.cu makes the weight that the linear stands for,
so that cuBLAS multiplies the activations as they are. Longer blocks, stages of E8 shells and devices whose shared
memory holds no tile of 256 x 256 take the weight as it is coded, still rotated, between rotations of the activations.
"""

from __future__ import annotations

import struct
from functools import cache
from itertools import accumulate

import torch
from torch import Tensor

from eightfold.cuda.driver import Kernel, load, max_shared, sm_count
from eightfold.cuda.driver import device_index as _index
from eightfold.cuda.plan import UNIT, Stages, pack_runs, segments
from eightfold.cuda.rotate import DTYPES, Rows, Side, longest, rotate_input, rotate_output, whole
from eightfold.cuda.weight import Weight

DENSE_BYTES = 512 << 20  # most weights of 16 bits made at once
_STEP = 256  # rows of a piece are a multiple: of cuBLAS's tiles, and of the blocks of the default layout
# From measurements on an H200, for `piece_rows`; only comparisons matter.
_TILE = 128, 256  # tokens and rows of what a multiprocessor multiplies at a time
_TILE_TIME = 0.0124  # microseconds a column of input
_PIECE_TIME = 8.0  # microseconds to start and finish the three kernels of a piece
_RESIDENT = 32 << 20  # bytes of a piece that stays in L2 from decode to product
_SPEEDS = 5.5e6, 4.0e6  # bytes a microsecond that are decoded into L2, and beyond
_SLACK = 1.02
_KERNELS = {torch.float16: "dense_float16", torch.bfloat16: "dense_bfloat16"}
_THREADS, _E81B_COPIES = 512, 16  # of dense.cu: of a CTA; most copies of E81B's table


def dense(x: Tensor, weight: Weight, bias: Tensor | None, y: Tensor) -> None:
    """y [tokens, N] of x float16 or bfloat16 [tokens, K] through dense weights. Raises KernelError."""
    if unrotates(weight, _index(x.device)):
        _multiply_unrotated(x, weight, bias, y)
    else:
        _multiply_rotated(x, weight, bias, y)


def unrotates(weight: Weight, device: int) -> bool:
    """Whether `dense` makes weights that are rotated back and scaled."""
    return _unrotates(weight.stages, weight.in_blocks, weight.out_blocks, max_shared(device))


@cache
def _unrotates(stages: Stages, in_blocks: tuple[int, ...], out_blocks: tuple[int, ...], shared: int) -> bool:
    short = max(longest(in_blocks), longest(out_blocks)) <= UNIT
    return short and not stages.shells and table_copies(stages, shared) > 0


@cache
def table_copies(stages: Stages, shared: int) -> int:
    """Copies of the decode tables in dense.cu where a CTA can have `shared` bytes, 0 if it has no room at all."""
    return next((copies for copies in (32, 1) if shared_bytes(stages, copies) <= shared), 0)


def shared_bytes(stages: Stages, copies: int) -> int:
    """Shared memory of a CTA of dense.cu: tables, tile, scales, matrices, what warps keep, ratios."""
    tables = 1024 * (2 * copies + stages.e81b * min(copies, _E81B_COPIES))
    return 1024 + tables + 2 * UNIT * UNIT + 2 * 4 * UNIT + 5 * 512 + 16 * (_THREADS // 32) + 16


def prepare_dense(weight: Weight) -> None:
    """Compile and load what `dense` needs, apart from rotations. Raises KernelError."""
    device = _index(weight.ratios.device)
    if unrotates(weight, device):
        for dtype in _KERNELS:
            _unrotating(weight.stages, dtype, device)
    else:
        _dequantize(weight.stages, device)


def _multiply_unrotated(x: Tensor, weight: Weight, bias: Tensor | None, y: Tensor) -> None:
    """Make the weight and multiply, in as few pieces as DENSE_BYTES allow, which are the workspace."""
    device, rows, columns = _index(x.device), len(weight.scale_out), len(weight.scale_in)
    stream = torch.cuda.current_stream(device).cuda_stream
    pitch = -(-columns // 8) * 8  # what a thread stores is 16 bytes
    spans = row_spans(weight.out_blocks, even_rows(weight.padded_out, pitch))
    weights = x.new_empty(max(min(end, rows) - begin for begin, end in spans), pitch)
    with torch.no_grad():  # what is written into does not go with tensors that want a gradient
        for begin, end in spans:
            stop = min(end, rows)
            if begin >= stop:  # padding
                continue
            piece, out = weights[: stop - begin], y[:, begin:stop]
            _unrotate(weight, (begin, end), piece, stream)
            factors = x, piece[:, :columns].T
            if bias is None:
                torch.mm(*factors, out=out)
            else:
                torch.addmm(bias[begin:stop].to(x.dtype), *factors, out=out)


def _unrotate(weight: Weight, span: tuple[int, int], piece: Tensor, stream: int) -> None:
    """Launch what fills `piece` [rows of the span, K in whole eights] with the weight's rows of a span of blocks."""
    device, (begin, end) = _index(piece.device), span
    across, down = segments(weight.in_blocks, 0, weight.padded_in), segments(weight.out_blocks, begin, end)
    params = struct.pack(
        f"<{weight.stages.count + 4}Q3I9i",
        *(t.data_ptr() for t in (*weight.codes, weight.ratios, weight.scale_in, weight.scale_out, piece)),
        *weight.strides,
        DTYPES[weight.scale_out.dtype], weight.aligned, begin, end, len(weight.scale_in), len(weight.scale_out),
        piece.shape[1] // 8, across, across * down,
    )  # fmt: skip
    params = whole(params + pack_runs(weight.in_blocks) + pack_runs(weight.out_blocks))
    kernel, ctas = _unrotating(weight.stages, piece.dtype, device), min(sm_count(device), across * down)
    # It reads codes before the kernel ahead of it is done, so that must not be one that writes them: `prepare` waits.
    kernel.launch(ctas, _THREADS, params, stream, weight.tiled)


def _unrotating(stages: Stages, dtype: torch.dtype, device: int) -> Kernel:
    """The kernel of dense.cu that makes weights of a dtype."""
    copies = table_copies(stages, max_shared(device))
    return load("dense.cu", _KERNELS[dtype], device, shared_bytes(stages, copies), **dense_defines(stages, copies))


def dense_defines(stages: Stages, copies: int) -> dict[str, int]:
    """Macros of dense.cu with so many copies of the decode tables."""
    return {**stages.defines, "COPIES": copies, "E81B_COPIES": min(copies, _E81B_COPIES)}


@cache
def even_rows(rows: int, columns: int) -> int:
    """Rows of the weight [rows, columns] to make at once: a multiple of _STEP, about the same for as few pieces as
    DENSE_BYTES allow."""
    most = max(1, DENSE_BYTES // (2 * columns * _STEP))
    steps = -(-rows // _STEP)
    return -(-steps // -(-steps // most)) * _STEP


def _multiply_rotated(x: Tensor, weight: Weight, bias: Tensor | None, y: Tensor) -> None:
    """Rotate, decode and multiply piece after piece, rotate back what is whole output blocks. Workspace: float16
    tokens * K, tokens * rows and rows * K of a piece of at most DENSE_BYTES (or of the longest output block)."""
    device, tokens, columns = _index(x.device), len(x), weight.padded_in
    stream = torch.cuda.current_stream(device).cuda_stream
    rows = piece_rows(tokens, weight.padded_out, columns, sm_count(device))
    spans = row_spans(weight.out_blocks, rows)
    rotated = x.new_empty(tokens, columns, dtype=torch.float16)
    divisors = x.new_empty(tokens, dtype=torch.float32)
    products = x.new_empty(tokens * max(end - begin for begin, end in spans), dtype=torch.float16)
    weights = x.new_empty(min(rows, weight.padded_out), columns, dtype=torch.float16)
    side = Side(weight.scale_out, bias, weight.out_blocks, weight.tiled)
    rotate_input(x, Side(weight.scale_in, None, weight.in_blocks, weight.tiled), rotated, divisors, stream)
    for begin, end in spans:
        product = products[: tokens * (end - begin)].view(tokens, end - begin)
        for row in range(begin, end, rows):
            piece = weights[: min(rows, end - row)]
            _decode(weight, row, piece, stream)
            torch.mm(rotated, piece.T, out=product[:, row - begin : row - begin + len(piece)])
        source = Rows(product.data_ptr(), end - begin, DTYPES[torch.float16], tokens)
        rotate_output(source, side, y, divisors.data_ptr(), (begin, end), stream)


def _decode(weight: Weight, row: int, piece: Tensor, stream: int) -> None:
    """Launch what fills float16 `piece` [rows, K with padding] with rows from `row` on."""
    device, (rows, columns) = _index(piece.device), piece.shape
    params = struct.pack(
        f"<{weight.stages.count + len(weight.points) + 2}Q3I3i",
        *(t.data_ptr() for t in (*weight.codes, weight.ratios, *weight.points, piece)),
        *weight.strides, row, rows, columns // 8,
    )  # fmt: skip
    ctas = min(4 * sm_count(device), -(-rows // 16) * -(-columns // 512))
    _dequantize(weight.stages, device).launch(ctas, 256, params, stream, weight.tiled)


def _dequantize(stages: Stages, device: int) -> Kernel:
    """The kernel that decodes and no more."""
    file, name = ("shell.cu", "dequantize_shell") if stages.shells else ("dequantize.cu", "dequantize")
    return load(file, name, device, **stages.defines)


@cache
def piece_rows(tokens: int, rows: int, columns: int, processors: int) -> int:
    """Rows of the weight [rows, columns] to decode at once: the fewest that cost at most _SLACK more than the best
    number. Few need little memory and stay in L2 up to the product, but launches add up and processors idle."""

    def time(count: int) -> float:
        tiles = -(-tokens // _TILE[0]) * -(-count // _TILE[1])
        size = 2 * count * columns
        return _PIECE_TIME + -(-tiles // processors) * _TILE_TIME * columns + size / _SPEEDS[size > _RESIDENT]

    def total(count: int) -> float:
        pieces, rest = divmod(rows, count)
        return pieces * time(count) + (time(rest) if rest else 0)

    most = max(1, min(DENSE_BYTES // (2 * columns * _STEP), -(-rows // _STEP)))
    times = {_STEP * i: total(_STEP * i) for i in range(1, most + 1)}
    best = min(times.values())
    return next(count for count, found in times.items() if found <= best * _SLACK)


@cache
def row_spans(blocks: tuple[int, ...], rows: int) -> list[tuple[int, int]]:
    """Ranges of whole blocks (flat [size, count] pairs), each as many as `rows` have room for, at least one."""
    sizes = (size for size, count in zip(blocks[::2], blocks[1::2], strict=True) for _ in range(count))
    spans, begin, last = [], 0, 0
    for end in accumulate(sizes):
        if end - begin > rows and last > begin:
            spans.append((begin, last))
            begin = last
        last = end
    return [*spans, (begin, last)]
