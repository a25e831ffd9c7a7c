"""Stand-ins for the Python package of TensorRT and for CUDA, since neither runs without a GPU.

They have the names that each release has and no others: what a release lacks raises `AttributeError`, as it does
there. "GPU memory" is memory of this process by made-up addresses, and an "engine" is the model itself, which
onnxruntime runs. So what is tested is how the package talks to TensorRT, and nothing about TensorRT.
"""

from __future__ import annotations

import enum
import json
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime

from onnxsnp.deploy.cuda import Gpu

_REFUSED = {"Det", "Bernoulli"}
_WEAK = {"FP16": 0, "OBEY_PRECISION_CONSTRAINTS": 11}  # flags for networks whose layers may choose their types


class Cuda:
    """The protocol `onnxsnp.deploy.cuda.Cuda`; addresses start at one place and never repeat."""

    def __init__(self, compute_capability: tuple[int, int] = (8, 9)) -> None:
        self.memory: dict[int, bytearray] = {}
        self.capability, self.waits, self._next = compute_capability, 0, 0x1000

    def gpu(self) -> Gpu:
        return Gpu("a stand-in", self.capability)

    def allocate(self, size: int) -> int:
        self._next += 0x10000
        self.memory[self._next] = bytearray(size)
        return self._next

    def free(self, address: int) -> None:
        del self.memory[address]

    def upload(self, address: int, array: np.ndarray) -> None:
        assert array.flags.c_contiguous and array.nbytes <= len(self.memory[address])
        self.memory[address][: array.nbytes] = array.tobytes()

    def download(self, array: np.ndarray, address: int) -> None:
        array[...] = np.frombuffer(bytes(self.memory[address]), array.dtype, array.size).reshape(array.shape)

    def stream(self) -> int:
        return 7

    def wait(self) -> None:
        self.waits += 1


def tensorrt(version: str, cuda: Cuda, memory_ok: bool = True) -> Any:
    """The module of a release.

    Args:
        memory_ok: whether a build finds enough memory.
    """
    release = tuple(int(part) for part in version.split("."))
    kinds = ({} if release >= (11,) else {"EXPLICIT_BATCH": 0}) | ({"STRONGLY_TYPED": 1} if release >= (10,) else {})
    library = SimpleNamespace(
        __version__=version,
        ILogger=_Logger,
        NetworkDefinitionCreationFlag=enum.IntEnum("NetworkDefinitionCreationFlag", kinds),
        BuilderFlag=enum.IntEnum("BuilderFlag", {"TF32": 7} | ({} if release >= (11,) else _WEAK)),
        float32="single precision",
        TensorIOMode=enum.IntEnum("TensorIOMode", {"NONE": 0, "INPUT": 1, "OUTPUT": 2}),
        nptype=lambda kind: kind,
        built=[],
    )
    library.Builder = lambda log: _Builder(library, release, log, memory_ok)
    library.OnnxParser = lambda network, log: _Parser(release, network, log)
    library.Runtime = lambda log: _Runtime(release, log, cuda)
    if release < (8, 5):
        del library.TensorIOMode
    if release >= (8, 6):
        library.IProgressMonitor = type("IProgressMonitor", (), {})
    return library


class _Logger:
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)


class _Network:
    """Layers are the nodes, but that each Relu has a second one with a number behind the name."""

    __slots__ = ("flags", "layers", "model")

    def __init__(self, flags: int) -> None:
        self.flags, self.model, self.layers = flags, None, []

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    def get_layer(self, index: int) -> Any:
        return self.layers[index]


class _Builder:
    def __init__(self, library: Any, release: tuple[int, ...], log: Any, memory_ok: bool) -> None:
        self._library, self._release, self._log, self._memory_ok = library, release, log, memory_ok

    def create_network(self, flags: int = 0) -> _Network:
        known = sum(1 << int(flag) for flag in self._library.NetworkDefinitionCreationFlag)
        if flags & ~known:
            raise TypeError("unknown flag")
        return _Network(flags)

    def create_builder_config(self) -> Any:
        names = ["flags", "_marked"]
        names += ["max_workspace_size"] if self._release < (10,) else []
        names += ["progress_monitor"] if self._release >= (8, 6) else []

        class Config:
            __slots__ = tuple(names)

            def __init__(self) -> None:
                self.flags = ["TF32"]

            def set_flag(self, flag: Any) -> None:
                self.flags = [*self.flags, flag.name]

            def clear_flag(self, flag: Any) -> None:
                self.flags = [name for name in self.flags if name != flag.name]

        if self._release >= (8, 4):
            Config.set_memory_pool_limit = lambda self, pool, size: None  # type: ignore[attr-defined]
        return Config()

    def build_serialized_network(self, network: _Network, config: Any) -> Any:
        assert network.model is not None, "nothing was parsed"
        monitor = getattr(config, "progress_monitor", None)
        if monitor is not None:
            monitor.phase_start("Building", None, 2)
            monitor.phase_start("Inside", "Building", 1)
            assert monitor.step_complete("Inside", 0) and monitor.step_complete("Building", 0)
            assert monitor.step_complete("Building", 1)
            monitor.phase_finish("Building")
        enough = self._release >= (8, 4) or getattr(config, "max_workspace_size", 16 << 20) > 256 << 20
        if not self._memory_ok or not enough:
            self._log.log(_Logger.ERROR, "IBuilder::buildSerializedNetwork: Error Code 2: OutOfMemory (out of memory)")
            return None
        kept = [layer.name for layer in network.layers if layer.precision is not None]
        self._library.built.append({"network": network.flags, "flags": config.flags, "kept": kept})
        head = json.dumps({"version": self._release}).encode()
        return memoryview(head + b"\n" + network.model)


class _Parser:
    def __init__(self, release: tuple[int, ...], network: _Network, log: Any) -> None:
        self._release, self._network, self._log = release, network, log
        self._errors: list[Any] = []

    @property
    def num_errors(self) -> int:
        return len(self._errors)

    def get_error(self, index: int) -> Any:
        return self._errors[index]

    def parse(self, data: bytes) -> bool:
        if self._release < (10,) and not self._network.flags & 1:
            self._log.log(_Logger.ERROR, "ModelImporter: this version only supports networks with an explicit batch")
            return False
        model = onnx.load_from_string(data)
        for index, node in enumerate(model.graph.node):
            if node.op_type in _REFUSED:
                self._errors.append(_error(self._release, index, node))
            more = ["_7"] if node.op_type == "Relu" else []
            self._network.layers += [SimpleNamespace(name=node.name + end, precision=None) for end in ["", *more]]
        self._network.model = data
        return not self._errors


def _error(release: tuple[int, ...], index: int, node: Any) -> Any:
    """With the node's name and operator from 10 on, before only by index; in 8 a missing operator is a plugin."""
    if release < (10,):
        desc = 'creator && "Plugin not found, are the plugin name, version, and namespace correct?"'
        return SimpleNamespace(code=lambda: "ErrorCode.INVALID_NODE", desc=lambda: desc, node=lambda: index)
    return SimpleNamespace(
        code=lambda: "ErrorCode.UNSUPPORTED_NODE",
        desc=lambda: "false",
        node=lambda: index,
        node_name=lambda: node.name,
        node_operator=lambda: node.op_type,
    )


class _Runtime:
    def __init__(self, release: tuple[int, ...], log: Any, cuda: Cuda) -> None:
        self._release, self._log, self._cuda = release, log, cuda

    def deserialize_cuda_engine(self, data: bytes) -> Any:
        head, _, model = bytes(data).partition(b"\n")
        if tuple(json.loads(head)["version"]) != self._release:
            self._log.log(_Logger.ERROR, "The engine plan file is not compatible with this version of TensorRT")
            return None
        return _engine(self._release, model, self._cuda)


def _engine(release: tuple[int, ...], model: bytes, cuda: Cuda) -> Any:
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    types = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}
    ends = [(one.name, True, tuple(one.shape), types[one.type]) for one in session.get_inputs()]
    ends += [(one.name, False, tuple(one.shape), types[one.type]) for one in session.get_outputs()]
    held = [(*end[:3], np.int32 if end[3] is np.int64 and release < (10,) else end[3]) for end in ends]

    def execute(addresses: list[int]) -> bool:
        feeds = {}
        for (name, reads, shape, kind), (*_, wanted), address in zip(held, ends, addresses, strict=True):
            if reads:
                array = np.empty(shape, kind)
                cuda.download(array, address)
                feeds[name] = array.astype(wanted)
        results = session.run(None, feeds)
        for (_name, _reads, _shape, kind), address, result in zip(
            held[len(feeds) :], addresses[len(feeds) :], results, strict=True
        ):
            cuda.upload(address, np.ascontiguousarray(result, kind))
        return True

    engine, context = SimpleNamespace(), SimpleNamespace()
    engine.create_execution_context = lambda: context
    if release < (10,):
        engine.num_bindings = len(held)
        engine.get_binding_name = lambda index: held[index][0]
        engine.binding_is_input = lambda index: held[index][1]
        engine.get_binding_shape = lambda index: held[index][2]
        engine.get_binding_dtype = lambda index: held[index][3]
        context.execute_async_v2 = lambda bindings, stream_handle: execute(bindings)
    if release >= (8, 5):
        found = {end[0]: end for end in held}
        addresses: dict[str, int] = {}
        engine.num_io_tensors = len(held)
        engine.get_tensor_name = lambda index: held[index][0]
        engine.get_tensor_mode = lambda name: 1 if found[name][1] else 2
        engine.get_tensor_shape = lambda name: found[name][2]
        engine.get_tensor_dtype = lambda name: found[name][3]
        context.set_tensor_address = addresses.__setitem__
        context.execute_async_v3 = lambda stream: execute([addresses[end[0]] for end in held])
    return engine


def install(monkeypatch: Any, library: Any, cuda: Cuda) -> None:
    """Let the package find the stand-ins where it looks for the real ones."""
    monkeypatch.setitem(sys.modules, "tensorrt", library)
    monkeypatch.setattr("onnxsnp.deploy.local.open_cuda", lambda: cuda)
