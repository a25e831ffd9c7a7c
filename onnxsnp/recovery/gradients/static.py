"""A model at one size of its inputs: every shape is known, and what follows from shapes alone is a constant.

The rules of the backward graph then need no arithmetic on shapes. Parameters keep the names they have in the file, and
what is computed from them stays computed, so that gradients reach them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, helper, inliner

from onnxsnp.errors import ModelError
from onnxsnp.graph.expand import expand
from onnxsnp.graph.ir import Graph, subgraph_reads
from onnxsnp.graph.normalize import as_graph, fold
from onnxsnp.graph.precision import is_float, to_single
from onnxsnp.graph.probe import RANDOM_OPS, probe
from onnxsnp.graph.quantised import is_quantised
from onnxsnp.model import Model
from onnxsnp.recovery.gradients.rules import RULES, WITHOUT_GRADIENT


@dataclass
class Static:
    """A model at fixed input sizes.

    Attributes:
        graph: fused operators are spelled out; weights have the names of the file.
        shapes: sizes of every tensor.
        parameters: the file's floating-point initializers with more than one entry that the graph still reads, but for
            masks.
    """

    graph: Graph
    shapes: dict[str, tuple[int, ...]]
    parameters: list[str]


def static_graph(model: Model, sizes: Mapping[str, Sequence[int]]) -> Static:
    """The model at these sizes, in single precision whatever its own is.

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
    to_single(graph.shell, graph.nodes, graph.weights)
    graph = _spelled_out(graph, model)
    names = [name for name in model.weights if name in graph.weights]
    parameters = [name for name in names if _is_parameter(graph.weights[name])]
    measured = probe(graph)
    if expand(graph, measured.shapes):
        measured = probe(graph)
    fold(graph, _known(graph, _reached(graph.nodes, parameters), measured.shapes))
    shapes = {**measured.shapes, **{name: array.shape for name, array in graph.weights.items()}}
    return Static(graph, shapes, [name for name in parameters if name in graph.weights])


def _is_parameter(array: np.ndarray) -> bool:
    """Floating-point, more than one number, and no mask: a table with only two different entries, or infinite ones."""
    if not is_float(array.dtype) or array.size < 2:
        return False
    if sum(size > 1 for size in array.shape) < 2:
        return True
    flat = array.reshape(-1)
    different = flat != flat[0]
    other = flat[int(np.argmax(different))]
    return bool(np.isfinite(flat).all() and np.any(different & (flat != other)))


def _known(graph: Graph, carrying: set[str], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Values that follow from constants and shapes, and not from parameters, where something else reads them."""
    derived = set(graph.weights) - carrying
    for node in graph.nodes:
        reads = [] if node.op_type in ("Shape", "Size") else [*node.input, *subgraph_reads(node)]
        if (
            node.op_type not in RANDOM_OPS
            and not is_quantised(node)
            and all(name in derived or not name for name in reads)
        ):
            derived.update(name for name in node.output if name)
    others = [node for node in graph.nodes if not all(name in derived for name in node.output if name)]
    read = {name for node in others for name in [*node.input, *subgraph_reads(node)]}
    names = sorted((read & derived) - graph.weights.keys())
    if not names:
        return {}
    declared = {value.name: value.type.tensor_type.elem_type for value in graph.shell.graph.input}
    feeds = {name: np.zeros(shapes[name], helper.tensor_dtype_to_np_dtype(kind)) for name, kind in declared.items()}
    return dict(zip(names, graph.session(names, optimize=False).run(names, feeds), strict=True))


def _spelled_out(graph: Graph, model: Model) -> Graph:
    """Operators that have no gradient rule but that ONNX defines through others (`Attention`), written as those."""
    if "inline_schema_functions" not in (inliner.inline_selected_functions.__doc__ or ""):
        return graph  # an older onnx, which keeps its definitions to itself
    unknown = {node.op_type for node in graph.nodes if node.domain in ("", "ai.onnx")} - RULES.keys() - WITHOUT_GRADIENT
    defined = [("", kind) for kind in sorted(unknown) if _is_function(kind, graph.opset)]
    if not defined:
        return graph
    skeleton = graph.skeleton(feed=graph.weights)
    proto = inliner.inline_selected_functions(skeleton, defined, inline_schema_functions=True)
    return as_graph(replace(model, proto=proto, weights=graph.weights))


def _is_function(kind: str, opset: int) -> bool:
    if not onnx.defs.has(kind, max_inclusive_version=opset):
        return False
    schema: Any = onnx.defs.get_schema(kind, opset)
    return bool(schema.has_function or schema.has_context_dependent_function)


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
