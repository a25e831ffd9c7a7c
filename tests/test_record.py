"""The record says what was asked for and what is left, in plain data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import graphs
import pytest

from onnxsnp.analysis import analyse_model
from onnxsnp.calibration.data import Dataset, open_dataset
from onnxsnp.graph.inputs import graph_inputs
from onnxsnp.options import Options
from onnxsnp.planning.plan import Plan
from onnxsnp.record import new_record, settings
from onnxsnp.surgery.apply import apply

MODEL = graphs.transformer()


def data() -> Dataset:
    specs = graph_inputs(analyse_model(MODEL).graph)
    return open_dataset(graphs.calibration(MODEL, 16), specs, samples=16, batch_size=8)


@pytest.mark.parametrize(("scope", "want"), [(None, None), ("qk,ffn", "qk,ffn"), (["qk", "ffn"], "qk,ffn")])
def test_settings_are_plain_data(scope: Any, want: str | None) -> None:
    found = settings(Options(0.3, scope=scope, of="latency", latency_table=Path("times.json"), seed=4), data())
    assert json.loads(json.dumps(found)) == found
    assert (found["scope"], found["latency_table"], found["seed"], found["ratio"]) == (want, "times.json", 4, 0.3)


def test_heads_are_listed_where_some_of_them_go() -> None:
    analysis = analyse_model(MODEL)
    plan = Plan("", [graphs.keeping(analysis.groups["head.1"], [[0, 2]])])
    groups = {group["id"]: group for group in new_record(analysis, plan, Options(0.3), data())["groups"]}
    assert groups["head.1"] == {"id": "head.1", "kind": "head", "before": 3, "heads": 1, "after": 2, "together": 1}
    assert "head.0" not in groups and (groups["qk.1"]["heads"], groups["qk.1"]["after"]) == (3, 4)


def test_the_record_counts_what_the_cut_model_has() -> None:
    analysis = analyse_model(MODEL)
    plan = Plan("", [graphs.keeping(analysis.groups["ffn.1"], [[0, 1, 2]])])
    record = new_record(analysis, plan, Options(0.3), data())
    assert json.loads(json.dumps(record))
    left = {group["id"]: (group["before"], group["after"]) for group in record["groups"]}
    assert left["ffn.1"] == (20, 3) and left["ffn.0"] == (20, 20)
    assert not any(group["kind"] == "head" for group in record["groups"])
    held = sum(array.size for array in apply(analysis, plan).graph.weights.values() if array.dtype.kind == "f")
    whole = sum(array.size for array in analysis.graph.weights.values() if array.dtype.kind == "f")
    assert record["before"]["params"] - record["after"]["params"] == whole - held == 17 * (12 + 1 + 12)
    assert record["before"]["macs"] - record["after"]["macs"] == 17 * (12 + 12) * 5
    assert Plan.from_json(json.dumps(record["plan"])).groups == plan.groups
