"""Rules of the operators that work on images: convolutions, pools, padding, resizing, repeating."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from onnx import NodeProto

from onnxsnp.graph.facts import Facts
from onnxsnp.graph.ir import attribute


def conv(node: NodeProto, facts: Facts) -> None:
    """Channels in, channels out; spatial axes stay as they are; depthwise convolutions tie input to output."""
    data, weight, output = node.input[0], node.input[1], node.output[0]
    group = attribute(node, "group", 1)
    facts.same((data, 0), (output, 0))
    for index in range(2, facts.rank(data)):
        if is_pointwise(node, facts.shapes[weight], [index]):
            facts.same((data, index), (output, index))
        else:
            facts.freeze((data, index), "spatial axis of a convolution")
            facts.freeze((weight, index), "kernel of a convolution")
    if weight not in facts.weights:
        facts.freeze_all([data, weight, output], "convolution with a computed kernel")
    elif group == 1:
        facts.same((data, 1), (weight, 1))
        facts.linear(weight, 1, 0)
    elif group == facts.shapes[data][1] == facts.shapes[weight][0]:
        facts.same((data, 1), (weight, 0))
    else:
        facts.freeze((data, 1), f"input of a convolution in {group} groups")
        facts.freeze((weight, 0), f"output of a convolution in {group} groups")
        facts.freeze((weight, 1), f"input of a convolution in {group} groups")
    facts.same((weight, 0), (output, 1))
    if len(node.input) > 2 and node.input[2]:
        facts.same((node.input[2], 0), (output, 1))


def is_pointwise(node: NodeProto, kernel: Sequence[int], axes: Iterable[int] | None = None) -> bool:
    """Whether a convolution treats every place of an image alike and for itself.

    Args:
        kernel: shape of its weight.
        axes: look only along these axes of the image; all of them if None.
    """
    places = len(kernel) - 2
    pads = attribute(node, "pads", [0] * (2 * places))
    strides = attribute(node, "strides", [1] * places)
    return all(
        kernel[axis] == strides[axis - 2] == 1 and pads[axis - 2] == pads[axis - 2 + places] == 0
        for axis in (range(2, len(kernel)) if axes is None else axes)
    )


def pool(node: NodeProto, facts: Facts) -> None:
    data, output = node.input[0], node.output[0]
    facts.same((data, 0), (output, 0))
    facts.same((data, 1), (output, 1))
    for index in range(2, facts.rank(data)):
        facts.freeze((data, index), f"{node.op_type} runs over it")
    facts.freeze_all(node.output[1:], f"second output of {node.op_type}")


def pad(node: NodeProto, facts: Facts) -> None:
    """An axis that gets nothing in front or behind stays; the others keep their size."""
    data, output = node.input[0], node.output[0]
    rank = facts.rank(data)
    named = len(node.input) > 3 and node.input[3]
    axes = facts.value(node.input[3]) if named else np.arange(rank)
    amounts = facts.value(node.input[1]) if len(node.input) > 1 else np.asarray(attribute(node, "pads"))
    if axes is None or amounts is None:
        facts.freeze_all([data, output], "Pad by amounts computed at run time")
        return
    padded = {int(axis) % rank for axis, amount in zip([*axes, *axes], amounts, strict=True) if amount}
    for index in range(rank):
        if index in padded:
            facts.freeze((data, index), "Pad adds entries to it")
            facts.freeze((output, index), "Pad adds entries to it")
        else:
            facts.same((data, index), (output, index))


def resize(node: NodeProto, facts: Facts) -> None:
    """An axis that keeps its size is left alone, unless a scale that is not one happens to round to that size."""
    data, output = node.input[0], node.output[0]
    rank = facts.rank(data)
    slot = 1 if node.op_type == "Upsample" or facts.opset < 11 else 2
    axes = [axis % rank for axis in attribute(node, "axes", range(rank))]
    scales = dict.fromkeys(range(rank), 1.0)
    if len(node.input) > slot and node.input[slot] and 0 not in facts.shapes[node.input[slot]]:
        given = facts.value(node.input[slot])
        scales.update(zip(axes, np.full(len(axes), np.nan) if given is None else given, strict=True))
    cropped = attribute(node, "coordinate_transformation_mode", b"") == b"tf_crop_and_resize"
    for index in range(rank):
        if facts.shapes[data][index] == facts.shapes[output][index] and scales[index] == 1 and not cropped:
            facts.same((data, index), (output, index))
        else:
            facts.freeze((data, index), f"{node.op_type} runs over it")
            facts.freeze((output, index), f"{node.op_type} runs over it")


def tile(node: NodeProto, facts: Facts) -> None:
    """An axis that is repeated once stays; copies of an axis are one longer axis that must keep its size."""
    data, output = node.input[0], node.output[0]
    for index in range(facts.rank(data)):
        if facts.shapes[data][index] == facts.shapes[output][index]:
            facts.same((data, index), (output, index))
        else:
            facts.freeze((data, index), "Tile repeats it")
            facts.freeze((output, index), "Tile repeats it")
