"""Query-key pairs that stay, each with a gain that makes up for those that go.

Where the pairs of a head cannot be mixed, they can still be weighted. Over the score entries of all images let the
contribution of pair i be s_i = q_i k_i, about the mean of its row (softmax ignores that). With H = E[s sᵀ], which per
image is the entrywise product of the Gram matrices qᵀq and kᵀk [derived for this project], the gains of the kept pairs
S that minimise E(Σ_all s_i − Σ_S g_i s_i)² + λ‖g − 1‖² solve

    (H_SS + λI) g = c_S + λ1,      c = H 1,

the diagonal form of METHODS 2.1 for kept pairs. Which pairs stay is decided on the same objective: it is a least
squares fit of one output with weights 1 by the inputs s, so pairs leave as in optimal brain surgeon (METHODS 2.3),
the one next whose part the others can best take over.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from onnxsnp.calibration.overlap import Overlap
from onnxsnp.graph.dependency import Dependencies
from onnxsnp.graph.gains import GainSite, find_gain
from onnxsnp.graph.ir import Graph
from onnxsnp.reconstruction.refit import solve_positive

if TYPE_CHECKING:
    from onnxsnp.analysis import Analysis

RIDGE = 1e-6  # of the mean diagonal: for singular overlaps only; up to 1e-2 held-back errors were the same


def find_gains(analysis: Analysis) -> dict[str, GainSite]:
    """The query-key groups that cannot be rotated but whose pairs can be given gains, by group id."""
    found = {}
    for group in analysis.structure.groups:
        alone = group.together == 1 and not group.further
        if group.kind == "qk" and group.prunable and alone and group.id not in analysis.rotations.pairs:
            site = analysis.structure.sites[group.site or 0]
            gain = find_gain(group, site, analysis.graph, analysis.dependencies, analysis.linears)
            if gain is not None:
                found[group.id] = gain
    return found


@dataclass(frozen=True)
class PairOrder:
    """The pairs of one head, or of heads that keep the same ones, in the order in which they go.

    Attributes:
        order: [size]; the last to go comes last.
        errors: [size + 1]; errors[r] is the expected squared error of the scores, per query and key token and summed
            over the sets of gains, with the best gains for the last r of the order; never increasing.
    """

    order: np.ndarray
    errors: np.ndarray


def pair_order(overlap: np.ndarray) -> PairOrder:
    """Remove pairs one by one, each time the one whose loss gains of the others make up for best.

    Removing pair p from those with gains g and inverse overlap J = H⁻¹ costs g_p² / J_pp; what is left changes by
    g ← g − J_:p g_p / J_pp and J ← J − J_:p J_p: / J_pp.

    Args:
        overlap: H of each head, [heads, size, size]; all heads lose the same pairs.
    """
    heads, size, _ = overlap.shape
    floor = RIDGE * np.einsum("hii->h", overlap)[:, None, None] / size + np.finfo(np.float64).tiny
    inverse = np.linalg.inv(overlap + floor * np.eye(size))
    gains = np.ones((heads, size))
    left = np.ones(size, bool)
    order, costs = [], []
    for _ in range(size):
        own = np.einsum("hii->hi", inverse)
        cost = np.full(size, np.inf)
        cost[left] = (gains[:, left] ** 2 / own[:, left]).sum(axis=0)
        gone = int(np.argmin(cost))
        order.append(gone)
        costs.append(cost[gone])
        column = inverse[:, :, gone] / own[:, gone, None]
        gains = gains - column * gains[:, gone, None]
        inverse = inverse - column[:, :, None] * inverse[:, None, gone]
        left[gone] = False
    return PairOrder(np.asarray(order), np.concatenate([[0.0], np.cumsum(costs)])[::-1])


def best_gains(overlap: np.ndarray, keep: np.ndarray, ridge: float = RIDGE) -> np.ndarray:
    """The gains of the kept pairs of one head.

    Args:
        overlap: H, [size, size].
        keep: indices that stay, [kept].
        ridge: λ as a share of the mean diagonal of H.

    Returns:
        [kept], float64.
    """
    strength = ridge * float(np.trace(overlap)) / len(overlap) + np.finfo(np.float64).tiny
    inner = overlap[np.ix_(keep, keep)] + strength * np.eye(len(keep))
    return solve_positive(inner, overlap[keep].sum(axis=1) + strength)


def group_orders(site: GainSite, overlap: Overlap) -> list[PairOrder]:
    """The order in which pairs go, for every head that keeps pairs of its own."""
    return [pair_order(mine) for mine in _by_group_head(site, overlap)]


def group_factors(analysis: Analysis, site: GainSite, overlap: Overlap, keep: np.ndarray) -> dict[str, np.ndarray]:
    """Factors for the constants of a group, by name and in their shapes; zero for what is not kept.

    Args:
        keep: [heads of the group, kept] indices.
    """
    gains = np.zeros((site.group.heads, site.heads // site.group.heads, site.group.size))
    for own, tied, stay in zip(gains, _by_group_head(site, overlap), keep, strict=True):
        for row, matrix in zip(own, tied, strict=True):
            row[stay] = best_gains(matrix, stay)
    labels = [*site.head_atoms, site.group.atom]
    graph, dependencies = analysis.graph, analysis.dependencies
    gains = gains.reshape([dependencies.size(atom) for atom in labels])
    return {name: spread(gains, labels, name, graph, dependencies) for name in site.constants}


def scaled(weights: Mapping[str, np.ndarray], factors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The constants times their factors, in their own types."""
    return {
        name: (weights[name].astype(np.float64) * factor).astype(weights[name].dtype)
        for name, factor in factors.items()
    }


def _by_group_head(site: GainSite, overlap: Overlap) -> np.ndarray:
    """H as [heads that keep pairs of their own, heads tied to them, size, size]."""
    size = site.group.size
    return overlap.mean.reshape(site.group.heads, -1, size, size)


def spread(gains: np.ndarray, labels: list[int], name: str, graph: Graph, dependencies: Dependencies) -> np.ndarray:
    """Gains with one dimension per factor in `labels`, laid out along the axes of a constant.

    Args:
        labels: all of them factors of the constant, each on one axis only.

    Returns:
        In the shape of the constant.
    """
    array = graph.weights[name]
    axes = [dependencies.atoms(name, axis) for axis in range(array.ndim)]
    mine = [atom for atoms in axes for atom in atoms if atom in labels]
    view = gains.transpose([labels.index(atom) for atom in mine])
    fine = [dependencies.size(atom) if atom in labels else 1 for atoms in axes for atom in atoms]
    whole = [dependencies.size(atom) for atoms in axes for atom in atoms]
    return np.broadcast_to(view.reshape(fine), whole).reshape(array.shape)
