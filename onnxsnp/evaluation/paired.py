"""Two models on the same labelled samples: what one gets right and the other wrong, and whether that is chance."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

_Z95 = 1.959963984540054  # two-sided 95 % quantile of the normal distribution


@dataclass(frozen=True)
class Paired:
    """A model against the first one, sample by sample (top-1).

    Attributes:
        lost: samples that only the first model gets right.
        gained: samples that only this one gets right.
        difference: top-1 of this model less that of the first, in points.
        difference_interval: its 95 % interval, points.
        p: two-sided exact p of McNemar's test that both are equally accurate.
    """

    lost: int
    gained: int
    difference: float
    difference_interval: tuple[float, float]
    p: float


def compare_paired(first: np.ndarray, second: np.ndarray) -> Paired:
    """Compare what two models got right.

    Args:
        first, second: (samples,) booleans, in the same order; at least one.
    """
    lost, gained = int((first & ~second).sum()), int((second & ~first).sum())
    difference = 100 * (gained - lost) / len(first)
    return Paired(lost, gained, difference, difference_interval(lost, gained, len(first)), mcnemar(lost, gained))


def mcnemar(lost: int, gained: int) -> float:
    """Exact two-sided p of McNemar's test: `lost` of `lost + gained` coins that fell one way.

    Source: Q. McNemar, "Note on the sampling error of the difference between correlated proportions or percentages",
    Psychometrika 1947; exact (binomial) form.
    """
    count = lost + gained
    below = sum(math.comb(count, number) for number in range(min(lost, gained) + 1))
    return min(1.0, 2 * below / 2**count)


def difference_interval(lost: int, gained: int, count: int) -> tuple[float, float]:
    """95 % interval of the difference of two paired proportions, in points: adjusted Wald.

    Source: D. G. Bonett, R. M. Price, "Adjusted Wald confidence interval for a difference of binomial proportions based
    on paired data", Journal of Educational and Behavioral Statistics 2012, eq. 5.
    """
    down, up = (lost + 1) / (count + 2), (gained + 1) / (count + 2)
    half = _Z95 * math.sqrt((down + up - (up - down) ** 2) / (count + 2))
    return 100 * max(up - down - half, -1.0), 100 * min(up - down + half, 1.0)


def class_counts(labels: np.ndarray, right: np.ndarray) -> dict[int, tuple[int, int]]:
    """By class, how many samples there are, and how many of them are right."""
    numbers, place = np.unique(labels, return_inverse=True)
    found = np.bincount(place, right, len(numbers))
    return {
        int(number): (int(count), int(hits))
        for number, count, hits in zip(numbers, np.bincount(place), found, strict=True)
    }


def class_changes(
    labels: np.ndarray, first: np.ndarray, second: np.ndarray, names: list[str] | None = None
) -> list[dict[str, Any]]:
    """What each class gains or loses, largest losses first.

    Args:
        names: of the classes by number, where they are known.

    Returns:
        By class: `label`, `name` (None where it is not known), `count`, `before` and `after` (samples that are right)
        and `change` in points of the class's own accuracy.
    """
    before, after = class_counts(labels, first), class_counts(labels, second)
    rows = [
        {
            "label": label,
            "name": names[label] if names and label < len(names) else None,
            "count": count,
            "before": hits,
            "after": after[label][1],
            "change": 100 * (after[label][1] - hits) / count,
        }
        for label, (count, hits) in before.items()
    ]
    return sorted(rows, key=lambda row: (row["change"], row["label"]))
