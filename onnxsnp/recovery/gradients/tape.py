"""What the rules write to: backward nodes, constants, and the gradients that have been found so far."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import numpy as np
from numpy.typing import DTypeLike
from onnx import NodeProto, helper

from onnxsnp.graph.ir import Graph, Namer

Shape = tuple[int, ...]


class NoRuleError(Exception):
    """A variant of an operator through which no gradient is passed; the message says what it has."""


class Tape:
    """Collects the backward nodes of one graph.

    Args:
        graph: the forward graph; its tensors can be read by backward nodes.
        shapes: size of every tensor of it.
        wanted: tensors whose gradients lead to a parameter.
    """

    def __init__(self, graph: Graph, shapes: Mapping[str, Shape], wanted: set[str]) -> None:
        self.shapes, self.opset, self.held, self.wanted = shapes, graph.opset, graph.weights, wanted
        self.nodes: list[NodeProto] = []
        self.weights: dict[str, np.ndarray] = {}
        self.prefix = ""
        self._namer = Namer(graph.names())
        self._found: dict[str, list[str]] = {}
        self._numbers: dict[tuple[bytes, str, Shape], str] = {}

    # ------------------------------------------------------------------------------------------------------- gradients

    def wants(self, name: str) -> bool:
        """Whether the gradient of a tensor is needed."""
        return name in self.wanted

    def give(self, name: str, gradient: str, shape: Shape | None = None) -> None:
        """Add to a tensor's gradient.

        Args:
            shape: of `gradient` where it differs from the tensor's, which was broadcast to it.
        """
        if not self.wants(name):
            return
        if shape is not None and shape != self.shapes[name]:
            gradient = self.unbroadcast(gradient, shape, self.shapes[name])
        self._found.setdefault(name, []).append(gradient)

    def gradient(self, name: str) -> str:
        """The sum of what was given for a tensor; empty if nothing was."""
        parts = self._found.get(name, [])
        if len(parts) > 1:
            self._found[name] = parts = [self.add("Sum" if len(parts) > 2 else "Add", *parts)]
        return parts[0] if parts else ""

    # ----------------------------------------------------------------------------------------------------------- nodes

    def add(self, op: str, *inputs: str, **attributes: Any) -> str:
        """Append a node with one output; returns the output's name."""
        return self.several(op, 1, *inputs, **attributes)[0]

    def several(self, op: str, count: int, *inputs: str, **attributes: Any) -> list[str]:
        """Append a node with several outputs."""
        name = self._namer(f"{self.prefix}{op}")
        outputs = [self._namer(f"{name}.{index}") if count > 1 else name for index in range(count)]
        self.nodes.append(helper.make_node(op, list(inputs), outputs, name=name, **attributes))
        return outputs

    def constant(self, value: Any, dtype: DTypeLike = np.float32) -> str:
        """A weight that holds a value; equal ones are one."""
        array = np.asarray(value, dtype)
        key = (array.tobytes(), array.dtype.str, array.shape)
        if key not in self._numbers:
            self._numbers[key] = self._namer("constant")
            self.weights[self._numbers[key]] = array
        return self._numbers[key]

    def integers(self, values: Sequence[int]) -> str:
        return self.constant(values, np.int64)

    def scaled(self, tensor: str, factor: float) -> str:
        return tensor if factor == 1.0 else self.add("Mul", tensor, self.constant(factor))

    def reshape(self, tensor: str, shape: Sequence[int]) -> str:
        return self.add("Reshape", tensor, self.integers(shape))

    def transpose(self, tensor: str, order: Sequence[int]) -> str:
        return tensor if list(order) == sorted(order) else self.add("Transpose", tensor, perm=list(order))

    def filled(self, shape: Sequence[int], value: float = 0.0) -> str:
        """A tensor of one number, that the model need not hold."""
        return self.add("Expand", self.constant(value), self.integers(shape))

    def mask(self, condition: str, tensor: str) -> str:
        """The tensor where a condition holds, 0 elsewhere."""
        return self.add("Where", condition, tensor, self.constant(0.0))

    # ------------------------------------------------------------------------------------------------------ reductions

    def sum(self, tensor: str, axes: Sequence[int], keep: bool = True) -> str:
        if self.opset < 13:
            return self.add("ReduceSum", tensor, axes=list(axes), keepdims=int(keep))
        return self.add("ReduceSum", tensor, self.integers(axes), keepdims=int(keep))

    def column_sums(self, tensor: str) -> str:
        """Sums over the rows of a matrix [rows, columns], as [1, columns]."""
        return self.sum(tensor, [0])

    def unbroadcast(self, gradient: str, shape: Shape, target: Shape) -> str:
        """Sum over the axes along which a tensor of shape `target` was repeated."""
        padded = (1,) * (len(shape) - len(target)) + target
        axes = [axis for axis, size in enumerate(padded) if size != shape[axis]]
        if not axes:
            return self.reshape(gradient, target)
        kept = [axis for axis in range(len(shape)) if axis not in axes and shape[axis] > 1]
        if not kept or min(kept) > max(axes):  # only leading axes: the sums of a matrix's columns
            rows = prod(shape[: max(axes) + 1])
            matrix = self.reshape(gradient, [rows, prod(shape) // max(rows, 1)])
            return self.reshape(self.column_sums(matrix), target)
        return self.reshape(self.sum(gradient, axes), target)

    # ------------------------------------------------------------------------------------------- operators with history

    def slice(self, tensor: str, starts: Sequence[int], ends: Sequence[int], axes: Sequence[int]) -> str:
        return self.add("Slice", tensor, self.integers(starts), self.integers(ends), self.integers(axes))

    def pad(self, tensor: str, before: Sequence[int], after: Sequence[int]) -> str:
        """Zeros around a tensor; negative numbers cut entries off."""
        cut = [axis for axis, ends in enumerate(zip(before, after, strict=True)) if min(ends) < 0]
        if cut:
            starts, ends = ([max(-side[axis], 0) for axis in cut] for side in (before, after))
            tensor = self.slice(tensor, starts, [-end or 2**62 for end in ends], cut)
        pads = [max(size, 0) for size in (*before, *after)]
        return self.add("Pad", tensor, self.integers(pads)) if any(pads) else tensor

    def scatter_rows(self, rows: str, indices: str, count: int, width: int, entries: int) -> str:
        """Rows [entries, width] added up in a table [count, width], each at its index."""
        where = self.reshape(indices, [entries, 1])
        if self.opset >= 16:
            return self.add("ScatterND", self.filled([count, width]), where, rows, reduction="add")
        flat = self.add("Cast", self.reshape(indices, [entries]), to=7)
        chosen = self.add("OneHot", flat, self.constant(count, np.int64), self.constant([0.0, 1.0]), axis=-1)
        return self.add("Gemm", chosen, rows, transA=1)
