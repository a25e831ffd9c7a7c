"""Both layers of a narrow FFN, fitted to what the whole one computes (METHODS 2.3, last part).

After the cut the consumer has been refitted, but the kept neurons are still those of the original. Changing the
projections in front of the nonlinearity as well takes out much of the error that is left. With u = x W₁ + b₁,
h = f(u) and y = h W₂ + b₂, the gradient of E‖y* − y‖² with respect to W₁ is −2 xᵀ(f'(u) ∘ r W₂ᵀ), r = y* − y. Plain
descent needs many passes, because inputs and neurons are far from independent. A Gauss-Newton step that takes the two
to be independent of each other (as in K-FAC, Martens and Grosse 2015, arXiv 1503.05671) needs one or two:

    ΔW₁ = A⁻¹ E[xᵀ(f'(u) ∘ r W₂ᵀ)] B⁻¹,     A = E[xᵀx],   B = E[f'(u)ᵀ f'(u)] ∘ W₂W₂ᵀ,

with x extended by a one for the bias, and both A and B damped. After each step W₂ and b₂ are solved for again, exactly.
The derivative of the nonlinearity is a central difference, so any elementwise function will do; in a gated FFN every
projection gets its own step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
from scipy.linalg import blas

from onnxsnp.blas import available_cores
from onnxsnp.reconstruction.refit import RIDGE, solve_positive

STEPS = 2
DAMPING = 0.5  # of B, as a share of its mean diagonal; neurons depend on each other more than B says
DAMPING_INPUTS = 1e-4  # of A
_CHUNK = 1024  # tokens at a time
_PROBE = 1e-2  # distance of the central difference, in units of u

Activation = Callable[[Sequence[np.ndarray]], np.ndarray]


@dataclass(frozen=True)
class TwoLayers:
    """y = f(x W₁ + b₁, …) W₂ + b₂ with one or more projections in front.

    Attributes:
        first: (W₁ [inputs, width], b₁ [width] or None) of each projection.
        second: W₂, [width, out].
        bias: b₂, [out], or None.
    """

    first: tuple[tuple[np.ndarray, np.ndarray | None], ...]
    second: np.ndarray
    bias: np.ndarray | None


def fit_two_layers(
    start: TwoLayers, inputs: np.ndarray, target: np.ndarray, activation: Activation, steps: int = STEPS
) -> tuple[TwoLayers, list[float]]:
    """Fit all layers to the target; a step that does not lower the error on the given tokens is not taken.

    Tokens are worked on in parts, one per core at a time, so BLAS should be kept to one thread.

    Args:
        inputs: x, [tokens, inputs].
        target: y*, [tokens, out].
        activation: f, from [tokens, width] per projection to [tokens, width]; elementwise, and safe to call from
            several threads.

    Returns:
        The fitted layers, and the mean squared error per token before and after each step that was taken.
    """
    inputs, target = (np.asarray(array, np.float32) for array in (inputs, target))
    best, error = _solve_second(start, inputs, target, activation)
    errors = [error]
    for _ in range(steps):
        trial, error = _solve_second(_stepped(best, inputs, target, activation), inputs, target, activation)
        if not error < errors[-1]:
            break
        best = trial
        errors.append(error)
    return best, errors


def _before(layers: TwoLayers, x: np.ndarray) -> list[np.ndarray]:
    return [x @ weight if bias is None else x @ weight + bias for weight, bias in layers.first]


def _summed(parts: Callable[[slice], tuple[np.ndarray, ...]], tokens: int) -> list[np.ndarray]:
    """Sums over all tokens, in double precision, of what a function gives for some of them."""
    chunks = [slice(start, start + _CHUNK) for start in range(0, tokens, _CHUNK)]
    with ThreadPoolExecutor(max_workers=available_cores()) as pool:
        sums: list[np.ndarray] = []
        for found in pool.map(parts, chunks):
            sums = (
                [one + two for one, two in zip(sums, found, strict=True)]
                if sums
                else [np.asarray(one, np.float64) for one in found]
            )
    return sums


def _solve_second(
    layers: TwoLayers, inputs: np.ndarray, target: np.ndarray, activation: Activation
) -> tuple[TwoLayers, float]:
    """W₂ and b₂ of least error, with a ridge towards the present ones, and that error per token."""
    width, tokens = len(layers.second), len(inputs)

    def moments(rows: slice) -> tuple[np.ndarray, ...]:
        h, t = activation(_before(layers, inputs[rows])), target[rows]
        power = np.square(t, dtype=np.float64).sum()
        return blas.ssyrk(1.0, h.T, lower=1), h.T @ t, h.sum(axis=0), t.sum(axis=0), power

    inner, cross, mean, goal, power = (sums / tokens for sums in _summed(moments, tokens))
    inner = _whole(inner)
    if layers.bias is not None:
        inner, cross, power = inner - np.outer(mean, mean), cross - np.outer(mean, goal), power - goal @ goal
    ridge = RIDGE * float(np.trace(inner)) / width + np.finfo(np.float64).tiny
    weight = solve_positive(inner + ridge * np.eye(width), cross + ridge * layers.second)
    error = float(power) - 2 * float(np.vdot(weight, cross)) + float(np.vdot(weight, inner @ weight))
    bias = None if layers.bias is None else (goal - mean @ weight).astype(layers.bias.dtype)
    return replace(layers, second=weight.astype(layers.second.dtype), bias=bias), error


def _stepped(layers: TwoLayers, inputs: np.ndarray, target: np.ndarray, activation: Activation) -> TwoLayers:
    """One damped Gauss-Newton step of every projection in front of the nonlinearity."""
    tokens, count = len(inputs), len(layers.first)
    second = layers.second.astype(np.float32)

    def moments(rows: slice) -> tuple[np.ndarray, ...]:
        x = inputs[rows]
        before = _before(layers, x)
        left = target[rows] - activation(before) @ second
        pulled = (left if layers.bias is None else left - layers.bias.astype(np.float32)) @ second.T
        extended = np.concatenate([x, np.ones((len(x), 1), np.float32)], axis=1)
        slopes = [_derivative(activation, before, index) for index in range(count)]
        gradients = [extended.T @ (slope * pulled) for slope in slopes]
        return blas.ssyrk(1.0, extended.T, lower=1), *gradients, *(blas.ssyrk(1.0, one.T, lower=1) for one in slopes)

    gram, *rest = (sums / tokens for sums in _summed(moments, tokens))
    gram = _damped(_whole(gram), DAMPING_INPUTS)
    overlap = layers.second.astype(np.float64) @ layers.second.T.astype(np.float64)
    first = []
    for (weight, bias), gradient, slope in zip(layers.first, rest[:count], rest[count:], strict=True):
        rows = np.s_[:] if bias is not None else np.s_[:-1]  # without a bias the one is left out
        metric = _damped(_whole(slope) * overlap, DAMPING)
        change = solve_positive(metric, solve_positive(gram[rows, rows], gradient[rows]).T).T
        new = None if bias is None else (bias + change[-1]).astype(bias.dtype)
        first.append(((weight + change[: len(weight)]).astype(weight.dtype), new))
    return replace(layers, first=tuple(first))


def _whole(lower: np.ndarray) -> np.ndarray:
    """A symmetric matrix from its lower triangle."""
    return np.tril(lower) + np.tril(lower, -1).T


def _damped(matrix: np.ndarray, share: float) -> np.ndarray:
    """A symmetric matrix plus a share of its mean diagonal."""
    strength = share * float(np.trace(matrix)) / len(matrix) + np.finfo(np.float64).tiny
    return matrix + strength * np.eye(len(matrix))


def _derivative(activation: Activation, before: Sequence[np.ndarray], index: int) -> np.ndarray:
    """df/du of one projection, [tokens, width]."""
    up, down = (
        activation([u + shift if at == index else u for at, u in enumerate(before)])
        for shift in (np.float32(_PROBE), np.float32(-_PROBE))
    )
    return (up - down) / np.float32(2 * _PROBE)
