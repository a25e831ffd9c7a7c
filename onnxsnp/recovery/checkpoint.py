"""The state of a recovery on the disk, so that it can be taken up again: arrays and JSON in an .npz, no pickle."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from onnxsnp.atomic import whole_file
from onnxsnp.errors import PlanError

_VERSION = 1


@dataclass
class Saved:
    """What a run needs to go on.

    Attributes:
        settings: everything that must be the same: models, data, seed and so on.
        progress: plain data: step, place in the data, curves, best loss.
        arrays: groups of arrays by parameter name: `now`, `best`, `mean`, `square`.
    """

    settings: dict[str, Any]
    progress: dict[str, Any]
    arrays: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)


def checkpoint_path(output: Path) -> Path:
    """Where the state is kept while a model is recovered."""
    return output.with_suffix(".recovery.npz")


def write(path: Path, settings: Mapping[str, Any], progress: Mapping[str, Any], arrays: Mapping[str, Any]) -> None:
    """Write a state whole or not at all."""
    groups = {group: list(held) for group, held in arrays.items()}
    head = {"version": _VERSION, "settings": dict(settings), "progress": dict(progress), "groups": groups}
    held = {f"{group}.{number}": array for group in groups for number, array in enumerate(arrays[group].values())}
    with whole_file(path) as part, open(part, "wb") as stream:
        np.savez(stream, head=np.frombuffer(json.dumps(head).encode(), np.uint8), **held)


def read(path: Path, settings: Mapping[str, Any]) -> Saved:
    """Read a state that was written for a run with the same settings.

    Raises:
        PlanError: there is none, it is broken, or it belongs to another run.
    """
    if not path.is_file():
        raise PlanError(f"there is nothing to resume: no {path}", hint="leave --resume out")
    try:
        with np.load(path, allow_pickle=False) as file:
            head = json.loads(file["head"].tobytes())
            if head["version"] != _VERSION:
                raise PlanError(f"{path} is of another version of onnxsnp", hint="leave --resume out")
            arrays = {
                group: {name: file[f"{group}.{number}"] for number, name in enumerate(names)}
                for group, names in head["groups"].items()
            }
            saved = Saved(head["settings"], head["progress"], arrays)
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise PlanError(f"cannot read {path}: it is damaged", hint="remove it and leave --resume out") from error
    wanted = json.loads(json.dumps(dict(settings)))
    other = [name for name in wanted if saved.settings.get(name) != wanted[name]]
    if other:
        raise PlanError(
            f"{path} belongs to a run with another {other[0]}: {saved.settings.get(other[0])} instead of "
            f"{wanted[other[0]]}",
            hint="give the same options, or leave --resume out",
        )
    return saved
