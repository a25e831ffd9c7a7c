"""What each operator says about its axes: `{op_type: rule}`, one small function per operator.

A rule gets a node and a `Facts` to write to. For every axis of every input it must do one of three things: tie it
to other axes, say that the operator contracts it, or freeze it with a reason. An operator without a rule freezes
every axis it touches, so an unknown operator can cost pruning but never correctness.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from onnx import NodeProto

from onnxsnp.graph import products, spatial
from onnxsnp.graph.blocks import tie_blocks
from onnxsnp.graph.facts import Concatenation, Facts, Role, Select, axes_of
from onnxsnp.graph.ir import attribute, subgraph_reads
from onnxsnp.graph.sizes import sizes_in_numbers

Rule = Callable[[NodeProto, Facts], None]


def gather_facts(
    nodes: Sequence[NodeProto],
    shapes: Mapping[str, tuple[int, ...]],
    weights: Mapping[str, np.ndarray],
    opset: int,
    inputs: Sequence[str],
    outputs: Sequence[str],
    blocks: frozenset[str] = frozenset(),
    unexpanded: Mapping[str, str] | None = None,
) -> Facts:
    """Apply the rules to every node; graph inputs and outputs are frozen, since callers see their sizes.

    Args:
        blocks: nodes that take parts of an axis, or join axes, of which equal blocks are to be tied (see `blocks`).
        unexpanded: by node name, what is special about a fused operator that was not spelled out.
    """
    facts = Facts(shapes, weights, opset, blocks=blocks)
    facts.unread = _only_measured(nodes, outputs)
    for node in nodes:
        facts.node = node.name
        known = all(name in shapes for name in [*node.input, *node.output] if name)
        rule = RULES.get(node.op_type) if node.domain in ("", "ai.onnx") and known else None
        captured = subgraph_reads(node)
        if rule is None or captured:
            why = (unexpanded or {}).get(node.name) or ("it runs a graph of its own" if captured else "")
            reason = f"no rule for operator {node.op_type}" + (f": {why}" if why else "")
            facts.freeze_all([*node.input, *node.output, *captured], reason)
        else:
            rule(node, facts)
    for facts.node, axis in sizes_in_numbers(nodes, shapes, weights):
        facts.freeze(axis, "its size is part of a number that is computed")
    for kind, names in (("input", inputs), ("output", outputs)):
        for name in names:
            facts.node = f"{kind} {name}"
            facts.freeze_all([name], f"size of the model's {kind} '{name}'")
    return facts


def _only_measured(nodes: Sequence[NodeProto], outputs: Sequence[str]) -> frozenset[str]:
    """Tensors of which operators read nothing but the sizes."""
    measured = {name for node in nodes if node.op_type in ("Shape", "Size") for name in node.input}
    read = {name for node in nodes if node.op_type not in ("Shape", "Size") for name in node.input}
    inside = {name for node in nodes for name in subgraph_reads(node)}
    return frozenset(measured - read - inside - set(outputs))


def _elementwise(node: NodeProto, facts: Facts) -> None:
    """Broadcasting from the right; an axis of size 1 that is stretched says nothing."""
    output = node.output[0]
    for name in node.input:
        if not name:
            continue
        shift = facts.rank(output) - facts.rank(name)
        for index in range(facts.rank(name)):
            if facts.shapes[name][index] == facts.shapes[output][index + shift]:
                facts.same((name, index), (output, index + shift))


def _add(node: NodeProto, facts: Facts) -> None:
    _elementwise(node, facts)
    activations = tuple(name for name in node.input if name not in facts.weights)
    if len(activations) > 1:
        facts.joins.append(activations)


def _same_axes(facts: Facts, source: str, target: str) -> None:
    for left, right in zip(axes_of(facts, source), axes_of(facts, target), strict=True):
        facts.same(left, right)


def _unary(node: NodeProto, facts: Facts) -> None:
    """Acts on the first input entry by entry; other inputs are scalars or, for CastLike, only a type."""
    _same_axes(facts, node.input[0], node.output[0])
    facts.freeze_all(node.output[1:], f"second output of {node.op_type}")


def _regroup(node: NodeProto, facts: Facts) -> None:
    facts.regroup(axes_of(facts, node.input[0]), axes_of(facts, node.output[0]))


def _transpose(node: NodeProto, facts: Facts) -> None:
    data, output = node.input[0], node.output[0]
    order = attribute(node, "perm") or list(range(facts.rank(data)))[::-1]
    for target, source in enumerate(order):
        facts.same((data, source), (output, target))


def _softmax(node: NodeProto, facts: Facts) -> None:
    data, output = node.input[0], node.output[0]
    rank = facts.rank(data)
    axis = attribute(node, "axis", -1 if facts.opset >= 13 else 1) % rank
    last = axis + 1 if facts.opset >= 13 else rank  # before opset 13 the rows were everything from `axis` on
    for index in range(rank):
        facts.same((data, index), (output, index))
    for index in range(axis, last):
        facts.freeze((data, index), "softmax runs over it")


def _layer_norm(node: NodeProto, facts: Facts) -> None:
    data = node.input[0]
    rank = facts.rank(data)
    axis = attribute(node, "axis", -1) % rank
    for index in range(rank):
        facts.same((data, index), (node.output[0], index))
    for name in node.input[1:]:
        if name:
            shift = rank - facts.rank(name)
            for index in range(facts.rank(name)):
                if facts.shapes[name][index] == facts.shapes[data][index + shift]:
                    facts.same((name, index), (data, index + shift))
    for index in range(axis, rank):
        facts.statistics.append(Role("statistics", (data, index), node.name))
    for name in node.output[1:]:
        facts.freeze_all([name], f"statistics output of {node.op_type}")


def _batch_norm(node: NodeProto, facts: Facts) -> None:
    data = node.input[0]
    for index in range(facts.rank(data)):
        facts.same((data, index), (node.output[0], index))
    for name in node.input[1:]:
        facts.same((name, 0), (data, min(1, facts.rank(data) - 1)))


_SUMS = {"ReduceL1", "ReduceL2", "ReduceSum", "ReduceSumSquare"}  # zeros add nothing to them


def _reduce(node: NodeProto, facts: Facts) -> None:
    data, output = node.input[0], node.output[0]
    rank = facts.rank(data)
    given = facts.value(node.input[1]) if len(node.input) > 1 and node.input[1] else attribute(node, "axes")
    if given is None and len(node.input) > 1 and node.input[1]:
        facts.freeze_all([data, output], f"{node.op_type} over axes computed at run time")
        return
    empty_is_all = not attribute(node, "noop_with_empty_axes", 0)
    reduced = {int(axis) % rank for axis in (given if given is not None else [])}
    if not reduced and empty_is_all:
        reduced = set(range(rank))
    kept = int(facts.rank(output) == rank)  # as it ran: runtimes differ on values of keepdims that are neither 0 nor 1
    target = 0
    for index in range(rank):
        if index in reduced:
            if node.op_type == "ReduceMean":
                facts.statistics.append(Role("statistics", (data, index), node.name))
            else:
                facts.freeze((data, index), f"{node.op_type} runs over it")
                facts.sums.extend(facts.freezes[-1:] if node.op_type in _SUMS else [])
            target += kept
        else:
            facts.same((data, index), (output, target))
            target += 1


def _expand(node: NodeProto, facts: Facts) -> None:
    data, output = node.input[0], node.output[0]
    shift = facts.rank(output) - facts.rank(data)
    for index in range(facts.rank(data)):
        if facts.shapes[data][index] == facts.shapes[output][index + shift]:
            facts.same((data, index), (output, index + shift))


def _take(node: NodeProto, facts: Facts, axis: int, parts: Sequence[tuple[str, int, int]], drops: bool) -> None:
    """Ties and selections of an operator that takes index ranges [start, stop) of one axis into its outputs."""
    data = node.input[0]
    for output, _, _ in parts:
        for index in range(facts.rank(data)):
            if index != axis:
                facts.same((data, index), (output, index - (drops and index > axis)))
    ranges = [((output, axis), start) for output, start, _ in parts]
    if (
        node.name in facts.blocks
        and not drops
        and tie_blocks(facts, (data, axis), ranges, f"{node.op_type} takes parts")
    ):
        return
    for output, start, stop in parts:
        if not drops:
            facts.freeze((output, axis), f"part of an axis taken by {node.op_type}")
        facts.selects.append(Select(node.name, data, axis, output, start, stop, drops))
    facts.freeze((data, axis), f"{node.op_type} takes parts of it")


def _split(node: NodeProto, facts: Facts) -> None:
    data = node.input[0]
    axis = attribute(node, "axis", 0) % facts.rank(data)
    if len(node.output) == 1:
        _elementwise(node, facts)
        return
    parts, start = [], 0
    for output, size in zip(node.output, _split_sizes(node, facts, axis), strict=True):
        if output:  # one that nothing reads may have no name
            parts.append((output, start, start + size))
        start += size
    _take(node, facts, axis, parts, drops=False)


def _split_sizes(node: NodeProto, facts: Facts, axis: int) -> list[int]:
    """How much of the axis each output takes, from the outputs that have a name and else from what is left."""
    known = [facts.shapes[output][axis] if output else 0 for output in node.output]
    if all(node.output):
        return known
    given = facts.value(node.input[1]) if len(node.input) > 1 and node.input[1] else attribute(node, "split")
    if given is not None:
        return [int(size) for size in given]
    largest = max(known)  # equal parts, of which only the last may be smaller
    left = facts.shapes[node.input[0]][axis] - largest * (len(known) - 1)
    return [largest] * (len(known) - 1) + [left]


def _slice(node: NodeProto, facts: Facts) -> None:
    data, output = node.input[0], node.output[0]
    rank = facts.rank(data)
    starts, _, axes, steps = _slice_arguments(node, facts)
    if axes is None:
        facts.freeze_all([data, output], "Slice over axes computed at run time")
        return
    cut: list[int] = []
    for position, axis in enumerate(int(axis) % rank for axis in axes):
        whole = facts.shapes[data][axis] == facts.shapes[output][axis]
        if not (whole and steps is not None and steps[position] == 1):
            cut.append(position)
    changed = {int(axes[position]) % rank for position in cut}
    for index in range(rank):
        if index not in changed:
            facts.same((data, index), (output, index))
    if len(cut) == 1 and starts is not None and steps is not None and steps[cut[0]] == 1:
        axis = int(axes[cut[0]]) % rank
        size = facts.shapes[data][axis]
        start = min(max(int(starts[cut[0]]) + (size if starts[cut[0]] < 0 else 0), 0), size)
        if node.name in facts.blocks and tie_blocks(
            facts, (data, axis), [((output, axis), start)], "Slice takes parts"
        ):
            return
        facts.freeze((data, axis), "Slice takes part of it")
        facts.freeze((output, axis), "part of an axis taken by Slice")
        facts.selects.append(Select(node.name, data, axis, output, start, start + facts.shapes[output][axis]))
        return
    if len(cut) == 1 and starts is not None and steps is not None:
        axis = int(axes[cut[0]]) % rank
        if _slice_every(node, facts, axis, int(starts[cut[0]]), int(steps[cut[0]])):
            return
    for axis in changed:
        facts.freeze((data, axis), "Slice takes part of it")
        facts.freeze((output, axis), "part of an axis taken by Slice")


def _slice_every(node: NodeProto, facts: Facts, axis: int, start: int, step: int) -> bool:
    """Every step-th index: the axis is a product of runs of `step` indices, one of each of which goes to the output."""
    data, output = node.input[0], node.output[0]
    size = facts.shapes[data][axis]
    if step < 2 or size % step or not 0 <= start < step or facts.shapes[output][axis] != size // step:
        return False
    runs, inside = (f"{node.name}|{data}", 0), (f"{node.name}|{data}", 1)
    facts.virtual[runs], facts.virtual[inside] = size // step, step
    facts.regroup([(data, axis)], [runs, inside])
    facts.same((output, axis), runs)
    facts.freeze(inside, f"Slice takes one in {step}")
    return True


def _slice_arguments(
    node: NodeProto, facts: Facts
) -> tuple[Sequence[int] | None, Sequence[int] | None, Sequence[int] | None, Sequence[int] | None]:
    """starts, ends, axes, steps; each None where it is computed at run time."""
    if len(node.input) < 2:  # before opset 10
        starts, ends = attribute(node, "starts"), attribute(node, "ends")
        axes = attribute(node, "axes") or list(range(len(starts)))
        return starts, ends, axes, [1] * len(axes)

    def given(slot: int) -> np.ndarray | None:
        return facts.value(node.input[slot])

    count = facts.shapes[node.input[1]][0]
    axes_named = len(node.input) > 3 and node.input[3]
    steps_named = len(node.input) > 4 and node.input[4]
    axes = given(3) if axes_named else np.arange(count)
    steps = given(4) if steps_named else np.ones(count, np.int64)
    return given(1), given(2), axes, steps  # type: ignore[return-value]


def _gather(node: NodeProto, facts: Facts) -> None:
    data, indices, output = node.input[0], node.input[1], node.output[0]
    rank, extra = facts.rank(data), facts.rank(indices)
    axis = attribute(node, "axis", 0) % rank
    chosen = facts.value(indices)
    size = facts.shapes[data][axis]
    if output in facts.unread and extra == 0 and chosen is not None and int(chosen) in (0, -1):
        for index in range(rank - 1):  # which entry it is does not matter, and there is one of any size
            facts.same((data, index + (index >= axis)), (output, index))
        return
    if data not in facts.weights and chosen is not None and chosen.size and extra <= 1:
        flat = chosen.reshape(-1).astype(np.int64) % size
        if np.array_equal(flat, np.arange(flat[0], flat[0] + flat.size)):
            _take(node, facts, axis, [(output, int(flat[0]), int(flat[0]) + flat.size)], drops=extra == 0)
            return
    for index in range(rank):
        if index != axis:
            facts.same((data, index), (output, index if index < axis else index - 1 + extra))
            if data in facts.weights:
                facts.roles.append(Role("producer", (data, index), node.name))
    for index in range(extra):
        facts.same((indices, index), (output, axis + index))
    facts.freeze((data, axis), "Gather picks entries of it")


def _gather_nd(node: NodeProto, facts: Facts) -> None:
    """The last axis of the indices addresses leading axes of the data behind `batch_dims` that both share."""
    data, indices, output = node.input[0], node.input[1], node.output[0]
    shared, deep = attribute(node, "batch_dims", 0), facts.rank(indices) - 1
    depth = shared + facts.shapes[indices][-1]
    for index in range(shared):
        facts.same((data, index), (output, index))
    for index in range(deep):
        facts.same((indices, index), (output, index))
    for index in range(shared, depth):
        facts.freeze((data, index), "GatherND picks entries of it")
    for index in range(depth, facts.rank(data)):
        facts.same((data, index), (output, deep + index - depth))
        if data in facts.weights:
            facts.roles.append(Role("producer", (data, index), node.name))
    facts.freeze((indices, deep), "GatherND reads positions from it")


def _concat(node: NodeProto, facts: Facts) -> None:
    output = node.output[0]
    axis = attribute(node, "axis", 0) % facts.rank(output)
    if len(node.input) == 1:
        _elementwise(node, facts)
        return
    start, parts = 0, []
    for name in node.input:
        for index in range(facts.rank(output)):
            if index != axis:
                facts.same((name, index), (output, index))
        parts.append(((name, axis), start))
        start += facts.shapes[name][axis]
    whole = (output, axis)
    if node.name in facts.blocks and tie_blocks(facts, whole, parts, "Concat joins parts"):
        return
    if all(facts.size(part) for part, _ in parts):
        facts.concatenations.append(Concatenation(node.name, whole, tuple(part for part, _ in parts)))
        return
    for part in (whole, *(part for part, _ in parts)):
        facts.freeze(part, "Concat joins it to an axis that may be empty")


def _reads_sizes(node: NodeProto, facts: Facts) -> None:
    """Shape reads sizes, not indices; sizes that matter were folded to constants, or are frozen (see `sizes`)."""


def _filled(node: NodeProto, facts: Facts) -> None:
    """Every entry is the same, so any number of them will do; the sizes are told (and corrected) like Reshape's."""


def _made_at_run_time(node: NodeProto, facts: Facts) -> None:
    facts.freeze_all(node.output, f"{node.op_type} makes it at run time")


_UNARY = [
    "Abs",
    "Cast",
    "CastLike",
    "Ceil",
    "Celu",
    "Clip",
    "Cos",
    "Dropout",
    "Elu",
    "Erf",
    "Exp",
    "Floor",
    "Gelu",
    "HardSigmoid",
    "HardSwish",
    "Identity",
    "IsInf",
    "IsNaN",
    "LeakyRelu",
    "Log",
    "Mish",
    "Neg",
    "Not",
    "Reciprocal",
    "Relu",
    "Round",
    "Selu",
    "Sigmoid",
    "Sign",
    "Sin",
    "Softplus",
    "Softsign",
    "Sqrt",
    "Swish",
    "Tanh",
    "ThresholdedRelu",
]


_BINARY = [
    "And",
    "Div",
    "Equal",
    "Greater",
    "GreaterOrEqual",
    "Less",
    "LessOrEqual",
    "Max",
    "Mean",
    "Min",
    "Mod",
    "Mul",
    "Or",
    "PRelu",
    "Pow",
    "Sub",
    "Where",
    "Xor",
]


RULES: dict[str, Rule] = {
    **dict.fromkeys(_UNARY, _unary),
    **dict.fromkeys(_BINARY, _elementwise),
    **dict.fromkeys(("Add", "Sum"), _add),
    **dict.fromkeys(("Reshape", "Flatten", "Squeeze", "Unsqueeze"), _regroup),
    **dict.fromkeys(("AveragePool", "MaxPool", "GlobalAveragePool", "GlobalMaxPool", "LpPool"), spatial.pool),
    **dict.fromkeys(
        (
            "ReduceMean",
            "ReduceSum",
            "ReduceMax",
            "ReduceMin",
            "ReduceL1",
            "ReduceL2",
            "ReduceProd",
            "ReduceSumSquare",
            "ReduceLogSumExp",
        ),
        _reduce,
    ),
    **dict.fromkeys(("Softmax", "LogSoftmax"), _softmax),
    **dict.fromkeys(("Resize", "Upsample"), spatial.resize),
    **dict.fromkeys(("Shape", "Size"), _reads_sizes),
    "ConstantOfShape": _filled,
    "Range": _made_at_run_time,
    "Attention": products.attention,
    "BatchNormalization": _batch_norm,
    "Concat": _concat,
    "Conv": spatial.conv,
    "Einsum": products.einsum,
    "Expand": _expand,
    "Gather": _gather,
    "GatherND": _gather_nd,
    "Gemm": products.gemm,
    "LayerNormalization": _layer_norm,
    "MatMul": products.matmul,
    "Pad": spatial.pad,
    "RMSNormalization": _layer_norm,
    "Slice": _slice,
    "Split": _split,
    "Tile": spatial.tile,
    "Transpose": _transpose,
}
