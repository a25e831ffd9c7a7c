"""Shapes and derived values are what a run gives: static, dynamic, constant, invariant."""

from __future__ import annotations

import graphs
import numpy as np
import pytest

from onnxsnp.errors import ModelError
from onnxsnp.graph.ir import Graph
from onnxsnp.graph.normalize import as_graph
from onnxsnp.graph.probe import Probe, probe
from onnxsnp.model import load


def graph_of(model) -> Graph:  # type: ignore[no-untyped-def]
    return as_graph(load(model))


def shape_chain(batch: graphs.Size, tokens: graphs.Size) -> graphs.Net:
    """Values computed from Shape: the batch, the tokens, the width and a constant."""
    net = graphs.Net()
    x = net.input("x", [batch, tokens, 6])
    h = net.op("Relu", net.linear(x, "fc", 6, 8), name="h")
    shape = net.op("Shape", h, name="shape")
    first, last = net.op("Gather", shape, [0], axis=0, name="first"), net.op("Gather", shape, [2], axis=0, name="last")
    middle = net.op("Gather", shape, [1], axis=0, name="middle")
    flat = net.op("Mul", middle, last, name="product")
    y = net.op("Reshape", h, net.op("Concat", first, flat, axis=0, name="target"), name="flat")
    net.output(y, [batch, "F"])
    return net


def test_a_free_batch_is_run_at_two_and_one() -> None:
    found = probe(graph_of(graphs.transformer(batch="N")))
    assert found.shapes["x"] == (2, 5, 7) and found.single["x"] == (1, 5, 7)
    assert found.dynamic["x"] == (True, False, False)
    assert found.shapes["y"] == (2, 5) and found.single["y"] == (1, 5) and found.dynamic["y"] == (True, False)


def test_a_fixed_batch_is_static_everywhere() -> None:
    found = probe(graph_of(graphs.transformer(batch=3)))
    assert found.shapes["x"] == found.single["x"] == (3, 5, 7)
    assert not any(any(axes) for axes in found.dynamic.values())


def test_sizes_beyond_the_batch_vary_as_well() -> None:
    found = probe(graph_of(graphs.transformer(tokens="S")))
    assert found.dynamic["x"] == (True, True, False)
    assert found.single["x"] == (1, found.shapes["x"][1], 7)


def test_the_same_symbol_gets_the_same_size() -> None:
    net = graphs.Net()
    left, right = net.input("a", ["N", "S"]), net.input("b", ["N", "S"])
    net.output(net.op("Relu", net.op("Add", left, right)), ["N", "S"])
    found = probe(graph_of(net.proto()))
    assert found.shapes["a"] == found.shapes["b"]


def test_values_that_follow_the_batch_are_not_invariant_and_those_that_do_not_are() -> None:
    found = probe(graph_of(shape_chain("N", 5).proto()))
    assert "target.out" not in found.invariant and "target.out" not in found.constant
    assert found.dynamic["flat.out" if "flat.out" in found.dynamic else "y"] == (True, False)
    static = probe(graph_of(shape_chain(2, 5).proto()))
    np.testing.assert_array_equal(static.invariant["target.out"], [2, 40])


def test_invariant_values_of_a_dynamic_model_are_known_where_the_graph_reads_them() -> None:
    found = probe(graph_of(graphs.transformer(scale="shape")))
    scales = [value for value in found.invariant.values() if value.dtype.kind == "f"]
    assert scales and all(value == pytest.approx(2.0) for value in scales)  # √4
    assert not any(np.allclose(value, 2.0) for value in found.constant.values())


def test_values_of_weights_alone_are_constant() -> None:
    net = graphs.Net()
    x = net.input("x", ["N", 3])
    doubled = net.op("Mul", net.weight("w", 3, 4), 2.0, name="doubled")
    net.output(net.op("MatMul", x, doubled), ["N", 4])
    model = net.proto()
    found: Probe = probe(graph_of(model))
    np.testing.assert_allclose(found.constant["doubled.out"], 2 * graphs.initializers(model)["w"])
    assert not found.invariant


def test_random_values_are_never_constant() -> None:
    net = graphs.Net()
    x = net.input("x", ["N", 3])
    noise = net.op("RandomNormal", name="noise", shape=[3], dtype=1)
    net.output(net.op("Add", x, noise), ["N", 3])
    found = probe(graph_of(net.proto()))
    assert "noise.out" not in found.constant and "noise.out" not in found.invariant


def test_given_sizes_are_used() -> None:
    found = probe(graph_of(graphs.transformer(tokens="S")), {"x": [1, 9, 7]})
    assert found.shapes["x"][1] == 9


def test_given_sizes_of_the_wrong_rank_are_refused() -> None:
    with pytest.raises(ModelError, match="gives 'x' 2 sizes, the model's input has 3"):
        probe(graph_of(graphs.transformer(tokens="S")), {"x": [1, 9]})


def baked_batch() -> Graph:
    net = graphs.Net()
    x = net.input("x", ["N", 5, 6])
    h = net.reshape(net.op("Relu", net.linear(x, "fc", 6, 8)), 1, 40)
    net.output(net.op("MatMul", h, net.weight("o", 40, 3)), [1, 3])
    return graph_of(net.proto())


def test_a_model_that_does_not_run_is_one_line_with_what_to_do() -> None:
    with pytest.raises(ModelError, match="does not run on inputs of shape x 2×5×6") as caught:
        probe(baked_batch())
    assert "--input-shape" in str(caught.value) and "\n" not in str(caught.value)


def test_integer_inputs_are_fed_valid_ids() -> None:
    net = graphs.Net()
    ids = net.input("ids", ["N", "S"], np.int64)
    h = net.op("Gather", net.weight("table", 3, 4), ids, axis=0)
    net.output(net.op("MatMul", h, net.weight("w", 4, 2)), ["N", "S", 2])
    assert probe(graph_of(net.proto())).shapes["y"][2] == 2


def test_sizes_that_may_only_shrink_vary_too() -> None:
    net = graphs.Net()
    ids = net.input("ids", ["N", "S"], np.int64)
    places = net.op("Range", 0, net.op("Gather", net.op("Shape", ids), 1, axis=0), 1)
    table = net.op("Gather", net.weight("positions", 16, 4), places, axis=0)
    net.output(net.op("Add", net.op("Gather", net.weight("words", 9, 4), ids, axis=0), table), ["N", "S", 4])
    found = probe(graph_of(net.proto()))
    assert found.dynamic["y"] == (True, True, False)
    assert not found.invariant
