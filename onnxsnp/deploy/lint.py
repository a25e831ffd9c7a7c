"""What the ONNX importer of a target's TensorRT will refuse, or read as something else, before it is there.

Silent misreadings are errors: a mean over the wrong axes builds and runs. What is checked per operator stands in
`onnxsnp.deploy.lint_rules`, which operators and element types there are in `onnxsnp.deploy.operators`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import onnx
from onnx import AttributeProto, GraphProto, NodeProto, TensorProto, helper, numpy_helper

from onnxsnp.deploy.lint_rules import CHECKS, LOWER, Place, Problem
from onnxsnp.deploy.lowering.types import typed_slots
from onnxsnp.deploy.operators import element_kinds, kind_of, taken_since, takes
from onnxsnp.deploy.targets import Target
from onnxsnp.graph.probe import infer_shapes

_INT32 = 2**31


@dataclass(frozen=True)
class Finding:
    """One thing that the target's TensorRT does not take as it is.

    Attributes:
        node: name of the node (or tensor); of a node without one its first output.
        op: its operator; empty where it is a tensor of the model.
        rule: short name of what is broken.
        severity: `error` (refused, or silently something else) or `warning`.
        message: what TensorRT does with it.
        remedy: what to do.
    """

    node: str
    op: str
    rule: str
    severity: str
    message: str
    remedy: str

    def __str__(self) -> str:
        what = f"{self.node} ({self.op})" if self.op else self.node
        return f"{self.severity}: {what}: {self.message} [{self.rule}]; {self.remedy}"

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def lint(proto: onnx.ModelProto, target: Target) -> list[Finding]:
    """Check a model against the importer of a target's TensorRT, errors first.

    Raises:
        ModelError: types or shapes of the graph contradict each other.
    """
    opset = next((entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx")), 0)
    found = list(_model_findings(proto, opset, target))
    found.extend(_graph_findings(infer_shapes(proto, data_prop=True).graph, opset, target, None))
    return sorted(found, key=lambda finding: finding.severity != "error")


def _release(target: Target) -> str:
    return f"TensorRT {'.'.join(map(str, target.tensorrt[:2]))}"


def _model_findings(proto: onnx.ModelProto, opset: int, target: Target) -> Iterator[Finding]:
    version, release = target.tensorrt, _release(target)
    name = proto.graph.name or "model"
    if opset > target.opset:
        message = (
            f"{release} documents opset {target.opset}, the model is of {opset}: what changed since is read as before"
        )
        yield Finding(name, "", "opset", "warning", message, LOWER)
    if proto.functions and version < (9,):
        yield Finding(name, "", "functions", "error", f"{release} reads no local functions", LOWER)
    weights = {tensor.name for tensor in proto.graph.initializer}
    for value in proto.graph.input:
        if value.name not in weights:
            yield from _input_findings(value, target)
    for tensor in proto.graph.initializer:
        yield from _weight_findings(tensor, target)


def _input_findings(value: onnx.ValueInfoProto, target: Target) -> Iterator[Finding]:
    kind, release = value.type.tensor_type, _release(target)
    if any(dim.dim_value <= 0 for dim in kind.shape.dim):
        message = "has free sizes: TensorRT needs a profile of them (--minShapes, --optShapes, --maxShapes)"
        yield Finding(value.name, "", "free-size", "warning", message, "give sizes with --input-shape")
    if kind.elem_type == TensorProto.INT64 and target.tensorrt < (9,):
        message = f"{release} makes INT32 of INT64 inputs: the engine's callers feed INT32"
        yield Finding(value.name, "", "int64-input", "warning", message, "feed INT32 on the device")
    taken = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.INT32, TensorProto.INT64, TensorProto.BOOL}
    taken |= {TensorProto.UINT8} if target.tensorrt >= (8, 5) else set()
    taken |= {TensorProto.BFLOAT16} if target.tensorrt >= (9,) else set()
    if kind.elem_type not in taken:
        message = f"{release} takes no input of type {TensorProto.DataType.Name(kind.elem_type)}"
        yield Finding(value.name, "", "input-type", "error", message, "export the model with inputs of another type")


def _weight_findings(tensor: TensorProto, target: Target) -> Iterator[Finding]:
    version, release = target.tensorrt, _release(target)
    kind = TensorProto.DataType.Name(tensor.data_type)
    # FP16 initializers: changelog of the 8.4 parser; BF16: of 9.0; DOUBLE is cast down by all
    if (kind == "FLOAT16" and version < (8, 4)) or (kind == "BFLOAT16" and version < (9,)):
        yield Finding(tensor.name, "", "weight-type", "error", f"{release} reads no {kind} weights", LOWER)
    elif kind == "DOUBLE":
        yield Finding(tensor.name, "", "weight-type", "warning", f"{release} makes FLOAT of DOUBLE weights", LOWER)
    elif kind == "INT64" and version < (9,):
        values = numpy_helper.to_array(tensor)
        if values.size and (values.min() < -_INT32 or values.max() >= _INT32):
            message = f"{release} makes INT32 of INT64 weights, and some of these numbers do not fit: it clamps them"
            yield Finding(tensor.name, "", "int64-range", "error", message, "use smaller numbers")


def _graph_findings(graph: GraphProto, opset: int, target: Target, outer: Place | None) -> Iterator[Finding]:
    place = _place(graph, opset, target, outer)
    for node in graph.node:
        where = node.name or next((name for name in node.output if name), node.op_type)
        for problem in _problems(node, place):
            severity = "warning" if problem.warning else "error"
            yield Finding(where, node.op_type, problem.rule, severity, problem.message, problem.remedy)
        for entry in node.attribute:
            for inner in [entry.g] if entry.type == AttributeProto.GRAPH else entry.graphs:
                yield from _graph_findings(inner, opset, target, place)


def _place(graph: GraphProto, opset: int, target: Target, outer: Place | None) -> Place:
    """What is known around the nodes of a graph; a subgraph also sees what surrounds it."""
    held = dict(outer.held) if outer else {}
    shapes, types = (dict(outer.shapes), dict(outer.types)) if outer else ({}, {})
    for value in [*graph.input, *graph.value_info, *graph.output]:
        kind = value.type.tensor_type
        if kind.elem_type:
            types[value.name] = np.dtype(helper.tensor_dtype_to_np_dtype(kind.elem_type))
        if kind.HasField("shape"):
            shapes[value.name] = tuple(dim.dim_value if dim.dim_value > 0 else -1 for dim in kind.shape.dim)
    for tensor in graph.initializer:
        held[tensor.name] = tensor
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute and node.attribute[0].type == AttributeProto.TENSOR:
            held[node.output[0]] = node.attribute[0].t
    for name, tensor in held.items():
        types[name] = np.dtype(helper.tensor_dtype_to_np_dtype(tensor.data_type))
        shapes[name] = tuple(tensor.dims)
    makers = {name: node.op_type for node in graph.node for name in node.output}
    return Place(opset, target, shapes, types, held, {**(outer.makers if outer else {}), **makers})


def _problems(node: NodeProto, place: Place) -> Iterator[Problem]:
    """Everything that is wrong with one node."""
    release = _release(place.target)
    if node.domain not in ("", "ai.onnx"):
        message = f"is of the domain {node.domain}: {release} looks operators up by their type alone"
        yield Problem("domain", message, f"{LOWER}; an operator that stays then needs a TensorRT plugin")
        return
    if not onnx.defs.has(node.op_type, place.opset):
        message = f"opset {place.opset} of ONNX has no {node.op_type}"
        yield Problem("not-in-opset", message, "there is no way to write it for this target; replace it in the model")
        return
    if not takes(node.op_type, place.target.tensorrt):
        since = taken_since(node.op_type)
        first = f", the first that does is {'.'.join(map(str, since))}" if since else ", and no release does"
        yield Problem("operator", f"{release} does not take {node.op_type}{first}", LOWER)
        return
    yield from _form_problems(node, place)
    yield from _type_problems(node, place)
    for check in CHECKS.get(node.op_type, ()):
        yield from check(node, place)


def _form_problems(node: NodeProto, place: Place) -> Iterator[Problem]:
    """Attributes and inputs that the operator does not have in the model's opset."""
    schema = onnx.defs.get_schema(node.op_type, place.opset)
    for entry in node.attribute:
        if entry.name not in schema.attributes:
            message = (
                f"{node.op_type} of opset {place.opset} has no attribute {entry.name}, and the importer reads none"
            )
            yield Problem("form", message, LOWER)
    if not schema.min_input <= len(node.input) <= schema.max_input:
        message = f"{node.op_type} of opset {place.opset} has no {len(node.input)} inputs"
        yield Problem("form", message, LOWER)


def _type_problems(node: NodeProto, place: Place) -> Iterator[Problem]:
    """Element types that the importer does not take for the operator's data."""
    if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
        return  # a check of their own
    slots = typed_slots(node, place.opset)[0]
    kinds = element_kinds(node.op_type, place.target.tensorrt)
    for slot in slots:
        dtype = place.types.get(node.input[slot])
        if dtype is None or kind_of(dtype) in (*kinds, "q"):
            continue
        message = f"{_release(place.target)} takes no {str(dtype).upper()} in {node.op_type}"
        yield Problem("element-type", message, f"{LOWER}, which puts Casts around it where that keeps the numbers")
        return
