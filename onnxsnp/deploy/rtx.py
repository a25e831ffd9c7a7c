"""Engines for GeForce RTX with TensorRT for RTX, which builds without a GPU.

An engine made here is an RTX engine: it runs with TensorRT for RTX of the same version on a GPU of compute capability
7.5, 8.0, 8.6, 8.9 or 12, and on no Jetson. Unless a compute capability is asked for, it takes any of 8.0 and later, and
is finished on the GPU when it is loaded. Networks are strongly typed: what precision a layer computes in is what the
model says.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import onnx

from onnxsnp.deploy.importer import Built, Progress, failed_build, import_model, open_log, watch
from onnxsnp.errors import ModelError, PlanError

MODULE = "tensorrt_rtx"
NOTE = "this is an RTX engine, not a Jetson engine; building it takes no GPU, and it was not run here"
_ADVICE = {"FP32 GEMM is not supported": "GPUs of compute capability 7.5 need --precision fp16"}


def load() -> Any:
    """The module of TensorRT for RTX.

    Raises:
        ModelError: it is not installed; says how to get it.
    """
    try:
        return import_module(MODULE)
    except ImportError as error:
        raise ModelError(
            "TensorRT for RTX is not installed", hint="pip install tensorrt-rtx (no GPU is needed), or --backend bundle"
        ) from error


def build(
    proto: onnx.ModelProto,
    *,
    compute_capabilities: Sequence[tuple[int, ...]] = (),
    progress: Progress | None = None,
) -> Built:
    """Build an engine from a lowered model.

    Args:
        proto: static shapes, weights inside.
        compute_capabilities: of the GPUs it is for, (8, 9) for instance; any from 8.0 on if none is given.
        progress: called as ("build", done, total).

    Raises:
        ModelError: the library is missing, or does not take the model; names the node.
        PlanError: a compute capability that the library does not build for.
    """
    library = load()
    name = f"TensorRT for RTX {library.__version__}"
    start = time.perf_counter()
    log = open_log(library)
    builder = library.Builder(log)
    network = builder.create_network(1 << int(library.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = import_model(library, network, log, proto, name)
    config = builder.create_builder_config()
    wanted = [_capability(library, one) for one in compute_capabilities]
    if wanted:
        config.num_compute_capabilities = len(wanted)
        for index, one in enumerate(wanted):
            config.set_compute_capability(one, index)
    watch(library, config, progress)
    data = builder.build_serialized_network(network, config)
    del parser  # it owns the weights that the network refers to
    if data is None:
        raise failed_build(log, name, _ADVICE)
    return Built(
        bytes(data),
        name,
        tuple(".".join(map(str, one)) for one in compute_capabilities),
        time.perf_counter() - start,
    )


def _capability(library: Any, version: tuple[int, ...]) -> Any:
    wanted = "SM" + "".join(map(str, version))
    known = {
        one: getattr(library.ComputeCapability, one) for one in dir(library.ComputeCapability) if one.startswith("SM")
    }
    if wanted not in known:
        listed = ", ".join(f"{one[2:-1]}.{one[-1]}" for one in sorted(known, key=lambda one: int(one[2:])))
        raise PlanError(
            f"TensorRT for RTX builds for no GPU of compute capability {'.'.join(map(str, version))}",
            hint=f"it knows {listed}; for a Jetson use its own target",
        )
    return known[wanted]
