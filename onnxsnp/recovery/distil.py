"""The original distilled into a pruned model: new values for its initializers, and how they came about."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from onnxsnp import model as model_files
from onnxsnp.analysis import Analysis, analyse_model
from onnxsnp.calibration.data import Dataset, Preprocess, open_dataset
from onnxsnp.errors import PlanError, VerificationError
from onnxsnp.graph.inputs import graph_inputs
from onnxsnp.graph.ir import Graph
from onnxsnp.model import Model, give_back
from onnxsnp.planning.plan import fingerprint
from onnxsnp.recovery import checkpoint
from onnxsnp.recovery.augment import augmentation
from onnxsnp.recovery.feed import Feed, held_back
from onnxsnp.recovery.loop import Loop
from onnxsnp.recovery.options import RecoverOptions
from onnxsnp.recovery.report import report
from onnxsnp.recovery.student import make_student
from onnxsnp.surgery.apply import finished
from onnxsnp.verbs import choose_preprocess, class_names

Progress = Callable[[str, int, int], None]


@dataclass
class Distilled:
    """New values of a model's initializers, in the types of the file, and how they came about."""

    weights: dict[str, np.ndarray]
    report: dict[str, Any]


def distil(
    pruned: Analysis,
    original: Analysis,
    data: Dataset,
    options: RecoverOptions,
    *,
    path: Path | None = None,
    progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
) -> Distilled:
    """New weights for a pruned model.

    Args:
        data: opened with `pad_last`; the part that is held back comes first.
        path: of the checkpoint; None: there is none.

    Raises:
        PlanError: `resume` without a checkpoint that fits.
        DataError, ModelError: too few samples; nothing that can be learnt.
    """
    micro = _run_size(data, options)
    feed = Feed(data, micro, options.seed)
    specs = graph_inputs(original.graph, options.input_shapes)
    varied = augmentation(specs, chosen_preprocess(original, options)) if options.augment else None
    sample = next(iter(feed.held())).inputs
    give_back()
    student = make_student(pruned, original, sample, threads=options.threads)
    settings = {
        "pruned": fingerprint(pruned.model),
        "teacher": fingerprint(original.model),
        "data": feed.samples + feed.held_samples,
        "steps": options.steps,
        "minutes": None if options.steps else options.minutes,
        "learning_rate": options.learning_rate,
        "batch": options.batch,
        "augment": varied is not None,
        "seed": options.seed,
    }
    saved = None
    if options.resume:
        if path is None:
            raise PlanError("there is nothing to resume without an output", hint="give the output of the first run")
        saved = checkpoint.read(path, settings)

    def show(loop: Loop, judged: bool) -> None:
        if progress is not None:
            progress("recover", loop.schedule.done, loop.schedule.steps if loop.schedule.done else 0)
        if judged and say is not None:
            say(_line(loop))

    loop = Loop(
        student,
        feed,
        varied,
        max(options.batch, micro),
        options.learning_rate,
        options.seed,
        options.minutes * 60,
        options.steps,
        settings,
        path,
        show,
    )
    outcome = loop.run(saved)
    weights = {name: student.as_written(name) for name in student.parameters}
    return Distilled(weights, report(outcome, student, feed, loop, options, data))


def recovered(
    original: Analysis,
    graph: Graph,
    data: Dataset,
    options: RecoverOptions,
    progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
) -> tuple[Graph, Distilled]:
    """A cut graph as it would be written, with recovered weights."""
    done = finished(graph)
    model = model_files.load(done.to_proto())
    found = distil(analyse_model(model, options.input_shapes), original, data, options, progress=progress, say=say)
    done.weights.update(with_weights(model, found.weights).weights)
    return done, found


def open_data(original: Analysis, options: RecoverOptions) -> Dataset:
    """All samples to learn from, in mixed order."""
    specs = graph_inputs(original.graph, options.input_shapes)
    return open_dataset(
        options.calibration,
        specs,
        samples=options.samples,
        batch_size=options.batch,
        preprocess=chosen_preprocess(original, options),
        seed=options.seed,
        pad_last=True,
        classes=class_names(original.model.metadata),
    )


def chosen_preprocess(original: Analysis, options: RecoverOptions) -> Preprocess | None:
    """How images become inputs: what was asked for, else what the original says."""
    if isinstance(options.preprocess, Preprocess):
        return options.preprocess
    specs = graph_inputs(original.graph, options.input_shapes)
    return choose_preprocess(specs, original.model.metadata, options.preprocess)


def with_weights(model: Model, weights: Mapping[str, np.ndarray]) -> Model:
    """The same model with other values of some initializers; types and sizes must be the same.

    Raises:
        VerificationError: they are not, or are not finite where they were.
    """
    for name, array in weights.items():
        old = model.weights[name]
        if old.dtype != array.dtype or old.shape != array.shape:
            raise VerificationError(f"recovery changed the form of weight '{name}'", hint="please report this model")
        if not np.isfinite(array.astype(np.float32)).all():
            raise VerificationError(f"recovery made weight '{name}' infinite", hint="give a smaller --learning-rate")
    return Model(model.proto, {**model.weights, **weights}, None, model.bytes)


def _run_size(data: Dataset, options: RecoverOptions) -> int:
    """Samples that go through the model at once: what it fixes, else those of a step, else what there is."""
    if data.fixed:
        return data.batch_size
    return max(1, min(options.batch, data.samples - held_back(data.samples)))


def _line(loop: Loop) -> str:
    """Where a run is, in a line."""
    point, schedule = loop.curve[-1], loop.schedule
    parts = [f"step {point.step} of {schedule.steps}" if point.step else "start"]
    if point.training is not None:
        parts.append(f"loss {point.training:.4g}")
    parts.append(f"held back {point.held.loss:.4g}")
    if point.held.agreement is not None:
        parts.append(f"same top-1 as the original {point.held.agreement:.1f} %")
    if point.step < schedule.steps and loop.left:
        parts.append(f"{int(loop.left) // 60}:{int(loop.left) % 60:02d} left")
    return ", ".join(parts)
