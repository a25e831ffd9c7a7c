"""Random chains of operators, run one by one as they are added, so that the next step knows shapes and values.

A chain is at the same time a model (its source an input, its weights initializers) and a record of what every tensor
was, which is all that is needed to ask each operator what it does to a single neuron of any of its operands.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import NodeProto, helper, numpy_helper

from onnxsnp.graph.ir import Graph
from onnxsnp.graph.normalize import as_graph
from onnxsnp.model import load

_IR = {9: 4, 12: 7, 17: 8, 24: 11}
OPSETS = tuple(_IR)


class Chain:
    """Nodes, weights and the values of all tensors.

    Attributes:
        free: the leading axis is a batch of any size, which no step may touch.
        first: the first axis that steps may touch.
    """

    def __init__(self, opset: int, free: bool, seed: int = 0) -> None:
        self.opset, self.free, self.first = opset, free, int(free)
        self.rng = np.random.default_rng(seed)
        self.nodes: list[NodeProto] = []
        self.weights: dict[str, np.ndarray] = {}
        self.inputs: list[str] = []
        self.values: dict[str, np.ndarray] = {}
        self.uses: dict[str, int] = {}  # operators that steps were to show, and how often they did

    def source(self, *shape: int) -> str:
        """An input of random numbers; its first axis is the batch."""
        name = f"x{len(self.inputs)}"
        self.inputs.append(name)
        self.values[name] = self.rng.standard_normal(shape).astype(np.float32)
        return name

    def weight(self, *shape: int, scale: float | None = None, shift: float = 0.0) -> str:
        """A random weight; divided by the root of its first size unless told otherwise."""
        scale = (shape[0] ** -0.5 if len(shape) > 1 else 0.5) if scale is None else scale
        return self.constant((self.rng.standard_normal(shape) * scale + shift).astype(np.float32))

    def constant(self, array: Any) -> str:
        """Any array; Python numbers become 64-bit integers or single precision."""
        array = np.asarray(array)
        array = array.astype({"i": np.int64, "f": np.float32}.get(array.dtype.kind, array.dtype))
        name = f"w{len(self.weights)}"
        self.weights[name] = self.values[name] = array
        return name

    def shape(self, name: str) -> tuple[int, ...]:
        return self.values[name].shape

    def rank(self, name: str) -> int:
        return self.values[name].ndim

    def size(self, name: str) -> int:
        return self.values[name].size

    def add(self, op: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:
        """Append a node and run it; returns its output's name, or a list where there are several."""
        count = len(self.nodes)
        names = [f"t{count}" if index == 0 else f"t{count}.{index}" for index in range(outputs)]
        node = helper.make_node(op, list(inputs), names, name=f"{op}_{count}", **attributes)
        found = run_nodes([node], self.values, self.opset)
        self.nodes.append(node)
        self.values.update(zip(names, found, strict=True))
        return names[0] if outputs == 1 else names

    def reshape(self, name: str, *sizes: int) -> str:
        """A Reshape; a free batch is copied by 0."""
        return self.add("Reshape", name, self.constant([0, *sizes[1:]] if self.free else list(sizes)))

    def squeeze(self, name: str, axis: int) -> str:
        return self._on_axes("Squeeze", name, axis, 13)

    def unsqueeze(self, name: str, axis: int) -> str:
        return self._on_axes("Unsqueeze", name, axis, 13)

    def _on_axes(self, op: str, name: str, axis: int, since: int, **more: Any) -> str:
        if self.opset >= since:
            return self.add(op, name, self.constant([axis]), **more)
        return self.add(op, name, axes=[axis], **more)

    def reduce(self, op: str, name: str, axis: int, keepdims: int = 1) -> str:
        return self._on_axes(op, name, axis, 13 if op == "ReduceSum" else 18, keepdims=keepdims)

    def calm(self, name: str) -> str:
        """The same in the range of ordinary activations; numbers that grow would drown round-off or be infinite."""
        values = self.values[name]
        top = float(np.abs(values).max()) if values.size else 1.0
        return self.add("Mul", name, self.constant(2.0 / top)) if top > 30 or 0 < top < 0.05 else name

    def graph(self) -> Graph:
        """The chain in the form the analysis reads, as it stands: nothing folded."""
        return as_graph(load(self.model(*(name for node in self.nodes for name in node.output))))

    def model(self, *outputs: str) -> onnx.ModelProto:
        """The chain as a model; its batch is symbolic if it is free."""

        def info(name: str) -> onnx.ValueInfoProto:
            sizes: list[Any] = list(self.shape(name))
            sizes[:1] = ["N"] if self.free and sizes else sizes[:1]
            return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(self.values[name].dtype), sizes)

        held = [numpy_helper.from_array(array, name) for name, array in self.weights.items()]
        ends = list(map(info, self.inputs)), list(map(info, outputs))
        graph = helper.make_graph(self.nodes, "chain", *ends, held)
        return helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=_IR[self.opset]
        )

    def feed(self, batch: int | None = None, seed: int = 1) -> dict[str, np.ndarray]:
        """Other inputs, of another batch if one is given."""
        rng = np.random.default_rng(seed)
        shapes = {name: list(self.shape(name)) for name in self.inputs}
        for shape in shapes.values():
            shape[:1] = [batch] if batch else shape[:1]
        return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def session_of(nodes: Sequence[NodeProto], feeds: Mapping[str, np.ndarray], opset: int) -> ort.InferenceSession:
    """Nodes whose operands are all fed, run as they are."""
    inputs = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
        for name, value in feeds.items()
    ]
    outputs = [onnx.ValueInfoProto(name=name) for node in nodes for name in node.output]
    model = helper.make_model(
        helper.make_graph(nodes, "g", inputs, outputs),
        opset_imports=[helper.make_opsetid("", opset)],
        ir_version=_IR[opset],
    )
    return ort.InferenceSession(model.SerializeToString(), _options(), providers=["CPUExecutionProvider"])


@functools.cache
def _options() -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    return options


def run_nodes(nodes: Sequence[NodeProto], values: Mapping[str, np.ndarray], opset: int) -> list[np.ndarray]:
    """Outputs of nodes that read nothing but known values. Small integers are constants, as some operators want."""
    feeds = {name: values[name] for node in nodes for name in node.input if name}
    return session_of(nodes, feeds, opset).run(None, feeds)
