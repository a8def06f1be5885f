"""The rates of a run where they are to be found: measured, chosen, and kept in the workspace for a run that goes on."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Protocol

from torch import Tensor

from eightfold.files import measure, read_json, to_json, write_text
from eightfold.format import CheckpointError, QuantConfig, stored_bits
from eightfold.parallel import single_threaded
from eightfold.preflight import Plan, output_bytes
from eightfold.rate_losses import measure_losses
from eightfold.rates import RECIPE, nominal_bits, read_recipe, recipe_text, with_rates
from eightfold.workspace import Workspace


class Listener(Protocol):
    """Who is told how the work goes on."""

    def phase(self, name: str, steps: int) -> None:
        """A phase of so many steps begins."""

    def advance(self, steps: int) -> None:
        """So many more steps of it are done."""

    def note(self, text: str) -> None:
        """A sentence about what was found."""


def spread_bits(
    plan: Plan, config: QuantConfig, workspace: Workspace, sensitivity: dict[str, Tensor], told: Listener
) -> tuple[QuantConfig, str | None]:
    """`config` with the rates of the run, and the text of its recipe file, None where one rate was asked for.

    Rates that are to be found are found once and kept as layers/recipe.toml, with size and hash beside it.
    """
    if plan.target is None:
        return config, plan.recipe
    file = workspace.path / "layers" / RECIPE
    text = _kept(file)
    if text is None:
        text = _found(plan, config, sensitivity, told)
        write_text(file, text)
        write_text(file.with_suffix(".json"), to_json(measure(file)))
    config = with_rates(config, read_recipe(text, str(file), config.layers))
    count = Counter(spec.bits for spec in config.layers.values())
    told.note(
        f"{nominal_bits(config.layers.values()):.4f} bits, {_stored(config):.4f} stored: "
        f"{', '.join(f'{count[bits]} linears at {bits}' for bits in sorted(count))} ({file})"
    )
    return config, text


def is_to_be_found(plan: Plan, workspace: Workspace) -> bool:
    """Whether `spread_bits` has rates to find, for which it needs the sensitivity."""
    return plan.target is not None and _kept(workspace.path / "layers" / RECIPE) is None


def _kept(file: Path) -> str | None:
    about = file.with_suffix(".json")
    if not about.exists():
        return None
    if measure(file) != read_json(about):
        raise CheckpointError(
            f"{file}: not the bytes that were written; to use other rates give a copy with --recipe, and --no-resume"
        )
    return file.read_text(encoding="utf-8")


@single_threaded()  # but for what goes through ordered_map, so that the rates do not depend on threads
def _found(plan: Plan, config: QuantConfig, sensitivity: dict[str, Tensor], told: Listener) -> str:
    assert plan.target is not None
    request = plan.request
    heads = [name for name in config.layers if plan.decoder.linear_shapes()[name].layer_index is None]
    told.phase("rates", len(plan.decoder.layer_names) + bool(heads))
    windows = plan.windows[: request.sensitivity_samples]
    groups = measure_losses(plan.decoder, windows, sensitivity, config.layers, request.settings, told.advance)
    rated = plan.target.choose(groups, config, lambda each: output_bytes(plan.folder, each, request))
    return recipe_text(groups, rated, plan.target, _stored(rated))


def _stored(config: QuantConfig) -> float:
    return stored_bits(config.layers.values(), config.scale_dtype)
