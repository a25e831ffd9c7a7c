"""The surgeon's order is that of the literal greedy, its errors those of exact least squares on what is kept."""

from __future__ import annotations

import numpy as np
import pytest

from onnxsnp.calibration.statistics import Moments
from onnxsnp.reconstruction.ffn import MIN_RIDGE, removal_order
from onnxsnp.reconstruction.refit import RIDGE, solve


def problem(width: int = 48, outputs: int = 13, factors: int = 12, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Weights and the covariance of rectified mixtures: correlated and sparse, of very different variances."""
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((1500, factors)) @ rng.standard_normal((factors, width))
    noise = 0.3 * rng.standard_normal((1500, width))
    hidden = np.maximum(mixed + noise + rng.normal(-1, 1, width), 0) * rng.uniform(0.2, 2, width)
    return rng.standard_normal((width, outputs)), np.cov(hidden, rowvar=False)


def strength(covariance: np.ndarray, ridge: float = RIDGE) -> float:
    return ridge * float(np.trace(covariance)) / len(covariance)


def fitted(weight: np.ndarray, covariance: np.ndarray, keep: np.ndarray, ridge: float = RIDGE) -> np.ndarray:
    """The refit of the kept set by the normal equations, with zeros where neurons are gone."""
    inner = covariance[np.ix_(keep, keep)] + strength(covariance, ridge) * np.eye(len(keep))
    target = covariance[keep] @ weight + strength(covariance, ridge) * weight[keep]
    full = np.zeros_like(weight)
    full[keep] = np.linalg.lstsq(inner, target, rcond=None)[0]
    return full


def error(weight: np.ndarray, covariance: np.ndarray, keep: np.ndarray, ridge: float = RIDGE) -> tuple[float, float]:
    """Squared output error of the refit, and the same with its ridge term."""
    gap = weight - fitted(weight, covariance, keep, ridge)
    output = float(np.sum(gap * (covariance @ gap)))
    return output, output + strength(covariance, ridge) * float(np.sum(gap**2))


def greedy(weight: np.ndarray, covariance: np.ndarray, remove: int) -> tuple[list[int], list[float]]:
    """At every step, solve the normal equations of all sets with one neuron less and take the best."""
    kept, order, errors = list(range(len(weight))), [], []
    for _ in range(remove):
        trial = {out: error(weight, covariance, np.setdiff1d(kept, [out]))[1] for out in kept}
        best = min(trial, key=lambda out: trial[out])
        kept.remove(best)
        order.append(best)
        errors.append(trial[best])
    return order, errors


def sequential(weight: np.ndarray, covariance: np.ndarray, remove: int) -> tuple[list[int], list[float]]:
    """The formulas of METHODS 2.3 as they stand."""
    inverse = np.linalg.inv(covariance + strength(covariance) * np.eye(len(covariance)))
    weight, kept = weight.copy(), np.ones(len(weight), bool)
    order, errors, total = [], [], 0.0
    for _ in range(remove):
        scores = np.full(len(weight), np.inf)
        scores[kept] = (weight[kept] ** 2).sum(axis=1) / inverse.diagonal()[kept]
        out = int(scores.argmin())
        total += scores[out]
        weight = weight - np.outer(inverse[:, out], weight[out]) / inverse[out, out]
        inverse = inverse - np.outer(inverse[:, out], inverse[out]) / inverse[out, out]
        kept[out] = False
        order.append(out)
        errors.append(total)
    return order, errors


def test_every_step_is_the_best_step_of_exact_least_squares() -> None:
    weight, covariance = problem(width=20, outputs=5)
    order, errors = greedy(weight, covariance, 19)
    removal = removal_order(weight, covariance, 19)
    assert removal.order.tolist() == order
    np.testing.assert_allclose(removal.errors, errors, rtol=1e-9)


@pytest.mark.parametrize("block", [1, 2, 7, 64, 1000, None])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_panels_change_nothing(block: int | None, seed: int) -> None:
    weight, covariance = problem(width=150, outputs=31, factors=30, seed=seed)
    order, errors = sequential(weight, covariance, 149)
    removal = removal_order(weight, covariance, 149, block=block)
    assert removal.order.tolist() == order
    np.testing.assert_allclose(removal.errors, errors, rtol=1e-8)


def test_a_width_beyond_one_stripe_and_one_panel() -> None:
    weight, covariance = problem(width=400, outputs=20, factors=60)
    order, errors = sequential(weight, covariance, 399)
    removal = removal_order(weight, covariance, 399)
    assert removal.order.tolist() == order
    np.testing.assert_allclose(removal.errors, errors, rtol=1e-8)


@pytest.mark.parametrize("remove", [1, 20, 47])
def test_the_errors_are_those_of_the_refit(remove: int) -> None:
    weight, covariance = problem()
    removal = removal_order(weight, covariance, remove)
    keep = np.setdiff1d(np.arange(48), removal.order)
    moments = Moments(covariance * 100, np.zeros(48), 100)
    gap = weight.copy()
    gap[keep] -= solve(weight, moments, keep, centred=True)[0]
    want = np.sum(gap * (covariance @ gap)) + strength(covariance) * np.sum(gap**2)
    assert removal.errors[-1] == pytest.approx(want, rel=1e-9)


def test_errors_never_decrease_and_shorter_orders_are_the_start_of_longer_ones() -> None:
    weight, covariance = problem()
    whole = removal_order(weight, covariance, 47)
    assert sorted(set(whole.order.tolist())) == sorted(whole.order.tolist())
    assert whole.errors.shape == (47,) and (np.diff(whole.errors) >= 0).all()
    for remove in (0, 1, 13):
        part = removal_order(weight, covariance, remove)
        assert part.order.tolist() == whole.order[:remove].tolist()
        np.testing.assert_allclose(part.errors, whole.errors[:remove])


def test_planted_duplicates_go_first_and_never_with_their_twins() -> None:
    weight, covariance = problem(width=40)
    source = np.concatenate([np.arange(40), np.arange(8)])  # 40 to 47 are copies of 0 to 7
    doubled = covariance[np.ix_(source, source)]
    weight = np.concatenate([weight, weight[:8] + np.random.default_rng(3).standard_normal((8, 13))])
    removal = removal_order(weight, doubled, 20, ridge=1e-8)
    assert sorted(source[removal.order[:8]]) == list(range(8))
    total = np.sum(weight * (doubled @ weight))
    assert removal.errors[7] < 1e-6 * total
    assert removal.errors[8] > 100 * removal.errors[7]
    keep = np.setdiff1d(np.arange(48), removal.order)
    assert removal.errors[-1] == pytest.approx(error(weight, doubled, keep, 1e-8)[1], rel=1e-5)


def test_the_dead_go_first_at_no_error_and_the_rest_as_without_them() -> None:
    weight, covariance = problem()
    dead = np.zeros(48, bool)
    dead[[5, 11, 40]] = True
    covariance[dead] = covariance[:, dead] = 0
    removal = removal_order(weight, covariance, 47, first=dead)
    assert removal.order[:3].tolist() == [5, 11, 40]
    assert not removal.errors[:3].any() and removal.errors[3] > 0
    alone = removal_order(
        weight[~dead], covariance[np.ix_(~dead, ~dead)], 44, ridge=RIDGE * 45 / 48
    )  # the mean diagonal counts the dead
    assert removal.order[3:].tolist() == np.flatnonzero(~dead)[alone.order].tolist()
    np.testing.assert_allclose(removal.errors[3:], alone.errors, rtol=1e-9)
    assert removal_order(weight, covariance, 2, first=dead).order.tolist() == [5, 11]


def test_constant_neurons_and_zero_weights_need_no_mark() -> None:
    weight, covariance = problem()
    covariance[[5, 11]] = covariance[:, [5, 11]] = 0
    weight[30] = 0
    removal = removal_order(weight, covariance, 10, ridge=1e-8)
    assert set(removal.order[:3].tolist()) == {5, 11, 30}
    assert removal.errors[2] < 1e-6 * removal.errors[-1]


def test_half_of_a_correlated_width_costs_less_than_by_norm_or_by_energy() -> None:
    weight, covariance = problem(width=120, outputs=20, factors=15)
    norms = (weight**2).sum(axis=1)
    kept = np.setdiff1d(np.arange(120), removal_order(weight, covariance, 60).order)
    mine = error(weight, covariance, kept)[0]
    for rival, share in ((norms, 0.7), (norms * covariance.diagonal(), 0.95)):
        assert mine < share * error(weight, covariance, np.sort(np.argsort(-rival)[:60]))[0]


@pytest.mark.parametrize("ridge", [0.0, MIN_RIDGE, 1e-6])
def test_singular_covariances(ridge: float) -> None:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((20, 60))  # rank 19
    weight = rng.standard_normal((60, 9))
    covariance = np.cov(rows, rowvar=False)
    removal = removal_order(weight, covariance, 59, ridge=ridge)
    total = np.sum(weight * (covariance @ weight))
    assert np.isfinite(removal.errors).all() and (np.diff(removal.errors) >= 0).all()
    assert len(set(removal.order.tolist())) == 59
    assert removal.errors[40] < 1e-4 * total  # 19 neurons span all
    assert removal.errors[-1] > 0.1 * total


def test_a_covariance_that_rounding_made_indefinite() -> None:
    weight, covariance = problem()
    values, vectors = np.linalg.eigh(covariance)
    values[:3] = -0.01 * values.mean()
    removal = removal_order(weight, vectors * values @ vectors.T, 47)
    clean = removal_order(weight, vectors * np.maximum(values, 0) @ vectors.T, 47)
    assert np.isfinite(removal.errors).all()
    np.testing.assert_allclose(removal.errors, clean.errors, rtol=1e-3)


def test_the_scale_of_the_activations_does_not_matter() -> None:
    weight, covariance = problem()
    want = removal_order(weight, covariance, 47)
    for scale in (1e-12, 1e12):
        got = removal_order(weight, covariance * scale, 47)
        assert got.order.tolist() == want.order.tolist()
        np.testing.assert_allclose(got.errors, want.errors * scale, rtol=1e-6)


def test_nothing_varies() -> None:
    removal = removal_order(np.ones((4, 2)), np.zeros((4, 4)), 3)
    assert sorted(set(removal.order.tolist())) == sorted(removal.order.tolist())
    assert not removal.errors.any()


def test_single_precision_and_read_only_inputs_are_left_alone() -> None:
    weight, covariance = (array.astype(np.float32) for array in problem())
    before = weight.copy(), covariance.copy()
    weight.flags.writeable = covariance.flags.writeable = False
    removal = removal_order(weight, covariance, 30)
    assert removal.errors.dtype == np.float64
    np.testing.assert_array_equal(weight, before[0])
    np.testing.assert_array_equal(covariance, before[1])


@pytest.mark.parametrize("remove", [-1, 48, 100])
def test_at_least_one_neuron_has_to_stay(remove: int) -> None:
    with pytest.raises(ValueError, match="at least one"):
        removal_order(*problem(), remove)


def test_shapes_and_values_are_checked() -> None:
    weight, covariance = problem()
    with pytest.raises(ValueError, match="must be"):
        removal_order(weight[:-1], covariance, 3)
    with pytest.raises(ValueError, match="must be"):
        removal_order(weight, covariance, 3, first=np.zeros(3, bool))
    covariance[0, 0] = np.nan
    with pytest.raises(ValueError, match="finite"):
        removal_order(weight, covariance, 3)
