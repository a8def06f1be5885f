"""vLLM's own classes without vLLM: the Python of the packed vLLM in the shared folder, in a process without a GPU.

    python vllm_stage.py BUNDLE WORK RESULTS

runs the cases of vllm_cases.py; RESULTS becomes a JSON object, name of a case → null or its traceback. vLLM's packages
are unpacked without their compiled parts; what else it imports and is not installed becomes stand-ins, which nothing
calls. It calls itself vLLM for CPUs, so that it looks for no GPU.
"""

from __future__ import annotations

import json
import os
import sys
import tarfile
import traceback
import types
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from typing import Any

UNPACKED = ("vllm/", "compressed_tensors", "loguru", "cachetools", "vllm-")
# Imported by modules that are needed, called by none of them here.
STAND_INS = (
    "aiohttp",
    "cbor2",
    "cloudpickle",
    "cpuinfo",
    "cv2",
    "einops",
    "fastapi",
    "httpx2",
    "llguidance",
    "msgspec",
    "openai",
    "openai_harmony",
    "partial_json_parser",
    "prometheus_client",
    "pybase64",
    "requests",
    "scipy",
    "sentencepiece",
    "sniffio",
    "starlette",
    "tiktoken",
    "urllib3",
    "uvloop",
    "xgrammar",
    "zmq",
)
ENVIRONMENT = {"VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1", "VLLM_PLUGINS": "", "VLLM_NO_USAGE_STATS": "1"}


def unpack(bundle: Path, folder: Path) -> Path:
    """Python files of the bundle, laid out for sys.path."""
    with tarfile.open(bundle) as archive:
        for member in archive:
            name = member.name.removeprefix("./")
            if name.startswith(UNPACKED) and not name.endswith((".so", ".json")):
                archive.extract(member, folder, filter="data")
    (about,) = folder.glob("vllm-*.dist-info")
    metadata = (about / "METADATA").read_text(encoding="utf-8")
    version = about.name.removeprefix("vllm-").removesuffix(".dist-info")
    (about / "METADATA").write_text(metadata.replace(f"Version: {version}", f"Version: {version}+cpu", 1))
    about.rename(folder / f"vllm-{version}+cpu.dist-info")
    return folder


class _Anything(type):
    """A class whose attributes are such classes, and which may be subclassed, called, subscripted, used to decorate."""

    def __new__(cls, name: str, bases: tuple[type, ...], space: dict[str, Any], **_: Any) -> Any:
        return super().__new__(cls, name, bases, space)

    def __init__(cls, name: str, bases: tuple[type, ...], space: dict[str, Any], **_: Any) -> None:
        super().__init__(name, bases, space)

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _made(cls.__module__, name)

    def __getitem__(cls, key: Any) -> Any:
        return cls

    def __or__(cls, other: Any) -> Any:
        return cls

    __ror__ = __or__


def _made(module: str, name: str) -> Any:
    def schema(cls: Any, source: Any, handler: Any) -> Any:
        from pydantic_core import core_schema

        return core_schema.any_schema()

    def new(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and callable(args[0]) and not kwargs:
            return args[0]  # as a decorator
        return object.__new__(cls)

    space = {"__module__": module, "__new__": new, "__init__": lambda self, *a, **k: None}
    space |= {
        "__call__": lambda self, *a, **k: a[0] if a else None,
        "__getattr__": lambda self, key: _made(module, key),
    }
    return _Anything(name, (), space | {"__get_pydantic_core_schema__": classmethod(schema)})


class _Module(types.ModuleType):
    __version__ = "0"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)
        return _made(self.__name__, name)


class _StandIns(MetaPathFinder, Loader):
    def __init__(self, roots: Sequence[str]) -> None:
        self._roots = set(roots)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.split(".")[0] in self._roots else None

    def create_module(self, spec: ModuleSpec) -> types.ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def install(folder: Path) -> None:
    """Make `import vllm` find what `unpack` laid out."""
    sys.path.insert(0, str(folder))
    sys.meta_path.insert(0, _StandIns([root for root in STAND_INS if find_spec(root) is None]))


def main() -> None:
    bundle, work, results = map(Path, sys.argv[1:4])
    os.environ |= ENVIRONMENT | {"VLLM_CACHE_ROOT": str(work)}
    install(unpack(bundle, work / "vllm"))
    import torch
    from vllm_cases import CASES, prepare

    prepare()
    found: dict[str, str | None] = {}
    for name, case in CASES.items():
        torch.manual_seed(0)
        torch.set_default_dtype(torch.float32)  # vLLM leaves its own where it fails
        try:
            case()
            found[name] = None
        except BaseException:  # noqa: BLE001 (what pytest raises for a missing exception is no Exception)
            found[name] = traceback.format_exc()
        results.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
