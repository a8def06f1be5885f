"""The command `eightfold`: options, exit status, and errors in one sentence.

Exit status: 0 done, 1 bad input or a problem found, 2 usage, 3 a quantized model that failed the gate, 130 Ctrl-C.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout
from typing import TYPE_CHECKING, Any

from eightfold.options import make_parser

if TYPE_CHECKING:
    from eightfold.console import Terminal

FAILED, INTERRUPTED = 1, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status. Usage errors raise SystemExit(2), as argparse does."""
    options = make_parser().parse_args(arguments)
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
        terminal.fail(f"eightfold: {message}")
    terminal.finish({"command": options.command, "exit_status": status} | content)
    return status


def _run(options: Namespace, terminal: Terminal) -> tuple[int, dict[str, Any]]:
    if options.command == "quantize" and (options.gpus or 1) > 1 and not options.dry_run:
        from eightfold.launch import launch

        return launch(options.gpus, _run_one, options)
    return _run_here(options, terminal)


def _run_one(options: Namespace) -> tuple[int, dict[str, Any]]:
    """One of several processes; errors end it."""
    from eightfold.console import Terminal

    terminal = Terminal(options.json)
    try:
        return _run_here(options, terminal)
    except (ValueError, OSError, MemoryError) as error:
        if options.traceback:
            raise
        terminal.fail(f"eightfold: {_sentence(error)}")
        sys.exit(FAILED)


def _run_here(options: Namespace, terminal: Terminal) -> tuple[int, dict[str, Any]]:
    import torch

    from eightfold import bench, commands, publishing
    from eightfold.console import quiet_libraries

    command = {
        "quantize": commands.run_quantize,
        "eval": commands.run_eval,
        "convert": commands.run_convert,
        "estimate": commands.run_estimate,
        "inspect": commands.run_inspect,
        "verify": commands.run_verify,
        "demo": commands.run_demo_command,
        "batch": publishing.run_batch,
        "card": publishing.run_card,
        "push": publishing.run_push,
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
    if options.command == "batch":
        return "Stopped: the ledger says what is done; run the same command to go on."
    if options.command != "quantize":
        return "Stopped."
    from eightfold.workspace import partial_path

    partial = partial_path(options.out)
    if not partial.exists():
        return "Stopped before the work began."
    return f"Stopped: finished layers are kept in {partial}; run the same command to go on."
