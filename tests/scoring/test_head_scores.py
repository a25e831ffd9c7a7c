"""Whole heads by every criterion, against sums over their filters written out."""

from __future__ import annotations

from typing import Any

import graphs
import numpy as np
import pytest

from onnxsnp.analysis import analyse_model
from onnxsnp.scoring.criteria import CRITERIA, score
from onnxsnp.scoring.heads import contributions, dead_heads, head_target
from onnxsnp.scoring.magnitude import geometric_median_scores, l2_scores


def target(model: Any, contribution: np.ndarray | None = None) -> Any:
    analysis = analyse_model(model)
    group = analysis.groups["head.0"]
    return head_target(analysis.graph, analysis.dependencies, group, analysis.linears, contribution)


def filters(model: Any, heads: int) -> list[np.ndarray]:
    """Filters of query, key and value of the first block, [heads, size, fan_in + 1]."""
    weights = graphs.initializers(model)
    layers = [np.column_stack([weights[f"{name}.w"].T, weights[f"{name}.b"]]) for name in _NAMES]
    return [layer.reshape(heads, -1, layer.shape[1]).astype(np.float64) for layer in layers]


_NAMES = [f"/blocks.0/attn/{name}" for name in "qkv"]


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_criteria_that_look_at_weights_sum_over_the_filters_of_a_head() -> None:
    model = graphs.transformer(heads=3, qk=4, v=6)
    found, layers = target(model), filters(model, 3)
    lengths = [sum(np.linalg.norm(layer[head], axis=1).sum() for layer in layers) for head in range(3)]
    np.testing.assert_allclose(score("l2", found, rng=rng()), [lengths])
    flat = [layer.reshape(-1, layer.shape[-1]) for layer in layers]
    distances = [
        sum(
            np.linalg.norm(row - other)
            for layer, every in zip(layers, flat, strict=True)
            for row in layer[head]
            for other in every
        )
        for head in range(3)
    ]
    np.testing.assert_allclose(score("gm", found, rng=rng()), [distances])
    assert score("random", found, rng=rng()).shape == (1, 3)
    assert l2_scores(flat[0]).shape == geometric_median_scores(flat[0]).shape == (12,)


def test_a_packed_projection_gives_each_head_its_own_filters() -> None:
    packed = target(graphs.transformer(heads=3, qk=4, v=4, qkv="packed"))
    assert [layer.shape for layer in packed.filters] == [(12, 13)] * 3
    assert len({layer.tobytes() for layer in packed.filters}) == 3


def test_snp_scores_what_a_head_adds_and_reverse_the_opposite() -> None:
    model = graphs.transformer(heads=3)
    added = np.asarray([2.0, 5.0, 1.0])
    np.testing.assert_array_equal(score("snp", target(model, added), rng=rng()), [added])
    np.testing.assert_array_equal(score("reverse", target(model, added), rng=rng()), [-added])
    blind = target(model)  # the input of the projection cannot be measured
    np.testing.assert_array_equal(score("snp", blind, rng=rng()), score("l2", blind, rng=rng()))


@pytest.mark.parametrize("criterion", sorted(CRITERIA))
@pytest.mark.parametrize("what", ["value", "projection"])
def test_dead_heads_go_first_by_any_criterion(criterion: str, what: str) -> None:
    plain = graphs.transformer(heads=3, qk=4, v=6)
    weights = {name: array.copy() for name, array in graphs.initializers(plain).items()}
    if what == "value":
        weights["/blocks.0/attn/v.w"][:, 6:12] = 0
        weights["/blocks.0/attn/v.b"][6:12] = 0
    else:
        weights["/blocks.0/attn/proj.w"][6:12] = 0
    found = target(graphs.set_weights(plain, weights), np.ones(3))
    assert found.dead.tolist() == [[False, True, False]]
    assert np.isneginf(score(criterion, found, rng=rng())).tolist() == [[False, True, False]]


def test_a_head_without_queries_is_not_dead() -> None:
    plain = graphs.transformer(heads=3, qk=4, v=6)
    weights = {name: array.copy() for name, array in graphs.initializers(plain).items()}
    for name in ("q", "k"):
        weights[f"/blocks.0/attn/{name}.w"][:, :4] = 0
        weights[f"/blocks.0/attn/{name}.b"][:4] = 0
    assert not target(graphs.set_weights(plain, weights)).dead.any()  # it averages its values


def test_values_that_several_queries_share() -> None:
    plain = graphs.grouped(keys=2, queries=3, v=5)
    weights = {name: array.copy() for name, array in graphs.initializers(plain).items()}
    weights["v.w"][:, 5:] = 0
    weights["v.b"][5:] = 0
    analysis = analyse_model(graphs.set_weights(plain, weights))
    group = analysis.groups["head.0"]
    assert dead_heads(analysis.graph, analysis.dependencies, group, analysis.linears).tolist() == [False, True]
    found = head_target(analysis.graph, analysis.dependencies, group, analysis.linears)
    assert sorted(layer.shape for layer in found.filters) == [(8, 13), (10, 13), (24, 13)]


def test_contributions_are_squared_changes_of_the_output() -> None:
    draw = np.random.default_rng(3)
    x, weight = draw.standard_normal((50, 12)), draw.standard_normal((12, 4))
    blocks = draw.permutation(12).reshape(3, 4)
    want = [np.mean(np.sum((x[:, rows] @ weight[rows]) ** 2, axis=1)) for rows in blocks]
    np.testing.assert_allclose(contributions(weight, x.T @ x / 50, blocks), want)
