"""A neuron that is cut is exactly zero in what a sum runs over, or the sum forbids the cut."""

from __future__ import annotations

from typing import Any

import graphs
import numpy as np
import onnx
import pytest

from onnxsnp.analysis import analyse_model
from onnxsnp.evaluation.verify import difference, masked
from onnxsnp.graph.silence import is_silent
from onnxsnp.planning.plan import Plan
from onnxsnp.surgery.apply import apply


def cosine(net: graphs.Net, value: Any) -> Any:
    """Vectors of length one along the last axis."""
    length = net.op("ReduceL2", value, axes=[-1], keepdims=1) if net.opset < 18 else net.op("ReduceL2", value, [-1])
    return net.op("Div", value, net.op("Clip", length, 1e-6))


def measured(*operators: str, op: str = "ReduceL2") -> onnx.ModelProto:
    """A hidden layer of 6 neurons, operators on it, and its length beside what reads it."""
    net = graphs.Net()
    h = net.linear(net.input("x", ["N", 5]), "a", 5, 6)
    for name in operators:
        if name == "Mul":
            h = net.op("Mul", h, net.op("Sigmoid", h))
        elif name == "Add":
            h = net.op("Add", h, 1.0)
        elif name == "Concat":
            h = net.op("Concat", h, h, axis=0)
        else:
            h = net.op(name, h)
    length = net.op(op, h, axes=[-1], keepdims=1) if op != "ReduceSum" else net.op(op, h, [-1])
    net.output(net.op("Div", net.linear(h, "out", 6, 3), net.op("Add", length, 1.0)), ["M", 3])
    return net.proto()


@pytest.mark.parametrize("op", ["ReduceL1", "ReduceL2", "ReduceSum", "ReduceSumSquare"])
@pytest.mark.parametrize("operators", [(), ("Relu",), ("Mul",), ("Tanh", "Abs"), ("Concat",)])
def test_a_sum_over_neurons_that_are_zero_allows_the_cut(operators: tuple[str, ...], op: str) -> None:
    model = measured(*operators, op=op)
    analysis = analyse_model(model)
    (group,) = analysis.structure.groups
    assert group.reasons == ()
    applied = apply(analysis, Plan("", [graphs.keeping(group, [[0, 2, 3]])]))
    original = masked(analysis.normalized.base, analysis.graph, analysis.dependencies, applied.cuts, {})
    assert difference(original, applied.graph, [graphs.inputs_for(model, 3)]) < 1e-6


@pytest.mark.parametrize("operators", [("Exp",), ("Sigmoid",), ("Relu", "Add"), ("Softplus", "Mul")])
def test_a_sum_over_what_is_made_of_zero_forbids_it(operators: tuple[str, ...]) -> None:
    (group,) = analyse_model(measured(*operators)).structure.groups
    assert [reason.split(" (at")[0] for reason in group.reasons] == ["ReduceL2 runs over it"]


def test_a_largest_entry_forbids_it_whatever_zero_becomes() -> None:
    (group,) = analyse_model(measured("Relu", op="ReduceMax")).structure.groups
    assert [reason.split(" (at")[0] for reason in group.reasons] == ["ReduceMax runs over it"]


@pytest.mark.parametrize("opset", [17, 18])
def test_query_key_pairs_of_cosine_attention_can_be_cut(opset: int) -> None:
    model = graphs.attention(opset, q=cosine, k=cosine)
    analysis = analyse_model(model)
    group = analysis.groups["qk.0"]
    assert group.reasons == () and group.heads == graphs.HEADS
    assert "qk.0" not in analysis.rotations.pairs and "qk.0" not in analysis.gains
    applied = apply(analysis, graphs.random_plan([group], np.random.default_rng(0)))
    original = masked(analysis.normalized.base, analysis.graph, analysis.dependencies, applied.cuts, {})
    assert difference(original, applied.graph, [graphs.inputs_for(model, 2)]) < 1e-5


def test_a_bias_or_norm_along_the_neurons_is_zero_with_them_but_not_one_across() -> None:
    net = graphs.Net()
    h = net.linear(net.input("x", ["N", 4, 5]), "a", 5, 6)
    normed = net.norm(h, "norm", 6)
    shifted = net.op("Add", h, net.weight("tokens", 4, 1))
    net.output(net.linear(net.op("Add", normed, shifted), "out", 6, 3), ["N", 4, 3])
    analysis = analyse_model(net.proto())
    (atom,) = analysis.dependencies.atoms("a.w", 1)
    graph, deps = analysis.graph, analysis.dependencies
    names = {"a/Add.out": True, normed.name: True, shifted.name: False, "x": False, "out.b": False}
    assert {name: is_silent(name, atom, graph, deps) for name in names} == names


INVERTED = {
    "Div": lambda net, h: net.op("Div", 1.0, h, name="inverse"),
    "Mod": lambda net, h: net.op("Mod", net.op("Sigmoid", h), h, fmod=1, name="inverse"),
    "Reciprocal": lambda net, h: net.op("Reciprocal", h, name="inverse"),
    "Log": lambda net, h: net.op("Log", net.op("Abs", h), name="inverse"),
    "Pow": lambda net, h: net.op("Pow", h, -1.0, name="inverse"),
    "Pow to what is computed": lambda net, h: net.op("Pow", net.op("Abs", h), net.op("Sigmoid", h), name="inverse"),
}


def layer(function: Any) -> onnx.ModelProto:
    """A hidden layer of 6 neurons and a function of it."""
    net = graphs.Net()
    h = function(net, net.linear(net.input("x", ["N", 5]), "a", 5, 6))
    net.output(net.linear(h, "out", 6, 3), ["N", 3])
    return net.proto()


@pytest.mark.parametrize("op", INVERTED)
def test_what_is_inverted_must_not_be_silent(op: str) -> None:
    (group,) = analyse_model(layer(INVERTED[op])).structure.groups
    assert group.reasons == ("what is cut would be divided by zero (at inverse)",)


@pytest.mark.parametrize("op", INVERTED)
def test_what_is_inverted_may_be_cut_where_it_is_not_zero(op: str) -> None:
    model = layer(lambda net, h: INVERTED[op](net, net.op("Add", net.op("Abs", h), 0.5)))
    analysis = analyse_model(model)
    (group,) = analysis.structure.groups
    applied = apply(analysis, Plan("", [graphs.keeping(group, [[1, 4]])]))
    original = masked(analysis.normalized.base, analysis.graph, analysis.dependencies, applied.cuts, {})
    assert difference(original, applied.graph, [graphs.inputs_for(model, 3)]) < 1e-6


@pytest.mark.parametrize("op", ["Div", "Mod"])
def test_a_constant_divisor_keeps_its_values_where_neurons_are_masked(op: str) -> None:
    more = {"fmod": 1} if op == "Mod" else {}
    model = layer(lambda net, h: net.op(op, h, net.weight("divisor", 6, shift=3.0), **more))
    analysis = analyse_model(model)
    (group,) = analysis.structure.groups
    applied = apply(analysis, Plan("", [graphs.keeping(group, [[0, 5]])]))
    original = masked(analysis.normalized.base, analysis.graph, analysis.dependencies, applied.cuts, {})
    assert difference(original, applied.graph, [graphs.inputs_for(model, 3)]) < 1e-6


def test_a_power_of_zero_is_not_silent() -> None:
    """Exponents of each neuron's own are zero where it is masked, and then even zero becomes one."""

    def powers(net: graphs.Net, h: Any) -> Any:
        return net.op("Pow", net.op("Relu", h), net.weight("powers", 6, shift=4.0))

    analysis = analyse_model(layer(powers))
    (group,) = analysis.structure.groups
    base, power = (node.output[0] for node in analysis.graph.nodes if node.op_type in ("Relu", "Pow"))
    assert is_silent(base, group.atom, analysis.graph, analysis.dependencies)
    assert not is_silent(power, group.atom, analysis.graph, analysis.dependencies)
