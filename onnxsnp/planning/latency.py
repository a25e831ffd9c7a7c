"""Measured latency as a cost: what each width of each layer takes, and so what a plan takes.

What was measured is a `LatencyTable`, made here or on another device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from onnxsnp.errors import PlanError
from onnxsnp.evaluation import layers as measuring
from onnxsnp.evaluation.cost import CostModel
from onnxsnp.graph.groups import Group
from onnxsnp.graph.ir import Graph
from onnxsnp.planning.allocation import keep_count
from onnxsnp.planning.latency_table import LatencyTable, LayerTimes, WholeTime, read_table, write_table
from onnxsnp.planning.plan import GroupPlan, Plan
from onnxsnp.planning.ties import step_of
from onnxsnp.surgery.apply import apply

if TYPE_CHECKING:
    from onnxsnp.analysis import Analysis

KINDS = (
    "qk",
    "v",
    "ffn",
    "head",
    "channel",
)  # groups with a layer of their own; the residual stream runs through all of them
SHARES = (1.0, 0.75, 0.5, 0.25)  # of all widths, at which the model is timed as a whole


def measure_table(
    analysis: Analysis,
    groups: Sequence[Group],
    timer: measuring.Timer,
    machine: str,
    *,
    multiple: int = 1,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> LatencyTable:
    """Measure the layers of groups at a grid of widths, each kind of layer once.

    Operators behave a little differently on their own. So the layers are measured side by side, which says how their
    times compare, and the whole model beside narrower versions of itself, which says how much that is. Other programs
    only ever make a run slower: a short one rarely, but then by far, so that for a layer the lower decile counts;
    a long one always, and all models of a round alike, so that for whole models it is the median ratio in the rounds.

    Args:
        groups: kinds in `KINDS`.
        timer: where to measure.
        machine: that place, in words.
        multiple: widths to measure, where possible, are multiples of this.
        seed: of the generated inputs.
        progress: called with (rounds done, rounds in all) of the layers.
    """
    found = measuring.find_layers(analysis, groups)
    distinct = {layer.signature: layer for layer in reversed(found.values())}
    inputs = measuring.sample_inputs(analysis, seed)
    values = measuring.boundary_values(analysis, distinct.values(), inputs)
    samples = measuring.samples_per_run(analysis)
    kept = [
        {one.id: keep_count(one.size, one.size * (1 - share), step_of(one, multiple)) for one in groups}
        for share in SHARES
    ]
    graphs = [analysis.original, *(_narrow(analysis, groups, widths) for widths in kept[1:])]
    rounds = timer([measuring.TimedModel(graph, inputs) for graph in graphs])
    whole = np.median(rounds[:, 0]) * np.median(rounds / rounds[:, :1], axis=0) / samples
    grid = {
        name: tuple(measuring.width_grid(layer.group.size, step_of(layer.group, multiple)))
        for name, layer in distinct.items()
    }
    models = [
        measuring.layer_model(analysis, layer, width, values)
        for name, layer in distinct.items()
        for width in grid[name]
    ]
    times = iter((np.percentile(timer(models, progress), 10, axis=0) / samples).tolist())
    layers = {name: LayerTimes(grid[name], tuple(next(times) for _ in grid[name])) for name in distinct}
    return LatencyTable(
        measuring.model_signature(analysis),
        machine,
        tuple(WholeTime(widths, value) for widths, value in zip(kept, whole.tolist(), strict=True)),
        layers,
    )


def _narrow(analysis: Analysis, groups: Sequence[Group], kept: Mapping[str, int]) -> Graph:
    """The model with only the first neurons of each group."""
    entries = [
        GroupPlan(one.id, one.kind, one.size, one.heads, [list(range(kept[one.id]))] * one.heads) for one in groups
    ]
    return apply(analysis, Plan("", entries)).graph


def table_for(
    analysis: Analysis, groups: Sequence[Group], path: str | Path | None, measure: Callable[[], LatencyTable]
) -> LayerLatency:
    """Latency by a table: from a file, or where there is none yet, measured (and written there if a path is given).

    Raises:
        PlanError: groups that have no layer of their own, or a file that is no table or does not fit.
    """
    other = next((group for group in groups if group.kind not in KINDS), None)
    if other is not None:
        raise PlanError(
            f"the latency of '{other.id}' cannot be measured layer by layer",
            hint=f"with --of latency choose --scope from {', '.join(KINDS)}",
        )
    if path is not None and Path(path).exists():
        return LayerLatency(read_table(path), analysis, groups, str(path))
    table = measure()
    if path is not None:
        write_table(table, path)
    return LayerLatency(table, analysis, groups)


@dataclass(frozen=True)
class _Curve:
    """Milliseconds of one group's layer by width; never less for more neurons."""

    widths: np.ndarray
    ms: np.ndarray

    def saved(self, width: float) -> float:
        return float(self.ms[-1] - np.interp(width, self.widths, self.ms))


class LayerLatency:
    """Latency of a model after any cut: the whole model's, less what its layers save (`CostModel.latency`).

    What layers save in sum becomes what the model saves by the models that were timed as a whole: between these it is
    interpolated. (Taking packed projections apart, for one, costs time that no layer knows of.) Two layers that share a
    product of matrices (one width is read by the next) do not save it twice: of what both save there, the part that the
    other has already saved is added back.

    Args:
        groups: which may be cut.
        where: the table's name in messages.

    Raises:
        PlanError: the table was measured on another model, or without some of the groups.
    """

    def __init__(self, table: LatencyTable, analysis: Analysis, groups: Sequence[Group], where: str = "table") -> None:
        hint = "name another file, to be written, with --latency-table"
        if (
            table.model != measuring.model_signature(analysis)
            or not table.whole[0].kept.keys() <= analysis.groups.keys()
        ):
            raise PlanError(f"{where} holds the times of another model", hint=hint)
        self._curves: dict[int, _Curve] = {}
        measured = [analysis.groups[name] for name in table.whole[0].kept]
        for name, layer in measuring.find_layers(analysis, measured).items():
            times = table.layers.get(layer.signature)
            if times is None or times.widths[-1] != layer.group.size:
                raise PlanError(f"{where} has no times for the layer of '{name}'", hint=hint)
            self._curves[layer.group.atom] = _Curve(np.asarray(times.widths), isotonic(np.asarray(times.ms)))
        missing = [group.id for group in groups if group.atom not in self._curves]
        if missing:
            raise PlanError(f"{where} was measured without '{missing[0]}', which --scope asks for", hint=hint)
        self._shared = _shared_times(analysis.cost, {atom: float(curve.ms[-1]) for atom, curve in self._curves.items()})
        self.machine = table.machine
        self._base = table.whole[0].ms
        self._sums, self._savings = self._calibration(table, analysis)

    def _calibration(self, table: LatencyTable, analysis: Analysis) -> tuple[np.ndarray, np.ndarray]:
        """Savings of the whole model against the sums over layers, both ascending from 0, to where nothing is left."""
        points = [(0.0, 0.0)]
        for one in table.whole[1:]:
            kept = {analysis.groups[name].atom: kept for name, kept in one.kept.items()}
            points.append((self._sum(kept), max(self._base - one.ms, 0.0)))
        points.sort()
        points = points[:1] + [point for before, point in pairwise(points) if point[0] > before[0]]
        sums, savings = np.asarray([point[0] for point in points]), isotonic(np.asarray([point[1] for point in points]))
        most = self._sum({atom: int(curve.widths[0]) for atom, curve in self._curves.items()})
        if most <= sums[-1]:
            return sums, savings
        slope = (savings[-1] - savings[-2]) / (sums[-1] - sums[-2]) if len(points) > 1 else 1.0
        end = min(savings[-1] + slope * (most - sums[-1]), 0.999 * self._base)  # something always stays
        return np.append(sums, most), np.append(savings, max(end, savings[-1]))

    def total(self, sizes: Mapping[int, int]) -> float:
        """Milliseconds per sample after a cut.

        Args:
            sizes: new size of each cut factor.
        """
        return self._base - float(np.interp(self._sum(sizes), self._sums, self._savings))

    def _sum(self, sizes: Mapping[int, int]) -> float:
        """Milliseconds that the layers save."""
        saved = {atom: self._curves[atom].saved(size) for atom, size in sizes.items()}
        twice = sum(
            time * (saved[one] / self._curves[one].ms[-1]) * (saved[other] / self._curves[other].ms[-1])
            for (one, other), time in self._shared.items()
            if one in saved and other in saved
        )
        return float(sum(saved.values()) - twice)

    def at_widths(self, atom: int, widths: np.ndarray) -> np.ndarray:
        """Milliseconds of one group's layer on its own at each width."""
        curve = self._curves[atom]
        return np.interp(widths, curve.widths, curve.ms)


def _shared_times(cost: CostModel, times: Mapping[int, float]) -> dict[tuple[int, int], float]:
    """Milliseconds of the products that belong to the layers of two groups, by their share of the MACs of each."""
    macs = {atom: cost.share("macs", atom) for atom in times}
    shared: dict[tuple[int, int], float] = {}
    for term in cost.macs:
        mine = sorted(times.keys() & set(term.atoms))
        for place, one in enumerate(mine):
            for other in mine[place + 1 :]:
                both = min(times[atom] * term.value / macs[atom] for atom in (one, other))
                shared[(one, other)] = shared.get((one, other), 0.0) + both
    return shared


def isotonic(values: np.ndarray) -> np.ndarray:
    """The nearest non-decreasing sequence in least squares (pool adjacent violators)."""
    blocks: list[tuple[float, int]] = []
    for value in values.tolist():
        blocks.append((value, 1))
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (low, many), (high, more) = blocks.pop(-2), blocks.pop()
            blocks.append(((low * many + high * more) / (many + more), many + more))
    return np.repeat([value for value, _ in blocks], [count for _, count in blocks])
