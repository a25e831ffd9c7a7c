"""Writes the plain nodes that take the place of one fused node."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import pi, sqrt
from typing import Any

import numpy as np
from numpy.typing import DTypeLike
from onnx import NodeProto, helper

from onnxsnp.graph.ir import Graph, Namer


class LeftAloneError(Exception):
    """A variant of a fused operator that is not spelled out; the message says what it has."""


class Writer:
    """Collects nodes and constants; nothing reaches the graph before the whole operator is written.

    Args:
        graph: what the node is part of.
        node: the node to be replaced.
        shapes: size of every tensor.
        dtype: element type of the floating-point constants.
    """

    def __init__(
        self, graph: Graph, node: NodeProto, shapes: Mapping[str, tuple[int, ...]], dtype: np.dtype, namer: Namer
    ) -> None:
        self.node, self.shapes, self.opset, self.held = node, shapes, graph.opset, graph.weights
        self.nodes: list[NodeProto] = []
        self.weights: dict[str, np.ndarray] = {}
        self._dtype, self._namer = dtype, namer

    def given(self, slot: int) -> bool:
        """Whether the node has an input there."""
        return len(self.node.input) > slot and bool(self.node.input[slot])

    def output(self, slot: int) -> str:
        """Name of one of the node's outputs, empty if it is not wanted."""
        return self.node.output[slot] if len(self.node.output) > slot else ""

    def add(self, op: str, *inputs: str, into: str = "", **attributes: Any) -> str:
        """Append a node; its output is `into`, or gets a name of its own."""
        name = self._namer(f"{self.node.name}.{op}")
        output = into or name
        self.nodes.append(helper.make_node(op, list(inputs), [output], name=name, **attributes))
        return output

    def constant(self, value: np.ndarray) -> str:
        name = self._namer(f"{self.node.name}.constant")
        self.weights[name] = value
        return name

    def number(self, value: float) -> str:
        """A scalar of the node's floating-point type."""
        return self.constant(np.asarray(value, self._dtype))

    def lowest(self) -> str:
        """The smallest finite number of the node's floating-point type."""
        return self.number(float(np.finfo(np.float16 if self._dtype == np.float16 else np.float32).min))

    def whole(self, value: int) -> str:
        return self.constant(np.asarray(value, np.int64))

    def integers(self, values: Sequence[int], dtype: DTypeLike = np.int64) -> str:
        return self.constant(np.asarray(values, dtype))

    def cast(self, tensor: str, dtype: DTypeLike) -> str:
        return self.add("Cast", tensor, to=helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))

    # ---------------------------------------------------------------------------- operators that changed with the opset

    def unsqueeze(self, tensor: str, axes: Sequence[int]) -> str:
        if self.opset < 13:
            return self.add("Unsqueeze", tensor, axes=list(axes))
        return self.add("Unsqueeze", tensor, self.integers(axes))

    def split(self, tensor: str, sizes: Sequence[int], axis: int) -> list[str]:
        """Consecutive parts of an axis."""
        name = self._namer(f"{self.node.name}.Split")
        outputs = [self._namer(f"{name}.{index}") for index in range(len(sizes))]
        if self.opset < 13:
            made = helper.make_node("Split", [tensor], outputs, name=name, axis=axis, split=list(sizes))
        else:
            made = helper.make_node("Split", [tensor, self.integers(sizes)], outputs, name=name, axis=axis)
        self.nodes.append(made)
        return outputs

    def size_of(self, tensor: str, axis: int) -> str:
        """One size of a tensor, as a scalar."""
        return self.add("Gather", self.add("Shape", tensor), self.whole(axis), axis=0)

    def reduce_sum(self, tensor: str, axis: int, into: str = "") -> str:
        if self.opset < 13:
            return self.add("ReduceSum", tensor, into=into, axes=[axis], keepdims=0)
        return self.add("ReduceSum", tensor, self.integers([axis]), into=into, keepdims=0)

    def mean(self, tensor: str, into: str = "") -> str:
        """Mean over the last axis, which stays with size 1."""
        if self.opset < 18:
            return self.add("ReduceMean", tensor, into=into, axes=[-1])
        return self.add("ReduceMean", tensor, self.integers([-1]), into=into)

    # -------------------------------------------------------------------------------------- functions in ONNX terms

    def gelu(self, tensor: str, *, tanh: bool = False, into: str = "") -> str:
        """x Φ(x), with Φ through erf, or approximated through tanh (arXiv 1606.08415).

        Without tanh in the order of operators that onnxruntime fuses again.
        """
        if self.opset >= 20:
            return self.add("Gelu", tensor, into=into, approximate="tanh" if tanh else "none")
        if tanh:
            cube = self.add("Mul", self.add("Mul", tensor, tensor), tensor)
            inner = self.add("Add", tensor, self.add("Mul", cube, self.number(0.044715)))
            bent = self.add("Tanh", self.add("Mul", inner, self.number(sqrt(2 / pi))))
        else:
            bent = self.add("Erf", self.add("Div", tensor, self.number(sqrt(2))))
        twice = self.add("Mul", tensor, self.add("Add", bent, self.number(1.0)))
        return self.add("Mul", twice, self.number(0.5), into=into)

    def layer_norm(self, tensor: str, gamma: str, beta: str, epsilon: float, *, into: str = "") -> str:
        """(x − E x) / √(Var x + ε) · γ + β over the last axis, in an order that onnxruntime fuses again."""
        if self.opset >= 17:
            named = [tensor, gamma, beta] if beta else [tensor, gamma]
            return self.add("LayerNormalization", *named, into=into, axis=-1, epsilon=epsilon)
        centred = self.add("Sub", tensor, self.mean(tensor))
        scaled = self.rms_norm(centred, gamma, epsilon, into="" if beta else into)
        return self.add("Add", scaled, beta, into=into) if beta else scaled

    def rms_norm(self, tensor: str, gamma: str, epsilon: float, *, into: str = "") -> str:
        """x / √(E x² + ε) · γ over the last axis (arXiv 1910.07467, eq. 4); squares of half precision in single."""
        half = self._dtype.itemsize == 2
        data = self.cast(tensor, np.float32) if half else tensor
        square = self.mean(self.add("Pow", data, self.constant(np.asarray(2, np.float32 if half else self._dtype))))
        small = self.constant(np.asarray(epsilon, np.float32 if half else self._dtype))
        unit = self.add("Div", data, self.add("Sqrt", self.add("Add", square, small)))
        return self.add("Mul", self.cast(unit, self._dtype) if half else unit, gamma, into=into)
