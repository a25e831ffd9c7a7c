"""Plans are plain data: they survive JSON, can be edited, and are refused where they do not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import graphs
import numpy as np
import pytest

from onnxsnp.analysis import Analysis, analyse_model
from onnxsnp.errors import PlanError
from onnxsnp.model import load
from onnxsnp.planning.plan import GroupPlan, Plan, as_cuts, check_plan, fingerprint, keep_highest, read_plan


@pytest.fixture(scope="module")
def analysis() -> Analysis:
    return analyse_model(graphs.transformer(qk_norm=True))


def plan_for(analysis: Analysis) -> Plan:
    groups = [group for group in analysis.structure.groups if group.kind in ("v", "ffn") and group.prunable]
    return graphs.random_plan(groups, np.random.default_rng(0), fingerprint(analysis.model), least=2)


def test_a_plan_survives_json(analysis: Analysis) -> None:
    plan = plan_for(analysis)
    plan.settings = {"ratio": 0.5, "scope": None}
    assert Plan.from_json(plan.to_json()) == plan
    assert len([line for line in plan.to_json().splitlines() if '"keep"' in line]) == len(plan.groups)


def test_an_empty_plan_survives_json() -> None:
    assert Plan.from_json(Plan("m", []).to_json()) == Plan("m", [])


def test_a_plan_is_read_from_its_own_file_and_from_a_run_record(analysis: Analysis, tmp_path: Path) -> None:
    plan = plan_for(analysis)
    (tmp_path / "plan.json").write_text(plan.to_json())
    record = {"output": "x.onnx", "plan": json.loads(plan.to_json())}
    (tmp_path / "record.json").write_text(json.dumps(record))
    assert read_plan(tmp_path / "plan.json") == read_plan(str(tmp_path / "record.json")) == plan


def test_an_edited_plan_is_accepted(analysis: Analysis) -> None:
    plan = plan_for(analysis)
    data = json.loads(plan.to_json())
    data["groups"][0]["keep"] = [[0, 5]] * 3
    del data["groups"][1]
    edited = Plan.from_json(json.dumps(data))
    check_plan(edited, analysis.groups, fingerprint(analysis.model))
    assert edited.groups[0].kept == 2


@pytest.mark.parametrize(
    "text",
    [
        "",
        "hello",
        "[]",
        "null",
        "{}",
        '{"version": 1}',
        '{"version": 1, "model": "m", "settings": {}, "groups": 3}',
        '{"version": 1, "model": "m", "settings": {}, "groups": [{"id": "a"}]}',
    ],
)
def test_what_is_no_plan_is_one_clear_error(text: str, tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(PlanError, match=r"bad\.json is not a plan"):
        read_plan(tmp_path / "bad.json")


def test_plans_of_an_unknown_version_are_refused() -> None:
    with pytest.raises(PlanError, match="plan version 7, this program reads 1"):
        Plan.from_json('{"version": 7}')


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.json", tmp_path):
        with pytest.raises(PlanError, match="cannot read plan"):
            read_plan(path)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(PlanError, match="cannot read plan"):
        read_plan(tmp_path / "binary")


def test_a_plan_for_another_model_is_refused(analysis: Analysis) -> None:
    plan = plan_for(analysis)
    with pytest.raises(PlanError, match="made for another model"):
        check_plan(plan, analysis.groups, fingerprint(load(graphs.transformer(seed=1, qk_norm=True))))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": "v.9"}, "names a group 'v.9' that this model does not have"),
        ({"kind": "ffn"}, "does not have"),
        ({"size": 7}, "does not have"),
        ({"id": "qk.0", "kind": "qk", "size": 4}, "group 'qk.0' cannot be cut: a normalisation runs over it"),
        ({"keep": [[0], [1]]}, "needs 3 equally long, non-empty lists"),
        ({"keep": []}, "needs 3 equally long, non-empty lists"),
        ({"keep": [[0, 1], [1], [1]]}, "needs 3 equally long, non-empty lists"),
        ({"keep": [[], [], []]}, "needs 3 equally long, non-empty lists"),
        ({"keep": [[0, 6], [0, 1], [0, 1]]}, r"distinct and lie in \[0, 6\)"),
        ({"keep": [[-1, 2], [0, 1], [0, 1]]}, r"distinct and lie in \[0, 6\)"),
        ({"keep": [[0, 1], [0, 1], [2, 2]]}, r"distinct and lie in \[0, 6\)"),
        ({"keep": [[0, 1], [0, 1], [2, 1]]}, "must ascend"),
    ],
)
def test_selections_that_are_not_legal_are_refused(analysis: Analysis, change: dict[str, Any], message: str) -> None:
    entry = GroupPlan("v.0", "v", 6, 3, [[0, 1], [0, 2], [4, 5]])
    mark = fingerprint(analysis.model)
    check_plan(Plan(mark, [entry]), analysis.groups, mark)
    with pytest.raises(PlanError, match=message):
        check_plan(Plan(mark, [GroupPlan(**{**vars(entry), **change})]), analysis.groups, mark)


def test_a_group_that_is_listed_twice_is_refused(analysis: Analysis) -> None:
    mark = fingerprint(analysis.model)
    entry = GroupPlan("v.0", "v", 6, 3, [[0, 1], [0, 2], [4, 5]])
    with pytest.raises(PlanError):
        check_plan(Plan(mark, [entry, entry]), analysis.groups, mark)


def test_indices_that_are_not_whole_are_refused(analysis: Analysis) -> None:
    data = json.loads(plan_for(analysis).to_json())
    data["groups"][0]["keep"] = [[0.5, 1.5]] * 3
    with pytest.raises(PlanError):
        Plan.from_json(json.dumps(data))


def test_groups_that_stay_whole_are_no_cuts(analysis: Analysis) -> None:
    whole = graphs.keeping(analysis.groups["v.0"], [list(range(6))] * 3)
    part = graphs.keeping(analysis.groups["v.1"], [[0, 1]] * 3)
    (cut,) = as_cuts(Plan("", [whole, part]), analysis.groups)
    assert cut.atom == analysis.groups["v.1"].atom and cut.keep.shape == (3, 2)
    assert cut.head_atoms == analysis.groups["v.1"].head_atoms


def test_fingerprints_follow_graph_and_weights_and_nothing_else() -> None:
    model = graphs.mlp(4, 5, 3)
    mark = fingerprint(load(model))
    other = graphs.mlp(4, 5, 3)
    other.producer_name = "someone else"
    other.metadata_props.add(key="a", value="b")
    assert fingerprint(load(other)) == mark
    changed = graphs.initializers(model)["fc0.w"].copy()
    changed[0, 0] += 1e-6
    assert fingerprint(load(graphs.set_weights(model, {"fc0.w": changed}))) != mark
    assert fingerprint(load(graphs.mlp(4, 5, 3, activation="Tanh"))) != mark


def test_fingerprints_follow_attributes() -> None:
    models = [graphs.depthwise(), graphs.depthwise()]
    node = next(node for node in models[1].graph.node if node.name == "depth")
    next(entry for entry in node.attribute if entry.name == "pads").ints[:] = [2, 2, 2, 2]
    assert fingerprint(load(models[0])) != fingerprint(load(models[1]))


def test_the_highest_scores_stay_in_ascending_order_and_ties_keep_the_lower_index() -> None:
    scores = np.asarray([[1.0, 5.0, 3.0, 4.0], [2.0, 2.0, -np.inf, 2.0]])
    assert keep_highest(scores, 2) == [[1, 3], [0, 1]]
    assert keep_highest(scores, 3) == [[1, 2, 3], [0, 1, 3]]
