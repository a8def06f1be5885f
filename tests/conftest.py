from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

# Before anything imports these libraries: they read it once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "Agg"

import pytest
import torch
from models import KINDS, write_model

from eightfold import bundled
from eightfold.cuda.linear import supported

ROOT = Path(__file__).parents[1]

# Two threads, or the processor's share of each of the processes that share out the tests.
PROCESSES = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
torch.set_num_threads(max(1, min(2, (os.cpu_count() or 1) // PROCESSES)))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="no CUDA device")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of material that is too big for the repository, beside it or inside it."""
    for folder in (ROOT.parent / "shared", ROOT / "shared"):
        if (folder / "reference-lm").is_dir():
            return folder
    if os.environ.get("CI") == "true":
        pytest.fail("expected ../shared beside the repository: CI may not skip the tests that need it")
    pytest.skip("no ../shared folder")


@pytest.fixture(scope="session")
def tiny_lm() -> Path:
    """Folder of the bundled trained model."""
    return bundled.tiny_lm()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """model_folder(kind): folder of the tiny random model of that kind. Written once: not to be changed."""
    folders: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in folders:
            folders[kind] = write_model(kind, tmp_path_factory.mktemp(kind))
        return folders[kind]

    return folder


@pytest.fixture(params=KINDS)
def any_model(request: pytest.FixtureRequest, model_folder: Callable[[str], Path]) -> Path:
    """Folder of each kind of tiny random model in turn. Not to be changed."""
    return model_folder(request.param)


@pytest.fixture
def gpu() -> torch.device:
    """The current GPU; skips the test where that is older than the kernels."""
    device = torch.device("cuda", torch.cuda.current_device())
    if not supported(device):
        pytest.skip("the device is older than the kernels")
    return device
