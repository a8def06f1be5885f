from __future__ import annotations

import importlib
import json
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))  # as for a script in that folder
kernels, peers, results = (importlib.import_module(name) for name in ("kernels", "peers", "results"))
del sys.path[0]

COPY = 4000.0  # GB/s


def linear(impl, N, K, bits, tokens, us, dtype=None):
    code_bytes = N * K * bits // 8
    speed = {"microseconds": us, "code_bytes": code_bytes, "share_of_copy": code_bytes / us / 1e3 / COPY}
    dtype = dtype or peers.DTYPE[impl]
    return {"case": "linear", "impl": impl, "N": N, "K": K, "bits": bits, "dtype": dtype, "tokens": tokens, **speed}


@pytest.fixture
def rows():
    copy = {"case": "limit", "impl": "copy", "gb_per_s": COPY}
    node = {"case": "limit", "impl": "empty node", "microseconds": 0.5}
    layers = [
        {"case": "layer", "impl": impl, "model": "M", "bits": bits, "microseconds": us, "share_of_copy": share}
        for impl, bits, us, share in (("eightfold", 2, 10.0, 0.5), ("eightfold", 4, 20.0, 0.8), ("cublas", 16, 60.0, 1))
    ]
    return [
        copy,
        node,
        linear("eightfold", 28672, 8192, 2, 1, 20.0),
        linear("eightfold", 28672, 8192, 3, 1, 40.0),
        linear("eightfold", 28672, 8192, 4, 1, 40.0),
        linear("eightfold", 28672, 8192, 4, 1, 1.0, "bfloat16"),  # not the table's
        linear("eightfold", 28672, 8192, 4, 8, 44.0),
        linear("cublas", 28672, 8192, 16, 1, 120.0),
        linear("eightfold", 4096, 4096, 2, 1, 4.0),
        linear("glq", 28672, 8192, 2, 1, 200.0),
        linear("glq", 28672, 8192, 4, 8, 4.4),
        linear("glq", 28672, 8192, 3, 8, 400.0),  # with nothing of ours beside it
        *layers,
        {"case": "encode", "impl": "eightfold", "bits": 2, "microseconds": 80000.0},
        {"case": "missing", "impl": "exllamav3", "reason": "No module named 'marisa_trie'"},
    ]


def find(rows, case, measure):
    return next(line for line in kernels.lines(rows) if line.case.startswith(case) and line.measure.startswith(measure))


def test_shares_and_verdicts(rows):
    line = find(rows, "28672 × 8192, 1 token", "share")
    assert line.found == pytest.approx((58720256 / 8e7, 88080384 / 1.6e8, 117440512 / 1.6e8))
    assert line.passed() == [True, False, True]
    assert line.cells()[2:] == ("≥ 66 / 64 / 72 %", "85 %", "73.4 ✓ / 55.1 ✗ / 73.4 ✓ %")


def test_at_most(rows):
    line = find(rows, "4096 × 4096, 1 token, 2 bits", "against empty")
    assert line.found == pytest.approx((4.0 / (0.5 + 4194304 / COPY / 1e3),))
    assert line.passed() == [True]
    assert find(rows, "28672 × 8192, 1 token, 3 bits", "against the mean").passed() == [False]
    eight = find(rows, "28672 × 8192, 8 tokens", "against 1 token")
    assert eight.found == (None, None, pytest.approx(1.1))
    assert eight.passed() == [None, None, True]


def test_against_cublas(rows):
    line = find(rows, "28672 × 8192, 1 token, 4 / 2 bits", "against cuBLAS")
    assert line.found == pytest.approx((3.0, 6.0))
    assert line.passed() == [True, True]


def test_peers(rows):
    least = find(rows, "glq 0.6.6", "the least of 2")
    assert least.found == pytest.approx((0.1,))
    assert least.passed() == [False]
    assert find(rows, "glq 0.6.6", "geometric mean of 2").found == pytest.approx((1.0,))
    assert find(rows, "exllamav3 1.6.5", "the least of 0").passed() == [None]
    assert "exllamav3 is not installed here (No module named 'marisa_trie')" in kernels.caption(rows)


def test_layers_and_encode(rows):
    assert find(rows, "M, all linears", "against bytes").found == pytest.approx((2.0, 1.25))
    assert find(rows, "M, all linears", "against bytes").passed() == [None, None]
    assert find(rows, "M, all linears", "against cuBLAS").found == pytest.approx((6.0, 3.0))
    assert find(rows, "encode", "time").cells()[2:] == ("≤ 0.05 s", "", "0.08 ✗ s")


def test_nothing_measured():
    assert not any(x is not None for line in kernels.lines([]) for x in line.found)
    absent = (f"{peer} was not measured (--peer {peer})" for peer in ("glq", "exllamav3"))
    assert kernels.caption([]) == "; ".join(["0 of 0 numbers as they must be", *absent])
    for line in kernels.lines([]):
        assert len(line.cells()) == 5


def test_every_number_of_the_table_is_in_the_plan():
    """Rows made up for the whole plan fill every cell."""
    args = kernels.options().parse_args(["--peer", "glq", "--peer", "exllamav3"])
    rows = [
        {"case": "limit", "impl": "copy", "gb_per_s": COPY},
        {"case": "limit", "impl": "empty node", "microseconds": 1},
    ]
    for job in kernels.plan(args):
        rows += [linear(job.impl, job.N, job.K, job.bits, tokens, 9.0, job.dtype) for tokens in job.tokens]
    empty = [line for line in kernels.lines(rows) if None in line.found]
    assert [line.case for line in empty] == ["encode, 14336 × 4096, 2 bits"]
    assert find(rows, "exllamav3 1.6.5, 1, 8, 32", "the least of 36")
    assert find(rows, "glq, 2048", "the least of 12")


def test_plan_in_parts():
    parse = kernels.options().parse_args
    quick = kernels.plan(parse(["--quick"]))
    assert {job.tokens for job in quick} == {(1, 8)}
    assert {job.bits for job in quick} == {2, 3, 4, 16}
    exact = kernels.plan(parse(["--shapes", "512x1024", "--bits", "5", "--tokens", "3", "--peer", "glq"]))
    assert exact == [
        ("eightfold", 512, 1024, 5, "float16", (3,)),
        ("cublas", 512, 1024, 16, "bfloat16", (3,)),
    ]


@pytest.mark.parametrize("model", peers.MODELS)
def test_fused_linears_have_the_same_weights(model):
    whole, parts = (peers.linears(model, fused) for fused in (True, False))
    assert sum(N * K for N, K in whole) == sum(N * K for N, K in parts)
    assert (len(whole), len(parts)) == (4, 7)


def test_results_are_kept_twice(rows, tmp_path, monkeypatch):
    monkeypatch.setattr(results, "FOLDER", tmp_path / "results")
    args = kernels.options().parse_args(["--out", str(tmp_path / "out.jsonl")])
    for _ in range(2):
        kernels.keep(rows, args)
    kept = (tmp_path / "results" / "kernels.jsonl").read_text()
    assert kept == (tmp_path / "out.jsonl").read_text()
    assert json.loads(kept.splitlines()[-1])["rows"] == rows


def test_picture(rows, tmp_path):
    kernels.draw(rows, tmp_path / "docs" / "kernels.png")
    assert (tmp_path / "docs" / "kernels.png").read_bytes()[:4] == b"\x89PNG"


def test_rehearsal(tmp_path, monkeypatch, capsys):
    """All of it on the CPU, where one runs: nothing is kept but the picture."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(results, "FOLDER", tmp_path / "results")
    picture = tmp_path / "kernels.png"
    small = ["--device", "cpu", "--pool-gib", "1e-6", "--shapes", "64x128", "--bits", "2", "3", "--tokens", "1", "9"]
    monkeypatch.setattr(sys, "argv", ["kernels.py", *small, "--picture", str(picture)])
    kernels.main()
    assert "linear eightfold 64 128 3 float16 9" in capsys.readouterr().out
    assert picture.exists()
    assert not (tmp_path / "results").exists()


def test_time_of_a_launch(monkeypatch):
    """The CUDA branch with a stand-in for torch.cuda: a launch takes 2 ms, so 60 of them are too many to replay."""
    log: list[str] = []

    class Graph:
        def replay(self):
            log.append("replay")
            time.sleep(0.02)

        def reset(self):
            log.append("reset")

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.launches = log.count("launch") + 50 * log.count("replay")

        def synchronize(self): ...

        def elapsed_time(self, end):
            return 2.0 * (end.launches - self.launches)

    @contextmanager
    def capture(graph, stream):
        before = log.count("launch")
        yield
        assert log.count("launch") - before == 50

    stream = SimpleNamespace(synchronize=lambda: None)
    fakes = {"is_available": lambda: True, "synchronize": lambda: None, "Event": Event, "CUDAGraph": Graph}
    for name, fake in {**fakes, "graph": capture, "stream": lambda _: capture_nothing()}.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(peers, "_stream", lambda: stream)
    seconds = peers.launch_seconds([lambda: log.append("launch")] * 60, shorten=True)
    assert seconds == pytest.approx(0.002)
    assert log[-1] == "reset"


@contextmanager
def capture_nothing():
    yield
