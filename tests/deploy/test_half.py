"""Half precision in the file: the interface stays, what overflows or must be exact stays, and the rest does not."""

from __future__ import annotations

import graphs
import numpy as np
import onnx
import pytest
from one_node import node_model, noise, run
from onnx import TensorProto, helper, numpy_helper

from onnxsnp.deploy.half import LARGEST, sensitive, to_half
from onnxsnp.deploy.lower import lower
from onnxsnp.deploy.targets import BUILT_IN

NANO, ORIN, RTX = BUILT_IN["jetson-nano"], BUILT_IN["jetson-orin"], BUILT_IN["rtx"]


def precision_of(model: onnx.ModelProto) -> dict[str, int]:
    """Element type of the first output of each node, by the node's name."""
    inferred = onnx.shape_inference.infer_shapes(model).graph
    types = {value.name: value.type.tensor_type.elem_type for value in [*inferred.value_info, *inferred.output]}
    return {node.name: types[node.output[0]] for node in model.graph.node}


def test_inputs_and_outputs_stay_and_weights_do_not() -> None:
    lowered = lower(graphs.mlp(4, 8, 3), ORIN).proto
    half = to_half(lowered)
    onnx.checker.check_model(half.proto, full_check=True)
    for now, before in zip(half.proto.graph.input, lowered.graph.input, strict=True):
        assert now == before
    for now, before in zip(half.proto.graph.output, lowered.graph.output, strict=True):
        assert now == before
    assert {tensor.data_type for tensor in half.proto.graph.initializer} == {TensorProto.FLOAT16}
    assert half.kept == [] and half.clamped == []
    feeds = {"x": noise(1, 4)}
    np.testing.assert_allclose(run(half.proto, feeds)[0], run(lowered, feeds)[0], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("target", [NANO, ORIN])
def test_a_norm_of_large_numbers_does_not_overflow(target: object) -> None:
    feeds = {"x": 3000 * noise(2, 64)}
    model = node_model("LayerNormalization", feeds, {"g": noise(64), "b": noise(64)}, opset=17)
    lowered = lower(model, target).proto  # type: ignore[arg-type]
    half = to_half(lowered)
    expected, found = run(model, feeds)[0], run(half.proto, feeds)[0]
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found, expected, atol=2e-2)


def test_without_the_kept_layers_it_would_overflow() -> None:
    """The numbers of the test above are ones that need it."""
    x = (3000 * noise(2, 64)).astype(np.float16)
    with np.errstate(over="ignore"):
        assert np.isinf((x - x.mean(1, keepdims=True)) ** 2).any()


def test_sums_and_exponentials_stay_in_single_precision() -> None:
    net = graphs.Net(17)
    x = net.input("x", [2, 8])
    h = net.op("Softmax", net.op("MatMul", x, net.weight("w", 8, 8), name="product"), axis=-1, name="soft")
    h = net.op("Exp", h, name="exp")
    net.output(net.op("ReduceSum", h, [1], keepdims=0, name="sum"), [2])
    half = to_half(lower(net.proto(), ORIN).proto)
    found = precision_of(half.proto)
    assert found["product"] == TensorProto.FLOAT16
    assert {found[name] for name in ("soft", "exp", "sum")} == {TensorProto.FLOAT}
    assert half.kept == ["soft", "exp", "sum"]


def test_numbers_between_two_kept_layers_are_not_rounded() -> None:
    net = graphs.Net(17)
    x = net.input("x", [2, 8])
    net.output(net.op("Exp", net.op("Softmax", x, axis=-1)), [2, 8])
    half = to_half(lower(net.proto(), ORIN).proto)
    assert [node.op_type for node in half.proto.graph.node] == ["Softmax", "Exp"]


def test_a_tensor_is_cast_once_for_all_that_read_it() -> None:
    net = graphs.Net(17)
    x = net.input("x", [2, 8])
    parts = [net.op("MatMul", x, net.weight(f"w{index}", 8, 8)) for index in range(3)]
    net.output(net.op("Sum", *parts), [2, 8])
    half = to_half(lower(net.proto(), ORIN).proto)
    assert [node.op_type for node in half.proto.graph.node].count("Cast") == 2  # in and out


def test_constants_beyond_half_precision_are_its_largest_and_named() -> None:
    weights = {"w": np.asarray([1e6, -1e6, 65504, np.inf, 1.0], np.float32)}
    half = to_half(lower(node_model("Add", {"x": noise(5)}, weights, opset=13), ORIN).proto)
    values = numpy_helper.to_array(half.proto.graph.initializer[0])
    assert values.tolist() == [LARGEST, -LARGEST, LARGEST, np.inf, 1.0]
    assert half.clamped == ["w"]
    said = lower(node_model("Add", {"x": noise(5)}, weights, opset=13), RTX, precision="fp16").warnings
    assert said == ["1 constants have numbers beyond 65504, fp16's largest, and got that instead: w"]


def test_whole_numbers_stay_exact_on_their_way_through_floating_point() -> None:
    """Ids above 2048 have no half-precision number of their own."""
    feeds = {"x": np.asarray([4095, 4097, 30001])}
    model = node_model("Mod", feeds, {"d": np.asarray(5000)}, outputs=["y"], opset=13)
    lowered = lower(model, NANO).proto
    assert "Floor" in [node.op_type for node in lowered.graph.node]
    np.testing.assert_array_equal(run(to_half(lowered).proto, feeds)[0], [4095, 4097, 1])


def test_an_operator_without_half_precision_stays() -> None:
    """QuantizeLinear takes it from opset 19 on."""
    weights = {"s": np.float32(0.5).reshape(()), "z": np.int8(0).reshape(())}
    model = node_model("QuantizeLinear", {"x": noise(4)}, weights, opset=13)
    assert to_half(lower(model, BUILT_IN["jetson-xavier"]).proto).kept == ["node"]
    assert to_half(lower(model, ORIN).proto).kept == []


def test_a_scale_that_half_precision_cannot_hold_stays() -> None:
    weights = {"s": np.float32(1e-7).reshape(()), "z": np.int8(0).reshape(())}
    assert to_half(lower(node_model("QuantizeLinear", {"x": noise(4)}, weights, opset=13), ORIN).proto).kept == ["node"]


def test_layers_to_keep_are_those_of_the_norms_alone() -> None:
    net = graphs.Net(17)
    x = net.input("x", [2, 8])
    h = net.op("LayerNormalization", x, net.weight("g", 8), net.weight("b", 8), axis=-1, name="norm")
    h = net.op("Softmax", net.op("Add", h, net.op("MatMul", h, net.weight("w", 8, 8))), axis=-1)
    net.output(h, [2, 8])
    assert sensitive(lower(net.proto(), BUILT_IN["jetson-xavier"]).proto) == [
        f"norm.{op}" for op in ("ReduceMean", "Sub", "Mul", "ReduceMean.2", "Add", "Sqrt", "Div")
    ]


def test_a_model_of_integers_alone_is_left_as_it_is() -> None:
    node = helper.make_node("Add", ["x", "x"], ["y"], name="add")
    value = [helper.make_tensor_value_info(name, TensorProto.INT32, [2]) for name in "xy"]
    model = helper.make_model(
        helper.make_graph([node], "g", value[:1], value[1:]), opset_imports=[helper.make_opsetid("", 17)], ir_version=8
    )
    half = to_half(model)
    assert [one.op_type for one in half.proto.graph.node] == ["Add"] and half.kept == []
