"""The walk of a quantization over the layers, each with the inputs that the quantized layers before it produce."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from eightfold import spread
from eightfold.activations import Activations
from eightfold.cost import batch_size
from eightfold.format import PackedWeight
from eightfold.loading import loaded_layers
from eightfold.model import Decoder, check_finite, finite_samples
from eightfold.moments import GroupStatistics, mean_moments, moments
from eightfold.parallel import ordered_map, single_threaded, workers_for
from eightfold.preflight import Plan
from eightfold.quantize import Begun, Quantized, begin_group, dequantize
from eightfold.queued import Later
from eightfold.stream import Tap, find_receiver
from eightfold.team import PARTS, Team
from eightfold.workspace import Workspace


class Listener(spread.Listener, Protocol):
    """Who is told how the work goes on, and of every layer."""

    def layer(self, record: dict[str, Any]) -> None:
        """A layer is quantized: {"layer": name, "seconds": s, "phases": {what: s}, "linears": {name: losses}}."""


class Walk:
    """The layers in order, with two streams of hidden states: of the original model and of the quantized one."""

    def __init__(self, plan: Plan, workspace: Workspace | None, listener: Listener, team: Team) -> None:
        self.decoder: Decoder = plan.decoder
        self.plan, self.config, self.workspace, self.listener, self.team = plan, plan.config, workspace, listener, team
        self.settings = plan.request.settings
        self.workers = workers_for(self.decoder.device)
        # Samples that one forward takes: on a CPU one a thread, on a GPU as many as keep it busy.
        samples, length = plan.windows.shape
        self.batch = 1 if self.decoder.device.type == "cpu" else batch_size(samples, length)
        # Batches are cut into parts, of which this process takes some.
        count = -(-samples // self.batch)
        self.parts = min(PARTS, count)
        bounds = [count * part // self.parts for part in range(self.parts + 1)]
        own = team.share(self.parts)
        self.sizes = [bounds[part + 1] - bounds[part] for part in own]
        self.batches = range(bounds[own.start], bounds[own.stop])
        self.later = Later(self.decoder.device)
        self.beside = ThreadPoolExecutor(1)  # writes the last layer, fetched on a stream of its own
        self.fetching = torch.cuda.Stream(self.decoder.device) if self.decoder.device.type == "cuda" else None
        self.writing: tuple[Future[None], dict[str, Any]] | None = None

    @torch.no_grad()
    @single_threaded()  # but for what goes through ordered_map, so that the bytes do not depend on threads
    def run(self, done: list[int], sensitivity: dict[str, Tensor]) -> None:
        """Quantize the layers that are not `done`. `sensitivity`: of the outputs of the linears, by name."""
        decoder = self.decoder
        head = [name for name in self.config.layers if decoder.linear_shapes()[name].layer_index is None]
        count = len(decoder.layer_names)
        self.listener.phase("layers", count)
        original = Activations(self._embedded(), decoder.device, self.plan.cost.on_host)
        decoder.release()  # the embedding is not needed in memory while the layers are
        hidden = original.copy()
        with self.beside, closing(loaded_layers(decoder, range(count))) as layers:
            for i, name in enumerate(decoder.layer_names):
                start = time.perf_counter()
                layer = next(layers)
                work = twin(layer)  # the layer with what is quantized so far
                if i in done:
                    self._install(name, work, {n: dequantize(p) for n, p in self._read_back(i).items()})
                    self.listener.advance(1)
                else:
                    found = self._quantize_layer(i, layer, work, original, hidden, sensitivity)
                    self._save(i, name, found, start)
                if i < count - 1 or head:
                    with self.later.timed("forward"):
                        self._forward(i, layer, original)
                        self._forward(i, work, hidden)
            self._wait_for_writing()
            for name in head:
                self._head(count, name, original, hidden)
            self.later.settle()
            self._wait_for_writing()

    def _embedded(self) -> Iterator[Tensor]:
        """Hidden states that enter the first layer, batch after batch."""
        batches = self.plan.windows.split(self.batch)
        return (torch.cat([self.decoder.prologue(w) for w in batches[b]]) for b in self.batches)

    def _watch(self, x: Tensor, name: str, batch: int) -> None:
        """Raise, when all is settled, if samples of this process's batch are not finite: finite_samples(x)."""
        self.later.add(x, partial(check_finite, layer=name, first=self.batches[batch] * self.batch))

    def _forward(self, i: int, layer: nn.Module, hidden: Activations) -> None:
        def forward(b: int) -> tuple[Tensor, Tensor]:
            out = self.decoder.call(i, layer, hidden[b])
            return out, finite_samples(out)

        for b, (out, finite) in enumerate(ordered_map(forward, range(len(hidden)), self.workers)):
            hidden[b] = out
            self._watch(finite, self.decoder.layer_names[i], b)

    def _quantize_layer(
        self,
        i: int,
        layer: nn.Module,
        work: nn.Module,
        original: Activations,
        hidden: Activations,
        sensitivity: dict[str, Tensor],
    ) -> dict[str, Quantized]:
        """Group after group: each sees inputs that the groups before it, already quantized in `work`, produce."""
        prefix = self.decoder.layer_names[i]
        found: dict[str, Quantized] = {}
        sample = hidden[0][:1]
        groups = self.decoder.groups(i, layer, sample)
        taps = {
            group: Tap(self.decoder, i, group[0], find_receiver(self.decoder, i, layer, sample, group[0]))
            if len(group) == 1
            else Tap(self.decoder, i, group[0], None)
            for group in groups
        }
        begun: list[Begun] = []
        for group in groups:
            if names := [n for n in group if n in self.config.layers]:
                with self.later.timed("capture"):
                    statistics = self._statistics(taps[group], group[0], layer, work, original, hidden)
                known = {n: sensitivity[n] for n in names} if all(n in sensitivity for n in names) else None
                linears = {n: work.get_submodule(n.removeprefix(f"{prefix}.")) for n in names}
                weights = {n: cast(nn.Linear, linear).weight.float() for n, linear in linears.items()}
                begun.append(self._begin_group(weights, replace(statistics, sensitivity=known)))
                self._install(prefix, work, begun[-1].dense)
                begun[-1].dense.clear()
        self.later.settle()
        for each in begun:
            found |= each.quantized
        return found

    def _statistics(
        self,
        tap: Tap,
        name: str,
        layer: nn.Module,
        work: nn.Module,
        original: Activations,
        hidden: Activations,
    ) -> GroupStatistics:
        """Moments of the inputs of a group in the original and in the quantized model, summed in order."""

        def one(b: int) -> tuple[list[Tensor], list[Tensor]]:
            x, stream = tap(work, hidden[b])
            x0, stream0 = tap(layer, original[b])
            finite = [finite_samples(seen) for seen in (x, x0, stream, stream0) if seen is not None]
            return moments(x, x0, stream, stream0), finite

        def sums() -> Iterator[list[Tensor]]:
            for b, (found, finite) in enumerate(ordered_map(one, range(len(hidden)), self.workers)):
                for each in finite:
                    self._watch(each, name, b)
                yield found

        handles = [*tap.attach(layer), *tap.attach(work)]
        try:
            return mean_moments(sums(), self.parts, self.sizes, self.plan.windows.numel(), self.team)
        finally:
            for handle in handles:
                handle.remove()

    def _begin_group(self, weights: dict[str, Tensor], statistics: GroupStatistics) -> Begun:
        read, layers = self.decoder.folder.read, self.config.layers
        biases = {n: read(f"{n}.bias", self.decoder.device) for n in weights if layers[n].bias}
        return begin_group(weights, biases, layers, statistics, self.settings, self.later, self.team)

    def _save(self, i: int, name: str, found: dict[str, Quantized], start: float) -> None:
        """Have the layer written while the work goes on; a kill loses no more than it and the next one."""
        record = {"layer": name, "linears": {n: q.losses() for n, q in found.items()}}
        record |= {"seconds": time.perf_counter() - start, "phases": dict(self.later.seconds)}
        self.later.seconds.clear()
        self._wait_for_writing()
        workspace = self.workspace
        if workspace is None:  # another process writes
            return

        def write() -> None:
            tensors: dict[str, Tensor] = {}
            with torch.cuda.stream(self.fetching):  # all of it is there: its losses have been looked at
                for linear, quantized in found.items():
                    tensors |= quantized.packed.to("cpu").tensors(linear)
            workspace.save_layer(i, tensors, record)

        self.writing = self.beside.submit(write), record

    def _wait_for_writing(self) -> None:
        """Until the last layer is on the disk; then, not before, it is told of."""
        if self.writing is not None:
            writing, record = self.writing
            writing.result()
            self.listener.layer(record)
            if record["layer"] in self.decoder.layer_names:
                self.listener.advance(1)
        self.writing = None

    def _read_back(self, i: int) -> dict[str, PackedWeight]:
        tensors, record = self.team.tell(self.workspace.load_layer(i) if self.workspace else None)
        device = self.decoder.device
        result = {}
        for name in record["linears"]:
            own = {k.removeprefix(f"{name}."): t for k, t in tensors.items() if k.startswith(f"{name}.")}
            spec = self.config.layers[name]
            result[name] = PackedWeight.from_tensors(spec, self.config.recipe(name), own).to(device)
        return result

    def _install(self, prefix: str, layer: nn.Module, dense: dict[str, Tensor]) -> None:
        """Put quantized weights, as dense ones, in the place of the original ones."""
        for name, weight in dense.items():
            linear = layer.get_submodule(name.removeprefix(f"{prefix}."))
            linear.weight = nn.Parameter(weight.to(self.decoder.dtype), requires_grad=False)

    def _head(self, index: int, name: str, original: Activations, hidden: Activations) -> None:
        """A linear after the layers (lm_head), whose input is what the model's tail makes of the last hidden states."""
        start = time.perf_counter()

        def sums() -> Iterator[list[Tensor]]:
            for b in range(len(hidden)):
                x0, x = (self.decoder.head_input(name, states[b]) for states in (original, hidden))
                for seen in (x, x0):
                    self._watch(finite_samples(seen), name, b)
                yield moments(x, x0)

        statistics = mean_moments(sums(), self.parts, self.sizes, self.plan.windows.numel(), self.team)
        begun = self._begin_group({name: self.decoder.weight(name).float()}, statistics)
        self.later.settle()
        self._save(index, name, begun.quantized, start)


def twin(layer: nn.Module) -> nn.Module:
    """A copy of a layer whose parameters and buffers are the layer's own until they are replaced."""
    return copy.deepcopy(layer, {id(tensor): tensor for tensor in (*layer.parameters(), *layer.buffers())})
