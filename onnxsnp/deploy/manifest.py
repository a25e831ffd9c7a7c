"""The list of what a bundle holds: which files are its own, and whether they are still what they were."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from onnxsnp.errors import ModelError, PlanError

KIND = "onnxsnp bundle"
FORMAT = 1
MANIFEST = "manifest.json"
RESULTS = "results"  # the folder that build.sh makes


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of a bundle.

    Raises:
        ModelError: the folder is no bundle, or of a newer format.
    """
    path = Path(folder) / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{folder} is no bundle: {path.name} cannot be read") from error
    if not isinstance(manifest, dict) or manifest.get("kind") != KIND:
        raise ModelError(f"{folder} is no bundle: {path.name} says nothing of one")
    if manifest.get("format") != FORMAT:
        raise ModelError(f"{folder} is a bundle of format {manifest.get('format')}", hint="use the onnxsnp of its age")
    return manifest


def damaged_files(folder: str | Path) -> list[str]:
    """Files of a bundle that are missing or not what they were written as."""
    found = []
    for entry in read_manifest(folder)["files"]:
        path = Path(folder) / entry["name"]
        if not path.is_file() or digest(path) != entry["sha256"]:
            found.append(str(entry["name"]))
    return found


def refuse_foreign(folder: Path) -> None:
    """A bundle takes the place of nothing but an earlier bundle and its results.

    Raises:
        PlanError: something else is there.
    """
    hint = "choose another folder with -o, or remove it first"
    if not folder.exists() and not folder.is_symlink():
        return
    if not folder.is_dir() or folder.is_symlink():
        raise PlanError(f"{folder} exists and is not a folder", hint=hint)
    if not any(folder.iterdir()):
        return
    try:
        known = {entry["name"] for entry in read_manifest(folder)["files"]} | {MANIFEST}
    except ModelError as error:
        raise PlanError(f"{folder} exists and is not an earlier bundle", hint=hint) from error
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        made = inside.parts[0] in (RESULTS, "__pycache__")
        if not path.is_dir() and not made and inside.as_posix() not in known:
            raise PlanError(f"{folder} is an earlier bundle, but {inside} in it is not part of one", hint=hint)


def described(folder: Path, path: Path) -> dict[str, Any]:
    """A file as the manifest has it."""
    return {
        "name": path.relative_to(folder).as_posix(),
        "bytes": path.stat().st_size,
        "sha256": digest(path),
    }


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        for block in iter(lambda: stream.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()
