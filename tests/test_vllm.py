"""Serving: eightfold's configuration and linear method on vLLM's own classes, without a GPU (vllm_cases.py)."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

HERE = Path(__file__).parent
NAMES = [
    node.name.removeprefix("case_")
    for node in ast.parse((HERE / "vllm_cases.py").read_text(encoding="utf-8")).body
    if isinstance(node, ast.FunctionDef) and node.name.startswith("case_")
]


@pytest.fixture(scope="module")
def found(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    """What became of each case: None, or its traceback."""
    (bundle,) = (shared / "gpu").glob("vllm_*_dense.tar.xz")
    work = tmp_path_factory.mktemp("vllm")
    results = work / "results.json"
    command = [sys.executable, str(HERE / "vllm_stage.py"), str(bundle), str(work), str(results)]
    paths = os.pathsep.join([str(HERE), str(HERE.parent / "src"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, timeout=600)
    assert results.exists(), done.stderr[-4000:]
    return json.loads(results.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", NAMES)
def test_vllm(found, name):
    assert name in found
    assert found[name] is None, found[name]


def test_the_entry_point():
    """vLLM finds the plugin by this name; importing it imports no vLLM."""
    project = tomllib.loads((HERE.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (target,) = project["entry-points"]["vllm.general_plugins"].values()
    module, _, function = target.partition(":")
    assert callable(getattr(import_module(module), function))
    (needed,) = project["optional-dependencies"]["vllm"]
    assert needed == "vllm>=0.25.1,<0.26"
