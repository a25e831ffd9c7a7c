"""Quantised operators are left alone, said once, and hide nothing else that is left alone."""

from __future__ import annotations

from pathlib import Path

import graphs
import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from onnxsnp.analysis import analyse_model
from onnxsnp.errors import PlanError
from onnxsnp.graph.quantised import ADVICE, describe, is_quantised
from onnxsnp.pruning import prune

FAMILIES = Path(__file__).resolve().parent.parent / "exports" / "families"


def with_integer_weight(model: onnx.ModelProto, name: str) -> onnx.ModelProto:
    """A model with one weight stored as int8, dequantised where it is read."""
    held = graphs.initializers(model)[name]
    scale = np.float32(np.abs(held).max() / 127)
    for tensor in model.graph.initializer:
        if tensor.name == name:
            tensor.CopyFrom(numpy_helper.from_array(np.round(held / scale).astype(np.int8), f"{name}.int"))
    model.graph.initializer.append(numpy_helper.from_array(np.asarray(scale), f"{name}.scale"))
    node = helper.make_node("DequantizeLinear", [f"{name}.int", f"{name}.scale"], [name], name="widened")
    model.graph.node.insert(0, node)
    return model


def test_one_sentence_stands_for_all_that_follows_from_quantisation() -> None:
    for name, sites in (("format_static_quantised_vit", 0), ("format_dynamic_quantised_bert", 2)):
        structure = analyse_model(FAMILIES / f"{name}.onnx").structure
        assert len(structure.sites) == sites
        assert not structure.groups
        assert [ADVICE in item.reason for item in structure.skipped] == [True]


def test_a_weight_stored_as_integers_is_not_turned_into_a_floating_point_one() -> None:
    analysis = analyse_model(with_integer_weight(graphs.mlp(5, 9, 4), "fc1.w"))
    assert [node.op_type for node in analysis.graph.nodes].count("DequantizeLinear") == 1
    assert analysis.graph.weights["fc1.w.int"].dtype == np.int8
    assert not analysis.groups
    assert [item.reason for item in analysis.structure.skipped] == [describe(analysis.graph)]
    assert describe(analysis.graph).startswith("the model is quantised (1 DequantizeLinear)")


def test_what_is_not_quantised_is_cut_and_other_reasons_stay() -> None:
    net = graphs.Net()
    x = net.input("x", ["N", 5])
    net.output(net.linear(net.op("Relu", net.linear(x, "fc0", 5, 9)), "fc1", 9, 4), ["N", 4], "a")
    net.output(net.linear(net.op("Relu", net.linear(x, "fc2", 5, 8)), "fc3", 8, 4), ["N", 4], "b")
    swallowed = net.op("CumSum", net.linear(x, "fc4", 5, 7), 1)
    net.output(net.op("ReduceSum", swallowed, [1], keepdims=0), ["N"], "c")
    analysis = analyse_model(with_integer_weight(net.proto(), "fc3.w"))
    assert [(group.kind, group.size) for group in analysis.structure.groups if group.prunable] == [("ffn", 9)]
    said = [item.reason for item in analysis.structure.skipped]
    assert said[0] == describe(analysis.graph)
    assert len(said) == 2
    assert "no rule for operator CumSum" in said[1]


def test_pruning_a_quantised_model_says_what_to_do() -> None:
    with pytest.raises(PlanError, match=ADVICE):
        prune(FAMILIES / "format_static_quantised_vit.onnx", 0.3)


def test_operators_that_only_sound_like_it_are_not_quantised() -> None:
    assert is_quantised(helper.make_node("QLinearMatMul", [], []))
    assert not is_quantised(helper.make_node("QuickGelu", [], []))
