"""The options of a recovery; the fields mirror the command line."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from onnxsnp.calibration.preprocess import Preprocess
from onnxsnp.errors import DataError, PlanError

_UNITS = {"s": 1 / 60, "m": 1.0, "h": 60.0}
LEARNING_RATE = 1.5e-4
BATCH = 16


@dataclass
class RecoverOptions:
    """How to recover; the fields mirror the command line (see `onnxsnp recover --help`).

    Attributes:
        calibration: samples to learn from, as for `prune`; no labels are read.
        minutes: how long to train. The number of steps that fit is measured, so two runs are not the same to the bit.
        steps: make exactly so many steps instead; on one machine and thread count a seed then gives one file.
        samples: how many to use; all if None.
        learning_rate: highest rate of the cycle.
        batch: samples of a step.
        augment: vary images.
        resume: go on from the checkpoint beside the output.
    """

    calibration: Any = None
    minutes: float = 10.0
    steps: int | None = None
    samples: int | None = None
    preprocess: str | Preprocess | None = None
    eval_data: Any = None
    learning_rate: float = LEARNING_RATE
    batch: int = BATCH
    augment: bool = True
    resume: bool = False
    threads: int | None = None
    seed: int = 0
    input_shapes: Mapping[str, Sequence[int]] | None = None

    def check(self) -> None:
        """Refuse what can be refused without looking at the model.

        Raises:
            PlanError: a number out of range.
            DataError: there is nothing to learn from.
        """
        if self.calibration is None:
            raise DataError(
                "recovery learns from real data, and none was given",
                hint="give images like those the model will see with --calibration; no labels are needed",
            )
        for name, value in (("minutes", self.minutes), ("learning rate", self.learning_rate)):
            if not (math.isfinite(value) and value > 0):
                raise PlanError(f"{name} must be a number above 0, got {value}")
        for name, count in (("steps", self.steps), ("samples", self.samples), ("batch", self.batch)):
            if count is not None and count < 1:
                raise PlanError(f"{name} must be 1 or more, got {count}")


def minutes(text: str | float) -> float:
    """A duration in minutes: `10m`, `90s`, `1h`; a bare number is minutes.

    Raises:
        PlanError: it is none.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([smh]?)\s*", str(text).lower())
    value = float(found[1]) * _UNITS[found[2] or "m"] if found else 0.0
    if not math.isfinite(value) or value <= 0:
        raise PlanError(f"cannot read the duration '{text}'", hint="write it as 10m, 90s or 1h")
    return value
