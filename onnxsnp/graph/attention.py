"""Attention sites: a product of two activations before a softmax, and one after it.

Nothing is recognised by name or operator order. From each Softmax the walk goes back through operators that leave
scores what they are (scale, mask, bias, casts, regroupings) to the product of query and key, and forward to the product
with the value. The axis algebra then says which factors those products contract and keep.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from onnx import NodeProto

from onnxsnp.graph.axes import Axis
from onnxsnp.graph.dependency import Dependencies
from onnxsnp.graph.facts import Product
from onnxsnp.graph.ir import Graph

_TRANSPARENT = {
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
    """

    name: str
    query: Axis
    key: Axis
    value: Axis
    query_tokens: Axis
    key_tokens: Axis
    score: str
    mix: str


@dataclass(frozen=True)
class Unrecognised:
    """A softmax that is not part of a recognised attention, and why."""

    node: str
    reason: str


def find_sites(graph: Graph, dependencies: Dependencies) -> tuple[list[Site], list[Unrecognised]]:
    """Find attention sites in graph order, and the softmaxes that are not part of one."""
    products: dict[str, list[Product]] = {}
    for product in dependencies.facts.products:
        products.setdefault(product.node, []).append(product)
    producers, readers = graph.producers(), graph.readers()
    sites: list[Site] = []
    unknown: list[Unrecognised] = []
    for node in graph.nodes:
        if node.op_type == "Attention" and len(products.get(node.name, [])) == 2:
            score, mix = products[node.name]
            sites.append(
                Site("", score.left, score.right, mix.columns, score.rows, score.columns, node.name, node.name)
            )
        elif node.op_type == "Softmax":
            before = _backward(graph, node, producers, products)
            after = _forward(graph, node, readers, products)
            if len(before) == 1 and len(after) == 1:
                sites.append(_site(dependencies, node, products[before[0]][0], products[after[0]][0], producers))
            elif node.output[0] not in graph.outputs:
                side = "before" if len(before) != 1 else "after"
                count = len(before if len(before) != 1 else after)
                unknown.append(
                    Unrecognised(node.name, f"{count} products of two activations {side} the softmax, expected 1")
                )
    names = _scopes([site.score for site in sites])
    return [Site(name, *_fields(site)) for name, site in zip(names, sites, strict=True)], unknown


def _fields(site: Site) -> tuple[Axis, Axis, Axis, Axis, Axis, str, str]:
    return site.query, site.key, site.value, site.query_tokens, site.key_tokens, site.score, site.mix


def _site(
    dependencies: Dependencies, softmax: NodeProto, score: Product, mix: Product, producers: dict[str, NodeProto]
) -> Site:
    """Tell query from key by which token axis the softmax runs over, and value from probabilities by reachability."""
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
    value_is_left = _reaches(mix.right[0], softmax.output[0], producers)
    value = mix.rows if value_is_left else mix.columns
    return Site("", query, key, value, query_tokens, key_tokens, score.node, mix.node)


def _reaches(tensor: str, source: str, producers: dict[str, NodeProto]) -> bool:
    """Whether `tensor` is computed from `source` through transparent operators."""
    stack, seen = [tensor], set()
    while stack:
        name = stack.pop()
        if name == source:
            return True
        node = producers.get(name)
        if node is not None and node.op_type in _TRANSPARENT and node.name not in seen:
            seen.add(node.name)
            stack.extend(node.input)
    return False


def _backward(
    graph: Graph, softmax: NodeProto, producers: dict[str, NodeProto], products: dict[str, list[Product]]
) -> list[str]:
    found: list[str] = []
    stack, seen = [softmax.input[0]], set()
    while stack:
        node = producers.get(stack.pop())
        if node is None or node.name in seen:
            continue
        seen.add(node.name)
        if node.name in products:
            found.append(node.name)
        elif node.op_type in _TRANSPARENT:
            stack.extend(name for name in node.input if name and name not in graph.weights)
    return found


def _forward(
    graph: Graph,
    softmax: NodeProto,
    readers: dict[str, list[tuple[NodeProto, int]]],
    products: dict[str, list[Product]],
) -> list[str]:
    found: list[str] = []
    stack, seen = [softmax.output[0]], set()
    while stack:
        for node, _slot in readers.get(stack.pop(), []):
            if node.name in seen:
                continue
            seen.add(node.name)
            if node.name in products:
                found.append(node.name)
            elif node.op_type in _TRANSPARENT:
                stack.extend(node.output)
    return found


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
