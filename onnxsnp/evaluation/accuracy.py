"""Accuracy on labelled data, and how closely models follow the first one on any data; one pass for all of them.

Outputs are not stored: every batch is reduced to counts and sums in float64 as soon as all models have seen it, and of
labelled samples to whether each was right.
The *logits* are a model's first two-dimensional floating-point output.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from onnxsnp.calibration.data import Batch, Dataset
from onnxsnp.errors import DataError, ModelError
from onnxsnp.evaluation.paired import Paired, class_changes, compare_paired
from onnxsnp.runtime import InputSpec, Model, Session, describe_model, input_specs, open_session, run_session

_Z95 = 1.959963984540054  # two-sided 95 % quantile of the normal distribution


@dataclass(frozen=True)
class Evaluation:
    """What one model did on the data. Percentages are 0..100; None where the data or the model do not allow it.

    Attributes:
        model: path, or `the model in memory`.
        count: samples seen.
        top1, top5: accuracy in percent; labelled data only.
        top1_interval, top5_interval: 95 % Wilson score intervals of these, percent.
        paired: this model against the first on the same samples (`onnxsnp.evaluation.paired`); None for the first.
        classes: what each class gains or loses against the first, largest losses first (`class_changes`).
        agreement: samples with the same top-1 class as the first model, percent.
        cosine: mean cosine similarity to the first model over the vectors (last axis) of the logits, or over all
            floating-point outputs where there are no logits.
        cosine_by_output: the same for every floating-point output.
        kl: mean Kullback-Leibler divergence KL(first ‖ this) of the softmax of the logits, in nats; None when
            the logits of one of the two are not finite.
        max_abs_difference: the largest difference of any element of any floating-point output from the first model's;
            None when one of the two is not finite.
        nonfinite: samples with a NaN or an infinity in a floating-point output; they count as wrong, as not agreeing
            and with cosine 0.
    """

    model: str
    count: int
    top1: float | None = None
    top5: float | None = None
    top1_interval: tuple[float, float] | None = None
    top5_interval: tuple[float, float] | None = None
    paired: Paired | None = None
    classes: list[dict[str, Any]] = field(default_factory=list)
    agreement: float | None = None
    cosine: float | None = None
    cosine_by_output: dict[str, float] = field(default_factory=dict)
    kl: float | None = None
    max_abs_difference: float | None = None
    nonfinite: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def evaluate_models(
    models: Sequence[Model | Session],
    data: Dataset,
    *,
    threads: int | None = None,
    provider: str = "cpu",
    progress: Callable[[int, int], None] | None = None,
    names: Sequence[str] | None = None,
) -> list[Evaluation]:
    """Run all models over the data once; the first is the reference that the others are compared with.

    Args:
        models: paths, serialized models or open sessions with the same inputs and outputs.
        data: opened for these inputs (`open_dataset`; `pad_last=True` where the batch is fixed, so that no sample is
            lost).
        threads: per operator; None lets onnxruntime choose.
        provider: `cpu` or `cuda`.
        progress: called after each batch with (samples done, samples in all).
        names: of the classes by number, where they are known.

    Raises:
        ModelError: a model cannot be opened or run, or differs from the first in inputs or outputs.
        DataError: a label is outside the classes of the model.
    """
    if not models:
        raise ModelError("no model to evaluate")
    sessions: list[Session] = [
        open_session(model, threads=threads, provider=provider) if isinstance(model, str | Path | bytes) else model
        for model in models
    ]
    for model, session in zip(models[1:], sessions[1:], strict=True):
        check_signature(models[0], sessions[0], model, session)
    layout = _output_layout(sessions[0])
    tallies = [_Tally(layout) for _ in models]
    done = 0
    for batch in data:
        first: list[np.ndarray] | None = None
        for session, tally in zip(sessions, tallies, strict=True):
            outputs = _real_outputs(run_session(session, batch.inputs), batch)
            tally.add(outputs, batch, first)
            first = outputs if first is None else first
        done += batch.count
        if progress is not None:
            progress(done, data.samples)
    return [
        tally.result(describe_model(model), tallies[0] if number else None, names)
        for number, (model, tally) in enumerate(zip(models, tallies, strict=True))
    ]


def agreement(original: Session, pruned: Session, batches: Sequence[Batch]) -> dict[str, float | int | None]:
    """How closely a model follows the original on a few batches kept in memory (labels are not looked at).

    Returns:
        samples; top1: share with the same top-1, percent; cosine; kl, nats; max_abs_difference.
    """
    layout = _output_layout(original)
    tally = _Tally(layout)
    for batch in batches:
        unlabelled = Batch(batch.inputs, None, batch.count)
        first = _real_outputs(run_session(original, batch.inputs), unlabelled)
        tally.add(_real_outputs(run_session(pruned, batch.inputs), unlabelled), unlabelled, first)
    result = tally.result("pruned", tally)
    return {
        "samples": result.count,
        "top1": result.agreement,
        "cosine": result.cosine,
        "kl": result.kl,
        "max_abs_difference": result.max_abs_difference,
    }


def check_signature(first_model: object, first: Session, model: object, session: Session) -> None:
    """Make sure two models take the same inputs and give the same outputs; fixed sizes must match, dynamic ones may.

    Raises:
        ModelError: naming both models and the first thing that differs.
    """
    ours, theirs = input_specs(first), input_specs(session)
    who = f"{describe_model(model)} and {describe_model(first_model)}"
    hint = "compare models that came from the same export"
    if not _same_specs(ours, theirs):
        wanted, got = ("; ".join(str(spec) for spec in specs) for specs in (ours, theirs))
        raise ModelError(f"{who} take different inputs: {got} against {wanted}", hint=hint)
    wanted_out, got_out = ([(out.name, out.type) for out in one.get_outputs()] for one in (first, session))
    if wanted_out != got_out:
        raise ModelError(f"{who} give different outputs: {got_out} against {wanted_out}", hint=hint)


def wilson_interval(successes: int, count: int) -> tuple[float, float]:
    """95 % Wilson score interval of a proportion, in percent.

    Source: E. B. Wilson, "Probable inference, the law of succession, and statistical inference", JASA 1927.
    """
    if count < 1:
        raise ValueError("an interval needs at least one sample")
    share, z2 = successes / count, _Z95**2
    centre = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = _Z95 / (1 + z2 / count) * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2))
    return 100 * max(centre - half, 0.0), 100 * min(centre + half, 1.0)


@dataclass(frozen=True)
class _Layout:
    """Names of the outputs, which are floating-point, and which is the logits."""

    names: tuple[str, ...]
    floats: tuple[int, ...]
    logits: int | None


class _Tally:
    """Counts and sums of one model over the batches seen so far."""

    def __init__(self, layout: _Layout) -> None:
        self._layout = layout
        self.count = self.top5 = self.same = self.nonfinite = 0
        self.labels: list[np.ndarray] = []
        self.right: list[np.ndarray] = []
        self.cosine = dict.fromkeys(layout.floats, 0.0)
        self.vectors = dict.fromkeys(layout.floats, 0)
        self.kl = self.max_difference = 0.0

    def add(self, outputs: list[np.ndarray], batch: Batch, first: list[np.ndarray] | None) -> None:
        """Account for one batch; `first` holds the outputs of the reference model, None for itself."""
        layout = self._layout
        self.count += batch.count
        self.nonfinite += _nonfinite_rows([outputs[number] for number in layout.floats], batch.count)
        if layout.logits is not None:
            logits = outputs[layout.logits].astype(np.float64)
            if batch.labels is not None:
                ranks = label_ranks(logits, batch.labels[: batch.count])
                self.labels.append(batch.labels[: batch.count])
                self.right.append(ranks < 1)
                self.top5 += int((ranks < 5).sum())
            if first is not None:
                self._compare_logits(first[layout.logits].astype(np.float64), logits)
        if first is not None:
            for number in layout.floats:
                self._compare_output(number, first[number], outputs[number])

    def _compare_logits(self, first: np.ndarray, logits: np.ndarray) -> None:
        if first.shape != logits.shape:
            raise ModelError(f"the models give logits of different shapes: {first.shape} and {logits.shape}")
        finite = np.isfinite(first).all(axis=1) & np.isfinite(logits).all(axis=1)
        self.same += int((finite & (first.argmax(axis=1) == logits.argmax(axis=1))).sum())
        # NaN stays in the sum on purpose: a divergence over the good samples alone would look too good.
        self.kl += float(softmax_kl(first, logits).sum()) if finite.all() else math.nan

    def _compare_output(self, number: int, first: np.ndarray, output: np.ndarray) -> None:
        if first.shape != output.shape:
            name = self._layout.names[number]
            raise ModelError(f"the models give output {name!r} in different shapes: {first.shape} and {output.shape}")
        a, b = first.astype(np.float64), output.astype(np.float64)
        cosine = vector_cosines(a, b)
        self.cosine[number] += float(cosine.sum())
        self.vectors[number] += cosine.size
        if a.size:
            difference = float(np.abs(a - b).max()) if np.isfinite(a).all() and np.isfinite(b).all() else math.nan
            # np.fmax and max() would lose the NaN
            self.max_difference = float(np.maximum(self.max_difference, difference))

    def result(self, model: str, first: _Tally | None, names: Sequence[str] | None = None) -> Evaluation:
        """Means and percentages of everything added; `first` is the tally of the model it was compared with."""
        if not self.count:
            raise DataError("the data gave no samples")
        values: dict[str, Any] = {"nonfinite": self.nonfinite}
        if self.right:
            right, labels = np.concatenate(self.right), np.concatenate(self.labels)
            count, hits = len(right), int(right.sum())
            values["top1"], values["top5"] = 100 * hits / count, 100 * self.top5 / count
            values["top1_interval"] = wilson_interval(hits, count)
            values["top5_interval"] = wilson_interval(self.top5, count)
            if first is not None:
                before = np.concatenate(first.right)
                values["paired"] = compare_paired(before, right)
                values["classes"] = class_changes(labels, before, right, list(names) if names else None)
        if first is not None:
            values |= self._comparison()
        return Evaluation(model, self.count, **values)

    def _comparison(self) -> dict[str, Any]:
        layout = self._layout
        by_output = {
            layout.names[number]: self.cosine[number] / self.vectors[number]
            for number in layout.floats
            if self.vectors[number]
        }
        values: dict[str, Any] = {"cosine_by_output": by_output}
        if layout.logits is not None:
            values["agreement"] = 100 * self.same / self.count
            values["kl"] = None if math.isnan(self.kl) else self.kl / self.count
            values["cosine"] = by_output.get(layout.names[layout.logits])
        elif by_output:
            values["cosine"] = sum(by_output.values()) / len(by_output)
        if by_output and not math.isnan(self.max_difference):
            values["max_abs_difference"] = self.max_difference
        return values


def label_ranks(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Place of the true class in each row (0 = top), ties going to the lower class number as argmax does.

    Args:
        logits: (samples, classes). A row that is not finite puts its label last: broken is never right.
        labels: (samples,) class numbers.

    Raises:
        DataError: a label outside the classes.
    """
    classes = logits.shape[1]
    if labels.size and (labels.min() < 0 or labels.max() >= classes):
        bad = labels.max() if labels.max() >= classes else labels.min()
        raise DataError(
            f"label {bad} is outside the model's {classes} classes",
            hint="name the folders by the class numbers or class names of this model",
        )
    true = np.take_along_axis(logits, labels[:, None], axis=1)
    before = (logits == true) & (np.arange(classes) < labels[:, None])
    ranks = ((logits > true) | before).sum(axis=1)
    return np.where(np.isfinite(logits).all(axis=1), ranks, np.iinfo(np.int64).max)


def vector_cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosine similarity of the vectors along the last axis; 1 where both are zero, 0 where one is or is not finite.

    The result has the shape of the other axes (one vector per element for a one-dimensional array).
    """
    if a.ndim < 2:
        a, b = a.reshape(-1, 1), b.reshape(-1, 1)
    finite = np.isfinite(a).all(axis=-1) & np.isfinite(b).all(axis=-1)
    a, b = (np.where(finite[..., None], array, 0.0) for array in (a, b))
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    both_zero = finite & ~a.any(axis=-1) & ~b.any(axis=-1)
    cosine = (a * b).sum(axis=-1) / np.where(norms > 0, norms, 1.0)
    return np.where(both_zero, 1.0, np.clip(cosine, -1.0, 1.0))


def softmax_kl(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """KL(softmax(first) ‖ softmax(second)) of each row, in nats; inputs (samples, classes), finite."""
    log_p, log_q = _log_softmax(first), _log_softmax(second)
    return (np.exp(log_p) * (log_p - log_q)).sum(axis=1)


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def _real_outputs(outputs: list[np.ndarray], batch: Batch) -> list[np.ndarray]:
    """The outputs without the rows of samples that only fill a fixed batch."""
    fed = len(next(iter(batch.inputs.values())))
    return [out[: batch.count] if out.ndim and len(out) == fed else out for out in outputs]


def _nonfinite_rows(outputs: Sequence[np.ndarray], count: int) -> int:
    bad = np.zeros(count, bool)
    for output in outputs:
        if output.ndim and len(output) == count:
            bad |= ~np.isfinite(output).reshape(count, -1).all(axis=1)
        elif not np.isfinite(output).all():
            bad[:] = True
    return int(bad.sum())


def _output_layout(session: Session) -> _Layout:
    outputs = session.get_outputs()
    float_types = ("tensor(float)", "tensor(float16)", "tensor(double)")
    floats = tuple(number for number, out in enumerate(outputs) if out.type in float_types)
    logits = next((number for number in floats if len(outputs[number].shape) == 2), None)
    return _Layout(tuple(out.name for out in outputs), floats, logits)


def _same_specs(ours: Sequence[InputSpec], theirs: Sequence[InputSpec]) -> bool:
    if len(ours) != len(theirs):
        return False
    return all(
        a.name == b.name and a.dtype == b.dtype and len(a.shape) == len(b.shape) and _compatible(a, b)
        for a, b in zip(ours, theirs, strict=True)
    )


def _compatible(a: InputSpec, b: InputSpec) -> bool:
    pairs = zip(a.shape, b.shape, strict=True)
    return all(x == y for x, y in pairs if isinstance(x, int) and isinstance(y, int))
