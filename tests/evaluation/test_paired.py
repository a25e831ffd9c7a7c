"""Paired comparisons against values worked out by hand, tables, and simulation."""

from __future__ import annotations

from math import comb

import numpy as np
import pytest

from onnxsnp.evaluation.paired import class_changes, class_counts, compare_paired, difference_interval, mcnemar


def test_mcnemar_counts_coins() -> None:
    assert mcnemar(0, 0) == 1 and mcnemar(3, 3) == 1 and mcnemar(4, 5) == 1
    assert mcnemar(5, 0) == mcnemar(0, 5) == 2 / 2**5
    assert mcnemar(8, 2) == pytest.approx(2 * (1 + 10 + 45) / 1024)
    assert mcnemar(700, 500) == pytest.approx(2 * sum(comb(1200, k) for k in range(501)) / 2**1200)


def test_a_comparison_looks_at_samples_and_not_at_sums() -> None:
    first = np.array([1, 1, 1, 1, 0, 0, 1, 1, 0, 1], bool)
    second = np.array([1, 1, 0, 0, 1, 0, 1, 0, 0, 1], bool)
    found = compare_paired(first, second)
    assert (found.lost, found.gained, found.difference) == (3, 1, -20.0)
    low, high = found.difference_interval
    assert low < -20 < high and found.p == mcnemar(3, 1)
    assert compare_paired(second, first).difference == 20.0
    assert compare_paired(first, ~first).p < compare_paired(first, first).p == 1.0


def test_the_interval_by_its_formula() -> None:
    # n = 100, 12 lost, 4 gained: adjusted shares 13/102 and 5/102
    low, high = difference_interval(12, 4, 100)
    centre = 100 * (5 - 13) / 102
    half = 100 * 1.959964 * ((18 / 102 - (8 / 102) ** 2) / 102) ** 0.5
    assert (low, high) == pytest.approx((centre - half, centre + half))
    assert difference_interval(10, 0, 10)[0] >= -100 and difference_interval(0, 10, 10)[1] <= 100


@pytest.mark.parametrize(("lost", "gained"), [(0.1, 0.05), (0.02, 0.02)])
def test_the_interval_covers_the_truth_in_95_of_100_samples(lost: float, gained: float) -> None:
    rng = np.random.default_rng(0)
    draws = rng.multinomial(200, [lost, gained, 1 - lost - gained], size=2000)
    intervals = [difference_interval(a, b, 200) for a, b, _ in draws.tolist()]
    covered = np.mean([low <= 100 * (gained - lost) <= high for low, high in intervals])
    assert 0.93 < covered < 0.99


def test_classes_are_listed_from_the_largest_loss_to_the_largest_gain() -> None:
    labels = np.array([7, 7, 7, 7, 2, 2, 0])
    first = np.array([1, 1, 1, 0, 0, 0, 1], bool)
    second = np.array([1, 0, 0, 0, 1, 0, 1], bool)
    assert class_counts(labels, first) == {0: (1, 1), 2: (2, 0), 7: (4, 3)}
    found = class_changes(labels, first, second, ["ant", "bee", "cat"])
    assert [(one["label"], one["name"], one["change"]) for one in found] == [
        (7, None, -50.0),
        (0, "ant", 0.0),
        (2, "cat", 50.0),
    ]
    assert found[0] == {"label": 7, "name": None, "count": 4, "before": 3, "after": 1, "change": -50.0}
