"""Measured times of a model's layers as plain data: saved, read by a person, and used again on the same structure."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from onnxsnp.atomic import whole_file
from onnxsnp.errors import PlanError

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
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
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
