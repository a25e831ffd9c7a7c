"""Gradients of operators that move entries: reshapes, parts, joins, repeats, look-ups."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np
from onnx import NodeProto

from onnxsnp.graph.ir import attribute
from onnxsnp.recovery.gradients.tape import NoRuleError, Tape


def reshaped(node: NodeProto, grads: Sequence[str], t: Tape) -> None:
    """Reshape and its relatives: the entries stay in order."""
    data = node.input[0]
    t.give(data, t.reshape(grads[0], t.shapes[data]))


def same(node: NodeProto, grads: Sequence[str], t: Tape) -> None:
    t.give(node.input[0], grads[0])


def transpose(node: NodeProto, grads: Sequence[str], t: Tape) -> None:
    rank = len(t.shapes[node.input[0]])
    order = attribute(node, "perm") or list(range(rank))[::-1]
    t.give(node.input[0], t.transpose(grads[0], [order.index(axis) for axis in range(rank)]))


def concat(node: NodeProto, grads: Sequence[str], t: Tape) -> None:
    shape = t.shapes[node.output[0]]
    axis = attribute(node, "axis") % len(shape)
    start = 0
    for name in node.input:
        size = t.shapes[name][axis]
        if t.wants(name):
            t.give(name, t.slice(grads[0], [start], [start + size], [axis]))
        start += size


def split(node: NodeProto, grads: Sequence[str], t: Tape) -> None:
    axis = attribute(node, "axis", 0)
    parts = [grad or t.filled(t.shapes[name]) for name, grad in zip(node.output, grads, strict=True) if name]
    if len(parts) < len(node.output):
        raise NoRuleError("one of its outputs has no name")
    t.give(node.input[0], t.add("Concat", *parts, axis=axis))


def _settings(node: NodeProto, slots: Sequence[str], t: Tape) -> list[list[int] | None]:
    """Constant inputs from slot 1 on, or attributes of those names."""
    found: list[list[int] | None] = []
    for slot, name in enumerate(slots, start=1):
        given = attribute(node, name)
        if given is None and len(node.input) > slot and node.input[slot]:
            held = t.held.get(node.input[slot])
            if held is None:
                raise NoRuleError(f"its {name} are computed")
            given = held.reshape(-1).tolist()
        found.append(given)
    return found


def slice_(node: NodeProto, grads: Sequence[str], t: Tape) -> None:
    data = node.input[0]
    shape = t.shapes[data]
    starts, ends, axes, steps = _settings(node, ("starts", "ends", "axes", "steps"), t)
    if starts is None or ends is None:
        raise NoRuleError("it does not say where it starts and ends")
    axes = [axis % len(shape) for axis in (axes or range(len(starts)))]
    chosen = {
        axis: range(shape[axis])[slice(_bound(start, step), _bound(end, step), step)]
        for axis, start, end, step in zip(axes, starts, ends, steps or [1] * len(starts), strict=True)
    }
    grad, sizes = grads[0], list(t.shapes[node.output[0]])
    for axis, places in chosen.items():
        if places.step < 0:
            grad = t.add("Slice", grad, t.integers([-1]), t.integers([-(2**31)]), t.integers([axis]), t.integers([-1]))
            places = places[::-1]
        if places.step > 1:
            grad = _spread(grad, sizes, axis, places.step, t)
            sizes[axis] *= places.step
    before, after = [0] * len(shape), [0] * len(shape)
    for axis, places in chosen.items():
        before[axis] = min(places) if places else 0
        after[axis] = shape[axis] - before[axis] - sizes[axis]
    t.give(data, t.pad(grad, before, after))


def _bound(place: int, step: int) -> int | None:
    """What numpy needs for 'to the end' of a walk backwards, which ONNX writes as a very negative number."""
    return None if step < 0 and place < -(2**30) else place


def _spread(grad: str, sizes: Sequence[int], axis: int, step: int, t: Tape) -> str:
    """step − 1 zeros behind every entry of an axis."""
    grad = t.reshape(grad, [*sizes[: axis + 1], 1, *sizes[axis + 1 :]])
    after = [step - 1 if index == axis + 1 else 0 for index in range(len(sizes) + 1)]
    grad = t.pad(grad, [0] * len(after), after)
    return t.reshape(grad, [size * step if index == axis else size for index, size in enumerate(sizes)])


def pad(node: NodeProto, grads: Sequence[str], t: Tape) -> None:
    data = node.input[0]
    if attribute(node, "mode", b"constant") != b"constant":
        raise NoRuleError(f"its mode is '{attribute(node, 'mode').decode()}'")
    pads, _, axes = _settings(node, ("pads", "value", "axes"), t)
    if pads is None:
        raise NoRuleError("its pads are not given")
    rank = len(t.shapes[data])
    before, after = [0] * rank, [0] * rank
    for index, axis in enumerate(axes or range(rank)):
        before[axis % rank], after[axis % rank] = -pads[index], -pads[index + len(pads) // 2]
    t.give(data, t.pad(grads[0], before, after))


def expand(node: NodeProto, grads: Sequence[str], t: Tape) -> None:
    t.give(node.input[0], grads[0], t.shapes[node.output[0]])


def tile(node: NodeProto, grads: Sequence[str], t: Tape) -> None:
    """Summed over the copies: each axis is [copies, size]."""
    shape, out = t.shapes[node.input[0]], t.shapes[node.output[0]]
    pairs = [part for size, total in zip(shape, out, strict=True) for part in (total // size, size)]
    total = t.sum(t.reshape(grads[0], pairs), list(range(0, len(pairs), 2)))
    t.give(node.input[0], t.reshape(total, shape))


# ------------------------------------------------------------------------------------------------------------ look-ups


def gather(node: NodeProto, grads: Sequence[str], t: Tape) -> None:
    data, indices = node.input
    shape = t.shapes[data]
    axis = attribute(node, "axis", 0) % len(shape)
    count = shape[axis]
    held = t.held.get(indices)
    lead, rest = shape[:axis], shape[axis + 1 :]
    entries = prod(t.shapes[indices])
    grad = t.reshape(grads[0], [*lead, entries, *rest])
    if held is not None:
        places = [int(place) % count for place in held.reshape(-1)]
        if places == list(range(places[0], places[0] + entries)):
            sides = [[0] * len(shape), [0] * len(shape)]
            sides[0][axis], sides[1][axis] = places[0], count - places[0] - entries
            t.give(data, t.pad(grad, *sides))
            return
        indices = t.integers(places)
    else:
        indices = t.add("Cast", indices, to=7)
        below = t.add("Less", indices, t.constant(0, np.int64))
        indices = t.add("Where", below, t.add("Add", indices, t.constant(count, np.int64)), indices)
    order = [axis, *range(axis), *range(axis + 1, len(shape))]
    rows = t.reshape(t.transpose(grad, order), [entries, prod(lead) * prod(rest)])
    table = t.scatter_rows(rows, indices, count, prod(lead) * prod(rest), entries)
    back = [order.index(index) for index in range(len(shape))]
    t.give(data, t.transpose(t.reshape(table, [count, *lead, *rest]), back))


def _needs_sums(t: Tape) -> None:
    if t.opset < 16:
        raise NoRuleError("its gradient needs sums of entries, which ONNX has since opset 16")


def gather_elements(node: NodeProto, grads: Sequence[str], t: Tape) -> None:
    _needs_sums(t)
    data, indices = node.input
    axis = attribute(node, "axis", 0)
    zeros = t.filled(t.shapes[data])
    t.give(data, t.add("ScatterElements", zeros, indices, grads[0], axis=axis, reduction="add"))


def gather_nd(node: NodeProto, grads: Sequence[str], t: Tape) -> None:
    _needs_sums(t)
    data, indices = node.input
    if attribute(node, "batch_dims", 0):
        raise NoRuleError("it has batch axes")
    t.give(data, t.add("ScatterND", t.filled(t.shapes[data]), indices, grads[0], reduction="add"))


def scatter_nd(node: NodeProto, grads: Sequence[str], t: Tape) -> None:
    """What is written over gets no gradient."""
    if attribute(node, "reduction", b"none") not in (b"none", b"add"):
        raise NoRuleError("it multiplies or compares what it writes")
    data, indices, updates = node.input
    if t.wants(data):
        if attribute(node, "reduction", b"none") == b"add":
            t.give(data, grads[0])
        else:
            t.give(data, t.add("ScatterND", grads[0], indices, t.filled(t.shapes[updates])))
    if t.wants(updates):
        t.give(updates, t.add("GatherND", grads[0], indices))


RULES = {
    "Cast": same,
    "CastLike": same,
    "Concat": concat,
    "Dropout": same,
    "Expand": expand,
    "Flatten": reshaped,
    "Gather": gather,
    "GatherElements": gather_elements,
    "GatherND": gather_nd,
    "Identity": same,
    "Pad": pad,
    "Reshape": reshaped,
    "ScatterND": scatter_nd,
    "Slice": slice_,
    "Split": split,
    "Squeeze": reshaped,
    "Tile": tile,
    "Transpose": transpose,
    "Unsqueeze": reshaped,
}
