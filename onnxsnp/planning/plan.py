"""The plan: which neurons of which group stay. Plain data that can be saved, read, edited and applied again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from onnxsnp.errors import PlanError
from onnxsnp.graph.groups import Group
from onnxsnp.model import Model
from onnxsnp.surgery.rewrite import Cut

_VERSION = 1


@dataclass
class GroupPlan:
    """What stays of one group.

    Attributes:
        id, kind, size, heads: as in `Group`.
        keep: [heads][kept] ascending indices; every head keeps the same number.
    """

    id: str
    kind: str
    size: int
    heads: int
    keep: list[list[int]]

    @property
    def kept(self) -> int:
        """Neurons that stay per head."""
        return len(self.keep[0])


@dataclass
class Plan:
    """A pruning plan for one model.

    Attributes:
        model: fingerprint of the model it was made for (see `fingerprint`).
        groups: the groups that are cut; a group that is not listed stays whole.
        settings: how the plan was made, for the reader.
    """

    model: str
    groups: list[GroupPlan]
    settings: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """The plan as text, one group a line."""
        lines = ",\n  ".join(json.dumps(vars(group)) for group in self.groups)
        head = json.dumps({"version": _VERSION, "model": self.model, "settings": self.settings}, indent=1)
        return head[:-2] + ',\n "groups": [\n  ' + lines + "\n ]\n}\n"

    @staticmethod
    def from_json(text: str, where: str = "plan") -> Plan:
        """Read a plan.

        Raises:
            PlanError: not a plan, or written by a version this one does not know.
        """
        try:
            data = json.loads(text, parse_constant=no_number)
            if data["version"] != _VERSION:
                raise PlanError(f"{where} has plan version {data['version']}, this program reads {_VERSION}")
            groups = [
                GroupPlan(
                    str(item["id"]),
                    str(item["kind"]),
                    int(item["size"]),
                    int(item["heads"]),
                    [[_index(value) for value in head] for head in item["keep"]],
                )
                for item in data["groups"]
            ]
            return Plan(str(data["model"]), groups, dict(data["settings"]))
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            why = f"it has no {error}" if isinstance(error, KeyError) else str(error)
            raise PlanError(
                f"{where} is not a plan: {why}",
                hint="plans are written with --dry-run -o FILE, or found in the run record",
            ) from error


def no_number(name: str) -> float:
    """For `json.loads`: NaN and Infinity are no JSON, and nothing that is counted or measured here.

    Raises:
        ValueError: always.
    """
    raise ValueError(f"{name} is not a number")


def _index(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{value!r} is not an index")
    return value


def read_plan(path: str | Path) -> Plan:
    """Read a plan, or the plan inside a run record.

    Raises:
        PlanError: the file is absent or is not a plan.
    """
    source = Path(path)
    try:
        text = source.read_text()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not text"
        raise PlanError(f"cannot read plan {source}: {why}") from error
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        data = None
    if isinstance(data, dict) and isinstance(data.get("plan"), dict):
        text = json.dumps(data["plan"])
    return Plan.from_json(text, str(source))


def fingerprint(model: Model) -> str:
    """A digest of the graph and of every weight; names of files and metadata do not count."""
    digest = hashlib.sha256()
    for node in model.proto.graph.node:
        digest.update(node.op_type.encode() + b"\0" + "\0".join([*node.input, "", *node.output]).encode())
        for attribute in node.attribute:
            digest.update(attribute.SerializeToString(deterministic=True))
    for name in sorted(model.weights):
        array = model.weights[name]
        digest.update(name.encode())
        if array.dtype.hasobject:  # texts
            digest.update(repr(array.tolist()).encode())
        else:
            digest.update(np.asarray(array, order="C").view(np.uint8).data if array.ndim else array.tobytes())
    return digest.hexdigest()


def check_plan(plan: Plan, groups: Mapping[str, Group], model: str) -> None:
    """Refuse a plan that does not fit.

    Raises:
        PlanError: made for another model, an unknown or frozen group, or indices that are not a legal selection.
    """
    if plan.model != model:
        raise PlanError("the plan was made for another model", hint="make a new plan for this one")
    seen: set[str] = set()
    for entry in plan.groups:
        if entry.id in seen:
            raise PlanError(f"the plan lists group '{entry.id}' twice")
        seen.add(entry.id)
        group = groups.get(entry.id)
        if group is None or (group.kind, group.size) != (entry.kind, entry.size):
            raise PlanError(f"the plan names a group '{entry.id}' that this model does not have")
        if not group.prunable:
            raise PlanError(f"group '{entry.id}' cannot be cut: {group.reasons[0]}")
        if len(entry.keep) != group.heads or len({len(head) for head in entry.keep}) != 1 or not entry.keep[0]:
            raise PlanError(f"group '{entry.id}' needs {group.heads} equally long, non-empty lists of indices")
        for head in entry.keep:
            if sorted(set(head)) != head or head[0] < 0 or head[-1] >= group.size:
                raise PlanError(f"group '{entry.id}': indices must ascend, be distinct and lie in [0, {group.size})")


def as_cuts(plan: Plan, groups: Mapping[str, Group]) -> list[Cut]:
    """The plan in terms of the graph's factors; groups that keep everything are left out."""
    return [
        Cut(groups[entry.id].atom, groups[entry.id].head_atoms, np.asarray(entry.keep, np.int64))
        for entry in plan.groups
        if entry.kept < entry.size
    ]


def keep_highest(scores: np.ndarray, kept: int) -> list[list[int]]:
    """Indices of the highest scores of each head, ascending; ties keep the lower index.

    Args:
        scores: [heads, size].
        kept: how many stay per head.
    """
    order = np.argsort(-scores, axis=1, kind="stable")[:, :kept]
    return [sorted(int(index) for index in row) for row in order]
