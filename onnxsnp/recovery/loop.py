"""The steps of a recovery: batches, Adam, judging on the part that is held back, the best state, checkpoints."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from onnxsnp.errors import DataError
from onnxsnp.recovery import checkpoint
from onnxsnp.recovery.augment import Augmentation
from onnxsnp.recovery.checkpoint import Saved
from onnxsnp.recovery.feed import Feed, Inputs
from onnxsnp.recovery.optimise import Adam
from onnxsnp.recovery.schedule import Schedule
from onnxsnp.recovery.student import Judgement, Student

_JUDGED = 20  # times in a run, fewer where that takes a larger share of the time than the next
_JUDGING = 0.15
_TIMED = 3  # steps that are made to see how long one takes, the first not counted
_RISE, _FALL = 1.01, 0.99  # changes of a loss that count


@dataclass
class Point:
    """One place of the curves.

    Attributes:
        step: steps made.
        seconds: since the start.
        training: mean loss of the batches since the last point; None at the start.
        held: on the part that is held back.
    """

    step: int
    seconds: float
    training: float | None
    held: Judgement


@dataclass
class Outcome:
    """The end of a run; the student's parameters are the best state.

    Attributes:
        curve: from before the first step to the last.
        best: index of the state that was kept.
        schedule: as it was in the end.
        passes: over the data.
        interrupted: whether it was stopped before the end.
    """

    curve: list[Point]
    best: int
    schedule: Schedule
    passes: float
    interrupted: bool

    @property
    def more_images(self) -> bool:
        """Whether the training data was learnt by heart: its loss fell on while that on unseen samples rose."""
        last, kept = self.curve[-1], self.curve[self.best]
        if last is kept or last.training is None or kept.training is None:
            return False
        return last.held.loss > _RISE * kept.held.loss and last.training < _FALL * kept.training


@dataclass
class Loop:
    """A run.

    Args:
        batch: samples of a step; more than the feed's size are run one after the other, and their gradients added.
        seconds, steps: one of them says when to stop; `steps` goes first.
        settings: what a checkpoint must have been made with.
        path: where the checkpoint goes; None: none.
        show: called after each step with the outcome so far, at points of the curve with `True`.
    """

    student: Student
    feed: Feed
    augment: Augmentation | None
    batch: int
    peak: float
    seed: int
    seconds: float
    steps: int | None
    settings: dict[str, Any] = field(default_factory=dict)
    path: Path | None = None
    show: Callable[[Loop, bool], None] = lambda loop, judged: None

    def __post_init__(self) -> None:
        self.adam = Adam(self.student.parameters)
        self.schedule = Schedule(self.steps or 1, self.peak)
        self.curve: list[Point] = []
        self.best_index, self.best = 0, self._copy()
        self.place = (0, 0)
        self._before = 0.0  # seconds of the runs that this one takes up
        self._first, self._judged = 0, _JUDGED
        self._start = self._begun = time.monotonic()
        self._losses: list[float] = []

    @property
    def elapsed(self) -> float:
        return self._before + time.monotonic() - self._start

    @property
    def left(self) -> float:
        """Seconds to the end, by the steps so far."""
        made = self.schedule.done - self._first
        pace = (time.monotonic() - self._begun) / made if made else 0.0
        return pace * (self.schedule.steps - self.schedule.done)

    def run(self, saved: Saved | None = None) -> Outcome:
        """All steps; the parameters are then those of the best state.

        An interrupt ends the steps, nothing else: what was best so far is the result.
        """
        interrupted = False
        try:
            self._resume(saved) if saved else self._begin()
            self._first, self._begun = self.schedule.done, time.monotonic()
            self._steps()
        except KeyboardInterrupt:
            if not self.curve:
                raise  # nothing is known yet
            interrupted = True
        for name, array in self.best.items():
            self.student.parameters[name][...] = array
        samples = self.schedule.done * self.repeats * self.feed.size
        return Outcome(self.curve, self.best_index, self.schedule, samples / self.feed.samples, interrupted)

    @property
    def repeats(self) -> int:
        """Runs of a step."""
        return -(-self.batch // self.feed.size)

    def _begin(self) -> None:
        start = time.monotonic()
        self._judge()
        judging = time.monotonic() - start
        if self.steps is None:
            self._judged = int(np.clip(_JUDGING * self.seconds / judging, 4, _JUDGED))
            pace, left = self._pace(), self.seconds - self.elapsed - self._judged * judging
            self.schedule.steps = max(int(left / pace), 1)

    def _pace(self) -> float:
        """Seconds of a step; nothing is learnt in these steps."""
        taken = []
        with closing(self._data()) as data:
            for _ in range(_TIMED):
                start = time.monotonic()
                self._gradients(data)
                taken.append(time.monotonic() - start)
        self.place = (0, 0)
        return float(np.mean(taken[1:]))

    def _steps(self) -> None:
        schedule = self.schedule
        with closing(self._data()) as data:
            while schedule.done < schedule.steps:
                loss, gradients = self._gradients(data)
                if not np.isfinite(loss):
                    raise DataError(
                        f"the loss is not finite after {schedule.done} steps", hint="give a smaller --learning-rate"
                    )
                self.adam.step(gradients, schedule.rate)
                self._losses.append(loss)
                schedule.advance()
                if schedule.done == schedule.steps or schedule.done % max(schedule.steps // self._judged, 1) == 0:
                    self._judge()
                    if self.steps is None and schedule.done < schedule.steps:
                        pace = (time.monotonic() - self._begun) / (schedule.done - self._first)
                        schedule.fit(pace, self.seconds - self.elapsed)
                    self._save()
                else:
                    self.show(self, False)

    def _data(self) -> Generator[Inputs]:
        """Batches from the place on, varied; the same ones whenever the run gets there."""
        with closing(self.feed.batches(*self.place)) as batches:
            for place, inputs in batches:
                self.place = place
                rng = np.random.default_rng([self.seed, *place])
                yield inputs if self.augment is None else self.augment(inputs, rng)

    def _gradients(self, data: Iterator[Inputs]) -> tuple[float, dict[str, np.ndarray]]:
        """Mean loss and gradients of one step's batches."""
        total, sums = 0.0, dict[str, np.ndarray]()
        for inputs in islice(data, self.repeats):
            loss, gradients = self.student.learn(inputs)
            total += loss / self.repeats
            if self.repeats == 1:
                return total, gradients
            for name, gradient in gradients.items():
                share = gradient / np.float32(self.repeats)
                sums[name] = sums[name] + share if name in sums else share
        return total, sums

    def _judge(self) -> None:
        """A point of the curve; the state is kept if it is the best."""
        held = self.student.judge(self.feed.held())
        training = float(np.mean(self._losses)) if self._losses else None
        self._losses = []
        self.curve.append(Point(self.schedule.done, round(self.elapsed, 3), training, held))
        if held.loss < self.curve[self.best_index].held.loss:
            self.best_index, self.best = len(self.curve) - 1, self._copy()
        self.show(self, True)

    def _copy(self) -> dict[str, np.ndarray]:
        return {name: array.copy() for name, array in self.student.parameters.items()}

    def _save(self) -> None:
        if self.path is None:
            return
        arrays = {"now": self.student.parameters, "best": self.best, "mean": self.adam.mean, "square": self.adam.square}
        progress = {
            "schedule": self.schedule.to_dict(),
            "place": list(self.place),
            "curve": [asdict(point) for point in self.curve],
            "best": self.best_index,
            "seconds": self.elapsed,
            "judged": self._judged,
        }
        checkpoint.write(self.path, self.settings, progress, arrays)

    def _resume(self, saved: Saved) -> None:
        progress = saved.progress
        for group, held in (("now", self.student.parameters), ("mean", self.adam.mean), ("square", self.adam.square)):
            for name, array in held.items():
                array[...] = saved.arrays[group][name]
        self.best = {name: np.array(array) for name, array in saved.arrays["best"].items()}
        self.schedule = Schedule(**progress["schedule"])
        self.adam.count = self.schedule.done
        self.place = (progress["place"][0], progress["place"][1])
        self.curve = [Point(**{**point, "held": Judgement(**point["held"])}) for point in progress["curve"]]
        self.best_index, self._before = progress["best"], progress["seconds"]
        self._judged = progress["judged"]
        self._start = time.monotonic()
