"""The working graph: nodes, and weights as numpy arrays that every session and every copy shares.

onnx protobufs hold weights as bytes inside the model's message, so each copy of a model copies its weights. Pruning
needs several variants of one model at a time (measured, masked, cut), so here the weights stand beside the nodes:
copies of a `Graph` share them, and `session` hands them to onnxruntime without a second copy.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import NodeProto, helper, numpy_helper

from onnxsnp.errors import ModelError
from onnxsnp.graph.precision import BRAIN, holds_brain, is_float, wide, widen
from onnxsnp.runtime import open_session, readable_errors

if TYPE_CHECKING:
    import onnxruntime as ort

_CONSTANT_SIZE = 16  # entries; weights up to this size, and integers, are written into a session's model


@dataclass(frozen=True)
class Part:
    """A weight that is `source` restricted to `indices` of `axis`."""

    source: str
    axis: int
    indices: np.ndarray


@dataclass
class Graph:
    """A model's top-level graph.

    Attributes:
        shell: the model without its nodes and weights: inputs, outputs, opset imports, metadata.
        nodes: in topological order; every node has a unique, non-empty name.
        weights: constant tensors by name (initializers and what Constant nodes held).
        origin: for a weight that was renamed when it stopped being shared, the name it had in the file.
        parts: for a weight that was taken out of a packed one, which part of which weight it is.
        copies: for a node that was copied for one of the readers of what it computes, the name of the node it copies.
        unexpanded: by node name, why a fused operator could not be spelled out.
    """

    shell: onnx.ModelProto
    nodes: list[NodeProto]
    weights: dict[str, np.ndarray]
    origin: dict[str, str] = field(default_factory=dict)
    parts: dict[str, Part] = field(default_factory=dict)
    copies: dict[str, str] = field(default_factory=dict)
    unexpanded: dict[str, str] = field(default_factory=dict)
    _open: dict[tuple[int | None, str], SharedSession] = field(default_factory=dict, repr=False, compare=False)

    def copy(self) -> Graph:
        """A graph with nodes of its own and the same weight arrays."""
        nodes = []
        for node in self.nodes:
            clone = NodeProto()
            clone.CopyFrom(node)
            nodes.append(clone)
        graph = Graph(self.shell, nodes, dict(self.weights), dict(self.origin), dict(self.parts), dict(self.copies))
        graph.unexpanded = dict(self.unexpanded)
        return graph

    @property
    def inputs(self) -> list[str]:
        return [value.name for value in self.shell.graph.input]

    @property
    def outputs(self) -> list[str]:
        return [value.name for value in self.shell.graph.output]

    @property
    def opset(self) -> int:
        """Version of the default operator set (0 if it is not imported)."""
        return next((entry.version for entry in self.shell.opset_import if entry.domain in ("", "ai.onnx")), 0)

    @property
    def brain(self) -> bool:
        """Whether the model computes in bfloat16, at least in part."""
        return any(array.dtype == BRAIN for array in self.weights.values()) or holds_brain(self.shell, self.nodes)

    def producers(self) -> dict[str, NodeProto]:
        """The node that computes each tensor."""
        return {name: node for node in self.nodes for name in node.output if name}

    def readers(self) -> dict[str, list[tuple[NodeProto, int]]]:
        """Who reads each tensor: (node, input slot); slot -1 stands for a read from inside a node's subgraph."""
        found: dict[str, list[tuple[NodeProto, int]]] = {}
        for node in self.nodes:
            for slot, name in enumerate(node.input):
                if name:
                    found.setdefault(name, []).append((node, slot))
            for name in subgraph_reads(node):
                found.setdefault(name, []).append((node, -1))
        return found

    def names(self) -> set[str]:
        """Every tensor and node name in use."""
        used = set(self.weights) | set(self.inputs) | set(self.outputs)
        for node in self.nodes:
            used.add(node.name)
            used.update(node.output)
        return used

    def drop_dead(self) -> None:
        """Remove nodes and weights that no output depends on."""
        needed = set(self.outputs)
        kept = []
        for node in reversed(self.nodes):
            if any(name in needed for name in node.output):
                kept.append(node)
                needed.update(node.input)
                needed.update(subgraph_reads(node))
        self.nodes = kept[::-1]
        self.weights = {name: array for name, array in self.weights.items() if name in needed}
        named = set(self.weights)
        for name in self.weights:  # a part of a part needs the one it was taken from
            while name in self.parts:
                name = self.parts[name].source
                named.add(name)
        self.parts = {name: part for name, part in self.parts.items() if name in named}
        self.origin = {name: source for name, source in self.origin.items() if name in named}

    def bare_proto(self) -> onnx.ModelProto:
        """The model without its weights."""
        model = onnx.ModelProto()
        model.CopyFrom(self.shell)
        model.graph.node.extend(self.nodes)
        return model

    def to_proto(self) -> onnx.ModelProto:
        """A complete model with the weights inside."""
        model = self.bare_proto()
        for name, array in self.weights.items():
            model.graph.initializer.append(to_tensor(array, name))
        return model

    def skeleton(self, feed: Collection[str] = ()) -> onnx.ModelProto:
        """A valid model of the same structure in which large weights, and those in `feed`, are inputs."""
        model = self.bare_proto()
        for name, array in self.weights.items():
            if not _is_fed(array) and name not in feed:
                model.graph.initializer.append(to_tensor(array, name))
            else:
                kind = helper.np_dtype_to_tensor_dtype(array.dtype)
                model.graph.input.append(helper.make_tensor_value_info(name, kind, array.shape))
        return model

    def session(
        self,
        outputs: Sequence[str] | None = None,
        *,
        threads: int | None = None,
        provider: str = "cpu",
        optimize: bool = True,
        feed: Collection[str] = (),
        bounded: bool = False,
        arena: bool = False,
    ) -> SharedSession:
        """Open this graph in onnxruntime without copying its weights; one that holds bfloat16 in single precision.

        Args:
            outputs: tensor names to return instead of the model's own outputs.
            optimize: False keeps every tensor of the graph as it is written (no fusion).
            feed: weights that must be replaceable in `SharedSession.run`, however small they are.
            bounded: runs may not use all of the machine's memory.
            arena: keep the memory of activations between runs, which is faster when there are many.

        Raises:
            ModelError: onnxruntime refuses the graph.
        """
        model = self.skeleton(feed)
        if outputs is not None:
            del model.graph.output[:]
            model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs)
        shared = {name: array for name, array in self.weights.items() if _is_fed(array) or name in feed}
        if self.brain:
            widen(model)
        session = open_session(
            model.SerializeToString(),
            threads=threads,
            provider=provider,
            optimize=optimize,
            arena=arena or bounded,  # the bound is the arena's
            bounded=bounded,
        )
        return SharedSession(session, shared)

    def timed_session(self, *, threads: int | None = None, provider: str = "cpu", arena: bool = True) -> SharedSession:
        """Open this graph the way a written file runs: weights are constants, which are fused and packed ahead.

        A session that is fed its weights (`session`) packs every matrix anew in each run, which takes 10 to 20 % of the
        time of a small model. Here only the packed copies take memory.

        Args:
            arena: see `open_session`; a deployed model has one.

        Raises:
            ModelError: onnxruntime refuses the graph.
        """
        import onnxruntime as ort

        model = self.bare_proto()
        external: dict[str, ort.OrtValue] = {}
        if self.brain:
            widen(model)
        for name, array in ((name, wide(array)) for name, array in self.weights.items()):
            if _is_fed(array):
                model.graph.initializer.append(_declared(array, name))
                external[name] = ort.OrtValue.ortvalue_from_numpy(np.asarray(array, order="C"))
            else:
                model.graph.initializer.append(to_tensor(array, name))
        session = open_session(
            model.SerializeToString(), threads=threads, provider=provider, arena=arena, external=external
        )
        return SharedSession(session, {}, tuple(external.values()))

    def opened(self, threads: int | None = None, provider: str = "cpu") -> SharedSession:
        """The session of a finished graph, opened once; `close` lets go of it."""
        if (threads, provider) not in self._open:
            self._open[(threads, provider)] = self.session(threads=threads, provider=provider)
        return self._open[(threads, provider)]

    def close(self) -> None:
        """Let go of opened sessions and the weights they hold."""
        self._open.clear()


class SharedSession:
    """An onnxruntime session that is fed its large weights, like inputs, from the arrays they already lie in.

    onnxruntime copies every initializer into each session; a value that is bound as an input is read in place.

    Args:
        held: values the session reads without being fed them; they live as long as it does.
    """

    def __init__(
        self, session: ort.InferenceSession, weights: Mapping[str, np.ndarray], held: Sequence[ort.OrtValue] = ()
    ) -> None:
        import onnxruntime as ort

        self._session, self._held = session, held
        self._wrap = lambda array: ort.OrtValue.ortvalue_from_numpy(np.asarray(wide(array), order="C"))
        self._weights = {name: self._wrap(array) for name, array in weights.items()}

    def get_inputs(self) -> list[Any]:
        """The model's own inputs."""
        return [value for value in self._session.get_inputs() if value.name not in self._weights]

    def get_outputs(self) -> list[Any]:
        return list(self._session.get_outputs())

    def get_providers(self) -> list[str]:
        return list(self._session.get_providers())

    def run(
        self,
        outputs: Sequence[str] | None,
        feeds: Mapping[str, np.ndarray],
        weights: Mapping[str, np.ndarray] | None = None,
        options: ort.RunOptions | None = None,
    ) -> list[np.ndarray]:
        """Outputs by name, or all of them in order; `weights` stand in for the graph's own in this run.

        Raises:
            KeyError: a weight that is not fed (see `session`) cannot be replaced.
            ModelError: onnxruntime refused the inputs or failed in a node.
        """
        names = list(outputs) if outputs is not None else [value.name for value in self._session.get_outputs()]
        if weights and weights.keys() - self._weights.keys():
            raise KeyError(f"cannot replace {sorted(weights.keys() - self._weights.keys())}")
        values = {name: self._wrap(array) for name, array in [*feeds.items(), *(weights or {}).items()]}
        with readable_errors(feeds):
            found = self._session.run_with_ort_values(names, {**self._weights, **values}, options)
            return [value.numpy() for value in found]


def subgraph_reads(node: NodeProto) -> list[str]:
    """Names a node reads from the enclosing graph inside its subgraphs (If, Loop, Scan)."""
    reads: list[str] = []
    for attribute in node.attribute:
        for graph in [attribute.g] if attribute.type == onnx.AttributeProto.GRAPH else attribute.graphs:
            local = {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}
            for inner in graph.node:
                reads.extend(name for name in [*inner.input, *subgraph_reads(inner)] if name and name not in local)
                local.update(inner.output)
            reads.extend(value.name for value in graph.output if value.name not in local)
    return reads


def attribute(node: NodeProto, name: str, default: Any = None) -> Any:
    """Value of a node's attribute, or `default` where it is not set."""
    for entry in node.attribute:
        if entry.name == name:
            return helper.get_attribute_value(entry)
    return default


def set_attribute(node: NodeProto, name: str, value: Any) -> None:
    """Set or replace a node's attribute."""
    for index, entry in enumerate(node.attribute):
        if entry.name == name:
            del node.attribute[index]
            break
    node.attribute.append(helper.make_attribute(name, value))


def to_tensor(array: np.ndarray, name: str) -> onnx.TensorProto:
    """An initializer that holds the array's values."""
    return numpy_helper.from_array(np.asarray(array, order="C"), name)


def _declared(array: np.ndarray, name: str) -> onnx.TensorProto:
    """An initializer without its values; they are handed to the session (`open_session(external=...)`)."""
    kind = helper.np_dtype_to_tensor_dtype(array.dtype)
    tensor = onnx.TensorProto(name=name, data_type=kind, dims=array.shape, data_location=onnx.TensorProto.EXTERNAL)
    for key, value in (("location", "in memory"), ("offset", "0"), ("length", str(array.nbytes))):
        tensor.external_data.add(key=key, value=value)
    return tensor


def _is_fed(array: np.ndarray) -> bool:
    """Whether a weight is fed to sessions; integers and short lists stay constants, which shape inference needs."""
    return array.size > _CONSTANT_SIZE and is_float(array.dtype)


class Namer:
    """Hands out tensor and node names that are not in use in a graph."""

    def __init__(self, used: Iterable[str]) -> None:
        self._used = set(used)

    def __call__(self, wish: str) -> str:
        name, count = wish, 1
        while name in self._used or not name:
            count += 1
            name = f"{wish}.{count}"
        self._used.add(name)
        return name


def topological(nodes: Sequence[NodeProto], known: Iterable[str]) -> list[NodeProto]:
    """The nodes in an order in which each reads only what is known or computed before.

    Raises:
        ModelError: a cycle, or a tensor that nothing computes.
    """
    ready = set(known) | {""}
    waiting: dict[int, set[str]] = {}
    readers: dict[str, list[int]] = {}
    order: list[NodeProto] = []
    stack: list[int] = []
    for index, node in enumerate(nodes):
        missing = {name for name in [*node.input, *subgraph_reads(node)] if name not in ready}
        waiting[index] = missing
        for name in missing:
            readers.setdefault(name, []).append(index)
        if not missing:
            stack.append(index)
    stack.reverse()
    while stack:
        index = stack.pop()
        order.append(nodes[index])
        freed = []
        for name in nodes[index].output:
            for reader in readers.get(name, []):
                waiting[reader].discard(name)
                if not waiting[reader]:
                    freed.append(reader)
            readers.pop(name, None)
        stack.extend(sorted(set(freed), reverse=True))
    if len(order) < len(nodes):
        done = {id(node) for node in order}
        stuck = next(node for node in nodes if id(node) not in done)
        raise ModelError(
            "the graph has a cycle, or reads a tensor that nothing computes", node=stuck.name or stuck.op_type
        )
    return order
