"""Read and write `.onnx` files: external data inside the model's folder only, outputs whole or not at all."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import TensorProto, helper, numpy_helper

from onnxsnp.errors import ModelError

_PROTO_LIMIT = 2**31 - 2**20  # a protobuf message holds at most 2 GiB; leave room for the graph itself


@dataclass
class Model:
    """A model as it was read.

    Attributes:
        proto: the whole model; initializers hold no data (it is in `weights`).
        weights: initializer values by name; read-only arrays.
        path: where it came from, if from a file.
        bytes: size of the file and its external data.
    """

    proto: onnx.ModelProto
    weights: dict[str, np.ndarray]
    path: Path | None
    bytes: int

    @property
    def metadata(self) -> dict[str, str]:
        """The file's metadata_props."""
        return {entry.key: entry.value for entry in self.proto.metadata_props}


def load(source: str | Path | onnx.ModelProto | Model) -> Model:
    """Read a model.

    Args:
        source: a path, or a model already in memory.

    Raises:
        ModelError: the file is absent, empty, truncated or not ONNX; external data is missing or outside its folder.
    """
    if isinstance(source, Model):
        return source
    if isinstance(source, onnx.ModelProto):
        return _from_proto(source, None)
    path = Path(source)
    if not path.exists():
        raise ModelError(f"no such model file: {path}", hint="check the path")
    if not path.is_file():
        raise ModelError(f"{path} is not a file", hint="give the .onnx file itself")
    try:
        proto = onnx.load(str(path), format="protobuf", load_external_data=False)
    except DecodeError as error:
        raise ModelError(
            f"{path} is not an ONNX model, or is truncated", hint="export it again or check the download"
        ) from error
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from error
    if not proto.graph.node or not proto.opset_import:
        raise ModelError(f"{path} is empty or is not an ONNX model", hint="export it again or check the download")
    return _from_proto(proto, path)


def _from_proto(source: onnx.ModelProto, path: Path | None) -> Model:
    proto = source
    size = path.stat().st_size if path else 0
    weights: dict[str, np.ndarray] = {}
    for tensor in proto.graph.initializer:
        if tensor.name in weights:
            raise ModelError(f"two initializers share the name '{tensor.name}'", hint="export the model again")
        if tensor.data_location == TensorProto.EXTERNAL:
            weights[tensor.name] = _external_array(tensor, path)
            size += weights[tensor.name].nbytes
        else:
            weights[tensor.name] = _inline_array(tensor)
    if path is None:
        size = source.ByteSize()
    shell = onnx.ModelProto()
    shell.CopyFrom(_without_data(proto))
    return Model(shell, weights, path, size)


def _inline_array(tensor: TensorProto) -> np.ndarray:
    expected = int(np.prod(tensor.dims, dtype=np.int64)) if tensor.dims else 1
    if tensor.HasField("raw_data"):
        item = _itemsize(tensor)
        if item and len(tensor.raw_data) != expected * item:
            raise ModelError(
                f"initializer '{tensor.name}' declares {list(tensor.dims)} but holds {len(tensor.raw_data)} bytes",
                hint="the file is damaged; export it again",
            )
    try:
        return numpy_helper.to_array(tensor)
    except (ValueError, TypeError, KeyError) as error:
        raise ModelError(
            f"initializer '{tensor.name}' cannot be read: {error}", hint="the file is damaged; export it again"
        ) from error


def _itemsize(tensor: TensorProto) -> int:
    """Bytes of one element, 0 for types that are packed below a byte or have no fixed size."""
    if (
        tensor.data_type in (TensorProto.STRING, TensorProto.UNDEFINED)
        or "4" in TensorProto.DataType.Name(tensor.data_type)[-1:]
    ):
        return 0
    try:
        return int(np.dtype(helper.tensor_dtype_to_np_dtype(tensor.data_type)).itemsize)
    except KeyError:
        return 0


def _external_array(tensor: TensorProto, path: Path | None) -> np.ndarray:
    """Map a tensor's external data read-only, after checking that it lies inside the model's own folder."""
    if path is None:
        raise ModelError(
            f"initializer '{tensor.name}' lies in an external file, but the model has no path",
            hint="load it from its file",
        )
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    folder = path.resolve().parent
    target = (folder / location).resolve()
    if not location or Path(location).is_absolute() or folder not in target.parents:
        raise ModelError(
            f"initializer '{tensor.name}' points outside the model's folder: '{location}'",
            hint="external data must lie beside the model",
        )
    if not target.is_file():
        raise ModelError(f"external data file is missing: {folder / location}", hint="copy it beside the model")
    try:
        offset = int(entries.get("offset", "0"))
    except ValueError as error:
        raise ModelError(f"initializer '{tensor.name}' has a bad offset '{entries['offset']}'") from error
    dtype = np.dtype(helper.tensor_dtype_to_np_dtype(tensor.data_type))
    shape = tuple(int(size) for size in tensor.dims)
    needed = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if offset < 0 or min(shape, default=0) < 0 or offset + needed > target.stat().st_size:
        raise ModelError(
            f"external data of '{tensor.name}' is {needed} bytes at {offset}, more than {target.name} holds",
            hint="the file is truncated; copy it again",
        )
    if needed == 0:
        return np.zeros(shape, dtype)
    return np.memmap(target, dtype=dtype, mode="r", offset=offset, shape=shape)


def _without_data(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The same model with its initializers' names, types and shapes only."""
    shell = onnx.ModelProto()
    for entry, value in proto.ListFields():
        if entry.name != "graph":
            _copy_field(shell, entry, value)
    for entry, value in proto.graph.ListFields():
        if entry.name != "initializer":
            _copy_field(shell.graph, entry, value)
    return shell


def _copy_field(target: object, entry: object, value: object) -> None:
    name = entry.name  # type: ignore[attr-defined]
    held = getattr(target, name)
    if hasattr(held, "MergeFrom"):
        held.MergeFrom(value)
    elif hasattr(held, "extend"):
        held.extend(value)
    else:
        setattr(target, name, value)


@contextlib.contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Write to a temporary file beside `path`, which takes its place only if the block ends without an error.

    Raises:
        ModelError: the folder is missing or cannot be written to.
    """
    target = Path(path)
    if not target.parent.is_dir():
        raise ModelError(f"output folder does not exist: {target.parent}", hint="create it first")
    if target.exists() and not target.is_file():
        what = "a folder" if target.is_dir() else "not a regular file"
        raise ModelError(f"output {target} is {what}", hint="give a file name")
    try:
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent)
    except OSError as error:
        raise ModelError(
            f"cannot write into {target.parent}: {error.strerror}", hint="choose another output with -o"
        ) from error
    os.close(handle)
    part = Path(name)
    try:
        yield part
        mask = os.umask(0)
        os.umask(mask)
        part.chmod(0o666 & ~mask)
        os.replace(part, target)
    except OSError as error:
        raise ModelError(f"cannot write {target}: {error.strerror or error}", hint="nothing was left behind") from error
    finally:
        part.unlink(missing_ok=True)


def save(
    proto: onnx.ModelProto,
    path: str | Path,
    check: Callable[[Path], None] | None = None,
    weights: Mapping[str, np.ndarray] | None = None,
) -> int:
    """Write a model whole or not at all; models over 2 GiB get their weights in `<name>.data` beside them.

    Args:
        proto: the model.
        check: called with the written file before it takes its place; if it raises, nothing is left behind.
        weights: initializers that `proto` does not hold yet; they go to the file one by one, never all in one message.

    Returns:
        Bytes written.
    """
    target = Path(path)
    held = sum(len(tensor.raw_data) for tensor in proto.graph.initializer)
    if held + sum(array.nbytes for array in (weights or {}).values()) < _PROTO_LIMIT:
        with whole_file(target) as part:
            with open(part, "wb") as stream:
                _write_message(proto, weights or {}, stream)
            if check is not None:
                check(part)
        return target.stat().st_size
    for name, array in (weights or {}).items():
        proto.graph.initializer.append(numpy_helper.from_array(np.asarray(array, order="C"), name))
    data = target.with_name(target.name + ".data")
    with whole_file(data) as data_part, whole_file(target) as part:
        with open(data_part, "wb") as stream:
            for tensor in proto.graph.initializer:
                _move_out(tensor, stream, data.name)
        part.write_bytes(proto.SerializeToString())
    return target.stat().st_size + data.stat().st_size


_GRAPH = onnx.ModelProto.DESCRIPTOR.fields_by_name["graph"].number
_INITIALIZER = onnx.GraphProto.DESCRIPTOR.fields_by_name["initializer"].number


def _write_message(proto: onnx.ModelProto, weights: Mapping[str, np.ndarray], stream: BinaryIO) -> None:
    """The model and its weights as one protobuf message, serialised one initializer at a time.

    Serialising the whole message at once needs about three times its size in memory. A message is its fields one after
    the other, each with its number and length in front, so the parts can be written as they come.
    """
    shell = onnx.ModelProto()
    shell.CopyFrom(proto)
    shell.ClearField("graph")
    body = proto.graph.SerializeToString()

    def tensor(name: str) -> bytes:
        return numpy_helper.from_array(np.asarray(weights[name], order="C"), name).SerializeToString()

    sizes = {name: len(tensor(name)) for name in weights}
    total = len(body) + sum(len(_field(_INITIALIZER, size)) + size for size in sizes.values())
    stream.write(shell.SerializeToString() + _field(_GRAPH, total) + body)
    for name, size in sizes.items():
        stream.write(_field(_INITIALIZER, size))
        stream.write(tensor(name))


def _field(number: int, size: int) -> bytes:
    """The head of a length-delimited protobuf field: tag and length as base-128 varints."""
    head = bytearray()
    for value in (number << 3 | 2, size):
        while value > 127:
            head.append(value & 127 | 128)
            value >>= 7
        head.append(value)
    return bytes(head)


def give_back() -> None:
    """Return freed memory to the system (glibc keeps what lay between other allocations); elsewhere nothing happens.

    With models of hundreds of megabytes that come and go, what is kept can be larger than the model itself.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def _move_out(tensor: TensorProto, stream: object, location: str) -> None:
    raw = tensor.raw_data
    if len(raw) < 1024:
        return
    offset = stream.tell()  # type: ignore[attr-defined]
    stream.write(raw)  # type: ignore[attr-defined]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", str(offset)), ("length", str(len(raw)))):
        tensor.external_data.add(key=key, value=value)
