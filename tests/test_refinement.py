"""Steps after the one-shot weights: kept where they help on unseen samples, dropped with a note where they do not."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import graphs
import numpy as np
import onnx
import pytest

from onnxsnp.analysis import Analysis, analyse_model
from onnxsnp.calibration.data import Batch
from onnxsnp.planning.curves import Loss
from onnxsnp.planning.plan import GroupPlan, Plan, as_cuts
from onnxsnp.pruning import PruneResult, prune
from onnxsnp.reconstruction.sequential import refit_in_order
from onnxsnp.refinement import Refined, Step, refine

NAME = "sequential refit"
BOTH = f"fit of feed-forward branches and {NAME}"


class Told:
    """A loss that says what it is told to say, and remembers what it was asked about."""

    def __init__(self, *values: float) -> None:
        self.values, self.asked = list(values), []  # type: list[float], list[dict[str, np.ndarray]]

    def of(self, entries: Sequence[GroupPlan], updates: Mapping[str, np.ndarray]) -> float:
        self.asked.append(dict(updates))
        return self.values.pop(0)


@pytest.fixture(scope="module")
def analysis() -> Analysis:
    return analyse_model(graphs.transformer())


def plan_of(analysis: Analysis) -> Plan:
    return Plan("", [graphs.keeping(analysis.groups["ffn.0"], [list(range(0, 20, 2))])])


def samples(analysis: Analysis, count: int = 32) -> list[Batch]:
    return [Batch(graphs.inputs_for(analysis.model.proto, count), None, count)]


def refined(
    analysis: Analysis, updates: dict[str, np.ndarray], loss: Told, batches: list[Batch] | None = None
) -> Refined:
    given = samples(analysis) if batches is None else batches
    return refine(analysis, plan_of(analysis), updates, lambda: given, cast(Loss, loss), threads=1)


def some_updates(analysis: Analysis) -> dict[str, np.ndarray]:
    names = ("/blocks.0/mlp/fc2.w", "/blocks.0/mlp/fc1.w")
    return {name: analysis.graph.weights[name] * np.float32(1.1) for name in names}


def test_a_step_that_helps_is_kept(analysis: Analysis) -> None:
    updates, loss = some_updates(analysis), Told(0.5, 0.4)
    found = refined(analysis, updates, loss)
    assert found.steps == [Step(BOTH, 0.5, 0.4, True)] and found.notes() == []
    cuts = as_cuts(plan_of(analysis), analysis.groups)
    refit = refit_in_order(analysis, cuts, updates, samples(analysis), threads=1)
    want = {**updates, **refit}
    assert found.updates.keys() == want.keys() > updates.keys()
    assert all(np.array_equal(array, want[name]) for name, array in found.updates.items())
    assert not np.array_equal(want["/blocks.0/mlp/fc2.w"], updates["/blocks.0/mlp/fc2.w"])
    for asked, weights in zip(loss.asked, (updates, want), strict=True):
        assert asked.keys() == weights.keys() and all(np.array_equal(asked[name], weights[name]) for name in asked)


@pytest.mark.parametrize("after", [0.6, 0.5, float("nan")])
def test_steps_that_do_not_help_are_dropped_with_a_note_each(analysis: Analysis, after: float) -> None:
    updates = some_updates(analysis)
    found = refined(analysis, updates, Told(0.5, after, 0.7))
    assert found.updates.keys() == updates.keys()
    assert all(found.updates[name] is array for name, array in updates.items())
    assert [(step.name, step.before, step.kept) for step in found.steps] == [(BOTH, 0.5, False), (NAME, 0.5, False)]
    note, other = found.notes()
    assert BOTH in note and "dropped" in note and "0.5" in note and f"{after:.4g}" in note
    assert BOTH not in other and NAME in other and "0.7" in other
    json.dumps(found.report(), allow_nan=False)


def test_without_the_fit_of_feed_forward_branches_the_refit_may_still_help(analysis: Analysis) -> None:
    updates, loss = some_updates(analysis), Told(0.5, 0.6, 0.4)
    found = refined(analysis, updates, loss)
    assert [(step.name, step.kept) for step in found.steps] == [(BOTH, False), (NAME, True)]
    cuts = as_cuts(plan_of(analysis), analysis.groups)
    refit = refit_in_order(analysis, cuts, updates, samples(analysis), local=False, threads=1)
    assert all(np.array_equal(found.updates[name], array) for name, array in refit.items())
    assert np.array_equal(found.updates["/blocks.0/mlp/fc1.w"], updates["/blocks.0/mlp/fc1.w"])


def test_the_given_weights_are_not_changed(analysis: Analysis) -> None:
    updates = some_updates(analysis)
    before = {name: array.copy() for name, array in updates.items()}
    refined(analysis, updates, Told(0.5, 0.4))
    assert updates.keys() == before.keys() and all(np.array_equal(updates[name], before[name]) for name in before)


def test_the_report_is_plain_data(analysis: Analysis) -> None:
    found = refined(analysis, {}, Told(0.5, 0.25))
    assert json.loads(json.dumps(found.report())) == [{"name": BOTH, "before": 0.5, "after": 0.25, "kept": True}]


def test_without_samples_nothing_is_tried(analysis: Analysis) -> None:
    updates, loss = some_updates(analysis), Told()
    found = refined(analysis, updates, loss, [])
    assert found.updates == updates and (found.steps, loss.asked) == ([], [])


def test_where_nothing_ends_a_branch_nothing_is_tried() -> None:
    mlp = analyse_model(graphs.mlp(4, 6, 3))
    loss, updates = Told(), {"fc1.w": mlp.graph.weights["fc1.w"]}
    plan = Plan("", [graphs.keeping(mlp.groups["ffn.0"], [[0, 1, 4]])])
    found = refine(mlp, plan, updates, lambda: samples(mlp), cast(Loss, loss), threads=1)
    assert found.updates == updates and (found.report(), found.notes(), loss.asked) == ([], [], [])


@pytest.fixture(scope="module")
def model() -> onnx.ModelProto:
    return graphs.transformer(blocks=2, heads=2, qk=8, v=8, width=16, ffn=32)


def pruned(model: onnx.ModelProto, ratio: float | None = 0.4, **options: Any) -> PruneResult:
    calibration = graphs.calibration(model, options.pop("count", 200))
    return prune(model, ratio, calibration=calibration, samples=128, latency=False, **options)


@pytest.fixture(scope="module")
def result(model: onnx.ModelProto, tmp_path_factory: pytest.TempPathFactory) -> PruneResult:
    return pruned(model, output=tmp_path_factory.mktemp("out") / "small.onnx")


def test_the_record_tells_the_steps(result: PruneResult) -> None:
    steps = result.record["steps"]
    assert [step["name"] for step in steps] == [BOTH, NAME][: len(steps)] and steps
    for step in steps:
        assert step.keys() == {"name", "before", "after", "kept"}
        assert step["before"] > 0 and step["after"] > 0 and step["kept"] == (step["after"] < step["before"])
        assert any(note.startswith(step["name"]) for note in result.record["notes"]) != step["kept"]
    written = json.loads(Path(result.record["output"]).with_suffix(".json").read_text())
    assert written["steps"] == result.record["steps"]
    assert result.record["seconds"]["refit in order"] > 0


@pytest.mark.parametrize("compensation", ["refit", "none"])
def test_lesser_compensation_has_no_steps(model: onnx.ModelProto, compensation: str) -> None:
    record = pruned(model, compensation=compensation).record
    assert "steps" not in record and "refit in order" not in record["seconds"]


def test_where_nothing_is_cut_nothing_is_refitted(model: onnx.ModelProto) -> None:
    found = pruned(model, 0.0)
    assert "steps" not in found.record and found.model is not None
    feed = graphs.inputs_for(model, 3)
    np.testing.assert_array_equal(graphs.run(found.model, feed)[0], graphs.run(model, feed)[0])


def test_too_few_samples_to_judge_by_leave_the_one_shot_weights(model: onnx.ModelProto) -> None:
    assert "steps" not in pruned(model, count=3).record


def test_the_samples_that_judge_a_step_are_not_those_it_is_fitted_on(
    model: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[list[Any], list[Any]]] = []

    def watched(
        analysis: Analysis, plan: Plan, updates: dict[str, np.ndarray], batches: Any, loss: Any, **_: Any
    ) -> Refined:
        seen.append(([batch.inputs for batch in batches()], loss._tails[0].states))
        return Refined(updates)

    monkeypatch.setattr("onnxsnp.pruning.refine", watched)
    pruned(model)
    ((fit, judge),) = seen
    rows = [{sample.tobytes() for batch in part for sample in batch["x"]} for part in (fit, judge)]
    assert (len(rows[0]), len(rows[1])) == (128, 32) and not rows[0] & rows[1]


def test_a_dropped_step_leaves_the_weights_of_the_one_shot(
    model: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = pruned(model)
    plain = Loss.of
    monkeypatch.setattr("onnxsnp.pruning.refine", lambda analysis, plan, updates, *_, **__: Refined(dict(updates)))
    one_shot = pruned(model, None, plan=kept.plan)
    monkeypatch.undo()
    refits: list[bool] = []

    def worse(self: Loss, entries: Sequence[GroupPlan], updates: Mapping[str, np.ndarray], *rest: Any) -> float:
        refits.append(True)
        return plain(self, entries, updates, *rest) + 100 * len(refits)

    monkeypatch.setattr(Loss, "of", worse)
    dropped = pruned(model, None, plan=kept.plan)
    assert dropped.record["steps"][0]["kept"] is False and any(NAME in note for note in dropped.record["notes"])
    assert serialised(dropped) == serialised(one_shot) != serialised(kept)


def serialised(result: PruneResult) -> bytes:
    assert result.model is not None
    return result.model.SerializeToString(deterministic=True)


@pytest.mark.parametrize("scope", [None, "residual", "ffn,residual"])
def test_a_given_plan_gets_the_weights_of_the_run_that_found_it(
    model: onnx.ModelProto, result: PruneResult, scope: str | None, tmp_path: Path
) -> None:
    first = result if scope is None else pruned(model, scope=scope)
    assert any(step["kept"] for step in first.record["steps"])  # else this would prove the one-shot weights only
    (tmp_path / "plan.json").write_text(first.plan.to_json())
    for plan in (first.plan, tmp_path / "plan.json"):
        again = pruned(model, None, plan=plan)
        assert serialised(again) == serialised(first)
        assert again.record["steps"] == first.record["steps"]


def test_the_same_request_gives_the_same_bytes(model: onnx.ModelProto, result: PruneResult, tmp_path: Path) -> None:
    again = pruned(model, output=tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx").read_bytes() == Path(result.record["output"]).read_bytes()
    assert again.record["steps"] == result.record["steps"]
