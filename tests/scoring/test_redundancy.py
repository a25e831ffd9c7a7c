"""Eq. 7 against its literal form and planted truths."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxsnp.scoring.redundancy import redundancy_scores


def literal(filters):
    n = len(filters)
    scores = np.zeros(n)
    for i in range(n):
        for other in filters:
            length = np.linalg.norm(filters[i]) * np.linalg.norm(other)
            scores[i] += 1 - (abs(filters[i] @ other) / length if length > 0 else 0)
    return scores


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 20), st.integers(1, 12))
def test_equals_the_literal_equation(seed, n, fan_in):
    filters = np.random.default_rng(seed).standard_normal((n, fan_in)) * 10.0 ** np.arange(n)[:, None]
    filters[n // 2] *= seed % 2
    np.testing.assert_allclose(redundancy_scores(filters), literal(filters), rtol=1e-5, atol=1e-5 * n)


def test_duplicates_go_first_whatever_their_sign_and_length():
    filters = np.random.default_rng(0).standard_normal((30, 2000)).astype(np.float32)
    filters[11] = -7 * filters[4]
    scores = redundancy_scores(filters)
    assert set(np.argsort(scores)[:2]) == {4, 11}
    assert scores[4] == pytest.approx(scores[11], rel=1e-6)


def test_zero_filter_has_cosine_zero_with_everything():
    filters = np.random.default_rng(0).standard_normal((10, 20))
    filters[3] = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores = redundancy_scores(filters)
        assert redundancy_scores(np.zeros((2, 3))).tolist() == [2, 2]
        assert redundancy_scores(np.zeros((0, 3))).shape == (0,)
        assert redundancy_scores(np.array([[1e-300, 0], [1e300, 1e300]])) == pytest.approx([1 - 0.5**0.5] * 2)
    assert scores[3] == 10
    np.testing.assert_allclose(np.delete(scores, 3) - 1, redundancy_scores(np.delete(filters, 3, axis=0)), rtol=1e-5)


def test_orthogonal_filters_and_integers():
    np.testing.assert_allclose(redundancy_scores(np.eye(5, dtype=np.int64) * 3), [4.0] * 5)


def test_float32_product_ranks_as_float64():
    filters = np.random.default_rng(0).standard_normal((400, 192)).astype(np.float32)
    unit = filters.astype(np.float64) / np.linalg.norm(filters.astype(np.float64), axis=1, keepdims=True)
    exact = 400 - np.abs(unit @ unit.T).sum(axis=1)
    assert np.array_equal(np.argsort(redundancy_scores(filters)), np.argsort(exact))


def test_bad_shape_is_refused():
    with pytest.raises(ValueError, match="fan_in"):
        redundancy_scores(np.ones(4))
