"""Full compensation in one shot: rotate attention, choose FFN neurons by optimal brain surgeon, refit what reads them.

Every step needs only second moments of the original model's activations. Widths are decided elsewhere; this module
decides which neurons (or directions) fill them, and with which weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from scipy import linalg

from onnxsnp.calibration.statistics import Moments, PairMoments, Statistics
from onnxsnp.graph.groups import Group
from onnxsnp.graph.linear import Linear, neuron_places
from onnxsnp.graph.paths import way_to
from onnxsnp.planning.plan import Plan, as_cuts
from onnxsnp.reconstruction.attention import PairBasis, ValueBasis, pair_basis, value_basis
from onnxsnp.reconstruction.refit import RIDGE, refit_consumers, refittable

if TYPE_CHECKING:
    from onnxsnp.analysis import Analysis


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
    """The attention groups of a model that can be rotated, and why the others cannot, by group id."""

    pairs: dict[str, PairSite] = field(default_factory=dict)
    values: dict[str, ValueSite] = field(default_factory=dict)
    blocked: dict[str, str] = field(default_factory=dict)


def find_rotations(analysis: Analysis) -> Rotations:
    """Which attention groups allow a change of basis."""
    found = Rotations()
    graph, deps, linears = analysis.graph, analysis.dependencies, analysis.linears
    for group in analysis.structure.groups:
        if group.site is None or not group.prunable:
            continue
        site = analysis.structure.sites[group.site]
        if group.kind == "qk":
            query, key = (way_to(axis[0], group.atom, graph, deps, linears) for axis in (site.query, site.key))
            alone = len(group.producers) == 2
            if query.linear is not None and key.linear is not None and query.linear != key.linear and alone:
                found.pairs[group.id] = PairSite(group, query.linear, key.linear)
            else:
                found.blocked[group.id] = query.blocked_by or key.blocked_by or "query and key share a projection"
        elif group.kind == "v":
            value = way_to(site.value[0], group.atom, graph, deps, linears)
            readers = refittable(group, linears)
            if value.linear is not None and len(group.producers) == 1 and len(readers) == len(group.consumers) == 1:
                found.values[group.id] = ValueSite(group, value.linear, readers[0])
            else:
                found.blocked[group.id] = value.blocked_by or "several projections read the values"
    return found


def pair_bases(moments: PairMoments) -> list[PairBasis]:
    """The best basis of every head."""
    return [
        pair_basis(query / max(moments.queries, 1), key / max(moments.keys, 1))
        for query, key in zip(moments.query, moments.key, strict=True)
    ]


def value_bases(analysis: Analysis, site: ValueSite, moments: Moments) -> list[ValueBasis]:
    """The best basis of every head, each for itself."""
    places = neuron_places(analysis.graph, analysis.dependencies, site.group, site.output.weight, site.output.inner)
    covariance = moments.covariance
    projection = np.moveaxis(analysis.graph.weights[site.output.weight], site.output.inner, 0).astype(np.float64)
    return [value_basis(covariance[np.ix_(rows, rows)], projection[rows]) for rows in places]


def attention_errors(analysis: Analysis, group: Group, statistics: Statistics, rotations: Rotations) -> np.ndarray:
    """Squared error by width of a rotated group, summed over its heads, [size + 1]."""
    if group.id in rotations.pairs:
        bases: Sequence[PairBasis | ValueBasis] = pair_bases(statistics.pairs[group.id])
    else:
        site = rotations.values[group.id]
        bases = value_bases(analysis, site, statistics.moments[site.output.data])
    return np.sum([basis.errors for basis in bases], axis=0)


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
    linear = site.output
    updates = _emit(analysis, site.group, site.value, [basis.basis for basis in bases], keep)
    array = analysis.graph.weights[linear.weight]
    full = np.moveaxis(array, linear.inner, 0).astype(np.float64)
    places = neuron_places(analysis.graph, analysis.dependencies, site.group, linear.weight, linear.inner)
    kept = keep.shape[1]
    change = np.zeros((len(full), len(bases) * kept))
    start = np.zeros((len(bases) * kept, full.shape[1]))
    for head, (basis, rows) in enumerate(zip(bases, places, strict=True)):
        new = slice(head * kept, (head + 1) * kept)
        change[rows, new] = basis.basis[:, :kept]
        start[new] = linalg.inv(basis.basis)[:kept] @ full[rows]
    centred = linear.bias is not None
    second = moments.covariance if centred else moments.second / max(moments.count, 1)
    inner = change.T @ second @ change
    strength = ridge * float(np.trace(inner)) / len(inner) + np.finfo(np.float64).tiny
    target = change.T @ second @ full + strength * start
    refit = linalg.solve(inner + strength * np.eye(len(inner)), target, assume_a="pos")
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


def rotated_weights(
    analysis: Analysis, keep: Mapping[str, np.ndarray], statistics: Statistics, rotations: Rotations
) -> dict[str, np.ndarray]:
    """New weights of every cut group that allows a change of basis.

    Args:
        keep: [heads, kept] indices by group id; with rotation only their number matters, and where the new neurons lie.

    Returns:
        Weights by name, in their original shapes.
    """
    updates: dict[str, np.ndarray] = {}
    for name, places in keep.items():
        if name in rotations.pairs and name in statistics.pairs:
            bases = pair_bases(statistics.pairs[name])
            updates.update(rotate_pairs(analysis, rotations.pairs[name], bases, places))
        elif name in rotations.values and rotations.values[name].output.data in statistics.moments:
            site = rotations.values[name]
            moments = statistics.moments[site.output.data]
            updates.update(rotate_values(analysis, site, value_bases(analysis, site, moments), places, moments))
    return updates


def rebuild(analysis: Analysis, plan: Plan, statistics: Statistics, compensation: str) -> dict[str, np.ndarray]:
    """The weights that make up for what a plan cuts.

    Args:
        compensation: "refit" refits the readers of value and FFN neurons; "full" also rotates attention groups.

    Returns:
        Weights by name, in their original shapes.
    """
    rotations = find_rotations(analysis) if compensation == "full" else Rotations()
    cuts = {cut.atom: cut for cut in as_cuts(plan, analysis.groups)}
    cut_groups = [analysis.groups[entry.id] for entry in plan.groups if analysis.groups[entry.id].atom in cuts]
    rotated = {group.id for group in cut_groups} & (rotations.pairs.keys() | rotations.values.keys())
    others = [group for group in cut_groups if group.id not in rotated]
    by_id = {group.id: cuts[group.atom] for group in others}
    updates = refit_consumers(
        analysis.graph, analysis.dependencies, others, by_id, analysis.linears, statistics.moments
    )
    keep = {name: cuts[analysis.groups[name].atom].keep for name in rotated}
    return updates | rotated_weights(analysis, keep, statistics, rotations)
