"""Accuracy left at a cut, per method, without any training: one table for one model.

Rows are cuts (see `fidelity_rows`): query-key, value and FFN alone, all three together at shares of the model's MACs,
and the published budget. Columns are methods: no compensation (the paper's cut), refit, the rules of others (see
`rivals`), and full compensation with one ratio for all groups and with automatic allocation. Where a row leaves the
widths open, every method but the last gets those of the one ratio. A cell is empty where a method does not apply.

One calibration pass serves every cell. The models of a row are evaluated together with the dense one, all rows on the
same labelled images, so that differences are paired. Every cut model is proved against the masked original before it
counts. With --out, results are written after each row, and those in the file are reused where nothing has changed that
they depend on: the model, the data, the settings, the sources of the methods.

    python tools/bench_fidelity.py --model deit_tiny.onnx --calibration calibration.zip --data val.zip --out all.json
    python tools/bench_fidelity.py --out all.json --table
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnxruntime
from fidelity_results import Cell, Results, Run, digest_of_data, digest_of_sources, table
from fidelity_rows import Row, chosen, rows_for
from rivals import RIVALS

import onnxsnp
from onnxsnp.analysis import Analysis, analyse_model
from onnxsnp.calibration.data import Batch
from onnxsnp.calibration.statistics import Statistics, collect
from onnxsnp.errors import DataError, OnnxSnpError
from onnxsnp.evaluation.accuracy import evaluate_models
from onnxsnp.evaluation.verify import prove
from onnxsnp.planning.allocation import to_cost, uniform
from onnxsnp.planning.automatic import allocate
from onnxsnp.planning.curves import Loss
from onnxsnp.planning.plan import GroupPlan, Plan, fingerprint
from onnxsnp.planning.selection import Selector, requirements
from onnxsnp.reconstruction.full import Reconstruction
from onnxsnp.refinement import refine
from onnxsnp.runtime import Session
from onnxsnp.surgery.apply import apply
from onnxsnp.verbs import open_for

ONE_RATIO, AUTO = "full, one ratio", "full, auto"
# one step of full compensation switched off at a time, all at one ratio for every group; the fit of feed-forward
# branches is part of the sequential sweep and goes with it
ABLATIONS = {
    "no sequential refit": frozenset({"sequential"}),
    "no rotation of query and key": frozenset({"pairs"}),
    "no rotation of values": frozenset({"values"}),
    "no optimal brain surgeon": frozenset({"surgeon"}),
    "no rotation of the residual": frozenset({"residuals"}),
}
METHODS = ("none", "refit", *RIVALS, ONE_RATIO, AUTO, *ABLATIONS)


@dataclass
class Bench:
    """Everything the cells of the table share.

    Attributes:
        unseen: further calibration images, for the allocation.
        fit: gives the calibration images once more.
    """

    analysis: Analysis
    statistics: Statistics
    unseen: list[Batch]
    fit: Callable[[], Iterator[Batch]]


def applies(method: str, row: Row) -> bool:
    """Whether a method has an answer of its own to a row."""
    if method in RIVALS:
        return RIVALS[method].covers(row.kinds)
    if method in ABLATIONS:
        touched = {"pairs": "qk", "values": "v", "surgeon": "ffn", "residuals": "residual"}
        return all(touched.get(step, row.kinds[0]) in row.kinds for step in ABLATIONS[method])
    return method != AUTO or row.share is not None  # given widths leave nothing to allocate


def proposal(bench: Bench, row: Row, method: str) -> tuple[list[GroupPlan], Mapping[str, Any]]:
    """What stays of every group, and the weights that make up for the rest."""
    if method in RIVALS:
        return RIVALS[method].propose(bench.analysis, bench.statistics, fixed_widths(bench.analysis, row))
    analysis, off = bench.analysis, ABLATIONS.get(method, frozenset())
    compensation = "full" if method in ABLATIONS else method.split(",")[0]
    reconstruction = Reconstruction(analysis, bench.statistics, compensation)
    for step in off & {"pairs", "values", "residuals"}:
        reconstruction.rotations = replace(reconstruction.rotations, **{step: {}})
    surgeon = compensation == "full" and "surgeon" not in off
    selector = Selector(analysis, bench.statistics, reconstruction, "snp", surgeon=surgeon)
    if compensation != "full":
        entries = selector.entries(fixed_widths(analysis, row))
        return entries, reconstruction.weights(Plan("", entries))
    loss = Loss(analysis, reconstruction, bench.unseen)
    if method == AUTO:
        counts = allocate(row.groups(analysis), analysis.cost, row.share or 0.0, "macs", 1, selector, loss).counts
    else:
        counts = fixed_widths(analysis, row)
    plan = Plan("", selector.entries(counts))
    updates = reconstruction.weights(plan)
    if "sequential" not in off:
        updates = refine(analysis, plan, updates, bench.fit, loss, streams=reconstruction.streams(plan)).updates
    return plan.groups, updates


def fixed_widths(analysis: Analysis, row: Row) -> dict[str, int]:
    """Kept neurons by group, the same for every method that does not allocate."""
    if row.counts is not None:
        return dict(row.counts)
    if row.ratio is not None:
        return uniform(row.groups(analysis), row.ratio)
    return to_cost(row.groups(analysis), analysis.cost, row.share or 0.0)


def cut(bench: Bench, row: Row, method: str) -> tuple[Session, float, float]:
    """A session on the cut and proved model, the share of MACs that are gone, and the seconds it took to make."""
    start = time.perf_counter()
    analysis = bench.analysis
    entries, updates = proposal(bench, row, method)
    applied = apply(analysis, Plan("", entries), updates)
    feed = {name: array[:1] for name, array in bench.unseen[0].inputs.items()}
    prove(analysis, applied, [feed])
    sizes = {analysis.groups[entry.id].atom: entry.kept for entry in entries}
    macs = 1 - analysis.cost.total("macs", sizes) / analysis.cost.total("macs")
    return applied.graph.session(), macs, time.perf_counter() - start


def measure_row(bench: Bench, row: Row, methods: Iterable[str], run: Run, options: argparse.Namespace) -> None:
    """Make and evaluate the cells of a row, beside the dense model, and add them to the run."""
    sessions: list[Session] = [bench.analysis.original.session()]
    facts = []
    for method in methods:
        session, macs, seconds = cut(bench, row, method)
        sessions.append(session)
        facts.append((method, macs, seconds))
        print(f"# {row.title}, {method}: {macs:.1%} of MACs removed, {seconds:.1f} s", flush=True)
    labelled = open_for([options.model], options.data, samples=options.eval_samples, evaluation=True)
    results = [result.to_dict() for result in evaluate_models(sessions, labelled)]
    run.dense = results[0]
    for (method, macs, seconds), result in zip(facts, results[1:], strict=True):
        run.cells.append(Cell(row.definition(), method, result, macs, seconds))


def statistics_for(analysis: Analysis, rows: Iterable[Row], data: Iterator[Batch], samples: int) -> Statistics:
    """One pass over the first samples that measures what every method needs for these rows."""
    kinds = {kind for row in rows for kind in row.kinds}
    groups = [group for group in analysis.structure.groups if group.kind in kinds]
    needed = requirements(analysis, groups, "full", "snp", planned=False)
    return collect(
        analysis.graph,
        analysis.dependencies,
        analysis.structure.sites,
        [group for group in groups if group.kind == "qk"],  # selection needs the scores of all of them
        needed.tensors,
        first(data, samples),
        pair_groups=needed.rotated,
        gain_sites=needed.gained,
        samples=samples,
    )


def first(data: Iterator[Batch], samples: int) -> Iterator[Batch]:
    """Batches until that many samples have come; the rest stays in the iterator."""
    seen = 0
    for batch in data:
        yield batch
        seen += batch.count
        if seen >= samples:
            return


def fill(options: argparse.Namespace, results: Results) -> Run:
    """Measure the cells that are asked for and not known yet."""
    analysis = analyse_model(options.model)
    run = results.run(settings(options, analysis))
    rows = {row.title: row for row in rows_for(analysis)}
    methods = chosen(METHODS, options.methods, "method")
    missing: dict[str, list[str]] = {}
    for title in chosen(rows, options.rows, "row"):
        asked = [method for method in methods if applies(method, rows[title])]
        missing[title] = [method for method in asked if run.find(rows[title].definition(), method) is None]
    todo = [rows[title] for title, wanted in missing.items() if wanted]
    if not todo:
        return run
    source = open_for([options.model], options.calibration, samples=options.samples + options.unseen)
    data = iter(source)
    statistics = statistics_for(analysis, todo, data, options.samples)
    bench = Bench(analysis, statistics, list(data), lambda: first(iter(source), options.samples))
    if not bench.unseen:
        raise DataError(f"there are no calibration images beyond the {options.samples} that methods are fitted to")
    for row in todo:
        measure_row(bench, row, missing[row.title], run, options)
        run.sort(list(rows))
        results.save()
    return run


def settings(options: argparse.Namespace, analysis: Analysis) -> dict[str, Any]:
    """All that every cell depends on."""
    tools = [Path(__file__), Path(__file__).with_name("rivals.py")]
    package = Path(onnxsnp.__file__).parent
    return {
        "model": fingerprint(analysis.model),
        "calibration": digest_of_data(options.calibration),
        "data": digest_of_data(options.data),
        "samples": options.samples,
        "unseen": options.unseen,
        "eval_samples": options.eval_samples,
        "sources": digest_of_sources([*package.rglob("*.py"), *tools]),
        "onnxruntime": onnxruntime.__version__,
    }


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options, from the command line if no arguments are given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=None)
    parser.add_argument("--calibration", type=Path, default=None, help="generated images if not given")
    parser.add_argument("--data", type=Path, default=None, help="labelled images")
    parser.add_argument("--samples", type=int, default=256, help="calibration images (default 256)")
    parser.add_argument("--unseen", type=int, default=32, help="further images for the allocation (default 32)")
    parser.add_argument("--eval-samples", type=int, default=None, help="labelled images (default: all)")
    parser.add_argument("--rows", nargs="+", default=None, help="only rows with one of these in their name")
    parser.add_argument("--methods", nargs="+", default=None, help="only columns with one of these in their name")
    parser.add_argument("--out", type=Path, default=None, help="JSON file that is read, added to and written")
    parser.add_argument("--table", action="store_true", help="measure nothing, print the tables of --out")
    options = parser.parse_args(arguments)
    if options.table and options.out is None:
        parser.error("--table needs --out")
    if not options.table and (options.model is None or options.data is None):
        parser.error("--model and --data are needed to measure")
    return options


def main() -> None:
    options = parse()
    results = Results(options.out)
    try:
        runs = results.runs if options.table else [fill(options, results)]
    except OnnxSnpError as error:
        raise SystemExit(f"{error}") from error
    for run in runs:
        print(table(run, METHODS), end="\n\n")


if __name__ == "__main__":
    main()
