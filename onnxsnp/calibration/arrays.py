"""Arrays as samples: .npy and .npz files, folders of .npy files, arrays in memory, and iterables of arrays or dicts.

Arrays are fed as they are: preprocessing is for pictures. Each must have the rank and the fixed sizes of its input, the
batch in front (an iterable may also give single samples without it). Element types may differ in width (float64 for
float32, int32 for int64, booleans for integers) but not in kind: pixels (uint8) for a float input are an error, not a
silent conversion. Ids must lie within the table that the model looks them up in.
An extra array called `labels` holds the class index of every sample.
"""

from __future__ import annotations

import lzma
import re
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from onnxsnp.errors import DataError
from onnxsnp.runtime import InputSpec

LABELS = "labels"
MAX_EXPANSION = 200
_EXPANSION_FREE = 2**30
# What numpy and zipfile raise on damaged files; numpy reads a header with Python's own parser.
_BROKEN = (
    OSError,
    ValueError,
    TypeError,
    KeyError,
    EOFError,
    OverflowError,
    MemoryError,
    SyntaxError,
    NotImplementedError,
    RecursionError,
    struct.error,
    tokenize.TokenError,
    lzma.LZMAError,
    zipfile.BadZipFile,
    zlib.error,
)
Arrays = dict[str, np.ndarray]


class ArraySource:
    """Samples cut from whole arrays held in memory (or mapped from a .npy file).

    Args:
        arrays: by input name, batch in front, already checked.
        labels: int64 per sample, or None.
        description: for people.
    """

    parallel = False
    generated = False

    def __init__(self, arrays: Arrays, labels: np.ndarray | None, description: str) -> None:
        self._arrays, self.labels = arrays, labels
        self.description = description

    def __len__(self) -> int:
        return len(next(iter(self._arrays.values())))

    def name(self, index: int) -> str:
        """The sample's number, as text."""
        return f"sample {index}"

    def load(self, index: int) -> Arrays:
        """One sample by input name, without batch axis."""
        return {name: _row(array, index) for name, array in self._arrays.items()}


def _row(array: np.ndarray, index: int) -> np.ndarray:
    """One sample. Of a mapped file it is read: mapped pages would count as memory of the process until the end."""
    row = array[index]
    if not isinstance(array, np.memmap) or not array.flags.c_contiguous or array.filename is None:
        return row
    return np.fromfile(array.filename, array.dtype, row.size, offset=array.offset + index * row.nbytes).reshape(
        row.shape
    )


def read_array_file(path: Path, specs: Sequence[InputSpec]) -> ArraySource:
    """Samples of a .npy (single-input models) or .npz file; pickled objects are refused.

    Raises:
        DataError: the file is broken, or an array does not fit its input (expected and got are named).
    """
    _check_expansion(path)
    try:
        loaded = np.load(path, allow_pickle=False, mmap_mode="r" if path.suffix.lower() == ".npy" else None)
        content = loaded if isinstance(loaded, np.ndarray) else {name: loaded[name] for name in loaded.files}
    except _BROKEN as error:
        said = str(error) if "pickle" not in str(error) else "it holds no plain arrays"
        raise DataError(f"cannot read arrays from {path}: {said}", hint="save it with numpy.save or savez") from error
    arrays, labels = _checked(content, specs, str(path))
    _same_length(arrays, labels, str(path))
    return ArraySource(arrays, labels, f"arrays of {path}")


def read_array_folder(folder: Path, specs: Sequence[InputSpec]) -> ArraySource:
    """Samples of a folder with one .npy file per input, named after it (and `labels.npy`, if there are labels).

    In file names `_` stands for what file names cannot hold.

    Raises:
        DataError: a file is broken, missing or one too many, or an array does not fit its input.
    """
    files = {_file_name(spec.name): spec.name for spec in specs}
    content = {}
    for path in sorted(folder.glob("*.npy")):
        try:
            content[files.get(path.stem, path.stem)] = np.load(path, allow_pickle=False, mmap_mode="r")
        except (OSError, ValueError, EOFError, MemoryError, SyntaxError) as error:
            said = str(error) if "pickle" not in str(error) else "it holds no plain array"
            raise DataError(f"cannot read an array from {path}: {said}", hint="save it with numpy.save") from error
    arrays, labels = _checked(content, specs, str(folder))
    _same_length(arrays, labels, str(folder))
    return ArraySource(arrays, labels, f"arrays of {folder}")


def _file_name(name: str) -> str:
    return re.sub(r'[/\\:*?"<>|]', "_", name)


def read_iterable(source: Iterable[Any], specs: Sequence[InputSpec], samples: int | None) -> ArraySource:
    """Samples of an array, a dict of arrays, or an iterable of these.

    The arrays are kept in memory. A one-shot iterator (a generator) is read only until `samples` are there, so an
    endless one is fine when `samples` is given; anything else is read to its end.

    Raises:
        DataError: nothing in it, or an element that does not fit the inputs.
    """
    whole = isinstance(source, np.ndarray | Mapping)
    elements: Iterable[Any] = [source] if whole else source
    wanted = samples if isinstance(source, Iterator) else None
    chunks: list[Arrays] = []
    labels: list[np.ndarray | None] = []
    count = 0
    for number, element in enumerate(elements):
        where = "the data" if whole else f"element {number} of the data"
        chunk, label = _checked(element, specs, where, single=not whole)
        count += _same_length(chunk, label, where)
        chunks.append(chunk)
        labels.append(label)
        if wanted is not None and count >= wanted:
            break
    if not count:
        raise DataError("the data is empty", hint="give at least one sample")
    arrays = {spec.name: _joined([chunk[spec.name] for chunk in chunks], spec)[:wanted] for spec in specs}
    return ArraySource(arrays, _joined_labels(labels, wanted), "arrays given by the caller")


def _joined(parts: Sequence[np.ndarray], spec: InputSpec) -> np.ndarray:
    for number, part in enumerate(parts):
        if part.shape[1:] != parts[0].shape[1:]:
            raise DataError(
                f"samples for input {spec.name!r} differ in shape: {list(parts[0].shape[1:])} in element 0, "
                f"{list(part.shape[1:])} in element {number}",
                hint="pad or cut them to one size",
            )
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _joined_labels(parts: Sequence[np.ndarray | None], wanted: int | None) -> np.ndarray | None:
    present = [part for part in parts if part is not None]
    if present and len(present) != len(parts):
        raise DataError(f"some elements of the data have {LABELS!r} and some have not")
    return np.concatenate(present)[:wanted] if present else None


def _checked(
    element: Any, specs: Sequence[InputSpec], where: str, *, single: bool = False
) -> tuple[Arrays, np.ndarray | None]:
    """Arrays by input name with a batch axis, and labels, from an array or a dict; `single` allows one sample."""
    named = dict(element) if isinstance(element, Mapping) else {"": np.asanyarray(element)}
    inputs = {spec.name for spec in specs}
    labels = named.pop(LABELS, None) if LABELS not in inputs else None
    if len(specs) == 1 and len(named) == 1 and specs[0].name not in named:
        named = {specs[0].name: next(iter(named.values()))}  # one array for one input needs no name
    if set(named) != inputs:
        expected = ", ".join(str(spec) for spec in specs)
        got = ", ".join(sorted(name or "one array without a name" for name in named)) or "nothing"
        missing = inputs - set(named)
        lacks = f" (missing: {', '.join(sorted(missing))})" if missing and named.keys() & inputs else ""
        raise DataError(f"{where} must hold one array per model input: expected {expected}; got {got}{lacks}")
    arrays = {spec.name: _fitted(np.asanyarray(named[spec.name]), spec, where, single) for spec in specs}
    _check_symbols(arrays, specs, where)
    return arrays, None if labels is None else _label_array(np.asarray(labels), where)


def _check_symbols(arrays: Arrays, specs: Sequence[InputSpec], where: str) -> None:
    """Axes that the model gives one symbol must have one size."""
    known: dict[str, tuple[str, int]] = {}
    for spec in specs:
        for symbol, size in zip(spec.shape[1:], arrays[spec.name].shape[1:], strict=True):
            if isinstance(symbol, str):
                name, first = known.setdefault(symbol, (spec.name, size))
                if first != size:
                    raise DataError(
                        f"{where} gives '{symbol}' the size {first} in input {name!r} and {size} in {spec.name!r}",
                        hint="all inputs of a sample must have the same length there",
                    )


def _fitted(array: np.ndarray, spec: InputSpec, where: str, single: bool) -> np.ndarray:
    if single and array.ndim == len(spec.shape) - 1:
        array = array[np.newaxis]
    fits = array.ndim == len(spec.shape) and all(
        not isinstance(size, int) or size == got
        for size, got in zip(spec.shape[1:], array.shape[1:], strict=True)  # without the batch
    )
    kinds = {"i": "iub", "u": "iub", "b": "iub"}.get(spec.dtype.kind, spec.dtype.kind)
    if not fits or array.dtype.kind not in kinds:
        raise DataError(
            f"{where} does not fit input {spec.name!r}: expected {spec}, got {array.dtype}{list(array.shape)}",
            hint="the first axis is the batch; arrays are fed without preprocessing",
        )
    if spec.below is not None and array.size and not -spec.below <= int(array.min()) <= int(array.max()) < spec.below:
        wrong = int(array.max()) if int(array.max()) >= spec.below else int(array.min())
        raise DataError(
            f"{where}: input {spec.name!r} holds the id {wrong}, but its table in the model ends at {spec.below - 1}",
            hint="use the tokenizer (and the preprocessing) that the model was trained with",
        )
    if array.dtype == spec.dtype:
        return array
    converted = array.astype(spec.dtype)
    if array.dtype.kind != "f" and not np.array_equal(converted, array):
        raise DataError(f"{where}: input {spec.name!r} holds {array.dtype} values that do not fit {spec.dtype}")
    return converted


def _label_array(labels: np.ndarray, where: str) -> np.ndarray:
    if labels.dtype.kind not in "iu" or labels.ndim > 1:
        raise DataError(
            f"{LABELS!r} of {where}: expected one integer per sample, got {labels.dtype}{list(labels.shape)}"
        )
    return np.atleast_1d(labels).astype(np.int64)


def _same_length(arrays: Arrays, labels: np.ndarray | None, where: str) -> int:
    counts = {name: len(array) for name, array in arrays.items()}
    if labels is not None:
        counts[LABELS] = len(labels)
    if len(set(counts.values())) != 1:
        listed = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise DataError(f"{where} holds different numbers of samples: {listed}")
    return next(iter(counts.values()))


def _check_expansion(path: Path) -> None:
    if path.suffix.lower() != ".npz" or not zipfile.is_zipfile(path):
        return  # numpy says itself what is wrong with a file that is no archive
    with zipfile.ZipFile(path) as archive:
        total = sum(info.file_size for info in archive.infolist())
    packed = path.stat().st_size
    if total > _EXPANSION_FREE and total > MAX_EXPANSION * packed:
        raise DataError(f"{path} holds {packed} bytes that unpack to {total}: this looks like a zip bomb")
