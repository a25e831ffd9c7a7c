"""Normalising changes the form and never the outputs: scales, sharing, aliases, constants, Reshape targets."""

from __future__ import annotations

from typing import Any

import graphs
import numpy as np
import onnx
import pytest
from onnx import helper

from onnxsnp.analysis import analyse_model
from onnxsnp.errors import ModelError
from onnxsnp.evaluation.verify import difference, masked, prove
from onnxsnp.graph.ir import Graph, attribute
from onnxsnp.graph.normalize import Normalized, as_graph, normalize
from onnxsnp.model import load
from onnxsnp.planning.plan import Plan
from onnxsnp.surgery.apply import apply, to_model

LAYOUTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "packed": {"qkv": "packed", "v": 4},
    "flat": {"qkv": "flat"},
    "reverse": {"reverse": True},
    "scale from shape": {"scale": "shape"},
    "gated": {"gate": "packed"},
    "aliases": {"alias": True},
    "shared": {"shared_norm": True},
    "class token": {"pool": "first"},
    "opset 11": {"opset": 11},
    "sequence": {"tokens": "S"},
    "static": {"batch": 2, "scale": "shape", "pool": "first"},
}


def normal(model: onnx.ModelProto) -> Normalized:
    return normalize(load(model))


def feeds(model: onnx.ModelProto) -> list[dict[str, np.ndarray]]:
    return [graphs.inputs_for(model, batch, S=tokens) for batch, tokens in ((1, 4), (3, 9))]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_both_forms_compute_what_the_file_computes(layout: str) -> None:
    model = graphs.transformer(**LAYOUTS[layout])
    found = normal(model)
    original = as_graph(load(model))
    inputs = [graphs.inputs_for(model, 2)] if layout == "static" else feeds(model)
    assert difference(original, found.base, inputs) < 1e-6
    assert difference(original, found.graph, inputs) < 1e-6


def test_a_scale_recomputed_from_the_head_size_is_frozen() -> None:
    model = graphs.transformer(scale="shape")
    found = normal(model)
    assert any(node.op_type == "Sqrt" for node in found.base.nodes)
    assert not any(node.op_type in ("Sqrt", "Shape") for node in found.graph.nodes)
    divisors = [found.graph.weights[node.input[1]] for node in found.graph.nodes if node.op_type == "Div"]
    assert len(divisors) == 2 and all(value == pytest.approx(2.0) for value in divisors)


def test_cutting_dead_pairs_changes_the_output_only_where_the_scale_was_not_frozen() -> None:
    model = graphs.transformer(scale="shape", blocks=1)
    analysis = analyse_model(model)
    group = analysis.groups["qk.0"]
    dead = {}
    for name, array in graphs.initializers(model).items():
        if "/attn/q." in name or "/attn/k." in name:
            dead[name] = np.array(array)
            dead[name].reshape(-1, 3, 4)[:, :, 2:] = 0
    model = graphs.set_weights(model, dead)
    analysis = analyse_model(model)
    applied = apply(analysis, Plan("", [graphs.keeping(group, [[0, 1]] * 3)]))
    inputs = feeds(model)
    original = as_graph(analysis.model)
    assert difference(original, applied.graph, inputs) < 1e-6
    thawed = applied.graph.copy()
    for node in thawed.nodes:
        if node.op_type == "Div":
            thawed.weights[node.input[1]] = np.asarray(np.sqrt(2), np.float32)
    assert difference(original, thawed, inputs) > 1e-3


def test_every_use_of_a_weight_gets_its_own_name_and_the_file_shares_it_again() -> None:
    model = graphs.transformer(shared_norm=True)
    graph = normal(model).graph
    uses = [name for node in graph.nodes for name in node.input if name in graph.weights]
    assert len(uses) == len(set(uses))
    own = [name for name in graph.weights if graph.origin.get(name, name) == "norm.scale"]
    assert len(own) == 5 and len({id(graph.weights[name]) for name in own}) == 1
    analysis = analyse_model(model)
    plan = graphs.random_plan([analysis.groups["ffn.0"]], np.random.default_rng(0))
    names = [name for name in graphs.initializers(to_model(apply(analysis, plan).graph)) if "norm.scale" in name]
    assert len(names) == 1


def test_sharers_that_are_cut_differently_stay_apart() -> None:
    net = graphs.Net()
    x = net.input("x", ["N", 6])
    shared = net.weight("shared", 8)
    for index in range(2):
        h = net.op("Relu", net.op("Add", net.op("MatMul", x, net.weight(f"a{index}", 6, 8)), shared))
        x = net.op("MatMul", h, net.weight(f"b{index}", 8, 6))
    net.output(x, ["N", 6])
    model = net.proto()
    analysis = analyse_model(model)
    plan = Plan(
        "",
        [
            graphs.keeping(analysis.groups["ffn.0"], [[0, 1, 2]]),
            graphs.keeping(analysis.groups["ffn.2"], [[3, 4, 5, 6]]),
        ],
    )
    applied = apply(analysis, plan)
    assert prove(analysis, applied, feeds(model)).masked_equality < 1e-6
    shared_now = {
        name: array for name, array in graphs.initializers(to_model(applied.graph)).items() if "shared" in name
    }
    assert sorted(len(array) for array in shared_now.values()) == [3, 4]
    whole = graphs.initializers(model)["shared"]
    assert any(np.array_equal(array, whole[:3]) for array in shared_now.values())
    assert any(np.array_equal(array, whole[3:7]) for array in shared_now.values())


def test_identity_aliases_of_weights_are_resolved() -> None:
    found = normal(graphs.transformer(alias=True))
    assert not any(node.op_type == "Identity" for node in found.graph.nodes)


def one_node(*nodes: onnx.NodeProto, **weights: np.ndarray) -> onnx.ModelProto:
    graph = helper.make_graph(
        list(nodes),
        "g",
        [helper.make_tensor_value_info("x", 1, ["N", 4])],
        [helper.make_tensor_value_info("y", 1, None)],
        [onnx.numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize(
    "value",
    [
        {"value": onnx.numpy_helper.from_array(np.asarray(3.0, np.float32))},
        {"value_float": 3.0},
        {"value_floats": [3.0]},
    ],
)
def test_constants_become_weights(value: dict[str, Any]) -> None:
    model = one_node(helper.make_node("Constant", [], ["c"], **value), helper.make_node("Mul", ["x", "c"], ["y"]))
    graph = as_graph(load(model))
    assert [node.op_type for node in graph.nodes] == ["Mul"] and float(graph.weights["c"].reshape(())) == 3.0


def test_a_constant_that_is_an_output_stays_a_node() -> None:
    model = one_node(helper.make_node("Constant", [], ["y"], value_float=3.0), helper.make_node("Relu", ["x"], ["z"]))
    assert [node.op_type for node in as_graph(load(model)).nodes] == ["Constant"]


def test_nodes_get_distinct_names() -> None:
    model = one_node(
        helper.make_node("Relu", ["x"], ["a"]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Relu", ["b"], ["y"], name="Relu"),
    )
    names = [node.name for node in as_graph(load(model)).nodes]
    assert len(set(names)) == 3 and all(names)


def test_local_functions_are_inlined() -> None:
    body = helper.make_function(
        "own", "Double", ["a"], ["b"], [helper.make_node("Add", ["a", "a"], ["b"])], [helper.make_opsetid("", 17)]
    )
    graph = helper.make_graph(
        [helper.make_node("Double", ["x"], ["y"], domain="own")],
        "g",
        [helper.make_tensor_value_info("x", 1, ["N", 4])],
        [helper.make_tensor_value_info("y", 1, ["N", 4])],
    )
    model = helper.make_model(
        graph,
        functions=[body],
        ir_version=8,
        opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("own", 1)],
    )
    assert [node.op_type for node in as_graph(load(model)).nodes] == ["Add"]


@pytest.mark.parametrize(
    "nodes",
    [
        [
            helper.make_node("Add", ["x", "b"], ["a"]),
            helper.make_node("Relu", ["a"], ["b"]),
            helper.make_node("Relu", ["b"], ["y"]),
        ],
        [helper.make_node("Add", ["x", "nowhere"], ["y"])],
    ],
)
def test_cycles_and_tensors_from_nowhere_are_refused(nodes: list[onnx.NodeProto]) -> None:
    with pytest.raises(ModelError, match="cycle, or reads a tensor that nothing computes"):
        as_graph(load(one_node(*nodes)))


def test_an_output_that_nothing_computes_is_refused() -> None:
    with pytest.raises(ModelError, match="nothing computes the model's output 'y'"):
        as_graph(load(one_node(helper.make_node("Relu", ["x"], ["z"]))))


def test_folding_does_not_make_the_file_larger() -> None:
    net = graphs.Net()
    x = net.input("x", ["N", 64, 64])
    big = net.op("Expand", net.weight("row", 1, 64), [64, 64], name="big")
    net.output(net.op("Add", x, big), ["N", 64, 64])
    graph = normal(net.proto()).graph
    assert any(node.op_type == "Expand" for node in graph.nodes)
    assert max(array.size for array in graph.weights.values()) == 64


def targets(graph: Graph) -> list[list[int]]:
    return [graph.weights[node.input[1]].tolist() for node in graph.nodes if node.op_type == "Reshape"]


def reshaping(batch: graphs.Size, tokens: graphs.Size, opset: int = 17) -> onnx.ModelProto:
    """Reshapes whose targets are computed from shapes at run time."""
    net = graphs.Net(opset)
    x = net.input("x", [batch, tokens, 6])
    shape = net.op("Shape", x)
    sizes = [net.op("Gather", shape, [axis], axis=0) for axis in (0, 1)]
    apart = net.op("Reshape", x, net.op("Concat", *sizes, [2], [3], axis=0))
    net.output(net.op("Relu", apart), [batch, tokens, 2, 3])
    return net.proto()


@pytest.mark.parametrize(
    ("batch", "tokens", "want"), [(2, 5, [2, 5, 2, 3]), ("N", 5, [-1, 5, 2, 3]), ("N", "S", [0, 0, 2, 3])]
)
def test_reshape_targets_become_constants(batch: graphs.Size, tokens: graphs.Size, want: list[int]) -> None:
    model = reshaping(batch, tokens)
    found = normal(model)
    assert targets(found.graph) == [want]
    assert difference(as_graph(load(model)), found.graph, [graphs.inputs_for(model, 2, N=2, S=5)]) == 0


@pytest.mark.parametrize("opset", [11, 13])
def test_reshape_targets_with_two_free_sizes_run_before_opset_14(opset: int) -> None:
    model = reshaping("N", "S", opset)
    assert difference(as_graph(load(model)), normal(model).graph, [graphs.inputs_for(model, 3, N=3, S=4)]) == 0


def test_the_hidden_scale_of_attention_is_spelled_out() -> None:
    net = graphs.Net(23)
    x = net.input("x", ["N", 3, 5, 4])
    net.output(net.op("Attention", x, x, x), ["N", 3, 5, 4])
    model = net.proto()
    (node,) = [node for node in normal(model).graph.nodes if node.op_type == "Attention"]
    assert attribute(node, "scale") == pytest.approx(0.5)


def test_an_own_scale_of_attention_is_left() -> None:
    net = graphs.Net(23)
    x = net.input("x", ["N", 3, 5, 4])
    net.output(net.op("Attention", x, x, x, scale=0.3), ["N", 3, 5, 4])
    (node,) = [node for node in normal(net.proto()).graph.nodes if node.op_type == "Attention"]
    assert attribute(node, "scale") == pytest.approx(0.3)


def test_a_class_token_expanded_to_a_static_batch_can_be_cut() -> None:
    model = graphs.transformer(pool="first", batch=2)
    analysis = analyse_model(model)
    applied = apply(analysis, graphs.random_plan([analysis.groups["residual"]], np.random.default_rng(0)))
    assert prove(analysis, applied, [graphs.inputs_for(model)]).masked_equality < 1e-5


def strided(*, reverse: bool = False) -> onnx.ModelProto:
    """A mean over tokens read through its flat memory, as exporters write as_strided; `reverse` reads it backwards."""
    net = graphs.Net()
    x = net.input("x", ["N", 4, 5])
    h = net.mean(net.op("Relu", net.linear(x, "a", 5, 6)), 1, keepdims=0)
    rows = net.op("Range", 0, net.op("Gather", net.op("Shape", x), 0, axis=0), 1)
    columns = net.op("Range", 5, -1, -1) if reverse else np.arange(6)
    places = net.op("Add", net.op("Mul", net.unsqueeze(rows, 1), 6), columns)
    h = net.op("Gather", net.reshape(h, -1), places, axis=0, name="strided")
    net.output(net.linear(h, "b", 6, 3), ["N", 3])
    return net.proto()


def test_a_gather_of_everything_in_its_order_is_a_reshape() -> None:
    model = strided()
    analysis = analyse_model(model)
    (group,) = analysis.structure.groups
    assert (group.size, group.reasons) == (6, ())
    applied = apply(analysis, Plan("", [graphs.keeping(group, [[0, 2, 5]])]))
    assert prove(analysis, applied, [graphs.inputs_for(model, batch) for batch in (1, 2, 5)]).passed


def test_a_gather_in_another_order_stays() -> None:
    analysis = analyse_model(strided(reverse=True))
    assert any(node.name == "strided" and node.op_type == "Gather" for node in analysis.graph.nodes)
    assert analysis.structure.groups == []
    assert [item.reason for item in analysis.structure.skipped] == ["the width 6 of 'a.w': Gather picks entries of it"]


def test_weights_sliced_by_sizes_read_from_shapes_become_weights_and_can_be_masked() -> None:
    """nn.MultiheadAttention with an own query: its packed projection is cut up by the width of the input."""
    net = graphs.Net()
    x = net.input("x", ["N", 4, 6])
    width = net.op("Slice", net.op("Shape", x), np.asarray([2]), np.asarray([3]))
    packed = net.weight("packed", 12, 6)
    first = net.op("Slice", packed, np.asarray([0]), width, np.asarray([0]))
    probe = net.op("Expand", net.weight("probe", 1, 1, 6), net.op("Concat", _batch(net, x), np.asarray([1, 6]), axis=0))
    query = net.op("MatMul", probe, net.op("Transpose", first, perm=[1, 0]))
    net.output(net.op("MatMul", net.op("Relu", query), net.weight("last", 6, 5)), ["N", 1, 5])
    model = net.proto()
    found = normal(model)
    assert not any(node.op_type == "Slice" for node in found.base.nodes if "packed" in node.input)
    assert difference(as_graph(load(model)), found.base, [graphs.inputs_for(model, 3)]) < 1e-6
    analysis = analyse_model(model)
    (group,) = analysis.structure.groups
    assert (group.kind, group.size, group.prunable) == ("ffn", 6, True)
    applied = apply(analysis, graphs.random_plan([group], np.random.default_rng(0)))
    expected = masked(analysis.normalized.base, analysis.graph, analysis.dependencies, applied.cuts, {})
    assert difference(expected, applied.graph, [graphs.inputs_for(model, 3)]) < 1e-6


def _batch(net: graphs.Net, x: Any) -> Any:
    return net.op("Slice", net.op("Shape", x), np.asarray([0]), np.asarray([1]))


def test_a_folded_part_of_a_split_leaves_the_operator_whole() -> None:
    """onnxruntime crashes on a Split with an output that has no name."""
    net = graphs.Net()
    x = net.input("x", ["N", 6])
    parts = net.split(net.op("Neg", net.weight("both", 6, 8)), [3, 5], 1)
    net.output(net.op("Concat", *(net.op("MatMul", x, part) for part in parts), axis=1), ["N", 8])
    model = net.proto()
    found = normal(model)
    assert all(name for node in found.base.nodes for name in node.output)
    assert difference(as_graph(load(model)), found.base, [graphs.inputs_for(model, 3)]) < 1e-6
