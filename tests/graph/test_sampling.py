"""What repeating and resampling tie and freeze; a cut through a Resize stays exact."""

from __future__ import annotations

from typing import Any

import graphs
import numpy as np
import pytest
from onnx import helper

from onnxsnp.analysis import analyse_model
from onnxsnp.evaluation.verify import difference, masked
from onnxsnp.graph.axes import Axis
from onnxsnp.graph.facts import Facts
from onnxsnp.graph.rules import gather_facts
from onnxsnp.surgery.apply import apply


def said(
    op: str, shapes: dict[str, tuple[int, ...]], inputs: list[str], values: dict[str, Any], **attrs: Any
) -> Facts:
    """Facts of one node with output y."""
    held = {name: np.asarray(value) for name, value in values.items()}
    full = {**shapes, **{name: array.shape for name, array in held.items()}}
    return gather_facts([helper.make_node(op, inputs, ["y"], name="node", **attrs)], full, held, 18, [], [])


def tied(facts: Facts) -> set[tuple[Axis, Axis]]:
    return {(tie.left[0], tie.right[0]) for tie in facts.ties}


def frozen(facts: Facts) -> set[Axis]:
    return {freeze.axis for freeze in facts.freezes}


def test_tile_ties_what_it_does_not_repeat() -> None:
    facts = said("Tile", {"x": (1, 5, 2), "y": (3, 5, 4)}, ["x", "n"], {"n": [3, 1, 2]})
    assert tied(facts) == {(("x", 1), ("y", 1))}
    assert frozen(facts) == {("x", 0), ("y", 0), ("x", 2), ("y", 2)}


@pytest.mark.parametrize(
    ("inputs", "values"),
    [
        (["x", "", "", "to"], {"to": np.asarray([2, 6, 8, 8])}),
        (["x", "", "by"], {"by": np.asarray([1, 1, 2, 2], np.float32)}),
    ],
)
def test_resize_ties_what_it_does_not_scale(inputs: list[str], values: dict[str, Any]) -> None:
    facts = said("Resize", {"x": (2, 6, 4, 4), "y": (2, 6, 8, 8)}, inputs, values)
    assert tied(facts) == {(("x", 0), ("y", 0)), (("x", 1), ("y", 1))}
    assert frozen(facts) == {(name, axis) for name in "xy" for axis in (2, 3)}


def test_resize_by_a_little_is_no_copy_even_where_the_size_stays() -> None:
    values = {"by": np.asarray([1, 1.1], np.float32)}
    facts = said("Resize", {"x": (2, 6), "y": (2, 6)}, ["x", "", "by"], values)
    assert tied(facts) == {(("x", 0), ("y", 0))} and ("x", 1) in frozen(facts)
    facts = said("Resize", {"x": (2, 6), "y": (2, 6), "by": (2,)}, ["x", "", "by"], {})
    assert not tied(facts)


def test_resize_of_named_axes_and_cropping() -> None:
    values = {"to": np.asarray([8])}
    facts = said("Resize", {"x": (2, 4), "y": (2, 8)}, ["x", "", "", "to"], values, axes=[-1])
    assert tied(facts) == {(("x", 0), ("y", 0))} and frozen(facts) == {("x", 1), ("y", 1)}
    crop = {"coordinate_transformation_mode": "tf_crop_and_resize"}
    facts = said("Resize", {"x": (2, 4), "y": (2, 8)}, ["x", "", "", "to"], values, axes=[-1], **crop)
    assert not tied(facts)


@pytest.mark.parametrize("told", ["sizes", "scales"])
def test_channels_in_front_of_a_resize_are_cut_exactly(told: str) -> None:
    net = graphs.Net(opset=18)
    x = net.input("x", [2, 3, 4, 4])
    h = net.op("Relu", net.op("Conv", x, net.weight("first", 6, 3, 1, 1)))
    given = {"sizes": [None, np.asarray([2, 6, 8, 8])], "scales": [np.asarray([1, 1, 2, 2], np.float32)]}[told]
    h = net.op("Resize", h, None, *given, mode="linear")
    net.output(net.op("Conv", h, net.weight("second", 4, 6, 1, 1)), [2, 4, 8, 8])
    model = net.proto()
    analysis = analyse_model(model)
    (group,) = analysis.structure.groups
    assert group.prunable
    applied = apply(analysis, graphs.random_plan([group], np.random.default_rng(0)))
    assert applied.graph.weights["first"].shape[0] < 6
    expected = masked(analysis.normalized.base, analysis.graph, analysis.dependencies, applied.cuts, {})
    assert difference(expected, applied.graph, [graphs.inputs_for(model)]) < 1e-6
