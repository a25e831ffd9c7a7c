"""The model that a pruned one was made from, by its run record."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from onnxsnp import model as model_files
from onnxsnp.errors import OnnxSnpError
from onnxsnp.planning.plan import fingerprint


def find_original(path: Path) -> tuple[Path | None, str]:
    """The original of a pruned model, if it is still what it was.

    Args:
        path: of the pruned model; its run record lies beside it.

    Returns:
        Its path, or None and why not in words; nothing where the model has no record.
    """
    record = read_record(path)
    if record is None:
        return None, ""
    given = record.get("input")
    if not isinstance(given, str):
        return None, "the run record says no original; name it with --original for numbers before and after"
    for place in dict.fromkeys([Path(given), path.parent / given, path.parent / Path(given).name]):
        if place.is_file() and not place.samefile(path):
            return (place, "") if _is(place, record) else (None, f"{place} is no longer the model that was pruned")
    return None, f"the original {given} is gone; name it with --original for numbers before and after"


def read_record(path: Path) -> dict[str, Any] | None:
    """The run record of a model, if it is one and of this very file."""
    try:
        record = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        mine = Path(record["output"]).name == path.name and record["after"]["bytes"] == path.stat().st_size
        return record if mine and isinstance(record["plan"]["model"], str) else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _is(place: Path, record: dict[str, Any]) -> bool:
    try:
        return fingerprint(model_files.load(place)) == record["plan"]["model"]
    except OnnxSnpError:
        return False
