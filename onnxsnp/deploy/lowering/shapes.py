"""Operators that move, cut and join: sizes and axes written out as constants."""

from __future__ import annotations

import numpy as np

from onnxsnp.deploy.lowering.site import Rule, Site

_LARGEST = 2**31 - 1


def _reshape(s: Site) -> str | None:
    """Full sizes, without allowzero; where a size is 0 the target is left as it was written."""
    sizes = s.shapes.get(s.output_name)
    if sizes is None or 0 in sizes:
        return None
    extra = {"allowzero": 0} if s.opset >= 14 else {}  # 8.2 throws from opset 14 on where it is not there
    s.emit("Reshape", [s.data, s.integers(list(sizes))], [s.output_name], s.node.name, **extra)
    return "its sizes are constants"


def _squeeze(s: Site) -> str | None:
    axes = s.value(1) if s.source >= 13 else s.attr("axes")
    if axes is None and s.given(1):
        return None
    if axes is None:
        axes = [axis for axis, size in enumerate(s.shape()) if size == 1]
    s.again(s.data, s.integers([int(axis) % s.rank() for axis in axes]))
    return "its axes are constants"


def _unsqueeze(s: Site) -> str | None:
    axes = s.value(1) if s.source >= 13 else s.attr("axes")
    if axes is None:
        return None
    rank = s.rank() + len(axes)
    s.again(s.data, s.integers([int(axis) % rank for axis in axes]))
    return "its axes are constants"


def _split(s: Site) -> str | None:
    """Sizes as a constant input; they are those that were measured."""
    axis = s.attr("axis", 0) % s.rank()
    known = [s.shapes.get(name) for name in s.node.output]
    if any(sizes is None for sizes in known):
        return None
    s.again(s.data, s.integers([sizes[axis] for sizes in known if sizes is not None]), axis=axis)
    return "its sizes are a constant"


def _slice(s: Site) -> str | None:
    """Attributes before opset 10; "to the end" is the largest INT32, which is what importers before 9 make of it."""
    if s.source < 10:
        starts, ends = s.attr("starts"), s.attr("ends")
        axes, steps = s.attr("axes"), None
    else:
        if any(s.given(slot) and s.value(slot) is None for slot in range(1, 5)):
            return None
        starts, ends, axes, steps = (s.value(slot) for slot in range(1, 5))
    limits = [[min(max(int(one), -_LARGEST), _LARGEST) for one in values] for values in (starts, ends)]
    count = len(limits[0])
    along = [int(axis) % s.rank() for axis in (range(count) if axes is None else axes)]
    by = [1] * count if steps is None else [int(step) for step in steps]
    s.again(s.data, *(s.integers(values) for values in (*limits, along, by)))
    return "its bounds are constants within INT32"


def _pad(s: Site) -> str | None:
    """Pads for every axis, as input; from opset 18 on a file may give them for some axes."""
    pads = s.attr("pads") if s.source < 11 else s.value(1)
    if pads is None:
        return None
    rank = s.rank()
    axes = s.value(3) if s.source >= 18 and s.given(3) else range(rank)
    if axes is None:
        return None
    full = np.zeros((2, rank), np.int64)
    full[:, [int(axis) % rank for axis in axes]] = np.asarray(pads).reshape(2, -1)
    if not full.any():
        s.alias = s.data
        return "it pads nothing"
    inputs = [s.data, s.integers(full.reshape(-1).tolist())]
    if s.source < 11 and s.attr("value", 0.0):
        inputs.append(s.number(s.attr("value")))
    elif s.source >= 11 and s.given(2):
        inputs.append(s.node.input[2])
    s.again(*inputs, mode=s.text("mode", "constant"))
    return "its pads are constants for all axes"


def _expand(s: Site) -> str | None:
    sizes = s.shapes.get(s.output_name)
    if sizes is None or 0 in sizes:
        return None
    if sizes == s.shape():
        s.alias = s.data
        return "it repeats nothing"
    s.again(s.data, s.integers(list(sizes)))
    return "its sizes are constants"


def _flatten(s: Site) -> str | None:
    sizes = s.shapes.get(s.output_name)
    if sizes is None or 0 in sizes:
        return None
    s.reshape(s.data, sizes, into=s.output_name)
    return "its sizes are constants"


def _top_k(s: Site) -> str | None:
    """The number is an attribute before opset 10."""
    if s.source >= 10:
        return None
    s.again(s.data, s.integers([s.attr("k")]), **s.settings("k"))
    return "k is an input"


def _scatter(s: Site) -> str | None:
    """ScatterElements under the name it had before opset 11."""
    s.add("ScatterElements", *s.node.input, into=s.output_name, **s.settings())
    return "it has another name"


def _same(s: Site) -> str | None:
    s.alias = s.data
    return "it does nothing"


def _dropout(s: Site) -> str | None:
    """Nothing when a model runs, unless the file asks for training."""
    training = s.value(2) if s.given(2) else np.asarray(False)
    if training is None or training.any() or s.output(1):
        return None
    s.alias = s.data
    return "it does nothing"


RULES: dict[str, Rule] = {
    "Dropout": _dropout,
    "Expand": _expand,
    "Flatten": _flatten,
    "Identity": _same,
    "Pad": _pad,
    "Reshape": _reshape,
    "Scatter": _scatter,
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _squeeze,
    "TopK": _top_k,
    "Unsqueeze": _unsqueeze,
}
