"""Times of many small models on a device: one push, each built once, all timed in turn, and nothing measured twice.

What is measured is the time on the GPU: copies from and to the host belong to a model as a whole, not to its layers.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from onnxsnp.atomic import whole_file
from onnxsnp.deploy.bundle import BundleModel, Timing, write_bundle
from onnxsnp.deploy.lint import lint
from onnxsnp.deploy.lower import lower
from onnxsnp.deploy.manifest import RESULTS
from onnxsnp.deploy.remote import ConnectionLost, Remote, remote_folder
from onnxsnp.deploy.ssh import Ssh
from onnxsnp.deploy.targets import Target
from onnxsnp.errors import DeviceError, ModelError
from onnxsnp.evaluation.layers import TimedModel
from onnxsnp.options import Options

TIMING = Timing(rounds=3, seconds=1, iterations=20, warm_up=200, times_only=True)
ATTEMPTS = 3  # runs in one folder, where the connection breaks
_MOST = 100  # runs of a model in one round that count

Rounds = list[list[float]]  # milliseconds of the runs of each round


@dataclass
class SshTimer:
    """A `onnxsnp.evaluation.layers.Timer` on a device that is reached by ssh.

    Attributes:
        target: of the models, which are lowered to it.
        host: as ssh takes it.
        keep: a file for what is measured, so that a run that was cut off goes on where it was; `forget` removes it.
        device: what the device says of itself, once something was measured.
    """

    target: Target
    host: str
    precision: str = "fp32"
    ssh: Ssh | None = None
    keep: Path | None = None
    timing: Timing = field(default_factory=lambda: TIMING)
    device: dict[str, str] = field(default_factory=dict)
    _known: dict[str, Rounds] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.keep is not None and self.keep.exists():
            self._known, self.device = _read_kept(self.keep)

    @property
    def machine(self) -> str:
        """The device in words, as it describes itself."""
        name = self.device.get("model") or self.device.get("gpu") or self.host
        mode = f", power mode {self.device['power mode']}" if self.device.get("power mode") else ""
        return f"{name}{mode}, {self.precision}, TensorRT {self.device.get('tensorrt', 'of unknown version')}"

    def __call__(self, models: Sequence[TimedModel], progress: Callable[[int, int], None] | None = None) -> np.ndarray:
        """Milliseconds on the GPU of every run, [runs, models]; the runs of a round stand together.

        Raises:
            ModelError: a model cannot be lowered for the target.
            DeviceError: the device was not reached or gave up; what was measured so far is in `keep`.
        """
        lowered = [self._lowered(model) for model in models]
        keys = [self._key(one.proto) for one in lowered]
        waiting = {key: one for key, one in zip(keys, lowered, strict=True) if self._lacks(key)}
        if waiting:
            self._measure(waiting, progress)
        return side_by_side([self._known[key][: self.timing.rounds] for key in keys])

    def forget(self) -> None:
        """Remove what was kept, once it is part of something larger."""
        if self.keep is not None:
            self.keep.unlink(missing_ok=True)

    def _lowered(self, model: TimedModel) -> BundleModel:
        """For the target, at the sizes of the inputs; shapes and indices that enter are part of the model.

        TensorRT would take a list of integers that it is given for sizes that change from run to run.
        """
        fixed = {name for name, array in model.inputs.items() if array.dtype.kind in "iu" and array.ndim <= 1}
        proto = model.graph.to_proto()
        free = [entry for entry in proto.graph.input if entry.name not in fixed]
        del proto.graph.input[:]
        proto.graph.input.extend(free)
        proto.graph.initializer.extend(numpy_helper.from_array(model.inputs[name], name) for name in sorted(fixed))
        shapes = {name: array.shape for name, array in model.inputs.items() if name not in fixed}
        done = lower(proto, self.target, precision=self.precision, input_shapes=shapes)
        _refuse_untaken(done.proto, self.target)
        wanted = {entry.name: entry.type.tensor_type.elem_type for entry in done.proto.graph.input}
        feeds = {
            name: model.inputs[name].astype(onnx.helper.tensor_dtype_to_np_dtype(kind)) for name, kind in wanted.items()
        }
        return BundleModel("model", done.proto, feeds, keep_fp32=done.keep_fp32)

    def _key(self, proto: onnx.ModelProto) -> str:
        place = f"{self.host} {self.target.name} {self.precision} {self.timing}"
        return hashlib.sha256(place.encode() + proto.SerializeToString(deterministic=True)).hexdigest()

    def _lacks(self, key: str) -> int:
        """Rounds that are still to be measured."""
        return max(self.timing.rounds - len(self._known.get(key, [])), 0)

    def _measure(
        self,
        waiting: Mapping[str, BundleModel],
        progress: Callable[[int, int], None] | None,
    ) -> None:
        labels = {f"m{number}": key for number, key in enumerate(waiting)}
        models = [replace(waiting[key], label=label) for label, key in labels.items()]
        timing = replace(self.timing, rounds=max(map(self._lacks, waiting)))
        counter = _Counter(labels, timing.rounds, progress)
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place) / "layers"
            write_bundle(folder, models, self.target, self.precision, timing=timing)
            try:
                with remote_folder(self.host, self.ssh) as remote:
                    remote.push(folder)
                    _build(remote, counter)
                    self.device = _facts(remote.command(f"cat {remote.path}/{RESULTS}/device.txt", "read"))
            except DeviceError as error:
                if self.keep is not None and (counter.measured or self._known):
                    again = f"run the command again to go on: what was measured is in {self.keep}"
                    error.hint = f"{error.hint}; {again}" if error.hint else again
                raise
            finally:
                for key, rounds in counter.measured.items():
                    self._known.setdefault(key, []).extend(rounds)
                self._write_kept()
        missing = [label for label, key in labels.items() if self._lacks(key)]
        if missing:
            raise DeviceError(f"{len(missing)} of {len(labels)} models have no times from {self.host}")

    def _write_kept(self) -> None:
        if self.keep is not None and self._known:
            with whole_file(self.keep) as part:
                part.write_text(json.dumps({"kind": _KEPT, "device": self.device, "models": self._known}))


_KEPT = "onnxsnp times of layers"


class _Counter:
    """Reads along while build.sh runs: what is built, and the times as they come."""

    def __init__(self, labels: Mapping[str, str], rounds: int, progress: Callable[[int, int], None] | None) -> None:
        self._labels, self._progress = labels, progress
        self._total = len(labels) * (1 + rounds)
        self._built: set[str] = set()
        self._times: dict[tuple[str, int], list[float]] = {}

    def __call__(self, line: str) -> None:
        label, _, rest = line.partition(": ")
        if label in self._labels and rest.startswith(("built", "the engine is there")):
            self._built.add(label)
        words = line.split()
        if len(words) > 3 and words[0] == "times" and words[1] in self._labels and words[2].isdigit():
            with contextlib.suppress(ValueError):  # a line that was cut off
                self._times[words[1], int(words[2])] = [float(word) for word in words[3:]]
        if self._progress is not None:
            self._progress(len(self._built) + len(self._times), self._total)

    @property
    def measured(self) -> dict[str, Rounds]:
        """By key, the rounds that came whole."""
        found: dict[str, Rounds] = {}
        for (label, _), times in sorted(self._times.items()):
            found.setdefault(self._labels[label], []).append(times)
        return found


def ssh_timer(
    target: Target,
    host: str,
    precision: str = "fp32",
    *,
    ssh: Ssh | None = None,
    keep: str | Path | None = None,
) -> SshTimer:
    """A timer for `onnxsnp.planning.latency.measure_table` on a device.

    Args:
        target: profile of the device.
        host: as ssh takes it.
        keep: file for what is measured, should the run be cut off.
    """
    return SshTimer(target, host, precision, ssh, None if keep is None else Path(keep))


def device_timer(options: Options) -> SshTimer | None:
    """The timer of the device that the options name, if they do.

    With a table to write, what was measured is kept beside it (.part) until the table is there.
    """
    if options.host is None or options.device is None:
        return None
    keep = None if options.latency_table is None else f"{options.latency_table}.part"
    return ssh_timer(options.device, options.host, options.precision or "fp32", keep=keep)


def side_by_side(models: Sequence[Rounds]) -> np.ndarray:
    """As many runs of each model in each round as the one with the fewest has, [runs, models]."""
    rows = []
    for together in zip(*models, strict=True):
        count = min(_MOST, *(len(runs) for runs in together))
        rows.append(np.asarray([runs[:count] for runs in together]).T)
    return np.concatenate(rows)


def _build(remote: Remote, counter: _Counter) -> None:
    """Run build.sh to its end, again where the connection breaks: engines and times that are there stay."""
    for attempt in range(ATTEMPTS):
        try:
            status = remote.build(["--keep-times"], counter)
        except ConnectionLost:
            if attempt == ATTEMPTS - 1:
                raise
            remote.settle()
            continue
        if status != 0:
            raise DeviceError(f"measuring on {remote.host} failed: {remote.complaint}")
        return


def _refuse_untaken(proto: onnx.ModelProto, target: Target) -> None:
    """What the device's importer would misread or refuse is found before anything is sent there."""
    for finding in lint(proto, target):
        if finding.severity == "error":
            raise ModelError(f"a layer cannot be measured on {target.name}: {finding.message}", node=finding.node)


def _facts(text: str) -> dict[str, str]:
    return {key: value for key, _, value in (line.partition(": ") for line in text.splitlines()) if value}


def _read_kept(path: Path) -> tuple[dict[str, Rounds], dict[str, str]]:
    try:
        data: Any = json.loads(path.read_text())
        if data["kind"] != _KEPT:
            raise ValueError(data["kind"])
        models = {str(key): [[float(ms) for ms in runs] for runs in rounds] for key, rounds in data["models"].items()}
        return models, {str(key): str(value) for key, value in data["device"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DeviceError(f"{path} holds no times of an earlier run", hint="remove it") from error
