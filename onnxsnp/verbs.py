"""`evaluate` and `bench` as Python functions: the same defaults as the command line, on paths or models in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from onnxsnp import model as model_files
from onnxsnp.calibration.data import Dataset, image_spec, open_dataset, parse_classes, resolve_preprocess
from onnxsnp.calibration.labels import read_label_map
from onnxsnp.calibration.lengths import settled, with_bounds
from onnxsnp.calibration.preprocess import Preprocess
from onnxsnp.errors import DataError, ModelError
from onnxsnp.evaluation.accuracy import Evaluation, evaluate_models
from onnxsnp.evaluation.latency import Latency, bench_models, feeds_for
from onnxsnp.evaluation.memory import peak_memory
from onnxsnp.evaluation.profile import profile_models
from onnxsnp.evaluation.unbought import unbought
from onnxsnp.runtime import InputSpec, channel_axis, input_specs, open_session, run_session

_BATCH = 8


def evaluate(
    models: Sequence[str | Path],
    data: Any = None,
    *,
    samples: int | None = None,
    preprocess: str | Preprocess | None = None,
    labels: str | Path | Mapping[str, int] | None = None,
    threads: int | None = None,
    provider: str = "cpu",
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> list[Evaluation]:
    """Accuracy on labelled data, and agreement with the first model on any data.

    Args:
        models: paths; the first is the reference.
        data: folder or zip of images (class folders give labels), `.npz` of arrays by input name with the class numbers
            as `labels`, `.npy`, an iterable, or None for generated inputs.
        samples: how many to use, evenly spread; all of them if None.
        preprocess: a preset, a TOML file or a `Preprocess`; None follows the first model's metadata, else imagenet.
        labels: class numbers by folder or file name, or a file of them (`onnxsnp.calibration.labels`).

    Raises:
        ModelError, DataError: what is wrong, in one line.
    """
    read = read_label_map(labels) if isinstance(labels, str | Path) else labels
    opened = open_for(models, data, samples=samples, preprocess=preprocess, seed=seed, evaluation=True, labels=read)
    return evaluate_models(
        list(models),
        opened,
        threads=threads,
        provider=provider,
        progress=progress,
        names=known_names(models[0], read),
    )


def bench(
    models: Sequence[str | Path],
    *,
    batch: int | Sequence[int] = 1,
    runs: int = 50,
    warmup: int = 10,
    threads: int | Sequence[int] | None = None,
    provider: str = "cpu",
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    seed: int = 0,
    memory: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> list[Latency]:
    """Paired latency in onnxruntime: every round runs each model once, and ratios are taken within rounds.

    Args:
        batch, threads: one or several; everything is measured for each pair of them.
        memory: measure the peak memory of each model too, in a process of its own.

    Returns:
        The models in order for the first number of threads and the first batch, then for the next batch, and so on.

    Raises:
        ModelError: a model cannot be opened or run.
    """
    if not models:
        raise ModelError("no model was given")
    for path in models:
        model_files.load(path)  # a clear message for what is no model
    shapes = {name: tuple(int(size) for size in shape) for name, shape in (input_shapes or {}).items()}
    found = []
    for thread, size in settings(batch, threads):
        timed = bench_models(
            list(models),
            batch=size,
            runs=runs,
            warmup=warmup,
            threads=thread,
            provider=provider,
            input_shapes=shapes or None,
            seed=seed,
            progress=progress,
        )
        if memory:
            feeds = _feeds(models, size, thread, shapes, seed)
            peaks = [peak_memory(*one, threads=thread, provider=provider) for one in zip(models, feeds, strict=True)]
            timed = [replace(one, memory=peak) for one, peak in zip(timed, peaks, strict=True)]
        found += timed
    return found


def bench_per_op(
    models: Sequence[str | Path],
    *,
    batch: int | Sequence[int] = 1,
    runs: int = 50,
    warmup: int = 10,
    threads: int | Sequence[int] | None = None,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """Where the time of each model goes, and what its cut did not buy, for each pair of threads and batch (CPU only).

    Returns:
        Plain data: `threads`, `batch`, `profiles` (`onnxsnp.evaluation.profile`) and `unbought`, of every model but the
        first (`onnxsnp.evaluation.unbought`; None where MACs cannot be counted).

    Raises:
        ModelError: a model cannot be opened or run.
    """
    shapes = {name: tuple(int(size) for size in shape) for name, shape in (input_shapes or {}).items()}
    found = []
    for thread, size in settings(batch, threads):
        feeds = _feeds(models, size, thread, shapes, seed)
        profiles = profile_models(models, feeds, runs=runs, warmup=warmup, threads=thread, progress=progress)
        compared = [unbought(profiles[0], one) for one in profiles[1:]]
        found.append(
            {
                "threads": thread,
                "batch": len(next(iter(feeds[0].values()))),
                "profiles": [one.to_dict() for one in profiles],
                "unbought": [None if one is None else one.to_dict() for one in compared],
            }
        )
    return found


def settings(batch: int | Sequence[int], threads: int | Sequence[int] | None) -> list[tuple[int | None, int]]:
    """All pairs of threads and batch sizes, each once."""
    batches = [batch] if isinstance(batch, int) else list(dict.fromkeys(batch))
    counts = [threads] if threads is None or isinstance(threads, int) else list(dict.fromkeys(threads))
    return [(count, size) for count in counts for size in batches]


def _feeds(
    models: Sequence[str | Path],
    batch: int,
    threads: int | None,
    shapes: Mapping[str, Sequence[int]],
    seed: int,
) -> list[dict[str, Any]]:
    sessions = [open_session(model, threads=threads) for model in models]
    return feeds_for(list(models), sessions, batch, shapes or None, seed)


def open_for(
    models: Sequence[str | Path],
    data: Any,
    *,
    samples: int | None = None,
    preprocess: str | Preprocess | None = None,
    seed: int = 0,
    evaluation: bool = False,
    labels: Mapping[str, int] | None = None,
) -> Dataset:
    """Open data with the preprocessing and class names of the first model."""
    if not models:
        raise ModelError("no model was given")
    first = models[0]
    for path in models:
        model_files.load(path)  # a clear message for what is no model, before any data is read
    metadata = model_files.load(first).metadata
    session = open_session(first, optimize=False)
    specs = with_bounds(input_specs(session), first)
    if data is None:
        specs = settled(specs, partial(run_session, session))
    chosen = preprocess if isinstance(preprocess, Preprocess) else choose_preprocess(specs, metadata, preprocess)
    return open_dataset(
        data,
        specs,
        samples=samples,
        batch_size=_BATCH,
        preprocess=chosen,
        seed=seed,
        shuffle=not evaluation,
        pad_last=evaluation,
        classes=class_names(metadata),
        labels=labels,
    )


def known_names(model: str | Path, labels: Mapping[str, int] | None = None) -> list[str] | None:
    """Names of the classes by number: from the label map where each number has one name there, else the metadata."""
    if labels is not None and len(set(labels.values())) == len(labels):
        names = {number: name for name, number in labels.items()}
        return [names.get(number, str(number)) for number in range(max(names) + 1)]
    return class_names(model_files.load(model).metadata)


def class_names(metadata: Mapping[str, str]) -> list[str] | None:
    """Class names in index order, if the model's metadata lists them."""
    return parse_classes(metadata["classes"]) if metadata.get("classes") else None


def choose_preprocess(specs: Sequence[InputSpec], metadata: Mapping[str, str], name: str | None) -> Preprocess | None:
    """Preprocessing by preset, TOML file or the model's metadata, at the model's own image size.

    Returns:
        None for a model without an image input.

    Raises:
        DataError: an unknown name, or any name for a model without an image input.
    """
    spec = image_spec(specs)
    if spec is None:
        if name is not None:
            raise DataError("the model has no image input to preprocess", hint="leave --preprocess out")
        return None
    first = 1 if channel_axis(spec) == 3 else 2
    sizes = [one if isinstance(one, int) else 224 for one in spec.shape[first : first + 2]]
    return resolve_preprocess(name, metadata, (sizes[0], sizes[1]))
