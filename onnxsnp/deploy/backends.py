"""What becomes of models that are ready for a target: one function per backend, `BACKENDS` is the list."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from onnxsnp.atomic import whole_folder
from onnxsnp.deploy import local, rtx
from onnxsnp.deploy.bundle import TOLERANCE, BundleModel, Timing, has_half, refuse_foreign, write_bundle
from onnxsnp.deploy.cuda import Cuda
from onnxsnp.deploy.importer import Built, open_log
from onnxsnp.deploy.prepare import Ready
from onnxsnp.deploy.remote import run_remote
from onnxsnp.deploy.results import read_results
from onnxsnp.deploy.running import measure, running
from onnxsnp.deploy.ssh import Ssh
from onnxsnp.deploy.targets import Target
from onnxsnp.errors import DeviceError, ModelError, PlanError

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Job:
    """What a backend is given.

    Attributes:
        output: folder to write.
        models: the model, and the one to compare with if there is one.
        host: for ssh.
        capabilities: compute capabilities for RTX engines.
        tools: TensorRT and CUDA of this machine, for the local backend.
        progress: called as (stage, done, total).
        say: called with what the device prints.
        ssh: how to reach the host; timing: how long the device times.
    """

    output: Path
    target: Target
    precision: str
    models: Sequence[Ready]
    host: str
    capabilities: Sequence[tuple[int, ...]]
    tools: tuple[Any, Cuda] | None
    progress: Progress
    say: Callable[[str], None]
    ssh: Ssh | None = None
    timing: Timing | None = None


@dataclass(frozen=True)
class Outcome:
    """What a backend did.

    Attributes:
        built: whether there is an engine.
        files: name, bytes and sha256 of what is in the folder.
        engine: bytes, file, built_with and seconds of the model's engine; None if there is none.
        latency: before (None without an original), after and speedup, as measured on the device; None if it was not.
        outputs: differences of the engine's outputs to onnxruntime's; None if it was not run.
        next: what to do with the folder, one line each.
        notes: what one should know.
    """

    built: bool
    files: list[dict[str, Any]]
    engine: dict[str, Any] | None = None
    latency: dict[str, Any] | None = None
    outputs: list[dict[str, Any]] | None = None
    next: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def bundle(job: Job) -> Outcome:
    """A folder that the device builds from with one command."""
    manifest = _bundle(job)
    name = job.output.name
    steps = [
        f"scp -r {shlex.quote(str(job.output))} USER@DEVICE:",
        f"ssh USER@DEVICE sh {shlex.quote(name)}/build.sh",
    ]
    return Outcome(False, manifest["files"], next=steps)


def _bundle(job: Job) -> dict[str, Any]:
    job.progress("write the bundle", 0, 0)
    models = [
        BundleModel(one.label, one.lowered.proto, one.feed, one.reference, one.lowered.keep_fp32) for one in job.models
    ]
    return write_bundle(job.output, models, job.target, job.precision, timing=job.timing)


def remote(job: Job) -> Outcome:
    """The bundle, built and timed on the device, and its results fetched.

    Raises:
        DeviceError: there is no engine, or no way to the device.
    """
    manifest = _bundle(job)
    job.progress(f"build on {job.host}", 0, 0)
    results = run_remote(job.output, job.host, ssh=job.ssh, progress=job.say)
    found = read_results(job.output)
    models = found["models"]
    first = models[job.models[0].label]
    if not first["built"]:
        why = found["problems"][0] if found["problems"] else "it said nothing"
        raise DeviceError(f"{job.host} built no engine: {why}", hint=f"its logs are in {results}")
    path = results / job.models[0].label / "model.engine"
    engine = {
        "file": str(path.relative_to(job.output)),
        "bytes": first["engine_bytes"],
        "built_with": f"TensorRT {found['tensorrt']} on {job.host}",
        "seconds": None,
        "fused_attention": first["fused_attention"],
    }
    return Outcome(
        True,
        manifest["files"],
        engine,
        _latency({label: one["latency_ms"] for label, one in models.items()}, (found["speedup"] or {}).get("latency")),
        first["outputs"],
        notes=[str(problem) for problem in found["problems"]],
    )


def build_here(job: Job) -> Outcome:
    """Engines with the TensorRT of this machine, run and timed on its GPU."""
    assert job.tools is not None
    library, cuda = job.tools
    built = [
        local.build(library, one.lowered.proto, job.precision, job.progress, one.lowered.keep_fp32)
        for one in job.models
    ]
    opened = [(engine.data, one.feed) for engine, one in zip(built, job.models, strict=True)]
    log = open_log(library)
    with running(library, log, cuda, opened) as engines:
        times = measure(engines, progress=lambda done, total: job.progress("time", done, total))
        found = engines[0].outputs()
    outputs = _differences(job.models[0].reference, found, TOLERANCE[job.precision])
    speedup = float(np.median(times[:, 1] / times[:, 0])) if len(job.models) > 1 else None
    ms = {one.label: _quantiles(times[:, index]) for index, one in enumerate(job.models)}
    files = _write(job, built)
    notes = [
        f"output '{one['name']}' of the engine differs from onnxruntime's by {one['relative_difference']:.1e} of its "
        f"largest value, where {one['tolerance']:.0e} is expected"
        for one in outputs
        if not one["passed"]
    ]
    return Outcome(True, files, _engine(job, built[0]), _latency(ms, speedup), outputs, notes=notes)


def build_rtx(job: Job) -> Outcome:
    """RTX engines; they are not run.

    Raises:
        PlanError: fp16 was asked for, and the model lowered for the target leaves that to the builder.
    """
    if job.precision == "fp16" and not all(has_half(one.lowered.proto) for one in job.models):
        raise PlanError(
            f"an RTX engine computes in what the model says, and lowered for {job.target.name} it says no fp16",
            hint="--target rtx, or --precision fp32",
        )
    built = [
        rtx.build(one.lowered.proto, compute_capabilities=job.capabilities, progress=job.progress) for one in job.models
    ]
    return Outcome(True, _write(job, built), _engine(job, built[0]), notes=[rtx.NOTE])


BACKENDS: dict[str, Callable[[Job], Outcome]] = {
    "bundle": bundle,
    "local": build_here,
    "rtx": build_rtx,
    "ssh": remote,
}


def _write(job: Job, built: Sequence[Built]) -> list[dict[str, Any]]:
    """Engines and the models they were built from, in the folder; what is in it then."""
    with whole_folder(job.output) as part:
        for engine, one in zip(built, job.models, strict=True):
            (part / f"{one.label}.engine").write_bytes(engine.data)
            (part / f"{one.label}.onnx").write_bytes(one.lowered.proto.SerializeToString())
        return [
            {"name": path.name, "bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
            for path in sorted(part.iterdir())
        ]


def record_path(output: Path) -> Path:
    """Where the record of a run lies: beside the folder, under a name that no run record of `prune` has."""
    return output.with_name(f"{output.name}.engine.json")


def check_output(output: Path, backend: str) -> None:
    """A folder that is written takes the place of nothing but what an earlier run wrote.

    Raises:
        PlanError: something else is there.
        ModelError: there is no place for it.
    """
    if not output.parent.is_dir():
        raise ModelError(f"output folder does not exist: {output.parent}", hint="create it first")
    if record_path(output).exists() and not record_path(output).is_file():
        raise PlanError(f"{record_path(output)} is not a file", hint="choose another folder with -o")
    if backend in ("bundle", "ssh"):
        refuse_foreign(output)
    else:
        _refuse_foreign(output)


def _refuse_foreign(folder: Path) -> None:
    hint = "choose another folder with -o, or remove it first"
    if not folder.exists() and not folder.is_symlink():
        return
    if not folder.is_dir() or folder.is_symlink():
        raise PlanError(f"{folder} exists and is not a folder", hint=hint)
    try:
        record = json.loads(record_path(folder).read_text(encoding="utf-8"))
        known = {entry["name"] for entry in record["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        known = set()
    for path in sorted(folder.rglob("*")):
        if not path.is_dir() and path.relative_to(folder).as_posix() not in known:
            raise PlanError(f"{folder} holds {path.name}, which no earlier run wrote", hint=hint)


def _engine(job: Job, built: Built) -> dict[str, Any]:
    return {
        "file": f"{job.models[0].label}.engine",
        "bytes": len(built.data),
        "built_with": built.library,
        "compute_capabilities": list(built.compute_capabilities),
        "seconds": round(built.seconds, 3),
    }


def _quantiles(times: np.ndarray) -> dict[str, float]:
    """Median, p90 and p99 of milliseconds [runs]."""
    median, p90, p99 = np.percentile(times, [50, 90, 99]).tolist()
    return {"median": median, "p90": p90, "p99": p99}


def _latency(ms: Mapping[str, dict[str, float] | None], speedup: float | None) -> dict[str, Any] | None:
    """Before and after, where it was measured."""
    after = ms.get("pruned", ms.get("model"))
    return None if after is None else {"before": ms.get("original"), "after": after, "speedup": speedup}


def _differences(
    reference: Mapping[str, np.ndarray], found: Mapping[str, np.ndarray], tolerance: float
) -> list[dict[str, Any]]:
    """Every output of an engine against onnxruntime's."""
    rows = []
    for name, wanted in reference.items():
        gap = float(np.abs(wanted.astype(np.float64) - found[name].astype(np.float64)).max(initial=0.0))
        gap = gap if np.isfinite(gap) else float(np.finfo(np.float64).max)  # JSON has no infinity
        scale = float(np.abs(wanted).max(initial=0.0)) or 1.0
        rows.append(
            {
                "name": name,
                "max_difference": gap,
                "relative_difference": gap / scale,
                "tolerance": tolerance,
                "passed": gap / scale <= tolerance,
            }
        )
    return rows
