"""Which neurons stay, once it is known how many: by criterion, or where the method allows better, by what it needs.

With full compensation the neurons of a rotated attention group are new combinations, so any places do; those of an FFN
are chosen by optimal brain surgeon. Everything else is ranked by the criterion.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from onnxsnp.calibration.statistics import Statistics
from onnxsnp.graph.groups import Group
from onnxsnp.planning.plan import GroupPlan, keep_highest
from onnxsnp.reconstruction.ffn import removal_order
from onnxsnp.reconstruction.full import Rotations, find_rotations
from onnxsnp.reconstruction.refit import refittable
from onnxsnp.scoring.criteria import CRITERIA, score
from onnxsnp.scoring.targets import dead_neurons, scoring_target

if TYPE_CHECKING:
    from onnxsnp.analysis import Analysis

COMPENSATIONS = ("none", "refit", "full")


@dataclass(frozen=True)
class Requirements:
    """What has to be measured on calibration data.

    Attributes:
        scored: query-key groups that need SNP scores.
        rotated: query-key groups that need moments of queries and keys.
        tensors: activations whose second moments are needed.
    """

    scored: tuple[Group, ...]
    rotated: tuple[Group, ...]
    tensors: tuple[str, ...]

    @property
    def nothing(self) -> bool:
        return not (self.scored or self.rotated or self.tensors)


def rotations_for(analysis: Analysis, compensation: str) -> Rotations:
    """The groups a compensation rotates; none unless it is full."""
    return find_rotations(analysis) if compensation == "full" else Rotations()


def requirements(
    analysis: Analysis, groups: Sequence[Group], compensation: str, criterion: str, *, planned: bool
) -> Requirements:
    """What a method needs to know about the groups that are to be cut.

    Args:
        planned: the kept neurons are given, so that no group has to be scored.
    """
    rotations = rotations_for(analysis, compensation)
    pairs = [group for group in groups if group.kind == "qk"]
    free = [group for group in pairs if group.id not in rotations.pairs]
    scored = free if CRITERIA[criterion].needs_qk and not planned else []
    tensors: list[str] = []
    if compensation != "none":
        tensors = sorted({linear.data for group in groups for linear in refittable(group, analysis.linears)})
    rotated = [group for group in pairs if group.id in rotations.pairs]
    return Requirements(tuple(scored), tuple(rotated), tuple(tensors))


def select(
    analysis: Analysis,
    counts: Mapping[str, int],
    statistics: Statistics,
    compensation: str,
    criterion: str,
    *,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> list[GroupPlan]:
    """Choose the neurons of every group that is cut.

    Args:
        counts: kept neurons per head, by group id.
        progress: called with (groups done, groups in all).
    """
    rotations = rotations_for(analysis, compensation)
    rng = np.random.default_rng(seed)
    cut = {name: kept for name, kept in counts.items() if kept < analysis.groups[name].size}
    entries = []
    for number, (name, kept) in enumerate(cut.items()):
        group = analysis.groups[name]
        if name in rotations.pairs or name in rotations.values:
            keep = [list(range(kept)) for _ in range(group.heads)]
        elif compensation == "full" and group.kind == "ffn" and refittable(group, analysis.linears):
            keep = [_surgeon(analysis, group, kept, statistics)]
        else:
            target = scoring_target(
                analysis.graph, analysis.dependencies, group, analysis.linears, statistics.qk.get(name)
            )
            keep = keep_highest(score(criterion, target, rng=rng), kept)
        entries.append(GroupPlan(name, group.kind, group.size, group.heads, keep))
        if progress is not None:
            progress(number + 1, len(cut))
    return entries


def _surgeon(analysis: Analysis, group: Group, kept: int, statistics: Statistics) -> list[int]:
    """The neurons of an FFN that optimal brain surgeon leaves."""
    graph, dependencies = analysis.graph, analysis.dependencies
    readers = refittable(group, analysis.linears)
    weight = np.concatenate(
        [np.moveaxis(graph.weights[one.weight], one.inner, 0).reshape(group.size, -1) for one in readers], axis=1
    ).astype(np.float64)
    target = scoring_target(graph, dependencies, group, analysis.linears)
    dead = dead_neurons(graph, dependencies, group, target.filters).reshape(-1)
    covariance = statistics.moments[readers[0].data].covariance
    gone = removal_order(weight, covariance, group.size - kept, first=dead).order
    return sorted(set(range(group.size)) - {int(index) for index in gone})
