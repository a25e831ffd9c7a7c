"""What the record says about a group's width is short, and says what happened."""

from __future__ import annotations

import numpy as np

from onnxsnp.planning.evidence import BINS, POINTS, histogram, left_alone, thinned


def test_a_long_curve_keeps_its_ends_and_the_chosen_width() -> None:
    curve = np.concatenate([[np.nan], np.linspace(5, 0, 3072)])
    found = thinned(curve, 1777)
    assert len(found["width"]) <= POINTS + 1 and {1, 1777, 3072} <= set(found["width"])
    assert found["width"] == sorted(found["width"])
    np.testing.assert_allclose(found["error"], curve[found["width"]], rtol=1e-4)


def test_a_short_curve_is_whole() -> None:
    assert thinned(np.asarray([3.0, 2.0, 0.0]), 1) == {"width": [0, 1, 2], "error": [3.0, 2.0, 0.0]}


def test_every_neuron_is_counted_once() -> None:
    scores = np.random.default_rng(0).standard_normal((2, 50))
    keep = [sorted(np.argsort(-row)[:20].tolist()) for row in scores]
    found = histogram(scores, keep)
    assert len(found["kept"]) == BINS and sum(found["kept"]) == 40 and sum(found["cut"]) == 60
    assert (found["low"], found["high"], found["log"]) == (scores.min(), scores.max(), False)
    assert found["kept"][-1] > 0 and found["cut"][-1] == 0 and found["cut"][0] > 0


def test_scores_over_many_decades_are_counted_by_their_logarithm() -> None:
    found = histogram(10.0 ** np.linspace(-6, 0, 30)[None], [[29]])
    assert found["log"] and (found["low"], found["high"]) == (-6, 0) and max(found["cut"]) <= 2


def test_scores_that_are_equal_or_zero_have_a_distribution() -> None:
    for scores in (np.zeros((1, 4)), np.ones((1, 4)), np.full((1, 4), np.inf)):
        found = histogram(scores, [[0]])
        assert sum(found["kept"]) == 1 and sum(found["cut"]) == 3


def test_the_same_reason_at_the_same_node_is_said_once() -> None:
    one, other = {"node": "a", "reason": "b"}, {"node": "a", "reason": "c"}
    assert left_alone([one, other, one]) == [one, other]
