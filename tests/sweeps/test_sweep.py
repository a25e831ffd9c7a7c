"""A whole sweep: one pass over the data, the same results as single runs, and runs that need not be made again."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from typing import Any

import graphs
import numpy as np
import onnx
import pytest

from onnxsnp import pruning
from onnxsnp.analysis import analyse_model
from onnxsnp.errors import ModelError, PlanError
from onnxsnp.pruning import prune
from onnxsnp.sweeps import run as module
from onnxsnp.sweeps.run import sweep

PLAIN: dict[str, Any] = {"compensation": "none", "criterion": "l2", "latency": False, "threads": 1}


@pytest.fixture(scope="module")
def model() -> onnx.ModelProto:
    return graphs.transformer(blocks=2, heads=2, qk=8, v=8, width=16, ffn=32, tokens=5)


@pytest.fixture(scope="module")
def data(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return graphs.calibration(model, 40)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry per pass of statistics."""
    seen: list[int] = []
    collect = pruning.collect
    monkeypatch.setattr(pruning, "collect", lambda *args, **more: (seen.append(1), collect(*args, **more))[1])
    return seen


def test_one_pass_serves_all_plans_and_each_is_what_prune_makes(
    model: onnx.ModelProto, data: Any, tmp_path: Path, passes: list[int]
) -> None:
    options: dict[str, Any] = {"calibration": data, "samples": 16, "threads": 1, "latency": False}
    result = sweep(model, [0.2, 0.4], tmp_path / "out", compensation="refit,full", criterion="snp,l2", **options)
    assert len(passes) == 1 and len(result.rows) == 8
    for name, ratio, compensation in (("snp-full-40", 0.4, "full"), ("l2-full-20", 0.2, "full")):
        alone = prune(model, ratio, compensation=compensation, criterion=name.split("-")[0], **options)
        kept = [len(entry["keep"][0]) for entry in result.records[name]["plan"]["groups"]]
        assert kept == [entry.kept for entry in alone.plan.groups]
        feed = graphs.inputs_for(model, 3, 5)
        ours = graphs.run(onnx.load(str(tmp_path / "out" / f"{name}.onnx")), feed)[0]
        np.testing.assert_allclose(ours, graphs.run(alone.model, feed)[0], rtol=1e-4, atol=1e-5)
        assert result.records[name].keys() - {"sweep"} == alone.record.keys()


def test_table_csv_and_json_hold_the_same_rows(model: onnx.ModelProto, data: Any, tmp_path: Path) -> None:
    result = sweep(model, "0.2:0.4:0.1", tmp_path / "out", calibration=data, samples=8, **PLAIN)
    names = ["l2-none-20", "l2-none-30", "l2-none-40"]
    assert sorted(os.listdir(tmp_path / "out")) == sorted(
        [f"{name}.{end}" for name in names for end in ("json", "onnx")] + ["sweep.csv", "sweep.json"]
    )
    written = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert written == json.loads(json.dumps(result.summary)) and written["finished"]
    assert [row["name"] for row in written["rows"]] == names
    table = list(csv.DictReader((tmp_path / "out" / "sweep.csv").open()))
    assert [float(row["macs_removed"]) for row in table] == pytest.approx([0.2, 0.3, 0.4], abs=0.02)
    assert json.loads((tmp_path / "out" / "l2-none-30.json").read_text())["settings"]["ratio"] == 0.3


def test_finished_runs_are_reused_until_something_they_need_changes(
    model: onnx.ModelProto, data: Any, tmp_path: Path, passes: list[int]
) -> None:
    out, said = tmp_path / "out", []
    options = {**PLAIN, "criterion": "snp", "samples": 8}
    sweep(model, [0.2, 0.3], out, calibration=data, **options)
    again = sweep(model, [0.2, 0.3, 0.4], out, calibration=data, say=said.append, **options)
    assert [row["reused"] for row in again.rows] == [True, True, False] and len(passes) == 2
    assert said[0].startswith("2 of 3 runs were finished before") and said[1].startswith("1/1 snp-none-40")
    sweep(model, [0.2, 0.3, 0.4], out, calibration=data, **options)
    assert len(passes) == 2  # nothing to do, so nothing is measured
    (out / "snp-none-20.onnx").write_bytes(b"not what was proved")
    (out / "snp-none-30.json").write_text("{")
    mended = sweep(model, [0.2, 0.3, 0.4], out, calibration=data, **options)
    assert [row["reused"] for row in mended.rows] == [False, False, True]
    for change in ({"seed": 1}, {"samples": 9}, {"scope": "ffn"}, {"calibration": {**data, "x": data["x"] + 1}}):
        other = sweep(model, [0.2], out, **{"calibration": data, **options, **change})
        assert not other.rows[0]["reused"], change


def test_a_changed_model_or_data_file_is_not_mistaken_for_the_old_one(tmp_path: Path) -> None:
    path, samples = tmp_path / "m.onnx", tmp_path / "c.npz"
    for seed in (0, 1):
        net = graphs.mlp(8, 16, 5, seed=seed)
        onnx.save(net, str(path))
        np.savez(samples, **graphs.calibration(net, 16))
        first = sweep(path, [0.5], tmp_path / "out", calibration=samples, **PLAIN)
        assert not first.rows[0]["reused"]
        assert sweep(path, [0.5], tmp_path / "out", calibration=samples, **PLAIN).rows[0]["reused"]
    os.utime(samples, (1, 1))
    assert not sweep(path, [0.5], tmp_path / "out", calibration=samples, **PLAIN).rows[0]["reused"]


def test_the_chosen_plan_is_written_and_a_stale_choice_is_not_left(
    model: onnx.ModelProto, data: Any, tmp_path: Path
) -> None:
    path, out = tmp_path / "net.onnx", tmp_path / "out"
    onnx.save(model, str(path))
    kept = sweep(path, [0.2, 0.6], out, max_drop=100, calibration=data, samples=8, **PLAIN)
    assert kept.chosen is not None and kept.chosen["name"] == "l2-none-60" and "the cheapest" in kept.verdict
    assert (out / "net.pruned.onnx").read_bytes() == (out / "l2-none-60.onnx").read_bytes()
    record = json.loads((out / "net.pruned.json").read_text())
    assert record["output"] == str(out / "net.pruned.onnx") and record["sweep"]["chosen"] == "--max-drop 100"
    rows = {row["name"]: row["lost"] for row in kept.rows}
    assert min(rows.values()) > 0
    none = sweep(path, [0.2, 0.6], out, max_drop=0, calibration=data, samples=8, **PLAIN)
    assert none.chosen is None and none.summary["output"] is None
    assert "no plan meets --max-drop 0; the closest: l2-none-20" in none.verdict
    assert not (out / "net.pruned.onnx").exists() and not (out / "net.pruned.json").exists()
    assert all(row["reused"] for row in none.rows)  # another limit is no reason to prune again


def test_a_plan_that_cannot_be_met_is_a_row_and_the_others_go_on(
    model: onnx.ModelProto, data: Any, tmp_path: Path
) -> None:
    result = sweep(model, [0.2, 0.99], tmp_path / "out", calibration=data, scope="ffn", samples=8, **PLAIN)
    good, bad = result.rows
    assert good["error"] is None and "99" in bad["error"] and bad["output"] is None
    assert not (tmp_path / "out" / "l2-none-99.onnx").exists()
    with pytest.raises(PlanError, match=r"at most .* 99.0% were asked"):
        sweep(model, [0.99], tmp_path / "out", calibration=data, scope="ffn", samples=8, **PLAIN)


def test_an_interrupted_sweep_goes_on_where_it_stopped(
    model: onnx.ModelProto, data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut, done = module.Run.cut, []

    def stopped(self: Any, *args: Any, **more: Any) -> Any:
        if done:
            raise KeyboardInterrupt
        done.append(1)
        return cut(self, *args, **more)

    monkeypatch.setattr(module.Run, "cut", stopped)
    with pytest.raises(KeyboardInterrupt):
        sweep(model, [0.2, 0.3], tmp_path / "out", calibration=data, samples=8, **PLAIN)
    half = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert not half["finished"] and [row["name"] for row in half["rows"]] == ["l2-none-20"]
    monkeypatch.setattr(module.Run, "cut", cut)
    rest = sweep(model, [0.2, 0.3], tmp_path / "out", calibration=data, samples=8, **PLAIN)
    assert [row["reused"] for row in rest.rows] == [True, False]


def test_labels_make_the_drop_one_of_accuracy(model: onnx.ModelProto, data: Any, tmp_path: Path) -> None:
    logits = graphs.run(model, data)[0]
    right = logits.reshape(len(logits), -1).argmax(axis=1)
    assert logits.ndim == 2
    result = sweep(
        model, [0.5], tmp_path / "out", calibration=data, eval_data={**data, "labels": right}, samples=8, **PLAIN
    )
    (row,) = result.rows
    assert row["top1_before"] == 100 and row["lost"] == 100 - row["top1"] and row["lost_is"] == "points of top-1"


def test_the_time_left_is_that_of_runs_of_the_same_kind() -> None:
    clock = module._Clock(["none", "full", "none", "full"])
    assert clock.left() == ""
    clock.finished(10)
    assert clock.left() == "about 30 s"
    clock.finished(300)
    assert clock.left() == "about 5 min"
    clock.finished(10)
    clock.finished(300)
    assert clock.left() == ""


def test_what_a_sweep_cannot_take_is_refused(model: onnx.ModelProto, tmp_path: Path) -> None:
    path = tmp_path / "l2-none-20.onnx"
    onnx.save(model, str(path))
    with pytest.raises(ModelError, match="overwrite the input"):
        sweep(path, [0.2], tmp_path, **PLAIN)
    with pytest.raises(ModelError, match="does not exist"):
        sweep(path, [0.2], tmp_path / "a" / "b", **PLAIN)
    with pytest.raises(PlanError, match="takes no plan"):
        sweep(path, [0.2], tmp_path / "out", plan="p.json", **PLAIN)
    with pytest.raises(PlanError, match="no ratio to sweep"):
        sweep(path, [0.2], tmp_path / "out", allocation="r.json", **PLAIN)
    assert path.stat().st_size > 0 and not (tmp_path / "out").exists()


def test_a_sweep_over_latency_measures_layers_once(
    model: onnx.ModelProto, data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[int] = []

    def timed(models: Any, progress: Any = None) -> np.ndarray:
        measured.append(len(models))
        return np.asarray([[analyse_model(one.graph.to_proto()).cost.total("macs") / 1e6 for one in models]])

    monkeypatch.setattr(pruning, "local_timer", lambda *options: timed)
    options = {**PLAIN, "of": "latency", "scope": "ffn", "calibration": data, "samples": 8}
    first = sweep(model, [0.1, 0.2], tmp_path / "out", **options)
    count = len(measured)
    assert count and all(row["error"] is None for row in first.rows)
    more = sweep(model, [0.1, 0.2, 0.3], tmp_path / "out", **options)
    assert len(measured) == count and [row["reused"] for row in more.rows] == [True, True, False]
    (table,) = (tmp_path / "out").glob("layers-*.json")
    sweep(model, [0.1], tmp_path / "out", **{**options, "scope": "ffn,qk"})
    assert len(measured) > count and table.exists()
