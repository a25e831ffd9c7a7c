"""The run record: what `onnxsnp prune` says about a run, as plain data for JSON."""

from __future__ import annotations

from typing import Any

from onnxsnp._version import __version__
from onnxsnp.analysis import Analysis, inspect
from onnxsnp.calibration.data import Dataset
from onnxsnp.deploy.fusion import fused_attention
from onnxsnp.options import Options
from onnxsnp.planning.evidence import left_alone
from onnxsnp.planning.plan import Plan, as_cuts


def settings(options: Options, data: Dataset) -> dict[str, Any]:
    """How a plan was made."""
    scope = options.scope if options.scope is None or isinstance(options.scope, str) else ",".join(options.scope)
    return {
        "ratio": options.ratio,
        "allocation": options.allocation,
        "of": options.of,
        "latency_table": None if options.latency_table is None else str(options.latency_table),
        "host": options.host,
        "scope": scope,
        "criterion": options.criterion,
        "compensation": options.compensation,
        "rank": options.rank,
        "samples": options.fit_samples,
        "calibration": data.description,
        "multiple_of": options.multiple,
        "seed": options.seed,
        "version": __version__,
    }


def new_record(analysis: Analysis, plan: Plan, options: Options, data: Dataset) -> dict[str, Any]:
    """All that is known about a run before anything is cut.

    Of the groups, heads are listed where some of them go; what lies inside them is given per head, and `heads` counts
    those of the original. Each of a group's indices stands for `together` neurons (2 where rotary positions pair them).
    """
    cuts = as_cuts(plan, analysis.groups)
    sizes = {cut.atom: cut.keep.shape[1] for cut in cuts}
    kept = {entry.id: entry.kept for entry in plan.groups}
    before, after = (
        {what: round(analysis.cost.total(what, new)) for what in ("params", "macs")} for new in (None, sizes)
    )
    path, seen = analysis.model.path, inspect(analysis)
    return {
        "input": None if path is None else str(path),
        "output": None,
        "before": {**before, "bytes": analysis.model.bytes},
        "after": {**after, "bytes": None},
        "groups": [
            {
                "id": group.id,
                "kind": group.kind,
                "before": group.size,
                "heads": group.heads,
                "after": kept.get(group.id, group.size),
                "together": group.together,
            }
            for group in analysis.structure.groups
            if group.kind != "head" or group.id in kept
        ],
        "settings": settings(options, data),
        "plan": vars(plan) | {"version": 1, "groups": [vars(entry) for entry in plan.groups]},
        "skipped": data.skipped_count,
        "left_alone": left_alone(seen.skipped),
        "sites": [{"name": site["name"], "heads": site["heads"]} for site in seen.sites],
        "inputs": seen.inputs,
        "target": _target(analysis, plan, options),
        "planned_for": None if analysis.cost.latency is None else analysis.cost.latency.machine,
    }


def _target(analysis: Analysis, plan: Plan, options: Options) -> dict[str, Any] | None:
    """What the target asked for, and what becomes of every attention there."""
    device, precision = options.device, options.planned_precision
    if device is None:
        return None
    before, after = (fused_attention(analysis, device, precision, one) for one in (None, plan))
    return {
        "name": device.name,
        "precision": precision,
        "multiple_of": options.multiple,
        "fused_attention": [{**new.to_dict(), "before": old.kept} for old, new in zip(before, after, strict=True)],
    }
