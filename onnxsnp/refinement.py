"""What comes after the one-shot weights, step by step; a step that does not help on unseen data is dropped."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
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
        """The steps as plain data for JSON; a loss that is not finite is None."""
        return [
            {
                name: None if isinstance(value, float) and not isfinite(value) else value
                for name, value in vars(step).items()
            }
            for step in self.steps
        ]

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
    batches: Callable[[], Iterable[Batch]],
    loss: Loss,
    *,
    streams: Mapping[int, np.ndarray] | None = None,
    threads: int | None = None,
    provider: str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> Refined:
    """Refit in graph order, with feed-forward branches fitted as a whole; if that does not help, without.

    Args:
        updates: the one-shot weights, in their original shapes.
        batches: the samples to fit on; gone through once for each attempt.
        loss: measures on samples that no fit has seen.
        streams: see `refit_in_order`.

    Returns:
        The weights that are best on the unseen samples, and what each attempt did.
    """
    found = Refined(dict(updates))
    cuts = as_cuts(plan, analysis.groups)
    for name, local in (("fit of feed-forward branches and sequential refit", True), ("sequential refit", False)):
        refit = refit_in_order(
            analysis,
            cuts,
            updates,
            batches(),
            streams=streams,
            local=local,
            threads=threads,
            provider=provider,
            progress=progress,
        )
        if not refit:
            break
        _judge(found, name, {**found.updates, **refit}, plan, loss)
        if found.steps[-1].kept:
            break
    return found


def _judge(found: Refined, name: str, updates: dict[str, np.ndarray], plan: Plan, loss: Loss) -> None:
    entries: Sequence[Any] = plan.groups
    before = found.steps[-1].before if found.steps else loss.of(entries, found.updates)
    after = loss.of(entries, updates)
    found.steps.append(Step(name, before, after, after < before))
    if after < before:
        found.updates = updates
