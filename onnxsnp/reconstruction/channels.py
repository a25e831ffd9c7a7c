"""What each neuron changes and how alike neurons are, from what was measured: what criterion "multihead" reads."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from onnxsnp.calibration.statistics import Statistics
from onnxsnp.graph.groups import Group
from onnxsnp.graph.linear import Linear
from onnxsnp.reconstruction.heads import second
from onnxsnp.reconstruction.refit import refittable
from onnxsnp.scoring.multihead import neuron_overlap

if TYPE_CHECKING:
    from onnxsnp.analysis import Analysis


def changes(
    analysis: Analysis, group: Group, statistics: Statistics, *, refitted: bool
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Δ [heads, size] and O [heads, size, size] of a group (see `scoring.multihead`).

    Args:
        refitted: the bias of what reads the neurons takes up their means, so only what varies counts.

    Returns:
        None, None where the attention has no path of its own or the input of a projection was not measured.
    """
    if group.kind == "qk":
        found = statistics.changes.get(group.id)
        return (None, None) if found is None else (found.mean, found.overlap.mean)
    readers = refittable(group, analysis.linears)
    places = [_places(analysis, group, reader) for reader in readers]
    if not readers or len(readers) != len(group.consumers) or any(one is None for one in places):
        return None, None
    if any(reader.data not in statistics.moments for reader in readers):
        return None, None
    overlap = np.zeros((group.heads, group.size, group.size))
    for reader, mine in zip(readers, places, strict=True):
        held = statistics.moments[reader.data]
        inner = second(held, reader) if refitted else held.second / max(held.count, 1)
        array = analysis.graph.weights[reader.weight]
        matrix = np.moveaxis(array, reader.inner, 0).reshape(array.shape[reader.inner], -1)
        overlap += neuron_overlap(matrix, inner, np.asarray(mine))
    return np.maximum(np.einsum("hii->hi", overlap), 0.0), overlap


def _places(analysis: Analysis, group: Group, reader: Linear) -> np.ndarray | None:
    """Where a group's neurons lie along what a projection reads, [heads, size, rows]; None if not all heads do."""
    dependencies = analysis.dependencies
    atoms = dependencies.atoms(reader.weight, reader.inner)
    first = [*group.head_atoms, group.atom]
    if not set(first) <= set(atoms):
        return None
    view = np.arange(analysis.graph.weights[reader.weight].shape[reader.inner])
    view = view.reshape([dependencies.size(atom) for atom in atoms])
    order = [atoms.index(atom) for atom in first]
    rest = [index for index in range(len(atoms)) if index not in order]
    return view.transpose(order + rest).reshape(group.heads, group.size, -1)
