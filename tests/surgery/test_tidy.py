"""Axes of size 1 that unpacking leaves behind are dropped, and nothing else changes."""

from __future__ import annotations

import graphs
import numpy as np
import pytest

from onnxsnp.analysis import analyse_model
from onnxsnp.graph.normalize import as_graph


@pytest.mark.parametrize("batch", ["N", 2])
def test_no_axis_of_a_packed_layout_is_left(batch: int | str) -> None:
    analysis = analyse_model(graphs.transformer(qkv="packed", v=4, batch=batch))
    packed = {len(analysis.packed.shapes[name]) for node in analysis.packed.graph.nodes for name in node.output if name}
    apart = {len(analysis.normalized.shapes[name]) for node in analysis.graph.nodes for name in node.output if name}
    assert max(packed) == 5 and max(apart) == 4


def test_recorded_shapes_are_those_of_a_run() -> None:
    model = graphs.transformer(qkv="packed", v=4)
    analysis = analyse_model(model)
    names = [name for node in analysis.graph.nodes for name in node.output if name]
    values = analysis.graph.session(names, optimize=False).run(None, graphs.inputs_for(model, 2))
    for name, value in zip(names, values, strict=True):
        assert analysis.normalized.shapes[name] == value.shape, name


def test_outputs_are_the_same() -> None:
    model = graphs.transformer(qkv="packed", v=4)
    analysis = analyse_model(model)
    feed = graphs.inputs_for(model, 3)
    for want, got in zip(
        as_graph(analysis.model).session().run(None, feed), analysis.graph.session().run(None, feed), strict=True
    ):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
