"""The dependency graph: which factors of which tensors are one and the same, and why.

Nodes of the networkx graph are (tensor, axis, position) factors; an edge says which operator tied two of them. A
connected component is a set of indices that can only be cut together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import networkx as nx

from onnxsnp.graph.axes import Axis, Factors, solve
from onnxsnp.graph.facts import Facts, Freeze
from onnxsnp.graph.ir import Graph, subgraph_reads
from onnxsnp.graph.rules import gather_facts
from onnxsnp.graph.sharing import tie_shared_weights
from onnxsnp.graph.stacks import Stack, find_stacks, spread_freezes

Place = tuple[str, int, int]  # (tensor, axis, position of the factor inside the axis)


@dataclass
class Dependencies:
    """Result of the axis algebra on one graph.

    Attributes:
        facts: what the rules said.
        factors: the solved factors; `atoms` of an axis are the identities used everywhere else.
        graph: networkx graph over places, edges carry `node` (the operator that tied them).
        places: where each factor occurs.
        frozen: what forbids cutting a factor; factors that may be cut are absent.
        stacks: factors whose indices are those of others, one run after the other.
    """

    facts: Facts
    factors: Factors
    graph: nx.Graph
    places: dict[int, list[Place]]
    frozen: dict[int, list[Freeze]]
    stacks: dict[int, Stack]
    _atoms: dict[Axis, tuple[int, ...]]

    def atoms(self, tensor: str, axis: int | None = None) -> tuple[int, ...]:
        """Factors of one axis, or of all axes of a tensor in order."""
        if axis is not None:
            return self._atoms[(tensor, axis)]
        return tuple(atom for index in range(len(self.facts.shapes[tensor])) for atom in self._atoms[(tensor, index)])

    def size(self, atom: int) -> int:
        return self.factors.size(atom)

    def why(self, left: Place, right: Place) -> list[str]:
        """The operators on a shortest chain of ties between two places."""
        path = nx.shortest_path(self.graph, left, right)
        return [self.graph.edges[a, b]["node"] for a, b in pairwise(path)]


def analyse(graph: Graph, shapes: dict[str, tuple[int, ...]], blocks: frozenset[str] = frozenset()) -> Dependencies:
    """Run the rules, unify, and build the dependency graph.

    Args:
        graph: the model; it is not changed.
        shapes: size of every tensor (see `probe`).
        blocks: nodes that are read as operators on blocks (see `blocks`).
    """
    ends = graph.inputs, graph.outputs
    facts = gather_facts(graph.nodes, shapes, graph.weights, graph.opset, *ends, blocks, graph.unexpanded)
    tie_shared_weights(graph, facts)
    reads = (name for node in graph.nodes for name in [*node.input, *node.output, *subgraph_reads(node)])
    used = {name for name in reads if name}
    sizes: dict[Axis, int] = {
        (name, index): size
        for name in [*graph.inputs, *sorted(used.union(graph.outputs))]  # an output may be a weight that no node reads
        for index, size in enumerate(shapes.get(name, ()))
    }
    sizes.update(facts.virtual)
    factors, clashes = solve(facts.ties, sizes)
    stacks, unstacked = find_stacks(facts.concatenations, factors)
    network = nx.Graph()
    places: dict[int, list[Place]] = {}
    atoms = {axis: factors.atoms(axis) for axis in sizes}
    for axis in sizes:
        for position, atom in enumerate(atoms[axis]):
            network.add_node((*axis, position), size=factors.size(atom))
            places.setdefault(atom, []).append((*axis, position))
    for tie in facts.ties:
        for left, right in zip(_run(atoms, tie.left), _run(atoms, tie.right), strict=False):
            network.add_edge(left, right, node=tie.node)
    frozen: dict[int, list[Freeze]] = {}
    for freeze in facts.freezes:
        _note(frozen, factors.atoms(freeze.axis), freeze)
    for clash in clashes:
        place = next(iter((*clash.tie.left, *clash.tie.right)))
        _note(frozen, factors.current(clash.factors), Freeze(place, clash.reason, clash.tie.node))
    for run, freeze in unstacked:
        _note(frozen, run, freeze)
    spread_freezes(stacks, frozen)
    return Dependencies(facts, factors, network, places, frozen, stacks, atoms)


def _run(atoms: Mapping[Axis, tuple[int, ...]], axes: Sequence[Axis]) -> list[Place]:
    return [(*axis, position) for axis in axes for position in range(len(atoms[axis]))]


def _note(frozen: dict[int, list[Freeze]], atoms: Sequence[int], freeze: Freeze) -> None:
    for atom in atoms:
        held = frozen.setdefault(atom, [])
        if freeze not in held:
            held.append(freeze)
