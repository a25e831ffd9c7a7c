"""What a model's inputs may hold, as its graph has it: sizes, and how many ids are in the tables they index."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from onnx import NodeProto, helper

from onnxsnp.graph.ir import Graph, attribute
from onnxsnp.graph.precision import BRAIN
from onnxsnp.runtime import InputSpec

# operators that hand ids on as they are, by the input slots they take them from (None: any)
_HANDED_ON: dict[str, tuple[int, ...] | None] = {
    "Where": (1, 2),
    "Concat": None,
    **dict.fromkeys(("Cast", "Identity", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Expand", "Tile"), (0,)),
    **dict.fromkeys(("Transpose", "Slice", "Split", "Gather", "Dropout"), (0,)),
}
_TABLE_READERS = ("Gather", "GatherElements")


def graph_inputs(graph: Graph, shapes: Mapping[str, Sequence[int]] | None = None) -> list[InputSpec]:
    """The model's inputs, with sizes that were given filled in behind the batch."""
    specs = []
    bounds = id_bounds(graph)
    for value in graph.shell.graph.input:
        kind = value.type.tensor_type
        sizes: list[int | str | None] = [
            dim.dim_value if dim.dim_value > 0 else dim.dim_param or None for dim in kind.shape.dim
        ]
        given = (shapes or {}).get(value.name)
        if given is not None:
            sizes = [
                size if isinstance(size, int) or axis == 0 else int(given[axis]) for axis, size in enumerate(sizes)
            ]
        dtype = np.dtype(helper.tensor_dtype_to_np_dtype(kind.elem_type))
        dtype = np.dtype(np.float32) if dtype == BRAIN else dtype  # what sessions take in its place
        specs.append(InputSpec(value.name, tuple(sizes), dtype, bounds.get(value.name)))
    return specs


def id_bounds(graph: Graph) -> dict[str, int]:
    """Exclusive upper bounds of integer inputs that index tables of the model (embeddings), by input name."""
    readers, producers = graph.readers(), graph.producers()
    found: dict[str, int] = {}
    for source in graph.inputs:
        bounds = []
        stack, seen = [(source, 0)], set()
        while stack:
            name, shift = stack.pop()
            for node, slot in readers.get(name, []):
                if node.op_type in _TABLE_READERS and slot == 1:
                    rows = _rows(node, graph, producers)
                    bounds.extend([rows - shift] if rows is not None else [])
                    continue
                moved = _handed_on(node, slot, graph)
                if moved is not None and (node.name, shift + moved) not in seen:
                    seen.add((node.name, shift + moved))
                    stack.extend((output, shift + moved) for output in node.output)
        if bounds and min(bounds) > 0:
            found[source] = min(bounds)
    return found


def padding_masks(graph: Graph) -> dict[str, list[str]]:
    """Inputs [batch, tokens] that say which tokens are there, and all inputs that have their tokens.

    They are known by their names and types, and the inputs that go with them by the symbols of their sizes.
    """
    specs = graph_inputs(graph)
    found = {}
    for spec in specs:
        if "mask" in spec.name.lower() and spec.dtype.kind in "iub" and len(spec.shape) == 2:
            named = all(isinstance(size, str) for size in spec.shape)
            found[spec.name] = [one.name for one in specs if one is spec or (named and one.shape == spec.shape)]
    return found


def _rows(node: NodeProto, graph: Graph, producers: Mapping[str, NodeProto]) -> int | None:
    """Entries of the table a node looks up in; None if that is no constant."""
    name = node.input[0]
    while name in producers and producers[name].op_type in ("Cast", "DequantizeLinear", "Identity"):
        name = producers[name].input[0]
    table = graph.weights.get(name)
    axis = attribute(node, "axis", 0)
    if table is None or not -table.ndim <= axis < table.ndim:
        return None
    return int(table.shape[axis])


def _handed_on(node: NodeProto, slot: int, graph: Graph) -> int | None:
    """What an operator adds to the ids it is given; None if it makes something else of them."""
    if node.op_type in ("Add", "Sub"):
        other = graph.weights.get(node.input[1 - slot]) if slot in (0, 1) else None
        if other is None or other.size != 1 or other.dtype.kind not in "iu" or (node.op_type == "Sub" and slot == 1):
            return None
        return int(other.reshape(-1)[0]) * (1 if node.op_type == "Add" else -1)
    slots = _HANDED_ON.get(node.op_type, ())
    return 0 if slots is None or slot in slots else None
