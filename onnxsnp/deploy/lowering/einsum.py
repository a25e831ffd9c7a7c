"""Einsum as Transpose, Reshape and MatMul: importers below 10 take no ellipsis, diagonal, broadcast or capital letter.

Written so for every target: what TensorRT fuses (attention) it knows by its matrix products.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from onnxsnp.deploy.lowering.site import Rule, Site


@dataclass
class _Term:
    """A tensor, the label of each of its axes, and their sizes."""

    tensor: str
    labels: list[str]
    sizes: dict[str, int]

    def dims(self, labels: Sequence[str]) -> list[int]:
        return [self.sizes[label] for label in labels]


def _einsum(s: Site) -> str | None:
    """Operands are multiplied from left to right; each label that nothing reads any more is summed over."""
    given, wanted = _labels(s)
    terms = [_operand(s, slot, labels) for slot, labels in enumerate(given)]
    result = terms[0]
    for number, term in enumerate(terms[1:], start=1):
        later = {label for rest in terms[number + 1 :] for label in rest.labels} | set(wanted)
        result = _product(s, result, term, later)
    result = _summed(s, result, set(wanted))
    result = _broadcast(s, result, wanted)
    s.alias = _ordered(s, result, wanted).tensor
    return "as matrix products"


def _labels(s: Site) -> tuple[list[list[str]], list[str]]:
    """Labels of the axes of operands and result; those behind an ellipsis are numbered from the last one."""
    equation = s.text("equation", "").replace(" ", "")
    left, arrow, right = equation.partition("->")
    terms = left.split(",")
    if not arrow:  # the labels that occur once, in alphabetical order, behind the ellipsis
        letters = [letter for letter in left if letter.isalpha()]
        single = sorted(letter for letter in set(letters) if letters.count(letter) == 1)
        right = ("..." if "..." in left else "") + "".join(single)
    hidden = [s.rank(slot) - len(term.replace("...", "")) for slot, term in enumerate(terms)]
    given = [_spelled(term, count) for term, count in zip(terms, hidden, strict=True)]
    widest = max((count for term, count in zip(terms, hidden, strict=True) if "..." in term), default=0)
    return given, _spelled(right, widest)


def _spelled(term: str, hidden: int) -> list[str]:
    before, dots, after = term.partition("...")
    middle = [f"{index}" for index in range(hidden, 0, -1)] if dots else []
    return [*before, *middle, *after]


def _operand(s: Site, slot: int, labels: list[str]) -> _Term:
    """An operand without axes that are broadcast or repeated."""
    largest: dict[str, int] = {}
    for number, others in enumerate(_labels(s)[0]):
        for label, size in zip(others, s.shape(number), strict=True):
            largest[label] = max(largest.get(label, 1), size)
    sizes = s.shape(slot)
    tensor = str(s.node.input[slot])
    kept = [axis for axis, label in enumerate(labels) if sizes[axis] == largest[label]]
    if len(kept) < len(labels):  # of size 1 where another operand has more
        tensor = s.reshape(tensor, [sizes[axis] for axis in kept])
    term = _Term(tensor, [labels[axis] for axis in kept], largest)
    while len(set(term.labels)) < len(term.labels):
        term = _diagonal(s, term)
    return term


def _diagonal(s: Site, term: _Term) -> _Term:
    """The first repeated label once: 0 off the diagonal, summed over one of both axes."""
    label = next(label for label in term.labels if term.labels.count(label) > 1)
    first, second = [axis for axis, other in enumerate(term.labels) if other == label][:2]
    spread = [1] * len(term.labels)
    spread[first] = spread[second] = term.sizes[label]
    unit = np.eye(term.sizes[label], dtype=bool).reshape(spread)
    chosen = s.add("Where", s.constant(unit), term.tensor, s.constant(np.asarray(0, s.dtype())))
    left = [other for axis, other in enumerate(term.labels) if axis != second]
    return _Term(s.reduce("ReduceSum", chosen, [second], keepdims=False), left, term.sizes)


def _summed(s: Site, term: _Term, wanted: set[str]) -> _Term:
    axes = [axis for axis, label in enumerate(term.labels) if label not in wanted]
    if not axes:
        return term
    left = [label for label in term.labels if label in wanted]
    return _Term(s.reduce("ReduceSum", term.tensor, axes, keepdims=False), left, term.sizes)


def _product(s: Site, a: _Term, b: _Term, later: set[str]) -> _Term:
    """Labels of both that are read later run along (batch), the others of both are summed over (MatMul)."""
    a, b = _summed(s, a, later | set(b.labels)), _summed(s, b, later | set(a.labels))
    shared = [label for label in a.labels if label in b.labels]
    batch = [label for label in shared if label in later]
    inner = [label for label in shared if label not in later]
    rows = [label for label in a.labels if label not in shared]
    columns = [label for label in b.labels if label not in shared]
    sizes = {**a.sizes, **b.sizes}
    left, right = _ordered(s, a, [*batch, *rows, *inner]), _ordered(s, b, [*batch, *inner, *columns])
    along, height, width = a.dims(batch), prod(a.dims(rows)), prod(b.dims(columns))
    matrices = [
        _shaped(s, left, [*along, height, prod(a.dims(inner))]),
        _shaped(s, right, [*along, prod(a.dims(inner)), width]),
    ]
    outer = s.add("MatMul" if inner else "Mul", *matrices)
    labels = [*batch, *rows, *columns]
    flat = [*along, height, width]
    full = [sizes[label] for label in labels]
    return _Term(outer if full == flat else s.reshape(outer, full), labels, sizes)


def _shaped(s: Site, term: _Term, sizes: list[int]) -> str:
    return term.tensor if term.dims(term.labels) == sizes else s.reshape(term.tensor, sizes)


def _ordered(s: Site, term: _Term, labels: Sequence[str]) -> _Term:
    order = [term.labels.index(label) for label in labels]
    if order == sorted(order):
        return term
    return _Term(s.add("Transpose", term.tensor, perm=order), list(labels), term.sizes)


def _broadcast(s: Site, term: _Term, wanted: list[str]) -> _Term:
    """Labels of the result that only had size 1, or no operand at all, come back with size 1."""
    missing = [label for label in wanted if label not in term.labels]
    if not missing:
        return term
    sizes = {**term.sizes, **dict.fromkeys(missing, 1)}
    labels = [*missing, *term.labels]
    return _Term(s.reshape(term.tensor, [sizes[label] for label in labels]), labels, sizes)


RULES: dict[str, Rule] = {"Einsum": _einsum}
