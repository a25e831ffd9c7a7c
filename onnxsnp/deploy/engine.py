"""From a model to what runs on a target: lowered, checked, compared, and handed to a backend.

`bundle` writes a folder that the device builds from, `ssh` does so and runs it there, `local` builds and times with the
TensorRT and the GPU of this machine, `rtx` builds with TensorRT for RTX. Only what was built is called built, and
latency is only what was measured on the device.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx

from onnxsnp._version import __version__
from onnxsnp.atomic import whole_file
from onnxsnp.deploy import local, rtx
from onnxsnp.deploy.backends import BACKENDS, Job, Outcome, check_output, record_path
from onnxsnp.deploy.bundle import Timing
from onnxsnp.deploy.originals import find_original
from onnxsnp.deploy.prepare import Ready, prepare
from onnxsnp.deploy.ssh import Ssh, check_host
from onnxsnp.deploy.targets import PRECISIONS, Target, get_target
from onnxsnp.errors import PlanError
from onnxsnp.model import Model, load
from onnxsnp.planning.allocation import unknown

Progress = Callable[[str, int, int], None]


@dataclass
class EngineResult:
    """What `build_engine` did.

    Attributes:
        output: the folder it wrote.
        built: whether there is an engine.
        record: all about it, as it is written beside the folder (the JSON contract of `onnxsnp engine`).
    """

    output: Path
    built: bool
    record: dict[str, Any] = field(default_factory=dict)


def build_engine(
    model: str | Path | onnx.ModelProto | Model,
    *,
    target: str | Path | Target,
    output: str | Path,
    backend: str | None = None,
    host: str | None = None,
    precision: str = "fp32",
    original: str | Path | onnx.ModelProto | Model | None = None,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    calibration: Any = None,
    preprocess: str | None = None,
    compute_capabilities: Sequence[str] = (),
    seed: int = 0,
    progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
    ssh: Ssh | None = None,
    timing: Timing | None = None,
) -> EngineResult:
    """Make an engine for a target, or where that cannot be done here, the folder to make it from there.

    Args:
        model: a path, or a model in memory.
        target: a profile, its name, or a TOML file with one.
        output: folder to write, whole or not at all; the record goes beside it as FOLDER.engine.json.
        backend: "bundle", "local", "rtx" or "ssh". Default: ssh if a host is given, rtx for a target of TensorRT for
            RTX, local where TensorRT and a GPU are here and an engine made with them is one for the target, else
            bundle.
        host: to reach the device by ssh, "user@nano".
        precision: "fp32" or "fp16".
        original: to compare with; of a pruned model it is found by the run record.
        input_shapes: full shapes by input name, where sizes other than the batch are open. The batch is 1.
        calibration: data for the inputs, as for `prune`; generated if None.
        preprocess: of images, as for `prune`.
        compute_capabilities: of the GPUs an RTX engine is for, such as "8.9".
        progress: called as (stage, done, total).
        say: called with the lines that the device prints.
        ssh: how to reach the host, where ~/.ssh/config does not say it.
        timing: how long the device times.

    Raises:
        NotTaken: the target does not take the model; `findings` says what and what to do.
        OnnxSnpError: bad input, a lowered model that computes something else, or a build that failed. Nothing is
            written (by ssh: the bundle stays).
    """
    device = get_target(target)
    _check(device, precision)
    chosen = choose_backend(device, backend, host)
    if chosen == "ssh":
        check_host(host or "", ssh or Ssh())
    path = Path(output)
    check_output(path, chosen)
    capabilities = _capabilities(device, compute_capabilities, chosen)
    tools = local.require(device) if chosen == "local" else None  # what is missing should be known before all the work
    if chosen == "rtx":
        rtx.load()
    report = progress or (lambda stage, done, total: None)
    start = time.perf_counter()
    notes: list[str] = []
    common = {"input_shapes": input_shapes, "data": calibration, "preprocess": preprocess, "seed": seed}
    models = _models(model, original, device, precision, notes, report, common)
    if calibration is None:
        notes.append("the inputs are generated; --calibration takes real ones")
    heard = say or (lambda line: None)
    job = Job(path, device, precision, models, host or "", capabilities, tools, report, heard, ssh, timing)
    outcome = BACKENDS[chosen](job)
    record = _record(job, chosen, outcome, [*notes, *outcome.notes], time.perf_counter() - start)
    with whole_file(record_path(path)) as part:
        part.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return EngineResult(path, outcome.built, record)


def choose_backend(target: Target, backend: str | None, host: str | None) -> str:
    """The backend that was asked for, or the one that gets furthest from here.

    Raises:
        PlanError: an unknown backend, or one that does not go with the host.
    """
    if backend is not None and backend not in BACKENDS:
        raise unknown("backend", backend, BACKENDS)
    if host and backend not in (None, "ssh"):
        raise PlanError(f"--host does nothing with --backend {backend}", hint="leave one of them out")
    if backend == "ssh" and not host:
        raise PlanError("--backend ssh needs a device", hint="add --host user@device")
    if backend is not None:
        return backend
    if host:
        return "ssh"
    if target.runtime == "tensorrt-rtx":
        return "rtx"
    return "local" if local.fits(target) else "bundle"


def _check(target: Target, precision: str) -> None:
    if precision not in PRECISIONS:
        raise unknown("precision", precision, PRECISIONS)
    if precision not in target.precisions:
        raise PlanError(f"{target.name} does not run {precision}", hint=f"it has {', '.join(target.precisions)}")


def _capabilities(target: Target, given: Sequence[str], backend: str) -> list[tuple[int, ...]]:
    """The GPUs that an RTX engine is for: those given, else that of the target if it is one for RTX and names one."""
    if given and backend != "rtx":
        raise PlanError("compute capabilities are for RTX engines only", hint="add --backend rtx, or leave them out")
    try:
        wanted = [tuple(int(part) for part in one.split(".")) for one in given]
    except ValueError as error:
        raise PlanError(f"no compute capability: '{','.join(given)}'", hint="write it as 8.9") from error
    if not wanted and target.runtime == "tensorrt-rtx" and target.compute_capability is not None:
        return [target.compute_capability]
    return wanted


def _models(
    model: str | Path | onnx.ModelProto | Model,
    original: str | Path | onnx.ModelProto | Model | None,
    target: Target,
    precision: str,
    notes: list[str],
    report: Progress,
    common: Mapping[str, Any],
) -> list[Ready]:
    """The model, and the one to compare it with, ready for the target and on the same inputs."""
    source = load(model)
    before: Any = original
    if before is None and source.path is not None:
        before, why = find_original(source.path)
        notes.extend([why] if why else [])
    report("lower and compare", 0, 0)
    first, feeds = prepare(source, "model" if before is None else "pruned", target, precision, **common)
    if before is None:
        return [first]
    report("lower and compare the original", 0, 0)
    second, _ = prepare(before, "original", target, precision, feeds=feeds, **common)
    return [first, second]


def _record(job: Job, backend: str, outcome: Outcome, notes: list[str], seconds: float) -> dict[str, Any]:
    first, *others = [one.to_dict() for one in job.models]
    return {
        "output": str(job.output),
        "target": job.target.to_dict(),
        "precision": job.precision,
        "backend": backend,
        "built": outcome.built,
        **first,
        "original": others[0] if others else None,
        "files": outcome.files,
        "engine": outcome.engine,
        "latency": outcome.latency,
        "outputs": outcome.outputs,
        "next": outcome.next,
        "notes": notes,
        "seconds": round(seconds, 3),
        "version": __version__,
    }
