"""Take packed projections apart, so that query, key and value can have sizes of their own.

A packed projection is a factor (the 3 of a 5-D QKV reshape, or a flat 3·D axis) of which later operators each select a
range. Restricting everything between the weight and the selection to that range is the same operation as cutting a
factor; so each selection gets its own copy of that path, cut to its range, and the selection itself disappears.
"""

from __future__ import annotations

from collections.abc import Collection, MutableMapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from onnx import NodeProto, helper

from onnxsnp.errors import VerificationError
from onnxsnp.graph.dependency import Dependencies, analyse
from onnxsnp.graph.facts import Select
from onnxsnp.graph.ir import Graph, Namer, Part, attribute
from onnxsnp.graph.normalize import Normalized, unshare
from onnxsnp.graph.stacks import above
from onnxsnp.surgery.rewrite import Cut, cut_array, fix_sizes, new_size, weight_axes
from onnxsnp.surgery.tidy import tidy


@dataclass(frozen=True)
class _Packed:
    """A packed factor: the weights it lies in, and what each selection takes of it."""

    atom: int
    weights: tuple[str, ...]
    selects: tuple[tuple[Select, int, int], ...]
    path: frozenset[str]


def packed_sources(graph: Graph) -> dict[str, set[str]]:
    """For each packed weight of the file, the weights that were taken out of it."""
    found: dict[str, set[str]] = {}
    for name in graph.parts:
        found.setdefault(root_of(graph, name), set()).add(name)
    return found


def root_of(graph: Graph, name: str) -> str:
    """The packed weight of the file that a part came from."""
    while name in graph.parts:
        name = graph.parts[name].source
    return name


def put_back(weights: MutableMapping[str, np.ndarray], graph: Graph, name: str, array: np.ndarray) -> None:
    """Write a weight of an unpacked graph to where it came from; a packed weight is replaced by a changed copy.

    Args:
        weights: of the packed graph, by name; changed in place.
        graph: the unpacked one.
        array: the new values, in the shape of the weight `name` of `graph`.

    Raises:
        VerificationError: there is no such weight.
    """
    root = root_of(graph, name)
    if root not in weights:
        raise VerificationError(f"weight '{root}' has no counterpart in the exported graph", node=name)
    if name not in graph.parts:
        weights[name] = array
        return
    chain: list[Part] = [graph.parts[name]]
    while chain[-1].source in graph.parts:
        chain.append(graph.parts[chain[-1].source])
    target = np.array(weights[root])
    places = np.arange(target.size).reshape(target.shape)
    for link in reversed(chain):
        places = np.take(places, link.indices, axis=link.axis)
    target.reshape(-1)[places.reshape(-1)] = array.reshape(-1)
    weights[root] = target


def unpack(normalized: Normalized, only: Collection[str] | None = None) -> Normalized:
    """A normalised model whose packed projections are separate.

    Args:
        only: names of packed weights to take apart; all of them if None.
    """
    graph = normalized.graph.copy()
    result = Normalized(
        normalized.base,
        graph,
        dict(normalized.shapes),
        dict(normalized.single),
        dict(normalized.dynamic),
        normalized.expanded,
    )
    for _round in range(8):  # a packed axis can hold a packed axis; the rounds end when none is left
        dependencies = analyse(graph, result.shapes)
        packed = [
            item
            for item in _find(graph, dependencies)
            if only is None or any(root_of(graph, name) in only for name in item.weights)
        ]
        if not packed:
            break
        done: set[str] = set()
        for item in packed:
            if not item.path & done:  # paths that overlap wait for the next round's analysis
                _take_apart(result, dependencies, item)
                done |= item.path
        graph.drop_dead()
        unshare(graph)
        for name, array in graph.weights.items():
            result.shapes[name] = result.single[name] = array.shape
            result.dynamic[name] = (False,) * array.ndim
    tidy(result)
    return result


def _find(graph: Graph, dependencies: Dependencies) -> list[_Packed]:
    """Packed factors whose every occurrence lies between their weights and their selections."""
    facts = dependencies.facts
    produced: dict[int, list[str]] = {}
    for role in facts.roles:
        if role.kind == "producer":
            for atom in dependencies.atoms(*role.axis):
                produced.setdefault(atom, []).append(role.axis[0])
    ranges: dict[int, list[tuple[Select, int, int]]] = {}
    for select in facts.selects:
        leading = _leading(dependencies, select)
        if leading is not None and leading[0] in produced:
            ranges.setdefault(leading[0], []).append((select, leading[1], leading[2]))
    found = []
    for atom, selects in ranges.items():
        nodes = {select.node for select, _, _ in selects}
        spans = sorted({(start, stop) for _, start, stop in selects})
        apart = all(left[1] <= right[0] for left, right in pairwise(spans))
        alone = all(freeze.node in nodes for freeze in dependencies.frozen.get(atom, []))
        if not (apart and alone and len(spans) > 1) or above(atom, dependencies.stacks):
            continue
        path = _path(graph, dependencies, atom, [select.source for select, _, _ in selects])
        if path is not None:
            found.append(_Packed(atom, tuple(produced[atom]), tuple(selects), frozenset(path)))
    return found


def _leading(dependencies: Dependencies, select: Select) -> tuple[int, int, int] | None:
    """The factor a selection restricts, and to which range of it; None if its range cuts through a factor."""
    atoms = dependencies.atoms(select.source, select.axis)
    if not atoms:
        return None
    rest = int(np.prod([dependencies.size(atom) for atom in atoms[1:]]))
    if not rest or select.start % rest or select.stop % rest:
        return None
    return atoms[0], select.start // rest, select.stop // rest


def _path(graph: Graph, dependencies: Dependencies, atom: int, sources: list[str]) -> set[str] | None:
    """Names of the nodes that carry the factor to the selections; None if it goes anywhere else as well."""
    producers = graph.producers()
    nodes: set[str] = set()
    tensors: set[str] = set()
    stack = list(sources)
    while stack:
        tensor = stack.pop()
        if tensor in tensors or tensor in graph.weights:
            continue
        tensors.add(tensor)
        node = producers.get(tensor)
        if node is None:
            return None
        nodes.add(node.name)
        stack.extend(
            name
            for name in node.input
            if name in dependencies.facts.shapes and name not in graph.weights and atom in dependencies.atoms(name)
        )
    elsewhere = {place[0] for place in dependencies.places[atom]} - tensors - set(graph.weights)
    return None if elsewhere else nodes


def _take_apart(result: Normalized, dependencies: Dependencies, packed: _Packed) -> None:
    graph = result.graph
    namer = Namer(graph.names())
    order = {node.name: index for index, node in enumerate(graph.nodes)}
    path = sorted(packed.path, key=order.__getitem__)
    nodes = {node.name: node for node in graph.nodes}
    removed = {select.node for select, _, _ in packed.selects}
    insertions: dict[str, list[NodeProto]] = {}
    for number, (select, start, stop) in enumerate(packed.selects):
        cut = Cut(packed.atom, (), np.arange(start, stop)[None])
        clones = _clone(result, dependencies, [nodes[name] for name in path], cut, select, number, namer)
        insertions.setdefault(select.node, []).extend(clones)
    rebuilt: list[NodeProto] = []
    for node in graph.nodes:
        rebuilt.extend(insertions.get(node.name, []))
        if node.name not in removed:
            rebuilt.append(node)
    graph.nodes = rebuilt


def _clone(
    result: Normalized,
    dependencies: Dependencies,
    path: list[NodeProto],
    cut: Cut,
    select: Select,
    number: int,
    namer: Namer,
) -> list[NodeProto]:
    """A copy of the path that computes only what one selection takes."""
    graph = result.graph
    needed = _upstream(path, select.source)
    sizes = {cut.atom: cut.keep.shape[1]}
    names: dict[str, str] = {}
    clones = []
    for node in path:
        if node.name not in needed:
            continue
        clone = NodeProto()
        clone.CopyFrom(node)
        clone.name = namer(f"{node.name}.part{number}")
        for slot, name in enumerate(node.input):
            if name in graph.weights and cut.atom in dependencies.atoms(name):
                clone.input[slot] = _part(graph, dependencies, name, cut, namer, number)
            else:
                clone.input[slot] = names.get(name, name)
        for slot, name in enumerate(node.output):
            last = name == select.source and not select.drops_axis
            names[name] = clone.output[slot] = select.output if last else namer(f"{name}.part{number}")
            _record(result, dependencies, name, names[name], sizes)
        clones.append(clone)
    extra = _sized(graph, dependencies, clones, names, sizes)
    _record_added(result, extra)
    if select.drops_axis:
        extra.append(_squeeze(graph, names[select.source], select, namer))
    return extra


def _upstream(path: list[NodeProto], tensor: str) -> set[str]:
    made = {name: node for node in path for name in node.output}
    stack, names = [tensor], set()
    while stack:
        node = made.get(stack.pop())
        if node is not None and node.name not in names:
            names.add(node.name)
            stack.extend(node.input)
    return names


def _part(graph: Graph, dependencies: Dependencies, name: str, cut: Cut, namer: Namer, number: int) -> str:
    """Take a weight's part, and remember which part it is."""
    axes = weight_axes(dependencies, name)
    axis = next(index for index, atoms in enumerate(axes) if cut.atom in atoms)
    flat = np.arange(graph.weights[name].shape[axis])
    indices = cut_array(flat, [axes[axis]], dependencies.size, [cut])
    part = namer(f"{graph.origin.get(name, name)}.part{number}")
    graph.weights[part] = _taken(graph.weights[name], indices, axis)
    graph.parts[part] = Part(name, axis, indices)
    return part


def _taken(array: np.ndarray, indices: np.ndarray, axis: int) -> np.ndarray:
    """Entries of an axis; a view where they lie together, since packed projections are a quarter of a model."""
    if np.array_equal(indices, np.arange(indices[0], indices[0] + len(indices))):
        return array[(slice(None),) * axis + (slice(int(indices[0]), int(indices[0]) + len(indices)),)]
    return np.take(array, indices, axis=axis)


def _record(result: Normalized, dependencies: Dependencies, source: str, clone: str, sizes: dict[int, int]) -> None:
    """Sizes of a cloned tensor follow from its original's."""
    before = result.shapes[source]
    after = tuple(new_size(dependencies, source, axis, sizes) for axis in range(len(before)))
    result.shapes[clone] = after
    result.single[clone] = tuple(
        single * new // old if old != new else single
        for single, old, new in zip(result.single[source], before, after, strict=True)
    )
    result.dynamic[clone] = result.dynamic[source]


def _sized(
    graph: Graph, dependencies: Dependencies, clones: list[NodeProto], names: dict[str, str], sizes: dict[int, int]
) -> list[NodeProto]:
    """Correct the sizes the cloned operators were told; they are analysed under their originals' names."""
    back = {clone: source for source, clone in names.items()}
    wanted = [list(clone.output) for clone in clones]
    for clone in clones:
        for slot, name in enumerate(clone.output):
            clone.output[slot] = back[name]
        for slot, name in enumerate(clone.input):
            clone.input[slot] = back.get(name, name)
    view = Graph(graph.shell, list(clones), graph.weights, graph.origin, graph.parts)
    fix_sizes(view, dependencies, sizes)
    for clone, outputs in zip(clones, wanted, strict=True):
        for slot, name in enumerate(outputs):
            clone.output[slot] = name
    for node in view.nodes:
        for slot, name in enumerate(node.input):
            node.input[slot] = names.get(name, name)
    return view.nodes


def _record_added(result: Normalized, nodes: list[NodeProto]) -> None:
    """Sizes of the lists of sizes that `fix_sizes` put together for shapes computed at run time."""
    weights = result.graph.weights
    for node in nodes:
        name = node.output[0]
        if name in result.shapes:
            continue
        lengths = [len(weights[one]) if one in weights else result.shapes[one][0] for one in node.input]
        if node.op_type == "Slice":
            given = [int(weights[bound][0]) for bound in node.input[1:3]]
            start, stop = given or (attribute(node, "starts")[0], attribute(node, "ends")[0])
            length = len(range(lengths[0])[start:stop])
        else:
            length = sum(lengths)
        result.shapes[name] = result.single[name] = (length,)
        result.dynamic[name] = (False,)


def _squeeze(graph: Graph, source: str, select: Select, namer: Namer) -> NodeProto:
    name = namer(f"{select.node}.squeeze")
    if graph.opset < 13:
        return helper.make_node("Squeeze", [source], [select.output], name=name, axes=[select.axis])
    axes = namer(f"{name}.axes")
    graph.weights[axes] = np.asarray([select.axis], np.int64)
    return helper.make_node("Squeeze", [source, axes], [select.output], name=name)
