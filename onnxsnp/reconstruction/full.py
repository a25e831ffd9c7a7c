"""Full compensation in one shot: rotate attention or weigh its pairs, choose by optimal brain surgeon, refit readers.

Every step needs only second moments of the original model's activations. Widths are decided elsewhere; this module
decides which neurons (or directions) fill them, and with which weights.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from scipy import linalg

from onnxsnp.blas import available_cores, single_threaded
from onnxsnp.calibration.statistics import Moments, PairMoments, Statistics
from onnxsnp.graph.groups import Group
from onnxsnp.graph.linear import Linear, neuron_places
from onnxsnp.graph.paths import shift_blocked_by, straight_from, way_to
from onnxsnp.graph.residual import ResidualSite, find_residual
from onnxsnp.planning.plan import GroupPlan, Plan
from onnxsnp.reconstruction.attention import PairBasis, ValueBasis, complementary_bases, pair_basis, value_basis
from onnxsnp.reconstruction.gains import PairOrder, group_factors, group_orders, scaled
from onnxsnp.reconstruction.heads import after_heads, heads_cut_with
from onnxsnp.reconstruction.refit import RIDGE, refit_consumers, refittable, solve_positive
from onnxsnp.reconstruction.residual import ResidualRotation, refit_readers
from onnxsnp.surgery.rewrite import Cut

if TYPE_CHECKING:
    from onnxsnp.analysis import Analysis

_ROUND_OFF = 1e-6  # of the second moment about zero: what sums in single precision leave over of no variance


@dataclass(frozen=True)
class PairSite:
    """A query-key group whose basis may change, and the projections that emit its two sides."""

    group: Group
    query: Linear
    key: Linear


@dataclass(frozen=True)
class ValueSite:
    """A value group whose basis may change, the projection that emits it and the one that reads it."""

    group: Group
    value: Linear
    output: Linear


@dataclass
class Rotations:
    """The attention and residual groups of a model that can be rotated, and why the others cannot, by group id."""

    pairs: dict[str, PairSite] = field(default_factory=dict)
    values: dict[str, ValueSite] = field(default_factory=dict)
    residuals: dict[str, ResidualSite] = field(default_factory=dict)
    blocked: dict[str, str] = field(default_factory=dict)


def find_rotations(analysis: Analysis) -> Rotations:
    """Which attention and residual groups allow a change of basis."""
    found = Rotations()
    for group in analysis.structure.groups:
        if group.kind == "residual" and group.prunable:
            _residual_site(analysis, group, found)
        if group.site is None or not group.prunable:
            continue
        if group.further:
            found.blocked[group.id] = "several attention sites have the same neurons"
            continue
        if group.together > 1:
            found.blocked[group.id] = "its neurons are turned in pairs"
            continue
        if group.kind == "qk":
            _pair_site(analysis, group, found)
        elif group.kind == "v":
            _value_site(analysis, group, found)
    return found


def _pair_site(analysis: Analysis, group: Group, found: Rotations) -> None:
    graph, deps, linears = analysis.graph, analysis.dependencies, analysis.linears
    site = analysis.structure.sites[group.site or 0]
    query, key = (way_to(axis[0].split("|")[-1], group.atom, graph, deps, linears) for axis in (site.query, site.key))
    capped = shift_blocked_by(site.score, deps.atoms(*site.key_tokens), graph, deps)
    if query.linear is None or key.linear is None:
        found.blocked[group.id] = query.blocked_by or key.blocked_by
    elif capped:
        found.blocked[group.id] = capped
    elif len(group.producers) != 2 or not all(_by_head(analysis, group, one.linear) for one in (query, key)):
        found.blocked[group.id] = "query and key share a projection, or indices are tied across heads"
    else:
        found.pairs[group.id] = PairSite(group, query.linear, key.linear)


def _value_site(analysis: Analysis, group: Group, found: Rotations) -> None:
    graph, deps, linears = analysis.graph, analysis.dependencies, analysis.linears
    site = analysis.structure.sites[group.site or 0]
    value = way_to(site.value[0].split("|")[-1], group.atom, graph, deps, linears)
    readers = refittable(group, linears)
    if value.linear is None:
        found.blocked[group.id] = value.blocked_by
    elif len(group.producers) != 1 or len(readers) != 1 or len(group.consumers) != 1 or not readers[0].plain:
        found.blocked[group.id] = "the values are not read by exactly one projection"
    elif not straight_from(readers[0].data, site.mix, group.atom, graph, deps, linears):
        found.blocked[group.id] = f"something nonlinear lies between {site.mix} and {readers[0].node}"
    elif not _by_head(analysis, group, value.linear):
        found.blocked[group.id] = "indices are tied across heads"
    else:
        found.values[group.id] = ValueSite(group, value.linear, readers[0])


def _residual_site(analysis: Analysis, group: Group, found: Rotations) -> None:
    site = find_residual(group, analysis.graph, analysis.dependencies, analysis.linears)
    if isinstance(site, str):
        found.blocked[group.id] = site
    else:
        found.residuals[group.id] = site


def _by_head(analysis: Analysis, group: Group, linear: Linear | None) -> bool:
    """Whether the projection emits nothing but the group's heads, so that each can have a basis of its own."""
    return linear is not None and analysis.graph.weights[linear.weight].shape[linear.outer] == group.heads * group.size


def pair_bases(moments: PairMoments) -> list[PairBasis]:
    """The best basis of every head."""
    return [
        pair_basis(query / max(moments.queries, 1), key / max(moments.keys, 1))
        for query, key in zip(moments.query, moments.key, strict=True)
    ]


def value_bases(analysis: Analysis, site: ValueSite, moments: Moments) -> list[ValueBasis]:
    """The best basis of every head, each for itself."""
    places = neuron_places(analysis.graph, analysis.dependencies, site.group, site.output.weight, site.output.inner)
    covariance = _second(moments, site.output)
    projection = np.moveaxis(analysis.graph.weights[site.output.weight], site.output.inner, 0).astype(np.float64)
    return [value_basis(covariance[np.ix_(rows, rows)], projection[rows]) for rows in places]


def _second(moments: Moments, reader: Linear) -> np.ndarray:
    """Second moments of what a projection reads: about the mean only where its bias can take up a change of it.

    What is the same for every token and input leaves nothing but round-off about its mean, which is no direction.
    """
    about_zero = moments.second / max(moments.count, 1)
    if reader.bias is None:
        return about_zero
    covariance = moments.covariance
    varies = np.trace(covariance) > _ROUND_OFF * np.trace(about_zero)
    return covariance if varies else np.zeros_like(covariance)


def rotate_pairs(analysis: Analysis, site: PairSite, bases: list[PairBasis], keep: np.ndarray) -> dict[str, np.ndarray]:
    """New weights of a query and a key projection; the kept neurons of each head carry the leading pairs.

    The key bias adds the same to all scores of a row, which softmax ignores; so it goes (METHODS 2.1).

    Args:
        keep: [heads, kept] places of the new neurons.

    Returns:
        Weights and biases by name, in their original shapes; what is not kept is zero.
    """
    updates = _emit(analysis, site.group, site.query, [basis.query for basis in bases], keep)
    updates.update(_emit(analysis, site.group, site.key, [basis.key for basis in bases], keep))
    if site.key.bias is not None:
        updates[site.key.bias] = np.zeros_like(analysis.graph.weights[site.key.bias])
    return updates


def rotate_values(
    analysis: Analysis,
    site: ValueSite,
    bases: list[ValueBasis],
    keep: np.ndarray,
    moments: Moments,
    ridge: float = RIDGE,
) -> dict[str, np.ndarray]:
    """New weights of a value projection and, refitted jointly over all heads, of the output projection behind it.

    With T the block-diagonal basis, C the covariance and μ the mean of the projection's input (METHODS 2.2):
    W' = (TᵀCT + λ)⁻¹ (TᵀC W + λ W₀) and b' = b + μ W − μ T W', where W₀ = T⁺ W undoes the change of basis.

    Args:
        keep: [heads, kept] places of the new neurons.

    Returns:
        Weights and biases by name, in their original shapes; what is not kept is zero.
    """
    linear, kept = site.output, keep.shape[1]
    array = analysis.graph.weights[linear.weight]
    full = np.moveaxis(array, linear.inner, 0).astype(np.float64)
    places = neuron_places(analysis.graph, analysis.dependencies, site.group, linear.weight, linear.inner)
    second = _second(moments, linear)
    bases = complementary_bases(bases, second, full, places, kept)
    updates = _emit(analysis, site.group, site.value, [basis.basis for basis in bases], keep)
    change = np.zeros((len(full), len(bases) * kept))
    start = np.zeros((len(bases) * kept, full.shape[1]))
    for head, (basis, rows) in enumerate(zip(bases, places, strict=True)):
        new = slice(head * kept, (head + 1) * kept)
        change[rows, new] = basis.basis[:, :kept]
        start[new] = linalg.inv(basis.basis)[:kept] @ full[rows]
    inner = change.T @ second @ change
    strength = ridge * float(np.trace(inner)) / len(inner) + np.finfo(np.float64).tiny
    target = change.T @ second @ full + strength * start
    refit = solve_positive(inner + strength * np.eye(len(inner)), target)
    written = np.zeros_like(full)
    written[np.take_along_axis(places, keep, axis=1).reshape(-1)] = refit
    updates[linear.weight] = np.moveaxis(written, 0, linear.inner).astype(array.dtype)
    if linear.bias is not None:
        bias = analysis.graph.weights[linear.bias]
        shift = moments.mean @ full - (moments.mean @ change) @ refit
        updates[linear.bias] = (bias + shift.reshape(bias.shape)).astype(bias.dtype)
    return updates


def _emit(
    analysis: Analysis, group: Group, linear: Linear, bases: list[np.ndarray], keep: np.ndarray
) -> dict[str, np.ndarray]:
    """A projection whose kept neurons are the leading combinations of its old ones; the others are zero."""
    places = neuron_places(analysis.graph, analysis.dependencies, group, linear.weight, linear.outer)

    def combined(rows: np.ndarray) -> np.ndarray:
        fresh = np.zeros(rows.shape)
        for mine, basis, stay in zip(places, bases, keep, strict=True):
            fresh[mine[stay]] = basis[:, : len(stay)].T @ rows[mine]
        return fresh

    weight = analysis.graph.weights[linear.weight]
    moved = np.moveaxis(weight, linear.outer, 0).astype(np.float64)
    fresh = combined(moved.reshape(len(moved), -1)).reshape(moved.shape)
    updates = {linear.weight: np.moveaxis(fresh, 0, linear.outer).astype(weight.dtype)}
    if linear.bias is not None:
        bias = analysis.graph.weights[linear.bias]
        updates[linear.bias] = combined(bias.reshape(-1, 1).astype(np.float64)).reshape(bias.shape).astype(bias.dtype)
    return updates


class Reconstruction:
    """Weights that make up for cuts, group by group; bases and the weights of the last plan are kept.

    The weights one group's cut changes are no other group's, so those of a plan are put together; gains go on top. All
    of that is about the other side of the weights that touch the residual stream, whose own change comes last.

    Args:
        statistics: moments of everything the plans will cut.
        compensation: "none", "refit" (readers of value, FFN and residual neurons) or "full" (attention is rotated, or
            weighted; the residual stream is rotated).
    """

    def __init__(self, analysis: Analysis, statistics: Statistics, compensation: str) -> None:
        self._analysis, self._statistics, self._compensation = analysis, statistics, compensation
        self.rotations = analysis.rotations if compensation == "full" else Rotations()
        self.gains = analysis.gains if compensation == "full" else {}
        self._orders: dict[str, list[PairOrder]] = {}
        self._pairs: dict[str, list[PairBasis]] = {}
        self._values: dict[str, list[ValueBasis]] = {}
        self._residuals: dict[str, ResidualRotation] = {}
        self._last: dict[str, tuple[list[list[list[int]]], dict[str, np.ndarray]]] = {}

    @property
    def refits(self) -> bool:
        """Whether what reads cut neurons is fitted to what is left of them."""
        return self._compensation != "none"

    def rotates(self, group: Group) -> bool:
        """Whether a group's neurons are new combinations, so that any places do."""
        rotations = self.rotations
        return any(group.id in sites for sites in (rotations.pairs, rotations.values, rotations.residuals))

    def weighs(self, group: Group) -> bool:
        """Whether a group's pairs stay as they are but for a gain each."""
        return group.id in self.gains

    def orders(self, group: Group) -> list[PairOrder]:
        """In which order the pairs of each head of a weighted group go."""
        if group.id not in self._orders:
            with single_threaded():
                self._orders[group.id] = group_orders(self.gains[group.id], self._statistics.overlaps[group.id])
        return self._orders[group.id]

    def errors(self, group: Group) -> np.ndarray:
        """Squared error by width of a rotated or weighted group, summed over its heads, [size + 1].

        Of a residual group, as a share of the variance (see `ResidualBasis`).
        """
        if group.id in self.rotations.residuals:
            return self._residual(group.id).basis.errors
        return np.sum(self.errors_by_head(group), axis=0)

    def errors_by_head(self, group: Group) -> np.ndarray:
        """Squared error by width of a rotated or weighted attention group, [heads, size + 1]."""
        if self.weighs(group):
            return np.stack([head.errors for head in self.orders(group)])
        bases = self._pair_bases(group.id) if group.id in self.rotations.pairs else self._value_bases(group.id)
        return np.stack([basis.errors for basis in bases])

    def weights(self, plan: Plan) -> dict[str, np.ndarray]:
        """New weights by name, in their original shapes, zero where something is cut."""
        updates: dict[str, np.ndarray] = {}
        if self._compensation == "none":
            return updates
        cut = [entry for entry in plan.groups if entry.kept < entry.size]
        groups = self._analysis.groups
        heads = {entry.id: heads_cut_with(groups[entry.id], cut, groups) for entry in cut}
        joint = {head.id for with_values in heads.values() for head in with_values}
        inner = [entry for entry in cut if entry.kind != "residual" and entry.id not in joint]
        asked = {entry.id: [one.keep for one in (entry, *heads[entry.id])] for entry in inner}
        stale = [entry for entry in inner if self._last.get(entry.id, (None,))[0] != asked[entry.id]]
        # groups share nothing, and a solve of this size gains more from a core of its own than from BLAS threads
        with single_threaded(), ThreadPoolExecutor(max_workers=available_cores()) as pool:
            fresh = {
                entry.id: (asked[entry.id], made)
                for entry, made in zip(
                    stale, pool.map(lambda entry: self._group_weights(entry, heads[entry.id]), stale), strict=True
                )
            }
        self._last = {entry.id: fresh.get(entry.id) or self._last[entry.id] for entry in inner}
        for entry in sorted(inner, key=lambda entry: entry.id in self.gains):
            made, weights = self._last[entry.id][1], ChainMap(updates, self._analysis.graph.weights)
            updates.update(scaled(weights, made) if entry.id in self.gains else made)
        for entry in cut:
            if entry.kind == "residual":
                updates.update(self._residual_weights(entry, updates))
        return updates

    def streams(self, plan: Plan) -> dict[int, np.ndarray]:
        """How rotated, narrower residual streams follow from the original ones, x' = x R: R [size, kept] by factor."""
        cut = [entry for entry in plan.groups if entry.id in self.rotations.residuals and entry.kept < entry.size]
        return {self._analysis.groups[entry.id].atom: self._residual(entry.id).change(entry.kept) for entry in cut}

    def forget(self) -> None:
        """Let go of the statistics and of everything made from them, once the weights of the last plan are known."""
        self._statistics = Statistics()
        for cache in (self._orders, self._pairs, self._values, self._residuals, self._last):
            cache.clear()

    def _residual_weights(self, entry: GroupPlan, updates: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """New weights by name of what touches a residual stream, on top of those the other groups' cuts made."""
        keep = np.asarray(entry.keep[0])
        if entry.id in self.rotations.residuals:
            return self._residual(entry.id).weights(keep, updates)
        group = self._analysis.groups[entry.id]
        return refit_readers(self._analysis, group, keep, self._statistics.moments, updates)

    def _group_weights(self, entry: GroupPlan, heads: Sequence[GroupPlan] = ()) -> dict[str, np.ndarray]:
        """New weights by name; of a group that is weighted, factors for them.

        Args:
            heads: for values, the cut of the heads they belong to.
        """
        analysis, moments = self._analysis, self._statistics.moments
        keep = np.asarray(entry.keep)
        if entry.id in self.gains:
            return group_factors(analysis, self.gains[entry.id], self._statistics.overlaps[entry.id], keep)
        if entry.id in self.rotations.pairs:
            return rotate_pairs(analysis, self.rotations.pairs[entry.id], self._pair_bases(entry.id), keep)
        if entry.id in self.rotations.values:
            site = self.rotations.values[entry.id]
            held = moments[site.output.data]
            if not heads:
                return rotate_values(analysis, site, self._value_bases(entry.id), keep, held)
            for head in heads:
                analysis, held = after_heads(analysis, site.output, analysis.groups[head.id], head.keep[0], held)
            return rotate_values(analysis, site, value_bases(analysis, site, held), keep, held)
        groups = [analysis.groups[one.id] for one in (entry, *heads)]
        cuts = {
            group.id: Cut(group.atom, group.head_atoms, np.asarray(one.keep))
            for group, one in zip(groups, (entry, *heads), strict=True)
        }
        return refit_consumers(analysis.graph, analysis.dependencies, groups, cuts, analysis.linears, moments)

    def _residual(self, name: str) -> ResidualRotation:
        if name not in self._residuals:
            site = self.rotations.residuals[name]
            self._residuals[name] = ResidualRotation(self._analysis, site, self._statistics.moments)
        return self._residuals[name]

    def _pair_bases(self, name: str) -> list[PairBasis]:
        if name not in self._pairs:
            with single_threaded():
                self._pairs[name] = pair_bases(self._statistics.pairs[name])
        return self._pairs[name]

    def _value_bases(self, name: str) -> list[ValueBasis]:
        if name not in self._values:
            site = self.rotations.values[name]
            with single_threaded():
                self._values[name] = value_bases(self._analysis, site, self._statistics.moments[site.output.data])
        return self._values[name]
