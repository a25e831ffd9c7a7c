"""Is a neuron whose weights are zero silent in a tensor: exactly zero there, whatever the input?

A sum over neurons, or the length of a vector of them, is the same without the neurons that are zero; so such a
reduction allows a cut, and the model with zeros in place of what was cut shows exactly what the cut model does. After
an operator such as exp, which makes one of zero, it does not.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from onnx import NodeProto

from onnxsnp.graph.dependency import Dependencies
from onnxsnp.graph.ir import Graph

_FIRST = {  # zero where the first operand is
    *("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Cast", "Dropout"),
    *("Slice", "Split", "Gather", "GatherND", "Expand", "Resize", "Tile", "CastLike"),
    *("Div", "Abs", "Neg", "Sign", "Sqrt", "Sin", "Tanh", "Erf", "Round", "Floor", "Ceil"),
    *("Relu", "LeakyRelu", "PRelu", "ThresholdedRelu", "Elu", "Selu", "Celu"),
    *("Gelu", "HardSwish", "Swish", "Mish", "Softsign"),
    *("ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceL1", "ReduceL2", "ReduceSumSquare"),
    *("AveragePool", "GlobalAveragePool", "MaxPool", "GlobalMaxPool"),
}
_BY_CHANNEL = {"BatchNormalization", "LayerNormalization", "RMSNormalization"}  # zero where their gain and shift are


def is_silent(tensor: str, atom: int, graph: Graph, dependencies: Dependencies) -> bool:
    """Whether the entries of a factor's index are zero in a tensor if they are zero in all weights that have it."""
    search = _Search(atom, graph, dependencies)
    for node in graph.nodes:  # in their order, so that no search goes deeper than to what is known
        for name in node.output:
            search.silent(name)
    return search.silent(tensor)


def divisor(node: NodeProto, weights: Mapping[str, np.ndarray]) -> str | None:
    """The operand of which an operator takes the inverse, a remainder or the logarithm, so that it must not be zero."""
    if node.op_type in ("Div", "Mod"):
        return node.input[1]
    if node.op_type in ("Reciprocal", "Log"):
        return node.input[0]
    if node.op_type == "Pow":
        power = weights.get(node.input[1])
        return node.input[0] if power is None or bool((power < 0).any()) else None
    return None


class _Search:
    def __init__(self, atom: int, graph: Graph, dependencies: Dependencies) -> None:
        self._atom, self._graph, self._deps = atom, graph, dependencies
        self._producers = graph.producers()
        self._known: dict[str, bool] = {}

    def silent(self, tensor: str) -> bool:
        """Whether a tensor is; one without the factor is not."""
        if tensor not in self._known:
            self._known[tensor] = self._carries(tensor) and self._computed(tensor)
        return self._known[tensor]

    def _carries(self, tensor: str) -> bool:
        return tensor in self._deps.facts.shapes and self._atom in self._deps.atoms(tensor)

    def _computed(self, tensor: str) -> bool:
        if tensor in self._graph.weights:
            return True
        node = self._producers.get(tensor)
        if node is None or (tensor != node.output[0] and node.op_type != "Split"):
            return False
        if node.op_type in _FIRST:
            return self.silent(node.input[0])
        if node.op_type in ("Add", "Sub", "Sum", "Concat", "Max", "Min", "Mean"):
            return all(self.silent(name) for name in node.input)
        if node.op_type == "Pow":
            power = self._graph.weights.get(node.input[1])
            known = power is not None and not self._carries(node.input[1]) and bool((power > 0).all())
            return known and self.silent(node.input[0])
        if node.op_type == "Mul":
            return any(self.silent(name) for name in node.input)
        if node.op_type in _BY_CHANNEL:
            return all(self.silent(name) for name in node.input[1:3] if name)
        return self._product(node)

    def _product(self, node: NodeProto) -> bool:
        """A product is zero where the operand is that has the factor; a bias must be too."""
        if node.op_type not in ("MatMul", "Gemm", "Conv", "Einsum"):
            return False
        bias = [name for name in node.input[2:3] if name and node.op_type != "Einsum"]
        return any(self.silent(name) for name in node.input[:2]) and all(self.silent(name) for name in bias)
