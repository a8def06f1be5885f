from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

from eightfold.parallel import MOST_READERS, ordered_map, readers, single_threaded, workers_for


def test_results_come_in_order():
    def slow_for_even(x: int) -> int:
        time.sleep(0.01 * (x % 2 == 0))
        return x * x

    assert list(ordered_map(slow_for_even, range(20), workers=3)) == [x * x for x in range(20)]


def test_single_threaded_restores_and_nests():
    before = torch.get_num_threads()
    with single_threaded():
        assert torch.get_num_threads() == 1
        assert workers_for(torch.device("cpu")) == before
        assert workers_for(torch.device("cuda")) == 1
        with single_threaded():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before
    assert workers_for(torch.device("cpu")) == before


@pytest.mark.parametrize("workers", [1, 2])
def test_every_call_has_one_thread(workers):
    # get_num_threads asks OpenMP for the limit of the calling thread.
    def threads(_: int) -> int:
        torch.ones(300, 300) @ torch.ones(300, 300)
        return torch.get_num_threads()

    before = torch.get_num_threads()
    assert set(ordered_map(threads, range(8), workers)) == {1}
    assert torch.get_num_threads() == before


def test_few_items_are_in_flight():
    taken: list[int] = []

    def items():
        for x in range(100):
            taken.append(x)
            yield x

    results = ordered_map(lambda x: x, items(), workers=2)
    assert next(results) == 0
    assert len(taken) <= 3
    results.close()
    assert len(taken) <= 3


def test_exception_comes_in_its_place_and_stops_the_rest():
    started: list[int] = []

    def fail_at_two(x: int) -> int:
        started.append(x)
        if x == 2:
            raise ZeroDivisionError("two")
        return x

    seen: list[int] = []
    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError, match="two"):
        seen.extend(ordered_map(fail_at_two, range(1000), workers=2))
    assert seen == [0, 1]
    assert len(started) < 10
    assert torch.get_num_threads() == before


def test_no_workers_is_refused():
    with pytest.raises(ValueError, match="at least 1"):
        next(ordered_map(str, [1], workers=0))


def test_runs_on_several_threads():
    barrier = threading.Barrier(2, timeout=20)
    assert len(set(ordered_map(lambda _: (barrier.wait(), threading.get_ident())[1], range(2), 2))) == 2


def test_readers_are_as_many_as_processors_not_as_pytorchs_threads(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(3)))
    with single_threaded():
        assert readers() == 3
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(100)))
    assert readers() == MOST_READERS
    monkeypatch.delattr("os.sched_getaffinity")
    monkeypatch.setattr("os.cpu_count", lambda: 5)
    assert readers() == 5


def test_interrupt_ends_it():
    code = (
        "import signal, time\n"
        "from eightfold.parallel import ordered_map\n"
        # Shells start background jobs with SIGINT ignored, and the tests may be one.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "print('ready', flush=True)\n"
        "list(ordered_map(lambda x: time.sleep(0.1), range(100_000), workers=2))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert b"KeyboardInterrupt" in errors
    assert process.returncode != 0
