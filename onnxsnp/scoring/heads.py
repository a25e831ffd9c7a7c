"""Whole heads: what each adds to the output, and what the criteria read of it.

SNP (arXiv 2404.11630) reports a model without some whole heads ("SNP + head") but gives no formula for them, so what
stands here is this project's. A head's output reaches the rest of the network only through its rows W_h of the output
projection. With the second moments S_hh of these inputs, removing the head changes the projection's output by

    E‖x_h W_h‖² = tr(W_hᵀ S_hh W_h)

per token: the score of criterion "snp", and with the opposite sign of "reverse". (What the other heads can take over is
not in it; `reconstruction.heads` reckons with that.) The criteria that look at weights alone sum their scores over all
filters of the head: queries, keys and values.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from onnxsnp.graph.dependency import Dependencies
from onnxsnp.graph.groups import Group
from onnxsnp.graph.ir import Graph
from onnxsnp.graph.linear import Linear, block_places
from onnxsnp.scoring.criteria import ScoringTarget


def contributions(weight: np.ndarray, second: np.ndarray, blocks: np.ndarray) -> np.ndarray:
    """``tr(W_hᵀ S_hh W_h)`` of each head: float64 [heads], in the square of the output's unit.

    Args:
        weight: W of the output projection, [K, out].
        second: S, second moments of its input, [K, K]; about the mean where a bias takes up the change of it.
        blocks: [heads, neurons] rows of each head.
    """
    full = weight.astype(np.float64)
    found = [float(np.sum(full[rows] * (second[np.ix_(rows, rows)] @ full[rows]))) for rows in blocks]
    return np.maximum(found, 0.0)


def head_target(
    graph: Graph,
    dependencies: Dependencies,
    group: Group,
    linears: Mapping[str, Linear],
    contribution: np.ndarray | None = None,
) -> ScoringTarget:
    """What the heads of one site offer for scoring: the filters of every layer that emits them, head by head.

    Args:
        contribution: see `contributions`; None where the input of the output projection cannot be measured.
    """
    filters = tuple(_filters(graph, dependencies, group, linears, *axis) for axis in group.producers)
    held = None if contribution is None else contribution.reshape(1, group.size)
    dead = dead_heads(graph, dependencies, group, linears)
    return ScoringTarget("head", 1, group.size, filters, dead.reshape(1, group.size), contribution=held)


def dead_heads(graph: Graph, dependencies: Dependencies, group: Group, linears: Mapping[str, Linear]) -> np.ndarray:
    """Heads that nothing reads, or whose values are zero: bool [size].

    (Without queries or keys a head is not dead: it averages its values.) Values are what is emitted by layers whose
    neurons an output projection reads: their other factors occur there too.
    """
    read = {atom for axis in group.consumers for atom in dependencies.atoms(*axis)}
    dead = np.zeros(group.size, bool)
    for weight, axis in group.producers:
        own = set(dependencies.atoms(weight, axis))
        if group.consumers and own <= read:
            filters = _filters(graph, dependencies, group, linears, weight, axis)
            dead |= ~filters.reshape(group.size, -1).any(axis=1)
    unread = [_rows(graph, dependencies, group, *axis) for axis in group.consumers]
    if unread:
        dead |= ~np.concatenate([rows.reshape(group.size, -1) for rows in unread], axis=1).any(axis=1)
    return dead


def _filters(
    graph: Graph, dependencies: Dependencies, group: Group, linears: Mapping[str, Linear], weight: str, axis: int
) -> np.ndarray:
    """Filters of one layer, [heads * neurons, fan_in], heads outermost, the bias as a last column."""
    rows = _rows(graph, dependencies, group, weight, axis)
    bias = linears[weight].bias if weight in linears else None
    if bias is None:
        return rows
    places = block_places(graph, dependencies, group, weight, axis).reshape(-1)
    return np.concatenate([rows, graph.weights[bias].reshape(-1)[places, None].astype(np.float64)], axis=1)


def _rows(graph: Graph, dependencies: Dependencies, group: Group, weight: str, axis: int) -> np.ndarray:
    moved = np.moveaxis(graph.weights[weight], axis, 0)
    places = block_places(graph, dependencies, group, weight, axis).reshape(-1)
    return moved.reshape(len(moved), -1)[places].astype(np.float64)
