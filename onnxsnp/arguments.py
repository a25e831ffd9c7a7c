"""Checks of command-line arguments that need the file system or the model."""

from __future__ import annotations

import os
from pathlib import Path

import typer

from onnxsnp.errors import ModelError, PlanError

_THREADS = 1024


def output_path(model: Path, output: Path | None, dry_run: bool, read: list[Path | None]) -> Path | None:
    """Where to write, checked before any work is done.

    Args:
        read: files besides the model that the output must not replace.
    """
    if output is None:
        if dry_run:
            return None
        output = model.with_name(model.stem + ".pruned.onnx")
    elif not output.parent.is_dir():
        raise ModelError(f"output folder does not exist: {output.parent}", hint="create it first")
    if output.suffix == ".json" and not dry_run:
        raise ModelError(f"output {output} would be overwritten by its own run record", hint="name it .onnx")
    if output.suffix == ".onnx" and dry_run:
        raise ModelError(f"a dry run writes a plan, not the model {output}", hint="name it .json, or leave -o out")
    for path in (output,) if dry_run else (output, output.with_suffix(".json")):
        _check_writable(path, [model, *read])
    return output


def recovered_path(pruned: Path, output: Path | None, read: list[Path | None]) -> Path:
    """Where a recovered model is written, checked before any work is done."""
    file = output_path(pruned, output or pruned.with_name(pruned.stem + ".recovered.onnx"), False, read)
    assert file is not None
    return file


def page_path(path: Path, others: list[Path | None]) -> None:
    """Refuse a place for a page, or a page where its libraries are missing, before any work is done.

    Args:
        others: files that the run reads or writes, which the page must not replace.
    """
    from onnxsnp.report.extra import check_installed

    check_installed()
    if not path.parent.is_dir():
        raise ModelError(f"output folder does not exist: {path.parent}", hint="create it first")
    if any(other is not None and other.resolve() == path.resolve() for other in others):
        raise ModelError(f"the page {path} would overwrite another file of this run", hint="give another name")
    _check_writable(path, list(others))


def _check_writable(path: Path, read: list[Path | None]) -> None:
    if path.is_dir():
        raise ModelError(f"output {path} is a folder", hint="give a file name")
    if path.exists() and not path.is_file():
        raise ModelError(f"output {path} is not a regular file", hint="give a file name")
    if path.parent.is_dir() and not os.access(path.parent, os.W_OK):
        raise ModelError(f"cannot write into {path.parent}", hint="choose another output with -o")
    for source in read:
        if source is not None and source.is_file() and path.exists() and path.samefile(source):
            raise ModelError(f"the output {path} would overwrite the input", hint="give another name with -o")


def numbers(text: str, most: int = 2**31 - 1) -> list[int]:
    """`1,8,64` as numbers from 1 on, each once.

    Raises:
        typer.BadParameter: it cannot be read, or a number is out of range.
    """
    try:
        found = [int(one) for one in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"'{text}' is no list of numbers; write it as 1,8,64") from None
    if not all(1 <= one <= most for one in found):
        raise typer.BadParameter(f"'{text}' has a number below 1 or beyond {most}")
    return list(dict.fromkeys(found))


def checked_numbers(text: str | None) -> str | None:
    """Refuse, as a wrong use of the command line, what is no list of batch sizes."""
    if text is not None:
        numbers(text)
    return text


def checked_threads(text: str | None) -> str | None:
    """Refuse, as a wrong use of the command line, what is no list of numbers of threads."""
    if text is not None:
        numbers(text, _THREADS)
    return text


def input_shapes(texts: list[str] | None, model: Path) -> dict[str, tuple[int, ...]] | None:
    """`NAME:1x3x224x224` by input name; without a name, for the model's first input."""
    if not texts:
        return None
    from onnxsnp.model import load

    shapes = {}
    for text in texts:
        name, _, sizes = text.rpartition(":")
        try:
            shape = tuple(int(size) for size in sizes.replace("×", "x").split("x"))
        except ValueError:
            raise PlanError(f"cannot read --input-shape '{text}'", hint="write it as NAME:1x3x224x224") from None
        if min(shape) < 1 or max(shape) >= 2**31:
            raise PlanError(f"--input-shape '{text}' has a size below 1 or beyond 2³¹", hint="write it as 1x3x224x224")
        loaded = load(model)
        inputs = {one.name: one.type.tensor_type.shape.dim for one in loaded.proto.graph.input}
        inputs = {one: sizes for one, sizes in inputs.items() if one not in loaded.weights}
        if not inputs:
            raise PlanError("--input-shape was given, but the model has no inputs")
        name = name or next(iter(inputs))
        if name not in inputs:
            raise PlanError(f"--input-shape names '{name}', the model's inputs are {', '.join(inputs)}")
        fixed = [max(one.dim_value, 0) or None for one in inputs[name]]
        if any(want not in (None, got) for want, got in list(zip(fixed, shape, strict=False))[1:]):
            is_now = "×".join(str(one.dim_value or one.dim_param or "?") for one in inputs[name])
            raise PlanError(f"--input-shape '{text}' does not fit input '{name}', which is {is_now}")
        shapes[name] = shape
    return shapes
