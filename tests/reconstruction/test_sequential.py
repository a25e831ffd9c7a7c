"""The refit in order is ridge least squares branch by branch: as a plain implementation that runs everything anew."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import graphs
import numpy as np
import onnx
import pytest

from onnxsnp.analysis import Analysis, analyse_model
from onnxsnp.calibration.data import Batch
from onnxsnp.calibration.statistics import collect
from onnxsnp.evaluation.verify import prove
from onnxsnp.graph.branches import find_branches
from onnxsnp.graph.ir import Graph
from onnxsnp.graph.normalize import as_graph
from onnxsnp.planning.plan import Plan, as_cuts
from onnxsnp.planning.selection import requirements
from onnxsnp.reconstruction import sequential
from onnxsnp.reconstruction.full import Reconstruction
from onnxsnp.reconstruction.sequential import STRENGTH, Joint, refit_in_order
from onnxsnp.surgery.apply import apply
from onnxsnp.surgery.rewrite import Cut, cut_array, cut_graph, mask_array, touched, weight_axes

FOLDER = Path(__file__).resolve().parent.parent / "exports"
EXPECTED: dict[str, dict[str, Any]] = json.loads((FOLDER / "expected.json").read_text())
CUT = ("qk", "v", "ffn")
Weights = dict[str, np.ndarray]


def residual_mlp(bias: bool = True) -> onnx.ModelProto:
    """Two FFN branches, with or without a bias, and a Gemm between reshapes for the second."""
    net = graphs.Net()
    h = net.input("x", ["N", 5, 8])
    hidden = net.op("Relu", net.linear(net.norm(h, "norm0", 8), "a1", 8, 12))
    h = net.op("Add", h, net.linear(hidden, "a2", 12, 8, bias))
    hidden = net.reshape(net.op("Relu", net.linear(net.norm(h, "norm1", 8), "b1", 8, 12)), -1, 12)
    operands = [net.weight("b2.w", 8, 12), *([net.weight("b2.b", 8)] if bias else [])]
    h = net.op("Add", net.reshape(net.op("Gemm", hidden, *operands, transB=1), -1, 5, 8), h)
    net.output(net.linear(net.norm(h, "norm2", 8), "head", 8, 4), ["N", 5, 4])
    return net.proto()


MODELS: dict[str, Any] = {
    "separate": graphs.transformer,
    "packed": functools.partial(graphs.transformer, qkv="packed", v=4),
    "class token": functools.partial(graphs.transformer, pool="first", gate="pair"),
    "biases and Gemm": residual_mlp,
    "no biases": functools.partial(residual_mlp, bias=False),
}
EXPORTS = [
    "hf_vit_sdpa_dynamo23_dyn",
    "own_gemm_ts17_dyn",
    "timm_beit_eager_ts17_dyn",
    "timm_distilled_sdpa_dynamo18_dyn",
    "timm_layerscale_eager_dynamo18",
    "torchvision_vit_mha_ts17_dyn",
]
ALL = [*MODELS, *EXPORTS]


@functools.cache
def case(name: str) -> tuple[Analysis, tuple[Weights, ...]]:
    """A model and inputs of different batch sizes, where it allows them."""
    if name in MODELS:
        model = MODELS[name]()
        return analyse_model(model), tuple(graphs.inputs_for(model, size, size) for size in (16, 16, 9))
    held = EXPECTED[f"{name}.onnx"]
    rng = np.random.default_rng(5)
    rest = held["input"]["shape"][1:]
    sizes = (8, 8, 5) if held["dynamic_batch"] else (held["input"]["shape"][0],) * 12
    feeds = tuple({held["input"]["name"]: rng.standard_normal((size, *rest)).astype(np.float32)} for size in sizes)
    return analyse_model(FOLDER / f"{name}.onnx"), feeds


def batches_of(feeds: Sequence[Weights]) -> list[Batch]:
    return [Batch(feed, None, len(next(iter(feed.values())))) for feed in feeds]


def half(analysis: Analysis, kinds: Sequence[str] = CUT) -> Plan:
    """Every second neuron, at other places in every head."""
    plans = []
    for group in analysis.structure.groups:
        if group.kind in kinds and group.prunable:
            keep = [list(range(head % 2, group.size - group.size % 2, 2)) for head in range(group.heads)]
            plans.append(graphs.keeping(group, keep))
    return Plan("", plans)


def refit(analysis: Analysis, plan: Plan, updates: Weights, feeds: Sequence[Weights], **options: Any) -> Weights:
    cuts = as_cuts(plan, analysis.groups)
    return refit_in_order(analysis, cuts, updates, batches_of(feeds), threads=1, local=False, **options)


def narrowed(analysis: Analysis, name: str, array: np.ndarray, cuts: Sequence[Cut]) -> np.ndarray:
    """What a cut leaves of a weight."""
    deps = analysis.dependencies
    mine = touched(deps, name, cuts)
    return cut_array(array, weight_axes(deps, name), deps.size, mine) if mine else array


def ridge(x: np.ndarray, t: np.ndarray, start: np.ndarray, strength: float, centred: bool) -> tuple[Any, Any]:
    """numpy's least squares with the ridge as further rows of the system."""
    mean, wanted = (x.mean(axis=0), t.mean(axis=0)) if centred else (np.zeros(x.shape[1]), np.zeros(t.shape[1]))
    inner, outer = x - mean, t - wanted
    force = np.sqrt(strength * np.mean(inner**2) * len(x))  # the mean over all entries is tr(C) / K
    rows = np.vstack([inner, force * np.eye(x.shape[1])])
    weight = np.linalg.lstsq(rows, np.vstack([outer, force * start]), rcond=None)[0]
    return weight, wanted - mean @ weight


def reference(
    analysis: Analysis,
    plan: Plan,
    updates: Weights,
    feeds: Sequence[Weights],
    stream: np.ndarray | None = None,
    strength: float = STRENGTH,
) -> Weights:
    """Both networks run from the start for every branch; new weights in their cut shapes."""
    cuts = as_cuts(plan, analysis.groups)
    narrow = cut_graph(analysis.graph, analysis.dependencies, cuts, updates)
    found = {}

    def run(graph: Graph, name: str, width: int, order: tuple[int, ...] | None = None) -> np.ndarray:
        session = graph.session([name], threads=1, optimize=False)
        arrays = [feed[name] if name in feed else session.run(None, feed)[0] for feed in feeds]
        if order is not None:  # tokens as the projection sees them
            arrays = [np.moveaxis(array, range(len(order)), order) for array in arrays]
        return np.concatenate([array.reshape(-1, width) for array in arrays]).astype(np.float64)

    for branch in find_branches(analysis.graph, analysis.dependencies, analysis.linears):
        linear = branch.linear
        start = np.moveaxis(narrow.weights[linear.weight], linear.inner, 0).astype(np.float64)
        wide = analysis.graph.weights[linear.weight].shape[linear.outer]
        target = run(analysis.graph, branch.stream, wide, branch.order)
        if stream is not None:
            target = target @ stream
        elif start.shape[1] < target.shape[1]:
            (channels,) = (entry.keep[0] for entry in plan.groups if entry.kind == "residual")
            target = target[:, channels]
        target -= run(narrow, branch.other, start.shape[1], branch.order)
        target /= narrow.weights[branch.scale].reshape(-1) if branch.scale else 1.0
        x = run(narrow, linear.data, len(start))
        weight, bias = ridge(x, target, start, strength, linear.bias is not None)
        found[linear.weight] = np.moveaxis(weight, 0, linear.inner).astype(np.float32)
        if linear.bias is not None:
            found[linear.bias] = bias.reshape(narrow.weights[linear.bias].shape).astype(np.float32)
        narrow.weights.update(found)
    return found


def check_same(analysis: Analysis, plan: Plan, found: Weights, want: Weights) -> None:
    """Equal where something is left, zero where it is cut, and nothing else is changed."""
    cuts, deps = as_cuts(plan, analysis.groups), analysis.dependencies
    assert found.keys() == want.keys()
    for name, array in found.items():
        original = analysis.graph.weights[name]
        assert (array.shape, array.dtype) == (original.shape, original.dtype)
        left = narrowed(analysis, name, array, cuts)
        assert left.shape == want[name].shape
        assert np.linalg.norm(left - want[name]) <= 1e-3 * np.linalg.norm(want[name]) + 1e-6, name
        masked = mask_array(array, weight_axes(deps, name), deps.size, touched(deps, name, cuts))
        assert np.array_equal(masked, array)


@pytest.mark.parametrize("strength", [0.05, 3.0])
@pytest.mark.parametrize("centred", [True, False])
def test_the_solution_is_least_squares_with_the_ridge_as_rows(centred: bool, strength: float) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((300, 6)) @ rng.standard_normal((6, 6)) + rng.standard_normal(6)
    t, start = rng.standard_normal((300, 4)) + 2 + x[:, :4], rng.standard_normal((6, 4))
    joint = Joint.empty(6, 4)
    joint.add(Joint.of(x, t))
    weight, bias = joint.solve(start, strength, centred=centred)
    want, shift = ridge(x, t, start, strength, centred)
    np.testing.assert_allclose(weight, want, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(bias, shift, rtol=1e-4, atol=1e-4)
    assert bias.any() == centred


def test_moments_add_up_over_the_batches() -> None:
    rng = np.random.default_rng(1)
    x, t = rng.standard_normal((50, 6)) + 1, rng.standard_normal((50, 4)) - 1
    joint = Joint.empty(6, 4)
    for part in (slice(0, 20), slice(20, 21), slice(21, 50)):
        joint.add(Joint.of(x[part], t[part]))
    assert joint.count == 50
    for got, want in (
        (joint.inputs, np.tril(x.T @ x)),
        (joint.cross, x.T @ t),
        (joint.total, x.sum(0)),
        (joint.wanted, t.sum(0)),
    ):
        assert got.dtype == np.float64
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)


def test_moments_of_half_precision_do_not_overflow_or_saturate() -> None:
    """Sums of float16 stop growing at 2048 and end at 65504."""
    x, t = np.full((5000, 2), 30, np.float16), np.full((5000, 1), 3, np.float16)
    joint = Joint.empty(2, 1)
    for _ in range(4):
        joint.add(Joint.of(x, t))
    assert (joint.inputs == np.tril(np.full((2, 2), 20000 * 900))).all() and (joint.cross == 20000 * 90).all()
    assert (joint.total == 20000 * 30).all() and (joint.wanted == 20000 * 3).all()


def test_inputs_that_are_always_zero_leave_the_weight_and_set_the_bias() -> None:
    joint = Joint.empty(3, 2)
    joint.add(Joint.of(np.zeros((9, 3)), np.tile([1.0, -2.0], (9, 1))))
    start = np.arange(6.0).reshape(3, 2)
    weight, bias = joint.solve(start, STRENGTH, centred=True)
    np.testing.assert_allclose(weight, start)
    np.testing.assert_allclose(bias, [1, -2])


@pytest.mark.parametrize("name", ALL)
def test_without_a_cut_the_weights_stay_what_they_were(name: str) -> None:
    analysis, feeds = case(name)
    found = refit(analysis, Plan("", []), {}, feeds)
    branches = find_branches(analysis.graph, analysis.dependencies, analysis.linears)
    assert found.keys() == {n for b in branches for n in (b.linear.weight, b.linear.bias) if n is not None}
    assert branches
    for key, array in found.items():
        want = analysis.graph.weights[key]
        assert np.abs(array - want).max() < 1e-4 * max(1.0, np.abs(want).max()), key


@pytest.mark.parametrize("name", ALL)
def test_each_branch_is_fitted_to_the_network_refitted_so_far(name: str) -> None:
    analysis, feeds = case(name)
    plan = half(analysis)
    found = refit(analysis, plan, {}, feeds)
    check_same(analysis, plan, found, reference(analysis, plan, {}, feeds))
    assert max(np.abs(array - analysis.graph.weights[key]).max() for key, array in found.items()) > 1e-2
    applied = apply(analysis, plan, found)
    assert prove(analysis, applied, feeds[:1]).passed


def test_the_ridge_pulls_towards_the_one_shot_weights() -> None:
    analysis, feeds = case("separate")
    plan, rng = half(analysis), np.random.default_rng(3)
    updates = {
        name: array + rng.standard_normal(array.shape).astype(np.float32) / 10
        for name, array in analysis.graph.weights.items()
        if name.endswith((".w", ".b")) and "blocks" in name
    }
    want = reference(analysis, plan, updates, feeds)
    check_same(analysis, plan, refit(analysis, plan, updates, feeds), want)
    cuts = as_cuts(plan, analysis.groups)
    held = refit(analysis, plan, updates, feeds, strength=1e7)
    for name, array in held.items():
        if name.endswith(".w"):
            left, start = (narrowed(analysis, name, one, cuts) for one in (array, updates[name]))
            np.testing.assert_allclose(left, start, atol=1e-4)


@pytest.mark.parametrize("kinds", [("residual",), (*CUT, "residual")])
def test_where_the_stream_loses_channels_the_others_are_fitted(kinds: tuple[str, ...]) -> None:
    analysis, feeds = case("separate")
    plan = half(analysis, kinds)
    assert "residual" in {entry.kind for entry in plan.groups}
    check_same(analysis, plan, refit(analysis, plan, {}, feeds), reference(analysis, plan, {}, feeds))


def test_where_the_stream_changes_its_basis_the_original_is_mapped() -> None:
    analysis, feeds = case("separate")
    plan = half(analysis, ("residual", "ffn"))
    stream = np.random.default_rng(2).standard_normal((12, 6)) / 3
    want = reference(analysis, plan, {}, feeds, stream)
    streams = {analysis.groups["residual"].atom: stream}
    check_same(analysis, plan, refit(analysis, plan, {}, feeds, streams=streams), want)


def test_without_a_bias_nothing_is_centred_and_none_is_written() -> None:
    analysis, feeds = case("no biases")
    assert refit(analysis, half(analysis), {}, feeds).keys() == {"a2.w", "b2.w"}


class Once:
    """Batches that can be gone through once; each is handed out when it is asked for."""

    def __init__(self, batches: Sequence[Batch]) -> None:
        self.batches, self.passes, self.given = batches, 0, 0

    def __iter__(self) -> Iterator[Batch]:
        self.passes += 1
        for batch in self.batches:
            self.given += 1
            yield batch


def test_the_samples_are_gone_through_once() -> None:
    analysis, feeds = case("separate")
    plan = half(analysis)
    cuts, once = as_cuts(plan, analysis.groups), Once(batches_of(feeds))
    steps: list[tuple[int, int]] = []
    found = refit_in_order(analysis, cuts, {}, once, threads=1, local=False, progress=lambda *step: steps.append(step))
    assert (once.passes, once.given) == (1, len(feeds))
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)]
    again = refit(analysis, plan, {}, feeds)
    assert all(np.array_equal(array, again[name]) for name, array in found.items())


def test_neither_the_samples_nor_the_graph_are_changed() -> None:
    analysis, feeds = case("separate")
    kept = [{name: array.copy() for name, array in feed.items()} for feed in feeds]
    weights = {name: array.copy() for name, array in analysis.graph.weights.items()}
    refit(analysis, half(analysis), {}, feeds)
    assert all(np.array_equal(one[name], other[name]) for one, other in zip(kept, feeds, strict=True) for name in one)
    assert all(np.array_equal(array, analysis.graph.weights[name]) for name, array in weights.items())


def test_how_samples_are_batched_does_not_matter() -> None:
    analysis, feeds = case("separate")
    plan = half(analysis)
    one = {name: np.concatenate([feed[name] for feed in feeds]) for name in feeds[0]}
    apart, together = refit(analysis, plan, {}, feeds), refit(analysis, plan, {}, [one])
    for name, array in apart.items():
        np.testing.assert_allclose(array, together[name], rtol=1e-3, atol=1e-4)


def test_without_samples_or_branches_there_is_nothing_new() -> None:
    analysis, _ = case("separate")
    assert refit(analysis, half(analysis), {}, []) == {}
    model = graphs.mlp(4, 6, 6, 4)
    assert refit(analyse_model(model), Plan("", []), {}, [graphs.inputs_for(model)]) == {}


def test_branches_that_are_computed_ahead_of_their_sums_do_no_harm() -> None:
    """The second projection is done before the sum of the first: its inputs are gone when its turn would come."""
    net = graphs.Net()
    x = net.input("x", ["N", 5, 8])
    a = net.linear(net.op("Relu", net.linear(x, "a1", 8, 12)), "a2", 12, 8)
    b = net.linear(net.op("Relu", net.linear(x, "b1", 8, 12)), "b2", 12, 8)
    h = net.op("Add", net.op("Add", a, net.op("Tanh", net.linear(x, "g", 8, 8))), b)
    net.output(net.op("Tanh", h), ["N", 5, 8])
    model = net.proto()
    analysis, feeds = analyse_model(model), [graphs.inputs_for(model, 30)]
    plan = half(analysis)
    assert len(plan.groups) == 2
    found = refit(analysis, plan, {}, feeds)
    assert found.keys() == {"a2.w", "a2.b"}
    check_same(analysis, plan, found, reference(analysis, plan, {}, feeds))


def test_half_precision_gives_what_single_precision_gives() -> None:
    singles = graphs.transformer(seed=4)
    halves = graphs.transformer(seed=4, dtype=np.float16)
    found = []
    for model in (singles, halves):
        analysis = analyse_model(model)
        feed = {name: array.astype(np.float16) for name, array in graphs.inputs_for(singles, 64).items()}
        kind = np.float32 if model is singles else np.float16
        found.append(refit(analysis, half(analysis), {}, [{name: array.astype(kind) for name, array in feed.items()}]))
    assert found[0].keys() == found[1].keys()
    for name, array in found[1].items():
        assert array.dtype == np.float16
        assert np.linalg.norm(array - found[0][name]) < 0.02 * np.linalg.norm(found[0][name])


def one_shot(analysis: Analysis, plan: Plan, feeds: Sequence[Weights]) -> Weights:
    groups = [analysis.groups[entry.id] for entry in plan.groups]
    needed = requirements(analysis, groups, "full", "snp", planned=True)
    statistics = collect(
        analysis.graph,
        analysis.dependencies,
        analysis.structure.sites,
        needed.scored,
        needed.tensors,
        batches_of(feeds),
        pair_groups=needed.rotated,
        gain_sites=needed.gained,
        threads=1,
    )
    return Reconstruction(analysis, statistics, "full").weights(plan)


@pytest.mark.parametrize("seed", range(4))
def test_on_the_data_of_the_fit_the_refit_comes_closer_than_the_one_shot_weights(seed: int) -> None:
    model = graphs.transformer(blocks=3, seed=seed, tokens=9)
    analysis, feeds = analyse_model(model), [graphs.inputs_for(model, 64, 10 * seed + part) for part in range(4)]
    plan = half(analysis)
    assert {entry.kind for entry in plan.groups} == set(CUT) and len(plan.groups) == 9
    updates = one_shot(analysis, plan, feeds)
    whole = as_graph(analysis.model).session(threads=1)
    errors = []
    for weights in (updates, {**updates, **refit(analysis, plan, updates, feeds)}):
        cut = apply(analysis, plan, weights).graph.session(threads=1)
        errors.append(sum(np.sum((whole.run(None, feed)[0] - cut.run(None, feed)[0]) ** 2) for feed in feeds))
    assert errors[1] < errors[0]


def test_weights_that_branches_share_stay_shared() -> None:
    net = graphs.Net()
    x = net.input("x", ["N", 5, 8])
    shared = net.weight("shared", 12, 8)
    for index in range(3):
        last = net.weight("own", 12, 8) if index == 2 else shared
        hidden = net.op("Relu", net.linear(net.norm(x, f"norm{index}", 8), f"a{index}", 8, 12))
        x = net.op("Add", x, net.op("MatMul", hidden, last))
    net.output(net.linear(x, "head", 8, 4), ["N", 5, 4])
    model = net.proto()
    analysis = analyse_model(model)
    plan = Plan("", [graphs.keeping(one, [range(6)]) for one in analysis.structure.groups if one.kind == "ffn"])
    assert len(plan.groups) == 2  # of the two networks with the shared layer one
    assert refit(analysis, plan, {}, [graphs.inputs_for(model, 32)]).keys() == {"own"}


def test_biases_that_are_one_tensor_do_not_keep_projections_from_their_refit() -> None:
    path = FOLDER / "timm_fresh_eager_ts17_dyn.onnx"  # fresh: every bias is zero, and the exporter kept one of them
    rng = np.random.default_rng(0)
    feeds = [{"image": rng.standard_normal((4, 3, 16, 16)).astype(np.float32)} for _ in range(4)]
    analysis = analyse_model(path)
    projections = {one.weight for one in analysis.linears.values() if one.bias in analysis.graph.origin}
    found = refit(analysis, half(analysis), {}, feeds)
    assert projections & found.keys()


@pytest.mark.parametrize("name", ["separate", "biases and Gemm"])
def test_inputs_kept_in_half_precision_change_little_and_only_in_its_range(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    analysis, feeds = case(name)
    plan = half(analysis)
    want = refit(analysis, plan, {}, feeds)
    monkeypatch.setattr(sequential, "_ROOM", 1)
    monkeypatch.setattr(sequential, "_LEAST", 0.0)
    found = refit(analysis, plan, {}, feeds)
    assert any(not np.array_equal(found[key], array) for key, array in want.items())
    for key, array in want.items():
        assert np.linalg.norm(found[key] - array) <= 3e-3 * np.linalg.norm(array) + 1e-6, key
    monkeypatch.setattr(sequential, "_MOST", 0.0)
    outside = refit(analysis, plan, {}, feeds)
    assert all(np.array_equal(outside[key], array) for key, array in want.items())
