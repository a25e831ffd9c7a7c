"""Branches are where they should be, in order, and their equation holds; elsewhere there are none."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import graphs
import numpy as np
import onnx
import pytest

from onnxsnp.analysis import Analysis, analyse_model
from onnxsnp.graph.branches import Branch, find_branches

FOLDER = Path(__file__).resolve().parent.parent / "exports"
EXPECTED: dict[str, dict[str, Any]] = json.loads((FOLDER / "expected.json").read_text())
PRE_NORM = [
    "hf_deit_eager_ts17_dyn",
    "hf_vit_eager_dynamo18",
    "hf_vit_sdpa_dynamo23_dyn",
    "own_flat_split_ts17_dyn",
    "own_gemm_dynamo18",
    "own_gemm_ts17_dyn",
    "own_tanh_ts17",
    "timm_beit_eager_ts17_dyn",
    "timm_beit_sdpa_dynamo18",
    "timm_deit_eager_ts11",
    "timm_deit_sdpa_dynamo20_noopt",
    "timm_deit_sdpa_ts17_dyn",
    "timm_layerscale_eager_dynamo18",
    "timm_layerscale_eager_ts17_dyn",
    "timm_nobias_eager_ts17_dyn",
    "torchvision_vit_mha_dynamo18_dyn",
    "torchvision_vit_mha_ts17_dyn",
]
BUILT: dict[str, dict[str, Any]] = {
    "separate": {},
    "packed": {"qkv": "packed", "v": 4},
    "flat": {"qkv": "flat"},
    "reverse": {"reverse": True},
    "gated": {"gate": "pair"},
    "class token": {"pool": "first", "tokens": "T"},
    "opset 11": {"opset": 11},
}
WIDTH, TOKENS = 8, 5
Tail = Callable[[graphs.Net, Any, Any], Any]


def branches_of(analysis: Analysis) -> list[Branch]:
    return find_branches(analysis.graph, analysis.dependencies, analysis.linears)


def check_equation(analysis: Analysis, branches: list[Branch], feed: dict[str, np.ndarray]) -> None:
    """stream = other + (x W + b) · scale, as the graph computes it."""
    wanted = list(dict.fromkeys(name for item in branches for name in (item.linear.data, item.other, item.stream)))
    wanted = [name for name in wanted if name not in feed]
    values = analysis.graph.session(wanted, threads=1, optimize=False).run(None, feed)
    held = {**feed, **dict(zip(wanted, values, strict=True))}
    weights = analysis.graph.weights
    for branch in branches:
        linear = branch.linear
        y = held[linear.data] @ np.moveaxis(weights[linear.weight], linear.inner, 0)
        y = y + weights[linear.bias].reshape(-1) if linear.bias else y
        y = y * weights[branch.scale].reshape(-1) if branch.scale else y
        want = held[branch.stream]
        y = y.reshape(-1, y.shape[-1])
        got = branch.placed(y, want.shape)
        np.testing.assert_allclose(held[branch.other] + got, want, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(branch.rows(got), y)


@pytest.mark.parametrize("name", PRE_NORM)
def test_each_block_of_an_export_has_an_attention_and_an_ffn_branch_in_graph_order(name: str) -> None:
    analysis = analyse_model(FOLDER / f"{name}.onnx")
    branches, held = branches_of(analysis), EXPECTED[f"{name}.onnx"]["input"]
    groups = [group for group in analysis.structure.groups if group.kind in ("v", "ffn")]
    read_by = {weight: group for group in groups for weight, _ in group.consumers}
    assert [read_by[branch.linear.weight].kind for branch in branches] == ["v", "ffn", "v", "ffn"]
    assert len({read_by[branch.linear.weight].id for branch in branches}) == 4
    scaled = name.startswith(("timm_layerscale", "timm_beit"))
    assert all((branch.scale is not None) == scaled for branch in branches)
    check_equation(analysis, branches, {held["name"]: feed_of(name)})


def feed_of(name: str) -> np.ndarray:
    held = EXPECTED[f"{name}.onnx"]
    shape = (3, *held["input"]["shape"][1:]) if held["dynamic_batch"] else held["input"]["shape"]
    return np.random.default_rng(5).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("name", BUILT)
def test_each_block_has_its_output_projection_and_its_second_ffn_projection(name: str) -> None:
    model = graphs.transformer(**BUILT[name])
    analysis = analyse_model(model)
    branches = branches_of(analysis)
    assert [branch.linear.weight for branch in branches] == [
        f"/blocks.{block}/{part}.w" for block in range(2) for part in ("attn/proj", "mlp/fc2")
    ]
    assert [branch.linear.bias for branch in branches] == [
        f"/blocks.{block}/{part}.b" for block in range(2) for part in ("attn/proj", "mlp/fc2")
    ]
    assert all(before.stream == after.other for before, after in pairwise(branches))
    check_equation(analysis, branches, graphs.inputs_for(model, 3, T=TOKENS))


@pytest.mark.parametrize("name", ["timm_beit_eager_ts17_dyn", "timm_layerscale_eager_dynamo18"])
def test_layer_scale_is_named(name: str) -> None:
    analysis = analyse_model(FOLDER / f"{name}.onnx")
    parts = ("gamma_1", "gamma_2") if "beit" in name else ("ls1.gamma", "ls2.gamma")
    assert [branch.scale for branch in branches_of(analysis)] == [
        f"blocks.{block}.{part}" for block in range(2) for part in parts
    ]


def test_an_mlp_without_a_residual_has_no_branches() -> None:
    assert branches_of(analyse_model(graphs.mlp(4, 6, 6, 4))) == []


def block(tail: Tail, bias: bool = True) -> onnx.ModelProto:
    """x -> FFN -> tail(net, x, y), where y is what the second projection gives."""
    net = graphs.Net()
    x = net.input("x", ["N", TOKENS, WIDTH])
    hidden = net.op("Relu", net.linear(net.norm(x, "norm", WIDTH), "fc1", WIDTH, 12))
    net.output(tail(net, x, net.linear(hidden, "fc2", 12, WIDTH, bias)), ["N", TOKENS, WIDTH])
    return net.proto()


def add(net: graphs.Net, x: Any, y: Any) -> Any:
    return net.op("Tanh", net.op("Add", x, y, name="sum"))


def through(kind: str, *operands: Any, **attributes: Any) -> Tail:
    return lambda net, x, y: add(net, x, net.op(kind, y, *operands, **attributes))


def scaled(*shape: int, zero: bool = False) -> Tail:
    values = np.random.default_rng(0).uniform(0.5, 1.5, shape)
    values.reshape(-1)[0] *= not zero
    return through("Mul", values)


def gemm(net: graphs.Net, x: Any, y: Any, added: Any = None, **attributes: Any) -> Any:
    """A Gemm between reshapes."""
    bias = net.weight("g.b", WIDTH) if added is None else added
    flat = net.op("Gemm", net.reshape(y, -1, WIDTH), net.weight("g.w", WIDTH, WIDTH), bias, **attributes)
    return add(net, x, net.reshape(flat, -1, TOKENS, WIDTH))


FOUND: dict[str, tuple[Tail, str, bool]] = {  # what comes behind, the projection, whether there is a scale
    "plain": (add, "fc2.w", False),
    "branch first": (lambda net, x, y: net.op("Tanh", net.op("Add", y, x)), "fc2.w", False),
    "sum is the output": (lambda net, x, y: net.op("Add", x, y), "fc2.w", False),
    "scale": (scaled(WIDTH), "fc2.w", True),
    "scale with leading axes": (scaled(1, 1, WIDTH), "fc2.w", True),
    "scale in front": (
        lambda net, x, y: add(net, x, net.op("Mul", net.weight("gamma", WIDTH, shift=3.0), y)),
        "fc2.w",
        True,
    ),
    "through reshapes": (
        lambda net, x, y: add(net, x, net.reshape(net.reshape(y, -1, WIDTH), -1, TOKENS, WIDTH)),
        "fc2.w",
        False,
    ),
    "through identity": (through("Identity"), "fc2.w", False),
    "Gemm": (gemm, "g.w", False),
    "Gemm, turned": (lambda net, x, y: gemm(net, x, y, transB=1), "g.w", False),
    "its shape is read": (
        lambda net, x, y: net.op("Reshape", add(net, x, y), net.op("Shape", y)),
        "fc2.w",
        False,
    ),
}


@pytest.mark.parametrize("name", FOUND)
def test_a_branch_is_found_through_what_leaves_its_channels_alone(name: str) -> None:
    tail, weight, has_scale = FOUND[name]
    model = block(tail)
    analysis = analyse_model(model)
    (branch,) = branches_of(analysis)
    assert (branch.linear.weight, branch.scale is not None) == (weight, has_scale)
    check_equation(analysis, [branch], graphs.inputs_for(model, 3))


def test_a_branch_without_a_bias_has_none() -> None:
    model = block(add, bias=False)
    analysis = analyse_model(model)
    (branch,) = branches_of(analysis)
    assert branch.linear.bias is None
    check_equation(analysis, [branch], graphs.inputs_for(model, 3))


def read_twice(net: graphs.Net, x: Any, y: Any) -> Any:
    return net.op("Mul", add(net, x, y), net.op("Sigmoid", y))


def also_output(net: graphs.Net, x: Any, y: Any) -> Any:
    held = net.op("Identity", y)
    net.output(held, ["N", TOKENS, WIDTH], "second")
    return add(net, x, held)


NOWHERE: dict[str, Tail] = {
    "a nonlinearity between": through("Relu"),
    "a normalisation between": lambda net, x, y: add(net, x, net.norm(y, "post", WIDTH)),
    "read twice": read_twice,
    "an output of the model": also_output,
    "scale with a zero": scaled(WIDTH, zero=True),
    "scale per token": scaled(TOKENS, WIDTH),
    "one scale for all": scaled(1),
    "two scales": lambda net, x, y: scaled(WIDTH)(net, x, net.op("Mul", y, net.weight("gamma", WIDTH))),
    "divided": through("Div", np.full(WIDTH, 2.0)),
    "channels moved": lambda net, x, y: net.op(
        "Transpose", add(net, *(net.op("Transpose", value, perm=[0, 2, 1]) for value in (x, y))), perm=[0, 2, 1]
    ),
    "added to itself": lambda net, x, y: net.op("Tanh", net.op("Add", y, y)),
    "added to a constant": lambda net, x, y: net.op("Tanh", net.op("Add", y, net.weight("table", TOKENS, WIDTH))),
    "gated": lambda net, x, y: net.op("Mul", x, y),
    "taken away": lambda net, x, y: net.op("Tanh", net.op("Sub", x, y)),
    "broadcast": lambda net, x, y: net.op("Tanh", net.op("Add", y, net.mean(x, 1))),
    "channels regrouped": lambda net, x, y: net.reshape(
        add(net, *(net.reshape(value, -1, TOKENS, 2, WIDTH // 2) for value in (x, y))), -1, TOKENS, WIDTH
    ),
    "a Gemm with a factor": lambda net, x, y: gemm(net, x, y, alpha=2.0),
    "a Gemm that adds an activation": lambda net, x, y: gemm(net, x, y, added=net.reshape(x, -1, WIDTH)),
}


@pytest.mark.parametrize("name", NOWHERE)
def test_there_is_no_branch_where_more_lies_between_than_the_equation_has_room_for(name: str) -> None:
    assert branches_of(analyse_model(block(NOWHERE[name]))) == []


def parallel(order: str) -> onnx.ModelProto:
    """Branches a and b of the same input, summed first, or with what a is added to computed last."""
    net = graphs.Net()
    x = net.input("x", ["N", TOKENS, WIDTH])
    a = net.linear(net.op("Relu", net.linear(x, "a1", WIDTH, 12)), "a2", 12, WIDTH)
    if order == "one sum":
        h = net.op("Add", a, net.linear(net.op("Relu", net.linear(x, "b1", WIDTH, 12)), "b2", 12, WIDTH))
    else:
        b = net.linear(net.op("Relu", net.linear(x, "b1", WIDTH, 12)), "b2", 12, WIDTH)
        h = net.op("Add", net.op("Add", a, net.op("Tanh", net.linear(x, "g", WIDTH, WIDTH))), b)
    net.output(net.op("Tanh", h), ["N", TOKENS, WIDTH])
    return net.proto()


@pytest.mark.parametrize("order", ["one sum", "late sum"])
def test_no_branch_begins_before_the_sum_of_the_one_before_it(order: str) -> None:
    model = parallel(order)
    analysis = analyse_model(model)
    branches = branches_of(analysis)
    names = [node.name for node in analysis.graph.nodes]
    made = {name: index for index, node in enumerate(analysis.graph.nodes) for name in node.output}
    assert branches and branches[0].linear.weight == "a2.w"
    if order == "late sum":
        assert names.index("b2/MatMul") < made[branches[0].stream]  # else this tests nothing
    assert all(made[one.stream] < names.index(other.linear.node) for one, other in pairwise(branches))
    assert len(branches) == 1
    check_equation(analysis, branches, graphs.inputs_for(model, 3))
