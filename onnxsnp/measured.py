"""What is measured before anything is planned or cut, and which samples that takes; several runs can share it."""

from __future__ import annotations

from dataclasses import dataclass

from onnxsnp.analysis import Analysis
from onnxsnp.calibration.data import Batch, Dataset
from onnxsnp.calibration.statistics import Statistics
from onnxsnp.evaluation.remembered import Memory, RememberedSession
from onnxsnp.options import Options
from onnxsnp.planning.plan import Plan
from onnxsnp.runtime import Session

_TUNING = 32  # samples the fit does not see, for measuring sensitivities and what refitting is worth
_JUDGING = 32  # samples neither fit nor allocation sees, for judging the result; half as many where nothing is fitted


@dataclass
class Measured:
    """What runs share that differ in ratio, criterion or compensation only.

    Attributes:
        analysis: the model (with the latency of its layers, where that is the cost).
        mark: its fingerprint.
        plan: the plan that was given; None where each run makes its own.
        data: calibration samples, of which the first `seen` are fitted on.
        statistics: of the `seen` samples.
        sample: one batch, for the proof.
        unseen: batches no fit has seen, on which plans are measured.
        held: batches neither fit nor plan has seen, on which results are compared.
        memory: outputs of the original that were computed before (`RememberedSession`); None remembers nothing.
    """

    analysis: Analysis
    mark: str
    plan: Plan | None
    data: Dataset
    seen: int
    statistics: Statistics
    sample: Batch
    unseen: list[Batch]
    held: list[Batch]
    memory: Memory | None = None

    def remembered(self, session: Session) -> Session:
        """The original's session; what it was asked before it need not compute again."""
        return session if self.memory is None else RememberedSession(session, self.memory)


def judging(options: Options) -> int:
    return _JUDGING // (2 if options.compensation == "none" else 1)


def tuning(options: Options) -> int:
    """As many with a given plan as without, so that both see the same data."""
    return _TUNING if options.compensation == "full" else 0


def fitted(data: Dataset, wanted: int, held: int) -> int:
    """Samples to fit on: those asked for, or three quarters where there are too few to hold back all we would."""
    return min(wanted, data.samples - min(held, data.samples // 4))
