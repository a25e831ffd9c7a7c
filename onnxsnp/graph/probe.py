"""Shapes and shape-derived values, measured by running the model instead of guessed by inference.

Exporters hide sizes in chains of Shape, Gather and Concat that symbolic inference often loses. A run never does: the
graph is run once per assignment of its symbolic sizes, each tensor's shape comes back, and a size that stayed the same
while every symbolic size changed is static.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import onnx
from onnx import TensorProto, helper

from onnxsnp import limits
from onnxsnp.errors import ModelError
from onnxsnp.graph.inputs import id_bounds
from onnxsnp.graph.ir import Graph, subgraph_reads
from onnxsnp.graph.precision import element_types
from onnxsnp.graph.quantised import is_quantised
from onnxsnp.limits import limited, memory_limit
from onnxsnp.runtime import first_line, symbol_size

_SHAPE_OPS = {"Shape", "Size"}
RANDOM_OPS = {"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Multinomial", "Bernoulli"}
_IMAGE, _SEQUENCE = 224, 16
_RANK = 32  # of numpy's arrays
_LARGEST = 2**28  # entries of all inputs of one run together


@dataclass
class Probe:
    """What the runs showed.

    Attributes:
        shapes: sizes of each tensor in the first run (batch 2 where the batch is dynamic).
        dynamic: for each tensor, which axes changed with the symbolic sizes.
        single: sizes at batch 1, other symbolic sizes as in the first run.
        constant: values of tensors that depend only on weights.
        invariant: values of tensors that depend on weights and on tensors' shapes, and were equal in every run; of a
            chain of them the last, which something else reads.
        counting: such tensors that held 0, 1, 2, ... in every run, however many that were.
    """

    shapes: dict[str, tuple[int, ...]]
    dynamic: dict[str, tuple[bool, ...]]
    single: dict[str, tuple[int, ...]]
    constant: dict[str, np.ndarray]
    invariant: dict[str, np.ndarray]
    counting: frozenset[str]


def probe(graph: Graph, sizes: Mapping[str, Sequence[int]] | None = None) -> Probe:
    """Run the graph at a few input sizes and collect every tensor's shape.

    Args:
        graph: the model.
        sizes: full input shapes by input name, for inputs whose symbolic sizes cannot be guessed.

    Raises:
        ModelError: onnxruntime cannot run the model.
    """
    constant, derived = _derived(graph)
    typed = _tensor_names(graph)
    computed = [name for node in graph.nodes for name in node.output if name in typed]
    # which derived values follow the batch is only known afterwards, and those that do may read others that do not
    frontier = _frontier(graph, [name for name in computed if name in constant])
    frontier += [name for name in computed if name in derived]
    instrumented = graph.copy()
    number = {name: index for index, name in enumerate(computed)}
    nodes = []
    for node in instrumented.nodes:
        nodes.append(node)
        for name in node.output:
            if name in number:  # right behind the producer, so that the tensor itself need not live any longer
                tag = f"{_TAG}{number[name]}"
                nodes.append(helper.make_node("Shape", [name], [tag], name=tag))
    instrumented.nodes = nodes
    wanted = [f"{_TAG}{index}" for index in range(len(computed))] + frontier
    session = instrumented.session(wanted, optimize=False, bounded=True)
    runs: list[tuple[dict[str, tuple[int, ...]], dict[str, np.ndarray]]] = []
    for choices in _assignments(graph, sizes or {}):
        for shapes in choices:
            feeds = _feeds(graph, shapes)
            try:
                with limited() as options:
                    results = session.run(None, feeds, options=options)
            except Exception as error:  # onnxruntime has no exception type of its own for a failed run
                if not runs:
                    raise _refusal(shapes, first_line(error)) from error
                continue  # sizes the model does not allow; if no others do, those it was first run with stand
            measured = dict(zip(computed, (tuple(map(int, shape)) for shape in results), strict=False))
            measured.update({name: tuple(shape) for name, shape in shapes.items()})
            runs.append((measured, dict(zip(frontier, results[len(computed) :], strict=True))))
            break
    return _compare(graph, [(measured, _in_kind(graph, values)) for measured, values in runs], constant)


_TAG = "onnxsnp shape "


def _refusal(shapes: Mapping[str, tuple[int, ...]], said: str) -> ModelError:
    """What to say of a model whose first run failed."""
    if "bfc_arena" in said:
        size = f"{memory_limit() / 2**30:.1f} GiB"
        return ModelError(
            f"the model needs more than {size} of memory for one run on inputs of shape {_brief(shapes)}",
            hint="use a machine with more memory, or give smaller sizes with --input-shape",
        )
    if "terminate flag" in said:
        return ModelError(
            f"the model did not finish in {limits.SECONDS:.0f} s on inputs of shape {_brief(shapes)}",
            hint="give smaller sizes with --input-shape",
        )
    return ModelError(
        f"the model does not run on inputs of shape {_brief(shapes)}: {said}",
        hint="give its sizes with --input-shape; if it runs at batch 1 only, export it with a fixed batch",
    )


def _in_kind(graph: Graph, values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Values as the graph has them: what ran in single precision in place of bfloat16 gets its type back."""
    if not graph.brain:
        return values
    types = element_types(graph.skeleton())
    return {name: value.astype(types[name]) for name, value in values.items() if name in types}


def _derived(graph: Graph) -> tuple[set[str], set[str]]:
    """Names that depend on weights alone, and names that depend on weights and shapes alone."""
    constant, derived = set(graph.weights), set(graph.weights)
    for node in graph.nodes:
        if node.op_type in RANDOM_OPS or is_quantised(node):
            continue  # what is stored as integers is not to become a floating-point weight
        reads = [name for name in node.input if name] + subgraph_reads(node)
        if all(name in constant for name in reads):
            constant.update(node.output)
        if node.op_type in _SHAPE_OPS or all(name in derived for name in reads):
            derived.update(node.output)
    return constant, derived - constant


def _frontier(graph: Graph, names: Sequence[str]) -> list[str]:
    """Those of some tensors that a node reads which computes anything else."""
    inside = set(names)
    read = {name for node in graph.nodes if not all(out in inside for out in node.output if out) for name in node.input}
    return [name for name in names if name in read]


def infer_shapes(model: onnx.ModelProto, data_prop: bool = False) -> onnx.ModelProto:
    """onnx's own inference of types and shapes.

    Raises:
        ModelError: it finds a node whose inputs cannot be what they are.
    """
    try:
        return onnx.shape_inference.infer_shapes(model, data_prop=data_prop)
    except (onnx.shape_inference.InferenceError, RuntimeError, ValueError) as error:
        raise ModelError(f"the types of the graph do not fit: {first_line(error)}", hint="export it again") from error


def _tensor_names(graph: Graph) -> set[str]:
    """Outputs that are tensors (not sequences or optionals), as far as type inference can tell."""
    inferred = infer_shapes(graph.skeleton())
    other = {value.name for value in inferred.graph.value_info if value.type.WhichOneof("value") != "tensor_type"}
    return {name for node in graph.nodes for name in node.output if name and name not in other}


_Shapes = dict[str, tuple[int, ...]]


def _assignments(graph: Graph, sizes: Mapping[str, Sequence[int]]) -> list[list[_Shapes]]:
    """Input shapes for each run, the second choice for where the first fails; every symbolic size takes two values.

    The second choice has smaller sizes, for models that do not allow larger ones (a table of 16 positions). There is
    one run if no size is symbolic.
    """
    first: dict[str, int] = {}
    shapes: list[_Shapes] = [{}, {}, {}]
    for value in graph.shell.graph.input:
        dims = value.type.tensor_type.shape.dim
        given = sizes.get(value.name)
        if given is not None and len(given) != len(dims):
            raise ModelError(
                f"--input-shape gives '{value.name}' {len(given)} sizes, the model's input has {len(dims)}"
            )
        for run in range(3):
            found = []
            for axis, dim in enumerate(dims):
                if dim.HasField("dim_value") and dim.dim_value > 0:
                    found.append(dim.dim_value)
                elif axis == 0:
                    found.append((2, 1, 1)[run])
                elif given is not None:
                    start = first.setdefault(dim.dim_param or f"{value.name}.{axis}", int(given[axis]))
                    found.append(_varied(start, 32 if len(dims) == 4 else 8, run))
                else:
                    base, step = (_IMAGE, 32) if len(dims) == 4 else (_SEQUENCE, 8)
                    size_of = partial(_size_of, first, base, step, run)
                    found.append(symbol_size(dim.dim_param or f"{value.name}.{axis}", size_of))
            shapes[run][value.name] = tuple(found)
    if shapes[0] == shapes[1]:
        return [shapes[:1]]
    if all(shapes[0][name][1:] == shapes[1][name][1:] for name in shapes[0]):
        return [[shapes[0]], [shapes[1]]]
    # sizes beyond the batch are symbolic too; a model may allow only one value of them, so vary the batch alone as well
    batch_only = {name: (shapes[1][name][0], *shape[1:]) for name, shape in shapes[0].items()}
    return [[shapes[0]], [batch_only], [shapes[1], shapes[2]]]


def _size_of(first: dict[str, int], base: int, step: int, run: int, symbol: str) -> int:
    """The size of a symbol in a run; the first input that has it says what it is."""
    return _varied(first.setdefault(symbol, base), step, run)


def _varied(start: int, step: int, run: int) -> int:
    """As it is, larger, smaller."""
    return (start, start + step, max(start - step, start // 2))[run]


def _feeds(graph: Graph, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    feeds: dict[str, np.ndarray] = {}
    total = 0
    bounds = id_bounds(graph)
    for value in graph.shell.graph.input:
        elem = value.type.tensor_type.elem_type
        if elem in (TensorProto.UNDEFINED, TensorProto.STRING):
            raise ModelError(f"input '{value.name}' is not a numeric tensor", hint="only tensor inputs are supported")
        dtype = np.dtype(helper.tensor_dtype_to_np_dtype(elem))
        shape = shapes[value.name]
        if len(shape) > _RANK:
            raise ModelError(f"input '{value.name}' has {len(shape)} axes, more than {_RANK}", hint="export it again")
        total += math.prod(shape)
        if total > _LARGEST:
            raise ModelError(
                f"input '{value.name}' declares {shape}, too large to run", hint="give its sizes with --input-shape"
            )
        if dtype.kind in "iub":
            feeds[value.name] = np.full(shape, min(1, bounds.get(value.name, 2) - 1), dtype)
        else:
            feeds[value.name] = rng.standard_normal(shape, np.float32).astype(dtype, copy=False)
    return feeds


def _compare(
    graph: Graph, runs: Sequence[tuple[dict[str, tuple[int, ...]], dict[str, np.ndarray]]], constant: set[str]
) -> Probe:
    shapes, values = runs[0]
    dynamic = {}
    for name, shape in shapes.items():
        others = [run[0][name] for run in runs[1:]]
        dynamic[name] = tuple(
            any(len(other) != len(shape) or other[axis] != size for other in others) for axis, size in enumerate(shape)
        )
    shapes = {**shapes, **{name: array.shape for name, array in graph.weights.items()}}
    dynamic.update({name: (False,) * array.ndim for name, array in graph.weights.items()})
    single = {**(runs[1][0] if len(runs) > 1 else shapes), **{n: a.shape for n, a in graph.weights.items()}}
    fixed = {
        name: value
        for name, value in values.items()
        if isinstance(value, np.ndarray)
        and all(np.array_equal(value, run[1][name], equal_nan=value.dtype.kind == "f") for run in runs[1:])
    }
    fixed = {name: fixed[name] for name in _frontier(graph, list(fixed))}
    return Probe(
        shapes,
        dynamic,
        single,
        {name: value for name, value in fixed.items() if name in constant},
        {name: value for name, value in fixed.items() if name not in constant},
        frozenset(name for name in values if all(counts(run[1][name]) for run in runs)),
    )


def counts(value: np.ndarray) -> bool:
    """Whether an array holds 0, 1, 2, ... in order."""
    if not isinstance(value, np.ndarray) or value.dtype.kind != "i":
        return False
    return np.array_equal(value.reshape(-1), np.arange(value.size))


def _brief(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {'×'.join(map(str, shape))}" for name, shape in shapes.items())
