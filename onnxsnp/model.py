"""Read and write `.onnx` files: external data inside the model's folder only, outputs whole or not at all."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import TensorProto, numpy_helper

from onnxsnp.atomic import whole_file
from onnxsnp.errors import ModelError
from onnxsnp.tensors import external_array, inline_array
from onnxsnp.wellformed import check_model

_PROTO_LIMIT = 2**31 - 2**20  # a protobuf message holds at most 2 GiB; leave room for the graph itself


@dataclass
class Model:
    """A model as it was read.

    Attributes:
        proto: the whole model; initializers hold no data (it is in `weights`).
        weights: initializer values by name; read-only arrays.
        path: where it came from, if from a file.
        bytes: size of the file and its external data.
        external: the files its external data lies in.
    """

    proto: onnx.ModelProto
    weights: dict[str, np.ndarray]
    path: Path | None
    bytes: int
    external: frozenset[Path] = frozenset()

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


def _from_proto(proto: onnx.ModelProto, path: Path | None) -> Model:
    check_model(proto)
    size = path.stat().st_size if path else 0
    weights: dict[str, np.ndarray] = {}
    external: set[Path] = set()
    for tensor in proto.graph.initializer:
        if tensor.name in weights:
            raise ModelError(f"two initializers share the name '{tensor.name}'", hint="export the model again")
        if tensor.data_location == TensorProto.EXTERNAL:
            weights[tensor.name], file = external_array(tensor, path)
            external.add(file)
            size += weights[tensor.name].nbytes
        else:
            weights[tensor.name] = inline_array(tensor)
    if path is None:
        size = proto.ByteSize()
    shell = onnx.ModelProto()
    shell.CopyFrom(_without_data(proto))
    return Model(shell, weights, path, size, frozenset(external))


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


def check_output(model: Model, path: str | Path) -> None:
    """Refuse an output that would take the place of the model's own weights (they are read while it is written).

    Raises:
        ModelError: with the name.
    """
    target = Path(path)
    for name in [target.name, target.with_suffix(".json").name, *_data_names(target)]:
        own = target.with_name(name)
        if own.exists() and any(own.samefile(file) for file in model.external if file.exists()):
            raise ModelError(f"the output {own} would overwrite weights of the input", hint="give another name with -o")


def _data_names(target: Path) -> list[str]:
    """Where the weights of a model of more than 2 GiB may lie."""
    return [f"{target.name}.data", f"{target.name}.2.data"]


def save(
    proto: onnx.ModelProto,
    path: str | Path,
    check: Callable[[Path], None] | None = None,
    weights: Mapping[str, np.ndarray] | None = None,
    ready: Callable[[int], None] | None = None,
) -> int:
    """Write a model whole or not at all; models over 2 GiB get their weights in `<name>.data` beside them.

    Args:
        proto: the model.
        check: called with the written file before it takes its place; if it raises, nothing is left behind.
        weights: initializers that `proto` does not hold yet; they go to the file one by one, never all in one message.
        ready: called last before the file takes its place, with the bytes written.

    Returns:
        Bytes written.
    """
    target = Path(path)
    held = sum(len(tensor.raw_data) for tensor in proto.graph.initializer)
    if held + sum(array.nbytes for array in (weights or {}).values()) >= _PROTO_LIMIT:
        return _save_apart(proto, target, weights or {}, partial(_finish, check, ready))
    with whole_file(target) as part:
        with open(part, "wb") as stream:
            _write_message(proto, weights or {}, stream)
        return _finish(check, ready, part, 0)


def _finish(check: Callable[[Path], None] | None, ready: Callable[[int], None] | None, part: Path, beside: int) -> int:
    """What is done with a file that is complete; `beside` are the bytes of its external data."""
    if check is not None:
        check(part)
    size = part.stat().st_size + beside
    if ready is not None:
        ready(size)
    return size


def _save_apart(
    proto: onnx.ModelProto, target: Path, weights: Mapping[str, np.ndarray], finish: Callable[[Path, int], int]
) -> int:
    """Write the weights to a file of their own, then the model.

    Two files cannot be replaced at one moment. So the weights go under a name that the model there now does not use;
    the model that takes its place points to the new ones, and only then do the old ones go.
    """
    names = _data_names(target)
    in_use = _locations(target) if any(target.with_name(name).exists() for name in names) else set()
    data = target.with_name(next(name for name in names if name not in in_use))
    shell = onnx.ModelProto()
    shell.CopyFrom(_without_data(proto))
    with whole_file(data) as part, open(part, "wb") as stream:
        for tensor in proto.graph.initializer:
            shell.graph.initializer.append(_moved_out(tensor, stream, data.name))
        for name, array in weights.items():
            tensor = numpy_helper.from_array(np.asarray(array, order="C"), name)
            shell.graph.initializer.append(_moved_out(tensor, stream, data.name))
    try:
        with whole_file(target) as part:
            part.write_bytes(shell.SerializeToString())
            size = finish(part, data.stat().st_size)
    except BaseException:
        data.unlink(missing_ok=True)
        raise
    for name in in_use.intersection(names):
        target.with_name(name).unlink(missing_ok=True)
    return size


def _locations(path: Path) -> set[str]:
    """The external files that a model names; none if there is no readable model."""
    try:
        graph = onnx.load(str(path), format="protobuf", load_external_data=False).graph
    except (OSError, DecodeError):
        return set()
    return {entry.value for tensor in graph.initializer for entry in tensor.external_data if entry.key == "location"}


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


def _moved_out(tensor: TensorProto, stream: BinaryIO, location: str) -> TensorProto:
    """A tensor whose values, unless they are few, were written to the stream."""
    moved = TensorProto()
    if len(tensor.raw_data) < 1024:
        moved.CopyFrom(tensor)
        return moved
    moved.name, moved.data_type, moved.data_location = tensor.name, tensor.data_type, TensorProto.EXTERNAL
    moved.dims.extend(tensor.dims)
    offset = stream.tell()
    stream.write(tensor.raw_data)
    for key, value in (("location", location), ("offset", str(offset)), ("length", str(len(tensor.raw_data)))):
        moved.external_data.add(key=key, value=value)
    return moved
