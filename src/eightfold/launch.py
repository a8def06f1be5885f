"""Several processes for one quantization, a GPU each: started by torchrun, or by `launch`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import distributed

PATIENCE = timedelta(days=2)  # that a process waits for others: an evaluation may be long


@contextmanager
def joined(device: str) -> Iterator[str]:
    """Inside, the processes that torchrun started are connected, if it did; gives the device of this one.

    `device`: as the user says; "auto" and "cuda" become one GPU a process. Raises ValueError for others with several
    processes, but for "cpu", and where a process finds no GPU of its own.
    """
    if not distributed.is_torchelastic_launched():
        yield device
        return
    if device not in ("auto", "cuda", "cpu"):
        raise ValueError(f"expected --device cuda or cpu with several processes, got {device!r}")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    backend = "gloo"
    if device == "cuda":
        local, count = torch.distributed.distributed_c10d.get_node_local_rank(), torch.cuda.device_count()
        if local >= count:
            raise ValueError(f"expected a GPU for each process of this machine, it has {count}: start fewer")
        device, backend = f"cuda:{local}", "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(local)
    # Knowing its GPU a process connects to the others now and once; else each way to talk would, at its first use.
    place = None if device == "cpu" else torch.device(device)
    distributed.init_process_group(backend, timeout=PATIENCE, device_id=place)
    yield device  # where this raises, the process ends, and so do the others: no tidying up that waits for them
    distributed.destroy_process_group()


def launch(processes: int, work: Callable[[Any], Any], argument: Any) -> Any:
    """Run `work(argument)` in so many processes on this machine, as torchrun would: what the first returns.

    Raises ValueError, saying which process failed first and how; why, that process says on standard error.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(1, 1, processes, rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=0)
    try:
        return elastic_launch(config, work)(argument)[0]
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        raise ValueError(
            f"process {rank} of {processes} ended with exit status {failure.exitcode}, so all were stopped; finished "
            f"layers are kept: run the same command to go on"
        ) from None
