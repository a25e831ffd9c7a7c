"""Apply a plan to a model: a pure function from (model, plan, refitted weights) to a smaller model."""

from __future__ import annotations

from collections import ChainMap, Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx

from onnxsnp.graph.axes import Axis
from onnxsnp.graph.groups import Group, find_groups
from onnxsnp.graph.ir import Graph
from onnxsnp.graph.pairs import analyse_in_pairs
from onnxsnp.graph.probe import infer_shapes
from onnxsnp.graph.sharing import identity
from onnxsnp.graph.tables import merge_copies
from onnxsnp.planning.plan import Plan, as_cuts, check_plan
from onnxsnp.surgery.rewrite import Cut, cut_graph, spread
from onnxsnp.surgery.unpack import packed_sources, put_back, root_of, unpack

if TYPE_CHECKING:
    from onnxsnp.analysis import Analysis


@dataclass
class Applied:
    """A cut model and what the proof needs to check it.

    Attributes:
        graph: the cut graph.
        cuts: in the terms of the analysis' own graph.
        updates: the refitted weights that went in.
    """

    graph: Graph
    cuts: list[Cut]
    updates: dict[str, np.ndarray]


def apply(
    analysis: Analysis, plan: Plan, updates: Mapping[str, np.ndarray] | None = None, fingerprint: str | None = None
) -> Applied:
    """Cut what the plan says.

    Only those packed projections are taken apart that a cut needs; the rest of the graph stays as it was exported,
    apart from folded constants.

    Args:
        updates: refitted weights in their original shapes, by name.
        fingerprint: of the model, to check that the plan was made for it; not checked if None.

    Raises:
        PlanError: the plan does not fit the model.
    """
    check_plan(plan, analysis.groups, fingerprint or plan.model)
    cuts = as_cuts(plan, analysis.groups)
    needed = _packed_weights_to_part(analysis, cuts)
    graph, dependencies, groups = analysis.graph, analysis.dependencies, analysis.groups
    if needed < packed_sources(graph).keys():
        part = unpack(analysis.packed, needed)
        graph, dependencies = part.graph, analyse_in_pairs(part.graph, part.shapes)
        # numbers in group names may differ where fewer projections are apart; what emits a group does not
        found = {(group.kind, group.producers): group for group in find_groups(graph, dependencies).groups}
        groups = {
            entry.id: found[_emitters(analysis.groups[entry.id])] for entry in plan.groups if entry.kept < entry.size
        }
    local = as_cuts(plan, groups)
    cut = cut_graph(graph, dependencies, local, _as_packed(analysis.graph, graph, updates or {}))
    cut.drop_dead()
    return Applied(cut, cuts, dict(updates or {}))


def _as_packed(graph: Graph, packed: Graph, updates: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Refitted weights of the analysed graph by the names they have where fewer projections are apart."""
    written = ChainMap[str, np.ndarray]({}, packed.weights)
    for name, array in updates.items():
        if name in packed.weights:
            written[name] = array
        elif root_of(graph, name) in packed.weights:
            put_back(written, graph, name, array)
    return dict(written.maps[0])


def _emitters(group: Group) -> tuple[str, tuple[Axis, ...]]:
    return group.kind, group.producers


def _packed_weights_to_part(analysis: Analysis, cuts: Sequence[Cut]) -> set[str]:
    """Packed weights of the file in which a cut runs along the packed axis."""
    atoms = {cut.atom for cut in spread(analysis.dependencies, cuts)}
    return {
        root_of(analysis.graph, name)
        for name, part in analysis.graph.parts.items()
        if name in analysis.graph.weights  # and not taken apart itself
        and atoms & set(analysis.dependencies.atoms(name, part.axis))
    }


def finished(graph: Graph) -> Graph:
    """The graph as it is written: shared weights shared again, tensor shapes recorded."""
    graph = graph.copy()
    _share(graph)
    merge_copies(graph)
    inferred = infer_shapes(graph.skeleton(), data_prop=True)
    shell = onnx.ModelProto()
    shell.CopyFrom(graph.shell)
    del shell.graph.value_info[:]  # of a graph that was finished before
    shell.graph.value_info.extend(inferred.graph.value_info)
    graph.shell = shell
    return graph


def to_model(graph: Graph) -> onnx.ModelProto:
    """The finished model, weights inside."""
    return finished(graph).to_proto()


def _share(graph: Graph) -> None:
    """Give weights that came from one initializer, and are still equal, one name again."""
    canonical: dict[tuple[object, ...], str] = {}
    rename: dict[str, str] = {}
    sources = {name: identity(graph, name) for name in graph.weights}
    uses = Counter(sources.values())
    for name, array in graph.weights.items():
        if uses[sources[name]] > 1:
            key = (sources[name], str(array.dtype), array.shape, array.tobytes())
            rename[name] = canonical.setdefault(key, name)
    for node in graph.nodes:
        for slot, name in enumerate(node.input):
            node.input[slot] = rename.get(name, name)
    graph.drop_dead()
