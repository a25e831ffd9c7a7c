"""The proof passes what is equal and stops what is not, nan included."""

from __future__ import annotations

import graphs
import numpy as np
import onnx
import pytest

from onnxsnp.analysis import analyse_model
from onnxsnp.errors import VerificationError
from onnxsnp.evaluation.verify import difference, masked, prove, tolerance
from onnxsnp.graph.ir import Graph
from onnxsnp.graph.normalize import as_graph
from onnxsnp.model import load
from onnxsnp.planning.plan import Plan
from onnxsnp.surgery.apply import Applied, apply


def graph_of(model: onnx.ModelProto) -> Graph:
    return as_graph(load(model))


def scaled(factor: float, op: str = "Relu", bias: float = 0.0) -> Graph:
    net = graphs.Net()
    net.output(net.op(op, net.op("Add", net.op("Mul", net.input("x", ["N", 3]), factor), bias)), ["N", 3])
    return graph_of(net.proto())


FEED = [{"x": np.asarray([[1.0, 2.0, 4.0]], np.float32)}]


def test_differences_are_relative_to_the_largest_output() -> None:
    assert difference(scaled(1.0), scaled(1.0), FEED) == 0
    assert difference(scaled(1.0), scaled(1.5), FEED) == pytest.approx(0.5)
    assert difference(scaled(1000.0), scaled(1500.0), FEED) == pytest.approx(0.5)


@pytest.mark.parametrize(("left", "right"), [(1.0, -1.0), (-1.0, 1.0)])
def test_nan_is_never_equal(left: float, right: float) -> None:
    assert difference(scaled(left, "Sqrt"), scaled(right, "Sqrt"), FEED) == np.inf


def test_infinity_is_never_equal_to_a_number() -> None:
    assert difference(scaled(0.0, "Exp"), scaled(1e6, "Exp"), FEED) == np.inf


def test_every_input_counts() -> None:
    feeds = [*FEED, {"x": np.zeros((2, 3), np.float32)}]
    assert difference(scaled(1.0), scaled(1.0, bias=0.25), feeds) > 0.2


def test_another_output_shape_is_refused() -> None:
    net = graphs.Net()
    net.output(net.op("ReduceSum", net.input("x", ["N", 3]), [1]), ["N", 1])
    with pytest.raises(VerificationError, match=r"shape \(1, 1\) instead of \(1, 3\)"):
        difference(scaled(1.0), graph_of(net.proto()), FEED)


def test_a_graph_that_does_not_run_is_refused() -> None:
    broken = graph_of(graphs.mlp(3, 4, 3))
    broken.weights["fc1.w"] = np.zeros((9, 3), np.float32)
    with pytest.raises(VerificationError, match="the cut model does not run") as caught:
        difference(scaled(1.0), broken, FEED)
    assert "\n" not in str(caught.value)


def test_integer_outputs_are_compared_entry_by_entry() -> None:
    def counting(extra: int) -> Graph:
        net = graphs.Net()
        x = net.input("x", ["N", 3])
        net.output(net.op("Add", net.op("Cast", x, to=7), np.asarray([0, 0, extra])), ["N", 3], dtype=np.int64)
        return graph_of(net.proto())

    assert difference(counting(0), counting(0), FEED) == 0
    assert difference(counting(0), counting(1), FEED) == pytest.approx(1 / 3)


def test_the_coarsest_weights_set_the_tolerance() -> None:
    weights = {name: np.zeros(32, dtype) for name, dtype in (("a", np.float64), ("b", np.float32), ("c", np.int64))}
    assert tolerance(weights) == 1e-4
    assert tolerance({**weights, "d": np.zeros(32, np.float16)}) == 3e-2
    assert tolerance({**weights, "d": np.zeros(1, np.float16)}) == 1e-4
    assert tolerance({"a": weights["a"]}) == 1e-9 and tolerance({}) == 1e-4


def test_masking_zeroes_both_sides_of_a_cut_in_the_exported_graph() -> None:
    analysis = analyse_model(graphs.transformer(blocks=1, qkv="flat"))
    plan = Plan(
        "",
        [
            graphs.keeping(analysis.groups["v.0"], [[0, 1, 2, 3]] * 3),
            graphs.keeping(analysis.groups["ffn.0"], [list(range(5, 20))]),
        ],
    )
    applied = apply(analysis, plan)
    found = masked(analysis.normalized.base, analysis.graph, analysis.dependencies, applied.cuts, {}).weights
    columns = found["/blocks.0/attn/qkv.w"][:, 24:].reshape(12, 3, 6)
    assert not columns[:, :, 4:].any() and columns[:, :, :4].all()
    assert found["/blocks.0/attn/qkv.w"][:, :24].all()
    assert not found["/blocks.0/attn/proj.w"].reshape(3, 6, 12)[:, 4:].any()
    assert not found["/blocks.0/mlp/fc1.w"][:, :5].any() and not found["/blocks.0/mlp/fc2.w"][:5].any()
    assert not found["/blocks.0/mlp/fc1.b"][:5].any()


@pytest.mark.parametrize("opset", [11, 17, 18])
def test_normalisations_over_a_cut_residual_average_over_what_stays(opset: int) -> None:
    model = graphs.transformer(opset=opset)
    analysis = analyse_model(model)
    applied = apply(analysis, Plan("", [graphs.keeping(analysis.groups["residual"], [[0, 1, 4, 6, 7, 10]])]))
    proof = prove(analysis, applied, [graphs.inputs_for(model, 3)])
    assert proof.masked_equality < 1e-5 and proof.normalised_equality < 1e-6


@pytest.mark.parametrize("wrong", ["value", "bias", "scale", "nan"])
def test_a_wrong_weight_fails_the_proof(wrong: str) -> None:
    model = graphs.transformer()
    analysis = analyse_model(model)
    right = apply(analysis, graphs.random_plan(analysis.structure.groups, np.random.default_rng(0), least=2))
    feeds = [graphs.inputs_for(model, 3)]
    assert prove(analysis, right, feeds).passed
    graph = right.graph.copy()
    if wrong == "scale":
        name = next(node.input[1] for node in graph.nodes if node.op_type == "Mul")
        graph.weights[name] = graph.weights[name] * 2
    else:
        name = {"value": "/blocks.0/mlp/fc2.w", "bias": "/blocks.1/mlp/fc2.b", "nan": "/blocks.0/attn/v.w"}[wrong]
        array = graph.weights[name].copy()
        array.reshape(-1)[0] = np.nan if wrong == "nan" else array.reshape(-1)[0] + 0.5
        graph.weights[name] = array
    with pytest.raises(VerificationError, match="differs from the masked original"):
        prove(analysis, Applied(graph, right.cuts, {}), feeds)


def test_a_wrong_normalised_form_fails_the_proof() -> None:
    model = graphs.mlp(4, 6, 3)
    analysis = analyse_model(model)
    applied = apply(analysis, Plan("", [graphs.keeping(analysis.groups["ffn.0"], [[0, 1]])]))
    analysis.normalized.base.weights["fc0.w"] = analysis.normalized.base.weights["fc0.w"] + 1
    with pytest.raises(VerificationError, match="normalised model differs from the original"):
        prove(analysis, applied, [graphs.inputs_for(model, 3)])


def test_an_invalid_graph_fails_the_proof() -> None:
    model = graphs.mlp(4, 6, 3)
    analysis = analyse_model(model)
    applied = apply(analysis, Plan("", [graphs.keeping(analysis.groups["ffn.0"], [[0, 1]])]))
    next(node for node in applied.graph.nodes if node.op_type == "Relu").op_type = "NoSuchOp"
    with pytest.raises(VerificationError):
        prove(analysis, applied, [graphs.inputs_for(model, 3)])
