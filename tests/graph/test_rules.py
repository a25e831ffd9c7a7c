"""What every operator family ties, contracts and freezes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import helper

from onnxsnp.graph.axes import Axis, Factors, solve
from onnxsnp.graph.facts import Facts
from onnxsnp.graph.rules import RULES, gather_facts


def said(
    op: str,
    shapes: dict[str, tuple[int, ...]],
    inputs: list[str],
    outputs: list[str],
    *,
    opset: int = 17,
    values: dict[str, Any] | None = None,
    weights: tuple[str, ...] = (),
    domain: str = "",
    **attrs: Any,
) -> Facts:
    """Facts of one node. `values` are constant operands, `weights` names of operands that are weights."""
    held = {name: np.asarray(value) for name, value in (values or {}).items()}
    held.update({name: np.zeros(shapes[name], np.float32) for name in weights})
    full = {**shapes, **{name: array.shape for name, array in held.items()}}
    node = helper.make_node(op, inputs, outputs, name="node", domain=domain, **attrs)
    return gather_facts([node], full, held, opset, [], [])


def solved(facts: Facts) -> Factors:
    sizes = {(name, axis): size for name, shape in facts.shapes.items() for axis, size in enumerate(shape)}
    factors, clashes = solve(facts.ties, {**sizes, **facts.virtual})
    assert clashes == []
    return factors


def tied(facts: Facts, left: Axis, right: Axis) -> bool:
    factors = solved(facts)
    return bool(factors.atoms(left)) and factors.atoms(left) == factors.atoms(right)


def frozen(facts: Facts) -> set[Axis]:
    return {freeze.axis for freeze in facts.freezes}


def roles(facts: Facts) -> set[tuple[str, Axis]]:
    return {(role.kind, role.axis) for role in facts.roles}


def axes(*names: str, rank: int) -> set[Axis]:
    return {(name, axis) for name in names for axis in range(rank)}


@pytest.mark.parametrize("op", ["NoSuchOp", "NonMaxSuppression"])
def test_unknown_operators_freeze_everything_they_touch(op: str) -> None:
    facts = said(op, {"x": (2, 3), "y": (2, 3)}, ["x"], ["y"])
    assert frozen(facts) == axes("x", "y", rank=2)
    assert {freeze.reason for freeze in facts.freezes} == {f"no rule for operator {op}"}
    assert facts.ties == []


def test_an_operator_of_another_domain_is_unknown() -> None:
    facts = said("Relu", {"x": (2, 3), "y": (2, 3)}, ["x"], ["y"], domain="com.example")
    assert frozen(facts) == axes("x", "y", rank=2)


def test_an_operator_on_a_tensor_of_unknown_shape_freezes_the_rest() -> None:
    facts = said("Relu", {"x": (2, 3)}, ["x"], ["unknown"])
    assert frozen(facts) == axes("x", rank=2) and facts.ties == []


def test_subgraphs_freeze_what_they_read() -> None:
    body = helper.make_graph(
        [helper.make_node("Relu", ["outer"], ["z"])], "b", [], [helper.make_tensor_value_info("z", 1, [2, 3])]
    )
    facts = said("If", {"c": (), "outer": (2, 3), "y": (2, 3)}, ["c"], ["y"], then_branch=body, else_branch=body)
    assert frozen(facts) == axes("outer", "y", rank=2)


def test_model_inputs_and_outputs_are_frozen_with_their_names() -> None:
    facts = gather_facts(
        [helper.make_node("Relu", ["x"], ["y"], name="n")], {"x": (2, 3), "y": (2, 3)}, {}, 17, ["x"], ["y"]
    )
    assert {(freeze.axis[0], freeze.reason) for freeze in facts.freezes} == {
        ("x", "size of the model's input 'x'"),
        ("y", "size of the model's output 'y'"),
    }


@pytest.mark.parametrize("op", ["Relu", "Gelu", "Sigmoid", "Cast", "Identity", "Erf", "Dropout", "Clip"])
def test_unary_operators_tie_each_axis_to_itself(op: str) -> None:
    facts = said(op, {"x": (2, 3), "y": (2, 3)}, ["x"], ["y"])
    assert tied(facts, ("x", 0), ("y", 0)) and tied(facts, ("x", 1), ("y", 1))
    assert not tied(facts, ("x", 0), ("x", 1)) and not facts.freezes


@pytest.mark.parametrize("op", ["Add", "Mul", "Sub", "Div", "Pow", "Max"])
def test_broadcasting_aligns_from_the_right_and_says_nothing_of_repeated_axes(op: str) -> None:
    facts = said(op, {"a": (2, 5, 3), "b": (5, 1), "y": (2, 5, 3)}, ["a", "b"], ["y"])
    assert tied(facts, ("b", 0), ("y", 1))
    assert solved(facts).atoms(("b", 1)) == ()
    assert tied(facts, ("a", 2), ("y", 2)) and not tied(facts, ("b", 0), ("y", 0))


def test_only_additions_of_two_activations_are_joins() -> None:
    shapes = {"a": (2, 3), "b": (2, 3), "y": (2, 3)}
    assert said("Add", shapes, ["a", "b"], ["y"]).joins == [("a", "b")]
    assert said("Add", shapes, ["a", "b"], ["y"], weights=("b",)).joins == []
    assert said("Mul", shapes, ["a", "b"], ["y"]).joins == []


def test_where_ties_all_three_operands() -> None:
    facts = said("Where", {"c": (2, 1), "a": (2, 3), "b": (1, 3), "y": (2, 3)}, ["c", "a", "b"], ["y"])
    assert tied(facts, ("c", 0), ("a", 0)) and tied(facts, ("a", 1), ("b", 1))


def test_matmul_by_a_weight_is_a_projection() -> None:
    facts = said("MatMul", {"x": (2, 5, 3), "w": (3, 4), "y": (2, 5, 4)}, ["x", "w"], ["y"], weights=("w",))
    assert tied(facts, ("x", 2), ("w", 0)) and tied(facts, ("w", 1), ("y", 2)) and tied(facts, ("x", 1), ("y", 1))
    assert roles(facts) == {("consumer", ("w", 0)), ("producer", ("w", 1))}
    assert not facts.products and not facts.freezes


def test_matmul_by_a_weight_on_the_left_is_a_projection_of_the_rows() -> None:
    facts = said("MatMul", {"w": (4, 3), "x": (2, 3, 5), "y": (2, 4, 5)}, ["w", "x"], ["y"], weights=("w",))
    assert tied(facts, ("w", 1), ("x", 1)) and tied(facts, ("w", 0), ("y", 1)) and tied(facts, ("x", 2), ("y", 2))
    assert roles(facts) == {("consumer", ("w", 1)), ("producer", ("w", 0))}


def test_matmul_by_a_vector_contracts_and_emits_nothing() -> None:
    facts = said("MatMul", {"x": (2, 3), "w": (3,), "y": (2,)}, ["x", "w"], ["y"], weights=("w",))
    assert tied(facts, ("x", 1), ("w", 0)) and tied(facts, ("x", 0), ("y", 0))
    assert roles(facts) == {("consumer", ("w", 0))}


@pytest.mark.parametrize("left", [True, False])
def test_matmul_by_a_vector_keeps_the_batch_axes_in_place(left: bool) -> None:
    shapes = {"x": (2, 3, 2, 2), "v": (2,), "y": (2, 3, 2)}
    names = ["v", "x"] if left else ["x", "v"]
    facts = said("MatMul", shapes, names, ["y"], weights=("v",))
    kept, gone = (3, 2) if left else (2, 3)
    assert all(tied(facts, ("x", axis), ("y", place)) for axis, place in ((0, 0), (1, 1), (kept, 2)))
    assert tied(facts, ("x", gone), ("v", 0)) and not tied(facts, ("x", 0), ("y", 2))


def test_matmul_of_activations_is_a_product_and_ties_its_batch_axes() -> None:
    shapes = {"q": (2, 3, 5, 4), "k": (2, 3, 4, 7), "s": (2, 3, 5, 7)}
    facts = said("MatMul", shapes, ["q", "k"], ["s"])
    (product,) = facts.products
    assert (product.left, product.right, product.rows, product.columns) == (("q", 3), ("k", 2), ("q", 2), ("k", 3))
    assert tied(facts, ("q", 3), ("k", 2)) and tied(facts, ("q", 1), ("k", 1)) and tied(facts, ("k", 3), ("s", 3))
    assert not tied(facts, ("q", 2), ("k", 3)) and not facts.roles


def test_matmul_does_not_tie_a_repeated_batch_axis() -> None:
    facts = said("MatMul", {"q": (2, 6, 5, 4), "k": (2, 1, 4, 7), "s": (2, 6, 5, 7)}, ["q", "k"], ["s"])
    assert tied(facts, ("q", 1), ("s", 1)) and solved(facts).atoms(("k", 1)) == ()


@pytest.mark.parametrize("trans_a", [0, 1])
@pytest.mark.parametrize("trans_b", [0, 1])
def test_gemm_follows_its_transposes(trans_a: int, trans_b: int) -> None:
    shapes = {"x": (5, 3)[:: -1 if trans_a else 1], "w": (3, 4)[:: -1 if trans_b else 1], "b": (4,), "y": (5, 4)}
    facts = said("Gemm", shapes, ["x", "w", "b"], ["y"], weights=("w", "b"), transA=trans_a, transB=trans_b)
    inner, outer = ("w", trans_b), ("w", 1 - trans_b)
    assert tied(facts, ("x", 1 - trans_a), inner) and tied(facts, ("x", trans_a), ("y", 0))
    assert tied(facts, outer, ("y", 1)) and tied(facts, ("b", 0), ("y", 1))
    assert roles(facts) == {("consumer", inner), ("producer", outer)}


def test_gemm_bias_that_is_repeated_over_the_columns_ties_its_rows() -> None:
    facts = said("Gemm", {"x": (5, 3), "w": (3, 4), "b": (5, 1), "y": (5, 4)}, ["x", "w", "b"], ["y"], weights=("w",))
    assert tied(facts, ("b", 0), ("y", 0)) and solved(facts).atoms(("b", 1)) == ()


def test_einsum_of_two_activations_is_a_product() -> None:
    facts = said(
        "Einsum",
        {"q": (2, 5, 3, 4), "k": (2, 7, 3, 4), "s": (2, 3, 5, 7)},
        ["q", "k"],
        ["s"],
        equation="bqhd,bkhd->bhqk",
    )
    (product,) = facts.products
    assert (product.left, product.right, product.rows, product.columns) == (("q", 3), ("k", 3), ("q", 1), ("k", 1))
    assert tied(facts, ("q", 3), ("k", 3)) and tied(facts, ("q", 2), ("s", 1)) and tied(facts, ("k", 1), ("s", 3))
    assert not facts.freezes


def test_einsum_by_a_weight_is_a_projection() -> None:
    facts = said(
        "Einsum",
        {"x": (2, 5, 3), "w": (4, 3), "y": (2, 5, 4)},
        ["x", "w"],
        ["y"],
        weights=("w",),
        equation="btc,oc->bto",
    )
    assert roles(facts) == {("consumer", ("w", 1)), ("producer", ("w", 0))} and tied(facts, ("w", 0), ("y", 2))


@pytest.mark.parametrize("equation", ["bii->bi", "bij,jk"])
def test_einsums_that_are_no_plain_product_are_frozen(equation: str) -> None:
    facts = said("Einsum", {"a": (2, 3, 3), "b": (3, 3), "y": (2, 3, 3)}, ["a", "b"], ["y"], equation=equation)
    assert frozen(facts) == axes("a", "y", rank=3) | axes("b", rank=2)


def test_an_ellipsis_in_einsum_stands_for_axes_from_the_right() -> None:
    shapes = {"a": (2, 5, 7, 4), "b": (5, 9, 4), "y": (2, 5, 7, 9)}
    facts = said("Einsum", shapes, ["a", "b"], ["y"], equation="...pd,...qd->...pq")
    assert tied(facts, ("a", 0), ("y", 0)) and tied(facts, ("b", 0), ("a", 1)) and tied(facts, ("b", 0), ("y", 1))
    (product,) = facts.products
    assert (product.left, product.right) == (("a", 3), ("b", 2)) and not facts.freezes


def test_einsum_freezes_what_it_merely_sums() -> None:
    facts = said("Einsum", {"a": (2, 3), "y": (2,)}, ["a"], ["y"], equation="ij->i")
    assert frozen(facts) == {("a", 1)}


def test_convolution_contracts_its_input_channels_and_freezes_the_image() -> None:
    shapes = {"x": (2, 3, 8, 8), "w": (5, 3, 3, 3), "b": (5,), "y": (2, 5, 6, 6)}
    facts = said("Conv", shapes, ["x", "w", "b"], ["y"], weights=("w", "b"))
    assert tied(facts, ("x", 1), ("w", 1)) and tied(facts, ("w", 0), ("y", 1)) and tied(facts, ("b", 0), ("y", 1))
    assert frozen(facts) == {("x", 2), ("x", 3), ("w", 2), ("w", 3)}
    assert roles(facts) == {("consumer", ("w", 1)), ("producer", ("w", 0))}


def test_depthwise_convolution_passes_its_channels_through() -> None:
    shapes = {"x": (2, 5, 8, 8), "w": (5, 1, 3, 3), "y": (2, 5, 6, 6)}
    facts = said("Conv", shapes, ["x", "w"], ["y"], weights=("w",), group=5)
    assert tied(facts, ("x", 1), ("y", 1)) and tied(facts, ("x", 1), ("w", 0)) and not facts.roles


@pytest.mark.parametrize(("group", "out", "inner"), [(2, 6, 2), (4, 8, 1)])
def test_grouped_convolution_freezes_both_sides(group: int, out: int, inner: int) -> None:
    shapes = {"x": (2, 4, 8, 8), "w": (out, inner, 3, 3), "y": (2, out, 6, 6)}
    facts = said("Conv", shapes, ["x", "w"], ["y"], weights=("w",), group=group)
    assert {("x", 1), ("w", 0), ("w", 1), ("w", 2), ("w", 3)} <= frozen(facts) and not facts.roles


def test_a_computed_kernel_is_frozen() -> None:
    facts = said("Conv", {"x": (2, 3, 8, 8), "w": (5, 3, 3, 3), "y": (2, 5, 6, 6)}, ["x", "w"], ["y"])
    assert frozen(facts) >= axes("x", "w", "y", rank=4)


def test_pooling_keeps_channels_and_freezes_the_image() -> None:
    facts = said("GlobalAveragePool", {"x": (2, 3, 8, 8), "y": (2, 3, 1, 1)}, ["x"], ["y"])
    assert tied(facts, ("x", 1), ("y", 1)) and frozen(facts) == {("x", 2), ("x", 3)}


def test_reshape_splits_and_joins_row_major() -> None:
    facts = said("Reshape", {"x": (2, 5, 12), "y": (2, 5, 3, 4)}, ["x", "shape"], ["y"], values={"shape": [2, 5, 3, 4]})
    factors = solved(facts)
    assert factors.atoms(("x", 2)) == factors.atoms([("y", 2), ("y", 3)])
    assert [factors.size(atom) for atom in factors.atoms(("x", 2))] == [3, 4]


def test_transpose_permutes_and_reverses_by_default() -> None:
    facts = said("Transpose", {"x": (2, 3, 4), "y": (3, 4, 2)}, ["x"], ["y"], perm=[1, 2, 0])
    assert tied(facts, ("x", 0), ("y", 2)) and tied(facts, ("x", 1), ("y", 0))
    facts = said("Transpose", {"x": (2, 3, 4), "y": (4, 3, 2)}, ["x"], ["y"])
    assert tied(facts, ("x", 0), ("y", 2)) and tied(facts, ("x", 2), ("y", 0))


@pytest.mark.parametrize(("axis", "want"), [(None, {2}), (1, {1}), (-2, {1})])
def test_softmax_freezes_the_one_axis_it_runs_over(axis: int | None, want: set[int]) -> None:
    attrs = {} if axis is None else {"axis": axis}
    facts = said("Softmax", {"x": (2, 3, 4), "y": (2, 3, 4)}, ["x"], ["y"], **attrs)
    assert frozen(facts) == {("x", index) for index in want} and tied(facts, ("x", 0), ("y", 0))


@pytest.mark.parametrize(("axis", "want"), [(None, {1, 2}), (-1, {2}), (0, {0, 1, 2})])
def test_softmax_before_opset_13_runs_over_every_axis_from_its_own_on(axis: int | None, want: set[int]) -> None:
    attrs = {} if axis is None else {"axis": axis}
    facts = said("Softmax", {"x": (2, 3, 4), "y": (2, 3, 4)}, ["x"], ["y"], opset=11, **attrs)
    assert frozen(facts) == {("x", index) for index in want}


def test_layer_norm_records_every_axis_it_averages_over() -> None:
    facts = said(
        "LayerNormalization", {"x": (2, 3, 4), "s": (3, 4), "y": (2, 3, 4)}, ["x", "s"], ["y"], weights=("s",), axis=-2
    )
    assert {role.axis for role in facts.statistics} == {("x", 1), ("x", 2)}
    assert tied(facts, ("s", 1), ("x", 2)) and tied(facts, ("x", 2), ("y", 2)) and not facts.freezes


def test_batch_norm_ties_its_vectors_to_the_channels() -> None:
    shapes = {"x": (2, 3, 4, 4), "s": (3,), "b": (3,), "m": (3,), "v": (3,), "y": (2, 3, 4, 4)}
    facts = said("BatchNormalization", shapes, ["x", "s", "b", "m", "v"], ["y"], weights=("s", "b", "m", "v"))
    assert all(tied(facts, (name, 0), ("x", 1)) for name in "sbmv") and not facts.freezes


@pytest.mark.parametrize("keepdims", [0, 1])
@pytest.mark.parametrize("style", ["input", "attribute"])
def test_reductions_freeze_their_axes_however_they_are_given(style: str, keepdims: int) -> None:
    shapes = {"x": (2, 3, 4), "y": (2, 1, 4) if keepdims else (2, 4)}
    if style == "input":
        facts = said("ReduceMax", shapes, ["x", "axes"], ["y"], values={"axes": [-2]}, keepdims=keepdims, opset=18)
    else:
        facts = said("ReduceMax", shapes, ["x"], ["y"], axes=[-2], keepdims=keepdims)
    assert frozen(facts) == {("x", 1)}
    assert tied(facts, ("x", 0), ("y", 0)) and tied(facts, ("x", 2), ("y", 1 + keepdims))


def test_a_reduction_without_axes_runs_over_all_of_them_unless_it_says_otherwise() -> None:
    facts = said("ReduceSum", {"x": (2, 3), "y": (1, 1)}, ["x"], ["y"])
    assert frozen(facts) == axes("x", rank=2)
    facts = said("ReduceSum", {"x": (2, 3), "y": (2, 3)}, ["x"], ["y"], noop_with_empty_axes=1)
    assert not facts.freezes and tied(facts, ("x", 1), ("y", 1))


def test_a_reduction_over_computed_axes_freezes_everything() -> None:
    facts = said("ReduceSum", {"x": (2, 3), "axes": (1,), "y": (2, 1)}, ["x", "axes"], ["y"])
    assert frozen(facts) == axes("x", "y", rank=2)


def test_a_mean_is_a_statistic_not_a_freeze() -> None:
    facts = said("ReduceMean", {"x": (2, 3), "y": (2, 1)}, ["x"], ["y"], axes=[1])
    assert [role.axis for role in facts.statistics] == [("x", 1)] and not facts.freezes


def test_expand_ties_what_it_does_not_repeat() -> None:
    facts = said("Expand", {"x": (1, 5), "y": (2, 3, 5)}, ["x", "shape"], ["y"], values={"shape": [2, 3, 5]})
    assert tied(facts, ("x", 1), ("y", 2)) and not facts.freezes


def test_split_takes_consecutive_ranges() -> None:
    facts = said("Split", {"x": (2, 7), "a": (2, 3), "b": (2, 4)}, ["x"], ["a", "b"], axis=-1)
    assert [(take.output, take.start, take.stop, take.axis) for take in facts.selects] == [
        ("a", 0, 3, 1),
        ("b", 3, 7, 1),
    ]
    assert frozen(facts) == {("x", 1), ("a", 1), ("b", 1)} and tied(facts, ("a", 0), ("b", 0))
    assert not tied(facts, ("x", 1), ("a", 1))


@pytest.mark.parametrize("told", [True, False])
def test_split_with_an_output_that_nothing_reads(told: bool) -> None:
    values = {"sizes": [2, 2, 2]} if told else {}
    facts = said("Split", {"x": (6, 3), "b": (2, 3)}, ["x", *values], ["", "b", ""], values=values)
    assert [(take.output, take.start, take.stop) for take in facts.selects] == [("b", 2, 4)]


@pytest.mark.parametrize("start", [0, 1])
def test_every_other_index_is_one_of_each_pair(start: int) -> None:
    values = {"from": [start], "to": [2**31], "along": [1], "step": [2]}
    facts = said("Slice", {"x": (3, 8), "y": (3, 4)}, ["x", *values], ["y"], values=values)
    factors = solved(facts)
    pairs, inside = factors.atoms(("x", 1))
    assert (factors.size(pairs), factors.size(inside)) == (4, 2)
    assert factors.atoms(("y", 1)) == (pairs,) and tied(facts, ("x", 0), ("y", 0))
    assert {atom for axis in frozen(facts) for atom in factors.atoms(axis)} == {inside}


@pytest.mark.parametrize(("size", "left", "step"), [(7, 4, 2), (8, 4, -2), (8, 3, 2)])
def test_other_steps_freeze_the_axis(size: int, left: int, step: int) -> None:
    values = {"from": [0 if step > 0 else 7], "to": [6 if left == 3 else 2**31 * step], "along": [1], "step": [step]}
    facts = said("Slice", {"x": (3, size), "y": (3, left)}, ["x", *values], ["y"], values=values)
    assert frozen(facts) == {("x", 1), ("y", 1)}


def test_split_into_one_part_is_no_split() -> None:
    facts = said("Split", {"x": (2, 7), "a": (2, 7)}, ["x"], ["a"], axis=-1)
    assert tied(facts, ("x", 1), ("a", 1)) and not facts.selects and not facts.freezes


def sliced(shape: tuple[int, ...], out: tuple[int, ...], **values: Any) -> Facts:
    order = ["starts", "ends", "axes", "steps"]
    names = [name if name in values else "" for name in order]
    while names and not names[-1]:
        names.pop()
    given = {name: value for name, value in values.items() if value is not None}
    computed = {name: (1,) for name, value in values.items() if value is None}
    return said("Slice", {"x": shape, "y": out, **computed}, ["x", *names], ["y"], values=given)


@pytest.mark.parametrize(("start", "end", "first"), [(2, 5, 2), (-4, -1, 3), (4, 2**63 - 1, 4), (-3, 2**31 - 1, 4)])
def test_slice_selects_a_range_counted_from_either_end(start: int, end: int, first: int) -> None:
    facts = sliced((2, 7), (2, 3), starts=[start], ends=[end], axes=[1], steps=[1])
    (take,) = facts.selects
    assert (take.start, take.stop, take.axis) == (first, first + 3, 1)
    assert frozen(facts) == {("x", 1), ("y", 1)} and tied(facts, ("x", 0), ("y", 0))


def test_slice_of_a_whole_axis_changes_nothing() -> None:
    facts = sliced((2, 7), (2, 7), starts=[0], ends=[7], axes=[1], steps=[1])
    assert tied(facts, ("x", 1), ("y", 1)) and not facts.freezes


@pytest.mark.parametrize("steps", [[-1], [2], None])
def test_slice_with_steps_that_are_not_one_or_unknown_is_frozen(steps: list[int] | None) -> None:
    out = (2, 4) if steps == [2] else (2, 7)
    facts = sliced(
        (2, 7), out, starts=[-1] if steps == [-1] else [0], ends=[-99] if steps == [-1] else [7], axes=[1], steps=steps
    )
    assert {("x", 1), ("y", 1)} <= frozen(facts) and not facts.selects
    assert not tied(facts, ("x", 1), ("y", 1))


def test_slice_from_an_unknown_start_is_frozen() -> None:
    facts = sliced((2, 7), (2, 3), starts=None, ends=None, axes=[1], steps=[1])
    assert frozen(facts) == {("x", 1), ("y", 1)} and not facts.selects and tied(facts, ("x", 0), ("y", 0))


def test_slice_over_unknown_axes_freezes_everything() -> None:
    facts = sliced((2, 7), (2, 3), starts=[0], ends=[3], axes=None)
    assert frozen(facts) == axes("x", "y", rank=2)


def test_slice_of_two_axes_freezes_both() -> None:
    facts = sliced((5, 7), (2, 3), starts=[0, 0], ends=[2, 3])
    assert frozen(facts) == axes("x", "y", rank=2) and not facts.selects


def test_slice_before_opset_10_has_its_bounds_in_attributes() -> None:
    facts = said("Slice", {"x": (2, 7), "y": (2, 3)}, ["x"], ["y"], opset=9, starts=[4], ends=[7], axes=[1])
    assert [(take.start, take.stop) for take in facts.selects] == [(4, 7)]


def test_gather_of_one_entry_drops_the_axis() -> None:
    facts = said("Gather", {"x": (3, 2, 5), "y": (2, 5)}, ["x", "i"], ["y"], values={"i": -1}, axis=0)
    (take,) = facts.selects
    assert (take.start, take.stop, take.drops_axis) == (2, 3, True)
    assert tied(facts, ("x", 1), ("y", 0)) and tied(facts, ("x", 2), ("y", 1)) and frozen(facts) == {("x", 0)}


def test_gather_of_consecutive_entries_is_a_range() -> None:
    facts = said("Gather", {"x": (2, 7), "y": (2, 3)}, ["x", "i"], ["y"], values={"i": [2, 3, 4]}, axis=1)
    assert [(take.start, take.stop, take.drops_axis) for take in facts.selects] == [(2, 5, False)]


def test_gather_of_scattered_entries_is_frozen() -> None:
    facts = said("Gather", {"x": (2, 7), "y": (2, 3)}, ["x", "i"], ["y"], values={"i": [2, 0, 4]}, axis=1)
    assert not facts.selects and ("x", 1) in frozen(facts) and not tied(facts, ("x", 1), ("y", 1))


def test_an_embedding_lookup_emits_the_width_of_its_table() -> None:
    facts = said(
        "Gather", {"table": (9, 4), "ids": (2, 5), "y": (2, 5, 4)}, ["table", "ids"], ["y"], weights=("table",)
    )
    assert roles(facts) == {("producer", ("table", 1))} and frozen(facts) == {("table", 0)}
    assert tied(facts, ("ids", 1), ("y", 1)) and tied(facts, ("table", 1), ("y", 2))


def test_concat_puts_axes_one_after_the_other() -> None:
    facts = said("Concat", {"a": (2, 3), "b": (2, 4), "y": (2, 7)}, ["a", "b"], ["y"], axis=-1)
    (found,) = facts.concatenations
    assert (found.whole, found.parts) == (("y", 1), (("a", 1), ("b", 1)))
    assert tied(facts, ("a", 0), ("b", 0)) and not tied(facts, ("a", 1), ("y", 1)) and not facts.freezes


def test_concat_with_an_axis_that_may_be_empty_is_frozen() -> None:
    facts = said("Concat", {"past": (2, 0), "b": (2, 4), "y": (2, 4)}, ["past", "b"], ["y"], axis=1)
    assert frozen(facts) == {("past", 1), ("b", 1), ("y", 1)} and not facts.concatenations


@pytest.mark.parametrize("style", ["input", "axes", "attribute"])
def test_pad_freezes_what_it_makes_longer(style: str) -> None:
    shapes = {"x": (2, 3, 4), "y": (2, 3, 5)}
    if style == "input":
        facts = said("Pad", shapes, ["x", "p"], ["y"], values={"p": [0, 0, 0, 0, 0, 1]})
    elif style == "axes":
        values = {"p": [0, 0, 1, 0], "a": [-1, 1]}
        facts = said("Pad", shapes, ["x", "p", "", "a"], ["y"], values=values, opset=18)
    else:
        facts = said("Pad", shapes, ["x"], ["y"], opset=9, pads=[0, 0, 0, 0, 0, 1])
    assert frozen(facts) == {("x", 2), ("y", 2)}
    assert tied(facts, ("x", 0), ("y", 0)) and tied(facts, ("x", 1), ("y", 1))


def test_pad_that_shifts_an_axis_is_seen_though_its_size_stays() -> None:
    facts = said("Pad", {"x": (2, 3), "y": (2, 3)}, ["x", "p"], ["y"], values={"p": [0, -1, 0, 1]})
    assert frozen(facts) == {("x", 1), ("y", 1)}


def test_pad_by_computed_amounts_freezes_everything() -> None:
    facts = said("Pad", {"x": (2, 3), "p": (4,), "y": (2, 3)}, ["x", "p"], ["y"])
    assert frozen(facts) == axes("x", "y", rank=2)


@pytest.mark.parametrize("given", ["scales", "sizes", "computed sizes", "axes"])
def test_resize_keeps_channels_and_freezes_the_image(given: str) -> None:
    shapes = {"x": (2, 3, 4, 4), "y": (2, 3, 8, 8)}
    if given == "scales":
        facts = said("Resize", shapes, ["x", "", "s"], ["y"], values={"s": [1.0, 1.0, 2.0, 2.0]})
    elif given == "sizes":
        facts = said("Resize", shapes, ["x", "", "", "s"], ["y"], values={"s": [2, 3, 8, 8]})
    elif given == "axes":
        facts = said("Resize", shapes, ["x", "", "s"], ["y"], values={"s": [2.0, 2.0]}, opset=18, axes=[-2, -1])
    else:
        facts = said("Resize", {**shapes, "s": (4,)}, ["x", "", "", "s"], ["y"])
    assert frozen(facts) == {("x", 2), ("x", 3), ("y", 2), ("y", 3)}
    assert tied(facts, ("x", 0), ("y", 0)) and tied(facts, ("x", 1), ("y", 1))


def test_resize_by_a_scale_that_rounds_to_the_same_size_is_no_copy() -> None:
    facts = said("Resize", {"x": (2, 8), "y": (2, 8)}, ["x", "", "s"], ["y"], values={"s": [1.0, 1.1]})
    assert frozen(facts) == {("x", 1), ("y", 1)}


def test_resize_by_computed_scales_or_of_a_crop_freezes_everything() -> None:
    shapes = {"x": (2, 3), "s": (2,), "y": (2, 3)}
    assert frozen(said("Resize", shapes, ["x", "", "s"], ["y"])) == axes("x", "y", rank=2)
    crop = {"coordinate_transformation_mode": "tf_crop_and_resize"}
    facts = said("Resize", shapes, ["x", "r", "", "s"], ["y"], values={"r": [0.0, 0.0, 1.0, 1.0], "s": [2, 3]}, **crop)
    assert frozen(facts) == axes("x", "y", rank=2)


@pytest.mark.parametrize(
    ("kernel", "attrs"), [((1, 1), {}), ((1, 1), {"strides": [2, 2]}), ((3, 3), {"pads": [1] * 4})]
)
def test_only_a_convolution_of_single_places_leaves_the_image_alone(
    kernel: tuple[int, int], attrs: dict[str, list[int]]
) -> None:
    size = 2 if "strides" in attrs else 4
    shapes = {"x": (2, 3, 4, 4), "w": (5, 3, *kernel), "y": (2, 5, size, size)}
    facts = said("Conv", shapes, ["x", "w"], ["y"], weights=("w",), **attrs)
    alone = not attrs
    assert tied(facts, ("x", 2), ("y", 2)) == tied(facts, ("x", 3), ("y", 3)) == alone
    assert frozen(facts) == (set() if alone else {("x", 2), ("x", 3), ("w", 2), ("w", 3)})


@pytest.mark.parametrize(("op", "sums"), [("ReduceL2", True), ("ReduceSum", True), ("ReduceMax", False)])
def test_sums_and_lengths_are_told_from_other_reductions(op: str, sums: bool) -> None:
    attrs = {} if op == "ReduceSum" else {"axes": [1]}
    inputs = ["x", "a"] if op == "ReduceSum" else ["x"]
    facts = said(op, {"x": (2, 3), "y": (2, 1)}, inputs, ["y"], values={"a": [1]} if op == "ReduceSum" else {}, **attrs)
    assert frozen(facts) == {("x", 1)} and bool(facts.sums) == sums


def test_attention_with_four_axes_has_a_score_and_a_mix() -> None:
    shapes = {"q": (2, 3, 5, 4), "k": (2, 3, 7, 4), "v": (2, 3, 7, 6), "y": (2, 3, 5, 6)}
    facts = said("Attention", shapes, ["q", "k", "v"], ["y"], opset=23)
    score, mix = facts.products
    assert (score.left, score.right, mix.columns) == (("q", 3), ("k", 3), ("v", 3))
    assert tied(facts, ("q", 3), ("k", 3)) and tied(facts, ("v", 3), ("y", 3)) and tied(facts, ("q", 1), ("v", 1))
    assert frozen(facts) == {("k", 2)}


def test_attention_with_three_axes_counts_heads_by_attribute() -> None:
    shapes = {"q": (2, 5, 12), "k": (2, 7, 12), "v": (2, 7, 18), "y": (2, 5, 18)}
    facts = said("Attention", shapes, ["q", "k", "v"], ["y"], opset=23, q_num_heads=3, kv_num_heads=3)
    factors = solved(facts)
    assert [factors.size(atom) for atom in factors.atoms(("q", 2))] == [3, 4]
    assert factors.atoms(("q", 2)) == factors.atoms(("k", 2)) and factors.atoms(("v", 2)) == factors.atoms(("y", 2))
    assert factors.atoms(("q", 2))[0] == factors.atoms(("v", 2))[0]


def test_attention_whose_query_heads_share_keys_freezes_the_heads() -> None:
    shapes = {"q": (2, 6, 5, 4), "k": (2, 3, 7, 4), "v": (2, 3, 7, 6), "y": (2, 6, 5, 6)}
    facts = said("Attention", shapes, ["q", "k", "v"], ["y"], opset=23)
    assert {("q", 1), ("k", 1)} <= frozen(facts)


def test_attention_with_a_cache_is_frozen() -> None:
    shapes = dict.fromkeys(("q", "k", "v", "y", "past"), (2, 3, 5, 4))
    facts = said("Attention", shapes, ["q", "k", "v", "", "past"], ["y"], opset=23)
    assert axes("q", "k", "v", "y", rank=4) <= frozen(facts)


def test_tensors_made_at_run_time_are_frozen() -> None:
    facts = said("Range", {"a": (), "y": (3,)}, ["a", "a", "a"], ["y"])
    assert frozen(facts) == axes("y", rank=1)


@pytest.mark.parametrize(("op", "shape"), [("Dropout", (2, 3)), ("MaxPool", (2, 3, 4, 4))])
def test_second_outputs_are_tied_or_frozen(op: str, shape: tuple[int, ...]) -> None:
    facts = said(op, {"x": shape, "y": shape, "extra": shape}, ["x"], ["y", "extra"])
    spoken = {axis for tie in facts.ties for axis in (*tie.left, *tie.right)} | frozen(facts)
    assert axes("extra", rank=len(shape)) <= spoken


def test_every_rule_takes_a_node_and_facts() -> None:
    assert all(callable(rule) for rule in RULES.values()) and len(RULES) > 80


def test_an_entry_of_which_only_the_size_is_read_freezes_nothing() -> None:
    shapes = {"x": (3, 2, 5), "y": (3, 2), "z": (2,)}
    held = {"i": np.asarray(-1)}
    nodes = [
        helper.make_node("Gather", ["x", "i"], ["y"], name="take", axis=2),
        helper.make_node("Shape", ["y"], ["z"], name="size"),
    ]
    facts = gather_facts(nodes, {**shapes, "i": ()}, held, 17, [], [])
    assert not frozen(facts) and not facts.selects
    assert tied(facts, ("x", 0), ("y", 0)) and tied(facts, ("x", 1), ("y", 1))
    for index, outputs in (
        (np.asarray(3), []),
        (np.asarray(-1), ["y"]),
    ):  # not there in a narrower one; read by callers
        facts = gather_facts(nodes, {**shapes, "i": ()}, {"i": index}, 17, [], outputs)
        assert ("x", 2) in frozen(facts)


def test_gather_nd_looks_up_rows_and_keeps_the_columns() -> None:
    facts = said("GatherND", {"i": (2, 7, 1), "y": (2, 7, 4), "w": (9, 4)}, ["w", "i"], ["y"], weights=("w",))
    assert tied(facts, ("w", 1), ("y", 2)) and tied(facts, ("i", 1), ("y", 1))
    assert frozen(facts) == {("w", 0), ("i", 2)} and roles(facts) == {("producer", ("w", 1))}


def test_gather_nd_shares_its_batch_axes_with_the_data() -> None:
    facts = said("GatherND", {"x": (2, 5, 6, 4), "i": (2, 3, 2), "y": (2, 3, 4)}, ["x", "i"], ["y"], batch_dims=1)
    assert tied(facts, ("x", 0), ("y", 0)) and tied(facts, ("x", 3), ("y", 2)) and tied(facts, ("i", 1), ("y", 1))
    assert frozen(facts) == {("x", 1), ("x", 2), ("i", 2)}
