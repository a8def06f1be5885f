"""Kernels on a device: loading them into PyTorch's context, and launching them in a few microseconds.

Every kernel is an `extern "C"` function with exactly one parameter, `const __grid_constant__ Params p`, whose
bytes the caller packs. All that a launch can share between calls is made once and never changed after, so
that threads may launch the same kernel at the same time.
"""

from __future__ import annotations

import ctypes
import threading
from functools import cache
from importlib import import_module
from typing import Any

import torch

from eightfold.cuda.compiler import KernelError, cubin, target_arch

Grid = int | tuple[int, int, int]

_FREE_SHARED = 48 * 1024  # bytes that a block may have without asking
_MAX_CONFIGS = 4096  # kept by a kernel; eager calls with ever new sizes would make more and more
_Arguments = ctypes.c_char_p * 1

_KERNELS: dict[tuple[Any, ...], Kernel] = {}  # never emptied: a graph may hold a launch of any of them
_LOCK = threading.Lock()


class Kernel:
    """A function loaded on one device. Made by `load`."""

    def __init__(self, name: str, device: int, shared: int, module: Any, context: Any) -> None:
        """Raises KernelError if `module`, in the current `context`, has no such function with one parameter."""
        driver = _driver()
        self.name, self.device, self.shared = name, device, shared
        self._driver, self._module, self._context = driver, module, context
        self._context_id = int(context)
        self._can_overlap = arch(device) >= 90
        self._function = _call("cuModuleGetFunction", module, name.encode())
        _, self.param_bytes = _call("cuFuncGetParamInfo", self._function, 0)
        if not driver.cuFuncGetParamInfo(self._function, 1)[0]:
            raise KernelError(f"expected {name} to take one parameter, it takes more: put them in one struct")
        if shared > _FREE_SHARED:
            attribute = driver.CUfunction_attribute
            for which, value in (
                (attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, shared),
                (attribute.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, 100),
            ):
                _call("cuFuncSetAttribute", self._function, which, value)
        self._configs: dict[tuple[Grid, int, int, bool], Any] = {}

    def launch(self, grid: Grid, block: int, params: bytes, stream: int, overlap: bool = False) -> None:
        """Queue the kernel on a stream of its device, whichever device is the current one.

        `grid`: blocks along x, or x, y, z. `block`: threads. `params`: the bytes of the kernel's one struct.
        `stream`: the handle, as torch.cuda.Stream.cuda_stream. `overlap`: may begin before the kernel ahead of it
        in the stream ends (programmatic stream serialization; ignored below compute capability 9.0).
        Raises KernelError.
        """
        if len(params) != self.param_bytes:
            raise KernelError(f"{self.name} takes {self.param_bytes} bytes of parameters, came {len(params)}: pack all")
        key = (grid, block, stream, overlap)
        config = self._configs.get(key)
        if config is None:
            config = self._configure(*key)
        arguments = _Arguments(params)  # the driver copies what they point to before it returns
        driver = self._driver
        # Another device may be current, and in a new thread none is.
        foreign = int(driver.cuCtxGetCurrent()[1]) != self._context_id
        if foreign:
            _call("cuCtxPushCurrent", self._context)
        try:
            (result,) = driver.cuLaunchKernelEx(config, self._function, ctypes.addressof(arguments), 0)
        finally:
            if foreign:
                _call("cuCtxPopCurrent")
        if result:
            raise KernelError(f"launching {self.name} failed: {_reason(result)}")

    def _configure(self, grid: Grid, block: int, stream: int, overlap: bool) -> Any:
        """The launch configuration, kept."""
        driver = self._driver
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = (grid, 1, 1) if isinstance(grid, int) else grid
        config.blockDimX, config.blockDimY, config.blockDimZ = block, 1, 1
        config.sharedMemBytes = self.shared
        config.hStream = driver.CUstream(stream)
        if overlap and self._can_overlap:
            attribute = driver.CUlaunchAttribute()
            attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            attribute.value.programmaticStreamSerializationAllowed = 1
            config.attrs, config.numAttrs = [attribute], 1
        if len(self._configs) >= _MAX_CONFIGS:
            self._configs.clear()
        self._configs[grid, block, stream, overlap] = config
        return config


def load(file: str, name: str, device: int, shared: int = 0, **defines: int) -> Kernel:
    """The function `name` of `kernels/<file>`, compiled with `defines`, on a device; the same object every time.

    `shared`: bytes of dynamic shared memory of every launch. Raises KernelError; among others, if the kernel is
    not yet loaded and a graph is being captured, when CUDA forbids loading.
    """
    key = (file, name, device, shared, *sorted(defines.items()))
    kernel = _KERNELS.get(key)
    if kernel is None:
        with _LOCK:
            kernel = _KERNELS.get(key)
            if kernel is None:
                kernel = _KERNELS[key] = _load(file, name, device, shared, defines)
    return kernel


def _load(file: str, name: str, device: int, shared: int, defines: dict[str, int]) -> Kernel:
    torch.cuda.init()
    if torch.cuda.is_current_stream_capturing():
        raise KernelError(
            f"expected {name} to be loaded before a graph is captured: prepare() the layer before capturing"
        )
    if shared > max_shared(device):
        raise KernelError(
            f"{name} needs {shared} bytes of shared memory a block, the device has {max_shared(device)}: "
            "use smaller tiles"
        )
    image = _image(file, target_arch(arch(device)), *sorted(defines.items()))
    # PyTorch's context: the device's primary one. It is retained for good, since kernels are never unloaded.
    context = _call("cuDevicePrimaryCtxRetain", _call("cuDeviceGet", device))
    _call("cuCtxPushCurrent", context)
    try:
        return Kernel(name, device, shared, _call("cuModuleLoadData", image), context)
    finally:
        _call("cuCtxPopCurrent")


@cache
def _image(file: str, arch: int, *defines: tuple[str, int]) -> bytes:
    """The cubin, read or compiled once for all functions in it and all devices that are alike."""
    return cubin(file, arch, dict(defines))


def device_index(device: torch.device) -> int:
    """Number of a GPU; that of the current one where the device does not say."""
    return torch.cuda.current_device() if device.index is None else device.index


def arch(device: int) -> int:
    """Compute capability of a device as one number: 90 for 9.0."""
    properties = _properties(device)
    return 10 * properties.major + properties.minor


def sm_count(device: int) -> int:
    """Multiprocessors of a device."""
    return _properties(device).multi_processor_count


def max_shared(device: int) -> int:
    """Bytes of shared memory that a block can have if it asks for them."""
    return _properties(device).shared_memory_per_block_optin


@cache
def _properties(device: int) -> Any:
    return torch.cuda.get_device_properties(device)


@cache
def _driver() -> Any:
    """The module cuda.bindings.driver. Raises KernelError if it is missing."""
    try:
        driver = import_module("cuda.bindings.driver")  # by name: the wheels hold no types
    except ImportError as error:
        raise KernelError(
            "kernels are launched through cuda-bindings, which cannot be imported: run `pip install cuda-bindings`"
        ) from error
    return driver


def _call(name: str, *arguments: Any) -> Any:
    """What a call of the driver returns after its status: one value, or a tuple of none or several."""
    result, *values = getattr(_driver(), name)(*arguments)
    if result:
        raise KernelError(f"{name} failed: {_reason(result)}")
    return values[0] if len(values) == 1 else tuple(values)


def _reason(result: Any) -> str:
    """ "CUDA_ERROR_INVALID_VALUE, invalid argument" """
    _, text = _driver().cuGetErrorString(result)
    return f"{result.name}, {text.decode()}" if text else str(result)
