"""Rotary position embeddings: queries and keys whose neurons can be cut in pairs, though parts are taken of their axis.

Operators that take a part of an axis, or join axes, freeze them: what they do to the indices is not a product. Where
nothing but such operators keeps the query-key size of an attention from being cut, they are read again as operators on
blocks (see `blocks`), which leaves a smaller factor that may be cut.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from onnxsnp.graph.attention import Site, find_sites
from onnxsnp.graph.dependency import Dependencies, analyse
from onnxsnp.graph.ir import Graph

_PARTS = ("Concat", "Gather", "Slice", "Split")
_ROUNDS = 8


def analyse_in_pairs(graph: Graph, shapes: Mapping[str, tuple[int, ...]]) -> Dependencies:
    """The dependency graph, with query-key sizes in pairs where they cannot be cut one by one."""
    first = analyse(graph, dict(shapes))
    sites, _ = find_sites(graph, first)
    kinds = {node.name: node.op_type for node in graph.nodes}
    nodes: frozenset[str] = frozenset()
    dependencies = first
    for _round in range(_ROUNDS):  # behind an operator that joins parts there may be one that takes them
        fresh = {name for site in sites for name in _in_the_way(dependencies, site, nodes, kinds)}
        if not fresh:
            break
        nodes |= fresh
        dependencies = analyse(graph, dict(shapes), nodes)
    return dependencies if _free(dependencies, sites) > _free(first, sites) else first


def _in_the_way(
    dependencies: Dependencies, site: Site, nodes: frozenset[str], kinds: Mapping[str, str]
) -> frozenset[str]:
    """Operators that freeze a site's query-key size; none unless all of them take or join parts."""
    frozen, stacks = dependencies.frozen, dependencies.stacks
    atoms = _contracted(dependencies, site)
    found = frozenset(freeze.node for atom in atoms for freeze in frozen.get(atom, []))
    found |= {stacks[atom].node for atom in atoms if atom in stacks}
    return found - nodes if all(kinds.get(node) in _PARTS for node in found) else frozenset()


def _contracted(dependencies: Dependencies, site: Site) -> tuple[int, ...]:
    return dependencies.factors.atoms(site.query)


def _free(dependencies: Dependencies, sites: Sequence[Site]) -> int:
    """Sites of whose query-key size a factor may be cut."""
    held = dependencies.frozen.keys() | dependencies.stacks.keys()
    return sum(any(atom not in held for atom in _contracted(dependencies, site)) for site in sites)
