"""What the result of a run depends on, as a digest: a finished run with the same one need not be made again.

Files are told by their names, sizes and times of change, the model by its graph and its weights, arrays by their
values. What cannot be told (an iterator) is never the same.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from onnxsnp._version import __version__
from onnxsnp.evaluation.latency import machine
from onnxsnp.measured import judging, tuning
from onnxsnp.model import Model
from onnxsnp.options import Options
from onnxsnp.planning.plan import fingerprint


def run_keys(model: Model, runs: Sequence[Options]) -> list[str | None]:
    """The digest of each run of a sweep; None where it cannot be told whether it is the same.

    How many samples are held back follows from all runs together, so a run alone and one of a sweep may differ.
    """
    base = runs[0]
    data = [_data(base.calibration), _data(base.eval_data)]
    if None in data:
        return [None] * len(runs)
    common = {
        "version": __version__,
        "model": fingerprint(model),
        "metadata": model.metadata,
        "held": [max(map(tuning, runs)), max(map(judging, runs))],
        "data": data,
        "preprocess": _file(base.preprocess) if isinstance(base.preprocess, str | Path) else repr(base.preprocess),
        "target": _file(base.target) if isinstance(base.target, str | Path) else repr(base.target),
        "machine": machine(base.threads, base.provider),
        "input_shapes": sorted((name, list(shape)) for name, shape in (base.input_shapes or {}).items()),
    }
    return [_digest(common | _own(run)) for run in runs]


def layers_key(model: Model, run: Options) -> str:
    """A short digest of what the times of a model's layers depend on."""
    asked = [run.threads, run.provider, run.seed, run.multiple, str(run.scope), str(run.input_shapes)]
    return _digest([fingerprint(model), machine(run.threads, run.provider), *asked])[:12]


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _own(run: Options) -> dict[str, Any]:
    names = (
        "recover",
        "ratio",
        "criterion",
        "compensation",
        "allocation",
        "of",
        "rank",
        "precision",
        "multiple",
        "seed",
    )
    scope = run.scope if run.scope is None or isinstance(run.scope, str) else ",".join(run.scope)
    return {name: getattr(run, name) for name in names} | {
        "scope": scope,
        "samples": run.fit_samples,
        "recover": run.recover,
        "latency": run.latency,
    }


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def _data(source: Any) -> Any:
    """What tells data apart; None if nothing does."""
    if source is None:
        return "none"
    if isinstance(source, str | Path):
        path = Path(source)
        if not path.is_dir():
            return [str(path.resolve()), _state(path)]
        files = [Path(parent) / name for parent, _, names in os.walk(path) for name in names]
        return [str(path.resolve()), _digest(sorted([str(one.relative_to(path)), _state(one)] for one in files))]
    if isinstance(source, np.ndarray):
        return _array(source)
    if isinstance(source, Mapping):
        return _digest({str(name): _array(np.asarray(array)) for name, array in source.items()})
    if isinstance(source, Sequence):
        parts = [_data(one) for one in source]
        return None if None in parts else _digest(parts)
    return None


def _array(array: np.ndarray) -> str:
    content = np.ascontiguousarray(array)
    return f"{array.dtype} {array.shape} {hashlib.sha256(content.tobytes()).hexdigest()}"


def _state(path: Path) -> list[int]:
    """Size and time of the last change; of what is not there, nothing."""
    if not path.exists():
        return []
    about = path.stat()
    return [about.st_size, about.st_mtime_ns]


def _file(name: str | Path) -> str:
    """A preset's name, or a file's content."""
    return file_digest(Path(name)) if Path(name).is_file() else str(name)
