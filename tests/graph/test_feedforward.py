"""Feed-forward networks are found in every export, their equation holds, and what only looks like one is left alone."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import graphs
import numpy as np
import pytest

from onnxsnp.analysis import Analysis, analyse_model
from onnxsnp.graph.branches import find_branches
from onnxsnp.graph.feedforward import FeedForward, find_feedforward
from onnxsnp.graph.segments import between, segment_graph

FOLDER = Path(__file__).resolve().parent.parent / "exports"
EXPECTED: dict[str, dict[str, Any]] = json.loads((FOLDER / "expected.json").read_text())
EXPORTS = sorted(name.removesuffix(".onnx") for name in EXPECTED)
BUILT: dict[str, dict[str, Any]] = {
    "separate": {},
    "gated": {"gate": "pair"},
    "gated, one projection": {"gate": "packed"},
    "tanh": {"activation": "gelu_tanh"},
    "opset 11": {"opset": 11},
    "class token": {"pool": "first"},
    "float64": {"dtype": np.float64},
}
WIDTH, FFN, TOKENS = 8, 12, 5


def networks(analysis: Analysis) -> list[FeedForward]:
    branches = find_branches(analysis.graph, analysis.dependencies, analysis.linears)
    found = [find_feedforward(branch, analysis.groups, analysis.graph, analysis.linears) for branch in branches]
    return [network for network in found if network is not None]


@functools.cache
def case(name: str) -> tuple[Analysis, dict[str, np.ndarray]]:
    if name in BUILT:
        model = graphs.transformer(**BUILT[name])
        return analyse_model(model), graphs.inputs_for(model, 3)
    held = EXPECTED[f"{name}.onnx"]
    shape = (3, *held["input"]["shape"][1:]) if held["dynamic_batch"] else held["input"]["shape"]
    feed = {held["input"]["name"]: np.random.default_rng(5).standard_normal(shape).astype(np.float32)}
    return analyse_model(FOLDER / f"{name}.onnx"), feed


def check_equation(analysis: Analysis, network: FeedForward, feed: dict[str, np.ndarray]) -> None:
    """u = x W₁ + b₁ of every projection, h = f(u) from u alone, and stream − other = (h W₂ + b₂) · scale."""
    graph, branch, weights = analysis.graph, network.branch, analysis.graph.weights
    names = list(
        dict.fromkeys([network.inputs, *network.before, branch.linear.data, branch.other, branch.stream]),
    )
    values = graph.session([name for name in names if name not in feed], threads=1, optimize=False)
    computed = [name for name in names if name not in feed]
    held = {**feed, **dict(zip(computed, values.run(computed, feed), strict=True))}
    x = held[network.inputs].reshape(-1, held[network.inputs].shape[-1])
    first = []
    for linear, name in zip(network.first, network.before, strict=True):
        u = x @ np.moveaxis(weights[linear.weight], linear.inner, 0)
        first.append(u + weights[linear.bias].reshape(-1) if linear.bias is not None else u)
        np.testing.assert_allclose(held[name].reshape(u.shape), first[-1], atol=1e-4)
    middle = between(graph, network.before, branch.linear.data)
    assert middle is not None
    part = segment_graph(graph, middle, middle.outputs, {name: held[name].dtype for name in network.before})
    given = dict(zip(network.before, first, strict=True))
    (h,) = part.session(threads=1).run(list(middle.outputs), {name: given[name] for name in part.inputs})
    h = h.reshape(first[0].shape)
    np.testing.assert_allclose(held[branch.linear.data].reshape(h.shape), h, atol=1e-4)
    y = h @ np.moveaxis(weights[branch.linear.weight], branch.linear.inner, 0)
    y = y + weights[branch.linear.bias].reshape(-1) if branch.linear.bias is not None else y
    y = y * weights[branch.scale].reshape(-1) if branch.scale is not None else y
    added = held[branch.stream] - held[branch.other]
    assert np.abs(added).max() > (1e-6 if branch.scale else 1e-3)
    np.testing.assert_allclose(added.reshape(y.shape), y, atol=1e-4 * np.abs(held[branch.stream]).max())


@pytest.mark.parametrize("name", [*BUILT, *EXPORTS])
def test_every_feed_forward_network_is_found_and_is_the_two_layers_it_is_taken_for(name: str) -> None:
    analysis, feed = case(name)
    found = networks(analysis)
    groups = [group.id for group in analysis.structure.groups if group.kind == "ffn"]
    assert [network.group.id for network in found] == groups and len(groups) >= 2
    for network in found:
        assert len(network.first) == (2 if name.startswith("gated") else 1)
        check_equation(analysis, network, feed)


def test_layer_scale_belongs_to_the_branch() -> None:
    for name in ("timm_layerscale_eager_dynamo18", "timm_layerscale_eager_ts17_dyn", "timm_beit_eager_ts17_dyn"):
        assert all(network.branch.scale is not None for network in networks(case(name)[0])), name


Middle = Callable[[graphs.Net, Any], Any]


def relu(net: graphs.Net, u: Any) -> Any:
    return net.op("Relu", u)


def convolved(net: graphs.Net, u: Any) -> Any:
    image = net.op("Transpose", u, perm=[0, 2, 1])
    image = net.op("Conv", image, net.weight("depth.w", FFN, 1, 3), group=FFN, pads=[1, 1])
    return net.op("Relu", net.op("Transpose", image, perm=[0, 2, 1]))


def normed(net: graphs.Net, u: Any) -> Any:
    return net.norm(net.op("Relu", u), "middle", FFN)


def averaged(net: graphs.Net, u: Any) -> Any:
    return net.op("Mul", u, net.op("Sigmoid", net.mean(u, 1)))


def per_neuron(net: graphs.Net, u: Any) -> Any:
    scaled = net.op("Mul", net.op("Relu", u), net.weight("slopes", 1, 1, FFN, shift=1.0))
    return net.op("Add", scaled, net.weight("offsets", FFN))


def per_token(net: graphs.Net, u: Any) -> Any:
    return net.op("Relu", net.op("Add", net.op("Relu", u), net.weight("places", 1, TOKENS, FFN)))


def per_token_only(net: graphs.Net, u: Any) -> Any:
    return net.op("Mul", net.op("Relu", u), net.weight("places", TOKENS, 1))


def block(middle: Middle = relu, reads: str = "norm", first: str = "MatMul") -> Analysis:
    """h = x + x W, and one FFN behind it.

    Args:
        reads: what the FFN reads: "norm", "stream", "earlier" (the stream before), "both", or "input" (of the model).
    """
    net = graphs.Net()
    x, side = net.input("x", ["N", TOKENS, WIDTH]), None
    early = net.op("Tanh", net.linear(x, "embed", WIDTH, WIDTH))
    h = net.op("Add", early, net.linear(net.op("Relu", net.linear(early, "a1", WIDTH, WIDTH)), "a2", WIDTH, WIDTH))
    if reads == "input":
        side = net.input("side", ["N", TOKENS, WIDTH])
    read = {
        "norm": lambda: net.norm(h, "norm", WIDTH),
        "stream": lambda: h,
        "earlier": lambda: net.norm(early, "norm", WIDTH),
        "both": lambda: net.op("Mul", net.norm(h, "norm", WIDTH), early),
        "input": lambda: net.op("Mul", h, side),
    }[reads]()
    if first == "Gemm":
        flat, other = net.reshape(read, -1, WIDTH), net.weight("fc1.c", 1, 1)
        u = net.op("Gemm", flat, net.weight("fc1.w", WIDTH, FFN), other, name="fc1")
        y = net.reshape(net.linear(middle(net, u), "fc2", FFN, WIDTH), -1, TOKENS, WIDTH)
    else:
        y = net.linear(middle(net, net.linear(read, "fc1", WIDTH, FFN)), "fc2", FFN, WIDTH)
    net.output(net.op("Add", h, y), ["N", TOKENS, WIDTH])
    return analyse_model(net.proto())


def ends(analysis: Analysis) -> set[str]:
    return {network.branch.linear.weight for network in networks(analysis)}


@pytest.mark.parametrize("reads", ["norm", "stream"])
@pytest.mark.parametrize("middle", [relu, per_neuron])
def test_what_depends_on_the_stream_alone_is_found(middle: Middle, reads: str) -> None:
    analysis = block(middle, reads)
    feed = {"x": np.random.default_rng(0).standard_normal((3, TOKENS, WIDTH)).astype(np.float32)}
    assert ends(analysis) == {"a2.w", "fc2.w"}
    for network in networks(analysis):
        check_equation(analysis, network, feed)


@pytest.mark.parametrize("middle", [convolved, normed, averaged, per_token, per_token_only])
def test_where_tokens_or_neurons_are_not_treated_alike_there_is_none(middle: Middle) -> None:
    assert "fc2.w" not in ends(block(middle))


@pytest.mark.parametrize("reads", ["earlier", "both", "input"])
def test_where_something_besides_the_stream_is_read_there_is_none(reads: str) -> None:
    assert ends(block(reads=reads)) == {"a2.w"}


def test_a_gemm_that_adds_something_else_than_a_bias_is_no_first_layer() -> None:
    assert ends(block(first="Gemm")) == {"a2.w"}


def test_attention_and_feed_forward_side_by_side() -> None:
    """Both read the same stream; the network that is added second would need a stream that is no longer there."""
    net = graphs.Net()
    x = net.input("x", ["N", TOKENS, WIDTH])
    h = net.linear(x, "embed", WIDTH, WIDTH)
    read = net.norm(h, "norm", WIDTH)
    mixed = net.op("MatMul", net.op("Softmax", net.op("MatMul", read, net.op("Transpose", read, perm=[0, 2, 1]))), read)
    left = net.op("Add", h, net.linear(mixed, "proj", WIDTH, WIDTH))
    y = net.linear(net.op("Relu", net.linear(read, "fc1", WIDTH, FFN)), "fc2", FFN, WIDTH)
    net.output(net.op("Add", left, y), ["N", TOKENS, WIDTH])
    analysis = analyse_model(net.proto())
    assert "ffn" in {group.kind for group in analysis.structure.groups}
    assert networks(analysis) == []


def test_a_projection_of_attention_is_no_feed_forward_network() -> None:
    analysis = analyse_model(graphs.transformer())
    branches = find_branches(analysis.graph, analysis.dependencies, analysis.linears)
    assert len(branches) == 4
    assert ends(analysis) == {"/blocks.0/mlp/fc2.w", "/blocks.1/mlp/fc2.w"}


def test_neurons_with_another_reader_are_left_alone() -> None:
    net = graphs.Net()
    h = net.linear(net.input("x", ["N", TOKENS, WIDTH]), "embed", WIDTH, WIDTH)
    hidden = net.op("Relu", net.linear(h, "fc1", WIDTH, FFN))
    h = net.op("Add", h, net.linear(hidden, "fc2", FFN, WIDTH))
    net.output(net.op("Add", h, net.op("Tanh", net.linear(hidden, "fc3", FFN, WIDTH))), ["N", TOKENS, WIDTH])
    assert networks(analyse_model(net.proto())) == []
