"""Engines with the TensorRT and the GPU of this machine.

The same few calls differ between the releases that are in use: below 10 networks are explicitly batched by a flag, from
11 on they are strongly typed and know no flag for fp16; the workspace was an attribute until 8.3 and is a memory pool
since 8.4. An engine is valid for the release and the GPU it was built with, so a target has to be what is here.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import onnx

from onnxsnp.deploy.cuda import Cuda, Gpu, open_cuda
from onnxsnp.deploy.importer import Built, Progress, failed_build, import_model, open_log, version_of, watch
from onnxsnp.deploy.targets import Target
from onnxsnp.errors import ModelError, OnnxSnpError, PlanError

MODULE = "tensorrt"
HOW = (
    "on a GPU machine: pip install onnxsnp[tensorrt] (on a Jetson it comes with JetPack); "
    "without a GPU: --backend bundle"
)
_WORKSPACE = 512 << 20  # bytes; before 8.4 the default is 16 MB, with which many layers find no kernel
_ADVICE = {"out of memory": "close other programs, or use --precision fp16"}


def load() -> Any:
    """The module of TensorRT.

    Raises:
        ModelError: it is not installed, or does not load; says how to get it.
    """
    try:
        return import_module(MODULE)
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == MODULE
        why = "TensorRT is not installed" if missing else f"TensorRT is installed, but does not load: {error}"
        raise ModelError(why, hint=HOW) from error


def misfit(target: Target, version: tuple[int, ...], gpu: Gpu) -> str:
    """Why an engine made here is none for a target; empty if it is one."""
    here = f"this machine has TensorRT {_text(version[:3])} and {gpu.name}, compute capability " + _text(
        gpu.compute_capability
    )
    if target.runtime != "tensorrt":
        return f"{target.name} takes engines of {target.runtime}"
    exact = target.compute_capability is not None  # a device, not any machine with such a release
    same = version[:2] == target.tensorrt[:2] if exact else version[:1] == target.tensorrt[:1]
    if not same or version[:2] < target.tensorrt[:2]:
        return f"{here}; {target.name} needs TensorRT {_text(target.tensorrt)}"
    if exact and target.compute_capability != gpu.compute_capability:
        return f"{here}; {target.name} has {_text(target.compute_capability or ())}"
    return ""


def fits(target: Target) -> bool:
    """Whether TensorRT and a GPU are here, and an engine made with them is one for the target."""
    try:
        return not misfit(target, version_of(load()), open_cuda().gpu())
    except OnnxSnpError:
        return False


def require(target: Target) -> tuple[Any, Cuda]:
    """TensorRT and the GPU of this machine.

    Raises:
        ModelError: one of them is missing.
        PlanError: an engine made with them is none for the target.
    """
    library, cuda = load(), open_cuda()
    why = misfit(target, version_of(library), cuda.gpu())
    if why:
        raise PlanError(
            f"an engine is valid only for the TensorRT and the GPU it is built with: {why}",
            hint="use --backend bundle, and build on the device",
        )
    return library, cuda


def build(
    library: Any,
    proto: onnx.ModelProto,
    precision: str,
    progress: Progress | None = None,
    keep_fp32: Sequence[str] = (),
) -> Built:
    """Build an engine from a lowered model.

    Args:
        library: the module of TensorRT.
        proto: static shapes, weights inside.
        precision: "fp32" or "fp16".
        progress: called as ("build", done, total), from TensorRT 8.6 on.
        keep_fp32: nodes that stay in single precision in fp16 (TensorRT 8.4 to 10).

    Raises:
        ModelError: the library does not take the model, or cannot build here; names the node.
    """
    version = version_of(library)
    name = f"TensorRT {library.__version__}"
    start = time.perf_counter()
    log = open_log(library)
    builder = library.Builder(log)
    network = builder.create_network(_flags(library, version))
    parser = import_model(library, network, log, proto, name)
    config = builder.create_builder_config()
    if version < (8, 4):
        config.max_workspace_size = _WORKSPACE
    if precision == "fp16" and version < (11,):  # from 11 on the types of the model say it
        config.set_flag(library.BuilderFlag.FP16)
        if keep_fp32:
            config.set_flag(library.BuilderFlag.OBEY_PRECISION_CONSTRAINTS)
            _keep(library, network, set(keep_fp32))
    if precision == "fp32":
        config.clear_flag(library.BuilderFlag.TF32)  # which has the mantissa of fp16, and is on unless it is taken off
    watch(library, config, progress)
    data = builder.build_serialized_network(network, config)
    del parser  # it owns the weights that the network refers to
    if data is None:
        raise failed_build(log, name, _ADVICE)
    return Built(bytes(data), name, (), time.perf_counter() - start)


def _keep(library: Any, network: Any, names: set[str]) -> None:
    """Single precision for the layers of some nodes; a node's further layers carry its name and a number."""
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.name in names or re.sub(r"_\d+$", "", layer.name) in names:
            layer.precision = library.float32


def _flags(library: Any, version: tuple[int, ...]) -> int:
    kinds = library.NetworkDefinitionCreationFlag
    if version < (10,):
        return 1 << int(kinds.EXPLICIT_BATCH)
    return 1 << int(kinds.STRONGLY_TYPED) if version >= (11,) else 0


def _text(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
