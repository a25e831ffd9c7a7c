"""What comes after the one-shot weights, step by step; a step that does not help on unseen data is dropped."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from onnxsnp.analysis import Analysis
from onnxsnp.calibration.data import Batch
from onnxsnp.planning.curves import Loss
from onnxsnp.planning.plan import Plan, as_cuts
from onnxsnp.reconstruction.sequential import refit_in_order


@dataclass(frozen=True)
class Step:
    """One compensation step and what it did.

    Attributes:
        name: of the step.
        before, after: loss on samples that no fit has seen (KL in nats for logits, else relative squared error).
        kept: whether its weights are used.
    """

    name: str
    before: float
    after: float
    kept: bool


@dataclass
class Refined:
    """Weights after all steps.

    Attributes:
        updates: by name, in their original shapes.
        steps: in the order in which they were tried.
    """

    updates: dict[str, np.ndarray]
    steps: list[Step] = field(default_factory=list)

    def report(self) -> list[dict[str, Any]]:
        """The steps as plain data for JSON."""
        return [asdict(step) for step in self.steps]

    def notes(self) -> list[str]:
        """One line for each step that was dropped."""
        return [
            f"{step.name} was dropped: on unseen samples the loss went from {step.before:.4g} to {step.after:.4g}"
            for step in self.steps
            if not step.kept
        ]


def refine(
    analysis: Analysis,
    plan: Plan,
    updates: Mapping[str, np.ndarray],
    batches: Iterable[Batch],
    loss: Loss,
    *,
    streams: Mapping[int, np.ndarray] | None = None,
    threads: int | None = None,
    provider: str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> Refined:
    """Refit in graph order, and keep the result if it is better on unseen samples.

    Args:
        updates: the one-shot weights, in their original shapes.
        batches: the samples to fit on; gone through once.
        loss: measures on samples that no fit has seen.
        streams: see `refit_in_order`.
    """
    found = Refined(dict(updates))
    cuts = as_cuts(plan, analysis.groups)
    refit = refit_in_order(
        analysis,
        cuts,
        updates,
        batches,
        streams=streams,
        threads=threads,
        provider=provider,
        progress=progress,
    )
    if refit:
        _judge(found, "sequential refit", {**found.updates, **refit}, plan, loss)
    return found


def _judge(found: Refined, name: str, updates: dict[str, np.ndarray], plan: Plan, loss: Loss) -> None:
    entries: Sequence[Any] = plan.groups
    before = found.steps[-1].after if found.steps and found.steps[-1].kept else loss.of(entries, found.updates)
    after = loss.of(entries, updates)
    found.steps.append(Step(name, before, after, after < before))
    if after < before:
        found.updates = updates
