"""Steps follow the gradient of the literal loss, errors are the literal ones, and a step that hurts is not taken."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
from scipy.special import erf

from onnxsnp.reconstruction import two_layers
from onnxsnp.reconstruction.refit import RIDGE
from onnxsnp.reconstruction.two_layers import DAMPING, DAMPING_INPUTS, TwoLayers, fit_two_layers

TOKENS, INPUTS, WIDTH, OUT = 700, 5, 6, 4
Arrays = Sequence[np.ndarray]


def gelu(u: Arrays) -> np.ndarray:
    return u[0] * (1 + erf(u[0] / np.sqrt(2))) / 2


def gated(u: Arrays) -> np.ndarray:
    return u[0] / (1 + np.exp(-u[0])) * u[1]


CASES = [(gelu, 1, True), (gelu, 1, False), (gated, 2, True), (gated, 2, False)]
every_case = pytest.mark.parametrize(
    ("activation", "count", "biased"), CASES, ids=["gelu", "gelu, no biases", "gated", "gated, no biases"]
)


def layers(rng: np.random.Generator, count: int, biased: bool, dtype: type = np.float64) -> TwoLayers:
    first = []
    for _ in range(count):
        weight, bias = rng.standard_normal((INPUTS, WIDTH)) / INPUTS**0.5, rng.standard_normal(WIDTH) / 2
        first.append((weight.astype(dtype), bias.astype(dtype) if biased else None))
    second = (rng.standard_normal((WIDTH, OUT)) / WIDTH**0.5).astype(dtype)
    return TwoLayers(tuple(first), second, rng.standard_normal(OUT).astype(dtype) if biased else None)


def output(found: TwoLayers, x: np.ndarray, activation: two_layers.Activation) -> np.ndarray:
    before = [x @ weight + (0 if bias is None else bias) for weight, bias in found.first]
    return activation(before) @ found.second + (0 if found.bias is None else found.bias)


def loss(found: TwoLayers, x: np.ndarray, y: np.ndarray, activation: two_layers.Activation) -> float:
    """The mean squared error per token, in double precision."""
    return float(np.mean(np.sum((y.astype(np.float64) - output(found, x.astype(np.float64), activation)) ** 2, axis=1)))


def data(rng: np.random.Generator, tokens: int = TOKENS) -> np.ndarray:
    """Inputs that depend on each other and are not centred."""
    return (rng.standard_normal((tokens, INPUTS)) @ rng.standard_normal((INPUTS, INPUTS)) / 2 + 0.3).astype(np.float32)


def moved(found: TwoLayers, rng: np.random.Generator, size: float) -> TwoLayers:
    """The same layers with noise on the first ones."""
    first = tuple(
        tuple(None if one is None else (one + size * rng.standard_normal(one.shape)).astype(one.dtype) for one in pair)
        for pair in found.first
    )
    return TwoLayers(first, found.second, found.bias)  # type: ignore[arg-type]


def damped(matrix: np.ndarray, share: float) -> np.ndarray:
    return matrix + share * np.mean(np.diag(matrix)) * np.eye(len(matrix))


@every_case
def test_the_step_is_the_gradient_of_the_loss_in_the_metric_of_the_docstring(
    activation: two_layers.Activation, count: int, biased: bool
) -> None:
    """A ΔW₁ B is minus half the derivative of the loss, by finite differences entry by entry."""
    rng = np.random.default_rng(0)
    start, x = layers(rng, count, biased), data(rng)
    y = rng.standard_normal((TOKENS, OUT)).astype(np.float32)
    step = two_layers._stepped(start, x, y, activation)
    assert step.second is start.second and step.bias is start.bias
    wide = x.astype(np.float64)
    extended = np.concatenate([wide, np.ones((TOKENS, 1))], axis=1) if biased else wide
    inner = np.concatenate([wide, np.ones((TOKENS, 1))], axis=1)
    whole = damped(inner.T @ inner / TOKENS, DAMPING_INPUTS)[: extended.shape[1], : extended.shape[1]]
    before = [wide @ weight + (0 if bias is None else bias) for weight, bias in start.first]
    for index in range(count):
        old, new = (
            np.vstack([weight, *([bias] if bias is not None else [])])
            for weight, bias in (start.first[index], step.first[index])
        )
        up, down = ([u + (sign if at == index else 0) for at, u in enumerate(before)] for sign in (1e-6, -1e-6))
        slope = (activation(up) - activation(down)) / 2e-6
        metric = damped(slope.T @ slope / TOKENS * (start.second @ start.second.T), DAMPING)
        got = whole @ (new - old) @ metric

        def at(change: np.ndarray, index: int = index) -> float:
            weight, bias = start.first[index]
            pair = (weight + change[:INPUTS], None if bias is None else bias + change[INPUTS])
            first = tuple(pair if place == index else one for place, one in enumerate(start.first))
            return loss(TwoLayers(first, start.second, start.bias), x, y, activation)

        want = np.zeros_like(old)
        for place in np.ndindex(*old.shape):
            change = np.zeros_like(old)
            change[place] = 1e-5
            want[place] = -(at(change) - at(-change)) / 2e-5 / 2
        assert np.abs(want).max() > 0.05
        np.testing.assert_allclose(got, want, atol=2e-4 * np.abs(want).max())


@every_case
def test_a_target_that_the_layers_can_give_is_found_again(
    activation: two_layers.Activation, count: int, biased: bool
) -> None:
    rng = np.random.default_rng(1)
    planted, every = layers(rng, count, biased, np.float32), data(rng, 3500)
    x, fresh = every[:3000], every[3000:]
    y = output(planted, x, activation).astype(np.float32)
    _, few = fit_two_layers(moved(planted, rng, 0.15), x, y, activation)
    assert len(few) == two_layers.STEPS + 1 and few[-1] < 0.85 * few[0]
    found, errors = fit_two_layers(moved(planted, rng, 0.15), x, y, activation, steps=60)
    assert errors[-1] < 0.05 * errors[0]
    assert loss(found, x, y, activation) < 0.05 * errors[0]
    assert loss(found, fresh, output(planted, fresh, activation), activation) < 0.1 * errors[0]


@every_case
def test_errors_fall_and_are_those_of_the_layers(activation: two_layers.Activation, count: int, biased: bool) -> None:
    rng = np.random.default_rng(2)
    start, x = layers(rng, count, biased, np.float32), data(rng)
    y = (2 * rng.standard_normal((TOKENS, OUT)) + x[:, :OUT] ** 2).astype(np.float32)
    whole, errors = fit_two_layers(start, x, y, activation, steps=4)
    assert len(errors) > 2 and all(after < before for before, after in pairwise(errors))
    for steps in range(len(errors)):
        found, so_far = fit_two_layers(start, x, y, activation, steps=steps)
        assert so_far == errors[: steps + 1]
        assert loss(found, x, y, activation) == pytest.approx(errors[steps], rel=1e-4)
    assert np.array_equal(found.first[0][0], whole.first[0][0])


@every_case
def test_a_step_that_would_hurt_is_not_taken(
    activation: two_layers.Activation, count: int, biased: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a derivative of the wrong sign every step goes uphill."""
    rng = np.random.default_rng(3)
    planted, x = layers(rng, count, biased, np.float32), data(rng)
    y = output(planted, x, activation).astype(np.float32)
    start = moved(planted, rng, 0.1)
    _, errors = fit_two_layers(start, x, y, activation)
    assert len(errors) == two_layers.STEPS + 1
    right = two_layers._derivative
    monkeypatch.setattr(two_layers, "_derivative", lambda *at: -right(*at))
    found, stayed = fit_two_layers(start, x, y, activation)
    assert stayed == errors[:1]
    assert all(one is other for one, other in zip(found.first, start.first, strict=True))
    assert loss(found, x, y, activation) == pytest.approx(errors[0], rel=1e-3)


@every_case
def test_the_second_layer_is_least_squares_with_the_ridge_as_rows(
    activation: two_layers.Activation, count: int, biased: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(4)
    start, x = layers(rng, count, biased), data(rng)
    y = (rng.standard_normal((TOKENS, OUT)) + 1).astype(np.float32)
    h = activation([x @ weight + (0 if bias is None else bias) for weight, bias in start.first])
    mean, goal = (h.mean(axis=0), y.mean(axis=0)) if biased else (np.zeros(WIDTH), np.zeros(OUT))
    for share in (RIDGE, 0.5):
        monkeypatch.setattr(two_layers, "RIDGE", share)
        found = fit_two_layers(start, x, y, activation, steps=0)[0]
        force = np.sqrt(share * np.mean((h - mean) ** 2) * TOKENS)
        rows = np.vstack([h - mean, force * np.eye(WIDTH)])
        want = np.linalg.lstsq(rows, np.vstack([y - goal, force * start.second]), rcond=None)[0]
        np.testing.assert_allclose(found.second, want, atol=1e-4)
        if found.bias is not None:
            np.testing.assert_allclose(found.bias, goal - mean @ want, atol=1e-4)
        assert (found.bias is not None) == biased


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@every_case
def test_element_types_and_shapes_stay(
    activation: two_layers.Activation, count: int, biased: bool, dtype: type
) -> None:
    rng = np.random.default_rng(5)
    start, x = layers(rng, count, biased, dtype), data(rng)
    y = rng.standard_normal((TOKENS, OUT))
    found, errors = fit_two_layers(start, x, y, activation)
    assert len(errors) > 1
    pairs = [*zip(start.first, found.first, strict=True), ((start.second, start.bias), (found.second, found.bias))]
    for old, new in pairs:
        for one, other in zip(old, new, strict=True):
            assert (one is None) == (other is None)
            if one is not None and other is not None:
                assert (one.dtype, one.shape) == (other.dtype, other.shape) and not np.array_equal(one, other)


@pytest.mark.parametrize("chunk", [64, TOKENS - 1, TOKENS, 10**6])
@every_case
def test_tokens_in_parts_give_what_they_give_together(
    activation: two_layers.Activation, count: int, biased: bool, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(6)
    start, x = layers(rng, count, biased, np.float32), data(rng)
    y = rng.standard_normal((TOKENS, OUT)).astype(np.float32)
    want, errors = fit_two_layers(start, x, y, activation)
    monkeypatch.setattr(two_layers, "_CHUNK", chunk)
    got, others = fit_two_layers(start, x, y, activation)
    np.testing.assert_allclose(others, errors, rtol=1e-4)
    np.testing.assert_allclose(got.second, want.second, atol=1e-4)
    for (one, _), (other, _) in zip(got.first, want.first, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


def test_neurons_that_are_always_zero_do_no_harm() -> None:
    """A ReLU that never opens has no slope and no output; nothing that is inverted may be singular."""
    rng = np.random.default_rng(7)
    start, x = layers(rng, 1, True, np.float32), data(rng)
    y = rng.standard_normal((TOKENS, OUT)).astype(np.float32)
    weight, bias = start.first[0]
    assert bias is not None

    def relu(u: Arrays) -> np.ndarray:
        return np.maximum(u[0], 0)

    bias[2] = -100
    found, errors = fit_two_layers(start, x, y, relu)
    assert len(errors) > 1 and found.first[0][1][2] == -100  # type: ignore[index]
    bias[:] = -100
    found, errors = fit_two_layers(start, x, y, relu)
    assert len(errors) == 1 and np.isfinite(found.second).all()
    assert errors[0] == pytest.approx(np.var(y, axis=0).sum(), rel=1e-4)
    assert np.array_equal(found.first[0][0], weight)
