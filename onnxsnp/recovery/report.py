"""What a recovery says about itself, as plain data for the run record."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from onnxsnp.calibration.data import Dataset
from onnxsnp.recovery.feed import Feed
from onnxsnp.recovery.loop import Loop, Outcome
from onnxsnp.recovery.student import Student

if TYPE_CHECKING:
    from onnxsnp.recovery.options import RecoverOptions


def report(
    outcome: Outcome, student: Student, feed: Feed, loop: Loop, options: RecoverOptions, data: Dataset
) -> dict[str, Any]:
    """Settings, both curves, what was compared and what was not, and notes for people."""
    curve, best = outcome.curve, outcome.curve[outcome.best]
    return {
        "minutes": None if options.steps else options.minutes,
        "steps": outcome.schedule.done,
        "planned_steps": outcome.schedule.steps,
        "steps_changed": outcome.schedule.changed,
        "passes": round(outcome.passes, 3),
        "seconds": curve[-1].seconds,
        "learning_rate": options.learning_rate,
        "batch": loop.batch,
        "augmented": loop.augment is not None,
        "seed": options.seed,
        "data": data.description,
        "samples": feed.samples,
        "held_back": feed.held_samples,
        "compared": student.matched,
        "left_out": student.left_out,
        "trained": len(student.parameters),
        "untrained": student.untrained,
        "curve": [asdict(point) for point in curve],
        "before": asdict(curve[0].held),
        "after": asdict(best.held),
        "best_step": best.step,
        "interrupted": outcome.interrupted,
        "more_images": outcome.more_images,
        "notes": _notes(outcome, student, loop),
    }


def _notes(outcome: Outcome, student: Student, loop: Loop) -> list[str]:
    curve, best, schedule = outcome.curve, outcome.curve[outcome.best], outcome.schedule
    notes = []
    if outcome.interrupted:
        on = "; --resume goes on" if loop.path is not None and loop.path.is_file() else ""
        notes.append(f"interrupted after {schedule.done} of {schedule.steps} steps{on}")
    if outcome.best == 0:
        notes.append("no state was better on the samples held back than the start, which is what was written")
    elif best.step < curve[-1].step:
        notes.append(f"the best state on the samples held back was that after {best.step} steps of {curve[-1].step}")
    if outcome.more_images:
        notes.append("the loss fell on and that on unseen samples rose: more images would have helped")
    for name, reason in student.left_out.items():
        notes.append(f"{name} was not compared: {reason}")
    if student.untrained:
        name, reason = next(iter(student.untrained.items()))
        more = f" (and {len(student.untrained) - 1} more)" if len(student.untrained) > 1 else ""
        notes.append(f"not trained: {name}{more}: {reason}")
    return notes
