"""How many bits each linear gets: what was asked for, what fits it, and the recipe file that says so.

A model may be held to a mean of nominal bits, to stored bits, or to a size of its weight files. Groups of linears that
share an input get one rate each; which, is decided by what each would lose (`rate_losses`), exactly (`allocation`).
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from eightfold.allocation import allocate
from eightfold.format import BITS, LayerSpec, QuantConfig, code_bytes, vector_bytes
from eightfold.quantize import recipe

RECIPE = "recipe.toml"
HEADER_BYTES = 96  # of a code tensor in a safetensors header, without its name
Bytes = Callable[[QuantConfig], int]


@dataclass(frozen=True, slots=True)
class GroupLosses:
    """Linears that share an input, and the loss in nats a token that quantizing them at each rate adds."""

    linears: tuple[str, ...]
    losses: dict[int, float]


@dataclass(frozen=True, slots=True)
class Target:
    """What a model may take: exactly one of mean nominal bits a weight, stored bits per original weight of the
    quantized linears, and bytes of all weight files. Raises ValueError for none, several, or bits out of range."""

    bits: float | None = None
    stored_bits: float | None = None
    size: int | None = None

    def __post_init__(self) -> None:
        if len(given := self.to_dict()) != 1:
            raise ValueError(f"expected one out of bits, stored bits and size, got {', '.join(given) or 'none'}")
        if self.bits is not None and not BITS[0] <= self.bits <= BITS[-1]:
            raise ValueError(f"expected bits from {BITS[0]} to {BITS[-1]}, got {self.bits:g}")

    @property
    def uniform(self) -> int | None:
        """The rate of every linear where whole nominal bits are asked for; None where rates are to be found."""
        return int(self.bits) if self.bits is not None and self.bits == int(self.bits) else None

    def to_dict(self) -> dict[str, float]:
        """The one that is given, by its name."""
        every = {"bits": self.bits, "stored_bits": self.stored_bits, "size": self.size}
        given = {name: value for name, value in every.items() if value is not None}
        return {name: int(value) if value == int(value) else value for name, value in given.items()}

    def __str__(self) -> str:
        ((name, value),) = self.to_dict().items()
        return f"{value:,} bytes" if name == "size" else f"{value:g} {name.replace('_', ' ')}"

    def holds(self, config: QuantConfig, output_bytes: Bytes) -> bool:
        """Whether a model quantized as `config` says takes no more than this; `output_bytes`: of its weight files."""
        if self.size is not None:
            return output_bytes(config) <= self.size
        cost = sum(self._cost(name, spec, spec.bits, config) for name, spec in config.layers.items())
        return cost <= self._total(config)

    def choose(self, groups: Sequence[GroupLosses], config: QuantConfig, output_bytes: Bytes) -> QuantConfig:
        """`config` with the rates that lose least in all of those that fit. Raises ValueError where none fit."""
        least = with_rates(config, dict.fromkeys(config.layers, BITS[0]))
        if not self.holds(least, output_bytes):
            raise ValueError(f"expected a target of at least {self._least(least, output_bytes)}, got {self}")
        costs = [
            [sum(self._cost(n, config.layers[n], bits, config) for n in group.linears) for bits in BITS]
            for group in groups
        ]
        losses = [[group.losses[bits] for bits in BITS] for group in groups]
        total = self._total(least)
        if self.size is not None:
            total += sum(row[0] for row in costs) - output_bytes(least)
        while True:
            chosen = allocate(costs, losses, total)
            rates = {n: BITS[k] for group, k in zip(groups, chosen, strict=True) for n in group.linears}
            rated = with_rates(config, rates)
            if self.holds(rated, output_bytes):
                return rated
            assert self.size is not None  # headers are a little longer than they were taken for
            total -= output_bytes(rated) - self.size

    def _total(self, config: QuantConfig) -> int:
        weights = sum(spec.out_features * spec.in_features for spec in config.layers.values())
        return int((self.bits or self.stored_bits or 0) * weights + 1e-6) if self.size is None else self.size

    def _cost(self, name: str, spec: LayerSpec, bits: int, config: QuantConfig) -> int:
        """Of a linear at a rate: nominal bits, stored bits, or bytes."""
        if self.bits is not None:
            return spec.out_features * spec.in_features * bits
        codes = code_bytes(replace(spec, bits=bits))
        if self.stored_bits is not None:
            return 8 * (codes + vector_bytes(spec, config.scale_dtype))
        stages = len(recipe(bits, _family(config)).stages)
        return codes + stages * (HEADER_BYTES + len(json.dumps(name)))

    def _least(self, config: QuantConfig, output_bytes: Bytes) -> str:
        if self.size is not None:
            return f"{output_bytes(config):,} bytes"
        weights = sum(spec.out_features * spec.in_features for spec in config.layers.values())
        cost = sum(self._cost(name, spec, spec.bits, config) for name, spec in config.layers.items())
        return f"{cost / weights:.4f} stored bits"


def with_rates(config: QuantConfig, rates: Mapping[str, int]) -> QuantConfig:
    """`config` with other bits for its linears, and the stages and ratios of these."""
    layers = {name: replace(spec, bits=rates[name]) for name, spec in config.layers.items()}
    family = _family(config)
    return replace(config, layers=layers, recipes={bits: recipe(bits, family) for bits in sorted(set(rates.values()))})


def nominal_bits(layers: Iterable[LayerSpec]) -> float:
    """Mean nominal bits a weight."""
    every = [(spec.out_features * spec.in_features, spec.bits) for spec in layers]
    return sum(weights * bits for weights, bits in every) / sum(weights for weights, _ in every)


def blind(groups: Iterable[Sequence[str]], layers: Mapping[str, LayerSpec]) -> list[GroupLosses]:
    """What is assumed before anything is measured: every weight loses alike, a quarter for each bit more."""
    sizes = {name: spec.out_features * spec.in_features for name, spec in layers.items()}
    return [GroupLosses(tuple(g), {b: sum(sizes[n] for n in g) / 4.0**b for b in BITS}) for g in groups]


def _family(config: QuantConfig) -> str:
    return "e8shell" if next(iter(config.recipes.values())).stages[0] == "e8shell" else "e8p"


# --- the recipe file --------------------------------------------------------------------------------------


def recipe_text(groups: Sequence[GroupLosses], config: QuantConfig, target: Target, stored_bits: float) -> str:
    """The recipe file: the bits of every group, and what each rate would cost."""
    expected = sum(group.losses[config.layers[group.linears[0]].bits] for group in groups)
    lines = [
        "# Bits of each group of linears that share an input. Change some in a copy of this file, and use it with",
        "#     eightfold quantize MODEL OUT --recipe COPY",
        "# A name may be a pattern ('*.mlp.down_proj'); the last group that names a linear decides.",
        "# losses: what quantizing the group at 2, 3, ... 8 bits adds to the loss, in nats a token, as measured.",
        f"# Asked for: {target}. Chosen: {nominal_bits(config.layers.values()):.4f} nominal, "
        f"{stored_bits:.4f} stored bits; expected KL divergence {expected:.4g} nats a token.",
    ]
    for group in groups:
        names = ",\n    ".join(json.dumps(name) for name in group.linears)
        lines += ["", "[[groups]]", f"bits = {config.layers[group.linears[0]].bits}"]
        lines += ["linears = [", f"    {names},", "]"]
        lines += ["losses = [" + ", ".join(f"{group.losses[bits]:.4g}" for bits in BITS) + "]"]
    return "\n".join(lines) + "\n"


def read_recipe(text: str, file: str, linears: Iterable[str]) -> dict[str, int]:
    """The bits of every linear that a recipe file's `text` gives. Raises ValueError naming `file` and what is wrong."""
    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{file}: expected TOML: {error}") from error
    groups = content.get("groups")
    if set(content) != {"groups"} or not isinstance(groups, list) or not groups:
        raise ValueError(f"{file}: expected tables [[groups]] and nothing else, came {', '.join(content) or 'nothing'}")
    every = list(linears)
    rates: dict[str, int] = {}
    for number, group in enumerate(groups, start=1):
        where = f"{file}: group {number}"
        patterns, bits = _group(where, group)
        for pattern in patterns:
            if not (named := [name for name in every if fnmatchcase(name, pattern)]):
                raise ValueError(f"{where}: {pattern!r} is no linear that is to be quantized, like {every[0]}")
            rates |= dict.fromkeys(named, bits)
    if missing := [name for name in every if name not in rates]:
        raise ValueError(f"{file}: expected bits for every linear, {missing[0]} and {len(missing) - 1} more have none")
    return {name: rates[name] for name in every}


def _group(where: str, group: Any) -> tuple[list[str], int]:
    if not isinstance(group, dict) or not {"bits", "linears"} <= set(group) <= {"bits", "linears", "losses"}:
        raise ValueError(f"{where}: expected bits, linears and perhaps losses, came {group!r}")
    bits, patterns = group["bits"], group["linears"]
    if type(bits) is not int or bits not in BITS:
        raise ValueError(f"{where}: expected whole bits from {BITS[0]} to {BITS[-1]}, came {bits!r}")
    if not isinstance(patterns, list) or not patterns or not all(isinstance(p, str) for p in patterns):
        raise ValueError(f"{where}: expected a list of names of linears, came {patterns!r}")
    return patterns, bits


def load_recipe(file: str | Path, linears: Iterable[str]) -> tuple[str, dict[str, int]]:
    """Text of a recipe file, and the bits of every linear. Raises ValueError naming what is wrong."""
    try:
        text = Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: expected a recipe file: {error}") from error
    return text, read_recipe(text, str(file), linears)
