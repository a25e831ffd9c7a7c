"""Ridge least squares for the projection behind a cut: what the kept neurons can say of the cut ones, they say.

METHODS: the consumer y = x W + b of a width of K neurons keeps the indices S. With the covariance C and the mean μ of x
on the calibration data, minimise E‖y − x_S W' − b'‖² + λ‖W' − W_S‖²:

    W' = (C_SS + λI)⁻¹ (C_S: W + λ W_S),      b' = b + μ W − μ_S W'.

This is the least-squares form used for V and the FFN alike (kin: ZipLM arXiv 2302.04089, MoDeGPT arXiv 2408.09632).
The ridge pulls towards the plain selection W_S, so with little data the fit falls back to the paper's cut.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from scipy import linalg

from onnxsnp.calibration.statistics import Moments
from onnxsnp.graph.dependency import Dependencies
from onnxsnp.graph.groups import Group
from onnxsnp.graph.ir import Graph
from onnxsnp.graph.linear import Linear
from onnxsnp.surgery.rewrite import Cut, cut_array, spread

RIDGE = 1e-3  # of the mean diagonal of the covariance


def refittable(group: Group, linears: Mapping[str, Linear]) -> list[Linear]:
    """The projections whose input is the group's neurons as features, so that they can be refitted."""
    if group.kind not in ("v", "ffn", "head"):
        return []
    found = [linears[weight] for weight, axis in group.consumers if weight in linears and linears[weight].inner == axis]
    rows = {linear.data for linear in linears.values() if linear.op != "Conv"}  # what has its features on the last axis
    images = [linear for linear in found if linear.pointwise and linear.data not in rows and group.kind != "head"]
    return [linear for linear in found if linear.plain or linear in images]


def solve(
    weight: np.ndarray, moments: Moments, keep: np.ndarray, *, centred: bool, ridge: float = RIDGE
) -> tuple[np.ndarray, np.ndarray]:
    """The refitted consumer of the kept neurons.

    Args:
        weight: W, [K, out].
        moments: of the consumer's input, width K.
        keep: indices that stay, [kept].
        centred: True where the consumer has a bias that can take up the change of the mean.

    Returns:
        W' [kept, out] and the change of the bias [out] (zeros if not centred), float64.
    """
    second = moments.covariance if centred else moments.second / max(moments.count, 1)
    full = weight.astype(np.float64)
    inner = second[np.ix_(keep, keep)]
    strength = ridge * float(np.trace(second)) / len(second) + np.finfo(np.float64).tiny
    target = second[keep] @ full + strength * full[keep]
    refit = solve_positive(inner + strength * np.eye(len(keep)), target)
    shift = moments.mean @ full - moments.mean[keep] @ refit if centred else np.zeros(full.shape[1])
    return refit, shift


def solve_positive(matrix: np.ndarray, target: np.ndarray) -> np.ndarray:
    """matrix⁻¹ target for a symmetric positive definite matrix; least squares where round-off made it singular."""
    try:
        return linalg.cho_solve(linalg.cho_factor(matrix, check_finite=False), target, check_finite=False)
    except linalg.LinAlgError:
        return linalg.lstsq(matrix, target)[0]


def refit_consumers(
    graph: Graph,
    dependencies: Dependencies,
    groups: Sequence[Group],
    cuts: Mapping[str, Cut],
    linears: Mapping[str, Linear],
    moments: Mapping[str, Moments],
) -> dict[str, np.ndarray]:
    """Refit every consumer of the cut value and FFN groups.

    Args:
        cuts: by group id.
        moments: by tensor name, of the consumers' inputs.

    Returns:
        New weights by name in their original shapes (cut rows are zero), in the weights' own types.
    """
    updates: dict[str, np.ndarray] = {}
    mine = {group.id: group for group in groups if group.id in cuts}
    by_weight: dict[str, list[Cut]] = {}
    used: dict[str, Linear] = {}
    for group in mine.values():
        for linear in refittable(group, linears):
            by_weight.setdefault(linear.weight, []).append(cuts[group.id])
            used[linear.weight] = linear
    for name, linear in used.items():
        if linear.data not in moments:
            continue
        array = graph.weights[name]
        moved = np.moveaxis(array, linear.inner, 0)
        matrix = moved.reshape(len(moved), -1)
        axes = [dependencies.atoms(name, linear.inner)]
        taken = spread(dependencies, by_weight[name])
        keep = cut_array(np.arange(array.shape[linear.inner]), axes, dependencies.size, taken)
        refit, shift = solve(matrix, moments[linear.data], keep, centred=linear.bias is not None)
        full = np.zeros(matrix.shape)
        full[keep] = refit
        updates[name] = np.moveaxis(full.reshape(moved.shape), 0, linear.inner).astype(array.dtype)
        if linear.bias is not None:
            bias = graph.weights[linear.bias]
            updates[linear.bias] = (bias + shift.reshape(bias.shape)).astype(bias.dtype)
    return updates
