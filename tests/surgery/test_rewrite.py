"""Cutting and masking arrays against naive loops; sizes that operators were told."""

from __future__ import annotations

import itertools

import graphs
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxsnp.analysis import analyse_model
from onnxsnp.evaluation.verify import prove
from onnxsnp.graph.ir import attribute
from onnxsnp.planning.plan import Plan
from onnxsnp.surgery.apply import apply, to_model
from onnxsnp.surgery.rewrite import Cut, cut_array, in_order, mask_array

SIZES = {0: 2, 1: 3, 2: 4, 3: 5}  # factor 0 counts heads of factor 1, ...


def naive(array: np.ndarray, axes: list[tuple[int, ...]], cuts: list[Cut]) -> tuple[np.ndarray, np.ndarray]:
    """(cut, masked) entry by entry: an entry stays if every cut keeps its coordinate, at the coordinates of its heads.

    What stays moves to the position that its coordinate has among the kept ones.
    """
    flat = [atom for atoms in axes for atom in atoms]
    sizes = {atom: SIZES[atom] for atom in flat}
    sizes.update({cut.atom: cut.keep.shape[1] for cut in cuts if cut.atom in sizes})
    view = array.reshape([SIZES[atom] for atom in flat])
    masked, reduced = np.zeros_like(view), np.full([sizes[atom] for atom in flat], np.nan)
    for place in itertools.product(*(range(size) for size in view.shape)):
        at = dict(zip(flat, place, strict=True))
        target = dict(at)
        for cut in cuts:
            if cut.atom in at:
                row = 0
                for head in cut.head_atoms:
                    row = row * SIZES[head] + at[head]
                held = cut.keep[row].tolist()
                target[cut.atom] = held.index(at[cut.atom]) if at[cut.atom] in held else -1
        if min(target.values()) >= 0:
            masked[place] = view[place]
            reduced[tuple(target[atom] for atom in flat)] = view[place]
    return reduced.reshape([int(np.prod([sizes[a] for a in atoms])) for atoms in axes]), masked.reshape(array.shape)


def keep_of(rng: np.random.Generator, rows: int, size: int) -> np.ndarray:
    kept = int(rng.integers(1, size + 1))
    return np.stack([np.sort(rng.permutation(size)[:kept]) for _ in range(rows)])


LAYOUTS = [
    [(1,)],
    [(0, 1)],
    [(3,), (0, 1)],
    [(0, 1), (3,)],
    [(1, 0)],
    [(3, 1), (2,)],
    [(0,), (3,), (1,)],
    [(0, 2, 1)],
    [(1,), (0,)],
    [(2, 0, 3, 1)],
]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.sampled_from(LAYOUTS), st.integers(0, 2**31))
def test_cut_and_mask_agree_with_the_naive_loops(axes: list[tuple[int, ...]], seed: int) -> None:
    rng = np.random.default_rng(seed)
    present = {atom for atoms in axes for atom in atoms}
    cuts = []
    if 1 in present:
        heads = tuple(rng.permutation([head for head in (0, 2) if head in present])) if rng.random() < 0.7 else ()
        heads = tuple(int(head) for head in heads)
        cuts.append(Cut(1, heads, keep_of(rng, int(np.prod([SIZES[head] for head in heads], dtype=int)), SIZES[1])))
    for other in (0, 3):
        if other in present and rng.random() < 0.6:
            cuts.append(Cut(other, (), keep_of(rng, 1, SIZES[other])))
    shape = [int(np.prod([SIZES[atom] for atom in atoms])) for atoms in axes]
    array = rng.standard_normal(shape)
    order = [cuts[index] for index in rng.permutation(len(cuts))]
    want_cut, want_mask = naive(array, axes, cuts)
    np.testing.assert_array_equal(cut_array(array, axes, SIZES.__getitem__, order), want_cut)
    np.testing.assert_array_equal(mask_array(array, axes, SIZES.__getitem__, order), want_mask)


def test_heads_are_cut_after_the_sizes_inside_them() -> None:
    size, head = Cut(1, (0,), np.asarray([[0, 1], [1, 2]])), Cut(0, (), np.asarray([[1]]))
    assert in_order([head, size]) == [size, head]
    array = np.arange(6)
    np.testing.assert_array_equal(cut_array(array, [(0, 1)], SIZES.__getitem__, [head, size]), [4, 5])


def test_a_factor_that_occurs_twice_in_a_weight_is_cut_on_both_axes() -> None:
    array = np.arange(9).reshape(3, 3)
    got = cut_array(array, [(1,), (1,)], SIZES.__getitem__, [Cut(1, (), np.asarray([[0, 2]]))])
    np.testing.assert_array_equal(got, array[np.ix_([0, 2], [0, 2])])


def test_axes_of_size_one_stay() -> None:
    array = np.arange(3).reshape(1, 3, 1)
    got = cut_array(array, [(), (1,), ()], SIZES.__getitem__, [Cut(1, (), np.asarray([[2]]))])
    assert got.shape == (1, 1, 1) and got.item() == 2


@pytest.mark.parametrize("kept", [1, 4])
def test_depthwise_convolutions_get_as_many_groups_as_channels(kept: int) -> None:
    model = graphs.depthwise(6)
    analysis = analyse_model(model)
    applied = apply(analysis, Plan("", [graphs.keeping(analysis.groups["ffn.0"], [list(range(6 - kept, 6))])]))
    (node,) = [node for node in applied.graph.nodes if node.name == "depth"]
    assert attribute(node, "group") == kept
    assert applied.graph.weights["depth.w"].shape == (kept, 1, 3, 3)
    assert prove(analysis, applied, [graphs.inputs_for(model, 2)]).masked_equality < 1e-5


def test_an_expanded_class_token_is_cut_with_the_residual_and_follows_the_batch() -> None:
    model = graphs.transformer(pool="first", blocks=1)
    analysis = analyse_model(model)
    applied = apply(analysis, Plan("", [graphs.keeping(analysis.groups["residual"], [[0, 3, 4, 7, 11]])]))
    assert applied.graph.weights["cls"].shape == (1, 1, 5)
    proof = prove(analysis, applied, [graphs.inputs_for(model, batch) for batch in (1, 2, 5)])
    assert proof.masked_equality < 1e-5


def run_time_shapes(copies: bool) -> graphs.Net:
    """Reshape and Expand whose shapes hold the batch and the tokens as computed at run time, and sizes of heads."""
    net = graphs.Net()
    x = net.input("x", ["N", "S", 6])
    shape = net.op("Shape", x)
    rows, tokens = (net.op("Gather", shape, [axis], axis=0) for axis in (0, 1))
    h = net.linear(x, "v", 6, 12)
    whole = net.op("Mul", rows, tokens)
    flat = net.op("Reshape", h, net.op("Concat", whole, [3], [4], axis=0))  # [N·S, 3, 4]
    turned = net.op("Transpose", flat, perm=[1, 0, 2])
    stretched = net.op("Expand", net.weight("g", 3, 1, 4), net.op("Concat", [3], whole, [4], axis=0))
    turned = net.op("Transpose", net.op("Mul", turned, stretched), perm=[1, 0, 2])
    back = net.op("Reshape", turned, net.op("Concat", rows, tokens, [12], axis=0))
    net.output(net.linear(net.op("Relu", back), "o", 12, 5), ["N", "S", 5])
    return net


def test_sizes_in_shapes_that_are_computed_at_run_time_are_corrected() -> None:
    model = run_time_shapes(True).proto()
    analysis = analyse_model(model)
    (size,) = [group for group in analysis.structure.groups if group.size == 4]
    assert size.prunable and size.heads == 1  # outside attention all heads lose the same indices
    applied = apply(analysis, graphs.random_plan([size], np.random.default_rng(2)))
    feeds = [graphs.inputs_for(model, n, N=n, S=s) for n, s in ((1, 3), (4, 7))]
    assert prove(analysis, applied, feeds).masked_equality < 1e-5


def test_the_given_graph_is_not_changed() -> None:
    analysis = analyse_model(graphs.transformer(pool="first", qkv="packed", v=4))
    before = analysis.graph.to_proto().SerializeToString()
    packed = analysis.packed.graph.to_proto().SerializeToString()
    to_model(apply(analysis, graphs.random_plan(analysis.structure.groups, np.random.default_rng(0))).graph)
    assert analysis.graph.to_proto().SerializeToString() == before
    assert analysis.packed.graph.to_proto().SerializeToString() == packed


@pytest.mark.parametrize("given", ["scales", "sizes", "computed", "some axes"])
def test_resize_is_told_the_channels_that_stay(given: str) -> None:
    net = graphs.Net(opset=18)
    x = net.input("x", ["N", 3, 4, 4])
    h = net.op("Relu", net.op("Conv", x, net.weight("a.w", 6, 3, 1, 1), net.weight("a.b", 6)))
    if given == "scales":
        h = net.op("Resize", h, None, np.asarray([1.0, 1.0, 2.0, 2.0]), mode="nearest")
    elif given == "sizes":
        batch = net.op("Slice", net.op("Shape", x), [0], [1])
        h = net.op("Resize", h, None, None, net.op("Concat", batch, [6, 8, 8], axis=0), mode="nearest")
    elif given == "computed":
        h = net.op("Resize", h, None, None, net.op("Add", net.op("Shape", h), [0, 0, 3, 3]), mode="linear")
    else:
        h = net.op("Resize", h, None, None, [6, 8, 8], axes=[1, 2, 3], mode="cubic")
    h = net.op("Conv", h, net.weight("b.w", 2, 6, 3, 3), pads=[1] * 4)
    net.output(net.op("GlobalAveragePool", h), ["N", 2, 1, 1])
    model = net.proto()
    analysis = analyse_model(model)
    (group,) = analysis.structure.groups
    assert (group.kind, group.size, group.reasons) == ("channel", 6, ())
    applied = apply(analysis, Plan("", [graphs.keeping(group, [[1, 2, 5]])]))
    assert prove(analysis, applied, [graphs.inputs_for(model, batch) for batch in (1, 3)]).passed


@pytest.mark.parametrize("opset", [9, 17])
def test_sizes_computed_at_run_time_are_corrected_in_the_form_of_the_opset(opset: int) -> None:
    net = graphs.Net(opset)
    h = net.linear(net.input("x", ["N", 4, 5]), "a", 5, 6)
    h = net.op("Add", h, net.op("ConstantOfShape", net.op("Shape", h)))
    h = net.op("Reshape", h, net.op("Shape", net.op("Relu", h)))
    net.output(net.linear(h, "out", 6, 3), ["N", 4, 3])
    model = net.proto()
    analysis = analyse_model(model)
    applied = apply(analysis, graphs.random_plan(analysis.structure.groups, np.random.default_rng(0)))
    assert prove(analysis, applied, [graphs.inputs_for(model, batch) for batch in (1, 3)], 1).passed


@pytest.mark.parametrize("kinds", [("head",), ("qk",), ("v",), ("qk", "v", "head")])
def test_attention_with_heads_side_by_side_is_told_how_many_are_left(kinds: tuple[str, ...]) -> None:
    net = graphs.Net(23)
    x = net.input("x", ["N", 5, 12])
    query, key, value = (net.linear(x, name, 12, 12) for name in "qkv")
    y = net.op("Attention", query, key, value, q_num_heads=3, kv_num_heads=3, scale=0.5)
    net.output(net.linear(y, "o", 12, 3), ["N", 5, 3])
    model = net.proto()
    analysis = analyse_model(model)
    groups = [group for group in analysis.structure.groups if group.kind in kinds]
    assert len(groups) == len(kinds) and all(group.prunable for group in groups)
    plan = graphs.random_plan(groups, np.random.default_rng(0))
    applied = apply(analysis, plan)
    (node,) = (node for node in applied.graph.nodes if node.op_type == "Attention")
    left = next((entry.kept for entry in plan.groups if entry.kind == "head"), 3)
    assert attribute(node, "q_num_heads") == attribute(node, "kv_num_heads") == left < 4
    assert prove(analysis, applied, [graphs.inputs_for(model, batch) for batch in (1, 2)], 1).passed
