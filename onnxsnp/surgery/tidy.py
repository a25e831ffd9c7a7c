"""Drop the axes of size 1 that taking packed projections apart leaves behind.

Of a 5-D packed layout [B, N, 3, H, d] each part keeps [B, N, 1, H, d], and Transpose and Squeeze carry the
1 along. A Reshape, then any Unsqueeze, Transpose and Squeeze, is one Reshape and one Transpose.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from onnx import NodeProto, helper

from onnxsnp.graph.ir import Graph, Namer, attribute
from onnxsnp.graph.normalize import Normalized

_CHAIN = {"Unsqueeze", "Transpose", "Squeeze", "Identity"}


@dataclass
class _Chain:
    """Nodes behind a Reshape that only move or drop its axes, and which of its axes are left, in order."""

    nodes: list[NodeProto]
    labels: list[int | None]


def tidy(result: Normalized) -> None:
    """Shorten such chains in place where all that they drop has size 1."""
    graph = result.graph
    namer = Namer(graph.names())
    readers = graph.readers()
    replaced: dict[str, list[NodeProto]] = {}
    for node in graph.nodes:
        if node.op_type != "Reshape" or node.input[1] not in graph.weights or node.output[0] in graph.outputs:
            continue
        chain = _follow(graph, node, readers)
        fresh = _shortened(result, node, chain, namer)
        if fresh:
            replaced[node.name] = []
            for gone in chain.nodes:
                replaced[gone.name] = []
            replaced[chain.nodes[-1].name] = fresh
    graph.nodes = [new for node in graph.nodes for new in replaced.get(node.name, [node])]
    graph.drop_dead()


def _follow(graph: Graph, reshape: NodeProto, readers: dict[str, list[tuple[NodeProto, int]]]) -> _Chain:
    chain = _Chain([], list(range(len(graph.weights[reshape.input[1]]))))
    name = reshape.output[0]
    while len(readers.get(name, [])) == 1 and name not in graph.outputs:
        node = readers[name][0][0]
        labels = _moved(graph, node, chain.labels) if node.op_type in _CHAIN else None
        if labels is None:
            break
        chain.nodes.append(node)
        chain.labels = labels
        name = node.output[0]
    return chain


def _moved(graph: Graph, node: NodeProto, labels: list[int | None]) -> list[int | None] | None:
    """The axes behind one node; None where it cannot be told."""
    if node.op_type == "Identity":
        return labels
    if node.op_type == "Transpose":
        return [labels[axis] for axis in attribute(node, "perm") or range(len(labels))[::-1]]
    named = len(node.input) > 1 and node.input[1]
    axes = graph.weights.get(node.input[1]) if named else attribute(node, "axes")
    if axes is None:
        return None
    chosen = [int(axis) for axis in np.asarray(axes).reshape(-1)]
    if node.op_type == "Squeeze":
        gone = {axis % len(labels) for axis in chosen}
        return [label for axis, label in enumerate(labels) if axis not in gone]
    rank = len(labels) + len(chosen)
    added = {axis % rank for axis in chosen}
    rest = iter(labels)
    return [None if axis in added else next(rest) for axis in range(rank)]


def _shortened(result: Normalized, reshape: NodeProto, chain: _Chain, namer: Namer) -> list[NodeProto]:
    """One Reshape and at most one Transpose in place of a chain; nothing if that is not simpler or not sure."""
    graph = result.graph
    sizes = [int(size) for size in graph.weights[reshape.input[1]]]
    kept = [label for label in chain.labels if label is not None]
    dropped = set(range(len(sizes))) - set(kept)
    if not dropped or len(kept) < len(chain.labels) or 0 in sizes or any(sizes[axis] != 1 for axis in dropped):
        return []
    order = sorted(kept)
    shape, middle = namer(f"{reshape.name}.shape"), namer(f"{reshape.output[0]}.flat")
    final = chain.nodes[-1].output[0]
    graph.weights[shape] = np.asarray([sizes[axis] for axis in order], np.int64)
    moved = [order.index(axis) for axis in kept]
    straight = moved == sorted(moved)
    before = NodeProto()
    before.CopyFrom(reshape)
    before.input[1] = shape
    before.output[0] = final if straight else middle
    for known in (result.shapes, result.single):
        known[middle] = tuple(known[reshape.output[0]][axis] for axis in order)
    result.dynamic[middle] = tuple(result.dynamic[reshape.output[0]][axis] for axis in order)
    for known in (result.shapes, result.single):
        known[shape] = (len(order),)
    result.dynamic[shape] = (False,)
    if straight:
        return [before]
    name = namer(f"{reshape.name}.transpose")
    return [before, helper.make_node("Transpose", [middle], [final], name=name, perm=moved)]
