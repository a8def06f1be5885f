"""How long a whole quantization takes, phase by phase, and how much memory.

    python benchmarks/quantize.py --shape 8b --bits 2 3 4              # random weights of that shape, made on the spot
    python benchmarks/quantize.py --shape 8b --bits 2 --layers 4       # only that many layers of it: said in the row
    python benchmarks/quantize.py --model reference-lm --calibration calibration.txt --seqlen 1024 --bits 2 3 4

    python benchmarks/quantize.py --model reference-lm --calibration calibration.txt --seqlen 1024 --bits 2 --peer glq

    torchrun --nproc-per-node 2 benchmarks/quantize.py --shape 8b --bits 4     # a GPU each

prints a table, draws the phases into --picture, and appends the rows to benchmarks/results/quantize.jsonl. What random
weights become is of no interest here; the work is that of trained ones. --keep leaves the random model in --folder,
where the next run finds it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from results import append
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig

from eightfold import bundled
from eightfold.launch import joined
from eightfold.pipeline import quantize_model
from eightfold.preflight import Request, make_plan
from eightfold.quantize import Settings
from eightfold.team import Team

# hidden, intermediate, heads, key heads, layers, vocabulary
SHAPES = {
    "1b": (2048, 8192, 32, 8, 16, 128256),  # Llama-3.2-1B
    "3b": (3072, 8192, 24, 8, 28, 128256),  # Llama-3.2-3B
    "8b": (4096, 14336, 32, 8, 32, 128256),  # Llama-3.1-8B
    "14b": (5120, 13824, 40, 8, 48, 152064),  # Qwen2.5-14B's dimensions
}
SHARD_LAYERS = 4  # in a file of weights
STD = 0.02


def write_random_model(folder: Path, shape: str, layers: int | None) -> None:
    """A Llama of this shape, or its first layers, with random weights in bfloat16."""
    hidden, intermediate, heads, kv_heads, count, vocabulary = SHAPES[shape]
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=intermediate, num_attention_heads=heads,
        num_key_value_heads=kv_heads, num_hidden_layers=layers or count, tie_word_embeddings=False, dtype="bfloat16",
        max_position_embeddings=8192, architectures=["LlamaForCausalLM"], bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    config.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(bundled.tiny_lm() / name, folder / name)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    kv = kv_heads * (hidden // heads)
    linears = {
        f"self_attn.{n}_proj": (rows, hidden) for n, rows in (("q", hidden), ("k", kv), ("v", kv), ("o", hidden))
    }
    linears |= {f"mlp.{name}_proj": (intermediate, hidden) for name in ("gate", "up")}
    linears["mlp.down_proj"] = (hidden, intermediate)

    def random(*size: int) -> Tensor:
        return (torch.randn(size, device=device, dtype=torch.bfloat16) * STD).cpu()

    index: dict[str, str] = {}
    total = 0

    def write(file: str, tensors: dict[str, Tensor]) -> None:
        nonlocal total
        save_file(tensors, folder / file, metadata={"format": "pt"})
        index.update(dict.fromkeys(tensors, file))
        total += sum(t.nbytes for t in tensors.values())

    norm = torch.ones(hidden, dtype=torch.bfloat16)
    write("outside.safetensors", {
        "model.embed_tokens.weight": random(vocabulary, hidden), "lm_head.weight": random(vocabulary, hidden),
        "model.norm.weight": norm.clone(),
    })  # fmt: skip
    for first in range(0, layers or count, SHARD_LAYERS):
        tensors = {}
        for i in range(first, min(first + SHARD_LAYERS, layers or count)):
            prefix = f"model.layers.{i}"
            tensors |= {f"{prefix}.{name}.weight": random(*size) for name, size in linears.items()}
            for name in ("input_layernorm", "post_attention_layernorm"):
                tensors[f"{prefix}.{name}.weight"] = norm.clone()
        write(f"layers-{first:05d}.safetensors", tensors)
    content = {"metadata": {"total_size": total}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))


class Resident:
    """The most memory of its own that this process has had, sampled: with what PyTorch has pinned, without pages of
    mapped files, which the kernel takes back when it likes."""

    def __init__(self) -> None:
        self.bytes = 0
        self._done = threading.Event()
        threading.Thread(target=self._sample, daemon=True).start()

    def _sample(self) -> None:
        while not self._done.wait(0.02):
            lines = Path("/proc/self/status").read_text().splitlines()
            own = 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
            pinned = torch.cuda.host_memory_stats() if torch.cuda.is_initialized() else {}
            self.bytes = max(self.bytes, own + pinned.get("allocated_bytes.current", 0))

    def stop(self) -> int:
        self._done.set()
        return self.bytes


@dataclass
class Clock:
    """A listener that keeps the seconds of every phase; those of the layers also by what the device did."""

    phases: dict[str, float] = field(default_factory=dict)
    inside: dict[str, float] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=dict)  # bytes of the GPU's memory, by phase
    name: str = "reading"
    began: float = field(default_factory=time.perf_counter)

    def phase(self, name: str, steps: int) -> None:
        now = time.perf_counter()
        self.phases[self.name] = self.phases.get(self.name, 0.0) + now - self.began
        if torch.cuda.is_available():
            self.peaks[self.name] = max(self.peaks.get(self.name, 0), torch.cuda.max_memory_allocated())
            torch.cuda.reset_peak_memory_stats()
        self.name, self.began = name, now

    def advance(self, steps: int) -> None: ...

    def note(self, text: str) -> None: ...

    def layer(self, record: dict[str, Any]) -> None:
        for name, seconds in record["phases"].items():
            self.inside[name] = self.inside.get(name, 0.0) + seconds


def measure(request: Request, about: dict[str, Any]) -> dict[str, Any]:
    """Quantize as `request` says, in a folder that is thrown away: a row."""
    start, clock, resident = time.perf_counter(), Clock(), Resident()
    with tempfile.TemporaryDirectory(dir=Path(request.model).parent) as folder:
        plan = make_plan(Request(**{**vars_of(request), "out": str(Path(folder) / "out")}))
        clock.phase("opening", 0)
        planning = clock.phases.pop("reading")
        quantize_model(plan, clock)
        clock.phase("end", 0)
    return {
        **about,
        "bits": request.bits,
        "stored_bits": plan.stored_bits,
        "samples": request.samples,
        "seqlen": request.seqlen,
        "seconds": time.perf_counter() - start,
        "phases": {"plan": planning, **clock.phases},
        "inside_layers": clock.inside,
        "peak_gpu_bytes": max(clock.peaks.values(), default=0),
        "peaks": clock.peaks,
        "peak_host_bytes": resident.stop(),
        **plan.cost.to_dict(),
    }


def measure_glq(request: Request, about: dict[str, Any]) -> dict[str, Any]:
    """A row of GLQ's own quantization on the tokens of the same text, timed from its first line to its last."""
    import types

    from glq.quantize_model import quantize  # pyright: ignore[reportMissingImports]

    # It takes its text from a data set on the hub: ours stands in for that.
    text = {"text": [Path(str(request.calibration)).read_text(encoding="utf-8")]}
    stand_in = types.ModuleType("datasets")
    stand_in.load_dataset = lambda *_, **__: text  # type: ignore[attr-defined]
    sys.modules["datasets"] = stand_in
    start, resident = time.perf_counter(), Resident()
    with tempfile.TemporaryDirectory() as folder:
        quantize(
            model_name=request.model, output_dir=folder, bpw=request.bits, nsamples=request.samples,
            seqlen=request.seqlen, device="cuda", codebook_type="e8p",
        )  # fmt: skip
    seconds = time.perf_counter() - start
    about = {**about, "model": f"{about['model']}, GLQ 0.6.6"}
    return {
        **about, "bits": request.bits, "samples": request.samples, "seqlen": request.seqlen, "seconds": seconds,
        "phases": {"all": seconds}, "inside_layers": {}, "peak_gpu_bytes": torch.cuda.max_memory_allocated(),
        "peak_host_bytes": resident.stop(),
    }  # fmt: skip


def vars_of(request: Request) -> dict[str, Any]:
    return {name: getattr(request, name) for name in Request.__dataclass_fields__}


def print_table(rows: list[dict[str, Any]]) -> None:
    """Seconds by phase; those inside the layers as the device counts them."""
    table = Table(title="seconds of a quantization")
    phases = list(dict.fromkeys(name for row in rows for name in row["phases"]))
    inside = list(dict.fromkeys(name for row in rows for name in row["inside_layers"]))
    for name in ("model", "layers", "bits", "all", *phases, *(f"({name})" for name in inside), "GPU GB", "host GB"):
        table.add_column(name, justify="left" if name == "model" else "right")
    for row in rows:
        cells = [row["model"], f"{row['layers']} of {row['of_layers']}", str(row["bits"]), f"{row['seconds']:.1f}"]
        cells += [f"{row['phases'].get(name, 0):.1f}" for name in phases]
        cells += [f"{row['inside_layers'].get(name, 0):.1f}" for name in inside]
        table.add_row(*cells, f"{row['peak_gpu_bytes'] / 1e9:.1f}", f"{row['peak_host_bytes'] / 1e9:.1f}")
    Console(width=200, file=sys.stdout).print(table)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """A bar a row, its phases one after the other."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.6 + 0.4 * len(rows)), layout="constrained")
    axes = figure.subplots()
    phases = list(dict.fromkeys(name for row in rows for name in row["phases"]))
    labels = [
        f"{row['model']}, {row['bits']} bits, {row['layers']} of {row['of_layers']} layers, {row['gpus']} × GPU"
        for row in rows
    ]
    left = [0.0] * len(rows)
    for name in phases:
        widths = [row["phases"].get(name, 0.0) for row in rows]
        axes.barh(labels, widths, left=left, label=name)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel("seconds")
    figure.legend(loc="outside right upper", fontsize="small")
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--shape", choices=SHAPES)
    which.add_argument("--model")
    parser.add_argument("--layers", type=int, help="of a shape: only so many")
    parser.add_argument("--folder", type=Path, default=Path("."), help="where random models are made")
    parser.add_argument("--keep", action="store_true", help="them there")
    parser.add_argument("--gpu-memory-gb", type=float, help="of each GPU to use at most (default: all)")
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--calibration")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument(
        "--peer", choices=["glq"], help="time this in our place; installed, with a text to --calibration"
    )
    parser.add_argument("--picture", type=Path)
    args = parser.parse_args()
    with joined(args.device) as device:
        rows = run(args, device)
    if not rows:
        return
    print_table(rows)
    if args.picture:
        draw(rows, args.picture)


def run(args: argparse.Namespace, device: str) -> list[dict[str, Any]]:
    """All rows that are asked for; none on processes but the first."""
    team = Team()
    gpu_memory = int(args.gpu_memory_gb * 1e9) if args.gpu_memory_gb else None
    model, about = args.model, {"model": args.shape or Path(args.model).name}
    if args.shape:
        model = str(args.folder / f"random-{args.shape}-{args.layers or 'all'}")
        if not team.rank and not Path(model).exists():
            start = time.perf_counter()
            with tempfile.TemporaryDirectory(dir=args.folder) as made:
                whole = Path(made) / "model"
                whole.mkdir()
                write_random_model(whole, args.shape, args.layers)
                whole.rename(model)
            print(f"made {args.shape} in {time.perf_counter() - start:.1f} s", flush=True)
        team.tell(None)
        count = SHAPES[args.shape][4]
    else:
        count = json.loads((Path(model) / "config.json").read_text())["num_hidden_layers"]
    about |= {"layers": args.layers or count, "of_layers": count, "gpus": team.size}
    rows = []
    for bits in args.bits:
        request = Request(
            model, "", bits, args.calibration, args.samples, args.seqlen, device, args.dtype,
            max_ratio=1e30, settings=Settings(), gpu_memory=gpu_memory,
        )  # fmt: skip
        row = measure_glq(request, about) if args.peer else measure(request, about)
        if not team.rank:
            rows.append(row)
            print(json.dumps(row), flush=True)
            append("quantize", [row], shape=args.shape, dtype=args.dtype, gpu_memory=gpu_memory)
    if args.shape and not args.keep and not team.rank:
        shutil.rmtree(model)
    return rows


if __name__ == "__main__":
    main()
