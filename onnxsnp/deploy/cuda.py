"""The little of CUDA that running an engine takes: memory, copies, a stream. By cuda-python, else pycuda."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol

import numpy as np

from onnxsnp.errors import ModelError

HOW = "pip install cuda-python (or pycuda)"


@dataclass(frozen=True)
class Gpu:
    """The first GPU: its name, and compute capability such as (8, 9)."""

    name: str
    compute_capability: tuple[int, int]


class Cuda(Protocol):
    """Memory on the GPU by address, and one stream; every call raises `ModelError` where CUDA fails."""

    def gpu(self) -> Gpu: ...

    def allocate(self, size: int) -> int:
        """Address of a number of bytes."""

    def free(self, address: int) -> None: ...

    def upload(self, address: int, array: np.ndarray) -> None:
        """Copy a contiguous array to the GPU."""

    def download(self, array: np.ndarray, address: int) -> None:
        """Copy from the GPU into a contiguous array."""

    def stream(self) -> int:
        """Handle of the stream, the same every time."""

    def wait(self) -> None:
        """Until the stream has done all its work."""


def open_cuda() -> Cuda:
    """CUDA by whichever package is there.

    Raises:
        ModelError: no package, no driver, or no GPU.
    """
    for name in ("cuda.bindings.runtime", "cuda.cudart"):
        try:
            return _CudaPython(import_module(name))
        except ImportError:
            continue
    try:
        driver = import_module("pycuda.driver")
    except ImportError as error:
        raise ModelError("no package for CUDA is installed", hint=HOW) from error
    return _PyCuda(driver)


class _CudaPython:
    """cuda-python: functions of the runtime API that return (error, results...)."""

    def __init__(self, runtime: Any) -> None:
        self._cuda = runtime
        self._stream: Any = None
        if not self._do("cudaGetDeviceCount"):
            raise ModelError("there is no GPU here", hint="use --backend bundle")

    def gpu(self) -> Gpu:
        found = self._do("cudaGetDeviceProperties", 0)
        name = found.name.decode() if isinstance(found.name, bytes) else str(found.name)
        return Gpu(name, (int(found.major), int(found.minor)))

    def allocate(self, size: int) -> int:
        return int(self._do("cudaMalloc", size))

    def free(self, address: int) -> None:
        self._do("cudaFree", address)

    def upload(self, address: int, array: np.ndarray) -> None:
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._do("cudaMemcpy", address, array.ctypes.data, array.nbytes, kind)

    def download(self, array: np.ndarray, address: int) -> None:
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._do("cudaMemcpy", array.ctypes.data, address, array.nbytes, kind)

    def stream(self) -> int:
        if self._stream is None:
            self._stream = self._do("cudaStreamCreate")
        return int(self._stream)

    def wait(self) -> None:
        self._do("cudaStreamSynchronize", self.stream())

    def _do(self, name: str, *arguments: Any) -> Any:
        try:
            error, *results = getattr(self._cuda, name)(*arguments)
        except RuntimeError as missing:  # the package is there, the driver or its library is not
            raise ModelError(f"CUDA does not work here: {missing}", hint="use --backend bundle") from missing
        if int(error):
            what = "there is no GPU here" if name == "cudaGetDeviceCount" else f"CUDA failed in {name}"
            raise ModelError(f"{what}: {getattr(error, 'name', error)}", hint="use --backend bundle")
        return results[0] if results else None


class _PyCuda:
    """pycuda: objects that own what they stand for."""

    def __init__(self, driver: Any) -> None:
        self._cuda = driver
        self._held: dict[int, Any] = {}
        try:
            driver.init()
            self._device = driver.Device(0)
            self._context = self._device.retain_primary_context()
            self._context.push()
            self._stream = driver.Stream()
        except driver.Error as error:
            raise ModelError(f"there is no GPU here: {error}", hint="use --backend bundle") from error

    def gpu(self) -> Gpu:
        major, minor = self._device.compute_capability()
        return Gpu(self._device.name(), (major, minor))

    def allocate(self, size: int) -> int:
        try:
            memory = self._cuda.mem_alloc(size)
        except self._cuda.Error as error:
            raise ModelError(f"CUDA failed in mem_alloc: {error}", hint="use --backend bundle") from error
        self._held[int(memory)] = memory
        return int(memory)

    def free(self, address: int) -> None:
        self._held.pop(address).free()

    def upload(self, address: int, array: np.ndarray) -> None:
        self._cuda.memcpy_htod(address, array)

    def download(self, array: np.ndarray, address: int) -> None:
        self._cuda.memcpy_dtoh(array, address)

    def stream(self) -> int:
        return int(self._stream.handle)

    def wait(self) -> None:
        self._stream.synchronize()
