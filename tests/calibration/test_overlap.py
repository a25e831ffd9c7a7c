"""The overlap of pairs is that of the scores themselves, which are never formed."""

from __future__ import annotations

import numpy as np
import pytest

from onnxsnp.calibration.overlap import Overlap
from onnxsnp.errors import DataError

IMAGES, HEADS, ROWS, COLUMNS, SIZE = 3, 2, 7, 5, 4


def operands(shared: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Queries [images * shared, heads, rows, size] and keys [images, heads, columns, size], away from zero."""
    rng = np.random.default_rng(0)
    q = rng.standard_normal((IMAGES * shared, HEADS, ROWS, SIZE)) + 0.5
    return q, rng.standard_normal((IMAGES, HEADS, COLUMNS, SIZE)) + 1.0


def gram(x: np.ndarray) -> np.ndarray:
    return np.swapaxes(x, 2, 3) @ x


def naive(q: np.ndarray, k: np.ndarray, centred: bool) -> np.ndarray:
    """E[s sᵀ] over explicit contributions to every score."""
    parts = np.einsum("nhti,nhui->nhtui", q, k)
    if centred:
        parts = parts - parts.mean(axis=3, keepdims=True)
    flat = np.moveaxis(parts, 1, 0).reshape(HEADS, -1, SIZE)
    return np.swapaxes(flat, 1, 2) @ flat / flat.shape[1]


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("shared", [1, 3])
def test_overlap_is_the_second_moment_of_the_contributions(shared: int, centred: bool) -> None:
    q, k = operands(shared)
    found = Overlap.empty(HEADS, SIZE)
    for image in range(IMAGES):  # in parts, as batches come
        queries, keys = q[image * shared : (image + 1) * shared], k[image : image + 1]
        found.add(gram(queries), gram(keys), (ROWS, COLUMNS), keys.mean(axis=2) if centred else None)
    assert found.scores == IMAGES * shared * ROWS * COLUMNS
    np.testing.assert_allclose(found.mean, naive(q, np.repeat(k, shared, axis=0), centred), rtol=1e-10)


def test_what_is_not_finite_is_refused() -> None:
    q, k = (gram(x) for x in operands())
    q[0, 0, 0, 0] = np.inf
    with pytest.raises(DataError):
        Overlap.empty(HEADS, SIZE).add(q, k, (ROWS, COLUMNS))
