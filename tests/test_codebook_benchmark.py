"""benchmarks/codebooks.py, rehearsed on the CPU."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch

from eightfold.rvq import FAMILIES

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))  # as for a script in that folder
codebooks = importlib.import_module("codebooks")
del sys.path[0]


@pytest.fixture
def kept(monkeypatch) -> list:
    found: list = []
    monkeypatch.setattr(codebooks, "append", lambda name, rows, **settings: found.append((name, rows, settings)))
    return found


def run(monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["codebooks.py", "--device", "cpu", *arguments])
    codebooks.main()


def test_a_rehearsal_measures_both_and_keeps_no_times(monkeypatch, capsys, kept):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(codebooks, "limits", lambda device: [{"case": "limit", "impl": "copy", "gb_per_s": 1.0}])
    run(monkeypatch, "--times", "--shapes", "96x192", "--pool-gib", "1e-6", "--bits", "2", "3")
    lines = [line for line in capsys.readouterr().out.splitlines() if "96 × 192" in line]
    assert len(lines) == 2 * len(codebooks.TOKENS)
    assert not kept


def test_qualities_differ_by_the_codebook_alone(monkeypatch, capsys, kept):
    seen = []

    def measure(request):
        seen.append(request)
        row = {"model": "m", "bits": request.bits, "codebook": request.settings.codebook, "stored_bits": 2.1, "kl": 0.1}
        return row | {"ratio": 1.1, "ratio_se": 0.01, "top1": 0.9, "mean_sqnr_db": 10.0, "seconds": 1.0}

    monkeypatch.setattr(codebooks, "measure_quality", measure)
    run(monkeypatch, "--no-times", "--model", "m", "--bits", "2", "4")
    assert [(r.bits, r.settings.codebook) for r in seen] == [(bits, name) for bits in (2, 4) for name in FAMILIES]
    ((name, rows, settings),) = kept
    assert (name, len(rows), settings["samples"]) == ("codebooks", 4, 128)
    assert {row["case"] for row in rows} == {"quality"}
    assert capsys.readouterr().out.count("e8shell") >= 2


def test_unequal_stored_bits_are_an_error(monkeypatch, kept):
    monkeypatch.setattr(codebooks, "measure_quality", lambda r: {"stored_bits": len(r.settings.codebook)})
    with pytest.raises(RuntimeError, match="equal stored bits"):
        run(monkeypatch, "--no-times", "--model", "m", "--bits", "2")
