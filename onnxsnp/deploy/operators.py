"""Which operators the ONNX importer of each TensorRT release takes, and of which element types.

Read from github.com/onnx/onnx-tensorrt, branches 8.2-GA, 8.4-GA, 8.5-GA, 8.6-GA, 10.0-GA and 10.1-GA: an operator is
taken from the release on whose builtin_op_importers.cpp (onnxOpImporters.cpp from 10.0) defines it; the element types
are those of the release's docs/operators.md. Where the code says otherwise than the document, the code is followed, and
a comment says so. Attention: release notes of the 10.14 parser.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from onnxsnp.deploy.targets import Version
from onnxsnp.graph.precision import is_float

# release and element types from then on: f floating-point, i INT32 (and INT64, which below 9.0 is cast to it), b BOOL,
# q INT8; several releases where the types grew
_TAKEN = {
    "Abs": "8.2 fi",
    "Acos": "8.2 f",
    "Acosh": "8.2 f",
    "Add": "8.2 fi",
    "And": "8.2 b",
    "ArgMax": "8.2 f, 8.6 fi",
    "ArgMin": "8.2 f, 8.6 fi",
    "Asin": "8.2 f",
    "Asinh": "8.2 f",
    "Atan": "8.2 f",
    "Atanh": "8.2 f",
    "Attention": "10.14 fib",
    "AveragePool": "8.2 fiq, 10.0 f",
    "BatchNormalization": "8.2 f",
    "Cast": "8.2 fibq, 10.0 fib",
    "CastLike": "10.0 fib",
    "Ceil": "8.2 f",
    "Celu": "8.2 f",
    "Clip": "8.2 fq, 10.0 f",
    "Concat": "8.2 fibq, 10.0 fib",
    "Constant": "8.2 fibq, 10.0 fib",
    "ConstantOfShape": "8.2 fi, 10.0 fib",  # any type its value has, by the code
    "Conv": "8.2 fq, 10.0 f",
    "ConvTranspose": "8.2 fq, 10.0 f",
    "Cos": "8.2 f",
    "Cosh": "8.2 f",
    "CumSum": "8.2 f",
    "DeformConv": "10.1 f",
    "DepthToSpace": "8.2 fi",
    "DequantizeLinear": "8.2 q",
    "Div": "8.2 fi",
    "Dropout": "8.2 f",
    "Einsum": "8.2 f",
    "Elu": "8.2 fq, 10.0 f",
    "Equal": "8.2 fi, 8.5 fib",  # elementwiseCheck of 8.5 lets BOOL through
    "Erf": "8.2 f",
    "Exp": "8.2 f",
    "Expand": "8.2 fib",
    "EyeLike": "8.2 fib",
    "Flatten": "8.2 fib",
    "Floor": "8.2 f",
    "GRU": "8.2 f",
    "Gather": "8.2 fiq, 8.5 fibq, 10.0 fib",
    "GatherElements": "8.2 fiq, 8.5 fibq, 10.0 fib",
    "GatherND": "8.2 fiq, 8.5 fibq, 10.0 fib",
    "Gelu": "10.0 fiq",
    "Gemm": "8.2 fq, 10.0 f",
    "GlobalAveragePool": "8.2 fq, 10.0 f",
    "GlobalLpPool": "8.2 fq, 10.0 f",
    "GlobalMaxPool": "8.2 fq, 10.0 f",
    "Greater": "8.2 fi",
    "GreaterOrEqual": "8.2 fi",
    "GridSample": "8.5 f",  # in the code of 8.5, in the document from 8.6
    "GroupNormalization": "8.6 f",
    "HardSigmoid": "8.2 fq, 10.0 f",
    "HardSwish": "8.4 f, 8.5 fq, 10.0 f",
    "Hardmax": "10.0 f",
    "Identity": "8.2 fibq, 10.0 fib",
    "If": "8.2 fib",
    "InstanceNormalization": "8.2 f",
    "IsInf": "8.6 f",
    "IsNaN": "8.2 fi",
    "LRN": "8.2 f",
    "LSTM": "8.2 f",
    "LayerNormalization": "8.6 f",
    "LeakyRelu": "8.2 fq, 10.0 f",
    "Less": "8.2 fi",
    "LessOrEqual": "8.2 fi",
    "Log": "8.2 f",
    "LogSoftmax": "8.2 f",
    "Loop": "8.2 fib",
    "LpNormalization": "8.2 f",
    "LpPool": "8.2 fq, 10.0 f",
    "MatMul": "8.2 f",
    "Max": "8.2 fi",
    "MaxPool": "8.2 fq, 10.0 f",
    "Mean": "8.2 fi",
    "MeanVarianceNormalization": "8.5 f",
    "Min": "8.2 fi",
    "Mish": "10.0 f",
    "Mod": "8.5 fi",
    "Mul": "8.2 fi",
    "Neg": "8.2 fi",
    "NonMaxSuppression": "8.2 f",
    "NonZero": "8.5 f",
    "Not": "8.2 b",
    "OneHot": "8.5 fib",
    "Or": "8.2 b",
    "PRelu": "8.2 fq, 10.0 f",
    "Pad": "8.2 fiq, 10.0 fi",
    "Pow": "8.2 f",
    "QuantizeLinear": "8.2 f",
    "RNN": "8.2 f",
    "RandomNormal": "8.5 f",
    "RandomNormalLike": "8.5 f",
    "RandomUniform": "8.2 f",
    "RandomUniformLike": "8.2 f",
    "Range": "8.2 fi",
    "Reciprocal": "8.2 f",  # in the code of 8.2, not in its document
    "ReduceL1": "8.2 f, 10.0 fi",
    "ReduceL2": "8.2 f, 10.0 fi",
    "ReduceLogSum": "8.2 f, 10.0 fi",
    "ReduceLogSumExp": "8.2 f, 10.0 fi",
    "ReduceMax": "8.2 f, 10.0 fi",
    "ReduceMean": "8.2 f, 10.0 fi",
    "ReduceMin": "8.2 f, 10.0 fi",
    "ReduceProd": "8.2 f, 10.0 fi",
    "ReduceSum": "8.2 f, 10.0 fi",
    "ReduceSumSquare": "8.2 f, 10.0 fi",
    "Relu": "8.2 fq, 10.0 fi",
    "Reshape": "8.2 fibq, 10.0 fib",
    "Resize": "8.2 f",
    "ReverseSequence": "8.2 f, 8.6 fibq, 10.0 fib",
    "RoiAlign": "8.5 f",
    "Round": "8.2 fq, 10.0 f",
    "Scan": "8.2 f",
    "Scatter": "8.2 fiq, 10.0 fi",
    "ScatterElements": "8.2 fiq, 10.0 fi",
    "ScatterND": "8.2 fiq, 10.0 fi",
    "Selu": "8.2 fq, 10.0 f",
    "Shape": "8.2 fibq, 10.0 fib",
    "Shrink": "8.4 fi",
    "Sigmoid": "8.2 fq, 10.0 f",
    "Sign": "8.2 fiq, 10.0 fi",
    "Sin": "8.2 f",
    "Sinh": "8.2 f",
    "Size": "8.2 fibq, 10.0 fib",
    "Slice": "8.2 fibq, 10.0 fib",
    "Softmax": "8.2 f",
    "Softplus": "8.2 fq, 10.0 f",
    "Softsign": "8.2 fq, 10.0 f",
    "SpaceToDepth": "8.2 fi",
    "Split": "8.2 fib",
    "Sqrt": "8.2 f",
    "Squeeze": "8.2 fibq, 10.0 fib",
    "Sub": "8.2 fi",
    "Sum": "8.2 fi",
    "Tan": "8.2 f",
    "Tanh": "8.2 fq, 10.0 f",
    "ThresholdedRelu": "8.2 fq, 10.0 f",
    "Tile": "8.2 fib",
    "TopK": "8.2 f, 8.6 fi",
    "Transpose": "8.2 fibq, 10.0 fib",
    "Trilu": "8.5 fibq, 10.0 fib",
    "Unsqueeze": "8.2 fibq, 10.0 fib",
    "Upsample": "8.2 f",
    "Where": "8.2 fi, 8.5 fib",  # code of 8.2 and 8.4 refuses BOOL
    "Xor": "8.4 b",  # in the code only
}


def taken_since(op: str) -> Version | None:
    """The first TensorRT release (of 8.2 and later) whose importer takes an operator; None if none does."""
    steps = _steps(op)
    return steps[0][0] if steps else None


def takes(op: str, version: Version) -> bool:
    """Whether the importer of a release takes an operator at all."""
    since = taken_since(op)
    return since is not None and since <= version


def element_kinds(op: str, version: Version) -> str:
    """Letters of the element types (`kind_of`) that the importer of a release takes for an operator's data."""
    found = ""
    for since, kinds in _steps(op):
        if since <= version:
            found = kinds
    return found


def kind_of(dtype: np.dtype) -> str:
    """The letter of an element type: f, i (INT32 and INT64), b, q (INT8); empty for any other."""
    if is_float(dtype):
        return "f" if dtype != np.float64 else ""
    return {"bool": "b", "int32": "i", "int64": "i", "int8": "q"}.get(str(dtype), "")


@cache
def _steps(op: str) -> tuple[tuple[Version, str], ...]:
    steps = []
    for step in _TAKEN.get(op, "").split(", "):
        if step:
            release, kinds = step.split(" ")
            steps.append((tuple(int(part) for part in release.split(".")), kinds))
    return tuple(steps)
