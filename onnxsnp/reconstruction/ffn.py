"""Optimal brain surgeon for a width behind a nonlinearity: which neurons go, and what that costs after the refit.

METHODS 2.3; for the output error of one layer as in ZipLM (arXiv 2302.04089) and SlimGPT (arXiv 2412.18110), after
Hassibi and Stork (1992). The consumer y = x W reads K neurons whose covariance on the calibration data is C. With
Ci = (C + λI)⁻¹, the least that removing neuron p can cost when all others may be refitted to take over its part is

    s_p = ‖W_p‖² / Ci_pp,   and then   W ← W − Ci_:p W_p / Ci_pp,   Ci ← Ci − Ci_:p Ci_p: / Ci_pp.

The neuron with the smallest s goes, and so on. After every step W is the solution of

    min E‖x W₀ − x W‖² + λ‖W − W₀‖²   over the W that are zero in the removed rows,

and the sum of the s so far is this minimum: the exact error curve of the order, good for the allocation. The same W is
what `refit.solve` gives for the kept set (exact ridge least squares with the same λ), so this module only chooses. The
new weights, and the bias that takes up the change of the mean, are left to `refit.solve`.

How it is fast: Ci shrinks exactly as in a Cholesky factorisation of Ci with pivots chosen by s (compare LAPACK's
dpstrf). Of W only the scalar products of its rows are needed, G = W Wᵀ, and their update has the same form. So the K×K
matrices stay as they were for a panel of `block` removals. Within it only the columns that are asked for are brought up
to date, from the panel's own rows, and at its end the panel is subtracted as one matrix product. Every choice is still
that of the plain sequential greedy.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import linalg

from onnxsnp.reconstruction.refit import RIDGE

BLOCK = 96  # removals per matrix product; 64 to 128 are alike
MIN_RIDGE = 1e-10  # of the mean diagonal: below it the inverse of a singular covariance is rounding noise
COMPACT = 1 / 8  # share of removed rows at which the matrices are copied without them
STRIPE = 256  # rows per product in an update, so that temporaries stay in the cache


@dataclass(frozen=True)
class Removal:
    """A greedy order of removal and its error curve.

    Attributes:
        order: indices of the removed neurons in the order they go, [removed].
        errors: after each removal, E‖y − y'‖² per token of the best refit, summed over the consumer's outputs, plus its
            ridge term λ‖W − W'‖² (both in the square of the output's unit); [removed], never decreasing.
    """

    order: np.ndarray
    errors: np.ndarray


def removal_order(
    weight: np.ndarray,
    covariance: np.ndarray,
    remove: int,
    *,
    ridge: float = RIDGE,
    block: int | None = None,
    first: np.ndarray | None = None,
) -> Removal:
    """Remove neurons one by one, each time the one whose loss the others make up for best.

    Args:
        weight: W of the consumer, [K, out]. Of several consumers: side by side, [K, sum of outs].
        covariance: of the neurons, [K, K]; the second moments E[xᵀx] where the consumer has no bias to refit.
        remove: how many go, 0 to K − 1. The order does not depend on it, so K − 1 gives the curve for every width.
        ridge: λ as a share of the mean diagonal of the covariance, as in `refit.solve`; at least `MIN_RIDGE`.
        block: removals per panel, for speed only: the order is that of the sequential greedy for every value.
        first: bool, [K]; neurons known to be dead (constant, or all their weights zero). They go before all others, in
            the order of their indices, and are charged nothing, not even their ridge term.

    Raises:
        ValueError: shapes that do not fit, `remove` out of range, or values that are not finite.
    """
    _check(weight, covariance, remove, first)
    dead = np.flatnonzero(first)[:remove] if first is not None else np.zeros(0, np.int64)
    live = np.setdiff1d(np.arange(len(weight)), dead)
    # In units of the mean variance, so that the numbers below are of order one whatever the scale of the activations.
    unit = float(np.trace(covariance)) / len(covariance)
    scaled = covariance[np.ix_(live, live)].astype(np.float64) / (unit if unit > 0 else 1.0)
    order, steps = _surgeon(
        weight[live].astype(np.float64), scaled, remove - len(dead), max(ridge, MIN_RIDGE), max(block or BLOCK, 1)
    )
    errors = np.concatenate([np.zeros(len(dead)), np.cumsum(steps) * max(unit, 0.0)])
    return Removal(np.concatenate([dead, live[order]]), errors)


def _check(weight: np.ndarray, covariance: np.ndarray, remove: int, first: np.ndarray | None) -> None:
    width = len(weight)
    if weight.ndim != 2 or covariance.shape != (width, width) or (first is not None and first.shape != (width,)):
        raise ValueError(
            f"weight {weight.shape} and covariance {covariance.shape} must be [K, out] and [K, K], first [K]"
        )
    if not 0 <= remove < max(width, 1):
        raise ValueError(f"cannot remove {remove} of {width} neurons: at least one has to stay")
    if not (np.isfinite(weight).all() and np.isfinite(covariance).all()):
        raise ValueError("weight and covariance must be finite")


def _surgeon(
    weight: np.ndarray, covariance: np.ndarray, remove: int, ridge: float, block: int
) -> tuple[np.ndarray, np.ndarray]:
    """Order of removal [remove] and the cost of each step [remove], for a covariance of unit scale."""
    left = np.arange(len(weight))
    gone = np.zeros(len(weight), bool)
    order: list[np.ndarray] = []
    costs: list[np.ndarray] = []
    if remove <= 0:
        return np.zeros(0, np.int64), np.zeros(0)
    inverse, floor = _inverse(covariance, ridge)
    gram = weight @ weight.T
    while remove > 0:
        panel = _Panel(inverse, gram, floor, gone, min(block, remove))
        order.append(left[panel.chosen])
        costs.append(panel.costs)
        remove -= len(panel.chosen)
        gone[panel.chosen] = True
        if remove > 0:
            panel.subtract()
            if gone.sum() > COMPACT * len(gone):
                kept = np.flatnonzero(~gone)
                inverse, gram = inverse[np.ix_(kept, kept)], gram[np.ix_(kept, kept)]
                left, floor, gone = left[kept], floor[kept], gone[kept]
    return np.concatenate(order), np.concatenate(costs)


class _Panel:
    """A run of removals from matrices that stay as they are until `subtract`.

    With Ci and W as at the start, p the neuron of step i, Ci' and W' the matrices just before that step, it holds

        y_i = Ci'_:p / √Ci'_pp   [width],   z_i = W'_p / √Ci'_pp   [out, only in products],   u_i = W z_iᵀ   [width],

    so that the current matrices are Ci − yᵀy and W − yᵀz, and those products follow from G = W Wᵀ.

    Attributes:
        chosen: neurons in the order they go, [steps].
        costs: s of each at its time, [steps].
    """

    def __init__(self, inverse: np.ndarray, gram: np.ndarray, floor: np.ndarray, gone: np.ndarray, steps: int) -> None:
        self._inverse, self._gram = inverse, gram
        self._y = np.zeros((steps, len(gone)))
        self._u = np.zeros((steps, len(gone)))
        self._zz = np.zeros((steps, steps))  # z_i · z_j
        self.chosen = np.zeros(steps, np.int64)
        self.costs = np.zeros(steps)
        pivots, norms = inverse.diagonal().copy(), gram.diagonal().copy()  # current Ci_pp and ‖W_p‖²
        barred = np.where(gone, np.inf, 0.0)
        for step in range(steps):
            scores = np.maximum(norms, 0.0) / np.maximum(pivots, floor) + barred
            neuron = int(scores.argmin())
            y, product = self._remove(step, neuron, float(floor[neuron]))
            pivots -= y * y
            norms -= y * (2 * product - y * self.costs[step])
            barred[neuron] = np.inf

    def _remove(self, step: int, neuron: int, floor: float) -> tuple[np.ndarray, np.ndarray]:
        """Fill row `step`; returns y and W' zᵀ of it, both [width]."""
        y, u, zz = self._y[:step], self._u[:step], self._zz[:step, :step]
        past = y[:, neuron]
        rows_w = u[:, neuron] - zz @ past  # z_i · W'_p for the steps so far
        column, removed = np.stack([past, rows_w]) @ y
        column = self._inverse[neuron] - column
        root = max(float(column[neuron]), floor) ** 0.5
        self._y[step] = column / root
        self._u[step] = (self._gram[neuron] - past @ u) / root
        self._zz[step, :step] = self._zz[:step, step] = rows_w / root
        product = self._u[step] - removed / root
        cost = max(float(product[neuron]), 0.0) / root
        self._zz[step, step] = cost
        self.chosen[step], self.costs[step] = neuron, cost
        return self._y[step], product

    def subtract(self) -> None:
        """Bring the matrices up to date, in place: Ci − yᵀy and (W − yᵀz)(W − yᵀz)ᵀ."""
        half = self._u - self._zz @ self._y / 2
        _subtract(self._inverse, self._y, self._y)
        _subtract(self._gram, np.concatenate([half, self._y]), np.concatenate([self._y, half]))


def _subtract(matrix: np.ndarray, left: np.ndarray, right: np.ndarray) -> None:
    """matrix −= leftᵀ right where the product [K, K] is symmetric: one triangle is computed, the other copied."""
    for start in range(0, len(matrix), STRIPE):
        rows = slice(start, start + STRIPE)
        matrix[rows, start:] -= left[:, rows].T @ right[:, start:]
        matrix[start + STRIPE :, rows] = matrix[rows, start + STRIPE :].T


def _inverse(covariance: np.ndarray, ridge: float) -> tuple[np.ndarray, np.ndarray]:
    """(C + ridge I)⁻¹, exactly symmetric, [K, K], and what its diagonal cannot fall below in any removal, [K].

    That bound, 1 / (C_pp + ridge), is the pivot of the last neuron left: it keeps rounding out of the divisions.
    """
    regular = (covariance + covariance.T) / 2
    every = np.s_[:: len(regular) + 1]
    regular.flat[every] += ridge
    factor, failed = linalg.lapack.dpotrf(regular, lower=1)
    if failed:  # sums of single precision products can leave eigenvalues below −ridge: they stand for zero
        regular.flat[every] -= ridge
        values, vectors = np.linalg.eigh(regular)
        values = np.maximum(values, 0.0) + ridge
        spread = vectors / np.sqrt(values)
        return spread @ spread.T, 1 / (vectors**2 @ values)
    floor = 1 / regular.diagonal()
    half = np.tril(linalg.lapack.dpotri(factor, lower=1, overwrite_c=1)[0])
    diagonal = half.diagonal().copy()
    half += half.T
    half.flat[every] = diagonal
    return np.ascontiguousarray(half), floor
