"""The gate: what a checkpoint must show before it is called done. It is evaluated and generates, from its own files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from eightfold.calibration import tokens_sha256
from eightfold.evaluate import EvalResult, NotFiniteError, evaluate, final_hidden
from eightfold.files import measure, read_json, sync, to_json
from eightfold.finite import without_infinity
from eightfold.folder import ModelFolder
from eightfold.team import Team
from eightfold.workspace import MANIFEST

if TYPE_CHECKING:
    from eightfold.preflight import Plan

# Perplexity may grow by this factor at a nominal rate, a mean one rounded down (from 4 bits on by the last); more is
# called broken. Small models lose most: a 3M one doubles its perplexity at 2 bits, a 47M one loses an eighth.
MAX_RATIO = {2: 4.0, 3: 2.0, 4: 1.5}
EVALUATION = "evaluation.json"  # what the gate found, in the checkpoint
PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 3, 24, 32
LEAST_DISTINCT = 4  # different tokens that one sampled continuation, at least, must have


@dataclass(frozen=True, slots=True)
class Verdict:
    """`reasons` why the checkpoint failed, none if it passed; `samples`: (prompt, continuation) texts.

    `evaluation` is None, and there are no samples, where the checkpoint's logits are not finite.
    """

    evaluation: EvalResult | None
    samples: list[tuple[str, str]]
    reasons: list[str]

    @property
    def passed(self) -> bool:
        return not self.reasons

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "passed": self.passed,
            "reasons": self.reasons,
            "evaluation": self.evaluation and self.evaluation.to_dict(),
            "samples": [{"prompt": prompt, "continuation": text} for prompt, text in self.samples],
        }


def judge(plan: Plan, made: Path, phase: Any, advance: Any, team: Team) -> Verdict:
    """Evaluate the checkpoint in `made` against the original on held-out text, and sample from it. Called by process 0
    of the team; the others call `help_to_judge`.

    `phase(name, steps)` and `advance(steps)` are told of the progress. Logits that are not finite fail the gate, too.
    What was found is written into the checkpoint, for its model card.
    """
    verdict = _verdict(plan, made, phase, advance, team)
    text = plan.request.eval_text
    content = {
        "text": {
            "source": "bundled" if text is None else Path(text).name,
            "sha256": tokens_sha256(plan.held_out),
        },
        "seqlen": plan.held_out.shape[1],
        "device": plan.decoder.device.type,
        "dtype": str(plan.decoder.dtype).removeprefix("torch."),
    }
    (made / EVALUATION).write_text(to_json(without_infinity(content | verdict.to_dict())), encoding="utf-8")
    manifest = read_json(made / MANIFEST)
    files = manifest["files"] | {EVALUATION: measure(made / EVALUATION)}
    manifest["files"] = dict(sorted(files.items()))
    (made / MANIFEST).write_text(to_json(manifest), encoding="utf-8")
    for path in (made / EVALUATION, made / MANIFEST, made):
        sync(path)
    return verdict


def help_to_judge(plan: Plan, team: Team) -> None:
    """The last process of a team takes the original through the held-out text while the first one writes the
    checkpoint, and samples from that, if it sees it, while the first one evaluates it."""
    known = final_hidden(plan.decoder, plan.held_out) if team.rank == team.size - 1 else []
    made = team.tell(None)
    sampler = _sampler(made, team)
    team.fetch(known, team.size - 1, plan.decoder.device)
    known.clear()
    team.gather([_sample(plan, made)] if team.rank == sampler else [])


def _sampler(made: Path, team: Team) -> int:
    """The process that samples."""
    return team.size - 1 if team.gather([made.is_dir()])[-1] else 0


def _sample(plan: Plan, made: Path) -> tuple[list[tuple[str, str]], int]:
    prompts = plan.held_out[:PROMPTS, :PROMPT_TOKENS]
    return generate(made, prompts, plan.decoder.device, plan.decoder.dtype)


def _verdict(plan: Plan, made: Path, phase: Any, advance: Any, team: Team) -> Verdict:
    request, decoder, windows = plan.request, plan.decoder, plan.held_out
    done, sampler = 0, _sampler(team.tell(made), team)
    known = team.fetch([], team.size - 1, decoder.device)

    def progress(step: int, steps: int) -> None:
        nonlocal done
        if not done:
            phase("evaluating", steps)
        advance(step - done)
        done = step

    broken = ""
    try:
        evaluation = evaluate(ModelFolder(made), windows, plan.folder, decoder.device, decoder.dtype, progress, known)
    except NotFiniteError as error:
        evaluation, broken = None, str(error)
    phase("generating", 1)
    sampled = [] if sampler else [([], 0) if broken else _sample(plan, made)]
    ((samples, distinct),) = team.gather(sampled)
    advance(1)
    if evaluation is None:
        return Verdict(None, [], [broken])
    limit = request.max_ratio or MAX_RATIO[min(int(plan.bits), 4)]
    reasons = []
    if not (evaluation.ratio or 0) <= limit:
        reasons.append(f"perplexity is {evaluation.ratio:.3f} times the original's, more than {limit:g} times")
    if distinct < LEAST_DISTINCT:
        reasons.append(f"it generates the same token over and over ({distinct} different ones in {NEW_TOKENS})")
    return Verdict(evaluation, samples, reasons)


def generate(
    path: Path, prompts: Tensor, device: torch.device, dtype: torch.dtype, new_tokens: int = NEW_TOKENS
) -> tuple[list[tuple[str, str]], int]:
    """Sampled continuations (temperature 1, fixed seed) of prompts, long [P, T], through transformers.

    Returns (prompt, continuation) texts, and the most different tokens that any of the continuations has; none where
    the logits are not finite.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # Loaded to where it runs: a CPU would decode every weight first.
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, device_map={"": device})
    tokenizer = AutoTokenizer.from_pretrained(path)
    with torch.no_grad():
        if not model(prompts.to(device)).logits.isfinite().all():
            return [], 0
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        out = model.generate(
            prompts.to(device),
            attention_mask=torch.ones_like(prompts, device=device),
            do_sample=True,
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0,
        )
    new = out[:, prompts.shape[1] :]
    texts = zip(tokenizer.batch_decode(prompts), tokenizer.batch_decode(new), strict=True)
    return list(texts), max(len(row.unique()) for row in new)
