"""Models of one fused operator, and what its plain form must satisfy."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import helper

from onnxsnp.graph.expand import EXPANSIONS, expand
from onnxsnp.graph.ir import Graph
from onnxsnp.graph.normalize import as_graph
from onnxsnp.graph.probe import probe
from onnxsnp.model import load

MICROSOFT = "com.microsoft"
RNG = np.random.default_rng(0)


def noise(*shape: int, dtype: str = "f4") -> np.ndarray:
    return RNG.standard_normal(shape).astype(dtype)


def model_of(
    op: str,
    feeds: dict[str, np.ndarray],
    weights: dict[str, np.ndarray],
    inputs: list[str],
    outputs: int | list[str] = 1,
    opset: int = 17,
    domain: str = MICROSOFT,
    **attributes: Any,
) -> onnx.ModelProto:
    """One fused node between the model's inputs and outputs; free sizes are those of the feeds."""
    names = [f"out{index}" for index in range(outputs)] if isinstance(outputs, int) else outputs
    node = helper.make_node(op, inputs, names, name="fused", domain=domain, **attributes)
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info(k, helper.np_dtype_to_tensor_dtype(v.dtype), v.shape) for k, v in feeds.items()],
        [onnx.ValueInfoProto(name=name) for name in names if name],
        [onnx.numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    imports = [helper.make_opsetid("", opset), helper.make_opsetid(MICROSOFT, 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=8)


def expanded(model: onnx.ModelProto) -> Graph:
    graph = as_graph(load(model))
    expand(graph, probe(graph).shapes)
    return graph


def assert_same(model: onnx.ModelProto, feeds: dict[str, np.ndarray], tolerance: float = 2e-6) -> Graph:
    """The fused node is gone, what is there is ONNX, and the outputs are onnxruntime's."""
    graph = expanded(model)
    assert not graph.unexpanded
    left = {(node.domain, node.op_type) for node in graph.nodes} & EXPANSIONS.keys()
    assert left <= {("", "LayerNormalization")}
    wanted = as_graph(load(model)).session(optimize=False).run(None, feeds)
    got = graph.session(optimize=False).run(None, feeds)
    for value, one, two in zip(graph.shell.graph.output, wanted, got, strict=True):
        assert one.shape == two.shape
        assert one.dtype == two.dtype
        largest = max(1, np.abs(one).max())
        np.testing.assert_allclose(two.astype("f8"), one.astype("f8"), rtol=0, atol=tolerance * largest)
        kind = helper.np_dtype_to_tensor_dtype(one.dtype)
        value.CopyFrom(helper.make_tensor_value_info(value.name, kind, one.shape))
    onnx.checker.check_model(graph.skeleton(), full_check=True)
    return graph
