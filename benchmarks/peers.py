"""What benchmarks/kernels.py measures and how: layers with random weights of eightfold, cuBLAS and other libraries.

    python benchmarks/peers.py build exllamav3     # its extension, ahead of the measurement (3.5 minutes on 16 cores)
    python benchmarks/peers.py build glq           # 1 minute

GLQ 0.6.6 and exllamav3 1.6.5 compile their CUDA extension with nvcc and ninja when they are first used and keep it
in ~/.cache/torch_extensions. Neither is needed to use eightfold; one that is not installed raises ImportError.
Random bits are as good as trained ones: every bit pattern is a weight in each of these formats.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from eightfold.e8p import codebook
from eightfold.format import LayerSpec, PackedWeight
from eightfold.linear import QuantLinear
from eightfold.quantize import recipe
from eightfold.rotation import IN_FLOOR, OUT_FLOOR, layout_blocks

Call = Callable[[Tensor], Tensor]

LAYOUT = "pow2-sum-256"  # what the quantizer writes by default
GLQ_RATIO = {2: 0.0, 3: 2.04, 4: 3.45}  # what GLQ divides its second stage by
EXL3_MUL1 = 0x83DCD12D  # the marker of exllamav3's default codebook; only its presence counts
VERSIONS = {"glq": "0.6.6", "exllamav3": "1.6.5"}
# hidden, outputs of q, of k and of v, intermediate
MODELS = {
    "Llama-3-8B": (4096, 4096, 1024, 14336),
    "SmolLM3-3B": (2048, 2048, 512, 11008),
    "Gemma-3-27B": (5376, 4096, 2048, 21504),
}
DTYPE = {"cublas": "bfloat16", "eightfold": "float16", **dict.fromkeys(VERSIONS, "float16")}  # in the table
REPLAYS = 7  # of which the median counts
WARM_S = 0.03  # replays ahead of them, for the clocks to rise
LONGEST_S = 0.1  # a replay, where there is a choice
NODES = 200  # kernels in a graph that do nothing, or little
COPY_BLOCKS = (2048, 4096, 8192)  # float32 values a block of threads moves
COPY_BYTES = (1 << 30, 1 << 32)


class Job(NamedTuple):
    """Layers of one kind to measure with each number of `tokens`. `bits`: 16 for cuBLAS; `dtype` of activations."""

    impl: str
    N: int
    K: int
    bits: int
    dtype: str
    tokens: tuple[int, ...]


@cache
def _kernels() -> tuple[Any, Any]:
    """Triton kernels, where Triton is: (a copy in 16-byte pieces with many blocks, one that does nothing)."""
    import triton
    from triton import language as tl

    @triton.jit
    def copy_vectors(source, target, BLOCK: tl.constexpr):  # noqa: ANN001, ANN202
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        tl.store(target + at, tl.load(source + at))

    @triton.jit
    def nothing():  # noqa: ANN202
        pass

    return copy_vectors, nothing


@cache
def _stream() -> torch.cuda.Stream:
    return torch.cuda.Stream()


def launch_seconds(calls: Sequence[Callable[[], Any]], shorten: bool = False) -> float:
    """Seconds of one of `calls`: the median replay of a CUDA graph of all of them, over their number.

    `shorten`: take only the first few, at least 4, where all of them would run for more than LONGEST_S. Without a
    CUDA device, the time of running them: for rehearsals.
    """
    if not torch.cuda.is_available():
        start = time.perf_counter()
        for call in calls[:4]:
            call()
        return (time.perf_counter() - start) / len(calls[:4])
    torch.cuda.synchronize()
    with torch.cuda.stream(_stream()):
        for call in calls[:3]:  # of the same size: libraries choose and allocate before the capture
            call()
        if shorten:
            one = _seconds(calls[-1])
            calls = calls[: max(4, int(LONGEST_S / one))]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=_stream()):
        for call in calls:
            call()
    with torch.cuda.stream(_stream()):
        start = time.perf_counter()
        while time.perf_counter() - start < WARM_S:
            graph.replay()
            _stream().synchronize()
        found = statistics.median(_seconds(graph.replay) for _ in range(REPLAYS))
    graph.reset()
    return found / len(calls)


def _seconds(call: Callable[[], Any]) -> float:
    """Seconds on the device, by events on the current stream."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def limits(device: torch.device) -> list[dict[str, Any]]:
    """Rows: each way to copy in GB/s, read and written bytes counted, the fastest of them ("copy"), and the
    microseconds of a graph's node that does nothing ("empty node")."""
    if device.type == "cpu":
        x = torch.ones(1 << 22)
        found = {"copy_ 16 MiB": 2 * x.nbytes / launch_seconds([partial(torch.empty_like(x).copy_, x)])}
        node = 0.0
    else:
        copy, nothing = _kernels()
        found = {}
        for size in COPY_BYTES:
            x, y = torch.randn(2, size // 4, device=device)  # float32, for torch's own elementwise kernel
            ways = {"copy_": partial(y.copy_, x), "neg": partial(torch.neg, x, out=y)}
            for block in COPY_BLOCKS:
                ways[f"kernel of {block}"] = partial(copy[(size // 4 // block,)], x, y, BLOCK=block, num_warps=8)
            for name, way in ways.items():
                found[f"{name} {size >> 30} GiB"] = 2 * size / launch_seconds([way] * 4)
            if not torch.equal(x, y):
                raise RuntimeError("expected the copy kernel to copy, it did not")
            del x, y, ways, way
        node = launch_seconds([partial(nothing[(1,)], num_warps=1)] * NODES)
    rows = [{"case": "limit", "impl": name, "gb_per_s": speed / 1e9} for name, speed in found.items()]
    rows.append({"case": "limit", "impl": "copy", "gb_per_s": max(found.values()) / 1e9})
    return [*rows, {"case": "limit", "impl": "empty node", "microseconds": node * 1e6}]


def encode_seconds(N: int, K: int, device: torch.device) -> float:
    """Seconds to find the nearest E8P point of every eighth of a random N x K matrix."""
    x = torch.randn(N * K // 8, 8, device=device)
    times = []
    for _ in range(4):
        start = time.perf_counter()
        codebook("e8p").encode(x).view(-1)[-1].item()  # waits for the device
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def random_bits(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uniform random bits as integers of `dtype`."""
    count = dtype.itemsize
    for size in shape:
        count *= size
    return torch.randint(0, 256, (count,), dtype=torch.uint8, device=device).view(dtype).view(shape)


def random_scales(size: int, scale: float, device: torch.device) -> Tensor:
    """float16 [size], about `scale` in magnitude, with random signs."""
    magnitude = torch.rand(size, device=device).add_(0.5).mul_(scale)
    return torch.where(torch.rand(size, device=device) < 0.5, magnitude, -magnitude).half()


def _cublas(N: int, K: int, dtype: torch.dtype, device: torch.device) -> Call:
    """A dense layer of N x K as torch runs it."""
    weight = torch.empty(N, K, dtype=dtype, device=device).normal_(std=1 / 64)
    return lambda x: functional.linear(x, weight)


def _eightfold(family: str, N: int, K: int, bits: int, dtype: torch.dtype, device: torch.device) -> Call:
    """An eightfold linear of random codes of a codebook (rvq.FAMILIES), ready to run."""
    spec = LayerSpec(N, K, bits, layout_blocks(N, LAYOUT, OUT_FLOOR), layout_blocks(K, LAYOUT, IN_FLOOR), None)
    stages = recipe(bits, family)
    rows = (spec.padded_out, spec.padded_in // 8)
    codes = tuple(random_bits(rows, stage, device) for stage in stages.code_dtypes)
    scales = random_scales(K, 1.0, device), random_scales(N, 1 / 64, device)
    return QuantLinear.from_packed(PackedWeight(spec, stages, codes, *scales)).to(device).prepare(dtype)


def make(impl: str, N: int, K: int, bits: int, dtype: torch.dtype, device: torch.device) -> Call:
    """One layer of `impl` with random weights; "e8shell" is eightfold with that codebook."""
    if impl in ("eightfold", "e8shell"):
        return _eightfold("e8p" if impl == "eightfold" else impl, N, K, bits, dtype, device)
    return _cublas(N, K, dtype, device) if impl == "cublas" else peer(impl, N, K, bits, device)


def measure(job: Job, pool: float, copy: float, device: torch.device) -> list[dict[str, Any]]:
    """A row for each number of tokens. `pool`: bytes of weights to rotate over; `copy`: GB/s."""
    dtype = getattr(torch, job.dtype)
    code_bytes = job.N * job.K * job.bits // 8
    count = max(2, math.ceil(pool / code_bytes))
    layers = [make(job.impl, job.N, job.K, job.bits, dtype, device) for _ in range(count)]
    first = torch.randn(1, job.K, device=device).to(dtype)
    for module in layers:  # what a layer of a peer does at its first call cannot be captured
        module(first)
    rows = []
    for tokens in job.tokens:
        x = torch.randn(tokens, job.K, device=device).to(dtype)
        seconds = launch_seconds([partial(module, x) for module in layers], shorten=tokens > 64)
        del x
        rows.append({"case": "linear", **job._asdict(), "tokens": tokens, **_speed(seconds, code_bytes, copy)})
    return rows


def _speed(seconds: float, code_bytes: int, copy: float) -> dict[str, Any]:
    share = code_bytes / seconds / 1e9 / copy
    return {"microseconds": seconds * 1e6, "code_bytes": code_bytes, "share_of_copy": share}


def linears(model: str, fused: bool) -> list[tuple[int, int]]:
    """(N, K) of each linear of a decoder layer; `fused`: q, k and v as one, gate and up as one."""
    hidden, q, kv, inner = MODELS[model]
    if fused:
        return [(q + 2 * kv, hidden), (hidden, q), (2 * inner, hidden), (hidden, inner)]
    return [(q, hidden), (kv, hidden), (kv, hidden), (hidden, q), (inner, hidden), (inner, hidden), (hidden, inner)]


def measure_layer(model: str, bits: int, fused: bool, pool: float, copy: float, device: torch.device) -> dict[str, Any]:
    """A row: all linears of a decoder layer, one token; 16 bits are cuBLAS in bfloat16. "between_microseconds": each
    behind a small kernel of PyTorch, as in a model, which lets none begin early; without that kernel's own time."""
    impl = "cublas" if bits == 16 else "eightfold"
    dtype, shapes = getattr(torch, DTYPE[impl]), linears(model, fused)
    code_bytes = sum(N * K for N, K in shapes) * bits // 8
    copies = max(2, math.ceil(pool / code_bytes))
    inputs = {K: torch.randn(1, K, device=device).to(dtype) for _, K in shapes}
    calls = [partial(make(impl, N, K, bits, dtype, device), inputs[K]) for _ in range(copies) for N, K in shapes]
    for call in calls[: len(shapes)]:  # each shape once ahead of the capture
        call()
    seconds = launch_seconds(calls) * len(shapes)
    small = partial(torch.zeros(1024, device=device).add_, 1)
    between = 2 * launch_seconds([each for call in calls for each in (small, call)]) - launch_seconds([small] * NODES)
    row = {"case": "layer", "impl": impl, "model": model, "fused": fused, "bits": bits, "dtype": DTYPE[impl]}
    row |= {"tokens": 1, "between_microseconds": between * len(shapes) * 1e6}
    return {**row, **_speed(seconds, code_bytes, copy)}


def load(name: str) -> Any:
    """The peer's module of linears, with its extension, which is built now if it was not.

    Raises ImportError where the library or something that it needs is not installed, RuntimeError for a build that
    failed.
    """
    # The same in every process, or ninja would build again. Without a list torch asks the device and warns.
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", f"{major}.{minor}")
    os.environ.setdefault("MAX_JOBS", str(os.cpu_count()))
    os.environ.setdefault("EXL3_EXPANDABLE_SEGMENTS", "0")  # else importing it changes torch's allocator for everyone
    if name == "exllamav3":
        from exllamav3.modules.quant import exl3  # pyright: ignore[reportMissingImports]

        return exl3
    from glq import inference_kernel, quantized_linear  # pyright: ignore[reportMissingImports]

    if not inference_kernel._try_load_cuda_ext():
        raise RuntimeError("glq says only that its extension did not build: look whether nvcc and ninja are in PATH")
    return quantized_linear


def peer(name: str, N: int, K: int, bits: int, device: torch.device) -> Call:
    """A linear of peer `name` with random codes, rotations included: float16 [tokens, K] → [tokens, N]."""
    return {"glq": _glq, "exllamav3": _exllamav3}[name](N, K, bits, device)


@cache
def _glq_codebooks(device: torch.device) -> tuple[Any, Any]:
    from glq.codebook_e8p import E8PCodebook, E81BCodebook  # pyright: ignore[reportMissingImports]

    return E8PCodebook(device=str(device), verbose=False), E81BCodebook(device=str(device), verbose=False)


def _glq(N: int, K: int, bits: int, device: torch.device) -> Call:
    """GLQ's E8P linear: one fused call in C++, block diagonal rotations of its own layout. 2, 3 or 4 bits."""
    library = load("glq")  # not under torch.device: its modules make tables when they are imported
    with torch.device(device):
        linear = library.E8RHTLinear(K, N, codebook_type="e8p")
    packed = (linear.m_pad // 16, linear.n_pad // 64, 8, 4)
    linear.Qidxs_e8p = random_bits(packed, torch.int64, device)
    if bits == 3:
        linear.Qidxs2_e81b = random_bits((linear.m_pad, linear.n_pad // 64), torch.int64, device)
    if bits == 4:
        linear.Qidxs2_e8p = random_bits(packed, torch.int64, device)
    linear.SU = random_scales(linear.m_pad, 1.0, device)
    linear.SV = random_scales(linear.n_pad, 1.0, device)
    linear.Wscale = torch.tensor(1 / 64, device=device)
    linear.inv_resid_scale = torch.tensor(1 / GLQ_RATIO[bits] if GLQ_RATIO[bits] else 0.0, device=device)
    e8p, e81b = _glq_codebooks(device)
    linear.set_codebook(e8p, codebook2={2: None, 3: e81b, 4: e8p}[bits])
    return linear


def _exllamav3(N: int, K: int, bits: int, device: torch.device) -> Call:
    """exllamav3's trellis linear with its default codebook, as its modules make it. N and K in multiples of 128."""
    linear = load("exllamav3").LinearEXL3(
        config=None,
        in_features=K,
        out_features=N,
        suh=random_scales(K, 1.0, device),
        svh=random_scales(N, 1 / 64, device),
        trellis=random_bits((K // 16, N // 16, 16 * bits), torch.int16, device),
        mul1=torch.tensor(EXL3_MUL1, dtype=torch.uint32).view(torch.int32),
        out_dtype=torch.float16,
        key=f"random {N}x{K}",
    )
    return lambda x: linear.forward(x, {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["build"])
    parser.add_argument("peer", choices=list(VERSIONS))
    args = parser.parse_args()
    start = time.perf_counter()
    load(args.peer)
    print(f"{args.peer}: its extension is loaded after {time.perf_counter() - start:.0f} s", flush=True)
    device = torch.device("cuda")
    for bits in (2, 3, 4):  # each says now, not in the measurement, whether the call is right
        for tokens in (1, 8, 32, 2048):
            y = peer(args.peer, 512, 1024, bits, device)(torch.randn(tokens, 1024, device=device).half())
            if y.shape != (tokens, 512) or not bool(y.isfinite().all()):
                raise SystemExit(f"{args.peer}: {bits} bits, {tokens} tokens: came {tuple(y.shape)} or not finite")
    print(f"{args.peer}: 2, 3 and 4 bits run", flush=True)


if __name__ == "__main__":
    main()
