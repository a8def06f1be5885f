"""The walk over any causal language model, with the weights of one decoder layer in memory at a time.

The model is built without weights (on the meta device) from its config, by transformers' own code. Its
decoder layers are found, and replaced by stubs: running the model's own forward then yields whatever lies
around the layers. Stopped at the first stub it gives the embeddings (prologue); with stubs that pass tensors
on it shows the arguments each layer gets; with stubs that return given hidden states it ends in the logits
(epilogue). No architecture is known by name.
"""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from eightfold.checkpoint import read_packed
from eightfold.folder import ModelFolder
from eightfold.format import CheckpointError
from eightfold.linear import QuantLinear
from eightfold.skeleton import (
    META,
    Arguments,
    aliases,
    assign,
    fill_computed_buffers,
    first,
    layer_list,
    returns_tuple,
    same,
    skeleton,
    some,
)


@dataclass(frozen=True, slots=True)
class LinearInfo:
    """A linear of the model. `layer_index` is None outside the decoder layers (lm_head)."""

    out_features: int
    in_features: int
    bias: bool
    layer_index: int | None


class _Stop(Exception):
    """Ends a forward of the model at a layer, carrying the hidden states that came there."""

    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden


class _Thread(threading.local):
    """What the stubs and the hooks of this thread do at the moment."""

    on_layer: Callable[[int, Tensor, Arguments], Any] | None = None
    on_linear: Callable[[str, Tensor], None] | None = None


class Decoder:
    """A causal language model as prologue, a list of decoder layers, and epilogue.

    Hidden states and weights have `dtype` and lie on `device`. Methods may be called from several threads at
    once. Raises ValueError for a model whose structure does not fit, naming the modules, and CheckpointError
    for tensors that the folder lacks or has in another shape; both before any weight is read.
    """

    def __init__(self, folder: ModelFolder, device: torch.device, dtype: torch.dtype) -> None:
        self.folder, self.device, self.dtype = folder, torch.device(device), dtype
        self._model = skeleton(folder.config, dtype)
        list_name, layers = layer_list(self._model)
        self.layer_names = [f"{list_name}.{i}" for i in range(len(layers))]
        self._layers: list[nn.Module] = list(layers)
        self._quantized = folder.quantization.layers if folder.quantization else {}
        self._aliases = aliases(self._model)
        self._linear_infos = self._describe_linears()
        self._check_tensors()
        fill_computed_buffers(self._model, self.device)
        self._thread = _Thread()
        self._lock = threading.RLock()
        self._recorded: tuple[int, list[Arguments]] | None = None  # for sequences of that many tokens
        self._returns_tuple = False
        self._shell: list[tuple[nn.Module, dict[str, Tensor]]] = []  # modules around the layers, their meta tensors
        self._shell_weights: dict[str, Tensor] = {}
        self._shell_linears: dict[str, QuantLinear] = {}
        self._watched: WeakSet[nn.Module] = WeakSet()
        self._make_stubs(layers)
        self._make_shell_lazy()

    # -- structure

    def linear_shapes(self) -> dict[str, LinearInfo]:
        """Every linear by its full name, layer by layer, lm_head last."""
        return dict(self._linear_infos)

    def head_name(self) -> str | None:
        """Full name of the linear that makes the logits; None if the model has none."""
        head = self._model.get_output_embeddings()
        return next((name for name, linear in _linears(self._model) if linear is head), None)

    def groups(self, i: int, layer: nn.Module, hidden: Tensor) -> list[tuple[str, ...]]:
        """The linears of layer `i` that got the very same input tensor: full names, in order of calls."""
        groups: list[tuple[Tensor, list[str]]] = []

        def see(name: str, x: Tensor) -> None:
            for seen, names in groups:
                if seen is x:
                    names.append(name)
                    return
            groups.append((x, [name]))

        with self._watching(i, layer, see):
            self.call(i, layer, hidden)
        called = {name for _, names in groups for name in names}
        if never := [n for n, _ in _linears(layer) if f"{self.layer_names[i]}.{n}" not in called]:
            raise ValueError(f"{self.layer_names[i]}: linears that its forward does not call: {', '.join(never)}")
        return [tuple(names) for _, names in groups]

    # -- running

    @torch.no_grad()
    def prologue(self, tokens: Tensor) -> Tensor:
        """Hidden states [1, T, D] that enter the first layer, for `tokens` (long, [T]).

        The first call for a length T also records the layers' other arguments, which must not depend on the
        tokens.
        """
        if tokens.ndim != 1 or tokens.dtype != torch.long:
            raise ValueError(f"tokens: expected long [T], came {tokens.dtype} {list(tokens.shape)}")
        with self._lock:
            if self._recorded is None or self._recorded[0] != len(tokens):
                self._recorded = len(tokens), self._record(tokens)

        def stop(_: int, hidden: Tensor, __: Arguments) -> Any:
            raise _Stop(hidden)

        return self._run(stop, input_ids=tokens[None].to(self.device))

    def call(self, i: int, layer: nn.Module, hidden: Tensor) -> Tensor:
        """Run `layer`, which is or stands for layer `i`, on hidden states [1, T, D], after `prologue`."""
        recorded = self._recorded
        if recorded is None or recorded[0] != hidden.shape[1]:
            raise ValueError(f"hidden: call prologue for sequences of {hidden.shape[1]} tokens first")
        args, kwargs = recorded[1][i]
        return first(layer(hidden, *args, **kwargs))

    def epilogue(self, hidden: Tensor) -> Tensor:
        """Logits, float32 [1, T, V], for the last layer's hidden states [1, T, D].

        This is the tail of the model's own forward: norm, lm_head, what may come after. Each position is
        on its own, so logits in chunks are `epilogue(hidden[:, a:b])`.
        """
        if self._recorded is None:
            raise ValueError("epilogue: call prologue first")

        def replace(_: int, __: Tensor, ___: Arguments) -> Any:
            return self._wrap(hidden)

        # Embeddings in place of tokens, so that the embedding's weights are not needed.
        return self._run(replace, inputs_embeds=hidden).logits.float()

    def head_input(self, name: str, hidden: Tensor) -> Tensor:
        """What linear `name` after the layers (lm_head) gets, [1, T, K], for the last hidden states [1, T, D]."""
        linear = self._model.get_submodule(name)

        def stop(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            raise _Stop(args[0])

        hook = linear.register_forward_pre_hook(stop, prepend=True)
        try:
            return self._run(lambda *_: self._wrap(hidden), inputs_embeds=hidden)
        finally:
            hook.remove()

    # -- weights

    def weight(self, name: str) -> Tensor:
        """The weight [N, K] of linear `name`, read now in `dtype`; a tied one's from what it is tied to."""
        return self._read(f"{name}.weight", self._model.get_submodule(name).weight)

    def load_layer(self, i: int, read: Callable[[Sequence[str]], Iterable[Tensor]] | None = None) -> nn.Module:
        """Layer `i` with its weights, read now, the caller's own. Quantized linears come as QuantLinear. `read`: how
        to read many tensors of the folder onto the device, by default one after the other."""
        layer, prefix = copy.deepcopy(self._layers[i]), self.layer_names[i]
        for name, _ in _linears(layer):
            if f"{prefix}.{name}" in self._quantized:
                layer.set_submodule(name, self._quant_linear(f"{prefix}.{name}"))
        missing = {name: t for name, t in layer.state_dict(keep_vars=True).items() if t.device == META}
        sources = [self._source(f"{prefix}.{name}") or f"{prefix}.{name}" for name in missing]
        came = map(self._read_source, sources) if read is None else read(sources)
        for (name, meta), tensor in zip(missing.items(), came, strict=True):
            assign(layer, name, tensor.to(meta.dtype))
        return layer

    def release(self) -> None:
        """Forget the weights of embedding, final norm and lm_head; they are read again when needed."""
        with self._lock:
            self._shell_weights.clear()
            self._shell_linears.clear()
            for module, own in self._shell:
                for leaf, meta in own.items():
                    assign(module, leaf, meta)

    # -- inside

    def _run(self, on_layer: Callable[[int, Tensor, Arguments], Any], **inputs: Tensor) -> Any:
        """The model's own forward with `on_layer` for its layers: its output, or what a _Stop carried."""
        self._thread.on_layer = on_layer
        try:
            return self._model(**inputs, use_cache=False)
        except _Stop as stop:
            return stop.hidden
        finally:
            self._thread.on_layer = None

    def _make_stubs(self, layers: nn.ModuleList) -> None:
        # A stub keeps the attributes of its layer, since models look at some, but no modules.
        for i, layer in enumerate(self._layers):
            stub = copy.copy(layer)
            stub._modules, stub._parameters, stub._buffers = {}, {}, {}
            stub.forward = self._stub_forward(i)
            layers[i] = stub

    def _stub_forward(self, i: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs.pop("hidden_states")
            assert self._thread.on_layer is not None
            return self._thread.on_layer(i, hidden, (args[1:], kwargs))

        return forward

    def _wrap(self, hidden: Tensor) -> Any:
        return (hidden,) if self._returns_tuple else hidden

    def _record(self, tokens: Tensor) -> list[Arguments]:
        """The layers' arguments for `tokens`, after checking that other tokens give the same."""
        vocabulary = self._model.get_input_embeddings().num_embeddings
        once = self._record_once(tokens)
        again = self._record_once((tokens + 1) % vocabulary)
        for name, (args, kwargs), (args2, kwargs2) in zip(self.layer_names, once, again, strict=True):
            if not same(args, args2):
                raise ValueError(f"{name}: positional arguments depend on the tokens; cannot quantize this model")
            if bad := [key for key in kwargs if not same(kwargs[key], kwargs2.get(key))]:
                raise ValueError(f"{name}: arguments depend on the tokens; cannot quantize this model: {bad}")
        return once

    def _record_once(self, tokens: Tensor) -> list[Arguments]:
        records: list[Arguments] = []
        passed: list[Tensor] = []

        def record(i: int, hidden: Tensor, arguments: Arguments) -> Any:
            if i != len(records) or (passed and hidden is not passed[-1]):
                raise ValueError(
                    f"{self.layer_names[i]}: expected what the layer before returned, came something else; "
                    f"cannot quantize this model"
                )
            if i == 0:
                self._returns_tuple = returns_tuple(self.layer_names[0], self._layers[0], hidden, arguments)
            records.append(arguments)
            if len(records) == len(self._layers):
                raise _Stop(hidden)
            passed.append(hidden.clone())
            return self._wrap(passed[-1])

        self._run(record, input_ids=tokens[None].to(self.device))
        return records

    @contextmanager
    def _watching(self, i: int, layer: nn.Module, see: Callable[[str, Tensor], None]) -> Iterator[None]:
        """Inside, linears of `layer` called by this thread hand (full name, input) to `see`."""
        with self._lock:
            for name, linear in _linears(layer):
                if linear not in self._watched:
                    linear.register_forward_pre_hook(self._hook(f"{self.layer_names[i]}.{name}"), with_kwargs=True)
                    self._watched.add(linear)
        self._thread.on_linear = see
        try:
            yield
        finally:
            self._thread.on_linear = None

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        thread = self._thread

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if thread.on_linear is not None:
                thread.on_linear(name, args[0] if args else next(iter(kwargs.values())))

        return hook

    def _quant_linear(self, name: str) -> QuantLinear:
        packed = read_packed(self.folder, name).to(self.device)
        return QuantLinear.from_packed(packed).prepare(self.dtype)

    def _source(self, name: str) -> str | None:
        """The tensor of the folder that holds parameter `name`: itself, or one that it is tied to."""
        return next((n for n in (name, *self._aliases.get(name, ())) if n in self.folder.tensors), None)

    def _read(self, name: str, like: Tensor) -> Tensor:
        return self._read_source(self._source(name) or name).to(like.dtype)

    def _read_source(self, source: str) -> Tensor:
        return self.folder.read(source, self.device)

    def _describe_linears(self) -> dict[str, LinearInfo]:
        index = {f"{layer}.{n}": i for i, layer in enumerate(self.layer_names) for n, _ in _linears(self._layers[i])}
        return {
            name: LinearInfo(linear.out_features, linear.in_features, linear.bias is not None, index.get(name))
            for name, linear in _linears(self._model)
        }

    def _check_tensors(self) -> None:
        """Every tensor of the model is in the folder, in its shape; quantized layers are linears of it."""
        if unknown := sorted(set(self._quantized) - set(self._linear_infos)):
            raise CheckpointError(f"{self.folder.path}: quantized layers that the model lacks: {some(unknown)}")
        expected = {
            name: tuple(tensor.shape)
            for name, tensor in self._model.state_dict(keep_vars=True).items()
            if name.rpartition(".")[0] not in self._quantized
        }
        for name, spec in self._quantized.items():
            info = self._linear_infos[name]
            if (spec.out_features, spec.in_features) != (info.out_features, info.in_features):
                raise CheckpointError(f"{self.folder.path}: {name}: its shape is not the model's")
            assert self.folder.quantization is not None
            expected |= {key: shape for key, (_, shape) in self.folder.quantization.tensors(name).items()}
        if missing := [name for name in expected if self._source(name) is None]:
            raise CheckpointError(f"{self.folder.path}: tensors that the files lack: {some(missing)}")
        for name, shape in expected.items():
            if (came := self.folder.tensors[self._source(name) or name].shape) != shape:
                raise CheckpointError(f"{self.folder.path}: {name}: expected shape {list(shape)}, came {list(came)}")

    def _make_shell_lazy(self) -> None:
        """Modules outside the layers get their weights from the folder when they are first called."""
        for name, module in self._model.named_modules():
            if name in self._quantized:
                module._parameters = dict.fromkeys(module._parameters)
                module.forward = self._quantized_forward(name)
                continue
            own = {leaf: tensor for leaf, tensor in module.state_dict(keep_vars=True).items() if "." not in leaf}
            if own:
                self._shell.append((module, own))
                module.register_forward_pre_hook(self._fill_hook(f"{name}." if name else "", own))

    def _fill_hook(self, prefix: str, own: dict[str, Tensor]) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def fill(module: nn.Module, _: tuple[Any, ...]) -> None:
            with self._lock:
                for leaf, meta in own.items():
                    if getattr(module, leaf).device == META:
                        key = self._source(prefix + leaf) or prefix + leaf  # tied weights are read once
                        if key not in self._shell_weights:
                            self._shell_weights[key] = self._read(key, meta)
                        assign(module, leaf, self._shell_weights[key])

        return fill

    def _quantized_forward(self, name: str) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            with self._lock:
                if name not in self._shell_linears:
                    self._shell_linears[name] = self._quant_linear(name)
            return self._shell_linears[name](x)

        return forward


def finite_samples(x: Tensor) -> Tensor:
    """Which samples of x [B, ...] are finite: bool [B]."""
    # The largest magnitude in one pass over memory; isfinite takes five.
    return torch.linalg.vector_norm(x.flatten(1), math.inf, 1).isfinite()


def check_finite(finite: Sequence[float], layer: str, first: int) -> None:
    """Raise ValueError, naming `layer` and the sample, unless all samples are `finite`; they are number `first` on."""
    if not all(finite):
        sample = first + [bool(good) for good in finite].index(False)
        raise ValueError(
            f"{layer}: calibration sample {sample} gives activations that are not finite; "
            f"try --dtype float32, or look for broken weights in the model"
        )


def _linears(module: nn.Module) -> list[tuple[str, nn.Linear | QuantLinear]]:
    return [(name, m) for name, m in module.named_modules() if isinstance(m, nn.Linear | QuantLinear)]
