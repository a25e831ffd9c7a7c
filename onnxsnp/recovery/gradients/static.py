"""A model at one size of its inputs: every shape is known, and what follows from shapes alone is a constant.

The rules of the backward graph then need no arithmetic on shapes. Parameters keep the names they have in the file, and
what is computed from them stays computed, so that gradients reach them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import onnx
from onnx import NodeProto

from onnxsnp.errors import ModelError
from onnxsnp.graph.expand import expand
from onnxsnp.graph.ir import Graph, subgraph_reads
from onnxsnp.graph.normalize import as_graph, fold
from onnxsnp.graph.precision import is_float
from onnxsnp.graph.probe import probe
from onnxsnp.model import Model


@dataclass
class Static:
    """A model at fixed input sizes.

    Attributes:
        graph: fused operators are spelled out; weights have the names of the file.
        shapes: sizes of every tensor.
        parameters: the file's floating-point initializers with more than one entry that the graph still reads.
    """

    graph: Graph
    shapes: dict[str, tuple[int, ...]]
    parameters: list[str]


def static_graph(model: Model, sizes: Mapping[str, Sequence[int]]) -> Static:
    """The model at these sizes.

    Args:
        sizes: full shapes by input name, the batch included; inputs that are left out must have fixed sizes.

    Raises:
        ModelError: a size contradicts the model's own, is missing, or the model cannot be run at it.
    """
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    for value in proto.graph.input:
        if value.name not in model.weights:
            _fix(value, sizes.get(value.name))
    graph = as_graph(replace(model, proto=proto))
    names = [name for name in model.weights if name in graph.weights]
    parameters = [name for name in names if is_float(graph.weights[name].dtype) and graph.weights[name].size > 1]
    measured = probe(graph)
    if expand(graph, measured.shapes):
        measured = probe(graph)
    carrying = _reached(graph.nodes, parameters)
    known = {**measured.constant, **measured.invariant}
    fold(graph, {name: value for name, value in known.items() if name not in carrying})
    shapes = {**measured.shapes, **{name: array.shape for name, array in graph.weights.items()}}
    return Static(graph, shapes, [name for name in parameters if name in graph.weights])


def _fix(value: onnx.ValueInfoProto, wanted: Sequence[int] | None) -> None:
    dims = value.type.tensor_type.shape.dim
    own = [dim.dim_value if dim.dim_value > 0 else None for dim in dims]
    given = list(wanted) if wanted is not None else own
    if len(given) != len(own) or any(mine not in (None, size) for mine, size in zip(own, given, strict=True)):
        raise ModelError(
            f"input '{value.name}' takes {_brief(own)}, not {_brief(given)}", hint="use data of the model's own size"
        )
    for dim, size in zip(dims, given, strict=True):
        if size is None:
            raise ModelError(
                f"the size of input '{value.name}' is not known: {_brief(own)}", hint="give it with --input-shape"
            )
        dim.Clear()
        dim.dim_value = int(size)


def _brief(sizes: Sequence[int | None]) -> str:
    return "×".join("?" if size is None else str(size) for size in sizes)


def _reached(nodes: Sequence[NodeProto], start: Sequence[str]) -> set[str]:
    """Tensors whose values follow from those of the start."""
    found = set(start)
    for node in nodes:
        if node.op_type not in ("Shape", "Size") and any(
            name in found for name in [*node.input, *subgraph_reads(node)]
        ):
            found.update(name for name in node.output if name)
    return found
