"""bfloat16 models run in single precision here: onnxruntime has few bfloat16 kernels for CPUs, and numpy no bfloat16.

Only what is handed to a session is widened. The graph keeps its types, so a cut model is written in the type it came
in; every bfloat16 number is a single-precision number too, so nothing is rounded on the way.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx
from onnx import AttributeProto, GraphProto, NodeProto, TensorProto, helper, numpy_helper

BRAIN = np.dtype(helper.tensor_dtype_to_np_dtype(TensorProto.BFLOAT16))

_TYPE_ATTRIBUTES = {"to", "dtype", "output_dtype", "stash_type", "softmax_precision"}


def is_float(dtype: np.dtype) -> bool:
    """Whether a type is floating-point, bfloat16 included."""
    return dtype.kind == "f" or dtype == BRAIN


def wide(array: np.ndarray) -> np.ndarray:
    """The array, in single precision if it was bfloat16."""
    return array.astype(np.float32) if array.dtype == BRAIN else array


def holds_brain(shell: onnx.ModelProto, nodes: Iterable[NodeProto]) -> bool:
    """Whether inputs or outputs of a model are bfloat16, or a node turns something into it."""
    declared = [value.type.tensor_type.elem_type for value in [*shell.graph.input, *shell.graph.output]]
    made = [entry.i for node in nodes for entry in node.attribute if entry.name in _TYPE_ATTRIBUTES]
    return TensorProto.BFLOAT16 in declared or TensorProto.BFLOAT16 in made


def element_types(model: onnx.ModelProto) -> dict[str, np.dtype]:
    """Element types of tensors between nodes, as far as inference knows them."""
    inferred = onnx.shape_inference.infer_shapes(model)
    return {
        value.name: np.dtype(helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type))
        for value in [*inferred.graph.input, *inferred.graph.value_info, *inferred.graph.output]
        if value.type.tensor_type.elem_type
    }


_BRAIN = frozenset({TensorProto.BFLOAT16})
_OTHERS = frozenset({TensorProto.BFLOAT16, TensorProto.FLOAT16, TensorProto.DOUBLE})


def widen(model: onnx.ModelProto) -> None:
    """Turn every bfloat16 of a model into single precision, in place."""
    _widen_graph(model.graph, _BRAIN)


def to_single(shell: onnx.ModelProto, nodes: Iterable[NodeProto], weights: dict[str, np.ndarray]) -> None:
    """Turn every floating-point type of a graph into single precision, in place."""
    _widen_graph(shell.graph, _OTHERS)
    for node in nodes:
        _widen_node(node, _OTHERS)
    for name, array in weights.items():
        if is_float(array.dtype):
            weights[name] = array.astype(np.float32, copy=False)


def _widen_graph(graph: GraphProto, kinds: frozenset[int]) -> None:
    for value in [*graph.input, *graph.output, *graph.value_info]:
        kind = value.type.tensor_type
        if kind.elem_type in kinds:
            kind.elem_type = TensorProto.FLOAT
    for tensor in graph.initializer:
        _widen_tensor(tensor, kinds)
    for node in graph.node:
        _widen_node(node, kinds)


def _widen_node(node: NodeProto, kinds: frozenset[int]) -> None:
    for entry in node.attribute:
        if entry.type == AttributeProto.INT and entry.name in _TYPE_ATTRIBUTES and entry.i in kinds:
            entry.i = TensorProto.FLOAT
        elif entry.type == AttributeProto.TENSOR:
            _widen_tensor(entry.t, kinds)
        elif entry.type == AttributeProto.GRAPH:
            _widen_graph(entry.g, kinds)


def _widen_tensor(tensor: TensorProto, kinds: frozenset[int]) -> None:
    if tensor.data_type in kinds:
        array = wide(numpy_helper.to_array(tensor)).astype(np.float32, copy=False)
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
