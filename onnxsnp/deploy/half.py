"""Half precision: a model whose own types say so, and which of its operators must stay in single precision.

TensorRT up to 10 takes single precision and chooses per layer (`--fp16`). TensorRT 11 and TensorRT for RTX compute in
the types that the file has. Half precision ends at 65504 and has 11 significant bits: the square of a deviation of 256
is beyond it, so normalisations overflow; sums lose their small terms; positions and ids above 2048 are no longer whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from onnxsnp.graph.ir import Namer, to_tensor
from onnxsnp.graph.probe import infer_shapes

LARGEST = float(np.finfo(np.float16).max)

# sums, means, powers and exponentials; the rest of a normalisation follows from these
_SUMS = {
    *("CumSum", "LogSoftmax", "LpNormalization", "MeanVarianceNormalization", "Softmax"),
    *("GroupNormalization", "InstanceNormalization", "LayerNormalization", "RMSNormalization"),
}
_REDUCTIONS = {
    *("ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMean", "ReduceProd", "ReduceSum"),
    *("ReduceSumSquare", "GlobalLpPool"),
}
_POWERS = {"Exp", "Pow"}
_AROUND = {"Add", "Div", "Max", "Mul", "Reciprocal", "Reshape", "Sqrt", "Squeeze", "Sub", "Unsqueeze"}
_INTEGERS = ("i", "u")


@dataclass
class Half:
    """A model in half precision, its inputs and outputs as they were.

    Attributes:
        proto: the model.
        kept: names of the nodes that stay in single precision.
        clamped: constants with finite numbers beyond half precision, which became its largest.
    """

    proto: onnx.ModelProto
    kept: list[str]
    clamped: list[str] = field(default_factory=list)


def to_half(proto: onnx.ModelProto) -> Half:
    """Write a lowered model in half precision, with Casts around what stays in single.

    Args:
        proto: of static shapes, in single precision.

    Raises:
        ModelError: its types contradict each other.
    """
    return _Halved(proto).result()


def sensitive(proto: onnx.ModelProto) -> list[str]:
    """Names of the nodes of spelled-out normalisations that overflow in half precision (not Softmax, which does not).

    For the releases that take such names (trtexec's --layerPrecisions, from 8.4 on).
    """
    halved = _Halved(proto)
    return [node.name for node in proto.graph.node if node.name in halved.narrow]


class _Halved:
    """The state of one conversion: which nodes stay, and what has been cast already."""

    def __init__(self, proto: onnx.ModelProto) -> None:
        self.proto = proto
        self.opset = next(entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx"))
        inferred = infer_shapes(proto).graph
        declared = [*inferred.input, *inferred.value_info, *inferred.output]
        self.types = {value.name: value.type.tensor_type.elem_type for value in declared}
        self.weights = {tensor.name: tensor for tensor in proto.graph.initializer}
        self.types |= {name: tensor.data_type for name, tensor in self.weights.items()}
        self.narrow = _narrow(proto, self.weights)
        exact = _exact(proto, self.types, self.weights)
        self.kept = {
            node.name for node in proto.graph.node if node.name in self.narrow | exact or self._must_stay(node)
        }
        self.namer = Namer(
            {name for node in proto.graph.node for name in (node.name, *node.input, *node.output)} | set(self.types)
        )
        self.nodes: list[NodeProto] = []
        self.clamped: list[str] = []
        self.made: dict[tuple[str, int], str] = {}
        self.constants: dict[str, TensorProto] = {}

    def _must_stay(self, node: NodeProto) -> bool:
        if node.op_type in _SUMS | _REDUCTIONS | _POWERS or node.domain:
            return True
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") and not self._fits(node.input[1]):
            return True
        slots = [slot for slot, name in enumerate(node.input) if self._is_single(name)]
        return any(not _allows_half(node, slot, self.opset) for slot in slots)

    def _fits(self, name: str) -> bool:
        """Whether a constant keeps its numbers to half precision's last bit; too small ones do not."""
        tensor = self.weights.get(name)
        if tensor is None:
            return False
        values = numpy_helper.to_array(tensor).astype(np.float64)
        return bool(np.all(np.abs(values.astype(np.float16) - values) <= 2.0**-11 * np.abs(values)))

    def _is_single(self, name: str) -> bool:
        return self.types.get(name) == TensorProto.FLOAT

    def result(self) -> Half:
        graph = self.proto.graph
        held: dict[str, int] = {value.name: TensorProto.FLOAT for value in graph.input if self._is_single(value.name)}
        outputs = {value.name for value in graph.output}
        for node in graph.node:
            kind = TensorProto.FLOAT if node.name in self.kept else TensorProto.FLOAT16
            self._convert(node, kind, held, outputs)
        shell = onnx.ModelProto()
        shell.CopyFrom(self.proto)
        del shell.graph.node[:], shell.graph.initializer[:], shell.graph.value_info[:]
        shell.graph.node.extend(self.nodes)
        shell.graph.initializer.extend(self.constants.values())
        kept = [node.name for node in graph.node if node.name in self.kept and self._computes(node)]
        return Half(infer_shapes(shell), kept, sorted(self.clamped))

    def _computes(self, node: NodeProto) -> bool:
        return any(self._is_single(name) for name in (*node.input, *node.output))

    def _convert(self, node: NodeProto, kind: int, held: dict[str, int], outputs: set[str]) -> None:
        """One node in its precision; its inputs are cast once for all that read them."""
        clone = NodeProto()
        clone.CopyFrom(node)
        for slot, name in enumerate(node.input):
            if name in self.weights:
                clone.input[slot] = self._weight(name, kind if self._is_single(name) else 0)
            elif self._is_single(name) and held[name] != kind:
                clone.input[slot] = self._cast(name, kind)
        if clone.op_type == "Cast" and kind == TensorProto.FLOAT16:
            for entry in clone.attribute:
                if entry.name == "to" and entry.i == TensorProto.FLOAT:
                    entry.i = TensorProto.FLOAT16
        after = []
        for slot, name in enumerate(node.output):
            if not self._is_single(name):
                continue
            held[name] = kind
            if name in outputs and kind == TensorProto.FLOAT16:  # the interface stays in single precision
                clone.output[slot] = self.namer(f"{name}.half")
                self.made[(name, TensorProto.FLOAT16)] = clone.output[slot]
                held[name] = TensorProto.FLOAT
                after.append(self._cast_node(clone.output[slot], name, TensorProto.FLOAT))
        self.nodes.extend([clone, *after])

    def _weight(self, name: str, kind: int) -> str:
        if kind != TensorProto.FLOAT16:
            self.constants[name] = self.weights[name]
            return name
        if (name, kind) not in self.made:
            half = self.made[(name, kind)] = self.namer(f"{name}.half")
            values = numpy_helper.to_array(self.weights[name])
            beyond = np.isfinite(values) & (np.abs(values) > LARGEST)
            if beyond.any():
                self.clamped.append(name)
                values = np.where(beyond, np.sign(values) * LARGEST, values)
            self.constants[half] = to_tensor(values.astype(np.float16), half)
        return self.made[(name, kind)]

    def _cast(self, name: str, kind: int) -> str:
        if (name, kind) not in self.made:
            word = "half" if kind == TensorProto.FLOAT16 else "single"
            self.made[(name, kind)] = self.namer(f"{name}.{word}")
            self.nodes.append(self._cast_node(name, self.made[(name, kind)], kind))
        return self.made[(name, kind)]

    def _cast_node(self, source: str, result: str, kind: int) -> NodeProto:
        return helper.make_node("Cast", [source], [result], self.namer(f"{result}.Cast"), to=kind)


def _allows_half(node: NodeProto, slot: int, opset: int) -> bool:
    """Whether an operator takes half precision in an input; QuantizeLinear does from opset 19 on."""
    if node.domain or not onnx.defs.has(node.op_type, opset):
        return False
    schema = onnx.defs.get_schema(node.op_type, opset)
    kind = schema.inputs[min(slot, len(schema.inputs) - 1)].type_str
    allowed = next((one.allowed_type_strs for one in schema.type_constraints if one.type_param_str == kind), [kind])
    return "tensor(float16)" in allowed


def _narrow(proto: onnx.ModelProto, weights: Mapping[str, TensorProto]) -> set[str]:
    """Nodes of spelled-out normalisations: squares, reductions, and element-wise ones that read a reduced tensor.

    Around a mean and a deviation stand the subtraction and the division by them. What these two give is of full size
    again, and there it ends.
    """
    found: set[str] = set()
    reduced: set[str] = set()
    for node in proto.graph.node:
        data = [name for name in node.input if name and name not in weights]
        square = node.op_type == "Mul" and node.input[0] == node.input[1]
        beside = node.op_type in _AROUND and not reduced.isdisjoint(data)
        if node.op_type in _REDUCTIONS or node.op_type == "Pow" or square or beside:
            found.add(node.name)
        if node.op_type in _REDUCTIONS or (beside and reduced.issuperset(data)):
            reduced.update(node.output)
    return found


def _exact(proto: onnx.ModelProto, types: Mapping[str, int], weights: Mapping[str, TensorProto]) -> set[str]:
    """Nodes that compute with numbers that were integers, such as positions, and Casts from and to integers."""
    found: set[str] = set()
    whole: set[str] = set()
    for node in proto.graph.node:
        data = [name for name in node.input if name and name not in weights]
        if node.op_type == "Cast":
            before, after = (_kind(types.get(name, 0)) for name in (node.input[0], node.output[0]))
            if before in _INTEGERS or after in _INTEGERS:
                found.add(node.name)
            if before in _INTEGERS and after == "f":
                whole.update(node.output)
                continue
        singles = [name for name in data if types.get(name) == TensorProto.FLOAT]
        if singles and all(name in whole for name in singles):
            found.add(node.name)
            whole.update(name for name in node.output if types.get(name) == TensorProto.FLOAT)
    return found


def _kind(elem_type: int) -> str:
    return np.dtype(helper.tensor_dtype_to_np_dtype(elem_type)).kind if elem_type else ""
