"""On an NVIDIA GPU: loading kernels and launching them, on streams, in graphs, from threads, on several devices."""

from __future__ import annotations

import struct
import threading

import pytest
import torch

from eightfold.cuda import compiler, driver
from eightfold.cuda.compiler import KernelError
from eightfold.cuda.driver import Kernel, load

pytestmark = pytest.mark.gpu

SOURCE = """
#include "params.cuh"

__device__ void wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

extern "C" __global__ void add(const __grid_constant__ Params p) {
  wait();
  int i = (blockIdx.y * gridDim.x + blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < p.count) p.z[i] = p.x[i] + SCALE * p.y[i];
}

extern "C" __global__ void reverse(const __grid_constant__ Params p) {
  extern __shared__ float cells[];
  for (int i = threadIdx.x; i < p.count; i += blockDim.x) cells[i] = p.x[i];
  __syncthreads();
  for (int i = threadIdx.x; i < p.count; i += blockDim.x) p.z[i] = cells[p.count - 1 - i];
}

extern "C" __global__ void two(const float* x, float* y) { *y = *x; }
"""
COUNT = 5000


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory):
    path = tmp_path_factory.mktemp("kernels")
    (path / "params.cuh").write_text("struct Params { const float* x; const float* y; float* z; int count; };\n")
    (path / "test.cu").write_text(SOURCE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler, "KERNELS", path)
        patch.setenv("EIGHTFOLD_CACHE", str(path / "cache"))
        yield


def vectors(device: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x, y = torch.randn(2, COUNT, device=f"cuda:{device}")
    return x, y, torch.empty_like(x)


def packed(x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> bytes:
    return struct.pack("QQQi4x", x.data_ptr(), y.data_ptr(), z.data_ptr(), COUNT)


def stream_of(device: int = 0) -> int:
    return torch.cuda.current_stream(device).cuda_stream


def add(device: int = 0) -> Kernel:
    return load("test.cu", "add", device, SCALE=2)


@pytest.mark.parametrize("grid", [20, (5, 4, 1)])
def test_adds(grid):
    x, y, z = vectors()
    add().launch(grid, 256, packed(x, y, z), stream_of())
    assert torch.equal(z, x + 2 * y)


def test_is_loaded_once_for_each_set_of_defines():
    assert add() is add()
    assert load("test.cu", "reverse", 0, SCALE=2, OTHER=1) is load("test.cu", "reverse", 0, OTHER=1, SCALE=2)
    x, y, z = vectors()
    load("test.cu", "add", 0, SCALE=4).launch(20, 256, packed(x, y, z), stream_of())
    assert torch.equal(z, x + 4 * y)


def test_other_stream():
    x, y, z = vectors()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)  # a launch on another stream would come before this write
        x.fill_(3)
        add().launch(20, 256, packed(x, y, z), stream_of())
    side.synchronize()
    assert torch.equal(z, 3 + 2 * y)


@pytest.mark.parametrize("overlap", [False, True])
def test_chain_keeps_its_order(overlap):
    x, y, z = vectors()
    expected = x.clone()
    kernel = add()
    for _ in range(50):
        kernel.launch(20, 256, packed(x, y, z), stream_of(), overlap)
        kernel.launch(20, 256, packed(z, y, x), stream_of(), overlap)
        expected = (expected + 2 * y) + 2 * y
    torch.testing.assert_close(x, expected)


@pytest.mark.parametrize("overlap", [False, True])
def test_graph(overlap):
    x, y, z = vectors()
    kernel = add()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kernel.launch(20, 256, packed(x, y, z), stream_of(), overlap)
        kernel.launch(20, 256, packed(z, y, x), stream_of(), overlap)
    expected = x + 2 * y
    graph.replay()
    assert torch.equal(z, expected)
    torch.testing.assert_close(x, expected + 2 * y)


def test_loading_while_capturing_is_an_error():
    x, y, z = vectors()
    kernel = add()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        with pytest.raises(KernelError, match=r"prepare\(\) the layer before capturing"):
            load("test.cu", "add", 0, SCALE=99)
        kernel.launch(20, 256, packed(x, y, z), stream_of())
    graph.replay()
    assert torch.equal(z, x + 2 * y)


def test_first_launch_may_be_in_a_graph():
    x, y, z = vectors()
    kernel = load("test.cu", "add", 0, SCALE=4)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kernel.launch(20, 256, packed(x, y, z), stream_of())
    graph.replay()
    assert torch.equal(z, x + 4 * y)


def test_much_shared_memory():
    x, y, _ = vectors()
    z = torch.empty_like(x)
    shared = 96 * 1024
    if shared > driver.max_shared(0):
        pytest.skip(f"needs {shared} bytes of shared memory a block")
    load("test.cu", "reverse", 0, shared, SCALE=1).launch(1, 256, packed(x, y, z), stream_of())
    assert torch.equal(z, x.flip(0))
    with pytest.raises(KernelError, match="use smaller tiles"):
        load("test.cu", "reverse", 0, driver.max_shared(0) + 1, SCALE=1)


def test_threads():
    kernel = add()
    results: list[bool] = []

    def work(seed: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(300):
                x, y, z = vectors()
                kernel.launch(20 + seed % 2, 256, packed(x, y, z), stream_of())
                results.append(torch.equal(z, x + 2 * y))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 1200
    assert all(results)


def test_thread_that_has_no_context_yet():
    x, y, z = vectors()
    kernel, params, stream = add(), packed(x, y, z), stream_of()
    torch.cuda.synchronize()
    thread = threading.Thread(target=kernel.launch, args=(20, 256, params, stream))
    thread.start()
    thread.join()
    assert torch.equal(z, x + 2 * y)


@pytest.mark.parametrize("current", [0, 1])
def test_several_devices(current):
    if torch.cuda.device_count() < 2:
        pytest.skip("one device only")
    for device in (0, 1):
        x, y, z = vectors(device)
        with torch.cuda.device(current):
            add(device).launch(20, 256, packed(x, y, z), stream_of(device))
            assert torch.cuda.current_device() == current
            assert torch.equal(z, x + 2 * y)
    assert add(0) is not add(1)


def test_errors():
    with pytest.raises(KernelError, match="cuModuleGetFunction failed: CUDA_ERROR_NOT_FOUND"):
        load("test.cu", "gone", 0, SCALE=2)
    with pytest.raises(KernelError, match="expected two to take one parameter"):
        load("test.cu", "two", 0, SCALE=2)
    x, y, z = vectors()
    with pytest.raises(KernelError, match="add takes 32 bytes of parameters, came 31"):
        add().launch(20, 256, packed(x, y, z)[:-1], stream_of())
    with pytest.raises(KernelError, match="launching add failed: CUDA_ERROR_INVALID_VALUE"):
        add().launch(20, 4096, packed(x, y, z), stream_of())
    add().launch(20, 256, packed(x, y, z), stream_of())
    assert torch.equal(z, x + 2 * y)


def test_properties():
    major, minor = torch.cuda.get_device_capability(0)
    assert driver.arch(0) == 10 * major + minor
    assert driver.sm_count(0) > 0
    assert driver.max_shared(0) >= 48 * 1024
