"""A folder that is copied to a device and builds, checks and times its engines there with one command.

An engine is only valid on the GPU and the TensorRT version that built it. So the folder holds what the device needs to
build one: lowered models, their inputs, what onnxruntime gives for these, and two scripts that need nothing but what is
on the device (`trtexec`, a shell, and Python 3.6 where there is one).

    manifest.json        what the folder holds, with hashes
    README.md            what to do, in plain words
    build.sh, check.py   build and time; check and summarise
    settings.sh          what build.sh needs to know of the target
    LABEL/model.onnx     a model, "pruned" or "original"
    LABEL/inputs.txt     its inputs as `trtexec --loadInputs` takes them (inputs32.txt where integers have 32 bits)
    LABEL/precisions.txt layers that fp16 would overflow, as `trtexec --layerPrecisions` takes them, if there are any
    LABEL/inputs/N.bin   the inputs, raw and little-endian
    LABEL/outputs/N.bin  the reference outputs, likewise
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from onnxsnp._version import __version__
from onnxsnp.atomic import whole_folder
from onnxsnp.deploy.manifest import FORMAT, KIND, MANIFEST, described, read_manifest, refuse_foreign
from onnxsnp.deploy.targets import Target, Version
from onnxsnp.errors import ModelError, PlanError

TOLERANCE = {"fp32": 1e-3, "fp16": 3e-2}  # largest difference by the largest magnitude of the reference
_SCRIPTS = ("build.sh", "check.py")
_MOST = 2**31 - 2**20  # bytes of one protobuf message, with room for its frame
# Names of TensorRT's kernels for whole attentions; check.py looks for them in what trtexec says of the layers.
FUSED_NAMES = r"fmha|mha_v2|_mha|mha_|fused_attention|flash_?attention"


@dataclass(frozen=True)
class BundleModel:
    """A model for the device.

    Attributes:
        label: its folder: "pruned", "original", or another short name.
        proto: lowered, with static shapes and its weights inside.
        feeds: an input of each name, in the shapes and types of the model.
        reference: what onnxruntime gives for the feeds; outputs that are not here are not compared.
        keep_fp32: nodes that a build with fp16 computes in single precision (TensorRT 8.4 to 10).
    """

    label: str
    proto: onnx.ModelProto
    feeds: Mapping[str, np.ndarray]
    reference: Mapping[str, np.ndarray] = field(default_factory=dict)
    keep_fp32: Sequence[str] = ()


@dataclass(frozen=True)
class Timing:
    """How the device times.

    Attributes:
        rounds: each model runs once in each, in turn, so that a device that gets warm slows all of them alike.
        seconds: of one model in one round, at least.
        iterations: of one model in one round, at least.
        warm_up: milliseconds before the first run that counts.
        times_only: no outputs are kept or compared.
    """

    rounds: int = 5
    seconds: int = 3
    iterations: int = 50
    warm_up: int = 500
    times_only: bool = False


def write_bundle(
    folder: str | Path,
    models: Sequence[BundleModel],
    target: Target,
    precision: str = "fp32",
    *,
    tolerance: float | None = None,
    timing: Timing | None = None,
) -> dict[str, Any]:
    """Write a bundle, whole or not at all; an earlier bundle of that name is replaced.

    Args:
        folder: where; its parent must exist.
        models: the one to compare with ("original") may be among them.
        precision: of the engines, one that the target has.
        tolerance: of outputs on the device: largest difference by the largest magnitude of the reference;
            `TOLERANCE` of the precision if not given.

    Returns:
        The manifest.

    Raises:
        PlanError: a precision that the target lacks, or a folder that is not an earlier bundle.
        ModelError: a model that trtexec could not be given, or a folder that cannot be written.
    """
    _check(models, target, precision)
    path = Path(folder)
    refuse_foreign(path)
    timing = timing or Timing()
    with whole_folder(path) as part:
        entries = [_write_model(part, model) for model in models]
        settings = _settings(models, target, precision, timing)
        (part / "settings.sh").write_text(settings, encoding="utf-8")
        for name in _SCRIPTS:
            (part / name).write_text(_file(name), encoding="utf-8")
        (part / "README.md").write_text(_readme(models, target, precision), encoding="utf-8")
        (part / "build.sh").chmod(0o755)
        manifest = {
            "kind": KIND,
            "format": FORMAT,
            "onnxsnp": __version__,
            "target": target.to_dict(),
            "precision": precision,
            "tolerance": TOLERANCE[precision] if tolerance is None else tolerance,
            "tolerance_tf32": TOLERANCE["fp16"],  # TF32 has the mantissa of fp16
            "timing": {"warm_up_ms": timing.warm_up, "times_only": timing.times_only},
            "built": False,  # no engine is built here
            "fused_names": FUSED_NAMES,
            "models": entries,
            "files": [described(part, one) for one in sorted(part.rglob("*")) if one.is_file()],
        }
        (part / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return read_manifest(path)


def _check(models: Sequence[BundleModel], target: Target, precision: str) -> None:
    if precision not in target.precisions:
        raise PlanError(f"the target {target.name} has no {precision}", hint=f"use {' or '.join(target.precisions)}")
    if not models or len({model.label for model in models}) != len(models):
        raise ValueError("a bundle needs models, each with a label of its own")
    for model in models:
        if not re.fullmatch(r"[a-z][a-z0-9_-]{0,40}", model.label):
            raise ValueError(f"not a label: {model.label!r}")
        _check_inputs(model)
        if target.dialect == "11" and precision == "fp16" and not has_half(model.proto):
            raise ModelError(
                f"TensorRT {version_text(target.tensorrt)} takes the precision from the model, and the "
                f"{model.label} one has no fp16 in it",
                hint="lower it to fp16",
            )


def _check_inputs(model: BundleModel) -> None:
    """trtexec is given the inputs as raw files under their names."""
    own = {entry.name for entry in model.proto.graph.initializer}
    wanted = [entry for entry in model.proto.graph.input if entry.name not in own]
    for entry in wanted:
        sizes = [dim.dim_value if dim.HasField("dim_value") else 0 for dim in entry.type.tensor_type.shape.dim]
        if min(sizes, default=1) < 1:
            raise ModelError(f"input '{entry.name}' of the {model.label} model has no fixed shape")
        if re.search(r"[,'\s]", entry.name):
            raise ModelError(
                f"trtexec cannot be given the input '{entry.name}': its name has a comma, a quote or a space",
                hint="rename it in the model",
            )
        given = model.feeds.get(entry.name)
        kind = onnx.helper.tensor_dtype_to_np_dtype(entry.type.tensor_type.elem_type)
        if given is None or list(given.shape) != sizes or given.dtype != kind:
            raise ModelError(f"input '{entry.name}' of the {model.label} model takes {kind.name} of shape {sizes}")


def has_half(proto: onnx.ModelProto) -> bool:
    return any(entry.data_type == onnx.TensorProto.FLOAT16 for entry in proto.graph.initializer)


def _write_model(part: Path, model: BundleModel) -> dict[str, Any]:
    """One model's folder, and what the manifest says of it."""
    folder = part / model.label
    for name in ("inputs", "outputs"):
        (folder / name).mkdir(parents=True)
    if model.proto.ByteSize() > _MOST:
        raise ModelError(f"the {model.label} model is larger than 2 GB, which trtexec's importer does not read whole")
    (folder / "model.onnx").write_bytes(model.proto.SerializeToString())
    wide, narrow = [], []
    for number, (name, array) in enumerate(model.feeds.items()):
        path = f"{model.label}/inputs/{number}.bin"
        (part / path).write_bytes(raw(array))
        wide.append(f"{name}:{path}")
        if array.dtype == np.int64:  # below TensorRT 10 the importer makes such inputs 32 bits wide
            path = f"{model.label}/inputs/{number}.int32.bin"
            (part / path).write_bytes(raw(_narrowed(name, array)))
        narrow.append(f"{name}:{path}")
    (folder / "inputs.txt").write_text(",".join(wide) + "\n", encoding="utf-8")
    (folder / "inputs32.txt").write_text(",".join(narrow) + "\n", encoding="utf-8")
    if model.keep_fp32:
        (folder / "precisions.txt").write_text(",".join(f"{name}:fp32" for name in model.keep_fp32) + "\n")
    outputs = []
    for number, (name, array) in enumerate(model.reference.items()):
        path = f"{model.label}/outputs/{number}.bin"
        (part / path).write_bytes(raw(array))
        outputs.append(_array(name, array, path))
    alike = sorted({node.name for node in model.proto.graph.node if re.search(FUSED_NAMES, node.name, re.IGNORECASE)})
    return {
        "label": model.label,
        "model": f"{model.label}/model.onnx",
        "inputs": [
            {
                "name": name,
                "shape": list(array.shape),
                "dtype": array.dtype.name,
                "file": f"{model.label}/inputs/{n}.bin",
            }
            for n, (name, array) in enumerate(model.feeds.items())
        ],
        "outputs": outputs,
        "names_like_kernels": alike,  # TensorRT names layers after these; they say nothing of its kernels
    }


def _array(name: str, array: np.ndarray, path: str) -> dict[str, Any]:
    return {"name": name, "shape": list(array.shape), "dtype": array.dtype.name, "file": path}


def raw(array: np.ndarray) -> bytes:
    """Values one after another, little-endian."""
    return np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<"), copy=False).tobytes()


def _narrowed(name: str, array: np.ndarray) -> np.ndarray:
    limits = np.iinfo(np.int32)
    if array.size and (array.min() < limits.min or array.max() > limits.max):
        raise ModelError(f"input '{name}' has values beyond 32 bits, which TensorRT before 10 does not take")
    return array.astype(np.int32)


def _settings(models: Sequence[BundleModel], target: Target, precision: str, timing: Timing) -> str:
    """What build.sh reads: assignments that any POSIX shell understands."""
    values: dict[str, str | int] = {
        "TARGET": target.name,
        "TARGET_VERSION": version_text(target.tensorrt),
        "PRECISION": precision,
        "MODELS": " ".join(model.label for model in models),
        "WORKSPACES": " ".join(map(str, workspaces(target))),
        "ROUNDS": timing.rounds,
        "SECONDS_EACH": timing.seconds,
        "ITERATIONS": timing.iterations,
        "WARM_UP": timing.warm_up,
        "TIMES_ONLY": int(timing.times_only),
    }
    lines = ["# What build.sh needs to know; written with the bundle."]
    return "\n".join(lines + [f"{key}={shlex.quote(str(value))}" for key, value in values.items()]) + "\n"


def workspaces(target: Target) -> list[int]:
    """MB of scratch memory to try in turn, each after the one before ran out of memory; 0 is trtexec's own choice."""
    if target.compute_capability is not None and target.compute_capability < (6, 0):
        return [512, 256]  # 4 GB shared by CPU and GPU
    if target.dialect == "8.2":
        return [1024, 512, 256]  # whose trtexec would choose 16
    return [0, 1024, 256]


def version_text(version: Version) -> str:
    """8.2.1"""
    return ".".join(map(str, version))


def _readme(models: Sequence[BundleModel], target: Target, precision: str) -> str:
    values = {
        "target": target.name,
        "about": target.about,
        "tensorrt": version_text(target.tensorrt),
        "precision": precision,
        "models": "\n".join(f"- `{model.label}/model.onnx`" for model in models),
        "version": __version__,
    }
    text = _file("README.template.md")
    for key, value in values.items():
        text = text.replace("{" + key + "}", value)
    return text


def _file(name: str) -> str:
    return (resources.files("onnxsnp.deploy") / "files" / name).read_text(encoding="utf-8")
