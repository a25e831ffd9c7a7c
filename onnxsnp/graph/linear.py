"""Projections as the rest of the program sees them: one weight, its two axes, its input, its bias."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import numpy as np
from onnx import NodeProto

from onnxsnp.graph.dependency import Dependencies
from onnxsnp.graph.groups import Group
from onnxsnp.graph.ir import Graph, attribute
from onnxsnp.graph.spatial import is_pointwise
from onnxsnp.graph.stacks import above


@dataclass(frozen=True)
class Linear:
    """A projection y = x W + b (MatMul, Gemm) or a convolution.

    Attributes:
        node: name of the operator.
        op: its type.
        data: name of the activation it reads.
        weight: name of its weight; `inner` and `outer` are the axes it contracts and emits.
        bias: name of its bias, if there is one, of shape [outer size] (possibly with leading axes of size 1).
        plain: y = x W + b as it stands: the input's features are its last axis, and nothing is scaled inside.
        pointwise: the same at every place of an image: a convolution of single places, whose features are axis 1.
    """

    node: str
    op: str
    data: str
    weight: str
    inner: int
    outer: int
    bias: str | None
    plain: bool = True
    pointwise: bool = False


def find_linears(graph: Graph, dependencies: Dependencies) -> dict[str, Linear]:
    """Every projection of a graph by the name of its weight."""
    consumed = {role.axis[0]: role.axis[1] for role in dependencies.facts.roles if role.kind == "consumer"}
    emitted = {role.axis[0]: role.axis[1] for role in dependencies.facts.roles if role.kind == "producer"}
    readers = graph.readers()
    found = {}
    for node in graph.nodes:
        for slot, name in enumerate(node.input[:2]):
            if name in consumed and name in emitted and name in graph.weights:
                found[name] = Linear(
                    node.name,
                    node.op_type,
                    node.input[1 - slot],
                    name,
                    consumed[name],
                    emitted[name],
                    _bias(graph, node, emitted[name], name, readers),
                    _is_plain(node, slot),
                    node.op_type == "Conv" and is_pointwise(node, graph.weights[name].shape),
                )
    return found


def _is_plain(node: NodeProto, slot: int) -> bool:
    if node.op_type == "MatMul":
        return slot == 1
    unscaled = attribute(node, "alpha", 1.0) == 1.0 and attribute(node, "beta", 1.0) == 1.0
    return node.op_type == "Gemm" and slot == 1 and not attribute(node, "transA", 0) and unscaled


def _bias(
    graph: Graph, node: NodeProto, outer: int, weight: str, readers: Mapping[str, list[tuple[NodeProto, int]]]
) -> str | None:
    """The operator's own bias, or the constant that its only reader adds."""
    if node.op_type in ("Gemm", "Conv"):
        held = graph.weights.get(node.input[2]) if len(node.input) > 2 else None
        return node.input[2] if held is not None and held.size == graph.weights[weight].shape[outer] else None
    after = readers.get(node.output[0], [])
    if len(after) != 1 or after[0][0].op_type != "Add":
        return None
    other = next((name for name in after[0][0].input if name != node.output[0]), "")
    size = graph.weights[weight].shape[outer]
    held = graph.weights.get(other)
    return other if held is not None and held.size == size == held.shape[-1] else None


def neuron_matrix(graph: Graph, dependencies: Dependencies, group: Group, weight: str) -> np.ndarray:
    """A weight with one row per neuron of a group.

    Returns:
        [heads * size, everything else], heads outermost, float64.
    """
    labels: list[int | None] = []
    shape: list[int] = []
    array = graph.weights[weight]
    for axis in range(array.ndim):
        atoms = dependencies.atoms(weight, axis)
        labels.extend(atoms or (None,))
        shape.extend([dependencies.size(atom) for atom in atoms] or [array.shape[axis]])
    first = [labels.index(atom) for atom in (*group.head_atoms, group.atom)]
    order = first + [index for index in range(len(labels)) if index not in first]
    view = np.asarray(array).reshape(shape).transpose(order)
    return view.reshape(group.heads * group.size, -1).astype(np.float64)


def stacked_places(dependencies: Dependencies, group: Group, whole: int) -> np.ndarray:
    """Where a group's neurons lie in a factor that they are stacked into, alone or within another one.

    Returns:
        [heads * size, n] indices; heads that lie on another axis share theirs.
    """
    found, start = [], 0
    for run in dependencies.stacks[whole].parts:
        shape = [dependencies.size(atom) for atom in run]
        view = np.arange(start, start + prod(shape)).reshape(shape)
        inner = next((atom for atom in run if atom in above(group.atom, dependencies.stacks)), None)
        if group.atom in run:
            first = [run.index(atom) for atom in (*group.head_atoms, group.atom) if atom in run]
            order = first + [index for index in range(len(run)) if index not in first]
            flat = view.transpose(order).reshape(prod(shape[index] for index in first), -1)
            found.append(np.tile(flat, (group.heads * group.size // len(flat), 1)))
        elif inner is not None:
            places = stacked_places(dependencies, group, inner)
            found.append(np.moveaxis(view, run.index(inner), 0)[places].reshape(len(places), -1))
        start += prod(shape)
    return np.concatenate(found, axis=1)


def neuron_places(graph: Graph, dependencies: Dependencies, group: Group, weight: str, axis: int) -> np.ndarray:
    """Where a group's neurons lie along a weight axis.

    Returns:
        [heads, size] indices into the axis.
    """
    atoms = dependencies.atoms(weight, axis)
    view = np.arange(graph.weights[weight].shape[axis]).reshape([dependencies.size(atom) for atom in atoms])
    first = [atoms.index(atom) for atom in (*group.head_atoms, group.atom)]
    order = first + [index for index in range(len(atoms)) if index not in first]
    return view.transpose(order).reshape(group.heads, group.size)


def block_places(graph: Graph, dependencies: Dependencies, group: Group, weight: str, axis: int) -> np.ndarray:
    """Where everything that goes with each of a group's indices lies along a weight axis.

    Of a head group: the neurons of each head, whatever other factors (queries that share a key, say) they have.

    Returns:
        [size, neurons] indices into the axis.
    """
    atoms = dependencies.atoms(weight, axis)
    view = np.arange(graph.weights[weight].shape[axis]).reshape([dependencies.size(atom) for atom in atoms])
    return np.moveaxis(view, atoms.index(group.atom), 0).reshape(group.size, -1)
