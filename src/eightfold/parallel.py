"""Parallel work whose results do not depend on the number of threads.

A sum that PyTorch splits over two threads is rounded differently from the same sum on one. So each piece of
work (the forward of one sample, a chunk of rows) runs on one thread, and the threads of the machine run
pieces.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")

MOST_READERS = 8

_outer: list[int] = []  # thread counts from before each single_threaded() that is active, outermost first


@contextmanager
def single_threaded() -> Iterator[None]:
    """Inside, every PyTorch operation of this thread, and of threads started inside, runs on one thread."""
    before = torch.get_num_threads()
    _outer.append(before)
    torch.set_num_threads(1)
    try:
        yield
    finally:
        _outer.remove(before)
        torch.set_num_threads(before)


def workers_for(device: torch.device) -> int:
    """How many pieces to run at once: as many as PyTorch had threads, on a GPU one."""
    if device.type != "cpu":
        return 1
    return _outer[0] if _outer else torch.get_num_threads()


def readers() -> int:
    """How many files to read and hash at once: as many as this process may use processors, 8 at most. PyTorch's threads
    have no say, of which torchrun leaves each process one."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(usable, MOST_READERS)


def ordered_map(fn: Callable[[Item], Result], items: Iterable[Item], workers: int | None = None) -> Iterator[Result]:
    """`map(fn, items)` on `workers` threads (default: `workers_for` the CPU), each call single-threaded.

    Results come in the order of the items; at most workers + 1 calls are under way or waiting to be fetched,
    so memory is bounded. The exception of a call is raised where its result would have come, and an exception
    in the caller (Ctrl-C, too) waits for the running calls and starts no more. `items` is consumed by the
    caller's thread.
    """
    count = workers_for(torch.device("cpu")) if workers is None else workers
    if count < 1:
        raise ValueError(f"workers: expected at least 1, came {count}")
    with single_threaded():
        if count == 1:
            yield from map(fn, items)
            return
        # PyTorch's thread count is read by each thread when it first computes; set it in ours beyond doubt.
        pool = ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,))
        pending: deque[Future[Result]] = deque()
        try:
            for item in items:
                pending.append(pool.submit(fn, item))
                if len(pending) > count:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
