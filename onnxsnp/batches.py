"""Which samples go where: to the fit, to what is held back, to the proof."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from onnxsnp.calibration.data import Batch, Dataset
from onnxsnp.graph.inputs import graph_inputs
from onnxsnp.graph.ir import Graph


def split(data: Dataset, seen: int) -> tuple[Iterator[Batch], list[Batch]]:
    """The first `seen` samples as an iterator; what follows fills the list once that iterator is exhausted."""
    held: list[Batch] = []

    def fit() -> Iterator[Batch]:
        done = 0
        for batch in data:
            if done < seen:
                done += batch.count
                yield batch
            else:
                held.append(batch)

    return fit(), held


def first(data: Dataset, seen: int) -> Iterator[Batch]:
    """The first `seen` samples, as `split` gives them."""
    done = 0
    for batch in data:
        yield batch
        done += batch.count
        if done >= seen:
            return


def chain(one: Batch, rest: Iterator[Batch]) -> Iterator[Batch]:
    """A batch that was taken from an iterator, and what is left in it."""
    yield one
    yield from rest


def proof_feeds(graph: Graph, batch: Batch) -> list[dict[str, np.ndarray]]:
    """Inputs for the proof: real samples, at two batch sizes where the batch is dynamic."""
    free = all(spec.shape and not isinstance(spec.shape[0], int) for spec in graph_inputs(graph))
    if not free:
        return [batch.inputs]
    return [{name: array[:size] for name, array in batch.inputs.items()} for size in sorted({1, min(2, batch.count)})]
