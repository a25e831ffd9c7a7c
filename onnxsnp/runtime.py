"""Opening and running models in onnxruntime: one place for session options and for readable errors."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from onnxsnp.errors import ModelError
from onnxsnp.limits import bound_memory

if TYPE_CHECKING:
    import onnxruntime as ort

Model = str | Path | bytes


class Session(Protocol):
    """The part of onnxruntime's InferenceSession that this package uses."""

    def get_inputs(self) -> Any: ...
    def get_outputs(self) -> Any: ...
    def run(self, outputs: Any, feeds: Any) -> Any: ...


_DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(double)": "float64",
    "tensor(bool)": "bool",
    **{f"tensor({sign}int{bits})": f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)},
}
_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


@dataclass(frozen=True)
class InputSpec:
    """One input of a model.

    Attributes:
        name: the input's name.
        shape: one entry per axis: an int is fixed, a str (its symbol) or None is dynamic. Axis 0 is the batch.
        dtype: the numpy element type.
        below: exclusive upper bound of the ids it holds, where the model looks them up in a table; else None.
    """

    name: str
    shape: tuple[int | str | None, ...]
    dtype: np.dtype[Any]
    below: int | None = None

    def __str__(self) -> str:
        sizes = ", ".join("?" if size is None else str(size) for size in self.shape)
        return f"{self.name}: ({sizes}) {self.dtype}"


def is_inverted(mask: str) -> bool:
    """Whether a mask marks what is not there, as PyTorch's padding masks do."""
    return "padding" in mask.lower()


def symbol_size(symbol: str, size_of: Callable[[str], int]) -> int:
    """The size of a symbolic axis; `past + sequence` and `2*width` are computed, anything else is one symbol.

    Args:
        size_of: the size of a single symbol.
    """
    parts = [[factor.strip() for factor in term.split("*")] for term in symbol.split("+")]
    if not all(factor.isidentifier() or factor.isdigit() for term in parts for factor in term):
        return size_of(symbol)
    return sum(int(np.prod([int(one) if one.isdigit() else size_of(one) for one in term])) for term in parts)


def channel_axis(spec: InputSpec) -> int | None:
    """The axis of the colour channels when the input looks like a batch of images, else None.

    An image input has four axes, floating-point or uint8 elements and 1 or 3 channels in axis 1 (NCHW) or in the
    last axis (NHWC). A dynamic axis 1 counts as channels, unless the name says cache (`past...`) or mask.
    """
    if len(spec.shape) != 4 or not (spec.dtype.kind == "f" or spec.dtype == np.uint8):
        return None
    if spec.shape[1] in (1, 3):
        return 1
    if spec.shape[3] in (1, 3):
        return 3
    lowered = spec.name.lower()
    return 1 if not isinstance(spec.shape[1], int) and "past" not in lowered and "mask" not in lowered else None


def image_spec(specs: Sequence[InputSpec]) -> InputSpec | None:
    """The first input that looks like a batch of images (see `channel_axis`), or None."""
    return next((spec for spec in specs if channel_axis(spec) is not None), None)


def input_specs(session: Session) -> list[InputSpec]:
    """The inputs that a session must be fed.

    Raises:
        ModelError: an input is not a plain tensor of a type that numpy has (sequences, strings, bfloat16).
    """
    specs = []
    for value in session.get_inputs():
        if value.type not in _DTYPES:
            raise ModelError(
                f"input {value.name!r} has type {value.type}, which cannot be fed from numpy",
                hint="export the model with float32, float16 or integer inputs",
            )
        shape = tuple(size if isinstance(size, int) and size >= 0 else _symbol(size) for size in value.shape)
        specs.append(InputSpec(value.name, shape, np.dtype(_DTYPES[value.type])))
    return specs


def open_session(
    model: Model,
    *,
    threads: int | None = None,
    provider: str = "cpu",
    optimize: bool = True,
    prepack: bool = True,
    arena: bool = True,
    external: Mapping[str, ort.OrtValue] | None = None,
    bounded: bool = False,
    profile: Path | None = None,
) -> ort.InferenceSession:
    """Open a model in onnxruntime.

    Args:
        model: path of an ONNX file, or a serialized model.
        threads: threads inside one operator; None lets onnxruntime choose (the physical cores).
        provider: `cpu` or `cuda`.
        optimize: False runs the graph exactly as written (needed when its own nodes are being looked at).
        prepack: False saves the second copy of every matrix that onnxruntime keeps in its own layout.
        arena: False returns the memory of activations after each run; with many sessions what each keeps is more than
            the model.
        external: values of initializers that a serialized model declares as external data.
        bounded: runs fail when they need more memory than `onnxsnp.limits.memory_limit`.
        profile: how the file begins that the session's profiler writes (`end_profiling` returns its name).

    Raises:
        ModelError: the file is missing, is not valid ONNX, uses operators that cannot run, or the provider is not
            there. A session that fell back from CUDA to the CPU without saying so is an error too.
    """
    import onnxruntime as ort

    if threads is not None and threads < 1:
        raise ModelError(f"threads must be 1 or more, got {threads}")
    if not isinstance(model, bytes) and not Path(model).is_file():
        raise ModelError(f"no such model file: {model}", hint="give the path of an .onnx file")
    options = _session_options(threads, optimize)
    options.enable_cpu_mem_arena = arena
    if not prepack:
        options.add_session_config_entry("session.disable_prepacking", "1")
    if bounded:
        bound_memory()
        options.add_session_config_entry("session.use_env_allocators", "1")
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    if external:
        options.add_external_initializers(list(external), list(external.values()))
    try:
        session = ort.InferenceSession(
            model if isinstance(model, bytes) else str(model), options, providers=_provider_list(provider)
        )
    except _runtime_errors() as error:
        raise ModelError(f"onnxruntime cannot open {describe_model(model)}: {first_line(error)}") from error
    if session.get_providers()[0] != _PROVIDERS[provider]:
        raise ModelError(
            f"onnxruntime could not start {_PROVIDERS[provider]} for {describe_model(model)} and fell back to "
            f"{session.get_providers()[0]}",
            hint="check the CUDA and cuDNN libraries, or use the cpu provider",
        )
    return session


def run_session(session: Session, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """All outputs of one run, in the model's order.

    Raises:
        ModelError: onnxruntime refused the inputs or failed in a node; the message carries the shapes that were fed.
    """
    with readable_errors(inputs):
        return list(session.run(None, dict(inputs)))


@contextmanager
def readable_errors(inputs: Mapping[str, np.ndarray]) -> Iterator[None]:
    """What onnxruntime raises inside becomes a `ModelError` that says what was fed."""
    try:
        yield
    except _runtime_errors() as error:
        fed = ", ".join(f"{name} {array.dtype}{list(array.shape)}" for name, array in inputs.items())
        raise ModelError(f"the model failed on inputs {fed}: {first_line(error)}") from error


def describe_model(model: object) -> str:
    """A short name for messages: the path, or `the model in memory`."""
    return str(model) if isinstance(model, str | Path) else "the model in memory"


def model_bytes(model: Model) -> int:
    """Size of a model in bytes: the file (or the serialized bytes) and the external data files it names."""
    if isinstance(model, bytes):
        return len(model)
    import onnx

    path = Path(model)
    graph = onnx.load(str(path), load_external_data=False).graph
    locations = {
        entry.value for tensor in graph.initializer for entry in tensor.external_data if entry.key == "location"
    }
    parts = [path, *(path.parent / location for location in sorted(locations))]
    return sum(part.stat().st_size for part in parts if part.is_file())


def _session_options(threads: int | None, optimize: bool) -> ort.SessionOptions:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4  # errors come back as exceptions; onnxruntime need not print them too
    options.intra_op_num_threads = threads or 0
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    level = ort.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimize else level.ORT_DISABLE_ALL
    if not optimize:
        # Shape nodes run as soon as they can: a graph in which every tensor's shape is asked for (`graph.probe`)
        # would otherwise keep every tensor until the end.
        options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
    # Several sessions take turns in one process (evaluate, bench): the pool of an idle one must not spin on the
    # cores that the next one is being timed on.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


def _provider_list(provider: str) -> list[str]:
    import onnxruntime as ort

    if provider not in _PROVIDERS:
        raise ModelError(f"unknown provider {provider!r}", hint=f"use one of: {', '.join(_PROVIDERS)}")
    wanted = _PROVIDERS[provider]
    if wanted not in ort.get_available_providers():
        raise ModelError(f"this onnxruntime has no {wanted}", hint="install onnxruntime-gpu, or use the cpu provider")
    return [wanted] if provider == "cpu" else [wanted, _PROVIDERS["cpu"]]


@cache
def _runtime_errors() -> tuple[type[Exception], ...]:
    # onnxruntime's exceptions have no common base of their own, so they are collected from where they are defined.
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    own = [item for item in vars(state).values() if isinstance(item, type) and issubclass(item, Exception)]
    return (*own, RuntimeError, ValueError)


def first_line(error: Exception) -> str:
    """The first line of what onnxruntime or onnx says."""
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : (\w+) : ", "", str(error))
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0][:400] if lines else type(error).__name__


def _symbol(size: object) -> str | None:
    return size if isinstance(size, str) and size else None
