"""Automatic allocation: widths that lose least for the cost they save (METHODS 2.6).

Nearly every group has an error curve from the closed forms. Its scale, what such an error means for the model's output,
is measured by cutting the group alone, and steadied by what its neighbours say. Where no closed form applies (pairs
that rotary positions turn, values that are shared), the group is cut alone at a few widths, and its curve goes through
what that loses. The knapsack over these curves is the answer; whole heads and the widths inside them are one item of it
(`sites`). Residual streams are read by everything; how wide they stay is tried out, each time with the knapsack's
answer for the rest.

Refining the knapsack's answer on the joint loss of whole plans was tried and does harm: it lowers the loss of the
one-shot weights, but what is left after the sequential refit grows. Steadying the sensitivities helps both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
from scipy.interpolate import PchipInterpolator

from onnxsnp.errors import PlanError
from onnxsnp.evaluation.cost import CostModel
from onnxsnp.graph.groups import Group
from onnxsnp.planning.allocation import TOLERANCE, too_much
from onnxsnp.planning.curves import Loss
from onnxsnp.planning.selection import Selector
from onnxsnp.planning.sites import Item, inside, site_item
from onnxsnp.planning.ties import Tie, tied

ALONE = 16  # samples on which groups are measured alone; whole plans are measured on all there are
REMOVED = 0.4  # share of its neurons that each group loses when its sensitivity is measured
NOTHING = 3e-5  # share of the error of a single neuron below which a width counts as lossless
_TRUST = 0.5  # of a group's own sensitivity against the trend over the depth of the network
_TREND = 5  # groups of a kind from which on there is a trend
_LEVELS = (0.3, 0.55, 0.8)  # shares that stay when a group without an error curve is measured
_FIRST = 0.08  # of a residual stream: how much narrower it is tried first
WORTH = 0.85  # what a narrower stream must lower the loss to: the sequential refit makes up less for it than for others
_WIDTHS = 6  # widths of a residual stream that are tried at most


@dataclass
class Allocation:
    """Widths, and why.

    Attributes:
        counts: kept neurons by group id.
        sensitivity: by group id, the loss when the group alone loses `REMOVED` of its neurons (or more, see `_probed`).
        loss: joint loss of the plan; start is that of the plan with whole residual streams.
    """

    counts: dict[str, int]
    sensitivity: dict[str, float] = field(default_factory=dict)
    loss: float = float("nan")
    start: float = float("nan")


def allocate(
    groups: Sequence[Group],
    cost: CostModel,
    share: float,
    what: str,
    multiple: int,
    selector: Selector,
    loss: Loss,
    progress: Callable[[int, int], None] | None = None,
    ties: Sequence[Tie] = (),
) -> Allocation:
    """Widths that remove a share of the model's cost at the least loss.

    Args:
        share: part of the whole model's cost to remove.
        what: "macs", "params" or "latency".
        progress: called with (measurements done, measurements in all).
        ties: groups that get their widths together.

    Raises:
        PlanError: the groups cannot give that much.
    """
    search = _Search(groups, cost, share, what, multiple, selector, loss, progress, ties)
    search.measure_alone()
    search.start()
    whole = replace(search.found)
    for stream in search.streams:
        search.narrow(stream)
    if not set(whole.counts) & {stream.id for stream in search.streams} and search.found.loss > WORTH * whole.loss:
        return replace(search.found, counts=whole.counts, loss=whole.loss)
    return search.found


class _Search:
    """The state of an allocation: what was measured of each group, and the best plan so far.

    Attributes:
        known: all groups but streams; the knapsack chooses their widths.
        streams: residual streams. Everything reads them, so their widths are tried out, and what is left of the budget
            is the knapsack's.
        found: the answer so far.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        cost: CostModel,
        share: float,
        what: str,
        multiple: int,
        selector: Selector,
        loss: Loss,
        progress: Callable[[int, int], None] | None,
        ties: Sequence[Tie],
    ) -> None:
        self._cost, self._share, self._what, self._multiple = cost, share, what, multiple
        self._selector, self._loss, self._progress = selector, loss, progress
        self.streams = [group for group in groups if group.kind == "residual"]
        self.known = [group for group in groups if group.kind != "residual"]
        self._ties = ties
        self._curves = selector.curves(self.known)
        self._scale: dict[str, float] = {}
        alone = sum(1 if group.id in self._curves else len(measured_at(group.size)) for group in self.known)
        self._done, self._total = 0, alone + 1 + _WIDTHS * len(self.streams)
        self._streams: dict[str, int] = {}
        self.found = Allocation({})

    def measure_alone(self) -> None:
        """Cut every group alone, and scale its error curve to the loss that this makes.

        The curve of a group for which no closed form gives one is what it loses at a few widths.
        """
        closed = [group for group in self.known if group.id in self._curves]
        for group in closed:
            curve = self._curves[group.id]
            kept = _probed(curve)
            alone = self._measured({group.id: kept}, ALONE)
            self.found.sensitivity[group.id] = alone
            self._scale[group.id] = alone / max(float(curve[kept]), np.finfo(np.float64).tiny)
        for kind in {group.kind for group in closed}:
            names = [group.id for group in closed if group.kind == kind]
            self._scale.update(zip(names, steadied([self._scale[name] for name in names]), strict=True))
        for group in self.known:
            if group.id not in self._curves:
                self._curves[group.id] = self._measured_curve(group)
                self._scale[group.id] = 1.0

    def _measured_curve(self, group: Group) -> np.ndarray:
        """Loss by width of a group that is cut alone, [size + 1]; nan without neurons, since one has to stay."""
        widths = measured_at(group.size)
        losses = [self._measured({group.id: kept}, ALONE) for kept in widths]
        if widths:
            wanted = round(group.size * (1 - REMOVED))
            self.found.sensitivity[group.id] = losses[int(np.argmin([abs(kept - wanted) for kept in widths]))]
        return through(group.size, widths, losses)

    def start(self) -> None:
        """The knapsack's answer, with streams as wide as the budget lets them be."""
        self.found.counts = self._start()
        self.found.start = self.found.loss = self._measured(self.found.counts)

    def _start(self) -> dict[str, int]:
        """The knapsack's answer with whole streams; where that is too little, with streams as wide as can be."""
        failed: PlanError | None = None
        for part in np.arange(0, 1, _FIRST) if self.streams else [0.0]:
            widths = {group.id: _rounded(group.size * (1 - part), self._multiple) for group in self.streams}
            self._streams = {group.id: widths[group.id] for group in self.streams if widths[group.id] < group.size}
            try:
                return self._solved()
            except PlanError as error:
                failed = failed or error
        raise failed or PlanError("nothing can be cut")

    def narrow(self, stream: Group) -> None:
        """Find how much of a residual stream is worth cutting: ever narrower while it helps, then smaller steps."""
        step, tried = _FIRST * stream.size, {self._streams.get(stream.id, stream.size)}
        while len(tried) <= _WIDTHS and step >= self._multiple / 2:
            now = self._streams.get(stream.id, stream.size)
            for width in (now - step, now + step):
                kept = _rounded(width, self._multiple)
                if kept < stream.size and kept not in tried and len(tried) <= _WIDTHS:
                    tried.add(kept)
                    if self._narrower(stream, kept):
                        break
            else:
                step /= 2

    def _narrower(self, stream: Group, kept: int) -> bool:
        held = dict(self._streams)
        self._streams[stream.id] = kept
        try:
            better = self._try(self._solved())
        except PlanError:  # this stream alone saves more than was asked, or the others cannot save the rest
            better = False
        if not better:
            self._streams = held
        return better

    def _try(self, counts: dict[str, int]) -> bool:
        if counts == self.found.counts:
            return False
        loss = self._measured(counts)
        if loss < self.found.loss:
            self.found.counts, self.found.loss = counts, loss
            return True
        return False

    def _solved(self) -> dict[str, int]:
        """The knapsack's widths beside those of the streams.

        Raises:
            PlanError: the groups cannot give what is left to save, or the streams save too much.
        """
        cost, share = self._cost, self._share
        if self._streams:
            cost = cost.given(
                {group.atom: self._streams[group.id] for group in self.streams if group.id in self._streams}
            )
            share = 1 - (1 - share) * self._cost.total(self._what) / cost.total(self._what)
            if share < 0:
                raise PlanError("the residual stream alone saves more than was asked")
        return {**knapsack(self._items(cost), cost, self._what, share), **self._streams}

    def _items(self, cost: CostModel) -> list[Item]:
        """One item per group, or for heads and what lies inside them together."""
        losses = {group.id: self._curves[group.id] * self._scale[group.id] for group in self.known}
        found: list[Item] = []
        taken: set[str] = set()
        for heads in (group for group in self.known if group.kind == "head"):
            members = [group for group in inside(heads, self.known) if group.id not in taken]
            if members:
                choices = tied(members, self._multiple, self._ties)
                curve = partial(self._survivors, heads)
                found.append(site_item(heads, choices, losses[heads.id], curve, cost, self._what))
                taken.update(group.id for group in (heads, *members))
        rest = [group for group in self.known if group.id not in taken]
        return found + [_item(one, losses, cost, self._what) for one in tied(rest, self._multiple, self._ties)]

    def _survivors(self, heads: Group, group: Group, kept: int) -> np.ndarray:
        """Losses of a group by width when only some of the heads it lies in stay."""
        curve = self._selector.curve_of_survivors(group, heads, kept)
        return (self._curves[group.id] * kept / heads.size if curve is None else curve) * self._scale[group.id]

    def _measured(self, counts: Mapping[str, int], samples: int | None = None) -> float:
        value = self._loss(self._selector.entries(counts), samples)
        self._done += 1
        if self._progress is not None:
            self._progress(min(self._done, self._total), self._total)
        return value


def measured_at(size: int) -> list[int]:
    """The widths, in ascending order, at which a group without an error curve is measured."""
    return sorted({max(1, round(size * share)) for share in (0, *_LEVELS)} - {size})


def through(size: int, widths: Sequence[int], losses: Sequence[float]) -> np.ndarray:
    """A curve through measured losses, [size + 1]: no loss at full width, never less at a smaller one.

    Args:
        widths: from 1 on, ascending, all below `size`.
    """
    curve = np.full(size + 1, np.nan)
    known = np.maximum.accumulate([0.0, *losses[::-1]])[::-1]
    if not widths:
        curve[size] = 0.0
        return curve
    curve[1:] = PchipInterpolator([*widths, size], known)(np.arange(1, size + 1))  # monotone between its points
    return curve


def _rounded(width: float, multiple: int) -> int:
    return max(multiple, round(width / multiple) * multiple)


def steadied(scales: Sequence[float]) -> list[float]:
    """Sensitivities of one kind of groups in the order of the network, half way to their trend.

    Measured on a few samples, a sensitivity is off by a factor that the knapsack then exploits. Their trend over the
    depth, a parabola on a logarithmic scale, averages over the groups.
    """
    values = np.asarray(scales, np.float64)
    known = values > 0
    if known.sum() < _TREND:
        return values.tolist()
    depth = np.linspace(-1, 1, len(values))
    trend = np.polyval(np.polyfit(depth[known], np.log(values[known]), 2), depth)
    steady = values.copy()
    steady[known] = np.exp(_TRUST * np.log(values[known]) + (1 - _TRUST) * trend[known])
    return steady.tolist()


def _probed(curve: np.ndarray) -> int:
    """The width at which a group is measured: without `REMOVED` of its neurons, or less where that still loses nothing.

    A loss that is only round-off says nothing about what comes below it.
    """
    kept = max(1, round((len(curve) - 1) * (1 - REMOVED)))
    while kept > 1 and curve[kept] < NOTHING * curve[1]:
        kept -= 1
    return kept


def _item(choice: Tie, losses: Mapping[str, np.ndarray], cost: CostModel, what: str) -> Item:
    """What one group, or several that are tied, offer: costs are those of cutting each alone.

    Args:
        losses: by group id and width, [size + 1].
    """
    pairs = list(zip(choice.groups, choice.widths.T, strict=True))
    lost = np.sum([losses[group.id][widths] for group, widths in pairs], axis=0)
    costs = np.sum([cost.at_widths(what, group.atom, widths) for group, widths in pairs], axis=0)
    return Item(choice.groups, choice.widths, lost, costs)


def knapsack(items: Sequence[Item], cost: CostModel, what: str, share: float) -> dict[str, int]:
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
        return cost.total(what, {group.atom: width for group, width in widths(picks)})

    def widths(picks: Sequence[int]) -> list[tuple[Group, int]]:
        return [one for item, pick in zip(items, picks, strict=True) for one in item.chosen(pick)]

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
    return {group.id: width for group, width in widths(picks)}


def _step_down(
    items: Sequence[Item],
    picks: list[int],
    spent: Callable[[Sequence[int]], float],
    budget: float,
    slack: float,
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
