"""What a device and its TensorRT take: built-in profiles, and the user's own in TOML.

Versions and limits are those of NVIDIA's JetPack and TensorRT release notes and of the onnx-tensorrt importer of the
release. A profile of one's own may start from a built-in one:

    name = "my-orin"
    base = "jetson-orin"
    tensorrt = "8.5.2"
    precisions = ["fp32", "fp16"]
"""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from onnxsnp.errors import PlanError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PRECISIONS = ("fp32", "fp16")
RUNTIMES = ("tensorrt", "tensorrt-rtx")
DIALECTS = ("8.2", "8.4", "8.6", "10", "11")  # of trtexec: the first TensorRT version of each
Version = tuple[int, ...]


@dataclass(frozen=True)
class Target:
    """A place where an engine runs.

    Attributes:
        name: on the command line.
        about: one line for people.
        tensorrt: version of TensorRT (of TensorRT for RTX: of the TensorRT whose importer it shares).
        opset: the highest that its ONNX importer documents.
        compute_capability: of the GPU, (5, 3) for sm_53; None where it is not known.
        precisions: of `PRECISIONS`, those that run natively.
        multiple_of: widths that are multiples of this waste nothing, per precision (tensor cores pad channels).
        runtime: of `RUNTIMES`.
    """

    name: str
    about: str
    tensorrt: Version
    opset: int
    compute_capability: Version | None = None
    precisions: tuple[str, ...] = PRECISIONS
    multiple_of: Mapping[str, int] | None = None
    runtime: str = "tensorrt"

    @property
    def dialect(self) -> str:
        """Which options its trtexec knows, of `DIALECTS`."""
        return [one for one in DIALECTS if _version(one) <= self.tensorrt][-1]

    @property
    def fuses_attention(self) -> bool:
        """Whether its TensorRT has kernels for whole attentions: from compute capability 7.5 on."""
        return self.compute_capability is None or self.compute_capability >= (7, 5)

    def step(self, precision: str = "fp32") -> int:
        """Widths that are multiples of this waste nothing at a precision."""
        return (self.multiple_of or {}).get(precision, 1)

    def to_dict(self) -> dict[str, Any]:
        """Plain data: versions as text."""
        data = asdict(self)
        for key in ("tensorrt", "compute_capability"):
            data[key] = None if data[key] is None else ".".join(map(str, data[key]))
        data["precisions"] = list(self.precisions)
        return {**data, "dialect": self.dialect, "fuses_attention": self.fuses_attention}


_TENSOR_CORES = {"fp32": 1, "fp16": 8}

BUILT_IN: dict[str, Target] = {
    target.name: target
    for target in (
        Target("jetson-nano", "Jetson Nano, JetPack 4.6.1 and later", (8, 2, 1), 13, (5, 3)),
        Target("jetson-xavier", "Jetson Xavier, JetPack 5.1", (8, 5, 2), 17, (7, 2), multiple_of=_TENSOR_CORES),
        Target("jetson-orin-5.1", "Jetson Orin, JetPack 5.1", (8, 5, 2), 17, (8, 7), multiple_of=_TENSOR_CORES),
        Target("jetson-orin-6.0", "Jetson Orin, JetPack 6.0", (8, 6, 2), 17, (8, 7), multiple_of=_TENSOR_CORES),
        Target("jetson-orin", "Jetson Orin, JetPack 6.1 and 6.2", (10, 3, 0), 20, (8, 7), multiple_of=_TENSOR_CORES),
        Target("tensorrt-8.6", "any GPU with TensorRT 8.6", (8, 6, 1), 17, multiple_of=_TENSOR_CORES),
        Target("tensorrt-10", "any GPU with TensorRT 10", (10, 0, 0), 20, multiple_of=_TENSOR_CORES),
        Target(
            "rtx",
            "GeForce RTX with TensorRT for RTX",
            (10, 12, 0),
            20,
            multiple_of=_TENSOR_CORES,
            runtime="tensorrt-rtx",
        ),
    )
}


def get_target(name: str | Path | Target) -> Target:
    """A profile by name, or from a TOML file.

    Raises:
        PlanError: no such profile, or the file is missing or wrong; the message says where.
    """
    if isinstance(name, Target):
        return name
    if str(name) in BUILT_IN:
        return BUILT_IN[str(name)]
    if str(name).endswith(".toml"):
        return _read(Path(name))
    near = difflib.get_close_matches(str(name), BUILT_IN, n=1)
    guess = f"did you mean {near[0]}? " if near else ""
    raise PlanError(
        f"unknown target '{name}'", hint=f"{guess}use one of {', '.join(BUILT_IN)}, or a TOML file with a profile"
    )


def _read(path: Path) -> Target:
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PlanError(f"cannot read the target {path}: {error.strerror}", hint="check the path") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise PlanError(f"the target {path} is no TOML file: {error}") from error
    base = data.pop("base", None)
    if base is not None and base not in BUILT_IN:
        raise PlanError(f"the target {path} has the unknown base {base!r}", hint=f"use one of {', '.join(BUILT_IN)}")
    allowed = [entry.name for entry in fields(Target)]
    unknown = sorted(data.keys() - set(allowed))
    if unknown:
        raise PlanError(f"the target {path} has the unknown key '{unknown[0]}'", hint=f"keys: {', '.join(allowed)}")
    if base is None:
        missing = [key for key in ("tensorrt", "opset") if key not in data]
        if missing:
            raise PlanError(f"the target {path} lacks '{missing[0]}'", hint='give it, or base = "jetson-orin"')
    start = BUILT_IN[base] if base else Target(path.stem, f"from {path.name}", (0,), 0)
    values: dict[str, Any] = {"name": path.stem, "about": f"from {path.name}"}
    values |= {key: _CHECKS[key](value, f"'{key}' of the target {path}") for key, value in data.items()}
    return replace(start, **values)


def _version(text: str) -> Version:
    return tuple(int(part) for part in text.split("."))


def _as_version(value: Any, where: str) -> Version:
    if not isinstance(value, str) or not re.fullmatch(r"\d{1,4}(\.\d{1,4}){0,3}", value):
        raise PlanError(f'{where} is not a version like "8.2.1"')
    return _version(value)


def _as_tensorrt(value: Any, where: str) -> Version:
    version = _as_version(value, where)
    if version < _version(DIALECTS[0]):
        raise PlanError(f"{where} is older than {DIALECTS[0]}", hint=f"TensorRT {DIALECTS[0]} is the oldest supported")
    return version


def _as_text(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise PlanError(f"{where} is not a text")
    return value


def _as_count(value: Any, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise PlanError(f"{where} is not a whole number of at least 1")
    return value


def _as_precisions(value: Any, where: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not value or not set(map(str, value)) <= set(PRECISIONS):
        raise PlanError(f"{where} is not a list of {', '.join(PRECISIONS)}")
    return tuple(one for one in PRECISIONS if one in value)


def _as_steps(value: Any, where: str) -> Mapping[str, int]:
    if isinstance(value, int) and not isinstance(value, bool):
        value = dict.fromkeys(PRECISIONS, value)
    if not isinstance(value, dict) or not value.keys() <= set(PRECISIONS):
        raise PlanError(f"{where} is not a number, or one per precision", hint="multiple_of = {fp32 = 1, fp16 = 8}")
    return {key: _as_count(one, where) for key, one in value.items()}


def _as_runtime(value: Any, where: str) -> str:
    if value not in RUNTIMES:
        raise PlanError(f"{where} is not one of {', '.join(RUNTIMES)}")
    return str(value)


_CHECKS: dict[str, Callable[[Any, str], Any]] = {
    "name": _as_text,
    "about": _as_text,
    "tensorrt": _as_tensorrt,
    "opset": _as_count,
    "compute_capability": _as_version,
    "precisions": _as_precisions,
    "multiple_of": _as_steps,
    "runtime": _as_runtime,
}
