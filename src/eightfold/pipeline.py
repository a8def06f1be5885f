"""Quantize a model from end to end: layer by layer to a workspace, then the checkpoint, the gate, and into place."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eightfold import spread
from eightfold.checkpoint import assemble
from eightfold.cuda.driver import device_index
from eightfold.format import QuantConfig
from eightfold.gate import Verdict, help_to_judge, judge
from eightfold.parallel import single_threaded
from eightfold.preflight import Plan, check_room, failed_path
from eightfold.rates import RECIPE
from eightfold.sensitivity import output_sensitivity
from eightfold.team import PARTS, Team
from eightfold.walk import Listener, Walk
from eightfold.workspace import Workspace, publish

BASE = "base_sha256"


@dataclass(frozen=True, slots=True)
class Outcome:
    """`path`: where the checkpoint lies; not the target's own name where the gate failed it."""

    path: Path
    verdict: Verdict
    records: list[dict[str, Any]]


def quantize_model(plan: Plan, listener: Listener) -> Outcome:
    """Carry out `plan`. Interrupted at any moment, the same call goes on after the last finished layer.

    Where torch.distributed is initialized, its processes, each with the same plan but for the device, share the work on
    the layers; process 0 alone finds rates, writes, evaluates, and tells its listener; meanwhile the last one helps to
    judge (gate.py). All return the same.
    """
    team = Team()
    _limit_memory(plan)
    if team.size > (most := min(PARTS, len(plan.windows))):
        raise ValueError(f"expected at most {most} processes to share {len(plan.windows)} samples, came {team.size}")
    if team.rank:
        _walk(plan, None, listener, team)
        help_to_judge(plan, team)
        return team.tell(None)
    check_room(plan)
    with closing(Workspace(plan.request.out, _fingerprint(plan))) as workspace:
        with ThreadPoolExecutor(1) as beside:
            config, recipe = _walk(plan, _First(workspace, beside.submit(plan.folder.sha256)), listener, team)
        plan = replace(plan, config=config)
        listener.phase("writing", 1)
        texts = {} if recipe is None else {RECIPE: recipe}
        made = assemble(workspace, plan.folder, config, plan.request.shard_bytes, texts)
        listener.advance(1)
        verdict = judge(plan, made, listener.phase, listener.advance, team)
        target = Path(plan.request.out)
        records = workspace.records()
        path = publish(workspace, target if verdict.passed else failed_path(target))
    return team.tell(Outcome(path, verdict, records))


class _First(NamedTuple):
    """What process 0 alone has. `hashed`: of the original, all of whose bytes are read, while others work already."""

    workspace: Workspace
    hashed: Future[str]

    def base(self) -> str:
        """The original's hash. Raises CheckpointError if the workspace was begun with another one."""
        self.workspace.confirm(BASE, self.hashed.result())
        return self.hashed.result()

    def work(self, plan: Plan) -> tuple[list[int], bool, bool]:
        """The finished layers, whether there are others, whether the sensitivity is wanted."""
        if self.workspace.knows(BASE):
            self.base()
        done = self.workspace.finished()
        heads = [n for n in plan.config.layers if plan.decoder.linear_shapes()[n].layer_index is None]
        unfinished = len(done) < len(plan.decoder.layer_names) + bool(heads)
        return done, unfinished, unfinished or spread.is_to_be_found(plan, self.workspace)


def _walk(plan: Plan, own: _First | None, listener: Listener, team: Team) -> tuple[QuantConfig, str | None]:
    """All that the processes do together. Returns the config with the original's hash and the rates of the run, and
    their recipe file's text."""
    done, unfinished, sensed = team.tell(own and own.work(plan))
    sensitivity = _sensitivity(plan, listener, team) if sensed else {}
    found = None
    if own is not None:
        config = replace(plan.config, provenance={**plan.config.provenance, BASE: own.base()})
        found = spread.spread_bits(plan, config, own.workspace, sensitivity, listener)
    config, recipe = team.tell(found)
    if unfinished:
        workspace = own and own.workspace
        Walk(replace(plan, config=config), workspace, listener, team).run(done, sensitivity)
    return config, recipe


def _limit_memory(plan: Plan) -> None:
    """Have PyTorch refuse what goes beyond the memory that may be used, as a smaller GPU would. Its memory is to grow
    page by page: in blocks of fixed sizes what is kept long, as hidden states are, leaves gaps of gigabytes."""
    device, limit = plan.decoder.device, plan.cost.usable_bytes
    if limit is not None:
        apply = getattr(torch._C, "_accelerator_setAllocatorSettings", None)  # in older ones at another place
        (apply or torch.cuda.memory._set_allocator_settings)("expandable_segments:True")
        index = device_index(device)
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / torch.cuda.mem_get_info(index)[1]), index)


def _fingerprint(plan: Plan) -> dict[str, Any]:
    """All that the bytes of the result depend on, apart from the original's."""
    return {
        "quantization_config": plan.config.to_dict(),
        "recipe": plan.recipe,
        "device": plan.decoder.device.type,
        "torch": torch.__version__,
        "shard_bytes": plan.request.shard_bytes,
    }


@torch.no_grad()
@single_threaded()
def _sensitivity(plan: Plan, listener: Listener, team: Team) -> dict[str, Tensor]:
    samples = plan.windows[: plan.request.sensitivity_samples]
    if not len(samples):
        return {}
    listener.phase("sensitivity", 2 * len(plan.decoder.layer_names) + 1)
    seed, on_host = plan.request.settings.seed, plan.cost.sensed_on_host
    return output_sensitivity(plan.decoder, samples, seed, listener.advance, team, on_host)
