"""The refit is least squares: numpy's, exact where the cut neurons are redundant, with the bias for the mean."""

from __future__ import annotations

import graphs
import numpy as np
import onnx
import pytest

from onnxsnp.analysis import Analysis, analyse_model
from onnxsnp.calibration.data import Batch
from onnxsnp.calibration.statistics import Moments, collect
from onnxsnp.evaluation.verify import difference, prove
from onnxsnp.graph.normalize import as_graph
from onnxsnp.planning.plan import Plan, as_cuts
from onnxsnp.pruning import prune
from onnxsnp.reconstruction.refit import refit_consumers, refittable, solve
from onnxsnp.surgery.apply import apply


def sample(rows: int = 400, width: int = 7, seed: int = 0) -> tuple[np.ndarray, Moments]:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, width)) @ rng.standard_normal((width, width)) + rng.standard_normal(width)
    return x, Moments(x.T @ x, x.sum(axis=0), rows)


@pytest.mark.parametrize("keep", [[0, 2, 5], [1], [0, 1, 2, 3, 4, 5, 6]])
def test_without_a_bias_it_is_numpys_least_squares(keep: list[int]) -> None:
    x, moments = sample()
    weight = np.random.default_rng(1).standard_normal((7, 4))
    refit, shift = solve(weight, moments, np.asarray(keep), centred=False, ridge=1e-12)
    want = np.linalg.lstsq(x[:, keep], x @ weight, rcond=None)[0]
    np.testing.assert_allclose(refit, want, rtol=1e-5, atol=1e-7)
    assert not shift.any()


@pytest.mark.parametrize("keep", [[0, 2, 5], [6]])
def test_with_a_bias_it_is_numpys_least_squares_with_an_intercept(keep: list[int]) -> None:
    x, moments = sample()
    weight = np.random.default_rng(1).standard_normal((7, 4))
    refit, shift = solve(weight, moments, np.asarray(keep), centred=True, ridge=1e-12)
    design = np.column_stack([x[:, keep], np.ones(len(x))])
    want = np.linalg.lstsq(design, x @ weight, rcond=None)[0]
    np.testing.assert_allclose(refit, want[:-1], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(shift, want[-1], rtol=1e-5, atol=1e-7)
    residual = x @ weight - x[:, keep] @ refit - shift
    np.testing.assert_allclose(residual.mean(axis=0), 0, atol=1e-8)


def test_a_strong_ridge_falls_back_to_the_selection() -> None:
    _, moments = sample()
    weight = np.random.default_rng(1).standard_normal((7, 4))
    refit, _ = solve(weight, moments, np.asarray([1, 3]), centred=True, ridge=1e9)
    np.testing.assert_allclose(refit, weight[[1, 3]], rtol=1e-5)


def test_dead_inputs_and_a_single_sample_are_no_obstacle() -> None:
    weight = np.ones((3, 2))
    for moments in (Moments(np.zeros((3, 3)), np.zeros(3), 5), Moments(np.ones((3, 3)), np.ones(3), 1)):
        refit, shift = solve(weight, moments, np.asarray([0, 2]), centred=True)
        assert np.isfinite(refit).all() and np.isfinite(shift).all()


def refitted(
    model: onnx.ModelProto, keep: dict[str, list[list[int]]], feed: dict[str, np.ndarray]
) -> tuple[Analysis, dict[str, np.ndarray], Plan]:
    analysis = analyse_model(model)
    plan = Plan("", [graphs.keeping(analysis.groups[name], rows) for name, rows in keep.items()])
    cuts = dict(zip(keep, as_cuts(plan, analysis.groups), strict=True))
    groups = [analysis.groups[name] for name in keep]
    tensors = sorted({linear.data for group in groups for linear in refittable(group, analysis.linears)})
    rows = len(next(iter(feed.values())))
    moments = collect(analysis.graph, analysis.dependencies, [], [], tensors, [Batch(feed, None, rows)]).moments
    return (
        analysis,
        refit_consumers(analysis.graph, analysis.dependencies, groups, cuts, analysis.linears, moments),
        plan,
    )


def duplicated(kind: str) -> onnx.ModelProto:
    """A transformer in which neuron 5 of the FFN, or of each value head, is twice neuron 1 of the same."""
    model = graphs.transformer(blocks=1)
    values = {}
    for name, array in graphs.initializers(model).items():
        parts = {"ffn": "/mlp/fc1.", "v": "/attn/v."}
        if parts[kind] in name:
            copy = np.array(array)
            view = copy.reshape(-1, *((3, 6) if kind == "v" else (1, 20)))
            view[:, :, 5] = 2 * view[:, :, 1]
            values[name] = copy
    return graphs.set_weights(model, values)


@pytest.mark.parametrize(("kind", "size", "heads"), [("ffn", 20, 1), ("v", 6, 3)])
def test_a_duplicated_neuron_is_dropped_without_a_trace(kind: str, size: int, heads: int) -> None:
    model = duplicated(kind)
    keep = [[index for index in range(size) if index != 5]] * heads
    analysis, updates, plan = refitted(model, {f"{kind}.0": keep}, graphs.calibration(model, 300))
    original, feeds = as_graph(analysis.model), [graphs.inputs_for(model, 3, 99)]
    plain = difference(original, apply(analysis, plan).graph, feeds)
    refit = apply(analysis, plan, updates)
    assert prove(analysis, refit, feeds).passed
    assert plain > 1e-2 and difference(original, refit.graph, feeds) < plain / 100


def test_a_duplicated_channel_before_a_pointwise_convolution_is_dropped_without_a_trace() -> None:
    model = graphs.depthwise(8)
    held = graphs.initializers(model)
    values = {name: held[name].copy() for name in ("expand.w", "expand.b", "depth.w", "depth.b")}
    values["expand.w"][5], values["expand.b"][5] = 2 * values["expand.w"][1], 2 * values["expand.b"][1]
    values["depth.w"][5], values["depth.b"][5] = values["depth.w"][1], 2 * values["depth.b"][1]
    model = graphs.set_weights(model, values)
    keep = {"ffn.0": [[0, 1, 2, 3, 4, 6, 7]]}
    analysis, updates, plan = refitted(model, keep, graphs.calibration(model, 20))
    original, feeds = as_graph(analysis.model), [graphs.inputs_for(model, 3, 99)]
    plain = difference(original, apply(analysis, plan).graph, feeds)
    refit = apply(analysis, plan, updates)
    assert updates["project.w"].shape == (5, 8, 1, 1) and prove(analysis, refit, feeds).passed
    assert plain > 1e-2 and difference(original, refit.graph, feeds) < plain / 100


def test_cut_rows_of_a_refitted_weight_are_zero_and_only_the_consumers_change() -> None:
    model = graphs.transformer(blocks=1)
    keep = [[0, 2], [1, 5], [3, 4]]
    _analysis, updates, _ = refitted(model, {"v.0": keep}, graphs.calibration(model, 50))
    assert updates.keys() == {"/blocks.0/attn/proj.w", "/blocks.0/attn/proj.b"}
    rows = updates["/blocks.0/attn/proj.w"]
    alive = {6 * head + index for head, indices in enumerate(keep) for index in indices}
    assert {row for row in range(18) if rows[row].any()} == alive
    assert rows.dtype == np.float32 and rows.shape == (18, 12)


def test_the_bias_takes_up_the_mean_of_what_is_cut() -> None:
    """A neuron that is constant on the data costs nothing: its share moves into the bias."""
    model = graphs.mlp(4, 6, 3)
    values = graphs.initializers(model)
    weight, bias = values["fc0.w"].copy(), values["fc0.b"].copy()
    weight[:, 2], bias[2] = 0, 5
    model = graphs.set_weights(model, {"fc0.w": weight, "fc0.b": bias})
    analysis, updates, plan = refitted(model, {"ffn.0": [[0, 1, 3, 4, 5]]}, graphs.calibration(model, 200))
    np.testing.assert_allclose(updates["fc1.b"], values["fc1.b"] + 5 * values["fc1.w"][2], rtol=1e-3, atol=1e-3)
    gap = difference(as_graph(analysis.model), apply(analysis, plan, updates).graph, [graphs.inputs_for(model, 8)])
    assert gap < 1e-2


def test_query_key_and_residual_cuts_are_not_refitted() -> None:
    analysis = analyse_model(graphs.transformer(blocks=1))
    assert refittable(analysis.groups["qk.0"], analysis.linears) == []
    assert refittable(analysis.groups["residual"], analysis.linears) == []
    assert [linear.weight for linear in refittable(analysis.groups["ffn.0"], analysis.linears)] == [
        "/blocks.0/mlp/fc2.w"
    ]


def left_weights() -> onnx.ModelProto:
    net = graphs.Net()
    x = net.input("x", ["N", 6, 5])
    h = net.op("Relu", net.op("Add", net.op("MatMul", net.weight("a", 8, 6), x), net.weight("ab", 8, 1)))
    net.output(net.op("MatMul", net.weight("b", 3, 8), h), ["N", 3, 5])
    return net.proto()


def test_a_consumer_whose_weight_is_on_the_left_is_refitted_or_left() -> None:
    model = left_weights()
    result = prune(model, 0.4, allocation="uniform", calibration=graphs.calibration(model), samples=8)
    assert result.record["verification"]["passed"]


@pytest.mark.xfail(strict=True, reason="alpha and beta of a Gemm are not taken into account")
def test_a_duplicated_neuron_before_a_scaled_gemm_is_dropped_without_a_trace() -> None:
    net = graphs.Net()
    x = net.input("x", ["N", 4])
    h = net.op("Sigmoid", net.op("Gemm", x, net.weight("a", 4, 6), net.weight("ab", 6)))
    net.output(net.op("Gemm", h, net.weight("b", 6, 3), net.weight("bb", 3), alpha=2.0, beta=0.5), ["N", 3])
    model = net.proto()
    weight, bias = graphs.initializers(model)["a"].copy(), graphs.initializers(model)["ab"].copy()
    weight[:, 5], bias[5] = 0, 3
    model = graphs.set_weights(model, {"a": weight, "ab": bias})
    analysis, updates, plan = refitted(model, {"ffn.0": [[0, 1, 2, 3, 4]]}, graphs.calibration(model, 300))
    gap = difference(as_graph(analysis.model), apply(analysis, plan, updates).graph, [graphs.inputs_for(model, 3)])
    assert gap < 1e-3
