"""From a tensor in a file to an array: nothing is believed that was not checked against the bytes that are there."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from onnxsnp.errors import ModelError

_DAMAGED = "the file is damaged; export it again"
_BITS = {"UINT4": 4, "INT4": 4, "FLOAT4E2M1": 4, "UINT2": 2, "INT2": 2}  # types that share bytes
_UNREADABLE = ("UNDEFINED", "FLOAT6E2M3", "FLOAT6E3M2")  # without an array of their own


def inline_array(tensor: TensorProto) -> np.ndarray:
    """The values of a tensor that holds them itself; read-only where they are not copied.

    Raises:
        ModelError: an unknown type, a negative size, or more or fewer values than the shape says.
    """
    count = _count(tensor)
    if tensor.HasField("raw_data"):
        needed = _bytes(tensor, count)
        if len(tensor.raw_data) != needed:
            raise ModelError(
                f"initializer '{tensor.name}' declares {list(tensor.dims)} but holds {len(tensor.raw_data)} bytes",
                hint=_DAMAGED,
            )
    try:
        array = numpy_helper.to_array(tensor)
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        raise ModelError(f"initializer '{tensor.name}' cannot be read: {error}", hint=_DAMAGED) from error
    if array.size != count:
        raise ModelError(
            f"initializer '{tensor.name}' declares {list(tensor.dims)} but holds {array.size} values", hint=_DAMAGED
        )
    return array


def external_array(tensor: TensorProto, path: Path | None) -> tuple[np.ndarray, Path]:
    """Map a tensor's external data read-only, after checking that it lies inside the model's own folder.

    Args:
        path: of the model; None if it has none.

    Returns:
        The values and the file they lie in.

    Raises:
        ModelError: the file is elsewhere, missing, or shorter than offset and shape say.
    """
    if path is None:
        raise ModelError(
            f"initializer '{tensor.name}' lies in an external file, but the model has no path",
            hint="load it from its file",
        )
    entries = {entry.key: entry.value for entry in tensor.external_data}
    target = _inside(path.resolve().parent, entries.get("location", ""), tensor.name)
    offset = _number(entries, "offset", 0, tensor.name)
    needed = _bytes(tensor, _count(tensor))
    if offset < 0 or offset + needed > target.stat().st_size:
        raise ModelError(
            f"external data of '{tensor.name}' is {needed} bytes at {offset}, more than {target.name} holds",
            hint="the file is truncated; copy it again",
        )
    length = _number(entries, "length", needed, tensor.name)
    if length != needed:
        raise ModelError(
            f"external data of '{tensor.name}' has length {length}, its shape {list(tensor.dims)} needs {needed} bytes",
            hint=_DAMAGED,
        )
    shape = tuple(tensor.dims)
    dtype = np.dtype(helper.tensor_dtype_to_np_dtype(tensor.data_type))
    if needed == 0:
        return np.zeros(shape, dtype), target
    if needed != math.prod(shape) * dtype.itemsize:  # several values to a byte
        raw = np.memmap(target, dtype=np.uint8, mode="r", offset=offset, shape=(needed,)).tobytes()
        held = TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims, raw_data=raw)
        return inline_array(held), target
    return np.memmap(target, dtype=dtype, mode="r", offset=offset, shape=shape), target


def _inside(folder: Path, location: str, name: str) -> Path:
    """The file a location names, which must lie below the folder, wherever links lead."""
    try:
        target = (folder / location).resolve()
        if not location or Path(location).is_absolute() or folder not in target.parents:
            raise ModelError(
                f"initializer '{name}' points outside the model's folder: '{location[:200]}'",
                hint="external data must lie beside the model",
            )
        found = target.is_file()
    except (OSError, RuntimeError, ValueError) as error:  # a name too long, links in a circle, a zero byte
        raise ModelError(
            f"initializer '{name}' names no usable external file: '{location[:200]}'", hint=_DAMAGED
        ) from error
    if not found:
        raise ModelError(f"external data file is missing: {folder / location}", hint="copy it beside the model")
    return target


def _number(entries: dict[str, str], key: str, default: int, name: str) -> int:
    try:
        return int(entries.get(key, default))
    except ValueError as error:
        raise ModelError(f"initializer '{name}' has a bad {key} '{entries[key][:40]}'", hint=_DAMAGED) from error


def _count(tensor: TensorProto) -> int:
    """Number of values; Python's integers do not overflow."""
    if any(size < 0 for size in tensor.dims):
        raise ModelError(f"initializer '{tensor.name}' has the shape {list(tensor.dims)[:16]}", hint=_DAMAGED)
    return math.prod(tensor.dims)


def _bytes(tensor: TensorProto, count: int) -> int:
    """Bytes that so many values take in a file."""
    names = {number: name for name, number in TensorProto.DataType.items()}
    kind = names.get(tensor.data_type, "UNDEFINED")
    if kind in _UNREADABLE:
        raise ModelError(f"initializer '{tensor.name}' has the unknown type {tensor.data_type}", hint=_DAMAGED)
    if kind == "STRING":
        raise ModelError(f"initializer '{tensor.name}' holds text where it cannot be", hint=_DAMAGED)
    bits = _BITS.get(kind)
    if bits is not None:
        return -(-count * bits // 8)
    return count * int(np.dtype(helper.tensor_dtype_to_np_dtype(tensor.data_type)).itemsize)
