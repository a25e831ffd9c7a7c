"""The table of a sweep: one row of plain data per plan, the Pareto front, and the plan that meets a limit."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from onnxsnp.errors import PlanError
from onnxsnp.sweeps.points import Point

LABELLED, CHANGED = "points of top-1", "samples whose top-1 changes, percent"


@dataclass(frozen=True)
class Limits:
    """What the chosen plan has to meet; with neither, none is chosen.

    Attributes:
        max_drop: points of top-1 lost, or where there are no labels the percentage of samples whose top-1 changes (of
            which accuracy cannot lose more).
        latency: milliseconds per run (the `ms` of `compare`).
    """

    max_drop: float | None = None
    latency: float | None = None

    def __post_init__(self) -> None:
        for name, value in (("--max-drop", self.max_drop), ("--target-latency", self.latency)):
            if value is not None and not 0 <= value < float("inf"):
                raise PlanError(f"{name} must be 0 or more, got {value:g}")

    @property
    def any(self) -> bool:
        return self.max_drop is not None or self.latency is not None

    def __str__(self) -> str:
        parts = [] if self.max_drop is None else [f"--max-drop {self.max_drop:g}"]
        return " and ".join(parts + ([] if self.latency is None else [f"--target-latency {self.latency:g}"]))


def new_row(point: Point, record: Mapping[str, Any], *, reused: bool) -> dict[str, Any]:
    """A finished run as one row. `lost` is what `lost_is` says, `removed` the shares of the original that are gone."""
    accuracy, seen = record.get("accuracy"), record.get("agreement")
    latency = record.get("latency") or {}
    before, after = (accuracy or {}).get("before", {}), (accuracy or {}).get("after", {})
    row: dict[str, Any] = {
        "name": point.name,
        "ratio": point.ratio,
        "criterion": point.criterion,
        "compensation": point.compensation,
        **{what: record["after"][what] for what in ("macs", "params", "bytes")},
        **{f"{what}_removed": _removed(record, what) for what in ("macs", "params", "bytes")},
        "before_ms": latency.get("before_ms"),
        "after_ms": latency.get("after_ms"),
        "speedup": latency.get("speedup"),
        "ms": latency.get("after_ms"),
        "top1": after.get("top1"),
        "top1_before": before.get("top1"),
        "agreement": after.get("agreement", (seen or {}).get("top1")),
        "agreement_samples": after.get("count", (seen or {}).get("samples")),
        "cosine": after.get("cosine", (seen or {}).get("cosine")),
        "kl": after.get("kl", (seen or {}).get("kl")),
    }
    row["lost"], row["lost_is"] = _lost(row)
    row["lost_interval"] = _interval(row, after)
    row |= {"seconds": round(sum(record["seconds"].values()), 3), "reused": reused, "error": None}
    return row | {"output": record["output"], "pareto": False, "chosen": False}


def failed_row(point: Point, error: str) -> dict[str, Any]:
    """A plan that could not be carried out, and why."""
    return {
        "name": point.name,
        "ratio": point.ratio,
        "criterion": point.criterion,
        "compensation": point.compensation,
        "reused": False,
        "error": error,
        "output": None,
        "pareto": False,
        "chosen": False,
    }


def compare(rows: Sequence[dict[str, Any]], of: str) -> None:
    """Put times on one scale, and mark the rows that no other beats in both cost and quality (Pareto front).

    Runs are timed minutes apart, each beside the original, and machines drift in between. So `ms`, by which plans are
    compared, is the original's median time over all runs, divided by the plan's own speed-up.
    """
    done = [row for row in rows if row["error"] is None]
    times = [row["before_ms"] for row in done if row["before_ms"] is not None]
    for row in done:
        row["ms"] = median(times) / row["speedup"] if row["speedup"] else None
    for row in done:
        mine = (_cost(row, of), _quality(row))
        others = [(_cost(one, of), _quality(one)) for one in done if one is not row]
        row["pareto"] = not any(a <= mine[0] and b <= mine[1] and (a, b) != mine for a, b in others)


def choose(rows: Sequence[dict[str, Any]], limits: Limits, of: str) -> dict[str, Any] | None:
    """The cheapest plan that loses no more than `max_drop`; with a latency to meet, the most accurate that meets all.

    Raises:
        PlanError: what a limit is about was not measured.
    """
    done = [row for row in rows if row["error"] is None]
    if not limits.any or not done:
        return None
    if limits.max_drop is not None and any(row["lost"] is None for row in done):
        raise PlanError("--max-drop: the model has no logits to tell classes by", hint="leave it out")
    if limits.latency is not None and any(row["ms"] is None for row in done):
        raise PlanError("--target-latency: latency was not measured", hint="leave --no-latency out")
    fit = [row for row in done if _over(row, limits) == (0.0, 0.0)]
    by_quality = limits.latency is not None

    def order(row: dict[str, Any]) -> tuple[Any, Any]:
        return (_quality(row), _cost(row, of)) if by_quality else (_cost(row, of), _quality(row))

    return min(fit, key=order, default=None)


def closest(rows: Sequence[dict[str, Any]], limits: Limits) -> dict[str, Any] | None:
    """Where no plan meets the limits, the one that misses them least (both as shares of the limit)."""
    done = [row for row in rows if row["error"] is None]
    drop, latency = (max(limit or 0.0, 1e-9) for limit in (limits.max_drop, limits.latency))
    return min(done, key=lambda row: max(_over(row, limits)[0] / drop, _over(row, limits)[1] / latency), default=None)


def to_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as CSV; empty where something was not measured."""
    names = list(dict.fromkeys(name for row in rows for name in row if name != "lost_interval"))
    names += ["lost_low", "lost_high"]
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        low, high = row.get("lost_interval") or (None, None)
        plain = {name: value for name, value in row.items() if name != "lost_interval"}
        writer.writerow(plain | {"lost_low": low, "lost_high": high})
    return text.getvalue()


def _removed(record: Mapping[str, Any], what: str) -> float | None:
    before, after = record["before"][what], record["after"][what]
    return None if not before or after is None else 1 - after / before


def _lost(row: Mapping[str, Any]) -> tuple[float | None, str | None]:
    if row["top1"] is not None and row["top1_before"] is not None:
        return row["top1_before"] - row["top1"], LABELLED
    return (None, None) if row["agreement"] is None else (100 - row["agreement"], CHANGED)


def _interval(row: Mapping[str, Any], after: Mapping[str, Any]) -> list[float] | None:
    """95 % interval of `lost`, where it comes from labelled data."""
    paired = after.get("paired")
    if row["lost_is"] != LABELLED or paired is None:
        return None
    low, high = paired["difference_interval"]
    return [-high, -low]


def _cost(row: Mapping[str, Any], of: str) -> float:
    measured = row["ms"] if of == "latency" else row[of]
    return float(row["macs"] if measured is None else measured)


def _quality(row: Mapping[str, Any]) -> tuple[float, float, float]:
    """Less is better: points lost, then divergence, then distance of the outputs."""
    return (row["lost"] or 0.0, row["kl"] or 0.0, -(row["cosine"] or 0.0))


def _over(row: Mapping[str, Any], limits: Limits) -> tuple[float, float]:
    """By how much a row misses each limit; 0 where it meets it."""
    drop = 0.0 if limits.max_drop is None else max(0.0, row["lost"] - limits.max_drop - 1e-9)
    return drop, 0.0 if limits.latency is None else max(0.0, row["ms"] - limits.latency)
