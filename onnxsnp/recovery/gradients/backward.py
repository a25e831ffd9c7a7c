"""Builds a graph that computes a model and the gradients of its parameters (reverse-mode differentiation).

static = static_graph(model, {"x": (16, 3, 224, 224)})
built = backward_graph(static.graph, static.shapes, {"logits": "logits gradient"}, static.parameters)
session = built.graph.session([*static.graph.outputs, *built.gradients.values()], feed=built.gradients)
session.run(None, {"x": images, "logits gradient": seeds})
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from onnx import NodeProto, TensorProto

from onnxsnp.graph.ir import Graph, attribute, subgraph_reads
from onnxsnp.recovery.gradients.rules import RULES, WITHOUT_GRADIENT
from onnxsnp.recovery.gradients.tape import NoRuleError, Tape

_OLDEST = 11  # Slice and Pad with computed sizes


@dataclass
class Backward:
    """A graph with the gradients of its parameters.

    Attributes:
        graph: forward and backward nodes; the outputs are still the forward graph's.
        gradients: name of the gradient tensor of each parameter that has one.
        stops: by node name, why no gradient passes it (only where one would have been needed).
        missing: for each parameter without a gradient, why.
    """

    graph: Graph
    gradients: dict[str, str]
    stops: dict[str, str]
    missing: dict[str, str]


def backward_graph(
    graph: Graph, shapes: Mapping[str, tuple[int, ...]], wanted: Mapping[str, str], parameters: Sequence[str]
) -> Backward:
    """Append the backward nodes.

    Args:
        graph: the forward graph, at fixed sizes (`static_graph`); it is not changed.
        shapes: sizes of every tensor that the gradients pass.
        wanted: for some tensors, the name of the tensor (a node's output or an input) that holds the gradient of the
            loss by it. A tensor may have readers besides.
        parameters: weights whose gradients are wanted.
    """
    stops = {node.name: reason for node in graph.nodes if (reason := _no_rule(node, graph.opset))}
    tape = Tape(graph, shapes, _carrying(graph.nodes, parameters))
    for name, gradient in wanted.items():
        tape.give(name, gradient)
    met: dict[str, str] = {}
    passed: list[NodeProto] = []
    for node in reversed(graph.nodes):
        grads = [tape.gradient(name) for name in node.output]
        if not any(grads):
            continue
        tape.prefix = f"{node.name}."
        if node.name in stops:
            met[node.name] = stops[node.name]
            continue
        if node.op_type in WITHOUT_GRADIENT:
            continue
        try:
            RULES[node.op_type](node, grads, tape)
            passed.append(node)
        except NoRuleError as error:
            met[node.name] = f"no gradient passes {node.op_type}: {error}"
    tape.prefix = ""
    gradients = {name: tape.gradient(name) for name in parameters if tape.gradient(name)}
    built = graph.copy()
    built.nodes += tape.nodes
    built.weights.update(tape.weights)
    return Backward(built, gradients, met, _missing(graph, parameters, gradients, met, passed))


def _no_rule(node: NodeProto, opset: int) -> str:
    """Why no gradient can pass a node; empty if one can, or if there is none by nature."""
    if opset < _OLDEST:
        return f"the model is of opset {opset}; gradients need {_OLDEST}: convert it"
    if node.domain not in ("", "ai.onnx"):
        return f"no gradient rule for operator {node.domain}.{node.op_type}"
    if subgraph_reads(node) or any(entry.HasField("g") or entry.graphs for entry in node.attribute):
        return f"{node.op_type} runs a graph of its own"
    if node.op_type not in RULES and node.op_type not in WITHOUT_GRADIENT:
        return f"no gradient rule for operator {node.op_type}"
    return ""


_FLOATS = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE}


def _carrying(nodes: Iterable[NodeProto], parameters: Sequence[str]) -> set[str]:
    """Tensors through which a gradient reaches a parameter, those behind an operator without a rule included."""
    found = set(parameters)
    for node in nodes:
        steps = node.op_type in WITHOUT_GRADIENT or (node.op_type == "Cast" and attribute(node, "to") not in _FLOATS)
        if not steps and any(name in found for name in [*node.input, *subgraph_reads(node)]):
            found.update(name for name in node.output if name)
    return found


def _missing(
    graph: Graph,
    parameters: Sequence[str],
    gradients: Mapping[str, str],
    stops: Mapping[str, str],
    passed: Sequence[NodeProto],
) -> dict[str, str]:
    """For each parameter without a gradient, the first operator on its way that stopped one."""
    own = {  # statistics that a BatchNormalization has recorded, a Clip's bounds
        name: f"{node.op_type} does not train it (at {node.name})" for node in passed for name in node.input
    }
    behind: dict[str, str] = {}
    for node in reversed(graph.nodes):
        stop = stops.get(node.name)
        reason = f"{stop} (at {node.name})" if stop else next(filter(None, map(behind.get, node.output)), "")
        if reason:
            for name in [*node.input, *subgraph_reads(node)]:
                behind.setdefault(name, reason)
    reasons = {**own, **behind}
    unread = "nothing that is matched depends on it"
    return {name: reasons.get(name, unread) for name in parameters if name not in gradients}
