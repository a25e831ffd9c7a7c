"""Rotary positions: which neurons of a head must go together, found from the operators that turn them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import graphs
import numpy as np
import onnx
import pytest

from onnxsnp.analysis import analyse_model
from onnxsnp.evaluation.verify import difference, masked
from onnxsnp.graph.groups import Group
from onnxsnp.planning.plan import Plan
from onnxsnp.pruning import prune
from onnxsnp.surgery.apply import apply, to_model

HEADS, SIZE, TOKENS, WIDTH = 2, 8, 5, 12
Turn = Callable[[graphs.Net, Any, Any, Any], Any]


def halves(net: graphs.Net, x: Any, cos: Any, sin: Any) -> Any:
    """x cos + [−x₂, x₁] sin, with Slice."""
    first = net.op("Slice", x, [0], [SIZE // 2], [3], [1])
    second = net.op("Slice", x, [SIZE // 2], [2**63 - 1], [-1], [1])
    turned = net.op("Concat", net.op("Neg", second), first, axis=-1)
    return net.op("Add", net.op("Mul", x, cos), net.op("Mul", turned, sin))


def by_split(net: graphs.Net, x: Any, cos: Any, sin: Any) -> Any:
    """The same with Split."""
    first, second = net.split(x, [SIZE // 2] * 2, 3)
    turned = net.op("Concat", net.op("Neg", second), first, axis=3)
    return net.op("Add", net.op("Mul", x, cos), net.op("Mul", turned, sin))


def neighbours(net: graphs.Net, x: Any, cos: Any, sin: Any) -> Any:
    """Indices 2i and 2i + 1 are pairs: the head is reshaped to (pairs, 2)."""
    apart = net.reshape(x, 0, 0, 0, SIZE // 2, 2)
    first, second = (net.op("Gather", apart, [part], axis=4) for part in range(2))
    turned = net.reshape(net.op("Concat", net.op("Neg", second), first, axis=4), 0, 0, 0, SIZE)
    return net.op("Add", net.op("Mul", x, cos), net.op("Mul", turned, sin))


def every_other(net: graphs.Net, x: Any, cos: Any, sin: Any) -> Any:
    """The same pairs with strided slices, which are not understood."""
    first = net.op("Slice", x, [0], [SIZE], [3], [2])
    second = net.op("Slice", x, [1], [SIZE], [3], [2])
    turned = net.op("Concat", net.op("Neg", second), first, axis=3)
    return net.op("Add", net.op("Mul", x, cos), net.op("Mul", turned, sin))


def quarter(net: graphs.Net, x: Any, cos: Any, sin: Any) -> Any:
    """Only the first half of a head is turned; what is left passes by."""
    part, rest = net.split(x, [SIZE // 2] * 2, 3)
    first, second = net.split(part, [SIZE // 4] * 2, 3)
    turned = net.op("Concat", net.op("Neg", second), first, axis=3)
    moved = net.op("Add", net.op("Mul", part, cos), net.op("Mul", turned, sin))
    return net.op("Concat", moved, rest, axis=3)


def rotary(turn: Turn, blocks: int = 2, *, keys: int = HEADS, length: int | str = "T") -> onnx.ModelProto:
    """Blocks of attention with rotary positions, whose sines and cosines are computed once, from the length."""
    net = graphs.Net()
    x = net.input("x", ["N", length, 7])
    size = net.op("Gather", net.op("Shape", x), 1, axis=0)
    places = net.op("Cast", net.op("Range", 0, size, 1), to=onnx.TensorProto.FLOAT)
    speed = graphs.gs.Constant("speed", np.asarray([1.0, 0.5, 0.2, 0.1][: 2 if turn is quarter else 4], np.float32))
    angle = net.op("Mul", net.op("Unsqueeze", places, [1]), speed)
    if turn in (neighbours, every_other):
        twice = net.op("Unsqueeze", angle, [2])
        both = net.reshape(net.op("Concat", twice, twice, axis=2), -1, SIZE)
    else:
        both = net.op("Concat", angle, angle, axis=1)
    both = net.op("Unsqueeze", both, [0, 1])
    cos, sin = net.op("Cos", both), net.op("Sin", both)
    h = net.linear(x, "embed", 7, WIDTH)
    for index in range(blocks):
        q, k, v = (
            net.op("Transpose", net.reshape(net.linear(h, f"{name}{index}", WIDTH, n * SIZE), 0, -1, n, SIZE),
                   perm=[0, 2, 1, 3])
            for name, n in (("q", HEADS), ("k", keys), ("v", keys))
        )  # fmt: skip
        q, k = turn(net, q, cos, sin), turn(net, k, cos, sin)
        if keys < HEADS:
            k, v = (net.op("Concat", *[one] * (HEADS // keys), axis=1) for one in (k, v))
        scores = net.op("Softmax", net.op("MatMul", q, net.op("Transpose", k, perm=[0, 1, 3, 2])), axis=-1)
        mixed = net.op("Transpose", net.op("MatMul", scores, v), perm=[0, 2, 1, 3])
        h = net.op("Add", h, net.linear(net.reshape(mixed, 0, -1, HEADS * SIZE), f"o{index}", HEADS * SIZE, WIDTH))
    net.output(net.linear(h, "head", WIDTH, 3), ["N", length, 3])
    return net.proto()


def pairs(model: onnx.ModelProto) -> list[Group]:
    return [group for group in analyse_model(model).structure.groups if group.kind == "qk"]


def feeds(model: onnx.ModelProto) -> list[dict[str, np.ndarray]]:
    return [graphs.inputs_for(model, 2, T=TOKENS), graphs.inputs_for(model, 1, T=TOKENS + 3)]


@pytest.mark.parametrize(
    ("turn", "size", "together"), [(halves, 4, 2), (by_split, 4, 2), (neighbours, 4, 2), (quarter, 2, 4)]
)
def test_indices_that_are_turned_into_each_other_are_one(turn: Turn, size: int, together: int) -> None:
    found = pairs(rotary(turn))
    assert [(group.id, group.size, group.together, group.heads) for group in found] == [
        ("qk.0", size, together, 1),
        ("qk.1", size, together, 1),
    ]
    assert all(group.prunable and group.further == () for group in found)


@pytest.mark.parametrize("turn", [halves, by_split, neighbours, quarter])
@pytest.mark.parametrize("keep", [[0], [1], [0, 1]])
def test_a_cut_in_pairs_is_exact_and_differs_between_layers(turn: Turn, keep: list[int]) -> None:
    model = rotary(turn)
    analysis = analyse_model(model)
    size = analysis.groups["qk.0"].size
    other = [index for index in range(size) if index not in keep] or [0]
    plan = Plan("", [graphs.keeping(analysis.groups[name], [one]) for name, one in (("qk.0", keep), ("qk.1", other))])
    applied = apply(analysis, plan)
    assert applied.cuts
    original = masked(analysis.normalized.base, analysis.graph, analysis.dependencies, applied.cuts, {})
    assert difference(original, applied.graph, feeds(model), threads=1) < 1e-5
    weights = graphs.initializers(to_model(applied.graph))
    for weight, kept in (("q0.w", keep), ("k0.w", keep), ("q1.w", other), ("k1.w", other)):
        parts = [array.shape[1] for name, array in weights.items() if name.startswith(weight)]  # one, or taken apart
        assert sum(parts) == HEADS * SIZE * len(kept) // size


def test_the_two_halves_of_a_pair_are_the_ones_that_are_turned_into_each_other() -> None:
    model = rotary(halves, blocks=1)
    analysis = analyse_model(model)
    applied = apply(analysis, Plan("", [graphs.keeping(analysis.groups["qk.0"], [[1, 2]])]))
    kept = analysis.graph.weights["q0.w"].reshape(WIDTH, HEADS, 2, SIZE // 2)[..., [1, 2]].reshape(WIDTH, -1)
    np.testing.assert_array_equal(applied.graph.weights["q0.w"], kept)


def test_a_table_that_nothing_tells_apart_is_computed_once() -> None:
    model = rotary(halves)
    analysis = analyse_model(model)
    same = Plan("", [graphs.keeping(analysis.groups[name], [[0, 3]]) for name in ("qk.0", "qk.1")])
    apart = Plan("", [graphs.keeping(analysis.groups["qk.0"], [[0, 3]])])
    counts = [
        sum(node.op_type in ("Cos", "Sin") for node in to_model(apply(analysis, plan).graph).graph.node)
        for plan in (Plan("", []), same, apart)
    ]
    assert counts == [2, 2, 4]


def test_pairs_that_are_not_understood_are_left_alone_with_the_operator() -> None:
    structure = analyse_model(rotary(every_other)).structure
    assert not [group for group in structure.groups if group.kind == "qk"]
    assert [("Slice" in skipped.reason, "none of which can be cut" in skipped.reason) for skipped in structure.skipped]


def test_pruning_keeps_the_pairs_that_score_highest() -> None:
    model = rotary(halves)
    zero = {f"{name}{index}.{part}": None for name in "qk" for index in range(2) for part in "wb"}
    weights = graphs.initializers(model)
    for name in zero:
        array = weights[name].copy().reshape(*weights[name].shape[:-1], HEADS, 2, SIZE // 2)
        array[..., 2] = 0  # the third pair of every head is dead
        weights[name] = array.reshape(weights[name].shape)
    model = graphs.set_weights(model, weights)
    data = graphs.calibration(model, 16, T=TOKENS)
    result = prune(model, 0.25, allocation="uniform", scope="qk", compensation="none", calibration=data, samples=8)
    assert [entry.keep for entry in result.plan.groups] == [[[0, 1, 3]]] * 2
    for feed in feeds(model):
        for want, got in zip(graphs.run(model, feed), graphs.run(result.model, feed), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_query_heads_that_share_a_key_head_keep_the_same_pairs() -> None:
    model = rotary(halves, keys=1)
    analysis = analyse_model(model)
    assert [(group.size, group.together, group.prunable) for group in pairs(model)] == [(4, 2, True)] * 2
    applied = apply(analysis, Plan("", [graphs.keeping(analysis.groups["qk.1"], [[0, 2]])]))
    original = masked(analysis.normalized.base, analysis.graph, analysis.dependencies, applied.cuts, {})
    assert difference(original, applied.graph, feeds(model), threads=1) < 1e-5
    assert applied.graph.weights["k1.w"].shape[1] == SIZE // 2
