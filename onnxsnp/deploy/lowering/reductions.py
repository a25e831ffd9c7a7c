"""Reductions: their axes written out in the form that the importer reads."""

from __future__ import annotations

from onnxsnp.deploy.lowering.site import Rule, Site

_REDUCTIONS = (
    *("ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin"),
    *("ReduceProd", "ReduceSum", "ReduceSumSquare"),
)


def _reduce(s: Site) -> str | None:
    """Axes are an input from opset 18 on (ReduceSum: 13), and an attribute before; see `Site.reduce`."""
    as_input = s.source >= (13 if s.node.op_type == "ReduceSum" else 18)
    axes = s.value(1) if as_input else s.attr("axes")
    if as_input and s.given(1) and axes is None:
        return None  # not constant: nothing to write out
    chosen = [] if axes is None else [int(axis) for axis in axes]
    if not chosen:
        if as_input and s.attr("noop_with_empty_axes", 0):
            s.alias = s.data
            return "it reduces over no axis"
        chosen = list(range(s.rank()))
    if not chosen:
        return None  # of a scalar
    positive = sorted(axis % s.rank() for axis in chosen)
    s.reduce(s.node.op_type, s.data, positive, bool(s.attr("keepdims", 1)), into=s.output_name)
    return "axes in the form that the importer reads"


RULES: dict[str, Rule] = dict.fromkeys(_REDUCTIONS, _reduce)
