"""The loss of a plan is that of the model really cut, whatever the outputs are and however small the weights."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import graphs
import numpy as np
import onnx
import pytest

from onnxsnp.analysis import Analysis, analyse_model
from onnxsnp.calibration.data import Batch
from onnxsnp.calibration.statistics import Statistics, collect
from onnxsnp.evaluation.verify import difference
from onnxsnp.graph.normalize import as_graph
from onnxsnp.planning.curves import Loss, distance, masked_weights
from onnxsnp.planning.plan import GroupPlan, Plan
from onnxsnp.planning.selection import COMPENSATIONS, requirements
from onnxsnp.reconstruction.full import Reconstruction
from onnxsnp.surgery.apply import apply

FOLDER = Path(__file__).resolve().parent.parent / "exports"
MODELS: dict[str, Any] = {
    "separate": graphs.transformer,
    "packed": lambda: graphs.transformer(qkv="packed", v=4),
    "gated": lambda: graphs.transformer(gate="pair", activation="gelu_tanh", scale="shape"),
    "mlp": lambda: graphs.mlp(6, 9, 12, 5),
    "one output value": lambda: graphs.mlp(6, 9, 1),
    "own_dv_ts17_dyn": lambda: onnx.load(str(FOLDER / "own_dv_ts17_dyn.onnx")),
    "timm_deit_sdpa_dynamo23_dyn": lambda: onnx.load(str(FOLDER / "timm_deit_sdpa_dynamo23_dyn.onnx")),
    "torchvision_vit_mha_ts17_dyn": lambda: onnx.load(str(FOLDER / "torchvision_vit_mha_ts17_dyn.onnx")),
}


def tokens_out() -> onnx.ModelProto:
    """Two outputs, [batch, tokens, width] and [batch, classes], and one that is no float."""
    net = graphs.Net()
    x = net.input("x", ["N", 4, 6])
    h = net.linear(net.op("Relu", net.linear(x, "fc1", 6, 10)), "fc2", 10, 6)
    logits = net.linear(net.mean(h, 1, keepdims=0), "head", 6, 3)
    chosen = net.op("ArgMax", logits, axis=1, keepdims=0)
    net.output(h, ["N", 4, 6], "h")
    net.output(logits, ["N", 3], "logits")
    net.output(chosen, ["N"], "chosen", np.int64)
    return net.proto()


MODELS["three outputs"] = tokens_out


@functools.cache
def case(name: str) -> tuple[Analysis, list[Batch]]:
    model = MODELS[name]()
    last = graphs.inputs_for(model, 6, 9)
    # the last batch is filled up by repetition, as with a fixed batch: only four samples count
    last = {key: np.concatenate([array[:4], array[3:4], array[3:4]]) for key, array in last.items()}
    whole = [Batch(graphs.inputs_for(model, 6, seed), None, 6) for seed in range(3)]
    return analyse_model(model), [*whole, Batch(last, None, 4)]


def cuttable(analysis: Analysis) -> list[Any]:
    return [group for group in analysis.structure.groups if group.kind in ("qk", "v", "ffn") and group.prunable]


def reconstruction_of(
    analysis: Analysis, data: Sequence[Batch], compensation: str, stream: bool = False
) -> Reconstruction:
    groups = [*cuttable(analysis), *([analysis.groups["residual"]] if stream else [])]
    needed = requirements(analysis, groups, compensation, "l2", planned=True)
    if needed.nothing:
        return Reconstruction(analysis, Statistics(), compensation)
    statistics = collect(
        analysis.graph,
        analysis.dependencies,
        analysis.structure.sites,
        (),
        needed.tensors,
        data,
        pair_groups=needed.rotated,
        threads=1,
    )
    return Reconstruction(analysis, statistics, compensation)


def literal(analysis: Analysis, graph: Any, data: Sequence[Batch]) -> float:
    """Sample by sample: KL of the softmax of rows of logits; else the squared error over a batch's variance."""
    original, other = as_graph(analysis.model).session(threads=1), graph.session(threads=1)
    total, samples = 0.0, 0
    for batch in data:
        for want, got in zip(original.run(None, batch.inputs), other.run(None, batch.inputs), strict=True):
            want, got = want[: batch.count], got[: batch.count]
            if want.dtype.kind != "f":
                continue
            want, got = want.astype(np.float64), got.astype(np.float64)
            if want.ndim == 2 and want.shape[1] > 1:
                for row, moved in zip(want, got, strict=True):
                    p, q = (np.exp(one) / np.exp(one).sum() for one in (row, moved))
                    total += float(np.sum(p * np.log(p / q)))
            else:
                total += batch.count * float(np.mean((want - got) ** 2) / np.var(want))
        samples += batch.count
    return total / samples


@pytest.mark.parametrize("compensation", COMPENSATIONS)
@pytest.mark.parametrize("name", MODELS)
def test_it_is_the_loss_of_the_cut_model(name: str, compensation: str) -> None:
    analysis, data = case(name)
    reconstruction = reconstruction_of(analysis, data, compensation)
    loss = Loss(analysis, reconstruction, data, threads=1)
    rng = np.random.default_rng(2)
    groups = cuttable(analysis)
    for chosen in (groups, groups[:1], groups[-1:]):
        plan = graphs.random_plan(chosen, rng)
        cut = apply(analysis, plan, reconstruction.weights(plan))
        want = literal(analysis, cut.graph, data)
        assert want > 1e-7
        assert loss(plan.groups) == pytest.approx(want, rel=1e-2, abs=1e-7)


def test_no_cut_is_no_loss_and_losses_do_not_remember_each_other() -> None:
    analysis, data = case("separate")
    reconstruction = reconstruction_of(analysis, data, "full")
    loss = Loss(analysis, reconstruction, data, threads=1)
    assert loss([]) == 0
    plans = [graphs.random_plan(cuttable(analysis), np.random.default_rng(seed)).groups for seed in range(3)]
    first = [loss(entries) for entries in plans]
    assert len(set(first)) == 3 and [loss(entries) for entries in reversed(plans)] == first[::-1]
    whole = [graphs.keeping(group, [list(range(group.size))] * group.heads) for group in cuttable(analysis)]
    assert loss(whole) == loss([]) == 0


def test_a_cut_of_dead_neurons_is_no_loss() -> None:
    model = graphs.transformer()
    weights = {name: array.copy() for name, array in graphs.initializers(model).items()}
    weights["/blocks.0/mlp/fc2.w"][[3, 8, 17]] = 0
    model = graphs.set_weights(model, weights)
    analysis = analyse_model(model)
    data = [Batch(graphs.inputs_for(model, 6), None, 6)]
    loss = Loss(analysis, reconstruction_of(analysis, data, "none"), data, threads=1)
    alive = [index for index in range(20) if index not in (3, 8, 17)]
    assert loss([GroupPlan("ffn.0", "ffn", 20, 1, [alive])]) == pytest.approx(0, abs=1e-9)
    assert loss([GroupPlan("ffn.0", "ffn", 20, 1, [alive[1:]])]) > 1e-6


def test_biases_of_a_few_entries_are_replaced_too() -> None:
    """Weights of at most 16 entries otherwise stay inside the session, where nothing can replace them."""
    analysis, data = case("separate")
    reconstruction = reconstruction_of(analysis, data, "full")
    group = analysis.groups["v.0"]
    entries = [graphs.keeping(group, [[0]] * group.heads)]
    weights = masked_weights(analysis, entries, reconstruction.weights(Plan("", entries)))
    assert weights["/blocks.0/attn/proj.b"].size == 12
    value = Loss(analysis, reconstruction, data, threads=1)(entries)
    plan = Plan("", entries)
    updates = reconstruction.weights(plan)
    bias = updates["/blocks.0/attn/proj.b"]
    assert np.abs(bias - analysis.graph.weights["/blocks.0/attn/proj.b"]).max() > 0.05
    right = literal(analysis, apply(analysis, plan, updates).graph, data)
    del updates["/blocks.0/attn/proj.b"]
    wrong = literal(analysis, apply(analysis, plan, updates).graph, data)
    assert abs(value - right) < 0.01 * abs(wrong - right)


@pytest.mark.parametrize("name", ["separate", "packed", "gated", "mlp"])
def test_masked_weights_in_the_original_shapes_are_the_cut_model(name: str) -> None:
    analysis, data = case(name)
    reconstruction = reconstruction_of(analysis, data, "full")
    plan = graphs.random_plan(cuttable(analysis), np.random.default_rng(0))
    weights = masked_weights(analysis, plan.groups, reconstruction.weights(plan))
    graph = analysis.graph.copy()
    assert all(
        array.shape == graph.weights[key].shape and array.dtype == graph.weights[key].dtype
        for key, array in weights.items()
    )
    graph.weights.update(weights)
    cut = apply(analysis, plan, reconstruction.weights(plan)).graph
    assert difference(graph, cut, [batch.inputs for batch in data], 1) < 1e-5


def test_distance_is_kl_for_classes_and_relative_error_for_anything_else() -> None:
    rng = np.random.default_rng(0)
    logits, other = rng.standard_normal((2, 7, 4))
    p, q = (np.exp(one) / np.exp(one).sum(axis=1, keepdims=True) for one in (logits, other))
    assert distance(logits, other) == pytest.approx(np.mean(np.sum(p * np.log(p / q), axis=1)))
    assert distance(logits, logits + 3.0) == pytest.approx(0, abs=1e-12)
    assert distance(logits, logits * 1.5) != pytest.approx(distance(logits * 1.5, logits), rel=1e-3)
    for shape in ((7, 1), (7,), (3, 5, 4), (2, 3, 4, 5)):
        want, got = rng.standard_normal((2, *shape))
        assert distance(want, got) == pytest.approx(np.mean((want - got) ** 2) / np.var(want))
        assert distance(want, want) == 0
    assert distance(np.ones((3, 1)), np.full((3, 1), 1.5)) == pytest.approx(0.25)  # nothing to be relative to
    half = rng.standard_normal((7, 4)).astype(np.float16) * 60
    assert np.isfinite(distance(half, half[::-1]))


PLACES: dict[str, Any] = {
    "three blocks": lambda: graphs.transformer(blocks=3),
    "class token": lambda: graphs.transformer(pool="first", blocks=2, gate="pair"),
    "opset 11": lambda: graphs.transformer(opset=11, qkv="flat"),
    "timm_distilled_sdpa_dynamo18_dyn": lambda: onnx.load(str(FOLDER / "timm_distilled_sdpa_dynamo18_dyn.onnx")),
    "timm_layerscale_eager_ts17_dyn": lambda: onnx.load(str(FOLDER / "timm_layerscale_eager_ts17_dyn.onnx")),
}
MODELS.update(PLACES)


@pytest.mark.parametrize("name", PLACES)
def test_wherever_the_network_is_run_on_from_the_loss_is_the_same(name: str) -> None:
    analysis, data = case(name)
    reconstruction = reconstruction_of(analysis, data, "full")
    loss = Loss(analysis, reconstruction, data, threads=1)
    tails, nodes = loss._tails, len(analysis.graph.nodes)
    assert len(tails) > 2 and tails[0].first == 0 and tails[-1].first < nodes
    assert all(one.first < two.first for one, two in pairwise(tails))
    groups, rng = cuttable(analysis), np.random.default_rng(1)
    last = max(int(group.id.split(".")[1]) for group in groups)
    blocks = {index: [one for one in groups if one.id.endswith(f".{index}")] for index in range(last + 1)}
    places = set()
    for chosen in (groups, blocks[0], blocks[last], *([one] for one in groups)):
        plan = graphs.random_plan(chosen, rng)
        updates = reconstruction.weights(plan)
        want = literal(analysis, apply(analysis, plan, updates).graph, data)
        weights = masked_weights(analysis, plan.groups, updates)
        first = min(loss._read[key] for key in weights)
        values = [loss(plan.groups)]
        for tail in tails:
            if tail.first <= first:
                fed = {key: array for key, array in weights.items() if key in tail.weights}
                assert fed.keys() == weights.keys()  # a weight may only be left out where nothing reads it
                values.append(loss._distance(tail.session, tail.states, fed, None))
        places.add(len(values) - 1)
        assert values == pytest.approx([values[0]] * len(values), rel=1e-3, abs=1e-8)
        assert values[0] == pytest.approx(want, rel=1e-2, abs=1e-7) and want > 0
    assert 1 in places and max(places) >= 2  # some plans can only be run from the start, others not only from there


@pytest.mark.parametrize("name", PLACES)
def test_the_loss_is_measured_where_only_a_weight_of_the_last_place_changes(name: str) -> None:
    """Also one that no plan touches: the head's, given as an update."""
    analysis, data = case(name)
    loss = Loss(analysis, reconstruction_of(analysis, data, "none"), data, threads=1)
    order = {node.name: index for index, node in enumerate(analysis.graph.nodes)}
    for linear in sorted(analysis.linears.values(), key=lambda linear: order[linear.node])[::3]:
        changed = {linear.weight: (analysis.graph.weights[linear.weight] * 1.5).astype(np.float32)}
        graph = analysis.graph.copy()
        graph.weights.update(changed)
        want = literal(analysis, graph, data)
        assert want > 1e-7
        assert loss.of([], changed) == pytest.approx(want, rel=1e-2)


@pytest.mark.parametrize("compensation", ["none", "refit", "full"])
@pytest.mark.parametrize("name", ["three blocks", "opset 11", "timm_distilled_sdpa_dynamo18_dyn"])
def test_a_stream_that_normalisations_average_over_is_really_cut(name: str, compensation: str) -> None:
    analysis, data = case(name)
    reconstruction = reconstruction_of(analysis, data, compensation, stream=True)
    stream = analysis.groups["residual"]
    assert reconstruction.rotates(stream) == (compensation == "full")
    loss = Loss(analysis, reconstruction, data, threads=1)
    rng = np.random.default_rng(3)
    for others in ([], cuttable(analysis)[-1:], cuttable(analysis)):
        channels = np.arange(stream.size * 2 // 3) if compensation == "full" else rng.permutation(stream.size)[:-3]
        plan = graphs.random_plan(others, rng)
        plan = Plan("", [graphs.keeping(stream, [sorted(channels.tolist())]), *plan.groups])
        updates = reconstruction.weights(plan)
        want = literal(analysis, apply(analysis, plan, updates).graph, data)
        assert loss(plan.groups) == pytest.approx(want, rel=1e-3) and want > 1e-4
        graph = analysis.graph.copy()
        graph.weights.update(masked_weights(analysis, plan.groups, updates))
        assert abs(literal(analysis, graph, data) - want) > 0.01 * want  # zeros in place of channels are no cut
    assert loss([]) == 0


def test_the_first_samples_alone_give_the_loss_of_these() -> None:
    analysis, data = case("three blocks")
    reconstruction = reconstruction_of(analysis, data, "full", stream=True)
    loss = Loss(analysis, reconstruction, data, threads=1)
    groups = cuttable(analysis)
    stream = graphs.keeping(analysis.groups["residual"], [list(range(9))])
    for entries in (
        graphs.random_plan(groups[-1:], np.random.default_rng(0)).groups,
        [stream, *graphs.random_plan(groups[:2], np.random.default_rng(0)).groups],
    ):
        graph = apply(analysis, Plan("", entries), reconstruction.weights(Plan("", entries))).graph
        for samples, batches in ((1, 1), (6, 1), (7, 2), (12, 2), (13, 3), (19, 4), (22, 4), (99, 4)):
            want = literal(analysis, graph, data[:batches])
            assert loss(entries, samples) == pytest.approx(want, rel=1e-2)
