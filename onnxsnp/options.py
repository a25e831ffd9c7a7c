"""The options of a pruning run; the fields mirror the command line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnxsnp.calibration.preprocess import Preprocess
from onnxsnp.deploy.targets import PRECISIONS, Target, get_target
from onnxsnp.errors import PlanError
from onnxsnp.planning.allocation import check_ratio, unknown
from onnxsnp.planning.plan import Plan
from onnxsnp.planning.selection import COMPENSATIONS
from onnxsnp.recovery.options import RecoverOptions, minutes
from onnxsnp.scoring.criteria import CRITERIA

PAPER_SAMPLES = 64
DEFAULT_SAMPLES = 256
COSTS = ("macs", "params", "latency")


@dataclass
class Options:
    """How to prune; the fields mirror the command line (see `onnxsnp prune --help`)."""

    ratio: float | None = None
    allocation: str = "auto"
    of: str = "macs"
    latency_table: str | Path | None = None
    host: str | None = None
    scope: str | Sequence[str] | None = None
    compensation: str = "full"
    criterion: str = "snp"
    rank: int | None = None
    calibration: Any = None
    samples: int | None = None
    preprocess: str | Preprocess | None = None
    eval_data: Any = None
    multiple_of: int | None = None
    target: str | Path | Target | None = None
    precision: str | None = None
    plan: str | Path | Plan | None = None
    threads: int | None = None
    provider: str = "cpu"
    seed: int = 0
    input_shapes: Mapping[str, Sequence[int]] | None = None
    latency: bool = True
    recover: str | float | None = None
    attention_maps: int = 0  # samples whose attention maps the record holds

    @property
    def fit_samples(self) -> int:
        """Calibration samples to fit on: as many as the paper uses, or what the closed forms need."""
        return self.samples or (PAPER_SAMPLES if self.compensation == "none" else DEFAULT_SAMPLES)

    @property
    def device(self) -> Target | None:
        """The profile of the target, if there is one.

        Raises:
            PlanError: there is no such profile.
        """
        return None if self.target is None else get_target(self.target)

    @property
    def planned_precision(self) -> str:
        """What widths have to suit: what was asked, else fp16 where the target has it; fp32 takes any width."""
        native = self.device is not None and "fp16" in self.device.precisions
        return self.precision or ("fp16" if native else "fp32")

    @property
    def multiple(self) -> int:
        """Sizes are multiples of this: what was asked, else what the target wants."""
        if self.multiple_of is not None:
            return self.multiple_of
        return 1 if self.device is None else self.device.step(self.planned_precision)

    def check(self) -> None:
        """Refuse what can be refused without looking at the model.

        Raises:
            PlanError: an unknown name, or a number out of range.
        """
        if self.criterion not in CRITERIA:
            raise unknown("criterion", self.criterion, CRITERIA)
        if self.compensation not in COMPENSATIONS:
            raise unknown("compensation", self.compensation, COMPENSATIONS)
        if self.of not in COSTS:
            raise unknown("cost", self.of, COSTS)
        if self.latency_table is not None and self.of != "latency":
            raise PlanError(f"a latency table says nothing about {self.of}", hint="add --of latency")
        if self.host is not None:
            self._check_host()
        if self.provider not in ("cpu", "cuda"):
            raise unknown("provider", self.provider, ("cpu", "cuda"))
        if self.precision is not None:
            self._check_precision(self.precision)
        if self.multiple < 1:
            raise PlanError(f"--multiple-of must be 1 or more, got {self.multiple_of}")
        if self.samples is not None and self.samples < 1:
            raise PlanError(f"samples must be 1 or more, got {self.samples}")
        if self.recover is not None:
            self._check_recovery(self.recover)
        if self.ratio is not None:
            check_ratio(self.ratio)
        elif self.plan is None and self.allocation in ("auto", "uniform"):
            raise PlanError("no ratio was given", hint="say how much to remove, for example --ratio 0.3")

    def _check_precision(self, precision: str) -> None:
        if precision not in PRECISIONS:
            raise unknown("precision", precision, PRECISIONS)
        if self.device is None:
            raise PlanError("a precision says nothing without a target", hint="add --target, for example jetson-orin")
        if precision not in self.device.precisions:
            has = ", ".join(self.device.precisions)
            raise PlanError(f"{self.device.name} does not run {precision}", hint=f"it has {has}")

    def _check_recovery(self, duration: str | float) -> None:
        minutes(duration)
        if self.calibration is None:
            raise PlanError("recovery learns from real data", hint="add --calibration; no labels are needed")
        if hasattr(self.calibration, "__next__"):
            raise PlanError("recovery reads the data more than once, an iterator can be read once", hint="give a list")

    @property
    def recovery(self) -> RecoverOptions:
        """How the pruned model is recovered.

        Raises:
            PlanError: the duration makes no sense.
        """
        return RecoverOptions(
            calibration=self.calibration,
            minutes=minutes(self.recover or 0),
            preprocess=self.preprocess,
            threads=self.threads,
            seed=self.seed,
            input_shapes=self.input_shapes,
        )

    def _check_host(self) -> None:
        if self.of != "latency":
            raise PlanError("a device is there to measure latency", hint="add --of latency, or leave --host out")
        if self.device is None:
            raise PlanError("layers are built for a target", hint="add --target, for example jetson-nano")
        if self.device.runtime != "tensorrt":
            raise PlanError(f"{self.device.name} has no trtexec to measure with by ssh", hint="use another --target")
