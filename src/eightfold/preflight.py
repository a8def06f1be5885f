"""What a quantization would take and give, before any of it is done: modules, bits, bytes, memory, minutes."""

from __future__ import annotations

import math
import shutil
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import eightfold
from eightfold import calibration
from eightfold.checkpoint import SHARD_BYTES, output_tensors, plan_shards
from eightfold.cost import Cost, Machine, estimate, fast_rate
from eightfold.cost import rates as _rates
from eightfold.files import file_bytes
from eightfold.folder import ModelFolder
from eightfold.format import BITS, LayerSpec, QuantConfig, stored_bits
from eightfold.model import Decoder, LinearInfo
from eightfold.quantize import Settings, recipe
from eightfold.rate_losses import ROWS
from eightfold.rates import Target, blind, load_recipe, nominal_bits, with_rates
from eightfold.rotation import IN_FLOOR, layout_blocks
from eightfold.sizes import Tokens, likely_groups, work_of
from eightfold.team import Team
from eightfold.tensor_parallel import check_heads, largest_tp, linear_blocks
from eightfold.workspace import check_target

EVAL_SEQLEN = 1024
DEFAULT_LAYOUT = "pow2-sum-256"


@dataclass(frozen=True, slots=True)
class Request:
    """What to quantize and how. `calibration`, `eval_text`: paths, None for the bundled texts. `tp_max` None: the most
    that fits. `device`, `dtype`: "auto" or torch's names. `include`, `exclude`: patterns of linears' full names.

    One out of four says the rate: `bits` (whole ones for every linear; others are a mean), `stored_bits` (a mean),
    `size` (bytes of all weight files), `recipe` (a file, as rates.py writes them). `gpus`: that the work is planned
    for; `gpu_memory`: bytes of each that may be used, None for all.
    """

    model: str
    out: str
    bits: float | None = None
    calibration: str | tuple[str, ...] | None = None
    samples: int = 128
    seqlen: int = 2048
    device: str = "auto"
    dtype: str = "auto"
    layout: str = DEFAULT_LAYOUT
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    tp_max: int | None = None
    shard_bytes: int = SHARD_BYTES
    sensitivity_samples: int = 16
    eval_text: str | None = None
    eval_windows: int = 32
    max_ratio: float | None = None
    stored_bits: float | None = None
    size: int | None = None
    recipe: str | None = None
    gpus: int = 1
    gpu_memory: int | None = None
    settings: Settings = field(default_factory=Settings)


@dataclass(frozen=True, slots=True)
class Plan:
    """A request checked against its model. `windows`: of the calibration text, long [samples, seqlen]; `held_out`: of
    the evaluation text. `left`: linears not quantized. Bytes and seconds are estimates where named so.

    `target`: what the rates must add up to where the walk finds them out; those of `config` then only add up to it, so
    that sizes are about right. `recipe`: text of the recipe file that gave them, if one did.
    """

    request: Request
    folder: ModelFolder
    decoder: Decoder
    windows: Tensor
    held_out: Tensor
    config: QuantConfig
    target: Target | None
    recipe: str | None
    left: tuple[str, ...]
    output_bytes: int
    source_bytes: int
    free_bytes: int
    cost: Cost

    @property
    def stored_bits(self) -> float:
        return stored_bits(self.config.layers.values(), self.config.scale_dtype)

    @property
    def bits(self) -> float:
        """Mean nominal bits a weight."""
        return nominal_bits(self.config.layers.values())

    def to_dict(self) -> dict[str, Any]:
        """What the user is told, ready for JSON."""
        return {
            "model": self.request.model,
            "out": self.request.out,
            "bits": self.bits,
            "target": self.target and self.target.to_dict(),
            "recipe": self.request.recipe,
            "stored_bits": self.stored_bits,
            "codebook": self.request.settings.codebook,
            "layout": self.request.layout,
            "tp_max": self.config.tp_max,
            "quantized": list(self.config.layers),
            "left": list(self.left),
            "source_bytes": self.source_bytes,
            "output_bytes": self.output_bytes,
            "free_bytes": self.free_bytes,
            **self.cost.to_dict(),
            "device": str(self.decoder.device),
            "dtype": str(self.decoder.dtype).removeprefix("torch."),
            "calibration": self.config.provenance["calibration"],
        }


def make_plan(request: Request) -> Plan:
    """Check everything that can be checked before the work. Raises ValueError or CheckpointError, one sentence each."""
    target = _target(request)
    sought = target if target and not target.uniform else None
    for path in (Path(request.out), failed_path(request.out)):
        check_target(path)
    folder = ModelFolder(request.model)
    if folder.quantization is not None:
        raise ValueError(f"{request.model}: expected an original model, this one is quantized already")
    device, dtype = choose_device(request.device), choose_dtype(request.dtype, request.device, folder)
    decoder = Decoder(folder, device, dtype)
    linears = decoder.linear_shapes()
    chosen = _choose(linears, decoder.head_name(), request)
    tp_max = _tp_max(folder.config, chosen, request)
    layers = {name: _spec(folder, name, info, request, tp_max) for name, info in chosen.items()}
    windows, held_out, origin = _texts(folder, request)
    quant_config = QuantConfig(
        layers=layers,
        recipes={BITS[0]: recipe(BITS[0], request.settings.codebook)},
        tp_max=tp_max,
        scale_dtype=request.settings.scale_dtype,
        provenance=_provenance(request, origin, dtype),
    )
    quant_config, text = _rated(folder, decoder, quant_config, request)
    parent = Path(request.out).resolve().parent
    return Plan(
        request, folder, decoder, windows, held_out, quant_config, sought, text,
        left=tuple(name for name in linears if name not in layers),
        output_bytes=output_bytes(folder, quant_config, request),
        source_bytes=sum(info.nbytes for info in folder.tensors.values()),
        free_bytes=shutil.disk_usage(next(p for p in (parent, *parent.parents) if p.exists())).free,
        cost=_cost(decoder, chosen, windows, request, nominal_bits(quant_config.layers.values())),
    )  # fmt: skip


def _target(request: Request) -> Target | None:
    """What the rates must add up to; None where a recipe says them."""
    asked = {"bits": request.bits, "stored_bits": request.stored_bits, "size": request.size}
    if request.recipe is None:
        target = Target(request.bits, request.stored_bits, request.size)
        if target.uniform is None and request.sensitivity_samples < 1:
            raise ValueError(f"{target}: expected sensitivity samples to find the rates with, got none")
        return target
    if given := [name for name, value in asked.items() if value is not None]:
        raise ValueError(f"expected a recipe alone or {given[0]} alone, got both")
    return None


def _rated(
    folder: ModelFolder, decoder: Decoder, config: QuantConfig, request: Request
) -> tuple[QuantConfig, str | None]:
    """`config` with the rates asked for, or with some that add up to the target; the text of the recipe, if one is."""
    target = _target(request)
    if target is None:
        assert request.recipe is not None
        text, rates = load_recipe(request.recipe, config.layers)
        return with_rates(config, rates), text
    if target.uniform:
        return with_rates(config, dict.fromkeys(config.layers, target.uniform)), None
    infos = decoder.linear_shapes()
    groups = _groups(decoder, {name: infos[name] for name in config.layers})
    blindly = blind(([name for name, _ in members] for members in groups.values()), config.layers)
    return target.choose(blindly, config, lambda each: output_bytes(folder, each, request)), None


def check_room(plan: Plan) -> None:
    """Raise ValueError where the disk lacks room for the workspace and the checkpoint."""
    needed = 2 * plan.output_bytes
    if not plan.cost.fits:
        raise ValueError(
            f"expected {plan.cost.gpu_bytes:,} bytes of GPU memory for the largest layer, {plan.cost.usable_bytes:,} "
            f"may be used: take a larger GPU, or leave wide linears out (--exclude)"
        )
    if needed > plan.free_bytes:
        raise ValueError(
            f"{plan.request.out}: expected {needed:,} bytes free on its disk for finished layers and the checkpoint, "
            f"there are {plan.free_bytes:,}; free some or choose another place"
        )


def choose_device(name: str) -> torch.device:
    """The device of a name; "auto" is the first GPU, or the CPU. Raises ValueError for one that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"expected a device such as cpu, cuda or cuda:1, got {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"expected a device such as cpu, cuda or cuda:1, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {name}: there are {torch.cuda.device_count()} usable NVIDIA GPUs; try --device cpu")
    return device


def choose_dtype(name: str, device: str, folder: ModelFolder) -> torch.dtype:
    """Dtype of the forwards; "auto": float32 on a CPU, the model's own on a GPU. Raises ValueError for others."""
    if name == "auto":
        own = getattr(folder.config, "dtype", None)
        return own if choose_device(device).type == "cuda" and isinstance(own, torch.dtype) else torch.float32
    if name not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"expected a dtype out of auto, float32, bfloat16, float16, got {name!r}")
    return getattr(torch, name)


def _choose(linears: dict[str, LinearInfo], head: str | None, request: Request) -> dict[str, LinearInfo]:
    """All linears of the decoder layers, and the head if `include` adds it, without what `exclude` takes away."""
    for pattern in (*request.include, *request.exclude):
        if not any(fnmatchcase(name, pattern) for name in linears):
            raise ValueError(
                f"pattern {pattern!r} matches no linear of the model; names look like {next(iter(linears))}"
            )
    chosen = {
        name: info
        for name, info in linears.items()
        if (info.layer_index is not None or any(fnmatchcase(name, p) for p in request.include))
        and not any(fnmatchcase(name, p) for p in request.exclude)
    }
    if not chosen:
        raise ValueError("no linear is left to quantize; loosen --exclude")
    if odd := [name for name, info in chosen.items() if info.layer_index is None and name != head]:
        raise ValueError(f"{odd[0]}: only linears of decoder layers and the head can be quantized; narrow --include")
    return chosen


def failed_path(out: str | Path) -> Path:
    """Where the checkpoint goes that fails the gate."""
    return Path(out).with_name(Path(out).name + ".failed")


def _tp_max(config: Any, chosen: dict[str, LinearInfo], request: Request) -> int:
    """The head has no say: it is cut by rows, which are not rotated."""
    if request.tp_max is None:
        shapes = {name: _shape(info) for name, info in chosen.items() if info.layer_index is not None}
        return largest_tp(config, shapes, request.layout)
    if request.tp_max < 1:
        raise ValueError(f"expected a tp_max of at least 1, got {request.tp_max}")
    check_heads(config, request.tp_max)
    return request.tp_max


def _shape(info: LinearInfo) -> tuple[int, int]:
    return info.out_features, info.in_features


def _spec(folder: ModelFolder, name: str, info: LinearInfo, request: Request, tp_max: int) -> LayerSpec:
    """At the lowest rate; the rates come after."""
    N, K = _shape(info)
    if info.layer_index is None:  # logits are cut by words: no rotation on that side
        out_blocks, in_blocks = (1,) * N, layout_blocks(K, request.layout, IN_FLOOR)
    else:
        out_blocks, in_blocks = linear_blocks(folder.config, name, (N, K), request.layout, tp_max)
    bias = None
    if info.bias:
        bias = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}[folder.tensors[f"{name}.bias"].dtype]
    return LayerSpec(N, K, BITS[0], out_blocks, in_blocks, bias)


def _texts(folder: ModelFolder, request: Request) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Windows of the calibration and of the evaluation text; where the former came from."""
    from transformers import AutoTokenizer

    if request.seqlen < 2:
        raise ValueError(f"expected a seqlen of at least 2, got {request.seqlen}")

    tokenizer = AutoTokenizer.from_pretrained(folder.path)
    longest = getattr(folder.config, "max_position_embeddings", None) or request.seqlen
    seqlen = min(request.seqlen, longest)
    windows, origin = calibration.tokens(request.calibration, tokenizer, request.samples, seqlen, request.settings.seed)
    held_out = calibration.windows(request.eval_text, tokenizer, min(EVAL_SEQLEN, seqlen), limit=request.eval_windows)
    return windows, held_out, origin


def output_bytes(folder: ModelFolder, config: QuantConfig, request: Request) -> int:
    """Bytes of the weight files, exactly."""
    tensors = output_tensors(folder, config)
    shards = plan_shards(tensors, request.shard_bytes).values()
    return sum(file_bytes({name: tensors[name] for name in names}) for names in shards)


def _provenance(request: Request, origin: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    target = _target(request)
    rates = "recipe" if target is None else target.to_dict()
    return {
        "eightfold": eightfold.__version__,
        "base_model": Path(request.model).name if Path(request.model).is_dir() else request.model,
        "calibration": origin,
        "rates": rates,
        "layout": request.layout,
        "include": list(request.include),
        "exclude": list(request.exclude),
        "dtype": str(dtype).removeprefix("torch."),
        "sensitivity_samples": request.sensitivity_samples,
        "settings": asdict(request.settings) | {"multipliers": list(request.settings.multipliers)},
    }


def _groups(decoder: Decoder, chosen: dict[str, LinearInfo]) -> dict[tuple[Any, ...], list[tuple[str, LinearInfo]]]:
    """Which linears will probably share an input, for the estimates alone."""
    return likely_groups(decoder.folder.config, chosen)


def _cost(decoder: Decoder, chosen: dict[str, LinearInfo], windows: Tensor, request: Request, bits: float) -> Cost:
    """What this run takes on processes like this one, at rates that are measured now, for about half a second."""
    book = recipe(round(bits), request.settings.codebook)
    flops, vectors = _rates(decoder.device, book)
    gpus, memory = max(request.gpus, Team().size), usable_memory(decoder.device, request)
    machine = Machine(gpus, memory, fast_rate(decoder.device, decoder.dtype, flops), flops, vectors)
    parameters = sum(math.prod(info.shape) for info in decoder.folder.tensors.values())
    tokens = Tokens(len(windows), windows.shape[1], request.sensitivity_samples, request.eval_windows)
    work = work_of(decoder.folder.config, chosen, parameters, tokens, decoder.dtype.itemsize, bits, request.settings)
    cost = estimate(work, machine)
    if (target := _target(request)) is None or target.uniform:
        return cost
    # To find the rates: one more forward of some windows, and some rows of each linear at every rate.
    sensed = work.sensed * work.seqlen
    rows = sum(min(ROWS, info.out_features) * info.in_features for info in chosen.values())
    effort = sum(len(recipe(b, request.settings.codebook).stages) for b in BITS) / len(book.stages)
    squares = work.layers * sum(2 * group.inputs**2 + 2 * group.weights for group in work.layer)
    return replace(cost, seconds=cost.seconds + squares * sensed / flops + rows / 8 * effort / vectors)


def usable_memory(device: torch.device, request: Request) -> int | None:
    """Bytes of a GPU's memory that may be used; None on a CPU."""
    if device.type != "cuda":
        return None
    every = torch.cuda.get_device_properties(device).total_memory
    return min(every, request.gpu_memory or every)
