"""What a quantization takes, from the sizes alone: memory of the GPU and of the host, and time.

Memory is counted tensor by tensor from what walk.py, moments.py and quantize.py hold at the same time, and a test on a
GPU compares it with what a run takes. Time is operations over rates, which are measured, or stated.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch

from eightfold.quantize import Settings, recipe
from eightfold.rvq import Residual
from eightfold.team import PARTS

BATCH_TOKENS = 16384  # tokens of one forward on a GPU
CONTEXT_BYTES = 600 << 20  # of a GPU's memory: CUDA, kernels, cuBLAS's workspaces and what the allocator cannot use
HOST_BYTES = 3 << 30  # of the host's: Python, PyTorch, CUDA
POSITIONS = 128  # positions whose logits the sensitivity holds at once


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
    """Sizes that decide what a quantization costs. `layer`: groups of the largest decoder layer; `parameters`: of the
    whole model, `outside` of them around the layers; `item`: bytes of an activation; `bits`: nominal, the mean."""

    layer: tuple[Group, ...]
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
    """`gpus`: that share the work; `memory`: bytes of each that may be used. Operations a second of products of 16-bit
    and of float32 numbers, vectors of 8 encoded a second, bytes a second from the disk."""

    gpus: int
    memory: int
    flops16: float
    flops32: float
    vectors: float
    disk: float = 2e9


@dataclass(frozen=True, slots=True)
class Cost:
    """Bytes of each GPU at most and of the host, all processes together; seconds. `on_host`: activations wait there."""

    gpu_bytes: int
    host_bytes: int
    seconds: float
    on_host: bool
    fits: bool


def batch_size(samples: int, seqlen: int) -> int:
    """Samples of one forward on a GPU: as many as keep it busy, of which each part of the samples has one at least."""
    return max(1, min(BATCH_TOKENS // seqlen, samples // PARTS))


def estimate(work: Work, machine: Machine) -> Cost:
    """The cost on a machine, with the activations on the GPU if they fit its memory."""
    on_gpu = gpu_bytes(work, machine.gpus, on_host=False)
    on_host = on_gpu > machine.memory
    needed = gpu_bytes(work, machine.gpus, on_host=True) if on_host else on_gpu
    host = host_bytes(work, machine.gpus, on_host)
    return Cost(needed, host, seconds(work, machine), on_host, needed <= machine.memory)


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
        max(_quantize(group) for group in work.layer),
    )  # fmt: skip
    # One window through a layer with a gradient, attention written out; logits.
    attention = 4 * work.heads * work.seqlen**2 * work.item + 2 * work.heads * work.seqlen**2 * 4
    sensing = weights + work.seqlen * work.item * (16 * work.hidden + 8 * widest) + attention
    logits = work.outside * work.item + 4 * POSITIONS * work.vocabulary * 4
    return CONTEXT_BYTES + max(walk, max(sensing, logits) if work.sensed else 0, 2 * logits)


def _capture(group: Group, batch: int, item: int, gpus: int) -> int:
    """Sums of the parts that wait for each other (team.py), of a part, of a batch; inputs, their difference, checks."""
    K = group.inputs
    sums = 4 * (2 * K * K + (group.weights if group.adds else 0))
    waiting = (PARTS // gpus).bit_length() - 1
    return sums * (waiting + 2) + batch * K * (4 * item + 1)


def _quantize(group: Group) -> int:
    """quantize.begin_group, with statistics and weights in float32."""
    W, H = 4 * group.weights, 4 * group.inputs**2
    largest = 4 * group.inputs * max(group.outputs)
    given = W + 2 * H + (W if group.adds else 0)
    correcting = 2 * H + W + 4 * largest
    factoring = 6 * H + W
    rounding = 2 * H + 4 * W
    fitting = 2 * H + 4 * W + 5 * largest
    return given + max(correcting, factoring, rounding, fitting)


def host_bytes(work: Work, gpus: int, on_host: bool) -> int:
    """Most that the host holds at once, of all processes."""
    kept = (work.layers + 1) * work.sensed * work.seqlen * work.hidden * work.item
    streams = gpus * activation_bytes(work, gpus) if on_host else 0
    codes = int(work.bits / 8 * work.parameters)
    layer = work.weights * work.item
    return gpus * (HOST_BYTES + 2 * layer) + max(kept, streams + 3 * layer, codes + work.outside * work.item)


def seconds(work: Work, machine: Machine) -> float:
    """Operations over rates."""
    tokens, sensed = work.samples * work.seqlen, work.sensed * work.seqlen
    fast = machine.flops16 if work.item == 2 else machine.flops32
    settings = work.settings
    rows = sum(sum(group.outputs) for group in work.layer)
    searched = len(settings.multipliers) * min(1.0, settings.search_rows * len(work.layer) / rows)
    forwards = 2 * work.weights * (4.8 * tokens / machine.gpus + 6 * sensed / machine.gpus + 2 * work.eval_tokens)
    squares = sum(4 * g.inputs**2 + (2 * g.weights if g.adds else 0) for g in work.layer) * tokens / machine.gpus
    products = sum(12 * g.weights * g.inputs + 8 * g.inputs**3 for g in work.layer)
    feedback = sum(g.weights * g.inputs for g in work.layer) * (1 + searched) / machine.gpus
    layer = (forwards + squares) / fast + (products + feedback) / machine.flops32
    layer += work.weights / 8 * (1 + searched) / machine.vectors / machine.gpus
    reading = 4 * work.parameters * work.item / machine.disk
    return work.layers * layer + reading


def effort(bits: float, codebook: str) -> int:
    """Stages of a rate, which all are searched."""
    return len(recipe(round(bits), codebook).stages)


def measure(device: torch.device, book: Residual, dtype: torch.dtype, memory: int, gpus: int) -> Machine:
    """A machine with GPUs, or CPUs, like `device`; its rates are measured now, for about half a second."""
    x = torch.randn(1024 if device.type == "cpu" else 4096, 1024 if device.type == "cpu" else 4096, device=device)
    vectors = torch.randn(1 << (14 if device.type == "cpu" else 17), 8, device=device)

    def seconds(call: Any) -> float:
        best = float("inf")
        for _ in range(3):
            start = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            best = min(best, time.perf_counter() - start)
        return best

    operations = 2 * len(x) ** 3
    flops32 = operations / seconds(lambda: x @ x)
    flops16 = flops32
    if device.type == "cuda" and dtype.itemsize == 2:
        y = x.to(dtype)
        flops16 = operations / seconds(lambda: y @ y)
    return Machine(gpus, memory, flops16, flops32, len(vectors) / seconds(lambda: book.encode(vectors)))
