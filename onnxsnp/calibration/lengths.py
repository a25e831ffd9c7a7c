"""Sizes that a model leaves open, for generated inputs: all that go together get sizes that go together, and that run.

How long a text may be is not written in a file: a position table may have 512 rows, and a length beyond that fails in
the middle of the graph. So the model is asked: the longest of a few lengths at which it runs is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from onnxsnp.calibration.generated import GeneratedSource
from onnxsnp.errors import ModelError
from onnxsnp.runtime import InputSpec, channel_axis, symbol_size

LENGTHS = (128, 64, 32, 16, 8)


def settled(specs: Sequence[InputSpec], run: Callable[[dict[str, np.ndarray]], object]) -> list[InputSpec]:
    """The inputs with a size for every open axis but the batch and the sides of pictures.

    Args:
        run: runs the model once on inputs by name; raises `ModelError` where it does not take them.

    Raises:
        ModelError: it takes none of the lengths that are tried.
    """
    first = sized(specs, LENGTHS[0])
    if first == list(specs):
        return first
    problem: ModelError | None = None
    for length in LENGTHS:
        found = sized(specs, length)
        sample = GeneratedSource(found, 1).load(0)
        batch = {spec.name: spec.shape[0] if isinstance(spec.shape[0], int) else 1 for spec in found}
        try:
            run({name: np.repeat(array[None], batch[name], axis=0) for name, array in sample.items()})
        except ModelError as error:
            problem = problem or error
            continue
        return found
    raise ModelError(
        f"the model runs on generated inputs of none of the lengths {', '.join(map(str, LENGTHS))}: "
        f"{problem.message if problem else ''}",
        hint="give the sizes with --input-shape, or real inputs with --calibration",
    )


def with_bounds(specs: Sequence[InputSpec], model: str | Path | bytes) -> list[InputSpec]:
    """The inputs of a session with the bounds of their ids, which only the model's graph tells.

    Raises:
        ModelError: the model cannot be read.
    """
    if not any(spec.dtype.kind in "iu" for spec in specs):
        return list(specs)
    import onnx

    from onnxsnp.graph.inputs import id_bounds
    from onnxsnp.graph.normalize import as_graph
    from onnxsnp.model import load

    read = onnx.load_from_string(model) if isinstance(model, bytes) else model
    bounds = id_bounds(as_graph(load(read)))
    return [replace(spec, below=bounds.get(spec.name)) for spec in specs]


def sized(specs: Sequence[InputSpec], length: int) -> list[InputSpec]:
    """The inputs with one length for every symbol of an open axis; sums of symbols are computed."""
    return [spec if channel_axis(spec) is not None else _sized(spec, length) for spec in specs]


def _sized(spec: InputSpec, length: int) -> InputSpec:
    behind = [
        size if isinstance(size, int) else symbol_size(size or "?", lambda symbol: length) for size in spec.shape[1:]
    ]
    return replace(spec, shape=(*spec.shape[:1], *behind))
