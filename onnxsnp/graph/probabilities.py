"""The way from the operands of a score product to its softmax, once as it is and once without one channel.

Scale, mask, bias, caps and whatever else an exporter puts there are the model's own operators, so what a channel does
to the attention is computed as the model computes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, helper

from onnxsnp.graph.attention import Site
from onnxsnp.graph.axes import Axis
from onnxsnp.graph.dependency import Dependencies
from onnxsnp.graph.groups import Group
from onnxsnp.graph.ir import Graph, Namer, attribute

TINY = 1e-30  # probabilities below it count as this much in a logarithm
MASK, CHANGE = "onnxsnp.kept", "onnxsnp.change"  # names of the added input and of the output


@dataclass(frozen=True)
class AttentionPath:
    """The operators from a score product to its softmax.

    Attributes:
        site: the attention site.
        nodes: in graph order, the softmax last.
        inputs: activations that enter: the operands of the product, masks, computed biases.
        axis: of the softmax, from the front.
        others: the axes of the probabilities besides that one.
    """

    site: Site
    nodes: tuple[NodeProto, ...]
    inputs: tuple[str, ...]
    axis: int
    others: tuple[Axis, ...]


def find_path(group: Group, site: Site, graph: Graph, dependencies: Dependencies) -> AttentionPath | None:
    """The way from the score product of a query-key group to its softmax.

    Returns:
        None where one operator does both, or where heads cannot be told apart on the way.
    """
    behind = {name for node in graph.nodes if node.name == site.score for name in node.output}
    reached: list[NodeProto] = []
    for node in graph.nodes:
        if node.name == site.score or behind.intersection(node.input):
            behind.update(node.output)
            reached.append(node)
            if node.op_type == "Softmax":
                break
    if not reached or reached[-1].op_type != "Softmax":
        return None
    softmax, wanted, nodes = reached[-1], set(reached[-1].input), [reached[-1]]
    for node in reversed(reached[:-1]):
        if wanted.intersection(node.output):
            wanted.update(node.input)
            nodes.append(node)
    nodes.reverse()
    made = {name for node in nodes for name in node.output}
    read = dict.fromkeys(name for node in nodes for name in node.input if name)
    inputs = tuple(name for name in read if name not in made and name not in graph.weights)
    output = softmax.output[0]
    rank = len(dependencies.facts.shapes[output])
    axis = int(attribute(softmax, "axis", -1 if graph.opset >= 13 else 1)) % rank
    others = tuple((output, index) for index in range(rank) if index != axis)
    operands = [beside(*one, dependencies) for one in ((site.query, site.query_tokens), (site.key, site.key_tokens))]
    apart = all(_has(group.head_atoms, axes, dependencies) for axes in (others, *operands))
    if not apart or any(dependencies.atoms(*one) != (group.atom,) for one in (site.query, site.key)):
        return None
    return AttentionPath(site, tuple(nodes), inputs, axis, others)


def beside(size: Axis, tokens: Axis, dependencies: Dependencies) -> tuple[Axis, ...]:
    """The axes of an operand besides its size and its tokens."""
    rank = len(dependencies.facts.shapes[size[0]])
    return tuple((size[0], index) for index in range(rank) if index not in (size[1], tokens[1]))


def _has(heads: Sequence[int], axes: Sequence[Axis], dependencies: Dependencies) -> bool:
    return set(heads) <= {atom for axis in axes for atom in dependencies.atoms(*axis)}


def change_graph(graph: Graph, path: AttentionPath, kinds: Mapping[str, np.dtype]) -> Graph:
    """A graph that measures what the attention loses with some channels: KL(P ‖ P') of every row.

    Its inputs are those of the path and `MASK`, factors for the channels of the query, of the element type of the
    query and shaped to multiply it; its output `CHANGE` has the axes `path.others`.

    Args:
        kinds: element types of the path's inputs.
    """
    query = path.site.query[0]
    namer = Namer({*graph.names(), MASK, CHANGE})
    masked = namer(f"{query}.masked")
    rename = {query: masked} | {name: namer(f"{name}.masked") for node in path.nodes for name in node.output if name}
    nodes = [*path.nodes, helper.make_node("Mul", [query, MASK], [masked], name=masked)]
    for node in path.nodes:
        clone = NodeProto()
        clone.CopyFrom(node)
        clone.name = namer(f"{node.name}.masked")
        reads = rename if node.name == path.site.score else {name: rename[name] for name in rename if name != query}
        clone.input[:] = [reads.get(name, name) for name in node.input]
        clone.output[:] = [rename.get(name, name) for name in node.output]
        nodes.append(clone)
    weights = dict(graph.weights)

    def add(op: str, *inputs: str, **attributes: Any) -> str:
        name = namer(f"onnxsnp.{op}")
        nodes.append(helper.make_node(op, list(inputs), [name], name=name, **attributes))
        return name

    def constant(value: np.ndarray) -> str:
        name = namer("onnxsnp.constant")
        weights[name] = value
        return name

    output, least = path.nodes[-1].output[0], constant(np.asarray(TINY, np.float32))
    before, after = (add("Cast", name, to=onnx.TensorProto.FLOAT) for name in (output, rename[output]))
    gap = add("Sub", *(add("Log", add("Max", one, least)) for one in (before, after)))
    lost = add("Mul", before, gap)
    if graph.opset >= 13:
        axes = constant(np.asarray([path.axis], np.int64))
        nodes.append(helper.make_node("ReduceSum", [lost, axes], [CHANGE], name=CHANGE, keepdims=0))
    else:
        nodes.append(helper.make_node("ReduceSum", [lost], [CHANGE], name=CHANGE, keepdims=0, axes=[path.axis]))
    shell = onnx.ModelProto(ir_version=graph.shell.ir_version, opset_import=graph.shell.opset_import)
    shell.graph.name = "change"
    for name, kind in {**{name: kinds[name] for name in path.inputs}, MASK: kinds[query]}.items():
        element = helper.np_dtype_to_tensor_dtype(kind)
        shell.graph.input.append(helper.make_tensor_value_info(name, element, None))
    shell.graph.output.append(onnx.ValueInfoProto(name=CHANGE))
    found = Graph(shell, nodes, weights)
    found.drop_dead()
    return found


def without(channel: int, shape: Sequence[int], axis: int, kind: np.dtype) -> np.ndarray:
    """`MASK` that drops one channel of a query of a given shape."""
    kept = np.ones(shape[axis], kind)
    kept[channel] = 0
    return kept.reshape([-1 if index == axis else 1 for index in range(len(shape))])
