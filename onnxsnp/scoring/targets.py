"""From groups in a graph to what the criteria read: filters, dead neurons, query-key scores."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from onnxsnp.graph.dependency import Dependencies
from onnxsnp.graph.groups import Group
from onnxsnp.graph.ir import Graph
from onnxsnp.graph.linear import Linear, neuron_matrix, stacked_places
from onnxsnp.graph.stacks import above
from onnxsnp.scoring.criteria import ScoringTarget
from onnxsnp.scoring.heads import head_target


def scoring_target(
    graph: Graph, dependencies: Dependencies, group: Group, linears: Mapping[str, Linear], qk: np.ndarray | None = None
) -> ScoringTarget:
    """What one group offers for scoring.

    Filters are those of the layers that emit the group's neurons, with the bias as a last column. Weights that only
    pass by (position embedding, class token, norms) are cut along but are no layers and have no say.

    Args:
        qk: eq. 4-6 scores of a query-key group, [heads, size].
    """
    if group.kind == "head":
        return head_target(graph, dependencies, group, linears)
    filters = tuple(
        _filters(graph, dependencies, group, linears[weight]) for weight, _ in group.producers if weight in linears
    )
    if not filters:
        filters = tuple(neuron_matrix(graph, dependencies, group, weight) for weight, _ in group.producers)
    if group.kind == "qk" and len(filters) == 1:
        filters *= 2  # one projection is both query and key
    kind = group.kind if group.kind in ("qk", "v", "residual") else "ffn"
    return ScoringTarget(kind, group.heads, group.size, filters, dead_neurons(graph, dependencies, group, filters), qk)


def dead_neurons(graph: Graph, dependencies: Dependencies, group: Group, filters: tuple[np.ndarray, ...]) -> np.ndarray:
    """Neurons whose weights are all zero, so that cutting them changes nothing.

    A query-key pair or a gated product is dead when either factor is; the coupled layers of the residual stream add
    up, so there all must be. A neuron that no later layer reads is dead too.

    Returns:
        bool [heads, size].
    """
    silent = np.stack([~layer.any(axis=1) for layer in filters])
    dead = silent.all(axis=0) if group.kind == "residual" else silent.any(axis=0)
    if group.consumers:
        unread = [~_read(graph, dependencies, group, weight, axis) for weight, axis in group.consumers]
        dead = dead | np.all(unread, axis=0)
    return dead.reshape(group.heads, group.size)


def _read(graph: Graph, dependencies: Dependencies, group: Group, weight: str, axis: int) -> np.ndarray:
    """Which neurons a layer reads with a weight that is not zero; bool [heads * size]."""
    if group.atom in dependencies.atoms(weight, axis):
        return (neuron_matrix(graph, dependencies, group, weight) != 0).any(axis=1)
    atoms = dependencies.atoms(weight, axis)
    position, whole = next(
        (position, atom) for position, atom in enumerate(atoms) if atom in above(group.atom, dependencies.stacks)
    )
    sizes = [dependencies.size(atom) for atom in atoms]
    rows = np.moveaxis(graph.weights[weight] != 0, axis, 0).reshape(*sizes, -1)
    read: np.ndarray = np.moveaxis(rows, position, 0).reshape(dependencies.size(whole), -1).any(axis=1)
    return read[stacked_places(dependencies, group, whole)].any(axis=1)


def _filters(graph: Graph, dependencies: Dependencies, group: Group, linear: Linear) -> np.ndarray:
    rows = neuron_matrix(graph, dependencies, group, linear.weight)
    if linear.bias is None:
        return rows
    return np.concatenate([rows, neuron_matrix(graph, dependencies, group, linear.bias)], axis=1)
