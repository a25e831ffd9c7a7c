"""A rotated residual stream is exact where it should be, and its readers' fit is numpy's least squares."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import graphs
import numpy as np
import onnx
import pytest

from onnxsnp.analysis import Analysis, analyse_model
from onnxsnp.calibration.data import Batch
from onnxsnp.calibration.statistics import Moments, Statistics, collect
from onnxsnp.evaluation.verify import difference, prove
from onnxsnp.graph.ir import Graph
from onnxsnp.graph.linear import Linear
from onnxsnp.graph.normalize import as_graph
from onnxsnp.graph.residual import Norm
from onnxsnp.planning.curves import Loss, distance
from onnxsnp.planning.plan import GroupPlan, Plan
from onnxsnp.planning.selection import Selector, requirements
from onnxsnp.pruning import prune
from onnxsnp.reconstruction.full import Reconstruction
from onnxsnp.reconstruction.residual import (
    ResidualRotation,
    plain_moments,
    refittable_readers,
    residual_basis,
    without_mean,
)
from onnxsnp.surgery.apply import apply

FOLDER = Path(__file__).resolve().parent.parent / "exports"
EXPECTED: dict[str, dict[str, Any]] = json.loads((FOLDER / "expected.json").read_text())
EXPORTS = [
    "hf_deit_eager_ts17_dyn",
    "hf_vit_sdpa_dynamo23_dyn",
    "own_gemm_dynamo18",
    "own_flat_chunk_ts17",
    "timm_avgpool_eager_ts17_dyn",
    "timm_beit_eager_ts13",
    "timm_beit_sdpa_dynamo18",
    "timm_deit_eager_ts11",
    "timm_deit_sdpa_dynamo20_noopt",
    "timm_deit_sdpa_ts17_dyn",
    "timm_distilled_eager_ts17_dyn",
    "timm_distilled_sdpa_dynamo18_dyn",
    "timm_layerscale_eager_ts17_dyn",
    "timm_nobias_eager_dynamo18",
    "timm_nobias_eager_ts17_dyn",
    "torchvision_vit_mha_dynamo18",
]
BUILT: dict[str, dict[str, Any]] = {
    "separate": {},
    "packed": {"qkv": "packed", "v": 4},
    "class token": {"pool": "first"},
    "shared norms": {"shared_norm": True},
    "float64": {"dtype": np.float64},
    "opset 11": {"opset": 11, "qkv": "flat"},
}


def post_norm() -> onnx.ModelProto:
    """Two FFNs whose sums are normalised and carried on, as in BERT."""
    net = graphs.Net()
    h = net.norm(net.linear(net.input("x", ["N", 4, 7]), "embed", 7, 12), "norm0", 12)
    for index in (1, 2):
        y = net.linear(net.op("Relu", net.linear(h, f"up{index}", 12, 20)), f"down{index}", 20, 12)
        h = net.norm(net.op("Add", h, y), f"norm{index}", 12)
    net.output(net.linear(h, "head", 12, 3, bias=False), ["N", 4, 3])
    return net.proto()


@functools.cache
def case(name: str) -> tuple[Analysis, list[dict[str, np.ndarray]]]:
    """A model and inputs for it."""
    if name == "post-norm" or name in BUILT:
        model = post_norm() if name == "post-norm" else graphs.transformer(**BUILT[name])
        return analyse_model(model), [graphs.inputs_for(model, 8, seed) for seed in range(4)]
    held = EXPECTED[f"{name}.onnx"]
    rng = np.random.default_rng(5)
    shape = (4, *held["input"]["shape"][1:]) if held["dynamic_batch"] else held["input"]["shape"]
    feeds = [{held["input"]["name"]: rng.standard_normal(shape).astype(np.float32)} for _ in range(6)]
    return analyse_model(FOLDER / f"{name}.onnx"), feeds


def measured(
    analysis: Analysis, feeds: Sequence[dict[str, np.ndarray]], compensation: str = "full", scope: str = "residual"
) -> Statistics:
    groups = [group for group in analysis.structure.groups if group.kind in scope.split(",")]
    needed = requirements(analysis, groups, compensation, "l2", planned=True)
    batches = [Batch(feed, None, len(next(iter(feed.values())))) for feed in feeds]
    sites, pairs = analysis.structure.sites, needed.rotated
    return collect(
        analysis.graph, analysis.dependencies, sites, (), needed.tensors, batches, pair_groups=pairs, threads=1
    )


def rotation(
    analysis: Analysis, feeds: Sequence[dict[str, np.ndarray]], ridge: float | None = 1e-3
) -> ResidualRotation:
    site = analysis.rotations.residuals["residual"]
    return ResidualRotation(analysis, site, measured(analysis, feeds).moments, ridge)


def replaced(analysis: Analysis, updates: dict[str, np.ndarray]) -> Graph:
    graph = analysis.graph.copy()
    for name, array in updates.items():
        assert array.shape == graph.weights[name].shape and array.dtype == graph.weights[name].dtype
    graph.weights.update(updates)
    return graph


def gap(analysis: Analysis, graph: Graph, feeds: Sequence[dict[str, np.ndarray]]) -> float:
    return difference(as_graph(analysis.model), graph, feeds, 1)


def narrowed(analysis: Analysis, kept: int, seed: int | None = None) -> Plan:
    """The first places of the stream, or random ones."""
    size = analysis.groups["residual"].size
    places = range(kept) if seed is None else sorted(np.random.default_rng(seed).permutation(size)[:kept].tolist())
    return Plan("", [GroupPlan("residual", "residual", size, 1, [list(places)])])


def values(analysis: Analysis, feeds: Sequence[dict[str, np.ndarray]], tensor: str) -> np.ndarray:
    """Every token of an activation, [tokens, width]."""
    session = analysis.graph.session([tensor], threads=1, optimize=False)
    found = np.concatenate([session.run(None, feed)[0] for feed in feeds]).astype(np.float64)
    return found.reshape(-1, found.shape[-1])


def affine(analysis: Analysis, norm: Norm) -> tuple[np.ndarray, np.ndarray]:
    weights = analysis.graph.weights
    scale = weights[norm.scale].reshape(-1).astype(np.float64)
    return scale, np.zeros_like(scale) if norm.shift is None else weights[norm.shift].reshape(-1).astype(np.float64)


@pytest.mark.parametrize("name", [*BUILT, *EXPORTS])
def test_another_basis_with_nothing_cut_changes_the_weights_but_not_the_model(name: str) -> None:
    analysis, feeds = case(name)
    updates = rotation(analysis, feeds).weights(np.arange(analysis.groups["residual"].size), {})
    site = analysis.rotations.residuals["residual"]
    assert {place[0] for place in site.group.places} - updates.keys() == set()
    for weight, _ in site.writers:
        assert not np.allclose(updates[weight], analysis.graph.weights[weight], atol=1e-3)
    assert gap(analysis, replaced(analysis, updates), feeds[:2]) < (1e-9 if name == "float64" else 1e-5)


def low_rank(analysis: Analysis, rank: int) -> Analysis:
    """The model with its stream confined to random directions, apart from what normalisations ignore."""
    site = analysis.rotations.residuals["residual"]
    size = site.group.size
    turn = np.linalg.qr(np.random.default_rng(7).standard_normal((size - 1, rank)))[0]
    inside = without_mean(size) @ turn
    graph = analysis.graph.copy()
    for name, axis in site.writers:
        array = np.moveaxis(graph.weights[name], axis, -1)
        flat = array @ inside @ inside.T + 0.3  # the same for all channels
        graph.weights[name] = np.moveaxis(flat, -1, axis).astype(array.dtype)
    return analyse_model(graph.to_proto())


@pytest.mark.parametrize(
    "name",
    ["separate", "packed", "opset 11", "hf_deit_eager_ts17_dyn", "own_gemm_dynamo18", "timm_nobias_eager_ts17_dyn"],
)
def test_a_stream_that_needs_less_room_loses_nothing_when_it_gets_less(name: str) -> None:
    whole, feeds = case(name)
    size = whole.groups["residual"].size
    rank = size * 2 // 3
    analysis = low_rank(whole, rank)
    statistics = measured(analysis, feeds)
    reconstruction = Reconstruction(analysis, statistics, "full")
    plan = narrowed(analysis, rank + 1, seed=1)
    cut = apply(analysis, plan, reconstruction.weights(plan))
    assert prove(analysis, cut, feeds[:1], 1).passed
    assert gap(analysis, cut.graph, feeds[:2]) < 1e-4
    errors = reconstruction.errors(analysis.groups["residual"])
    assert errors[rank + 1] < 1e-6 and errors[rank] > 1e-4
    less = narrowed(analysis, rank, seed=1)
    assert gap(analysis, apply(analysis, less, reconstruction.weights(less)).graph, feeds[:2]) > 1e-3
    selected = apply(analysis, plan, Reconstruction(analysis, statistics, "refit").weights(plan))
    assert gap(analysis, selected.graph, feeds[:2]) > 1e-2


@pytest.mark.parametrize("name", [*BUILT, *EXPORTS])
def test_the_cut_model_is_proved_and_it_does_not_matter_which_places_carry_the_new_channels(name: str) -> None:
    analysis, feeds = case(name)
    reconstruction = Reconstruction(analysis, measured(analysis, feeds), "full")
    kept = analysis.groups["residual"].size * 3 // 4
    plans = [narrowed(analysis, kept, seed) for seed in (None, 1)]
    cuts = [apply(analysis, plan, reconstruction.weights(plan)) for plan in plans]
    for cut in cuts:
        verification = prove(analysis, cut, feeds[:1], 1)
        assert verification.passed and verification.masked_equality < 1e-5
    assert difference(cuts[0].graph, cuts[1].graph, feeds[:2], 1) < 1e-5
    # nothing but weights changes: packed projections stay packed
    assert len(cuts[0].graph.nodes) == len(apply(analysis, plans[0]).graph.nodes)


@pytest.mark.parametrize("name", ["separate", "float64", "timm_nobias_eager_ts17_dyn", "timm_avgpool_eager_ts17_dyn"])
def test_the_fit_of_a_reader_is_numpys_least_squares(name: str) -> None:
    analysis, feeds = case(name)
    site = analysis.rotations.residuals["residual"]
    made = rotation(analysis, feeds, 1e-12)
    size, kept = site.group.size, site.group.size // 2
    updates = made.weights(np.arange(kept), {})
    directions = made.basis.directions[:, : kept - 1]
    for linear, norm in site.readers:
        scale, shift = affine(analysis, norm)
        weight = np.moveaxis(analysis.graph.weights[linear.weight], linear.inner, 0).astype(np.float64)
        data = values(analysis, feeds, linear.data)
        n = (data - shift) / scale
        inside = n @ directions
        fit = np.linalg.lstsq(np.column_stack([inside, np.ones(len(n))]), data @ weight, rcond=None)[0]
        left = np.sqrt((inside**2).sum() / (n**2).sum())
        fresh = np.moveaxis(updates[linear.weight], linear.inner, 0)[:kept].astype(np.float64)
        want = left * np.sqrt(size / kept) * without_mean(kept) @ fit[:-1]
        added = fresh - want
        if linear.bias is None:  # what a shift of 1 in every channel adds up to
            np.testing.assert_allclose(updates[norm.shift].reshape(-1)[:kept], 1)
            np.testing.assert_allclose(added.sum(axis=0), fit[-1], atol=2e-3)
            added = added - fit[-1] / kept
        else:
            change = updates[linear.bias].reshape(-1) - analysis.graph.weights[linear.bias].reshape(-1)
            np.testing.assert_allclose(change, fit[-1], atol=2e-3)
        np.testing.assert_allclose(added, 0, atol=2e-3)


def test_directions_are_the_principal_ones_without_a_mean_and_the_curve_is_what_they_leave() -> None:
    rng = np.random.default_rng(0)
    sites = []
    for strength in (1.0, 50.0):
        x = strength * rng.standard_normal((300, 9)) @ rng.standard_normal((9, 9))
        sites.append(x - x.mean(axis=1, keepdims=True))
    basis = residual_basis([x.T @ x for x in sites])
    np.testing.assert_allclose(basis.directions.T @ basis.directions, np.eye(8), atol=1e-12)
    np.testing.assert_allclose(basis.directions.sum(axis=0), 0, atol=1e-12)
    for width in range(1, 10):
        kept = basis.directions[:, : width - 1]
        left = np.mean([1 - ((x @ kept) ** 2).sum() / (x**2).sum() for x in sites])
        assert basis.errors[width] == pytest.approx(left, abs=1e-9)
    both = np.concatenate([x / np.linalg.norm(x) for x in sites])
    best = np.linalg.svd(both)[2][:4]
    assert basis.errors[5] == pytest.approx(1 - ((both @ best.T) ** 2).sum() / 2, abs=1e-9)
    assert len(basis.errors) == 10 and basis.errors[0] == basis.errors[1] and (np.diff(basis.errors) <= 0).all()


@pytest.mark.parametrize("hidden", [[], [2], [0, 5, 6]])
def test_what_a_normalisation_hides_follows_from_the_sum_over_the_channels(hidden: list[int]) -> None:
    rng = np.random.default_rng(1)
    n = rng.standard_normal((500, 10)) @ rng.standard_normal((10, 10))
    n = (n - n.mean(axis=1, keepdims=True)) / n.std(axis=1, keepdims=True)
    scale, shift = rng.uniform(0.5, 2, 10), rng.standard_normal(10)
    scale[hidden] = 0
    data = n * scale + shift
    mean, second = plain_moments(Moments(data.T @ data, data.sum(axis=0), len(data)), scale, shift)
    truth, seen = n.T @ n / len(n), np.setdiff1d(np.arange(10), hidden)
    if len(hidden) < 2:
        np.testing.assert_allclose(second, truth, atol=1e-9)
        np.testing.assert_allclose(mean, n.mean(axis=0), atol=1e-9)
    np.testing.assert_allclose(second[np.ix_(seen, seen)], truth[np.ix_(seen, seen)], atol=1e-9)
    np.testing.assert_allclose(second[hidden].sum(axis=0)[seen], truth[hidden].sum(axis=0)[seen], atol=1e-9)
    np.testing.assert_allclose(second.sum(axis=0), 0, atol=1e-9)
    assert np.trace(second) == pytest.approx(10) and np.linalg.eigvalsh(second).min() > -1e-9


def test_other_groups_cuts_and_the_rotation_of_the_stream_go_together() -> None:
    for name in ("separate", "timm_deit_sdpa_ts17_dyn", "timm_nobias_eager_ts17_dyn", "timm_beit_eager_ts13"):
        analysis, feeds = case(name)
        statistics = measured(analysis, feeds, scope="qk,v,ffn,residual")
        reconstruction = Reconstruction(analysis, statistics, "full")
        chooser = Selector(analysis, statistics, reconstruction, "l2")
        rest = {group.id: group.size // 2 for group in analysis.structure.groups if group.kind in ("qk", "v", "ffn")}
        size = analysis.groups["residual"].size
        plan = Plan("", chooser.entries({**rest, "residual": size * 3 // 4}))
        updates = reconstruction.weights(plan)
        assert prove(analysis, apply(analysis, plan, updates), feeds[:1], 1).passed
        # the stream on its own in another basis does not change what the other cuts made
        others = Plan("", chooser.entries(rest))
        cut = reconstruction.weights(others)
        made = ResidualRotation(analysis, analysis.rotations.residuals["residual"], statistics.moments)
        last = made.weights(np.arange(size * 3 // 4), cut)
        assert updates.keys() == cut.keys() | last.keys()
        for weight, array in (cut | last).items():
            np.testing.assert_allclose(updates[weight], array, atol=1e-6)
        turned = cut | made.weights(np.arange(size), cut)
        small, same = (apply(analysis, others, new).graph for new in (cut, turned))
        assert difference(small, same, feeds[:2], 1) < 1e-4
        assert gap(analysis, small, feeds[:2]) > 1e-3


def test_the_loss_of_a_plan_is_that_of_the_narrow_model() -> None:
    for name in ("separate", "timm_deit_sdpa_ts17_dyn", "opset 11"):
        analysis, feeds = case(name)
        reconstruction = Reconstruction(analysis, measured(analysis, feeds), "full")
        plan = narrowed(analysis, analysis.groups["residual"].size * 2 // 3)
        batches = [Batch(feed, None, len(next(iter(feed.values())))) for feed in feeds[:2]]
        found = Loss(analysis, reconstruction, batches, threads=1)(plan.groups)
        graph = apply(analysis, plan, reconstruction.weights(plan)).graph
        runs = [[one.session(threads=1).run(None, feed)[0] for feed in feeds[:2]] for one in (analysis.original, graph)]
        assert found == pytest.approx(np.mean([distance(*pair) for pair in zip(*runs, strict=True)]), rel=1e-3)
        assert found > 1e-3


@pytest.mark.parametrize(("name", "compensation"), [("post-norm", "refit"), ("post-norm", "full"), ("packed", "refit")])
def test_where_channels_are_selected_readers_take_numpys_least_squares(name: str, compensation: str) -> None:
    analysis, feeds = case(name)
    group = analysis.groups["residual"]
    if name == "post-norm":
        assert "adds to what is normalised" in analysis.rotations.blocked["residual"]
    statistics = measured(analysis, feeds, compensation)
    reconstruction = Reconstruction(analysis, statistics, compensation)
    assert not reconstruction.rotates(group)
    chooser = Selector(analysis, statistics, reconstruction, "l2")
    assert chooser.curve(group) is None
    plan = Plan("", chooser.entries({"residual": 9}))
    selected = Selector(analysis, Statistics(), Reconstruction(analysis, Statistics(), "none"), "l2")
    assert plan.groups[0].keep == selected.entries({"residual": 9})[0].keep
    updates = reconstruction.weights(plan)
    readers: list[Linear] = refittable_readers(group, analysis)
    assert {linear.weight for linear in readers} == {weight for weight, _ in group.consumers}
    assert updates.keys() == {name for linear in readers for name in (linear.weight, linear.bias) if name}
    keep = np.asarray(plan.groups[0].keep[0])
    for linear in readers:
        weight = analysis.graph.weights[linear.weight].astype(np.float64)
        x = values(analysis, feeds, linear.data)
        middle = x.mean(axis=0) if linear.bias is not None else np.zeros(x.shape[1])
        second = (x - middle).T @ (x - middle) / len(x)
        ridge = np.sqrt(1e-3 * np.trace(second) / len(second) * len(x))
        left = np.concatenate([(x - middle)[:, keep], ridge * np.eye(9)])
        right = np.concatenate([(x - middle) @ weight, ridge * weight[keep]])
        fit = np.linalg.lstsq(left, right, rcond=None)[0]
        np.testing.assert_allclose(updates[linear.weight][keep], fit, atol=1e-4)
        assert not np.delete(updates[linear.weight], keep, axis=0).any()
        if linear.bias is not None:
            change = updates[linear.bias] - analysis.graph.weights[linear.bias]
            np.testing.assert_allclose(change, middle @ weight - middle[keep] @ fit, atol=1e-4)
    assert prove(analysis, apply(analysis, plan, updates), feeds[:1], 1).passed


def kl(model: Any, data: Any, compensation: str, scope: str = "residual", samples: int = 96) -> float:
    options = {"allocation": "uniform", "scope": scope, "criterion": "l2", "samples": samples, "latency": False}
    record = prune(model, 0.2, calibration=data, compensation=compensation, threads=1, **options).record
    assert record["verification"]["passed"] and record["verification"]["masked_equality"] < 1e-4
    group = next(group for group in record["groups"] if group["kind"] == "residual")
    assert group["after"] == round(0.8 * group["before"])
    return record["agreement"]["kl"]


@pytest.mark.parametrize("name", ["timm_deit_sdpa_ts17_dyn", "hf_vit_sdpa_dynamo23_dyn"])
def test_held_back_samples_follow_the_original_better_than_after_selection(name: str) -> None:
    held = EXPECTED[f"{name}.onnx"]["input"]
    images = np.random.default_rng(3).standard_normal((160, *held["shape"][1:])).astype(np.float32)
    none, refit, full = (kl(FOLDER / f"{name}.onnx", {held["name"]: images}, how) for how in ("none", "refit", "full"))
    assert full < 0.8 * refit and full < 0.5 * none
    assert kl(FOLDER / f"{name}.onnx", {held["name"]: images}, "full", "qk,v,ffn,residual") < none


def test_a_trained_model_keeps_its_answers(real_data: Path) -> None:
    data = real_data / "data" / "cifar10" / "train.zip"
    if not data.exists():
        pytest.skip(f"no CIFAR-10 images at {data}")
    model = FOLDER.parent.parent / "models" / "deit_cifar10.onnx"
    none, refit, full = (kl(model, data, how) for how in ("none", "refit", "full"))
    assert full < 0.5 * refit < 0.5 * none
