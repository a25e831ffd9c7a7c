"""What recovery adds to compensation: accuracy, steps, time beside PyTorch's, memory.

Every row is a cut of one model (a share of its MACs, or `published`: the widths of snp_ratios.json), a number of
unlabelled images, and a budget: minutes, or passes over the images, which do not depend on how busy the machine is.
Each is pruned once with full compensation, then recovered for every number of images and budget. Step time and
memory beside PyTorch are what `bench_gradients.py` prints.

    python tools/bench_recover.py --model deit_tiny.onnx --calibration calibration.zip --data val.zip
        [--ratios 0.3 0.5 0.6 published] [--images 256 1000] [--minutes 5 15 | --passes 6] [--out all.json]
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
from pathlib import Path
from typing import Any

import onnxsnp

TARGETS = {"0.3": "within 2 points of dense", "0.5": "above 66 %", "0.6": "above 50 %"}  # 1000 images, 15 minutes
RATIOS = Path(__file__).parent / "snp_ratios.json"


def pruned(args: argparse.Namespace, ratio: str, folder: Path) -> Path:
    """The compensated model of a row."""
    path = folder / f"{ratio}.onnx"
    if not path.is_file():
        cut: dict[str, Any] = {"allocation": f"{RATIOS}:{args.published}"} if ratio == "published" else {}
        share = None if cut else float(ratio)
        shared = {"calibration": args.calibration, "threads": args.threads, "latency": False, "seed": args.seed}
        onnxsnp.prune(args.model, share, output=path, **shared, **cut)
    return path


def recovered(args: argparse.Namespace, ratio: str, images: int, budget: float, folder: Path) -> dict[str, Any]:
    """One row of the table."""
    start = pruned(args, ratio, folder)
    options: dict[str, Any] = {"minutes": budget}
    if args.passes:
        learning = images - min(max(round(0.1 * images), 32), 128, images // 4)
        options = {"steps": max(round(budget * learning / args.batch), 1)}
    result = onnxsnp.recover(
        start,
        args.model,
        output=folder / "recovered.onnx",
        calibration=args.calibration,
        samples=images,
        eval_data=args.data,
        threads=args.threads,
        seed=args.seed,
        batch=args.batch,
        learning_rate=args.learning_rate,
        augment=not args.no_augment,
        say=lambda line: print(f"  {line}", file=sys.stderr),
        **options,
    )
    found, accuracy = result.record["recovery"], result.record["accuracy"]
    return {
        "cut": ratio,
        "images": found["samples"] + found["held_back"],
        "budget": f"{budget:g} {'passes' if args.passes else 'min'}",
        "steps": found["steps"],
        "passes": found["passes"],
        "seconds": found["seconds"],
        "dense": accuracy["before"]["top1"],
        "compensated": accuracy["compensated"]["top1"],
        "recovered": accuracy["after"]["top1"],
        "held_back": [found["before"]["loss"], found["after"]["loss"]],
        "more_images": found["more_images"],
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000,  # of the process so far (Linux)
    }


def show(row: dict[str, Any]) -> str:
    """A row of a Markdown table."""
    target = TARGETS.get(row["cut"], "–") if row["images"] >= 1000 else "–"
    cells = [row["cut"], row["images"], row["budget"], row["steps"], f"{row['passes']:.1f}", f"{row['seconds']:.0f} s"]
    cells += [f"{row[name]:.2f}" for name in ("dense", "compensated", "recovered")]
    cells += [target, f"{row['peak_mb']:.0f} MB"]
    return f"| {' | '.join(map(str, cells))} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "calibration", "data"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--ratios", nargs="+", default=["0.3", "0.5", "0.6", "published"])
    parser.add_argument("--published", default="deit_tiny", help="entry of snp_ratios.json")
    parser.add_argument("--images", type=int, nargs="+", default=[256, 1000])
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--minutes", type=float, nargs="+", default=[5.0, 15.0])
    budget.add_argument("--passes", type=float, nargs="+")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=1.5e-4)
    parser.add_argument("--no-augment", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where pruned models are kept; default: a temporary one")
    parser.add_argument("--out", type=Path, help="rows as JSON, written after each")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    print("| MACs cut | images | budget | steps | passes | time | dense | compensated | recovered | target | peak |")
    print("|" + "---|" * 11)
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.folder or Path(scratch)
        for ratio in args.ratios:
            for images in args.images:
                for one in args.passes or args.minutes:
                    rows.append(recovered(args, ratio, images, one, folder))
                    print(show(rows[-1]), flush=True)
                    if args.out:
                        args.out.write_text(json.dumps(rows, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
