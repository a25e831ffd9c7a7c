"""What is found, cut and left alone in the small exports of tests/exports, as a Markdown table.

For each file: its attention sites; the kinds of groups that can be cut, with how many of how many where not all can;
the largest difference of the outputs between the cut model and the masked original (relative to the largest output,
random keep sets in every group that can be cut, all at once); and the reasons why something is left alone.

Run: python tools/coverage.py [FILE.onnx ...]
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from onnxsnp.analysis import Analysis, analyse_model
from onnxsnp.calibration.data import open_dataset
from onnxsnp.calibration.lengths import settled
from onnxsnp.errors import OnnxSnpError
from onnxsnp.evaluation.verify import difference, masked
from onnxsnp.graph.inputs import graph_inputs
from onnxsnp.planning.plan import GroupPlan, Plan
from onnxsnp.surgery.apply import apply

EXPORTS = Path(__file__).resolve().parent.parent / "tests" / "exports"
KINDS = ("qk", "v", "head", "ffn", "channel", "residual")
_NODES = re.compile(r" \(at [^)]*\)|^[\w.]+: |^the width \d+ of '[^']*': ")  # where a reason names nodes
LEAST = {"residual": 3}  # a layer normalisation over one channel gives nothing but round-off


@dataclass(frozen=True)
class Row:
    """One file.

    Attributes:
        name: of the file; source, exporter: where it comes from.
        sites: attention sites.
        cut, found: groups by kind, those that can be cut and all.
        error: see the module; None where nothing can be cut.
        reasons: why something is left alone, each once.
    """

    name: str
    source: str
    exporter: str
    sites: int
    cut: Counter[str]
    found: Counter[str]
    error: float | None
    reasons: tuple[str, ...]

    def outcome(self) -> tuple[object, ...]:
        """What two exports of one architecture have in common when they are treated alike."""
        return self.sites, tuple(self.cut.items()), tuple(self.found.items()), self.why()

    def kinds(self) -> str:
        """What can be cut."""
        parts = [
            kind if self.cut[kind] == self.found[kind] else f"{kind} {self.cut[kind]}/{self.found[kind]}"
            for kind in KINDS
            if self.cut[kind]
        ]
        return ", ".join(parts) or "–"

    def why(self) -> str:
        """The reasons, without the nodes."""
        plain = (_NODES.sub("", reason) for reason in self.reasons)
        return "; ".join(dict.fromkeys(plain)) or "–"


def measure(path: Path) -> Row:
    """Analyse one file and cut it at random."""
    held = _described(path)
    analysis = analyse_model(path)
    groups = analysis.structure.groups
    reasons = [reason for group in groups for reason in group.reasons]
    reasons += [skipped.reason for skipped in analysis.structure.skipped]
    return Row(
        path.stem,
        str(held.get("source", "")),
        str(held.get("exporter", "")),
        len(analysis.structure.sites),
        Counter(group.kind for group in groups if group.prunable),
        Counter(group.kind for group in groups),
        _error(analysis),
        tuple(dict.fromkeys(reasons)),
    )


def _described(path: Path) -> dict[str, object]:
    """Where a file comes from: its own description, or its entry in the list beside it."""
    own, listed = path.with_suffix(".json"), path.with_name("expected.json")
    if own.is_file():
        return dict(json.loads(own.read_text()))
    return dict(json.loads(listed.read_text()).get(path.name, {})) if listed.is_file() else {}


def _error(analysis: Analysis) -> float | None:
    rng = np.random.default_rng(0)
    entries = []
    for group in analysis.structure.groups:
        if group.prunable:
            least = min(LEAST.get(group.kind, 1), group.size)
            kept = int(rng.integers(least, max(group.size, least + 1)))
            keep = [sorted(rng.permutation(group.size)[:kept].tolist()) for _ in range(group.heads)]
            entries.append(GroupPlan(group.id, group.kind, group.size, group.heads, keep))
    applied = apply(analysis, Plan("", entries))
    if not applied.cuts:
        return None
    original = masked(analysis.normalized.base, analysis.graph, analysis.dependencies, applied.cuts, {})
    session = analysis.original.session(threads=1)
    specs = settled(graph_inputs(analysis.graph), lambda inputs: session.run(None, inputs))
    batch = next(iter(open_dataset(None, specs, samples=2, batch_size=2)))
    return difference(original, applied.graph, [batch.inputs], threads=1)


def table(rows: Sequence[Row]) -> str:
    """Markdown; files of one source that are treated alike share a row."""
    merged: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        merged.setdefault((row.source, *row.outcome()), []).append(row)
    lines = ["| architecture | exporters | sites | cut | error | left alone, and why |", "|---|---|---|---|---|---|"]
    for same in merged.values():
        first = same[0]
        errors = [row.error for row in same if row.error is not None]
        exporters = ", ".join(dict.fromkeys(row.exporter for row in same))
        error = f"{max(errors):.0e}" if errors else "–"
        cells = [first.source, exporters, str(first.sites), first.kinds(), error, first.why()]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path, help="ONNX files (default: all of tests/exports)")
    options = parser.parse_args(arguments)
    files = options.files or sorted(EXPORTS.rglob("*.onnx"))
    rows = []
    for number, path in enumerate(files):
        print(f"{number + 1} of {len(files)}: {path.stem}", file=sys.stderr, flush=True)
        try:
            rows.append(measure(path))
        except OnnxSnpError as error:
            print(f"{path}: {error}", file=sys.stderr)
            return 1
    print(table(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
