"""Fixed sizes: the inputs get theirs, and whatever does not depend on the inputs' values becomes a weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
from onnx import NodeProto

from onnxsnp.errors import ModelError
from onnxsnp.graph.ir import Graph, Namer, attribute, subgraph_reads
from onnxsnp.graph.probe import Probe, probe
from onnxsnp.runtime import symbol_size


def fix_inputs(graph: Graph, input_shapes: Mapping[str, Sequence[int]] | None = None, batch: int = 1) -> int:
    """Give every input of a graph fixed sizes, in place.

    Args:
        input_shapes: full shapes by input name.
        batch: of inputs whose first axis is free and not given otherwise.

    Returns:
        How many sizes were free.

    Raises:
        ModelError: a size that is not known, or one that the model contradicts.
    """
    given = dict(input_shapes or {})
    unknown = sorted(given.keys() - set(graph.inputs))
    if unknown:
        raise ModelError(f"the model has no input '{unknown[0]}'", hint=f"its inputs: {', '.join(graph.inputs)}")
    shell = onnx.ModelProto()
    shell.CopyFrom(graph.shell)
    symbols: dict[str, int] = {}
    inputs = list(shell.graph.input)
    for value in inputs:
        if value.name in given:
            _take(value, given[value.name], symbols)
    for value in inputs:
        dims = value.type.tensor_type.shape.dim
        if dims and dims[0].dim_value <= 0 and value.name not in given and dims[0].dim_param:
            symbols.setdefault(dims[0].dim_param, batch)
    freed = 0
    for value in inputs:
        sizes = given.get(value.name)
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            if dim.HasField("dim_value") and dim.dim_value > 0:
                continue
            freed += 1
            if sizes is not None:
                dim.dim_value = int(sizes[axis])
            elif axis == 0 and not dim.dim_param:
                dim.dim_value = batch
            else:
                dim.dim_value = _size(value.name, axis, dim.dim_param, symbols)
    graph.shell = shell
    return freed


def _take(value: onnx.ValueInfoProto, sizes: Sequence[int], symbols: dict[str, int]) -> None:
    """Note what a given shape says of the symbols."""
    dims = value.type.tensor_type.shape.dim
    if len(sizes) != len(dims):
        raise ModelError(f"--input-shape gives '{value.name}' {len(sizes)} sizes, the model's input has {len(dims)}")
    for axis, (dim, size) in enumerate(zip(dims, sizes, strict=True)):
        if int(size) < 1:
            raise ModelError(
                f"--input-shape gives '{value.name}' the size {size} at axis {axis}, which is not positive"
            )
        if dim.dim_value > 0 and dim.dim_value != size:
            raise ModelError(
                f"--input-shape gives '{value.name}' the size {size} at axis {axis}, the model has {dim.dim_value}",
                hint="leave it as the model has it, or export the model with that size free",
            )
        if dim.dim_param and symbols.setdefault(dim.dim_param, int(size)) != int(size):
            raise ModelError(
                f"--input-shape gives '{dim.dim_param}' of '{value.name}' the size {size}, another input has "
                f"{symbols[dim.dim_param]}"
            )


def _size(name: str, axis: int, symbol: str, symbols: Mapping[str, int]) -> int:
    def known(one: str) -> int:
        if one not in symbols:
            raise ModelError(
                f"axis {axis} of the input '{name}' has the free size '{symbol or '?'}', an engine needs a fixed one",
                hint=f"give it with --input-shape {name}:SIZExSIZE, all its sizes, for example {name}:1x128",
            )
        return symbols[one]

    return symbols[symbol] if symbol in symbols else symbol_size(symbol or "?", known)


def settle(graph: Graph) -> tuple[Probe, int]:
    """Replace what is constant at the graph's fixed sizes by weights, and If on a constant by its branch, in place.

    Returns:
        What the last run showed, and how many nodes went.

    Raises:
        ModelError: the model does not run, or decides by its inputs' values which operators to run.
    """
    before = len(graph.nodes)
    measured = probe(graph)
    while True:
        _fold(graph, {**measured.invariant, **measured.constant})
        if not _take_branches(graph):
            break
        measured = probe(graph)
    _check_sizes(graph)
    for node in graph.nodes:
        if subgraph_reads(node) or any(entry.type == onnx.AttributeProto.GRAPH for entry in node.attribute):
            raise ModelError(
                f"{node.op_type} runs other operators as its inputs' values say, and those are not lowered",
                node=node.name,
                hint="export the model with fixed sizes, or without control flow",
            )
    return measured, before - len(graph.nodes)


_SIZED_BY_VALUES = {"Compress", "NonMaxSuppression", "NonZero", "StringSplit", "Unique"}
_SIZE_SLOTS: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(("Expand", "OneHot", "Pad", "Reshape", "Split", "Tile", "TopK", "Upsample"), (1,)),
    "ConstantOfShape": (0,),
    "Range": (0, 1, 2),
    "Resize": (1, 2, 3),
    "Slice": (1, 2, 3, 4),
}


def _check_sizes(graph: Graph) -> None:
    """Refuse sizes that follow from what the inputs hold: those that were measured would hold for one input only."""
    for node in graph.nodes:
        slots = _SIZE_SLOTS.get(node.op_type, ()) if node.domain in ("", "ai.onnx") else ()
        computed = [node.input[slot] for slot in slots if slot < len(node.input) and node.input[slot]]
        if node.op_type in _SIZED_BY_VALUES or any(name not in graph.weights for name in computed):
            raise ModelError(
                f"the size of what {node.op_type} gives depends on what the model's inputs hold, an engine has fixed "
                "sizes",
                node=node.name,
                hint="export the model without it, for example with padding to a fixed length",
            )


def _fold(graph: Graph, values: Mapping[str, np.ndarray]) -> None:
    """Replace tensors by their values, but for the model's own outputs."""
    kept = set(graph.outputs)
    produced = graph.producers()
    for name, value in values.items():
        if name in kept or name not in produced:
            continue
        node = produced[name]
        slot = list(node.output).index(name)
        graph.weights[name] = np.asarray(value)
        node.output[slot] = ""  # the node stays for its other outputs, if any is read
    graph.nodes = [node for node in graph.nodes if any(node.output)]
    graph.drop_dead()


def _take_branches(graph: Graph) -> bool:
    """Put the branch that is taken in the place of every If whose condition is constant."""
    namer = Namer(graph.names())
    nodes: list[NodeProto] = []
    found = False
    for node in graph.nodes:
        condition = graph.weights.get(node.input[0]) if node.op_type == "If" else None
        if condition is None:
            nodes.append(node)
            continue
        found = True
        branch = attribute(node, "then_branch" if condition.any() else "else_branch")
        nodes.extend(_inlined(graph, node, branch, namer))
    graph.nodes = nodes
    graph.drop_dead()
    return found


def _inlined(graph: Graph, node: NodeProto, branch: onnx.GraphProto, namer: Namer) -> list[NodeProto]:
    """The nodes of a branch under names of their own, its outputs under those of the If."""
    own = {tensor.name for tensor in branch.initializer} | {name for inner in branch.node for name in inner.output}
    rename = {name: namer(f"{node.name}.{name}") for name in own if name}
    made = []
    for tensor in branch.initializer:
        graph.weights[rename[tensor.name]] = onnx.numpy_helper.to_array(tensor)
    for inner in branch.node:
        clone = NodeProto()
        clone.CopyFrom(inner)
        clone.name = namer(f"{node.name}.{inner.name or inner.op_type}")
        for names in (clone.input, clone.output):
            for slot, name in enumerate(names):
                names[slot] = rename.get(name, name)
        for nested in clone.attribute:
            if nested.type == onnx.AttributeProto.GRAPH:
                raise ModelError("an If inside an If is not lowered", node=node.name, hint="export with fixed sizes")
        made.append(clone)
    for result, name in zip(node.output, (value.name for value in branch.output), strict=True):
        if result:
            source = rename.get(name, name)
            made.append(onnx.helper.make_node("Identity", [source], [result], namer(f"{node.name}.Identity")))
    return made
