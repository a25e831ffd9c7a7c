"""New pairs and values of a head: the best of every rank, measured on samples, and softmax that does not notice."""

from __future__ import annotations

import numpy as np
import pytest

from onnxsnp.reconstruction.attention import ValueBasis, complementary_bases, pair_basis, roots, value_basis

IMAGES, QUERIES, KEYS, SIZE = 5, 7, 11, 6


def correlated(seed: int, *shape: int, mean: float = 2.0) -> np.ndarray:
    """Correlated columns of very different spread, with a mean of their own for every leading index."""
    rng = np.random.default_rng(seed)
    size = shape[-1]
    mixing = rng.standard_normal((size, size)) * np.geomspace(2, 0.1, size)
    return rng.standard_normal(shape) @ mixing + mean * rng.standard_normal((*shape[:-2], 1, size))


def queries_and_keys(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    return correlated(seed, IMAGES, QUERIES, SIZE), correlated(seed + 1, IMAGES, KEYS, SIZE)


def moments(q: np.ndarray, k: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """E[qᵀq] and E[(k − k̄)ᵀ(k − k̄)], token by token as the definitions read."""
    second_q, second_k = np.zeros((SIZE, SIZE)), np.zeros((SIZE, SIZE))
    for image in range(len(q)):
        for row in q[image]:
            second_q += np.outer(row, row) / (len(q) * q.shape[1])
        mean = k[image].mean(axis=0)
        for row in k[image]:
            second_k += np.outer(row - mean, row - mean) / (len(k) * k.shape[1])
    return second_q, second_k


def softmax(scores: np.ndarray) -> np.ndarray:
    shifted = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return shifted / shifted.sum(axis=-1, keepdims=True)


def all_scores(q: np.ndarray, k: np.ndarray) -> np.ndarray:
    """Every query of every image against every centred key of every image, [queries, keys]."""
    centred = k - k.mean(axis=1, keepdims=True)
    return q.reshape(-1, SIZE) @ centred.reshape(-1, SIZE).T


@pytest.mark.parametrize("seed", range(4))
def test_the_leading_pairs_are_the_best_that_any_rank_can_do(seed: int) -> None:
    q, k = queries_and_keys(10 * seed)
    basis = pair_basis(*moments(q, k))
    full = all_scores(q, k)
    left, sigma, right = np.linalg.svd(full, full_matrices=False)
    for rank in range(SIZE + 1):
        brute = (left[:, :rank] * sigma[:rank]) @ right[:rank]  # Eckart-Young: nothing of this rank is closer
        mine = all_scores_of_basis(q, k, basis.query[:, :rank], basis.key[:, :rank])
        least = np.mean((full - brute) ** 2)
        np.testing.assert_allclose(np.mean((full - mine) ** 2), least, rtol=1e-6, atol=1e-12 * np.mean(full**2))
        np.testing.assert_allclose(basis.errors[rank], least, rtol=1e-6, atol=1e-12 * np.mean(full**2))
        np.testing.assert_allclose(mine, brute, atol=1e-6 * np.abs(full).max())


def all_scores_of_basis(q: np.ndarray, k: np.ndarray, query: np.ndarray, key: np.ndarray) -> np.ndarray:
    centred = (k - k.mean(axis=1, keepdims=True)).reshape(-1, SIZE)
    return (q.reshape(-1, SIZE) @ query) @ (centred @ key).T


@pytest.mark.parametrize("seed", range(3))
def test_no_selection_of_pairs_even_with_a_refit_beats_them(seed: int) -> None:
    q, k = queries_and_keys(seed)
    second_q, second_k = moments(q, k)
    basis = pair_basis(second_q, second_k)
    rng = np.random.default_rng(seed)
    full = all_scores(q, k)
    centred = (k - k.mean(axis=1, keepdims=True)).reshape(-1, SIZE)
    for rank in (1, 3, 5):
        keep = rng.permutation(SIZE)[:rank]
        middle = np.linalg.pinv(q.reshape(-1, SIZE)[:, keep]) @ full @ np.linalg.pinv(centred[:, keep].T)
        refitted = q.reshape(-1, SIZE)[:, keep] @ middle @ centred[:, keep].T
        assert basis.errors[rank] <= np.mean((full - refitted) ** 2) * (1 + 1e-9)


def test_errors_begin_with_everything_fall_and_end_with_nothing() -> None:
    q, k = queries_and_keys()
    second_q, second_k = moments(q, k)
    errors = pair_basis(second_q, second_k).errors
    assert errors.shape == (SIZE + 1,)
    assert errors[0] == pytest.approx(np.trace(second_q @ second_k)) == pytest.approx(np.mean(all_scores(q, k) ** 2))
    assert (np.diff(errors) < 0).all() and errors[-1] == 0
    covariance, weight = second_q, np.random.default_rng(0).standard_normal((SIZE, 9))
    errors = value_basis(covariance, weight).errors
    assert errors[0] == pytest.approx(np.sum((covariance @ weight) * weight))
    assert (np.diff(errors) < 0).all() and errors[-1] == 0


def test_all_pairs_give_the_scores_back_and_softmax_never_saw_the_mean_of_the_keys() -> None:
    q, k = queries_and_keys(3)
    basis = pair_basis(*moments(q, k))
    np.testing.assert_allclose(basis.query @ basis.key.T, np.eye(SIZE), atol=1e-9)
    scores = np.einsum("iqd,ikd->iqk", q, k)
    for other in (k - k.mean(axis=1, keepdims=True), k + np.arange(SIZE)):
        rotated = np.einsum("iqd,ikd->iqk", q @ basis.query, other @ basis.key)
        assert np.abs(rotated - scores).max() > 1
        np.testing.assert_allclose(softmax(rotated), softmax(scores), atol=1e-9)


def test_both_sides_get_the_same_share_of_each_pair() -> None:
    second_q, second_k = moments(*queries_and_keys())
    basis = pair_basis(second_q, second_k)
    new_q, new_k = basis.query.T @ second_q @ basis.query, basis.key.T @ second_k @ basis.key
    np.testing.assert_allclose(new_q, new_k, atol=1e-8 * np.trace(new_q))
    sigma = np.sqrt(-np.diff(basis.errors))
    np.testing.assert_allclose(new_q, np.diag(sigma), atol=1e-6 * sigma[0])


@pytest.mark.parametrize("rank_q, rank_k", [(3, 6), (6, 2), (3, 3), (4, 2)])
def test_low_rank_on_either_side_needs_no_more_pairs(rank_q: int, rank_k: int) -> None:
    rng = np.random.default_rng(7)
    q, k = queries_and_keys(5)
    q = q @ (rng.standard_normal((SIZE, rank_q)) @ rng.standard_normal((rank_q, SIZE)))
    k = k @ (rng.standard_normal((SIZE, rank_k)) @ rng.standard_normal((rank_k, SIZE)))
    basis = pair_basis(*moments(q, k))
    rank = min(rank_q, rank_k)
    full = all_scores(q, k)
    mine = all_scores_of_basis(q, k, basis.query[:, :rank], basis.key[:, :rank])
    assert np.isfinite(basis.query).all() and np.isfinite(basis.key).all()
    np.testing.assert_allclose(mine, full, atol=1e-4 * np.abs(full).max())
    assert basis.errors[rank] < 1e-5 * basis.errors[0] < 0.1 * basis.errors[rank - 1]


@pytest.mark.parametrize("zero", ["query", "key", "both"])
def test_dead_heads_and_single_tokens_do_not_break(zero: str) -> None:
    second_q, second_k = moments(*queries_and_keys())
    basis = pair_basis(second_q * (zero == "key"), second_k * (zero == "query"))
    assert np.isfinite(basis.query).all() and np.isfinite(basis.key).all() and np.isfinite(basis.errors).all()
    assert basis.errors[0] < 1e-100
    row = np.arange(1.0, SIZE + 1)
    basis = pair_basis(np.outer(row, row), np.outer(row, row))
    kept = (row @ basis.query[:, :1]) @ (row @ basis.key[:, :1])
    assert kept == pytest.approx(row @ row, rel=1e-4) and np.isfinite(basis.errors).all()


def test_roots_are_roots_and_their_inverses() -> None:
    second, _ = moments(*queries_and_keys())
    root, inverse = roots(second)
    np.testing.assert_allclose(root @ root, second, atol=1e-10 * np.trace(second))
    np.testing.assert_allclose(root @ inverse, np.eye(SIZE), atol=1e-9)
    noisy = second - 1e-9 * np.trace(second) * np.eye(SIZE) * (np.arange(SIZE) == 0)
    assert all(np.isfinite(one).all() for one in roots(noisy - np.linalg.eigvalsh(noisy)[0] * 1.0001 * np.eye(SIZE)))


def value_samples(seed: int, outputs: int, tokens: int = 400) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    x = correlated(seed, tokens, SIZE)
    x = x - x.mean(axis=0)
    return x, x.T @ x / tokens, np.random.default_rng(seed).standard_normal((SIZE, outputs))


@pytest.mark.parametrize("outputs", [9, 6, 3])
@pytest.mark.parametrize("seed", range(3))
def test_the_leading_values_are_the_best_that_any_rank_can_do(seed: int, outputs: int) -> None:
    x, covariance, weight = value_samples(seed, outputs)
    basis = value_basis(covariance, weight)
    full = x @ weight
    left, sigma, right = np.linalg.svd(full, full_matrices=False)
    for rank in range(1, SIZE + 1):
        brute = (left[:, :rank] * sigma[:rank]) @ right[:rank]
        fresh = x @ basis.basis[:, :rank]
        mine = fresh @ np.linalg.lstsq(fresh, full, rcond=None)[0]
        least = np.sum((full - brute) ** 2) / len(x)
        np.testing.assert_allclose(np.sum((full - mine) ** 2) / len(x), least, rtol=1e-6, atol=1e-10 * np.sum(sigma**2))
        np.testing.assert_allclose(basis.errors[rank], least, rtol=1e-6, atol=1e-12 * np.sum(sigma**2))
    assert basis.errors[0] == pytest.approx(np.sum(full**2) / len(x))
    np.testing.assert_allclose(basis.basis.T @ covariance @ basis.basis, np.eye(SIZE), atol=1e-8)


def test_values_the_projection_does_not_read_come_last() -> None:
    _, covariance, weight = value_samples(0, 8)
    weight[[1, 4]] = 0
    basis = value_basis(covariance, weight)
    assert basis.errors[SIZE - 2] < 1e-12 * basis.errors[0] < basis.errors[SIZE - 3]
    singular = covariance.copy()
    singular[2], singular[:, 2] = 0, 0
    basis = value_basis(singular, weight)
    assert np.isfinite(basis.basis).all() and basis.errors[SIZE - 3] < 1e-5 * basis.errors[0]
    assert np.isfinite(value_basis(np.zeros_like(covariance), weight).basis).all()


def shared_heads(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[ValueBasis]]:
    """Three heads of four values that say much the same: covariance, projection, places, and each head's own bases."""
    rng = np.random.default_rng(seed)
    common = rng.standard_normal((500, 5))
    x = np.concatenate([common @ rng.standard_normal((5, 4)) + 0.3 * rng.standard_normal((500, 4)) for _ in "abc"], 1)
    covariance, weight = x.T @ x / len(x), rng.standard_normal((12, 7))
    places = rng.permutation(12).reshape(3, 4)  # heads need not lie one behind the other
    own = [value_basis(covariance[np.ix_(rows, rows)], weight[rows]) for rows in places]
    return covariance, weight, places, own


def joint_error(
    covariance: np.ndarray, weight: np.ndarray, places: np.ndarray, bases: list[ValueBasis], kept: int
) -> float:
    """Expected squared error of the output when the projection is solved for over all kept directions."""
    change = np.zeros((len(weight), len(bases) * kept))
    for head, (rows, basis) in enumerate(zip(places, bases, strict=True)):
        change[rows, head * kept : (head + 1) * kept] = basis.basis[:, :kept]
    refit = np.linalg.lstsq(change.T @ covariance @ change, change.T @ covariance @ weight, rcond=None)[0]
    lost = weight - change @ refit
    return float(np.trace(lost.T @ covariance @ lost))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("kept", [1, 2, 3])
def test_heads_that_take_each_other_into_account_lose_less_together(seed: int, kept: int) -> None:
    covariance, weight, places, own = shared_heads(seed)
    together = complementary_bases(own, covariance, weight, places, kept)
    before, after = (joint_error(covariance, weight, places, bases, kept) for bases in (own, together))
    assert after < before
    again = complementary_bases(together, covariance, weight, places, kept)
    assert joint_error(covariance, weight, places, again, kept) <= after * (1 + 1e-6)


def test_the_last_head_has_the_best_directions_given_the_others() -> None:
    covariance, weight, places, own = shared_heads(0)
    together = complementary_bases(own, covariance, weight, places, 2)
    best = joint_error(covariance, weight, places, together, 2)
    rng = np.random.default_rng(1)
    for step in np.geomspace(1e-3, 1, 30):
        other = together[2].basis + step * rng.standard_normal((4, 4))
        moved = [*together[:2], ValueBasis(other, together[2].errors)]
        assert joint_error(covariance, weight, places, moved, 2) >= best * (1 - 1e-6)


def test_a_repeated_head_gives_way_to_what_the_other_does_not_say() -> None:
    rng = np.random.default_rng(2)
    root = np.diag([4.0, 3.0, 2.0, 1.0])
    covariance = np.kron(np.ones((2, 2)), root) + 1e-9 * np.eye(8)  # the second head is a copy of the first
    weight, places = np.tile(np.linalg.qr(rng.standard_normal((4, 4)))[0], (2, 1)), np.arange(8).reshape(2, 4)
    own = [value_basis(root, weight[:4]), value_basis(root, weight[4:])]
    together = complementary_bases(own, covariance, weight, places, 2)
    assert joint_error(covariance, weight, places, own, 2) > 1.0
    assert joint_error(covariance, weight, places, together, 2) < 1e-3


def test_heads_without_cut_or_company_keep_their_own_bases() -> None:
    covariance, weight, places, own = shared_heads(0)
    assert complementary_bases(own, covariance, weight, places, 4) == own
    assert complementary_bases(own[:1], covariance, weight, places[:1], 2) == own[:1]


def test_values_and_keys_that_never_vary_have_a_basis_that_can_be_undone() -> None:
    """A decoder whose first self-attention reads zeros, say: there is no direction, and none must be divided by."""
    nothing = np.zeros((SIZE, SIZE))
    found = value_basis(nothing, np.random.default_rng(0).standard_normal((SIZE, 4)))
    np.testing.assert_array_equal(found.errors, 0)
    assert np.linalg.cond(found.basis) < 10 and np.abs(found.basis).max() < 10
    pairs = pair_basis(np.eye(SIZE), nothing)
    assert np.isfinite(pairs.query).all() and not pairs.errors.any()
