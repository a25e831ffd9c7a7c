"""What the attention of a module loses without each channel, measured on a few images, one batch at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxsnp.calibration.data import Batch
from onnxsnp.calibration.overlap import Overlap
from onnxsnp.calibration.statistics import by_head
from onnxsnp.errors import DataError
from onnxsnp.graph.axes import Axis
from onnxsnp.graph.dependency import Dependencies
from onnxsnp.graph.groups import Group
from onnxsnp.graph.ir import Graph, SharedSession
from onnxsnp.graph.probabilities import CHANGE, MASK, AttentionPath, beside, change_graph, without

IMAGES = 8  # that are looked at: each takes as many score products as the module has channels


@dataclass
class AttentionChange:
    """What the query-key channels of one attention module do, each for itself and in common.

    Attributes:
        total: Σ over images of the mean over rows of KL(P ‖ P without channel i), in nats, [heads, size].
        overlap: second moments of what the channels add to the scores, about the mean of each row.
        images: summed over.
    """

    total: np.ndarray
    overlap: Overlap
    images: int = 0

    @classmethod
    def empty(cls, group: Group) -> AttentionChange:
        """Nothing measured yet."""
        return cls(np.zeros((group.heads, group.size)), Overlap.empty(group.heads, group.size))

    @property
    def mean(self) -> np.ndarray:
        """Mean KL of a row without each channel, [heads, size]."""
        return self.total / max(self.images, 1)


@dataclass
class _Site:
    group: Group
    path: AttentionPath
    found: AttentionChange
    session: SharedSession | None = None


def measure_changes(
    graph: Graph,
    dependencies: Dependencies,
    paths: Mapping[str, AttentionPath],
    groups: Mapping[str, Group],
    batches: Iterable[Batch],
    *,
    threads: int | None = None,
    provider: str = "cpu",
    progress: Callable[[int], None] | None = None,
) -> dict[str, AttentionChange]:
    """Run the model once per batch, and behind it every score product without each of its channels.

    Rows of scores and probabilities stay inside onnxruntime; queries and keys of one batch are held at a time.

    Args:
        paths: by id, of query-key groups.
        groups: by id.
        progress: called with the number of images after each batch.

    Raises:
        DataError: queries or keys are not finite.
    """
    opened: dict[str, Any] = {"threads": threads, "provider": provider}
    sites = [_Site(groups[name], path, AttentionChange.empty(groups[name])) for name, path in paths.items()]
    names = list(dict.fromkeys(name for site in sites for name in site.path.inputs if name not in graph.inputs))
    session = graph.session(names, **opened)
    images = 0
    for batch in batches:
        values = dict(batch.inputs) | dict(zip(names, session.run(names, batch.inputs), strict=True))
        for site in sites:
            inputs = {name: values[name] for name in site.path.inputs}
            _add_overlap(site, dependencies, inputs)
            _add_changes(site, graph, dependencies, inputs, batch.count, opened)
        images += batch.count
        if progress is not None:
            progress(images)
    return {site.group.id: site.found for site in sites}


def _add_changes(
    site: _Site,
    graph: Graph,
    dependencies: Dependencies,
    inputs: Mapping[str, np.ndarray],
    images: int,
    opened: Mapping[str, Any],
) -> None:
    """Drop the channels of all heads one after another."""
    if site.session is None:  # element types are known once there is a batch
        narrow = change_graph(graph, site.path, {name: array.dtype for name, array in inputs.items()})
        site.session = narrow.session(**opened)
    name, axis = site.path.site.query
    for channel in range(site.group.size):
        mask = without(channel, inputs[name].shape, axis, inputs[name].dtype)
        (rows,) = site.session.run([CHANGE], {**inputs, MASK: mask})
        rows = np.nan_to_num(rows, nan=0.0)  # all of a row is masked: there is no attention to change
        per_row = by_head(site.group, dependencies, rows, site.path.others)
        site.found.total[:, channel] += images * np.maximum(per_row.mean(axis=0, dtype=np.float64), 0.0)
    site.found.images += images


def _add_overlap(site: _Site, dependencies: Dependencies, inputs: Mapping[str, np.ndarray]) -> None:
    """Add the Gram matrices of queries and of keys, these about their mean over the tokens of an image."""
    group, one = site.group, site.path.site
    queries = _tokens(group, dependencies, inputs[one.query[0]], one.query, one.query_tokens)
    keys = _tokens(group, dependencies, inputs[one.key[0]], one.key, one.key_tokens)
    if not (np.isfinite(queries).all() and np.isfinite(keys).all()):
        raise DataError(
            "the queries or keys of a calibration batch are not finite",
            hint="check the input preprocessing, or calibrate a float32 copy of the model",
        )
    grams = [array.swapaxes(-1, -2) @ array for array in (queries, keys)]
    tokens = queries.shape[2], keys.shape[2]
    site.found.overlap.add(grams[0], grams[1], tokens, keys.mean(axis=2))


def _tokens(group: Group, dependencies: Dependencies, array: np.ndarray, axis: Axis, tokens: Axis) -> np.ndarray:
    """An operand as [images, heads, tokens, size], float64."""
    others = beside(axis, tokens, dependencies)
    moved = array.transpose([*(index for _, index in others), tokens[1], axis[1]]).astype(np.float64)
    return by_head(group, dependencies, moved, others)
