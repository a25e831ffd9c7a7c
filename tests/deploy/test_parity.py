"""Parity: what counts as the same, and what does not."""

from __future__ import annotations

from math import inf

import graphs
import numpy as np
import onnx
import pytest
from one_node import node_model, noise
from onnx import TensorProto, helper, numpy_helper

from onnxsnp.deploy.parity import HALF, QUANTISED, SINGLE, parity
from onnxsnp.errors import ModelError

FEEDS = {"x": noise(3, 4)}


def scaled(factor: float, name: str = "y", kind: int = TensorProto.FLOAT) -> onnx.ModelProto:
    """x · factor."""
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    node = helper.make_node("Mul", ["x", "f"], [name], name="mul")
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", kind, [3, 4])],
        [helper.make_tensor_value_info(name, kind, [3, 4])],
        [numpy_helper.from_array(np.full((1, 1), factor, dtype), "f")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=7)


def test_the_difference_is_relative_to_the_largest_entry() -> None:
    found = parity(scaled(100.0), scaled(100.001), FEEDS)
    assert found.passed and found.difference == pytest.approx(1e-5, rel=0.05)
    assert found.tolerance == SINGLE and found.same_top1 is True
    worse = parity(scaled(100.0), scaled(100.01), FEEDS)
    assert not worse.passed and worse.difference == pytest.approx(1e-4, rel=0.05)


def test_half_precision_has_a_tolerance_of_its_own() -> None:
    assert parity(scaled(1.0), scaled(1.01), FEEDS, "fp16").passed
    assert not parity(scaled(1.0), scaled(1.03), FEEDS, "fp16").passed
    original = parity(scaled(1.0, kind=TensorProto.FLOAT16), scaled(1.0), FEEDS)
    assert original.tolerance == HALF and "original computes in half precision" in original.reason
    assert original.passed and original.difference > 1e-5


def test_quantised_originals_have_a_tolerance_of_their_own() -> None:
    weights = {"s": np.float32(0.01).reshape(()), "z": np.int8(0).reshape(())}
    model = node_model("QuantizeLinear", FEEDS, weights, opset=13)
    assert parity(model, model, FEEDS).tolerance == QUANTISED


def test_what_a_quantised_original_does_on_rounded_inputs_bounds_its_half_precision() -> None:
    """One number at the edge of a step: rounded to half precision it is on the other side."""
    feeds = {"x": np.asarray([[1.0, 0.25001]], np.float32)}  # of steps of 0.5: 0.25001 is above the middle
    weights = {"s": np.float32(0.5).reshape(()), "z": np.int8(0).reshape(())}
    model = node_model("QuantizeLinear", feeds, weights, outputs=["q"], opset=13)
    model.graph.node.append(helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"], name="dq"))
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 2]))
    off = onnx.ModelProto()
    off.CopyFrom(model)
    off.graph.node.insert(0, helper.make_node("Cast", ["x"], ["h"], to=TensorProto.FLOAT16, name="down"))
    off.graph.node.insert(1, helper.make_node("Cast", ["h"], ["r"], to=TensorProto.FLOAT, name="up"))
    off.graph.node[2].input[0] = "r"
    found = parity(model, off, feeds, "fp16")
    assert found.difference == 0.5 and not found.passed  # half of the output: more than rounding may explain
    feeds = {"x": np.asarray([[10.0, 0.25001]], np.float32)}
    found = parity(model, off, feeds, "fp16")
    assert found.difference == 0.05 and found.passed and found.tolerance == 0.2
    assert "own rounding" in found.reason


def test_another_best_class_is_said_even_where_the_difference_is_small() -> None:
    feeds = {"x": np.asarray([[1.0, 1.0 - 1e-7, 0, 0]] * 3, np.float32)}
    swapped = scaled(1.0)
    swapped.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.asarray([[1 - 1e-6, 1, 1, 1]], np.float32), "f"))
    found = parity(scaled(1.0), swapped, feeds)
    assert found.passed and found.same_top1 is False
    assert found.to_dict()["same_top1"] is False and found.to_dict()["outputs"][0]["name"] == "y"


def test_a_number_that_is_not_one_in_one_model_only_fails() -> None:
    feeds = {"x": np.full((3, 4), 1e30, np.float32)}
    found = parity(scaled(1.0), scaled(1e30), feeds)
    assert found.difference == inf and not found.passed and found.same_top1 is None
    assert parity(scaled(1e30), scaled(1e30), feeds).passed  # infinite in both


def test_all_zero_outputs_are_the_same_only_as_zero() -> None:
    assert parity(scaled(0.0), scaled(0.0), FEEDS).passed
    assert not parity(scaled(0.0), scaled(1e-9), FEEDS).passed


def test_truth_values_and_integers_are_compared_one_by_one() -> None:
    feeds = {"x": np.asarray([0.5, -1.0, 2.0, 3.0], np.float32)}
    less = node_model("Less", feeds, {"b": np.float32(1.0).reshape(())}, opset=13)
    more = node_model("Less", feeds, {"b": np.float32(2.5).reshape(())}, opset=13)
    assert parity(less, less, feeds).passed
    assert parity(less, more, feeds).difference == 0.25


def test_other_outputs_other_shapes_and_missing_inputs_are_one_line() -> None:
    with pytest.raises(ModelError, match="has other outputs than the original"):
        parity(scaled(1.0), scaled(1.0, "other"), FEEDS)
    with pytest.raises(ModelError, match="no values for the input 'x'"):
        parity(scaled(1.0), scaled(1.0), {})
    wide = scaled(1.0)
    wide.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.ones((2, 3, 4), np.float32), "f"))
    wide.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 3, 4]))
    with pytest.raises(ModelError, match=r"'y' has the shape \[2, 3, 4\], the original's \[3, 4\]"):
        parity(scaled(1.0), wide, FEEDS)


def test_each_model_gets_the_inputs_in_its_own_element_types() -> None:
    model = graphs.mlp(4, 8, 3, batch=2)
    feeds = {name: array.astype("f8") for name, array in graphs.inputs_for(model).items()}
    assert parity(model, model, feeds).difference == 0
