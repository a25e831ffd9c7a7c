"""What a plan costs in accuracy, measured: the change of the model's outputs on a few samples kept in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from onnxsnp.calibration.data import Batch
from onnxsnp.evaluation.accuracy import softmax_kl
from onnxsnp.planning.plan import GroupPlan, Plan, as_cuts
from onnxsnp.reconstruction.full import Reconstruction
from onnxsnp.surgery.rewrite import mask_weights

if TYPE_CHECKING:
    from onnxsnp.analysis import Analysis


class Loss:
    """How far a plan moves the model's outputs.

    One session serves every plan: cut neurons are masked, and the masked weights are fed to the session.

    Args:
        batches: samples that the fit has not seen.
    """

    def __init__(
        self,
        analysis: Analysis,
        reconstruction: Reconstruction,
        batches: Sequence[Batch],
        *,
        threads: int | None = None,
        provider: str = "cpu",
    ) -> None:
        self._analysis, self._reconstruction = analysis, reconstruction
        self._batches = batches
        weights = {name for name, array in analysis.graph.weights.items() if array.dtype.kind == "f" and array.ndim}
        self._session = analysis.graph.session(threads=threads, provider=provider, feed=weights)
        self._reference = [self._session.run(None, batch.inputs) for batch in batches]

    def __call__(self, entries: Sequence[GroupPlan]) -> float:
        """Mean KL of the softmax of the logits where there are any, else the relative squared error of the outputs."""
        weights = masked_weights(self._analysis, entries, self._reconstruction)
        total, count = 0.0, 0
        for batch, reference in zip(self._batches, self._reference, strict=True):
            outputs = self._session.run(None, batch.inputs, weights)
            total += batch.count * sum(
                distance(want[: batch.count], got[: batch.count])
                for want, got in zip(reference, outputs, strict=True)
                if want.dtype.kind == "f" and want.ndim
            )
            count += batch.count
        return total / count


def distance(reference: np.ndarray, outputs: np.ndarray) -> float:
    """KL(softmax(reference) ‖ softmax(outputs)) in nats for [samples, classes], else squared error over variance."""
    if reference.ndim == 2 and reference.shape[1] > 1:
        return float(np.mean(softmax_kl(reference.astype(np.float64), outputs.astype(np.float64))))
    wanted = reference.astype(np.float64)
    spread = float(np.mean((wanted - wanted.mean()) ** 2)) or 1.0
    return float(np.mean((wanted - outputs) ** 2)) / spread


def masked_weights(
    analysis: Analysis, entries: Sequence[GroupPlan], reconstruction: Reconstruction
) -> dict[str, np.ndarray]:
    """The analysed graph's weights under a plan, in their original shapes, zero where something is cut.

    Normalisations average over the zeros too. Where a rotated residual stream is cut their gains make up for that.
    """
    plan = Plan("", list(entries))
    cuts = as_cuts(plan, analysis.groups)
    weights = mask_weights(analysis.graph, analysis.dependencies, cuts, reconstruction.weights(plan))
    for entry in entries:
        if entry.kept < entry.size and entry.id in reconstruction.rotations.residuals:
            for name in {norm.scale for _, norm in reconstruction.rotations.residuals[entry.id].readers}:
                gain = weights[name] * np.sqrt(entry.kept / entry.size)
                weights[name] = gain.astype(weights[name].dtype)
    return weights
