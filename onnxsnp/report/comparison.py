"""Several runs side by side: quality against what is left of the cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from onnxsnp.report.charts import Plotter, front
from onnxsnp.report.summary import interval, share


def compared(runs: Sequence[Mapping[str, Any]], names: Sequence[str], plotter: Plotter, safe: Any) -> dict[str, Any]:
    """Several runs side by side: a table, and quality against MACs and against latency."""
    points = [_point(run, name) for run, name in zip(runs, names, strict=True)]
    measured = all(point["accuracy"] is not None for point in points)
    which, up = ("accuracy", "top-1 accuracy, %") if measured else ("agreement", "same top-1 as the original, %")
    plots = []
    for key, across in (("macs", "multiply–accumulates left, %"), ("latency", "latency, % of the original's")):
        mine = [
            {"name": one["name"], "x": one[key], "y": one[which][0], "interval": one[which][1]}
            for one in points
            if one[key] is not None and one[which] is not None
        ]
        if len(mine) > 1:
            title = f"{up.partition(',')[0]} against {'latency' if key == 'latency' else 'MACs'}"
            plots.append({"title": title, "svg": safe(plotter.tradeoff(mine, across, up))})
    best = front([(one["macs"], one[which][0] if one[which] else 0.0) for one in points])
    sources = {str(run.get("input")) for run in runs}
    note = f"These runs are of {len(sources)} different models." if len(sources) > 1 else ""
    return {"points": points, "plots": plots, "front": sorted(best), "note": note, "measured": measured}


def _point(run: Mapping[str, Any], name: str) -> dict[str, Any]:
    latency, settings = run.get("latency"), run["settings"]
    accuracy = (run.get("accuracy") or {}).get("after") or {}
    agreed = run.get("agreement") or {}

    def measured(value: float | None, samples: int) -> Any:
        return None if value is None else (value, interval(value, samples))

    return {
        "name": name,
        "method": ", ".join(str(settings[key]) for key in ("compensation", "criterion") if settings.get(key)),
        "ratio": settings.get("ratio"),
        "macs": 100 * share(run["after"]["macs"], run["before"]["macs"]),
        "params": 100 * share(run["after"]["params"], run["before"]["params"]),
        "latency": 100 / latency["speedup"] if latency else None,
        "accuracy": measured(accuracy.get("top1"), accuracy.get("count", 0)),
        "agreement": measured(agreed.get("top1"), agreed.get("samples", 0)),
        "kl": agreed.get("kl"),
    }
