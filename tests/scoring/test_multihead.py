"""Scores by change and likeness, written out; the change of the attention, by a softmax in numpy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import graphs
import numpy as np
import onnx
import pytest

from onnxsnp.analysis import Analysis, analyse_model
from onnxsnp.calibration.changes import AttentionChange, measure_changes
from onnxsnp.calibration.data import Batch
from onnxsnp.errors import DataError
from onnxsnp.graph.probabilities import find_path
from onnxsnp.planning.selection import requirements
from onnxsnp.pruning import prune
from onnxsnp.scoring.multihead import channel_scores, neuron_overlap


def naive_scores(change: np.ndarray, added: np.ndarray) -> np.ndarray:
    """The formula, channel by channel; `added` [heads, size, entries]."""
    scores = np.zeros(change.shape)
    for head, mine in enumerate(added):
        for i, z in enumerate(mine):
            alike = [
                abs(z @ other) / (np.linalg.norm(z) * np.linalg.norm(other)) if z.any() and other.any() else 0.0
                for j, other in enumerate(mine)
                if j != i
            ]
            scores[head, i] = change[head, i] * (1 - np.mean(alike)) if alike else change[head, i]
    return scores


@pytest.mark.parametrize("size", [1, 2, 5])
def test_scores_are_change_times_what_is_unlike_the_others(size: int) -> None:
    rng = np.random.default_rng(size)
    added, change = rng.standard_normal((3, size, 40)), rng.random((3, size))
    added[1, 0] = 0
    np.testing.assert_allclose(channel_scores(change, added @ added.swapaxes(1, 2)), naive_scores(change, added))


def test_copies_score_less_than_channels_of_their_own() -> None:
    rng = np.random.default_rng(0)
    added = rng.standard_normal((1, 4, 30))
    added[0, 1], added[0, 2] = -2 * added[0, 0], 3 * added[0, 0]
    scores = channel_scores(np.ones((1, 4)), added @ added.swapaxes(1, 2))[0]
    assert scores[3] > scores[:3].max() + 0.3
    with pytest.raises(ValueError, match="overlap"):
        channel_scores(np.ones((1, 4)), np.ones((1, 3, 3)))


def test_the_overlap_of_neurons_is_that_of_what_they_add_to_the_output() -> None:
    rng = np.random.default_rng(1)
    x, weight = rng.standard_normal((50, 12)), rng.standard_normal((12, 5))
    places = rng.permutation(12).reshape(2, 3, 2)  # two rows each
    added = np.stack([[sum(np.outer(x[:, row], weight[row]) for row in rows) for rows in head] for head in places])
    flat = added.reshape(2, 3, -1)
    np.testing.assert_allclose(neuron_overlap(weight, x.T @ x / 50, places), flat @ flat.swapaxes(1, 2) / 50)


def measured(
    model: onnx.ModelProto, samples: int = 6, site: int = 0
) -> tuple[Analysis, Any, dict[str, AttentionChange]]:
    analysis = analyse_model(model)
    group = analysis.groups[f"qk.{site}"]
    path = find_path(group, analysis.structure.sites[site], analysis.graph, analysis.dependencies)
    assert path is not None
    inputs = graphs.inputs_for(model, samples, 4)
    parts = [{name: array[start : start + 2] for name, array in inputs.items()} for start in range(0, samples, 2)]
    batches = [Batch(part, None, 2) for part in parts]
    found = measure_changes(analysis.graph, analysis.dependencies, {group.id: path}, analysis.groups, batches)
    return analysis, inputs, found


def softmax(scores: np.ndarray) -> np.ndarray:
    shifted = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return shifted / shifted.sum(axis=-1, keepdims=True)


def naive_change(q: np.ndarray, k: np.ndarray, offset: Any = 0.0, scale: float = 1.0) -> np.ndarray:
    """Mean KL of the rows without each channel, [heads, size], of q and k [images, heads, tokens, size]."""
    whole = softmax(scale * q @ k.swapaxes(-1, -2) + offset)
    found = []
    for channel in range(q.shape[-1]):
        less = np.delete(q, channel, axis=-1) @ np.delete(k, channel, axis=-1).swapaxes(-1, -2)
        part = softmax(scale * less + offset)
        terms = np.where(whole > 0, whole * (np.log(np.maximum(whole, 1e-30)) - np.log(np.maximum(part, 1e-30))), 0)
        found.append(terms.sum(axis=-1).mean(axis=(0, 2)))
    return np.stack(found, axis=1)


def values(analysis: Analysis, names: list[str], inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    found = analysis.graph.session(names, optimize=False).run(None, inputs)
    return [array.astype(np.float64) for array in found]


def operands(analysis: Analysis, inputs: dict[str, np.ndarray], site: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Query and key as [images, heads, tokens, size]."""
    one = analysis.structure.sites[site]
    (q, at), (k, key_at) = one.query, one.key
    pair = values(analysis, [q, k], inputs)
    found = [np.swapaxes(array, axis, -1) for array, axis in zip(pair, (at, key_at), strict=True)]
    return found[0], found[1]


@pytest.mark.parametrize(
    "options",
    [{}, {"qkv": "packed", "v": 4}, {"reverse": True}, {"scale": "shape"}, {"qk_norm": True}, {"opset": 11}],
)
def test_the_change_of_the_attention_is_that_of_a_softmax_without_the_channel(options: dict[str, Any]) -> None:
    analysis, inputs, found = measured(graphs.transformer(heads=3, qk=4, **options), site=1)
    q, k = operands(analysis, inputs, 1)
    want = naive_change(q, k)
    if "qk_norm" in options:  # its weights are those of all heads, which keep the same channels
        want = want.mean(axis=0, keepdims=True)
    np.testing.assert_allclose(found["qk.1"].mean, want, rtol=1e-3, atol=1e-7)
    assert found["qk.1"].images == 6


def test_what_pairs_have_in_common_is_measured_about_the_mean_of_each_row() -> None:
    analysis, inputs, found = measured(graphs.transformer(heads=2, qk=4))
    q, k = operands(analysis, inputs)
    k = k - k.mean(axis=2, keepdims=True)
    added = np.einsum("ahti,ahui->hiatu", q, k).reshape(2, 4, -1)
    np.testing.assert_allclose(
        found["qk.0"].overlap.mean, added @ added.swapaxes(1, 2) / added.shape[2], rtol=1e-4, atol=1e-9
    )


def test_scale_bias_and_mask_behind_the_product_count() -> None:
    rng = np.random.default_rng(2)
    bias = rng.standard_normal((graphs.HEADS, graphs.TOKENS, graphs.TOKENS))
    bias[:, :, -1] = -1e9  # a masked token

    def scores(net: graphs.Net, value: Any) -> Any:
        return net.op("Add", net.op("Div", value, 1.7), bias[None])

    analysis, inputs, found = measured(graphs.attention(scores=scores))
    q, k = operands(analysis, inputs)
    want = naive_change(q, k, bias.astype(np.float32).astype(np.float64), 1 / 1.7)
    np.testing.assert_allclose(found["qk.0"].mean, want, rtol=1e-3, atol=1e-7)


def test_a_row_in_which_all_is_masked_says_nothing() -> None:
    bias = np.zeros((1, graphs.HEADS, graphs.TOKENS, graphs.TOKENS))
    bias[0, :, 2] = -np.inf
    analysis, inputs, found = measured(graphs.attention(scores=lambda net, value: net.op("Add", value, bias)))
    q, k = operands(analysis, inputs)
    rest = naive_change(np.delete(q, 2, axis=2), k)  # mean over one row less
    share = (graphs.TOKENS - 1) / graphs.TOKENS
    np.testing.assert_allclose(found["qk.0"].mean, share * rest, rtol=1e-3, atol=1e-7)


def test_shared_keys_average_over_the_queries_that_share_them() -> None:
    model = graphs.grouped(keys=2, queries=3, qk=4)
    analysis, inputs, found = measured(model)
    q, k = operands(analysis, inputs)
    each = naive_change(q, k)  # of six heads, three to a key
    np.testing.assert_allclose(found["qk.0"].mean, each.reshape(2, 3, 4).mean(axis=1), rtol=1e-3, atol=1e-7)


def test_numbers_that_are_not_finite_are_refused() -> None:
    model = graphs.transformer()
    broken = graphs.set_weights(model, {"/blocks.0/attn/q.b": np.full(12, np.inf, np.float32)})
    with pytest.raises(DataError, match="not finite"):
        measured(broken)


def dead_pairs(plain: onnx.ModelProto, dead: list[int], side: str) -> onnx.ModelProto:
    weights = {name: array.copy() for name, array in graphs.initializers(plain).items()}
    weights[f"/blocks.0/attn/{side}.w"][:, dead] = 0
    weights[f"/blocks.0/attn/{side}.b"][dead] = 0
    return graphs.set_weights(plain, weights)


@pytest.mark.parametrize("compensation", ["none", "refit"])
def test_equal_counts_go_from_every_head_and_dead_channels_first(compensation: str) -> None:
    plain = graphs.transformer(blocks=1, heads=2, qk=4, v=4, ffn=12)
    model = dead_pairs(plain, [1, 6], "q")
    options = {"calibration": graphs.calibration(model, 24), "samples": 16, "threads": 1, "latency": False}
    found = prune(model, 0.25, allocation="uniform", criterion="multihead", compensation=compensation, **options)
    kept = {entry.id: entry.keep for entry in found.plan.groups}
    assert kept["qk.0"] == [[0, 2, 3], [0, 1, 3]]
    assert [len(head) for head in kept["v.0"]] == [3, 3] and len(kept["ffn.0"][0]) == 9
    assert found.record["verification"]["passed"] and found.record["notes"] == []


def test_values_and_ffn_neurons_are_ranked_by_what_they_do_to_the_output() -> None:
    model = graphs.transformer(blocks=1, heads=2, qk=4, v=4, ffn=12)
    data = graphs.calibration(model, 40)
    options = {"calibration": data, "samples": 32, "threads": 1, "latency": False, "compensation": "none"}
    found = prune(model, 0.5, allocation="uniform", criterion="multihead", scope="v,ffn", **options)
    analysis = analyse_model(model)
    seen = {name: array[:32] for name, array in data.items()}
    for name, heads, weight in (("v.0", 2, "/blocks.0/attn/proj.w"), ("ffn.0", 1, "/blocks.0/mlp/fc2.w")):
        (x,) = values(analysis, [analysis.linears[weight].data], seen)
        x, rows = x.reshape(-1, x.shape[-1]), analysis.graph.weights[weight].astype(np.float64)
        added = np.stack([np.outer(x[:, at], rows[at]) for at in range(len(rows))]).reshape(
            heads, -1, len(x) * rows.shape[1]
        )
        scores = naive_scores(np.sum(added**2, axis=2), added)
        half = scores.shape[1] // 2
        want = [sorted(row.argsort()[half:].tolist()) for row in scores]
        assert {entry.id: entry.keep for entry in found.plan.groups}[name] == want


def test_requirements_are_what_is_needed_and_no_more() -> None:
    analysis = analyse_model(graphs.transformer(blocks=2))
    groups = [group for group in analysis.structure.groups if group.prunable]
    needed = requirements(analysis, groups, "none", "multihead", planned=False)
    assert needed.changed.keys() == {"qk.0", "qk.1"} and not needed.scored
    assert requirements(analysis, groups, "none", "snp", planned=False).changed == {}
    assert requirements(analysis, groups, "full", "multihead", planned=False).changed == {}  # all are rotated
    planned = requirements(analysis, groups, "none", "multihead", planned=True)
    assert planned.nothing and not planned.changed


def test_attention_in_one_operator_is_ranked_by_snp_and_that_is_said() -> None:
    folder = Path(__file__).resolve().parent.parent / "exports"
    name = "timm_deit_sdpa_dynamo23_dyn.onnx"
    held = json.loads((folder / "expected.json").read_text())[name]["input"]
    rng = np.random.default_rng(0)
    data = {held["name"]: rng.standard_normal((12, *held["shape"][1:])).astype(np.float32)}
    options = {"calibration": data, "samples": 8, "threads": 1, "latency": False, "compensation": "none"}
    found, plain = (
        prune(folder / name, 0.5, allocation="uniform", scope="qk", criterion=criterion, **options)
        for criterion in ("multihead", "snp")
    )
    assert any("ranked by snp instead of multihead" in note for note in found.record["notes"])
    assert [entry.keep for entry in found.plan.groups] == [entry.keep for entry in plain.plan.groups]
    assert not any("ranked by snp" in note for note in plain.record["notes"])
