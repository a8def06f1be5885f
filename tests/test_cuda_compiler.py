"""Kernel sources to cubins, and the cache of them. No GPU is needed: NVRTC compiles for devices that are not there."""

from __future__ import annotations

import hashlib
import logging
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from eightfold.cuda import compiler
from eightfold.cuda.compiler import ARCHITECTURES, KernelError, compile_source, cubin, read_source, target_arch

SOURCE = """
struct Params { float* x; int count; };
extern "C" __global__ void scale(const __grid_constant__ Params p) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < p.count) p.x[i] *= FACTOR;
}
"""
needs_nvrtc = pytest.mark.skipif(sys.platform == "darwin", reason="NVRTC does not exist for macOS")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("EIGHTFOLD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def compiled(folder, monkeypatch):
    """What was compiled, as (source, file, arch, defines), with a stand-in for NVRTC."""
    calls = []

    def compile_source(*arguments):
        calls.append(arguments)
        return repr(arguments).encode()

    monkeypatch.setattr(compiler, "compile_source", compile_source)
    monkeypatch.setattr(compiler, "nvrtc_version", lambda: (13, 0, "libnvrtc.so.13 1"))
    return calls


@pytest.fixture
def kernels(tmp_path, monkeypatch):
    """A folder in place of the package's kernels."""
    path = tmp_path / "kernels"
    path.mkdir()
    monkeypatch.setattr(compiler, "KERNELS", path)
    return path


@needs_nvrtc
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_compiles_without_headers(arch):
    image = compile_source(SOURCE, "scale.cu", arch, {"FACTOR": 3})
    assert image.startswith(b"\x7fELF")
    assert b"scale" in image
    assert image != compile_source(SOURCE, "scale.cu", arch, {"FACTOR": 4})


@needs_nvrtc
def test_failure_has_the_log_with_our_file_and_line(kernels):
    (kernels / "a.cuh").write_text("\n\nint f() { return nonsense; }\n")
    (kernels / "a.cu").write_text('#include "a.cuh"\nint g() { return gibberish; }\n')
    with pytest.raises(KernelError) as error:
        compile_source(read_source("a.cu"), "a.cu", 90, {})
    first, *log = str(error.value).splitlines()
    assert first == "NVRTC cannot compile a.cu for sm_90 (NVRTC_ERROR_COMPILATION); its log:"
    assert 'a.cuh(3): error: identifier "nonsense" is undefined' in "\n".join(log)
    assert 'a.cu(2): error: identifier "gibberish" is undefined' in "\n".join(log)


@needs_nvrtc
def test_unknown_arch_is_an_error():
    with pytest.raises(KernelError, match=r"cannot compile scale\.cu for sm_33"):
        compile_source(SOURCE, "scale.cu", 33, {"FACTOR": 3})


@needs_nvrtc
def test_nvrtc_knows_every_architecture():
    assert [target_arch(arch) for arch in ARCHITECTURES] == list(ARCHITECTURES)
    major, _, library = compiler.nvrtc_version()
    assert major >= 12
    assert "nvrtc" in library


def test_target_arch():
    known = (75, 80, 86, 90, 100, 103)
    assert target_arch(86, known) == 86
    assert target_arch(89, known) == 86
    assert target_arch(109, known) == 103
    assert target_arch(101, known) == 100
    with pytest.raises(KernelError, match=r"compute capability 12\.1: install"):
        target_arch(121, known)
    with pytest.raises(KernelError, match=r"8\.0 or newer, the device has 7\.5"):
        target_arch(75, known)


def test_includes_are_expanded_once(kernels):
    (kernels / "base.cuh").write_text("#pragma once\nint base;\n")
    (kernels / "mid.cuh").write_text('#include "base.cuh"\nint mid;')
    (kernels / "top.cu").write_text('// top\n#include "base.cuh"\n  # include "mid.cuh"  // as well\nint top;\n')
    lines = read_source("top.cu").splitlines()
    assert [line for line in lines if line.startswith("int")] == ["int base;", "int mid;", "int top;"]
    assert not [line for line in lines if "include" in line or "pragma" in line]
    assert lines[lines.index("int top;") - 1] == '#line 4 "top.cu"'


def test_missing_source(kernels):
    (kernels / "top.cu").write_text('#include "gone.cuh"\n')
    with pytest.raises(KernelError, match=r"expected the kernel source gone\.cuh in"):
        read_source("top.cu")


def test_package_sources_expand():
    for path in compiler.KERNELS.iterdir():
        if path.name.endswith(".cu"):
            assert "#include" not in read_source(path.name)


def test_cache_hit(compiled, folder, caplog):
    first = cubin("a.cu", 90, {"A": 1, "B": 2}, SOURCE)
    assert cubin("a.cu", 90, {"B": 2, "A": 1}, SOURCE) == first
    assert compiled == [(SOURCE, "a.cu", 90, {"A": 1, "B": 2})]
    assert [record.getMessage() for record in caplog.records] == ["eightfold: compiling a.cu for sm_90, once"]
    (path,) = folder.iterdir()
    assert path.name.startswith("a-sm90-")
    assert path.suffix == ".cubin"


def test_key_has_every_part(compiled, folder, monkeypatch):
    results = [
        cubin("a.cu", 90, {"A": 1}, SOURCE),
        cubin("a.cu", 90, {"A": 1}, SOURCE + " "),
        cubin("a.cu", 80, {"A": 1}, SOURCE),
        cubin("a.cu", 90, {"A": 2}, SOURCE),
        cubin("a.cu", 90, {"B": 1}, SOURCE),
        cubin("b.cu", 90, {"A": 1}, SOURCE),
    ]
    monkeypatch.setattr(compiler, "nvrtc_version", lambda: (13, 0, "libnvrtc.so.13 2"))
    results.append(cubin("a.cu", 90, {"A": 1}, SOURCE))
    monkeypatch.setattr(compiler, "_options", lambda arch, defines: ["--other"])
    results.append(cubin("a.cu", 90, {"A": 1}, SOURCE))
    assert len(compiled) == len(results) == len(list(folder.iterdir()))


def test_key_has_the_included_text(compiled, folder, kernels):
    (kernels / "a.cu").write_text('#include "a.cuh"\n')
    for text in ("int a;\n", "int b;\n", "int b;\n"):
        (kernels / "a.cuh").write_text(text)
        cubin("a.cu", 90, {})
    assert len(compiled) == 2


@pytest.mark.parametrize("damage", [lambda content: b"", lambda content: content[:-1], lambda content: content + b"x"])
def test_damaged_file_is_made_again(compiled, folder, damage):
    first = cubin("a.cu", 90, {}, SOURCE)
    (path,) = folder.iterdir()
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert cubin("a.cu", 90, {}, SOURCE) == first
    assert len(compiled) == 2
    assert path.read_bytes() == whole


def test_unwritable_folder_is_no_error(compiled, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EIGHTFOLD_CACHE", str(tmp_path / "file" / "cache"))
    compiler._warn_unwritable.cache_clear()
    with caplog.at_level(logging.WARNING, "eightfold"):
        assert cubin("a.cu", 90, {}, SOURCE) == cubin("a.cu", 90, {}, SOURCE)
    assert len(compiled) == 2
    said = [record.getMessage() for record in caplog.records if "cannot be kept" in record.getMessage()]
    assert len(said) == 1
    assert said[0].endswith("set EIGHTFOLD_CACHE")


def test_failed_write_leaves_nothing(compiled, folder, monkeypatch):
    def replace(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(compiler.os, "replace", replace)
    compiler._warn_unwritable.cache_clear()
    cubin("a.cu", 90, {}, SOURCE)
    assert not list(folder.iterdir())


def test_cache_dir(monkeypatch, tmp_path):
    monkeypatch.setenv("EIGHTFOLD_CACHE", str(tmp_path))
    assert compiler.cache_dir() == tmp_path
    monkeypatch.delenv("EIGHTFOLD_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert compiler.cache_dir() == tmp_path / "eightfold"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert compiler.cache_dir() == tmp_path / ".cache" / "eightfold"
    monkeypatch.setattr(compiler.os.path, "expanduser", lambda path: path)
    with pytest.raises(KernelError, match="set EIGHTFOLD_CACHE"):
        compiler.cache_dir()


@needs_nvrtc
def test_processes_at_the_same_time(folder):
    code = (
        "import hashlib; from eightfold.cuda.compiler import cubin; "
        f"print(hashlib.sha256(cubin('a.cu', 90, {{'FACTOR': 2}}, {SOURCE!r})).hexdigest())"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-W", "error", "-c", code]
    pipe = subprocess.PIPE
    workers = [subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True) for _ in range(4)]
    outputs = [worker.communicate(timeout=120) for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * 4, outputs
    (digest,) = {stdout.strip() for stdout, _ in outputs}
    assert {stderr for _, stderr in outputs} <= {"", "eightfold: compiling a.cu for sm_90, once\n"}
    (path,) = folder.iterdir()
    assert hashlib.sha256(path.read_bytes()[32:]).hexdigest() == digest == path.read_bytes()[:32].hex()


@pytest.fixture
def forgotten():
    """NVRTC is looked for anew in this test, and after it."""
    compiler._nvrtc.cache_clear()
    yield
    compiler._nvrtc.cache_clear()


@pytest.mark.usefixtures("forgotten")
def test_without_cuda_bindings(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings.nvrtc", None)
    with pytest.raises(KernelError, match="cuda-bindings, which cannot be imported: run `pip install cuda-bindings nv"):
        compile_source(SOURCE, "a.cu", 90, {})


@needs_nvrtc
@pytest.mark.usefixtures("forgotten")
def test_without_nvrtc(monkeypatch):
    from cuda.pathfinder import DynamicLibNotFoundError

    def missing():
        raise DynamicLibNotFoundError("libnvrtc.so.13")

    monkeypatch.setitem(sys.modules, "cuda.bindings.nvrtc", SimpleNamespace(nvrtcVersion=missing))
    with pytest.raises(KernelError, match="NVRTC, whose library cannot be found: run `pip install cuda-bindings nv"):
        compile_source(SOURCE, "a.cu", 90, {})


@pytest.mark.parametrize(
    "code",
    [
        "import sys, eightfold.cuda.compiler; assert not {'cuda.bindings', 'torch'} & set(sys.modules)",
        "import sys; sys.modules['cuda'] = None; import eightfold.cuda.driver",  # where torch does without, so do we
    ],
)
def test_import_is_light(code):
    subprocess.run([sys.executable, "-c", code], check=True)
