"""What operators say about axes: ties, freezes, and the roles of weights. Plain data that the rules write to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from onnxsnp.graph.axes import Axis, Tie


@dataclass(frozen=True)
class Freeze:
    """`axis` must keep its size and order, because of `reason` at `node`."""

    axis: Axis
    reason: str
    node: str


@dataclass(frozen=True)
class Role:
    """A weight axis that an operator emits ('producer') or contracts ('consumer')."""

    kind: str
    axis: Axis
    node: str


@dataclass(frozen=True)
class Product:
    """A matrix product of two activations: `left` [.., rows, k] times `right` [.., k, columns]."""

    node: str
    left: Axis
    right: Axis
    rows: Axis
    columns: Axis
    output: str


@dataclass(frozen=True)
class Select:
    """`output` is `source` restricted to indices [start, stop) of `axis`; `drops_axis` if that axis is then gone."""

    node: str
    source: str
    axis: int
    output: str
    start: int
    stop: int
    drops_axis: bool = False


@dataclass(frozen=True)
class Concatenation:
    """The axis `whole` is the axes `parts`, one after the other."""

    node: str
    whole: Axis
    parts: tuple[Axis, ...]


@dataclass
class Facts:
    """Everything the rules said about a graph.

    `joins` are the operand tuples of additions of activations; `sums` those of the freezes that are because of a sum or
    a length; `statistics` the axes normalisations run over; `virtual` the sizes of axes that exist only inside an
    operator (the heads of a 3-D Attention operand); `unread` the tensors of which only the sizes are read; `blocks` the
    nodes that take or join parts of an axis whose blocks go together, and `counts` the axes that number these blocks.
    """

    shapes: Mapping[str, tuple[int, ...]]
    weights: Mapping[str, np.ndarray]
    opset: int
    ties: list[Tie] = field(default_factory=list)
    freezes: list[Freeze] = field(default_factory=list)
    roles: list[Role] = field(default_factory=list)
    products: list[Product] = field(default_factory=list)
    selects: list[Select] = field(default_factory=list)
    statistics: list[Role] = field(default_factory=list)
    joins: list[tuple[str, ...]] = field(default_factory=list)
    concatenations: list[Concatenation] = field(default_factory=list)
    sums: list[Freeze] = field(default_factory=list)
    virtual: dict[Axis, int] = field(default_factory=dict)
    unread: frozenset[str] = frozenset()
    blocks: frozenset[str] = frozenset()
    counts: list[Axis] = field(default_factory=list)
    node: str = ""

    def rank(self, name: str) -> int:
        return len(self.shapes[name])

    def value(self, name: str) -> np.ndarray | None:
        """A weight's values, None for an activation or an omitted input."""
        return self.weights.get(name)

    def size(self, axis: Axis) -> int:
        return self.virtual[axis] if axis in self.virtual else self.shapes[axis[0]][axis[1]]

    def same(self, left: Axis, right: Axis) -> None:
        """Tie two axes."""
        self.ties.append(Tie((left,), (right,), self.node))

    def regroup(self, left: Sequence[Axis], right: Sequence[Axis]) -> None:
        """Tie two row-major products of axes."""
        self.ties.append(Tie(tuple(left), tuple(right), self.node))

    def freeze(self, axis: Axis, reason: str) -> None:
        self.freezes.append(Freeze(axis, reason, self.node))

    def freeze_all(self, names: Sequence[str], reason: str) -> None:
        for name in names:
            if name and name in self.shapes:
                for axis in axes_of(self, name):
                    self.freeze(axis, reason)

    def linear(self, weight: str, contracted: int, kept: int) -> None:
        """Record a weight matrix's two sides."""
        self.roles.append(Role("consumer", (weight, contracted), self.node))
        self.roles.append(Role("producer", (weight, kept), self.node))


def axes_of(facts: Facts, name: str) -> list[Axis]:
    """All axes of a tensor."""
    return [(name, index) for index in range(facts.rank(name))]
