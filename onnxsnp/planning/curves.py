"""What a plan costs in accuracy, measured: the change of the model's outputs on a few samples kept in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from onnxsnp.calibration.data import Batch
from onnxsnp.evaluation.accuracy import softmax_kl
from onnxsnp.graph.branches import find_branches
from onnxsnp.graph.ir import Graph, SharedSession
from onnxsnp.graph.precision import is_float
from onnxsnp.graph.segments import Segment, segment_graph, segments
from onnxsnp.parallel import Crew
from onnxsnp.planning.plan import GroupPlan, Plan, as_cuts
from onnxsnp.reconstruction.full import Reconstruction
from onnxsnp.surgery.rewrite import cut_graph, mask_weights, spread

if TYPE_CHECKING:
    from onnxsnp.analysis import Analysis


_STARTS = 6  # places from which the network can be run on


@dataclass
class _Tail:
    """The rest of the network from some place on.

    Attributes:
        first: index of its first node.
        session: takes what was computed before, and every weight it reads.
        weights: names of these weights.
        states: what was computed before, per batch.
    """

    first: int
    session: SharedSession
    weights: frozenset[str]
    states: list[dict[str, np.ndarray]]


class Loss:
    """How far a plan moves the model's outputs.

    The same sessions serve every plan: cut neurons are masked, and the masked weights are fed. What a plan does not
    change is not computed again: a plan that starts in the last third of the network runs only that. Where a width is
    cut that a normalisation averages over, the network is really cut.

    Args:
        batches: samples that the fit has not seen.
    """

    def __init__(
        self,
        analysis: Analysis,
        reconstruction: Reconstruction,
        batches: Sequence[Batch],
        *,
        threads: int | None = None,
        provider: str = "cpu",
    ) -> None:
        self._analysis, self._reconstruction = analysis, reconstruction
        self._crew = Crew.of(threads, provider, len(batches))
        self._counts = [batch.count for batch in batches]
        self._tails = _tails(analysis, batches, self._crew)
        deps = analysis.dependencies
        # zeros in place of channels would count in a mean over them
        self._averaged = {atom for role in deps.facts.statistics for atom in deps.atoms(*role.axis)}
        tail = self._tails[-1]
        self._reference = list(self._crew.map(partial(tail.session.run, None), tail.states))
        order = {node.name: index for index, node in enumerate(analysis.graph.nodes)}
        readers = analysis.graph.readers()
        self._read = {
            name: min((order[node.name] for node, _ in readers.get(name, ())), default=len(order))
            for name in analysis.graph.weights
        }

    def __call__(self, entries: Sequence[GroupPlan], samples: int | None = None) -> float:
        """Loss of a plan with the weights that the reconstruction gives it.

        Args:
            samples: measure on the first batches that hold this many, not on all.

        Returns:
            Mean KL of the softmax of the logits where there are any, else the relative squared error of the outputs.
        """
        return self.of(entries, self._reconstruction.weights(Plan("", list(entries))), samples)

    def of(self, entries: Sequence[GroupPlan], updates: Mapping[str, np.ndarray], samples: int | None = None) -> float:
        """Loss of a plan with given weights (original shapes); arguments otherwise as for a call."""
        cuts = as_cuts(Plan("", list(entries)), self._analysis.groups)
        if self._averaged & {cut.atom for cut in spread(self._analysis.dependencies, cuts)}:
            narrow = cut_graph(self._analysis.graph, self._analysis.dependencies, cuts, updates)
            narrow.drop_dead()
            return self._distance(narrow.session(**self._crew.opened), self._tails[0].states, {}, samples)
        weights = masked_weights(self._analysis, entries, updates)
        earliest = min((self._read[name] for name in weights), default=len(self._analysis.graph.nodes))
        tail = next(tail for tail in reversed(self._tails) if tail.first <= earliest)
        weights = {name: array for name, array in weights.items() if name in tail.weights}
        return self._distance(tail.session, tail.states, weights, samples)

    def _distance(
        self,
        session: SharedSession,
        states: Sequence[dict[str, np.ndarray]],
        weights: Mapping[str, np.ndarray],
        samples: int | None,
    ) -> float:
        total, count = 0.0, 0
        taken = list(zip(self._counts, states, self._reference, strict=True))
        if samples is not None:
            before = np.cumsum([0, *self._counts[:-1]])
            taken = [item for item, seen in zip(taken, before, strict=True) if seen < samples]

        def moved(item: tuple[int, dict[str, np.ndarray], list[np.ndarray]]) -> tuple[int, float]:
            size, state, reference = item
            outputs = session.run(None, state, weights)
            return size, sum(
                distance(want[:size], got[:size])
                for want, got in zip(reference, outputs, strict=True)
                if want.dtype.kind == "f" and want.ndim
            )

        for size, value in self._crew.map(moved, taken):
            total += size * value
            count += size
        return total / count


def _tails(analysis: Analysis, batches: Sequence[Batch], crew: Crew) -> list[_Tail]:
    """The whole network, and its rests from a few places on the residual stream."""
    graph = analysis.graph.copy()
    # every session that is fed a part of a packed weight would make a copy of its own
    graph.weights = {name: np.asarray(array, order="C") for name, array in graph.weights.items()}
    streams = [branch.stream for branch in find_branches(graph, analysis.dependencies, analysis.linears)]
    made = {name: index for index, node in enumerate(graph.nodes) for name in node.output}
    early = min(made.get(name, -1) for name in graph.outputs)  # outputs must not lie before a start
    streams = [name for name in streams if made[name] < early]
    starts = min(_STARTS, len(streams))
    marks = [streams[len(streams) * part // starts] for part in range(1, starts)]
    feed = {name for name, array in graph.weights.items() if is_float(array.dtype) and array.ndim}
    states: list[dict[str, np.ndarray]] = [dict(batch.inputs) for batch in batches]
    found: list[_Tail] = []
    first = 0
    parts = segments(graph, marks)
    for index, part in enumerate(parts):
        rest = tuple(node for later in parts[index:] for node in later.nodes)
        kinds = {name: array.dtype for name, array in states[0].items()}
        tail = segment_graph(graph, Segment(rest, part.inputs, tuple(graph.outputs)), graph.outputs, kinds)
        read = frozenset(feed & tail.weights.keys())
        session = tail.session(feed=read, **crew.opened)
        mine = [{name: state[name] for name in tail.inputs} for state in states]
        found.append(_Tail(first, session, read, mine))
        if index + 1 < len(parts):
            states = _advanced(graph, part, states, kinds, crew)
            first += len(part.nodes)
    return found


def _advanced(
    graph: Graph,
    part: Segment,
    states: Sequence[dict[str, np.ndarray]],
    kinds: Mapping[str, np.dtype],
    crew: Crew,
) -> list[dict[str, np.ndarray]]:
    """The states behind a segment."""
    made = [name for name in part.outputs if name not in part.inputs]
    between = segment_graph(graph, part, made, kinds)
    session = between.session(**crew.opened)

    def run(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        values = session.run(made, {name: state[name] for name in between.inputs})
        kept = {name: state[name] for name in part.outputs if name in part.inputs}
        return kept | dict(zip(made, values, strict=True))

    return list(crew.map(run, states))


def distance(reference: np.ndarray, outputs: np.ndarray) -> float:
    """KL(softmax(reference) ‖ softmax(outputs)) in nats for [samples, classes], else squared error over variance."""
    if reference.ndim == 2 and reference.shape[1] > 1:
        return float(np.mean(softmax_kl(reference.astype(np.float64), outputs.astype(np.float64))))
    wanted = reference.astype(np.float64)
    spread = float(np.mean((wanted - wanted.mean()) ** 2)) or 1.0
    return float(np.mean((wanted - outputs) ** 2)) / spread


def masked_weights(
    analysis: Analysis, entries: Sequence[GroupPlan], updates: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The analysed graph's weights under a plan, in their original shapes, zero where something is cut."""
    cuts = as_cuts(Plan("", list(entries)), analysis.groups)
    return mask_weights(analysis.graph, analysis.dependencies, cuts, updates)
