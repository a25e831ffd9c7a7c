"""Gradients of operators that act entry by entry, with numpy's broadcasting where they have several inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import pi, sqrt

from onnx import NodeProto

from onnxsnp.graph.ir import attribute
from onnxsnp.recovery.gradients.tape import NoRuleError, Tape

Slope = Callable[[NodeProto, str, Tape], str]


def _shape(node: NodeProto, t: Tape) -> tuple[int, ...]:
    return t.shapes[node.output[0]]


# ------------------------------------------------------------------------------------------------------ several inputs


def add(node: NodeProto, grads: Sequence[str], t: Tape) -> None:
    for name in node.input:
        t.give(name, grads[0], _shape(node, t))


def sub(node: NodeProto, grads: Sequence[str], t: Tape) -> None:
    left, right = node.input
    t.give(left, grads[0], _shape(node, t))
    if t.wants(right):
        t.give(right, t.add("Neg", grads[0]), _shape(node, t))


def mul(node: NodeProto, grads: Sequence[str], t: Tape) -> None:
    left, right = node.input
    for name, other in ((left, right), (right, left)):
        if t.wants(name):
            t.give(name, t.add("Mul", grads[0], other), _shape(node, t))


def div(node: NodeProto, grads: Sequence[str], t: Tape) -> None:
    left, right = node.input
    share = t.add("Div", grads[0], right)
    t.give(left, share, _shape(node, t))
    if t.wants(right):
        t.give(right, t.add("Neg", t.add("Mul", share, node.output[0])), _shape(node, t))


def remainder(node: NodeProto, grads: Sequence[str], t: Tape) -> None:
    """a − b ⌊a / b⌋: a moves it as much as itself."""
    if t.wants(node.input[1]):
        raise NoRuleError("what it divides by is computed from parameters")
    t.give(node.input[0], grads[0], _shape(node, t))


def power(node: NodeProto, grads: Sequence[str], t: Tape) -> None:
    """∂(xᵏ)/∂x = k xᵏ⁻¹ for a constant k."""
    base, exponent = node.input
    value = t.held.get(exponent)
    if t.wants(exponent) or value is None or value.size != 1:
        raise NoRuleError("its exponent is not one constant number")
    order = float(value.reshape(-1)[0])
    slope = base if order == 2 else t.add("Pow", base, t.constant(order - 1))
    t.give(base, t.add("Mul", grads[0], t.scaled(slope, order)), _shape(node, t))


def where(node: NodeProto, grads: Sequence[str], t: Tape) -> None:
    condition, chosen, other = node.input
    nothing = t.constant(0.0)
    if t.wants(chosen):
        t.give(chosen, t.add("Where", condition, grads[0], nothing), _shape(node, t))
    if t.wants(other):
        t.give(other, t.add("Where", condition, nothing, grads[0]), _shape(node, t))


def extreme(node: NodeProto, grads: Sequence[str], t: Tape) -> None:
    """Max, Min: the gradient goes to the input that is the result."""
    for name in node.input:
        if t.wants(name):
            t.give(name, t.mask(t.add("Equal", name, node.output[0]), grads[0]), _shape(node, t))


def clip(node: NodeProto, grads: Sequence[str], t: Tape) -> None:
    if any(t.wants(name) for name in node.input[1:]):
        raise NoRuleError("its bounds are computed from parameters")
    t.give(node.input[0], t.mask(t.add("Equal", node.input[0], node.output[0]), grads[0]))


def prelu(node: NodeProto, grads: Sequence[str], t: Tape) -> None:
    data, slope = node.input
    below = t.add("Less", data, t.constant(0.0))
    if t.wants(data):
        t.give(data, t.add("Where", below, t.add("Mul", grads[0], slope), grads[0]))
    if t.wants(slope):
        t.give(slope, t.mask(below, t.add("Mul", grads[0], data)), _shape(node, t))


# ----------------------------------------------------------------------------------------------------------- one input


def unary(slope: Slope) -> Callable[[NodeProto, Sequence[str], Tape], None]:
    """The rule of y = f(x) from what computes f'(x)."""

    def rule(node: NodeProto, grads: Sequence[str], t: Tape) -> None:
        t.give(node.input[0], t.add("Mul", grads[0], slope(node, node.input[0], t)))

    return rule


def negative(node: NodeProto, grads: Sequence[str], t: Tape) -> None:
    t.give(node.input[0], t.add("Neg", grads[0]))


def relu(node: NodeProto, grads: Sequence[str], t: Tape) -> None:
    t.give(node.input[0], t.mask(t.add("Greater", node.output[0], t.constant(0.0)), grads[0]))


def square_root(node: NodeProto, grads: Sequence[str], t: Tape) -> None:
    t.give(node.input[0], t.add("Div", t.scaled(grads[0], 0.5), node.output[0]))


def logarithm(node: NodeProto, grads: Sequence[str], t: Tape) -> None:
    t.give(node.input[0], t.add("Div", grads[0], node.input[0]))


def _sign(node: NodeProto, x: str, t: Tape) -> str:
    return t.add("Sign", x)


def _itself(node: NodeProto, x: str, t: Tape) -> str:
    return node.output[0]


def _reciprocal(node: NodeProto, x: str, t: Tape) -> str:
    return t.add("Neg", t.add("Mul", node.output[0], node.output[0]))


def _cosine(node: NodeProto, x: str, t: Tape) -> str:
    return t.add("Cos", x)


def _minus_sine(node: NodeProto, x: str, t: Tape) -> str:
    return t.add("Neg", t.add("Sin", x))


def _tanh(node: NodeProto, x: str, t: Tape) -> str:
    return _one_minus_square(node.output[0], t)


def _one_minus_square(y: str, t: Tape) -> str:
    return t.add("Sub", t.constant(1.0), t.add("Mul", y, y))


def _sigmoid(node: NodeProto, x: str, t: Tape) -> str:
    y = node.output[0]
    return t.add("Mul", y, t.add("Sub", t.constant(1.0), y))


def _bell(square: str, t: Tape) -> str:
    """exp(−s)."""
    return t.add("Exp", t.add("Neg", square))


def _erf(node: NodeProto, x: str, t: Tape) -> str:
    return t.scaled(_bell(t.add("Mul", x, x), t), 2 / sqrt(pi))


def _gelu(node: NodeProto, x: str, t: Tape) -> str:
    """Φ(x) + x φ(x), or the derivative of the approximation with tanh (arXiv 1606.08415)."""
    if attribute(node, "approximate", b"none") == b"tanh":
        square = t.add("Mul", x, x)
        one = t.constant(1.0)
        inner = t.scaled(t.add("Mul", x, t.add("Add", one, t.scaled(square, 0.044715))), sqrt(2 / pi))
        bent = t.add("Tanh", inner)
        steep = t.scaled(t.add("Add", one, t.scaled(square, 3 * 0.044715)), 0.5 * sqrt(2 / pi))
        rest = t.add("Mul", t.add("Mul", x, _one_minus_square(bent, t)), steep)
        return t.add("Add", t.scaled(t.add("Add", bent, one), 0.5), rest)
    unit = t.scaled(x, sqrt(0.5))
    density = _bell(t.add("Mul", unit, unit), t)
    share = t.add("Add", t.scaled(t.add("Erf", unit), 0.5), t.constant(0.5))
    return t.add("Add", share, t.add("Mul", t.scaled(x, 1 / sqrt(2 * pi)), density))


def _swish(node: NodeProto, x: str, t: Tape) -> str:
    """y = x σ(αx): y' = σ + α y (1 − σ)."""
    alpha = float(attribute(node, "alpha", 1.0))
    share = t.add("Sigmoid", t.scaled(x, alpha))
    rest = t.add("Mul", t.scaled(node.output[0], alpha), t.add("Sub", t.constant(1.0), share))
    return t.add("Add", share, rest)


def _hard_sigmoid(node: NodeProto, x: str, t: Tape) -> str:
    return _hard_slope(x, attribute(node, "alpha", 0.2), attribute(node, "beta", 0.5), t)


def _hard_slope(x: str, alpha: float, beta: float, t: Tape) -> str:
    """α where 0 < αx + β < 1."""
    line = t.add("Add", t.scaled(x, alpha), t.constant(beta))
    inside = t.add("And", t.add("Greater", line, t.constant(0.0)), t.add("Less", line, t.constant(1.0)))
    return t.add("Where", inside, t.constant(alpha), t.constant(0.0))


def _hard_swish(node: NodeProto, x: str, t: Tape) -> str:
    """y = x h(x) with h = clip(x/6 + ½, 0, 1)."""
    share = t.add("HardSigmoid", x, alpha=1 / 6, beta=0.5)
    return t.add("Add", share, t.add("Mul", x, _hard_slope(x, 1 / 6, 0.5, t)))


def _softplus(node: NodeProto, x: str, t: Tape) -> str:
    return t.add("Sigmoid", x)


def _leaky(node: NodeProto, x: str, t: Tape) -> str:
    slope = t.constant(attribute(node, "alpha", 0.01))
    return t.add("Where", t.add("Less", x, t.constant(0.0)), slope, t.constant(1.0))


def _elu(node: NodeProto, x: str, t: Tape) -> str:
    """1 above 0, y + α below."""
    below = t.add("Add", node.output[0], t.constant(attribute(node, "alpha", 1.0)))
    return t.add("Where", t.add("Less", x, t.constant(0.0)), below, t.constant(1.0))


RULES = {
    "Abs": unary(_sign),
    "Add": add,
    "Clip": clip,
    "Cos": unary(_minus_sine),
    "Div": div,
    "Elu": unary(_elu),
    "Erf": unary(_erf),
    "Exp": unary(_itself),
    "Gelu": unary(_gelu),
    "HardSigmoid": unary(_hard_sigmoid),
    "HardSwish": unary(_hard_swish),
    "LeakyRelu": unary(_leaky),
    "Log": logarithm,
    "Max": extreme,
    "Min": extreme,
    "Mod": remainder,
    "Mul": mul,
    "Neg": negative,
    "PRelu": prelu,
    "Pow": power,
    "Reciprocal": unary(_reciprocal),
    "Relu": relu,
    "Sigmoid": unary(_sigmoid),
    "Sin": unary(_cosine),
    "Softplus": unary(_softplus),
    "Sqrt": square_root,
    "Sub": sub,
    "Sum": add,
    "Swish": unary(_swish),
    "Tanh": unary(_tanh),
    "Where": where,
}
