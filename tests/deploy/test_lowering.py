"""Each rule on its own: what it writes is valid in the target's opset, is taken by its importer, computes the same."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from one_node import TARGETS, assert_lowered, node_model, noise, ops
from onnx import numpy_helper

from onnxsnp.deploy.lint import lint
from onnxsnp.deploy.lower import lower
from onnxsnp.deploy.targets import BUILT_IN

every_target = pytest.mark.parametrize("target", TARGETS)
I8 = np.int64


def ints(*values: int) -> np.ndarray:
    return np.asarray(values, I8)


def constants(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def attributes(model: onnx.ModelProto, op: str) -> list[dict[str, object]]:
    return [
        {entry.name: onnx.helper.get_attribute_value(entry) for entry in node.attribute}
        for node in model.graph.node
        if node.op_type == op
    ]


X = {"x": noise(2, 3, 4)}
IMAGE = {"x": noise(1, 4, 6, 6)}

# what an operator is written as for TensorRT 8.2, and whether 10 takes it as it is
ACTIVATIONS = [
    ("Gelu", {}, 20, ["Div", "Erf", "Add", "Mul", "Mul"], True),
    ("Gelu", {"approximate": "tanh"}, 20, ["Mul", "Mul", "Mul", "Add", "Mul", "Tanh", "Add", "Mul", "Mul"], True),
    ("HardSwish", {}, 14, ["HardSigmoid", "Mul"], True),
    ("Mish", {}, 18, ["Softplus", "Tanh", "Mul"], True),
    ("Shrink", {"lambd": 0.3, "bias": 0.1}, 17, ["Greater", "Sub", "Where", "Add", "Less", "Where"], True),
    ("Swish", {"alpha": 1.5}, 24, ["Mul", "Sigmoid", "Mul"], False),
    ("HardSigmoid", {"alpha": 0.3}, 17, ["HardSigmoid"], True),
]


@pytest.mark.parametrize(("op", "settings", "opset", "written", "native"), ACTIVATIONS)
def test_activations_are_spelled_out_where_the_importer_has_none(
    op: str, settings: dict[str, object], opset: int, written: list[str], native: bool
) -> None:
    model = node_model(op, X, opset=opset, **settings)
    assert sorted(ops(assert_lowered(model, X))) == sorted(written)
    assert (ops(assert_lowered(model, X, "jetson-orin")) == [op]) == native


@every_target
@pytest.mark.parametrize("axis", [-1, 1])
def test_layer_norm_is_whole_from_8_6_on_and_spelled_out_below(target: str, axis: int) -> None:
    sizes = X["x"].shape[axis:]
    model = node_model(
        "LayerNormalization", X, {"g": noise(*sizes), "b": noise(*sizes)}, axis=axis, epsilon=0.01, opset=17
    )
    written = ops(assert_lowered(model, X, target))
    if target in ("jetson-nano", "jetson-xavier"):
        assert written == ["ReduceMean", "Sub", "Mul", "ReduceMean", "Add", "Sqrt", "Div", "Mul", "Add"]
    else:
        assert written == ["LayerNormalization"]


@every_target
def test_statistics_of_a_layer_norm_that_are_read_are_computed(target: str) -> None:
    model = node_model("LayerNormalization", X, {"g": noise(4)}, outputs=["y", "mean", "scale"], opset=17)
    assert "LayerNormalization" not in ops(assert_lowered(model, X, target))


@every_target
def test_rms_norm_is_spelled_out(target: str) -> None:
    model = node_model("RMSNormalization", X, {"g": noise(4)}, opset=23, axis=-1)
    assert ops(assert_lowered(model, X, target)) == ["Mul", "ReduceMean", "Add", "Sqrt", "Div", "Mul"]


@every_target
@pytest.mark.parametrize(("opset", "size"), [(18, 2), (21, 4)])
def test_scales_of_a_group_norm_are_of_groups_or_of_channels(target: str, opset: int, size: int) -> None:
    weights = {"g": noise(size), "b": noise(size)}
    assert_lowered(node_model("GroupNormalization", IMAGE, weights, opset=opset, num_groups=2), IMAGE, target)


@every_target
def test_instance_norm_with_a_computed_scale_is_spelled_out_below_8_6(target: str) -> None:
    feeds = {**IMAGE, "g": noise(4), "b": noise(4)}
    written = ops(assert_lowered(node_model("InstanceNormalization", feeds), feeds, target))
    assert ("InstanceNormalization" in written) == (target in ("tensorrt-8.6", "jetson-orin"))


@every_target
@pytest.mark.parametrize("opset", [13, 17, 18, 20])
@pytest.mark.parametrize("op", ["ReduceMean", "ReduceSum", "ReduceMax", "ReduceL2"])
def test_reductions_keep_their_axes_in_every_opset(target: str, opset: int, op: str) -> None:
    if opset >= (13 if op == "ReduceSum" else 18):
        model = node_model(op, X, {"axes": ints(-1, 0)}, opset=opset, keepdims=0)
    else:
        model = node_model(op, X, opset=opset, axes=[-1, 0], keepdims=0)
    lowered = assert_lowered(model, X, target)
    assert ops(lowered) == [op]
    if target != "jetson-orin" and op != "ReduceSum":
        assert attributes(lowered, op) == [{"axes": [0, 2], "keepdims": 0}] and not constants(lowered)
    else:
        assert [array.tolist() for array in constants(lowered).values()] == [[0, 2]]


@settings(max_examples=25, deadline=None)
@given(
    rank=st.integers(1, 4),
    data=st.data(),
    op=st.sampled_from(["ReduceMean", "ReduceSum", "ReduceMin", "ReduceSumSquare", "ReduceLogSumExp"]),
)
def test_any_axes_in_any_order_reduce_the_same(rank: int, data: st.DataObject, op: str) -> None:
    axes = data.draw(st.lists(st.integers(0, rank - 1), unique=True, max_size=rank))
    signed = [axis - rank if data.draw(st.booleans()) else axis for axis in axes]
    keep, noop = data.draw(st.integers(0, 1)), data.draw(st.integers(0, 1))
    feeds = {"x": noise(*range(2, 2 + rank))}
    if noop and not axes:
        op = "ReduceMean"  # of nothing; onnxruntime still squares or takes logarithms of the others
    model = node_model(op, feeds, {"axes": ints(*signed)}, opset=18, keepdims=keep, noop_with_empty_axes=noop)
    for target in ("jetson-nano", "jetson-orin"):
        assert_lowered(model, feeds, target)


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    data=st.data(),
)
def test_any_reshape_becomes_its_sizes(sizes: list[int], data: st.DataObject) -> None:
    feeds = {"x": noise(*sizes)}
    target = data.draw(st.permutations(sizes))
    target = [0 if size == sizes[axis] and data.draw(st.booleans()) else size for axis, size in enumerate(target)]
    target[data.draw(st.integers(0, len(sizes) - 1))] = -1
    model = node_model("Reshape", feeds, {"shape": ints(*target)}, opset=data.draw(st.sampled_from([11, 13, 14, 21])))
    for name in ("jetson-nano", "jetson-xavier"):
        lowered = assert_lowered(model, feeds, name)
        assert all((array > 0).all() for array in constants(lowered).values())


@settings(max_examples=25, deadline=None)
@given(parts=st.lists(st.integers(1, 3), min_size=2, max_size=4), axis=st.integers(-2, 1), opset=st.integers(11, 19))
def test_any_split_has_its_sizes_as_a_constant(parts: list[int], axis: int, opset: int) -> None:
    shape = [3, 3]
    shape[axis] = sum(parts)
    names = [f"y{index}" for index in range(len(parts))]
    feeds = {"x": noise(*shape)}
    if opset < 13:
        model = node_model("Split", feeds, outputs=names, opset=opset, axis=axis, split=parts)
    else:
        model = node_model("Split", feeds, {"sizes": ints(*parts)}, outputs=names, opset=opset, axis=axis)
    lowered = assert_lowered(model, feeds)
    assert [array.tolist() for array in constants(lowered).values()] == [parts]


@pytest.mark.parametrize("opset", [11, 13, 18])
def test_a_split_without_sizes_gets_them(opset: int) -> None:
    feeds = {"x": noise(2, 7 if opset == 18 else 8)}
    extra = {"num_outputs": 2} if opset == 18 else {}
    lowered = assert_lowered(node_model("Split", feeds, outputs=["a", "b"], opset=opset, axis=1, **extra), feeds)
    assert [array.tolist() for array in constants(lowered).values()] == [[4, 3 if opset == 18 else 4]]


@pytest.mark.parametrize("axis", [0, 1, 2, -1])
@pytest.mark.parametrize("op", ["Softmax", "LogSoftmax"])
def test_softmax_before_opset_13_runs_over_all_axes_from_its_own_on(op: str, axis: int) -> None:
    assert_lowered(node_model(op, X, opset=11, axis=axis), X)


def test_softmax_of_old_opsets_has_another_default_axis() -> None:
    assert_lowered(node_model("Softmax", X, opset=11), X)


@pytest.mark.parametrize(
    ("op", "opset", "extra"),
    [
        ("Squeeze", 11, {"axes": [0, -1]}),
        ("Squeeze", 11, {}),
        ("Squeeze", 13, {}),
        ("Unsqueeze", 11, {"axes": [0, -1]}),
        ("Flatten", 13, {"axis": 2}),
        ("Flatten", 13, {"axis": 0}),
        ("Clip", 10, {"min": -0.5, "max": 0.5}),
        ("Clip", 10, {"max": 0.5}),
        ("Pad", 10, {"pads": [0, 1, 0, 0, 0, 2], "value": 3.0}),
        ("Pad", 10, {"pads": [0, 0, 0, 0, 0, 0]}),
        ("Slice", 9, {"starts": [0, -2], "ends": [1, 1000], "axes": [0, 2]}),
        ("TopK", 9, {"k": 2, "axis": 1}),
        ("BatchNormalization", 17, {}),
        ("Dropout", 11, {}),
        ("Identity", 13, {}),
    ],
)
def test_attributes_of_old_opsets_are_inputs_of_new_ones(op: str, opset: int, extra: dict[str, object]) -> None:
    feeds = {"x": noise(1, 3, 1)} if "queeze" in op else X
    weights, outputs = {}, None
    if op == "BatchNormalization":
        weights = {name: np.abs(noise(3, seed=ord(name))) for name in "gbmv"}
    if op == "TopK":
        outputs = ["values", "indices"]
    assert_lowered(node_model(op, feeds, weights, opset=opset, outputs=outputs, **extra), feeds)


def test_a_slice_to_the_end_stays_within_int32() -> None:
    weights = {"s": ints(1), "e": ints(2**63 - 1), "a": ints(-1)}
    lowered = assert_lowered(node_model("Slice", X, weights, opset=13), X)
    assert max(array.max() for array in constants(lowered).values()) == 2**31 - 1


def test_a_slice_backwards_to_the_start_stays_within_int32() -> None:
    weights = {"s": ints(-1), "e": ints(-(2**63)), "a": ints(1), "t": ints(-1)}
    lowered = assert_lowered(node_model("Slice", X, weights, opset=13), X)
    assert min(array.min() for array in constants(lowered).values()) == -(2**31) + 1


def test_pads_of_some_axes_are_pads_of_all() -> None:
    weights = {"p": ints(1, 2), "v": np.float32(0.5).reshape(()), "a": ints(-1)}
    lowered = assert_lowered(node_model("Pad", X, weights, opset=18), X)
    assert [0, 0, 1, 0, 0, 2] in [array.tolist() for array in constants(lowered).values()]


def test_an_expand_to_the_same_size_goes() -> None:
    assert ops(assert_lowered(node_model("Expand", X, {"s": ints(3, 4)}, opset=13), X)) == ["Identity"]


@pytest.mark.parametrize("upper", [0, 1])
@pytest.mark.parametrize("shift", [-1, 0, 2])
@pytest.mark.parametrize("kind", ["f4", "bool", "i8"])
def test_a_triangle_is_chosen_by_a_constant(upper: int, shift: int, kind: str) -> None:
    feeds = {"x": (noise(2, 2, 4, 5) > 0).astype(kind) if kind != "f4" else noise(2, 2, 4, 5)}
    model = node_model("Trilu", feeds, {"k": np.asarray(shift)}, opset=14, upper=upper)
    assert "Trilu" not in ops(assert_lowered(model, feeds))
    assert "Trilu" not in ops(assert_lowered(model, feeds, "jetson-xavier"))  # 2 or 3 axes only
    assert "Trilu" in ops(assert_lowered(model, feeds, "jetson-orin"))


@pytest.mark.parametrize(("fmod", "kind"), [(0, "i8"), (1, "i8"), (1, "f4"), (0, "i4")])
def test_mod_is_what_is_left_of_a_division(fmod: int, kind: str) -> None:
    x = np.asarray([-7, 7, -7, 7, 5, -6]).astype(kind)
    y = np.asarray([3, 3, -3, -3, 5, 3]).astype(kind)
    feeds = {"x": x, "y": y}
    model = node_model("Mod", feeds, outputs=["z"], opset=13, fmod=fmod)
    assert "Mod" not in ops(assert_lowered(model, feeds))


@pytest.mark.parametrize(("positive", "negative"), [(1, 1), (1, 0), (0, 1)])
def test_infinities_are_beyond_the_largest_number(positive: int, negative: int) -> None:
    feeds = {"x": np.asarray([np.inf, -np.inf, 3.4e38, -3.4e38, np.nan, 0.0], np.float32)}
    model = node_model("IsInf", feeds, opset=10, detect_positive=positive, detect_negative=negative)
    assert "IsInf" not in ops(assert_lowered(model, feeds))


@pytest.mark.parametrize("axis", [-1, 0, 1])
def test_one_hot_counts_negative_indices_from_the_end(axis: int) -> None:
    feeds = {"x": np.asarray([[0, -1, 2], [1, 3, -4]])}
    weights = {"depth": np.asarray([4]), "values": np.asarray([0.5, 2.0], np.float32)}
    assert "OneHot" not in ops(assert_lowered(node_model("OneHot", feeds, weights, opset=11, axis=axis), feeds))


TRUTH = {"x": noise(2, 3) > 0, "y": noise(2, 3, seed=1) > 0}


def test_truth_values_are_combined_by_what_there_is() -> None:
    assert ops(assert_lowered(node_model("Xor", TRUTH, outputs=["z"], opset=13), TRUTH)) == ["And", "Or", "Not", "And"]


@pytest.mark.parametrize(
    ("op", "feeds", "weights", "extra"),
    [
        ("Equal", TRUTH, {}, {}),
        ("Gather", {"x": noise(3, 2) > 0, "i": np.asarray([2, 0])}, {}, {}),
        ("ReduceSum", {"x": np.arange(6).reshape(2, 3)}, {"axes": np.asarray([1])}, {}),
        ("ArgMax", {"x": np.asarray([[3, 1, 2]], np.int32)}, {}, {"axis": 1}),
        ("CumSum", {"x": np.arange(6).reshape(2, 3)}, {"axis": np.asarray(1)}, {}),
        ("Pow", {"x": np.asarray([2, 3])}, {"p": np.asarray([2, 2])}, {}),
    ],
)
def test_element_types_that_an_importer_lacks_go_through_one_that_it_has(
    op: str, feeds: dict[str, np.ndarray], weights: dict[str, np.ndarray], extra: dict[str, object]
) -> None:
    lowered = assert_lowered(node_model(op, feeds, weights, outputs=["z"], opset=13, **extra), feeds)
    assert {op, "Cast"} <= set(ops(lowered))


@pytest.mark.parametrize(
    ("equation", "shapes"),
    [
        ("bhid,bhjd->bhij", [(2, 3, 4, 5), (2, 3, 6, 5)]),
        ("BhwX,hw->BX", [(2, 3, 4, 5), (3, 4)]),
        ("b...d,...d->b...", [(2, 3, 4, 5), (3, 1, 5)]),
        ("iij->j", [(4, 4, 3)]),
        ("ij,ij->", [(3, 4), (3, 4)]),
        ("i,j->ij", [(3,), (4,)]),
        ("ab,bc,cd->ad", [(2, 3), (3, 4), (4, 5)]),
        ("abc,b->ac", [(2, 3, 4), (1,)]),
        ("ab,cd", [(2, 3), (4, 5)]),
        ("ji", [(2, 3)]),
    ],
)
def test_einsum_is_matrix_products(equation: str, shapes: list[tuple[int, ...]]) -> None:
    feeds = {f"x{index}": noise(*shape) for index, shape in enumerate(shapes)}
    model = node_model("Einsum", feeds, opset=12, equation=equation)
    assert "Einsum" not in ops(assert_lowered(model, feeds))


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_any_einsum_of_two_is_the_same(data: st.DataObject) -> None:
    sizes = dict(zip("abcd", (2, 3, 4, 5), strict=True))
    terms = [data.draw(st.lists(st.sampled_from("abcd"), min_size=1, max_size=4, unique=True)) for _ in range(2)]
    every = sorted({*terms[0], *terms[1]})
    wanted = data.draw(st.lists(st.sampled_from(every), max_size=len(every), unique=True))
    feeds = {f"x{index}": noise(*(sizes[one] for one in term)) for index, term in enumerate(terms)}
    equation = f"{''.join(terms[0])},{''.join(terms[1])}->{''.join(wanted)}"
    assert_lowered(node_model("Einsum", feeds, opset=12, equation=equation), feeds)


@every_target
@pytest.mark.parametrize(
    ("opset", "weights", "extra"),
    [
        (10, {"s": np.asarray([1, 1, 2, 2], np.float32)}, {"mode": "nearest"}),
        (9, {"s": np.asarray([1, 1, 2, 2], np.float32)}, {"mode": "nearest"}),
        (11, {"r": np.zeros(0, "f4"), "s": np.asarray([1, 1, 2, 1.5], np.float32)}, {"mode": "linear"}),
        (18, {"r": np.zeros(0, "f4"), "s": np.asarray([2, 1.5], np.float32)}, {"mode": "linear", "axes": [2, 3]}),
        (19, {"r": np.zeros(0, "f4"), "s": np.zeros(0, "f4"), "z": ints(3)}, {"mode": "linear", "axes": [3]}),
    ],
)
def test_images_are_resized_in_every_opset(
    target: str, opset: int, weights: dict[str, np.ndarray], extra: dict[str, object]
) -> None:
    op = "Upsample" if opset == 9 else "Resize"
    assert ops(assert_lowered(node_model(op, IMAGE, weights, opset=opset, **extra), IMAGE, target)) == ["Resize"]


ROIS = {"r": np.asarray([[0.3, 0.2, 4.1, 4.6]], np.float32), "b": ints(0)}


def test_regions_keep_the_coordinates_of_their_opset() -> None:
    old = node_model("RoiAlign", IMAGE, ROIS, opset=11, output_height=2, output_width=2)
    lowered = assert_lowered(old, IMAGE, "jetson-xavier")
    assert attributes(lowered, "RoiAlign")[0]["coordinate_transformation_mode"] == b"output_half_pixel"
    new = node_model("RoiAlign", IMAGE, ROIS, opset=16, output_height=2, output_width=2)
    assert_lowered(new, IMAGE, "jetson-xavier")
    found = lint(lower(new, replace(BUILT_IN["jetson-xavier"], opset=13)).proto, BUILT_IN["jetson-xavier"])
    assert [one.rule for one in found if one.severity == "error"] == ["form"]


def test_what_an_opset_has_no_form_for_stays_and_lint_names_it() -> None:
    weights = {"i": ints(0).reshape(1, 1), "u": noise(1, 3, 4)}
    model = node_model("ScatterND", X, weights, opset=16, reduction="add")
    found = lint(lower(model, BUILT_IN["jetson-nano"]).proto, BUILT_IN["jetson-nano"])
    assert {(one.rule, one.op) for one in found} == {("form", "ScatterND"), ("scatter-reduction", "ScatterND")}
    assert_lowered(node_model("ScatterND", X, weights, opset=16, reduction="none"), X)


def test_scatter_has_another_name() -> None:
    weights = {"i": np.zeros((1, 3, 4), I8), "u": noise(1, 3, 4)}
    assert ops(assert_lowered(node_model("Scatter", X, weights, opset=9), X)) == ["ScatterElements"]


@pytest.mark.parametrize("opset", [16, 20])
def test_grids_are_sampled_in_the_words_of_the_opset(opset: int) -> None:
    mode = "linear" if opset == 20 else "bilinear"
    feeds = {**IMAGE, "g": noise(1, 3, 3, 2)}
    model = node_model("GridSample", feeds, opset=opset, mode=mode)
    assert attributes(assert_lowered(model, feeds, "jetson-xavier"), "GridSample")[0]["mode"] == b"bilinear"
    assert attributes(assert_lowered(model, feeds, "jetson-orin"), "GridSample")[0]["mode"] == b"linear"


@pytest.mark.parametrize("op", ["AveragePool", "MaxPool"])
def test_a_pool_over_one_axis_is_one_over_two(op: str) -> None:
    model = node_model(op, X, kernel_shape=[2], strides=[2], pads=[1, 0])
    assert ops(assert_lowered(model, X)) == ["Reshape", op, "Reshape"]


def attention_model(**settings: object) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """Flat queries [2, 4, 12], keys and values of 5 tokens; `mask` and `past` add inputs."""
    mask, past = settings.pop("mask", None), settings.pop("past", False)
    heads, shared = settings.pop("heads", (3, 3))
    assert isinstance(heads, int) and isinstance(shared, int)
    feeds = {"q": noise(2, 4, 4 * heads), "k": noise(2, 5, 4 * shared, seed=1), "v": noise(2, 5, 2 * shared, seed=2)}
    inputs, outputs = list(feeds), ["y"]
    if mask is not None:
        feeds["mask"] = np.asarray(mask)
    if past:
        feeds["pk"], feeds["pv"] = noise(2, shared, 2, 4), noise(2, shared, 2, 2)
        outputs += ["present_k", "present_v"]
    if mask is not None or past:
        inputs += ["mask" if mask is not None else ""] + (["pk", "pv"] if past else [])
    model = node_model(
        "Attention",
        feeds,
        inputs=inputs,
        outputs=outputs,
        opset=24,
        q_num_heads=heads,
        kv_num_heads=shared,
        **settings,
    )
    return model, feeds


FLOATS = noise(2, 1, 4, 5, seed=5)
TRUTHS = FLOATS > -0.5


@every_target
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"scale": 0.3},
        {"heads": (6, 2)},
        {"is_causal": 1},
        {"mask": FLOATS},
        {"mask": TRUTHS},
        {"mask": TRUTHS[:1, 0]},
        {"mask": TRUTHS, "is_causal": 1},
        {"mask": FLOATS, "is_causal": 1},
        {"softcap": 2.0},
        {"past": True},
    ],
    ids=lambda settings: "+".join(settings) or "plain",
)
def test_attention_is_spelled_out(target: str, settings: dict[str, object]) -> None:
    model, feeds = attention_model(**dict(settings))
    written = ops(assert_lowered(model, feeds, target))
    assert "Attention" not in written
    assert written.index("Mul") < written.index("MatMul")  # the scale is on the query


def test_queries_that_see_no_key_give_zero() -> None:
    mask = TRUTHS.copy()
    mask[0, 0, 1] = False
    model, feeds = attention_model(mask=mask)
    assert_lowered(model, feeds)


@pytest.mark.parametrize("target", ["jetson-nano", "jetson-orin"])
@pytest.mark.parametrize("axis", [None, 0])
def test_symmetric_weights_stay_quantised_and_biases_do_not(target: str, axis: int | None) -> None:
    scale = np.float32(0.1).reshape(()) if axis is None else np.asarray([0.1, 0.2, 0.3], np.float32)
    zero = np.zeros(scale.shape, np.int8)
    data = np.random.default_rng(0).integers(-127, 128, (3, 4)).astype(np.int8)
    extra = {} if axis is None else {"axis": axis}
    weights = {"w": data, "s": scale, "z": zero}
    # behind an Add, so that the model has an input
    model = node_model("DequantizeLinear", {}, weights, opset=13, **extra)
    model.graph.node[0].output[0] = "d"
    model.graph.node.append(onnx.helper.make_node("Add", ["d", "x"], ["y"], name="add"))
    feeds = {"x": noise(3, 4)}
    model.graph.input.append(onnx.helper.make_tensor_value_info("x", 1, [3, 4]))
    written = ops(assert_lowered(model, feeds, target if target != "jetson-nano" else "jetson-xavier"))
    expected = ["DequantizeLinear", "Add"] if target == "jetson-orin" else ["QuantizeLinear", "DequantizeLinear", "Add"]
    assert written == expected
    for tensor in model.graph.initializer:
        if tensor.name in "wz":
            array = numpy_helper.to_array(tensor).astype(np.int32)
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    assert ops(assert_lowered(model, feeds, target)) == ["Add"]
