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
from onnxsnp.calibration.data import Dataset, open_dataset
from onnxsnp.deploy.originals import find_original, read_record
from onnxsnp.errors import PlanError
from onnxsnp.evaluation.accuracy import check_signature, evaluate_models
from onnxsnp.evaluation.verify import check_file, tolerance
from onnxsnp.graph.inputs import graph_inputs
from onnxsnp.graph.normalize import as_graph
from onnxsnp.model import Model, check_output, save
from onnxsnp.planning.plan import fingerprint
from onnxsnp.recovery import checkpoint
from onnxsnp.recovery.distil import Distilled, Progress, chosen_preprocess, distil, open_data, with_weights
from onnxsnp.recovery.options import RecoverOptions
from onnxsnp.verbs import class_names
from onnxsnp.writing import original_proto

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
        return RecoverResult(record, partial(original_proto, model))
    _write(record, model, [feed], Path(output), given)
    if path is not None and not found.report["interrupted"]:
        path.unlink(missing_ok=True)
    return RecoverResult(record, partial(onnx.load, str(output)))


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


def _labelled(original: Analysis, options: RecoverOptions) -> Dataset:
    return open_dataset(
        options.eval_data,
        graph_inputs(original.graph, options.input_shapes),
        batch_size=_EVALUATED,
        pad_last=True,
        shuffle=False,
        preprocess=chosen_preprocess(original, options),
        classes=class_names(original.model.metadata),
    )
