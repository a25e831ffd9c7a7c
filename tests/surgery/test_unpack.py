"""Taking packed projections apart computes the same, and touches only what was asked for."""

from __future__ import annotations

from typing import Any

import graphs
import numpy as np
import pytest

from onnxsnp.analysis import analyse_model
from onnxsnp.evaluation.verify import difference, prove
from onnxsnp.graph.normalize import normalize
from onnxsnp.model import load
from onnxsnp.surgery.apply import apply
from onnxsnp.surgery.unpack import packed_sources, root_of, unpack

PACKED: dict[str, dict[str, Any]] = {
    "5-D": {"qkv": "packed", "v": 4},
    "flat": {"qkv": "flat"},
    "gate": {"gate": "packed"},
    "flat and gate": {"qkv": "flat", "gate": "packed"},
    "5-D, opset 11": {"qkv": "packed", "v": 4, "opset": 11},
    "flat, opset 11": {"qkv": "flat", "opset": 11},
    "flat, free tokens": {"qkv": "flat", "tokens": "S"},
    "5-D, free tokens": {"qkv": "packed", "v": 4, "tokens": "S"},
}


@pytest.mark.parametrize("layout", PACKED)
def test_outputs_are_equal_and_every_selection_is_gone(layout: str) -> None:
    model = graphs.transformer(**PACKED[layout])
    packed = normalize(load(model))
    apart = unpack(packed)
    feeds = [graphs.inputs_for(model, batch, S=tokens) for batch, tokens in ((1, 4), (3, 7))]
    assert difference(packed.graph, apart.graph, feeds) < 1e-6
    assert any(node.op_type in ("Split", "Gather") for node in packed.graph.nodes)
    assert not any(node.op_type in ("Split", "Gather") for node in apart.graph.nodes)


@pytest.mark.parametrize("layout", PACKED)
def test_recorded_sizes_are_those_of_a_run(layout: str) -> None:
    model = graphs.transformer(**PACKED[layout])
    apart = unpack(normalize(load(model)))
    names = [name for node in apart.graph.nodes for name in node.output]
    feed = {"x": np.zeros(apart.shapes["x"], np.float32)}
    for name, value in zip(names, apart.graph.session(names, optimize=False).run(None, feed), strict=True):
        assert value.shape == apart.shapes[name]
    feed = {"x": np.zeros(apart.single["x"], np.float32)}
    for name, value in zip(names, apart.graph.session(names, optimize=False).run(None, feed), strict=True):
        assert value.shape == apart.single[name]


def test_parts_remember_which_part_of_which_weight_they_are() -> None:
    model = graphs.transformer(qkv="flat", blocks=1)
    whole = graphs.initializers(model)["/blocks.0/attn/qkv.w"]
    graph = unpack(normalize(load(model))).graph
    assert packed_sources(graph).keys() == {"/blocks.0/attn/qkv.w", "/blocks.0/attn/qkv.b"}
    parts = packed_sources(graph)["/blocks.0/attn/qkv.w"]
    found = []
    for name in parts:
        part = graph.parts[name]
        assert root_of(graph, name) == "/blocks.0/attn/qkv.w"
        np.testing.assert_array_equal(graph.weights[name], np.take(whole, part.indices, axis=part.axis))
        found.extend(part.indices.tolist())
    assert sorted(found) == list(range(12 + 12 + 18))
    assert not set(parts) & {"/blocks.0/attn/qkv.w"} and "/blocks.0/attn/qkv.w" not in graph.weights


def test_only_the_named_weights_are_taken_apart() -> None:
    model = graphs.transformer(qkv="flat")
    packed = normalize(load(model))
    wanted = {"/blocks.1/attn/qkv.w", "/blocks.1/attn/qkv.b"}
    some = unpack(packed, only=wanted)
    assert packed_sources(some.graph).keys() == wanted
    assert [node.op_type for node in some.graph.nodes].count("Split") == 1
    assert difference(packed.graph, some.graph, [graphs.inputs_for(model)]) < 1e-6
    assert not packed_sources(unpack(packed, only=()).graph)


def test_a_packed_projection_that_is_also_read_whole_stays() -> None:
    net = graphs.Net()
    x = net.input("x", ["N", 5])
    both = net.linear(x, "both", 5, 8)
    left, right = net.split(both, [4, 4], axis=-1)
    joined = net.op("Add", net.op("Mul", left, right), net.op("ReduceSum", both, [1], keepdims=1))
    net.output(net.linear(joined, "o", 4, 3), ["N", 3])
    analysis = analyse_model(net.proto())
    assert not packed_sources(analysis.graph)
    assert not any(group.prunable for group in analysis.structure.groups)


def test_packed_projections_without_bias_come_apart() -> None:
    net = graphs.Net()
    x = net.input("x", ["N", 5])
    left, right = net.split(net.linear(x, "both", 5, 8, bias=False), [4, 4], axis=-1)
    net.output(net.linear(net.op("Mul", left, right), "o", 4, 3), ["N", 3])
    analysis = analyse_model(net.proto())
    assert packed_sources(analysis.graph).keys() == {"both.w"}
    assert [(group.kind, group.size) for group in analysis.structure.groups if group.prunable] == [("ffn", 4)]


@pytest.mark.parametrize("opset", [9, 17])
@pytest.mark.parametrize("between", ["Slice", "Expand", "Reshape"])
def test_operators_with_sizes_between_a_projection_and_its_selections(between: str, opset: int) -> None:
    """Part of another axis is taken, or sizes are computed at run time, before the packed axis is split."""
    net = graphs.Net(opset)
    h = net.linear(net.input("x", ["N", 4, 5]), "packed", 5, 12)
    if between == "Slice":
        bounds = {"starts": [1], "ends": [3], "axes": [1]}
        h = net.op("Slice", h, *bounds.values()) if opset >= 10 else net.op("Slice", h, **bounds)
    elif between == "Expand":
        h = net.op("Expand", h, net.op("Shape", h))
    else:
        h = net.op("Reshape", h, net.op("Shape", net.op("Relu", h)))
    gate, value = net.split(h, [6, 6], 2)
    h = net.op("Mul", net.op("Sigmoid", gate), value)
    net.output(net.linear(h, "out", 6, 3), ["N", 2 if between == "Slice" else 4, 3])
    model = net.proto()
    analysis = analyse_model(model)
    (group,) = (group for group in analysis.structure.groups if group.kind == "ffn")
    assert group.size == 6 and group.prunable
    applied = apply(analysis, graphs.random_plan([group], np.random.default_rng(0)))
    assert prove(analysis, applied, [graphs.inputs_for(model, batch) for batch in (1, 3)], 1).passed


def test_a_part_that_is_taken_apart_again_can_be_cut() -> None:
    """Value and the two parts of a query, as where only a part of a head is rotated."""
    net = graphs.Net()
    h = net.linear(net.input("x", ["N", 4, 5]), "packed", 5, 16)
    left, value = net.split(h, [8, 8], 2)
    first, second = net.split(net.op("Tanh", left), [3, 5], 2)
    net.output(
        net.op(
            "Add",
            net.linear(net.op("Relu", value), "a", 8, 3),
            net.op("Add", net.linear(first, "b", 3, 3), net.linear(second, "c", 5, 3)),
        ),
        ["N", 4, 3],
    )
    model = net.proto()
    analysis = analyse_model(model)
    assert sorted(group.size for group in analysis.structure.groups if group.kind == "ffn") == [3, 5, 8]
    for groups in ([group] for group in analysis.structure.groups if group.kind == "ffn"):
        applied = apply(analysis, graphs.random_plan(groups, np.random.default_rng(0)))
        assert prove(analysis, applied, [graphs.inputs_for(model, batch) for batch in (1, 3)], 1).passed
