"""A model together with everything the read-only analysis knows about it; what `onnxsnp inspect` shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import onnx

from onnxsnp import model as model_files
from onnxsnp.evaluation.cost import CostModel, cost_model
from onnxsnp.graph.dependency import Dependencies
from onnxsnp.graph.gains import GainSite
from onnxsnp.graph.groups import Group, Structure, find_groups
from onnxsnp.graph.ir import Graph
from onnxsnp.graph.linear import Linear, find_linears
from onnxsnp.graph.normalize import Normalized, as_graph, normalize
from onnxsnp.graph.pairs import analyse_in_pairs
from onnxsnp.graph.sharing import shared_matrices
from onnxsnp.model import Model
from onnxsnp.reconstruction.full import Rotations, find_rotations
from onnxsnp.reconstruction.gains import find_gains
from onnxsnp.surgery.unpack import unpack


@dataclass
class Analysis:
    """One model, normalised, with its groups and its cost.

    Attributes:
        model: as read.
        packed: normalised, projections as exported.
        normalized: normalised, packed projections taken apart; `structure` refers to its graph.
        structure: attention sites, groups, and what was not understood.
        cost: multiply-accumulates and parameters as functions of group sizes.
    """

    model: Model
    packed: Normalized
    normalized: Normalized
    structure: Structure
    cost: CostModel

    @property
    def graph(self) -> Graph:
        """The graph that plans and cuts refer to."""
        return self.normalized.graph

    @property
    def dependencies(self) -> Dependencies:
        return self.structure.dependencies

    @cached_property
    def groups(self) -> dict[str, Group]:
        """Groups by id."""
        return {group.id: group for group in self.structure.groups}

    @cached_property
    def linears(self) -> dict[str, Linear]:
        """Projections by the name of their weight."""
        return find_linears(self.graph, self.dependencies)

    @cached_property
    def shared_inputs(self) -> list[set[str]]:
        """Activations that are read through the same weight of the file, for each such weight."""
        return [{self.linears[name].data for name in names} for names in shared_matrices(self.graph, self.linears)]

    @cached_property
    def original(self) -> Graph:
        """The model as it was read, for comparison."""
        return as_graph(self.model)

    @cached_property
    def rotations(self) -> Rotations:
        """The attention groups that allow a change of basis."""
        return find_rotations(self)

    @cached_property
    def gains(self) -> dict[str, GainSite]:
        """By id, the query-key groups that allow no change of basis but a gain per pair."""
        return find_gains(self)


def analyse_model(
    source: str | Path | onnx.ModelProto | Model, input_shapes: Mapping[str, Sequence[int]] | None = None
) -> Analysis:
    """Read a model and find its structure.

    Args:
        source: a path or a model in memory.
        input_shapes: full input shapes by name, where symbolic sizes cannot be guessed.

    Raises:
        ModelError: the model cannot be read or run.
    """
    model = model_files.load(source)
    packed = normalize(model, input_shapes)
    normalized = unpack(packed)
    dependencies = analyse_in_pairs(normalized.graph, normalized.shapes)
    structure = find_groups(normalized.graph, dependencies)
    return Analysis(model, packed, normalized, structure, cost_model(normalized.graph, dependencies, normalized.single))


@dataclass(frozen=True)
class Inspection:
    """What `inspect` reports; `to_dict` has the fields of the JSON contract."""

    params: int
    macs: int
    bytes: int
    opset: int
    inputs: dict[str, list[int | str]]
    sites: list[dict[str, Any]] = field(default_factory=list)
    groups: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return dict(vars(self))


def inspect(
    source: str | Path | onnx.ModelProto | Model | Analysis, input_shapes: Mapping[str, Sequence[int]] | None = None
) -> Inspection:
    """Attention sites, groups, cost, and what is skipped and why.

    Args:
        source: a path, a model in memory, or an analysis made before.
        input_shapes: full input shapes by name, where symbolic sizes cannot be guessed.

    Raises:
        ModelError: the model cannot be read or run.
    """
    analysis = source if isinstance(source, Analysis) else analyse_model(source, input_shapes)
    return Inspection(
        params=round(analysis.cost.total("params")),
        macs=round(analysis.cost.total("macs")),
        bytes=analysis.model.bytes,
        opset=analysis.graph.opset,
        inputs=_inputs(analysis.graph),
        sites=[_site(analysis, index) for index in range(len(analysis.structure.sites))],
        groups=[_group(analysis, group) for group in analysis.structure.groups],
        skipped=_skipped(analysis),
    )


def _inputs(graph: Graph) -> dict[str, list[int | str]]:
    return {
        value.name: [
            dim.dim_value if dim.HasField("dim_value") else dim.dim_param or "?"
            for dim in value.type.tensor_type.shape.dim
        ]
        for value in graph.shell.graph.input
    }


def _site(analysis: Analysis, index: int) -> dict[str, Any]:
    site = analysis.structure.sites[index]
    found = {kind: analysis.structure.group(kind, index) for kind in ("qk", "v", "head")}
    counted = [one.size for one in analysis.structure.groups if one.kind == "head" and index in one.sites]
    known = max((group.heads for group in (found["qk"], found["v"]) if group is not None), default=1)
    heads = max(prod(counted), known)  # of queries, several of which may share a head of keys
    reasons = [f"{kind}: {reason}" for kind, group in found.items() if group is not None for reason in group.reasons]
    reasons += [item.reason for item in analysis.structure.skipped if item.node == site.score]
    return {
        "name": site.name,
        "heads": heads,
        "qk_size": found["qk"].size * found["qk"].together if found["qk"] else None,
        "v_size": found["v"].size * found["v"].together if found["v"] else None,
        "prunable": {kind: group is not None and group.prunable for kind, group in found.items()},
        "reasons": reasons,
    }


def _group(analysis: Analysis, group: Group) -> dict[str, Any]:
    return {
        "id": group.id,
        "kind": group.kind,
        "size": group.size,
        "heads": group.heads,
        "together": group.together,
        "params": round(analysis.cost.share("params", group.atom)),
        "macs": round(analysis.cost.share("macs", group.atom)),
        "prunable": group.prunable,
        "reasons": list(group.reasons),
        "producers": [weight for weight, _ in group.producers],
        "consumers": [weight for weight, _ in group.consumers],
    }


def _skipped(analysis: Analysis) -> list[dict[str, str]]:
    """What was not understood, or must stay: softmaxes without a site, and groups with a reason."""
    found = [{"node": item.node, "reason": item.reason} for item in analysis.structure.skipped]
    for group in analysis.structure.groups:
        for reason in group.reasons:
            found.append(
                {
                    "node": group.producers[0][0] if group.producers else group.id,
                    "reason": f"{group.id} ({group.kind}, {group.size}): {reason}",
                }
            )
    return found
