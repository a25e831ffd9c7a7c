"""Files and folders that appear whole or not at all, whenever the program is stopped."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from onnxsnp.errors import ModelError

if sys.platform != "win32":
    import fcntl

_SUFFIX = ".part"


@contextlib.contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Write to a temporary file beside `path`, which takes its place only if the block ends without an error.

    Whoever looks sees the old file or the new one. A program that is killed leaves its temporary file behind (hidden,
    ending in .part); the next that writes to the same place removes it.

    Raises:
        ModelError: the folder is missing or cannot be written to, or the disk is full.
    """
    target = Path(path)
    if not target.parent.is_dir():
        raise ModelError(f"output folder does not exist: {target.parent}", hint="create it first")
    if target.exists() and not target.is_file():
        what = "a folder" if target.is_dir() else "not a regular file"
        raise ModelError(f"output {target} is {what}", hint="give a file name")
    try:
        part, handle = _begin(target)
    except OSError as error:
        raise ModelError(
            f"cannot write into {target.parent}: {error.strerror}", hint="choose another output with -o"
        ) from error
    try:
        yield part
        _settle(part)
        os.replace(part, target)
    except OSError as error:
        raise ModelError(f"cannot write {target}: {error.strerror or error}", hint="nothing was left behind") from error
    finally:
        part.unlink(missing_ok=True)
        if handle is not None:
            os.close(handle)


@contextlib.contextmanager
def whole_folder(path: str | Path) -> Iterator[Path]:
    """Write into a new folder, which takes the place of `path` only if the block ends without an error.

    What was there before is removed once the new folder is in its place, and comes back if that fails. A program that
    is killed leaves its folder behind (hidden, ending in .part); the next that writes to the same place removes it, and
    puts back what was there if the kill came between the two.

    Raises:
        ModelError: the parent is missing or cannot be written to, or the disk is full.
    """
    target = Path(path)
    if not target.parent.is_dir():
        raise ModelError(f"output folder does not exist: {target.parent}", hint="create it first")
    try:
        work, handle = _begin_folder(target)
    except OSError as error:
        raise ModelError(
            f"cannot write into {target.parent}: {error.strerror}", hint="choose another output with -o"
        ) from error
    try:
        yield work / "new"
        if target.exists():
            os.replace(target, work / "old")
        os.replace(work / "new", target)
    except OSError as error:
        raise ModelError(f"cannot write {target}: {error.strerror or error}", hint="nothing was left behind") from error
    finally:
        _end_folder(work, target)
        os.close(handle)


def _begin_folder(target: Path) -> tuple[Path, int]:
    """A hidden folder with room for the new one and the old one, and the handle that holds its lock."""
    for entry in os.scandir(target.parent):
        if entry.name.startswith(f".{target.name}.") and entry.name.endswith(_SUFFIX) and entry.is_dir():
            with contextlib.suppress(OSError):  # someone else's; it does no harm
                handle = os.open(Path(entry.path) / "lock", os.O_RDWR)
                try:
                    if _locked(handle):
                        _end_folder(Path(entry.path), target)
                finally:
                    os.close(handle)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=_SUFFIX, dir=target.parent))
    handle = os.open(work / "lock", os.O_RDWR | os.O_CREAT)
    _locked(handle)
    (work / "new").mkdir()
    return work, handle


def _end_folder(work: Path, target: Path) -> None:
    if (work / "old").exists() and not target.exists():
        os.replace(work / "old", target)
    shutil.rmtree(work, ignore_errors=True)


def _begin(target: Path) -> tuple[Path, int | None]:
    """A new temporary file, and the handle that holds its lock where there are locks."""
    _sweep(target)
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=_SUFFIX, dir=target.parent)
    if _locked(handle):
        return Path(name), handle
    os.close(handle)
    return Path(name), None


def _settle(part: Path) -> None:
    """The rights of an ordinary file, and all of it on the disk, before it takes its place."""
    mask = os.umask(0)
    os.umask(mask)
    part.chmod(0o666 & ~mask)
    with open(part, "rb") as stream:
        os.fsync(stream.fileno())


def _sweep(target: Path) -> None:
    """Remove what killed programs left; what a running one writes to is locked."""
    names = [entry.name for entry in os.scandir(target.parent) if entry.is_file(follow_symlinks=False)]
    for name in names:
        if name.startswith(f".{target.name}.") and name.endswith(_SUFFIX):
            with contextlib.suppress(OSError):  # someone else's; it does no harm
                handle = os.open(target.parent / name, os.O_RDWR)
                try:
                    if _locked(handle):
                        os.unlink(target.parent / name)
                finally:
                    os.close(handle)


def _locked(handle: int) -> bool:
    """Take the lock of an open file; False if another program has it, or there are no locks here."""
    if sys.platform == "win32":
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
