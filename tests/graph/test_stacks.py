"""Axes that Concat puts one after the other: parts are cut for themselves, and the whole follows."""

from __future__ import annotations

from typing import Any

import graphs
import numpy as np
import onnx
import pytest

from onnxsnp.analysis import Analysis, analyse_model, inspect
from onnxsnp.evaluation.verify import difference, masked
from onnxsnp.graph.linear import stacked_places
from onnxsnp.graph.stacks import Stack, above, bottom_up, expanded
from onnxsnp.planning.plan import Plan
from onnxsnp.pruning import prune
from onnxsnp.surgery.apply import apply, to_model


def gap(analysis: Analysis, plan: Plan, model: onnx.ModelProto) -> float:
    """Largest difference between the cut and the masked model."""
    applied = apply(analysis, plan)
    original = masked(analysis.normalized.base, analysis.graph, analysis.dependencies, applied.cuts, {})
    return difference(original, applied.graph, [graphs.inputs_for(model, batch) for batch in (1, 3)])


def joined(*, read: str = "linear", again: bool = False) -> onnx.ModelProto:
    """Two hidden layers of 6 and 8 neurons side by side, and what reads both.

    Args:
        read: "linear", "norm" (a LayerNormalization over both first), "split" (taken apart elsewhere) or "output".
        again: the two are added to a projection as wide as both.
    """
    net = graphs.Net()
    x = net.input("x", ["N", 5])
    parts = [net.op("Relu", net.linear(x, name, 5, size)) for name, size in (("a", 6), ("b", 8))]
    h = net.op("Concat", *parts, axis=-1, name="join")
    if again:
        h = net.op("Add", h, net.linear(x, "both", 5, 14))
    if read == "norm":
        h = net.norm(h, "norm", 14)
    if read == "split":
        left, right = net.split(h, [4, 10], axis=-1)
        h = net.op("Add", net.linear(left, "l", 4, 3), net.linear(right, "r", 10, 3))
    elif read != "output":
        h = net.linear(h, "out", 14, 3)
    net.output(h, ["N", 14 if read == "output" else 3])
    return net.proto()


def test_layers_that_are_read_together_are_cut_one_by_one() -> None:
    model = joined()
    analysis = analyse_model(model)
    groups = analysis.structure.groups
    assert [(group.kind, group.size, group.reasons) for group in groups] == [("ffn", 6, ()), ("ffn", 8, ())]
    assert all(group.consumers == (("out.w", 0),) for group in groups)
    keep = [graphs.keeping(groups[0], [[0, 4]]), graphs.keeping(groups[1], [[1, 2, 7]])]
    assert gap(analysis, Plan("", keep), model) < 1e-6
    weights = graphs.initializers(to_model(apply(analysis, Plan("", keep)).graph))
    assert np.array_equal(weights["out.w"], graphs.initializers(model)["out.w"][[0, 4, 7, 8, 13]])


def test_what_is_as_wide_as_the_whole_is_cut_along() -> None:
    model = joined(again=True)
    analysis = analyse_model(model)
    assert [(group.kind, group.size) for group in analysis.structure.groups] == [("residual", 6), ("residual", 8)]
    plan = graphs.random_plan(analysis.structure.groups, np.random.default_rng(0))
    assert gap(analysis, plan, model) < 1e-6
    kept = sum(entry.kept for entry in plan.groups)
    assert graphs.initializers(to_model(apply(analysis, plan).graph))["both.w"].shape == (5, kept)


@pytest.mark.parametrize(("read", "reason"), [("norm", "a normalisation runs over it"), ("split", "Split takes parts")])
def test_what_holds_the_whole_holds_its_parts(read: str, reason: str) -> None:
    report = inspect(joined(read=read))
    assert not any(group["prunable"] for group in report.groups)
    assert len([item for item in report.skipped if reason in item["reason"]]) == 2


def test_a_whole_that_is_an_output_is_nothing_to_report() -> None:
    found = analyse_model(joined(read="output")).structure
    assert found.groups == [] and found.skipped == []


def test_a_whole_that_is_taken_apart_by_reshape_is_left() -> None:
    net = graphs.Net()
    x = net.input("x", ["N", 5])
    h = net.op("Concat", *(net.linear(x, name, 5, 6) for name in "ab"), axis=-1)
    h = net.linear(net.op("Transpose", net.reshape(h, 0, 3, 4), perm=[0, 2, 1]), "out", 3, 2)
    net.output(h, ["N", 4, 2])
    report = inspect(net.proto())
    assert not any(group["prunable"] for group in report.groups)
    assert len([item for item in report.skipped if "Concat joins it" in item["reason"]]) == 2


def test_two_wholes_that_are_added_tie_their_parts() -> None:
    net = graphs.Net()
    x = net.input("x", ["N", 5])
    wholes = [net.op("Concat", *(net.linear(x, f"{name}{i}", 5, 4) for name in "ab"), axis=-1) for i in range(2)]
    net.output(net.linear(net.op("Add", *wholes), "out", 8, 3), ["N", 3])
    analysis = analyse_model(net.proto())
    emitted = [{weight for weight, _ in group.producers} for group in analysis.structure.groups]
    assert emitted == [{"a0.w", "a1.w"}, {"b0.w", "b1.w"}]
    plan = graphs.random_plan(analysis.structure.groups, np.random.default_rng(1))
    assert gap(analysis, plan, net.proto()) < 1e-6


def test_wholes_of_other_parts_that_are_added_are_left() -> None:
    net = graphs.Net()
    x = net.input("x", ["N", 5])
    parts = [[net.linear(x, f"{i}.{n}", 5, n) for n in sizes] for i, sizes in enumerate([(3, 5), (2, 6)])]
    wholes = [net.op("Concat", *each, axis=-1) for each in parts]
    net.output(net.linear(net.op("Add", *wholes), "out", 8, 3), ["N", 3])
    report = inspect(net.proto())
    assert not any(group["prunable"] for group in report.groups)
    assert len([item for item in report.skipped if "Concat joins it" in item["reason"]]) == 4


def test_the_same_channels_four_times_are_one_group_with_one_norm() -> None:
    """Patch merging: neighbours side by side, normalised together, as wide as four streams."""
    net = graphs.Net()
    x = net.input("x", ["N", 4, 5])
    h = net.linear(x, "embed", 5, 6)
    h = net.op("Add", h, net.linear(net.norm(h, "norm1", 6), "block", 6, 6))
    h = net.op("Concat", *(net.op("Slice", h, [i], [i + 1], [1]) for i in range(4)), axis=-1)
    net.output(net.linear(net.norm(h, "norm2", 24), "merge", 24, 3), ["N", 1, 3])
    analysis = analyse_model(net.proto())
    (group,) = analysis.structure.groups
    assert (group.kind, group.size, group.reasons) == ("residual", 6, ())
    plan = Plan("", [graphs.keeping(group, [[0, 2, 3, 5]])])
    assert gap(analysis, plan, net.proto()) < 1e-5
    assert graphs.initializers(to_model(apply(analysis, plan).graph))["merge.w"].shape == (16, 3)


def heads_beside() -> onnx.ModelProto:
    """Values [N, 2, 3, 4] of two attentions side by side on the axis inside the heads, read by one projection."""
    net = graphs.Net()
    x = net.input("x", ["N", 3, 5])

    def apart(name: str, source: Any) -> Any:
        return net.op("Transpose", net.reshape(net.linear(source, name, 5, 8), 0, 3, 2, 4), perm=[0, 2, 1, 3])

    def mixed(index: int) -> Any:
        q, k, v = (apart(f"{name}{index}", x) for name in "qkv")
        return net.op("MatMul", net.op("Softmax", net.op("MatMul", q, net.op("Transpose", k, perm=[0, 1, 3, 2]))), v)

    both = net.op("Transpose", net.op("Concat", mixed(0), mixed(1), axis=-1), perm=[0, 2, 1, 3])
    net.output(net.linear(net.reshape(both, 0, 3, 16), "out", 16, 3), ["N", 3, 3])
    return net.proto()


def test_heads_beside_a_stacked_axis_keep_indices_of_their_own() -> None:
    model = heads_beside()
    analysis = analyse_model(model)
    values = [group for group in analysis.structure.groups if group.kind == "v"]
    assert [(group.size, group.heads, group.reasons) for group in values] == [(4, 2, ())] * 2
    keep = [graphs.keeping(values[0], [[0, 1], [2, 3]]), graphs.keeping(values[1], [[3], [0]])]
    assert gap(analysis, Plan("", keep), model) < 1e-6
    kept = graphs.initializers(to_model(apply(analysis, Plan("", keep)).graph))["out.w"]
    assert np.array_equal(kept, graphs.initializers(model)["out.w"][[0, 1, 7, 10, 11, 12]])


def test_a_part_that_nothing_reads_goes_first() -> None:
    """The rows of the reader that belong to a part say whether its neurons are read."""
    model = joined()
    weight = graphs.initializers(model)["out.w"].copy()
    weight[[1, 3, 6, 10]] = 0
    quiet = graphs.set_weights(model, {"out.w": weight})
    result = prune(quiet, 0.3, allocation="uniform", compensation="none", samples=2)
    assert {entry.id: entry.keep for entry in result.plan.groups} == {
        "ffn.0": [[0, 2, 4, 5]],
        "ffn.1": [[1, 2, 3, 5, 6, 7]],
    }


def test_full_compensation_of_stacked_layers_is_proved() -> None:
    result = prune(joined(), 0.3, allocation="uniform", samples=16)
    assert result.record["verification"]["passed"]


SIZES = {0: 4, 1: 2, 2: 3, 8: 10, 9: 24}  # 8 = 0 ⊔ 1 × 2; 9 = 8 ⊔ 0 ⊔ 8
STACKS = {9: Stack("outer", ((8,), (0,), (8,))), 8: Stack("inner", ((0,), (1, 2)))}


def test_stacks_of_stacks_are_visited_from_the_bottom() -> None:
    assert list(bottom_up(STACKS)) == [8, 9]
    assert above(1, STACKS) == [8, 9] and set(above(0, STACKS)) == {8, 9} and above(9, STACKS) == []


def test_products_with_stacked_factors_are_sums_of_products_without() -> None:
    terms = expanded((5, 9), STACKS, lambda atom: SIZES.get(atom, 7))
    assert sorted(terms) == sorted([(28, (5, 0)), (42, (5, 1, 2))] * 2 + [(28, (5, 0))])
    assert sum(size for size, _ in terms) == 7 * 24


def test_the_cost_of_every_cut_is_that_of_the_cut_model() -> None:
    for model in (joined(), heads_beside()):
        analysis = analyse_model(model)
        applied = apply(analysis, graphs.random_plan(analysis.structure.groups, np.random.default_rng(2)))
        after = analyse_model(to_model(applied.graph)).cost
        sizes = {cut.atom: cut.keep.shape[1] for cut in applied.cuts}
        for what in ("macs", "params"):
            assert analysis.cost.total(what, sizes) == pytest.approx(after.total(what))


def test_places_of_neurons_in_a_whole() -> None:
    analysis = analyse_model(heads_beside())
    second = [group for group in analysis.structure.groups if group.kind == "v"][1]
    (whole,) = above(second.atom, analysis.dependencies.stacks)
    places = stacked_places(analysis.dependencies, second, whole)
    assert places.tolist() == [[4], [5], [6], [7]] * 2
