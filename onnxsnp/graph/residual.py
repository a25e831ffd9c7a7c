"""Can the residual stream have another basis? Who writes it, through which normalisations it is read, and by whom.

METHODS 2.5: a change of basis is legal where the stream is a sum of what projections and constants write, and every
reader is a projection behind a layer normalisation. Such a normalisation ignores the mean over the channels and, once
its gain and shift are folded into its readers, treats all directions alike. Where the stream itself is normalised (as
in BERT), or read in any other way, only selection is left.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from onnx import NodeProto

from onnxsnp.graph.axes import Axis
from onnxsnp.graph.dependency import Dependencies
from onnxsnp.graph.groups import Group
from onnxsnp.graph.ir import Graph, attribute
from onnxsnp.graph.linear import Linear
from onnxsnp.graph.paths import REARRANGE

_MOVES = REARRANGE | {"Expand", "Concat", "Slice", "Gather", "Split", "ReduceMean"}  # each entry keeps its channel
_FAINT = 1e-6  # of the largest gain ...
_DROWNED = 1e-2  # ... or of its own shift: with less, moments in single precision say nothing about a channel


@dataclass(frozen=True)
class Norm:
    """A layer normalisation over the stream's channels.

    Attributes:
        scale: name of its gain γ, [size].
        shift: name of its shift β, [size]; None if it has none.
    """

    scale: str
    shift: str | None


@dataclass(frozen=True)
class ResidualSite:
    """A residual group whose basis may change.

    Attributes:
        group: the group.
        writers: weights and constants that are summed into the stream, each with the axis of the channels.
        factors: constants that multiply what some of the writers write, channel by channel, by the writer's name.
        readers: the projections that read the stream, each with the normalisation it reads it through.
    """

    group: Group
    writers: tuple[Axis, ...]
    factors: Mapping[str, tuple[str, ...]]
    readers: tuple[tuple[Linear, Norm], ...]

    @property
    def tensors(self) -> list[str]:
        """The activations whose second moments tell what the stream holds, one of each normalisation and selection."""
        return list(dict.fromkeys(linear.data for linear, _ in self.readers))


def hidden_channels(scale: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """Channels that cannot be told from the output of a normalisation, because their gain is too small; bool, [size].

    Args:
        scale, shift: γ and β, [size].
    """
    faint: np.ndarray = np.abs(scale) <= np.maximum(_FAINT * np.abs(scale).max(), _DROWNED * np.abs(shift))
    return faint


def find_residual(
    group: Group, graph: Graph, dependencies: Dependencies, linears: Mapping[str, Linear]
) -> ResidualSite | str:
    """The writers, normalisations and readers of a residual group, or why its basis cannot change."""
    return _Walk(group, graph, dependencies, linears).run()


@dataclass(frozen=True)
class _State:
    """What a tensor with the stream's channels holds.

    Attributes:
        norm: the normalisation it went through; None on the stream itself.
        sources: writers summed into it if they reach nothing else; None where they do.
    """

    norm: Norm | None = None
    sources: frozenset[str] | None = None


class _Blocked(Exception):
    """The reason why the basis cannot change."""


@dataclass
class _Walk:
    """One pass over the nodes in topological order, from the writers to the readers."""

    group: Group
    graph: Graph
    dependencies: Dependencies
    linears: Mapping[str, Linear]
    states: dict[str, _State] = field(default_factory=dict)
    writers: dict[str, int] = field(default_factory=dict)
    factors: dict[str, list[str]] = field(default_factory=dict)
    found: list[tuple[Linear, Norm]] = field(default_factory=list)
    inside: set[str] = field(default_factory=set)  # nodes of normalisations that are spelled out

    def run(self) -> ResidualSite | str:
        self._reads = self.graph.readers()
        self._by_node = {linear.node: linear for linear in self.linears.values()}
        try:
            for node in self.graph.nodes:
                if node.op_type not in ("Shape", "Size") and any(map(self._carries, [*node.input, *node.output])):
                    self._visit(node)
        except _Blocked as reason:
            return str(reason)
        if not self.found or not self.writers:
            return "nothing reads the stream through a normalisation"
        factors = {name: tuple(by) for name, by in self.factors.items()}
        return ResidualSite(self.group, tuple(self.writers.items()), factors, tuple(self.found))

    def _carries(self, name: str) -> bool:
        known = name in self.dependencies.facts.shapes
        return known and self.group.atom in self.dependencies.atoms(name)

    def _axis(self, name: str, node: NodeProto) -> int:
        """The axis of a tensor that is the channels and nothing else."""
        rank = len(self.dependencies.facts.shapes[name])
        axes = [axis for axis in range(rank) if self.group.atom in self.dependencies.atoms(name, axis)]
        if len(axes) != 1 or self.dependencies.atoms(name, axes[0]) != (self.group.atom,):
            raise _Blocked(f"the channels share an axis of '{name}' (at {node.name})")
        return axes[0]

    def _visit(self, node: NodeProto) -> None:
        if node.name in self.inside:
            return
        if node.name in self._by_node:
            self._projection(node, self._by_node[node.name])
        elif node.op_type == "LayerNormalization":
            self._norm(node)
        elif node.op_type == "ReduceMean" and self._over_channels(node):
            self._spelled_norm(node)
        elif node.op_type in ("Add", "Sum"):
            self._sum(node)
        elif node.op_type in ("Mul", "Div"):
            self._scaled(node)
        elif node.op_type in _MOVES:
            self._moved(node)
        else:
            raise _Blocked(f"{node.op_type} at {node.name}")

    def _write(self, name: str, axis: int, node: NodeProto) -> None:
        if name in self.writers and self.writers[name] != axis:
            raise _Blocked(f"'{name}' is written twice (at {node.name})")
        self.writers[name] = axis

    def _state(self, name: str, node: NodeProto) -> _State:
        """What an input holds; a constant is a writer."""
        if name in self.graph.weights:
            self._write(name, self._axis(name, node), node)
            return _State(None, frozenset({name}))
        if name not in self.states:
            raise _Blocked(f"'{name}' comes from elsewhere (at {node.name})")
        held = self.states[name]
        alone = len([use for use in self._reads.get(name, []) if use[0].op_type not in ("Shape", "Size")]) == 1
        return held if alone else _State(held.norm)

    def _projection(self, node: NodeProto, linear: Linear) -> None:
        atom, deps = self.group.atom, self.dependencies
        rest = [name for name in node.input if name and name not in (linear.data, linear.weight)]
        if self._carries(linear.data):
            held = self._state(linear.data, node)
            if held.norm is None:
                raise _Blocked(f"{node.name} reads the stream without a normalisation")
            last = len(deps.facts.shapes[linear.data]) - 1
            inner = deps.atoms(linear.weight, linear.inner)
            if not linear.plain or inner != (atom,) or deps.atoms(linear.data, last) != (atom,):
                raise _Blocked(f"{node.name} does not read the channels as its features")
            self.found.append((linear, held.norm))
        if atom in deps.atoms(linear.weight, linear.outer):
            wrote = [linear.weight, *(name for name in rest if self._carries(name))]
            if deps.atoms(linear.weight, linear.outer) != (atom,) or set(wrote) - self.graph.weights.keys():
                raise _Blocked(f"{node.name} does not write the channels alone")
            self._write(linear.weight, linear.outer, node)
            for name in wrote[1:]:
                self._write(name, self._axis(name, node), node)
            self.states[node.output[0]] = _State(None, frozenset(wrote))

    def _norm(self, node: NodeProto) -> None:
        data = node.input[0]
        last = len(self.dependencies.facts.shapes[data]) - 1
        shift = node.input[2] if len(node.input) > 2 and node.input[2] else None
        whole = attribute(node, "axis", -1) % (last + 1) == last and self._axis(data, node) == last
        if not whole or any(name and name in self._reads for name in node.output[1:]):
            raise _Blocked(f"{node.name} does not normalise the channels alone")
        self._normalised(data, node, node.output[0], node.input[1], shift)

    def _over_channels(self, node: NodeProto) -> bool:
        roles = [role.axis for role in self.dependencies.facts.statistics if role.node == node.name]
        return any(self.group.atom in self.dependencies.atoms(*axis) for axis in roles)

    def _normalised(self, data: str, node: NodeProto, output: str, scale: str, shift: str | None) -> None:
        if self._state(data, node).norm is not None:
            raise _Blocked(f"{node.name} normalises what is normalised already")
        weights = self.graph.weights
        for name in (scale, shift):
            if name is not None and (name not in weights or weights[name].size != self.group.size):
                raise _Blocked(f"gain or shift of {node.name} is not one constant per channel")
        shifts = weights[shift] if shift is not None else np.zeros(1)
        if 2 * hidden_channels(weights[scale].reshape(-1), shifts.reshape(-1)).sum() > self.group.size:
            raise _Blocked(f"{node.name} hides most channels: their gains are almost zero")
        self.states[output] = _State(Norm(scale, shift))

    def _spelled_norm(self, mean: NodeProto) -> None:
        """(x − mean) / √(mean((x − mean)²) + ε) γ + β in operators, as exporters wrote it before opset 17."""
        data = mean.input[0]
        nodes = [mean]

        def after(name: str, *kinds: str) -> NodeProto:
            """The one node that reads a tensor."""
            uses = {id(node): node for node, _ in self._reads.get(name, [])}
            if len(uses) != 1 or next(iter(uses.values())).op_type not in kinds:
                raise _Blocked(f"{mean.name} is not part of a layer normalisation")
            nodes.extend(uses.values())
            return nodes[-1]

        centred = after(mean.output[0], "Sub")
        uses = {id(node): node for node, _ in self._reads.get(centred.output[0], [])}.values()
        ratio = next((node for node in uses if node.op_type == "Div"), None)
        square = next((node for node in uses if node.op_type in ("Pow", "Mul")), None)
        if len(uses) != 2 or ratio is None or square is None or list(centred.input) != [data, mean.output[0]]:
            raise _Blocked(f"{mean.name} is not part of a layer normalisation")
        power = self.graph.weights.get(square.input[1])
        twice = list(square.input) == [centred.output[0]] * 2 if square.op_type == "Mul" else power is not None
        spread = after(square.output[0], "ReduceMean")
        root = after(after(spread.output[0], "Add").output[0], "Sqrt")
        whole = twice and (power is None or np.all(power == 2)) and self._over_channels(spread)
        if not whole or after(root.output[0], "Div") is not ratio or ratio.input[0] != centred.output[0]:
            raise _Blocked(f"{mean.name} is not part of a layer normalisation")
        gain = after(ratio.output[0], "Mul")
        scale, shift, output = self._constant(gain), None, gain.output[0]
        following = [node for node, _ in self._reads.get(output, [])]
        if len(following) == 1 and following[0].op_type == "Add" and self._constant(following[0]) is not None:
            nodes.append(following[0])
            shift, output = self._constant(following[0]), following[0].output[0]
        if scale is None:
            raise _Blocked(f"gain of {mean.name} is not one constant per channel")
        self.inside.update(node.name for node in [*nodes, square, ratio])
        self._normalised(data, mean, output, scale, shift)

    def _constant(self, node: NodeProto) -> str | None:
        """The constant with a number per channel among a node's two inputs."""
        return next((name for name in node.input if name in self.graph.weights and self._carries(name)), None)

    def _sum(self, node: NodeProto) -> None:
        held = []
        for name in node.input:
            if not self._carries(name):
                raise _Blocked(f"{node.name} adds '{name}', which has no channels")
            held.append(self._state(name, node))
        if any(state.norm is not None for state in held):
            raise _Blocked(f"{node.name} adds to what is normalised")
        self.states[node.output[0]] = self._together(held)

    def _scaled(self, node: NodeProto) -> None:
        """A factor per channel goes into the writers before it; one number for all changes nothing."""
        data = next((name for name in node.input if name not in self.graph.weights), "")
        by = next((name for name in node.input if name in self.graph.weights), "")
        if not by or (node.op_type == "Div" and node.input[1] != by):
            raise _Blocked(f"{node.op_type} at {node.name}")
        held = self._state(data, node)
        if self._carries(by):
            if held.norm is not None or held.sources is None or node.op_type == "Div":
                raise _Blocked(f"{node.name} weighs the channels")
            if self.graph.weights[by].size != self.group.size:
                raise _Blocked(f"{node.name} weighs more than the channels")
            for name in held.sources:
                self.factors.setdefault(name, []).append(by)
        elif self.graph.weights[by].size != 1 or held.norm is not None:
            raise _Blocked(f"{node.name} weighs the stream")
        self.states[node.output[0]] = held

    def _moved(self, node: NodeProto) -> None:
        inputs = [name for name in node.input if name and self._carries(name)]
        outputs = [name for name in node.output if name and self._carries(name)]
        if not inputs or not outputs:
            raise _Blocked(f"{node.op_type} at {node.name}")
        held = self._together([self._state(name, node) for name in inputs])
        for name in outputs:
            self.states[name] = held if len(outputs) == 1 else _State(held.norm)

    def _together(self, held: list[_State]) -> _State:
        """What a sum or a concatenation of tensors holds."""
        if len({state.norm for state in held}) > 1:
            raise _Blocked("tensors behind different normalisations are put together")
        sources: frozenset[str] | None = frozenset()
        for state in held:
            sources = None if sources is None or state.sources is None else sources | state.sources
        return _State(held[0].norm, sources)
