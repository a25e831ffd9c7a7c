"""Gradients of softmaxes, normalisations and reductions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

import numpy as np
from onnx import NodeProto

from onnxsnp.graph.ir import attribute
from onnxsnp.recovery.gradients.tape import NoRuleError, Shape, Tape

# ------------------------------------------------------------------------------------------------------------ softmaxes


def _rows(node: NodeProto, t: Tape) -> tuple[Shape, int]:
    """The shape in which a softmax runs over one axis, and that axis."""
    shape = t.shapes[node.input[0]]
    axis = attribute(node, "axis", -1 if t.opset >= 13 else 1) % max(len(shape), 1)
    if t.opset >= 13:
        return shape, axis
    return (prod(shape[:axis]), prod(shape[axis:])), 1  # before opset 13 rows are everything from the axis on


def softmax(node: NodeProto, grads: Sequence[str], t: Tape) -> None:
    """∂x = y (g − Σ g y)."""
    shape, axis = _rows(node, t)
    whole = shape == t.shapes[node.input[0]]
    grad, y = (name if whole else t.reshape(name, shape) for name in (grads[0], node.output[0]))
    part = t.add("Mul", grad, y)
    found = t.add("Sub", part, t.add("Mul", y, t.sum(part, [axis])))
    t.give(node.input[0], found if whole else t.reshape(found, t.shapes[node.input[0]]))


def log_softmax(node: NodeProto, grads: Sequence[str], t: Tape) -> None:
    """∂x = g − exp(y) Σ g."""
    shape, axis = _rows(node, t)
    grad, y = (t.reshape(name, shape) for name in (grads[0], node.output[0]))
    found = t.add("Sub", grad, t.add("Mul", t.add("Exp", y), t.sum(grad, [axis])))
    t.give(node.input[0], t.reshape(found, t.shapes[node.input[0]]))


# ------------------------------------------------------------------------------------------------------- normalisations


def _mean(tensor: str, t: Tape) -> str:
    if t.opset >= 18:
        return t.add("ReduceMean", tensor, t.integers([1]))
    return t.add("ReduceMean", tensor, axes=[1])


def _affine(node: NodeProto, grad: str, unit: str, t: Tape, size: int) -> str:
    """The gradient of x̂ from that of γ x̂ + β; gives those of γ and β. All are matrices of rows that are normalised."""
    scale = node.input[1]
    if len(node.input) > 2 and node.input[2] and t.wants(node.input[2]):
        t.give(node.input[2], t.reshape(t.column_sums(grad), t.shapes[node.input[2]]))
    if t.wants(scale):
        t.give(scale, t.reshape(t.column_sums(t.add("Mul", grad, unit)), t.shapes[scale]))
    return t.add("Mul", grad, t.reshape(scale, [size]))


def _per_channel(node: NodeProto, size: int, t: Tape) -> None:
    if any(name and prod(t.shapes[name]) != size for name in node.input[1:]):
        raise NoRuleError("its scale is not one number per channel")


def layer_norm(node: NodeProto, grads: Sequence[str], t: Tape) -> None:
    """∂x = (h − mean h − x̂ mean(h x̂)) / σ with h = γ g (arXiv 1607.06450, eq. 4)."""
    data = node.input[0]
    shape = t.shapes[data]
    size = prod(shape[attribute(node, "axis", -1) % len(shape) :])
    rows = prod(shape) // size
    _per_channel(node, size, t)
    x, grad = t.reshape(data, [rows, size]), t.reshape(grads[0], [rows, size])
    ones = t.constant(np.ones(size))
    unit, _, inverse = t.several("LayerNormalization", 3, x, ones, axis=1, epsilon=attribute(node, "epsilon", 1e-5))
    h = _affine(node, grad, unit, t, size)
    if t.wants(data):
        along = _mean(t.add("Mul", h, unit), t)
        rest = t.add("Sub", t.add("Sub", h, t.add("Mul", unit, along)), _mean(h, t))
        t.give(data, t.reshape(t.add("Mul", rest, inverse), shape))


def rms_norm(node: NodeProto, grads: Sequence[str], t: Tape) -> None:
    """∂x = (h − x̂ mean(h x̂)) / RMS with h = γ g (arXiv 1910.07467, eq. 4)."""
    data = node.input[0]
    shape = t.shapes[data]
    size = prod(shape[attribute(node, "axis", -1) % len(shape) :])
    rows = prod(shape) // size
    _per_channel(node, size, t)
    x, grad = t.reshape(data, [rows, size]), t.reshape(grads[0], [rows, size])
    spread = t.add("Add", _mean(t.add("Mul", x, x), t), t.constant(attribute(node, "epsilon", 1e-5)))
    inverse = t.add("Reciprocal", t.add("Sqrt", spread))
    unit = t.add("Mul", x, inverse)
    h = _affine(node, grad, unit, t, size)
    if t.wants(data):
        along = _mean(t.add("Mul", h, unit), t)
        t.give(data, t.reshape(t.add("Mul", t.add("Sub", h, t.add("Mul", unit, along)), inverse), shape))


def batch_norm(node: NodeProto, grads: Sequence[str], t: Tape) -> None:
    """y = (x − μ) γ / √(v + ε) + β; the recorded statistics μ and v stay as they are."""
    if attribute(node, "training_mode", 0):
        raise NoRuleError("it is in training mode")
    data, scale, shift, mean, variance = node.input
    shape = t.shapes[data]
    spread = t.add("Sqrt", t.add("Add", variance, t.constant(attribute(node, "epsilon", 1e-5))))
    channels = [shape[1]] + [1] * (len(shape) - 2)
    if t.wants(data):
        t.give(data, t.add("Mul", grads[0], t.reshape(t.add("Div", scale, spread), channels)))
    if t.wants(shift):
        t.give(shift, t.reshape(t.unbroadcast(grads[0], shape, tuple(channels)), [shape[1]]))
    if t.wants(scale):
        centred = t.add("Sub", data, t.reshape(mean, channels))
        total = t.unbroadcast(t.add("Mul", grads[0], centred), shape, tuple(channels))
        t.give(scale, t.add("Div", t.reshape(total, [shape[1]]), spread))


# ----------------------------------------------------------------------------------------------------------- reductions


def _reduced(node: NodeProto, t: Tape) -> Shape:
    """The result's shape with the axes that it lost."""
    shape = t.shapes[node.input[0]]
    axes = attribute(node, "axes")
    if axes is None and len(node.input) > 1 and node.input[1]:
        held = t.held.get(node.input[1])
        if held is None:
            raise NoRuleError("its axes are computed")
        axes = held.reshape(-1).tolist()
    if not axes:
        if attribute(node, "noop_with_empty_axes", 0):
            return shape
        axes = range(len(shape))
    gone = {axis % len(shape) for axis in axes}
    return tuple(1 if axis in gone else size for axis, size in enumerate(shape))


def reduction(
    share: Callable[[NodeProto, str, str, str, Tape], str],
) -> Callable[[NodeProto, Sequence[str], Tape], None]:
    """The rule of a reduction from what computes ∂x out of (x, y, g) where y and g have x's rank."""

    def rule(node: NodeProto, grads: Sequence[str], t: Tape) -> None:
        data = node.input[0]
        small = _reduced(node, t)
        grad, result = t.reshape(grads[0], small), t.reshape(node.output[0], small)
        found = share(node, data, result, grad, t)
        t.give(data, t.add("Expand", found, t.integers(t.shapes[data])))

    return rule


def _each(node: NodeProto, x: str, y: str, g: str, t: Tape) -> str:
    return g


def _part(node: NodeProto, x: str, y: str, g: str, t: Tape) -> str:
    return t.scaled(g, prod(t.shapes[node.output[0]]) / prod(t.shapes[node.input[0]]))


def _direction(node: NodeProto, x: str, y: str, g: str, t: Tape) -> str:
    return t.add("Mul", x, t.add("Div", g, y))


def _largest(node: NodeProto, x: str, y: str, g: str, t: Tape) -> str:
    return t.mask(t.add("Equal", x, y), g)


def _others(node: NodeProto, x: str, y: str, g: str, t: Tape) -> str:
    return t.add("Div", t.add("Mul", g, y), x)


def _twice(node: NodeProto, x: str, y: str, g: str, t: Tape) -> str:
    return t.add("Mul", t.scaled(g, 2.0), x)


def _signs(node: NodeProto, x: str, y: str, g: str, t: Tape) -> str:
    return t.add("Mul", g, t.add("Sign", x))


def _softest(node: NodeProto, x: str, y: str, g: str, t: Tape) -> str:
    return t.add("Mul", g, t.add("Exp", t.add("Sub", x, y)))


def global_average(node: NodeProto, grads: Sequence[str], t: Tape) -> None:
    shape = t.shapes[node.input[0]]
    t.give(node.input[0], t.add("Expand", t.scaled(grads[0], 1 / prod(shape[2:])), t.integers(shape)))


def cumulative_sum(node: NodeProto, grads: Sequence[str], t: Tape) -> None:
    kept = attribute(node, "exclusive", 0)
    back = 1 - attribute(node, "reverse", 0)
    t.give(node.input[0], t.add("CumSum", grads[0], node.input[1], exclusive=kept, reverse=back))


RULES = {
    "BatchNormalization": batch_norm,
    "CumSum": cumulative_sum,
    "GlobalAveragePool": global_average,
    "LayerNormalization": layer_norm,
    "LogSoftmax": log_softmax,
    "RMSNormalization": rms_norm,
    "ReduceL1": reduction(_signs),
    "ReduceL2": reduction(_direction),
    "ReduceLogSumExp": reduction(_softest),
    "ReduceMax": reduction(_largest),
    "ReduceMean": reduction(_part),
    "ReduceMin": reduction(_largest),
    "ReduceProd": reduction(_others),
    "ReduceSum": reduction(_each),
    "ReduceSumSquare": reduction(_twice),
    "Softmax": softmax,
}
