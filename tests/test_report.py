from __future__ import annotations

import json
import struct
from dataclasses import replace

import pytest

from eightfold import report as module
from eightfold.evaluate import EvalResult
from eightfold.report import Original, Report, Row

ALONE = EvalResult(windows=4, tokens=400, nll=2.0, nll_se=0.1, perplexity=7.389, perplexity_se=0.7)


def row(bits: int, perplexity: float) -> Row:
    against = {"against_perplexity": 7.389, "ratio": perplexity / 7.389, "ratio_se": 0.0123}
    found = replace(ALONE, perplexity=perplexity, **against, kl=0.2, kl_se=0.01, top1=0.75, top1_se=0.02)
    return Row(f"m-{bits}bit", bits, bits + 0.125, bits * 10**6, found, [("Once", f"upon `{bits}`\n| times")], [])


@pytest.fixture
def report():
    original = Original("m", 16, 16 * 10**6, ALONE, [("Once", "upon a time")])
    return Report(original, [row(2, 9.5), row(3, 7.9), row(4, 7.45)], {"samples": 5})


def test_cells(report):
    rows = module.cells(report)
    assert rows[0] == ["m", "16", "16", "16 MB", "7.389 ± 0.700", "1", "0", "1"]
    assert rows[1][:5] == ["m-2bit", "2", "2.125", "2 MB", "9.500 ± 0.700"]
    assert rows[1][5:] == ["1.2857 ± 0.0123", "0.2000 ± 0.0100", "0.7500 ± 0.0200"]
    assert {len(cells) for cells in rows} == {len(module.COLUMNS)}


def test_write(report, tmp_path):
    module.write_report(report, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {module.PAGE, module.NUMBERS, module.PICTURE}
    content = json.loads((tmp_path / module.NUMBERS).read_text())
    assert content == json.loads(json.dumps(report.to_dict()))
    assert [each["bits"] for each in content["quantized"]] == [2, 3, 4]
    page = (tmp_path / module.PAGE).read_text()
    assert f"]({module.PICTURE})" in page
    assert "| m-3bit | 3 | 3.125 | 3 MB |" in page
    assert "- m-2bit: `upon '2' | times`" in page


def test_picture(report, tmp_path):
    path = tmp_path / "picture.png"
    module.picture(report, path)
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", content[16:24])
    assert (width, height) == (1050, 675)


def test_picture_of_one_point_without_errors(report, tmp_path):
    only = row(2, 9.5)
    one = replace(report, rows=[replace(only, evaluation=replace(only.evaluation, ratio_se=None))])
    module.picture(one, tmp_path / "one.png")
    assert (tmp_path / "one.png").exists()


def test_failures_are_on_the_page(report):
    failed = replace(report, rows=[replace(report.rows[0], reasons=["it says nothing"])])
    assert "**m-2bit failed the gate**: it says nothing." in module.markdown(failed)


def test_needs_the_distance_from_the_original(report):
    with pytest.raises(ValueError, match="against the original"):
        module.cells(replace(report, rows=[replace(report.rows[0], evaluation=ALONE)]))
