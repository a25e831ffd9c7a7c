"""Gradients of products. Whatever is multiplied by a weight is one matrix [rows, channels], so that the weight's
gradient is one large product and not a sum of small ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from onnx import NodeProto

from onnxsnp.graph.ir import attribute
from onnxsnp.recovery.gradients.tape import NoRuleError, Tape


def matmul(node: NodeProto, grads: Sequence[str], t: Tape) -> None:
    left, right = node.input
    a, b = t.shapes[left], t.shapes[right]
    if len(a) == 1 or len(b) == 1:
        _vectors(node, grads[0], t)
    elif len(b) == 2:
        _linear(node, grads[0], t)
    else:
        out = t.shapes[node.output[0]]
        if t.wants(left):
            t.give(left, t.add("MatMul", grads[0], _swapped(right, len(b), t)), (*out[:-2], *a[-2:]))
        if t.wants(right):
            t.give(right, t.add("MatMul", _swapped(left, len(a), t), grads[0]), (*out[:-2], *b[-2:]))


def _swapped(name: str, rank: int, t: Tape) -> str:
    return t.transpose(name, [*range(rank - 2), rank - 1, rank - 2])


def _linear(node: NodeProto, grad: str, t: Tape) -> None:
    """Y = X W, X of any rank."""
    left, right = node.input
    shape, (fan_in, fan_out) = t.shapes[left], t.shapes[right]
    rows = prod(shape[:-1])
    flat = t.reshape(grad, [rows, fan_out])
    if t.wants(left):
        t.give(left, t.reshape(t.add("Gemm", flat, right, transB=1), shape))
    if t.wants(right):
        t.give(right, t.add("Gemm", t.reshape(left, [rows, fan_in]), flat, transA=1))


def _vectors(node: NodeProto, grad: str, t: Tape) -> None:
    """A vector on either side is a matrix of one row or column."""
    left, right = node.input
    a, b = t.shapes[left], t.shapes[right]
    wide = (1, *a) if len(a) == 1 else a
    tall = (*b, 1) if len(b) == 1 else b
    batch = wide[:-2] if len(wide) >= len(tall) else tall[:-2]
    flat = t.reshape(grad, [*batch, wide[-2], tall[-1]])
    if t.wants(left):
        part = t.add("MatMul", flat, _swapped(t.reshape(right, tall), len(tall), t))
        if len(a) > 1:
            t.give(left, part, (*batch, *wide[-2:]))
        else:
            t.give(left, t.unbroadcast(part, (*batch, *wide[-2:]), a))
    if t.wants(right):
        part = t.add("MatMul", _swapped(t.reshape(left, wide), len(wide), t), flat)
        if len(b) > 1:
            t.give(right, part, (*batch, *tall[-2:]))
        else:
            t.give(right, t.reshape(t.unbroadcast(part, (*batch, *tall[-2:]), tall), b))


def gemm(node: NodeProto, grads: Sequence[str], t: Tape) -> None:
    """Y = α A' B' + β C."""
    left, right = node.input[:2]
    grad = grads[0]
    turned_a, turned_b = attribute(node, "transA", 0), attribute(node, "transB", 0)
    alpha = attribute(node, "alpha", 1.0)
    if t.wants(left):
        if turned_a:
            t.give(left, t.add("Gemm", right, grad, transA=turned_b, transB=1, alpha=alpha))
        else:
            t.give(left, t.add("Gemm", grad, right, transB=1 - turned_b, alpha=alpha))
    if t.wants(right):
        if turned_b:
            t.give(right, t.add("Gemm", grad, left, transA=1, transB=turned_a, alpha=alpha))
        else:
            t.give(right, t.add("Gemm", left, grad, transA=1 - turned_a, alpha=alpha))
    if len(node.input) > 2 and t.wants(node.input[2]):
        t.give(node.input[2], t.scaled(grad, attribute(node, "beta", 1.0)), t.shapes[node.output[0]])


def einsum(node: NodeProto, grads: Sequence[str], t: Tape) -> None:
    """The same sum with the gradient in the place of one operand; what that operand alone has is repeated."""
    equation = attribute(node, "equation").decode().replace(" ", "")
    terms, _, out = equation.partition("->")
    letters = terms.split(",")
    if "..." in equation or not _ or any(len(set(term)) < len(term) for term in [*letters, out]):
        raise NoRuleError(f"its equation is '{equation}'")
    sizes = {
        letter: size
        for term, name in zip(letters, node.input, strict=True)
        for letter, size in zip(term, t.shapes[name], strict=True)
    }
    for slot, name in enumerate(node.input):
        if not t.wants(name):
            continue
        others = [index for index in range(len(letters)) if index != slot]
        known = set(out).union(*(letters[index] for index in others))
        kept = "".join(letter for letter in letters[slot] if letter in known)
        spelled = ",".join([out, *(letters[index] for index in others)]) + "->" + kept
        part = t.add("Einsum", grads[0], *(node.input[index] for index in others), equation=spelled)
        if kept != letters[slot]:
            part = t.reshape(part, [sizes[letter] if letter in known else 1 for letter in letters[slot]])
            part = t.add("Expand", part, t.integers(t.shapes[name]))
        t.give(name, part)


RULES = {"Einsum": einsum, "Gemm": gemm, "MatMul": matmul}
