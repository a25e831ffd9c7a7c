"""Linear attention, similarities and attention over channels are reported, and nothing of theirs is cut as an FFN."""

from __future__ import annotations

from typing import Any

import graphs

from onnxsnp.analysis import Analysis, analyse_model


def apart(net: graphs.Net, x: Any, name: str) -> Any:
    """A projection with two heads of three, [N, 2, 5, 3]."""
    return net.op("Transpose", net.reshape(net.linear(x, name, 6, 6), 0, 5, 2, 3), perm=[0, 2, 1, 3])


def linear_attention() -> Analysis:
    net = graphs.Net()
    x = net.input("x", ["N", 5, 6])
    q, k, v = (apart(net, x, name) for name in "qkv")
    context = net.op("MatMul", net.op("Transpose", net.op("Relu", k), perm=[0, 1, 3, 2]), v, name="context")
    mixed = net.op("Transpose", net.op("MatMul", net.op("Relu", q), context, name="mix"), perm=[0, 2, 1, 3])
    h = net.linear(net.reshape(mixed, 0, 5, 6), "o", 6, 6)
    net.output(net.linear(net.op("Relu", net.linear(h, "up", 6, 8)), "down", 8, 4), ["N", 5, 4])
    return analyse_model(net.proto())


def test_what_linear_attention_ties_is_left_alone_and_the_rest_is_not() -> None:
    structure = linear_attention().structure
    assert [(item.node, "linear attention" in item.reason) for item in structure.skipped] == [("context", True)]
    sizes = structure.skipped[0].reason.split("(")[1].split(")")[0].split(", ")
    assert sorted(sizes) == ["2", "3", "3"]  # heads, key size, value size
    widths = {group.producers[0][0]: (group.kind, group.prunable) for group in structure.groups}
    assert widths == {"o.w": ("ffn", True), "up.w": ("ffn", True)}


def test_a_similarity_is_reported_with_the_width_it_contracts() -> None:
    net = graphs.Net()
    left, right = net.input("left", ["N", 6]), net.input("right", ["N", 5])
    a, b = net.linear(left, "a", 6, 7), net.linear(right, "b", 5, 7)
    net.output(net.op("MatMul", a, net.op("Transpose", b, perm=[1, 0]), name="similar"), ["N", "N"])
    structure = analyse_model(net.proto()).structure
    assert structure.groups == []
    (skipped,) = structure.skipped
    assert skipped.node == "similar" and "(7)" in skipped.reason


def test_attention_over_channels_is_a_site_whose_channels_and_heads_stay() -> None:
    net = graphs.Net()
    x = net.input("x", ["N", 5, 6])
    q, k, v = (net.op("Transpose", apart(net, x, name), perm=[0, 1, 3, 2]) for name in "qkv")
    scores = net.op("MatMul", q, net.op("Transpose", k, perm=[0, 1, 3, 2]), name="scores")
    mixed = net.op("MatMul", net.op("Softmax", scores, axis=-1), v)
    h = net.linear(net.reshape(net.op("Transpose", mixed, perm=[0, 3, 1, 2]), 0, 5, 6), "o", 6, 6)
    net.output(net.linear(net.op("Relu", net.linear(h, "up", 6, 8)), "down", 8, 4), ["N", 5, 4])
    structure = analyse_model(net.proto()).structure
    assert len(structure.sites) == 1
    (skipped,) = structure.skipped
    assert skipped.node == "scores" and "attention over channels, 3 x 3 in each head" in skipped.reason
    assert [(group.kind, group.size) for group in structure.groups] == [("ffn", 6), ("ffn", 8)]
