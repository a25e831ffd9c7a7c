"""How many steps a time budget allows, and the learning rate of each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from onnxsnp.recovery.optimise import one_cycle

_FINE = 100_000  # points of the cycle that are told apart
_OFF = 0.1  # share by which the number of steps may be off before it is set anew


@dataclass
class Schedule:
    """Steps along one cycle of the learning rate.

    Attributes:
        steps: how many there will be.
        peak: the highest rate.
        done: how many there were.
        place: share of the cycle that is behind them.
        changed: how often the number of steps was set anew.
    """

    steps: int
    peak: float
    done: int = 0
    place: float = 0.0
    changed: int = 0

    @property
    def rate(self) -> float:
        """Learning rate of the next step."""
        return one_cycle(round(self.place * _FINE), _FINE + 1, self.peak)

    def advance(self) -> None:
        """A step was made: what is left of the cycle is spread over the steps that are left."""
        self.done += 1
        self.place += (1 - self.place) / max(self.steps - self.done + 1, 1)

    def fit(self, pace: float, left: float) -> None:
        """Set the number of steps anew if it would miss the end by more than a tenth of the steps that are left.

        Args:
            pace: seconds per step so far.
            left: seconds.
        """
        possible = max(int(left / max(pace, 1e-9)), 0)
        if abs(possible - (self.steps - self.done)) > _OFF * (self.steps - self.done):
            self.steps, self.changed = self.done + possible, self.changed + 1

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))
