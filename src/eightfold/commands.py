"""The commands: each takes the parsed options, says what it finds, and returns its exit status and its JSON object."""

from __future__ import annotations

import os
import re
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eightfold import workspace
from eightfold.calibration import windows as cut_windows
from eightfold.checkpoint import SHARD_BYTES
from eightfold.console import Terminal, duration, pairs, plus_minus, size, table
from eightfold.convert import to_eightfold, to_glq
from eightfold.demo import run_demo
from eightfold.evaluate import EvalResult, evaluate
from eightfold.folder import ModelFolder, local_folder
from eightfold.glq_folder import is_glq, open_folder
from eightfold.inspect import inspect
from eightfold.launch import joined
from eightfold.pipeline import Outcome, quantize_model
from eightfold.preflight import Plan, Request, choose_device, choose_dtype, make_plan
from eightfold.quantize import Settings
from eightfold.report import COLUMNS, PAGE, cells
from eightfold.sizes import Tokens, costs
from eightfold.team import Team
from eightfold.verify import verify

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DONE, FAILED, GATE_FAILED = 0, 1, 3
EVAL_SEQLEN = 1024
SHOWN_PROBLEMS = 20

Result = tuple[int, dict[str, Any]]


def run_quantize(options: Namespace, terminal: Terminal) -> Result:
    """Preflight, the work, the gate."""
    with joined(options.device) as device:
        if Team().rank:
            terminal.mute()
        return _quantize(options, device, terminal)


def _quantize(options: Namespace, device: str, terminal: Terminal) -> Result:
    plan = make_plan(replace(_request(options), device=device))
    terminal.notes.print(pairs(preflight_rows(plan)))
    if options.dry_run:
        return DONE, {"status": "dry run", "plan": plan.to_dict()}
    if not options.resume:
        if not Team().rank:
            workspace.discard(options.out)
    elif done := len(list((workspace.partial_path(options.out) / "layers").glob("[0-9]*.json"))):
        terminal.note(f"Going on after {done} finished layers in {workspace.partial_path(options.out)}.")
    with terminal.progress() as steps:
        outcome = quantize_model(plan, steps)
    _say_verdict(outcome, terminal)
    passed = outcome.verdict.passed
    return DONE if passed else GATE_FAILED, {
        "status": "done" if passed else "gate failed",
        "path": str(outcome.path),
        "plan": plan.to_dict(),
        "gate": outcome.verdict.to_dict(),
        "layers": outcome.records,
    }


def run_estimate(options: Namespace, terminal: Terminal) -> Result:
    """What a quantization would take on machines that need not be here, from the config alone."""
    found = costs(options.config, options.bits, Tokens(options.samples, options.seqlen))
    rows = [
        [
            name,
            size(cost.gpu_bytes),
            "yes" if cost.fits else "no",
            "host" if cost.on_host else "GPU",
            size(cost.host_bytes),
            duration(cost.seconds),
        ]
        for name, cost in found.items()
    ]
    terminal.results.print(table(("machine", "on each GPU", "fits", "activations on", "on the host", "time"), rows))
    return DONE, {"machines": {name: cost.to_dict() | {"fits": cost.fits} for name, cost in found.items()}}


def run_eval(options: Namespace, terminal: Terminal) -> Result:
    """Perplexity, and with another model the distance from it."""
    folder = open_folder(options.model)
    against = open_folder(options.against) if options.against else None
    device, dtype = choose_device(options.device), choose_dtype(options.dtype, options.device, folder)
    tokenizer = _tokenizer(folder, against)
    longest = getattr(folder.config, "max_position_embeddings", None) or options.seqlen
    windows = cut_windows(options.text, tokenizer, min(options.seqlen, longest), limit=options.windows)
    with terminal.progress() as steps:
        done = 0

        def progress(step: int, total: int) -> None:
            nonlocal done
            if not done:
                steps.phase("evaluating", total)
            steps.advance(step - done)
            done = step

        found = evaluate(folder, windows, against, device, dtype, progress)
    facts = inspect(folder.path) if folder.quantization else None
    rows = evaluation_rows(found, options.against)
    if facts:
        nominal = f"{facts.stored_bits:.4f} per original weight of {len(facts.layers)} linears ({facts.bits:g} nominal)"
        rows.append(("stored bits", nominal))
    terminal.results.print(pairs(rows))
    stored = {"bits": facts.bits, "stored_bits": facts.stored_bits} if facts else {"bits": None, "stored_bits": None}
    names = {"model": options.model, "against": options.against, "seqlen": windows.shape[1]}
    return DONE, names | stored | found.to_dict()


def run_inspect(options: Namespace, terminal: Terminal) -> Result:
    """Sizes, layouts, losses, provenance."""
    facts = inspect(options.dir)
    columns = ("linear", "shape", "bits", "stored bits", "bytes predicted", "measured")
    columns += ("in blocks", "out blocks", "proxy loss", "SQNR")
    rows = [
        [
            layer.name,
            f"{layer.out_features} × {layer.in_features}",
            str(layer.bits),
            f"{layer.stored_bits:.4f}",
            f"{layer.bytes_predicted:,}",
            f"{layer.bytes_measured:,}" + ("" if layer.bytes_measured == layer.bytes_predicted else " !"),
            _blocks(layer.in_blocks),
            _blocks(layer.out_blocks),
            "" if layer.proxy_loss is None else f"{layer.proxy_loss:.4g}",
            "" if layer.sqnr_db is None else f"{layer.sqnr_db:.2f} dB",
        ]
        for layer in facts.layers
    ]
    total = ["total", f"{facts.weights:,}", f"{facts.bits:g}", f"{facts.stored_bits:.4f}"]
    total += [f"{facts.bytes_predicted:,}", f"{facts.bytes_measured:,}", "", "", "", ""]
    terminal.results.print(table(columns, [*rows, total]))
    content = facts.to_dict()
    more = [("everything else", f"{facts.other_bytes:,} bytes"), ("weight files", f"{facts.file_bytes:,} bytes")]
    more += [("format version", str(facts.config.format_version)), ("tensor parallel up to", str(facts.config.tp_max))]
    more += [(key.replace("_", " "), _flat(value)) for key, value in facts.config.provenance.items()]
    terminal.results.print()
    terminal.results.print(pairs(more))
    return DONE, content


def run_convert(options: Namespace, terminal: Terminal) -> Result:
    """A GLQ checkpoint to eightfold's format, or back."""
    back = options.to == "glq"
    if back and (options.base or options.zero_biases):
        raise ValueError("--base and --zero-biases restore what GLQ dropped: leave them out with --to glq")
    if back and is_glq(local_folder(options.source)):
        raise ValueError(f"{options.source}: expected an eightfold checkpoint to convert, it is a GLQ one already")
    if not options.resume:
        workspace.discard(options.out)
    with terminal.progress() as steps:
        if back:
            made = to_glq(options.source, options.out, steps.phase, steps.advance)
        else:
            most = options.shard_bytes or SHARD_BYTES
            made = to_eightfold(
                options.source, options.out, options.base, options.zero_biases, most, steps.phase, steps.advance
            )
    terminal.say(f"{made.layers} quantized linears, {made.tensor_bytes:,} bytes of tensors. Done: {made.path}")
    content = {"path": str(made.path), "layers": made.layers, "tensor_bytes": made.tensor_bytes}
    return DONE, {"status": "done", "to": options.to} | content


def run_verify(options: Namespace, terminal: Terminal) -> Result:
    """Every problem on a line of its own; exit status 1 if there is one."""
    with terminal.progress() as steps:
        found = verify(options.dir, options.against, steps.phase, steps.advance)
    for note in found.notes:
        terminal.note(f"Note: {note}.")
    for problem in found.problems[:SHOWN_PROBLEMS]:
        terminal.note(f"Problem: {problem}")
    if more := len(found.problems) - SHOWN_PROBLEMS:
        terminal.note(f"... and {more} more problems (all with --json).") if more > 0 else None
    if lowest := found.lowest:
        mean = sum(found.sqnr_db.values()) / len(found.sqnr_db)
        least = f"{found.sqnr_db[lowest]:.2f} dB at {lowest}"
        terminal.say(f"SQNR against the original: mean {mean:.2f} dB, lowest {least}.")
    count = f"{found.files} files, {found.layers} quantized linears"
    terminal.say(f"{found.path}: {count}: {_count(found.problems)}")
    return FAILED if found.problems else DONE, found.to_dict()


def run_demo_command(options: Namespace, terminal: Terminal) -> Result:
    """Quantize the bundled model at several rates and write a report."""
    with terminal.progress() as steps:
        report = run_demo(options.out, steps)
    terminal.results.print(table(COLUMNS, cells(report)))
    terminal.say(f"Report: {Path(options.out) / PAGE}")
    failed = [f"{row.name}: {reason}" for row in report.rows for reason in row.reasons]
    for each in failed:
        terminal.note(f"Failed the gate: {each}.")
    return GATE_FAILED if failed else DONE, {"out": options.out} | report.to_dict()


def preflight_rows(plan: Plan) -> list[tuple[str, str]]:
    """What the user is told before the work, as (what, value)."""
    facts = plan.to_dict()
    weights = sum(spec.out_features * spec.in_features for spec in plan.config.layers.values())
    calibration = facts["calibration"]
    text = f"{calibration['samples']} × {calibration['seqlen']} tokens of {calibration['source']}"
    text += f", seed {calibration['seed']}" + (" (windows overlap)" if calibration["overlap"] else "")
    about = "about " if plan.target else ""
    return [
        ("model", f"{facts['model']} ({size(facts['source_bytes'])})"),
        ("to", facts["out"]),
        ("bits", _rates(plan)),
        ("quantized", f"{len(facts['quantized'])} linears, {weights:,} weights: {_patterns(facts['quantized'])}"),
        ("left as they are", _patterns(facts["left"]) or "no linear"),
        ("layout", f"{facts['layout']}, tensor parallel up to {facts['tp_max']}"),
        ("calibration", text),
        ("runs on", f"{facts['device']} in {facts['dtype']}"),
        ("output", f"{about}{facts['output_bytes']:,} bytes ({size(facts['output_bytes'])})"),
        ("free disk", size(facts["free_bytes"])),
        ("peak memory", _memory_words(plan)),
        ("time", f"about {duration(facts['seconds_estimate'])}"),
    ]


def _rates(plan: Plan) -> str:
    if plan.target is not None:
        return (
            f"{plan.target}, shared out by what each group of linears loses; which gets which, a first walk finds out"
        )
    source = f", by {plan.request.recipe}" if plan.recipe is not None else ""
    return f"{plan.bits:g} nominal, {plan.stored_bits:.4f} stored per original weight{source}"


def evaluation_rows(found: EvalResult, other: str) -> list[tuple[str, str]]:
    """An evaluation in words, each number with its standard error."""
    rows = [("perplexity", plus_minus(found.perplexity, found.perplexity_se))]
    if found.against_perplexity is not None:
        assert found.ratio is not None
        assert found.kl is not None
        assert found.top1 is not None
        rows += [
            (f"perplexity of {other}", f"{found.against_perplexity:.4f}"),
            ("ratio", plus_minus(found.ratio, found.ratio_se)),
            ("KL divergence", plus_minus(found.kl, found.kl_se) + " nats per token"),
            ("top-1 agreement", plus_minus(found.top1, found.top1_se)),
        ]
    return [*rows, ("on", f"{found.windows} windows, {found.tokens:,} predicted tokens")]


def _request(options: Namespace) -> Request:
    return Request(
        model=options.model,
        out=options.out,
        bits=options.bits,
        stored_bits=options.stored_bits,
        size=options.size,
        recipe=options.recipe,
        calibration=tuple(options.calibration) if options.calibration else None,
        samples=options.samples,
        seqlen=options.seqlen,
        device=options.device,
        dtype=options.dtype,
        include=tuple(options.include),
        exclude=tuple(options.exclude),
        tp_max=options.tp_max,
        eval_text=options.eval_text,
        max_ratio=options.max_ratio,
        settings=Settings(seed=options.seed, scale_dtype=options.scale_dtype, codebook=options.codebook),
        gpus=options.gpus or 1,
        **{
            key: value
            for key in ("layout", "shard_bytes", "gpu_memory")
            if (value := getattr(options, key)) is not None
        },
    )


def _say_verdict(outcome: Outcome, terminal: Terminal) -> None:
    verdict = outcome.verdict
    if verdict.evaluation is not None:
        terminal.results.print(pairs(evaluation_rows(verdict.evaluation, "the original")))
    for prompt, text in verdict.samples:
        terminal.note(f"generated: {' '.join(prompt.split())} | {' '.join(text.split())}")
    if verdict.passed:
        terminal.say(f"Done: {outcome.path}")
        return
    terminal.note(f"The gate failed: {'; '.join(verdict.reasons)}.")
    terminal.note(f"The checkpoint is kept as {outcome.path}: try more bits, or more calibration text.")


def _tokenizer(folder: ModelFolder, against: ModelFolder | None) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder.path)
    if against is not None and AutoTokenizer.from_pretrained(against.path).get_vocab() != tokenizer.get_vocab():
        raise ValueError(f"expected two models with one vocabulary, those of {folder.path} and {against.path} differ")
    return tokenizer


def _memory_words(plan: Plan) -> str:
    cost, host = plan.cost, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    on_host = f"about {size(cost.host_bytes)} of {size(host)} of the host's"
    if cost.usable_bytes is None:
        return on_host
    each = " on each GPU" if cost.gpus > 1 else " on the GPU"
    where = "host" if cost.on_host else "GPU"
    return (
        f"about {size(cost.gpu_bytes)} of {size(cost.usable_bytes)}{each}, {on_host}; activations wait on the {where}"
    )


def _patterns(names: Sequence[str]) -> str:
    """Names in short, layers with what they have in common: "model.layers.* (2): mlp.up_proj, mlp.down_proj"."""
    counts: dict[str, int] = {}
    for name in names:
        pattern = re.sub(r"\b\d+\b", "*", name, count=1)
        counts[pattern] = counts.get(pattern, 0) + 1
    groups: dict[str, list[str]] = {}
    for pattern, count in counts.items():
        layer, star, rest = pattern.partition(".*.")
        groups.setdefault(f"{layer}.* ({count}): " if star else "", []).append(rest or pattern)
    return "; ".join(layer + ", ".join(rest) for layer, rest in groups.items())


def _count(problems: Sequence[str]) -> str:
    return "sound." if not problems else "1 problem." if len(problems) == 1 else f"{len(problems)} problems."


def _blocks(runs: Sequence[tuple[int, int]]) -> str:
    """Rotation blocks: "256×3 + 64"; "none" where nothing is rotated."""
    if all(block == 1 for block, _ in runs):
        return "none"
    return " + ".join(f"{block}×{count}" if count > 1 else str(block) for block, count in runs)


def _flat(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_flat(each)}" for key, each in value.items())
    return " ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)
