"""What the Python packages of TensorRT and of TensorRT for RTX have in common: logging, importing, building.

Both are imported where they are used; `library` is the module. Their messages quote expressions of their source, and
some of them appear only in the log; here they become one line that names the node, the operator and what to do.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import onnx

from onnxsnp.errors import ModelError, one_line

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Built:
    """An engine in memory.

    Attributes:
        data: the serialized engine.
        library: what built it, with its version.
        compute_capabilities: it was built for, such as "8.9"; empty for the library's default.
        seconds: the build took.
    """

    data: bytes
    library: str
    compute_capabilities: tuple[str, ...]
    seconds: float


_MOST = 2**31 - 1  # bytes of one protobuf message
_UNSUPPORTED = ("UNSUPPORTED_NODE", "UNSUPPORTED_GRAPH")
_PLACE = re.compile(r"\.? In [\w:~]+ at [^\s:]+:\d+\)?")  # where in the library's source
_HEAD = re.compile(r"^(?:[\w:]+: |\[[^\]]*\] )?Error Code \d+: [\w ]*\((?:\[[^\]]*\] )?")


def open_log(library: Any) -> Any:
    """A logger that keeps what was wrong, in `errors`, and prints nothing."""

    class Log(library.ILogger):
        def __init__(self) -> None:
            library.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, text: str) -> None:
            if severity in (library.ILogger.INTERNAL_ERROR, library.ILogger.ERROR):
                self.errors.append(text)

    return Log()


def import_model(library: Any, network: Any, log: Any, proto: onnx.ModelProto, name: str) -> Any:
    """Read a model into a network.

    Args:
        proto: with its weights inside.
        name: of the library with its version, for messages.

    Returns:
        The parser, which has to live as long as the network: it owns the weights.

    Raises:
        ModelError: the importer does not take the model; names the first node and the number of others.
    """
    if proto.ByteSize() > _MOST:
        raise ModelError(f"the model is larger than 2 GB, which {name} does not import from memory")
    parser = library.OnnxParser(network, log)
    if not parser.parse(proto.SerializeToString()):
        raise refusal([parser.get_error(index) for index in range(parser.num_errors)], log.errors, proto, name)
    return parser


def refusal(errors: list[Any], logged: list[str], proto: onnx.ModelProto, name: str) -> ModelError:
    """The errors of an importer as one; of several the first, since later ones often follow from it."""
    if not errors:
        return ModelError(f"{name} does not read the model: {_reason(logged[-1] if logged else 'no reason given')}")
    first = errors[0]
    node, operator = _place(first, proto)
    code = str(first.code()).rpartition(".")[2].partition(":")[0]
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    if code in _UNSUPPORTED or "Plugin not found" in first.desc():
        hint = "write it in other operators when exporting, or choose a target whose importer takes it"
        return ModelError(f"{name} does not support {operator}{more}", node=node, hint=hint)
    return ModelError(f"{name} does not take {operator}: {_reason(first.desc())}{more}", node=node)


def _place(error: Any, proto: onnx.ModelProto) -> tuple[str | None, str]:
    """Name and operator of the node of an error; before TensorRT 10 it carries only the index."""
    if hasattr(error, "node_name"):
        return error.node_name() or None, error.node_operator() or "the model"
    index = error.node()
    if not 0 <= index < len(proto.graph.node):
        return None, "the model"
    node = proto.graph.node[index]
    return node.name or (node.output[0] if node.output else None), node.op_type


def _reason(text: str) -> str:
    """The words of a message of the library that say something."""
    lines = [line for line in text.splitlines() if line.strip() and "Invalid Node" not in line]
    said = _PLACE.sub("", lines[0] if lines else text)
    quoted = re.search(r'&& "([^"]+)"', said)  # an assertion with its message
    return one_line(quoted.group(1) if quoted else _HEAD.sub("", said).strip(" ()"))


def failed_build(log: Any, name: str, advice: dict[str, str]) -> ModelError:
    """What a builder that returned nothing had to say.

    Args:
        advice: what to do, by words of the message.
    """
    said = [_reason(text) for text in log.errors]
    text = said[-1] if said else "it gave no reason"
    hint = next((what for words, what in advice.items() if any(words in one for one in said)), None)
    node = re.search(r"'([^']+)'", text)
    return ModelError(f"{name} could not build an engine: {text}", node=node.group(1) if node else None, hint=hint)


def watch(library: Any, config: Any, progress: Progress | None) -> None:
    """Report the steps of a build, where the library can (TensorRT 8.6 and later)."""
    if progress is None or not hasattr(library, "IProgressMonitor"):
        return
    report = progress

    class Monitor(library.IProgressMonitor):
        def __init__(self) -> None:
            library.IProgressMonitor.__init__(self)
            self.root, self.steps, self.done = "", 0, 0

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            if parent is None:
                self.root, self.steps, self.done = phase, steps, 0

        def step_complete(self, phase: str, step: int) -> bool:
            if phase == self.root:
                self._reach(step + 1)
            return True

        def phase_finish(self, phase: str) -> None:
            if phase == self.root:  # the last step is not always reported
                self._reach(self.steps)

        def _reach(self, done: int) -> None:
            if done > self.done:
                self.done = done
                report("build", done, self.steps)

    config.progress_monitor = Monitor()


def version_of(library: Any) -> tuple[int, ...]:
    """The version as numbers: of `10.3.0.26` (10, 3, 0, 26), of `8.2.1.9+cuda` (8, 2, 1, 9)."""
    return tuple(int(part) for part in re.findall(r"\d+", library.__version__.partition("+")[0]))
