"""The command `eightfold`: options, exit status, and errors in one sentence.

Exit status: 0 done, 1 bad input or a problem found, 2 usage, 3 a quantized model that failed the gate, 130 Ctrl-C.
"""

from __future__ import annotations

import re
import sys
from argparse import ArgumentParser, ArgumentTypeError, BooleanOptionalAction, Namespace
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout
from typing import TYPE_CHECKING, Any

import eightfold

if TYPE_CHECKING:
    from eightfold.console import Terminal

FAILED, INTERRUPTED = 1, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status. Usage errors raise SystemExit(2), as argparse does."""
    options = _parser().parse_args(arguments)
    # Imported now: --help and usage errors need no torch.
    from eightfold.console import Terminal

    terminal = Terminal(options.json)
    # Whatever a library prints stays out of the JSON.
    redirect = redirect_stdout(sys.stderr) if options.json else nullcontext()
    try:
        with redirect:
            status, content = _run(options, terminal)
    except KeyboardInterrupt:
        message = _interrupted(options)
        status, content = INTERRUPTED, {"error": message}
        terminal.note(f"\n{message}")
    except (ValueError, OSError, MemoryError) as error:  # CheckpointError is a ValueError
        if options.traceback:
            raise
        message = _sentence(error)
        status, content = FAILED, {"error": message}
        terminal.note(f"eightfold: {message}")
    terminal.finish({"command": options.command, "exit_status": status} | content)
    return status


def _run(options: Namespace, terminal: Terminal) -> tuple[int, dict[str, Any]]:
    import torch

    from eightfold import bench, commands
    from eightfold.console import quiet_libraries

    command = {
        "quantize": commands.run_quantize,
        "eval": commands.run_eval,
        "convert": commands.run_convert,
        "inspect": commands.run_inspect,
        "verify": commands.run_verify,
        "demo": commands.run_demo_command,
        "bench": bench.run_bench,
    }[options.command]
    try:
        with quiet_libraries() if options.command != "inspect" else nullcontext():
            return command(options, terminal)
    except torch.OutOfMemoryError as error:
        raise MemoryError(f"the GPU has too little memory for this: {error}") from error


def _sentence(error: BaseException) -> str:
    """The message of an error on one line."""
    return " ".join(str(error).split()) or type(error).__name__


def _interrupted(options: Namespace) -> str:
    if options.command != "quantize":
        return "Stopped."
    from eightfold.checkpoint import partial_path

    partial = partial_path(options.out)
    if not partial.exists():
        return "Stopped before the work began."
    return f"Stopped: finished layers are kept in {partial}; run the same command to go on."


def _parser() -> ArgumentParser:
    parser = ArgumentParser("eightfold", description="Quantize language models to 2 to 8 bits per weight.")
    parser.add_argument("--version", action="version", version=f"eightfold {eightfold.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    every = ArgumentParser(add_help=False)
    every.add_argument("--json", action="store_true", help="one JSON object on stdout, all else on stderr")
    every.add_argument("--traceback", action="store_true", help="show where an error came from")
    runs = ArgumentParser(add_help=False)
    runs.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ...; auto: the first GPU, or the CPU")
    runs.add_argument("--dtype", default="auto", help="float32, bfloat16, float16; auto: float32 on a CPU")

    _add_quantize(commands.add_parser("quantize", parents=[every, runs], help="make a quantized copy of a model"))
    _add_eval(commands.add_parser("eval", parents=[every, runs], help="perplexity, and distance from another model"))
    _add_convert(
        commands.add_parser("convert", parents=[every], help="a GLQ checkpoint to eightfold's format, or back")
    )
    inspect = commands.add_parser("inspect", parents=[every], help="sizes, layouts and losses of a checkpoint")
    inspect.add_argument("dir", metavar="DIR", help="an eightfold or GLQ checkpoint")
    verify = commands.add_parser("verify", parents=[every], help="check a checkpoint's files, weights and loading")
    verify.add_argument("dir", metavar="DIR", help="an eightfold or GLQ checkpoint")
    verify.add_argument("--against", metavar="MODEL", help="the original model: compare weights with it")
    _add_bench(commands.add_parser("bench", help="measure how fast a server runs a checkpoint"), every)
    demo = commands.add_parser("demo", parents=[every], help="quantize the bundled model at 2, 3, 4 bits and report")
    demo.add_argument("--out", default="demo-report", metavar="DIR", help="folder of the report (default: %(default)s)")
    return parser


def _add_quantize(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("model", metavar="MODEL", help="a model folder, or a model's id on the Hugging Face hub")
    add("out", metavar="OUT", help="the folder to make")
    add("--bits", type=int, choices=range(2, 9), required=True, metavar="2..8", help="nominal bits per weight")
    add(
        "--calibration",
        nargs="+",
        metavar="PATH",
        help="text files, .jsonl, folders of these (default: the bundled text)",
    )
    add("--samples", type=_count, default=128, metavar="N", help="windows of calibration text (default: %(default)s)")
    add("--seqlen", type=_count, default=2048, metavar="N", help="tokens of a window (default: %(default)s)")
    add("--seed", type=int, default=0, help="of windows and signs (default: %(default)s)")
    add("--codebook", choices=("e8p", "e8shell"), default="e8p", help="e8shell: for comparison (default: %(default)s)")
    add("--layout", help="rotation blocks: pow2-sum-C, pow2-sum, equal-C, pow2 (default: pow2-sum-256)")
    add(
        "--scale-dtype",
        choices=("float16", "float32"),
        default="float16",
        help="of the scale vectors (default: %(default)s)",
    )
    add("--include", nargs="+", action="extend", default=[], metavar="PATTERN", help="quantize these, too: lm_head")
    add("--exclude", nargs="+", action="extend", default=[], metavar="PATTERN", help="leave these linears: '*.0.mlp.*'")
    add("--tp-max", type=_count, metavar="N", help="tensor parallelism the file is good for (default: the most)")
    add("--shard-size", type=_bytes, dest="shard_bytes", metavar="SIZE", help="of a weight file at most: 4GB, 500MB")
    add("--resume", action=BooleanOptionalAction, default=True, help="go on where the same command was interrupted")
    add("--dry-run", action="store_true", help="say what it would take and give, and stop")
    add("--eval-text", metavar="PATH", help="held-out text for the gate (default: the bundled one)")
    add("--max-ratio", type=_positive, metavar="R", help="largest growth of perplexity that the gate passes")


def _add_convert(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("source", metavar="DIR", help="the checkpoint to convert: a folder, or a model's id on the Hugging Face hub")
    add("out", metavar="OUT", help="the folder to make")
    add("--to", choices=("eightfold", "glq"), default="eightfold", help="format of OUT (default: %(default)s)")
    add("--base", metavar="MODEL", help="the original model: restores the biases, which GLQ drops")
    add("--zero-biases", action="store_true", help="do without the biases that GLQ dropped: zeros in their place")
    add("--shard-size", type=_bytes, dest="shard_bytes", metavar="SIZE", help="of a weight file at most: 4GB, 500MB")
    add("--resume", action=BooleanOptionalAction, default=True, help="no: discard what another command left unfinished")


def _add_eval(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("model", metavar="MODEL", help="a model folder or hub id, quantized or not")
    add("--against", metavar="MODEL", help="compare with this model: KL divergence, top-1 agreement, ratio")
    add("--text", metavar="FILE", help="text file, .jsonl or folder of these (default: the bundled evaluation text)")
    add("--seqlen", type=_count, default=1024, metavar="N", help="tokens of a window (default: %(default)s)")
    add("--windows", type=_count, metavar="N", help="at most so many windows (default: all of the text)")


def _add_bench(parser: ArgumentParser, every: ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="bench", required=True, metavar="WHAT")
    serve = kinds.add_parser("serve", parents=[every], help="tokens per second of vLLM against bfloat16")
    add = serve.add_argument
    add("model", metavar="DIR", help="a checkpoint, or a shape: SmolLM3-3B, Llama-3.1-8B, 31B (weights are random)")
    add(
        "--bits",
        nargs="+",
        type=_rate,
        default=[],
        metavar="B[+H]",
        help="of a shape: bits of the linears, bits of the output head, which is left alone without +H",
    )
    add("--against", nargs="+", default=[], metavar="DIR", help="measure these, too")
    add(
        "--baseline",
        action=BooleanOptionalAction,
        default=True,
        help="the same architecture in bfloat16, for comparison",
    )
    add("--sequences", nargs="+", type=_count, default=[1, 8, 32, 128], metavar="N", help="requests at once")
    add("--tokens", type=_count, default=256, metavar="N", help="new tokens of each (default: %(default)s)")
    add("--prompt", type=_count, default=1024, metavar="N", help="tokens before the first (default: %(default)s)")
    add("--tp", type=_count, default=1, metavar="N", help="tensor-parallel size (default: %(default)s)")
    add("--memory", type=_positive, default=0.9, metavar="SHARE", help="of the GPU's, for vLLM (default: %(default)s)")
    add("--out", metavar="DIR", help="folder for the numbers and a picture")


def _rate(text: str) -> tuple[int, int | None]:
    match = re.fullmatch(r"([2-8])(?:\+([2-8]))?", text)
    if match is None:
        raise ArgumentTypeError(f"expected bits from 2 to 8, and + bits of the head: 4 or 2+4, got {text!r}")
    return int(match[1]), int(match[2]) if match[2] else None


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"expected a whole number from 1, got {text!r}")
    return int(text)


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not value > 0:
        raise ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return value


def _bytes(text: str) -> int:
    """ "4GB", "500 MB", "2GiB", or bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]i?)?B?", text, re.IGNORECASE)
    if match is None or float(match[1]) == 0:
        raise ArgumentTypeError(f"expected a size such as 4GB or 500MB, got {text!r}")
    prefix = (match[2] or "").upper()
    base = 1024 if prefix.endswith("I") else 1000
    return max(1, int(float(match[1]) * base ** " KMGT".index(prefix[:1] or " ")))
