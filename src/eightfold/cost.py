"""What a quantization takes, from the sizes alone: memory of the GPU and of the host, and time.

Memory is counted tensor by tensor from what walk.py, moments.py and quantize.py hold at the same time, and a test on a
GPU compares it with what a run takes. Time is operations over rates, which are measured, or stated.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from eightfold.prepare import Settings
from eightfold.rvq import Residual
from eightfold.team import PARTS

BATCH_TOKENS = 16384  # tokens of one forward on a GPU
CONTEXT_BYTES = 600 << 20  # of a GPU's memory: CUDA, kernels, cuBLAS's workspaces and what the allocator cannot use
HOST_BYTES = 3 << 30  # of the host's: Python, PyTorch, CUDA
POSITIONS = 128  # positions whose logits the sensitivity holds at once
# On a GPU, seconds beside the work (start, plan, first kernels, samples), and what forwards and float32 products take
# over what their operations do: fitted to an 8B and a 47M model on an H100.
BESIDE, FORWARD_LOSS, PRODUCT_LOSS = 13.0, 1.7, 1.4


@dataclass(frozen=True, slots=True)
class Group:
    """Linears that share an input: `outputs` of each, and whether their output may be added to the stream."""

    inputs: int
    outputs: tuple[int, ...]
    adds: bool

    @property
    def weights(self) -> int:
        return self.inputs * sum(self.outputs)


@dataclass(frozen=True, slots=True)
class Work:
    """Sizes that decide what a quantization costs. `layer`: groups of the largest decoder layer, `head`: the one after
    the layers if it is quantized; `parameters`: of the whole model, `outside` of them around the layers; `sensed`:
    samples of the sensitivity; `item`: bytes of an activation; `bits`: nominal, the mean."""

    layer: tuple[Group, ...]
    head: Group | None
    layers: int
    hidden: int
    heads: int
    vocabulary: int
    parameters: int
    outside: int
    samples: int
    seqlen: int
    sensed: int
    item: int
    bits: float
    eval_tokens: int
    settings: Settings

    @property
    def batch(self) -> int:
        return batch_size(self.samples, self.seqlen)

    @property
    def weights(self) -> int:
        """Of a layer's linears."""
        return sum(group.weights for group in self.layer)


@dataclass(frozen=True, slots=True)
class Machine:
    """`gpus`: that share the work; `memory`: bytes of each that may be used, None where the work is done by CPUs.
    Operations a second of products of the forwards' dtype and of float32, vectors of 8 encoded a second, bytes a second
    from the disk."""

    gpus: int
    memory: int | None
    flops16: float
    flops32: float
    vectors: float
    disk: float = 2e9


@dataclass(frozen=True, slots=True)
class Cost:
    """`gpu_bytes` of each GPU at most, of `usable_bytes` (None: no GPU); `host_bytes` at most, of all processes;
    `on_host`: activations wait in the host's memory, `sensed_on_host`: those of the sensitivity do."""

    gpus: int
    gpu_bytes: int
    usable_bytes: int | None
    host_bytes: int
    seconds: float
    on_host: bool
    sensed_on_host: bool

    @property
    def fits(self) -> bool:
        """Whether the GPU's memory is enough."""
        return self.usable_bytes is None or self.gpu_bytes <= self.usable_bytes

    def to_dict(self) -> dict[str, Any]:
        """What the user is told, ready for JSON."""
        return {
            "gpus": self.gpus,
            "peak_bytes_estimate": self.host_bytes if self.usable_bytes is None else self.gpu_bytes,
            "host_bytes_estimate": self.host_bytes,
            "activations_on": "host" if self.on_host or self.usable_bytes is None else "gpu",
            "seconds_estimate": self.seconds,
        }


def batch_size(samples: int, seqlen: int) -> int:
    """Samples of one forward on a GPU: as many as keep it busy, of which each part of the samples has one at least."""
    return max(1, min(BATCH_TOKENS // seqlen, samples // PARTS))


def estimate(work: Work, machine: Machine) -> Cost:
    """The cost on a machine, with the activations on the GPU if they fit its memory."""
    gpus, memory, took = machine.gpus, machine.memory, seconds(work, machine)
    needed = gpu_bytes(work, gpus, on_host=False)
    if memory is None:
        host = needed - CONTEXT_BYTES + host_bytes(work, gpus, False, True, pinned=False)
        return Cost(gpus, 0, None, host, took, False, True)
    if on_host := needed > memory:
        needed = gpu_bytes(work, gpus, on_host=True)
    sensing = CONTEXT_BYTES + _sensing(work) + sensed_bytes(work, gpus)
    if not (sensed_on_host := sensing > memory):
        needed = max(needed, sensing)
    host = host_bytes(work, gpus, on_host, sensed_on_host)
    return Cost(gpus, needed, memory, host, took, on_host, sensed_on_host)


def activation_bytes(work: Work, gpus: int) -> int:
    """Of both streams of hidden states, on one of the GPUs."""
    own = -(-PARTS // gpus) * -(-work.samples // PARTS) if work.samples >= PARTS else work.samples
    return 2 * min(own, work.samples) * work.seqlen * work.hidden * work.item


def gpu_bytes(work: Work, gpus: int, on_host: bool) -> int:
    """Most that a GPU holds at once."""
    batch = work.batch * work.seqlen
    streams = 4 * batch * work.hidden * work.item if on_host else activation_bytes(work, gpus)
    # The layer, its copy with quantized weights, and the next one, which is being read.
    weights = 3 * work.weights * work.item
    widest = max(group.inputs for group in work.layer)
    forward = batch * work.item * (8 * work.hidden + 4 * widest)
    walk = streams + weights + max(
        max(_capture(group, batch, work.item, gpus) + forward for group in work.layer),
        max(_quantize(group) for group in (*work.layer, *([work.head] if work.head else []))),
    )  # fmt: skip
    return CONTEXT_BYTES + max(walk, _sensing(work) if work.sensed else 0, 2 * _outside(work))


def sensed_bytes(work: Work, gpus: int) -> int:
    """Of the hidden states between all layers and the gradients, of the windows of the sensitivity on one GPU."""
    return (work.layers + 3) * -(-work.sensed // gpus) * work.seqlen * work.hidden * work.item


def _sensing(work: Work) -> int:
    """One window through a layer with a gradient, attention written out."""
    widest = max(group.inputs for group in work.layer)
    attention = work.heads * work.seqlen**2 * (4 * work.item + 2 * 4)
    layer = 3 * work.weights * work.item + work.seqlen * work.item * (16 * work.hidden + 8 * widest) + attention
    return max(layer, _outside(work))


def _outside(work: Work) -> int:
    """Embedding and head, and some positions' logits."""
    return work.outside * work.item + 4 * POSITIONS * work.vocabulary * 4


def _capture(group: Group, batch: int, item: int, gpus: int) -> int:
    """Sums of the parts that wait for each other (team.py), of a part, of a batch; inputs, their difference, checks."""
    K = group.inputs
    sums = 4 * (2 * K * K + (group.weights if group.adds else 0))
    waiting = (PARTS // gpus).bit_length() - 1
    return sums * (waiting + 2) + batch * K * (4 * item + 1)


def _quantize(group: Group) -> int:
    """quantize.begin_group, with statistics and weights in float32: fitted to what it took on an H200."""
    W, H = 4 * group.weights, 4 * group.inputs**2
    largest = 4 * group.inputs * max(group.outputs)
    given = W + 2 * H + (W if group.adds else 0)
    factoring = 5 * H + 2 * W
    fitting = 2 * H + 3 * W + 9 * largest // 2
    return given + max(factoring, fitting)


def host_bytes(work: Work, gpus: int, on_host: bool, sensed_on_host: bool, pinned: bool = True) -> int:
    """Most that the host holds at once, of all processes. `pinned`: hidden states lie in pinned memory, of which
    PyTorch gives each batch a power of two."""

    def held(size: int, samples: int) -> int:
        batch = samples * work.seqlen * work.hidden * work.item
        return -(-size // batch) * (1 << (batch - 1).bit_length() if pinned else batch)

    kept = gpus * held(sensed_bytes(work, gpus), 1) if sensed_on_host else 0
    streams = gpus * held(activation_bytes(work, gpus), work.batch) if on_host else 0
    codes = int(work.bits / 8 * work.weights)
    # Of a layer: what is read, its pinned copy (of powers of two), what is written.
    return gpus * HOST_BYTES + max(kept, streams) + (3 * gpus + 1) * work.weights * work.item + 2 * codes


def seconds(work: Work, machine: Machine) -> float:
    """Operations over rates."""
    tokens, sensed = work.samples * work.seqlen, work.sensed * work.seqlen
    fast = machine.flops16 if work.item == 2 else machine.flops32
    settings = work.settings
    rows = sum(sum(group.outputs) for group in work.layer)
    searched = len(settings.multipliers) * min(1.0, settings.search_rows * len(work.layer) / rows)
    forwards = 2 * work.weights * (4.8 * tokens / machine.gpus + 6 * sensed / machine.gpus + 2 * work.eval_tokens)
    squares = sum(4 * g.inputs**2 + (2 * g.weights if g.adds else 0) for g in work.layer) * tokens / machine.gpus
    products = sum(12 * g.weights * g.inputs / machine.gpus + 1.2 * g.inputs**3 for g in work.layer)
    feedback = sum(g.weights * g.inputs for g in work.layer) * (1 + searched) / machine.gpus
    beside, forward_loss, product_loss = (
        (0.0, 1.0, 1.0) if machine.memory is None else (BESIDE, FORWARD_LOSS, PRODUCT_LOSS)
    )
    layer = (forwards + squares) / fast * forward_loss + (products + feedback) / machine.flops32 * product_loss
    layer += work.weights / 8 * (1 + searched) / machine.vectors / machine.gpus
    reading = 4 * work.parameters * work.item / machine.disk
    return beside + work.layers * layer + reading


def fast_rate(device: torch.device, dtype: torch.dtype, flops: float) -> float:
    """Measured operations per second of products in `dtype`; `flops` are those of float32."""
    if device.type == "cpu" or dtype.itemsize > 2:
        return flops
    x = torch.randn(8192, 8192, device=device, dtype=dtype)
    return 2 * len(x) ** 3 / _best(device, lambda: x @ x)


def rates(device: torch.device, book: Residual) -> tuple[float, float]:
    """Measured float32 operations and encoded vectors per second."""
    size, count = (1024, 1 << 14) if device.type == "cpu" else (4096, 1 << 20)
    x, vectors = torch.randn(size, size, device=device), torch.randn(count, 8, device=device)
    return 2 * size**3 / _best(device, lambda: x @ x), count / _best(device, lambda: book.encode(vectors))


def _best(device: torch.device, work: Callable[[], Any]) -> float:
    """The fastest of three."""
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best
