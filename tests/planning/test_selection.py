"""Who stays: new neurons in any place, the surgeon's choice in an FFN, the criterion elsewhere, in whatever order."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import graphs
import numpy as np
import onnx
import pytest

from onnxsnp.analysis import Analysis, analyse_model
from onnxsnp.calibration.data import Batch
from onnxsnp.calibration.statistics import Statistics, collect
from onnxsnp.planning.plan import Plan
from onnxsnp.planning.selection import COMPENSATIONS, Selector, requirements
from onnxsnp.reconstruction.full import Reconstruction
from onnxsnp.reconstruction.refit import RIDGE, refittable
from onnxsnp.reconstruction.residual import refittable_readers
from onnxsnp.scoring.criteria import CRITERIA

SHAPE: dict[str, Any] = {"blocks": 2, "heads": 2, "qk": 6, "v": 5, "width": 10, "ffn": 14}


def blocked(model: onnx.ModelProto, site: int = 0) -> onnx.ModelProto:
    """The model with activations on the queries and keys of one site, so that its pairs cannot be mixed or weighted."""
    clone = onnx.ModelProto()
    clone.CopyFrom(model)
    at, score = next(
        (index, node) for index, node in enumerate(clone.graph.node) if node.name == f"/blocks.{site}/attn/MatMul"
    )
    for slot, name in enumerate(("bent", "bent too")):
        clone.graph.node.insert(at, onnx.helper.make_node("Tanh", [score.input[slot]], [name], name=name))
        score = clone.graph.node[at + slot + 1]
        score.input[slot] = name
    return clone


@pytest.fixture(scope="module")
def model() -> onnx.ModelProto:
    return blocked(graphs.transformer(**SHAPE))


@pytest.fixture(scope="module")
def analysis(model: onnx.ModelProto) -> Analysis:
    return analyse_model(model)


def batches(model: onnx.ModelProto) -> list[Batch]:
    return [Batch(graphs.inputs_for(model, 8, seed), None, 8) for seed in range(5)]


def measured(analysis: Analysis, data: Sequence[Batch], kinds: str = "qk,v,ffn,residual") -> Statistics:
    """Everything: scores and moments of all query-key groups, second moments of all inputs."""
    groups = [group for group in analysis.structure.groups if group.kind in kinds.split(",")]
    pairs = [group for group in groups if group.kind == "qk"]
    readers = [linear for group in groups for linear in refittable(group, analysis.linears)]
    readers += [
        linear for group in groups if group.kind == "residual" for linear in refittable_readers(group, analysis)
    ]
    tensors = sorted({linear.data for linear in readers})
    deps, sites = analysis.dependencies, analysis.structure.sites
    return collect(analysis.graph, deps, sites, pairs, tensors, data, pair_groups=pairs, threads=1)


@pytest.fixture(scope="module")
def statistics(analysis: Analysis, model: onnx.ModelProto) -> Statistics:
    return measured(analysis, batches(model))


def selector(
    analysis: Analysis, statistics: Statistics, compensation: str = "full", criterion: str = "snp", **options: Any
) -> Selector:
    reconstruction = Reconstruction(analysis, statistics, compensation)
    return Selector(analysis, statistics, reconstruction, criterion, surgeon=compensation == "full", **options)


def kept(chooser: Selector, counts: Mapping[str, int]) -> dict[str, list[list[int]]]:
    return {entry.id: entry.keep for entry in chooser.entries(counts)}


def test_the_test_model_has_one_of_each(analysis: Analysis) -> None:
    rotations = analysis.rotations
    assert rotations.blocked == {"qk.0": "bent"} and rotations.pairs.keys() == {"qk.1"}
    assert rotations.values.keys() == {"v.0", "v.1"} and rotations.residuals.keys() == {"residual"}


def test_rotated_groups_may_stay_anywhere_so_they_stay_first(analysis: Analysis, statistics: Statistics) -> None:
    found = kept(selector(analysis, statistics), {"qk.1": 4, "v.0": 2, "v.1": 1, "residual": 3})
    assert found == {"qk.1": [[0, 1, 2, 3]] * 2, "v.0": [[0, 1]] * 2, "v.1": [[0]] * 2, "residual": [[0, 1, 2]]}


def test_what_is_not_cut_is_not_in_the_plan(analysis: Analysis, statistics: Statistics) -> None:
    assert kept(selector(analysis, statistics), {"qk.1": 6, "v.0": 5, "ffn.0": 14}) == {}
    done: list[tuple[int, int]] = []
    entries = selector(analysis, statistics).entries({"qk.1": 6, "v.0": 2, "ffn.0": 3}, lambda *at: done.append(at))
    assert [(one.id, one.kind, one.size, one.heads, one.kept) for one in entries] == [
        ("v.0", "v", 5, 2, 2),
        ("ffn.0", "ffn", 14, 1, 3),
    ]
    assert done == [(1, 2), (2, 2)]


def refit_error(weight: np.ndarray, second: np.ndarray, keep: Sequence[int]) -> float:
    """What is lost per token when only some neurons may be used, fitted with the ridge, plus its penalty."""
    strength = RIDGE * np.trace(second) / len(second)
    full, rows = np.zeros_like(weight), list(keep)
    inner = second[np.ix_(rows, rows)] + strength * np.eye(len(rows))
    full[rows] = np.linalg.solve(inner, second[rows] @ weight + strength * weight[rows])
    gap = weight - full
    return float(np.sum(gap * (second @ gap)) + strength * np.sum(gap**2))


def greedy(weight: np.ndarray, second: np.ndarray) -> tuple[list[int], list[float]]:
    """Remove the neuron whose absence costs least after a refit, one by one."""
    left, order, errors = list(range(len(weight))), [], []
    while len(left) > 1:
        costs = {one: refit_error(weight, second, [other for other in left if other != one]) for one in left}
        gone = min(costs, key=lambda one: costs[one])
        left.remove(gone)
        order.append(gone)
        errors.append(costs[gone])
    return order, errors


def hidden(analysis: Analysis, data: Sequence[Batch], tensor: str) -> np.ndarray:
    session = analysis.graph.session([tensor], threads=1, optimize=False)
    values = np.concatenate([session.run(None, batch.inputs)[0] for batch in data]).astype(np.float64)
    return values.reshape(-1, values.shape[-1])


def test_ffn_neurons_go_in_the_order_of_the_surgeon(
    analysis: Analysis, statistics: Statistics, model: onnx.ModelProto
) -> None:
    chooser = selector(analysis, statistics, criterion="l2")
    for name in ("ffn.0", "ffn.1"):
        group = analysis.groups[name]
        (reader,) = refittable(group, analysis.linears)
        x = hidden(analysis, batches(model), reader.data)
        weight = analysis.graph.weights[reader.weight].astype(np.float64)
        order, errors = greedy(weight, np.cov(x, rowvar=False, bias=True))
        for count in (1, 5, 13):
            assert kept(chooser, {name: count}) == {name: [sorted(set(range(14)) - set(order[: 14 - count]))]}
        curve = chooser.curve(group)
        assert curve is not None and curve.shape == (15,) and np.isnan(curve[0]) and curve[14] == 0
        np.testing.assert_allclose(curve[1:14], errors[::-1], rtol=1e-3)


def test_an_ffn_without_a_bias_behind_it_is_judged_with_its_mean() -> None:
    model = graphs.mlp(6, 12, 5, bias=False)
    analysis = analyse_model(model)
    statistics = measured(analysis, batches(model))
    chooser = selector(analysis, statistics)
    (reader,) = refittable(analysis.groups["ffn.0"], analysis.linears)
    assert reader.bias is None
    x = hidden(analysis, batches(model), reader.data)
    order, errors = greedy(analysis.graph.weights[reader.weight].astype(np.float64), x.T @ x / len(x))
    curve = chooser.curve(analysis.groups["ffn.0"])
    assert curve is not None
    np.testing.assert_allclose(curve[1:12], errors[::-1], rtol=1e-3)
    assert chooser.removal(analysis.groups["ffn.0"]).order.tolist() == order


def test_channels_between_pointwise_convolutions_go_in_the_order_of_the_surgeon() -> None:
    model = graphs.depthwise(12)
    analysis = analyse_model(model)
    chooser = selector(analysis, measured(analysis, batches(model)))
    (reader,) = refittable(analysis.groups["ffn.0"], analysis.linears)
    session = analysis.graph.session([reader.data], threads=1, optimize=False)
    images = np.concatenate([session.run(None, batch.inputs)[0] for batch in batches(model)]).astype(np.float64)
    x = images.transpose(0, 2, 3, 1).reshape(-1, 12)
    order, errors = greedy(
        analysis.graph.weights[reader.weight].reshape(5, 12).T.astype(np.float64), np.cov(x, rowvar=False, bias=True)
    )
    curve = chooser.curve(analysis.groups["ffn.0"])
    assert curve is not None
    np.testing.assert_allclose(curve[1:12], errors[::-1], rtol=1e-3)
    assert chooser.removal(analysis.groups["ffn.0"]).order.tolist() == order


def test_of_readers_of_different_activations_the_widest_has_the_word() -> None:
    """Squeeze and excitation: a gate reads the mean over the image, and a projection the gated image."""
    net = graphs.Net()
    x = net.input("x", ["N", 3, 4, 4])
    h = net.op("Relu", net.op("Conv", x, net.weight("expand.w", 8, 3, 1, 1), net.weight("expand.b", 8)))
    squeezed = net.op("Conv", net.op("GlobalAveragePool", h), net.weight("squeeze.w", 2, 8, 1, 1))
    gate = net.op("Sigmoid", net.op("Conv", net.op("Relu", squeezed), net.weight("excite.w", 8, 2, 1, 1)))
    gated = net.op("Mul", h, gate)
    net.output(net.op("Conv", gated, net.weight("project.w", 6, 8, 1, 1)), ["N", 6, 4, 4])
    model = net.proto()
    analysis = analyse_model(model)
    group = analysis.groups["ffn.0"]
    assert {linear.weight for linear in refittable(group, analysis.linears)} == {"squeeze.w", "project.w"}
    session = analysis.graph.session([gated.name], threads=1, optimize=False)
    images = np.concatenate([session.run(None, batch.inputs)[0] for batch in batches(model)]).astype(np.float64)
    rows = images.transpose(0, 2, 3, 1).reshape(-1, 8)
    order, _ = greedy(analysis.graph.weights["project.w"].reshape(6, 8).T.astype(np.float64), rows.T @ rows / len(rows))
    chooser = selector(analysis, measured(analysis, batches(model)))
    assert chooser.removal(group).order.tolist() == order


def test_dead_ffn_neurons_go_first_and_cost_nothing() -> None:
    plain = graphs.transformer(**SHAPE)
    weights = {name: array.copy() for name, array in graphs.initializers(plain).items()}
    dead = [2, 7, 11]
    weights["/blocks.0/mlp/fc1.w"][:, dead] = 0
    weights["/blocks.0/mlp/fc1.b"][dead] = 0
    model = graphs.set_weights(plain, weights)
    analysis = analyse_model(model)
    chooser = selector(analysis, measured(analysis, batches(model)))
    assert kept(chooser, {"ffn.0": 11}) == {"ffn.0": [[index for index in range(14) if index not in dead]]}
    curve = chooser.curve(analysis.groups["ffn.0"])
    assert curve is not None and not curve[11:].any() and curve[10] > 0


@pytest.mark.parametrize("criterion", ["snp", "l2", "reverse"])
def test_everything_else_is_ranked_by_the_criterion(analysis: Analysis, statistics: Statistics, criterion: str) -> None:
    full, plain = selector(analysis, statistics, "full", criterion), selector(analysis, statistics, "none", criterion)
    counts = {"qk.0": 2, "residual": 6}
    assert kept(full, {"qk.0": 2})["qk.0"] == kept(plain, counts)["qk.0"]
    assert kept(selector(analysis, statistics, "refit", criterion), counts) == kept(plain, counts)
    if criterion != "l2":
        scores = statistics.qk["qk.0"] * (-1 if criterion == "reverse" else 1)
        best = [sorted(row[:2].tolist()) for row in np.argsort(-scores, axis=1)]
        assert kept(plain, counts)["qk.0"] == best
    assert kept(plain, {"qk.1": 3, "v.0": 2, "ffn.0": 4}) != kept(full, {"qk.1": 3, "v.0": 2, "ffn.0": 4})


def test_curves_exist_where_there_is_a_closed_form(analysis: Analysis, statistics: Statistics) -> None:
    full, plain = selector(analysis, statistics), selector(analysis, statistics, "refit")
    reconstruction = Reconstruction(analysis, statistics, "full")
    for group in analysis.structure.groups:
        assert plain.curve(group) is None
        curve = full.curve(group)
        assert (curve is None) == (group.id == "qk.0")
        if curve is not None:
            assert curve.shape == (group.size + 1,) and (np.diff(curve[1:]) <= 1e-12).all()
        if group.id in ("qk.1", "v.0", "v.1", "residual"):
            np.testing.assert_array_equal(curve, reconstruction.errors(group))


@pytest.mark.parametrize("compensation", COMPENSATIONS)
@pytest.mark.parametrize("criterion", sorted(CRITERIA))
def test_widths_may_be_asked_in_any_order(
    analysis: Analysis, statistics: Statistics, criterion: str, compensation: str
) -> None:
    names = ["qk.0", "qk.1", "v.0", "ffn.0", "ffn.1", "residual"]
    sizes = {name: analysis.groups[name].size for name in names}
    widths = [{name: max(1, size * part // 4) for name, size in sizes.items()} for part in (1, 2, 3)]
    found = []
    for seed, order in enumerate(itertools.permutations(range(3))):
        chooser = selector(analysis, statistics, compensation, criterion, seed=4)
        mixed = np.random.default_rng(seed).permutation(names).tolist()
        answers = {at: kept(chooser, {name: widths[at][name] for name in mixed}) for at in order}
        found.append(answers)
        for name in mixed:  # and each group on its own
            assert kept(chooser, {name: widths[1][name]})[name] == answers[1][name]
    assert all(one == found[0] for one in found)
    for small, large in itertools.pairwise(range(3)):  # fewer is a subset of more
        for name in names:
            pairs = zip(found[0][small][name], found[0][large][name], strict=True)
            assert all(set(few) <= set(many) for few, many in pairs)


def test_another_seed_is_another_random_choice(analysis: Analysis, statistics: Statistics) -> None:
    one, other = (kept(selector(analysis, statistics, "none", "random", seed=seed), {"ffn.0": 7}) for seed in (0, 1))
    assert one != other
    first = kept(selector(analysis, statistics, "none", "random"), {"ffn.0": 7, "ffn.1": 7})
    assert first["ffn.0"] != first["ffn.1"]


@pytest.mark.parametrize("planned", [False, True])
@pytest.mark.parametrize("criterion", ["snp", "l2"])
@pytest.mark.parametrize("compensation", COMPENSATIONS)
def test_requirements_are_what_is_needed_and_no_more(
    analysis: Analysis, model: onnx.ModelProto, compensation: str, criterion: str, planned: bool
) -> None:
    groups = [analysis.groups[name] for name in ("qk.0", "qk.1", "v.0", "ffn.1", "residual")]
    needed = requirements(analysis, groups, compensation, criterion, planned=planned)
    scored = {"full": ["qk.0"]}.get(compensation, ["qk.0", "qk.1"]) if criterion == "snp" and not planned else []
    assert [group.id for group in needed.scored] == scored
    assert [group.id for group in needed.rotated] == (["qk.1"] if compensation == "full" else [])
    read = {analysis.linears[name].data for name in ("/blocks.0/attn/proj.w", "/blocks.1/mlp/fc2.w")}
    read |= {linear.data for linear in refittable_readers(analysis.groups["residual"], analysis)}
    assert set(needed.tensors) == (set() if compensation == "none" else read)
    assert needed.nothing == (compensation == "none" and not scored)
    deps, sites = analysis.dependencies, analysis.structure.sites
    held = Statistics()
    if not needed.nothing:
        held = collect(
            analysis.graph,
            deps,
            sites,
            needed.scored,
            needed.tensors,
            batches(model)[:2],
            pair_groups=needed.rotated,
            threads=1,
        )
    assert (list(held.qk), list(held.pairs)) == (scored, [group.id for group in needed.rotated])
    chooser = selector(analysis, held, compensation, criterion)
    counts = {group.id: group.size // 2 for group in groups}
    if not planned:  # enough to choose ...
        assert kept(chooser, counts).keys() == counts.keys()
    entries = [graphs.keeping(group, [list(range(group.size // 2))] * group.heads) for group in groups]
    reconstruction = Reconstruction(analysis, held, compensation)  # ... and to make up for it
    assert bool(reconstruction.weights(Plan("", entries))) == (compensation != "none")


def test_nothing_to_cut_needs_nothing(analysis: Analysis) -> None:
    assert requirements(analysis, [], "full", "snp", planned=False).nothing
    groups = [analysis.groups[name] for name in ("v.0", "ffn.0", "residual")]
    assert requirements(analysis, groups, "none", "snp", planned=False).nothing
