"""From a projection to where its neurons are contracted: is the way linear, and which projection is it?

A change of basis (METHODS 2.1, 2.2) is legal where nothing but a bias, a scalar factor and rearrangements lie between
the projection and the contraction. Rotary embeddings, norms on query or key, and anything else that tells the neurons
of a head apart leave only selection, with a gain per pair where that is legal (`gains`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

from onnx import NodeProto

from onnxsnp.graph.dependency import Dependencies
from onnxsnp.graph.ir import Graph, attribute
from onnxsnp.graph.linear import Linear

REARRANGE = {"Reshape", "Transpose", "Squeeze", "Unsqueeze", "Identity", "Cast", "Flatten", "Dropout"}

_SHIFTED = REARRANGE | {"Add", "Sub", "Where", "Expand"}  # a shift along the rows of scores goes through these


@dataclass(frozen=True)
class Way:
    """How a factor came to a tensor.

    Attributes:
        linear: the one projection that emits it; None if there are several, or something else made it.
        blocked_by: name of a node that forbids a change of basis; empty if the way is linear.
    """

    linear: Linear | None
    blocked_by: str = ""

    @property
    def rotatable(self) -> bool:
        return self.linear is not None and not self.blocked_by


def way_to(tensor: str, atom: int, graph: Graph, dependencies: Dependencies, linears: Mapping[str, Linear]) -> Way:
    """Walk back from a tensor to the projection that emits one of its factors.

    The way is blocked where anything else reads from it too: a relative position table, a second product, an output.
    """
    producers, readers = graph.producers(), graph.readers()
    by_node = {linear.node: linear for linear in linears.values()}
    biases = {linear.bias for linear in linears.values() if linear.bias is not None}
    scales: list[tuple[str, str]] = []
    name = tensor
    while True:
        node = producers.get(name)
        if node is None:
            return Way(None, name)
        other = read_elsewhere(name, graph, readers)
        if other:
            return Way(None, other)
        linear = by_node.get(node.name)
        if linear is not None and atom in dependencies.atoms(linear.weight, linear.outer):
            uneven = [at for at, scale in scales if not _even(scale, linear, graph, dependencies)]
            return Way(None, uneven[0]) if uneven else Way(linear)
        step = _step(node, atom, graph, dependencies, biases)
        if step is None:
            return Way(None, node.name)
        if node.op_type in ("Mul", "Div"):
            scales.extend((node.name, other) for other in node.input if other in graph.weights)
        name = step


def read_elsewhere(name: str, graph: Graph, readers: Mapping[str, Sequence[tuple[NodeProto, int]]]) -> str:
    """Another reader of a tensor, by name; empty if there is none. One that asks for size or type does not count."""
    uses = [(node, slot) for node, slot in readers.get(name, []) if not _asks_for_size(node, graph, readers)]
    others = [node.name for node, slot in uses if (node.op_type, slot) != ("CastLike", 1)]
    return others[-1] if len(others) > 1 else name if name in graph.outputs else ""


def _asks_for_size(node: NodeProto, graph: Graph, readers: Mapping[str, Sequence[tuple[NodeProto, int]]]) -> bool:
    """Whether a node gives sizes, or a tensor of which only the sizes are read."""
    if node.op_type in ("Shape", "Size"):
        return True
    after = [one for output in node.output for one, _ in readers.get(output, [])]
    sizes = all(one.op_type in ("Shape", "Size") for one in after)
    return bool(after) and sizes and not set(node.output) & set(graph.outputs)


def _even(scale: str, linear: Linear, graph: Graph, dependencies: Dependencies) -> bool:
    """Whether a constant factor is one number, or one per head; one per token makes the bias differ between tokens."""
    if graph.weights[scale].size == 1:
        return True
    return set(dependencies.atoms(scale)) <= set(dependencies.atoms(linear.weight, linear.outer))


def shift_blocked_by(score: str, key_tokens: Sequence[int], graph: Graph, dependencies: Dependencies) -> str:
    """What stands between a score product and its softmax and does not leave a shift along the row what it is.

    Args:
        score: name of the node that multiplies query and key.
        key_tokens: the factors over which the softmax runs.

    Returns:
        Name of a node such as a clip, a soft cap, or a concatenated sink; empty if there is none.
    """
    by_name = {node.name: node for node in graph.nodes}
    if by_name[score].op_type == "Attention":
        return score if attribute(by_name[score], "softcap", 0.0) else ""
    readers = graph.readers()
    stack, seen = [by_name[score].output[0]], set()
    while stack:
        name = stack.pop()
        for node, _ in readers.get(name, []):
            if node.name in seen or node.op_type in ("Softmax", "Shape", "Size"):
                continue
            seen.add(node.name)
            others = [other for other in node.input if other and other != name]
            scaled = node.op_type == "Mul" or (node.op_type == "Div" and node.input[0] == name)
            if scaled and len(node.input) == 2 and len(others) == 1:
                if set(key_tokens) & set(dependencies.atoms(others[0])):
                    return node.name
            elif node.op_type not in _SHIFTED:
                return node.name
            stack.extend(node.output)
    return ""


def straight_from(
    tensor: str, node: str, atom: int, graph: Graph, dependencies: Dependencies, linears: Mapping[str, Linear]
) -> bool:
    """Whether nothing but bias, scale and rearrangement lies between a node's output and a tensor, read once."""
    producers, readers = graph.producers(), graph.readers()
    biases = {linear.bias for linear in linears.values() if linear.bias is not None}
    name: str | None = tensor
    while name is not None and name in producers:
        if read_elsewhere(name, graph, readers):
            return False
        if producers[name].name == node:
            return True
        name = _step(producers[name], atom, graph, dependencies, biases)
    return False


def _step(node: NodeProto, atom: int, graph: Graph, dependencies: Dependencies, biases: set[str]) -> str | None:
    """The activation one linear step before, or None where the operator is not such a step."""
    if node.op_type in REARRANGE:  # what else it reads are sizes, axes or a type
        return node.input[0] if node.input[0] not in graph.weights else None
    shapes = dependencies.facts.shapes
    numbers = {name for name in node.input if prod(shapes.get(name, (0,))) == 1 and name not in graph.weights}
    activations = [name for name in node.input if name and name not in graph.weights and name not in numbers]
    if len(activations) != 1:
        return None
    constants = [name for name in node.input if name in graph.weights]
    if node.op_type == "Add" and len(constants) == 1 and constants[0] in biases:
        return activations[0]
    scaled = node.op_type == "Mul" or (node.op_type == "Div" and node.input[0] == activations[0])
    if scaled and all(atom not in dependencies.atoms(name) for name in constants):
        return activations[0]
    return None
