"""Rewrite a model for a target: static shapes, the target's opset, only operators that its importer takes.

onnx's own version converter goes from opset to opset and gives up on what has no counterpart (LayerNormalization below
17, Gelu below 20); and it knows nothing of what importers read. Here the sizes of all tensors are known, so everything
that follows from them becomes a constant, and each node is rewritten by one rule (`onnxsnp.deploy.lowering`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import onnx
from onnx import NodeProto

from onnxsnp import model as model_files
from onnxsnp.analysis import Analysis
from onnxsnp.deploy.half import sensitive, to_half
from onnxsnp.deploy.lowering import RULES
from onnxsnp.deploy.lowering.forms import written_in
from onnxsnp.deploy.lowering.products import scale_operands
from onnxsnp.deploy.lowering.site import SINGLE, Facts, Site
from onnxsnp.deploy.lowering.static import fix_inputs, settle
from onnxsnp.deploy.lowering.types import through_taken_types, to_single
from onnxsnp.deploy.targets import Target
from onnxsnp.errors import ModelError, PlanError
from onnxsnp.graph.expand import expand
from onnxsnp.graph.ir import Graph, Namer
from onnxsnp.graph.normalize import as_graph
from onnxsnp.graph.precision import element_types
from onnxsnp.graph.probe import Probe, probe
from onnxsnp.model import Model
from onnxsnp.surgery.apply import to_model

_LIMIT = 2**31 - 2**20  # bytes of one protobuf message, with room for all but the weights
_OLDEST = 13  # opset; all supported importers take it
# the format that came with each opset; an importer warns of a newer one than it was built with
_IR = {13: 7, 14: 7, 15: 8, 16: 8, 17: 8, 18: 8, 19: 9, 20: 9}


@dataclass(frozen=True)
class Change:
    """What was rewritten: operators of one type (or what else), how many, and why."""

    op: str
    count: int
    why: str


@dataclass
class Lowered:
    """A model for a target.

    Attributes:
        proto: static shapes, weights inside.
        changes: what was rewritten.
        warnings: what the target's TensorRT will do with it that one should know.
        keep_fp32: nodes that a build with --fp16 should compute in single precision (trtexec: --layerPrecisions with
            --precisionConstraints=obey); empty where the target needs no such list, or has no such options.
    """

    proto: onnx.ModelProto
    changes: list[Change]
    warnings: list[str] = field(default_factory=list)
    keep_fp32: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, without the model."""
        return {
            "changes": [asdict(change) for change in self.changes],
            "warnings": list(self.warnings),
            "keep_fp32": list(self.keep_fp32),
        }


def lower(
    source: str | Path | onnx.ModelProto | Model | Analysis,
    target: Target,
    *,
    precision: str = "fp32",
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    batch: int = 1,
) -> Lowered:
    """Rewrite a model for a target.

    Args:
        source: a model, or its path.
        precision: of `onnxsnp.deploy.targets.PRECISIONS`.
        input_shapes: full shapes by input name; needed where sizes beyond the batch are free.
        batch: of inputs whose first axis is free.

    Raises:
        ModelError: the model cannot be read or run, a size is not known, or the result would not fit into one file.
        PlanError: the target does not run the precision, or takes no opset that this writes.
    """
    if precision not in target.precisions:
        raise PlanError(f"{target.name} does not run {precision}", hint=f"use one of: {', '.join(target.precisions)}")
    opset = emitted_opset(target)
    model = source.model if isinstance(source, Analysis) else model_files.load(source)
    graph = as_graph(model)
    changes = [Change("inputs", fix_inputs(graph, input_shapes, batch), "free sizes are fixed")]
    changes.append(Change("types", to_single(graph), "half, bfloat16 and double numbers are single precision"))
    changes.extend(_spelled_out(graph))
    measured, gone = settle(graph)
    changes.append(Change("constants", gone, "does not depend on what the inputs hold"))
    if target.fuses_attention:
        changes.append(Change("scales", scale_operands(graph, measured.shapes), "fused attention scales query or key"))
    changes.extend(_rewritten(graph, measured, target, opset))
    wrapped = through_taken_types(graph, target)
    changes.extend(Change(op, count, "the importer lacks its element type") for op, count in wrapped.items())
    _check_size(graph)
    _static_outputs(graph, measured)
    lowered = Lowered(to_model(graph), [change for change in changes if change.count])
    if precision == "fp16":
        _prepare_half(lowered, target)
    return lowered


def strongly_typed(target: Target) -> bool:
    """Whether a target computes in the types of the file, so that fp16 has to be in it."""
    return target.runtime == "tensorrt-rtx" or target.dialect == "11"


def _prepare_half(lowered: Lowered, target: Target) -> None:
    """What fp16 needs, in place: half precision in the file, or a list of layers to keep in single precision."""
    if any(node.domain for node in lowered.proto.graph.node):
        return  # types around an operator of another domain are not known; `lint` refuses it
    if strongly_typed(target):
        half = to_half(lowered.proto)
        lowered.proto = half.proto
        lowered.changes.append(Change("types", len(half.proto.graph.node), "half precision, as the file's types say"))
        if half.kept:
            why = "sums, means and exponentials stay in single precision"
            lowered.changes.append(Change("types", len(half.kept), why))
        if half.clamped:
            lowered.warnings.append(
                f"{len(half.clamped)} constants have numbers beyond 65504, fp16's largest, and got that instead: "
                f"{', '.join(half.clamped[:3])}"
            )
        return
    names = sensitive(lowered.proto)
    if target.tensorrt >= (8, 4):
        lowered.keep_fp32 = _plain_names(lowered.proto, names)
    elif names:
        lowered.warnings.append(
            f"TensorRT {'.'.join(map(str, target.tensorrt[:2]))} cannot keep single layers in fp32 (--layerPrecisions "
            f"is there from 8.4 on): the squares in {len(names)} layers of normalisations overflow in fp16 where a "
            "value is 256 from the mean; compare the outputs on the device, and use fp32 if they are off"
        )


def emitted_opset(target: Target) -> int:
    """The opset that a model is written in for a target.

    Below TensorRT 10 at most 17: from 18 on the axes of reductions are inputs, which those importers do not read.

    Raises:
        PlanError: the target takes no opset of 13 or later.
    """
    if target.opset < _OLDEST:
        raise PlanError(
            f"{target.name} takes opset {target.opset}", hint=f"lowered models are of opset {_OLDEST} or later"
        )
    return min(target.opset, 17 if target.tensorrt < (10,) else 20)


def _plain_names(proto: onnx.ModelProto, names: list[str]) -> list[str]:
    """Those nodes under names without the characters that trtexec's lists are parted by, in place."""
    namer = Namer(node.name for node in proto.graph.node)
    plain = {name: re.sub(r"[^\w./-]", "_", name) for name in names}
    plain = {name: new if new == name else namer(new) for name, new in plain.items()}
    for node in proto.graph.node:
        node.name = plain.get(node.name, node.name)
    return list(plain.values())


def _spelled_out(graph: Graph) -> list[Change]:
    """onnxruntime's fused operators in plain ones (`onnxsnp.graph.expand`)."""
    before = Counter(node.op_type for node in graph.nodes)
    done = expand(graph, probe(graph).shapes)
    after = Counter(node.op_type for node in graph.nodes)
    return [Change(op, before[op] - after[op], "fused operators are spelled out") for op in done]


def _rewritten(graph: Graph, measured: Probe, target: Target, opset: int) -> list[Change]:
    """Every node by its rule, in place."""
    types = element_types(graph.skeleton()) | {name: array.dtype for name, array in graph.weights.items()}
    shapes = {**measured.shapes, **{name: array.shape for name, array in graph.weights.items()}}
    facts = Facts(shapes, types, graph.opset)
    _declare(graph, opset)
    namer = Namer(graph.names())
    nodes: list[NodeProto] = []
    alias: dict[str, str] = {}
    counted: Counter[tuple[str, str]] = Counter()
    for node in graph.nodes:
        for slot, name in enumerate(node.input):
            node.input[slot] = alias.get(name, name)
        rule = RULES.get(node.op_type) if node.domain in ("", "ai.onnx") else None
        site = Site(graph, node, facts, target, namer)
        why = rule(site) if rule is not None else None
        if why is None:
            nodes.append(written_in(node, facts.since, opset))
            continue
        if site.alias and node.output[0] in graph.outputs:
            site.add("Identity", site.alias, into=node.output[0])
        elif site.alias:
            alias[node.output[0]] = site.alias
            shapes.setdefault(site.alias, shapes.get(node.output[0], ()))
            types.setdefault(site.alias, types.get(node.output[0], SINGLE))
        nodes.extend(site.nodes)
        graph.weights.update(site.weights)
        counted[(node.op_type, why)] += not _same(node, site)
    graph.nodes = nodes
    graph.drop_dead()
    return [Change(op, count, why) for (op, why), count in counted.items() if count]


def _same(node: NodeProto, site: Site) -> bool:
    """Whether a rule wrote what was there, apart from the names of constants."""
    if site.alias or len(site.nodes) != 1 or site.nodes[0].op_type != node.op_type:
        return False
    made = site.nodes[0]
    held = {**site.held, **site.weights}

    def values(names: Sequence[str]) -> list[Any]:
        return [(held[name].tolist() if held[name].size < 64 else name) if name in held else name for name in names]

    return values(node.input) == values(made.input) and sorted(
        entry.SerializeToString() for entry in node.attribute
    ) == sorted(entry.SerializeToString() for entry in made.attribute)


def _declare(graph: Graph, opset: int) -> None:
    """Set the opset and the format's version; other domains stay as long as a node is of them."""
    shell = onnx.ModelProto()
    shell.CopyFrom(graph.shell)
    shell.ir_version = _IR[opset]
    domains = {node.domain for node in graph.nodes} - {"", "ai.onnx"}
    others = [entry for entry in shell.opset_import if entry.domain in domains]
    del shell.opset_import[:]
    shell.opset_import.append(onnx.helper.make_opsetid("", opset))
    shell.opset_import.extend(others)
    graph.shell = shell


def _check_size(graph: Graph) -> None:
    """One file, as importers read it from one message."""
    size = sum(array.nbytes for array in {id(array): array for array in graph.weights.values()}.values())
    if size > _LIMIT:
        raise ModelError(
            f"the lowered model has {size / 2**30:.1f} GiB of weights, more than the 2 GiB that one ONNX file holds",
            hint="prune it further, or lower a smaller model",
        )


def _static_outputs(graph: Graph, measured: Probe) -> None:
    """Declare the sizes of the outputs as they were measured."""
    for value in graph.shell.graph.output:
        sizes = measured.shapes.get(value.name)
        if sizes is not None:
            kind = value.type.tensor_type
            kind.ClearField("shape")
            kind.shape.SetInParent()
            for size in sizes:
                kind.shape.dim.add(dim_value=size)
