"""The results of `bench_fidelity` in a JSON file that grows row by row, and as a table.

A file holds runs. A run is what one model, one set of data, one set of settings and one state of the code gave, and its
cells are reused only by a run for which all of these are the same. A run with anything else is added beside it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Cell:
    """One method at one cut.

    Attributes:
        row: definition of the cut, see `Row.definition`.
        result: `Evaluation.to_dict()` of the cut model.
        macs: share of the dense model's MACs that are gone.
        seconds: to choose, refit, cut and prove.
    """

    row: dict[str, Any]
    method: str
    result: dict[str, Any]
    macs: float
    seconds: float


@dataclass
class Run:
    """Cells that were measured alike.

    Attributes:
        settings: what they depend on besides their cut and method.
        dense: `Evaluation.to_dict()` of the model itself; empty before the first row is measured.
    """

    settings: dict[str, Any]
    dense: dict[str, Any] = field(default_factory=dict)
    cells: list[Cell] = field(default_factory=list)

    def find(self, row: dict[str, Any], method: str) -> Cell | None:
        """The cell of a method at a cut, if it was measured."""
        return next((cell for cell in self.cells if (cell.row, cell.method) == (row, method)), None)

    def sort(self, titles: Sequence[str]) -> None:
        """Put the cells in the order of their rows' titles, whenever they were measured; unknown ones last."""
        places = {title: place for place, title in enumerate(titles)}
        self.cells.sort(key=lambda cell: places.get(cell.row["title"], len(places)))


class Results:
    """The runs in a file; without a path they are only kept in memory."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self.runs: list[Run] = []
        if path is not None and path.exists():
            held = json.loads(path.read_text())["runs"]
            self.runs = [Run(run["settings"], run["dense"], [Cell(**cell) for cell in run["cells"]]) for run in held]

    def run(self, settings: dict[str, Any]) -> Run:
        """The run with these settings: from the file, or a new one."""
        known = json.loads(json.dumps(settings))
        found = next((run for run in self.runs if run.settings == known), None)
        if found is None:
            found = Run(known)
            self.runs.append(found)
        return found

    def save(self) -> None:
        """Write the file, whole or not at all."""
        if self._path is None:
            return
        text = json.dumps({"runs": [asdict(run) for run in self.runs if run.cells]}, indent=1)
        part = self._path.with_name(self._path.name + ".part")
        part.write_text(text + "\n")
        os.replace(part, self._path)


def table(run: Run, methods: Sequence[str]) -> str:
    """A run as markdown: top-1 and, in brackets, points lost; methods that were not measured at all have no column."""
    measured = [method for method in methods if any(cell.method == method for cell in run.cells)]
    dense = run.dense["top1"]
    lines = [
        f"top-1 (points lost) on {run.dense['count']} images; dense {dense:.2f} %; "
        f"{run.settings['samples']} calibration images",
        "",
        f"| cut | {' | '.join(measured)} |",
        "|---|" + "---|" * len(measured),
    ]
    by_row: dict[str, list[Cell]] = {}
    for cell in run.cells:  # by definition: a title may have meant another cut before
        by_row.setdefault(json.dumps(cell.row, sort_keys=True), []).append(cell)
    for cells in by_row.values():
        tops = {cell.method: cell.result["top1"] for cell in cells}
        entries = [f"{tops[one]:.2f} ({dense - tops[one]:.2f})" if one in tops else "–" for one in measured]
        lines.append(f"| {cells[0].row['title']} | {' | '.join(entries)} |")
    return "\n".join(lines)


def digest_of_data(path: Path | None) -> str:
    """What data is known by: a file's content, a folder's names and sizes, or that it was generated."""
    if path is None:
        return "generated"
    digest = hashlib.sha256()
    if path.is_file():
        with path.open("rb") as content:
            while chunk := content.read(1 << 20):
                digest.update(chunk)
        return digest.hexdigest()
    for file in sorted(one for one in path.rglob("*") if one.is_file()):
        digest.update(f"{file.relative_to(path)} {file.stat().st_size}\n".encode())
    return digest.hexdigest()


def digest_of_sources(files: Iterable[Path]) -> str:
    """What a state of the code is known by: the names and contents of its files."""
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()
