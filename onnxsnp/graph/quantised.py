"""Quantised models are left alone: what to say about them, once, instead of about each of their operators."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from onnx import NodeProto

from onnxsnp.graph.attention import Unrecognised
from onnxsnp.graph.dependency import Dependencies
from onnxsnp.graph.ir import Graph

ADVICE = "prune the floating-point model, then quantise the pruned one"

_OPERATORS = {
    *("ConvInteger", "DequantizeLinear", "DynamicQuantizeLinear", "MatMulInteger", "QuantizeLinear"),
    *("DynamicQuantizeMatMul", "GatherBlockQuantized", "MatMulBnb4", "MatMulFpQ4", "MatMulIntegerToFloat"),
    *("MatMulNBits", "QAttention", "QEmbedLayerNormalization", "QGemm", "QMoE"),
}
_PRODUCTS = {"Conv", "Einsum", "Gemm", "MatMul"}


def is_quantised(node: NodeProto) -> bool:
    """Whether an operator works on quantised numbers, or turns numbers into such or back."""
    return node.op_type in _OPERATORS or node.op_type.startswith(("QLinear", "QOrdered"))


def describe(graph: Graph) -> str:
    """One sentence on a graph's quantised operators; empty if it has none."""
    found = Counter(node.op_type for node in graph.nodes if is_quantised(node))
    if not found:
        return ""
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(found.items()))
    return f"the model is quantised ({kinds}), and what is quantised is left alone: {ADVICE}"


def said_once(skipped: Sequence[Unrecognised], graph: Graph, dependencies: Dependencies) -> list[Unrecognised]:
    """What was skipped, with everything that follows from quantisation as one entry in front."""
    sentence = describe(graph)
    if not sentence:
        return list(skipped)
    quantised = {node.name: node for node in graph.nodes if is_quantised(node)}
    follow = _Consequences(graph, dependencies, quantised)
    first = Unrecognised(next(iter(quantised)), sentence)
    return [first, *(item for item in skipped if not follow.of(item.node))]


class _Consequences:
    """Tells what was skipped because of quantised operators from what was skipped anyway."""

    def __init__(self, graph: Graph, dependencies: Dependencies, quantised: Mapping[str, NodeProto]) -> None:
        self._nodes = {node.name: node for node in graph.nodes}
        self._made = graph.producers()
        self._readers = graph.readers()
        self._quantised = quantised
        frozen = dependencies.frozen
        self._frozen = {atom for atom, held in frozen.items() if any(freeze.node in quantised for freeze in held)}
        self._operands = {
            product.node: {atom for side in (product.left, product.right) for atom in dependencies.atoms(*side)}
            for product in dependencies.facts.products
        }

    def of(self, name: str) -> bool:
        """Whether a node is quantised, contracts what is, or (a softmax) has such a node beside it."""
        if name in self._quantised or self._operands.get(name, set()) & self._frozen:
            return True
        node = self._nodes.get(name)
        return node is not None and node.op_type == "Softmax" and (self._before(node) or self._behind(node))

    def _before(self, node: NodeProto) -> bool:
        stack = [self._made.get(name) for name in node.input]
        seen: set[str] = set()
        while stack:
            found = stack.pop()
            if found is None or found.name in seen:
                continue
            if found.name in self._quantised:
                return True
            seen.add(found.name)
            if found.op_type not in _PRODUCTS:
                stack.extend(self._made.get(name) for name in found.input)
        return False

    def _behind(self, node: NodeProto) -> bool:
        stack = [reader for name in node.output for reader, _ in self._readers.get(name, [])]
        seen: set[str] = set()
        while stack:
            found = stack.pop()
            if found.name in self._quantised:
                return True
            if found.name in seen:
                continue
            seen.add(found.name)
            if found.op_type not in _PRODUCTS:
                stack.extend(reader for name in found.output for reader, _ in self._readers.get(name, []))
        return False
