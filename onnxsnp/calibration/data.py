"""One door to every kind of data: `open_dataset` gives batches ready to feed, the same for every method.

Accepted are a folder of images, a .zip of images, .npy and .npz files, a folder of .npy files named after the inputs,
arrays or iterables of arrays in memory, and None for generated inputs.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from copy import copy
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from onnxsnp.calibration.arrays import read_array_file, read_array_folder, read_iterable
from onnxsnp.calibration.generated import DEFAULT_SAMPLES, GeneratedSource
from onnxsnp.calibration.images import (
    ImageSource,
    UnreadableSampleError,
    folder_names,
    folder_reader,
    open_archive,
    parse_classes,
)
from onnxsnp.calibration.preprocess import ImageTarget, Preprocess, image_target, resolve_preprocess
from onnxsnp.errors import DataError
from onnxsnp.runtime import InputSpec, image_spec

__all__ = [
    "Batch",
    "Dataset",
    "InputSpec",
    "Preprocess",
    "image_spec",
    "open_dataset",
    "parse_classes",
    "resolve_preprocess",
]

SKIPPED_NAMES_KEPT = 20
_MAX_WORKERS = 4


@dataclass(frozen=True)
class Batch:
    """Inputs of one run.

    Attributes:
        inputs: arrays by input name, batch axis first.
        labels: int64 class index per sample, or None.
        count: how many samples are real; the rest repeats the last one to fill a fixed batch.
    """

    inputs: dict[str, np.ndarray]
    labels: np.ndarray | None
    count: int


class Source(Protocol):
    """Where samples come from; one class per kind of data. `load` returns one sample without batch axis."""

    parallel: bool
    generated: bool
    description: str
    labels: np.ndarray | None

    def __len__(self) -> int: ...
    def name(self, index: int) -> str: ...
    def load(self, index: int) -> dict[str, np.ndarray]: ...


class Dataset:
    """Batches of a data source, in the same order every time it is iterated.

    Attributes:
        specs: the model inputs that the batches are for.
        batch_size: samples per batch; the last batch may be smaller when the model allows it.
        generated: the data is made up.
        labelled: the samples have class labels.
        skipped: names of broken files, at most 20 of them; `skipped_count` counts them all. Files are decoded as they
            are needed, so both are complete only after the first pass.
    """

    def __init__(
        self, source: Source, order: np.ndarray, specs: Sequence[InputSpec], batch_size: int, *, fixed: bool, pad: bool
    ) -> None:
        self.specs = tuple(specs)
        self.batch_size = batch_size
        self.generated = source.generated
        self.labelled = source.labels is not None
        self._source, self._order, self._fixed, self._pad = source, order, fixed, pad
        self._broken: set[int] = set()
        self._members = set(order.tolist())
        self._probe()

    def part(self, start: int, stop: int | None, batch_size: int | None = None) -> Dataset:
        """The samples from one place of the order to another, broken ones counted.

        Args:
            batch_size: samples per batch where the model leaves it open; None: as here.
        """
        found = self._with_order(self._order[start:stop])
        found.batch_size = self.batch_size if self._fixed else batch_size or self.batch_size
        return found

    def tail(self, count: int) -> Dataset:
        """The last `count` of the samples that a pass gave, once there was one."""
        given = [index for index in self._order.tolist() if index not in self._broken][: self.samples]
        return self._with_order(np.asarray(given[len(given) - count :], np.int64))

    def mixed(self, rng: np.random.Generator) -> Dataset:
        """The same samples in another order."""
        return self._with_order(rng.permutation(self._order))

    def without(self, taken: Dataset) -> Dataset:
        """The samples that another view of the same data does not have."""
        return self._with_order(self._order[~np.isin(self._order, taken._order)])

    def _with_order(self, order: np.ndarray) -> Dataset:
        """A view of the same source, which knows of the same broken files."""
        found = copy(self)
        found._order, found._members = order, set(order.tolist())
        return found

    @property
    def _unreadable(self) -> int:
        return len(self._broken & self._members)

    @property
    def fixed(self) -> bool:
        """Whether the model takes batches of exactly `batch_size`."""
        return self._fixed

    @property
    def samples(self) -> int:
        """Real samples in one pass, as far as known: less those found broken and a remainder that is dropped."""
        readable = len(self._order) - self._unreadable
        return readable - readable % self.batch_size if self._drops else readable

    @property
    def skipped(self) -> list[str]:
        """Names of broken files found so far, in order, at most 20."""
        bad = [int(index) for index in self._order if int(index) in self._broken]
        return [self._source.name(index) for index in bad[:SKIPPED_NAMES_KEPT]]

    @property
    def skipped_count(self) -> int:
        """How many broken files were found so far."""
        return self._unreadable

    @property
    def description(self) -> str:
        """One line for people: how many samples of what, with which labels, and what was left out."""
        parts = [f"{self.samples} {self._source.description}"]
        if len(self._order) < len(self._source):
            parts.append(f"spread over {len(self._source)}")
        dropped = len(self._order) - self._unreadable - self.samples
        if dropped:
            parts.append(f"{dropped} dropped to fill batches of exactly {self.batch_size}")
        if self._unreadable:
            parts.append(f"{self._unreadable} unreadable and skipped")
        return "; ".join(parts)

    def __len__(self) -> int:
        """Number of batches in one pass, as far as known."""
        return -(-self.samples // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        samples = self._loaded()
        while chunk := list(islice(samples, self.batch_size)):
            if len(chunk) < self.batch_size and self._drops:
                return
            yield self._batch(chunk)

    @property
    def _drops(self) -> bool:
        return self._fixed and not self._pad

    def _batch(self, chunk: list[tuple[int, dict[str, np.ndarray]]]) -> Batch:
        count = len(chunk)
        if self._fixed:
            chunk = chunk + [chunk[-1]] * (self.batch_size - count)
        inputs = {spec.name: np.stack([sample[spec.name] for _, sample in chunk]) for spec in self.specs}
        labels = self._source.labels
        return Batch(inputs, None if labels is None else labels[[index for index, _ in chunk]], count)

    def _loaded(self) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        """Readable samples in order. Decoding runs ahead in threads, so it overlaps with the caller's inference."""
        todo = (int(index) for index in self._order if int(index) not in self._broken)
        if not self._source.parallel:
            yield from ((index, self._source.load(index)) for index in todo)
            return
        workers = min(_MAX_WORKERS, os.cpu_count() or 1)
        ahead = 2 * max(self.batch_size, workers)
        pool = ThreadPoolExecutor(workers, thread_name_prefix="onnxsnp-data")
        try:
            pending: deque[tuple[int, Future[dict[str, np.ndarray]]]] = deque()
            while True:
                for index in islice(todo, ahead - len(pending)):
                    pending.append((index, pool.submit(self._source.load, index)))
                if not pending:
                    return
                index, future = pending.popleft()
                try:
                    sample = future.result()
                except UnreadableSampleError:
                    self._broken.add(index)  # counted and named in `skipped`
                    continue
                yield index, sample
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _probe(self) -> None:
        """Decode until one sample is good, so that hopeless data fails here and not in the middle of a run."""
        reason = ""
        for index in self._order.tolist():
            try:
                self._source.load(index)
                break
            except UnreadableSampleError as error:
                self._broken.add(index)
                reason = str(error)
        if not len(self._order):
            raise DataError(f"there are no samples in {self._source.description}")
        if len(self._broken) == len(self._order):
            raise DataError(f"none of {len(self._order)} {self._source.description} can be read; the last: {reason}")
        if not self.samples:
            raise DataError(
                f"the model takes batches of exactly {self.batch_size}, but there are only {len(self._order)} samples",
                hint=f"give at least {self.batch_size}",
            )


def open_dataset(
    source: str | Path | Iterable[Any] | None,
    specs: Sequence[InputSpec],
    *,
    samples: int | None = None,
    batch_size: int = 8,
    preprocess: Preprocess | None = None,
    seed: int = 0,
    shuffle: bool = True,
    pad_last: bool = False,
    classes: Sequence[str] | None = None,
    sizes: Mapping[str, int] | None = None,
    token_bounds: Mapping[str, int] | None = None,
    labels: Mapping[str, int] | None = None,
) -> Dataset:
    """Open data for a model.

    Args:
        source: folder or .zip of images, .npy or .npz file, folder of .npy files, array, dict of arrays, iterable of
            either (each element one batch or one sample), or None for generated inputs.
        specs: the model's inputs (`onnxsnp.runtime.input_specs`). A fixed batch size there overrules `batch_size`.
        samples: how many to use; fewer than there are means an even spread over all of them, because folders are
            sorted by class. None is all of them (256 generated ones).
        batch_size: samples per run where the model leaves it open.
        preprocess: for images; None is the imagenet preset at the model's size.
        seed: of the spread, the order and generated inputs.
        shuffle: mix the order, so that every batch (and a dropped remainder) is a mixture of classes.
        pad_last: with a fixed batch, fill the last batch (`Batch.count` tells the real samples) instead of dropping
            it: True for evaluation, False for calibration.
        classes: the model's class names in order (`parse_classes` of its metadata), for folders named after classes.
        sizes: dynamic sizes by symbol, or by `input:axis`.
        token_bounds: exclusive upper bound of generated ids, by input name; else that of the input (`InputSpec.below`).
        labels: class numbers by file or folder name, for images (`onnxsnp.calibration.labels.read_label_map`).

    Raises:
        DataError: missing, empty, broken or ill-fitting data, or an impossible argument.
    """
    for name, value in (("samples", samples), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise DataError(f"{name} must be 1 or more, got {value}")
    fixed = _fixed_batch(specs)
    reader = _open_source(source, specs, samples, preprocess, seed, classes, sizes, token_bounds, labels)
    if labels is not None and not isinstance(reader, ImageSource):
        raise DataError("a label map is for images", hint="arrays carry their labels in an array called 'labels'")
    rng = np.random.default_rng(seed)
    order = spread(len(reader), samples, rng)
    if shuffle:
        order = rng.permutation(order)
    return Dataset(reader, order, specs, fixed or batch_size, fixed=fixed is not None, pad=pad_last)


def spread(total: int, samples: int | None, rng: np.random.Generator) -> np.ndarray:
    """Indices of `samples` of `total`, one drawn from each of equal consecutive stretches; all when None or more."""
    if samples is None or samples >= total:
        return np.arange(total)
    edges = np.arange(samples + 1) * total // samples
    return rng.integers(edges[:-1], edges[1:])


def _open_source(
    source: str | Path | Iterable[Any] | None,
    specs: Sequence[InputSpec],
    samples: int | None,
    preprocess: Preprocess | None,
    seed: int,
    classes: Sequence[str] | None,
    sizes: Mapping[str, int] | None,
    token_bounds: Mapping[str, int] | None,
    labels: Mapping[str, int] | None = None,
) -> Source:
    if source is None:
        return GeneratedSource(
            specs, samples or DEFAULT_SAMPLES, seed=seed, preprocess=preprocess, sizes=sizes, token_bounds=token_bounds
        )
    if not isinstance(source, str | Path):
        if not isinstance(source, Iterable):
            raise DataError(f"data must be a path, arrays or an iterable of arrays, got {type(source).__name__}")
        return read_iterable(source, specs, samples)
    path = Path(source)
    if path.is_file() and path.suffix.lower() in (".npy", ".npz"):
        return read_array_file(path, specs)
    if path.is_dir() and any(path.glob("*.npy")):
        return read_array_folder(path, specs)
    if path.is_dir():
        names, read = folder_names(path), folder_reader(path)
    elif path.is_file() and path.suffix.lower() == ".zip":
        names, read = open_archive(path)
    else:
        what = "is not a folder, .zip, .npz or .npy" if path.exists() else "does not exist"
        raise DataError(f"data {path} {what}", hint="give a folder or .zip of images, or an .npz of input arrays")
    target = _target(path, specs, preprocess, sizes)
    others = [spec for spec in specs if spec.name != target.spec.name]
    extra = GeneratedSource(
        others, len(names), seed=seed, preprocess=preprocess, sizes=sizes, token_bounds=token_bounds
    )
    return ImageSource(path, names, read, target, extra.load, classes, labels)


def _target(
    path: Path, specs: Sequence[InputSpec], preprocess: Preprocess | None, sizes: Mapping[str, int] | None
) -> ImageTarget:
    spec = image_spec(specs)
    if spec is None:
        listed = ", ".join(str(one) for one in specs)
        raise DataError(
            f"{path} can only hold images, but the model takes {listed}",
            hint="give an .npz with these arrays, or a folder with one .npy for each",
        )
    return image_target(spec, preprocess, sizes)


def _fixed_batch(specs: Sequence[InputSpec]) -> int | None:
    """The batch size that the model's inputs fix, or None.

    Raises:
        DataError: an input has no batch axis, or two inputs fix different sizes.
    """
    if not specs:
        raise DataError("the model has no inputs to feed")
    for spec in specs:
        if not spec.shape:
            raise DataError(f"input {spec.name!r} is a scalar; every input needs a batch axis")
    sizes = {spec.shape[0] for spec in specs if isinstance(spec.shape[0], int)}
    if len(sizes) > 1:
        raise DataError(f"the model's inputs fix different batch sizes: {', '.join(str(spec) for spec in specs)}")
    fixed = next(iter(sizes), None)
    if fixed == 0:
        raise DataError("the model fixes a batch of 0 samples")
    return fixed if isinstance(fixed, int) else None
