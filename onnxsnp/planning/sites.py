"""Heads beside the widths inside them: one choice of the knapsack, since what either costs depends on the other.

Every product of an attention site grows with heads times size, so the saving of a cut head is smaller where its neurons
are fewer already, and the other way round; a knapsack over groups that cost what they cost alone would count it twice.
But once the number of heads is given, the costs of query-key and value sizes add up, and their losses are those of the
heads that stay. So for each number of heads the widths inside combine freely, and a site is one item of the knapsack:
of all combinations those that no other beats in both cost and loss, with their exact costs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from onnxsnp.evaluation.cost import CostModel
from onnxsnp.graph.groups import Group
from onnxsnp.planning.ties import Tie

Curve = Callable[[Group, int], np.ndarray]


@dataclass(frozen=True)
class Item:
    """The widths that one or more groups may have together, and what they cost and lose.

    Attributes:
        groups: of a site: the heads, then the groups inside.
        widths: [n, groups].
        losses: [n].
        costs: [n], ascending.
    """

    groups: tuple[Group, ...]
    widths: np.ndarray
    losses: np.ndarray
    costs: np.ndarray

    def chosen(self, pick: int) -> list[tuple[Group, int]]:
        """The width of each group at one of the choices."""
        return list(zip(self.groups, self.widths[pick].tolist(), strict=True))


def inside(heads: Group, groups: Sequence[Group]) -> list[Group]:
    """The groups whose neurons lie inside the heads of another."""
    return [group for group in groups if heads.atom in group.head_atoms]


def site_item(
    heads: Group,
    members: Sequence[Tie],
    losses: np.ndarray,
    curve: Curve,
    cost: CostModel,
    what: str,
) -> Item:
    """Combine what one site offers: the combinations than which none both costs and loses less.

    Args:
        heads: the head group.
        members: the groups inside, with the widths they may have.
        losses: by number of heads, of cutting heads alone, [heads + 1]; entry 0 is not read.
        curve: (member, heads that stay) -> its losses by width, [size + 1].
        cost: of everything else uncut.
        what: "macs", "params" or "latency".
    """
    found = []
    for kept in range(1, heads.size + 1):
        table = np.asarray([[cost.total(what, {heads.atom: kept}), losses[kept], kept]])
        for member in members:
            pairs = list(zip(member.groups, member.widths.T, strict=True))
            saved = sum(_change(cost, what, heads, kept, group, own) for group, own in pairs)
            lost = sum(curve(group, kept)[own] for group, own in pairs)
            table = _best(_joined(table, np.column_stack([saved, lost, member.widths])))
        found.append(table)
    table = _best(np.concatenate(found))
    groups = (heads, *(group for member in members for group in member.groups))
    return Item(groups, table[:, 2:].astype(np.int64), table[:, 1], table[:, 0])


def _change(cost: CostModel, what: str, heads: Group, kept: int, group: Group, widths: np.ndarray) -> np.ndarray:
    """What the widths of a group change in the cost of a model that keeps some heads; 0 for the last."""
    if what == "latency":  # the layers of heads and of sizes have been measured, not products of them
        costs = np.asarray([cost.total(what, {heads.atom: kept, group.atom: width}) for width in widths.tolist()])
    else:
        costs = cost.given({heads.atom: kept}).at_widths(what, group.atom, widths)
    change: np.ndarray = costs - costs[-1]
    return change


def _joined(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Every row of one table with every row of another: costs and losses added, widths side by side."""
    count = len(right)
    first, second = np.repeat(left, count, axis=0), np.tile(right, (len(left), 1))
    return np.concatenate([first[:, :2] + second[:, :2], first[:, 2:], second[:, 2:]], axis=1)


def _best(table: np.ndarray) -> np.ndarray:
    """The rows [cost, loss, widths...] than which none both costs and loses less, by cost; of equals the widest."""
    order = np.lexsort((*(-table[:, column] for column in range(table.shape[1] - 1, 1, -1)), table[:, 1], table[:, 0]))
    rows = table[order]
    least = np.minimum.accumulate(rows[:, 1])
    keep = rows[:, 1] <= least
    keep[1:] &= rows[1:, 0] > rows[:-1, 0]  # of rows with one cost the first, which loses least
    return rows[keep]
