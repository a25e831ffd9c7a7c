"""Which neurons stay, once it is known how many: by criterion, or where the method allows better, by what it needs.

With full compensation the neurons of a rotated attention or residual group are new combinations, so any places do;
query-key pairs that can only be weighted, FFN neurons, whole heads, and values that cannot be rotated are chosen by
optimal brain surgeon. Everything else is ranked by the criterion.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from onnxsnp.blas import available_cores, single_threaded
from onnxsnp.calibration.statistics import Statistics
from onnxsnp.graph.gains import GainSite
from onnxsnp.graph.groups import Group
from onnxsnp.graph.probabilities import AttentionPath, find_path
from onnxsnp.planning.plan import GroupPlan, keep_highest
from onnxsnp.reconstruction.channels import changes
from onnxsnp.reconstruction.ffn import Removal, removal_order
from onnxsnp.reconstruction.full import Reconstruction, Rotations
from onnxsnp.reconstruction.heads import head_contributions, head_site, site_order
from onnxsnp.reconstruction.refit import refittable
from onnxsnp.reconstruction.residual import refittable_readers
from onnxsnp.reconstruction.values import value_reader, value_removals
from onnxsnp.scoring.criteria import CRITERIA, ScoringTarget, score
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
        gained: query-key groups that need the overlap of their pairs.
        tensors: activations whose second moments are needed.
        changed: by id, query-key groups of which is needed what the attention loses without each pair.
    """

    scored: tuple[Group, ...]
    rotated: tuple[Group, ...]
    gained: tuple[GainSite, ...]
    tensors: tuple[str, ...]
    changed: Mapping[str, AttentionPath] = field(default_factory=dict)

    @property
    def nothing(self) -> bool:
        """Whether moments and scores need no pass over the data (`changed` has a pass of its own)."""
        return not (self.scored or self.rotated or self.gained or self.tensors)


def requirements(
    analysis: Analysis, groups: Sequence[Group], compensation: str, criterion: str, *, planned: bool
) -> Requirements:
    """What a method needs to know about the groups that are to be cut.

    Args:
        planned: the kept neurons are given, so that no group has to be scored.
    """
    rotations = analysis.rotations if compensation == "full" else Rotations()
    gains = analysis.gains if compensation == "full" else {}
    pairs = [group for group in groups if group.kind == "qk"]
    free = [group for group in pairs if group.id not in rotations.pairs and group.id not in gains]
    ranking = CRITERIA[criterion] if not planned else None
    changed = _paths(analysis, free) if ranking is not None and ranking.by_change else {}
    scored = [group for group in free if group.id not in changed] if ranking is not None and ranking.needs_qk else []
    ranked = ["head"] if ranking is not None and ranking.needs_qk else []
    ranked += ["v", "ffn"] if ranking is not None and ranking.by_change else []
    measured = [group for group in groups if compensation != "none" or group.kind in ranked]
    tensors = sorted({name for group in measured for name in _to_measure(analysis, group, rotations)})
    rotated = [group for group in pairs if group.id in rotations.pairs]
    gained = [gains[group.id] for group in pairs if group.id in gains]
    return Requirements(tuple(scored), tuple(rotated), tuple(gained), tuple(tensors), changed)


def union(parts: Sequence[Requirements]) -> Requirements:
    """What several methods need together."""

    def groups(wanted: Iterable[Group]) -> tuple[Group, ...]:
        return tuple({group.id: group for group in wanted}.values())

    return Requirements(
        scored=groups(group for part in parts for group in part.scored),
        rotated=groups(group for part in parts for group in part.rotated),
        gained=tuple({gain.group.id: gain for part in parts for gain in part.gained}.values()),
        tensors=tuple(sorted({name for part in parts for name in part.tensors})),
        changed={name: path for part in parts for name, path in part.changed.items()},
    )


def _paths(analysis: Analysis, groups: Sequence[Group]) -> dict[str, AttentionPath]:
    """By id, the way from score product to softmax of those groups where there is one."""
    sites = analysis.structure.sites
    found = {
        group.id: find_path(group, sites[group.site or 0], analysis.graph, analysis.dependencies) for group in groups
    }
    return {name: path for name, path in found.items() if path is not None}


def _to_measure(analysis: Analysis, group: Group, rotations: Rotations) -> list[str]:
    """The activations whose moments the compensation of a group's cut needs."""
    if group.id in rotations.residuals:
        return rotations.residuals[group.id].tensors
    readers = refittable_readers(group, analysis) if group.kind == "residual" else refittable(group, analysis.linears)
    return [linear.data for linear in readers]


class Selector:
    """Chooses the neurons of groups for any widths; what does not depend on the width is computed once.

    Args:
        criterion: who goes, wherever selection decides.
        surgeon: FFN neurons, heads and values are chosen by optimal brain surgeon instead of the criterion.
        statistics: what `requirements` asked for.
        reconstruction: knows which groups are rotated, and which pairs of a weighted group go first.
    """

    def __init__(
        self,
        analysis: Analysis,
        statistics: Statistics,
        reconstruction: Reconstruction,
        criterion: str,
        seed: int = 0,
        *,
        surgeon: bool = True,
    ) -> None:
        self._analysis, self._statistics = analysis, statistics
        self._reconstruction, self._criterion, self._surgeon = reconstruction, criterion, surgeon
        self._seed = seed
        self._scores: dict[str, np.ndarray] = {}
        self._removals: dict[str, Removal] = {}
        self._heads: dict[str, list[Removal]] = {}

    def entries(self, counts: Mapping[str, int], progress: Callable[[int, int], None] | None = None) -> list[GroupPlan]:
        """What stays of every group that is cut.

        Args:
            counts: kept neurons per head, by group id.
            progress: called with (groups done, groups in all).
        """
        cut = {name: kept for name, kept in counts.items() if kept < self._analysis.groups[name].size}
        found = []
        for number, (name, kept) in enumerate(cut.items()):
            group = self._analysis.groups[name]
            found.append(GroupPlan(name, group.kind, group.size, group.heads, self._keep(group, kept)))
            if progress is not None:
                progress(number + 1, len(cut))
        return found

    def curve(self, group: Group) -> np.ndarray | None:
        """Squared error left at the group's own output by width, [size + 1]; None where no closed form gives it."""
        if self._reconstruction.rotates(group) or self._reconstruction.weighs(group):
            return self._reconstruction.errors(group)
        errors = None
        if self._by_surgeon(group):
            errors = self.removal(group).errors
        elif self._by_head(group):
            errors = np.sum([head.errors for head in self.head_removals(group)], axis=0)
        return None if errors is None else np.concatenate([[np.nan], errors[::-1], [0.0]])  # at least one neuron stays

    def scores(self, group: Group) -> np.ndarray | None:
        """The criterion's scores, [heads, size], of a group that was ranked by them; None where it was not."""
        return self._scores.get(group.id)

    def curve_of_survivors(self, group: Group, heads: Group, kept: int) -> np.ndarray | None:
        """`curve` of a query-key or value group when of the heads that its neurons belong to only the best stay.

        What the heads that stay take over from the others is not in it.

        Args:
            heads: a group with a curve whose factor is among the group's head factors.
            kept: how many stay.
        """
        if not (self._reconstruction.rotates(group) or self._reconstruction.weighs(group)):
            return None
        sizes = [self._analysis.dependencies.size(atom) for atom in group.head_atoms]
        which = np.unravel_index(np.arange(group.heads), sizes)[group.head_atoms.index(heads.atom)]
        stay = np.isin(which, self._keep(heads, kept)[0])
        errors: np.ndarray = self._reconstruction.errors_by_head(group)[stay].sum(axis=0)
        return errors

    def curves(self, groups: Sequence[Group]) -> dict[str, np.ndarray]:
        """The curves of all groups that have one, by group id."""
        # optimal brain surgeon takes seconds for a wide layer, and more BLAS threads do not shorten it much
        with single_threaded(), ThreadPoolExecutor(max_workers=available_cores()) as pool:
            found = dict(zip([group.id for group in groups], pool.map(self.curve, groups), strict=True))
        return {name: curve for name, curve in found.items() if curve is not None}

    def removal(self, group: Group) -> Removal:
        """The order in which an FFN's neurons, or the heads of a site, go."""
        if group.id not in self._removals:
            surgeon = _head_surgeon if group.kind == "head" else _surgeon
            with single_threaded():
                self._removals[group.id] = surgeon(self._analysis, group, self._statistics)
        return self._removals[group.id]

    def head_removals(self, group: Group) -> list[Removal]:
        """The orders in which the values of each head go, where they cannot be rotated."""
        if group.id not in self._heads:
            reader = value_reader(self._analysis, group)
            if reader is None:
                raise ValueError(f"the values of '{group.id}' are not read by exactly one projection")
            with single_threaded():
                self._heads[group.id] = value_removals(self._analysis, group, reader, self._statistics)
        return self._heads[group.id]

    def _keep(self, group: Group, kept: int) -> list[list[int]]:
        if self._reconstruction.rotates(group):
            return [list(range(kept)) for _ in range(group.heads)]
        if self._reconstruction.weighs(group):
            gone = group.size - kept
            return [sorted(head.order[gone:].tolist()) for head in self._reconstruction.orders(group)]
        if self._by_surgeon(group):
            cut = {int(index) for index in self.removal(group).order[: group.size - kept]}
            return [sorted(set(range(group.size)) - cut)]
        if self._by_head(group):
            cuts = [set(head.order[: group.size - kept].tolist()) for head in self.head_removals(group)]
            return [sorted(set(range(group.size)) - head) for head in cuts]
        if group.id not in self._scores:
            rng = np.random.default_rng([self._seed, *group.id.encode()])  # the same whatever was asked for before
            self._scores[group.id] = score(self._criterion, self._target(group), rng=rng)
        return keep_highest(self._scores[group.id], kept)

    def _target(self, group: Group) -> ScoringTarget:
        """What the criterion reads of a group."""
        analysis, statistics = self._analysis, self._statistics
        qk, refits = statistics.qk.get(group.id), self._reconstruction.refits
        target = scoring_target(analysis.graph, analysis.dependencies, group, analysis.linears, qk)
        if group.kind == "head":
            added = head_contributions(analysis, group, statistics.moments, refitted=refits)
            return target if added is None else replace(target, contribution=added.reshape(1, -1))
        if CRITERIA[self._criterion].by_change:
            change, overlap = changes(analysis, group, statistics, refitted=refits)
            return replace(target, change=change, overlap=overlap)
        return target

    def _by_head(self, group: Group) -> bool:
        """Whether optimal brain surgeon chooses in every head: for values that one projection reads."""
        return self._surgeon and value_reader(self._analysis, group) is not None

    def _by_surgeon(self, group: Group) -> bool:
        """Whether optimal brain surgeon chooses: for an FFN whose neurons are all that its readers read, and heads."""
        if self._surgeon and group.kind == "head":
            return head_site(self._analysis, group) is not None
        if not self._surgeon or group.kind != "ffn":
            return False
        readers = refittable(group, self._analysis.linears)
        weights = self._analysis.graph.weights
        return bool(readers) and all(weights[one.weight].shape[one.inner] == group.size for one in readers)


def _head_surgeon(analysis: Analysis, group: Group, statistics: Statistics) -> Removal:
    """All but one head of a site in the order in which optimal brain surgeon removes them."""
    site = head_site(analysis, group)
    if site is None:
        raise ValueError(f"the heads of '{group.id}' are not read by exactly one projection")
    return site_order(analysis, site, statistics.moments[site.output.data])


def _surgeon(analysis: Analysis, group: Group, statistics: Statistics) -> Removal:
    """All but one neuron of an FFN in the order in which optimal brain surgeon removes them."""
    graph, dependencies = analysis.graph, analysis.dependencies
    readers = refittable(group, analysis.linears)
    # of readers of different activations (a gate beside a projection, say) the one with most outputs has the word
    widest = max(readers, key=lambda one: graph.weights[one.weight].size)
    readers = [one for one in readers if one.data == widest.data]
    weight = np.concatenate(
        [np.moveaxis(graph.weights[one.weight], one.inner, 0).reshape(group.size, -1) for one in readers], axis=1
    ).astype(np.float64)
    target = scoring_target(graph, dependencies, group, analysis.linears)
    dead = dead_neurons(graph, dependencies, group, target.filters).reshape(-1)
    moments = statistics.moments[readers[0].data]
    centred = all(one.bias is not None for one in readers)
    covariance = moments.covariance if centred else moments.second / max(moments.count, 1)
    return removal_order(weight, covariance, group.size - 1, first=dead)
