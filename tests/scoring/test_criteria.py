"""The registry: which equation each criterion uses for which kind of group."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from onnxsnp.errors import PlanError
from onnxsnp.scoring.criteria import CRITERIA, Criterion, ScoringTarget, score
from onnxsnp.scoring.magnitude import geometric_median_scores, l2_scores
from onnxsnp.scoring.redundancy import redundancy_scores


def target(kind, heads=1, size=6, fan_ins=(8,), seed=0):
    rng = np.random.default_rng(seed)
    filters = tuple(rng.standard_normal((heads * size, fan_in)) for fan_in in fan_ins)
    qk = rng.random((heads, size)) if kind == "qk" else None
    return ScoringTarget(kind, heads, size, filters, np.zeros((heads, size), dtype=bool), qk)


TARGETS = {
    "qk": target("qk", 3, 4, (8, 8)),
    "v": target("v", 3, 4),
    "ffn": target("ffn"),
    "gated": target("ffn", fan_ins=(8, 8)),
    "residual": target("residual", fan_ins=(5, 9, 7)),
}


def run(criterion, group):
    return score(criterion, group, rng=np.random.default_rng(0))


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("criterion", CRITERIA)
def test_shape_and_dead_first(criterion, name):
    group = TARGETS[name]
    dead = group.dead.copy()
    dead[0, 2] = True
    scores = run(criterion, replace(group, dead=dead))
    assert scores.shape == (group.heads, group.size)
    assert scores.dtype == np.float64
    assert scores[0, 2] == -np.inf
    assert np.isfinite(scores).sum() == scores.size - 1
    np.testing.assert_array_equal(scores[~dead], run(criterion, group)[~dead])


def test_snp_uses_the_pair_scores_for_qk():
    np.testing.assert_array_equal(run("snp", TARGETS["qk"]), TARGETS["qk"].qk)


def test_snp_compares_values_across_heads():
    group = TARGETS["v"]
    np.testing.assert_allclose(run("snp", group), redundancy_scores(group.filters[0]).reshape(3, 4))


@pytest.mark.parametrize("name", ["gated", "residual"])
@pytest.mark.parametrize(
    ("criterion", "single"), [("snp", redundancy_scores), ("l2", l2_scores), ("gm", geometric_median_scores)]
)
def test_coupled_layers_sum_per_index(criterion, single, name):
    group = TARGETS[name]
    np.testing.assert_allclose(run(criterion, group)[0], sum(single(layer) for layer in group.filters))


@pytest.mark.parametrize(("criterion", "single"), [("l2", l2_scores), ("gm", geometric_median_scores)])
def test_baselines_score_pairs_within_their_head(criterion, single):
    group = TARGETS["qk"]
    query, key = group.filters
    for head in range(3):
        rows = slice(4 * head, 4 * head + 4)
        np.testing.assert_allclose(run(criterion, group)[head], single(query[rows]) + single(key[rows]))


@pytest.mark.parametrize("name", TARGETS)
def test_reverse_is_snp_backwards(name):
    np.testing.assert_array_equal(run("reverse", TARGETS[name]), -run("snp", TARGETS[name]))


def test_random_follows_the_generator():
    group = TARGETS["v"]
    np.testing.assert_array_equal(run("random", group), run("random", group))
    assert not np.array_equal(run("random", group), score("random", group, rng=np.random.default_rng(1)))


@pytest.mark.parametrize("criterion", ["snp", "reverse"])
def test_missing_pair_scores_are_named(criterion):
    assert CRITERIA[criterion].needs_qk
    with pytest.raises(PlanError, match="calibrat"):
        run(criterion, replace(TARGETS["qk"], qk=None))


@pytest.mark.parametrize(("typed", "meant"), [("snpp", "snp"), ("revers", "reverse"), ("L2", "l2"), ("rand", "random")])
def test_unknown_criterion_names_the_nearest(typed, meant):
    with pytest.raises(PlanError, match=f"did you mean '{meant}'"):
        run(typed, TARGETS["v"])


def test_unknown_criterion_lists_the_choices():
    with pytest.raises(PlanError, match="snp, l2, gm, random, reverse"):
        run("xyzzy-quux", TARGETS["v"])


def test_a_new_criterion_is_one_entry(monkeypatch):
    monkeypatch.setitem(CRITERIA, "first", Criterion(lambda t, rng: np.arange(t.heads * t.size), "by position"))
    assert run("first", TARGETS["v"]).tolist() == np.arange(12.0).reshape(3, 4).tolist()


@pytest.mark.parametrize(
    "bad",
    [
        replace(TARGETS["v"], kind="norm"),
        replace(TARGETS["v"], filters=()),
        replace(TARGETS["v"], size=5, dead=np.zeros((3, 5), dtype=bool)),
        replace(TARGETS["v"], dead=np.zeros(12, dtype=bool)),
        replace(TARGETS["v"], kind="ffn"),
        replace(TARGETS["qk"], filters=TARGETS["qk"].filters[:1]),
    ],
)
def test_inconsistent_targets_are_refused(bad):
    with pytest.raises(ValueError, match=r"kind|filters|expected|heads"):
        run("l2", bad)
