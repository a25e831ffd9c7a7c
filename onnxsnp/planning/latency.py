"""Measured latency as a cost: what each width of each layer takes, and so what a plan takes.

A `LatencyTable` is plain data. It can be measured here or on another device, saved, and used again for every model of
the same structure.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from onnxsnp.errors import PlanError
from onnxsnp.evaluation import layers as measuring
from onnxsnp.evaluation.cost import CostModel
from onnxsnp.graph.groups import Group
from onnxsnp.graph.ir import Graph
from onnxsnp.model import whole_file
from onnxsnp.planning.allocation import keep_count
from onnxsnp.planning.plan import GroupPlan, Plan
from onnxsnp.surgery.apply import apply

if TYPE_CHECKING:
    from onnxsnp.analysis import Analysis

KINDS = ("qk", "v", "ffn", "channel")  # groups with a layer of their own; the residual stream runs through all of them
SHARES = (1.0, 0.75, 0.5, 0.25)  # of all widths, at which the model is timed as a whole
_VERSION = 1


@dataclass(frozen=True)
class LayerTimes:
    """Measured times of one layer.

    Attributes:
        widths: ascending; the last is the full size.
        ms: milliseconds per sample at each.
    """

    widths: tuple[int, ...]
    ms: tuple[float, ...]


@dataclass(frozen=True)
class WholeTime:
    """Measured time of the whole model at some widths.

    Attributes:
        kept: by group id, every group of the table.
        ms: milliseconds per sample.
    """

    kept: dict[str, int]
    ms: float


@dataclass(frozen=True)
class LatencyTable:
    """What was measured, per sample at batch 1.

    Attributes:
        model: digest of the whole graph (`onnxsnp.evaluation.layers.model_signature`).
        machine: where it was measured, in words.
        whole: the whole model, first at full size, then ever narrower.
        layers: by signature of the layer.
    """

    model: str
    machine: str
    whole: tuple[WholeTime, ...]
    layers: dict[str, LayerTimes] = field(default_factory=dict)

    def to_json(self) -> str:
        """The table as text."""
        return json.dumps({"version": _VERSION, **asdict(self)}, indent=1) + "\n"

    @staticmethod
    def from_json(text: str, where: str = "table") -> LatencyTable:
        """Read a table.

        Raises:
            PlanError: not a table, or written by a version this one does not know.
        """
        try:
            data = json.loads(text)
            if data["version"] != _VERSION:
                raise PlanError(f"{where} has version {data['version']}, this program reads {_VERSION}")
            layers = {str(name): _times(item) for name, item in data["layers"].items()}
            whole = tuple(_whole(item) for item in data["whole"])
            if len(whole) < 2 or len({frozenset(one.kept) for one in whole}) > 1:
                raise ValueError("the whole model needs times at two widths or more, of the same groups")
            return LatencyTable(str(data["model"]), str(data["machine"]), whole, layers)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            why = f"it has no {error}" if isinstance(error, KeyError) else str(error)
            hint = "--latency-table writes one where there is no file yet"
            raise PlanError(f"{where} is not a latency table: {why}", hint=hint) from error


def _times(item: Any) -> LayerTimes:
    widths, times = [_width(value) for value in item["widths"]], [_milliseconds(value) for value in item["ms"]]
    if not widths or widths != sorted({*widths}):
        raise ValueError(f"widths must ascend, not {widths}")
    if len(widths) != len(times):
        raise ValueError(f"{len(widths)} widths, {len(times)} times")
    return LayerTimes(tuple(widths), tuple(times))


def _whole(item: Any) -> WholeTime:
    return WholeTime({str(name): _width(kept) for name, kept in item["kept"].items()}, _milliseconds(item["ms"]))


def _width(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{value!r} is no width")
    return value


def _milliseconds(value: Any) -> float:
    if not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
        raise ValueError(f"{value!r} is no time")
    return float(value)


def read_table(path: str | Path) -> LatencyTable:
    """Read a table from a file.

    Raises:
        PlanError: the file cannot be read or is not a table.
    """
    try:
        text = Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not text"
        raise PlanError(f"cannot read latency table {path}: {why}") from error
    return LatencyTable.from_json(text, str(path))


def write_table(table: LatencyTable, path: str | Path) -> None:
    """Write a table whole or not at all."""
    with whole_file(Path(path)) as part:
        part.write_text(table.to_json())


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
    kept = [{one.id: keep_count(one.size, one.size * (1 - share), multiple) for one in groups} for share in SHARES]
    graphs = [analysis.original, *(_narrow(analysis, groups, widths) for widths in kept[1:])]
    rounds = timer([measuring.TimedModel(graph, inputs) for graph in graphs])
    whole = np.median(rounds[:, 0]) * np.median(rounds / rounds[:, :1], axis=0) / samples
    grid = {name: tuple(measuring.width_grid(layer.group.size, multiple)) for name, layer in distinct.items()}
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
