"""Rules of the operators that contract axes: matrix products, Einsum, Attention."""

from __future__ import annotations

from collections.abc import Sequence
from string import ascii_uppercase

from onnx import NodeProto

from onnxsnp.graph.axes import Axis
from onnxsnp.graph.facts import Facts, Product, Role
from onnxsnp.graph.ir import attribute


def matmul(node: NodeProto, facts: Facts) -> None:
    """Batched matrix product, 1-D operands included."""
    left, right, output = node.input[0], node.input[1], node.output[0]
    a, b = facts.rank(left), facts.rank(right)
    inner_left, inner_right = (left, a - 1), (right, max(b - 2, 0))
    facts.same(inner_left, inner_right)
    out = facts.rank(output)
    if a > 1:
        facts.same((left, a - 2), (output, out - (2 if b > 1 else 1)))
    if b > 1:
        facts.same((right, b - 1), (output, out - 1))
    whole = out + (a == 1) + (b == 1)  # with the axes that vectors do not leave behind
    for name, rank in ((left, a), (right, b)):
        for index in range(rank - 2):
            target = whole - rank + index
            if facts.shapes[name][index] == facts.shapes[output][target]:
                facts.same((name, index), (output, target))
    _multiply(
        facts,
        left,
        right,
        inner_left,
        inner_right,
        (left, a - 2) if a > 1 else None,
        (right, b - 1) if b > 1 else None,
        output,
    )


def _multiply(
    facts: Facts,
    left: str,
    right: str,
    inner_left: Axis,
    inner_right: Axis,
    rows: Axis | None,
    columns: Axis | None,
    output: str,
) -> None:
    """Record what a matrix product is: a projection by a weight, or a product of two activations."""
    for name, inner, kept in ((right, inner_right, columns), (left, inner_left, rows)):
        if name in facts.weights:
            if kept is not None:
                facts.linear(name, inner[1], kept[1])
            else:
                facts.roles.append(Role("consumer", inner, facts.node))
            return
    if rows is not None and columns is not None:
        facts.products.append(Product(facts.node, inner_left, inner_right, rows, columns, output))


def gemm(node: NodeProto, facts: Facts) -> None:
    """Matrix product with optional transposes and a bias."""
    left, right, output = node.input[0], node.input[1], node.output[0]
    trans_a, trans_b = attribute(node, "transA", 0), attribute(node, "transB", 0)
    rows, inner_left = ((left, 1), (left, 0)) if trans_a else ((left, 0), (left, 1))
    inner_right, columns = ((right, 1), (right, 0)) if trans_b else ((right, 0), (right, 1))
    facts.same(inner_left, inner_right)
    facts.same(rows, (output, 0))
    facts.same(columns, (output, 1))
    _multiply(facts, left, right, inner_left, inner_right, rows, columns, output)
    if len(node.input) > 2 and node.input[2]:
        bias = node.input[2]
        shift = 2 - facts.rank(bias)
        for index in range(facts.rank(bias)):
            if facts.shapes[bias][index] == facts.shapes[output][index + shift]:
                facts.same((bias, index), (output, index + shift))


def einsum_terms(node: NodeProto, ranks: Sequence[int]) -> list[str] | None:
    """One letter per axis of each operand and the result of an Einsum; None where the result is implicit.

    Args:
        ranks: of the operands and the result. The axes that an ellipsis stands for get capital letters from the right,
            as they are broadcast.
    """
    equation = attribute(node, "equation", b"").decode().replace(" ", "")
    spare = [letter for letter in ascii_uppercase if letter not in equation]
    terms = equation.replace("->", ",").split(",")
    if "->" not in equation or len(terms) != len(ranks):
        return None
    found = []
    for term, rank in zip(terms, ranks, strict=True):
        hidden = rank - len(term.replace("...", ""))
        found.append(term.replace("...", "".join(spare[:hidden][::-1])))
    return found


def einsum(node: NodeProto, facts: Facts) -> None:
    """A plain product of two operands; anything else is frozen where it sums."""
    names = [*node.input, *node.output]
    equation = attribute(node, "equation", b"").decode().replace(" ", "")
    terms = einsum_terms(node, [facts.rank(name) for name in names])
    if terms is None or any(len(set(term)) != len(term) for term in terms):
        facts.freeze_all(names, f"einsum '{equation}' is not a plain product")
        return
    places: dict[str, list[Axis]] = {}
    for name, term in zip(names, terms, strict=True):
        for index, letter in enumerate(term):
            places.setdefault(letter, []).append((name, index))
    for axes in places.values():
        for axis in axes[1:]:
            if facts.size(axes[0]) == facts.size(axis):
                facts.same(axes[0], axis)
    result = terms[-1]
    inner = [letter for letter in places if letter not in result]
    if len(terms) != 3 or len(inner) != 1 or any(inner[0] not in term for term in terms[:2]):
        for letter in inner:
            facts.freeze(places[letter][0], f"summed over in einsum '{equation}'")
        return
    left, right = node.input
    own = [
        [letter for letter in term if letter not in other]
        for term, other in ((terms[0], terms[1]), (terms[1], terms[0]))
    ]
    at = {name: term.index for name, term in zip(names[:2], terms[:2], strict=True)}
    _multiply(
        facts,
        left,
        right,
        (left, at[left](inner[0])),
        (right, at[right](inner[0])),
        (left, at[left](own[0][0])) if own[0] else None,
        (right, at[right](own[1][0])) if own[1] else None,
        node.output[0],
    )


def attention(node: NodeProto, facts: Facts) -> None:
    """ONNX Attention (opset 23): 4-D [B, H, S, d], or 3-D [B, S, H·d] with the head counts as attributes."""
    names = [name for name in [*node.input, *node.output] if name]
    if len([name for name in node.input[4:] if name]) or len([name for name in node.output[1:] if name]):
        facts.freeze_all(names, "Attention with a key/value cache or extra outputs")
        return
    heads_q, heads_kv = attribute(node, "q_num_heads"), attribute(node, "kv_num_heads")
    q, k, v, y = (
        _heads_apart(facts, name, heads, node.name)
        for name, heads in (
            (node.input[0], heads_q),
            (node.input[1], heads_kv),
            (node.input[2], heads_kv),
            (node.output[0], heads_q),
        )
    )
    facts.same(q[3], k[3])
    facts.same(v[3], y[3])
    facts.same(k[2], v[2])
    facts.same(q[2], y[2])
    facts.same(k[1], v[1])
    facts.same(q[1], y[1])
    for tensor in (k, v, y):
        facts.same(q[0], tensor[0])
    if facts.size(q[1]) == facts.size(k[1]):
        facts.same(q[1], k[1])
    else:
        facts.freeze(q[1], "query heads share key heads")
        facts.freeze(k[1], "query heads share key heads")
    facts.freeze(k[2], "softmax runs over it")
    if len(node.input) > 3 and node.input[3]:
        mask, target = node.input[3], (q[0], q[1], q[2], k[2])
        for index in range(facts.rank(mask)):
            facing = target[4 - facts.rank(mask) + index]
            if facts.size((mask, index)) == facts.size(facing):
                facts.same((mask, index), facing)
    facts.products.append(Product(node.name, q[3], k[3], q[2], k[2], ""))
    facts.products.append(Product(node.name, k[2], v[2], q[2], v[3], node.output[0]))


def _heads_apart(facts: Facts, name: str, heads: int | None, node: str) -> tuple[Axis, Axis, Axis, Axis]:
    """Axes (batch, heads, tokens, head size) of an Attention operand, whichever of the two layouts it has."""
    if facts.rank(name) == 4:
        return (name, 0), (name, 1), (name, 2), (name, 3)
    count = int(heads or 1)
    head, size = (f"{node}|{name}", 0), (f"{node}|{name}", 1)
    facts.virtual[head] = count
    facts.virtual[size] = facts.shapes[name][2] // count
    facts.regroup([(name, 2)], [head, size])
    return (name, 0), head, (name, 1), size
