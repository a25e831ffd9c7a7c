"""Whether a lowered model computes what the original does: both in onnxruntime, on the same inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto

from onnxsnp import model as model_files
from onnxsnp.analysis import Analysis
from onnxsnp.errors import ModelError
from onnxsnp.graph.ir import Graph, SharedSession, attribute
from onnxsnp.graph.normalize import as_graph
from onnxsnp.graph.precision import is_float
from onnxsnp.graph.quantised import is_quantised
from onnxsnp.model import Model
from onnxsnp.runtime import input_specs

# Of differences, relative to the largest entry of the output. Single precision rounds at 6e-8; rewritten operators
# round in another order, and some tens of layers add that up to about 1e-6: a wrong rewrite is far above.
SINGLE = 2e-5
# Half precision rounds at 5e-4 (2^-11), in the weights and after every operator. Over some tens of layers that adds up
# like a random walk, to about ten times as much; what overflows or loses its small numbers is far above.
HALF = 2e-2
# A number that lies between two integers is rounded to the other one once the last bit in front of it differs: one step
# of a scale that has 127 of them, in some of the entries.
QUANTISED = 2e-2


# The original's own rounding is measured by running it with onnxruntime's fusions and without. Where terms cancel (a
# cosine near 0) it is above these numbers. A lowered model may then differ by a few times as much; one in half
# precision by as many times as that is coarser (2^13). An original that differs from itself by more proves nothing.
_TIMES = {"fp32": 5.0, "fp16": 2.0**13}
_LARGEST_OWN = 1e-4
# The same of a quantised original on inputs that are rounded to half precision; inside more is rounded than the inputs.
_STEPS, _LARGEST_STEPS = 4.0, 0.1


@dataclass(frozen=True)
class OutputParity:
    """One output of both models.

    Attributes:
        name: of the output.
        difference: largest absolute difference over the largest absolute entry of the reference; of integers and truth
            values the share of entries that differ; infinite where one is not a number and the other is.
        same_top1: whether the largest entry of each row is the same, where the output is a table of scores; else None.
    """

    name: str
    difference: float
    same_top1: bool | None = None


@dataclass(frozen=True)
class Parity:
    """How far a lowered model is from the original.

    Attributes:
        outputs: one entry per output.
        tolerance: what `difference` may be, and why it is that.
        reason: of the tolerance.
    """

    outputs: list[OutputParity] = field(default_factory=list)
    tolerance: float = SINGLE
    reason: str = "single precision"

    @property
    def difference(self) -> float:
        """The largest of all outputs."""
        return max((output.difference for output in self.outputs), default=0.0)

    @property
    def passed(self) -> bool:
        """Whether every output is within the tolerance."""
        return all(output.difference <= self.tolerance for output in self.outputs)

    @property
    def same_top1(self) -> bool | None:
        """Whether every table of scores has its largest entries where the original has them; None without one."""
        found = [output.same_top1 for output in self.outputs if output.same_top1 is not None]
        return all(found) if found else None

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "passed": self.passed,
            "difference": self.difference,
            "tolerance": self.tolerance,
            "reason": self.reason,
            "same_top1": self.same_top1,
            "outputs": [asdict(output) for output in self.outputs],
        }


def parity(
    reference: str | Path | onnx.ModelProto | Model | Analysis,
    lowered: onnx.ModelProto,
    feeds: Mapping[str, np.ndarray],
    precision: str = "fp32",
) -> Parity:
    """Run both models and compare their outputs.

    Args:
        reference: the model that was lowered.
        feeds: inputs by name, of the lowered model's sizes; each model gets them in its own element types.
        precision: of the lowered model; fp16 has a tolerance of its own.

    Raises:
        ModelError: one of the models does not run on these inputs, or has other outputs.
    """
    original = as_graph(reference.model if isinstance(reference, Analysis) else model_files.load(reference))
    other = as_graph(model_files.load(lowered))
    # onnxruntime's fusions would compute some of half precision in single again, and lack it in others (QLinearConcat)
    expected, found = outputs(original, feeds), outputs(other, feeds, optimize=precision != "fp16")
    if expected.keys() != found.keys():
        raise ModelError("the lowered model has other outputs than the original")
    tolerance, reason = _tolerance(original, precision)
    compared = [_compare(name, expected[name], found[name]) for name in expected]
    if any(entry.difference > tolerance for entry in compared):
        own, times, largest = _own(original, feeds, expected, precision)
        if tolerance < times * own and own < largest:
            tolerance, reason = times * own, f"the original's own rounding is {own:.1e} of its outputs"
    return Parity(compared, tolerance, reason)


def _own(
    original: Graph, feeds: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray], precision: str
) -> tuple[float, float, float]:
    """How much rounding alone moves the original's outputs, how many times that is allowed, and up to what it counts.

    A quantised original in half precision is run on inputs that are rounded to that: each number that falls on another
    step for it moves what follows.
    """
    if precision == "fp16" and any(is_quantised(node) for node in original.nodes):
        rounded = {name: array.astype(np.float16) if is_float(array.dtype) else array for name, array in feeds.items()}
        moved, times, largest = outputs(original, rounded), _STEPS, _LARGEST_STEPS
    else:
        moved, times, largest = outputs(original, feeds, optimize=False), _TIMES[precision], _LARGEST_OWN
    own = max(_compare(name, expected[name], moved[name]).difference for name in expected)
    return own, times, largest


def outputs(graph: Graph, feeds: Mapping[str, np.ndarray], *, optimize: bool = True) -> dict[str, np.ndarray]:
    """What a model computes in onnxruntime.

    Args:
        optimize: whether with onnxruntime's fusions.

    Raises:
        ModelError: it does not run on these inputs.
    """
    session = graph.session(optimize=optimize)
    own = {name: array for name, array in feeds.items() if name in graph.inputs}
    missing = sorted(set(graph.inputs) - own.keys())
    if missing:
        raise ModelError(f"no values for the input '{missing[0]}'", hint="give one array per input")
    found = session.run(graph.outputs, _typed(session, own))
    return dict(zip(graph.outputs, found, strict=True))


def _typed(session: SharedSession, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The feeds in the element types that a session takes."""
    types = {spec.name: spec.dtype for spec in input_specs(session)}
    return {name: np.asarray(array).astype(types[name], copy=False) for name, array in feeds.items()}


def _tolerance(original: Graph, precision: str) -> tuple[float, str]:
    if precision == "fp16":
        return HALF, "the lowered model computes in half precision"
    if any(is_quantised(node) for node in original.nodes):
        return QUANTISED, "the original is quantised: numbers at the edge of two steps may fall to either"
    if _has_half(original):
        return HALF, "the original computes in half precision, in part"
    return SINGLE, "single precision"


def _has_half(graph: Graph) -> bool:
    """Whether a model holds, takes, gives or makes numbers of half precision."""
    declared = [*graph.shell.graph.input, *graph.shell.graph.output]
    return (
        any(array.dtype == np.float16 for array in graph.weights.values())
        or any(value.type.tensor_type.elem_type == TensorProto.FLOAT16 for value in declared)
        or any(node.op_type == "Cast" and attribute(node, "to") == TensorProto.FLOAT16 for node in graph.nodes)
    )


def _compare(name: str, expected: np.ndarray, found: np.ndarray) -> OutputParity:
    if expected.shape != found.shape:
        raise ModelError(
            f"the lowered model's output '{name}' has the shape {list(found.shape)}, the original's "
            f"{list(expected.shape)}"
        )
    if not is_float(expected.dtype):
        share = float(np.mean(expected != found)) if expected.size else 0.0
        return OutputParity(name, share)
    a, b = expected.astype(np.float64), found.astype(np.float64)
    top = None
    if a.ndim == 2 and a.shape[1] > 1 and np.isfinite(a).all() and np.isfinite(b).all():
        top = bool((a.argmax(1) == b.argmax(1)).all())
    return OutputParity(name, _relative(a, b), top)


def _relative(a: np.ndarray, b: np.ndarray) -> float:
    odd = ~np.isfinite(a) | ~np.isfinite(b)
    if odd.any() and not np.array_equal(a[odd], b[odd], equal_nan=True):
        return float("inf")
    if odd.all():
        return 0.0
    gap = float(np.abs(a[~odd] - b[~odd]).max())
    scale = float(np.abs(a[~odd]).max())
    return gap / scale if scale else (0.0 if gap == 0 else float("inf"))
