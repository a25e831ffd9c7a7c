"""The end of a run: the model goes to its file, which is opened and run before it is kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from onnxsnp.analysis import Analysis
from onnxsnp.atomic import whole_file
from onnxsnp.evaluation.verify import check_file, tolerance
from onnxsnp.graph.ir import Graph
from onnxsnp.model import Model, give_back, save
from onnxsnp.surgery.apply import finished, to_model


def builder(analysis: Analysis, graph: Graph | None) -> Callable[[], onnx.ModelProto]:
    """What makes the model in memory; the original if `graph` is None."""
    return partial(to_model, graph) if graph is not None else partial(original_proto, analysis.model)


def write_model(
    analysis: Analysis,
    graph: Graph | None,
    feeds: Sequence[Mapping[str, np.ndarray]],
    output: str | Path,
    ready: Callable[[int], None] | None = None,
    **session: Any,
) -> int:
    """Write the model (the original if `graph` is None) and run the written file.

    Args:
        feeds: inputs on which the file must give what the graph gives.
        ready: called last before the file takes its place, with its size in bytes.
        session: threads and provider.

    Returns:
        Size of the file in bytes.

    Raises:
        VerificationError: the file does not run or differs; it is not kept.
    """
    check, proto, weights = None, analysis.model.proto, analysis.model.weights
    if graph is not None:
        opened = graph.opened(**session)
        expected = [opened.run(None, feed) for feed in feeds]
        check = partial(check_file, expected, feeds, tolerance(graph.weights))
        del opened
        graph.close()
        done = finished(graph)
        proto, weights = done.bare_proto(), done.weights
    analysis.original.close()
    give_back()
    return save(proto, output, check, weights, ready)


def write_record(text: str, path: str | Path) -> None:
    """Write a text file whole or not at all."""
    with whole_file(path) as part:
        part.write_text(text)


def original_proto(model: Model) -> onnx.ModelProto:
    """The model as it was read, weights inside."""
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    for name, array in model.weights.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(array, order="C"), name))
    return proto
