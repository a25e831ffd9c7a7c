"""Groups that get their widths together, and the widths that a group may have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from onnxsnp.graph.groups import Group


@dataclass(frozen=True)
class Tie:
    """Groups whose widths are chosen as one: where a device wants one head size for query, key and value, for one.

    Attributes:
        groups: one or more.
        widths: [n, groups], the widths they may have, each row wider than the one before; the last are their sizes.
    """

    groups: tuple[Group, ...]
    widths: np.ndarray

    def at(self, row: int) -> dict[str, int]:
        """The width of each group by its id."""
        return {group.id: int(width) for group, width in zip(self.groups, self.widths[row], strict=True)}


def step_of(group: Group, multiple: int) -> int:
    """The multiple that a group's width has to be: `multiple` is about the sizes of layers, not the number of heads."""
    return 1 if group.kind == "head" else multiple


def alone(group: Group, multiple: int) -> Tie:
    """A group that is tied to no other."""
    step = step_of(group, multiple)
    widths = np.unique(np.append(np.arange(min(step, group.size), group.size + 1, step), group.size))
    return Tie((group,), widths[:, None])


def tied(groups: Sequence[Group], multiple: int, ties: Sequence[Tie] = ()) -> list[Tie]:
    """Every group once, in order: in the tie it belongs to if all of the tie is there, else alone."""
    here = {group.id for group in groups}
    of = {group.id: tie for tie in ties if here.issuperset(one.id for one in tie.groups) for group in tie.groups}
    found: list[Tie] = []
    for group in groups:
        if group.id not in of:
            found.append(alone(group, multiple))
        elif of[group.id].groups[0].id == group.id:
            found.append(of[group.id])
    return found
