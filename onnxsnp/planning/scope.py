"""What may be cut at all, and how much where that needs no measurement: what the options say of a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from onnxsnp.deploy import fusion
from onnxsnp.errors import PlanError
from onnxsnp.graph.groups import Group
from onnxsnp.options import Options
from onnxsnp.planning import allocation
from onnxsnp.planning.plan import Plan
from onnxsnp.planning.ties import Tie

if TYPE_CHECKING:
    from onnxsnp.analysis import Analysis


def scoped(options: Options, analysis: Analysis) -> list[Group]:
    """The groups that may be cut.

    Raises:
        PlanError: there are none, or the scope is not known.
    """
    if options.scope is not None:
        kinds = allocation.parse_scope(options.scope)
    else:
        kinds = allocation.SCOPES if from_file(options) else allocation.DEFAULT_SCOPE
    groups = [group for group in analysis.structure.groups if group.kind in kinds and group.prunable]
    if not groups:
        raise PlanError(
            f"the model has nothing to cut in scope {','.join(kinds)}",
            hint="onnxsnp inspect lists its groups and the reasons",
        )
    return groups


def from_file(options: Options) -> bool:
    """Whether a file says how much goes from where."""
    return options.allocation not in ("auto", "uniform")


def automatic(options: Options, analysis: Analysis) -> bool:
    """Whether widths are to be found by measurement, which takes full compensation and more than one width to find."""
    if options.allocation != "auto" or options.compensation != "full" or not options.ratio:
        return False
    return {group.kind for group in scoped(options, analysis)} != {"residual"}


def ties(options: Options, analysis: Analysis) -> list[Tie]:
    """Groups that have to keep one width for the target to fuse their attention."""
    if options.device is None:
        return []
    return fusion.ties(analysis, options.device, options.planned_precision, options.multiple)


def counts(options: Options, analysis: Analysis) -> dict[str, int]:
    """Kept neurons by group id, for allocations that need no measurement."""
    groups, ratio = scoped(options, analysis), options.ratio or 0.0
    if from_file(options):
        return allocation.from_file(options.allocation, groups, options.multiple, options.scope is not None)
    if options.allocation == "uniform":
        return allocation.uniform(groups, ratio, options.multiple, ties(options, analysis))
    return allocation.to_cost(groups, analysis.cost, ratio, options.of, options.multiple, ties(options, analysis))


def to_cut(options: Options, analysis: Analysis, plan: Plan | None, kept: Mapping[str, int] | None) -> list[Group]:
    """The groups about which something has to be known.

    Args:
        plan: what stays, if it is given.
        kept: neurons that stay by group id, if they are known.
    """
    if plan is not None:
        kept = {entry.id: entry.kept for entry in plan.groups}
    if kept is None:
        return scoped(options, analysis)
    return [analysis.groups[name] for name, count in kept.items() if count < analysis.groups[name].size]
