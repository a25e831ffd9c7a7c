"""Segments run one after another give what the whole graph gives, and nothing is handed on that is not needed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import graphs
import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from onnxsnp.analysis import analyse_model
from onnxsnp.graph.branches import find_branches
from onnxsnp.graph.ir import Graph, subgraph_reads
from onnxsnp.graph.normalize import as_graph
from onnxsnp.graph.segments import between, segment_graph, segments
from onnxsnp.model import load

FOLDER = Path(__file__).resolve().parent.parent / "exports"
EXPECTED: dict[str, dict[str, Any]] = json.loads((FOLDER / "expected.json").read_text())
EXPORTS = [
    "hf_vit_sdpa_dynamo23_dyn",
    "own_gemm_ts17_dyn",
    "timm_beit_eager_ts17_dyn",
    "timm_beit_sdpa_dynamo18",
    "timm_deit_eager_ts11",
    "timm_deit_eager_ts17_dyn",
    "timm_deit_sdpa_dynamo18_b2",
    "timm_deit_sdpa_dynamo20",
    "timm_distilled_eager_ts17_dyn",
    "timm_distilled_sdpa_dynamo18_dyn",
    "torchvision_vit_mha_ts17_dyn",
]


def feed_of(name: str) -> dict[str, np.ndarray]:
    held = EXPECTED[f"{name}.onnx"]
    shape = (3, *held["input"]["shape"][1:]) if held["dynamic_batch"] else held["input"]["shape"]
    return {held["input"]["name"]: np.random.default_rng(5).standard_normal(shape).astype(np.float32)}


def in_pieces(graph: Graph, ends: Sequence[str], feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The outputs, from segments of which each sees only what it declares."""
    state = dict(feed)
    pieces = segments(graph, ends)
    assert len(pieces) == len(ends) + 1
    for segment in pieces:
        state = {name: state[name] for name in segment.inputs}
        made = [name for name in segment.outputs if name not in state]
        if made:
            part = segment_graph(graph, segment, made, {name: array.dtype for name, array in state.items()})
            assert set(part.inputs) <= set(segment.inputs) and len(part.nodes) <= len(segment.nodes)
            session = part.session(threads=1, optimize=False)
            values = session.run(made, {name: state[name] for name in part.inputs})
            state |= dict(zip(made, values, strict=True))
        state = {name: state[name] for name in segment.outputs}
    return state


def check(graph: Graph, ends: Sequence[str], feed: dict[str, np.ndarray]) -> None:
    """In pieces as whole, bit for bit; every node once; every handed-on tensor is read later or is an output."""
    wanted = graph.session(threads=1, optimize=False).run(graph.outputs, feed)
    got = in_pieces(graph, ends, feed)
    assert list(got) == graph.outputs
    for name, array in zip(graph.outputs, wanted, strict=True):
        assert np.array_equal(array, got[name]), name
    pieces = segments(graph, ends)
    assert [node.name for piece in pieces for node in piece.nodes] == [node.name for node in graph.nodes]
    assert all(end in piece.nodes[-1].output for end, piece in zip(ends, pieces, strict=False))
    for index, piece in enumerate(pieces[:-1]):
        later = [node for other in pieces[index + 1 :] for node in other.nodes]
        read = {name for node in later for name in [*node.input, *subgraph_reads(node)]} | set(graph.outputs)
        earlier = {name for other in pieces[: index + 1] for node in other.nodes for name in node.output}
        assert set(piece.outputs) == {name for name in read & (earlier | set(graph.inputs)) if name}
        assert sorted(pieces[index + 1].inputs) == sorted(piece.outputs) == sorted(set(piece.outputs))


@pytest.mark.parametrize("name", EXPORTS)
def test_a_real_export_cut_behind_its_branches_gives_the_same_outputs(name: str) -> None:
    analysis = analyse_model(FOLDER / f"{name}.onnx")
    ends = [branch.stream for branch in find_branches(analysis.graph, analysis.dependencies, analysis.linears)]
    assert ends
    check(analysis.graph, ends, feed_of(name))


@pytest.mark.parametrize(
    "name", ["timm_beit_eager_ts17_dyn", "timm_distilled_sdpa_dynamo18_dyn", "hf_deit_eager_ts17_dyn"]
)
def test_a_graph_can_be_cut_anywhere(name: str) -> None:
    """Also behind shape arithmetic and inside attention, as the file was written."""
    graph = as_graph(load(FOLDER / f"{name}.onnx"))
    places = np.sort(np.random.default_rng(0).choice(len(graph.nodes), 7, replace=False))
    check(graph, [graph.nodes[place].output[0] for place in places], feed_of(name))


def test_inputs_read_late_and_outputs_computed_early_are_handed_on() -> None:
    net = graphs.Net()
    x, late = net.input("x", ["N", 4]), net.input("late", ["N", 4])
    first = net.op("Relu", x, name="first")
    early = net.op("Tanh", first, name="early")
    middle = net.op("Sigmoid", first, name="middle")
    last = net.op("Add", net.op("Exp", middle, name="exp"), late, name="last")
    net.output(early, ["N", 4], "early")
    net.output(last, ["N", 4], "y")
    graph = as_graph(load(net.proto()))
    assert [node.name for node in graph.nodes] == ["first", "early", "middle", "exp", "last"]
    pieces = segments(graph, ["early", "middle.out"])
    assert [set(piece.inputs) for piece in pieces] == [
        {"x", "late"},
        {"late", "first.out", "early"},
        {"late", "early", "middle.out"},
    ]
    assert pieces[-1].outputs == ("early", "y")
    check(graph, ["early", "middle.out"], graphs.inputs_for(net.proto()))


def test_a_cut_behind_the_last_node_leaves_an_empty_segment() -> None:
    model = graphs.mlp(4, 6, 3)
    graph = as_graph(load(model))
    assert segments(graph, ["y"])[-1].nodes == ()
    check(graph, ["y"], graphs.inputs_for(model))


def test_without_cuts_the_only_segment_is_the_graph() -> None:
    model = graphs.transformer(blocks=1)
    graph = as_graph(load(model))
    (whole,) = segments(graph, [])
    assert (whole.inputs, whole.outputs, len(whole.nodes)) == (("x",), ("y",), len(graph.nodes))
    check(graph, [], graphs.inputs_for(model))


def test_operands_and_outputs_that_are_left_out_are_no_tensors() -> None:
    """A normalisation without its second output, and a Clip without its lower bound, both spell that as ""."""
    net = graphs.Net()
    x = net.input("x", ["N", 5])
    h = net.op("Relu", net.norm(x, "norm", 5), name="relu")
    net.output(net.op("Clip", net.op("Tanh", h), None, 0.3), ["N", 5])
    model = net.proto()
    next(node for node in model.graph.node if node.op_type == "LayerNormalization").output.extend(["", "spread"])
    graph = as_graph(load(model))
    assert segments(graph, ["relu.out"])[0].outputs == ("relu.out",)
    check(graph, ["relu.out"], graphs.inputs_for(model))


def bare(nodes: list[onnx.NodeProto], inputs: list[onnx.ValueInfoProto], outputs: list[onnx.ValueInfoProto]) -> Graph:
    """A graph without weights, its nodes in the order given."""
    opset = [helper.make_opsetid("", 17)]
    shell = helper.make_model(helper.make_graph([], "g", inputs, outputs), opset_imports=opset, ir_version=8)
    return Graph(shell, nodes, {})


def test_what_only_the_inside_of_a_node_reads_is_handed_on() -> None:
    def body(name: str, kind: str) -> onnx.GraphProto:
        node = helper.make_node(kind, ["held"], [f"{name}.out"])
        return helper.make_graph([node], name, [], [helper.make_tensor_value_info(f"{name}.out", 1, ["N", 3])])

    nodes = [
        helper.make_node("Exp", ["x"], ["held"], name="held"),
        helper.make_node("Tanh", ["x"], ["mark"], name="mark"),
        helper.make_node(
            "If", ["which"], ["y"], name="if", then_branch=body("then", "Neg"), else_branch=body("else", "Abs")
        ),
    ]
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3]),
        helper.make_tensor_value_info("which", TensorProto.BOOL, []),
    ]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 3]) for name in ("y", "mark")]
    graph = bare(nodes, inputs, outputs)
    assert set(segments(graph, ["mark"])[1].inputs) == {"held", "which", "mark"}
    for which in (True, False):
        check(graph, ["mark"], {"x": np.ones((2, 3), np.float32), "which": np.asarray(which)})


@pytest.mark.parametrize(
    "ends",
    [
        ["Relu_3.out", "fc0/Add.out"],
        ["fc0/Add.out", "fc0/Add.out"],
        ["x"],
        ["fc0.w"],
        ["no such tensor"],
        [""],
    ],
)
def test_tensors_in_the_wrong_order_or_that_nothing_computes_are_refused(ends: list[str]) -> None:
    net = graphs.Net()
    h = net.linear(net.input("x", ["N", 4]), "fc0", 4, 6)
    net.output(net.op("Exp", net.op("Relu", h)), ["N", 6])
    graph = as_graph(load(net.proto()))
    assert {"fc0/Add.out", "Relu_3.out"} <= {name for node in graph.nodes for name in node.output}
    with pytest.raises(ValueError, match="in the order in which they are computed"):
        segments(graph, ends)


def test_a_segment_shares_the_weights_it_reads_and_has_no_others() -> None:
    model = graphs.mlp(4, 6, 5, 3)
    graph = as_graph(load(model))
    middle = segments(graph, ["fc0/Add.out", "fc1/Add.out"])[1]
    part = segment_graph(graph, middle, middle.outputs, {"fc0/Add.out": np.dtype(np.float32)})
    assert part.weights.keys() == {"fc1.w", "fc1.b"} and part.weights["fc1.w"] is graph.weights["fc1.w"]
    assert part.inputs == ["fc0/Add.out"] and part.outputs == ["fc1/Add.out"]


@st.composite
def chains(draw: st.DrawFn) -> tuple[Graph, list[int]]:
    """Nodes of which each reads any one or two tensors before it, any outputs, and places to cut at."""
    count = draw(st.integers(1, 9))
    names = ["a", "b"]
    nodes = []
    for index in range(count):
        reads = draw(st.lists(st.sampled_from(names), min_size=1, max_size=2))
        kind = "Add" if len(reads) == 2 else draw(st.sampled_from(["Tanh", "Neg"]))
        nodes.append(helper.make_node(kind, reads, [f"t{index}"], name=f"n{index}"))
        names.append(f"t{index}")
    outputs = draw(st.lists(st.sampled_from(names[2:]), unique=True, min_size=1))
    places = sorted(draw(st.sets(st.integers(0, count - 1))))
    one, other = ([helper.make_tensor_value_info(name, 1, [3]) for name in these] for these in (["a", "b"], outputs))
    return bare(nodes, one, other), places


@settings(max_examples=30, deadline=None)
@given(chains())
def test_any_graph_cut_at_any_places_gives_the_same_outputs(case: tuple[Graph, list[int]]) -> None:
    graph, places = case
    feed = {name: np.random.default_rng(index).standard_normal(3).astype(np.float32) for index, name in enumerate("ab")}
    check(graph, [graph.nodes[place].output[0] for place in places], feed)


def diamond() -> Graph:
    """x -> a -> (b, c) -> d = b + c · side, and e = d · w."""
    net = graphs.Net()
    x, side = net.input("x", ["N", 4]), net.input("side", ["N", 4])
    a = net.op("Relu", x, name="a")
    b, c = net.op("Tanh", a, name="b"), net.op("Exp", a, name="c")
    d = net.op("Add", b, net.op("Mul", c, side, name="m"), name="d")
    net.output(net.op("Mul", d, net.weight("w", 4), name="e"), ["N", 4])
    return as_graph(load(net.proto()))


@pytest.mark.parametrize(
    ("inputs", "output", "nodes"),
    [
        (["d.out"], "y", ["e"]),
        (["b.out", "m.out"], "y", ["d", "e"]),
        (["a.out", "side"], "y", ["b", "c", "m", "d", "e"]),
        (["x", "side"], "d.out", ["a", "b", "c", "m", "d"]),
        (["x"], "b.out", ["a", "b"]),
        (["a.out", "b.out", "x"], "b.out", []),
        (["c.out"], "w", []),
        (["a.out"], "y", None),
        (["b.out", "c.out"], "d.out", None),
        (["b.out"], "c.out", None),
    ],
)
def test_between_is_what_computes_a_tensor_from_others_and_nothing_else(
    inputs: list[str], output: str, nodes: list[str] | None
) -> None:
    found = between(diamond(), inputs, output)
    assert (found is None) == (nodes is None)
    if found is not None and nodes is not None:
        # independent nodes may come in either order, but never before what they read
        assert sorted(node.name for node in found.nodes) == sorted(nodes)
        assert (found.inputs, found.outputs) == (tuple(inputs), (output,))


@pytest.mark.parametrize("name", ["timm_deit_eager_ts11", "own_gemm_dynamo18", "timm_deit_sdpa_dynamo20"])
def test_what_lies_between_two_streams_gives_the_second_from_the_first(name: str) -> None:
    analysis = analyse_model(FOLDER / f"{name}.onnx")
    graph = analysis.graph
    streams = [branch.stream for branch in find_branches(graph, analysis.dependencies, analysis.linears)]
    values = graph.session(streams, threads=1, optimize=False).run(streams, feed_of(name))
    for first, second, given_value, want in zip(streams, streams[1:], values, values[1:], strict=False):
        part = between(graph, [first], second)
        assert part is not None and between(graph, [second], first) is None
        session = segment_graph(graph, part, [second], {first: given_value.dtype}).session(threads=1, optimize=False)
        (got,) = session.run([second], {first: given_value})
        np.testing.assert_allclose(got, want, atol=1e-6)


def test_what_the_inside_of_a_node_reads_counts() -> None:
    branch = helper.make_graph(
        [helper.make_node("Add", ["inner", "x"], ["sum"])],
        "then",
        [],
        [helper.make_tensor_value_info("sum", TensorProto.FLOAT, None)],
    )
    nodes = [
        helper.make_node("Relu", ["x"], ["inner"], name="inner"),
        helper.make_node("If", ["flag"], ["y"], name="if", then_branch=branch, else_branch=branch),
    ]
    inputs = [
        helper.make_tensor_value_info("flag", TensorProto.BOOL, []),
        helper.make_tensor_value_info("x", TensorProto.FLOAT, [3]),
    ]
    graph = bare(nodes, inputs, [helper.make_tensor_value_info("y", TensorProto.FLOAT, [3])])
    assert between(graph, ["flag"], "y") is None
    assert between(graph, ["flag", "inner"], "y") is None
    found = between(graph, ["flag", "x"], "y")
    assert found is not None and [node.name for node in found.nodes] == ["inner", "if"]
