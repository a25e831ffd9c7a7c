"""Where a model's time goes, by onnxruntime's own profiler: operators by type, products by what they read."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from onnxsnp.errors import ModelError
from onnxsnp.evaluation.latency import measure_rounds
from onnxsnp.runtime import describe_model, open_session, run_session

_PRODUCTS = ("MatMul", "FusedMatMul", "Gemm", "FusedGemm", "Conv", "FusedConv")
_ATTENTIONS = ("MultiHeadAttention",)
_UNCOUNTED = ("Attention", "Einsum", "MatMulInteger", "QLinearMatMul", "QLinearConv", "DynamicQuantizeMatMul")
_OUTER = ("If", "Loop", "Scan")  # their time is that of the operators inside, which are listed too


@dataclass
class OpTime:
    """What one kind of operator does in one run.

    Attributes:
        op: operator type as onnxruntime runs it (after its fusions); products of matrices say what they read.
        product: whether it is one of those whose work is multiply-accumulates.
        calls: operators of this kind.
        ms: time.
        macs: multiply-accumulates; 0 where the operator has none, or none that its shapes tell.
        bytes: read and written activations, and weights that are not packed ahead.
    """

    op: str
    product: bool
    calls: int = 0
    ms: float = 0.0
    macs: float = 0.0
    bytes: float = 0.0


@dataclass
class Profile:
    """The breakdown of a model's run.

    Attributes:
        model: path.
        ms: time of a run with the profiler on (more than without it): the sum of what follows.
        ops: by kind, longest first.
        outside: ms of a run that no operator accounts for.
    """

    model: str
    ms: float
    ops: list[OpTime] = field(default_factory=list)
    outside: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    @property
    def macs(self) -> float:
        return sum(op.macs for op in self.ops)


def profile_models(
    models: Sequence[str | Path],
    feeds: Sequence[Mapping[str, np.ndarray]],
    *,
    runs: int = 50,
    warmup: int = 10,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Profile]:
    """Profile models side by side, on the CPU, in interleaved rounds.

    Args:
        feeds: inputs of each.

    Raises:
        ModelError: a model cannot be opened or run.
    """
    with tempfile.TemporaryDirectory() as folder:
        prefixes = [Path(folder) / str(number) for number in range(len(models))]
        sessions = [
            open_session(model, threads=threads, profile=prefix) for model, prefix in zip(models, prefixes, strict=True)
        ]
        runners = [partial(run_session, one, feed) for one, feed in zip(sessions, feeds, strict=True)]
        measure_rounds(runners, runs, warmup, progress)
        files = [session.end_profiling() for session in sessions]
        return [
            summarise_events(json.loads(Path(file).read_text()), describe_model(model), warmup)
            for model, file in zip(models, files, strict=True)
        ]


def summarise_events(events: Sequence[Mapping[str, Any]], model: str, warmup: int = 0) -> Profile:
    """Put the profiler's events together: of each kind of operator the median over the runs.

    So what disturbs the machine for a moment, which hits another operator in every run, does not count.

    Args:
        events: as onnxruntime writes them; times in microseconds.
        warmup: runs at the beginning that do not count.

    Raises:
        ModelError: there is no run in them.
    """
    whole = sorted((one for one in events if one["name"] == "model_run"), key=lambda one: float(one["ts"]))[warmup:]
    if not whole:
        raise ModelError(f"onnxruntime's profiler recorded no run of {model}")
    starts = [float(one["ts"]) for one in whole]
    took = np.array([float(one["dur"]) for one in whole])
    found: dict[str, OpTime] = {}
    times: dict[str, np.ndarray] = {}
    for event in events:
        if event.get("cat") != "Node" or not event["name"].endswith("_kernel_time"):
            continue
        run = int(np.searchsorted(starts, float(event["ts"]), side="right")) - 1
        if run < 0 or float(event["ts"]) > starts[run] + took[run] or event["args"]["op_name"] in _OUTER:
            continue
        op = _add(found, event)
        times.setdefault(op.op, np.zeros(len(whole)))[run] += float(event["dur"]) / 1000
    for name, op in found.items():
        op.ms = float(np.median(times[name]))
        op.macs, op.bytes, op.calls = op.macs / len(whole), op.bytes / len(whole), round(op.calls / len(whole))
    outside = float(np.median(took / 1000 - sum(times.values(), np.zeros(len(whole)))))
    ops = sorted(found.values(), key=lambda op: -op.ms)
    return Profile(model, sum(op.ms for op in ops) + outside, ops, outside)


def _add(found: dict[str, OpTime], event: Mapping[str, Any]) -> OpTime:
    """Count an operator's run under its kind (its time is not added)."""
    args = event["args"]
    name = str(args["op_name"])
    product = name in (*_PRODUCTS, *_ATTENTIONS, *_UNCOUNTED)
    inputs, outputs = ([_shape(one) for one in args.get(f"{side}_type_shape", [])] for side in ("input", "output"))
    label = name
    if name in ("MatMul", "FusedMatMul"):
        # weights that were packed ahead are no longer among the inputs
        weights = len(inputs) < 2 or int(args.get("parameter_size", 0)) > 0
        label = f"{name} with weights" if weights else f"{name} of activations"
    op = found.setdefault(label, OpTime(label, product))
    op.calls += 1
    op.macs += _macs(name, inputs, outputs)
    op.bytes += sum(int(args.get(size, 0)) for size in ("activation_size", "parameter_size", "output_size"))
    return op


def _macs(op: str, inputs: Sequence[list[int]], outputs: Sequence[list[int]]) -> float:
    """Multiply-accumulates by the shapes; 0 where they do not tell."""
    if not inputs or not outputs:
        return 0.0
    if op in ("Conv", "FusedConv"):
        return float(prod(outputs[0]) * prod(inputs[1][1:])) if len(inputs) > 1 else 0.0
    if op in _PRODUCTS and outputs[0]:
        return float(prod(inputs[0]) * outputs[0][-1])  # every entry of the left side meets every column
    if op in _ATTENTIONS and len(inputs) > 1 and len(inputs[1]) in (3, 4):
        return float((prod(inputs[0]) + prod(outputs[0])) * inputs[1][-2])
    return 0.0


def _shape(described: Mapping[str, Sequence[int]]) -> list[int]:
    return [int(size) for sizes in described.values() for size in sizes]
