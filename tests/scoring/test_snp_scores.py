"""Query-key scores against eq. 4-6 written with N×N matrices, and against planted truths."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from threadpoolctl import threadpool_info

from onnxsnp.errors import DataError
from onnxsnp.scoring.snp import qk_scores
from onnxsnp.scoring.vbmf import evbmf_rank


def literal_scores(q, k, rank=None):
    """Eq. 4-6 for one image and head: cosines of flattened N×N products, one pair and one component at a time."""
    size = q.shape[1]
    u, sigma, vt = np.linalg.svd(q @ k.T)
    given_values = sigma[:size].copy()
    given_values[given_values < 1e-7 * given_values[0]] = 0
    r = int(evbmf_rank(given_values, len(q), len(k))) if rank is None else rank
    scores = np.zeros(size)
    for i in range(size):
        pair = np.outer(q[:, i], k[:, i])
        for j in range(min(r, len(sigma))):
            component = sigma[j] * np.outer(u[:, j], vt[j])
            length = np.linalg.norm(pair) * np.linalg.norm(component)
            if length > 0 and sigma[j] > 1e-7 * sigma[0]:  # a zero component has no direction
                scores[i] += abs(np.sum(pair * component)) / length
    return scores


def grams(x):
    return np.swapaxes(x, -1, -2) @ x


def sample(rng, images=3, heads=2, tokens=(17, 17), size=6, decay=0.7):
    """Q and K [images, heads, tokens, size] that share a decaying mixture, as real ones do."""
    mix = rng.standard_normal((heads, size, size)) * decay ** np.arange(size)[:, None]
    return tuple(rng.standard_normal((images, heads, n, size)) @ mix for n in tokens)


def literal_sum(q, k, rank=None):
    images = zip(q, k, strict=True)
    return sum(np.array([literal_scores(*pair, rank) for pair in zip(*image, strict=True)]) for image in images)


@pytest.mark.parametrize("rank", [None, 1, 3, 6])
@pytest.mark.parametrize("tokens", [(17, 17), (12, 25)])
def test_equals_the_literal_equation(rank, tokens):
    q, k = sample(np.random.default_rng(0), tokens=tokens)
    ours = qk_scores(grams(q), grams(k), *tokens, rank=rank)
    np.testing.assert_allclose(ours, literal_sum(q, k, rank), rtol=1e-6)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 8), st.integers(1, 12), st.integers(1, 12))
def test_equals_the_literal_equation_at_any_size(seed, size, tokens_q, tokens_k):
    """Also with fewer tokens than neurons, where the Gram matrices are singular."""
    q, k = sample(np.random.default_rng(seed), 1, 1, (tokens_q, tokens_k), size, 0.9)
    ours = qk_scores(grams(q), grams(k), tokens_q, tokens_k, rank=1)
    np.testing.assert_allclose(ours, literal_sum(q, k, 1), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("rank", [None, 4])
def test_fewer_tokens_than_neurons(rank):
    q, k = sample(np.random.default_rng(5), tokens=(5, 5), size=9, decay=0.9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = qk_scores(grams(q), grams(k), 5, 5, rank=rank)
    np.testing.assert_allclose(ours, literal_sum(q, k, rank), rtol=1e-6)


def test_float32_grams_are_close():
    q, k = sample(np.random.default_rng(1), tokens=(40, 40), size=16, decay=0.6)
    exact = qk_scores(grams(q), grams(k), 40, 40, rank=6)
    rounded = qk_scores(grams(q.astype(np.float32)), grams(k.astype(np.float32)), 40, 40, rank=6)
    np.testing.assert_allclose(rounded, exact, rtol=1e-3)


def test_float32_grams_of_few_tokens_stay_within_bounds():
    q, k = (x.astype(np.float32) for x in sample(np.random.default_rng(1), tokens=(7, 7), size=16))
    scores = qk_scores(grams(q), grams(k), 7, 7, rank=16)
    assert np.isfinite(scores).all()
    assert scores.min() >= 0


@pytest.mark.parametrize("rank", [None, 3])
def test_dead_neurons_score_zero_and_change_nothing_else(rank):
    q, k = sample(np.random.default_rng(2))
    before = qk_scores(grams(q), grams(k), 17, 17, rank=rank)
    dead_q, dead_k = q.copy(), k.copy()
    dead_q[..., 2] = 0
    dead_k[..., 4] = 0
    alive = [0, 1, 3, 5]
    after = qk_scores(grams(dead_q), grams(dead_k), 17, 17, rank=rank)
    assert (after[:, [2, 4]] == 0).all()
    alone = qk_scores(grams(q[..., alive]), grams(k[..., alive]), 17, 17, rank=rank)
    np.testing.assert_allclose(after[:, alive], alone, rtol=1e-6)
    padded = qk_scores(*(grams(np.pad(x, ((0, 0),) * 3 + ((0, 2),))) for x in (q, k)), 17, 17, rank=rank)
    np.testing.assert_allclose(padded[:, :6], before, rtol=1e-6)
    assert (padded[:, 6:] == 0).all()


def test_all_zero_gives_zero_without_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (qk_scores(np.zeros((2, 1, 4, 4)), np.zeros((2, 1, 4, 4)), 5, 5) == 0).all()


def test_the_pair_that_carries_the_scores_is_highest():
    rng = np.random.default_rng(0)
    q, k = (rng.standard_normal((4, 1, 60, 12)) for _ in range(2))
    q[..., 7] *= 20
    k[..., 7] *= 20
    assert qk_scores(grams(q), grams(k), 60, 60)[0].argmax() == 7


def test_duplicated_pairs_score_alike():
    q, k = sample(np.random.default_rng(3))
    q[..., 1], k[..., 1] = q[..., 5], k[..., 5]
    scores = qk_scores(grams(q), grams(k), 17, 17)
    np.testing.assert_allclose(scores[:, 1], scores[:, 5], rtol=1e-6)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(1e-4, 1e4), st.floats(-1e4, -1e-4))
def test_invariant_to_scale_sign_token_order_and_basis_of_tokens(seed, scale_q, scale_k):
    rng = np.random.default_rng(seed)
    q, k = sample(rng, images=1, heads=1)
    before = qk_scores(grams(q), grams(k), 17, 17)
    rotation = np.linalg.qr(rng.standard_normal((17, 17)))[0]
    np.testing.assert_allclose(qk_scores(grams(q * scale_q), grams(k * scale_k), 17, 17), before, rtol=1e-6)
    np.testing.assert_allclose(qk_scores(grams(rotation @ q), grams(rotation.T @ k), 17, 17), before, rtol=1e-6)


def test_neurons_permute_and_sides_exchange():
    q, k = sample(np.random.default_rng(4))
    before = qk_scores(grams(q), grams(k), 17, 17)
    order = [3, 0, 5, 1, 2, 4]
    permuted = qk_scores(grams(q[..., order]), grams(k[..., order]), 17, 17)
    np.testing.assert_allclose(permuted, before[:, order], rtol=1e-6)
    np.testing.assert_allclose(qk_scores(grams(k), grams(q), 17, 17), before, rtol=1e-6)


def test_batches_add_up_and_threads_do_not_matter():
    q, k = (grams(x) for x in sample(np.random.default_rng(6), images=40, heads=3, tokens=(30, 30), size=48))
    whole = qk_scores(q, k, 30, 30, threads=1)
    assert np.array_equal(qk_scores(q, k, 30, 30, threads=4), whole)
    parts = sum(qk_scores(q[start : start + 16], k[start : start + 16], 30, 30) for start in range(0, 40, 16))
    np.testing.assert_allclose(parts, whole, rtol=1e-9)
    assert qk_scores(q[:0], k[:0], 30, 30).tolist() == np.zeros((3, 48)).tolist()


def test_blas_thread_count_is_restored():
    before = threadpool_info()
    qk_scores(np.eye(4)[None, None], np.eye(4)[None, None], 9, 9)
    bad = np.full((1, 1, 4, 4), np.nan)
    with pytest.raises(DataError, match="not finite"):
        qk_scores(bad, bad, 9, 9)
    assert [one["num_threads"] for one in threadpool_info()][: len(before)] == [one["num_threads"] for one in before]


def test_bad_shapes_are_refused():
    with pytest.raises(ValueError, match="images, heads, d, d"):
        qk_scores(np.ones((1, 2, 3, 4)), np.ones((1, 2, 3, 4)), 5, 5)
    with pytest.raises(ValueError, match="at least 1"):
        qk_scores(np.ones((1, 1, 2, 2)), np.ones((1, 1, 2, 2)), 5, 5, rank=0)
