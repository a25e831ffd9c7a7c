"""Activations spelled out where the importer has none of that name."""

from __future__ import annotations

from math import pi, sqrt

from onnxsnp.deploy.lowering.site import Rule, Site


def _gelu(s: Site) -> str | None:
    """x Φ(x), with Φ through erf, or approximated through tanh (arXiv 1606.08415)."""
    if s.takes("Gelu"):
        return None
    if s.text("approximate", "none") == "tanh":
        cube = s.add("Mul", s.add("Mul", s.data, s.data), s.data)
        inner = s.add("Add", s.data, s.add("Mul", cube, s.number(0.044715)))
        bent = s.add("Tanh", s.add("Mul", inner, s.number(sqrt(2 / pi))))
    else:
        bent = s.add("Erf", s.add("Div", s.data, s.number(sqrt(2))))
    twice = s.add("Mul", s.data, s.add("Add", bent, s.number(1.0)))
    s.add("Mul", twice, s.number(0.5), into=s.output_name)
    return "the importer has no Gelu"


def _swish(s: Site) -> str | None:
    """x σ(α x)."""
    if s.takes("Swish"):
        return None
    alpha = s.attr("alpha", 1.0)
    inner = s.data if alpha == 1.0 else s.add("Mul", s.data, s.number(alpha))
    s.add("Mul", s.data, s.add("Sigmoid", inner), into=s.output_name)
    return "the importer has no Swish"


def _hard_swish(s: Site) -> str | None:
    """x · max(0, min(1, x / 6 + 1/2))."""
    if s.takes("HardSwish"):
        return None
    s.add("Mul", s.data, s.add("HardSigmoid", s.data, alpha=1 / 6, beta=0.5), into=s.output_name)
    return "the importer has no HardSwish"


def _mish(s: Site) -> str | None:
    """x tanh(ln(1 + eˣ)) (arXiv 1908.08681)."""
    if s.takes("Mish"):
        return None
    s.add("Mul", s.data, s.add("Tanh", s.add("Softplus", s.data)), into=s.output_name)
    return "the importer has no Mish"


def _shrink(s: Site) -> str | None:
    """x − bias above λ, x + bias below −λ, else 0."""
    if s.takes("Shrink"):
        return None
    limit, bias = s.attr("lambd", 0.5), s.attr("bias", 0.0)
    above = s.add("Where", s.add("Greater", s.data, s.number(limit)), s.add("Sub", s.data, s.number(bias)), s.number(0))
    below = s.add("Add", s.data, s.number(bias))
    s.add("Where", s.add("Less", s.data, s.number(-limit)), below, above, into=s.output_name)
    return "the importer has no Shrink"


def _clip(s: Site) -> str | None:
    """Bounds are attributes before opset 11 and inputs since."""
    if s.source >= 11:
        return None
    bounds = [s.attr("min"), s.attr("max")]
    given = ["" if bound is None else s.number(bound) for bound in bounds]
    while given and not given[-1]:
        given.pop()
    s.again(s.data, *given)
    return "bounds are inputs"


def _softmax(s: Site) -> str | None:
    """Before opset 13 over all axes from `axis` (1) on, as of a matrix; since then over one axis (-1)."""
    if s.source >= 13:
        return None
    rank = s.rank()
    axis = s.attr("axis", 1) % max(rank, 1)
    if axis == rank - 1:
        s.again(s.data, axis=-1)
        return "the meaning of its axis before opset 13"
    sizes = s.shape()
    rows = 1
    for size in sizes[:axis]:
        rows *= size
    flat = s.add(s.node.op_type, s.reshape(s.data, [rows, -1]), axis=-1)
    s.reshape(flat, sizes, into=s.output_name)
    return "the meaning of its axis before opset 13"


RULES: dict[str, Rule] = {
    "Clip": _clip,
    "Gelu": _gelu,
    "HardSwish": _hard_swish,
    "Hardmax": _softmax,
    "LogSoftmax": _softmax,
    "Mish": _mish,
    "Shrink": _shrink,
    "Softmax": _softmax,
    "Swish": _swish,
}
