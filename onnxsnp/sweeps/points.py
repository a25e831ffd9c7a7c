"""The plans of a sweep: every ratio with every criterion and every compensation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from decimal import Decimal, InvalidOperation
from itertools import product

from onnxsnp.errors import PlanError
from onnxsnp.options import Options

_MOST = 1000  # plans in one sweep


@dataclass(frozen=True)
class Point:
    """One plan of a sweep, and the options that make it."""

    ratio: float
    criterion: str
    compensation: str

    @property
    def name(self) -> str:
        """Short and unique in a sweep; also the name of its files."""
        return f"{self.criterion}-{self.compensation}-{100 * self.ratio:.10g}"

    def options(self, base: Options) -> Options:
        """The options of this plan's run."""
        return replace(base, ratio=self.ratio, criterion=self.criterion, compensation=self.compensation)


def parse_ratios(text: str) -> list[float]:
    """`0.1:0.8:0.1` (from, to and with, in steps of), `0.2,0.35,0.5`, or both forms mixed; sorted, each once.

    Raises:
        PlanError: it cannot be read, or a ratio lies outside 0 < r < 1.
    """
    found: set[Decimal] = set()
    for part in text.split(","):
        try:
            numbers = [Decimal(one.strip()) for one in part.split(":")]
        except InvalidOperation:
            raise _unreadable(text) from None
        if len(numbers) not in (1, 3) or not all(one.is_finite() for one in numbers):
            raise _unreadable(text)
        start, stop, step = numbers if len(numbers) == 3 else (numbers[0], numbers[0], Decimal(1))
        if step <= 0 or stop < start:
            raise PlanError(f"the ratios '{part}' do not go up", hint="write FROM:TO:STEP, for example 0.1:0.8:0.1")
        if (stop - start) / step >= _MOST:
            raise PlanError(f"the ratios '{part}' are more than {_MOST}", hint="take larger steps")
        found |= {start + step * number for number in range(int((stop - start) / step) + 1)}
    return checked_ratios([float(one) for one in found])


def checked_ratios(ratios: Sequence[float]) -> list[float]:
    """Ratios in order, each once.

    Raises:
        PlanError: there are none, or one lies outside 0 < r < 1.
    """
    if not ratios:
        raise PlanError("a sweep needs ratios", hint="for example --ratios 0.1:0.8:0.1")
    for ratio in ratios:
        if not 0 < ratio < 1:
            raise PlanError(f"a ratio must lie between 0 and 1, got {ratio:g}", hint="for example --ratios 0.1:0.8:0.1")
    return sorted(set(ratios))


def points(ratios: Sequence[float], criteria: Sequence[str], compensations: Sequence[str]) -> list[Point]:
    """All combinations, small cuts first.

    Raises:
        PlanError: there are none, or far too many.
    """
    if not criteria or not compensations:
        raise PlanError("a sweep needs at least one criterion and one compensation")
    found = [
        Point(ratio, criterion, compensation)
        for ratio, criterion, compensation in product(
            checked_ratios(ratios), dict.fromkeys(criteria), dict.fromkeys(compensations)
        )
    ]
    if len(found) > _MOST:
        raise PlanError(f"these are {len(found)} plans", hint=f"a sweep takes at most {_MOST}")
    return found


def shared(base: Options, wanted: Sequence[Point]) -> list[Options]:
    """The options of every point, on the same samples: as many to fit on as the one that wants most.

    Raises:
        PlanError: an unknown name, or a number out of range.
    """
    runs = [point.options(base) for point in wanted]
    for run in runs:
        run.check()
    samples = max(run.fit_samples for run in runs)
    return [replace(run, samples=samples) for run in runs]


def _unreadable(text: str) -> PlanError:
    return PlanError(f"cannot read the ratios '{text}'", hint="write 0.1:0.8:0.1 or 0.2,0.35,0.5")
