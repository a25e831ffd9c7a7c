"""Sizes that become numbers at run time, together with the batch, must stay; sizes that tell shapes may change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import graphs
import numpy as np
import onnx
import pytest
from onnx import TensorProto

from onnxsnp.analysis import analyse_model
from onnxsnp.evaluation.verify import prove
from onnxsnp.surgery.apply import apply

REASON = "its size is part of a number that is computed"


def number(net: graphs.Net, sizes: Any) -> Any:
    return net.op("Sqrt", net.op("Cast", sizes, to=TensorProto.FLOAT, name="number"))


def divided(count: Callable[[graphs.Net, Any], Any]) -> onnx.ModelProto:
    """[N, 4, 6] neurons, divided by what is made of their sizes."""
    net = graphs.Net()
    h = net.linear(net.input("x", ["N", 4, 5]), "a", 5, 6)
    h = net.op("Div", h, number(net, count(net, h)))
    net.output(net.linear(h, "out", 6, 3), ["N", 4, 3])
    return net.proto()


COUNTED = {
    "size": lambda net, h: net.op("Size", h),
    "product": lambda net, h: net.op("ReduceProd", net.op("Shape", h), keepdims=0),
    "of the last two and the batch": lambda net, h: net.op(
        "Mul", net.op("Size", h), net.op("Gather", net.op("Shape", h), 2)
    ),
    "joined again": lambda net, h: net.op(
        "ReduceProd", net.op("Concat", *net.op("Split", net.op("Shape", h), [1, 2], outputs=2), [7], axis=0), keepdims=0
    ),
}


@pytest.mark.parametrize("name", COUNTED)
def test_a_number_that_counts_a_width_and_the_batch_keeps_the_width(name: str) -> None:
    (group,) = analyse_model(divided(COUNTED[name])).structure.groups
    assert group.reasons == (f"{REASON} (at number)",)


FREE = {
    "the batch alone": lambda net, h: net.op("Gather", net.op("Shape", h), [0]),
    "the batch from a part": lambda net, h: net.op("Slice", net.op("Shape", h), [0], [1]),
    "the width alone, which is folded": lambda net, h: net.op("Gather", net.op("Shape", h), [2]),
    "batch and tokens": lambda net, h: net.op("ReduceProd", net.op("Slice", net.op("Shape", h), [0], [2]), keepdims=0),
}


@pytest.mark.parametrize("name", FREE)
def test_numbers_of_other_axes_leave_the_width_alone(name: str) -> None:
    model = divided(FREE[name])
    analysis = analyse_model(model)
    (group,) = analysis.structure.groups
    assert group.reasons == ()
    plan = graphs.random_plan([group], np.random.default_rng(0))
    feeds = [graphs.inputs_for(model, batch) for batch in (1, 3)]
    assert prove(analysis, apply(analysis, plan), feeds, 1).passed


def test_sizes_that_tell_a_shape_may_change() -> None:
    net = graphs.Net()
    h = net.linear(net.input("x", ["N", 4, 5]), "a", 5, 6)
    h = net.op("Reshape", net.op("Relu", h), net.op("Shape", h))
    net.output(net.linear(h, "out", 6, 3), ["N", 4, 3])
    analysis = analyse_model(net.proto())
    (group,) = analysis.structure.groups
    assert group.prunable
