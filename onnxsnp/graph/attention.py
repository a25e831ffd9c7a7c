"""Attention sites: a product of two activations before a softmax, and one after it.

Nothing is recognised by name or operator order. From each Softmax the walk goes back through operators that leave
scores what they are (scale, mask, bias, casts, regroupings) or mix heads to the product of query and key, and forward
to the product with the value. The axis algebra then says which factors those products contract and keep.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace

from onnx import NodeProto

from onnxsnp.graph.axes import Axis
from onnxsnp.graph.dependency import Dependencies
from onnxsnp.graph.facts import Product
from onnxsnp.graph.ir import Graph

TRANSPARENT = {  # what may stand between a product and its softmax
    "Add",
    "Sub",
    "Mul",
    "Div",
    "Where",
    "Cast",
    "Identity",
    "Dropout",
    "Reshape",
    "Clip",
    "Max",
    "Min",
    "Squeeze",
    "Unsqueeze",
    "Transpose",
    "IsNaN",
    "Concat",
    "Expand",
    "ScatterND",
}


@dataclass(frozen=True)
class Site:
    """One attention module.

    Attributes:
        name: its scope in the graph, as far as node names tell.
        query, key, value: (tensor, axis) of the contracted or kept factor in the operand of the product.
        query_tokens, key_tokens: the token axes of query and key in the same operands.
        score: name of the node that multiplies query and key.
        mix: name of the node that multiplies probabilities and value.
        mixed: factors that projections on the way from score to mix read and emit: heads that talk to each other.
    """

    name: str
    query: Axis
    key: Axis
    value: Axis
    query_tokens: Axis
    key_tokens: Axis
    score: str
    mix: str
    mixed: tuple[int, ...] = ()


@dataclass(frozen=True)
class Unrecognised:
    """A softmax that is not part of a recognised attention, and why."""

    node: str
    reason: str


def find_sites(graph: Graph, dependencies: Dependencies) -> tuple[list[Site], list[Unrecognised]]:
    """Find attention sites in graph order, and the softmaxes that are not part of one."""
    walk = _Walk(graph, dependencies)
    sites: list[Site] = []
    unknown: list[Unrecognised] = []
    for node in graph.nodes:
        if node.op_type == "Attention" and len(walk.products.get(node.name, [])) == 2:
            score, mix = walk.products[node.name]
            sites.append(
                Site("", score.left, score.right, mix.columns, score.rows, score.columns, node.name, node.name)
            )
        elif node.op_type == "Softmax":
            before, after = walk.backward(node.input[0]), walk.forward(node.output[0])
            if len(before) == 1 and len(after) == 1:
                sites.append(_site(dependencies, node, before[0], after[0]))
            elif node.output[0] not in graph.outputs:
                side, count = ("before", len(before)) if len(before) != 1 else ("after", len(after))
                what = f"{count} products of two activations {side} the softmax, expected 1"
                unknown.append(Unrecognised(node.name, f"not attention: {what}"))
    names = _scopes([site.score for site in sites])
    return [replace(site, name=name) for name, site in zip(names, sites, strict=True)], unknown


def _site(dependencies: Dependencies, softmax: NodeProto, before: _Met, after: _Met) -> Site:
    """Tell query from key by which token axis the softmax runs over, and value from probabilities by reachability."""
    score, mix = before.product, after.product
    rank = dependencies.facts.rank(softmax.input[0])
    axis = next(
        (
            freeze.axis
            for freeze in dependencies.facts.freezes
            if freeze.node == softmax.name and freeze.axis[0] == softmax.input[0]
        ),
        (softmax.input[0], rank - 1),
    )
    over = set(dependencies.atoms(*axis))
    rows, columns = (bool(over & set(dependencies.atoms(*side))) for side in (score.rows, score.columns))
    # in self-attention both token axes are one factor, and only the position tells them apart
    key_is_left = rows and (not columns or axis[1] == rank - 2)
    query, key = (score.right, score.left) if key_is_left else (score.left, score.right)
    query_tokens, key_tokens = (score.columns, score.rows) if key_is_left else (score.rows, score.columns)
    value = mix.rows if mix.right[0] == after.through else mix.columns
    mixed = tuple(sorted(before.mixed | after.mixed))
    return Site("", query, key, value, query_tokens, key_tokens, score.node, mix.node, mixed)


@dataclass(frozen=True)
class _Met:
    """A product met on a walk from a softmax.

    Attributes:
        through: the operand (before a softmax: the output) that the walk came through.
        mixed: the factors that projections on the way read or emit.
    """

    product: Product
    through: str
    mixed: frozenset[int]


class _Walk:
    """Walks from a softmax to the products of two activations around it.

    The way leads through operators that leave scores what they are, and through projections of a factor that is no axis
    of the product (its heads).
    """

    def __init__(self, graph: Graph, dependencies: Dependencies) -> None:
        self._graph, self._deps = graph, dependencies
        self._producers, self._readers = graph.producers(), graph.readers()
        self.products: dict[str, list[Product]] = {}
        for product in dependencies.facts.products:
            self.products.setdefault(product.node, []).append(product)
        self._projected: dict[str, frozenset[int]] = {}
        for role in dependencies.facts.roles:
            held = self._projected.get(role.node, frozenset())
            self._projected[role.node] = held.union(dependencies.atoms(*role.axis))

    def backward(self, tensor: str) -> list[_Met]:
        """The products whose results reach a tensor."""
        return self._run(tensor, self._before, lambda node: [name for name in node.input if name])

    def forward(self, tensor: str) -> list[_Met]:
        """The products that read what is made of a tensor."""
        return self._run(tensor, self._after, lambda node: list(node.output))

    def _before(self, tensor: str) -> list[NodeProto]:
        return [self._producers[tensor]] if tensor in self._producers else []

    def _after(self, tensor: str) -> list[NodeProto]:
        return [node for node, _slot in self._readers.get(tensor, [])]

    def _run(
        self, tensor: str, near: Callable[[str], list[NodeProto]], onward: Callable[[NodeProto], list[str]]
    ) -> list[_Met]:
        found: list[_Met] = []
        waiting: deque[tuple[str, frozenset[int]]] = deque([(tensor, frozenset())])
        seen: set[str] = set()
        while waiting:
            name, mixed = waiting.pop()
            for node in near(name):
                if node.name in seen:
                    continue
                seen.add(node.name)
                if node.name in self.products:
                    product = self.products[node.name][0]
                    if not mixed & self._axes(product):
                        found.append(_Met(product, name, mixed))
                elif node.op_type in TRANSPARENT or node.name in self._projected:
                    more = mixed | self._projected.get(node.name, frozenset())
                    new = [(other, more) for other in onward(node) if other not in self._graph.weights]
                    (waiting.extendleft if more else waiting.extend)(new)  # ways without projections first
        return found

    def _axes(self, product: Product) -> set[int]:
        """The factors of a product's rows, columns and contracted axis."""
        axes = (product.left, product.right, product.rows, product.columns)
        return {atom for axis in axes for atom in self._deps.factors.atoms(axis)}


def _scopes(nodes: list[str]) -> list[str]:
    """Readable, distinct names from node names such as `/blocks/blocks.3/attn/MatMul`."""
    names = []
    for index, node in enumerate(nodes):
        parts = [part for part in re.split(r"[/]", node)[:-1] if part]
        short = [
            part
            for position, part in enumerate(parts)
            if position + 1 == len(parts) or not parts[position + 1].startswith(part + ".")
        ]
        names.append(".".join(short) if short else f"attention.{index}")
    return names if len(set(names)) == len(names) else [f"attention.{index}" for index in range(len(nodes))]
