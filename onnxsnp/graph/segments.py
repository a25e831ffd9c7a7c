"""A graph in pieces that can be run one after another: what has to be handed on from each to the next.

Refitting layer by layer needs the activations of the network so far, and only those. A segment is a run of nodes
between two places in the graph; its inputs are all activations that were computed before and are still needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import NodeProto, helper

from onnxsnp.graph.ir import Graph, subgraph_reads


@dataclass(frozen=True)
class Segment:
    """Consecutive nodes of a graph.

    Attributes:
        nodes: in topological order.
        inputs: activations it may read (and hands on where they are outputs too): model inputs, and what earlier
            segments computed.
        outputs: activations that later segments or the model's outputs need.
    """

    nodes: tuple[NodeProto, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def segments(graph: Graph, ends: Sequence[str]) -> list[Segment]:
    """Cut a graph behind the nodes that compute some tensors.

    Args:
        ends: tensors in the order in which the graph computes them.

    Returns:
        One segment per tensor, and what comes after the last.

    Raises:
        ValueError: a tensor that no node computes, or not in order.
    """
    made = {name: index for index, node in enumerate(graph.nodes) for name in node.output if name}
    places = [made.get(name, -1) for name in ends]
    if any(place < 0 for place in places) or sorted(set(places)) != places:
        raise ValueError("segments need tensors that nodes compute, in the order in which they are computed")
    last: dict[str, int] = dict.fromkeys(graph.outputs, len(graph.nodes))
    for index, node in enumerate(graph.nodes):
        for name in [*node.input, *subgraph_reads(node)]:
            last[name] = max(last.get(name, -1), index)
    known = dict.fromkeys(graph.inputs, -1) | made

    def live(place: int) -> tuple[str, ...]:
        return tuple(name for name, at in known.items() if at <= place < last.get(name, -1))

    stops = [*places, len(graph.nodes) - 1]
    starts = [-1, *places]
    return [
        Segment(
            tuple(graph.nodes[start + 1 : stop + 1]),
            live(start) if start >= 0 else tuple(graph.inputs),
            live(stop) if stop < len(graph.nodes) - 1 else tuple(graph.outputs),
        )
        for start, stop in zip(starts, stops, strict=True)
    ]


def segment_graph(graph: Graph, segment: Segment, outputs: Sequence[str], kinds: Mapping[str, np.dtype]) -> Graph:
    """A segment as a graph of its own that shares the weights.

    Args:
        outputs: what it returns: any of the tensors it computes.
        kinds: element types of its inputs.
    """
    shell = onnx.ModelProto(ir_version=graph.shell.ir_version, opset_import=graph.shell.opset_import)
    shell.graph.name = "segment"
    shell.graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs)
    part = Graph(shell, list(segment.nodes), dict(graph.weights))
    part.drop_dead()
    read = {name for node in part.nodes for name in [*node.input, *subgraph_reads(node)]}
    for name in segment.inputs:
        if name in read:
            kind = helper.np_dtype_to_tensor_dtype(kinds[name])
            shell.graph.input.append(helper.make_tensor_value_info(name, kind, None))
    return part


def between(graph: Graph, inputs: Sequence[str], output: str) -> Segment | None:
    """What computes a tensor from some others; None if it depends on anything else that is not constant."""
    made = graph.producers()
    found: set[str] = set()
    stack = [output]
    while stack:
        name = stack.pop()
        if name in inputs or name in graph.weights or not name:
            continue
        node = made.get(name)
        if node is None:
            return None
        if node.name not in found:
            found.add(node.name)
            stack.extend([*node.input, *subgraph_reads(node)])
    return Segment(tuple(node for node in graph.nodes if node.name in found), tuple(inputs), (output,))
