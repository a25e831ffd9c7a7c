"""Tables that are computed on the way, such as the sines and cosines of rotary positions: one for every reader.

All layers read the same table, and an index that one layer does without, another may need. So every reader is given a
computation of its own, from positions that all share; copies that no cut has told apart are one again in the file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from onnx import NodeProto

from onnxsnp.graph.inputs import graph_inputs
from onnxsnp.graph.ir import Graph, Namer, subgraph_reads
from onnxsnp.graph.probe import Probe

_LOOKUPS = {"Gather", "GatherElements", "GatherND"}
_PRODUCTS = {"Conv", "Einsum", "Gemm", "MatMul"}
_NEVER = {"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Multinomial", "Bernoulli"}


def copy_tables(graph: Graph, measured: Probe) -> None:
    """Give every reader of a computed table its own, in place; the sizes of the copies are noted in `measured`.

    A table is a floating-point tensor that depends on vectors of weights, on whole numbers (positions, sizes, ids) and
    on nothing else; what is looked up in a weight, such as an embedding, is none.
    """
    made = _table_nodes(graph)
    readers, namer = graph.readers(), Namer(graph.names())
    inside = {name: node for node in made.values() for name in node.output}
    before: dict[str, list[NodeProto]] = {}
    taken = {name for output in graph.outputs for name in _names(_upstream(output, inside))}
    for name in inside:
        for node, slot in readers.get(name, []):
            if node.name in made:
                continue
            chain = _upstream(name, inside)
            if slot >= 0 and taken & _names(chain):
                copies, renamed = _copied(chain, f"{node.name}.{slot}", graph, namer, measured)
                before.setdefault(node.name, []).extend(copies)
                node.input[slot] = renamed[name]
            taken |= _names(chain)
    graph.nodes = [one for node in graph.nodes for one in [*before.get(node.name, []), node]]


def merge_copies(graph: Graph) -> None:
    """Make one, in place, of copies (see `copy_tables`) that do the same; their weights are shared already."""
    known: dict[tuple[object, ...], list[str]] = {}
    rename: dict[str, str] = {}
    kept = []
    copied = graph.copies.keys() | set(graph.copies.values())
    for node in graph.nodes:
        for slot, name in enumerate(node.input):
            node.input[slot] = rename.get(name, name)
        if node.name in copied and not any(name in graph.outputs for name in node.output):
            does = (
                node.op_type,
                node.domain,
                tuple(node.input),
                tuple(entry.SerializeToString(deterministic=True) for entry in node.attribute),
            )
            first = known.setdefault(does, list(node.output))
            if first != list(node.output):
                rename.update(zip(node.output, first, strict=True))
                continue
        kept.append(node)
    graph.nodes = kept
    graph.drop_dead()


def _table_nodes(graph: Graph) -> dict[str, NodeProto]:
    """Nodes that compute floating-point tensors from a vector of weights and whole numbers alone, by name."""
    kinds = {spec.name: spec.dtype.kind for spec in graph_inputs(graph)}
    whole = {name for name, kind in kinds.items() if kind in "iub"}
    whole |= {name for name, array in graph.weights.items() if array.dtype.kind in "iub"}
    scalars = {name for name, array in graph.weights.items() if array.size == 1}
    vectors = {name for name, array in graph.weights.items() if name not in whole | scalars}
    matrices = {name for name, array in graph.weights.items() if array.size > max(array.shape, default=1)}
    plain, tables = whole | scalars, set[str]()
    found: dict[str, NodeProto] = {}
    for node in graph.nodes:
        reads = [name for name in node.input if name]
        if node.op_type in ("Shape", "Size"):
            plain.update(node.output)
        elif node.op_type in _NEVER or subgraph_reads(node) or not reads:
            continue
        elif node.op_type in _PRODUCTS and matrices.intersection(reads):
            continue  # a layer that reads positions, such as queries that a decoder learned, is no table
        elif all(name in plain for name in reads):
            plain.update(node.output)
        elif node.op_type not in _LOOKUPS and all(name in plain or name in tables or name in vectors for name in reads):
            tables.update(node.output)
            found[node.name] = node
    return found


def _upstream(name: str, inside: Mapping[str, NodeProto]) -> list[NodeProto]:
    """The nodes that compute a table, in order."""
    found: dict[str, NodeProto] = {}

    def visit(tensor: str) -> None:
        node = inside.get(tensor)
        if node is not None and node.name not in found:
            for source in node.input:
                visit(source)
            found[node.name] = node

    visit(name)
    return list(found.values())


def _names(nodes: Sequence[NodeProto]) -> set[str]:
    return {node.name for node in nodes}


def _copied(
    chain: Sequence[NodeProto], mark: str, graph: Graph, namer: Namer, measured: Probe
) -> tuple[list[NodeProto], dict[str, str]]:
    """Copies of nodes that compute the same from the same, and the names of their outputs by the originals'."""
    copies: list[NodeProto] = []
    renamed: dict[str, str] = {}
    for node in chain:
        copy = NodeProto()
        copy.CopyFrom(node)
        copy.name = namer(f"{node.name}@{mark}")
        graph.copies[copy.name] = node.name
        for slot, name in enumerate(node.input):
            copy.input[slot] = renamed.get(name, name)
        for slot, name in enumerate(node.output):
            renamed[name] = copy.output[slot] = namer(f"{name}@{mark}")
            _note(measured, name, renamed[name])
        copies.append(copy)
    return copies, renamed


def _note(measured: Probe, name: str, copy: str) -> None:
    """What was measured of a tensor holds for its copy."""
    if name in measured.shapes:
        measured.shapes[copy], measured.single[copy] = measured.shapes[name], measured.single[name]
        measured.dynamic[copy] = measured.dynamic[name]
    if name in measured.invariant:
        measured.invariant[copy] = measured.invariant[name]
