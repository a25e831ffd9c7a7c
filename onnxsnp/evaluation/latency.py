"""Latency of models side by side in onnxruntime.

Machines drift: clocks change, other programs come and go. So the models are measured in rounds, one run of each per
round in changing order, and the speed-up is the median of the ratios *within* the rounds, where both runs saw the same
machine.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from onnxsnp.calibration.data import open_dataset
from onnxsnp.calibration.lengths import settled, with_bounds
from onnxsnp.errors import ModelError
from onnxsnp.runtime import (
    InputSpec,
    Model,
    Session,
    describe_model,
    input_specs,
    model_bytes,
    open_session,
    run_session,
)

_LEAST, _MOST = 5, 100  # rounds of a short measurement


@dataclass(frozen=True)
class Latency:
    """Measured time of one model; times are milliseconds per run (of `batch` samples).

    Attributes:
        model: path, or `the model in memory`.
        provider, threads: what it ran on; threads None is onnxruntime's own choice.
        batch: samples per run.
        runs: timed runs, after the warm-up.
        median, p90, mean, min: over the runs, ms.
        speedup: median over the rounds of (time of the first model / time of this one); 1 for the first.
        speedup_interval: its quartiles (25 %, 75 %).
        bytes: size of the model file with its external data.
        memory: peak memory that the model adds to a process, bytes; None if not measured (`onnxsnp.evaluation.memory`).
    """

    model: str
    provider: str
    threads: int | None
    batch: int
    runs: int
    median: float
    p90: float
    mean: float
    min: float
    speedup: float
    speedup_interval: tuple[float, float]
    bytes: int
    memory: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def bench_models(
    models: Sequence[Model],
    *,
    batch: int = 1,
    runs: int = 50,
    warmup: int = 10,
    threads: int | None = None,
    provider: str = "cpu",
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> list[Latency]:
    """Time models against the first one, paired and interleaved, on generated inputs.

    Args:
        models: paths or serialized models.
        batch: samples per run where the model leaves it open; a batch fixed in the model stays.
        runs: timed rounds.
        warmup: rounds before them that are not timed.
        threads: inside one operator; None lets onnxruntime choose.
        provider: `cpu` or `cuda`.
        input_shapes: full shapes by input name, batch included, for dynamic sizes.
        seed: of the inputs.
        progress: called after each round with (rounds done, rounds in all), warm-up included.

    Raises:
        ModelError: a model cannot be opened or run, shapes do not fit, or the models fix different batches.
    """
    if not models:
        raise ModelError("no model to time")
    for name, value, least in (("batch", batch, 1), ("runs", runs, 1), ("warmup", warmup, 0)):
        if value < least:
            raise ModelError(f"{name} must be {least} or more, got {value}")
    sessions = [open_session(model, threads=threads, provider=provider) for model in models]
    feeds = feeds_for(models, sessions, batch, input_shapes, seed)
    batches = [len(next(iter(feed.values()))) for feed in feeds]
    times = measure_rounds([_runner(*pair) for pair in zip(sessions, feeds, strict=True)], runs, warmup, progress)
    return [
        replace(
            summarise(times, number),
            model=describe_model(model),
            provider=provider,
            threads=threads,
            batch=batches[number],
            bytes=model_bytes(model),
        )
        for number, model in enumerate(models)
    ]


def feeds_for(
    models: Sequence[Model],
    sessions: Sequence[Session],
    batch: int,
    shapes: Mapping[str, Sequence[int]] | None = None,
    seed: int = 0,
) -> list[dict[str, np.ndarray]]:
    """Generated inputs of each model, of one batch size.

    Raises:
        ModelError: shapes do not fit, or the models fix different batches.
    """
    feeds = [
        bench_inputs(with_bounds(input_specs(session), model), batch, shapes, seed, partial(run_session, session))
        for model, session in zip(models, sessions, strict=True)
    ]
    batches = [len(next(iter(feed.values()))) for feed in feeds]
    if len(set(batches)) > 1:
        listed = ", ".join(f"{describe_model(model)} {size}" for model, size in zip(models, batches, strict=True))
        raise ModelError(f"the models run different batches: {listed}", hint="choose the batch that one of them fixes")
    return feeds


def bench_inputs(
    specs: Sequence[InputSpec],
    batch: int,
    shapes: Mapping[str, Sequence[int]] | None,
    seed: int,
    run: Callable[[dict[str, np.ndarray]], object] | None = None,
) -> dict[str, np.ndarray]:
    """Generated inputs for one run (pictures, ids, masks or noise; see `onnxsnp.calibration.generated`).

    Args:
        run: runs the model, to find lengths that it takes where they are open and not given.

    Raises:
        ModelError: a shape for an input that is not there, or one that contradicts the model.
    """
    given = {name: tuple(shape) for name, shape in (shapes or {}).items()}
    unknown = sorted(set(given) - {spec.name for spec in specs})
    if unknown:
        known = ", ".join(spec.name for spec in specs)
        raise ModelError(f"no input named {unknown[0]!r} to give a shape to", hint=f"the inputs are: {known}")
    fixed = [_with_shape(spec, given[spec.name]) if spec.name in given else spec for spec in specs]
    fixed = fixed if run is None else settled(fixed, run)
    data = open_dataset(None, fixed, samples=_batch(fixed, batch), batch_size=batch, seed=seed, shuffle=False)
    return next(iter(data)).inputs


def measure_rounds(
    runners: Sequence[Callable[[], object]],
    runs: int,
    warmup: int,
    progress: Callable[[int, int], None] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> np.ndarray:
    """Milliseconds of every run, shape (runs, len(runners)); one run of each per round, warm-up rounds left out."""
    times = np.empty((warmup + runs, len(runners)))
    for number in range(warmup + runs):
        for place in round_order(number, len(runners)):
            start = clock()
            runners[place]()
            times[number, place] = 1000 * (clock() - start)
        if progress is not None:
            progress(number + 1, warmup + runs)
    return times[warmup:]


def rounds_for(
    runners: Sequence[Callable[[], object]],
    seconds: float,
    least: int,
    most: int,
    progress: Callable[[int, int], None] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> np.ndarray:
    """As `measure_rounds`, with as many rounds as fit a time. The last of one or two of warm-up tells how many.

    Args:
        seconds: for the timed rounds, roughly.
        least: rounds, unless they take three times as long as that; one there is always.
        most: rounds, however short they are.
    """
    one = float(measure_rounds(runners, 1, 0, clock=clock).sum()) / 1000
    if one < seconds:
        one = float(measure_rounds(runners, 1, 0, clock=clock).sum()) / 1000
    rounds = max(1, min(most, int(max(seconds, min(least * one, 3 * seconds)) / one))) if one > 0 else most
    return measure_rounds(runners, rounds, 0, progress, clock)


def compare_latency(
    sessions: Sequence[Session],
    feed: Mapping[str, np.ndarray],
    seconds: float = 1.0,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """A short paired measurement of two models, as plain data for the run record.

    Args:
        sessions: the original and the smaller model, opened as they will run (`Graph.timed_session`).
        feed: inputs of both.
        seconds: for all rounds, roughly; few rounds of a large model take up to three times as long.

    Returns:
        `before_ms`, `after_ms` (medians per run), `speedup` (median of the ratios within the rounds) and its quartiles
        `speedup_interval`, `rounds`, `batch`.
    """
    runners = [_runner(session, dict(feed)) for session in sessions]
    times = rounds_for(runners, seconds, _LEAST, _MOST, progress)
    before, after = summarise(times, 0), summarise(times, 1)
    return {
        "before_ms": before.median,
        "after_ms": after.median,
        "speedup": after.speedup,
        "speedup_interval": list(after.speedup_interval),
        "rounds": after.runs,
        "batch": len(next(iter(feed.values()))),
    }


def machine(threads: int | None, provider: str) -> str:
    """Where times are measured, in words."""
    import onnxruntime as ort

    cpu = platform.processor() or platform.machine()
    listed = Path("/proc/cpuinfo")
    if listed.is_file():
        names = [line.partition(":")[2].strip() for line in listed.read_text().splitlines() if "model name" in line]
        cpu = names[0] if names else cpu
    return f"{cpu}, {os.cpu_count()} cores, {threads or 'all'} threads, {provider}, onnxruntime {ort.__version__}"


def round_order(number: int, count: int) -> list[int]:
    """Who runs when in a round: each takes every place in turn, and every other cycle goes backwards.

    So nobody always runs first or always follows the same one (whose data is still in the caches).
    """
    order = [(place + number) % count for place in range(count)]
    return order[::-1] if (number // count) % 2 else order


def summarise(times: np.ndarray, number: int) -> Latency:
    """Statistics of one model from the times (runs, models) of all, ms; what only the caller knows is left empty."""
    own = times[:, number]
    ratios = times[:, 0] / own
    low, middle, high = (float(value) for value in np.percentile(ratios, [25, 50, 75]))
    return Latency(
        model="",
        provider="",
        threads=None,
        batch=0,
        runs=len(own),
        median=float(np.median(own)),
        p90=float(np.percentile(own, 90)),
        mean=float(own.mean()),
        min=float(own.min()),
        speedup=middle,
        speedup_interval=(low, high),
        bytes=0,
    )


def _runner(session: Session, feed: dict[str, np.ndarray]) -> Callable[[], object]:
    return lambda: run_session(session, feed)


def _with_shape(spec: InputSpec, shape: tuple[int, ...]) -> InputSpec:
    agrees = len(shape) == len(spec.shape) and all(
        size > 0 and (not isinstance(own, int) or own == size) for own, size in zip(spec.shape, shape, strict=True)
    )
    if not agrees:
        raise ModelError(f"shape {list(shape)} does not fit input {spec}")
    return replace(spec, shape=shape)


def _batch(specs: Sequence[InputSpec], wanted: int) -> int:
    """The batch of a run: what the inputs fix, else the one wanted. Contradictions are found by `open_dataset`."""
    fixed = [spec.shape[0] for spec in specs if spec.shape and isinstance(spec.shape[0], int)]
    return int(fixed[0]) if fixed else wanted
