"""Sequential refit: a projection that ends a branch is fitted to what the residual stream lacks there (METHODS 2.4).

One-shot compensation assumes that a layer sees the inputs it saw in the original. Behind earlier cuts it does not, and
errors add up. Here the original and the cut network run side by side, branch by branch. With x the projection's input
in the cut network, refitted so far, and T what the original has on the residual stream after the branch less what the
cut network has before it,

    W' = (Cxx + λI)⁻¹ (CxT + λ W₀),      b' = E[T] − E[x] W',

with covariances about the means and W₀ the one-shot solution. T is mostly noise in the many directions in which x
varies little, and what is learnt there from a few hundred images does not carry over to others. So the ridge is strong,
three times the mean variance of x: only directions with well more than their share of the variance are corrected.

Both networks advance once over the calibration data: between two branches only the residual stream of the samples is
kept, in memory, and the inputs of one projection.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.linalg import blas

from onnxsnp.blas import single_threaded
from onnxsnp.calibration.data import Batch
from onnxsnp.graph.branches import Branch, find_branches
from onnxsnp.graph.dependency import Dependencies
from onnxsnp.graph.ir import Graph, SharedSession
from onnxsnp.graph.linear import Linear
from onnxsnp.graph.segments import Segment, segment_graph, segments
from onnxsnp.reconstruction.refit import solve_positive
from onnxsnp.surgery.rewrite import Cut, cut_array, cut_graph, touched, weight_axes

_ENOUGH = 48  # tokens per fitted row of a weight; neighbouring tokens say much the same
STRENGTH = 3.0  # λ as a share of the mean variance of x

State = dict[str, np.ndarray]


@dataclass
class Joint:
    """Joint second moments of a projection's input x and its target t, about zero.

    Attributes:
        inputs: Σ xᵀx, [K, K], lower triangle only.
        cross: Σ xᵀt, [K, out].
        total, wanted: Σ x, [K], and Σ t, [out].
        count: tokens.
    """

    inputs: np.ndarray
    cross: np.ndarray
    total: np.ndarray
    wanted: np.ndarray
    count: int = 0

    @staticmethod
    def empty(width: int, out: int) -> Joint:
        return Joint(np.zeros((width, width)), np.zeros((width, out)), np.zeros(width), np.zeros(out))

    def add(self, x: np.ndarray, target: np.ndarray) -> None:
        """Add tokens, [tokens, K] and [tokens, out]; products in single precision, sums in double."""
        x, target = (array.astype(np.float32, copy=False) for array in (x, target))
        self.inputs += blas.ssyrk(1.0, x.T, lower=1)  # half the work of x.T @ x
        self.cross += x.T @ target
        self.total += x.sum(axis=0, dtype=np.float64)
        self.wanted += target.sum(axis=0, dtype=np.float64)
        self.count += len(x)

    def solve(self, start: np.ndarray, strength: float, *, centred: bool) -> tuple[np.ndarray, np.ndarray]:
        """W' [K, out] and b' [out] (zeros where there is no bias, that is, not `centred`).

        Args:
            start: W₀, [K, out].
            strength: λ as a share of the mean variance (or second moment) of x.
        """
        mean, wanted = self.total / self.count, self.wanted / self.count
        inner, cross = self.inputs / self.count, self.cross / self.count
        inner += np.tril(inner, -1).T
        if centred:
            inner, cross = inner - np.outer(mean, mean), cross - np.outer(mean, wanted)
        ridge = strength * float(np.trace(inner)) / len(inner) + np.finfo(np.float64).tiny
        weight = solve_positive(inner + ridge * np.eye(len(inner)), cross + ridge * start)
        return weight, wanted - mean @ weight if centred else np.zeros(len(wanted))


def refit_in_order(
    graph: Graph,
    dependencies: Dependencies,
    linears: Mapping[str, Linear],
    cuts: Sequence[Cut],
    updates: Mapping[str, np.ndarray],
    batches: Iterable[Batch],
    *,
    streams: Mapping[int, np.ndarray] | None = None,
    strength: float = STRENGTH,
    threads: int | None = None,
    provider: str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, np.ndarray]:
    """Refit, in graph order, every projection that ends a branch.

    Args:
        graph: the analysed graph that `cuts` and `updates` refer to.
        updates: the one-shot weights, in their original shapes.
        batches: calibration samples; gone through once.
        streams: by factor, R [old, new] of residual streams that were rotated: x' = x R. Of others that are cut, the
            channels that stay are what they were.
        progress: called with (branches done, branches in all).

    Returns:
        New weights and biases by name, in their original shapes, zero where something is cut; only those that changed.
    """
    branches = find_branches(graph, dependencies, linears)
    if not branches:
        return {}
    narrow = cut_graph(graph, dependencies, cuts, updates)
    narrow.drop_dead()
    whole = _Walk(graph, branches, threads, provider)
    cut = _Walk(narrow, branches, threads, provider)
    states: Iterable[tuple[State, State]] = ((dict(batch.inputs), dict(batch.inputs)) for batch in batches)
    found: dict[str, np.ndarray] = {}
    tokens = 0  # of the branch before; not known for the first, which is fitted on all
    for index, branch in enumerate(branches):
        fit = _Fit(branch, narrow, frozenset(cut.needed(index)))
        ahead, behind = whole.step(index), cut.step(index, skip=branch)
        change = _change(branch, graph, dependencies, cuts, streams or {})
        every = max(1, tokens // (_ENOUGH * len(fit.weight)))
        moved = []
        for original, pruned in states:
            moved.append((ahead(original), behind(pruned)))
            wanted = moved[-1][0][branch.stream]
            fit.add(moved[-1][1], wanted[..., change] if change.ndim == 1 else wanted @ change, every)
        if not moved:
            return {}
        with single_threaded():
            fit.solve(strength)
        for _, pruned in moved:
            fit.advance(pruned)
        fit.write(found, graph, dependencies, cuts)
        states, tokens = moved, fit.tokens
        if progress is not None:
            progress(index + 1, len(branches))
    return found


def _change(
    branch: Branch,
    graph: Graph,
    dependencies: Dependencies,
    cuts: Sequence[Cut],
    streams: Mapping[int, np.ndarray],
) -> np.ndarray:
    """R for the stream that a branch adds to; where that is not rotated, the channels that stay."""
    width = dependencies.facts.shapes[branch.stream][-1]
    atoms = dependencies.atoms(branch.stream, len(dependencies.facts.shapes[branch.stream]) - 1)
    found = next((streams[atom] for atom in atoms if atom in streams), None)
    if found is not None:
        return found.astype(graph.weights[branch.linear.weight].dtype)
    mine = [cut for cut in cuts if cut.atom in atoms]
    return cut_array(np.arange(width), [atoms], dependencies.size, mine)


class _Walk:
    """Runs a network branch by branch."""

    def __init__(self, graph: Graph, branches: Sequence[Branch], threads: int | None, provider: str) -> None:
        self._graph, self._threads, self._provider = graph, threads, provider
        self._segments: list[Segment] = segments(graph, [branch.stream for branch in branches])

    def needed(self, index: int) -> tuple[str, ...]:
        """What has to be handed on behind a branch."""
        return self._segments[index].outputs

    def step(self, index: int, skip: Branch | None = None) -> Callable[[State], State]:
        """From the state before a branch to the one behind it.

        Args:
            skip: stop short of this branch: the state then holds the projection's input and the other summand instead.
        """
        segment = self._segments[index]
        outputs = list(segment.outputs)
        if skip is not None:
            outputs = list(dict.fromkeys([*(n for n in outputs if n != skip.stream), skip.linear.data, skip.other]))
        kept = [name for name in outputs if name in segment.inputs]
        made = [name for name in outputs if name not in segment.inputs]
        opened: list[tuple[SharedSession, list[str]]] = []

        def run(state: State) -> State:
            if not opened:  # element types are known once there is a sample
                part = segment_graph(self._graph, segment, made, {name: array.dtype for name, array in state.items()})
                opened.append((part.session(threads=self._threads, provider=self._provider), part.inputs))
            session, read = opened[0]
            values = session.run(made, {name: state[name] for name in read}) if made else []
            return {name: state[name] for name in kept} | dict(zip(made, values, strict=True))

        return run


@dataclass
class _Fit:
    """The refit of one branch: x and T of all samples go in, new weights and the next state come out."""

    branch: Branch
    narrow: Graph
    needed: frozenset[str]
    weight: np.ndarray = field(init=False)
    bias: np.ndarray = field(init=False)
    scale: np.ndarray = field(init=False)
    joint: Joint = field(init=False)
    batches: int = 0
    tokens: int = 0

    def __post_init__(self) -> None:
        linear, weights = self.branch.linear, self.narrow.weights
        self.weight = np.moveaxis(weights[linear.weight], linear.inner, 0)
        width, out = self.weight.shape
        self.bias = weights[linear.bias].reshape(-1) if linear.bias is not None else np.zeros(out, self.weight.dtype)
        self.scale = weights[self.branch.scale].reshape(-1) if self.branch.scale else np.ones(out, self.weight.dtype)
        self.joint = Joint.empty(width, out)

    def add(self, state: State, wanted: np.ndarray, every: int) -> None:
        """Take every so manieth token of a batch."""
        start = self.batches % every  # else the same positions of every image would be left out
        rows = slice(start, None, every)
        wanted, other = (array.reshape(-1, len(self.bias)) for array in (wanted, state[self.branch.other]))
        self.joint.add(self._inputs(state)[rows], (wanted[rows].astype(np.float32) - other[rows]) / self.scale)
        self.batches += 1
        self.tokens += len(wanted)

    def _inputs(self, state: State) -> np.ndarray:
        return state[self.branch.linear.data].reshape(-1, len(self.weight))

    def solve(self, strength: float) -> None:
        linear, dtype = self.branch.linear, self.weight.dtype
        start = self.weight.astype(np.float64)
        weight, bias = self.joint.solve(start, strength, centred=linear.bias is not None)
        self.weight, self.bias = weight.astype(dtype), bias.astype(dtype)

    def advance(self, state: State) -> None:
        """Put the sum in the place of what it was made of."""
        branch = self.branch
        output = (self._inputs(state) @ self.weight + self.bias) * self.scale
        state[branch.stream] = state[branch.other] + output.reshape(state[branch.other].shape)
        for name in {branch.linear.data, branch.other} - self.needed:
            del state[name]

    def write(
        self, found: dict[str, np.ndarray], graph: Graph, dependencies: Dependencies, cuts: Sequence[Cut]
    ) -> None:
        """New weights in their original shapes."""
        linear = self.branch.linear
        found[linear.weight] = _spread(
            np.moveaxis(self.weight, 0, linear.inner), graph.weights[linear.weight], linear.weight, dependencies, cuts
        )
        if linear.bias is not None:
            found[linear.bias] = _spread(self.bias, graph.weights[linear.bias], linear.bias, dependencies, cuts)


def _spread(
    array: np.ndarray, original: np.ndarray, name: str, dependencies: Dependencies, cuts: Sequence[Cut]
) -> np.ndarray:
    """A cut weight in its original shape, zero where something was cut."""
    places = np.arange(original.size).reshape(original.shape)
    mine = touched(dependencies, name, cuts)
    if mine:
        places = cut_array(places, weight_axes(dependencies, name), dependencies.size, mine)
    full = np.zeros(original.size, original.dtype)
    full[places.reshape(-1)] = array.astype(original.dtype).reshape(-1)
    return full.reshape(original.shape)
