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
