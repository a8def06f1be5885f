"""`eightfold::linear` on a GPU: which kernels run for how many tokens, with what workspace.

Up to 16 tokens: matvec, which reads the codes once; quantize_input before it unless matvec can do that itself (one
token), rotate_output after it unless it can do that (up to MOST_FINISHED). Then, while gemm.takes it, a product
from the codes between rotate_input and rotate_output; where codes cannot be tiled, matvec for every 16 up to
MOST_MATVEC. More: a dense weight is made, piece after piece, and cuBLAS multiplies (dense.py); for stages of E8 shells
always. Everything is queued on the current stream; memory comes from PyTorch's pool. Within 2-8 and 9-16
tokens (of several 16, the last too), 17-32, 33-64, 65-128 and every further tile of tokens a token's result does not
depend on the others; where cuBLAS multiplies that is its affair.
"""

from __future__ import annotations

import logging
import struct
import threading
from functools import cache

import torch
from torch import Tensor

from eightfold.cuda.dense import dense, prepare_dense
from eightfold.cuda.driver import Kernel, arch, load, max_shared, sm_count
from eightfold.cuda.driver import device_index as _index
from eightfold.cuda.gemm import prepare_product, product
from eightfold.cuda.gemm import takes as product_takes
from eightfold.cuda.plan import (
    ALONE_TOKENS,
    MATVEC_TOKENS,
    MAX_ROWS,
    MAX_RUNS,
    TILE,
    UNIT,
    Plan,
    Stages,
    UnsupportedLayoutError,
    Variant,
    block_count,
    check,
    is_few,
    make_plan,
    pack_borders,
    pack_runs,
    runs,
    variant,
)
from eightfold.cuda.rotate import (
    DTYPES,
    THREADS,
    Rows,
    Side,
    address,
    kernel,
    longest,
    prepare_rotations,
    rotate_output,
    shared_buffer,
    whole,
)
from eightfold.cuda.weight import Weight

_LOG = logging.getLogger("eightfold")
CLASSES = 1, 8, MATVEC_TOKENS  # most tokens of a launch of matvec: within a class nothing depends on their number
MOST_FINISHED = 1  # tokens up to which matvec finishes the output by itself; rotate_output is faster for more
MOST_MATVEC = 48  # the same of several launches of matvec


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
    return _takes(weight.stages, *sizes, _index(weight.ratios.device))


@cache
def _takes(stages: Stages, rows: int, in_blocks: tuple[int, ...], out_blocks: tuple[int, ...], device: int) -> bool:
    try:
        check(stages, rows, in_blocks, out_blocks)
        few = is_few(rows, runs(in_blocks)[-1][1])
        for tokens in () if stages.shells else CLASSES:  # with aligned codes, which take more shared memory
            chosen = variant(stages, _tiles(tokens), max_shared(device), True, few)
            make_plan(in_blocks, rows, chosen, tokens, sm_count(device), max_shared(device))
    except UnsupportedLayoutError as error:
        _LOG.warning("A linear is decoded before use, the kernels do not take it: %s", error)
        return False
    return True


def prepare(weight: Weight) -> None:
    """Compile and load what `linear` can need for this weight, so that no call does, and wait until the weight is
    there. Raises KernelError."""
    device = _index(weight.codes[0].device)
    for tokens in () if weight.stages.shells else CLASSES:
        chosen = _variant(weight, tokens, device)
        _matvec(chosen, device)
        _quantize_kernel(_plan(weight, chosen, tokens, device), device)
    prepare_rotations(weight.in_blocks, weight.out_blocks, device)
    prepare_dense(weight)
    if weight.aligned and not weight.stages.shells:
        prepare_product(weight)
    _counters_of(device)
    torch.cuda.current_stream(device).synchronize()


def linear(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """x float16 or bfloat16 [tokens, K] times the weight: [tokens, N] in x's dtype. Raises KernelError."""
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        x = x.contiguous()
    tokens = len(x)
    y = x.new_empty(tokens, len(weight.scale_out))
    with torch.cuda.device(x.device):
        if weight.stages.shells and tokens:
            dense(x, weight, bias, y)
        elif tokens > MATVEC_TOKENS and product_takes(weight, tokens, _index(x.device)):
            product(x, weight, bias, y)
        elif tokens > MOST_MATVEC:
            dense(x, weight, bias, y)
        else:
            for at in range(0, tokens, MATVEC_TOKENS):
                _decode(x[at : at + MATVEC_TOKENS], weight, bias, y[at : at + MATVEC_TOKENS])
    return y


def _decode(x: Tensor, weight: Weight, bias: Tensor | None, y: Tensor) -> None:
    """matvec; quantize_input before it if it cannot rotate the input by itself, rotate_output after it if it cannot
    finish the output by itself."""
    device, tokens = _index(x.device), len(x)
    chosen = _variant(weight, tokens, device)
    plan = _plan(weight, chosen, tokens, device)
    stream = torch.cuda.current_stream(device).cuda_stream
    alone = plan.in_registers and tokens <= ALONE_TOKENS
    blocks = block_count(weight.out_blocks)
    finishes = tokens <= MOST_FINISHED and longest(weight.out_blocks) <= UNIT
    counters = _counters_of(device).take(stream, blocks) if finishes else 0
    each = 4 * plan.count * tokens
    pitch = -(-weight.padded_out // 4) * 4  # sums are stored four rows at a time
    # Held until all is queued: what is allocated meanwhile must not lie there.
    held, (partial, *quantized) = _workspace(
        x.device, each * pitch, *((0,) * 3 if alone else (plan.units * 512 * tokens, each, each))
    )
    if alone:
        quantized = [0, 0, 0]
    else:
        _quantize(x, weight, plan, quantized, stream)
    params = struct.pack(
        f"<{weight.stages.count + 11}Q3I12i",
        *(c.data_ptr() for c in weight.codes), x.data_ptr(), weight.scale_in.data_ptr(), *quantized,
        partial, counters, weight.ratios.data_ptr(), weight.scale_out.data_ptr(), address(bias),
        y.data_ptr(),
        *weight.strides,
        DTYPES[x.dtype], DTYPES[y.dtype], DTYPES[weight.scale_out.dtype], 0 if bias is None else DTYPES[bias.dtype],
        tokens, len(weight.scale_in), len(weight.scale_out), weight.padded_out, pitch, plan.count,
        *divmod(-(-weight.padded_out // (TILE * chosen.rows)), plan.ctas),
    )  # fmt: skip
    params += pack_borders(plan.slices) + pack_runs(weight.in_blocks) + pack_runs(weight.out_blocks)
    # It reads weights before the kernel ahead of it is done, so that must not be one that writes them: `prepare` waits.
    overlap = weight.tiled
    _matvec(chosen, device).launch((plan.ctas, plan.count, 1), 32 * chosen.warps, whole(params), stream, overlap)
    if not counters:
        source = Rows(partial, pitch, DTYPES[torch.float32], tokens, plan.count)
        side = Side(weight.scale_out, bias, weight.out_blocks, overlap)
        rotate_output(source, side, y, 0, (0, weight.padded_out), stream)
    del held


def _quantize(x: Tensor, weight: Weight, plan: Plan, to: list[int], stream: int) -> None:
    """Launch what rotates and quantizes x: it writes planes, scales, sums."""
    device, chunks = _index(x.device), len(plan.chunks) - 1
    chosen = _quantize_kernel(plan, device)
    buffered = not plan.in_registers and not shared_buffer(plan.buffer, device)
    scratch = x.new_empty(plan.buffer * chunks * len(x), dtype=torch.float32) if buffered else None
    params = struct.pack(
        "<6Qq6i",
        x.data_ptr(), weight.scale_in.data_ptr(), *to, address(scratch),
        x.stride(0),
        DTYPES[x.dtype], DTYPES[weight.scale_in.dtype], len(weight.scale_in), len(x), plan.count, plan.buffer,
    )  # fmt: skip
    params += pack_borders(plan.chunks) + pack_borders(plan.slices) + pack_runs(weight.in_blocks)
    chosen.launch((chunks, len(x), 1), THREADS, whole(params), stream, True)


def _quantize_kernel(plan: Plan, device: int) -> Kernel:
    if plan.in_registers:
        return kernel("quantize_input", 0, device)
    return kernel("quantize_wide_input", shared_buffer(plan.buffer, device), device)


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

    EACH = MAX_ROWS // UNIT + 2 * MAX_RUNS  # most blocks of an output
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


def _tiles(tokens: int) -> int:
    """Tiles of 4 tokens that so many take."""
    return 1 if tokens == 1 else 2 if tokens <= 8 else 4


def _variant(weight: Weight, tokens: int, device: int) -> Variant:
    few = is_few(weight.padded_out, weight.padded_in)
    return variant(weight.stages, _tiles(tokens), max_shared(device), weight.aligned, few)


def _plan(weight: Weight, chosen: Variant, tokens: int, device: int) -> Plan:
    most = next(limit for limit in CLASSES if tokens <= limit)
    return make_plan(weight.in_blocks, weight.padded_out, chosen, most, sm_count(device), max_shared(device))


def _matvec(chosen: Variant, device: int) -> Kernel:
    return load("matvec.cu", "matvec", device, chosen.shared_limit(max_shared(device)), **chosen.defines)
