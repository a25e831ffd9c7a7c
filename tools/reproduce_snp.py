"""The paper's Table 3 and Figure 5: query-key pairs cut by several criteria, accuracy without any fine-tuning.

Measured is the top-1 accuracy of one dense model and of its cuts: in every head the same share of the query-key pairs
goes (10, 30, 50, 70, 90 %), nothing is refitted, and nothing else is touched. Criteria: SNP from 1, 4, 16 and 64
calibration images, the lengths of the filters (l2), their geometric median (gm), chance, and SNP backwards (reverse).

How: one pass over the calibration images gives the scores (eq. 6 sums over images, so the first 1, 4, 16 images of the
same 64 give the shorter sums). Every validation image is decoded once and run through all models, and it is kept which
images each model gets right. So two criteria are compared on the same images: of the images that only one of the two
models gets right, half would go to either by chance (McNemar's test, exact binomial, two-sided). Chance itself counts
with the mean of its seeds in the table, and with its luckiest seed in the comparison.

The paper's values are for all 50,000 validation images. On a subset the dense model has another accuracy; compare the
drops.

Run: python tools/reproduce_snp.py --model deit_tiny.onnx --calibration calibration.zip --data val.zip
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from scipy.stats import binomtest

from onnxsnp import Analysis, OnnxSnpError, Plan, analyse_model
from onnxsnp.calibration.data import Batch, Dataset, open_dataset, resolve_preprocess
from onnxsnp.calibration.preprocess import DEFAULT_IMAGE_SIZE
from onnxsnp.calibration.statistics import collect
from onnxsnp.evaluation.accuracy import label_ranks, wilson_interval
from onnxsnp.graph.groups import Group
from onnxsnp.planning.allocation import uniform
from onnxsnp.planning.plan import GroupPlan, fingerprint, keep_highest
from onnxsnp.runtime import image_spec, input_specs, open_session, run_session
from onnxsnp.scoring.criteria import score
from onnxsnp.scoring.targets import scoring_target
from onnxsnp.surgery.apply import apply, to_model

PAPER_DENSE = 72.20
PAPER_SNP = {10: 70.83, 30: 67.55, 50: 59.50, 70: 42.13, 90: 12.83}  # DeiT-T, 64 images, 50,000 validation images
SIGNIFICANT = 0.05
CALIBRATION_BATCH = 8

Scores = dict[str, np.ndarray]  # by group id, [heads, size]
Tick = Callable[[int], None]


@dataclass(frozen=True)
class Variant:
    """One way to choose the pairs; variants of one column are averaged in the table."""

    column: str
    criterion: str
    images: int
    seed: int = 0


@dataclass(frozen=True)
class Key:
    """One evaluated model."""

    cut: int
    variant: Variant


@dataclass(frozen=True)
class Comparison:
    """SNP against another criterion on the same images.

    Attributes:
        snp_only, other_only: images that only one of the two gets right.
        p: probability of a split at least as uneven by chance.
    """

    cut: int
    other: str
    snp_only: int
    other_only: int
    p: float

    @property
    def verdict(self) -> str:
        if self.p >= SIGNIFICANT:
            return "no difference beyond sampling error"
        return "snp above" if self.snp_only > self.other_only else "SNP BELOW"


def variants(images: Sequence[int], seeds: int) -> list[Variant]:
    """The columns of the table, in order; SNP with all images is the last of its own."""
    most = max(images)
    found = [Variant(f"snp {count}", "snp", count) for count in sorted(images)]
    found += [Variant("l2", "l2", most), Variant("gm", "gm", most)]
    found += [Variant("random", "random", most, seed) for seed in range(seeds)]
    return [*found, Variant("reverse", "reverse", most)]


def query_key_groups(analysis: Analysis) -> list[Group]:
    """The groups that are cut."""
    return [group for group in analysis.structure.groups if group.kind == "qk" and group.prunable]


def joined(samples: Iterator[Batch], count: int) -> Iterator[Batch]:
    """The next `count` single samples as batches."""
    rest = count
    while parts := list(islice(samples, min(rest, CALIBRATION_BATCH))):
        rest -= len(parts)
        names = parts[0].inputs
        yield Batch({name: np.concatenate([part.inputs[name] for part in parts]) for name in names}, None, len(parts))


def measure_scores(analysis: Analysis, data: Dataset, images: Sequence[int], rank: int | None,
                   tick: Tick = lambda done: None) -> dict[int, Scores]:
    """Scores of eq. 4-6 after the first n images of `data` (batches of one), for every n asked for."""
    groups, samples = query_key_groups(analysis), iter(data)
    result: dict[int, Scores] = {}
    total: Scores = {}
    seen = 0
    for count in sorted(images):
        part = collect(analysis.graph, analysis.dependencies, analysis.structure.sites, groups, [],
                       joined(samples, count - seen), rank=rank, progress=lambda done, seen=seen: tick(seen + done))
        total = {name: scores + total.get(name, 0.0) for name, scores in part.qk.items()}
        result[count] = total
        seen += part.samples
    if seen < max(images):
        raise SystemExit(f"only {seen} calibration images, {max(images)} are needed")
    return result


def make_plan(analysis: Analysis, mark: str, variant: Variant, cut: int, scores: Scores) -> Plan:
    """Which pairs stay when `cut` percent of every head go."""
    rng = np.random.default_rng(variant.seed)
    groups = query_key_groups(analysis)
    counts = uniform(groups, cut / 100)
    entries = []
    for group in groups:
        target = scoring_target(analysis.graph, analysis.dependencies, group, analysis.linears, scores[group.id])
        keep = keep_highest(score(variant.criterion, target, rng=rng), counts[group.id])
        entries.append(GroupPlan(group.id, group.kind, group.size, group.heads, keep))
    return Plan(mark, entries)


def open_models(analysis: Analysis, keys: Sequence[Key], scores: dict[int, Scores], tick: Tick) -> list[Any]:
    """A session with one thread for every cut model."""
    sessions = []
    mark = fingerprint(analysis.model)
    for number, key in enumerate(keys):
        plan = make_plan(analysis, mark, key.variant, key.cut, scores[key.variant.images])
        sessions.append(open_session(to_model(apply(analysis, plan).graph).SerializeToString(), threads=1))
        tick(number + 1)
    return sessions


def evaluate(sessions: Sequence[Any], data: Iterable[Batch], workers: int, tick: Tick) -> np.ndarray:
    """Which images each model gets right, bool [models, images]; several models run at a time."""
    rows: list[np.ndarray] = []
    done = 0

    def right(session: Any, batch: Batch) -> np.ndarray:
        logits = run_session(session, batch.inputs)[0][:batch.count]
        return label_ranks(logits, batch.labels[:batch.count]) < 1  # type: ignore[index]

    with ThreadPoolExecutor(workers) as pool:
        for batch in data:
            rows.append(np.stack(list(pool.map(lambda session, batch=batch: right(session, batch), sessions))))
            done += batch.count
            tick(done)
    return np.concatenate(rows, axis=1)


def compare(results: dict[Key, np.ndarray], main: str) -> list[Comparison]:
    """SNP with all images against every other criterion, per cut."""
    found = []
    best: dict[tuple[int, str], np.ndarray] = {}
    for key, correct in results.items():
        place = (key.cut, key.variant.column)
        if place not in best or correct.sum() > best[place].sum():
            best[place] = correct
    for (cut, column), other in best.items():
        if column == main:
            continue
        snp = best[(cut, main)]
        ours, theirs = int((snp & ~other).sum()), int((other & ~snp).sum())
        p = float(binomtest(ours, ours + theirs, 0.5).pvalue) if ours + theirs else 1.0
        found.append(Comparison(cut, column, ours, theirs, p))
    return found


def half_width(share: float, count: int) -> float:
    """Half of the 95 % Wilson interval, percent."""
    low, high = wilson_interval(round(share * count), count)
    return (high - low) / 2


def cell(share: float, count: int) -> str:
    """Top-1 in percent and its sampling error."""
    return f"{100 * share:6.2f} ±{half_width(share, count):4.2f}"


def table(results: dict[Key, np.ndarray], dense: np.ndarray, main: str) -> str:
    """Top-1 per cut (rows) and criterion (columns), and the paper's values."""
    columns = list(dict.fromkeys(key.variant.column for key in results))
    count = len(dense)
    blank = " " * 15 * (len(columns) - 1)
    lines = [f"top-1 in % of {count} images, ± half of the 95 % Wilson interval; query-key pairs cut, no fine-tuning",
             "  cut " + "".join(f"{column:>15}" for column in columns)
             + f" | {'drop ' + main:>12} | {'paper snp 64':>12} {'drop':>6}",
             f" none {cell(dense.mean(), count):>15}{blank} | {'':>12} | {PAPER_DENSE:12.2f}"]
    for cut in dict.fromkeys(key.cut for key in results):
        means = {column: float(np.mean([correct for key, correct in results.items()
                                        if (key.cut, key.variant.column) == (cut, column)])) for column in columns}
        drop = 100 * (dense.mean() - means[main])
        line = f"{cut:3d} % " + "".join(f"{cell(means[column], count):>15}" for column in columns) + f" | {drop:12.2f}"
        paper = PAPER_SNP.get(cut)
        lines.append(line + (f" | {paper:12.2f} {PAPER_DENSE - paper:6.2f}" if paper else " |"))
    return "\n".join(lines)


def comparison_table(comparisons: Sequence[Comparison], main: str) -> str:
    """The paired comparisons and what they say."""
    lines = [f"{main} against the others on the same images (exact two-sided McNemar; random: its best seed)",
             "  cut  against     only snp right  only other right          p"]
    lines += [f"{one.cut:3d} %  {one.other:10s} {one.snp_only:15d} {one.other_only:17d} {one.p:10.2g}  {one.verdict}"
              for one in comparisons]
    return "\n".join(lines)


def to_json(args: argparse.Namespace, results: dict[Key, np.ndarray], dense: np.ndarray,
            comparisons: Sequence[Comparison]) -> dict[str, Any]:
    """Everything, with the images each model gets right as a string of 0 and 1 (in the order of the data)."""
    def entry(correct: np.ndarray) -> dict[str, Any]:
        share = float(correct.mean())
        return {"top1": 100 * share, "half_width": half_width(share, len(correct)),
                "correct": "".join("01"[int(one)] for one in correct)}

    return {"images": len(dense), "rank": args.rank, "seeds": args.seeds, "dense": entry(dense),
            "results": [{"cut": key.cut, **asdict(key.variant), **entry(correct)} for key, correct in results.items()],
            "comparisons": [{**asdict(one), "verdict": one.verdict} for one in comparisons],
            "paper": {"dense": PAPER_DENSE, "snp_64": PAPER_SNP}}


def run(args: argparse.Namespace, progress: Progress) -> tuple[dict[Key, np.ndarray], np.ndarray]:
    """All stages; the correct images of every cut model and of the dense one."""
    def ticker(label: str, total: int) -> Tick:
        task = progress.add_task(label, total=total)
        return lambda done: progress.update(task, completed=done)

    analysis = analyse_model(args.model)
    dense = open_session(args.model, threads=1)
    specs = input_specs(dense)
    image = image_spec(specs)
    if image is None:
        raise SystemExit(f"{args.model} does not take images")
    size = next((one for one in image.shape[2:] if isinstance(one, int)), DEFAULT_IMAGE_SIZE)
    preprocess = resolve_preprocess(args.preprocess, analysis.model.metadata, size)
    columns = variants(args.images, args.seeds)
    calibration = open_dataset(args.calibration, specs, samples=max(args.images), batch_size=1, preprocess=preprocess)
    scores = measure_scores(analysis, calibration, args.images, args.rank,
                            ticker("calibration images", max(args.images)))
    keys = [Key(cut, variant) for cut in args.cuts for variant in columns]
    sessions = [dense, *open_models(analysis, keys, scores, ticker("cut models", len(keys)))]
    data = open_dataset(args.data, specs, samples=args.limit, batch_size=args.batch, preprocess=preprocess,
                        pad_last=True, shuffle=False)
    if not data.labelled:
        raise SystemExit(f"{args.data} has no labels: its images must lie in folders named after their classes")
    correct = evaluate(sessions, data, args.workers, ticker("validation images", data.samples))
    return dict(zip(keys, correct[1:], strict=True)), correct[0]


def numbers(text: str) -> list[int]:
    """A comma-separated list of positive integers."""
    values = [int(part) for part in text.split(",")]
    if min(values) < 1:
        raise argparse.ArgumentTypeError("numbers must be 1 or more")
    return values


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="DeiT-Tiny as ONNX, with a dynamic batch")
    parser.add_argument("--calibration", type=Path, required=True, help="folder or .zip of images; labels do not count")
    parser.add_argument("--data", type=Path, required=True, help="labelled images: folder or .zip, a folder per class")
    parser.add_argument("--out", type=Path, help="also write everything as JSON, per-image results included")
    parser.add_argument("--cuts", type=numbers, default=list(PAPER_SNP), help="percent of the pairs (10,30,50,70,90)")
    parser.add_argument("--images", type=numbers, default=[1, 4, 16, 64], help="calibration images for snp (1,4,16,64)")
    parser.add_argument("--seeds", type=int, default=3, help="random selections per cut (3)")
    parser.add_argument("--rank", type=int, help="components that count in eq. 6; estimated by EVBMF if not given")
    parser.add_argument("--preprocess", help="imagenet, half, clip, raw or a .toml file (default: what the model says)")
    parser.add_argument("--limit", type=int, help="use only so many validation images, spread over all")
    parser.add_argument("--batch", type=int, default=10, help="validation images per run (10)")
    parser.add_argument("--workers", type=int, default=2, help="models evaluated at a time, one thread each (2)")
    args = parser.parse_args(arguments)
    if args.seeds < 1 or args.workers < 1 or not all(0 < cut < 100 for cut in args.cuts):
        parser.error("--seeds and --workers must be 1 or more, and --cuts between 0 and 100")
    return args


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    args = parse(arguments)
    columns = [TextColumn("{task.description:20}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               TimeRemainingColumn()]
    try:
        with Progress(*columns, console=Console(stderr=True)) as progress:
            results, dense = run(args, progress)
    except OnnxSnpError as error:
        print(f"reproduce_snp: {error}", file=sys.stderr)
        return 1
    best = f"snp {max(args.images)}"
    comparisons = compare(results, best)
    print(table(results, dense, best), comparison_table(comparisons, best), sep="\n\n")
    if args.out is not None:
        args.out.write_text(json.dumps(to_json(args, results, dense, comparisons), indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
