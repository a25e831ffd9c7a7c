"""Projections that end a branch of a residual network: what they add to, and where the sum comes out.

The refit behind a cut can correct more than its own branch: what the residual stream lacks at this place, whatever
earlier cut caused it, is visible in the sum (METHODS 2.4).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from onnx import NodeProto

from onnxsnp.graph.dependency import Dependencies
from onnxsnp.graph.ir import Graph, attribute
from onnxsnp.graph.linear import Linear

_PASSING = {"Identity", "Dropout", "Reshape", "Flatten", "Squeeze", "Unsqueeze"}


@dataclass(frozen=True)
class Branch:
    """stream = other + (x W + b) · scale.

    Attributes:
        linear: the projection.
        other: the activation it adds to.
        stream: the sum.
        scale: name of a constant of the projection's width (LayerScale), or None.
        order: how the axes are transposed on the way to the sum (the channels stay last), or None.
    """

    linear: Linear
    other: str
    stream: str
    scale: str | None = None
    order: tuple[int, ...] | None = None

    def rows(self, stream: np.ndarray) -> np.ndarray:
        """Values on the stream in the order in which the projection gives them, [tokens, channels]."""
        back = stream if self.order is None else stream.transpose(np.argsort(self.order))
        return back.reshape(-1, stream.shape[-1])

    def placed(self, rows: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """What the projection gives, [tokens, channels], in the shape of the stream."""
        if self.order is None:
            return rows.reshape(shape)
        return rows.reshape([shape[axis] for axis in np.argsort(self.order)]).transpose(self.order)


def find_branches(graph: Graph, dependencies: Dependencies, linears: Mapping[str, Linear]) -> list[Branch]:
    """Every projection that can be refitted to a residual stream, in the order of the graph.

    Between the projection and the sum only its bias, one constant scale per channel, reshapes that leave the channels
    alone and then one transpose that does are passed; every tensor on the way has one reader.
    """
    order = {node.name: index for index, node in enumerate(graph.nodes)}
    mine = sorted((linear for linear in linears.values() if linear.plain), key=lambda linear: order[linear.node])
    made = {name: index for index, node in enumerate(graph.nodes) for name in node.output}
    found, taken = [], -1
    for linear in mine:
        branch = _branch(linear, graph, dependencies)
        # a projection before the sum of the one before it, or into the same sum, would need inputs that are gone
        if branch is not None and order[linear.node] > taken:
            found.append(branch)
            taken = made[branch.stream]
    return found


def _branch(linear: Linear, graph: Graph, dependencies: Dependencies) -> Branch | None:
    shapes, readers = dependencies.facts.shapes, graph.readers()
    width = graph.weights[linear.weight].shape[linear.outer]
    projection = next(node for node in graph.nodes if node.name == linear.node)
    if linear.bias is None and len(projection.input) > 2 and projection.input[2]:
        return None  # a Gemm that adds something else than a bias
    name = projection.output[0]
    scale: str | None = None
    order: tuple[int, ...] | None = None
    while True:
        uses = [node for node, _ in readers.get(name, []) if node.op_type not in ("Shape", "Size")]
        if len(uses) != 1 or name in graph.outputs or shapes.get(name, (0,))[-1] != width:
            return None
        node = uses[0]
        others = [other for other in node.input if other != name]
        constant = len(others) == 1 and others[0] in graph.weights
        if node.op_type == "Add" and len(others) == 1 and not constant:
            same = shapes.get(others[0]) == shapes.get(name) == shapes.get(node.output[0])
            return Branch(linear, others[0], node.output[0], scale, order) if same else None
        if node.op_type == "Mul" and constant and scale is None and _per_channel(graph.weights[others[0]], width):
            scale = others[0]
        elif node.op_type == "Transpose" and order is None and _channels_stay(node, len(shapes[name])):
            order = tuple(attribute(node, "perm"))
        elif not ((node.op_type in _PASSING and order is None) or (node.op_type == "Add" and others == [linear.bias])):
            return None
        name = node.output[0]


def _channels_stay(node: NodeProto, rank: int) -> bool:
    return bool(attribute(node, "perm", ())) and attribute(node, "perm")[-1] == rank - 1


def _per_channel(array: np.ndarray, width: int) -> bool:
    """One factor for each channel, none of them zero: a closed branch cannot correct anything."""
    return array.size == width == array.shape[-1] and bool(np.all(array != 0))
