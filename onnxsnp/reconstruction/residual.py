"""The residual stream after a cut: one change of basis for all that write and read it, then its readers refitted.

METHODS 2.5 (kin: SliceGPT arXiv 2401.15024; keeping the LayerNormalization operator is derived for this project). Let
n = (x − mean(x)) / std(x) be the stream as its d channels stand behind a normalisation, without gain γ and shift β.
V [d, d' − 1] holds the leading eigenvectors of Σ E[nᵀn] / tr E[nᵀn] over the sites where the stream is read, among the
directions without a mean over the channels (n has none there). E [d', d' − 1] is an orthonormal basis of the
directions without a mean in the new width. With R = V Eᵀ the stream y = x R has no mean either, so that

    LN(y) ≈ √(d' / (d f)) n R,      f = E‖n V‖² / E‖n‖²,

where f is what the cut leaves of the variance, per site. It is exact for d' = d. Writers become W R and readers
y = (n γ + β) W + b become √(d f / d') Rᵀ diag(γ) W and b + β W. Instead of Rᵀ, readers take ridge least squares from
n V to n, which the sites share only on average, with λ towards Rᵀ; their biases take up the change of the mean.

A reader without a bias is given one by its normalisation: LN(y) is orthogonal to the constant vector 1, and so are the
columns of the readers. With a shift β' = 1, adding 1 a / d' to a reader's weight adds a to what it emits, and nothing
to what the others emit.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from scipy import fft

from onnxsnp.blas import available_cores, single_threaded
from onnxsnp.calibration.statistics import Moments
from onnxsnp.graph.groups import Group
from onnxsnp.graph.linear import Linear
from onnxsnp.graph.residual import Norm, ResidualSite, hidden_channels
from onnxsnp.reconstruction.refit import RIDGE, solve, solve_positive

if TYPE_CHECKING:
    from onnxsnp.analysis import Analysis


@dataclass(frozen=True)
class ResidualBasis:
    """New directions of a residual stream.

    Attributes:
        directions: V, [d, d − 1], orthonormal and without a mean over the channels, best first.
        errors: [d + 1]; errors[d'] is the share of the variance of n that a stream of width d' has no room for, mean
            over the sites. Of width 1 nothing is left behind a normalisation.
    """

    directions: np.ndarray
    errors: np.ndarray


def without_mean(size: int) -> np.ndarray:
    """Orthonormal basis of the vectors whose entries sum to zero (the cosine transform's), [size, size − 1]."""
    basis: np.ndarray = fft.dct(np.eye(size), norm="ortho", axis=0)[1:].T
    return basis


def residual_basis(seconds: list[np.ndarray]) -> ResidualBasis:
    """The basis whose leading directions hold most of the stream, every site counting the same.

    Args:
        seconds: E[nᵀn] of each site, [d, d].
    """
    size = len(seconds[0])
    shares = [second / max(float(np.trace(second)), np.finfo(np.float64).tiny) for second in seconds]
    free = without_mean(size)
    inner = free.T @ np.mean(shares, axis=0) @ free
    values, vectors = np.linalg.eigh((inner + inner.T) / 2)
    energy = np.concatenate([np.maximum(values[::-1], 0.0), [0.0]])
    tail = np.concatenate([np.cumsum(energy[::-1])[::-1], [0.0]])  # by number of directions, 0 to d
    return ResidualBasis(free @ vectors[:, ::-1], np.concatenate([tail[:1], tail[:size]]))


def plain_moments(moments: Moments, scale: np.ndarray, shift: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean [d] and second moments [d, d] of n, from those of n γ + β.

    A channel with next to no gain is hidden there, but n sums to zero over the channels, which gives it back. Of
    several hidden channels only the sum is known; what is missing of E‖n‖² = d is spread evenly over their other
    directions.
    """
    hidden = hidden_channels(scale, shift)
    seen = np.where(hidden, 1.0, scale)
    mean, second = moments.mean, moments.second / max(moments.count, 1)
    about = second - np.outer(mean, shift) - np.outer(shift, mean) + np.outer(shift, shift)
    mean, about = (mean - shift) / seen, about / np.outer(seen, seen)
    size, count = len(hidden), int(hidden.sum())
    if count:
        fill = np.diag(1.0 - hidden)
        fill[np.ix_(~hidden, hidden)] = -1 / count
        mean, about = mean @ fill, fill.T @ about @ fill
    if count > 1:
        missing = max(size - float(np.trace(about)), 0.0) / (count - 1)
        about[np.ix_(hidden, hidden)] += missing * (np.eye(count) - 1 / count)
    about = about - about.mean(axis=0)  # what is left of a mean over the channels is rounding
    return mean - mean.mean(), about - about.mean(axis=1, keepdims=True)


class ResidualRotation:
    """New weights for a residual group of any width; what a width needs of a site is computed once.

    Args:
        moments: by name, of the activations the site's readers read.
        ridge: λ of the readers' fit as a share of the mean variance of the kept directions; None leaves them at Rᵀ.
    """

    def __init__(
        self, analysis: Analysis, site: ResidualSite, moments: Mapping[str, Moments], ridge: float | None = RIDGE
    ) -> None:
        self._weights, self._site, self._ridge = analysis.graph.weights, site, ridge
        self._moments = moments
        self._norms = {linear.data: norm for linear, norm in site.readers}
        # normalisations whose shift stands in for a bias that one of their readers does not have
        self._lifted = {norm.shift for linear, norm in site.readers if linear.bias is None and norm.shift is not None}
        self._maps: dict[tuple[str, bool, int], tuple[np.ndarray, np.ndarray]] = {}

    @cached_property
    def _plain(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Mean and second moments of n by tensor."""
        return {name: plain_moments(self._moments[name], *self._affine(norm)) for name, norm in self._norms.items()}

    @cached_property
    def basis(self) -> ResidualBasis:
        """The directions, the same for every width."""
        with single_threaded():
            return residual_basis([second for _, second in self._plain.values()])

    def weights(self, keep: np.ndarray, updates: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """New weights of everything that touches the stream.

        Args:
            keep: [kept] places of the new channels.
            updates: weights that other groups' cuts have changed, in their original shapes.

        Returns:
            Weights by name, in their original shapes and types; what is not kept is zero.
        """
        site = self._site
        current = ChainMap(dict(updates), self._weights)
        self._prepare(len(keep))
        made: dict[str, np.ndarray] = {}
        with single_threaded(), ThreadPoolExecutor(max_workers=available_cores()) as pool:
            for new in pool.map(lambda reader: self._read(reader[0], reader[1], keep, current), site.readers):
                made.update(new)
            after = ChainMap(made, *current.maps)  # a weight can read the stream and write it too
            written = list(pool.map(lambda writer: self._write(writer[0], writer[1], keep, after), site.writers))
        made.update(zip((name for name, _ in site.writers), written, strict=True))
        for name in {name for names in site.factors.values() for name in names}:
            made[name] = np.ones_like(self._weights[name])
        for norm in self._norms.values():
            made[norm.scale] = _placed(np.ones((len(keep), 1)), keep, self._weights[norm.scale], -1)
            if norm.shift is not None:
                level = float(norm.shift in self._lifted)
                made[norm.shift] = _placed(np.full((len(keep), 1), level), keep, self._weights[norm.shift], -1)
        return made

    def change(self, width: int) -> np.ndarray:
        """R [d, d']: the narrow stream is the original one times R (METHODS 2.5)."""
        return self.basis.directions[:, : width - 1] @ without_mean(width).T

    def _affine(self, norm: Norm) -> tuple[np.ndarray, np.ndarray]:
        """γ and β of a normalisation as exported, [d]."""
        scale = self._weights[norm.scale].astype(np.float64).reshape(-1)
        shift = np.zeros(len(scale)) if norm.shift is None else self._weights[norm.shift].astype(np.float64).reshape(-1)
        return scale, shift

    def _prepare(self, kept: int) -> None:
        """Compute the maps of all readers for one width."""
        wanted = {(linear.data, self._can_shift(linear, norm), kept) for linear, norm in self._site.readers}
        missing = sorted(wanted - self._maps.keys())
        basis = self.basis
        with single_threaded(), ThreadPoolExecutor(max_workers=available_cores()) as pool:
            found = list(pool.map(lambda key: self._map(basis.directions[:, : kept - 1], *key), missing))
        if missing:  # those of another width are not asked for again
            self._maps = {key: held for key, held in self._maps.items() if key[2] == kept}
        self._maps.update(zip(missing, found, strict=True))

    @staticmethod
    def _can_shift(linear: Linear, norm: Norm) -> bool:
        """Whether a constant can be added to what a reader emits."""
        return linear.bias is not None or norm.shift is not None

    def _map(self, kept: np.ndarray, tensor: str, shifts: bool, width: int) -> tuple[np.ndarray, np.ndarray]:
        """A [d', d] and a [d] such that a reader y = (n γ + β) W + b becomes A W with bias b + a W."""
        scale, shift = self._affine(self._norms[tensor])
        mean, second = self._plain[tensor]
        centred = second - np.outer(mean, mean) if shifts else second
        inner, total = kept.T @ centred @ kept, float(np.trace(second))
        fit = kept.T
        if self._ridge is not None and width > 1:
            strength = self._ridge * float(np.trace(inner)) / (width - 1) + np.finfo(np.float64).tiny
            fit = solve_positive(inner + strength * np.eye(width - 1), kept.T @ centred + strength * kept.T)
        offset = mean - (mean @ kept) @ fit if shifts else np.zeros(len(mean))
        left = float(np.einsum("ij,ij->", kept, second @ kept)) / total if total > 0 else 1.0
        gain = np.sqrt(left * len(mean) / width)
        return gain * without_mean(width) @ fit * scale, shift + offset * scale

    def _read(
        self, linear: Linear, norm: Norm, keep: np.ndarray, current: Mapping[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        array = current[linear.weight]
        matrix = np.moveaxis(array, linear.inner, 0).astype(np.float64)
        rows = matrix.reshape(len(matrix), -1)
        change, constant = self._maps[linear.data, self._can_shift(linear, norm), len(keep)]
        fresh, added = change @ rows, constant @ rows
        made = {}
        if linear.bias is not None:
            bias = current[linear.bias]
            made[linear.bias] = (bias + added.reshape(bias.shape)).astype(bias.dtype)
        elif norm.shift is not None:
            fresh += added / len(keep)
        made[linear.weight] = _placed(fresh, keep, array, linear.inner)
        return made

    def _write(self, name: str, axis: int, keep: np.ndarray, current: Mapping[str, np.ndarray]) -> np.ndarray:
        array = current[name]
        matrix = np.moveaxis(array, axis, 0).astype(np.float64)
        rows = matrix.reshape(len(matrix), -1)
        for factor in self._site.factors.get(name, ()):
            rows = rows * current[factor].astype(np.float64).reshape(-1, 1)
        return _placed(self.change(len(keep)).T @ rows, keep, array, axis)


def _placed(rows: np.ndarray, keep: np.ndarray, like: np.ndarray, axis: int) -> np.ndarray:
    """Rows at the kept places of an axis of an array shaped as another one; zero elsewhere."""
    shape = np.moveaxis(like, axis, 0).shape
    full = np.zeros((shape[0], rows.shape[1]))
    full[keep] = rows
    return np.moveaxis(full.reshape(shape), 0, axis).astype(like.dtype)


def refittable_readers(group: Group, analysis: Analysis) -> list[Linear]:
    """The projections that read the channels of a residual group as their features, as they are or normalised."""
    atoms, shapes = analysis.dependencies.atoms, analysis.dependencies.facts.shapes
    found = []
    for weight, axis in group.consumers:
        linear = analysis.linears.get(weight)
        if linear is None or not linear.plain or linear.inner != axis:
            continue
        if atoms(weight, axis) == atoms(linear.data, len(shapes[linear.data]) - 1) == (group.atom,):
            found.append(linear)
    return found


def refit_readers(
    analysis: Analysis,
    group: Group,
    keep: np.ndarray,
    moments: Mapping[str, Moments],
    updates: Mapping[str, np.ndarray],
) -> dict[str, np.ndarray]:
    """Least squares of the readers of a stream whose channels are selected.

    What the cut does to the statistics of normalisations is left out: the kept channels are taken to be what they were.

    Args:
        keep: [kept] channels that stay.
        moments: by name, of the activations the readers read.
        updates: weights that other groups' cuts have changed, in their original shapes.

    Returns:
        Weights and biases by name, in their original shapes; cut rows are zero.
    """
    made = {}
    for linear in refittable_readers(group, analysis):
        array = updates.get(linear.weight, analysis.graph.weights[linear.weight])
        matrix = np.moveaxis(array, linear.inner, 0)
        fit, shift = solve(matrix, moments[linear.data], keep, centred=linear.bias is not None)
        full = np.zeros(matrix.shape)
        full[keep] = fit
        made[linear.weight] = np.moveaxis(full, 0, linear.inner).astype(array.dtype)
        if linear.bias is not None:
            bias = updates.get(linear.bias, analysis.graph.weights[linear.bias])
            made[linear.bias] = (bias + shift.reshape(bias.shape)).astype(bias.dtype)
    return made
