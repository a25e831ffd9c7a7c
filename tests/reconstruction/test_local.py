"""A feed-forward branch fitted as a whole comes closer to the original than with one-shot weights, or is left alone."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
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
from onnxsnp.graph.feedforward import FeedForward, find_feedforward
from onnxsnp.graph.ir import Graph
from onnxsnp.graph.segments import between, segment_graph
from onnxsnp.parallel import Crew
from onnxsnp.planning.plan import Plan, as_cuts
from onnxsnp.planning.selection import requirements
from onnxsnp.pruning import prune
from onnxsnp.reconstruction.full import Reconstruction
from onnxsnp.reconstruction.local import LocalFit
from onnxsnp.reconstruction.sequential import refit_in_order
from onnxsnp.surgery.apply import apply
from onnxsnp.surgery.rewrite import cut_graph

FOLDER = Path(__file__).resolve().parent.parent / "exports"
EXPECTED: dict[str, dict[str, Any]] = json.loads((FOLDER / "expected.json").read_text())
CREW = Crew.of(1, "cpu")
Weights = dict[str, np.ndarray]


def mixing() -> onnx.ModelProto:
    """Two FFN branches; the first reads a mean over the tokens as well, the second sees tokens through reshapes."""
    net = graphs.Net()
    h = net.linear(net.input("x", ["N", 5, 8]), "embed", 8, 8)
    read = net.op("Add", net.norm(h, "norm0", 8), net.mean(h, 1))
    h = net.op("Add", h, net.linear(net.op("Relu", net.linear(read, "a1", 8, 16)), "a2", 16, 8))
    flat = net.reshape(net.norm(net.op("Add", h, net.weight("places", 1, 5, 8)), "norm1", 8), -1, 8)
    hidden = net.op("Mul", net.op("Sigmoid", net.linear(flat, "b1", 8, 16)), net.weight("slopes", 1, 16, shift=1.0))
    h = net.op("Add", net.reshape(net.linear(hidden, "b2", 16, 8), -1, 5, 8), h)
    net.output(net.linear(net.norm(h, "norm2", 8), "head", 8, 4), ["N", 5, 4])
    return net.proto()


def scaled() -> onnx.ModelProto:
    """Two FFN branches whose outputs are scaled by factors of very different size."""
    net = graphs.Net()
    h = net.linear(net.input("x", ["N", 5, 8]), "embed", 8, 8)
    for index in range(2):
        hidden = net.op("Relu", net.linear(net.norm(h, f"norm{index}", 8), f"a{index}", 8, 24))
        y = net.op("Mul", net.linear(hidden, f"b{index}", 24, 8), np.logspace(-6, 0, 8))
        h = net.op("Add", h, y)
    net.output(net.linear(net.norm(h, "norm", 8), "head", 8, 4), ["N", 5, 4])
    return net.proto()


MODELS: dict[str, Any] = {
    "separate": functools.partial(graphs.transformer, ffn=32),
    "gated": functools.partial(graphs.transformer, gate="pair", ffn=32),
    "gated, one projection": functools.partial(graphs.transformer, gate="packed", ffn=32),
    "tanh": functools.partial(graphs.transformer, activation="gelu_tanh", ffn=32),
    "opset 11": functools.partial(graphs.transformer, opset=11, ffn=32),
    "float64": functools.partial(graphs.transformer, dtype=np.float64, ffn=32),
    "scaled": scaled,
    "float16, tanh": functools.partial(graphs.transformer, dtype=np.float16, activation="gelu_tanh", ffn=32),
    "float16": functools.partial(graphs.transformer, dtype=np.float16, ffn=32),
    "tokens that mix": mixing,
}
EXPORTS = [
    "hf_vit_sdpa_dynamo23_dyn",
    "own_gemm_dynamo18",
    "own_gemm_ts17_dyn",
    "own_relu_ts17_dyn",
    "own_tanh_ts17",
    "timm_deit_eager_ts11",
    "timm_layerscale_eager_dynamo18",
    "timm_nobias_eager_ts17_dyn",
    "torchvision_vit_mha_ts17_dyn",
]


@functools.cache
def case(name: str) -> tuple[Analysis, tuple[Weights, ...]]:
    """A model and inputs, some hundred tokens of them."""
    if name in MODELS:
        model = MODELS[name]()
        return analyse_model(model), tuple(
            graphs.inputs_for(model, size, seed) for seed, size in enumerate((60, 60, 41))
        )
    held = EXPECTED[f"{name}.onnx"]
    rng, rest = np.random.default_rng(5), held["input"]["shape"][1:]
    sizes = (16, 16, 9) if held["dynamic_batch"] else (held["input"]["shape"][0],) * 30
    feeds = tuple({held["input"]["name"]: rng.standard_normal((size, *rest)).astype(np.float32)} for size in sizes)
    return analyse_model(FOLDER / f"{name}.onnx"), feeds


def batches_of(feeds: Sequence[Weights]) -> list[Batch]:
    return [Batch(feed, None, len(next(iter(feed.values())))) for feed in feeds]


def networks(analysis: Analysis) -> list[FeedForward]:
    branches = find_branches(analysis.graph, analysis.dependencies, analysis.linears)
    found = [find_feedforward(branch, analysis.groups, analysis.graph, analysis.linears) for branch in branches]
    return [network for network in found if network is not None]


def plan_of(analysis: Analysis, ids: Sequence[str], kept: float = 0.5) -> Plan:
    """A share of the neurons of some groups, every second one first."""
    plans = []
    for group in (analysis.groups[name] for name in ids):
        order = [*range(0, group.size, 2), *range(1, group.size, 2)][: max(1, round(group.size * kept))]
        plans.append(graphs.keeping(group, [sorted(order)] * group.heads))
    return Plan("", plans)


def reconstruction_of(analysis: Analysis, ids: Sequence[str], feeds: Sequence[Weights]) -> Reconstruction:
    groups = [analysis.groups[name] for name in ids]
    needed = requirements(analysis, groups, "full", "l2", planned=True)
    statistics = collect(
        analysis.graph,
        analysis.dependencies,
        analysis.structure.sites,
        (),
        needed.tensors,
        batches_of(feeds),
        pair_groups=needed.rotated,
        gain_sites=needed.gained,
        threads=1,
    )
    return Reconstruction(analysis, statistics, "full")


def both_sides(analysis: Analysis, network: FeedForward, feeds: Sequence[Weights]) -> list[tuple[Any, Any]]:
    """The original's stream before and behind a branch."""
    names = [network.branch.other, network.branch.stream]
    session = analysis.graph.session(names, threads=1, optimize=False)
    return [tuple(session.run(names, feed)) for feed in feeds]  # type: ignore[misc]


def branch_error(
    graph: Graph, network: FeedForward, weights: Mapping[str, np.ndarray], sides: Sequence[tuple[Any, Any]], change: Any
) -> float:
    """Literally: the branch of the cut network on the mapped stream, against what the original's branch adds."""
    branch = network.branch
    part = between(graph, [branch.other], branch.stream)
    assert part is not None
    total = 0.0
    for other, stream in sides:
        mapped, wanted = (other, stream - other) if change is None else (other @ change, (stream - other) @ change)
        mapped = mapped.astype(other.dtype)
        one = segment_graph(graph, part, [branch.stream], {branch.other: mapped.dtype})
        one.weights.update(weights)
        (got,) = one.session(threads=1).run([branch.stream], {branch.other: mapped})
        total += float(np.sum((got.astype(np.float64) - mapped - wanted) ** 2))
    return total


def fitted(
    network: FeedForward, narrow: Graph, sides: Sequence[tuple[Any, Any]], change: Any = None, every: int = 1
) -> Weights:
    fit, tokens = LocalFit(network, narrow, CREW), []
    for other, stream in sides:
        kind = other.dtype
        mapped, added = (other, stream - other) if change is None else (other @ change, (stream - other) @ change)
        tokens.append(fit.tokens(mapped.astype(kind), added.astype(kind), slice(None, None, every)))
    return fit.fit(tokens)


def first_weights(network: FeedForward) -> set[str]:
    return {linear.weight for linear in network.first}


@pytest.mark.parametrize("name", [*MODELS, *EXPORTS])
def test_a_cut_branch_comes_closer_to_the_original_than_with_its_one_shot_weights(name: str) -> None:
    analysis, feeds = case(name)
    found = networks(analysis)
    assert len(found) == 2
    ids = [network.group.id for network in found]
    plan = plan_of(analysis, ids)
    updates = reconstruction_of(analysis, ids, feeds).weights(plan)
    narrow = cut_graph(analysis.graph, analysis.dependencies, as_cuts(plan, analysis.groups), updates)
    for network in found:
        sides = both_sides(analysis, network, feeds)
        new = fitted(network, narrow, sides)
        names = {*first_weights(network), network.branch.linear.weight}
        names |= {one.bias for one in (*network.first, network.branch.linear) if one.bias is not None}
        assert new.keys() == names
        for key, array in new.items():
            assert (array.shape, array.dtype.kind) == (narrow.weights[key].shape, "f"), key
        before, after = (branch_error(narrow, network, weights, sides, None) for weights in ({}, new))
        # of channels that are scaled down to nothing the stream shows nothing: the others are what counts
        assert after < (0.45 if name == "scaled" else 0.97) * before, (before, after)


@pytest.mark.parametrize(
    "name", ["separate", "gated", "tokens that mix", "own_gemm_dynamo18", "timm_layerscale_eager_dynamo18"]
)
def test_an_uncut_branch_stays_what_it_was(name: str) -> None:
    analysis, feeds = case(name)
    for network in networks(analysis):
        sides = both_sides(analysis, network, feeds)
        new = fitted(network, analysis.graph.copy(), sides)
        power = sum(float(np.sum((stream - other).astype(np.float64) ** 2)) for other, stream in sides)
        assert branch_error(analysis.graph, network, new, sides, None) < 1e-5 * power


@pytest.mark.parametrize("name", ["separate", "gated", "own_gemm_dynamo18", "timm_layerscale_eager_dynamo18"])
def test_where_the_stream_is_rotated_it_is_the_mapped_branch_that_is_met(name: str) -> None:
    analysis, feeds = case(name)
    found = networks(analysis)
    ids = [*(network.group.id for network in found), "residual"]
    plan = plan_of(analysis, ids, 0.75)
    reconstruction = reconstruction_of(analysis, ids, feeds)
    updates = reconstruction.weights(plan)
    ((atom, change),) = reconstruction.streams(plan).items()
    assert atom == analysis.groups["residual"].atom
    size = analysis.groups["residual"].size
    assert change.shape == (size, round(0.75 * size))
    narrow = cut_graph(analysis.graph, analysis.dependencies, as_cuts(plan, analysis.groups), updates)
    for network in found:
        sides = both_sides(analysis, network, feeds)
        new = fitted(network, narrow, sides, change)
        before, after = (branch_error(narrow, network, weights, sides, change) for weights in ({}, new))
        assert after < 0.97 * before, (before, after)


def test_every_so_manieth_token_is_that_of_both_sides() -> None:
    """Inputs and targets of the same tokens: the fit on a third of them is nearly as good on all."""
    analysis, feeds = case("tokens that mix")
    (network, _) = networks(analysis)
    plan = plan_of(analysis, [network.group.id])
    updates = reconstruction_of(analysis, [network.group.id], feeds).weights(plan)
    narrow = cut_graph(analysis.graph, analysis.dependencies, as_cuts(plan, analysis.groups), updates)
    sides = both_sides(analysis, network, feeds)
    before, after = (
        branch_error(narrow, network, weights, sides, None) for weights in ({}, fitted(network, narrow, sides, every=3))
    )
    assert after < 0.97 * before


def test_a_rotated_stream_follows_from_the_original_one() -> None:
    """With nothing else cut and a stream that needs no more room, x' = x R holds at every place of the network."""
    analysis, feeds = case("separate")
    reconstruction = reconstruction_of(analysis, ["residual"], feeds)
    size = analysis.groups["residual"].size
    assert reconstruction.streams(Plan("", [])) == {}
    assert reconstruction.streams(plan_of(analysis, ["residual"], 1.0)) == {}
    plan = plan_of(analysis, ["residual"], (size - 1) / size)
    change = reconstruction.streams(plan)[analysis.groups["residual"].atom]
    updates = reconstruction.weights(plan)
    narrow = cut_graph(analysis.graph, analysis.dependencies, as_cuts(plan, analysis.groups), updates)
    branch = find_branches(analysis.graph, analysis.dependencies, analysis.linears)[0]
    for feed in feeds:
        (want,) = analysis.graph.session([branch.other], threads=1).run(None, feed)
        (got,) = narrow.session([branch.other], threads=1).run(None, feed)
        np.testing.assert_allclose(got, want @ change, atol=1e-4)
    selected = Reconstruction(analysis, reconstruction._statistics, "refit")
    assert selected.streams(plan) == {}


CUTS = [("ffn.0",), ("ffn.1",), ("ffn.0", "ffn.1"), ("v.0", "qk.1")]


@pytest.mark.parametrize("ids", CUTS, ids=str)
@pytest.mark.parametrize("name", ["separate", "gated", "own_gemm_dynamo18", "timm_nobias_eager_ts17_dyn"])
def test_in_order_only_cut_networks_get_new_first_layers(name: str, ids: tuple[str, ...]) -> None:
    analysis, feeds = case(name)
    plan = plan_of(analysis, ids)
    updates = reconstruction_of(analysis, ids, feeds).weights(plan)
    cuts = as_cuts(plan, analysis.groups)
    local, plain = (
        refit_in_order(analysis, cuts, updates, batches_of(feeds), local=choice, threads=1) for choice in (True, False)
    )
    first = {network.group.id: first_weights(network) for network in networks(analysis)}
    assert not plain.keys() & set().union(*first.values())
    for group, weights in first.items():
        if group not in ids:
            assert not local.keys() & weights
            continue
        (entry,) = (entry for entry in plan.groups if entry.id == group)
        gone = sorted(set(range(entry.size)) - set(entry.keep[0]))
        for weight in weights:
            axis = next(one.outer for one in analysis.linears.values() if one.weight == weight)
            moved = np.moveaxis(local[weight], axis, 0)
            assert not moved[gone].any() and (moved[entry.keep[0]] != 0).any(axis=1).all()
            assert np.abs(moved - np.moveaxis(analysis.graph.weights[weight], axis, 0))[entry.keep[0]].max() > 1e-4
    assert local.keys() - set().union(*first.values()) >= plain.keys()
    applied = apply(analysis, plan, {**updates, **local})
    assert prove(analysis, applied, list(feeds[:1]), 1).passed
    if not any(name.startswith("ffn") for name in ids):
        assert all(np.array_equal(array, plain[key]) for key, array in local.items()) and local.keys() == plain.keys()


@pytest.mark.parametrize("name", ["separate", "own_gemm_ts17_dyn", "float16", "tokens that mix"])
def test_with_a_narrower_stream_as_well_the_result_is_proved_and_closer(name: str) -> None:
    analysis, feeds = case(name)
    ids = [group.id for group in analysis.structure.groups if group.kind in ("qk", "v", "ffn", "residual")]
    ids = [one for one in ids if analysis.groups[one].prunable]
    if name == "tokens that mix":  # the mean over the tokens reads the stream itself: no rotation
        ids.remove("residual")
    plan = plan_of(analysis, ids, 0.75)
    reconstruction = reconstruction_of(analysis, ids, feeds)
    updates, streams = reconstruction.weights(plan), reconstruction.streams(plan)
    assert bool(streams) == ("residual" in ids)
    steps: list[tuple[int, int]] = []
    found = refit_in_order(
        analysis,
        as_cuts(plan, analysis.groups),
        updates,
        iter(batches_of(feeds)),
        streams=streams,
        threads=1,
        progress=lambda *at: steps.append(at),
    )
    assert steps == [(index + 1, steps[-1][1]) for index in range(steps[-1][1])]
    assert all(
        (found[key].shape, found[key].dtype) == (analysis.graph.weights[key].shape, analysis.graph.weights[key].dtype)
        for key in found
    )
    errors = []
    for weights in (updates, {**updates, **found}):
        applied = apply(analysis, plan, weights)
        errors.append(output_error(analysis, applied.graph, feeds))
    assert prove(analysis, applied, list(feeds[:1]), 1).passed
    assert errors[1] < errors[0]


def output_error(analysis: Analysis, graph: Graph, feeds: Sequence[Weights]) -> float:
    whole, cut = analysis.graph.session(threads=1), graph.session(threads=1)
    pairs = [(whole.run(None, feed)[0], cut.run(None, feed)[0]) for feed in feeds]
    return sum(float(np.sum((want.astype(np.float64) - got) ** 2)) for want, got in pairs)


def test_without_samples_there_is_nothing_new() -> None:
    analysis, _ = case("separate")
    cuts = as_cuts(plan_of(analysis, ["ffn.0"]), analysis.groups)
    assert refit_in_order(analysis, cuts, {}, [], local=True, threads=1) == {}


@pytest.mark.parametrize("name", ["timm_deit_sdpa_ts17_dyn", "own_gemm_dynamo18", "timm_layerscale_eager_ts17_dyn"])
def test_pruning_with_the_stream_in_scope_meets_its_budget_and_is_proved(name: str) -> None:
    held = EXPECTED[f"{name}.onnx"]["input"]
    images = np.random.default_rng(3).standard_normal((160, *held["shape"][1:])).astype(np.float32)
    options: dict[str, Any] = {
        "calibration": {held["name"]: images},
        "samples": 96,
        "threads": 1,
        "latency": False,
        "compensation": "full",
    }
    first = prune(FOLDER / f"{name}.onnx", 0.5, scope="qk,v,ffn,residual", **options)
    record = first.record
    assert 1 - record["after"]["macs"] / record["before"]["macs"] == pytest.approx(0.5, abs=0.02)
    assert {group["kind"] for group in record["groups"]} >= {"qk", "v", "ffn", "residual"}
    analysis = analyse_model(FOLDER / f"{name}.onnx")
    plan = Plan(first.plan.model, plan_of(analysis, ["ffn.0", "residual"], 0.75).groups)
    given = prune(FOLDER / f"{name}.onnx", plan=plan, **options).record
    plain = prune(FOLDER / f"{name}.onnx", plan=plan, **{**options, "compensation": "none"}).record
    assert given["agreement"]["kl"] < 0.5 * plain["agreement"]["kl"]
    for one in (record, given):
        assert one["verification"]["passed"] and one["steps"]
        assert all(step["kept"] == (step["after"] < step["before"]) for step in one["steps"])


def test_where_the_stream_only_loses_channels_it_is_those_that_stay_which_are_met() -> None:
    analysis, feeds = case("separate")
    plan = plan_of(analysis, ["ffn.0", "ffn.1", "residual"], 0.75)
    cuts = as_cuts(plan, analysis.groups)
    network = networks(analysis)[0]
    (keep,) = (entry.keep[0] for entry in plan.groups if entry.id == "residual")
    change = np.eye(analysis.groups["residual"].size, dtype=np.float32)[:, keep]
    sides = both_sides(analysis, network, feeds)
    errors = []
    for local in (False, True):
        found = refit_in_order(analysis, cuts, {}, batches_of(feeds), local=local, threads=1)
        assert prove(analysis, apply(analysis, plan, found), list(feeds[:1]), 1).passed
        narrow = cut_graph(analysis.graph, analysis.dependencies, cuts, found)
        errors.append(branch_error(narrow, network, {}, sides, change))
    assert errors[1] < errors[0]
