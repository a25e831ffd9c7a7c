"""Recovery as a whole, on small models: what it changes, what it keeps, how it stops and goes on."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import graphs
import numpy as np
import onnx
import pytest

import onnxsnp
from onnxsnp.errors import DataError, ModelError, OnnxSnpError, PlanError
from onnxsnp.graph.precision import BRAIN, is_float
from onnxsnp.recovery.loop import Outcome, Point
from onnxsnp.recovery.recover import recover
from onnxsnp.recovery.schedule import Schedule
from onnxsnp.recovery.student import Judgement

RATE = 5e-3
SHORT: dict[str, Any] = {"steps": 20, "batch": 8, "threads": 1, "learning_rate": RATE}


def shaken(model: onnx.ModelProto, share: float = 0.2, seed: int = 1) -> onnx.ModelProto:
    """The same model with noise on its matrices: something to recover."""
    rng = np.random.default_rng(seed)
    return graphs.set_weights(
        model,
        {
            name: (array + share * array.astype(float).std() * rng.standard_normal(array.shape)).astype(array.dtype)
            for name, array in graphs.initializers(model).items()
            if is_float(array.dtype) and array.ndim > 1
        },
    )


@pytest.fixture(scope="module")
def teacher() -> onnx.ModelProto:
    return graphs.transformer()


@pytest.fixture(scope="module")
def data(teacher: onnx.ModelProto) -> dict[str, np.ndarray]:
    return graphs.calibration(teacher, 96)


def test_losses_fall_and_only_initializers_change(teacher: onnx.ModelProto, data: dict[str, np.ndarray]) -> None:
    pruned = shaken(teacher)
    result = recover(pruned, teacher, calibration=data, **SHORT)
    found = result.record["recovery"]
    assert found["after"]["loss"] < 0.8 * found["before"]["loss"] and found["best_step"] > 0
    assert found["curve"][-1]["training"] < found["curve"][1]["training"]
    assert found["after"]["hidden"] < found["before"]["hidden"] and len(found["compared"]) == 3
    fresh = graphs.inputs_for(teacher, 64, seed=99)
    want, before, after = (graphs.run(model, fresh)[0] for model in (teacher, pruned, result.model))
    assert np.square(after - want).mean() < 0.8 * np.square(before - want).mean()
    _only_values_differ(pruned, result.model)


def _only_values_differ(first: onnx.ModelProto, second: onnx.ModelProto | None) -> None:
    assert second is not None
    ours, theirs = (graphs.initializers(model) for model in (first, second))
    assert [(n, a.dtype, a.shape) for n, a in ours.items()] == [(n, a.dtype, a.shape) for n, a in theirs.items()]
    assert any(not np.array_equal(ours[name], theirs[name]) for name in ours)
    shells = []
    for model in (first, second):
        shell = onnx.ModelProto.FromString(model.SerializeToString())
        del shell.graph.initializer[:]
        shells.append(shell.SerializeToString(deterministic=True))
    assert shells[0] == shells[1]


def test_a_start_that_cannot_be_improved_is_what_is_written(
    teacher: onnx.ModelProto, data: dict[str, np.ndarray], tmp_path: Path
) -> None:
    pruned = shaken(teacher, 0.02)
    result = recover(pruned, teacher, calibration=data, output=tmp_path / "o.onnx", **{**SHORT, "learning_rate": 1.0})
    found = result.record["recovery"]
    assert found["best_step"] == 0 and found["after"] == found["before"]
    assert any("no state was better" in note for note in found["notes"])
    ours, written = graphs.initializers(pruned), graphs.initializers(onnx.load(str(tmp_path / "o.onnx")))
    assert all(np.array_equal(ours[name], written[name]) for name in ours)


def test_the_best_state_is_what_is_written(teacher: onnx.ModelProto, data: dict[str, np.ndarray]) -> None:
    """A rate that first helps and then destroys: the point that is kept is not the last, and the model is that one."""
    options = {**SHORT, "learning_rate": 0.15, "steps": 40}
    result = recover(shaken(teacher, 0.6), teacher, calibration=data, **options)
    found = result.record["recovery"]
    losses = [point["held"]["loss"] for point in found["curve"]]
    best = int(np.argmin(losses))
    assert found["best_step"] == found["curve"][best]["step"] and found["after"]["loss"] == min(losses)
    again = recover(result.model, teacher, calibration=data, **{**options, "steps": 1})
    assert again.record["recovery"]["before"]["loss"] == pytest.approx(min(losses), rel=1e-4)


def test_a_seed_gives_one_file(teacher: onnx.ModelProto, data: dict[str, np.ndarray], tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("a.onnx", "b.onnx", "c.onnx")]
    for path, seed in zip(files, (0, 0, 1), strict=True):
        recover(shaken(teacher), teacher, calibration=data, output=path, seed=seed, **SHORT)
    assert files[0].read_bytes() == files[1].read_bytes() != files[2].read_bytes()


def test_an_interrupt_keeps_the_best_and_a_resumed_run_ends_where_an_unbroken_one_does(
    teacher: onnx.ModelProto, data: dict[str, np.ndarray], tmp_path: Path
) -> None:
    whole, parts = tmp_path / "whole.onnx", tmp_path / "parts.onnx"
    recover(shaken(teacher), teacher, calibration=data, output=whole, **SHORT)
    lines: list[str] = []

    def say(line: str) -> None:
        lines.append(line)
        if len(lines) == 8:
            raise KeyboardInterrupt

    first = recover(shaken(teacher), teacher, calibration=data, output=parts, say=say, **SHORT).record["recovery"]
    assert first["interrupted"] and first["steps"] < 20 and first["after"]["loss"] < first["before"]["loss"]
    assert any("--resume" in note for note in first["notes"])
    assert parts.is_file() and (tmp_path / "parts.recovery.npz").is_file()
    assert whole.read_bytes() != parts.read_bytes()
    second = recover(shaken(teacher), teacher, calibration=data, output=parts, resume=True, **SHORT).record["recovery"]
    assert not second["interrupted"] and [point["step"] for point in second["curve"]] == list(range(21))
    assert whole.read_bytes() == parts.read_bytes()
    assert not list(tmp_path.glob("*.npz")) and not list(tmp_path.glob(".*"))


def test_a_run_cannot_be_resumed_with_other_options(
    teacher: onnx.ModelProto, data: dict[str, np.ndarray], tmp_path: Path
) -> None:
    path = tmp_path / "o.onnx"
    with pytest.raises(PlanError, match="nothing to resume"):
        recover(shaken(teacher), teacher, calibration=data, output=path, resume=True, **SHORT)
    stop = iter([False] * 6 + [True] * 20)

    def say(line: str) -> None:
        if next(stop):
            raise KeyboardInterrupt

    recover(shaken(teacher), teacher, calibration=data, output=path, say=say, **SHORT)
    with pytest.raises(PlanError, match="another learning_rate"):
        recover(
            shaken(teacher), teacher, calibration=data, output=path, resume=True, **{**SHORT, "learning_rate": 1e-4}
        )
    with pytest.raises(PlanError, match="another pruned"):
        recover(shaken(teacher, seed=5), teacher, calibration=data, output=path, resume=True, **SHORT)


def test_a_time_budget_is_kept(teacher: onnx.ModelProto, data: dict[str, np.ndarray]) -> None:
    found = recover(shaken(teacher), teacher, calibration=data, minutes=0.02, threads=1, batch=8).record["recovery"]
    assert found["steps"] == found["planned_steps"] > 20 and found["seconds"] < 10


def test_a_step_may_take_several_runs(data: dict[str, np.ndarray]) -> None:
    """A model that takes one sample at a time learns from batches all the same, and as a free one does."""
    free, fixed = graphs.transformer(), graphs.transformer(batch=1)
    found = [recover(shaken(one), one, calibration=data, **SHORT).record["recovery"] for one in (free, fixed)]
    assert found[1]["batch"] == 8 and found[0]["passes"] == found[1]["passes"]
    assert found[1]["after"]["loss"] < 0.8 * found[1]["before"]["loss"]


@pytest.mark.parametrize("name", ["format_half_vit.onnx", "format_bfloat_vit.onnx"])
def test_half_precision_stays_what_it_is(name: str, exports: Path) -> None:
    model = onnx.load(str(exports / "families" / name))
    feeds = {
        key: value.astype(np.float32) if value.dtype == BRAIN else value
        for key, value in graphs.inputs_for(model, 24).items()
    }
    pruned = shaken(model)
    assert {array.dtype for array in graphs.initializers(pruned).values()} & {np.dtype(np.float16), BRAIN}
    result = recover(pruned, model, calibration=feeds, **{**SHORT, "batch": 4})
    assert result.record["recovery"]["after"]["loss"] < result.record["recovery"]["before"]["loss"]
    _only_values_differ(pruned, result.model)


def test_a_token_model_is_recovered_without_variants(exports: Path) -> None:
    model = onnx.load(str(exports / "families" / "format_onnxslim_bert.onnx"))
    feeds = graphs.inputs_for(model, 32, sequence=6)
    feeds["attention_mask"][:] = 1
    feeds["token_type_ids"] %= 2
    found = recover(shaken(model), model, calibration=feeds, **SHORT).record["recovery"]
    assert not found["augmented"] and found["after"]["loss"] < found["before"]["loss"]


def test_images_are_varied_unless_it_is_left_out(exports: Path) -> None:
    model = onnx.load(str(exports / "timm_deit_sdpa_ts17_dyn.onnx"))
    feeds = graphs.inputs_for(model, 32)
    options = {**SHORT, "steps": 3}
    varied, plain = (recover(shaken(model), model, calibration=feeds, augment=one, **options) for one in (True, False))
    assert varied.record["recovery"]["augmented"] and not plain.record["recovery"]["augmented"]
    ours, theirs = (one.record["recovery"]["curve"] for one in (varied, plain))
    assert ours[0]["held"] == theirs[0]["held"] and ours[1]["training"] != theirs[1]["training"]


def test_a_narrower_stream_is_left_out_with_the_reason(data: dict[str, np.ndarray]) -> None:
    wide, narrow = graphs.transformer(), graphs.transformer(width=10, seed=4)
    found = recover(narrow, wide, calibration=data, **SHORT).record["recovery"]
    assert len(found["left_out"]) == 2 and len(found["compared"]) == 1
    assert all("10" in reason and "12" in reason for reason in found["left_out"].values())
    assert sum("was not compared" in note for note in found["notes"]) == 2
    assert found["before"]["hidden"] is None and found["after"]["loss"] < found["before"]["loss"]


def test_bad_input_is_one_line(teacher: onnx.ModelProto, data: dict[str, np.ndarray], tmp_path: Path) -> None:
    few = {name: array[:3] for name, array in data.items()}
    other = graphs.transformer(classes=7)
    narrow = {name: array[..., :3] for name, array in data.items()}
    cases: list[tuple[type[OnnxSnpError], str, Any, Any, Any]] = [
        (DataError, "learns from real data", teacher, teacher, None),
        (DataError, "at least 4 samples", teacher, teacher, few),
        (DataError, "shape|size|fit", teacher, teacher, narrow),
        (ModelError, "output 'y' cannot be learnt", other, teacher, data),
        (ModelError, "no such model file", tmp_path / "no.onnx", teacher, data),
        (PlanError, "no teacher was given", teacher, None, data),
    ]
    for kind, reason, pruned, original, given in cases:
        with pytest.raises(kind, match=reason) as error:
            recover(pruned, original, calibration=given, **SHORT)
        assert "\n" not in str(error.value)


def test_the_original_is_found_by_the_run_record(exports: Path, tmp_path: Path) -> None:
    shutil.copyfile(exports / "timm_deit_sdpa_ts17_dyn.onnx", tmp_path / "net.onnx")
    pruned = tmp_path / "p.onnx"
    options: dict[str, Any] = {"compensation": "none", "latency": False, "threads": 1, "samples": 8}
    feeds = graphs.inputs_for(onnx.load(str(tmp_path / "net.onnx")), 32)
    onnxsnp.prune(tmp_path / "net.onnx", 0.3, calibration=feeds, output=pruned, **options)
    result = onnxsnp.recover(pruned, calibration=feeds, output=tmp_path / "r.onnx", **SHORT)
    assert result.record["recovery"]["after"]["loss"] < result.record["recovery"]["before"]["loss"]
    assert result.record["plan"]["groups"] and result.record["input"].endswith("net.onnx")
    again = onnxsnp.recover(tmp_path / "r.onnx", calibration=feeds, **{**SHORT, "steps": 1})  # found through its record
    start, end = again.record["recovery"]["before"]["loss"], result.record["recovery"]["after"]["loss"]
    assert start == pytest.approx(end, rel=1e-4)
    (tmp_path / "p.json").unlink()
    with pytest.raises(PlanError, match="has no run record"):
        onnxsnp.recover(pruned, calibration=feeds, **SHORT)
    (tmp_path / "net.onnx").unlink()
    with pytest.raises(PlanError, match=r"net\.onnx is gone.*--teacher"):
        onnxsnp.recover(tmp_path / "r.onnx", calibration=feeds, **SHORT)


def test_prune_can_recover_in_one_go(exports: Path, tmp_path: Path) -> None:
    model = onnx.load(str(exports / "timm_deit_sdpa_ts17_dyn.onnx"))
    feeds = graphs.inputs_for(model, 64)
    lines: list[str] = []
    result = onnxsnp.prune(
        model,
        0.4,
        calibration=feeds,
        samples=16,
        latency=False,
        threads=1,
        output=tmp_path / "o.onnx",
        recover="3s",
        say=lines.append,
        eval_data={**feeds, "labels": np.arange(64) % 3},
    )
    record = result.record
    assert record["recovery"]["samples"] + record["recovery"]["held_back"] == 64 - record["agreement"]["samples"]
    assert list(record["accuracy"]) == ["before", "compensated", "after"]
    assert record["verification"]["masked_equality"] < 1e-4
    assert record["recovery"]["after"]["loss"] <= record["recovery"]["before"]["loss"] and len(lines) > 3
    assert record["seconds"]["recover"] > 0
    plain = onnxsnp.prune(model, plan=result.plan, calibration=feeds, samples=16, latency=False, threads=1)
    _only_values_differ(plain.model, onnx.load(str(tmp_path / "o.onnx")))


def test_prune_refuses_what_it_could_not_recover_with() -> None:
    for options, reason in (({"recover": "soon", "calibration": [1]}, "duration"), ({"recover": "1m"}, "real data")):
        with pytest.raises(PlanError, match=reason):
            onnxsnp.prune(graphs.transformer(), 0.3, **options)
    with pytest.raises(PlanError, match="read once"):
        onnxsnp.prune(graphs.transformer(), 0.3, recover=1, calibration=iter([]))


def test_learning_by_heart_is_noticed() -> None:
    def outcome(training: list[float | None], held: list[float], best: int) -> Outcome:
        points = [
            Point(step, 0.0, mine, Judgement(other, None, {}, None))
            for step, (mine, other) in enumerate(zip(training, held, strict=True))
        ]
        return Outcome(points, best, Schedule(3, 1.0), 1.0, False)

    assert outcome([None, 3.0, 2.0, 1.0], [3.0, 2.0, 2.1, 2.3], 1).more_images
    assert not outcome([None, 3.0, 2.0, 1.0], [3.0, 2.0, 1.9, 1.8], 3).more_images
    assert not outcome([None, 3.0, 3.1, 3.2], [3.0, 2.0, 2.1, 2.3], 1).more_images
