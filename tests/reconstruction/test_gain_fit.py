"""Gains are the least squares answer on the scores themselves, and the model they go into is the better for it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
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
from onnxsnp.planning.plan import Plan
from onnxsnp.planning.selection import Selector, requirements
from onnxsnp.pruning import prune
from onnxsnp.reconstruction.full import Reconstruction
from onnxsnp.reconstruction.gains import best_gains, pair_order
from onnxsnp.surgery.apply import apply

HEADS, SIZE, TOKENS, WIDTH = graphs.HEADS, graphs.SIZE, graphs.TOKENS, graphs.WIDTH


def contributions(heads: int = 1, size: int = 6, seed: int = 0) -> np.ndarray:
    """What correlated pairs add to scores, [heads, entries, size]."""
    rng = np.random.default_rng(seed)
    return rng.standard_normal((heads, 400, size)) @ rng.standard_normal((heads, size, size)) * 0.3


def overlap(parts: np.ndarray) -> np.ndarray:
    return np.swapaxes(parts, 1, 2) @ parts / parts.shape[1]


def error(parts: np.ndarray, keep: Sequence[int], gains: np.ndarray) -> float:
    return float(np.mean((parts.sum(axis=1) - parts[:, list(keep)] @ gains) ** 2))


def naive(parts: np.ndarray, keep: Sequence[int]) -> np.ndarray:
    return np.linalg.lstsq(parts[:, list(keep)], parts.sum(axis=1), rcond=None)[0]


@pytest.mark.parametrize("keep", [[2], [0, 3], [1, 2, 4, 5], [0, 1, 2, 3, 4, 5]])
def test_gains_are_the_least_squares_fit_to_the_scores(keep: list[int]) -> None:
    parts = contributions()[0]
    found = best_gains(overlap(parts[None])[0], np.asarray(keep), ridge=0.0)
    np.testing.assert_allclose(found, naive(parts, keep), rtol=1e-7)


@pytest.mark.parametrize("ridge", [0.0, 1e-6, 0.3])
def test_no_other_gains_do_better(ridge: float) -> None:
    parts, keep = contributions(seed=2)[0], [0, 2, 5]
    matrix = overlap(parts[None])[0]
    strength = ridge * np.trace(matrix) / len(matrix)

    def objective(gains: np.ndarray) -> float:
        return error(parts, keep, gains) + strength * float(np.sum((gains - 1) ** 2))

    found = best_gains(matrix, np.asarray(keep), ridge)
    rng = np.random.default_rng(0)
    for step in (1e-3, 0.1, 1.0):
        assert all(objective(found + step * rng.standard_normal(3)) >= objective(found) for _ in range(20))
    assert objective(found) < objective(np.ones(3))


def test_gains_that_nothing_is_known_about_are_one() -> None:
    np.testing.assert_allclose(best_gains(np.zeros((4, 4)), np.asarray([1, 3])), 1.0)


@pytest.mark.parametrize("heads", [1, 3])
def test_pairs_go_in_the_order_of_a_greedy_search(heads: int) -> None:
    """Brute force: a fit for every candidate at every step, summed over the heads that lose the same pairs."""
    parts = contributions(heads, seed=heads)
    found = pair_order(overlap(parts))
    left, order, errors = list(range(6)), [], [0.0]
    while left:
        costs = {}
        for one in left:
            keep = [other for other in left if other != one]
            costs[one] = sum(error(mine, keep, naive(mine, keep)) for mine in parts)
        gone = min(costs, key=lambda one: costs[one])
        left.remove(gone)
        order.append(gone)
        errors.append(costs[gone])
    assert found.order.tolist() == order
    np.testing.assert_allclose(found.errors, errors[::-1], rtol=1e-3, atol=1e-12)
    assert found.errors[6] == 0 and (np.diff(found.errors) <= 0).all()


def test_dead_pairs_go_first_and_then_duplicates() -> None:
    parts = contributions(seed=5)[0]
    parts[:, 4] = 0
    parts[:, 1] = -0.5 * parts[:, 3]
    found = pair_order(overlap(parts[None]))
    assert found.order[0] == 4 and found.order[1] in (1, 3)
    assert (found.errors[4:] < 1e-5 * found.errors[0]).all() and found.errors[3] > 1e-3 * found.errors[0]
    np.testing.assert_array_equal(pair_order(np.zeros((2, 3, 3))).errors < 1e-300, True)


def relu(net: graphs.Net, x: Any) -> Any:
    return net.op("Relu", x)


def gamma(net: graphs.Net, x: Any) -> Any:
    return net.op("Mul", net.op("HardSwish", x), net.weight("gamma", HEADS, 1, SIZE, scale=0.2, shift=1.0))


def shared_gamma(net: graphs.Net, x: Any) -> Any:
    return net.op("Mul", net.op("HardSwish", x), net.weight("gamma", SIZE, scale=0.2, shift=1.0))


def batch_norm(net: graphs.Net, x: Any) -> Any:
    columns = [net.weight(f"bn{net.count}.{part}", HEADS * SIZE, scale=0.2, shift=1.0) for part in "sbmv"]
    turned = net.op("BatchNormalization", net.op("Transpose", x, perm=[0, 2, 1]), *columns)
    return net.op("Transpose", turned, perm=[0, 2, 1])


MODELS: dict[str, dict[str, graphs.Hook]] = {
    "key bends": {"k": relu},
    "query bends": {"q": relu},
    "scale per head and channel": {"q": gamma, "k": relu},
    "scale shared by the heads": {"q": shared_gamma, "k": relu},
    "scale shared by the heads, linear before": {
        "q": lambda net, x: net.op("Mul", x, net.weight("gamma", SIZE, shift=1.0)),
        "k": relu,
    },
    "batch norms": {"flat_q": batch_norm, "flat_k": batch_norm},
    "capped": {"scores": lambda net, x: net.op("Clip", x, -2.0, 2.0)},
}


def measured(analysis: Analysis, feeds: Sequence[dict[str, np.ndarray]]) -> Statistics:
    groups = [analysis.groups["qk.0"]]
    needed = requirements(analysis, groups, "full", "snp", planned=False)
    assert [gain.group for gain in needed.gained] == groups and not needed.nothing
    assert (needed.scored, needed.rotated, needed.tensors) == ((), (), ())
    batches = [Batch(feed, None, len(feed["x"])) for feed in feeds]
    return collect(
        analysis.graph,
        analysis.dependencies,
        analysis.structure.sites,
        (),
        (),
        batches,
        gain_sites=needed.gained,
        threads=1,
    )


def case(model: onnx.ModelProto) -> tuple[Analysis, list[dict[str, np.ndarray]], Statistics, Reconstruction, Selector]:
    analysis = analyse_model(model)
    feeds = [graphs.inputs_for(model, 8, seed) for seed in range(4)]
    statistics = measured(analysis, feeds)
    reconstruction = Reconstruction(analysis, statistics, "full")
    return analysis, feeds, statistics, reconstruction, Selector(analysis, statistics, reconstruction, "snp")


def test_only_full_compensation_weighs_and_it_chooses_whatever_the_criterion() -> None:
    analysis, _, statistics, reconstruction, selector = case(graphs.attention(k=relu))
    group = analysis.groups["qk.0"]
    other = Selector(analysis, statistics, reconstruction, "l2")
    plans = [one.entries({"qk.0": kept}) for one in (selector, other) for kept in (2, 4)]
    assert plans[:2] == plans[2:]
    for few, many in zip(plans[0][0].keep, plans[1][0].keep, strict=True):
        assert set(few) < set(many) and few == sorted(few)
    assert reconstruction.weighs(group) and not reconstruction.rotates(group)
    for compensation in ("none", "refit"):
        weaker = Reconstruction(analysis, statistics, compensation)
        assert not weaker.weighs(group) and weaker.weights(Plan("", plans[0])) == {}
        needed = requirements(analysis, [group], compensation, "snp", planned=False)
        assert (needed.gained, needed.scored) == ((), (group,))
    assert requirements(analysis, [group], "full", "snp", planned=True).gained == (analysis.gains["qk.0"],)


def scores(analysis: Analysis, weights: dict[str, np.ndarray], feeds: Sequence[dict[str, np.ndarray]]) -> np.ndarray:
    """Scores of the model with some weights replaced, [images, heads, queries, keys]."""
    graph = analysis.graph.copy()
    graph.weights.update(weights)
    node = next(node for node in graph.nodes if node.name == "score")
    session = graph.session([node.output[0]], threads=1, optimize=False)
    return np.concatenate([session.run(None, feed)[0] for feed in feeds]).astype(np.float64)


@pytest.mark.parametrize("name", MODELS)
def test_the_error_curve_is_what_the_scores_of_the_model_lose(name: str) -> None:
    analysis, feeds, _, reconstruction, selector = case(graphs.attention(**MODELS[name]))
    group, gain = analysis.groups["qk.0"], analysis.gains["qk.0"]
    curve = selector.curve(group)
    assert curve is not None and curve.shape == (SIZE + 1,)
    for kept in range(1, SIZE):
        plan = Plan("", selector.entries({"qk.0": kept}))
        lost = scores(analysis, {}, feeds) - scores(analysis, reconstruction.weights(plan), feeds)
        if gain.centred:
            lost = lost - lost.mean(axis=3, keepdims=True)
        assert curve[kept] == pytest.approx(gain.heads * np.mean(lost**2), rel=1e-3)


def planted(name: str) -> onnx.ModelProto:
    """The model with two pairs of every head that are positive multiples of others, so that a Relu leaves them so."""
    model = graphs.attention(**MODELS[name])
    weights = {name: array.copy() for name, array in graphs.initializers(model).items()}
    for head in range(HEADS):
        for source, target in ((0, 3), (1, 4) if head == 0 or "shared" in name else (5, 2)):
            one, two = head * SIZE + source, head * SIZE + target
            for part, factor in (("q.w", 1.5), ("q.b", 1.5), ("k.w", 0.8), ("k.b", 0.8)):
                weights[part][..., two] = factor * weights[part][..., one]
    return graphs.set_weights(model, weights)


@pytest.mark.parametrize("name", ["key bends", "query bends", "scale shared by the heads, linear before", "capped"])
def test_planted_multiples_are_cut_for_nothing(name: str) -> None:
    analysis, _, _, reconstruction, selector = case(planted(name))
    plan = Plan("", selector.entries({"qk.0": SIZE - 2}))
    unseen = [graphs.inputs_for(analysis.model.proto, 5, 99)]
    original = as_graph(analysis.model)
    assert difference(original, apply(analysis, plan, reconstruction.weights(plan)).graph, unseen, 1) < 1e-4
    assert difference(original, apply(analysis, plan).graph, unseen, 1) > 1e-2


def correlated(samples: int, seed: int) -> dict[str, np.ndarray]:
    """Inputs most of whose variance lies in few directions, as in real activations."""
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(1).standard_normal((WIDTH, WIDTH)) * 0.6 ** np.arange(WIDTH)[:, None]
    return {"x": (rng.standard_normal((samples, TOKENS, WIDTH)) @ mixing).astype(np.float32)}


@pytest.mark.parametrize("name", MODELS)
def test_the_pruned_model_is_proved_and_closer_to_the_original_than_without_gains(name: str) -> None:
    model = graphs.attention(**MODELS[name])
    options: dict[str, Any] = {"scope": "qk", "calibration": correlated(128, 3), "samples": 96, "threads": 1}
    full = prune(model, 0.5, allocation="uniform", **options)
    plain = prune(model, plan=full.plan, compensation="none", **options)
    paper = prune(model, 0.5, allocation="uniform", compensation="none", **options)
    for one in (full, plain):
        assert one.record["verification"]["passed"] and one.record["verification"]["masked_equality"] < 1e-4
        onnx.checker.check_model(one.model, full_check=True)
    shapes = [{key: array.shape for key, array in graphs.initializers(one.model).items()} for one in (full, plain)]
    assert shapes[0] == shapes[1]
    unseen = correlated(200, 4)
    want, *got = (graphs.run(one, unseen)[0] for one in (model, full.model, plain.model, paper.model))
    lost = [float(np.sum((want - output) ** 2)) for output in got]
    assert lost[0] < min(lost[1:]), lost


def test_automatic_allocation_reaches_what_can_only_be_weighted() -> None:
    model = graphs.attention(k=relu)
    data = graphs.calibration(model, 64)
    found = prune(model, 0.25, calibration=data, samples=16, threads=1)
    assert found.record["verification"]["passed"]
    assert "qk.0" in found.record["allocation"]["sensitivity"]


def test_gains_go_on_top_of_a_refit_of_the_same_projection() -> None:
    """A query made by two layers: the FFN-like width between them is refitted in the weight that takes the gains."""
    net = graphs.Net()
    x = net.input("x", ["N", TOKENS, WIDTH])

    def apart(value: Any) -> Any:
        return net.op("Transpose", net.reshape(value, 0, TOKENS, HEADS, SIZE), perm=[0, 2, 1, 3])

    hidden = net.op("Relu", net.linear(x, "down", WIDTH, 8))
    q, k = apart(net.linear(hidden, "q", 8, HEADS * SIZE)), relu(net, apart(net.linear(x, "k", WIDTH, HEADS * SIZE)))
    scores = net.op("MatMul", q, net.op("Transpose", k, perm=[0, 1, 3, 2]), name="score")
    mixed = net.op("MatMul", net.op("Softmax", scores, axis=-1), apart(net.linear(x, "v", WIDTH, HEADS * SIZE)))
    joined = net.reshape(net.op("Transpose", mixed, perm=[0, 2, 1, 3]), 0, TOKENS, HEADS * SIZE)
    net.output(net.linear(joined, "proj", HEADS * SIZE, WIDTH), ["N", TOKENS, WIDTH])
    model = net.proto()
    analysis = analyse_model(model)
    groups = [analysis.groups[name] for name in ("qk.0", "ffn.0")]
    needed = requirements(analysis, groups, "full", "snp", planned=False)
    batches = [Batch(graphs.inputs_for(model, 8, seed), None, 8) for seed in range(4)]
    deps, sites = analysis.dependencies, analysis.structure.sites
    statistics = collect(analysis.graph, deps, sites, (), needed.tensors, batches, gain_sites=needed.gained, threads=1)
    reconstruction = Reconstruction(analysis, statistics, "full")
    selector = Selector(analysis, statistics, reconstruction, "snp")
    entries = selector.entries({"qk.0": 4, "ffn.0": 6})
    alone = [reconstruction.weights(Plan("", [entry]))["q.w"].astype(np.float64) for entry in entries]
    weight = analysis.graph.weights["q.w"].astype(np.float64)
    gains = np.median(alone[0] / weight, axis=0)  # [HEADS * SIZE]
    assert (gains == 0).sum() == HEADS * 2 and np.ptp(gains[gains != 0]) > 1e-2
    for order in itertools.permutations(entries):
        both = reconstruction.weights(Plan("", list(order)))
        np.testing.assert_allclose(both["q.w"], alone[1] * gains, rtol=1e-4, atol=1e-6)
        assert not np.allclose(both["q.b"], analysis.graph.weights["q.b"])
