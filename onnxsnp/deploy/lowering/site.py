"""What a lowering rule sees and writes: one node, its tensors' sizes, types and values, and the target."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto

from onnxsnp.deploy.operators import element_kinds, kind_of, takes
from onnxsnp.deploy.targets import Target
from onnxsnp.graph.ir import Graph, Namer, attribute
from onnxsnp.graph.writer import Writer

SINGLE = np.dtype(np.float32)


@dataclass(frozen=True)
class Facts:
    """What is known of a static graph's tensors.

    Attributes:
        shapes: size of every tensor.
        types: element types, as far as they are known.
        since: opset that the nodes were written in.
    """

    shapes: Mapping[str, tuple[int, ...]]
    types: Mapping[str, np.dtype]
    since: int


class Site(Writer):
    """One node under a rule; what a rule writes is in the opset of the lowered model (`opset`).

    Attributes:
        target: where the model will run.
        source: opset that the node was written in.
        alias: the tensor to read in place of the node's output, where that is one which is there already.
    """

    def __init__(self, graph: Graph, node: NodeProto, facts: Facts, target: Target, namer: Namer) -> None:
        super().__init__(graph, node, facts.shapes, SINGLE, namer)
        self.target, self.source, self._types = target, facts.since, facts.types
        self.alias = ""

    @property
    def data(self) -> str:
        """The first input."""
        return str(self.node.input[0])

    @property
    def output_name(self) -> str:
        """The first output."""
        return str(self.node.output[0])

    def attr(self, name: str, default: Any = None) -> Any:
        return attribute(self.node, name, default)

    def text(self, name: str, default: str) -> str:
        """A text attribute."""
        found = attribute(self.node, name)
        return default if found is None else bytes(found).decode()

    def shape(self, slot: int = 0) -> tuple[int, ...]:
        """Sizes of an input."""
        return self.shapes[self.node.input[slot]]

    def rank(self, slot: int = 0) -> int:
        return len(self.shape(slot))

    def value(self, slot: int) -> np.ndarray | None:
        """What an input always holds; None where it depends on the model's inputs, or is not given."""
        return self.held.get(self.node.input[slot]) if self.given(slot) else None

    def dtype(self, slot: int = 0) -> np.dtype:
        """Element type of an input; single precision where it is not known."""
        return self._types.get(self.node.input[slot], SINGLE)

    def takes(self, op: str, dtype: np.dtype | None = None) -> bool:
        """Whether the target's importer takes an operator, and the lowered model's opset has it."""
        taken = takes(op, self.target.tensorrt) and onnx.defs.has(op, self.opset)
        return taken and (dtype is None or kind_of(dtype) in element_kinds(op, self.target.tensorrt))

    def add(self, op: str, *inputs: str, into: str = "", **attributes: Any) -> str:
        """Append a node; what gives the output by the same operator keeps the name too."""
        if op != self.node.op_type or into != self.output_name:
            return super().add(op, *inputs, into=into, **attributes)
        self.emit(op, inputs, [into], self.node.name, **attributes)
        return into

    def again(self, *inputs: str, **attributes: Any) -> None:
        """The same operator with other inputs and attributes, all outputs as they were."""
        self.emit(self.node.op_type, inputs, list(self.node.output), name=self.node.name, **attributes)

    def emit(self, op: str, inputs: Any, outputs: list[str], name: str = "", **attributes: Any) -> None:
        """Append a node with several outputs, or under a name that is not new."""
        made = onnx.helper.make_node(op, list(inputs), outputs, name=name or self._namer(f"{self.node.name}.{op}"))
        made.attribute.extend(onnx.helper.make_attribute(key, value) for key, value in sorted(attributes.items()))
        self.nodes.append(made)

    def settings(self, *dropped: str) -> dict[str, Any]:
        """The node's attributes but for some."""
        return {
            entry.name: onnx.helper.get_attribute_value(entry)
            for entry in self.node.attribute
            if entry.name not in dropped
        }

    def reshape(self, tensor: str, sizes: Any, into: str = "") -> str:
        """Reshape to known sizes, none of which is 0."""
        return self.add("Reshape", tensor, self.integers([int(size) for size in sizes]), into=into)

    def reduce(self, op: str, tensor: str, axes: Any, keepdims: bool = True, into: str = "") -> str:
        """A reduction over axes, in the form that the opset and the importer agree on.

        Importers before 10 read the axes of every reduction but ReduceSum from the attribute alone; without it they
        reduce over all axes and say nothing (onnx2trt_utils.cpp, reduceTensor). ReduceSum has its axes as input from
        opset 13 on, and there they do read it.
        """
        named = [int(axis) for axis in axes]
        if self.opset >= (13 if op == "ReduceSum" else 18):
            return self.add(op, tensor, self.integers(named), into=into, keepdims=int(keepdims))
        return self.add(op, tensor, into=into, axes=named, keepdims=int(keepdims))


Rule = Callable[[Site], str | None]
"""Rewrites a node: what is written goes to the site; returns why, or None where the node stays as it is."""
