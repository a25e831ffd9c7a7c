"""What `inspect` reports: the fields of its contract, and nothing left out."""

from __future__ import annotations

import json
from pathlib import Path

import graphs
import numpy as np
import onnx
import pytest

import onnxsnp
from onnxsnp.analysis import analyse_model, inspect


def test_the_report_is_plain_data_with_the_promised_fields() -> None:
    report = inspect(graphs.transformer()).to_dict()
    assert json.loads(json.dumps(report)) == report
    assert {"params", "macs", "sites", "groups", "skipped"} <= report.keys()
    for site in report["sites"]:
        assert {"name", "heads", "qk_size", "v_size", "prunable", "reasons"} <= site.keys()
    for group in report["groups"]:
        assert {"id", "kind", "size", "heads", "params", "macs"} <= group.keys()


def test_sites_have_their_sizes() -> None:
    report = inspect(graphs.transformer())
    assert [(site["name"], site["heads"], site["qk_size"], site["v_size"]) for site in report.sites] == [
        (f"blocks.{index}.attn", 3, 4, 6) for index in range(2)
    ]
    assert all(site["prunable"] == {"qk": True, "v": True, "head": True} for site in report.sites)
    assert report.skipped == [] and report.inputs == {"x": ["N", 5, 7]} and report.opset == 17


def test_heads_of_queries_are_counted_and_rotation_pairs_are_sizes_of_two() -> None:
    report = inspect(Path(__file__).parent / "exports" / "families" / "text_llama_dynamo18_dyn.onnx")
    assert [(site["heads"], site["qk_size"], site["v_size"]) for site in report.sites] == [(4, 8, 8)] * 2
    pairs = [(group["size"], group["together"]) for group in report.groups if group["kind"] == "qk"]
    assert pairs == [(4, 2)] * 2


def test_an_analysis_can_be_inspected_again() -> None:
    analysis = analyse_model(graphs.transformer())
    assert inspect(analysis) == inspect(analysis)


def test_the_same_file_gives_the_same_groups() -> None:
    model = graphs.transformer(qkv="flat", gate="packed")
    left, right = (analyse_model(model).structure.groups for _ in range(2))
    assert left == right


def test_sizes_that_are_given_are_those_the_cost_is_counted_at() -> None:
    model = graphs.transformer(tokens="S")
    small, large = (inspect(model, {"x": [1, tokens, 7]}).macs for tokens in (4, 8))
    linear = 2 * (12 * 12 * 2 + 12 * 18 * 2 + 2 * 12 * 20) + 7 * 12
    assert large - small == 4 * linear + 2 * (64 - 16) * 3 * 10


def test_the_public_names_exist() -> None:
    for name in ("analyse_model", "inspect", "prune", "load", "read_plan", "Plan", "ModelError"):
        assert getattr(onnxsnp, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = onnxsnp.nothing  # type: ignore[attr-defined]


def test_a_model_without_anything_to_cut_is_reported_as_such() -> None:
    net = graphs.Net()
    net.output(net.op("Relu", net.linear(net.input("x", ["N", 4]), "a", 4, 3)), ["N", 3])
    report = inspect(net.proto())
    assert report.groups == [] and report.sites == [] and report.macs == 12 and report.params == 15


def test_token_models_are_analysed_without_being_told_their_sizes() -> None:
    net = graphs.Net()
    ids = net.input("ids", ["N", "S"], np.int64)
    h = net.op("Gather", net.weight("table", 11, 8), ids, axis=0)
    h = net.op("Add", h, net.linear(net.op("Relu", net.linear(h, "up", 8, 16)), "down", 16, 8))
    net.output(net.linear(h, "out", 8, 3), ["N", "S", 3])
    found = {group.id: (group.size, group.prunable) for group in analyse_model(net.proto()).structure.groups}
    assert found == {"residual": (8, True), "ffn.0": (16, True)}


def test_an_output_that_is_a_weight_no_node_reads_is_left_alone() -> None:
    model = graphs.transformer()
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones((3, 5), np.float32), "table"))
    model.graph.output.append(onnx.helper.make_tensor_value_info("table", onnx.TensorProto.FLOAT, [3, 5]))
    plain, found = analyse_model(graphs.transformer()).structure, analyse_model(model).structure
    assert [(group.id, group.size, group.prunable) for group in found.groups if group.prunable] == [
        (group.id, group.size, group.prunable) for group in plain.groups if group.prunable
    ]
