"""One small model per rule that trips it, and one that does not; what a finding says."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
from one_node import noise
from onnx import TensorProto, helper, numpy_helper

from onnxsnp.deploy.lint import Finding, lint
from onnxsnp.deploy.targets import BUILT_IN, Target

NANO, XAVIER, T86 = BUILT_IN["jetson-nano"], BUILT_IN["jetson-xavier"], BUILT_IN["tensorrt-8.6"]
ORIN, RTX = BUILT_IN["jetson-orin"], BUILT_IN["rtx"]
ATTENTION = replace(RTX, tensorrt=(10, 14), opset=24)


def model(
    op: str,
    shapes: list[tuple[int, ...]],
    weights: list[np.ndarray] | tuple[np.ndarray, ...] = (),
    *,
    opset: int = 13,
    kind: int = TensorProto.FLOAT,
    outputs: int = 1,
    domain: str = "",
    kinds: tuple[int, ...] = (),
    name: str = "node",
    **attributes: Any,
) -> onnx.ModelProto:
    """One node: inputs of the given shapes first, then constants. It need not be valid, only readable."""
    inputs = [f"x{index}" for index in range(len(shapes))]
    held = [numpy_helper.from_array(array, f"w{index}") for index, array in enumerate(weights)]
    types = [*kinds, *[kind] * (len(shapes) - len(kinds))]
    node = helper.make_node(
        op,
        [*inputs, *(tensor.name for tensor in held)],
        [f"y{index}" for index in range(outputs)],
        name=name,
        domain=domain,
        **attributes,
    )
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info(*one) for one in zip(inputs, types, shapes, strict=True)],
        [onnx.ValueInfoProto(name=one) for one in node.output],
        held,
    )
    imports = [helper.make_opsetid("", opset)] + ([helper.make_opsetid(domain, 1)] if domain else [])
    return helper.make_model(graph, opset_imports=imports, ir_version=8)


def rules(proto: onnx.ModelProto, target: Target, severity: str = "error") -> set[str]:
    return {one.rule for one in lint(proto, target) if one.severity == severity}


AXES = np.asarray([1])
S, F, I32, I64, B = (2, 3, 4), TensorProto.FLOAT, TensorProto.INT32, TensorProto.INT64, TensorProto.BOOL
ROI, NONE = np.zeros(0, np.float32), np.zeros(0, np.float32)
SCALES = np.asarray([1, 1, 2, 2], np.float32)
SCALE, ZERO = np.float32(0.1).reshape(()), np.int8(0).reshape(())

# rule; a model and a target that trip it; a model and a target that do not
CASES: list[tuple[str, onnx.ModelProto, Target, onnx.ModelProto, Target]] = [
    (
        "reduce-axes",
        model("ReduceMean", [S], [AXES], opset=18),
        T86,
        model("ReduceMean", [S], [AXES], opset=18),
        ORIN,
    ),
    ("reduce-axes", model("ReduceMax", [S], [AXES], opset=18), NANO, model("ReduceMax", [S], axes=[1]), NANO),
    # ReduceSum is read from the input at opset 13, by 8.2 too; and all axes are all axes
    ("reduce-axes", model("ReduceL2", [S], [AXES], opset=18), XAVIER, model("ReduceSum", [S], [AXES]), NANO),
    (
        "reduce-axes",
        model("ReduceMean", [S], [np.asarray([0, 1])], opset=18),
        XAVIER,
        model("ReduceMean", [S], [np.asarray([0, 1, -1])], opset=18),
        XAVIER,
    ),
    (
        "reduce-noop",
        model("ReduceSum", [S], noop_with_empty_axes=1),
        ORIN,
        model("ReduceSum", [S], [AXES], noop_with_empty_axes=1),
        ORIN,
    ),
    ("constant-input", model("ReduceSum", [S, (1,)], kinds=(F, I64)), NANO, model("ReduceSum", [S], [AXES]), NANO),
    ("constant-input", model("Squeeze", [(1, 2), (1,)], kinds=(F, I64)), ORIN, model("Squeeze", [(1, 2)]), ORIN),
    ("constant-input", model("Unsqueeze", [S, (1,)], kinds=(F, I64)), NANO, model("Unsqueeze", [S], [AXES]), NANO),
    (
        "constant-input",
        model("Slice", [S, (1,), (1,), (1,)], kinds=(F, I64, I64, I64)),
        NANO,
        model("Slice", [S, (1,), (1,), (1,)], kinds=(F, I64, I64, I64)),
        ORIN,
    ),
    (
        "constant-input",
        model("TopK", [S, (1,)], kinds=(F, I64), outputs=2),
        XAVIER,
        model("TopK", [S, (1,)], kinds=(F, I64), outputs=2),
        T86,
    ),
    ("constant-input", model("CumSum", [S, ()], kinds=(F, I64)), ORIN, model("CumSum", [S], [np.asarray(1)]), ORIN),
    (
        "constant-input",
        model("InstanceNormalization", [(1, 3, 4), (3,), (3,)]),
        XAVIER,
        model("InstanceNormalization", [(1, 3, 4), (3,), (3,)]),
        T86,
    ),
    (
        "constant-input",
        model("Conv", [(1, 3, 4, 4), (2, 3, 1, 1)]),
        NANO,
        model("Conv", [(1, 3, 4, 4)], [noise(2, 3, 1, 1)]),
        NANO,
    ),
    (
        "constant-input",
        model("Resize", [(1, 1, 2, 2), (0,), (4,)]),
        NANO,
        model("Resize", [(1, 1, 2, 2)], [ROI, SCALES]),
        NANO,
    ),
    (
        "constant-input",
        model("OneHot", [(2,), (), (2,)], kinds=(I64, I64, F)),
        XAVIER,
        model("OneHot", [(2,)], [np.asarray(3), noise(2)], kind=I64),
        XAVIER,
    ),
    (
        "constant-input",
        model("Pad", [S, (2,), (), (1,)], kinds=(F, I64, F, I64), opset=18),
        ORIN,
        model("Pad", [S], [np.asarray([0, 1]), np.float32(0).reshape(()), AXES], opset=18),
        ORIN,
    ),
    (
        "reshape-allowzero",
        model("Reshape", [S], [np.asarray([6, 4])], opset=14),
        NANO,
        model("Reshape", [S], [np.asarray([6, 4])], opset=14, allowzero=0),
        NANO,
    ),
    (
        "reshape-allowzero",
        model("Reshape", [S], [np.asarray([6, 4])], opset=14),
        NANO,
        model("Reshape", [S], [np.asarray([6, 4])], opset=14),
        XAVIER,
    ),
    ("shape-range", model("Shape", [S], opset=15, start=1), T86, model("Shape", [S], opset=15, start=1), ORIN),
    ("shape-range", model("Shape", [S], opset=15, end=2), NANO, model("Shape", [S], opset=15), NANO),
    (
        "einsum",
        model("Einsum", [S, S], equation="...ij,...kj->...ik"),
        NANO,
        model("Einsum", [S, S], equation="bij,bkj->bik"),
        NANO,
    ),
    ("einsum", model("Einsum", [(3, 3)], equation="ii->i"), T86, model("Einsum", [(3, 3)], equation="ii->i"), ORIN),
    ("einsum", model("Einsum", [S], equation="Bij->Bji"), XAVIER, model("Einsum", [S], equation="bij->bji"), XAVIER),
    (
        "einsum",
        model("Einsum", [S, (1, 4)], equation="bij,bj->bi"),
        NANO,
        model("Einsum", [S, (2, 4)], equation="bij,bj->bi"),
        NANO,
    ),
    (
        "resize",
        model("Resize", [(1, 1, 2, 2)], [ROI, SCALES], mode="cubic"),
        NANO,
        model("Resize", [(1, 1, 2, 2)], [ROI, SCALES], mode="cubic"),
        XAVIER,
    ),
    (
        "resize",
        model("Resize", [(1, 1, 2, 2)], [ROI, SCALES], coordinate_transformation_mode="tf_crop_and_resize"),
        ORIN,
        model("Resize", [(1, 1, 2, 2)], [ROI, SCALES], coordinate_transformation_mode="asymmetric"),
        ORIN,
    ),
    (
        "resize",
        model("Resize", [(1, 1, 2, 2)], [ROI, SCALES], opset=18, antialias=1, mode="linear"),
        ORIN,
        model("Resize", [(1, 1, 2, 2)], [ROI, SCALES], opset=18, antialias=0, mode="linear"),
        ORIN,
    ),
    (
        "resize",
        model("Resize", [(1, 1, 2, 2)], [ROI, SCALES], opset=18, keep_aspect_ratio_policy="not_larger"),
        ORIN,
        model("Resize", [(1, 1, 2, 2)], [ROI, SCALES], opset=18, keep_aspect_ratio_policy="stretch"),
        ORIN,
    ),
    (
        "pad-mode",
        model("Pad", [S], [np.asarray([0, 0, 1, 0, 0, 1])], opset=19, mode="wrap"),
        T86,
        model("Pad", [S], [np.asarray([0, 0, 1, 0, 0, 1])], opset=19, mode="wrap"),
        ORIN,
    ),
    (
        "pad-axes",
        model("Pad", [S], [np.asarray([1, 1]), np.float32(0).reshape(()), AXES], opset=18),
        NANO,
        model("Pad", [S], [np.asarray([1, 1]), np.float32(0).reshape(()), AXES], opset=18),
        XAVIER,
    ),
    (
        "pool-rank",
        model("MaxPool", [S], kernel_shape=[2]),
        ORIN,
        model("MaxPool", [(1, 2, 4, 4)], kernel_shape=[2, 2]),
        NANO,
    ),
    (
        "pool-indices",
        model("MaxPool", [(1, 2, 4, 4)], kernel_shape=[2, 2], outputs=2),
        ORIN,
        model("MaxPool", [(1, 2, 4, 4)], kernel_shape=[2, 2]),
        ORIN,
    ),
    (
        "pool-dilations",
        model("MaxPool", [(1, 2, 4, 4)], kernel_shape=[2, 2], dilations=[2, 2]),
        ORIN,
        model("MaxPool", [(1, 2, 4, 4)], kernel_shape=[2, 2], dilations=[1, 1]),
        ORIN,
    ),
    (
        "outputs",
        model("LayerNormalization", [S], [noise(4)], opset=17, outputs=2),
        ORIN,
        model("LayerNormalization", [S], [noise(4)], opset=17),
        T86,
    ),
    ("trilu-rank", model("Trilu", [(1, 2, 3, 3)], opset=14), XAVIER, model("Trilu", [(1, 2, 3, 3)], opset=14), T86),
    (
        "scatter-reduction",
        model("ScatterND", [S, (1, 1), (1, 3, 4)], opset=16, kinds=(F, I64, F), reduction="add"),
        ORIN,
        model("ScatterND", [S, (1, 1), (1, 3, 4)], opset=16, kinds=(F, I64, F), reduction="none"),
        ORIN,
    ),
    (
        "scatter-reduction",
        model("ScatterElements", [S, S, S], opset=16, kinds=(F, I64, F), reduction="add"),
        T86,
        model("ScatterElements", [S, S, S], opset=16, kinds=(F, I64, F), reduction="add"),
        ORIN,
    ),
    ("gemm-rank", model("Gemm", [S, (4, 2)]), NANO, model("Gemm", [(3, 4), (4, 2)]), NANO),
    (
        "topk-size",
        model("TopK", [(5000,)], [np.asarray([4000])], outputs=2),
        ORIN,
        model("TopK", [(5000,)], [np.asarray([3840])], outputs=2),
        ORIN,
    ),
    (
        "quantise-zero",
        model("QuantizeLinear", [S], [SCALE, np.int8(3).reshape(())]),
        ORIN,
        model("QuantizeLinear", [S], [SCALE, ZERO]),
        XAVIER,
    ),
    (
        "quantise-zero",
        model("DequantizeLinear", [S], [SCALE], kind=TensorProto.INT8),
        T86,
        model("DequantizeLinear", [S], [SCALE], kind=TensorProto.INT8),
        replace(ORIN, name="own"),
    ),
    (
        "quantise-type",
        model("QuantizeLinear", [S], [SCALE, np.uint8(0).reshape(())]),
        ORIN,
        model("QuantizeLinear", [S], [SCALE, ZERO]),
        ORIN,
    ),
    (
        "training",
        model("Dropout", [S], [np.float32(0.5).reshape(()), np.asarray(True)]),
        ORIN,
        model("Dropout", [S], [np.float32(0.5).reshape(()), np.asarray(False)]),
        ORIN,
    ),
    ("domain", model("Gelu", [S], domain="com.microsoft"), RTX, model("Gelu", [S], opset=20), RTX),
    ("not-in-opset", model("HardSwish", [S], opset=13), ORIN, model("HardSwish", [S], opset=14), ORIN),
    ("operator", model("Gelu", [S], opset=20), T86, model("Gelu", [S], opset=20), ORIN),
    (
        "operator",
        model("LayerNormalization", [S], [noise(4)], opset=17),
        XAVIER,
        model("LayerNormalization", [S], [noise(4)], opset=17),
        T86,
    ),
    ("operator", model("HardSwish", [S], opset=14), NANO, model("HardSwish", [S], opset=14), XAVIER),
    (
        "operator",
        model("Attention", [(1, 2, 3, 4)] * 3, opset=23),
        RTX,
        model("Attention", [(1, 2, 3, 4)] * 3, opset=23),
        ATTENTION,
    ),
    ("form", model("Softmax", [S], opset=13, approximate="none"), NANO, model("Softmax", [S], opset=13, axis=1), NANO),
    ("form", model("ReduceMean", [S], opset=18, axes=[1]), ORIN, model("ReduceMean", [S], opset=17, axes=[1]), ORIN),
    (
        "form",
        model("Squeeze", [(1, 2)], opset=13, axes=[0]),
        NANO,
        model("Squeeze", [(1, 2)], opset=11, axes=[0]),
        NANO,
    ),
    ("element-type", model("Pow", [S, S], kind=I32), NANO, model("Pow", [S, S]), NANO),
    ("element-type", model("Where", [S, S, S], kind=B), NANO, model("Where", [S, S, S], kind=B), XAVIER),
    (
        "element-type",
        model("Gather", [S], [np.asarray([0])], kind=B),
        NANO,
        model("Gather", [S], [np.asarray([0])], kind=B),
        XAVIER,
    ),
    ("element-type", model("ReduceSum", [S], [AXES], kind=I64), T86, model("ReduceSum", [S], [AXES], kind=I64), ORIN),
    (
        "weight-type",
        model("Add", [S], [noise(4).astype("f2")], kind=TensorProto.FLOAT16),
        NANO,
        model("Add", [S], [noise(4).astype("f2")], kind=TensorProto.FLOAT16),
        XAVIER,
    ),
    (
        "int64-range",
        model("Add", [S], [np.asarray([2**31])], kind=I64),
        T86,
        model("Add", [S], [np.asarray([2**31])], kind=I64),
        ORIN,
    ),
    (
        "int64-range",
        model("Add", [S], [np.asarray([-(2**31) - 1])], kind=I64),
        NANO,
        model("Add", [S], [np.asarray([-(2**31)])], kind=I64),
        NANO,
    ),
    ("input-type", model("Identity", [S], kind=TensorProto.UINT8), NANO, model("Identity", [S]), NANO),
    (
        "input-type",
        model("Identity", [S], kind=TensorProto.BFLOAT16),
        T86,
        model("Identity", [S], kind=TensorProto.BFLOAT16),
        RTX,
    ),
]


@pytest.mark.parametrize(
    ("rule", "bad", "there", "good", "here"),
    CASES,
    ids=[f"{case[0]}-{case[1].graph.node[0].op_type}" for case in CASES],
)
def test_a_rule_trips_where_it_must_and_only_there(
    rule: str, bad: onnx.ModelProto, there: Target, good: onnx.ModelProto, here: Target
) -> None:
    assert rule in rules(bad, there)
    assert rule not in rules(good, here) | rules(good, here, "warning")


WARNINGS: list[tuple[str, onnx.ModelProto, Target, onnx.ModelProto, Target]] = [
    ("opset", model("Relu", [S], opset=17), NANO, model("Relu", [S], opset=13), NANO),
    ("free-size", model("Relu", [(0, 3)]), NANO, model("Relu", [(1, 3)]), NANO),
    ("int64-input", model("Abs", [S], kind=I64), T86, model("Abs", [S], kind=I64), ORIN),
    ("weight-type", model("Add", [S], [noise(4).astype("f8")]), ORIN, model("Add", [S], [noise(4)]), ORIN),
    (
        "quantise-hardware",
        model("QuantizeLinear", [S], [SCALE, ZERO]),
        NANO,
        model("QuantizeLinear", [S], [SCALE, ZERO]),
        XAVIER,
    ),
]


@pytest.mark.parametrize(("rule", "bad", "there", "good", "here"), WARNINGS, ids=[case[0] for case in WARNINGS])
def test_what_is_worth_knowing_is_a_warning(
    rule: str, bad: onnx.ModelProto, there: Target, good: onnx.ModelProto, here: Target
) -> None:
    assert rule in rules(bad, there, "warning") and rule not in rules(bad, there)
    assert rule not in rules(good, here, "warning")


def branching(inner: onnx.NodeProto) -> onnx.ModelProto:
    branch = helper.make_graph([inner], "branch", [], [helper.make_tensor_value_info("z", F, None)])
    other = onnx.GraphProto()
    other.CopyFrom(branch)
    node = helper.make_node("If", ["c"], ["y"], name="choice", then_branch=branch, else_branch=other)
    inputs = [helper.make_tensor_value_info("c", B, []), helper.make_tensor_value_info("x", F, S)]
    graph = helper.make_graph([node], "g", inputs, [helper.make_tensor_value_info("y", F, None)])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def test_control_flow_is_a_warning_and_its_branches_are_checked() -> None:
    found = lint(branching(helper.make_node("Gelu", ["x"], ["z"], name="inside")), T86)
    assert [(one.node, one.rule) for one in found if one.severity == "error"] == [("inside", "operator")] * 2
    assert ("choice", "control-flow") in [(one.node, one.rule) for one in found if one.severity == "warning"]
    assert "control-flow" not in rules(model("Relu", [S]), T86, "warning")


def test_local_functions_are_read_from_9_on() -> None:
    proto = model("Relu", [S])
    proto.functions.append(helper.make_function("own", "F", ["a"], ["b"], [], [helper.make_opsetid("", 13)]))
    assert "functions" in rules(proto, T86)
    assert "functions" not in rules(proto, ORIN)


def test_weights_behind_dequantize_linear_are_constants_to_a_convolution() -> None:
    proto = model("Conv", [(1, 3, 4, 4)], [noise(2, 3, 1, 1)])
    proto.graph.initializer[0].name = "held"
    proto.graph.initializer.append(numpy_helper.from_array(SCALE, "s"))
    proto.graph.initializer.append(numpy_helper.from_array(ZERO, "z"))
    proto.graph.initializer.append(numpy_helper.from_array(np.ones((2, 3, 1, 1), np.int8), "q"))
    proto.graph.node.insert(0, helper.make_node("DequantizeLinear", ["q", "s", "z"], ["w0"], name="dq"))
    assert "constant-input" not in rules(proto, NANO)


def test_errors_come_first_and_say_node_operator_rule_and_remedy() -> None:
    proto = model("ReduceMean", [S], [AXES], opset=18, name="/blocks/norm/mean")
    found = lint(proto, NANO)
    assert [one.severity for one in found] == ["error", "warning"]
    error = found[0]
    assert (error.node, error.op, error.rule) == ("/blocks/norm/mean", "ReduceMean", "reduce-axes")
    assert "silently reduces over ALL axes" in error.message and "onnxsnp engine" in error.remedy
    assert str(error) == f"error: /blocks/norm/mean (ReduceMean): {error.message} [reduce-axes]; {error.remedy}"
    assert Finding(**error.to_dict()) == error


def test_a_node_without_a_name_is_named_by_its_output() -> None:
    assert [one.node for one in lint(model("Gelu", [S], opset=20, name=""), T86) if one.op] == ["y0"]


def test_an_operator_of_a_later_release_says_which() -> None:
    messages = {one.rule: one.message for one in lint(model("Gelu", [S], opset=20), T86)}
    assert messages["operator"] == "TensorRT 8.6 does not take Gelu, the first that does is 10.0"
    messages = {one.rule: one.message for one in lint(model("StringNormalizer", [(3,)], opset=13), T86)}
    assert messages["operator"].endswith("and no release does")
