"""Sizes that a graph computes with: a number of entries that something is divided by must stay what it is.

Sizes that do not follow the batch have been folded to constants, and those that tell an operator how large its result
is are corrected by the cut. What is left are sizes that become floating-point numbers, in a product with the batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from onnx import NodeProto, TensorProto

from onnxsnp.graph.axes import Axis
from onnxsnp.graph.ir import attribute

_Entries = tuple[frozenset[Axis], ...]  # for each entry of a vector of whole numbers, the axes whose sizes are in it

_FLOATS = (TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16, TensorProto.BFLOAT16)
_ARITHMETIC = {"Add", "Cast", "Div", "Max", "Min", "Mod", "Mul", "Neg", "ReduceProd", "ReduceSum", "Split", "Sub"}
_SAME = {"Identity", "Reshape", "Squeeze", "Unsqueeze"}


def sizes_in_numbers(
    nodes: Sequence[NodeProto], shapes: Mapping[str, tuple[int, ...]], weights: Mapping[str, np.ndarray]
) -> list[tuple[str, Axis]]:
    """Axes whose sizes become floating-point numbers, with the node that makes them so."""
    held: dict[str, _Entries] = {}
    found: list[tuple[str, Axis]] = []
    for node in nodes:
        reads = [name for name in node.input if name]
        if node.op_type in ("Shape", "Size") and reads[0] in shapes:
            each = [frozenset([(reads[0], axis)]) for axis in range(len(shapes[reads[0]]))]
            chosen = each[attribute(node, "start", 0) : attribute(node, "end")]
            held[node.output[0]] = tuple(chosen) if node.op_type == "Shape" else (frozenset().union(*each),)
        elif not any(name in held for name in reads) or not node.output:
            continue
        elif node.op_type == "Cast" and attribute(node, "to") in _FLOATS:
            found += [(node.name, axis) for entry in held[reads[0]] for axis in sorted(entry)]
        else:
            entries = _entries(node, held, shapes, weights)
            held.update(dict.fromkeys(node.output, entries) if entries else {})
    return found


def _entries(
    node: NodeProto,
    held: Mapping[str, _Entries],
    shapes: Mapping[str, tuple[int, ...]],
    weights: Mapping[str, np.ndarray],
) -> _Entries:
    """What the entries of an operator's result are made of; nothing where they are no sizes."""
    first = node.input[0]
    if node.op_type in _SAME or (node.op_type in ("Gather", "Slice") and first in held):
        chosen = _chosen(node, len(held.get(first, ())), weights)
        return tuple(held[first][index] for index in chosen) if first in held else ()
    if node.op_type == "Concat":
        return tuple(entry for name in node.input for entry in held.get(name, _unknown(shapes.get(name, ()))))
    if node.op_type not in _ARITHMETIC:
        return ()
    every = frozenset().union(*(entry for name in node.input for entry in held.get(name, ())))
    same = [held[name] for name in node.input if name in held]
    single = node.op_type not in ("ReduceProd", "ReduceSum", "Split") and len(same) == 1
    return same[0] if single else (every,) * max(1, *map(len, same))


def _unknown(shape: tuple[int, ...]) -> _Entries:
    return (frozenset[Axis](),) * int(np.prod(shape))


def _chosen(node: NodeProto, count: int, weights: Mapping[str, np.ndarray]) -> Sequence[int]:
    """The entries of a vector that an operator takes; all of them where that is not known."""
    places = list(range(count))
    if node.op_type == "Gather" and node.input[1] in weights:
        return [places[int(index)] for index in weights[node.input[1]].reshape(-1)]
    if node.op_type == "Slice" and all(name in weights for name in node.input[1:]):
        start, stop, step = (
            int(weights[node.input[slot]][0]) if len(node.input) > slot and node.input[slot] else default
            for slot, default in ((1, 0), (2, count), (4, 1))
        )
        if len(node.input) < 2:
            start, stop = attribute(node, "starts", [0])[0], attribute(node, "ends", [count])[0]
        return places[start:stop:step]
    return places
