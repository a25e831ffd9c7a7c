"""The latency of a cut model beside the original's, and whether it is what was planned."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from onnxsnp.analysis import Analysis
from onnxsnp.evaluation.latency import compare_latency, machine
from onnxsnp.surgery.apply import Applied

_OFF = 0.05  # of the latency: how far a measured saving may be from the one asked for without a note


def time_both(
    analysis: Analysis,
    applied: Applied,
    feed: Mapping[str, np.ndarray],
    *,
    asked: float,
    threads: int | None,
    provider: str,
    progress: Callable[[int, int], None],
) -> tuple[dict[str, Any], str]:
    """Time original and cut model side by side.

    Args:
        feed: inputs of one run.
        asked: share of the latency that was to be saved, where latency was what was planned.

    Returns:
        What was found, as plain data for JSON, and a note (empty if there is nothing to say).
    """
    here = machine(threads, provider)
    sessions = [graph.timed_session(threads=threads, provider=provider) for graph in (analysis.original, applied.graph)]
    found = compare_latency(sessions, feed, progress=progress)
    result = {**found, "machine": here}
    planned = analysis.cost.latency
    if planned is None:
        return result, ""
    sizes = {cut.atom: cut.keep.shape[1] for cut in applied.cuts}
    expected = 1 - analysis.cost.total("latency", sizes) / analysis.cost.total("latency")
    result["expected_speedup"] = 1 / (1 - expected)
    got = 1 - 1 / found["speedup"]
    if planned.machine != here:
        return result, f"latency was planned for {planned.machine}, and measured on {here}"
    if abs(got - asked) > _OFF:
        said = f"{asked:.1%} of the latency were asked"
        return result, f"{said}, the table expected {expected:.1%}, measured are {got:.1%}"
    return result, ""
