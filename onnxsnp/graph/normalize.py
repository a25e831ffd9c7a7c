"""Bring a loaded model into the one form the analysis reads, without changing what it computes.

In order: local functions are inlined, Constant nodes and aliases become weights, fused operators are spelled out
(`onnxsnp.graph.expand`), every use of a weight gets a name of its own, constant subgraphs and values that follow from
static sizes are replaced by what they evaluate to (this freezes softmax scales that an exporter recomputes from the
head size), Reshape targets become constants where the sizes allow, and projections that several selections read parts
of are taken apart (`onnxsnp.surgery.unpack`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import onnx
from onnx import AttributeProto, NodeProto, helper, inliner

from onnxsnp.errors import ModelError
from onnxsnp.graph.expand import expand
from onnxsnp.graph.ir import Graph, Namer, attribute, set_attribute, subgraph_reads, topological
from onnxsnp.graph.probe import Probe, counts, probe
from onnxsnp.graph.tables import copy_tables
from onnxsnp.model import Model
from onnxsnp.runtime import first_line
from onnxsnp.tensors import inline_array
from onnxsnp.wellformed import check_graph, subgraphs

_SMALL = 1024  # elements; a folded value larger than this must not be larger than what it was computed from


@dataclass
class Normalized:
    """Two equivalent forms of one model.

    Attributes:
        base: nodes as exported, except that constants are folded and weights are not shared; masks are applied here.
        graph: the form that is analysed and cut.
        shapes: sizes of every tensor of `graph`, at batch 2 where the batch is dynamic.
        single: the same at batch 1.
        dynamic: which axes follow a symbolic input size.
        expanded: types of the fused operators that both forms spell out.
    """

    base: Graph
    graph: Graph
    shapes: dict[str, tuple[int, ...]]
    single: dict[str, tuple[int, ...]]
    dynamic: dict[str, tuple[bool, ...]]
    expanded: tuple[str, ...] = ()


def normalize(model: Model, sizes: Mapping[str, Sequence[int]] | None = None) -> Normalized:
    """Normalise a model (projections are left packed; see `onnxsnp.surgery.unpack.unpack`).

    Args:
        sizes: full input shapes by input name where symbolic sizes cannot be guessed.

    Raises:
        ModelError: the graph is cyclic, or the model cannot be run.
    """
    base = as_graph(model)
    measured = probe(base, sizes)
    expanded = expand(base, measured.shapes)
    if expanded:
        measured = probe(base, sizes)
    fold(base, measured.constant)
    # weights that are sliced or resampled to sizes which the graph reads from shapes; masks need them in both forms
    derived = {name: value for name, value in measured.invariant.items() if value.size > 1 and value.dtype.kind == "f"}
    fold(base, derived)
    copy_tables(base, measured)
    unshare(base)
    graph = base.copy()
    fold(graph, {name: value for name, value in measured.invariant.items() if name not in derived})
    unshare(graph)
    shapes = {**measured.shapes, **{name: array.shape for name, array in graph.weights.items()}}
    single = {**measured.single, **{name: array.shape for name, array in graph.weights.items()}}
    dynamic = {**measured.dynamic, **{name: (False,) * array.ndim for name, array in graph.weights.items()}}
    _straighten_gathers(graph, measured)
    _fix_reshapes(graph, measured)
    _fix_attention_scale(graph, shapes)
    graph.drop_dead()
    for name, array in graph.weights.items():
        shapes[name] = single[name] = array.shape
        dynamic[name] = (False,) * array.ndim
    return Normalized(base, graph, shapes, single, dynamic, tuple(expanded))


def as_graph(model: Model) -> Graph:
    """The model as a `Graph` with inlined functions, named nodes, and constants as weights."""
    proto = model.proto
    if proto.functions:
        proto = _inlined(proto)
    shell = onnx.ModelProto()
    shell.CopyFrom(proto)
    nodes = list(shell.graph.node)
    weights = dict(model.weights)
    del shell.graph.node[:]
    del shell.graph.value_info[:]
    inputs = [value for value in proto.graph.input if value.name not in weights]
    del shell.graph.input[:]
    shell.graph.input.extend(inputs)  # initializers listed as inputs are constants to us
    nodes, alias = _collect_constants(nodes, weights, {value.name for value in proto.graph.output})
    for node in nodes:
        for slot, name in enumerate(node.input):
            node.input[slot] = alias.get(name, name)
        _trim(node)
    nodes = topological(nodes, [*weights, *(value.name for value in inputs)])
    graph = Graph(shell, nodes, weights)
    namer = Namer(set())
    for node in nodes:
        node.name = namer(node.name or node.op_type)
    missing = [
        name
        for name in graph.outputs
        if name not in graph.producers() and name not in weights and name not in graph.inputs
    ]
    if missing:
        raise ModelError(f"nothing computes the model's output '{missing[0]}'", hint="export the model again")
    graph.drop_dead()
    if not graph.nodes:
        raise ModelError("no operator computes an output of the model", hint="export the model again")
    return graph


def _trim(node: NodeProto) -> None:
    """Drop omitted inputs at the end, here and in subgraphs, which is another way to write the same.

    The optimiser of onnxruntime 1.31 faults on a LayerNormalization whose bias is spelled out as "".
    """
    while node.input and not node.input[-1]:
        del node.input[-1]
    for graph in subgraphs(node):
        for inner in graph.node:
            _trim(inner)


def _inlined(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The same model with the bodies of local functions in place of their calls."""
    try:
        inlined = inliner.inline_local_functions(proto)
    except (RuntimeError, onnx.checker.ValidationError) as error:
        raise ModelError(
            f"the model's functions cannot be inlined: {first_line(error)}", hint="export it without functions"
        ) from error
    check_graph(inlined)
    return inlined


def _collect_constants(
    nodes: Sequence[NodeProto], weights: dict[str, np.ndarray], outputs: set[str]
) -> tuple[list[NodeProto], dict[str, str]]:
    """Move Constant values to the weights and resolve Identity aliases of weights."""
    kept: list[NodeProto] = []
    alias: dict[str, str] = {}
    captured = {name for node in nodes for name in subgraph_reads(node)}
    for node in nodes:
        if node.domain not in ("", "ai.onnx"):
            kept.append(node)
        elif node.op_type == "Constant" and node.output[0] not in outputs:
            weights[node.output[0]] = _constant_value(node)
        elif (
            node.op_type == "Identity"
            and alias.get(node.input[0], node.input[0]) in weights
            and node.output[0] not in outputs
            and node.output[0] not in captured
        ):
            alias[node.output[0]] = alias.get(node.input[0], node.input[0])
        else:
            kept.append(node)
    return kept, alias


def _constant_value(node: NodeProto) -> np.ndarray:
    for entry in node.attribute:
        if entry.name == "value" and entry.type == AttributeProto.TENSOR:
            return inline_array(entry.t)
        kind = _CONSTANTS.get((entry.name, entry.type))
        if kind is not None:
            return np.asarray(helper.get_attribute_value(entry), kind)
    raise ModelError("a Constant holds a value of an unsupported type", node=node.name)


_CONSTANTS = {
    ("value_float", AttributeProto.FLOAT): np.float32,
    ("value_floats", AttributeProto.FLOATS): np.float32,
    ("value_int", AttributeProto.INT): np.int64,
    ("value_ints", AttributeProto.INTS): np.int64,
}


def fold(graph: Graph, values: Mapping[str, np.ndarray]) -> None:
    """Replace tensors by their known values, unless that would make the file larger."""
    produced = graph.producers()
    namer = Namer(graph.names())
    captured = {name for node in graph.nodes for name in subgraph_reads(node)}
    known: dict[str, str] = {}
    gone: set[int] = set()
    for name, value in values.items():
        node = produced.get(name)
        if node is None or name in graph.outputs or (name in captured and len(node.output) > 1):
            continue
        if value.size > max(_SMALL, _held(node, graph, produced)):
            continue
        known[name] = name if len(node.output) == 1 else namer(f"{name}.value")  # its node may be needed for the rest
        graph.weights[known[name]] = value
        if len(node.output) == 1:
            gone.add(id(node))
    graph.nodes = [node for node in graph.nodes if id(node) not in gone]
    for node in graph.nodes:
        for slot, name in enumerate(node.input):
            node.input[slot] = known.get(name, name)
    graph.drop_dead()


def _held(node: NodeProto, graph: Graph, produced: Mapping[str, NodeProto]) -> int:
    """Entries of all weights that a value is computed from."""
    weights: set[str] = set()
    stack, seen = [node], {node.name}
    while stack:
        for source in stack.pop().input:
            if source in graph.weights:
                weights.add(source)
            elif source in produced and produced[source].name not in seen:
                seen.add(produced[source].name)
                stack.append(produced[source])
    return sum(graph.weights[source].size for source in weights)


def unshare(graph: Graph) -> None:
    """Give every use of a weight its own name; the arrays stay shared in memory."""
    namer = Namer(graph.names())
    seen: set[str] = set(graph.outputs)
    captured = {name for node in graph.nodes for name in subgraph_reads(node)}
    seen |= captured
    for node in graph.nodes:
        for slot, name in enumerate(node.input):
            if name not in graph.weights:
                continue
            if name in seen:
                own = namer(f"{graph.origin.get(name, name)}.{slot}@{node.name}")
                graph.weights[own] = graph.weights[name]
                graph.origin[own] = graph.origin.get(name, name)
                node.input[slot] = own
            seen.add(name)


def _straighten_gathers(graph: Graph, measured: Probe) -> None:
    """A Gather of all entries of a vector, in their order, is a Reshape; exporters write as_strided like that."""
    namer = Namer(graph.names())
    for node in graph.nodes:
        if node.op_type != "Gather" or attribute(node, "axis", 0) != 0 or node.input[0] not in measured.shapes:
            continue
        data, indices, output = node.input[0], node.input[1], node.output[0]
        in_order = indices in measured.counting or (indices in graph.weights and counts(graph.weights[indices]))
        whole = all(sizes[data] == (prod(sizes[output]),) for sizes in (measured.shapes, measured.single))
        if not in_order or not whole or measured.shapes[data] == (1,) or sum(measured.dynamic[output]) > 1:
            continue
        moving = zip(measured.shapes[output], measured.dynamic[output], strict=True)
        name = namer(f"{node.name}.shape")
        graph.weights[name] = np.asarray([-1 if dynamic else size for size, dynamic in moving], np.int64)
        node.op_type, node.input[1] = "Reshape", name
        node.ClearField("attribute")


def _fix_reshapes(graph: Graph, measured: Probe) -> None:
    """Write Reshape targets as constants: static sizes in full, one -1 where a size is dynamic."""
    namer = Namer(graph.names())
    for node in graph.nodes:
        if node.op_type != "Reshape" or node.output[0] not in measured.shapes:
            continue
        source, target = node.input[0], node.output[0]
        if source not in measured.shapes:
            continue
        sizes = [
            -1 if moving else size
            for size, moving in zip(measured.shapes[target], measured.dynamic[target], strict=True)
        ]
        if sizes.count(-1) > 1:
            before = measured.shapes[source], measured.dynamic[source]
            for axis in range(min(len(sizes), len(before[0]))):
                same = all(
                    moving == other
                    for moving, other in zip(measured.dynamic[target][: axis + 1], before[1], strict=False)
                )
                if sizes[axis] == -1 and before[1][axis] and same and before[0][axis] == measured.shapes[target][axis]:
                    sizes[axis] = 0
        if sizes.count(-1) > 1 or 0 in measured.shapes[target]:
            continue
        name = namer(f"{node.name}.shape")
        graph.weights[name] = np.asarray(sizes, np.int64)
        node.input[1] = name
        if 0 in sizes and graph.opset >= 14:  # before that 0 can only mean to copy
            set_attribute(node, "allowzero", 0)


def _fix_attention_scale(graph: Graph, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Spell out the scale that Attention otherwise derives from the head size at run time."""
    for node in graph.nodes:
        if node.op_type != "Attention" or node.domain not in ("", "ai.onnx") or attribute(node, "scale") is not None:
            continue
        shape = shapes.get(node.input[0])
        if shape is not None:
            head = shape[3] if len(shape) == 4 else shape[2] // int(attribute(node, "q_num_heads", 1))
            set_attribute(node, "scale", float(head) ** -0.5)
