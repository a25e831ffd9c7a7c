"""The baselines: length of a filter, its distance to the others, and chance. The lowest scores go first."""

from __future__ import annotations

import numpy as np


def l2_scores(filters: np.ndarray) -> np.ndarray:
    """``‖w_i‖``: float64 [n] of filters [n, fan_in], in the unit of the weights.

    Raises:
        ValueError: if filters is not two-dimensional.
    """
    return np.sqrt(_energies(_checked(filters)))


def geometric_median_scores(filters: np.ndarray) -> np.ndarray:
    """``Σ_l ‖w_i − w_l‖``: float64 [n] of filters [n, fan_in], in the unit of the weights.

    The filter with the lowest sum lies nearest the geometric median and is the one the others replace best.
    Source: He et al., "Filter pruning via geometric median" (FPGM), CVPR 2019, eq. 4-6.

    Raises:
        ValueError: if filters is not two-dimensional.
    """
    rows = _checked(filters)
    rows = rows - rows.mean(axis=0)  # distances do not change, and less is lost to cancellation in the next lines
    energies = _energies(rows)
    squares = rows @ rows.T
    squares *= -2.0
    squares += energies[:, None]
    squares += energies[None, :]
    np.maximum(squares, 0.0, out=squares)  # equal filters come out at ±1e-16 of their energy
    np.fill_diagonal(squares, 0.0)
    distances: np.ndarray = np.sqrt(squares, out=squares).sum(axis=1)
    return distances


def random_scores(n: int, rng: np.random.Generator) -> np.ndarray:
    """Float64 [n], uniform in [0, 1): the criterion that knows nothing. The same generator state, the same scores."""
    return rng.random(n)


def _checked(filters: np.ndarray) -> np.ndarray:
    if filters.ndim != 2:
        raise ValueError(f"expected filters [n, fan_in], got shape {filters.shape}")
    return filters.astype(np.float64)


def _energies(rows: np.ndarray) -> np.ndarray:
    energies: np.ndarray = np.einsum("ij,ij->i", rows, rows)
    return energies
