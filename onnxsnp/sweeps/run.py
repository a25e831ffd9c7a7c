"""Carry out a sweep: measure once, then plan, cut, prove and write model after model; finished ones are kept."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from onnxsnp import model as model_files
from onnxsnp.analysis import Analysis
from onnxsnp.errors import ModelError, PlanError, VerificationError
from onnxsnp.evaluation.remembered import Memory
from onnxsnp.measured import Measured
from onnxsnp.model import Model, check_output
from onnxsnp.options import Options
from onnxsnp.pruning import Progress, Run
from onnxsnp.sweeps.identity import file_digest, layers_key, run_keys
from onnxsnp.sweeps.points import Point, parse_ratios, points, shared
from onnxsnp.sweeps.rows import Limits, choose, closest, compare, failed_row, new_row, to_csv
from onnxsnp.writing import write_record


@dataclass
class SweepResult:
    """The plans of a sweep.

    Attributes:
        rows: one per plan, as plain data (the rows of `sweep.json` and `sweep.csv`).
        records: the run records of those that were carried out, by name, in the format of `prune`.
        chosen: the row that meets the limits, if limits were given and one does.
        verdict: in words, which plan was chosen and why, or how far the closest one is from the limits.
        summary: what `sweep.json` holds.
    """

    rows: list[dict[str, Any]]
    records: dict[str, dict[str, Any]]
    chosen: dict[str, Any] | None
    verdict: str
    summary: dict[str, Any]


def sweep(
    source: str | Path | Model | Analysis,
    ratios: str | Sequence[float],
    output: str | Path,
    *,
    criterion: str | Sequence[str] = "snp",
    compensation: str | Sequence[str] = "full",
    max_drop: float | None = None,
    target_latency: float | None = None,
    progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
    **options: Any,
) -> SweepResult:
    """Prune one model by many plans, from one pass over the calibration data.

    Args:
        source: a path, a model in memory, or an analysis made before.
        ratios: shares to remove, or text as `0.1:0.8:0.1`.
        output: folder for a model and its record per plan (`snp-full-30.onnx` and `.json`), `sweep.json`, `sweep.csv`,
            and the chosen model as `MODEL.pruned.onnx`. Finished runs there are reused if nothing changed that they
            depend on.
        criterion, compensation: one or several, in a list or separated by commas; every ratio with each of them.
        max_drop: points of top-1 (on `eval_data` with labels; else percent of samples whose top-1 changes) that the
            chosen plan may lose; the cheapest that does not lose more is chosen.
        target_latency: milliseconds that the chosen plan may take; the most accurate that does not take more.
        progress: called as (stage, done, total).
        say: called with a line on each finished run.
        options: other fields of `Options`, the same for all plans.

    Raises:
        OnnxSnpError: bad input, or no plan that can be carried out. Runs that were finished stay.
    """
    for name in ("plan", "host", "latency_table"):
        if options.get(name) is not None:
            raise PlanError(f"a sweep takes no {name.replace('_', ' ')}", hint="use prune")
    if options.get("allocation", "auto") not in ("auto", "uniform"):
        raise PlanError("a ratios file leaves no ratio to sweep over", hint="use --allocation auto or uniform")
    wanted = points(
        parse_ratios(ratios) if isinstance(ratios, str) else list(ratios), _names(criterion), _names(compensation)
    )
    runs = shared(Options(**options), wanted)
    job = _Sweep(source, wanted, runs, Path(output), Limits(max_drop, target_latency))
    return job.run(progress or (lambda stage, done, total: None), say or (lambda line: None))


def _names(names: str | Sequence[str]) -> list[str]:
    return [one.strip() for one in names.split(",")] if isinstance(names, str) else list(names)


class _Sweep:
    """The state of one sweep."""

    def __init__(
        self, source: Any, wanted: Sequence[Point], runs: Sequence[Options], folder: Path, limits: Limits
    ) -> None:
        self.source: Model | Analysis = source if isinstance(source, Analysis) else model_files.load(source)
        self.model = self.source.model if isinstance(self.source, Analysis) else self.source
        self.wanted, self.runs, self.folder, self.limits = wanted, runs, folder, limits
        self.rows: list[dict[str, Any]] = []
        self.records: dict[str, dict[str, Any]] = {}
        self.seconds: dict[str, float] = {}
        self.of = runs[0].of
        self._check_folder()

    def run(self, progress: Progress, say: Callable[[str], None]) -> SweepResult:
        """All runs, then the choice."""
        keys = run_keys(self.model, self.runs)
        todo = [number for number in range(len(keys)) if not self._reuse(number, keys[number])]
        if self.rows:
            say(f"{len(self.rows)} of {len(keys)} runs were finished before and are reused; nothing they need changed")
        if todo:
            self._carry_out(todo, keys, progress, say)
        place = {point.name: number for number, point in enumerate(self.wanted)}
        self.rows.sort(key=lambda row: place[row["name"]])
        if all(row["error"] for row in self.rows):
            raise PlanError(f"none of {len(self.rows)} plans can be carried out: {self.rows[0]['error']}")
        compare(self.rows, self.of)
        chosen = choose(self.rows, self.limits, self.of)
        verdict = self._verdict(chosen)
        self._keep(chosen)
        return SweepResult(self.rows, self.records, chosen, verdict, self._write(verdict))

    def _carry_out(
        self, todo: Sequence[int], keys: Sequence[str | None], progress: Progress, say: Callable[[str], None]
    ) -> None:
        clock = _Clock([self.wanted[number].compensation for number in todo])
        first = Run(replace(self.runs[0], latency_table=self._table()), progress)
        measured = first.measure(self.source, None, self.runs[1:])
        measured.memory = Memory()
        self.seconds = {name: round(value, 3) for name, value in first.seconds.items()}
        for count, number in enumerate(todo):
            point, left = self.wanted[number], clock.left()
            head = f"{count + 1}/{len(todo)} {point.name}" + (f", {left} left" if left else "")
            step = _staged(progress, head)
            start = time.perf_counter()
            self._one(number, keys[number], measured, first.notes, step, last=number == todo[-1])
            clock.finished(time.perf_counter() - start)  # of the run alone: the pass they share is over
            self._write("")
            ends = clock.left()
            say(f"{count + 1}/{len(todo)} {_in_words(self.rows[-1])}" + (f"; {ends} left" if ends else ""))

    def _one(
        self, number: int, key: str | None, measured: Measured, notes: Sequence[str], progress: Progress, *, last: bool
    ) -> None:
        """Carry out one run; a plan that cannot be met, or a cut that proves wrong, becomes a row that says so."""
        point, path = self.wanted[number], self._path(self.wanted[number])
        run = Run(self.runs[number], progress)
        run.notes.extend(notes)
        try:
            record = run.cut(measured, path, dry_run=False, last=last).record
        except (PlanError, VerificationError) as error:
            self.rows.append(failed_row(point, str(error)))
            return
        # written last: whoever finds this entry finds a finished run
        record["sweep"] = {"name": point.name, "key": key, "sha256": file_digest(path)}
        write_record(json.dumps(record, indent=1, allow_nan=False), path.with_suffix(".json"))
        self.records[point.name] = record
        self.rows.append(new_row(point, record, reused=False))

    def _reuse(self, number: int, key: str | None) -> bool:
        """Take over a finished run, if its model is there unchanged and all it depends on is the same."""
        point, path = self.wanted[number], self._path(self.wanted[number])
        record = _read(path.with_suffix(".json"))
        mark = (record or {}).get("sweep")
        if record is None or not isinstance(mark, dict) or key is None or mark.get("key") != key:
            return False
        if not path.is_file() or mark.get("sha256") != file_digest(path):
            return False
        self.records[point.name] = record
        self.rows.append(new_row(point, record, reused=True))
        return True

    def _verdict(self, chosen: Mapping[str, Any] | None) -> str:
        if not self.limits.any:
            return ""
        if chosen is not None:
            why = "the most accurate" if self.limits.latency is not None else "the cheapest"
            return f"{why} plan that meets {self.limits}: {_in_words(chosen)}"
        near = closest(self.rows, self.limits)
        return f"no plan meets {self.limits}; the closest: {_in_words(near) if near else 'none'}"

    def _keep(self, chosen: dict[str, Any] | None) -> None:
        """The chosen model under its own name; what an earlier sweep has chosen goes, so that none is taken for it."""
        path = self.folder / f"{self._stem}.pruned.onnx"
        if chosen is None:
            earlier = _read(path.with_suffix(".json"))
            if earlier is not None and "chosen" in (earlier.get("sweep") or {}):
                for one in (path, path.with_suffix(".json")):
                    one.unlink(missing_ok=True)
            return
        chosen["chosen"] = True
        record = self.records[chosen["name"]]
        loaded = model_files.load(self._path_of(chosen["name"]))
        record = record | {"output": str(path), "sweep": record["sweep"] | {"chosen": str(self.limits)}}
        write_record(json.dumps(record, indent=1, allow_nan=False), path.with_suffix(".json"))
        model_files.save(loaded.proto, path, weights=loaded.weights)

    def _write(self, verdict: str) -> dict[str, Any]:
        """`sweep.json` and `sweep.csv`, of what is finished so far."""
        compare(self.rows, self.of)
        chosen = next((row["name"] for row in self.rows if row["chosen"]), None)
        summary = {
            "input": None if self.model.path is None else str(self.model.path),
            "of": self.of,
            "limits": vars(self.limits),
            "before": next(({**one["before"]} for one in self.records.values()), None),
            "rows": self.rows,
            "chosen": chosen,
            "output": None if chosen is None else str(self.folder / f"{self._stem}.pruned.onnx"),
            "verdict": verdict,
            "finished": len(self.rows) == len(self.wanted),
            "seconds": self.seconds,
        }
        write_record(json.dumps(summary, indent=1, allow_nan=False), self.folder / "sweep.json")
        write_record(to_csv(self.rows), self.folder / "sweep.csv")
        return summary

    def _table(self) -> Path | None:
        """Where the times of layers are kept, so that a sweep that goes on plans by the same ones."""
        if self.of != "latency":
            return None
        return self.folder / f"layers-{layers_key(self.model, self.runs[0])}.json"

    def _check_folder(self) -> None:
        """Make the folder; nothing in it may be what is read.

        Raises:
            ModelError: it is a file, cannot be made, or the model lies where a result would go.
        """
        try:
            self.folder.mkdir(exist_ok=True)
        except FileNotFoundError:
            raise ModelError(f"output folder does not exist: {self.folder.parent}", hint="create it first") from None
        except OSError as error:
            raise ModelError(f"output {self.folder} cannot be a folder: {error.strerror}") from error
        outputs = [*map(self._path, self.wanted), self.folder / f"{self._stem}.pruned.onnx"]
        for path in outputs:
            check_output(self.model, path)
            if self.model.path is not None and path.exists() and path.samefile(self.model.path):
                raise ModelError(f"the output {path} would overwrite the input", hint="give another folder with -o")

    @property
    def _stem(self) -> str:
        return "model" if self.model.path is None else self.model.path.stem

    def _path(self, point: Point) -> Path:
        return self._path_of(point.name)

    def _path_of(self, name: str) -> Path:
        return self.folder / f"{name}.onnx"


class _Clock:
    """How long the runs that are left will take, by those of their kind that are finished.

    Args:
        kinds: what kind each run is, in order.
    """

    def __init__(self, kinds: Sequence[str]) -> None:
        self.kinds = kinds
        self.seconds: list[float] = []

    def finished(self, seconds: float) -> None:
        self.seconds.append(seconds)

    def left(self) -> str:
        """In words; empty before the first run is finished and after the last."""
        done = len(self.seconds)
        if not done or done == len(self.kinds):
            return ""
        seconds = sum(self._expected(kind) for kind in self.kinds[done:])
        return f"about {seconds:.0f} s" if seconds < 90 else f"about {seconds / 60:.0f} min"

    def _expected(self, kind: str) -> float:
        alike = [seconds for seconds, one in zip(self.seconds, self.kinds, strict=False) if one == kind]
        return sum(alike or self.seconds) / len(alike or self.seconds)


def _staged(progress: Progress, head: str) -> Progress:
    return lambda stage, done, total: progress(f"{head}: {stage}", done, total)


def _in_words(row: Mapping[str, Any]) -> str:
    if row["error"]:
        return f"{row['name']}: {row['error']}"
    parts = [f"{row['macs_removed']:.1%} of MACs removed"]
    if row["ms"] is not None:
        parts.append(f"{row['ms']:.2f} ms")
    if row["lost"] is not None:
        parts.append(f"{row['lost']:.2f} {row['lost_is']} lost" if row["top1"] is not None else _changed(row))
    return f"{row['name']}: {', '.join(parts)}"


def _changed(row: Mapping[str, Any]) -> str:
    return f"another top-1 on {row['lost']:.1f} % of {row['agreement_samples']} samples"


def _read(path: Path) -> dict[str, Any] | None:
    """A JSON object; None where there is none that can be read."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None
