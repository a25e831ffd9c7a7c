"""Comparisons, choices and integer arithmetic that importers lack, from what they have."""

from __future__ import annotations

import numpy as np
from onnx import helper

from onnxsnp.deploy.lowering.site import Rule, Site

_LARGEST = float(np.finfo(np.float32).max)


def _cast(s: Site) -> str | None:
    """One to the type that is there already does nothing."""
    like = s.node.op_type == "CastLike"
    wanted = s.dtype(1) if like else np.dtype(helper.tensor_dtype_to_np_dtype(s.attr("to")))
    if s.dtype() == wanted:
        s.alias = s.data
        return "it is of that type already"
    if not like:
        return None
    s.emit("Cast", [s.data], [s.output_name], s.node.name, to=helper.np_dtype_to_tensor_dtype(wanted))
    return "the type is known"


def _trilu(s: Site) -> str | None:
    """A triangle of a matrix: chosen by a constant mask."""
    rank = s.rank()
    offset = s.value(1) if s.given(1) else np.asarray(0)
    if offset is None or (s.takes("Trilu", s.dtype()) and (rank < 4 or s.target.tensorrt >= (8, 6))):
        return None  # N-D from 8.6 on
    rows, columns = s.shape()[-2:]
    every = np.ones((rows, columns), bool)
    diagonal = int(offset.reshape(-1)[0])
    kept = np.triu(every, diagonal) if s.attr("upper", 1) else np.tril(every, diagonal)
    if s.dtype() == np.bool_:
        s.add("And", s.data, s.constant(kept), into=s.output_name)
    else:
        s.add("Where", s.constant(kept), s.data, s.constant(np.asarray(0, s.dtype())), into=s.output_name)
    return "the importer has no Trilu of that rank"


def _mod(s: Site) -> str | None:
    """x − ⌊x / y⌋ y, or with fmod x − trunc(x / y) y. Integers through single precision: exact up to 2^24."""
    if s.takes("Mod"):
        return None
    kind, fmod = s.dtype(), s.attr("fmod", 0)
    x, y = s.node.input[0], s.node.input[1]
    whole = kind.kind in "iu"
    quotient = s.add("Div", *(s.cast(name, np.float32) if whole else name for name in (x, y)))
    if fmod:
        size = s.add("Floor", s.add("Abs", quotient))
        lowered = s.add("Mul", s.add("Sign", quotient), size)
    else:
        lowered = s.add("Floor", quotient)
    times = s.add("Mul", s.cast(lowered, kind) if whole else lowered, y)
    s.add("Sub", x, times, into=s.output_name)
    return "the importer has no Mod"


def _is_inf(s: Site) -> str | None:
    """Beyond the largest finite number."""
    if s.takes("IsInf"):
        return None
    positive, negative = s.attr("detect_positive", 1), s.attr("detect_negative", 1)
    if positive and negative:
        s.add("Greater", s.add("Abs", s.data), s.number(_LARGEST), into=s.output_name)
    elif positive:
        s.add("Greater", s.data, s.number(_LARGEST), into=s.output_name)
    elif negative:
        s.add("Less", s.data, s.number(-_LARGEST), into=s.output_name)
    else:
        return None
    return "the importer has no IsInf"


def _one_hot(s: Site) -> str | None:
    """Where the index is equal to the position; negative indices count from the end."""
    depth = s.value(1)
    values = s.value(2)
    if depth is None or values is None or s.takes("OneHot", values.dtype):
        return None
    count, rank = int(depth.reshape(-1)[0]), s.rank()
    axis = s.attr("axis", -1) % (rank + 1)
    kind = s.dtype()
    indices = s.cast(s.data, np.int64) if kind != np.int64 else s.data
    below = s.add("Less", indices, s.whole(0))
    indices = s.add("Where", below, s.add("Add", indices, s.whole(count)), indices)
    places = np.arange(count).reshape([-1] + [1] * (rank - axis))
    hit = s.add("Equal", s.unsqueeze(indices, [axis]), s.constant(places.astype(np.int64)))
    off, on = values.reshape(-1)
    s.add("Where", hit, s.constant(np.asarray(on)), s.constant(np.asarray(off)), into=s.output_name)
    return "the importer has no OneHot"


def _xor(s: Site) -> str | None:
    """One, and not both."""
    if s.takes("Xor"):
        return None
    both = s.add("And", *s.node.input)
    s.add("And", s.add("Or", *s.node.input), s.add("Not", both), into=s.output_name)
    return "the importer has no Xor"


def _grid_sample(s: Site) -> str | None:
    """Its modes have other names from opset 20 on."""
    names = {"bilinear": "linear", "bicubic": "cubic"}
    if s.opset < 20:
        names = {new: old for old, new in names.items()}
    mode = s.text("mode", "linear" if s.source >= 20 else "bilinear")
    if (s.source >= 20) == (s.opset >= 20):
        return None
    s.again(*s.node.input, **{**s.settings("mode"), "mode": names.get(mode, mode)})
    return "its modes have other names"


RULES: dict[str, Rule] = {
    "Cast": _cast,
    "CastLike": _cast,
    "GridSample": _grid_sample,
    "IsInf": _is_inf,
    "Mod": _mod,
    "OneHot": _one_hot,
    "Trilu": _trilu,
    "Xor": _xor,
}
