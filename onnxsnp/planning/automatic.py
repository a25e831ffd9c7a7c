"""Automatic allocation: widths that lose least for the cost they save (METHODS 2.6).

Every group has an error curve from the closed forms. Its scale, what such an error means for the model's output, is
measured by cutting the group alone. The knapsack over these curves is the start; since single-group sensitivities do
not simply add up, the balance between the kinds of groups, and between early and late blocks, is then refined on the
joint loss of whole plans.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from onnxsnp.evaluation.cost import CostModel
from onnxsnp.graph.groups import Group
from onnxsnp.planning.allocation import TOLERANCE, too_much
from onnxsnp.planning.curves import Loss
from onnxsnp.planning.selection import Selector

ALONE = 16  # samples on which groups are measured alone; whole plans are measured on all there are
REMOVED = 0.4  # share of its neurons that each group loses when its sensitivity is measured
NOTHING = 3e-5  # share of the error of a single neuron below which a width counts as lossless
_STEPS = (2.0, 1.4)  # factors by which weights are changed while refining
DEPTH = "depth"  # key of the factor between the last and the middle block


@dataclass
class Allocation:
    """Widths, and why.

    Attributes:
        counts: kept neurons by group id.
        sensitivity: by group id, the loss when the group alone loses `REMOVED` of its neurons (or more, see `_probed`).
        balance: the factors that refining put on the sensitivities: by kind, and under `DEPTH` that of the last block
            (its inverse for the first, between them in proportion to the depth, on a logarithmic scale).
        loss: joint loss of the plan; start is that of the knapsack's first answer.
    """

    counts: dict[str, int]
    sensitivity: dict[str, float] = field(default_factory=dict)
    balance: dict[str, float] = field(default_factory=dict)
    loss: float = float("nan")
    start: float = float("nan")


@dataclass(frozen=True)
class _Item:
    """One group of the knapsack: the widths it may have, the loss and the cost (never less for more) at each."""

    group: Group
    widths: np.ndarray
    losses: np.ndarray
    costs: np.ndarray


def allocate(
    groups: Sequence[Group],
    cost: CostModel,
    share: float,
    what: str,
    multiple: int,
    selector: Selector,
    loss: Loss,
    progress: Callable[[int, int], None] | None = None,
) -> Allocation:
    """Widths that remove a share of the model's cost at the least loss.

    Args:
        share: part of the whole model's cost to remove.
        what: "macs", "params" or "latency".
        progress: called with (measurements done, measurements in all).

    Raises:
        PlanError: the groups cannot give that much.
    """
    curves = {group.id: curve for group in groups if (curve := selector.curve(group)) is not None}
    known = [group for group in groups if group.id in curves]
    kinds = list(dict.fromkeys(group.kind for group in known))
    knobs = [*kinds[1:], *([DEPTH] if len(known) > len(kinds) else [])]
    total = len(known) + 1 + 2 * len(_STEPS) * len(knobs)
    done = 0

    def measured(counts: Mapping[str, int], samples: int | None = None) -> float:
        nonlocal done
        value = loss(selector.entries(counts), samples)
        done += 1
        if progress is not None:
            progress(done, total)
        return value

    scale, sensitivity = {}, {}
    for group in known:
        kept = _probed(curves[group.id])
        sensitivity[group.id] = measured({group.id: kept}, ALONE)
        scale[group.id] = sensitivity[group.id] / max(float(curves[group.id][kept]), np.finfo(np.float64).tiny)

    depth = _depths(known)

    def solved(balance: Mapping[str, float]) -> dict[str, int]:
        factors = {name: scale[name] * balance[DEPTH] ** depth[name] for name in scale}
        items = [
            _item(group, curves[group.id] * factors[group.id] * balance[group.kind], cost, what, multiple)
            for group in known
        ]
        return knapsack(items, cost, what, share)

    balance = {**dict.fromkeys(kinds, 1.0), DEPTH: 1.0}
    best = solved(balance)
    start = value = measured(best)
    for step in _STEPS:
        for knob in knobs:
            for factor in (step, 1 / step):
                trial = {**balance, knob: balance[knob] * factor}
                counts = solved(trial)
                now = measured(counts) if counts != best else value
                if now < value:
                    balance, best, value = trial, counts, now
                    break
    return Allocation(best, sensitivity, balance, value, start)


def _depths(groups: Sequence[Group]) -> dict[str, float]:
    """Where each group lies among those of its kind, −1 for the first to 1 for the last."""
    found = {}
    for kind in {group.kind for group in groups}:
        mine = [group.id for group in groups if group.kind == kind]
        found.update({name: 2 * index / max(len(mine) - 1, 1) - 1 for index, name in enumerate(mine)})
    return found


def _probed(curve: np.ndarray) -> int:
    """The width at which a group is measured: without `REMOVED` of its neurons, or less where that still loses nothing.

    A loss that is only round-off says nothing about what comes below it.
    """
    kept = max(1, round((len(curve) - 1) * (1 - REMOVED)))
    while kept > 1 and curve[kept] < NOTHING * curve[1]:
        kept -= 1
    return kept


def _item(group: Group, losses: np.ndarray, cost: CostModel, what: str, multiple: int) -> _Item:
    widths = np.unique(np.append(np.arange(min(multiple, group.size), group.size + 1, multiple), group.size))
    return _Item(group, widths, losses[widths], cost.at_widths(what, group.atom, widths))


def knapsack(items: Sequence[_Item], cost: CostModel, what: str, share: float) -> dict[str, int]:
    """Widths of least loss at a cost, by Lagrange multiplier and single steps for the rest.

    Raises:
        PlanError: even the smallest widths cost too much.
    """
    total = cost.total(what)
    budget = total * (1 - share)

    def chosen(price: float) -> list[int]:
        # of equally good widths the largest: what costs nothing to remove still goes only as far as was asked
        return [len(item.costs) - 1 - int(np.argmin((item.losses + price * item.costs)[::-1])) for item in items]

    def spent(picks: Sequence[int]) -> float:
        sizes = {item.group.atom: int(item.widths[pick]) for item, pick in zip(items, picks, strict=True)}
        return cost.total(what, sizes)

    least = spent([0] * len(items))
    if least > budget * (1 + 1e-9):
        raise too_much(what, 1 - least / total, share)
    low, high = 0.0, 1.0
    while spent(chosen(high)) > budget:
        high *= 4
        if high > 1e30:
            break
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if spent(chosen(middle)) > budget else (low, middle)
    picks = chosen(low)
    _step_down(items, picks, spent, budget, 0.9 * TOLERANCE * share * total)
    return {item.group.id: int(item.widths[pick]) for item, pick in zip(items, picks, strict=True)}


def _step_down(
    items: Sequence[_Item], picks: list[int], spent: Callable[[Sequence[int]], float], budget: float, slack: float
) -> None:
    """From just above the budget, take the cheapest single steps that do not miss it by more than the slack.

    A step goes to the next width that costs less, past those that cost the same. A dearer one goes first where it is
    finer. If every step is too coarse, the cheapest that comes closer is taken, or none. What a step saves is measured
    on the whole model: where one group reads another it depends on both widths.
    """
    now = spent(picks)
    while now > budget:
        steps = [
            int(np.searchsorted(item.costs, item.costs[pick])) - 1 for item, pick in zip(items, picks, strict=True)
        ]
        rates = [
            (item.losses[step] - item.losses[pick]) / (item.costs[pick] - item.costs[step]) if step >= 0 else np.inf
            for item, pick, step in zip(items, picks, steps, strict=True)
        ]
        coarse: list[tuple[float, int]] = []
        for best in np.argsort(rates, kind="stable").tolist():
            if not np.isfinite(rates[best]):
                continue
            missed = budget - spent([steps[best] if index == best else pick for index, pick in enumerate(picks)])
            if missed <= min(slack, now - budget):
                break
            coarse.append((missed, best))
        else:
            closer = [step for step in coarse if step[0] <= now - budget]
            if not closer:
                return
            missed, best = closer[0]
        picks[best] = steps[best]
        now = budget - missed
