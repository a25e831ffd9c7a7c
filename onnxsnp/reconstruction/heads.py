"""Whole heads by optimal brain surgeon, and what a site looks like to its values once some heads are gone.

METHODS 2.3 in blocks (kin: ZipLM arXiv 2302.04089, which removes whole heads so). The output projection y = x W reads
the neurons of all heads, whose covariance on the calibration data is C. With Ci = (C + λI)⁻¹, the least that removing
head h, with rows W_h, can cost when all other heads may take over its part is

    s_h = tr(W_hᵀ (Ci_hh)⁻¹ W_h),   and then   W ← W − Ci_:h (Ci_hh)⁻¹ W_h,   Ci ← Ci − Ci_:h (Ci_hh)⁻¹ Ci_h: .

The head with the smallest s goes, and so on. The sum of the s so far is the exact error of the joint ridge refit of
the projection over the heads that are left (see `ffn`): the curve for the allocation.

Where values are rotated too, the heads go first: `after_heads` gives the site as it is then, with the refitted
projection, and with the inputs of removed heads independent of everything and read by nothing. What is rotated and
refitted there leaves out the removed heads of itself, and aims (up to the ridge) at the output of all heads, since
that of the refitted projection is its least-squares image.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from scipy import linalg

from onnxsnp.calibration.statistics import Moments
from onnxsnp.graph.groups import Group
from onnxsnp.graph.ir import Graph
from onnxsnp.graph.linear import Linear, block_places
from onnxsnp.planning.plan import GroupPlan
from onnxsnp.reconstruction.ffn import MIN_RIDGE, Removal
from onnxsnp.reconstruction.refit import RIDGE, refittable, solve, solve_positive
from onnxsnp.scoring.heads import contributions, dead_heads

if TYPE_CHECKING:
    from onnxsnp.analysis import Analysis


@dataclass(frozen=True)
class HeadSite:
    """Heads that one projection reads and nothing else.

    Attributes:
        group: the heads.
        output: the projection.
        blocks: [heads, neurons], the rows of each head in its weight.
    """

    group: Group
    output: Linear
    blocks: np.ndarray


def head_site(analysis: Analysis, group: Group) -> HeadSite | None:
    """The projection behind a head group; None if there are several, or its input cannot be measured."""
    readers = refittable(group, analysis.linears) if group.kind == "head" else []
    if len(readers) != 1 or len(group.consumers) != 1:
        return None
    (reader,) = readers
    blocks = block_places(analysis.graph, analysis.dependencies, group, reader.weight, reader.inner)
    return HeadSite(group, reader, blocks)


def head_order(
    weight: np.ndarray,
    covariance: np.ndarray,
    blocks: np.ndarray,
    *,
    ridge: float = RIDGE,
    first: np.ndarray | None = None,
) -> Removal:
    """Remove heads one by one, each time the one whose loss the others make up for best, until one is left.

    Args:
        weight: W of the output projection, [K, out].
        covariance: of its input, [K, K]; the second moments E[xᵀx] where it has no bias to refit.
        blocks: [heads, neurons] rows of each head.
        ridge: λ as a share of the mean diagonal of the covariance, as in `refit.solve`; at least `MIN_RIDGE`.
        first: bool, [heads]; heads known to be dead. They go before all others and are charged nothing.

    Returns:
        Order and error curve, [heads − 1] each, errors as in `Removal`.

    Raises:
        ValueError: values that are not finite.
    """
    if not (np.isfinite(weight).all() and np.isfinite(covariance).all()):
        raise ValueError("weight and covariance must be finite")
    dead = np.zeros(len(blocks), bool) if first is None else first
    order = np.flatnonzero(dead)[: len(blocks) - 1].tolist()
    costs = [0.0] * len(order)
    left = [head for head in range(len(blocks)) if head not in order]
    rows = blocks[left]
    live = np.sort(rows.reshape(-1))
    unit = float(np.trace(covariance)) / len(covariance)
    strength = max(ridge, MIN_RIDGE) * unit + np.finfo(np.float64).tiny
    inner = covariance[np.ix_(live, live)].astype(np.float64)
    inverse = _inverse((inner + inner.T) / 2, strength)
    now = weight[live].astype(np.float64)
    place = {head: np.searchsorted(live, mine) for head, mine in zip(left, rows, strict=True)}
    while len(left) > 1:
        parts = {head: solve_positive(inverse[np.ix_(place[head], place[head])], now[place[head]]) for head in left}
        losses = {head: max(float(np.sum(now[place[head]] * parts[head])), 0.0) for head in left}
        gone = min(left, key=losses.__getitem__)
        mine = place[gone]
        column = inverse[:, mine].copy()
        now -= column @ parts[gone]
        inverse -= column @ solve_positive(inverse[np.ix_(mine, mine)], column.T)
        order.append(gone)
        costs.append(losses[gone])
        left.remove(gone)
    return Removal(np.asarray(order, np.int64), np.cumsum(costs))


def _inverse(covariance: np.ndarray, strength: float) -> np.ndarray:
    """(C + λI)⁻¹; eigenvalues that single precision products left below zero stand for zero."""
    values, vectors = linalg.eigh(covariance)
    return (vectors / (np.maximum(values, 0.0) + strength)) @ vectors.T


def site_order(analysis: Analysis, site: HeadSite, moments: Moments) -> Removal:
    """The order in which the heads of one site go, with what it costs (`head_order`)."""
    dead = dead_heads(analysis.graph, analysis.dependencies, site.group, analysis.linears)
    return head_order(_projection(analysis.graph, site.output), second(moments, site.output), site.blocks, first=dead)


def head_contributions(
    analysis: Analysis, group: Group, moments: Mapping[str, Moments], *, refitted: bool
) -> np.ndarray | None:
    """What each head adds to the outputs of the projections that read it (`contributions`), [heads].

    Args:
        refitted: the projection's bias takes up the mean of what is removed, so only what varies counts.

    Returns:
        None where the input of a projection was not measured.
    """
    found = np.zeros(group.size)
    readers = refittable(group, analysis.linears)
    if not readers or len(readers) != len(group.consumers) or any(one.data not in moments for one in readers):
        return None
    for reader in readers:
        held = moments[reader.data]
        inner = second(held, reader) if refitted else held.second / max(held.count, 1)
        blocks = block_places(analysis.graph, analysis.dependencies, group, reader.weight, reader.inner)
        found += contributions(_projection(analysis.graph, reader), inner, blocks)
    return found


def second(moments: Moments, reader: Linear) -> np.ndarray:
    """Second moments of what a projection reads: about the mean only where its bias can take up a change of it."""
    return moments.covariance if reader.bias is not None else moments.second / max(moments.count, 1)


def _projection(graph: Graph, reader: Linear) -> np.ndarray:
    array = graph.weights[reader.weight]
    return np.moveaxis(array, reader.inner, 0).reshape(array.shape[reader.inner], -1)


def heads_cut_with(group: Group, entries: Sequence[GroupPlan], groups: Mapping[str, Group]) -> list[GroupPlan]:
    """Of the cut head groups in a plan those whose heads the neurons of a value group belong to."""
    return [
        entry
        for entry in entries
        if group.kind == "v" and entry.kind == "head" and groups[entry.id].atom in group.head_atoms
    ]


def after_heads(
    analysis: Analysis, output: Linear, group: Group, keep: Sequence[int], moments: Moments
) -> tuple[Analysis, Moments]:
    """A model without some heads of one site, in the original shapes.

    Args:
        output: the projection that reads the heads.
        group: the heads.
        keep: those that stay.
        moments: of the projection's input.

    Returns:
        The analysis with the refitted output projection, and the moments its input has then: that of removed heads
        is as large as the mean of the others, without a mean of its own, and independent of everything.
    """
    blocks = block_places(analysis.graph, analysis.dependencies, group, output.weight, output.inner)
    rows = np.sort(blocks[list(keep)].reshape(-1))
    array = analysis.graph.weights[output.weight]
    refit, shift = solve(_projection(analysis.graph, output), moments, rows, centred=output.bias is not None)
    full = np.zeros((array.shape[output.inner], refit.shape[1]))
    full[rows] = refit
    moved = np.moveaxis(array, output.inner, 0).shape
    new = {output.weight: np.moveaxis(full.reshape(moved), 0, output.inner).astype(array.dtype)}
    if output.bias is not None:
        bias = analysis.graph.weights[output.bias]
        new[output.bias] = (bias + shift.reshape(bias.shape)).astype(bias.dtype)
    graph = replace(analysis.graph, weights={**analysis.graph.weights, **new}, _open={})
    view = copy.copy(analysis)  # with all that was found about the graph's structure, which stays the same
    view.normalized = replace(analysis.normalized, graph=graph)
    return view, _alone(moments, rows)


def _alone(moments: Moments, rows: np.ndarray) -> Moments:
    """Moments in which all but some neurons are independent of everything."""
    inside = np.zeros(len(moments.total), bool)
    inside[rows] = True
    diagonal = np.diagonal(moments.covariance)[inside]
    alike = max(float(diagonal.mean()), np.finfo(np.float64).tiny) * max(moments.count, 1)
    fresh = np.where(np.outer(inside, inside), moments.second, 0.0)
    fresh[~inside, ~inside] = alike
    return Moments(fresh, np.where(inside, moments.total, 0.0), moments.count)
