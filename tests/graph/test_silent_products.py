"""A query or key neuron is only cut where silencing its weights silences it in the product of the two."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import graphs
import numpy as np
import pytest

from onnxsnp.analysis import analyse_model
from onnxsnp.evaluation.verify import difference, masked
from onnxsnp.graph.silence import is_silent
from onnxsnp.surgery.apply import apply

Change = Callable[[graphs.Net, Any], Any]

SILENT: dict[str, Change] = {
    "relu": lambda net, x: net.op("Relu", x),
    "gelu": lambda net, x: net.op("Mul", x, net.op("Add", net.op("Erf", x), 1.0)),
    "square": lambda net, x: net.op("Pow", x, 2.0),
    "own shift": lambda net, x: net.op("Add", x, net.weight("shift", 4)),
    "divided": lambda net, x: net.op("Div", x, 3.0),
}
LOUD: dict[str, Change] = {
    "exponential": lambda net, x: net.op("Exp", x),
    "elu and one": lambda net, x: net.op("Add", net.op("Elu", x), 1.0),
    "sigmoid": lambda net, x: net.op("Mul", net.op("Sigmoid", x), 2.0),
    "inverse": lambda net, x: net.op("Pow", net.op("Add", net.op("Abs", x), 1.0), -1.0),
}


def attention(query: Change, key: Change) -> Any:
    """Softmax attention of one head whose queries and keys are changed behind their projections."""
    net = graphs.Net()
    x = net.input("x", ["N", 5, 6])
    q, k, v = (net.linear(x, name, 6, 4) for name in "qkv")
    scores = net.op("MatMul", query(net, q), net.op("Transpose", key(net, k), perm=[0, 2, 1]))
    mixed = net.op("MatMul", net.op("Softmax", scores, axis=-1), v)
    net.output(net.linear(mixed, "o", 4, 3), ["N", 5, 3])
    return net.proto()


def same(net: graphs.Net, x: Any) -> Any:
    return x


@pytest.mark.parametrize("name", SILENT)
def test_zero_stays_zero_and_the_cut_is_exact(name: str) -> None:
    model = attention(SILENT[name], same)
    analysis = analyse_model(model)
    (group,) = (group for group in analysis.structure.groups if group.kind == "qk")
    assert group.prunable
    applied = apply(analysis, graphs.random_plan([group], np.random.default_rng(0)))
    expected = masked(analysis.normalized.base, analysis.graph, analysis.dependencies, applied.cuts, {})
    assert difference(expected, applied.graph, [graphs.inputs_for(model)]) < 1e-6


@pytest.mark.parametrize("name", LOUD)
def test_one_silent_side_is_enough_and_none_is_not(name: str) -> None:
    (group,) = (g for g in analyse_model(attention(LOUD[name], same)).structure.groups if g.kind == "qk")
    assert group.prunable
    (group,) = (g for g in analyse_model(attention(LOUD[name], LOUD[name])).structure.groups if g.kind == "qk")
    assert any("what is cut would not be zero in a product (at MatMul" in reason for reason in group.reasons)


def test_heads_whose_probabilities_are_divided_by_their_sum_are_not_silenced() -> None:
    """Gates per head on probabilities that are normalised afterwards: without them a head would be nought by nought."""
    net = graphs.Net()
    x = net.input("x", ["N", 5, 6])
    q, k, v = (
        net.op("Transpose", net.reshape(net.linear(x, name, 6, 6), 0, 5, 2, 3), perm=[0, 2, 1, 3]) for name in "qkv"
    )
    p = net.op("Softmax", net.op("MatMul", q, net.op("Transpose", k, perm=[0, 1, 3, 2])), axis=-1)
    p = net.op("Mul", p, net.weight("gate", 1, 2, 1, 1))
    p = net.op("Div", p, net.op("ReduceSum", p, np.asarray([-1])), name="normalised")
    y = net.reshape(net.op("Transpose", net.op("MatMul", p, v), perm=[0, 2, 1, 3]), 0, 5, 6)
    net.output(net.linear(y, "o", 6, 3), ["N", 5, 3])
    found = {group.kind: group.reasons for group in analyse_model(net.proto()).structure.groups}
    assert found["qk"] == found["v"] == ()
    assert found["head"] == ("what is cut would be divided by zero (at normalised)",)


def test_the_search_goes_through_networks_of_any_depth() -> None:
    net = graphs.Net()
    h = net.linear(net.input("x", ["N", 3]), "first", 3, 4)
    for index in range(1200):
        h = net.op("Neg", h, name=f"step{index}")
    net.output(net.linear(h, "last", 4, 2), ["N", 2])
    analysis = analyse_model(net.proto())
    (group,) = analysis.structure.groups
    assert is_silent("step1199.out", group.atom, analysis.graph, analysis.dependencies)
