"""Kernel sources to cubins: NVRTC, which needs neither a GPU nor headers, and a cache of its results on disk.

A cache file is the SHA-256 of a cubin, 32 bytes, and the cubin. Its name holds the hash of all that the cubin
depends on, so nothing in the folder is ever out of date; a damaged file is made again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import import_module
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

ARCHITECTURES = (80, 86, 89, 90, 100, 103, 120)  # that the tests compile every kernel for
KERNELS: Traversable = files("eightfold") / "cuda" / "kernels"

_LOG = logging.getLogger("eightfold")
_INCLUDE = re.compile(r'\s*#\s*include\s+"([^"]+)"')
_ONCE = re.compile(r"\s*#\s*pragma\s+once")
_HASH_BYTES = 32


class KernelError(RuntimeError):
    """A kernel cannot be compiled, loaded or launched."""


def read_source(file: str) -> str:
    """The text of `kernels/<file>` with every line `#include "other.cuh"` replaced by that file, once each.

    Raises KernelError for a file that is not there.
    """
    return "".join(_expand(file, set()))


def _expand(file: str, seen: set[str]) -> list[str]:
    seen.add(file)
    path = KERNELS / file
    if not path.is_file():
        raise KernelError(f"expected the kernel source {file} in {KERNELS}, found none: install eightfold again")
    lines = [f'#line 1 "{file}"\n']  # NVRTC's messages and profilers then name our files
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if include := _INCLUDE.match(line):
            if include[1] not in seen:
                lines += [*_expand(include[1], seen), f'#line {number + 1} "{file}"\n']
            else:
                lines.append("\n")
        else:
            lines.append("\n" if _ONCE.match(line) else line + "\n")
    return lines


def target_arch(device_arch: int, supported: Sequence[int] | None = None) -> int:
    """The architecture to compile for, of those `supported` (NVRTC's): the device's, else the newest that it runs.

    A cubin runs on devices of its own major version and no lower minor one. Raises KernelError if there is none.
    """
    if device_arch < ARCHITECTURES[0]:
        raise KernelError(
            f"the kernels need compute capability 8.0 or newer, the device has {_capability(device_arch)}: "
            "use a newer device, or the CPU"
        )
    known = _supported() if supported is None else supported
    fitting = [arch for arch in known if arch // 10 == device_arch // 10 and arch <= device_arch]
    if not fitting:
        raise KernelError(
            f"NVRTC compiles for {', '.join(map(_capability, known))}, the device has compute capability "
            f"{_capability(device_arch)}: install a release of nvidia-cuda-nvrtc that knows it"
        )
    return max(fitting)


def _capability(arch: int) -> str:
    return f"{arch // 10}.{arch % 10}"


def compile_source(source: str, name: str, arch: int, defines: Mapping[str, int | str]) -> bytes:
    """A cubin for sm_<arch> from a source without includes; `name` stands for it in messages.

    Raises KernelError with NVRTC's log, or if NVRTC is not there.
    """
    return compile_with_remarks(source, name, arch, defines)[0]


def compile_with_remarks(
    source: str, name: str, arch: int, defines: Mapping[str, int | str], *more: str
) -> tuple[bytes, str]:
    """A cubin, and what the compiler has to say of it: of mma that it serializes, say, or with `--ptxas-options=-v`
    among `more` options of registers and spills. Raises KernelError as `compile_source` does."""
    nvrtc = _nvrtc()
    options = [*_options(arch, defines), *more]
    program = _checked(nvrtc, "nvrtcCreateProgram", source.encode(), name.encode(), 0, [], [])
    try:
        (result,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
        log = _filled(nvrtc, "nvrtcGetProgramLog", program, _checked(nvrtc, "nvrtcGetProgramLogSize", program))
        text = log.rstrip(b"\0").decode(errors="replace")
        if result:
            raise KernelError(f"NVRTC cannot compile {name} for sm_{arch} ({_reason(nvrtc, result)}); its log:\n{text}")
        return _filled(nvrtc, "nvrtcGetCUBIN", program, _checked(nvrtc, "nvrtcGetCUBINSize", program)), text
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def cubin(file: str, arch: int, defines: Mapping[str, int | str], source: str | None = None) -> bytes:
    """`compile_source` of `kernels/<file>`, or of `source` under that name, through the cache on disk.

    Raises KernelError. A folder that cannot be read or written is none: then every process compiles for itself.
    """
    text = read_source(file) if source is None else source
    parts = [text, file, arch, _options(arch, defines), nvrtc_version()]
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    path = cache_dir() / f"{Path(file).stem}-sm{arch}-{key[:40]}.cubin"
    found = _read(path)
    if found is None:
        # A warning is what Python shows on standard error where nobody has set up logging.
        _LOG.warning("eightfold: compiling %s for sm_%d, once", file, arch)
        found = compile_source(text, file, arch, defines)
        _write(path, found)
    return found


def cache_dir() -> Path:
    """The folder of compiled kernels: EIGHTFOLD_CACHE, else `eightfold` in the user's cache. It may not exist yet.

    Raises KernelError if neither that variable nor a home folder is there.
    """
    if named := os.environ.get("EIGHTFOLD_CACHE"):
        return Path(named).absolute()
    base = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    if not base.is_absolute():
        raise KernelError(f"expected a folder for compiled kernels, found only {base}: set EIGHTFOLD_CACHE to one")
    return base / "eightfold"


@cache
def nvrtc_version() -> tuple[int, int, str]:
    """Major, minor, and name and size of the library, which differ between its builds. Raises KernelError."""
    major, minor = _checked(_nvrtc(), "nvrtcVersion")
    from cuda.pathfinder import load_nvidia_dynamic_lib  # comes with cuda-bindings, whose absence _nvrtc explains

    path = load_nvidia_dynamic_lib("nvrtc").abs_path
    return major, minor, f"{Path(path).name} {os.path.getsize(path)}" if path else ""


def _options(arch: int, defines: Mapping[str, int | str]) -> list[str]:
    # 9.0 runs no other cubins than its own anyway; with the letter they may hold what only it has, warpgroup mma.
    target = "sm_90a" if arch == 90 else f"sm_{arch}"
    fixed = ["--std=c++17", f"--gpu-architecture={target}", "-default-device", "-lineinfo"]
    return fixed + [f"-D{name}={value}" for name, value in sorted(defines.items())]


@cache
def _nvrtc() -> Any:
    """The module cuda.bindings.nvrtc, with its library. Raises KernelError if either is missing."""
    advice = "run `pip install cuda-bindings nvidia-cuda-nvrtc`"
    try:
        nvrtc = import_module("cuda.bindings.nvrtc")  # by name: the wheels hold no types
    except ImportError as error:
        raise KernelError(f"kernels are compiled through cuda-bindings, which cannot be imported: {advice}") from error
    try:
        nvrtc.nvrtcVersion()
    except (
        RuntimeError
    ) as error:  # of the first call into the library: cuda.pathfinder's DynamicLibNotFoundError is one
        raise KernelError(f"kernels are compiled by NVRTC, whose library cannot be found: {advice}") from error
    return nvrtc


def _supported() -> list[int]:
    return _checked(_nvrtc(), "nvrtcGetSupportedArchs")


def _reason(nvrtc: Any, result: Any) -> str:
    return nvrtc.nvrtcGetErrorString(result)[1].decode()


def _checked(nvrtc: Any, call: str, *arguments: Any) -> Any:
    """What one call returns after its status: one value, or a tuple of none or several. Raises KernelError."""
    result, *values = getattr(nvrtc, call)(*arguments)
    if result:
        raise KernelError(f"{call} failed: {_reason(nvrtc, result)}")
    return values[0] if len(values) == 1 else tuple(values)


def _filled(nvrtc: Any, call: str, program: Any, size: int) -> bytes:
    """What a call writes into a buffer that it is given."""
    buffer = bytes(size)
    _checked(nvrtc, call, program, buffer)
    return buffer


def _read(path: Path) -> bytes | None:
    """The cubin in a cache file; None if it is not there, not readable or damaged."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    stored, body = content[:_HASH_BYTES], content[_HASH_BYTES:]
    return body if hashlib.sha256(body).digest() == stored else None


def _write(path: Path, body: bytes) -> None:
    """A cache file, whole or not there, whoever else writes it; a warning if it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.stem, suffix=".tmp", delete=False) as file:
            try:
                file.write(hashlib.sha256(body).digest() + body)
                file.close()
                os.replace(file.name, path)
            except OSError:
                os.unlink(file.name)
                raise
    except OSError as error:
        _warn_unwritable(path.parent, error.strerror or type(error).__name__)


@cache
def _warn_unwritable(folder: Path, reason: str) -> None:
    """Once a process: cached."""
    _LOG.warning("eightfold: compiled kernels cannot be kept in %s (%s): set EIGHTFOLD_CACHE", folder, reason)
