"""Running engines on the GPU of this machine: outputs, and times side by side.

TensorRT before 8.5 knows inputs and outputs by position and runs with `execute_async_v2`; from 8.5 on by name and with
`execute_async_v3`, and 10 has nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from onnxsnp.deploy.cuda import Cuda
from onnxsnp.errors import ModelError
from onnxsnp.evaluation.latency import measure_rounds

ROUNDS, WARMUP = 200, 50


class Running:
    """An engine with its inputs on the GPU, ready to run again and again.

    Args:
        library: the module, `tensorrt` or `tensorrt_rtx`.
        data: the serialized engine.
        feeds: inputs by name; cast to what the engine takes (below TensorRT 10 int64 is int32).

    Raises:
        ModelError: the engine cannot be loaded here, or wants other inputs.
    """

    def __init__(self, library: Any, log: Any, cuda: Cuda, data: bytes, feeds: Mapping[str, np.ndarray]) -> None:
        self._cuda = cuda
        self._runtime = library.Runtime(log)
        self._engine = self._runtime.deserialize_cuda_engine(data)
        if self._engine is None:
            said = f": {log.errors[-1]}" if log.errors else ""
            raise ModelError(f"the engine cannot be loaded on this GPU{said}")
        self._context = self._engine.create_execution_context()
        if self._context is None:
            raise ModelError("the GPU has too little memory to run the engine", hint="close other programs")
        self._addresses: list[int] = []
        self._outputs: dict[str, tuple[int, np.ndarray]] = {}
        named = hasattr(self._engine, "num_io_tensors")
        for name, reads, shape, kind in (_by_name if named else _by_place)(library, self._engine):
            given = feeds.get(name) if reads else np.empty(shape, kind)
            if given is None or given.shape != shape:
                raise ModelError(f"the engine takes '{name}' as {shape}, got {None if given is None else given.shape}")
            array = np.ascontiguousarray(given, kind)
            address = cuda.allocate(max(array.nbytes, 1))
            self._addresses.append(address)
            if reads:
                cuda.upload(address, array)
            else:
                self._outputs[name] = (address, array)
            if named:
                self._context.set_tensor_address(name, address)
        self._run = self._by_name if named else self._by_place

    def run(self) -> None:
        """Once, to its end."""
        if not self._run(self._cuda.stream()):
            raise ModelError("the engine failed to run")
        self._cuda.wait()

    def outputs(self) -> dict[str, np.ndarray]:
        """What the last run gave, by name."""
        for address, array in self._outputs.values():
            self._cuda.download(array, address)
        return {name: array.copy() for name, (_address, array) in self._outputs.items()}

    def close(self) -> None:
        while self._addresses:
            self._cuda.free(self._addresses.pop())

    def _by_name(self, stream: int) -> bool:
        return bool(self._context.execute_async_v3(stream))

    def _by_place(self, stream: int) -> bool:
        return bool(self._context.execute_async_v2(self._addresses, stream))


_Tensor = tuple[str, bool, tuple[int, ...], Any]  # name, whether it is an input, shape, NumPy's type


def _by_name(library: Any, engine: Any) -> Iterator[_Tensor]:
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        reads = engine.get_tensor_mode(name) == library.TensorIOMode.INPUT
        yield name, reads, tuple(engine.get_tensor_shape(name)), library.nptype(engine.get_tensor_dtype(name))


def _by_place(library: Any, engine: Any) -> Iterator[_Tensor]:
    for index in range(engine.num_bindings):
        shape, kind = tuple(engine.get_binding_shape(index)), library.nptype(engine.get_binding_dtype(index))
        yield engine.get_binding_name(index), bool(engine.binding_is_input(index)), shape, kind


@contextmanager
def running(
    library: Any, log: Any, cuda: Cuda, engines: Sequence[tuple[bytes, Mapping[str, np.ndarray]]]
) -> Iterator[list[Running]]:
    """Engines with their inputs, open together; their memory is given back at the end."""
    opened: list[Running] = []
    try:
        for data, feeds in engines:
            opened.append(Running(library, log, cuda, data, feeds))
        yield opened
    finally:
        for one in opened:
            one.close()


def measure(
    engines: Sequence[Running],
    rounds: int = ROUNDS,
    warmup: int = WARMUP,
    progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """Milliseconds of every run, [rounds, engines], without copies of inputs and outputs; one run of each per round."""
    return measure_rounds([one.run for one in engines], rounds, warmup, progress)
