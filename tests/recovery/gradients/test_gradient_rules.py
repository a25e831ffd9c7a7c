"""Every rule against central differences in float64.

onnxruntime has no float64 kernels for many operators on CPUs, so forward and backward nodes both run in onnx's
reference evaluator here; the backward graph's own constants are widened for it. Where the evaluator rounds to single
precision or departs from the operator's definition, the operator is written out below.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from scipy import special

from onnxsnp.graph.ir import Graph
from onnxsnp.graph.normalize import as_graph
from onnxsnp.model import load
from onnxsnp.recovery.gradients.backward import backward_graph
from onnxsnp.recovery.gradients.rules import RULES, WITHOUT_GRADIENT
from onnxsnp.recovery.gradients.static import static_graph

EXPORTS = sorted(Path(__file__).parents[2].joinpath("exports").rglob("*.onnx"))

# What stops gradients in the exports: integers in place of weights, graphs inside nodes, caches.
STOPS = {
    "DequantizeLinear",
    "DynamicQuantizeLinear",
    "If",
    "MatMulInteger",
    "QuantizeLinear",
    "com.microsoft.GroupQueryAttention",
}


class Erf(OpRun):  # type: ignore[misc]
    def _run(self, x: np.ndarray) -> tuple[np.ndarray]:
        return (special.erf(x),)


class Gelu(OpRun):  # type: ignore[misc]
    def _run(self, x: np.ndarray, approximate: str) -> tuple[np.ndarray]:
        if approximate == "tanh":
            return (0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),)
        return (0.5 * x * (1 + special.erf(x / np.sqrt(2))),)


class Softmax(OpRun):  # type: ignore[misc]
    """As it was before opset 13."""

    def _run(self, x: np.ndarray, axis: int) -> tuple[np.ndarray]:
        return (special.softmax(x.reshape(int(np.prod(x.shape[:axis])), -1), axis=1).reshape(x.shape),)


class Pad(OpRun):  # type: ignore[misc]
    def _run(self, x: np.ndarray, pads: np.ndarray, mode: str) -> tuple[np.ndarray]:
        before, after = pads[: x.ndim], pads[x.ndim :]
        kept = [slice(max(-a, 0), n + min(b, 0)) for a, b, n in zip(before, after, x.shape, strict=True)]
        return (np.pad(x[(*kept,)], [(max(a, 0), max(b, 0)) for a, b in zip(before, after, strict=True)]),)


class ConvTranspose(OpRun):  # type: ignore[misc]
    def _run(self, x: np.ndarray, w: np.ndarray, **given: Any) -> tuple[np.ndarray]:
        """Each entry adds its kernel to the places it came from."""
        rank, groups, pads = x.ndim - 2, given["group"], given["pads"]
        strides, dilations, more = given["strides"], given["dilations"], given["output_padding"]
        sizes = [
            (x.shape[2 + axis] - 1) * strides[axis] + (w.shape[2 + axis] - 1) * dilations[axis] + 1 + more[axis]
            for axis in range(rank)
        ]
        out = np.zeros((x.shape[0], groups, w.shape[1], *sizes))
        x, w = (array.reshape(*shape) for array, shape in (
            (x, (x.shape[0], groups, -1, *x.shape[2:])), (w, (groups, -1, *w.shape[1:]))
        ))  # fmt: skip
        for place in np.ndindex(*x.shape[3:]):
            for tap in np.ndindex(*w.shape[3:]):
                where = tuple(p * s + k * d for p, s, k, d in zip(place, strides, tap, dilations, strict=True))
                out[(..., *where)] += np.einsum("ngc,gco->ngo", x[(..., *place)], w[(..., *tap)])
        kept = [slice(low, size - high) for low, high, size in zip(pads[:rank], pads[rank:], sizes, strict=True)]
        return (out.reshape(out.shape[0], -1, *sizes)[(..., *kept)],)


def case(op: str, *inputs: Any, opset: int = 18, outputs: int = 1, positive: bool = False, **attributes: Any) -> Any:
    """Inputs: a shape (tuple) stands for a random tensor that gets a gradient; arrays and lists are constants."""
    shown = ",".join("x".join(map(str, item)) if isinstance(item, tuple) else "c" for item in inputs)
    told = ",".join(f"{name}={value}" for name, value in attributes.items())
    return pytest.param(op, inputs, opset, outputs, positive, attributes, id=f"{op}-{shown}-{told}-{opset}")


F = np.float64
ALIGNED = "align_corners"
MASK = np.array([[True, False, True], [False, True, True]])
CASES = [
    *(case(op, (2, 3)) for op in ("Abs", "Cos", "Erf", "Exp", "Neg", "Relu", "Sigmoid", "Sin", "Tanh", "Identity")),
    *(case(op, (2, 3)) for op in ("HardSwish", "HardSigmoid", "LeakyRelu", "Elu", "Softplus")),
    *(case(op, (2, 3), positive=True) for op in ("Sqrt", "Log", "Reciprocal")),
    *(case(op, (2, 3, 4), (2, 3, 4)) for op in ("Add", "Sub", "Mul", "Max", "Min")),
    *(case(op, (2, 3, 4), (4,)) for op in ("Add", "Sub", "Mul", "Sum")),
    *(case(op, (3, 1), (2, 1, 4)) for op in ("Add", "Sub", "Mul")),
    case("Mul", (2, 3, 1, 5), (1, 3, 4, 1)),
    case("Add", (), (2, 3)),
    case("Div", (2, 3), (3,), positive=True),
    case("Div", (3,), (2, 1), positive=True),
    case("Pow", (2, 3), F(2)),
    case("Pow", (2, 3), F(3)),
    case("Pow", (2, 3), F(0.5), positive=True),
    case("Mod", (2, 3), F(0.7), fmod=1, positive=True),
    case("Where", MASK, (2, 3), (3,)),
    case("Clip", (4, 5), F(-0.5), F(0.5)),
    case("PRelu", (2, 3), (3,)),
    case("Gelu", (2, 3), opset=20),
    case("Gelu", (2, 3), opset=20, approximate="tanh"),
    case("Swish", (2, 3), opset=24, alpha=1.5),
    case("Cast", (2, 3), to=11),
    case("CastLike", (2, 3), F(1)),
    case("Dropout", (2, 3)),
    case("Reshape", (2, 6), [3, -1]),
    case("Flatten", (2, 3, 2), axis=2),
    case("Squeeze", (2, 1, 3), [1]),
    case("Squeeze", (2, 1, 3), opset=11, axes=[1]),
    case("Unsqueeze", (2, 3), [0, 2]),
    case("Transpose", (2, 3, 4), perm=[2, 0, 1]),
    case("Transpose", (2, 3, 4)),
    case("Concat", (2, 3), (2, 1), (2, 2), axis=-1),
    case("Split", (2, 5), [2, 3], axis=1, outputs=2),
    case("Slice", (4, 7), [1, 2], [3, 7], [0, 1]),
    case("Slice", (4, 7), [1], [2**62], [1], [3]),
    case("Slice", (4, 7), [-1], [-(2**62)], [1], [-2]),
    case("Slice", (4, 7), [-2, 5], [-(2**62), 1], [0, 1], [-1, -2]),
    case("Pad", (2, 3), [1, 0, 2, 1]),
    case("Pad", (2, 3), [0, -1, 1, 2]),
    case("Expand", (3, 1), [2, 3, 4]),
    case("Tile", (2, 3), [3, 2]),
    case("Gather", (5, 3), [[4, 0, 4], [1, 1, -1]]),
    case("Gather", (5, 3), [[4, 0, 4], [1, 1, -1]], opset=13),
    case("Gather", (2, 5, 3), [1, 2, 3], axis=1),
    case("Gather", (2, 5, 3), np.int64(-1), axis=1),
    case("Gather", (2, 5, 3), [4, 1, 4], axis=1),
    case("GatherElements", (3, 4), [[0, 3, 0], [1, 1, 2], [3, 0, 1]], axis=1),
    case("GatherND", (3, 4), [[0, 1], [2, 3], [0, 1]]),
    case("ScatterND", (3, 4), [[0], [2]], (2, 4)),
    case("ScatterND", (3, 4), [[0], [0]], (2, 4), reduction="add"),
    case("MatMul", (3, 4), (4, 5)),
    case("MatMul", (2, 2, 3, 4), (4, 5)),
    case("MatMul", (2, 2, 3, 4), (2, 2, 4, 5)),
    case("MatMul", (2, 1, 3, 4), (2, 4, 5)),
    case("MatMul", (3, 4), (2, 4, 5)),
    case("MatMul", (4,), (4, 5)),
    case("MatMul", (2, 3, 4), (4,)),
    case("MatMul", (4,), (2, 4, 5)),
    case("MatMul", (4,), (4,)),
    case("Gemm", (3, 4), (4, 5), (5,), alpha=0.5, beta=2.0),
    case("Gemm", (4, 3), (4, 5), (3, 1), transA=1),
    case("Gemm", (3, 4), (5, 4), (), transB=1),
    case("Gemm", (4, 3), (5, 4), transA=1, transB=1, alpha=1.5),
    case("Einsum", (2, 3, 4), (2, 5, 4), equation="bij,bkj->bik"),
    case("Einsum", (2, 3, 4), (5, 3), equation="bij, kj->bk".replace("kj", "ki")),
    case("Softmax", (2, 3, 4), axis=-1),
    case("Softmax", (2, 3, 4), axis=1),
    case("Softmax", (2, 3, 4), axis=1, opset=11),
    case("LogSoftmax", (2, 3, 4), axis=-1),
    case("LayerNormalization", (2, 3, 4), (4,), (4,), axis=-1, epsilon=1e-5),
    case("LayerNormalization", (2, 3, 4), (4,), axis=-1),
    case("LayerNormalization", (2, 3, 4), (3, 4), (3, 4), axis=1),
    case("RMSNormalization", (2, 3, 4), (4,), opset=23, axis=-1),
    case("BatchNormalization", (2, 3, 4), (3,), (3,), F([0.1, 0.2, 0.3]), F([0.5, 1.5, 1.0])),
    *(case(op, (2, 3, 4), [1], keepdims=0) for op in ("ReduceMean", "ReduceL1", "ReduceL2", "ReduceSumSquare")),
    *(case(op, (2, 3, 4), [0, 2]) for op in ("ReduceSum", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceLogSumExp")),
    case("ReduceMean", (2, 3, 4), opset=11, axes=[-1], keepdims=0),
    case("ReduceSum", (2, 3)),
    case("GlobalAveragePool", (2, 3, 4, 5)),
    case("CumSum", (2, 4), np.int64(1)),
    case("CumSum", (2, 4), np.int64(1), exclusive=1, reverse=1),
    case("Conv", (2, 3, 5, 6), (4, 3, 3, 3), (4,), pads=[1, 1, 1, 1]),
    case("Conv", (2, 3, 8, 8), (4, 3, 4, 4), strides=[4, 4]),
    case("Conv", (1, 2, 7, 8), (3, 2, 3, 3), strides=[2, 3], pads=[1, 0, 0, 1]),
    case("Conv", (1, 4, 7, 6), (6, 2, 2, 3), group=2, dilations=[2, 1]),
    case("Conv", (2, 3, 5, 5), (3, 1, 3, 3), (3,), group=3, pads=[1, 1, 1, 1], strides=[2, 2]),
    case("Conv", (1, 2, 5, 6), (3, 2, 2, 3), auto_pad="SAME_UPPER", strides=[2, 2]),
    case("Conv", (2, 3, 7), (4, 3, 3), strides=[2]),
    case("AveragePool", (2, 2, 5, 6), kernel_shape=[3, 2], pads=[1, 0, 1, 1], strides=[2, 1]),
    case("AveragePool", (1, 2, 5, 5), kernel_shape=[3, 3], pads=[1, 1, 1, 1], count_include_pad=1),
    case("MaxPool", (2, 2, 5, 6), kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]),
    case("Resize", (1, 2, 3, 4), None, None, [1, 2, 6, 7], mode="linear"),
    case("Resize", (1, 2, 4, 4), None, np.float32([1, 1, 2, 2]), mode="nearest"),
    case(
        "Resize", (1, 2, 5, 4), None, None, [1, 2, 3, 6], mode="cubic", coordinate_transformation_mode="align_corners"
    ),
]


def built(op: str, inputs: Any, opset: int, outputs: int, positive: bool, attributes: dict[str, Any]) -> Any:
    """One node as a model, and the names of the tensors that get gradients."""
    rng = np.random.default_rng(zlib.crc32(repr((op, inputs, attributes)).encode()))
    names, weights, asked = [], {}, []
    for index, item in enumerate(inputs):
        name = "" if item is None else f"in{index}"
        names.append(name)
        if isinstance(item, tuple):
            array = rng.uniform(0.3, 1.0, item) * (1 if positive else rng.choice([-1, 1], item))
            weights[name] = np.asarray(array)
            asked.append(name)
        elif item is not None:
            weights[name] = np.asarray(item, np.int64 if isinstance(item, list) else None)
    made = [f"out{index}" for index in range(outputs)]
    node = helper.make_node(op, names, made, name="node", **attributes)
    graph = helper.make_graph(
        [node], "one", [], [helper.make_tensor_value_info(name, 11, None) for name in made],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    return as_graph(load(model)), asked


def evaluate(graph: Graph, outputs: list[str], feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    """In float64; every weight is fed."""
    weights = {name: array.astype(F) if array.dtype == np.float32 else array for name, array in graph.weights.items()}
    if any(node.op_type == "Resize" for node in graph.nodes):  # whose scales are float32 by definition
        weights = {**weights, **{n: a for n, a in graph.weights.items() if n == "in2"}}
    model = graph.bare_proto()
    del model.graph.output[:]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs)
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(a), n) for n, a in {**weights, **feeds}.items())
    own = [Erf, Gelu, Pad, ConvTranspose, *([Softmax] if graph.opset < 13 else [])]
    return [np.asarray(value) for value in ReferenceEvaluator(model, new_ops=own).run(outputs, {})]


@pytest.mark.parametrize(("op", "inputs", "opset", "outputs", "positive", "attributes"), CASES)
def test_the_gradient_is_the_slope(
    op: str, inputs: Any, opset: int, outputs: int, positive: bool, attributes: dict[str, Any]
) -> None:
    graph, asked = built(op, inputs, opset, outputs, positive, attributes)
    values = evaluate(graph, graph.outputs, {})
    rng = np.random.default_rng(1)
    seeds = {
        f"seed {name}": rng.standard_normal(value.shape) for name, value in zip(graph.outputs, values, strict=True)
    }
    shapes = {name: array.shape for name, array in graph.weights.items()}
    shapes |= {name: value.shape for name, value in zip(graph.outputs, values, strict=True)}
    found = backward_graph(graph, shapes, {name: f"seed {name}" for name in graph.outputs}, asked)
    assert not found.stops and not found.missing
    gradients = dict(zip(asked, evaluate(found.graph, [found.gradients[name] for name in asked], seeds), strict=True))

    def loss(name: str, index: tuple[int, ...], shift: float) -> float:
        moved = graph.weights[name].copy()
        moved[index] += shift
        results = evaluate(graph, graph.outputs, {name: moved})
        return sum(float((seed * value).sum()) for seed, value in zip(seeds.values(), results, strict=True))

    for name in asked:
        assert gradients[name].shape == graph.weights[name].shape
        places = list(np.ndindex(graph.weights[name].shape))
        for index in [places[place] for place in rng.permutation(len(places))[:12]]:
            slope = (loss(name, index, 1e-5) - loss(name, index, -1e-5)) / 2e-5
            assert gradients[name][index] == pytest.approx(slope, rel=2e-5, abs=2e-6)


def test_every_rule_is_checked() -> None:
    checked = {parameter.values[0] for parameter in CASES}
    assert RULES.keys() - checked == {"Upsample"}  # gone since opset 10, the same rule as Resize


def test_every_operator_of_the_exports_has_a_rule_or_no_gradient() -> None:
    met = set()
    for path in EXPORTS:
        model = load(path)
        sizes = {
            value.name: [dim.dim_value or 2 for dim in value.type.tensor_type.shape.dim]
            for value in model.proto.graph.input
            if value.name not in model.weights
        }
        if any(node.domain == "com.microsoft" or node.op_type == "Attention" for node in as_graph(model).nodes):
            nodes = static_graph(model, sizes).graph.nodes
        else:
            nodes = as_graph(model).nodes
        met |= {node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}.{node.op_type}" for node in nodes}
    assert len(EXPORTS) > 100
    assert met - RULES.keys() - WITHOUT_GRADIENT == STOPS & met
    assert not RULES.keys() & WITHOUT_GRADIENT
