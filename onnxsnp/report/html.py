"""One self-contained page about one or more runs, made from their records.

A record is data from a stranger, and so are the names in it: everything goes through jinja2 with autoescape on; only
the drawings of `charts` are marked as safe, and these escape their own texts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from onnxsnp._version import __version__
from onnxsnp.report import network
from onnxsnp.report.attention import pictures
from onnxsnp.report.charts import KINDS, Plotter
from onnxsnp.report.comparison import compared
from onnxsnp.report.extra import ReportError, needed
from onnxsnp.report.summary import rows, sentences
from onnxsnp.report.terminal import count
from onnxsnp.writing import write_record

_WHOLE = 6  # runs that are shown whole; of more, those on the Pareto front
_PANELS = 36  # of one kind of plot; deeper networks show an even selection
_UNREADABLE = (KeyError, TypeError, ValueError, AttributeError, IndexError, ZeroDivisionError, OverflowError)


def read_records(paths: Sequence[str | Path]) -> list[dict[str, Any]]:
    """Run records (`*.pruned.json`) and engine records (`*.engine.json`) from files; those of a sweep by `sweep.json`.

    Raises:
        ReportError: a file cannot be read, or is neither.
    """
    found: dict[Path, dict[str, Any]] = {}
    waiting, sweeps = [Path(path) for path in paths], set[Path]()
    while waiting:
        path = waiting.pop(0)
        try:
            data = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_number)
        except (OSError, ValueError, RecursionError) as error:
            why = error.strerror if isinstance(error, OSError) else "it is not JSON"
            raise ReportError(f"cannot read {path}: {why}", hint="give the .json that prune wrote") from error
        if isinstance(data, dict) and is_sweep(data):
            if path.resolve() not in sweeps:
                names = [Path(str(row["name"])).name for row in data["rows"] if not row["error"]]
                waiting[:0] = [path.with_name(f"{name}.json") for name in names]
            sweeps.add(path.resolve())
            continue
        if not isinstance(data, dict) or not (is_run(data) or is_engine(data)):
            raise ReportError(
                f"{path} is no run record of onnxsnp prune, and no engine record",
                hint="give the .json that prune wrote",
            )
        found[path.resolve()] = {**data, "_file": str(path)}
    return list(found.values())


def is_sweep(data: Mapping[str, Any]) -> bool:
    """Whether this is the `sweep.json` of a sweep, whose runs lie beside it."""
    rows = data.get("rows")
    named = isinstance(rows, list) and all(isinstance(row, dict) and {"name", "error"} <= row.keys() for row in rows)
    return named and "verdict" in data


def is_run(data: Mapping[str, Any]) -> bool:
    """Whether this is what `prune` writes."""
    sides = [data.get("before"), data.get("after")]
    sized = all(isinstance(side, dict) and {"params", "macs", "bytes"} <= side.keys() for side in sides)
    return sized and isinstance(data.get("groups"), list) and isinstance(data.get("settings"), dict)


def is_engine(data: Mapping[str, Any]) -> bool:
    """Whether this is what `engine` writes."""
    return isinstance(data.get("target"), dict) and "backend" in data and "latency" in data and "precision" in data


def page(records: Sequence[Mapping[str, Any]]) -> str:
    """The page as text.

    Args:
        records: as `prune` and `engine` make them, at least one of `prune`.

    Raises:
        ReportError: a library is missing, there is no run, or a record holds what cannot be shown.
    """
    plotter, markup = Plotter(), needed("markupsafe")
    runs = [record for record in records if is_run(record)]
    if not runs:
        raise ReportError("no run record was given", hint="give the .json that onnxsnp prune wrote")
    names = _names(runs)
    shown = []
    try:
        beside = compared(runs, names, plotter, markup.Markup) if len(runs) > 1 else None
    except _UNREADABLE as error:
        raise ReportError(f"the runs cannot be compared: {type(error).__name__} {error}") from error
    whole = set(range(len(runs))) if beside is None or len(runs) <= _WHOLE else set(beside["front"][:_WHOLE])
    for record, name in [pair for index, pair in enumerate(zip(runs, names, strict=True)) if index in whole]:
        try:
            shown.append(_run(record, name, plotter, markup.Markup))
        except _UNREADABLE as error:
            where = record.get("_file") or name
            raise ReportError(
                f"{where} holds something that no run record does: {type(error).__name__} {error}",
                hint="prune again with this version",
            ) from error
    try:
        engines = [_engine(record) for record in records if is_engine(record)]
        text = template("report.html.j2").render(runs=shown, engines=engines, compared=beside, version=__version__)
    except (*_UNREADABLE, needed("jinja2").TemplateError) as error:
        raise ReportError(
            f"a record holds something that cannot be shown: {error}", hint="prune again with this version"
        ) from error
    return str(text)


def write_page(records: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """Write the page of these records, whole or not at all.

    Raises:
        ReportError: see `page`.
    """
    write_record(page(records), path)


def template(name: str) -> Any:
    """A template of this package; undefined names are errors, and everything is escaped."""
    jinja2 = needed("jinja2")
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("onnxsnp.report", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"count": count, "percent": lambda value: f"{value:.1%}"}
    return environment.get_template(name)


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is not a number")


def _names(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Short names that tell the runs apart."""
    full = [str(run.get("output") or run.get("_file") or run.get("input") or "run") for run in runs]
    short = [Path(name).name.removesuffix(".onnx").removesuffix(".json") for name in full]
    return [name if short.count(name) == 1 else full[index] for index, name in enumerate(short)]


def _run(record: Mapping[str, Any], name: str, plotter: Plotter, safe: Any) -> dict[str, Any]:
    """Everything the template shows of one run."""
    details = record.get("details") or {}
    curves = [one for one in record["groups"] if "curve" in details.get(one["id"], {})]
    scored = [one for one in record["groups"] if "scores" in details.get(one["id"], {})]
    kinds = {one["id"]: one["kind"] for one in record["groups"]}
    alone = (record.get("allocation") or {}).get("sensitivity") or {}
    losses = {one: (kinds.get(one, one.partition(".")[0]), float(loss)) for one, loss in alone.items() if loss >= 0}
    return {
        "name": name,
        "source": str(record.get("input") or "a model in memory"),
        "output": record.get("output"),
        "inputs": record.get("inputs") or {},
        "said": sentences(record),
        "rows": rows(record),
        "network": network.network(record),
        "curves": _by_kind(curves, lambda one: safe(plotter.curve(one, details[one["id"]]["curve"]))),
        "scores": _by_kind(scored, lambda one: safe(plotter.scores(one, details[one["id"]]["scores"]))),
        "sensitivity": safe(plotter.sensitivity(losses)) if losses else None,
        "skipped": network.skipped(record),
        "knows_skipped": "left_alone" in record,
        "attention": pictures(record.get("attention")),
        "steps": record.get("steps") or [],
        "recovery": _recovery(record.get("recovery"), plotter, safe),
        "notes": record.get("notes") or [],
        "verification": record.get("verification"),
        "target": record.get("target"),
        "settings": {key: value for key, value in record["settings"].items() if value is not None},
        "seconds": record.get("seconds") or {},
        "unreadable": record.get("skipped") or 0,
        "machine": (record.get("latency") or {}).get("machine"),
        "groups": record["groups"],
    }


def _by_kind(groups: Sequence[Mapping[str, Any]], draw: Any) -> list[dict[str, Any]]:
    """Panels of each kind, an even selection where there are many."""
    found = []
    for kind, label in KINDS.items():
        mine = [group for group in groups if group["kind"] == kind]
        every = math.ceil(len(mine) / _PANELS) if mine else 1
        if mine:
            found.append({"label": label, "panels": [draw(one) for one in mine[::every]], "every": every})
    return found


def _recovery(found: Mapping[str, Any] | None, plotter: Plotter, safe: Any) -> dict[str, Any] | None:
    """What a recovery did: its curves, and before and after on the samples held back."""
    if not found:
        return None
    points = found["curve"]
    curves = {
        "training": [(point["step"], point["training"]) for point in points if point["training"] is not None],
        "samples held back": [(point["step"], point["held"]["loss"]) for point in points],
    }
    sides = found["before"], found["after"]
    rows = [("loss", *(f"{side['loss']:.4g}" for side in sides))]
    if all(side.get("agreement") is not None for side in sides):
        rows.append(("same top-1 as the original", *(f"{side['agreement']:.1f} %" for side in sides)))
    drawn = plotter.lines({name: line for name, line in curves.items() if line}, "step", "loss", found["best_step"])
    return {"rows": rows, "plot": safe(drawn), "notes": found["notes"], "data": found["data"], "steps": found["steps"]}


def _engine(record: Mapping[str, Any]) -> dict[str, Any]:
    target, latency = record["target"], record.get("latency") or {}
    sides = [one for one in ("before", "after") if isinstance(latency.get(one), dict)]
    return {
        "target": str(target.get("name", "?")),
        "precision": record["precision"],
        "backend": record["backend"],
        "output": record.get("output"),
        "columns": sides,
        "rows": [
            (name, [f"{latency[one][name]:.2f} ms" for one in sides])
            for name in ("median", "p90", "p99")
            if sides and all(isinstance(latency[one].get(name), int | float) for one in sides)
        ],
        "notes": record.get("notes") or [],
    }
