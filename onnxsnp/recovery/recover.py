"""Recover what a cut has cost: the original is distilled into the pruned model, without labels or a framework.

Only the numbers of initializers change. Hidden states are compared at the end of every block (arXiv 1412.6550 compares
one of them), logits by their Kullback-Leibler divergence (arXiv 1503.02531).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from onnxsnp import model as model_files
from onnxsnp.analysis import Analysis, analyse_model
from onnxsnp.atomic import whole_file
from onnxsnp.calibration.data import Dataset, Preprocess, open_dataset
from onnxsnp.deploy.originals import find_original, read_record
from onnxsnp.errors import PlanError, VerificationError
from onnxsnp.evaluation.accuracy import check_signature, evaluate_models
from onnxsnp.evaluation.verify import check_file, tolerance
from onnxsnp.graph.inputs import graph_inputs
from onnxsnp.graph.ir import Graph, to_tensor
from onnxsnp.graph.normalize import as_graph
from onnxsnp.model import Model, check_output, give_back, save
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
_EVALUATED = 8  # samples per run when labels are counted


@dataclass
class RecoverResult:
    """A recovered model and its record.

    Attributes:
        record: what is written beside the model as `.json`: the pruned model's record, where there is one, with
            `recovery`.
    """

    record: dict[str, Any] = field(default_factory=dict)
    build: Callable[[], onnx.ModelProto] | None = None

    @cached_property
    def model(self) -> onnx.ModelProto | None:
        """The recovered model."""
        return self.build() if self.build is not None else None


@dataclass
class Distilled:
    """New values of a model's initializers, in the types of the file, and how they came about."""

    weights: dict[str, np.ndarray]
    report: dict[str, Any]


def recover(
    pruned: str | Path | onnx.ModelProto | Model,
    teacher: str | Path | onnx.ModelProto | Model | None = None,
    *,
    output: str | Path | None = None,
    progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
    **options: Any,
) -> RecoverResult:
    """Train a pruned model to do what its original does.

    Args:
        pruned: a path or a model in memory.
        teacher: the original; None: the one in the run record of `pruned`.
        output: where to write the model, and its record beside it as `.json`; nothing is written if None.
        progress: called as (stage, done, total).
        say: called with one line at each point of the curves.
        options: the fields of `RecoverOptions`; `calibration` is needed.

    Raises:
        OnnxSnpError: bad input, or a model that cannot be trained. Nothing is written.
    """
    given = RecoverOptions(**options)
    given.check()
    start = time.perf_counter()
    report_stage = progress or (lambda stage, done, total: None)
    report_stage("analyse", 0, 0)
    if teacher is None:
        teacher = _teacher_of(pruned)
    mine, original = (analyse_model(one, given.input_shapes) for one in (pruned, teacher))
    if output is not None:
        check_output(mine.model, output)
        check_output(original.model, output)
    sessions = [one.original.opened(given.threads) for one in (original, mine)]
    check_signature(original.model.path, sessions[0], mine.model.path, sessions[1])
    labelled = None if given.eval_data is None else _labelled(original, given)
    data = open_data(original, given)
    path = None if output is None else checkpoint.checkpoint_path(Path(output))
    found = distil(mine, original, data, given, path=path, progress=report_stage, say=say)
    model = with_weights(mine.model, found.weights)
    record = _record(mine, original, found)
    if labelled is not None:
        after = as_graph(model).opened(given.threads)
        shown = partial(report_stage, "evaluate")
        results = evaluate_models([*sessions, after], labelled, progress=shown)
        record["accuracy"] = dict(
            zip(("before", "compensated", "after"), (one.to_dict() for one in results), strict=True)
        )
    else:
        record.pop("accuracy", None)
    feed = next(iter(data)).inputs
    record["seconds"] = {"recover": round(time.perf_counter() - start, 3)}
    if output is None:
        return RecoverResult(record, partial(complete, model))
    _write(record, model, [feed], Path(output), given)
    if path is not None and not found.report["interrupted"]:
        path.unlink(missing_ok=True)
    return RecoverResult(record, partial(onnx.load, str(output)))


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
    varied = augmentation(specs, _preprocess(original, options)) if options.augment else None
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
        preprocess=_preprocess(original, options),
        seed=options.seed,
        pad_last=True,
        classes=class_names(original.model.metadata),
    )


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


def complete(model: Model) -> onnx.ModelProto:
    """A model with its weights inside."""
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    proto.graph.initializer.extend(to_tensor(array, name) for name, array in model.weights.items())
    return proto


def _write(
    record: dict[str, Any],
    model: Model,
    feeds: Sequence[Mapping[str, np.ndarray]],
    output: Path,
    options: RecoverOptions,
) -> None:
    """Model and record; the file is opened and run before it takes its place."""
    graph = as_graph(model)
    session = graph.opened(options.threads)
    expected = [session.run(None, feed) for feed in feeds]
    del session
    graph.close()
    with whole_file(output.with_suffix(".json")) as part:

        def ready(size: int) -> None:
            record["output"] = str(output)
            record.setdefault("after", {})["bytes"] = size
            part.write_text(json.dumps(record, indent=1, allow_nan=False))

        save(model.proto, output, partial(check_file, expected, feeds, tolerance(graph.weights)), model.weights, ready)


def _record(pruned: Analysis, original: Analysis, found: Distilled) -> dict[str, Any]:
    """The pruned model's record, or what `onnxsnp engine` needs to find the original, with the recovery."""
    path = pruned.model.path
    record = (read_record(path) if path else None) or {"plan": {"model": fingerprint(original.model)}}
    for name in ("agreement", "latency"):
        record.pop(name, None)  # they were measured on the model before
    teacher = original.model.path
    record |= {
        "input": None if teacher is None else str(teacher),
        "recovered_from": None if path is None else str(path),
        "recovery": found.report,
    }
    return record


def _teacher_of(pruned: Any) -> Path:
    """The original, by the run record of the pruned model."""
    if not isinstance(pruned, str | Path):
        raise PlanError("no teacher was given", hint="give the original model")
    model_files.load(pruned)  # a clear message for what is no model
    place, why = find_original(Path(pruned))
    if place is None:
        reason = why.partition(";")[0] or f"{pruned} has no run record"
        raise PlanError(f"the original is not known: {reason}", hint="give it with --teacher")
    return place


def _run_size(data: Dataset, options: RecoverOptions) -> int:
    """Samples that go through the model at once: what it fixes, else those of a step, else what there is."""
    if data.fixed:
        return data.batch_size
    return max(1, min(options.batch, data.samples - held_back(data.samples)))


def _preprocess(original: Analysis, options: RecoverOptions) -> Preprocess | None:
    if isinstance(options.preprocess, Preprocess):
        return options.preprocess
    specs = graph_inputs(original.graph, options.input_shapes)
    return choose_preprocess(specs, original.model.metadata, options.preprocess)


def _labelled(original: Analysis, options: RecoverOptions) -> Dataset:
    return open_dataset(
        options.eval_data,
        graph_inputs(original.graph, options.input_shapes),
        batch_size=_EVALUATED,
        pad_last=True,
        shuffle=False,
        preprocess=_preprocess(original, options),
        classes=class_names(original.model.metadata),
    )


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
