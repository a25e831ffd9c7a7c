"""What a model must be before anything else looks at it, checked without running anything.

A model is data from a stranger: protobuf accepts whatever is framed right, and much of what reads a graph later (Python
and native code alike) takes for granted what only a well-formed file has. Each check here costs one walk over the
message and names the place that is wrong. What it lets through, onnxruntime still has to accept.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import onnx
from google.protobuf.message import Message
from onnx import AttributeProto, FunctionProto, GraphProto, NodeProto, TensorProto

from onnxsnp.errors import ModelError
from onnxsnp.tensors import inline_array

MAX_DEPTH = 16  # subgraphs inside subgraphs
MAX_CALLS = 64  # functions that call functions
MAX_NODES = 1_000_000  # once local functions are inlined
_DAMAGED = "the file is damaged; export it again"
_TEXTS = {"doc_string", "value"}  # may hold more than one line
_FIELDS = {
    AttributeProto.FLOAT: "f",
    AttributeProto.INT: "i",
    AttributeProto.STRING: "s",
    AttributeProto.TENSOR: "t",
    AttributeProto.GRAPH: "g",
    AttributeProto.SPARSE_TENSOR: "sparse_tensor",
    AttributeProto.TYPE_PROTO: "tp",
    AttributeProto.FLOATS: "floats",
    AttributeProto.INTS: "ints",
    AttributeProto.STRINGS: "strings",
    AttributeProto.TENSORS: "tensors",
    AttributeProto.GRAPHS: "graphs",
    AttributeProto.SPARSE_TENSORS: "sparse_tensors",
    AttributeProto.TYPE_PROTOS: "type_protos",
}
_ELEMENTS = frozenset(TensorProto.DataType.values()) - {TensorProto.UNDEFINED}
_MESSAGES = {"t", "g", "sparse_tensor", "tp"}  # of these, one that is not there has no default value


def check_model(proto: onnx.ModelProto) -> None:
    """Refuse what is no well-formed model.

    Texts are UTF-8 and names one line; operator sets are given once; subgraphs nest no deeper than `MAX_DEPTH` and
    functions than `MAX_CALLS`; functions do not come back to themselves, nor grow to more than `MAX_NODES` nodes;
    attributes hold what their type says, once; operators have the inputs they need; every tensor is computed once; only
    the initializers of the top-level graph may lie in external files.

    Raises:
        ModelError: with the place in the message.
    """
    _check_texts(proto, "model", 0)
    if not proto.graph.node or not proto.opset_import:
        raise ModelError("the model has no nodes or no operator set", hint="export it again or check the download")
    if proto.graph.sparse_initializer:
        raise ModelError("the model has sparse initializers, which are not supported", hint="export it with dense ones")
    for value in [*proto.graph.input, *proto.graph.output]:
        kind = value.type.tensor_type.elem_type
        if value.type.HasField("tensor_type") and kind not in _ELEMENTS:
            raise ModelError(f"'{value.name}' is declared with the unknown element type {kind}", hint=_DAMAGED)
    check_graph(proto)
    for function in proto.functions:
        _check_nodes(function.node, _opsets(function.opset_import), f"function '{function.name}'")
        _check_once((name for node in function.node for name in node.output), f"function '{function.name}'")
    _check_functions(proto)


def check_graph(proto: onnx.ModelProto) -> None:
    """The part of `check_model` that is about nodes outside functions.

    Raises:
        ModelError: with the place in the message.
    """
    _check_graph(proto.graph, _opsets(proto.opset_import), "graph")


def _check_texts(message: Message, where: str, depth: int) -> None:
    """Every string and every tensor of a message and of those inside it."""
    if depth > 4 * MAX_DEPTH:  # graph, node and attribute are a message each
        raise ModelError(f"graphs are nested deeper than {MAX_DEPTH} levels", hint="export a simpler model")
    if isinstance(message, TensorProto) and not where.startswith("model.graph.initializer["):
        if message.data_location == TensorProto.EXTERNAL or message.external_data:
            raise ModelError(f"{where} lies in an external file", hint="save the weights of subgraphs inside the model")
        inline_array(message)
    try:
        for field, value in message.ListFields():
            if isinstance(value, Message):
                _check_texts(value, f"{where}.{field.name}", depth + 1)
            elif field.type == field.TYPE_MESSAGE:
                for index, item in enumerate(value):
                    _check_texts(item, f"{where}.{field.name}[{index}]", depth + 1)
            elif field.type == field.TYPE_STRING:
                _check_text([value] if isinstance(value, str | bytes) else value, f"{where}.{field.name}", field.name)
    except UnicodeDecodeError as error:
        raise ModelError(f"{where} holds a name that is not UTF-8 text", hint=_DAMAGED) from error


def _check_text(texts: Iterable[str | bytes], where: str, field: str) -> None:
    """UTF-8 (protobuf hands out bytes where it is not), in one line where it is a name."""
    for text in texts:
        if isinstance(text, bytes):
            raise ModelError(f"{where} is not UTF-8 text", hint=_DAMAGED)
        if field not in _TEXTS and not text.isprintable():
            raise ModelError(f"{where} holds control characters: {text[:80]!r}", hint=_DAMAGED)


def _opsets(imports: Iterable[onnx.OperatorSetIdProto]) -> dict[str, int]:
    """Version by domain."""
    found: dict[str, int] = {}
    for entry in imports:
        domain = "" if entry.domain == "ai.onnx" else entry.domain
        if found.setdefault(domain, entry.version) != entry.version:
            raise ModelError(
                f"operator set '{domain or 'ai.onnx'}' is imported in versions {found[domain]} and {entry.version}",
                hint=_DAMAGED,
            )
    return found


def _check_graph(graph: GraphProto, opsets: dict[str, int], where: str, depth: int = 0) -> None:
    """One graph and the graphs inside its nodes."""
    if depth > MAX_DEPTH:
        raise ModelError(f"graphs are nested deeper than {MAX_DEPTH} levels", node=where, hint="export a simpler model")
    _check_once((value.name for value in graph.input), f"the inputs of {where}")
    computed = [name for node in graph.node for name in node.output]
    _check_once([*computed, *{value.name for value in graph.input}], where)
    _check_once([*computed, *{tensor.name for tensor in graph.initializer}], where)
    _check_nodes(graph.node, opsets, where, depth)


def _check_once(names: Iterable[str], where: str) -> None:
    seen: set[str] = set()
    for name in names:
        if name and name in seen:
            raise ModelError(f"tensor '{name}' is given or computed twice in {where}", hint=_DAMAGED)
        seen.add(name)


def _check_nodes(nodes: Iterable[NodeProto], opsets: dict[str, int], where: str, depth: int = 0) -> None:
    for index, node in enumerate(nodes):
        label = node.name or f"{where}.node[{index}] ({node.op_type})"
        _check_attributes(node, label)
        _check_operands(node, opsets, label)
        for graph in subgraphs(node):
            _check_graph(graph, opsets, label, depth + 1)


def subgraphs(node: NodeProto) -> Iterator[GraphProto]:
    """The graphs inside a node."""
    for entry in node.attribute:
        if entry.type == AttributeProto.GRAPH:
            yield entry.g
        yield from entry.graphs


def _check_attributes(node: NodeProto, label: str) -> None:
    """Attributes are there once, and hold what their type says."""
    seen: set[str] = set()
    for entry in node.attribute:
        field = _FIELDS.get(entry.type)
        if field is None:
            raise ModelError(f"attribute '{entry.name}' has no type", node=label, hint=_DAMAGED)
        if entry.name in seen:
            raise ModelError(f"attribute '{entry.name}' is given twice", node=label, hint=_DAMAGED)
        seen.add(entry.name)
        held = {item.name for item, _ in entry.ListFields() if item.name in _FIELDS.values()}
        if held - {field} or (field in _MESSAGES and not held and not entry.ref_attr_name):
            raise ModelError(f"attribute '{entry.name}' does not hold what its type says", node=label, hint=_DAMAGED)


def _check_operands(node: NodeProto, opsets: dict[str, int], label: str) -> None:
    """An operator has no fewer inputs and outputs than it needs, and no more than it takes."""
    domain = "" if node.domain == "ai.onnx" else node.domain
    version = opsets.get(domain, 0)
    if not 0 < version < 2**31 or not onnx.defs.has(node.op_type, domain):
        return  # onnxruntime decides about operators of others
    try:
        schema = onnx.defs.get_schema(node.op_type, version, domain)
    except onnx.defs.SchemaError:  # newer than this operator set
        return
    for what, names, least, most in (
        ("inputs", node.input, schema.min_input, schema.max_input),
        ("outputs", node.output, schema.min_output, schema.max_output),
    ):
        if not least <= len(names) <= most:
            raise ModelError(f"{node.op_type} has {len(names)} {what}, which it cannot have", node=label, hint=_DAMAGED)
    needed = onnx.defs.OpSchema.FormalParameterOption.Single
    for name, formal in zip(node.input, schema.inputs, strict=False):
        if not name and formal.option == needed:
            raise ModelError(f"{node.op_type} lacks its input '{formal.name}'", node=label, hint=_DAMAGED)


def _check_functions(proto: onnx.ModelProto) -> None:
    """Local functions: no two of one name, none that comes back to itself, none that explodes when it is inlined."""
    functions: dict[tuple[str, str, str], FunctionProto] = {}
    for function in proto.functions:
        key = (function.domain, function.name, function.overload)
        if key in functions:
            raise ModelError(f"two functions are called '{function.name}'", hint=_DAMAGED)
        functions[key] = function
    if not functions:
        return
    grown: dict[tuple[str, str, str], tuple[int, int]] = {}

    def inlined(nodes: Iterable[NodeProto], depth: int) -> tuple[int, int]:
        """Nodes after inlining, and how deep calls go."""
        total, height = 0, 0
        for node in nodes:
            key = (node.domain, node.op_type, node.overload)
            parts = [called(key, depth)] if key in functions else [(1, 0)]
            parts += [inlined(graph.node, depth) for graph in subgraphs(node)]
            total += sum(size for size, _ in parts)
            height = max(height, *(below for _, below in parts))
        return total, height

    def called(key: tuple[str, str, str], depth: int) -> tuple[int, int]:
        if key not in grown:
            size, below = inlined(functions[key].node, depth + 1) if depth < MAX_CALLS else (0, MAX_CALLS)
            if below >= MAX_CALLS:
                raise ModelError(
                    f"functions call each other without end, or more than {MAX_CALLS} deep",
                    node=f"function '{key[1]}'",
                    hint="export the model without functions",
                )
            grown[key] = size, below + 1
        return grown[key]

    total = sum(called(key, 0)[0] for key in functions) + inlined(proto.graph.node, 0)[0]
    if total > MAX_NODES:
        raise ModelError(
            f"the model's functions grow to {total:.1e} nodes, more than {MAX_NODES}",
            hint="export it without functions",
        )
