"""What pruning costs: wall time and peak memory of `onnxsnp.prune`, next to the bare forward passes of the same images.

Targets: with compensation none, pruning takes at most 3 times as long as running its calibration images through the
model; and it needs at most 1 GB of memory beyond the size of the model.

How: for the shapes of DeiT-T, S and B (random weights) and generated images that are stored as one array, so that no
picture is decoded in either measurement. *Forward*: the images through an onnxruntime session in batches of 8; opening
the session is not counted. *Prune*: the whole call, from the file to the written file, verification and comparison
included, without the timing of both models (`latency=False`); imports are not counted. Every prune runs in a process of
its own, whose peak is what the kernel says of that process (`getrusage`), Python and all libraries included. Same
number of threads everywhere; medians of --runs runs, for memory the largest. Close other programs first.

`prune` gets 48 images more, which it holds back to tune the allocation and to judge the result on.

Run: python tools/bench_prune.py [--models deit_tiny,deit_small,deit_base] [--samples 64] [--threads 2] [--runs 3]
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

# The peak that getrusage reports in a child starts at the size of its parent, so this process stays small: whatever
# needs numpy runs in a child (see WORKERS).

MODELS = ("deit_tiny", "deit_small", "deit_base")
COMPENSATIONS = ("none", "full")
BATCH = 8
HELD = 64  # further images, which prune holds back to tune and judge
MEGABYTE = 1e6
# by compensation: times the forward passes, and MB beyond so many times the model
TIME_TARGETS = {"none": 3.0, "full": 8.0}
MEMORY_TARGETS = {"none": (1, 1000.0), "full": (3, 1000.0)}
LONGEST = {"deit_base": 300.0}  # seconds with full compensation, in place of a multiple of the forward passes


def make(job: dict[str, Any]) -> dict[str, Any]:
    """Write a model with random weights and the images."""
    import numpy as np
    from make_deit import make_deit, save_whole

    save_whole(make_deit(job["name"]), Path(job["model"]))
    rng = np.random.default_rng(0)
    np.save(job["data"], rng.standard_normal((job["samples"] + HELD, 3, 224, 224), dtype=np.float32))
    return {}


def forward(job: dict[str, Any]) -> dict[str, Any]:
    """Seconds of each pass over the images."""
    import numpy as np

    from onnxsnp.runtime import input_specs, open_session, run_session

    session = open_session(job["model"], threads=job["threads"])
    name = input_specs(session)[0].name
    images = np.load(job["data"])[: job["samples"]]
    seconds = []
    for _ in range(job["runs"]):
        start = time.perf_counter()
        for first in range(0, len(images), BATCH):
            run_session(session, {name: images[first:first + BATCH]})
        seconds.append(time.perf_counter() - start)
    return {"seconds": seconds}


def prune(job: dict[str, Any]) -> dict[str, Any]:
    """Time, time by stage and peak memory of one call."""
    import onnxruntime  # noqa: F401  # imports are not counted

    from onnxsnp.pruning import prune as call

    imported = _peak()
    start = time.perf_counter()
    result = call(job["model"], job["ratio"], calibration=job["data"], samples=job["samples"],
                  compensation=job["compensation"], threads=job["threads"], output=job["output"], latency=False)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "stages": result.record["seconds"], "peak": _peak(), "imported": imported}


def _peak() -> float:
    """Largest resident size so far, MB."""
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kilobytes, on a Mac bytes
    return used * (1 if sys.platform == "darwin" else 1024) / MEGABYTE


WORKERS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {"make": make, "forward": forward, "prune": prune}


def in_child(work: str, job: dict[str, Any]) -> dict[str, Any]:
    """Run a worker in a process of its own and return what it found."""
    threads = str(job["threads"])
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": threads, "OMP_NUM_THREADS": threads}
    command = [sys.executable, __file__, "--worker", work, "--job", json.dumps(job)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"bench_prune: {work} of {job['name']} failed (exit {done.returncode})")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(name: str, args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """One row per compensation."""
    job = {"name": name, "model": str(folder / f"{name}.onnx"), "data": str(folder / "images.npy"),
           "samples": args.samples, "threads": args.threads, "runs": args.runs, "ratio": args.ratio,
           "output": str(folder / "pruned.onnx")}
    _say(f"{name}: building the model")
    in_child("make", job)
    size = Path(job["model"]).stat().st_size / MEGABYTE
    bare = None
    if not args.no_forward:
        _say(f"{name}: forward passes")
        bare = median(in_child("forward", job)["seconds"])
    rows = []
    for compensation in args.compensations:
        runs = []
        for number in range(args.runs):
            _say(f"{name}: prune, compensation {compensation}, run {number + 1} of {args.runs}")
            runs.append(in_child("prune", {**job, "compensation": compensation}))
        rows.append({"model": name, "compensation": compensation, "forward": bare, "model_mb": size, **summary(runs)})
    Path(job["model"]).unlink()
    return rows


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians of the times, the largest peak."""
    stages = {name: median(run["stages"].get(name, 0.0) for run in runs) for name in runs[0]["stages"]}
    return {"prune": median(run["seconds"] for run in runs), "stages": stages,
            "peak_mb": max(run["peak"] for run in runs), "imports_mb": max(run["imported"] for run in runs)}


def report(rows: list[dict[str, Any]]) -> str:
    """The table, with the targets, and the stages."""
    lines = [f"{'model':12} {'compensation':12} {'forward s':>10} {'prune s':>9} {'ratio':>7} {'target':>7}   "
             f"{'model MB':>9} {'peak MB':>9} {'beyond MB':>10} {'target':>7}"]
    for row in rows:
        bare, beyond = row["forward"], row["peak_mb"] - row["model_mb"]
        ratio = row["prune"] / bare if bare else None
        times, beyond_limit = _targets(row)
        lines.append(
            f"{row['model']:12} {row['compensation']:12} {_number(bare, 10)} {_number(row['prune'], 9)} "
            f"{_number(ratio, 7)} {_verdict(row['prune'], times) if times else '':>7}   "
            f"{row['model_mb']:9.1f} {row['peak_mb']:9.1f} {beyond:10.1f} "
            f"{_verdict(beyond, beyond_limit) if beyond_limit else '':>7}")
    lines.append("targets: none at most 3 times forward, 1000 MB beyond the model; full at most 8 times forward\n"
                 "(DeiT-B 300 s), 1000 MB beyond three times the model; imports alone: "
                 f"{rows[0]['imports_mb']:.0f} MB")
    lines.append("\nseconds by stage")
    for row in rows:
        stages = "  ".join(f"{name} {seconds:.2f}" for name, seconds in row["stages"].items())
        rest = row["prune"] - sum(row["stages"].values())
        lines.append(f"{row['model']:12} {row['compensation']:12} {stages}  between stages {rest:.2f}")
    return "\n".join(lines)


def _targets(row: dict[str, Any]) -> tuple[float | None, float | None]:
    """Seconds and MB beyond the model that a row may take; None where nothing is asked."""
    kind, bare = row["compensation"], row["forward"]
    times = TIME_TARGETS.get(kind)
    seconds = None if times is None or bare is None else times * bare
    if kind == "full":
        seconds = LONGEST.get(row["model"], seconds)
    models, extra = MEMORY_TARGETS.get(kind, (0, None))
    return seconds, None if extra is None else extra + (models - 1) * row["model_mb"]


def _number(value: float | None, width: int) -> str:
    return f"{value:{width}.2f}" if value is not None else f"{'-':>{width}}"


def _verdict(value: float, limit: float) -> str:
    return "met" if value <= limit else "MISSED"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(MODELS), help=f"comma-separated, of {', '.join(MODELS)} (all)")
    parser.add_argument("--samples", type=int, default=64, help="images (64)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="for everything (all cores)")
    parser.add_argument("--runs", type=int, default=3, help="runs per measurement (3)")
    parser.add_argument("--ratio", type=float, default=0.3, help="share of the MACs to remove (0.3)")
    parser.add_argument("--compensations", default=",".join(COMPENSATIONS), help="comma-separated (none,refit)")
    parser.add_argument("--no-forward", action="store_true", help="leave the forward passes out: memory only")
    parser.add_argument("--out", type=Path, help="also write the rows as JSON")
    parser.add_argument("--worker", choices=sorted(WORKERS), help=argparse.SUPPRESS)
    parser.add_argument("--job", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    args.models = args.models.split(",")
    args.compensations = args.compensations.split(",")
    unknown = [name for name in args.models if name not in MODELS]
    if unknown or min(args.samples, args.threads, args.runs) < 1:
        parser.error(f"unknown model '{unknown[0]}'" if unknown else "numbers must be 1 or more")
    return args


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    args = parse(arguments)
    if args.worker:
        print(json.dumps(WORKERS[args.worker](args.job)))
        return 0
    rows = []
    with tempfile.TemporaryDirectory(prefix="bench_prune.") as folder:
        for name in args.models:
            rows += measure(name, args, Path(folder))
    print(report(rows))
    if args.out is not None:
        args.out.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
