"""Original and pruned model side by side in onnxruntime: the loss of a batch, and the gradients of the weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from onnxsnp.analysis import Analysis
from onnxsnp.calibration.data import Batch
from onnxsnp.errors import DataError, ModelError
from onnxsnp.graph.precision import is_float
from onnxsnp.recovery.gradients.backward import Backward, backward_graph
from onnxsnp.recovery.gradients.static import Static, static_graph
from onnxsnp.recovery.loss import Loss, Term, add_loss, spreads
from onnxsnp.recovery.matching import Pair, kind_of_output, match

_KEPT = 512 * 2**20  # bytes of the original's tensors on the held-back part that stay in memory
_VARIES = 1e-10  # variance below which a tensor says nothing
Inputs = Mapping[str, np.ndarray]


@dataclass
class Judgement:
    """How far the pruned model is from the original on some samples.

    Attributes:
        loss: what is minimised.
        hidden: mean over the block outputs of the squared error relative to the original's variance; None without.
        outputs: by name, the KL divergence of logits, or the relative squared error of anything else.
        agreement: percent of the samples with the same top-1; None without logits.
    """

    loss: float
    hidden: float | None
    outputs: dict[str, float]
    agreement: float | None


@dataclass
class Student:
    """A model that can be trained to do what the original does.

    Attributes:
        parameters: live float32 arrays by initializer name, which the sessions read.
        kinds: element types that the initializers have in the file.
        matched: tensors of the pruned model that are compared.
        left_out: for a tensor that is not compared, why.
        untrained: for a parameter that gets no gradient, why.
    """

    parameters: dict[str, np.ndarray]
    kinds: dict[str, np.dtype]
    matched: list[str]
    left_out: dict[str, str]
    untrained: dict[str, str]
    _teacher: _Teacher
    _loss: Loss
    _terms: list[Term]
    _pairs: list[Pair]
    _built: Backward
    _threads: int | None
    _known: list[tuple[Batch, list[np.ndarray]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        gradients = list(dict.fromkeys(self._built.gradients.values()))
        self._asked = [self._loss.total, *gradients]
        self._learning = self._built.graph.session(
            self._asked, feed=list(self.parameters), threads=self._threads, arena=True
        )
        logits = next((term.tensor for term in self._terms if term.kind == "logits"), None)
        self._logits = [logits] if logits else []
        self._shown = list(dict.fromkeys([self._loss.total, *self._loss.terms.values(), *self._logits]))
        self._judging = self._loss.graph.session(self._shown, feed=list(self.parameters), threads=self._threads)

    def learn(self, inputs: Inputs) -> tuple[float, dict[str, np.ndarray]]:
        """The loss of a batch and the gradients of the parameters."""
        feeds = {**_single(inputs), **self._feeds(self._teacher.run(inputs))}
        total, *found = self._learning.run(self._asked, feeds)
        by_name = dict(zip(self._asked[1:], found, strict=True))
        return float(total[0]), {name: by_name[grad] for name, grad in self._built.gradients.items()}

    def judge(self, held: Iterable[Batch]) -> Judgement:
        """The model as it would be written, on the held-back part (of which the original's tensors are kept)."""
        written = {name: self.as_written(name).astype(np.float32) for name in self.parameters}
        sums, agreed, count = dict.fromkeys(self._shown, 0.0), 0, 0
        for batch, targets in self._with_targets(held):
            feeds = {**_single(batch.inputs), **self._feeds(targets)}
            values = dict(zip(self._shown, self._judging.run(self._shown, feeds, written), strict=True))
            for name in self._shown:
                if name not in self._logits:
                    sums[name] += float(values[name][0]) * batch.count
            count += batch.count
            for name in self._logits:
                theirs = targets[[pair.pruned for pair in self._pairs].index(name)]
                agreed += int((values[name].argmax(1) == theirs.argmax(1))[: batch.count].sum())
        mean = {name: value / count for name, value in sums.items()}
        hidden = [mean[self._loss.terms[pair.pruned]] for pair in self._pairs if not pair.output]
        outputs = {pair.pruned: mean[self._loss.terms[pair.pruned]] for pair in self._pairs if pair.output}
        return Judgement(
            mean[self._loss.total],
            float(np.mean(hidden)) if hidden else None,
            outputs,
            100 * agreed / count if self._logits else None,
        )

    def as_written(self, name: str) -> np.ndarray:
        """A parameter in the type it has in the file."""
        return self.parameters[name].astype(self.kinds[name])

    def _feeds(self, targets: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        return {
            self._loss.feeds[pair.pruned]: target.astype(np.float32, copy=False)
            for pair, target in zip(self._pairs, targets, strict=True)
        }

    def _with_targets(self, held: Iterable[Batch]) -> Iterable[tuple[Batch, list[np.ndarray]]]:
        """Batches and what the original makes of them, which is kept as far as it is not too much."""
        if self._known:
            yield from self._known
            return
        kept: list[tuple[Batch, list[np.ndarray]]] = []
        size = 0
        for batch in held:
            targets = self._teacher.run(batch.inputs)
            size += sum(array.nbytes for array in [*targets, *batch.inputs.values()])
            kept.append((batch, targets))
            if size > _KEPT:
                kept = []
            yield batch, targets
        if size <= _KEPT:
            self._known = kept


class _Teacher:
    """The original at a fixed size."""

    def __init__(self, static: Static, names: Sequence[str], threads: int | None) -> None:
        self.names = list(names)
        self._session = static.graph.session(list(dict.fromkeys(names)), threads=threads, arena=True)

    def run(self, inputs: Inputs) -> list[np.ndarray]:
        unique = list(dict.fromkeys(self.names))
        found = dict(zip(unique, self._session.run(unique, _single(inputs)), strict=True))
        return [found[name] for name in self.names]


def _single(inputs: Inputs) -> dict[str, np.ndarray]:
    """Inputs as the graphs take them, in which all floating-point numbers are of single precision."""
    return {
        name: array.astype(np.float32, copy=False) if is_float(array.dtype) else array for name, array in inputs.items()
    }


def make_student(pruned: Analysis, original: Analysis, sample: Inputs, *, threads: int | None = None) -> Student:
    """Build both sides for batches of the size of `sample`.

    Raises:
        ModelError: nothing can be compared, or no gradient reaches a weight.
        DataError: the original gives no finite numbers on the sample.
    """
    sizes = {name: array.shape for name, array in sample.items()}
    mine, theirs = static_graph(pruned.model, sizes), static_graph(original.model, sizes)
    found = match(pruned, original)
    left_out = dict(found.left_out)
    pairs = [pair for pair in found.pairs if not _missing(pair, mine, theirs, left_out)]
    if not pairs:
        raise ModelError(f"nothing can be compared with the original: {_first(left_out)}")
    teacher = _Teacher(theirs, [pair.original for pair in pairs], threads)
    shown = dict(zip([pair.pruned for pair in pairs], teacher.run(sample), strict=True))
    pairs = [pair for pair in pairs if not _unfit(pair, shown[pair.pruned], mine, left_out)]
    if not pairs:
        raise DataError(f"the original gives nothing that can be learnt: {_first(left_out)}")
    if [pair.original for pair in pairs] != teacher.names:
        teacher = _Teacher(theirs, [pair.original for pair in pairs], threads)
    wide = spreads({pair.pruned: shown[pair.pruned] for pair in pairs})
    terms = [
        Term(pair.pruned, kind_of_output(shown[pair.pruned]) if pair.output else "squares", wide[pair.pruned])
        for pair in pairs
    ]
    loss = add_loss(mine, terms)
    if not mine.parameters:
        raise ModelError("the model has no initializers to train", hint="prune it first: what is written has them")
    built = backward_graph(loss.graph, mine.shapes, loss.wanted, mine.parameters)
    if not built.gradients:
        raise ModelError(f"no weight can be trained: {_first(built.missing)}")
    parameters = {name: np.array(built.graph.weights[name], np.float32, order="C") for name in built.gradients}
    built.graph.weights.update(parameters)
    loss.graph.weights.update(parameters)
    kinds = {name: pruned.model.weights[name].dtype for name in parameters}
    matched = [pair.pruned for pair in pairs]
    return Student(parameters, kinds, matched, left_out, built.missing, teacher, loss, terms, pairs, built, threads)


def _missing(pair: Pair, mine: Static, theirs: Static, left_out: dict[str, str]) -> bool:
    """Whether a tensor is not there any more at fixed sizes, or has another size; the reason is noted."""
    absent = pair.pruned not in mine.shapes or pair.original not in theirs.shapes
    if absent:
        left_out[pair.pruned] = "at fixed sizes it is no tensor of its own"
    elif mine.shapes[pair.pruned] != theirs.shapes[pair.original]:
        reason = f"it is {mine.shapes[pair.pruned]}, the original's {theirs.shapes[pair.original]}"
        if pair.output:
            raise ModelError(
                f"output '{pair.pruned}' cannot be learnt: {reason}",
                hint="give the model that was pruned as the teacher",
            )
        left_out[pair.pruned] = reason
    return pair.pruned in left_out


def _unfit(pair: Pair, values: np.ndarray, mine: Static, left_out: dict[str, str]) -> bool:
    """Whether a tensor cannot be learnt from; the reason is noted."""
    if values.dtype.kind != "f":
        left_out[pair.pruned] = f"it holds {values.dtype}, which has no gradient"
    elif not np.isfinite(values).all():
        left_out[pair.pruned] = "the original gives NaN or infinity there"
    elif not values.size or np.var(values, dtype=np.float64) < _VARIES:
        left_out[pair.pruned] = "it is the same everywhere"
    elif pair.pruned in mine.graph.weights or pair.pruned in mine.graph.inputs:
        left_out[pair.pruned] = "it does not depend on the model"
    return pair.pruned in left_out


def _first(reasons: Mapping[str, str]) -> str:
    return next((f"{name}: {reason}" for name, reason in reasons.items()), "it has no output")
