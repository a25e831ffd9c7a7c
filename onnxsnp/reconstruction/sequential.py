"""Sequential refit: a projection that ends a branch is fitted to what the residual stream lacks there (METHODS 2.4).

One-shot compensation assumes that a layer sees the inputs it saw in the original. Behind earlier cuts it does not, and
errors add up. Here the original and the cut network run side by side, branch by branch. With x the projection's input
in the cut network, refitted so far, and T what the original has on the residual stream after the branch less what the
cut network has before it,

    W' = (Cxx + λI)⁻¹ (CxT + λ W₀),      b' = E[T] − E[x] W',

with covariances about the means and W₀ the one-shot solution. T is mostly noise in the many directions in which x
varies little, and what is learnt there from a few hundred images does not carry over to others. So the ridge is strong,
three times the mean variance of x: only directions with well more than their share of the variance are corrected.

A feed-forward branch whose width is cut is first fitted as a whole to what the original's branch does with the
original's stream (see `local`).

Both networks advance once over the calibration data: between two branches only the residual stream of the samples is
kept, in memory, and the inputs of one projection.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from scipy.linalg import blas

from onnxsnp.blas import single_threaded
from onnxsnp.calibration.data import Batch
from onnxsnp.graph.branches import Branch, find_branches
from onnxsnp.graph.dependency import Dependencies
from onnxsnp.graph.feedforward import find_feedforward
from onnxsnp.graph.ir import Graph, SharedSession
from onnxsnp.graph.segments import Segment, segment_graph, segments
from onnxsnp.model import give_back
from onnxsnp.parallel import Crew
from onnxsnp.reconstruction.local import TOKENS, LocalFit, Tokens
from onnxsnp.reconstruction.refit import solve_positive
from onnxsnp.surgery.rewrite import Cut, cut_array, cut_graph, spread, touched, weight_axes

if TYPE_CHECKING:
    from onnxsnp.analysis import Analysis

_ENOUGH = 32  # tokens per fitted row of a weight; neighbouring tokens say much the same
_ROOM = 1024  # width of x from which on it is kept in half precision
_LEAST, _MOST = 0.1, 6e4  # of the largest |x| for which that will do
STRENGTH = 3.0  # λ as a share of the mean variance of x

State = dict[str, np.ndarray]
Item = TypeVar("Item")
Other = TypeVar("Other")


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

    @staticmethod
    def of(x: np.ndarray, target: np.ndarray) -> Joint:
        """The moments of some tokens, [tokens, K] and [tokens, out]; products are in single precision."""
        x, target = (array.astype(np.float32, copy=False) for array in (x, target))
        inputs = blas.ssyrk(1.0, x.T, lower=1)  # half the work of x.T @ x
        total, wanted = (array.sum(axis=0, dtype=np.float64) for array in (x, target))
        return Joint(inputs, x.T @ target, total, wanted, len(x))

    def add(self, other: Joint) -> None:
        """Add the moments of other tokens, in double precision."""
        self.inputs += other.inputs
        self.cross += other.cross
        self.total += other.total
        self.wanted += other.wanted
        self.count += other.count

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
    analysis: Analysis,
    cuts: Sequence[Cut],
    updates: Mapping[str, np.ndarray],
    batches: Iterable[Batch],
    *,
    streams: Mapping[int, np.ndarray] | None = None,
    strength: float = STRENGTH,
    local: bool = True,
    threads: int | None = None,
    provider: str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, np.ndarray]:
    """Refit, in graph order, every projection that ends a branch.

    Args:
        cuts: in the terms of the analysed graph.
        updates: the one-shot weights, in their original shapes.
        batches: calibration samples; gone through once.
        streams: by factor, R [old, new] of residual streams that were rotated: x' = x R. Of others that are cut, the
            channels that stay are what they were.
        strength: λ as a share of the mean variance of the projection's input.
        local: fit feed-forward branches whose width is cut as a whole first (see `local`).
        progress: called with (branches done, branches in all).

    Returns:
        New weights and biases by name, in their original shapes, zero where something is cut; only those that changed.
    """
    graph = analysis.graph
    shared = graph.origin.keys() | set(graph.origin.values())  # matrices refitted apart would take up more room
    linears = {name: one for name, one in analysis.linears.items() if one.weight not in shared}
    branches = find_branches(graph, analysis.dependencies, linears)
    if not branches:
        return {}
    sweep = _Sweep(analysis, branches, cuts, updates, streams or {}, Crew.of(threads, provider))
    sweep.strength, sweep.local = strength, local
    pairs: Iterable[tuple[State, State]] = ((dict(batch.inputs), dict(batch.inputs)) for batch in batches)
    with single_threaded():  # the threads of BLAS and those of onnxruntime would wait for each other
        for index in range(len(branches)):
            states = sweep.branch(index, pairs)
            if not states:
                return {}
            pairs = _taken(states)
            give_back()
            if progress is not None:
                progress(index + 1, len(branches))
    return sweep.found()


class _Sweep:
    """The two networks on their way, and the weights found so far."""

    def __init__(
        self,
        analysis: Analysis,
        branches: Sequence[Branch],
        cuts: Sequence[Cut],
        updates: Mapping[str, np.ndarray],
        streams: Mapping[int, np.ndarray],
        crew: Crew,
    ) -> None:
        self._analysis, self._branches, self._cuts = analysis, branches, cuts
        self._streams, self._crew = streams, crew
        self._narrow = cut_graph(analysis.graph, analysis.dependencies, cuts, updates)
        self._narrow.drop_dead()
        self._whole = _Walk(analysis.graph, branches, crew)
        self._cut = _Walk(self._narrow, branches, crew)
        self._tokens = 0  # of the branch before; not known for the first, which is fitted on all
        self.strength, self.local = STRENGTH, True
        self._new: set[str] = set()

    def branch(self, index: int, states: Iterable[tuple[State, State]]) -> list[tuple[State, State]]:
        """Fit one branch, and take all samples past it."""
        branch = self._branches[index]
        change = _change(branch, self._analysis, self._cuts, self._streams)

        def mapped(array: np.ndarray) -> np.ndarray:
            return array if change is None else array[..., change] if change.ndim == 1 else array @ change

        ahead = self._whole.step(index, [branch.stream, branch.other])
        network = self._local(branch)
        if network is not None:
            states, ahead = self._fit_whole(network, branch, states, ahead, mapped), _same
        fit = _Fit(branch, self._narrow, branch.linear.data not in self._cut.needed(index))
        every = self._tokens // (_ENOUGH * len(fit.weight))
        behind = self._cut.step(index, [branch.linear.data, branch.other], skip=branch.stream)

        def advance(item: tuple[int, tuple[State, State]]) -> tuple[tuple[State, State], Joint, int]:
            number, (original, pruned) = item
            original, pruned = ahead(original), behind(pruned)
            wanted = mapped(original[branch.stream])
            joint = fit.moments(pruned, wanted, _rows(number, every))
            self._whole.forget(index, original)
            fit.pack(pruned)
            return (original, pruned), joint, wanted.size // wanted.shape[-1]

        moved, self._tokens = [], 0
        for state, joint, tokens in self._crew.map(advance, enumerate(states)):
            moved.append(state)
            fit.joint.add(joint)
            self._tokens += tokens
        give_back()
        if not moved:
            return []
        fit.solve(self.strength)
        self._take(fit.weights())

        def finish(state: tuple[State, State]) -> None:
            fit.advance(state[1])
            self._cut.forget(index, state[1])

        for _ in self._crew.map(finish, moved):
            pass
        return moved

    def _fit_whole(
        self,
        network: LocalFit,
        branch: Branch,
        states: Iterable[tuple[State, State]],
        ahead: Callable[[State], State],
        mapped: Callable[[np.ndarray], np.ndarray],
    ) -> Iterator[tuple[State, State]]:
        """Take the original past a feed-forward branch, fit the branch to it, and return the states."""

        def collect(item: tuple[int, tuple[State, State]]) -> tuple[tuple[State, State], Tokens]:
            number, (original, pruned) = item
            original = ahead(original)
            before, after = mapped(original[branch.other]), mapped(original[branch.stream])
            return (original, pruned), network.tokens(before, after - before, _rows(number, self._tokens // TOKENS))

        passed, tokens = _unzipped(self._crew.map(collect, enumerate(states)))
        give_back()  # every worker's memory is full of holes that only its own next batch would fill
        if tokens:
            self._take(network.fit(tokens))
        return _taken(passed)

    def _local(self, branch: Branch) -> LocalFit | None:
        """The fit of a feed-forward branch as a whole, if anything of it is cut."""
        analysis, cut = self._analysis, {one.atom for one in self._cuts}
        network = find_feedforward(branch, analysis.groups, analysis.graph, analysis.linears) if self.local else None
        return LocalFit(network, self._narrow, self._crew) if network and network.group.atom in cut else None

    def _take(self, new: Mapping[str, np.ndarray]) -> None:
        """Weights of the narrow network."""
        self._narrow.weights.update(new)
        self._new.update(new)

    def found(self) -> dict[str, np.ndarray]:
        """The weights found, in their original shapes: they take up more room than the samples leave until the end."""
        weights, dependencies = self._analysis.graph.weights, self._analysis.dependencies
        return {
            name: _spread(self._narrow.weights[name], weights[name], name, dependencies, self._cuts)
            for name in sorted(self._new)
        }


def _same(state: State) -> State:
    return state


def _unzipped(pairs: Iterable[tuple[Item, Other]]) -> tuple[list[Item], list[Other]]:
    """Two lists from an iterator of pairs."""
    found: tuple[list[Item], list[Other]] = ([], [])
    for one, two in pairs:
        found[0].append(one)
        found[1].append(two)
    return found


def _taken(states: list[tuple[State, State]]) -> Iterator[tuple[State, State]]:
    """The states in order; each leaves the list as it is given, so that old and new ones are not held at once."""
    states.reverse()
    while states:
        yield states.pop()


def _rows(number: int, every: int) -> slice:
    """Some tokens of a batch: every so manieth, not the same ones in each, or positions would be left out."""
    return slice(number % max(every, 1), None, max(every, 1))


def _change(
    branch: Branch, analysis: Analysis, cuts: Sequence[Cut], streams: Mapping[int, np.ndarray]
) -> np.ndarray | None:
    """R for the stream that a branch adds to; where that is not rotated, the channels that stay; None if all do."""
    dependencies = analysis.dependencies
    shape = dependencies.facts.shapes[branch.stream]
    atoms = dependencies.atoms(branch.stream, len(shape) - 1)
    found = next((streams[atom] for atom in atoms if atom in streams), None)
    if found is not None:
        return found.astype(analysis.graph.weights[branch.linear.weight].dtype)
    mine = [cut for cut in spread(dependencies, cuts) if cut.atom in atoms]
    return cut_array(np.arange(shape[-1]), [atoms], dependencies.size, mine) if mine else None


class _Walk:
    """Runs a network branch by branch."""

    def __init__(self, graph: Graph, branches: Sequence[Branch], crew: Crew) -> None:
        self._graph, self._opened = graph, crew.opened
        self._segments: list[Segment] = segments(graph, [branch.stream for branch in branches])

    def forget(self, index: int, state: State) -> None:
        """Drop, in place, what nothing behind a branch needs."""
        for name in state.keys() - set(self._segments[index].outputs):
            del state[name]

    def needed(self, index: int) -> frozenset[str]:
        """What is read behind a branch."""
        return frozenset(self._segments[index].outputs)

    def step(self, index: int, extra: Sequence[str], skip: str | None = None) -> Callable[[State], State]:
        """From the state before a branch to the one behind it.

        Args:
            extra: further tensors to return.
            skip: a tensor that is not to be computed.
        """
        segment = self._segments[index]
        outputs = [name for name in dict.fromkeys([*segment.outputs, *extra]) if name != skip]
        kept = [name for name in outputs if name in segment.inputs]
        made = [name for name in outputs if name not in segment.inputs]
        sessions: list[tuple[SharedSession, list[str]]] = []
        opening = Lock()

        def run(state: State) -> State:
            with opening:
                if not sessions:  # element types are known once there is a sample
                    kinds = {name: array.dtype for name, array in state.items()}
                    part = segment_graph(self._graph, segment, made, kinds)
                    sessions.append((part.timed_session(**self._opened, arena=False), part.inputs))
            session, read = sessions[0]
            values = session.run(made, {name: state[name] for name in read}) if made else []
            return {name: state[name] for name in kept} | dict(zip(made, values, strict=True))

        return run


@dataclass
class _Fit:
    """The refit of the projection that ends a branch: x and T of all samples go in, weights and the stream come out."""

    branch: Branch
    narrow: Graph
    spare: bool  # whether nothing behind the branch reads x
    weight: np.ndarray = field(init=False)
    bias: np.ndarray = field(init=False)
    scale: np.ndarray = field(init=False)
    joint: Joint = field(init=False)

    def __post_init__(self) -> None:
        linear, weights = self.branch.linear, self.narrow.weights
        self.weight = np.moveaxis(weights[linear.weight], linear.inner, 0)
        width, out = self.weight.shape
        self.bias = weights[linear.bias].reshape(-1) if linear.bias is not None else np.zeros(out, self.weight.dtype)
        self.scale = weights[self.branch.scale].reshape(-1) if self.branch.scale else np.ones(out, self.weight.dtype)
        self.joint = Joint.empty(width, out)

    def moments(self, state: State, wanted: np.ndarray, rows: slice) -> Joint:
        """Of some tokens of a batch; `wanted` is the stream as it should be."""
        goal, other = (self.branch.rows(array)[rows] for array in (wanted, state[self.branch.other]))
        return Joint.of(self._inputs(state)[rows], (goal.astype(np.float32) - other) / self.scale)

    def pack(self, state: State) -> None:
        """Keep a wide x in half precision: it takes the most room of all, and its last bits say nothing.

        Not where its values leave the range in which half precision is relative to the largest of them.
        """
        x = state[self.branch.linear.data]
        if (
            x.dtype == np.float32
            and self.spare
            and len(self.weight) >= _ROOM
            and _LEAST < np.abs(x).max(initial=0.0) < _MOST
        ):
            state[self.branch.linear.data] = x.astype(np.float16)

    def _inputs(self, state: State) -> np.ndarray:
        x = state[self.branch.linear.data].reshape(-1, len(self.weight))
        return x.astype(self.weight.dtype) if x.dtype == np.float16 else x

    def solve(self, strength: float) -> None:
        dtype, start = self.weight.dtype, self.weight.astype(np.float64)
        weight, bias = self.joint.solve(start, strength, centred=self.branch.linear.bias is not None)
        self.weight, self.bias = weight.astype(dtype), bias.astype(dtype)

    def advance(self, state: State) -> None:
        """Add the sum."""
        other = state[self.branch.other]
        output = (self._inputs(state) @ self.weight + self.bias) * self.scale
        state[self.branch.stream] = other + self.branch.placed(output, other.shape)

    def weights(self) -> dict[str, np.ndarray]:
        """New weights of the narrow network by name."""
        linear = self.branch.linear
        new = {linear.weight: np.moveaxis(self.weight, 0, linear.inner)}
        if linear.bias is not None:
            new[linear.bias] = self.bias.reshape(self.narrow.weights[linear.bias].shape)
        return new


def _spread(
    array: np.ndarray, original: np.ndarray, name: str, dependencies: Dependencies, cuts: Sequence[Cut]
) -> np.ndarray:
    """A cut weight in its original shape, zero where something was cut."""
    places = np.arange(original.size).reshape(original.shape)
    mine = touched(dependencies, name, spread(dependencies, cuts))
    if mine:
        places = cut_array(places, weight_axes(dependencies, name), dependencies.size, mine)
    full = np.zeros(original.size, original.dtype)
    full[places.reshape(-1)] = array.astype(original.dtype).reshape(-1)
    return full.reshape(original.shape)
