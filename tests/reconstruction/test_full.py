"""Rotated attention is exact where it should be: all neurons kept, planted low rank, and after the cut as proved."""

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
from onnxsnp.calibration.statistics import Statistics, collect
from onnxsnp.evaluation.verify import difference, prove
from onnxsnp.graph.groups import Group
from onnxsnp.graph.normalize import as_graph
from onnxsnp.planning.plan import GroupPlan, Plan
from onnxsnp.planning.selection import requirements
from onnxsnp.reconstruction.full import Reconstruction, pair_bases, rotate_pairs, rotate_values, value_bases
from onnxsnp.surgery.apply import apply

FOLDER = Path(__file__).resolve().parent.parent / "exports"
EXPECTED: dict[str, dict[str, Any]] = json.loads((FOLDER / "expected.json").read_text())
EXPORTS = [
    "hf_deit_eager_ts17_dyn",
    "hf_vit_sdpa_dynamo23_dyn",
    "own_dv_ts17_dyn",
    "own_dv_dynamo18_dyn",
    "own_flat_chunk_ts17",
    "own_flat_split_ts17_dyn",
    "own_gemm_dynamo18",
    "timm_beit_eager_ts13",
    "timm_deit_eager_dynamo18",
    "timm_deit_sdpa_dynamo20_noopt",
    "timm_deit_sdpa_dynamo23_dyn",
    "timm_deit_sdpa_ts17_dyn",
    "timm_layerscale_eager_ts17_dyn",
    "timm_nobias_eager_ts17_dyn",
    "torchvision_vit_mha_dynamo18",
    "torchvision_vit_mha_ts17_dyn",
]
BUILT: dict[str, dict[str, Any]] = {
    "separate": {},
    "packed": {"qkv": "packed", "v": 4},
    "flat": {"qkv": "flat"},
    "reverse": {"reverse": True},
    "shape": {"scale": "shape"},
    "float64": {"dtype": np.float64},
    "opset 11": {"opset": 11, "qkv": "packed", "v": 4},
}


@functools.cache
def case(name: str) -> tuple[Analysis, list[dict[str, np.ndarray]], Statistics, Reconstruction]:
    """A model, inputs for it, and what full compensation of all its attention groups needs."""
    if name in BUILT:
        model = graphs.transformer(**BUILT[name])
        analysis = analyse_model(model)
        feeds = [graphs.inputs_for(model, 6, seed) for seed in range(4)]
    else:
        analysis = analyse_model(FOLDER / f"{name}.onnx")
        held = EXPECTED[f"{name}.onnx"]
        rng = np.random.default_rng(5)
        shape = (4, *held["input"]["shape"][1:]) if held["dynamic_batch"] else held["input"]["shape"]
        feeds = [{held["input"]["name"]: rng.standard_normal(shape).astype(np.float32)} for _ in range(6)]
    statistics = measured(analysis, feeds)
    return analysis, feeds, statistics, Reconstruction(analysis, statistics, "full")


def measured(analysis: Analysis, feeds: Sequence[dict[str, np.ndarray]]) -> Statistics:
    needed = requirements(analysis, attention_groups(analysis), "full", "snp", planned=True)
    batches = [Batch(feed, None, len(next(iter(feed.values())))) for feed in feeds]
    return collect(
        analysis.graph,
        analysis.dependencies,
        analysis.structure.sites,
        needed.scored,
        needed.tensors,
        batches,
        pair_groups=needed.rotated,
        threads=1,
    )


def attention_groups(analysis: Analysis) -> list[Group]:
    return [group for group in analysis.structure.groups if group.kind in ("qk", "v")]


def gap(analysis: Analysis, graph: Any, feeds: Sequence[dict[str, np.ndarray]]) -> float:
    return difference(as_graph(analysis.model), graph, feeds, 1)


def replaced(analysis: Analysis, updates: dict[str, np.ndarray]) -> Any:
    graph = analysis.graph.copy()
    assert updates.keys() <= graph.weights.keys()
    for name, array in updates.items():
        assert array.shape == graph.weights[name].shape and array.dtype == graph.weights[name].dtype
    graph.weights.update(updates)
    return graph


def whole(group: Group) -> np.ndarray:
    return np.tile(np.arange(group.size), (group.heads, 1))


@pytest.mark.parametrize("name", [*BUILT, *EXPORTS])
def test_a_new_basis_with_nothing_cut_changes_the_weights_but_not_the_model(name: str) -> None:
    analysis, feeds, statistics, reconstruction = case(name)
    found = reconstruction.rotations
    sites = len(analysis.structure.sites)
    assert (len(found.pairs), len(found.values), found.blocked) == (sites, sites, {})
    limit = 1e-9 if name == "float64" else 1e-4
    for identity, pair in found.pairs.items():
        updates = rotate_pairs(analysis, pair, pair_bases(statistics.pairs[identity]), whole(pair.group))
        assert not np.allclose(updates[pair.query.weight], analysis.graph.weights[pair.query.weight], atol=1e-2)
        assert not np.allclose(updates[pair.key.weight], analysis.graph.weights[pair.key.weight], atol=1e-2)
        assert pair.key.bias is None or not updates[pair.key.bias].any()
        assert gap(analysis, replaced(analysis, updates), feeds[:2]) < limit
    for value in found.values.values():
        moments = statistics.moments[value.output.data]
        bases = value_bases(analysis, value, moments)
        updates = rotate_values(analysis, value, bases, whole(value.group), moments)
        assert not np.allclose(updates[value.value.weight], analysis.graph.weights[value.value.weight], atol=1e-2)
        assert not np.allclose(updates[value.output.weight], analysis.graph.weights[value.output.weight], atol=1e-2)
        assert gap(analysis, replaced(analysis, updates), feeds[:2]) < limit


def random_places(groups: Sequence[Group], seed: int, share: float = 0.5) -> Plan:
    rng = np.random.default_rng(seed)
    entries = []
    for group in groups:
        kept = max(1, int(group.size * share))
        keep = [sorted(rng.permutation(group.size)[:kept].tolist()) for _ in range(group.heads)]
        entries.append(graphs.keeping(group, keep))
    return Plan("", entries)


@pytest.mark.parametrize("name", [*BUILT, *EXPORTS])
def test_the_cut_model_is_proved_and_it_does_not_matter_which_places_carry_the_new_neurons(name: str) -> None:
    analysis, feeds, _, reconstruction = case(name)
    plans = [random_places(attention_groups(analysis), seed) for seed in (1, 2)]
    assert any(one.keep != other.keep for one, other in zip(plans[0].groups, plans[1].groups, strict=True))
    cuts = [apply(analysis, plan, reconstruction.weights(plan)) for plan in plans]
    shapes = {name: array.shape for name, array in cuts[0].graph.weights.items()}
    assert shapes == {name: array.shape for name, array in cuts[1].graph.weights.items()}
    assert difference(cuts[0].graph, cuts[1].graph, feeds[:2], 1) < 1e-5
    assert prove(analysis, cuts[1], feeds[:1], 1).passed
    plain = apply(analysis, plans[0])
    assert error(analysis, cuts[0].graph, feeds) < error(analysis, plain.graph, feeds)


def error(analysis: Analysis, graph: Any, feeds: Sequence[dict[str, np.ndarray]]) -> float:
    """Squared error of the outputs."""
    sessions = as_graph(analysis.model).session(threads=1), graph.session(threads=1)
    pairs = [[one.run(None, feed) for one in sessions] for feed in feeds]
    return float(sum(np.sum((a - b) ** 2) for want, got in pairs for a, b in zip(want, got, strict=True)))


RANK = 2


def planted(model: onnx.ModelProto, kinds: Sequence[str], **sizes: Any) -> onnx.ModelProto:
    """The model with weights of rank `RANK` per head. Biases of keys and values are left as they are."""
    heads, qk, v, qkv = (sizes.get(key, default) for key, default in LAYOUT.items())
    rng = np.random.default_rng(1)
    weights = {name: array.copy() for name, array in graphs.initializers(model).items()}
    for name in [name for name in weights if "/attn/" in name and name.endswith(".w") and "proj" not in name]:
        bias = weights[name.removesuffix(".w") + ".b"]
        parts = ["q", "k", "v"] if qkv in name else [name.split("/attn/")[1].removesuffix(".w")]
        widths = {"q": qk, "k": qk, "v": v}
        start = 0
        for part in parts:
            for head in range(heads):
                columns = slice(start + head * widths[part], start + (head + 1) * widths[part])
                if part in kinds:
                    rows = rng.standard_normal((RANK, widths[part]))
                    weights[name][:, columns] = rng.standard_normal((len(weights[name]), RANK)) @ rows * 0.3
                    if part == "q":
                        bias[columns] = rng.standard_normal(RANK) @ rows
            start += heads * widths[part]
        weights[name.removesuffix(".w") + ".b"] = bias
    return graphs.set_weights(model, weights)


LAYOUT: dict[str, Any] = {"heads": 3, "qk": 4, "v": 6, "qkv": "qkv"}


@pytest.mark.parametrize("layout", ["separate", "packed", "flat"])
@pytest.mark.parametrize("kinds", ["q", "k", "qk", "v", "qkv"])
def test_planted_low_rank_is_cut_for_nothing(layout: str, kinds: str) -> None:
    options = BUILT[layout]
    model = planted(graphs.transformer(**options), kinds, **options | {"qkv": "qkv"})
    analysis = analyse_model(model)
    feeds = [graphs.inputs_for(model, 8, seed) for seed in range(6)]
    wanted = [group for group in attention_groups(analysis) if (group.kind == "v") == (kinds == "v") or kinds == "qkv"]
    assert len(wanted) == (4 if kinds == "qkv" else 2)
    reconstruction = Reconstruction(analysis, measured(analysis, feeds), "full")
    keep = [list(range(RANK))]
    plan = Plan("", [graphs.keeping(group, keep * group.heads) for group in wanted])
    cut = apply(analysis, plan, reconstruction.weights(plan))
    unseen = [graphs.inputs_for(model, 5, 99)]
    assert gap(analysis, cut.graph, unseen) < 1e-3
    assert gap(analysis, apply(analysis, plan).graph, unseen) > 1e-2  # selection alone does lose
    for group in wanted:
        errors = reconstruction.errors(group)
        assert errors[RANK] < 1e-5 * errors[0] < errors[RANK - 1]
    less = Plan("", [graphs.keeping(group, [[0]] * group.heads) for group in wanted])
    assert gap(analysis, apply(analysis, less, reconstruction.weights(less)).graph, unseen) > 1e-2


def test_error_curves_are_the_measured_errors_summed_over_the_heads() -> None:
    analysis, feeds, _, reconstruction = case("separate")
    pair, value = reconstruction.rotations.pairs["qk.0"], reconstruction.rotations.values["v.0"]
    size, heads = pair.group.size, pair.group.heads
    site = analysis.structure.sites[0]
    session = analysis.graph.session([site.query[0], site.key[0], value.output.data], threads=1, optimize=False)
    runs = [session.run(None, feed) for feed in feeds]
    q, k, y = (np.concatenate([run[index] for run in runs]).astype(np.float64) for index in range(3))
    if site.key[1] == 2:
        k = np.swapaxes(k, 2, 3)
    centred = k - k.mean(axis=2, keepdims=True)
    total = sum(
        np.mean((q[:, head].reshape(-1, size) @ centred[:, head].reshape(-1, size).T) ** 2) for head in range(heads)
    )
    errors = reconstruction.errors(pair.group)
    assert errors.shape == (size + 1,) and errors[0] == pytest.approx(total, rel=1e-5)
    assert (np.diff(errors) <= 0).all() and errors[-1] < 1e-9 * errors[0]
    weight = analysis.graph.weights[value.output.weight].astype(np.float64)
    y = y.reshape(-1, y.shape[-1])
    y = (y - y.mean(axis=0)).reshape(len(y), heads, -1)
    parts = [y[:, head] @ weight.reshape(heads, -1, weight.shape[1])[head] for head in range(heads)]
    errors = reconstruction.errors(value.group)
    assert errors[0] == pytest.approx(sum(np.sum(part**2) for part in parts) / len(y), rel=1e-4)


def test_one_reconstruction_serves_many_plans() -> None:
    analysis, _, statistics, reconstruction = case("separate")
    groups = attention_groups(analysis)
    plans = [random_places(groups, seed, share) for seed, share in ((1, 0.5), (2, 0.75), (1, 0.5), (3, 0.25))]
    for plan in plans:
        fresh = Reconstruction(analysis, statistics, "full").weights(plan)
        held = reconstruction.weights(plan)
        assert held.keys() == fresh.keys()
        assert all(np.array_equal(held[name], fresh[name]) for name in fresh)
    assert reconstruction.weights(Plan("", [])) == {}
    full = Plan("", [graphs.keeping(group, whole(group).tolist()) for group in groups])
    assert reconstruction.weights(full) == {}
    assert Reconstruction(analysis, statistics, "none").weights(plans[0]) == {}
    refit = Reconstruction(analysis, statistics, "refit")
    assert not any(refit.rotates(group) for group in groups)
    outputs = {one.output.weight for one in reconstruction.rotations.values.values()}
    assert outputs == refit.weights(plans[0]).keys() & analysis.linears.keys()


def test_each_group_changes_weights_of_its_own() -> None:
    analysis, _, _, reconstruction = case("packed")
    seen: set[str] = set()
    for group in attention_groups(analysis):
        names = reconstruction.weights(random_places([group], 0)).keys()
        assert names and not names & seen
        seen |= names


def test_a_projection_without_a_bias_keeps_the_mean_of_its_input() -> None:
    """Values that vary along one direction around a mean: two neurons say it all where no bias can hold the mean."""
    net = graphs.Net()
    x = net.input("x", ["N", 5, 8])
    heads = 2

    def apart(value: Any) -> Any:
        return net.op("Transpose", net.reshape(value, 0, 5, heads, 4), perm=[0, 2, 1, 3])

    q, k, v = (apart(net.linear(x, part, 8, 8)) for part in "qkv")
    scores = net.op("MatMul", net.op("Mul", q, 0.5), net.op("Transpose", k, perm=[0, 1, 3, 2]))
    mixed = net.op("MatMul", net.op("Softmax", scores, axis=-1), v)
    joined = net.reshape(net.op("Transpose", mixed, perm=[0, 2, 1, 3]), 0, 5, 8)
    net.output(net.linear(joined, "out", 8, 8, bias=False), ["N", 5, 8])
    model = net.proto()
    weights = {name: array.copy() for name, array in graphs.initializers(model).items()}
    rng = np.random.default_rng(0)
    for head in (slice(0, 4), slice(4, 8)):
        weights["v.w"][:, head] = np.outer(rng.standard_normal(8), rng.standard_normal(4))
        weights["v.b"][head] = 3 * rng.standard_normal(4)
    model = graphs.set_weights(model, weights)
    analysis = analyse_model(model)
    feeds = [graphs.inputs_for(model, 8, seed) for seed in range(4)]
    reconstruction = Reconstruction(analysis, measured(analysis, feeds), "full")
    assert reconstruction.rotations.values["v.0"].output.bias is None
    plan = Plan("", [GroupPlan("v.0", "v", 4, 2, [[0, 1], [0, 1]])])
    cut = apply(analysis, plan, reconstruction.weights(plan))
    assert gap(analysis, cut.graph, [graphs.inputs_for(model, 5, 99)]) < 1e-3
    errors = reconstruction.errors(analysis.groups["v.0"])
    assert errors[2] < 1e-5 * errors[0] < errors[1]
