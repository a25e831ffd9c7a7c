"""Median times of the scoring functions: query-key pairs at the DeiT sizes, redundancy at a wide FFN.

Run: python tools/bench_scoring.py [--repeats 5] [--threads N]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median

import numpy as np

from onnxsnp.scoring.magnitude import geometric_median_scores
from onnxsnp.scoring.redundancy import redundancy_scores
from onnxsnp.scoring.snp import qk_scores

TOKENS, SIZE, IMAGES, LAYERS = 197, 64, 64, 12
DEIT_HEADS = {"DeiT-T": 3, "DeiT-S": 6, "DeiT-B": 12}
FFN_WIDTH, FFN_FAN_IN = 3072, 769


def milliseconds(call: Callable[[], object], repeats: int) -> float:
    """Median wall time of `repeats` calls after one to warm up."""
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start))
    return median(times)


def random_grams(rng: np.random.Generator, heads: int) -> np.ndarray:
    """Float32 [images, heads, d, d] of random activations with a decaying spectrum, like real queries and keys."""
    mix = rng.standard_normal((heads, SIZE, SIZE), dtype=np.float32) * np.float32(0.95) ** np.arange(SIZE)[:, None]
    grams = []
    for _ in range(IMAGES):  # one image at a time: the activations of all would take a gigabyte
        x = rng.standard_normal((heads, TOKENS, SIZE), dtype=np.float32) @ mix
        grams.append(x.swapaxes(-1, -2) @ x)
    return np.stack(grams)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=None)
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    print(f"qk_scores, {IMAGES} images, N={TOKENS}, d={SIZE}         ms / layer   s / {LAYERS} layers")
    for name, heads in DEIT_HEADS.items():
        q, k = random_grams(rng, heads), random_grams(rng, heads)
        for label, rank in (("EVBMF", None), ("rank=16", 16)):
            ms = milliseconds(
                lambda q=q, k=k, rank=rank: qk_scores(q, k, TOKENS, TOKENS, rank=rank, threads=args.threads),
                args.repeats,
            )
            print(f"  {name} ({heads:2d} heads)  {label:8s}  {ms:20.1f} {1e-3 * LAYERS * ms:14.2f}")
    filters = rng.standard_normal((FFN_WIDTH, FFN_FAN_IN), dtype=np.float32)
    print(f"n={FFN_WIDTH}, fan_in={FFN_FAN_IN}                              ms")
    for function in (redundancy_scores, geometric_median_scores):
        print(f"  {function.__name__:28s} {milliseconds(lambda f=function: f(filters), args.repeats):20.1f}")


if __name__ == "__main__":
    main()
