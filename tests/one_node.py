"""Models of one ONNX operator, and what they must be once they are lowered for a target."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from onnxsnp.deploy.importer import import_model, open_log
from onnxsnp.deploy.lint import lint
from onnxsnp.deploy.lower import lower
from onnxsnp.deploy.parity import parity
from onnxsnp.deploy.targets import BUILT_IN, Target
from onnxsnp.graph.ir import Graph
from onnxsnp.graph.normalize import as_graph
from onnxsnp.model import load

TARGETS = ("jetson-nano", "jetson-xavier", "tensorrt-8.6", "jetson-orin")


def noise(*shape: int, dtype: str = "f4", seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)


def node_model(
    op: str,
    feeds: Mapping[str, np.ndarray],
    weights: Mapping[str, np.ndarray] | None = None,
    *,
    inputs: list[str] | None = None,
    outputs: list[str] | None = None,
    opset: int = 17,
    domain: str = "",
    **attributes: Any,
) -> onnx.ModelProto:
    """One node named `node` between the model's inputs, in their order, and outputs whose types come from a run."""
    weights = weights or {}
    names = outputs or ["y"]
    made = helper.make_node(op, inputs or [*feeds, *weights], names, name="node", domain=domain, **attributes)
    graph = helper.make_graph(
        [made],
        "one",
        [_value(name, array) for name, array in feeds.items()],
        [onnx.ValueInfoProto(name=name) for name in names if name],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    imports = [helper.make_opsetid("", opset)] + ([helper.make_opsetid(domain, 1)] if domain else [])
    model = helper.make_model(graph, opset_imports=imports, ir_version=8)
    for value, array in zip(model.graph.output, run(model, feeds), strict=True):
        value.CopyFrom(_value(value.name, array))
    return model


def run(model: onnx.ModelProto, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    graph: Graph = as_graph(load(model))
    return graph.session(optimize=False).run(graph.outputs, feeds)


def ops(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


def assert_lowered(
    model: onnx.ModelProto, feeds: Mapping[str, np.ndarray], target: str | Target = "jetson-nano"
) -> onnx.ModelProto:
    """Lowered it is valid, taken by the importer, of the same sizes and types, and computes the same."""
    profile = BUILT_IN[target] if isinstance(target, str) else target
    lowered = lower(model, profile).proto
    onnx.checker.check_model(lowered, full_check=True)
    assert [str(one) for one in lint(lowered, profile) if one.severity == "error"] == []
    found = parity(model, lowered, feeds)
    assert found.passed, found
    return lowered


def assert_imported(model: onnx.ModelProto) -> None:
    """The importer of TensorRT for RTX, where it is installed, reads the model; it needs no GPU."""
    if find_spec("tensorrt_rtx") is None:
        return
    library, log, builder = _rtx()
    log.errors.clear()
    network = builder.create_network()
    parser = import_model(library, network, log, model, "TensorRT for RTX")
    assert network.num_layers and parser.num_errors == 0


@functools.cache
def _rtx() -> tuple[Any, Any, Any]:
    import tensorrt_rtx

    log = open_log(tensorrt_rtx)
    return tensorrt_rtx, log, tensorrt_rtx.Builder(log)


def _value(name: str, array: np.ndarray) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
