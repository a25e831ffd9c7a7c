"""Branches that are feed-forward networks of two layers: their input, projections, and the nonlinearity between."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from onnx import NodeProto

from onnxsnp.graph.branches import Branch
from onnxsnp.graph.groups import Group
from onnxsnp.graph.ir import Graph
from onnxsnp.graph.linear import Linear
from onnxsnp.graph.segments import between

# operators that treat every entry alike, whatever its place; constants among their operands may differ per neuron
_ELEMENTWISE = {
    *("Add", "Sub", "Mul", "Div", "Neg", "Abs", "Reciprocal", "Pow", "Sqrt", "Exp", "Log", "Min", "Max", "Sum", "Clip"),
    *("Relu", "LeakyRelu", "ThresholdedRelu", "Elu", "Celu", "Selu", "Gelu", "FastGelu", "QuickGelu", "Erf", "Tanh"),
    *("Sigmoid", "HardSigmoid", "HardSwish", "Swish", "Mish", "Softplus", "Softsign", "Identity", "Cast"),
}


@dataclass(frozen=True)
class FeedForward:
    """x → f(x W₁ + b₁, …) W₂ + b₂, where the branch's projection is the second layer.

    Attributes:
        branch: its end.
        group: the neurons between the layers.
        first: the projections in front of the nonlinearity: one, or two where it is gated.
        inputs: the activation they read.
        before: what they give, with their biases: the operands of f.
    """

    branch: Branch
    group: Group
    first: tuple[Linear, ...]
    inputs: str
    before: tuple[str, ...]


def find_feedforward(
    branch: Branch, groups: Mapping[str, Group], graph: Graph, linears: Mapping[str, Linear]
) -> FeedForward | None:
    """The feed-forward network that a branch ends; None where it is something else, or not simple enough.

    Its projections must read one activation that depends on nothing but what the branch adds to, and only operators
    that treat every entry alike may lie between its layers.
    """
    wanted = (branch.linear.weight, branch.linear.inner)
    group = next((one for one in groups.values() if one.kind == "ffn" and wanted in one.consumers), None)
    if group is None or len(group.consumers) != 1:
        return None
    width = graph.weights[branch.linear.weight].shape[branch.linear.inner]
    first = [linears.get(weight) for weight, _ in group.producers]
    known = [
        one for one in first if one is not None and one.plain and graph.weights[one.weight].shape[one.outer] == width
    ]
    if not known or len(known) < len(first) or len({one.data for one in known}) != 1:
        return None
    before = [_emitted(one, graph) for one in known]
    middle = between(graph, before, branch.linear.data)
    outside = between(graph, [branch.other], known[0].data)
    if middle is None or outside is None or not all(_alike(node, graph, width) for node in middle.nodes):
        return None
    if any(_adds_another(one, graph) for one in known):
        return None
    return FeedForward(branch, group, tuple(known), known[0].data, tuple(before))


def _alike(node: NodeProto, graph: Graph, width: int) -> bool:
    """Whether an operator treats every entry alike; its constants may differ per neuron, but not per token."""
    held = [graph.weights[name] for name in node.input if name in graph.weights]
    return node.op_type in _ELEMENTWISE and all(
        array.size == 1 or array.size == width == array.shape[-1] for array in held
    )


def _adds_another(linear: Linear, graph: Graph) -> bool:
    """Whether a Gemm adds something else than a bias."""
    inputs = next(node.input for node in graph.nodes if node.name == linear.node)
    return linear.bias is None and len(inputs) > 2 and bool(inputs[2])


def _emitted(linear: Linear, graph: Graph) -> str:
    """What a projection gives, with its bias."""
    name = next(node.output[0] for node in graph.nodes if node.name == linear.node)
    if linear.op == "Gemm" or linear.bias is None:
        return name
    return next(node.output[0] for node in graph.nodes if name in node.input and linear.bias in node.input)
