"""Cut factors out of a graph: slice every weight they occur in and correct the sizes operators were told.

All of it follows from the axis algebra. A weight is viewed with one dimension per factor, the kept indices are taken
along the cut factor (per head where indices are chosen per head), and the dimensions are joined back into axes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from onnx import NodeProto, helper

from onnxsnp.graph.dependency import Dependencies
from onnxsnp.graph.ir import Graph, Namer, attribute, set_attribute
from onnxsnp.graph.silence import divisor
from onnxsnp.graph.stacks import bottom_up


@dataclass(frozen=True)
class Cut:
    """Keep only some indices of one factor.

    Attributes:
        atom: the factor.
        head_atoms: factors over which the kept indices differ, major first; empty if they do not.
        keep: [product of the head factors' sizes, kept] ascending indices; the first axis is 1 without head factors.
    """

    atom: int
    head_atoms: tuple[int, ...]
    keep: np.ndarray


def in_order(cuts: Sequence[Cut]) -> list[Cut]:
    """Cuts in the order in which they must be applied: sizes inside heads before the heads themselves."""
    heads = {head for cut in cuts for head in cut.head_atoms}
    return sorted(cuts, key=lambda cut: cut.atom in heads)


def spread(dependencies: Dependencies, cuts: Sequence[Cut]) -> list[Cut]:
    """The cuts, and what they take from stacked factors: there each part keeps what it keeps by itself."""
    found = list(cuts)
    for whole in bottom_up(dependencies.stacks):
        parts = dependencies.stacks[whole].parts
        mine = [[cut for cut in found if cut.atom in run] for run in parts]
        if not any(mine) or any(cut.atom == whole for cut in found):
            continue
        # heads beside the stacked axis: what is kept along it may differ between them
        pairs = [(head, run) for run, own in zip(parts, mine, strict=True) for cut in own for head in cut.head_atoms]
        heads = tuple(dict.fromkeys(head for head, run in pairs if head not in run))
        shape, kept, start = [dependencies.size(head) for head in heads], [], 0
        for run, own in zip(parts, mine, strict=True):
            size = int(np.prod([dependencies.size(atom) for atom in run]))
            places = np.broadcast_to(np.arange(start, start + size), (*shape, size))
            kept.append(cut_array(places, [*((head,) for head in heads), run], dependencies.size, own))
            start += size
        found.append(Cut(whole, heads, np.concatenate(kept, axis=-1).reshape(int(np.prod(shape)), -1)))
    return found


def cut_array(
    array: np.ndarray, axes: Sequence[tuple[int, ...]], size: Callable[[int], int], cuts: Sequence[Cut]
) -> np.ndarray:
    """The entries of a weight that stay.

    Args:
        array: the weight.
        axes: the factors of each of its axes, major first.
        size: size of a factor before the cut.
    """
    labels, view = _by_factor(array, axes, size)
    for cut in in_order(cuts):
        for position in [index for index, label in enumerate(labels) if label == cut.atom]:
            view = np.take_along_axis(view, _index(labels, view.shape, cut, position), axis=position)
    return view.reshape(_joined(view.shape, axes))


def mask_array(
    array: np.ndarray, axes: Sequence[tuple[int, ...]], size: Callable[[int], int], cuts: Sequence[Cut]
) -> np.ndarray:
    """The weight in its original shape, with zeros where `cut_array` would take entries away."""
    labels, view = _by_factor(array, axes, size)
    for cut in cuts:
        for position in [index for index, label in enumerate(labels) if label == cut.atom]:
            index = _index(labels, view.shape, cut, position)
            kept = np.zeros([n if axis != position else view.shape[axis] for axis, n in enumerate(index.shape)], bool)
            np.put_along_axis(kept, index, True, axis=position)
            view = np.where(kept, view, np.zeros((), view.dtype))
    return view.reshape(array.shape)


def _by_factor(
    array: np.ndarray, axes: Sequence[tuple[int, ...]], size: Callable[[int], int]
) -> tuple[list[int | None], np.ndarray]:
    """The array with one dimension per factor (an axis of size 1 keeps a dimension without a label)."""
    labels: list[int | None] = []
    shape: list[int] = []
    for axis, atoms in enumerate(axes):
        labels.extend(atoms or (None,))
        shape.extend([size(atom) for atom in atoms] or [array.shape[axis]])
    return labels, np.asarray(array).reshape(shape)


def _index(labels: Sequence[int | None], shape: Sequence[int], cut: Cut, position: int) -> np.ndarray:
    """Kept indices shaped for take_along_axis: the head dimensions and the cut one, 1 elsewhere."""
    if not cut.head_atoms:
        return cut.keep[0].reshape([-1 if axis == position else 1 for axis in range(len(shape))])
    places = [labels.index(head) for head in cut.head_atoms]
    keep = cut.keep.reshape([shape[place] for place in places] + [cut.keep.shape[1]])
    order = sorted(range(len(places)), key=places.__getitem__)
    before = sum(places[item] < position for item in order)
    sequence = [*order[:before], len(places), *order[before:]]
    target = [
        shape[axis] if axis in places else cut.keep.shape[1] if axis == position else 1 for axis in range(len(shape))
    ]
    return keep.transpose(sequence).reshape(target)


def _joined(shape: Sequence[int], axes: Sequence[tuple[int, ...]]) -> list[int]:
    sizes, start = [], 0
    for atoms in axes:
        count = max(len(atoms), 1)
        sizes.append(int(np.prod(shape[start : start + count])))
        start += count
    return sizes


def weight_axes(dependencies: Dependencies, name: str) -> list[tuple[int, ...]]:
    """The factors of each axis of a weight."""
    return [dependencies.atoms(name, axis) for axis in range(len(dependencies.facts.shapes[name]))]


def touched(dependencies: Dependencies, name: str, cuts: Sequence[Cut]) -> list[Cut]:
    """Those of the cuts whose factor occurs in a tensor."""
    if name not in dependencies.facts.shapes:
        return []
    atoms = set(dependencies.atoms(name))
    return [cut for cut in cuts if cut.atom in atoms]


def mask_weights(
    graph: Graph, dependencies: Dependencies, cuts: Sequence[Cut], updates: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The weights of a graph that a cut changes, in their original shapes, zero where something is cut.

    Divisors keep their values: a zero there would not silence a neuron but make it infinite.

    Args:
        updates: weights that replace the graph's own first (a refit), in their original shapes.
    """
    divisors = {divisor(node, graph.weights) for node in graph.nodes}
    weights = dict(updates)
    cuts = spread(dependencies, cuts)
    for name in graph.weights.keys() - divisors:
        mine = touched(dependencies, name, cuts)
        if mine:
            array = updates.get(name, graph.weights[name])
            weights[name] = mask_array(array, weight_axes(dependencies, name), dependencies.size, mine)
    return weights


def cut_graph(
    graph: Graph, dependencies: Dependencies, cuts: Sequence[Cut], updates: Mapping[str, np.ndarray] | None = None
) -> Graph:
    """A new graph without the cut neurons; the given one is not changed.

    Args:
        graph: the graph `dependencies` was made from.
        cuts: what to keep of each factor.
        updates: weights that replace the graph's own before the cut (a refit), in the original shapes.
    """
    reduced = graph.copy()
    reduced.weights.update(updates or {})
    cuts = spread(dependencies, cuts)
    sizes = {cut.atom: cut.keep.shape[1] for cut in cuts}
    read = {name for node in graph.nodes for name in node.input}
    for name in graph.weights.keys() & read:
        mine = touched(dependencies, name, cuts)
        if mine:
            reduced.weights[name] = cut_array(
                reduced.weights[name], weight_axes(dependencies, name), dependencies.size, mine
            )
    fix_sizes(reduced, dependencies, sizes)
    return reduced


def fix_sizes(graph: Graph, dependencies: Dependencies, sizes: Mapping[int, int]) -> None:
    """Correct, in place, what operators were told about the sizes of cut factors."""
    namer = Namer(graph.names())
    added: list[tuple[NodeProto, list[NodeProto]]] = []
    for node in graph.nodes:
        if node.op_type in _FIXES and node.output[0] in dependencies.facts.shapes:
            extra = _FIXES[node.op_type](node, graph, dependencies, sizes, namer)
            if extra:
                added.append((node, extra))
    for node, extra in added:
        at = next(index for index, other in enumerate(graph.nodes) if other is node)
        graph.nodes[at:at] = extra


def new_size(dependencies: Dependencies, tensor: str, axis: int, sizes: Mapping[int, int]) -> int:
    """Size of a tensor axis after the cut."""
    atoms = dependencies.atoms(tensor, axis)
    if not atoms:
        return dependencies.facts.shapes[tensor][axis]
    return int(np.prod([sizes.get(atom, dependencies.size(atom)) for atom in atoms]))


_Fix = Callable[[NodeProto, Graph, Dependencies, Mapping[int, int], Namer], list[NodeProto]]


def _changed_axes(dependencies: Dependencies, tensor: str, sizes: Mapping[int, int]) -> dict[int, int]:
    return {
        axis: new_size(dependencies, tensor, axis, sizes)
        for axis in range(len(dependencies.facts.shapes[tensor]))
        if any(atom in sizes for atom in dependencies.atoms(tensor, axis))
    }


def _fix_reshape(
    node: NodeProto, graph: Graph, dependencies: Dependencies, sizes: Mapping[int, int], namer: Namer
) -> list[NodeProto]:
    changed = _changed_axes(dependencies, node.output[0], sizes)
    if changed and node.input[1] not in graph.weights:
        changed = _with_free_size(node.output[0], graph, dependencies, changed)
    return _pin(node, graph, changed, namer) if changed else []


def _with_free_size(
    tensor: str, graph: Graph, dependencies: Dependencies, changed: Mapping[int, int]
) -> dict[int, int]:
    """The sizes to write where a changed axis holds the batch too (B·H): -1 there, and a number wherever one is known.

    Whether the size that is computed for such an axis counts the cut already is not known, but the others give it.
    """
    symbolic = {
        atom
        for value in graph.shell.graph.input
        for axis, dim in enumerate(value.type.tensor_type.shape.dim)
        if not dim.dim_value
        for atom in dependencies.atoms(value.name, axis)
    }
    shape = dependencies.facts.shapes[tensor]
    free = {axis for axis in range(len(shape)) if symbolic & set(dependencies.atoms(tensor, axis))}
    held = free & changed.keys()
    if len(held) != 1:
        return dict(changed)
    known = {axis: changed.get(axis, size) for axis, size in enumerate(shape) if axis not in free}
    return known | dict.fromkeys(held, -1)


def _fix_expand(
    node: NodeProto, graph: Graph, dependencies: Dependencies, sizes: Mapping[int, int], namer: Namer
) -> list[NodeProto]:
    shapes = dependencies.facts.shapes
    shift = len(shapes[node.output[0]]) - len(shapes[node.input[0]])
    changed = _changed_axes(dependencies, node.output[0], sizes)
    for axis in changed:
        if axis >= shift and shapes[node.input[0]][axis - shift] == shapes[node.output[0]][axis]:
            changed[axis] = 1  # the data has the size already; 1 leaves it
    return _pin(node, graph, changed, namer) if changed else []


def _fix_filled(
    node: NodeProto, graph: Graph, dependencies: Dependencies, sizes: Mapping[int, int], namer: Namer
) -> list[NodeProto]:
    changed = _changed_axes(dependencies, node.output[0], sizes)
    return _pin(node, graph, changed, namer, slot=0) if changed else []


def _fix_resize(
    node: NodeProto, graph: Graph, dependencies: Dependencies, sizes: Mapping[int, int], namer: Namer
) -> list[NodeProto]:
    """Sizes are given for all axes or for some of them; scales stay what they are."""
    if len(node.input) < 4 or not node.input[3]:
        return []
    rank = len(dependencies.facts.shapes[node.output[0]])
    axes = [axis % rank for axis in attribute(node, "axes", range(rank))]
    changed = _changed_axes(dependencies, node.output[0], sizes)
    places = {axes.index(axis): size for axis, size in changed.items() if axis in axes}
    return _pin(node, graph, places, namer, slot=3) if places else []


def _pin(node: NodeProto, graph: Graph, changed: Mapping[int, int], namer: Namer, slot: int = 1) -> list[NodeProto]:
    """Write sizes into a shape operand; where it is computed at run time, join its other parts around them."""
    shape = node.input[slot]
    if shape in graph.weights:
        values = np.array(graph.weights[shape], np.int64)
        for axis, size in changed.items():
            if values[axis] > 0:
                values[axis] = size
        name = namer(f"{shape}.cut")
        graph.weights[name] = values
        node.input[slot] = name
        return []
    pieces, extra = [], []
    start = 0
    end: int | None = None
    for place in [*sorted(changed), end]:
        stop = place if place is not None else 2**31 - 1
        if stop > start:
            pieces.append(namer(f"{node.name}.sizes"))
            extra.append(_part(shape, start, stop, pieces[-1], graph, namer))
        if place is not None:
            pieces.append(namer(f"{node.name}.size"))
            graph.weights[pieces[-1]] = np.asarray([changed[place]], np.int64)
            start = place + 1
    joined = namer(f"{node.name}.shape")
    extra.append(helper.make_node("Concat", pieces, [joined], name=joined, axis=0))
    node.input[slot] = joined
    return extra


def _part(shape: str, start: int, stop: int, name: str, graph: Graph, namer: Namer) -> NodeProto:
    """A Slice of a vector, in the form that the opset has."""
    if graph.opset < 10:
        return helper.make_node("Slice", [shape], [name], name=name, starts=[start], ends=[stop], axes=[0])
    bounds = []
    for value in (start, stop):
        bounds.append(namer(f"{name}.bound"))
        graph.weights[bounds[-1]] = np.asarray([value], np.int64)
    return helper.make_node("Slice", [shape, *bounds], [name], name=name)


def _fix_conv(
    node: NodeProto, graph: Graph, dependencies: Dependencies, sizes: Mapping[int, int], namer: Namer
) -> list[NodeProto]:
    """A depthwise convolution has as many groups as channels."""
    data = node.input[0]
    for entry in node.attribute:
        if entry.name == "group" and entry.i > 1 and any(atom in sizes for atom in dependencies.atoms(data, 1)):
            set_attribute(node, "group", new_size(dependencies, data, 1, sizes))
            break
    return []


def _fix_attention(
    node: NodeProto, graph: Graph, dependencies: Dependencies, sizes: Mapping[int, int], namer: Namer
) -> list[NodeProto]:
    """Attention on operands whose heads lie side by side is told how many there are."""
    for slot, name in enumerate(("q_num_heads", "kv_num_heads")):
        heads = (f"{node.name}|{node.input[slot]}", 0)
        if heads in dependencies.facts.virtual:
            atoms = dependencies.atoms(*heads)
            set_attribute(node, name, int(np.prod([sizes.get(atom, dependencies.size(atom)) for atom in atoms])))
    return []


def _fix_slice(
    node: NodeProto, graph: Graph, dependencies: Dependencies, sizes: Mapping[int, int], namer: Namer
) -> list[NodeProto]:
    """Bounds on a cut axis count blocks of it (see `graph.blocks`), so they shrink as the axis does.

    Where every n-th index is taken, the first bound lies within the first n, and the last behind the end.
    """
    data = node.input[0]
    shape, changed = dependencies.facts.shapes[data], _changed_axes(dependencies, data, sizes)
    if not changed:
        return []

    def moved(bounds: np.ndarray, axes: np.ndarray) -> np.ndarray:
        found = []
        for place, (bound, axis) in enumerate(zip(bounds.tolist(), (axes % len(shape)).tolist(), strict=True)):
            inside = axis in changed and -shape[axis] <= bound <= shape[axis] and steps[place] == 1
            found.append(bound * changed[axis] // shape[axis] if inside else bound)
        return np.asarray(found, np.int64)

    steps = [1] * len(shape)
    if len(node.input) < 2:  # before opset 10
        axes = np.asarray(attribute(node, "axes") or range(len(attribute(node, "starts"))))
        for name in ("starts", "ends"):
            set_attribute(node, name, moved(np.asarray(attribute(node, name)), axes).tolist())
        return []
    count = dependencies.facts.shapes[node.input[1]][0]
    axes = graph.weights[node.input[3]] if len(node.input) > 3 and node.input[3] else np.arange(count)
    if len(node.input) > 4 and node.input[4]:
        steps = graph.weights[node.input[4]].tolist()
    for slot in (1, 2):
        if node.input[slot] in graph.weights:
            bounds = graph.weights[node.input[slot]]
            name = namer(f"{node.input[slot]}.cut")
            graph.weights[name] = moved(bounds, axes).astype(bounds.dtype)
            node.input[slot] = name
    return []


def _fix_split(
    node: NodeProto, graph: Graph, dependencies: Dependencies, sizes: Mapping[int, int], namer: Namer
) -> list[NodeProto]:
    axis = attribute(node, "axis", 0) % len(dependencies.facts.shapes[node.input[0]])
    if axis not in _changed_axes(dependencies, node.input[0], sizes):
        return []
    fresh = [new_size(dependencies, name, axis, sizes) for name in node.output]
    if len(node.input) > 1 and node.input[1]:
        name = namer(f"{node.input[1]}.cut")
        graph.weights[name] = np.asarray(fresh, np.int64)
        node.input[1] = name
    elif attribute(node, "split") is not None:
        set_attribute(node, "split", fresh)
    return []


_FIXES: dict[str, _Fix] = {
    "Attention": _fix_attention,
    "Reshape": _fix_reshape,
    "Expand": _fix_expand,
    "Conv": _fix_conv,
    "Resize": _fix_resize,
    "ConstantOfShape": _fix_filled,
    "Slice": _fix_slice,
    "Split": _fix_split,
}
