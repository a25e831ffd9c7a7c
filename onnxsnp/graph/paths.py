"""From a projection to where its neurons are contracted: is the way linear, and which projection is it?

A change of basis (METHODS 2.1, 2.2) is legal where nothing but a bias, a scalar factor and rearrangements lie between
the projection and the contraction. Rotary embeddings, norms on query or key, and anything else that tells the neurons
of a head apart leave only selection.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from onnx import NodeProto

from onnxsnp.graph.dependency import Dependencies
from onnxsnp.graph.ir import Graph
from onnxsnp.graph.linear import Linear

_REARRANGE = {"Reshape", "Transpose", "Squeeze", "Unsqueeze", "Identity", "Cast", "Flatten", "Dropout"}


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
    """Walk back from a tensor to the projection that emits one of its factors."""
    producers = graph.producers()
    by_node = {linear.node: linear for linear in linears.values()}
    biases = {linear.bias for linear in linears.values() if linear.bias is not None}
    name = tensor
    while True:
        node = producers.get(name)
        if node is None:
            return Way(None, name)
        linear = by_node.get(node.name)
        if linear is not None and atom in dependencies.atoms(linear.weight, linear.outer):
            return Way(linear)
        step = _step(node, atom, graph, dependencies, biases)
        if step is None:
            return Way(None, node.name)
        name = step


def straight_from(
    tensor: str, node: str, atom: int, graph: Graph, dependencies: Dependencies, linears: Mapping[str, Linear]
) -> bool:
    """Whether nothing but bias, scale and rearrangement lies between a node's output and a tensor."""
    producers = graph.producers()
    biases = {linear.bias for linear in linears.values() if linear.bias is not None}
    name: str | None = tensor
    while name is not None and name in producers:
        if producers[name].name == node:
            return True
        name = _step(producers[name], atom, graph, dependencies, biases)
    return False


def _step(node: NodeProto, atom: int, graph: Graph, dependencies: Dependencies, biases: set[str]) -> str | None:
    """The activation one linear step before, or None where the operator is not such a step."""
    activations = [name for name in node.input if name and name not in graph.weights]
    if len(activations) != 1:
        return None
    constants = [name for name in node.input if name in graph.weights]
    if node.op_type in _REARRANGE:
        return activations[0]
    if node.op_type == "Add" and len(constants) == 1 and constants[0] in biases:
        return activations[0]
    scaled = node.op_type == "Mul" or (node.op_type == "Div" and node.input[0] == activations[0])
    if scaled and all(atom not in dependencies.atoms(name) for name in constants):
        return activations[0]
    return None
