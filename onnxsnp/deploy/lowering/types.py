"""Element types: single precision for every floating-point number, and round trips where an importer lacks a type."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx
from onnx import AttributeProto, GraphProto, NodeProto, TensorProto, helper, numpy_helper

from onnxsnp.deploy.operators import element_kinds, kind_of, takes
from onnxsnp.deploy.targets import Target
from onnxsnp.graph.ir import Graph, Namer, to_tensor
from onnxsnp.graph.precision import BRAIN, element_types

_OTHER = {TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE}
_TYPE_ATTRIBUTES = {"to", "dtype", "output_dtype", "stash_type", "softmax_precision"}


def to_single(graph: Graph) -> int:
    """Turn every half, bfloat16 and double number of a graph into single precision, in place.

    TensorRT does the same to doubles when it reads a file; a build at fp16 starts from single precision, and 8.2 has no
    16-bit initializers. Every half and bfloat16 number is a single-precision number too.

    Returns:
        How many weights and declared types changed.
    """
    changed = 0
    for name, array in graph.weights.items():
        if array.dtype in (np.float16, np.float64) or array.dtype == BRAIN:
            graph.weights[name] = _single(array)
            changed += 1
    shell = onnx.ModelProto()
    shell.CopyFrom(graph.shell)
    changed += _retype_graph(shell.graph, shell.graph.input, shell.graph.output)
    graph.shell = shell
    for node in graph.nodes:
        changed += _retype_node(node)
    return changed


def _single(array: np.ndarray) -> np.ndarray:
    """Numbers beyond single precision become its largest, as in TensorRT."""
    if array.dtype == np.float64:
        limit = float(np.finfo(np.float32).max)
        array = np.where(np.isfinite(array), np.clip(array, -limit, limit), array)
    return array.astype(np.float32)


def _retype_graph(graph: GraphProto, *lists: Iterable[onnx.ValueInfoProto]) -> int:
    changed = 0
    for values in lists:
        for value in values:
            kind = value.type.tensor_type
            if kind.elem_type in _OTHER:
                kind.elem_type = TensorProto.FLOAT
                changed += 1
    for tensor in graph.initializer:
        changed += _retype_tensor(tensor)
    for node in graph.node:
        changed += _retype_node(node)
    return changed


def _retype_node(node: NodeProto) -> int:
    changed = 0
    for entry in node.attribute:
        if entry.type == AttributeProto.INT and entry.name in _TYPE_ATTRIBUTES and entry.i in _OTHER:
            entry.i = TensorProto.FLOAT
            changed += 1
        elif entry.type == AttributeProto.TENSOR:
            changed += _retype_tensor(entry.t)
        elif entry.type == AttributeProto.GRAPH:
            changed += _retype_graph(entry.g, entry.g.input, entry.g.output, entry.g.value_info)
    return changed


def _retype_tensor(tensor: TensorProto) -> int:
    if tensor.data_type not in _OTHER:
        return 0
    tensor.CopyFrom(to_tensor(_single(numpy_helper.to_array(tensor)), tensor.name))
    return 1


def through_taken_types(graph: Graph, target: Target) -> dict[str, int]:
    """Let operators work on a type that the importer takes where it lacks theirs, with a Cast on either side.

    BOOL goes through INT32, or single precision; INT32 and INT64 through single precision, which is exact up to 2^24:
    ids, lengths, positions and masks are below that.

    Returns:
        How many nodes of each type of operator were changed.
    """
    types = element_types(graph.skeleton()) | {name: array.dtype for name, array in graph.weights.items()}
    namer = Namer(graph.names())
    nodes: list[NodeProto] = []
    changed: dict[str, int] = {}
    for node in graph.nodes:
        through = _through(node, types, graph.opset, target)
        if through is None:
            nodes.append(node)
        else:
            nodes.extend(_wrapped(graph, node, through[0], through[1], namer))
            changed[node.op_type] = changed.get(node.op_type, 0) + 1
    graph.nodes = nodes
    graph.drop_dead()
    return changed


def data_type(node: NodeProto, opset: int) -> str:
    """The type variable of an operator's data: of its first input, but of what is chosen from in Where and OneHot."""
    schema = onnx.defs.get_schema(node.op_type, opset)
    slot = {"Where": 1, "OneHot": 2}.get(node.op_type, 0)
    return str(schema.inputs[slot].type_str) if len(schema.inputs) > slot else ""


def typed_slots(node: NodeProto, opset: int) -> tuple[list[int], list[int]]:
    """Inputs and outputs of a node that have the type of its data."""
    schema = onnx.defs.get_schema(node.op_type, opset)
    kind = data_type(node, opset)
    chosen = []
    for formal, given in ((schema.inputs, node.input), (schema.outputs, node.output)):
        kinds = [formal[min(slot, len(formal) - 1)].type_str for slot in range(len(given))] if len(formal) else []
        chosen.append([slot for slot, found in enumerate(kinds) if found == kind and given[slot]])
    return chosen[0], chosen[1]


def _through(
    node: NodeProto, types: dict[str, np.dtype], opset: int, target: Target
) -> tuple[np.dtype, np.dtype] | None:
    """The type that a node works on and the one it is to work on; None where it may stay."""
    if node.domain or not takes(node.op_type, target.tensorrt) or not onnx.defs.has(node.op_type, opset):
        return None
    slots = typed_slots(node, opset)[0]
    found = next((types[node.input[slot]] for slot in slots if node.input[slot] in types), None)
    if found is None:
        return None
    kind, kinds = kind_of(found), element_kinds(node.op_type, target.tensorrt)
    if kind in kinds or kind not in ("i", "b"):
        return None
    other = {"i": np.dtype(np.int32), "f": np.dtype(np.float32)}
    best = next((other[letter] for letter in ("i", "f") if letter in kinds and letter != kind), None)
    return None if best is None else (found, best)


def _wrapped(graph: Graph, node: NodeProto, own: np.dtype, other: np.dtype, namer: Namer) -> list[NodeProto]:
    """The node on another type: casts in front and behind."""
    inputs, outputs = typed_slots(node, graph.opset)
    before, after = [], []
    done: dict[str, str] = {}
    for slot in inputs:
        name = node.input[slot]
        if name not in done:
            done[name] = namer(f"{name}.as.{other}")
            if name in graph.weights:
                graph.weights[done[name]] = graph.weights[name].astype(other)
            else:
                before.append(_cast(name, done[name], other, namer))
        node.input[slot] = done[name]
    for slot in outputs:
        name = node.output[slot]
        node.output[slot] = namer(f"{name}.as.{other}")
        after.append(_cast(node.output[slot], name, own, namer))
    return [*before, node, *after]


def _cast(source: str, result: str, kind: np.dtype, namer: Namer) -> NodeProto:
    return helper.make_node(
        "Cast", [source], [result], namer(f"{result}.Cast"), to=helper.np_dtype_to_tensor_dtype(kind)
    )
