"""The layers of a model one at a time: cut out of the graph at any width of their group, and timed.

The layer of a group is every operator in which the group's factor occurs. Nothing that enters or leaves it depends on
the group's width, so a layer can be timed on its own, and what it saves is what the model saves. What to measure
(`find_layers`, `layer_models`), where (a `Timer`) and what for (`onnxsnp.planning.latency`) know nothing of each other.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import onnx
from onnx import NodeProto, helper

from onnxsnp.evaluation.latency import bench_inputs, rounds_for
from onnxsnp.graph.dependency import Dependencies
from onnxsnp.graph.groups import Group
from onnxsnp.graph.inputs import graph_inputs
from onnxsnp.graph.ir import Graph
from onnxsnp.graph.stacks import above
from onnxsnp.surgery.rewrite import Cut, cut_graph

if TYPE_CHECKING:
    from onnxsnp.analysis import Analysis

_SECONDS, _LEAST, _MOST = 3.0, 7, 100  # time for models side by side, and the rounds that this may be


@dataclass(frozen=True)
class Layer:
    """The operators whose work depends on the width of one group.

    Attributes:
        signature: digest of operators, attributes and tensor sizes; equal layers take equal time.
        group: the group, or the first of several with this signature.
        nodes: names of the operators.
        inputs, outputs: tensors that enter from and leave to the rest of the graph; weights do not count.
    """

    signature: str
    group: Group
    nodes: frozenset[str]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class TimedModel:
    """A model to be timed, on this machine or another one.

    Attributes:
        graph: a complete graph; `Graph.to_proto` makes a file of it.
        inputs: what to run it on, one sample.
    """

    graph: Graph
    inputs: dict[str, np.ndarray]


class Timer(Protocol):
    """Milliseconds of every run, [rounds, models], of models that are measured side by side, wherever that is."""

    def __call__(
        self, models: Sequence[TimedModel], progress: Callable[[int, int], None] | None = None
    ) -> np.ndarray: ...


def find_layers(analysis: Analysis, groups: Iterable[Group]) -> dict[str, Layer]:
    """The layer of each group, by group id."""
    graph, dependencies = analysis.graph, analysis.dependencies
    read: dict[str, set[str]] = {}
    for node in graph.nodes:
        for name in node.input:
            read.setdefault(name, set()).add(node.name)
    found = {}
    for group in groups:
        mine = [group.atom, *above(group.atom, dependencies.stacks)]
        tensors = {place[0] for atom in mine for place in dependencies.places[atom]}
        nodes = [node for node in graph.nodes if tensors.intersection([*node.input, *node.output])]
        names = frozenset(node.name for node in nodes)
        made = [name for node in nodes for name in node.output if name]
        outside = {name: None for node in nodes for name in node.input if name and name not in graph.weights}
        inputs = tuple(name for name in outside if name not in made)
        outputs = tuple(name for name in made if name in graph.outputs or read.get(name, set()) - names)
        signature = layer_signature(nodes, dependencies, analysis.normalized.single, group)
        found[group.id] = Layer(signature, group, names, inputs, outputs)
    return found


def layer_signature(
    nodes: Sequence[NodeProto],
    dependencies: Dependencies,
    single: Mapping[str, tuple[int, ...]],
    group: Group | None = None,
) -> str:
    """A digest of operators, their attributes, how they are connected, and tensor sizes; names and values do not count.

    Args:
        single: tensor sizes at batch 1.
        group: whose place in the sizes counts too (which axes shrink with it).
    """
    numbers: dict[str, int] = {"": -1}

    def tensor(name: str) -> list[Any]:
        known = name in numbers
        number = numbers.setdefault(name, len(numbers))
        if known or name not in single:
            return [number]
        atom = group.atom if group is not None and name in dependencies.facts.shapes else None
        places = [
            [dependencies.size(one) if one != atom else "cut" for one in dependencies.atoms(name, axis)]
            for axis in range(len(single[name]) if atom is not None else 0)
            if atom in dependencies.atoms(name, axis)
        ]
        return [number, single[name], places]

    content = [group and [group.size, group.heads]] + [
        [
            node.op_type,
            sorted(entry.SerializeToString(deterministic=True).hex() for entry in node.attribute),
            [tensor(name) for name in node.input],
            [tensor(name) for name in node.output],
        ]
        for node in nodes
    ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def model_signature(analysis: Analysis) -> str:
    """The digest of the whole graph, equal for models that differ only in names and values."""
    return layer_signature(analysis.graph.nodes, analysis.dependencies, analysis.normalized.single)


def width_grid(size: int, multiple: int = 1, steps: int = 8) -> list[int]:
    """Widths to measure: even steps to the full size, one small width, all of them multiples where that is asked."""
    wanted = [size / (2 * steps), *(size * step / steps for step in range(1, steps))]
    least = min(multiple, size)
    return sorted({size, *(min(size, max(least, round(width / multiple) * multiple)) for width in wanted)})


def layer_model(analysis: Analysis, layer: Layer, width: int, values: Mapping[str, np.ndarray]) -> TimedModel:
    """One layer with a narrower group: the same inputs and outputs, weights shared or cut.

    Args:
        width: neurons kept (per head); the first ones.
        values: the layer's inputs and outputs in a run of the whole model (`boundary_values`).
    """
    graph, group = analysis.graph, layer.group
    keep = np.tile(np.arange(width), (group.heads, 1))
    cuts = [Cut(group.atom, group.head_atoms, keep)] if width < group.size else []
    cut = cut_graph(graph, analysis.dependencies, cuts)
    known = {node.name for node in graph.nodes}
    nodes = [node for node in cut.nodes if node.name in layer.nodes or node.name not in known]  # and what the cut added
    read = {name for node in nodes for name in node.input}
    shell = onnx.ModelProto(ir_version=graph.shell.ir_version, opset_import=graph.shell.opset_import)
    shell.graph.name = "layer"
    shell.graph.input.extend(_described(name, values[name]) for name in layer.inputs)
    shell.graph.output.extend(_described(name, values[name]) for name in layer.outputs)
    weights = {name: array for name, array in cut.weights.items() if name in read}
    return TimedModel(Graph(shell, nodes, weights), {name: values[name] for name in layer.inputs})


def _described(name: str, array: np.ndarray) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)


def sample_inputs(analysis: Analysis, seed: int = 0) -> dict[str, np.ndarray]:
    """Generated inputs of one sample (of as many as the model fixes)."""
    sizes = {name: analysis.normalized.single[name] for name in analysis.graph.inputs}
    return bench_inputs(graph_inputs(analysis.graph), 1, sizes, seed)


def samples_per_run(analysis: Analysis) -> int:
    """1, or the batch that the model fixes."""
    leading = {
        analysis.normalized.single[name][0] for name in analysis.graph.inputs if analysis.normalized.single[name]
    }
    return leading.pop() if len(leading) == 1 else 1


def boundary_values(
    analysis: Analysis, layers: Iterable[Layer], inputs: Mapping[str, np.ndarray], threads: int | None = None
) -> dict[str, np.ndarray]:
    """Everything that enters or leaves layers in a run of the whole model.

    Real values, since a shape that a layer reads cannot be made up.
    """
    needed = {name for layer in layers for name in (*layer.inputs, *layer.outputs)} - inputs.keys()
    names = sorted(needed)
    session = analysis.graph.session(names, threads=threads, optimize=False)
    return {**inputs, **dict(zip(names, session.run(None, inputs), strict=True))}


def local_timer(threads: int | None = None, provider: str = "cpu", seconds: float = _SECONDS) -> Timer:
    """Time in onnxruntime on this machine, in interleaved rounds after a warm-up.

    Args:
        seconds: for one call, roughly; at least a few rounds are run however long they take.
    """

    def timed(models: Sequence[TimedModel], progress: Callable[[int, int], None] | None = None) -> np.ndarray:
        sessions = [model.graph.timed_session(threads=threads, provider=provider) for model in models]
        runners = [partial(session.run, None, model.inputs) for session, model in zip(sessions, models, strict=True)]
        return rounds_for(runners, seconds, _LEAST, _MOST, progress)

    return timed
