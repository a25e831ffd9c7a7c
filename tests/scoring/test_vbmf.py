"""EVBMF against a literal, scalar version of the free energy, and against planted ranks."""

from __future__ import annotations

import warnings
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar

from onnxsnp.scoring.vbmf import evbmf_rank


class Literal:
    """The paper's solution for one L×M matrix with all L values given, one value and one σ² at a time."""

    def __init__(self, values, rows, columns):
        self.low, self.high = min(rows, columns), max(rows, columns)
        self.gamma2 = np.sort(values)[::-1] ** 2
        assert len(self.gamma2) == self.low
        self.alpha = self.low / self.high
        tau = 2.5129 * np.sqrt(self.alpha)
        self.x_bar = (1 + tau) * (1 + self.alpha / tau)
        self.most = int(np.ceil(self.low / (1 + self.alpha))) - 1
        rest = self.gamma2[self.most :]
        lower = max(rest[0] / (self.high * self.x_bar), rest.sum() / (self.high * len(rest)))
        self.bounds = np.log(lower), np.log(self.gamma2.sum() / (self.low * self.high))

    def free_energy(self, log_sigma2):
        total, alpha = 0.0, self.alpha
        for x in self.gamma2 / (self.high * np.exp(log_sigma2)):
            if x > self.x_bar:
                tau = 0.5 * (x - 1 - alpha + np.sqrt((x - 1 - alpha) ** 2 - 4 * alpha))
                total += x - tau + np.log((tau + 1) / x) + alpha * np.log(tau / alpha + 1)
            else:
                total += x - np.log(x)
        return total

    def minima(self):
        """{rank: lowest free energy with that rank}: scipy's bounded search between neighbouring thresholds."""
        thresholds = np.log(self.gamma2[: self.most] / (self.high * self.x_bar))
        edges = sorted({*self.bounds, *np.clip(thresholds, *self.bounds)})
        found = {}
        for a, b in pairwise(edges):
            best = minimize_scalar(self.free_energy, bounds=(a, b), method="bounded", options={"xatol": 1e-7})
            cut = self.high * np.exp((a + b) / 2) * self.x_bar
            rank = max(1, int(np.sum(self.gamma2 > cut)))  # no component above the noise counts as one, too
            found[rank] = min(best.fun, found.get(rank, np.inf))
        return found

    def rank(self):
        minima = self.minima()
        return min(minima, key=minima.get)


def planted(rng, rows, columns, rank, strength=6.0, noise=0.3):
    """Signal singular values well above the noise edge, on Gaussian noise."""
    left = np.linalg.qr(rng.standard_normal((rows, rank)))[0]
    right = np.linalg.qr(rng.standard_normal((columns, rank)))[0]
    edge = noise * (np.sqrt(rows) + np.sqrt(columns))
    sigma = edge * np.linspace(strength, strength / 2, rank)
    return (left * sigma) @ right.T + noise * rng.standard_normal((rows, columns))


@pytest.mark.parametrize(("rows", "columns"), [(40, 40), (30, 90), (90, 30), (64, 197)])
@pytest.mark.parametrize("rank", [1, 3, 8])
def test_planted_rank_is_recovered(rows, columns, rank):
    rng = np.random.default_rng(rank)
    matrices = np.stack([planted(rng, rows, columns, rank) for _ in range(4)])
    values = np.linalg.svd(matrices, compute_uv=False)
    assert evbmf_rank(values, rows, columns).tolist() == [rank] * 4
    assert evbmf_rank(values, rows, columns, sigma2=0.3**2).tolist() == [rank] * 4


def test_planted_rank_of_a_product_with_inner_size_k():
    """Noise confined to a k-dimensional row and column space of a larger matrix: its zeros are no samples."""
    rng = np.random.default_rng(0)
    core = planted(rng, 32, 32, 4)
    values = np.linalg.svd(core, compute_uv=False)
    left, right = (np.linalg.qr(rng.standard_normal((100, 32)))[0] for _ in range(2))
    full = np.linalg.svd(left @ core @ right.T, compute_uv=False)
    assert evbmf_rank(values, 100, 100) == 4
    assert evbmf_rank(full, 100, 100) == 4
    assert evbmf_rank(full[:40], 100, 100) == 4


@pytest.mark.parametrize(("rows", "columns"), [(24, 24), (16, 48)])
def test_agrees_with_the_literal_free_energy(rows, columns):
    rng = np.random.default_rng(1)
    n = min(rows, columns)
    spectra = [np.linalg.svd(planted(rng, rows, columns, r, s), compute_uv=False) for r in (1, 4, 7) for s in (1, 2, 5)]
    spectra += [np.exp(-rate * np.arange(n)) for rate in (0.02, 0.1, 0.3, 0.6)]
    spectra += [1 / (1.0 + np.arange(n)) ** power for power in (0.3, 1, 2)]
    expected = [Literal(s, rows, columns).rank() for s in spectra]
    assert evbmf_rank(np.array(spectra), rows, columns).tolist() == expected
    assert len(set(expected)) > 3  # the comparison says something


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(4, 20), st.integers(0, 20))
def test_finds_a_minimum_as_deep_as_the_literal_one(seed, rows, more):
    """Ranks may differ where two minima are nearly equal, so their depths are compared."""
    rng = np.random.default_rng(seed)
    values = np.exp(rng.normal(scale=rng.uniform(0.1, 3), size=rows))
    minima = Literal(values, rows, rows + more).minima()
    assert minima[int(evbmf_rank(values, rows, rows + more))] < min(minima.values()) + 0.05


def test_pure_noise_has_rank_one():
    values = np.linalg.svd(np.random.default_rng(0).standard_normal((3, 50, 80)), compute_uv=False)
    assert evbmf_rank(values, 50, 80).tolist() == [1, 1, 1]


def test_zeros_neither_crash_nor_warn_nor_survive():
    rng = np.random.default_rng(0)
    exact = np.linalg.svd(rng.standard_normal((50, 9)) @ rng.standard_normal((9, 60)), compute_uv=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert 1 <= evbmf_rank(exact, 50, 60) < 9
        assert evbmf_rank(np.zeros((2, 8)), 20, 20).tolist() == [1, 1]
        assert evbmf_rank(np.array([3.0]), 1, 1) == 1
        assert evbmf_rank(np.array([3.0]), 1, 7) == 1
        assert evbmf_rank(np.array([1.0, 0.0, 0.0]), 3, 3) == 1
        assert evbmf_rank(np.array([[1e-200, 1e-201], [1e200, 1e199]]), 2, 2).shape == (2,)
        assert evbmf_rank(np.zeros((0, 4)), 9, 9).shape == (0,)


def test_dead_neurons_and_order_and_unit_change_nothing():
    values = np.random.default_rng(3).gamma(0.3, size=(5, 20))
    rank = evbmf_rank(values, 90, 90)
    assert (evbmf_rank(np.pad(values, ((0, 0), (4, 0))), 90, 90) == rank).all()
    assert (evbmf_rank(values[:, ::-1] * 1e5, 90, 90) == rank).all()
    assert (evbmf_rank(values.reshape(5, 1, 20), 90, 90)[:, 0] == rank).all()
    assert all(evbmf_rank(v, 90, 90) == r for v, r in zip(values, rank, strict=True))


def test_max_rank_caps():
    values = np.linalg.svd(planted(np.random.default_rng(0), 40, 40, 6), compute_uv=False)
    assert evbmf_rank(values, 40, 40, max_rank=2) <= 2
    assert evbmf_rank(values, 40, 40, max_rank=12) == 6


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="last axis"):
        evbmf_rank(np.zeros((2, 0)), 3, 3)
    with pytest.raises(ValueError, match="at least 1"):
        evbmf_rank(np.ones(2), 0, 3)
    with pytest.raises(ValueError, match="finite"):
        evbmf_rank(np.array([np.nan, 1.0]), 3, 3)
