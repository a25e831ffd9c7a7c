"""Why each group got its width: error curves and score distributions, small enough for the run record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from onnxsnp.graph.groups import Group
from onnxsnp.planning.plan import GroupPlan

POINTS = 33  # of an error curve
BINS = 24  # of a distribution
_WIDE = 50  # scores that span more than this factor between their deciles are counted on a logarithmic scale


def evidence(
    group: Group, entry: GroupPlan | None, curve: np.ndarray | None, scores: np.ndarray | None, loss: float | None
) -> dict[str, Any]:
    """What the record says about one group.

    Args:
        entry: what stays of it; None where all of it does.
        curve: squared error at the group's own output by width, [size + 1] (nan where there is none).
        scores: of the criterion, [heads, size]; None where something else decided.
        loss: of the model's outputs where the group alone was cut (see `Allocation.sensitivity`).

    Returns:
        Plain data: `curve` {width, error}, `scores` (see `histogram`), `sensitivity`, `reasons`; only what there is.
    """
    found: dict[str, Any] = {"reasons": list(group.reasons)} if group.reasons else {}
    if curve is not None:
        found["curve"] = thinned(curve, group.size if entry is None else entry.kept)
    if scores is not None and entry is not None:
        found["scores"] = histogram(scores, entry.keep)
    if loss is not None and np.isfinite(loss):
        found["sensitivity"] = float(loss)
    return found


def thinned(curve: np.ndarray, kept: int) -> dict[str, list[float]]:
    """At most `POINTS` + 1 points of an error curve, the chosen width among them; what is not finite is left out.

    Args:
        curve: [size + 1], by width.
    """
    finite = np.flatnonzero(np.isfinite(curve))
    places = finite[np.unique(np.linspace(0, len(finite) - 1, min(POINTS, len(finite))).round().astype(int))]
    if kept in finite:
        places = np.union1d(places, [kept])
    return {"width": places.tolist(), "error": [float(f"{curve[place]:.6g}") for place in places]}


def histogram(scores: np.ndarray, keep: Sequence[Sequence[int]]) -> dict[str, Any]:
    """How the scores of what stays and of what goes are distributed over common bins.

    Args:
        scores: [heads, size].
        keep: per head, the indices that stay.

    Returns:
        low, high: ends of the bins, of log₁₀ of the score where `log` is true (zeros count as the smallest score);
        kept, cut: how many of each bin.
    """
    stays = np.zeros(scores.shape, bool)
    for head, indices in enumerate(keep):
        stays[head, list(indices)] = True
    values = np.where(np.isfinite(scores), scores, 0.0)
    positive = values[values > 0]
    low, high = np.quantile(positive, [0.1, 0.9]) if positive.size else (0.0, 0.0)
    log = bool(positive.size and values.min() >= 0 and high > _WIDE * low)
    if log:
        values = np.log10(np.maximum(values, positive.min()))
    ends = float(values.min()), float(values.max())
    kept, cut = (np.histogram(values[which], BINS, ends)[0].tolist() for which in (stays, ~stays))
    return {"low": ends[0], "high": ends[1], "log": log, "kept": kept, "cut": cut}


def left_alone(skipped: Sequence[Mapping[str, str]], limit: int = 300) -> list[dict[str, str]]:
    """What was not understood or must stay, with node and reason; the same reason at the same node once."""
    found = {(item["node"], item["reason"]): dict(item) for item in skipped}
    return list(found.values())[:limit]
