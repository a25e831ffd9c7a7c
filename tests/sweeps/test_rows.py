"""The table of a sweep: the front, the choice, and the plan that comes closest."""

from __future__ import annotations

import csv
import io
from typing import Any

import pytest

from onnxsnp.errors import PlanError
from onnxsnp.sweeps.points import Point
from onnxsnp.sweeps.rows import CHANGED, LABELLED, Limits, choose, closest, compare, failed_row, new_row, to_csv


def record(macs: int, lost: float | None = None, *, speedup: float = 2.0, before: float = 10.0, **more: Any) -> Any:
    """A run record of a model of 100 MACs that has 80 % top-1."""
    accuracy = {
        "before": {"top1": 80.0},
        "after": {"top1": 80.0 - (lost or 0), "agreement": 90.0, "count": 50, "kl": 0.1, "cosine": 0.9},
    }
    return {
        "before": {"macs": 100, "params": 100, "bytes": 1000},
        "after": {"macs": macs, "params": macs, "bytes": 10 * macs},
        "latency": {"before_ms": before, "after_ms": before / speedup, "speedup": speedup},
        "accuracy": accuracy if lost is not None else None,
        "agreement": {"top1": 75.0, "samples": 32, "kl": 0.2, "cosine": 0.8},
        "seconds": {"cut": 1.0, "write": 0.5},
        "output": f"{macs}.onnx",
    } | more


def rows(*records: Any, of: str = "macs") -> list[dict[str, Any]]:
    found = [new_row(Point(number / 10 + 0.1, "snp", "full"), one, reused=False) for number, one in enumerate(records)]
    compare(found, of)
    return found


def test_a_row_says_what_is_lost_and_by_which_measure() -> None:
    labelled, bare, silent = rows(record(60, 2.5), record(60), record(60, agreement=None))
    assert (labelled["lost"], labelled["lost_is"]) == (2.5, LABELLED) and labelled["macs_removed"] == pytest.approx(0.4)
    assert (bare["lost"], bare["lost_is"], bare["agreement_samples"]) == (25.0, CHANGED, 32)
    assert silent["lost"] is None and silent["seconds"] == 1.5


def test_the_front_holds_what_no_other_beats_in_both() -> None:
    found = rows(record(90, 1.0), record(60, 2.0), record(70, 3.0), record(30, 9.0))
    assert [row["pareto"] for row in found] == [True, True, False, True]


def test_times_from_a_machine_that_drifts_are_put_on_one_scale() -> None:
    found = rows(record(80, 1.0, before=10.0, speedup=1.25), record(40, 5.0, before=30.0, speedup=2.5))
    assert found[1]["after_ms"] > found[0]["after_ms"]  # measured while the machine was three times as slow
    assert [row["ms"] for row in found] == pytest.approx([16.0, 8.0])


def test_a_drop_allows_the_cheapest_and_a_latency_the_most_accurate() -> None:
    found = rows(record(90, 0.5, speedup=1.1), record(60, 1.0, speedup=1.6), record(30, 4.0, speedup=3.0))
    assert choose(found, Limits(max_drop=1.0), "macs") is found[1]
    assert choose(found, Limits(latency=7.0), "macs") is found[1]
    assert choose(found, Limits(max_drop=5.0, latency=5.0), "macs") is found[2]
    assert choose(found, Limits(max_drop=0.6, latency=7.0), "macs") is None
    assert choose(found, Limits(), "macs") is None


def test_cheapest_is_by_the_cost_that_was_asked_for() -> None:
    small, fast = rows(record(50, 1.0, speedup=1.2), record(60, 1.0, speedup=2.0), of="latency")
    assert choose([small, fast], Limits(max_drop=1), "macs") is small
    assert choose([small, fast], Limits(max_drop=1), "latency") is fast


def test_where_none_meets_the_limits_the_closest_is_named() -> None:
    found = rows(record(90, 2.0, speedup=1.1), record(60, 3.0, speedup=1.6), record(30, 9.0, speedup=3.0))
    limits = Limits(max_drop=1.5, latency=5.0)
    assert choose(found, limits, "macs") is None
    assert closest(found, limits) is found[0]  # misses the drop by a third, and the latency by less than the others
    assert str(limits) == "--max-drop 1.5 and --target-latency 5"


def test_a_limit_on_what_was_not_measured_is_refused() -> None:
    with pytest.raises(PlanError, match="no logits"):
        choose(rows(record(60, agreement=None)), Limits(max_drop=1), "macs")
    with pytest.raises(PlanError, match="latency was not measured"):
        choose(rows(record(60, 1.0, latency=None)), Limits(latency=1), "macs")
    with pytest.raises(PlanError, match="must be 0 or more"):
        Limits(max_drop=-1)


def test_failed_plans_are_in_the_table_and_never_chosen() -> None:
    found = [*rows(record(60, 1.0)), failed_row(Point(0.9, "snp", "full"), "cannot be met")]
    compare(found, "macs")
    assert choose(found, Limits(max_drop=2), "macs") is found[0]
    read = list(csv.DictReader(io.StringIO(to_csv(found))))
    assert [line["error"] for line in read] == ["", "cannot be met"]
    assert float(read[0]["lost"]) == 1.0 and read[1]["macs"] == ""
