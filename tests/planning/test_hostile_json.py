"""Plans, ratios and latency tables are files that people edit and send: nonsense in them is one clear line."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import graphs
import pytest

from onnxsnp.analysis import Analysis, analyse_model
from onnxsnp.errors import PlanError
from onnxsnp.planning.allocation import from_file
from onnxsnp.planning.latency_table import read_table
from onnxsnp.planning.plan import GroupPlan, Plan, check_plan, read_plan
from onnxsnp.pruning import prune

NONSENSE = [
    "",
    "null",
    "3",
    '"text"',
    "[]",
    "{}",
    "NaN",
    "[" * 100_000,
    '{"a":' * 100_000,
    "[" * 100_000 + "]" * 100_000,
    "1" * 5000,
    '{"version": 1e999}',
    '{"version": NaN}',
    '{"version": [1]}',
    '{"version": 1}',
]


@pytest.fixture(scope="module")
def analysis() -> Analysis:
    return analyse_model(graphs.transformer(blocks=1))


def one_line(error: BaseException, path: Path) -> None:
    assert str(path) in str(error) and str(error).isprintable() and len(str(error)) < 600


@pytest.mark.parametrize("text", NONSENSE)
@pytest.mark.parametrize("reader", ["plan", "table", "ratios"])
def test_nonsense_is_refused_by_every_reader(tmp_path: Path, analysis: Analysis, text: str, reader: str) -> None:
    path = tmp_path / "file.json"
    path.write_text(text)
    readers: dict[str, Callable[[], Any]] = {
        "plan": lambda: read_plan(path),
        "table": lambda: read_table(path),
        "ratios": lambda: from_file(str(path), analysis.structure.groups),
    }
    with pytest.raises(PlanError) as caught:
        readers[reader]()
    one_line(caught.value, path)


def plan_text(**changes: Any) -> str:
    group = {"id": "ffn.0", "kind": "ffn", "size": 20, "heads": 1, "keep": [[0, 1, 2]]}
    fields = {"version": 1, "model": "any", "settings": {}, "groups": [group | changes]}
    return json.dumps(fields | {key: value for key, value in changes.items() if key in fields})


@pytest.mark.parametrize(
    "changes",
    [
        {"size": 1e999},
        {"size": "twenty"},
        {"heads": None},
        {"keep": 3},
        {"keep": [3]},
        {"keep": [[0.5]]},
        {"keep": [[True]]},
        {"keep": [["0"]]},
        {"keep": [[float("nan")]]},
        {"keep": {"0": [1]}},
        {"groups": {"ffn.0": []}},
        {"groups": 1},
        {"settings": 3},
        {"settings": {"ratio": float("nan")}},
        {"settings": {"ratio": float("inf")}},
    ],
)
def test_plans_with_wrong_types_are_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    path = tmp_path / "plan.json"
    path.write_text(plan_text(**changes))
    with pytest.raises(PlanError, match="is not a plan") as caught:
        read_plan(path)
    one_line(caught.value, path)


@pytest.mark.parametrize(
    "keep", [[], [[]], [[0, 0]], [[2, 1]], [[-1, 0]], [[0, 20]], [[0, 2**70]], [[0], [1]], [[-(2**70)]]]
)
def test_plans_of_indices_that_cannot_be_are_refused(analysis: Analysis, keep: list[list[int]]) -> None:
    plan = Plan("any", [GroupPlan("ffn.0", "ffn", 20, 1, keep)])
    with pytest.raises(PlanError, match=r"group 'ffn\.0'"):
        check_plan(plan, analysis.groups, "any")


def test_a_plan_of_very_many_groups_takes_no_time(analysis: Analysis) -> None:
    many = [GroupPlan(str(number), "", 1, 1, []) for number in range(50_000)]
    plan = Plan("any", [GroupPlan("ffn.0", "ffn", 20, 1, [[0]]), *many])
    start = time.monotonic()
    with pytest.raises(PlanError, match="names a group '0'"):
        check_plan(plan, analysis.groups, "any")
    assert time.monotonic() - start < 1


@pytest.mark.parametrize(
    "data",
    [
        {"ffn": float("nan")},
        {"ffn": float("inf")},
        {"ffn": [0.5, float("nan")]},
        {"ffn": "half"},
        {"ffn": [[0.5]]},
        {"ffn": {"0": 0.5}},
        {"ffn": 10**400},
        {"ffn": -0.1},
        {"ffn": 1},
        {"ffn": True},
        {"ffn": [0.5] * 100_000},
        {"models": {}},
        {"models": {"a": 3}},
        {"models": {"a": {"models": {}}}},
        {"blocks_99999999999999999999_mlp_fc1": 0.5},
        {"matmul_" + "9" * 5000: 0.5},
    ],
)
def test_ratios_that_are_none_are_refused(tmp_path: Path, analysis: Analysis, data: Any) -> None:
    path = tmp_path / "ratios.json"
    path.write_text(json.dumps(data))
    with pytest.raises(PlanError) as caught:
        from_file(str(path), analysis.structure.groups)
    assert str(caught.value).isprintable()


def table_text(**changes: Any) -> str:
    whole = [{"kept": {"ffn.0": 20}, "ms": 2.0}, {"kept": {"ffn.0": 10}, "ms": 1.0}]
    layers = {"a": {"widths": [10, 20], "ms": [1.0, 2.0]}}
    return json.dumps({"version": 1, "model": "m", "machine": "x", "whole": whole, "layers": layers} | changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"layers": []},
        {"layers": {"a": 1}},
        {"layers": {"a": {"widths": [10], "ms": [10**400]}}},
        {"layers": {"a": {"widths": [10], "ms": [float("nan")]}}},
        {"layers": {"a": {"widths": [10, 10], "ms": [1, 1]}}},
        {"layers": {"a": {"widths": ["10"], "ms": [1]}}},
        {"whole": None},
        {"whole": [{"kept": [], "ms": 1}] * 2},
        {"whole": [{"kept": {"a": 2**70}, "ms": float("inf")}] * 2},
    ],
)
def test_tables_with_wrong_types_are_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    path = tmp_path / "table.json"
    path.write_text(table_text(**changes))
    with pytest.raises(PlanError, match="is not a latency table") as caught:
        read_table(path)
    one_line(caught.value, path)


def test_the_texts_above_are_right_but_for_what_is_changed(tmp_path: Path, analysis: Analysis) -> None:
    (tmp_path / "plan.json").write_text(plan_text())
    (tmp_path / "table.json").write_text(table_text())
    (tmp_path / "ratios.json").write_text(json.dumps({"ffn": [0.5]}))
    check_plan(read_plan(tmp_path / "plan.json"), analysis.groups, "any")
    assert read_table(tmp_path / "table.json").layers["a"].widths == (10, 20)
    assert from_file(str(tmp_path / "ratios.json"), analysis.structure.groups) == {"ffn.0": 10}


def test_what_a_plan_says_about_itself_does_not_reach_past_the_record(tmp_path: Path) -> None:
    """Settings are the plan's own text: any JSON, kept as it is."""
    source = graphs.transformer(blocks=1)
    options: dict[str, Any] = {"compensation": "none", "criterion": "l2", "samples": 2, "latency": False, "threads": 1}
    plan = prune(source, 0.5, allocation="uniform", dry_run=True, **options).plan
    plan.settings = {"ratio": {"deep": [[["x"]]]}, "output": "../../elsewhere.onnx"}
    (tmp_path / "plan.json").write_text(plan.to_json())
    (tmp_path / "model.onnx").write_bytes(source.SerializeToString())
    prune(tmp_path / "model.onnx", plan=tmp_path / "plan.json", output=tmp_path / "out.onnx", **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "out.json", "out.onnx", "plan.json"]
