"""The linear for many tokens: decode the weight to float16, a piece of rows at a time, and multiply with cuBLAS."""

from __future__ import annotations

import struct
from functools import cache
from itertools import accumulate

import torch
from torch import Tensor

from eightfold.cuda.driver import Kernel, load, sm_count
from eightfold.cuda.driver import device_index as _index
from eightfold.cuda.plan import Stages
from eightfold.cuda.rotate import DTYPES, Rows, Side, rotate_input, rotate_output
from eightfold.cuda.weight import Weight

DENSE_BYTES = 512 << 20  # most float16 weights decoded at once
_STEP = 256  # rows of a piece are a multiple: of cuBLAS's tiles, and of the blocks of the default layout
# From measurements on an H200, for `piece_rows`; only comparisons matter.
_TILE = 128, 256  # tokens and rows of what a multiprocessor multiplies at a time
_TILE_TIME = 0.0124  # microseconds a column of input
_PIECE_TIME = 8.0  # microseconds to start and finish the three kernels of a piece
_RESIDENT = 32 << 20  # bytes of a piece that stays in L2 from decode to product
_SPEEDS = 5.5e6, 4.0e6  # bytes a microsecond that are decoded into L2, and beyond
_SLACK = 1.02


def dense(x: Tensor, weight: Weight, bias: Tensor | None, y: Tensor) -> None:
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
    dequantize(weight.stages, device).launch(ctas, 256, params, stream, weight.tiled)


def dequantize(stages: Stages, device: int) -> Kernel:
    """The kernel that decodes."""
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
