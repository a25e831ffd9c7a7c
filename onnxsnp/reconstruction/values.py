"""Value neurons that have to stay what they are, because something bends them before the projection behind.

Where no change of basis is legal (an activation between attention and projection, say) the neurons of each head go by
optimal brain surgeon (`ffn`), as an FFN's do, from the covariance of the head's own part of the projection's input. As
many go from every head; the projection is then refitted over all heads together.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from onnxsnp.calibration.statistics import Statistics
from onnxsnp.graph.groups import Group
from onnxsnp.graph.linear import Linear, neuron_places
from onnxsnp.reconstruction.ffn import Removal, removal_order
from onnxsnp.reconstruction.refit import refittable
from onnxsnp.scoring.targets import dead_neurons, scoring_target

if TYPE_CHECKING:
    from onnxsnp.analysis import Analysis


def value_reader(analysis: Analysis, group: Group) -> Linear | None:
    """The projection that reads a value group's neurons and nothing else; None if there is no single one."""
    readers = refittable(group, analysis.linears) if group.kind == "v" else []
    if len(readers) != 1 or len(group.consumers) != 1:
        return None
    (reader,) = readers
    return reader if analysis.graph.weights[reader.weight].shape[reader.inner] == group.heads * group.size else None


def value_removals(analysis: Analysis, group: Group, reader: Linear, statistics: Statistics) -> list[Removal]:
    """The order in which the neurons of each head go, with what it costs.

    Args:
        reader: the projection (see `value_reader`).
        statistics: with the moments of its input.

    Returns:
        One per head, over all but one of its neurons.
    """
    graph, dependencies = analysis.graph, analysis.dependencies
    weight = np.moveaxis(graph.weights[reader.weight], reader.inner, 0).astype(np.float64)
    weight = weight.reshape(len(weight), -1)
    moments = statistics.moments[reader.data]
    covariance = moments.covariance if reader.bias is not None else moments.second / max(moments.count, 1)
    target = scoring_target(graph, dependencies, group, analysis.linears)
    dead = dead_neurons(graph, dependencies, group, target.filters)
    places = neuron_places(graph, dependencies, group, reader.weight, reader.inner)
    return [
        removal_order(weight[rows], covariance[np.ix_(rows, rows)], group.size - 1, first=silent)
        for rows, silent in zip(places, dead, strict=True)
    ]
