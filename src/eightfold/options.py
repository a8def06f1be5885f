"""The options of every command."""

from __future__ import annotations

import re
from argparse import ArgumentParser, ArgumentTypeError, BooleanOptionalAction

import eightfold


def make_parser(kind: type[ArgumentParser] = ArgumentParser) -> ArgumentParser:
    """The parser of `eightfold`; its subparsers are of the same `kind`."""
    parser = kind("eightfold", description="Quantize language models to 2 to 8 bits per weight.")
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
    costs = commands.add_parser("estimate", parents=[every], help="memory and time, from a model's config alone")
    costs.add_argument("config", metavar="DIR", help="a folder with a config.json; it needs no weights")
    costs.add_argument("--bits", type=_positive, default=4.0, metavar="B", help="nominal bits (default: %(default)g)")
    costs.add_argument("--samples", type=_count, default=128, metavar="N", help="windows (default: %(default)s)")
    costs.add_argument("--seqlen", type=_count, default=2048, metavar="N", help="tokens of each (default: %(default)s)")
    inspect = commands.add_parser("inspect", parents=[every], help="sizes, layouts and losses of a checkpoint")
    inspect.add_argument("dir", metavar="DIR", help="an eightfold or GLQ checkpoint")
    verify = commands.add_parser("verify", parents=[every], help="check a checkpoint's files, weights and loading")
    verify.add_argument("dir", metavar="DIR", help="an eightfold or GLQ checkpoint")
    verify.add_argument("--against", metavar="MODEL", help="the original model: compare weights with it")
    demo = commands.add_parser("demo", parents=[every], help="quantize the bundled model at 2, 3, 4 bits and report")
    demo.add_argument("--out", default="demo-report", metavar="DIR", help="folder of the report (default: %(default)s)")
    _add_batch(commands.add_parser("batch", parents=[every], help="quantize the models of a list, and upload them"))
    card = commands.add_parser("card", parents=[every], help="write the model card of a checkpoint")
    _add_card(card)
    card.add_argument("--repo", metavar="REPO", help="the repository that the card will lie in, for its examples")
    _add_push(commands.add_parser("push", parents=[every, runs], help="upload a checkpoint to the hub, and try it"))
    return parser


def _add_quantize(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("model", metavar="MODEL", help="a model folder, or a model's id on the Hugging Face hub")
    add("out", metavar="OUT", help="the folder to make")
    rate = parser.add_mutually_exclusive_group(required=True)
    rate.add_argument("--bits", type=_bits, metavar="2..8", help="nominal bits per weight; 2.5: the mean, shared out")
    rate.add_argument("--stored-bits", type=_positive, metavar="B", help="stored bits per weight, shared out: 2.25")
    rate.add_argument("--size", type=_bytes, metavar="SIZE", help="of all weight files, bits shared out: 3.4GB")
    rate.add_argument(
        "--recipe", metavar="FILE", help="the bits of every linear, as recipe.toml of a checkpoint has it"
    )
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
    add("--gpus", type=_count, metavar="G", help="GPUs of this machine that share the work (default: one)")
    add("--gpu-memory", type=_bytes, metavar="SIZE", help="of each GPU to use at most: 24GB (default: all)")
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


def _add_batch(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("jobs", metavar="JOBS.toml", help="the list (docs/batch.md)")
    add("--only", nargs="+", metavar="NAME", help="these jobs alone: names or patterns")
    add("--resume", action=BooleanOptionalAction, default=True, help="go on where jobs were interrupted")
    add("--dry-run", action="store_true", help="say what each would take and give, and stop")


def _add_card(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("dir", metavar="DIR", help="an eightfold checkpoint")
    add("--base", metavar="MODEL", help="the original model, whose card says its licence (default: what DIR names)")
    add("--license", metavar="ID", help="the licence, where the original's card does not say it: apache-2.0")


def _add_push(parser: ArgumentParser) -> None:
    _add_card(parser)
    parser.add_argument("to", metavar="REPO", help="the repository on the hub: USER/NAME")
    parser.add_argument("--public", action="store_true", help="make it public once it has passed the smoke test")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"expected a whole number from 1, got {text!r}")
    return int(text)


def _bits(text: str) -> float:
    value = _positive(text)
    if not 2 <= value <= 8:
        raise ArgumentTypeError(f"expected bits from 2 to 8, got {text}")
    return int(value) if value == int(value) else value


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
