"""The package as users get it: light to import, complete as a wheel, one version."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import eightfold
from eightfold import bundled

ROOT = Path(__file__).parents[1]
DATA = Path(eightfold.__file__).parent / "data"


def python(code: str) -> str:
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return run.stdout.strip()


def test_import_is_light():
    heavy = "{'torch', 'transformers', 'accelerate', 'matplotlib', 'vllm'}"
    assert python(f"import sys, eightfold; print(sorted({heavy} & set(sys.modules)))") == "[]"


@pytest.mark.parametrize("order", [("eightfold", "transformers"), ("transformers", "eightfold")])
def test_registers_with_transformers(order):
    code = f"import {order[0]}, {order[1]}, transformers.quantizers.auto as auto; "
    assert python(code + "print('eightfold' in auto.AUTO_QUANTIZER_MAPPING)") == "True"


def test_version_is_the_changelogs():
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall(r"^## \[(.+?)\]", changelog, flags=re.MULTILINE)[0] == eightfold.__version__


def test_data_is_small():
    assert sum(path.stat().st_size for path in DATA.rglob("*") if path.is_file()) < 9_000_000


def test_bundled_files():
    assert {path.name for path in bundled.tiny_lm().iterdir()} == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    calibration, evaluation = (
        path().read_text(encoding="utf-8") for path in (bundled.calibration_text, bundled.evaluation_text)
    )
    paragraphs = set(calibration.split("\n\n"))
    shared = [text for text in evaluation.split("\n\n") if len(text) > 200 and text in paragraphs]
    assert not shared, "a paragraph of the evaluation text is in the calibration text"


def test_bundled_model_loads():
    model = AutoModelForCausalLM.from_pretrained(bundled.tiny_lm())
    tokenizer = AutoTokenizer.from_pretrained(bundled.tiny_lm())
    assert model.num_parameters() == pytest.approx(3.4e6, rel=0.02)
    assert model.config.vocab_size == len(tokenizer)


def test_wheel(tmp_path):
    offline = ["--no-deps", "--no-build-isolation", "--no-index"]
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        *offline,
        "--wheel-dir",
        str(tmp_path),
        str(ROOT),
    ]
    subprocess.run(command, check=True)
    (wheel,) = tmp_path.iterdir()
    assert wheel.name == f"eightfold-{eightfold.__version__}-py3-none-any.whl"
    names = set(zipfile.ZipFile(wheel).namelist())
    source = ROOT / "src"
    expected = {path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()}
    expected = {name for name in expected if "__pycache__" not in name}
    info = f"eightfold-{eightfold.__version__}.dist-info/"
    assert {name for name in names if not name.startswith(info)} == expected
    assert info + "entry_points.txt" in names
    assert info + "licenses/LICENSE" in names
