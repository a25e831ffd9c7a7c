"""The rivals' rules are their formulas on explicit activations, and their cuts hold up to the proof."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import graphs
import numpy as np
import pytest
import rivals

from onnxsnp.analysis import Analysis, analyse_model
from onnxsnp.calibration.data import Batch
from onnxsnp.calibration.statistics import Statistics, collect
from onnxsnp.evaluation.verify import difference, prove
from onnxsnp.graph.normalize import as_graph
from onnxsnp.planning.plan import Plan, as_cuts
from onnxsnp.reconstruction.refit import RIDGE, refittable
from onnxsnp.surgery.apply import apply
from onnxsnp.surgery.rewrite import mask_weights

FOLDER = Path(__file__).resolve().parents[1] / "exports"
EXPORTS = ["timm_deit_sdpa_ts17_dyn", "hf_vit_eager_ts17_dyn", "own_flat_split_ts17_dyn", "timm_nobias_eager_ts17_dyn"]
ALL = ["VBP", "Wanda", "CORP", "CORP, weighted"]


@functools.cache
def case(name: str = "built") -> tuple[Analysis, list[dict[str, np.ndarray]], Statistics]:
    """A model, inputs for it, and the statistics of all its groups on these."""
    if name == "built":
        model = graphs.transformer()
        analysis, feeds = analyse_model(model), [graphs.inputs_for(model, 8, seed) for seed in range(4)]
    else:
        analysis = analyse_model(FOLDER / f"{name}.onnx")
        info = analysis.graph.shell.graph.input[0]
        sizes = [dim.dim_value or 4 for dim in info.type.tensor_type.shape.dim]
        rng = np.random.default_rng(5)
        feeds = [{info.name: rng.standard_normal([4, *sizes[1:]]).astype(np.float32)} for _ in range(3)]
    groups = [group for group in analysis.structure.groups if group.kind in ("qk", "v", "ffn")]
    pairs = [group for group in groups if group.kind == "qk"]
    tensors = sorted({linear.data for group in groups for linear in refittable(group, analysis.linears)})
    batches = [Batch(feed, None, len(next(iter(feed.values())))) for feed in feeds]
    sites, deps = analysis.structure.sites, analysis.dependencies
    return analysis, feeds, collect(analysis.graph, deps, sites, [], tensors, batches, pair_groups=pairs, threads=1)


def half(analysis: Analysis, kinds: tuple[str, ...]) -> dict[str, int]:
    return {group.id: group.size // 2 for group in analysis.structure.groups if group.kind in kinds}


def captured(graph: Any, name: str, feeds: list[dict[str, np.ndarray]]) -> np.ndarray:
    """An activation over all samples, float64."""
    session = graph.session([name], optimize=False)
    return np.concatenate([session.run([name], feed)[0] for feed in feeds]).astype(np.float64)


def hidden(analysis: Analysis, group: str, feeds: list[dict[str, np.ndarray]]) -> np.ndarray:
    """What the reader of a group sees: [tokens, neurons]."""
    reader = refittable(analysis.groups[group], analysis.linears)[0]
    rows = captured(analysis.graph, reader.data, feeds)
    return rows.reshape(-1, rows.shape[-1])


def operands(analysis: Analysis, graph: Any, site: int, feeds: list[dict[str, np.ndarray]]) -> list[np.ndarray]:
    """Queries and keys of a site: two arrays [images, heads, tokens, size]."""
    place = analysis.structure.sites[site]
    sides = ((place.query, place.query_tokens), (place.key, place.key_tokens))
    return [np.moveaxis(captured(graph, axis[0], feeds), (axis[1], tokens[1]), (3, 2)) for axis, tokens in sides]


def test_vbp_ranks_by_the_variance_of_the_activations_and_keeps_the_mean_output() -> None:
    analysis, feeds, statistics = case()
    x = hidden(analysis, "ffn.1", feeds)
    scores = rivals.variance(analysis, statistics, analysis.groups["ffn.1"])
    np.testing.assert_allclose(scores, [x.var(axis=0)], rtol=1e-4, atol=1e-6)
    (entry,), updates = rivals.RIVALS["VBP"].propose(analysis, statistics, {"ffn.1": 9})
    assert entry.keep == [sorted(np.argsort(x.var(axis=0))[-9:].tolist())]
    assert updates.keys() == {"/blocks.1/mlp/fc2.b"}
    weight, bias = (analysis.graph.weights[f"/blocks.1/mlp/fc2.{part}"] for part in "wb")
    stay = entry.keep[0]
    cut = x[:, stay] @ weight[stay] + updates["/blocks.1/mlp/fc2.b"]
    np.testing.assert_allclose(cut.mean(axis=0), (x @ weight + bias).mean(axis=0), rtol=1e-4, atol=1e-5)
    assert np.abs((x[:, stay] @ weight[stay] + bias).mean(axis=0) - cut.mean(axis=0)).max() > 1e-2


@pytest.mark.parametrize("group", ["ffn.0", "v.0"])
def test_wanda_sums_weight_times_norm_over_everything_a_neuron_feeds(group: str) -> None:
    analysis, feeds, statistics = case()
    x = hidden(analysis, group, feeds)
    reader = refittable(analysis.groups[group], analysis.linears)[0]
    weight = analysis.graph.weights[reader.weight]
    naive = [sum(abs(weight[p, j]) * np.linalg.norm(x[:, p]) for j in range(12)) for p in range(x.shape[1])]
    found = rivals.weighted_norm(analysis, statistics, analysis.groups[group])
    np.testing.assert_allclose(found.reshape(-1), naive, rtol=1e-4)


def test_energies_are_those_of_the_activations() -> None:
    analysis, feeds, statistics = case()
    x = hidden(analysis, "v.1", feeds)
    found = rivals.energy(analysis, statistics, analysis.groups["v.1"])
    np.testing.assert_allclose(found, (x**2).mean(axis=0).reshape(3, 6), rtol=1e-4)
    lengths = np.linalg.norm(analysis.graph.weights["/blocks.1/attn/v.w"], axis=0)
    lengths = lengths * np.linalg.norm(analysis.graph.weights["/blocks.1/attn/proj.w"], axis=1)
    weighted = rivals.weighted_energy(analysis, statistics, analysis.groups["v.1"])
    np.testing.assert_allclose(weighted, found * lengths.reshape(3, 6), rtol=1e-5)
    query, key = operands(analysis, analysis.graph, 1, feeds)
    key = key - key.mean(axis=2, keepdims=True)
    wanted = np.sqrt((query**2).mean(axis=(0, 2)) * (key**2).mean(axis=(0, 2)))
    for scores in (rivals.energy, rivals.weighted_energy, rivals.weighted_norm):
        np.testing.assert_allclose(scores(analysis, statistics, analysis.groups["qk.1"]), wanted, rtol=1e-3)


@pytest.mark.parametrize("group", ["ffn.0", "v.0"])
def test_corp_predicts_what_goes_as_least_squares_on_the_activations_does(group: str) -> None:
    analysis, feeds, statistics = case()
    x = hidden(analysis, group, feeds)
    size = analysis.groups[group].size
    (entry,), updates = rivals.RIVALS["CORP"].propose(analysis, statistics, {group: size // 2})
    stay = [head * size + index for head, indices in enumerate(entry.keep) for index in indices]
    gone = [index for index in range(x.shape[1]) if index not in stay]
    # ridge least squares of x_P on (x_S, 1) as plain least squares with rows that pull B towards zero
    strength = RIDGE * x.var(axis=0).mean() * len(x)
    rows = np.block([[x[:, stay], np.ones((len(x), 1))], [np.sqrt(strength) * np.eye(len(stay), len(stay) + 1)]])
    targets = np.concatenate([x[:, gone], np.zeros((len(stay), len(gone)))])
    fit = np.linalg.lstsq(rows, targets, rcond=None)[0]
    reader = refittable(analysis.groups[group], analysis.linears)[0]
    weight, bias = analysis.graph.weights[reader.weight], analysis.graph.weights[reader.bias or ""]
    np.testing.assert_allclose(updates[reader.weight][stay], weight[stay] + fit[:-1] @ weight[gone], atol=2e-3)
    np.testing.assert_allclose(updates[reader.bias or ""], bias + fit[-1] @ weight[gone], atol=2e-3)
    assert not updates[reader.weight][gone].any()


def pair_samples(seed: int, size: int = 6) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return tuple(rng.standard_normal((40, size)) @ rng.standard_normal((size, size)) for _ in range(2))  # type: ignore


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("ridge", [0.0, 1e-2])
def test_no_other_mixing_of_the_kept_pairs_comes_closer_to_the_scores(seed: int, ridge: float) -> None:
    q, k = pair_samples(seed)
    keep = np.asarray([0, 2, 5])
    second_q, second_k = q.T @ q / len(q), k.T @ k / len(k)
    mixing = rivals.pair_mixing(second_q, second_k, keep, ridge)
    kept_q, kept_k = (second[np.ix_(keep, keep)] for second in (second_q, second_k))
    strength = ridge * np.trace(kept_q) * np.trace(kept_k) / 9

    def objective(trial: np.ndarray) -> float:
        missed = q @ k.T - q[:, keep] @ trial @ k[:, keep].T
        return float((missed**2).mean() + strength * ((trial - np.eye(3)) ** 2).sum())

    best = objective(mixing)
    rng = np.random.default_rng(seed)
    for scale in (1e-3, 1e-2, 1.0):
        assert all(objective(mixing + scale * rng.standard_normal((3, 3))) > best for _ in range(20))
    assert best < objective(np.eye(3))


def test_without_a_ridge_the_mixing_is_least_squares_on_the_scores_and_the_product_of_two_inverses() -> None:
    q, k = pair_samples(7)
    keep = np.asarray([1, 3, 4])
    second_q, second_k = q.T @ q / len(q), k.T @ k / len(k)
    mixing = rivals.pair_mixing(second_q, second_k, keep, 0.0)
    design = np.einsum("na,mb->nmab", q[:, keep], k[:, keep]).reshape(-1, 9)
    naive = np.linalg.lstsq(design, (q @ k.T).reshape(-1), rcond=None)[0].reshape(3, 3)
    np.testing.assert_allclose(mixing, naive, atol=1e-8)
    inner = second_q[keep] @ second_k[:, keep]
    inverses = (np.linalg.inv(second[np.ix_(keep, keep)]) for second in (second_q, second_k))
    np.testing.assert_allclose(mixing, next(inverses) @ inner @ next(inverses), atol=1e-8)


def test_the_folded_weights_give_the_mixed_scores_up_to_what_softmax_ignores() -> None:
    analysis, feeds, statistics = case()
    (entry,), updates = rivals.RIVALS["CORP"].propose(analysis, statistics, {"qk.0": 2})
    changed = analysis.graph.copy()
    changed.weights.update(updates)
    query, key = operands(analysis, analysis.graph, 0, feeds)
    new_query, new_key = operands(analysis, changed, 0, feeds)
    centred = key - key.mean(axis=2, keepdims=True)
    for head, keep in enumerate(entry.keep):
        q, k = query[:, head].reshape(-1, 4), centred[:, head].reshape(-1, 4)
        mixing = rivals.pair_mixing(q.T @ q / len(q), k.T @ k / len(k), np.asarray(keep))
        wanted = query[:, head][..., keep] @ mixing @ np.swapaxes(centred[:, head][..., keep], 1, 2)
        got = new_query[:, head] @ np.swapaxes(new_key[:, head], 1, 2)
        np.testing.assert_allclose(got - got.mean(axis=2, keepdims=True), wanted, atol=2e-3)
        assert np.abs(mixing - np.eye(2)).max() > 1e-2


@pytest.mark.parametrize("name", ALL)
def test_a_cut_of_nothing_leaves_every_weight(name: str) -> None:
    analysis, _, statistics = case()
    kinds = rivals.RIVALS[name].kinds
    full = {group.id: group.size for group in analysis.structure.groups if group.kind in kinds}
    assert len(full) == 2 * len(kinds)
    assert rivals.RIVALS[name].propose(analysis, statistics, full) == ([], {})


def test_the_formulas_themselves_leave_a_model_as_it_is_when_everything_stays() -> None:
    analysis, feeds, statistics = case()
    assert np.array_equal(rivals.pair_mixing(np.eye(4), np.eye(4), np.arange(4)), np.eye(4))
    graph = analysis.graph.copy()
    for group in analysis.structure.groups:
        if group.kind in ("qk", "v", "ffn"):
            keep = np.tile(np.arange(group.size), (group.heads, 1))
            shifted = rivals.mean_shift(analysis, statistics, group, keep)
            assert all(np.array_equal(array, analysis.graph.weights[name]) for name, array in shifted.items())
            graph.weights.update(rivals.closed_form(analysis, statistics, group, keep))
    assert difference(as_graph(analysis.model), graph, feeds[:1], 1) < 1e-4


@pytest.mark.parametrize("model", ["built", *EXPORTS])
@pytest.mark.parametrize("name", ALL)
def test_cuts_are_proved(model: str, name: str) -> None:
    analysis, feeds, statistics = case(model)
    rival = rivals.RIVALS[name]
    counts = half(analysis, rival.kinds)
    entries, updates = rival.propose(analysis, statistics, counts)
    assert {entry.id: entry.kept for entry in entries} == counts
    for weight, array in updates.items():
        held = analysis.graph.weights[weight]
        assert array.shape == held.shape and array.dtype == held.dtype
    assert prove(analysis, apply(analysis, Plan("", entries), updates), feeds[:1], 1).passed


@pytest.mark.parametrize("model", ["built", *EXPORTS])
def test_mixed_pairs_come_closer_to_the_scores_of_a_model_than_selected_ones(model: str) -> None:
    analysis, feeds, statistics = case(model)
    entries, updates = rivals.RIVALS["CORP"].propose(analysis, statistics, half(analysis, ("qk",)))
    entries = [entry for entry in entries if entry.id == "qk.0"]  # whose input no other cut changes
    cuts = as_cuts(Plan("", entries), analysis.groups)
    node = next(node for node in analysis.graph.nodes if node.name == analysis.structure.sites[0].score)
    wanted = captured(analysis.graph, node.output[0], feeds)
    errors = []
    for weights in ({}, updates):
        graph = analysis.graph.copy()
        graph.weights.update(mask_weights(graph, analysis.dependencies, cuts, weights))
        missed = captured(graph, node.output[0], feeds) - wanted
        errors.append(float(((missed - missed.mean(axis=-1, keepdims=True)) ** 2).sum()))
    assert errors[1] < errors[0]


def test_vbp_does_not_cut_attention() -> None:
    analysis, _, statistics = case()
    vbp = rivals.RIVALS["VBP"]
    assert vbp.covers(["ffn"]) and not vbp.covers(["ffn", "qk"])
    with pytest.raises(ValueError, match=r"cuts ffn, not 'v\.0'"):
        vbp.propose(analysis, statistics, {"v.0": 2})
