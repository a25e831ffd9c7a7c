"""Where a factor per query-key pair can be multiplied into constants of the model, for pairs that cannot be mixed.

A gain per pair leaves the neurons of a head apart, so it goes through much that forbids a change of basis: scales and
gates per channel, position tables, depthwise convolutions; and it can be put on either side of the score product. What
it cannot pass is a function that bends (an activation) or that looks across the neurons (a norm before its scale).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from math import prod

from onnx import NodeProto

from onnxsnp.graph.attention import Site
from onnxsnp.graph.axes import Axis
from onnxsnp.graph.dependency import Dependencies
from onnxsnp.graph.groups import Group
from onnxsnp.graph.ir import Graph
from onnxsnp.graph.linear import Linear
from onnxsnp.graph.paths import REARRANGE, read_elsewhere, shift_blocked_by

# their scale or kernel, and bias, are read channel by channel (a convolution that is no projection is depthwise)
_BY_CHANNEL = {
    "BatchNormalization",
    "Conv",
    "LayerNormalization",
    "RMSNormalization",
    "SimplifiedLayerNormalization",
}

_PASSED = REARRANGE | {"Neg", "Expand"}  # each entry goes on alone, so its factor goes with it


@dataclass(frozen=True)
class GainSite:
    """A query-key group whose pairs can be given a gain each.

    Attributes:
        group: the pairs.
        constants: weights, biases, scales and tables that carry the gain together, all on the same side.
        head_atoms: factors over which gains may differ: the group's own and then such as its indices are tied across.
        heads: number of gains per pair, the product of their sizes.
        centred: what all scores of a row have in common does not matter, because only the softmax sees it.
    """

    group: Group
    constants: tuple[str, ...]
    head_atoms: tuple[int, ...]
    heads: int
    centred: bool


def find_gain(
    group: Group, site: Site, graph: Graph, dependencies: Dependencies, linears: Mapping[str, Linear]
) -> GainSite | None:
    """Where the gains of a query-key group can go; None if nowhere.

    Of several places the one that ties fewest gains is taken, and of these the one nearest to the product; the query's
    side comes first, because several query heads may share a key.
    """
    walk = _Walk((group.atom, *group.head_atoms), graph, dependencies, linears)
    operands = [axis[0].split("|")[-1] for axis in (site.query, site.key)]
    found = [constants for operand in operands for constants in walk.places(operand)]
    if not found:
        return None
    beside = _beside(site.query, site.query_tokens, dependencies) & _beside(site.key, site.key_tokens, dependencies)
    free = [(*group.head_atoms, *_extra(group, constants, beside, dependencies)) for constants in found]
    best = max(range(len(found)), key=lambda index: prod(map(dependencies.size, free[index])))
    capped = shift_blocked_by(site.score, dependencies.atoms(*site.key_tokens), graph, dependencies)
    heads = prod(map(dependencies.size, free[best]))
    return GainSite(group, tuple(sorted(found[best])), free[best], heads, not capped)


def _beside(axis: Axis, tokens: Axis, dependencies: Dependencies) -> set[int]:
    """The factors of an operand of the score product, without those of its token axis."""
    facts = dependencies.facts
    inside = [other for other in facts.virtual if other[0] == axis[0]]
    axes = inside or [(axis[0], index) for index in range(facts.rank(axis[0]))]
    return {atom for other in axes if other != tokens for atom in dependencies.factors.atoms(other)}


def _extra(group: Group, constants: frozenset[str], beside: set[int], dependencies: Dependencies) -> list[int]:
    """Factors in all constants and both operands over which the group's indices are tied, but gains need not be."""
    found = [dependencies.atoms(name) for name in constants]
    common = {atom for atom in beside if all(atoms.count(atom) == 1 for atoms in found)}
    return sorted(common - {group.atom, *group.head_atoms})


class _Walk:
    """Walks back from a tensor to the constants by which each of its neurons can be scaled."""

    def __init__(
        self, atoms: tuple[int, ...], graph: Graph, dependencies: Dependencies, linears: Mapping[str, Linear]
    ) -> None:
        self._atoms, self._graph, self._deps = atoms, graph, dependencies
        self._producers, self._readers = graph.producers(), graph.readers()
        self._outer = {linear.node: (weight, linear.outer) for weight, linear in linears.items()}

    def places(self, name: str) -> list[frozenset[str]]:
        """Sets of constants each of which, scaled together along the neurons, scales a tensor just so; nearest first.

        None where the tensor, or one on the way, is read by something else, since that would be scaled as well.
        """
        if name in self._graph.weights:
            return [frozenset({name})] if self._carries(name) else []
        node = self._producers.get(name)
        if node is None or name != node.output[0] or read_elsewhere(name, self._graph, self._readers):
            return []
        if node.op_type in _PASSED or node.op_type == "Div":
            return self.places(node.input[0])
        if node.op_type == "Mul":  # a factor on one operand is a factor on the product
            operands = sorted(node.input, key=lambda other: other not in self._graph.weights)
            return [found for other in operands for found in self.places(other)]
        if node.op_type in ("Add", "Sub"):  # both terms need it
            return [frozenset.union(*found) for found in product(*map(self.places, node.input))]
        return self._emitted(node)

    def _emitted(self, node: NodeProto) -> list[frozenset[str]]:
        """The weight and bias of an operator that emits the neurons one by one."""
        if node.name in self._outer:
            weight, axis = self._outer[node.name]
            if self._atoms[0] not in self._deps.atoms(weight, axis):
                return []
            constants = [weight, *node.input[2:3]]
        elif node.op_type in _BY_CHANNEL:
            constants = list(node.input[1:3])
        else:
            return []
        constants = [name for name in constants if name]
        return [frozenset(constants)] if constants and all(map(self._carries, constants)) else []

    def _carries(self, name: str) -> bool:
        """Whether a name is a constant with the neurons along one axis, read here only."""
        weights, readers = self._graph.weights, self._readers
        return (
            name in weights
            and weights[name].dtype.kind not in "iub"
            and name not in self._graph.outputs
            and len(readers.get(name, [])) == 1
            and all(self._deps.atoms(name).count(atom) == 1 for atom in self._atoms)
        )
