"""Gradients of convolutions, pooling and resampling."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np
import onnx
from onnx import NodeProto, helper

from onnxsnp.graph.ir import attribute, set_attribute
from onnxsnp.recovery.gradients.tape import NoRuleError, Shape, Tape


def _geometry(node: NodeProto, kernel: Shape, t: Tape) -> tuple[list[int], list[int], list[int], list[int]]:
    """Strides, dilations, and pads before and after each spatial axis."""
    spatial = len(kernel)
    strides = list(attribute(node, "strides") or [1] * spatial)
    dilations = list(attribute(node, "dilations") or [1] * spatial)
    pads = list(attribute(node, "pads") or [0] * (2 * spatial))
    mode = attribute(node, "auto_pad", b"NOTSET")
    if mode in (b"SAME_UPPER", b"SAME_LOWER"):
        sizes, out = t.shapes[node.input[0]][2:], t.shapes[node.output[0]][2:]
        reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
        total = [max((o - 1) * s + r - n, 0) for o, s, r, n in zip(out, strides, reach, sizes, strict=True)]
        small, large = [pad // 2 for pad in total], [pad - pad // 2 for pad in total]
        pads = [*small, *large] if mode == b"SAME_UPPER" else [*large, *small]
    return strides, dilations, pads[:spatial], pads[spatial:]


def conv(node: NodeProto, grads: Sequence[str], t: Tape) -> None:
    data, weight = node.input[:2]
    shape, kernel = t.shapes[data], t.shapes[weight][2:]
    if len(node.input) > 2 and t.wants(node.input[2]):
        channels = (out := t.shapes[node.output[0]])[1]
        total = t.unbroadcast(grads[0], out, (channels, *[1] * len(kernel)))
        t.give(node.input[2], t.reshape(total, [channels]))
    strides, dilations, before, after = _geometry(node, kernel, t)
    if t.wants(data):
        reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
        out = t.shapes[node.output[0]][2:]
        ends = [
            n - ((o - 1) * s + r - low - high)
            for n, o, s, r, low, high in zip(shape[2:], out, strides, reach, before, after, strict=True)
        ]
        found = t.add(
            "ConvTranspose",
            grads[0],
            weight,
            strides=strides,
            dilations=dilations,
            pads=[*before, *after],
            output_padding=ends,
            group=attribute(node, "group", 1),
        )
        t.give(data, found)
    if t.wants(weight):
        _conv_weight(node, grads[0], t, strides, dilations, before, after)


def _conv_weight(
    node: NodeProto,
    grad: str,
    t: Tape,
    strides: Sequence[int],
    dilations: Sequence[int],
    before: Sequence[int],
    after: Sequence[int],
) -> None:
    """W's gradient is a product of the image's patches and the gradient: [O/G, N·places] × [N·places, C/G·kernel]."""
    data, weight = node.input[:2]
    batch, channels, *sizes = t.shapes[data]
    out = t.shapes[node.output[0]]
    kernel, groups = t.shapes[weight][2:], attribute(node, "group", 1)
    padded = [size + low + high for size, low, high in zip(sizes, before, after, strict=True)]
    image = t.pad(data, [0, 0, *before], [0, 0, *after])
    places, taps = prod(out[2:]), prod(kernel)
    axes = [  # [kernel, out] along each axis: where each tap of the kernel reads
        np.arange(k)[:, None] * d + np.arange(o)[None, :] * s
        for k, o, s, d in zip(kernel, out[2:], strides, dilations, strict=True)
    ]
    where = np.zeros((1, 1), np.int64)
    for size, grid in zip(padded, axes, strict=True):
        where = (where[:, None, :, None] * size + grid[None, :, None, :]).reshape(
            where.shape[0] * grid.shape[0], where.shape[1] * grid.shape[1]
        )
    flat = t.reshape(image, [batch, channels, prod(padded)])
    patches = t.add("Gather", flat, t.constant(where.reshape(-1), np.int64), axis=2)
    deep = channels // groups
    rows = t.reshape(patches, [batch, groups, deep * taps, places])
    columns = t.reshape(grad, [batch, groups, out[1] // groups, places])
    rows = t.reshape(t.transpose(rows, [1, 2, 0, 3]), [groups, deep * taps, batch * places])
    columns = t.reshape(t.transpose(columns, [1, 2, 0, 3]), [groups, out[1] // groups, batch * places])
    if groups == 1:
        rows, columns = (t.reshape(rows, [deep * taps, -1]), t.reshape(columns, [out[1], -1]))
        found = t.add("Gemm", columns, rows, transB=1)
    else:
        found = t.add("MatMul", columns, t.transpose(rows, [0, 2, 1]))
    t.give(weight, t.reshape(found, t.shapes[weight]))


def max_pool(node: NodeProto, grads: Sequence[str], t: Tape) -> None:
    """The gradient goes to the entry that was the largest."""
    if t.opset < 16:
        raise NoRuleError("its gradient needs sums of entries, which ONNX has since opset 16")
    data = node.input[0]
    shape, out = t.shapes[data], t.shapes[node.output[0]]
    settings = {entry.name: attribute(node, entry.name) for entry in node.attribute if entry.name != "storage_order"}
    _, places = t.several("MaxPool", 2, data, **settings)  # places count through the whole tensor
    zeros = t.filled([prod(shape)])
    flat = [t.reshape(name, [prod(out)]) for name in (places, grads[0])]
    t.give(data, t.reshape(t.add("ScatterElements", zeros, *flat, axis=0, reduction="add"), shape))


def resampled(node: NodeProto, grads: Sequence[str], t: Tape) -> None:
    """AveragePool and Resize: linear along one axis at a time; each axis goes back through its matrix, transposed."""
    data = node.input[0]
    shape, grad = t.shapes[data], grads[0]
    for axis in range(len(shape)):
        matrix = _matrix(node, axis, t)
        if matrix is None:
            continue
        order = [index for index in range(len(shape)) if index != axis] + [axis]
        grad = t.add("MatMul", t.transpose(grad, order), t.constant(matrix))
        grad = t.transpose(grad, [order.index(index) for index in range(len(shape))])
    t.give(data, grad)


def _matrix(node: NodeProto, axis: int, t: Tape) -> np.ndarray | None:
    """What the operator does along one axis, [out, in]; None if that is nothing.

    Each unit vector along the axis is given to the operator itself, with the other axes constant.
    """
    from onnxsnp.runtime import open_session

    shape, out = t.shapes[node.input[0]], t.shapes[node.output[0]]
    if axis < 2:
        if shape[axis] != out[axis]:
            raise NoRuleError("it resamples the batch or the channels")
        return None
    clone = _one_axis(node, axis - 2) if node.op_type == "AveragePool" else node
    model = helper.make_model(
        helper.make_graph(
            [clone],
            "axis",
            [helper.make_tensor_value_info(node.input[0], 1, [shape[axis], 1, *shape[2:]])],
            [helper.make_tensor_value_info(node.output[0], 1, None)],
        ),
        opset_imports=[helper.make_opsetid("", t.opset)],
        ir_version=8,
    )
    for slot, name in enumerate(node.input[1:], start=1):
        if not name:
            continue
        if name not in t.held:
            raise NoRuleError(f"its input {slot} is computed")
        held = t.held[name]
        if node.op_type == "Resize" and slot == 3 and held.size == len(shape):  # sizes, batch and channels included
            held = np.asarray([shape[axis], 1, *held[2:]], held.dtype)
        model.graph.initializer.append(onnx.numpy_helper.from_array(held, name))
    units = np.zeros((shape[axis], 1, *shape[2:]), np.float32)
    for index in range(shape[axis]):
        np.moveaxis(units, axis, -1)[index, ..., index] = 1.0
    session = open_session(model.SerializeToString(), optimize=False, arena=False)
    answer = session.run(None, {node.input[0]: units})[0][:, 0]
    return _along(answer, axis - 1)


def _one_axis(node: NodeProto, kept: int) -> NodeProto:
    """The pooling with a window along one of the spatial axes only."""
    clone = NodeProto()
    clone.CopyFrom(node)
    for name, idle in (("kernel_shape", 1), ("strides", 1), ("dilations", 1), ("pads", 0)):
        given = attribute(node, name)
        if given is not None:
            spatial = len(attribute(node, "kernel_shape"))
            set_attribute(clone, name, [v if index % spatial == kept else idle for index, v in enumerate(given)])
    return clone


def _along(answer: np.ndarray, axis: int) -> np.ndarray:
    """[out, in] from the answers to unit vectors, [in, spatial...], which are constant along the other axes."""
    first = np.moveaxis(answer, axis, -1).reshape(answer.shape[0], -1, answer.shape[axis])
    if not np.allclose(first, first[:, :1], atol=1e-5):
        raise NoRuleError("it does not work on one axis at a time")
    return np.ascontiguousarray(first[:, 0].T)


RULES = {
    "AveragePool": resampled,
    "Conv": conv,
    "MaxPool": max_pool,
    "Resize": resampled,
    "Upsample": resampled,
}
