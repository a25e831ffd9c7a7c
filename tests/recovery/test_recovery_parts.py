"""Feed, schedule, durations and checkpoint of a recovery."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from onnxsnp.calibration.data import open_dataset
from onnxsnp.errors import DataError, PlanError
from onnxsnp.recovery import checkpoint
from onnxsnp.recovery.feed import Feed, held_back
from onnxsnp.recovery.options import RecoverOptions, minutes
from onnxsnp.recovery.schedule import Schedule
from onnxsnp.runtime import InputSpec


def feed(samples: int, size: int, seed: int = 0, batch: str | int = "N") -> Feed:
    values = np.arange(samples, dtype=np.float32).reshape(-1, 1)
    spec = InputSpec("x", (batch, 1), np.dtype(np.float32))
    return Feed(open_dataset(values, [spec], batch_size=4, seed=0, pad_last=True), size, seed)


def test_a_tenth_is_held_back_within_bounds() -> None:
    assert [held_back(count) for count in (4, 40, 200, 600, 10_000)] == [1, 10, 32, 60, 128]
    with pytest.raises(DataError, match="at least 4 samples"):
        held_back(3)


def test_what_is_held_back_is_never_learnt_from_and_every_pass_mixes_anew() -> None:
    data = feed(44, 8)
    held = np.concatenate([batch.inputs["x"][: batch.count, 0] for batch in data.held()])
    assert len(held) == 11 and len(set(held)) == 11
    assert all(len(batch.inputs["x"]) == 8 for batch in data.held())
    taken = list(islice(data.batches(), 8))  # two passes of 33 // 8 batches
    passes = [np.concatenate([inputs["x"][:, 0] for place, inputs in taken if place[0] == one]) for one in (0, 1)]
    assert [place for place, _ in taken] == [(one, two) for one in (0, 1) for two in (1, 2, 3, 4)]
    assert all(len(set(one)) == 32 and not set(one) & set(held) for one in passes)
    assert not np.array_equal(*passes)


def test_batches_go_on_from_a_place() -> None:
    whole = list(islice(feed(44, 8).batches(), 9))
    for (place, _), follows in zip(whole, range(1, 9), strict=False):
        _, inputs = next(feed(44, 8).batches(*place))
        assert np.array_equal(inputs["x"], whole[follows][1]["x"])


def test_a_fixed_batch_is_filled() -> None:
    data = feed(20, 8, batch=8)
    assert [batch.count for batch in data.held()] == [5]
    assert all(len(inputs["x"]) == 8 for _, inputs in islice(data.batches(), 3))
    with pytest.raises(DataError, match="a batch takes 8 samples"):
        feed(9, 8, batch=8)


def test_the_rate_rises_and_falls_over_the_steps() -> None:
    schedule, rates = Schedule(100, 1e-3), []
    for _ in range(100):
        rates.append(schedule.rate)
        schedule.advance()
    top = int(np.argmax(rates))
    assert 20 < top < 40 and max(rates) == pytest.approx(1e-3, rel=1e-2)
    assert rates[0] == pytest.approx(1e-3 / 25, rel=1e-3) and rates[-1] < 1e-5
    assert np.all(np.diff(rates[top:]) < 0) and schedule.place == pytest.approx(1)


@pytest.mark.parametrize(("pace", "steps"), [(2.0, 55), (0.5, 190), (1.05, 100)])
def test_steps_are_set_anew_where_time_or_too_much_of_it_is_left(pace: float, steps: int) -> None:
    """After 10 of 100 steps with 90 s left: at 2 s per step 45 more, at half a second 180, within a tenth the same."""
    schedule = Schedule(100, 1.0)
    for _ in range(10):
        schedule.advance()
    place = schedule.place
    schedule.fit(pace, 90)
    assert schedule.steps == steps and schedule.place == place and schedule.changed == (steps != 100)
    while schedule.done < schedule.steps:
        schedule.advance()
    assert schedule.place == pytest.approx(1)


@pytest.mark.parametrize(
    ("text", "value"), [("10m", 10), ("90s", 1.5), ("1h", 60), ("2.5", 2.5), (3, 3), ("1.5 M", 1.5)]
)
def test_durations(text: str, value: float) -> None:
    assert minutes(text) == value


@pytest.mark.parametrize("text", ["", "m", "ten", "-5m", "0", "5d", "1h30m", "nan"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(PlanError, match="10m, 90s or 1h"):
        minutes(text)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"minutes": 0.0}, "minutes must be"),
        ({"minutes": float("nan")}, "minutes must be"),
        ({"learning_rate": -1.0}, "learning rate must be"),
        ({"steps": 0}, "steps must be"),
        ({"batch": 0}, "batch must be"),
        ({"calibration": None}, "learns from real data"),
    ],
)
def test_options_out_of_range(options: dict[str, float], reason: str) -> None:
    with pytest.raises((PlanError, DataError), match=reason):
        RecoverOptions(**{"calibration": [1], **options}).check()


def test_a_checkpoint_comes_back_and_only_for_its_own_run(tmp_path: Path) -> None:
    path = tmp_path / "state.npz"
    arrays = {"now": {"a b": np.eye(3, dtype=np.float32), "ü": np.zeros(0, np.float32)}, "best": {}}
    checkpoint.write(path, {"seed": 1, "pruned": "x"}, {"step": 7}, arrays)
    saved = checkpoint.read(path, {"seed": 1, "pruned": "x"})
    assert saved.progress == {"step": 7} and list(saved.arrays["now"]) == ["a b", "ü"]
    assert np.array_equal(saved.arrays["now"]["a b"], np.eye(3)) and saved.arrays["best"] == {}
    with pytest.raises(PlanError, match="another seed: 1 instead of 2"):
        checkpoint.read(path, {"seed": 2, "pruned": "x"})
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(PlanError, match="damaged"):
        checkpoint.read(path, {"seed": 1})
    with pytest.raises(PlanError, match="nothing to resume"):
        checkpoint.read(tmp_path / "none.npz", {})
