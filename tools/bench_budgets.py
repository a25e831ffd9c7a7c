"""The budgets of the paper: multiply-accumulates, parameters and latency of the published layer-wise ratios.

Measured, for every published set of ratios on a model of that shape (random weights): MACs and parameters before and
after, next to the paper's numbers; then the latency of the dense and the pruned model in onnxruntime, batch 1, in
alternation (see `onnxsnp.evaluation.latency`), and the speed-up next to what the MACs promise and what the paper
measured on a Raspberry Pi. *Range* is between the quartiles of the ratios within the rounds.

Neither cost nor latency depends on the values of the weights, so the neurons are chosen by length (l2), nothing is
refitted, and a few generated images are enough for the proof of each cut. Close other programs before timing.

Run: python tools/bench_budgets.py --ratios snp_ratios.json [--models deit_tiny,deit_base] [--threads 4]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from make_deit import make_deit, save_whole
from rich.console import Console
from rich.progress import Progress

from onnxsnp import OnnxSnpError, prune
from onnxsnp.evaluation.latency import bench_models

SHAPES = {"deit_tiny": "deit_tiny", "deit_small": "deit_small", "deit_small_1.3G": "deit_small",
          "deit_base": "deit_base"}
PAPER_SPEEDUP = {"deit_tiny": 1.70, "deit_small": 2.01, "deit_small_1.3G": 2.94, "deit_base": 2.44}  # Raspberry Pi
SAMPLES = 10  # generated; one is enough to prove a cut, the rest is held back
MILLION, BILLION = 1e6, 1e9


@dataclass(frozen=True)
class Budget:
    """One published set of ratios.

    Attributes:
        params, gmacs, dense_params, dense_gmacs: measured, parameters in millions.
        paper_params, paper_gmacs: what the paper states.
        dense_ms, pruned_ms: median latency.
        speedup, low, high: dense / pruned within the rounds, median and quartiles; None when not timed.
    """

    entry: str
    dense_params: float
    dense_gmacs: float
    params: float
    gmacs: float
    paper_params: float
    paper_gmacs: float
    dense_ms: float | None = None
    pruned_ms: float | None = None
    speedup: float | None = None
    low: float | None = None
    high: float | None = None


def measure(entry: str, args: argparse.Namespace, folder: Path, progress: Progress) -> Budget:
    """Build, prune, count and time one entry."""
    dense, pruned = folder / "dense.onnx", folder / "pruned.onnx"
    task = progress.add_task(f"{entry}: pruning", total=None)
    save_whole(make_deit(SHAPES[entry]), dense)
    record = prune(dense, output=pruned, allocation=f"{args.ratios}:{entry}", criterion="l2", compensation="none",
                   samples=SAMPLES, threads=args.threads, latency=False).record
    expected = expectations(args.ratios)[entry]
    counts = (record["before"]["params"] / MILLION, record["before"]["macs"] / BILLION,
              record["after"]["params"] / MILLION, record["after"]["macs"] / BILLION)
    budget = Budget(entry, *counts, expected["params_millions"], expected["gmacs"])
    if args.no_latency:
        progress.update(task, total=1, completed=1)
        return budget
    progress.update(task, description=f"{entry}: timing", total=args.runs + args.warmup)
    before, after = bench_models([dense, pruned], batch=1, runs=args.runs, warmup=args.warmup, threads=args.threads,
                                 progress=lambda done, total: progress.update(task, completed=done))
    return Budget(entry, *counts, expected["params_millions"], expected["gmacs"], before.median, after.median,
                  after.speedup, *after.speedup_interval)


def expectations(ratios: Path) -> dict[str, dict[str, float]]:
    """The paper's parameters and MACs by entry."""
    models = json.loads(ratios.read_text())["models"]
    return {name: models[name]["expected"] for name in SHAPES if name in models}


def cost_table(budgets: list[Budget]) -> str:
    """Parameters and MACs next to the paper's."""
    lines = ["cost             M parameters                                   GMACs",
             f"{'entry':16} {'dense':>8} {'pruned':>8} {'paper':>8} {'off by':>8}     "
             f"{'dense':>8} {'pruned':>8} {'paper':>8} {'off by':>8}"]
    for one in budgets:
        lines.append(
            f"{one.entry:16} {one.dense_params:8.3f} {one.params:8.3f} {one.paper_params:8.2f} "
            f"{off(one.params, one.paper_params):>8}     "
            f"{one.dense_gmacs:8.3f} {one.gmacs:8.3f} {one.paper_gmacs:8.2f} {off(one.gmacs, one.paper_gmacs):>8}")
    return "\n".join(lines)


def off(value: float, reference: float) -> str:
    """Deviation in percent."""
    return f"{100 * (value / reference - 1):+.2f} %"


def latency_table(budgets: list[Budget], args: argparse.Namespace) -> str:
    """Latency of both, and three ratios."""
    threads = args.threads or "onnxruntime's choice of"
    lines = [f"latency, batch 1, {threads} threads, {args.runs} rounds",
             f"{'entry':16} {'dense ms':>9} {'pruned ms':>10} {'speed-up':>9} {'range':>15} {'MAC ratio':>10} "
             f"{'of it':>7} {'paper, Pi':>10}"]
    for one in budgets:
        if one.speedup is None:
            continue
        promised = one.dense_gmacs / one.gmacs
        between = f"{one.low:.2f} .. {one.high:.2f}"
        lines.append(f"{one.entry:16} {one.dense_ms:9.2f} {one.pruned_ms:10.2f} {one.speedup:9.2f} {between:>15} "
                     f"{promised:10.2f} {100 * one.speedup / promised:5.0f} % {PAPER_SPEEDUP[one.entry]:10.2f}")
    return "\n".join(lines)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ratios", type=Path, required=True, help="file with the published ratios")
    parser.add_argument("--models", default=",".join(SHAPES), help=f"comma-separated, of {', '.join(SHAPES)} (all)")
    parser.add_argument("--threads", type=int, help="inside one operator (default: what onnxruntime chooses)")
    parser.add_argument("--runs", type=int, default=50, help="timed rounds (50)")
    parser.add_argument("--warmup", type=int, default=10, help="rounds before them (10)")
    parser.add_argument("--no-latency", action="store_true", help="count only")
    parser.add_argument("--out", type=Path, help="also write everything as JSON")
    args = parser.parse_args(arguments)
    args.models = args.models.split(",")
    unknown = [name for name in args.models if name not in SHAPES]
    if unknown:
        parser.error(f"unknown model '{unknown[0]}', choose from {', '.join(SHAPES)}")
    if not args.ratios.is_file():
        parser.error(f"no such file: {args.ratios}")
    missing = [name for name in args.models if name not in expectations(args.ratios)]
    if missing:
        parser.error(f"{args.ratios} has no entry '{missing[0]}'")
    return args


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    args = parse(arguments)
    budgets = []
    try:
        with tempfile.TemporaryDirectory(prefix="bench_budgets.") as folder, \
                Progress(console=Console(stderr=True)) as progress:
            for entry in args.models:
                budgets.append(measure(entry, args, Path(folder), progress))
    except OnnxSnpError as error:
        print(f"bench_budgets: {error}", file=sys.stderr)
        return 1
    print(cost_table(budgets))
    if not args.no_latency:
        print("", latency_table(budgets, args), sep="\n")
    if args.out is not None:
        args.out.write_text(json.dumps([{**asdict(one), "paper_speedup": PAPER_SPEEDUP[one.entry]} for one in budgets],
                                       indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
