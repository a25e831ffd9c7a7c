"""bfloat16 models: run in single precision without rounding, written back in bfloat16."""

from __future__ import annotations

from pathlib import Path

import graphs
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxsnp.analysis import analyse_model
from onnxsnp.errors import VerificationError
from onnxsnp.evaluation.verify import check_graph, tolerance
from onnxsnp.graph.inputs import graph_inputs
from onnxsnp.graph.normalize import as_graph, normalize
from onnxsnp.graph.precision import BRAIN, element_types, is_float, wide, widen
from onnxsnp.model import load
from onnxsnp.pruning import prune


def in_bfloat16(model: onnx.ModelProto, ends: bool = True) -> onnx.ModelProto:
    """The model with every weight in bfloat16, and its inputs and outputs too if `ends`."""
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(BRAIN), tensor.name))
    for value in [*model.graph.input, *model.graph.output] if ends else []:
        value.type.tensor_type.elem_type = TensorProto.BFLOAT16
    return model


def rounded(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same numbers in single precision."""
    widen(model)
    return model


def test_the_model_runs_as_its_single_precision_copy() -> None:
    feeds = graphs.inputs_for(graphs.transformer(), 3)
    model = in_bfloat16(graphs.transformer())
    got = as_graph(load(model)).session(optimize=False).run(None, feeds)[0]
    want = as_graph(load(rounded(model))).session(optimize=False).run(None, feeds)[0]
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, want)


def test_the_graph_itself_keeps_its_types() -> None:
    graph = as_graph(load(in_bfloat16(graphs.transformer())))
    graph.session()
    assert {array.dtype for array in graph.weights.values() if is_float(array.dtype)} == {BRAIN}
    assert graph.shell.graph.input[0].type.tensor_type.elem_type == TensorProto.BFLOAT16
    assert graph_inputs(graph)[0].dtype == np.float32  # what sessions are fed


def test_folded_values_have_the_type_of_what_they_replace() -> None:
    net = graphs.Net()
    x = net.input("x", ["N", 4])
    net.output(net.op("Add", x, net.op("Mul", net.weight("a", 4), net.weight("b", 4))), ["N", 4])
    graph = normalize(load(in_bfloat16(net.proto()))).base
    assert [node.op_type for node in graph.nodes] == ["Add"]
    assert graph.weights[graph.nodes[0].input[1]].dtype == BRAIN


@pytest.mark.parametrize("scope", ["qk,v,ffn", "qk,v,ffn,residual"])
def test_a_cut_model_is_written_in_bfloat16_and_proved_in_single_precision(scope: str, tmp_path: Path) -> None:
    model = in_bfloat16(graphs.transformer(opset=22))
    data = graphs.calibration(graphs.transformer(opset=22))
    result = prune(model, 0.3, allocation="uniform", scope=scope, calibration=data, output=tmp_path / "cut.onnx")
    assert result.record["verification"]["masked_equality"] < 1e-5
    written = onnx.load(str(tmp_path / "cut.onnx"))
    assert {tensor.data_type for tensor in written.graph.initializer} == {TensorProto.BFLOAT16, TensorProto.INT64}
    assert written.graph.input[0].type.tensor_type.elem_type == TensorProto.BFLOAT16
    assert any("bfloat16" in note for note in result.record["notes"])
    onnx.checker.check_model(written, full_check=True)


def test_round_off_is_that_of_single_precision() -> None:
    held = {"w": np.zeros((8, 8), BRAIN)}
    assert tolerance(held) == tolerance({"w": wide(held["w"])}) < tolerance({"w": np.zeros((8, 8), np.float16)})


def test_a_type_that_the_opset_does_not_have_is_no_fault_of_the_cut() -> None:
    graph = as_graph(load(in_bfloat16(graphs.depthwise(opset=17))))  # Conv takes bfloat16 since 22
    with pytest.raises(VerificationError, match="bfloat16"):
        check_graph(graph)
    assert check_graph(graph, graph)


def test_a_wrong_type_is_the_cuts_fault_where_the_original_had_none() -> None:
    original = as_graph(load(in_bfloat16(graphs.mlp(4, 8, 4))))
    wrong = original.copy()
    wrong.weights["fc0.b"] = wide(wrong.weights["fc0.b"])
    with pytest.raises(VerificationError):
        check_graph(wrong, original)


def test_bodies_and_casts_are_widened_too() -> None:
    inner = helper.make_graph(
        [helper.make_node("Cast", ["x"], ["y"], to=TensorProto.BFLOAT16)],
        "body",
        [],
        [helper.make_tensor_value_info("y", TensorProto.BFLOAT16, [2])],
        [numpy_helper.from_array(np.ones(2, BRAIN), "w")],
    )
    node = helper.make_node("If", ["c"], ["z"], then_branch=inner, else_branch=inner)
    output = helper.make_tensor_value_info("z", TensorProto.BFLOAT16, [2])
    model = helper.make_model(helper.make_graph([node], "g", [], [output]))
    widen(model)
    body = model.graph.node[0].attribute[0].g
    assert body.node[0].attribute[0].i == TensorProto.FLOAT
    assert body.initializer[0].data_type == TensorProto.FLOAT
    assert body.output[0].type.tensor_type.elem_type == TensorProto.FLOAT
    assert model.graph.output[0].type.tensor_type.elem_type == TensorProto.FLOAT


def test_element_types_are_known_behind_plain_operators() -> None:
    types = element_types(in_bfloat16(graphs.mlp(4, 8, 4)))
    assert set(types.values()) == {BRAIN}
    assert len(types) > 3


def test_half_precision_is_scored_and_written_in_kind() -> None:
    model = graphs.transformer(dtype=np.float16)
    data = {name: array.astype(np.float16) for name, array in graphs.calibration(graphs.transformer()).items()}
    result = prune(model, 0.3, allocation="uniform", calibration=data)
    assert result.model is not None
    kinds = {tensor.data_type for tensor in result.model.graph.initializer}
    assert kinds == {TensorProto.FLOAT16, TensorProto.INT64}


def test_analysis_of_bfloat16_finds_what_single_precision_has() -> None:
    found = [
        [(group.id, group.size, group.prunable) for group in analyse_model(model).structure.groups]
        for model in (graphs.transformer(), in_bfloat16(graphs.transformer()))
    ]
    assert found[0] == found[1]
