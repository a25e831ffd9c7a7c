"""How long the optimal brain surgeon of an FFN takes: the order of removal for the shapes of DeiT-T, S and B.

Targets: half of 768 neurons in well under half a second, half of 3072 in seconds, on one core.

How: covariances of rectified random mixtures (correlated, sparse, of full rank, like activations behind a GELU) and
random consumers; half of the neurons removed, and all but one (the whole error curve). Medians of --runs runs, the
inversion of the covariance included, on --threads threads: wall time, and in brackets the time the processor spent on
it, which says more on a busy machine. Close other programs first.

Run: python tools/bench_obs.py [--shapes 768x192,1536x384,3072x768] [--block 64] [--threads 1] [--runs 3]
"""

from __future__ import annotations

import argparse
import os
import time
from statistics import median


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default="768x192,1536x384,3072x768", help="neurons x outputs, comma separated")
    parser.add_argument("--block", type=int, help="removals per panel")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=int, default=3)
    return parser.parse_args()


def main() -> None:
    options = arguments()
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(options.threads)  # read once, when numpy is loaded: hence the late imports
    import numpy as np

    from onnxsnp.reconstruction.ffn import BLOCK, removal_order

    rng = np.random.default_rng(0)
    print(f"seconds, {options.threads} thread(s), block {options.block or BLOCK}, median of {options.runs}")
    print(f"{'neurons':>8} {'outputs':>8} {'half':>14} {'all but one':>14}")
    for shape in options.shapes.split(","):
        width, outputs = (int(size) for size in shape.split("x"))
        hidden = (
            rng.standard_normal((2 * width, width // 4)) @ rng.standard_normal((width // 4, width)) - width**0.5 / 2
        )
        covariance = np.cov(np.maximum(hidden, 0), rowvar=False)
        weight = rng.standard_normal((width, outputs))
        seconds = []
        for remove in (width // 2, width - 1):
            taken = []
            for _ in range(options.runs):
                start = time.perf_counter(), time.process_time()
                removal_order(weight, covariance, remove, block=options.block)
                taken.append((time.perf_counter() - start[0], time.process_time() - start[1]))
            wall, processor = (median(times) for times in zip(*taken, strict=True))
            seconds.append(f"{wall:.2f} ({processor:.2f})")
        print(f"{width:8d} {outputs:8d} {seconds[0]:>14} {seconds[1]:>14}", flush=True)


if __name__ == "__main__":
    main()
