"""Scales of products of two activations, applied to an operand: where the target fuses attention.

TensorRT fuses an attention only if query or key is scaled before they are multiplied ("Fused Attention" in its
documentation), and many exporters write the scale behind the product. The numbers are the same up to rounding, and
fewer of them overflow fp16.
"""

from __future__ import annotations

from collections.abc import Mapping

from onnx import NodeProto

from onnxsnp.graph.ir import Graph, Namer


def scale_operands(graph: Graph, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """c·(A B) becomes (c·A) B, and (A B)/c becomes (A/c) B, in place; how many there were.

    Args:
        shapes: sizes of all tensors.
    """
    namer = Namer(graph.names())
    producers, readers = graph.producers(), graph.readers()
    place = {node.name: index for index, node in enumerate(graph.nodes)}
    count = 0
    for node in list(graph.nodes):
        found = scaled_product(graph, node, producers)
        if found is None:
            continue
        product, slot = found
        result, left = product.output[0], product.input[0]
        factor = graph.weights[node.input[1 - slot]]
        if len(readers[result]) > 1 or result in graph.outputs or factor.ndim > len(shapes[left]):
            continue
        scaled = namer(f"{node.name}.operand")
        product.output[0], node.output[0] = node.output[0], scaled
        node.input[slot], product.input[0] = left, scaled
        producers[product.output[0]], producers[scaled] = product, node
        first, second = place[product.name], place[node.name]
        graph.nodes[first], graph.nodes[second] = node, product
        place[product.name], place[node.name] = second, first
        count += 1
    return count


def scaled_product(graph: Graph, node: NodeProto, producers: Mapping[str, NodeProto]) -> tuple[NodeProto, int] | None:
    """The product of two activations that a node scales by a constant, and the slot the node reads it in."""
    if node.op_type not in ("Mul", "Div"):
        return None
    for slot in (0, 1) if node.op_type == "Mul" else (0,):
        factor, product = graph.weights.get(node.input[1 - slot]), producers.get(node.input[slot])
        if factor is None or factor.size != 1 or product is None or product.op_type != "MatMul":
            continue
        if not any(name in graph.weights for name in product.input):
            return product, slot
    return None
