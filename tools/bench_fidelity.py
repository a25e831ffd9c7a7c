"""Accuracy left at a budget, per method, without any training: one table for one model.

Rows are cuts (query-key, value and FFN alone, and all three together at shares of the model's MACs); columns are the
compensations: none (the paper's cut), refit, full with one ratio for all groups, and full with automatic allocation.
One calibration pass serves every cell, and one pass over the labelled data evaluates all models, so that differences
are paired. Every cut model is proved against the masked original before it counts.

    python tools/bench_fidelity.py --model deit_tiny.onnx --calibration calibration.zip --data val.zip
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from onnxsnp.analysis import Analysis, analyse_model
from onnxsnp.calibration.data import Batch
from onnxsnp.calibration.statistics import Statistics, collect
from onnxsnp.evaluation.accuracy import Evaluation, evaluate_models
from onnxsnp.evaluation.verify import prove
from onnxsnp.graph.normalize import as_graph
from onnxsnp.planning.allocation import to_cost, uniform
from onnxsnp.planning.automatic import allocate
from onnxsnp.planning.curves import Loss
from onnxsnp.planning.plan import Plan
from onnxsnp.planning.selection import Selector
from onnxsnp.reconstruction.full import Reconstruction
from onnxsnp.reconstruction.refit import refittable
from onnxsnp.surgery.apply import apply
from onnxsnp.verbs import open_for

SINGLE = (("qk", 0.5), ("qk", 0.7), ("v", 0.5), ("ffn", 0.5))
SHARES = (0.30, 0.41, 0.50)
KINDS = ("qk", "v", "ffn")
METHODS = ("none", "refit", "full, one ratio", "full, auto")


@dataclass
class Bench:
    """Everything the cells of the table share."""

    analysis: Analysis
    statistics: Statistics
    unseen: list[Batch]

    def reconstruction(self, method: str) -> Reconstruction:
        return Reconstruction(self.analysis, self.statistics, method.split(",")[0])

    def selector(self, method: str, reconstruction: Reconstruction) -> Selector:
        surgeon = method.startswith("full")
        return Selector(self.analysis, self.statistics, reconstruction, "snp", surgeon=surgeon)


def measure(analysis: Analysis, data: Iterator[Batch]) -> Statistics:
    """One pass that measures what every method needs."""
    groups = [group for group in analysis.structure.groups if group.kind in KINDS]
    pairs = [group for group in groups if group.kind == "qk"]
    tensors = sorted({linear.data for group in groups for linear in refittable(group, analysis.linears)})
    sites = analysis.structure.sites
    deps, gains = analysis.dependencies, tuple(analysis.gains.values())
    return collect(analysis.graph, deps, sites, pairs, tensors, data, pair_groups=pairs, gain_sites=gains)


Row = tuple[str, float] | float


def widths(bench: Bench, row: Row, method: str, selector: Selector, loss: Loss) -> Mapping[str, int]:
    """Kept neurons by group of one cell."""
    groups = [group for group in bench.analysis.structure.groups if group.kind in KINDS]
    if isinstance(row, tuple):
        return uniform([group for group in groups if group.kind == row[0]], row[1])
    if method == "full, auto":
        return allocate(groups, bench.analysis.cost, row, "macs", 1, selector, loss).counts
    return to_cost(groups, bench.analysis.cost, row)


def cell(bench: Bench, row: Row, method: str) -> tuple[object, float]:
    """A session on the cut model of one cell, and the seconds it took to make."""
    start = time.perf_counter()
    reconstruction = bench.reconstruction(method)
    selector = bench.selector(method, reconstruction)
    loss = Loss(bench.analysis, reconstruction, bench.unseen)
    plan = Plan("", selector.entries(widths(bench, row, method, selector, loss)))
    applied = apply(bench.analysis, plan, reconstruction.weights(plan))
    feed = {name: array[:1] for name, array in bench.unseen[0].inputs.items()}
    prove(bench.analysis, applied, [feed])
    return applied.graph.session(), time.perf_counter() - start


def title(row: Row) -> str:
    return f"{row[0]} {row[1]:.0%}" if isinstance(row, tuple) else f"all, {row:.0%} of MACs"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, default=None, help="generated images if not given")
    parser.add_argument("--data", type=Path, required=True, help="labelled images")
    parser.add_argument("--samples", type=int, default=256, help="calibration images (default 256)")
    parser.add_argument("--unseen", type=int, default=16, help="further images for the allocation (default 16)")
    parser.add_argument("--eval-samples", type=int, default=None, help="labelled images (default: all)")
    parser.add_argument("--out", type=Path, default=None, help="write the results as JSON")
    options = parser.parse_args()
    analysis = analyse_model(options.model)
    data = iter(open_for([options.model], options.calibration, samples=options.samples + options.unseen))
    fit = list(itertools.islice(data, options.samples // 8))
    bench = Bench(analysis, measure(analysis, iter(fit)), list(data))
    del fit
    rows: list[Row] = [*SINGLE, *SHARES]
    keys, sessions, seconds = [], [as_graph(analysis.model).session()], []
    for row in rows:
        for method in METHODS:
            if isinstance(row, tuple) and method == "full, auto":
                continue  # one kind at a fixed share leaves nothing to allocate
            session, took = cell(bench, row, method)
            keys.append((title(row), method))
            sessions.append(session)
            seconds.append(took)
            print(f"# {title(row)}, {method}: {took:.1f} s", flush=True)
    labelled = open_for([options.model], options.data, samples=options.eval_samples, evaluation=True)
    results = evaluate_models(sessions, labelled)
    report(options, keys, results)
    if options.out is not None:
        found = {f"{row} | {method}": result.to_dict() for (row, method), result in zip(keys, results[1:], strict=True)}
        options.out.write_text(json.dumps({"dense": results[0].to_dict(), **found}, indent=1))


def report(options: argparse.Namespace, keys: list[tuple[str, str]], results: list[Evaluation]) -> None:
    dense = results[0]
    table = dict(zip(keys, results[1:], strict=True))
    print(
        f"top-1 (points lost) on {dense.count} images; dense {dense.top1:.2f} %; {options.samples} calibration images"
    )
    print(f"| cut | {' | '.join(METHODS)} |")
    print("|---|" + "---|" * len(METHODS))
    for row in dict.fromkeys(key[0] for key in keys):
        cells = []
        for method in METHODS:
            result = table.get((row, method))
            lost = "" if result is None else f"{result.top1:.2f} ({dense.top1 - result.top1:.2f})"
            cells.append(lost or "–")
        print(f"| {row} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
