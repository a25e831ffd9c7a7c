"""The baselines against their literal forms."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxsnp.scoring.magnitude import geometric_median_scores, l2_scores, random_scores


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 20), st.integers(1, 12), st.floats(1e-6, 1e6))
def test_equal_the_literal_equations(seed, n, fan_in, scale):
    filters = np.random.default_rng(seed).standard_normal((n, fan_in)) * scale
    median = [sum(np.linalg.norm(w - other) for other in filters) for w in filters]
    np.testing.assert_allclose(l2_scores(filters), [np.linalg.norm(w) for w in filters], rtol=1e-12)
    np.testing.assert_allclose(geometric_median_scores(filters), median, rtol=1e-6)


def test_equal_filters_have_no_distance():
    assert geometric_median_scores(np.full((6, 9), 0.1, dtype=np.float32)) == pytest.approx([0.0] * 6, abs=1e-7)


def test_the_filter_at_the_median_goes_first():
    filters = np.vstack([np.eye(4), -np.eye(4), np.full((1, 4), 0.01)])
    assert geometric_median_scores(filters).argmin() == 8


def test_a_common_offset_does_not_matter_to_the_median():
    filters = np.random.default_rng(0).standard_normal((20, 8))
    np.testing.assert_allclose(geometric_median_scores(filters + 1e6), geometric_median_scores(filters), rtol=1e-6)


def test_random_is_reproducible():
    assert np.array_equal(random_scores(50, np.random.default_rng(7)), random_scores(50, np.random.default_rng(7)))
    assert len(set(random_scores(50, np.random.default_rng(7)))) == 50


@pytest.mark.parametrize("scores", [l2_scores, geometric_median_scores])
def test_bad_shape_is_refused(scores):
    with pytest.raises(ValueError, match="fan_in"):
        scores(np.ones((2, 2, 2)))
