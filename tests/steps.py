"""One random step of a chain for every operator that has a rule: `STEPS` by operator type.

A step gets `draw` of hypothesis, the chain, and a tensor of floating-point numbers; it appends its operator, with what
must stand around it, and returns the tensor with which the chain goes on. None means that it cannot be drawn here.
"""

from __future__ import annotations

import string
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from chains import Chain
from hypothesis import strategies as st
from onnx import TensorProto

Step = Callable[[Any, Chain, str], "str | None"]


@dataclass(frozen=True)
class Covered:
    """A step and the opsets in which its operator exists."""

    step: Step
    since: int = 1
    until: int = 99


STEPS: dict[str, Covered] = {}


def covers(*ops: str, since: int = 1, until: int = 99) -> Callable[[Callable[..., str | None]], Any]:
    """Register a step for operators; one that takes `op` as last argument gets the operator's type."""

    def register(step: Callable[..., str | None]) -> Callable[..., str | None]:
        for op in ops:
            STEPS[op] = Covered(lambda draw, chain, x, op=op: step(draw, chain, x, op), since, until)
        return step

    return register


def an_axis(draw: Any, chain: Chain, x: str) -> int | None:
    """An axis that a step may touch."""
    return draw(st.integers(chain.first, chain.rank(x) - 1)) if chain.rank(x) > chain.first else None


def positive(chain: Chain, x: str, least: float = 0.5) -> str:
    return chain.add("Add", chain.add("Abs", x), chain.constant(least))


def away_from_zero(chain: Chain, x: str) -> str:
    """x + sign(x) / 2: zero where x is, and nowhere near it otherwise."""
    return chain.add("Add", x, chain.add("Mul", chain.add("Sign", x), chain.constant(0.5)))


# ------------------------------------------------------------------------------------------------------- entry by entry

_PLAIN = {
    "Abs": 6, "Ceil": 6, "Celu": 12, "Cos": 7, "Elu": 6, "Erf": 9, "Floor": 6, "Gelu": 20, "HardSigmoid": 6,
    "HardSwish": 14, "Identity": 1, "LeakyRelu": 6, "Mish": 18, "Neg": 6, "Relu": 6, "Round": 11, "Selu": 6,
    "Sigmoid": 6, "Sign": 9, "Sin": 7, "Softplus": 1, "Softsign": 1, "Swish": 24, "Tanh": 6, "ThresholdedRelu": 10,
}  # fmt: skip


def _plain(draw: Any, chain: Chain, x: str, op: str) -> str:
    return chain.add(op, x)


for _op, _since in _PLAIN.items():
    covers(_op, since=_since)(_plain)


@covers("Exp")
def exp(draw: Any, chain: Chain, x: str, op: str) -> str:
    return chain.add(op, chain.add("Tanh", x))


@covers("Sqrt", "Log", "Reciprocal")
def of_positive_numbers(draw: Any, chain: Chain, x: str, op: str) -> str:
    """Of numbers that stay away from zero, or of numbers that are zero where a neuron is silent."""
    if draw(st.booleans()):
        return chain.add(op, positive(chain, x))
    apart = away_from_zero(chain, x)
    return chain.add(op, apart if op == "Reciprocal" else chain.add("Abs", apart))


@covers("Cast")
def cast(draw: Any, chain: Chain, x: str, op: str) -> str:
    return chain.add(op, chain.add(op, x, to=TensorProto.DOUBLE), to=TensorProto.FLOAT)


@covers("CastLike", since=15)
def cast_like(draw: Any, chain: Chain, x: str, op: str) -> str:
    return chain.add(op, chain.add(op, x, chain.constant(np.float64(1))), chain.constant(1.0))


@covers("Clip")
def clip(draw: Any, chain: Chain, x: str, op: str) -> str:
    if chain.opset < 11:
        return chain.add(op, x, min=-0.5, max=1.5)
    return chain.add(op, x, chain.constant(-0.5), chain.constant(1.5))


@covers("Dropout")
def dropout(draw: Any, chain: Chain, x: str, op: str) -> str:
    if chain.opset < 10 or not draw(st.booleans()):
        return chain.add(op, x)
    kept, mask = chain.add(op, x, outputs=2)
    return chain.add("Where", mask, kept, chain.constant(0.0))


# --------------------------------------------------------------------------------------------- several, entry by entry


def an_operand(draw: Any, chain: Chain, x: str) -> str:
    """A constant that is broadcast, x itself in another form, a tensor before it, or a product by a weight."""
    shape = chain.shape(x)
    kind = draw(st.sampled_from(["constant", "scalar", "self", "earlier", "reduced", "layer"]))
    if kind == "earlier":
        outputs = [node.output[0] for node in chain.nodes]
        same = [name for name in outputs if chain.shape(name) == shape and chain.values[name].dtype == np.float32]
        return draw(st.sampled_from(same)) if same else x
    if kind == "self":
        return chain.add(draw(st.sampled_from(["Sigmoid", "Tanh", "Relu"])), x)
    if kind == "reduced" and chain.rank(x) > chain.first:
        op = draw(st.sampled_from(["ReduceMean", "ReduceMax", "ReduceSum"]))
        return chain.calm(chain.reduce(op, x, draw(st.integers(chain.first, chain.rank(x) - 1))))
    if kind == "layer" and chain.rank(x) > 1:
        return chain.add("MatMul", x, chain.weight(shape[-1], shape[-1]))
    if kind == "constant":
        start = draw(st.integers(chain.first, chain.rank(x)))
        return chain.weight(*(1 if draw(st.booleans()) else size for size in shape[start:]), scale=1.0)
    return chain.weight(scale=1.0)


def either_way(draw: Any, chain: Chain, op: str, x: str, other: str) -> str:
    return chain.add(op, *((x, other) if draw(st.booleans()) else (other, x)))


@covers("Add", "Sub", "Mul")
def arithmetic(draw: Any, chain: Chain, x: str, op: str) -> str:
    return either_way(draw, chain, op, x, an_operand(draw, chain, x))


@covers("Max", "Min", "Mean", "Sum", since=8)
def of_many(draw: Any, chain: Chain, x: str, op: str) -> str:
    others = [an_operand(draw, chain, x) for _ in range(draw(st.integers(1, 2)))]
    return chain.add(op, x, *others)


@covers("Div")
def div(draw: Any, chain: Chain, x: str, op: str) -> str:
    other = an_operand(draw, chain, x)
    divisor = away_from_zero(chain, other) if draw(st.booleans()) else positive(chain, other)
    return chain.add(op, x, divisor)


@covers("Pow")
def power(draw: Any, chain: Chain, x: str, op: str) -> str:
    exponent = draw(st.sampled_from([2.0, 3.0, -1.0, -2.0, 0.5, "given"]))
    if exponent == "given":
        return chain.add(op, positive(chain, x), chain.add("Tanh", an_operand(draw, chain, x)))
    if exponent in (2.0, 3.0):
        return chain.add(op, x, chain.constant(exponent))
    apart = chain.add("Abs", away_from_zero(chain, x))
    return chain.add(op, apart if draw(st.booleans()) else positive(chain, x), chain.constant(exponent))


@covers("Mod", since=10)
def mod(draw: Any, chain: Chain, x: str, op: str) -> str:
    other = an_operand(draw, chain, x)
    return chain.add(op, x, away_from_zero(chain, other) if draw(st.booleans()) else positive(chain, other), fmod=1)


@covers("PRelu")
def prelu(draw: Any, chain: Chain, x: str, op: str) -> str:
    return chain.add(op, x, an_operand(draw, chain, x))


def a_condition(draw: Any, chain: Chain, x: str, op: str = "") -> str:
    """A tensor of truth values of the shape of x, or one that is broadcast to it."""
    names = ["Greater", "Less"] + (["GreaterOrEqual", "LessOrEqual"] if chain.opset >= 12 else [])
    names += ["Equal"] if chain.opset >= 11 else []
    op = op or draw(st.sampled_from(names))
    left, right = an_operand(draw, chain, x), x
    if op == "Equal" and draw(st.booleans()):
        left, right = chain.add("Relu", x), chain.constant(0.0)
    return either_way(draw, chain, op, left, right)


def told_apart(draw: Any, chain: Chain, x: str, condition: str) -> str:
    """Numbers again: one where a condition holds, or a choice by it."""
    if draw(st.booleans()):
        return chain.add("Add", x, chain.add("Cast", condition, to=TensorProto.FLOAT))
    return chain.add("Where", condition, *(an_operand(draw, chain, x), x)[:: draw(st.sampled_from([1, -1]))])


@covers("Greater", "Less", since=9)
def compare(draw: Any, chain: Chain, x: str, op: str) -> str:
    return told_apart(draw, chain, x, a_condition(draw, chain, x, op))


covers("GreaterOrEqual", "LessOrEqual", since=12)(compare)
covers("Equal", since=11)(compare)


@covers("And", "Or", "Xor")
def logic(draw: Any, chain: Chain, x: str, op: str) -> str:
    both = chain.add(op, a_condition(draw, chain, x), a_condition(draw, chain, x))
    return told_apart(draw, chain, x, both)


@covers("Not")
def negation(draw: Any, chain: Chain, x: str, op: str) -> str:
    return told_apart(draw, chain, x, chain.add(op, a_condition(draw, chain, x)))


@covers("IsNaN", since=9)
def is_nan(draw: Any, chain: Chain, x: str, op: str) -> str:
    return chain.add("Where", chain.add(op, chain.add("Sqrt", x)), x, chain.add("Relu", x))


@covers("IsInf", since=10)
def is_inf(draw: Any, chain: Chain, x: str, op: str) -> str:
    huge = chain.add("Mul", x, chain.constant(3e38))
    return chain.add("Where", chain.add(op, huge), x, chain.add("Relu", x))


@covers("Where", since=9)
def where(draw: Any, chain: Chain, x: str, op: str) -> str:
    held = chain.constant(chain.rng.random(chain.shape(x)[chain.first :]) < 0.5)
    return chain.add(op, held, x, an_operand(draw, chain, x))


# --------------------------------------------------------------------------------------------------------------- shapes


def divisions(size: int) -> list[tuple[int, ...]]:
    return [(size // part, part) for part in range(2, size + 1) if size % part == 0] + [(1, size)]


@covers("Reshape")
def reshape(draw: Any, chain: Chain, x: str, op: str) -> str | None:
    axis = an_axis(draw, chain, x)
    if axis is None or chain.rank(x) > 5:
        return None
    shape = chain.shape(x)
    if axis + 1 < chain.rank(x) and draw(st.booleans()):
        return chain.reshape(x, *shape[:axis], shape[axis] * shape[axis + 1], *shape[axis + 2 :])
    return chain.reshape(x, *shape[:axis], *draw(st.sampled_from(divisions(shape[axis]))), *shape[axis + 1 :])


@covers("Flatten", since=9)
def flatten(draw: Any, chain: Chain, x: str, op: str) -> str | None:
    axis = an_axis(draw, chain, x)
    if axis is None or (chain.free and axis != 1):
        return None
    return chain.add(op, x, axis=axis)


@covers("Squeeze")
def squeeze(draw: Any, chain: Chain, x: str, op: str) -> str | None:
    ones = [axis for axis in range(chain.first, chain.rank(x)) if chain.shape(x)[axis] == 1]
    if ones:
        return chain.squeeze(x, draw(st.sampled_from(ones)))
    return chain.squeeze(chain.unsqueeze(x, chain.first), chain.first) if chain.rank(x) < 6 else None


@covers("Unsqueeze")
def unsqueeze(draw: Any, chain: Chain, x: str, op: str) -> str | None:
    return chain.unsqueeze(x, draw(st.integers(chain.first, chain.rank(x)))) if chain.rank(x) < 6 else None


@covers("Transpose")
def transpose(draw: Any, chain: Chain, x: str, op: str) -> str:
    rest = draw(st.permutations(range(chain.first, chain.rank(x))))
    return chain.add(op, x, perm=[*range(chain.first), *rest])


@covers("Expand", since=8)
def expand(draw: Any, chain: Chain, x: str, op: str) -> str | None:
    """Axes of size 1 repeated, others said again or left by 1, new ones in front only where the batch is not first."""
    sizes = [1 if draw(st.booleans()) else size for size in chain.shape(x)]
    sizes[:chain.first] = [1] * chain.first
    ones = [axis for axis in range(chain.first, len(sizes)) if chain.shape(x)[axis] == 1]
    if ones and chain.size(x) < 400:
        sizes[draw(st.sampled_from(ones))] = 3
    if not chain.free and len(sizes) < 5 and chain.size(x) < 400 and draw(st.booleans()):
        sizes.insert(0, 2)
    return chain.add(op, x, chain.constant(sizes))


@covers("Tile")
def tile(draw: Any, chain: Chain, x: str, op: str) -> str | None:
    axis = an_axis(draw, chain, x)
    if axis is None or chain.size(x) > 400:
        return None
    repeats = [1] * chain.rank(x)
    repeats[axis] = draw(st.integers(1, 2))
    return chain.add(op, x, chain.constant(repeats))


@covers("Pad")
def pad(draw: Any, chain: Chain, x: str, op: str) -> str | None:
    axis = an_axis(draw, chain, x)
    if axis is None:
        return None
    rank, amounts = chain.rank(x), [0] * (2 * chain.rank(x))
    amounts[axis], amounts[axis + rank] = draw(st.sampled_from([(1, 1), (0, 2), (2, -1), (-1, 1), (0, 0)]))
    if chain.shape(x)[axis] < 2:
        amounts[axis], amounts[axis + rank] = 0, 1
    if chain.opset < 11:
        return chain.add(op, x, pads=amounts)
    if chain.opset >= 18 and draw(st.booleans()):
        pair = chain.constant([amounts[axis], amounts[axis + rank]])
        return chain.add(op, x, pair, chain.constant(0.5), chain.constant([axis - rank]))
    return chain.add(op, x, chain.constant(amounts))


@covers("Resize", since=11)
def resize(draw: Any, chain: Chain, x: str, op: str) -> str | None:
    axis = an_axis(draw, chain, x)
    if axis is None or chain.rank(x) > 4 or chain.size(x) > 400:
        return None
    scale = draw(st.sampled_from([1.0, 2.0, 0.5]))
    factors = [scale if index == axis else 1.0 for index in range(chain.rank(x))]
    held = chain.add("Identity", x)
    roi = "" if chain.opset >= 13 else chain.constant(np.zeros(0, np.float32))
    if chain.free or draw(st.booleans()):
        return chain.add(op, held, roi, chain.constant(factors), mode="nearest")
    sizes = [max(1, int(size * factor)) for size, factor in zip(chain.shape(x), factors, strict=True)]
    scales = "" if chain.opset >= 13 else chain.constant(np.zeros(0, np.float32))
    return chain.add(op, held, roi, scales, chain.constant(sizes), mode="nearest")


@covers("Upsample", until=9)
def upsample(draw: Any, chain: Chain, x: str, op: str) -> str | None:
    axis = an_axis(draw, chain, x)
    if axis is None or chain.rank(x) > 4 or chain.size(x) > 400:
        return None
    factors = [2.0 if index == axis else 1.0 for index in range(chain.rank(x))]
    return chain.add(op, x, chain.constant(factors), mode="nearest")


# ---------------------------------------------------------------------------------------------------------------- parts


def takeable(draw: Any, chain: Chain, x: str) -> tuple[int, int] | None:
    """An axis of more than one index, and its size."""
    axes = [axis for axis in range(chain.first, chain.rank(x)) if chain.shape(x)[axis] > 1]
    if not axes:
        return None
    axis = draw(st.sampled_from(axes))
    return axis, chain.shape(x)[axis]


@covers("Slice")
def slice_(draw: Any, chain: Chain, x: str, op: str) -> str | None:
    found = takeable(draw, chain, x)
    if found is None:
        return None
    axis, size = found
    start, stop, step = draw(
        st.sampled_from(
            [(0, size // 2, 1), (size // 2, size, 1), (1, size, 1), (-1, size, 1), (0, 2**40, 1), (0, 2**40, 2),
             (1, 2**40, 2), (size - 1, -(2**40), -1), (0, size - 1, 1), (-size, -1, 1)]
        )
    )  # fmt: skip
    if chain.opset < 10:
        return chain.add(op, x, starts=[start], ends=[stop], axes=[axis]) if step == 1 else None
    named = axis - chain.rank(x) if draw(st.booleans()) else axis
    bounds = [chain.constant([value]) for value in (start, stop, named, step)]
    return chain.add(op, x, *bounds[: 3 if step == 1 and draw(st.booleans()) else 4])


@covers("Split")
def split(draw: Any, chain: Chain, x: str, op: str) -> str | None:
    """In equal or unequal parts, one of which goes on, or two that meet again."""
    found = takeable(draw, chain, x)
    if found is None:
        return None
    axis, size = found
    cut = size // 2 if draw(st.booleans()) else draw(st.integers(1, size - 1))
    if 2 * cut == size and chain.opset < 18 and draw(st.booleans()):
        parts = chain.add(op, x, outputs=2, axis=axis)
    elif chain.opset >= 13:
        parts = chain.add(op, x, chain.constant([cut, size - cut]), outputs=2, axis=axis)
    else:
        parts = chain.add(op, x, outputs=2, axis=axis, split=[cut, size - cut])
    if 2 * cut != size or draw(st.booleans()):
        return parts[draw(st.integers(0, 1))]
    other = chain.add(draw(st.sampled_from(["Sigmoid", "Neg"])), parts[1])
    if draw(st.booleans()):
        return chain.add("Concat", other, parts[0], axis=axis)
    return chain.add("Mul", parts[0], other)


@covers("Concat")
def concat(draw: Any, chain: Chain, x: str, op: str) -> str | None:
    axis = an_axis(draw, chain, x)
    if axis is None or chain.size(x) > 400:
        return None
    other = an_operand(draw, chain, x)
    if chain.shape(other) != chain.shape(x):
        other = chain.add("Tanh", x)
    return chain.add(op, x, other, axis=axis)


@covers("Gather")
def gather(draw: Any, chain: Chain, x: str, op: str) -> str | None:
    """One index, a range, some in any order, or rows of a table that are looked up."""
    found = takeable(draw, chain, x)
    if found is None:
        return None
    axis, size = found
    kind = draw(st.sampled_from(["one", "range", "some", "grid", "table"]))
    if kind == "table":
        ids = chain.add("Cast", chain.add("Abs", chain.add("Clip", x)), to=TensorProto.INT64)
        ids = chain.add("Min", ids, chain.constant(3)) if chain.opset >= 12 else None
        if ids is None or chain.size(x) > 200 or chain.rank(x) > 4:
            return None
        return chain.add(op, chain.weight(4, 6, scale=1.0), ids, axis=0)
    if kind == "one":
        index = chain.constant(draw(st.integers(-size, size - 1)))
        return chain.add(op, x, index, axis=axis) if chain.rank(x) > 1 else None
    if kind == "range":
        start = draw(st.integers(0, size - 1))
        return chain.add(op, x, chain.constant(np.arange(start, size)), axis=axis)
    some = chain.rng.integers(0, size, size)
    if kind == "grid" and chain.rank(x) < 5 and chain.size(x) < 300:
        return chain.add(op, x, chain.constant(np.stack([some, some[::-1]])), axis=axis)
    return chain.add(op, x, chain.constant(some), axis=axis)


@covers("GatherND", since=12)
def gather_nd(draw: Any, chain: Chain, x: str, op: str) -> str | None:
    rank, shape = chain.rank(x), chain.shape(x)
    if draw(st.booleans()) and rank < 5:
        table = chain.weight(3, 4, 5, scale=1.0)
        places = chain.constant(np.stack([chain.rng.integers(0, 3, 6), chain.rng.integers(0, 4, 6)], -1))
        rows = chain.add(op, table, places)  # [6, 5]
        if shape[-1] == 6 and rank > 1:
            return chain.add("MatMul", x, rows)
        return chain.add("Add", x, chain.reduce("ReduceMax", chain.reduce("ReduceMax", rows, 0, 0), 0))
    if rank < 3 or chain.free:
        return None
    places = chain.rng.integers(0, shape[1], (shape[0], 2, 1))
    return chain.add(op, x, chain.constant(places), batch_dims=1)


# ---------------------------------------------------------------------------------------------------- norms, reductions


@covers("LayerNormalization", since=17)
def layer_norm(draw: Any, chain: Chain, x: str, op: str) -> str | None:
    axis = an_axis(draw, chain, x)
    if axis is None:
        return None
    shape = chain.shape(x)[axis:]
    inputs = [x, chain.weight(*shape, scale=0.3, shift=1.0)]
    inputs += [chain.weight(*shape, scale=0.3)] * draw(st.integers(0, 1))
    return chain.add(op, *inputs, axis=axis - chain.rank(x) if draw(st.booleans()) else axis, epsilon=0.05)


@covers("RMSNormalization", since=23)
def rms_norm(draw: Any, chain: Chain, x: str, op: str) -> str | None:
    axis = an_axis(draw, chain, x)
    if axis is None:
        return None
    return chain.add(op, x, chain.weight(*chain.shape(x)[axis:], scale=0.3, shift=1.0), axis=axis, epsilon=0.05)


@covers("BatchNormalization", since=9)
def batch_norm(draw: Any, chain: Chain, x: str, op: str) -> str | None:
    if chain.rank(x) < 2:
        return None
    count = chain.shape(x)[1]
    moments = [chain.weight(count, scale=0.3, shift=1.0), chain.weight(count), chain.weight(count)]
    return chain.add(op, x, *moments, chain.constant(0.5 + chain.rng.random(count)))


@covers("Softmax", "LogSoftmax")
def softmax(draw: Any, chain: Chain, x: str, op: str) -> str | None:
    axis = an_axis(draw, chain, x)
    if axis is None:
        return None
    return chain.add(op, x, axis=axis - chain.rank(x) if chain.opset >= 13 else axis)


@covers("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceL1", "ReduceL2", "ReduceProd", "ReduceSumSquare",
        "ReduceLogSumExp")  # fmt: skip
def reduce(draw: Any, chain: Chain, x: str, op: str) -> str | None:
    axis = an_axis(draw, chain, x)
    if axis is None:
        return None
    low = chain.add("Tanh", x) if op in ("ReduceProd", "ReduceLogSumExp") else x
    kind = draw(st.sampled_from(["kept", "gone", "beside"]))
    if kind == "gone" and chain.rank(x) > chain.first + 1:
        return chain.reduce(op, low, axis, keepdims=0)
    found = chain.reduce(op, low, axis)
    if kind == "beside":
        return chain.add("Div", x, positive(chain, found)) if draw(st.booleans()) else chain.add("Add", x, found)
    return found


# ------------------------------------------------------------------------------------------------------ run-time sizes


@covers("Shape")
def shape(draw: Any, chain: Chain, x: str, op: str) -> str:
    """Back into a Reshape, whole or with one entry computed; as a number."""
    sizes = chain.add(op, x)
    kind = draw(st.sampled_from(["whole", "entry", "number", "product"]))
    if kind == "whole":
        return chain.add("Reshape", chain.add("Neg", x), sizes)
    if kind == "product":
        count = chain.add("ReduceProd", sizes, keepdims=0)
        return chain.add("Div", x, chain.add("Sqrt", chain.add("Cast", count, to=TensorProto.FLOAT)))
    axis = draw(st.integers(0, chain.rank(x) - 1))
    entry = chain.add("Gather", sizes, chain.constant([axis]), axis=0)
    if kind == "number":
        return chain.add("Div", x, chain.add("Sqrt", chain.add("Cast", entry, to=TensorProto.FLOAT)))
    parts = [entry if index == axis else chain.constant([size]) for index, size in enumerate(chain.shape(x))]
    if chain.free and axis != 0:
        parts[0] = chain.constant([-1])
    return chain.add("Reshape", x, chain.add("Concat", *parts, axis=0))


@covers("Size")
def size(draw: Any, chain: Chain, x: str, op: str) -> str:
    return chain.add("Div", x, chain.add("Sqrt", chain.add("Cast", chain.add(op, x), to=TensorProto.FLOAT)))


@covers("ConstantOfShape", since=9)
def filled(draw: Any, chain: Chain, x: str, op: str) -> str:
    from onnx import helper

    value = helper.make_tensor("v", TensorProto.FLOAT, [1], [0.7])
    made = chain.add(op, chain.add("Shape", x), value=value)
    return chain.add(draw(st.sampled_from(["Add", "Mul"])), x, made)


@covers("Range", since=11)
def range_(draw: Any, chain: Chain, x: str, op: str) -> str | None:
    """Positions along an axis, counted at run time."""
    axis = draw(st.integers(0, chain.rank(x) - 1))
    count = chain.add("Gather", chain.add("Shape", x), chain.constant(axis), axis=0)
    places = chain.add("Cast", chain.add(op, chain.constant(0), count, chain.constant(1)), to=TensorProto.FLOAT)
    for _ in range(chain.rank(x) - 1 - axis):
        places = chain.unsqueeze(places, chain.rank(places))
    return chain.add("Add", x, chain.add("Mul", places, chain.constant(0.1)))


# ------------------------------------------------------------------------------------------------------------ products


@covers("MatMul")
def matmul(draw: Any, chain: Chain, x: str, op: str) -> str | None:
    """By a weight on either side, with a vector, or of two activations."""
    rank, shape = chain.rank(x), chain.shape(x)
    kind = draw(st.sampled_from(["right", "right", "right", "left", "vector", "pair"]))
    columns = draw(st.sampled_from([2, 4, 6, 12]))
    if rank < 2 or chain.size(x) // shape[-1] * columns > 3000:
        return None
    if kind == "left" and rank > 1 + chain.first:
        return chain.add(op, chain.weight(columns, shape[-2], scale=shape[-2] ** -0.5), x)
    if kind == "vector" and rank > 1 + chain.first:
        return chain.add(op, x, chain.weight(shape[-1]))
    if kind == "pair" and rank > 1 + chain.first:
        other = chain.add("MatMul", x, chain.weight(shape[-1], shape[-1]))
        turned = chain.add("Transpose", other, perm=[*range(rank - 2), rank - 1, rank - 2])
        return chain.calm(chain.add(op, x, turned))
    bias = chain.weight(columns)
    return chain.add("Add", chain.add(op, x, chain.weight(shape[-1], columns)), bias)


@covers("Gemm", since=9)
def gemm(draw: Any, chain: Chain, x: str, op: str) -> str | None:
    if chain.rank(x) != 2:
        return None
    rows, columns = chain.shape(x)[1], draw(st.sampled_from([2, 4, 6, 12]))
    turned = draw(st.booleans())
    weight = chain.weight(columns, rows, scale=rows**-0.5) if turned else chain.weight(rows, columns)
    biases = [(columns,), (1, columns), (1,), ()] + ([None] if chain.opset >= 11 else [])
    form = draw(st.sampled_from(biases))
    bias = [] if form is None else [chain.weight(*form)]
    if not chain.free and draw(st.booleans()):
        return chain.add(op, chain.add("Transpose", x, perm=[1, 0]), weight, *bias, transA=1, transB=int(turned))
    return chain.add(op, x, weight, *bias, transB=int(turned), alpha=0.7)


@covers("Einsum", since=12)
def einsum(draw: Any, chain: Chain, x: str, op: str) -> str | None:
    """Any letter contracted with a weight, the result in any order; two activations; or a sum over one letter."""
    rank, shape = chain.rank(x), chain.shape(x)
    if rank > 4 or rank == chain.first:
        return None
    letters = string.ascii_lowercase[:rank]
    gone = letters[draw(st.integers(chain.first, rank - 1))]
    size = shape[letters.index(gone)]
    kind = draw(st.sampled_from(["weight", "weight", "ellipsis", "pair", "sum"]))
    if kind == "ellipsis" and gone == letters[-1]:
        return chain.add(op, x, chain.weight(size, 4), equation=f"...{gone},{gone}z->...z")
    if kind == "sum":
        return chain.add(op, x, equation=f"{letters}->{letters.replace(gone, '')}")
    if kind == "pair" and rank > 1 + chain.first:
        other = chain.add("Tanh", x)
        kept = letters[-1] if gone != letters[-1] else letters[-2]
        if kept not in letters[chain.first :] or chain.size(x) > 400:
            return None
        second = letters.replace(kept, "y")
        return chain.calm(chain.add(op, x, other, equation=f"{letters},{second}->{letters.replace(gone, 'y')}"))
    out = "".join([*letters[: chain.first], *draw(st.permutations([*letters.replace(gone, "z")[chain.first :]]))])
    weight = chain.weight(4, size, scale=size**-0.5) if draw(st.booleans()) else None
    if weight:
        return chain.add(op, weight, x, equation=f"z{gone},{letters}->{out}")
    return chain.add(op, x, chain.weight(size, 6), equation=f"{letters},{gone}z->{out}")


def as_image(draw: Any, chain: Chain, x: str) -> str | None:
    """x with three or four axes, by axes of size 1."""
    if chain.rank(x) < 2 or chain.rank(x) > 4 or chain.size(x) > 600:
        return None
    while chain.rank(x) < 3 + draw(st.integers(0, 1)) and chain.rank(x) < 4:
        x = chain.unsqueeze(x, chain.rank(x))
    return x


@covers("Conv")
def conv(draw: Any, chain: Chain, x: str, op: str) -> str | None:
    """Dense, depthwise or in groups; of single places or of three along the last axis."""
    image = as_image(draw, chain, x)
    if image is None:
        return None
    channels, places = chain.shape(image)[1], chain.rank(image) - 2
    kind = draw(st.sampled_from(["dense", "dense", "depthwise", "groups"]))
    kernel = [1] * (places - 1) + [draw(st.sampled_from([1, 3]))]
    pads = [size // 2 for size in kernel] * 2
    bias = [chain.weight(channels)][: draw(st.integers(0, 1))]
    if kind == "dense":
        out = draw(st.sampled_from([2, 4, 6]))
        weight = chain.weight(out, channels, *kernel, scale=(channels * kernel[-1]) ** -0.5)
        return chain.add(op, image, weight, *([chain.weight(out)] if bias else []), pads=pads, kernel_shape=kernel)
    groups = channels if kind == "depthwise" else next((part for part in (2, 3) if channels % part == 0), channels)
    weight = chain.weight(channels, channels // groups, *kernel, scale=0.7)
    return chain.add(op, image, weight, *bias, group=groups, pads=pads, kernel_shape=kernel)


@covers("AveragePool", "MaxPool", "LpPool")
def pool(draw: Any, chain: Chain, x: str, op: str) -> str | None:
    image = as_image(draw, chain, x)
    if image is None:
        return None
    window = [2 if size > 1 else 1 for size in chain.shape(image)[2:]]
    return chain.add(op, image, kernel_shape=window, strides=window)


@covers("GlobalAveragePool", "GlobalMaxPool")
def global_pool(draw: Any, chain: Chain, x: str, op: str) -> str | None:
    image = as_image(draw, chain, x)
    return None if image is None else chain.add(op, image)


@covers("Attention", since=23)
def attention(draw: Any, chain: Chain, x: str, op: str) -> str | None:
    """Self-attention over [B, S, D] with heads inside the operator or apart, keys shared or not."""
    if chain.rank(x) != 3 or chain.size(x) > 600:
        return None
    batch, tokens, width = chain.shape(x)
    heads, shared = draw(st.sampled_from([(2, 2), (2, 1), (1, 1)]))
    size, value = draw(st.sampled_from([(4, 4), (3, 5)]))
    query = chain.add("MatMul", x, chain.weight(width, heads * size))
    keys = chain.add("MatMul", x, chain.weight(width, shared * size))
    values = chain.add("MatMul", x, chain.weight(width, shared * value))
    if draw(st.booleans()):
        counts = {"q_num_heads": heads, "kv_num_heads": shared}
        return chain.add(op, query, keys, values, **counts, scale=0.5, is_causal=draw(st.integers(0, 1)))
    apart = [
        chain.add("Transpose", chain.reshape(part, batch, tokens, count, -1), perm=[0, 2, 1, 3])
        for part, count in ((query, heads), (keys, shared), (values, shared))
    ]
    joined = chain.add("Transpose", chain.add(op, *apart, scale=0.5), perm=[0, 2, 1, 3])
    return chain.reshape(joined, batch, tokens, heads * value)
