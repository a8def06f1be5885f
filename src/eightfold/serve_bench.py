"""How fast vLLM serves a model: tokens per second, time to the first token, GPU time of a decode step.

Models run one after another in one process, by vLLM's public interface alone. GPU time comes from the trace that vLLM's
profiler writes: what kernels of all kinds kept the GPU busy from one decode graph to the next, overlaps counted once.
"""

from __future__ import annotations

import gc
import gzip
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch

from eightfold.folder import local_folder, read_config
from eightfold.shapes import SHAPES, Rate, plain_config, random_config, weight_bytes, write_config

PROMPT = 16  # tokens before those that are timed
FIRST_TOKENS = 5  # times that a long prompt is sent
STEPS = 24  # decode steps in a trace
KERNELS = 12  # that are told by name
_SPARE = 64  # tokens of context beyond the longest request


@dataclass(frozen=True, slots=True)
class Load:
    """What is asked of every model. `sequences`: numbers of requests at once; `tokens`: new ones of each; `prompt`:
    tokens of the long prompt; `devices`: tensor-parallel size; `memory`: share of the GPU's that vLLM may take."""

    sequences: tuple[int, ...] = (1, 8, 32, 128)
    tokens: int = 256
    prompt: int = 1024
    devices: int = 1
    memory: float = 0.9


@dataclass(frozen=True, slots=True)
class Model:
    """A model to serve. `content`: its config.json; `random`: it has no weights, vLLM makes them up."""

    name: str
    path: Path
    content: dict[str, Any]
    random: bool


@dataclass(slots=True)
class Speed:
    """What was measured of a model, by number of sequences: `tokens_per_second` of all together, wall clock, prompts
    of PROMPT tokens included; `step_ms`: GPU time of a decode step, `kernel_ms`: of that, what the kernels that take
    longest take together, by name. `first_token_ms`: one request of a long prompt."""

    name: str
    random: bool
    weight_bytes: int
    start_seconds: float = 0.0
    first_token_ms: float = 0.0
    tokens_per_second: dict[int, float] = field(default_factory=dict)
    step_ms: dict[int, float] = field(default_factory=dict)
    kernel_ms: dict[int, dict[str, float]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self)


def models(source: str, rates: Sequence[Rate], against: Sequence[str], baseline: bool, folder: Path) -> list[Model]:
    """What is to be compared: the baseline in bfloat16 first, the model folder `source` (or the shape of that name at
    each of `rates`), then the folders `against`. `folder` takes configurations of models without weights."""
    if source in SHAPES:
        if not rates:
            raise ValueError(f"{source}: a shape has no weights, say at what rates to quantize it: --bits 4")
        content = SHAPES[source]
        own = [
            Model(f"{source}, {rate} bits", write_config(made, folder / f"{rate}"), made, True)
            for rate, made in ((rate, random_config(content, rate)) for rate in rates)
        ]
    elif rates:
        raise ValueError(f"--bits is for shapes, out of {', '.join(SHAPES)}: {source} is none")
    else:
        own = [stored(source)]
        content = own[0].content
    plain = plain_config(content)
    first = [Model(f"{source}, bfloat16", write_config(plain, folder / "bfloat16"), plain, True)] if baseline else []
    return [*first, *own, *map(stored, against)]


def stored(source: str) -> Model:
    """A model folder, or a model of the hub."""
    path = local_folder(source)
    return Model(path.name, path, read_config(path), False)


def measure(model: Model, load: Load, note: Callable[[str], None]) -> Speed:
    """Serve one model and time it. Raises ValueError where vLLM is not installed."""
    try:
        vllm = import_module("vllm")
    except ImportError as error:
        raise ValueError(f"serving needs vLLM: pip install 'eightfold[vllm]' ({error})") from error
    speed = Speed(model.name, model.random, weight_bytes(model.content))
    with tempfile.TemporaryDirectory() as traces:
        start = time.perf_counter()
        server = vllm.LLM(
            model=str(model.path),
            load_format="dummy" if model.random else "auto",
            skip_tokenizer_init=True,
            dtype="auto",
            tensor_parallel_size=load.devices,
            gpu_memory_utilization=load.memory,
            max_model_len=load.prompt + load.tokens + _SPARE,
            max_num_seqs=max(load.sequences),
            enable_prefix_caching=False,
            compilation_config={"cudagraph_capture_sizes": sorted(load.sequences)},
            profiler_config={
                "profiler": "torch",
                "torch_profiler_dir": traces,
                "torch_profiler_with_stack": False,
                "torch_profiler_dump_cuda_time_total": False,
            },
        )
        speed.start_seconds = time.perf_counter() - start
        note(f"{model.name}: started in {speed.start_seconds:.0f} s")
        try:
            _time(_Requests(server, vllm, model.content["vocab_size"]), load, speed, Path(traces))
        finally:
            server.llm_engine.engine_core.shutdown()
            del server
            gc.collect()
            import_module("vllm.distributed.parallel_state").cleanup_dist_env_and_memory()
    return speed


def copy_speed() -> float:
    """Bytes a second, read and written, of passing 2 GiB through the first GPU."""
    source = torch.randn(1 << 29, device="cuda")
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(12):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        torch.neg(source, out=target)  # reaches 4.2 TB/s on an H200, where copy_ and operations on bytes do not
        end.record()
        end.synchronize()
        best = min(best, start.elapsed_time(end) / 1e3)
    return 2 * source.nbytes / best


class _Requests:
    """Requests of random tokens, which all run to their full length."""

    def __init__(self, server: Any, vllm: Any, words: int) -> None:
        self._server, self._vllm = server, vllm
        self._words, self._random = words, torch.Generator().manual_seed(0)

    def send(self, count: int, prompt: int, new: int) -> float:
        """Seconds that `count` requests took, all sent at once."""
        tokens = torch.randint(self._words, (count, prompt), generator=self._random).tolist()
        params = self._vllm.SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
        start = time.perf_counter()
        found = self._server.generate([{"prompt_token_ids": row} for row in tokens], params, use_tqdm=False)
        seconds = time.perf_counter() - start
        if made := {len(each.outputs[0].token_ids) for each in found} - {new}:
            raise ValueError(f"expected {new} new tokens of every request, vLLM made {made}")
        return seconds

    def profile(self, count: int, new: int) -> None:
        """Send them under the profiler."""
        self._server.start_profile()
        self.send(count, PROMPT, new)
        self._server.stop_profile()


def _time(requests: _Requests, load: Load, speed: Speed, traces: Path) -> None:
    requests.send(1, load.prompt, 8)
    speed.first_token_ms = 1e3 * median(requests.send(1, load.prompt, 1) for _ in range(FIRST_TOKENS))
    for count in load.sequences:
        requests.send(count, PROMPT, 8)
        speed.tokens_per_second[count] = count * load.tokens / requests.send(count, PROMPT, load.tokens)
    for count in load.sequences:
        before = set(traces.iterdir())
        requests.profile(count, STEPS)
        steps = Steps(_events(set(traces.iterdir()) - before))
        speed.step_ms[count] = steps.busy * 1e3
        speed.kernel_ms[count] = {name: seconds * 1e3 for name, seconds in steps.kernels(KERNELS)}


def _events(new: set[Path]) -> list[dict[str, Any]]:
    """Events of the first device's trace among the files that a profile left: vLLM gives all the first one's name."""
    found = sorted(file for file in new if ".json" in file.name)
    if not found:
        raise ValueError(f"expected a trace of vLLM's profiler, it left {sorted(file.name for file in new)}")
    opened = gzip.open if found[0].suffix == ".gz" else open
    with opened(found[0], "rt", encoding="utf-8") as file:
        return json.load(file)["traceEvents"]


class Steps:
    """The decode steps in a trace of several: each from the first kernel of a whole-model graph to that of the next.

    `busy`: median of the seconds of a step in which the GPU was busy. Raises ValueError where fewer than three such
    graphs ran."""

    def __init__(self, events: Sequence[dict[str, Any]]) -> None:
        work = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
        work.sort(key=lambda event: event["ts"])
        starts = _starts(work, _graph_launches(events))
        if len(starts) < 3:
            raise ValueError(f"expected decode steps that run as CUDA graphs, the trace has {len(starts)} of them")
        self._work = [event for event in work if starts[0] <= event["ts"] < starts[-1]]
        self._count = len(starts) - 1
        self.busy = median(_busy(self._work, begin, end) for begin, end in pairwise(starts)) / 1e6

    def kernels(self, most: int) -> list[tuple[str, float]]:
        """The names that take longest, and the seconds of a step that all kernels of the name take together."""
        total: dict[str, float] = {}
        for event in self._work:
            name = event["name"].partition("<")[0].partition("(")[0]
            total[name] = total.get(name, 0.0) + event["dur"] / 1e6 / self._count
        return sorted(total.items(), key=lambda item: -item[1])[:most]


def _graph_launches(events: Sequence[dict[str, Any]]) -> set[int]:
    calls = (e for e in events if e.get("cat") == "cuda_runtime" and "GraphLaunch" in e.get("name", ""))
    return {event["args"]["correlation"] for event in calls}


def _starts(work: Sequence[dict[str, Any]], launches: set[int]) -> list[float]:
    """When each graph of the whole model began: those of pieces, which prompts run in, are much smaller."""
    sizes: dict[int, int] = {}
    for event in work:
        launch = event["args"].get("correlation")
        if launch in launches:
            sizes[launch] = sizes.get(launch, 0) + 1
    whole = {launch for launch, size in sizes.items() if 2 * size > max(sizes.values())}
    starts: list[float] = []
    for event in work:
        launch = event["args"].get("correlation")
        if launch in whole:
            whole.discard(launch)
            starts.append(event["ts"])
    return starts


def _busy(work: Sequence[dict[str, Any]], begin: float, end: float) -> float:
    """Microseconds of [begin, end) in which some event of `work` (sorted) was running."""
    total, done = 0.0, begin
    for event in work:
        start, stop = max(event["ts"], done), min(event["ts"] + event["dur"], end)
        if event["ts"] >= end:
            break
        if stop > start:
            total += stop - start
            done = stop
    return total
