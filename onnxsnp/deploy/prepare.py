"""A model made ready for a target: lowered, checked against its importer, and compared with what it was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from onnxsnp import model as model_files
from onnxsnp.analysis import analyse_model
from onnxsnp.calibration.data import open_dataset
from onnxsnp.calibration.preprocess import Preprocess
from onnxsnp.deploy.bundle import has_half
from onnxsnp.deploy.fusion import SiteFusion, fused_attention
from onnxsnp.deploy.half import to_half
from onnxsnp.deploy.lint import Finding, lint
from onnxsnp.deploy.lower import Lowered, lower
from onnxsnp.deploy.parity import Parity, outputs, parity
from onnxsnp.deploy.targets import Target
from onnxsnp.errors import ModelError, VerificationError
from onnxsnp.graph.inputs import graph_inputs
from onnxsnp.graph.normalize import as_graph
from onnxsnp.model import Model
from onnxsnp.verbs import choose_preprocess, class_names

SAMPLES = 3  # inputs on which the lowered model is compared with the original

Feed = dict[str, np.ndarray]


class NotTaken(ModelError):
    """A target's TensorRT does not take a model.

    Attributes:
        findings: the errors, one by one.
    """

    def __init__(self, message: str, findings: Sequence[Finding]) -> None:
        super().__init__(message)
        self.findings = list(findings)


@dataclass(frozen=True)
class Ready:
    """A model for a target.

    Attributes:
        label: "pruned" and "original", or "model" where there is nothing to compare with.
        source: its path, or "model in memory".
        lowered: as the target takes it.
        warnings: of the lint; errors do not get this far.
        parity: with the source in onnxruntime, the worst of several inputs.
        half: the same in half precision, where the file is in single and the device makes fp16 of it: what may be
            expected there. None where the file says what is computed.
        feed: the first of them.
        reference: what the source gives for it in onnxruntime, in the types of the lowered model's outputs.
        fusion: its attentions on the target.
    """

    label: str
    source: str
    lowered: Lowered
    warnings: list[Finding]
    parity: Parity
    half: Parity | None
    feed: Feed
    reference: Feed
    fusion: list[SiteFusion]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "label": self.label,
            "source": self.source,
            **self.lowered.to_dict(),
            "lint": [finding.to_dict() for finding in self.warnings],
            "parity": self.parity.to_dict(),
            "parity_fp16": None if self.half is None else self.half.to_dict(),
            "fused_attention": [site.to_dict() for site in self.fusion],
        }


def prepare(
    source: str | Path | onnx.ModelProto | Model,
    label: str,
    target: Target,
    precision: str,
    *,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    feeds: Sequence[Feed] | None = None,
    data: Any = None,
    preprocess: str | Preprocess | None = None,
    seed: int = 0,
) -> tuple[Ready, list[Feed]]:
    """Lower, lint and compare.

    Args:
        feeds: inputs, where they are known from another model; else they are taken from `data`.
        data: as `open_dataset` takes it; generated inputs if None.

    Returns:
        The model, and the inputs.

    Raises:
        NotTaken: the lowered model has what the target's importer does not take.
        VerificationError: the lowered model computes something else.
        OnnxSnpError: the model or the data cannot be read, or do not go together.
    """
    model = model_files.load(source)
    lowered = lower(model, target, precision=precision, input_shapes=input_shapes)
    findings = lint(lowered.proto, target)
    which = "model" if label == "model" else f"{label} model"
    errors = [finding for finding in findings if finding.severity == "error"]
    if errors:
        count = "one node" if len(errors) == 1 else f"{len(errors)} nodes"
        raise NotTaken(f"{target.name} does not take {count} of the {which} as they are", errors)
    feeds = list(feeds or _inputs(model, lowered.proto, data, preprocess, seed))
    typed = has_half(lowered.proto)
    compared = _compared(model, lowered.proto, feeds, "fp16" if typed else "fp32")
    _passed(compared, f"lowered for {target.name}, the {which}'s", "please report it with the model")
    half = None
    if precision == "fp16" and not typed:
        half = _compared(model, to_half(lowered.proto).proto, feeds, "fp16")
        _passed(half, f"in half precision, the {which}'s", "use --precision fp32")
    sites = fused_attention(analyse_model(lowered.proto), target, precision)
    kinds = {one.name: one.type.tensor_type.elem_type for one in lowered.proto.graph.output}
    reference = {
        name: array.astype(onnx.helper.tensor_dtype_to_np_dtype(kinds[name]))
        for name, array in outputs(as_graph(model), feeds[0]).items()
    }
    name = "model in memory" if model.path is None else str(model.path)
    return Ready(label, name, lowered, findings, compared, half, feeds[0], reference, sites), feeds


def _compared(model: Model, lowered: onnx.ModelProto, feeds: Sequence[Feed], precision: str) -> Parity:
    """The worst of several inputs."""
    return max((parity(model, lowered, feed, precision) for feed in feeds), key=lambda one: one.difference)


def _passed(found: Parity, what: str, hint: str) -> None:
    if found.passed:
        return
    worst = max(found.outputs, key=lambda output: output.difference)
    raise VerificationError(
        f"{what} output '{worst.name}' differs from what it was by {worst.difference:.1e} of its largest value, where "
        f"{found.tolerance:.0e} is allowed ({found.reason})",
        hint=hint,
    )


def _inputs(
    model: Model, lowered: onnx.ModelProto, data: Any, preprocess: str | Preprocess | None, seed: int
) -> list[Feed]:
    specs = graph_inputs(as_graph(model_files.load(lowered)))
    batch = next((spec.shape[0] for spec in specs if spec.shape and isinstance(spec.shape[0], int)), 1)
    chosen = preprocess if isinstance(preprocess, Preprocess) else choose_preprocess(specs, model.metadata, preprocess)
    opened = open_dataset(
        data, specs, samples=SAMPLES * batch, preprocess=chosen, seed=seed, classes=class_names(model.metadata)
    )
    return [batch.inputs for batch in opened]
