"""Quantize a model from end to end: layer by layer to a workspace, then the checkpoint, the gate, and into place."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from eightfold import spread
from eightfold.checkpoint import Workspace, assemble, publish
from eightfold.format import PackedWeight, QuantConfig
from eightfold.gate import Verdict, judge
from eightfold.linear import QuantLinear
from eightfold.model import Decoder, check_finite
from eightfold.parallel import ordered_map, single_threaded, workers_for
from eightfold.preflight import Plan, check_room, failed_path
from eightfold.quantize import GroupStatistics, Quantized, mean_moments, moments, quantize_group
from eightfold.rates import RECIPE
from eightfold.sensitivity import output_sensitivity
from eightfold.stream import Tap, find_receiver

BATCH_TOKENS = 16384  # tokens of one forward on a GPU


class Listener(spread.Listener, Protocol):
    """Who is told how the work goes on, and of every layer."""

    def layer(self, record: dict[str, Any]) -> None:
        """A layer is quantized: {"layer": name, "seconds": s, "linears": {name: losses}}."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """`path`: where the checkpoint lies; not the target's own name where the gate failed it."""

    path: Path
    verdict: Verdict
    records: list[dict[str, Any]]


def quantize_model(plan: Plan, listener: Listener) -> Outcome:
    """Carry out `plan`. Interrupted at any moment, the same call goes on after the last finished layer."""
    check_room(plan)
    config = replace(plan.config, provenance={**plan.config.provenance, "base_sha256": plan.folder.sha256()})
    with closing(Workspace(plan.request.out, _fingerprint(plan, config))) as workspace:
        sensitivity = cache(lambda: _sensitivity(plan, listener))
        config, recipe = spread.spread_bits(plan, config, workspace, sensitivity, listener)
        plan = replace(plan, config=config)
        _Walk(plan, workspace, listener).run(sensitivity)
        listener.phase("writing", 1)
        texts = {} if recipe is None else {RECIPE: recipe}
        made = assemble(workspace, plan.folder, config, plan.request.shard_bytes, texts)
        listener.advance(1)
        verdict = judge(plan, made, listener.phase, listener.advance)
        target = Path(plan.request.out)
        records = workspace.records()
        path = publish(workspace, target if verdict.passed else failed_path(target))
    return Outcome(path, verdict, records)


def _fingerprint(plan: Plan, config: QuantConfig) -> dict[str, Any]:
    """All that the bytes of the result depend on."""
    return {
        "quantization_config": config.to_dict(),
        "recipe": plan.recipe,
        "device": plan.decoder.device.type,
        "torch": torch.__version__,
        "shard_bytes": plan.request.shard_bytes,
    }


@torch.no_grad()
@single_threaded()
def _sensitivity(plan: Plan, listener: Listener) -> dict[str, Tensor]:
    samples = plan.windows[: plan.request.sensitivity_samples]
    if not len(samples):
        return {}
    listener.phase("sensitivity", 2 * len(plan.decoder.layer_names) + 1)
    return output_sensitivity(plan.decoder, samples, plan.request.settings.seed, listener.advance)


class _Walk:
    """The layers in order, with two streams of hidden states: of the original model and of the quantized one."""

    def __init__(self, plan: Plan, workspace: Workspace, listener: Listener) -> None:
        self.decoder: Decoder = plan.decoder
        self.plan, self.config, self.workspace, self.listener = plan, plan.config, workspace, listener
        self.settings = plan.request.settings
        self.workers = workers_for(self.decoder.device)
        # Samples that one forward takes: on a CPU one a thread, on a GPU as many as keep it busy.
        tokens = BATCH_TOKENS if self.decoder.device.type != "cpu" else 1
        self.batch = max(1, tokens // plan.windows.shape[1])

    @torch.no_grad()
    @single_threaded()  # but for what goes through ordered_map, so that the bytes do not depend on threads
    def run(self, sensitivities: Callable[[], dict[str, Tensor]]) -> None:
        decoder, done = self.decoder, self.workspace.finished()
        head = [name for name in self.config.layers if decoder.linear_shapes()[name].layer_index is None]
        count = len(decoder.layer_names)
        if len(done) == count + bool(head):
            return
        sensitivity = sensitivities()
        self.listener.phase("layers", count)
        every = [decoder.prologue(w) for w in self.plan.windows]
        decoder.release()  # the embedding is not needed in memory while the layers are
        original = [torch.cat(every[a : a + self.batch]) for a in range(0, len(every), self.batch)]
        hidden = list(original)
        for i, name in enumerate(decoder.layer_names):
            start = time.perf_counter()
            layer = decoder.load_layer(i)
            work = copy.deepcopy(layer)  # the layer with what is quantized so far
            if i in done:
                self._install(name, work, self._read_back(i))
            else:
                found = self._quantize_layer(i, layer, work, original, hidden, sensitivity)
                self._save(i, name, found, time.perf_counter() - start)
            if i < count - 1 or head:
                original, hidden = self._forward(i, layer, original), self._forward(i, work, hidden)
            self.listener.advance(1)
        for name in head:
            self._head(count, name, original, hidden)

    def _forward(self, i: int, layer: nn.Module, hidden: list[Tensor]) -> list[Tensor]:
        name = self.decoder.layer_names[i]

        def forward(job: tuple[int, Tensor]) -> Tensor:
            out = self.decoder.call(i, layer, job[1])
            check_finite(out, name, job[0] * self.batch)
            return out

        return list(ordered_map(forward, enumerate(hidden), self.workers))

    def _quantize_layer(
        self,
        i: int,
        layer: nn.Module,
        work: nn.Module,
        original: list[Tensor],
        hidden: list[Tensor],
        sensitivity: dict[str, Tensor],
    ) -> dict[str, Quantized]:
        """Group after group: each sees inputs that the groups before it, already quantized in `work`, produce."""
        prefix = self.decoder.layer_names[i]
        found: dict[str, Quantized] = {}
        for group in self.decoder.groups(i, layer, hidden[0]):
            if names := [n for n in group if n in self.config.layers]:
                statistics = self._statistics(i, layer, work, group, original, hidden)
                known = {n: sensitivity[n] for n in names} if all(n in sensitivity for n in names) else None
                linears = {n: work.get_submodule(n.removeprefix(f"{prefix}.")) for n in names}
                weights = {n: cast(nn.Linear, linear).weight.float() for n, linear in linears.items()}
                new = self._quantize_group(weights, replace(statistics, sensitivity=known))
                self._install(prefix, work, {n: q.packed for n, q in new.items()})
                found |= new
        return found

    def _statistics(
        self,
        i: int,
        layer: nn.Module,
        work: nn.Module,
        group: tuple[str, ...],
        original: list[Tensor],
        hidden: list[Tensor],
    ) -> GroupStatistics:
        """Moments of the inputs of a group in the original and in the quantized model, summed in order."""
        name = group[0]
        receiver = find_receiver(self.decoder, i, layer, hidden[0], name) if len(group) == 1 else None
        tap = Tap(self.decoder, i, name, receiver)

        def one(job: tuple[int, Tensor, Tensor]) -> list[Tensor]:
            batch, before, now = job
            x, stream = tap(work, now)
            x0, stream0 = tap(layer, before)
            for seen in (x, x0, stream, stream0):
                if seen is not None:
                    check_finite(seen, name, batch * self.batch)
            return moments(x, x0, stream, stream0)

        handles = [*tap.attach(layer), *tap.attach(work)]
        try:
            jobs = zip(range(len(hidden)), original, hidden, strict=True)
            return mean_moments(ordered_map(one, jobs, self.workers), self.plan.windows.numel())
        finally:
            for handle in handles:
                handle.remove()

    def _quantize_group(self, weights: dict[str, Tensor], statistics: GroupStatistics) -> dict[str, Quantized]:
        read, layers = self.decoder.folder.read, self.config.layers
        biases = {n: read(f"{n}.bias", self.decoder.device) for n in weights if layers[n].bias}
        return quantize_group(weights, biases, layers, statistics, self.settings)

    def _save(self, i: int, name: str, found: dict[str, Quantized], seconds: float) -> None:
        tensors: dict[str, Tensor] = {}
        for linear, quantized in found.items():
            tensors |= quantized.packed.to("cpu").tensors(linear)
        record = {"layer": name, "linears": {n: q.losses() for n, q in found.items()}, "seconds": seconds}
        self.workspace.save_layer(i, tensors, record)
        self.listener.layer(record)

    def _read_back(self, i: int) -> dict[str, PackedWeight]:
        tensors, record = self.workspace.load_layer(i)
        device = self.decoder.device
        result = {}
        for name in record["linears"]:
            own = {k.removeprefix(f"{name}."): t for k, t in tensors.items() if k.startswith(f"{name}.")}
            spec = self.config.layers[name]
            result[name] = PackedWeight.from_tensors(spec, self.config.recipe(name), own).to(device)
        return result

    def _install(self, prefix: str, layer: nn.Module, packed: dict[str, PackedWeight]) -> None:
        for name, weight in packed.items():
            linear = QuantLinear.from_packed(weight).prepare(self.decoder.dtype)
            layer.set_submodule(name.removeprefix(f"{prefix}."), linear)

    def _head(self, index: int, name: str, original: list[Tensor], hidden: list[Tensor]) -> None:
        """A linear after the layers (lm_head), whose input is what the model's tail makes of the last hidden states."""
        start = time.perf_counter()

        def one(job: tuple[int, Tensor, Tensor]) -> list[Tensor]:
            x0, x = (self.decoder.head_input(name, states) for states in job[1:])
            for seen in (x, x0):
                check_finite(seen, name, job[0] * self.batch)
            return moments(x, x0)

        jobs = zip(range(len(hidden)), original, hidden, strict=True)
        statistics = mean_moments(map(one, jobs), self.plan.windows.numel())
        found = self._quantize_group({name: self.decoder.weight(name).float()}, statistics)
        self._save(index, name, found, time.perf_counter() - start)
