"""Lowering a whole model: sizes, constants, types, opset, branches, and what is refused in one line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import graphs
import numpy as np
import onnx
import pytest
from one_node import TARGETS, assert_lowered, node_model, noise, ops
from onnx import TensorProto, helper, numpy_helper

from onnxsnp.analysis import analyse_model
from onnxsnp.deploy import lower as lowering
from onnxsnp.deploy.lower import emitted_opset, lower, strongly_typed
from onnxsnp.deploy.parity import parity
from onnxsnp.deploy.targets import BUILT_IN
from onnxsnp.errors import ModelError, PlanError

NANO, ORIN, RTX = BUILT_IN["jetson-nano"], BUILT_IN["jetson-orin"], BUILT_IN["rtx"]


def sizes(value: onnx.ValueInfoProto) -> list[int]:
    return [dim.dim_value for dim in value.type.tensor_type.shape.dim]


def pair(first: list[object], second: list[object]) -> onnx.ModelProto:
    """The sum of two inputs, whose sizes are given as numbers, symbols or None."""
    node = helper.make_node("Add", ["a", "b"], ["y"], name="add")
    values = [helper.make_tensor_value_info(name, 1, shape) for name, shape in (("a", first), ("b", second))]
    graph = helper.make_graph([node], "g", values, [helper.make_tensor_value_info("y", 1, None)])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize("batch", [1, 3])
def test_a_free_batch_is_fixed_everywhere(batch: int) -> None:
    proto = lower(graphs.mlp(4, 8, 3), NANO, batch=batch).proto
    assert sizes(proto.graph.input[0]) == [batch, 4] and sizes(proto.graph.output[0]) == [batch, 3]
    onnx.checker.check_model(proto, full_check=True)


def test_a_fixed_batch_stays_as_it_is() -> None:
    assert sizes(lower(graphs.mlp(4, 3, batch=2), NANO).proto.graph.input[0]) == [2, 4]


def test_a_size_given_for_one_input_is_that_of_the_same_symbol_in_another() -> None:
    proto = lower(pair(["N", "T"], ["N", "T"]), NANO, input_shapes={"a": [2, 5]}).proto
    assert [sizes(value) for value in proto.graph.input] == [[2, 5], [2, 5]]
    proto = lower(pair(["N", "T"], ["T"]), NANO, input_shapes={"a": [1, 5]}).proto  # T leads there, and is no batch
    assert [sizes(value) for value in proto.graph.input] == [[1, 5], [5]]
    proto = lower(pair(["N", "p+T"], ["N", 1]), NANO, input_shapes={"a": [1, 5]}).proto
    assert sizes(proto.graph.output[0]) == [1, 5]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            None,
            "axis 1 of the input 'a' has the free size 'T', an engine needs a fixed one; give it with --input-shape",
        ),
        ({"c": [1, 2]}, "the model has no input 'c'; its inputs: a, b"),
        ({"a": [1]}, "gives 'a' 1 sizes, the model's input has 2"),
        ({"a": [1, 0]}, "gives 'a' the size 0 at axis 1, which is not positive"),
        ({"a": [1, 2], "b": [1, 3]}, "gives 'T' of 'b' the size 3, another input has 2"),
    ],
)
def test_sizes_that_are_missing_or_wrong_are_one_line(given: dict[str, list[int]] | None, said: str) -> None:
    with pytest.raises(ModelError) as caught:
        lower(pair(["N", "T"], ["N", "T"]), NANO, input_shapes=given)
    assert said in str(caught.value)


def test_a_size_that_the_model_contradicts_is_refused() -> None:
    with pytest.raises(ModelError, match="gives 'a' the size 4 at axis 1, the model has 3"):
        lower(pair(["N", 3], ["N", 3]), NANO, input_shapes={"a": [1, 4]})
    with pytest.raises(ModelError, match=r"axis 1 of the input 'b' has the free size '\?'"):
        lower(pair(["N", 3], ["N", None]), NANO)


def test_what_follows_from_sizes_is_a_constant_and_the_chain_is_gone() -> None:
    net = graphs.Net(17)
    x = net.input("x", ["N", 6, "T"])
    batch = net.op("Gather", net.op("Shape", x), 0, axis=0)
    tail = net.op("Unsqueeze", batch, [0])
    shape = net.op("Concat", tail, [2, 3, -1], axis=0)
    filled = net.op("ConstantOfShape", net.op("Shape", x), value=onnx.numpy_helper.from_array(np.ones(1, np.float32)))
    net.output(net.op("Reshape", net.op("Add", x, filled), shape), ["N", 2, 3, "T"])
    model = net.proto()
    lowered = lower(model, NANO, input_shapes={"x": [2, 6, 5]})
    assert ops(lowered.proto) == ["Add", "Reshape"]
    held = {tensor.name: numpy_helper.to_array(tensor) for tensor in lowered.proto.graph.initializer}
    assert sorted(array.shape for array in held.values()) == [(2, 6, 5), (4,)]
    assert parity(model, lowered.proto, {"x": noise(2, 6, 5)}).passed
    assert {change.op: change.count for change in lowered.changes}["constants"] == 6


@pytest.mark.parametrize("kind", ["f2", "f8"])
@pytest.mark.parametrize("target", TARGETS)
def test_other_floating_point_types_are_single_precision_inside_and_outside(kind: str, target: str) -> None:
    feeds = {"x": noise(2, 3, dtype=kind)}
    model = node_model("Add", feeds, {"w": noise(3, dtype=kind)}, opset=13)
    lowered = assert_lowered(model, feeds, target)
    types = {value.type.tensor_type.elem_type for value in [*lowered.graph.input, *lowered.graph.output]}
    assert types | {tensor.data_type for tensor in lowered.graph.initializer} == {TensorProto.FLOAT}


def test_casts_between_floating_point_types_go() -> None:
    net = graphs.Net(17)
    x = net.input("x", [2, 3])
    half = net.op("Cast", net.op("Relu", x), to=TensorProto.FLOAT16)
    net.output(net.op("Exp", net.op("Cast", half, to=TensorProto.FLOAT)), [2, 3])
    assert ops(lower(net.proto(), NANO).proto) == ["Relu", "Exp"]


def test_doubles_beyond_single_precision_become_its_largest() -> None:
    model = node_model("Min", {"x": noise(2, dtype="f8")}, {"w": np.asarray([1e300, -np.inf])}, opset=13)
    held = numpy_helper.to_array(lower(model, NANO).proto.graph.initializer[0])
    assert held.tolist() == [float(np.finfo(np.float32).max), -np.inf]


def branch_model(condition: bool) -> onnx.ModelProto:
    """x + w in one branch, x − w in the other; the condition follows from the size of x."""

    def branch(op: str) -> onnx.GraphProto:
        weight = numpy_helper.from_array(np.full(3, 2, np.float32), "w")
        nodes = [
            helper.make_node("Constant", [], ["c"], value_float=1.0),
            helper.make_node(op, ["x", "w"], ["t"]),
            helper.make_node("Add", ["t", "c"], ["z"]),
        ]
        return helper.make_graph(nodes, op, [], [helper.make_tensor_value_info("z", 1, [2, 3])], [weight])

    nodes = [
        helper.make_node("Size", ["x"], ["n"]),
        helper.make_node("Less", ["n", "limit"], ["small"]),
        helper.make_node("If", ["small"], ["y"], name="if", then_branch=branch("Add"), else_branch=branch("Sub")),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", 1, ["N", 3])],
        [helper.make_tensor_value_info("y", 1, ["N", 3])],
        [numpy_helper.from_array(np.asarray(7 if condition else 6), "limit")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize("condition", [True, False])
def test_an_if_on_sizes_is_its_branch(condition: bool) -> None:
    model, feeds = branch_model(condition), {"x": noise(2, 3)}
    lowered = lower(model, NANO, batch=2).proto
    assert ("Sub" in ops(lowered)) != condition and "If" not in ops(lowered)
    assert parity(model, lowered, feeds).passed


def test_an_if_on_values_is_refused_in_one_line() -> None:
    model = branch_model(True)
    model.graph.node[0].CopyFrom(helper.make_node("ReduceMax", ["x"], ["m"], keepdims=0))
    model.graph.node[1].input[0] = "m"
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.float32(0).reshape(()), "limit"))
    with pytest.raises(ModelError, match=r"If runs other operators .* \(at if\); export the model"):
        lower(model, NANO)


@pytest.mark.parametrize(
    ("op", "feeds", "weights"),
    [
        ("NonZero", {"x": noise(2, 3)}, {}),
        ("Slice", {"x": noise(5), "s": np.asarray([1]), "e": np.asarray([3])}, {}),
        ("Reshape", {"x": noise(6), "s": np.asarray([1, 1, 6])}, {}),
        ("Expand", {"x": noise(1), "s": np.asarray([1])}, {}),
    ],
)
def test_sizes_that_follow_from_values_are_refused_in_one_line(
    op: str, feeds: dict[str, np.ndarray], weights: dict[str, np.ndarray]
) -> None:
    """One run would show one of them, and a model with that written into it would be wrong for other inputs."""
    model = node_model(op, feeds, weights, opset=13)
    if op == "Reshape":
        model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
        model.graph.output[0].type.tensor_type.ClearField("shape")
    with pytest.raises(ModelError, match=rf"the size of what {op} gives depends on .* \(at node\); export"):
        lower(model, ORIN)


@pytest.mark.parametrize(
    ("target", "opset"),
    [
        (NANO, 13),
        (BUILT_IN["jetson-xavier"], 17),
        (ORIN, 20),
        (replace(BUILT_IN["tensorrt-8.6"], opset=19), 17),  # from 18 on reductions have axes that 8.6 does not read
        (replace(ORIN, opset=23), 20),
        (replace(NANO, opset=15), 15),
    ],
)
def test_the_opset_is_the_target_s_as_far_as_its_importer_reads_it(target: lowering.Target, opset: int) -> None:
    assert emitted_opset(target) == opset
    model, feeds = node_model("Reshape", {"x": noise(2, 3)}, {"s": np.asarray([3, 2])}, opset=21), {"x": noise(2, 3)}
    assert assert_lowered(model, feeds, target).opset_import[0].version == opset


def test_a_target_of_an_older_opset_and_a_precision_it_lacks_are_refused() -> None:
    model = graphs.mlp(4, 3)
    with pytest.raises(PlanError, match="takes opset 11; lowered models are of opset 13 or later"):
        lower(model, replace(NANO, opset=11))
    with pytest.raises(PlanError, match="jetson-nano does not run fp16; use one of: fp32"):
        lower(model, replace(NANO, precisions=("fp32",)), precision="fp16")


def test_more_weights_than_one_file_holds_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowering, "_LIMIT", 100)
    with pytest.raises(ModelError, match="more than the 2 GiB that one ONNX file holds; prune it further"):
        lower(graphs.mlp(4, 8, 3), NANO)


def test_a_model_comes_as_a_path_as_a_proto_or_analysed(tmp_path: Path) -> None:
    model = graphs.mlp(4, 8, 3)
    onnx.save(model, str(tmp_path / "m.onnx"))
    made = [lower(source, NANO).proto for source in (model, tmp_path / "m.onnx", analyse_model(model))]
    assert made[0] == made[1] == made[2]


def test_the_source_is_not_changed() -> None:
    model = graphs.mlp(4, 8, 3)
    before = model.SerializeToString()
    lower(model, RTX, precision="fp16")
    assert model.SerializeToString() == before


def test_operators_of_other_domains_that_stay_keep_their_domain() -> None:
    feeds = {"q": noise(1, 2, 16), "k": noise(1, 2, 16), "v": noise(1, 2, 16)}
    caches = {"pk": noise(1, 2, 3, 8), "pv": noise(1, 2, 3, 8)}
    model = node_model(
        "GroupQueryAttention",
        {**feeds, **caches},
        {"s": np.asarray([[4]], np.int32), "t": np.asarray(5, np.int32)},
        outputs=["y", "a", "b"],
        domain="com.microsoft",
        num_heads=2,
        kv_num_heads=2,
    )
    lowered = lower(model, NANO).proto
    assert {entry.domain for entry in lowered.opset_import} == {"", "com.microsoft"}


@pytest.mark.parametrize("target", TARGETS)
def test_a_symmetrically_quantised_projection_stays_quantised_for_every_target(target: str) -> None:
    rng, feeds = np.random.default_rng(0), {"x": noise(2, 4)}
    held = {
        "s": np.float32(0.02).reshape(()),
        "z": np.int8(0).reshape(()),
        "w": rng.integers(-127, 128, (4, 3)).astype(np.int8),
        "ws": np.asarray([0.01, 0.02, 0.03], np.float32),
        "wz": np.zeros(3, np.int8),
        "b": rng.integers(-5000, 5000, 3).astype(np.int32),
        "bs": np.asarray([0.0002, 0.0004, 0.0006], np.float32),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["xq"], name="q"),
        helper.make_node("DequantizeLinear", ["xq", "s", "z"], ["xf"], name="dq"),
        helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["wf"], name="weight", axis=1),
        helper.make_node("DequantizeLinear", ["b", "bs"], ["bf"], name="bias", axis=0),
        helper.make_node("MatMul", ["xf", "wf"], ["p"], name="product"),
        helper.make_node("Add", ["p", "bf"], ["y"], name="sum"),
    ]
    values = [helper.make_tensor_value_info(name, 1, shape) for name, shape in (("x", [2, 4]), ("y", [2, 3]))]
    tensors = [numpy_helper.from_array(array, name) for name, array in held.items()]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    lowered = assert_lowered(model, feeds, target)
    weights = {tensor.name: tensor.data_type for tensor in lowered.graph.initializer}
    assert ops(lowered).count("DequantizeLinear") == 2  # not of the bias
    assert (TensorProto.INT8 in [weights[name] for name in weights if name == "w"]) == (target == "jetson-orin")
    assert TensorProto.INT32 not in weights.values()


def test_changes_say_what_was_done_and_how_often() -> None:
    feeds = {"x": noise(2, 4)}
    lowered = lower(node_model("LayerNormalization", feeds, {"g": noise(4)}, opset=17), NANO)
    found = {(change.op, change.count, change.why) for change in lowered.changes}
    assert found == {("LayerNormalization", 1, "the importer has no LayerNormalization")}
    data = lowered.to_dict()
    assert data["changes"] == [
        {"op": "LayerNormalization", "count": 1, "why": "the importer has no LayerNormalization"}
    ]
    assert data["warnings"] == [] and data["keep_fp32"] == []


def norm(name: str = "norm") -> onnx.ModelProto:
    model = node_model("LayerNormalization", {"x": noise(2, 4)}, {"g": noise(4), "b": noise(4)}, opset=17)
    model.graph.node[0].name = name
    return model


def test_the_nano_cannot_keep_a_norm_in_single_precision_and_that_is_said() -> None:
    lowered = lower(norm(), NANO, precision="fp16")
    assert lowered.keep_fp32 == [] and len(lowered.warnings) == 1
    assert "TensorRT 8.2 cannot keep single layers in fp32" in lowered.warnings[0]
    assert lower(graphs.mlp(4, 3), NANO, precision="fp16").warnings == []
    assert lower(norm(), NANO).warnings == []


def test_8_5_gets_the_names_of_the_norm_s_layers_without_the_list_s_own_characters() -> None:
    lowered = lower(norm("a:b,c/norm"), BUILT_IN["jetson-xavier"], precision="fp16")
    assert lowered.keep_fp32 == [
        f"a_b_c/norm.{op}" for op in ("ReduceMean", "Sub", "Mul", "ReduceMean.2", "Add", "Sqrt", "Div")
    ]
    assert set(lowered.keep_fp32) < {node.name for node in lowered.proto.graph.node}
    assert lower(norm(), BUILT_IN["jetson-xavier"]).keep_fp32 == []


def test_a_whole_norm_needs_no_list() -> None:
    lowered = lower(norm(), BUILT_IN["tensorrt-8.6"], precision="fp16")
    assert lowered.keep_fp32 == [] and lowered.warnings == []


def test_targets_that_compute_in_the_file_s_types_get_half_precision_in_it() -> None:
    assert strongly_typed(RTX) and strongly_typed(replace(ORIN, tensorrt=(11, 0))) and not strongly_typed(ORIN)
    weights = {tensor.data_type for tensor in lower(graphs.mlp(4, 3), RTX, precision="fp16").proto.graph.initializer}
    assert weights == {TensorProto.FLOAT16}
    weights = {tensor.data_type for tensor in lower(graphs.mlp(4, 3), ORIN, precision="fp16").proto.graph.initializer}
    assert weights == {TensorProto.FLOAT}
