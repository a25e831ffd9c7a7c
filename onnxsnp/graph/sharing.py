"""Layers that use the same weights, as in ALBERT: what is cut in one is cut in all, at the same indices.

Every use of a weight has a name of its own in the analysed graph, so that a cut on one side need not concern the other.
A projection or embedding of the file that is used several times is another matter: cut apart it would become several.
"""

from __future__ import annotations

from collections.abc import Collection

from onnxsnp.graph.axes import Tie
from onnxsnp.graph.facts import Facts
from onnxsnp.graph.ir import Graph


def tie_shared_weights(graph: Graph, facts: Facts) -> None:
    """Tie the axes of all uses of each matrix that is multiplied by or looked up in.

    Vectors are left alone: exporters make one of any that happen to be equal, and a copy of one costs nothing.
    """
    used = {role.axis[0] for role in facts.roles}
    for first, *others in shared_matrices(graph, used):
        node = f"shared weight {graph.origin.get(first, first)}"
        for other in others:
            facts.ties.extend(Tie(((first, axis),), ((other, axis),), node) for axis in range(facts.rank(first)))


def shared_matrices(graph: Graph, among: Collection[str]) -> list[list[str]]:
    """Names that stand for the same entries of one floating-point matrix of the file, two or more."""
    found: dict[tuple[object, ...], list[str]] = {}
    for name, array in graph.weights.items():
        if name in among and array.ndim > 1 and array.dtype.kind not in "iub":
            found.setdefault(identity(graph, name), []).append(name)
    return [names for names in found.values() if len(names) > 1]


def identity(graph: Graph, name: str) -> tuple[object, ...]:
    """The weight of the file that a name stands for and, where a packed one was taken apart, which part of it."""
    source = name if name in graph.parts else graph.origin.get(name, name)
    part = graph.parts.get(source)
    if part is None:
        return (source,)
    return (*identity(graph, part.source), part.axis, part.indices.tobytes())
